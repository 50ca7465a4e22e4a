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
from celltyper.datasets.phenotypes import phenotypes_of
from celltyper.errors import DataError
from celltyper.readers.files import check_pairs, files_by_stem, sample_groups
from celltyper.readers.meta import check_splits, read_meta
from celltyper.types import Labels, Sample

TREE = "images/<name>.png with labels/<name>.npz ('inst', optional 'type') and meta.json"
ONE_CLASS = ("nucleus",)
"""Class of datasets whose nuclei have none."""


def recognises(path: Path) -> bool:
    """Whether there is ``images/`` beside ``labels/`` with ``.npz`` files, or nothing, in it."""
    labels = path / "labels"
    if not (path / "images").is_dir() or not labels.is_dir():
        return False
    visible = [file for file in labels.iterdir() if not file.name.startswith(".")]
    return not visible or any(file.suffix.lower() == ".npz" for file in visible)


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
