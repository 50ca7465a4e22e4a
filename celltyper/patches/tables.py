"""A CSV with images: one row a patch, or a point of a field or slide.

::

    cells/
      patches.csv          filename,label,slide,tumortype,split
      a.png b.png          here, in images/, or where 'images' says

    midog/
      midog.csv            x,y,label,filename,slide,split,tumortype
      001.tiff 002.tiff

Columns may be in any order and case. The file is one of ``path``, ``filename``, ``file``,
``image``, ``slide``, or of a patch ``patch``, ``dataset_uid``, ``image_id``: the first whose files
are there. ``x, y`` are the centre of the window in pixels of that image; beside a file of a patch
they are not read. The class is ``label``, ``class``, ``final_label`` or ``majority``, a name, or
a number with the classes given in ascending order of the numbers; empty where unknown. The group
is ``group``, ``patient``, ``case`` or ``slide``, with ``dataset`` before it, the domain ``domain``,
``tumortype``, ``dataset`` or ``scanner``. ``split`` is the published part, or ``fold`` if there is
no split. ``expert1_<class>`` (true or false) and ``Expert_1`` (the class) are experts' votes.

Instead of one table there may be one for every slide, ``<slide>.csv`` with ``x,y,label`` beside
``<slide>.svs``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from celltyper.datasets.dataset import listing
from celltyper.errors import DataError
from celltyper.patches.columns import (
    DOMAIN_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    PATCH_COLUMNS,
    X_COLUMNS,
    Y_COLUMNS,
    Sheet,
    coordinates,
    expert_votes,
    read_sheet,
    slide_groups,
    splits,
)
from celltyper.patches.sources import find_image, find_images, image_folders
from celltyper.patches.table import Patch, PatchTable, build_table

logger = logging.getLogger(__name__)


def read_csv(
    path: Path,
    *,
    classes: Sequence[str] | None = None,
    images: Path | None = None,
    mpp: float | None = None,
    groups: str | None = None,
    domains: str | None = None,
    pixels: bool = True,
    labels: bool = True,
) -> PatchTable:
    """Read a table of patches, or of points; see the top of this file.

    Parameters
    ----------
    path : Path
        CSV file, or a folder with one such file or with one for every slide.
    classes : sequence of str, optional
        As in `celltyper.patches.table.build_table`; needed where there is no column of labels.
    images : Path, optional
        Folder of the images; without it, that of the CSV, or ``images/`` there.
    mpp : float, optional
        Micrometres per pixel of the images.
    groups, domains : str, optional
        Columns of the slide or patient, and of the domain.
    pixels : bool
        Whether the images must be there.
    labels : bool
        Whether to read labels and votes, if there are any; without, every class is unknown.

    Returns
    -------
    PatchTable
        Patches are named by file, points ``<file>:<x>:<y>``. The group of points without a
        column for it is their image; patches without are a group each, which is said in a warning.

    Raises
    ------
    DataError
        Naming file, row or column and what to do.
    """
    asked = _Asked(tuple(classes or ()), images, groups, domains, pixels, labels)
    files = _sheets(path)
    rows: list[Patch] = []
    for file in files:
        where = "row" if len(files) == 1 else f"{file.name} row"
        rows += _patches(read_sheet(file), where, asked)
    return build_table(path, rows, classes=classes, mpp=mpp)


class _Asked(NamedTuple):
    classes: tuple[str, ...]
    images: Path | None
    groups: str | None
    domains: str | None
    pixels: bool
    labels: bool


def tables_in(folder: Path) -> list[Path]:
    """CSV files of a folder that list patches or points, sorted.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    list of Path
        With a column that may name files, or with x and y.
    """
    return [f for f in sorted(folder.glob("*.csv")) if not f.name.startswith(".") and _lists(f)]


def _lists(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.readline(4096).decode("utf-8-sig", "replace")
    # Columns parted by semicolons are known too, so that reading can say what to do about them.
    columns = {c.strip().strip('"').strip().lower() for c in re.split("[,;\t]", head)}
    places = columns & set(X_COLUMNS) and columns & set(Y_COLUMNS)
    return bool(places or columns & {*PATCH_COLUMNS, *IMAGE_COLUMNS})


def _sheets(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = tables_in(path)
    if not found:
        raise DataError(
            f"{path}: no CSV with a column such as filename in it, or with x and y (found: "
            f"{listing(sorted(f.name for f in path.glob('*.csv'))) or 'no CSV'})"
        )
    if len(found) > 1 and any(_own_slide(read_sheet(f)) is None for f in found):
        raise DataError(
            f"{path}: {listing(f.name for f in found)} list files; name the one to read"
        )
    return found


def _own_slide(sheet: Sheet) -> str | None:
    """Slide of a table that names none, by its own name."""
    names = sheet.first_of((*PATCH_COLUMNS, *IMAGE_COLUMNS))
    places = sheet.first_of(X_COLUMNS) and sheet.first_of(Y_COLUMNS)
    return sheet.path.stem if places and names is None else None


def _patches(sheet: Sheet, where: str, asked: _Asked) -> list[Patch]:
    slide = _own_slide(sheet)
    column = None if slide else _file_column(sheet, asked.images)
    names = [slide] * len(sheet.rows) if slide else sheet.values(column)
    empty = next((i for i, name in enumerate(names, start=1) if not name), None)
    if empty:
        raise DataError(f"{sheet.path}: row {empty}: no {column}; name its file, or remove the row")
    files = find_images(sheet.path, names, asked.images, pixels=asked.pixels)
    places = None if column in PATCH_COLUMNS else coordinates(sheet)
    owners = slide_groups(sheet, asked.groups)
    if owners is None and column in PATCH_COLUMNS and "filename" in sheet.rows[0]:
        owners = sheet.values("filename")  # the slide's, since another column names the patches
    if owners is None and places is None and asked.labels:
        warn_no_groups(sheet.path)
    labels = sheet.values(sheet.first_of(LABEL_COLUMNS) if asked.labels else None)
    kinds = sorted({*labels, *asked.classes} - {""})
    columns = zip(
        names,
        labels,
        expert_votes(sheet, kinds) if asked.labels else [()] * len(names),
        owners or [""] * len(names),
        sheet.values(sheet.chosen(asked.domains, DOMAIN_COLUMNS)),
        splits(sheet),
        strict=True,
    )
    rows = [
        Patch(name, files[name], f"{where} {i}", *rest)
        for i, (name, *rest) in enumerate(columns, start=1)
    ]
    if places is None:
        return rows
    return [
        p._replace(name=f"{p.name}:{x:.10g}:{y:.10g}", group=p.group or p.name, x=x, y=y)
        for p, (x, y) in zip(rows, places, strict=True)
    ]


def warn_no_groups(path: Path) -> None:
    """Say that patients cannot be kept apart.

    Parameters
    ----------
    path : Path
        Of the patches.
    """
    logger.warning(
        "%s: no slides or patients are stated, so every patch is a group of its own: patches of "
        "one patient may lie on both sides of a split",
        path,
    )


def _file_column(sheet: Sheet, images: Path | None) -> str:
    """Column that names the files: the one of most that are there, or else the first."""
    candidates = [c for c in (*IMAGE_COLUMNS, *PATCH_COLUMNS) if c in sheet.rows[0]]
    if not candidates:
        raise DataError(
            f"{sheet.path}: no column names the files; expected one of {', '.join(IMAGE_COLUMNS)} "
            f"(columns: {', '.join(sheet.rows[0])})"
        )
    folders = image_folders(sheet.path, images)

    def there(column: str) -> int:
        names = set(sheet.values(column)) - {""}
        # Of thousands of names, some are enough to tell patches from slides.
        return sum(find_image(n, folders) is not None for n in sorted(names)[:50])

    return max(candidates, key=there)
