"""Scores of patches with one class each: rare class first, intervals over patients.

Patients or slides are drawn, never patches: figures of one patient resemble each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import DataError
from celltyper.metrics.bootstrap import percentile_interval
from celltyper.metrics.ranking import SPECIFICITY
from celltyper.metrics.scoring import (
    ALL,
    check_patches,
    confusions_by_cluster,
    draw_scores,
    patch_scorer,
)

SCORES: dict[str, str] = {
    "balanced_accuracy": "share of patches called right, per class, mean over the classes; {call}",
    "auroc": "area under the ROC curve, {positive} against the rest; equal probabilities count "
    "one half",
    "auprc": "average precision of {positive}, not interpolated; by chance {share:.2f}, the share "
    "of {positive}",
    "f1": "F1 of {positive}; {call}",
    "sensitivity": "share of {positive} called {positive}; {call}",
    "specificity": "share of the others not called {positive}; {call}",
    "sensitivity_at_specificity": "largest sensitivity for {positive} at any threshold whose "
    "specificity on these patches is at least {specificity:g}",
    "accuracy": "share of patches called right; {call}",
    "weighted_f1": "F1 per class, weighted by the patches that have it; {call}",
    "kappa": "Cohen's kappa with quadratic weights; {call}",
    "ece": "expected calibration error, 15 bins of equal width, {confidence}",
    "brier": "half the squared distance of probabilities and truth, mean over patches",
    "macro_auroc": "area under the ROC curve of each class against the rest, mean over the classes",
    "macro_f1": "F1 per class, mean over the classes; {call}",
}
"""Every score of patch mode with its rule; the last two only for more than two classes."""

AGREEMENT = ("unanimous", "majority", "split")
"""Strata of expert agreement, see `agreement`."""


class Score(NamedTuple):
    """A score with its 95 % bootstrap interval; NaN where it cannot be computed."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True, eq=False)
class PatchScores:
    """Scores of a set of patches.

    Parameters
    ----------
    classes : tuple of str
        The K names.
    positive : int
        The positive class.
    threshold : float
        Probability from which a patch was called positive; NaN with more than two classes, of
        which the most probable one was called.
    scores : dict of str to Score
        By the names of `SCORES`.
    rules : dict of str to str
        Rule of every score, as it was applied here.
    per_class : dict of str to dict of str to Score
        By class: ``recall``, ``precision``, ``f1``, with more than two classes ``auroc``.
    confusion : ndarray of int, shape (K, K)
        Patches by true (rows) and called class (columns).
    clusters : int
        Number of patients or slides that were resampled.
    strata : dict of str to PatchScores
        The same by expert agreement, strata without a patch left out; empty without votes.
    """

    classes: tuple[str, ...]
    positive: int
    threshold: float
    scores: dict[str, Score]
    rules: dict[str, str]
    per_class: dict[str, dict[str, Score]]
    confusion: NDArray[np.int64]
    clusters: int
    strata: dict[str, PatchScores] = field(default_factory=dict)

    @property
    def patches(self) -> int:
        """Number of patches."""
        return int(self.confusion.sum())


def agreement(votes: ArrayLike) -> NDArray[np.intp]:
    """How far the experts agreed on every patch.

    Parameters
    ----------
    votes : array_like, shape (n, K)
        Share of the experts for each class.

    Returns
    -------
    ndarray of int, shape (n,)
        Index into `AGREEMENT`: all for one class, more than half for one, or neither.

    Raises
    ------
    DataError
        If shares do not sum to 1 in every row.
    """
    votes = np.asarray(votes, np.float64)
    if votes.ndim != 2 or not np.allclose(votes.sum(axis=1), 1, atol=1e-3):
        raise DataError(
            f"votes are {votes.shape}: give the share of experts for each class, every row with "
            "the sum 1"
        )
    most = votes.max(axis=1, initial=0)
    return np.select([most > 1 - 1e-6, most > 0.5 + 1e-6], [0, 1], 2)


def score_patches(
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    positive: int,
    groups: Sequence[str],
    *,
    threshold: float = 0.5,
    specificity: float = SPECIFICITY,
    votes: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> PatchScores:
    """Every score of a set of patches, with intervals over patients.

    Parameters
    ----------
    labels : array_like of int, shape (n,)
        True classes, 0 to K - 1.
    probabilities : array_like, shape (n, K)
        Class probabilities, rows with the sum 1.
    classes : sequence of str
        The K names, at least two.
    positive : int
        The positive class, usually the rare one.
    groups : sequence of str, length n
        Patient or slide of every patch: these are drawn, never patches.
    threshold : float
        Probability from which a patch is called positive, fixed beforehand on validation data;
        see `call_classes`.
    specificity : float
        Specificity at which sensitivity is read.
    votes : array_like, shape (n, K), optional
        Share of the experts for each class; adds the scores by agreement. For patches that
        several experts saw, for one expert is always unanimous.
    resamples : int
        Number of bootstrap resamples.
    seed : int
        Seed of the resampling.

    Returns
    -------
    PatchScores
        Percentile intervals at 95 %, NaN with fewer than two groups. Resamples where a score is
        NaN are left out of its interval.

    Raises
    ------
    DataError
        If the arrays do not fit together, a class is outside the list, or probabilities are not
        probabilities.
    """
    truth, shares, cluster = check_patches(labels, probabilities, len(classes), positive, groups)
    n_clusters = int(cluster.max()) + 1
    scorer = patch_scorer(truth, shares, cluster, positive, threshold, specificity)
    point = scorer(np.ones((1, n_clusters)))
    drawn = draw_scores(scorer, n_clusters, len(truth), resamples, seed)
    found = {
        key: Score(float(point[key][0]), *percentile_interval(drawn[key], 0.95)) for key in point
    }
    strata = {}
    if votes is not None:
        votes = np.asarray(votes, np.float64)
        if votes.shape != shares.shape:
            raise DataError(
                f"votes are {votes.shape}, probabilities {shares.shape}: give the share of "
                "experts for each class of each patch"
            )
        level = agreement(votes)
        for i in np.unique(level).tolist():
            inside = np.flatnonzero(level == i).tolist()
            strata[AGREEMENT[i]] = score_patches(
                truth[inside],
                shares[inside],
                classes,
                positive,
                [groups[j] for j in inside],
                threshold=threshold,
                specificity=specificity,
                resamples=resamples,
                seed=seed,
            )
    two = len(classes) == 2
    words = {
        "positive": classes[positive],
        "share": float((truth == positive).mean()),
        "call": f"called {classes[positive]} from {threshold:.2f} on" if two else "most probable",
        "specificity": specificity,
        "confidence": f"probability of {classes[positive]}" if two else "largest probability",
    }
    return PatchScores(
        classes=tuple(classes),
        positive=positive,
        threshold=threshold if two else float("nan"),
        scores={name: found[name, ALL] for name in SCORES if (name, ALL) in found},
        rules={name: SCORES[name].format(**words) for name in SCORES if (name, ALL) in found},
        per_class={
            name: {key: score for (key, of), score in found.items() if of == k}
            for k, name in enumerate(classes)
        },
        confusion=confusions_by_cluster(truth, shares, np.zeros_like(cluster), positive, threshold)[
            0
        ],
        clusters=n_clusters,
        strata=strata,
    )
