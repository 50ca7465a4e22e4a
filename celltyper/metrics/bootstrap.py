"""Intervals and paired tests by resampling clusters: patients, fields or blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Scores (...) of sums (..., *shape); must work on leading axes."""


class Interval(NamedTuple):
    """Percentile interval; NaN where there are fewer than two clusters."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """Difference ``a - b`` of a statistic, resampled over the same clusters."""

    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided, with one added to the counts (Davison 1997), so never 0."""


def cluster_bootstrap(
    counts: ArrayLike,
    statistic: Statistic,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic of sums, resampling whole clusters.

    Parameters
    ----------
    counts : array_like, shape (clusters, ...)
        What each cluster adds to the sums.
    statistic : callable
        Turns sums (..., *shape) into scores (...).
    n : int
        Number of resamples.
    seed : int
        Of the resampling.
    level : float
        Coverage.

    Returns
    -------
    Interval

    References
    ----------
    Field & Welsh, Bootstrapping clustered data, 2007, doi:10.1111/j.1467-9868.2007.00593.x
    """
    counts = np.asarray(counts, np.float64)
    if len(counts) < 2:
        return Interval(np.nan, np.nan)
    return _percentiles(statistic(_resampled(counts, n, seed)), level)


def paired_bootstrap(
    counts_a: ArrayLike,
    counts_b: ArrayLike,
    statistic: Statistic,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """Interval and p-value of the difference of two runs on the same clusters.

    Parameters
    ----------
    counts_a, counts_b : array_like, shape (clusters, ...)
        Of the two runs, clusters in the same order.
    statistic, n, seed, level
        See `cluster_bootstrap`.

    Returns
    -------
    PairedDifference

    Raises
    ------
    ValueError
        If the two have different numbers of clusters.
    """
    a, b = np.asarray(counts_a, np.float64), np.asarray(counts_b, np.float64)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} clusters in one run, {len(b)} in the other: must be the same")
    difference = float(statistic(a.sum(0)) - statistic(b.sum(0)))
    if len(a) < 2:
        return PairedDifference(difference, np.nan, np.nan, np.nan)
    drawn = statistic(_resampled(a, n, seed)) - statistic(_resampled(b, n, seed))
    low, high = _percentiles(drawn, level)
    known = drawn[~np.isnan(drawn)]
    tail = min((known <= 0).sum(), (known >= 0).sum())
    return PairedDifference(
        difference, low, high, float(min(1.0, 2 * (tail + 1) / (len(known) + 1)))
    )


def _resampled(counts: NDArray[np.float64], n: int, seed: int) -> NDArray[np.float64]:
    """Sums of `n` resamples: clusters drawn with replacement are multinomial weights."""
    size = len(counts)
    weights = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), n)
    return (weights.astype(np.float64) @ counts.reshape(size, -1)).reshape(n, *counts.shape[1:])


def _percentiles(values: NDArray[np.float64], level: float) -> Interval:
    known = values[~np.isnan(values)]
    if not len(known):
        return Interval(np.nan, np.nan)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
