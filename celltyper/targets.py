"""What the network is shown in training, tile by tile, and what it should say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celltyper.config import Config
from celltyper.datasets.tiles import TileSampler
from celltyper.errors import ConfigError
from celltyper.features import Canvas
from celltyper.losses import IGNORED, UNANNOTATED
from celltyper.models import PHENOTYPE
from celltyper.tiling import Region
from celltyper.transforms import augment, symmetry
from celltyper.types import UNKNOWN, Image, InstanceMethod, Labels, Sample

FEATURES = "features."
"""Prefix of the encoder's maps where they are known."""


class Targets:
    """Turns labels into the tensors that the losses compare with.

    Parameters
    ----------
    samples : sequence of Sample
        All that tiles are cut from.
    instances : InstanceMethod
        Encodes the labels of a tile as target maps.
    """

    def __init__(self, samples: Sequence[Sample], instances: InstanceMethod) -> None:
        self.instances = instances
        lacking = [k for sample in samples for k in sample.unannotated]
        self.partial = bool(lacking)
        self.channels = 1 + max(lacking, default=0)

    def __call__(
        self, image: Image, labels: Labels, phenotypes: NDArray[np.uint8], sample: Sample
    ) -> dict[str, Tensor]:
        """Image (3, S, S) float32 in [0, 1], phenotype map (S, S) int64, instance targets.

        Nuclei of unknown class are `celltyper.losses.IGNORED` in the phenotype map. If the
        annotation of any sample is partial, ``"unannotated"`` says which classes that of this
        one does not cover, bool, up to the highest such class of all.
        """
        targets = self.instances.encode(labels)
        classes = phenotypes.astype(np.int64)
        classes[phenotypes == UNKNOWN] = IGNORED
        partial = {}
        if self.partial:
            partial[UNANNOTATED] = torch.zeros(self.channels, dtype=torch.bool)
            partial[UNANNOTATED][list(sample.unannotated)] = True
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255,
            PHENOTYPE: torch.from_numpy(classes[labels]),
            **{name: torch.from_numpy(target) for name, target in targets.items()},
            **partial,
        }


class TrainingTiles(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Augmented tiles with their targets; item i is a pure function of the seed and i.

    Parameters
    ----------
    sampler : TileSampler
    targets : Targets
    config : Config
        Its ``seed``, ``data.tile`` and ``augment`` are used.
    """

    def __init__(self, sampler: TileSampler, targets: Targets, config: Config) -> None:
        self.sampler = sampler
        self.targets = targets
        self.seed = config.seed
        self.size = config.data.tile
        self.strengths = config.augment.model_dump()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Tensors of one tile, see `Targets`."""
        rng = np.random.default_rng([self.seed, index, 1])
        tile = augment(*self.sampler.tile(index), rng, size=self.size, **self.strengths)
        return self.targets(*tile, self.sampler.samples[self.sampler.place(index).sample])


class KeptTiles(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Tiles with the features of a frozen encoder that are kept on disk.

    Item i is a pure function of the seed and i: a tile at a place of the patch grid, under one
    of the symmetries whose features are kept.

    Parameters
    ----------
    sampler : TileSampler
        Of a size that the encoder's patches divide.
    targets : Targets
    canvases : mapping of (int, int) to Canvas
        Features by position of the sample and symmetry.
    patch : int
        Side of a patch in pixels.

    Raises
    ------
    ConfigError
        If an image is smaller than a tile.
    """

    def __init__(
        self,
        sampler: TileSampler,
        targets: Targets,
        canvases: Mapping[tuple[int, int], Canvas],
        patch: int,
    ) -> None:
        self.sampler = sampler
        self.targets = targets
        self.canvases = canvases
        self.patch = patch
        self.symmetries = sorted({which for _, which in canvases})
        small = [s.name for s in sampler.samples if min(s.labels.shape) < sampler.size]
        if small:
            raise ConfigError(
                f"image {small[0]!r} is smaller than a tile of {sampler.size} px, whose features "
                f"encoder.cache keeps: lower data.tile or use encoder.cache=0"
            )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Tensors of one tile, see `Targets`, and ``features.0``, ... (C, h, w) float32."""
        place, size = self.sampler.place(index), self.sampler.size
        rng = np.random.default_rng([self.sampler.seed, index, 1])
        which = self.symmetries[rng.integers(len(self.symmetries))]
        sample = self.sampler.samples[place.sample]
        image, labels = symmetry(sample.image, sample.labels, which)
        corner = _turned((place.row, place.col), size, sample.labels.shape, which)
        # the nearest place on the patch grid that leaves the tile inside the image
        row, col = (
            min(round(x / self.patch), (side - size) // self.patch) * self.patch
            for x, side in zip(corner, labels.shape, strict=True)
        )
        region = Region(row, col, size, size)
        windows = self.canvases[place.sample, which].window(region)
        tile = np.ascontiguousarray(labels[region.slices])
        targets = self.targets(image[region.slices], tile, sample.phenotypes, sample)
        return targets | {f"{FEATURES}{i}": window for i, window in enumerate(windows)}


def _turned(
    corner: tuple[int, int], size: int, shape: tuple[int, ...], which: int
) -> tuple[int, int]:
    """Upper left corner of a square window after a symmetry of the image."""
    (row, col), (height, width) = corner, shape
    for _ in range(which % 4):
        # a counter-clockwise quarter turn: the last column becomes the first row
        row, col = width - col - size, row
        height, width = width, height
    return (row, width - col - size) if which >= 4 else (row, col)
