"""What a probe is fitted to, and how its settings are chosen without looking at the test part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import DataError, unknown_name
from celltyper.losses import effective_class_weights
from celltyper.probes.folds import group_mass, grouped_folds

Array = NDArray[Any]
Float = NDArray[np.float64]

ClassWeights = Literal["balanced", "sqrt", "none"]
Score = Literal["balanced_accuracy", "log_loss"]

GIVEN = "given"
CHOSEN = "inner cross-validation"
DEFAULT = "default: too few slides or patients for inner cross-validation"
"""How a setting came about, fact ``chosen_by`` of a probe."""

_TINY = 1e-12


class Standard(NamedTuple):
    """Mean and deviation of every feature, each of shape (D,)."""

    mean: Float
    scale: Float

    def apply(self, embeddings: Array) -> Float:
        """Standardise embeddings (n, D), in float64."""
        found: Float = (embeddings - self.mean) / self.scale
        return found


class Fitted(NamedTuple):
    """What a fit gives: all that its probabilities need, and what was chosen."""

    arrays: dict[str, Array]
    facts: dict[str, Any]


class Choice(NamedTuple):
    """A setting chosen by inner cross-validation."""

    value: float
    scores: Float
    """Score of every candidate; higher is better."""


@dataclass(frozen=True, eq=False)
class Cases:
    """Embeddings with what is known of them, checked by `check_cases`."""

    embeddings: Array
    """(n, D), finite."""
    targets: Float
    """(n, K), rows sum to 1."""
    groups: tuple[str, ...]
    weights: Float
    """(n,), above 0."""
    class_weights: ClassWeights

    def __len__(self) -> int:
        return len(self.embeddings)

    def loss_weights(self, rows: NDArray[np.bool_] | None = None) -> Float:
        """Weight of every pair of case and class in the loss.

        The loss of all probes is ``-sum(weights * log(probabilities))``: the cross-entropy of
        soft targets, times the weight of the case, times that of the class, as a weighted mean.

        Parameters
        ----------
        rows : ndarray of bool, shape (n,), optional
            Cases that take part; by default all. Class weights are theirs alone.

        Returns
        -------
        ndarray of float64, shape (n, K)
            Sums to 1; 0 where a case takes no part.
        """
        found: Float = self.targets * self.weights[:, None]
        if rows is not None:
            found = found * rows[:, None]
        rule = "inverse" if self.class_weights == "balanced" else self.class_weights
        found = found * effective_class_weights(found.sum(0), rule)
        total: Float = found / found.sum()
        return total

    def inner_folds(self, k: int, seed: int) -> NDArray[np.intp] | None:
        """Folds of whole groups to choose a setting by, as many of `k` as the groups allow.

        The class of a case is that of its largest target: a share of the votes of a slide's cases
        does not make them cases of that class.

        Parameters
        ----------
        k : int
            Folds asked for, at least 2.
        seed : int

        Returns
        -------
        ndarray of int, shape (n,), or None
            Fold of every case. Outside every fold there is every class. None if not even two
            folds do that: then there is nothing to choose by, and every probe says what it takes.

        Raises
        ------
        ValueError
            If `k` is below 2.
        """
        if k < 2:
            raise ValueError(f"folds must be at least 2, got {k}")
        member = np.unique(np.asarray(self.groups), return_inverse=True)[1]
        labels = np.eye(self.targets.shape[1])[self.targets.argmax(1)]
        # a class that is no case's own may have votes
        both = np.concatenate([labels[:, labels.any(0)], self.targets], axis=1)
        holders = (group_mass(both, member) > 0).sum(0)
        for folds in range(min(k, int(holders.min())), 1, -1):
            fold = grouped_folds(self.targets, self.groups, folds, seed)
            mass = group_mass(both, fold)
            if (mass.sum(0) - mass > _TINY).all():
                return fold
        return None


def check_cases(
    embeddings: ArrayLike,
    targets: ArrayLike,
    groups: Sequence[str],
    weights: ArrayLike | None,
    class_weights: ClassWeights,
) -> Cases:
    """Check what a probe is to be fitted to.

    Parameters
    ----------
    embeddings : array_like, shape (n, D)
    targets : array_like, shape (n, K)
        Share of every class; rows sum to 1.
    groups : sequence of str, length n
        Slide or patient.
    weights : array_like, shape (n,), optional
        Weight of every case in the loss; by default 1.
    class_weights : {"balanced", "sqrt", "none"}
        Weight of a class: one over its frequency, the root of this, or 1.

    Returns
    -------
    Cases
        Without those of weight 0.

    Raises
    ------
    DataError
        If shapes do not fit, a number is not finite or out of range, or a class does not occur.
    ConfigError
        If the rule of the class weights is unknown.
    """
    if class_weights not in get_args(ClassWeights):
        raise unknown_name("class weight rule", class_weights, get_args(ClassWeights))
    x, t = np.asarray(embeddings), np.asarray(targets, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    if x.ndim != 2 or t.ndim != 2 or not len(x) == len(t) == len(groups) == len(w) or w.ndim != 1:
        raise DataError(
            f"training part: embeddings {x.shape}, targets {t.shape}, {len(groups)} groups and "
            f"weights {w.shape} do not fit; expected (n, D), (n, K), n and (n,)"
        )
    if t.shape[1] < 2:
        raise DataError(f"training part: {t.shape[1]} class; a probe tells at least two apart")
    check_finite(x, "training part")
    # NaN is not close to anything
    shares = np.isclose(t.sum(1), 1, rtol=0, atol=1e-6) & (t >= 0).all(1)
    wrong = np.flatnonzero(~shares)
    if len(wrong):
        raise DataError(
            f"training part: targets of {len(wrong)} cases are no shares of classes (first: "
            f"row {wrong[0]}, {t[wrong[0]].tolist()}); leave out cases without "
            "label"
        )
    if not (np.isfinite(w) & (w >= 0)).all():
        raise DataError("training part: weights of cases must be finite and not negative")
    mass = (t * w[:, None]).sum(0)
    if not (mass > 0).all():
        absent = ", ".join(str(i) for i in np.flatnonzero(~(mass > 0)))
        raise DataError(
            f"training part: no case of class {absent} among {len(x)}; divide the cases "
            "otherwise or take more"
        )
    kept = w > 0
    return Cases(
        x[kept],
        t[kept],
        tuple(g for g, keep in zip(groups, kept, strict=True) if keep),
        w[kept],
        class_weights,
    )


def check_finite(embeddings: Array, where: str) -> None:
    """Raise DataError if an embedding (n, D) is not finite."""
    wrong = np.flatnonzero(~np.isfinite(embeddings).all(1))
    if len(wrong):
        raise DataError(
            f"{where}: {len(wrong)} of {len(embeddings)} embeddings are not finite (first: row "
            f"{wrong[0]}); compute them again in float32"
        )


def standard_of(embeddings: Array) -> Standard:
    """Mean and deviation of embeddings (n, D); a feature that is constant keeps its scale."""
    mean: Float = embeddings.mean(0, dtype=np.float64)
    deviation: Float = embeddings.std(0, dtype=np.float64)
    # What rounding leaves of a constant would be blown up to a feature.
    return Standard(mean, np.where(deviation > 1e-7 * np.abs(mean), deviation, 1.0))


def choose(
    candidates: Sequence[float],
    probabilities: Sequence[Float],
    cases: Cases,
    score: Score = "balanced_accuracy",
) -> Choice:
    """Choose a setting by the probabilities of cases that it was not fitted to.

    Parameters
    ----------
    candidates : sequence of float
        From the simplest (smoothest) on: of equal scores, the first wins.
    probabilities : sequence of ndarray, each (n, K)
        Out-of-fold probabilities of every case under each candidate. They are scored together,
        since a fold may hold few cases of a rare class.
    cases : Cases
    score : {"balanced_accuracy", "log_loss"}
        ``balanced_accuracy``: mean over classes of the share of their cases that are found, the
        class of a case being that of the largest target (the first of equal ones).
        ``log_loss``: minus the loss that is fitted, with its weights.

    Returns
    -------
    Choice

    Raises
    ------
    ConfigError
        If the score is unknown.
    """
    if score not in get_args(Score):
        raise unknown_name("score", score, get_args(Score))
    if score == "log_loss":
        weights = cases.loss_weights()
        scores = [float((weights * np.log(np.maximum(p, _TINY))).sum()) for p in probabilities]
    else:
        labels = cases.targets.argmax(1)
        present = np.unique(labels)
        scores = [
            float(np.mean([(p[labels == c].argmax(1) == c).mean() for c in present]))
            for p in probabilities
        ]
    # equal up to rounding is equal
    best = int(np.argmax(np.asarray(scores) > max(scores) - _TINY))
    return Choice(candidates[best], np.asarray(scores))


def softmax(logits: Float, axis: int = -1) -> Float:
    """Softmax over an axis."""
    found: Float = np.exp(logits - logits.max(axis, keepdims=True))
    found /= found.sum(axis, keepdims=True)
    return found


def linear_probabilities(
    arrays: Mapping[str, Array], embeddings: Array, facts: Mapping[str, Any]
) -> Float:
    """Softmax of ``embeddings @ weight + bias``; (n, K)."""
    return softmax(embeddings @ arrays["weight"] + arrays["bias"])


def linear_arrays(standard: Standard, weight: Float, bias: Float) -> dict[str, Array]:
    """Let a linear map (D, K) of standardised embeddings take them as they are."""
    weight = weight / standard.scale[:, None]
    return {"weight": weight, "bias": bias - standard.mean @ weight}
