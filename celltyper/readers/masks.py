"""Instance masks as images with a table of classes.

::

    my-cells/
      images/a.png            PNG, JPEG or TIFF, RGB
      masks/a.png             PNG (16 bit) or TIFF (16 or 32 bit) of label ids, 0 is background
      classes.csv             image,label,class: one row per nucleus
      meta.json               optional: classes in order, mpp, colors, groups, splits
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import numpy as np

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    MAX_LABEL,
    read_image,
    read_label_image,
)
from celltyper.errors import DataError
from celltyper.readers.files import check_pairs, files_by_stem, ordered_classes, sample_groups
from celltyper.readers.meta import check_splits, read_meta
from celltyper.types import Sample

TREE = "images/<name>.png with masks/<name>.png (or .tif) and classes.csv (image,label,class)"
COLUMNS = ("image", "label", "class")


def recognises(path: Path) -> bool:
    """Whether there is ``images/`` beside ``masks/`` with mask images, or nothing, in it."""
    masks = path / "masks"
    if not (path / "images").is_dir() or not masks.is_dir():
        return False
    visible = [file for file in masks.iterdir() if not file.name.startswith(".")]
    return not visible or any(file.suffix.lower() in MASK_SUFFIXES for file in visible)


def read_masks(path: str | Path) -> Dataset:
    """Open a folder of instance masks; images and masks are read on access.

    Parameters
    ----------
    path : str or Path
        Folder with ``images/``, ``masks/`` and ``classes.csv`` with the columns ``image`` (stem or
        file name), ``label`` (id in the mask) and ``class`` (name, or id where ``meta.json`` lists
        ``classes``). Without classes in ``meta.json``, the classes are the names in the table in
        alphabetical order.

    Returns
    -------
    Dataset
        The samples.

    Raises
    ------
    DataError
        At opening: missing files or folders, other columns, a row twice, a row for an image that
        is not there, a label that is no positive integer, an unknown class, names
        that differ only in case or blanks. On access: a nucleus without a row, a row without
        nucleus, a mask of another size.
    """
    path = Path(path)
    images = files_by_stem(path / "images", IMAGE_SUFFIXES)
    masks = files_by_stem(path / "masks", MASK_SUFFIXES)
    check_pairs(path, images, masks, "masks")
    meta = read_meta(path)
    table = path / "classes.csv"
    named = _read_table(table, images)
    classes = meta.classes or _alphabetical(table, named)
    types = {
        image: {
            label: _class_id(table, image, label, name, classes) for label, name in rows.items()
        }
        for image, rows in named.items()
    }
    groups = sample_groups(path, images, meta.groups)
    check_splits(path, meta.splits, groups)
    read = partial(
        _read_sample,
        images=images,
        masks=masks,
        types=types,
        groups=groups,
        table=table,
        mpp=meta.mpp,
    )
    return Dataset(
        name=meta.name,
        path=path,
        classes=classes,
        mpp=meta.mpp,
        names=tuple(images),
        groups=groups,
        read=read,
        splits=meta.splits,
        colors=meta.colors,
    )


def _read_table(path: Path, images: dict[str, Path]) -> dict[str, dict[int, str]]:
    """Class name by image and label."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; it must list image,label,class for every nucleus")
    stems = {file.name: stem for stem, file in images.items()} | {stem: stem for stem in images}
    named: dict[str, dict[int, str]] = {stem: {} for stem in images}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            header = tuple(rows.fieldnames or ())
            if sorted(header) != sorted(COLUMNS):
                raise DataError(
                    f"{path}: columns must be {','.join(COLUMNS)}, got {','.join(header) or 'none'}"
                )
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: must have {len(COLUMNS)} fields")
                stem = stems.get(row["image"])
                if stem is None:
                    raise DataError(f"{where}: no image {row['image']!r} in {path.parent}/images")
                label = _label(where, row["label"])
                if label in named[stem]:
                    raise DataError(f"{where}: label {label} of image {stem!r} has a row already")
                named[stem][label] = row["class"].strip()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as UTF-8 CSV ({error})") from None
    return named


def _label(where: str, text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit()) or not 0 < int(text) <= MAX_LABEL:
        raise DataError(f"{where}: label must be an integer in 1..{MAX_LABEL}, got {text!r}")
    return int(text)


def _alphabetical(path: Path, named: dict[str, dict[int, str]]) -> tuple[str, ...]:
    classes = tuple(sorted({name for rows in named.values() for name in rows.values()}))
    if not classes:
        raise DataError(f"{path}: no rows, and no meta.json with 'classes'")
    if "" in classes:
        raise DataError(f"{path}: a row has an empty class")
    numeric = [c for c in classes if c.isdigit()]
    if numeric:
        raise DataError(
            f"{path}: class ids {listing(numeric)} without names; list them in meta.json as "
            '{"classes": {"1": name, ...}}'
        )
    return ordered_classes(path, classes)


def _class_id(path: Path, image: str, label: int, name: str, classes: tuple[str, ...]) -> int:
    if name in classes:
        return classes.index(name) + 1
    if name.isascii() and name.isdigit() and 1 <= int(name) <= len(classes):
        return int(name)
    raise DataError(
        f"{path}: image {image!r}, label {label}: unknown class {name!r} "
        f"(known: {', '.join(classes)})"
    )


def _read_sample(
    name: str,
    images: dict[str, Path],
    masks: dict[str, Path],
    types: dict[str, dict[int, int]],
    groups: dict[str, str],
    table: Path,
    mpp: float | None,
) -> Sample:
    file = read_image(images[name])
    labels = read_label_image(masks[name])
    if labels.shape != file.image.shape[:2]:
        raise DataError(
            f"{masks[name]}: mask is {labels.shape}, but the image {images[name].name} is "
            f"{file.image.shape[:2]}; both must have the same height and width"
        )
    lookup = np.zeros(int(labels.max(initial=0)) + 1, np.uint8)
    present = set(np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1)
    bare = sorted(int(i) for i in present - types[name].keys())
    if bare:
        raise DataError(f"{table}: image {name!r}: no row for label {listing(bare)} of its mask")
    empty = sorted(types[name].keys() - present)
    if empty:
        raise DataError(
            f"{table}: image {name!r}: label {listing(empty)} has a row but no pixel in "
            f"{masks[name].name}"
        )
    for label, kind in types[name].items():
        lookup[label] = kind
    return Sample(file.image, labels, lookup, name, groups[name], mpp or file.mpp)
