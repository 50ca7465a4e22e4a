"""What the file of a trained model says of itself, read without its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from celltyper.config import one_line
from celltyper.errors import CheckpointError

FORMAT = 1
"""Of the checkpoints that this version writes and reads."""
CONFIG_FILE = "config.yaml"
MODEL_FILE = "model.safetensors"
PROTOCOL_FILE = "protocol.json"
RUN_FILE = "run.json"
HEADER_KEY = "celltyper"


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a model: config, classes, resolution, version.

    Parameters
    ----------
    path : Path
        The ``model.safetensors`` of a run.

    Returns
    -------
    dict

    Raises
    ------
    CheckpointError
        If the file is damaged or was not written by celltyper.
    """
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"{path} is an exported model, which finds cells on images alone: give the run that "
            "it was made of"
        )
    try:
        with safe_open(path, framework="np") as file:
            return dict(json.loads((file.metadata() or {})[HEADER_KEY]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged or was not written by celltyper ({one_line(error)}); "
            "give another file, or train again with --overwrite"
        ) from error


def check_format(header: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a format that this version does not read.

    Raises
    ------
    CheckpointError
        Naming the version that does.
    """
    if header.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{where} has checkpoint format {header['format']}, this celltyper reads {FORMAT}; "
            f"use celltyper {header.get('celltyper_version', 'of another version')}"
        )


def model_folders(path: str | Path) -> list[Path]:
    """Run folders that a path stands for: its own, or those of the protocol that it holds.

    Parameters
    ----------
    path : str or Path
        A run folder, the ``model.safetensors`` in it, the folder of a protocol, or that of one of
        its variants.

    Returns
    -------
    list of Path
        One, or all finished runs of the protocol that train on all of their data.

    Raises
    ------
    CheckpointError
        If there is no model, or the protocol compares several variants.
    """
    path = Path(path)
    if path.is_file() or (path / MODEL_FILE).is_file():
        return [path]
    plan = next((p for p in (path, path.parent) if (p / PROTOCOL_FILE).is_file()), None)
    if plan is None:
        raise CheckpointError(f"no model at {path}: give a folder that 'celltyper train' wrote")
    try:
        entries = json.loads((plan / PROTOCOL_FILE).read_text(encoding="utf-8"))["runs"]
        runs = [(plan / e["path"], e["variant"]) for e in entries if e["fraction"] == 1]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{plan / PROTOCOL_FILE} is damaged: {one_line(error)}") from error
    runs = [run for run in runs if run[0].is_relative_to(path)]
    variants = sorted({variant for _, variant in runs})
    if len(variants) > 1:
        raise CheckpointError(f"{path} compares {', '.join(variants)}: give {path / variants[0]}")
    found = [folder for folder, _ in runs if (folder / MODEL_FILE).is_file()]
    if not found:
        raise CheckpointError(f"{path} holds no finished run: go on with train --resume")
    return found


def task_of_run(path: str | Path) -> str:
    """Say what a trained model does, without loading it.

    Parameters
    ----------
    path : str or Path
        As in `model_folders`.

    Returns
    -------
    str
        ``"patches"`` if it types patches, ``"cells"`` if it finds cells, or if that will show when
        the file is loaded.

    Raises
    ------
    CheckpointError
        As `model_folders`.
    """
    found = model_folders(path)[0]
    try:
        header = read_header(found / MODEL_FILE if found.is_dir() else found)
    except CheckpointError:
        return "cells"
    return str(header.get("task", "cells"))


def is_half(path: Path) -> bool:
    """Whether a model's file holds weights in half precision."""
    with safe_open(path, framework="np") as file:
        names = file.keys()
        return any(file.get_slice(name).get_dtype() == "F16" for name in names)
