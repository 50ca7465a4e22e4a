"""Label images: numbers per label against scipy and scikit-image, resizing against counting."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import regionprops

from celltyper.labels import centroids, label_boxes, label_ids, mean_in_labels, resize_labels
from celltyper.predict import _labels_to
from celltyper.types import Labels


@pytest.fixture
def scattered() -> Labels:
    """Labels in several pieces, with gaps in the ids."""
    random = np.random.default_rng(0)
    return random.choice([0, 0, 0, 2, 3, 7, 40], (23, 31)).astype(np.int32)


def discs(side: int, count: int) -> Labels:
    """Discs of 3 to 8 px radius, one in every cell of a grid, at any fraction of a pixel."""
    random = np.random.default_rng(1)
    labels = np.zeros((side * count, side * count), np.int32)
    r, c = np.indices(labels.shape)
    for n in range(count * count):
        radius = random.uniform(3, 8)
        y, x = (np.array(divmod(n, count)) + 0.5) * side + random.uniform(-3, 3, 2)
        labels[(r - y) ** 2 + (c - x) ** 2 <= radius**2] = n + 1
    return labels


def test_ids(scattered: Labels) -> None:
    assert label_ids(scattered).tolist() == [2, 3, 7, 40]
    assert label_ids(scattered).dtype == np.int32
    assert label_ids(np.zeros((3, 4), np.int32)).tolist() == []
    assert label_ids(np.zeros((0, 4), np.int32)).tolist() == []


def test_boxes(scattered: Labels) -> None:
    scattered[:, 20:][scattered[:, 20:] == 7] = 0
    boxes = label_boxes(scattered)
    found = [tuple(int(v) for v in row) for row in zip(*boxes, strict=True)]
    expected = []
    for p in regionprops(scattered):
        top, left, bottom, right = p.bbox
        expected.append((p.label, top, bottom, left, right, int(p.area)))
    assert found == expected
    assert len(label_boxes(np.zeros((3, 4), np.int32)).ids) == 0


def test_means(scattered: Labels) -> None:
    maps = np.random.default_rng(2).random((3, *scattered.shape)).astype(np.float32)
    expected = [ndimage.mean(channel, scattered, [2, 3, 7, 40]) for channel in maps]
    found = mean_in_labels(scattered, maps)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.transpose(expected), rtol=1e-6)
    assert mean_in_labels(np.zeros_like(scattered), maps).shape == (0, 3)
    with pytest.raises(ValueError, match="must be equal"):
        mean_in_labels(scattered[1:], maps)


def test_centroids(scattered: Labels) -> None:
    expected = ndimage.center_of_mass(scattered > 0, scattered, [2, 3, 7, 40])
    np.testing.assert_allclose(centroids(scattered), expected)
    assert centroids(np.zeros((3, 4), np.int32)).shape == (0, 2)


def test_negative_or_flat_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        label_ids(np.array([[0, -1]], np.int32))
    with pytest.raises(ValueError, match=r"must be \(H, W\)"):
        label_ids(np.zeros(3, np.int32))


def resize(rows: list[list[int]], *shape: int) -> list[list[int]]:
    return resize_labels(np.array(rows, np.int32), shape).tolist()  # type: ignore[arg-type]


def test_majority_of_what_a_pixel_covers() -> None:
    source = [
        [1, 1, 2, 0],
        [1, 0, 2, 2],
        [0, 0, 3, 4],
        [0, 5, 4, 4],
    ]
    # 3 is outvoted by 4, and its centroid lies in the pixel of 4; 5 in that of the background
    assert resize(source, 2, 2) == [[1, 2], [5, 4]]
    # one row of three becomes two of 1.5: 1 + 0.5 of the next
    assert resize([[1, 2, 3]], 1, 2) == [[1, 3]]
    # rows shrink and columns grow
    assert resize([[1, 2], [1, 0], [1, 2]], 1, 4) == [[1, 1, 2, 2]]


def test_growing_repeats_pixels() -> None:
    assert resize([[1, 0], [0, 2]], 4, 4) == [[1, 1, 0, 0]] * 2 + [[0, 0, 2, 2]] * 2
    # the centre of output column 1 lies between the pixels: left, right, left, ... by row
    assert resize([[1, 2], [1, 2]], 2, 3) == [[1, 2, 2], [1, 1, 2]]
    assert resize([[7]], 2, 3) == [[7] * 3] * 2


def test_ties_go_to_both_sides_by_turns() -> None:
    # even places take what is left or above, odd ones what is right or below
    assert resize([[0, 1, 1, 0]] * 8, 4, 2) == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert resize([[1], [2]] * 4, 4, 1) == [[1], [2], [1], [2]]


def test_what_is_left_of_small_nuclei() -> None:
    source = np.zeros((6, 6), np.int32)
    source[0, 0] = 9  # outvoted by background: keeps its pixel
    source[1, 1] = 8  # in the same output pixel: the smaller id
    source[0, 3:6] = source[1, 3:6] = 5
    source[2, 4] = 6  # in a pixel that 5 wins
    assert resize_labels(source, (2, 2)).tolist() == [[8, 5], [0, 0]]
    assert label_ids(resize_labels(source, (3, 3))).tolist() == [5, 6, 8]
    # a centroid exactly between four pixels
    middle = np.zeros((4, 4), np.int32)
    middle[1:3, 1:3] = 2
    assert resize_labels(middle, (2, 2)).tolist() == [[0, 0], [0, 2]]
    middle[1:3, 1:3] = 3
    assert resize_labels(middle, (2, 2)).tolist() == [[3, 0], [0, 0]]


def brute(labels: Labels, shape: tuple[int, int]) -> NDArray[np.int32]:
    """Cut every source pixel into new x new pieces and count those inside each output pixel."""
    height, width = labels.shape
    fine = labels.repeat(shape[0], 0).repeat(shape[1], 1)
    out = np.zeros(shape, np.int32)
    for r, c in np.ndindex(shape):
        piece = fine[r * height : (r + 1) * height, c * width : (c + 1) * width]
        if shape[0] >= height:  # what lies at the centre, up to two pieces where it is between
            piece = piece[(height - 1) // 2 : height // 2 + 1]
        if shape[1] >= width:
            piece = piece[:, (width - 1) // 2 : width // 2 + 1]
        ids, first, counts = np.unique(piece, return_index=True, return_counts=True)
        tied = counts == counts.max()
        order = np.argsort(first[tied])
        out[r, c] = ids[tied][order[-((r + c) % 2)]]
    for label in sorted(set(labels[labels > 0]) - set(out[out > 0])):
        for_odd = (lambda x: np.ceil(x) - 1) if label % 2 else np.floor
        r, c = (
            int(for_odd((i.mean() + 0.5) * new / old))
            for i, new, old in zip(np.nonzero(labels == label), shape, labels.shape, strict=True)
        )
        out[r, c] = out[r, c] or label
    return out


@pytest.mark.parametrize(
    "shape",
    [(4, 5), (8, 10), (12, 15), (16, 20), (5, 3), (1, 1), (7, 9), (9, 11), (3, 13), (11, 4)],
)
@pytest.mark.parametrize("top", [2, 9, 80])
def test_against_counting_pieces(shape: tuple[int, int], top: int) -> None:
    random = np.random.default_rng(top)
    for _ in range(5):
        labels = random.integers(0, top, (8, 10)).astype(np.int32)
        np.testing.assert_array_equal(resize_labels(labels, shape), brute(labels, shape))


def test_the_own_size_and_views_and_read_only_arrays(scattered: Labels) -> None:
    np.testing.assert_array_equal(resize_labels(scattered, (23, 31)), scattered)
    expected = resize_labels(scattered.T.copy(), (20, 11))
    np.testing.assert_array_equal(resize_labels(scattered.T, (20, 11)), expected)
    scattered.flags.writeable = False
    np.testing.assert_array_equal(resize_labels(scattered, (23, 31)), scattered)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_sizes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        resize_labels(np.ones((2, 2), np.int32), shape)
    with pytest.raises(ValueError, match="must not be empty"):
        resize_labels(np.ones(shape, np.int32), (2, 2))


@pytest.mark.parametrize("new", [150, 200, 600, 450, 100, 75, 299, 301, 217, 413])
def test_centroids_and_areas_stay(new: int) -> None:
    labels = discs(30, 10)
    factor = 300 / new
    resized = resize_labels(labels, (new, new))
    assert label_ids(resized).tolist() == list(range(1, 101))
    shift = (centroids(resized) + 0.5) * factor - (centroids(labels) + 0.5)
    # Sampling at centres shifts by about 0.5 at /2 and /4. Nuclei of a few output pixels scatter
    # more, and a majority of convex outlines loses a little area.
    assert np.abs(shift.mean(0)).max() < 0.05 * max(1, factor / 2)
    assert np.abs(shift).max() < max(0.5, factor / 2)
    area = label_boxes(resized).area.sum() * factor**2 / label_boxes(labels).area.sum()
    assert abs(area - 1) < 0.02 * max(1, factor - 1)


def test_prediction_at_another_size_keeps_rows_of_the_cells_that_stay() -> None:
    labels = np.array([[1, 1, 2, 3], [1, 1, 3, 3]], np.int32)
    cells = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]], np.float32)
    moved, kept = _labels_to(labels, cells, (1, 2))
    assert moved.tolist() == [[1, 2]]
    np.testing.assert_array_equal(kept, cells[[0, 2]])
