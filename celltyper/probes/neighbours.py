"""Nearest neighbours among the embeddings of the training part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from celltyper.errors import unknown_name
from celltyper.probes.cases import (
    CHOSEN,
    DEFAULT,
    GIVEN,
    Array,
    Cases,
    Fitted,
    Float,
    Score,
    Standard,
    choose,
    standard_of,
)

Metric = Literal["euclidean", "cosine"]

NEIGHBOURS = (201, 125, 75, 45, 25, 15, 9, 5, 3, 1)
"""Numbers of neighbours to choose from."""

_ROWS = 1024


def fit_neighbours(
    cases: Cases,
    *,
    k: int | None = None,
    ks: Sequence[int] = NEIGHBOURS,
    metric: Metric = "euclidean",
    score: Score = "balanced_accuracy",
    folds: int = 5,
    seed: int = 0,
) -> Fitted:
    """Keep the training part, the number of neighbours chosen by inner cross-validation.

    The k nearest cases vote for their targets with one over their distance, times the weight that
    case and class have in the loss of the other probes. With balanced class weights, a class of
    one case in five therefore wins once it has more than a fifth of the (weighted) neighbours.

    Parameters
    ----------
    cases : Cases
    k : int, optional
        Taken as it is, but at most the number of cases; nothing is chosen.
    ks : sequence of int
        Candidates in any order; of equal scores, the largest wins. Those above the number of
        cases in the smallest inner training part are left out. Where the cases are of too few
        groups for an inner cross-validation, the largest is taken, but at most all cases.
    metric : {"euclidean", "cosine"}
        Distance of standardised embeddings: Euclidean, or 1 - cosine.
    score, folds, seed
        See `celltyper.probes.cases.choose` and `Cases.inner_folds`.

    Returns
    -------
    Fitted
        Arrays ``mean``, ``scale`` (D,), ``bank`` (n, D) float32 and ``votes`` (n, K).

    Raises
    ------
    ConfigError
        If the metric or the score is unknown.
    ValueError
        If a number of neighbours is below 1, or there are fewer than two folds.
    """
    if metric not in get_args(Metric):
        raise unknown_name("metric of neighbours", metric, get_args(Metric))
    wrong = [n for n in (ks if k is None else [k]) if n < 1]
    if wrong:
        raise ValueError(f"numbers of neighbours must be at least 1, got {wrong[0]}")
    facts: dict[str, object]
    if k is not None:
        facts = {"chosen_by": GIVEN if k <= len(cases) else f"{GIVEN}: {k}, of all cases"}
        k = min(k, len(cases))
    elif (fold := cases.inner_folds(folds, seed)) is None:
        k, facts = min(max(ks), len(cases)), {"chosen_by": DEFAULT}
    else:
        parts = int(fold.max()) + 1
        fewest = min(int((fold != f).sum()) for f in range(parts))
        candidates = sorted((n for n in ks if n <= fewest), reverse=True) or [fewest]
        unseen = np.empty((len(candidates), *cases.targets.shape))
        for f in range(parts):
            arrays = _bank(cases, fold != f, metric)
            unseen[:, fold == f] = _votes(arrays, metric, cases.embeddings[fold == f], candidates)
        choice = choose(candidates, list(unseen), cases, score)
        k = int(choice.value)
        facts = {
            "chosen_by": CHOSEN,
            "ks": candidates,
            "scores": choice.scores.tolist(),
            "score": score,
            "inner_folds": parts,
        }
    arrays = _bank(cases, np.ones(len(cases), np.bool_), metric)
    return Fitted(arrays, {"k": k, "metric": metric, **facts})


def neighbour_probabilities(
    arrays: Mapping[str, Array], embeddings: Array, facts: Mapping[str, Any]
) -> Float:
    """Share of the votes of the nearest neighbours; (n, K)."""
    found: Float = _votes(arrays, facts["metric"], embeddings, [facts["k"]])[0]
    return found


def _bank(cases: Cases, rows: NDArray[np.bool_], metric: Metric) -> dict[str, Array]:
    standard = standard_of(cases.embeddings[rows])
    return {
        **standard._asdict(),
        "bank": _points(standard, metric, cases.embeddings[rows]).astype(np.float32),
        "votes": cases.loss_weights(rows)[rows],
    }


def _points(standard: Standard, metric: Metric, embeddings: Array) -> Float:
    points = standard.apply(embeddings)
    if metric == "cosine":
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return points


def _votes(
    arrays: Mapping[str, Array], metric: Metric, embeddings: Array, ks: Sequence[int]
) -> Float:
    """Probabilities for several numbers of neighbours, (len(ks), n, K)."""
    bank, votes = arrays["bank"].astype(np.float64), arrays["votes"]
    points = _points(Standard(arrays["mean"], arrays["scale"]), metric, embeddings)
    found = np.empty((len(ks), len(points), votes.shape[1]))
    most, length = max(ks), (bank**2).sum(1)
    for start in range(0, len(points), _ROWS):
        rows = slice(start, start + _ROWS)
        part = points[rows]
        square = (part**2).sum(1)[:, None] + length - 2 * part @ bank.T
        near = np.argpartition(square, most - 1, axis=1)[:, :most]
        square = np.take_along_axis(square, near, axis=1)
        order = square.argsort(axis=1, kind="stable")
        near, square = (np.take_along_axis(a, order, axis=1) for a in (near, square))
        # half the square of the chord is 1 - cosine; what equals a case has its class alone
        distance = square / 2 if metric == "cosine" else np.sqrt(np.maximum(square, 0))
        weight = 1 / np.maximum(distance, 1e-9)
        total = np.cumsum(weight[:, :, None] * votes[near], axis=1)
        for i, k in enumerate(ks):
            found[i, rows] = total[:, k - 1] / total[:, k - 1].sum(1, keepdims=True)
    return found
