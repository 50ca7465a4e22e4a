"""Blocks through threads, processes or a cluster: maps first, cells where maps are there."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any, TypeVar

import torch

from celltyper.errors import CelltyperError, ConfigError, RunError
from celltyper.wholeslide.plan import Block
from celltyper.wholeslide.sent import Sent, leave
from celltyper.wholeslide.worker import Worker

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_PATIENCE = 0.2  # seconds until an interrupt is noticed
_ANSWER = 10.0  # seconds that a scheduler has to answer
_LOOK = 2.0  # seconds between looks at who works in a cluster
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
_GO_ON = "give the same command again: it goes on where it was"


class Pool:
    """Where blocks are worked on: threads of this process, which share its slide and model.

    Parameters
    ----------
    forward, cells : Executor
        For maps and for cells; may be the same.

    Attributes
    ----------
    shared : bool
        Whether it works in this process, on the very objects it is given.
    repeats : int
        How often a block is tried again where disk or network failed.
    """

    shared = True
    repeats = 0

    def __init__(self, forward: Executor, cells: Executor) -> None:
        self._forward = forward
        self._cells = cells

    def at_once(self) -> int:
        """How many blocks to have in work for maps: the next is read while one is predicted."""
        return 2

    def predict(self, task: Callable[[Item], Result], item: Item) -> Future[Result]:
        """Have the maps of a block made, or any other heavy work done."""
        return self._forward.submit(task, item)

    def decode(self, task: Callable[[Item], Result], item: Item) -> Future[Result]:
        """Have the cells of a block found."""
        return self._cells.submit(task, item)

    def lost(self, error: BaseException, name: str) -> CelltyperError | None:
        """What to tell of an error that is not of the work `name` but of those who did it."""
        del error, name
        return None

    def end(self) -> None:
        """Give up what is in work."""

    def leave(self, key: str) -> None:
        """Tell all who work on a slide that it is over, see `celltyper.wholeslide.sent`."""


class _Processes(Pool):
    shared = False

    def __init__(self, workers: int, threads: int | None) -> None:
        self._workers = workers
        self._threads = threads or max(1, (os.cpu_count() or 1) // workers)
        self._executor = self._start()

    def at_once(self) -> int:
        return self._workers + 1

    def predict(self, task: Callable[[Item], Result], item: Item) -> Future[Result]:
        # An interrupt is for the first process alone, which tells the others; so also while they
        # start and know nothing of it.
        with _without_interrupts():
            return self._executor.submit(task, item)

    decode = predict

    def lost(self, error: BaseException, name: str) -> CelltyperError | None:
        if not isinstance(error, BrokenProcessPool):
            return None
        self.end()
        self._executor = self._start()  # for the next one
        return RunError(
            f"a worker process died, perhaps for want of memory; {_GO_ON} (with fewer --workers "
            "or a smaller --batch-size)"
        )

    def end(self) -> None:
        processes: dict[int, Any] = dict(getattr(self._executor, "_processes", None) or {})
        for process in processes.values():
            process.terminate()
        self.close()

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._workers,
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._threads,),
        )


class _Cluster(Pool):
    shared = False
    repeats = 2

    def __init__(self, client: Any, address: str) -> None:
        self._client = client
        self._executor = client.get_executor(pure=False)
        self._address = address
        self._threads = 0
        self._looked = -_LOOK

    def workers(self) -> int:
        """How many threads work, as of now; says once if none does any more."""
        if time.monotonic() - self._looked < _LOOK:
            return self._threads
        before = self._threads
        # If the scheduler itself is lost, the futures tell.
        with suppress(OSError, TimeoutError):
            self._threads = sum(self._client.nthreads().values())
        self._looked = time.monotonic()
        if before and not self._threads:
            logger.warning(
                "the Dask scheduler at %s has no worker left; waiting for one to start (Ctrl-C "
                "ends, and nothing that is done is lost)",
                self._address,
            )
        return self._threads

    def at_once(self) -> int:
        return 2 * max(1, self.workers())

    def predict(self, task: Callable[[Item], Result], item: Item) -> Future[Result]:
        return self._submit("maps", task, item)

    def decode(self, task: Callable[[Item], Result], item: Item) -> Future[Result]:
        return self._submit("cells", task, item)

    def lost(self, error: BaseException, name: str) -> CelltyperError | None:
        from distributed.scheduler import KilledWorker

        if isinstance(error, KilledWorker):
            return RunError(
                f"{name}: {error.allowed_failures + 1} Dask workers died, one after "
                f"another, while they were at it or about to be, the last {_where(error)}, perhaps "
                f"for want of memory; {_GO_ON} (with more memory for a worker, fewer threads or a "
                "smaller --batch-size)"
            )
        if isinstance(error, CancelledError):
            return RunError(
                f"the connection to the Dask scheduler at {self._address} is lost; when it is "
                f"there again, {_GO_ON}"
            )
        if isinstance(error, ImportError):
            return RunError(
                f"a Dask worker lacks something ({error}): install the same celltyper wherever "
                "'dask worker' is started"
            )
        return None

    def leave(self, key: str) -> None:
        # A worker that hangs must not hold up an interrupt.
        asking = Thread(target=self._tell, args=(key,), daemon=True)
        asking.start()
        asking.join(_LOOK)

    def _submit(self, stage: str, task: Callable[[Item], Result], item: Item) -> Future[Result]:
        # As bytes, which say nothing to the scheduler: it would import all that a task names.
        packed = pickle.dumps(_OnNode(task, item))
        key = f"{stage}-{secrets.token_hex(8)}"
        future: Future[Result] = self._executor.submit(pickle.loads, packed, key=key)
        return future

    def _tell(self, key: str) -> None:
        with suppress(Exception):
            self._client.run(leave, key, on_error="ignore")


@contextmanager
def local_pool() -> Iterator[Pool]:
    """Threads of this process: one block with the model, the next one being read."""
    _give_memory_back()
    decoders = min(4, max(2, os.cpu_count() or 1))
    forward = ThreadPoolExecutor(2, "maps")
    cells = ThreadPoolExecutor(decoders, "cells")
    try:
        yield Pool(forward, cells)
    finally:
        forward.shutdown(cancel_futures=True)
        cells.shutdown(cancel_futures=True)


@contextmanager
def process_pool(workers: int, threads: int | None = None) -> Iterator[Pool]:
    """Processes of this machine, each with its own model and share of the processors.

    Parameters
    ----------
    workers : int
    threads : int or None
        Threads of a process; by default an even share of the processors.
    """
    pool = _Processes(workers, threads)
    try:
        yield pool
    except BaseException:
        pool.end()
        raise
    finally:
        pool.close()


@contextmanager
def cluster_pool(address: str) -> Iterator[Pool]:
    """Workers of a running Dask cluster; blocks of a worker that is lost go to another.

    Workers may come and go. While there is none it waits, and says so.

    Parameters
    ----------
    address : str
        Of the scheduler, such as ``tcp://10.0.0.1:8786``.

    Raises
    ------
    ConfigError
        If Dask is not installed, no scheduler answers, or it has no worker.
    """
    try:
        from distributed import Client
    except ImportError:
        raise ConfigError("--cluster needs Dask: pip install 'celltyper[cluster]'") from None
    try:
        client = Client(address, timeout=_ANSWER, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ConfigError(
            f"no Dask scheduler answers at {address} ({error}); start one with 'dask scheduler', "
            "and workers with 'dask worker ADDRESS'"
        ) from error
    with client:
        pool = _Cluster(client, address)
        if not pool.workers():
            raise ConfigError(
                f"the Dask scheduler at {address} has no worker: start some with "
                f"'dask worker {address}'"
            )
        yield pool


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
        Called with the tiles, blocks and cells done since the last call; in this process for
        every batch, elsewhere for every block.

    Raises
    ------
    ConfigError
        If slide or model cannot be sent to the processes of the pool.
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
    failures: Counter[tuple[str, Block]] = Counter()
    sent = None if pool.shared else Sent.of(worker)
    task = worker if sent is None else sent

    def ready(block: Block) -> bool:
        return not any(near in missing for near in plan.around(block))

    def predict(block: Block) -> None:
        running[pool.predict(task.predict, block)] = ("maps", block)

    def decode(block: Block) -> None:
        running[pool.decode(task.decode, block)] = ("cells", block)

    if pool.shared:
        worker.progress = lambda tiles: progress(tiles, 0, 0)
    block = plan.blocks[0] if plan.blocks else Block(0, 0)
    in_forward = 0
    try:
        for block in plan.blocks:
            if block in undecoded and ready(block):
                decode(block)
        while to_predict or running:
            at_once = pool.at_once()
            while to_predict and in_forward < at_once:
                block = to_predict.popleft()
                predict(block)
                in_forward += 1
            done, _ = wait(running, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
            for future in done:
                stage, block = running.pop(future)
                try:
                    result = future.result()
                except RunError as error:
                    failures[stage, block] += 1
                    if failures[stage, block] > pool.repeats:
                        raise
                    logger.warning("block %s is tried again: %s", block.name, error)
                    (predict if stage == "maps" else decode)(block)
                    continue
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
    except Exception as error:
        explained = pool.lost(error, f"block {block.name}")
        if explained is None:
            raise
        raise explained from error
    finally:
        worker.stop.set()
        for future in running:
            future.cancel()
        if sent is not None:
            pool.leave(sent.key)


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _give_memory_back()
    Thread(target=_end_with_parent, daemon=True).start()


def _give_memory_back() -> None:
    """Have glibc keep less of what is freed.

    By default every thread gets a heap of its own, and large arrays go there once one was freed:
    each heap keeps the largest block it ever saw, which is a third of all memory used.
    """
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, 16 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def _end_with_parent() -> None:
    # The queue of tasks is open at both ends in every worker: none would notice by itself.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _OnNode:
    """Is done where it is unpickled."""

    def __init__(self, task: Callable[[Item], Any], item: Item) -> None:
        self._call = task, item

    def __reduce__(self) -> Any:
        return _on_node, self._call


def _on_node(task: Callable[[Item], Result], item: Item) -> Result:
    """Work in a cluster, where an error is worth little without the name of the machine."""
    try:
        return task(item)
    except CelltyperError as error:
        raise type(error)(f"{error} (on {socket.gethostname()})") from error


def _where(error: Any) -> str:
    return str(getattr(error.last_worker, "address", "unknown"))
