"""What training minimises: the weighted sum of the losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from celltyper.config import Loss
from celltyper.losses import IGNORED, UNANNOTATED, cross_entropy, dice, focal, map_loss
from celltyper.types import PHENOTYPE, MapSpec


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
