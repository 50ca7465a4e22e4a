"""The table of a protocol in patch mode as CSV, Markdown, HTML and text for a terminal."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from celltyper.atomic import write_text
from celltyper.classification.page import NAMES, OF_STRATA, write_page
from celltyper.metrics.classification import Score
from celltyper.protocols.numerals import (
    digits,
    ends,
    line,
    markdown_difference,
    markdown_figure,
    mean_and_deviation,
    short,
    signed,
    signed_ends,
    with_interval,
)
from celltyper.protocols.patch_page import protocol_page
from celltyper.protocols.patch_table import (
    HEADLINE,
    SHOWN,
    PatchTableOfRuns,
    patch_table,
)
from celltyper.protocols.patch_wording import notes_of, title_of, warnings_of

_LABEL, _COLUMN, _WIDTH = 8, 18, 80


def report_patch_protocol(output: str | Path, *, resamples: int = 1000) -> PatchTableOfRuns:
    """Write the table of a protocol in patch mode, finished or not.

    Parameters
    ----------
    output : str or Path
        Folder of the protocol; gets ``table.csv``, ``table.md``, ``report.html`` and, with two
        variants or more, ``differences.csv``.
    resamples : int
        Bootstrap resamples of the intervals.

    Returns
    -------
    PatchTableOfRuns

    Raises
    ------
    DataError
        As `celltyper.protocols.patch_table.patch_table`.
    """
    table = patch_table(output, resamples=resamples)
    write_text(table.path / "table.csv", table_csv(table))
    if table.differences:
        write_text(table.path / "differences.csv", differences_csv(table))
    write_text(table.path / "table.md", table_markdown(table))
    write_page(table.path / "report.html", protocol_page(table))
    return table


def table_csv(table: PatchTableOfRuns) -> str:
    """One row for every variant, fraction and domain; four columns for every score."""
    keys = ("variant", "fraction", "reached", "trained_on", "tested_on", "runs", "planned")
    parts = ("mean", "deviation", "low", "high")
    return _csv(
        [*keys, "slides", *(f"{name}_{part}" for name in SHOWN for part in parts)],
        [
            [
                row.variant,
                f"{row.fraction:g}",
                f"{row.reached:.4g}",
                row.trained_on,
                row.tested_on,
                row.runs,
                row.planned,
                row.clusters,
                *(digits(getattr(row.scores[name], part)) for name in SHOWN for part in parts),
            ]
            for row in table.rows
        ],
    )


def differences_csv(table: PatchTableOfRuns) -> str:
    """One row for every further variant and fraction: its pooled scores less the first's."""
    parts = ("difference", "low", "high", "p_value")
    return _csv(
        [
            *("variant", "less", "fraction", "runs", "slides"),
            *(f"{name}_{part}" for name in SHOWN for part in parts),
        ],
        [
            [
                d.variant,
                d.first,
                f"{d.fraction:g}",
                d.runs,
                d.clusters,
                *(digits(getattr(d.scores[name], part)) for name in SHOWN for part in parts),
            ]
            for d in table.differences
        ],
    )


def table_markdown(table: PatchTableOfRuns) -> str:
    """Tables for a document, with their rules."""
    header = ["", "runs", *(NAMES[name] for name in HEADLINE)]
    lines = [line(header), line(["---"] * len(header))]
    for row in table.rows:
        cells = [markdown_figure(row.scores[name]) for name in HEADLINE]
        lines.append(line([title_of(table, row) or "all", f"{row.runs}/{row.planned}", *cells]))
    if table.differences:
        lines += ["", line(["less the first variant", *header[1:]])]
        lines.append(line(["---"] * len(header)))
        for d in table.differences:
            cells = [markdown_difference(d.scores[name]) for name in HEADLINE]
            lines.append(line([f"{title_of(table, d)}, less {d.first}", str(d.runs), *cells]))
    strata = [
        [
            ", ".join(part for part in (variant, level) if part),
            str(scores.patches),
            *(_interval(scores.scores[name]) for name in OF_STRATA),
        ]
        for variant, pooled in table.pooled.items()
        for level, scores in pooled.scores.strata.items()
    ]
    if strata:
        header = ["agreement of the experts", "patches", *(NAMES[name] for name in OF_STRATA)]
        lines += ["", line(header), line(["---"] * len(header)), *map(line, strata)]
    notes = [f"- {note}" for note in (*warnings_of(table), *notes_of(table))]
    return "\n".join([*lines, "", *notes]) + "\n"


def table_text(table: PatchTableOfRuns) -> str:
    """Table for a terminal of 80 columns."""
    lines = _list(table) if len(table.rows) == 1 else _grid(table)
    for variant, found in groupby(table.differences, lambda d: d.variant):
        for number, d in enumerate(found):
            lines += ["", f"{variant} less {d.first}"] if not number else []
            scores = [d.scores[name] for name in HEADLINE]
            lines += _three_lines(
                title_of(table, d, variant=False),
                [signed(p.difference) for p in scores],
                [signed_ends(p) for p in scores],
                ["" if math.isnan(p.p_value) else f"p {p.p_value:.2g}" for p in scores],
            )
    lines.append("")
    for note in (*warnings_of(table), *notes_of(table)):
        lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def _list(table: PatchTableOfRuns) -> list[str]:
    """Every score of the one row."""
    (row,) = table.rows
    lines = [f"{title}:"] if (title := title_of(table, row)) else []
    for name in SHOWN:
        f = row.scores[name]
        deviation = "" if math.isnan(f.deviation) else f" ± {short(f.deviation)}"
        ends = "" if math.isnan(f.low) else f"{short(f.low)} to {short(f.high)}"
        lines.append(f"{NAMES[name]:32}{short(f.mean)}{deviation:8}   {ends}".rstrip())
    return lines


def _grid(table: PatchTableOfRuns) -> list[str]:
    """The first scores of every row, their intervals below."""
    lines = [" " * _LABEL + "".join(f"{NAMES[name]:>{_COLUMN}}" for name in HEADLINE)]
    for variant, rows in groupby(table.rows, lambda row: row.variant):
        lines += [variant] if variant else []
        for row in rows:
            figures = [row.scores[name] for name in HEADLINE]
            label = title_of(table, row, variant=False)
            if not variant and not label:
                label = "all"
            lines += _three_lines(
                label,
                [mean_and_deviation(f) for f in figures],
                [ends(f) for f in figures],
            )
    return lines


def _three_lines(label: str, *values: Sequence[str]) -> list[str]:
    """Values of a row and what belongs to them, below; a long label has a line of its own."""
    lines = []
    if len(label) >= _LABEL:
        lines, label = textwrap.wrap(label, _WIDTH), ""
    for number, part in enumerate(values):
        if any(part) or not number:
            start = "" if number else label
            lines.append(f"{start:{_LABEL}}" + "".join(f"{v:>{_COLUMN}}" for v in part))
    return lines


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _interval(score: Score) -> str:
    return with_interval(score.value, score.low, score.high)
