"""What a folder of found cells says of itself: ``infer.json``, written last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celltyper import __version__
from celltyper.atomic import write_json
from celltyper.cells.colors import colors_of
from celltyper.config import one_line
from celltyper.errors import DataError

if TYPE_CHECKING:
    from celltyper.types import TileModel

INDEX_FILE = "infer.json"

_NEEDED = {"images", "classes", "colors", "model"}


def write_index(
    folder: Path,
    model: TileModel,
    *,
    run: str,
    device: str,
    symmetries: int,
    precision: str,
    threshold: float,
    images: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, str]],
) -> None:
    """Write it; its keys are explained in ``docs/outputs.md``.

    Parameters
    ----------
    folder : Path
        Of the results.
    model : CellTyper or ExportedModel
        That found the cells.
    run : str
        Folder of the model.
    device, symmetries, precision
        What ran.
    threshold : float
        Class probability below which cells are unknown.
    images, failed : sequence of mapping
        What was found where, and what could not be read.
    """
    facts = {
        "celltyper": __version__,
        "model": run,
        "classes": list(model.classes),
        "colors": list(colors_of(model)),
        "model_mpp": model.mpp,
        "device": device,
        "symmetries": symmetries,
        "precision": precision,
        "calibration": None if model.calibration is None else model.calibration.facts(),
        "threshold": threshold,
        "images": list(images),
        "failed": list(failed),
    }
    write_json(folder / INDEX_FILE, facts)


def read_index(folder: str | Path) -> dict[str, Any]:
    """Read what ``infer.json`` says about the cells in a folder.

    Raises
    ------
    DataError
        If it is missing or damaged, or the folder holds patches.
    """
    index = Path(folder) / INDEX_FILE
    if not index.is_file():
        raise DataError(f"no {INDEX_FILE} in {folder}: give a folder that 'celltyper infer' wrote")
    try:
        facts = json.loads(index.read_text(encoding="utf-8"))
        patches = facts.get("task") == "patches"
        missing = _NEEDED - facts.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{index} is damaged ({one_line(error)}); run infer again") from error
    if patches:
        raise DataError(f"{folder} holds patches, which are in patches.csv, and no cells")
    if missing:
        raise DataError(f"{index} lacks {', '.join(sorted(missing))}; run infer again")
    return dict(facts)
