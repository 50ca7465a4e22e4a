"""DPT: four maps as a pyramid, fused from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from celltyper.decoders.grid import resize, to_pixels
from celltyper.decoders.options import require_four_maps, require_strides, require_width
from celltyper.errors import ConfigError


class DptDecoder(nn.Module):
    """Dense prediction transformer's decoder (doi:10.48550/arXiv.2103.13413).

    Four maps are reassembled at 4, 2, 1 and 1/2 times the patch grid, fused by residual units
    and doubled at each step to 8 times the grid, then brought to the pixels. The maps of a
    pyramid are fused at their own resolutions, to twice the finest.

    Parameters
    ----------
    channels : sequence of 4 int
        Channels of the encoder's maps, from shallow to deep.
    patch_size : int
        Side of a patch in pixels.
    width : int
        Channels of the pyramid; the paper has 256.
    finest : {1, 2, 4, 8}
        How many times finer than the patch grid the finest map is reassembled; the others
        follow by halves. The paper has 4. Half of it is a quarter of the work, enough for
        classes, too coarse for borders. Not for the maps of a pyramid.
    stem : int
        Channels of two convolutions on the image itself, which join the pyramid at its end: the
        borders of nuclei are finer than a patch. 0, as in the paper, has none.
    strides : sequence of 4 int, optional
        Strides of the maps in pixels, from fine to coarse; by default all are `patch_size`.

    Notes
    -----
    Batch norm inside the residual units, as the paper advises for segmentation: statistics of
    the tile (instance or group norm) would make cells depend on where the tiles lie.
    """

    def __init__(
        self,
        channels: Sequence[int],
        patch_size: int,
        *,
        width: int = 64,
        finest: int = 4,
        stem: int = 0,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        require_four_maps("dpt", channels)
        require_width("dpt", width, least=2)
        if not isinstance(stem, int) or stem < 0:
            raise ConfigError(f"decoder 'dpt' needs a stem of 0 channels or more, got {stem!r}")
        if finest not in (1, 2, 4, 8):
            raise ConfigError(f"decoder 'dpt' needs finest of 1, 2, 4 or 8, got {finest!r}")
        self.stride = patch_size
        self.out_channels = width // 2
        scale = [_rescaled(width, finest, 2**level) for level in range(4)]
        if strides is not None:
            if finest != 4:
                raise ConfigError(
                    "decoder 'dpt': finest is for maps of one size, those of this encoder differ; "
                    "leave it out"
                )
            require_strides("dpt", channels, strides)
            self.stride = strides[-1]
            scale = [nn.Identity() for _ in channels]
        self.reassemble = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, kernel_size=1), s)
            for c, s in zip(channels, scale, strict=True)
        )
        self.enter = nn.ModuleList(_Residual(width) for _ in range(3))
        self.leave = nn.ModuleList(_Residual(width) for _ in range(4))
        self.mix = nn.ModuleList(nn.Conv2d(width, width, kernel_size=1) for _ in range(4))
        half = width // 2
        self.head = _convolution(width, half)
        self.stem = nn.Sequential(_convolution(3, stem), _convolution(stem, stem)) if stem else None
        self.join = (
            nn.Sequential(_convolution(half + stem, half), _convolution(half, half))
            if stem
            else None
        )

    def forward(self, features: Sequence[Tensor], images: Tensor) -> Tensor:
        """Decode four maps ``(B, C, h, w)`` to ``(B, width // 2, H, W)``."""
        levels = [part(f) for part, f in zip(self.reassemble, features, strict=True)]
        rows, cols = levels[0].shape[2:]
        sizes = [(2 * rows, 2 * cols), *(level.shape[2:] for level in levels[:3])]
        x = levels[3]
        for i in (3, 2, 1, 0):
            if i < 3:
                x = x + self.enter[i](levels[i])
            # a 1x1 convolution commutes with the resize and is cheaper before it
            x = resize(self.mix[i](self.leave[i](x)), *sizes[i])
        x = to_pixels(self.head(x), features[-1], images, self.stride)
        if self.stem is None or self.join is None:
            return x
        # symmetric about 0, as batch norm comes only after the first convolution
        pixels: Tensor = self.join(torch.cat((x, self.stem(2 * images - 1)), dim=1))
        return pixels


def _rescaled(width: int, up: int, down: int) -> nn.Module:
    """A map made ``up / down`` times as fine."""
    if up > down:
        return nn.ConvTranspose2d(width, width, kernel_size=up // down, stride=up // down)
    if up < down:
        stride = down // up
        return nn.Conv2d(width, width, kernel_size=stride + 1, stride=stride, padding=stride // 2)
    return nn.Identity()


def _convolution(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    """Two pre-activated 3x3 convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out
