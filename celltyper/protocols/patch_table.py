"""The table of a protocol in patch mode: mean and deviation over runs, intervals over patients."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.errors import DataError
from celltyper.library.files import RUN_FILE
from celltyper.metrics.bootstrap import PairedDifference, percentile_interval
from celltyper.metrics.classification import PatchScores
from celltyper.metrics.ranking import SPECIFICITY
from celltyper.metrics.ratios import mean_of_known
from celltyper.metrics.scoring import ALL, Scorer, check_patches, draw_scores, patch_scorer
from celltyper.protocols.patch_pooling import Pooled, compare_pooled, pool_runs, score_pooled
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

MIN_CLUSTERS = 8
"""Patients or slides from which an interval says something."""


class PatchFigure(NamedTuple):
    """A score over several runs; NaN where it cannot be computed."""

    mean: float
    deviation: float
    """Over runs, with n - 1."""
    low: float
    high: float
    """95 % interval of the mean: patients or slides are drawn, the same for all runs."""
    values: tuple[float, ...]
    """Of every run."""


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
class PatchDifference:
    """Pooled scores of a variant less those of the first one, on the runs that both finished.

    Parameters
    ----------
    variant, first : str
    fraction : float
    runs, clusters : int
        How many were compared, and patients or slides that were drawn.
    scores : dict of str to PairedDifference
        By `SHOWN`.
    """

    variant: str
    first: str
    fraction: float
    runs: int
    clusters: int
    scores: dict[str, PairedDifference]


class PooledVariant(NamedTuple):
    """All finished runs of a variant at the largest fraction together."""

    windows: Pooled
    scores: PatchScores


@dataclass(frozen=True)
class PatchTableOfRuns:
    """What `celltyper report` shows of a protocol in patch mode.

    Parameters
    ----------
    path : Path
        Folder of the protocol.
    about : dict
        What ``protocol.json`` holds.
    rows : list of PatchRow
        By variant, fraction and domain.
    differences : list of PatchDifference
        Empty with fewer than two variants.
    pooled : dict of str to PooledVariant
        By variant, at the largest fraction of which a run is finished.
    facts : dict of str to dict
        What ``run.json`` of every finished run holds, by its folder.
    missing : list of str
        Folders of runs that are not finished.
    """

    path: Path
    about: dict[str, Any]
    rows: list[PatchRow]
    differences: list[PatchDifference]
    pooled: dict[str, PooledVariant]
    facts: dict[str, dict[str, Any]]
    missing: list[str]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return tuple(self.about["classes"])

    @property
    def positive(self) -> int:
        """Index of the positive class."""
        return self.classes.index(self.about["positive"])

    @property
    def first(self) -> PooledVariant:
        """Of the first variant that has finished runs."""
        return next(iter(self.pooled.values()))


class _Run(NamedTuple):
    """A finished run of the plan."""

    entry: dict[str, Any]
    typed: TypedPatches

    @property
    def key(self) -> str:
        """What the runs of two variants have in common."""
        part, fraction, seed = (self.entry[key] for key in ("part", "fraction", "seed"))
        return f"{part}, {fraction:g}, seed {seed}"


def patch_table(output: str | Path, *, resamples: int = 1000) -> PatchTableOfRuns:
    """Collect the scores of a protocol in patch mode, finished or not.

    Parameters
    ----------
    output : str or Path
        What `celltyper.protocols.run_patch_protocol` wrote.
    resamples : int
        Bootstrap resamples of the intervals; 0 leaves them out.

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
    classes, positive = tuple(about["classes"]), about["classes"].index(about["positive"])
    runs, missing = [], []
    for entry in about["runs"]:
        file = path / entry["path"] / SCORES_FILE
        if file.is_file():
            runs.append(_Run(entry, read_typed(file)))
        else:
            missing.append(entry["path"])
    if not runs:
        raise DataError(f"{path}: no run is finished: go on with train --protocol and --resume")
    crossed = about["protocol"]["train_on"] is not None
    rows = [
        row
        for planned in _sorted_entries(about["runs"])
        for row in _rows(planned, runs, len(classes), positive, crossed, resamples)
    ]
    largest = max(run.entry["fraction"] for run in runs)
    pooled = {}
    for variant in about["variants"]:
        own = _of(runs, variant, largest)
        if own:
            windows = pool_runs(own)
            scores = score_pooled(windows, classes, positive, resamples=resamples)
            pooled[variant] = PooledVariant(windows, scores)
    return PatchTableOfRuns(
        path=path,
        about=about,
        rows=rows,
        differences=_differences(about, runs, classes, positive, resamples),
        pooled=pooled,
        facts={run.entry["path"]: _facts(path / run.entry["path"] / RUN_FILE) for run in runs},
        missing=missing,
    )


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
    point, drawn = drawn_scores(runs, classes, positive, resamples=resamples, seed=seed)
    result = {}
    for name, values in point.items():
        known = values[~np.isnan(values)]
        result[name] = PatchFigure(
            float(known.mean()) if len(known) else math.nan,
            float(known.std(ddof=1)) if len(known) > 1 else math.nan,
            *percentile_interval(drawn[name]),
            tuple(values.tolist()),
        )
    return result


def drawn_scores(
    runs: Sequence[TypedPatches], classes: int, positive: int, *, resamples: int, seed: int = 0
) -> tuple[dict[str, Values], dict[str, Values]]:
    """Every score of every run, and its mean over runs in all resamples of patients or slides.

    Parameters
    ----------
    runs, classes, positive, resamples, seed
        As in `figures_of`. Runs of other models on the same windows have the same resamples.

    Returns
    -------
    point : dict of str to ndarray of float64, shape (runs,)
        By `SHOWN`.
    drawn : dict of str to ndarray of float64, shape (resamples,)
        The same; empty from a single patient or slide.
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
    return {name: point[name, ALL][0] for name in SHOWN}, {n: drawn[n, ALL] for n in SHOWN}


def _sorted_entries(entries: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Entries by variant, fraction and domain, each in the order of the plan."""
    found: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for entry in entries:
        key = entry["variant"], entry["fraction"], entry["domain"]
        found.setdefault(key, []).append(entry)
    orders = [list(dict.fromkeys(values)) for values in zip(*found, strict=True)]
    keys = sorted(
        found, key=lambda key: [order.index(v) for order, v in zip(orders, key, strict=True)]
    )
    return [found[key] for key in keys]


def _rows(
    planned: Sequence[dict[str, Any]],
    runs: Sequence[_Run],
    classes: int,
    positive: int,
    crossed: bool,
    resamples: int,
) -> list[PatchRow]:
    """One row, or one for every domain that was tested; none before a run is finished."""
    done = [run for run in runs if run.entry in planned]
    if not done:
        return []
    first = planned[0]
    parts = {"" if crossed else first["domain"]: [run.typed for run in done]}
    if crossed:
        tested = sorted({domain for run in done for domain in run.typed.domains})
        parts = {domain: [_of_domain(run.typed, domain) for run in done] for domain in tested}
    return [
        PatchRow(
            variant=first["variant"],
            fraction=first["fraction"],
            reached=float(np.mean([run.entry["reached"] for run in done])),
            trained_on=first["domain"] if crossed else "",
            tested_on=domain,
            runs=len(chosen),
            planned=len(planned),
            clusters=len({group for run in chosen for group in run.groups}),
            scores=figures_of(chosen, classes, positive, resamples=resamples),
        )
        for domain, chosen in parts.items()
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


def _of(runs: Sequence[_Run], variant: str, fraction: float) -> dict[str, TypedPatches]:
    chosen = (variant, fraction)
    return {r.key: r.typed for r in runs if (r.entry["variant"], r.entry["fraction"]) == chosen}


def _differences(
    about: Mapping[str, Any],
    runs: Sequence[_Run],
    classes: tuple[str, ...],
    positive: int,
    resamples: int,
) -> list[PatchDifference]:
    """Every further variant less the first one, at every fraction that both have runs of."""
    first, *others = about["variants"]
    found = []
    for variant in others:
        for fraction in dict.fromkeys(run.entry["fraction"] for run in runs):
            own, base = (_of(runs, name, fraction) for name in (variant, first))
            both = [key for key in own if key in base]
            if not both:
                continue
            a, b = (pool_runs({key: side[key] for key in both}) for side in (own, base))
            scores = compare_pooled(a, b, classes, positive, resamples=resamples)
            clusters = len(set(a.groups))
            shown = {name: scores[name] for name in SHOWN}
            found.append(PatchDifference(variant, first, fraction, len(both), clusters, shown))
    return found


def _facts(file: Path) -> dict[str, Any]:
    """What a run wrote of itself; a table can be made without."""
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts
