"""The report in a real browser: no errors, no overflow, and the switches do what they say."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_leaderboard import SYSTEMS, made_leaderboard

from celltyper.benchmark.page import leaderboard_page
from celltyper.report.data import Metric, Reliability, Report, ReportImage, Table
from celltyper.report.html import write_report

CLASSES = ("lymphocyte", "tumour cell", "a phenotype with a name that is rather long")
COLORS = ("#00b3ff", "#ff2d2d", "#e6d800")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver on the path")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Selenium leaves the driver's pipes to the garbage collector.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        yield browser
        browser.quit()


@pytest.fixture
def page(browser: Any, address: str) -> Any:
    browser.get(address)
    return browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    labels = np.zeros((300, 300), np.int32)
    for i in range(36):
        row, col = 10 + i // 6 * 48, 10 + i % 6 * 48
        labels[row : row + 20, col : col + 24] = i + 1
    types = np.r_[0, np.arange(36) % 3 + 1].astype(np.uint8)
    moved = np.roll(labels, 5, axis=1)
    moved[labels == 36] = 0
    report = Report(
        title="A trial run with a long name: " + "x" * 80,
        classes=CLASSES,
        colors=COLORS,
        notice="Labels are made up.",
        metrics=[Metric("macro F1", 0.64, 0.6, 0.7, "a rule that goes on for some time " * 4)],
        per_class=Table(
            ("class", "cells", "F1", "precision", "recall", "PQ", "SQ", "DQ"),
            [
                (name, n, Metric("F1", f, f - 0.1, f + 0.1, ""), f, f, f, f, f)
                for name, n, f in zip(CLASSES, (12, 9, 100), (0.5, 0.7, None), strict=True)
                if f is not None
            ]
            + [(CLASSES[2], 100, *[None] * 6)],
        ),
        confusion=rng.integers(0, 100000, (4, 4)),
        reliability=Reliability(np.array([0.5, 0.9]), np.array([0.4, 0.9]), np.array([9, 90]), 0.1),
        history={"step": [1, 2, 3], "train_loss": [3.0, 2.0, 1.0], "pq": [0.1, None, 0.3]},
        images=[
            ReportImage(
                "image_with_a_name_that_does_not_break_anywhere_" * 3,
                rng.integers(150, 255, (300, 300, 3)).astype(np.uint8),
                moved,
                types,
                labels,
                types,
                {"PQ": 0.4},
                0.5,
            )
        ],
        facts={"weights": "0123456789abcdef" * 8},
        config="key: " + "long " * 60,
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, report)
    return path.as_uri()


def visible(page: Any, selector: str) -> bool:
    return page.execute_script(
        "const e = document.querySelector(arguments[0]);"
        "return e.getClientRects().length > 0 && e.getBoundingClientRect().width > 0",
        selector,
    )


def overflow(page: Any) -> int:
    return page.execute_script(
        "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
    )


def click(page: Any, value: str) -> None:
    page.execute_script(f"document.querySelector('input[value=\"{value}\"]').click()")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_the_window_without_errors(page: Any, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
    for view in ("predicted", "reference", "both", "agreement", "none"):
        click(page, view)
        assert page.execute_script("return innerWidth") == width
        assert overflow(page) == 0
    ink, paper = page.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    light, dark = (sum(map(int, c[4:-1].split(","))) for c in (paper, ink))
    assert (light > dark) == (scheme == "light")
    assert page.get_log("browser") == []


def test_views_and_classes_can_be_switched(page: Any) -> None:
    assert visible(page, ".predicted .k1")
    assert not visible(page, ".reference .k1")
    click(page, "k1")
    assert not visible(page, ".predicted .k1")
    assert visible(page, ".predicted .k2")
    click(page, "both")
    assert visible(page, ".reference .k2")
    assert not visible(page, ".reference .k1")
    click(page, "k1")
    assert visible(page, ".reference .k1")
    assert not visible(page, ".agreement .f0")
    click(page, "agreement")
    assert visible(page, ".agreement .f0")
    assert not visible(page, ".predicted .k2")
    click(page, "f0")
    assert not visible(page, ".agreement .f0")
    assert visible(page, ".agreement .f3")
    click(page, "none")
    assert not visible(page, ".agreement .f3")


def test_zoom_enlarges_the_image_only(page: Any) -> None:
    click(page, "4")
    whole, seen = page.execute_script(
        "const e = document.querySelector('.stage'); return [e.scrollWidth, e.clientWidth]"
    )
    assert whole == pytest.approx(4 * seen, abs=1)
    assert overflow(page) == 0


def test_columns_sort_with_unknown_values_last(page: Any) -> None:
    def column(i: int) -> list[str]:
        return page.execute_script(
            "return [...document.querySelectorAll('.sortable tbody tr')]"
            f".map((row) => row.children[{i}].dataset.key)"
        )

    for clicks, expected in ((1, ["0.7", "0.5", ""]), (2, ["0.5", "0.7", ""])):
        page.execute_script("document.querySelectorAll('.sortable th button')[2].click()")
        assert column(2) == expected, clicks
    page.execute_script("document.querySelectorAll('.sortable th button')[1].click()")
    assert column(1) == ["100.0", "12.0", "9.0"]
    page.execute_script("document.querySelectorAll('.sortable th button')[0].click()")
    assert column(0) == sorted(CLASSES, reverse=True)
    assert page.execute_script(
        "return [...document.querySelectorAll('th[aria-sort]')].map((e) => e.ariaSort)"
    ) == ["descending"]


# ---------------------------------------------------------------- the leaderboard


@pytest.fixture(scope="module")
def board_address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("leaderboard") / "index.html"
    path.write_text(leaderboard_page(made_leaderboard()), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def board(browser: Any, board_address: str) -> Any:
    browser.get(board_address)
    return browser


def names_in(page: Any, table: str) -> list[str]:
    """Systems of the rows that can be seen, from the top."""
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')]"
        ".filter((row) => row.getClientRects().length).map((row) => row.cells[0].dataset.key)",
        table,
    )


def search(page: Any, words: str) -> str:
    """Type into the filter; gives what it says of the rows."""
    return page.execute_script(
        "const field = document.querySelector('#filter input[type=search]');"
        "field.value = arguments[0]; field.dispatchEvent(new Event('input'));"
        "field.dispatchEvent(new Event('change'));"
        "return document.querySelector('#filter output').textContent",
        words,
    )


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_leaderboard_fits_the_window_without_errors(board: Any, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    board.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    board.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
    board.execute_script("for (const e of document.querySelectorAll('details')) e.open = true")
    for value in ("classes", "published", "y7"):
        click(board, value)
        assert board.execute_script("return innerWidth") == width
        assert overflow(board) == 0
    # no text is smaller than 11 px, and a row's name leaves room for a figure beside it
    smallest, name, scroll = board.execute_script(
        "const sizes = [...document.querySelectorAll('td, th, p, label, small, summary, li')]"
        ".filter((e) => e.getClientRects().length)"
        ".map((e) => parseFloat(getComputedStyle(e).fontSize));"
        "const table = document.querySelector('.overview');"
        "return [Math.min(...sizes), table.tBodies[0].rows[0].cells[0].offsetWidth,"
        " table.parentElement.clientWidth]"
    )
    assert smallest >= 11
    assert name < 0.6 * scroll
    assert board.get_log("browser") == []


def test_leaderboard_sorts_by_any_column(board: Any) -> None:
    best_first = [*reversed(SYSTEMS)]
    assert names_in(board, ".overview")[:8] == best_first
    heads = "document.querySelectorAll('.overview th button')"
    board.execute_script(f"{heads}[1].click()")
    assert names_in(board, ".overview")[:8] == best_first
    board.execute_script(f"{heads}[1].click()")
    found = names_in(board, ".overview")
    assert [name for name in found if name in SYSTEMS] == [*SYSTEMS]
    # the published one, .3014, is the lowest of all
    assert found[0] == "UNI2-h & co, UNETR"
    board.execute_script(f"{heads}[2].click()")
    # a system without a figure is last
    assert names_in(board, ".overview")[:2] == ["UNI2-h & co, UNETR", SYSTEMS[7]]


def test_leaderboard_filters_rows_and_curves(board: Any) -> None:
    assert search(board, "LORA uni") == "1 of 9"
    assert names_in(board, ".overview") == [SYSTEMS[7]]
    assert visible(board, ".chart .y0")
    assert not visible(board, ".chart .y1")
    assert search(board, "nothing like it") == "0 of 9"
    assert names_in(board, ".overview") == []
    assert search(board, "") == ""
    assert len(names_in(board, ".overview")) == 9
    click(board, "published")
    assert names_in(board, ".overview") == [*reversed(SYSTEMS)]
    assert board.get_log("browser") == []


def test_classes_are_shown_on_request(board: Any) -> None:
    assert not visible(board, "td.of-class")
    click(board, "classes")
    assert visible(board, "td.of-class")
    assert visible(board, "th.of-class")


def test_the_legend_shows_and_hides_a_system_in_all_charts(board: Any) -> None:
    """Six of eight at first; the same system on two boards has one switch."""
    seen = "return [...document.querySelectorAll('.chart')].map((c) => [...c.querySelectorAll("
    seen += "'g')].filter((g) => g.getClientRects().length).map((g) => g.dataset.words))"
    charts = board.execute_script(seen)
    # share of data, domains, parameters, time; of a single system there are no costs to compare
    assert len(charts) == 4 + 2
    for chart in charts[:4]:
        assert sorted(chart) == sorted(SYSTEMS[2:])
    assert charts[4:] == [[SYSTEMS[7]]] * 2
    click(board, "y0")
    click(board, "y7")
    # numbered from the best: 0 is the last of the names, 7 the first
    charts = board.execute_script(seen)
    for chart in charts[:4]:
        assert sorted(chart) == sorted([*SYSTEMS[2:7], SYSTEMS[0]])
    assert charts[4:] == [[], []]
    both = "return [...document.querySelectorAll('.legend input[value=y0]')].map((e) => e.checked)"
    assert board.execute_script(both) == [False, False]


def test_failures_and_differences_can_be_read(board: Any) -> None:
    text = board.execute_script("return document.body.innerText")
    assert "loss is nan at step 3" in text
    assert "Differences: shown for 7 of 7 pairs of systems" in text
    shown = "return document.querySelector('details.differences table').checkVisibility()"
    assert not board.execute_script(shown)
    board.execute_script("document.querySelector('details.differences summary').click()")
    assert board.execute_script(shown)
