"""Heads that are fitted to embeddings in seconds, all with one interface.

``fit_probe(name, ...)`` gives a `Probe`: class probabilities of other embeddings, its tensors, and
the facts (what was chosen, and how it scored inside the training part). Facts are JSON and tensors
go to a safetensors file; from both, `load_probe` makes the same probe again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from celltyper.errors import (
    CelltyperError,
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    unknown_name,
)
from celltyper.probes.cases import (
    Array,
    ClassWeights,
    Fitted,
    Float,
    check_cases,
    check_finite,
    linear_probabilities,
)
from celltyper.probes.logistic import fit_logistic
from celltyper.probes.neighbours import fit_neighbours, neighbour_probabilities
from celltyper.probes.perceptron import fit_perceptron, perceptron_probabilities
from celltyper.probes.prototypes import fit_prototypes


class _Kind(NamedTuple):
    fit: Callable[..., Fitted]
    probabilities: Callable[[Mapping[str, Array], Array, Mapping[str, Any]], Float]
    tensors: frozenset[str]


PROBES: dict[str, _Kind] = {
    "logistic": _Kind(fit_logistic, linear_probabilities, frozenset({"weight", "bias"})),
    "mlp": _Kind(
        fit_perceptron,
        perceptron_probabilities,
        frozenset({"weight1", "bias1", "weight2", "bias2"}),
    ),
    "knn": _Kind(
        fit_neighbours, neighbour_probabilities, frozenset({"mean", "scale", "bank", "votes"})
    ),
    "prototype": _Kind(fit_prototypes, linear_probabilities, frozenset({"weight", "bias"})),
}
"""By name; a new kind is a file and a line here."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted probe; made by `fit_probe` or `load_probe`."""

    _facts: dict[str, Any]
    _arrays: dict[str, Array]

    def probabilities(self, embeddings: ArrayLike) -> Float:
        """Class probabilities of embeddings.

        Parameters
        ----------
        embeddings : array_like, shape (n, D)
            As those that the probe was fitted to; not standardised.

        Returns
        -------
        ndarray of float64, shape (n, K)
            Rows sum to 1.

        Raises
        ------
        DataError
            If there are not D features or a number is not finite.
        """
        x = np.asarray(embeddings, np.float64)
        if x.ndim != 2 or x.shape[1] != self._facts["features"]:
            raise DataError(
                f"embeddings are {x.shape}, the probe was fitted to (n, {self._facts['features']});"
                " compute them with the encoder and pooling of the training"
            )
        check_finite(x, "embeddings")
        return PROBES[self._facts["name"]].probabilities(self._arrays, x, self._facts)

    def tensors(self) -> dict[str, Tensor]:
        """All that the probabilities need beside the facts, to be saved."""
        return {name: torch.from_numpy(array) for name, array in self._arrays.items()}

    def facts(self) -> dict[str, Any]:
        """Name, settings and inner scores, of plain types that JSON knows."""
        return dict(self._facts)


def fit_probe(
    name: str,
    embeddings: ArrayLike,
    targets: ArrayLike,
    groups: Sequence[str],
    *,
    weights: ArrayLike | None = None,
    class_weights: ClassWeights = "balanced",
    seed: int = 0,
    **options: Any,
) -> Probe:
    """Fit a probe to embeddings, its settings chosen inside of them.

    Parameters
    ----------
    name : {"logistic", "mlp", "knn", "prototype"}
        Kind of probe; see `fit_logistic`, `fit_perceptron`, `fit_neighbours` and
        `fit_prototypes`.
    embeddings : array_like, shape (n, D)
        Of the training part alone.
    targets : array_like, shape (n, K)
        Share of every class, such as that of the experts' votes; rows sum to 1.
    groups : sequence of str, length n
        Slide or patient of every case, never on both sides of an inner split.
    weights : array_like, shape (n,), optional
        Weight of every case in the loss, such as the agreement of its experts; by default 1.
        A case of weight 0 is left out.
    class_weights : {"balanced", "sqrt", "none"}
        Weight of a class in the loss: one over its frequency, the root of this, or 1.
    seed : int
        Of the inner folds, and of training where it is random.
    **options
        Passed to the fit of this kind.

    Returns
    -------
    Probe

    Raises
    ------
    ConfigError
        If the name is unknown.
    DataError
        If the cases do not fit each other, are not finite, or lack a class.
    """
    if name not in PROBES:
        raise unknown_name("probe", name, PROBES)
    cases = check_cases(embeddings, targets, groups, weights, class_weights)
    fitted = PROBES[name].fit(cases, seed=seed, **options)
    facts = {
        "name": name,
        "classes": cases.targets.shape[1],
        "features": cases.embeddings.shape[1],
        "cases": len(cases),
        "groups": len(set(cases.groups)),
        "class_weights": class_weights,
        "seed": seed,
        **fitted.facts,
    }
    arrays = {key: np.ascontiguousarray(array) for key, array in fitted.arrays.items()}
    return Probe(facts, arrays)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a kind of probe does not take, by fitting one to a few made cases.

    Parameters
    ----------
    name : str
        Kind of probe.
    options : mapping of str to object
        As `fit_probe` takes them.

    Raises
    ------
    ConfigError
        Naming the option, or saying what is wrong with a value.
    """
    if name not in PROBES:
        raise unknown_name("probe", name, PROBES)
    known = inspect.signature(PROBES[name].fit).parameters.keys() - {"cases", "seed"}
    for key in options:
        if key not in known:
            raise unknown_name(f"option of {name!r}", key, known)
    x = np.random.default_rng(0).normal(size=(16, 2))
    try:
        with suppress(TrainingError):  # which is of the cases
            fit_probe(name, x, np.eye(2)[np.arange(16) % 2], list("aabbccddeeffgghh"), **options)
    except CelltyperError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"probe {name!r} does not take {dict(options)}: {' '.join(str(error).split())}"
        ) from error


def load_probe(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Probe:
    """Make a probe again from what `Probe.facts` and `Probe.tensors` gave.

    Parameters
    ----------
    facts : mapping
    tensors : mapping of str to Tensor

    Returns
    -------
    Probe
        Its probabilities are equal bit for bit.

    Raises
    ------
    ConfigError
        If the kind of probe is unknown.
    CheckpointError
        If a tensor is missing or left over, or a fact is missing.
    """
    if "name" not in facts or "features" not in facts:
        raise CheckpointError("no probe: its facts lack 'name' or 'features'; train it again")
    name = facts["name"]
    if name not in PROBES:
        raise unknown_name("probe", name, PROBES)
    expected = PROBES[name].tensors
    if expected != tensors.keys():
        raise CheckpointError(
            f"no {name} probe: it needs the tensors {', '.join(sorted(expected))}, got "
            f"{', '.join(sorted(tensors)) or 'none'}; train it again"
        )
    arrays = {key: np.ascontiguousarray(t.detach().cpu().numpy()) for key, t in tensors.items()}
    return Probe(dict(facts), arrays)
