"""Losses, each a function of raw network output and target.

Images come as ``(B, C, H, W)``; classes as ``(B, H, W)`` int64 with 0 for background. Every
function returns a scalar tensor, 0 (with a gradient of 0) where there is nothing to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from celltyper.errors import unknown_name
from celltyper.types import MapLoss

WeightRule = Literal["inverse", "sqrt", "effective", "published", "none"]
IGNORED = -1
"""Class of target pixels that do not count."""

UNANNOTATED = "unannotated"
"""Target that says which classes an annotation does not cover."""

MapLossFunction = Callable[..., Tensor]


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.05,
    ignore_index: int = IGNORED,
    unannotated: Tensor | None = None,
) -> Tensor:
    """Pixelwise cross-entropy.

    Parameters
    ----------
    logits : Tensor, shape (B, C, H, W)
        Raw class scores.
    target : Tensor of int64, shape (B, H, W)
        Class ids.
    class_weights : Tensor, shape (C,), optional
        Weight of every class, see `effective_class_weights`. The loss is the weighted mean: the
        sum is divided by the summed weights of the pixels, so that weights do not change its
        scale.
    label_smoothing : float
        Share of the target spread evenly over all classes (doi:10.1109/CVPR.2016.308).
    ignore_index : int
        Pixels of this target do not count.
    unannotated : Tensor of bool, shape (B, C), optional
        Classes that the annotation of an image does not cover. Its background may be of one of
        them, so there the probability of background is that of all these together: the label-set
        loss (doi:10.1007/978-3-030-87196-3_60), with the weight of background.

    Returns
    -------
    Tensor
        Scalar; 0 if all pixels are ignored, where torch gives NaN.
    """
    if bool((target == ignore_index).all()):
        return logits.sum() * 0.0
    if unannotated is not None and bool(unannotated.any()):
        return _label_set_entropy(
            logits.float(), target, unannotated, class_weights, label_smoothing, ignore_index
        )
    return F.cross_entropy(
        logits.float(),
        target,
        weight=None if class_weights is None else class_weights.to(logits.device).float(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def _label_set_entropy(
    logits: Tensor,
    target: Tensor,
    unannotated: Tensor,
    class_weights: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    log_p = logits.log_softmax(1)
    valid = target != ignore_index
    index = target.where(valid, 0)
    possible = unannotated.clone()
    possible[:, 0] = True
    together = log_p.masked_fill(~possible[:, :, None, None], -torch.inf).logsumexp(1)
    single = log_p.gather(1, index[:, None])[:, 0]
    # Where an image is annotated in full, the set is background alone: the same number.
    found = together.where(index == 0, single)
    weights = log_p.new_ones(log_p.shape[1])
    if class_weights is not None:
        weights = class_weights.to(log_p)
    weight = weights[index] * valid
    spread = (log_p * weights[:, None, None]).mean(1) * valid
    terms = (1 - label_smoothing) * weight * found + label_smoothing * spread
    return -terms.sum() / weight.sum().clamp(min=1e-12)


def effective_class_weights(
    counts: ArrayLike, rule: WeightRule = "inverse", beta: float = 0.999999
) -> NDArray[np.float64]:
    """Class weights for `cross_entropy` from pixel (or cell) counts.

    Parameters
    ----------
    counts : array_like, shape (C,)
        Pixels of every class in the training data, background first.
    rule : {"inverse", "sqrt", "effective", "published", "none"}
        ``inverse``: total / count. ``sqrt``: its square root, for tiles that show rare classes
        more often already (Mahajan 2018, doi:10.1007/978-3-030-01216-8_12). ``effective``:
        1 / effective number of samples, ``(1 - beta) / (1 - beta ** count)`` (Cui 2019,
        doi:10.1109/CVPR.2019.00949), which lies between ``inverse`` (beta to 1) and ``none``
        (beta 0). ``none``: all 1. ``published``: the softmax over the inverse frequencies
        normalised to sum 1, as in the published benchmark of foundation models on cells; the
        softmax of numbers between 0 and 1 squeezes every ratio below e, measured 1.4 at most
        there. It is kept to measure what that costs.
    beta : float
        For ``effective`` only. Pixels are many and alike, hence closer to 1 than for images.

    Returns
    -------
    ndarray of float64, shape (C,)
        Normalised to mean 1 over the classes that occur. A class that does not occur weighs 0
        (its weight is never used, since no pixel has it, but with label smoothing it would let an
        absent class rule the loss).

    Raises
    ------
    ConfigError
        If the rule is unknown.
    ValueError
        If counts are negative or all zero.
    """
    n = np.asarray(counts, np.float64)
    if n.ndim != 1 or (n < 0).any() or not (n > 0).any():
        raise ValueError(f"counts must be non-negative with one above 0, got {n.tolist()}")
    present = n > 0
    inverse = n.sum() / n[present]
    if rule == "inverse":
        found = inverse
    elif rule == "sqrt":
        found = np.sqrt(inverse)
    elif rule == "effective":
        found = (1 - beta) / -np.expm1(n[present] * math.log(beta))
    elif rule == "published":
        found = np.exp(inverse / inverse.sum())
    elif rule == "none":
        found = np.ones_like(inverse)
    else:
        raise unknown_name("class weight rule", rule, get_args(WeightRule))
    weights = np.zeros_like(n)
    weights[present] = found / found.mean()
    return weights


def dice(
    logits: Tensor, target: Tensor, ignore_index: int = IGNORED, smooth: float = 1.0
) -> Tensor:
    """Soft Dice loss over classes: 1 - mean of ``(2 |P T| + s) / (|P| + |T| + s)``.

    Parameters
    ----------
    logits : Tensor, shape (B, C, H, W)
        Raw class scores; softmax is applied here.
    target : Tensor of int64, shape (B, H, W)
        Class ids.
    ignore_index : int
        Pixels of this target do not count.
    smooth : float
        Added to both sides, in pixels, so that an absent class that is not predicted scores 1.

    Returns
    -------
    Tensor
        Scalar in [0, 1]; sums run over the batch (doi:10.1109/3DV.2016.79), the mean over the
        classes that occur in the target: an absent class would add a loss that is all smoothing.
    """
    valid = target != ignore_index
    classes = logits.shape[1]
    probabilities = logits.float().softmax(1) * valid[:, None]
    truth = F.one_hot(target.where(valid, 0), classes).movedim(-1, 1) * valid[:, None]
    dims = (0, 2, 3)
    overlap = (probabilities * truth).sum(dims)
    sizes = probabilities.sum(dims) + truth.sum(dims)
    scores = 1 - (2 * overlap + smooth) / (sizes + smooth)
    present = truth.sum(dims) > 0
    return (scores * present).sum() / present.sum().clamp(min=1)


def focal(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    """Focal loss: cross-entropy times ``(1 - p) ** gamma`` (doi:10.1109/ICCV.2017.324).

    Parameters
    ----------
    logits : Tensor, shape (B, C, H, W)
        Raw class scores.
    target : Tensor of int64, shape (B, H, W)
        Class ids.
    gamma : float
        0 gives cross-entropy.
    class_weights : Tensor, shape (C,), optional
        As in `cross_entropy`, with the same normalisation.
    ignore_index : int
        Pixels of this target do not count.

    Returns
    -------
    Tensor
        Scalar.
    """
    valid = target != ignore_index
    index = target.where(valid, 0)
    log_p = logits.float().log_softmax(1).gather(1, index[:, None])[:, 0]
    weight = valid.float()
    if class_weights is not None:
        weight = weight * class_weights.to(logits.device).float()[index]
    # 1 - p from expm1 keeps its digits where p is nearly 1; the clamp keeps the gradient of a
    # power below 1 finite at 0.
    miss = -torch.expm1(log_p)
    terms = -log_p * miss.clamp(min=1e-12) ** gamma * weight
    return terms.sum() / weight.sum().clamp(min=1e-12)


def bce_dice(
    logit: Tensor, mask: Tensor, smooth: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy plus soft Dice, for a foreground map.

    Parameters
    ----------
    logit : Tensor, shape (B, C, H, W)
        Raw scores; sigmoid is applied here.
    mask : Tensor, shape (B, C, H, W)
        Target in [0, 1].
    smooth : float
        Added to both sides of Dice, in pixels.
    valid : Tensor of bool, shape (B, 1, H, W), optional
        Pixels that count; by default all.

    Returns
    -------
    Tensor
        Scalar. Dice sums over the batch, per channel.
    """
    logit, mask = logit.float(), mask.float()
    probability, truth = logit.sigmoid(), mask
    if valid is not None:
        probability, truth = probability * valid, truth * valid
    dims = (0, 2, 3)
    overlap = (probability * truth).sum(dims)
    sizes = probability.sum(dims) + truth.sum(dims)
    scores = 1 - (2 * overlap + smooth) / (sizes + smooth)
    entropy = F.binary_cross_entropy_with_logits(logit, mask, reduction="none")
    return _mean(entropy, valid) + scores.mean()


def mse(pred: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared error over the (valid) pixels of ``(B, C, H, W)`` maps; a scalar."""
    return _mean(F.mse_loss(pred.float(), target.float(), reduction="none"), valid)


def smooth_l1(
    pred: Tensor, target: Tensor, beta: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """Huber loss divided by beta over the (valid) pixels of ``(B, C, H, W)`` maps; a scalar."""
    error = F.smooth_l1_loss(pred.float(), target.float(), beta=beta, reduction="none")
    return _mean(error, valid)


def smooth_l1_inside(
    pred: Tensor, target: Tensor, mask: Tensor, beta: float = 0.1, valid: Tensor | None = None
) -> Tensor:
    """Huber loss divided by beta inside nuclei alone, for maps without meaning outside of them.

    Parameters
    ----------
    pred, target : Tensor, shape (B, C, H, W)
        Maps, such as offsets to the centre of the nucleus.
    mask : Tensor of bool, shape (B, 1, H, W)
        True inside nuclei.
    beta : float
        Error from which on the loss is linear. Small, because a linear loss lets the map jump
        where two nuclei touch, and a squared one blurs the jump.
    valid : Tensor of bool, shape (B, 1, H, W), optional
        Pixels that count; by default all.

    Returns
    -------
    Tensor
        Scalar, the mean over channels and pixels; 0 without nuclei.
    """
    return smooth_l1(pred, target, beta, mask if valid is None else mask & valid)


def _mean(terms: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return terms.mean()
    weight = valid.to(terms.dtype).expand_as(terms)
    return (terms * weight).sum() / weight.sum().clamp(min=1.0)


def hv(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    gradient_weight: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Horizontal-vertical loss of HoVer-Net (doi:10.1016/j.media.2019.101563).

    Mean squared error over all pixels plus the mean squared error of the gradients inside nuclei:
    d/dx of channel 0 and d/dy of channel 1, by HoVer-Net's 5 x 5 kernel ``x / (x^2 + y^2)``,
    which gives a ramp of slope 1 the value 12. The image is continued by its edge pixels, where
    HoVer-Net's zeros count every error at the border as a gradient.

    Parameters
    ----------
    pred, target : Tensor, shape (B, 2, H, W)
        Horizontal and vertical distance maps.
    mask : Tensor, shape (B, 1, H, W)
        True inside nuclei. Gradients count only there, as they jump between neighbours.
    gradient_weight : float
        Weight of the gradient term.
    valid : Tensor of bool, shape (B, 1, H, W), optional
        Pixels that count; by default all. The error at others is taken as 0.

    Returns
    -------
    Tensor
        Scalar; without nuclei, the squared error alone.
    """
    error = pred.float() - target.float()
    if valid is not None:
        error = error * valid
    slopes = _hv_slopes(error)
    weight = mask.to(slopes.dtype).expand_as(slopes)
    gradient = (slopes**2 * weight).sum() / weight.sum().clamp(min=1.0)
    return _mean(error**2, valid) + gradient_weight * gradient


def map_loss(name: MapLoss) -> MapLossFunction:
    """Look up the loss of a map by the name in its ``MapSpec``.

    Parameters
    ----------
    name : {"bce_dice", "mse", "hv", "smooth_l1", "smooth_l1_inside"}
        Name of the loss.

    Returns
    -------
    callable
        ``loss(pred (B, C, H, W), target (B, C, H, W), nucleus_mask (B, 1, H, W), valid=None) ->
        scalar``; ``hv`` and ``smooth_l1_inside`` use the mask. ``valid`` (B, 1, H, W) says which
        pixels count.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    if name not in _MAP_LOSSES:
        raise unknown_name("map loss", name, _MAP_LOSSES)
    return _MAP_LOSSES[name]


_MAP_LOSSES: dict[str, MapLossFunction] = {
    "bce_dice": lambda pred, target, _, valid=None: bce_dice(pred, target, valid=valid),
    "mse": lambda pred, target, _, valid=None: mse(pred, target, valid),
    "smooth_l1": lambda pred, target, _, valid=None: smooth_l1(pred, target, valid=valid),
    "smooth_l1_inside": lambda pred, target, mask, valid=None: smooth_l1_inside(
        pred, target, mask, valid=valid
    ),
    "hv": lambda pred, target, mask, valid=None: hv(pred, target, mask, valid=valid),
}


def _hv_slopes(maps: Tensor) -> Tensor:
    """Slope along x of channel 0 and along y of channel 1, times 12."""
    offsets = torch.arange(-2.0, 3.0, device=maps.device)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    square = x**2 + y**2
    square[2, 2] = 1.0
    kernel = x / square
    kernels = torch.stack([kernel, kernel.T])[:, None]
    return F.conv2d(F.pad(maps, (2, 2, 2, 2), mode="replicate"), kernels, groups=2)
