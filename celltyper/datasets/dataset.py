"""A dataset: named samples that are read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from celltyper.errors import DataError
from celltyper.types import Image, Labels, Sample


class Window(NamedTuple):
    """A rectangle of an image with its labels; ids as in the sample."""

    image: Image
    labels: Labels


WindowReader = Callable[[str, int, int, int, int], Window]
"""Reads ``(name, row, col, height, width)``."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Annotated images that are read on access.

    Parameters
    ----------
    name : str
        Name of the dataset.
    path : Path
        Where it lives, for messages and provenance.
    classes : tuple of str
        Phenotypes; class id k is ``classes[k - 1]``.
    mpp : float or None
        Micrometres per pixel, None if unknown.
    names : tuple of str
        Names of the samples, in order.
    groups : mapping of str to str
        Patient, slide or field of every sample, by sample name.
    read : callable
        Reads one sample by name. Picklable, so that data-loading workers may carry it.
    splits : mapping of str to tuple of str
        Published splits, sample names by split name.
    colors : tuple of str
        ``#rrggbb`` by class, empty if the dataset states none.
    domains : mapping of str to mapping of str to str
        What samples differ in beside their group, such as centre, tissue or stage: value by
        sample name, by attribute.
    window : callable or None
        Reads a rectangle of a sample without the rest of it, where the layout allows that; see
        `read_window`.

    Examples
    --------
    >>> from celltyper.datasets import open_dataset
    >>> data = open_dataset("my-cells")                       # doctest: +SKIP
    >>> data.classes, len(data), data[0].image.shape          # doctest: +SKIP
    (('tumour', 'immune'), 12, (1000, 1000, 3))
    """

    name: str
    path: Path
    classes: tuple[str, ...]
    mpp: float | None
    names: tuple[str, ...]
    groups: Mapping[str, str]
    read: Callable[[str], Sample]
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    colors: tuple[str, ...] = ()
    domains: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    window: WindowReader | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | str) -> Sample:
        """Sample by position or by name."""
        if isinstance(index, str):
            if index not in self.groups or index not in self.names:
                raise DataError(f"{self.path}: no image {index!r} in this dataset")
            return self.read(index)
        return self.read(self.names[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(name) for name in self.names)

    def read_window(self, name: str, row: int, col: int, height: int, width: int) -> Window:
        """Read a rectangle of a sample; from a store, only that is decoded.

        Parameters
        ----------
        name : str
            Sample.
        row, col : int
            Upper left pixel.
        height, width : int
            Size in pixels.

        Returns
        -------
        Window
            ``image`` (height, width, 3) uint8 and ``labels`` (height, width) int32 of its own.

        Raises
        ------
        DataError
            If there is no such sample, or the rectangle is empty or leaves the image.
        """
        if name not in self.groups:
            raise DataError(f"{self.path}: no image {name!r} in this dataset")
        if self.window is not None:
            return self.window(name, row, col, height, width)
        sample = self.read(name)
        check_window((self.path, name), sample.labels.shape, row, col, height, width)
        part = np.s_[row : row + height, col : col + width]
        return Window(sample.image[part].copy(), sample.labels[part].copy())

    def subset(self, names: Iterable[str], name: str | None = None) -> Dataset:
        """Return the dataset restricted to some samples.

        Parameters
        ----------
        names : iterable of str
            Sample names, kept in the given order.
        name : str, optional
            Name of the part.

        Returns
        -------
        Dataset
            Same classes, colors and resolution; splits are dropped.

        Raises
        ------
        DataError
            If a name is not in the dataset.
        """
        names = tuple(names)
        known = set(self.names)
        missing = [n for n in names if n not in known]
        if missing:
            raise DataError(f"{self.path}: no image named {listing(missing)} in this dataset")
        groups = {n: self.groups[n] for n in names}
        domains = {a: {n: v[n] for n in names} for a, v in self.domains.items()}
        return replace(
            self, name=name or self.name, names=names, groups=groups, splits={}, domains=domains
        )


def check_window(
    where: tuple[Path, str], shape: Sequence[int], row: int, col: int, height: int, width: int
) -> None:
    """Refuse a rectangle that is empty or leaves the image.

    Parameters
    ----------
    where : (Path, str)
        Dataset and image, for the message.
    shape : sequence of int
        Height and width of the image come first.
    row, col, height, width : int
        The rectangle.

    Raises
    ------
    DataError
        Saying both.
    """
    inside = 0 <= row <= shape[0] - height and 0 <= col <= shape[1] - width
    if not inside or height < 1 or width < 1:
        raise DataError(
            f"{where[0]}, image {where[1]!r}: the window of {height} x {width} px at row {row}, "
            f"column {col} is not inside the image of {shape[0]} x {shape[1]} px"
        )


def listing(items: Iterable[object], limit: int = 5) -> str:
    """Render items for a one-line message, at most `limit` of them.

    Parameters
    ----------
    items : iterable of object
        What to list.
    limit : int
        How many are spelled out.

    Returns
    -------
    str
        Such as ``"'a', 'b' and 3 more"``.
    """
    items = list(items)
    text = ", ".join(repr(i) if isinstance(i, str) else str(i) for i in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"
