"""What happens to an image before the network sees it, on the device and inside the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from celltyper.errors import ConfigError

Interpolation = Literal["bilinear", "bicubic"]


class Prepare(nn.Module):
    """Scale, normalise and pad images as an encoder's card says.

    The normalisation is part of the model, so a model that was exported or handed on cannot be
    fed wrongly; it is one multiply-add over the image.

    Parameters
    ----------
    mean, std : sequence of 3 float
        Normalisation of RGB in [0, 1].
    stride : int
        Coarsest stride of the network in its own pixels: a patch, or the deepest level.
    magnify : float
        Pixels of the network per pixel of the image, along a side. It is rounded so that
        `patch_size`, the stride in pixels of the image, is a whole number.
    input_size : int or None
        Side of the square that an embedding is computed of; None takes the image as it is.
    resize : int or None
        Length to which the shorter side is scaled before the central `input_size` is cut out;
        None is `input_size`.
    interpolation : {"bilinear", "bicubic"}
        How images are scaled, in the way of Pillow and torchvision.

    Attributes
    ----------
    patch_size : int
        Coarsest stride in pixels of the image.

    Raises
    ------
    ConfigError
        If the magnification leaves less than a pixel to a patch.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        stride: int,
        *,
        magnify: float = 1.0,
        input_size: int | None = None,
        resize: int | None = None,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        super().__init__()
        if not magnify > 0 or round(stride / magnify) < 1:
            raise ConfigError(
                f"magnification {magnify:g} leaves less than one pixel to a patch of {stride} px"
            )
        self.stride = stride
        self.patch_size = round(stride / magnify)
        self.input_size = input_size
        self.resize = resize or input_size
        self.interpolation = interpolation
        scale = 1 / torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
        shift = -torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1) * scale
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("shift", shift.float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Make images ready for feature maps.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            RGB in [0, 1].

        Returns
        -------
        Tensor, shape (B, 3, ceil(H / patch_size) * stride, ceil(W / patch_size) * stride)
            Normalised. Where `patch_size` does not divide the image, its last row and column
            are repeated.
        """
        p = self.patch_size
        images = _padded(images, p)
        if p != self.stride:
            rows, cols = images.shape[2] // p, images.shape[3] // p
            images = self._resized(images, rows * self.stride, cols * self.stride)
        return self.normalise(images)

    def crop(self, images: Tensor) -> Tensor:
        """Scale the shorter side to `resize` and cut out the centre, for an embedding.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            RGB in [0, 1].

        Returns
        -------
        Tensor, shape (B, 3, input_size, input_size)
            RGB in [0, 1]; the images themselves if `input_size` is None.
        """
        if self.input_size is None or self.resize is None:
            return images
        rows, cols = images.shape[2:]
        short = min(rows, cols)
        # rounded down, as torchvision does, with which the published embeddings were made
        images = self._resized(images, rows * self.resize // short, cols * self.resize // short)
        # half a pixel goes to the even one, as torchvision rounds
        top = round((images.shape[2] - self.input_size) / 2)
        left = round((images.shape[3] - self.input_size) / 2)
        return images[:, :, top : top + self.input_size, left : left + self.input_size]

    def whole(self, images: Tensor) -> Tensor:
        """Make images as they are ready for an embedding: padded to the stride, normalised."""
        return self.normalise(_padded(images, self.stride))

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation, as one multiply-add."""
        return torch.addcmul(self.shift, images, self.scale)

    def _resized(self, images: Tensor, rows: int, cols: int) -> Tensor:
        if images.shape[2:] == (rows, cols):
            return images
        # smoothed whichever way: without it torch enlarges by another cubic than Pillow and
        # torchvision, with which the published encoders were trained
        return F.interpolate(
            images, (rows, cols), mode=self.interpolation, align_corners=False, antialias=True
        )


class Prepared(nn.Module):
    """An encoder that prepares its images itself."""

    prepare: Prepare

    def embed(self, images: Tensor) -> Tensor:
        """Pooled embedding.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            RGB in [0, 1]; scaled and cut to the input size.

        Returns
        -------
        Tensor, shape (B, embed_dim)
            One vector an image.
        """
        return self.embed_whole(self.prepare.crop(images))

    def embed_whole(self, images: Tensor) -> Tensor:
        """As `embed`, of images that are neither scaled nor cut."""
        raise NotImplementedError


def _padded(images: Tensor, multiple: int) -> Tensor:
    bottom, right = -images.shape[2] % multiple, -images.shape[3] % multiple
    if bottom or right:
        # reflection fails where the image is smaller than the padding; a repeat never does
        return F.pad(images, (0, right, 0, bottom), mode="replicate")
    return images
