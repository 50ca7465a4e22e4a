"""What the network is shown in training, tile by tile, and what it should say of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celltyper.config import Augment, Config
from celltyper.datasets.tiles import TileSampler
from celltyper.features import Canvas
from celltyper.losses import IGNORED, UNANNOTATED
from celltyper.tiling import Region
from celltyper.transforms import augment
from celltyper.types import PHENOTYPE, UNKNOWN, Image, InstanceMethod, Labels, Sample

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


def view(sample: Sample, which: int, strengths: Augment) -> Sample:
    """One of the augmented versions of a whole image.

    Parameters
    ----------
    sample : Sample
    which : int
        0 is the image itself, every other number another draw.
    strengths : Augment

    Returns
    -------
    Sample
        A function of the pixels, the number and the strengths alone: neither of a seed nor of the
        other images, so that all folds and seeds of a study share the features.
    """
    if which == 0:
        return sample
    words = np.frombuffer(hashlib.sha256(sample.image.tobytes()).digest(), np.uint32)
    rng = np.random.default_rng([*words.tolist(), which])
    tile = augment(sample.image, sample.labels, sample.phenotypes, rng, **strengths.model_dump())
    # the last nuclei may be out of view
    phenotypes = tile.phenotypes[: int(tile.labels.max(initial=0)) + 1]
    return replace(sample, image=tile.image, labels=tile.labels, phenotypes=phenotypes)


class KeptTiles(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Tiles with the features of a frozen encoder that are kept on disk.

    Item i is a pure function of the seed and i: a tile at a place of the patch grid.

    Parameters
    ----------
    sampler : TileSampler
        Of views, and of a size that the encoder's patches divide.
    targets : Targets
    canvases : sequence of Canvas
        Features of the sampler's views.
    patch : int
        Side of a patch in pixels.
    """

    def __init__(
        self, sampler: TileSampler, targets: Targets, canvases: Sequence[Canvas], patch: int
    ) -> None:
        self.sampler = sampler
        self.targets = targets
        self.canvases = canvases
        self.patch = patch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Tensors of one tile, see `Targets`, and ``features.0``, ... (C, h, w) float32."""
        place, size = self.sampler.place(index), self.sampler.size
        sample = self.sampler.samples[place.sample]
        # the nearest place on the patch grid that leaves the tile inside the image
        row, col = (
            min(round(x / self.patch), (side - size) // self.patch) * self.patch
            for x, side in zip((place.row, place.col), sample.labels.shape, strict=True)
        )
        region = Region(row, col, size, size)
        windows = self.canvases[place.sample].window(region)
        tile = np.ascontiguousarray(sample.labels[region.slices])
        targets = self.targets(sample.image[region.slices], tile, sample.phenotypes, sample)
        return targets | {f"{FEATURES}{i}": window for i, window in enumerate(windows)}
