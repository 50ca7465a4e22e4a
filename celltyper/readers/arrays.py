"""Arrays as the authors of datasets store them, made into what a sample needs."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import listing
from celltyper.errors import DataError
from celltyper.types import UNKNOWN, Image, Labels


def open_array(path: Path) -> NDArray[Any]:
    """Open a ``.npy`` file as a memory map, so that only what is indexed is read.

    Parameters
    ----------
    path : Path
        File.

    Returns
    -------
    ndarray
        Read-only.

    Raises
    ------
    DataError
        If the file is missing, truncated, no ``.npy``, or holds Python objects (which would have
        to be unpickled, and a pickle may run code).
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path}: an .npz archive; one array (.npy) is expected")
    return array


def import_h5py(path: Path) -> Any:
    """Import h5py, which comes with the extra ``data``.

    Parameters
    ----------
    path : Path
        File that needs it, for the message.

    Returns
    -------
    module
        h5py.

    Raises
    ------
    DataError
        If it is not installed.
    """
    try:
        return importlib.import_module("h5py")
    except ImportError:
        raise DataError(
            f"{path}: an HDF5 file, which needs h5py: pip install 'celltyper[data]'"
        ) from None


def unreadable(path: Path, error: BaseException) -> DataError:
    """Error for a file that its library cannot read.

    Parameters
    ----------
    path : Path
        File.
    error : BaseException
        What the library raised.

    Returns
    -------
    DataError
        One line, to be raised by the caller.
    """
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(f"{path}: unreadable or truncated ({reason})")


def as_integers(raw: NDArray[Any], where: object) -> NDArray[np.integer[Any]]:
    """Ids that are stored as floating-point numbers, as MATLAB and PanNuke do, as integers.

    Parameters
    ----------
    raw : ndarray
        Ids.
    where : object
        File and array, for the message.

    Returns
    -------
    ndarray of integers
        `raw` itself if it holds integers.

    Raises
    ------
    DataError
        If it holds fractions, infinities, or something that is no number.
    """
    if np.issubdtype(raw.dtype, np.integer):
        return raw
    if not np.issubdtype(raw.dtype, np.floating):
        raise DataError(f"{where}: ids must be numbers, got {raw.dtype}")
    with np.errstate(invalid="ignore"):
        ids = raw.astype(np.int64)
    if not np.array_equal(ids, raw):
        raise DataError(f"{where}: ids must be whole numbers, got fractions or infinities")
    return ids


def as_rgb(raw: NDArray[Any], where: object) -> Image:
    """RGB image from an array of 8-bit values, of whatever type they are stored in.

    Parameters
    ----------
    raw : ndarray, shape (H, W, 3)
        Values 0..255; floating-point numbers are rounded.
    where : object
        File and index, for the message.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        Contiguous copy.

    Raises
    ------
    DataError
        If the shape is another, values lie outside 0..255, or a floating-point image has nothing
        above 1 and so may be scaled to 0..1.
    """
    if raw.ndim != 3 or raw.shape[2] != 3 or 0 in raw.shape:
        raise DataError(f"{where}: image must be (H, W, 3), got {raw.shape}")
    if raw.dtype != np.uint8:
        if not (np.issubdtype(raw.dtype, np.integer) or np.issubdtype(raw.dtype, np.floating)):
            raise DataError(f"{where}: pixels must be numbers, got {raw.dtype}")
        low, high = float(raw.min()), float(raw.max())
        if not (low >= 0 and high <= 255):
            raise DataError(f"{where}: pixels must lie in 0..255, got {low:g}..{high:g}")
        if np.issubdtype(raw.dtype, np.floating) and 0 < high <= 1:
            raise DataError(
                f"{where}: floating-point pixels in {low:g}..{high:g}, expected 0..255; "
                "multiply them by 255 if they are scaled to 0..1"
            )
        raw = np.rint(raw)
    return np.array(raw, dtype=np.uint8, order="C")


def phenotypes_of_rows(
    labels: Labels,
    ids: NDArray[np.integer[Any]],
    types: NDArray[np.integer[Any]],
    classes: Sequence[str],
    where: object,
) -> NDArray[np.uint8]:
    """Class of every label from a list of ids and a list of classes, row by row.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    ids, types : ndarray of integers, shape (n,)
        Nucleus ``ids[i]`` has class ``types[i]``. Rows of nuclei without a pixel are passed over.
    classes : sequence of str
        Class names, id 1 first.
    where : object
        File, for the message.

    Returns
    -------
    ndarray of uint8, shape (labels.max() + 1,)
        Lookup table from label to class id.

    Raises
    ------
    DataError
        If the lists differ in length, an id is listed twice, a class is outside the classes, or
        a nucleus has no row.
    """
    if len(ids) != len(types):
        raise DataError(f"{where}: {len(ids)} ids, but {len(types)} classes; one each is expected")
    wrong = np.flatnonzero((types < 1) | (types > len(classes)))
    if len(wrong):
        raise wrong_class(where, int(ids[wrong[0]]), int(types[wrong[0]]), classes)
    listed, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise DataError(f"{where}: id {listing(listed[counts > 1].tolist())} is listed twice")
    present = np.unique(labels[labels > 0])
    bare = np.setdiff1d(present, ids)
    if len(bare):
        raise DataError(f"{where}: no class for nucleus {listing(bare.tolist())} of the map")
    table = np.zeros(int(labels.max(initial=0)) + 1, np.uint8)
    kept = np.isin(ids, present)
    table[ids[kept]] = types[kept]
    return table


def phenotypes_of_pixels(
    labels: Labels,
    types: NDArray[np.integer[Any]],
    classes: Sequence[str],
    where: object,
    unknown: bool = False,
) -> NDArray[np.uint8]:
    """Class of every label from a map of class ids: the one that most of its pixels have.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    types : ndarray of integers, shape (H, W)
        Class ids. Pixels outside all nuclei are not looked at; pixels of class 0 inside a nucleus
        have no vote; of two classes with as many pixels the lower id wins.
    classes : sequence of str
        Class names, id 1 first.
    where : object
        File, for the message.
    unknown : bool
        Give a nucleus with no class on any pixel the class `UNKNOWN` instead of refusing it.

    Returns
    -------
    ndarray of uint8, shape (labels.max() + 1,)
        Lookup table from label to class id.

    Raises
    ------
    DataError
        If the shapes differ, or a nucleus has a class outside the classes or none at all.
    """
    if types.shape != labels.shape:
        raise DataError(
            f"{where}: map of classes is {types.shape}, but that of nuclei is {labels.shape}"
        )
    inside = labels > 0
    found = types[inside]
    wrong = np.flatnonzero((found < 0) | (found > len(classes)))
    if len(wrong):
        raise wrong_class(where, int(labels[inside][wrong[0]]), int(found[wrong[0]]), classes)
    ids, row = np.unique(labels[inside], return_inverse=True)
    width = len(classes) + 1
    votes = np.bincount(row * width + found.astype(np.int64), minlength=len(ids) * width)
    votes = votes.reshape(len(ids), width)[:, 1:]
    table = np.zeros(int(labels.max(initial=0)) + 1, np.uint8)
    table[ids] = 1 + votes.argmax(axis=1)
    bare = ids[votes.sum(axis=1) == 0]
    if len(bare) and not unknown:
        raise wrong_class(where, int(bare[0]), 0, classes)
    table[bare] = UNKNOWN
    return table


def wrong_class(where: object, label: int, kind: int, classes: Sequence[str]) -> DataError:
    """Error for a nucleus whose class is not in the list.

    Parameters
    ----------
    where : object
        File.
    label, kind : int
        Id of the nucleus and of its class.
    classes : sequence of str
        Class names, id 1 first.

    Returns
    -------
    DataError
        To be raised by the caller.
    """
    background = " (background)" if kind == 0 else ""
    return DataError(
        f"{where}: nucleus {label} has class {kind}{background}; classes are 1..{len(classes)} "
        f"({', '.join(classes)})"
    )
