"""Aggregated Jaccard index (AJI) and its one-to-one variant AJI+."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from celltyper.metrics.assignment import best_pairing
from celltyper.metrics.matching import Overlap, iou_pairs, overlap
from celltyper.types import Labels


class AggregatedJaccard(NamedTuple):
    """Pixels of the aggregated intersection and union; both add over images."""

    intersection: int
    union: int

    @property
    def score(self) -> float:
        """Intersection over union, NaN if both images are empty."""
        return self.intersection / self.union if self.union else np.nan


def aji(reference: Labels, predicted: Labels) -> float:
    """Compute the aggregated Jaccard index.

    Every reference label takes the predicted label of largest IoU (the lowest id in a tie), even
    if another took it before; labels that nobody took add to the union.

    Parameters
    ----------
    reference, predicted : ndarray of int32, shape (H, W)
        Instance labels, 0 is background; ids need not be contiguous.

    Returns
    -------
    float
        In [0, 1]; NaN if both images are empty.

    References
    ----------
    Kumar et al., 2017, doi:10.1109/TMI.2017.2677499, as computed by Graham et al. (HoVer-Net),
    2019, doi:10.1016/j.media.2019.101563
    """
    return aggregated_jaccard(overlap(reference, predicted)).score


def aji_plus(reference: Labels, predicted: Labels) -> float:
    """Compute the aggregated Jaccard index with one-to-one pairs of largest total IoU.

    Parameters
    ----------
    reference, predicted : ndarray of int32, shape (H, W)
        Instance labels, 0 is background; ids need not be contiguous.

    Returns
    -------
    float
        In [0, 1]; NaN if both images are empty.

    References
    ----------
    Graham et al. (HoVer-Net), 2019, doi:10.1016/j.media.2019.101563
    """
    return aggregated_jaccard(overlap(reference, predicted), one_to_one=True).score


def aggregated_jaccard(table: Overlap, *, one_to_one: bool = False) -> AggregatedJaccard:
    """Aggregate intersection and union over an overlap table.

    Parameters
    ----------
    table : Overlap
        From `celltyper.metrics.overlap`.
    one_to_one : bool
        False for AJI, True for AJI+.

    Returns
    -------
    AggregatedJaccard
        Pixel sums, and the index as ``score``.
    """
    iou = iou_pairs(table)
    if one_to_one:
        taken = best_pairing(table.pair_ref, table.pair_pred, iou)
    else:
        # Stable sort: the first pair of every reference has the largest IoU, then the lowest id.
        order = np.lexsort((-iou, table.pair_ref))
        taken = order[np.unique(table.pair_ref[order], return_index=True)[1]]
    ref, pred = table.pair_ref[taken], table.pair_pred[taken]
    inter = int(table.intersection[taken].sum())
    left_ref = np.delete(table.ref_areas, ref).sum()
    left_pred = np.delete(table.pred_areas, pred).sum()
    union = table.ref_areas[ref].sum() + table.pred_areas[pred].sum() - inter
    return AggregatedJaccard(inter, int(union + left_ref + left_pred))
