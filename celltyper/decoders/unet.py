"""U-Net: segmentation-models-pytorch's decoder on four maps and an image stem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import Tensor, nn

from celltyper.decoders.grid import pad_to_grid, resize, to_pixels
from celltyper.decoders.options import require_four_maps, require_strides, require_width


class UnetPyramidDecoder(nn.Module):
    """U-Net decoder (doi:10.1007/978-3-319-24574-4_28) on four maps of an encoder.

    The two deepest maps enter at the patch grid, the others at 2 and 4 times it, an image stem
    at 8 times; the decoder ends at 16 times the grid and is brought to the pixels. The maps of
    a pyramid enter as they are, above an image stem at twice the finest map.

    Parameters
    ----------
    channels : sequence of 4 int
        Channels of the encoder's maps, from shallow to deep.
    patch_size : int
        Side of a patch in pixels.
    width : int
        Channels at full resolution, and of the output; doubled at each halving.
    strides : sequence of 4 int, optional
        Strides of the maps in pixels, from fine to coarse; by default all are `patch_size`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        patch_size: int,
        *,
        width: int = 16,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        require_four_maps("unet", channels)
        require_width("unet", width)
        if strides is not None:
            require_strides("unet", channels, strides)
        self.is_pyramid = strides is not None
        self.stride = patch_size if strides is None else strides[-1]
        self.out_channels = width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        levels = list(channels)
        if strides is None:
            levels = [2 * width, 4 * width, 8 * width]
            self.project = nn.ModuleList(
                nn.Conv2d(inp, out, kernel_size=1)
                for inp, out in zip((*channels[:2], channels[2] + channels[3]), levels, strict=True)
            )
        blocks = len(levels) + 1
        self.decoder: nn.Module = UnetDecoder(
            encoder_channels=(3, width, *levels),
            decoder_channels=[width * 2**i for i in reversed(range(blocks))],
            n_blocks=blocks,
            use_norm="batchnorm",
            interpolation_mode="bilinear",
        )

    def forward(self, features: Sequence[Tensor], images: Tensor) -> Tensor:
        """Decode four maps ``(B, C, h, w)`` of images ``(B, 3, H, W)`` to ``(B, width, H, W)``."""
        levels = list(features) if self.is_pyramid else self._pyramid(features)
        rows, cols = levels[0].shape[2:]
        whole = pad_to_grid(images, features[-1], self.stride)
        full = resize(whole, 4 * rows, 4 * cols)
        x = self.decoder([full, self.stem(full), *levels])
        return to_pixels(x, features[-1], images, self.stride)

    def _pyramid(self, features: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, last = features
        rows, cols = last.shape[2:]
        return [
            resize(self.project[0](first), 4 * rows, 4 * cols),
            resize(self.project[1](second), 2 * rows, 2 * cols),
            self.project[2](torch.cat((third, last), dim=1)),
        ]
