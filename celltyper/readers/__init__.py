"""Readers of annotated images, one file a layout, and one door to them all."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.merging import merge_parts
from celltyper.datasets.store import Source
from celltyper.datasets.taxonomy import Taxonomy, apply_taxonomy, read_taxonomy
from celltyper.errors import ConfigError, DataError, unknown_name
from celltyper.types import Sample

READERS = (
    "store",
    "folder",
    "masks",
    "lizard",
    "conic",
    "consep",
    "pannuke",
    "pathocell",
    "arctique",
    "monuseg",
    "monusac",
    "dsb2018",
    "nuinsseg",
    "qupath",
    "points",
)
"""Readers by name, each the module of that name with ``TREE``, ``recognises``, ``read_<name>``."""

PARTS = ("train", "val", "valid", "test")
"""Subfolders that make up one dataset, each a split."""


def open_dataset(
    path: str | Path,
    split: str | None = None,
    reader: str = "auto",
    taxonomy: str | Path | Taxonomy | None = None,
) -> Dataset:
    """Open a dataset, whatever its layout.

    Parameters
    ----------
    path : str or Path
        Folder of the dataset.
    split : str, optional
        Open only this split of the dataset, or else the subfolder of this name.
    reader : str
        Name in `READERS`, or ``"auto"``: that of the one layout that is recognised.
    taxonomy : str or Path or Taxonomy, optional
        Merges and renames classes, see `celltyper.datasets.taxonomy`.

    Returns
    -------
    Dataset
        Samples are read on access.

    Raises
    ------
    DataError
        If the folder is missing, of no known layout or of several, has no such split, or its
        classes do not fit the taxonomy.
    ConfigError
        If the reader is unknown.
    """
    path = Path(path)
    _check_reader(reader)
    _check_folder(path)
    if split and _is_parent_of(path, split):
        return open_dataset(path / split, reader=reader, taxonomy=taxonomy)
    dataset = _read(path, recognise(path) if reader == "auto" else reader)
    if taxonomy is not None:
        rules = taxonomy if isinstance(taxonomy, Taxonomy) else read_taxonomy(taxonomy)
        dataset = apply_taxonomy(dataset, rules)
    if split is None:
        return dataset
    if split not in dataset.splits:
        known = ", ".join(dataset.splits) or "none"
        raise DataError(f"{path}: no split {split!r} (its splits: {known})")
    return dataset.subset(dataset.splits[split], f"{dataset.name} {split}")


def open_sources(
    paths: Sequence[Path],
    reader: str = "auto",
    taxonomy: str | Path | None = None,
    mpp: float | None = None,
) -> list[Source]:
    """Open datasets that are to be stored together.

    Parameters
    ----------
    paths : sequence of Path
        Folders.
    reader : str
        As in `open_dataset`, of all.
    taxonomy : str or Path, optional
        A class that it lists must be in one of the datasets.
    mpp : float, optional
        Micrometres per pixel of all images, whatever the datasets say.

    Returns
    -------
    list of Source
        In the order of the paths.

    Raises
    ------
    DataError, ConfigError
        As `open_dataset`.
    """
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise ConfigError(f"mpp must be positive, got {mpp}")
    opened = [open_parts(path, reader) for path in paths]
    datasets = [dataset for dataset, _ in opened]
    if taxonomy is not None:
        rules = read_taxonomy(taxonomy)
        datasets = [apply_taxonomy(data, rules, together=datasets) for data in datasets]
    if mpp is not None:
        datasets = [
            replace(data, mpp=mpp, read=partial(_read_at, read=data.read, mpp=mpp))
            for data in datasets
        ]
    return [Source(data, layout) for data, (_, layout) in zip(datasets, opened, strict=True)]


def _read_at(name: str, read: Callable[[str], Sample], mpp: float) -> Sample:
    return replace(read(name), mpp=mpp)


def open_parts(
    path: str | Path, reader: str = "auto", taxonomy: str | Path | None = None
) -> tuple[Dataset, str]:
    """Open a dataset, or a folder whose subfolders ``train``, ``val`` or ``test`` are one each.

    Parameters
    ----------
    path : str or Path
        Folder.
    reader : str
        As in `open_dataset`.
    taxonomy : str or Path, optional
        As in `open_dataset`.

    Returns
    -------
    dataset : Dataset
        Parts are its splits; a group on both sides is left in, for `celltyper.datasets.checking`
        to find.
    layout : str
        Name in `READERS`.

    Raises
    ------
    DataError, ConfigError
        As `open_dataset`.
    """
    path = Path(path)
    _check_reader(reader)
    inner = [path / part for part in PARTS if (path / part).is_dir()]
    if reader == "auto" and inner and not _recognised(path):
        layouts = {part.name: recognise(part) for part in inner}
        parts = {part.name: _read(part, layouts[part.name]) for part in inner}
        dataset = merge_parts(parts, path)
        layout = " and ".join(sorted(set(layouts.values())))
    else:
        layout = recognise(path) if reader == "auto" else reader
        dataset = open_dataset(path, reader=layout)
    if taxonomy is not None:
        dataset = apply_taxonomy(dataset, read_taxonomy(taxonomy))
    return dataset, layout


def recognise(path: Path) -> str:
    """Name of the one reader that recognises a folder.

    Parameters
    ----------
    path : Path
        Folder.

    Returns
    -------
    str
        Name in `READERS`.

    Raises
    ------
    DataError
        If none does, or several do.
    """
    _check_folder(path)
    found = _recognised(path)
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{path}: may be read as {' or '.join(found)}; say which with the reader of that name "
            f"({_trees(found)})"
        )
    names = sorted(f.name + "/" * f.is_dir() for f in path.iterdir() if f.name[0] != ".")
    raise DataError(
        f"{path}: layout not recognised: found {listing(names) or 'nothing'}; expected {_trees()}"
    )


def holds_cells(path: Path) -> bool:
    """Whether a folder, or a part in it such as ``train``, is of a layout of annotated cells.

    Parameters
    ----------
    path : Path

    Returns
    -------
    bool
        True also if several layouts fit.
    """
    folders = [path, *(path / part for part in PARTS)]
    return any(_recognised(folder) for folder in folders if folder.is_dir())


def _check_folder(path: Path) -> None:
    if path.is_file():
        raise DataError(f"{path}: a file; give the folder of the dataset")
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")


def _check_reader(reader: str) -> None:
    if reader != "auto" and reader not in READERS:
        raise unknown_name("reader", reader, ["auto", *READERS])


def _recognised(path: Path) -> list[str]:
    # A store says what it is, and has too many folders to look through for other layouts.
    if _module("store").recognises(path):
        return ["store"]
    return [name for name in READERS if _module(name).recognises(path)]


def _read(path: Path, reader: str) -> Dataset:
    dataset: Dataset = getattr(_module(reader), f"read_{reader}")(path)
    return dataset


def _is_parent_of(path: Path, split: str) -> bool:
    return (path / split).is_dir() and not _recognised(path)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def _trees(names: list[str] | tuple[str, ...] = READERS) -> str:
    return "one of " + "; ".join(f"{name}: {_module(name).TREE}" for name in names)
