"""U-Net: segmentation-models-pytorch's decoder on a pyramid made of tokens and an image stem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import Tensor, nn

from celltyper.decoders.grid import pad_to_grid, resize, to_pixels
from celltyper.decoders.options import require_four_maps, require_width


class UnetPyramidDecoder(nn.Module):
    """U-Net decoder (doi:10.1007/978-3-319-24574-4_28) on four maps of an encoder.

    The two deepest maps enter at the patch grid, the others at 2 and 4 times it, an image stem
    at 8 times; the decoder ends at 16 times the grid and is brought to the pixels.

    Parameters
    ----------
    channels : sequence of 4 int
        Channels of the encoder's maps, from shallow to deep.
    patch_size : int
        Side of a patch in pixels.
    width : int
        Channels at full resolution, and of the output; doubled at each halving.
    """

    def __init__(self, channels: Sequence[int], patch_size: int, *, width: int = 16) -> None:
        super().__init__()
        require_four_maps("unet", channels)
        require_width("unet", width)
        self.patch_size = patch_size
        self.out_channels = width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        levels = (2 * width, 4 * width, 8 * width)
        self.project = nn.ModuleList(
            nn.Conv2d(inp, out, kernel_size=1)
            for inp, out in zip((*channels[:2], channels[2] + channels[3]), levels, strict=True)
        )
        self.decoder: nn.Module = UnetDecoder(
            encoder_channels=(3, width, *levels),
            decoder_channels=(8 * width, 4 * width, 2 * width, width),
            n_blocks=4,
            use_norm="batchnorm",
            interpolation_mode="bilinear",
        )

    def forward(self, features: Sequence[Tensor], images: Tensor) -> Tensor:
        """Decode four maps ``(B, C, h, w)`` of images ``(B, 3, H, W)`` to ``(B, width, H, W)``."""
        first, second, third, last = features
        rows, cols = last.shape[2:]
        full = resize(pad_to_grid(images, last, self.patch_size), 16 * rows, 16 * cols)
        pyramid = [
            full,
            self.stem(full),
            resize(self.project[0](first), 4 * rows, 4 * cols),
            resize(self.project[1](second), 2 * rows, 2 * cols),
            self.project[2](torch.cat((third, last), dim=1)),
        ]
        return to_pixels(self.decoder(pyramid), last, images, self.patch_size)
