"""Several datasets as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from celltyper.datasets.dataset import Dataset, Window
from celltyper.errors import DataError
from celltyper.types import Sample

UNSTATED = "unknown"
"""Value of a domain that a dataset does not state."""


@dataclass(frozen=True, eq=False)
class _Source:
    """Where a merged sample comes from."""

    dataset: Dataset
    name: str
    group: str


@dataclass(frozen=True, eq=False)
class _Merged:
    """Reads samples of several datasets under their new names."""

    sources: Mapping[str, _Source]

    def read(self, name: str) -> Sample:
        source = self.sources[name]
        sample = source.dataset.read(source.name)
        return replace(sample, name=name, group=source.group, mpp=sample.mpp or source.dataset.mpp)

    def window(self, name: str, row: int, col: int, height: int, width: int) -> Window:
        source = self.sources[name]
        return source.dataset.read_window(source.name, row, col, height, width)


def merge_datasets(datasets: Sequence[Dataset]) -> Dataset:
    """Put datasets of the same classes together.

    Parameters
    ----------
    datasets : sequence of Dataset
        At least one. If a sample name occurs in two, all names get the dataset's name in front
        (``lizard/dpath_1``); groups likewise.

    Returns
    -------
    Dataset
        Samples in the order given. Splits of the same name are one. Domain ``dataset`` says where
        a sample comes from; a domain that a dataset does not state is ``"unknown"`` there. ``mpp``
        is None if they differ; every sample has its own.

    Raises
    ------
    DataError
        If classes differ.
    """
    first = datasets[0]
    if len(datasets) == 1:
        return first
    for other in datasets[1:]:
        if other.classes != first.classes:
            raise DataError(
                f"classes of {first.path} ({', '.join(first.classes)}) and {other.path} "
                f"({', '.join(other.classes)}) differ; give a taxonomy that brings them together"
            )
    labels = _labels(datasets)
    names = _prefixes([data.names for data in datasets], labels)
    groups = _prefixes([set(data.groups.values()) for data in datasets], labels)
    merged = _merge(datasets, names, groups, "+".join(labels), first.path.parent)
    attributes = dict.fromkeys(a for data in datasets for a in data.domains)
    domains = {
        a: {
            new: data.domains.get(a, {}).get(old, UNSTATED)
            for data, new, old in _renamed(datasets, names)
        }
        for a in attributes
    }
    own = zip(labels, datasets, names, strict=True)
    domains["dataset"] = {p + old: label for label, data, p in own for old in data.names}
    splits: dict[str, tuple[str, ...]] = {}
    for data, prefix in zip(datasets, names, strict=True):
        for split, members in data.splits.items():
            splits[split] = (*splits.get(split, ()), *(prefix + m for m in members))
    return replace(merged, domains=domains, splits=splits)


def merge_parts(parts: Mapping[str, Dataset], path: Path) -> Dataset:
    """Put the parts of one dataset together, each a split.

    Parameters
    ----------
    parts : mapping of str to Dataset
        By the name of the split. If a sample name occurs in two, all names get that of their part
        in front; groups stay, so that one that is on both sides can be found.
    path : Path
        Folder of the parts.

    Returns
    -------
    Dataset
        Named after the folder.

    Raises
    ------
    DataError
        If classes differ.
    """
    datasets = list(parts.values())
    for split, other in parts.items():
        if other.classes != datasets[0].classes:
            raise DataError(
                f"{path}: classes of {next(iter(parts))} ({', '.join(datasets[0].classes)}) and "
                f"{split} ({', '.join(other.classes)}) differ"
            )
    names = _prefixes([data.names for data in datasets], list(parts))
    merged = _merge(datasets, names, [""] * len(datasets), path.resolve().name, path)
    splits = {
        split: tuple(prefix + name for name in data.names)
        for (split, data), prefix in zip(parts.items(), names, strict=True)
    }
    return replace(merged, splits=splits)


def _merge(
    datasets: Sequence[Dataset],
    names: Sequence[str],
    groups: Sequence[str],
    name: str,
    path: Path,
) -> Dataset:
    sources = {
        prefix + old: _Source(data, old, group + data.groups[old])
        for data, prefix, group in zip(datasets, names, groups, strict=True)
        for old in data.names
    }
    mpps = {data.mpp for data in datasets}
    reader = _Merged(sources)
    return Dataset(
        name=name,
        path=path,
        classes=datasets[0].classes,
        mpp=mpps.pop() if len(mpps) == 1 else None,
        names=tuple(sources),
        groups={new: source.group for new, source in sources.items()},
        read=reader.read,
        colors=next((data.colors for data in datasets if data.colors), ()),
        window=reader.window,
    )


def _renamed(
    datasets: Sequence[Dataset], prefixes: Sequence[str]
) -> Iterator[tuple[Dataset, str, str]]:
    for data, prefix in zip(datasets, prefixes, strict=True):
        for name in data.names:
            yield data, prefix + name, name


def _labels(datasets: Sequence[Dataset]) -> list[str]:
    """Short name of every dataset, each its own."""
    labels = [data.name.lower() for data in datasets]
    if len(set(labels)) < len(labels):
        labels = [data.path.resolve().name.lower() for data in datasets]
    if len(set(labels)) < len(labels):
        labels = [f"{label}-{i}" for i, label in enumerate(labels, start=1)]
    return labels


def _prefixes(members: Sequence[Sequence[str] | set[str]], labels: Sequence[str]) -> list[str]:
    """What to put in front of names so that none occurs twice: the labels, or nothing."""
    clash = len(set().union(*members)) < sum(map(len, members))
    return [f"{label}/" if clash else "" for label in labels]
