"""Many slides, one after another: which ones, where their results go, and what came of it."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from celltyper import __version__
from celltyper.atomic import make_folder, write_json
from celltyper.cells.colors import default_colors
from celltyper.checkpoints import load_model
from celltyper.datasets.images import IMAGE_SUFFIXES
from celltyper.errors import CelltyperError, ConfigError, DataError
from celltyper.predict import autocast, check_mpp, pick_device
from celltyper.readers.files import read_table
from celltyper.report.cohort import write_cohort_csv, write_cohort_report
from celltyper.runs import CONFIG_FILE, INDEX_FILE
from celltyper.slides import (
    Slide,
    TissueMask,
    open_slide,
    parse_region,
    read_mask,
    region_mask,
    tissue_mask,
    whole_slide,
)
from celltyper.wholeslide import (
    BLOCK,
    ModelSource,
    cluster_pool,
    infer_slide,
    process_pool,
)

logger = logging.getLogger("celltyper")

SLIDE_SUFFIXES = (
    ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".zarr",
)  # fmt: skip
"""Names of what is always a slide; TIFF, PNG and JPEG are one if they are large or pyramids."""
LARGE = 8192 * 8192
"""Pixels above which an image is worked on as a slide, in bounded memory."""
TABLE_FILE = "slides.csv"
REPORT_FILE = "report.html"
_COLUMNS = ("slide", "name", "mpp", "tissue", "region")


@dataclass(frozen=True)
class Entry:
    """One slide of a cohort.

    Parameters
    ----------
    path : str
        File, folder or URL.
    name : str
        Of its folder in the results; unique.
    mpp : float or None
        Micrometres per pixel, if not as the file says.
    tissue : str
        ``"auto"``, ``"all"``, or a file for `celltyper.slides.read_mask`.
    region : str or None
        ``x,y,width,height`` in pixels of the full resolution.
    """

    path: str
    name: str
    mpp: float | None = None
    tissue: str = "auto"
    region: str | None = None


def are_slides(inputs: Sequence[str | Path]) -> bool:
    """Whether inputs hold a slide: something that should not be loaded into memory at once."""
    return any(_is_slide(path) for path in _paths(inputs))


def find_slides(
    inputs: Sequence[str | Path],
    *,
    mpp: float | None = None,
    tissue: str = "auto",
    region: str | None = None,
) -> list[Entry]:
    """List slides of files, folders, patterns, URLs and tables.

    Parameters
    ----------
    inputs : sequence of str or Path
        A folder gives what lies right in it; a CSV has a column ``slide`` (paths, relative to the
        table) and may have ``name``, ``mpp``, ``tissue`` and ``region``, which go before the
        options.
    mpp, tissue, region
        For all of them, see `Entry`.

    Returns
    -------
    list of Entry
        In the order of the inputs.

    Raises
    ------
    DataError
        If something is missing, a folder or table holds no slide, or two have the same name.
    """
    general = Entry("", "", mpp, tissue, region)
    found: list[Entry] = []
    for text in (os.fspath(each) for each in inputs):
        if text.lower().endswith(".csv"):
            found += _of_table(Path(text), general)
        else:
            found += [replace(general, path=path, name=_name(path)) for path in _paths([text])]
    names: dict[str, str] = {}
    for entry in found:
        if names.setdefault(entry.name, entry.path) != entry.path:
            raise DataError(
                f"{names[entry.name]} and {entry.path} have the same name {entry.name!r}; rename "
                "one, or give names in the column 'name' of a CSV"
            )
    if not found:
        raise DataError("give at least one slide, folder or CSV of slides")
    return list({entry.name: entry for entry in found}.values())


def infer_slides(
    inputs: Sequence[str | Path],
    run: str | Path,
    output: str | Path,
    *,
    mpp: float | None = None,
    tissue: str = "auto",
    region: str | None = None,
    strict: bool = False,
    block: int = BLOCK,
    workers: int = 1,
    cluster: str | None = None,
    keep_maps: bool = False,
    device: str = "auto",
    batch_size: int | None = None,
    symmetries: int | None = None,
    precision: str = "fp32",
    overwrite: bool = False,
    encoder_weights: str | None = None,
    allow_code: bool = False,
    progress: bool = True,
) -> Path:
    """Find and type the cells of slides and write them.

    One slide is written straight into `output`, several into one folder each, beside a table and a
    page of them all, ``slides.csv`` and ``report.html``; ``infer.json``, written last, says what
    was done. The same call again does what is missing: slides that are done are left as they are.

    Parameters
    ----------
    inputs : sequence of str or Path
        See `find_slides`.
    run : str or Path
        Run folder or checkpoint.
    output : str or Path
        Folder to write to.
    mpp, tissue, region
        See `Entry`.
    strict : bool
        A damaged tile is an error, not background.
    workers : int
        Processes of this machine.
    cluster : str or None
        Address of a running Dask scheduler instead; its workers must see slides, model and
        `output` under the same paths.
    block, keep_maps, batch_size, symmetries, precision, overwrite
        See `celltyper.wholeslide.infer_slide`.
    device, encoder_weights, allow_code
        See `celltyper.infer`.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    Path
        The output folder.

    Raises
    ------
    DataError
        If a slide is missing, cannot be read or fails; the others are done first.
    ConfigError, CheckpointError
        For wrong input, before anything is written.
    KeyboardInterrupt
        If interrupted, saying how to go on.
    """
    output = Path(output)
    check_mpp(mpp)
    if workers < 1 or (workers > 1 and cluster):
        raise ConfigError("give --workers, 1 or more, or --cluster, not both")
    if (output / CONFIG_FILE).exists():
        raise ConfigError(f"{output} holds a run; give another folder for the cells")
    entries = find_slides(inputs, mpp=mpp, tissue=tissue, region=region)
    place = pick_device(device)
    autocast(place, precision)
    model = load_model(run, device=place, encoder_weights=encoder_weights, allow_code=allow_code)
    make_folder(output)
    source = ModelSource(str(Path(run).absolute()), device, encoder_weights, allow_code)
    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with _pool(workers, cluster) as pool:
        for entry in entries:
            folder = output if len(entries) == 1 else output / entry.name
            try:
                with open_slide(entry.path, mpp=entry.mpp, strict=strict) as slide:
                    facts = infer_slide(
                        model,
                        slide,
                        folder,
                        _tissue_of(entry, slide),
                        block=block,
                        batch_size=batch_size,
                        symmetries=symmetries,
                        precision=precision,
                        keep_maps=keep_maps,
                        overwrite=overwrite,
                        progress=progress,
                        pool=pool,
                        source=source,
                    )
            except KeyboardInterrupt:
                raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
            except CelltyperError as error:
                if len(entries) == 1:
                    raise
                logger.warning("skipped: %s", error)
                failed.append({"name": entry.name, "path": entry.path, "error": str(error)})
                continue
            done.append(facts | {"folder": "." if folder == output else entry.name})
    if len(entries) > 1:
        write_cohort_csv(output / TABLE_FILE, done, failed)
        write_cohort_report(output / REPORT_FILE, done, failed)
    write_json(
        output / INDEX_FILE,
        {
            "celltyper": __version__,
            "model": source.run,
            "classes": list(model.classes),
            "colors": list(model.colors or default_colors(model.classes)),
            "model_mpp": model.mpp,
            "device": str(place),
            "symmetries": symmetries or model.symmetries,
            "precision": precision,
            "images": [_index_entry(facts) for facts in done],
            "failed": failed,
        },
    )
    if failed:
        raise DataError(
            f"{len(failed)} of {len(entries)} slides failed, the first: {failed[0]['error']} "
            f"(all in {output / INDEX_FILE}; the other {len(done)} are done)"
        )
    return output


def _index_entry(facts: Mapping[str, Any]) -> dict[str, Any]:
    mpp = facts["mpp"]
    return {
        "name": facts["name"],
        "image": facts["path"],
        "folder": facts["folder"],
        "slide": True,
        "height": facts["height"],
        "width": facts["width"],
        "mpp": None if mpp is None else mpp[0],
        "cells": facts["cells"],
        "seconds": facts["seconds"],
    }


def _pool(workers: int, cluster: str | None) -> Any:
    if cluster:
        return cluster_pool(cluster)
    return process_pool(workers) if workers > 1 else nullcontext(None)


def _tissue_of(entry: Entry, slide: Slide) -> TissueMask:
    if entry.region is not None:
        if entry.tissue != "auto":
            raise ConfigError("give a region or a tissue mask, not both")
        return region_mask(parse_region(entry.region, slide), slide)
    if entry.tissue == "all":
        return whole_slide(slide)
    return tissue_mask(slide) if entry.tissue == "auto" else read_mask(entry.tissue, slide)


def _paths(inputs: Iterable[str | Path]) -> list[str]:
    """Files, folders that are slides, and URLs; folders and patterns are resolved."""
    found: list[str] = []
    for text in (os.fspath(each) for each in inputs):
        path = Path(text)
        if "://" in text or text.lower().endswith(".csv"):
            found.append(text)
        elif path.is_dir() and not _is_store(path):
            inside = sorted(p for p in path.iterdir() if _may_be_slide(p))
            if not inside:
                raise DataError(f"{path} holds no slide or image")
            found += map(str, inside)
        elif path.exists():
            found.append(text)
        elif glob.has_magic(text):
            matching = sorted(glob.glob(text))  # noqa: PTH207 - the pattern may be absolute
            if not matching:
                raise DataError(f"no file matches {text}")
            found += matching
        else:
            raise DataError(f"no such slide, image or folder: {path}")
    return found


def _is_store(path: Path) -> bool:
    """Whether a folder is a slide itself: OME-Zarr, or the files of one DICOM slide."""
    marks = ("zarr.json", ".zgroup", ".zattrs")
    return any((path / mark).is_file() for mark in marks) or any(path.glob("*.dcm"))


def _may_be_slide(path: Path) -> bool:
    known = path.suffix.lower() in (*SLIDE_SUFFIXES, *IMAGE_SUFFIXES)
    return not path.name.startswith(".") and (known if path.is_file() else _is_store(path))


def _is_slide(text: str) -> bool:
    path = Path(text)
    if "://" in text or text.lower().endswith(".csv") or path.is_dir():
        return True
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return True
    try:
        with open_slide(path) as slide:
            return len(slide.levels) > 1 or slide.size[0] * slide.size[1] > LARGE
    except DataError:
        return False


def _name(path: str) -> str:
    name = Path(path.split("?")[0].rstrip("/\\")).name
    for suffix in (".ome.tif", ".ome.tiff", ".ome.zarr"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return Path(name).stem


def _of_table(path: Path, general: Entry) -> list[Entry]:
    rows = read_table(path)
    if rows and "slide" not in rows[0]:
        raise DataError(
            f"{path}: no column 'slide'; columns are {', '.join(rows[0])}, known ones "
            f"{', '.join(_COLUMNS)}"
        )
    found = []
    for number, row in enumerate(rows, start=2):
        slide = row["slide"]
        if "://" not in slide:
            slide = str(path.parent / slide)
            if not Path(slide).exists():
                raise DataError(f"{path}: line {number}: no such slide: {slide}")
        try:
            mpp = float(row["mpp"]) if row.get("mpp") else general.mpp
            check_mpp(mpp)
        except (ValueError, DataError):
            raise DataError(
                f"{path}: line {number}: mpp {row['mpp']!r} is no number of micrometres per pixel"
            ) from None
        tissue = row.get("tissue") or general.tissue
        if tissue not in ("auto", "all"):
            tissue = str(path.parent / tissue)
        region = row.get("region") or general.region
        found.append(Entry(slide, row.get("name") or _name(slide), mpp, tissue, region))
    if not found:
        raise DataError(f"{path} names no slide")
    return found
