"""Whose turn it is on few cores: a long batch of the network computes alone, nothing waits for a
short one, and nobody waits forever."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from threading import Event

import pytest
import torch

from celltyper.wholeslide import turns as module
from celltyper.wholeslide.turns import Turns

CPU = torch.device("cpu")
SOON = 0.1  # seconds in which what may begin has begun


class Visit:
    """A thread that takes a turn, and keeps it until it is told to go."""

    def __init__(self, threads: ThreadPoolExecutor, turn: AbstractContextManager[None]) -> None:
        self.inside, self._go = Event(), Event()
        self._done: Future[None] = threads.submit(self._stay, turn)

    def _stay(self, turn: AbstractContextManager[None]) -> None:
        with turn:
            self.inside.set()
            assert self._go.wait(10)

    def leave(self) -> None:
        self._go.set()
        self._done.result(10)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    """Of a network whose batches are long."""
    monkeypatch.setattr(module, "LONG", 0.0)
    return Turns()


def test_a_long_batch_waits_for_the_others_and_they_for_it(
    threads: ThreadPoolExecutor, turns: Turns
) -> None:
    first, second = (Visit(threads, turns.beside()) for _ in range(2))
    assert first.inside.wait(10)
    assert second.inside.wait(10)  # side by side
    network = Visit(threads, turns.network(CPU))
    first.leave()
    assert not network.inside.wait(SOON)
    late = Visit(threads, turns.beside())
    second.leave()
    assert network.inside.wait(10)
    assert not late.inside.wait(SOON)
    network.leave()
    assert late.inside.wait(10)
    late.leave()


def test_who_waited_for_a_batch_comes_before_the_next(
    threads: ThreadPoolExecutor, turns: Turns
) -> None:
    batch = Visit(threads, turns.network(CPU))
    assert batch.inside.wait(10)
    waiting = Visit(threads, turns.beside())
    assert not waiting.inside.wait(SOON)
    batch.leave()
    following = Visit(threads, turns.network(CPU))
    assert waiting.inside.wait(10)
    assert not following.inside.wait(SOON)
    waiting.leave()
    assert following.inside.wait(10)
    following.leave()


def test_an_error_ends_a_turn(threads: ThreadPoolExecutor, turns: Turns) -> None:
    for turn in (turns.beside(), turns.network(CPU)):
        with pytest.raises(ValueError, match="damaged"), turn:
            raise ValueError("damaged")
    network = Visit(threads, turns.network(CPU))
    assert network.inside.wait(10)
    network.leave()


@pytest.mark.parametrize("why", ["short", "elsewhere", "many cores"])
def test_nobody_waits_where_it_does_not_pay(
    threads: ThreadPoolExecutor, turns: Turns, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "short":
        monkeypatch.setattr(module, "LONG", 3600.0)
    if why == "many cores":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    beside = Visit(threads, turns.beside())
    assert beside.inside.wait(10)
    network = Visit(threads, turns.network(torch.device("cuda" if why == "elsewhere" else "cpu")))
    assert network.inside.wait(10)
    other = Visit(threads, turns.beside())
    assert other.inside.wait(10)
    for each in (beside, network, other):
        each.leave()
