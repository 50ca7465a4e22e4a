"""Encoder weights from a local file or the Hugging Face hub, checked key by key."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from celltyper.encoders.cards import EncoderCard
from celltyper.errors import CheckpointError

WEIGHTS_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "pytorch_model_vision.bin",
)
"""File names that are looked for on the hub, in this order."""

_NESTS = ("state_dict", "model", "teacher")
_PREFIXES = ("module.", "backbone.", "model.", "encoder.", "trunk.")
# classifier and masked-patch token: used in pretraining only
_UNUSED = ("head.weight", "head.bias", "mask_token", "embeddings.mask_token")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file.

    Parameters
    ----------
    path : Path
        The file. A pickle may hold tensors only: no code in it is ever run.

    Returns
    -------
    dict of str to Tensor
        Tensors by name, on the CPU.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable, needs more than tensors, or holds none.
    """
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist; check encoder.weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            # an odd pickle is either read or refused; torch's advice to file an issue is no help
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"weights file {path} holds Python objects beside tensors, which celltyper never "
            "runs; save its state_dict alone, or as .safetensors"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"weights file {path} cannot be read: {reason}") from error
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"weights file {path} holds no table of tensors")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"weights file {path} holds no tensors")
    return tensors


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put tensors into a timm vision transformer; every one must find its place.

    Wrapper prefixes are stripped, the classifier is dropped, and the position embedding is
    resampled to the model's grid. Of a vision-language model only the vision transformer behind
    ``trunk.`` is taken. Values take the dtype of the model.

    Parameters
    ----------
    model : nn.Module
        timm model made with ``num_classes=0``; changed in place.
    tensors : mapping of str to Tensor
        Weights in timm's naming.
    source : str
        Where they come from, for messages.

    Raises
    ------
    CheckpointError
        If keys are missing, left over or of another shape; the first few are listed.
    """
    expected = model.state_dict()
    found = _strip_prefixes(_trunk(tensors), set(expected))
    found = {k: v for k, v in found.items() if k in expected or k not in _UNUSED}
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    if missing or extra:
        parts = [_listing("missing", missing), _listing("left over", extra)]
        raise CheckpointError(
            f"weights of {source} do not fit the encoder: {'; '.join(p for p in parts if p)}; "
            "name the encoder that they were made for"
        )
    if "pos_embed" in found:
        found["pos_embed"] = _resample_position(model, found["pos_embed"], source)
    shapes = [
        f"{k} {tuple(found[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in expected
        if found[k].shape != expected[k].shape
    ]
    if shapes:
        raise CheckpointError(
            f"weights of {source} do not fit the encoder: {_listing('other shape', shapes)}; "
            "name the encoder that they were made for"
        )
    model.load_state_dict(found)


def download_weights(card: EncoderCard) -> Path:
    """Fetch a card's weights from the Hugging Face hub, or find them in its cache.

    Parameters
    ----------
    card : EncoderCard
        With a `hub_id`.

    Returns
    -------
    Path
        The file in the hub's cache.

    Raises
    ------
    CheckpointError
        If the weights are gated, not there, or the hub is out of reach: with what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    own_file = "or give a local file with encoder.weights=PATH"
    if card.hub_id is None:
        raise CheckpointError(
            f"encoder {card.name!r} has no published weights; use encoder.weights=random or PATH"
        )
    where = f"{card.hub_id} (revision {card.revision or 'main'})"
    # Its retries end in the one line that we raise.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for filename in WEIGHTS_FILES:
        try:
            return Path(hf_hub_download(card.hub_id, filename, revision=card.revision))
        except GatedRepoError as error:
            page = card.gate_page or f"huggingface.co/{card.hub_id}"
            raise CheckpointError(
                f"encoder {card.name!r}: weights {where} are gated: accept the terms on {page}, "
                f"run 'hf auth login', {own_file}"
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise CheckpointError(
                f"encoder {card.name!r}: the hub has no {where}, or not for you: check the name, "
                f"run 'hf auth login', {own_file}"
            ) from error
        except LocalEntryNotFoundError as error:
            raise _out_of_reach(card, where) from error
        except EntryNotFoundError:
            continue
        except OSError as error:
            raise _out_of_reach(card, where) from error
    raise CheckpointError(
        f"encoder {card.name!r}: {where} has none of {', '.join(WEIGHTS_FILES)}; {own_file}"
    )


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


def _trunk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # CONCH and CONCH v1.5 hold poolers, and CONCH a text encoder, beside the trunk
    parts = [(f".{key}".partition(".trunk."), value) for key, value in tensors.items()]
    trunk = {name: value for (_, found, name), value in parts if found}
    several = len({before for (before, found, _), _ in parts if found}) > 1
    return dict(tensors) if several or not trunk else trunk


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


def _resample_position(model: Any, position: Tensor, source: str) -> Tensor:
    from timm.layers import resample_abs_pos_embed

    rows, cols = model.patch_embed.grid_size
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    if position.ndim != 3 or position.shape[1] == prefix + rows * cols:
        return position
    tokens = position.shape[1] - prefix
    side = round(max(tokens, 0) ** 0.5)
    if side == 0 or side * side != tokens:
        raise CheckpointError(
            f"weights of {source}: position embedding {tuple(position.shape)} is no square grid "
            f"of tokens after {prefix} prefix tokens"
        )
    resampled: Tensor = resample_abs_pos_embed(
        position.float(), new_size=[rows, cols], old_size=[side, side], num_prefix_tokens=prefix
    )
    return resampled


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {what} ({', '.join(names[:3])}{more})"


def _out_of_reach(card: EncoderCard, where: str) -> CheckpointError:
    return CheckpointError(
        f"encoder {card.name!r}: weights {where} are not in the hub's cache and the hub is out of "
        "reach: go online once, or use encoder.weights=PATH for a local file, or "
        "encoder.weights=random"
    )
