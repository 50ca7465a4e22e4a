"""Training in patch mode: one pass of the encoder, then a head on its embeddings."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from celltyper import __version__
from celltyper.atomic import write_json
from celltyper.cache import cache_folder
from celltyper.errors import DataError
from celltyper.metrics.ranking import choose_threshold
from celltyper.patches.config import PatchConfig, PatchLoss
from celltyper.patches.embedding import Embedder, embed_table
from celltyper.patches.model import (
    PatchModel,
    build_embedder,
    mean_probabilities,
    save_patch_model,
)
from celltyper.patches.preparing import (
    PatchParts,
    Rows,
    divide_rows,
    open_labelled,
    positive_class,
    size_of,
)
from celltyper.patches.table import PatchTable
from celltyper.predict import pick_device
from celltyper.probes import Probe, fit_probe
from celltyper.runs import RUN_FILE, check_output, resolve_encoder, start_folder

logger = logging.getLogger("celltyper")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Annotated windows with their embeddings, for any number of heads.

    Parameters
    ----------
    table : PatchTable
    embeddings : ndarray of float32, shape (n, symmetries, D)
    embedder : Embedder
    size : int
        Side of a window in pixels.
    positive : int
        Index of the positive class.
    """

    table: PatchTable
    embeddings: NDArray[np.float32]
    embedder: Embedder
    size: int
    positive: int


def train_patches(
    config: PatchConfig,
    output: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Train a head on embeddings of annotated windows and write its run folder.

    Parameters
    ----------
    config : PatchConfig
        ``data.root`` must be set.
    output : str or Path
        The run folder: ``model.safetensors`` (the head; never the encoder), ``config.yaml`` and
        ``run.json``.
    device : str
        See `celltyper.predict.pick_device`.
    resume : bool
        Go on with an unfinished run of the same config: embeddings that were computed stay.
    overwrite : bool
        Start over where another run is.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    ConfigError, DataError, CheckpointError
        For wrong input, before anything is written.
    """
    output = Path(output)
    place = pick_device(device)
    table = open_labelled(config.data, progress=progress)
    config = resolve_patches(config, table)
    parts = divide_rows(config.data, table, config.seed)
    check_output(output, config, resume=resume, overwrite=overwrite)
    if resume and (output / RUN_FILE).is_file():
        logger.info("%s is finished: nothing to resume", output)
        return output
    embedder = build_embedder(config, place)
    start_folder(output, config, keep=False)
    started = time.monotonic()
    data = embed_data(config, table, embedder, progress=progress)
    embedded = time.monotonic() - started
    model = fit_model(config, data, parts, config.seed)
    save_patch_model(output, model)
    facts = run_facts(config, data, parts, model)
    seconds = {"embed": round(embedded, 1), "fit": round(time.monotonic() - started - embedded, 1)}
    write_json(output / RUN_FILE, facts | {"seconds": seconds, "device": place.type})
    return output


def resolve_patches(config: PatchConfig, table: PatchTable) -> PatchConfig:
    """Write into a config what was decided: absolute paths, window, classes and weights."""
    data = config.data
    files = {
        key: value.absolute()
        for key in ("root", "images", "split")
        if (value := getattr(data, key))
    }
    decided = {
        "size": size_of(data, table),
        "classes": table.classes,
        "positive": table.classes[positive_class(data, table)],
        "mpp": data.mpp or table.mpp,
    }
    return config.model_copy(
        update={
            "data": data.model_copy(update=files | decided),
            "encoder": resolve_encoder(config.encoder),
        }
    )


def embed_data(
    config: PatchConfig, table: PatchTable, embedder: Embedder, *, progress: bool
) -> Embedded:
    """Embeddings of all windows, once for all heads that are fitted to them.

    Parameters
    ----------
    config : PatchConfig
        Resolved.
    table : PatchTable
    embedder : Embedder
    progress : bool

    Returns
    -------
    Embedded
    """
    size = size_of(config.data, table)
    found = embed_table(
        embedder,
        table,
        cache_folder() / "embeddings",
        size=size,
        mpp=config.data.mpp,
        symmetries=config.view.symmetries,
        batch_size=config.view.batch_size,
        progress=progress,
    )
    return Embedded(table, found, embedder, size, positive_class(config.data, table))


def fit_model(config: PatchConfig, data: Embedded, parts: PatchParts, seed: int) -> PatchModel:
    """Fit a head to the training windows; its threshold is that of the validation windows.

    Parameters
    ----------
    config : PatchConfig
        Resolved.
    data : Embedded
    parts : PatchParts
        Without validation windows, or with more than two classes, the threshold is one half.
    seed : int

    Returns
    -------
    PatchModel
    """
    probe = _fit(config, data, parts.train, seed)
    threshold = 0.5
    if len(parts.val) and len(data.table.classes) == 2:
        found = mean_probabilities(probe, data.embeddings[parts.val])[:, data.positive]
        truth = data.table.labels[parts.val] == data.positive
        if truth.all() or not truth.any():
            raise DataError(
                f"{data.table.path}: the validation windows are all of one class, so no threshold "
                "can be chosen; raise data.val_fraction, or set it to 0"
            )
        threshold = choose_threshold(data.table.labels[parts.val], found, positive=data.positive)
    return PatchModel(
        embedder=data.embedder,
        probe=probe,
        config=config,
        classes=data.table.classes,
        positive=data.positive,
        threshold=threshold,
        size=data.size,
        mpp=config.data.mpp,
    )


def _fit(config: PatchConfig, data: Embedded, rows: Rows, seed: int) -> Probe:
    """Every symmetry of a window is a case of its own, with its share of the weight."""
    table, symmetries = data.table, data.embeddings.shape[1]
    cases = np.repeat(rows, symmetries)
    targets = targets_of(table, config.loss)[cases]
    weights = weights_of(table, config.loss)[cases] / symmetries
    return fit_probe(
        config.head.name,
        data.embeddings[rows].reshape(len(cases), -1),
        targets,
        [table.groups[i] for i in cases],
        weights=weights,
        class_weights=config.loss.class_weights,
        seed=seed,
        **config.head.options,
    )


def targets_of(table: PatchTable, loss: PatchLoss) -> NDArray[np.float64]:
    """Share of every class (n, K): of the label alone, or of the experts' votes."""
    if loss.targets == "votes":
        return table.votes
    one_hot: NDArray[np.float64] = np.eye(len(table.classes))[table.labels]
    return one_hot


def weights_of(table: PatchTable, loss: PatchLoss) -> NDArray[np.float64]:
    """Weight of every window (n,): 1, or the share of the experts that agree with its label."""
    if not loss.agreement:
        return np.ones(len(table))
    agree: NDArray[np.float64] = table.votes[np.arange(len(table)), table.labels]
    return agree


def run_facts(
    config: PatchConfig, data: Embedded, parts: PatchParts, model: PatchModel
) -> dict[str, Any]:
    """Say what ran on what, for ``run.json`` and the report."""
    return {
        "task": "patches",
        "celltyper": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "classes": list(model.classes),
        "positive": model.classes[model.positive],
        "threshold": model.threshold,
        "threshold_from": "validation" if len(parts.val) else "one half",
        "size": model.size,
        "mpp": model.mpp,
        "embedding": data.embeddings.shape[2],
        "encoder_passes": int(np.prod(data.embeddings.shape[:2])),
        "probe": model.probe.facts(),
        "data": {
            part: _part(data.table, rows)
            for part, rows in (("train", parts.train), ("val", parts.val))
            if len(rows)
        },
    }


def _part(table: PatchTable, rows: Rows) -> dict[str, Any]:
    counts = np.bincount(table.labels[rows], minlength=len(table.classes))
    return {
        "path": str(table.path.absolute()),
        "patches": len(rows),
        "names": [table.names[i] for i in rows],
        "groups": [table.groups[i] for i in rows],
        "classes": dict(zip(table.classes, counts.tolist(), strict=True)),
    }
