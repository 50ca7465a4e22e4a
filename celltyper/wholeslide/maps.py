"""The stitched maps of a slide on disk: a sharded zarr (version 3), one shard for each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import BloscCodec, BloscShuffle

from celltyper.errors import ConfigError, RunError
from celltyper.tiling import Region, Tile
from celltyper.types import MapSpec
from celltyper.wholeslide.embeddings import FeatureGrid
from celltyper.wholeslide.plan import Block, Plan

STEPS = 255
"""Probabilities are kept in so many steps of uint8; 0.5 lies on the same side before and after."""
FEATURES = "features"
"""Name of the array of the encoder's last feature map."""
# Maps live for minutes. This packs as well as zstd, four times as fast, and to look for empty
# chunks would take as long as to write them.
_CODEC = BloscCodec(cname="lz4", clevel=1, shuffle=BloscShuffle.bitshuffle)
_CONFIG: Any = {"write_empty_chunks": True}


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
    features : FeatureGrid or None
        Of the encoder, if its last feature map is kept too: float16, by tile, (tile rows, tile
        columns, C, h, w).

    Raises
    ------
    ConfigError
        If features are kept and a map has their name.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        maps: Mapping[str, MapSpec],
        features: FeatureGrid | None = None,
    ) -> None:
        if features is not None and FEATURES in maps:
            raise ConfigError(
                f"a map of the model is called {FEATURES!r}, as the encoder's features are: leave "
                "out --embeddings"
            )
        self.path = path
        self._plan = plan
        self._maps = maps
        self._features = features
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
                compressors=_CODEC,
                fill_value=0,
                dimension_names=("channel", "y", "x"),
            )
        if self._features is not None and FEATURES not in group:
            n, (channels, side, _) = self._tiles, self._features
            group.create_array(
                FEATURES,
                shape=(*plan.run.shape, channels, side, side),
                chunks=(1, 1, channels, side, side),
                shards=(n, n, channels, side, side),
                dtype=np.float16,
                compressors=_CODEC,
                fill_value=0,
                dimension_names=("tile_row", "tile_column", "channel", "y", "x"),
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
            self._put(name, (slice(None), rows, cols), pixels)

    def write_features(
        self, block: Block, tiles: Sequence[Tile], features: NDArray[np.float16]
    ) -> None:
        """Write the feature maps of a block's tiles, in their order; others stay empty.

        Raises
        ------
        RunError
            As in `write`.
        """
        step, n = self._plan.step, self._tiles
        top, left = block.row * n, block.col * n
        rows, cols = min(n, self._plan.run.shape[0] - top), min(n, self._plan.run.shape[1] - left)
        values = np.zeros((rows, cols, *features.shape[1:]), np.float16)
        for (_, write), each in zip(tiles, features, strict=True):
            values[write.row // step - top, write.col // step - left] = each
        self._put(FEATURES, (slice(top, top + rows), slice(left, left + cols)), values)

    def stored(self, name: str, region: Region) -> NDArray[Any]:
        """One map of a region as it is kept: (C, h, w) uint8 or float16."""
        rows, cols = region.slices
        values: NDArray[Any] = self._array(name)[:, rows, cols]
        return values

    def read(self, region: Region, names: tuple[str, ...]) -> dict[str, NDArray[np.float32]]:
        """Activated maps of a region, each (C, h, w) float32."""
        found = {}
        for name in names:
            values = self.stored(name, region)
            if values.dtype == np.uint8:
                found[name] = np.divide(values, np.float32(STEPS), dtype=np.float32)
            else:
                found[name] = values.astype(np.float32)
        return found

    def features(self, row: int, first: int, stop: int) -> NDArray[np.float16]:
        """Feature maps of some tiles of a row of tiles: (tiles, C, h, w)."""
        values: NDArray[np.float16] = self._array(FEATURES)[row, first:stop]
        return values

    def drop(self, block: Block) -> None:
        """Remove the maps of a block, which are background from then on, and its features."""
        at = Path(str(block.row), str(block.col))
        for name in self._maps:
            (self.path / name / "c" / "0" / at).unlink(missing_ok=True)
        if self._features is not None:
            (self.path / FEATURES / "c" / at / "0" / "0" / "0").unlink(missing_ok=True)

    @property
    def _tiles(self) -> int:
        """Tiles along the side of a block."""
        return self._plan.block // self._plan.step

    def _put(self, name: str, at: tuple[slice, ...], values: NDArray[Any]) -> None:
        try:
            self._array(name)[at] = values
        except OSError as error:
            raise RunError(
                f"cannot write maps to {self.path} ({error.strerror or error}); free space and "
                "give the same command again: it goes on where it was"
            ) from error

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            array = zarr.open_array(self.path / name, mode="r+")
            self._arrays[name] = array.with_config(_CONFIG)
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
