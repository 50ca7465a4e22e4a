from __future__ import annotations

import numpy as np
import pytest
import shapely
from scipy import ndimage

from celltyper.cells.outlines import outlines, to_shapely
from celltyper.cells.wkb import to_wkb


def test_single_pixel_is_the_unit_square():
    found = outlines(np.array([[5]], np.int32))
    assert found.ids.tolist() == [5]
    assert found.coordinates.tolist() == [[1, 0], [1, 1], [0, 1], [0, 0], [1, 0]]
    assert found.ring_offsets.tolist() == [0, 5]
    assert found.is_hole.tolist() == [False]


def test_hole_follows_its_exterior():
    labels = np.ones((3, 3), np.int32)
    labels[1, 1] = 0
    found = outlines(labels)
    assert found.is_hole.tolist() == [False, True]
    assert found.polygon_offsets.tolist() == [0, 2]
    (cell,) = to_shapely(found)
    assert cell.equals(shapely.box(0, 0, 3, 3) - shapely.box(1, 1, 2, 2))
    assert cell.exterior.is_ccw
    assert not cell.interiors[0].is_ccw


def test_diagonal_pixels_are_two_polygons():
    found = outlines(np.array([[1, 0], [0, 1]], np.int32))
    assert found.cell_offsets.tolist() == [0, 2]
    (cell,) = to_shapely(found)
    assert cell.geom_type == "MultiPolygon"
    assert cell.is_valid
    assert cell.area == 2


def test_crossed_diagonals_of_two_labels():
    cells = to_shapely(outlines(np.array([[1, 2], [2, 1]], np.int32)))
    assert [cell.geom_type for cell in cells] == ["MultiPolygon"] * 2
    assert shapely.area(cells).tolist() == [2, 2]


def test_hole_that_touches_the_outside_diagonally_is_a_hole():
    # Following the crack alone would give one ring that passes (2, 2) twice: invalid.
    labels = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], np.int32)
    (cell,) = to_shapely(outlines(labels))
    assert cell.is_valid
    assert len(cell.interiors) == 1
    assert cell.area == 7


def test_hole_of_a_piece_goes_to_that_piece_and_not_to_the_one_around_it():
    labels = np.ones((7, 7), np.int32)
    labels[1:6, 1:6] = 0
    labels[2:5, 2:5] = 1
    labels[3, 3] = 0
    (cell,) = to_shapely(outlines(labels))
    assert cell.is_valid
    assert sorted(part.area for part in cell.geoms) == [8, 24]
    assert [len(part.interiors) for part in cell.geoms] == [1, 1]


def test_empty():
    for shape in ((0, 0), (0, 4), (5, 5)):
        found = outlines(np.zeros(shape, np.int32))
        assert len(found.ids) == len(to_shapely(found)) == len(to_wkb(found)) == 0
        assert found.ids.dtype == found.coordinates.dtype == np.int32
        assert found.coordinates.shape == (0, 2)


def test_refuses_other_dimensions():
    with pytest.raises(ValueError, match=r"labels must be \(H, W\)"):
        outlines(np.zeros((2, 2, 2), np.int32))


@pytest.mark.parametrize("seed", range(4))
def test_random_images_equal_the_union_of_pixel_squares(seed):
    rng = np.random.default_rng(seed)
    for _ in range(100):
        shape, kinds = rng.integers(1, 14, 2), int(rng.integers(1, 4))
        labels = rng.integers(1, kinds + 1, shape) * (rng.random(shape) < rng.random()) * 3
        labels = labels.astype(np.int32)
        found = outlines(labels)
        cells = to_shapely(found)
        assert found.ids.tolist() == [i for i in np.unique(labels) if i]
        assert shapely.is_valid(cells).all()
        for i, cell in zip(found.ids, cells, strict=True):
            rows, cols = np.nonzero(labels == i)
            assert cell.area == len(rows)
            assert cell.equals(shapely.union_all(shapely.box(cols, rows, cols + 1, rows + 1)))
            assert shapely.get_num_geometries(cell) == ndimage.label(labels == i)[1]
        for start, stop in zip(found.ring_offsets[:-1], found.ring_offsets[1:], strict=True):
            ring = found.coordinates[start:stop]
            assert (ring[0] == ring[-1]).all()
            vertical = np.diff(np.vstack([ring, ring[1]])[:, 0]) == 0
            assert (vertical[1:] != vertical[:-1]).all()  # every vertex is a corner


def test_wkb_equals_shapely():
    rng = np.random.default_rng(0)
    found = outlines((rng.integers(1, 30, (60, 60)) * (rng.random((60, 60)) < 0.7)).astype("i4"))
    expected = shapely.to_wkb(to_shapely(found), byte_order=1, flavor="iso")
    assert to_wkb(found).to_pylist() == expected.tolist()


def test_strided_and_fortran_labels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (20, 20)).astype(np.int32)
    expected = outlines(labels).coordinates
    assert np.array_equal(outlines(np.asfortranarray(labels)).coordinates, expected)
    assert np.array_equal(outlines(np.repeat(labels, 2, 1)[:, ::2]).coordinates, expected)
