"""Which slides are meant: files, folders, patterns, URLs and tables of them."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from celltyper.datasets.images import IMAGE_SUFFIXES
from celltyper.datasets.resolution import check_mpp
from celltyper.errors import ConfigError, DataError
from celltyper.readers.files import read_table
from celltyper.slides.opening import open_slide
from celltyper.slides.slide import slide_name

logger = logging.getLogger("celltyper")

SLIDE_SUFFIXES = (
    ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".zarr",
)  # fmt: skip
"""Names of what is always a slide; TIFF, PNG and JPEG are one if they are large or pyramids."""
LARGE = 8192 * 8192
"""Pixels above which an image is worked on as a slide, in bounded memory."""
_TISSUE = ("auto", "all")
_COLUMNS = ("slide", "name", "mpp", "tissue", "region")
_REGION = re.compile(r"\s*\d+\s*(,\s*\d+\s*){3}")


@dataclass(frozen=True)
class Entry:
    """One slide of a cohort.

    Parameters
    ----------
    path : str
        File, folder or URL.
    name : str
        Of its folder in the results; unique.
    mpp : float or None
        Micrometres per pixel, if not as the file says.
    tissue : str
        ``"auto"``, ``"all"``, or a file for `celltyper.slides.read_mask`.
    region : str or None
        ``x,y,width,height`` in pixels of the full resolution.
    """

    path: str
    name: str
    mpp: float | None = None
    tissue: str = "auto"
    region: str | None = None


def are_slides(inputs: Sequence[str | Path]) -> bool:
    """Whether inputs hold a slide: something that should not be loaded into memory at once."""
    return any(_is_slide(path) for path in _paths(inputs))


def find_slides(
    inputs: Sequence[str | Path],
    *,
    mpp: float | None = None,
    tissue: str = "auto",
    region: str | None = None,
) -> list[Entry]:
    """List slides of files, folders, patterns, URLs and tables.

    Parameters
    ----------
    inputs : sequence of str or Path
        A folder gives what lies right in it; a CSV has a column ``slide`` (paths, relative to the
        table) and may have ``name``, ``mpp``, ``tissue`` and ``region``, which go before the
        options.
    mpp, tissue, region
        For all of them, see `Entry`.

    Returns
    -------
    list of Entry
        In the order of the inputs.

    Raises
    ------
    DataError, ConfigError
        If something is missing or wrong, a folder or table holds no slide, two have the same name,
        or a mask of one slide is given for several.
    """
    general = Entry("", "", mpp, tissue, region)
    found: list[Entry] = []
    tables = 0
    for text in (os.fspath(each) for each in inputs):
        if text.lower().endswith(".csv"):
            found += _of_table(Path(text), general)
            tables += 1
        else:
            found += [replace(general, path=path, name=slide_name(path)) for path in _paths([text])]
    if tables < len(inputs):
        _check_place(general)
    entries: dict[str, Entry] = {}
    for entry in found:
        other = entries.setdefault(entry.name, entry)
        if replace(other, path=_absolute(other)) != replace(entry, path=_absolute(entry)):
            raise DataError(
                f"{other.path} and {entry.path} have the same name {entry.name!r}; rename one, or "
                "give names in the column 'name' of a CSV"
            )
    if not found:
        raise DataError("give at least one slide, folder or CSV of slides")
    if len(entries) > 1 and tissue not in _TISSUE:
        raise ConfigError(
            f"{tissue} shows the tissue of one slide, and these are {len(entries)}; give a CSV "
            "with the columns 'slide' and 'tissue'"
        )
    return list(entries.values())


def _check_place(entry: Entry) -> None:
    """Refuse what can be told to be wrong before a slide is opened."""
    if entry.region is not None:
        if entry.tissue != "auto":
            raise ConfigError("give a region or where the tissue is, not both")
        if not _REGION.fullmatch(entry.region):
            raise ConfigError(
                f"region {entry.region!r}: give x,y,width,height in pixels of the full resolution, "
                "such as 2000,1000,4096,4096"
            )
    if entry.tissue not in _TISSUE and not Path(entry.tissue).is_file():
        raise DataError(
            f"{entry.tissue}: no such file; give auto, all, a mask image or a GeoJSON of QuPath"
        )


def _paths(inputs: Iterable[str | Path]) -> list[str]:
    """Files, folders that are slides, and URLs; folders and patterns are resolved."""
    found: list[str] = []
    for text in (os.fspath(each) for each in inputs):
        path = Path(text)
        if "://" in text or text.lower().endswith(".csv"):
            found.append(text)
        elif path.is_dir() and not _is_store(path):
            # datasets have their images one further down
            place = path / "images" if (path / "images").is_dir() else path
            inside = sorted(p for p in place.iterdir() if _may_be_slide(p))
            if not inside:
                raise DataError(
                    f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}) and no slide; a "
                    f"pattern such as '{path}/**/*.svs' looks into the folders in it"
                )
            found += map(str, inside)
        elif path.exists():
            found.append(text)
        elif glob.has_magic(text):
            # not Path.glob: the pattern may be absolute
            names = sorted(glob.glob(text, recursive=True))  # noqa: PTH207
            matching = [name for name in names if _may_be_slide(Path(name))]
            if not matching:
                raise DataError(f"no slide or image matches {text}")
            found += matching
        else:
            raise DataError(f"no such image or folder: {path}")
    return found


def may_grow(inputs: Sequence[str | Path]) -> bool:
    """Whether inputs name a place where more slides may come to be: folder, pattern or table."""
    for text in (os.fspath(each) for each in inputs):
        path = Path(text)
        if text.lower().endswith(".csv") or (path.is_dir() and not _is_store(path)):
            return True
        if "://" not in text and not path.exists():
            return True
    return False


def _is_store(path: Path) -> bool:
    """Whether a folder is a slide itself: OME-Zarr, or the files of one DICOM slide."""
    marks = ("zarr.json", ".zgroup", ".zattrs")
    return any((path / mark).is_file() for mark in marks) or any(path.glob("*.dcm"))


def _may_be_slide(path: Path) -> bool:
    known = path.suffix.lower() in (*SLIDE_SUFFIXES, *IMAGE_SUFFIXES)
    return not path.name.startswith(".") and (known if path.is_file() else _is_store(path))


def _is_slide(text: str) -> bool:
    path = Path(text)
    if "://" in text or text.lower().endswith(".csv") or path.is_dir():
        return True
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return True
    try:
        with open_slide(path) as slide:
            return len(slide.levels) > 1 or slide.size[0] * slide.size[1] > LARGE
    except DataError:
        return False


def _absolute(entry: Entry) -> str:
    return entry.path if "://" in entry.path else str(Path(entry.path).absolute())


def _of_table(path: Path, general: Entry) -> list[Entry]:
    rows = read_table(path)
    if not rows:
        raise DataError(f"{path} names no slide")
    if "slide" not in rows[0]:
        raise DataError(
            f"{path}: no column 'slide'; columns are {', '.join(rows[0])}, known ones "
            f"{', '.join(_COLUMNS)}"
        )
    unused = [column for column in rows[0] if column not in _COLUMNS]
    if unused:
        logger.info("%s: not used: %s (known: %s)", path, ", ".join(unused), ", ".join(_COLUMNS))
    return [_of_row(path, number, row, general) for number, row in enumerate(rows, start=2)]


def _of_row(path: Path, number: int, row: Mapping[str, str], general: Entry) -> Entry:
    where = f"{path}: line {number}"
    slide = row["slide"]
    if not slide:
        raise DataError(f"{where}: names no slide")
    if "://" not in slide:
        slide = str(path.parent / slide)
        if not Path(slide).exists():
            raise DataError(f"{where}: no such slide: {slide}")
    name = row.get("name") or slide_name(slide)
    if name in (".", "..") or set(name) & set('/\\:*?"<>|'):
        raise DataError(f"{where}: name {name!r} cannot be that of a folder")
    try:
        mpp = float(row["mpp"]) if row.get("mpp") else general.mpp
        check_mpp(mpp)
    except (ValueError, DataError):
        raise DataError(
            f"{where}: mpp {row['mpp']!r} is no number of micrometres per pixel"
        ) from None
    tissue = row.get("tissue") or general.tissue
    if row.get("tissue") and tissue not in _TISSUE:
        tissue = str(path.parent / tissue)
    found = Entry(slide, name, mpp, tissue, row.get("region") or general.region)
    try:
        _check_place(found)
    except (ConfigError, DataError) as error:
        raise DataError(f"{where}: {error}") from None
    return found
