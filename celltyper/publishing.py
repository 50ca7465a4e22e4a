"""A model to hand on: in half precision, and with all that is needed to load it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from celltyper.atomic import make_folder, write_text
from celltyper.checkpoints import DOMAIN, load_model, read_tensors, write_tensors
from celltyper.config import Encoder
from celltyper.encoders.adapt import Adapted
from celltyper.encoders.cards import card_of_hub_id
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import ConfigError, RunError
from celltyper.exporting import Exported, WholeModel, check_folder, largest_difference
from celltyper.library.cards import CARD_FILE
from celltyper.library.files import CONFIG_FILE, MODEL_FILE, RUN_FILE, model_folders
from celltyper.library.shelf import find_model
from celltyper.models import CellTyper

HALF_TOLERANCE = 0.01
"""Largest difference to the model itself, over all pixels of all maps, that a copy may have."""


def export_half(
    source: str | Path,
    folder: str | Path,
    *,
    whole: bool = False,
    overwrite: bool = False,
    encoder_weights: str | None = None,
    allow_code: bool = False,
) -> Exported:
    """Write a model in half precision, half as large, to be loaded as the run itself is.

    Weights of two or more axes are rounded to float16; norms, biases and statistics are a
    hundredth of the bytes and stay as they are. The model works in float32 all the same. Its maps
    are compared with those of the run as in `export_model`, up to `HALF_TOLERANCE`.

    Parameters
    ----------
    source : str or Path
        Run folder or checkpoint.
    folder : str or Path
        Gets ``model.safetensors``, and ``card.yaml``, ``config.yaml`` and ``run.json`` of the run.
    whole : bool
        Put the encoder's own weights into the file, adapters merged, so that nothing else is
        needed to load it. It is then as if the encoder had been trained as a whole
        (``adapt: full``). Its licence must allow to pass it on.
    overwrite : bool
        Write into a folder that is there.
    encoder_weights, allow_code
        See `celltyper.load_model`.

    Returns
    -------
    Exported
        With the largest difference and, as facts, the header of the file.

    Raises
    ------
    ConfigError
        If the folder is there, the source is an ensemble, or `whole` would still need the hub.
    CheckpointError
        If the source cannot be loaded.
    RunError
        If a weight is too large for half precision, or the maps differ by more.
    """
    folder = Path(folder)
    check_folder(folder, overwrite=overwrite)
    run, *more = model_folders(find_model(source))
    if more:
        raise ConfigError(f"{source} is an ensemble of {1 + len(more)} models: export one")
    file = run / MODEL_FILE if run.is_dir() else run
    tensors, header = read_tensors(file)
    if whole:
        _check_architecture(header)
    model = load_model(run, encoder_weights=encoder_weights, allow_code=allow_code)
    if whole:
        known = {n: t for n, t in tensors.items() if n.startswith(DOMAIN)}
        tensors, header = _with_encoder(model, header)
        tensors |= known
    # distances are products of very small and very large numbers
    rounded = {n: t if n.startswith(DOMAIN) else _half(n, t) for n, t in tensors.items()}
    make_folder(folder.absolute().parent)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=folder.absolute().parent) as work:
        draft = Path(work) / MODEL_FILE
        write_tensors(draft, rounded, header)
        own = None if whole else encoder_weights
        copied = load_model(draft, encoder_weights=own, allow_code=allow_code)
        difference = largest_difference(WholeModel(model), WholeModel(copied), model.tile)
        if not difference <= HALF_TOLERANCE:
            raise RunError(
                f"{folder} was not written: in half precision its maps differ from the model's by "
                f"up to {difference:.2g}, more than {HALF_TOLERANCE:g}"
            )
        make_folder(folder)
        for beside in (CARD_FILE, CONFIG_FILE, RUN_FILE):
            if (file.parent / beside).is_file():
                write_text(folder / beside, (file.parent / beside).read_text(encoding="utf-8"))
        draft.replace(folder / MODEL_FILE)
    return Exported(folder / MODEL_FILE, difference, header)


def _check_architecture(header: Mapping[str, Any]) -> None:
    """Refuse an encoder whose architecture only its repository tells."""
    name = header.get("config", {}).get("encoder", {}).get("name", "")
    if "/" in name and not name.startswith("timm/") and card_of_hub_id(name) is None:
        raise ConfigError(
            f"--whole: the architecture of {name} would still come from the hub; train with "
            "timm/NAME and its weights by encoder.weights=PATH"
        )


def _with_encoder(
    model: CellTyper, header: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a model that needs no other file."""
    encoder = model.encoder.encoder if isinstance(model.encoder, Adapted) else model.encoder
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith("encoder.")}
    tensors |= {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    old = Encoder(**header["config"]["encoder"])
    new = Encoder(
        name=old.name,
        weights=old.weights if old.weights == "twin" else "random",
        mpp=old.mpp,
        adapt="full",
        options=old.options,
    )
    config = header["config"] | {"encoder": new.model_dump(mode="json")}
    return tensors, {**header, "config": config, "encoder_fingerprint": fingerprint(encoder)}


def _half(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    rounded = tensor.half()
    if not rounded.isfinite().all():
        raise RunError(f"weights {name} are too large for half precision, or not finite")
    return rounded
