"""Sums per cluster (patient, field or block) over matched objects: what scores and bootstrap need.

An object or pair counts in the cluster of its reference nucleus, an unpaired prediction in its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.metrics.matching import Matches

Sums = NDArray[np.float64]


class Objects(NamedTuple):
    """Annotated nuclei (n) and predicted cells (m) of one image, ids ascending."""

    true: NDArray[np.intp]
    """Class of every annotated nucleus, 0 unknown, shape (n,)."""
    guess: NDArray[np.intp]
    """Class of every predicted cell, shape (m,)."""
    ref_cluster: NDArray[np.int64]
    """Cluster of every annotated nucleus, shape (n,)."""
    pred_cluster: NDArray[np.int64]
    """Cluster of every predicted cell, shape (m,)."""


def tally(sums: NDArray[Any], index: tuple[Any, ...] | NDArray[Any], values: Any) -> None:
    """Add values in place, at indices that may repeat."""
    np.add.at(sums, index, values)


def unpaired(objects: Objects, pairs: Matches) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of annotated nuclei and of predicted cells that are in no pair."""
    ref = np.setdiff1d(np.arange(len(objects.true)), pairs.ref)
    return ref, np.setdiff1d(np.arange(len(objects.guess)), pairs.pred)


def tally_found(sums: Sums, objects: Objects, pairs: Matches) -> None:
    """Add ``tp, fp, fn`` whatever the class.

    Parameters
    ----------
    sums : ndarray of float64, shape (clusters, 3 or more)
        Changed in place; see `celltyper.metrics.detection_f1`.
    objects : Objects
    pairs : Matches
    """
    alone_ref, alone_pred = unpaired(objects, pairs)
    tally(sums, (objects.ref_cluster[pairs.ref], 0), 1)
    tally(sums, (objects.pred_cluster[alone_pred], 1), 1)
    tally(sums, (objects.ref_cluster[alone_ref], 2), 1)


def tally_typed(sums: Sums, objects: Objects, pairs: Matches) -> None:
    """Add the five sums per class of `celltyper.metrics.typed_f1`.

    Parameters
    ----------
    sums : ndarray of float64, shape (clusters, K + 1, 5)
        Changed in place; class 0 is "unknown".
    objects : Objects
    pairs : Matches
    """
    true, guess = objects.true[pairs.ref], objects.guess[pairs.pred]
    cluster, same, differ = objects.ref_cluster[pairs.ref], true == guess, _differ(true, guess)
    tally(sums, (cluster[same], true[same], 0), 1)
    tally(sums, (cluster[differ], guess[differ], 1), 1)
    tally(sums, (cluster[differ], true[differ], 2), 1)
    alone_ref, alone_pred = unpaired(objects, pairs)
    tally(sums, (objects.pred_cluster[alone_pred], objects.guess[alone_pred], 3), 1)
    tally(sums, (objects.ref_cluster[alone_ref], objects.true[alone_ref], 4), 1)


def _differ(true: NDArray[np.intp], guess: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Pairs of two classes; a nucleus of unknown class cannot be typed wrongly."""
    differ: NDArray[np.bool_] = (true != guess) & (true > 0)
    return differ


def tally_quality(by_class: Sums, binary: Sums, objects: Objects, pairs: Matches) -> None:
    """Add ``tp, fp, fn, iou``; a pair of two classes is fp of one and fn of the other.

    Parameters
    ----------
    by_class : ndarray of float64, shape (clusters, K + 1, 4)
        Changed in place; see `celltyper.metrics.pq_of_counts`.
    binary : ndarray of float64, shape (clusters, 4)
        The same whatever the class.
    objects : Objects
    pairs : Matches
        At IoU > 0.5.
    """
    true, guess = objects.true[pairs.ref], objects.guess[pairs.pred]
    cluster, same, differ = objects.ref_cluster[pairs.ref], true == guess, _differ(true, guess)
    tally(by_class, (cluster[same], true[same], 0), 1)
    tally(by_class, (cluster[same], true[same], 3), pairs.score[same])
    tally(by_class, (cluster[differ], guess[differ], 1), 1)
    tally(by_class, (cluster[differ], true[differ], 2), 1)
    alone_ref, alone_pred = unpaired(objects, pairs)
    tally(by_class, (objects.pred_cluster[alone_pred], objects.guess[alone_pred], 1), 1)
    tally(by_class, (objects.ref_cluster[alone_ref], objects.true[alone_ref], 2), 1)
    tally_found(binary, objects, pairs)
    tally(binary, (cluster, 3), pairs.score)


def tally_pairs(matrix: NDArray[np.int64], objects: Objects, pairs: Matches) -> None:
    """Add pairs by annotated (row) and predicted class; row and column 0 hold the unpaired.

    Nuclei whose class is unknown are left out.

    Parameters
    ----------
    matrix : ndarray of int64, shape (K + 1, K + 1)
        Changed in place.
    objects : Objects
    pairs : Matches
    """
    alone_ref, alone_pred = unpaired(objects, pairs)
    true, guess = objects.true[pairs.ref], objects.guess[pairs.pred]
    tally(matrix, (true[true > 0], guess[true > 0]), 1)
    tally(matrix, (objects.true[alone_ref], 0), 1)
    matrix[0, 0] = 0
    tally(matrix, (0, objects.guess[alone_pred]), 1)
