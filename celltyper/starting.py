"""Training that starts from a trained model: its network, and the weights of all of it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from celltyper.checkpoints import read_tensors
from celltyper.config import Config, Encoder, Infer, Section, parse_config
from celltyper.errors import CheckpointError, ConfigError
from celltyper.library.files import check_format, read_header, task_of_run
from celltyper.library.shelf import OF_MODEL, pinned, weights_of
from celltyper.models import CellTyper
from celltyper.types import PHENOTYPE

OF_TRAINING = ("adapt", "lora", "last_n", "layer_decay", "checkpointing", "cache", "cache_gb")
"""What of the encoder's section says how it is trained, not what it is."""
_PARTS = ("decoder.", "instance_decoder.", "heads.")

Part = TypeVar("Part", bound=Section)


def with_network_of(config: Config) -> Config:
    """Take encoder, decoder, instance method and resolution from the model to start from.

    How the encoder is trained, and everything about data, loss and optimisation, is the config's.

    Parameters
    ----------
    config : Config
        With ``start``.

    Returns
    -------
    Config
        With ``start`` as `pinned` writes it; given again, it stays as it is.

    Raises
    ------
    ConfigError
        If the config asks for another network than the model has.
    CheckpointError
        If there is no such model, it types patches, or it does not hold its encoder.
    """
    assert config.start is not None
    file = Path(weights_of(f"{OF_MODEL}{config.start}"))
    if not file.is_file():
        raise CheckpointError(f"start: no model at {config.start}; 'celltyper models' lists names")
    if task_of_run(file) != "cells":
        raise CheckpointError(f"start: {config.start} types patches: it finds no cells")
    header = read_header(file)
    check_format(header, file)
    old = parse_config(header["config"], where=f"config in {file}")
    source = pinned(f"{OF_MODEL}{config.start}")
    start = source.removeprefix(OF_MODEL)
    encoder = _encoder_of(old.encoder, source)
    how = {key: getattr(config.encoder, key) for key in OF_TRAINING}
    network = Encoder(**encoder.model_dump() | how)
    _refuse_others("encoder", config.encoder, network)
    _refuse_others("decoder", config.decoder, old.decoder)
    _refuse_others("instances", config.instances, old.instances)
    mpp = header.get("mpp")
    if config.data.mpp not in (None, mpp):
        raise ConfigError(
            f"start: {start} works at {mpp} micrometres per pixel: leave data.mpp out, images of "
            "another resolution are rescaled"
        )
    return config.model_copy(
        update={
            "start": start,
            "data": config.data.model_copy(update={"mpp": mpp}),
            "encoder": network,
            "decoder": old.decoder,
            "instances": old.instances,
            "infer": old.infer if config.infer == Infer() else config.infer,
        }
    )


def start_decoder(model: CellTyper, start: str) -> list[str]:
    """Fill decoders and heads with those of a trained model.

    Of the last layer of the phenotypes, rows go by the names of the classes.

    Parameters
    ----------
    model : CellTyper
        Built from a config of `with_network_of`; changed in place.
    start : str
        The model, by name or path.

    Returns
    -------
    list of str
        Classes of `model` that the other one does not know; their rows stay random.

    Raises
    ------
    CheckpointError
        If the tensors are of another layout.
    """
    file = Path(weights_of(f"{OF_MODEL}{start}"))
    tensors, header = read_tensors(file)
    rows = {name: row for row, name in enumerate(["background", *header["classes"]])}
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_PARTS)}
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(_PARTS)}
    for name in (f"heads.{PHENOTYPE}.{kind}" for kind in ("weight", "bias")):
        mixed = own[name].clone()
        for row, known in enumerate(["background", *model.classes]):
            if known in rows:
                mixed[row] = found[name][rows[known]].to(mixed.dtype)
        found[name] = mixed
    if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in found.items()}:
        raise CheckpointError(f"start: the decoder in {file} is of another layout")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
    return [name for name in model.classes if name not in rows]


def _encoder_of(old: Encoder, source: str) -> Encoder:
    """The encoder of a model, and where its weights are."""
    if old.weights == "twin":
        raise CheckpointError(f"start: the encoder of {source.removeprefix(OF_MODEL)} is a twin")
    if old.adapt == "full":
        return old.model_copy(update={"weights": source, "revision": None})
    if old.adapt == "frozen":
        return old
    raise CheckpointError(
        f"start: the encoder of {source.removeprefix(OF_MODEL)} was adapted by {old.adapt}; start "
        "from what 'celltyper export RUN --format half --whole' writes of it"
    )


def _refuse_others(name: str, given: Part, found: Part) -> None:
    """Refuse what is neither left out nor as the model has it."""
    default = type(given)()
    for key in type(given).model_fields:
        value = getattr(given, key)
        if value not in (getattr(default, key), getattr(found, key)):
            raise ConfigError(
                f"{name}.{key}={value} is not what the model to start from has "
                f"({getattr(found, key)}): leave it out, or train without start"
            )
