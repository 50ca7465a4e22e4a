"""What the encoder sees where a cell lies: its last feature map, read at the cell's centroid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from celltyper.errors import ConfigError
from celltyper.models import CellTyper, Ensemble
from celltyper.wholeslide.plan import Plan


class FeatureGrid(NamedTuple):
    """Last feature map of a tile: square, its pixels as large as so many of the tile."""

    channels: int
    side: int
    stride: int


def the_encoder(model: CellTyper) -> nn.Module:
    """The one encoder of a model.

    Raises
    ------
    ConfigError
        If it is an ensemble whose models have different encoders.
    """
    if not isinstance(model, Ensemble):
        return model.encoder
    if not model.shares:
        raise ConfigError(
            "the models of this ensemble have different encoders, so that a cell has no one "
            "embedding: give one of the models, or leave out --embeddings"
        )
    encoder: nn.Module = model.models[0].encoder  # type: ignore[assignment]
    return encoder


def feature_grid(encoder: nn.Module, tile: int) -> FeatureGrid:
    """Size of the last feature map that an encoder gives of a tile.

    Parameters
    ----------
    encoder : nn.Module
        See `celltyper.models.CellTyper`.
    tile : int
        Side in pixels.

    Returns
    -------
    FeatureGrid
        Where the patches do not divide the tile, the map reaches past its border.
    """
    plain: Any = encoder
    patch = int(plain.patch_size)
    strides = getattr(plain, "strides", None)
    stride = patch if strides is None else int(strides[-1])
    return FeatureGrid(int(plain.channels[-1]), -(-tile // patch) * patch // stride, stride)


def half_precision(features: Tensor) -> NDArray[np.float16]:
    """Features as they are kept.

    Raises
    ------
    ConfigError
        If they are too large for it.
    """
    half: NDArray[np.float16] = features.half().cpu().numpy()
    if not np.isfinite(half).all():
        raise ConfigError(
            "features of this encoder do not fit into float16, so they cannot be kept: leave out "
            "--embeddings"
        )
    return half


def embeddings_at(
    points: NDArray[np.float64],
    plan: Plan,
    grid: FeatureGrid,
    read: Callable[[int, int, int], NDArray[np.float16]],
) -> NDArray[np.float32]:
    """Features at points, bilinear between the centres of the pixels of the feature map.

    A point takes those of the tile whose write region it lies in, so that they depend on nothing
    but the slide and the grid of tiles. Pixel i of the map covers ``[i * stride, (i + 1) *
    stride)`` of the tile; beyond the outermost centres the map goes on as there.

    Parameters
    ----------
    points : ndarray of float64, shape (n, 2)
        x, y in pixels of the plan's grid, with the centre of the first pixel at a half.
    plan : Plan
    grid : FeatureGrid
    read : callable
        ``read(row, first, stop)`` gives the features of the tiles ``first`` to ``stop`` of a row
        of tiles: float16 (tiles, C, h, w).

    Returns
    -------
    ndarray of float32, shape (n, C)
        Rounded to what float16 holds.
    """
    found = np.empty((len(points), grid.channels), np.float32)
    last = np.array(plan.run.shape[::-1]) - 1
    tiles = np.floor(points / plan.step).astype(np.intp).clip(0, last)
    places = (points - tiles * plan.step + plan.overlap // 2) / grid.stride - 0.5
    for row in np.unique(tiles[:, 1]):
        here = np.flatnonzero(tiles[:, 1] == row)
        cols = tiles[here, 0]
        first = int(cols.min())
        features = read(int(row), first, int(cols.max()) + 1)
        found[here] = _bilinear(features, cols - first, *places[here].T)
    return found.astype(np.float16).astype(np.float32)


def _bilinear(
    features: NDArray[np.float16],
    which: NDArray[np.intp],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Values of maps (tiles, C, h, w), each at one place of one tile: (n, C)."""
    height, width = features.shape[2:]
    x, y = x.clip(0, width - 1), y.clip(0, height - 1)
    left, top = x.astype(np.intp), y.astype(np.intp)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    u, v = ((at - np.floor(at)).astype(np.float32)[:, None] for at in (x, y))

    def corner(row: NDArray[np.intp], col: NDArray[np.intp]) -> NDArray[np.float32]:
        return features[which, :, row, col].astype(np.float32)

    upper = corner(top, left) * (1 - u) + corner(top, right) * u
    lower = corner(bottom, left) * (1 - u) + corner(bottom, right) * u
    return np.asarray(upper * (1 - v) + lower * v, np.float32)
