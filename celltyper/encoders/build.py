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
        If timm does not know the architecture, or it is no vision transformer.
    """
    arguments = {**card.timm_args, **(card.twin if twin else {})}
    for key in ("mlp_layer", "act_layer"):
        if isinstance(arguments.get(key), str):
            if arguments[key] not in _LAYERS:
                raise ConfigError(f"encoder {card.name!r}: {key} {arguments[key]!r} is not known")
            arguments[key] = _LAYERS[arguments[key]]
    try:
        model = timm.create_model(
            card.timm_name, pretrained=False, num_classes=0, dynamic_img_size=True, **arguments
        )
    except TypeError as error:
        raise ConfigError(
            f"encoder {card.name!r}: timm's {card.timm_name!r} does not take these arguments or "
            f"any image size, so it cannot be an encoder here ({error})"
        ) from error
    parts = ("blocks", "patch_embed", "num_prefix_tokens", "forward_intermediates")
    lacking = [part for part in parts if not hasattr(model, part)]
    if lacking or "stop_early" not in inspect.signature(model.forward_intermediates).parameters:
        raise ConfigError(
            f"encoder {card.name!r}: timm's {card.timm_name!r} is no plain vision transformer "
            f"(it lacks {', '.join(lacking) or 'forward_intermediates'})"
        )
    return model
