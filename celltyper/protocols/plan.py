"""Which images every run of a protocol trains on, validates on and is tested on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from celltyper.classification.config import PatchData
from celltyper.config import Data
from celltyper.datasets import Dataset, split_by_group
from celltyper.datasets.dataset import listing
from celltyper.datasets.splitting import (
    Counts,
    Fraction,
    Names,
    group_folds,
    leave_out_domain,
    nested_fractions,
)
from celltyper.errors import ConfigError, DataError
from celltyper.protocols.protocol import Protocol


@dataclass(frozen=True)
class PlannedRun:
    """One run of a protocol.

    Parameters
    ----------
    path : str
        Its folder, inside that of the protocol, ``/`` between levels.
    variant : str
        Name of the variant, "" if there is only the config.
    part : str
        What is tested: ``fold-1``, ``centre-dpath``, or names of splits.
    domain : str
        The domain that is left out, or that trains, "" otherwise.
    fraction : float
        Share of the training nuclei or windows that was asked for.
    reached : float
        Share that whole groups, or whole windows, made of it.
    seed : int
    train, val, test : tuple of str
        Names of the images; `val` may be empty.
    """

    path: str
    variant: str
    part: str
    domain: str
    fraction: float
    reached: float
    seed: int
    train: Names
    val: Names
    test: Names


class _Part(NamedTuple):
    name: str
    domain: str
    rest: Dataset
    """Images to train on, and to hold validation images out of unless `val` is given."""
    val: Names | None
    test: Names


def plan_runs(
    protocol: Protocol,
    data: Data | PatchData,
    whole: Dataset,
    counts: Counts,
    seeds: Sequence[int],
    variants: Sequence[str],
) -> list[PlannedRun]:
    """Divide the images for every run.

    Validation images are held out of a part's training images before a fraction is taken, so that
    they are the same for all fractions; all variants have the same images.

    Parameters
    ----------
    protocol : Protocol
    data : Data or PatchData
        Names of the splits to train and validate on, and the share to hold out. Of patches,
        fractions are of windows unless the protocol says otherwise.
    whole : Dataset
        From `celltyper.parts.open_whole`.
    counts : mapping of str to ndarray
        Nuclei of every class by sample name.
    seeds : sequence of int
    variants : sequence of str
        Names, "" for the config itself.

    Returns
    -------
    list of PlannedRun
        In the order in which they are run: seeds, parts, fractions, variants.

    Raises
    ------
    ConfigError
        If fractions are to be of windows and the data have none.
    DataError
        If the images cannot be divided so, or a group would be on two sides.
    """
    patches = isinstance(data, PatchData)
    if protocol.fraction_of == "windows" and not patches:
        raise ConfigError(
            "fraction_of: windows is for patches; of images of cells, whole groups are taken: "
            "leave it out"
        )
    of_windows = patches and protocol.fraction_of != "groups"
    take = nested_windows if of_windows else nested_fractions
    runs = []
    for seed in seeds:
        for part in _parts(protocol, data, whole, counts, seed):
            train, val = part.rest, part.val
            if val is None and data.val_fraction:
                train, val = _hold_out(part, data.val_fraction, seed, counts)
            fractions = take(train, protocol.fractions, seed, counts)
            for fraction, taken in fractions.items():
                sides = taken.names, val or (), part.test
                _check_sides(whole, part.name, sides)
                for variant in variants:
                    levels = [
                        variant if len(variants) > 1 else "",
                        part.name,
                        f"fraction-{fraction:g}" if len(fractions) > 1 else "",
                        f"seed-{seed}" if len(seeds) > 1 else "",
                    ]
                    path = "/".join(level for level in levels if level)
                    about = variant, part.name, part.domain, fraction, taken.reached, seed
                    runs.append(PlannedRun(path, *about, *sides))
    twice = [path for path, n in Counter(run.path for run in runs).items() if n > 1]
    if twice:
        raise DataError(
            f"{whole.path}: two runs would be in the folder {twice[0]}; rename a domain or split"
        )
    return runs


def _parts(
    protocol: Protocol, data: Data | PatchData, whole: Dataset, counts: Counts, seed: int
) -> Iterator[_Part]:
    splits = whole.splits
    if protocol.folds is not None:
        named = (*splits.get(data.train, ()), *splits.get(data.val, ()))
        base = whole.subset(named) if data.train in splits else whole
        for number, fold in enumerate(group_folds(base, protocol.folds, seed, counts), 1):
            rest = base.subset(n for n in base.names if n not in set(fold))
            yield _Part(f"fold-{number}", "", rest, None, fold)
    elif protocol.hold_out is not None:
        base = whole.subset(splits[data.train]) if data.train in splits else whole
        rest, test_part = split_by_group(base, protocol.hold_out, seed, counts)
        yield _Part("held-out", "", rest, None, test_part.names)
    elif (axis := protocol.leave_out or protocol.train_on) is not None:
        listed = {name for names in splits.values() for name in names}
        base = whole
        if data.split is not None:
            base = whole.subset(n for n in whole.names if n in listed)
        parts = leave_out_domain(base, axis)
        unknown = [domain for domain in protocol.domains if domain not in parts]
        if unknown:
            what = "leave out" if protocol.leave_out else "train on"
            raise DataError(
                f"{whole.path}: no {axis} {listing(unknown)} to {what} (there are: "
                f"{', '.join(parts)})"
            )
        for domain in protocol.domains or parts:
            others, own = parts[domain]
            if protocol.train_on is not None:
                yield _Part(_slug(f"trained-on-{domain}"), domain, own, None, others.names)
            else:
                yield _Part(_slug(f"{axis}-{domain}"), domain, others, None, own.names)
    elif protocol.splits:
        for chosen in protocol.splits:
            for name in chosen.values():
                if not splits.get(name):
                    raise DataError(
                        f"{data.split or whole.path}: no split {name!r} (there are: "
                        f"{', '.join(splits) or 'none'})"
                    )
            train, test = (splits[chosen[side]] for side in ("train", "test"))
            val = splits[chosen["val"]] if "val" in chosen else None
            names = [chosen[side] for side in ("train", "val", "test") if side in chosen]
            yield _Part(_slug("-".join(names)), "", whole.subset(train), val, test)
    else:
        assert protocol.test is not None
        test = splits.get(protocol.test, ())
        if not test or protocol.test in (data.train, data.val):
            known = ", ".join(name for name in splits if name not in (data.train, data.val))
            raise DataError(
                f"{data.split or whole.path}: no split {protocol.test!r} to test on (there are: "
                f"{known or 'none'})"
            )
        # without a file of splits, named validation images are a choice of the data's authors
        val = splits.get(data.val, None if data.split is None else ())
        aside = {*test, *(val or ())}
        train = splits.get(data.train, tuple(n for n in whole.names if n not in aside))
        yield _Part(_slug(protocol.test), "", whole.subset(train), val, test)


def nested_windows(
    dataset: Dataset, fractions: Sequence[float], seed: int, counts: Counts
) -> dict[float, Fraction]:
    """Choose parts of the windows, each inside the next larger, every class in proportion.

    The windows are put in one order, in which classes take turns as seats are given to parties by
    the method of Webster and Sainte-Lague, after one window of each; which window of a class is
    next is random. A fraction is the beginning of this order.

    Parameters
    ----------
    dataset : Dataset
        Windows of the training groups.
    fractions : sequence of float
        Shares of the windows, above 0 and at most 1.
    seed : int
        The order is a function of the dataset and the seed.
    counts : mapping of str to ndarray
        One in the class of every window, by its name.

    Returns
    -------
    dict of float to Fraction
        By the share asked for, rounded to whole windows; at least one of every class that the
        dataset has, so that two small fractions of few windows may be the same.

    Raises
    ------
    DataError
        If there are no windows.
    """
    if not dataset.names:
        raise DataError(f"{dataset.path}: there are no training windows to take a fraction of")
    names = np.array(sorted(dataset.names))
    names = np.random.default_rng(np.random.SeedSequence([seed, len(names)])).permutation(names)
    labels = np.array([counts[name].argmax() for name in names])
    turn = np.empty(len(names))
    present = np.unique(labels)
    for label in present:
        own = np.flatnonzero(labels == label)
        turn[own] = (np.arange(len(own)) + 0.5) / len(own)
        turn[own[0]] = 0
    order = names[turn.argsort(kind="stable")].tolist()
    parts = {}
    for fraction in fractions:
        size = max(len(present), int(fraction * len(order) + 0.5))
        taken = set(order[:size])
        kept = tuple(name for name in dataset.names if name in taken)
        groups = len({dataset.groups[name] for name in kept})
        parts[fraction] = Fraction(kept, groups, size / len(order))
    return parts


def _hold_out(part: _Part, fraction: float, seed: int, counts: Counts) -> tuple[Dataset, Names]:
    try:
        train, val = split_by_group(part.rest, fraction, seed, counts)
    except DataError as error:
        raise DataError(
            f"{part.name}: validation images cannot be held out: {error}, or data.val_fraction=0"
        ) from None
    return train, val.names


def _check_sides(whole: Dataset, part: str, sides: tuple[Names, Names, Names]) -> None:
    """Refuse a group on two sides, whatever way the images were divided."""
    train, val, test = ({whole.groups[n] for n in names} for names in sides)
    both = sorted((train & val) | (train & test) | (val & test))
    if both:
        raise DataError(
            f"{whole.path}, {part}: {listing(both)} would be on two sides of training, validation "
            "and test; correct the groups or the splits of the data"
        )


def _slug(text: str) -> str:
    """Name of a folder on every file system."""
    return re.sub(r"[^\w-]+", "-", text).strip("-") or "part"
