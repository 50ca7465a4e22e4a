"""Cells as GeoJSON by the rules of QuPath's reader (0.5, 0.6), one Feature per cell.

QuPath reads ``objectType``, ``classification`` with ``name`` and ``color``, and ``measurements``
as a map from name to number (since 0.4; see ``QuPathTypeAdapters`` in its source).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, cast

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from celltyper.atomic import atomic_path
from celltyper.cells.colors import rgb
from celltyper.cells.stream import alike
from celltyper.cells.table import colors_of, names_of
from celltyper.cells.wkb import bytes_of, get_head, get_ring
from celltyper.errors import DataError

HEAD, TAIL = b'{"type":"FeatureCollection","features":[', b"\n]}\n"

_CHUNK_CELLS = 8192
_DECIMALS = 6
_LARGEST = 1e12  # times 10**_DECIMALS it still fits int64
_LARGEST_COORDINATE = 1e9


def write_geojson(
    path: str | Path,
    tables: pa.Table | Iterable[pa.Table],
    colors: Mapping[str, str] | None = None,
) -> None:
    """Write cells as a FeatureCollection of QuPath detections, atomically.

    Every cell is one Feature: a Polygon, or a MultiPolygon if its pixels are not connected, in
    pixels of the image or of the slide's full resolution, rings closed, exteriors
    counter-clockwise in the sense of RFC 7946. Whole coordinates are written as such, others with
    2 decimals. Its measurements are ``cell_id`` and all numeric columns of the table but ``x`` and
    ``y``, with 6 decimals; nulls and NaN are left out.

    Parameters
    ----------
    path : str or Path
        If it ends in ``.gz``, the file is compressed.
    tables : pyarrow.Table or iterable of them
        From `celltyper.cells.table.cells_table` or `celltyper.cells.stream.iter_cells`. Memory
        holds one at a time.
    colors : mapping of str to str, optional
        Colors ``#rrggbb`` by phenotype, instead of those of the model or of `default_colors`.

    Raises
    ------
    DataError
        If the tables differ in columns or classes, there is none, an outline is no polygon, or the
        folder is not writable.
    ConfigError
        If a color is given for what is no phenotype, or is not ``#rrggbb``.
    RunError
        If the disk is full.
    """
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(stack.enter_context(atomic_path(path)).open("wb"))
        if Path(path).suffix == ".gz":
            packed = gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=file, mtime=0)
            file = cast(IO[bytes], stack.enter_context(packed))
        file.write(HEAD)
        some = False
        for table in alike(tables):
            for text in features(table, colors, after=some):
                file.write(text)
                some = True
        file.write(TAIL)


def features(
    table: pa.Table, colors: Mapping[str, str] | None = None, *, after: bool = False
) -> Iterator[memoryview]:
    """Features of cells, one a line, with a comma between them.

    Parameters
    ----------
    table : pyarrow.Table
        As for `write_geojson`.
    colors : mapping of str to str, optional
        As for `write_geojson`.
    after : bool
        Whether they come after others, with a comma before the first.

    Returns
    -------
    iterator of memoryview
        UTF-8 text of several thousand cells at a time; errors as in `write_geojson`.
    """
    called = names_of(table)
    kinds = [
        _json({"name": name, "color": rgb(color)})
        for name, color in zip(called, colors_of(table, colors), strict=True)
    ]
    names = [
        f.name
        for f in table.schema
        if (pa.types.is_integer(f.type) or pa.types.is_floating(f.type))
        and f.name not in ("x", "y")
    ]
    keys, key_offsets = _packed([_json(name) + b":" for name in names])
    kinds_packed, kind_offsets = _packed(kinds)
    # 24 characters a measurement, 160 around them.
    frame = 160 + max(map(len, kinds), default=0) + len(keys) + 24 * len(names)
    for batch in table.to_batches(_CHUNK_CELLS):
        n = batch.num_rows
        if n == 0:
            continue
        phenotype = batch["phenotype"]
        order = np.array([called.index(c) for c in phenotype.dictionary.to_pylist()], np.int64)
        values = np.full((len(names), n), np.nan)
        for i, name in enumerate(names):
            values[i] = batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
        if (np.abs(values) > _LARGEST).any():
            raise DataError(f"measurements above {_LARGEST:g} cannot be written as GeoJSON")
        data, offsets = bytes_of(batch["outline"])
        # A corner of 16 bytes takes at most 32 characters, the head of a ring of 4 bytes 3, and
        # that of a polygon of 9 bytes 3.
        size = 2 * int(offsets[-1] - offsets[0]) + frame * n
        buffer = np.empty(size, np.uint8)
        used = _features(
            buffer,
            after,
            data,
            offsets,
            np.empty(2 + int(np.diff(offsets).max()) // 8, "<f8"),
            order[phenotype.indices.to_numpy()],
            kinds_packed,
            kind_offsets,
            values,
            keys,
            key_offsets,
        )
        if used < 0:
            raise DataError(
                f"outline of cell {batch['cell_id'][-1 - used]} is no polygon (WKB) with "
                f"coordinates up to {_LARGEST_COORDINATE:g}"
            )
        yield buffer[:used].data
        after = True


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _packed(texts: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    return np.frombuffer(b"".join(texts), np.uint8), offsets


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
def _put_coordinate(buffer, at, value):  # type: ignore[no-untyped-def]
    whole = np.int64(value)
    if whole == value and whole >= 0:
        return _put_integer(buffer, at, np.uint32(whole), 1)
    hundredths = np.int64(np.rint(abs(value) * 100))
    if value < 0 and hundredths > 0:
        buffer[at] = 45  # minus
        at += 1
    at = _put_integer(buffer, at, hundredths // 100, 1)
    if hundredths % 100:
        buffer[at] = 46  # point
        buffer[at + 1] = 48 + hundredths // 10 % 10
        at += 2
        if hundredths % 10:
            buffer[at] = 48 + hundredths % 10
            at += 1
    return at


@njit(cache=True, nogil=True)
def _put_again(buffer, at, before):  # type: ignore[no-untyped-def]
    # The number that starts there and ends with a comma or bracket.
    while buffer[before] != 44 and buffer[before] != 93:
        buffer[at] = buffer[before]
        at += 1
        before += 1
    return at


@njit(cache=True, nogil=True)
def _put_polygon(buffer, at, data, read, end, corners):  # type: ignore[no-untyped-def]
    # Ends of what was written and of what was read; the latter is -1 if it is no polygon.
    wrong = at, np.int64(-1)
    rings = get_head(data, read, end, 3)
    if rings < 1:
        return wrong
    read += 9
    buffer[at] = 91  # [
    at += 1
    for _ in range(rings):
        n = get_ring(data, read, end, corners)
        if n < 0:
            return wrong
        read += 4 + 16 * n
        buffer[at] = 91
        at += 1
        new_x = new_y = at
        for i in range(n):
            x, y = corners[2 * i], corners[2 * i + 1]
            if not (abs(x) <= _LARGEST_COORDINATE and abs(y) <= _LARGEST_COORDINATE):
                return wrong
            # Along pixel edges every corner shares a coordinate with the one before.
            old_x, old_y = new_x, new_y
            buffer[at] = 91
            new_x = at + 1
            if i > 0 and x == corners[2 * i - 2]:
                at = _put_again(buffer, new_x, old_x)
            else:
                at = _put_coordinate(buffer, new_x, x)
            buffer[at] = 44  # ,
            new_y = at + 1
            if i > 0 and y == corners[2 * i - 1]:
                at = _put_again(buffer, new_y, old_y)
            else:
                at = _put_coordinate(buffer, new_y, y)
            buffer[at] = 93  # ]
            buffer[at + 1] = 44
            at += 2
        buffer[at - 1] = 93
        buffer[at] = 44
        at += 1
    buffer[at - 1] = 93
    return at, read


@njit(cache=True, nogil=True)
def _features(  # type: ignore[no-untyped-def]
    buffer,
    after,
    data,
    offsets,
    corners,
    phenotypes,
    kinds,
    kind_offsets,
    values,
    keys,
    key_offsets,
):
    # Number of bytes written; minus one minus the cell whose outline is no polygon.
    at = 0
    for cell in range(len(phenotypes)):
        if cell > 0 or after:
            at = _put(buffer, at, b",")
        read, end = np.int64(offsets[cell]), np.int64(offsets[cell + 1])
        pieces = get_head(data, read, end, 6)
        if pieces < 0:
            at = _put(
                buffer, at, b'\n{"type":"Feature","geometry":{"type":"Polygon","coordinates":'
            )
            at, read = _put_polygon(buffer, at, data, read, end, corners)
        else:
            at = _put(
                buffer, at, b'\n{"type":"Feature","geometry":{"type":"MultiPolygon","coordinates":['
            )
            read = read + 9 if pieces > 0 else np.int64(-1)
            for _ in range(pieces):
                at, read = _put_polygon(buffer, at, data, read, end, corners)
                if read < 0:
                    break
                at = _put(buffer, at, b",")
            buffer[at - 1] = 93
        if read != end:
            return -1 - cell
        at = _put(buffer, at, b'},"properties":{"objectType":"detection","classification":')
        kind = phenotypes[cell]
        at = _put(buffer, at, kinds[kind_offsets[kind] : kind_offsets[kind + 1]])
        at = _put(buffer, at, b',"measurements":{')
        some = False
        for m in range(len(values)):
            if np.isfinite(values[m, cell]):
                at = _put(buffer, at, keys[key_offsets[m] : key_offsets[m + 1]])
                at = _put_number(buffer, at, values[m, cell])
                at = _put(buffer, at, b",")
                some = True
        at = _put(buffer, at - some, b"}}}")
    return at
