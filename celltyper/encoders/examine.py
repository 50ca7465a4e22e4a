"""Does an encoder see? Statistics of its embeddings over crops of a real image."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from celltyper.encoders.cards import EncoderCard
from celltyper.encoders.folders import commit_of
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import DataError, RunError
from celltyper.types import Image

CROP = 224
"""Side of a crop in pixels of the image."""
_CROPS = 16
_SAME = 1e-5
"""Relative spread below which embeddings or a channel count as constant: float32 noise is less."""


@dataclass(frozen=True)
class Examination:
    """What `examine` found.

    Parameters
    ----------
    parameters : int
        All weights of the encoder.
    fingerprint : str
        SHA-256, see `celltyper.encoders.trainability.fingerprint`.
    map_shapes : tuple of (channels, rows, columns)
        Feature maps of one crop.
    patch_size : int
        Pixels of the image per pixel of the last map.
    crops, embed_dim : int
        Embeddings that were computed, and their length.
    mean, std : float
        Over all values of all embeddings.
    norm_range : (float, float)
        Smallest and largest Euclidean norm of an embedding.
    between_crops : float
        Mean cosine similarity of two different crops.
    with_flip : float
        Mean cosine similarity of a crop and its own mirror image.
    dead_channels : int
        Channels of the embedding that are the same for all crops.
    seconds : float
        For the embedding of one crop, after a warm-up, one at a time.
    """

    parameters: int
    fingerprint: str
    map_shapes: tuple[tuple[int, int, int], ...]
    patch_size: int
    crops: int
    embed_dim: int
    mean: float
    std: float
    norm_range: tuple[float, float]
    between_crops: float
    with_flip: float
    dead_channels: int
    seconds: float


def examine(encoder: nn.Module, image: Image) -> Examination:
    """Run an encoder on crops of an image and look at what it gives.

    An encoder that was trained sees a crop and its mirror image as more alike than two different
    crops; one with weights in the wrong places need not.

    Parameters
    ----------
    encoder : nn.Module
        From `celltyper.load_encoder`, in evaluation mode, on any device.
    image : array, shape (H, W, 3), uint8
        Real H&E; up to 16 crops of 224 px are taken from all over it.

    Returns
    -------
    Examination
        The statistics.

    Raises
    ------
    DataError
        If the image does not hold two different crops.
    RunError
        If a feature map or an embedding is not finite, or all embeddings are the same.
    """
    model: Any = encoder
    device = next(encoder.parameters()).device
    crops = [_tensor(crop, device) for crop in _crops(image)]
    if all(torch.equal(crop, crops[0]) for crop in crops):
        raise DataError("image has the same content everywhere; give one with tissue")
    with torch.inference_mode():
        maps = model(crops[0])
        model.embed(crops[0])
        _wait(device)
        start = time.perf_counter()
        rows = [model.embed(crop) for crop in crops]
        _wait(device)
        seconds = (time.perf_counter() - start) / len(crops)
        flipped = [model.embed(crop.flip(-1)) for crop in crops]
    embeddings, mirrored = torch.cat(rows).double().cpu(), torch.cat(flipped).double().cpu()
    for what, tensors in (("feature maps", maps), ("embeddings", (embeddings, mirrored))):
        bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
        if bad:
            raise RunError(f"{what} of the encoder hold {bad} values that are not finite")
    norms = embeddings.norm(dim=1)
    spread = embeddings.std(dim=0)
    size = float(embeddings.abs().mean())
    if float(spread.max()) <= _SAME * size or size == 0:
        raise RunError(f"the encoder gives the same embedding for {len(crops)} different crops")
    return Examination(
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        fingerprint=fingerprint(encoder),
        map_shapes=tuple((int(m.shape[1]), int(m.shape[2]), int(m.shape[3])) for m in maps),
        patch_size=int(model.patch_size),
        crops=len(crops),
        embed_dim=embeddings.shape[1],
        mean=float(embeddings.mean()),
        std=float(embeddings.std()),
        norm_range=(float(norms.min()), float(norms.max())),
        between_crops=_mean_similarity(embeddings),
        with_flip=float(F.cosine_similarity(embeddings, mirrored).mean()),
        dead_channels=int((spread <= _SAME * size).sum()),
        seconds=seconds,
    )


def _crops(image: Image) -> list[Image]:
    """Crops at up to 4 x 4 places, spread evenly; fewer where they would coincide."""
    tops, lefts = (
        sorted({round(x) for x in np.linspace(0, side - CROP, min(4, side // (CROP // 2) - 1))})
        if side >= CROP
        else []
        for side in image.shape[:2]
    )
    crops = [image[top : top + CROP, left : left + CROP] for top in tops for left in lefts]
    if len(crops) < 2:
        rows, columns = image.shape[:2]
        raise DataError(
            f"image of {columns} x {rows} px holds no two crops of {CROP} px; give one of at least "
            f"{CROP} x {3 * CROP // 2} px"
        )
    return crops[:_CROPS]


def _tensor(crop: Image, device: torch.device) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(crop)).to(device)
    return pixels.permute(2, 0, 1)[None].float() / 255


def _mean_similarity(embeddings: Tensor) -> float:
    unit = F.normalize(embeddings)
    similarity = unit @ unit.T
    n = len(similarity)
    return float((similarity.sum() - similarity.trace()) / (n * (n - 1)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def examination_text(
    card: EncoderCard, weights: str | Path, image: Path, found: Examination
) -> str:
    """Write an examination for the terminal.

    Parameters
    ----------
    card : EncoderCard
        The encoder.
    weights : str or Path
        File that was loaded, or "random" or "twin".
    image : Path
        What it was run on.
    found : Examination
        The result.

    Returns
    -------
    str
        One fact a line; the last says so if the figures are odd.
    """
    commit = commit_of(weights) if isinstance(weights, Path) else None
    size = f"{card.input_size} px" if card.input_size else "as it is"
    lines = [
        ("weights", str(weights)),
        ("commit", commit or "unknown"),
        ("parameters", f"{found.parameters / 1e6:.1f} million"),
        ("fingerprint", found.fingerprint),
        ("image", f"{image}, {found.crops} crops of {CROP} px, embedded at {size}"),
        ("feature maps", ", ".join(" x ".join(map(str, shape)) for shape in found.map_shapes)),
        ("embedding", f"{found.embed_dim} values, {found.dead_channels} of them dead"),
        ("values", f"mean {found.mean:.4g}, standard deviation {found.std:.4g}"),
        ("norm", f"{found.norm_range[0]:.4g} to {found.norm_range[1]:.4g}"),
        ("similarity", f"{found.between_crops:.4f} between crops"),
        ("", f"{found.with_flip:.4f} of a crop and its mirror image"),
        ("time", f"{found.seconds:.3g} s per crop"),
    ]
    text = [card.name, *(f"  {name:13} {value}" for name, value in lines)]
    if found.with_flip <= found.between_crops:
        text.append("  odd: a mirror image is no more alike than another crop: other weights?")
    return "\n".join(text)
