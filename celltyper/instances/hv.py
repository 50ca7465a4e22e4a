"""Horizontal and vertical distances to the centre of every nucleus (HoVer-Net's maps).

Simon Graham et al., HoVer-Net, 2019, doi:10.1016/j.media.2019.101563. The targets are those of
the paper. The decoding is not: the paper's normalises by minimum and maximum of the whole tile,
so that every nucleus depends on the most extreme pixel in view. Here all constants are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from celltyper.instances.checks import check_bounds, checked_maps
from celltyper.instances.flood import flood
from celltyper.instances.smoothing import binomial
from celltyper.labels import mean_in_labels
from celltyper.types import Labels, Maps, MapSpec


@dataclass(frozen=True)
class HV:
    """Nuclei from a foreground map and their horizontal and vertical coordinates.

    Inside a nucleus the coordinates rise from -1 to 1, from left to right and from top to bottom;
    where two nuclei touch they fall. The slope is averaged over nearby foreground, and a ridge of
    falling slope parts the nuclei.

    Parameters
    ----------
    threshold : float
        Foreground is where the nucleus map is at least this.
    radius : int
        Slopes are averaged over ``2 * radius + 1`` pixels with binomial weights.
    scale : float
        Falling slope (1 / pixel) that counts as the highest energy, 1.
    depth : float
        Energy in [0, 1] by which a ridge must stand above the floors of both nuclei.
    min_core : int
        Pixels below the ridge that a nucleus needs to count as one of its own.
    min_area : int
        Smaller objects are removed (pixels).
    max_hole : int
        Holes up to this size inside one nucleus are filled (pixels).
    min_confidence : float
        Objects in which the mean of the nucleus map is less are removed: ink, burnt tissue and
        debris reach the threshold here and there, nuclei lie well above it. 0 removes none.
    """

    threshold: float = 0.5
    radius: int = 2
    scale: float = 0.5
    depth: float = 0.08
    min_core: int = 24
    min_area: int = 10
    max_hole: int = 100
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        check_bounds(
            "hv",
            threshold=(self.threshold, 0, 1),
            radius=(self.radius, 0, 32),
            scale=(self.scale, 1e-3, np.inf),
            depth=(self.depth, 1 / 255, 1),
            min_core=(self.min_core, 1, np.inf),
            min_area=(self.min_area, 1, np.inf),
            max_hole=(self.max_hole, 0, 10**6),
            min_confidence=(self.min_confidence, 0, 1),
        )

    @property
    def maps(self) -> Mapping[str, MapSpec]:
        """``nucleus`` (1 channel) and ``hv`` (2 channels: horizontal, then vertical)."""
        return {
            "nucleus": MapSpec(1, "sigmoid", "bce_dice"),
            "hv": MapSpec(2, "identity", "hv", vector=True),
        }

    @property
    def reach(self) -> int:
        """Slopes as far away as they are averaged, each of which takes one pixel more."""
        return self.radius + 1

    def foreground(self, maps: Maps) -> NDArray[np.bool_]:
        """Where nuclei are, as `celltyper.types.InstanceMethod` says."""
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
            ``nucleus`` float32 (1, H, W), 1 inside nuclei. ``hv`` float32 (2, H, W): channel 0 is
            the horizontal distance to the centre of mass, negative on the left, channel 1 the
            vertical one, negative above; each side is scaled by its own largest distance, so that
            values reach -1 and 1. 0 in the background.
        """
        hv = np.zeros((2, *labels.shape), np.float32)
        if labels.size:
            _coordinates(labels, int(labels.max()) + 1, hv)
        return {"nucleus": (labels > 0).astype(np.float32)[None], "hv": hv}

    def decode(self, maps: Maps) -> Labels:
        """Labels for maps, as `celltyper.types.InstanceMethod.decode`.

        ``decode(encode(labels))`` gives the labels back (renumbered) except for objects below
        ``min_area``, touching objects below ``min_core`` (merged), objects of several parts that
        do not share an edge (each part becomes one), holes up to ``max_hole`` (filled), and
        nuclei about 3 pixels thin that touch another along their length (may be merged). PQ of
        the round trip is .98 on CoNSeP and .99 on the H&E fields of the Data Science Bowl 2018.
        """
        given = checked_maps(maps, self.maps)
        mask, hv = self.foreground(given), given["hv"]
        energy = np.zeros(mask.shape, np.uint8)
        if mask.size:
            _fall(mask, hv, binomial(self.radius), 255 / self.scale, energy)
        labels = flood(
            mask,
            energy,
            hv,
            depth=round(255 * self.depth),
            min_core=self.min_core,
            min_area=self.min_area,
            max_hole=self.max_hole,
        )
        if self.min_confidence:
            sure = mean_in_labels(labels, given["nucleus"])[:, 0] >= self.min_confidence
            labels = np.concatenate([[0], np.cumsum(sure) * sure]).astype(np.int32)[labels]
        return labels


@njit(cache=True, nogil=True)
def _coordinates(labels, size, hv):  # type: ignore[no-untyped-def]
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
    extent = np.zeros((2, 2, size), np.float64)
    for r in range(height):
        for c in range(width):
            i = labels[r, c]
            if i > 0:
                for k in range(2):
                    d = (c if k == 0 else r) - centre[k, i]
                    side = 1 if d > 0 else 0
                    extent[k, side, i] = max(extent[k, side, i], abs(d))
    for r in range(height):
        for c in range(width):
            i = labels[r, c]
            if i > 0:
                for k in range(2):
                    d = (c if k == 0 else r) - centre[k, i]
                    most = extent[k, 1 if d > 0 else 0, i]
                    hv[k, r, c] = d / most if most > 0 else 0.0


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _fall(mask, hv, weights, scale, energy):  # type: ignore[no-untyped-def]
    """Steepest fall of h along columns or v along rows, averaged over nearby foreground."""
    height, width = mask.shape
    radius = len(weights) // 2
    taps = len(weights)
    # Rows smoothed along columns, of which only as many live as the average down rows needs.
    ring = np.zeros((taps, 3, width), np.float32)
    raw = np.zeros((3, width + 2 * radius), np.float32)
    total = np.zeros((3, width), np.float32)
    half = np.float32(0.5)
    for r in range(height + radius):
        if r < height:
            for c in range(width):
                slope_h = np.float32(0)
                slope_v = np.float32(0)
                inside = mask[r, c]
                if inside:
                    if c > 0 and mask[r, c - 1]:
                        slope_h += hv[0, r, c] - hv[0, r, c - 1]
                    if c < width - 1 and mask[r, c + 1]:
                        slope_h += hv[0, r, c + 1] - hv[0, r, c]
                    if r > 0 and mask[r - 1, c]:
                        slope_v += hv[1, r, c] - hv[1, r - 1, c]
                    if r < height - 1 and mask[r + 1, c]:
                        slope_v += hv[1, r + 1, c] - hv[1, r, c]
                raw[0, radius + c] = half * slope_h
                raw[1, radius + c] = half * slope_v
                raw[2, radius + c] = inside
        else:
            raw[:] = 0
        row = ring[r % taps]
        row[:] = 0
        for k in range(3):
            for t in range(taps):
                w = weights[t]
                for c in range(width):
                    row[k, c] += w * raw[k, c + t]
        out = r - radius
        if out < 0:
            continue
        total[:] = 0
        for t in range(taps):
            # At the upper edge the ring still holds zeros for the rows above the image.
            w = weights[t]
            line = ring[(out - radius + t) % taps]
            for k in range(3):
                for c in range(width):
                    total[k, c] += w * line[k, c]
        for c in range(width):
            if mask[out, c]:
                fall = -min(total[0, c], total[1, c]) / total[2, c] * scale
                if fall > 0:
                    energy[out, c] = np.uint8(min(fall, np.float32(255)))
