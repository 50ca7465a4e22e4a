"""Offsets of every pixel to the centre of its own nucleus, and the outlines of nuclei.

The maps are those of HoVer-NeXt (Elias Baumann et al., MIDL 2024, PMLR 250): two offset maps and
three classes, background, inside and boundary. The three classes are told as two nested maps, each
a sigmoid of its own: nucleus (inside or boundary) and boundary. So foreground means the same as in
the other methods, an outline in doubt takes nothing from it, and soft Dice weighs the few pixels
of outlines up. The decoding is not the paper's: every pixel votes for the centre it points at, and
goes to the nucleus whose centre it hits. All constants are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2

import numpy as np
from numba import njit
from numpy.typing import NDArray

from celltyper.instances.checks import check_bounds, checked_maps
from celltyper.instances.flood import LEVELS, fill_holes, flood
from celltyper.instances.smoothing import smooth
from celltyper.labels import centroids, label_ids
from celltyper.types import Labels, Maps, MapSpec

REACH = 8.0
"""Longer offsets (in units of ``scale``) are no nucleus's: their pixels do not vote."""
OUTLINE = 0.1
"""Vote of a pixel on an outline, where blurred offsets point between two centres."""
OCTAVE = 16
"""Levels of energy per doubling of the votes."""
FEWEST = 1 / 64
"""Smoothed votes per pixel at the highest energy; less belongs to no centre."""


@dataclass(frozen=True)
class Centers:
    """Nuclei from a foreground map, the offsets to their centres and their outlines.

    Each pixel of the foreground votes where its offset points. Votes are smoothed and parted into
    basins around centres. A pixel goes to the basin that its vote fell in; where that leaves
    several parts of a nucleus, the largest stays and the others join what is nearest.

    Parameters
    ----------
    threshold : float
        Foreground is where the nucleus map is at least this.
    scale : float
        Pixels that an offset of 1 stands for: about the radius of a nucleus. Part of what the
        network learns, so the same in training and decoding.
    radius : int
        Votes are smoothed over ``2 * radius + 1`` pixels with binomial weights.
    depth : float
        Share by which votes between two centres must fall below those at the lesser centre; else
        they are one.
    min_core : int
        Connected pixels that must vote for a centre to part it from a nucleus that it touches.
    min_area : int
        Smaller objects are removed (pixels).
    max_hole : int
        Holes up to this size inside one nucleus are filled (pixels).
    """

    threshold: float = 0.5
    scale: float = 10.0
    radius: int = 6
    depth: float = 0.3
    min_core: int = 24
    min_area: int = 10
    max_hole: int = 100

    def __post_init__(self) -> None:
        check_bounds(
            "centers",
            threshold=(self.threshold, 0, 1),
            scale=(self.scale, 0.1, 1000),
            radius=(self.radius, 0, 32),
            depth=(self.depth, 0.03, 0.99),
            min_core=(self.min_core, 1, np.inf),
            min_area=(self.min_area, 1, np.inf),
            max_hole=(self.max_hole, 0, 10**6),
        )

    @property
    def maps(self) -> Mapping[str, MapSpec]:
        """``nucleus`` and ``boundary`` (1 channel), ``centers`` (2: horizontal, vertical)."""
        return {
            "nucleus": MapSpec(1, "sigmoid", "bce_dice"),
            "centers": MapSpec(2, "identity", "smooth_l1_inside", vector=True),
            "boundary": MapSpec(1, "sigmoid", "bce_dice"),
        }

    def foreground(self, maps: Maps) -> NDArray[np.bool_]:
        """Where nuclei are, as `celltyper.types.InstanceMethod` says.

        There is no ``reach``: votes of neighbours run together into basins without end, though
        what lies further off than the longest offset and the radius changes few pixels.
        """
        wanted = {"nucleus": self.maps["nucleus"]}
        mask: NDArray[np.bool_] = checked_maps(maps, wanted)["nucleus"][0] >= self.threshold
        return mask

    def encode(self, labels: Labels) -> dict[str, NDArray[np.float32]]:
        """Targets for labels.

        Parameters
        ----------
        labels : ndarray of int32, shape (H, W)
            Instance labels, 0 is background.

        Returns
        -------
        dict
            ``nucleus`` float32 (1, H, W), 1 inside nuclei. ``centers`` float32 (2, H, W): channel
            0 is how far the centre of mass lies to the right, channel 1 how far below, in units
            of ``scale`` pixels; 0 in the background. ``boundary`` float32 (1, H, W), 1 on pixels
            of nuclei that share an edge with another label or with background. The border of the
            image is no boundary.
        """
        offsets = np.zeros((2, *labels.shape), np.float32)
        boundary = np.zeros((1, *labels.shape), np.float32)
        ids = label_ids(labels)
        if len(ids):
            table = np.zeros((ids[-1] + 1, 2))
            table[ids] = centroids(labels)
            _targets(labels, table, self.scale, offsets, boundary[0])
        return {
            "nucleus": (labels > 0).astype(np.float32)[None],
            "centers": offsets,
            "boundary": boundary,
        }

    def decode(self, maps: Maps) -> Labels:
        """Labels for maps, as `celltyper.types.InstanceMethod.decode`; each is 4-connected.

        The limits of ``decode(encode(labels))`` are those of `celltyper.instances.HV.decode`,
        except that thin nuclei are kept apart, while touching nuclei with centres of mass less
        than 6 pixels apart (thin ones, or one around the other) may be merged. PQ of the round
        trip is above .998 on CoNSeP and on the H&E fields of the Data Science Bowl 2018.
        """
        given = checked_maps(maps, self.maps)
        mask = self.foreground(given)
        votes = np.zeros(mask.shape, np.float32)
        target = np.full(mask.shape, -1, np.int32)
        _vote(mask, given["centers"], given["boundary"][0], self.scale, votes, target)
        votes = smooth(votes, self.radius)
        energy = np.zeros(mask.shape, np.uint8)
        _rarity(votes, energy)
        basins = flood(
            votes > FEWEST,
            energy,
            np.empty((0, *mask.shape), np.float32),
            depth=round(-OCTAVE * log2(1 - self.depth)),
            min_core=1,
            min_area=1,
            max_hole=0,
        )
        labels: Labels = _gather(mask, target, basins, self.min_core, self.min_area)
        fill_holes(labels, self.max_hole)
        return labels


@njit(cache=True, nogil=True)
def _targets(labels, centres, scale, offsets, boundary):  # type: ignore[no-untyped-def]
    height, width = labels.shape
    for r in range(height):
        for c in range(width):
            i = labels[r, c]
            if i == 0:
                continue
            offsets[0, r, c] = (centres[i, 1] - c) / scale
            offsets[1, r, c] = (centres[i, 0] - r) / scale
            if (
                (c > 0 and labels[r, c - 1] != i)
                or (c < width - 1 and labels[r, c + 1] != i)
                or (r > 0 and labels[r - 1, c] != i)
                or (r < height - 1 and labels[r + 1, c] != i)
            ):
                boundary[r, c] = 1


@njit(cache=True, nogil=True)
def _vote(mask, offsets, boundary, scale, votes, target):  # type: ignore[no-untyped-def]
    """Weighted votes per pixel, and the pixel that each pixel votes for (-1: none)."""
    height, width = mask.shape
    for r in range(height):
        for c in range(width):
            x, y = offsets[0, r, c], offsets[1, r, c]
            # NaN fails the comparison too.
            if not (mask[r, c] and abs(x) <= REACH and abs(y) <= REACH):
                continue
            column = min(max(int(np.floor(c + scale * x + 0.5)), 0), width - 1)
            row = min(max(int(np.floor(r + scale * y + 0.5)), 0), height - 1)
            target[r, c] = row * width + column
            edge = boundary[r, c]
            weight = 1 - (1 - OUTLINE) * min(edge, np.float32(1)) if edge > 0 else 1.0
            votes[row, column] += np.float32(weight)


@njit(cache=True, nogil=True)
def _rarity(votes, energy):  # type: ignore[no-untyped-def]
    """Energy that falls with the logarithm of the votes: ridges count relative to peaks."""
    for r in range(votes.shape[0]):
        for c in range(votes.shape[1]):
            if votes[r, c] > FEWEST:
                octaves = np.log2(votes[r, c] * np.float32(1 / FEWEST))
                energy[r, c] = np.uint8(max(LEVELS - 1 - OCTAVE * octaves, 0))


@njit(cache=True, nogil=True)
def _neighbours(p, width, size, near):  # type: ignore[no-untyped-def]
    c = p % width
    near[0] = p - width
    near[1] = p - 1 if c > 0 else -1
    near[2] = p + 1 if c < width - 1 else -1
    near[3] = p + width if p < size - width else -1


@njit(cache=True, nogil=True)
def _part(label, width, start, done, queue, tail, near):  # type: ignore[no-untyped-def]
    """Append the connected pixels of the label at ``start``; returns the new end of the queue."""
    done[start] = 1
    queue[tail] = start
    head = tail
    tail += 1
    while head < tail:
        _neighbours(queue[head], width, len(label), near)
        head += 1
        for k in range(4):
            q = near[k]
            if q >= 0 and not done[q] and label[q] == label[start]:
                done[q] = 1
                queue[tail] = q
                tail += 1
    return tail


@njit(cache=True, nogil=True)
def _grow(label, inside, width, queue, head, tail, near):  # type: ignore[no-untyped-def]
    """Give free foreground to the nearest queued label; returns the new end of the queue."""
    while head < tail:
        p = queue[head]
        head += 1
        _neighbours(p, width, len(label), near)
        for k in range(4):
            q = near[k]
            if q >= 0 and inside[q] and not label[q]:
                label[q] = label[p]
                queue[tail] = q
                tail += 1
    return tail


@njit(cache=True, nogil=True)
def _gather(mask, target, basins, min_core, min_area):  # type: ignore[no-untyped-def]
    height, width = mask.shape
    size = height * width
    inside, targets, basin = mask.reshape(-1), target.reshape(-1), basins.reshape(-1)
    labels = np.zeros((height, width), np.int32)
    label = labels.reshape(-1)
    n, count = 0, 0
    for p in range(size):
        n = max(n, basin[p])
        count += inside[p]
        if targets[p] >= 0:
            label[p] = basin[targets[p]]

    queue = np.empty(count, np.int32)
    near = np.empty(4, np.int64)
    done = np.zeros(size, np.uint8)
    most = np.zeros(n + 1, np.int32)
    first = np.zeros(n + 1, np.int32)
    for p in range(size):
        if label[p] and not done[p]:
            area = _part(label, width, p, done, queue, 0, near)
            if area > most[label[p]]:
                most[label[p]], first[label[p]] = area, p

    done[:] = 0
    tail = 0
    for i in range(1, n + 1):
        if most[i] >= min_core:
            tail = _part(label, width, first[i], done, queue, tail, near)
    for p in range(size):
        if not done[p]:
            label[p] = 0
    tail = _grow(label, inside, width, queue, 0, tail, near)
    # What touches no centre's pixels is one object for every component.
    for p in range(size):
        if inside[p] and not label[p]:
            n += 1
            label[p] = n
            queue[tail] = p
            tail = _grow(label, inside, width, queue, tail, tail + 1, near)

    areas = np.zeros(n + 1, np.int32)
    for p in range(size):
        areas[label[p]] += 1
    ids = np.zeros(n + 1, np.int32)
    last = 0
    for p in range(size):
        i = label[p]
        if i and areas[i] < min_area:
            label[p] = 0
        elif i:
            if ids[i] == 0:
                last += 1
                ids[i] = last
            label[p] = ids[i]
    return labels
