"""CoNIC: Lizard cut into 256 px patches for a challenge (doi:10.1016/j.media.2023.103047).

::

    CoNIC/
      images.npy          (4981, 256, 256, 3) uint8
      labels.npy          (4981, 256, 256, 2): nuclei, classes
      patch_info.csv      one column: dpath_1-0000, the image before the first hyphen
      counts.csv          not looked at
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import as_labels
from celltyper.errors import DataError
from celltyper.readers.arrays import as_integers, as_rgb, open_array, phenotypes_of_pixels
from celltyper.readers.files import read_table, wrong_layout
from celltyper.readers.lizard import CLASSES, MPP, centre_of
from celltyper.readers.tree import folders_below
from celltyper.types import Sample

TREE = "images.npy (N, 256, 256, 3), labels.npy (N, 256, 256, 2) and patch_info.csv (one column)"
FILES = ("images.npy", "labels.npy", "patch_info.csv")


def recognises(path: Path) -> bool:
    """Whether ``images.npy``, ``labels.npy`` and ``patch_info.csv`` lie in one folder."""
    return any(set(FILES) <= set(names) for _, names in folders_below(path, strict=False))


def read_conic(path: str | Path) -> Dataset:
    """Open CoNIC; patches are read on access from the memory-mapped arrays.

    Parameters
    ----------
    path : str or Path
        Folder with the three files, or one up to four levels above it.

    Returns
    -------
    Dataset
        The six classes of Lizard, 0.5 mpp. Patches have the names in ``patch_info.csv``; the group
        is the image that a patch was cut from, the name up to the first hyphen, and the domain
        ``centre`` that up to the first underscore. A nucleus has the class of most of its pixels.

    Raises
    ------
    DataError
        At opening: a file missing or truncated, arrays of another shape, a number of names that
        differs from that of patches, a name twice. On access: ids or pixels out of range, a
        nucleus of no class or of a class outside 1..6.
    """
    path = Path(path)
    found = [f for f, names in folders_below(path) if set(names) & set(FILES[:2])]
    if not found:
        raise wrong_layout(path, "CoNIC", TREE)
    if len(found) > 1:
        where = listing(str(f.relative_to(path)) for f in found)
        raise DataError(f"{path}: images.npy or labels.npy in {where}; expected one CoNIC: {TREE}")
    folder = found[0]
    for file in FILES:
        if not (folder / file).is_file():
            raise DataError(f"{folder}: no {file}; expected CoNIC: {TREE}")
    images, labels = open_array(folder / FILES[0]), open_array(folder / FILES[1])
    for file, array, channels in ((FILES[0], images, 3), (FILES[1], labels, 2)):
        if array.ndim != 4 or array.shape[3] != channels:
            raise DataError(f"{folder / file}: shape {array.shape}, expected (N, H, W, {channels})")
    if images.shape[:3] != labels.shape[:3]:
        raise DataError(
            f"{folder}: images.npy is {images.shape}, but labels.npy {labels.shape}; both must "
            "have the same number, height and width"
        )
    names = _read_names(folder / FILES[2], len(images))
    groups = {name: name.split("-")[0] for name in names}
    return Dataset(
        name="CoNIC",
        path=path,
        classes=CLASSES,
        mpp=MPP,
        names=names,
        groups=groups,
        read=partial(_read_sample, folder=folder, rows={n: i for i, n in enumerate(names)}),
        domains={"centre": {name: centre_of(groups[name]) for name in names}},
    )


def _read_names(file: Path, patches: int) -> tuple[str, ...]:
    rows = read_table(file)
    if any(len(row) != 1 for row in rows[:1]):
        raise DataError(f"{file}: columns {','.join(rows[0])}, expected patch_info alone")
    names = tuple(value for row in rows for value in row.values())
    if len(names) != patches:
        raise DataError(f"{file}: {len(names)} names, but images.npy has {patches} patches")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{file}: patch {listing(twice)} is listed twice")
    return names


def _read_sample(name: str, folder: Path, rows: dict[str, int]) -> Sample:
    row = rows[name]
    where = f"{folder / 'labels.npy'}, patch {name!r}"
    image = as_rgb(open_array(folder / "images.npy")[row], f"{folder / 'images.npy'}, {name!r}")
    pair = as_integers(np.asarray(open_array(folder / "labels.npy")[row]), where)
    ids = as_labels(pair[..., 0], where)
    table = phenotypes_of_pixels(ids, pair[..., 1], CLASSES, where)
    return Sample(image, ids, table, name, name.split("-")[0], MPP)
