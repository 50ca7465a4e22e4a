"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from numpy.typing import NDArray

from celltyper.atomic import write_text
from celltyper.cells.colors import UNTYPED
from celltyper.report.agreement import RULE
from celltyper.report.data import Cell, Curves, Metric, Reliability, Report
from celltyper.report.figures import make_figures
from celltyper.report.plots import Points, line_chart, line_key, reliability_diagram

DASH = "–"  # noqa: RUF001
"""Shown where a number is not known."""

FIGURE_BUDGET = 13_000_000
"""Characters for images and outlines; the page stays under 15 MB."""

_LINES = 6
"""Lines that one chart can hold and a reader tell apart."""

_CLOCKS = ("step", "epoch")
_ASIDE = ("lr", "learning_rate", "seconds", "time")


class Chart(NamedTuple):
    """A chart with the names of its lines."""

    title: str
    svg: Markup
    lines: list[tuple[Markup, str]]
    note: str = ""


def write_report(path: Path, report: Report) -> None:
    """Write a report as one HTML file: no address outside it, opens from disk.

    Parameters
    ----------
    path : Path
        File to write; appears only when complete.
    report : Report
        What to show.

    Raises
    ------
    DataError
        If the folder cannot be written.
    """
    write_text(path, render(report))


def render(report: Report) -> str:
    """Page of a report as HTML text.

    Parameters
    ----------
    report : Report
        What to show.

    Returns
    -------
    str
        Under 15 MB; images for which there is no room are named instead.
    """
    figures, left_out = make_figures(
        report.images, len(report.classes), report.worst_by, FIGURE_BUDGET
    )
    return page_template("report.html.j2").render(
        report=report,
        dash=DASH,
        names=["no class", *report.classes],
        colors=[UNTYPED, *report.colors],
        untyped=any(figure.counts[0][0] for figure in figures),
        figures=figures,
        left_out=left_out,
        compared=any(figure.reference for figure in figures),
        agreement_rule=RULE,
        confusion=None if report.confusion is None else confusion_rows(report.confusion),
        charts=learning_curves(report.history),
        curves=[] if report.curves is None else _curve_charts(report.curves),
        diagrams=_diagrams(report),
        bins=[] if report.reliability is None else _bins(report.reliability),
    )


@cache
def page_template(name: str) -> Template:
    """Template of a page, with the filters that its macros use."""
    environment = Environment(
        loader=PackageLoader("celltyper.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "sort_key": sort_key, "interval": interval}
    return environment.get_template(name)


def number(value: Cell) -> str:
    """Write a cell for readers: three decimals, thousands set apart, a dash for what is unknown.

    Examples
    --------
    >>> number(0.81449), number(12345), number(None), number(float("nan"))
    ('0.814', '12,345', '–', '–')
    """  # noqa: RUF002
    if isinstance(value, Metric):
        value = value.value
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return DASH
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def interval(metric: Metric) -> str:
    """Write the interval of a metric as ``low to high``, or a dash if either end is unknown."""
    ends = [number(metric.low), number(metric.high)]
    return DASH if DASH in ends else f"{ends[0]} to {ends[1]}"


def sort_key(value: Cell) -> str:
    """Key by which the page sorts a cell: a number or a text; empty sorts last."""
    if isinstance(value, Metric):
        value = value.value
    if isinstance(value, str):
        return value
    return "" if value is None or not math.isfinite(value) else repr(float(value))


def confusion_rows(matrix: NDArray[np.generic]) -> list[list[dict[str, Any]]]:
    """Cells of a confusion matrix with the share of their row, "no nucleus" moved to the end.

    Parameters
    ----------
    matrix : ndarray, shape (K + 1, K + 1)
        Rows reference, columns predicted, entry 0 "no nucleus".

    Returns
    -------
    list of list of dict
        ``count`` (None for "no nucleus" on both sides, which cannot be counted), ``share`` of
        the row in [0, 1] or None, and ``right`` on the diagonal.
    """
    counts = np.roll(np.asarray(matrix, float), -1, axis=(0, 1))
    last = len(counts) - 1
    counts[last, last] = 0
    totals = counts.sum(axis=1)
    rows = []
    for i, row in enumerate(counts):
        cells = []
        for j, count in enumerate(row):
            nothing = i == j == last
            # Spurious cells are a sum over no reference: a share of them would say nothing.
            known = totals[i] > 0 and i != last
            cells.append(
                {
                    "count": None if nothing else int(count) if count == int(count) else count,
                    "share": count / totals[i] if known else None,
                    "right": i == j != last,
                }
            )
        rows.append(cells)
    return rows


def learning_curves(history: Mapping[str, Sequence[float | None]]) -> list[Chart]:
    """Chart of the losses and chart of the scores over steps.

    Parameters
    ----------
    history : mapping of str to sequence
        Columns of ``history.csv``; None and NaN are left out of their line.

    Returns
    -------
    list of Chart
        Without empty charts; learning rate and times are not drawn.
    """
    clock = next((name for name in _CLOCKS if name in history), "")
    longest = max((len(column) for column in history.values()), default=0)
    x = history[clock] if clock else list(range(1, longest + 1))
    lines = {
        name: [
            (float(at), float(y))
            for at, y in zip(x, column, strict=False)
            if at is not None and y is not None and math.isfinite(y)
        ]
        for name, column in history.items()
        if name not in (*_CLOCKS, *_ASIDE)
    }
    lines = {name: points for name, points in lines.items() if points}
    losses = [line for line in lines.items() if "loss" in line[0].lower()]
    scores = [line for line in lines.items() if "loss" not in line[0].lower()]
    charts = []
    for title, group in (("Loss", losses), ("Validation scores", scores)):
        if group:
            spoken = f"{title} over training"
            charts.append(_chart(title, spoken, clock or "row", group, "history.csv"))
    return charts


def _curve_charts(curves: Curves) -> list[Chart]:
    return [
        _chart(title, f"{title} over {curves.x_label}", curves.x_label, [*lines.items()], "tables")
        for title, lines in curves.charts.items()
    ]


def _chart(
    title: str, spoken: str, x_label: str, lines: Sequence[tuple[str, Points]], rest_in: str
) -> Chart:
    """Chart of as many lines as a reader can tell apart; the others are named."""
    shown, rest = lines[:_LINES], [name for name, _ in lines[_LINES:]]
    keys = [(line_key(i), name) for i, (name, _) in enumerate(shown)]
    note = f"Not drawn: {', '.join(rest)} (see {rest_in})." if rest else ""
    return Chart(title, line_chart(spoken, x_label, shown), keys, note)


def _diagrams(report: Report) -> list[tuple[str, Reliability, Markup]]:
    """Reliability before and after calibration, or alone."""
    named = [("Before calibration", report.uncalibrated), ("After calibration", report.reliability)]
    if report.uncalibrated is None:
        named = [("", report.reliability)]
    return [(name, one, reliability_diagram(one)) for name, one in named if one is not None]


def _bins(table: Reliability) -> list[tuple[float | None, float | None, int]]:
    return [
        (float(x) if n else None, float(y) if n else None, int(n))
        for x, y, n in zip(table.confidence, table.accuracy, table.cells, strict=True)
    ]
