"""Encoder cards: everything the project knows about an encoder, in one YAML file each."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    family : {"vit", "pyramid"}
        Plain vision transformer with maps of one grid; or a network whose maps get coarser with
        depth (Swin, ConvNeXt, EfficientNet).
    parameters : float or None
        Millions of parameters, without classifier, as published.
    hub_id, revision : str or None
        Hugging Face repository and commit of the weights. A revision of None means the
        repository's main branch.
    input_size : int or None
        Side in pixels of the square that an embedding is computed of; None takes an image as it
        is. Feature maps are computed at any size.
    resize : int or None
        Length to which the shorter side is scaled before the central `input_size` is cut out
        for an embedding; None is `input_size`.
    interpolation : {"bilinear", "bicubic"}
        How images are scaled.
    mpp : float or None
        Micrometres per pixel of the training images, None if several or unknown.
    mean, std : tuple of 3 float
        Normalisation of RGB in [0, 1].
    patch_size, prefix_tokens, embed_dim : int
        Patch side in pixels (of a pyramid: its coarsest stride); class and register tokens;
        channels of a token (of a pyramid: of its pooled embedding).
    feature_blocks : "quarters" or tuple of int
        Blocks (from 0) whose maps go to the decoder: the last of each quarter of the depth, or
        as named. Of a pyramid: its levels, "quarters" being the last four.
    depth : int or None
        Blocks that are kept, None for all: what lies behind is neither loaded nor run, and the
        final norm follows on the last that is kept.
    grid : int or None
        Side of the grid of learned positions, None for that of the architecture. Published weights
        are resampled to it once; it is resampled to every image anyway. A finer one than images
        have patches is bytes without use.
    embedding : {"cls", "mean", "cls+mean"}
        Pooled embedding: class token, mean of patch tokens, or both behind each other.
    scales : tuple of int
        Enlargements at which an image is seen, 1 first; the features of all are joined
        (see `celltyper.encoders.multiscale`).
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
    family: Literal["vit", "pyramid"] = "vit"
    parameters: float | None = Field(default=None, gt=0)
    hub_id: str | None = None
    revision: str | None = None
    input_size: int | None = Field(default=224, ge=1)
    resize: int | None = Field(default=None, ge=1)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mpp: float | None = Field(default=None, gt=0)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    patch_size: int = Field(ge=1)
    prefix_tokens: int = Field(default=1, ge=0)
    embed_dim: int = Field(ge=1)
    feature_blocks: Literal["quarters"] | tuple[int, ...] = "quarters"
    depth: int | None = Field(default=None, ge=1)
    grid: int | None = Field(default=None, ge=2)
    embedding: EmbeddingRule = "cls"
    scales: tuple[int, ...] = (1,)
    licence: str = "unknown"
    gated: bool = False
    gate_page: str = ""
    notes: str = ""

    @model_validator(mode="after")
    def _sizes_fit(self) -> EncoderCard:
        if self.resize is not None and (self.input_size is None or self.resize < self.input_size):
            raise ValueError(f"resize {self.resize} needs an input_size of at most as much")
        if self.scales[:1] != (1,) or sorted(set(self.scales)) != list(self.scales):
            raise ValueError(f"scales must ascend from 1, got {self.scales}")
        if self.depth is not None and self.family != "vit":
            raise ValueError("depth is for plain vision transformers, this is a pyramid")
        if self.grid is not None and self.family != "vit":
            raise ValueError("grid is for plain vision transformers, this is a pyramid")
        return self


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
