"""Many processes and machines: who dies is replaced, and the bytes are those of one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from gated_slides import (
    BLOCKS,
    OPTIONS,
    DeadlySource,
    GatedSource,
    finished,
    gated_slide,
)
from made_slides import PixelModel, PixelSource

import celltyper.wholeslide.running as running
import celltyper.wholeslide.sent as sending
from celltyper.errors import ConfigError, DataError, RunError
from celltyper.slides import Slide, whole_slide
from celltyper.wholeslide import cluster_pool, infer_slide, local_pool, make_plan, process_pool
from celltyper.wholeslide.plan import Block
from celltyper.wholeslide.sent import Sent
from celltyper.wholeslide.worker import Worker

TESTS = Path(__file__).parent
FILES = ("cells.parquet", "cells.geojson")


def run(out: Path, **options: Any) -> dict[str, Any]:
    slide = options.pop("slide", None) or gated_slide()
    model = options.pop("model", None) or PixelModel()
    return infer_slide(model, slide, out, whole_slide(slide), **OPTIONS, **options)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process finds."""
    out = tmp_path_factory.mktemp("alone")
    run(out)
    return out


def check_same(found: Path, alone: Path) -> None:
    for name in FILES:
        assert (found / name).read_bytes() == (alone / name).read_bytes()
    assert not (found / "work").exists()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@contextmanager
def in_the_middle(gate: Path, deed: Callable[[int], object]) -> Iterator[None]:
    """Do something when a process waits at the gate, with its number; then open it."""
    gate.mkdir()
    happened: list[int] = []
    over = threading.Event()

    def watch() -> None:
        try:
            while not over.wait(0.01):
                for file in gate.iterdir():
                    happened.append(int(file.name))
                    deed(happened[0])
                    return
        finally:
            shutil.rmtree(gate)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert happened


class Cluster:
    """A real scheduler and real workers, each a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = os.environ | {
            "PYTHONPATH": str(TESTS),
            "OMP_NUM_THREADS": "1",
        }
        file = folder / "scheduler.json"
        self.scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
            "--scheduler-file", str(file),
        )  # fmt: skip
        wait_for(file.exists)
        wait_for(file.read_text)
        self.address = json.loads(file.read_text())["address"]

    @property
    def workers(self) -> list[subprocess.Popen[bytes]]:
        return self.processes[1:]

    def worker(self) -> subprocess.Popen[bytes]:
        return self._start(
            "worker", self.address, "--no-nanny", "--nthreads", "2", "--no-dashboard",
            "--host", "127.0.0.1", "--local-directory", str(self.folder),
        )  # fmt: skip

    def ready(self, workers: int) -> None:
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=60)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *words],
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield made
    finally:
        made.end()


def test_cluster_finds_the_same_when_a_worker_dies(
    cluster: Cluster, alone: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"has no worker: start some with 'dask worker tcp://"):
        cluster_pool(cluster.address).__enter__()
    workers = {each.pid: each for each in (cluster.worker(), cluster.worker())}
    cluster.ready(2)
    gate = tmp_path / "gate"
    out = tmp_path / "out"
    with cluster_pool(cluster.address) as pool:
        assert pool.at_once() == 2 * 2 * 2
        killed: list[int] = []

        def kill(pid: int) -> None:
            workers[pid].kill()
            killed.append(workers[pid].wait())

        with in_the_middle(gate, kill):
            run(out, pool=pool, source=GatedSource(out, gate))
    assert killed == [-signal.SIGKILL]
    check_same(out, alone)


@pytest.mark.slow
def test_cluster_in_every_trouble(
    cluster: Cluster, alone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate, one, two, three = (tmp_path / name for name in ("gate", "one", "two", "three"))
    last = cluster.worker()
    with cluster_pool(cluster.address) as pool:

        def interrupt(_: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        with in_the_middle(gate, interrupt), pytest.raises(KeyboardInterrupt):
            run(one, pool=pool, source=GatedSource(one, gate))
        run(one, pool=pool, source=GatedSource(one, gate))
        check_same(one, alone)

        # the last one dies; another comes
        def exchange(_: object) -> None:
            for each in cluster.workers:
                each.kill()
            wait_for(lambda: "no worker left" in caplog.text)
            cluster.worker()

        with in_the_middle(gate, exchange):
            run(two, pool=pool, source=GatedSource(two, gate))
        assert last.wait() == -signal.SIGKILL
        check_same(two, alone)

        # a block that no worker survives; here one death is enough
        from distributed import Client

        with Client(cluster.address, set_as_default=False) as client:
            client.run_on_scheduler(_allow_no_failure)
        with pytest.raises(RunError, match=r"block 000\d-000\d: 1 Dask workers? died, .*memory"):
            run(three, pool=pool, source=DeadlySource())
        assert not (three / "cells.parquet").exists()

        # there is nobody but the scheduler, and then nobody
        caplog.clear()
        ending = threading.Thread(
            target=lambda: (
                wait_for(lambda: "no worker left" in caplog.text),
                cluster.scheduler.kill(),
            )
        )
        ending.start()
        with pytest.raises(RunError, match=r"connection to the Dask scheduler .* is lost; .* same"):
            run(three, pool=pool, source=GatedSource(three, gate))
        ending.join()


def _allow_no_failure(dask_scheduler: Any) -> None:
    dask_scheduler.allowed_failures = 0


# sent by value, so that the scheduler need not import this file
_allow_no_failure.__module__ = "__main__"


def test_no_scheduler_and_no_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_ANSWER", 0.5)
    with pytest.raises(ConfigError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 "):
        cluster_pool("tcp://127.0.0.1:9").__enter__()
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"needs Dask: pip install 'celltyper\[cluster\]'"):
        cluster_pool("tcp://127.0.0.1:9").__enter__()


def test_process_that_dies_loses_nothing(alone: Path, tmp_path: Path) -> None:
    gate, out = tmp_path / "gate", tmp_path / "out"
    source = GatedSource(out, gate)

    with process_pool(2) as pool:
        with (
            in_the_middle(gate, lambda pid: os.kill(pid, signal.SIGKILL)),
            pytest.raises(RunError, match=r"a worker process died, .* give the same command again"),
        ):
            run(out, pool=pool, source=source)
        kept = finished(out)
        assert len(kept) >= BLOCKS
        again: dict[Path, int] = {}
        # the pool works on, for the next slide of a cohort or the same
        with in_the_middle(gate, lambda _: again.update(finished(out))):
            run(out, pool=pool, source=source)
    assert kept.items() <= again.items()
    check_same(out, alone)
    assert not multiprocessing.active_children()


def members(group: int) -> list[psutil.Process]:
    """Living processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


@pytest.mark.parametrize(
    "kind", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_no_process_is_left_and_nothing_lost(
    alone: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    gate, out = tmp_path / "gate", tmp_path / "out"
    gate.mkdir()
    script = [sys.executable, str(TESTS / "gated_slides.py"), str(out), str(gate), "1"]
    start = {"start_new_session": True, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(script, **start) as process:
        try:
            wait_for(lambda: list(gate.iterdir()))
            assert len(members(process.pid)) > 1
            if kind == signal.SIGINT:
                os.killpg(process.pid, kind)
            else:
                process.send_signal(kind)
            said = process.communicate(timeout=60)[1]
            wait_for(lambda: not members(process.pid))
        finally:
            for each in members(process.pid):
                each.kill()
    assert process.returncode != 0
    # children say nothing
    assert said.count("Traceback") == (kind == signal.SIGINT), said
    assert not (out / "cells.parquet").exists()
    run(out)
    check_same(out, alone)


def worker_of(slide: Slide, folder: Path, **options: Any) -> Worker:
    plan = make_plan(PixelModel(), slide, whole_slide(slide), block=OPTIONS["block"])  # type: ignore[arg-type]
    parts: dict[str, Any] = {"model": PixelModel(), "source": PixelSource()} | options
    made = Worker(
        folder, plan, slide, whole_slide(slide), parts["model"], parts["source"], 4, 1, "fp32"
    )
    made.prepare()
    return made


def test_process_opens_slide_and_model_once_in_all_its_threads(tmp_path: Path) -> None:
    worker = worker_of(gated_slide(), tmp_path)
    sent = Sent.of(worker)
    packed = pickle.loads(pickle.dumps(sent))
    assert len(pickle.dumps(sent)) < 300_000
    assert packed.key == sent.key
    found: list[Worker] = []
    threads = [threading.Thread(target=lambda: found.append(packed.worker())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(each) for each in found}) == 1
    assert found[0] is not worker
    assert found[0].slide is not worker.slide
    # another run on the same slide is another, but one model is at work at a time
    other = Sent.of(worker).worker()
    assert other is not found[0]
    assert other._turns is found[0]._turns
    sending.leave(packed.key)
    assert found[0].stop.is_set()
    assert not other.stop.is_set()
    assert packed.worker() is not found[0]
    for key in list(sending._here):
        sending.leave(key)


def test_late_worker_does_not_undo_cells_whose_maps_are_gone(tmp_path: Path) -> None:
    worker = worker_of(gated_slide(), tmp_path)
    for block in worker.plan.blocks:
        worker.predict(block)
    block = worker.plan.blocks[5]
    found = worker.decode(block)
    assert found > 10
    for near in worker.plan.around(block):
        worker.forget(near)
    assert worker.decode(block) == 0
    assert pq.read_metadata(worker.cells_file(block)).num_rows == found


class Unlucky(PixelModel):
    """Fails two times, as where a network disk is away for a moment."""

    left = 2
    error: type[Exception] = RunError

    def forward(self, images: torch.Tensor, features: Any = None) -> dict[str, torch.Tensor]:
        if self.left:
            self.left -= 1
            raise self.error("Stale file handle")
        return super().forward(images, features)


def test_block_is_tried_again_where_disk_or_network_failed_but_not_wrong_input(
    alone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with local_pool() as pool:
        with pytest.raises(RunError, match="Stale file handle"):
            run(tmp_path, pool=pool, model=Unlucky())
        pool.repeats = 2
        wrong = Unlucky()
        wrong.error = DataError
        with pytest.raises(DataError):
            run(tmp_path, pool=pool, model=wrong)
        assert "tried again" not in caplog.text
        run(tmp_path, pool=pool, model=Unlucky())
    assert caplog.text.count("is tried again: Stale file handle") == 2
    check_same(tmp_path, alone)


class Bound:
    """What holds an open file and the like."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle an open file")


def test_what_cannot_be_sent_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with process_pool(2) as pool:
        with pytest.raises(ConfigError, match=r"pass source=ModelSource\(RUN"):
            run(tmp_path / "model", pool=pool)
        slide = gated_slide()
        slide._source.lent = Bound()  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=r"slide.tif: .*cannot be sent .*open file.*; open"):
            run(tmp_path / "slide", pool=pool, source=PixelSource(), slide=slide)
        assert not multiprocessing.active_children()


def test_worker_of_another_version_is_refused(tmp_path: Path) -> None:
    sent = replace(Sent.of(worker_of(gated_slide(), tmp_path)), version="0.0.1")
    with pytest.raises(ConfigError, match=r"the command was given with 0\.0\.1: install the same"):
        sent.predict(Block(0, 0))
