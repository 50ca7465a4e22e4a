"""What the columns of a patch table say: files, places, classes, slides and experts' votes."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from celltyper.datasets.dataset import listing
from celltyper.errors import DataError
from celltyper.patches.table import nearest
from celltyper.readers.files import read_table

PATCH_COLUMNS = ("patch", "dataset_uid", "image_id")
"""Name the file of a patch; x and y beside them are of the slide that it was cut from."""
IMAGE_COLUMNS = ("path", "filename", "file", "file_name", "image", "slide", "wsi")
"""Name the image that x and y lie in, or, without these, the file of a patch."""
X_COLUMNS = ("x", "coordinatex", "center_x")
Y_COLUMNS = ("y", "coordinatey", "center_y")
LABEL_COLUMNS = ("label", "class", "final_label", "majority", "majority_vote", "consensus")
GROUP_COLUMNS = ("group", "patient", "patient_id", "case", "case_id", "slide", "slide_id", "wsi")
DOMAIN_COLUMNS = (
    *("domain", "tumortype", "tumor_type", "tumourtype", "tumour_type", "tumor", "tumour"),
    *("dataset", "centre", "center", "scanner"),
)

_EXPERT = re.compile(r"(?:expert|rater|annotator|pathologist)[ _-]?\d+(?:[ _-](?P<kind>.+))?")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Sheet:
    """A CSV with its columns in lower case.

    Parameters
    ----------
    path : Path
    rows : list of dict
        Values by column; row i is line i + 2 of a file without quoted line breaks.
    """

    path: Path
    rows: list[dict[str, str]]

    def first_of(self, names: Iterable[str]) -> str | None:
        """First of the columns that is there, or None."""
        return next((n for n in names if n in self.rows[0]), None)

    def values(self, column: str | None) -> list[str]:
        """Values of a column, one a row; empty if the column is None."""
        return [row[column] if column else "" for row in self.rows]

    def chosen(self, asked: str | None, usual: Iterable[str]) -> str | None:
        """Column that was asked for, or else the first of the usual ones that is there.

        Raises
        ------
        DataError
            If the one asked for is not there.
        """
        if asked is None:
            return self.first_of(usual)
        if asked.lower() not in self.rows[0]:
            raise DataError(
                f"{self.path}: no column {asked!r}{nearest(asked, self.rows[0])} "
                f"(columns: {', '.join(self.rows[0])})"
            )
        return asked.lower()


def read_sheet(path: Path) -> Sheet:
    """Read a CSV with a header and at least one row.

    Parameters
    ----------
    path : Path
        As in `celltyper.readers.files.read_table`.

    Returns
    -------
    Sheet

    Raises
    ------
    DataError
        If it cannot be read or holds no row.
    """
    rows = [{k.strip().lower(): v for k, v in row.items()} for row in read_table(path)]
    if not rows:
        raise DataError(f"{path}: a header and no rows")
    return Sheet(path, rows)


def coordinates(sheet: Sheet) -> list[tuple[float, float]] | None:
    """Places of all rows, x and y.

    Parameters
    ----------
    sheet : Sheet

    Returns
    -------
    list of (float, float) or None
        None if the table has no x or no y.

    Raises
    ------
    DataError
        If a value is no finite number, naming the row.
    """
    columns = sheet.first_of(X_COLUMNS), sheet.first_of(Y_COLUMNS)
    if None in columns:
        return None
    found = []
    for i, pair in enumerate(zip(*map(sheet.values, columns), strict=True), start=1):
        try:
            x, y = map(float, pair)
        except ValueError:
            x = y = math.nan
        if not (math.isfinite(x) and math.isfinite(y)):
            raise DataError(
                f"{sheet.path}: row {i}: x {pair[0]!r} and y {pair[1]!r} must be numbers of pixels"
            )
        found.append((x, y))
    return found


def slide_groups(sheet: Sheet, asked: str | None) -> list[str] | None:
    """Slide or patient of every row.

    Parameters
    ----------
    sheet : Sheet
    asked : str or None
        Column that says it; else the first of `GROUP_COLUMNS`.

    Returns
    -------
    list of str or None
        ``"<dataset>/<slide>"`` where there is a column ``dataset`` too, since two data sets may
        give a slide the same name. Empty where not stated; None if there is no such column.
    """
    column = sheet.chosen(asked, GROUP_COLUMNS)
    if column is None:
        return None
    names = sheet.values(column)
    if column == "dataset" or "dataset" not in sheet.rows[0]:
        return names
    return [
        f"{d}/{n}" if d and n else n for d, n in zip(sheet.values("dataset"), names, strict=True)
    ]


def splits(sheet: Sheet) -> list[str]:
    """Published part of every row: its ``split``, or, without that column, ``fold<fold>``."""
    if "split" in sheet.rows[0]:
        return sheet.values("split")
    column = sheet.first_of(("fold",))
    return [f"fold{value}" if value else "" for value in sheet.values(column)]


def expert_votes(
    sheet: Sheet, classes: Sequence[str], meaning: dict[str, str] | None = None
) -> list[tuple[str, ...]]:
    """Class that each expert chose, row by row.

    Parameters
    ----------
    sheet : Sheet
        Columns such as ``expert1_atypical`` with true or false, where the class is in the name,
        or ``Expert_1`` with the class as the value. Others of the experts are passed over: a phase
        of mitosis, say.
    classes : sequence of str
        All that there are.
    meaning : dict of str to str, optional
        Class by value of the second kind of columns, for values that are not names of classes.

    Returns
    -------
    list of tuple of str
        Empty where an expert has said nothing.

    Raises
    ------
    DataError
        If a value is neither, or false could be any of several classes.
    """
    by_case = {c.casefold(): c for c in classes}
    columns = []
    for name in sheet.rows[0]:
        match = _EXPERT.fullmatch(name)
        if match and (match["kind"] is None or match["kind"] in by_case):
            columns.append(_chosen(sheet, name, match["kind"], by_case, meaning or {}))
    return list(zip(*columns, strict=True)) if columns else [()] * len(sheet.rows)


def _chosen(
    sheet: Sheet, column: str, kind: str | None, by_case: dict[str, str], meaning: dict[str, str]
) -> list[str]:
    """What one expert says of every row."""
    known = dict(by_case)
    if kind is None:
        known |= {value.casefold(): c for value, c in meaning.items()}
    else:
        others = [c for case, c in by_case.items() if case != kind]
        if len(others) != 1:
            raise DataError(
                f"{sheet.path}: column {column!r} says true or false, but there are "
                f"{len(by_case)} classes ({listing(by_case.values())}); name the class instead"
            )
        known = {w: by_case[kind] if true else others[0] for w, true in _TRUTH.items()}
    chosen = []
    for i, value in enumerate(sheet.values(column), start=1):
        if value and value.casefold() not in known:
            raise DataError(
                f"{sheet.path}: row {i}: {column} is {value!r}; expected {listing(known)}"
            )
        chosen.append(known[value.casefold()] if value else "")
    return chosen


def meaning_of(
    path: Path, column: str, pairs: Iterable[tuple[str, str]], classes: Collection[str]
) -> dict[str, str]:
    """Class of every value of a column, by the folders that its files lie in.

    Parameters
    ----------
    path : Path
        The table, for the message.
    column : str
    pairs : iterable of (str, str)
        Value and folder, file by file.
    classes : collection of str
        Names of all folders.

    Returns
    -------
    dict of str to str
        A value that is the name of a folder means that folder, in any case; another one, such as
        ``AMF``, the folder that holds most of its files.

    Raises
    ------
    DataError
        If two values mean one folder.
    """
    by_case = {c.casefold(): c for c in classes}
    lying: dict[str, Counter[str]] = defaultdict(Counter)
    for value, folder in pairs:
        if value:
            lying[value][folder] += 1
    meaning = {
        value: by_case.get(value.casefold()) or where.most_common(1)[0][0]
        for value, where in lying.items()
    }
    owner: dict[str, str] = {}
    for value, kind in meaning.items():
        other = owner.setdefault(kind, value)
        if other.casefold() != value.casefold():
            raise DataError(
                f"{path}: {column} is {other!r} and {value!r} for files in {kind}/; correct the "
                "table or the folders, or move the table elsewhere"
            )
    return meaning
