"""QuPath annotations: GeoJSON beside images.

::

    my-cells/
      a.tif               PNG, JPEG or TIFF, here or in images/
      a.geojson           or .json, .geojson.gz; here or in annotations/, labels/ or geojson/
      meta.json           optional: classes in order, mpp, colors, groups, splits

Outlines are in pixels of the full resolution, as QuPath exports them. Of a cell with its nucleus
the nucleus is taken. TMA cores, tiles, points and lines are passed over with a count, and so are
annotations that hold three other objects or more: regions that were annotated, not nuclei.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely

from celltyper.cells.colors import default_colors
from celltyper.datasets.dataset import Dataset
from celltyper.datasets.images import read_image
from celltyper.errors import DataError
from celltyper.readers.files import (
    annotated_images,
    notes_by_image,
    ordered_classes,
    sample_groups,
    wrong_layout,
)
from celltyper.readers.folder import ONE_CLASS
from celltyper.readers.meta import check_splits, read_meta
from celltyper.readers.polygons import phenotypes_at, rasterise
from celltyper.types import UNKNOWN, Sample

logger = logging.getLogger(__name__)

TREE = "<name>.tif (or .png, .jpg) with <name>.geojson beside it or in annotations/ (QuPath)"
_SUFFIXES = (".geojson.gz", ".json.gz", ".geojson", ".json")
_KINDS = ("annotation", "detection", "cell", "")
_REGION = 3
"""An annotation that holds so many other objects is a region."""
_HEAD = 4096


class _Object(NamedTuple):
    name: str
    kind: str
    phenotype: str | None
    color: str | None
    geometry: Any


def recognises(path: Path) -> bool:
    """Whether a folder, or the one folder in it, holds images with GeoJSON."""
    return annotated_images(path, _is_note) is not None


def read_qupath(path: str | Path) -> Dataset:
    """Open images with QuPath annotations; images and outlines are read on access.

    Parameters
    ----------
    path : str or Path
        Folder of the images, or the one above it.

    Returns
    -------
    Dataset
        Classes as ``meta.json`` lists them, or else all that occur, in alphabetical order; derived
        classes are named as QuPath does, ``"Tumor: Positive"``. Objects without a class have the
        phenotype `UNKNOWN`; where no object has one, all are of the class ``nucleus``. Colors are
        the annotation's.

    Raises
    ------
    DataError
        At opening: another layout, an image without file, with two (two annotators), a file
        without image, no GeoJSON, class names that differ only in case or blanks or are not in
        ``meta.json``. On access: an outline outside the image, or in other units than pixels.
    """
    path = Path(path)
    found = annotated_images(path, _is_note)
    if found is None:
        raise wrong_layout(path, "QuPath annotations", TREE)
    root, images, files = found
    notes = notes_by_image(root, images, files, _SUFFIXES)
    meta = read_meta(root)
    colors: dict[str, str] = {}
    for note in notes.values():
        for item in _read_objects(note, geometry=False):
            if item.phenotype is not None:
                colors.setdefault(item.phenotype, item.color or "")
    classes = ordered_classes(root, colors, meta.classes)
    groups = sample_groups(root, images, meta.groups)
    check_splits(root, meta.splits, groups)
    own = {name: color for name, color in colors.items() if color}
    read = partial(
        _read_sample, images=images, notes=notes, groups=groups, meta=(classes, meta.mpp)
    )
    return Dataset(
        name=meta.name,
        path=path,
        classes=classes or ONE_CLASS,
        mpp=meta.mpp,
        names=tuple(images),
        groups=groups,
        read=read,
        splits=meta.splits,
        colors=meta.colors or (default_colors(classes, own) if own else ()),
    )


def _is_note(file: Path) -> bool:
    """Whether a file is GeoJSON by its name, or for plain JSON by its beginning."""
    name = file.name.lower()
    if name.endswith((".geojson", ".geojson.gz", ".json.gz")):
        return True
    if not name.endswith(".json") or name == "meta.json":
        return False
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
    return b'"Feature' in head or head.strip() == b"[]"


def _read_sample(
    name: str,
    images: dict[str, Path],
    notes: dict[str, Path],
    groups: dict[str, str],
    meta: tuple[tuple[str, ...], float | None],
) -> Sample:
    classes, mpp = meta
    file = read_image(images[name])
    mpp = mpp or file.mpp
    objects = list(_read_objects(notes[name]))
    regions = _regions(objects)
    if regions:
        logger.warning("%s: %d annotations are regions and left out", notes[name], len(regions))
    objects = [o for i, o in enumerate(objects) if i not in regions]
    ids = {phenotype: i for i, phenotype in enumerate(classes, start=1)}
    kinds = [
        ids[o.phenotype] if o.phenotype is not None else UNKNOWN if classes else 1 for o in objects
    ]
    labels = rasterise(
        [o.geometry for o in objects],
        [o.name for o in objects],
        file.image.shape,
        notes[name],
        mpp,
    )
    return Sample(file.image, labels, phenotypes_at(labels, kinds), name, groups[name], mpp)


def _regions(objects: list[_Object]) -> set[int]:
    """Annotations that hold a point of at least `_REGION` other objects."""
    drawn = [i for i, o in enumerate(objects) if o.kind == "annotation"]
    if not drawn or len(objects) <= _REGION:
        return set()
    shapes = shapely.make_valid(np.array([o.geometry for o in objects], dtype=object))
    inner = shapely.STRtree(shapely.point_on_surface(shapes))
    holder, held = inner.query(shapes[drawn], predicate="contains")
    counts = np.bincount(holder[np.array(drawn, np.int64)[holder] != held], minlength=len(drawn))
    return {drawn[i] for i in np.flatnonzero(counts >= _REGION)}


def _read_objects(path: Path, geometry: bool = True) -> Iterator[_Object]:
    """Nuclei of a file; without `geometry`, only their classes."""
    passed = 0
    for number, feature in enumerate(_features(path), start=1):
        where = f"feature {number}"
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            raise DataError(f"{path}: {where} is no GeoJSON Feature")
        properties = feature.get("properties") or {}
        outline = feature.get("nucleusGeometry") or feature.get("geometry") or {}
        if not isinstance(properties, dict) or not isinstance(outline, dict):
            raise DataError(f"{path}: {where} is no GeoJSON Feature")
        kind = _kind(feature, properties)
        if kind not in _KINDS or outline.get("type") not in ("Polygon", "MultiPolygon"):
            passed += 1
            continue
        phenotype, color = _classification(path, where, properties.get("classification"))
        shape = _outline(path, where, outline) if geometry else None
        yield _Object(where, kind, phenotype, color, shape)
    if passed and geometry:
        logger.warning("%s: %d objects that outline no nucleus are left out", path, passed)


def _features(path: Path) -> list[Any]:
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        found = json.loads(raw)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{path}: unreadable or truncated GeoJSON ({error})") from None
    if isinstance(found, dict) and found.get("type") == "Feature":
        return [found]
    if isinstance(found, dict):
        found = found.get("features")
    if not isinstance(found, list):
        raise DataError(f"{path}: no GeoJSON: expected a FeatureCollection or a list of Features")
    return found


def _kind(feature: dict[str, Any], properties: dict[str, Any]) -> str:
    """Kind of object: QuPath 0.3 and later state it in the properties, 0.2 as the id."""
    kind = properties.get("objectType") or properties.get("object_type")
    if kind is None and str(feature.get("id")).endswith("Object"):
        kind = str(feature["id"]).removeprefix("Path").removesuffix("Object")
    return str(kind or "").lower()


def _classification(path: Path, where: str, raw: Any) -> tuple[str | None, str | None]:
    """Name and color ``#rrggbb`` of a classification."""
    if not raw:
        return None, None
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, dict):
        raise DataError(f"{path}: {where}: classification must be an object, got {raw!r}")
    names = raw.get("names") or [raw.get("name") or ""]
    name = ": ".join(map(str, names))
    color = raw.get("color")
    if isinstance(raw.get("colorRGB"), int):
        color = [raw["colorRGB"] >> shift & 255 for shift in (16, 8, 0)]
    if not (isinstance(color, list) and len(color) == 3 and all(c in range(256) for c in color)):
        color = None
    return name if name.strip() else None, "#" + bytes(color).hex() if color else None


def _outline(path: Path, where: str, raw: dict[str, Any]) -> Any:
    try:
        parts = raw["coordinates"]
        polygons = []
        for rings in [parts] if raw["type"] == "Polygon" else parts:
            arrays = [np.array([p[:2] for p in r], np.float64).reshape(-1, 2) for r in rings]
            if not all(np.isfinite(a).all() for a in arrays):
                raise ValueError("not finite")
            if arrays and len(arrays[0]) >= 3:
                holes = [a for a in arrays[1:] if len(a) >= 3]
                polygons.append(shapely.Polygon(arrays[0], holes))
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"{path}: {where}: coordinates are no rings of points ({error})") from None
    return polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)
