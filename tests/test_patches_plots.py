"""Charts, tables and the gallery of patch mode: what is drawn where, from arrays by hand."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest

from celltyper.classification.gallery import confusion_table, domain_table, find_mistakes, gallery
from celltyper.classification.plots import (
    curve_of,
    precision_recall_chart,
    reliability_chart,
    roc_chart,
    scaling_chart,
)
from celltyper.errors import DataError
from celltyper.metrics.classification import Score, score_patches
from celltyper.metrics.scoring import patch_reliability
from celltyper.report.data import Metric

CLASSES = ("Atypical", "Normal")
LEFT, RIGHT, TOP, BASE = 52, 378, 12, 226
"""Corners of the axes in the drawing."""


def two(shares):
    shares = np.asarray(shares, float)
    return np.column_stack([shares, 1 - shares])


def curve(labels, shares, threshold=0.5, name="run"):
    groups = [f"slide {i % 3}" for i in range(len(labels))]
    scores = score_patches(
        labels, two(shares), CLASSES, 0, groups, threshold=threshold, resamples=20
    )
    return curve_of(name, labels, two(shares), scores)


def drawn(chart):
    """Drawings of a chart, which must be well-formed."""
    return ET.fromstring(f"<div>{chart.svg}</div>")


def to_data(x, y):
    """Numbers that a place in the drawing of unit axes stands for."""
    return (x - LEFT) / (RIGHT - LEFT), (BASE - y) / (BASE - TOP)


def line(element):
    return [to_data(*map(float, p.split(","))) for p in element.get("points").split()]


def rings(root):
    return [
        to_data(float(c.get("cx")), float(c.get("cy")))
        for c in root.iter("circle")
        if "line" in c.get("class")
    ]


# Descending: .9 A, .8 N, .6 A, .6 N, .3 A, .1 N, .1 N
LABELS, SHARES = [0, 1, 0, 1, 0, 1, 1], [0.9, 0.8, 0.6, 0.6, 0.3, 0.1, 0.1]


def test_roc_goes_through_the_counts_and_rings_the_threshold():
    root = drawn(roc_chart([curve(LABELS, SHARES, 0.6)]))
    (found,) = root.iter("polyline")
    # Up to (0, 1/3), right to (1/4, 1/3), a tie goes aslant to (1/2, 2/3), up, right.
    expected = [(0, 0), (0, 1 / 3), (1 / 4, 1 / 3), (1 / 2, 2 / 3), (1 / 2, 1), (1, 1)]
    assert np.array(line(found)) == pytest.approx(np.array(expected), abs=4e-4)
    assert rings(root)[0] == pytest.approx((1 / 2, 2 / 3), abs=4e-4)
    # Above every probability nothing is called.
    assert rings(drawn(roc_chart([curve(LABELS, SHARES, 0.95)])))[0] == pytest.approx((0, 0))


def test_precision_recall_is_drawn_in_the_steps_that_are_summed():
    chart = precision_recall_chart([curve(LABELS, SHARES, 0.6)])
    root = drawn(chart)
    found = line(next(root.iter("polyline")))
    area = sum((b[0] - a[0]) * a[1] for a, b in pairwise(found) if a[1] == b[1])
    # 1/3 * (1 + 2/4 + 3/5)
    assert area == pytest.approx((1 + 0.5 + 0.6) / 3, abs=1e-3)
    assert "AUPRC 0.700" in chart.lines[0][1]
    assert rings(root)[0] == pytest.approx((2 / 3, 1 / 2), abs=4e-4)
    same = precision_recall_chart([curve(LABELS, SHARES), curve(LABELS, SHARES)])
    (dashed,) = drawn(same).findall(".//path[@class='ideal']")
    height = float(re.match(r"M\S+ (\S+)L", dashed.get("d"))[1])
    assert to_data(0, height)[1] == pytest.approx(3 / 7, abs=4e-4)


def test_curves_are_told_apart_and_those_too_many_are_named():
    curves = [curve(LABELS, SHARES, 0.1 * i + 0.1, f"fold <{i}>") for i in range(8)]
    for chart in (roc_chart(curves), precision_recall_chart(curves)):
        lines = list(drawn(chart).iter("polyline"))
        assert len(lines) == len(chart.lines) == 6
        assert len({line.get("stroke-dasharray") for line in lines}) == 6
        assert lines[2].find("title").text == "fold <2>"
        assert chart.note.endswith("Not drawn: fold <6>, fold <7>.")
        assert "(0.10, 0.20, 0.30, 0.40, 0.50, 0.60)" in chart.note


def test_a_curve_needs_both_kinds_of_patches():
    with pytest.raises(DataError, match="run: a curve needs patches of Atypical and others"):
        curve([1, 1, 1], [0.2, 0.3, 0.4])


def test_a_long_curve_stays_small_and_keeps_its_area():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20_000)
    long = curve(labels, np.clip(rng.normal(0.6 - 0.3 * labels, 0.2), 0, 1))
    chart = roc_chart([long])
    assert len(chart.svg) < 60_000
    x, y = np.array(line(next(drawn(chart).iter("polyline")))).T
    assert np.trapezoid(y, x) == pytest.approx(long.auroc.value, abs=2e-3)


def test_reliability_shows_observed_shares_and_counts_of_bins():
    # Predicted .9: three of four came true; predicted .1: none of six.
    labels = [0, 0, 0, 1, *[1] * 6]
    table = patch_reliability(labels, two([*[0.9] * 4, *[0.1] * 6]), 0)
    chart = reliability_chart(table, "Atypical", Score(0.12, 0.1, 0.2))
    root = drawn(chart)
    dots = [to_data(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert dots == [pytest.approx((0.1, 0), abs=4e-4), pytest.approx((0.9, 0.75), abs=4e-4)]
    bars = [(float(r.get("x")), float(r.get("height"))) for r in root.iter("rect")]
    assert len(bars) == 15
    assert [height > 0 for _, height in bars] == [i in (1, 13) for i in range(15)]
    assert bars[13][1] / bars[1][1] == pytest.approx(4 / 6, abs=0.01)
    counts = [t.text for t in root.iter("text") if "style" in t.attrib]
    assert counts == ["6" if i == 1 else "4" if i == 13 else "0" for i in range(15)]
    assert "0.120 (0.100 to 0.200)" in chart.note


def test_scaling_has_a_logarithmic_axis_dots_of_runs_and_lines_of_means():
    lines = {
        "linear": {0.01: [0.5, 0.7], 1: [0.8, float("nan")], 0.1: [0.7]},
        "LoRA": {1: [0.9]},
    }
    chart = scaling_chart("balanced accuracy", lines)
    root = drawn(chart)
    first, second = root.iter("polyline")
    places = [tuple(map(float, p.split(","))) for p in first.get("points").split()]
    middle, half = (LEFT + RIGHT) / 2, (RIGHT - LEFT) / 2 / 1.1
    assert [x for x, _ in places] == pytest.approx([middle - half, middle, middle + half], abs=0.1)
    # y axis from .5 to .9: .6 is a quarter up.
    assert places[0][1] == pytest.approx(BASE - (BASE - TOP) / 4, abs=0.1)
    assert len(second.get("points").split()) == 1
    small = [c for c in root.iter("circle") if c.get("r") == "2"]
    assert len(small) == 5, "every finite run is a dot"
    texts = [t.text for t in root.iter("text")]
    assert [t for t in texts if "%" in t] == ["1 %", "10 %", "100 %"]
    assert chart.title.startswith("Balanced accuracy over")
    assert [name for _, name in chart.lines] == ["linear", "LoRA"]
    # A single share has no span.
    assert "100 %" in scaling_chart("AUROC", {"a": {1.0: [0.8]}}).svg
    assert scaling_chart("AUROC", {"a": {1.0: [float("nan")]}}).svg == ""


def cells_of(html):
    """Texts of the rows of a table, and which cells are framed."""
    root = ET.fromstring(str(html))
    rows = root.findall(".//tbody/tr")
    return (
        [["".join(" ".join(cell.itertext()).split("\n")) for cell in row] for row in rows],
        [[cell.get("class") == "right" for cell in row][1:] for row in rows],
        root,
    )


def test_confusion_table_has_counts_and_shares_of_the_row():
    texts, framed, root = cells_of(confusion_table(np.array([[3, 1], [0, 0]]), ("a<b", "c")))
    assert texts == [["a<b", "3 75 %", "1 25 %", "4"], ["c", "0", "0", "0"]]
    assert framed == [[True, False, False], [False, True, False]]
    shades = [cell.get("style", "")[-6:] for cell in root.findall(".//tbody/tr/td")[:2]]
    assert shades == [" 0.38)", " 0.12)"]


def test_domain_table_frames_the_own_domain_and_averages_the_others():
    cells = [
        [Metric("", 0.9, None, None, "", 0.02), Metric("", 0.7, 0.6, 0.8, ""), None],
        [
            Metric("", 0.5, None, None, ""),
            Metric("", 0.8, None, None, ""),
            Metric("", 0.6, 0.1, 1.0, ""),
        ],
    ]
    texts, framed, root = cells_of(
        domain_table(["lung", "skin"], ["lung", "skin", "bone"], cells, chance=0.5)
    )
    assert texts == [
        ["lung", "0.900 ± 0.020", "0.700 0.600 to 0.800", "–", "0.700"],  # noqa: RUF001
        ["skin", "0.500", "0.800", "0.600 0.100 to 1.000", "0.550"],
    ]
    assert framed == [[True, False, False, False], [False, True, False, False]]
    # From chance, not at all, to 1, half: .9 is .4 / .5 of the way.
    shades = [c.get("style") for c in root.findall(".//td") if c.get("style")]
    assert [s.split(", ")[-1] for s in shades] == ["0.40)", "0.20)", "0.00)", "0.30)", "0.10)"]
    with pytest.raises(DataError, match="2 x 3 domains"):
        domain_table(["lung", "skin"], ["lung", "skin", "bone"], cells[:1], chance=0.5)


def test_mistakes_are_found_by_kind_and_certainty():
    labels = [0, 0, 1, 1, 1, 0, 1]
    shares = [0.1, 0.35, 0.6, 0.95, 0.2, 0.9, 0.45]
    alarms, misses = find_mistakes(labels, two(shares), 0, threshold=0.4, most=2)
    assert (alarms.true, alarms.called, alarms.total) == (1, 0, 3)
    assert alarms.rows.tolist() == [3, 2]
    assert (misses.true, misses.called, misses.total) == (0, 1, 2)
    assert misses.rows.tolist() == [0, 1]
    assert find_mistakes([0, 1], two([0.9, 0.1]), 0) == []


def test_gallery_shows_pictures_votes_and_probabilities():
    labels, shares = [1, 0, 1], [0.8, 0.3, 0.9]
    votes, experts = np.array([[1 / 3, 2 / 3], [1, 0], [0, 1]]), [3, 1, 3]
    kinds = find_mistakes(labels, two(shares), 0)
    images = {
        i: np.full((300 if i == 1 else 128, 300 if i == 1 else 128, 3), 60 * i, np.uint8)
        for i in range(3)
    }
    html = gallery(
        kinds,
        images,
        ["a<b/x.png", "y.png", "z.png"],
        two(shares),
        CLASSES,
        votes=votes,
        experts=experts,
        mpp=0.25,
    )
    assert "<script" not in html
    closed = str(html).replace("<br>", "<br/>").replace("<wbr>", "")
    closed = closed.replace('"><figcaption>', '"/><figcaption>')
    root = ET.fromstring(f"<div>{closed}</div>")
    assert [h.text for h in root.iter("h3")] == [
        "Label Normal, called Atypical",
        "Label Atypical, called Normal",
    ]
    captions = [list(c.itertext()) for c in root.iter("figcaption")]
    assert captions == [
        ["Atypical 0.90", "3 Normal", "z.png"],
        ["Atypical 0.80", "2 Normal, 1 Atypical", "a<b/x.png"],
        # One expert's word is the label.
        ["Normal 0.70", "y.png"],
    ]
    assert [p.text.split("patch. ")[1] for p in root.iter("p")] == [
        "Each picture is 32 µm wide.",
        "Each picture is 75 µm wide.",
    ]
    pictures = [
        PIL.Image.open(io.BytesIO(base64.b64decode(i.get("src").split(",")[1])))
        for i in root.iter("img")
    ]
    assert [p.size for p in pictures] == [(128, 128), (128, 128), (256, 256)]
    assert [p.getpixel((60, 60))[0] for p in pictures] == [120, 0, 60]
    plain = gallery(kinds, images, ["x", "y", "z"], two(shares), CLASSES)
    assert "expert" not in plain
    assert "µm" not in plain
    with pytest.raises(DataError, match="number of experts"):
        gallery(kinds, images, ["x", "y", "z"], two(shares), CLASSES, votes=votes)
    assert "No patch was called wrong" in gallery([], {}, [], two([]), CLASSES)
