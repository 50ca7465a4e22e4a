"""Cells of a huge slide as GeoJSON in squares, each small enough to open in QuPath by itself."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from celltyper.atomic import make_folder
from celltyper.cells.geojson import HEAD, TAIL, features
from celltyper.cells.stream import alike
from celltyper.errors import ConfigError, DataError, RunError


def write_geojson_tiles(
    folder: str | Path,
    tables: pa.Table | Iterable[pa.Table],
    side: int,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Write cells as one GeoJSON file for every square of the slide.

    The file ``x0-y0.geojson`` has the cells whose centroids lie in ``x0 <= x < x0 + side`` and
    ``y0 <= y < y0 + side``, in the order of the tables, as `celltyper.cells.geojson.write_geojson`
    writes them; ``x0`` and ``y0`` are multiples of `side`. Squares without cells have no file.

    Parameters
    ----------
    folder : str or Path
        New or empty folder; it appears when all files are complete.
    tables : pyarrow.Table or iterable of them
        From `celltyper.cells.table.cells_table` or `celltyper.cells.stream.iter_cells`. Memory
        holds one at a time.
    side : int
        Of the squares, in pixels of the image or of the slide's full resolution.
    colors : mapping of str to str, optional
        Colors ``#rrggbb`` by phenotype, instead of those of the model or of `default_colors`.

    Raises
    ------
    ConfigError
        If the side is not positive, or colors are not of phenotypes or not ``#rrggbb``.
    DataError
        If the folder has files already or is not writable, the tables differ in columns or
        classes, there is none, or an outline is no polygon.
    RunError
        If the disk is full or writing fails otherwise.
    """
    folder = Path(folder)
    if side < 1:
        raise ConfigError(f"side of the squares must be at least 1 px, got {side}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder} is not an empty folder; remove it or choose another")
    temporary = folder.with_name(f".{secrets.token_hex(6)}.tmp.{folder.name}")
    make_folder(temporary)
    try:
        _write(temporary, tables, side, colors)
        temporary.replace(folder)
    except OSError as error:
        raise RunError(f"cannot write to folder {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    folder: Path,
    tables: pa.Table | Iterable[pa.Table],
    side: int,
    colors: Mapping[str, str] | None,
) -> None:
    begun: set[Path] = set()
    for table in alike(tables):
        if table.num_rows == 0:
            continue
        corners = np.stack([table[name].to_numpy() // side for name in ("y", "x")]).astype(np.int64)
        order = np.lexsort(corners[::-1])
        corners = corners[:, order]
        cells = table.take(order)
        starts = np.flatnonzero(np.diff(corners, axis=1, prepend=-1).any(axis=0))
        for start, stop in zip(starts, [*starts[1:], table.num_rows], strict=True):
            row, column = corners[:, start] * side
            path = folder / f"{column}-{row}.geojson"
            # There may be more squares than files that can be open at once.
            with path.open("ab") as file:
                if path not in begun:
                    file.write(HEAD)
                for text in features(cells.slice(start, stop - start), colors, after=path in begun):
                    file.write(text)
            begun.add(path)
    for path in begun:
        with path.open("ab") as file:
            file.write(TAIL)
            file.flush()
            os.fsync(file.fileno())
