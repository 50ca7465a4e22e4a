"""Mistakes in patch tables, found before any training."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from celltyper.datasets.checking import Place, Problem, Severity, opposed
from celltyper.datasets.dataset import listing
from celltyper.datasets.images import read_image
from celltyper.errors import DataError
from celltyper.patches.table import PatchTable, nearest
from celltyper.patches.windows import in_micrometres, padded, read_header, read_patch

logger = logging.getLogger(__name__)

WINDOW = 64
"""Side of the windows that are compared where the whole file is not the patch, pixels."""

KINDS: Mapping[str, tuple[Severity, str]] = {
    "unreadable": ("error", "mend or remove them, or go on without them by --skip-bad"),
    "other classes than expected": ("error", "rename them, or say which classes are wanted"),
    "group in two splits": ("error", "keep a slide or patient on one side"),
    "same pixels in two splits": ("error", "scores would be those of training patches"),
    "same pixels of two classes": ("error", "one of the labels is wrong"),
    "same pixels in two groups": ("error", "folds by group would put them on both sides"),
    "fewer groups than folds": ("error", "ask for fewer folds"),
    "class in fewer groups than folds": ("error", "a fold is without it: ask for fewer folds"),
    "coordinates in micrometres": ("error", "give x and y in pixels of the image"),
    "same pixels twice": ("warning", "keep one"),
    "class missing in a split": ("warning", "it has no score there"),
    "class unknown": ("warning", "not used in training, nor scored"),
    "votes against the label": ("warning", "most experts chose another class"),
    "every patch a group": ("warning", "patients cannot be kept apart: state slides or patients"),
    "window over the border": ("warning", "what lies outside the image is mirrored"),
}
"""Severity and advice of every kind of problem, in the order of the report."""

_Progress = Callable[[Iterable[int]], Iterable[int]]


class Readable(NamedTuple):
    """A table without the patches that cannot be read."""

    table: PatchTable
    bad: tuple[Place, ...]


def check_patches(
    table: PatchTable,
    expected_classes: Sequence[str] | None = None,
    folds: int | None = None,
    *,
    size: int | None = None,
    mpp: float | None = None,
    pixels: bool = True,
    progress: _Progress = iter,
) -> list[Problem]:
    """Look for mistakes in a patch table; every patch is read once.

    Parameters
    ----------
    table : PatchTable
    expected_classes : sequence of str, optional
        What its classes should be, in any order.
    folds : int, optional
        Number of folds that it is to be divided into by group.
    size : int, optional
        Side of the windows that training reads, in pixels at `mpp`; without it, windows over the
        border are not counted.
    mpp : float, optional
        Micrometres per pixel of these; without it, those of the files.
    pixels : bool
        Whether to read the images; without it, only the table is looked at.
    progress : callable
        Wraps the loop over rows, such as ``tqdm``.

    Returns
    -------
    list of Problem
        Of the kinds in `KINDS`, errors first. Two patches are the same if all pixels are equal: of
        the file where it is the patch, else of the 64 px around the centre.
    """
    found: dict[str, list[Place]] = defaultdict(list)
    for kind, places in _of_classes(table, expected_classes):
        found[kind] += places
    for kind, places in _of_groups(table, folds):
        found[kind] += places
    if pixels:
        digests, found["unreadable"] = _survey(table, progress)
        for kind, place in _same_pixels(table, digests):
            found[kind].append(place)
        good = np.array([d is not None for d in digests], np.bool_)
        for kind, places in _of_places(table.take(good), size, mpp):
            found[kind] += places
    problems = [Problem(k, *KINDS[k], places=tuple(found[k])) for k in KINDS if found[k]]
    return sorted(problems, key=lambda p: p.severity != "error")


def readable(table: PatchTable, *, skip_bad: bool = False, progress: _Progress = iter) -> Readable:
    """Read every patch once, and leave out those that cannot be read.

    Parameters
    ----------
    table : PatchTable
    skip_bad : bool
        Go on without them; they are listed in a warning.
    progress : callable
        Wraps the loop over rows, such as ``tqdm``.

    Returns
    -------
    Readable
        The table without them, and what is wrong with each.

    Raises
    ------
    DataError
        If there are any and `skip_bad` is not set, naming the first and how many; or if none can
        be read.
    """
    digests, bad = _survey(table, progress)
    if not bad:
        return Readable(table, ())
    if not skip_bad:
        raise DataError(
            f"{bad[0].note}; {len(bad):,} of {len(table):,} patches cannot be read: mend or remove "
            "them, or go on without them by --skip-bad"
        )
    if len(bad) == len(table):
        raise DataError(f"{table.path}: no patch can be read; the first: {bad[0].note}")
    logger.warning(
        "%s: going on without %d patches that cannot be read: %s",
        table.path,
        len(bad),
        listing((p.image for p in bad), limit=20),
    )
    return Readable(table.take([i for i, d in enumerate(digests) if d is not None]), tuple(bad))


def _survey(table: PatchTable, progress: _Progress) -> tuple[list[bytes | None], list[Place]]:
    """Digest of the pixels of every row, None where they cannot be read, and these."""
    digests: list[bytes | None] = [None] * len(table)
    bad = []
    # By file, so that a field of many points is decoded once.
    order = sorted(range(len(table)), key=lambda i: table.files[i])
    for i in progress(order):
        try:
            if np.isnan(table.centers[i, 0]):
                image = read_image(table.files[i]).image
            else:
                image = read_patch(table, i, size=WINDOW)
        except DataError as error:
            bad.append((i, str(error)))
            continue
        text = str(image.shape).encode()
        digests[i] = hashlib.blake2b(text + image.tobytes(), digest_size=16).digest()
    return digests, [_place(table, i, note) for i, note in sorted(bad)]


def _place(table: PatchTable, i: int, note: str = "") -> Place:
    """Place of a row; the name of a window tells its x and y."""
    return Place(table.names[i], note=note)


def _of_classes(
    table: PatchTable, expected: Sequence[str] | None
) -> Iterable[tuple[str, list[Place]]]:
    if expected is not None:
        wanted, got = list(expected), list(table.classes)
        notes = [f"no class {w!r}{nearest(w, got)}" for w in wanted if w not in got]
        notes += [f"class {g!r} is not expected" for g in got if g not in wanted]
        yield "other classes than expected", [Place(note=note) for note in notes]
    counts: dict[str, Counter[int]] = {split: Counter() for split in table.splits}
    for split, label in zip(table.splits, table.labels.tolist(), strict=True):
        counts[split][label] += 1
    yield (
        "class missing in a split",
        [
            Place(note=f"no {kind!r} " + (f"in {split}" if split else "without a split"))
            for split, count in counts.items()
            for k, kind in enumerate(table.classes)
            if not count[k] and (split or len(counts) == 1)
        ],
    )
    unknown = np.flatnonzero(table.labels < 0)
    yield "class unknown", [_place(table, int(i)) for i in unknown]
    known = np.flatnonzero(table.labels >= 0)
    own = table.votes[known, table.labels[known]]
    against = known[own < table.votes[known].max(axis=1, initial=0) - 1e-9]
    yield (
        "votes against the label",
        [
            _place(
                table,
                int(i),
                f"label {table.classes[table.labels[i]]}, but "
                f"{table.classes[int(table.votes[i].argmax())]} has "
                f"{table.votes[i].max():.0%} of {table.experts[i]} votes",
            )
            for i in against
        ],
    )


def _of_groups(table: PatchTable, folds: int | None) -> Iterable[tuple[str, list[Place]]]:
    sides: dict[str, dict[str, None]] = defaultdict(dict)
    holders: dict[int, set[str]] = defaultdict(set)
    rows = zip(table.groups, table.splits, table.labels.tolist(), strict=True)
    for group, split, label in rows:
        holders[label].add(group)
        if split:
            sides[group][split] = None
    yield (
        "group in two splits",
        [
            Place(note=f"group {group!r} in {' and '.join(both)}")
            for group, stated in sides.items()
            for both in opposed(stated)
        ],
    )
    groups = set(table.groups)
    if len(table) > 1 and table.groups == table.names:
        yield "every patch a group", [Place(note=f"{len(table):,} patches")]
    if folds is None:
        return
    if len(groups) < folds:
        note = f"{len(groups)} groups for {folds} folds"
        yield "fewer groups than folds", [Place(note=note)]
        return
    yield (
        "class in fewer groups than folds",
        [
            Place(note=f"{kind!r} in {len(holders[k])} groups, {folds} folds")
            for k, kind in enumerate(table.classes)
            if len(holders[k]) < folds
        ],
    )


def _same_pixels(table: PatchTable, digests: Sequence[bytes | None]) -> Iterable[tuple[str, Place]]:
    alike: dict[bytes, list[int]] = defaultdict(list)
    for i, digest in enumerate(digests):
        if digest is not None:
            alike[digest].append(i)
    for rows in alike.values():
        if len(rows) < 2:
            continue
        place = _place(
            table, rows[0], f"same pixels as {listing(table.names[i] for i in rows[1:])}"
        )
        apart = opposed(table.splits[i] for i in rows if table.splits[i])
        kinds = {int(table.labels[i]) for i in rows} - {-1}
        if apart:
            yield "same pixels in two splits", place
        elif len({table.groups[i] for i in rows}) > 1:
            yield "same pixels in two groups", place
        else:
            yield "same pixels twice", place
        if len(kinds) > 1:
            yield "same pixels of two classes", place


def _of_places(
    table: PatchTable, size: int | None, mpp: float | None
) -> Iterable[tuple[str, list[Place]]]:
    points: dict[Path, list[int]] = defaultdict(list)
    for i in np.flatnonzero(np.isfinite(table.centers[:, 0])):
        points[table.files[i]].append(int(i))
    rows = [i for of_file in points.values() for i in of_file]
    headers = [read_header(table.files[i]) for i in rows]
    if in_micrometres(table.centers[rows], headers, table.mpp):
        note = f"all {len(rows):,} points lie in the corner that micrometres would leave them"
        yield "coordinates in micrometres", [Place(note=note)]
    if size is not None:
        over = np.flatnonzero(padded(table, size=size, mpp=mpp))
        yield "window over the border", [_place(table, int(i)) for i in over]
