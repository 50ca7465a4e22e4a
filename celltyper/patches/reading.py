"""One door to all layouts of annotated patches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from celltyper.datasets.dataset import listing
from celltyper.errors import ConfigError, DataError, unknown_name
from celltyper.patches import ccmct, folders, midog, tables
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import check_centers
from celltyper.readers.meta import read_meta

READERS = {
    "folders": "class folders of images, perhaps with a CSV",
    "tables": "a CSV with images: a row a patch, or x and y on a field or slide",
    "midog": "COCO-like JSON of MIDOG, MIDOG++ and MIDOG 2025",
    "ccmct": "SQLite database of SlideRunner",
}
"""Readers of patches by name, and the layout of each."""


def open_patches(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    reader: str = "auto",
    images: str | Path | None = None,
    mpp: float | None = None,
    groups: str | None = None,
    domains: str | None = None,
    pixels: bool = True,
) -> PatchTable:
    """Open annotated patches, whatever their layout.

    Parameters
    ----------
    path : str or Path
        Folder, or the file of annotations: CSV, JSON or SQLite.
    classes : sequence of str, optional
        Classes wanted, in order. Patches of others are left out, which is said in a warning. Where
        labels are numbers, what they stand for, in ascending order; needed too where there are no
        labels. Without it, all that are found.
    reader : str
        Name in `READERS`, or ``"auto"``: that of the one layout that is recognised.
    images : str or Path, optional
        Folder of the images that a file of annotations names; without it, that of the file, or
        ``images/`` there.
    mpp : float, optional
        Micrometres per pixel of the images, whatever ``meta.json`` in the folder says; without
        both, every image has to state its own where a resolution is asked for.
    groups, domains : str, optional
        Column (of a CSV) or key (of the images of a JSON file) of the slide or patient, and of the
        domain; without them, the usual ones of the layout.
    pixels : bool
        Whether the images must be there, and points lie inside them; without it, the table can be
        looked at, but nothing read.

    Returns
    -------
    PatchTable

    Raises
    ------
    DataError
        If the path is missing, of no known layout or of several, or a reader refuses it, saying
        where and what to do.
    ConfigError
        If the reader is unknown, or an option does not go with it.

    Examples
    --------
    >>> from celltyper.patches.reading import open_patches
    >>> table = open_patches("ami-br", classes=("Normal", "Atypical"), mpp=0.25)  # doctest: +SKIP
    >>> len(table), len(set(table.groups))                                     # doctest: +SKIP
    (2894, 146)
    """
    path = Path(path)
    if reader != "auto" and reader not in READERS:
        raise unknown_name("reader of patches", reader, READERS)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    name = recognise(path) if reader == "auto" else reader
    file = _file_of(path, name)
    resolution = mpp or read_meta(path if path.is_dir() else path.parent).mpp
    place = Path(images) if images is not None else None
    if name == "folders":
        if place is not None:
            raise ConfigError(f"{path}: class folders hold their images; leave 'images' out")
        table = folders.read_class_folders(
            file, classes=classes, mpp=resolution, groups=groups, domains=domains
        )
    elif name == "ccmct":
        if groups or domains:
            raise ConfigError(
                f"{path}: a database of SlideRunner has slides as groups and no domains; leave "
                "'groups' and 'domains' out"
            )
        table = ccmct.read_sliderunner(
            file, classes=classes, images=place, mpp=resolution, pixels=pixels
        )
    else:
        read = tables.read_csv if name == "tables" else midog.read_coco
        table = read(
            file,
            classes=classes,
            images=place,
            mpp=resolution,
            groups=groups,
            domains=domains,
            pixels=pixels,
        )
    if pixels:
        check_centers(table)
    return table


def recognise(path: Path) -> str:
    """Name of the reader for a folder or file.

    Parameters
    ----------
    path : Path

    Returns
    -------
    str
        In `READERS`. A CSV beside class folders belongs to them.

    Raises
    ------
    DataError
        If there is none, or several, saying what was looked for.
    """
    if path.is_file():
        known = {".csv": "tables", ".json": "midog"} | dict.fromkeys(ccmct.SUFFIXES, "ccmct")
        found = known.get(path.suffix.lower())
        if found is None:
            raise DataError(
                f"{path}: annotations are CSV, JSON or SQLite ({', '.join(known)}); or name a "
                "folder of class folders"
            )
        return found
    fitting = []
    if len(folders.class_folders(path)) > 1:
        fitting.append("folders")
    elif tables.tables_in(path):
        fitting.append("tables")
    fitting += ["midog"] * bool(_jsons(path)) + ["ccmct"] * bool(_databases(path))
    if not fitting and (folders.class_folders(path) or folders.pictures(path)):
        fitting.append("folders")
    if len(fitting) != 1:
        layouts = "; ".join(f"{name}: {text}" for name, text in READERS.items())
        what = f"of several layouts ({', '.join(fitting)})" if fitting else "no annotated patches"
        raise DataError(f"{path}: {what}; name the file or the reader ({layouts})")
    return fitting[0]


def _file_of(path: Path, reader: str) -> Path:
    """What a reader is to read: the one file of its kind in a folder, or the path itself."""
    if reader == "folders" and not path.is_dir():
        raise DataError(f"{path}: class folders are in a folder, and this is a file")
    if path.is_file() or reader == "folders":
        return path
    if reader == "tables":
        found = tables.tables_in(path)
        return found[0] if len(found) == 1 else path
    found = _jsons(path) if reader == "midog" else _databases(path)
    if len(found) != 1:
        kind = "JSON of COCO's kind" if reader == "midog" else "database of SlideRunner"
        raise DataError(
            f"{path}: {listing(f.name for f in found) or 'no ' + kind} in it; name the one file"
        )
    return found[0]


def _jsons(folder: Path) -> list[Path]:
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if midog.is_coco(raw):
            found.append(file)
    return found


def _databases(folder: Path) -> list[Path]:
    files = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in ccmct.SUFFIXES]
    return [f for f in files if ccmct.is_sliderunner(f)]
