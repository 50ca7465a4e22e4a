"""The leaderboard: scores of every system on every board, and which differences are shown.

A board is a dataset in a protocol, or further patches that its models were tested on. Two systems
differ only if a paired bootstrap over patients says so after correction for all pairs of the board.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.benchmark import BENCHMARK_FILE
from celltyper.benchmark.drawing import draw_runs, figures_of_runs
from celltyper.benchmark.further import further_file
from celltyper.benchmark.published import Published
from celltyper.benchmark.running import State, state_of
from celltyper.benchmark.spec import SCORES, Benchmark
from celltyper.errors import DataError
from celltyper.library.files import RUN_FILE
from celltyper.metrics.bootstrap import PairedDifference, draw_weights, paired_interval
from celltyper.metrics.multiplicity import holm
from celltyper.metrics.ratios import mean_of_known
from celltyper.protocols.numerals import Figure as AnyFigure
from celltyper.protocols.patch_pooling import pool_runs, score_pooled
from celltyper.protocols.patch_table import drawn_scores, figures_of
from celltyper.protocols.patches import TypedPatches, read_typed
from celltyper.protocols.pooling import find_clusters
from celltyper.protocols.scores import SCORES_FILE
from celltyper.protocols.table import ScoredRun, load_run, read_plan

Values = NDArray[np.float64]
Key = tuple[str, int]
"""What runs of two systems have in common: the part that is tested, and the seed."""

LEVEL = 0.05
"""Corrected p-values below it are called a difference."""

PER_PAIR = 80
"""Resamples for every pair that is compared: 2 / 80 is the smallest p-value after correction."""


class Figure(NamedTuple):
    """A score over several runs; NaN where it is not known."""

    mean: float
    deviation: float
    low: float
    high: float


Figures = dict[str, Figure]


@dataclass(frozen=True)
class Entry:
    """What one system reached on a board, as far as its runs are finished.

    Parameters
    ----------
    system : str
    path : str
        Folder of its runs, inside that of the benchmark.
    state : State
    scores : dict of str to Figure
        Of the largest fraction of the training data, mean over domains; empty before the first
        run.
    per_class : dict of str to dict of str to Figure
        By class, then by score.
    fractions : list of (float, dict of str to Figure)
        Share of the training data that was reached and the scores, ascending.
    domains : dict of str to dict of str to Figure
        Scores by the domain that was left out, or that trained.
    clusters : str
        What was resampled for the intervals.
    parameters, trainable : int or None
        Of the model.
    seconds : float
        Training of a run, mean; NaN if not known.
    """

    system: str
    path: str
    state: State
    scores: Figures = field(default_factory=dict)
    per_class: dict[str, Figures] = field(default_factory=dict)
    fractions: list[tuple[float, Figures]] = field(default_factory=list)
    domains: dict[str, Figures] = field(default_factory=dict)
    clusters: str = ""
    parameters: int | None = None
    trainable: int | None = None
    seconds: float = float("nan")


@dataclass(frozen=True)
class Comparison:
    """Score of one system less that of another, on the runs that both have finished."""

    first: str
    second: str
    runs: int
    difference: PairedDifference
    corrected: float
    """P-value after Holm's correction for all pairs of the board."""

    @property
    def shown(self) -> bool:
        """Whether there is a difference."""
        return self.corrected < LEVEL


@dataclass(frozen=True)
class Board:
    """All systems on one dataset in one protocol.

    Parameters
    ----------
    dataset, protocol, test : str
        Names; `test` is "" for the protocol's own test images.
    title : str
    task : str
    score : str
        By which systems are compared.
    classes : tuple of str
    entries : dict of str to Entry
        By system.
    published : list of Published
    comparisons : list of Comparison
        Of all pairs.
    resamples : int
        Of the comparisons.
    crossed : bool
        Whether domains are those that trained.
    """

    dataset: str
    protocol: str
    test: str
    title: str
    task: str
    score: str
    classes: tuple[str, ...]
    entries: dict[str, Entry]
    published: list[Published]
    comparisons: list[Comparison]
    resamples: int
    crossed: bool = False

    @property
    def name(self) -> str:
        """``dataset/protocol`` or ``dataset/protocol/test``."""
        return "/".join(part for part in (self.dataset, self.protocol, self.test) if part)

    def figure(self, system: str) -> Figure | None:
        """Main score of a system, None before its first run."""
        entry = self.entries.get(system)
        return entry.scores.get(self.score) if entry else None

    def place(self, system: str) -> int | None:
        """One more than the systems that are shown to be better; None if it was not compared."""
        found = [c for c in self.comparisons if system in (c.first, c.second)]
        known = [c for c in found if not np.isnan(c.corrected)]
        if not known:
            return None
        signs = [c.difference.difference * (1 if c.first == system else -1) for c in known]
        return 1 + sum(c.shown and sign < 0 for c, sign in zip(known, signs, strict=True))


@dataclass(frozen=True)
class Leaderboard:
    """What ``celltyper report`` shows of a benchmark.

    Parameters
    ----------
    path : Path
    about : dict
        What ``benchmark.json`` holds.
    benchmark : Benchmark
    boards : list of Board
    """

    path: Path
    about: dict[str, Any]
    benchmark: Benchmark
    boards: list[Board]

    @property
    def systems(self) -> list[str]:
        """All systems, in the order of the file."""
        return list(dict.fromkeys(s for board in self.boards for s in board.entries))

    @property
    def failed(self) -> list[Entry]:
        """Cells that stopped with an error."""
        own = [e for board in self.boards if not board.test for e in board.entries.values()]
        return [entry for entry in own if entry.state.error]


class _Loaded(NamedTuple):
    """A cell with its runs at the largest fraction, by what they have in common with others."""

    entry: Entry
    classes: tuple[str, ...]
    crossed: bool
    tested: dict[Key, tuple[str, ...]]
    """Names of the test images or patches of finished runs."""
    runs: dict[Key, Any]
    domains: list[str]
    """Of the protocol."""
    positive: int


def read_benchmark(output: Path) -> dict[str, Any]:
    """Read ``benchmark.json``.

    Raises
    ------
    DataError
        If there is none, or it is damaged.
    """
    file = output / BENCHMARK_FILE
    if not file.is_file():
        raise DataError(f"{output} holds no benchmark: celltyper benchmark writes one")
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        Benchmark.model_validate(about["benchmark"])
        if not about["cells"]:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged, or of another version of celltyper") from error
    return about


def leaderboard(output: str | Path, *, resamples: int = 1000) -> Leaderboard:
    """Collect the scores of a benchmark, finished or not.

    Parameters
    ----------
    output : str or Path
        What `celltyper.benchmark.running.run_benchmark` wrote.
    resamples : int
        Bootstrap resamples of the intervals, and at least of the comparisons; 0 leaves both out.

    Returns
    -------
    Leaderboard

    Raises
    ------
    DataError
        If there is no benchmark, or systems were tested on other images than others.
    """
    output = Path(output)
    about = read_benchmark(output)
    benchmark = Benchmark.model_validate(about["benchmark"])
    published = [Published(**one) for one in about["published"]]
    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in about["cells"]:
        for test in ("", *cell["tests"]):
            cells.setdefault((cell["dataset"], cell["protocol"], test), []).append(cell)
    boards = [
        _board(output, benchmark, key, own, published, resamples) for key, own in cells.items()
    ]
    return Leaderboard(output, about, benchmark, boards)


def _board(
    output: Path,
    benchmark: Benchmark,
    key: tuple[str, str, str],
    cells: Sequence[dict[str, Any]],
    published: Sequence[Published],
    resamples: int,
) -> Board:
    dataset, protocol, test = key
    task = cells[0]["config"]["task"]
    score = benchmark.score_of(task)
    load = _load_cells if task == "cells" else _load_patches
    loaded = {cell["system"]: _loaded(load, output, cell, test, resamples) for cell in cells}
    done = {name: one for name, one in loaded.items() if one.runs}
    comparisons, drawn = _compare(done, score, task, resamples)
    first = next(iter(done.values()), None)
    title = benchmark.datasets[dataset].title or dataset
    return Board(
        dataset=dataset,
        protocol=protocol,
        test=test,
        title=", ".join(part for part in (title, protocol, test) if part),
        task=task,
        score=score,
        classes=first.classes if first else (),
        entries={name: one.entry for name, one in loaded.items()},
        published=[p for p in published if (p.dataset, p.protocol, p.test) == key],
        comparisons=comparisons,
        resamples=drawn,
        crossed=first.crossed if first else False,
    )


def _loaded(
    load: Callable[..., _Loaded], output: Path, cell: dict[str, Any], test: str, resamples: int
) -> _Loaded:
    """A cell; one whose files are damaged is a failure, too."""
    path = f"{cell['dataset']}/{cell['system']}/{cell['protocol']}"
    state = state_of(output, path, cell["tests"])
    entry = Entry(cell["system"], path, state)
    nothing = _Loaded(entry, (), False, {}, {}, [], 0)
    if not state.planned:
        return nothing
    try:
        about = read_plan(output / path)
        return load(output / path, about, entry, test, resamples)
    except DataError as error:
        return nothing._replace(entry=replace(entry, state=replace(state, error=str(error))))


def _load_cells(
    folder: Path, about: dict[str, Any], entry: Entry, test: str, resamples: int
) -> _Loaded:
    del test
    classes = about["classes"]
    runs = [load_run(folder, one, classes) for one in about["runs"]]
    domains = list(dict.fromkeys(run.domain for run in runs))
    done = [run for run in runs if run.images is not None]
    largest = max(run.fraction for run in runs)
    last = [run for run in done if run.fraction == largest]

    def figures(chosen: Sequence[ScoredRun]) -> tuple[Figures, dict[str, Figures], str]:
        scores, per_class, clusters = figures_of_runs(chosen, classes, resamples)
        return _figures(scores), {n: _figures(row) for n, row in per_class.items()}, clusters

    def whole(chosen: Sequence[ScoredRun]) -> bool:
        return {run.domain for run in chosen} == set(domains)

    scores, per_class, clusters = figures(last) if whole(last) else ({}, {}, "")
    by_fraction = {
        fraction: [run for run in done if run.fraction == fraction]
        for fraction in sorted({run.fraction for run in done})
    }
    by_domain = {d: [run for run in last if run.domain == d] for d in domains}
    filled = replace(
        entry,
        **_costs(folder, [run.path for run in last]),
        scores=scores,
        per_class=per_class,
        fractions=[
            (float(np.mean([run.reached for run in own])), figures(own)[0])
            for own in by_fraction.values()
            if whole(own)
        ],
        domains={
            name: figures(own)[0] for name, own in by_domain.items() if own and len(domains) > 1
        },
        clusters=clusters,
    )
    return _Loaded(
        filled,
        tuple(classes),
        about["protocol"]["train_on"] is not None,
        {(r.part, r.seed): tuple(i.name for i in r.images or ()) for r in last},
        {(r.part, r.seed): r for r in last},
        domains,
        0,
    )


def _load_patches(
    folder: Path, about: dict[str, Any], entry: Entry, test: str, resamples: int
) -> _Loaded:
    classes = tuple(about["classes"])
    positive = classes.index(about["positive"])
    found: list[tuple[dict[str, Any], TypedPatches]] = []
    planned = [one for one in about["runs"] if not test or one["fraction"] == 1]
    for one in planned:
        run = folder / one["path"]
        file = further_file(run, test) if test else run / SCORES_FILE
        if file.is_file():
            found.append((one, read_typed(file)))
    state = replace(entry.state, done=len(found), planned=len(planned))
    entry = replace(entry, state=state)

    def figures(chosen: Sequence[TypedPatches]) -> Figures:
        return _figures(figures_of(chosen, len(classes), positive, resamples=resamples))

    by_fraction = {
        fraction: [(one, typed) for one, typed in found if one["fraction"] == fraction]
        for fraction in sorted({one["fraction"] for one in planned})
    }
    last = by_fraction[max(by_fraction)] if by_fraction else []
    names = list(dict.fromkeys(one["domain"] for one, _ in last if one["domain"]))
    groups = {group for _, typed in last for group in typed.groups}
    costs = _costs(folder, [one["path"] for one, _ in last])
    main = figures([typed for _, typed in last]) if last else {}
    filled = replace(
        entry,
        **costs,
        scores=main,
        per_class=_per_class(last, main, classes, positive, resamples),
        fractions=[
            (float(np.mean([one["reached"] for one, _ in own])), figures([t for _, t in own]))
            for own in by_fraction.values()
            if own
        ],
        domains={
            name: figures([typed for one, typed in last if one["domain"] == name])
            for name in (names if not test else ())
        },
        clusters=f"{len(groups)} patients or slides",
    )
    keys = [(str(one["part"]), int(one["seed"])) for one, _ in last]
    return _Loaded(
        filled,
        classes,
        about["protocol"]["train_on"] is not None,
        {key: typed.names for key, (_, typed) in zip(keys, last, strict=True)},
        {key: typed for key, (_, typed) in zip(keys, last, strict=True)},
        [""],
        positive,
    )


def _per_class(
    found: Sequence[tuple[dict[str, Any], TypedPatches]],
    main: Figures,
    classes: tuple[str, ...],
    positive: int,
    resamples: int,
) -> dict[str, Figures]:
    """Recall of every class: of two classes sensitivity and specificity."""
    if not found:
        return {}
    if len(classes) == 2:
        names = ("sensitivity", "specificity") if positive == 0 else ("specificity", "sensitivity")
        return {c: {"recall": main[name]} for c, name in zip(classes, names, strict=True)}
    pooled = pool_runs({one["path"]: typed for one, typed in found})
    scores = score_pooled(pooled, classes, positive, resamples=resamples).per_class
    recalls = {name: row["recall"] for name, row in scores.items()}
    return {
        name: {"recall": Figure(r.value, float("nan"), r.low, r.high)}
        for name, r in recalls.items()
    }


def _compare(
    loaded: Mapping[str, _Loaded], score: str, task: str, resamples: int
) -> tuple[list[Comparison], int]:
    """All pairs of systems, on the runs that both have; and how many resamples were drawn."""
    pairs: list[tuple[str, str, frozenset[Key]]] = []
    for a, b in itertools.combinations(loaded, 2):
        shared = frozenset(loaded[a].runs.keys() & loaded[b].runs.keys())
        for key in shared:
            if loaded[a].tested[key] != loaded[b].tested[key]:
                raise DataError(
                    f"{loaded[a].entry.path} and {loaded[b].entry.path} were tested on different "
                    f"images in {key[0]}, seed {key[1]}: the data have changed; run both anew"
                )
        if shared and (task == "patches" or _all_domains(loaded[a], shared)):
            pairs.append((a, b, shared))
    if not pairs or not resamples:
        return [], 0
    n = max(resamples, PER_PAIR * len(pairs))
    drawn: dict[tuple[str, frozenset[Key]], tuple[float, Values]] = {}
    for shared in {keys for *_, keys in pairs}:
        members = {s: one for s, one in loaded.items() if shared <= one.runs.keys()}
        draw = _draw_cells if task == "cells" else _draw_patches
        for system, found in draw(members, sorted(shared), score, n).items():
            drawn[system, shared] = found
    differences = []
    for a, b, shared in pairs:
        (of_a, draws_a), (of_b, draws_b) = drawn[a, shared], drawn[b, shared]
        differences.append(paired_interval(of_a - of_b, draws_a - draws_b))
    corrected = holm([d.p_value for d in differences])
    return [
        Comparison(a, b, len(shared), difference, float(p))
        for (a, b, shared), difference, p in zip(pairs, differences, corrected, strict=True)
    ], n


def _all_domains(one: _Loaded, shared: frozenset[Key]) -> bool:
    """Whether runs are of every domain, over which scores are averaged."""
    return {one.runs[key].domain for key in shared} == set(one.domains)


def _draw_cells(
    members: Mapping[str, _Loaded], keys: Sequence[Key], score: str, n: int
) -> dict[str, tuple[float, Values]]:
    """Mean score over runs and that of every resample of patients, fields or blocks, by system."""
    runs = {name: [one.runs[key] for key in keys] for name, one in members.items()}
    clusters = find_clusters([i for own in runs.values() for run in own for i in run.images or ()])
    weights = draw_weights(len(clusters.keys), n, 0)
    found = {}
    for name, own in runs.items():
        drawn = draw_runs(own, len(members[name].classes), clusters, weights)[0][score]
        found[name] = drawn.mean, drawn.draws
    return found


def _draw_patches(
    members: Mapping[str, _Loaded], keys: Sequence[Key], score: str, n: int
) -> dict[str, tuple[float, Values]]:
    """Mean score over runs and that of every resample of patients or slides, by system."""
    found = {}
    for name, one in members.items():
        runs = [one.runs[key] for key in keys]
        point, draws = drawn_scores(runs, len(one.classes), one.positive, resamples=n)
        found[name] = float(mean_of_known(point[score])), draws[score]
    return found


def _figures(scores: Mapping[str, AnyFigure]) -> Figures:
    return {name: Figure(f.mean, f.deviation, f.low, f.high) for name, f in scores.items()}


def _costs(folder: Path, paths: Sequence[str]) -> dict[str, Any]:
    """Parameters and training time of runs, as far as they say."""
    facts = []
    for path in paths:
        try:
            facts.append(json.loads((folder / path / RUN_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    times = [f["seconds"]["fit"] if isinstance(f["seconds"], dict) else f["seconds"] for f in facts]
    first = facts[0] if facts else {}
    return {
        "parameters": first.get("parameters"),
        "trainable": first.get("trainable_parameters"),
        "seconds": float(np.mean(times)) if times else float("nan"),
    }


def scores_of(board: Board) -> tuple[str, ...]:
    """Scores of a board, the main one first."""
    return (board.score, *(name for name in SCORES[board.task] if name != board.score))
