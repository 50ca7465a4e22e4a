"""PathoCell: H&E fields of colorectal cancer typed by 56-plex imaging, of PathoCellBench.

::

    PathoCell/
      reg006_A.hdf          'img' H&E, 'gt_inst' nuclei, 'gt_ct' types; 'ifl' is not looked at
      split.csv             optional: sample_name,train_test_val_split and other columns

Published with doi:10.1007/978-3-032-04981-0_39; the imaging is that of
doi:10.1016/j.cell.2020.07.005.
"""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import IMAGE_SUFFIXES, as_labels
from celltyper.errors import DataError
from celltyper.readers.arrays import (
    as_integers,
    as_rgb,
    import_h5py,
    phenotypes_of_pixels,
    unreadable,
)
from celltyper.readers.files import files_below, read_table, wrong_layout
from celltyper.readers.meta import check_splits
from celltyper.readers.tree import folders_below
from celltyper.types import UNKNOWN, Image, Labels, Sample

TREE = (
    "one HDF5 file a field (.hdf, .h5, .hdf5) with 'img', 'gt_inst' and 'gt_ct' and, optionally, "
    "CSV files with sample_name and train_test_val_split"
)
SUFFIXES = (".hdf", ".h5", ".hdf5", ".he5")
KEYS = ("img", "gt_inst", "gt_ct")
CLASSES = (
    "B",
    "macrophage/monocyte",
    "adipocyte",
    "dendritic",
    "T",
    "granulocyte",
    "NK",
    "nerve",
    "plasma",
    "smooth muscle",
    "stroma",
    "tumour",
    "vasculature/lymphatics",
    "other",
)
TYPES = (
    ("B cells", "B"),
    ("CD11b+ monocytes", "macrophage/monocyte"),
    ("CD11b+CD68+ macrophages", "macrophage/monocyte"),
    ("CD11c+ DCs", "dendritic"),
    ("CD163+ macrophages", "macrophage/monocyte"),
    ("CD3+ T", "T"),
    ("CD4+ T", "T"),
    ("CD4+ T CD45RO+", "T"),
    ("CD4+ T GATA3+", "T"),
    ("CD68+ macrophages", "macrophage/monocyte"),
    ("CD68+ macrophages GzmB+", "macrophage/monocyte"),
    ("CD68+CD163+ macrophages", "macrophage/monocyte"),
    ("CD8+ T", "T"),
    ("NK", "NK"),
    ("Tregs", "T"),
    ("adipocytes", "adipocyte"),
    ("dirt", ""),
    ("granulocytes", "granulocyte"),
    ("immune", "other"),
    ("immune/vasculature", "other"),
    ("lymphatics", "vasculature/lymphatics"),
    ("nerves", "nerve"),
    ("plasma", "plasma"),
    ("smooth muscle", "smooth muscle"),
    ("stroma", "stroma"),
    ("tumour", "tumour"),
    ("tumour/immune", "other"),
    ("undefined", "other"),
    ("vasculature", "vasculature/lymphatics"),
)
"""Published types, id 1 first, and the class of `CLASSES` that each is merged into."""
DIRT = 17
FINE_CLASSES = tuple(name for name, merged in TYPES if merged)
_COLUMN = "train_test_val_split"


def recognises(path: Path) -> bool:
    """Whether there are HDF5 files with PathoCell's arrays.

    Without h5py, HDF5 files that no image lies beside will do, so that reading can say what is
    missing.
    """
    files = [
        folder / name
        for folder, names in folders_below(path, strict=False)
        for name in names
        if name.lower().endswith((*SUFFIXES, *IMAGE_SUFFIXES))
    ]
    fields = [f for f in files if f.suffix.lower() in SUFFIXES]
    if not fields or importlib.util.find_spec("h5py") is None:
        return bool(fields) and len(fields) == len(files)
    for file in fields[:5]:
        try:
            with import_h5py(file).File(file, "r") as opened:
                return set(KEYS) <= set(opened)
        except (OSError, RuntimeError, KeyError, ValueError):
            continue
    return False


def read_pathocell(path: str | Path, fine: bool = False) -> Dataset:
    """Open PathoCell; fields are read on access.

    Parameters
    ----------
    path : str or Path
        Folder with the HDF5 files and tables, each up to four levels down.
    fine : bool
        Keep the 28 published types of cells; by default they are merged to the 14 published
        classes.

    Returns
    -------
    Dataset
        14 classes (or 28), resolution unknown. Nuclei of type 17, dirt, are removed. A nucleus has
        the type of most of its pixels, or `UNKNOWN` if ``gt_ct`` is 0 on all of them. The group of
        ``reg006_A`` and ``reg006_B`` is ``reg006``, as in the published splits; another name is
        its own group. A table with ``sample_name`` and ``train_test_val_split`` gives the splits
        ``train``, ``valid`` and ``test``; several give ``<table>-train`` and so on, the
        folder of the table before it if it has one of its own. The other
        columns of tables with ``sample_name``, such as tumour type and stage, are domains; fields
        without a row have ``"unknown"``.

    Raises
    ------
    DataError
        At opening: no HDF5 file, h5py missing, a table that names another field or split, or one
        field twice. On access: an unreadable file, an array missing or of another size, a nucleus
        of a type outside 1..29.
    """
    path = Path(path)
    fields = files_below(path, SUFFIXES)
    if not fields:
        raise wrong_layout(path, "PathoCell", TREE)
    import_h5py(next(iter(fields.values())))
    groups = {name: _group_of(name) for name in fields}
    splits, domains = _read_tables(path, fields, groups)
    return Dataset(
        name="PathoCell",
        path=path,
        classes=FINE_CLASSES if fine else CLASSES,
        mpp=None,
        names=tuple(fields),
        groups=groups,
        read=partial(_read_sample, fields=fields, fine=fine),
        splits=splits,
        domains=domains,
    )


def _group_of(name: str) -> str:
    region = re.fullmatch(r"(reg\d+)_[A-Z]", name)
    return region[1] if region else name


def _read_tables(
    path: Path, fields: dict[str, Path], groups: dict[str, str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, dict[str, str]]]:
    tables = {}
    files = [f / n for f, names in folders_below(path) for n in names if n.lower()[-4:] == ".csv"]
    for file in files:
        listed = read_table(file)
        if listed and "sample_name" in listed[0]:
            tables[file] = _by_field(file, listed, fields)
    splits: dict[str, tuple[str, ...]] = {}
    domains: dict[str, dict[str, str]] = {}
    several = sum(_COLUMN in next(iter(rows.values())) for rows in tables.values()) > 1
    for file, rows in tables.items():
        ours: dict[str, tuple[str, ...]] = {}
        for name, row in rows.items():
            for column, value in row.items():
                if column == _COLUMN:
                    if value not in ("train", "valid", "test"):
                        raise DataError(
                            f"{file}: field {name!r} is in split {value!r}; splits are train, "
                            "valid and test"
                        )
                    ours[value] = (*ours.get(value, ()), name)
                elif column not in ("", "sample_name") and not column.startswith("Unnamed"):
                    values = domains.setdefault(column, dict.fromkeys(fields, "unknown"))
                    if values[name] not in ("unknown", value):
                        raise DataError(
                            f"{file}: {column} of {name!r} is {value!r}, but {values[name]!r} in "
                            "another table"
                        )
                    values[name] = value or "unknown"
        check_splits(file, ours, groups)
        prefix = "-".join((*file.relative_to(path).parent.parts, file.stem, "")) if several else ""
        splits |= {prefix + split: ours[split] for split in ours}
    return splits, domains


def _by_field(
    file: Path, rows: list[dict[str, str]], fields: dict[str, Path]
) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    names = {f.name: stem for stem, f in fields.items()} | {stem: stem for stem in fields}
    for row in rows:
        name = names.get(row["sample_name"])
        if name is None:
            raise DataError(f"{file}: no field {row['sample_name']!r} in {file.parent}")
        if name in found:
            raise DataError(f"{file}: field {name!r} is listed twice")
        found[name] = row
    return found


def _read_sample(name: str, fields: dict[str, Path], fine: bool) -> Sample:
    file = fields[name]
    raw = _read_arrays(file)
    labels = as_labels(as_integers(_map(raw["gt_inst"]), f"{file}: 'gt_inst'"), file)
    types = as_integers(_map(raw["gt_ct"]), f"{file}: 'gt_ct'")
    image = _image(raw["img"], labels, file)
    found = phenotypes_of_pixels(labels, types, [n for n, _ in TYPES], file, unknown=True)
    labels[found[labels] == DIRT] = 0
    table = _classes(fine)[found[: int(labels.max(initial=0)) + 1]]
    return Sample(image, labels, table, name, _group_of(name), None)


def _classes(fine: bool) -> NDArray[np.uint8]:
    """Class by published type; dirt is background."""
    table = np.zeros(256, np.uint8)
    for kind, (name, merged) in enumerate(TYPES, start=1):
        if merged:
            table[kind] = 1 + (FINE_CLASSES.index(name) if fine else CLASSES.index(merged))
    table[UNKNOWN] = UNKNOWN
    return table


def _read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    h5py = import_h5py(file)
    try:
        with h5py.File(file, "r") as opened:
            missing = [k for k in KEYS if not isinstance(opened.get(k), h5py.Dataset)]
            if missing:
                raise DataError(
                    f"{file}: no array {listing(missing)} in it (found "
                    f"{listing(sorted(opened)) or 'none'})"
                )
            return {k: np.asarray(opened[k]) for k in KEYS}
    except DataError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise unreadable(file, error) from None


def _map(raw: NDArray[Any]) -> NDArray[Any]:
    """Map without the axes of length one in front and behind."""
    while raw.ndim > 2 and raw.shape[0] == 1:
        raw = raw[0]
    return raw[..., 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw


def _image(raw: NDArray[Any], labels: Labels, file: Path) -> Image:
    shape = raw.shape
    while raw.ndim > 3 and raw.shape[0] == 1:
        raw = raw[0]
    for last in (raw, np.moveaxis(raw, 0, -1) if raw.ndim == 3 else raw):
        if last.shape == (*labels.shape, 3):
            return as_rgb(last, f"{file}: 'img'")
    raise DataError(
        f"{file}: 'gt_inst' is {labels.shape}, but 'img' {shape}; both must have the same height "
        "and width, and 'img' three colors"
    )
