"""Linear decoder: what the encoder's last tokens hold, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from celltyper.decoders.grid import to_pixels
from celltyper.decoders.options import require_strides, require_width


class LinearDecoder(nn.Module):
    """One 1x1 convolution on the last feature map, enlarged bilinearly.

    With the model's 1x1 heads behind it the whole is linear in the tokens, so it is a linear
    probe as long as `width` is at least the number of output maps.

    Parameters
    ----------
    channels : sequence of int
        Channels of the encoder's maps; the last is used.
    patch_size : int
        Side of a patch in pixels.
    width : int
        Output channels.
    strides : sequence of int, optional
        Strides of the maps in pixels, from fine to coarse; by default all are `patch_size`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        patch_size: int,
        *,
        width: int = 32,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        require_width("linear", width)
        if strides is not None:
            require_strides("linear", channels, strides)
        self.stride = patch_size if strides is None else strides[-1]
        self.out_channels = width
        self.project = nn.Conv2d(channels[-1], width, kernel_size=1)

    def forward(self, features: Sequence[Tensor], images: Tensor) -> Tensor:
        """Decode maps ``(B, C, h, w)`` of images ``(B, 3, H, W)`` to ``(B, width, H, W)``."""
        last = features[-1]
        return to_pixels(self.project(last), last, images, self.stride)
