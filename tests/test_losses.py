"""Losses against values derived by hand, and against torch, scikit-learn and scipy."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from celltyper import losses
from celltyper.errors import ConfigError
from celltyper.types import MapLoss


def _random(classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(2, classes, 5, 6, generator=generator)
    return logits, torch.randint(0, classes, (2, 5, 6), generator=generator)


def test_cross_entropy_of_one_pixel_by_hand() -> None:
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).reshape(1, 3, 1, 1)
    target = torch.tensor([[[1]]])
    plain = losses.cross_entropy(logits, target, label_smoothing=0.0)
    assert plain.item() == pytest.approx(-math.log(0.2), abs=1e-6)
    smooth = losses.cross_entropy(logits, target, label_smoothing=0.3)
    spread = -(math.log(0.7) + math.log(0.2) + math.log(0.1)) / 3
    assert smooth.item() == pytest.approx(0.7 * -math.log(0.2) + 0.3 * spread, abs=1e-6)


def test_cross_entropy_is_the_log_loss_of_scikit_learn() -> None:
    logits, target = _random()
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5])
    found = losses.cross_entropy(logits, target, weights, label_smoothing=0.0)
    p = logits.softmax(1).movedim(1, -1).reshape(-1, 4).double().numpy()
    flat = target.flatten().numpy()
    p /= p.sum(1, keepdims=True)
    want = log_loss(flat, p, sample_weight=weights.numpy()[flat], labels=[0, 1, 2, 3])
    assert found.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.dice, losses.focal])
def test_ignored_pixels_change_nothing(loss) -> None:  # type: ignore[no-untyped-def]
    logits, target = _random()
    target[:, 2:] = -1
    whole = loss(logits, target)
    cut = loss(logits[:, :, :2], target[:, :2])
    assert whole.item() == pytest.approx(cut.item(), rel=1e-5)
    everything = loss(logits.requires_grad_(), torch.full_like(target, -1))
    assert everything.item() == 0
    everything.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_inverse_weights_are_those_of_scikit_learn_up_to_scale() -> None:
    counts = np.array([70, 20, 9, 1])
    labels = np.repeat(np.arange(4), counts)
    want = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    found = losses.effective_class_weights(counts, "inverse")
    np.testing.assert_allclose(found, want / want.mean(), rtol=1e-12)


def test_root_of_the_inverse_halves_the_imbalance_in_logarithms() -> None:
    found = losses.effective_class_weights([400, 100, 4], "sqrt")
    np.testing.assert_allclose(found, np.array([1, 2, 10]) * 3 / 13, rtol=1e-12)


def test_effective_weights_by_the_papers_formula() -> None:
    counts, beta = np.array([1000.0, 10.0]), 0.99
    want = (1 - beta) / (1 - beta**counts)
    found = losses.effective_class_weights(counts, "effective", beta=beta)
    np.testing.assert_allclose(found, want / want.mean(), rtol=1e-9)


def test_published_weights_hardly_differ_between_classes() -> None:
    counts = [900_000, 60_000, 30_000, 10_000]
    inverse = losses.effective_class_weights(counts, "inverse")
    published = losses.effective_class_weights(counts, "published")
    assert inverse[3] / inverse[0] == pytest.approx(90)
    frequencies = np.array([1 / c for c in counts])
    normalised = frequencies / frequencies.sum()
    by_hand = np.exp(normalised) / np.exp(normalised).sum()
    np.testing.assert_allclose(published, by_hand / by_hand.mean(), rtol=1e-12)
    assert published.max() / published.min() < math.e


@pytest.mark.parametrize("rule", get_args(losses.WeightRule))
def test_weights_have_mean_one_and_absent_classes_none(rule: losses.WeightRule) -> None:
    found = losses.effective_class_weights([50, 0, 5, 1], rule)
    assert found[1] == 0
    assert found[[0, 2, 3]].mean() == pytest.approx(1)


def test_weights_refuse_wrong_input() -> None:
    with pytest.raises(ConfigError, match=r"'invers'; did you mean 'inverse'"):
        losses.effective_class_weights([1, 2], "invers")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one above 0"):
        losses.effective_class_weights([0, 0])


def test_dice_by_hand() -> None:
    # Two pixels at .5, one of them of class 1: for both classes, 2 * .5 + 1 over 1 + 1 + 1.
    logits = torch.zeros(1, 2, 1, 2)
    target = torch.tensor([[[0, 1]]])
    assert losses.dice(logits, target).item() == pytest.approx(1 - 2 / 3, abs=1e-6)
    # An absent third class does not count: p is 1/3 each, 2 * 1/3 + 1 over 2/3 + 1 + 1.
    logits = torch.zeros(1, 3, 1, 2)
    want = 1 - (2 / 3 + 1) / (2 / 3 + 2)
    assert losses.dice(logits, target).item() == pytest.approx(want, abs=1e-6)


def test_dice_of_a_perfect_prediction_is_zero() -> None:
    target = torch.tensor([[[0, 1, 2], [0, 1, 2]]])
    logits = 50 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    assert losses.dice(logits, target).item() == pytest.approx(0, abs=1e-6)


def test_focal_by_hand_and_without_gamma() -> None:
    logits = torch.log(torch.tensor([0.75, 0.25])).reshape(1, 2, 1, 1)
    target = torch.tensor([[[0]]])
    found = losses.focal(logits, target, gamma=2.0)
    assert found.item() == pytest.approx(0.25**2 * -math.log(0.75), rel=1e-5)
    logits, target = _random()
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5])
    plain = torch.nn.functional.cross_entropy(logits, target, weight=weights)
    assert losses.focal(logits, target, 0.0, weights).item() == pytest.approx(plain.item())


def test_focal_has_a_finite_gradient_where_the_model_is_certain() -> None:
    logits = torch.tensor([60.0, -60.0]).reshape(1, 2, 1, 1).requires_grad_()
    losses.focal(logits, torch.tensor([[[0]]]), gamma=0.5).backward()
    assert torch.isfinite(logits.grad).all()


def test_bce_dice_by_hand() -> None:
    logit = torch.zeros(1, 1, 1, 2)
    mask = torch.tensor([[[[1.0, 0.0]]]])
    want = math.log(2) + 1 - (2 * 0.5 + 1) / (1 + 1 + 1)
    assert losses.bce_dice(logit, mask).item() == pytest.approx(want, abs=1e-6)


def test_regressions_by_hand() -> None:
    pred, target = torch.tensor([[[[0.0, 3.0]]]]), torch.tensor([[[[0.5, 0.0]]]])
    assert losses.mse(pred, target).item() == pytest.approx((0.25 + 9) / 2)
    assert losses.smooth_l1(pred, target).item() == pytest.approx((0.5 * 0.25 + 2.5) / 2)


def test_smooth_l1_inside_by_hand() -> None:
    # Errors 2 and .05 inside, 9 outside, in both channels the other way round.
    pred = torch.tensor([[[[2.0, 0.05, 9.0]], [[0.05, 2.0, 9.0]]]], requires_grad=True)
    mask = torch.tensor([[[[True, True, False]]]])
    loss = losses.smooth_l1_inside(pred, torch.zeros_like(pred), mask)
    # Beta .1: 2 - .1 / 2 where linear, .05 ** 2 / (2 * .1) where squared.
    assert loss.item() == pytest.approx((1.95 + 0.0125) / 2)
    loss.backward()
    assert pred.grad is not None
    assert not pred.grad[..., 2].any()
    first = torch.tensor([[[[True, False, True]]]])
    loss = losses.map_loss("smooth_l1_inside")(pred, torch.zeros_like(pred), mask, first)
    assert loss.item() == pytest.approx((1.95 + 0.0125) / 2)
    assert losses.smooth_l1_inside(pred, 0 * pred, mask & ~mask).item() == 0


def test_hv_against_scipy() -> None:
    rng = np.random.default_rng(0)
    pred, target = rng.standard_normal((2, 1, 2, 9, 11)).astype(np.float32)
    mask = rng.random((1, 1, 9, 11)) < 0.4
    y, x = np.mgrid[-2:3, -2:3].astype(float)
    square = np.where((x == 0) & (y == 0), 1, x**2 + y**2)
    dx = ndimage.correlate(pred[0, 0] - target[0, 0], x / square, mode="nearest")
    dy = ndimage.correlate(pred[0, 1] - target[0, 1], y / square, mode="nearest")
    inside = mask[0, 0]
    gradient = (dx[inside] ** 2).sum() + (dy[inside] ** 2).sum()
    want = ((pred - target) ** 2).mean() + gradient / (2 * inside.sum())
    found = losses.hv(*map(torch.from_numpy, (pred, target, mask)))
    assert found.item() == pytest.approx(want, rel=1e-5)


def test_hv_sees_gradients_inside_nuclei_only() -> None:
    target = torch.zeros(1, 2, 8, 8)
    pred = torch.full_like(target, 0.5)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    # A constant offset has no gradient, and the border makes none.
    assert losses.hv(pred, target, mask).item() == pytest.approx(0.25)
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    pred = torch.cat([ramp, torch.zeros_like(ramp)], dim=1)
    middle = torch.zeros_like(mask)
    middle[..., 3:5, 3:5] = True
    gradient = losses.hv(pred, target, middle) - (pred**2).mean()
    assert gradient.item() == pytest.approx(12**2 / 2, rel=1e-5)
    assert losses.hv(pred, target, ~mask).item() == pytest.approx((pred**2).mean().item())


@pytest.mark.parametrize("name", get_args(MapLoss))
def test_every_map_loss_is_found_and_has_a_gradient(name: MapLoss) -> None:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(2, 2, 6, 6, generator=generator, requires_grad=True)
    target = torch.rand(2, 2, 6, 6, generator=generator)
    mask = torch.rand(2, 1, 6, 6, generator=generator) > 0.5
    loss = losses.map_loss(name)(pred, target, mask)
    assert loss.ndim == 0
    loss.backward()
    assert torch.isfinite(pred.grad).all()
    assert pred.grad.abs().sum() > 0
    masked = (mask,) if name in {"hv", "smooth_l1_inside"} else ()
    direct = getattr(losses, name)(pred, target, *masked)
    assert torch.equal(loss, direct)


def test_unknown_map_loss_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown map loss 'l1'.*bce_dice, hv, mse, smooth_l1"):
        losses.map_loss("l1")  # type: ignore[arg-type]
