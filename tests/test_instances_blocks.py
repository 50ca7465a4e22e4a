"""Blocks of a slide: the cells of one decode of the whole, whatever the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from celltyper.errors import DataError
from celltyper.instances import HV, METHODS, Centers, Distance, build_instances
from celltyper.instances.blocks import AROUND, BlockCells, decode_block, read_margin
from celltyper.testing import check_instances
from celltyper.tiling import Region
from celltyper.types import InstanceMethod, Labels, Maps, MapSpec

EXACT = ["hv", "distance"]


class Slide:
    """Maps that are read by region, and what was read."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps
        self.shape = next(iter(maps.values())).shape[1:]
        self.reads: list[Region] = []

    def read(self, region: Region) -> dict[str, np.ndarray]:
        row, col, height, width = region
        assert row >= 0
        assert col >= 0
        assert height > 0
        assert width > 0
        assert row + height <= self.shape[0]
        assert col + width <= self.shape[1]
        self.reads.append(region)
        return {name: values[(slice(None), *region.slices)] for name, values in self.maps.items()}

    def cores(self, side: int) -> Iterator[Region]:
        height, width = self.shape
        for r in range(0, height, side):
            for c in range(0, width, side):
                yield Region(r, c, min(side, height - r), min(side, width - c))

    def decode(self, method: InstanceMethod, side: int, **options: int) -> Labels:
        """Cells of all blocks together, in raster order."""
        whole = np.zeros(self.shape, np.int32)
        last = 0
        for core in self.cores(side):
            labels, region = decode_block(method, self.read, core, self.shape, **options)
            assert labels.dtype == np.int32
            assert labels.shape == region[2:]
            n = labels.max(initial=0)
            np.testing.assert_array_equal(labels, in_raster_order(labels))
            if n:
                for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
                    assert edge.any(), "the region is larger than its cells"
            there = whole[region.slices]
            assert not there[labels > 0].any(), "a pixel belongs to two cells"
            there[labels > 0] = labels[labels > 0] + last
            last += n
        return in_raster_order(whole)


def in_raster_order(labels: np.ndarray) -> np.ndarray:
    """Labels renumbered 1..n by their first pixels."""
    ids, first = np.unique(labels, return_index=True)
    order = ids[np.argsort(first)]
    table = np.zeros(labels.max(initial=0) + 1, np.int32)
    table[order[order > 0]] = np.arange(1, np.count_nonzero(order) + 1)
    return table[labels]


def starting_in(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Labels whose first pixel lies in the mask."""
    ids, first = np.unique(labels, return_index=True)
    return np.where(np.isin(labels, ids[mask.flat[first]]), labels, 0)


def expected(method: InstanceMethod, maps: Maps, limit: int = 10**6) -> np.ndarray:
    """One decode of the whole; components larger than the limit from the squares of the grid."""
    components, _ = ndimage.label(maps["nucleus"][0] >= 0.5)
    giant = np.zeros(components.shape, bool)
    for i, (rows, cols) in enumerate(ndimage.find_objects(components), 1):
        if max(rows.stop - rows.start, cols.stop - cols.start) > limit:
            giant |= components == i
    found = starting_in(method.decode(maps), ~giant)
    for r in range(0, giant.shape[0], limit):
        for c in range(0, giant.shape[1], limit):
            at = np.s_[r : r + limit, c : c + limit]
            cells = method.decode({name: m[(slice(None), *at)] for name, m in maps.items()})
            cells = starting_in(cells, giant[at])
            found[at][cells > 0] = cells[cells > 0] + found.max()
    return in_raster_order(found)


def noisy(maps: Maps, spread: float, seed: int = 0, sigma: float = 1.5) -> dict[str, np.ndarray]:
    """Blurred maps with noise that is correlated over some pixels, as networks give."""
    random = np.random.default_rng(seed)
    result = {}
    for name, values in maps.items():
        noise = ndimage.gaussian_filter(random.standard_normal(values.shape), (0, sigma, sigma))
        blurred = ndimage.gaussian_filter(values, (0, 1, 1))
        result[name] = (blurred + spread / noise.std() * noise).astype(np.float32)
    return result


def random_maps(method: InstanceMethod, shape: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
    """Maps of no cells: foreground of any form over any values."""
    nothing = {k: np.zeros((s.channels, *shape), np.float32) for k, s in method.maps.items()}
    maps = noisy(nothing, 0.3, seed, sigma=2.0 + seed % 3)
    # 25 to 45 % foreground: below what percolates, so that sizes vary most
    maps["nucleus"] += 0.5 - np.quantile(maps["nucleus"], 0.75 - 0.05 * (seed % 5))
    return maps


def chain(labels: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> None:
    """Touching discs of radius 6 along a path."""
    for i, (r, c) in enumerate(zip(rows, cols, strict=True), labels.max() + 1):
        top, left = max(int(r) - 7, 0), max(int(c) - 7, 0)
        near = labels[top : top + 15, left : left + 15]
        y, x = np.indices(near.shape)
        near[((y + top - r) ** 2 + (x + left - c) ** 2 <= 36) & (near == 0)] = i


@cache
def tissue() -> np.ndarray:
    """A spiral, a U, a long chain, a dense heap, nuclei inside rings, specks; 401 x 350 px."""
    labels = np.zeros((401, 350), np.int32)
    turn = np.sqrt(np.arange(4, 200, 1.4)) * 2.1
    chain(labels, 100 + 4.4 * turn * np.sin(turn), 110 + 4.4 * turn * np.cos(turn))
    side = np.arange(30, 190, 10.0)
    base = np.arange(250, 340, 10.0)
    # The right arm is higher: the first pixel is far from most of the rest.
    u_rows = np.concatenate([side[4:], np.full(len(base), 190.0), side[::-1]])
    u_cols = np.concatenate([np.full(len(side) - 4, 250.0), base, np.full(len(side), 340.0)])
    chain(labels, u_rows, u_cols)
    steps = np.arange(0, 350, 10.5)
    chain(labels, 235 + 6 * np.sin(steps / 20), steps)
    random = np.random.default_rng(5)
    chain(labels, random.uniform(265, 400, 150), random.uniform(0, 150, 150))
    y, x = np.indices(labels.shape)
    for r, c in ((300, 200), (340, 260), (380, 310)):
        away = np.hypot(y - r, x - c)
        for k, ring in enumerate((away <= 3, (away > 9) & (away < 15), (away > 19) & (away < 24))):
            labels[ring] = labels.max() + 1 + k
    labels[265:395:13, 172] = labels.max() + 1
    return in_raster_order(labels)


def cases(method: InstanceMethod) -> dict[str, Callable[[], dict[str, np.ndarray]]]:
    return {
        "tissue": lambda: noisy(method.encode(tissue()), 0.12),
        "ragged tissue": lambda: noisy(method.encode(tissue()), 0.35, seed=1),
        **{f"random {s}": lambda s=s: random_maps(method, (151, 203), s) for s in range(6)},
    }


CASES = [(name, case) for name in EXACT for case in cases(build_instances(name))]


# Exact methods


@pytest.mark.parametrize(("name", "case"), CASES)
def test_blocks_give_the_cells_of_the_whole(name: str, case: str) -> None:
    method = build_instances(name)
    maps = cases(method)[case]()
    whole = method.decode(maps)
    assert whole.max() > 30
    for side, halo in ((64, 64), (100, 1), (333, 20), (1000, 64), (50, 8)):
        np.testing.assert_array_equal(Slide(maps).decode(method, side, halo=halo), whole)


def test_made_tissue_has_components_larger_than_a_block_and_its_halo() -> None:
    # What the test above claims to show.
    mask = noisy(HV().encode(tissue()), 0.12)["nucleus"][0] >= 0.5
    boxes = ndimage.find_objects(ndimage.label(mask)[0])
    extents = [max(r.stop - r.start, c.stop - c.start) for r, c in boxes]
    assert sum(e > 64 + 64 for e in extents) >= 4
    assert max(extents) > 300


@pytest.mark.parametrize(
    "method",
    [
        HV(radius=0, min_area=1, min_core=1, max_hole=0),
        HV(radius=7, max_hole=2000, min_area=40, min_confidence=0.75),
        Distance(radius=0, max_hole=500),
        Distance(radius=9, min_area=50, min_core=1),
    ],
)
def test_options_do_not_matter(method: InstanceMethod) -> None:
    for maps in (noisy(method.encode(tissue()), 0.3), random_maps(method, (151, 203), 3)):
        whole = method.decode(maps)
        for side in (37, 100):
            np.testing.assert_array_equal(Slide(maps).decode(method, side, halo=3), whole)


class Shy:
    """Components are cells where no mark is within reach: every pixel of it counts in full."""

    reach = 7

    @property
    def maps(self) -> Mapping[str, MapSpec]:
        return {name: MapSpec(1, "sigmoid", "mse") for name in ("nucleus", "mark")}

    def encode(self, labels: Labels) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def foreground(self, maps: Maps) -> np.ndarray:
        return maps["nucleus"][0] >= 0.5

    def decode(self, maps: Maps) -> Labels:
        marks = ndimage.maximum_filter(maps["mark"][0], 2 * self.reach + 1, mode="constant")
        components, n = ndimage.label(self.foreground(maps))
        shy = ndimage.maximum(marks, components, range(n + 1)) > 0.5
        return np.where(shy, 0, range(n + 1)).astype(np.int32)[components]


def test_all_of_the_reach_is_seen() -> None:
    method = Shy()
    random = np.random.default_rng(2)
    for _ in range(6):
        # Bars of all lengths up to the limit, of which marks away from them take some.
        mask = np.zeros((170, 190), bool)
        for c in range(2, 188, 3):
            start, length = random.integers(0, 120), random.integers(5, 61)
            mask[start : start + length, c] = True
        marks = random.random(mask.shape) < 0.0015
        maps = {"nucleus": mask[None].astype(np.float32), "mark": marks[None].astype(np.float32)}
        whole = in_raster_order(method.decode(maps))
        assert 10 < whole.max() < 55
        for side, halo in ((20, 1), (50, 30), (64, 64)):
            found = Slide(maps).decode(method, side, halo=halo, limit=60)
            np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("levels", ["uint8", "float16"])
def test_quantised_maps(levels: str) -> None:
    method = HV()
    maps = noisy(method.encode(tissue()), 0.2)
    if levels == "uint8":
        nucleus = np.round(255 * np.clip(maps["nucleus"], 0, 1)).astype(np.uint8)
        maps = {"nucleus": nucleus.astype(np.float32) / 255, "hv": maps["hv"].astype(np.float16)}
    else:
        maps = {key: values.astype(np.float16) for key, values in maps.items()}
    whole = method.decode(maps)
    for side in (64, 200):
        np.testing.assert_array_equal(Slide(maps).decode(method, side), whole)


@pytest.mark.parametrize("name", EXACT)
def test_real_labels(name: str, real_data: Path) -> None:
    with np.load(sorted((real_data / "consep" / "labels").glob("*.npz"))[0]) as data:
        labels = data["inst"].astype(np.int32)
    method = build_instances(name)
    maps = noisy(method.encode(labels), 0.15)
    whole = method.decode(maps)
    assert whole.max() > 100
    for side in (100, 256, 333, 999):
        np.testing.assert_array_equal(Slide(maps).decode(method, side), whole)


# By hand


def flat(mask: np.ndarray) -> dict[str, np.ndarray]:
    """Maps in which every component is one cell."""
    shape = mask.shape
    return {"nucleus": mask[None].astype(np.float32), "hv": np.zeros((2, *shape), np.float32)}


def test_a_cell_belongs_to_the_block_that_holds_its_first_pixel() -> None:
    mask = np.zeros((60, 60), bool)
    mask[10:50, 8:12] = True
    mask[46:50, 8:52] = True
    mask[5:50, 48:52] = True  # A U: it starts in its right arm, at (5, 48).
    slide = Slide(flat(mask))
    for core in slide.cores(20):
        labels, region = decode_block(HV(), slide.read, core, slide.shape, halo=1)
        if (core.row, core.col) == (0, 40):
            assert region == Region(5, 8, 45, 44)
            np.testing.assert_array_equal(labels, mask[5:50, 8:52])
        else:
            assert labels.shape == (0, 0)
            assert region == Region(core.row, core.col, 0, 0)


def test_components_inside_a_hole_of_another() -> None:
    mask = np.zeros((50, 50), bool)
    mask[5:45, 5:45] = True
    mask[8:12, 8:12] = False
    mask[9:11, 9:11] = True  # 4 px, too small: filled with its hole of 16 px
    mask[20:40, 20:40] = False
    mask[24:36, 24:36] = True  # a nucleus; the gap around it is no hole
    whole = np.zeros(mask.shape, np.int32)
    whole[5:45, 5:45] = 1
    whole[20:40, 20:40] = 0
    whole[24:36, 24:36] = 2
    for side in (7, 10, 30):
        np.testing.assert_array_equal(Slide(flat(mask)).decode(HV(), side, halo=2), whole)
    # Inside a giant too.
    parts = Slide(flat(mask)).decode(HV(), 7, halo=2, limit=25)
    np.testing.assert_array_equal(parts, Slide(flat(mask)).decode(HV(), 30, limit=25))
    assert len(np.unique(parts[24:36, 24:36])) == 1
    assert (parts > 0).sum() == (whole > 0).sum()


def test_corners_do_not_join() -> None:
    mask = np.zeros((20, 20), bool)
    mask[4:10, 4:10] = mask[10:16, 10:16] = True
    assert Slide(flat(mask)).decode(HV(), 10).max() == 2


# What is read


def test_one_read_where_nothing_goes_on() -> None:
    mask = np.zeros((300, 300), bool)
    mask[98:110, 98:110] = True
    mask[0:12, 0:12] = True  # at the border of the slide, where nothing goes on
    slide = Slide(flat(mask))
    cells = decode_block(HV(), slide.read, Region(0, 0, 100, 100), slide.shape, halo=20)
    assert cells.region == Region(0, 0, 110, 110)
    assert cells.labels.max() == 2
    assert slide.reads == [Region(0, 0, 123, 123)]


def test_blocks_without_foreground() -> None:
    slide = Slide(flat(np.zeros((90, 70), bool)))
    assert not slide.decode(HV(), 40).any()
    assert len(slide.reads) == 6
    # Foreground beyond the core alone is no reason to decode.
    slide.maps["nucleus"][0, 50:60, 50:60] = 1
    core = Region(0, 0, 40, 40)
    assert decode_block(NeverDecodes(), slide.read, core, slide.shape).labels.size == 0


class NeverDecodes(HV):
    def decode(self, maps: Maps) -> Labels:
        raise AssertionError("decoded in vain")


@pytest.mark.parametrize("name", [*METHODS, "bare"])
def test_reads_are_bounded(name: str) -> None:
    method = Bare(HV()) if name == "bare" else build_instances(name)
    maps = {k: np.ones((s.channels, 700, 900), np.float32) for k, s in method.maps.items()}
    slide = Slide(maps)
    for core in (Region(350, 350, 50, 50), Region(351, 399, 1, 1), Region(399, 351, 1, 1)):
        slide.reads.clear()
        decode_block(method, slide.read, core, slide.shape, halo=16, limit=50)
        around = getattr(method, "reach", AROUND)
        assert max(max(read[2:]) for read in slide.reads) <= 50 + 2 * (50 + around)
        assert len(slide.reads) <= 6
        margin = read_margin(method, 50)
        for read in slide.reads:
            assert read.row >= core.row - margin
            assert read.col >= core.col - margin
            assert read.row + read.height <= core.row + core.height + margin
            assert read.col + read.width <= core.col + core.width + margin


# Components without end


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("limit", [5, 23, 48, 64])
def test_giant_components_are_cut_along_the_grid(name: str, limit: int) -> None:
    method = build_instances(name, min_area=4)
    shape = (151, 203) if limit > 5 else (31, 43)
    for seed in range(3):
        maps = random_maps(method, shape, seed)
        right = expected(method, maps, limit)
        for side, halo in ((25, 5), (50, 64), (75, 1), (1000, 64)):
            found = Slide(maps).decode(method, side, halo=halo, limit=limit)
            np.testing.assert_array_equal(found, right)


def test_limit_is_the_largest_extent_that_is_whole() -> None:
    mask = np.zeros((40, 200), bool)
    mask[10:20, 13:73] = True  # 60 px wide
    for side in (16, 30, 200):
        whole = Slide(flat(mask)).decode(HV(), side, halo=1, limit=60)
        assert whole.max() == 1
        cut = Slide(flat(mask)).decode(HV(), side, halo=1, limit=59)
        np.testing.assert_array_equal(cut[10:20, 13:59], 1)
        np.testing.assert_array_equal(cut[10:20, 59:73], 2)
    # At the border of the slide as elsewhere.
    mask = np.zeros((61, 80), bool)
    mask[:60, :20] = True
    for side in (16, 80):
        assert Slide(flat(mask)).decode(HV(), side, halo=1, limit=60).max() == 1
        # The last row falls to the next square.
        cut = Slide(flat(mask)).decode(HV(), side, halo=1, limit=59)
        assert (cut[:59, :20] == 1).all()
        assert (cut[59, :20] == 2).all()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_foreground_everywhere_is_neither_lost_nor_shared(name: str) -> None:
    method = build_instances(name, min_area=1)
    maps = random_maps(method, (130, 170), 0)
    maps["nucleus"][:] = 0.8
    ref = Slide(maps).decode(method, 1000, limit=40)
    assert ref.min() > 0
    assert ref.max() > 10
    np.testing.assert_array_equal(ref, expected(method, maps, 40))
    for side in (13, 40, 64, 129):
        np.testing.assert_array_equal(Slide(maps).decode(method, side, limit=40), ref)


# Methods that promise less


class Bare:
    """A method of a user: nothing but what every method has."""

    def __init__(self, method: InstanceMethod) -> None:
        self._method = method

    @property
    def maps(self) -> Mapping[str, MapSpec]:
        return self._method.maps

    def encode(self, labels: Labels) -> dict[str, np.ndarray]:
        return self._method.encode(labels)

    def decode(self, maps: Maps) -> Labels:
        return 3 * self._method.decode(maps)  # ids need not be contiguous


class Masked(Bare):
    def foreground(self, maps: Maps) -> np.ndarray:
        return maps["nucleus"][0] >= 0.5


@pytest.mark.parametrize("method", [Centers(), Bare(HV()), Masked(HV())])
def test_other_methods_do_not_depend_on_blocks_either(method: InstanceMethod) -> None:
    maps = noisy(method.encode(tissue()), 0.25)
    whole = in_raster_order(method.decode(maps))
    ref = Slide(maps).decode(method, 1000, limit=150)
    for side in (100, 150):
        np.testing.assert_array_equal(Slide(maps).decode(method, side, limit=150), ref)
    # And hardly on the squares: few cells are in giants, which are cut, or see far.
    np.testing.assert_array_equal(Slide(maps).decode(method, 200, limit=1000), whole)
    ids = np.unique(ref[ref > 0])
    same = [i for i in ids if len(np.unique(whole[ref == i])) == 1 and whole[ref == i][0]]
    assert len(same) > 0.9 * len(ids)


def test_components_are_whole_without_reach() -> None:
    # Squares of 150 px, and components up to 150 px across several of them.
    method = Masked(HV())
    maps = noisy(method.encode(tissue()), 0.12)
    np.testing.assert_array_equal(
        Slide(maps).decode(method, 100, limit=150), expected(HV(), maps, 150)
    )


def test_cells_apart_are_whole_without_foreground() -> None:
    mask = np.zeros((200, 330), bool)
    for r in range(3, 180, 23):
        for c in range(1, 310, 19):
            mask[r : r + 14, c : c + 12] = True
    right = ndimage.label(mask)[0]
    for side in (50, 64, 331):
        found = Slide(flat(mask)).decode(Bare(HV()), side, limit=64)
        np.testing.assert_array_equal(found, right)


# What is refused


def test_arguments_that_do_not_fit_are_refused() -> None:
    slide = Slide(flat(np.ones((50, 50), bool)))

    def run(core: Region, **options: int) -> BlockCells:
        return decode_block(HV(), slide.read, core, slide.shape, **options)

    for core in (Region(-1, 0, 10, 10), Region(0, 45, 10, 10), Region(45, 0, 10, 10)):
        with pytest.raises(ValueError, match="must be inside the slide"):
            run(core)
    for options in ({"halo": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            run(Region(0, 0, 10, 10), **options)
    with pytest.raises(DataError, match="was read, but the maps give a foreground of"):
        decode_block(HV(), lambda region: slide.maps, Region(0, 0, 10, 10), (500, 500))


class ShortReach(Distance):
    reach = 1


class TooHigh(Bare):
    def foreground(self, maps: Maps) -> np.ndarray:
        return maps["nucleus"][0] >= 0.8


class NotBool(Bare):
    def foreground(self, maps: Maps) -> np.ndarray:
        return maps["nucleus"][0]


class Merging(Masked):
    def decode(self, maps: Maps) -> Labels:
        labels = super().decode(maps)
        labels[labels == labels.max()] = 3 if labels.max() > 30 else labels.max()
        return labels


class ReachAlone(Bare):
    reach = 3


def test_check_instances_sees_what_blocks_rely_on() -> None:
    for name in METHODS:
        check_instances(build_instances(name))
    check_instances(HV(radius=5, max_hole=1000, min_confidence=0.6))
    for method, message in (
        (ShortReach(), r"further than reach \(1 px\)"),
        (TooHigh(HV()), "starts outside of foreground"),
        (Merging(HV()), "leaves its component of foreground"),
        (NotBool(HV()), "instead of .* bool"),
        (ReachAlone(HV()), "reach, but no foreground"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_instances(method)
