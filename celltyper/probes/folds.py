"""Folds of whole slides or patients for a table of cases, every class in proportion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import DataError

_DRAWS = 64


def grouped_folds(
    targets: ArrayLike, groups: Sequence[str], k: int, seed: int, where: str = "cases"
) -> NDArray[np.intp]:
    """Divide cases into k folds of whole groups, every class in proportion.

    The rule is that of `celltyper.datasets.splitting.group_folds`: groups go one by one, in random
    order, to the fold where they add least to the sum of squared class shares; of 64 orders, the
    one is kept whose worst class in the worst fold is nearest to 1 / k.

    Parameters
    ----------
    targets : array_like, shape (n, K)
        Share of every class in every case; one-hot where there is one label.
    groups : sequence of str, length n
        Slide or patient of every case.
    k : int
        Number of folds, at least 2.
    seed : int
        The folds are a function of the arguments and the seed. The order of the cases does not
        matter.
    where : str
        Names the cases in error messages.

    Returns
    -------
    ndarray of int, shape (n,)
        Fold of every case, 0 to k - 1; no fold is empty, no group is in two.

    Raises
    ------
    DataError
        If there are fewer groups than folds.
    ValueError
        If `k` is below 2.
    """
    if k < 2:
        raise ValueError(f"k must be at least 2, got {k}")
    names, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names) < k:
        raise DataError(
            f"{where}: {len(names)} slides or patients cannot be divided into {k} folds; "
            "ask for fewer"
        )
    shares = group_mass(targets, member)
    shares = shares[:, shares.sum(0) > 0]
    shares /= shares.sum(0)
    rng = np.random.default_rng(np.random.SeedSequence([seed, len(names), k]))
    best: tuple[float, NDArray[np.intp]] | None = None
    for _ in range(_DRAWS):
        filled = np.zeros((k, shares.shape[1]))
        fold_of = np.zeros(len(names), np.intp)
        for i in rng.permutation(len(names)):
            # |f + s|^2 - |f|^2 = 2 f.s + |s|^2, so an empty fold is always the cheapest.
            fold_of[i] = (filled @ shares[i]).argmin()
            filled[fold_of[i]] += shares[i]
        miss = float(np.abs(filled - 1 / k).max())
        if best is None or miss < best[0]:
            best = miss, fold_of
    assert best is not None
    return best[1][member]


def group_mass(targets: ArrayLike, member: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sum the targets of every group.

    Parameters
    ----------
    targets : array_like, shape (n, K)
    member : ndarray of int, shape (n,)
        Group of every case, 0 to G - 1.

    Returns
    -------
    ndarray of float64, shape (G, K)
    """
    targets = np.asarray(targets, np.float64)
    mass = np.zeros((int(member.max()) + 1, targets.shape[1]))
    np.add.at(mass, member, targets)
    return mass
