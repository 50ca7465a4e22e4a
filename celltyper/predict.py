"""From an image in memory to its cells: tiles, maps, instances, phenotypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from celltyper.datasets.resolution import check_mpp
from celltyper.domain import evenly
from celltyper.errors import ConfigError, DataError
from celltyper.features import Canvas, FeatureCache
from celltyper.labels import label_ids, mean_in_labels, resize_labels
from celltyper.models import PHENOTYPE, CellTyper, threshold_of
from celltyper.symmetries import ORDER, turn, turn_back
from celltyper.tiling import Tile, read_padded, tile_grid
from celltyper.types import Image, Labels, Prediction

SAME_MPP = 0.01
"""Relative difference of resolutions below which an image is not rescaled."""


def pick_device(device: str = "auto") -> torch.device:
    """Choose where to compute.

    Parameters
    ----------
    device : str
        ``"auto"`` takes CUDA, then MPS, then the CPU; anything else is torch's name of a device.

    Returns
    -------
    torch.device

    Raises
    ------
    ConfigError
        If the device is unknown or not available.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"device {device!r} is not available here ({first}); use auto or cpu"
        ) from error


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext[None]:
    """Context of mixed precision, refused where it would be slower than float32.

    Parameters
    ----------
    device : torch.device
    precision : {"fp32", "bf16", "fp16"}

    Returns
    -------
    context manager

    Raises
    ------
    ConfigError
        For fp16 on a CPU, or bf16 on a CPU without the instructions (2 to 9 times slower there).
    """
    if precision == "fp32":
        return nullcontext()
    if device.type == "cpu" and (precision == "fp16" or not _has_bf16_instructions()):
        raise ConfigError(f"precision {precision} is not supported by this CPU; use fp32")
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def pick_precision(model: CellTyper, precision: str | None) -> str:
    """Precision of the forward pass.

    Parameters
    ----------
    model : CellTyper
        On the device that it is to run on.
    precision : {"fp32", "bf16", "fp16"} or None
        None takes ``model.precision`` where the device computes faster in it, fp32 elsewhere.

    Returns
    -------
    str

    Raises
    ------
    ConfigError
        See `autocast`.
    """
    if precision is not None:
        autocast(model.device, precision)
        return precision
    faster = {"bf16": multiplies_bf16(model.device), "fp16": model.device.type != "cpu"}
    return model.precision if faster.get(model.precision) else "fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 itself; emulation is slower than float32.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    bool
    """
    if device.type == "cuda":
        # emulated before Ampere
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type != "cpu" or _has_bf16_instructions()


def _has_bf16_instructions() -> bool:
    """Whether the CPU multiplies bf16 itself; emulation is 2 to 9 times slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


@torch.inference_mode()
def predict_maps(
    model: CellTyper,
    image: Image,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    symmetries: int | None = None,
    precision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    features: FeatureCache | None = None,
    pooled: list[NDArray[np.float32]] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Run the model over an image of any size, tile by tile.

    Parameters
    ----------
    model : CellTyper
        Used in evaluation mode; its previous mode is restored.
    image : ndarray of uint8, shape (H, W, 3)
        RGB at the model's resolution. Borders are mirrored, so images smaller than a tile work.
    tile, overlap : int or None
        Side of the read regions, and pixels shared by those of two neighbours; None takes
        ``model.tile`` and ``model.overlap``.
    batch_size : int or None
        Tiles per forward pass; None takes ``model.batch_size``.
    symmetries : {1, 2, 4, 8} or None
        Every tile is shown so many times, turned and mirrored, and the activated maps are
        averaged (test-time augmentation); None takes ``model.symmetries``.
    precision : {"fp32", "bf16", "fp16"} or None
        See `pick_precision`.
    progress : callable or None
        Called with (tiles done, tiles in all).
    features : FeatureCache or None
        Where features of the model's frozen encoder are kept: it is not run where they are
        known, which is for tiles as they are, and tile and overlap are those of the cache.
    pooled : list or None
        Gets the mean of the last feature map over every tile as it is, (tiles, C) a batch. The
        encoder does not run once more for it.

    Returns
    -------
    dict of str to ndarray of float32, each (C, H, W)
        Activated maps.
    """
    tiles, canvas = _tiles_of(model, image, tile, overlap, features)
    maps = {
        name: np.empty((spec.channels, *image.shape[:2]), np.float32)
        for name, spec in model.maps.items()
    }
    precision = pick_precision(model, precision)
    turns = symmetries or model.symmetries
    if turns not in (1, 2, 4, 8):
        raise ConfigError(f"symmetries must be 1, 2, 4 or 8, got {turns}")
    step = batch_size or model.batch_size
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(tiles), step):
            part = tiles[start : start + step]
            batch, known = _batch_of(model, image, part, canvas)
            with autocast(model.device, precision):
                if pooled is not None:
                    known = list(model.encoder(batch)) if known is None else known
                    pooled.append(mean_of_tiles(known))
                means = activated_maps(model, batch, turns, known)
            for name, values in means.items():
                host = values.cpu().numpy()
                for i, (read, write) in enumerate(part):
                    inside = (
                        slice(write.row - read.row, write.row - read.row + write.height),
                        slice(write.col - read.col, write.col - read.col + write.width),
                    )
                    maps[name][:, *write.slices] = host[i][:, *inside]
            if progress:
                progress(min(start + step, len(tiles)), len(tiles))
    finally:
        model.train(was_training)
    return maps


@torch.inference_mode()
def tile_embeddings(
    model: CellTyper,
    image: Image,
    mpp: float | None,
    *,
    most: int,
    precision: str = "fp32",
    features: FeatureCache | None = None,
) -> NDArray[np.float32]:
    """What the encoder sees of an image: the mean of its last feature map over every tile.

    Parameters
    ----------
    model : CellTyper
        In evaluation mode.
    image : ndarray of uint8, shape (H, W, 3)
    mpp : float or None
        Micrometres per pixel of the image, needed if the model has a resolution.
    most : int
        Of more tiles so many are taken, evenly.
    precision, features
        See `predict_maps`.

    Returns
    -------
    ndarray of float32, shape (tiles, C)
    """
    if model.mpp is not None and mpp is not None:
        image = rescale(image, mpp / model.mpp)
    tiles, canvas = _tiles_of(model, image, None, None, features)
    tiles = [tiles[i] for i in evenly(len(tiles), most)]
    found = []
    for start in range(0, len(tiles), model.batch_size):
        part = tiles[start : start + model.batch_size]
        batch, known = _batch_of(model, image, part, canvas)
        with autocast(model.device, precision):
            found.append(mean_of_tiles(list(model.encoder(batch)) if known is None else known))
    return np.concatenate(found)


def mean_of_tiles(features: Sequence[Tensor]) -> NDArray[np.float32]:
    """Mean of the last feature map (B, C, h, w) over each tile: (B, C)."""
    mean: NDArray[np.float32] = features[-1].float().mean(dim=(2, 3)).cpu().numpy()
    return mean


def _tiles_of(
    model: CellTyper,
    image: Image,
    tile: int | None,
    overlap: int | None,
    features: FeatureCache | None,
) -> tuple[list[Tile], Canvas | None]:
    """The tiles of an image, and what is known of it."""
    size, shared = tile or model.tile, model.overlap if overlap is None else overlap
    canvas = None
    if features is not None:
        size, shared, canvas = features.tile, features.overlap, features.canvas(image)
    try:
        return tile_grid(image.shape[:2], size, shared), canvas
    except ValueError as error:
        raise ConfigError(f"infer.overlap: {error}") from error


def _batch_of(
    model: CellTyper, image: Image, tiles: Sequence[Tile], canvas: Canvas | None
) -> tuple[Tensor, list[Tensor] | None]:
    """Pixels of some tiles as the model takes them, and their features if they are known."""
    pixels = np.stack([read_padded(image, t.read) for t in tiles])
    batch = torch.from_numpy(pixels).to(model.device).permute(0, 3, 1, 2).float() / 255
    if canvas is None:
        return batch, None
    windows = [canvas.window(t.read) for t in tiles]
    return batch, [torch.stack(x).to(model.device) for x in zip(*windows, strict=True)]


def activated_maps(
    model: CellTyper, batch: Tensor, symmetries: int = 1, features: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Activated maps of tiles, averaged over their first symmetries.

    Parameters
    ----------
    model : CellTyper
    batch : Tensor, shape (B, 3, H, W), float32
        RGB in [0, 1].
    symmetries : {1, 2, 4, 8}
        See `predict_maps`.
    features : list of Tensor, optional
        What the encoder gives for these tiles as they are, if it is known already.

    Returns
    -------
    dict of str to Tensor, each (B, C, H, W)
    """
    if symmetries == 1:
        return model.activate(model(batch, features))
    total: dict[str, Tensor] = {}
    for which in ORDER[:symmetries]:
        # the first of them is the tile as it is
        known = None if total else features
        maps = model.activate(model(turn(batch, which), known))
        for name, values in maps.items():
            back = turn_back(values, which, vector=model.maps[name].vector)
            total[name] = total[name] + back if name in total else back
    return {name: values / symmetries for name, values in total.items()}


def predict_image(
    model: CellTyper,
    image: Image,
    mpp: float | None = None,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    symmetries: int | None = None,
    precision: str | None = None,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
    features: FeatureCache | None = None,
    abstain: float | None = None,
) -> Prediction:
    """Find, outline and type every cell of an image.

    Parameters
    ----------
    model : CellTyper
    image : ndarray of uint8, shape (H, W, 3)
        RGB, any size.
    mpp : float or None
        Micrometres per pixel of the image. Needed if the model has a resolution of its own: the
        image is then rescaled to it, and labels and maps are given back in the image's pixels.
    tile, overlap, batch_size, symmetries, precision, progress, features
        See `predict_maps`.
    name : str
        Carried into the prediction.
    abstain : float or None
        Leave cells without a name that are less sure than this share of the validation cells, see
        `celltyper.calibration`; None gives every cell one.

    Returns
    -------
    Prediction
        Class probabilities are calibrated if the model is, and there is a distance from the
        training images if it knows them.

    Raises
    ------
    DataError
        If `mpp` is missing or out of range, or the image is not RGB uint8.
    ConfigError
        If the model knows no threshold for `abstain`.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(
            f"image {name!r} must be (H, W, 3) uint8 and not empty, got {image.shape} {image.dtype}"
        )
    check_mpp(mpp)
    threshold = threshold_of(model, abstain)
    scaled = image
    if model.mpp is not None:
        if mpp is None:
            raise DataError(
                f"image {name!r} has no resolution and the model works at {model.mpp} "
                "micrometres per pixel: pass --mpp (mpp=... in Python)"
            )
        scaled = rescale(image, mpp / model.mpp)
    pooled: list[NDArray[np.float32]] | None = None if model.domain is None else []
    maps = predict_maps(
        model,
        scaled,
        tile=tile,
        overlap=overlap,
        batch_size=batch_size,
        symmetries=symmetries,
        precision=precision,
        progress=progress,
        features=features,
        pooled=pooled,
    )
    distance = None
    if model.domain is not None and pooled:
        distance = model.domain.of_image(model.domain.distances(np.concatenate(pooled)))
    probabilities = maps.pop(PHENOTYPE)
    labels = model.instances.decode(maps)
    cells = mean_in_labels(labels, probabilities)
    if scaled is not image:
        labels, cells = _labels_to(labels, cells, image.shape[:2])
        probabilities = _maps_to(probabilities, image.shape[:2])
    return Prediction(
        labels,
        probabilities,
        cells,
        model.classes,
        mpp,
        name,
        model.colors,
        model.calibration,
        threshold,
        distance,
    )


def rescale(image: Image, factor: float) -> Image:
    """Resize an image by a factor, with anti-aliasing; near 1 it is returned as it is.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
    factor : float
        New over old size.

    Returns
    -------
    ndarray of uint8
    """
    if abs(factor - 1) < SAME_MPP:
        return image
    shape = [max(1, round(side * factor)) for side in image.shape[:2]]
    # Pillow's arrays are read-only, of which torch would warn the user.
    pixels = torch.from_numpy(np.require(image, requirements="W")).permute(2, 0, 1)[None].float()
    out = F.interpolate(pixels, shape, mode="bilinear", align_corners=False, antialias=True)
    return out[0].round_().clamp_(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def _labels_to(
    labels: Labels, cells: NDArray[np.float32], shape: tuple[int, ...]
) -> tuple[Labels, NDArray[np.float32]]:
    """Labels of another size, renumbered; cells that vanish lose their row."""
    moved = resize_labels(labels, (shape[0], shape[1]))
    kept = label_ids(moved)
    renumber = np.zeros(int(labels.max(initial=0)) + 1, np.int32)
    renumber[kept] = np.arange(1, len(kept) + 1)
    return renumber[moved], cells[kept - 1]


def _maps_to(maps: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    out = F.interpolate(
        torch.from_numpy(maps)[None], shape, mode="bilinear", align_corners=False, antialias=True
    )
    result: NDArray[np.float32] = out[0].numpy()
    return result
