"""Augmentation of a tile: geometry with one resampling, then stain, color, blur and noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from celltyper.transforms.color import color_jitter, gaussian_blur, gaussian_noise, hed_jitter
from celltyper.transforms.geometry import (
    affine_matrix,
    elastic_field,
    split_mirrored,
    symmetry,
    warp,
)
from celltyper.types import Image, Labels

_DEGRADED = 0.25  # share of tiles that get blur, and that get noise


class Tile(NamedTuple):
    """A tile and its labels.

    ``image`` (H, W, 3) uint8; ``labels`` (H, W) int32, ids of the sample; ``phenotypes`` uint8,
    class by label id, at least ``labels.max() + 1`` long.
    """

    image: Image
    labels: Labels
    phenotypes: NDArray[np.uint8]


def augment(
    image: Image,
    labels: Labels,
    phenotypes: NDArray[np.uint8],
    rng: Generator,
    *,
    size: int | None = None,
    dihedral: bool = True,
    rotate: float = 180.0,
    shift: float = 0.1,
    scale: float = 0.2,
    elastic: float = 1.5,
    affine_probability: float = 1.0,
    hed_sigma: float = 0.025,
    hed_bias: float = 0.05,
    color: float = 0.1,
    blur: float = 0.7,
    noise: float = 4.0,
) -> Tile:
    """Augment one tile.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB image.
    labels : ndarray of int32, shape (H, W)
        Instance labels.
    phenotypes : ndarray of uint8
        Class by label id.
    rng : numpy.random.Generator
        Source of randomness.
    size : int, optional
        Height and width of the result, cut from the middle; that of the input by default. A larger
        input gives rotations real surroundings instead of mirrored ones.
    dihedral : bool
        One of the eight symmetries of the square, at random.
    rotate : float
        Largest rotation in degrees, either way.
    shift : float
        Largest shift, as a share of the result's size.
    scale : float
        Magnification lies between ``1 - scale`` and ``1 + scale``.
    elastic : float
        Root mean square displacement in pixels, see `elastic_field`.
    affine_probability : float
        Share of tiles that are rotated, shifted, scaled and bent; the others keep their sharpness.
    hed_sigma, hed_bias : float
        See `hed_jitter`.
    color : float
        Strength of brightness, contrast and saturation; a fifth of it that of the hue, see
        `color_jitter`.
    blur, noise : float
        Largest sigma of the blur in pixels and of the noise in grey levels; a quarter of the tiles
        gets each.

    Returns
    -------
    Tile
        Labels keep their ids; an id is gone only if it is out of view. Mirrored copies of nuclei
        beyond the border have ids of their own, with their class, after the given ones.
    """
    if dihedral:
        image, labels = symmetry(image, labels, int(rng.integers(8)))
    shape = (size, size) if size else (labels.shape[0], labels.shape[1])
    moving = rng.random() < affine_probability
    angle, zoom = math.radians(rng.uniform(-rotate, rotate)), 1 + rng.uniform(-scale, scale)
    matrix = affine_matrix(angle, zoom) if moving else np.eye(2)
    offset = rng.uniform(-shift, shift, 2) * shape * moving
    field = elastic_field(shape, elastic, rng) if moving and elastic else None
    image, labels, mirrored = warp(image, labels, matrix, offset, field, shape)
    labels, phenotypes = split_mirrored(labels, mirrored, phenotypes)
    image = hed_jitter(image, rng, hed_sigma, hed_bias)
    image = color_jitter(image, rng, color, color, color, color / 5)
    if blur and rng.random() < _DEGRADED:
        image = gaussian_blur(image, rng.uniform(0, blur))
    if noise and rng.random() < _DEGRADED:
        image = gaussian_noise(image, rng, rng.uniform(0, noise))
    return Tile(np.ascontiguousarray(image), np.ascontiguousarray(labels), phenotypes)
