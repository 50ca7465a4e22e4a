from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage
from skimage import measure as skimage_measure
from skimage.color import hed_from_rgb

from celltyper.cells.morphology import Morphology, measure
from celltyper.errors import DataError

MATRIX = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Ruifrok & Johnston 2001 as printed; scikit-image does not bring its rows to length 1."""


def white(labels):
    return np.full((*labels.shape, 3), 255, np.uint8)


def one(pixels, mpp=1.0):
    labels = np.array(pixels, np.int32)
    return Morphology(*(column.item() for column in measure(labels, white(labels), mpp)))


def blobs(rng, shape, scale, level):
    field = ndimage.gaussian_filter(rng.standard_normal(shape), scale)
    labels, _ = ndimage.label(field > level * field.std(), np.ones((3, 3)))
    return labels.astype(np.int32)


def touching(rng, shape, n):
    """The nearest of n seeds at every pixel: no background, all borders shared."""
    seeds = rng.uniform(0, shape, (n, 2))
    rows, cols = np.indices(shape)
    away = np.hypot(rows[..., None] - seeds[:, 0], cols[..., None] - seeds[:, 1])
    return away.argmin(-1).astype(np.int32) + 1


def lines(rng, shape, n):
    labels = np.zeros(shape, np.int32)
    for i in range(1, n + 1):
        (r0, c0), (r1, c1) = rng.integers(0, shape, (2, 2))
        steps = np.linspace(0, 1, 1 + max(abs(r1 - r0), abs(c1 - c0)))
        rows = np.rint(r0 + steps * (r1 - r0)).astype(int)
        cols = np.rint(c0 + steps * (c1 - c0)).astype(int)
        labels[rows, cols] = i
    return labels


def noise(rng, shape, n):
    """Scattered pixels: every cell in many pieces, with overlapping boxes."""
    return np.where(rng.random(shape) < 0.3, rng.integers(1, n + 1, shape), 0).astype(np.int32)


def rare(rng, shape, n):
    """Single pixels and pairs, far apart."""
    labels = np.zeros(shape, np.int32)
    for i in range(1, n + 1):
        labels[tuple(rng.integers(0, shape, (1 + i % 2, 2)).T)] = i
    return labels


def gaps(rng, shape, n):
    labels = touching(rng, shape, n)
    labels[labels % 3 == 0] = 0
    return labels * 7


CASES = {
    "blobs": lambda rng: blobs(rng, (150, 170), 2.5, 0.7),
    "holes": lambda rng: blobs(rng, (120, 90), 1.5, -0.5),
    "ragged": lambda rng: blobs(rng, (100, 100), 0.6, 0.9),
    "touching": lambda rng: touching(rng, (90, 110), 60),
    "lines": lambda rng: lines(rng, (70, 90), 25),
    "noise": lambda rng: noise(rng, (60, 50), 40),
    "rare": lambda rng: rare(rng, (60, 50), 40),
    "gaps": lambda rng: gaps(rng, (90, 80), 40),
    "one row": lambda rng: noise(rng, (1, 80), 9),
    "one column": lambda rng: noise(rng, (80, 1), 9),
    "one cell": lambda _: np.ones((37, 53), np.int32),
}


@pytest.mark.parametrize("mpp", [1.0, 0.2527])
@pytest.mark.parametrize("name", CASES)
def test_shape_is_that_of_regionprops(name, mpp):
    labels = CASES[name](np.random.default_rng(len(name)))
    found = measure(labels, white(labels), mpp)
    regions = skimage_measure.regionprops(labels)
    assert len(regions) == len(found.solidity) > 0

    def expected(prop):
        return np.array([getattr(region, prop) for region in regions], float)

    # A minor axis or a difference of axes of 0 is the root of a rounding error in regionprops.
    close = np.testing.assert_allclose
    close(found.perimeter_um, expected("perimeter") * mpp, rtol=1e-12, atol=1e-12)
    close(found.axis_major_length_um, expected("axis_major_length") * mpp, rtol=1e-9)
    close(found.axis_minor_length_um, expected("axis_minor_length") * mpp, rtol=1e-9, atol=2e-6)
    close(found.eccentricity, expected("eccentricity"), rtol=1e-9, atol=1e-6)
    np.testing.assert_array_equal(found.solidity, expected("solidity"))
    long = expected("eccentricity") > 0.01
    turned = found.orientation - expected("orientation")
    close(np.sin(turned[long]), 0, atol=1e-9)
    assert (np.abs(found.orientation) <= math.pi / 2).all()


def test_hull_of_many_small_shapes():
    rng = np.random.default_rng(5)
    labels = np.zeros((400, 400), np.int32)
    for i, (r, c) in enumerate(np.ndindex(40, 40)):
        share = rng.uniform(0.05, 0.9)
        labels[10 * r : 10 * r + 10, 10 * c : 10 * c + 10] = (rng.random((10, 10)) < share) * (
            i + 1
        )
    expected = [region.area_convex for region in skimage_measure.regionprops(labels)]
    solidity = measure(labels, white(labels), 1.0).solidity
    area = np.bincount(labels.ravel())[1:]
    np.testing.assert_array_equal(np.rint(area[area > 0] / solidity), expected)


def test_single_pixel():
    cell = one([[0, 0, 0], [0, 3, 0], [0, 0, 0]])
    assert cell[:6] == (0, 0, 0, 0, -math.pi / 4, 1)


def test_square_at_the_corner_of_the_image():
    # All nine pixels but the middle are on the border: 8 steps around it. Variance 2 / 3.
    cell = one(np.ones((3, 3)), mpp=0.5)
    assert cell.perimeter_um == 4
    assert cell.axis_major_length_um == pytest.approx(0.5 * 4 * math.sqrt(2 / 3), rel=1e-15)
    assert cell.axis_minor_length_um == cell.axis_major_length_um
    assert cell.eccentricity == 0
    assert cell.orientation == -math.pi / 4
    assert cell.solidity == 1


@pytest.mark.parametrize(
    ("pixels", "orientation"),
    [
        ([[1], [1], [1]], 0),
        ([[1, 1, 1]], math.pi / 2),
        (np.eye(3), math.pi / 4),
        (np.eye(3)[::-1], -math.pi / 4),
    ],
)
def test_orientation_of_lines(pixels, orientation):
    cell = one(pixels)
    assert cell.orientation == pytest.approx(orientation, abs=1e-15)
    assert (cell.eccentricity, cell.axis_minor_length_um) == (1, 0)


def test_solidity_of_pieces_counts_what_lies_between_them():
    # The hull of the midpoints of all pixel edges holds the centres of the pixels between.
    assert one([[1, 0, 0, 0, 1]]).solidity == 2 / 5
    # From midpoint (0, 0.5) to midpoint (0.5, 1): the centre (0, 1) is outside.
    assert one([[1, 0], [0, 1]]).solidity == 1
    # From (0, 0.5) to (1.5, 2): the centre (1, 1) is inside.
    assert one([[1, 0, 0], [1, 0, 0], [1, 1, 1]]).solidity == 5 / 6
    # From (0, 0.5) to (2, 1.5): the centre (1, 1) is on the edge, and so is (1, 0).
    assert one([[1, 0], [0, 0], [0, 1]]).solidity == 2 / 4


def test_stains_are_the_mean_over_the_cell_of_the_unmixed_pixels():
    rng = np.random.default_rng(1)
    labels = noise(rng, (40, 50), 12)
    image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image[:2] = 0
    found = measure(labels, image, 0.5)
    density = -np.log10(np.maximum(image, 1) / 255)
    stains = np.einsum("hwc,cs->hws", density, hed_from_rgb)
    for stain, column in enumerate((found.hematoxylin_od, found.eosin_od)):
        expected = ndimage.mean(stains[..., stain], labels, np.arange(1, 13))
        unit = np.linalg.norm(MATRIX[stain])
        np.testing.assert_allclose(column, expected * unit, rtol=1e-12, atol=1e-12)


def test_stains_that_were_mixed_are_found_again():
    rows = MATRIX / np.linalg.norm(MATRIX, axis=1, keepdims=True)
    amounts = np.array([[0.8, 0.1], [0.1, 0.5], [0.0, 0.0], [0.3, 0.3]])
    image = np.rint(255 * 10 ** -(amounts @ rows[:2])).astype(np.uint8)[None]
    labels = np.arange(1, 5, dtype=np.int32)[None]
    found = measure(labels, image, None)
    np.testing.assert_allclose(found.hematoxylin_od, amounts[:, 0], atol=0.01)
    np.testing.assert_allclose(found.eosin_od, amounts[:, 1], atol=0.01)
    assert found.hematoxylin_od[2] == found.eosin_od[2] == 0


def test_values_do_not_depend_on_place_or_neighbours():
    rng = np.random.default_rng(3)
    labels = touching(rng, (80, 90), 30)
    image = rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)
    together = np.array(measure(labels, image, 0.25))
    for i in range(1, 31):
        alone = np.zeros((300, 400), np.int32)
        canvas = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        r, c = rng.integers(0, (220, 310))
        alone[r : r + 80, c : c + 90] = np.where(labels == i, 1000 + i, 0)
        canvas[r : r + 80, c : c + 90] = image
        np.testing.assert_array_equal(
            np.array(measure(alone, canvas, 0.25))[:, 0], together[:, i - 1]
        )


@pytest.mark.parametrize("axis", [0, 1])
def test_far_from_the_origin_nothing_is_rounded(axis):
    # Sums of squares from the image's corner would need more than the 53 bits of a float.
    near = (np.random.default_rng(6).random((60, 60)) < 0.8).astype(np.int32)
    away = np.zeros((60 + 100_000 * (axis == 0), 60 + 100_000 * (axis == 1)), np.int32)
    away[-60:, -60:] = near
    found = measure(away, white(away), 0.25)
    np.testing.assert_array_equal(found, measure(near, white(near), 0.25))


def test_views_and_read_only_arrays():
    rng = np.random.default_rng(4)
    labels, image = noise(rng, (30, 40), 5), rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    expected = measure(labels[::2, 5:].copy(), image[::2, 5:].copy(), 0.5)
    labels.flags.writeable = image.flags.writeable = False
    np.testing.assert_array_equal(measure(labels[::2, 5:], image[::2, 5:], 0.5), expected)


def test_unknown_mpp_leaves_lengths_open():
    labels = np.ones((4, 5), np.int32)
    found = measure(labels, white(labels), None)._asdict()
    lengths = {name for name, column in found.items() if np.isnan(column).all()}
    assert lengths == {name for name in found if name.endswith("_um")}
    assert lengths == {"perimeter_um", "axis_major_length_um", "axis_minor_length_um"}
    assert found["solidity"] == [1]


def test_pixels_that_are_not_square_count_as_squares_of_their_area():
    labels = touching(np.random.default_rng(7), (40, 50), 9)
    square, flat = (measure(labels, white(labels), mpp) for mpp in (0.5, (0.25, 1.0)))
    np.testing.assert_array_equal(flat, square)


@pytest.mark.parametrize("shape", [(5, 6), (0, 6), (5, 0), (0, 0)])
def test_no_cells(shape):
    labels = np.zeros(shape, np.int32)
    for column in measure(labels, white(labels), 0.5):
        assert column.shape == (0,)
        assert column.dtype == np.float64


def test_errors():
    labels = np.ones((4, 5), np.int32)
    with pytest.raises(ValueError, match=r"image must be \(4, 5, 3\) as labels, got \(5, 4, 3\)"):
        measure(labels, white(labels.T), 0.5)
    with pytest.raises(ValueError, match="image must be uint8, got float64"):
        measure(labels, white(labels) / 255, 0.5)
    with pytest.raises(ValueError, match="labels must not be negative, got -1"):
        measure(-labels, white(labels), 0.5)
    with pytest.raises(ValueError, match=r"labels must be \(H, W\)"):
        measure(labels[None], white(labels), 0.5)
    for mpp in (0, -0.5, math.nan, math.inf, (0.5, 0), (math.nan, 0.5)):
        with pytest.raises(DataError, match="mpp must be a positive number"):
            measure(labels, white(labels), mpp)
