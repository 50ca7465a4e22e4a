"""Many slides, one after another: which ones, where their results go, and what came of it."""

from __future__ import annotations

import glob
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from celltyper.atomic import make_folder
from celltyper.checkpoints import load_model
from celltyper.datasets.images import IMAGE_SUFFIXES
from celltyper.errors import CelltyperError, ConfigError, DataError, RunError
from celltyper.index import read_index, write_index
from celltyper.library.shelf import find_model
from celltyper.models import threshold_of
from celltyper.predict import autocast, check_mpp, pick_device, pick_precision
from celltyper.readers.files import read_table
from celltyper.report.amounts import amount, duration
from celltyper.report.cohort import write_cohort_csv, write_cohort_report
from celltyper.slides import (
    Slide,
    TissueMask,
    open_slide,
    parse_region,
    read_mask,
    region_mask,
    slide_name,
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
from celltyper.wholeslide.embeddings import the_encoder
from celltyper.wholeslide.folder import (
    REPORT_FILE,
    TABLE_FILE,
    check_free,
    check_mixed,
    clear,
    is_done,
)
from celltyper.wholeslide.slide import check_begun

logger = logging.getLogger("celltyper")

SLIDE_SUFFIXES = (
    ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".zarr",
)  # fmt: skip
"""Names of what is always a slide; TIFF, PNG and JPEG are one if they are large or pyramids."""
LARGE = 8192 * 8192
"""Pixels above which an image is worked on as a slide, in bounded memory."""
_TISSUE = ("auto", "all")
_COLUMNS = ("slide", "name", "mpp", "tissue", "region")
_REGION = re.compile(r"\s*\d+\s*(,\s*\d+\s*){3}")


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
    DataError, ConfigError
        If something is missing or wrong, a folder or table holds no slide, two have the same name,
        or a mask of one slide is given for several.
    """
    general = Entry("", "", mpp, tissue, region)
    found: list[Entry] = []
    tables = 0
    for text in (os.fspath(each) for each in inputs):
        if text.lower().endswith(".csv"):
            found += _of_table(Path(text), general)
            tables += 1
        else:
            found += [replace(general, path=path, name=slide_name(path)) for path in _paths([text])]
    if tables < len(inputs):
        _check_place(general)
    entries: dict[str, Entry] = {}
    for entry in found:
        other = entries.setdefault(entry.name, entry)
        if replace(other, path=_absolute(other)) != replace(entry, path=_absolute(entry)):
            raise DataError(
                f"{other.path} and {entry.path} have the same name {entry.name!r}; rename one, or "
                "give names in the column 'name' of a CSV"
            )
    if not found:
        raise DataError("give at least one slide, folder or CSV of slides")
    if len(entries) > 1 and tissue not in _TISSUE:
        raise ConfigError(
            f"{tissue} shows the tissue of one slide, and these are {len(entries)}; give a CSV "
            "with the columns 'slide' and 'tissue'"
        )
    return list(entries.values())


def infer_slides(
    inputs: Sequence[str | Path],
    run: str | Path | None,
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
    embeddings: bool = False,
    abstain: float | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    symmetries: int | None = None,
    precision: str | None = None,
    overwrite: bool = False,
    encoder_weights: str | None = None,
    allow_code: bool = False,
    progress: bool = True,
) -> Path:
    """Find and type the cells of slides and write them.

    One slide is written straight into `output`; several, and those of a folder, pattern or table,
    into one folder each, beside a table and a page of them all, ``slides.csv`` and
    ``report.html``; ``infer.json``, written last, says what was done. The same call again does
    what is missing: slides that are done are left as they are.

    Parameters
    ----------
    inputs : sequence of str or Path
        See `find_slides`.
    run : str, Path or None
        See `celltyper.infer`.
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
    block, keep_maps, embeddings, abstain, batch_size, symmetries, precision, overwrite
        See `celltyper.wholeslide.infer_slide`.
        On a cluster, whose workers may differ, `precision` is fp32 unless given.
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
        If a slide is missing, or one alone cannot be read.
    RunError
        If some of several slides fail; the others are done first.
    ConfigError, CheckpointError
        For wrong input, before anything is written.
    KeyboardInterrupt
        If interrupted, saying how to go on.
    """
    output = Path(output)
    run = find_model(run)
    check_mpp(mpp)
    if workers < 1 or (workers > 1 and cluster):
        raise ConfigError("give --workers, 1 or more, or --cluster, not both")
    entries = find_slides(inputs, mpp=mpp, tissue=tissue, region=region)
    several = len(entries) > 1 or _may_grow(inputs)
    folders = [output / entry.name if several else output for entry in entries]
    check_free(output)
    if not overwrite:
        check_mixed(output, several)
    place = pick_device(device)
    if cluster:  # whose workers have devices of their own
        precision = precision or "fp32"
    elif precision is not None:
        autocast(place, precision)
    model = load_model(run, device=place, encoder_weights=encoder_weights, allow_code=allow_code)
    if precision is None:
        precision = pick_precision(model, None)
    if embeddings:
        the_encoder(model)
    threshold = threshold_of(model, abstain)
    if not overwrite:
        check_begun(
            model,
            folders,
            symmetries=symmetries,
            precision=precision,
            embeddings=embeddings,
            abstain=abstain,
        )
    weights = encoder_weights
    if weights is not None and Path(weights).exists():
        weights = str(Path(weights).absolute())
    source = ModelSource(str(run.absolute()), device, weights, allow_code)
    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    stale = overwrite
    try:
        with _pool(workers, cluster) as pool:
            for number, (entry, folder) in enumerate(zip(entries, folders, strict=True), start=1):
                before = is_done(folder) and not overwrite
                try:
                    with open_slide(entry.path, mpp=entry.mpp, strict=strict) as slide:
                        slide.name = entry.name
                        where = _tissue_of(entry, slide)
                        if stale:
                            clear(output)
                        stale = False
                        facts = infer_slide(
                            model,
                            slide,
                            folder,
                            where,
                            block=block,
                            batch_size=batch_size,
                            symmetries=symmetries,
                            precision=precision,
                            keep_maps=keep_maps,
                            embeddings=embeddings,
                            abstain=abstain,
                            overwrite=overwrite,
                            progress=progress,
                            pool=pool,
                            source=source,
                        )
                except ConfigError:
                    raise
                except Exception as error:
                    # whatever is the matter with one slide, hundreds of others may wait
                    if not several:
                        raise
                    reason = _one_line(error)
                    logger.warning("%d of %d: skipped: %s", number, len(entries), reason)
                    logger.debug("%s", entry.path, exc_info=True)
                    failed.append({"name": entry.name, "path": entry.path, "error": reason})
                    continue
                done.append(facts | {"name": entry.name, "folder": entry.name if several else "."})
                if not before:
                    for text in facts["warnings"]:
                        logger.warning("%s: %s", entry.name, text)
                if several:
                    known = ", done before" if before else f" in {duration(facts['seconds'])}"
                    logger.info("%d of %d: %s%s", number, len(entries), _found([done[-1]]), known)
                elif before:
                    logger.info("%s was done before; --overwrite does it again", entry.name)
    except KeyboardInterrupt:
        again = "the same command without --overwrite" if overwrite else "the same command"
        raise KeyboardInterrupt(f"stopped; {again} goes on where it was") from None
    if several:
        make_folder(output)
        write_cohort_csv(output / TABLE_FILE, done, failed)
        write_cohort_report(output / REPORT_FILE, done, failed)
    write_index(
        output,
        model,
        run=source.run,
        device=str(place),
        symmetries=symmetries or model.symmetries,
        precision=precision,
        threshold=threshold,
        images=[_index_entry(facts) for facts in done],
        failed=failed,
    )
    if failed:
        n = len(failed)
        raise RunError(
            f"{n} of {len(entries)} slides failed, the first: {failed[0]['error']} (all in "
            f"{output / REPORT_FILE}; {len(done)} are done; the same command tries again)"
        )
    return output


def summary_text(output: str | Path) -> str:
    """What was found on the slides of a folder that `infer_slides` wrote, on one line."""
    facts = read_index(output)
    slides = facts["images"]
    seconds = math.fsum(each["seconds"] for each in slides)
    return f"{_found(slides)} in {duration(seconds)}"


def _found(slides: Sequence[Mapping[str, Any]]) -> str:
    """Cells and tissue of slides: of the facts of each, or of its entry in the index."""
    name = slides[0]["name"] if len(slides) == 1 else f"{len(slides)} slides"
    cells = sum(each["cells"] for each in slides)
    areas = [_area_mm2(each) for each in slides]
    known = [area for area in areas if area is not None]
    where = ""
    if len(known) == len(areas):
        where = f" on {amount(math.fsum(known))} mm² of tissue"
    return f"{name}: {cells:,} cells{where}"


def _area_mm2(slide: Mapping[str, Any]) -> float | None:
    area: float | None = slide["tissue"]["area_mm2"] if "tissue" in slide else slide["tissue_mm2"]
    return area


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, CelltyperError) else f"{type(error).__name__}: {text}"


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
        "tissue_mm2": _area_mm2(facts),
        "cells": facts["cells"],
        "domain": facts.get("domain"),
        "seconds": facts["seconds"],
    }


def _pool(workers: int, cluster: str | None) -> Any:
    if cluster:
        return cluster_pool(cluster)
    return process_pool(workers) if workers > 1 else nullcontext(None)


def _tissue_of(entry: Entry, slide: Slide) -> TissueMask:
    if entry.region is not None:
        try:
            return region_mask(parse_region(entry.region, slide), slide)
        except ConfigError as error:
            # of this slide: the others may be larger
            raise DataError(f"{entry.path}: {error}") from None
    if entry.tissue == "all":
        return whole_slide(slide)
    return tissue_mask(slide) if entry.tissue == "auto" else read_mask(entry.tissue, slide)


def _check_place(entry: Entry) -> None:
    """Refuse what can be told to be wrong before a slide is opened."""
    if entry.region is not None:
        if entry.tissue != "auto":
            raise ConfigError("give a region or where the tissue is, not both")
        if not _REGION.fullmatch(entry.region):
            raise ConfigError(
                f"region {entry.region!r}: give x,y,width,height in pixels of the full resolution, "
                "such as 2000,1000,4096,4096"
            )
    if entry.tissue not in _TISSUE and not Path(entry.tissue).is_file():
        raise DataError(
            f"{entry.tissue}: no such file; give auto, all, a mask image or a GeoJSON of QuPath"
        )


def _paths(inputs: Iterable[str | Path]) -> list[str]:
    """Files, folders that are slides, and URLs; folders and patterns are resolved."""
    found: list[str] = []
    for text in (os.fspath(each) for each in inputs):
        path = Path(text)
        if "://" in text or text.lower().endswith(".csv"):
            found.append(text)
        elif path.is_dir() and not _is_store(path):
            # datasets have their images one further down
            place = path / "images" if (path / "images").is_dir() else path
            inside = sorted(p for p in place.iterdir() if _may_be_slide(p))
            if not inside:
                raise DataError(
                    f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}) and no slide; a "
                    f"pattern such as '{path}/**/*.svs' looks into the folders in it"
                )
            found += map(str, inside)
        elif path.exists():
            found.append(text)
        elif glob.has_magic(text):
            # not Path.glob: the pattern may be absolute
            names = sorted(glob.glob(text, recursive=True))  # noqa: PTH207
            matching = [name for name in names if _may_be_slide(Path(name))]
            if not matching:
                raise DataError(f"no slide or image matches {text}")
            found += matching
        else:
            raise DataError(f"no such image or folder: {path}")
    return found


def _may_grow(inputs: Sequence[str | Path]) -> bool:
    """Whether inputs name a place where more slides may come to be: folder, pattern or table."""
    for text in (os.fspath(each) for each in inputs):
        path = Path(text)
        if text.lower().endswith(".csv") or (path.is_dir() and not _is_store(path)):
            return True
        if "://" not in text and not path.exists():
            return True
    return False


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


def _absolute(entry: Entry) -> str:
    return entry.path if "://" in entry.path else str(Path(entry.path).absolute())


def _of_table(path: Path, general: Entry) -> list[Entry]:
    rows = read_table(path)
    if not rows:
        raise DataError(f"{path} names no slide")
    if "slide" not in rows[0]:
        raise DataError(
            f"{path}: no column 'slide'; columns are {', '.join(rows[0])}, known ones "
            f"{', '.join(_COLUMNS)}"
        )
    unused = [column for column in rows[0] if column not in _COLUMNS]
    if unused:
        logger.info("%s: not used: %s (known: %s)", path, ", ".join(unused), ", ".join(_COLUMNS))
    return [_of_row(path, number, row, general) for number, row in enumerate(rows, start=2)]


def _of_row(path: Path, number: int, row: Mapping[str, str], general: Entry) -> Entry:
    where = f"{path}: line {number}"
    slide = row["slide"]
    if not slide:
        raise DataError(f"{where}: names no slide")
    if "://" not in slide:
        slide = str(path.parent / slide)
        if not Path(slide).exists():
            raise DataError(f"{where}: no such slide: {slide}")
    name = row.get("name") or slide_name(slide)
    if name in (".", "..") or set(name) & set('/\\:*?"<>|'):
        raise DataError(f"{where}: name {name!r} cannot be that of a folder")
    try:
        mpp = float(row["mpp"]) if row.get("mpp") else general.mpp
        check_mpp(mpp)
    except (ValueError, DataError):
        raise DataError(
            f"{where}: mpp {row['mpp']!r} is no number of micrometres per pixel"
        ) from None
    tissue = row.get("tissue") or general.tissue
    if row.get("tissue") and tissue not in _TISSUE:
        tissue = str(path.parent / tissue)
    found = Entry(slide, name, mpp, tissue, row.get("region") or general.region)
    try:
        _check_place(found)
    except (ConfigError, DataError) as error:
        raise DataError(f"{where}: {error}") from None
    return found
