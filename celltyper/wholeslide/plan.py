"""What is done to a slide, cut into blocks: tiles that the model sees, maps that are kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.errors import ConfigError
from celltyper.instances.blocks import read_margin
from celltyper.models import CellTyper
from celltyper.slides import Grid, Slide, TissueMask, require_mpp
from celltyper.tiling import Region, Tile

BLOCK = 1536
"""Side of a block in pixels, about: it is a whole number of chunks."""
CHUNK = 512
"""Side of a chunk of the stored maps in pixels, about: it is a whole number of tiles."""
LIMIT = 1024
"""Pixels across which foreground is taken for one piece, see `celltyper.instances.blocks`."""
_RIM = 64
"""Pixels around the tissue that are looked at too, so that no cell at its rim is cut off."""


class Block(NamedTuple):
    """Place of a block: the how manieth from the top and from the left."""

    row: int
    col: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.row:04d}-{self.col:04d}"


@dataclass(frozen=True, eq=False)
class Plan:
    """How a slide is worked on.

    The tiles are anchored at the slide's corner and do not depend on the blocks, so that neither
    do maps and cells.

    Parameters
    ----------
    grid : Grid
        The slide's pixels at the model's resolution.
    mpp : (float, float) or None
        Micrometres per pixel of `grid` along x and y, None if the slide states none.
    tile, overlap : int
        Side of what the model sees, and how much of it neighbours share (pixels).
    chunk, block : int
        Sides in pixels; multiples of ``tile`` less overlap and of `chunk`.
    run : ndarray of bool, shape (rows, columns)
        Which tiles are predicted; elsewhere is background.
    reach : int
        Pixels around a block whose maps may be needed for its cells.
    """

    grid: Grid
    mpp: tuple[float, float] | None
    tile: int
    overlap: int
    chunk: int
    block: int
    run: NDArray[np.bool_]
    reach: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the maps in pixels."""
        return self.grid.height, self.grid.width

    @property
    def step(self) -> int:
        """Side of what is kept of a tile, in pixels."""
        return self.tile - 2 * (self.overlap // 2)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks with a tile to predict, in raster order."""
        n = self.block // self.step
        rows, cols = (math.ceil(size / self.block) for size in self.shape)
        whole = np.zeros((rows * n, cols * n), bool)
        whole[: self.run.shape[0], : self.run.shape[1]] = self.run
        some = whole.reshape(rows, n, cols, n).any(axis=(1, 3))
        return tuple(Block(int(row), int(col)) for row, col in np.argwhere(some))

    def region(self, block: Block) -> Region:
        """Pixels of a block, clipped to the slide."""
        row, col = block.row * self.block, block.col * self.block
        height, width = self.shape
        return Region(row, col, min(self.block, height - row), min(self.block, width - col))

    def tiles(self, block: Block) -> list[Tile]:
        """Tiles of a block to predict, in raster order; write regions are clipped to the slide."""
        n, step, margin = self.block // self.step, self.step, self.overlap // 2
        top, left = block.row * n, block.col * n
        found = []
        for row, col in np.argwhere(self.run[top : top + n, left : left + n]):
            y, x = int(top + row) * step, int(left + col) * step
            height, width = min(step, self.shape[0] - y), min(step, self.shape[1] - x)
            read = Region(y - margin, x - margin, self.tile, self.tile)
            found.append(Tile(read, Region(y, x, height, width)))
        return found

    def around(self, block: Block) -> Iterator[Block]:
        """Blocks with tiles whose maps decoding a block may need, itself among them."""
        reach = math.ceil(self.reach / self.block)
        known = self._known
        for row in range(block.row - reach, block.row + reach + 1):
            for col in range(block.col - reach, block.col + reach + 1):
                if (row, col) in known:
                    yield Block(row, col)

    @cached_property
    def _known(self) -> frozenset[Block]:
        return frozenset(self.blocks)

    @property
    def facts(self) -> dict[str, Any]:
        """What maps and cells depend on, as JSON."""
        return {
            "grid": list(self.grid),
            "mpp": None if self.mpp is None else list(self.mpp),
            "tile": self.tile,
            "overlap": self.overlap,
            "chunk": self.chunk,
            "block": self.block,
            "run": hashlib.sha256(np.packbits(self.run).tobytes()).hexdigest(),
        }


def make_plan(
    model: CellTyper,
    slide: Slide,
    tissue: TissueMask,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    block: int = BLOCK,
) -> Plan:
    """Plan the work on a slide.

    Parameters
    ----------
    model : CellTyper
    slide : Slide
    tissue : TissueMask
        Where to look.
    tile, overlap : int or None
        As in `celltyper.predict.predict_maps`.
    block : int
        Side of a block in pixels, about.

    Returns
    -------
    Plan

    Raises
    ------
    ConfigError
        If the overlap leaves nothing of a tile, or `block` is not positive.
    DataError
        If the model has a resolution and the slide states none.
    """
    size = tile or model.tile
    shared = model.overlap if overlap is None else overlap
    step = size - 2 * (shared // 2)
    if step <= 0 or shared < 0:
        raise ConfigError(f"infer.overlap: {shared} leaves nothing of a tile of {size} to write")
    if block < 1:
        raise ConfigError(f"block must be a number of pixels, at least 1, got {block}")
    if model.mpp is not None:
        require_mpp(slide)
    grid = slide.grid(model.mpp)
    chunk = step * max(1, round(min(CHUNK, block) / step))
    side = chunk * max(1, round(block / chunk))
    mpp = None if slide.mpp is None else (slide.mpp[0] * grid.scale_x, slide.mpp[1] * grid.scale_y)
    run = np.zeros((math.ceil(grid.height / step), math.ceil(grid.width / step)), bool)
    for row, col in np.ndindex(run.shape):
        seen = Region(row * step - _RIM, col * step - _RIM, step + 2 * _RIM, step + 2 * _RIM)
        run[row, col] = tissue.covers(grid.on_slide(seen))
    reach = read_margin(model.instances, LIMIT)
    return Plan(grid, mpp, size, shared, chunk, side, run, reach)
