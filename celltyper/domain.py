"""Whether an image is of the kind that a model was trained on: distances of what the encoder sees.

Every tile has one embedding, the mean of the encoder's last feature map over the tile; its
Mahalanobis distance from those of the training images says how unusual the tile is. See
``docs/calibration.md``.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]

COMPONENTS = 64
"""Principal components that are kept, at most: checkpoints stay small."""

FEWEST_TILES = 100
"""Of the training images: with fewer their spread is not known."""

MOST_TILES = 2000
"""Tiles of the training and of the validation images that are looked at, at most."""

QUANTILE = 0.95


class Distance(NamedTuple):
    """How far an image or slide is from the training images."""

    value: float
    """Median over its tiles."""
    quantile: float
    """95 % of the validation tiles are nearer."""

    @property
    def is_far(self) -> bool:
        """Whether the typical tile is farther than 95 % of the validation tiles."""
        return self.value > self.quantile

    @property
    def warning(self) -> str:
        """What to tell the reader of a far one; else empty."""
        if not self.is_far:
            return ""
        return f"Unlike the training images: distance {self.value:.3g}, {self._meaning}"

    @property
    def _meaning(self) -> str:
        return (
            f"and 95 % of the validation tiles are within {self.quantile:.3g}. The model may not "
            "know such tissue, stain or scanner."
        )


def warning_of(images: Mapping[str, Distance]) -> str:
    """What to tell of the images of one model, by name, in one line; empty if none is far."""
    far = {name: distance for name, distance in images.items() if distance.is_far}
    if len(far) <= 1:
        return "".join(f"{name}: {distance.warning}" for name, distance in far.items())
    values = sorted(distance.value for distance in far.values())
    return (
        f"{len(far)} of {len(images)} images are unlike the training images: distances "
        f"{values[0]:.3g} to {values[-1]:.3g}, {next(iter(far.values()))._meaning}"
    )


@dataclass(frozen=True, eq=False)
class Domain:
    """The embeddings of the training images' tiles as a Gaussian in few dimensions.

    Parameters
    ----------
    mean : ndarray of float32, shape (C,)
    components : ndarray of float16, shape (d, C)
        Principal components.
    precision : ndarray of float32, shape (d, d)
        Inverse of the shrunk covariance of the projections.
    quantile : float
        Distance within which 95 % of the held-out tiles lie.
    tiles : int
        Training tiles that it was fitted on.
    held_out : str
        Where the tiles of the quantile come from: "validation" or "training images left out".
    """

    mean: NDArray[np.float32]
    components: NDArray[np.float16]
    precision: NDArray[np.float32]
    quantile: float
    tiles: int
    held_out: str

    def distances(self, embeddings: ArrayLike) -> Values:
        """Mahalanobis distance of tiles from the training tiles.

        Parameters
        ----------
        embeddings : array_like, shape (n, C)

        Returns
        -------
        ndarray of float64, shape (n,)

        References
        ----------
        Lee et al., 2018, doi:10.48550/arXiv.1807.03888, here with one Gaussian for all classes.
        """
        z = _projected(embeddings, self.mean, self.components)
        return _distances(z, self.precision)

    def of_image(self, distances: Sequence[float] | Values) -> Distance | None:
        """Distance of an image from those of its tiles; None of no tile.

        The median, because a slide has tiles of glass at the border of its tissue.
        """
        if not len(distances):
            return None
        return Distance(round(float(np.median(distances)), 3), self.quantile)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Arrays, to be saved."""
        return {"mean": self.mean, "components": self.components, "precision": self.precision}

    def facts(self) -> dict[str, Any]:
        """The rest, of plain types that JSON knows."""
        return {"quantile": self.quantile, "tiles": self.tiles, "held_out": self.held_out}


def packed_domain(domain: Domain | None) -> dict[str, Any] | None:
    """Domain with its arrays as text, for JSON; None from None."""
    if domain is None:
        return None
    arrays = {
        name: {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "base64": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii"),
        }
        for name, array in domain.tensors().items()
    }
    return {**domain.facts(), "tensors": arrays}


def unpacked_domain(packed: Mapping[str, Any] | None) -> Domain | None:
    """Domain from `packed_domain`, None from None."""
    if packed is None:
        return None
    facts = dict(packed)
    arrays = {
        name: np.frombuffer(base64.b64decode(a["base64"]), a["dtype"]).reshape(a["shape"])
        for name, a in facts.pop("tensors").items()
    }
    return domain_of(facts, arrays)


def evenly(n: int, most: int) -> list[int]:
    """At most so many of 0..n - 1, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, n - 1, min(n, most)).round()}) if n else []


def domain_of(facts: Mapping[str, Any] | None, tensors: Mapping[str, Any]) -> Domain | None:
    """Domain from `Domain.facts` and `Domain.tensors`, None from None."""
    return None if facts is None else Domain(**tensors, **facts)


def fit_domain(train: ArrayLike, others: ArrayLike, held_out: str) -> Domain:
    """Fit the Gaussian of training tiles and the quantile of others.

    Parameters
    ----------
    train : array_like, shape (n, C)
        Embeddings of training tiles.
    others : array_like, shape (m, C)
        Of tiles of other images.
    held_out : str
        What the others are.

    Returns
    -------
    Domain
        In at most `COMPONENTS` dimensions; the covariance is shrunk after Ledoit and Wolf.
    """
    x = np.asarray(train, np.float64)
    mean = x.mean(axis=0).astype(np.float32)
    _, _, axes = np.linalg.svd(x - mean, full_matrices=False)
    components = axes[: min(COMPONENTS, len(x) - 1)].astype(np.float16)
    covariance = ledoit_wolf(_projected(x, mean, components))
    precision = np.linalg.pinv(covariance, hermitian=True).astype(np.float32)
    distances = _distances(_projected(others, mean, components), precision)
    quantile = round(float(np.quantile(distances, QUANTILE)), 3)
    return Domain(mean, components, precision, quantile, len(x), held_out)


def ledoit_wolf(samples: ArrayLike) -> Values:
    """Covariance shrunk towards a multiple of the identity by as much as lessens its error.

    Parameters
    ----------
    samples : array_like, shape (n, d)

    Returns
    -------
    ndarray of float64, shape (d, d)

    References
    ----------
    Ledoit and Wolf, 2004, doi:10.1016/S0047-259X(03)00096-4
    """
    x = np.asarray(samples, np.float64)
    x = x - x.mean(axis=0)
    n, d = x.shape
    covariance: Values = x.T @ x / n
    target = np.trace(covariance) / d * np.eye(d)
    away = ((covariance - target) ** 2).sum()
    # how much the covariances of single samples scatter around their mean
    scatter = ((x**2).sum(axis=1) ** 2).sum() / n - (covariance**2).sum()
    share = min(1.0, scatter / n / away) if away > 0 else 0.0
    shrunk: Values = share * target + (1 - share) * covariance
    return shrunk


def _projected(
    embeddings: ArrayLike, mean: NDArray[np.float32], components: NDArray[np.float16]
) -> Values:
    z: Values = (np.asarray(embeddings, np.float64) - mean) @ components.astype(np.float64).T
    return z


def _distances(z: Values, precision: NDArray[np.float32]) -> Values:
    squares = np.einsum("ni,ij,nj->n", z, precision.astype(np.float64), z)
    distances: Values = np.sqrt(np.maximum(squares, 0))
    return distances
