"""The leaderboard as a page that needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import yaml
from markupsafe import Markup

from celltyper import __version__
from celltyper.benchmark.leaderboard import Board, Entry, Figure, Leaderboard, scores_of
from celltyper.benchmark.wording import (
    comparison_rule,
    overview_note,
    rules_of,
    score_name,
    verdict,
)
from celltyper.classification.page import Page
from celltyper.report.data import Cell, Metric
from celltyper.report.html import DASH, page_template
from celltyper.report.series import Point, Series, curve_chart, profile_chart, series_key

SHOWN = 6
"""Systems that charts show at first."""


class Column(NamedTuple):
    """Head of a column; those of classes can be hidden."""

    name: str
    of_score: bool = False
    of_class: bool = False


class ShownFigure(NamedTuple):
    """A figure in a table."""

    metric: Metric | None
    best: bool = False
    note: str = ""
    of_class: bool = False


class Line(NamedTuple):
    """A row of a table."""

    name: str
    words: str
    plain: Sequence[Cell] = ()
    cells: Sequence[ShownFigure] = ()
    after: Sequence[Cell] = ()
    source: str = ""
    doi: str = ""


class Lines(NamedTuple):
    """A table."""

    columns: Sequence[Column]
    rows: Sequence[Line]
    note: str


class Difference(NamedTuple):
    """A row of the table of differences."""

    first: str
    second: str
    metric: Metric
    signed: str
    p: float
    corrected: float
    better: str


@dataclass(frozen=True)
class Shown:
    """A board on the page."""

    title: str
    table: Lines
    legend: Sequence[tuple[int, str, Markup, bool]]
    charts: Sequence[tuple[str, Markup, str]]
    differences: Sequence[Difference]
    verdict: str
    rule: str


def leaderboard_page(found: Leaderboard) -> str:
    """Page of a leaderboard as HTML text.

    Parameters
    ----------
    found : Leaderboard

    Returns
    -------
    str
        No address outside it; opens from disk.
    """
    ranked = by_mean(found)
    numbers = {system: i for i, system in enumerate(ranked)}
    done = sum(e.state.done for e in _own(found))
    planned = sum(e.state.planned for e in _own(found))
    waiting = sum(not e.state.planned for e in _own(found))
    shown = set(ranked[:SHOWN])
    states = [f"off-y{i}" for name, i in numbers.items() if name not in shown]
    page = Page(
        title=found.benchmark.title,
        interval="",
        warnings=_warnings(found),
        facts={
            "systems": str(len(ranked)),
            "datasets": ", ".join(found.benchmark.datasets),
            "runs": f"{done} of {planned}" + (f", {waiting} cells not begun" if waiting else ""),
            "celltyper": __version__,
        },
        config=yaml.safe_dump(found.about["benchmark"], sort_keys=False),
    )
    return page_template("leaderboard.html.j2").render(
        report=page,
        dash=DASH,
        names=[],
        colors=[],
        state=" ".join(["off-classes", *states]),
        lead=f"{len(ranked)} systems on {len(found.boards)} boards, {done} of {planned} runs "
        "finished.",
        systems=ranked,
        has_published=any(board.published for board in found.boards),
        has_classes=any(board.classes for board in found.boards),
        overviews=[
            (task, _overview(found, ranked, [b for b in found.boards if b.task == task]))
            for task in dict.fromkeys(board.task for board in found.boards)
        ],
        failed=[(e.path, f"{e.system} {e.path}", e.state.error) for e in found.failed],
        boards=[_shown(board, ranked, numbers, shown) for board in found.boards],
        rules=rules_of(found),
    )


def by_mean(found: Leaderboard) -> list[str]:
    """Systems by their mean rank on the boards that they share with others."""
    places: dict[str, list[float]] = {system: [] for system in found.systems}
    for board in found.boards:
        values = {s: f.mean for s in board.entries if (f := board.figure(s)) and not _nan(f.mean)}
        order = sorted(values, key=lambda system: -values[system])
        for rank, system in enumerate(order if len(order) > 1 else ()):
            places[system].append(rank / (len(order) - 1))
    return sorted(places, key=lambda s: sum(places[s]) / len(places[s]) if places[s] else 2.0)


def _own(found: Leaderboard) -> list[Entry]:
    """Every cell once."""
    return [e for board in found.boards if not board.test for e in board.entries.values()]


def _warnings(found: Leaderboard) -> list[str]:
    warnings = []
    if found.failed:
        failed = len(found.failed)
        warnings.append(f"{failed} cell{'s' * (failed > 1)} failed: see below")
    unfinished = [e.path for e in _own(found) if not e.state.finished and not e.state.error]
    if unfinished:
        more = f" and {len(unfinished) - 5} more" if len(unfinished) > 5 else ""
        warnings.append(f"not finished: {', '.join(unfinished[:5])}{more}")
    return warnings


def _overview(found: Leaderboard, ranked: Sequence[str], boards: Sequence[Board]) -> Lines:
    """Main scores of all systems on the boards of a task."""
    rows = [
        Line(system, system, cells=[_cell(board, system) for board in boards])
        for system in ranked
        if any(system in board.entries for board in boards)
    ]
    published: dict[tuple[str, str, str], dict[str, float]] = {}
    for board in boards:
        for one in board.published:
            if one.score == board.score:
                row = published.setdefault((one.system, one.source, one.doi), {})
                row[board.name] = one.value
    for (system, source, doi), values in published.items():
        cells = [ShownFigure(_single(values.get(board.name))) for board in boards]
        rows.append(Line(system, f"{system} published", (), cells, (), source, doi))
    columns = [Column("system"), *(Column(_heading(board), True) for board in boards)]
    return Lines(columns, rows, overview_note(found))


def _heading(board: Board) -> str:
    return f"{board.title}: {score_name(board.task, board.score)}"


def _cell(board: Board, system: str) -> ShownFigure:
    """Main score of a system on a board, and what is missing of it."""
    entry = board.entries.get(system)
    if entry is None:
        return ShownFigure(None)
    state, note = entry.state, ""
    if state.error:
        note = "failed"
    elif not state.finished:
        note = f"{state.done} of {state.planned} runs" if state.planned else "not begun"
    return ShownFigure(_metric(board.figure(system)), board.place(system) == 1, note)


def _shown(board: Board, ranked: Sequence[str], numbers: dict[str, int], shown: set[str]) -> Shown:
    systems = [system for system in ranked if system in board.entries]
    series = {system: numbers[system] for system in systems}
    charts = _charts(board, series)
    return Shown(
        title=board.title,
        table=_table(board, systems),
        legend=[(i, s, series_key(i), s in shown) for s, i in series.items()],
        charts=charts,
        differences=[
            Difference(
                c.first,
                c.second,
                Metric("", *c.difference[:3], ""),
                f"{c.difference.difference:+.3f}",
                c.difference.p_value,
                c.corrected,
                (c.first if c.difference.difference > 0 else c.second) if c.shown else "",
            )
            for c in board.comparisons
        ],
        verdict=verdict(board),
        rule=comparison_rule(board),
    )


def _table(board: Board, systems: Sequence[str]) -> Lines:
    names = scores_of(board)
    of_class = [(c, name) for c in board.classes for name in _class_scores(board)]
    after = ("runs", "parameters", "trained")
    columns = [
        *(Column(name) for name in ("system", "place")),
        *(Column(score_name(board.task, name), True) for name in names),
        *(Column(f"{c}: {score_name(board.task, name)}", True, True) for c, name in of_class),
        *(Column(name) for name in after),
    ]
    rows = []
    for system in systems:
        entry = board.entries[system]
        state = entry.state
        figures = [
            ShownFigure(
                _metric(entry.scores.get(name)), name == board.score and board.place(system) == 1
            )
            for name in names
        ]
        figures += [
            ShownFigure(_metric(entry.per_class.get(c, {}).get(name)), of_class=True)
            for c, name in of_class
        ]
        costs = [f"{state.done}/{state.planned}", entry.parameters, entry.trainable]
        rows.append(Line(system, system, [board.place(system)], figures, costs))
    by_row: dict[tuple[str, str, str], dict[str, float]] = {}
    for one in board.published:
        by_row.setdefault((one.system, one.source, one.doi), {})[one.score] = one.value
    for (system, source, doi), values in by_row.items():
        figures = [ShownFigure(_single(values.get(name))) for name in names]
        figures += [ShownFigure(None, of_class=True)] * len(of_class)
        nothing = [None] * len(after)
        rows.append(Line(system, f"{system} published", [None], figures, nothing, source, doi))
    clusters = sorted({e.clusters for e in board.entries.values() if e.clusters})
    note = f"Intervals: 95 %, bootstrap over {' or '.join(clusters)}." if clusters else ""
    return Lines(columns, rows, note)


def _class_scores(board: Board) -> list[str]:
    found = (row for e in board.entries.values() for row in e.per_class.values())
    return list(next(found, {}))


def _charts(board: Board, series: dict[str, int]) -> list[tuple[str, Markup, str]]:
    """Scores over the share of data, domains, parameters and training time, if they differ."""
    score, name = board.score, score_name(board.task, board.score)
    entries = {system: board.entries[system] for system in series}
    charts: list[tuple[str, Markup, str]] = []

    def drawn(points: Mapping[str, Iterable[tuple[float, Figure | None]]]) -> list[Series]:
        found = []
        for system, values in points.items():
            own = [
                Point(x, f.mean, f.low, f.high)
                for x, f in values
                if f is not None and not _nan(f.mean) and math.isfinite(x)
            ]
            if own:
                found.append(Series(series[system], system, own))
        return found

    shares = {
        system: [(100 * reached, f.get(score)) for reached, f in entry.fractions]
        for system, entry in entries.items()
    }
    if any(len(points) > 1 for points in shares.values()):
        what = "windows" if board.task == "patches" else "nuclei"
        label = f"% of the training {what}"
        spread = [x for points in shares.values() for x, _ in points if x > 0]
        wide = max(spread) > 20 * min(spread)
        svg = curve_chart(f"{name} over {label}", label, drawn(shares), logarithmic=wide)
        charts.append((f"{name} over the training data", svg, ""))
    domains = list(dict.fromkeys(d for entry in entries.values() for d in entry.domains))
    if len(domains) > 1:
        profiles = {
            system: [(float(i), entry.domains.get(d, {}).get(score)) for i, d in enumerate(domains)]
            for system, entry in entries.items()
        }
        what = "that trained" if board.crossed else "left out"
        svg = profile_chart(f"{name} by domain {what}", name, domains, drawn(profiles))
        charts.append((f"{name} by domain {what}", svg, ""))
    for title, label, costs, note in (
        ("parameters", "parameters", {s: e.parameters for s, e in entries.items()}, ""),
        (
            "training time",
            "seconds of a run, mean",
            {s: e.seconds for s, e in entries.items()},
            "On the machine that it ran on; without the one pass of an encoder whose embeddings "
            "are kept."
            if board.task == "patches"
            else "On the machine that it ran on.",
        ),
    ):
        points = {
            s: [(float(cost), entries[s].scores.get(score))]
            for s, cost in costs.items()
            if cost is not None and cost > 0
        }
        if len(points) > 1:
            svg = curve_chart(f"{name} over {title}", label, drawn(points), logarithmic=True)
            charts.append((f"{name} over {title}", svg, note))
    return [(title, svg, note) for title, svg, note in charts if svg]


def _metric(f: Figure | None) -> Metric | None:
    return None if f is None else Metric("", f.mean, f.low, f.high, "", f.deviation)


def _single(value: float | None) -> Metric | None:
    return None if value is None else Metric("", value, None, None, "")


def _nan(value: float) -> bool:
    return math.isnan(value)
