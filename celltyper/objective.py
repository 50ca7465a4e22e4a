"""What training minimises: tiles with targets, and the weighted sum of the losses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from celltyper.config import Config, Loss
from celltyper.datasets.tiles import TileSampler
from celltyper.losses import IGNORED, cross_entropy, dice, focal, map_loss
from celltyper.models import PHENOTYPE
from celltyper.transforms import augment
from celltyper.types import UNKNOWN, InstanceMethod, MapSpec


class TrainingTiles(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Augmented tiles with their targets; item i is a pure function of the seed and i.

    Parameters
    ----------
    sampler : TileSampler
    instances : InstanceMethod
        Encodes the labels of a tile as target maps.
    config : Config
        Its ``seed``, ``data.tile`` and ``augment`` are used.
    """

    def __init__(self, sampler: TileSampler, instances: InstanceMethod, config: Config) -> None:
        self.sampler = sampler
        self.instances = instances
        self.seed = config.seed
        self.size = config.data.tile
        self.strengths = config.augment.model_dump()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Image (3, S, S) float32 in [0, 1], phenotype map (S, S) int64, instance targets.

        Nuclei of unknown class are `celltyper.losses.IGNORED` in the phenotype map.
        """
        image, labels, phenotypes = self.sampler.tile(index)
        rng = np.random.default_rng([self.seed, index, 1])
        image, labels, phenotypes = augment(
            image, labels, phenotypes, rng, size=self.size, **self.strengths
        )
        targets = self.instances.encode(labels)
        classes = phenotypes.astype(np.int64)
        classes[phenotypes == UNKNOWN] = IGNORED
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255,
            PHENOTYPE: torch.from_numpy(classes[labels]),
            **{name: torch.from_numpy(target) for name, target in targets.items()},
        }


def objective(
    raw: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    maps: Mapping[str, MapSpec],
    loss: Loss,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the phenotype losses and of one loss per instance map.

    Parameters
    ----------
    raw : mapping of str to Tensor, each (B, C, H, W)
        What the model returned.
    targets : mapping of str to Tensor
        ``"phenotype"`` (B, H, W) int64, nuclei without a class -1; every other map (B, C, H, W)
        float32.
    maps : mapping of str to MapSpec
        Says which loss each instance map has.
    loss : Loss
        Weights of the terms.
    class_weights : Tensor or None, shape (K + 1,)
        For the cross-entropy and the focal loss.

    Returns
    -------
    Tensor
        Scalar.
    """
    logits, phenotype = raw[PHENOTYPE], targets[PHENOTYPE]
    total = logits.new_zeros(())
    if loss.cross_entropy:
        total = total + loss.cross_entropy * cross_entropy(
            logits, phenotype, class_weights, label_smoothing=loss.label_smoothing
        )
    if loss.dice:
        total = total + loss.dice * dice(logits, phenotype)
    if loss.focal:
        total = total + loss.focal * focal(
            logits, phenotype, gamma=loss.focal_gamma, class_weights=class_weights
        )
    if loss.instances:
        nuclei = (phenotype != 0)[:, None]
        for name, spec in maps.items():
            if name != PHENOTYPE:
                term = map_loss(spec.loss)(raw[name], targets[name], nuclei)
                total = total + loss.instances * term
    return total
