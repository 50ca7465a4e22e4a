"""Resampling in which a pixel does not depend on the region that it is asked in.

The kernel is Lanczos with three lobes, as wide as the larger of the two pixels (no aliasing), its
weights in fixed point with 22 bits, first along rows and then along columns with 8 bits between:
the numbers of Pillow's ``resize``, by which training images are brought to a resolution. There the
weights depend on the crop; here they are those of the pixel's place on the whole slide.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

_LOBES = 3
_BITS = 22
_ROWS = 32


@njit(cache=True, nogil=True)
def _weights(start, count, factor, size):  # type: ignore[no-untyped-def]
    support = _LOBES * max(factor, 1.0)
    squeeze = 1.0 / max(factor, 1.0)
    first = np.empty(count, np.int64)
    taps = np.empty(count, np.int64)
    most = math.ceil(support) * 2 + 1
    fixed = np.zeros((count, most), np.int32)
    values = np.empty(most)
    for i in range(count):
        center = (start + i + 0.5) * factor
        low = max(0, int(center - support + 0.5))
        high = min(size, int(center + support + 0.5))
        total = 0.0
        for k in range(high - low):
            x = (low + k - center + 0.5) * squeeze
            value = 0.0
            if x == 0.0:
                value = 1.0
            elif -_LOBES <= x < _LOBES:
                value = math.sin(math.pi * x) / (math.pi * x)
                x /= _LOBES
                value *= math.sin(math.pi * x) / (math.pi * x)
            values[k] = value
            total += value
        for k in range(high - low):
            value = values[k] / total * (1 << _BITS)
            fixed[i, k] = int(value - 0.5) if value < 0 else int(value + 0.5)
        first[i] = low
        taps[i] = high - low
    return first, taps, fixed


@njit(cache=True, nogil=True)
def _clipped(value):  # type: ignore[no-untyped-def]
    return np.uint8(min(max(value >> _BITS, 0), 255))


@njit(cache=True, nogil=True)
def _along_rows(pixels, first, taps, fixed):  # type: ignore[no-untyped-def]
    height, width = pixels.shape[:2]
    out = np.empty((height, len(first), 3), np.uint8)
    # The same column of several rows side by side, so that one instruction sums many of them.
    block = np.zeros((width, 3 * _ROWS), np.uint8)
    sums = np.empty(3 * _ROWS, np.int32)
    for top in range(0, height, _ROWS):
        rows = min(_ROWS, height - top)
        for r in range(rows):
            line = pixels[top + r]
            for c in range(width):
                for s in range(3):
                    block[c, s * _ROWS + r] = line[c, s]
        for i in range(len(first)):
            sums[:] = 1 << (_BITS - 1)
            for k in range(taps[i]):
                w = fixed[i, k]
                column = block[first[i] + k]
                for j in range(3 * _ROWS):
                    sums[j] += w * np.int32(column[j])
            for r in range(rows):
                for s in range(3):
                    out[top + r, i, s] = _clipped(sums[s * _ROWS + r])
    return out


@njit(cache=True, nogil=True)
def _along_columns(pixels, first, taps, fixed):  # type: ignore[no-untyped-def]
    width, count = pixels.shape[1], len(first)
    out = np.empty((count, width), np.uint8)
    sums = np.empty(width, np.int32)
    for i in range(count):
        sums[:] = 1 << (_BITS - 1)
        for k in range(taps[i]):
            w = fixed[i, k]
            line = pixels[first[i] + k]
            for c in range(width):
                sums[c] += w * np.int32(line[c])
        for c in range(width):
            out[i, c] = _clipped(sums[c])
    return out


class Axis:
    """Weights of the pixels ``[start, start + count)`` of one axis.

    Parameters
    ----------
    start, count : int
        Pixels wanted, counted from the border of the slide.
    factor : float
        Pixels of the level per pixel wanted.
    size : int
        Pixels of the level; beyond its border the kernel is cut.
    """

    def __init__(self, start: int, count: int, factor: float, size: int) -> None:
        self.first, self.taps, self.fixed = _weights(start, count, factor, size)
        self.low = int(self.first[0])
        self.high = int((self.first + self.taps).max())


def lanczos(pixels: NDArray[np.uint8], rows: Axis, cols: Axis) -> NDArray[np.uint8]:
    """Resample.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (rows.high - rows.low, cols.high - cols.low, 3)
        The pixels of the level that are needed.
    rows, cols : Axis
        Weights.

    Returns
    -------
    ndarray of uint8, shape (rows.count, cols.count, 3)
    """
    across = _along_rows(pixels, cols.first - cols.low, cols.taps, cols.fixed)
    flat = across.reshape(len(across), -1)
    out: NDArray[np.uint8] = _along_columns(flat, rows.first - rows.low, rows.taps, rows.fixed)
    return out.reshape(len(out), -1, 3)
