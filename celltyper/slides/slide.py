"""A slide: one grid of pixels at any resolution, read in regions of any size."""

from __future__ import annotations

import logging
import math
import os
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np

from celltyper.errors import DataError, RunError
from celltyper.slides.cache import TileCache
from celltyper.slides.levels import Grid, Level, grid_at, levels_of
from celltyper.slides.resampling import Axis, lanczos
from celltyper.slides.source import WHITE, Source, Tile
from celltyper.tiling import Region
from celltyper.types import Image

logger = logging.getLogger(__name__)

CACHE_BYTES = 128 << 20
"""Decoded tiles that a slide keeps: two rows of tiles across the widest scans."""

_MOST_SOURCE = 1 << 24
_SAID = 20
_SUFFIXES = (".ome.tif", ".ome.tiff", ".ome.zarr", ".zarr")


class Slide:
    """An open slide.

    Positions are pixels of the full resolution; of a slide that states what part of it was scanned
    (MIRAX, Leica) they count from the corner of that part, `bounds`, as in QuPath.

    Several threads may read at once. A slide can be pickled: it is then opened anew in the other
    process, and knows nothing of damage found in this one.

    Parameters
    ----------
    source : Source
        What gives the tiles, see `celltyper.slides.opening.open_slide`.
    mpp : (float, float), optional
        Micrometres per pixel of the full resolution along x and y, instead of those stated.
    strict : bool
        Raise where a tile is damaged.

    Attributes
    ----------
    path, name, format : str
        Absolute path or URL; without folder and suffix; such as ``"aperio"``.
    levels : tuple of Level
        Stored resolutions, the full one first.
    mpp : (float, float) or None
        Along x and y.
    stated_mpp : (float, float) or None
        What the file states, where another was given.
    """

    def __init__(
        self, source: Source, mpp: tuple[float, float] | None = None, strict: bool = False
    ) -> None:
        self._source = source
        self._own_mpp = mpp
        self.strict = strict
        self.path = source.path
        self.name = slide_name(source.path)
        self.format = source.format
        self.mpp = mpp or source.mpp
        self.stated_mpp = source.mpp
        self.levels: tuple[Level, ...]
        self.levels, self._numbers = levels_of(source.sizes)
        self._cache = TileCache(CACHE_BYTES)
        self._damaged: set[tuple[int, Region]] = set()
        self._lock = Lock()
        self._closed = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the full resolution."""
        return self.levels[0].width, self.levels[0].height

    @property
    def bounds(self) -> Region:
        """Where in the full resolution of the file the slide lies."""
        return self._source.bounds

    @property
    def magnification(self) -> float | None:
        """Of the objective, as the file states it; resolutions do not follow from it."""
        return self._source.magnification

    @property
    def icc(self) -> bytes | None:
        """Color profile; pixels are given as stored, without it being applied."""
        return self._source.icc

    @property
    def damaged(self) -> list[Region]:
        """Damaged tiles met so far, as regions of the full resolution, in raster order."""
        with self._lock:
            return sorted({region for _, region in self._damaged})

    def grid(self, mpp: float | None = None) -> Grid:
        """Size and scale of the slide at a resolution.

        Parameters
        ----------
        mpp : float, optional
            Micrometres per pixel; without it, the full resolution.

        Returns
        -------
        Grid
            Where a level has that resolution within 1 %, the level itself: its `scale_x` and
            `scale_y` say what its pixels really are.

        Raises
        ------
        DataError
            If the slide states no resolution.
        """
        if mpp is None:
            return grid_at(self.levels, 1.0, 1.0)
        if not (mpp > 0 and math.isfinite(mpp)):
            raise ValueError(f"mpp must be positive, got {mpp}")
        x, y = require_mpp(self)
        return grid_at(self.levels, mpp / x, mpp / y)

    def read(self, region: Region, mpp: float | None = None) -> Image:
        """Pixels of a region.

        Parameters
        ----------
        region : Region
            In pixels of ``grid(mpp)``; may leave the slide.
        mpp : float, optional
            Micrometres per pixel; without it, the full resolution.

        Returns
        -------
        ndarray of uint8, shape (region.height, region.width, 3)
            The same whatever region they are asked in. Stored pixels where a level has the
            resolution, otherwise Lanczos of the next finer level, antialiased. White outside the
            slide, where it is transparent, and in damaged tiles.

        Raises
        ------
        DataError
            If the slide states no resolution, or if it is `strict` and a tile is damaged.
        RunError
            If disk or network fail.
        """
        return self._read(self.grid(mpp), region)

    def thumbnail(self, longest: int) -> Image:
        """The whole slide at a size.

        Parameters
        ----------
        longest : int
            Pixels of its longer side; at most those of the full resolution.

        Returns
        -------
        ndarray of uint8, shape (H, W, 3)
        """
        scale = max(1.0, max(self.size) / longest)
        width, height = (max(1, round(n / scale)) for n in self.size)
        finest = grid_at(self.levels, scale, scale)
        grid = Grid(width, height, self.size[0] / width, self.size[1] / height, finest.level, False)
        if (width, height) == self.levels[finest.level][:2]:
            grid = grid._replace(stored=True)
        return self._read(grid, Region(0, 0, height, width))

    def close(self) -> None:
        """Close the file; reading is then an error."""
        self._closed = True
        self._source.close()
        self._cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Slide, (self._source, self._own_mpp, self.strict)

    def __repr__(self) -> str:
        width, height = self.size
        mpp = "unknown mpp" if self.mpp is None else f"mpp {self.mpp[0]:g}"
        return f"<Slide {self.name!r}: {self.format}, {width} x {height} px, {mpp}>"

    def _read(self, grid: Grid, region: Region) -> Image:
        if self._closed:
            raise ValueError(f"{self.path}: the slide is closed")
        inside = region.common(Region(0, 0, grid.height, grid.width))
        if grid.stored:
            return self._stored(grid.level, region)
        if inside == region and region.height and region.width:
            return self._resampled(grid, region)
        out = np.full((region.height, region.width, 3), WHITE, np.uint8)
        if inside.height and inside.width:
            out[inside.seen_from(region).slices] = self._resampled(grid, inside)
        return out

    def _resampled(self, grid: Grid, region: Region) -> Image:
        level = self.levels[grid.level]
        factors = grid.scale_y / level.downsample, grid.scale_x / level.downsample
        needed = (region.height * factors[0]) * (region.width * factors[1])
        if needed > _MOST_SOURCE and max(region.height, region.width) > 1:
            return np.concatenate(
                [self._resampled(grid, half) for half in _halves(region)],
                axis=0 if region.height >= region.width else 1,
            )
        rows = Axis(region.row, region.height, factors[0], level.height)
        cols = Axis(region.col, region.width, factors[1], level.width)
        around = Region(rows.low, cols.low, rows.high - rows.low, cols.high - cols.low)
        return lanczos(self._stored(grid.level, around), rows, cols)

    def _stored(self, level: int, region: Region) -> Image:
        """Pixels of a level, white outside of it."""
        width, height, _ = self.levels[level]
        inside = region.common(Region(0, 0, height, width))
        out = np.empty((region.height, region.width, 3), np.uint8)
        if inside != region:
            out.fill(WHITE)
        if not (inside.height and inside.width):
            return out
        tall, wide = self._source.tiles[self._numbers[level]]
        top, left = region.row, region.col
        bottom, right = inside.row + inside.height, inside.col + inside.width
        for row in range(inside.row // tall, -(-bottom // tall)):
            for col in range(inside.col // wide, -(-right // wide)):
                r0, r1 = max(inside.row, row * tall), min(bottom, (row + 1) * tall)
                c0, c1 = max(inside.col, col * wide), min(right, (col + 1) * wide)
                y, x = row * tall, col * wide
                tile = self._tile(level, row, col)
                out[r0 - top : r1 - top, c0 - left : c1 - left] = tile.pixels[
                    r0 - y : r1 - y, c0 - x : c1 - x
                ]
                for part in tile.damaged:
                    part = part._replace(row=y + part.row, col=x + part.col)
                    if all(part.common(inside)[2:]):
                        self._note(level, part, tile.reason)
        return out

    def _tile(self, level: int, row: int, col: int) -> Tile:
        try:
            return self._cache.get(
                (level, row, col), lambda: self._source.tile(self._numbers[level], row, col)
            )
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise RunError(
                f"{self.path}: reading failed ({why}); is the disk or network still there?"
            ) from error

    def _note(self, level: int, part: Region, why: str) -> None:
        """Record a damaged tile once."""
        width, height, downsample = self.levels[level]
        scaled = Grid(width, height, downsample, downsample, level, True).on_slide(part)
        found = scaled.common(Region(0, 0, self.size[1], self.size[0]))
        what = (
            f"{self.path}: damaged tile at x {found.col}, y {found.row} ({found.width} x "
            f"{found.height} px of the full resolution, level {level}; {why})"
        )
        if self.strict:
            raise DataError(f"{what}; read without --strict to take it for background")
        with self._lock:
            if (level, found) in self._damaged:
                return
            self._damaged.add((level, found))
            number = len(self._damaged)
        if number <= _SAID:
            rest = "; further ones are only counted" if number == _SAID else ""
            logger.warning("%s: taken for background%s", what, rest)


def require_mpp(slide: Slide) -> tuple[float, float]:
    """Micrometres per pixel of a slide along x and y.

    Raises
    ------
    DataError
        If it states none; says which flag to pass.
    """
    if slide.mpp is None:
        power = slide.magnification
        known = (
            f" (only an objective of {power:g}x, from which it does not follow)" if power else ""
        )
        raise DataError(
            f"{slide.path}: states no micrometres per pixel{known}; pass it with --mpp, such as "
            "--mpp 0.25"
        )
    return slide.mpp


def slide_name(path: str) -> str:
    """Name of a slide: the end of its path or URL, without suffix."""
    last = path.split("?")[0].rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    for suffix in _SUFFIXES:
        if last.lower().endswith(suffix):
            return last[: -len(suffix)]
    return last.rsplit(".", 1)[0] or last


def _halves(region: Region) -> tuple[Region, Region]:
    row, col, height, width = region
    if height >= width:
        half = height // 2
        return Region(row, col, half, width), Region(row + half, col, height - half, width)
    half = width // 2
    return Region(row, col, height, half), Region(row, col + half, height, width - half)
