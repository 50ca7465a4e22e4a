"""Outlines of cells along pixel edges, for a whole label image in one pass.

The outline of a pixel set follows the cracks between pixels, so that the polygon covers exactly
the pixels of the cell: no half-pixel shrinkage, no gaps or overlaps between touching cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import shapely
from numba import njit
from numpy.typing import NDArray

from celltyper.types import Labels


class Place(NamedTuple):
    """Where a label array lies on a slide.

    The edge between its columns ``c - 1`` and ``c`` lies at ``x + scale_x * (col + c)`` on the
    slide, that between its rows at ``y + scale_y * (row + r)``.

    Parameters
    ----------
    x, y : float
        Pixels of the slide's full resolution (level 0): the origin of the label array, or, if
        `row` and `col` are given, that of the grid of label pixels.
    scale_x, scale_y : float
        Pixels of the full resolution per label pixel.
    row, col : int
        Pixel ``[0, 0]`` of the label array, counted in label pixels from the grid's origin. With
        them a cell comes out with the same bits from whichever array of the grid it is taken;
        moving the origin instead would round.

    Examples
    --------
    >>> place = Place(0, 0, 2.5, 2.5, row=100, col=40)
    >>> place.xs(np.array([0, 1])).tolist(), place.ys(np.array([0, 1])).tolist()
    ([100.0, 102.5], [250.0, 252.5])
    """

    x: float = 0.0
    y: float = 0.0
    scale_x: float = 1.0
    scale_y: float = 1.0
    row: int = 0
    col: int = 0

    def xs(self, columns: NDArray[Any]) -> NDArray[np.float64]:
        """Columns of the label array, pixel edges being whole numbers, on the slide."""
        return self.x + self.scale_x * (columns + np.float64(self.col))

    def ys(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        """Rows of the label array, pixel edges being whole numbers, on the slide."""
        return self.y + self.scale_y * (rows + np.float64(self.row))


class Outlines(NamedTuple):
    """Outlines of all cells of an image as flat arrays (GeoArrow's multipolygon layout).

    Cell i has the label ``ids[i]`` and consists of the polygons
    ``cell_offsets[i]:cell_offsets[i + 1]``; polygon j of the rings
    ``polygon_offsets[j]:polygon_offsets[j + 1]``, the exterior first, then its holes; ring k of
    the corners ``coordinates[ring_offsets[k]:ring_offsets[k + 1]]``, the last equal to the first.

    Exteriors have positive, holes negative signed area in (x, y), which RFC 7946 calls
    counter-clockwise and clockwise; on a screen with y downwards it looks the other way round.
    """

    ids: NDArray[np.int32]
    """Labels, ascending, shape (n,)."""
    coordinates: NDArray[np.int32]
    """Corners as x (column), y (row) in pixel edges, shape (p, 2)."""
    ring_offsets: NDArray[np.int64]
    """Shape (rings + 1,)."""
    polygon_offsets: NDArray[np.int64]
    """Shape (polygons + 1,)."""
    cell_offsets: NDArray[np.int64]
    """Shape (n + 1,)."""

    @property
    def is_hole(self) -> NDArray[np.bool_]:
        """Whether each ring is a hole, shape (rings,)."""
        holes = np.ones(len(self.ring_offsets) - 1, bool)
        holes[self.polygon_offsets[:-1]] = False
        return holes


def outlines(labels: Labels) -> Outlines:
    """Outlines of all labels along the edges of their pixels.

    Time is linear in the number of pixels, whatever the number of cells. The area of the
    polygons of a cell is exactly its number of pixels. Only corners are kept. Pixels that touch
    at a corner alone belong to different polygons of the cell, so that every polygon is valid
    in the sense of OGC Simple Features: no ring touches itself, and a hole touches the exterior
    or another hole in single points at most.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background; ids need not be contiguous, nor cells connected.

    Returns
    -------
    Outlines
        Pixel ``[0, 0]`` is the square from (0, 0) to (1, 1).

    Examples
    --------
    >>> found = outlines(np.array([[0, 7], [0, 7]], np.int32))
    >>> found.coordinates.tolist()
    [[2, 0], [2, 2], [1, 2], [1, 0], [2, 0]]
    """
    if labels.ndim != 2:
        raise ValueError(f"labels must be (H, W), got {labels.shape}")
    corners, starts, owners, pieces, areas = _trace(np.ascontiguousarray(labels))
    # A piece is one polygon; its exterior, the only ring of positive area, comes first.
    order = np.lexsort((areas < 0, pieces, owners)).astype(np.int64)
    coordinates, ring_offsets = _arrange(corners, starts, order)
    owners, exterior = owners[order], areas[order] > 0
    polygon_offsets = np.append(np.flatnonzero(exterior), len(order)).astype(np.int64)
    ids, first = np.unique(owners[exterior], return_index=True)
    cell_offsets = np.append(first, len(polygon_offsets) - 1).astype(np.int64)
    return Outlines(ids, coordinates, ring_offsets, polygon_offsets, cell_offsets)


def to_shapely(found: Outlines) -> NDArray[np.object_]:
    """Shapely geometries of all cells, a Polygon or, if the cell is not connected, MultiPolygon.

    Parameters
    ----------
    found : Outlines
        From `outlines`.

    Returns
    -------
    ndarray of shapely geometries, shape (n,)
        Element i belongs to ``found.ids[i]``.
    """
    polygons = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON,
        found.coordinates.astype(np.float64),
        (found.ring_offsets, found.polygon_offsets),
    )
    counts = np.diff(found.cell_offsets)
    cells: NDArray[np.object_] = np.asarray(polygons, object)[found.cell_offsets[:-1]]
    several = counts > 1
    if several.any():
        members = np.repeat(several, counts)
        owner = np.repeat(np.arange(several.sum()), counts[several])
        cells[several] = shapely.multipolygons(polygons[members], indices=owner)
    return cells


@njit(cache=True, nogil=True)
def _at(labels, row, col):  # type: ignore[no-untyped-def]
    if 0 <= row < labels.shape[0] and 0 <= col < labels.shape[1]:
        return labels[row, col]
    return labels.dtype.type(0)


@njit(cache=True, nogil=True)
def _grown(array):  # type: ignore[no-untyped-def]
    grown = np.empty((2 * array.shape[0], *array.shape[1:]), array.dtype)
    grown[: array.shape[0]] = array
    return grown


@njit(cache=True, nogil=True)
def _root(parents, i):  # type: ignore[no-untyped-def]
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return i


@njit(cache=True, nogil=True)
def _trace(labels):  # type: ignore[no-untyped-def]
    # One raster scan. Runs of equal pixels are joined over rows into 4-connected pieces; every
    # top edge that no ring has used yet starts a ring, which is followed with the cell on the
    # right-hand side, hugging the current pixel at diagonal contacts. If a ring comes back to a
    # contact, what lies between the two visits is split off: it is simple by construction.
    height, width = labels.shape
    visits = {np.int64(-1): np.int64(0)}  # position in the path of every contact of this walk
    used = np.zeros((height, width), np.bool_)
    above_run = np.zeros(width, np.int32)
    run = np.zeros(width, np.int32)
    parents = np.zeros(1024, np.int32)
    n_runs = 1
    corners = np.empty((4096, 2), np.int32)
    n_corners = 0
    path = np.empty((256, 2), np.int32)
    starts = np.zeros(256, np.int64)
    owners = np.empty(256, labels.dtype)
    pieces = np.empty(256, np.int32)
    areas = np.empty(256, np.int64)
    n_rings = 0
    here = np.zeros(width, labels.dtype)
    for row in range(height):
        above_run, run = run, above_run
        above, here = here, labels[row]
        label = labels.dtype.type(0)
        for col in range(width):
            before, label = label, here[col]
            if label == 0:
                continue
            joined = before == label
            if joined:
                run[col] = run[col - 1]
            same_above = above[col] == label
            if same_above:
                if not joined:
                    run[col] = above_run[col]
                elif run[col] != above_run[col]:
                    a, b = _root(parents, run[col]), _root(parents, above_run[col])
                    parents[max(a, b)] = min(a, b)
            elif not joined:
                if n_runs == len(parents):
                    parents = _grown(parents)
                parents[n_runs] = n_runs
                run[col] = n_runs
                n_runs += 1
            if same_above or used[row, col]:
                continue

            if len(visits):
                visits.clear()
            n_path = 0
            x, y, d = col, row, 0
            while True:
                if d == 0:
                    used[y, x] = True
                    x += 1
                    right, left = _at(labels, y, x), _at(labels, y - 1, x)
                elif d == 1:
                    y += 1
                    right, left = _at(labels, y, x - 1), _at(labels, y, x)
                elif d == 2:
                    x -= 1
                    right, left = _at(labels, y - 1, x - 1), _at(labels, y, x - 1)
                else:
                    y -= 1
                    right, left = _at(labels, y - 1, x), _at(labels, y - 1, x - 1)
                if right == label and left != label:
                    continue
                split = -1
                if right == label:
                    d = (d + 3) & 3
                else:
                    d = (d + 1) & 3
                    if left == label:
                        contact = np.int64(y) * (width + 1) + x
                        if contact in visits:
                            split = int(visits[contact])
                        else:
                            visits[contact] = np.int64(n_path)
                closed = x == col and y == row and d == 0
                if split < 0:
                    if n_path == len(path):
                        path = _grown(path)
                    path[n_path, 0] = x
                    path[n_path, 1] = y
                    n_path += 1
                for _ in range((split >= 0) + closed):
                    begin = split if split >= 0 else 0
                    split = -1
                    n = n_path - begin
                    while n_corners + n + 1 > len(corners):
                        corners = _grown(corners)
                    corners[n_corners : n_corners + n] = path[begin:n_path]
                    corners[n_corners + n] = path[begin]
                    double_area = np.int64(0)
                    for i in range(n_corners, n_corners + n):
                        double_area += np.int64(corners[i, 0]) * corners[i + 1, 1]
                        double_area -= np.int64(corners[i + 1, 0]) * corners[i, 1]
                    if n_rings + 1 == len(starts):
                        starts, owners = _grown(starts), _grown(owners)
                        pieces, areas = _grown(pieces), _grown(areas)
                    owners[n_rings] = label
                    pieces[n_rings] = run[col]
                    areas[n_rings] = double_area // 2
                    n_rings += 1
                    n_corners += n + 1
                    starts[n_rings] = n_corners
                    n_path = begin + 1
                if closed:
                    break
    for i in range(n_rings):
        pieces[i] = _root(parents, pieces[i])
    return (
        corners[:n_corners],
        starts[: n_rings + 1],
        owners[:n_rings],
        pieces[:n_rings],
        areas[:n_rings],
    )


@njit(cache=True, nogil=True)
def _arrange(corners, starts, order):  # type: ignore[no-untyped-def]
    offsets = np.zeros(len(order) + 1, np.int64)
    for i in range(len(order)):
        offsets[i + 1] = offsets[i] + starts[order[i] + 1] - starts[order[i]]
    arranged = np.empty_like(corners)
    for i in range(len(order)):
        arranged[offsets[i] : offsets[i + 1]] = corners[starts[order[i]] : starts[order[i] + 1]]
    return arranged, offsets
