"""Outlines as well-known binary (OGC 06-103r4) in Arrow arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numba import njit

from celltyper.cells.outlines import Outlines

_CHUNK_CORNERS = 1 << 22


def to_wkb(found: Outlines) -> pa.ChunkedArray:
    """Well-known binary of all cells, little-endian: Polygon, or MultiPolygon if not connected.

    Parameters
    ----------
    found : Outlines
        From `celltyper.cells.outlines.outlines`.

    Returns
    -------
    pyarrow.ChunkedArray of binary, length n
        Element i belongs to ``found.ids[i]``. Chunks stay far below Arrow's 2 GiB.
    """
    n = len(found.ids)
    corners = found.ring_offsets[found.polygon_offsets[found.cell_offsets]]
    chunks = []
    start = 0
    while start < n:
        limit = corners[start] + _CHUNK_CORNERS
        stop = max(start + 1, int(np.searchsorted(corners, limit, side="right")) - 1)
        low, high = int(corners[start]), int(corners[stop])
        polygons = found.cell_offsets[[start, stop]]
        rings = found.polygon_offsets[polygons]
        size = 16 * (high - low) + 4 * int(np.diff(rings)[0]) + 9 * int(np.diff(polygons)[0])
        data = np.empty(size + 9 * (stop - start), np.uint8)
        offsets = np.zeros(stop - start + 1, np.int32)
        points = found.coordinates[low:high].astype("<f8").view(np.uint8).reshape(-1)
        _fill(
            data,
            offsets,
            points,
            low,
            start,
            found.ring_offsets,
            found.polygon_offsets,
            found.cell_offsets,
        )
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data[: offsets[-1]])]
        chunks.append(pa.BinaryArray.from_buffers(pa.binary(), stop - start, buffers))
        start = stop
    return pa.chunked_array(chunks, pa.binary())


@njit(cache=True, nogil=True)
def _put_uint32(data, at, value):  # type: ignore[no-untyped-def]
    for i in range(4):
        data[at + i] = (value >> (8 * i)) & 255
    return at + 4


@njit(cache=True, nogil=True)
def _put_head(data, at, kind, count):  # type: ignore[no-untyped-def]
    data[at] = 1  # little-endian
    at = _put_uint32(data, at + 1, kind)
    return _put_uint32(data, at, count)


@njit(cache=True, nogil=True)
def _fill(  # type: ignore[no-untyped-def]
    data, offsets, points, low, start, ring_offsets, polygon_offsets, cell_offsets
):
    at = 0
    for i in range(len(offsets) - 1):
        first, last = cell_offsets[start + i], cell_offsets[start + i + 1]
        if last - first > 1:
            at = _put_head(data, at, 6, last - first)
        for polygon in range(first, last):
            rings = polygon_offsets[polygon], polygon_offsets[polygon + 1]
            at = _put_head(data, at, 3, rings[1] - rings[0])
            for ring in range(rings[0], rings[1]):
                begin, end = ring_offsets[ring] - low, ring_offsets[ring + 1] - low
                at = _put_uint32(data, at, end - begin)
                n = 16 * (end - begin)
                data[at : at + n] = points[16 * begin : 16 * end]
                at += n
        offsets[i + 1] = at
