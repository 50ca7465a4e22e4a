"""PanNuke: 40x patches of 19 tissues in three folds, five classes (arXiv:2003.10778).

::

    PanNuke/
      Fold 1/images/fold1/images.npy    (n, 256, 256, 3) float64, 0..255
      Fold 1/images/fold1/types.npy     (n,) names of tissues
      Fold 1/masks/fold1/masks.npy      (n, 256, 256, 6) float64, a map of nuclei per class
      Fold 2, Fold 3                    the same
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import Dataset
from celltyper.datasets.images import as_labels
from celltyper.errors import DataError
from celltyper.readers.arrays import as_integers, as_rgb, open_array
from celltyper.readers.files import wrong_layout
from celltyper.readers.meta import check_splits
from celltyper.readers.tree import folders_below
from celltyper.types import Labels, Sample

TREE = (
    "Fold <k>/images/fold<k>/images.npy (n, 256, 256, 3) and types.npy (n,), and "
    "Fold <k>/masks/fold<k>/masks.npy (n, 256, 256, 6), for one fold or more"
)
CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
MPP = 0.25
FILES = ("images.npy", "masks.npy", "types.npy")


def recognises(path: Path) -> bool:
    """Whether there are ``images.npy`` and ``masks.npy``."""
    seen: set[str] = set()
    for _, names in folders_below(path, strict=False):
        seen.update(names)
        if {"images.npy", "masks.npy"} <= seen:
            return True
    return False


def read_pannuke(path: str | Path) -> Dataset:
    """Open PanNuke; patches are read on access from the memory-mapped arrays.

    Parameters
    ----------
    path : str or Path
        Folder of a fold, or of several. The fold of a file is the number in the nearest folder
        above it that is named like ``Fold 1`` or ``fold1``.

    Returns
    -------
    Dataset
        Five classes, 0.25 mpp. Patches are named by fold and index in the arrays
        (``fold1_00000``); folds are splits; ``tissue`` is a domain. Every patch is a group: which
        of them come from one patient or slide is not published, so intervals are too narrow.

    Raises
    ------
    DataError
        At opening: a file missing, truncated or of another shape, numbers of patches that differ.
        On access: ids or pixels out of range, or a background channel that covers the nuclei.

    Notes
    -----
    Ids are unique within a class only. In a sample they run from 1 in order of class, then of id.
    Where nuclei of two classes overlap, the pixel goes to the class that is later in the list; a
    nucleus that is covered wholly is dropped.
    """
    path = Path(path)
    folds = _find_folds(path)
    names: list[str] = []
    splits: dict[str, tuple[str, ...]] = {}
    tissues: dict[str, str] = {}
    for fold, files in folds.items():
        types = _check_fold(files)
        ours = tuple(f"{fold}_{i:05d}" for i in range(len(types)))
        names += ours
        splits[fold] = ours
        tissues.update(zip(ours, types, strict=True))
    groups = {name: name for name in names}
    check_splits(path, splits, groups)
    return Dataset(
        name="PanNuke",
        path=path,
        classes=CLASSES,
        mpp=MPP,
        names=tuple(names),
        groups=groups,
        read=partial(_read_sample, folds=folds),
        splits=splits,
        domains={"tissue": tissues},
    )


def _find_folds(path: Path) -> dict[str, dict[str, Path]]:
    """Paths of the three arrays by fold."""
    folds: dict[str, dict[str, Path]] = {}
    for folder, names in folders_below(path):
        for file in (folder / n for n in names if n in FILES):
            files = folds.setdefault(_fold_of(folder, path), {})
            if file.name in files:
                raise DataError(
                    f"{path}: {files[file.name].relative_to(path)} and {file.relative_to(path)} "
                    f"belong to the same fold; expected PanNuke: {TREE}"
                )
            files[file.name] = file
    if not folds:
        raise wrong_layout(path, "PanNuke", TREE)
    for fold, files in folds.items():
        for name in FILES:
            if name not in files:
                there = ", ".join(str(f.relative_to(path)) for f in files.values())
                raise DataError(
                    f"{path}: {fold} has {there}, but no {name}; expected PanNuke: {TREE}"
                )
    return dict(sorted(folds.items()))


def _fold_of(folder: Path, path: Path) -> str:
    for part in reversed((path.resolve().name, *folder.relative_to(path).parts)):
        found = re.fullmatch(r"fold[ _-]*0*(\d+)", part, re.IGNORECASE)
        if found:
            return f"fold{found[1]}"
    return "fold"


def _check_fold(files: dict[str, Path]) -> list[str]:
    """Tissue of every patch."""
    images, masks, types = (open_array(files[n]) for n in FILES)
    for file, array, channels in ((FILES[0], images, 3), (FILES[1], masks, 6)):
        if array.ndim != 4 or array.shape[3] != channels:
            raise DataError(f"{files[file]}: shape {array.shape}, expected (n, H, W, {channels})")
    if images.shape[:3] != masks.shape[:3]:
        raise DataError(
            f"{files['masks.npy']}: shape {masks.shape}, but images.npy is {images.shape}; both "
            "must have the same number, height and width"
        )
    if types.size != len(images):
        raise DataError(f"{files['types.npy']}: {types.size} tissues for {len(images)} patches")
    if types.dtype.kind == "S":
        types = np.char.decode(types, "utf-8", "replace")
    return [str(t) for t in types.ravel()]


def _read_sample(name: str, folds: dict[str, dict[str, Path]]) -> Sample:
    fold, _, row = name.rpartition("_")
    files, i = folds[fold], int(row)
    where = f"{files['masks.npy']}, patch {i}"
    image = as_rgb(open_array(files["images.npy"])[i], f"{files['images.npy']}, patch {i}")
    masks = as_integers(np.asarray(open_array(files["masks.npy"])[i]), where)
    labels, table = _join(masks[..., :5], where)
    covered = (masks[..., 5] > 0) & (labels > 0)
    if 2 * covered.sum() > (labels > 0).sum():
        raise DataError(
            f"{where}: the background channel covers more than half of the nuclei; channels must "
            f"be {', '.join(CLASSES)}, background"
        )
    return Sample(image, labels, table, name, name, MPP)


def _join(masks: NDArray[np.integer[Any]], where: str) -> tuple[Labels, NDArray[np.uint8]]:
    if int(masks.min(initial=0)) < 0:
        raise DataError(f"{where}: nucleus {int(masks.min())} in masks.npy; ids start at 1")
    labels = np.zeros(masks.shape[:2], np.int64)
    classes = [0]
    for channel in range(masks.shape[2]):
        inside = masks[..., channel] > 0
        ids, rank = np.unique(masks[..., channel][inside], return_inverse=True)
        labels[inside] = len(classes) + rank
        classes += [channel + 1] * len(ids)
    table = np.array(classes, np.uint8)[: int(labels.max(initial=0)) + 1]
    table[np.bincount(labels.ravel(), minlength=len(table)) == 0] = 0
    table[0] = 0
    return as_labels(labels, where), table
