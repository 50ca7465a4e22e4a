"""Many slides, one after another: where their results go, and what came of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from celltyper.atomic import make_folder
from celltyper.calibration import threshold_of
from celltyper.checkpoints import load_model
from celltyper.datasets.resolution import check_mpp
from celltyper.devices import autocast, pick_device
from celltyper.errors import CelltyperError, ConfigError, DataError, RunError
from celltyper.index import read_index, write_index
from celltyper.inputs import Entry, find_slides, may_grow
from celltyper.library.shelf import find_model
from celltyper.models import pick_precision
from celltyper.outputs import (
    REPORT_FILE,
    TABLE_FILE,
    check_free,
    check_mixed,
    clear,
    is_done,
)
from celltyper.report.amounts import amount, duration
from celltyper.report.cohort import write_cohort_csv, write_cohort_report
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
from celltyper.wholeslide.embeddings import the_encoder
from celltyper.wholeslide.slide import check_begun

logger = logging.getLogger("celltyper")


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
    several = len(entries) > 1 or may_grow(inputs)
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
    threshold = threshold_of(model.calibration, model.classes, abstain)
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
