"""Arctique: rendered H&E fields with exact masks, five classes (doi:10.5281/zenodo.14016860).

::

    arctique/
      images/img_12.png             512 x 512, RGB
      masks/instance/12.png         ids of nuclei, or .npy
      masks/semantic/12.png         ids of classes, or .npy
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    as_labels,
    read_image,
    read_label_image,
)
from celltyper.errors import DataError
from celltyper.readers.arrays import as_integers, open_array, phenotypes_of_pixels
from celltyper.readers.files import check_same_size, files_by_stem, split_of, wrong_layout
from celltyper.readers.meta import check_splits
from celltyper.readers.tree import folders_below
from celltyper.types import Labels, Sample

TREE = "images/img_<id>.png with masks/instance/<id>.png and masks/semantic/<id>.png (or .npy)"
CLASSES = ("epithelial", "plasma", "lymphocyte", "eosinophil", "fibroblast")
_KINDS = ("instance", "semantic")


def recognises(path: Path) -> bool:
    """Whether there is ``images/`` beside ``masks/instance/`` and ``masks/semantic/``."""
    return bool(_parts(f for f, _ in folders_below(path, strict=False)))


def read_arctique(path: str | Path) -> Dataset:
    """Open Arctique; images and masks are read on access.

    Parameters
    ----------
    path : str or Path
        Folder with ``images/`` and ``masks/``, or of several such folders (``train``, ``test``).

    Returns
    -------
    Dataset
        Five classes; the resolution of a rendered image is not published. Samples have the names
        of the images, after that of their folder if there are several. Every image is a group.
        A nucleus has the class of most of its pixels. Folders named ``train``, ``valid`` (or
        ``val``) and ``test`` are splits.

    Raises
    ------
    DataError
        At opening: no such folders, an image without mask or a mask without image. On access: an
        unreadable file, masks of another size than the image, a nucleus of no class or of a class
        outside 1..5.
    """
    path = Path(path)
    parts = _parts(f for f, _ in folders_below(path))
    if not parts:
        raise wrong_layout(path, "Arctique", TREE)
    files: dict[str, tuple[Path, Path, Path]] = {}
    splits: dict[str, tuple[str, ...]] = {}
    for part in parts:
        prefix = f"{part.name}_" if len(parts) > 1 else ""
        for image, *masks in _matched(part):
            name = prefix + image.stem
            if name in files:
                raise DataError(f"{path}: two images are named {name!r}; names must be unique")
            files[name] = (image, masks[0], masks[1])
            split = split_of(part / "images", path)
            if split:
                splits[split] = (*splits.get(split, ()), name)
    groups = {name: name for name in files}
    check_splits(path, splits, groups)
    return Dataset(
        name="Arctique",
        path=path,
        classes=CLASSES,
        mpp=None,
        names=tuple(files),
        groups=groups,
        read=partial(_read_sample, files=files),
        splits=splits,
    )


def _parts(folders: Iterable[Path]) -> list[Path]:
    kinds = [f"masks/{kind}" for kind in _KINDS]
    return [f for f in folders if all((f / d).is_dir() for d in ("images", *kinds))]


def _matched(part: Path) -> list[tuple[Path, ...]]:
    """Image, mask of nuclei and mask of classes by id, each there exactly once."""
    found = [_by_id(part / "images", IMAGE_SUFFIXES)]
    found += [_by_id(part / "masks" / kind, (*MASK_SUFFIXES, ".npy")) for kind in _KINDS]
    if not found[0]:
        raise wrong_layout(part / "images", "Arctique", TREE)
    for kind, masks in zip(_KINDS, found[1:], strict=True):
        bare = [file.name for key, file in found[0].items() if key not in masks]
        if bare:
            raise DataError(f"{part}: no mask in masks/{kind}/ for {listing(bare)}")
        orphans = [file.name for key, file in masks.items() if key not in found[0]]
        if orphans:
            raise DataError(f"{part}: no image for masks/{kind}/ of {listing(orphans)}")
    return [tuple(files[key] for files in found) for key in found[0]]


def _by_id(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    return {s.removeprefix("img_"): f for s, f in files_by_stem(folder, suffixes).items()}


def _read_sample(name: str, files: dict[str, tuple[Path, Path, Path]]) -> Sample:
    image_file, nuclei_file, classes_file = files[name]
    image = read_image(image_file).image
    labels, types = _read_mask(nuclei_file), _read_mask(classes_file)
    check_same_size(labels.shape, nuclei_file, image.shape, image_file)
    check_same_size(types.shape, classes_file, image.shape, image_file)
    table = phenotypes_of_pixels(labels, types, CLASSES, classes_file)
    return Sample(image, labels, table, name, name, None)


def _read_mask(file: Path) -> Labels:
    if file.suffix.lower() != ".npy":
        return read_label_image(file)
    raw: NDArray[Any] = np.asarray(open_array(file))
    if raw.ndim == 3 and 1 in (raw.shape[0], raw.shape[2]):
        raw = raw.reshape(raw.shape[1:] if raw.shape[0] == 1 else raw.shape[:2])
    return as_labels(as_integers(raw, file), file)
