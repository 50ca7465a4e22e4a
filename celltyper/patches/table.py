"""The table of annotated windows that every layout is read into."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import listing
from celltyper.errors import DataError
from celltyper.readers.files import ordered_classes

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")


@dataclass(frozen=True, eq=False)
class PatchTable:
    """Annotated windows: which pixels, which class, whose slide.

    Parameters
    ----------
    path : Path
        What it was read from, for messages.
    classes : tuple of str
        K names, at least two.
    names : tuple of str
        Unique: the file relative to the root, or ``"<image>:<x>:<y>"``.
    labels : ndarray of intp, shape (n,)
        Index into `classes`, -1 if unknown.
    votes : ndarray of float64, shape (n, K)
        Share of the experts that chose each class, one-hot where there is only the label; NaN
        where the label is unknown.
    experts : ndarray of intp, shape (n,)
        Experts behind a row of `votes`, 1 where there is only the label, 0 where it is unknown.
    groups : tuple of str
        Slide or patient, never on both sides of a split.
    domains : tuple of str
        Tumour type, scanner or data set; empty if not stated.
    splits : tuple of str
        Published part, such as ``"train"``; empty if not stated.
    files : tuple of Path
        The patch itself, or the image that it is cut from.
    centers : ndarray of float64, shape (n, 2)
        x, y of the window's centre in pixels of the file, whose first pixel has its centre at
        (0.5, 0.5); NaN if the whole file is the patch.
    mpp : float or None
        Micrometres per pixel of the files, None if every file has to state its own.

    Raises
    ------
    DataError
        If lengths, shapes or values do not fit together, naming the row.
    """

    path: Path
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: NDArray[np.intp]
    votes: NDArray[np.float64]
    experts: NDArray[np.intp]
    groups: tuple[str, ...]
    domains: tuple[str, ...]
    splits: tuple[str, ...]
    files: tuple[Path, ...]
    centers: NDArray[np.float64]
    mpp: float | None

    def __post_init__(self) -> None:
        check_classes(self.path, self.classes)
        self._check_shapes()
        self._check_values()

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Sequence[int] | NDArray[Any]) -> PatchTable:
        """Choose rows.

        Parameters
        ----------
        index : array of int, shape (m,), or of bool, shape (n,)
            Rows in the order wanted, none twice; or which rows to keep.

        Returns
        -------
        PatchTable
            Of the same classes.
        """
        rows = np.asarray(index)
        rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows.astype(np.intp)

        def of(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i] for i in rows)

        return PatchTable(
            path=self.path,
            classes=self.classes,
            names=of(self.names),
            labels=self.labels[rows],
            votes=self.votes[rows],
            experts=self.experts[rows],
            groups=of(self.groups),
            domains=of(self.domains),
            splits=of(self.splits),
            files=of(self.files),
            centers=self.centers[rows],
            mpp=self.mpp,
        )

    def subset(self, split: str) -> PatchTable:
        """Rows of a published part.

        Parameters
        ----------
        split : str
            Such as ``"train"``.

        Returns
        -------
        PatchTable
            In the order of this one.

        Raises
        ------
        DataError
            If no row states this split, naming those that are stated.
        """
        rows = np.array([s == split for s in self.splits], np.bool_)
        if not rows.any():
            known = listing(sorted(set(self.splits) - {""})) or "none"
            raise DataError(f"{self.path}: no split {split!r} (its splits: {known})")
        return self.take(rows)

    def _check_shapes(self) -> None:
        n, k = len(self.names), len(self.classes)
        columns = ("groups", "domains", "splits", "files")
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
            name: ((len(getattr(self, name)),), (n,)) for name in columns
        }
        shapes["labels"] = self.labels.shape, (n,)
        shapes["experts"] = self.experts.shape, (n,)
        shapes["votes"] = self.votes.shape, (n, k)
        shapes["centers"] = self.centers.shape, (n, 2)
        for name, (got, wanted) in shapes.items():
            if got != wanted:
                raise DataError(
                    f"{self.path}: {name} must be {wanted} for {n} names of {k} classes, got {got}"
                )
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise DataError(f"{self.path}: names must be unique; {listing(twice)} occurs twice")

    def _check_values(self) -> None:
        k = len(self.classes)
        unknown = self.labels == -1
        with np.errstate(invalid="ignore"):
            shares = (self.votes >= 0).all(axis=1) & (np.abs(self.votes.sum(axis=1) - 1) < 1e-6)
        rules = {
            f"label must lie in 0..{k - 1}, or be -1": (self.labels >= -1) & (self.labels < k),
            "votes must be shares that add up to 1": shares | unknown,
            "votes must be NaN where the label is unknown": (
                np.isnan(self.votes).all(axis=1) | ~unknown
            ),
            "experts must be at least 1, and 0 where the label is unknown": np.where(
                unknown, self.experts == 0, self.experts >= 1
            ),
            "the centre must be two numbers, or both NaN": (
                np.isfinite(self.centers).all(axis=1) | np.isnan(self.centers).all(axis=1)
            ),
        }
        for rule, kept in rules.items():
            if not kept.all():
                raise DataError(f"{self.path}: {self.names[int(kept.argmin())]}: {rule}")
        if self.mpp is not None and not (math.isfinite(self.mpp) and self.mpp > 0):
            raise DataError(f"{self.path}: mpp must be positive micrometres, got {self.mpp}")


class Patch(NamedTuple):
    """One window as a reader finds it; what is not stated is empty."""

    name: str
    file: Path
    where: str
    """Its place in the source, for messages, such as ``"row 7"``."""
    label: str = ""
    votes: tuple[str, ...] = ()
    """Class that each expert chose."""
    group: str = ""
    """Empty: a group of its own."""
    domain: str = ""
    split: str = ""
    x: float = math.nan
    y: float = math.nan


def build_table(
    path: Path,
    patches: Iterable[Patch],
    *,
    classes: Sequence[str] | None = None,
    stated: tuple[str, ...] = (),
    mpp: float | None = None,
) -> PatchTable:
    """Turn what a reader found into a table.

    Parameters
    ----------
    path : Path
        Source, for messages.
    patches : iterable of Patch
        A patch without label has the class that most experts chose; of a tie, it is unknown.
    classes : sequence of str, optional
        Classes wanted, in order; patches of others are left out, and counted in a warning. Where
        labels are numbers, the classes that these stand for, in ascending order of the numbers.
    stated : tuple of str
        Classes in the order that the source lists them. With neither, they are in alphabetical
        order.
    mpp : float, optional
        Micrometres per pixel of the files.

    Returns
    -------
    PatchTable
        In the order of `patches`. A window that is listed twice with one label is kept once, and
        counted in a warning.

    Raises
    ------
    DataError
        If there are no patches, labels are numbers without `classes`, a wanted class does not
        occur while one that is not wanted does (a misspelling), there are fewer than two classes,
        or a window has two labels.
    """
    rows = [p if p.label else p._replace(label=_most(p.votes)) for p in patches]
    if not rows:
        raise DataError(f"{path}: no patches in it")
    rows = _named(path, rows, classes)
    found = Counter(p.label for p in rows if p.label)
    if classes is None:
        kinds = ordered_classes(path, found, stated)
        if len(kinds) < 2:
            raise DataError(
                f"{path}: patches of {listing(kinds) or 'no class'}; two classes are needed: "
                "state them in 'classes' if the labels are elsewhere or unknown"
            )
    else:
        kinds = tuple(classes)
        check_classes(path, kinds)
        _check_wanted(path, kinds, found)
    rows = _without_others(path, rows, kinds)
    rows = _each_once(path, rows)
    return _table(path, rows, kinds, mpp)


def check_classes(path: Path, classes: Sequence[str]) -> None:
    """Refuse fewer than two classes, and names that are empty or repeated.

    Parameters
    ----------
    path : Path
        For the message.
    classes : sequence of str

    Raises
    ------
    DataError
        Saying which.
    """
    if len(classes) < 2 or not all(c.strip() for c in classes):
        raise DataError(
            f"{path}: at least two classes with names are needed, got {listing(classes) or 'none'}"
        )
    ordered_classes(path, classes)
    if len(set(classes)) < len(classes):
        raise DataError(f"{path}: a class is named twice among {listing(classes)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Question for an error: the name that was probably meant.

    Parameters
    ----------
    name : str
        Not among the known ones.
    known : iterable of str

    Returns
    -------
    str
        Such as ``"; did you mean 'Atypical'?"``, or nothing. Case does not matter here.
    """
    by_case = {k.strip().casefold(): k for k in known}
    close = get_close_matches(name.strip().casefold(), by_case, n=1)
    return f"; did you mean {by_case[close[0]]!r}?" if close else ""


def _most(votes: tuple[str, ...]) -> str:
    """Class of most votes, empty if there are none or two are even."""
    ranked = Counter(v for v in votes if v).most_common(2)
    even = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
    return ranked[0][0] if ranked and not even else ""


def _named(path: Path, rows: list[Patch], classes: Sequence[str] | None) -> list[Patch]:
    """Rows whose labels are names, by `classes` where they are numbers."""
    found = {label for p in rows for label in (p.label, *p.votes) if label}
    if not found or not all(_NUMBER.fullmatch(label) for label in found):
        return rows
    if classes is not None and found <= set(classes):
        return rows
    numbers = sorted({float(label) for label in found})
    shown = ", ".join(f"{n:g}" for n in numbers)
    if classes is None:
        raise DataError(
            f"{path}: labels are the numbers {shown}; name the classes that they stand for in "
            "'classes', in ascending order of the numbers"
        )
    if len(classes) != len(numbers):
        raise DataError(
            f"{path}: labels are the {len(numbers)} numbers {shown}, but there are "
            f"{len(classes)} classes ({listing(classes)}); name one for each, in ascending order "
            "of the numbers"
        )
    name = dict(zip(numbers, classes, strict=True))
    logger.info("%s: labels %s", path, ", ".join(f"{n:g} = {c}" for n, c in name.items()))

    def of(label: str) -> str:
        return name[float(label)] if label else ""

    return [p._replace(label=of(p.label), votes=tuple(map(of, p.votes))) for p in rows]


def _check_wanted(path: Path, kinds: tuple[str, ...], found: Counter[str]) -> None:
    absent = [k for k in kinds if k not in found]
    others = [f for f in found if f not in kinds]
    if absent and others:
        raise DataError(
            f"{path}: no patch of class {absent[0]!r}{nearest(absent[0], others)} "
            f"(found: {listing(sorted(found))})"
        )


def _without_others(path: Path, rows: list[Patch], kinds: tuple[str, ...]) -> list[Patch]:
    others = Counter(p.label for p in rows if p.label and p.label not in kinds)
    if others:
        counts = ", ".join(f"{n:,} of {label!r}" for label, n in others.most_common())
        logger.warning("%s: patches of other classes are left out: %s", path, counts)
    kept = [p for p in rows if not p.label or p.label in kinds]
    if not kept:
        raise DataError(f"{path}: no patch of the classes {listing(kinds)}")
    return kept


def _each_once(path: Path, rows: list[Patch]) -> list[Patch]:
    first: dict[str, Patch] = {}
    for patch in rows:
        other = first.setdefault(patch.name, patch)
        if other.label != patch.label:
            raise DataError(
                f"{path}: {other.where} and {patch.where} are the same window, {patch.name}, but "
                f"of the classes {other.label!r} and {patch.label!r}; keep one"
            )
    if len(first) < len(rows):
        logger.warning("%s: %d windows are listed twice; once kept", path, len(rows) - len(first))
    return list(first.values())


def _table(path: Path, rows: list[Patch], kinds: tuple[str, ...], mpp: float | None) -> PatchTable:
    index = {kind: i for i, kind in enumerate(kinds)}
    labels = np.array([index.get(p.label, -1) for p in rows], np.intp)
    votes = np.full((len(rows), len(kinds)), np.nan)
    experts = np.zeros(len(rows), np.intp)
    for i, patch in enumerate(rows):
        if labels[i] < 0:
            continue
        # An expert who chose a class that is not asked for says nothing between those that are.
        chosen = [index[v] for v in patch.votes if v in index] or [labels[i]]
        votes[i] = np.bincount(chosen, minlength=len(kinds)) / len(chosen)
        experts[i] = len(chosen)
    return PatchTable(
        path=path,
        classes=kinds,
        names=tuple(p.name for p in rows),
        labels=labels,
        votes=votes,
        experts=experts,
        groups=tuple(p.group or p.name for p in rows),
        domains=tuple(p.domain for p in rows),
        splits=tuple(p.split for p in rows),
        files=tuple(p.file for p in rows),
        centers=np.array([(p.x, p.y) for p in rows], np.float64).reshape(-1, 2),
        mpp=mpp,
    )
