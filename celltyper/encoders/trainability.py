"""Proof of what training changed: hashes of an encoder and of every part of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from celltyper.encoders.adapt import Frozen, is_lora
from celltyper.errors import TrainingError, unknown_name


def fingerprint(encoder: nn.Module) -> str:
    """SHA-256 of an encoder's base weights and buffers, by name, shape, dtype and value.

    Freezing or adding adapters does not change it, so a checkpoint that holds only decoder and
    adapters can refuse an encoder that it was not trained on.

    Parameters
    ----------
    encoder : nn.Module
        The encoder, on any device.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    inner = encoder.encoder if isinstance(encoder, Frozen) else encoder
    digest = hashlib.sha256()
    tensors = {n.replace(".base_layer.", "."): t for n, t in _tensors(inner) if not is_lora(n)}
    for name in sorted(tensors):
        _update(digest, name, tensors[name])
    return digest.hexdigest()


def parameter_digest(module: nn.Module) -> dict[str, str]:
    """SHA-256 of every part of a model, to compare before and after training.

    Parameters
    ----------
    module : nn.Module
        The model, with its encoder as the child ``encoder``.

    Returns
    -------
    dict of str to str
        For every child ``c`` of the module: ``c`` its parameters, ``c.lora`` its adapters,
        ``c.buffers`` its buffers; parts without tensors are left out.
    """
    buffers = {name for name, _ in module.named_buffers()}
    digests: dict[str, Any] = {}
    for name, tensor in sorted(_tensors(module)):
        group = name.partition(".")[0]
        if name in buffers:
            group += ".buffers"
        elif is_lora(name):
            group += ".lora"
        _update(digests.setdefault(group, hashlib.sha256()), name, tensor)
    return {group: digest.hexdigest() for group, digest in sorted(digests.items())}


@dataclass(frozen=True)
class Trainability:
    """What training changed, as written into the run.

    Parameters
    ----------
    adapt : str
        "frozen", "lora" or "full".
    changed, unchanged : tuple of str
        Parts of the model by the names of `parameter_digest`.
    digests : dict of str to str
        SHA-256 of every part after training.
    """

    adapt: str
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    digests: Mapping[str, str]


def check_trainability(
    before: Mapping[str, str], after: Mapping[str, str], adapt: str
) -> Trainability:
    """Check that training changed what it should and nothing else.

    Parameters
    ----------
    before, after : mapping of str to str
        `parameter_digest` of the model around training.
    adapt : {"frozen", "lora", "full"}
        What was promised.

    Returns
    -------
    Trainability
        The record for the run.

    Raises
    ------
    TrainingError
        If frozen weights or buffers changed, if the base below LoRA changed, if the adapters or
        a full encoder did not, or if nothing at all was trained.
    """
    if adapt not in ("frozen", "lora", "full"):
        raise unknown_name("adapt", adapt, ("frozen", "lora", "full"))
    if before.keys() != after.keys():
        parts = ", ".join(sorted(before.keys() ^ after.keys()))
        raise TrainingError(f"the model has other parts after training than before: {parts}")
    changed = tuple(sorted(part for part in before if before[part] != after[part]))
    unchanged = tuple(sorted(part for part in before if before[part] == after[part]))
    if adapt in ("frozen", "lora"):
        for part in ("encoder", "encoder.buffers", *(["encoder.lora"] * (adapt == "frozen"))):
            if part in changed:
                raise TrainingError(
                    f"adapt is {adapt!r} but training changed {part!r}: the encoder's weights "
                    "must stay as they are; is it in the optimiser or in training mode?"
                )
    wanted = {"frozen": None, "lora": "encoder.lora", "full": "encoder"}[adapt]
    if wanted is not None and wanted not in changed:
        reason = "did not change" if wanted in before else "is not there"
        raise TrainingError(f"adapt is {adapt!r} but {wanted!r} {reason} in training")
    if all(part.endswith(".buffers") for part in changed):
        raise TrainingError("training changed no weights at all; is the learning rate zero?")
    return Trainability(adapt, changed, unchanged, dict(after))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    # as bytes, because NumPy has no bfloat16
    values = tensor.detach().cpu().contiguous().view(-1)
    digest.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")
