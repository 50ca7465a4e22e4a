"""Intervals from a bootstrap over clusters: patients, slides or fields are drawn, never cells.

Cells of one patient resemble each other, so that drawing cells would make every interval too
narrow. Scores are functions of additive counts, so that a resample is one row of multinomial
weights times the counts of the clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import DataError

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Score from summed counts ``(..., *shape of one cluster's counts)`` -> ``(...)``."""


class Interval(NamedTuple):
    """Percentile interval; NaN where it cannot be computed."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """Difference ``a - b`` of a score on the same clusters."""

    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided: twice the smaller share of resamples on one side of 0, at most 1."""


def cluster_bootstrap(
    counts: ArrayLike,
    statistic: Statistic,
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a score under resampling of clusters.

    Parameters
    ----------
    counts : array_like, shape (clusters, ...)
        Additive counts of every cluster.
    statistic : callable
        Takes summed counts of all resamples, shape (n, ...), and returns scores, shape (n,).
        Resamples where it is NaN are left out.
    n : int
        Number of resamples.
    seed : int
        Seed of the random generator.
    level : float
        Share of resamples inside the interval.

    Returns
    -------
    Interval
        NaN with fewer than two clusters.

    References
    ----------
    Efron, Tibshirani, An introduction to the bootstrap, 1993, doi:10.1201/9780429246593

    Examples
    --------
    >>> hits_and_all = [[9, 10], [8, 10], [10, 10], [7, 10]]
    >>> cluster_bootstrap(hits_and_all, lambda s: s[..., 0] / s[..., 1])
    Interval(low=0.75, high=0.95)
    """
    counts = np.asarray(counts, np.float64)
    if len(counts) < 2:
        return Interval(np.nan, np.nan)
    return percentile_interval(
        statistic(_totals(counts, draw_weights(len(counts), n, seed))), level
    )


def paired_bootstrap(
    counts_a: ArrayLike,
    counts_b: ArrayLike,
    statistic: Statistic,
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """Difference of a score between two runs on the same clusters, with interval and p-value.

    Both runs see the same resampled clusters, which takes out what the clusters have in common.

    Parameters
    ----------
    counts_a, counts_b : array_like, shape (clusters, ...)
        Additive counts of the two runs, the same cluster in the same row.
    statistic : callable
        As in `cluster_bootstrap`.
    n : int
        Number of resamples.
    seed : int
        Seed of the random generator.
    level : float
        Share of resamples inside the interval.

    Returns
    -------
    PairedDifference
        Interval and p-value are NaN with fewer than two clusters. The p-value is never below
        ``2 / (n + 1)``, for the observed difference counts as one more resample on each side.

    Raises
    ------
    DataError
        If the two do not have the same shape.
    """
    a, b = np.asarray(counts_a, np.float64), np.asarray(counts_b, np.float64)
    if a.shape != b.shape:
        raise DataError(f"counts are {a.shape} and {b.shape}: score both runs on the same clusters")
    difference = float(statistic(a.sum(0)) - statistic(b.sum(0)))
    if len(a) < 2:
        return PairedDifference(difference, np.nan, np.nan, np.nan)
    weights = draw_weights(len(a), n, seed)
    differences = statistic(_totals(a, weights)) - statistic(_totals(b, weights))
    return paired_interval(difference, differences, level)


def paired_interval(
    difference: float, differences: NDArray[np.float64], level: float = 0.95
) -> PairedDifference:
    """Percentile interval and p-value from the differences of all resamples, NaN left out."""
    known = differences[~np.isnan(differences)]
    side = min((known <= 0).sum(), (known >= 0).sum())
    p_value = min(1.0, float(2 * (side + 1) / (len(known) + 1))) if len(known) else np.nan
    return PairedDifference(difference, *percentile_interval(differences, level), p_value)


def draw_weights(clusters: int, n: int, seed: int) -> NDArray[np.float64]:
    """How often each cluster is drawn, shape (n, clusters)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=n).astype(np.float64)


def _totals(counts: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    totals: NDArray[np.float64] = weights @ counts.reshape(len(counts), -1)
    return totals.reshape(len(weights), *counts.shape[1:])


def percentile_interval(scores: NDArray[np.float64], level: float = 0.95) -> Interval:
    """Percentile interval of scores, NaN left out."""
    known = scores[~np.isnan(scores)]
    if not len(known):
        return Interval(np.nan, np.nan)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
