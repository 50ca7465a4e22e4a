"""What a file format gives to a slide: tiles."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.resolution import PLAUSIBLE_MPP
from celltyper.tiling import Region
from celltyper.types import Image

WHITE = 255


class Tile(NamedTuple):
    """One tile.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (h, w, 3)
        White where `damaged`. At the right and lower border it may be cut, or reach beyond.
    damaged : tuple of Region
        Rectangles of `pixels` that cannot be decoded.
    reason : str
        Of the damage.
    """

    pixels: Image
    damaged: tuple[Region, ...] = ()
    reason: str = ""


class Source(Protocol):
    """A file that gives tiles; its methods may be called from several threads.

    Nothing to subclass. Objects that can be pickled make slides that can be sent to workers.
    """

    @property
    def path(self) -> str:
        """Absolute path or URL."""
        ...

    @property
    def format(self) -> str:
        """Such as ``"aperio"`` or ``"ome-zarr"``."""
        ...

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height of every level, the full resolution first."""
        ...

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the tiles of every level."""
        ...

    @property
    def mpp(self) -> tuple[float, float] | None:
        """Micrometres per pixel of the full resolution along x and y, if the file states them."""
        ...

    @property
    def magnification(self) -> float | None:
        """Of the objective, if the file states it."""
        ...

    @property
    def icc(self) -> bytes | None:
        """Color profile."""
        ...

    @property
    def bounds(self) -> Region:
        """What part of the full resolution of the file the slide is; tiles count from there."""
        ...

    def tile(self, level: int, row: int, col: int) -> Tile:
        """Tile number (row, col) of a level; damage is told, not raised."""
        ...

    def close(self) -> None:
        """Give back what the operating system lent."""
        ...


def white(height: int, width: int) -> Image:
    """Empty glass."""
    return np.full((height, width, 3), WHITE, np.uint8)


def on_white(colors: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> Image:
    """Composite on white.

    Parameters
    ----------
    colors : ndarray of uint8, shape (H, W, 3)
        Not multiplied by alpha.
    alpha : ndarray of uint8, shape (H, W)

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        Rounded to the nearest.
    """
    if alpha.min(initial=WHITE) == WHITE:
        return np.ascontiguousarray(colors)
    a = alpha.astype(np.uint32)[..., None]
    mixed = (colors * a + WHITE * (WHITE - a) + WHITE // 2) // WHITE
    return mixed.astype(np.uint8)


def piece(row: int, col: int, tile: tuple[int, int], size: tuple[int, int]) -> Region:
    """Region of tile (row, col) on a level of a size (width, height), cut at its borders."""
    top, left = row * tile[0], col * tile[1]
    return Region(top, left, min(tile[0], size[1] - top), min(tile[1], size[0] - left))


def plausible(x: Any, y: Any) -> tuple[float, float] | None:
    """Stated micrometres per pixel as numbers, or None if no microscope has them."""
    try:
        mpp = float(x), float(y)
    except (TypeError, ValueError):
        return None
    inside = all(PLAUSIBLE_MPP[0] <= v <= PLAUSIBLE_MPP[1] for v in mpp)
    return mpp if inside and all(map(math.isfinite, mpp)) else None


def reason(error: BaseException) -> str:
    """First line of an error, or its type if it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
