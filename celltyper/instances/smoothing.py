"""Binomial smoothing of pixel maps, row by row so that only a few rows are in cache."""

from __future__ import annotations

from math import comb

import numpy as np
from numba import njit
from numpy.typing import NDArray


def binomial(radius: int) -> NDArray[np.float32]:
    """Binomial weights, the discrete Gaussian with variance ``radius / 2``.

    Parameters
    ----------
    radius : int
        Pixels on either side, at least 0.

    Returns
    -------
    ndarray of float32, shape (2 * radius + 1,)
        Weights that sum to 1.

    Examples
    --------
    >>> binomial(1).tolist()
    [0.25, 0.5, 0.25]
    """
    n = 2 * radius
    return np.array([comb(n, k) / 2**n for k in range(n + 1)], np.float32)


def smooth(values: NDArray[np.float32], radius: int) -> NDArray[np.float32]:
    """Smooth a map with binomial weights; beyond the image its edge pixels go on.

    Parameters
    ----------
    values : ndarray of float32, shape (H, W)
        Any map.
    radius : int
        Pixels on either side.

    Returns
    -------
    ndarray of float32, shape (H, W)
        The smoothed map.
    """
    if radius == 0 or not values.size:
        return values
    out: NDArray[np.float32] = _smooth(values, binomial(radius))
    return out


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _smooth(values, weights):  # type: ignore[no-untyped-def]
    height, width = values.shape
    taps = len(weights)
    radius = taps // 2
    out = np.zeros((height, width), np.float32)
    ring = np.zeros((taps, width), np.float32)
    raw = np.zeros(width + 2 * radius, np.float32)
    for step in range(-radius, height + radius):
        r = min(max(step, 0), height - 1)
        raw[:radius] = values[r, 0]
        raw[radius + width :] = values[r, width - 1]
        raw[radius : radius + width] = values[r]
        row = ring[step % taps]
        row[:] = 0
        for t in range(taps):
            w = weights[t]
            for c in range(width):
                row[c] += w * raw[c + t]
        target = step - radius
        if target >= 0:
            total = out[target]
            for t in range(taps):
                w = weights[t]
                line = ring[(target - radius + t) % taps]
                for c in range(width):
                    total[c] += w * line[c]
    return out
