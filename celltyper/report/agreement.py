"""Which cells of one image were found, mistyped, missed or made up."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.metrics.matching import match_iou, overlap
from celltyper.types import Labels

RIGHT, WRONG_CLASS, SPURIOUS, MISSED = 0, 1, 2, 3

RULE = "nuclei paired at IoU > 0.5"


class Agreement(NamedTuple):
    """Fate of every cell as lookup tables over label ids; -1 is an id without a cell."""

    predicted: NDArray[np.intp]
    """`RIGHT`, `WRONG_CLASS` or `SPURIOUS`."""
    reference: NDArray[np.intp]
    """`RIGHT`, `WRONG_CLASS` or `MISSED`."""


def compare(
    reference: Labels,
    ref_phenotypes: NDArray[np.uint8],
    predicted: Labels,
    phenotypes: NDArray[np.uint8],
) -> Agreement:
    """Compare two label images cell by cell (IoU above one half).

    Parameters
    ----------
    reference, predicted : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    ref_phenotypes, phenotypes : ndarray of uint8
        Class of every label id as lookup table.

    Returns
    -------
    Agreement
        Fate of every reference and every predicted cell.
    """
    table = overlap(reference, predicted)
    matches = match_iou(table)
    ref_ids, pred_ids = table.ref_ids[matches.ref], table.pred_ids[matches.pred]
    known = ref_phenotypes[ref_ids]
    # a nucleus without a class cannot be typed wrongly
    same = (known == phenotypes[pred_ids]) | (known == 0)
    fate = np.where(same, RIGHT, WRONG_CLASS)
    of_predicted = np.full(len(phenotypes), -1)
    of_predicted[table.pred_ids] = SPURIOUS
    of_predicted[pred_ids] = fate
    of_reference = np.full(len(ref_phenotypes), -1)
    of_reference[table.ref_ids] = MISSED
    of_reference[ref_ids] = fate
    return Agreement(of_predicted, of_reference)


def fate_counts(
    fates: NDArray[np.intp], phenotypes: NDArray[np.uint8], n_classes: int
) -> NDArray[np.int64]:
    """Count cells by class and fate.

    Parameters
    ----------
    fates : ndarray of int
        One side of an `Agreement`.
    phenotypes : ndarray of uint8
        Class of every label id as lookup table.
    n_classes : int
        Number K of classes.

    Returns
    -------
    ndarray of int64, shape (K + 1, 4)
        Rows class 0 (none) to K, columns the four fates.
    """
    counts = np.zeros((n_classes + 1, 4), np.int64)
    there = fates >= 0
    np.add.at(counts, (phenotypes[there].astype(np.intp), fates[there]), 1)
    return counts
