"""Point annotations: a table of nucleus centres beside images; every point becomes a disc.

::

    my-cells/
      a.png                PNG, JPEG or TIFF, here or in images/
      a.csv                x,y,class: one row per nucleus; here or in points/ or annotations/
      points.csv           instead of one table an image: image,x,y,class
      meta.json            optional: mpp, radius_um (3.0) or radius_px, classes, groups, splits

x and y are pixels of the image, the centre of its first pixel being (0.5, 0.5). Columns may be in
any case and order; ``class`` may be left out (one class) or empty (class unknown), ``label`` (the
nucleus' id) and ``radius_um`` may be added, others are not read. Discs that meet are parted in the
middle: a pixel belongs to the nearest of the points that reach it.
"""

from __future__ import annotations

import json
import logging
import math
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import MAX_LABEL, read_image
from celltyper.errors import DataError
from celltyper.readers.files import (
    annotated_images,
    notes_by_image,
    ordered_classes,
    read_table,
    sample_groups,
    wrong_layout,
)
from celltyper.readers.folder import ONE_CLASS
from celltyper.readers.meta import check_splits, read_meta
from celltyper.readers.polygons import check_coordinates
from celltyper.types import UNKNOWN, Labels, Sample

logger = logging.getLogger(__name__)

TREE = "<name>.png (or .tif, .jpg) with <name>.csv (x,y,class), or points.csv (image,x,y,class)"
RADIUS_UM = 3.0
"""Radius of a disc unless stated: that of a lymphocyte's nucleus, so that discs stay inside."""


class _Point(NamedTuple):
    where: str
    x: float
    y: float
    kind: str | None
    label: int
    radius_um: float | None


class _Radius(NamedTuple):
    um: float | None
    px: float | None


def recognises(path: Path) -> bool:
    """Whether a folder, or the one folder in it, holds images with tables of x and y."""
    found = annotated_images(path, _is_table)
    if found is None:
        return False
    _, images, tables = found
    own = {*images, *(f.name for f in images.values()), "points"}
    return any(table.stem in own for table in tables)


def read_points(path: str | Path) -> Dataset:
    """Open point annotations; images are read on access, the tables at once.

    Parameters
    ----------
    path : str or Path
        Folder of the images, or the one above it.

    Returns
    -------
    Dataset
        Classes as ``meta.json`` lists them, or else all that occur, in alphabetical order; without
        any, the one class ``nucleus``. Points without a class beside others with one have the
        phenotype `UNKNOWN`. Label i is the i-th row of the image unless ``label`` says otherwise.

    Raises
    ------
    DataError
        At opening: another layout, an image without table, with two, a table without image, a
        value that is no number, class names that differ only in case or blanks or are not in
        ``meta.json``. On access: points outside the image or in micrometres, two points of
        different class at one place, no resolution to draw discs by.
    """
    path = Path(path)
    found = annotated_images(path, _is_table)
    if found is None:
        raise wrong_layout(path, "point annotations", TREE)
    root, images, tables = found
    joint = [t for t in tables if t.name.lower() == "points.csv" and "points" not in images]
    if joint and len(tables) > 1:
        others = listing(t.name for t in tables if t != joint[0])
        raise DataError(f"{root}: points.csv and {others}; keep one table or one for each image")
    if joint:
        points = _joint(joint[0], images)
        sources = dict.fromkeys(images, joint[0])
    else:
        sources = notes_by_image(root, images, tables, (".csv",))
        points = {stem: _points(table, _rows(table)) for stem, table in sources.items()}
    meta = read_meta(root)
    names = {p.kind for rows in points.values() for p in rows if p.kind is not None}
    numbers = sorted(n for n in names if n.isdigit() and n not in meta.classes)
    if numbers:
        raise DataError(f"{root}: class ids {listing(numbers)}; give classes by name")
    classes = ordered_classes(root, names, meta.classes)
    groups = sample_groups(root, images, meta.groups)
    check_splits(root, meta.splits, groups)
    read = partial(
        _read_sample,
        images=images,
        points=points,
        sources=sources,
        groups=groups,
        meta=(classes, meta.mpp, _radius(root)),
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
        colors=meta.colors,
    )


def _is_table(file: Path) -> bool:
    if file.suffix.lower() != ".csv":
        return False
    with file.open("rb") as stream:
        head = stream.readline(4096).decode("utf-8-sig", "replace")
    return {"x", "y"} <= {c.strip().strip('"').lower() for c in re.split("[,;\t]", head)}


def _rows(path: Path) -> list[dict[str, str]]:
    return [{k.lower(): v for k, v in row.items()} for row in read_table(path)]


def _joint(path: Path, images: dict[str, Path]) -> dict[str, list[_Point]]:
    """Points by image of one table."""
    stems = {file.name: stem for stem, file in images.items()} | {stem: stem for stem in images}
    rows: dict[str, list[dict[str, str]]] = {stem: [] for stem in images}
    for number, row in enumerate(_rows(path), start=1):
        if "image" not in row:
            raise DataError(f"{path}: no column image; expected {TREE}")
        if row["image"] not in stems:
            raise DataError(f"{path}: no image {row['image']!r} in {path.parent}")
        rows[stems[row["image"]]].append(row | {"number": str(number)})
    return {stem: _points(path, part) for stem, part in rows.items()}


def _points(path: Path, rows: list[dict[str, str]]) -> list[_Point]:
    points: list[_Point] = []
    for i, row in enumerate(rows, start=1):
        where = f"row {row.get('number', i)}"
        try:
            x, y = float(row["x"]), float(row["y"])
            radius = float(row["radius_um"]) if row.get("radius_um") else None
            label = int(row["label"]) if row.get("label") else i
        except ValueError as error:
            raise DataError(f"{path}: {where}: {error}; a class is given as 'class'") from None
        if not (math.isfinite(x) and math.isfinite(y)) or not 0 < label <= MAX_LABEL:
            raise DataError(f"{path}: {where}: x {x}, y {y}, label {label} is no place or id")
        if radius is not None and not 0 < radius < 1000:
            raise DataError(f"{path}: {where}: radius_um must be positive, got {radius}")
        points.append(_Point(where, x, y, row.get("class") or None, label, radius))
    if len({p.label for p in points}) != len(points):
        raise DataError(f"{path}: a label is given to two points; leave the column out")
    return points


def _radius(root: Path) -> _Radius:
    path = root / "meta.json"
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key in ("radius_um", "radius_px"):
        value = raw.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1000:
            raise DataError(f"{path}: {key!r} must be a positive number, got {value!r}")
    return _Radius(raw.get("radius_um"), raw.get("radius_px"))


def _read_sample(
    name: str,
    images: dict[str, Path],
    points: dict[str, list[_Point]],
    sources: dict[str, Path],
    groups: dict[str, str],
    meta: tuple[tuple[str, ...], float | None, _Radius],
) -> Sample:
    classes, mpp, radius = meta
    file = read_image(images[name])
    mpp = mpp or file.mpp
    rows = points[name]
    labels = _discs(rows, file.image.shape, sources[name], mpp, radius)
    lookup = np.zeros(int(labels.max(initial=0)) + 1, np.uint8)
    ids = {kind: i for i, kind in enumerate(classes, start=1)}
    present = np.bincount(labels.ravel()) > 0
    for point in rows:
        if point.label < len(present) and present[point.label]:
            unknown = UNKNOWN if classes else 1
            lookup[point.label] = unknown if point.kind is None else ids[point.kind]
    return Sample(file.image, labels, lookup, name, groups[name], mpp)


def _discs(
    points: list[_Point],
    shape: tuple[int, ...],
    where: Path,
    mpp: float | None,
    radius: _Radius,
) -> Labels:
    height, width = shape[:2]
    labels = np.zeros((height, width), np.int32)
    nearest = np.full((height, width), np.inf)
    xy = np.array([(p.x, p.y) for p in points]).reshape(-1, 2)
    check_coordinates(np.hstack([xy, xy]), [p.where for p in points], shape, where, mpp)
    places: dict[tuple[float, float], _Point] = {}
    for point in points:
        other = places.setdefault((point.x, point.y), point)
        if other.kind != point.kind:
            raise DataError(
                f"{where}: {other.where} and {point.where} are at the same place, x {point.x:g}, "
                f"y {point.y:g}, but of different class; keep one"
            )
        r = _pixels(point, where, mpp, radius)
        # The pixel with the point in it belongs to it however small the disc is.
        row, col = min(int(point.y), height - 1), min(int(point.x), width - 1)
        reach = math.ceil(r)
        top, left = max(0, row - reach), max(0, col - reach)
        window = np.s_[top : row + reach + 1, left : col + reach + 1]
        near = nearest[window]
        dy = np.arange(top, top + near.shape[0])[:, None] + 0.5 - point.y
        dx = np.arange(left, left + near.shape[1])[None] + 0.5 - point.x
        distance = dx**2 + dy**2
        inside = distance <= r * r
        inside[row - top, col - left] = True
        inside &= distance < near
        near[inside] = distance[inside]
        labels[window][inside] = point.label
    gone = sorted({p.label for p in points} - set(np.unique(labels).tolist()))
    if gone:
        logger.warning(
            "%s: %d of %d points have no pixel, too near others: label %s",
            where,
            len(gone),
            len(points),
            listing(gone),
        )
    return labels


def _pixels(point: _Point, where: Path, mpp: float | None, radius: _Radius) -> float:
    """Radius of a disc in pixels."""
    um = point.radius_um or radius.um
    if um is None and radius.px is not None:
        return radius.px
    if mpp is not None:
        return (um or RADIUS_UM) / mpp
    raise DataError(
        f"{where}: micrometres per pixel unknown, so how many pixels a disc has; state 'mpp' or "
        "'radius_px' in meta.json"
    )
