"""Folders of an unpacked dataset: published archives are nested in many ways."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from celltyper.errors import DataError

MAX_DEPTH = 4
MAX_FOLDERS = 500


def subfolders(folder: Path) -> list[Path]:
    """Visible folders in a folder, sorted; what archivers leave behind is passed over."""
    found = (folder / n for n in _visible(folder, folders=True) if not n.startswith("__MACOSX"))
    return [inner for inner in found if os.access(inner, os.R_OK | os.X_OK)]


def _visible(folder: Path, *, folders: bool) -> list[str]:
    """Names of the files or of the folders in a folder, sorted, but for hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.name[0] != "." and _is_folder(e) == folders)
    except OSError:  # not readable by this user, or gone since
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk(path: Path, levels: int, enter: Callable[[Path], bool]) -> Iterator[Path]:
    """Folders at and below a folder, the nearest first; `enter` is asked after a folder is given.

    Nearest first, because a search that gives up after some folders should have seen those.
    """
    level = [path] if path.is_dir() else []
    for depth in range(levels + 1):
        yield from level
        if depth < levels:
            level = [inner for folder in level if enter(folder) for inner in subfolders(folder)]


def folders_below(path: Path, strict: bool = True) -> Iterator[tuple[Path, list[str]]]:
    """Folders of an unpacked dataset with the names of their files, at most four levels down.

    Hidden files and folders, ``__MACOSX`` and folders of overlays (pictures for people, with the
    names of the images) are passed over.

    Parameters
    ----------
    path : Path
        Where to start.
    strict : bool
        Refuse a tree of more than 500 folders; else stop there.

    Yields
    ------
    folder : Path
        Beginning with `path`; the nearest first, then in the order of their names.
    names : list of str
        Sorted.

    Raises
    ------
    DataError
        If the tree is too large to be one dataset.
    """

    def holds_data(folder: Path) -> bool:
        return folder == path or "overlay" not in folder.name.lower()

    folders = filter(holds_data, _walk(path, MAX_DEPTH, holds_data))
    for seen, folder in enumerate(folders, start=1):
        if seen > MAX_FOLDERS:
            if strict:
                raise DataError(
                    f"{path}: more than {MAX_FOLDERS} folders below it; name the folder of the "
                    "dataset itself"
                )
            return
        yield folder, _visible(folder, folders=False)


def find_folders(
    path: Path, fits: Callable[[Path], bool], levels: int = 2, limit: int = MAX_FOLDERS
) -> Iterator[Path]:
    """Folders of some kind at or below a folder, the nearest first.

    Parameters
    ----------
    path : Path
        Where to begin.
    fits : callable
        Whether a folder is one; inside of those nothing is looked for.
    levels : int
        How far down to look.
    limit : int
        Folders looked at before giving up.

    Yields
    ------
    Path
        Each folder that fits.
    """
    closed: set[Path] = set()
    for folder in islice(_walk(path, levels, lambda f: f not in closed), limit):
        try:
            found = fits(folder)
        except OSError:  # not readable by this user, or gone since
            closed.add(folder)
            continue
        if found:
            closed.add(folder)
            yield folder
