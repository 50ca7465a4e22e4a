"""Logistic regression on embeddings, all strengths and inner folds fitted at once.

One fit is

    minimise  -sum(A * log(softmax(X B + b))) + strength / 2 * |B|^2

with A the weights of `celltyper.probes.cases.Cases.loss_weights` (they sum to 1), X standardised
embeddings and b an intercept that is not held back. Two classes are a softmax of two, whose B
differ in sign alone: the usual single logit, held back by half the strength. scikit-learn's C is
``1 / (sum of its weights * strength)`` for three classes or more, twice that for two.

Since the loss does not change if all classes get the same vector, B is sought among those whose
columns sum to 0, in an orthonormal basis of K - 1 columns: the same optimum, and a unique one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from celltyper.errors import TrainingError
from celltyper.probes.cases import (
    CHOSEN,
    DEFAULT,
    GIVEN,
    Cases,
    Choice,
    Fitted,
    Float,
    Score,
    choose,
    linear_arrays,
    softmax,
    standard_of,
)

STRENGTHS = tuple(10.0 ** (i / 2) for i in range(2, -7, -1))
"""Strengths to choose from, 10 to .001, two a decade."""

_MEMORY = 8
_ITERATIONS = 2000


def fit_logistic(
    cases: Cases,
    *,
    strength: float | None = None,
    strengths: Sequence[float] = STRENGTHS,
    score: Score = "balanced_accuracy",
    folds: int = 5,
    seed: int = 0,
) -> Fitted:
    """Fit a logistic regression, its strength chosen by `choose_strength`.

    Where the cases are of too few groups for an inner cross-validation, the strongest candidate is
    taken. On embeddings of mitotic figures, two to sixty training cases or those of one or two
    slides rank unseen slides about as well at any strength from 10 to .1, but their probabilities
    are the better the stronger it is; the usual C = 1 of scikit-learn is a strength of two over
    the number of cases, and worse in both.

    Parameters
    ----------
    cases : Cases
    strength : float, optional
        Taken as it is; nothing is chosen.
    strengths, score, folds, seed
        See `choose_strength` and `Cases.inner_folds`.

    Returns
    -------
    Fitted
        Arrays ``weight`` (D, K) and ``bias`` (K,) of embeddings that are not standardised.

    Raises
    ------
    ConfigError
        If the score is unknown.
    ValueError
        If a strength is not above 0, or there are fewer than two folds.
    """
    facts: dict[str, object] = {"chosen_by": GIVEN}
    if strength is None:
        fold = cases.inner_folds(folds, seed)
        if fold is None:
            strength, facts = float(_positive(strengths).max()), {"chosen_by": DEFAULT}
        else:
            choice = choose_strength(cases, strengths, score, fold)
            strength = choice.value
            facts = {
                "chosen_by": CHOSEN,
                "strengths": sorted(strengths, reverse=True),
                "scores": choice.scores.tolist(),
                "score": score,
                "inner_folds": int(fold.max()) + 1,
            }
    standard = standard_of(cases.embeddings)
    x = standard.apply(cases.embeddings)
    problem = _Problems(
        x,
        cases.loss_weights().T[None],
        np.zeros((1, x.shape[1])),
        np.ones((1, x.shape[1])),
        np.zeros(1, np.intp),
        _positive([strength]),
    )
    weight, bias = problem.maps(_minimise(problem, 1e-7))
    arrays = linear_arrays(standard, weight[0].T, bias[0, :, 0])
    return Fitted(arrays, {"strength": strength, **facts})


def choose_strength(
    cases: Cases,
    strengths: Sequence[float],
    score: Score,
    fold: NDArray[np.intp],
) -> Choice:
    """Choose the strength by cross-validation; of equal scores, the stronger wins.

    Every inner training part standardises its embeddings and weighs its classes by itself.

    Parameters
    ----------
    cases : Cases
    strengths : sequence of float
        Candidates, above 0, in any order.
    score : {"balanced_accuracy", "log_loss"}
        See `celltyper.probes.cases.choose`.
    fold : ndarray of int, shape (n,)
        Inner fold of every case, see `Cases.inner_folds`.

    Returns
    -------
    Choice
        Scores from the strongest to the weakest.
    """
    candidates = _positive(sorted(strengths, reverse=True))
    x = standard_of(cases.embeddings).apply(cases.embeddings)
    k, s = int(fold.max()) + 1, len(candidates)
    parts = [standard_of(x[fold != f]) for f in range(k)]
    problems = _Problems(
        x,
        np.stack([cases.loss_weights(fold != f).T for f in range(k)]),
        np.stack([part.mean for part in parts]),
        np.stack([part.scale for part in parts]),
        np.repeat(np.arange(k), s),
        np.tile(candidates, k),
    )
    weight, bias = problems.maps(_minimise(problems, 1e-3))
    unseen = np.empty((s, *cases.targets.shape))
    for f in range(k):
        out = fold == f
        of_fold = slice(f * s, (f + 1) * s)
        logits = weight[of_fold] @ x[out].T + bias[of_fold]
        unseen[:, out] = softmax(logits, 1).transpose(0, 2, 1)
    return choose(candidates.tolist(), list(unseen), cases, score)


def _positive(strengths: Sequence[float]) -> Float:
    if not strengths or not all(s > 0 for s in strengths):
        raise ValueError(f"strengths must be above 0, got {list(strengths)}")
    return np.asarray(strengths, np.float64)


def _contrasts(classes: int) -> Float:
    """Orthonormal basis (K - 1, K) of the vectors that sum to 0 (Helmert's)."""
    basis = np.zeros((classes - 1, classes))
    for j in range(1, classes):
        basis[j - 1, :j] = -1
        basis[j - 1, j] = j
        basis[j - 1] /= np.sqrt(j * (j + 1))
    return basis


@dataclass(frozen=True, eq=False)
class _Problems:
    """P regressions over the same n cases, so that one matrix product serves them all.

    Parameters theta are of shape (P, K - 1, D + 1), the intercept last. Cases are the last axis of
    logits and probabilities, since sums over few classes are slow along the last.
    """

    x: Float
    """(n, D)"""
    weights: Float
    """(parts, K, n), as A above."""
    mean: Float
    """(parts, D); with `scale`, how a part standardises `x` again."""
    scale: Float
    part: NDArray[np.intp]
    """(P,)"""
    strength: Float
    """(P,)"""

    @property
    def basis(self) -> Float:
        return _contrasts(self.weights.shape[1])

    def take(self, keep: NDArray[np.bool_]) -> _Problems:
        return replace(self, part=self.part[keep], strength=self.strength[keep])

    def maps(self, theta: Float) -> tuple[Float, Float]:
        """Weights (P, K, D) and biases (P, K, 1) that give the logits of `x`."""
        full = self.basis.T @ theta
        weight: Float = full[..., :-1] / self.scale[self.part][:, None]
        bias: Float = full[..., -1:] - weight @ self.mean[self.part][:, :, None]
        return weight, bias

    def logits(self, theta: Float) -> Float:
        """Logits of all problems, (P, K, n)."""
        p, j, _ = theta.shape
        weight = theta[..., :-1] / self.scale[self.part][:, None]
        bias = theta[..., -1:] - weight @ self.mean[self.part][:, :, None]
        inner = (weight.reshape(p * j, -1) @ self.x.T).reshape(p, j, -1)
        inner += bias
        found: Float = self.basis.T @ inner
        return found

    def gradient(self, theta: Float, probabilities: Float) -> Float:
        """Of the objective, as theta."""
        p, j, _ = theta.shape
        a = self.weights[self.part]
        error = self.basis @ (probabilities * a.sum(1, keepdims=True) - a)
        total = error.sum(2, keepdims=True)
        found = np.empty_like(theta)
        found[..., :-1] = (error.reshape(p * j, -1) @ self.x).reshape(p, j, -1)
        found[..., :-1] -= self.mean[self.part][:, None] * total
        found[..., :-1] /= self.scale[self.part][:, None]
        found[..., :-1] += self.strength[:, None, None] * theta[..., :-1]
        found[..., -1:] = total
        return found


def _minimise(problems: _Problems, tolerance: float) -> Float:
    """Solve all problems by L-BFGS, preconditioned by one bound of their curvature.

    A problem is done when its gradient is shorter than ``tolerance * strength``. The objective
    curves by at least the strength, so its B is then within `tolerance` of the optimum.
    """
    count, features = len(problems.strength), problems.x.shape[1]
    result = np.zeros((count, problems.weights.shape[1] - 1, features + 1))
    precondition = _bound(problems)
    active = np.arange(count)
    theta = result.copy()
    logits = problems.logits(theta)
    gradient = problems.gradient(theta, softmax(logits, 1))
    past: list[_Pair] = []
    for _ in range(_ITERATIONS):
        going = np.sqrt(_dot(gradient, gradient)) > tolerance * problems.strength
        if not going.all():
            result[active[~going]] = theta[~going]
            if not going.any():
                return result
            active, problems = active[going], problems.take(going)
            theta, logits, gradient = theta[going], logits[going], gradient[going]
            past = [_Pair(*(part[going] for part in pair)) for pair in past]
        direction = -_two_loops(gradient, past, partial(precondition, problems))
        change = problems.logits(direction)
        length, probabilities = _line_search(
            problems, theta, direction, logits, change, _dot(gradient, direction)
        )
        step = length[:, None, None] * direction
        theta, logits = theta + step, logits + length[:, None, None] * change
        before, gradient = gradient, problems.gradient(theta, probabilities)
        turn = gradient - before
        past = [*past[1 - _MEMORY :], _Pair(step, turn, _dot(step, turn))]
    raise TrainingError(
        f"logistic regression did not converge in {_ITERATIONS} steps at strength "
        f"{problems.strength.min():g}; take larger strengths"
    )


class _Pair(NamedTuple):
    step: Float
    turn: Float
    """Change of the gradient along the step."""
    product: Float
    """Of both, (P,)."""


def _dot(a: Float, b: Float) -> Float:
    found: Float = np.einsum("pjd,pjd->p", a, b)
    return found


def _two_loops(
    gradient: Float, past: Sequence[_Pair], precondition: Callable[[Float], Float]
) -> Float:
    """Inverse curvature times gradient, by the two loops of L-BFGS (doi:10.1007/BF01589116)."""
    rest, kept = gradient.copy(), []
    for pair in reversed(past):
        kept.append(_dot(pair.step, rest) / pair.product)
        rest -= kept[-1][:, None, None] * pair.turn
    found = precondition(rest)
    for pair, a in zip(past, reversed(kept), strict=True):
        found += (a - _dot(pair.turn, found) / pair.product)[:, None, None] * pair.step
    return found


class _Curvature(NamedTuple):
    values: Float
    basis: Float
    """Eigenvectors, (D, m); along what is left out the curvature is the strength."""


def _bound(problems: _Problems) -> Callable[[_Problems, Float], Float]:
    """Inverse of ``X^T diag(a) X / 2 + strength``, which bounds the curvature from above.

    One eigenbasis serves all strengths. With more cases than features, one also serves all parts,
    which share most of their cases; with fewer, cases span a subspace, and another one in every
    part since that standardises features by itself. It only guides the steps: the optimum does
    not depend on it.
    """
    x, a, least = problems.x, problems.weights.sum(1), problems.strength.min()
    wide = x.shape[0] < x.shape[1]
    if wide:
        own = [
            _curvature((x - mean) / scale, part, least)
            for part, mean, scale in zip(a, problems.mean, problems.scale, strict=True)
        ]
    else:
        own = [_curvature(x, a.mean(0), least)]

    def precondition(left: _Problems, gradient: Float) -> Float:
        found = np.empty_like(gradient)
        found[..., -1] = 2 * gradient[..., -1]
        which = left.part if wide else np.zeros_like(left.part)
        for number in np.unique(which):
            here, (values, basis) = which == number, own[number]
            p, j = int(here.sum()), gradient.shape[1]
            s = np.repeat(left.strength[here], j)[:, None]
            flat = gradient[here, :, :-1].reshape(p * j, -1)
            inner = (flat @ basis) * (1 / (values / 2 + s) - 1 / s)
            found[here, :, :-1] = (flat / s + inner @ basis.T).reshape(p, j, -1)
        return found

    return precondition


def _curvature(x: Float, weights: Float, least: float) -> _Curvature:
    """Eigenvalues of ``X^T diag(weights) X`` that are something beside the least strength."""
    scaled = x * np.sqrt(weights)[:, None]
    wide = scaled.shape[0] < scaled.shape[1]
    values, basis = eigh(scaled @ scaled.T if wide else scaled.T @ scaled)
    kept = values > 0.01 * least
    values, basis = values[kept], basis[:, kept]
    return _Curvature(values, scaled.T @ basis / np.sqrt(values) if wide else basis)


def _line_search(
    problems: _Problems,
    theta: Float,
    direction: Float,
    logits: Float,
    change: Float,
    slope: Float,
) -> tuple[Float, Float]:
    """Step lengths (P,) at which the slopes have fallen to a third, and the probabilities there.

    Along a line only the n logits change, so slope and curvature cost no product with `x`: it is
    Newton's method in one variable, kept between ends where the slope differs in sign.
    """
    a = problems.weights[problems.part]
    rows = a.sum(1)
    fixed = problems.strength * _dot(theta[..., :-1], direction[..., :-1]) - _dot(a, change)
    ridge = problems.strength * _dot(direction[..., :-1], direction[..., :-1])
    t, low, high = np.ones_like(slope), np.zeros_like(slope), np.full_like(slope, np.inf)
    probabilities = softmax(logits + change, 1)
    for _ in range(30):
        first = (probabilities * change).sum(1)
        now = (rows * first).sum(1) + fixed + t * ridge
        far = np.abs(now) > np.abs(slope) / 3
        if not far.any():
            break
        curve = (rows * ((probabilities * change**2).sum(1) - first**2)).sum(1) + ridge
        low, high = np.where(now < 0, t, low), np.where(now > 0, t, high)
        middle = np.where(np.isinf(high), 2 * low + 1, (low + high) / 2)
        newton = t - now / curve
        t = np.where(far, np.where((newton > low) & (newton < high), newton, middle), t)
        probabilities = softmax(logits + t[:, None, None] * change, 1)
    return t, probabilities
