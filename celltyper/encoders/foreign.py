"""Encoders without a card of their own: any vision transformer of timm or of a hub repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm

from celltyper.encoders.build import build_timm_model
from celltyper.encoders.cards import EncoderCard
from celltyper.errors import CheckpointError, ConfigError


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
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from timm.models import load_model_config_from_hf

    way_out = "take an encoder card (celltyper.encoders.list_cards()) or timm/NAME"
    try:
        config, architecture, arguments = load_model_config_from_hf(hub_id)
    except GatedRepoError as error:
        raise CheckpointError(
            f"encoder {hub_id!r} is gated: accept the terms on huggingface.co/{hub_id}, "
            f"run 'hf auth login'; or {way_out}"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"the hub has no encoder {hub_id!r}, or not for you; {way_out}"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"encoder {hub_id!r} has no card here and the hub is out of reach; {way_out}"
        ) from error
    except KeyError as error:
        raise ConfigError(f"encoder {hub_id!r} is no timm model; {way_out}") from error
    return _card(hub_id, architecture, {**config, "hf_hub_id": hub_id}, arguments or {})


def _card(
    name: str, architecture: str, config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> EncoderCard:
    """Complete a card with the sizes of the architecture, built once without memory."""
    import torch

    probe = EncoderCard(
        name=name,
        timm_name=architecture,
        timm_args=_vit_arguments(arguments),
        patch_size=1,
        embed_dim=1,
    )
    with torch.device("meta"):
        model = build_timm_model(probe)
    has_class = getattr(model, "cls_token", None) is not None
    size = config.get("input_size") or (3, 224, 224)
    return probe.model_copy(
        update={
            "hub_id": config.get("hf_hub_id"),
            "input_size": int(size[-1]),
            "mean": tuple(config.get("mean") or probe.mean),
            "std": tuple(config.get("std") or probe.std),
            "patch_size": int(model.patch_embed.patch_size[0]),
            "prefix_tokens": int(model.num_prefix_tokens),
            "embed_dim": int(model.embed_dim),
            "embedding": "cls" if has_class else "mean",
            "licence": str(config.get("license") or "unknown"),
            "twin": {"embed_dim": 48, "depth": 4, "num_heads": 3},
        }
    )


def _vit_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    fixed = ("num_classes", "dynamic_img_size", "pretrained")
    return {key: value for key, value in arguments.items() if key not in fixed}
