"""The stitched maps of a slide on disk: a sharded zarr (version 3), one shard for each block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import BloscCodec, BloscShuffle

from celltyper.errors import RunError
from celltyper.tiling import Region
from celltyper.types import MapSpec
from celltyper.wholeslide.plan import Block, Plan

STEPS = 255
"""Probabilities are kept in so many steps of uint8; 0.5 lies on the same side before and after."""


class MapStore:
    """Maps of a slide by name, each (C, H, W): probabilities in uint8, other values in float16.

    Blocks are written once and whole; several threads and processes may write different ones.

    Parameters
    ----------
    path : Path
        Folder of the zarr group.
    plan : Plan
    maps : mapping of str to MapSpec
        Of the model.
    """

    def __init__(self, path: Path, plan: Plan, maps: Mapping[str, MapSpec]) -> None:
        self.path = path
        self._plan = plan
        self._maps = maps
        self._arrays: dict[str, Any] = {}

    def create(self) -> None:
        """Make the empty arrays, unless they are there."""
        plan = self._plan
        group = zarr.open_group(self.path, mode="a", zarr_format=3)
        for name, spec in self._maps.items():
            if name in group:
                continue
            group.create_array(
                name,
                shape=(spec.channels, *plan.shape),
                chunks=(spec.channels, plan.chunk, plan.chunk),
                shards=(spec.channels, plan.block, plan.block),
                dtype=dtype_of(spec),
                compressors=BloscCodec(cname="zstd", clevel=1, shuffle=BloscShuffle.shuffle),
                fill_value=0,
                dimension_names=("channel", "y", "x"),
            )

    def write(self, block: Block, values: Mapping[str, NDArray[Any]]) -> None:
        """Write the maps of a block, quantised; no reader sees half of a map.

        Raises
        ------
        RunError
            If the disk is full or writing fails otherwise.
        """
        rows, cols = self._plan.region(block).slices
        for name, pixels in values.items():
            try:
                self._array(name)[:, rows, cols] = pixels
            except OSError as error:
                raise RunError(
                    f"cannot write maps to {self.path} ({error.strerror or error}); free space and "
                    "give the same command again: it goes on where it was"
                ) from error

    def stored(self, name: str, region: Region) -> NDArray[Any]:
        """One map of a region as it is kept: (C, h, w) uint8 or float16."""
        rows, cols = region.slices
        values: NDArray[Any] = self._array(name)[:, rows, cols]
        return values

    def read(self, region: Region, names: tuple[str, ...]) -> dict[str, NDArray[np.float32]]:
        """Activated maps of a region, each (C, h, w) float32."""
        found = {}
        for name in names:
            values = self.stored(name, region).astype(np.float32)
            if dtype_of(self._maps[name]) == np.uint8:
                values /= STEPS
            found[name] = values
        return found

    def drop(self, block: Block) -> None:
        """Remove the maps of a block, which are background from then on."""
        for name in self._maps:
            (self.path / name / "c" / "0" / str(block.row) / str(block.col)).unlink(missing_ok=True)

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            self._arrays[name] = zarr.open_array(self.path / name, mode="r+")
        return self._arrays[name]


def dtype_of(spec: MapSpec) -> np.dtype[Any]:
    """Type that values of a map are kept in."""
    bounded = spec.activation in ("sigmoid", "softmax")
    return np.dtype(np.uint8 if bounded else np.float16)


def quantise(values: Tensor, spec: MapSpec) -> NDArray[Any]:
    """Round activated values to what is kept of them; probabilities to the nearest of 255 steps."""
    if dtype_of(spec) == np.uint8:
        rounded: NDArray[Any] = (values * STEPS).round_().byte().cpu().numpy()
        return rounded
    half: NDArray[Any] = values.half().cpu().numpy()
    return half
