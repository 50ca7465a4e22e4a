"""Offset of every pixel to the centre of its own nucleus, and the outlines of nuclei.

The maps are those of HoVer-NeXt (Elias Baumann et al., 2024, PMLR 250:61-86): two centre-offset
maps and three classes, background, inside and boundary. The classes are kept as two nested
questions, nucleus or not and outline or not, each a sigmoid of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from celltyper.instances.checks import check_bounds, checked_maps
from celltyper.instances.flood import LEVELS, flood, _fill_holes as fill_holes
from celltyper.instances.smoothing import smooth
from celltyper.types import Labels, Maps, MapSpec

OCTAVE = 16
"""Energy levels per doubling of the votes."""
LEAST = 1 / 64
"""Smoothed votes at the highest energy."""


@dataclass(frozen=True)
class Centers:
    threshold: float = 0.5
    scale: float = 10.0
    radius: int = 8
    depth: float = 0.3
    outline: float = 0.9
    min_core: int = 24
    min_area: int = 10
    max_hole: int = 100

    @property
    def maps(self) -> Mapping[str, MapSpec]:
        return {
            "nucleus": MapSpec(1, "sigmoid", "bce_dice"),
            "centers": MapSpec(2, "identity", "smooth_l1"),
            "boundary": MapSpec(1, "sigmoid", "bce_dice"),
        }

    def encode(self, labels: Labels) -> dict[str, NDArray[np.float32]]:
        offsets = np.zeros((2, *labels.shape), np.float32)
        boundary = np.zeros((1, *labels.shape), np.float32)
        if labels.size:
            _offsets(labels, int(labels.max()) + 1, self.scale, offsets)
            _outlines(labels, boundary[0])
        return {
            "nucleus": (labels > 0).astype(np.float32)[None],
            "centers": offsets,
            "boundary": boundary,
        }

    def decode(self, maps: Maps) -> Labels:
        given = checked_maps(maps, self.maps)
        mask = given["nucleus"][0] >= self.threshold
        votes = np.zeros(mask.shape, np.float32)
        landing = np.full(mask.shape, -1, np.int32)
        if not mask.size:
            return np.zeros(mask.shape, np.int32)
        _vote(mask, given["centers"], given["boundary"][0], self.scale, self.outline, votes, landing)
        votes = smooth(votes, self.radius)
        energy = np.zeros(mask.shape, np.uint8)
        _rarity(votes, energy)
        seeds = flood(
            votes > LEAST,
            energy,
            np.empty((0, *mask.shape), np.float32),
            depth=max(round(-OCTAVE * np.log2(max(1 - self.depth, 1e-9))), 1),
            min_core=1,
            min_area=1,
            max_hole=0,
        )
        labels = _assign(mask, seeds, landing, given["centers"], self.scale, self.min_core, self.min_area)
        fill_holes(labels, self.max_hole)
        return labels


@njit(cache=True, nogil=True)
def _offsets(labels, size, scale, offsets):
    height, width = labels.shape
    centre = np.zeros((2, size), np.float64)
    count = np.zeros(size, np.int64)
    for r in range(height):
        for c in range(width):
            i = labels[r, c]
            if i > 0:
                centre[0, i] += c
                centre[1, i] += r
                count[i] += 1
    for i in range(1, size):
        if count[i]:
            centre[:, i] /= count[i]
    for r in range(height):
        for c in range(width):
            i = labels[r, c]
            if i > 0:
                offsets[0, r, c] = (centre[0, i] - c) / scale
                offsets[1, r, c] = (centre[1, i] - r) / scale


@njit(cache=True, nogil=True)
def _outlines(labels, boundary):
    height, width = labels.shape
    for r in range(height):
        for c in range(width):
            i = labels[r, c]
            if i > 0 and (
                (c > 0 and labels[r, c - 1] != i)
                or (c < width - 1 and labels[r, c + 1] != i)
                or (r > 0 and labels[r - 1, c] != i)
                or (r < height - 1 and labels[r + 1, c] != i)
            ):
                boundary[r, c] = 1


@njit(cache=True, nogil=True)
def _vote(mask, offsets, boundary, scale, outline, votes, landing):
    height, width = mask.shape
    for r in range(height):
        for c in range(width):
            if not mask[r, c]:
                continue
            x = c + scale * offsets[0, r, c]
            y = r + scale * offsets[1, r, c]
            if not (abs(x - c) < 1e4 and abs(y - r) < 1e4):
                continue
            x = min(max(int(np.floor(x + 0.5)), 0), width - 1)
            y = min(max(int(np.floor(y + 0.5)), 0), height - 1)
            landing[r, c] = y * width + x
            b = boundary[r, c]
            weight = 1 - outline * min(b, 1) if b > 0 else 1.0
            votes[y, x] += weight


@njit(cache=True, nogil=True)
def _rarity(votes, energy):
    for r in range(votes.shape[0]):
        for c in range(votes.shape[1]):
            v = votes[r, c]
            if v > LEAST:
                octaves = np.log2(v * np.float32(1 / LEAST))
                energy[r, c] = np.uint8(max(np.float32(LEVELS - 1) - OCTAVE * octaves, 0))


@njit(cache=True, nogil=True)
def _assign(mask, seeds, landing, offsets, scale, min_core, min_area):
    height, width = mask.shape
    size = height * width
    inside = mask.reshape(-1)
    seed = seeds.reshape(-1)
    lands = landing.reshape(-1)
    labels = np.zeros((height, width), np.int32)
    label = labels.reshape(-1)
    off = offsets.reshape(2, -1)
    n = 0
    for p in range(size):
        n = max(n, seed[p])
        if inside[p] and lands[p] >= 0:
            label[p] = seed[lands[p]]
    # largest part of every label
    best = np.zeros(n + 1, np.int32)
    first = np.full(n + 1, -1, np.int32)
    done = np.zeros(size, np.uint8)
    queue = np.empty(size, np.int32)
    near = np.empty(4, np.int64)
    for start in range(size):
        i = label[start]
        if not i or done[start]:
            continue
        queue[0] = start
        done[start] = 1
        head, tail = 0, 1
        while head < tail:
            p = queue[head]
            head += 1
            c = p % width
            near[0] = p - width
            near[1] = p - 1 if c > 0 else -1
            near[2] = p + 1 if c < width - 1 else -1
            near[3] = p + width if p < size - width else -1
            for k in range(4):
                q = near[k]
                if q >= 0 and label[q] == i and not done[q]:
                    done[q] = 1
                    queue[tail] = q
                    tail += 1
        if tail > best[i]:
            old = first[i]
            best[i] = tail
            first[i] = start
    done[:] = 0
    tail = 0
    for i in range(1, n + 1):
        if best[i] < min_core:
            continue
        head = tail
        queue[tail] = first[i]
        done[first[i]] = 1
        tail += 1
        while head < tail:
            p = queue[head]
            head += 1
            c = p % width
            near[0] = p - width
            near[1] = p - 1 if c > 0 else -1
            near[2] = p + 1 if c < width - 1 else -1
            near[3] = p + width if p < size - width else -1
            for k in range(4):
                q = near[k]
                if q >= 0 and label[q] == i and not done[q]:
                    done[q] = 1
                    queue[tail] = q
                    tail += 1
    for p in range(size):
        if not done[p]:
            label[p] = 0
    head = 0
    start = 0
    while True:
        while head < tail:
            p = queue[head]
            head += 1
            c = p % width
            near[0] = p - width
            near[1] = p - 1 if c > 0 else -1
            near[2] = p + 1 if c < width - 1 else -1
            near[3] = p + width if p < size - width else -1
            for k in range(4):
                q = near[k]
                if q >= 0 and inside[q] and not label[q]:
                    label[q] = label[p]
                    queue[tail] = q
                    tail += 1
        while start < size and (not inside[start] or label[start]):
            start += 1
        if start == size:
            break
        n += 1
        label[start] = n
        queue[tail] = start
        tail += 1
    area = np.zeros(n + 1, np.int32)
    for p in range(size):
        area[label[p]] += 1
    ids = np.zeros(n + 1, np.int32)
    last = 0
    for p in range(size):
        i = label[p]
        if i:
            if area[i] < min_area:
                label[p] = 0
                continue
            if ids[i] == 0:
                last += 1
                ids[i] = last
            label[p] = ids[i]
    return labels
