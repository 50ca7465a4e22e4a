"""Mistakes in annotated images, found before any training."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import cc3d
import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import Dataset, listing
from celltyper.errors import DataError
from celltyper.labels import label_boxes
from celltyper.types import UNKNOWN, Labels, Sample

Severity = Literal["error", "warning"]

AREA_UM2 = (3.0, 2000.0)
"""Areas between which a nucleus may lie, square micrometres."""
AREA_PX = (5.0, 1e5)
"""The same in pixels, where the resolution is unknown."""
SLIVER_PX = 2
"""Nuclei at the border that are at most this thick are remains of cut ones."""
BLANK = 3.0
"""Standard deviation of the pixels below which an image shows nothing."""
NO_SPLIT = "(no split)"


@dataclass(frozen=True)
class Place:
    """Where a problem is.

    Parameters
    ----------
    image : str
        Sample name; empty for a problem of the whole dataset.
    label : int or None
        Label id.
    x, y : int or None
        Column and row of a pixel.
    note : str
        What is there.
    """

    image: str = ""
    label: int | None = None
    x: int | None = None
    y: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """One kind of problem and where it occurs.

    Parameters
    ----------
    kind : str
        Short name, such as ``"id in several pieces"``.
    severity : {"error", "warning"}
        Errors spoil training or its scores; warnings want to be looked at.
    advice : str
        What it means and what to do.
    places : tuple of Place
        All of them.
    """

    kind: str
    severity: Severity
    advice: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Description:
    """What a dataset holds.

    Parameters
    ----------
    name, path : str
    images : int
    sizes : dict of (int, int) to int
        Images by height and width, frequent ones first.
    mpp : dict of (float or None) to int
        Images by micrometres per pixel.
    classes : tuple of str
    nuclei : dict of str to tuple of int
        By split, nuclei of every class, those of unknown class last; images in no split are under
        ``"(no split)"``.
    total : tuple of int
        The same of all images: splits may share some.
    images_by_split : dict of str to int
    groups : int
    domains : dict of str to dict of str to int
        Images by value of every attribute.
    unannotated : dict of str to int
        Images that do not annotate a class, by class.
    objects : str
        What ``nuclei`` and ``total`` count.
    """

    name: str
    path: str
    images: int
    sizes: Mapping[tuple[int, int], int]
    mpp: Mapping[float | None, int]
    classes: tuple[str, ...]
    nuclei: Mapping[str, tuple[int, ...]]
    total: tuple[int, ...]
    images_by_split: Mapping[str, int]
    groups: int
    domains: Mapping[str, Mapping[str, int]]
    unannotated: Mapping[str, int]
    objects: str = "nuclei"


@dataclass(frozen=True)
class Check:
    """Problems of a dataset, errors first, and what it holds."""

    problems: tuple[Problem, ...]
    description: Description

    @property
    def errors(self) -> int:
        """Number of kinds of errors."""
        return sum(p.severity == "error" for p in self.problems)


KINDS: Mapping[str, tuple[Severity, str]] = {
    "unreadable": ("error", "these images cannot be used"),
    "type outside the list": ("error", "give the class a name, or correct the type"),
    "classes of the same name": ("error", "they differ in case or blanks only: give one name"),
    "group in two splits": ("error", "keep a patient, slide or field on one side"),
    "same image in two splits": ("error", "scores would be those of training images"),
    "same image twice": ("warning", "keep one"),
    "id in several pieces": ("warning", "the smaller piece may be another nucleus, or dirt"),
    "sliver at the border": ("warning", f"at most {SLIVER_PX} px thick: the rest is cut off"),
    "impossible size": ("warning", "no nucleus has it: wrong mpp, or merged or stray labels"),
    "no nuclei": ("warning", "is the image meant to be empty, or its labels missing?"),
    "blank image": ("warning", "it shows nothing"),
    "several resolutions": ("warning", "training works at one: set data.mpp"),
    "class missing in a split": ("warning", "it has no score there"),
}
"""Severity and advice of every kind of problem, in the order of the report."""


def describe(
    dataset: Dataset, progress: Callable[[Iterable[str]], Iterable[str]] = iter
) -> Description:
    """Count what a dataset holds; every sample is read.

    Parameters
    ----------
    dataset : Dataset
    progress : callable
        Wraps the loop over names, such as ``tqdm``.

    Returns
    -------
    Description

    Raises
    ------
    DataError
        If a sample cannot be read.
    """
    survey = _Survey(dataset)
    for name in progress(dataset.names):
        survey.count(name, dataset.read(name))
    return survey.description()


def check_dataset(
    dataset: Dataset, progress: Callable[[Iterable[str]], Iterable[str]] = iter
) -> Check:
    """Look for mistakes in a dataset; every sample is read once.

    Parameters
    ----------
    dataset : Dataset
    progress : callable
        Wraps the loop over names, such as ``tqdm``.

    Returns
    -------
    Check
        Problems of the kinds in `KINDS`; of samples that cannot be read, nothing else is known.
    """
    survey = _Survey(dataset)
    found: dict[str, list[Place]] = defaultdict(list)
    images: dict[bytes, list[str]] = defaultdict(list)
    for name in progress(dataset.names):
        try:
            sample = dataset.read(name)
        except DataError as error:
            found["unreadable"].append(Place(name, note=str(error)))
            continue
        survey.count(name, sample)
        for kind, places in _problems_of(name, sample, dataset).items():
            found[kind] += places
        images[_digest(sample)].append(name)
    for names in images.values():
        if len(names) > 1:
            leaks = opposed(s for n in names for s in survey.splits_of[n])
            kind = "same image in two splits" if leaks else "same image twice"
            found[kind].append(Place(names[0], note=f"same pixels as {listing(names[1:])}"))
    description = survey.description()
    for kind, places in _problems_of_all(dataset, survey, description).items():
        found[kind] += places
    problems = [Problem(k, *KINDS[k], places=tuple(found[k])) for k in KINDS if found[k]]
    return Check(tuple(sorted(problems, key=lambda p: p.severity != "error")), description)


def division_of(split: str) -> str:
    """Which way of dividing a dataset a split belongs to, for there may be several.

    Parameters
    ----------
    split : str

    Returns
    -------
    str
        ``"stage"`` of ``"stage-train"``, and alike before ``-val``, ``-valid`` and ``-test``;
        else empty.
    """
    way, _, part = split.rpartition("-")
    return way if part in ("train", "val", "valid", "test") else ""


def opposed(splits: Iterable[str]) -> list[tuple[str, ...]]:
    """Splits of one division each, where there are two or more of it.

    Parameters
    ----------
    splits : iterable of str
        That an image, or a group, is in.

    Returns
    -------
    list of tuple of str
        Each a leak.
    """
    ways: dict[str, dict[str, None]] = defaultdict(dict)
    for split in splits:
        ways[division_of(split)][split] = None
    return [tuple(both) for both in ways.values() if len(both) > 1]


class _Survey:
    """Counts over samples."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.splits_of: dict[str, list[str]] = {name: [] for name in dataset.names}
        for split, names in dataset.splits.items():
            for name in names:
                self.splits_of[name].append(split)
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.mpp: Counter[float | None] = Counter()
        self.unannotated: Counter[int] = Counter()
        splits = dict.fromkeys(dataset.splits)
        if not all(self.splits_of.values()):
            splits[NO_SPLIT] = None
        width = len(dataset.classes) + 1
        self.nuclei = {split: np.zeros(width, np.int64) for split in splits}
        self.total = np.zeros(width, np.int64)

    def count(self, name: str, sample: Sample) -> None:
        height, width = sample.labels.shape
        self.sizes[height, width] += 1
        self.mpp[sample.mpp or self.dataset.mpp] += 1
        self.unannotated.update(sample.unannotated)
        found = sample.phenotypes[label_boxes(sample.labels).ids].astype(np.int64)
        known = len(self.dataset.classes)
        column = np.where((found < 1) | (found > known), known, found - 1)
        row = np.bincount(column, minlength=known + 1)
        self.total += row
        for split in self.splits_of[name] or [NO_SPLIT]:
            self.nuclei[split] += row

    def description(self) -> Description:
        data = self.dataset
        names = {split: len(members) for split, members in data.splits.items()}
        if NO_SPLIT in self.nuclei:
            names[NO_SPLIT] = sum(not splits for splits in self.splits_of.values())
        return Description(
            name=data.name,
            path=str(data.path),
            images=len(data),
            sizes=dict(self.sizes.most_common()),
            mpp=dict(self.mpp.most_common()),
            classes=data.classes,
            nuclei={s: tuple(map(int, row)) for s, row in self.nuclei.items()},
            total=tuple(map(int, self.total)),
            images_by_split=names,
            groups=len({data.groups[n] for n in data.names}),
            domains={a: dict(Counter(v.values()).most_common()) for a, v in data.domains.items()},
            unannotated={data.classes[k - 1]: n for k, n in sorted(self.unannotated.items())},
        )


def _problems_of(name: str, sample: Sample, dataset: Dataset) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = defaultdict(list)
    boxes = label_boxes(sample.labels)
    if not len(boxes.ids):
        found["no nuclei"].append(Place(name))
    if float(sample.image.std(axis=(0, 1)).max()) < BLANK:
        color = ", ".join(f"{c:.0f}" for c in sample.image.mean(axis=(0, 1)))
        found["blank image"].append(Place(name, note=f"all of it is about RGB {color}"))

    def place(row: int, note: str) -> Place:
        label = int(boxes.ids[row])
        top, left = int(boxes.row_start[row]), int(boxes.col_start[row])
        x = left + int(np.flatnonzero(sample.labels[top, left:] == label)[0])
        return Place(name, label, x, top, note)

    types = sample.phenotypes[boxes.ids].astype(np.int64)
    wrong = (types < 1) | ((types > len(dataset.classes)) & (types != UNKNOWN))
    for row in np.flatnonzero(wrong):
        note = f"type {types[row]} of 1..{len(dataset.classes)}"
        found["type outside the list"].append(place(int(row), note))
    for row in np.flatnonzero(_slivers(boxes, sample.labels.shape)):
        height = boxes.row_stop[row] - boxes.row_start[row]
        width = boxes.col_stop[row] - boxes.col_start[row]
        found["sliver at the border"].append(place(int(row), f"{width} x {height} px"))
    mpp = sample.mpp or dataset.mpp
    (low, high), scale = (AREA_UM2, mpp * mpp) if mpp else (AREA_PX, 1.0)
    for row in np.flatnonzero((boxes.area * scale < low) | (boxes.area * scale > high)):
        area = f"{boxes.area[row]} px"
        if mpp:
            area += f" = {boxes.area[row] * scale:.1f} um2 at {mpp:g} mpp"
        found["impossible size"].append(place(int(row), area))
    for label, pixels, x, y in _pieces(sample.labels):
        note = f"a piece of {pixels} px apart from the rest"
        found["id in several pieces"].append(Place(name, label, x, y, note))
    return found


def _slivers(boxes: object, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    top, bottom, left, right = (
        getattr(boxes, n) for n in ("row_start", "row_stop", "col_start", "col_stop")
    )
    across = ((top == 0) | (bottom == shape[0])) & (bottom - top <= SLIVER_PX)
    down = ((left == 0) | (right == shape[1])) & (right - left <= SLIVER_PX)
    thin: NDArray[np.bool_] = across | down
    return thin


def _pieces(labels: Labels) -> list[tuple[int, int, int, int]]:
    """Label, area, x and y of every piece of a label but its largest; corners connect."""
    pieces = cc3d.connected_components(labels, connectivity=8)
    area = np.bincount(pieces.ravel())
    # Any pixel tells the label of its piece; the first in reading order says where it is.
    first = np.zeros(len(area), np.int64)
    flat = pieces.ravel()
    first[flat[::-1]] = np.arange(len(flat) - 1, -1, -1)
    owner = labels.ravel()[first]
    order = [int(i) for i in np.lexsort((first, -area)) if i]
    seen: set[int] = set()
    found = []
    for i in order:
        label = int(owner[i])
        if label in seen:
            y, x = divmod(int(first[i]), labels.shape[1])
            found.append((label, int(area[i]), x, y))
        seen.add(label)
    return sorted(found)


def _digest(sample: Sample) -> bytes:
    text = str(sample.image.shape).encode()
    return hashlib.blake2b(text + sample.image.tobytes(), digest_size=16).digest()


def _problems_of_all(
    dataset: Dataset, survey: _Survey, description: Description
) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = defaultdict(list)
    alike: dict[str, list[str]] = defaultdict(list)
    for kind in dataset.classes:
        alike[" ".join(kind.casefold().split())].append(kind)
    for kinds in alike.values():
        if len(kinds) > 1:
            found["classes of the same name"].append(Place(note=", ".join(map(repr, kinds))))
    sides: dict[str, list[str]] = defaultdict(list)
    for name, splits in survey.splits_of.items():
        sides[dataset.groups[name]] += splits
    for group, splits in sides.items():
        for both in opposed(splits):
            note = f"group {group!r} in {' and '.join(both)}"
            found["group in two splits"].append(Place(note=note))
    if not survey.sizes:  # not one image could be read
        return found
    if len(survey.mpp) > 1:
        note = ", ".join(f"{n} at {m or 'unknown'}" for m, n in survey.mpp.items())
        found["several resolutions"].append(Place(note=f"images: {note}"))
    for split, counts in description.nuclei.items():
        for k, kind in enumerate(dataset.classes):
            if counts[k] == 0 and (split != NO_SPLIT or len(description.nuclei) == 1):
                where = f"in {split}" if description.total[k] else "anywhere"
                place = Place(note=f"no {kind!r} {where}")
                if place not in found["class missing in a split"]:
                    found["class missing in a split"].append(place)
    return found
