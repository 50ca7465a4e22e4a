"""Scores on reference instances: the class of every annotated nucleus, segmentation set aside.

The PathoCellBench rule: mean class probability over the pixels of each reference nucleus, arg max
over all classes including background, F1 of every foreground class, unweighted mean.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import DataError
from celltyper.labels import label_ids, mean_in_labels
from celltyper.metrics.matching import types_of
from celltyper.metrics.ratios import mean_of_known, ratio
from celltyper.types import Labels


class ReferenceClasses(NamedTuple):
    """Class of every reference nucleus, ids ascending."""

    true: NDArray[np.intp]
    """Annotated class 0..K, shape (n,); 0 is "no class known"."""
    predicted: NDArray[np.intp]
    """Class of the largest mean probability 0..K, shape (n,); 0 is background."""
    probabilities: NDArray[np.float32]
    """Mean probabilities, shape (n, K + 1)."""


def reference_instance_classes(
    labels: Labels, phenotypes: NDArray[np.uint8], probabilities: NDArray[np.float32]
) -> ReferenceClasses:
    """Classify every reference nucleus by its mean class probability.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Reference instances, 0 is background.
    phenotypes : ndarray of uint8
        Class of every label id as lookup table.
    probabilities : ndarray of float32, shape (K + 1, H, W)
        Softmax over background and K classes.

    Returns
    -------
    ReferenceClasses
        Annotated and predicted class and the mean probabilities; of equal probabilities the
        lowest class wins.

    Raises
    ------
    DataError
        If the map has another size than the labels, the table is too short or a class is above K.
    """
    if probabilities.ndim != 3 or probabilities.shape[1:] != labels.shape:
        raise DataError(
            f"probabilities are {probabilities.shape}, labels {labels.shape}: "
            "expected (K + 1, height, width) with the labels' height and width"
        )
    true = types_of(label_ids(labels), phenotypes, len(probabilities) - 1)
    means = mean_in_labels(labels, probabilities)
    return ReferenceClasses(true, means.argmax(axis=1), means)


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, n_classes: int) -> NDArray[np.int64]:
    """Count nuclei by annotated and predicted class; matrices add over images.

    Parameters
    ----------
    true, predicted : array_like of int, shape (n,)
        Classes 0..K.
    n_classes : int
        Number K of foreground classes.

    Returns
    -------
    ndarray of int64, shape (K + 1, K + 1)
        Rows are annotated, columns predicted classes, 0 first.

    Raises
    ------
    DataError
        If lengths differ or a class is outside 0..K.
    """
    true, predicted = np.asarray(true, np.int64), np.asarray(predicted, np.int64)
    if true.shape != predicted.shape:
        raise DataError(f"{true.shape} annotated classes for {predicted.shape} predicted ones")
    both = np.concatenate([true, predicted])
    if len(both) and not 0 <= both.min() <= both.max() <= n_classes:
        raise DataError(f"classes must be 0 to {n_classes}, got {both.min()} to {both.max()}")
    size = n_classes + 1
    return np.bincount(true * size + predicted, minlength=size * size).reshape(size, size)


def class_f1(confusion: ArrayLike) -> NDArray[np.float64]:
    """F1 of every foreground class.

    Nuclei whose annotated class is unknown (row 0) are left out; a nucleus predicted as
    background is a miss of its class.

    Parameters
    ----------
    confusion : array_like, shape (..., K + 1, K + 1)
        From `confusion_matrix`, rows annotated.

    Returns
    -------
    ndarray of float64, shape (..., K)
        NaN where the class is neither annotated nor predicted.
    """
    known = np.asarray(confusion, np.float64)[..., 1:, 1:]
    annotated = np.asarray(confusion, np.float64)[..., 1:, :].sum(-1)
    hits = np.diagonal(known, axis1=-2, axis2=-1)
    return ratio(2 * hits, annotated + known.sum(-2))


def macro_f1(confusion: ArrayLike) -> NDArray[np.float64]:
    """Unweighted mean of `class_f1` over the foreground classes that occur.

    Parameters
    ----------
    confusion : array_like, shape (..., K + 1, K + 1)
        From `confusion_matrix`, rows annotated.

    Returns
    -------
    ndarray of float64, shape (...)
        NaN if no class occurs.
    """
    return mean_of_known(class_f1(confusion))
