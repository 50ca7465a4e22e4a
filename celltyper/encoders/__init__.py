"""Encoders: vision transformers that give feature maps and a pooled embedding.

An encoder is any ``nn.Module`` with ``channels`` (list of int), ``patch_size`` (int),
``forward(images) -> list of (B, C_i, ceil(H / p), ceil(W / p))`` and, for patch mode,
``embed(images) -> (B, embed_dim)``. Images are float32 RGB in [0, 1]; the encoder normalises.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from celltyper.encoders.cards import EncoderCard, card_of_hub_id, list_cards, load_card
from celltyper.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from celltyper.encoders.vit import TimmViT

__all__ = ["EncoderCard", "find_card", "list_cards", "load_card", "load_encoder"]

Adapt = Literal["frozen", "lora", "full"]

_LORA_OPTIONS = ("rank", "alpha", "dropout", "targets")
_CARD_OPTIONS = (
    "feature_blocks",
    "embedding",
    "mean",
    "std",
    "input_size",
    "resize",
    "interpolation",
    "scales",
)


def load_encoder(
    name: str,
    weights: str | Path = "auto",
    adapt: Adapt = "frozen",
    seed: int = 0,
    lora: Mapping[str, Any] | None = None,
    magnify: float = 1.0,
    **options: Any,
) -> nn.Module:
    """Build an encoder, fill it with weights, and say what training may change.

    Parameters
    ----------
    name : str
        An encoder card (see `list_cards`), ``timm/NAME`` for any timm vision transformer, or a
        hub id such as ``owner/name``.
    weights : str or Path
        "auto" or "hub": the published weights. "random": the same architecture, random.
        "twin": a tiny random model of the same layout, for tests. Anything else is the path of
        a local ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file. Nothing is ever random
        unless asked for.
    adapt : {"frozen", "lora", "full"}
        What training may change: nothing, low-rank adapters, or all weights.
    seed : int
        Seed of random weights and adapters; the global random state is left alone.
    lora : mapping, optional
        Options of `celltyper.encoders.adapt.add_lora`: rank, alpha, dropout, targets. Used
        with ``adapt="lora"`` only.
    magnify : float
        Pixels that the network sees per pixel of the image, along a side, for feature maps:
        2 shows it an image of 0.5 micrometres per pixel at 0.25. Rounded so that a patch is a
        whole number of pixels of the image.
    **options
        Replace what the card says: feature_blocks, embedding, mean, std, input_size, resize,
        interpolation, scales.

    Returns
    -------
    nn.Module
        The encoder, in evaluation mode.

    Raises
    ------
    ConfigError
        If the name, `adapt` or a LoRA option is not known.
    CheckpointError
        If the weights cannot be had or do not fit.
    """
    import torch

    from celltyper.encoders.adapt import add_lora, freeze
    from celltyper.encoders.weights import load_weights

    if adapt not in ("frozen", "lora", "full"):
        raise unknown_name("adapt", adapt, ("frozen", "lora", "full"))
    for key in lora or {}:
        if key not in _LORA_OPTIONS:
            raise unknown_name("lora option", key, _LORA_OPTIONS)
    card = _with_options(find_card(name), options)
    # read before building: a large model takes a minute to build, a wrong path none to refuse
    tensors = None if weights in ("random", "twin") else _read(card, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = _build(card, twin=weights == "twin", magnify=magnify)
        if tensors is not None:
            from_hub = weights in ("auto", "hub")
            load_weights(vit.model, tensors, str(card.hub_id if from_hub else weights))
        encoder: nn.Module = vit
        if len(card.scales) > 1:
            from celltyper.encoders.multiscale import MultiScale

            encoder = MultiScale(vit, card.scales)
        encoder.eval()
        if adapt == "frozen":
            return freeze(encoder)
        if adapt == "lora":
            return add_lora(encoder, **(lora or {})).eval()
    return encoder


def find_card(name: str) -> EncoderCard:
    """Card of an encoder by card name, ``timm/NAME`` or hub id.

    Raises
    ------
    ConfigError
        If the name is not known.
    CheckpointError
        If the hub is needed for its configuration and out of reach.
    """
    if name in list_cards():
        return load_card(name)
    plain = name.removeprefix("hf-hub:")
    known = card_of_hub_id(plain)
    if known is not None:
        return known
    if "/" not in plain:
        raise unknown_name("encoder", name, [*list_cards(), "timm/NAME", "owner/name on the hub"])
    from celltyper.encoders.foreign import card_from_hub, card_from_timm

    # timm/NAME.TAG is a repository of the hub and, at the same time, a name of timm itself
    if name.startswith("timm/"):
        return card_from_timm(name)
    return card_from_hub(plain)


def _with_options(card: EncoderCard, options: Mapping[str, Any]) -> EncoderCard:
    for key in options:
        if key not in _CARD_OPTIONS:
            raise unknown_name("encoder option", key, _CARD_OPTIONS)
    if not options:
        return card
    try:
        return EncoderCard.model_validate(card.model_dump() | dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        what = f" {first['loc'][0]}" if first["loc"] else ""
        problem = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"encoder option{what}: {problem}") from error


def _build(card: EncoderCard, *, twin: bool, magnify: float) -> TimmViT:
    from celltyper.encoders.build import build_timm_model
    from celltyper.encoders.vit import TimmViT

    encoder = TimmViT(
        build_timm_model(card, twin=twin),
        blocks=card.feature_blocks,
        mean=card.mean,
        std=card.std,
        embedding=card.embedding,
        magnify=magnify,
        input_size=card.input_size,
        resize=card.resize,
        interpolation=card.interpolation,
    )
    encoder.card = card
    return encoder


def _read(card: EncoderCard, weights: str | Path) -> dict[str, Tensor]:
    from celltyper.encoders.hub import download_weights
    from celltyper.encoders.layouts import from_dinov2_hf
    from celltyper.encoders.weights import read_weights

    from_hub = weights in ("auto", "hub")
    tensors = read_weights(download_weights(card) if from_hub else Path(weights))
    if card.key_layout == "dinov2-hf" and any("attention.attention." in key for key in tensors):
        return from_dinov2_hf(tensors)
    return tensors
