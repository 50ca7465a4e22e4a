"""Namings of published weights, turned into timm's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIXES = ("module.", "backbone.", "model.", "encoder.", "trunk.")


def from_dinov2_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of transformers' ``Dinov2Model`` to timm's naming.

    Query, key and value are joined into timm's ``qkv``.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Weights such as ``encoder.layer.0.attention.attention.query.weight``.

    Returns
    -------
    dict of str to Tensor
        Weights such as ``blocks.0.attn.qkv.weight``; names that are not known stay as they are.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if ".attention.attention." in key:
            if ".query." in key:
                parts = [
                    tensors[key.replace(".query.", f".{n}.")] for n in ("query", "key", "value")
                ]
                renamed[_dinov2_name(key.replace(".query.", ".qkv."))] = torch.cat(parts)
            continue
        renamed[_dinov2_name(key)] = value
    if "reg_token" in renamed:
        # timm's models with registers hold positions of patches only; the class token's is added
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


_DINOV2_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer.", "blocks."),
    ("attention.attention.qkv", "attn.qkv"),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in", "mlp.fc1"),
    ("mlp.weights_out", "mlp.fc2"),
    ("layernorm.", "norm."),
)


def _dinov2_name(key: str) -> str:
    for old, new in _DINOV2_NAMES:
        key = key.replace(old, new)
    return key


def take_trunk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the vision transformer behind ``trunk.`` out of a vision-language model."""
    # CONCH and CONCH v1.5 hold poolers, and CONCH a text encoder, beside the trunk
    parts = [(f".{key}".partition(".trunk."), value) for key, value in tensors.items()]
    trunk = {name: value for (_, found, name), value in parts if found}
    several = len({before for (before, found, _), _ in parts if found}) > 1
    return dict(tensors) if several or not trunk else trunk


def strip_prefixes(tensors: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Strip wrapper prefixes until all expected names are found."""
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
