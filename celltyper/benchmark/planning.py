"""What a benchmark takes: runs, time from measured steps, disk. Nothing is written."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from celltyper.atomic import make_folder, write_json
from celltyper.benchmark.running import make_data, state_of
from celltyper.benchmark.spec import Benchmark, Cell, cells_of
from celltyper.checkpoints import load_model, read_tensors
from celltyper.classification.config import PatchConfig
from celltyper.classification.model import build_embedder
from celltyper.classification.preparing import PatchParts, as_dataset, counts_of, open_labelled
from celltyper.classification.training import Embedded, fit_run, resolve_patches
from celltyper.config import Config, one_line
from celltyper.datasets import Dataset
from celltyper.devices import pick_device
from celltyper.parts import open_whole
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import read_patch
from celltyper.predict import predict_image
from celltyper.protocols.plan import PlannedRun, plan_runs
from celltyper.protocols.running import Seen, look_at
from celltyper.protocols.scores import SCORES_FILE
from celltyper.report.amounts import duration
from celltyper.runs import LAST_FILE
from celltyper.training import resolve, train

logger = logging.getLogger("celltyper")

_FEW, _MORE = 2, 8
"""Steps of the two trainings that are compared: what both do is not a step."""

_WINDOWS = 32
"""Windows on which patch mode is measured."""


class PlannedCell(NamedTuple):
    """What a cell takes; NaN where it could not be measured.

    Parameters
    ----------
    path : str
    runs, left : int
        In all, and not finished.
    step : float
        Seconds of an optimiser step, NaN for heads that are fitted at once.
    seconds : float
        Of all runs that are left, at most: none stops early.
    size : float
        Bytes of these runs.
    error : str
        Why it cannot be run, "" if it can.
    """

    path: str
    runs: int
    left: int
    step: float
    seconds: float
    size: float
    error: str = ""


class _Cost(NamedTuple):
    """Measured once for every system."""

    step: float
    per_unit: float
    """Seconds of the encoder, and what follows it, for a pixel or a window."""
    size: float
    """Bytes of a run."""


@dataclass
class _Known:
    """What was read and measured already."""

    images: dict[str, tuple[Dataset, Seen]] = field(default_factory=dict)
    patches: dict[str, PatchTable] = field(default_factory=dict)
    costs: dict[str, _Cost] = field(default_factory=dict)


def plan_benchmark(
    benchmark: Benchmark,
    file: Path,
    output: Path,
    *,
    data: Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
) -> list[PlannedCell]:
    """Say what is left to run of a benchmark, and what it takes.

    All data are read once. Of every system a few steps are trained, and an image is predicted.

    Parameters
    ----------
    benchmark, file, output, data, overrides, device, progress
        As in `celltyper.benchmark.running.run_benchmark`; `output` is not written to.

    Returns
    -------
    list of PlannedCell
        A cell that cannot be run, for its data or weights are not there, says why.

    Raises
    ------
    ConfigError
        For a wrong benchmark.
    """
    known, planned = _Known(), []
    pick_device(device)
    level = logger.level
    # what is trained to measure it is no news
    logger.setLevel(logging.WARNING)
    with ExitStack() as stack:
        stack.callback(logger.setLevel, level)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="celltyper-plan-"))
        cells = cells_of(benchmark, file, Path(folder), data=data, overrides=overrides)
        bar = tqdm(cells, desc="plan", unit="cell", disable=None if progress else True)
        for number, cell in enumerate(bar):
            try:
                make_data(cell)
                work = Path(folder) / f"measured{number}"
                planned.append(_planned(cell, output, known, work, device))
            except Exception as error:  # kept: one cell must not stop the others
                logger.debug("%s", cell.path, exc_info=True)
                nan = math.nan
                planned.append(PlannedCell(cell.path, 0, 0, nan, nan, nan, one_line(error)))
    return planned


def plan_text(planned: Sequence[PlannedCell], *, workers: int = 1) -> str:
    """Plan for a terminal.

    Parameters
    ----------
    planned : sequence of PlannedCell
    workers : int
        Processes among which cells are divided.

    Returns
    -------
    str
    """
    width = max(len("cell"), *(len(one.path) for one in planned))
    lines = [f"{'cell':{width}}  {'runs':>9}  {'step':>9}  {'time':>10}  {'disk':>8}"]
    for one in planned:
        if one.error:
            lines.append(f"{one.path:{width}}  {one.error}")
            continue
        runs = f"{one.left} of {one.runs}" if one.left < one.runs else f"{one.runs}"
        step = "-" if math.isnan(one.step) else f"{1000 * one.step:,.0f} ms"
        took = duration(one.seconds) if one.left else "-"
        lines.append(f"{one.path:{width}}  {runs:>9}  {step:>9}  {took:>10}  {_bytes(one.size):>8}")
    good = [one for one in planned if not one.error]
    seconds, size = sum(one.seconds for one in good), sum(one.size for one in good)
    longest = max((one.seconds for one in good), default=0.0)
    total = f"{sum(one.left for one in good)} runs to do, at most {duration(seconds)}"
    if workers > 1:
        # a cell is done by one process
        total += f", {duration(max(seconds / workers, longest))} in {workers} processes"
    lines += ["", f"{total}, {_bytes(size)} on disk"]
    if len(good) < len(planned):
        lines.append(f"{len(planned) - len(good)} of {len(planned)} cells cannot be run")
    lines.append("Measured: steps and predictions on this machine; not counted: early stops.")
    return "\n".join(lines)


def _planned(cell: Cell, output: Path, known: _Known, work: Path, device: str) -> PlannedCell:
    config = cell.config
    if isinstance(config, PatchConfig):
        return _planned_patches(cell, config, output, known, work, device)
    key = config.data.model_dump_json()
    if key not in known.images:
        whole = open_whole(config.data)
        known.images[key] = whole, look_at(whole, progress=False)
    whole, seen = known.images[key]
    seeds = cell.rules.seeds or (config.seed,)
    runs = plan_runs(cell.rules, config.data, whole, seen.counts, seeds, [""])
    left = _left(cell, output, runs)
    if not left:
        return PlannedCell(cell.path, len(runs), 0, math.nan, 0.0, 0.0)
    names = {n for run in runs for n in (*run.train, *run.val, *run.test)}
    config = resolve(config, whole, (seen.mpp[n] for n in sorted(names)))
    pixels = {n: _pixels(seen, n, config.data.mpp) for n in names}
    cost = known.costs.get(_system(config))
    if cost is None:
        cost = _measure_cells(config, whole, runs[0], pixels, work, device)
        known.costs[_system(config)] = cost
    looks = config.train.steps // config.train.validate_every
    seen_pixels = sum(
        looks * pixels[n] * (n in run.val) + pixels[n] * (n in run.test)
        for run in left
        for n in {*run.val, *run.test}
    )
    kept = config.encoder.cache * sum(pixels.values())
    seconds = len(left) * config.train.steps * cost.step + (seen_pixels + kept) * cost.per_unit
    return PlannedCell(cell.path, len(runs), len(left), cost.step, seconds, len(left) * cost.size)


def _planned_patches(
    cell: Cell, config: PatchConfig, output: Path, known: _Known, work: Path, device: str
) -> PlannedCell:
    key = config.data.model_dump_json()
    if key not in known.patches:
        known.patches[key] = open_labelled(config.data, progress=False)
    table = known.patches[key]
    config = resolve_patches(config, table)
    seeds = cell.rules.seeds or (config.seed,)
    whole = as_dataset(table, config.data)
    runs = plan_runs(cell.rules, config.data, whole, counts_of(table), seeds, [""])
    left = _left(cell, output, runs)
    if not left:
        return PlannedCell(cell.path, len(runs), 0, math.nan, 0.0, 0.0)
    cost = known.costs.get(_system(config))
    if cost is None:
        cost = _measure_patches(config, table, work, device)
        known.costs[_system(config)] = cost
    gradient = config.head.by_gradient
    # embeddings once for all runs; a network sees the test windows of every run
    windows = len(table) * config.view.symmetries
    if gradient:
        tested = sum(len(run.val) + len(run.test) for run in left)
        windows = len(table) + tested * config.view.symmetries
    steps = config.train.steps if gradient else 1
    seconds = len(left) * steps * cost.step + windows * cost.per_unit
    step = cost.step if gradient else math.nan
    return PlannedCell(cell.path, len(runs), len(left), step, seconds, len(left) * cost.size)


def _measure_cells(
    config: Config,
    whole: Dataset,
    run: PlannedRun,
    pixels: dict[str, float],
    work: Path,
    device: str,
) -> _Cost:
    """Train a few steps twice, and predict a test image after another."""
    make_folder(work)
    write_json(work / "split.json", {config.data.train: list(run.train[:2])})
    data = {"split": work / "split.json", "val_fraction": 0.0, "val": "val"}
    took = []
    for steps in (_FEW, _MORE):
        own = {"steps": steps, "validate_every": steps, "patience": None}
        small = config.model_copy(
            update={
                "data": config.data.model_copy(update=data),
                "train": config.train.model_copy(update=own),
            }
        )
        folder = train(small, work / f"steps{steps}", device=device, progress=False)
        took.append(float(read_tensors(folder / LAST_FILE)[1]["progress"]["seconds"]))
    model = load_model(folder, device=pick_device(device), allow_code=True)
    sample = whole[run.test[0]]
    for _ in range(2):  # the first one warms up
        started = time.monotonic()
        predict_image(
            model,
            sample.image,
            sample.mpp or whole.mpp or model.mpp,
            batch_size=config.infer.batch_size,
        )
        predicted = time.monotonic() - started
    return _Cost(
        max(0.0, took[1] - took[0]) / (_MORE - _FEW),
        predicted / pixels[run.test[0]],
        _size(folder),
    )


def _measure_patches(config: PatchConfig, table: PatchTable, work: Path, device: str) -> _Cost:
    """Embed some windows, and fit the head; by gradient, train a few steps twice."""
    embedder = build_embedder(config, pick_device(device))
    size, positive = config.data.size or 0, table.classes.index(str(config.data.positive))
    # as many of every class as there are
    order = np.argsort([np.sum(table.labels[:i] == k) for i, k in enumerate(table.labels)])
    some = table.take(np.sort(order[:_WINDOWS]))
    for _ in range(2):  # the first one warms up
        started = time.monotonic()
        windows = np.stack(
            [read_patch(some, i, size=size, mpp=config.data.mpp) for i in range(len(some))]
        )
        images = torch.from_numpy(windows).to(embedder.device).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            parts = torch.split(images, config.view.batch_size)
            found = torch.cat([embedder(part).float().cpu() for part in parts])
        per_window = (time.monotonic() - started) / len(some)
    took: list[float] = []
    gradient = config.head.by_gradient
    symmetries = 1 if gradient else config.view.symmetries
    # the fit of a head depends on how many cases there are, not on what they are
    fitted = some if gradient else table
    random = np.random.default_rng(0).normal(size=(len(fitted), symmetries, found.shape[1]))
    data = Embedded(fitted, random.astype(np.float32), embedder, size, positive)
    rows = PatchParts(np.arange(len(fitted)), np.arange(0))
    # the first one warms up
    for steps in (_FEW, _FEW, _MORE) if gradient else (_FEW,):
        own = config.model_copy(
            update={"train": config.train.model_copy(update={"steps": steps, "warmup": 0})}
        )
        folder = work / f"run{len(took)}"
        make_folder(folder)
        started = time.monotonic()
        options: dict[str, Any] = {"shared": True, "resume": False, "progress": False, "facts": {}}
        fit_run(own if gradient else config, data, rows, config.seed, folder, **options)
        took.append(time.monotonic() - started)
    step = max(0.0, took[-1] - took[-2]) / (_MORE - _FEW) if gradient else took[0]
    return _Cost(step, per_window, _size(folder))


def _left(cell: Cell, output: Path, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Runs that are not scored yet."""
    if not state_of(output, cell.path, cell.tests).planned:
        return list(runs)
    return [r for r in runs if not (output / cell.path / r.path / SCORES_FILE).is_file()]


def _system(config: Config | PatchConfig) -> str:
    """What decides the time of a step, as one string."""
    values = config.model_dump(mode="json")
    for key in ("root", "images", "split", "taxonomy", "reader", "classes", "positive"):
        values["data"].pop(key, None)
    return json.dumps(values, sort_keys=True)


def _pixels(seen: Seen, name: str, mpp: float | None) -> float:
    """Pixels of an image at the resolution of the model."""
    height, width = seen.shape[name]
    own = seen.mpp[name]
    return height * width * (own / mpp if own and mpp else 1.0) ** 2


def _size(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def _bytes(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} B"
