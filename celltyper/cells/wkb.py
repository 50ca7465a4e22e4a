"""Outlines as well-known binary (OGC 06-103r4) in Arrow arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from celltyper.cells.outlines import Outlines, Place
from celltyper.errors import DataError

_CHUNK_CORNERS = 1 << 22


def to_wkb(found: Outlines, place: Place | None = None) -> pa.ChunkedArray:
    """Well-known binary of all cells, little-endian: Polygon, or MultiPolygon if not connected.

    Parameters
    ----------
    found : Outlines
        From `celltyper.cells.outlines.outlines`.
    place : Place, optional
        Where the labels lie on the slide; without it, coordinates are those of the label array.

    Returns
    -------
    pyarrow.ChunkedArray of binary, length n
        Element i belongs to ``found.ids[i]``. Chunks stay far below Arrow's 2 GiB.
    """
    n = len(found.ids)
    place = place or Place()
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
        points = np.empty((high - low, 2), "<f8")
        points[:, 0] = place.xs(found.coordinates[low:high, 0])
        points[:, 1] = place.ys(found.coordinates[low:high, 1])
        _fill(
            data,
            offsets,
            points.view(np.uint8).reshape(-1),
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


def extent(outlines: pa.ChunkedArray) -> tuple[list[str], list[float] | None]:
    """Kinds and bounding box of outlines, as GeoParquet's metadata has them.

    Parameters
    ----------
    outlines : pyarrow.ChunkedArray of binary
        From `to_wkb`.

    Returns
    -------
    kinds : list of str
        Of ``MultiPolygon`` and ``Polygon`` those that there are.
    bounds : list of float or None
        Smallest x and y, largest x and y; None without outlines.

    Raises
    ------
    DataError
        If one is not such a polygon.
    """
    total = np.zeros(2, np.int64)
    bounds = np.array([np.inf, np.inf, -np.inf, -np.inf])
    for chunk in outlines.chunks:
        counts = _extend(*bytes_of(chunk), bounds)
        if counts.sum() < len(chunk):
            raise DataError("an outline is no polygon (WKB, little-endian, without z)")
        total += counts
    kinds = [kind for kind, n in zip(("Polygon", "MultiPolygon"), total, strict=True) if n][::-1]
    return kinds, bounds.tolist() if kinds else None


def bytes_of(outlines: pa.BinaryArray) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Bytes of binary values, and n + 1 offsets that say where each begins and ends."""
    _, offsets, data = outlines.buffers()
    n = len(outlines)
    bounds = np.frombuffer(offsets, np.int32)[outlines.offset : outlines.offset + n + 1]
    return np.frombuffer(b"" if data is None else data, np.uint8), bounds


@njit(cache=True, nogil=True)
def get_uint32(data, at):  # type: ignore[no-untyped-def]
    """Little-endian number at a place that need not be aligned, as int64."""
    value = np.int64(0)
    for i in range(4):
        value |= np.int64(data[at + i]) << (8 * i)
    return value


@njit(cache=True, nogil=True)
def get_head(data, read, end, kind):  # type: ignore[no-untyped-def]
    """Number of parts of the geometry of a kind that begins there, -1 if there is none."""
    if end - read < 9 or data[read] != 1 or get_uint32(data, read + 1) != kind:
        return np.int64(-1)
    return get_uint32(data, read + 5)


@njit(cache=True, nogil=True)
def get_ring(data, read, end, corners):  # type: ignore[no-untyped-def]
    """Read a ring into float64 x, y, x, y ...; gives its number of corners, -1 if it is none."""
    if end - read < 4:
        return np.int64(-1)
    n = get_uint32(data, read)
    if n < 4 or end - read - 4 < 16 * n:
        return np.int64(-1)
    raw = corners.view(np.uint8)
    for i in range(16 * n):  # faster than a slice
        raw[i] = data[read + 4 + i]
    return n


@njit(cache=True, nogil=True)
def _extend(data, offsets, bounds):  # type: ignore[no-untyped-def]
    # Numbers of polygons and multipolygons; stops at what is neither.
    counts = np.zeros(2, np.int64)
    largest = 0
    for cell in range(len(offsets) - 1):
        largest = max(largest, offsets[cell + 1] - offsets[cell])
    corners = np.empty(largest // 8 + 1, np.float64)
    for cell in range(len(offsets) - 1):
        read, end = np.int64(offsets[cell]), np.int64(offsets[cell + 1])
        pieces = get_head(data, read, end, 6)
        multi = pieces > 0
        read += 9 * multi
        for _ in range(pieces if multi else 1):
            rings = get_head(data, read, end, 3)
            if rings < 1:
                return counts
            read += 9
            for ring in range(rings):
                n = get_ring(data, read, end, corners)
                if n < 0:
                    return counts
                read += 4 + 16 * n
                for i in range(n if ring == 0 else 0):
                    bounds[0] = min(bounds[0], corners[2 * i])
                    bounds[1] = min(bounds[1], corners[2 * i + 1])
                    bounds[2] = max(bounds[2], corners[2 * i])
                    bounds[3] = max(bounds[3], corners[2 * i + 1])
        if read != end:
            return counts
        counts[np.int64(multi)] += 1
    return counts


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
