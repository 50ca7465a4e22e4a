"""The test windows of several runs behind each other, each called at the threshold of its run.

Scores of a ranking and of calibration are those of the probabilities. Scores of what was called
are computed from the calls, written as probabilities of 0 and 1, so that every run keeps the
threshold that its own validation windows chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from celltyper.classification.gallery import Mistakes, find_mistakes
from celltyper.metrics.bootstrap import PairedDifference
from celltyper.metrics.classification import (
    AGREEMENT,
    SCORES,
    PatchScores,
    agreement,
    score_patches,
)
from celltyper.metrics.comparison import ScoredPatches, paired_difference
from celltyper.metrics.confusion import Values, call_classes
from celltyper.protocols.patches import TypedPatches

CALLED = tuple(name for name, rule in SCORES.items() if "{call}" in rule)
"""Scores that depend on a threshold."""


@dataclass(frozen=True, eq=False)
class Pooled:
    """Test windows of several runs; one that several runs tested is there as often.

    Parameters
    ----------
    runs : tuple of str, length n
        Which run tested the row.
    names, groups : tuple of str, length n
        The window, and its slide or patient.
    labels : ndarray of intp, shape (n,)
    votes : ndarray of float64, shape (n, K)
    experts : ndarray of intp, shape (n,)
    probabilities : ndarray of float64, shape (n, K)
    thresholds : ndarray of float64, shape (n,)
        Of the run.
    """

    runs: tuple[str, ...]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    labels: NDArray[np.intp]
    votes: Values
    experts: NDArray[np.intp]
    probabilities: Values
    thresholds: Values

    def take(self, rows: NDArray[np.intp]) -> Pooled:
        """Choose rows."""
        return Pooled(
            tuple(self.runs[i] for i in rows),
            tuple(self.names[i] for i in rows),
            tuple(self.groups[i] for i in rows),
            self.labels[rows],
            self.votes[rows],
            self.experts[rows],
            self.probabilities[rows],
            self.thresholds[rows],
        )

    def calls(self, positive: int) -> Values:
        """What was called, as probabilities of 0 and 1, shape (n, K)."""
        called = np.empty(len(self.names), np.intp)
        for threshold in np.unique(self.thresholds):
            rows = self.thresholds == threshold
            called[rows] = call_classes(self.probabilities[rows], positive, float(threshold))
        certain: Values = np.eye(self.probabilities.shape[1])[called]
        return certain


def pool_runs(runs: Mapping[str, TypedPatches]) -> Pooled:
    """Put the test windows of runs behind each other.

    Parameters
    ----------
    runs : mapping of str to TypedPatches
        By a name that the runs of another variant share, at least one.

    Returns
    -------
    Pooled
    """
    parts = list(runs.values())
    return Pooled(
        runs=tuple(key for key, run in runs.items() for _ in run.names),
        names=tuple(name for run in parts for name in run.names),
        groups=tuple(group for run in parts for group in run.groups),
        labels=np.concatenate([run.labels for run in parts]),
        votes=np.concatenate([run.votes for run in parts]),
        experts=np.concatenate([run.experts for run in parts]),
        probabilities=np.concatenate([run.probabilities for run in parts]),
        thresholds=np.concatenate([np.full(len(run.names), run.threshold) for run in parts]),
    )


def score_pooled(
    pooled: Pooled, classes: tuple[str, ...], positive: int, *, resamples: int = 1000
) -> PatchScores:
    """Every score of pooled windows, with intervals over patients and strata of agreement.

    Parameters
    ----------
    pooled : Pooled
    classes : tuple of str
        The K names.
    positive : int
        The positive class.
    resamples : int
        Of the bootstrap; all rows of a patient are drawn together, whatever the run.

    Returns
    -------
    PatchScores
        Its threshold is NaN where the runs have several. Strata are of the windows that at least
        two experts saw, and empty without any.
    """
    scores = _scored(pooled, classes, positive, resamples)
    strata = {}
    several = np.flatnonzero(pooled.experts > 1)
    if len(several):
        level = agreement(pooled.votes[several])
        for i in np.unique(level).tolist():
            inside = pooled.take(several[level == i])
            strata[AGREEMENT[i]] = _scored(inside, classes, positive, resamples)
    return replace(scores, strata=strata)


def compare_pooled(
    first: Pooled,
    second: Pooled,
    classes: tuple[str, ...],
    positive: int,
    *,
    resamples: int = 1000,
) -> dict[str, PairedDifference]:
    """Difference ``first - second`` of every score on the same windows of the same runs.

    Parameters
    ----------
    first, second : Pooled
        Of runs with the same names.
    classes, positive, resamples
        As in `score_pooled`.

    Returns
    -------
    dict of str to PairedDifference
        As `celltyper.metrics.comparison.paired_difference` gives; each run at its own threshold.

    Raises
    ------
    DataError
        If the two do not hold the same windows.
    """

    def difference(of_first: Values, of_second: Values) -> dict[str, PairedDifference]:
        a, b = _named(first, of_first), _named(second, of_second)
        return paired_difference(a, b, classes, positive, resamples=resamples)

    by_rank = difference(first.probabilities, second.probabilities)
    by_call = difference(first.calls(positive), second.calls(positive))
    return {name: (by_call if name in CALLED else by_rank)[name] for name in by_rank}


def pooled_mistakes(pooled: Pooled, positive: int, most: int = 12) -> list[Mistakes]:
    """Find the mistakes of which the runs were most certain.

    Parameters
    ----------
    pooled : Pooled
    positive : int
        The positive class.
    most : int
        Largest number of rows of each kind.

    Returns
    -------
    list of Mistakes
        As `celltyper.classification.gallery.find_mistakes` gives. Of a window that several runs
        called wrong in the same way, the most certain one counts, and the window once.
    """
    kinds: dict[tuple[int, int], dict[str, int]] = {}
    for threshold in np.unique(pooled.thresholds):
        rows = np.flatnonzero(pooled.thresholds == threshold)
        for kind in find_mistakes(
            pooled.labels[rows],
            pooled.probabilities[rows],
            positive,
            threshold=float(threshold),
            most=len(rows),
        ):
            best = kinds.setdefault((kind.true, kind.called), {})
            shares = pooled.probabilities[:, kind.called]
            for i in rows[kind.rows].tolist():
                other = best.setdefault(pooled.names[i], i)
                if shares[i] > shares[other]:
                    best[pooled.names[i]] = i
    found = []
    for (true, called), by_name in kinds.items():
        rows = np.array(sorted(by_name.values()), np.intp)
        order = np.argsort(-pooled.probabilities[rows, called], kind="stable")
        found.append(Mistakes(true, called, len(rows), rows[order[:most]]))
    return sorted(found, key=lambda kind: (-kind.total, kind.true, kind.called))


def _scored(pooled: Pooled, classes: tuple[str, ...], positive: int, resamples: int) -> PatchScores:
    def of(probabilities: Values, threshold: float = 0.5) -> PatchScores:
        return score_patches(
            pooled.labels,
            probabilities,
            classes,
            positive,
            pooled.groups,
            threshold=threshold,
            resamples=resamples,
        )

    used = np.unique(pooled.thresholds)
    if len(used) == 1:
        return of(pooled.probabilities, float(used[0]))
    ranked, called = of(pooled.probabilities), of(pooled.calls(positive))
    words = {
        "positive": classes[positive],
        "call": f"called {classes[positive]} from the threshold of each run on, "
        f"{used[0]:.2f} to {used[-1]:.2f}",
    }
    rules = {name: SCORES[name].format(**words) for name in CALLED if name in called.scores}
    return replace(
        called,
        threshold=float("nan"),
        scores={
            name: (called if name in CALLED else ranked).scores[name] for name in ranked.scores
        },
        rules=ranked.rules | rules,
    )


def _named(pooled: Pooled, probabilities: Values) -> ScoredPatches:
    """Windows under names that are unique even where several runs tested one."""
    names = [f"{run}: {name}" for run, name in zip(pooled.runs, pooled.names, strict=True)]
    return ScoredPatches(names, pooled.labels, probabilities, pooled.groups)
