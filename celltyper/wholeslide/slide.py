"""One slide from its pixels to its cells: begun, gone on with after any interruption, finished."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm import tqdm

from celltyper import __version__
from celltyper.atomic import make_folder, write_json
from celltyper.cells.colors import default_colors
from celltyper.cells.geojson import write_geojson
from celltyper.cells.stream import CellsWriter, iter_cells
from celltyper.encoders.trainability import parameter_digest
from celltyper.errors import ConfigError
from celltyper.models import CellTyper
from celltyper.report.slide import write_slide_report
from celltyper.slides import Slide, TissueMask
from celltyper.wholeslide.plan import BLOCK, make_plan
from celltyper.wholeslide.running import Pool, local_pool, run_blocks
from celltyper.wholeslide.worker import MAPS_FOLDER, ModelSource, Worker

CELLS_FILE = "cells.parquet"
GEOJSON_FILE = "cells.geojson"
SLIDE_FILE = "slide.json"
REPORT_FILE = "report.html"
WORK_FOLDER = "work"
"""What is done so far; removed in the end."""
SLIDE_FILES = (CELLS_FILE, GEOJSON_FILE, SLIDE_FILE, REPORT_FILE)

_PLAN_FILE = "plan.json"
_LOCK_FILE = "lock"
_ENDS = 1 << 20
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
    precision: str = "fp32",
    keep_maps: bool = False,
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
        in 255ths.
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
        If the folder holds work on something else, or another process is at work in it.
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
    identity = {
        "celltyper": __version__,
        "model": _digest_of(model),
        "slide": _identity_of(slide),
        "settings": plan.facts | {"symmetries": turns, "precision": precision},
    }
    make_folder(output)
    work = output / WORK_FOLDER
    with _alone(output):
        known = _begin(output, identity, overwrite)
        if known is not None:
            return known
        worker = Worker(
            work, plan, slide, tissue, model, source, batch_size or model.batch_size, turns,
            precision,
        )  # fmt: skip
        worker.prepare()
        was_training = model.training
        model.eval()
        try:
            with (
                local_pool() if pool is None else nullcontext(pool) as place,
                tqdm(
                    total=int(plan.run.sum()),
                    desc=slide.name,
                    unit="tile",
                    disable=None if progress else True,
                    dynamic_ncols=True,
                ) as bar,
            ):
                run_blocks(worker, place, keep=keep_maps, progress=_show(bar, worker))
        finally:
            model.train(was_training)
        return _finish(output, worker, identity, keep_maps, started)


def _show(bar: tqdm[Any], worker: Worker) -> Any:
    """What tells the progress bar of tiles, blocks and cells; it begins with what is done."""
    plan = worker.plan
    done = [block for block in plan.blocks if worker.is_decoded(block)]
    cells = sum(worker.cells_in(block) for block in done)
    bar.update(sum(len(plan.tiles(b)) for b in plan.blocks if worker.is_predicted(b)))
    bar.unpause()
    first, start = bar.n, time.monotonic()

    def show(tiles: int, blocks: int, found: int) -> None:
        nonlocal cells
        cells += found
        seconds = max(time.monotonic() - start, 1e-9)
        speed = (bar.n + tiles - first) * plan.step**2 / 1e6 / seconds
        bar.set_postfix_str(f"{cells:,} cells, {speed:.1f} Mpx/s", refresh=False)
        bar.update(tiles)

    return show


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other processes out of the folder; the system frees the lock of a process that dies."""
    lock = FileLock(output / f".{_LOCK_FILE}", timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise ConfigError(f"another process is at work in {output}; wait for it") from None


def _begin(output: Path, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Take up what was begun with the same model, slide and settings, or begin.

    Gives the facts of a slide that is done already.
    """
    plan_file = output / WORK_FOLDER / _PLAN_FILE
    for file in (plan_file, output / SLIDE_FILE):
        if overwrite or not file.is_file():
            continue
        known = _read(file)
        made_by = known.get("identity", {}) if file.name == SLIDE_FILE else known
        changed = [what for key, what in _WHAT.items() if made_by.get(key) != identity[key]]
        if changed:
            raise ConfigError(
                f"{output} was begun with {' and '.join(changed)}; give another folder, or "
                "--overwrite to start over"
            )
        if file.name == SLIDE_FILE:
            return known
    if overwrite:
        for name in SLIDE_FILES:
            (output / name).unlink(missing_ok=True)
        for name in (WORK_FOLDER, MAPS_FOLDER):
            shutil.rmtree(output / name, ignore_errors=True)
    make_folder(plan_file.parent)
    if not plan_file.is_file():
        write_json(plan_file, identity)
    return None


def _finish(
    output: Path, worker: Worker, identity: dict[str, Any], keep_maps: bool, started: float
) -> dict[str, Any]:
    """Put the parts together, write what is made from them, and remove them."""
    model, slide, plan = worker.model, worker.slide, worker.plan
    assert model is not None
    colors = model.colors or default_colors(model.classes)
    counts: Counter[str] = Counter(dict.fromkeys(model.classes, 0))
    with CellsWriter(output / CELLS_FILE, renumber=True) as writer:
        writer.write(worker.no_cells())
        for block in plan.blocks:
            table = pq.read_table(worker.cells_file(block))
            writer.write(table)
            for each in pc.value_counts(table["phenotype"]).to_pylist():
                counts[each["values"]] += each["counts"]
    write_geojson(
        output / GEOJSON_FILE,
        iter_cells(output / CELLS_FILE),
        dict(zip(model.classes, colors, strict=True)),
    )
    facts: dict[str, Any] = {
        "celltyper": __version__,
        "name": slide.name,
        "path": slide.path,
        "format": slide.format,
        "width": slide.size[0],
        "height": slide.size[1],
        "mpp": None if slide.mpp is None else list(slide.mpp),
        "magnification": slide.magnification,
        "bounds": list(slide.bounds),
        "model": None if worker.source is None else worker.source.run,
        "model_mpp": model.mpp,
        "classes": list(model.classes),
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
        "seconds": round(time.monotonic() - started, 2),
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
    if keep_maps:
        shutil.rmtree(output / MAPS_FOLDER, ignore_errors=True)
        (worker.folder / MAPS_FOLDER).rename(output / MAPS_FOLDER)
    write_json(output / SLIDE_FILE, facts)
    shutil.rmtree(worker.folder)
    return facts


def _area_mm2(slide: Slide, tissue: TissueMask) -> float | None:
    return None if slide.mpp is None else tissue.pixels * slide.mpp[0] * slide.mpp[1] / 1e6


def _warnings(facts: dict[str, Any]) -> list[str]:
    found = []
    if facts["damaged"]:
        n = len(facts["damaged"])
        found.append(f"{n} damaged {'tile was' if n == 1 else 'tiles were'} taken for background")
    if not facts["tiles"]:
        found.append("no tissue was found: nothing was looked at")
    elif not facts["cells"]:
        found.append("no cell was found")
    if facts["mpp"] is None:
        found.append("the slide states no resolution: sizes in micrometres are unknown")
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({error}); pass --overwrite to start over") from error


def _digest_of(model: CellTyper) -> str:
    """SHA-256 of all weights, and of how maps become cells."""
    what = [parameter_digest(model), repr(model.instances), model.classes, model.mpp]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _identity_of(slide: Slide) -> dict[str, Any]:
    """What tells a slide from another: its size, its resolution, and the ends of its file."""
    found: dict[str, Any] = {
        "size": list(slide.size),
        "mpp": None if slide.mpp is None else list(slide.mpp),
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
