"""From the pixels of a block to its maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from celltyper.devices import autocast
from celltyper.models import CellTyper, activated_maps, mean_of_tiles
from celltyper.slides import Slide, read_ahead
from celltyper.tiling import Region, Tile, mirror
from celltyper.types import Image
from celltyper.wholeslide.embeddings import half_precision
from celltyper.wholeslide.maps import dtype_of, quantise
from celltyper.wholeslide.turns import Turns

READERS = 2
"""Threads that decode the slide ahead of the model."""


class Stopped(Exception):  # noqa: N818 - no error: somebody asked for it
    """The work was told to stop."""


class Forward(NamedTuple):
    """What the model gives of a region."""

    maps: dict[str, NDArray[Any]]
    """Quantised, each (C, height, width)."""
    features: NDArray[np.float16] | None
    """Last feature map of every tile, (tiles, C, h, w)."""
    pooled: NDArray[np.float32] | None
    """Its mean over the tile, (tiles, C)."""


@torch.inference_mode()
def forward_tiles(
    model: CellTyper,
    slide: Slide,
    region: Region,
    tiles: Sequence[Tile],
    *,
    mpp: float | None,
    shape: tuple[int, int],
    batch_size: int,
    symmetries: int,
    precision: str,
    turns: Turns,
    stop: Event,
    progress: Callable[[int], None],
    encoder: nn.Module | None = None,
    pool: bool = False,
) -> Forward:
    """Run the model over the tiles of a region.

    Parameters
    ----------
    model : CellTyper
        In evaluation mode.
    slide : Slide
    region : Region
        What to give maps of.
    tiles : sequence of Tile
        Whose write regions lie in `region`; what none covers is 0.
    mpp : float or None
        Resolution at which the slide is read.
    shape : (int, int)
        Height and width of the slide at this resolution: beyond, it is mirrored.
    batch_size, symmetries, precision
        As in `celltyper.predict.predict_maps`.
    turns : Turns
        Of the process.
    stop : Event
        Looked at between batches.
    progress : callable
        Called with the number of tiles of every batch.
    encoder : nn.Module or None
        The model's own, if its last feature map is wanted, of the tiles as they are. It does not
        run once more for it.
    pool : bool
        Whether the mean of that map over every tile is wanted.

    Returns
    -------
    Forward

    Raises
    ------
    ConfigError
        If the features do not fit into float16.
    Stopped
        If `stop` is set.
    """
    out: dict[str, NDArray[Any]] = {
        name: np.zeros((spec.channels, region.height, region.width), dtype_of(spec))
        for name, spec in model.maps.items()
    }
    features: NDArray[np.float16] | None = None
    pooled: list[NDArray[np.float32]] = []
    seeing = model.encoder if pool else encoder
    with turns.beside():
        around, pixels = _pixels(slide, tiles, mpp, shape)
    with turns.block:
        for start in range(0, len(tiles), batch_size):
            if stop.is_set():
                raise Stopped
            part = tiles[start : start + batch_size]
            windows = np.stack([pixels[t.read.seen_from(around).slices] for t in part])
            batch = torch.from_numpy(windows).to(model.device).permute(0, 3, 1, 2).float() / 255
            with turns.network(model.device), autocast(model.device, precision):
                known = None if seeing is None else list(seeing(batch))
                means = activated_maps(model, batch, symmetries, known)
            if known is not None and pool:
                pooled.append(mean_of_tiles(known))
            if known is not None and encoder is not None:
                last = half_precision(known[-1])
                if features is None:
                    features = np.empty((len(tiles), *last.shape[1:]), np.float16)
                features[start : start + len(part)] = last
            for name, values in means.items():
                kept = quantise(values, model.maps[name])
                for i, (read, write) in enumerate(part):
                    here = write.seen_from(read)
                    out[name][:, *write.seen_from(region).slices] = kept[i][:, *here.slices]
            progress(len(part))
    return Forward(out, features, np.concatenate(pooled) if pooled else None)


def _pixels(
    slide: Slide, tiles: Sequence[Tile], mpp: float | None, shape: tuple[int, int]
) -> tuple[Region, Image]:
    """Read what the tiles see once, as one image, and where it lies."""
    top, left = min(t.read.row for t in tiles), min(t.read.col for t in tiles)
    bottom = max(t.read.row + t.read.height for t in tiles)
    right = max(t.read.col + t.read.width for t in tiles)
    around = Region(top, left, bottom - top, right - left)
    rows, cols = mirror(np.arange(top, bottom), shape[0]), mirror(np.arange(left, right), shape[1])
    low, first = int(rows.min()), int(cols.min())
    high, last = int(rows.max()) + 1, int(cols.max()) + 1
    band = tiles[0].read.height
    bands = [
        Region(row, first, min(band, high - row), last - first) for row in range(low, high, band)
    ]
    pixels = np.concatenate(list(read_ahead(slide, bands, mpp, threads=READERS)))
    if (top, left, bottom, right) == (low, first, high, last):
        return around, pixels
    return around, pixels[rows[:, None] - low, cols[None, :] - first]
