"""All scores of weighted patches at once: what every resample of a bootstrap needs.

Scores at a threshold come from a confusion matrix (`celltyper.metrics.confusion`), scores of a
ranking from the operating points (`celltyper.metrics.ranking`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import DataError
from celltyper.metrics.bootstrap import draw_weights
from celltyper.metrics.calibration import ReliabilityTable, reliability_table
from celltyper.metrics.confusion import (
    Values,
    accuracy,
    call_classes,
    class_precision,
    class_recall,
    f1_of_classes,
    macro,
    quadratic_kappa,
    weighted_f1,
)
from celltyper.metrics.ranking import (
    auroc,
    average_precision,
    operating_points,
    sensitivity_at_specificity,
)
from celltyper.metrics.ratios import ratio

ALL = -1
"""Stands for "not of one class" in the keys of scores."""

Scorer = Callable[[Values], dict[tuple[str, int], Values]]
"""Scores ``(r,)`` by name and class from the weights of clusters ``(r, clusters)``."""

_CHUNK = 4_000_000
"""Weights held at once: patches times resamples."""


def patch_reliability(
    labels: ArrayLike, probabilities: ArrayLike, positive: int, bins: int = 15
) -> ReliabilityTable:
    """Compare probabilities with how often they come true.

    Of two classes, the probability of the positive one is compared with the share of positive
    patches; of more, the largest probability with the share called right.

    Parameters
    ----------
    labels : array_like of int, shape (n,)
        True classes.
    probabilities : array_like, shape (n, K)
        Class probabilities.
    positive : int
        The positive class.
    bins : int
        Number of bins on [0, 1].

    Returns
    -------
    ReliabilityTable

    Raises
    ------
    DataError
        If shapes do not fit or a probability is outside [0, 1].
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    if probabilities.ndim == 2 and probabilities.shape[1] == 2:
        # One column is its own largest, and "right" then means that the patch is positive.
        not_positive = np.where(labels == positive, 0, 1)
        return reliability_table(probabilities[:, [positive]], not_positive, bins)
    return reliability_table(probabilities, labels, bins)


def brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Half the squared distance of the probabilities from the truth, mean over patches.

    Of two classes, this is the squared error of the probability of either.

    Parameters
    ----------
    labels : array_like of int, shape (n,)
        True classes.
    probabilities : array_like, shape (n, K)
        Class probabilities.

    Returns
    -------
    float
        From 0 to 1; NaN without patches.

    References
    ----------
    Brier, 1950, doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2
    """
    squares = _squares(np.asarray(labels, np.intp), np.asarray(probabilities, np.float64))
    return float(ratio(squares.sum(), len(squares)))


def check_patches(
    labels: ArrayLike,
    probabilities: ArrayLike,
    n_classes: int,
    positive: int,
    groups: Sequence[str],
) -> tuple[NDArray[np.intp], Values, NDArray[np.intp]]:
    """Labels, probabilities and the index of every patch's group.

    Raises
    ------
    DataError
        If the arrays do not fit together, a label is outside 0 to K - 1, the positive class is
        not one of the classes, or probabilities are none.
    """
    truth, shares = np.asarray(labels), np.asarray(probabilities, np.float64)
    if truth.ndim != 1 or shares.shape != (len(truth), n_classes) or len(groups) != len(truth):
        raise DataError(
            f"{truth.shape} labels, {shares.shape} probabilities and {len(groups)} groups for "
            f"{n_classes} classes: expected (n,), (n, {n_classes}) and n"
        )
    if not len(truth):
        raise DataError("no patches to score")
    if n_classes < 2 or not 0 <= positive < n_classes:
        raise DataError(
            f"positive class {positive} of {n_classes} classes: name at least two classes and "
            "which of them is positive"
        )
    if truth.min() < 0 or truth.max() >= n_classes:
        raise DataError(
            f"labels go from {truth.min()} to {truth.max()}, expected 0 to {n_classes - 1}: leave "
            "out patches without a label"
        )
    wrong = ~(np.abs(shares.sum(1) - 1) < 1e-3) | ~((shares > -1e-5) & (shares < 1 + 1e-5)).all(1)
    if wrong.any():
        i = int(wrong.argmax())
        raise DataError(
            f"{int(wrong.sum())} of {len(shares)} rows are no probabilities (row {i}: "
            f"{shares[i].tolist()}): they must be from 0 to 1 with the sum 1"
        )
    _, cluster = np.unique(np.asarray(groups, str), return_inverse=True)
    return truth.astype(np.intp), shares, cluster.astype(np.intp)


def patch_scorer(
    truth: NDArray[np.intp],
    shares: Values,
    cluster: NDArray[np.intp],
    positive: int,
    threshold: float,
    specificity: float,
) -> Scorer:
    """Prepare the scores of some patches.

    Parameters
    ----------
    truth : ndarray of int, shape (n,)
    shares : ndarray of float64, shape (n, K)
        Class probabilities.
    cluster : ndarray of int, shape (n,)
        Index of every patch's group.
    positive : int
        The positive class.
    threshold : float
        Probability from which a patch is called positive.
    specificity : float
        Specificity at which sensitivity is read.

    Returns
    -------
    callable
        See `Scorer`.
    """
    n_classes = shares.shape[1]
    confusions = confusions_by_cluster(truth, shares, cluster, positive, threshold)
    sizes = confusions.sum((1, 2))
    squares = np.bincount(cluster, _squares(truth, shares))
    gaps = _calibration_gaps(truth, shares, cluster, positive)

    def score(weights: Values) -> dict[tuple[str, int], Values]:
        matrix = np.tensordot(weights, confusions, 1)
        of_patches = weights[:, cluster]
        ranked = {
            k: operating_points(truth, shares[:, k], positive=k, weights=of_patches)
            for k in (range(n_classes) if n_classes > 2 else [positive])
        }
        recall, precision, f1 = class_recall(matrix), class_precision(matrix), f1_of_classes(matrix)
        others = np.arange(n_classes) != positive
        rest = matrix[:, others]
        patches = weights @ sizes
        found = {
            "balanced_accuracy": macro(recall),
            "auroc": auroc(ranked[positive]),
            "auprc": average_precision(ranked[positive]),
            "f1": f1[:, positive],
            "sensitivity": recall[:, positive],
            "specificity": ratio(rest[:, :, others].sum((1, 2)), rest.sum((1, 2))),
            "sensitivity_at_specificity": sensitivity_at_specificity(ranked[positive], specificity),
            "accuracy": accuracy(matrix),
            "weighted_f1": weighted_f1(matrix),
            "kappa": quadratic_kappa(matrix),
            "ece": ratio(np.abs(weights @ gaps).sum(1), patches),
            "brier": ratio(weights @ squares, patches),
        }
        by_class = {"recall": recall, "precision": precision, "f1": f1}
        if n_classes > 2:
            by_class["auroc"] = np.stack([auroc(ranked[k]) for k in ranked], axis=1)
            found |= {"macro_auroc": macro(by_class["auroc"]), "macro_f1": macro(f1)}
        return {(name, ALL): values for name, values in found.items()} | {
            (name, k): values[:, k] for name, values in by_class.items() for k in range(n_classes)
        }

    return score


def draw_scores(
    scorer: Scorer, clusters: int, patches: int, resamples: int, seed: int
) -> dict[tuple[str, int], Values]:
    """Score all resamples of clusters.

    Parameters
    ----------
    scorer : callable
    clusters, patches : int
        How many there are.
    resamples : int
        How many are drawn; none from a single cluster.
    seed : int
        Seed of the resampling: the same seed draws what `cluster_bootstrap` draws.

    Returns
    -------
    dict of (str, int) to ndarray, shape (resamples,)
        By name and class.
    """
    weights = draw_weights(clusters, resamples if clusters > 1 else 0, seed)
    rows = max(1, _CHUNK // patches)
    # One chunk even of no resamples, for the keys.
    chunks = [scorer(weights[i : i + rows]) for i in range(0, max(len(weights), 1), rows)]
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}


def confusions_by_cluster(
    truth: NDArray[np.intp],
    shares: Values,
    cluster: NDArray[np.intp],
    positive: int,
    threshold: float,
) -> NDArray[np.int64]:
    """Confusion matrix of every cluster, shape (clusters, K, K)."""
    k, clusters = shares.shape[1], int(cluster.max()) + 1
    entry = (cluster * k + truth) * k + call_classes(shares, positive, threshold)
    return np.bincount(entry, minlength=clusters * k * k).reshape(clusters, k, k)


def _calibration_gaps(
    truth: NDArray[np.intp], shares: Values, cluster: NDArray[np.intp], positive: int
) -> Values:
    """Sum of confidence less sum of right answers by cluster and bin, shape (clusters, bins)."""
    order = np.argsort(cluster, kind="stable")
    starts = np.flatnonzero(np.diff(cluster[order])) + 1
    tables = (patch_reliability(truth[i], shares[i], positive) for i in np.split(order, starts))
    return np.array([np.nan_to_num((t.confidence - t.accuracy) * t.cells) for t in tables])


def _squares(truth: NDArray[np.intp], shares: Values) -> Values:
    squares: Values = ((shares - np.eye(shares.shape[1])[truth]) ** 2).sum(1) / 2
    return squares
