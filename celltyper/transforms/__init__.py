"""Augmentation of tiles.

Functions of arrays and plain numbers. Randomness comes from the generator that is passed in, and
nothing else: the same generator state gives the same tile in every process. A strength of zero
leaves the pixels exactly as they are.
"""

from celltyper.transforms.augmentation import Tile, augment
from celltyper.transforms.color import color_jitter, gaussian_blur, gaussian_noise, hed_jitter
from celltyper.transforms.geometry import (
    affine_matrix,
    elastic_field,
    split_mirrored,
    symmetry,
    warp,
)

__all__ = [
    "Tile",
    "affine_matrix",
    "augment",
    "color_jitter",
    "elastic_field",
    "gaussian_blur",
    "gaussian_noise",
    "hed_jitter",
    "split_mirrored",
    "symmetry",
    "warp",
]
