"""How the cells of a run's test images matched, on disk: every score can be made of it later."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.atomic import atomic_path
from celltyper.calibration import calibration_of
from celltyper.errors import DataError
from celltyper.evaluation import ImageScores
from celltyper.metrics.matching import Matches

SCORES_FILE = "scores.npz"

_FORMAT = 1
_ARRAYS = ("true", "guess", "seen", "confidence", "ref_block", "pred_block")
_MATCHES = ("near", "strict", "loose")
_PLAIN = ("name", "group", "aji", "radius", "unannotated")


def write_scores(path: Path, images: Sequence[ImageScores], classes: Sequence[str]) -> None:
    """Write what `celltyper.evaluation.summarise` needs, atomically and without pickle.

    Parameters
    ----------
    path : Path
        NumPy archive: every field of all images behind each other, their lengths, and JSON as
        bytes.
    images : sequence of ImageScores
        At least one.
    classes : sequence of str
        The K phenotypes.
    """
    known = images[0].calibration
    about = {
        "format": _FORMAT,
        "classes": list(classes),
        "images": [{key: getattr(image, key) for key in _PLAIN} for image in images],
        "calibration": None if known is None else known.facts(),
    }
    arrays: dict[str, Any] = {}
    for name, parts in _columns(images).items():
        arrays[name] = np.concatenate(parts)
        arrays[f"{name} lengths"] = np.array([len(part) for part in parts])
    # An image without cells has no index, and Python reads back the NaN that it writes.
    text = json.dumps(about, ensure_ascii=False, default=int).encode()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, about=np.frombuffer(text, np.uint8), **arrays)


def read_scores(path: Path) -> tuple[list[ImageScores], tuple[str, ...]]:
    """Read what `write_scores` wrote.

    Parameters
    ----------
    path : Path

    Returns
    -------
    images : list of ImageScores
    classes : tuple of str

    Raises
    ------
    DataError
        If the file is damaged, or of another version of celltyper.
    """
    try:
        # opened here, for NumPy leaves a damaged file open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive.items())
        about = json.loads(arrays.pop("about").tobytes())
        if about["format"] != _FORMAT:
            raise DataError(f"{path}: written by another version of celltyper; run it again")
        columns = {
            name: np.split(values, np.cumsum(arrays[f"{name} lengths"])[:-1])
            for name, values in arrays.items()
            if not name.endswith(" lengths")
        }
        # files of earlier versions know nothing of calibration
        known = calibration_of(about.get("calibration"))
        images = [
            ImageScores(**_image(plain, columns, i), calibration=known)
            for i, plain in enumerate(about["images"])
        ]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged; delete it and go on with --resume") from error
    return images, tuple(about["classes"])


def _columns(images: Sequence[ImageScores]) -> dict[str, list[NDArray[Any]]]:
    columns = {name: [getattr(image, name) for image in images] for name in _ARRAYS}
    raw = [image.raw for image in images if image.raw is not None]
    if len(raw) == len(images):
        columns["raw"] = raw
    for name in _MATCHES:
        for field in Matches._fields:
            columns[f"{name} {field}"] = [getattr(getattr(i, name), field) for i in images]
    return columns


def _image(plain: dict[str, Any], columns: dict[str, Any], index: int) -> dict[str, Any]:
    """Fields of an image."""
    kept = [*_ARRAYS, *(["raw"] if "raw" in columns else [])]
    fields = plain | {name: columns[name][index] for name in kept}
    for name in _MATCHES:
        fields[name] = Matches(*(columns[f"{name} {field}"][index] for field in Matches._fields))
    return fields | {"unannotated": tuple(plain["unannotated"])}
