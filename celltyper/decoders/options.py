"""Checks that several decoders share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from celltyper.errors import ConfigError


def require_four_maps(decoder: str, channels: Sequence[int]) -> None:
    """Raise ConfigError unless the encoder gives four maps."""
    if len(channels) != 4:
        raise ConfigError(
            f"decoder {decoder!r} needs 4 feature maps, the encoder gives {len(channels)}; name "
            "4 blocks with feature_blocks, or take decoder 'linear'"
        )


def require_strides(
    decoder: str, channels: Sequence[int], strides: Sequence[int], *, doubling: bool = False
) -> None:
    """Raise ConfigError unless strides get coarser, one for each map."""
    steps = list(pairwise(strides))
    if len(strides) != len(channels) or any(not 0 < fine < coarse for fine, coarse in steps):
        raise ConfigError(
            f"decoder {decoder!r} needs a stride for each of {len(channels)} maps, from fine to "
            f"coarse, got {list(strides)}"
        )
    if doubling and any(coarse != 2 * fine for fine, coarse in steps):
        raise ConfigError(
            f"decoder {decoder!r} needs strides that double from map to map, got "
            f"{list(strides)}; name neighbouring levels with feature_blocks, or take decoder 'dpt'"
        )


def require_width(decoder: str, width: int, least: int = 1) -> None:
    """Raise ConfigError unless the width is an integer of at least `least`."""
    if not isinstance(width, int) or width < least:
        raise ConfigError(f"decoder {decoder!r} needs a width of {least} or more, got {width!r}")
