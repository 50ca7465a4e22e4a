"""One prototype a class, and distances that know how cases of a class scatter.

The nearest class mean takes all directions as equal. On embeddings of mitotic figures this costs
a tenth of balanced accuracy, since most of what varies has nothing to do with the class; so the
distance is Mahalanobis' with one covariance for all classes, shrunk towards a multiple of the
identity: linear discriminant analysis. Shrunk in full, it is the nearest class mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from celltyper.probes.cases import (
    CHOSEN,
    DEFAULT,
    GIVEN,
    Cases,
    Fitted,
    Float,
    Score,
    Standard,
    choose,
    linear_arrays,
    softmax,
    standard_of,
)

SHRINKAGES = (1.0, 0.9, 0.6, 0.3, 0.1, 0.03, 0.01)
"""Shrinkages to choose from."""

_UNCHOSEN = 0.9
"""On embeddings of mitotic figures the best one for 8 to 231 cases, and for one or two slides."""


def fit_prototypes(
    cases: Cases,
    *,
    shrinkage: float | None = None,
    shrinkages: Sequence[float] = SHRINKAGES,
    score: Score = "balanced_accuracy",
    folds: int = 5,
    seed: int = 0,
) -> Fitted:
    """Fit class means and their shared covariance, its shrinkage chosen by inner cross-validation.

    The prior of a class is its share of the loss (equal for balanced class weights). The
    covariance is that of all cases about the means of their classes, whatever the class weights:
    a common class tells the scatter better than a rare one. Where no class has two different
    cases, cases are taken to scatter in every direction as much as all of them do in total.

    Parameters
    ----------
    cases : Cases
    shrinkage : float, optional
        Taken as it is; nothing is chosen.
    shrinkages : sequence of float
        Candidates above 0, at most 1, in any order; of equal scores, the largest wins. Where the
        cases are of too few groups for an inner cross-validation, the nearest to .9 is taken.
    score, folds, seed
        See `celltyper.probes.cases.choose` and `Cases.inner_folds`.

    Returns
    -------
    Fitted
        Arrays ``weight`` (D, K) and ``bias`` (K,) of embeddings that are not standardised.

    Raises
    ------
    ConfigError
        If the score is unknown.
    ValueError
        If a shrinkage is out of range, or there are fewer than two folds.
    """
    wrong = [s for s in (shrinkages if shrinkage is None else [shrinkage]) if not 0 < s <= 1]
    if wrong:
        raise ValueError(f"shrinkages must lie above 0 and be at most 1, got {wrong[0]}")
    facts: dict[str, object]
    if shrinkage is not None:
        facts = {"chosen_by": GIVEN}
    elif (fold := cases.inner_folds(folds, seed)) is None:
        shrinkage, facts = min(shrinkages, key=_from_unchosen), {"chosen_by": DEFAULT}
    else:
        candidates = sorted(shrinkages, reverse=True)
        parts = int(fold.max()) + 1
        unseen = np.empty((len(candidates), *cases.targets.shape))
        for f in range(parts):
            means = _Means(cases, fold != f)
            x = means.standard.apply(cases.embeddings[fold == f])
            for i, candidate in enumerate(candidates):
                weight, bias = means.linear(candidate)
                unseen[i, fold == f] = softmax(x @ weight + bias)
        choice = choose(candidates, list(unseen), cases, score)
        shrinkage = choice.value
        facts = {
            "chosen_by": CHOSEN,
            "shrinkages": candidates,
            "scores": choice.scores.tolist(),
            "score": score,
            "inner_folds": parts,
        }
    means = _Means(cases, np.ones(len(cases), np.bool_))
    arrays = linear_arrays(means.standard, *means.linear(shrinkage))
    return Fitted(arrays, {"shrinkage": shrinkage, **facts})


def _from_unchosen(shrinkage: float) -> float:
    return abs(shrinkage - _UNCHOSEN)


class _Means:
    """Class means and covariance of standardised embeddings."""

    standard: Standard

    def __init__(self, cases: Cases, rows: NDArray[np.bool_]) -> None:
        x = cases.embeddings[rows]
        self.standard = standard_of(x)
        x = self.standard.apply(x)
        share = cases.targets[rows] * cases.weights[rows, None]
        share /= share.sum()
        mass = share.sum(0)
        self.means: Float = share.T @ x / mass[:, None]
        self.prior: Float = cases.loss_weights(rows).sum(0)
        second = (x.T * share.sum(1)) @ x
        self.covariance: Float = second - (self.means.T * mass) @ self.means
        # no more than what rounding leaves
        if np.trace(self.covariance) < 1e-9 * np.trace(second):
            self.covariance = np.trace(second) * np.eye(len(second))

    def linear(self, shrinkage: float) -> tuple[Float, Float]:
        """Weight (D, K) and bias (K,) whose softmax is the posterior."""
        shrunk = (1 - shrinkage) * self.covariance
        # the last term is for data without any scatter
        shrunk.flat[:: len(shrunk) + 1] += (
            shrinkage * np.trace(self.covariance) / len(shrunk) + 1e-12
        )
        weight: Float = cho_solve(cho_factor(shrunk, overwrite_a=True), self.means.T)
        return weight, np.log(self.prior) - (self.means * weight.T).sum(1) / 2
