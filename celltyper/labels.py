"""Numbers of label images that several parts need: ids, sizes, means inside each label.

Every function makes one pass over the image, whatever the number of labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from celltyper.types import Labels


class LabelBoxes(NamedTuple):
    """Bounding boxes of labels; row i belongs to ``ids[i]``; stops are exclusive."""

    ids: NDArray[np.int32]
    row_start: NDArray[np.int32]
    row_stop: NDArray[np.int32]
    col_start: NDArray[np.int32]
    col_stop: NDArray[np.int32]
    area: NDArray[np.int64]


def label_ids(labels: Labels) -> NDArray[np.int32]:
    """Sorted ids of all labels in the image, without background.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.

    Returns
    -------
    ndarray of int32, shape (n,)
        The ids, ascending.
    """
    return np.flatnonzero(_counts(labels, _size(labels))[1:]).astype(np.int32) + 1


def label_boxes(labels: Labels) -> LabelBoxes:
    """Bounding box and area (pixels) of every label, in one pass.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.

    Returns
    -------
    LabelBoxes
        One row a label, ids ascending.
    """
    boxes, area = _boxes(labels, _size(labels))
    ids = np.flatnonzero(area[1:]).astype(np.int32) + 1
    found = boxes[ids]
    return LabelBoxes(ids, found[:, 0], found[:, 1], found[:, 2], found[:, 3], area[ids])


def mean_in_labels(labels: Labels, maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of every map channel inside every label.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    maps : ndarray of float32, shape (C, H, W)
        For instance softmax probabilities.

    Returns
    -------
    ndarray of float32, shape (n, C)
        Row i belongs to the i-th smallest id of the image (see `label_ids`). Sums are kept in
        float64.
    """
    if maps.shape[1:] != labels.shape:
        raise ValueError(f"maps are {maps.shape[1:]}, labels {labels.shape}: must be equal")
    size = _size(labels)
    counts = _counts(labels, size)
    ids = np.flatnonzero(counts[1:]) + 1
    sums = _sums(labels, maps, size)
    means: NDArray[np.float32] = (sums[:, ids] / counts[ids]).T.astype(np.float32)
    return means


def centroids(labels: Labels) -> NDArray[np.float64]:
    """Centroid of every label as ``(row, column)``, pixel centres on integers.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.

    Returns
    -------
    ndarray of float64, shape (n, 2)
        Row i belongs to the i-th smallest id.
    """
    sums = _coordinate_sums(labels, _size(labels))
    found = np.flatnonzero(sums[1:, 2]) + 1
    means: NDArray[np.float64] = sums[found, :2] / sums[found, 2:]
    return means


def _size(labels: Labels) -> int:
    if labels.ndim != 2:
        raise ValueError(f"labels must be (H, W), got {labels.shape}")
    if labels.size and int(labels.min()) < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")
    return int(labels.max(initial=0)) + 1


@njit(cache=True, nogil=True)
def _counts(labels, size):  # type: ignore[no-untyped-def]
    counts = np.zeros(size, np.int64)
    for r in range(labels.shape[0]):
        for c in range(labels.shape[1]):
            counts[labels[r, c]] += 1
    return counts


@njit(cache=True, nogil=True)
def _boxes(labels, size):  # type: ignore[no-untyped-def]
    height, width = labels.shape
    boxes = np.empty((size, 4), np.int32)
    boxes[:, 0] = height
    boxes[:, 1] = 0
    boxes[:, 2] = width
    boxes[:, 3] = 0
    area = np.zeros(size, np.int64)
    for r in range(height):
        for c in range(width):
            i = labels[r, c]
            if i:
                area[i] += 1
                boxes[i, 0] = min(boxes[i, 0], r)
                boxes[i, 1] = max(boxes[i, 1], r + 1)
                boxes[i, 2] = min(boxes[i, 2], c)
                boxes[i, 3] = max(boxes[i, 3], c + 1)
    return boxes, area


@njit(cache=True, nogil=True)
def _sums(labels, maps, size):  # type: ignore[no-untyped-def]
    channels = maps.shape[0]
    sums = np.zeros((channels, size), np.float64)
    for r in range(labels.shape[0]):
        for k in range(channels):
            for c in range(labels.shape[1]):
                i = labels[r, c]
                if i:
                    sums[k, i] += maps[k, r, c]
    return sums


@njit(cache=True, nogil=True)
def _coordinate_sums(labels, size):  # type: ignore[no-untyped-def]
    sums = np.zeros((size, 3), np.float64)
    for r in range(labels.shape[0]):
        for c in range(labels.shape[1]):
            i = labels[r, c]
            if i:
                sums[i, 0] += r
                sums[i, 1] += c
                sums[i, 2] += 1
    return sums
