"""Overlap of two label images, and which labels match by intersection over union (IoU).

Everything that compares instances (PQ, AJI, F1 at an IoU) starts from one sparse table, made in
one pass over the pixels, so that its cost grows with the image and not with the number of nuclei.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from celltyper.errors import DataError
from celltyper.metrics.assignment import best_pairing
from celltyper.types import Labels


class Overlap(NamedTuple):
    """Labels of two images and the pixels that they share.

    Pair ``i`` is the label ``ref_ids[pair_ref[i]]`` with ``pred_ids[pair_pred[i]]``; pairs are
    sorted by reference id, then by predicted id; background takes no part.
    """

    ref_ids: NDArray[np.int32]
    """Ids of the reference, ascending, shape (n,)."""
    ref_areas: NDArray[np.int64]
    """Their areas in pixels."""
    pred_ids: NDArray[np.int32]
    """Ids of the prediction, ascending, shape (m,)."""
    pred_areas: NDArray[np.int64]
    """Their areas in pixels."""
    pair_ref: NDArray[np.intp]
    """Row of the pair's reference label in ``ref_ids``, shape (p,)."""
    pair_pred: NDArray[np.intp]
    """Row of the pair's predicted label in ``pred_ids``, shape (p,)."""
    intersection: NDArray[np.int64]
    """Shared pixels of the pair, at least 1."""


class Matches(NamedTuple):
    """One-to-one pairs of instances, as rows of the reference's and the prediction's tables."""

    ref: NDArray[np.intp]
    """Rows of the matched reference instances (ids ascending), shape (t,)."""
    pred: NDArray[np.intp]
    """Rows of their partners."""
    score: NDArray[np.float64]
    """IoU of the pair, or its distance where points were matched."""


def overlap(reference: Labels, predicted: Labels) -> Overlap:
    """Count the pixels that every pair of labels shares, in one pass.

    Parameters
    ----------
    reference, predicted : ndarray of int32, shape (H, W)
        Instance labels, 0 is background; ids need not be contiguous. Other integer types are
        converted.

    Returns
    -------
    Overlap
        Sparse table of the pairs with ids and areas of both images.

    Raises
    ------
    DataError
        If shapes differ, a label is negative or beyond int32, or the type is not an integer.

    Examples
    --------
    >>> import numpy as np
    >>> table = overlap(np.array([[7, 7, 0]]), np.array([[0, 3, 3]]))
    >>> table.ref_ids.tolist(), table.pred_ids.tolist(), table.intersection.tolist()
    ([7], [3], [1])
    """
    if reference.shape != predicted.shape:
        raise DataError(
            f"reference labels are {reference.shape}, predicted {predicted.shape}: "
            "both must have the same height and width"
        )
    keys, counts = _count_pairs(_flat(reference, "reference"), _flat(predicted, "predicted"))
    if len(keys) and int(keys.min()) < 0:
        raise DataError("labels must not be negative: 0 is background, instances count from 1")
    order = np.argsort(keys)
    keys, counts = keys[order], counts[order]
    ref, pred = keys >> 32, keys & 0xFFFFFFFF
    ref_ids, ref_rows = np.unique(ref, return_inverse=True)
    pred_ids, pred_rows = np.unique(pred, return_inverse=True)
    ref_areas = np.bincount(ref_rows, counts, len(ref_ids)).astype(np.int64)
    pred_areas = np.bincount(pred_rows, counts, len(pred_ids)).astype(np.int64)
    # Background, where it occurs, is the first row of its table.
    skip_ref = int(len(ref_ids) > 0 and ref_ids[0] == 0)
    skip_pred = int(len(pred_ids) > 0 and pred_ids[0] == 0)
    both = (ref > 0) & (pred > 0)
    return Overlap(
        ref_ids[skip_ref:].astype(np.int32),
        ref_areas[skip_ref:],
        pred_ids[skip_pred:].astype(np.int32),
        pred_areas[skip_pred:],
        ref_rows[both] - skip_ref,
        pred_rows[both] - skip_pred,
        counts[both],
    )


def iou_pairs(table: Overlap) -> NDArray[np.float64]:
    """Intersection over union of every pair of an overlap table.

    Parameters
    ----------
    table : Overlap
        From `overlap`.

    Returns
    -------
    ndarray of float64, shape (p,)
        In (0, 1], in the order of the table's pairs.
    """
    union = table.ref_areas[table.pair_ref] + table.pred_areas[table.pair_pred]
    iou: NDArray[np.float64] = table.intersection / (union - table.intersection)
    return iou


def match_iou(table: Overlap, threshold: float = 0.5, *, inclusive: bool = False) -> Matches:
    """Match labels one to one by their IoU.

    An IoU above one half leaves each label at most one partner, so that no assignment is needed.
    With a lower threshold, or with one half itself included, a label may have several candidates;
    then the pairing with the most pairs is taken, and among those the largest sum of IoU.

    Parameters
    ----------
    table : Overlap
        From `overlap`.
    threshold : float
        Smallest IoU, in [0, 1].
    inclusive : bool
        Whether a pair at exactly the threshold matches. The panoptic quality says no (strictly
        more than one half), F1 "at IoU >= 0.5" says yes.

    Returns
    -------
    Matches
        Rows of ``table.ref_ids`` and ``table.pred_ids`` with their IoU.
    """
    iou = iou_pairs(table)
    keep = np.flatnonzero(iou >= threshold if inclusive else iou > threshold)
    if threshold < 0.5 or (threshold == 0.5 and inclusive):
        # One pair more outweighs any gain in IoU, which is less than 1 for each pair.
        gain = iou[keep] + len(keep) + 1
        keep = keep[best_pairing(table.pair_ref[keep], table.pair_pred[keep], gain)]
    return Matches(table.pair_ref[keep], table.pair_pred[keep], iou[keep])


def types_of(ids: NDArray[np.int32], types: NDArray[np.uint8], n_classes: int) -> NDArray[np.intp]:
    """Class of every instance from a lookup table, checked.

    Parameters
    ----------
    ids : ndarray of int32, shape (n,)
        Label ids.
    types : ndarray of int
        Lookup table: ``types[id]`` is the class; 0 is "no class known".
    n_classes : int
        Number K of foreground classes.

    Returns
    -------
    ndarray of int, shape (n,)
        Classes 0..K.

    Raises
    ------
    DataError
        If the table is too short or holds a class above K.
    """
    if len(ids) and int(ids[-1]) >= len(types):
        raise DataError(
            f"type table has {len(types)} entries, but a label has id {int(ids[-1])}: "
            "give one entry for every id from 0 to the largest"
        )
    found: NDArray[np.intp] = np.asarray(types)[ids].astype(np.intp)
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) <= n_classes:
        bad = int(found.max() if found.max() > n_classes else found.min())
        raise DataError(f"an instance has class {bad}, but classes go from 0 to {n_classes}")
    return found


def _flat(labels: Labels, name: str) -> Labels:
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{name} labels must be integers, got {labels.dtype}")
    if labels.dtype != np.int32:
        if labels.size and int(labels.max()) > np.iinfo(np.int32).max:
            raise DataError(f"{name} labels go up to {int(labels.max())}: must fit into int32")
        labels = labels.astype(np.int32)
    return np.ascontiguousarray(labels).reshape(-1)


_BLOCK = 4096


@njit(cache=True, nogil=True)
def _count_pairs(ref, pred):  # type: ignore[no-untyped-def]
    """Distinct ``ref << 32 | pred`` and how many pixels hold each; negative if a label is."""
    table = np.zeros((4 * _BLOCK, 2), np.int64)
    used = 0
    changed = np.empty(_BLOCK, np.uint8)
    ends = np.empty(_BLOCK, np.int64)
    for start in range(0, len(ref), _BLOCK):
        r, p = ref[start : start + _BLOCK], pred[start : start + _BLOCK]
        # Neighbours mostly hold the same pair: only ends of runs go to the table. Two loops
        # without branches find them, three times faster than one with a badly guessed "if".
        r_next, p_next = r[1:], p[1:]
        for i in range(len(r_next)):
            changed[i] = ((r[i] ^ r_next[i]) | (p[i] ^ p_next[i])) != 0
        runs = np.uint64(0)
        for i in range(len(r_next)):
            ends[runs] = i
            runs += np.uint64(changed[i])
        ends[runs] = len(r) - 1
        if 2 * (used + int(runs) + 1) > len(table):
            table = _grown(table)
        last = -1
        for run in range(int(runs) + 1):
            end = ends[run]
            key = (np.int64(r[end]) << 32) | np.int64(p[end])
            slot = _slot(table, key)
            if table[slot, 1] == 0:
                used += 1
                table[slot, 0] = key
            table[slot, 1] += end - last
            last = end
    found = np.flatnonzero(table[:, 1])
    return table[found, 0], table[found, 1]


@njit(cache=True, nogil=True)
def _slot(table, key):  # type: ignore[no-untyped-def]
    """Place of a key in a table of (key, count) rows: its own, or the empty one it will take."""
    mask = len(table) - 1
    slot = ((key * 0x9E3779B97F4A7C1) >> 32) & mask
    while table[slot, 1] != 0 and table[slot, 0] != key:
        slot = (slot + 1) & mask
    return slot


@njit(cache=True, nogil=True)
def _grown(table):  # type: ignore[no-untyped-def]
    larger = np.zeros((4 * len(table), 2), np.int64)
    for row in table:
        if row[1]:
            slot = _slot(larger, row[0])
            larger[slot, 0] = row[0]
            larger[slot, 1] = row[1]
    return larger
