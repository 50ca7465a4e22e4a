"""Who computes on a processor of few cores: the network alone, or all else side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock

import torch

FEW = 4
"""Threads of the network up to which it computes alone: with more, those that have nothing to do
meanwhile are worth more than what others take from it."""

LONG = 0.2
"""Seconds of a batch from which on it is worth waiting for the others to finish."""


class Turns:
    """Keeps the work of a process apart where it would only share cores.

    The threads of a network meet after every layer. One that shares its core with a thread that
    decodes keeps all others waiting, so that a second of decoding costs more than a second.

    Attributes
    ----------
    block : Lock
        Held while the network runs over a block.
    """

    def __init__(self) -> None:
        self.block = Lock()
        self._changed = Condition()
        self._beside = self._waiting = 0
        self._alone = False
        self._seconds = 0.0  # of the last batch

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Time of a thread that reads, decodes or writes."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._alone)
            self._waiting -= 1
            self._beside += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._beside -= 1
                self._changed.notify_all()

    @contextmanager
    def network(self, device: torch.device) -> Iterator[None]:
        """Time of a batch."""
        few = device.type == "cpu" and torch.get_num_threads() <= FEW
        alone = few and self._seconds >= LONG
        if alone:
            with self._changed:
                # who waited for the last batch comes first, else it would wait for the whole block
                self._changed.wait_for(lambda: not self._waiting)
                self._alone = True
                self._changed.wait_for(lambda: not self._beside)
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds = time.monotonic() - started
            if alone:
                with self._changed:
                    self._alone = False
                    self._changed.notify_all()
