"""Label files of MATLAB: ``.mat``."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from numpy.typing import NDArray

from celltyper.datasets.dataset import listing
from celltyper.errors import DataError
from celltyper.readers.arrays import import_h5py, unreadable
from celltyper.readers.tree import folders_below

_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    MemoryError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
    scipy.io.matlab.MatReadError,
)
_PROBES = 5
"""Files that are asked for their variables before a folder counts as another layout."""


def has_variables(path: Path, names: Sequence[str]) -> bool:
    """Whether the ``.mat`` files below a folder hold these variables; none is decompressed.

    Parameters
    ----------
    path : Path
        Folder.
    names : sequence of str
        Variables.

    Returns
    -------
    bool
        What the first file says that can be read, of at most five; False without one.
    """
    probes = 0
    for folder, files in folders_below(path, strict=False):
        for file in files:
            if not file.lower().endswith(".mat"):
                continue
            found = _variables(folder / file)
            if found is not None:
                return found.issuperset(names)
            probes += 1
            if probes == _PROBES:
                return False
    return False


def read_mat(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Read variables of a ``.mat`` file.

    Parameters
    ----------
    path : Path
        File of MATLAB 5 to 7.2, or of 7.3 (HDF5, needs h5py).
    names, optional : sequence of str
        Variables that must, and that may be there.

    Returns
    -------
    dict of str to ndarray
        As MATLAB shows them: ``(row, column)``.

    Raises
    ------
    DataError
        If the file is missing, truncated, no ``.mat`` file, or lacks a variable.
    """
    wanted = [*names, *optional]
    if _is_hdf5(path):
        arrays = _read_hdf5(path, wanted)
    else:
        try:
            arrays = scipy.io.loadmat(path, variable_names=wanted)
        except _ERRORS as error:
            raise unreadable(path, error) from None
    missing = [n for n in names if n not in arrays]
    if missing:
        held = [n for n in _variables(path) or () if not n.startswith("__")]
        raise DataError(
            f"{path}: no variable {listing(missing)} in it (found {listing(sorted(held)) or 'none'}"
            ")"
        )
    odd = [n for n in wanted if n in arrays and not isinstance(arrays[n], np.ndarray)]
    if odd:
        raise DataError(f"{path}: variable {listing(odd)} is no full array")
    return {n: arrays[n] for n in wanted if n in arrays}


def _is_hdf5(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(520)
    except OSError as error:
        raise unreadable(path, error) from None
    # MATLAB puts 512 bytes of its own before the HDF5 signature.
    return b"\x89HDF\r\n\x1a\n" in (head[:8], head[512:])


def _read_hdf5(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    h5py = import_h5py(path)
    try:
        with h5py.File(path, "r") as file:
            held = {n: file[n] for n in names if isinstance(file.get(n), h5py.Dataset)}
            # MATLAB stores columns first, and of an empty array only its size.
            return {
                n: np.zeros((0, 0)) if "MATLAB_empty" in node.attrs else np.asarray(node).T
                for n, node in held.items()
            }
    except _ERRORS as error:
        raise unreadable(path, error) from None


def _variables(path: Path) -> set[str] | None:
    """Names of the variables of a file, None if it cannot be read."""
    try:
        if not _is_hdf5(path):
            return {name for name, _, _ in scipy.io.whosmat(path)}
        if importlib.util.find_spec("h5py") is None:
            return None
        with import_h5py(path).File(path, "r") as file:
            return set(file)
    except (*_ERRORS, DataError):
        return None
