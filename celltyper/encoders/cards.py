"""Encoder cards: everything the project knows about an encoder, in one YAML file each."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from celltyper.errors import ConfigError, unknown_name

EmbeddingRule = Literal["cls", "mean", "cls+mean"]


class EncoderCard(BaseModel):
    """Facts about one encoder; decoders, LoRA targets, checkpoints and docs derive from it.

    Parameters
    ----------
    name : str
        Name under which `celltyper.load_encoder` finds it; the stem of the YAML file.
    timm_name : str
        Architecture in timm.
    timm_args : dict
        Arguments of ``timm.create_model`` beside the name.
    twin : dict
        Arguments that replace or join `timm_args` for a tiny random model of the same layout
        (patch size, prefix tokens, MLP kind), built by ``weights="twin"``.
    hub_id, revision : str or None
        Hugging Face repository and commit of the weights. A revision of None means the
        repository's main branch.
    key_layout : {"timm", "dinov2-hf"}
        Naming of the published weights; the second is that of transformers' ``Dinov2Model``.
    input_size : int
        Side in pixels to which patch mode resizes. Dense mode takes any size.
    mpp : float or None
        Micrometres per pixel of the training images, None if several or unknown.
    mean, std : tuple of 3 float
        Normalisation of RGB in [0, 1].
    patch_size, prefix_tokens, embed_dim : int
        Patch side in pixels; class and register tokens; channels of a token.
    feature_blocks : "quarters" or tuple of int
        Blocks (from 0) whose maps go to the decoder.
    embedding : {"cls", "mean", "cls+mean"}
        Pooled embedding: class token, mean of patch tokens, or both behind each other.
    licence : str
        Licence of the weights.
    gated : bool
        True if the terms must be accepted on `gate_page` first.
    gate_page, notes : str
        Page with the terms; anything else a user must know.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    timm_name: str
    timm_args: dict[str, Any] = Field(default_factory=dict)
    twin: dict[str, Any] = Field(default_factory=dict)
    hub_id: str | None = None
    revision: str | None = None
    key_layout: Literal["timm", "dinov2-hf"] = "timm"
    input_size: int = Field(default=224, ge=1)
    mpp: float | None = Field(default=None, gt=0)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    patch_size: int = Field(ge=1)
    prefix_tokens: int = Field(default=1, ge=0)
    embed_dim: int = Field(ge=1)
    feature_blocks: Literal["quarters"] | tuple[int, ...] = "quarters"
    embedding: EmbeddingRule = "cls"
    licence: str = "unknown"
    gated: bool = False
    gate_page: str = ""
    notes: str = ""


def list_cards() -> list[str]:
    """Names of all encoder cards, sorted."""
    cards = files("celltyper").joinpath("cards")
    return sorted(f.name.removesuffix(".yaml") for f in cards.iterdir() if f.name.endswith(".yaml"))


@cache
def load_card(name: str) -> EncoderCard:
    """Read one encoder card.

    Parameters
    ----------
    name : str
        One of `list_cards`.

    Returns
    -------
    EncoderCard
        The facts.

    Raises
    ------
    ConfigError
        If there is no such card (the known ones are listed) or its file is wrong.
    """
    known = list_cards()
    if name not in known:
        raise unknown_name("encoder", name, known)
    text = files("celltyper").joinpath("cards", f"{name}.yaml").read_text(encoding="utf-8")
    try:
        card = EncoderCard.model_validate({"name": name} | (yaml.safe_load(text) or {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"encoder card {name!r}: {key}: {first['msg']}") from error
    if card.name != name:
        raise ConfigError(f"encoder card {name!r}: its file says name: {card.name!r}")
    return card


def card_of_hub_id(hub_id: str) -> EncoderCard | None:
    """Card whose `hub_id` is this one, None if there is none."""
    cards = (load_card(name) for name in list_cards())
    return next((card for card in cards if card.hub_id == hub_id), None)
