"""Proof of what training changed: hashes of an encoder and of every part of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from celltyper.encoders.adapt import ADAPTS, Adapted
from celltyper.encoders.lora import is_lora
from celltyper.errors import TrainingError, unknown_name

_MAY_CHANGE: dict[str, tuple[str, ...]] = {
    "frozen": (),
    "lora": ("encoder.lora",),
    "dora": ("encoder.lora",),
    "full": ("encoder",),
    "last-n": ("encoder.trained", "encoder.trained.buffers"),
    "bias": ("encoder.trained",),
    "norm": ("encoder.trained",),
}
"""Parts of the encoder that training may change; the first it must. "full" may change all."""


def fingerprint(encoder: nn.Module) -> str:
    """SHA-256 of an encoder's base weights and statistics, by name, shape, dtype and value.

    Only what training does not change counts: a checkpoint that holds the decoder and what was
    trained can refuse an encoder that it was not trained on. Freezing or adding adapters does
    not change it. Of the buffers that are not stored with the weights, the normalisation counts;
    others (positions, masks) are computed, and another release may compute them otherwise.

    Parameters
    ----------
    encoder : nn.Module
        The encoder, on any device.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    trained = encoder.trained if isinstance(encoder, Adapted) else frozenset()
    prefix = "encoder." if isinstance(encoder, Adapted) else ""
    digest = hashlib.sha256()
    stored = encoder.state_dict(keep_vars=True)
    prepare = {n: t for n, t in encoder.named_buffers() if ".prepare." in f".{n}"}
    tensors = {
        n.removeprefix(prefix).replace(".base_layer.", "."): t
        for n, t in (stored | prepare).items()
        if n not in trained and not is_lora(n)
    }
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
        For every child ``c`` of the module: ``c`` its parameters, ``c.buffers`` its buffers;
        of an `Adapted` encoder apart from these ``c.lora`` its adapters, ``c.trained`` other
        parameters that it promised to train, ``c.trained.buffers`` the norm statistics among
        them. Parts without tensors are left out.
    """
    buffers = {name for name, _ in module.named_buffers()}
    trained = {
        f"{child}.{name}"
        for child, part in module.named_children()
        if isinstance(part, Adapted)
        for name in part.trained
    }
    digests: dict[str, Any] = {}
    for name, tensor in sorted(_tensors(module)):
        group = name.partition(".")[0]
        if is_lora(name):
            group += ".lora"
        elif name in trained:
            # by what was promised, not by what requires a gradient now
            group += ".trained"
        if name in buffers:
            group += ".buffers"
        _update(digests.setdefault(group, hashlib.sha256()), name, tensor)
    return {group: digest.hexdigest() for group, digest in sorted(digests.items())}


@dataclass(frozen=True)
class Trainability:
    """What training changed, as written into the run.

    Parameters
    ----------
    adapt : str
        The mode, as in `celltyper.encoders.adapt.adapt_encoder`.
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
    adapt : {"frozen", "lora", "dora", "full", "last-n", "bias", "norm"}
        What was promised.

    Returns
    -------
    Trainability
        The record for the run.

    Raises
    ------
    TrainingError
        If weights or buffers of the encoder changed that must not, if those promised did not,
        or if nothing at all was trained.
    """
    if adapt not in ADAPTS:
        raise unknown_name("adapt", adapt, ADAPTS)
    if before.keys() != after.keys():
        parts = ", ".join(sorted(before.keys() ^ after.keys()))
        raise TrainingError(f"the model has other parts after training than before: {parts}")
    changed = tuple(sorted(part for part in before if before[part] != after[part]))
    unchanged = tuple(sorted(part for part in before if before[part] == after[part]))
    of_encoder = [part for part in changed if part.partition(".")[0] == "encoder"]
    broken = [part for part in of_encoder if adapt != "full" and part not in _MAY_CHANGE[adapt]]
    if broken:
        raise TrainingError(
            f"adapt is {adapt!r} but training changed {broken[0]!r}: those weights must stay as "
            "they are; is one in the optimiser or in training mode?"
        )
    wanted = next(iter(_MAY_CHANGE[adapt]), None)
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
    values = tensor.detach().cpu().contiguous().view(-1)
    if values.numel():
        # as bytes, because NumPy has no bfloat16; not copied
        digest.update(values.view(torch.uint8).numpy())
