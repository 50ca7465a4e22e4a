"""Training in patch mode: a head on embeddings of one pass, or a network by gradient."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from celltyper import __version__
from celltyper.atomic import write_json
from celltyper.cache import cache_folder
from celltyper.calibration import Calibration, coverage_thresholds, fit_scaling
from celltyper.classification.config import PatchConfig, PatchLoss
from celltyper.classification.embedding import Embedder, embed_table
from celltyper.classification.finetuning import TrainingWindows, train_network
from celltyper.classification.model import (
    EmbeddingProbe,
    PatchModel,
    Predictor,
    build_embedder,
    mean_probabilities,
    save_patch_model,
)
from celltyper.classification.network import LinearHead, PatchNetwork, build_network
from celltyper.classification.preparing import (
    PatchParts,
    Rows,
    divide_rows,
    open_labelled,
    positive_class,
    size_of,
)
from celltyper.devices import pick_device
from celltyper.errors import DataError
from celltyper.library.files import RUN_FILE
from celltyper.losses import effective_class_weights
from celltyper.metrics.calibration import calibration_gap
from celltyper.metrics.ranking import choose_threshold
from celltyper.metrics.scoring import patch_reliability
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import read_header
from celltyper.probes import DEFAULT, PROBES, Probe, check_options, fit_probe
from celltyper.runs import LAST_FILE, check_output, resolve_encoder, start_folder

logger = logging.getLogger("celltyper")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Annotated windows with their embeddings, for any number of heads.

    Parameters
    ----------
    table : PatchTable
    embeddings : ndarray of float32, shape (n, symmetries, D), or None
        None where no head needs them.
    embedder : Embedder
    size : int
        Side of a window in pixels.
    positive : int
        Index of the positive class.
    """

    table: PatchTable
    embeddings: NDArray[np.float32] | None
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
        The run folder: ``model.safetensors`` (what was trained; never the weights it started
        from), ``config.yaml``, ``run.json``, and of a head that is trained by gradient
        ``last.safetensors`` and ``history.csv``.
    device : str
        See `celltyper.devices.pick_device`.
    resume : bool
        Go on with an unfinished run of the same config; the result equals an uninterrupted run.
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
    check_targets(config.loss, table, parts.train)
    check_output(output, config, resume=resume, overwrite=overwrite)
    if resume and (output / RUN_FILE).is_file():
        logger.info("%s is finished: nothing to resume", output)
        return output
    embedder = build_embedder(config, place)
    check_network(config, table, embedder)
    start_folder(output, config, keep=resume)
    started = time.monotonic()
    data = embed_data(config, table, embedder, progress=progress)
    embedded = round(time.monotonic() - started, 1)
    model = fit_run(
        config,
        data,
        parts,
        config.seed,
        output,
        shared=False,
        resume=resume,
        progress=progress,
        facts={"device": place.type, "seconds": {"embed": embedded}},
    )
    if isinstance(model.predictor, EmbeddingProbe):
        how = model.predictor.probe.facts()["chosen_by"]
        if how == DEFAULT:
            logger.warning("head %s: setting by %s", config.head.name, how)
    return output


def resolve_patches(config: PatchConfig, table: PatchTable) -> PatchConfig:
    """Write into a config what was decided: absolute paths, window, classes and weights.

    Raises
    ------
    ConfigError, DataError, CheckpointError
        If something cannot be decided, or the head does not take an option.
    """
    data = config.data
    if config.head.name in PROBES:
        check_options(config.head.name, config.head.options)
    if data.mpp and table.mpp is None and read_header(table.files[0]).mpp is None:
        raise DataError(
            f"{table.path}: its files state no micrometres per pixel, so no window at "
            f"{data.mpp:g} can be cut; set data.mpp in the config, not in a variant alone"
        )
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


def check_network(config: PatchConfig, table: PatchTable, embedder: Embedder) -> None:
    """Adapt a copy of the encoder, so that what cannot be is refused before anything is written.

    Raises
    ------
    ConfigError
        See `celltyper.classification.network.build_network`.
    """
    if config.head.by_gradient:
        build_network(config, embedder, len(table.classes), config.seed, shared=True)


def check_targets(loss: PatchLoss, table: PatchTable, rows: Rows, where: object = None) -> None:
    """Refuse training windows of which the experts' votes leave none to a class.

    Parameters
    ----------
    loss : PatchLoss
    table : PatchTable
    rows : ndarray of int
        Windows that train.
    where : object
        Names the division in the message; by default it is the table.

    Raises
    ------
    DataError
    """
    mass = (targets_of(table, loss) * weights_of(table, loss)[:, None])[rows].sum(axis=0)
    absent = [name for name, share in zip(table.classes, mass, strict=True) if not share > 0]
    if absent:
        raise DataError(
            f"{where or table.path}: the experts' votes leave none of the {len(rows)} training "
            f"windows to class {' or '.join(absent)}; take more slides, or set "
            "loss.targets=label and loss.agreement=false"
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
    size, positive = size_of(config.data, table), positive_class(config.data, table)
    if config.head.name == "attention":
        return Embedded(table, None, embedder, size, positive)
    found = embed_table(
        embedder,
        table,
        cache_folder() / "embeddings",
        size=size,
        mpp=config.data.mpp,
        symmetries=1 if config.head.by_gradient else config.view.symmetries,
        batch_size=config.view.batch_size,
        progress=progress,
    )
    return Embedded(table, found, embedder, size, positive)


def fit_run(
    config: PatchConfig,
    data: Embedded,
    parts: PatchParts,
    seed: int,
    output: Path,
    *,
    shared: bool,
    resume: bool,
    progress: bool,
    facts: Mapping[str, Any],
) -> PatchModel:
    """Fit a head to the training windows, and write the model and the facts of its run.

    Parameters
    ----------
    config : PatchConfig
        Resolved.
    data : Embedded
    parts : PatchParts
        Without validation windows, or with more than two classes, the threshold is one half.
    seed : int
    output : Path
        The run folder; its ``run.json`` is written last.
    shared : bool
        Whether other runs go on using the encoder of `data`.
    resume, progress : bool
    facts : mapping
        What else ``run.json`` says.

    Returns
    -------
    PatchModel
    """
    started = time.monotonic()
    own: dict[str, Any] = {}
    predictor: Predictor
    if config.head.by_gradient:
        network = build_network(config, data.embedder, len(data.table.classes), seed, shared=shared)
        if isinstance(network.head, LinearHead) and not (resume and (output / LAST_FILE).is_file()):
            assert data.embeddings is not None
            probe = _fit(config, data, parts.train, seed, "logistic")
            network.head.start_from(probe.tensors(), data.embeddings[parts.train, 0])
        targets, weights = targets_of(data.table, config.loss), weights_of(data.table, config.loss)
        sized = config.data.model_copy(update={"size": data.size})
        own["training"] = train_network(
            network,
            TrainingWindows(
                data.table,
                parts.train,
                targets,
                weights,
                config.model_copy(update={"data": sized}),
                seed,
            ),
            _class_weights(targets[parts.train], config.loss),
            config,
            output,
            resume=resume,
            progress=progress,
        )
        predictor = network
    else:
        probe = _fit(config, data, parts.train, seed, config.head.name, **config.head.options)
        predictor = EmbeddingProbe(data.embedder, probe)
        own["probe"] = probe.facts()
    model = PatchModel(
        predictor=predictor,
        config=config,
        classes=data.table.classes,
        positive=data.positive,
        threshold=0.5,
        size=data.size,
        mpp=config.data.mpp,
    )
    model = _validated(model, data, parts.val, progress=progress)
    save_patch_model(output, model)
    seconds = facts.get("seconds", {}) | {"fit": round(time.monotonic() - started, 1)}
    about = run_facts(config, data, parts, model) | own | dict(facts) | {"seconds": seconds}
    write_json(output / RUN_FILE, about)
    return model


def type_rows(
    model: PatchModel, data: Embedded, rows: Rows, *, progress: bool
) -> NDArray[np.float64]:
    """Class probabilities (m, K) of some windows, by a probe from the embeddings at hand."""
    predictor = model.predictor
    if isinstance(predictor, EmbeddingProbe) and data.embeddings is not None:
        return model.calibrated(mean_probabilities(predictor.probe, data.embeddings[rows]))
    return model.probabilities(data.table.take(rows), progress=progress)


def _validated(model: PatchModel, data: Embedded, rows: Rows, *, progress: bool) -> PatchModel:
    """The model with its calibration and, of two classes, the threshold of its probabilities."""
    settings, truth = model.config.calibration, data.table.labels[rows]
    two = len(model.classes) == 2 and len(rows) > 0
    if two and len(set((truth == data.positive).tolist())) < 2:
        raise DataError(
            f"{data.table.path}: the validation windows are all of one class, so no threshold "
            "can be chosen; raise data.val_fraction, or set it to 0"
        )
    enough = len(rows) >= settings.min_cases
    if not enough and settings.method != "none":
        logger.info(
            "class probabilities are not calibrated: %d validation windows, and "
            "calibration.min_cases is %d",
            len(rows),
            settings.min_cases,
        )
    calibrate = enough and settings.method != "none"
    if not (two or calibrate):
        return model
    found = type_rows(model, data, rows, progress=progress)
    if calibrate:
        scaling = fit_scaling(found, truth, settings.method)
        thresholds = coverage_thresholds(scaling.apply(found).max(axis=1))
        model = replace(model, calibration=Calibration(scaling, len(rows), thresholds))
        logger.info(
            "class probabilities calibrated on %d windows: %s, error %.3f before, %.3f after",
            len(rows),
            scaling.text,
            *(
                calibration_gap(patch_reliability(truth, each, data.positive))
                for each in (found, model.calibrated(found))
            ),
        )
    if not two:
        return model
    positive = model.calibrated(found)[:, data.positive]
    return replace(model, threshold=choose_threshold(truth, positive, positive=data.positive))


def _fit(
    config: PatchConfig, data: Embedded, rows: Rows, seed: int, head: str, **options: Any
) -> Probe:
    """Every symmetry of a window is a case of its own, with its share of the weight."""
    assert data.embeddings is not None
    table, symmetries = data.table, data.embeddings.shape[1]
    cases = np.repeat(rows, symmetries)
    targets = targets_of(table, config.loss)[cases]
    weights = weights_of(table, config.loss)[cases] / symmetries
    return fit_probe(
        head,
        data.embeddings[rows].reshape(len(cases), -1),
        targets,
        [table.groups[i] for i in cases],
        weights=weights,
        class_weights=config.loss.class_weights,
        seed=seed,
        **options,
    )


def _class_weights(targets: NDArray[np.float64], loss: PatchLoss) -> NDArray[np.float64]:
    """Weights of the K classes, of mean 1 over the training windows."""
    counts = targets.sum(axis=0)
    rule = "inverse" if loss.class_weights == "balanced" else loss.class_weights
    found = effective_class_weights(counts, rule)
    normalised: NDArray[np.float64] = found * counts.sum() / (found * counts).sum()
    return normalised


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
        "calibration": None if model.calibration is None else model.calibration.facts(),
        "size": model.size,
        "mpp": model.mpp,
        "encoder_passes": _encoder_passes(config, data),
        **_parameters(model.predictor),
        "data": {
            part: _part(data.table, rows)
            for part, rows in (("train", parts.train), ("val", parts.val))
            if len(rows)
        },
    }


def _parameters(predictor: Predictor) -> dict[str, int]:
    """How many numbers the model has, and how many of them were fitted."""
    if isinstance(predictor, EmbeddingProbe):
        fitted = sum(t.numel() for t in predictor.probe.tensors().values())
        frozen = sum(p.numel() for p in predictor.embedder.encoder.parameters())
        return {"parameters": frozen + fitted, "trainable_parameters": fitted}
    assert isinstance(predictor, PatchNetwork)
    weights = list(predictor.parameters())
    return {
        "parameters": sum(p.numel() for p in weights),
        "trainable_parameters": sum(p.numel() for p in weights if p.requires_grad),
    }


def _encoder_passes(config: PatchConfig, data: Embedded) -> int:
    """Windows that the encoder saw: once for embeddings, and in every step of a training."""
    kept = 0 if data.embeddings is None else int(np.prod(data.embeddings.shape[:2]))
    trained = config.train.steps * config.train.batch_size if config.head.by_gradient else 0
    return kept + trained


def _part(table: PatchTable, rows: Rows) -> dict[str, Any]:
    counts = np.bincount(table.labels[rows], minlength=len(table.classes))
    return {
        "path": str(table.path.absolute()),
        "patches": len(rows),
        "names": [table.names[i] for i in rows],
        "groups": [table.groups[i] for i in rows],
        "classes": dict(zip(table.classes, counts.tolist(), strict=True)),
    }
