"""The table of a protocol as CSV, Markdown, HTML and text for a terminal."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from celltyper.atomic import write_text
from celltyper.protocols.numerals import (
    digits,
    ends,
    line,
    markdown_difference,
    markdown_figure,
    mean_and_deviation,
    signed,
    signed_ends,
)
from celltyper.protocols.page import protocol_report
from celltyper.protocols.pooling import HEADLINE, PER_CLASS
from celltyper.protocols.table import (
    Difference,
    Figure,
    ProtocolTable,
    Row,
    protocol_table,
)
from celltyper.protocols.wording import NAMES, rules_of, title_of, warnings_of
from celltyper.report.html import write_report

FILES = ("table.csv", "classes.csv", "differences.csv", "table.md", "report.html")

_LABEL, _COLUMN, _WIDTH = 8, 12, 80


def report_protocol(output: str | Path, *, resamples: int = 1000) -> ProtocolTable:
    """Write the table of a protocol, finished or not.

    Parameters
    ----------
    output : str or Path
        Folder of the protocol; gets ``table.csv``, ``classes.csv``, ``table.md``, ``report.html``
        and, with two variants or more, ``differences.csv``.
    resamples : int
        Bootstrap resamples of the intervals.

    Returns
    -------
    ProtocolTable

    Raises
    ------
    DataError
        As `celltyper.protocols.protocol_table`.
    """
    table = protocol_table(output, resamples=resamples)
    write_text(table.path / "table.csv", table_csv(table))
    write_text(table.path / "classes.csv", classes_csv(table))
    if table.differences:
        write_text(table.path / "differences.csv", differences_csv(table))
    write_text(table.path / "table.md", table_markdown(table))
    write_report(table.path / "report.html", protocol_report(table))
    return table


def table_csv(table: ProtocolTable) -> str:
    """One row for every variant, fraction and domain; five columns for every score."""
    return _csv(
        [*_KEYS, "reached", "runs", "planned", *_columns(HEADLINE), "resampled"],
        [
            [
                *_key(row),
                f"{row.reached:.4g}",
                row.runs,
                row.planned,
                *_figures(row.scores),
                row.clusters,
            ]
            for row in table.rows
        ],
    )


def classes_csv(table: ProtocolTable) -> str:
    """One row for every variant, fraction, domain and class."""
    return _csv(
        [*_KEYS, "class", "runs", "planned", *_columns(PER_CLASS)],
        [
            [*_key(row), name, row.runs, row.planned, *_figures(scores)]
            for row in table.rows
            for name, scores in row.per_class.items()
        ],
    )


def differences_csv(table: ProtocolTable) -> str:
    """One row for every further variant, fraction and domain: its scores less the first's."""
    parts = ("difference", "low", "high", "p_value")
    return _csv(
        [*_KEYS, "less", "runs", *(f"{name}_{part}" for name in HEADLINE for part in parts)],
        [
            [
                *_key(d),
                d.first,
                d.runs,
                *(digits(getattr(d.scores[name], part)) for name in HEADLINE for part in parts),
            ]
            for d in table.differences
        ],
    )


def table_markdown(table: ProtocolTable) -> str:
    """Table for a document, with its rules."""
    header = ["", "runs", *NAMES.values()]
    lines = [line(header), line(["---"] * len(header))]
    for row in table.rows:
        cells = [markdown_figure(row.scores[name]) for name in HEADLINE]
        lines.append(line([title_of(row), f"{row.runs}/{row.planned}", *cells]))
    if table.differences:
        lines += ["", line(["less the first variant", "runs", *NAMES.values()])]
        lines.append(line(["---"] * len(header)))
        for d in table.differences:
            cells = [markdown_difference(d.scores[name]) for name in HEADLINE]
            lines.append(line([f"{title_of(d)}, less {d.first}", str(d.runs), *cells]))
    notes = [f"- {note}" for note in (*warnings_of(table), *rules_of(table))]
    return "\n".join([*lines, "", *notes]) + "\n"


def table_text(table: ProtocolTable) -> str:
    """Table for a terminal of 80 columns."""
    head = " " * _LABEL + "".join(f"{name:>{_COLUMN}}" for name in NAMES.values())
    lines = [head]
    for variant, rows in groupby(table.rows, lambda row: row.variant):
        lines += [variant] if variant else []
        for row in rows:
            scores = [row.scores[name] for name in HEADLINE]
            lines += _two_lines(
                _label(row),
                [mean_and_deviation(s) for s in scores],
                [ends(s) for s in scores],
            )
    for variant, differences in groupby(table.differences, lambda d: d.variant):
        for number, d in enumerate(differences):
            lines += ["", f"{variant} less {d.first}"] if not number else []
            found = [d.scores[name] for name in HEADLINE]
            lines += _two_lines(
                _label(d),
                [signed(p.difference) for p in found],
                [signed_ends(p) for p in found],
            )
    lines.append("")
    for note in (*warnings_of(table), *rules_of(table)):
        lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


_KEYS = ("variant", "fraction", "domain")


def _key(row: Row | Difference) -> list[Any]:
    return [row.variant, f"{row.fraction:g}", row.domain]


def _label(row: Row | Difference) -> str:
    return " ".join(part for part in (f"{100 * row.fraction:g}%", row.domain) if part)


def _columns(names: Iterable[str]) -> list[str]:
    parts = ("mean", "deviation", "pooled", "low", "high")
    return [f"{name}_{part}" for name in names for part in parts]


def _figures(scores: dict[str, Figure]) -> list[str]:
    return [
        digits(value)
        for f in scores.values()
        for value in (f.mean, f.deviation, f.pooled, f.low, f.high)
    ]


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _two_lines(label: str, values: Sequence[str], intervals: Sequence[str]) -> list[str]:
    """Values of a row and, below, their intervals; a long label has a line of its own."""
    first = []
    if len(label) >= _LABEL:
        first, label = textwrap.wrap(label, _WIDTH), ""
    lines = [f"{label:{_LABEL}}" + "".join(f"{v:>{_COLUMN}}" for v in values)]
    if any(intervals):
        lines.append(" " * _LABEL + "".join(f"{v:>{_COLUMN}}" for v in intervals))
    return [*first, *lines]
