"""What training may change in an encoder, and the proof that nothing else changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from celltyper.errors import ConfigError, TrainingError, unknown_name

# layers inside a block of timm; older and newer transformers name them differently
_INPUT = r"attn\.(qkv|q|k|v|kv|q_proj|k_proj|v_proj)"
_TARGETS = {
    "attention": _INPUT,
    "attention+output": rf"{_INPUT}|attn\.proj",
    "attention+mlp": rf"{_INPUT}|attn\.proj|mlp\.\w+",
}


class Frozen(nn.Module):
    """An encoder that nothing changes: no gradient, and always in evaluation mode.

    ``requires_grad_(False)`` alone would leave dropout, drop-path and norm statistics running
    in training.

    Parameters
    ----------
    encoder : nn.Module
        Any encoder; its parameters stop requiring gradients.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        plain: Any = encoder
        self.encoder = plain.requires_grad_(False).eval()
        self.channels: list[int] = list(plain.channels)
        self.patch_size: int = plain.patch_size
        self.embed_dim: int | None = getattr(plain, "embed_dim", None)
        self.card = getattr(plain, "card", None)
        self.training = False

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode, whatever is asked."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the encoder, without gradient."""
        maps: list[Tensor] = self.encoder(images)
        return maps

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Pooled embedding of the encoder, without gradient."""
        embedding: Tensor = self.encoder.embed(images)
        return embedding


def freeze(encoder: nn.Module) -> Frozen:
    """Freeze an encoder: no gradient, no dropout, no running statistics. Use what it returns."""
    return encoder if isinstance(encoder, Frozen) else Frozen(encoder)


def add_lora(
    encoder: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.1,
    targets: str | Sequence[str] = "attention",
) -> nn.Module:
    """Add low-rank adapters (doi:10.48550/arXiv.2106.09685) to the blocks and freeze the rest.

    Only linear layers inside ``blocks.N`` are touched, never the patch embedding, whose layer
    is also called ``proj``.

    Parameters
    ----------
    encoder : nn.Module
        The encoder; changed in place. Until trained, its output stays the same.
    rank : int
        Rank of the update.
    alpha : float
        The update is scaled by ``alpha / rank``.
    dropout : float
        Dropout before the update, in training.
    targets : {"attention", "attention+output", "attention+mlp"} or sequence of str
        Query, key and value; with the attention's output projection too; or all linear layers
        of the block. A sequence names linear layers in full, as in ``named_modules()``.

    Returns
    -------
    nn.Module
        The encoder.

    Raises
    ------
    ConfigError
        If an option is wrong or no layer fits.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1 or not 0 <= dropout < 1 or alpha <= 0:
        raise ConfigError(
            f"lora needs rank >= 1, alpha > 0 and 0 <= dropout < 1, got {rank}, {alpha}, {dropout}"
        )
    names = _lora_layers(encoder, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # a pattern of whole names: peft would match the end of a name otherwise
        target_modules="|".join(re.escape(name) for name in names),
    )
    encoder.requires_grad_(False)
    inject_adapter_in_model(config, encoder)
    return encoder


def merge_lora(encoder: nn.Module) -> nn.Module:
    """Fold adapters into the weights, in place: same output, plain layers, names as before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(n, m) for n, m in encoder.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, layer.get_base_layer())
    return encoder


def is_lora(name: str) -> bool:
    """Tell whether a parameter's name belongs to an adapter."""
    return ".lora_" in f".{name}"


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


def _lora_layers(encoder: nn.Module, targets: str | Sequence[str]) -> list[str]:
    linear = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if not isinstance(targets, str):
        lacking = [name for name in targets if name not in linear]
        if lacking or not targets:
            raise ConfigError(f"lora targets {lacking} are no linear layers of the encoder")
        return list(targets)
    if targets not in _TARGETS:
        raise unknown_name("lora targets", targets, _TARGETS)
    pattern = re.compile(rf"(^|\.)blocks\.\d+\.({_TARGETS[targets]})$")
    found = [name for name in linear if pattern.search(name)]
    if not found:
        raise ConfigError(
            f"lora targets {targets!r}: the encoder has no such linear layers in blocks.N, as "
            "timm names them; name the layers in full instead"
        )
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    # as bytes, because NumPy has no bfloat16
    values = tensor.detach().cpu().contiguous().view(-1)
    digest.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")
