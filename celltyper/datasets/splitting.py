"""Hold-outs, folds, fractions and domains that keep a patient, slide or field on one side.

Every split is a pure function of the dataset and a seed. All of them weigh groups by their nuclei,
and by their images a little, so that groups without nuclei are divided too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.merging import UNSTATED
from celltyper.errors import DataError
from celltyper.types import Sample

Counts = Mapping[str, NDArray[np.int64]]
"""Nuclei of every class, shape (K,), by sample name; see `class_counts`."""

Names = tuple[str, ...]

_DRAWS = 64
_CANDIDATES = 4


class HoldOut(NamedTuple):
    """The two sides of a split."""

    rest: Dataset
    held_out: Dataset


class Fraction(NamedTuple):
    """A part of the training images."""

    names: Names
    """Samples, in the order of the dataset."""
    groups: int
    """Groups that they are of."""
    reached: float
    """Share of the nuclei that they hold, which whole groups rarely make the share asked for."""


class _Groups(NamedTuple):
    names: list[str]
    counts: NDArray[np.float64]
    """Nuclei by class and, last, images times 1e-3, shape (groups, K + 1)."""

    @property
    def shares(self) -> NDArray[np.float64]:
        """Share of every column that a group holds."""
        shares: NDArray[np.float64] = self.counts / np.maximum(self.counts.sum(0), 1e-12)
        return shares[:, self.counts.sum(0) > 0]

    @property
    def weights(self) -> NDArray[np.float64]:
        """Share of all nuclei that a group holds."""
        weights: NDArray[np.float64] = self.counts.sum(1) / self.counts.sum()
        return weights


def class_counts(sample: Sample, classes: int) -> NDArray[np.int64]:
    """Count the nuclei of every class.

    Parameters
    ----------
    sample : Sample
    classes : int
        Number K of phenotypes.

    Returns
    -------
    ndarray of int64, shape (K,)
        Nuclei of unknown class are not counted.
    """
    counts = np.bincount(sample.known_phenotypes, minlength=classes + 1)
    return counts[1:].astype(np.int64)


def split_by_group(
    dataset: Dataset, fraction: float, seed: int, counts: Counts | None = None
) -> HoldOut:
    """Hold out whole groups so that every class is represented in proportion.

    Of 64 random orders of the groups, filled up to the fraction of nuclei, the one is kept whose
    worst class is nearest to the fraction.

    Parameters
    ----------
    dataset : Dataset
    fraction : float
        Share of the nuclei to hold out, above 0 and below 1.
    seed : int
        The split is a function of the dataset and the seed.
    counts : mapping of str to ndarray, optional
        `class_counts` by sample name; without it, all samples are read once.

    Returns
    -------
    HoldOut
        Both sides have at least one group; together they are the dataset.

    Raises
    ------
    DataError
        If there are fewer than two groups.
    ValueError
        If the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    groups = _groups(dataset, counts)
    if len(groups.names) < 2:
        raise DataError(
            f"{dataset.path}: {len(groups.names)} group, which cannot be split; give validation "
            "data of its own, or cut the field by position"
        )
    shares, weights = groups.shares, groups.weights
    rng = np.random.default_rng(np.random.SeedSequence([seed, len(groups.names)]))
    best: tuple[float, frozenset[str]] | None = None
    for _ in range(_DRAWS):
        order = rng.permutation(len(groups.names))
        filled = np.cumsum(weights[order])
        size = int(np.argmin(np.abs(filled[:-1] - fraction))) + 1
        chosen = order[:size]
        miss = float(np.abs(shares[chosen].sum(0) - fraction).max())
        if best is None or miss < best[0]:
            best = miss, frozenset(groups.names[i] for i in chosen)
    assert best is not None
    held = [n for n in dataset.names if dataset.groups[n] in best[1]]
    rest = [n for n in dataset.names if dataset.groups[n] not in best[1]]
    return HoldOut(
        dataset.subset(rest, f"{dataset.name} rest"),
        dataset.subset(held, f"{dataset.name} held out"),
    )


def group_folds(
    dataset: Dataset, k: int, seed: int, counts: Counts | None = None
) -> tuple[Names, ...]:
    """Divide the samples into k folds of whole groups, every class in proportion.

    Groups go one by one, in random order, to the fold where they add least to the sum of squared
    class shares; of 64 orders, the one is kept whose worst class in the worst fold is nearest to
    1 / k.

    Parameters
    ----------
    dataset : Dataset
    k : int
        Number of folds, at least 2.
    seed : int
        The folds are a function of the dataset and the seed.
    counts : mapping of str to ndarray, optional
        `class_counts` by sample name; without it, all samples are read once.

    Returns
    -------
    tuple of tuple of str
        Names of every fold, none empty; every sample is in exactly one.

    Raises
    ------
    DataError
        If there are fewer groups than folds.
    ValueError
        If `k` is below 2.
    """
    if k < 2:
        raise ValueError(f"k must be at least 2, got {k}")
    groups = _groups(dataset, counts)
    if len(groups.names) < k:
        raise DataError(
            f"{dataset.path}: {len(groups.names)} patients, slides or fields cannot be divided "
            f"into {k} folds; ask for fewer"
        )
    shares = groups.shares
    rng = np.random.default_rng(np.random.SeedSequence([seed, len(groups.names), k]))
    best: tuple[float, dict[str, int]] | None = None
    for _ in range(_DRAWS):
        filled = np.zeros((k, shares.shape[1]))
        fold_of: dict[str, int] = {}
        for i in rng.permutation(len(groups.names)):
            # |f + s|^2 - |f|^2 = 2 f.s + |s|^2, so an empty fold is always the cheapest.
            fold = int(np.argmin(filled @ shares[i]))
            filled[fold] += shares[i]
            fold_of[groups.names[i]] = fold
        miss = float(np.abs(filled - 1 / k).max())
        if best is None or miss < best[0]:
            best = miss, fold_of
    assert best is not None
    where = best[1]
    return tuple(
        tuple(n for n in dataset.names if where[dataset.groups[n]] == fold) for fold in range(k)
    )


def nested_fractions(
    dataset: Dataset, fractions: Sequence[float], seed: int, counts: Counts | None = None
) -> dict[float, Fraction]:
    """Choose parts of the samples, each inside the next larger, every class in proportion.

    The groups are put in one order: of four groups drawn at random from those left, the next is
    the one after which the classes so far are nearest to their proportion. A fraction is the
    beginning of this order whose share of the nuclei is nearest to it.

    Parameters
    ----------
    dataset : Dataset
    fractions : sequence of float
        Shares of the nuclei, above 0 and at most 1.
    seed : int
        The order is a function of the dataset and the seed.
    counts : mapping of str to ndarray, optional
        `class_counts` by sample name; without it, all samples are read once.

    Returns
    -------
    dict of float to Fraction
        By the share asked for; at least one group each, so that two small fractions of few groups
        may be the same.

    Raises
    ------
    DataError
        If there are no samples.
    ValueError
        If a fraction is out of range.
    """
    wrong = [f for f in fractions if not 0 < f <= 1]
    if wrong:
        raise ValueError(f"fractions must lie above 0 and be at most 1, got {wrong[0]}")
    if not dataset.names:
        raise DataError(f"{dataset.path}: there are no training images to take a fraction of")
    groups = _groups(dataset, counts)
    shares, weights = groups.shares, groups.weights
    rng = np.random.default_rng(np.random.SeedSequence([seed, len(groups.names)]))
    left, order = list(range(len(groups.names))), []
    filled, weight = np.zeros(shares.shape[1]), 0.0
    while left:
        drawn = rng.choice(left, min(_CANDIDATES, len(left)), replace=False)
        # Relative to the weight so far: 10 % of all nuclei should hold 10 % of every class.
        after = weight + weights[drawn]
        miss = np.abs((filled + shares[drawn]) / after[:, None] - 1).max(1)
        chosen = int(drawn[int(miss.argmin())])
        left.remove(chosen)
        order.append(chosen)
        filled += shares[chosen]
        weight += weights[chosen]
    reached = np.cumsum(weights[order])
    parts = {}
    for fraction in fractions:
        size = len(order) if fraction == 1 else 1 + int(np.abs(reached - fraction).argmin())
        taken = {groups.names[i] for i in order[:size]}
        names = tuple(n for n in dataset.names if dataset.groups[n] in taken)
        parts[fraction] = Fraction(names, size, min(1.0, float(reached[size - 1])))
    return parts


def leave_out_domain(dataset: Dataset, axis: str) -> dict[str, HoldOut]:
    """Hold out every domain in turn: all samples of one centre, tissue or stage.

    Parameters
    ----------
    dataset : Dataset
    axis : str
        One of ``dataset.domains``, such as ``"centre"``.

    Returns
    -------
    dict of str to HoldOut
        By domain, sorted. Samples of unknown domain are on neither side, since they may be of the
        one held out.

    Raises
    ------
    DataError
        If the dataset has no such axis, fewer than two domains are known, or a group is in two.
    """
    if axis not in dataset.domains:
        known = ", ".join(sorted(dataset.domains)) or "none"
        raise DataError(f"{dataset.path}: samples state no {axis!r} to leave out (stated: {known})")
    domain_of = {n: v for n, v in dataset.domains[axis].items() if v != UNSTATED}
    domains = sorted(set(domain_of.values()))
    if len(domains) < 2:
        raise DataError(
            f"{dataset.path}: all samples are of one {axis} ({listing(domains) or 'unknown'}); "
            "leaving it out needs two"
        )
    owner: dict[str, str] = {}
    for name, domain in domain_of.items():
        other = owner.setdefault(dataset.groups[name], domain)
        if other != domain:
            raise DataError(
                f"{dataset.path}: group {dataset.groups[name]!r} (image {name!r}) is of two "
                f"domains, {axis} {other!r} and {domain!r}; it would be on both sides"
            )
    split = {}
    for domain in domains:
        held = [n for n in dataset.names if domain_of.get(n) == domain]
        rest = [n for n in dataset.names if domain_of.get(n, domain) != domain]
        split[domain] = HoldOut(
            dataset.subset(rest, f"{dataset.name} without {domain}"),
            dataset.subset(held, f"{dataset.name} {domain}"),
        )
    return split


def _groups(dataset: Dataset, counts: Counts | None) -> _Groups:
    """Nuclei by group."""
    if counts is None:
        counts = {n: class_counts(dataset[n], len(dataset.classes)) for n in dataset.names}
    names = sorted({dataset.groups[name] for name in dataset.names})
    position = {group: i for i, group in enumerate(names)}
    table = np.zeros((len(names), len(dataset.classes) + 1))
    for name in dataset.names:
        row = table[position[dataset.groups[name]]]
        row[:-1] += counts[name]
        row[-1] += 1e-3
    return _Groups(names, table)
