"""Where on a slide is tissue: found by its color, or drawn by the user."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from celltyper.slides.slide import Slide, require_mpp
from celltyper.tiling import Region

SATURATION = (0.03, 0.07)
"""Otsu's threshold is kept in this range: below it is the noise of glass, above it all tissue is;
a slide without glass, or without tissue, has no two classes to be told apart."""
DARKEST = 0.12
"""Value below which hue and saturation mean nothing: marker pen, the border of a scan."""
SMALLEST_PIECE = 10_000.0
"""Square micrometres; smaller pieces are debris."""
LARGEST_HOLE = 50_000.0
"""Square micrometres; smaller holes (vessels, glands, fat) belong to the tissue."""
MARGIN = 16.0
"""Micrometres that are added all around, so that no cell at the rim is cut off."""

_EDGE = 1e-6


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Part of a slide.

    Parameters
    ----------
    grid : ndarray of bool, shape (H, W)
        Which pixels belong to it; the array shows the slide from its corner.
    scale : (float, float)
        Width and height of a pixel of `grid` in pixels of the full resolution.
    source : str
        Where it is from, for reports, such as ``"otsu"``.
    outline : shapely.Geometry, optional
        Exact shape in pixels of the full resolution, where it was drawn: it decides, and `grid`
        is a picture of it.
    threshold : float, optional
        Saturation above which a pixel is tissue, where it was found by color.
    """

    grid: NDArray[np.bool_]
    scale: tuple[float, float]
    source: str
    outline: Any = None
    threshold: float | None = None

    def covers(self, region: Region) -> bool:
        """Whether a region, in pixels of the full resolution, holds some of it."""
        if self.outline is not None:
            row, col, height, width = region
            shapely.prepare(self.outline)
            # A little less than the rectangle: sides that only meet share nothing.
            inner = shapely.box(col + _EDGE, row + _EDGE, col + width - _EDGE, row + height - _EDGE)
            return bool(shapely.intersects(self.outline, inner))
        return bool(self.grid[self._cells(region)].any())

    def contains(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Which points lie in it.

        Parameters
        ----------
        x, y : ndarray of float64
            Pixels of the full resolution; any shapes that numpy broadcasts.

        Returns
        -------
        ndarray of bool, of the shape of x and y together
            By the outline where there is one, else by the pixel of the grid.
        """
        inside: NDArray[np.bool_]
        if self.outline is not None:
            shapely.prepare(self.outline)
            inside = shapely.intersects_xy(self.outline, x, y)
            return inside
        height, width = self.grid.shape
        cols = np.floor(x / self.scale[0]).astype(np.int64)
        rows = np.floor(y / self.scale[1]).astype(np.int64)
        inside = ((cols >= 0) & (cols < width)) & ((rows >= 0) & (rows < height))
        inside &= self.grid[rows.clip(0, height - 1), cols.clip(0, width - 1)]
        return inside

    @property
    def pixels(self) -> float:
        """Its area in pixels of the full resolution."""
        if self.outline is not None:
            return float(self.outline.area)
        return float(np.count_nonzero(self.grid)) * self.scale[0] * self.scale[1]

    def _cells(self, region: Region) -> tuple[slice, slice]:
        (width, height), (rows, cols) = self.scale, self.grid.shape
        return (
            slice(
                max(0, math.floor(region.row / height)),
                max(0, min(rows, math.ceil((region.row + region.height) / height))),
            ),
            slice(
                max(0, math.floor(region.col / width)),
                max(0, min(cols, math.ceil((region.col + region.width) / width))),
            ),
        )


def tissue_mask(slide: Slide, *, mpp: float = 8.0) -> TissueMask:
    """Find the tissue by its color.

    Saturation (HSV, after a mean over 3 x 3 pixels) above Otsu's threshold (1979,
    doi:10.1109/TSMC.1979.4310076), which is kept in `SATURATION`; no pixels darker than `DARKEST`;
    pieces below `SMALLEST_PIECE` removed, holes below `LARGEST_HOLE` filled, `MARGIN` added.

    Parameters
    ----------
    slide : Slide
    mpp : float
        Micrometres per pixel at which the slide is looked at.

    Returns
    -------
    TissueMask

    Raises
    ------
    DataError
        If the slide states no resolution.
    """
    # slow to load, which images that are no slides need not wait for
    from scipy import ndimage
    from skimage.filters import threshold_otsu
    from skimage.morphology import remove_small_holes, remove_small_objects

    x, y = require_mpp(slide)
    grid = slide.grid(max(mpp, x, y))
    pixels = slide.read(Region(0, 0, grid.height, grid.width), max(mpp, x, y))
    value = pixels.max(axis=2).astype(np.float32)
    saturation = 1 - pixels.min(axis=2) / np.maximum(value, 1)
    saturation = ndimage.uniform_filter(saturation, 3, mode="nearest")
    found = threshold_otsu(saturation) if np.ptp(saturation) > 0 else 0.0
    threshold = float(np.clip(found, *SATURATION))
    tissue = (saturation > threshold) & (value >= DARKEST * 255)
    width, height = grid.scale_x * x, grid.scale_y * y
    area = width * height
    if tissue.any():
        tissue = remove_small_objects(tissue, max_size=int(SMALLEST_PIECE / area))
        tissue = remove_small_holes(tissue, max_size=int(LARGEST_HOLE / area))
        distance = ndimage.distance_transform_edt(~tissue, sampling=(height, width))
        tissue = distance <= MARGIN if tissue.any() else tissue
    return TissueMask(tissue, (grid.scale_x, grid.scale_y), "otsu", threshold=threshold)


def whole_slide(slide: Slide) -> TissueMask:
    """Everything."""
    width, height = slide.size
    everything = shapely.box(0, 0, width, height)
    return TissueMask(np.ones((1, 1), np.bool_), (width, height), "whole slide", everything)
