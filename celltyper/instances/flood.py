"""Flood of an energy inside a mask: touching nuclei are parted along ridges, noise is not.

Every 4-connected component of the mask is flooded for itself, from low to high energy, so that
the work is linear in the pixels, stays in cache at any image size, and the result in a component
does not depend on anything outside of it. Where two basins meet, the shallower one is merged
unless it is deep and large enough to be a nucleus: h-minima (doi:10.1109/83.217222) and
watershed in one pass, without a marker image.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from celltyper.types import Labels

LEVELS = 256
"""Energies are integers from 0 to ``LEVELS - 1``; one level is 1 / ``LEVELS`` of the scale."""


def flood(
    mask: NDArray[np.bool_],
    energy: NDArray[np.uint8],
    guide: NDArray[np.float32],
    *,
    depth: int,
    min_core: int,
    min_area: int,
    max_hole: int,
) -> Labels:
    """Label the basins of an energy inside a mask.

    Parameters
    ----------
    mask : ndarray of bool, shape (H, W)
        Foreground.
    energy : ndarray of uint8, shape (H, W)
        Low in the middle of nuclei, high where two of them touch.
    guide : ndarray of float32, shape (C, H, W)
        A pixel that several basins reach goes to the neighbour whose guide is most alike (sum of
        absolute differences, plus the energy of the neighbour on a scale to 1). C may be 0.
    depth : int
        Levels by which the ridge between two basins must stand above the floor of the shallower
        one; else they are one nucleus.
    min_core : int
        Pixels that a basin must have when it meets another; else they are one nucleus.
    min_area : int
        Smaller objects are removed (pixels).
    max_hole : int
        Holes of at most so many pixels inside one nucleus are filled. Larger gaps, gaps between
        several nuclei and gaps at the border of the image stay.

    Returns
    -------
    ndarray of int32, shape (H, W)
        Labels 1..n in the raster order of their first pixels; each is 4-connected.
    """
    labels: Labels = _flood(mask, energy, guide, depth, min_core, min_area)
    fill_holes(labels, max_hole)
    return labels


@njit(cache=True, nogil=True)
def _find(parent, i):  # type: ignore[no-untyped-def]
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
def _collect(mask, seen, start, queue):  # type: ignore[no-untyped-def]
    """Pixels of the component of ``start`` in ``queue`` (grown as needed), and their number."""
    height, width = mask.shape
    flat, done = mask.reshape(-1), seen.reshape(-1)
    queue[0] = start
    done[start] = 1
    head, tail = 0, 1
    while head < tail:
        if tail + 4 > len(queue):
            longer = np.empty(2 * len(queue), np.int32)
            longer[:tail] = queue[:tail]
            queue = longer
        p = queue[head]
        head += 1
        c = p % width
        if c > 0 and flat[p - 1] and not done[p - 1]:
            done[p - 1] = 1
            queue[tail] = p - 1
            tail += 1
        if c < width - 1 and flat[p + 1] and not done[p + 1]:
            done[p + 1] = 1
            queue[tail] = p + 1
            tail += 1
        if p >= width and flat[p - width] and not done[p - width]:
            done[p - width] = 1
            queue[tail] = p - width
            tail += 1
        if p < (height - 1) * width and flat[p + width] and not done[p + width]:
            done[p + width] = 1
            queue[tail] = p + width
            tail += 1
    return queue, tail


@njit(cache=True, nogil=True)
def _flood(mask, energy, guide, depth, min_core, min_area):  # type: ignore[no-untyped-def]
    height, width = mask.shape
    channels = guide.shape[0]
    guides = guide.reshape(channels, height * width)
    levels = energy.reshape(-1)
    foreground = mask.reshape(-1)
    seen = np.zeros((height, width), np.uint8)
    done = seen.reshape(-1)
    basins = np.zeros((height, width), np.int32)
    basin = basins.reshape(-1)

    queue = np.empty(4096, np.int32)
    order = np.empty(4096, np.int32)
    # Basins of all components; 0 is background.
    parent = np.zeros(4096, np.int32)
    floor = np.zeros(4096, np.int32)
    area = np.zeros(4096, np.int32)
    n = 1
    first = np.empty(LEVELS + 1, np.int64)
    near = np.empty(4, np.int64)

    for start in range(height * width):
        if not foreground[start] or done[start]:
            continue
        queue, count = _collect(mask, seen, start, queue)
        if count < min_area:
            continue
        if len(order) < count:
            order = np.empty(len(queue), np.int32)

        first[:] = 0
        for i in range(count):
            first[levels[queue[i]] + 1] += 1
        for i in range(LEVELS):
            first[i + 1] += first[i]
        for i in range(count):
            level = levels[queue[i]]
            order[first[level]] = queue[i]
            first[level] += 1

        for i in range(count):
            p = order[i]
            level = np.int32(levels[p])
            c = p % width
            near[0] = p - 1 if c > 0 else -1
            near[1] = p + 1 if c < width - 1 else -1
            near[2] = p - width
            near[3] = p + width if p < (height - 1) * width else -1
            best = -1
            best_cost = np.float32(np.inf)
            several = False
            for k in range(4):
                q = near[k]
                if q < 0 or basin[q] == 0:
                    continue
                root = _find(parent, basin[q])
                if best >= 0 and root != best:
                    several = True
                cost = np.float32(levels[q]) / LEVELS
                for m in range(channels):
                    cost += abs(guides[m, p] - guides[m, q])
                if best < 0 or cost < best_cost:
                    best, best_cost = root, cost
            if best < 0:
                if n == len(parent):
                    parent = np.concatenate((parent, np.zeros(n, np.int32)))
                    floor = np.concatenate((floor, np.zeros(n, np.int32)))
                    area = np.concatenate((area, np.zeros(n, np.int32)))
                parent[n] = n
                floor[n] = level
                area[n] = 1
                basin[p] = n
                n += 1
                continue
            if several:
                for k in range(4):
                    q = near[k]
                    if q < 0 or basin[q] == 0:
                        continue
                    other = _find(parent, basin[q])
                    if other == best:
                        continue
                    shallow = max(floor[best], floor[other])
                    if level - shallow < depth or min(area[best], area[other]) < min_core:
                        parent[other] = best
                        floor[best] = min(floor[best], floor[other])
                        area[best] += area[other]
            basin[p] = best
            area[best] += 1

    ids = np.zeros(n, np.int32)
    last = 0
    for p in range(height * width):
        if basin[p]:
            root = _find(parent, basin[p])
            if area[root] < min_area:
                basin[p] = 0
                continue
            if ids[root] == 0:
                last += 1
                ids[root] = last
            basin[p] = ids[root]
    return basins


@njit(cache=True, nogil=True)
def fill_holes(labels, max_hole):  # type: ignore[no-untyped-def]
    """Fill holes inside one label, in place.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Labels, 4-connected each.
    max_hole : int
        Holes of at most so many pixels are filled, see `flood`.
    """
    height, width = labels.shape
    flat = labels.reshape(-1)
    stack = np.empty(max_hole + 1, np.int64)
    for r in range(1, height - 1):
        for c in range(1, width - 1):
            p = r * width + c
            owner = flat[p - 1]
            # The first pixel of a hole has its owner above and on the left.
            if flat[p] or not owner or flat[p - width] != owner:
                continue
            flat[p] = owner
            stack[0] = p
            size, head, hole = 1, 0, max_hole > 0
            while hole and head < size:
                q = stack[head]
                head += 1
                column = q % width
                if column in (0, width - 1) or q < width or q >= (height - 1) * width:
                    hole = False
                    break
                for step in (-1, 1, -width, width):
                    other = flat[q + step]
                    if other == owner:
                        continue
                    if other or size > max_hole - 1:
                        hole = False
                        break
                    flat[q + step] = owner
                    stack[size] = q + step
                    size += 1
            if not hole:
                for i in range(size):
                    flat[stack[i]] = 0
