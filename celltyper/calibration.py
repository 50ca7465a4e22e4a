"""Class probabilities that mean something: scaled on validation, and when to leave a name open.

A scaling is fitted once, at the end of training, on what was not trained on, and stored with the
model; see ``docs/calibration.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import ConfigError

Values = NDArray[np.float64]

METHODS = ("temperature", "vector")

ABSTAINED = "unknown"
"""Phenotype of a cell whose probability is below the threshold."""

FLOOR = 1e-3
"""Share of a class in a cell below which shares are taken as equal. Of slides, pixels are kept in
255ths, so that a mean below half a step may be 0 there: its logarithm would decide everything."""

COVERAGES = range(50, 100)
"""Percentages of the validation cells that may keep a name."""

_TINY = 1e-12
_LARGEST = 20.0


@dataclass(frozen=True)
class Scaling:
    """Class probabilities p become ``softmax(weight * log p + bias)``.

    Parameters
    ----------
    method : {"temperature", "vector"}
        Temperature T: every weight is 1 / T and every bias 0, so the most probable class stays.
    weight, bias : tuple of float, length K
    floor : float
        Smaller probabilities count as this one.

    References
    ----------
    Guo et al., 2017, On calibration of modern neural networks, doi:10.48550/arXiv.1706.04599
    """

    method: str
    weight: tuple[float, ...]
    bias: tuple[float, ...]
    floor: float = _TINY

    @property
    def text(self) -> str:
        """Name of the method, with the temperature if it has one."""
        if self.method == "temperature":
            return f"temperature {1 / self.weight[0]:.2f}"
        return f"{self.method} scaling"

    def apply(self, probabilities: ArrayLike) -> Values:
        """Scale probabilities.

        Parameters
        ----------
        probabilities : array_like, shape (..., K)

        Returns
        -------
        ndarray of float64, shape (..., K)
            Sums over the last axis are 1.
        """
        logs = _logs(probabilities, self.floor)
        return _softmax(logs * np.array(self.weight) + np.array(self.bias))


@dataclass(frozen=True)
class Calibration:
    """What was learned on validation about the probabilities of a model.

    Parameters
    ----------
    scaling : Scaling
    cases : int
        Cells, or windows, that it was fitted on.
    thresholds : dict of str to float
        Of cells, by the percentage of them that keeps a name: the probability from which on.
    """

    scaling: Scaling
    cases: int
    thresholds: dict[str, float]

    def threshold(self, coverage: float) -> float:
        """Probability that a cell needs for a name.

        Parameters
        ----------
        coverage : float
            Share of the validation cells that keeps one, in hundredths.

        Raises
        ------
        ConfigError
            If there is no threshold for it.
        """
        percent = f"{100 * coverage:.6g}"
        if percent not in self.thresholds:
            known = [int(key) / 100 for key in self.thresholds]
            raise ConfigError(
                f"abstain {coverage:g}: give the share of cells that keep a name in hundredths, "
                f"from {min(known):g} to {max(known):g}"
            )
        return self.thresholds[percent]

    def facts(self) -> dict[str, Any]:
        """Values of plain types that JSON knows; `calibration_of` reads them."""
        return asdict(self)


def calibration_of(facts: Mapping[str, Any] | None) -> Calibration | None:
    """Calibration from `Calibration.facts`, None from None."""
    if facts is None:
        return None
    own = dict(facts["scaling"])
    scaling = Scaling(own["method"], tuple(own["weight"]), tuple(own["bias"]), own["floor"])
    return Calibration(scaling, int(facts["cases"]), dict(facts["thresholds"]))


def threshold_of(
    calibration: Calibration | None, classes: Sequence[str], abstain: float | None
) -> float:
    """Class probability that a cell needs for a name.

    Parameters
    ----------
    calibration : Calibration or None
        Of the model.
    classes : sequence of str
        Of the model.
    abstain : float or None
        Share of the validation cells that keeps a name; None gives a name to every cell.

    Returns
    -------
    float
        0 if every cell has a name.

    Raises
    ------
    ConfigError
        If the model knows no threshold for it, or a class of its own is called "unknown".
    """
    if abstain is None:
        return 0.0
    if calibration is None:
        raise ConfigError(
            "abstain: this model knows no thresholds, which are found on validation cells at the "
            "end of training of one model (docs/calibration.md); leave --abstain out, or take a "
            "calibrated run"
        )
    if ABSTAINED in classes:
        raise ConfigError(f"abstain: the model has a class called {ABSTAINED!r} of its own")
    return calibration.threshold(abstain)


def class_probabilities(cells: ArrayLike, scaling: Scaling | None = None) -> Values:
    """Probability of each phenotype, given that there is a cell.

    A cell, not a pixel, has a phenotype, and it is the cell's probability that tables show and
    thresholds are applied to. So the mean over its pixels is scaled: scaled pixels would be
    averaged again, over neighbours that err together, and their mean would be off once more.

    Parameters
    ----------
    cells : array_like, shape (n, K + 1)
        Mean softmax of background and the K phenotypes inside every cell.
    scaling : Scaling, optional
        By default the shares are taken as they are.

    Returns
    -------
    ndarray of float64, shape (n, K)
        Rows sum to 1. Where all is background, all phenotypes are equally probable.
    """
    shares = np.asarray(cells, np.float64)[:, 1:]
    total = shares.sum(axis=1, keepdims=True)
    even = np.full(shares.shape, 1 / max(1, shares.shape[1]))
    shares = np.divide(shares, total, out=even, where=total > 0)
    return shares if scaling is None else scaling.apply(shares)


def fit_scaling(
    probabilities: ArrayLike, truth: ArrayLike, method: str, *, floor: float = _TINY
) -> Scaling:
    """Scaling with the smallest negative log likelihood of the true classes.

    A temperature lies between 1/20 and 20. Vector scaling has 2 K parameters and may have few
    cells of a class: they have a Gaussian prior of deviation 1 around no change, whose weight is
    that of less than one cell.

    Parameters
    ----------
    probabilities : array_like, shape (n, K)
        Of cases that the model was not trained on.
    truth : array_like of int, shape (n,)
        True class, a column of `probabilities`.
    method : {"temperature", "vector"}
    floor : float
        See `Scaling`.

    Returns
    -------
    Scaling
    """
    from scipy.optimize import minimize, minimize_scalar

    logs, truth = _logs(probabilities, floor), np.asarray(truth, np.intp)
    n, k = logs.shape
    rows = np.arange(n)

    def likelihood(scores: Values) -> tuple[float, Values]:
        """Negative logarithm, mean over cases, and its gradient with respect to the scores."""
        found = _softmax(scores)
        loss = -float(np.log(np.maximum(found[rows, truth], np.finfo(float).tiny)).mean())
        found[rows, truth] -= 1
        return loss, found / n

    if method == "temperature":
        # unimodal, because it is convex in 1 / T
        end = np.log(_LARGEST)
        found = minimize_scalar(
            lambda log_t: likelihood(logs / np.exp(log_t))[0],
            bounds=(-end, end),
            method="bounded",
            options={"xatol": 1e-8},
        )
        return Scaling(method, (float(np.exp(-found.x)),) * k, (0.0,) * k, floor)

    start = np.concatenate([np.ones(k), np.zeros(k)])

    def penalised(values: Values) -> tuple[float, Values]:
        loss, slope = likelihood(logs * values[:k] + values[k:])
        away = (values - start) / n
        gradient = np.concatenate([(slope * logs).sum(axis=0), slope.sum(axis=0)])
        return loss + float(away @ (values - start)) / 2, gradient + away

    best = minimize(
        penalised,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 1000, "ftol": 1e-13, "gtol": 1e-9},
    ).x
    return Scaling(method, tuple(best[:k].tolist()), tuple(best[k:].tolist()), floor)


def coverage_thresholds(probabilities: ArrayLike) -> dict[str, float]:
    """Largest threshold at or above which lies at least a given share of cells.

    Parameters
    ----------
    probabilities : array_like, shape (n,)
        Largest class probability of every cell, at least one cell.

    Returns
    -------
    dict of str to float
        By percentage, for those in `COVERAGES`.
    """
    falling = np.sort(np.asarray(probabilities, np.float64))[::-1]
    # ceil in whole numbers: 0.55 * 100 is a little more than 55
    return {str(c): float(falling[-(-c * len(falling) // 100) - 1]) for c in COVERAGES}


def _logs(probabilities: ArrayLike, floor: float) -> Values:
    logs: Values = np.log(np.maximum(np.asarray(probabilities, np.float64), floor))
    return logs


def _softmax(scores: Values) -> Values:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
    softmax: Values = powers / powers.sum(axis=-1, keepdims=True)
    return softmax
