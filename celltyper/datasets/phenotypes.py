"""Class of every nucleus from a map of classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.errors import DataError
from celltyper.types import UNKNOWN, Labels


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
        Lookup table from label to class id; `celltyper.types.UNKNOWN` stays.

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
    outside = (table < 1) | ((table > len(classes)) & (table != UNKNOWN))
    wrong = np.flatnonzero(_present(table, ids) & outside)
    if len(wrong):
        label = int(wrong[0])
        raise DataError(
            f"{where}: label {label} has type {int(table[label])}"
            + (" (background)" if table[label] == 0 else "")
            + f"; classes are 1..{len(classes)} ({', '.join(classes)})"
        )
    return table.astype(np.uint8)


def _present(table: NDArray[np.int64], ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    present = np.zeros(len(table), np.bool_)
    present[ids] = True
    return present
