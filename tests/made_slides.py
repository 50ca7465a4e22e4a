"""Slides whose pixels hold the maps of made cells, and a model that reads the maps off them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from celltyper.calibration import Calibration
from celltyper.domain import Domain
from celltyper.instances import HV
from celltyper.models import CellTyper
from celltyper.slides import Slide
from celltyper.slides.source import Tile, piece
from celltyper.tiling import Region
from celltyper.types import PHENOTYPE, Labels, MapSpec

CLASSES = ("tumor", "stroma")
MIDDLE = 128


def made_labels(height: int, width: int, seed: int = 0, spacing: int = 26) -> Labels:
    """Ellipses on a jittered grid, many of which touch."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.int32)
    n = 0
    for row in range(0, height, spacing):
        for col in range(0, width, spacing):
            y = min(row + rng.uniform(4, spacing - 4), height - 1)
            x = min(col + rng.uniform(4, spacing - 4), width - 1)
            a, b, turn = rng.uniform(6, 15), rng.uniform(5, 11), rng.uniform(0, np.pi)
            if rng.random() < 0.15:
                continue
            rows = np.arange(max(0, int(y) - 18), min(height, int(y) + 19))
            cols = np.arange(max(0, int(x) - 18), min(width, int(x) + 19))
            dy, dx = rows[:, None] - y, cols[None, :] - x
            u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
            inside = (u / a) ** 2 + (v / b) ** 2 <= 1
            here = labels[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
            n += 1
            here[inside & (here == 0)] = n
    return labels


def made_pixels(labels: Labels) -> NDArray[np.uint8]:
    """Red says whether there is a nucleus, and its class; green and blue the two coordinates."""
    maps = HV().encode(labels)
    red = np.where(labels > 0, np.where(labels % 2 == 1, 40, 90), 250)
    coordinates = MIDDLE + np.rint(100 * maps["hv"])
    # background as pale as glass, but with color, so that it counts as tissue
    coordinates = np.where(labels > 0, coordinates, 215)
    return np.stack([red, *coordinates]).astype(np.uint8).transpose(1, 2, 0)


@dataclass
class ArraySource:
    """A slide in memory."""

    pixels: NDArray[np.uint8]
    mpp: tuple[float, float] | None = (0.25, 0.25)
    path: str = "/made/slide.tif"
    format: str = "made"
    side: int = 200
    broken: frozenset[tuple[int, int]] = frozenset()
    magnification: float | None = None
    icc: bytes | None = None
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return ((self.pixels.shape[1], self.pixels.shape[0]),)

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        return ((self.side, self.side),)

    @property
    def bounds(self) -> Region:
        return Region(0, 0, *self.pixels.shape[:2])

    def tile(self, level: int, row: int, col: int) -> Tile:
        here = piece(row, col, (self.side, self.side), self.sizes[0])
        pixels = self.pixels[here.slices]
        if (row, col) in self.broken:
            whole = Region(0, 0, here.height, here.width)
            return Tile(np.full_like(pixels, 255), (whole,), "made so")
        return Tile(pixels)

    def close(self) -> None: ...


def made_slide(labels: Labels, **options: Any) -> Slide:
    """Slide of made cells."""
    return Slide(ArraySource(made_pixels(labels), **options))


class PixelModel(nn.Module):
    """Maps that depend on nothing but the pixel itself; takes the place of a `CellTyper`."""

    def __init__(self, tile: int = 96, overlap: int = 16) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.instances = HV()
        self.maps = {PHENOTYPE: MapSpec(3, "softmax", "bce_dice"), **self.instances.maps}
        self.classes, self.colors = CLASSES, ("#cc2222", "#22aa22")
        self.mpp: float | None = 0.25
        self.tile, self.overlap, self.batch_size, self.symmetries = tile, overlap, 4, 1
        self.precision = "fp32"
        self.calibration: Calibration | None = None
        self.domain: Domain | None = None
        self.seen = 0

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def forward(self, images: Tensor, features: Any = None) -> dict[str, Tensor]:
        self.seen += len(images)
        values = torch.round(images * 255)
        red = values[:, :1]
        nucleus = (red < 150).float()
        first = (red < 60).float()
        return {
            PHENOTYPE: torch.cat([1 - nucleus, nucleus * first, nucleus * (1 - first)], dim=1),
            "nucleus": nucleus,
            "hv": (values[:, 1:] - MIDDLE) / MIDDLE,
        }

    predict_tiles, _batch_of = CellTyper.predict_tiles, CellTyper._batch_of

    def activate(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        return raw


class PixelSource:
    """Takes the place of a `ModelSource`."""

    run = "made"

    def load(self) -> Any:
        return PixelModel()
