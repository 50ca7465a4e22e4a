"""The page of a slide: what was found on it, how much, and where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
import yaml
from numpy.typing import NDArray

from celltyper.atomic import write_text
from celltyper.cells.colors import UNTYPED
from celltyper.errors import DataError
from celltyper.report.amounts import amount, duration, length, percent, ratio
from celltyper.report.data import Report
from celltyper.report.density import (
    Cells,
    Tally,
    View,
    densities,
    read_batches,
    tally,
    tissue_in,
    tissue_view,
    whole_view,
)
from celltyper.report.figures import jpeg_uri
from celltyper.report.heat import classes_png, contour_path, faded, gradient, heat_png
from celltyper.report.html import DASH, page_template
from celltyper.report.overlay import scale_bar
from celltyper.report.plots import ticks
from celltyper.slides import Slide, TissueMask
from celltyper.tiling import Region

FILES = {
    "cells.parquet": "all cells: place, outline, phenotype, probabilities, shape and stain",
    "cells.csv": "the same as text, without outlines",
    "cells.geojson": "outlines for QuPath: drop the file on the open slide",
    "cells.geojson.gz": "outlines for QuPath, compressed: drop the file on the open slide",
    "slide.json": "facts and settings of this run",
}
"""Files beside the page that it links to: the last, and of the others those that are there."""

DAMAGED_SHOWN = 12
"""Damaged tiles whose position the page writes out."""

_SHOWN = 0.995
_MOST_CLASSES = 255


class Row(NamedTuple):
    """Cells of one phenotype, or of all."""

    number: int
    """Of the class from 1, 0 for all cells."""
    name: str
    cells: int
    share: float
    density: float
    """Per square millimetre of tissue."""
    area_um2: float
    """Median."""
    probability: float
    """Mean."""


class Map(NamedTuple):
    """A density, ready for the page."""

    number: int
    """Of the class from 1, 0 for all cells."""
    cells: int
    png: str
    ticks: list[tuple[float, str]]
    """Place in percent of the color bar, and what is written there."""
    note: str


class Maps(NamedTuple):
    """What is drawn over the slide."""

    dominant: str
    """Most frequent phenotype, as data URI."""
    shown: list[int]
    """Numbers of the classes that it shows."""
    densities: list[Map]
    """Of all cells, then of every phenotype."""
    absent: list[str]
    """Phenotypes without a cell in the tissue."""


class Picture(NamedTuple):
    """What all drawings of one view share."""

    width: int
    height: int
    ratio: float
    """Width by height on the glass."""
    bar: float
    """Length of the scale bar in percent of the width."""
    bar_text: str
    tissue: str
    """Outline as path data."""
    damaged: list[tuple[float, float, float, float]]
    """Column, row, width and height."""


def write_slide_report(
    path: Path,
    *,
    slide: Slide,
    tissue: TissueMask,
    cells: Path | Iterable[Cells],
    facts: Mapping[str, Any],
) -> None:
    """Write the report of a slide as one HTML file: no address outside it, opens from disk.

    Parameters
    ----------
    path : Path
        File to write; appears only when complete. It links to the `FILES` beside it.
    slide : Slide
        For its pictures.
    tissue : TissueMask
        Where cells were looked for.
    cells : Path or iterable of Cells
        ``cells.parquet``, or its cells in batches; read once, in memory that does not grow.
    facts : mapping
        What ``slide.json`` holds.

    Raises
    ------
    DataError
        If the cells are not those of the slide and the facts, or the folder cannot be written.
    """
    classes = [str(name) for name in facts["classes"]]
    if len(classes) > _MOST_CLASSES:
        raise DataError(f"{path}: a page shows {_MOST_CLASSES} classes, not {len(classes)}")
    whole, view = whole_view(slide), tissue_view(slide, tissue)
    batches = read_batches(cells, classes) if isinstance(cells, Path) else cells
    found = tally(batches, len(classes), view, tissue)
    total = int(found.cells.sum())
    if total != facts["cells"]:
        raise DataError(
            f"{path}: {total:,} cells in the table, {facts['cells']:,} by slide.json; these are of "
            "two runs, infer the slide again"
        )
    report = Report(
        title=str(facts["name"]),
        classes=classes,
        colors=list(facts["colors"]),
        warnings=_warnings(facts, found),
        facts=_run(facts, tissue),
        config=yaml.safe_dump(dict(facts["settings"]), sort_keys=False, allow_unicode=True)
        if facts["settings"]
        else "",
    )
    damaged = [Region(*region) for region in facts["damaged"]]
    inside = tissue_in(tissue, whole)
    overview = whole.read(slide)
    near = inside if view == whole else tissue_in(tissue, view)
    maps = _maps(found, near, view, report)
    ground = faded(overview if view == whole else view.read(slide)) if maps else None
    known = facts["mpp"] is not None
    unit = "mm²" if known else "Mpx"
    area = float(facts["tissue"]["area_mm2"]) if known else tissue.pixels / 1e6
    rows = [_row(k, name, found, area) for k, name in enumerate(classes, start=1)]
    picture = _picture(whole, tissue, inside, damaged)
    text = page_template("slide.html.j2").render(
        report=report,
        names=["all cells", *classes],
        colors=[UNTYPED, *report.colors],
        lead=_lead(facts),
        figures=[
            ("cells", f"{total:,}"),
            (f"{unit} of tissue", amount(area)),
            (f"cells per {unit} of tissue", amount(ratio(total, area))),
        ],
        unit=unit,
        dash=DASH,
        rows=rows,
        all_cells=_row(0, "all cells", found, area),
        parts=[(row.number, row.name, row.share, percent(row.share)) for row in rows],
        amount=amount,
        percent=percent,
        whole=picture,
        overview=jpeg_uri(overview),
        cut=None if view == whole else whole.rectangle(view.grid.on_slide(view.region)),
        view=picture if view == whole else _picture(view, tissue, near, damaged),
        ground="" if ground is None else jpeg_uri(ground),
        paper=0 if ground is None else int(ground[near].mean()),
        maps=maps,
        window=length(float(f"{view.bandwidth:.2g}"), known),
        gradient=gradient(),
        files={
            name: what
            for name, what in FILES.items()
            # what is written last, after this page, is not there yet
            if name == "slide.json" or (path.parent / name).is_file()
        },
    )
    write_text(path, text)


def _row(number: int, name: str, found: Tally, area: float) -> Row:
    which = slice(number - 1, number) if number else slice(None)
    n, total = int(found.cells[which].sum()), int(found.cells.sum())
    probability = ratio(float(found.probability_sum[which].sum()), n)
    median = found.median_area(which)
    return Row(number, name, n, ratio(n, total), ratio(n, area), median, probability)


def _maps(found: Tally, inside: NDArray[np.bool_], view: View, report: Report) -> Maps | None:
    """Draw the densities, None where there is not a cell in the tissue."""
    everything = np.where(inside, np.float32(0), np.float32(np.nan))
    most, first = np.zeros(view.shape, np.float32), np.zeros(view.shape, np.uint8)
    maps: list[Map] = []
    absent: list[str] = []
    every = densities(found.counts, inside, view)
    for k, (name, values) in enumerate(zip(report.classes, every, strict=True), start=1):
        if not (values > 0).any():
            absent.append(name)
            continue
        maps.append(_map(k, int(found.cells[k - 1]), values, view))
        everything += values
        first[values > most] = k
        most = np.fmax(most, values)
    if not maps:
        return None
    # less than one cell in the window says nothing of what is frequent there
    window = 4 * math.pi * (view.bandwidth / 1000) ** 2
    first[~(everything * window >= 1)] = 0
    maps.insert(0, _map(0, int(found.cells.sum()), everything, view))
    shown = np.unique(first[first > 0]).tolist()
    return Maps(classes_png(first, report.colors), shown, maps, absent)


def _map(number: int, cells: int, values: NDArray[np.float32], view: View) -> Map:
    marks = ticks(0, float(np.quantile(values[values > 0], _SHOWN)), 4)
    top = marks[-1]
    row, col = np.unravel_index(np.nanargmax(values), values.shape)
    peak = float(values[row, col])
    x = (view.region.col + int(col) + 0.5) * view.grid.scale_x
    y = (view.region.row + int(row) + 0.5) * view.grid.scale_y
    unit = "Mpx" if view.asked is None else "mm²"
    texts = [f"{mark:,g}" for mark in marks]
    if peak > top:
        texts[-1] = f"≥ {texts[-1]}"
    places = [(100 * mark / top, text) for mark, text in zip(marks, texts, strict=True)]
    note = f"Highest {amount(peak)} per {unit} at x {x:,.0f}, y {y:,.0f}."
    return Map(number, cells, heat_png(values, top), places, note)


def _picture(
    view: View, tissue: TissueMask, inside: NDArray[np.bool_], damaged: Sequence[Region]
) -> Picture:
    width, height = view.microns
    bar = scale_bar(width, 1.0)
    coarse = 0.0 if tissue.outline is not None else tissue.scale[0] / view.grid.scale_x
    outline = contour_path(inside, max(0.5, 0.75 * coarse))
    marks = [view.rectangle(region) for region in damaged]
    return Picture(
        view.shape[1],
        view.shape[0],
        width / height,
        100 * bar / width,
        length(bar, view.asked is not None),
        outline,
        marks,
    )


def _warnings(facts: Mapping[str, Any], found: Tally) -> list[str]:
    """What the run said, where the slide is damaged, and what the page's own numbers say."""
    warnings = [str(text) for text in facts["warnings"]]
    total = int(found.cells.sum())
    if facts["damaged"]:
        warnings.append(_damage(facts["damaged"], facts["mpp"]))
    if found.outside > total / 1000:
        warnings.append(
            f"{found.outside:,} cells ({percent(found.outside / total)}) lie outside the tissue. "
            "They are counted in the tables, also in the densities, but not in the maps."
        )
    return warnings


def _damage(damaged: Sequence[Sequence[int]], mpp: Sequence[float] | None) -> str:
    boxes = [
        shapely.box(col, row, col + width, row + height) for row, col, height, width in damaged
    ]
    area = shapely.union_all(boxes).area * (mpp[0] * mpp[1] if mpp else 1) / 1e6
    places = "; ".join(
        f"x {col:,}, y {row:,} ({width:,} x {height:,} px)"
        for row, col, height, width in damaged[:DAMAGED_SHOWN]
    )
    rest = len(damaged) - DAMAGED_SHOWN
    return f"Damaged, {amount(area)} {'mm²' if mpp else 'Mpx'} in all: {places}" + (
        f"; and {rest:,} more, listed in slide.json." if rest > 0 else "."
    )


def _lead(facts: Mapping[str, Any]) -> str:
    width, height = facts["width"], facts["height"]
    parts = [str(facts["format"]), f"{width:,} x {height:,} px"]
    if facts["mpp"] is None:
        parts.append("resolution not known")
    else:
        x, y = facts["mpp"]
        same = f"{x:.4g}" == f"{y:.4g}"
        parts.append(f"{amount(width * x / 1000)} x {amount(height * y / 1000)} mm")
        parts.append(f"{x:.4g} µm per pixel" if same else f"{x:.4g} x {y:.4g} µm per pixel")
    if facts["magnification"]:
        parts.append(f"{facts['magnification']:g}x objective")
    return " · ".join(parts)


def _run(facts: Mapping[str, Any], tissue: TissueMask) -> dict[str, str]:
    mpp, model_mpp, seconds = facts["mpp"], facts["model_mpp"], facts["seconds"]
    shown = {"slide": str(facts["path"])}
    row, col = facts["bounds"][:2]
    if row or col:
        shown["place in the file"] = f"begins at x {col:,}, y {row:,}; positions count from there"
    seen = tissue.pixels * (mpp[0] * mpp[1] / model_mpp**2 if mpp and model_mpp else 1) / 1e6
    card = facts.get("model_card")
    return shown | {
        "tissue": _how(facts["tissue"]),
        "model": str(facts["model"] or "not stated"),
        **({"model card": str(card)} if card else {}),
        "read at": f"{model_mpp:.4g} µm per pixel" if model_mpp else "full resolution",
        "tiles": f"{facts['tiles']:,}",
        "time": f"{duration(seconds)}, {amount(ratio(seen, seconds))} Mpx of tissue a second",
        "celltyper": str(facts["celltyper"]),
    }


def _how(tissue: Mapping[str, Any]) -> str:
    if tissue["source"] != "otsu":
        return str(tissue["source"])
    return f"found by color: saturation above {tissue['threshold']:.3g} (Otsu)"
