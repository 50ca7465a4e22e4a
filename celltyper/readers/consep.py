"""CoNSeP: 40x fields of colorectal cancer, 27 + 14 (doi:10.1016/j.media.2019.101563).

::

    CoNSeP/
      Train/Images/train_1.png          1000 x 1000, some with alpha channel
      Train/Labels/train_1.mat          'inst_map', 'type_map', 'inst_type'
      Test/Images, Test/Labels          the same
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import Dataset
from celltyper.datasets.images import as_labels, read_image
from celltyper.errors import DataError
from celltyper.readers.arrays import (
    as_integers,
    phenotypes_of_pixels,
    phenotypes_of_rows,
)
from celltyper.readers.files import check_same_size, images_and_labels_below, split_of
from celltyper.readers.matlab import has_variables, read_mat
from celltyper.readers.meta import check_splits
from celltyper.types import Labels, Sample

TREE = (
    "Train/Images/<name>.png with Train/Labels/<name>.mat ('inst_map', 'type_map', 'inst_type'), "
    "and Test/ alike"
)
FINE_CLASSES = (
    "other",
    "inflammatory",
    "healthy epithelial",
    "dysplastic/malignant epithelial",
    "fibroblast",
    "muscle",
    "endothelial",
)
CLASSES = ("other", "inflammatory", "epithelial", "spindle-shaped")
MPP = 0.25
_MERGED = np.array([0, 1, 2, 3, 3, 4, 4, 4], np.uint8)
"""Class of `CLASSES` by class of `FINE_CLASSES`."""


def recognises(path: Path) -> bool:
    """Whether there are ``.mat`` files with CoNSeP's variables."""
    return has_variables(path, ("inst_map", "type_map")) or has_variables(
        path, ("inst_map", "inst_type")
    )


def read_consep(path: str | Path, fine: bool = False) -> Dataset:
    """Open CoNSeP; images and labels are read on access.

    Parameters
    ----------
    path : str or Path
        Folder with the images and ``.mat`` files, each up to four levels down.
    fine : bool
        Keep the seven annotated classes; by default both epithelial classes are one, and
        fibroblasts, muscle and endothelium are spindle-shaped, as in the publication.

    Returns
    -------
    Dataset
        Four classes (or seven), 0.25 mpp. A nucleus has the class of most of its pixels in
        ``type_map``; ``inst_type`` is looked at only where there is no ``type_map``, and its
        row i belongs to the nucleus with the i-th lowest id. Every image is a group: the patients
        are not published. Images below ``Train`` and ``Test`` are the splits ``train`` and
        ``test``.

    Raises
    ------
    DataError
        At opening: no such files, an image without labels or labels without image. On access: an
        unreadable file, a missing variable, labels of another size than the image, a nucleus of
        no class or of a class outside 1..7.
    """
    path = Path(path)
    images, labels = images_and_labels_below(path, ".mat", "CoNSeP", TREE)
    groups = {name: name for name in images}
    splits: dict[str, tuple[str, ...]] = {}
    for name, file in labels.items():
        split, other = split_of(file, path), split_of(images[name], path)
        if split != other:
            raise DataError(
                f"{path}: {images[name].relative_to(path)} and {file.relative_to(path)} lie in "
                f"different splits; expected CoNSeP: {TREE}"
            )
        if split:
            splits[split] = (*splits.get(split, ()), name)
    check_splits(path, splits, groups)
    return Dataset(
        name="CoNSeP",
        path=path,
        classes=FINE_CLASSES if fine else CLASSES,
        mpp=MPP,
        names=tuple(images),
        groups=groups,
        read=partial(_read_sample, images=images, labels=labels, fine=fine),
        splits=splits,
    )


def _read_sample(name: str, images: dict[str, Path], labels: dict[str, Path], fine: bool) -> Sample:
    file = labels[name]
    image = read_image(images[name]).image
    mat = read_mat(file, ("inst_map",), optional=("type_map", "inst_type"))
    ids = as_labels(as_integers(mat["inst_map"], f"{file}: 'inst_map'"), file)
    check_same_size(ids.shape, file, image.shape, images[name])
    if "type_map" in mat:
        types = as_integers(mat["type_map"], f"{file}: 'type_map'")
        table = phenotypes_of_pixels(ids, types, FINE_CLASSES, file)
    elif "inst_type" in mat:
        types = as_integers(mat["inst_type"], f"{file}: 'inst_type'").ravel()
        table = _by_order(ids, types, file)
    else:
        raise DataError(f"{file}: neither 'type_map' nor 'inst_type' in it")
    return Sample(image, ids, table if fine else _MERGED[table], name, name, MPP)


def _by_order(ids: Labels, types: NDArray[np.integer], file: Path) -> NDArray[np.uint8]:
    present = np.unique(ids[ids > 0])
    if len(types) != len(present):
        raise DataError(
            f"{file}: 'inst_type' has {len(types)} rows, but 'inst_map' {len(present)} nuclei"
        )
    return phenotypes_of_rows(ids, present, types, FINE_CLASSES, file)
