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


def is_half(path: Path) -> bool:
    """Whether a model's file holds weights in half precision."""
    with safe_open(path, framework="np") as file:
        names = file.keys()
        return any(file.get_slice(name).get_dtype() == "F16" for name in names)
