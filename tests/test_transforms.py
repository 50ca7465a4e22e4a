"""Augmentation against numpy, scipy and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2hsv

from celltyper import transforms as t

OFF = {
    "dihedral": False,
    "rotate": 0.0,
    "shift": 0.0,
    "scale": 0.0,
    "elastic": 0.0,
    "hed_sigma": 0.0,
    "hed_bias": 0.0,
    "color": 0.0,
    "blur": 0.0,
    "noise": 0.0,
}


def _tile(height: int = 48, width: int = 48, seed: int = 0) -> t.Tile:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((height, width, 3)), (3, 3, 0))
    image = (128 + 400 * smooth).clip(0, 255).astype(np.uint8)
    labels = np.zeros((height, width), np.int32)
    for label in range(1, 8):
        row, col = rng.integers(4, height - 4), rng.integers(4, width - 4)
        labels[row - 3 : row + 4, col - 3 : col + 4] = label
    return t.Tile(image, labels, np.array([0, 1, 2, 3, 1, 2, 3, 1], np.uint8)[: labels.max() + 1])


def test_zero_strength_is_the_identity() -> None:
    tile = _tile()
    found = t.augment(*tile, np.random.default_rng(0), **OFF)
    for mine, given in zip(found, tile, strict=True):
        np.testing.assert_array_equal(mine, given)


def test_zero_strength_with_a_size_is_the_middle() -> None:
    tile = _tile(51, 48)
    found = t.augment(*tile, np.random.default_rng(0), size=32, **OFF)
    np.testing.assert_array_equal(found.image, tile.image[9:41, 8:40])
    np.testing.assert_array_equal(found.labels, tile.labels[9:41, 8:40])


def test_the_generator_decides_everything() -> None:
    tile = _tile()
    first, second, other = (t.augment(*tile, np.random.default_rng(s)) for s in (5, 5, 6))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.image != other.image).any()


def test_input_is_left_alone() -> None:
    tile = _tile()
    before = [a.copy() for a in tile]
    t.augment(*tile, np.random.default_rng(1))
    for a, b in zip(tile, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_symmetries_are_the_eight_of_the_square() -> None:
    labels = np.arange(6, dtype=np.int32).reshape(2, 3)
    image = np.repeat(labels[..., None], 3, axis=2).astype(np.uint8)
    seen = set()
    for which in range(8):
        moved, ids = t.symmetry(image, labels, which)
        np.testing.assert_array_equal(moved[..., 0], ids)
        seen.add((ids.shape, ids.tobytes()))
    assert len(seen) == 8


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_agree_with_numpy(turns: int) -> None:
    tile = _tile()
    matrix = t.affine_matrix(turns * math.pi / 2, 1.0)
    image, labels, mirrored = t.warp(
        tile.image, tile.labels, matrix, np.zeros(2), None, tile.labels.shape
    )
    np.testing.assert_array_equal(labels, np.rot90(tile.labels, turns))
    np.testing.assert_array_equal(image, np.rot90(tile.image, turns))
    assert not mirrored.any()


def test_warp_agrees_with_scipy() -> None:
    tile = _tile(40, 56)
    rng = np.random.default_rng(2)
    matrix, offset = t.affine_matrix(0.7, 1.15), np.array([5.3, -8.1])
    shape = (44, 36)
    field = t.elastic_field(shape, 2.0, rng, spacing=16)
    image, labels, _ = t.warp(tile.image, tile.labels, matrix, offset, field, shape, spacing=16)

    # scipy's own cubic B-spline on the control points, whose first lies one spacing before pixel 0.
    grid = np.stack(np.mgrid[: shape[0], : shape[1]]).astype(float)
    bend = [
        ndimage.map_coordinates(field[..., a], grid / 16 + 1, order=3, prefilter=False)
        for a in (0, 1)
    ]
    middle_out = (np.array(shape) - 1).reshape(2, 1, 1) / 2
    middle_in = (np.array(tile.labels.shape) - 1).reshape(2, 1, 1) / 2
    where = np.einsum("ij,jhw->ihw", matrix, grid - middle_out) + middle_in + np.stack(bend)
    where += offset.reshape(2, 1, 1)
    for k in range(3):
        want = ndimage.map_coordinates(
            tile.image[..., k].astype(float), where, order=1, mode="mirror"
        )
        assert np.abs(image[..., k] - want).max() <= 0.51
    nearest = np.floor(where + 0.5)
    want = ndimage.map_coordinates(tile.labels, nearest, order=0, mode="mirror")
    np.testing.assert_array_equal(labels, want)


def test_elastic_displacement_has_the_stated_size() -> None:
    rng = np.random.default_rng(0)
    ramp = np.arange(2000, dtype=np.int32)
    labels = np.broadcast_to(ramp[:, None], (2000, 2000))
    image = np.zeros((2000, 2000, 3), np.uint8)
    field = t.elastic_field((2000, 2000), 3.0, rng)
    _, moved, mirrored = t.warp(image, labels, np.eye(2), np.zeros(2), field, (2000, 2000))
    away = (moved - labels)[~mirrored]
    assert np.sqrt(np.mean(away.astype(float) ** 2)) == pytest.approx(3.0, rel=0.05)


def test_reflection_excludes_the_edge_pixel_as_numpy_does() -> None:
    labels = np.arange(1, 7, dtype=np.int32).reshape(1, 6).repeat(5, axis=0)
    image = np.repeat(labels[..., None], 3, axis=2).astype(np.uint8)
    wide, ids, mirrored = t.warp(image, labels, np.eye(2), np.zeros(2), None, (5, 26))
    want = np.pad(labels, ((0, 0), (10, 10)), mode="reflect")
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_array_equal(wide[..., 0], want)
    np.testing.assert_array_equal(mirrored[0], [True] * 10 + [False] * 6 + [True] * 10)


def test_mirrored_copies_have_ids_of_their_own() -> None:
    # Label 2 goes on into its reflection and stays one; label 1 is seen a second time.
    labels = np.array([[2, 2, 0, 1, 0, 0, 1, 0, 2]], np.int32)
    mirrored = np.array([[False] * 5 + [True] * 4])
    found, phenotypes = t.split_mirrored(labels, mirrored, np.array([0, 7, 9], np.uint8))
    assert found.tolist() == [[2, 2, 0, 1, 0, 0, 3, 0, 4]]
    assert phenotypes.tolist() == [0, 7, 9, 7, 9]
    labels[0, 3:6] = 1
    found, phenotypes = t.split_mirrored(labels, mirrored, np.array([0, 7, 9], np.uint8))
    assert found.tolist() == [[2, 2, 0, 1, 1, 1, 1, 0, 3]]


def test_labels_keep_id_and_class_and_stay_on_their_nucleus() -> None:
    tile = _tile(96, 96)
    image = (tile.labels * 30).astype(np.uint8)[..., None].repeat(3, axis=2)
    strengths = OFF | {"dihedral": True, "rotate": 180.0, "elastic": 1.0}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = t.augment(image, tile.labels, tile.phenotypes, rng, size=64, **strengths)
        core = ndimage.binary_erosion(found.labels > 0, iterations=2)
        core &= ndimage.minimum_filter(found.labels, 5) == ndimage.maximum_filter(found.labels, 5)
        assert core.any()
        kept = core & (found.labels < len(tile.phenotypes))
        np.testing.assert_array_equal(found.image[kept][:, 0], found.labels[kept] * 30)
        assert found.labels.max() < len(found.phenotypes)
        copies = np.unique(found.labels[found.labels >= len(tile.phenotypes)])
        for copy in copies:
            grey = found.image[core & (found.labels == copy)]
            if len(grey):
                assert found.phenotypes[copy] == tile.phenotypes[grey[0, 0] // 30]


def test_hed_jitter_is_linear_in_the_stains() -> None:
    tile = _tile()
    rng = np.random.default_rng(4)
    found = t.hed_jitter(tile.image, rng, sigma=0.1, bias=0.05)
    again = np.random.default_rng(4)
    factors, offsets = again.uniform(0.9, 1.1, 3), again.uniform(-0.05, 0.05, 3)
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    density = -np.log10(np.maximum(tile.image.astype(float), 1) / 255)
    amounts = density @ np.linalg.inv(stains)
    want = (255 * 10 ** -((amounts * factors + offsets) @ stains)).clip(0, 255)
    assert np.abs(found - want).max() <= 0.51


def _grey(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    return image @ np.array([0.299, 0.587, 0.114])


def test_brightness_contrast_and_saturation_do_what_they_say() -> None:
    image = np.random.default_rng(0).integers(90, 160, (32, 32, 3), dtype=np.uint8)
    bright = t.color_jitter(image, np.random.default_rng(1), 0.2, 0, 0, 0)
    factor = np.random.default_rng(1).uniform(-0.2, 0.2) + 1
    assert np.abs(bright - image * factor).max() <= 0.51
    contrast = t.color_jitter(image, np.random.default_rng(1), 0, 0.2, 0, 0)
    assert _grey(contrast).mean() == pytest.approx(_grey(image).mean(), abs=0.1)
    draws = np.random.default_rng(1)
    factor = [1 + draws.uniform(-x, x) for x in (0, 0.2)][1]
    assert contrast.std() == pytest.approx(image.std() * factor, rel=0.01)
    saturated = t.color_jitter(image, np.random.default_rng(1), 0, 0, 0.3, 0)
    assert np.abs(_grey(saturated) - _grey(image)).max() < 0.6
    assert (np.abs(np.ptp(saturated, axis=2) - np.ptp(image, axis=2)) > 0).any()


def test_hue_turns_colors_and_keeps_their_grey() -> None:
    image = np.full((4, 4, 3), (190, 100, 160), np.uint8)
    turned = t.color_jitter(image, np.random.default_rng(0), 0, 0, 0, 0.1)
    assert np.abs(_grey(turned) - _grey(image)).max() < 0.6
    assert abs(rgb2hsv(turned)[0, 0, 0] - rgb2hsv(image)[0, 0, 0]) > 0.01


def test_blur_agrees_with_scipy() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    for sigma in (0.3, 0.7, 1.6):
        want = ndimage.gaussian_filter(
            image.astype(float),
            (sigma, sigma, 0),
            mode="nearest",
            radius=(math.ceil(3 * sigma),) * 3,
        )
        assert np.abs(t.gaussian_blur(image, sigma) - want).max() <= 0.52


def test_noise_has_the_stated_size_and_no_bias() -> None:
    image = np.full((200, 200, 3), 128, np.uint8)
    noise = t.gaussian_noise(image, np.random.default_rng(0), 6.0).astype(float) - 128
    assert noise.mean() == pytest.approx(0, abs=0.1)
    assert noise.std() == pytest.approx(6.0, rel=0.02)


def test_extreme_pixels_stay_in_range() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[::2] = 255
    for seed in range(10):
        rng = np.random.default_rng(seed)
        found = t.color_jitter(image, rng, 0.5, 0.5, 0.5, 0.5)
        found = t.gaussian_noise(t.hed_jitter(found, rng, 0.5, 0.5), rng, 50)
        assert found.dtype == np.uint8
        assert found[0].mean() > found[1].mean()  # nothing wrapped around
