"""The symmetries of the square on batches: what the network sees turned, and maps turned back."""

from __future__ import annotations

import torch
from torch import Tensor


def turn(images: Tensor, which: int) -> Tensor:
    """Apply one of the eight symmetries of the square.

    Parameters
    ----------
    images : Tensor, shape (B, C, H, W)
    which : int
        As in `celltyper.transforms.symmetry`.

    Returns
    -------
    Tensor, shape (B, C, H, W), or (B, C, W, H) for odd quarter turns
    """
    turned = torch.rot90(images, which % 4, (2, 3))
    return turned.flip(3) if which >= 4 else turned


def turn_back(maps: Tensor, which: int, *, vector: bool = False) -> Tensor:
    """Undo `turn` on a map that the network gave for a turned image.

    Parameters
    ----------
    maps : Tensor, shape (B, C, H, W)
    which : int
    vector : bool
        Channels are pairs of a horizontal component, positive to the right, and a vertical one,
        positive downwards; the components are turned back too.

    Returns
    -------
    Tensor
        As if the network had seen the image as it is.
    """
    back = maps.flip(3) if which >= 4 else maps
    back = torch.rot90(back, -(which % 4), (2, 3))
    if not vector:
        return back
    right, down = back[:, 0::2], back[:, 1::2]
    if which >= 4:
        right = -right
    for _ in range(which % 4):
        # a counter-clockwise turn showed what points right as up, and what points down as right
        right, down = -down, right
    return torch.stack((right, down), dim=2).flatten(1, 2)
