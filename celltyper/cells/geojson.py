"""Cells as GeoJSON by the rules of QuPath's reader (0.5, 0.6), one Feature per cell.

QuPath reads ``objectType``, ``classification`` with ``name`` and ``color``, and ``measurements``
as a map from name to number (since 0.4; see ``QuPathTypeAdapters`` in its source).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, cast

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from celltyper.atomic import atomic_path
from celltyper.cells.colors import default_colors, rgb
from celltyper.cells.outlines import Outlines
from celltyper.cells.table import classes_of
from celltyper.errors import DataError

_CHUNK_CORNERS = 1 << 18
_DECIMALS = 6
_LARGEST = 1e12  # times 10**_DECIMALS it still fits int64


def write_geojson(
    path: str | Path,
    cells: pa.Table,
    found: Outlines,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Write cells as a FeatureCollection of QuPath detections, atomically.

    Every cell is one Feature: a Polygon, or a MultiPolygon if its pixels are not connected, in
    pixels of the image, rings closed, exteriors counter-clockwise in the sense of RFC 7946. Its
    measurements are ``cell_id`` and all numeric columns of the table but ``x`` and ``y``, with 6
    decimals; nulls and NaN are left out. Memory does not grow with the number of cells.

    Parameters
    ----------
    path : str or Path
        If it ends in ``.gz``, the file is compressed.
    cells : pyarrow.Table
        From `celltyper.cells.table.cells_table`.
    found : Outlines
        Outlines of the same cells in the same order.
    colors : mapping of str to str, optional
        Colors ``#rrggbb`` that differ from `default_colors`, by phenotype.

    Raises
    ------
    DataError
        If outlines and table are not of the same cells, or the folder is not writable.
    RunError
        If the disk is full.
    """
    if not np.array_equal(cells["cell_id"].to_numpy(), found.ids):
        raise DataError(
            f"{Path(path).name}: {cells.num_rows} rows and {len(found.ids)} outlines are not of "
            "the same cells; pass the outlines of the labels that the table was made from"
        )
    classes = classes_of(cells)
    kinds = [
        _json({"name": name, "color": rgb(color)})
        for name, color in zip(classes, default_colors(classes, colors), strict=True)
    ]
    dictionary = cells["phenotype"].combine_chunks().dictionary.to_pylist()
    order = np.array([classes.index(name) for name in dictionary], np.int64)
    phenotypes = order[cells["phenotype"].combine_chunks().indices.to_numpy()]
    names, values = _measurements(cells)
    keys, key_offsets = _packed([_json(name) + b":" for name in names])
    kinds_packed, kind_offsets = _packed(kinds)
    # 2 numbers of at most 11 characters and 4 signs per corner; 24 per measurement; 160 of frame.
    frame = 160 + max(map(len, kinds), default=0) + len(keys) + 24 * len(names)
    corners = found.ring_offsets[found.polygon_offsets[found.cell_offsets]]
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(stack.enter_context(atomic_path(path)).open("wb"))
        if Path(path).suffix == ".gz":
            packed = gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=file, mtime=0)
            file = cast(IO[bytes], stack.enter_context(packed))
        file.write(b'{"type":"FeatureCollection","features":[')
        start = 0
        while start < len(found.ids):
            limit = corners[start] + _CHUNK_CORNERS
            stop = max(start + 1, int(np.searchsorted(corners, limit, side="right")) - 1)
            rings = found.polygon_offsets[found.cell_offsets[[start, stop]]]
            size = 26 * (corners[stop] - corners[start]) + 8 * (rings[1] - rings[0])
            buffer = np.empty(size + frame * (stop - start), np.uint8)
            used = _features(
                buffer,
                start,
                stop,
                found.coordinates,
                found.ring_offsets,
                found.polygon_offsets,
                found.cell_offsets,
                phenotypes,
                kinds_packed,
                kind_offsets,
                values[:, start:stop],
                keys,
                key_offsets,
            )
            file.write(buffer[:used].data)
            start = stop
        file.write(b"\n]}\n")


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _packed(texts: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    return np.frombuffer(b"".join(texts), np.uint8), offsets


def _measurements(cells: pa.Table) -> tuple[list[str], NDArray[np.float64]]:
    fields = [
        f for f in cells.schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)
    ]
    names = [f.name for f in fields if f.name not in ("x", "y")]
    values = np.full((len(names), cells.num_rows), np.nan)
    for i, name in enumerate(names):
        values[i] = cells[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
    if (np.abs(values) > _LARGEST).any():
        raise DataError(f"measurements above {_LARGEST:g} cannot be written as GeoJSON")
    return names, values


@njit(cache=True, nogil=True)
def _put(buffer, at, text):  # type: ignore[no-untyped-def]
    for i in range(len(text)):
        buffer[at + i] = text[i]
    return at + len(text)


@njit(cache=True, nogil=True)
def _put_integer(buffer, at, value, least):  # type: ignore[no-untyped-def]
    # Non-negative integer with at least so many digits.
    digits = least
    rest = value
    for _ in range(least):
        rest //= 10
    while rest > 0:
        rest //= 10
        digits += 1
    for i in range(digits):
        buffer[at + digits - 1 - i] = 48 + value % 10
        value //= 10
    return at + digits


@njit(cache=True, nogil=True)
def _put_number(buffer, at, value):  # type: ignore[no-untyped-def]
    scale = 10**_DECIMALS
    scaled = np.int64(np.rint(abs(value) * scale))
    if value < 0 and scaled > 0:
        buffer[at] = 45  # minus
        at += 1
    at = _put_integer(buffer, at, scaled // scale, 1)
    if scaled % scale:
        buffer[at] = 46  # point
        at = _put_integer(buffer, at + 1, scaled % scale, _DECIMALS)
        while buffer[at - 1] == 48:
            at -= 1
    return at


@njit(cache=True, nogil=True)
def _put_polygon(buffer, at, coordinates, offsets, first, last):  # type: ignore[no-untyped-def]
    buffer[at] = 91  # [
    at += 1
    for ring in range(first, last):
        buffer[at] = 91
        at += 1
        for i in range(offsets[ring], offsets[ring + 1]):
            buffer[at] = 91
            at = _put_integer(buffer, at + 1, np.uint32(coordinates[i, 0]), 1)
            buffer[at] = 44  # ,
            at = _put_integer(buffer, at + 1, np.uint32(coordinates[i, 1]), 1)
            buffer[at] = 93  # ]
            buffer[at + 1] = 44
            at += 2
        buffer[at - 1] = 93
        buffer[at] = 44
        at += 1
    buffer[at - 1] = 93
    return at


@njit(cache=True, nogil=True)
def _features(  # type: ignore[no-untyped-def]
    buffer,
    start,
    stop,
    coordinates,
    ring_offsets,
    polygon_offsets,
    cell_offsets,
    phenotypes,
    kinds,
    kind_offsets,
    values,
    keys,
    key_offsets,
):
    at = 0
    for cell in range(start, stop):
        if cell > 0:
            at = _put(buffer, at, b",")
        first, last = cell_offsets[cell], cell_offsets[cell + 1]
        if last - first == 1:
            at = _put(
                buffer, at, b'\n{"type":"Feature","geometry":{"type":"Polygon","coordinates":'
            )
            at = _put_polygon(
                buffer, at, coordinates, ring_offsets, polygon_offsets[first], polygon_offsets[last]
            )
        else:
            at = _put(
                buffer, at, b'\n{"type":"Feature","geometry":{"type":"MultiPolygon","coordinates":['
            )
            for j in range(first, last):
                at = _put_polygon(
                    buffer,
                    at,
                    coordinates,
                    ring_offsets,
                    polygon_offsets[j],
                    polygon_offsets[j + 1],
                )
                at = _put(buffer, at, b",")
            buffer[at - 1] = 93
        at = _put(buffer, at, b'},"properties":{"objectType":"detection","classification":')
        kind = phenotypes[cell]
        at = _put(buffer, at, kinds[kind_offsets[kind] : kind_offsets[kind + 1]])
        at = _put(buffer, at, b',"measurements":{')
        some = False
        for m in range(len(values)):
            if np.isfinite(values[m, cell - start]):
                at = _put(buffer, at, keys[key_offsets[m] : key_offsets[m + 1]])
                at = _put_number(buffer, at, values[m, cell - start])
                at = _put(buffer, at, b",")
                some = True
        at = _put(buffer, at - some, b"}}}")
    return at
