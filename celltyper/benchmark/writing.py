"""The leaderboard as files: a page, tidy tables, LaTeX, and text for a terminal."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from celltyper.atomic import write_text
from celltyper.benchmark.leaderboard import (
    Board,
    Entry,
    Figure,
    Figures,
    Leaderboard,
    leaderboard,
    scores_of,
)
from celltyper.benchmark.page import by_mean, leaderboard_page
from celltyper.benchmark.wording import comparison_rule, overview_note, score_name, verdict
from celltyper.protocols.numerals import digits, ends, mean_and_deviation

FILES = ("index.html", "leaderboard.csv", "differences.csv", "leaderboard.tex")

_WIDTH = 80
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def report_benchmark(output: str | Path, *, resamples: int = 1000) -> Leaderboard:
    """Write the leaderboard of a benchmark, finished or not.

    Parameters
    ----------
    output : str or Path
        Folder of the benchmark; gets `FILES`.
    resamples : int
        Bootstrap resamples of the intervals, and at least of the comparisons.

    Returns
    -------
    Leaderboard

    Raises
    ------
    DataError
        As `celltyper.benchmark.leaderboard.leaderboard`.
    """
    found = leaderboard(output, resamples=resamples)
    for name, write in zip(
        FILES, (leaderboard_page, leaderboard_csv, differences_csv, leaderboard_tex), strict=True
    ):
        write_text(found.path / name, write(found))
    return found


def leaderboard_csv(found: Leaderboard) -> str:
    """One row for every figure: by board, system, fraction, domain, class and score.

    ``fraction`` and ``domain`` are empty in the main rows: all of the training data, mean over
    domains. A cell without figures has one row, with its error if it failed.
    """
    header = [
        *("dataset", "protocol", "test", "system", "source", "fraction", "domain", "class"),
        *("score", "mean", "deviation", "low", "high", "runs", "planned", "place"),
        *("parameters", "trainable_parameters", "seconds", "error"),
    ]
    return _csv(header, (row for board in found.boards for row in _rows(board)))


def differences_csv(found: Leaderboard) -> str:
    """One row for every pair of systems of a board."""
    header = [
        *("dataset", "protocol", "test", "score", "system", "less", "runs", "resamples"),
        *("difference", "low", "high", "p_value", "p_corrected", "shown"),
    ]
    return _csv(
        header,
        (
            [
                *(b.dataset, b.protocol, b.test, b.score, c.first, c.second, c.runs, b.resamples),
                *(digits(value) for value in (*c.difference, c.corrected)),
                "yes" if c.shown else "no",
            ]
            for b in found.boards
            for c in b.comparisons
        ),
    )


def leaderboard_tex(found: Leaderboard) -> str:
    """Overview as a table of LaTeX; needs the package booktabs."""
    lines = [
        r"% \usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'c' * len(found.boards)}}}",
        r"\toprule",
        _tex_row(["", *(_tex(board.title) for board in found.boards)]),
        _tex_row(["", *(_tex(score_name(board.task, board.score)) for board in found.boards)]),
        r"\midrule",
    ]
    for system in by_mean(found):
        cells = [_tex_cell(board, system) for board in found.boards]
        lines.append(_tex_row([_tex(system), *cells]))
    published = dict.fromkeys(
        (one.system, one.doi)
        for board in found.boards
        for one in board.published
        if one.score == board.score
    )
    if published:
        lines.append(r"\midrule")
    for system, doi in published:
        cells = [
            next(
                (
                    rf"\textit{{{one.value:.3f}}}"
                    for one in board.published
                    if (one.system, one.doi, one.score) == (system, doi, board.score)
                ),
                "--",
            )
            for board in found.boards
        ]
        lines.append(_tex_row([rf"\textit{{{_tex(system)}}}$^\dagger$", *cells]))
    lines += [r"\bottomrule", r"\end{tabular}"]
    notes = [overview_note(found)]
    notes += [f"{board.title}: {comparison_rule(board)}" for board in found.boards]
    sources = dict.fromkeys((p.source, p.doi) for board in found.boards for p in board.published)
    notes += [f"$^\\dagger$ {_tex(source)}, doi:{_tex(doi)}." for source, doi in sources]
    plain = len(notes) - len(sources)
    lines += [f"% {note}" for note in notes[:plain]] + [f"% {note}" for note in notes[plain:]]
    return "\n".join(lines) + "\n"


def leaderboard_text(found: Leaderboard) -> str:
    """Boards for a terminal of 80 columns."""
    lines: list[str] = []
    for board in found.boards:
        lines += textwrap.wrap(f"{board.title} ({score_name(board.task, board.score)})", _WIDTH)
        for system in by_mean(found):
            if system in board.entries:
                lines += _text_lines(board, board.entries[system])
        for one in board.published:
            if one.score == board.score:
                lines += _named(f"{one.system} (published)", f"{one.value:.3f}")
        if board.comparisons:
            lines.append(f"  {verdict(board)}")
        lines.append("")
    lines += textwrap.wrap(overview_note(found), _WIDTH)
    return "\n".join(lines)


def _rows(board: Board) -> Iterator[list[Any]]:
    names = scores_of(board)
    for system, entry in board.entries.items():
        about = [
            *(entry.state.done, entry.state.planned, board.place(system) or ""),
            *(entry.parameters or "", entry.trainable or "", digits(entry.seconds)),
            entry.state.error,
        ]
        start = [board.dataset, board.protocol, board.test, system, "celltyper"]
        if not entry.scores:
            yield [*start, *[""] * 8, *about]
            continue
        yield from ([*start, "", "", *row, *about] for row in _figures("", entry.scores, names))
        for class_name, scores in entry.per_class.items():
            yield from ([*start, "", "", *row, *about] for row in _figures(class_name, scores))
        for domain, scores in entry.domains.items():
            yield from ([*start, "", domain, *row, *about] for row in _figures("", scores, names))
        if len(entry.fractions) > 1:
            for reached, scores in entry.fractions:
                for row in _figures("", scores, names):
                    yield [*start, f"{reached:.4g}", "", *row, *about]
    for one in board.published:
        yield [
            *(board.dataset, board.protocol, board.test, one.system, f"doi:{one.doi}", "", "", ""),
            *(one.score, digits(one.value), *[""] * 10),
        ]


def _figures(
    class_name: str, scores: Figures, names: Sequence[str] | None = None
) -> Iterator[list[str]]:
    """Class, score and figures."""
    for name in names or scores:
        yield [class_name, name, *(digits(value) for value in scores[name])]


def _tex_cell(board: Board, system: str) -> str:
    figure = board.figure(system)
    if figure is None or math.isnan(figure.mean):
        entry = board.entries.get(system)
        return "failed" if entry and entry.state.error else "--"
    value = f"{figure.mean:.3f}"
    if board.place(system) == 1:
        value = rf"\textbf{{{value}}}"
    if not math.isnan(figure.deviation):
        value += rf" $\pm$ {figure.deviation:.3f}"
    if not math.isnan(figure.low):
        value += rf" {{\footnotesize [{figure.low:.3f}, {figure.high:.3f}]}}"
    return value


def _tex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex(text: str) -> str:
    return "".join(_SPECIAL.get(sign, sign) for sign in text)


def _text_lines(board: Board, entry: Entry) -> list[str]:
    state, figure = entry.state, entry.scores.get(board.score)
    if figure is None:
        text = f"failed: {state.error}" if state.error else "not begun"
    else:
        text = _figure_text(figure)
        place = board.place(entry.system)
        text += f"  place {place}" if place else ""
        text += "  failed" if state.error else ""
        text += f"  {state.done}/{state.planned} runs" if not state.finished else ""
    return _named(entry.system, text)


def _figure_text(figure: Figure) -> str:
    return f"{mean_and_deviation(figure):10} {ends(figure):11}".rstrip()


def _named(name: str, text: str) -> list[str]:
    """Name and text beside it; a long name has a line of its own."""
    lines = [f"  {name}"] if len(name) > 27 else []
    first = f"  {'' if lines else name:28}"
    return lines + textwrap.wrap(first + text, _WIDTH, subsequent_indent=" " * 30)


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
