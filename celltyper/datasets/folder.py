"""Plain folders: images beside ``.npz`` labels, the layout that celltyper itself writes.

::

    my-cells/
      images/a.png            PNG, JPEG or TIFF, RGB
      labels/a.npz            'inst' (H, W) label ids; 'type' (H, W) class ids, 0 is background
      meta.json               {"classes": ["tumour", "immune"], "mpp": 0.5}
"""

from __future__ import annotations

import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import IMAGE_SUFFIXES, as_labels, read_image
from celltyper.datasets.meta import check_splits, read_meta
from celltyper.errors import DataError
from celltyper.types import Labels, Sample

FOLDER_TREE = "images/<name>.png with labels/<name>.npz ('inst', optional 'type') and meta.json"
ONE_CLASS = ("nucleus",)
"""Class of datasets whose nuclei have none."""


def read_folder(path: str | Path) -> Dataset:
    """Open a plain folder; images and labels are read on access.

    Parameters
    ----------
    path : str or Path
        Folder with ``images/``, ``labels/`` and, optionally, ``meta.json``: ``classes`` (names in
        order, or ``{"1": name, ...}``), ``mpp``, ``splits`` (``{"train": [stems], ...}``),
        ``groups`` (``{stem: patient}``; an image without one is its own group), ``colors``
        (``{class: "#rrggbb"}``), ``name``.

    Returns
    -------
    Dataset
        Without classes in ``meta.json``, every nucleus has the one class ``"nucleus"``.

    Raises
    ------
    DataError
        At opening: folder missing or empty, an image without labels or labels without image,
        two images of one stem, a wrong ``meta.json``. On access: unreadable file, labels of
        another size than the image, a label with two types, with type 0, or with a type outside
        the classes.
    """
    path = Path(path)
    images = files_by_stem(path / "images", IMAGE_SUFFIXES)
    labels = files_by_stem(path / "labels", (".npz",))
    check_pairs(path, images, labels, "labels")
    meta = read_meta(path)
    groups = sample_groups(path, images, meta.groups)
    check_splits(path, meta.splits, groups)
    read = partial(
        _read_sample, images=images, labels=labels, groups=groups, meta=(meta.classes, meta.mpp)
    )
    return Dataset(
        name=meta.name,
        path=path,
        classes=meta.classes or ONE_CLASS,
        mpp=meta.mpp,
        names=tuple(images),
        groups=groups,
        read=read,
        splits=meta.splits,
        colors=meta.colors,
    )


def files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files of a folder by stem, sorted; hidden files and other suffixes are passed over.

    Parameters
    ----------
    folder : Path
        Must exist.
    suffixes : tuple of str
        Accepted suffixes, lower case; files may have them in capitals.

    Returns
    -------
    dict of str to Path
        In order of the stems.

    Raises
    ------
    DataError
        If the folder is missing, or two files share a stem.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.suffix.lower() not in suffixes:
            continue
        if file.stem in found:
            raise DataError(
                f"{folder}: {found[file.stem].name!r} and {file.name!r} have the same stem; "
                "names must be unique"
            )
        found[file.stem] = file
    return dict(sorted(found.items()))


def check_pairs(path: Path, images: dict[str, Path], labels: dict[str, Path], folder: str) -> None:
    """Refuse an empty dataset, images without labels, and labels without image.

    Parameters
    ----------
    path : Path
        Dataset folder, for the message.
    images, labels : dict of str to Path
        Files by stem.
    folder : str
        Name of the folder of labels.

    Raises
    ------
    DataError
        Listing the stems.
    """
    if not images:
        raise DataError(f"{path / 'images'}: no image ({', '.join(IMAGE_SUFFIXES)}) in it")
    bare = [s for s in images if s not in labels]
    if bare:
        raise DataError(f"{path}: no file in {folder}/ for the images {listing(bare)}")
    orphans = [s for s in labels if s not in images]
    if orphans:
        raise DataError(f"{path}: no file in images/ for {folder}/ of {listing(orphans)}")


def sample_groups(path: Path, names: dict[str, Path], groups: Any) -> dict[str, str]:
    """Group of every sample; a sample without one is its own group.

    Parameters
    ----------
    path : Path
        Dataset folder, for the message.
    names : dict
        Keyed by sample name.
    groups : mapping of str to str
        From ``meta.json``.

    Returns
    -------
    dict of str to str
        Keyed by sample name.

    Raises
    ------
    DataError
        If a group is given for an image that is not there.
    """
    unknown = [s for s in groups if s not in names]
    if unknown:
        raise DataError(f"{path}: meta.json gives groups for {listing(unknown)}, not an image here")
    return {name: groups.get(name, name) for name in names}


def phenotypes_of(
    labels: Labels, types: NDArray[np.integer[Any]], classes: tuple[str, ...], where: object
) -> NDArray[np.uint8]:
    """Class of every label from a map of class ids.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    types : ndarray of integers, shape (H, W)
        Class ids; pixels outside all nuclei are not looked at.
    classes : tuple of str
        Class names.
    where : object
        File or sample, for the message.

    Returns
    -------
    ndarray of uint8, shape (labels.max() + 1,)
        Lookup table from label to class id.

    Raises
    ------
    DataError
        If shapes differ, a label has two types, or a type is 0 or outside the classes.
    """
    if types.shape != labels.shape or not np.issubdtype(types.dtype, np.integer):
        raise DataError(
            f"{where}: 'type' must be an integer map {labels.shape} like 'inst', "
            f"got {types.shape} {types.dtype}"
        )
    table = np.zeros(int(labels.max(initial=0)) + 1, np.int64)
    inside = labels > 0
    ids, found = labels[inside], types[inside]
    table[ids] = found
    clash = np.flatnonzero(table[ids] != found)
    if len(clash):
        label, other = int(ids[clash[0]]), int(found[clash[0]])
        raise DataError(
            f"{where}: label {label} has two types, {other} and {int(table[label])}; "
            "one nucleus has one class"
        )
    wrong = np.flatnonzero(inside_table(table, ids) & ((table < 1) | (table > len(classes))))
    if len(wrong):
        label = int(wrong[0])
        raise DataError(
            f"{where}: label {label} has type {int(table[label])}"
            + (" (background)" if table[label] == 0 else "")
            + f"; classes are 1..{len(classes)} ({', '.join(classes)})"
        )
    return table.astype(np.uint8)


def inside_table(table: NDArray[np.int64], ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Mark the ids that occur."""
    present = np.zeros(len(table), np.bool_)
    present[ids] = True
    return present


def _read_sample(
    name: str,
    images: dict[str, Path],
    labels: dict[str, Path],
    groups: dict[str, str],
    meta: tuple[tuple[str, ...], float | None],
) -> Sample:
    classes, mpp = meta
    file = read_image(images[name])
    ids, types = _read_npz(labels[name])
    if ids.shape != file.image.shape[:2]:
        raise DataError(
            f"{labels[name]}: labels are {ids.shape}, but the image {images[name].name} is "
            f"{file.image.shape[:2]}; both must have the same height and width"
        )
    if types is None and len(classes) > 1:
        raise DataError(
            f"{labels[name]}: no 'type' in it, but meta.json lists {len(classes)} classes"
        )
    if types is not None and not classes:
        raise DataError(
            f"{labels[name]}: has 'type', but there is no meta.json with 'classes' naming the ids"
        )
    if types is None:
        types = (ids > 0).astype(np.uint8)
    table = phenotypes_of(ids, types, classes or ONE_CLASS, labels[name])
    return Sample(file.image, ids, table, name, groups[name], mpp or file.mpp)


def _read_npz(path: Path) -> tuple[Labels, NDArray[Any] | None]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if "inst" not in file.files:
                raise DataError(
                    f"{path}: no array 'inst' in it (found {listing(file.files) or 'nothing'})"
                )
            inst = file["inst"]
            types = file["type"] if "type" in file.files else None
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: unreadable or truncated ({reason})") from None
    return as_labels(inst, path), types
