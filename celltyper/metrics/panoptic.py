"""Panoptic quality: one class, many classes, pooled over images or averaged.

Rules (docs/metrics.md works them out on small examples)
- A pair matches if its IoU is strictly more than one half; exactly one half is no match.
- Nothing in the reference and nothing in the prediction: NaN, "nothing to score".
- Only one of the two empty: 0.
- A label without a class (type 0) counts for the binary quality and for no class.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.metrics.matching import Overlap, match_iou, overlap, types_of
from celltyper.metrics.ratios import mean_of_known, ratio
from celltyper.types import Labels


class PanopticQuality(NamedTuple):
    """Panoptic quality and its parts: ``pq = dq * sq``."""

    pq: float
    """Panoptic quality."""
    dq: float
    """Detection quality, the F1 of instances at IoU > 0.5."""
    sq: float
    """Segmentation quality, the mean IoU of matched pairs; 0 if there are none."""
    tp: int
    """Matched pairs."""
    fp: int
    """Predicted instances without partner."""
    fn: int
    """Reference instances without partner."""


class MulticlassPanopticQuality(NamedTuple):
    """Panoptic quality of one image for every class, with the sums that pooling needs."""

    mpq: float
    """Mean over the classes that occur in the reference or the prediction."""
    bpq: float
    """Panoptic quality of all instances whatever their class."""
    pq: NDArray[np.float64]
    """Panoptic quality of every class, shape (K,); NaN where neither image has the class."""
    counts: NDArray[np.float64]
    """Sums ``tp, fp, fn, iou`` of every class, shape (K, 4)."""
    binary: NDArray[np.float64]
    """Sums ``tp, fp, fn, iou`` whatever the class, shape (4,)."""


def panoptic_quality(reference: Labels, predicted: Labels) -> PanopticQuality:
    """Panoptic quality of two label images.

    Parameters
    ----------
    reference, predicted : ndarray of int32, shape (H, W)
        Instance labels, 0 is background; ids need not be contiguous.

    Returns
    -------
    PanopticQuality
        NaN scores if both images are empty, 0 if only one is.

    Raises
    ------
    DataError
        If the images do not fit together.

    References
    ----------
    Kirillov et al., Panoptic segmentation, 2019, doi:10.1109/CVPR.2019.00963

    Examples
    --------
    >>> import numpy as np
    >>> reference = np.array([[1, 1, 1, 0, 2]], np.int32)
    >>> predicted = np.array([[5, 5, 0, 0, 0]], np.int32)
    >>> score = panoptic_quality(reference, predicted)
    >>> score.tp, score.fp, score.fn, round(score.pq, 4)
    (1, 0, 1, 0.4444)
    """
    return panoptic_quality_of(overlap(reference, predicted))


def panoptic_quality_of(table: Overlap) -> PanopticQuality:
    """Panoptic quality from an overlap table; see `panoptic_quality`.

    Parameters
    ----------
    table : Overlap
        From `celltyper.metrics.overlap`.

    Returns
    -------
    PanopticQuality
        The scores.
    """
    iou = match_iou(table).score
    tp, fp, fn = len(iou), len(table.pred_ids) - len(iou), len(table.ref_ids) - len(iou)
    if tp + fp + fn == 0:
        return PanopticQuality(np.nan, np.nan, np.nan, 0, 0, 0)
    dq = 2 * tp / (2 * tp + fp + fn)
    sq = float(iou.mean()) if tp else 0.0
    return PanopticQuality(dq * sq, dq, sq, tp, fp, fn)


def multiclass_panoptic_quality(
    reference: Labels,
    ref_types: NDArray[np.uint8],
    predicted: Labels,
    pred_types: NDArray[np.uint8],
    n_classes: int,
) -> MulticlassPanopticQuality:
    """Panoptic quality of every class and of all together, in one pass.

    A pair counts for a class if its IoU is more than one half and both labels have the class;
    as IoU above one half is unique, this equals the quality of the class's labels alone.

    Parameters
    ----------
    reference, predicted : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    ref_types, pred_types : ndarray of uint8
        Class of every label id as lookup table, such as ``Sample.phenotypes``; 0 is "no class".
    n_classes : int
        Number K of foreground classes.

    Returns
    -------
    MulticlassPanopticQuality
        Scores of this image, and sums for `mpq_pannuke`, `mpq_plus` and the bootstrap.

    Raises
    ------
    DataError
        If the images do not fit together, a table is too short or a class is above K.
    """
    return multiclass_panoptic_quality_of(
        overlap(reference, predicted), ref_types, pred_types, n_classes
    )


def multiclass_panoptic_quality_of(
    table: Overlap, ref_types: NDArray[np.uint8], pred_types: NDArray[np.uint8], n_classes: int
) -> MulticlassPanopticQuality:
    """Panoptic quality of every class from an overlap table; see `multiclass_panoptic_quality`.

    Parameters
    ----------
    table : Overlap
        From `celltyper.metrics.overlap`.
    ref_types, pred_types : ndarray of uint8
        Class of every label id as lookup table.
    n_classes : int
        Number K of foreground classes.

    Returns
    -------
    MulticlassPanopticQuality
        Scores and sums.
    """
    true = types_of(table.ref_ids, ref_types, n_classes)
    guess = types_of(table.pred_ids, pred_types, n_classes)
    pairs = match_iou(table)
    agree = true[pairs.ref] == guess[pairs.pred]
    classes, iou = true[pairs.ref][agree], pairs.score[agree]
    size = n_classes + 1
    tp = np.bincount(classes, minlength=size)
    fp = np.bincount(guess, minlength=size) - tp
    fn = np.bincount(true, minlength=size) - tp
    counts = np.stack([tp, fp, fn, np.bincount(classes, iou, size)], axis=-1)[1:].astype(np.float64)
    matched = len(pairs.score)
    binary = np.array(
        [matched, len(guess) - matched, len(true) - matched, pairs.score.sum()], np.float64
    )
    pq = pq_of_counts(counts)
    return MulticlassPanopticQuality(
        float(mean_of_known(pq)), float(pq_of_counts(binary)), pq, counts, binary
    )


def pq_of_counts(counts: ArrayLike) -> NDArray[np.float64]:
    """Panoptic quality from sums.

    Parameters
    ----------
    counts : array_like, shape (..., 4)
        Sums ``tp, fp, fn, iou``.

    Returns
    -------
    ndarray of float64, shape (...)
        NaN where ``tp = fp = fn = 0``.
    """
    counts = np.asarray(counts, np.float64)
    return ratio(counts[..., 3], counts[..., 0] + counts[..., 1] / 2 + counts[..., 2] / 2)


def mpq_plus(counts: ArrayLike) -> NDArray[np.float64]:
    """mPQ+: sums are pooled over all images first, then scored and averaged over classes.

    Parameters
    ----------
    counts : array_like, shape (..., K, 4)
        Sums ``tp, fp, fn, iou`` of every class, already added over the images.

    Returns
    -------
    ndarray of float64, shape (...)
        Mean over the classes that occur at all.

    References
    ----------
    Graham et al., CoNIC, 2021, doi:10.48550/arXiv.2108.11195
    """
    return mean_of_known(pq_of_counts(counts))


def mpq_pannuke(counts: ArrayLike) -> NDArray[np.float64]:
    """Mean quality of every image under PanNuke's rule, for a mean over images afterwards.

    A class that the image's reference does not have is left out there even if it was predicted:
    that is how the published script does it, and why mPQ+ should stand beside it.

    Parameters
    ----------
    counts : array_like, shape (..., K, 4)
        Sums ``tp, fp, fn, iou`` of every image (last but two axis) and class. For bPQ pass the
        binary sums with ``K = 1``.

    Returns
    -------
    ndarray of float64, shape (...)
        One score an image, NaN where its reference is empty. mPQ of a data set is
        ``mean_of_known`` of these.

    References
    ----------
    Gamper et al., PanNuke dataset extension, 2020, doi:10.48550/arXiv.2003.10778
    """
    counts = np.asarray(counts, np.float64)
    in_reference = counts[..., 0] + counts[..., 2] > 0
    return mean_of_known(np.where(in_reference, pq_of_counts(counts), np.nan))
