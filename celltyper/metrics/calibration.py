"""Whether probabilities mean what they say: reliability and expected calibration error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.metrics.ratios import ratio


class ReliabilityTable(NamedTuple):
    """Bins of equal width of the largest probability; NaN where a bin is empty."""

    confidence: NDArray[np.float64]
    """Mean confidence, shape (bins,)."""
    accuracy: NDArray[np.float64]
    """Share of right classes."""
    count: NDArray[np.int64]
    """Objects in the bin."""


def reliability_table(
    probabilities: ArrayLike, truth: ArrayLike, bins: int = 15
) -> ReliabilityTable:
    """Confidence against accuracy in bins.

    Parameters
    ----------
    probabilities : array_like, shape (n, C)
        Class probabilities of every object.
    truth : array_like of int, shape (n,)
        Its class.
    bins : int
        Number of bins ``(i / bins, (i + 1) / bins]``.

    Returns
    -------
    ReliabilityTable
    """
    probabilities, truth = np.asarray(probabilities, np.float64), np.asarray(truth)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    return ReliabilityTable(
        ratio(np.bincount(which, confidence, bins), count),
        ratio(np.bincount(which, right, bins), count),
        count,
    )


def expected_calibration_error(probabilities: ArrayLike, truth: ArrayLike, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins, weighted by their objects.

    Parameters
    ----------
    probabilities, truth, bins
        See `reliability_table`.

    Returns
    -------
    float
        In [0, 1]; NaN without objects.

    References
    ----------
    Naeini et al., 2015, doi:10.1609/aaai.v29i1.9602; Guo et al., 2017,
    doi:10.48550/arXiv.1706.04599
    """
    table = reliability_table(probabilities, truth, bins)
    total = int(table.count.sum())
    gaps = np.abs(table.confidence - table.accuracy)
    return float(np.nansum(gaps * table.count) / total) if total else float("nan")
