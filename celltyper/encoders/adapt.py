"""What training may change in an encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from celltyper.errors import ConfigError, unknown_name

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
