"""Encoders: vision transformers that give feature maps and a pooled embedding.

An encoder is any ``nn.Module`` with ``channels`` (list of int), ``patch_size`` (int),
``forward(images) -> list of (B, C_i, ceil(H / p), ceil(W / p))`` and, for patch mode,
``embed(images) -> (B, embed_dim)``. Images are float32 RGB in [0, 1]; the encoder normalises.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from celltyper.encoders.cards import EncoderCard, card_of_hub_id, list_cards, load_card
from celltyper.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from celltyper.encoders.adapt import Adapt
    from celltyper.encoders.pyramid import TimmPyramid
    from celltyper.encoders.vit import TimmViT

__all__ = ["EncoderCard", "find_card", "list_cards", "load_card", "load_encoder"]

_CARD_OPTIONS = (
    "feature_blocks",
    "embedding",
    "mean",
    "std",
    "input_size",
    "resize",
    "interpolation",
    "scales",
    "depth",
    "grid",
)


def load_encoder(
    name: str,
    weights: str | Path = "auto",
    adapt: Adapt = "frozen",
    seed: int = 0,
    lora: Mapping[str, Any] | None = None,
    revision: str | None = None,
    magnify: float = 1.0,
    last_n: int = 4,
    checkpointing: bool = False,
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
        a local ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file, or of a folder of such files
        (see `celltyper.encoders.hub.find_weights`); of a model that celltyper trained, its encoder
        is taken. Nothing is ever random unless asked for.
    adapt : {"frozen", "lora", "dora", "full", "last-n", "bias", "norm"}
        What training may change; see `celltyper.encoders.adapt.adapt_encoder`.
    seed : int
        Seed of random weights and adapters; the global random state is left alone.
    lora : mapping, optional
        Options of `celltyper.encoders.lora.add_lora`: rank, alpha, dropout, targets; or
        ``adapter``, a folder in peft's format to start from. Used with ``adapt="lora"`` and
        ``"dora"`` only.
    revision : str, optional
        Commit or branch of the hub in place of the card's.
    magnify : float
        Pixels that the network sees per pixel of the image, along a side, for feature maps:
        2 shows it an image of 0.5 micrometres per pixel at 0.25. Rounded so that a patch is a
        whole number of pixels of the image.
    last_n : int
        Blocks that ``adapt="last-n"`` trains.
    checkpointing : bool
        Recompute the blocks in the backward pass: less memory, about a third more time.
    **options
        Replace what the card says: feature_blocks, embedding, mean, std, input_size, resize,
        interpolation, scales, depth, grid.

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
    from accelerate import init_empty_weights

    from celltyper.encoders.adapt import adapt_encoder, check_adapt
    from celltyper.encoders.build import build_timm_model
    from celltyper.encoders.weights import load_weights

    check_adapt(adapt, lora)
    card = _with_options(find_card(name), options)
    # read before building: a large model takes a minute to build, a wrong path none to refuse
    tensors = None if weights in ("random", "twin") else _read(card, weights, revision)
    with torch.random.fork_rng(devices=[]):
        # of the CPU only, where everything is made: torch.manual_seed would seed GPUs too
        torch.default_generator.manual_seed(seed)
        # random weights that are overwritten at once would take most of the time
        with nullcontext() if tensors is None else init_empty_weights():
            model = build_timm_model(card, twin=weights == "twin")
        if card.depth is not None:
            _cut(model, card, twin=weights == "twin")
        if tensors is not None:
            if card.family == "pyramid":
                from celltyper.encoders.pyramid import in_timm_names

                tensors = in_timm_names(tensors, model)
            from_hub = weights in ("auto", "hub")
            source = str(card.hub_id if from_hub else weights)
            load_weights(model, tensors, source, depth=card.depth)
        plain = _wrapped(model, card, magnify)
        encoder: nn.Module = plain
        if len(card.scales) > 1:
            from celltyper.encoders.multiscale import MultiScale

            encoder = MultiScale(plain, card.scales)
        return adapt_encoder(encoder, adapt, lora=lora, last_n=last_n, checkpointing=checkpointing)


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


def _wrapped(model: Any, card: EncoderCard, magnify: float) -> TimmViT | TimmPyramid:
    from celltyper.encoders.pyramid import TimmPyramid
    from celltyper.encoders.vit import TimmViT

    family = TimmPyramid if card.family == "pyramid" else TimmViT
    encoder = family(
        model,
        card.feature_blocks,
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


def _cut(model: Any, card: EncoderCard, *, twin: bool) -> None:
    """Leave out the blocks behind ``card.depth``; a twin has too few to count."""
    blocks = model.blocks
    if not twin and (card.depth or 0) > len(blocks):
        raise ConfigError(
            f"encoder option depth: {card.name} has {len(blocks)} blocks, not {card.depth}"
        )
    model.blocks = blocks[: card.depth]


def _read(card: EncoderCard, weights: str | Path, revision: str | None) -> dict[str, Tensor]:
    from celltyper.encoders.hub import find_weights
    from celltyper.encoders.weights import read_weights

    return read_weights(find_weights(card, weights, revision))
