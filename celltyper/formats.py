"""Cells that inference found, for other programs: ``celltyper export --to``."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from celltyper.atomic import flush, make_folder
from celltyper.cells.geojson import write_geojson
from celltyper.cells.omezarr import Progress, thumbnail_size, write_ome_zarr
from celltyper.cells.scverse import write_anndata, write_spatialdata
from celltyper.cells.stream import iter_cells, write_csv
from celltyper.cells.tiles import write_geojson_tiles
from celltyper.errors import CelltyperError, ConfigError, DataError, RunError, unknown_name
from celltyper.index import INDEX_FILE, read_index
from celltyper.slides import open_slide
from celltyper.types import Image

logger = logging.getLogger("celltyper")

CELLS_FILE = "cells.parquet"
TILE = 8192
"""Side in pixels of the squares of ``geojson-tiles``: tens of thousands of cells each."""
_ROWS = 8192


class _Found(NamedTuple):
    """What inference found on one image or slide."""

    name: str
    image: str
    folder: str
    cells: Path
    height: int
    width: int


class _Format(NamedTuple):
    target: str
    """Name of the file, or of the folder of a store."""
    write: Callable[[Path, Sequence[_Found], Mapping[str, Any], tqdm[Any]], None]
    packages: tuple[str, ...] = ()
    store: bool = False
    together: bool = False
    """Whether all images go into one file."""


def export_cells(
    folder: str | Path,
    to: str | Sequence[str],
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write the cells that inference found in the formats of other programs.

    Every image or slide gets its own files, in a folder of its own if there are several, as
    inference wrote them; ``anndata`` is one file of them all. ``docs/formats.md`` describes the
    formats. Each file or store appears when it is complete.

    Parameters
    ----------
    folder : str or Path
        Output folder of `celltyper.infer`, of images or slides.
    to : str or sequence of str
        Formats: ``"geojson"``, ``"geojson.gz"``, ``"geojson-tiles"``, ``"csv"``, ``"ome-zarr"``,
        ``"spatialdata"``, ``"anndata"``.
    output : str or Path, optional
        Folder to write to; by default `folder`.
    overwrite : bool
        Replace what is there.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    ConfigError
        If a format is unknown, its packages are not installed, or something is there already;
        before anything is written.
    DataError
        If the folder holds no cells, or a table of them is damaged.
    RunError
        If the disk is full.
    """
    folder = Path(folder)
    names = list(dict.fromkeys([to] if isinstance(to, str) else to))
    for name in names:
        if name not in FORMATS:
            raise unknown_name("format of cells", name, FORMATS)
        missing = [p for p in FORMATS[name].packages if find_spec(p) is None]
        if missing:
            raise ConfigError(
                f"export to {name} needs {', '.join(missing)}: pip install 'celltyper[spatial]'"
            )
    if not names:
        raise ConfigError(f"give at least one format (known: {', '.join(FORMATS)})")
    found, facts = _read_results(folder)
    output = folder if output is None else Path(output)
    jobs: list[tuple[_Format, str, Path, Sequence[_Found]]] = []
    for name in names:
        form = FORMATS[name]
        if form.together:
            jobs.append((form, name, output / form.target, found))
        else:
            jobs += [
                (form, f"{f.name}: {name}", output / f.folder / form.target, [f]) for f in found
            ]
    for form, _, path, _ in jobs:
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} is there already; pass --overwrite or another folder")
        if path.exists() and path.is_dir() != form.store:
            what = "folder" if path.is_dir() else "file"
            raise ConfigError(f"cannot write {path}: a {what} of this name is there; remove it")
    for form, what, path, images in jobs:
        make_folder(path.parent)
        with tqdm(desc=what, disable=None if progress else True, dynamic_ncols=True) as bar:
            if form.store:
                with _new_folder(path) as work:
                    form.write(work, images, facts, bar)
            else:
                form.write(path, images, facts, bar)
    return [path for _, _, path, _ in jobs]


def _read_results(folder: Path) -> tuple[list[_Found], dict[str, Any]]:
    """What is in a folder that inference wrote, and facts about how it came about."""
    index, facts = folder / INDEX_FILE, read_index(folder)
    try:
        found = [
            _Found(
                str(entry["name"]),
                str(entry["image"]),
                str(entry["folder"]),
                folder / entry["folder"] / CELLS_FILE,
                int(entry["height"]),
                int(entry["width"]),
            )
            for entry in facts["images"]
        ]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise DataError(f"{index} is damaged ({error!r}); run infer again") from error
    if not found:
        raise DataError(f"{index} names no image; run infer again")
    known = {"version": facts.get("celltyper"), "model": facts.get("model")}
    known["model_mpp"] = facts.get("model_mpp")
    return found, {name: value for name, value in known.items() if value is not None}


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, not there yet; it becomes `path` if all goes well."""
    place = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    work, old = place / "new", place / "old"
    try:
        place.mkdir()
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                flush(file)
        if path.exists():
            path.rename(old)
        work.rename(path)
    except OSError as error:
        raise RunError(
            f"cannot write {path.name} to folder {path.parent}: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _tables(found: _Found, bar: tqdm[Any]) -> Iterator[pa.Table]:
    bar.unit = "cell"
    for table in iter_cells(found.cells, rows=_ROWS, embeddings=False):
        yield table
        bar.update(table.num_rows)


def _parts(bar: tqdm[Any]) -> Progress:
    bar.unit = "part"

    def show(done: int, parts: int) -> None:
        bar.total = parts
        bar.update(done - bar.n)

    return show


def _geojson(path: Path, images: Sequence[_Found], _: Mapping[str, Any], bar: tqdm[Any]) -> None:
    write_geojson(path, _tables(images[0], bar))


def _geojson_tiles(
    path: Path, images: Sequence[_Found], _: Mapping[str, Any], bar: tqdm[Any]
) -> None:
    write_geojson_tiles(path, _tables(images[0], bar), TILE)


def _csv(path: Path, images: Sequence[_Found], _: Mapping[str, Any], bar: tqdm[Any]) -> None:
    write_csv(path, _tables(images[0], bar))


def _ome_zarr(path: Path, images: Sequence[_Found], _: Mapping[str, Any], bar: tqdm[Any]) -> None:
    found = images[0]
    write_ome_zarr(
        path,
        found.cells,
        found.height,
        found.width,
        name=found.name,
        thumbnail=_thumbnail(found),
        progress=_parts(bar),
    )


def _spatialdata(
    path: Path, images: Sequence[_Found], facts: Mapping[str, Any], bar: tqdm[Any]
) -> None:
    found = images[0]
    write_spatialdata(
        path,
        found.cells,
        found.height,
        found.width,
        name=found.name,
        facts=facts,
        progress=_parts(bar),
    )


def _anndata(path: Path, images: Sequence[_Found], facts: Mapping[str, Any], _: tqdm[Any]) -> None:
    write_anndata(path, {found.name: found.cells for found in images}, facts)


def _thumbnail(found: _Found) -> Image | None:
    """The image or slide, smaller; None if it is no longer there."""
    try:
        with open_slide(found.image) as slide:
            if slide.size != (found.width, found.height):
                raise DataError(f"{found.image} is another image than inference read")
            return slide.thumbnail(max(thumbnail_size(found.height, found.width)))
    except CelltyperError as error:
        logger.warning("%s: no thumbnail beside the labels: %s", found.name, error)
        return None


FORMATS = {
    "geojson": _Format("cells.geojson", _geojson),
    "geojson.gz": _Format("cells.geojson.gz", _geojson),
    "geojson-tiles": _Format("cells.geojson.tiles", _geojson_tiles, store=True),
    "csv": _Format("cells.csv", _csv),
    "ome-zarr": _Format("cells.ome.zarr", _ome_zarr, store=True),
    "spatialdata": _Format(
        "cells.spatialdata.zarr", _spatialdata, ("spatialdata", "geopandas"), store=True
    ),
    "anndata": _Format("cells.h5ad", _anndata, ("anndata",), together=True),
}
"""By name."""
