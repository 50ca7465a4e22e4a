"""Which windows a model was trained on: a score on these is no test."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.classification.config import PatchData
from celltyper.datasets.images import read_image
from celltyper.errors import DataError
from celltyper.library.files import RUN_FILE
from celltyper.patches.reading import open_patches
from celltyper.patches.table import PatchTable

logger = logging.getLogger(__name__)

_Progress = Callable[[Iterable[int]], Iterable[int]]


def training_part(run: Path, part: str = "train") -> dict[str, Any]:
    """What ``run.json`` says of the windows of a part; empty where it says nothing.

    Parameters
    ----------
    run : Path
        Run folder, or the checkpoint in it.
    part : str
        ``train`` or ``val``.

    Returns
    -------
    dict
        ``path``, ``names``, ``groups`` and more.
    """
    file = (run if run.is_dir() else run.parent) / RUN_FILE
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["data"].get(part, {}))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is damaged ({error}); train again with --overwrite") from error


def find_seen(
    table: PatchTable, runs: Sequence[Path], trained: PatchData, *, progress: _Progress = iter
) -> NDArray[np.bool_]:
    """Find windows that a model was trained on, or whose slide or patient it knows.

    Parameters
    ----------
    table : PatchTable
    runs : sequence of Path
        Folders of all models.
    trained : PatchData
        Where they were trained. If these data are elsewhere than the table and still there,
        patches of the same pixels are found too.
    progress : callable
        Wraps the loops over patches that are read, such as ``tqdm``.

    Returns
    -------
    ndarray of bool, shape (n,)
        Whether any model has seen the window.
    """
    names: set[str] = set()
    groups: set[str] = set()
    elsewhere: set[str] = set()
    for run in runs:
        part = training_part(run)
        if not part:
            continue
        here = Path(part["path"]) == table.path.absolute()
        (names if here else elsewhere).update(part["names"])
        # A patch that is a group of its own says nothing about another folder.
        groups |= {g for n, g in zip(part["names"], part["groups"], strict=True) if g != n}
    pairs = zip(table.names, table.groups, strict=True)
    seen = np.array([name in names or group in groups for name, group in pairs], np.bool_)
    if elsewhere and not seen.all():
        seen |= _same_pixels(table, trained, elsewhere, progress)
    return seen


def _same_pixels(
    table: PatchTable, trained: PatchData, names: set[str], progress: _Progress
) -> NDArray[np.bool_]:
    """Patches with the pixels of a training patch, as far as those are still to be had."""
    found = np.zeros(len(table), np.bool_)
    own = np.flatnonzero(np.isnan(table.centers[:, 0]))
    if trained.root is None or not trained.root.exists() or not len(own):
        return found
    try:
        other = open_patches(
            trained.root,
            classes=trained.classes or None,
            reader=trained.reader,
            images=trained.images,
            pixels=False,
        )
    except DataError as error:
        logger.warning("not compared with the training data, which have changed: %s", error)
        return found
    whole = np.flatnonzero(np.isnan(other.centers[:, 0])).tolist()
    rows = [i for i in whole if other.names[i] in names]
    known = set(_digests(other, rows, progress).values())
    for i, digest in _digests(table, own.tolist(), progress).items():
        found[i] = digest in known
    return found


def _digests(table: PatchTable, rows: Sequence[int], progress: _Progress) -> dict[int, bytes]:
    """Digest of the pixels of every patch that can be read, by row."""
    found = {}
    for i in progress(rows):
        try:
            image = read_image(table.files[i]).image
        except DataError:
            continue
        text = str(image.shape).encode()
        found[i] = hashlib.blake2b(text + image.tobytes(), digest_size=16).digest()
    return found
