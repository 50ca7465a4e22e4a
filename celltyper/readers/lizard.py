"""Lizard: 20x fields of colon from six centres, six classes (doi:10.1109/ICCVW54120.2021.00082).

::

    Lizard/
      lizard_images1/Lizard_Images1/dpath_1.png
      lizard_images2/Lizard_Images2/glas_1.png
      lizard_labels/Lizard_Labels/Labels/dpath_1.mat    'inst_map', 'id', 'class'
      lizard_labels/Lizard_Labels/info.csv              Filename,Source,Split
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import as_labels, read_image
from celltyper.errors import DataError
from celltyper.readers.arrays import as_integers, phenotypes_of_rows
from celltyper.readers.files import check_same_size, images_and_labels_below, read_table
from celltyper.readers.matlab import has_variables, read_mat
from celltyper.readers.meta import check_splits
from celltyper.readers.tree import folders_below
from celltyper.types import Sample

TREE = (
    "lizard_images1/<name>.png (and lizard_images2/), lizard_labels/Labels/<name>.mat ('inst_map', "
    "'id', 'class') and, optionally, info.csv (Filename,Source,Split)"
)
CLASSES = ("neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective")
MPP = 0.5


def recognises(path: Path) -> bool:
    """Whether there are ``.mat`` files with Lizard's variables."""
    return has_variables(path, ("inst_map", "id", "class"))


def read_lizard(path: str | Path) -> Dataset:
    """Open Lizard; images and labels are read on access.

    Parameters
    ----------
    path : str or Path
        Folder with the images and ``.mat`` files, each up to four levels down.

    Returns
    -------
    Dataset
        Six classes, 0.5 mpp. Row i of ``class`` is the class of nucleus ``id[i]``; rows of nuclei
        without a pixel are passed over. Every image is a group: it is one region, and the
        patients are not published. Domain ``centre`` is the file name up to the underscore. With
        ``info.csv``, its column ``Split`` gives the splits under the names that it uses, and
        ``Source`` a domain ``source``.

    Raises
    ------
    DataError
        At opening: no such files, an image without labels or labels without image, an image that
        ``info.csv`` lacks. On access: an unreadable file, a missing variable, labels of another
        size than the image, a nucleus without class, twice in the list, or of a class outside 1..6.
    """
    path = Path(path)
    images, labels = images_and_labels_below(path, ".mat", "Lizard", TREE)
    groups = {name: name for name in images}
    domains = {"centre": {name: centre_of(name) for name in images}}
    info = [folder / "info.csv" for folder, names in folders_below(path) if "info.csv" in names]
    splits: dict[str, tuple[str, ...]] = {}
    if info:
        rows = _read_info(info[0], groups)
        if all("Source" in row for row in rows.values()):
            domains["source"] = {name: row["Source"] for name, row in rows.items()}
        for name, row in rows.items():
            if row.get("Split"):
                splits[row["Split"]] = (*splits.get(row["Split"], ()), name)
        check_splits(info[0], splits, groups)
    return Dataset(
        name="Lizard",
        path=path,
        classes=CLASSES,
        mpp=MPP,
        names=tuple(images),
        groups=groups,
        read=partial(_read_sample, images=images, labels=labels),
        splits=dict(sorted(splits.items())),
        domains=domains,
    )


def centre_of(name: str) -> str:
    """Centre that an image of Lizard comes from: ``"dpath"`` of ``"dpath_1"``."""
    return name.split("_")[0].lower()


def _read_info(file: Path, names: dict[str, str]) -> dict[str, dict[str, str]]:
    """Rows of ``info.csv`` by image; rows of images that are not here are passed over."""
    table = read_table(file)
    if table and "Filename" not in table[0]:
        raise DataError(
            f"{file}: no column Filename (found {','.join(table[0])}); expected "
            "Filename,Source,Split"
        )
    rows: dict[str, dict[str, str]] = {}
    for row in table:
        name = row["Filename"].removesuffix(".png").removesuffix(".mat")
        if name in rows:
            raise DataError(f"{file}: image {name!r} is listed twice")
        rows[name] = row
    bare = [name for name in names if name not in rows]
    if bare:
        raise DataError(f"{file}: no row for the images {listing(bare)}")
    return {name: rows[name] for name in names}


def _read_sample(name: str, images: dict[str, Path], labels: dict[str, Path]) -> Sample:
    file = labels[name]
    image = read_image(images[name]).image
    mat = read_mat(file, ("inst_map", "id", "class"))
    ids = as_labels(as_integers(mat["inst_map"], f"{file}: 'inst_map'"), file)
    check_same_size(ids.shape, file, image.shape, images[name])
    table = phenotypes_of_rows(
        ids,
        as_integers(mat["id"], f"{file}: 'id'").ravel(),
        as_integers(mat["class"], f"{file}: 'class'").ravel(),
        CLASSES,
        file,
    )
    return Sample(image, ids, table, name, name, MPP)
