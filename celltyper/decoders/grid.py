"""From the patch grid back to the image's pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pad_to_grid(images: Tensor, features: Tensor, patch_size: int) -> Tensor:
    """Repeat the bottom and right border of images until they cover the feature grid.

    Parameters
    ----------
    images : Tensor, shape (B, C, H, W)
        Images at full resolution.
    features : Tensor, shape (B, D, h, w)
        A map of one value a patch, h = ceil(H / patch_size).
    patch_size : int
        Side of a patch in pixels.

    Returns
    -------
    Tensor, shape (B, C, h * patch_size, w * patch_size)
        The padded images.
    """
    bottom = features.shape[2] * patch_size - images.shape[2]
    right = features.shape[3] * patch_size - images.shape[3]
    if bottom or right:
        return F.pad(images, (0, right, 0, bottom), mode="replicate")
    return images


def resize(x: Tensor, rows: int, cols: int) -> Tensor:
    """Resize maps bilinearly, pixel edges on pixel edges; the same size passes untouched."""
    if x.shape[2:] == (rows, cols):
        return x
    return F.interpolate(x, size=(rows, cols), mode="bilinear", align_corners=False)


def to_pixels(x: Tensor, features: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """Bring a map over the feature grid to the image's pixels without shifting it.

    The grid covers whole patches and may reach past the image: the map is resized to the
    grid's extent in pixels and cut to the image, never squeezed into it.

    Parameters
    ----------
    x : Tensor, shape (B, C, r, c)
        Map over the extent of `features`, at any resolution.
    features : Tensor, shape (B, D, h, w)
        A map of one value a patch.
    images : Tensor, shape (B, 3, H, W)
        The images.
    patch_size : int
        Side of a patch in pixels.

    Returns
    -------
    Tensor, shape (B, C, H, W)
        The map in pixels.
    """
    x = resize(x, features.shape[2] * patch_size, features.shape[3] * patch_size)
    return x[:, :, : images.shape[2], : images.shape[3]]
