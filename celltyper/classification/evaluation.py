"""Scores of a model, or of an ensemble, on annotated windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper import __version__
from celltyper.evaluation import Selected
from celltyper.metrics.bootstrap import PairedDifference
from celltyper.metrics.calibration import calibration_gap
from celltyper.metrics.classification import PatchScores, Score, score_patches
from celltyper.metrics.scoring import patch_reliability
from celltyper.patches.table import PatchTable

Values = NDArray[np.float64]


class Spread(NamedTuple):
    """A score of several models on the same windows."""

    mean: float
    deviation: float
    """Standard deviation over models, with M - 1."""
    values: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class PatchEvaluation:
    """What a model, or an ensemble of M, said of n annotated windows, and how good that is.

    Parameters
    ----------
    folder : Path
        Where it is written.
    table : PatchTable
    shares : ndarray of float64, shape (M, n, K)
        Probabilities of every model.
    scores : PatchScores
        Of the mean over models, with intervals and, where several experts voted, by agreement.
    domains : dict of str to PatchScores
        By domain; empty unless there are several.
    singles : dict of str to Spread
        By score: those of every model alone, at its own threshold; empty for one model.
    runs : tuple of str
        Names of the models.
    facts : mapping of str to Any
        What ran on what, JSON-ready.
    config : str
        The resolved config of the first model as YAML.
    differences : dict of str to PairedDifference
        Scores less those of another evaluation of the same windows; empty without one.
    by_coverage : list of Selected
        How many windows have a name with thresholds of validation, and how many are right.
    uncalibrated : ndarray of float64, shape (n, K), or None
        Mean of the models before their calibration; None if none is calibrated.
    """

    folder: Path
    table: PatchTable
    shares: Values
    scores: PatchScores
    domains: dict[str, PatchScores]
    singles: dict[str, Spread]
    runs: tuple[str, ...]
    facts: Mapping[str, Any]
    config: str = ""
    differences: dict[str, PairedDifference] = field(default_factory=dict)
    by_coverage: list[Selected] = field(default_factory=list)
    uncalibrated: Values | None = None

    @property
    def mean(self) -> Values:
        """Mean probabilities over models, shape (n, K)."""
        mean: Values = self.shares.mean(axis=0)
        return mean

    @property
    def threshold(self) -> float:
        """Mean probability from which a window is called positive."""
        return float(self.facts["threshold"])


def score_windows(
    table: PatchTable, shares: Values, positive: int, threshold: float, *, resamples: int
) -> PatchScores:
    """Scores of windows, by agreement too where several experts voted.

    Parameters
    ----------
    table : PatchTable
        Every window has a label.
    shares : ndarray of float64, shape (n, K)
        Probabilities.
    positive : int
        The positive class.
    threshold : float
        Probability from which a window is called positive.
    resamples : int
        Bootstrap resamples of the intervals: slides or patients are drawn.

    Returns
    -------
    PatchScores
        Windows that one expert alone saw are in no stratum of agreement.
    """
    several = table.experts > 1
    votes = table.votes if several.all() else None
    found = _score(table, shares, positive, threshold, resamples, votes)
    if several.all() or not several.any():
        return found
    part = table.take(several)
    strata = _score(part, shares[several], positive, threshold, resamples, part.votes).strata
    return replace(found, strata=strata)


def score_domains(
    table: PatchTable, shares: Values, positive: int, threshold: float, *, resamples: int
) -> dict[str, PatchScores]:
    """Scores by domain, if there are several; parameters as in `score_windows`."""
    kinds = sorted(set(table.domains) - {""})
    if len(kinds) < 2:
        return {}
    found = {}
    for kind in kinds:
        rows = np.flatnonzero(np.array(table.domains) == kind)
        found[kind] = _score(table.take(rows), shares[rows], positive, threshold, resamples, None)
    return found


def score_singles(
    table: PatchTable, shares: Values, positive: int, thresholds: Sequence[float]
) -> dict[str, Spread]:
    """Mean and deviation of the scores of several models, each alone.

    Parameters
    ----------
    table : PatchTable
        Every window has a label.
    shares : ndarray of float64, shape (M, n, K)
        Probabilities of every model.
    positive : int
        The positive class.
    thresholds : sequence of float, length M
        From which each calls a window positive.

    Returns
    -------
    dict of str to Spread
        Empty for a single model.
    """
    if len(shares) < 2:
        return {}
    each = [
        _score(table, own, positive, threshold, 0, None).scores
        for own, threshold in zip(shares, thresholds, strict=True)
    ]
    found = {}
    for name in each[0]:
        values = np.array([scores[name].value for scores in each])
        found[name] = Spread(
            float(values.mean()), float(values.std(ddof=1)), tuple(values.tolist())
        )
    return found


def metrics_json(found: PatchEvaluation) -> dict[str, Any]:
    """Every score with its interval and rule, JSON-ready."""
    scores = found.scores
    return {
        "task": "patches",
        "celltyper": __version__,
        **found.facts,
        "expected_calibration_error": _errors(found),
        "by_coverage": [
            {key: _known(value) for key, value in each._asdict().items()}
            for each in found.by_coverage
        ],
        "intervals": f"95 %, bootstrap over {scores.clusters} slides or patients",
        "scores": {
            name: _interval(score) | {"rule": scores.rules[name]}
            for name, score in scores.scores.items()
        },
        "per_class": {
            name: {key: _interval(score) for key, score in row.items()}
            for name, row in scores.per_class.items()
        },
        "confusion": scores.confusion.tolist(),
        "single_models": {
            name: {
                "mean": _known(spread.mean),
                "deviation": _known(spread.deviation),
                "values": [_known(value) for value in spread.values],
            }
            for name, spread in found.singles.items()
        },
        "agreement": {name: _part(stratum) for name, stratum in scores.strata.items()},
        "domains": {name: _part(domain) for name, domain in found.domains.items()},
        "differences": {
            name: {key: _known(value) for key, value in difference._asdict().items()}
            for name, difference in found.differences.items()
        },
    }


def _errors(found: PatchEvaluation) -> dict[str, float | None]:
    """Calibration error before and after calibration, as the rule of the score ``ece``."""
    sets = {"after": found.mean}
    if found.uncalibrated is not None:
        sets = {"before": found.uncalibrated, **sets}
    labels, positive = found.table.labels, found.scores.positive
    return {
        name: _known(calibration_gap(patch_reliability(labels, each, positive)))
        for name, each in sets.items()
    }


def _score(
    table: PatchTable,
    shares: Values,
    positive: int,
    threshold: float,
    resamples: int,
    votes: Values | None,
) -> PatchScores:
    return score_patches(
        table.labels,
        shares,
        table.classes,
        positive,
        table.groups,
        threshold=threshold,
        votes=votes,
        resamples=resamples,
    )


def _part(scores: PatchScores) -> dict[str, Any]:
    values = {name: _interval(score) for name, score in scores.scores.items()}
    return {"patches": scores.patches, "slides": scores.clusters, "scores": values}


def _interval(score: Score) -> dict[str, Any]:
    return {key: _known(value) for key, value in score._asdict().items()}


def _known(value: float) -> float | None:
    """JSON has no NaN: what could not be computed is null."""
    return value if math.isfinite(value) else None
