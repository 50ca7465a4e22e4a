"""Folds, fractions and domains: whole groups, every class in proportion, nothing on two sides."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

from celltyper.datasets import Dataset, split_by_group
from celltyper.datasets.splitting import (
    class_counts,
    group_folds,
    leave_out_domain,
    nested_fractions,
)
from celltyper.errors import DataError
from celltyper.types import UNKNOWN, Sample

CLASSES = ("a", "b")


def dataset(
    groups: dict[str, str],
    nuclei: dict[str, tuple[int, int]] | None = None,
    domains: dict[str, dict[str, str]] | None = None,
) -> Dataset:
    """Images of nothing but a table of nuclei; group and nuclei of each class by name."""

    def read(name: str) -> Sample:
        counts = (nuclei or {}).get(name, (3, 3))
        classes = [0, *[1] * counts[0], *[2] * counts[1]]
        labels = np.zeros((4, 40), np.int32)
        labels[0, : len(classes)] = np.arange(len(classes))
        return Sample(
            np.zeros((4, 40, 3), np.uint8), labels, np.array(classes, np.uint8), name, groups[name]
        )

    return Dataset(
        "t", Path("t"), CLASSES, None, tuple(groups), groups, read, domains=domains or {}
    )


def uneven(seed: int, images: int = 24) -> Dataset:
    """Two images a group, and class b in a third of the groups only."""
    rng = np.random.default_rng(seed)
    groups = {f"s{i:02}": f"p{i // 2}" for i in range(images)}
    nuclei = {
        name: (int(rng.integers(1, 9)), 6 if int(group[1:]) % 3 == 0 else 0)
        for name, group in groups.items()
    }
    return dataset(groups, nuclei)


def share(data: Dataset, names: tuple[str, ...]) -> np.ndarray:
    """Share of every class that some images hold, counted nucleus by nucleus."""

    def count(of: tuple[str, ...]) -> np.ndarray:
        return np.array([sum(int((data[n].phenotypes == k).sum()) for n in of) for k in (1, 2)])

    return count(names) / count(data.names)


def test_unknown_nuclei_are_not_counted() -> None:
    sample = dataset({"x": "x"}, {"x": (2, 3)})["x"]
    sample.phenotypes[1] = UNKNOWN
    assert class_counts(sample, 2).tolist() == [1, 3]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_folds_divide_whole_groups_in_proportion(k: int) -> None:
    data = uneven(k)
    for seed in range(4):
        folds = group_folds(data, k, seed)
        assert len(folds) == k
        assert sorted(n for fold in folds for n in fold) == sorted(data.names)
        owners = [{data.groups[n] for n in fold} for fold in folds]
        assert sum(map(len, owners)) == len(set(data.groups.values()))
        assert group_folds(data, k, seed) == folds
    assert len({group_folds(data, k, seed) for seed in range(4)}) > 1


def test_folds_are_near_the_best_that_there_are() -> None:
    """All divisions of eight groups into two folds, tried one by one."""
    rng = np.random.default_rng(0)
    groups = {f"s{i}": f"s{i}" for i in range(8)}
    data = dataset(groups, {n: tuple(rng.integers(0, 9, 2)) for n in groups})

    def miss(fold: tuple[str, ...]) -> float:
        return float(max(*abs(share(data, fold) - 0.5), abs(len(fold) / 8 - 0.5)))

    sides = product((0, 1), repeat=8)
    every = [tuple(n for n, s in zip(groups, side, strict=True) if s) for side in sides]
    best = min(miss(fold) for fold in every if fold)
    found = [miss(group_folds(data, 2, seed)[0]) for seed in range(5)]
    assert max(found) <= best + 0.1


def test_every_fold_gets_a_group() -> None:
    data = dataset({f"s{i}": f"s{i}" for i in range(5)}, {"s0": (30, 1)})
    assert sorted(map(len, group_folds(data, 5, 0))) == [1] * 5
    with pytest.raises(DataError, match="5 patients, slides or fields cannot be divided into 6"):
        group_folds(data, 6, 0)
    with pytest.raises(ValueError, match="k must be at least 2"):
        group_folds(data, 1, 0)


def test_fractions_are_nested_whole_groups_in_proportion() -> None:
    data = uneven(1, images=60)
    fractions = (1, 0.5, 0.2, 0.1, 0.01)
    chosen = set()
    for seed in range(4):
        parts = nested_fractions(data, fractions, seed)
        names = [set(parts[f].names) for f in fractions]
        assert all(small <= large for large, small in pairwise(names))
        assert names[0] == set(data.names)
        assert len(names[-1]) == 2  # one group, of two images
        for fraction in fractions:
            part = parts[fraction]
            held = {data.groups[n] for n in part.names}
            assert part.groups == len(held)
            assert set(part.names) == {n for n in data.names if data.groups[n] in held}
            total, own = (
                sum(len(data[n].phenotypes) - 1 for n in of) for of in (data.names, part.names)
            )
            assert part.reached == pytest.approx(own / total, abs=1e-3)
        assert np.abs(share(data, parts[0.5].names) - 0.5).max() < 0.12
        assert np.abs(share(data, parts[0.2].names) - 0.2).max() < 0.12
        chosen.add(parts[0.2].names)
    assert len(chosen) > 1


def test_fraction_of_equal_groups_by_hand() -> None:
    data = dataset({f"s{i}": f"s{i}" for i in range(10)})
    parts = nested_fractions(data, (0.04, 0.26, 1.0), 0)
    assert [part.groups for part in parts.values()] == [1, 3, 10]
    assert [part.reached for part in parts.values()] == pytest.approx([0.1, 0.3, 1])
    with pytest.raises(ValueError, match=r"above 0 and be at most 1, got 1\.5"):
        nested_fractions(data, (1.5,), 0)
    with pytest.raises(DataError, match="no training images"):
        nested_fractions(data.subset(()), (1.0,), 0)


def test_domains_are_held_out_in_turn_and_unknown_ones_take_no_part() -> None:
    names = ("a1", "a2", "b1", "c1", "x1")
    centre = dict(zip(names, ("a", "a", "b", "c", "unknown"), strict=True))
    data = dataset({n: n for n in names}, domains={"centre": centre})
    split = leave_out_domain(data, "centre")
    assert {d: (s.rest.names, s.held_out.names) for d, s in split.items()} == {
        "a": (("b1", "c1"), ("a1", "a2")),
        "b": (("a1", "a2", "c1"), ("b1",)),
        "c": (("a1", "a2", "b1"), ("c1",)),
    }


def test_domains_that_cannot_be_left_out_are_refused() -> None:
    groups = {"a1": "p", "b1": "p", "b2": "q"}
    centre = {"a1": "a", "b1": "b", "b2": "b"}
    data = dataset(groups, domains={"centre": centre})
    with pytest.raises(DataError, match=r"group 'p' \(image 'b1'\) is of two domains, centre 'a'"):
        leave_out_domain(data, "centre")
    with pytest.raises(DataError, match=r"no 'stage' to leave out \(stated: centre\)"):
        leave_out_domain(data, "stage")
    with pytest.raises(DataError, match=r"all samples are of one centre \('b'\)"):
        leave_out_domain(data.subset(["b1", "b2"]), "centre")


def test_counts_given_are_counts_read() -> None:
    data = uneven(5)
    counts = {n: class_counts(data[n], 2) for n in data.names}
    assert group_folds(data, 3, 1, counts) == group_folds(data, 3, 1)
    assert nested_fractions(data, (0.3,), 1, counts) == nested_fractions(data, (0.3,), 1)
    given, read = split_by_group(data, 0.3, 1, counts), split_by_group(data, 0.3, 1)
    assert given.held_out.names == read.held_out.names
