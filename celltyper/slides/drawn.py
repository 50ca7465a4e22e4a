"""Parts of a slide that the user states: a mask image, annotations of QuPath, a rectangle."""

from __future__ import annotations

import gzip
import json
import logging
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import shapely.geometry

from celltyper.datasets.images import read_image
from celltyper.errors import ConfigError, DataError
from celltyper.slides.slide import Slide
from celltyper.slides.tissue import TissueMask
from celltyper.tiling import Region

logger = logging.getLogger(__name__)

_LONGEST = 512
_ASPECT = 0.02
_GEOJSON = (".geojson", ".json", ".geojson.gz", ".json.gz")


def read_mask(path: str | Path, slide: Slide) -> TissueMask:
    """Part of a slide from a file.

    Parameters
    ----------
    path : str or Path
        PNG or TIFF of the whole slide at any size, not 0 where it counts; or GeoJSON of QuPath.
        Of annotations the area of all is taken, holes left out, less those whose class ends in
        ``*`` (QuPath's sign of what is to be ignored).
    slide : Slide

    Returns
    -------
    TissueMask

    Raises
    ------
    DataError
        If the file cannot be read, is of another shape than the slide, marks nothing, or an
        annotation lies outside the slide.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a mask image or a GeoJSON of QuPath")
    if path.name.lower().endswith(_GEOJSON):
        return _annotations(path, slide)
    return _image(path, slide)


def parse_region(text: str, slide: Slide) -> Region:
    """Rectangle from ``x,y,w,h`` in pixels of the full resolution.

    Raises
    ------
    ConfigError
        If these are not four whole numbers, or not a rectangle inside the slide.
    """
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"region {text!r}: give x,y,width,height in pixels of the full resolution, such as "
            "2000,1000,4096,4096"
        ) from None
    if width < 1 or height < 1 or x < 0 or y < 0:
        raise ConfigError(f"region {text}: x and y must be 0 or more, width and height 1 or more")
    if x + width > slide.size[0] or y + height > slide.size[1]:
        raise ConfigError(
            f"region {text}: reaches to x {x + width}, y {y + height}, but {slide.name} has "
            f"{slide.size[0]} x {slide.size[1]} px"
        )
    return Region(y, x, height, width)


def region_mask(region: Region, slide: Slide) -> TissueMask:
    """Part of a slide that is a rectangle of its full resolution."""
    row, col, height, width = region
    return _drawn(shapely.box(col, row, col + width, row + height), slide, "region")


def _image(path: Path, slide: Slide) -> TissueMask:
    try:
        grid = read_image(path).image.max(axis=2) > 0
    except DataError as error:
        raise DataError(f"mask {error}") from None
    height, width = grid.shape
    scale = slide.size[0] / width, slide.size[1] / height
    # The longer side of a mask that was cut or padded to whole pixels may be a pixel off.
    slack = _ASPECT + 1 / min(height, width)
    if abs(scale[0] / scale[1] - 1) > slack:
        raise DataError(
            f"mask {path}: {width} x {height} px has other proportions than {slide.name} "
            f"({slide.size[0]} x {slide.size[1]} px); it must show the whole slide"
        )
    if not grid.any():
        raise DataError(f"mask {path}: is 0 everywhere; set what counts to 1 or 255")
    if grid.all():
        logger.warning("mask %s: is 0 nowhere, so the whole slide counts", path)
    return TissueMask(grid, scale, f"mask {path.name}")


def _annotations(path: Path, slide: Slide) -> TissueMask:
    width, height = slide.size
    slide_box = shapely.box(0, 0, width, height)
    kept: list[Any] = []
    ignored: list[Any] = []
    passed = 0
    for where, kind, name, shape in _features(path):
        if kind not in ("annotation", "") or shape is None:
            passed += 1
            continue
        if not shapely.intersects(shape, slide_box):
            x0, y0, x1, y1 = shape.bounds
            raise DataError(
                f"{path}: {where} lies outside {slide.name} ({width} x {height} px) at x "
                f"{x0:g}..{x1:g}, y {y0:g}..{y1:g}; is it of another slide or in micrometres?"
            )
        (ignored if name.endswith("*") else kept).append(shape)
    if passed:
        logger.warning("%s: %d objects that outline no region are passed over", path, passed)
    area = shapely.union_all(kept)
    if ignored:
        area = shapely.difference(area, shapely.union_all(ignored))
    area = shapely.intersection(area, slide_box)
    if shapely.area(area) == 0:
        raise DataError(f"{path}: no annotation with an area; draw regions in QuPath and export")
    return _drawn(area, slide, f"annotations {path.name}")


def _features(path: Path) -> Iterator[tuple[str, str, str, Any]]:
    """Place in the file, kind, class and shape (None if it has no area) of every object."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        found = json.loads(raw)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{path}: unreadable or truncated GeoJSON ({error})") from None
    if isinstance(found, dict):
        found = [found] if found.get("type") == "Feature" else found.get("features")
    if not isinstance(found, list):
        raise DataError(f"{path}: no GeoJSON: expected a FeatureCollection or a list of Features")
    for number, feature in enumerate(found, start=1):
        where = f"feature {number}"
        try:
            properties = feature.get("properties") or {}
            kind = str(properties.get("objectType") or properties.get("object_type") or "").lower()
            name = properties.get("classification") or {}
            if isinstance(name, dict):
                name = name.get("name") or ": ".join(map(str, name.get("names") or []))
            shape = shapely.geometry.shape(feature["geometry"])
        except (AttributeError, KeyError, TypeError, ValueError, shapely.GEOSException) as error:
            raise DataError(f"{path}: {where} is no GeoJSON Feature ({error!r})") from None
        if shape.geom_type not in ("Polygon", "MultiPolygon"):
            shape = None
        elif not shape.is_valid:
            shape = shapely.make_valid(shape, method="structure", keep_collapsed=False)
        yield where, kind, str(name), shape


def _drawn(area: Any, slide: Slide, source: str) -> TissueMask:
    side = max(slide.size) / _LONGEST
    rows, cols = (np.arange(math.ceil(n / side)) * side + side / 2 for n in slide.size[::-1])
    shapely.prepare(area)
    grid = shapely.intersects_xy(area, *np.meshgrid(cols, rows))
    return TissueMask(grid, (side, side), source, area)
