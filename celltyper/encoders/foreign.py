"""Encoders without a card of their own: any ViT or pyramid of timm or of a hub repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import timm

from celltyper.encoders.build import build_timm_model, is_pyramid
from celltyper.encoders.cards import EncoderCard
from celltyper.errors import ConfigError


def card_from_timm(name: str) -> EncoderCard:
    """Card of ``timm/NAME`` or ``timm/NAME.TAG`` by what timm itself knows."""
    timm_name = name.removeprefix("timm/")
    architecture, _, tag = timm_name.partition(".")
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture[:12]}*")[:5]
        hint = f"; some near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"timm has no model {timm_name!r}{hint}")
    config = timm.get_pretrained_cfg(architecture)
    if tag:
        try:
            config = timm.get_pretrained_cfg(timm_name, allow_unregistered=False)
        except RuntimeError as error:
            raise ConfigError(f"timm has no weights {tag!r} of {architecture!r}") from error
    return _card(name, architecture, config.to_dict() if config else {}, {})


def card_from_hub(hub_id: str) -> EncoderCard:
    """Card of a hub repository that holds a timm model, by its ``config.json``."""
    from celltyper.encoders.hub import download_config

    path = download_config(hub_id)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        # older repositories hold both in one table
        facts, architecture = config.get("pretrained_cfg", config), config["architecture"]
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"encoder {hub_id!r} is no timm model; take an encoder of 'celltyper encoders' or "
            "timm/NAME"
        ) from error
    return _card(
        hub_id, architecture, {**facts, "hf_hub_id": hub_id}, config.get("model_args") or {}
    )


def _card(
    name: str, architecture: str, config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> EncoderCard:
    """Complete a card with the sizes of the architecture, built once or twice without memory."""
    size = config.get("input_size") or (3, 224, 224)
    card = EncoderCard(
        name=name,
        timm_name=architecture,
        timm_args=_plain_arguments(arguments),
        hub_id=config.get("hf_hub_id"),
        input_size=int(size[-1]),
        mean=config.get("mean") or EncoderCard.model_fields["mean"].default,
        std=config.get("std") or EncoderCard.model_fields["std"].default,
        patch_size=1,
        embed_dim=1,
        licence=str(config.get("license") or "unknown"),
    )
    pyramid = _pyramid(card)
    return card.model_copy(update=_vit_facts(card) if pyramid is None else pyramid)


def _vit_facts(card: EncoderCard) -> dict[str, Any]:
    import torch

    with torch.device("meta"):
        model = build_timm_model(card)
    has_class = getattr(model, "cls_token", None) is not None
    return {
        "patch_size": int(model.patch_embed.patch_size[0]),
        "prefix_tokens": int(model.num_prefix_tokens),
        "embed_dim": int(model.embed_dim),
        "embedding": "cls" if has_class else "mean",
        "twin": {"embed_dim": 48, "depth": 4, "num_heads": 3},
    }


def _pyramid(card: EncoderCard) -> dict[str, Any] | None:
    """Facts of a pyramid, seen to take any image size; None if the architecture is none."""
    import torch

    arguments = dict(card.timm_args)
    with torch.device("meta"):
        model = _built(card, arguments)
        if model is None or not is_pyramid(model):
            return None
        if getattr(getattr(model, "patch_embed", None), "strict_img_size", False):
            # window attention can do with any image size, but has to be told
            arguments["strict_img_size"] = False
            model = _built(card, arguments) or model
        levels = [(int(info["num_chs"]), int(info["reduction"])) for info in model.feature_info]
        coarsest = levels[-1][1]
        rows, cols = 3 * coarsest, 5 * coarsest
        expected = [(1, channels, rows // s, cols // s) for channels, s in levels]
        try:
            maps = model.forward_intermediates(
                torch.empty(1, 3, rows, cols), intermediates_only=True
            )
            found = [tuple(m.shape) for m in maps]
        except (AssertionError, RuntimeError, ValueError) as error:
            raise _fixed_size(card, str(error).partition("\n")[0]) from error
    if found != expected:
        raise _fixed_size(card, f"its maps are {found} instead of {expected}")
    return {
        "family": "pyramid",
        "timm_args": arguments,
        "patch_size": coarsest,
        "prefix_tokens": 0,
        "embed_dim": int(model.head_hidden_size),
        "embedding": "mean",
    }


def _built(card: EncoderCard, arguments: Mapping[str, Any]) -> Any:
    try:
        return timm.create_model(card.timm_name, num_classes=0, **arguments).eval()
    except TypeError:  # arguments that the architecture does not take
        return None


def _fixed_size(card: EncoderCard, reason: str) -> ConfigError:
    return ConfigError(
        f"encoder {card.name!r}: timm's {card.timm_name!r} does not take any image size, so it "
        f"cannot be an encoder here ({reason})"
    )


def _plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    fixed = ("num_classes", "dynamic_img_size", "pretrained")
    return {key: value for key, value in arguments.items() if key not in fixed}
