"""Instance methods: targets by hand, round trips, noise, and independence of the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from celltyper.errors import ConfigError, DataError
from celltyper.instances import HV, METHODS, Distance, build_instances
from celltyper.instances.flood import flood
from celltyper.instances.smoothing import binomial, smooth
from celltyper.metrics import panoptic_quality, pq_of_counts
from celltyper.types import InstanceMethod

NAMES = sorted(METHODS)


def discs(size: int = 200, seed: int = 0, pairs: int = 16) -> np.ndarray:
    """Pairs of touching discs on a grid, some cut by the border of the image."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((size, size), np.int32)
    y, x = np.indices(labels.shape)
    side = round(pairs**0.5)
    step = size / side
    for k in range(pairs):
        r, c = (k // side) * step + rng.uniform(5, 12), (k % side) * step + rng.uniform(2, 8)
        radius = rng.uniform(7, 10)
        for i in range(2):
            inside = (y - r) ** 2 + (x - c - i * 1.7 * radius) ** 2 <= radius**2
            labels[inside & (labels == 0)] = 2 * k + i + 1
    return labels


def in_raster_order(labels: np.ndarray) -> np.ndarray:
    """Labels renumbered 1..n by their first pixels."""
    ids, first = np.unique(labels, return_index=True)
    table = np.zeros(labels.max() + 1, np.int32)
    order = [i for i in ids[np.argsort(first)] if i]
    table[order] = np.arange(1, len(order) + 1)
    return table[labels]


def noisy(maps: dict[str, np.ndarray], spread: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Blurred maps with noise that is correlated over some pixels, as networks give."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, values in maps.items():
        noise = ndimage.gaussian_filter(rng.standard_normal(values.shape), (0, 1.5, 1.5))
        amount = spread * noise / noise.std()
        result[name] = (ndimage.gaussian_filter(values, (0, 1, 1)) + amount).astype(np.float32)
    return result


# Targets


def test_hv_targets_by_hand() -> None:
    labels = np.array([[0, 5, 5, 5, 0, 0], [0, 0, 0, 0, 0, 9]], np.int32)
    maps = HV().encode(labels)
    assert maps["nucleus"].shape == (1, 2, 6)
    assert maps["nucleus"][0].tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]
    # Channel 0 is horizontal, from left to right; one row high is at its own centre.
    assert maps["hv"][0].tolist() == [[0, -1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert not maps["hv"][1].any()


def test_hv_scales_each_side_by_its_own_extent() -> None:
    # Columns 0, 1, 1, 1: centre .75; the left side reaches .75, the right side .25.
    labels = np.array([[0, 3, 0], [3, 3, 0], [0, 3, 0]], np.int32)
    h, v = HV().encode(labels)["hv"]
    np.testing.assert_array_equal(h, [[0, 1, 0], [-1, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(v, [[0, -1, 0], [0, 0, 0], [0, 1, 0]])


def test_distance_targets_against_brute_force() -> None:
    labels = discs(64, pairs=4)
    maps = Distance().encode(labels)
    expected = np.zeros(labels.shape)
    for i in np.unique(labels)[1:]:
        gaps = cdist(np.argwhere(labels == i), np.argwhere(labels != i)).min(axis=1)
        expected[labels == i] = gaps / gaps.max()
    np.testing.assert_allclose(maps["distance"][0], expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_maps_fit_the_contract(name: str) -> None:
    method = build_instances(name)
    assert isinstance(method, InstanceMethod)
    maps = method.encode(discs(64, pairs=4))
    assert maps.keys() == method.maps.keys()
    for key, spec in method.maps.items():
        assert maps[key].shape == (spec.channels, 64, 64)
        assert maps[key].dtype == np.float32


# Round trip


@pytest.mark.parametrize("name", NAMES)
def test_touching_nuclei_come_back_exactly(name: str) -> None:
    labels = np.zeros((40, 60), np.int32)
    labels[10:30, 5:20] = 7
    labels[10:30, 20:40] = 3  # touches 7 along 20 px
    labels[30:40, 8:22] = 12  # touches both, cut by the border
    labels[0:6, 50:60] = 4  # in a corner
    method = build_instances(name)
    found = method.decode(method.encode(labels))
    assert found.dtype == np.int32
    # Pixels of a corner are as near to one nucleus as to the other.
    assert (found != in_raster_order(labels)).sum() <= (0 if name == "hv" else 4)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_of_discs(name: str) -> None:
    labels = discs()
    method = build_instances(name)
    score = panoptic_quality(labels, method.decode(method.encode(labels)))
    assert (score.fp, score.fn) == (0, 0)
    assert score.sq > 0.995


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder", ["consep", "dsb2018-he"])
def test_round_trip_of_real_labels(name: str, folder: str, real_data: Path) -> None:
    method = build_instances(name)
    sums = np.zeros(4)
    for file in sorted((real_data / folder / "labels").glob("*.npz"))[::5]:
        with np.load(file) as data:
            labels = data["inst"].astype(np.int32)
        score = panoptic_quality(labels, method.decode(method.encode(labels)))
        sums += [score.tp, score.fp, score.fn, score.sq * score.tp]
    assert pq_of_counts(sums) >= 0.97


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_numbered_in_raster_order(name: str) -> None:
    method = build_instances(name)
    found = method.decode(noisy(method.encode(discs()), 0.1))
    np.testing.assert_array_equal(found, in_raster_order(found))
    for i in range(1, found.max() + 1):
        assert ndimage.label(found == i)[1] == 1


# Limits


@pytest.mark.parametrize("name", NAMES)
def test_small_objects_go_and_holes_are_filled(name: str) -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[5:25, 5:25] = 1
    labels[30:33, 30:33] = 2  # 9 px
    labels[35:37, 5:10] = 3  # 10 px
    holed = labels.copy()
    holed[12:14, 12:15] = 0
    method = build_instances(name)
    found = method.decode(method.encode(holed))
    np.testing.assert_array_equal(found, np.where(labels == 3, 2, labels == 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (1, 1), (3, 50), (16, 16)])
def test_empty_images_have_no_cells(name: str, shape: tuple[int, int]) -> None:
    method = build_instances(name)
    found = method.decode(method.encode(np.zeros(shape, np.int32)))
    assert found.shape == shape
    assert not found.any()


@pytest.mark.parametrize("name", NAMES)
def test_one_nucleus_fills_the_image(name: str) -> None:
    method = build_instances(name)
    labels = np.full((12, 15), 4, np.int32)
    np.testing.assert_array_equal(method.decode(method.encode(labels)), labels // 4)


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_do_not_crash(name: str) -> None:
    method = build_instances(name)
    maps = method.encode(discs(64, pairs=4))
    for key in maps:
        maps[key][0, 5:20, 5:20] = np.nan
        maps[key][0, 30:40, 30:40] = np.inf
        maps[key][0, 50:60, 30:40] = -np.inf
    with np.errstate(invalid="ignore"):
        assert method.decode(maps).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_maps_need_not_be_contiguous(name: str) -> None:
    method = build_instances(name)
    maps = method.encode(discs(64, pairs=4))
    turned = {k: np.moveaxis(np.moveaxis(v, 0, -1).copy(), -1, 0) for k, v in maps.items()}
    np.testing.assert_array_equal(method.decode(turned), method.decode(maps))


@pytest.mark.parametrize("name", NAMES)
def test_maps_that_do_not_fit_are_refused(name: str) -> None:
    method = build_instances(name)
    maps = method.encode(discs(64, pairs=4))
    with pytest.raises(DataError, match=f"map '{name}' is missing"):
        method.decode({"nucleus": maps["nucleus"]})
    with pytest.raises(DataError, match=rf"map '{name}' must be \(., 64, 64\), got"):
        method.decode({**maps, name: maps[name][:, 1:]})
    with pytest.raises(DataError, match=r"map 'nucleus' must be \(1, H, W\), got \(64,\)"):
        method.decode({**maps, "nucleus": maps["nucleus"][0, 0]})


# Noise


@pytest.mark.parametrize("name", NAMES)
def test_noise_neither_splits_nor_merges(name: str) -> None:
    labels = discs(400, pairs=64)
    method = build_instances(name)
    score = panoptic_quality(labels, method.decode(noisy(method.encode(labels), 0.12)))
    n = len(np.unique(labels)) - 1
    assert score.fp <= 0.03 * n
    assert score.fn <= 0.03 * n
    assert score.pq > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_far_content_changes_nothing(name: str) -> None:
    method = build_instances(name)
    maps = noisy(method.encode(discs()), 0.1)
    near = method.decode({k: v[:, :, :100] for k, v in maps.items()})
    # An artefact far away: a tile-wide normalisation would hide every nucleus.
    wide = {k: np.concatenate([v, np.zeros_like(v)], axis=2) for k, v in maps.items()}
    for values in wide.values():
        values[:, 150:, 300:] = 50 * np.sign(np.sin(np.arange(100)))
    far = method.decode(wide)
    inside = np.setdiff1d(near, near[:, 90:])
    assert len(inside) > 5
    for i in inside[inside > 0]:
        other = far[:, :100][near == i]
        assert (other == other[0]).all()
        assert (far == other[0]).sum() == (near == i).sum()


# Flood


def run(mask: np.ndarray, energy: np.ndarray, **options: int) -> np.ndarray:
    given = {"depth": 10, "min_core": 1, "min_area": 1, "max_hole": 0, **options}
    guide = np.empty((0, *mask.shape), np.float32)
    return flood(mask, energy.astype(np.uint8), guide, **given)


def test_flood_parts_at_ridges_deep_enough() -> None:
    energy = np.array([[0, 5, 20, 15, 24, 0, 0]])
    mask = np.ones(energy.shape, bool)
    # Floors 0, 15, 0; the saddle at 20 is 5 above the shallower floor, that at 24 stands 24 high.
    assert run(mask, energy)[0].tolist() == [1, 1, 1, 1, 2, 2, 2]
    assert run(mask, energy, depth=25)[0].tolist() == [1] * 7
    assert run(mask, energy, min_core=3)[0].tolist() == [1] * 7


def test_flood_keeps_to_the_mask() -> None:
    mask = np.array([[1, 1, 0, 1], [0, 0, 1, 0]], bool)
    found = run(mask, np.zeros(mask.shape))
    # 4-connected: corners do not join.
    assert found.tolist() == [[1, 1, 0, 2], [0, 0, 3, 0]]


def test_guide_settles_ties() -> None:
    energy = np.array([[0, 50, 0]], np.uint8)
    mask = np.ones((1, 3), bool)
    for guide, owner in (([[0, 0.1, 1]], 1), ([[0, 0.9, 1]], 2)):
        found = flood(
            mask,
            energy,
            np.array([guide], np.float32),
            depth=10,
            min_core=1,
            min_area=1,
            max_hole=0,
        )
        assert found[0].tolist() == [1, owner, 2]


def test_holes_up_to_the_limit_inside_one_nucleus() -> None:
    mask = np.ones((12, 12), bool)
    mask[2:4, 2:4] = False  # 4 px
    mask[6:9, 2:7] = False  # 15 px
    mask[0:3, 8] = False  # open to the border
    full = mask.copy()
    full[2:4, 2:4] = True
    np.testing.assert_array_equal(run(mask, 0 * mask, max_hole=14), full)
    full[6:9, 2:7] = True
    np.testing.assert_array_equal(run(mask, 0 * mask, max_hole=15), full)
    np.testing.assert_array_equal(run(mask, 0 * mask, max_hole=0), mask)


def test_components_and_holes_agree_with_scipy() -> None:
    rng = np.random.default_rng(3)
    mask = ndimage.gaussian_filter(rng.standard_normal((150, 170)), 2) > -0.02
    expected = ndimage.label(mask)[0]
    found = run(mask, 0 * mask)
    np.testing.assert_array_equal(found, expected)
    one = expected == np.bincount(expected[expected > 0]).argmax()
    np.testing.assert_array_equal(
        run(one, 0 * one, max_hole=10**5) > 0, ndimage.binary_fill_holes(one)
    )


def test_smoothing_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).standard_normal((9, 13)).astype(np.float32)
    for radius in (0, 1, 3, 6):
        weights = binomial(radius)
        assert weights.sum() == pytest.approx(1)
        expected = ndimage.correlate1d(values, weights, 0, mode="nearest")
        expected = ndimage.correlate1d(expected, weights, 1, mode="nearest")
        np.testing.assert_allclose(smooth(values, radius), expected, atol=1e-5)


# Names


def test_options_are_the_fields() -> None:
    assert build_instances("hv", min_area=33) == HV(min_area=33)
    with pytest.raises(ConfigError, match=r"'min_arae'; did you mean 'min_area'.*depth"):
        build_instances("hv", min_arae=33)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown instance method 'hw'.*distance, hv"):
        build_instances("hw")


def test_a_class_of_your_own() -> None:
    assert build_instances("celltyper.instances.hv:HV", depth=0.2) == HV(depth=0.2)
    for name in ("no_such_module:HV", "celltyper.instances:Nothing"):
        with pytest.raises(ConfigError, match="cannot be imported"):
            build_instances(name)
    with pytest.raises(ConfigError, match="must have maps, encode and decode"):
        build_instances("celltyper.types:MapSpec", channels=1, activation="tanh", loss="hv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold"),
        ({"radius": -1}, "radius"),
        ({"depth": 0.0}, "depth"),
        ({"min_area": 0}, "min_area"),
        ({"max_hole": -1}, "max_hole"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_values_are_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_instances(name, **options)


def test_unsure_objects_are_removed() -> None:
    nucleus = np.zeros((1, 20, 40), np.float32)
    nucleus[0, 2:10, 2:10] = 0.9
    nucleus[0, 2:10, 16:24] = 0.6
    # half of it at .95, half at .55: a mean of .75
    nucleus[0, 2:10, 30:34], nucleus[0, 2:10, 34:38] = 0.95, 0.55
    maps = {"nucleus": nucleus, "hv": np.zeros((2, 20, 40), np.float32)}
    assert HV().decode(maps).max() == 3
    kept = HV(min_confidence=0.74).decode(maps)
    assert kept.dtype == np.int32
    assert np.unique(kept[2:10, 2:10]).tolist() == [1]
    assert np.unique(kept[2:10, 30:38]).tolist() == [2]
    assert kept[:, 12:28].max() == 0
    assert HV(min_confidence=0.76).decode(maps).max() == 1
    assert HV(min_confidence=1.0).decode(maps).max() == 0
