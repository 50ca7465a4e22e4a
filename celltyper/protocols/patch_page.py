"""The table of a protocol in patch mode as a page that needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import yaml
from markupsafe import Markup

from celltyper.classification.config import PatchData
from celltyper.classification.gallery import Mistakes
from celltyper.classification.page import (
    NAMES,
    Crossed,
    Page,
    Section,
    Tested,
    domain_section,
    mistakes_section,
    sections_of,
)
from celltyper.classification.plots import LINES, scaling_chart
from celltyper.classification.preparing import rows_of
from celltyper.errors import CelltyperError, DataError
from celltyper.metrics.bootstrap import PairedDifference
from celltyper.patches.reading import open_patches
from celltyper.patches.windows import read_header, read_patch
from celltyper.protocols.patch_pooling import pooled_mistakes
from celltyper.protocols.patch_table import HEADLINE, PatchFigure, PatchTableOfRuns
from celltyper.protocols.patch_wording import (
    PAIRED,
    configs_of,
    facts_of,
    interval_of,
    lead_of,
    notes_of,
    pooled_name,
    several_fractions,
    title_of,
    warnings_of,
)
from celltyper.report.data import Metric, Table
from celltyper.types import Image

COLUMNS = (*HEADLINE, "sensitivity", "specificity")
"""Scores of the page's tables; the others are in ``table.csv``."""

DRAWN = ("balanced_accuracy", "auroc")
"""Scores that are drawn over fractions and domains."""


def protocol_page(table: PatchTableOfRuns) -> Page:
    """Page of a protocol.

    Parameters
    ----------
    table : PatchTableOfRuns

    Returns
    -------
    Page
        With pictures of mistakes if the data are still where the config says.
    """
    tested = {
        pooled_name(table, variant): Tested(
            pooled.windows.labels, pooled.windows.probabilities, pooled.scores
        )
        for variant, pooled in table.pooled.items()
    }
    curves, *others = sections_of(tested)
    sections = [
        *_variants(table),
        replace(curves, note=f"{_pooling(table)} {curves.note}".strip()),
        *_scaling(table),
        *_domains(table),
        *others,
        _mistakes(table),
    ]
    one = len(table.rows) == 1
    config = next(iter(table.about["variants"].values()))
    return Page(
        title=f"celltyper protocol: {table.about['data']['name']}",
        interval=interval_of(table),
        lead=lead_of(table),
        warnings=warnings_of(table),
        metrics=_headline(table) if one else [],
        tables={} if one else _tables(table),
        sections=sections,
        facts=facts_of(table),
        config=yaml.safe_dump(config, sort_keys=False),
    )


def _headline(table: PatchTableOfRuns) -> list[Metric]:
    rules = table.first.scores.rules
    return [_metric(name, f, rules[name]) for name, f in table.rows[0].scores.items()]


def _tables(table: PatchTableOfRuns) -> dict[str, Table]:
    names = [NAMES[name] for name in COLUMNS]
    shares = several_fractions(table)
    tables = {
        "Scores": Table(
            ["", "runs", *(["share"] if shares else []), *names],
            [
                [
                    title_of(table, row) or "all",
                    row.runs if row.runs == row.planned else f"{row.runs} of {row.planned}",
                    *([row.reached] if shares else []),
                    *(_metric(name, row.scores[name]) for name in COLUMNS),
                ]
                for row in table.rows
            ],
            "\n".join(note for note in notes_of(table) if note != PAIRED),
        )
    }
    if table.differences:
        tables["Differences to the first variant"] = Table(
            ["", "runs", *(column for name in HEADLINE for column in (NAMES[name], "p"))],
            [
                [
                    f"{title_of(table, d)}, less {d.first}",
                    d.runs,
                    *(cell for name in HEADLINE for cell in _difference(name, d.scores[name])),
                ]
                for d in table.differences
            ],
            PAIRED,
        )
    return tables


def _difference(name: str, p: PairedDifference) -> tuple[Metric, float]:
    return Metric(NAMES[name], p.difference, p.low, p.high, ""), p.p_value


def _pooling(table: PatchTableOfRuns) -> str:
    """What was pooled for the charts."""
    windows = table.first.windows
    runs, tests = len(set(windows.runs)), len(windows.names)
    if runs == 1:
        return ""
    each = (
        "each window tested once"
        if tests == len(set(windows.names))
        else (f"{tests:,} tests of {len(set(windows.names)):,} windows")
    )
    largest = " at the largest fraction" if several_fractions(table) else ""
    return (
        f"Curves, calibration, confusion and agreement: test windows of all runs{largest} "
        f"together, {each}, at the threshold of its run. A score of them all differs a little "
        "from the mean over runs above."
    )


def _scaling(table: PatchTableOfRuns) -> list[Section]:
    """Scores over fractions, every run a dot, if there are several."""
    if not several_fractions(table):
        return []
    charts = []
    for name in DRAWN:
        lines: dict[str, dict[float, list[float]]] = {}
        for row in table.rows:
            line = lines.setdefault(row.variant or "mean over runs", {})
            line.setdefault(row.fraction, []).extend(row.scores[name].values)
        charts.append(scaling_chart(NAMES[name], lines))
    return [Section("Share of the training data", charts=charts)]


def _domains(table: PatchTableOfRuns) -> list[Section]:
    """Matrix of scores of every variant at the largest fraction, if a domain trained."""
    largest = max(row.fraction for row in table.rows)
    found: dict[str, Crossed] = {}
    for variant in list(table.pooled)[:LINES]:
        rows = [r for r in table.rows if (r.variant, r.fraction) == (variant, largest)]
        cell = {(r.trained_on, r.tested_on): r.scores for r in rows if r.trained_on}
        trained = list(dict.fromkeys(key[0] for key in cell))
        tested = list(dict.fromkeys([*trained, *sorted({key[1] for key in cell})]))
        for name in DRAWN if cell else ():
            scores = [
                [_metric(name, cell[a, b][name]) if (a, b) in cell else None for b in tested]
                for a in trained
            ]
            chance = 0.5 if name == "auroc" else 1 / len(table.classes)
            title = ", ".join(part for part in (variant, NAMES[name]) if part)
            found[title] = Crossed(trained, tested, scores, chance)
    return [domain_section(found)] if found else []


def _mistakes(table: PatchTableOfRuns) -> Section:
    """Gallery of the variant whose pooled balanced accuracy is the highest."""

    def balanced(variant: str) -> float:
        value = table.pooled[variant].scores.scores["balanced_accuracy"].value
        return -1.0 if math.isnan(value) else value

    variant = max(table.pooled, key=balanced)
    windows = table.pooled[variant].windows
    kinds = pooled_mistakes(windows, table.positive)
    notes = []
    if len(table.pooled) > 1:
        notes.append(f"Mistakes of {variant}, the variant with the highest balanced accuracy.")
    if len(set(windows.names)) < len(windows.names):
        notes.append("A window that several runs called wrong counts once.")
    data = configs_of(table)[variant].data
    images: Mapping[int, Image] | None
    try:
        images = read_pictures(data, windows.names, kinds)
        notes.append("The pictures are what the encoder is shown.")
    except (CelltyperError, OSError) as error:
        images = None
        notes.append(f"Without pictures, for the data cannot be read: {error}.")
    experts = bool((windows.experts > 1).any())
    return mistakes_section(
        kinds,
        images,
        windows.names,
        windows.probabilities,
        table.classes,
        votes=windows.votes if experts else None,
        experts=windows.experts if experts else None,
        mpp=data.mpp,
        note=" ".join(notes),
    )


def read_pictures(
    data: PatchData, names: Sequence[str], kinds: Sequence[Mistakes]
) -> dict[int, Image]:
    """Read the windows of mistakes as the encoder is shown them.

    Parameters
    ----------
    data : PatchData
        Resolved.
    names : sequence of str
        Of all windows.
    kinds : sequence of Mistakes
        Rows of `names`.

    Returns
    -------
    dict of int to ndarray of uint8, shape (size, size, 3)
        By row.

    Raises
    ------
    DataError, ConfigError
        If the data are not there any more, or have changed.
    """
    rows = sorted({i for kind in kinds for i in kind.rows.tolist()})
    if not rows:
        return {}
    if data.root is None or data.size is None:
        raise DataError("the config names none")
    whole = open_patches(
        data.root, classes=data.classes or None, reader=data.reader, images=data.images
    )
    gone = {names[i] for i in rows} - set(whole.names)
    if gone:
        raise DataError(f"{whole.path} has no window {min(gone)!r} any more")
    table = whole.take(rows_of(whole, [names[i] for i in rows]))
    if table.mpp is None and all(read_header(file).mpp is None for file in table.files):
        table = replace(table, mpp=data.mpp)
    return {row: read_patch(table, i, size=data.size, mpp=data.mpp) for i, row in enumerate(rows)}


def _variants(table: PatchTableOfRuns) -> list[Section]:
    """What every variant sets in place of the config."""
    chosen = table.about["protocol"]["variants"]
    if not chosen:
        return []
    row = Markup('<tr><th scope="row">{}</th><td>{}</td></tr>')
    rows = [
        row.format(name, ", ".join(f"{key}: {v}" for key, v in own.items()) or "as the config says")
        for name, own in chosen.items()
    ]
    html = Markup('<table class="facts"><tbody>{}</tbody></table>').format(Markup("").join(rows))
    return [Section("Variants", html=html)]


def _metric(name: str, f: PatchFigure, rule: str = "") -> Metric:
    value, deviation, low, high = (None if math.isnan(v) else v for v in f[:4])
    return Metric(NAMES[name], value, low, high, rule, deviation)
