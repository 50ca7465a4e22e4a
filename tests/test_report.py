"""The report's text, its pictures, and the overlay, on small arrays with answers by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from skimage.segmentation import find_boundaries

from celltyper.errors import DataError
from celltyper.report.agreement import MISSED, RIGHT, SPURIOUS, WRONG_CLASS, compare, fate_counts
from celltyper.report.data import Metric, Reliability, Report, ReportImage, Table
from celltyper.report.figures import busiest_window, make_figure, make_figures
from celltyper.report.html import confusion_rows, learning_curves, number, render, write_report
from celltyper.report.outlines import outline_paths
from celltyper.report.overlay import (
    UNTYPED,
    boundary,
    class_counts,
    draw_outlines,
    legend,
    save_overlay,
    scale_bar,
)
from celltyper.report.plots import ticks

CLASSES = ("lympho<b>cyte", 'tumour & "stroma"')
COLORS = ("#00b3ff", "#ff2d2d")
NAN = float("nan")


def disks(*places: tuple[int, int], size: int = 60, radius: int = 6) -> np.ndarray:
    labels = np.zeros((size, size), np.int32)
    rows, cols = np.ogrid[:size, :size]
    for i, (row, col) in enumerate(places, 1):
        labels[(rows - row) ** 2 + (cols - col) ** 2 <= radius**2] = i
    return labels


def field(name: str = "field 1", score: float | None = 0.5, **changes: object) -> ReportImage:
    image = np.full((60, 60, 3), 230, np.uint8)
    return replace(
        ReportImage(
            name,
            image,
            disks((15, 15), (15, 45), (45, 15)),
            np.array([0, 1, 2, 1], np.uint8),
            disks((15, 15), (15, 45), (45, 45)),
            np.array([0, 1, 1, 2], np.uint8),
            {"PQ": score},
            0.5,
        ),
        **changes,
    )


def full_report(**changes: object) -> Report:
    report = Report(
        title="Trial & error <1>",
        classes=CLASSES,
        colors=COLORS,
        notice="Labels are model-made.",
        warnings=("class 2 is rare",),
        metrics=(
            Metric("macro F1 on reference instances", 0.64321, 0.581, 0.7, "argmax & background"),
            Metric("AJI", NAN, None, None, "aggregated Jaccard"),
        ),
        interval="95 % interval, 12 patients",
        per_class=Table(
            ("class", "reference", "F1", "PQ"),
            (
                (CLASSES[0], 10, Metric("F1", 0.8, 0.7, 0.9, ""), 0.5),
                (CLASSES[1], 2000, Metric("F1", 0.9, None, None, ""), NAN),
            ),
        ),
        confusion=np.array([[0, 3, 4], [1, 6, 3], [0, 0, 0]]),
        reliability=Reliability(
            np.array([NAN, 0.7]), np.array([NAN, 0.6]), np.array([0, 12]), 0.1234
        ),
        history={
            "step": [10, 20, 30],
            "lr": [1, 1, 1],
            "loss": [2, 1.5, 1],
            "pq": [None, NAN, 0.4],
        },
        images=(field(),),
        facts={"device": "cpu"},
        config="encoder:\n  name: <tiny>\n",
    )
    return replace(report, **changes)


class Page(HTMLParser):
    """Text, tables and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.legend = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if ("id", "legend") in attrs:
            self.open.append("legend")
        elif tag in ("fieldset", "th", "td", "script", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("fieldset", "th", "td", "script", "style"):
            self.open.pop()

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        if where in ("script", "style"):
            return
        self.text += data
        if where in ("th", "td"):
            self.rows[-1][-1] += data
        if where == "legend":
            self.legend += data


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(full_report()))


def test_headline_rows_carry_value_interval_and_rule(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["macro F1 on reference instancesargmax & background"] == ["0.6430.581 to 0.700"]
    assert rows["AJIaggregated Jaccard"] == ["––"]  # noqa: RUF001
    assert "95 % interval, 12 patients" in page.text


def test_per_class_table(page: Page) -> None:
    start = next(i for i, row in enumerate(page.rows) if row[0] == "class")
    rows = {row[0]: row[1:] for row in page.rows[start : start + 3]}
    assert rows["class"] == ["reference", "F1", "PQ"]
    assert rows[CLASSES[0]] == ["10", "0.8000.700 to 0.900", "0.500"]
    assert rows[CLASSES[1]] == ["2,000", "0.900", "–"]  # noqa: RUF001


def test_intervals_are_explained_where_there_are_any() -> None:
    plain = Table(("share", "right"), ((0.9, 0.8),), "Of nuclei.")
    with_intervals = Table(("share", "right"), ((0.9, Metric("", 0.8, 0.7, 0.9, "")),), "Of cells.")
    text = " ".join(
        Page(render(full_report(tables={"a": plain, "b": with_intervals}))).text.split()
    )
    assert "Of cells. Small print: 95 % interval" in text
    assert "Of nuclei." in text
    assert "Of nuclei. Small print" not in text


def test_confusion_moves_no_nucleus_last_and_gives_row_shares(page: Page) -> None:
    start = next(i for i, row in enumerate(page.rows) if row[0].startswith("reference"))
    assert page.rows[start][1:] == [*CLASSES, "no nucleus"]
    assert page.rows[start + 1][1:] == ["660 %", "330 %", "110 %"]
    assert page.rows[start + 2][1:] == ["0", "0", "0"]
    assert page.rows[start + 3][1:] == ["3", "4", "–"]  # noqa: RUF001
    assert confusion_rows(np.eye(2))[0][0] == {"count": 1, "share": 1.0, "right": True}


def test_names_are_escaped_and_in_the_legend(page: Page) -> None:
    assert all(name in page.legend for name in CLASSES)
    assert "no class" not in page.legend
    assert "b" not in page.tags
    assert "Trial & error <1>" in page.text
    assert "name: <tiny>" in page.text
    assert "Labels are model-made." in page.text
    assert "class 2 is rare" in page.text


def test_page_refers_to_nothing_outside() -> None:
    text = render(full_report())
    assert not re.search(r"https?://|@import|url\(", text)
    links = [v for name, v in Page(text).attributes if name in ("src", "href", "xlink:href")]
    assert links
    assert all(link.startswith("data:") for link in links)


def test_pictures_have_texts_and_headers_a_scope() -> None:
    text = render(full_report())
    for svg in re.findall(r"<svg[^>]*>", text):
        assert 'aria-hidden="true"' in svg or ('role="img"' in svg and "aria-label=" in svg)
    assert all("scope=" in th for th in re.findall(r"<th[ >][^>]*>?", text))
    assert "2 lympho&lt;b&gt;cyte, 1 tumour &amp; &#34;stroma&#34;." in text


def test_an_empty_report_is_a_page() -> None:
    empty = Page(render(Report("nothing yet", (), ())))
    assert "nothing yet" in empty.text
    assert "table" not in empty.tags


def test_cells_without_class_appear_in_legend_and_counts() -> None:
    image = field(phenotypes=np.array([0, 1, 0, 1], np.uint8))
    page = Page(render(full_report(images=(image,))))
    assert "no class" in page.legend
    assert ["no class", "1", "0", "0", "0", "0", "0"] in page.rows


def test_without_reference_no_agreement_is_offered() -> None:
    image = field(ref_labels=None, ref_phenotypes=None)
    page = Page(render(full_report(images=(image,))))
    assert ("value", "agreement") not in page.attributes
    assert [CLASSES[0], "2"] in page.rows


def test_worst_images_come_first_and_room_is_kept() -> None:
    images = [field("good", 0.9), field("unknown", NAN), field("bad", 0.1), field("none", None)]
    figures, left = make_figures(images, 2, "PQ", 10**9)
    assert [figure.name for figure in figures] == ["bad", "good", "unknown", "none"]
    assert left == []
    room = figures[0].size + figures[1].size
    figures, left = make_figures(images, 2, "PQ", room)
    assert [figure.name for figure in figures] == ["bad", "good"]
    assert left == ["unknown", "none"]
    assert [f.name for f in make_figures(images, 2, "", 1)[0]] == ["good"]


def test_agreement_by_hand() -> None:
    # Label 1 agrees, 2 is found with another class, predicted 3 and reference 3 lie apart.
    sample = field()
    found = compare(sample.ref_labels, sample.ref_phenotypes, sample.labels, sample.phenotypes)
    assert found.predicted.tolist() == [-1, RIGHT, WRONG_CLASS, SPURIOUS]
    assert found.reference.tolist() == [-1, RIGHT, WRONG_CLASS, MISSED]
    counts = fate_counts(found.reference, sample.ref_phenotypes, 2)
    assert counts.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
    # predicted, reference, right, wrong class, missed, spurious
    assert make_figure(sample, 2).counts == [
        [0, 0, 0, 0, 0, 0],
        [2, 2, 1, 1, 0, 1],
        [1, 1, 0, 0, 1, 0],
    ]


def test_large_images_are_cropped_to_the_busiest_window() -> None:
    points = np.array([[10.0, 10.0], [1900.0, 2900.0], [1800.0, 2800.0]])
    assert busiest_window((2000, 3000), points[:, 0], points[:, 1]) == (
        slice(1000, 2000),
        slice(2000, 3000),
    )
    assert busiest_window((50, 70), points[:0, 0], points[:0, 1]) == (slice(0, 50), slice(0, 70))
    labels = np.zeros((40, 1300), np.int32)
    labels[10:20, 1200:1210] = 1
    image = np.zeros((40, 1300, 3), np.uint8)
    figure = make_figure(ReportImage("wide", image, labels, np.array([0, 1], np.uint8)), 1)
    assert (figure.width, figure.height) == (1000, 40)
    assert "columns 250 to 1250, rows 0 to 40 of 1300 x 40 px" in figure.window
    assert figure.predicted[1].startswith("M")


def test_file_is_written_whole(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", full_report())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").endswith("</html>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colors": ("#00b3ff",)}, "2 classes need as many colors, got 1"),
        ({"colors": ("red", "#ff2d2d")}, "'red' must be written as '#rrggbb'"),
        ({"confusion": np.zeros((2, 2))}, "must be 3 x 3"),
        ({"per_class": Table(("class", "F1"), (("a",),))}, "1 cells for 2 columns"),
        ({"classes": CLASSES[:1], "colors": COLORS[:1], "confusion": None}, "class 2, but only 1"),
    ],
)
def test_reports_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        full_report(**changes)


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"'field 1', prediction: labels are \(5, 5\)"):
        field(labels=np.zeros((5, 5), np.int32))
    with pytest.raises(DataError, match="lookup table of phenotypes has 2 entries"):
        field(phenotypes=np.array([0, 1], np.uint8))
    with pytest.raises(DataError, match="both, or neither"):
        field(ref_labels=None)


def test_numbers_for_readers() -> None:
    values = (0.81449, 1.0, 12345, 12345.67, None, NAN, float("inf"), "text", np.float32(0.5))
    assert [number(value) for value in values] == [
        *("0.814", "1.000", "12,345", "12,345.7"),
        *("–", "–", "–", "text", "0.500"),  # noqa: RUF001
    ]


def test_learning_curves_leave_gaps_out() -> None:
    charts = learning_curves(full_report().history)
    assert [chart.title for chart in charts] == ["Loss", "Validation scores"]
    assert [[name for _, name in chart.lines] for chart in charts] == [["loss"], ["pq"]]
    assert charts[0].svg.count("<circle") == 3
    assert charts[1].svg.count("<circle") == 1
    assert learning_curves({}) == []
    many = learning_curves({f"score {i}": [0.1] for i in range(8)})
    assert "Not drawn: score 6, score 7" in many[0].note


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0.13, 0.98), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((0, 0), [-0.5, 0, 0.5]),
        ((50, 2000), [0, 500, 1000, 1500, 2000]),
        ((-3, 3), [-3, -2, -1, 0, 1, 2, 3]),
    ],
)
def test_ticks_are_round_and_span(ends: tuple[float, float], expected: list[float]) -> None:
    found = ticks(*ends)
    assert found[0] <= ends[0]
    assert found[-1] >= ends[1]
    if ends[0] != ends[1]:
        assert found == expected


def test_boundary_by_hand_and_against_skimage() -> None:
    labels = np.array(
        [
            [0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 2, 2],
            [0, 1, 1, 1, 2, 2],
            [0, 1, 1, 1, 2, 2],
            [0, 0, 0, 0, 0, 0],
        ],
        np.int32,
    )
    assert boundary(labels).astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1],
        [0, 1, 0, 1, 1, 0],
        [0, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0],
    ]
    assert boundary(labels, 2).tolist() == (labels > 0).tolist()
    noise = np.random.default_rng(0).integers(0, 4, (40, 40)).astype(np.int32).repeat(3, 0)
    np.testing.assert_array_equal(boundary(noise), find_boundaries(noise, 1, mode="inner"))


def test_outlines_take_the_color_of_the_phenotype() -> None:
    image = np.full((3, 8, 3), 7, np.uint8)
    labels = np.zeros((3, 8), np.int32)
    labels[:, 0:2], labels[:, 3:5], labels[:, 6:] = 5, 2, 9
    phenotypes = np.array([0, 0, 2, 0, 0, 1, 0, 0, 0, 0], np.uint8)
    drawn = draw_outlines(image, labels, phenotypes, COLORS)
    untyped = [int(UNTYPED[i : i + 2], 16) for i in (1, 3, 5)]
    plain, blue, red = [7, 7, 7], [0, 0xB3, 0xFF], [0xFF, 0x2D, 0x2D]
    expected = [plain, blue, plain, red, red, plain, untyped, plain]
    assert drawn.tolist() == [expected] * 3
    assert (image == 7).all()
    large = draw_outlines(image, labels, phenotypes, COLORS, scale=2)
    assert large.shape == (6, 16, 3)
    assert large[0, :6].tolist() == [plain] * 3 + [blue] + [plain] * 2
    with pytest.raises(DataError, match="class 2, but only 1 colors"):
        draw_outlines(image, labels, phenotypes, COLORS[:1])


def test_paths_by_hand() -> None:
    labels = np.array([[4, 0, 0], [0, 4, 7], [0, 0, 7]])
    groups = np.array([-1, -1, -1, -1, 0, -1, -1, 1])
    diamond = "l1 1 -1 1 -1 -1z"
    # Pixels that touch at a corner stay apart; the long sides of label 7 become one step.
    assert outline_paths(labels, groups, 3) == [
        f"M1 0{diamond}M3 2{diamond}",
        "M5 2l1 1 0 2 -1 1 -1 -1 0 -2z",
        "",
    ]
    assert outline_paths(np.zeros((3, 3), np.int32), groups, 2) == ["", ""]


def test_paths_enclose_the_cells_and_leave_holes_open() -> None:
    labels = disks((20, 20), (40, 42), radius=12)
    labels[18:23, 18:23] = 0
    (path,) = outline_paths(labels, np.array([-1, 0, 0]), 1)
    area = 0.0
    for start, steps in re.findall(r"M(\d+ \d+)l([^z]+)z", path):
        moves = np.array(steps.split(), float).reshape(-1, 2)
        x, y = (np.vstack([[float(v) for v in start.split()], moves]).cumsum(axis=0) / 2).T
        area += 0.5 * float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())
    assert path.count("M") == 3
    assert area == pytest.approx((labels > 0).sum(), rel=0.02)


def test_legend_names_every_color_and_wraps() -> None:
    wide = legend(("a", "b"), COLORS, 600, counts=(3, 4), mpp=0.5)
    narrow = legend(("a", "b"), COLORS, 90, counts=(3, 4), mpp=0.5)
    assert wide.shape[1] == 600
    assert narrow.shape[0] > wide.shape[0]
    for color in ([0, 0xB3, 0xFF], [0xFF, 0x2D, 0x2D]):
        assert (wide == color).all(axis=2).sum() >= 100
    # 600 px at 0.5 µm: 50 µm is the longest round bar within a fifth, 100 px of black.
    assert scale_bar(600, 0.5) == 50
    assert (wide == 0).all(axis=2).sum(axis=1).max() == 100


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_saved_overlay_has_picture_and_legend(tmp_path: Path, suffix: str) -> None:
    sample = field()
    path = tmp_path / f"overlay{suffix}"
    save_overlay(
        path, sample.image, sample.labels, sample.phenotypes, CLASSES, COLORS, mpp=sample.mpp
    )
    with PIL.Image.open(path) as picture:
        # Nuclei of 12 px are small: twice the size, and room for the legend.
        assert picture.format == {".png": "PNG", ".jpg": "JPEG"}[suffix]
        assert picture.width == 240
        assert picture.height > 120
    assert len(list(tmp_path.iterdir())) == 1
    empty = np.zeros_like(sample.labels)
    save_overlay(path, sample.image, empty, np.zeros(1, np.uint8), CLASSES, COLORS)


def test_class_counts_ignore_ids_that_are_not_there() -> None:
    labels = np.array([[3, 3, 0, 5]], np.int32)
    phenotypes = np.array([0, 1, 1, 2, 1, 0], np.uint8)
    assert class_counts(labels, phenotypes, 2).tolist() == [1, 0, 1]
