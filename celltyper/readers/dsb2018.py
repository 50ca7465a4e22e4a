"""Data Science Bowl 2018 (Caicedo 2019, doi:10.1038/s41592-019-0612-7): nuclei of many stains.

::

    stage1_train/
      00071198d059.../
        images/00071198d059....png     RGB with alpha
        masks/07a9bf1d7594....png      one binary mask a nucleus

Nuclei have no class and images no stated resolution. The group is the image. Label i is the i-th
mask by file name; where masks overlap, the nucleus of fewer pixels lies on top.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import numpy as np

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import IMAGE_SUFFIXES, MASK_SUFFIXES, read_image
from celltyper.errors import DataError
from celltyper.readers.files import check_same_size, files_by_stem, wrong_layout
from celltyper.readers.folder import ONE_CLASS
from celltyper.readers.polygons import painting_order, phenotypes_at
from celltyper.readers.tree import find_folders, subfolders
from celltyper.types import Sample

logger = logging.getLogger(__name__)

TREE = "<id>/images/<id>.png with <id>/masks/*.png, one binary mask a nucleus (DSB 2018)"


def recognises(path: Path) -> bool:
    """Whether a folder holds DSB 2018: ``<id>/images/<id>.png`` beside ``<id>/masks``."""
    return next(find_folders(path, _holds_published_ids), None) is not None


def read_dsb2018(path: str | Path) -> Dataset:
    """Open DSB 2018 or masks in its layout; images and masks are read on access.

    Parameters
    ----------
    path : str or Path
        Folder of the folders ``<id>``, or up to two levels above it.

    Returns
    -------
    Dataset
        One class, resolution unknown, every image its own group. Folders that lie beside and hold
        images without ``masks`` (``stage1_test``) are not part of it.

    Raises
    ------
    DataError
        At opening: another layout, an ``<id>`` without ``masks`` or without its one image. On
        access: unreadable files, a mask of another size or with more than two values.
    """
    path = Path(path)
    root = next(find_folders(path, _holds_ids), None)
    if root is None:
        raise wrong_layout(path, "DSB 2018", TREE)
    images: dict[str, Path] = {}
    for folder in subfolders(root):
        pictures = folder / "images"
        found = files_by_stem(pictures, IMAGE_SUFFIXES) if pictures.is_dir() else {}
        if len(found) != 1:
            names = listing(f.name for f in found.values()) or "none"
            raise DataError(f"{pictures}: must hold one image, found {names}; expected {TREE}")
        if not (folder / "masks").is_dir():
            raise DataError(f"{folder}: no folder masks for its image; expected {TREE}")
        images[folder.name] = next(iter(found.values()))
    groups = {name: name for name in images}
    return Dataset(
        name="DSB 2018",
        path=path,
        classes=ONE_CLASS,
        mpp=None,
        names=tuple(images),
        groups=groups,
        read=partial(_read_sample, images=images),
    )


def _holds_ids(folder: Path) -> bool:
    inner = subfolders(folder)[:5]
    return any((f / "images").is_dir() and (f / "masks").is_dir() for f in inner)


def _holds_published_ids(folder: Path) -> bool:
    """Whether images are named as their folder; a folder of other datasets may look alike."""
    inner = subfolders(folder)[:5]
    return _holds_ids(folder) and any((f / "images" / f"{f.name}.png").is_file() for f in inner)


def _read_sample(name: str, images: dict[str, Path]) -> Sample:
    image = read_image(images[name]).image
    files = list(files_by_stem(images[name].parent.parent / "masks", MASK_SUFFIXES).values())
    inside = []
    for file in files:
        mask = read_image(file).image[..., 0]
        check_same_size(mask.shape, file, image.shape, images[name])
        values = np.unique(mask)
        if len(values) > 2 or (len(values) == 2 and values[0] != 0):
            raise DataError(
                f"{file}: {len(values)} different values; a mask is 0 outside its one nucleus and "
                "255 inside"
            )
        inside.append(np.flatnonzero(mask))
    labels = np.zeros(image.shape[:2], np.int32)
    for i in painting_order(np.array([len(pixels) for pixels in inside])):
        labels.ravel()[inside[i]] = i + 1
    gone = np.setdiff1d(np.arange(1, len(files) + 1), labels)
    if len(gone):
        logger.warning(
            "%s: %d of %d masks are empty or covered by others: %s",
            images[name].parent.parent,
            len(gone),
            len(files),
            listing(files[i - 1].name for i in gone),
        )
    return Sample(image, labels, phenotypes_at(labels, [1] * len(files)), name, name)
