"""Scores of a ranking: how well one number tells a class from the rest, at every threshold.

Everything is read off the operating points, the counts of true and false positives at each
distinct score. The counts may be weighted by any number of rows of weights at once, so that a
bootstrap is one call.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import DataError, unknown_name
from celltyper.metrics.ratios import ratio

Values = NDArray[np.float64]

SPECIFICITY = 0.90
"""Specificity at which sensitivity is read, unless the caller asks for another."""

THRESHOLD_RULES = ("balanced accuracy", "f1")
"""What `choose_threshold` can maximise."""


class OperatingPoints(NamedTuple):
    """What is called positive at each distinct score, from "almost nothing" to "everything"."""

    thresholds: Values
    """The T distinct scores, descending; a patch is positive where its score is at least that."""
    true_positives: Values
    """Weight of the positive patches called positive, shape (..., T)."""
    false_positives: Values
    """Weight of the other patches called positive, shape (..., T)."""


def operating_points(
    labels: ArrayLike, scores: ArrayLike, *, positive: int, weights: ArrayLike | None = None
) -> OperatingPoints:
    """Count true and false positives at every distinct score.

    Parameters
    ----------
    labels : array_like of int, shape (n,)
        True classes.
    scores : array_like of float, shape (n,)
        Larger for what looks positive, usually the probability of the positive class.
    positive : int
        The positive class; every other one is negative.
    weights : array_like, shape (..., n), optional
        Weight of every patch, not negative; 1 if not given. Leading axes are kept.

    Returns
    -------
    OperatingPoints
        Patches of equal score are called together.

    Raises
    ------
    DataError
        If lengths differ, there is no patch, or a score is NaN.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    weights = np.ones(labels.shape) if weights is None else np.asarray(weights, np.float64)
    if labels.ndim != 1 or scores.shape != labels.shape or weights.shape[-1:] != labels.shape:
        raise DataError(
            f"{labels.shape} labels, {scores.shape} scores and {weights.shape} weights: expected "
            "(n,), (n,) and (..., n)"
        )
    if not len(labels):
        raise DataError("no patches to score")
    if np.isnan(scores).any():
        raise DataError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    weights = weights[..., order]
    called = np.cumsum(weights, axis=-1)[..., last]
    hits = np.cumsum(weights * (labels[order] == positive), axis=-1)[..., last]
    return OperatingPoints(ranked[last], hits, called - hits)


def auroc(points: OperatingPoints) -> Values:
    """Area under the ROC curve: the chance that a positive patch scores above a negative one.

    Parameters
    ----------
    points : OperatingPoints

    Returns
    -------
    ndarray of float64, shape (...)
        Equal scores count one half. NaN without positive or without negative patches.

    References
    ----------
    Hanley, McNeil, 1982, doi:10.1148/radiology.143.1.7063747
    """
    hits, alarms = points.true_positives, points.false_positives
    before = hits - np.diff(hits, axis=-1, prepend=0) / 2
    area = (np.diff(alarms, axis=-1, prepend=0) * before).sum(-1)
    return ratio(area, hits[..., -1] * alarms[..., -1])


def average_precision(points: OperatingPoints) -> Values:
    """Area under the precision-recall curve as a sum of steps (AUPRC), not interpolated.

    ``sum of (recall_t - recall_(t-1)) * precision_t`` over thresholds from the highest score down,
    as in scikit-learn. By chance it is the share of positive patches.

    Parameters
    ----------
    points : OperatingPoints

    Returns
    -------
    ndarray of float64, shape (...)
        NaN without positive or without negative patches.

    References
    ----------
    Davis, Goadrich, 2006, doi:10.1145/1143844.1143874
    """
    hits, alarms = points.true_positives, points.false_positives
    gain = np.diff(hits, axis=-1, prepend=0)
    called = hits + alarms
    # Where nothing is called yet there is no gain either: 0, not NaN.
    steps = np.divide(gain * hits, called, out=np.zeros_like(hits), where=called > 0)
    known = alarms[..., -1] > 0
    return ratio(np.where(known, steps.sum(-1), 0), np.where(known, hits[..., -1], 0))


def sensitivity_at_specificity(points: OperatingPoints, specificity: float = SPECIFICITY) -> Values:
    """Largest sensitivity of any threshold that keeps at least the given specificity.

    Only thresholds that exist are looked at, nothing is interpolated; 0 if already the highest
    score breaks the specificity.

    Parameters
    ----------
    points : OperatingPoints
    specificity : float
        Least share of negative patches that stay negative, in [0, 1].

    Returns
    -------
    ndarray of float64, shape (...)
        NaN without positive or without negative patches.

    Raises
    ------
    DataError
        If the specificity is outside [0, 1].
    """
    if not 0 <= specificity <= 1:
        raise DataError(f"specificity {specificity}: give a share from 0 to 1, such as 0.9")
    hits, alarms = points.true_positives, points.false_positives
    negatives = alarms[..., -1:]
    # 9 of 10 must pass for 0.9, whatever the rounding.
    kept = negatives - alarms >= (specificity - 1e-9) * negatives
    best = np.where(kept, hits, 0).max(-1)
    known = negatives[..., 0] > 0
    return ratio(np.where(known, best, 0), np.where(known, hits[..., -1], 0))


def choose_threshold(
    labels: ArrayLike, scores: ArrayLike, rule: str = "balanced accuracy", *, positive: int
) -> float:
    """Threshold that is best on validation data, to be kept for everything scored later.

    Candidates are 0 (everything is positive) and the middles between neighbouring distinct
    scores. Of equally good ones the nearest to 0.5 is taken, of two as near the lower.

    Parameters
    ----------
    labels : array_like of int, shape (n,)
        True classes of validation patches, never of test patches.
    scores : array_like of float, shape (n,)
        Probability of the positive class.
    rule : str
        What is maximised: one of `THRESHOLD_RULES`, F1 being that of the positive class.
    positive : int
        The positive class.

    Returns
    -------
    float
        A patch is to be called positive where its probability is at least this.

    Raises
    ------
    ConfigError
        If the rule is unknown.
    DataError
        If there is no positive or no negative patch.

    Examples
    --------
    >>> choose_threshold([0, 0, 1, 0, 1], [0.1, 0.2, 0.3, 0.6, 0.8], positive=1)
    0.25
    """
    if rule not in THRESHOLD_RULES:
        raise unknown_name("threshold rule", rule, THRESHOLD_RULES)
    points = operating_points(labels, scores, positive=positive)
    hits, alarms = points.true_positives, points.false_positives
    positives, negatives = hits[-1], alarms[-1]
    if not positives or not negatives:
        raise DataError(
            f"no validation patch {'of' if not positives else 'outside'} the positive class "
            f"{positive}: a threshold needs both; choose another validation part"
        )
    upper, lower = points.thresholds[:-1], points.thresholds[1:]
    middle = (upper + lower) / 2
    # Two neighbouring floats have no middle, and the lower one must stay negative.
    candidates = np.append(np.where(middle > lower, middle, upper), 0.0)
    if rule == "balanced accuracy":
        gain = hits / positives + (negatives - alarms) / negatives
    else:
        gain = 2 * hits / (hits + alarms + positives)
    best = candidates[gain >= gain.max() - 1e-12]
    return float(best[np.lexsort([best, np.abs(best - 0.5).round(12)])[0]])
