"""Which annotated images train, which validate, and which are kept for a test."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from celltyper.config import Data, one_line
from celltyper.datasets import Dataset, split_by_group
from celltyper.datasets.dataset import listing
from celltyper.errors import ConfigError, DataError
from celltyper.readers import open_dataset, open_parts
from celltyper.readers.meta import check_splits

logger = logging.getLogger(__name__)


class Parts(NamedTuple):
    """The images of a run."""

    train: Dataset
    val: Dataset
    """Empty if nothing is validated."""
    others: Mapping[str, Dataset]
    """Further parts that a file of splits names, such as the test images."""


def divide(data: Data, seed: int) -> Parts:
    """Open the annotated images and say which train and which validate.

    The parts are those of the file ``data.split``, if there is one; else the folders
    ``root/train`` and ``root/val``; else the splits that the dataset in ``root`` names. Where no
    validation images are named, a share ``val_fraction`` of the groups is held out, or none if
    that is 0. Without ``val`` in a file of splits, nothing is validated. Where no split is called
    ``train``, all images train. Validation images may be called ``valid`` too.

    Parameters
    ----------
    data : Data
    seed : int
        Decides which groups are held out.

    Returns
    -------
    Parts

    Raises
    ------
    ConfigError
        If ``data.root`` is not set.
    DataError
        If there is nothing to train on, a split that the config names is not there, the file of
        splits does not fit the images, classes of the parts differ, or a group is on both sides.
    """
    if data.root is None:
        raise ConfigError("data.root is not set: pass --set data.root=FOLDER")
    others: dict[str, Dataset] = {}
    if data.split is not None:
        whole = open_whole(data)
        if not whole.splits.get(data.train):
            raise DataError(f"{data.split}: no images to train on under {data.train!r}")
        parts = {name: whole.subset(names) for name, names in whole.splits.items() if names}
        train = parts.pop(data.train)
        val = parts.pop(data.val, train.subset(()))
        others = parts
    elif (data.root / data.train).is_dir():
        train = open_dataset(data.root / data.train, reader=data.reader, taxonomy=data.taxonomy)
        held_out = data.root / _val_among([f.name for f in data.root.iterdir()], data.val)
        if held_out.is_dir():
            val = open_dataset(held_out, reader=data.reader, taxonomy=data.taxonomy)
        elif data.val != Data().val:
            raise DataError(f"{data.root}: no folder {data.val} for data.val")
        else:
            train, val = _hold_out(train, data.val_fraction, seed)
    else:
        whole = open_dataset(data.root, reader=data.reader, taxonomy=data.taxonomy)
        whole = _with_splits(whole, whole.splits, data, data.root)
        if whole.splits and data.train not in whole.splits:
            logger.warning(
                "%s: none of its splits (%s) is %r: all images train or validate; data.train and "
                "data.val name others",
                data.root,
                ", ".join(whole.splits),
                data.train,
            )
        # Images of a split for tests must not train because no validation images are named.
        train = whole.subset(whole.splits[data.train]) if data.train in whole.splits else whole
        if train is not whole and data.val in whole.splits:
            val = whole.subset(whole.splits[data.val])
        else:
            train, val = _hold_out(train, data.val_fraction, seed)
    if train.classes != val.classes:
        raise DataError(
            f"classes of {train.path} and {val.path} differ: {train.classes} and {val.classes}"
        )
    both = sorted(set(train.groups.values()) & set(val.groups.values()))
    if both:
        raise DataError(
            f"{data.root}: {len(both)} patients or slides are in training and validation "
            f"({', '.join(both[:5])}); move each to one side, or correct 'groups' in meta.json"
        )
    return Parts(train, val, others)


def open_whole(data: Data) -> Dataset:
    """Open all annotated images in ``data.root``, whatever they are for.

    Parameters
    ----------
    data : Data

    Returns
    -------
    Dataset
        Its splits are those of the file ``data.split``, if there is one, else those that the data
        name; subfolders such as ``train`` and ``test`` are splits.

    Raises
    ------
    ConfigError, DataError
        As `divide`.
    """
    if data.root is None:
        raise ConfigError("data.root is not set: pass --set data.root=FOLDER")
    whole, _ = open_parts(data.root, data.reader, data.taxonomy)
    if data.split is None:
        return _with_splits(whole, whole.splits, data, data.root)
    splits = read_splits(data.split)
    check_splits(data.split, splits, whole.groups)
    return _with_splits(whole, splits, data, data.split)


def read_splits(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a file that lists images by part.

    Parameters
    ----------
    path : Path
        YAML or JSON, ``{train: [name, ...], val: [name, ...], test: [name, ...]}``.

    Returns
    -------
    dict of str to tuple of str
        Names of images by part.

    Raises
    ------
    DataError
        If the file cannot be read or holds something else.
    """
    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML or JSON: {one_line(error)}") from error
    expected = "expected {train: [image names], val: [image names], test: [image names]}"
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise DataError(f"{path}: {expected}")
    for part, names in found.items():
        # YAML reads a name such as 12 as a number
        wrong = [n for n in names if not isinstance(n, str)] if isinstance(names, list) else [names]
        if wrong:
            raise DataError(f"{path}: {part!r} holds {listing(wrong)}, not names; {expected}")
    return {part: tuple(names) for part, names in found.items()}


def _with_splits(
    whole: Dataset, splits: Mapping[str, tuple[str, ...]], data: Data, where: Path
) -> Dataset:
    """Give a dataset its splits, ``valid`` under the name in the config, and refuse wrong names."""
    val = _val_among(splits, data.val)
    splits = {data.val if name == val else name: names for name, names in splits.items()}
    for key, name in (("train", data.train), ("val", data.val)):
        if name not in splits and name != getattr(Data(), key):
            raise DataError(
                f"{where}: no split {name!r} for data.{key} (its splits: "
                f"{', '.join(splits) or 'none'})"
            )
    return replace(whole, splits=splits)


def _val_among(names: Iterable[str], wanted: str) -> str:
    """What the validation images are called: many datasets say ``valid``."""
    names = set(names)
    return "valid" if wanted == "val" and "val" not in names and "valid" in names else wanted


def _hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if not fraction:
        return dataset, dataset.subset(())
    return split_by_group(dataset, fraction, seed)
