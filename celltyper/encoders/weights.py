"""Encoder weights from a file, checked key by key."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from celltyper.encoders.layouts import to_timm
from celltyper.errors import CheckpointError

# where tables of several networks lie side by side, the first of these is taken
_NESTS = ("teacher", "state_dict", "model", "student")


# how a zip and a pickle begin
_TORCH = (b"PK", b"\x80")

# how the tensors of a model of celltyper are called
_HEADS, _OWN = "heads.", "encoder.model."


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file.

    Of a model that celltyper trained, they are those of its encoder.

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
        If the file is missing, unreadable, needs more than tensors, or holds none; if it is a
        model without the weights of its encoder.
    """
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist; check encoder.weights")
    try:
        if path.suffix == ".safetensors":
            return _of_encoder(load_file(path), path)
        with path.open("rb") as file:
            start = file.read(4)
        if start and not start.startswith(_TORCH):
            raise CheckpointError(
                f"weights file {path} is no file of torch; is it a web page, or a pointer of Git "
                "LFS? Download it again"
            )
        with warnings.catch_warnings():
            # an odd pickle is either read or refused; torch's advice to file an issue is no help
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"weights file {path} holds Python objects beside tensors, which celltyper never "
            "runs; save its state_dict alone, or as .safetensors"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"weights file {path} cannot be read: {reason}") from error
    while isinstance(content, Mapping):
        nest = next((n for n in _NESTS if isinstance(content.get(n), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"weights file {path} holds no table of tensors")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"weights file {path} holds no tensors")
    return tensors


def _of_encoder(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors of the encoder, if this is a model that celltyper trained."""
    if not any(name.startswith(_HEADS) for name in tensors):
        return tensors
    own = {k.removeprefix(_OWN): v for k, v in tensors.items() if k.startswith(_OWN)}
    if not own:
        raise CheckpointError(
            f"{path} is a model without the weights of its encoder, which was frozen or adapted: "
            "'celltyper export RUN --format half --whole' writes one that has them"
        )
    return own


def load_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str, depth: int | None = None
) -> None:
    """Put tensors into a timm model; every one must find its place.

    Foreign namings are recognised (see `celltyper.encoders.layouts.to_timm`), classifier and
    pretraining heads are dropped, and the position embedding is resampled to the model's grid.
    Values take the dtype of the model.

    Parameters
    ----------
    model : nn.Module
        timm model made with ``num_classes=0``; changed in place. Parameters may be on the meta
        device; they become the tensors.
    tensors : mapping of str to Tensor
        Weights in any published naming.
    source : str
        Where they come from, for messages.
    depth : int, optional
        Blocks that the model was cut to; those behind are left out of the tensors.

    Raises
    ------
    CheckpointError
        If keys are missing, left over or of another shape; the first few are listed.
    """
    expected = model.state_dict()
    found = to_timm(tensors, expected.keys())
    if depth is not None:
        found = {name: tensor for name, tensor in found.items() if _block(name) < depth}
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
    # a model that was built without memory takes the tensors themselves: no second copy
    empty = any(parameter.is_meta for parameter in model.parameters())
    values = {k: found[k].to(expected[k].dtype).contiguous() for k in expected}
    model.load_state_dict(values, assign=empty)


def _block(name: str) -> int:
    """Number of the block that a tensor belongs to, -1 if none."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


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
