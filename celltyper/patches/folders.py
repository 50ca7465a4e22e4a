"""Class folders: one folder a class, one image a patch, and perhaps a table of slides and votes.

::

    ami-br/
      Atypical/ MIDOG21_7.png ...
      Normal/   MIDOG21_6.png ...
      ami-br.csv           optional: slide, dataset, x, y, votes; a column names the files

The classes may also be one level down, in ``train/``, ``val/`` and ``test/``, which are then the
splits. The table may list files that are not there; every file must be in it, and where it states
classes, they must be those of the folders. Without classes, images in the folder itself are
patches whose class is unknown, if the classes are given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from celltyper.datasets.dataset import listing
from celltyper.datasets.images import IMAGE_SUFFIXES
from celltyper.errors import DataError
from celltyper.patches.columns import (
    DOMAIN_COLUMNS,
    LABEL_COLUMNS,
    Sheet,
    expert_votes,
    meaning_of,
    read_sheet,
    slide_groups,
    splits,
)
from celltyper.patches.table import Patch, PatchTable, build_table, nearest
from celltyper.patches.tables import warn_no_groups
from celltyper.readers.tree import subfolders

logger = logging.getLogger(__name__)

PARTS = ("train", "val", "valid", "validation", "test")
"""Folders of class folders that are splits."""


def read_class_folders(
    path: Path,
    *,
    classes: Sequence[str] | None = None,
    mpp: float | None = None,
    groups: str | None = None,
    domains: str | None = None,
) -> PatchTable:
    """Read class folders; see the top of this file.

    Parameters
    ----------
    path : Path
        Folder of the class folders, or of ``train/`` and the like.
    classes : sequence of str, optional
        Names of the folders wanted, in order; without it, all, in alphabetical order.
    mpp : float, optional
        Micrometres per pixel of the patches.
    groups, domains : str, optional
        Columns of the table with the slide or patient, and with the domain.

    Returns
    -------
    PatchTable
        Named by file relative to `path`. Without a table every patch is a group of its own, which
        is said in a warning.

    Raises
    ------
    DataError
        If a class folder is missing (perhaps misspelt) or empty, or the table disagrees with the
        folders.
    """
    parts = [(f.name.lower(), f) for f in subfolders(path) if f.name.lower() in PARTS]
    rows: list[Patch] = []
    for split, folder in parts or [("", path)]:
        rows += _rows(path, folder, split, classes)
    found = _matching_table(path, rows)
    if found is None:
        if groups or domains:
            raise DataError(
                f"{path}: no table of the files in it, so no column {groups or domains!r}"
            )
        warn_no_groups(path)
    else:
        rows = _joined(path, rows, found, groups, domains)
    return build_table(path, rows, classes=classes, mpp=mpp)


def class_folders(path: Path) -> list[Path]:
    """Folders with images in them, sorted, below a folder or below ``train/`` and the like.

    Parameters
    ----------
    path : Path

    Returns
    -------
    list of Path
    """
    parts = [f for f in subfolders(path) if f.name.lower() in PARTS]
    return [f for part in parts or [path] for f in subfolders(part) if pictures(f)]


def pictures(folder: Path) -> list[Path]:
    """Images of a folder, sorted; hidden files are passed over.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    list of Path
    """
    return sorted(
        f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != "."
    )


def _rows(path: Path, folder: Path, split: str, classes: Sequence[str] | None) -> list[Patch]:
    inner = {f.name: f for f in subfolders(folder)}
    loose = pictures(folder)
    if not inner and loose and classes is not None:
        return [Patch(f.relative_to(path).as_posix(), f, "file", split=split) for f in loose]
    if loose:
        raise DataError(
            f"{folder}: {len(loose)} images beside the folders {listing(inner) or '(none)'}, such "
            f"as {loose[0].name!r}; every patch lies in the folder of its class"
        )
    for name in classes if classes is not None else ():
        if name not in inner:
            raise DataError(
                f"{folder}: no folder of class {name!r}{nearest(name, inner)} "
                f"(found: {listing(inner) or 'none'})"
            )
    rows = []
    for name, place in inner.items():
        files = pictures(place)
        if not files and (classes is None or name in classes):
            raise DataError(
                f"{place}: class folder without images ({', '.join(IMAGE_SUFFIXES)} directly in "
                "it); fill it, or remove it"
            )
        rows += [
            Patch(f.relative_to(path).as_posix(), f, "file", label=name, split=split) for f in files
        ]
    return rows


class _Found(NamedTuple):
    sheet: Sheet
    rows: dict[str, int]
    """Row of the table, by name of the patch."""


def _matching_table(path: Path, rows: list[Patch]) -> _Found | None:
    """The CSV of the folder that has a column with names of the files."""
    found = []
    for file in sorted(path.glob("*.csv")):
        if file.name.startswith("."):
            continue
        sheet = read_sheet(file)
        column, matched = _file_column(sheet, rows)
        if column is None:
            logger.warning("%s: no column holds names of the patches, so it is not used", file)
        else:
            found.append(_Found(sheet, _row_of_each(sheet, column, matched, rows)))
    if len(found) > 1:
        names = listing(f.sheet.path.name for f in found)
        raise DataError(f"{path}: {names} all list the patches; keep one of them here")
    return found[0] if found else None


def _keys(patch: Patch) -> tuple[str, ...]:
    """Ways in which a table may name a patch, the surest first."""
    return patch.name, patch.file.name, patch.file.stem


def _file_column(sheet: Sheet, rows: list[Patch]) -> tuple[str | None, int]:
    """Column of most names of patches, and by which of the `_keys`."""
    best: tuple[int, str | None, int] = (0, None, 0)
    for kind in range(3):
        names = {_keys(p)[kind] for p in rows}
        for column in sheet.rows[0]:
            count = len(names & set(sheet.values(column)))
            if count > best[0]:
                best = count, column, kind
    return best[1], best[2]


def _row_of_each(sheet: Sheet, column: str, kind: int, rows: list[Patch]) -> dict[str, int]:
    line: dict[str, int] = {}
    for i, value in enumerate(sheet.values(column)):
        if value and line.setdefault(value, i) != i:
            raise DataError(f"{sheet.path}: rows {line[value] + 1} and {i + 1} are both {value!r}")
    names = [_keys(p)[kind] for p in rows]
    absent = [p.name for p, name in zip(rows, names, strict=True) if name not in line]
    if absent:
        raise DataError(
            f"{sheet.path}: {len(absent):,} of {len(rows):,} patches are not in column {column!r}, "
            f"such as {absent[0]}; add their rows, or move the table elsewhere to do without it"
        )
    owner: dict[str, str] = {}
    for patch, name in zip(rows, names, strict=True):
        other = owner.setdefault(name, patch.name)
        if other != patch.name:
            raise DataError(
                f"{sheet.path}: {name!r} could be {other} or {patch.name}; write the folder too, "
                f"as {patch.name}"
            )
    return {p.name: line[name] for p, name in zip(rows, names, strict=True)}


def _joined(
    path: Path, rows: list[Patch], found: _Found, groups: str | None, domains: str | None
) -> list[Patch]:
    """Rows with what the table says of them."""
    sheet = found.sheet
    kinds = sorted({p.label for p in rows if p.label})
    meaning = _checked_labels(rows, found, kinds)
    votes = expert_votes(sheet, kinds, meaning)
    owners = slide_groups(sheet, groups)
    if owners is None:
        warn_no_groups(path)
    areas = sheet.values(sheet.chosen(domains, DOMAIN_COLUMNS))
    parts = splits(sheet)
    joined = []
    for patch in rows:
        i = found.rows[patch.name]
        joined.append(
            patch._replace(
                where=f"row {i + 1}",
                votes=votes[i],
                group=owners[i] if owners else "",
                domain=areas[i],
                split=patch.split or parts[i],
            )
        )
    return joined


def _checked_labels(rows: list[Patch], found: _Found, kinds: list[str]) -> dict[str, str]:
    """What the values of the column of labels mean; refuse a table that says other classes."""
    sheet = found.sheet
    column = sheet.first_of(LABEL_COLUMNS)
    if column is None or not kinds:
        return {}
    values = sheet.values(column)
    own = [(p, values[found.rows[p.name]]) for p in rows]
    meaning = meaning_of(sheet.path, column, ((v, p.label) for p, v in own), kinds)
    wrong = [(p, v) for p, v in own if v and meaning[v] != p.label]
    if wrong:
        patch, value = wrong[0]
        raise DataError(
            f"{sheet.path}: row {found.rows[patch.name] + 1}: {column} is {value!r}, but the file "
            f"is {patch.name} ({len(wrong):,} such rows); move the file, or correct the table"
        )
    return meaning
