"""The table of a protocol in patch mode: mean and deviation over runs, intervals over patients."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.atomic import write_text
from celltyper.errors import DataError
from celltyper.metrics.bootstrap import percentile_interval
from celltyper.metrics.ranking import SPECIFICITY
from celltyper.metrics.ratios import mean_of_known
from celltyper.metrics.scoring import ALL, Scorer, check_patches, draw_scores, patch_scorer
from celltyper.protocols.patches import TypedPatches, read_typed
from celltyper.protocols.scores import SCORES_FILE
from celltyper.protocols.table import read_plan

Values = NDArray[np.float64]

SHOWN = (
    "balanced_accuracy",
    "auroc",
    "auprc",
    "f1",
    "sensitivity",
    "specificity",
    "sensitivity_at_specificity",
    "accuracy",
    "weighted_f1",
    "kappa",
    "ece",
    "brier",
)
"""Scores of the table, by their names in `celltyper.metrics.classification.SCORES`."""

HEADLINE = ("balanced_accuracy", "auroc", "auprc", "f1")


class PatchFigure(NamedTuple):
    """A score over several runs; NaN where it cannot be computed."""

    mean: float
    deviation: float
    """Over runs, with n - 1."""
    low: float
    high: float
    """95 % interval of the mean: patients or slides are drawn, the same for all runs."""


@dataclass(frozen=True)
class PatchRow:
    """Scores of one variant, fraction and pair of domains.

    Parameters
    ----------
    variant : str
        "" if the protocol lists none.
    fraction, reached : float
        Share of the training windows that was asked for, and its mean over runs.
    trained_on : str
        The domain that trained, "" unless the protocol says ``train_on``.
    tested_on : str
        The domain that is tested, "" without domains.
    runs, planned : int
        Runs that are finished, and that there are to be.
    clusters : int
        Patients or slides that were drawn.
    scores : dict of str to PatchFigure
        By `SHOWN`.
    """

    variant: str
    fraction: float
    reached: float
    trained_on: str
    tested_on: str
    runs: int
    planned: int
    clusters: int
    scores: dict[str, PatchFigure]


@dataclass(frozen=True)
class PatchTableOfRuns:
    """What `celltyper report` shows of a protocol in patch mode."""

    path: Path
    about: dict[str, Any]
    rows: list[PatchRow]
    missing: list[str]
    """Folders of runs that are not finished."""


def report_patch_protocol(output: str | Path, *, resamples: int = 1000) -> PatchTableOfRuns:
    """Write the table of a protocol in patch mode, finished or not.

    Parameters
    ----------
    output : str or Path
        Folder of the protocol; gets ``table.csv`` and ``table.md``.
    resamples : int
        Bootstrap resamples of the intervals.

    Returns
    -------
    PatchTableOfRuns

    Raises
    ------
    DataError
        If there is no protocol, it is damaged, or none of its runs is finished.
    """
    path = Path(output)
    about = read_plan(path)
    entries = about["runs"]
    found = {
        entry["path"]: read_typed(path / entry["path"] / SCORES_FILE)
        for entry in entries
        if (path / entry["path"] / SCORES_FILE).is_file()
    }
    missing = [entry["path"] for entry in entries if entry["path"] not in found]
    if not found:
        raise DataError(f"{path}: no run is finished: go on with train --protocol and --resume")
    positive = about["classes"].index(about["positive"])
    rows = [
        _row(key, own, found, len(about["classes"]), positive, about, resamples)
        for key, own in _sorted_runs(entries)
        if any(entry["path"] in found for entry in own)
    ]
    flat = [row for group in rows for row in group]
    table = PatchTableOfRuns(path, about, flat, missing)
    write_text(path / "table.csv", _csv(table))
    write_text(path / "table.md", _markdown(table))
    return table


def figures_of(
    runs: Sequence[TypedPatches],
    classes: int,
    positive: int,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, PatchFigure]:
    """Mean of every score over runs, its deviation and its interval.

    Parameters
    ----------
    runs : sequence of TypedPatches
        What each said of its test windows, which may be the same or others.
    classes : int
        Number K of classes.
    positive : int
        The positive class.
    resamples, seed : int
        Of the bootstrap.

    Returns
    -------
    dict of str to PatchFigure
        By `SHOWN`.
    """
    union = sorted({group for run in runs for group in run.groups})
    place = {group: i for i, group in enumerate(union)}
    scorers: list[tuple[Scorer, list[int]]] = []
    for run in runs:
        truth, shares, cluster = check_patches(
            run.labels, run.probabilities, classes, positive, run.groups
        )
        scorer = patch_scorer(truth, shares, cluster, positive, run.threshold, SPECIFICITY)
        scorers.append((scorer, [place[group] for group in sorted(set(run.groups))]))

    def of_runs(weights: Values) -> dict[tuple[str, int], Values]:
        parts = [scorer(weights[:, own]) for scorer, own in scorers]
        return {
            (name, ALL): np.stack([part[name, ALL] for part in parts], axis=-1) for name in SHOWN
        }

    def mean(weights: Values) -> dict[tuple[str, int], Values]:
        return {key: mean_of_known(values) for key, values in of_runs(weights).items()}

    point = of_runs(np.ones((1, len(union))))
    drawn = draw_scores(mean, len(union), max(len(run.names) for run in runs), resamples, seed)
    result = {}
    for name in SHOWN:
        values = point[name, ALL][0]
        known = values[~np.isnan(values)]
        result[name] = PatchFigure(
            float(known.mean()) if len(known) else math.nan,
            float(known.std(ddof=1)) if len(known) > 1 else math.nan,
            *percentile_interval(drawn[name, ALL]),
        )
    return result


def patch_table_text(table: PatchTableOfRuns) -> str:
    """Scores as a table for a terminal of 80 columns."""
    lines = []
    for row in table.rows:
        runs = f"{row.runs} run{'s' * (row.runs > 1)}"
        runs += f" of {row.planned}" if row.runs < row.planned else ""
        lines.append(f"{_title(row) or 'all'}: mean ± deviation over {runs}")
        for name in SHOWN if len(table.rows) == 1 else HEADLINE:
            figure = row.scores[name]
            lines.append(
                f"  {name:27} {_short(figure.mean)} ± {_short(figure.deviation)}   "
                f"{_short(figure.low)} to {_short(figure.high)}"
            )
    rules = "; ".join(["positive: " + table.about["positive"], "intervals: 95 %, over slides"])
    lines.append(rules)
    if table.missing:
        lines.append(f"not finished: {len(table.missing)} of {len(table.about['runs'])} runs")
    return "\n".join(lines)


def _sorted_runs(
    entries: Sequence[dict[str, Any]],
) -> Iterator[tuple[tuple[str, float, str], list[dict[str, Any]]]]:
    """Entries by variant, fraction and domain, in the order of the plan."""
    keys: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for entry in entries:
        key = entry["variant"], entry["fraction"], entry["domain"]
        keys.setdefault(key, []).append(entry)
    yield from keys.items()


def _row(
    key: tuple[str, float, str],
    own: Sequence[dict[str, Any]],
    found: dict[str, TypedPatches],
    classes: int,
    positive: int,
    about: dict[str, Any],
    resamples: int,
) -> list[PatchRow]:
    """One row, or one for every domain that was tested."""
    variant, fraction, domain = key
    entries = [entry for entry in own if entry["path"] in found]
    runs = [found[entry["path"]] for entry in entries]
    crossed = about["protocol"]["train_on"] is not None
    parts = {"" if crossed else domain: runs}
    if crossed:
        tested = sorted({d for run in runs for d in run.domains})
        parts = {d: [_of_domain(run, d) for run in runs] for d in tested}
    return [
        PatchRow(
            variant=variant,
            fraction=fraction,
            reached=float(np.mean([entry["reached"] for entry in entries])),
            trained_on=domain if crossed else "",
            tested_on=name,
            runs=len(chosen),
            planned=len(own),
            clusters=len({g for run in chosen for g in run.groups}),
            scores=figures_of(chosen, classes, positive, resamples=resamples),
        )
        for name, chosen in parts.items()
    ]


def _of_domain(run: TypedPatches, domain: str) -> TypedPatches:
    rows = [i for i, d in enumerate(run.domains) if d == domain]
    return TypedPatches(
        names=tuple(run.names[i] for i in rows),
        groups=tuple(run.groups[i] for i in rows),
        domains=tuple(run.domains[i] for i in rows),
        labels=run.labels[rows],
        votes=run.votes[rows],
        experts=run.experts[rows],
        probabilities=run.probabilities[rows],
        threshold=run.threshold,
    )


def _title(row: PatchRow) -> str:
    words = [row.variant, f"fraction {row.fraction:g}" if row.fraction < 1 else ""]
    if row.trained_on:
        words.append(f"trained on {row.trained_on}, tested on {row.tested_on}")
    elif row.tested_on:
        words.append(f"without {row.tested_on}")
    return ", ".join(word for word in words if word)


def _csv(table: PatchTableOfRuns) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = ["variant", "fraction", "reached", "trained_on", "tested_on", "runs", "planned"]
    parts = ("mean", "deviation", "low", "high")
    writer.writerow([*keys, "slides", *(f"{n}_{part}" for n in SHOWN for part in parts)])
    for row in table.rows:
        first = [row.variant, f"{row.fraction:g}", f"{row.reached:.4g}"]
        first += [row.trained_on, row.tested_on, str(row.runs), str(row.planned)]
        values = [_digits(value) for name in SHOWN for value in row.scores[name]]
        writer.writerow([*first, row.clusters, *values])
    return text.getvalue()


def _markdown(table: PatchTableOfRuns) -> str:
    lines = ["| | runs | " + " | ".join(HEADLINE) + " |", "|---|---|" + "---|" * len(HEADLINE)]
    for row in table.rows:
        cells = [
            f"{_short(f.mean)} ± {_short(f.deviation)} ({_short(f.low)} to {_short(f.high)})"
            for f in (row.scores[name] for name in HEADLINE)
        ]
        lines.append(f"| {_title(row) or 'all'} | {row.runs} | " + " | ".join(cells) + " |")
    about = f"Positive class: {table.about['positive']}. Mean ± deviation over runs, and the 95 % "
    about += "interval of the mean, over patients or slides."
    return "\n".join([*lines, "", about]) + "\n"


def _short(value: float) -> str:
    return "  -  " if math.isnan(value) else f"{value:.3f}"


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
