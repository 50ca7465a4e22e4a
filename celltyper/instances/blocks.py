"""Exact decoding of a slide in blocks: the cells of one decode of the whole, whatever the blocks.

A method parts each 4-connected component of its foreground for itself, and sees only so many
pixels around it. So a block decodes the components that start in it, whole: no cell is cut at a
seam, counted twice or lost. A component without end (a model that says foreground everywhere)
would need the whole slide in memory; it is cut along a fixed grid of the slide instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import cc3d
import numpy as np
from numba import njit
from numpy.typing import NDArray

from celltyper.errors import DataError
from celltyper.tiling import Region
from celltyper.types import InstanceMethod, Labels, Maps

AROUND = 128
"""Pixels around its cells that a method sees which does not say its ``reach``."""


class BlockCells(NamedTuple):
    """Cells of a block: labels 1..n, int32, of a region just as large as they are."""

    labels: Labels
    region: Region


class _Boxes(NamedTuple):
    """Places of labels on the slide; stops are exclusive."""

    row: NDArray[np.int64]
    col: NDArray[np.int64]
    row_stop: NDArray[np.int64]
    col_stop: NDArray[np.int64]
    first: NDArray[np.int64]
    """Column of the first pixel in raster order, which lies in row ``row``."""


class _Cells(NamedTuple):
    """Some cells of a decoded region; each belongs to the block that holds its ``owner``."""

    labels: Labels
    region: Region
    ids: NDArray[np.int64]
    boxes: _Boxes
    owner: tuple[NDArray[np.int64], NDArray[np.int64]]

    def kept(self, keep: NDArray[np.bool_]) -> _Cells:
        boxes = _Boxes(*(column[keep] for column in self.boxes))
        owner = self.owner[0][keep], self.owner[1][keep]
        return self._replace(ids=self.ids[keep], boxes=boxes, owner=owner)


def decode_block(
    method: InstanceMethod,
    read: Callable[[Region], Maps],
    core: Region,
    shape: tuple[int, int],
    *,
    halo: int = 64,
    limit: int = 1024,
) -> BlockCells:
    """Decode the cells that belong to one block of a slide.

    If cores partition the slide, every cell belongs to just one of them, and the cells of all
    together do not depend on how it was cut. What more is promised depends on the optional
    members of the method (`celltyper.types.InstanceMethod`):

    - ``foreground`` and ``reach``: the cells are those of one decode of the whole slide, to the
      pixel. A cell belongs to the block that holds the first pixel, in raster order, of its
      component of the foreground.
    - ``foreground`` alone: squares of `limit` pixels, of a grid that starts at the slide's
      corner, stand for blocks; each decodes the components that start in it, whole and with
      `AROUND` pixels around them. Squares are decoded as often as blocks meet them, so cores
      should be made of whole squares.
    - neither: each square is decoded with `AROUND` pixels around it, and a cell belongs to the
      square and the block that hold its own first pixel. Where the decoding of two neighbours
      disagrees, a cell at their seam may be there twice, or be missing.

    A component larger than `limit` pixels, in height or width, is no clump of nuclei. It is cut
    along the squares, each is decoded alone, and a cell of it belongs to the block that holds its
    own first pixel.

    Parameters
    ----------
    method : InstanceMethod
        With a decoding that depends on nothing but the maps.
    read : callable
        ``read(region)`` gives activated maps, float32 (C, height, width) by name, of any region
        of the slide, within `read_margin` pixels of the core. Called once, and again with more
        around the core (or square) where a component goes on.
    core : Region
        The block, inside the slide.
    shape : (int, int)
        Height and width of the slide.
    halo : int
        Pixels around the core that are read first. At least 1.
    limit : int
        See above. At least 1.

    Returns
    -------
    BlockCells
        In the raster order of first pixels; an empty region if the block has no cells.

    Raises
    ------
    ValueError
        If the core is not inside the slide, or `halo` or `limit` is not positive.
    DataError
        If the method's foreground does not have the size of the region that was read.
    """
    if min(core) < 0 or core.row + core.height > shape[0] or core.col + core.width > shape[1]:
        raise ValueError(f"the block {core} must be inside the slide of {shape}")
    if halo < 1 or limit < 1:
        raise ValueError(f"halo and limit must be at least 1, got {halo} and {limit}")
    parts: Iterable[_Cells]
    squares = _squares(core, shape, limit)
    if not hasattr(method, "foreground"):
        parts = (_decode_square(method, read, square, shape) for square in squares)
    elif not hasattr(method, "reach"):
        parts = (c for s in squares for c in _decode(method, read, s, shape, halo, limit, AROUND))
    else:
        parts = _decode(method, read, core, shape, halo, limit, method.reach)
    return _join([cells.kept(_inside(core, *cells.owner)) for cells in parts], core)


def read_margin(method: InstanceMethod, limit: int = 1024) -> int:
    """Pixels around a core that `decode_block` may read, wherever the core lies.

    Parameters
    ----------
    method : InstanceMethod
    limit : int
        As for `decode_block`.

    Returns
    -------
    int
        At most `limit` and the method's ``reach``. Without that, squares stick out of the core.
    """
    if not hasattr(method, "foreground"):
        return limit - 1 + AROUND
    if not hasattr(method, "reach"):
        return 2 * limit - 1 + AROUND
    return limit + int(method.reach)


def _decode(
    method: Any,
    read: Callable[[Region], Maps],
    core: Region,
    shape: tuple[int, int],
    halo: int,
    limit: int,
    around: int,
) -> Iterator[_Cells]:
    """Cells of the components that start in the core, and cells of giant ones that do."""
    margin = min(halo, limit)
    while True:
        window = _grown(core, margin + around, shape)
        maps = read(window)
        mask = method.foreground(maps)
        if mask.shape != window[2:]:
            raise DataError(f"{window} was read, but the maps give a foreground of {mask.shape}")
        if not _cut(mask, core, window).any():
            return
        components, boxes = _components(mask, window)
        giant = np.maximum(boxes.row_stop - boxes.row, boxes.col_stop - boxes.col) > limit
        # What meets the core and is not giant lies within `limit` of it: then none is open, and
        # what goes on beyond the window shows enough of itself to be giant from every block.
        if margin == limit or not (_open(boxes, core, window, around, shape) & ~giant).any():
            break
        del maps, mask, components
        margin = min(4 * margin, limit)
    del mask

    owned = _inside(core, boxes.row, boxes.first) & ~giant
    if owned.any():
        crop = _grown(_hull([_Boxes(*(column[owned] for column in boxes))]), around, shape)
        cells = _cells(method, maps, window, crop)
        # By the first pixel: others may be in a hole that the cell fills, with specks in it.
        of = components[cells.boxes.row - window.row, cells.boxes.first - window.col]
        cells = cells._replace(owner=(boxes.row[of], boxes.first[of]))
        yield cells.kept(owned[of])
    if not giant.any():
        return
    for square in _squares(core, shape, limit):
        part = square.common(core)
        if not giant[_cut(components, part, window)].any():
            continue
        if square.common(window) == square:
            cells = _cells(method, maps, window, square)
        else:
            cells = _cells(method, read(square), square, square)
        cells = cells.kept(_inside(part, *cells.owner))
        row, col = cells.owner
        yield cells.kept(giant[components[row - window.row, col - window.col]])


def _decode_square(
    method: InstanceMethod,
    read: Callable[[Region], Maps],
    square: Region,
    shape: tuple[int, int],
) -> _Cells:
    """Cells that start in the square."""
    window = _grown(square, AROUND, shape)
    cells = _cells(method, read(window), window, window)
    return cells.kept(_inside(square, *cells.owner))


def _join(parts: list[_Cells], core: Region) -> BlockCells:
    """All cells in one image, numbered by their first pixels."""
    parts = [cells for cells in parts if len(cells.ids)]
    if not parts:
        return BlockCells(np.zeros((0, 0), np.int32), Region(core.row, core.col, 0, 0))
    region = _hull([cells.boxes for cells in parts])
    rows = np.concatenate([cells.boxes.row for cells in parts])
    firsts = np.concatenate([cells.boxes.first for cells in parts])
    ids = np.empty(len(rows), np.int32)
    ids[np.lexsort((firsts, rows))] = np.arange(1, len(rows) + 1)
    labels = np.zeros((region.height, region.width), np.int32)
    for cells in parts:
        table = np.zeros(int(cells.ids[-1]) + 1, np.int32)
        table[cells.ids], ids = ids[: len(cells.ids)], ids[len(cells.ids) :]
        row, col = cells.region.row - region.row, cells.region.col - region.col
        _paint(labels, cells.labels, table, row, col)
    return BlockCells(labels, region)


def _components(mask: NDArray[np.bool_], window: Region) -> tuple[NDArray[np.int32], _Boxes]:
    """4-connected components of a window's foreground, and their boxes by id."""
    found, n = cc3d.connected_components(
        np.ascontiguousarray(mask).view(np.uint8),
        connectivity=4,
        binary_image=True,
        return_N=True,
        out_dtype=np.uint32,
    )
    components = found.view(np.int32)
    return components, _Boxes(*_survey(components, n, window.row, window.col))


def _cells(method: InstanceMethod, maps: Maps, window: Region, crop: Region) -> _Cells:
    """Decode a crop of a window's maps; cells are their own owners."""
    labels = method.decode({name: _cut(maps[name], crop, window) for name in method.maps})
    found = _survey(labels, int(labels.max(initial=0)), crop.row, crop.col)
    ids = np.flatnonzero(found[0] >= 0)
    boxes = _Boxes(*found[:, ids])
    return _Cells(labels, crop, ids, boxes, (boxes.row, boxes.first))


def _open(
    boxes: _Boxes, core: Region, window: Region, around: int, shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Which components near the core may go on, or see something, beyond the window."""
    around = max(around, 1)
    met = (boxes.row < core.row + core.height) & (boxes.row_stop > core.row)
    met &= (boxes.col < core.col + core.width) & (boxes.col_stop > core.col)
    row_stop, col_stop = window.row + window.height, window.col + window.width
    out = (boxes.row - around < window.row) & (window.row > 0)
    out |= (boxes.col - around < window.col) & (window.col > 0)
    out |= (boxes.row_stop + around > row_stop) & (row_stop < shape[0])
    out |= (boxes.col_stop + around > col_stop) & (col_stop < shape[1])
    open_: NDArray[np.bool_] = met & out
    return open_


def _squares(core: Region, shape: tuple[int, int], side: int) -> list[Region]:
    """Squares of the slide's grid that the core meets."""
    return [
        Region(row, col, min(side, shape[0] - row), min(side, shape[1] - col))
        for row in range(core.row // side * side, core.row + core.height, side)
        for col in range(core.col // side * side, core.col + core.width, side)
    ]


def _grown(region: Region, margin: int, shape: tuple[int, int]) -> Region:
    around = Region(
        region.row - margin,
        region.col - margin,
        region.height + 2 * margin,
        region.width + 2 * margin,
    )
    return around.common(Region(0, 0, *shape))


def _hull(boxes: list[_Boxes]) -> Region:
    row, col = (min(int(b[k].min()) for b in boxes) for k in (0, 1))
    row_stop, col_stop = (max(int(b[k].max()) for b in boxes) for k in (2, 3))
    return Region(row, col, row_stop - row, col_stop - col)


def _inside(region: Region, row: NDArray[np.int64], col: NDArray[np.int64]) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (row >= region.row) & (row < region.row + region.height)
    inside &= (col >= region.col) & (col < region.col + region.width)
    return inside


def _cut(array: NDArray[Any], region: Region, window: Region) -> NDArray[Any]:
    """Part of the window's array that shows the region."""
    return array[(..., *region.seen_from(window).slices)]


@njit(cache=True, nogil=True)
def _survey(labels, n, row, col):  # type: ignore[no-untyped-def]
    """`_Boxes` of labels 0 to n, -1 for those not there; ``(row, col)`` is their place."""
    found = np.full((5, n + 1), -1, np.int64)
    for r in range(labels.shape[0]):
        for c in range(labels.shape[1]):
            i = labels[r, c]
            if i == 0:
                continue
            if found[0, i] < 0:
                found[0, i] = row + r
                found[1, i] = col + c
                found[4, i] = col + c
            found[1, i] = min(found[1, i], col + c)
            found[2, i] = row + r + 1
            found[3, i] = max(found[3, i], col + c + 1)
    return found


@njit(cache=True, nogil=True)
def _paint(canvas, labels, table, row, col):  # type: ignore[no-untyped-def]
    """Copy the labels to which the table gives a new id; ``(row, col)`` is their place."""
    for r in range(max(row, 0), min(row + labels.shape[0], canvas.shape[0])):
        for c in range(max(col, 0), min(col + labels.shape[1], canvas.shape[1])):
            i = labels[r - row, c - col]
            if i < len(table) and table[i]:
                canvas[r, c] = table[i]
