"""What training minimises: tiles with targets, and the weighted sum of the losses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from celltyper.config import Config, Loss
from celltyper.datasets.tiles import TileSampler
from celltyper.losses import IGNORED, cross_entropy, dice, focal, map_loss
from celltyper.models import PHENOTYPE
from celltyper.transforms import augment
from celltyper.types import UNKNOWN, InstanceMethod, MapSpec

UNANNOTATED = "unannotated"
"""Target that says which classes an annotation does not cover."""


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
        lacking = [k for sample in sampler.samples for k in sample.unannotated]
        self.partial = bool(lacking)
        self.channels = 1 + max(lacking, default=0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Image (3, S, S) float32 in [0, 1], phenotype map (S, S) int64, instance targets.

        Nuclei of unknown class are `celltyper.losses.IGNORED` in the phenotype map. If the
        annotation of any sample is partial, ``"unannotated"`` says which classes the one of this
        tile does not cover, bool, up to the highest such class of all.
        """
        image, labels, phenotypes = self.sampler.tile(index)
        rng = np.random.default_rng([self.seed, index, 1])
        image, labels, phenotypes = augment(
            image, labels, phenotypes, rng, size=self.size, **self.strengths
        )
        targets = self.instances.encode(labels)
        classes = phenotypes.astype(np.int64)
        classes[phenotypes == UNKNOWN] = IGNORED
        partial = {}
        if self.partial:
            partial[UNANNOTATED] = torch.zeros(self.channels, dtype=torch.bool)
            partial[UNANNOTATED][list(self.sampler.sample_of(index).unannotated)] = True
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255,
            PHENOTYPE: torch.from_numpy(classes[labels]),
            **{name: torch.from_numpy(target) for name, target in targets.items()},
            **partial,
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
        float32. Optional ``"unannotated"`` (B, up to K + 1) bool: classes that the annotation does
        not cover. Background there may be such a cell: the cross-entropy is that of the summed
        probability of background and these classes, all other terms leave those pixels out.
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
    closed, valid, lacking = phenotype, None, targets.get(UNANNOTATED)
    if lacking is not None and bool(lacking.any()):
        lacking = F.pad(lacking, (0, logits.shape[1] - lacking.shape[1]))
        valid = ~(lacking.any(1)[:, None, None] & (phenotype == 0))
        closed = phenotype.where(valid, IGNORED)
        valid = valid[:, None]
    else:
        lacking = None
    if loss.cross_entropy:
        total = total + loss.cross_entropy * cross_entropy(
            logits,
            phenotype,
            class_weights,
            label_smoothing=loss.label_smoothing,
            unannotated=lacking,
        )
    if loss.dice:
        total = total + loss.dice * dice(logits, closed)
    if loss.focal:
        total = total + loss.focal * focal(
            logits, closed, gamma=loss.focal_gamma, class_weights=class_weights
        )
    if loss.instances:
        nuclei = (phenotype != 0)[:, None]
        for name, spec in maps.items():
            if name != PHENOTYPE:
                term = map_loss(spec.loss)(raw[name], targets[name], nuclei, valid)
                total = total + loss.instances * term
    return total
