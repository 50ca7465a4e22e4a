"""Readers of annotated images, one file a layout, and one door to them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from celltyper.datasets.dataset import Dataset
from celltyper.errors import DataError, unknown_name
from celltyper.readers.folder import FOLDER_TREE, read_folder
from celltyper.readers.masks import MASKS_TREE, read_masks

READERS: dict[str, Callable[[str | Path], Dataset]] = {"folder": read_folder, "masks": read_masks}
"""Readers by name."""


def open_dataset(path: str | Path, split: str | None = None, reader: str = "auto") -> Dataset:
    """Open a dataset, whatever its layout.

    Parameters
    ----------
    path : str or Path
        Folder of the dataset.
    split : str, optional
        Open only this split of ``meta.json``, or else the subfolder of this name.
    reader : str
        Name in `READERS`, or ``"auto"``: ``labels/`` beside ``images/`` is a plain folder,
        ``masks/`` is instance masks.

    Returns
    -------
    Dataset
        Samples are read on access.

    Raises
    ------
    DataError
        If the folder is missing, of no known layout, or has no such split.
    ConfigError
        If the reader is unknown.
    """
    path = Path(path)
    if reader != "auto" and reader not in READERS:
        raise unknown_name("reader", reader, ["auto", *READERS])
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; a dataset is a folder, {_trees()}")
    inner = path / split if split else path
    if split and not (path / "images").is_dir() and inner.is_dir():
        return open_dataset(inner, reader=reader)
    dataset = READERS[_recognise(path) if reader == "auto" else reader](path)
    if split is None:
        return dataset
    if split not in dataset.splits:
        known = ", ".join(dataset.splits) or "none"
        raise DataError(f"{path}: no split {split!r} (splits in meta.json: {known})")
    return dataset.subset(dataset.splits[split], f"{dataset.name} {split}")


def _recognise(path: Path) -> str:
    if (path / "images").is_dir():
        found = [n for n, d in (("folder", "labels"), ("masks", "masks")) if (path / d).is_dir()]
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(
                f"{path}: has both labels/ and masks/; say which to read with reader 'folder' or "
                "'masks'"
            )
    raise DataError(f"{path}: layout not recognised; a dataset is a folder, {_trees()}")


def _trees() -> str:
    return f"either {FOLDER_TREE}, or {MASKS_TREE}"
