"""UNETR: four maps as skips beside an image stem; tokens are lifted by deconvolution stacks."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.blocks import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from celltyper.decoders.grid import pad_to_grid, resize, to_pixels
from celltyper.decoders.options import require_four_maps, require_strides, require_width


class UnetrDecoder(nn.Module):
    """UNETR (doi:10.48550/arXiv.2103.10504) of MONAI's blocks, on any encoder's maps.

    Four doublings make 16 pixels of a patch. For another patch size the map is resized before
    the last doubling, so that the image stem's map, with the finest detail, is not resampled
    (only where the patch size is odd, and then so is the result).

    The maps of a pyramid need no lifting: they pass a residual block at their own resolution, as
    in Swin UNETR (doi:10.48550/arXiv.2201.01266).

    Parameters
    ----------
    channels : sequence of 4 int
        Channels of the encoder's maps, from shallow to deep.
    patch_size : int
        Side of a patch in pixels.
    width : int
        Channels at full resolution, and of the output; 2, 4 and 8 times that at each halving.
        The published benchmark has 64.
    strides : sequence of 4 int, optional
        Strides of the maps in pixels, each double the one before; by default all are
        `patch_size`.

    Notes
    -----
    Batch norm, because statistics of the tile (instance or group norm) would make cells depend
    on where the tiles lie.
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
        require_four_maps("unetr", channels)
        require_width("unetr", width)
        if strides is not None:
            require_strides("unetr", channels, strides, doubling=True)
        self.stride = patch_size if strides is None else strides[-1]
        self.out_channels = width

        def lift(inp: int, out: int, doublings: int) -> nn.Module:
            block: nn.Module = UnetrPrUpBlock(
                spatial_dims=2,
                in_channels=inp,
                out_channels=out,
                num_layer=doublings - 1,
                kernel_size=3,
                stride=1,
                upsample_kernel_size=2,
                norm_name="batch",
                conv_block=True,
                res_block=True,
            )
            return block

        def merge(inp: int, out: int) -> nn.Module:
            block: nn.Module = UnetrUpBlock(
                spatial_dims=2,
                in_channels=inp,
                out_channels=out,
                kernel_size=3,
                upsample_kernel_size=2,
                norm_name="batch",
                res_block=True,
            )
            return block

        def residual(inp: int, out: int) -> nn.Module:
            block: nn.Module = UnetrBasicBlock(
                spatial_dims=2,
                in_channels=inp,
                out_channels=out,
                kernel_size=3,
                stride=1,
                norm_name="batch",
                res_block=True,
            )
            return block

        self.stem = residual(3, width)
        if strides is None:
            self.lift1 = lift(channels[0], 2 * width, 3)
            self.lift2 = lift(channels[1], 4 * width, 2)
            self.lift3 = lift(channels[2], 8 * width, 1)
        else:
            self.lift1 = residual(channels[0], 2 * width)
            self.lift2 = residual(channels[1], 4 * width)
            self.lift3 = residual(channels[2], 8 * width)
        self.merge3 = merge(channels[3], 8 * width)
        self.merge2 = merge(8 * width, 4 * width)
        self.merge1 = merge(4 * width, 2 * width)
        self.merge0 = merge(2 * width, width)

    def forward(self, features: Sequence[Tensor], images: Tensor) -> Tensor:
        """Decode four maps ``(B, C, h, w)`` of images ``(B, 3, H, W)`` to ``(B, width, H, W)``."""
        first, second, third, last = features
        x = self.merge3(last, self.lift3(third))
        x = self.merge2(x, self.lift2(second))
        x = self.merge1(x, self.lift1(first))
        half = (self.stride + 1) // 2
        x = resize(x, half * last.shape[2], half * last.shape[3])
        skip = self.stem(pad_to_grid(images, last, self.stride))
        x = self.merge0(x, resize(skip, 2 * x.shape[2], 2 * x.shape[3]))
        return to_pixels(x, last, images, self.stride)
