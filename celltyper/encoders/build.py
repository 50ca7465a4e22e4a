"""Architectures: the timm model that a card describes."""

from __future__ import annotations

import inspect
from typing import Any

import timm
from timm.layers import SwiGLU, SwiGLUPacked
from torch import nn

from celltyper.encoders.cards import EncoderCard
from celltyper.errors import ConfigError

# a card is YAML: layers are named there
_LAYERS: dict[str, type[nn.Module]] = {
    "SwiGLU": SwiGLU,
    "SwiGLUPacked": SwiGLUPacked,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
}


def build_timm_model(card: EncoderCard, *, twin: bool = False) -> Any:
    """Build the timm model of a card, random and without classifier.

    Parameters
    ----------
    card : EncoderCard
        The facts.
    twin : bool
        Build the tiny twin: same patch size, prefix tokens and kind of MLP.

    Returns
    -------
    nn.Module
        The model; takes any image size that the patch size divides.

    Raises
    ------
    ConfigError
        If timm does not know the architecture, or it is not of the card's family.
    """
    if twin and not card.twin:
        raise ConfigError(f"encoder {card.name!r} has no tiny twin; take weights='random'")
    arguments = {**card.timm_args, **(card.twin if twin else {})}
    for key in ("mlp_layer", "act_layer"):
        if isinstance(arguments.get(key), str):
            if arguments[key] not in _LAYERS:
                raise ConfigError(f"encoder {card.name!r}: {key} {arguments[key]!r} is not known")
            arguments[key] = _LAYERS[arguments[key]]
    if card.family == "vit":
        arguments["dynamic_img_size"] = True
    if card.grid is not None:
        arguments["img_size"] = card.grid * card.patch_size
    try:
        model = timm.create_model(card.timm_name, pretrained=False, num_classes=0, **arguments)
    except TypeError as error:
        raise ConfigError(
            f"encoder {card.name!r}: timm's {card.timm_name!r} does not take these arguments or "
            f"any image size, so it cannot be an encoder here ({error})"
        ) from error
    fits, what = (
        (is_plain_vit, "plain vision transformer")
        if card.family == "vit"
        else (is_pyramid, "pyramid of feature maps")
    )
    if not fits(model):
        raise ConfigError(f"encoder {card.name!r}: timm's {card.timm_name!r} is no {what}")
    return model


def is_plain_vit(model: Any) -> bool:
    """Tell whether a timm model is a vision transformer whose blocks share one grid of tokens."""
    parts = ("blocks", "patch_embed", "num_prefix_tokens")
    return all(hasattr(model, part) for part in parts) and _gives_maps(model)


def is_pyramid(model: Any) -> bool:
    """Tell whether a timm model gives maps that get coarser from level to level."""
    if not hasattr(model, "head_hidden_size") or not _gives_maps(model):
        return False
    strides = [info["reduction"] for info in getattr(model, "feature_info", [])]
    return len(set(strides)) > 1 and strides == sorted(strides)


def _gives_maps(model: Any) -> bool:
    method = getattr(model, "forward_intermediates", None)
    return method is not None and "stop_early" in inspect.signature(method).parameters
