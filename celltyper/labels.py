"""What several parts need of label images: ids, sizes, means inside each label, another size.

The cost of every function follows the pixels, not the number of labels.
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


def resize_labels(labels: Labels, shape: tuple[int, int]) -> Labels:
    """Labels at another size, such that centroids stay where they are on the image.

    Along an axis that shrinks, an output pixel takes the label, or the background, that covers
    most of it; along one that grows, that of the source pixel its centre lies in. Sampling at
    centres would shift everything by half a source pixel at even factors, where every centre
    lies between two pixels. There, and where two labels cover equal areas, output pixels with an
    even sum of row and column take what comes first in reading order and the others what comes
    last, so neither side gains.

    A label that is left without a pixel gets the one its centroid lies in, if that is background;
    of several such labels the smallest id. Otherwise it vanishes. A centroid that lies exactly
    between two pixels counts to the later one for even ids and to the earlier for odd.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    shape : (int, int)
        New height and width, of any ratio to the old.

    Returns
    -------
    ndarray of int32, shape (height, width)
        Ids stay.

    Raises
    ------
    ValueError
        If either size is empty, or labels are negative.
    """
    _size(labels)
    if not labels.size or min(shape) < 1:
        raise ValueError(f"cannot resize labels of {labels.shape} to {shape}: must not be empty")
    (row_start, row_stop), (col_start, col_stop) = (
        _spans(old, new) for old, new in zip(labels.shape, shape, strict=True)
    )
    resized: Labels = _vote(labels, row_start, row_stop, col_start, col_stop)
    ids = label_ids(labels)
    left_out = np.isin(ids, label_ids(resized), assume_unique=True, invert=True)
    if left_out.any():
        lost = ids[left_out]
        where = (centroids(labels)[left_out] + 0.5) * shape / labels.shape
        pixels = np.where(lost[:, None] % 2, np.ceil(where) - 1, np.floor(where)).astype(np.int64)
        for label, (r, c) in zip(lost, pixels, strict=True):
            if resized[r, c] == 0:
                resized[r, c] = label
    return resized


def _spans(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and past-the-last source index that has a say in every output index."""
    index = np.arange(new, dtype=np.int64)
    if new < old:
        return index * old // new, -(-(index + 1) * old // new)
    # In halves of 1 / new: two source pixels only where the centre lies exactly between them.
    center = (2 * index + 1) * old
    return -(-center // (2 * new)) - 1, center // (2 * new) + 1


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


@njit(cache=True, nogil=True)
def _vote(labels, row_start, row_stop, col_start, col_stop):  # type: ignore[no-untyped-def]
    old_height, old_width = labels.shape
    height, width = len(row_start), len(col_start)
    out = np.empty((height, width), np.int32)
    most = (row_stop - row_start).max() * (col_stop - col_start).max()
    seen = np.empty(most, np.int32)
    votes = np.empty(most, np.int64)
    for r in range(height):
        for c in range(width):
            n = 0
            i = 0
            for y in range(row_start[r], row_stop[r]):
                # Overlaps are whole numbers in units of 1 / (old * new), so ties are exact.
                tall = min((y + 1) * height, (r + 1) * old_height) - max(y * height, r * old_height)
                for x in range(col_start[c], col_stop[c]):
                    wide = min((x + 1) * width, (c + 1) * old_width) - max(x * width, c * old_width)
                    label = labels[y, x]
                    if n == 0 or seen[i] != label:
                        i = 0
                        while i < n and seen[i] != label:
                            i += 1
                        if i == n:
                            seen[n] = label
                            votes[n] = 0
                            n += 1
                    votes[i] += tall * wide
            best = 0
            for k in range(1, n):
                if votes[k] > votes[best] or (votes[k] == votes[best] and (r + c) % 2):
                    best = k
            out[r, c] = seen[best]
    return out
