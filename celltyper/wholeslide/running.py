"""Blocks through threads, processes or a cluster: maps first, cells where maps are there."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from celltyper.errors import ConfigError, RunError
from celltyper.wholeslide.plan import Block
from celltyper.wholeslide.worker import Worker

_PATIENCE = 0.2  # seconds until an interrupt is noticed


@dataclass(frozen=True)
class Pool:
    """Where blocks are worked on.

    Parameters
    ----------
    forward, cells : Executor
        For maps and for cells; may be the same.
    at_once : int
        Blocks in work for maps at a time: the next is read while one is with the model.
    shared : bool
        Whether it works in this process, on the very objects it is given.
    """

    forward: Executor
    cells: Executor
    at_once: int
    shared: bool


@contextmanager
def local_pool() -> Iterator[Pool]:
    """Threads of this process: one block with the model, the next one being read."""
    decoders = max(1, min(4, (os.cpu_count() or 2) // 2))
    forward = ThreadPoolExecutor(2, "maps")
    cells = ThreadPoolExecutor(decoders, "cells")
    try:
        yield Pool(forward, cells, 2, shared=True)
    finally:
        forward.shutdown(cancel_futures=True)
        cells.shutdown(cancel_futures=True)


@contextmanager
def process_pool(workers: int) -> Iterator[Pool]:
    """Processes of this machine, each with its own model and share of the processors."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    executor = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(threads,),
    )
    try:
        yield Pool(executor, executor, workers + 1, shared=False)
    except BaseException:
        _end(executor)
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def cluster_pool(address: str) -> Iterator[Pool]:
    """Workers of a running Dask cluster; tasks of a worker that is lost go to another.

    Parameters
    ----------
    address : str
        Of the scheduler, such as ``tcp://10.0.0.1:8786``.

    Raises
    ------
    ConfigError
        If Dask is not installed or no scheduler answers.
    """
    try:
        from distributed import Client
    except ImportError:
        raise ConfigError("--cluster needs Dask: pip install 'celltyper[cluster]'") from None
    try:
        client = Client(address, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        raise ConfigError(
            f"no Dask scheduler answers at {address} ({error}); start one with 'dask scheduler', "
            "and workers with 'dask worker ADDRESS'"
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            raise ConfigError(
                f"the Dask scheduler at {address} has no worker: start some with "
                f"'dask worker {address}'"
            )
        threads = sum(each["nthreads"] for each in client.scheduler_info()["workers"].values())
        executor = client.get_executor(retries=3, pure=False)
        yield Pool(executor, executor, 2 * threads, shared=False)


def run_blocks(
    worker: Worker, pool: Pool, *, keep: bool, progress: Callable[[int, int, int], None]
) -> None:
    """Do what is not done yet of a slide.

    Parameters
    ----------
    worker : Worker
        Prepared.
    pool : Pool
    keep : bool
        Keep the maps; otherwise those of a block are removed when no block needs them any more.
    progress : callable
        Called with the tiles, blocks and cells done since the last call.

    Raises
    ------
    DataError, RunError
        Of the first block that fails.
    KeyboardInterrupt
        If the user interrupts; blocks in work are given up between two batches.
    """
    plan = worker.plan
    undecoded = {block for block in plan.blocks if not worker.is_decoded(block)}
    needed = {near for block in undecoded for near in plan.around(block)}
    missing = {block for block in needed if not worker.is_predicted(block)}
    to_predict = deque(block for block in plan.blocks if block in missing)
    running: dict[Future[int], tuple[str, Block]] = {}

    def ready(block: Block) -> bool:
        return not any(near in missing for near in plan.around(block))

    def decode(block: Block) -> None:
        running[pool.cells.submit(Worker.decode, worker, block)] = ("cells", block)

    if pool.shared:
        worker.progress = lambda tiles: progress(tiles, 0, 0)
    for block in plan.blocks:
        if block in undecoded and ready(block):
            decode(block)
    in_forward = 0
    try:
        while to_predict or running:
            while to_predict and in_forward < pool.at_once:
                block = to_predict.popleft()
                running[pool.forward.submit(Worker.predict, worker, block)] = ("maps", block)
                in_forward += 1
            done, _ = wait(running, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
            for future in done:
                stage, block = running.pop(future)
                result = future.result()
                if stage == "maps":
                    in_forward -= 1
                    missing.discard(block)
                    progress(0 if pool.shared else result, 0, 0)
                    for near in plan.around(block):
                        if near in undecoded and ready(near):
                            decode(near)
                else:
                    undecoded.discard(block)
                    progress(0, 1, result)
                    if not keep:
                        for near in plan.around(block):
                            if not any(each in undecoded for each in plan.around(near)):
                                worker.forget(near)
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died, perhaps for want of memory; give the same command again: it "
            "goes on where it was (with fewer --workers or a smaller --batch-size)"
        ) from error
    finally:
        worker.stop.set()
        for future in running:
            future.cancel()


def _start_worker(threads: int) -> None:
    # An interrupt reaches the whole group of processes; the first one tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _end(executor: ProcessPoolExecutor) -> None:
    processes: dict[int, Any] = dict(getattr(executor, "_processes", None) or {})
    for process in processes.values():
        process.terminate()
