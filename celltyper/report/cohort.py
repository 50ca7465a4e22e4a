"""All slides of a run: a page that can be sorted, and a table with one row a slide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pyarrow as pa
import pyarrow.csv

from celltyper.atomic import atomic_path, write_text
from celltyper.report.amounts import amount, duration, percent, ratio
from celltyper.report.data import Report
from celltyper.report.html import DASH, page_template

Facts = Mapping[str, Any]


class Line(NamedTuple):
    """A slide in the tables, or all of them."""

    name: str
    link: str
    """Address of its report, empty where there is none."""
    cells: int
    area_mm2: float
    density: float
    counts: list[int | None]
    """Of every class; None for one that its model does not know."""
    densities: list[float]
    shares: list[tuple[int, str, float, str]]
    """Number, name and share of every class, and the share as text."""
    warnings: list[str]
    seconds: float


def write_cohort_report(path: Path, slides: Sequence[Facts], failed: Sequence[Facts]) -> None:
    """Write the page of a run over many slides: one HTML file that links to their reports.

    Parameters
    ----------
    path : Path
        File to write; appears only when complete.
    slides : sequence of mapping
        What every ``slide.json`` holds; ``folder``, where given, is that of the slide's results
        as seen from the page, else its name.
    failed : sequence of mapping
        ``name``, ``path`` and ``error`` of every slide without results.

    Raises
    ------
    DataError
        If the folder cannot be written.
    """
    colors = _colors(slides)
    classes = list(colors)
    lines = [_line(path, slide, classes) for slide in slides]
    many = len(slides) + len(failed)
    report = Report(
        title="1 slide" if many == 1 else f"{many:,} slides",
        classes=classes,
        colors=list(colors.values()),
        warnings=_warnings(lines, failed),
        facts=_run(slides),
    )
    total = _total(lines, classes)
    text = page_template("cohort.html.j2").render(
        report=report,
        names=["all cells", *classes],
        colors=["", *report.colors],
        dash=DASH,
        figures=[
            ("slides with results", f"{len(slides):,}"),
            ("cells", f"{total.cells:,}"),
            ("mm² of tissue", amount(total.area_mm2)),
            ("cells per mm² of tissue", amount(total.density)),
        ],
        lines=lines,
        total=total,
        failed=failed,
        amount=amount,
        duration=duration,
    )
    write_text(path, text)


def cohort_table(slides: Sequence[Facts], failed: Sequence[Facts] = ()) -> pa.Table:
    """One row per slide.

    Parameters
    ----------
    slides, failed : sequence of mapping
        As of `write_cohort_report`; of the failed only name, path and error are known.

    Returns
    -------
    pyarrow.Table
        ``name``, ``path``, ``mpp_x`` and ``mpp_y`` (micrometres per pixel), ``tissue_mm2``,
        ``cells``, ``per_mm2`` (of tissue), ``n_`` and ``per_mm2_`` of every class, ``damaged``
        (tiles), ``warnings`` (their number), ``seconds``, ``error``. Null is what is not known,
        such as a density without tissue or a class that the slide's model does not have.
    """
    classes = list(_colors(slides))
    rows: list[dict[str, Any]] = []
    for slide in slides:
        area = _area(slide)
        x, y = slide["mpp"] or (None, None)
        row: dict[str, Any] = {
            "name": slide["name"],
            "path": slide["path"],
            "mpp_x": x,
            "mpp_y": y,
            "tissue_mm2": _known(area),
            "cells": slide["cells"],
            "per_mm2": _known(ratio(slide["cells"], area)),
            "damaged": len(slide["damaged"]),
            "warnings": len(slide["warnings"]),
            "seconds": slide["seconds"],
        }
        for name, n in zip(classes, _counts(slide, classes), strict=True):
            row[f"n_{name}"] = n
            row[f"per_mm2_{name}"] = None if n is None else _known(ratio(n, area))
        rows.append(row)
    rows += [{key: str(one[key]) for key in ("name", "path", "error")} for one in failed]
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    schema = pa.schema(
        [
            ("name", text),
            ("path", text),
            ("mpp_x", real),
            ("mpp_y", real),
            ("tissue_mm2", real),
            ("cells", whole),
            ("per_mm2", real),
            *((f"n_{name}", whole) for name in classes),
            *((f"per_mm2_{name}", real) for name in classes),
            ("damaged", whole),
            ("warnings", whole),
            ("seconds", real),
            ("error", text),
        ]
    )
    return pa.Table.from_pylist(rows, schema)


def write_cohort_csv(path: Path, slides: Sequence[Facts], failed: Sequence[Facts]) -> None:
    """Write `cohort_table` as CSV, atomically; null is an empty field."""
    with atomic_path(path) as temporary:
        pyarrow.csv.write_csv(cohort_table(slides, failed), temporary)


def _colors(slides: Sequence[Facts]) -> dict[str, str]:
    """Color of every class that a slide has, in the order of their first appearance."""
    colors: dict[str, str] = {}
    for slide in slides:
        for name, color in zip(slide["classes"], slide["colors"], strict=True):
            colors.setdefault(name, color)
    return colors


def _area(slide: Facts) -> float:
    """Square millimetres of tissue, NaN where the resolution is not known."""
    area = slide["tissue"]["area_mm2"]
    return math.nan if area is None else float(area)


def _counts(slide: Facts, classes: Sequence[str]) -> list[int | None]:
    return [slide["counts"].get(c, 0) if c in slide["classes"] else None for c in classes]


def _line(path: Path, slide: Facts, classes: Sequence[str]) -> Line:
    area, cells = _area(slide), int(slide["cells"])
    counts = _counts(slide, classes)
    folder = str(slide.get("folder", slide["name"]))
    there = (path.parent / folder / "report.html").is_file()
    return Line(
        str(slide["name"]),
        quote(f"{folder}/report.html") if there else "",
        cells,
        area,
        ratio(cells, area),
        counts,
        [math.nan if n is None else ratio(n, area) for n in counts],
        _shares(counts, classes),
        [str(text) for text in slide["warnings"]],
        float(slide["seconds"]),
    )


def _total(lines: Sequence[Line], classes: Sequence[str]) -> Line:
    """All slides as if they were one; densities are those of the tissue of known area."""
    measured = [line for line in lines if not math.isnan(line.area_mm2)]
    area = sum(line.area_mm2 for line in measured)
    densities = []
    for k in range(len(classes)):
        # of a class that some models do not have, only the tissue that was searched for it counts
        searched = [(n, line.area_mm2) for line in measured if (n := line.counts[k]) is not None]
        densities.append(ratio(sum(n for n, _ in searched), sum(part for _, part in searched)))
    counts: list[int | None] = [
        sum(line.counts[k] or 0 for line in lines) for k in range(len(classes))
    ]
    return Line(
        "all slides",
        "",
        sum(line.cells for line in lines),
        area,
        ratio(sum(line.cells for line in measured), area),
        counts,
        densities,
        _shares(counts, classes),
        [],
        sum(line.seconds for line in lines),
    )


def _shares(
    counts: Sequence[int | None], classes: Sequence[str]
) -> list[tuple[int, str, float, str]]:
    total = sum(n or 0 for n in counts)
    shares = [ratio(n or 0, total) for n in counts]
    return [
        (k, name, share, percent(share))
        for k, (name, share) in enumerate(zip(classes, shares, strict=True), start=1)
        if share > 0
    ]


def _warnings(lines: Sequence[Line], failed: Sequence[Facts]) -> list[str]:
    warnings = []
    if failed:
        one = len(failed) == 1
        warnings.append(
            f"{len(failed):,} {'slide' if one else 'slides'} failed and "
            f"{'is' if one else 'are'} in no figure of this page; see below."
        )
    for what, names in (
        ("Without cells", [line.name for line in lines if not line.cells]),
        ("With warnings", [line.name for line in lines if line.warnings]),
    ):
        if names:
            rest = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
            warnings.append(f"{what}: {', '.join(names[:10])}{rest}.")
    return warnings


def _run(slides: Sequence[Facts]) -> dict[str, str]:
    shown = {}
    for key in ("model", "model_card", "celltyper"):
        # of slides done by an earlier version, nothing is known of a card
        values = sorted({str(slide[key]) for slide in slides if slide.get(key)})
        if values:
            shown[key.replace("_", " ")] = ", ".join(values)
    return shown


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
