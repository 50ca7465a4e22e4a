"""Whether one run is better than another on the same patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from celltyper.errors import DataError
from celltyper.metrics.bootstrap import PairedDifference, paired_interval
from celltyper.metrics.classification import SCORES
from celltyper.metrics.confusion import Values
from celltyper.metrics.ranking import SPECIFICITY
from celltyper.metrics.scoring import ALL, check_patches, draw_scores, patch_scorer


@dataclass(frozen=True, eq=False)
class ScoredPatches:
    """What one run said of some patches, to be compared with another run.

    Parameters
    ----------
    names : sequence of str, length n
        Unique.
    labels : array_like of int, shape (n,)
        True classes, 0 to K - 1.
    probabilities : array_like, shape (n, K)
        Class probabilities, rows with the sum 1.
    groups : sequence of str, length n
        Patient or slide of every patch.
    threshold : float
        Probability from which this run calls a patch positive.
    """

    names: Sequence[str]
    labels: ArrayLike
    probabilities: ArrayLike
    groups: Sequence[str]
    threshold: float = 0.5


def paired_difference(
    first: ScoredPatches,
    second: ScoredPatches,
    classes: Sequence[str],
    positive: int,
    *,
    specificity: float = SPECIFICITY,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, PairedDifference]:
    """Difference ``first - second`` of every score on the same patches and resamples.

    Parameters
    ----------
    first, second : ScoredPatches
        Two runs on the same patches, in any order.
    classes : sequence of str
        The K names.
    positive : int
        The positive class.
    specificity : float
        Specificity at which sensitivity is read.
    resamples : int
        Number of bootstrap resamples.
    seed : int
        Seed of the resampling.

    Returns
    -------
    dict of str to PairedDifference
        By the names of `SCORES`; interval and p-value as in
        `celltyper.metrics.bootstrap.paired_bootstrap`, NaN with fewer than two groups.

    Raises
    ------
    DataError
        If the two do not hold the same patches with the same labels and groups, or one of them
        cannot be scored.
    """
    second = _aligned(first, second)
    scorers = []
    for run in (first, second):
        truth, shares, cluster = check_patches(
            run.labels, run.probabilities, len(classes), positive, run.groups
        )
        scorers.append(patch_scorer(truth, shares, cluster, positive, run.threshold, specificity))
    n_clusters = int(cluster.max()) + 1

    def scorer(weights: Values) -> dict[tuple[str, int], Values]:
        a, b = (score(weights) for score in scorers)
        return {key: a[key] - b[key] for key in a if key[1] == ALL}

    point = scorer(np.ones((1, n_clusters)))
    drawn = draw_scores(scorer, n_clusters, len(truth), resamples, seed)
    return {
        name: paired_interval(float(point[name, ALL][0]), drawn[name, ALL])
        for name in SCORES
        if (name, ALL) in point
    }


def _aligned(first: ScoredPatches, second: ScoredPatches) -> ScoredPatches:
    """The second run in the order of the first."""
    for run, which in ((first, "first"), (second, "second")):
        lengths = {len(run.names), len(run.groups)}
        lengths |= {len(np.asarray(run.labels)), len(np.asarray(run.probabilities))}
        if len(lengths) > 1 or len(set(run.names)) < len(run.names):
            raise DataError(
                f"the {which} run needs one label, probability and group for every patch, and "
                "every name once"
            )
    missing = [
        f"{len(only)} only in the {which} (such as {min(only)!r})"
        for which, only in (
            ("first", set(first.names) - set(second.names)),
            ("second", set(second.names) - set(first.names)),
        )
        if only
    ]
    if missing:
        raise DataError(
            f"the two runs scored different patches, {' and '.join(missing)}: score both on the "
            "same ones"
        )
    place = {name: i for i, name in enumerate(second.names)}
    order = np.array([place[name] for name in first.names], np.intp)
    labels, groups = np.asarray(second.labels)[order], [second.groups[i] for i in order]
    for what, a, b in (("label", first.labels, labels), ("group", first.groups, groups)):
        differ = np.asarray(a) != np.asarray(b)
        if differ.any():
            i = int(differ.argmax())
            raise DataError(
                f"{int(differ.sum())} patches have another {what} in the second run ("
                f"{first.names[i]!r}: {np.asarray(a)[i]}, then {np.asarray(b)[i]}): score both "
                "runs on the same table"
            )
    return ScoredPatches(
        first.names, labels, np.asarray(second.probabilities)[order], groups, second.threshold
    )
