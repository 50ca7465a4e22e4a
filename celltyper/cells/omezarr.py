"""Cells as OME-Zarr 0.5: pyramids of label images, painted from the outlines part by part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numba import njit
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from celltyper.cells.colors import rgb
from celltyper.cells.stream import iter_cells
from celltyper.cells.table import colors_of, mpp_of, names_of
from celltyper.cells.wkb import bytes_of, get_head, get_ring
from celltyper.errors import DataError
from celltyper.types import Image, Labels

CELLS, PHENOTYPES = "cells", "phenotypes"
"""Names of the label images: the ids of the cells, and the ids 1..K of their phenotypes."""

_SIDE = 2048  # of a shard, the part that is painted at once
_CHUNK = 512
_SMALL = 1024  # the coarsest level is no longer than this
_KEPT = 2  # row groups of the table in memory
_ROWS = 8192
_THUMBNAIL = 2048

Progress = Callable[[int, int], None]


def write_ome_zarr(
    folder: str | Path,
    cells: str | Path,
    height: int,
    width: int,
    *,
    name: str = "",
    thumbnail: Image | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the cells of an image or slide as label images in OME-Zarr 0.5.

    ``labels/cells`` (int32) holds ``cell_id`` at every pixel, ``labels/phenotypes`` (uint8) the
    phenotype 1..K with its color and name; see `paint_pyramids`. The standard wants an image
    around them: it is a thumbnail, placed on the same micrometres. Coordinates are those of pixel
    centres, the centre of the first pixel being the origin.

    Parameters
    ----------
    folder : str or Path
        Empty or not there.
    cells : str or Path
        A ``cells.parquet`` of one image.
    height, width : int
        Pixels of the image, or of the slide's full resolution.
    name : str
        Of the image.
    thumbnail : ndarray of uint8, shape (h, w, 3), optional
        The whole image, smaller; white if it is not known.
    progress : callable, optional
        Gets the parts done and their number.

    Raises
    ------
    DataError
        If the table cannot be read, or an outline is no polygon.
    """
    root = zarr.open_group(str(folder), mode="w", zarr_format=3)
    head = next(iter_cells(cells, ["cell_id"], rows=1))
    mpp = mpp_of(head)
    labels = root.create_group("labels")
    levels = paint_pyramids(labels, cells, height, width, progress)
    labels.attrs["ome"] = {"version": "0.5", "labels": [CELLS, PHENOTYPES]}
    colors = [(0, 0, 0, 0), *((*rgb(color), 255) for color in colors_of(head))]
    names = ["background", *names_of(head)]
    shown: dict[str, dict[str, Any]] = {
        CELLS: {},
        PHENOTYPES: {
            "colors": [{"label-value": k, "rgba": list(c)} for k, c in enumerate(colors)],
            "properties": [{"label-value": k, "name": n} for k, n in enumerate(names)],
        },
    }
    for kind, more in shown.items():
        scales = [(2.0**k, 2.0**k) for k in range(levels)]
        labels[kind].attrs["ome"] = {
            "version": "0.5",
            "multiscales": [_multiscale(kind, "yx", scales, mpp, "mode")],
            "image-label": {"version": "0.5", "source": {"image": "../../"}, **more},
        }
    if thumbnail is None:
        h, w = thumbnail_size(height, width)
        thumbnail = np.full((h, w, 3), 255, np.uint8)
    scales = []
    level: NDArray[Any] = thumbnail.transpose(2, 0, 1).astype(np.float32)
    first = height / thumbnail.shape[0], width / thumbnail.shape[1]
    for k in range(levels):
        array = _array(root, str(k), level.shape, np.uint8, "cyx", fill=255)
        array[...] = np.rint(level).astype(np.uint8)
        scales.append((first[0] * 2**k, first[1] * 2**k))
        level = _mean_halved(level)
    root.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [_multiscale(name or "image", "cyx", scales, mpp, "mean")],
        "omero": {"channels": [_channel(*c) for c in _RGB], "rdefs": {"model": "color"}},
    }


def thumbnail_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the thumbnail of an image of this size."""
    scale = max(1.0, max(height, width) / _THUMBNAIL)
    return max(1, round(height / scale)), max(1, round(width / scale))


def paint_pyramids(
    group: zarr.Group,
    cells: str | Path,
    height: int,
    width: int,
    progress: Progress | None = None,
) -> int:
    """Paint cells into two pyramids of label images, ``cells/0, 1, ...`` and ``phenotypes/0, ...``.

    A pixel belongs to the cell whose outline its centre lies in, so that outlines along the edges
    of pixels give back exactly the pixels they were taken from. Every level has half the height
    and width of the one before, rounded up; a pixel of it has the most frequent of four labels,
    of equally frequent ones a cell rather than background, and the first in reading order. Parts
    without cells are not written.

    Memory holds a few parts of 2048 px and some 50 bytes a cell; it is fast if cells that are near
    each other in the table are near each other on the slide.

    Parameters
    ----------
    group : zarr.Group
        Where the two groups of arrays are made: int32 and uint8, sharded, zstd.
    cells : str or Path
        A ``cells.parquet`` of one image.
    height, width : int
        Of the finest level.
    progress : callable, optional
        Gets the parts done and their number.

    Returns
    -------
    int
        Number of levels; the coarsest is at most 1024 pixels long.

    Raises
    ------
    DataError
        If the table cannot be read, or an outline is no polygon.
    """
    sizes = [(height, width)]
    while max(sizes[-1]) > _SMALL:
        sizes.append(tuple(-(-n // 2) for n in sizes[-1]))  # type: ignore[arg-type]
    kinds = {name: group.create_group(name) for name in (CELLS, PHENOTYPES)}
    arrays = [
        (
            _array(kinds[CELLS], str(k), size, np.int32, "yx"),
            _array(kinds[PHENOTYPES], str(k), size, np.uint8, "yx"),
        )
        for k, size in enumerate(sizes)
    ]
    with _Table(Path(cells), height, width) as table:
        parts = math.prod(-(-n // _SIDE) for n in sizes[0])
        done = 0

        def paint(level: int, row: int, col: int) -> Labels | None:
            """Write one shard of a level and all below it; give its labels, None without cells."""
            nonlocal done
            top, left = row * _SIDE, col * _SIDE
            shape = min(_SIDE, sizes[level][0] - top), min(_SIDE, sizes[level][1] - left)
            labels = None
            if level == 0:
                labels = table.paint(row, col, shape)
                done += 1
                if progress is not None:
                    progress(done, parts)
            else:
                below = sizes[level - 1]
                for r in range(2 * row, min(2 * row + 2, -(-below[0] // _SIDE))):
                    for c in range(2 * col, min(2 * col + 2, -(-below[1] // _SIDE))):
                        part = paint(level - 1, r, c)
                        if part is not None:
                            labels = np.zeros(shape, np.int32) if labels is None else labels
                            y, x = (r - 2 * row) * _SIDE // 2, (c - 2 * col) * _SIDE // 2
                            small = halved(part)
                            labels[y : y + small.shape[0], x : x + small.shape[1]] = small
            if labels is not None:
                place = slice(top, top + shape[0]), slice(left, left + shape[1])
                arrays[level][0][place] = labels
                arrays[level][1][place] = table.phenotypes[labels]
            return labels

        paint(len(sizes) - 1, 0, 0)
    return len(sizes)


def halved(labels: Labels) -> Labels:
    """Labels at half the height and width, rounded up; see `paint_pyramids` for the rule.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)

    Returns
    -------
    ndarray of int32, shape (ceil(H / 2), ceil(W / 2))

    Examples
    --------
    >>> halved(np.array([[0, 0, 7], [0, 5, 0]], np.int32)).tolist()
    [[0, 7]]
    """
    found: Labels = _halved(np.ascontiguousarray(labels))
    return found


class _Outlines(NamedTuple):
    """Outlines of consecutive cells of a table."""

    corners: NDArray[np.float64]
    """x, y in pixels, shape (p, 2)."""
    rings: NDArray[np.int64]
    """Where each ring begins in `corners`, and the end."""
    cells: NDArray[np.int64]
    """Where each cell begins in `rings`, and the end."""


class _Table:
    """A table of cells, of which any part of the image can be painted."""

    def __init__(self, path: Path, height: int, width: int) -> None:
        boxes, ids, kinds = [np.zeros((0, 4), np.int32)], [np.zeros(0, np.int32)], []
        for table in iter_cells(path, ["cell_id", "phenotype", "outline"], _ROWS):
            outlines = _unpack(table["outline"], table["cell_id"], path)
            boxes.append(_boxes(*outlines))
            ids.append(table["cell_id"].to_numpy())
            phenotype = table["phenotype"].combine_chunks()
            order = [names_of(table).index(n) + 1 for n in phenotype.dictionary.to_pylist()]
            kinds.append(np.array(order, np.uint8)[phenotype.indices.to_numpy()])
        self._ids, self._boxes = np.concatenate(ids), np.concatenate(boxes)
        self.phenotypes = np.zeros(int(self._ids.max(initial=0)) + 1, np.uint8)
        """Phenotype 1..K by cell id, 0 for background."""
        self.phenotypes[self._ids] = np.concatenate(kinds)
        self._boxes[:, [0, 2]] = self._boxes[:, [0, 2]].clip(0, height)
        self._boxes[:, [1, 3]] = self._boxes[:, [1, 3]].clip(0, width)
        self._columns = -(-width // _SIDE)
        self._parts, self._rows = _by_part(self._boxes, self._columns)
        self._path, self._file = path, pq.ParquetFile(path)
        groups = range(self._file.num_row_groups)
        sizes = [self._file.metadata.row_group(i).num_rows for i in groups]
        self._starts = np.cumsum([0, *sizes])
        self._kept: dict[int, _Outlines] = {}

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def paint(self, row: int, col: int, shape: tuple[int, int]) -> Labels | None:
        """Labels of one part, None if no cell has a pixel there."""
        part = row * self._columns + col
        begin, end = np.searchsorted(self._parts, [part, part + 1])
        rows = self._rows[begin:end]
        if not len(rows):
            return None
        labels = np.zeros(shape, np.int32)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for group in np.unique(groups):
            own = slice(self._starts[group], self._starts[group + 1])
            _paint(
                labels,
                row * _SIDE,
                col * _SIDE,
                rows[groups == group] - own.start,
                self._ids[own],
                self._boxes[own],
                *self._outlines(int(group)),
            )
        return labels if labels.any() else None

    def _outlines(self, group: int) -> _Outlines:
        """Outlines of a row group; the ones used last are kept."""
        found = self._kept.pop(group, None)
        while len(self._kept) >= _KEPT:
            del self._kept[next(iter(self._kept))]
        if found is None:
            columns = ["cell_id", "outline"]
            batches = self._file.iter_batches(_ROWS, row_groups=[group], columns=columns)
            found = _joined([_unpack(b["outline"], b["cell_id"], self._path) for b in batches])
            # Arrow would keep what it has freed for itself.
            pa.default_memory_pool().release_unused()
        self._kept[group] = found
        return found


def _unpack(outline: pa.Array, ids: pa.Array, path: Path) -> _Outlines:
    if isinstance(outline, pa.ChunkedArray):
        outline = outline.combine_chunks()
    data, bounds = bytes_of(outline)
    for array in (data, bounds):
        array.flags.writeable = False  # some are; numba would compile once for each
    bad, *arrays = _unpacked(data, bounds)
    if bad >= 0:
        raise DataError(f"{path}: outline of cell {ids[bad]} is no polygon (WKB)")
    return _Outlines(*arrays)


def _joined(parts: Sequence[_Outlines]) -> _Outlines:
    corners = np.cumsum([0, *(len(p.corners) for p in parts)])
    rings = np.cumsum([0, *(len(p.rings) - 1 for p in parts)])
    return _Outlines(
        np.concatenate([p.corners for p in parts]),
        np.concatenate([[0], *(p.rings[1:] + at for p, at in zip(parts, corners, strict=False))]),
        np.concatenate([[0], *(p.cells[1:] + at for p, at in zip(parts, rings, strict=False))]),
    )


def _by_part(boxes: NDArray[np.int32], columns: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of the part and row of the table, for every part that the box of a cell meets."""
    rows = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    top, left = boxes[rows, 0] // _SIDE, boxes[rows, 1] // _SIDE
    high = (boxes[rows, 2] - 1) // _SIDE - top + 1
    wide = (boxes[rows, 3] - 1) // _SIDE - left + 1
    counts = high.astype(np.int64) * wide
    each = np.repeat(np.arange(len(rows)), counts)
    nth = np.arange(len(each)) - np.repeat(np.cumsum(counts) - counts, counts)
    parts = (top[each] + nth // wide[each]) * np.int64(columns) + left[each] + nth % wide[each]
    order = np.argsort(parts, kind="stable")
    return parts[order], rows[each][order]


def _array(
    group: zarr.Group, name: str, shape: Sequence[int], dtype: Any, axes: str, fill: int = 0
) -> zarr.Array[Any]:
    plane = [min(_SIDE, -(-n // _CHUNK) * _CHUNK) for n in shape[-2:]]
    few = tuple(shape[:-2])
    return group.create_array(
        name,
        shape=tuple(shape),
        dtype=dtype,
        chunks=(*few, _CHUNK, _CHUNK),
        shards=(*few, *plane),
        compressors=ZstdCodec(level=1),
        fill_value=fill,
        dimension_names=list(axes),
    )


def _multiscale(
    name: str,
    axes: str,
    scales: Sequence[tuple[float, float]],
    mpp: tuple[float, float] | None,
    method: str,
) -> dict[str, Any]:
    """Metadata of a pyramid whose levels have pixels of the given height and width."""
    y, x = (1.0, 1.0) if mpp is None else (mpp[1], mpp[0])
    unit = {} if mpp is None else {"unit": "micrometer"}
    channel = [1.0] * (len(axes) - 2)
    datasets = []
    for k, (high, wide) in enumerate(scales):
        # The centre of the first pixel lies further from the corner the larger the pixel.
        offset = [0.0] * len(channel) + [(high - 1) / 2 * y, (wide - 1) / 2 * x]
        transformations = [
            {"type": "scale", "scale": [*channel, high * y, wide * x]},
            {"type": "translation", "translation": offset},
        ]
        datasets.append({"path": str(k), "coordinateTransformations": transformations})
    return {
        "name": name,
        "axes": [
            {"name": a, "type": "channel"} if a == "c" else {"name": a, "type": "space", **unit}
            for a in axes
        ],
        "datasets": datasets,
        "type": method,
    }


_RGB = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))


def _channel(label: str, color: str) -> dict[str, Any]:
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    return {"label": label, "color": color, "active": True, "window": window}


def _mean_halved(level: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of two by two pixels, (3, h, w); the last row and column stand for missing ones."""
    h, w = level.shape[1:]
    even = np.pad(level, ((0, 0), (0, h % 2), (0, w % 2)), mode="edge")
    means: NDArray[np.float32] = even.reshape(3, -(-h // 2), 2, -(-w // 2), 2).mean(axis=(2, 4))
    return means


@njit(cache=True, nogil=True)
def _unpacked(data, bounds):  # type: ignore[no-untyped-def]
    # Polygons and MultiPolygons as corners and offsets, and the first that is neither, or -1.
    n = len(bounds) - 1
    size = np.int64(bounds[n]) - bounds[0]
    corners = np.empty(size // 8 + 2, np.float64)
    rings = np.zeros(size // 20 + 2, np.int64)
    cells = np.zeros(n + 1, np.int64)
    n_corners, n_rings = np.int64(0), np.int64(0)
    for cell in range(n):
        at, end = np.int64(bounds[cell]), np.int64(bounds[cell + 1])
        polygons = get_head(data, at, end, 6)
        at += 9 * (polygons > 0)
        for _ in range(max(polygons, 1)):
            count = get_head(data, at, end, 3)
            at = at + 9 if count > 0 else np.int64(-1)
            for _ in range(count):
                points = get_ring(data, at, end, corners[2 * n_corners :])
                if points < 0:
                    at = np.int64(-1)
                    break
                at += 4 + 16 * points
                n_corners += points
                n_rings += 1
                rings[n_rings] = n_corners
            if at < 0:
                break
        if at != end:
            return cell, corners[:0].reshape(-1, 2), rings, cells
        cells[cell + 1] = n_rings
    return -1, corners[: 2 * n_corners].reshape(-1, 2), rings[: n_rings + 1], cells


@njit(cache=True, nogil=True)
def _pixel(position):  # type: ignore[no-untyped-def]
    # First pixel whose centre does not lie before a position; far away is as good as outside.
    return np.int64(np.ceil(min(max(position, -1e9), 1e9) - 0.5))


@njit(cache=True, nogil=True)
def _boxes(corners, rings, cells):  # type: ignore[no-untyped-def]
    # First row and column, and those after the last, of the pixels whose centres may be inside.
    boxes = np.zeros((len(cells) - 1, 4), np.int32)
    for i in range(len(cells) - 1):
        low_x, low_y, high_x, high_y = np.inf, np.inf, -np.inf, -np.inf
        for k in range(rings[cells[i]], rings[cells[i + 1]]):
            x, y = corners[k]
            low_x, low_y = min(low_x, x), min(low_y, y)
            high_x, high_y = max(high_x, x), max(high_y, y)
        if low_x <= high_x:
            boxes[i, 0], boxes[i, 1] = _pixel(low_y), _pixel(low_x)
            boxes[i, 2], boxes[i, 3] = _pixel(high_y), _pixel(high_x)
    return boxes


@njit(cache=True, nogil=True)
def _paint(labels, top, left, members, ids, boxes, corners, rings, cells):  # type: ignore[no-untyped-def]
    # Even-odd rule: every edge flips what lies to its right in the rows whose centres it crosses.
    # An edge includes its upper and not its lower end, so that cells that share an edge share no
    # pixel and leave none between them.
    for i in members:
        row, col = max(boxes[i, 0] - top, 0), max(boxes[i, 1] - left, 0)
        rows = min(boxes[i, 2] - top, labels.shape[0]) - row
        cols = min(boxes[i, 3] - left, labels.shape[1]) - col
        if rows <= 0 or cols <= 0:
            continue
        flips = np.zeros((rows, cols), np.bool_)
        for ring in range(cells[i], cells[i + 1]):
            for k in range(rings[ring], rings[ring + 1] - 1):
                x0, y0 = corners[k]
                x1, y1 = corners[k + 1]
                if y0 > y1:
                    x0, y0, x1, y1 = x1, y1, x0, y0
                first = max(_pixel(y0) - top - row, 0)
                last = min(_pixel(y1) - top - row, rows)
                for r in range(first, last):
                    x = x0
                    if x0 != x1:
                        x += (top + row + r + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                    c = max(_pixel(x) - left - col, 0)
                    if c < cols:
                        flips[r, c] = not flips[r, c]
        for r in range(rows):
            inside = False
            for c in range(cols):
                inside ^= flips[r, c]
                if inside:
                    labels[row + r, col + c] = ids[i]


@njit(cache=True, nogil=True)
def _halved(labels):  # type: ignore[no-untyped-def]
    height, width = labels.shape
    small = np.zeros(((height + 1) // 2, (width + 1) // 2), labels.dtype)
    four = np.zeros(4, labels.dtype)
    for row in range(small.shape[0]):
        for col in range(small.shape[1]):
            n = 0
            for y in range(2 * row, min(2 * row + 2, height)):
                for x in range(2 * col, min(2 * col + 2, width)):
                    four[n] = labels[y, x]
                    n += 1
            best, most = labels.dtype.type(0), 0
            for i in range(n):
                count = 0
                for j in range(n):
                    count += four[j] == four[i]
                if count > most or (count == most and best == 0 and four[i] != 0):
                    best, most = four[i], count
            small[row, col] = best
    return small
