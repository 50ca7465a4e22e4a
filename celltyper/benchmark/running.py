"""Running a benchmark: every cell in turn, in processes or on a cluster; failures are kept."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from celltyper import __version__
from celltyper.atomic import is_draft, make_folder, write_json
from celltyper.benchmark import BENCHMARK_FILE
from celltyper.benchmark.further import further_file, type_further
from celltyper.benchmark.published import read_published
from celltyper.benchmark.spec import Benchmark, Cell, cells_of
from celltyper.classification.config import PatchConfig
from celltyper.config import Config, Section, one_line
from celltyper.devices import pick_device
from celltyper.errors import CelltyperError, ConfigError, DataError
from celltyper.library.files import PROTOCOL_FILE
from celltyper.made import write_made_cells, write_made_patches
from celltyper.protocols import run_patch_protocol, run_protocol
from celltyper.protocols.scores import SCORES_FILE
from celltyper.protocols.table import read_plan
from celltyper.runs import difference
from celltyper.wholeslide import cluster_pool, process_pool

logger = logging.getLogger("celltyper")

_PATIENCE = 0.5  # seconds until an interrupt is noticed
# training sets the state of a whole process; a Dask worker may have several threads
_TURN = threading.Lock()


@dataclass(frozen=True)
class State:
    """How far a cell is.

    Parameters
    ----------
    done, planned : int
        Runs whose test images are scored, and runs that there are to be; 0 of 0 before the first.
    finished : bool
        Whether nothing is left to do.
    error : str
        Why it stopped last, "" if it did not.
    """

    done: int
    planned: int
    finished: bool
    error: str


@dataclass(frozen=True)
class Job:
    """Runs cells, here or in another process.

    Parameters
    ----------
    output : Path
        Folder of the benchmark.
    device : str
    gpu : int or None
        The only one that the process is to see.
    progress : bool
    """

    output: Path
    device: str
    gpu: int | None = None
    progress: bool = False

    def __call__(self, cell: Cell) -> None:
        """Do what is left of a cell; what goes wrong is written beside its folder."""
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(self.gpu)
        with _TURN:
            run_cell(cell, self.output, device=self.device, progress=self.progress)


def run_benchmark(
    benchmark: Benchmark,
    file: Path,
    output: str | Path,
    *,
    data: Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    workers: int = 1,
    cluster: str | None = None,
    progress: bool = True,
) -> Path:
    """Run what is left of a benchmark.

    Cells that are finished stay, others go on where they were, and those that failed are tried
    again. A cell that fails does not stop the others.

    Parameters
    ----------
    benchmark : Benchmark
    file : Path
        Where it was read.
    output : str or Path
        Folder of the benchmark: ``benchmark.json``, and for every cell the folder of a protocol
        ``dataset/system/protocol`` with a file ``protocol.json`` beside it that says how it ended.
    data : Path or None
        Folder to which roots are relative; by default the working directory.
    overrides : sequence of str
        Assignments for every config.
    device : str
        See `celltyper.devices.pick_device`.
    workers : int
        Processes of this machine, one cell each; GPUs are dealt out among them.
    cluster : str or None
        Address of the scheduler of a Dask cluster, to be used instead.
    progress : bool
        Show progress bars on a terminal.

    Returns
    -------
    Path
        The folder, for `celltyper.benchmark.writing.report_benchmark`.

    Raises
    ------
    ConfigError, DataError
        For a wrong benchmark, or if a cell was run with another config, before anything is run.
    RunError
        If the connection to the cluster is lost.
    """
    output = Path(output)
    cells = cells_of(benchmark, file, output, data=data, overrides=overrides)
    published = [one for name in benchmark.published for one in read_published(file, name, cells)]
    if cluster is None:
        pick_device(device)
    check_output(output, cells)
    make_folder(output)
    about = {
        "celltyper": __version__,
        "benchmark": benchmark.model_dump(mode="json"),
        "cells": [
            {"dataset": c.dataset, "system": c.system, "protocol": c.protocol, **c.about()}
            for c in cells
        ],
        "published": [one._asdict() for one in published],
    }
    write_json(output / BENCHMARK_FILE, about)
    todo = [cell for cell in cells if not state_of(output, cell.path, cell.tests).finished]
    logger.info("%d of %d cells are finished", len(cells) - len(todo), len(cells))
    for cell in todo:
        make_data(cell)
    if cluster is not None:
        ended = _on_cluster(todo, Job(output.absolute(), device), cluster)
    elif workers > 1:
        ended = _in_processes(todo, output, device, workers)
    else:
        ended = _here(todo, Job(output, device, progress=progress))
    bar = tqdm(total=len(todo), desc="cells", unit="cell", disable=None if progress else True)
    with bar:
        for number, cell in enumerate(ended, 1):
            state = state_of(output, cell.path, cell.tests)
            bar.update()
            bar.clear()
            how = f"failed: {state.error}" if state.error else f"{state.done}/{state.planned} runs"
            logger.info("%d/%d %s: %s", number, len(todo), cell.path, how)
    return output


def run_cell(cell: Cell, output: Path, *, device: str, progress: bool) -> None:
    """Do what is left of a cell, and write how it ended.

    Parameters
    ----------
    cell : Cell
    output : Path
        Folder of the benchmark.
    device : str
    progress : bool
    """
    started = time.monotonic()
    folder = output / cell.path
    options: dict[str, Any] = {"device": device, "progress": progress}
    going: dict[str, Any] = {**options, "resume": True, "keep_going": True}
    try:
        if isinstance(cell.config, PatchConfig):
            run_patch_protocol(cell.config, cell.rules, folder, **going)
            # unless another process is still at some of the runs
            if state_of(output, cell.path).finished:
                type_further(folder, cell.tests, **options)
        else:
            run_protocol(cell.config, cell.rules, folder, **going)
    except Exception as error:  # kept: one cell must not stop the others
        logger.debug("%s", cell.path, exc_info=True)
        write_end(output, cell, started, error)
    else:
        write_end(output, cell, started)


def write_end(output: Path, cell: Cell, started: float, error: BaseException | None = None) -> None:
    """Write beside the folder of a cell what it was and how it ended."""
    about: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), **cell.about()}
    if error is not None:
        text = one_line(error) if isinstance(error, Exception) else str(error)
        known = isinstance(error, CelltyperError) and text
        about["error"] = text if known else f"{type(error).__name__}: {text}".rstrip(": ")
        about["traceback"] = "".join(traceback.format_exception(error))
    file = end_file(output, cell.path)
    make_folder(file.parent)
    write_json(file, about)


def end_file(output: Path, path: str) -> Path:
    """Where it is written how a cell ended: beside its folder."""
    return output / f"{path}.json"


def read_end(output: Path, path: str) -> dict[str, Any]:
    """What `write_end` wrote, empty before.

    Raises
    ------
    DataError
        If the file is damaged.
    """
    file = end_file(output, path)
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} is damaged ({one_line(error)}); delete it") from error


def state_of(output: Path, path: str, tests: Iterable[str] = ()) -> State:
    """How far a cell is, from what lies in its folder.

    Parameters
    ----------
    output : Path
        Folder of the benchmark.
    path : str
        Of the cell.
    tests : iterable of str
        Names of its further tests.

    Returns
    -------
    State
    """
    folder = output / path
    error = str(read_end(output, path).get("error", ""))
    if not (folder / PROTOCOL_FILE).is_file():
        return State(0, 0, finished=False, error=error)
    entries = read_plan(folder)["runs"]
    scored = [e for e in entries if (folder / e["path"] / SCORES_FILE).is_file()]
    missing = [
        name
        for e in scored
        for name in tests
        if e["fraction"] == 1 and not further_file(folder / e["path"], name).is_file()
    ]
    finished = len(scored) == len(entries) and not missing
    return State(len(scored), len(entries), finished, "" if finished else error)


def check_output(output: Path, cells: Sequence[Cell]) -> None:
    """Refuse a folder of something else, and cells that were run with another config."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give a folder for the benchmark")
    begun = (output / BENCHMARK_FILE).is_file()
    if output.is_dir() and not begun and not all(map(is_draft, output.iterdir())):
        raise ConfigError(f"{output} holds other files; give an empty or new folder")
    for cell in cells:
        was, now = read_end(output, cell.path), cell.about()
        if not was or not (output / cell.path / PROTOCOL_FILE).is_file():
            continue
        changed = _difference(was, now, cell)
        if changed:
            raise ConfigError(
                f"{output / cell.path} was run with another config ({changed}): delete this "
                "folder to run it anew, or give another -o"
            )


def _difference(was: dict[str, Any], now: dict[str, Any], cell: Cell) -> str:
    """What decides a cell and has changed, "" if nothing has."""
    kinds: dict[str, Section] = {"config": cell.config, "rules": cell.rules}
    for key, new in kinds.items():
        if was.get(key) != now[key]:
            try:
                return difference(type(new).model_validate(was.get(key)), new) or key
            except ValueError:
                return key
    return "made" if was.get("made") != now["made"] else ""


def make_data(cell: Cell) -> None:
    """Write made data; they are there after the first cell."""
    roots = [(cell.config.data.root, cell.made)]
    roots += [(test.root, test.made) for test in cell.tests.values()]
    for root, seed in roots:
        if root is not None and seed is not None:
            write = write_made_cells if isinstance(cell.config, Config) else write_made_patches
            write(root, seed)


def _here(todo: Sequence[Cell], job: Job) -> Iterator[Cell]:
    for cell in todo:
        logger.info("%s", cell.path)
        job(cell)
        yield cell


def _in_processes(todo: Sequence[Cell], output: Path, device: str, workers: int) -> Iterator[Cell]:
    """Cells as they end; each process has one at a time, so that the death of one is its own."""
    gpus = torch.cuda.device_count() if device == "auto" else 0
    share = max(1, (os.cpu_count() or 1) // workers)
    stopping = threading.Event()
    with ExitStack() as stack:
        pools = [stack.enter_context(process_pool(1, share)) for _ in range(workers)]
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(workers):
            free.put(slot)

        def work(cell: Cell) -> Cell:
            slot, started = free.get(), time.monotonic()
            try:
                job = Job(output, device, slot % gpus if gpus else None)
                pools[slot].predict(job, cell).result()
            except Exception as error:
                explained = None if stopping.is_set() else pools[slot].lost(error, cell.path)
                if explained is None:
                    raise
                write_end(output, cell, started, explained)
            finally:
                free.put(slot)
            return cell

        threads = ThreadPoolExecutor(workers)
        try:
            for future in as_completed([threads.submit(work, cell) for cell in todo]):
                yield future.result()
        except BaseException:
            stopping.set()
            threads.shutdown(wait=False, cancel_futures=True)
            for pool in pools:
                pool.end()
            raise
        threads.shutdown()


def _on_cluster(todo: Sequence[Cell], job: Job, address: str) -> Iterator[Cell]:
    """Cells as they end on the workers of a Dask cluster."""
    with cluster_pool(address) as pool:
        started = time.monotonic()
        running: dict[Future[None], Cell] = {pool.predict(job, cell): cell for cell in todo}
        try:
            while running:
                pool.at_once()  # says so if no worker is left
                done, _ = wait(running, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
                for future in done:
                    cell = running.pop(future)
                    try:
                        future.result()
                    except (Exception, CancelledError) as error:
                        explained = pool.lost(error, cell.path)
                        if explained is None or isinstance(error, CancelledError):
                            raise explained or error from error
                        write_end(job.output, cell, started, explained)
                    yield cell
        finally:
            for future in running:
                future.cancel()
