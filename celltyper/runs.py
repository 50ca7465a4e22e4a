"""The run folder: what is in it, who may write to it, what it says about itself."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from celltyper import __version__
from celltyper.atomic import is_draft, make_folder, write_text
from celltyper.config import Config, Encoder, Lora, Section, dump_config, load_config
from celltyper.datasets import Dataset
from celltyper.encoders import find_card
from celltyper.encoders.folders import commit_of
from celltyper.encoders.hub import HUB_NAMES, MADE_NAMES, find_weights
from celltyper.encoders.lora import read_adapter
from celltyper.errors import ConfigError
from celltyper.labels import label_ids
from celltyper.library.files import CONFIG_FILE, MODEL_FILE, RUN_FILE
from celltyper.library.shelf import pinned, weights_of
from celltyper.models import CellTyper

HISTORY_FILE = "history.csv"
LAST_FILE = "last.safetensors"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.json"
SPLIT_FILE = "split.json"
"""Names of a run's images by part, where a protocol divided them."""


@dataclass
class Progress:
    """Where a run stands; stored in every last checkpoint."""

    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    seconds: float = 0.0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    digest: dict[str, str] = field(default_factory=dict)


def check_log(log: str) -> None:
    """Refuse a log whose package is not installed, before anything is trained."""
    if log == "tensorboard" and find_spec("tensorboard") is None:
        raise ConfigError(
            "train.log=tensorboard needs the package tensorboard: "
            "pip install 'celltyper[tensorboard]', or use train.log=csv"
        )


def check_output(output: Path, config: Section, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something else than the run to be continued.

    Parameters
    ----------
    output : Path
        The run folder to be.
    config : Section
        A whole config, resolved.
    resume, overwrite : bool
        What may be done with a run that is there.

    Raises
    ------
    ConfigError
        Saying what the folder holds and which option to pass.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give a folder for the run")
    if not output.is_dir() or not any(_is_content(path) for path in output.iterdir()):
        return
    if not (output / CONFIG_FILE).is_file():
        raise ConfigError(f"{output} holds other files; give an empty or new folder")
    if overwrite:
        return
    if not resume:
        raise ConfigError(
            f"{output} already holds a run; pass --resume to go on with it, --overwrite to start "
            "over, or another folder"
        )
    old = load_config(output / CONFIG_FILE, (), type(config))
    if old != config:
        raise ConfigError(
            f"{output} was started with another config ({difference(old, config)}); "
            "resume with the same one, or give another folder"
        )


def evaluation_folder(folder: Path, *, overwrite: bool) -> Path:
    """Give the folder of an evaluation back, if it may be written.

    Raises
    ------
    ConfigError
        If it is a file, or holds an evaluation that is not to be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the evaluation with -o")
    if (folder / METRICS_FILE).exists() and not overwrite:
        raise ConfigError(
            f"{folder} already holds an evaluation; pass --overwrite or another folder with -o"
        )
    return folder


def resolve_encoder(encoder: Encoder) -> Encoder:
    """Write into a config which weights were found: absolute paths, commit, the adapter's own.

    Parameters
    ----------
    encoder : Encoder

    Returns
    -------
    Encoder

    Raises
    ------
    ConfigError, CheckpointError
        If the encoder is unknown, or its weights or adapter cannot be had.
    """
    weights, revision = encoder.weights, encoder.revision
    if weights not in MADE_NAMES:
        # which commit it was, so that the run is pinned even where the card is not
        file = find_weights(find_card(encoder.name), weights_of(weights), revision)
        revision = commit_of(file) or revision
        if weights not in HUB_NAMES:
            weights = pinned(weights)
    own = {"weights": weights, "revision": revision, "lora": _with_adapter(encoder.lora)}
    return encoder.model_copy(update=own)


def _with_adapter(lora: Lora) -> Lora:
    """Write into the config what the adapter to start from decides; the folder may go later."""
    if lora.adapter is None:
        return lora
    found, default = read_adapter(lora.adapter), Lora()
    decided = ("rank", "alpha", "targets")
    return lora.model_copy(
        update={"adapter": lora.adapter.absolute()}
        | {k: getattr(found, k) for k in decided if getattr(lora, k) == getattr(default, k)}
    )


def start_folder(output: Path, config: Section, *, keep: bool) -> None:
    """Create the run folder and write its config; files of an earlier run go unless kept."""
    make_folder(output)
    for name in () if keep else (MODEL_FILE, LAST_FILE, HISTORY_FILE, RUN_FILE):
        (output / name).unlink(missing_ok=True)
    write_text(output / CONFIG_FILE, dump_config(config))


def write_history(output: Path, history: Sequence[Mapping[str, float]], log: str) -> None:
    """Write ``history.csv``, and the newest row to TensorBoard if the config says so."""
    columns = list(history[0]) if history else []
    rows = [",".join(f"{row[c]:.6g}" for c in columns) for row in history]
    write_text(output / HISTORY_FILE, "\n".join([",".join(columns), *rows]) + "\n")
    if log == "tensorboard" and history:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(output / "tensorboard")) as writer:
            for name, value in history[-1].items():
                writer.add_scalar(name, value, int(history[-1]["step"]))


def run_facts(
    config: Config, model: CellTyper, state: Progress, data: Mapping[str, Dataset]
) -> dict[str, Any]:
    """Say what ran on what, for ``run.json`` and the report.

    Parameters
    ----------
    config : Config
        Resolved.
    model : CellTyper
        As trained.
    state : Progress
    data : mapping of str to Dataset
        The images used, by part.

    Returns
    -------
    dict
        JSON-ready.
    """
    device = model.device
    return {
        "celltyper": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "classes": list(model.classes),
        "mpp": model.mpp,
        "calibration": None if model.calibration is None else model.calibration.facts(),
        "steps": state.step,
        "best_step": state.best_step,
        "best": {config.train.metric: state.best if math.isfinite(state.best) else None},
        "seconds": round(state.seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "data": {
            part: {
                "path": str(dataset.path.absolute()),
                "images": len(dataset),
                "names": list(dataset.names),
                "groups": [dataset.groups[name] for name in dataset.names],
                "cells": cells_per_class(dataset),
            }
            for part, dataset in data.items()
        },
    }


def cells_per_class(data: Dataset) -> dict[str, int]:
    """Count the annotated cells of every class.

    Parameters
    ----------
    data : Dataset

    Returns
    -------
    dict of str to int
    """
    total = np.zeros(len(data.classes) + 1, np.int64)
    for sample in data:
        cells = sample.known_phenotypes[label_ids(sample.labels)]
        total += np.bincount(cells, minlength=len(total))
    return dict(zip(data.classes, total[1:].tolist(), strict=True))


def difference(old: BaseModel, new: BaseModel) -> str:
    """First three values that differ, ``key: old then, new now``."""
    before, now = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    changed = [
        f"{k}: {before.get(k)!r} then, {v!r} now" for k, v in now.items() if before.get(k) != v
    ]
    return "; ".join(changed[:3])


def _is_content(path: Path) -> bool:
    """Say whether a file was put there by anyone but a protocol or a killed write."""
    return path.name not in (SPLIT_FILE, LOCK_FILE) and not is_draft(path)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        flat |= inner or {f"{prefix}{key}": value}
    return flat
