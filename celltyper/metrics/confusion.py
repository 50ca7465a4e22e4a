"""Scores of a confusion matrix of patches (rows true, columns called), and what is called.

The scores take matrices with leading axes, so that the resamples of a bootstrap are scored at
once. A class that no patch has is NaN, never 0, and means are over the classes that occur.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import DataError
from celltyper.metrics.ratios import mean_of_known, ratio

Values = NDArray[np.float64]


def class_recall(confusion: ArrayLike) -> Values:
    """Share of the patches of every class that were called right.

    Parameters
    ----------
    confusion : array_like, shape (..., K, K)
        Rows true, columns called classes.

    Returns
    -------
    ndarray of float64, shape (..., K)
        NaN where no patch has the class.
    """
    matrix = np.asarray(confusion, np.float64)
    return ratio(_diagonal(matrix), matrix.sum(-1))


def class_precision(confusion: ArrayLike) -> Values:
    """Share of the patches called each class that have it.

    Parameters
    ----------
    confusion : array_like, shape (..., K, K)
        Rows true, columns called classes.

    Returns
    -------
    ndarray of float64, shape (..., K)
        NaN where no patch has the class or none was called so.
    """
    matrix = np.asarray(confusion, np.float64)
    called = matrix.sum(-2)
    return ratio(_diagonal(matrix), np.where(matrix.sum(-1) > 0, called, 0))


def f1_of_classes(confusion: ArrayLike) -> Values:
    """F1 of every class.

    Parameters
    ----------
    confusion : array_like, shape (..., K, K)
        Rows true, columns called classes.

    Returns
    -------
    ndarray of float64, shape (..., K)
        NaN where no patch has the class; 0 where some have and none was found.
    """
    matrix = np.asarray(confusion, np.float64)
    true = matrix.sum(-1)
    return ratio(2 * _diagonal(matrix), np.where(true > 0, true + matrix.sum(-2), 0))


def weighted_f1(confusion: ArrayLike) -> Values:
    """F1 of the classes, weighted by the patches that have them.

    Parameters
    ----------
    confusion : array_like, shape (..., K, K)
        Rows true, columns called classes.

    Returns
    -------
    ndarray of float64, shape (...)
        NaN without patches.
    """
    true = np.asarray(confusion, np.float64).sum(-1)
    return ratio(np.nansum(f1_of_classes(confusion) * true, axis=-1), true.sum(-1))


def macro(per_class: ArrayLike) -> Values:
    """Unweighted mean over the classes that occur; balanced accuracy if given the recalls.

    Parameters
    ----------
    per_class : array_like, shape (..., K)
        A score of every class, NaN where no patch has it.

    Returns
    -------
    ndarray of float64, shape (...)
        NaN if fewer than two classes occur: the recall of one class says nothing of the others.

    References
    ----------
    Brodersen et al., 2010, doi:10.1109/ICPR.2010.764
    """
    per_class = np.asarray(per_class, np.float64)
    several = (~np.isnan(per_class)).sum(-1) > 1
    return np.where(several, mean_of_known(per_class), np.nan)


def accuracy(confusion: ArrayLike) -> Values:
    """Share of patches called right; NaN without patches.

    Parameters
    ----------
    confusion : array_like, shape (..., K, K)
        Rows true, columns called classes.

    Returns
    -------
    ndarray of float64, shape (...)
    """
    matrix = np.asarray(confusion, np.float64)
    return ratio(_diagonal(matrix).sum(-1), matrix.sum((-1, -2)))


def quadratic_kappa(confusion: ArrayLike) -> Values:
    """Agreement beyond chance, mistakes weighted by the squared distance of the classes.

    With two classes this is Cohen's kappa without weights. With more it supposes that the classes
    are listed in their natural order.

    Parameters
    ----------
    confusion : array_like, shape (..., K, K)
        Rows true, columns called classes.

    Returns
    -------
    ndarray of float64, shape (...)
        NaN if fewer than two classes occur.

    References
    ----------
    Cohen, 1968, doi:10.1037/h0026256
    """
    matrix = np.asarray(confusion, np.float64)
    place = np.arange(matrix.shape[-1])
    penalty = (place[:, None] - place) ** 2
    true, called = matrix.sum(-1), matrix.sum(-2)
    by_chance = (penalty * true[..., :, None] * called[..., None, :]).sum((-1, -2))
    several = (true > 0).sum(-1) > 1
    observed = (penalty * matrix).sum((-1, -2)) * true.sum(-1)
    return 1 - ratio(observed, np.where(several, by_chance, 0))


def call_classes(
    probabilities: ArrayLike, positive: int, threshold: float = 0.5
) -> NDArray[np.intp]:
    """Class that each patch is called.

    Parameters
    ----------
    probabilities : array_like, shape (n, K)
        Class probabilities.
    positive : int
        The positive class.
    threshold : float
        Of two classes, the positive one is called where its probability is at least this; of more
        the most probable one is called, and the threshold must be 0.5.

    Returns
    -------
    ndarray of int, shape (n,)

    Raises
    ------
    DataError
        If a threshold is given for more than two classes.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.shape[1] == 2:
        called = probabilities[:, positive] >= threshold
        return np.where(called, positive, 1 - positive).astype(np.intp)
    if threshold != 0.5:
        raise DataError(
            f"threshold {threshold:g} for {probabilities.shape[1]} classes: thresholds are for two "
            "classes; of more, the most probable one is called"
        )
    likeliest: NDArray[np.intp] = probabilities.argmax(axis=1)
    return likeliest


def _diagonal(matrix: Values) -> Values:
    return np.diagonal(matrix, axis1=-2, axis2=-1)
