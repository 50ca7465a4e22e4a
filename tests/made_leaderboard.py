"""A leaderboard with everything on it: many systems, failures, classes, domains, published rows."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from celltyper.benchmark.leaderboard import Board, Comparison, Entry, Figure, Leaderboard
from celltyper.benchmark.published import Published
from celltyper.benchmark.running import State
from celltyper.benchmark.spec import Benchmark
from celltyper.metrics.bootstrap import PairedDifference
from celltyper.protocols.pooling import HEADLINE

SYSTEMS = (*(f"encoder{i}-with-a-rather-long-name-unetr" for i in range(7)), "uni-lora-dpt")
CLASSES = ("lymphocyte", "a phenotype with a name that is rather long")


def figure(value: float) -> Figure:
    return Figure(value, 0.02, value - 0.05, value + 0.05)


def figures(value: float) -> dict[str, Figure]:
    return {name: figure(value) for name in HEADLINE}


def board(dataset: str, values: dict[str, float]) -> Board:
    """Every score of a system is its value; half of it for classes, a little less by domain."""
    finished, stopped = State(3, 3, True, ""), State(1, 3, False, "loss is nan at step 3; " * 9)
    entries = {}
    for i, (system, value) in enumerate(values.items()):
        state = stopped if i == 1 else finished
        entries[system] = Entry(
            system,
            f"{dataset}/{system}/base",
            state,
            figures(value),
            {name: {"typed_f1": figure(value / 2), "f1": figure(value / 2)} for name in CLASSES},
            [(share, figures(value * share**0.1)) for share in (0.01, 0.1, 1)],
            {domain: figures(value - 0.1 * k) for k, domain in enumerate(("crag", "dpath"))},
            "20 patients or fields",
            10 ** (5 + i),
            1000 * (i + 1),
            10.0 * (i + 1),
        )
    names = list(values)
    compared = [
        Comparison(a, b, 3, PairedDifference(values[a] - values[b], -1, 1, 0.01), 0.03)
        for a, b in itertools.pairwise(names)
    ]
    published = [
        Published(
            "UNI2-h & co, UNETR", dataset, "base", "", "macro_f1", 0.3014, "A study", "10.1/x"
        )
    ]
    return Board(
        dataset,
        "base",
        "",
        f"{dataset}, base",
        "cells",
        "macro_f1",
        CLASSES,
        entries,
        published,
        compared,
        1000,
    )


def made_leaderboard() -> Leaderboard:
    """Eight systems on one board, and the last of them on another."""
    values = dict(zip(SYSTEMS, np.linspace(0.5, 0.85, 8).round(3).tolist(), strict=True))
    datasets = {
        d: {"made": 0, "protocols": {"base": {"folds": 2}}} for d in ("Lizard", "PathoCell")
    }
    systems = {"unetr": {"recipe": "unetr"}}
    benchmark = Benchmark.model_validate(
        {"title": "A benchmark " + "x" * 60, "datasets": datasets, "systems": systems}
    )
    about = {"benchmark": benchmark.model_dump(mode="json"), "cells": [{}] * 9}
    boards = [board("Lizard", values), board("PathoCell", {SYSTEMS[7]: 0.3})]
    return Leaderboard(Path("out"), about, benchmark, boards)
