"""Points of one image that are to be typed: a table of coordinates, of cells, or GeoJSON.

::

    x,y                        CSV: pixels of the image; other columns are passed over, but of
    1042.5,388                 several images in a column such as filename only this one is taken
    cells.parquet, cells.csv   as `celltyper infer` writes them
    cells.geojson              as it or QuPath writes them: outlines, cells with nuclei, points

Points are in pixels of the full resolution, the first of which has its centre at (0.5, 0.5).
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
import shapely.geometry

from celltyper.cells.table import read_cells
from celltyper.datasets.dataset import listing
from celltyper.errors import DataError
from celltyper.patches.columns import IMAGE_COLUMNS, X_COLUMNS, Y_COLUMNS, coordinates, read_sheet
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import SLACK_PX, check_centers, in_micrometres, read_header

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".geojson", ".geojson.gz", ".json", ".json.gz")
_OUTLINES = ("Polygon", "MultiPolygon", "Point")


class Points(NamedTuple):
    """Points of an image as a table of windows, and what is drawn of each."""

    table: PatchTable
    features: tuple[Mapping[str, Any], ...]
    """GeoJSON Feature of every row, as it was or without properties."""


class _Point(NamedTuple):
    x: float
    y: float
    feature: Mapping[str, Any]


def read_points(
    path: Path, image: Path, *, classes: Sequence[str], mpp: float | None = None
) -> Points:
    """Read the points of an image.

    Parameters
    ----------
    path : Path
        CSV, ``cells.parquet`` or GeoJSON; see the top of this file.
    image : Path
        The image that they lie in.
    classes : sequence of str
        Those that the points may turn out to be.
    mpp : float or None
        Micrometres per pixel of the image; None takes what the file says.

    Returns
    -------
    Points
        Every point is a row, named ``<image>:<x>:<y>``, a repeated one with ``#2`` behind. The
        centre of an outline is its centroid, that of a cell with a nucleus the nucleus'.

    Raises
    ------
    DataError
        If the file holds no points, none of this image, or points outside it; the first of these
        is named, and all are counted.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file of points")
    name = path.name.lower()
    if name.endswith(".csv"):
        found = _of_csv(path, image)
    elif name.endswith(".parquet"):
        found = _of_cells(path, image)
    elif name.endswith(JSON_SUFFIXES):
        found = list(_of_geojson(path))
    else:
        raise DataError(
            f"{path}: points are a CSV with x and y, cells.parquet of 'celltyper infer', or GeoJSON"
        )
    if not found:
        raise DataError(f"{path}: no points in it")
    table = _table(path, image, found, classes, mpp)
    _check_inside(table)
    return Points(table, tuple(p.feature for p in found))


def _of_csv(path: Path, image: Path) -> list[_Point]:
    sheet = read_sheet(path)
    places = coordinates(sheet)
    if places is None:
        raise DataError(
            f"{path}: no columns {X_COLUMNS[0]} and {Y_COLUMNS[0]} (columns: "
            f"{', '.join(sheet.rows[0])})"
        )
    column = sheet.first_of(IMAGE_COLUMNS)
    kept = _of_image(path, sheet.values(column), image) if column else range(len(places))
    ids = sheet.values("cell_id" if "cell_id" in sheet.rows[0] else None)
    return [_Point(*places[i], _dot(*places[i], ids[i])) for i in kept]


def _of_cells(path: Path, image: Path) -> list[_Point]:
    cells = read_cells(path)
    if "image" in cells.column_names:
        cells = cells.take(_of_image(path, cells["image"].to_pylist(), image))
    outlines = shapely.to_geojson(shapely.from_wkb(cells["outline"].to_numpy()))
    columns = (cells[name].to_pylist() for name in ("x", "y", "cell_id"))
    return [
        _Point(x, y, _feature(json.loads(outline), i))
        for x, y, i, outline in zip(*columns, outlines, strict=True)
    ]


def _of_image(path: Path, names: Sequence[str], image: Path) -> list[int]:
    """Rows of this image, where a table names the image of every row."""
    own = {image.name, image.stem}
    kept = [i for i, name in enumerate(names) if Path(name.replace("\\", "/")).name in own]
    if not kept:
        raise DataError(
            f"{path}: no points of {image.name}, but of {listing(sorted(set(names)))}; give the "
            "table of this image, or remove the column that names images"
        )
    if len(kept) < len(names):
        logger.info("%s: %d of %d points are of %s", path, len(kept), len(names), image.name)
    return kept


def _of_geojson(path: Path) -> Iterator[_Point]:
    passed = Counter[str]()
    for number, feature in enumerate(_features(path), start=1):
        where = f"{path}: feature {number}"
        if (
            not isinstance(feature, dict)
            or not isinstance(feature.get("geometry"), dict)
            or not isinstance(feature.get("properties") or {}, dict)
        ):
            raise DataError(f"{where} is no GeoJSON Feature with a geometry")
        kind = str(feature["geometry"].get("type"))
        try:
            if kind == "MultiPoint":
                for x, y, *_ in feature["geometry"]["coordinates"]:
                    yield _Point(float(x), float(y), _dot(x, y))
            elif kind in _OUTLINES:
                shape = shapely.geometry.shape(
                    feature.get("nucleusGeometry") or feature["geometry"]
                )
                center = shapely.centroid(shape)
                if center.is_empty:
                    raise ValueError("nothing drawn")
                yield _Point(center.x, center.y, feature)
            else:
                passed[kind] += 1
        except (KeyError, TypeError, ValueError, AttributeError, shapely.errors.ShapelyError):
            raise DataError(f"{where}: coordinates are no {kind} in pixels") from None
    if passed:
        kinds = ", ".join(f"{n} {kind}" for kind, n in passed.items())
        logger.warning("%s: objects that are no points or outlines are left out: %s", path, kinds)


def _features(path: Path) -> list[Any]:
    try:
        raw = path.read_bytes()
        found = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{path}: unreadable or truncated GeoJSON ({error})") from None
    if isinstance(found, dict):
        found = [found] if found.get("type") == "Feature" else found.get("features")
    if not isinstance(found, list):
        raise DataError(f"{path}: no GeoJSON: expected a FeatureCollection or a list of Features")
    return found


def _dot(x: float, y: float, cell_id: str = "") -> dict[str, Any]:
    number = int(cell_id) if cell_id.isdigit() else None
    return _feature({"type": "Point", "coordinates": [x, y]}, number)


def _feature(geometry: Mapping[str, Any], cell_id: int | None) -> dict[str, Any]:
    measured = {} if cell_id is None else {"measurements": {"cell_id": cell_id}}
    return {"type": "Feature", "geometry": geometry, "properties": measured}


def _table(
    path: Path, image: Path, found: Sequence[_Point], classes: Sequence[str], mpp: float | None
) -> PatchTable:
    seen = Counter[str]()
    names = []
    for point in found:
        name = f"{image.name}:{point.x:.10g}:{point.y:.10g}"
        seen[name] += 1
        names.append(f"{name}#{seen[name]}" if seen[name] > 1 else name)
    n = len(found)
    return PatchTable(
        path=path,
        classes=tuple(classes),
        names=tuple(names),
        labels=np.full(n, -1, np.intp),
        votes=np.full((n, len(classes)), np.nan),
        experts=np.zeros(n, np.intp),
        groups=(image.name,) * n,
        domains=("",) * n,
        splits=("",) * n,
        files=(image,) * n,
        centers=np.array([(p.x, p.y) for p in found], np.float64),
        mpp=mpp,
    )


def _check_inside(table: PatchTable) -> None:
    header = read_header(table.files[0])
    size = np.array([header.width, header.height])
    beyond = (table.centers < -SLACK_PX) | (table.centers > size + SLACK_PX)
    outside = np.flatnonzero(beyond.any(axis=1))
    if len(outside):
        try:
            check_centers(table.take(outside))
        except DataError as error:
            text = f"{error} ({len(outside):,} of {len(table):,} points are outside)"
            raise DataError(text) from None
    if in_micrometres(table.centers, [header] * len(table), table.mpp):
        logger.warning(
            "%s: all points lie in the corner that micrometres would leave them: are x and y in "
            "pixels?",
            table.path,
        )
