"""Scores of several runs on annotated images, and of their means in resamples of patients.

What is drawn is the mean over runs that the leaderboard shows. The score of all runs' cells
together, as in the table of a protocol, is another figure: where one seed calls all cells one class
and the next another, it is the larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.metrics.bootstrap import draw_weights, percentile_interval
from celltyper.metrics.ratios import mean_of_known
from celltyper.protocols.pooling import Clusters, Score, Tested, find_clusters, pool
from celltyper.protocols.table import ScoredRun

Values = NDArray[np.float64]


class DrawnScore(NamedTuple):
    """A score of several runs."""

    mean: float
    """Over runs, or over domains of the mean over their runs."""
    deviation: float
    """Of what is averaged last, with n - 1."""
    draws: Values
    """The mean in every resample, shape (n,); empty from a single cluster."""


class RunsFigure(NamedTuple):
    """A score of several runs with its interval; NaN where it is not known."""

    mean: float
    deviation: float
    low: float
    high: float


def figures_of_runs(
    runs: Sequence[ScoredRun], classes: Sequence[str], resamples: int
) -> tuple[dict[str, RunsFigure], dict[str, dict[str, RunsFigure]], str]:
    """Every score of several runs, with 95 % intervals.

    Parameters
    ----------
    runs : sequence of ScoredRun
        Finished, at least one.
    classes : sequence of str
    resamples : int

    Returns
    -------
    scores : dict of str to RunsFigure
        By `celltyper.protocols.pooling.HEADLINE`.
    per_class : dict of str to dict of str to RunsFigure
        By class, then by `celltyper.protocols.pooling.PER_CLASS`.
    clusters : str
        What was resampled.
    """
    clusters = find_clusters([image for run in runs for image in run.images or ()])
    objects = draw_weights(len(clusters.keys), resamples, 0)
    scores, per_class = draw_runs(runs, len(classes), clusters, objects)

    def figure(drawn: DrawnScore) -> RunsFigure:
        return RunsFigure(drawn.mean, drawn.deviation, *percentile_interval(drawn.draws))

    by_class = {
        name: {key: figure(drawn[number]) for key, drawn in per_class.items()}
        for number, name in enumerate(classes)
    }
    return {name: figure(drawn) for name, drawn in scores.items()}, by_class, clusters.text


def draw_runs(
    runs: Sequence[ScoredRun], classes: int, clusters: Clusters, weights: Values
) -> tuple[dict[str, DrawnScore], dict[str, list[DrawnScore]]]:
    """Mean scores of runs, and the same in resamples.

    Parameters
    ----------
    runs : sequence of ScoredRun
        Finished.
    classes : int
        Number K of phenotypes.
    clusters : Clusters
        Of their images, or of more.
    weights : ndarray of float64, shape (n, clusters)
        How often each cluster is drawn, see `celltyper.metrics.bootstrap.draw_weights`. Means over
        images draw groups, which are others where there are too few of them for the rest.

    Returns
    -------
    scores : dict of str to DrawnScore
        By `celltyper.protocols.pooling.HEADLINE`.
    per_class : dict of str to list of DrawnScore
        By `celltyper.protocols.pooling.PER_CLASS`, for all K.
    """
    counted = [pool([Tested(i, 0) for i in run.images or ()], classes, clusters) for run in runs]
    domains = [run.domain for run in runs]
    other = draw_weights(len(clusters.groups), len(weights), 0) if clusters.blocks else weights

    def drawn(of: Sequence[Score], statistic: Callable[[Score, Values], Values]) -> DrawnScore:
        point = np.array([float(statistic(one, one.counts.sum(0))) for one in of])
        rows = weights if len(of[0].counts) == len(clusters.keys) else other
        few = len(of[0].counts) < 2
        draws = [statistic(one, _totals(one.counts, rows[: 0 if few else None])) for one in of]
        means = _by_domain(point, domains)
        known = means if len(means) > 1 else point
        known = known[~np.isnan(known)]
        return DrawnScore(
            float(mean_of_known(means)),
            float(known.std(ddof=1)) if len(known) > 1 else float("nan"),
            mean_of_known(_by_domain(np.stack(draws), domains), axis=0),
        )

    first, first_classes = counted[0]
    scores = {
        name: drawn([headline[name] for headline, _ in counted], lambda s, sums: s.of(sums))
        for name in first
    }

    def of_class(number: int) -> Callable[[Score, Values], Values]:
        return lambda score, sums: score.of_class(number)(sums)

    per_class = {
        name: [drawn([row[name] for _, row in counted], of_class(k)) for k in range(classes)]
        for name in first_classes
    }
    return scores, per_class


def _by_domain(values: Values, domains: Sequence[str]) -> Values:
    """Mean over the runs (first axis) of every domain."""
    places = [np.array([d == one for d in domains]) for one in dict.fromkeys(domains)]
    return np.stack([mean_of_known(values[own], axis=0) for own in places])


def _totals(counts: Values, weights: Values) -> Values:
    totals: Values = weights @ counts.reshape(len(counts), -1)
    return totals.reshape(len(weights), *counts.shape[1:])
