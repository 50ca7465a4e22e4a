"""Ratios and means in which "nothing to score" is NaN, never a warning and never a zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> NDArray[np.float64]:
    """Quotient, elementwise; NaN where the denominator is 0.

    Parameters
    ----------
    numerator, denominator : array_like
        Broadcast against each other.

    Returns
    -------
    ndarray of float64
        The quotient.
    """
    top, bottom = np.broadcast_arrays(
        np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    )
    quotient = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=quotient, where=bottom != 0)
    return quotient


def mean_of_known(values: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """Mean along an axis without NaN; NaN where nothing is left.

    Parameters
    ----------
    values : array_like
        Scores, NaN where there was nothing to score.
    axis : int
        Axis that is averaged.

    Returns
    -------
    ndarray of float64
        The means.
    """
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0).sum(axis), known.sum(axis))
