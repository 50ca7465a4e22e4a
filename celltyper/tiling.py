"""Tiles with a region to read and a region to write; the write regions partition the image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Region(NamedTuple):
    """Rectangle of an array: rows ``[row, row + height)``, columns ``[col, col + width)``."""

    row: int
    col: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the rectangle in an array whose first axes are row and column."""
        return slice(self.row, self.row + self.height), slice(self.col, self.col + self.width)

    def common(self, other: Region) -> Region:
        """Intersection; without height or width where there is none."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        bottom = min(self.row + self.height, other.row + other.height)
        right = min(self.col + self.width, other.col + other.width)
        return Region(row, col, max(0, bottom - row), max(0, right - col))

    def seen_from(self, other: Region) -> Region:
        """The same rectangle, counted from the corner of another."""
        return self._replace(row=self.row - other.row, col=self.col - other.col)


class Tile(NamedTuple):
    """What the model sees (`read`, may leave the image) and what is kept of it (`write`)."""

    read: Region
    write: Region


def tile_grid(shape: tuple[int, int], size: int, overlap: int) -> list[Tile]:
    """Lay square tiles over an image so that every pixel is written exactly once.

    The grid is anchored half an overlap outside the image's top left corner, so a tile's place
    depends on nothing but `size` and `overlap`.

    Parameters
    ----------
    shape : tuple of int
        Height and width of the image.
    size : int
        Side of the read region.
    overlap : int
        How many pixels the read regions of two neighbours share; each tile's write region is its
        read region less half of that on every side.

    Returns
    -------
    list of Tile
        In raster order. Write regions are clipped to the image; read regions are not.

    Raises
    ------
    ValueError
        If the overlap leaves nothing to write.
    """
    margin, step = overlap // 2, size - 2 * (overlap // 2)
    if step <= 0:
        raise ValueError(f"an overlap of {overlap} leaves nothing of a tile of {size} to write")
    height, width = shape
    return [
        Tile(
            Region(row - margin, col - margin, size, size),
            Region(row, col, min(step, height - row), min(step, width - col)),
        )
        for row in range(0, height, step)
        for col in range(0, width, step)
    ]


def read_padded(image: NDArray[np.uint8], region: Region) -> NDArray[np.uint8]:
    """Cut a region out of an image, mirroring the image beyond its borders.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
    region : Region
        May lie partly outside the image.

    Returns
    -------
    ndarray of uint8, shape (region.height, region.width, 3)
    """
    rows = mirror(np.arange(region.row, region.row + region.height), image.shape[0])
    cols = mirror(np.arange(region.col, region.col + region.width), image.shape[1])
    return image[rows[:, None], cols[None, :]]


def mirror(index: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Reflect indices about the edges of an array, the edge pixel repeated.

    Parameters
    ----------
    index : ndarray of int64
        At any distance from the array.
    size : int
        Length of the array.

    Returns
    -------
    ndarray of int64
        In ``[0, size)``.
    """
    folded: NDArray[np.int64] = index % (2 * size)
    return np.minimum(folded, 2 * size - 1 - folded)
