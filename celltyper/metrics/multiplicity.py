"""P-values of several comparisons at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Correct p-values for their number, so that below 0.05 all of them err in 5 % of cases.

    The smallest of m is multiplied by m, the next by m - 1 and so on; none becomes smaller than
    one before it, nor larger than 1.

    Parameters
    ----------
    p_values : array_like, shape (m,)
        NaN is no comparison: it stays, and is not counted.

    Returns
    -------
    ndarray of float64, shape (m,)

    References
    ----------
    Holm, A simple sequentially rejective multiple test procedure, 1979, Scandinavian Journal of
    Statistics 6, 65-70, https://www.jstor.org/stable/4615733

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, np.float64)
    corrected = np.full(p.shape, np.nan)
    order = np.argsort(p, kind="stable")[: int((~np.isnan(p)).sum())]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return corrected
