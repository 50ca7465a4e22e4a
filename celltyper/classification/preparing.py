"""Annotated windows as a config asks for them, and which of them train, validate and test."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from celltyper.classification.config import PatchData
from celltyper.datasets import Dataset, split_by_group
from celltyper.datasets.dataset import listing
from celltyper.datasets.merging import UNSTATED
from celltyper.errors import ConfigError, DataError
from celltyper.parts import read_splits
from celltyper.patches.checking import readable
from celltyper.patches.reading import open_patches
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import check_centers, read_header

logger = logging.getLogger("celltyper")

Rows = NDArray[np.intp]

_REMEDIES = {
    "training": "take more slides: a larger fraction, fewer folds, or another seed",
    "validation": "raise data.val_fraction, or set it to 0",
    "test": "ask for fewer folds",
}
"""What to do where a class is missing in a part."""


class PatchParts(NamedTuple):
    """Rows of a table by what they are for."""

    train: Rows
    val: Rows
    """Empty if nothing is validated."""


def open_labelled(data: PatchData, *, progress: bool = True) -> PatchTable:
    """Open the annotated windows of a config; those without a label are left out, and counted.

    Parameters
    ----------
    data : PatchData
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    PatchTable

    Raises
    ------
    ConfigError
        If ``data.root`` is not set, or ``data.mpp`` is not while the files state several.
    DataError
        If the windows cannot be read, all of them or, without ``data.skip_bad``, one; or if some
        files state their micrometres per pixel and others do not.
    """
    if data.root is None:
        raise ConfigError("data.root is not set: pass --set data.root=FOLDER")
    table = open_patches(
        data.root, classes=data.classes or None, reader=data.reader, images=data.images
    )
    check_centers(table)
    table = readable(
        table,
        skip_bad=data.skip_bad,
        progress=lambda rows: tqdm(
            rows, desc="read", unit="patch", disable=None if progress else True
        ),
    ).table
    known = table.labels >= 0
    if not known.all():
        logger.warning("%s: %d windows without a label are left out", table.path, (~known).sum())
        table = table.take(known)
    return _with_resolution(table, data.mpp)


def _with_resolution(table: PatchTable, wanted: float | None) -> PatchTable:
    """State the resolution of the files, unless they state several; `wanted` if they state none."""
    if table.mpp is not None:
        return table
    stated = {file: read_header(file).mpp for file in dict.fromkeys(table.files)}
    known = {file: mpp for file, mpp in stated.items() if mpp is not None}
    if not known:
        return replace(table, mpp=wanted)
    silent = next((file for file, mpp in stated.items() if mpp is None), None)
    if silent is not None:
        raise DataError(
            f"{silent} states no micrometres per pixel, but {next(iter(known))} does; write it "
            "into all files, or, if it is the same for all, as 'mpp' into meta.json"
        )
    low, high = min(known.values()), max(known.values())
    if wanted is None and high > 1.01 * low:
        raise ConfigError(
            f"{table.path} holds images of {low:g} to {high:g} micrometres per pixel: set "
            "data.mpp to that of the windows"
        )
    return replace(table, mpp=low) if wanted is None else table


def size_of(data: PatchData, table: PatchTable) -> int:
    """Side of a window in pixels: as the config says, or that of the patches.

    Raises
    ------
    ConfigError
        If the config says none, and windows are cut from images or patches differ in size.
    """
    if data.size is not None:
        return data.size
    if np.isfinite(table.centers).any():
        raise ConfigError(
            f"{table.path} holds points on images: set data.size to the side of a window in pixels"
        )
    sizes = {min(h.width, h.height) for h in map(read_header, table.files)}
    if len(sizes) > 1:
        raise ConfigError(
            f"{table.path} holds patches of {min(sizes)} to {max(sizes)} px: set data.size to "
            "the side of the part in their middle"
        )
    return sizes.pop()


def positive_class(data: PatchData, table: PatchTable) -> int:
    """Index of the positive class: as the config says, or the rarest.

    Raises
    ------
    ConfigError
        If there is no such class.
    """
    if data.positive is None:
        return int(np.bincount(table.labels, minlength=len(table.classes)).argmin())
    if data.positive not in table.classes:
        raise ConfigError(
            f"data.positive {data.positive!r} is no class of {table.path} "
            f"({', '.join(table.classes)})"
        )
    return table.classes.index(data.positive)


def divide_rows(data: PatchData, table: PatchTable, seed: int) -> PatchParts:
    """Say which windows train and which validate; whole groups, every class in proportion.

    Parameters
    ----------
    data : PatchData
    table : PatchTable
    seed : int
        Decides which groups are held out.

    Returns
    -------
    PatchParts

    Raises
    ------
    DataError
        If a split does not fit the windows, a group is on both sides, or a class is missing.
    """
    whole = as_dataset(table, data)
    if not whole.splits:
        train, val = whole, whole.subset(())
    elif data.train not in whole.splits:
        raise DataError(
            f"{data.split or table.path}: no split {data.train!r} for data.train (its splits: "
            f"{', '.join(whole.splits)})"
        )
    else:
        train = whole.subset(whole.splits[data.train])
        val = whole.subset(whole.splits.get(data.val, ()))
    if not len(val) and data.val_fraction:
        train, val = split_by_group(train, data.val_fraction, seed, counts_of(table))
    both = set(train.groups.values()) & set(val.groups.values())
    if both:
        raise DataError(
            f"{data.split or table.path}: {listing(sorted(both))} in training and validation; "
            "keep a patient or slide on one side"
        )
    parts = PatchParts(rows_of(table, train.names), rows_of(table, val.names))
    check_classes(table, {"training": parts.train, "validation": parts.val}, data.split)
    return parts


def check_classes(table: PatchTable, parts: Mapping[str, Rows], where: object = None) -> None:
    """Refuse parts of the windows in which a class is missing, before anything is fitted.

    Parameters
    ----------
    table : PatchTable
    parts : mapping of str to ndarray of int
        Rows of ``training``, ``validation`` and ``test`` windows; empty parts pass, and so do
        validation windows of more than two classes, which choose no threshold.
    where : object
        Names the division in the message; by default it is the table.

    Raises
    ------
    DataError
    """
    for part, rows in parts.items():
        found = set(table.labels[rows].tolist())
        absent = [name for i, name in enumerate(table.classes) if i not in found]
        if part == "validation" and len(table.classes) > 2:
            continue
        if len(rows) and absent:
            raise DataError(
                f"{where or table.path}: none of the {len(rows)} {part} windows is of class "
                f"{' or '.join(absent)}; {_REMEDIES[part]}"
            )


def as_dataset(table: PatchTable, data: PatchData) -> Dataset:
    """Names, groups, splits and domains of windows, for what divides images in dense mode."""
    names = table.names
    splits: dict[str, tuple[str, ...]] = {}
    if data.split is not None:
        splits = read_splits(data.split)
        for split, listed in splits.items():
            unknown = sorted(set(listed) - set(names))
            if unknown:
                raise DataError(
                    f"{data.split}: split {split!r} names {listing(unknown)}, which is not among "
                    "the patches"
                )
    elif any(table.splits):
        kinds = dict.fromkeys(s for s in table.splits if s)
        splits = {
            kind: tuple(n for n, s in zip(names, table.splits, strict=True) if s == kind)
            for kind in kinds
        }
    domains = {}
    if any(table.domains):
        pairs = zip(names, table.domains, strict=True)
        domains["domain"] = {name: domain or UNSTATED for name, domain in pairs}
    return Dataset(
        name=table.path.name,
        path=table.path,
        classes=table.classes,
        mpp=table.mpp,
        names=names,
        groups=dict(zip(names, table.groups, strict=True)),
        read=_no_image,
        splits=splits,
        domains=domains,
    )


def counts_of(table: PatchTable) -> dict[str, NDArray[np.int64]]:
    """One count in the class of every window, by its name."""
    ones = np.eye(len(table.classes), dtype=np.int64)
    return dict(zip(table.names, ones[table.labels], strict=True))


def rows_of(table: PatchTable, names: Sequence[str]) -> Rows:
    """Rows of windows by name."""
    place = {name: i for i, name in enumerate(table.names)}
    return np.array([place[name] for name in names], np.intp)


def _no_image(name: str) -> NoReturn:
    raise DataError(f"{name} is a window, not an annotated image")
