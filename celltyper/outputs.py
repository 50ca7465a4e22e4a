"""Folders that inference writes to: whose results are in one, and removing them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from celltyper.errors import ConfigError
from celltyper.index import INDEX_FILE
from celltyper.library.files import CONFIG_FILE, PROTOCOL_FILE

CELLS_FILE = "cells.parquet"
GEOJSON_FILE = "cells.geojson"
LABELS_FILE = "labels.npz"
SLIDE_FILE = "slide.json"
REPORT_FILE = "report.html"
TABLE_FILE = "slides.csv"
MAPS_FOLDER = "maps.zarr"
WORK_FOLDER = "work"
"""What is done so far of a slide; removed in the end."""
PLAN_FILE = "plan.json"

FILES = (
    CELLS_FILE, "cells.csv", GEOJSON_FILE, "cells.geojson.gz", "cells.h5ad", LABELS_FILE,
    "overlay.png", REPORT_FILE,
)  # fmt: skip
"""Of an image or slide, by inference and exports; `SLIDE_FILE` apart."""
STORES = (MAPS_FOLDER, "cells.geojson.tiles", "cells.ome.zarr", "cells.spatialdata.zarr")
"""The same that are folders."""
OF_ALL = (
    INDEX_FILE, TABLE_FILE, REPORT_FILE, CELLS_FILE, "cells.h5ad", "metrics.json", "per_class.csv",
    "per_image.csv",
)  # fmt: skip
"""Of several images or slides together, evaluations among them."""

_LOCK_FILE = ".lock"
_REMOVED_FOLDER = ".removed"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the system frees the lock of a process that dies.

    Raises
    ------
    ConfigError
        If another process is at work in it.
    """
    lock = FileLock(folder / _LOCK_FILE, timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise ConfigError(f"another process is at work in {folder}; wait for it") from None
    except NotImplementedError as error:
        raise ConfigError(
            f"the file system of {folder} knows no locks ({error}); choose another"
        ) from error


def is_slide(folder: Path) -> bool:
    """Whether a folder holds the results of one slide, finished or not."""
    return (folder / SLIDE_FILE).is_file() or (folder / WORK_FOLDER / PLAN_FILE).is_file()


def is_done(folder: Path) -> bool:
    """Whether a folder holds the finished results of one slide."""
    return (folder / SLIDE_FILE).is_file() and (folder / CELLS_FILE).is_file()


def check_free(output: Path) -> None:
    """Refuse a folder whose content inference of cells never replaces.

    Raises
    ------
    ConfigError
        If it holds a run, the runs of a protocol, or patches.
    """
    if (output / CONFIG_FILE).exists() or (output / PROTOCOL_FILE).exists():
        raise ConfigError(f"{output} holds a run; give another folder for the cells")
    if _index(output).get("task") == "patches":
        raise ConfigError(f"{output} holds patches; give another folder for the cells")


def check_mixed(output: Path, several: bool) -> None:
    """Refuse a folder in which slides would be mixed with results of another kind.

    Parameters
    ----------
    output : Path
    several : bool
        Whether every slide has a folder of its own inside.

    Raises
    ------
    ConfigError
        If it holds results of images, or of one slide where there are several, or the other way
        round.
    """
    entries = _entries(output)
    own = is_slide(output)
    others = (output / TABLE_FILE).is_file()
    if (output / INDEX_FILE).is_file() and not own and not others:
        raise ConfigError(
            f"{output} already holds results of infer; pass --overwrite or another folder"
        )
    if own and several:
        name = entries[0]["name"] if entries else "one slide"
        raise ConfigError(
            f"{output} holds the results of {name} alone; give another folder for several slides, "
            "or pass --overwrite"
        )
    if others and not several:
        raise ConfigError(
            f"{output} holds the results of several slides; give another folder for one, such as "
            f"{output / 'NAME'}, or pass --overwrite"
        )


def clear(output: Path) -> None:
    """Remove what inference wrote, exports and evaluations of it; nothing else.

    Raises
    ------
    ConfigError
        If another process is at work in it; nothing is removed then.
    """
    listed = {output / str(entry.get("folder", entry["name"])) for entry in _entries(output)}
    folders = {each for each in listed if each == output or each.parent == output}
    index = (output / INDEX_FILE).is_file()
    if is_slide(output) or (index and not listed):
        folders.add(output)
    with ExitStack() as stack:
        for folder in folders:
            if (folder / _LOCK_FILE).exists():
                stack.enter_context(alone(folder))
        for name in OF_ALL if index or output in folders else ():
            (output / name).unlink(missing_ok=True)
        for folder in folders:
            clear_folder(folder)
    for folder in folders:
        (folder / _LOCK_FILE).unlink(missing_ok=True)
        if folder != output and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def clear_folder(folder: Path) -> None:
    """Remove what inference and exports wrote of one image or slide."""
    # The table goes first, without which a slide does not count as done, and slide.json last:
    # stopped in between, nothing half removed is taken for results, and it is still known as ours.
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    clear_work(folder)
    for name in STORES:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for name in (INDEX_FILE, SLIDE_FILE):
        (folder / name).unlink(missing_ok=True)


def clear_work(folder: Path) -> None:
    """Remove what was done so far of a slide."""
    work, removed = folder / WORK_FOLDER, folder / _REMOVED_FOLDER
    shutil.rmtree(removed, ignore_errors=True)
    if (work / PLAN_FILE).is_file():
        # in one step: half of it must not be gone on with
        work.rename(removed)
        shutil.rmtree(removed)


def _entries(output: Path) -> list[dict[str, Any]]:
    """Images, or slides with the failed ones, that the index of a folder lists."""
    facts = _index(output)
    found = [*facts.get("images", ()), *facts.get("failed", ())]
    return [each for each in found if isinstance(each, dict) and "name" in each]


def _index(output: Path) -> dict[str, Any]:
    """What the index says; nothing if it is not there or damaged."""
    try:
        facts = json.loads((output / INDEX_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
