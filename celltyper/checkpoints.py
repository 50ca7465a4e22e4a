"""Delta checkpoints: what was trained, as one safetensors file, never the base weights.

A checkpoint holds the decoder, the heads and whatever of the encoder was trained (LoRA matrices,
the last blocks, or everything for ``adapt: full``), and as JSON metadata the resolved config, the
label map, the working resolution and the fingerprint of the encoder it belongs to. Nothing is ever
unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from celltyper import __version__
from celltyper.atomic import atomic_path
from celltyper.calibration import calibration_of
from celltyper.config import Config, one_line, parse_config
from celltyper.domain import domain_of
from celltyper.encoders.adapt import Adapted, freeze
from celltyper.encoders.lora import merge_lora
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import CheckpointError, ConfigError
from celltyper.library.files import (
    FORMAT,
    HEADER_KEY,
    MODEL_FILE,
    check_format,
    model_folders,
    read_header,
)
from celltyper.library.shelf import find_model
from celltyper.models import CellTyper, Ensemble, build_model

DOMAIN = "domain."
"""How the names of tensors begin that are no weights, see `celltyper.domain.Domain.tensors`."""


@dataclass(frozen=True)
class Header:
    """The metadata of a checkpoint."""

    config: dict[str, Any]
    classes: tuple[str, ...]
    colors: tuple[str, ...]
    mpp: float | None
    encoder_fingerprint: str
    calibration: dict[str, Any] | None = None
    domain: dict[str, Any] | None = None
    celltyper_version: str = __version__
    format: int = FORMAT


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """State that training may change: decoder, heads, and the adapted part of the encoder.

    Parameters
    ----------
    model : nn.Module
        With an ``encoder``.

    Returns
    -------
    dict of str to Tensor
        A subset of ``model.state_dict()``, not copied.
    """
    encoder = model.get_submodule("encoder")
    trained = encoder.trained if isinstance(encoder, Adapted) else encoder.state_dict().keys()
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("encoder.") or name.removeprefix("encoder.") in trained
    }


def save_model(
    path: Path,
    model: CellTyper,
    config: Config,
    state: Mapping[str, Tensor] | None = None,
    base: str | None = None,
) -> None:
    """Write a delta checkpoint, atomically.

    Parameters
    ----------
    path : Path
        The file to write.
    model : CellTyper
    config : Config
        The resolved config of the run.
    state : mapping of str to Tensor or None
        Taken instead of the model's own trained state (an average over steps, say).
    base : str or None
        Fingerprint of the encoder, if known: taking it of a large encoder lasts seconds.
    """
    header = Header(
        config=config.model_dump(mode="json"),
        classes=model.classes,
        colors=model.colors,
        mpp=model.mpp,
        encoder_fingerprint=fingerprint(model.encoder) if base is None else base,
        calibration=None if model.calibration is None else model.calibration.facts(),
        domain=None if model.domain is None else model.domain.facts(),
    )
    state = trained_state(model) if state is None else state
    known = {} if model.domain is None else model.domain.tensors()
    of_domain = {f"{DOMAIN}{name}": torch.from_numpy(array) for name, array in known.items()}
    write_tensors(path, {**state, **of_domain}, asdict(header))


def load_model(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    encoder_weights: str | None = None,
    allow_code: bool = False,
    merge: bool = True,
) -> CellTyper:
    """Load a trained model from a run folder or a checkpoint file, or an ensemble.

    Parameters
    ----------
    path : str, Path or None
        What ``celltyper train`` wrote, or the ``model.safetensors`` in it; of the folder of a
        protocol, all finished runs together, see `celltyper.models.Ensemble`. A plain word may be
        the name of a model, and None is that of the box: see `celltyper.library.shelf.find_model`.
    device : str or torch.device
        Where to put the model.
    encoder_weights : str or None
        File or folder of the encoder's base weights, if they are not where they were at training.
    allow_code : bool
        Whether a decoder or instance method named ``package.module:Class`` in the checkpoint may
        be imported. Only for checkpoints you trust.
    merge : bool
        Fold adapters into the encoder, so that it is made of plain layers only. Without, they
        can be trained further or saved by `celltyper.encoders.lora.save_lora`.

    Returns
    -------
    CellTyper
        In evaluation mode.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, of another format, names code that was not allowed, or
        does not fit the encoder.
    """
    path = find_model(path)
    models = [
        _load(folder, device, encoder_weights=encoder_weights, allow_code=allow_code, merge=merge)
        for folder in model_folders(path)
    ]
    try:
        return Ensemble(models).eval() if len(models) > 1 else models[0]
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _load(
    path: Path,
    device: str | torch.device,
    *,
    encoder_weights: str | None,
    allow_code: bool,
    merge: bool,
) -> CellTyper:
    file = path / MODEL_FILE if path.is_dir() else path
    state, values = read_tensors(file)
    # both before the rest, which another format or task holds in another way
    if values.get("task", "cells") != "cells":
        raise CheckpointError(f"{file} types patches: it does not find cells on images")
    check_format(values, file)
    try:
        header = Header(**values)
        config = parse_config(header.config, where=f"config in {file}")
        calibration = calibration_of(header.calibration)
        of_domain = {k: state.pop(k).numpy() for k in list(state) if k.startswith(DOMAIN)}
        known = {name.removeprefix(DOMAIN): array for name, array in of_domain.items()}
        domain = domain_of(header.domain, known)
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is not a celltyper model: {one_line(error)}") from error
    code = [n for n in (config.decoder.name, config.instances.method) if ":" in n]
    if code and not allow_code:
        raise CheckpointError(
            f"{file} names code of its author ({', '.join(code)}); if you trust it, "
            "pass --allow-code (allow_code=True in Python)"
        )
    if config.encoder.adapt == "full" and encoder_weights is not None:
        raise CheckpointError(f"{file} holds the whole encoder (adapt: full): leave out --weights")
    if config.encoder.adapt == "full" and config.encoder.weights != "twin":
        # Every weight of the encoder is in the checkpoint; the base need not be at hand.
        encoder_weights = "random"
    # The adapter that training started from is not needed: all its tensors were trained.
    lora = config.encoder.lora.model_copy(update={"adapter": None})
    update = {"lora": lora} | ({"weights": encoder_weights} if encoder_weights else {})
    config = config.model_copy(update={"encoder": config.encoder.model_copy(update=update)})
    model = build_model(config, header.classes, header.mpp, header.colors)
    found = fingerprint(model.encoder)
    if config.encoder.adapt != "full" and found != header.encoder_fingerprint:
        raise CheckpointError(
            f"{file} was trained on other weights of {config.encoder.name} (fingerprint "
            f"{header.encoder_fingerprint[:12]}, here {found[:12]}); pass the right file with "
            "--weights"
        )
    load_state(model, state, where=str(file))
    model.calibration, model.domain = calibration, domain
    if merge and config.encoder.adapt in ("lora", "dora"):
        model.encoder = freeze(merge_lora(model.encoder))
    return model.to(device).eval()


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Put trained state back into a model; every expected tensor must be there, and no other.

    Parameters
    ----------
    model : CellTyper
    state : mapping of str to Tensor
    where : str
        Names the file in error messages.

    Raises
    ------
    CheckpointError
        Listing tensors that are missing, left over or of another shape.
    """
    expected = trained_state(model)
    wrong = sorted(
        {f"{k} is missing" for k in expected.keys() - state.keys()}
        | {f"{k} is left over" for k in state.keys() - expected.keys()}
        | {
            f"{k} is {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}"
            for k in expected.keys() & state.keys()
            if state[k].shape != expected[k].shape
        }
    )
    if wrong:
        raise CheckpointError(
            f"{where} does not fit the model: {'; '.join(wrong[:5])}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state[name])


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file, atomically."""
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(own, temporary, metadata={HEADER_KEY: json.dumps(header)})
        except SafetensorError as error:
            # It hides the system's error in its text, so a full disk would look like a bad file.
            found = re.search(r"(?:os error|code:) (\d+)", str(error))
            code = int(found[1]) if found else errno.EIO
            raise OSError(code, os.strerror(code)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises
    ------
    CheckpointError
        If the file is damaged or was not written by celltyper.
    """
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
