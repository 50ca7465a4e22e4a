"""One slide from its pixels to its cells: begun, gone on with after any interruption, finished."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from celltyper import __version__
from celltyper.atomic import is_draft, make_folder, write_json
from celltyper.calibration import ABSTAINED, threshold_of
from celltyper.cells.colors import UNTYPED, colors_of
from celltyper.cells.geojson import write_geojson
from celltyper.cells.stream import CellsWriter, iter_cells
from celltyper.domain import Distance
from celltyper.errors import ConfigError
from celltyper.library.cards import card_line
from celltyper.models import CellTyper, pick_precision
from celltyper.outputs import (
    CELLS_FILE,
    GEOJSON_FILE,
    LABELS_FILE,
    MAPS_FOLDER,
    PLAN_FILE,
    REPORT_FILE,
    SLIDE_FILE,
    WORK_FOLDER,
    alone,
    clear_folder,
    clear_work,
    is_done,
    is_slide,
)
from celltyper.report.amounts import amount
from celltyper.report.slide import write_slide_report
from celltyper.slides import Slide, TissueMask
from celltyper.tiling import Region
from celltyper.wholeslide.embeddings import the_encoder
from celltyper.wholeslide.plan import BLOCK, make_plan
from celltyper.wholeslide.running import Pool, local_pool, run_blocks
from celltyper.wholeslide.sent import Sent, digest_of
from celltyper.wholeslide.worker import ModelSource, Worker

UPSAMPLED = 1.5
"""Pixels of the model per pixel of the slide from which on the model misses details."""

_ENDS = 1 << 20
_LOOK = 1024
_SAME_MPP = 0.01
_CLOCK_FILE = "clock.json"
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_NAME = 16
_WHAT = {
    "model": "another model",
    "slide": "another slide",
    "settings": "other settings",
    "celltyper": "another version of celltyper",
}


def infer_slide(
    model: CellTyper,
    slide: Slide,
    output: str | Path,
    tissue: TissueMask,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    block: int = BLOCK,
    batch_size: int | None = None,
    symmetries: int | None = None,
    precision: str | None = None,
    keep_maps: bool = False,
    embeddings: bool = False,
    abstain: float | None = None,
    overwrite: bool = False,
    progress: bool = True,
    pool: Pool | None = None,
    source: ModelSource | None = None,
) -> dict[str, Any]:
    """Find, outline and type every cell of a slide.

    The slide is worked on in blocks, each of which is done or not: stopped at any moment, by
    whatever, the same call goes on where it was, and the result is the same to the last byte. Nor
    does it depend on the number of workers or the order of blocks; with another `block` the
    cells are the same, in another order.

    Written are ``cells.parquet``, ``cells.geojson`` and ``report.html``, and last ``slide.json``,
    what was done and found; see ``docs/outputs.md``.

    Parameters
    ----------
    model : CellTyper
    slide : Slide
    output : str or Path
        Folder of this slide alone.
    tissue : TissueMask
        Where to look: `celltyper.slides.tissue_mask`, `read_mask`, `region_mask` or
        `whole_slide`. Cells are kept whose centroid lies in it.
    tile, overlap, batch_size, symmetries, precision
        See `celltyper.predict.predict_maps`.
    block : int
        Side of a block in pixels, about. Memory follows from it.
    keep_maps : bool
        Keep the stitched maps as ``maps.zarr``: (C, H, W) at the model's resolution, probabilities
        in 255ths; and the encoder's features, if there are embeddings.
    embeddings : bool
        Give every cell the column ``embedding``: the encoder's last feature map at its centroid.
    abstain : float or None
        See `celltyper.predict_image`: cells below the threshold are "unknown".
    overwrite : bool
        Start over where another model or other settings were at work before, or it is done.
    progress : bool
        Show a progress bar on a terminal.
    pool : Pool or None
        Where the work is done, see `celltyper.wholeslide.running`; None is this process.
    source : ModelSource or None
        How other processes get the model, if `pool` has any.

    Returns
    -------
    dict
        What ``slide.json`` holds.

    Raises
    ------
    ConfigError
        If the folder holds work on something else, or another process is at work in it; an
        embedding is wanted of an ensemble whose models have different encoders; or the model knows
        no threshold for `abstain`.
    DataError
        If the slide states no resolution and the model needs one, or cannot be read.
    RunError
        If the disk is full.
    KeyboardInterrupt
        If interrupted; what is done is kept.
    """
    output = Path(output)
    started = time.monotonic()
    plan = make_plan(model, slide, tissue, tile=tile, overlap=overlap, block=block)
    turns = symmetries or model.symmetries
    precision = precision or pick_precision(model, None)
    if embeddings:
        the_encoder(model)
    threshold_of(model.calibration, model.classes, abstain)
    identity = {
        "celltyper": __version__,
        "model": digest_of(model),
        "slide": _identity_of(slide),
        "settings": plan.facts
        | {
            "symmetries": turns,
            "precision": precision,
            "embeddings": embeddings,
            "abstain": abstain,
            "keep_maps": keep_maps,
        },
    }
    worker = Worker(
        output / WORK_FOLDER, plan, slide, tissue, model, source, batch_size or model.batch_size,
        turns, precision, embeddings, abstain,
    )  # fmt: skip
    if pool is not None and not pool.shared:
        Sent.of(worker)  # refuses what cannot be sent before anything is written
    make_folder(output)
    with alone(output):
        known = _begin(output, identity, overwrite)
        if known is not None:
            return known
        worker.prepare()
        was_training = model.training
        model.eval()
        try:
            with (
                local_pool() if pool is None else nullcontext(pool) as place,
                tqdm(
                    total=int(plan.run.sum()),
                    desc=_short(slide.name),
                    bar_format=_BAR,
                    disable=None if progress else True,
                    dynamic_ncols=True,
                ) as bar,
            ):
                run_blocks(worker, place, keep=keep_maps, progress=_show(bar, worker))
                bar.set_postfix_str("writing tables")  # of millions of cells: a minute
                return _finish(output, worker, identity, started)
        finally:
            model.train(was_training)


def _show(bar: tqdm[Any], worker: Worker) -> Any:
    """What tells the progress bar of tiles, blocks and cells; it begins with what is done."""
    plan = worker.plan
    done = [block for block in plan.blocks if worker.is_decoded(block)]
    cells = sum(worker.cells_in(block) for block in done)
    before = sum(len(plan.tiles(b)) for b in plan.blocks if worker.is_predicted(b))
    # Tiles of an earlier session took no time in this one, for speed and time left.
    bar.initial = bar.n = bar.last_print_n = before
    bar.unpause()
    bar.refresh()
    start = time.monotonic()

    def show(tiles: int, blocks: int, found: int) -> None:
        nonlocal cells
        cells += found
        seconds = max(time.monotonic() - start, 1e-9)
        speed = (bar.n + tiles - before) * plan.step**2 / 1e6 / seconds
        number = f"{cells:,}" if cells < 100_000 else tqdm.format_sizeof(cells)
        bar.set_postfix_str(f"{number} cells, {amount(speed)} Mpx/s", refresh=False)
        bar.update(tiles)

    return show


def _short(name: str) -> str:
    """A name that leaves room for the rest of the line on a terminal of 80 columns."""
    half = _NAME // 2
    return name if len(name) <= _NAME else f"{name[:half]}…{name[half + 1 - _NAME :]}"


def check_begun(
    model: CellTyper,
    folders: Iterable[Path],
    *,
    symmetries: int | None,
    precision: str,
    embeddings: bool = False,
    abstain: float | None = None,
) -> None:
    """Refuse folders of slides with work of another model or with other settings, before any work.

    Raises
    ------
    ConfigError
        Naming the first of them.
    """
    begun = [folder for folder in folders if is_slide(folder)]
    if not begun:
        return
    identity = {
        "celltyper": __version__,
        "model": digest_of(model),
        "settings": {
            "symmetries": symmetries or model.symmetries,
            "precision": precision,
            "embeddings": embeddings,
            "abstain": abstain,
        },
    }
    for folder in begun:
        _known(folder, identity)


def _known(output: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``slide.json`` says of a slide that is done; work on something else is refused."""
    known = None
    for file in (output / WORK_FOLDER / PLAN_FILE, output / SLIDE_FILE):
        if not file.is_file():
            continue
        known = _read(file)
        done = file.name == SLIDE_FILE
        made_by = known.get("identity", {}) if done else known
        changed = [
            what
            for key, what in _WHAT.items()
            if key in identity and _differs(made_by.get(key), identity[key], done)
        ]
        if changed:
            raise ConfigError(
                f"{output} was begun with {' and '.join(changed)}; give another folder, or "
                "--overwrite to start over"
            )
    return known if is_done(output) else None


def _differs(known: Any, wanted: Any, done: bool) -> bool:
    """Whether what was known is not what is wanted now, as far as that is said."""
    if not (isinstance(known, dict) and isinstance(wanted, dict)):
        return bool(known != wanted)
    # maps that were kept are in nobody's way
    free = {"keep_maps"} if done and not wanted.get("keep_maps") else set()
    return any(known.get(key) != value for key, value in wanted.items() if key not in free)


def _begin(output: Path, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Take up what was begun with the same model, slide and settings, or begin.

    Gives the facts of a slide that is done already.
    """
    work = output / WORK_FOLDER
    if overwrite:
        clear_folder(output)
    elif (output / LABELS_FILE).is_file():
        raise ConfigError(f"{output} holds results of images; pass --overwrite or another folder")
    known = _known(output, identity)
    if known is not None:
        _tidy(output, known)
        return known
    if (output / SLIDE_FILE).is_file():
        # its table is gone: what was made from it is of no use
        clear_folder(output)
    if not (work / PLAN_FILE).is_file():
        if work.is_dir() and not all(map(is_draft, work.iterdir())):
            raise ConfigError(f"{work} is in the way; remove it or give another folder")
        make_folder(work)
        write_json(work / PLAN_FILE, identity)
    _start_clock(work)
    return None


def _start_clock(work: Path) -> None:
    """Note how long earlier sessions took, until the last block that was done in each."""
    clock, before = work / _CLOCK_FILE, 0.0
    if clock.is_file():
        known = _read(clock)
        last = max((each.stat().st_mtime for each in work.iterdir() if each.is_dir()), default=0.0)
        before = known["before"] + max(0.0, last - known["began"])
    write_json(clock, {"before": before, "began": time.time()})


def _finish(
    output: Path, worker: Worker, identity: dict[str, Any], started: float
) -> dict[str, Any]:
    """Put the parts together, write what is made from them, and remove them."""
    model, slide, plan = worker.model, worker.slide, worker.plan
    assert model is not None
    names, colors = model.classes, colors_of(model)
    if threshold_of(model.calibration, model.classes, worker.abstain):
        names, colors = (*names, ABSTAINED), (*colors, UNTYPED)
    distance = None if model.domain is None else model.domain.of_image(worker.distances())
    before = float(_read(worker.folder / _CLOCK_FILE)["before"])
    counts: Counter[str] = Counter(dict.fromkeys(names, 0))
    with CellsWriter(output / CELLS_FILE, renumber=True) as writer:
        writer.write(worker.no_cells())
        for block in plan.blocks:
            table = pq.read_table(worker.cells_file(block))
            writer.write(table)
            for each in pc.value_counts(table["phenotype"]).to_pylist():
                counts[each["values"]] += each["counts"]
    write_geojson(
        output / GEOJSON_FILE,
        iter_cells(output / CELLS_FILE, embeddings=False),
        dict(zip(model.classes, colors, strict=False)),
    )
    facts: dict[str, Any] = {
        "celltyper": __version__,
        "name": slide.name,
        "path": slide.path,
        "format": slide.format,
        "width": slide.size[0],
        "height": slide.size[1],
        "mpp": None if slide.mpp is None else list(slide.mpp),
        "stated_mpp": None if slide.stated_mpp is None else list(slide.stated_mpp),
        "magnification": slide.magnification,
        "bounds": list(slide.bounds),
        "model": None if worker.source is None else worker.source.run,
        "model_card": None if worker.source is None else card_line(Path(worker.source.run)),
        "model_mpp": model.mpp,
        "classes": list(names),
        "colors": list(colors),
        "tissue": {
            "source": worker.tissue.source,
            "area_mm2": _area_mm2(slide, worker.tissue),
            "threshold": worker.tissue.threshold,
        },
        "tiles": int(plan.run.sum()),
        "cells": sum(counts.values()),
        "counts": dict(counts),
        "damaged": [list(region) for region in worker.damaged()],
        "domain": None if distance is None else distance._asdict(),
        "seconds": round(before + time.monotonic() - started, 2),
        "settings": identity["settings"],
        "identity": {key: identity[key] for key in _WHAT},
    }
    # the same steps as from a file, from which a later call gives it back
    facts = dict(json.loads(json.dumps(facts)))
    facts["warnings"] = _warnings(facts)
    write_slide_report(
        output / REPORT_FILE,
        slide=slide,
        tissue=worker.tissue,
        cells=output / CELLS_FILE,
        facts=facts,
    )
    write_json(output / SLIDE_FILE, facts)
    _tidy(output, facts)
    return facts


def _tidy(output: Path, facts: dict[str, Any]) -> None:
    """Keep the maps if they are wanted, and remove what else is left of the work."""
    maps = output / WORK_FOLDER / MAPS_FOLDER
    if facts["settings"]["keep_maps"] and maps.is_dir():
        shutil.rmtree(output / MAPS_FOLDER, ignore_errors=True)
        maps.rename(output / MAPS_FOLDER)
    clear_work(output)


def _area_mm2(slide: Slide, tissue: TissueMask) -> float | None:
    return None if slide.mpp is None else tissue.pixels * slide.mpp[0] * slide.mpp[1] / 1e6


def _warnings(facts: dict[str, Any]) -> list[str]:
    found = []
    mpp, stated, model_mpp = facts["mpp"], facts["stated_mpp"], facts["model_mpp"]
    if mpp is None:
        found.append("The slide states no resolution: sizes in micrometres are unknown.")
    elif stated is None:
        found.append(f"{_um(mpp)} per pixel was given by hand: the file states none.")
    elif any(abs(own / other - 1) > _SAME_MPP for own, other in zip(mpp, stated, strict=True)):
        found.append(f"{_um(mpp)} per pixel was given by hand: the file states {_um(stated)}.")
    if mpp is not None and model_mpp is not None and max(mpp) > UPSAMPLED * model_mpp:
        found.append(
            f"The slide has {_um(mpp)} per pixel, the model works at {model_mpp:.4g} µm: the slide "
            f"was enlarged {max(mpp) / model_mpp:.1f} times and lacks the details it needs."
        )
    if facts["damaged"]:
        n = len(facts["damaged"])
        found.append(f"{n} damaged {'tile was' if n == 1 else 'tiles were'} taken for background.")
    if facts["domain"] is not None:
        found += [text for text in [Distance(**facts["domain"]).warning] if text]
    if not facts["tiles"]:
        found.append("There is no tissue: nothing was looked at.")
    elif not facts["cells"]:
        found.append("No cell was found.")
    return found


def _um(mpp: Sequence[float]) -> str:
    x, y = (f"{each:.4g}" for each in mpp)
    return f"{x} µm" if x == y else f"{x} x {y} µm"


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({error}); pass --overwrite to start over") from error


def _identity_of(slide: Slide) -> dict[str, Any]:
    """What tells a slide from another, whatever it is called: its size and its content.

    The resolution belongs to the settings: it may be given by hand.
    """
    found: dict[str, Any] = {
        "size": list(slide.size),
        "bounds": list(slide.bounds),
        "levels": [list(level) for level in slide.levels],
    }
    path = Path(slide.path)
    if path.is_file():
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_ENDS))
            found["bytes"] = file.seek(0, 2)
            file.seek(max(0, found["bytes"] - _ENDS))
            digest.update(file.read(_ENDS))
        found["ends"] = digest.hexdigest()
        return found
    # A store of many files, perhaps far away. Without a small level a look at all of it would take
    # as long as the work.
    width, height = slide.size
    if len(slide.levels) > 1:
        pixels = slide.thumbnail(min(_LOOK, max(slide.levels[-1][:2])))
    else:
        here = Region((height - _LOOK) // 2, (width - _LOOK) // 2, _LOOK, _LOOK)
        pixels = slide.read(here)
    found["pixels"] = hashlib.sha256(pixels.tobytes()).hexdigest()
    return found
