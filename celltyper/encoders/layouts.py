"""Namings of published weights, recognised by their names and turned into timm's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_PREFIXES = ("module.", "backbone.", "model.", "encoder.", "trunk.")

# classifier, masked-patch token and the heads of DINO, iBOT and DINOv2: pretraining only
_UNUSED = re.compile(
    r"head\.(weight|bias)|(\w+\.)?mask_token|((dino_|ibot_)?head\.(mlp|last_layer)\w*\..+)"
)


class _Layout(NamedTuple):
    sign: str
    """Part of a name that only this naming has; what precedes it is a wrapper's prefix."""
    names: tuple[tuple[str, str], ...]
    """Patterns and what replaces them, one after the other."""
    unused: str | None = None
    """Pattern of the names that the vision transformer does not use."""


_EMBEDDINGS = (
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
)

_LAYOUTS = (
    # BEiT-3 (MUSK): of each pair of layers A sees images and B text
    _Layout(
        "beit3.",
        (
            (r"^beit3\.", ""),
            (r"\.A\.", "."),
            (r"^vision_embed\.(cls_token)", r"\1"),
            (r"^vision_embed\.", "patch_embed."),
            (r"^encoder\.embed_positions\.weight$", "embed_positions"),
            (r"^encoder\.layers\.", "blocks."),
            (r"^encoder\.layer_norm\.", "norm."),
            (r"\.self_attn_layer_norm\.", ".norm1."),
            (r"\.final_layer_norm\.", ".norm2."),
            (r"\.self_attn\.", ".attn."),
            (r"\.inner_attn_ln\.", ".norm."),
            (r"\.out_proj\.", ".proj."),
            (r"\.ffn\.(ffn_layer)?", ".mlp."),
        ),
        r"\.B\.|beit3\.text_embed\.|^(vision|language)_head\.|^logit_scale$",
    ),
    # transformers: ViTModel, Dinov2Model, Dinov2WithRegistersModel
    _Layout(
        "embeddings.patch_embeddings.projection.",
        (
            *_EMBEDDINGS,
            (r"^encoder\.layer\.", "blocks."),
            (r"^layernorm\.", "norm."),
            (r"\.attention\.attention\.(\w)\w+\.", r".attn.\1."),
            (r"\.attention\.output\.dense\.", ".attn.proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"\.output\.dense\.", ".mlp.fc2."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
            (r"\.mlp\.weights_in\.", ".mlp.fc1."),
            (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        ),
        r"^pooler\.|^classifier\.",
    ),
    # transformers: DINOv3ViTModel
    _Layout(
        "embeddings.patch_embeddings.weight",
        (
            *_EMBEDDINGS,
            (r"^layer\.", "blocks."),
            (r"\.attention\.o_proj\.", ".attn.proj."),
            (r"\.attention\.", ".attn."),
            (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
            (r"\.mlp\.up_proj\.", ".mlp.fc1."),
            (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        ),
    ),
    # DINOv2's own code, where a gated MLP and blocks in chunks have names of their own
    _Layout(
        "",
        (
            (r"(^|\.)blocks\.\d+\.(\d+\.(norm|attn|mlp|ls))", r"\1blocks.\2"),
            (r"\.mlp\.w12\.", ".mlp.fc1."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
        ),
    ),
)


def to_timm(tensors: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Rename the weights of a vision transformer to the names that timm has for them.

    Of a DINO checkpoint the teacher is taken, of a vision-language model the vision transformer.
    Query, key and value are joined or split as the model has them.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Weights in timm's naming, that of transformers (``ViTModel``, ``Dinov2Model``,
        ``DINOv3ViTModel``), BEiT-3 or DINOv2, or a timm model behind a wrapper's prefix.
    expected : collection of str
        Names in the timm model's state dict.

    Returns
    -------
    dict of str to Tensor
        The weights; names that are not known stay as they are, tensors that only pretraining
        uses are left out.
    """
    found = _take_trunk(_take_teacher(tensors))
    for layout in _LAYOUTS:
        found = _rename(found, layout)
    found = _strip_prefixes(_fit_attention(found, expected), set(expected))
    found = _fold_positions(found)
    return {k: v for k, v in found.items() if k in expected or not _UNUSED.fullmatch(k)}


def _take_teacher(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    teacher = {k.partition("teacher.")[2]: v for k, v in tensors.items() if "teacher." in k}
    return teacher or dict(tensors)


def _take_trunk(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # CONCH and CONCH v1.5 hold poolers, and CONCH a text encoder, beside the trunk
    parts = [(f".{key}".partition(".trunk."), value) for key, value in tensors.items()]
    trunk = {name: value for (_, found, name), value in parts if found}
    several = len({before for (before, found, _), _ in parts if found}) > 1
    return tensors if several or not trunk else trunk


def _rename(tensors: dict[str, Tensor], layout: _Layout) -> dict[str, Tensor]:
    signed = next((key for key in tensors if layout.sign in key), None)
    if signed is None:
        return tensors
    wrapper = signed[: signed.index(layout.sign)]
    renamed = {}
    for key, value in tensors.items():
        name = key.removeprefix(wrapper)
        if layout.unused and re.search(layout.unused, name):
            continue
        for pattern, new in layout.names:
            name = re.sub(pattern, new, name)
        renamed[name] = value
    return renamed


_ATTENTION = re.compile(r"(.*\battn\.)(qkv|[qkv])(?:_proj)?[._](weight|bias)")


def _fit_attention(tensors: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Join or split query, key and value; names that cannot be fitted stay."""
    wanted = {name.rpartition("attn.")[2] for name in expected if "attn." in name}
    fitted = {}
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _ATTENTION.fullmatch(key)
        if match is None or key.rpartition("attn.")[2] in wanted:
            fitted[key] = value
        elif match[2] == "qkv":
            groups[match[1], match[3]] = dict(zip("qkv", value.tensor_split(3), strict=True))
        else:
            groups.setdefault((match[1], match[3]), {})[match[2]] = value
    for (attention, kind), parts in groups.items():
        if kind == "bias" and parts.keys() == {"q", "v"}:
            # a key bias adds the same to every score of a query, which softmax takes out
            parts["k"] = torch.zeros_like(parts["q"])
        if f"qkv.{kind}" in wanted and len(parts) == 3:
            fitted[f"{attention}qkv.{kind}"] = torch.cat([parts[letter] for letter in "qkv"])
            continue
        for letter, value in parts.items():
            names = (f"{letter}_proj.{kind}", f"{letter}.{kind}", f"{letter}_{kind}")
            name = next((name for name in names if name in wanted), None)
            without_effect = kind == "bias" and (letter == "k" or not value.any())
            if name is not None or not without_effect:
                fitted[attention + (name or names[0])] = value
    return fitted


def _strip_prefixes(tensors: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    found = dict(tensors)
    while len(expected & set(found)) < len(expected):
        for prefix in _PREFIXES:
            stripped = {k.removeprefix(prefix): v for k, v in found.items()}
            # a clash of names would drop a tensor without a word
            if len(stripped) == len(found) and stripped.keys() != found.keys():
                found = stripped
                break
        else:
            break
    return found


def _fold_positions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(tensors)
    if "embed_positions" in found:
        # BEiT-3 counts from 2: the first two rows are never used
        found["pos_embed"] = found.pop("embed_positions")[2:][None]
    if "register_tokens" in found:
        found["reg_token"] = found.pop("register_tokens")
        if {"cls_token", "pos_embed"} <= found.keys():
            # timm's models with registers hold positions of patches only
            position = found["pos_embed"].float()
            found["cls_token"] = found["cls_token"].float() + position[:, :1]
            found["pos_embed"] = position[:, 1:]
    return found
