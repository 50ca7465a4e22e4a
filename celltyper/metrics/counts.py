"""How well the number of cells per image is predicted: R2 of every class."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.metrics.ratios import ratio


def count_moments(true: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """Compute the sums from which R2 follows; they add over images.

    Parameters
    ----------
    true, predicted : array_like, shape (..., K)
        Number of cells of every class in an image.

    Returns
    -------
    ndarray of float64, shape (..., K, 4)
        1, true count, true count squared, squared error.
    """
    true, predicted = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
    return np.stack([np.ones_like(true), true, true**2, (true - predicted) ** 2], axis=-1)


def count_r2(moments: ArrayLike) -> NDArray[np.float64]:
    """Coefficient of determination of the cell counts.

    Parameters
    ----------
    moments : array_like, shape (..., K, 4)
        Sums of `count_moments` over images.

    Returns
    -------
    ndarray of float64, shape (..., K)
        At most 1; NaN where all images have the same true count, for R2 has no meaning there.

    References
    ----------
    Graham et al., CoNIC, 2021, doi:10.48550/arXiv.2108.11195
    """
    n, total, squares, error = np.moveaxis(np.asarray(moments, np.float64), -1, 0)
    # n times the sum of squares about the mean: exact for counts, so that 0 is really 0.
    return 1 - ratio(n * error, n * squares - total**2)
