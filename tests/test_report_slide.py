"""The pages of a slide and of many: numbers against hand-counted cells, maps against numpy."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import tracemalloc
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from scipy import ndimage
from skimage.color import rgb2lab

from celltyper.errors import DataError
from celltyper.report.amounts import amount, duration, length, percent
from celltyper.report.cohort import cohort_table, write_cohort_csv, write_cohort_report
from celltyper.report.density import (
    Cells,
    View,
    densities,
    read_batches,
    tally,
    tissue_in,
    tissue_view,
    whole_view,
)
from celltyper.report.heat import classes_png, contour_path, heat_png, palette
from celltyper.report.slide import write_slide_report
from celltyper.slides import Slide, TissueMask, region_mask, whole_slide
from celltyper.slides.source import Tile
from celltyper.tiling import Region

CLASSES = ("tumour & <b>cell</b>", 'lympho"cyte', "dead")
COLORS = ("#d55e00", "#0072b2", "#f0e442")
WIDTH, HEIGHT = 1600, 1200
LONGEST = 250
STEP = 6.4
"""Pixels of the slide in one of the page."""


@pytest.fixture(scope="module", autouse=True)
def small_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("celltyper.report.density.LONGEST", LONGEST)
        yield


class Plain:
    """A slide of one color; nothing but `Source` asks for."""

    path, format, magnification, icc = "/made/a 'slide' <1>.svs", "made", 20.0, None

    def __init__(
        self, mpp: tuple[float, float] | None = (2.0, 2.0), size: tuple[int, int] = (WIDTH, HEIGHT)
    ) -> None:
        self.mpp, self.sizes, self.tiles = mpp, (size,), ((256, 256),)
        self.bounds = Region(0, 0, size[1], size[0])

    def tile(self, level: int, row: int, col: int) -> Tile:
        width, height = self.sizes[0]
        shape = min(256, height - 256 * row), min(256, width - 256 * col), 3
        return Tile(np.full(shape, 200, np.uint8))

    def close(self) -> None:
        pass


def made_cells(n: int, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Cells:
    rng = np.random.default_rng(seed)
    return Cells(
        rng.uniform(0, size[0], n),
        rng.uniform(0, size[1], n),
        rng.integers(0, 3, n),
        rng.uniform(0.3, 1, n).astype(np.float32),
        rng.lognormal(3.5, 0.5, n),
    )


def parquet(path: Path, cells: Cells, names: tuple[str, ...] = CLASSES, rows: int = 700) -> Path:
    """A table of cells as inference writes it, without what the page does not read."""
    table = pa.table(
        {
            "x": cells.x,
            "y": cells.y,
            "phenotype": pa.DictionaryArray.from_arrays(cells.phenotype.astype(np.int32), names),
            "probability": cells.probability.astype(np.float32),
            "area_um2": cells.area_um2,
        }
    )
    pq.write_table(table, path, row_group_size=rows)
    return path


def facts_of(slide: Slide, mask: TissueMask, cells: int, **changes: Any) -> dict[str, Any]:
    x, y = slide.mpp or (math.nan, math.nan)
    return {
        "name": slide.name,
        "path": slide.path,
        "format": slide.format,
        "width": slide.size[0],
        "height": slide.size[1],
        "mpp": None if slide.mpp is None else [x, y],
        "model_mpp": 0.5,
        "magnification": slide.magnification,
        "bounds": list(slide.bounds),
        "classes": list(CLASSES),
        "colors": list(COLORS),
        "tissue": {
            "source": mask.source,
            "area_mm2": None if slide.mpp is None else mask.pixels * x * y / 1e6,
            "threshold": None,
        },
        "cells": cells,
        "counts": {},
        "damaged": [],
        "tiles": 30,
        "seconds": 75.0,
        "settings": {"block": 4096},
        "warnings": [],
        "celltyper": "1.2.3",
        "model": "/runs/<mine>",
    } | changes


class Page(HTMLParser):
    """Text, table rows and elements of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text = ""
        self.rows: list[list[str]] = []
        self.keys: list[list[str]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        if tag == "tr":
            self.rows.append([])
            self.keys.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.keys[-1].append(found.get("data-key", ""))
        if tag in ("th", "td", "script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td", "script", "style"):
            self._open.pop()

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        if where not in ("script", "style"):
            self.text += data
        if where in ("th", "td"):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """Other cells of the first row of that name."""
        return next(row[1:] for row in self.rows if row and row[0] == name)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        wanted = {name.rstrip("_"): value for name, value in wanted.items()}
        return [
            found
            for name, found in self.elements
            if name == tag and all(found.get(key) == value for key, value in wanted.items())
        ]


def page_of(
    folder: Path, cells: Cells, slide: Slide, mask: TissueMask | None = None, **changes: Any
) -> Page:
    tissue = mask or whole_slide(slide)
    facts = facts_of(slide, tissue, len(cells.x), **changes)
    table = parquet(folder / "cells.parquet", cells)
    path = folder / "report.html"
    write_slide_report(path, slide=slide, tissue=tissue, cells=table, facts=facts)
    return Page(path)


def picture(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.split(",", 1)[1])
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGBA"))


# ---- amounts


def test_amounts_have_three_digits_that_count() -> None:
    assert [amount(v) for v in (0.0996, 9.996, 99.96, 999.6, 1234567.2, 0.00123)] == [
        "0.0996",
        "10.0",
        "100",
        "1,000",
        "1,234,567",
        "0.00123",
    ]
    assert [amount(0.0), amount(None), amount(math.nan)] == ["0", "–", "–"]  # noqa: RUF001


def test_shares_never_read_as_nothing_or_all_unless_they_are() -> None:
    shares = (0.0, 1e-9, 0.0005, 0.5, 0.9994, 0.99999, 1.0)
    assert [percent(share) for share in shares] == [
        "0 %",
        "< 0.1 %",
        "0.1 %",
        "50.0 %",
        "99.9 %",
        "> 99.9 %",
        "100 %",
    ]


def test_times_and_lengths() -> None:
    times = [duration(s) for s in (4.04, 59.97, 119.6, 3599.6, 5400)]
    assert times == ["4.0 s", "1 min 0 s", "2 min 0 s", "1 h 0 min", "1 h 30 min"]
    assert [length(500.0), length(5000.0), length(5000.0, False)] == ["500 µm", "5 mm", "5,000 px"]


# ---- views


def test_a_view_is_square_on_the_glass_whatever_the_scanner_did() -> None:
    with Slide(Plain((0.5, 1.0), (4000, 1000))) as slide:
        view = whole_view(slide)
        # 2000 x 1000 micrometres
        assert view.shape == (125, 250)
        assert view.mpp == (8.0, 8.0)
        assert view.read(slide).shape == (125, 250, 3)
        x, y = view.centers()
    # a pixel of the view is 16 x 8 pixels of the slide
    assert (x[:2].tolist(), len(x)) == ([8.0, 24.0], 250)
    assert (y[:2].tolist(), len(y)) == ([4.0, 12.0], 125)
    assert view.rectangle(Region(40, 160, 80, 1600)) == (10.0, 5.0, 100.0, 10.0)


def test_a_slide_smaller_than_a_view_is_not_enlarged() -> None:
    with Slide(Plain((2.0, 2.0), (200, 100))) as slide:
        assert whole_view(slide).shape == (100, 200)


def test_maps_show_the_tissue_where_it_is_a_small_part() -> None:
    with Slide(Plain((0.25, 0.25), (40000, 20000))) as slide:
        small = region_mask(Region(5000, 30000, 2000, 2000), slide)
        view = tissue_view(slide, small)
        assert tissue_view(slide, region_mask(Region(0, 0, 20000, 30000), slide)) == whole_view(
            slide
        )
        nothing = TissueMask(np.zeros((20, 40), bool), (1000.0, 1000.0), "otsu")
        assert tissue_view(slide, nothing) == whole_view(slide)
    # the rectangle and 40 px (2 %) around it, as long as a view
    x, y, width, height = view.rectangle(Region(4960, 29960, 2080, 2080))
    assert abs(x) < 1
    assert abs(y) < 1
    assert abs(width - LONGEST) < 2
    assert abs(height - LONGEST) < 2


def test_the_tissue_of_a_mask_is_found_in_its_corner() -> None:
    grid = np.zeros((20, 40), bool)
    grid[15:18, 30:39] = True
    tissue = TissueMask(grid, (1000.0, 1000.0), "otsu")
    with Slide(Plain((0.25, 0.25), (40000, 20000))) as slide:
        view = tissue_view(slide, tissue)
    inside = tissue_in(tissue, view)
    x, y, width, height = view.rectangle(Region(15000, 30000, 3000, 9000))
    rows, cols = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert np.allclose([cols[0], rows[0]], [x, y], atol=1)
    assert np.allclose([np.ptp(cols) + 1, np.ptp(rows) + 1], [width, height], atol=1)
    assert inside.sum() == (np.ptp(cols) + 1) * (np.ptp(rows) + 1)


# ---- counting


def batches(cells: Cells, size: int) -> Iterator[Cells]:
    for start in range(0, len(cells.x), size):
        yield Cells(*(column[start : start + size] for column in cells))


def test_counts_are_those_of_numpy(tmp_path: Path) -> None:
    cells = made_cells(5000)
    cells.area_um2[::10] = np.nan
    with Slide(Plain()) as slide:
        tissue = region_mask(Region(100, 200, 1000, 1300), slide)
        view = tissue_view(slide, tissue)
    assert view == whole_view(slide)
    found = tally(read_batches(parquet(tmp_path / "c.parquet", cells), CLASSES), 3, view, tissue)
    rows, cols = view.shape
    assert (rows, cols) == (188, 250)
    edges = np.arange(rows + 1) * STEP, np.arange(cols + 1) * STEP
    for k in range(3):
        mine = cells.phenotype == k
        expected, _, _ = np.histogram2d(cells.y[mine], cells.x[mine], edges)
        np.testing.assert_array_equal(found.counts[k], expected)
        assert found.cells[k] == mine.sum()
        assert found.probability_sum[k] == pytest.approx(cells.probability[mine].sum(), rel=1e-5)
        median = float(np.nanmedian(cells.area_um2[mine]))
        assert found.median_area(slice(k, k + 1)) == pytest.approx(median, rel=1e-3)
    assert found.median_area(slice(None)) == pytest.approx(np.nanmedian(cells.area_um2), rel=1e-3)
    x, y = cells.x, cells.y
    assert found.outside == 5000 - ((x > 200) & (x < 1500) & (y > 100) & (y < 1100)).sum()


def test_the_median_of_two_is_between_them_and_of_none_unknown() -> None:
    with Slide(Plain()) as slide:
        view, tissue = whole_view(slide), whole_slide(slide)
    two = Cells(*np.array([[5.0, 6.0], [5.0, 6.0]]), np.zeros(2, int), np.ones(2), np.r_[10.0, 90])
    found = tally([two], 2, view, tissue)
    assert found.median_area(slice(0, 1)) == pytest.approx(50, rel=1e-3)
    assert math.isnan(found.median_area(slice(1, 2)))


def test_cells_in_a_part_of_the_slide_are_counted_in_its_pixels() -> None:
    with Slide(Plain((0.25, 0.25), (40000, 20000))) as slide:
        tissue = region_mask(Region(5000, 30000, 2000, 2000), slide)
        view = tissue_view(slide, tissue)
    at = np.array([[31000.0, 6000.0], [100.0, 100.0], [31000.0, 6000.0]])
    cells = Cells(at[:, 0], at[:, 1], np.array([1, 1, 0]), np.ones(3), np.ones(3))
    found = tally([cells], 2, view, tissue)
    row, col = (int(6000 / view.grid.scale_y - view.region.row), 0)
    col = int(31000 / view.grid.scale_x - view.region.col)
    assert np.argwhere(found.counts).tolist() == [[0, row, col], [1, row, col]]
    assert found.cells.tolist() == [1, 2]
    assert found.outside == 1


def test_memory_does_not_grow_with_the_cells() -> None:
    with Slide(Plain()) as slide:
        view, tissue = whole_view(slide), whole_slide(slide)
    cells = made_cells(20000)

    def peak(times: int) -> int:
        tracemalloc.start()
        tally((cells for _ in range(times)), 3, view, tissue)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    assert peak(20) < 1.1 * peak(2)


def test_tables_of_other_writers_and_dictionaries_of_every_part(tmp_path: Path) -> None:
    cells = made_cells(60)
    names = ("dead", CLASSES[0], CLASSES[1])
    reordered = cells._replace(phenotype=np.array([1, 2, 0])[cells.phenotype])
    table = pq.read_table(parquet(tmp_path / "a.parquet", reordered, names, rows=7))
    plain = table.set_column(2, "phenotype", table["phenotype"].cast(pa.string()))
    pq.write_table(plain, tmp_path / "b.parquet")
    for name in "ab":
        read = list(read_batches(tmp_path / f"{name}.parquet", CLASSES))
        np.testing.assert_array_equal(np.concatenate([b.phenotype for b in read]), cells.phenotype)


def test_cells_that_are_not_the_slides_are_refused(tmp_path: Path) -> None:
    cells = made_cells(5)
    parquet(tmp_path / "a.parquet", cells, ("dead", "stroma", "glia"))
    with pytest.raises(DataError, match=r"a\.parquet: cells of phenotype glia, stroma, but"):
        list(read_batches(tmp_path / "a.parquet", CLASSES))
    with pytest.raises(DataError, match="no such file"):
        list(read_batches(tmp_path / "none.parquet", CLASSES))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"cannot read cells from .*bad\.parquet"):
        list(read_batches(tmp_path / "bad.parquet", CLASSES))
    pq.write_table(pa.table({"x": [1.0]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="no column y, phenotype, probability, area_um2"):
        list(read_batches(tmp_path / "c.parquet", CLASSES))
    with Slide(Plain()) as slide:
        view, tissue = whole_view(slide), whole_slide(slide)
        for x, y in ((WIDTH + 5.0, 3.0), (3.0, -1.0), (math.nan, 3.0)):
            one = Cells(np.r_[x], np.r_[y], np.zeros(1, int), np.ones(1), np.ones(1))
            with pytest.raises(DataError, match="not on the slide"):
                tally([one], 1, view, tissue)
        with pytest.raises(DataError, match=r"5 cells in the table, 4 by slide\.json"):
            write_slide_report(
                tmp_path / "r.html",
                slide=slide,
                tissue=tissue,
                cells=[cells],
                facts=facts_of(slide, tissue, 4),
            )
    assert not (tmp_path / "r.html").exists()


# ---- densities


def made_view(shape: tuple[int, int], mpp: tuple[float, float]) -> View:
    with Slide(Plain(mpp, shape[::-1])) as slide:
        return whole_view(slide)


def test_even_cells_have_the_same_density_up_to_the_rim() -> None:
    view = made_view((80, 100), (20.0, 20.0))
    inside = np.zeros(view.shape, bool)
    inside[10:70, 30:100] = True
    (found,) = densities(np.full((1, *view.shape), 3, np.uint32), inside, view)
    # three cells in every 400 square micrometres
    np.testing.assert_allclose(found[inside], 3 / 400e-6, rtol=1e-5)
    assert np.isnan(found[~inside]).all()


@pytest.mark.parametrize(
    ("shape", "mpp", "sigma", "right_to"),
    [
        ((120, 150), 10.0, 5, 1e-4),  # at every pixel
        ((200, 240), 2.0, 8, 1e-4),
        ((300, 735), 2.0, 24.5, 2e-3),  # at every third pixel, and at the last
    ],
)
def test_densities_are_those_of_a_gaussian_window(
    shape: tuple[int, int],
    mpp: float,
    sigma: float,
    right_to: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("celltyper.report.density.LONGEST", max(shape))
    view = made_view(shape, (mpp, mpp))
    rng = np.random.default_rng(0)
    inside = rng.random(view.shape) < 0.8
    counts = rng.poisson(0.3, (2, *view.shape)).astype(np.uint32)
    # a thirtieth of the longer side, below `BANDWIDTH`
    assert view.bandwidth / mpp == pytest.approx(sigma)

    def smooth(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(
            values.astype(float), sigma, mode="constant", radius=int(4 * sigma)
        )

    area = smooth(inside) * mpp**2 / 1e6
    for of_class, found in zip(counts, densities(counts, inside, view), strict=True):
        expected = smooth(of_class * inside) / area
        np.testing.assert_allclose(found[inside], expected[inside], rtol=right_to)


def test_one_cell_has_the_peak_of_its_window() -> None:
    view = made_view((200, 240), (16.0, 16.0))
    counts = np.zeros((1, *view.shape), np.uint32)
    counts[0, 100, 150] = 1
    (found,) = densities(counts, np.ones(view.shape, bool), view)
    assert view.bandwidth == 100
    assert np.unravel_index(found.argmax(), found.shape) == (100, 150)
    assert found.max() == pytest.approx(1 / (2 * math.pi * 0.1**2), rel=1e-2)


# ---- pictures


def test_the_color_map_gets_darker_in_even_steps() -> None:
    lightness = rgb2lab(palette() / 255)[:, 0]
    steps = np.diff(lightness[::16])
    assert (steps < 0).all()
    assert steps.max() - steps.min() < 0.35 * abs(steps.mean()) + 2


def test_a_map_is_clear_outside_and_dark_where_there_is_much() -> None:
    values = np.array([[np.nan, 0.0], [50.0, 250.0]], np.float32)
    found = picture(heat_png(values, 100.0))
    assert found[0, 0, 3] == 0
    assert found[0, 1].tolist() == [*palette()[0], 255]
    assert found[1, 0].tolist() == [*palette()[127], 255]
    assert found[1, 1].tolist() == [*palette()[-1], 255]


def test_classes_have_their_colors() -> None:
    found = picture(classes_png(np.array([[0, 1, 2]], np.uint8), COLORS))
    assert found[0, 0, 3] == 0
    assert found[0, 1:].tolist() == [[0xD5, 0x5E, 0x00, 255], [0x00, 0x72, 0xB2, 255]]


def test_the_outline_of_a_mask_goes_round_it() -> None:
    inside = np.zeros((30, 40), bool)
    inside[5:25, 10:30] = True
    inside[12:18, 15:25] = False
    rings = [
        shapely.Polygon([tuple(map(float, p.split())) for p in ring.split("L")])
        for ring in contour_path(inside, 0.5).strip("Mz").split("zM")
    ]
    outer, inner = sorted(rings, key=lambda ring: -ring.area)
    assert outer.hausdorff_distance(shapely.box(10, 5, 30, 25)) < 1
    assert inner.hausdorff_distance(shapely.box(15, 12, 25, 18)) < 1
    assert contour_path(np.zeros((3, 3), bool), 0.5) == ""


# ---- the page of a slide


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """2000 cells of the first class left, 500 of the second right, on 3.2 x 2.4 mm."""
    rng = np.random.default_rng(0)
    x = np.r_[rng.uniform(100, 500, 2000), rng.uniform(1100, 1500, 500)]
    cells = Cells(
        x,
        rng.uniform(100, 1100, 2500),
        np.repeat([0, 1], [2000, 500]),
        np.repeat([0.75, 0.5], [2000, 500]),
        np.repeat([40.0, 20.0], [2000, 500]),
    )
    folder = tmp_path_factory.mktemp("page")
    (folder / "cells.geojson").write_text("{}")
    with Slide(Plain()) as slide:
        return page_of(
            folder,
            cells,
            slide,
            damaged=[[256, 512, 256, 128], [1024, 0, 176, 256]],
            warnings=["mpp was given by hand"],
        )


def test_the_class_table_says_what_was_counted(page: Page) -> None:
    # 3.2 mm x 2.4 mm are 7.68 square millimetres
    assert page.row(CLASSES[0]) == ["2,000", "80.0 %", "260", "40.0", "0.75"]
    assert page.row(CLASSES[1]) == ["500", "20.0 %", "65.1", "20.0", "0.50"]
    assert page.row(CLASSES[2]) == ["0", "0 %", "0", "–", "–"]  # noqa: RUF001
    assert page.row("all cells") == ["2,500", "100 %", "326", "40.0", "0.70"]
    keys = next(keys for keys in page.keys if keys and keys[0] == CLASSES[1])
    assert [float(key) for key in keys[1:4]] == [500, 0.2, pytest.approx(500 / 7.68)]


def test_the_page_says_what_slide_it_is(page: Page) -> None:
    assert "made · 1,600 x 1,200 px · 3.20 x 2.40 mm · 2 µm per pixel · 20x objective" in page.text
    assert "1 min 15 s" in page.text
    # 7.68 square millimetres at 0.5 micrometres are 30.72 megapixels in 75 seconds
    assert "0.410 Mpx of tissue a second" in page.text
    assert "/runs/<mine>" in page.text
    assert "block: 4096" in page.text


def test_warnings_and_damaged_tiles_come_before_the_numbers(page: Page) -> None:
    said = page.text.index("mpp was given by hand")
    # 256 x 128 and 176 x 256 px of 4 square micrometres
    damage = page.text.index(
        "Damaged, 0.311 mm² in all: x 512, y 256 (128 x 256 px); x 0, y 1,024 (256 x 176 px)."
    )
    assert said < damage < page.text.index("cells per mm² of tissue")
    marks = page.all("rect", class_="damage")
    where = [float(marks[0][name]) for name in ("x", "y", "width", "height")]
    assert where == [80.0, 40.0, 20.0, 40.0]


def test_many_damaged_tiles_are_counted(tmp_path: Path) -> None:
    with Slide(Plain()) as slide:
        damaged = [[0, 32 * i, 32, 32] for i in range(20)]
        page = page_of(tmp_path, made_cells(3), slide, damaged=damaged)
    assert "x 352, y 0 (32 x 32 px); and 8 more, listed in slide.json." in page.text
    assert "x 384" not in page.text


def test_pictures_keep_their_proportions_and_the_bar_its_length(page: Page) -> None:
    stages = page.all("div", class_="view")
    assert len(stages) == 5  # slide, most frequent, all cells, two phenotypes
    assert {re.search(r"aspect-ratio:([\d.]+)", s["style"])[1] for s in stages} == {
        "1.32979"  # 250 x 188, of which half a row is beyond the slide
    }
    assert {e["style"] for e in page.all("div", class_="scale")} == {"width:15.625%"}
    assert page.text.count("500 µm") == 5  # 15.625 % of 3.2 mm


def test_the_most_frequent_phenotype_has_its_place_and_color(page: Page) -> None:
    first, second, *_ = [picture(e["href"]) for e in page.all("image", class_="heat")]
    assert first.shape == (188, 250, 4)
    assert first[94, 47].tolist() == [0xD5, 0x5E, 0x00, 255]
    assert first[94, 203].tolist() == [0x00, 0x72, 0xB2, 255]
    assert first[94, 125, 3] == 0  # nothing for hundreds of micrometres
    # of all cells, the left side is darker
    assert second[94, 47, :3].sum() < second[94, 203, :3].sum()


def test_a_map_has_a_labelled_scale_and_its_maximum(page: Page) -> None:
    assert page.text.count("Highest ") == 3
    assert re.search(r"Highest [\d,]+ per mm² at x \d+, y [\d,]+\.", page.text)
    ends = [e["style"] for e in page.all("span") if e.get("style", "").startswith("left:")]
    assert ends.count("left:0.00%") == ends.count("left:100.00%") == 3
    # 2000 cells on 400 x 1000 px of 2 micrometres are 1250 a square millimetre
    assert "1,000" in page.text
    assert f"No cells in the tissue: {CLASSES[2]}." in page.text


def test_the_page_needs_nothing_from_elsewhere(page: Page) -> None:
    assert "//" not in re.sub(r"data:[\w/+;=,-]+", "", page.source).replace("<!--", "")
    links = {
        value
        for _, found in page.elements
        for name, value in found.items()
        if name in ("href", "src", "action", "data", "poster", "srcset")
    }
    inside = {link for link in links if link.startswith(("data:", "#"))}
    assert links - inside == {"cells.parquet", "cells.geojson", "slide.json"}
    ids = {found["id"] for _, found in page.elements if "id" in found}
    assert {link[1:] for link in inside if link[0] == "#"} <= ids


def test_names_are_shown_as_they_are(page: Page) -> None:
    assert "a 'slide' <1>" in page.text
    assert not page.all("b")
    assert CLASSES[1] in page.text
    labels = [found["aria-label"] for _, found in page.elements if "aria-label" in found]
    assert f"Density of {CLASSES[1]}" in labels


def test_a_slide_without_cells_has_a_page(tmp_path: Path) -> None:
    with Slide(Plain()) as slide:
        changes: dict[str, Any] = {"warnings": ["no cell was found"], "model_card": "not for <x>"}
        page = page_of(tmp_path, made_cells(0), slide, **changes)
    assert "no cell was found" in page.text
    assert page.row("model card") == ["not for <x>"]
    assert page.row("all cells") == ["0", "–", "0", "–", "–"]  # noqa: RUF001
    assert len(page.all("div", class_="view")) == 1
    assert "Density" not in page.text


def test_a_slide_without_tissue_has_a_page(tmp_path: Path) -> None:
    nothing = TissueMask(np.zeros((12, 16), bool), (100.0, 100.0), "otsu", threshold=0.05)
    with Slide(Plain()) as slide:
        tissue = {"source": "otsu", "area_mm2": 0.0, "threshold": 0.05}
        page = page_of(tmp_path, made_cells(0), slide, nothing, tissue=tissue)
    assert page.row("all cells")[2] == "–"  # noqa: RUF001
    assert "saturation above 0.05 (Otsu)" in page.text


def test_cells_outside_the_tissue_are_said_and_not_drawn(tmp_path: Path) -> None:
    cells = made_cells(300)
    with Slide(Plain()) as slide:
        tissue = region_mask(Region(0, 0, HEIGHT, 1200), slide)
        page = page_of(tmp_path, cells, slide, tissue)
        left = cells._replace(x=cells.x / 2)
        clean = page_of(tmp_path, left, slide, tissue)
    outside = int((cells.x >= 1200).sum())
    assert f"{outside} cells ({percent(outside / 300)}) lie outside the tissue" in page.text
    assert "outside the tissue" not in clean.text
    density = picture(page.all("image", class_="heat")[1]["href"])
    # the mask ends in the middle of column 187, the slide in that of the last row
    assert (density[:-1, :187, 3] == 255).all()
    assert (density[:, 188:, 3] == 0).all()


def test_a_part_of_the_slide_is_framed_on_it(tmp_path: Path) -> None:
    cells = made_cells(50)
    with Slide(Plain()) as slide:
        tissue = region_mask(Region(300, 800, 200, 400), slide)
        page = page_of(tmp_path, cells, slide, tissue)
    (frame,) = page.all("rect", class_="cut")
    # 8 px around
    found = [float(frame[name]) for name in ("x", "y", "width", "height")]
    np.testing.assert_allclose(found, [792 / STEP, 292 / STEP, 416 / STEP, 216 / STEP], atol=1)


def test_without_resolution_everything_is_in_pixels(tmp_path: Path) -> None:
    cells = made_cells(1920)
    cells.area_um2[:] = np.nan
    with Slide(Plain(None)) as slide:
        view = whole_view(slide)
        assert view.read(slide).shape == (*view.shape, 3)
        page = page_of(tmp_path, cells, slide, model_mpp=None, model=None)
    # 1.92 megapixels
    assert page.row("all cells")[:4] == ["1,920", "100 %", "1,000", "–"]  # noqa: RUF001
    assert "mm" not in re.sub("Comma|comment", "", page.text)
    assert "200 px" in page.text
    assert "resolution not known" in page.text


# ---- the page of many slides


def cohort_facts(name: str, counts: dict[str, int], area: float | None, **changes: Any) -> Any:
    return {
        "name": name,
        "path": f"/slides/{name}.svs",
        "mpp": [0.25, 0.26],
        "classes": list(counts),
        "colors": ["#d55e00", "#0072b2"][: len(counts)],
        "tissue": {"area_mm2": area},
        "cells": sum(counts.values()),
        "counts": counts,
        "damaged": [],
        "warnings": [],
        "seconds": 60.0,
        "model": "/runs/a",
        "celltyper": "1.2.3",
    } | changes


@pytest.fixture
def slides() -> list[Any]:
    return [
        cohort_facts(
            "one",
            {"tumour": 3000, "<i>dead</i>": 1000},
            8.0,
            folder="first #1",
            model_card="<x>",
        ),
        cohort_facts(
            "two & more", {"tumour": 0, "<i>dead</i>": 500}, 2.0, warnings=["a <u>tile</u>", "b"]
        ),
        cohort_facts("empty", {"tumour": 0, "<i>dead</i>": 0}, 0.0, damaged=[[0, 0, 1, 1]]),
        cohort_facts("other", {"tumour": 100}, 10.0),
        cohort_facts("pixels", {"tumour": 50, "<i>dead</i>": 0}, None, mpp=None),
    ]


FAILED = [{"name": "bad", "path": "/slides/bad.svs", "error": 'bad.svs: no "TIFF" <file>'}]


@pytest.fixture
def cohort(tmp_path: Path, slides: list[Any]) -> Page:
    (tmp_path / "first #1").mkdir()
    (tmp_path / "first #1" / "report.html").write_text("")
    write_cohort_report(tmp_path / "report.html", slides, FAILED)
    return Page(tmp_path / "report.html")


def test_every_slide_has_a_row_and_all_have_their_sum(cohort: Page) -> None:
    assert cohort.row("one")[:3] == ["4,000", "8.00", "500"]
    assert cohort.row("two & more")[:3] == ["500", "2.00", "250"]
    assert cohort.row("empty")[:4] == ["0", "0", "–", "–"]  # noqa: RUF001
    assert cohort.row("pixels")[:3] == ["50", "–", "–"]  # noqa: RUF001
    # cells of unknown area are in the sum, not in the density: 4600 on 20
    assert cohort.row("all slides")[:3] == ["4,650", "20.0", "230"]
    assert cohort.row("model card") == ["<x>"]
    rows = [row for row in cohort.rows if row and row[0] in ("one", "other", "all slides")]
    assert [row[1:] for row in rows[3:]] == [
        ["375", "125"],
        ["10.0", "–"],  # noqa: RUF001
        ["155", "150"],  # 3100 on 20, and 1500 on the 10 that were searched
    ]


def test_bars_show_shares(cohort: Page) -> None:
    bars = [e["aria-label"] for e in cohort.all("div", class_="shares")]
    assert bars[0] == "tumour 75.0 %, <i>dead</i> 25.0 %"
    assert bars[1] == "<i>dead</i> 100 %"
    styles = [e["style"] for e in cohort.all("span") if "flex-grow" in e.get("style", "")]
    assert styles[:2] == [
        "flex-grow:0.750000;background:#d55e00",
        "flex-grow:0.250000;background:#0072b2",
    ]


def test_only_reports_that_exist_are_linked(cohort: Page) -> None:
    links = {e["href"] for e in cohort.all("a")}
    assert links == {"first%20%231/report.html"}


def test_failed_slides_and_warnings_are_shown(cohort: Page) -> None:
    assert cohort.row("bad") == ["/slides/bad.svs", 'bad.svs: no "TIFF" <file>']
    assert "1 slide failed and is in no figure of this page" in cohort.text
    assert "6 slides" in cohort.text
    assert "Without cells: empty." in cohort.text
    assert "With warnings: two & more." in cohort.text
    assert "a <u>tile</u>" in cohort.text
    assert not cohort.all("u")
    assert not cohort.all("i")
    assert "//" not in cohort.source


def test_a_cohort_of_failures_has_a_page(tmp_path: Path) -> None:
    write_cohort_report(tmp_path / "report.html", [], FAILED)
    page = Page(tmp_path / "report.html")
    assert page.row("bad")
    assert "1 slide failed" in page.text


def test_the_table_has_a_row_for_every_slide(tmp_path: Path, slides: list[Any]) -> None:
    table = cohort_table(slides, FAILED)
    rows = table.to_pylist()
    assert [row["name"] for row in rows] == [s["name"] for s in slides] + ["bad"]
    one, two, empty, other, pixels, bad = rows
    assert (one["mpp_x"], one["mpp_y"], one["tissue_mm2"], one["cells"]) == (0.25, 0.26, 8.0, 4000)
    assert (one["n_tumour"], one["per_mm2_tumour"], one["per_mm2"]) == (3000, 375.0, 500.0)
    assert (two["n_<i>dead</i>"], two["per_mm2_<i>dead</i>"], two["warnings"]) == (500, 250.0, 2)
    assert (empty["per_mm2"], empty["damaged"]) == (None, 1)
    assert (other["n_<i>dead</i>"], other["per_mm2_<i>dead</i>"]) == (None, None)
    assert (pixels["mpp_x"], pixels["tissue_mm2"], pixels["n_tumour"]) == (None, None, 50)
    assert bad["error"] == FAILED[0]["error"]
    assert {bad[name] for name in table.column_names} == {None, *FAILED[0].values()}
    write_cohort_csv(tmp_path / "slides.csv", slides, FAILED)
    with (tmp_path / "slides.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == table.column_names
    assert read[0]["n_tumour"] == "3000"
    assert read[3]["n_<i>dead</i>"] == ""
    assert read[5]["error"] == FAILED[0]["error"]
    assert read[5]["cells"] == ""
    assert cohort_table([], FAILED).num_rows == 1
