"""From an image in memory to its cells: tiles, maps, instances, phenotypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from celltyper.calibration import threshold_of
from celltyper.datasets.resolution import check_mpp
from celltyper.domain import evenly
from celltyper.errors import ConfigError, DataError
from celltyper.labels import label_ids, mean_in_labels, resize_labels
from celltyper.tiling import Tile, read_padded, tile_grid
from celltyper.types import PHENOTYPE, Image, Labels, Prediction, TileModel

if TYPE_CHECKING:
    from celltyper.features import Canvas, FeatureCache
    from celltyper.models import CellTyper

SAME_MPP = 0.01
"""Relative difference of resolutions below which an image is not rescaled."""


def predict_maps(
    model: TileModel,
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
    model : CellTyper or ExportedModel
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
        See `celltyper.models.pick_precision`.
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
    turns = symmetries or model.symmetries
    if turns not in (1, 2, 4, 8):
        raise ConfigError(f"symmetries must be 1, 2, 4 or 8, got {turns}")
    step = batch_size or model.batch_size
    for start in range(0, len(tiles), step):
        part = tiles[start : start + step]
        pixels, windows = _read_tiles(image, part, canvas)
        found = model.predict_tiles(
            pixels,
            symmetries=turns,
            precision=precision,
            features=windows,
            embed=pooled is not None,
        )
        if pooled is not None and found.embeddings is not None:
            pooled.append(found.embeddings)
        for name, values in found.maps.items():
            for i, (read, write) in enumerate(part):
                inside = (
                    slice(write.row - read.row, write.row - read.row + write.height),
                    slice(write.col - read.col, write.col - read.col + write.width),
                )
                maps[name][:, *write.slices] = values[i][:, *inside]
        if progress:
            progress(min(start + step, len(tiles)), len(tiles))
    return maps


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
        pixels, windows = _read_tiles(image, tiles[start : start + model.batch_size], canvas)
        found.append(model.embed_tiles(pixels, precision=precision, features=windows))
    return np.concatenate(found)


def _tiles_of(
    model: TileModel,
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


def _read_tiles(
    image: Image, tiles: Sequence[Tile], canvas: Canvas | None
) -> tuple[NDArray[np.uint8], list[Any] | None]:
    """Pixels of some tiles (B, H, W, 3), and their features if they are known."""
    pixels = np.stack([read_padded(image, tile.read) for tile in tiles])
    return pixels, None if canvas is None else [canvas.window(tile.read) for tile in tiles]


def predict_image(
    model: TileModel,
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
    model : CellTyper or ExportedModel
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
    threshold = threshold_of(model.calibration, model.classes, abstain)
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
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    out = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        plane = _resized(image[..., channel].astype(np.float32), (height, width))
        out[..., channel] = np.clip(np.rint(plane), 0, 255)
    return out


def _resized(plane: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Bilinear, with anti-aliasing where it shrinks, in float32."""
    resized = PIL.Image.fromarray(plane).resize(shape[::-1], PIL.Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _labels_to(
    labels: Labels, cells: NDArray[np.float32], shape: tuple[int, ...]
) -> tuple[Labels, NDArray[np.float32]]:
    """Labels of another size, renumbered; cells that vanish lose their row."""
    moved = resize_labels(labels, (shape[0], shape[1]))
    kept = label_ids(moved)
    renumber = np.zeros(int(labels.max(initial=0)) + 1, np.int32)
    renumber[kept] = np.arange(1, len(kept) + 1)
    return renumber[moved], cells[kept - 1]


def _maps_to(maps: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    return np.stack([_resized(plane, shape) for plane in maps])
