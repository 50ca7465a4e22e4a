"""Whether a probability of .8 is right eight times out of ten."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import DataError
from celltyper.metrics.ratios import ratio


class ReliabilityTable(NamedTuple):
    """Confidence against accuracy in bins of equal width; every field has shape (bins,)."""

    low: NDArray[np.float64]
    """Lower edge, itself not included (but 0 is in the first bin)."""
    high: NDArray[np.float64]
    """Upper edge, included."""
    cells: NDArray[np.int64]
    """Instances in the bin."""
    confidence: NDArray[np.float64]
    """Mean largest probability, NaN in an empty bin."""
    accuracy: NDArray[np.float64]
    """Share whose most probable class is right, NaN in an empty bin."""


def reliability_table(
    probabilities: ArrayLike, truth: ArrayLike, bins: int = 15
) -> ReliabilityTable:
    """Compare the largest probability with how often its class is right.

    Parameters
    ----------
    probabilities : array_like, shape (n, C)
        Class probabilities of every instance.
    truth : array_like of int, shape (n,)
        True class, a column of ``probabilities``.
    bins : int
        Number of bins on [0, 1].

    Returns
    -------
    ReliabilityTable
        One row a bin.

    Raises
    ------
    DataError
        If shapes do not fit or a probability is outside [0, 1].
    """
    probabilities, truth = np.asarray(probabilities, np.float64), np.asarray(truth)
    if probabilities.ndim != 2 or truth.shape != probabilities.shape[:1]:
        raise DataError(
            f"probabilities are {probabilities.shape}, truth {truth.shape}: "
            "expected (n, C) and (n,)"
        )
    # Sums of float32 softmax may pass 1 by a rounding error.
    if probabilities.size and not -1e-5 <= probabilities.min() <= probabilities.max() <= 1 + 1e-5:
        raise DataError(
            f"probabilities must be in [0, 1], got {probabilities.min()} to {probabilities.max()}"
        )
    confidence = probabilities.max(axis=1, initial=0)
    right = probabilities.argmax(axis=1) == truth if len(truth) else np.zeros(0, bool)
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    return ReliabilityTable(
        edges[:-1],
        edges[1:],
        count,
        ratio(np.bincount(bin_of, confidence, bins), count),
        ratio(np.bincount(bin_of, right, bins), count),
    )


def expected_calibration_error(probabilities: ArrayLike, truth: ArrayLike, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy, weighted by the instances of each bin.

    Parameters
    ----------
    probabilities : array_like, shape (n, C)
        Class probabilities of every instance.
    truth : array_like of int, shape (n,)
        True class, a column of ``probabilities``.
    bins : int
        Number of bins on [0, 1].

    Returns
    -------
    float
        In [0, 1]; NaN without instances.

    Raises
    ------
    DataError
        If shapes do not fit or a probability is outside [0, 1].

    References
    ----------
    Naeini et al., 2015, doi:10.1609/aaai.v29i1.9602
    """
    return calibration_gap(reliability_table(probabilities, truth, bins))


def classwise_calibration_error(
    probabilities: ArrayLike, truth: ArrayLike, bins: int = 15
) -> float:
    """Expected calibration error of every class's own probability, mean over the classes.

    That of the largest probability does not see whether the others are right.

    Parameters
    ----------
    probabilities : array_like, shape (n, C)
    truth : array_like of int, shape (n,)
        True class, a column of ``probabilities``.
    bins : int
        Number of bins on [0, 1].

    Returns
    -------
    float
        In [0, 1]; NaN without instances.

    Raises
    ------
    DataError
        If shapes do not fit or a probability is outside [0, 1].

    References
    ----------
    Kull et al., 2019, doi:10.48550/arXiv.1910.12656
    """
    probabilities, truth = np.asarray(probabilities, np.float64), np.asarray(truth)
    columns = range(probabilities.shape[-1])
    # of a single column, 0 is right
    gaps = [
        calibration_gap(reliability_table(probabilities[:, [k]], truth != k, bins)) for k in columns
    ]
    return float(np.mean(gaps))


def calibration_gap(table: ReliabilityTable) -> float:
    """Expected calibration error of a reliability table, NaN without instances."""
    gap = np.abs(table.confidence - table.accuracy)
    return float(ratio(np.nansum(gap * table.cells), table.cells.sum()))
