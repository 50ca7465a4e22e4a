"""The levels of a slide, and the one grid of pixels that a resolution has on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from celltyper.tiling import Region

SAME_SCALE = 0.01
"""Pixels that differ in size by less than this share are taken for the same size."""

_ASPECT = 0.02


class Level(NamedTuple):
    """One stored resolution.

    Parameters
    ----------
    width, height : int
        Pixels.
    downsample : float
        How many pixels of the full resolution one of its pixels is wide and high.
    """

    width: int
    height: int
    downsample: float


class Grid(NamedTuple):
    """The pixels of a slide at one resolution.

    Pixel ``[r, c]`` covers the rows ``[r * scale_y, (r + 1) * scale_y)`` and the columns
    ``[c * scale_x, (c + 1) * scale_x)`` of the full resolution.

    Parameters
    ----------
    width, height : int
        Pixels; the last row and column may reach beyond the slide.
    scale_x, scale_y : float
        Pixels of the full resolution per pixel of the grid.
    level : int
        Which level it is made from.
    stored : bool
        Whether its pixels are those of the level as they are, not resampled.
    """

    width: int
    height: int
    scale_x: float
    scale_y: float
    level: int
    stored: bool

    def on_slide(self, region: Region) -> Region:
        """Smallest rectangle of whole pixels of the full resolution that holds a region."""
        row, height = _span(region.row, region.height, self.scale_y)
        col, width = _span(region.col, region.width, self.scale_x)
        return Region(row, col, height, width)


def _span(start: int, length: int, scale: float) -> tuple[int, int]:
    first = math.floor(start * scale + 1e-6)
    return first, math.ceil((start + length) * scale - 1e-6) - first


def levels_of(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[Level, ...], tuple[int, ...]]:
    """Downsamples of levels, and which images are levels.

    Levels are made by halving and the like, with the odd rest cut or padded: a ratio of sizes such
    as 4.0003 stands for 4, as in QuPath, or positions at the far side would be off by pixels.

    Parameters
    ----------
    sizes : sequence of (int, int)
        Width and height of every image; the first is the full resolution.

    Returns
    -------
    levels : tuple of Level
        From the full resolution downwards.
    indices : tuple of int
        Of each level in `sizes`. Left out are images that are not smaller than the one before, or
        of other proportions.
    """
    width, height = sizes[0]
    found = [(Level(width, height, 1.0), 0)]
    for i, (w, h) in sorted(enumerate(sizes[1:], start=1), key=lambda item: -item[1][0]):
        ratio = (width / w + height / h) / 2
        whole = round(ratio)
        if abs(width / whole - w) <= 1 and abs(height / whole - h) <= 1:
            ratio = float(whole)
        elif abs(width / w - height / h) > _ASPECT * ratio:
            continue
        if ratio > found[-1][0].downsample * (1 + SAME_SCALE):
            found.append((Level(w, h, ratio), i))
    return tuple(level for level, _ in found), tuple(i for _, i in found)


def grid_at(levels: Sequence[Level], scale_x: float, scale_y: float) -> Grid:
    """Grid of a scale.

    Parameters
    ----------
    levels : sequence of Level
        From the full resolution downwards.
    scale_x, scale_y : float
        Pixels of the full resolution per pixel wanted.

    Returns
    -------
    Grid
        Of the coarsest level that is not coarser than wanted. Where both scales are those of a
        level within `SAME_SCALE`, it is the level itself, and its scales differ from those wanted.
    """
    finest = min(scale_x, scale_y) * (1 + SAME_SCALE)
    index = max((i for i, level in enumerate(levels) if level.downsample <= finest), default=0)
    level = levels[index]
    if all(abs(s / level.downsample - 1) <= SAME_SCALE for s in (scale_x, scale_y)):
        return Grid(level.width, level.height, level.downsample, level.downsample, index, True)
    width = max(1, math.ceil(levels[0].width / scale_x - 1e-6))
    height = max(1, math.ceil(levels[0].height / scale_y - 1e-6))
    return Grid(width, height, scale_x, scale_y, index, False)
