"""Tests on further patches: the models of all runs of a protocol, each alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from celltyper.benchmark.spec import FurtherData
from celltyper.classification.config import PatchData
from celltyper.classification.ensemble import check_resolution_known
from celltyper.classification.model import EmbeddingProbe, PatchModel, load_patch_model
from celltyper.classification.preparing import open_labelled
from celltyper.classification.seen import find_seen
from celltyper.devices import pick_device
from celltyper.errors import DataError
from celltyper.library.files import model_folders
from celltyper.patches.table import PatchTable
from celltyper.protocols.patches import typed_patches, write_typed


def further_file(run: Path, test: str) -> Path:
    """What a run said of the patches of a further test, beside ``scores.npz``."""
    return run / f"scores-{test}.npz"


def type_further(
    protocol: Path, tests: Mapping[str, FurtherData], *, device: str, progress: bool
) -> None:
    """Have the models of a protocol type further patches, as far as they have not yet.

    Parameters
    ----------
    protocol : Path
        What `celltyper.protocols.run_patch_protocol` wrote. Models that were trained on everything
        are tested.
    tests : mapping of str to FurtherData
        By name.
    device : str
    progress : bool

    Raises
    ------
    DataError
        If the patches cannot be read, or a model was trained on some of them, or of their slides.
    """
    place = pick_device(device)
    tables: dict[str, PatchTable] = {}
    embedder = None
    # without tests, nothing may be loaded
    for run in model_folders(protocol) if tests else ():
        todo = [name for name in tests if not further_file(run, name).is_file()]
        if not todo:
            continue
        model = load_patch_model(run, device=place, embedder=embedder)
        if isinstance(model.predictor, EmbeddingProbe):
            embedder = model.predictor.embedder
        for name in todo:
            if name not in tables:
                tables[name] = _table(tests[name], model, model_folders(protocol), progress)
            table = tables[name]
            probabilities = model.probabilities(table, progress=progress)
            typed = typed_patches(table, np.arange(len(table)), probabilities, model.threshold)
            write_typed(further_file(run, name), typed)


def _table(test: FurtherData, model: PatchModel, runs: list[Path], progress: bool) -> PatchTable:
    data = PatchData(
        root=test.root,
        reader=test.reader,
        images=test.images,
        classes=model.classes,
        mpp=model.mpp,
    )
    table = open_labelled(data, progress=progress)
    check_resolution_known(model, table)
    bar = partial(tqdm, desc="compare", unit="patch", disable=None if progress else True)
    seen = find_seen(table, runs, model.config.data, progress=bar)
    if seen.any():
        raise DataError(
            f"{seen.sum():,} of {len(table):,} patches of {test.root} trained the models, by name, "
            f"slide or pixels (the first: {table.names[int(seen.argmax())]}); test on others"
        )
    return table
