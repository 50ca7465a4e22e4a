"""Instance method `centers`: targets by hand, votes by hand, and who gets which pixel."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from celltyper.errors import ConfigError
from celltyper.instances import Centers
from celltyper.testing import check_instances


def pointing(shape: tuple[int, int], *blocks: tuple[slice, slice, int, int]) -> dict:
    """Maps of blocks ``(rows, columns, row of centre, column of centre)``, without outlines."""
    nucleus, offsets = np.zeros((1, *shape), np.float32), np.zeros((2, *shape), np.float32)
    y, x = np.indices(shape)
    for rows, cols, row, col in blocks:
        nucleus[0, rows, cols] = 1
        offsets[0, rows, cols] = (col - x[rows, cols]) / 10
        offsets[1, rows, cols] = (row - y[rows, cols]) / 10
    return {"nucleus": nucleus, "centers": offsets, "boundary": np.zeros_like(nucleus)}


def two(gap: int) -> dict:
    """Two blocks of 10 x 10 px side by side, whose centres lie on one row, a gap apart."""
    left, right = slice(4, 14), slice(14, 24)
    return pointing((20, 28), (slice(5, 15), left, 10, 8), (slice(5, 15), right, 10, 8 + gap))


def test_targets_by_hand() -> None:
    # Label 5: columns 1, 2, 3 of row 0 and 2 of row 1, so its centre is column 2, row 1 / 4.
    labels = np.array([[0, 5, 5, 5, 0, 0], [0, 0, 5, 0, 0, 9]], np.int32)
    maps = Centers(scale=0.25).encode(labels)
    assert maps["nucleus"][0].tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1]]
    assert maps["centers"][0].tolist() == [[0, 4, 0, -4, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert maps["centers"][1].tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, -3, 0, 0, 0]]
    # Only (0, 2) has neither background nor another label on its four sides.
    assert maps["boundary"][0].tolist() == [[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1]]


def test_boundary_is_what_erosion_takes() -> None:
    labels = np.kron(np.random.default_rng(0).integers(0, 4, (6, 7)), np.ones((5, 5)))
    labels = labels.astype(np.int32)
    expected = labels > 0
    for i in range(1, 4):
        expected &= ~ndimage.binary_erosion(labels == i, border_value=1)
    np.testing.assert_array_equal(Centers().encode(labels)["boundary"][0], expected)


def test_it_fits_the_contract() -> None:
    check_instances(Centers())
    check_instances(Centers(scale=5))


def test_pixels_go_to_the_centre_they_point_at() -> None:
    rng = np.random.default_rng(1)
    centres = np.array([[15, 15], [15, 29], [28, 22], [30, 40]])
    y, x = np.indices((45, 55))
    gaps = cdist(np.stack([y, x], -1).reshape(-1, 2), centres)
    truth = np.where(gaps.min(1) <= 9, gaps.argmin(1) + 1, 0).reshape(y.shape)
    maps = Centers().encode(truth.astype(np.int32))
    noise = ndimage.gaussian_filter(rng.standard_normal((2, *y.shape)), (0, 1.5, 1.5))
    maps["centers"] += (0.2 * noise / noise.std()).astype(np.float32)
    votes = np.stack([y + 10 * maps["centers"][1], x + 10 * maps["centers"][0]], -1)
    middle = np.array(ndimage.center_of_mass(truth > 0, truth, range(1, 5)))
    nearest = cdist(votes.reshape(-1, 2), middle).argmin(1).reshape(y.shape) + 1
    found = Centers().decode(maps)
    np.testing.assert_array_equal(found > 0, truth > 0)
    assert found.max() == 4
    # The order of the first pixels is that of the centres.
    assert (found == nearest)[truth > 0].mean() > 0.99


@pytest.mark.parametrize(
    ("gap", "depth", "count"),
    [
        # Binomial weights 924, 792, 495, 220, 66, 12, 1 at distances 0 to 6, and equal votes.
        # Gap 4: 924 + 66 at the centres, 2 * 495 between: no ridge.
        (4, 0.03, 1),
        # Gap 5: 924 + 12, and 495 + 220 between, a fall by .24.
        (5, 0.2, 2),
        (5, 0.3, 1),
        # Gap 6: 924 + 1, and 2 * 220 between, a fall by .52.
        (6, 0.45, 2),
        (6, 0.6, 1),
    ],
)
def test_ridge_of_votes_by_hand(gap: int, depth: float, count: int) -> None:
    assert Centers(depth=depth, radius=6).decode(two(gap)).max() == count


def test_votes_of_outlines_hardly_count() -> None:
    # 8 columns between two blocks of 10 point between their centres, 8 apart, as blur does. At
    # full votes the middle has .8 * 924 + 2 * 66 = 871, the centres 924 + .8 * 66 = 977: a fall
    # by .11. At a tenth it falls by .78.
    rows = slice(5, 15)
    maps = pointing(
        (20, 36),
        (rows, slice(4, 14), 10, 14),
        (rows, slice(14, 22), 10, 18),
        (rows, slice(22, 32), 10, 22),
    )
    assert Centers().decode(maps).max() == 1
    maps["boundary"][0, rows, 14:22] = 1
    found = Centers().decode(maps)
    assert found.max() == 2
    assert (found[rows, 4:14] == 1).all()
    assert (found[rows, 22:32] == 2).all()


def test_stray_pixels_join_what_is_nearest() -> None:
    maps = two(10)
    truth = np.zeros((20, 28), np.int32)
    truth[5:15, 4:14], truth[5:15, 14:24] = 1, 2
    np.testing.assert_array_equal(Centers().decode(maps), truth)
    # An island in the left block points at the right centre (10, 18).
    maps["centers"][0, 7:9, 6:8] = (18 - np.arange(6, 8)) / 10
    # Others point nowhere: too far, and not a number.
    maps["centers"][:, 9:15, 4:9] = 9
    maps["centers"][:, 5:15, 23] = np.nan
    np.testing.assert_array_equal(Centers().decode(maps), truth)


def test_a_small_core_is_a_nucleus_only_on_its_own() -> None:
    rows = slice(5, 15)
    block, small = (rows, slice(4, 14), 10, 8), (slice(8, 12), slice(14, 19), 10, 17)
    touching = pointing((20, 28), block, small)
    assert Centers(min_core=20).decode(touching).max() == 2
    assert Centers(min_core=21).decode(touching).max() == 1
    alone = pointing((20, 28), block, (slice(8, 12), slice(15, 20), 10, 17))
    assert Centers(min_core=21).decode(alone).max() == 2


def test_two_nuclei_that_share_a_centre_are_parted_by_background() -> None:
    rows = slice(5, 15)
    maps = pointing((20, 28), (rows, slice(4, 12), 10, 13), (rows, slice(14, 24), 10, 13))
    expected = np.zeros((20, 28), np.int32)
    expected[rows, 4:12], expected[rows, 14:24] = 1, 2
    np.testing.assert_array_equal(Centers().decode(maps), expected)


def test_votes_beyond_the_image_count_at_its_border() -> None:
    maps = pointing(
        (20, 28), (slice(0, 8), slice(0, 10), -4, 5), (slice(0, 8), slice(10, 20), 4, 15)
    )
    assert (Centers().decode(maps)[:8, :20] == np.repeat([1, 2], 10)).all()


@pytest.mark.parametrize(("option", "value"), [("scale", 0.0), ("depth", 1.0), ("min_core", 0)])
def test_bad_values_are_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'centers': {option} must be"):
        Centers(**{option: value})
