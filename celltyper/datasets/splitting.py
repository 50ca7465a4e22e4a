"""Hold-outs that keep a patient, slide or field on one side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from celltyper.datasets.dataset import Dataset
from celltyper.errors import DataError

_DRAWS = 64


class HoldOut(NamedTuple):
    """The two sides of a split."""

    rest: Dataset
    held_out: Dataset


def split_by_group(dataset: Dataset, fraction: float, seed: int) -> HoldOut:
    """Hold out whole groups so that every class is represented in proportion.

    Of 64 random orders of the groups, filled up to the fraction of nuclei, the one is kept whose
    worst class is nearest to the fraction.

    Parameters
    ----------
    dataset : Dataset
        All its samples are read once, to count nuclei.
    fraction : float
        Share of the nuclei to hold out, above 0 and below 1.
    seed : int
        The split is a function of the dataset and the seed.

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
    groups = sorted({dataset.groups[name] for name in dataset.names})
    if len(groups) < 2:
        raise DataError(
            f"{dataset.path}: {len(groups)} group, which cannot be split; give validation data of "
            "its own, or cut the field by position"
        )
    position = {group: i for i, group in enumerate(groups)}
    counts = np.zeros((len(groups), len(dataset.classes) + 1))
    for sample in dataset:
        row = counts[position[sample.group]]
        row[:-1] += np.bincount(sample.known_phenotypes, minlength=len(row))[1:]
        # Images count a little, so that groups without nuclei are split too.
        row[-1] += 1e-3
    shares = counts / np.maximum(counts.sum(0), 1e-12)
    weight = counts.sum(1) / counts.sum()
    present = counts.sum(0) > 0
    rng = np.random.default_rng(np.random.SeedSequence([seed, len(groups)]))
    best: tuple[float, frozenset[int]] | None = None
    for _ in range(_DRAWS):
        order = rng.permutation(len(groups))
        filled = np.cumsum(weight[order])
        size = int(np.argmin(np.abs(filled[:-1] - fraction))) + 1
        chosen = order[:size]
        miss = float(np.abs(shares[chosen].sum(0) - fraction)[present].max())
        if best is None or miss < best[0]:
            best = miss, frozenset(int(i) for i in chosen)
    assert best is not None
    held = [n for n in dataset.names if position[dataset.groups[n]] in best[1]]
    rest = [n for n in dataset.names if position[dataset.groups[n]] not in best[1]]
    return HoldOut(
        dataset.subset(rest, f"{dataset.name} rest"),
        dataset.subset(held, f"{dataset.name} held out"),
    )
