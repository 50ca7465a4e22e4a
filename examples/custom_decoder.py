"""A decoder of your own: ten lines, used from Python here and from YAML beside this file."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import celltyper
from celltyper.testing import check_decoder


class Pyramidless(nn.Module):
    """All feature maps side by side, one convolution, bilinear to the image's size."""

    out_channels = 32

    def __init__(self, channels: list[int], patch_size: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(sum(channels), 32, 3, padding=1)
        self.patch_size = patch_size

    def forward(self, features: list[Tensor], images: Tensor) -> Tensor:
        """Mix the maps, blow the grid of patches up to pixels, crop to the image."""
        mixed = self.mix(torch.cat(features, dim=1)).relu()
        pixels = nn.functional.interpolate(mixed, scale_factor=self.patch_size, mode="bilinear")
        return pixels[..., : images.shape[2], : images.shape[3]]


def main() -> None:
    """Check the decoder, build a model with it and predict an image."""
    check_decoder(Pyramidless)
    encoder = celltyper.load_encoder("vit_tiny_patch16", weights="twin")
    model = celltyper.CellTyper(encoder, Pyramidless, classes=("tumour", "immune"), mpp=0.5)
    image = np.full((200, 300, 3), 230, np.uint8)
    prediction = celltyper.predict_image(model, image, mpp=0.5)
    print(f"{len(prediction)} cells on {image.shape[1]} x {image.shape[0]} px")


if __name__ == "__main__":
    main()
