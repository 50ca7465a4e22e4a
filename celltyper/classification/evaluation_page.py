"""The page of an evaluation in patch mode."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from celltyper import __version__
from celltyper.classification.evaluation import PatchEvaluation
from celltyper.classification.gallery import find_mistakes
from celltyper.classification.page import (
    NAMES,
    OF_STRATA,
    Page,
    Section,
    Tested,
    metric_of,
    metrics_of,
    mistakes_section,
    sections_of,
)
from celltyper.classification.wording import threshold_text, warnings_of
from celltyper.datasets.images import read_image
from celltyper.metrics.classification import PatchScores
from celltyper.patches.windows import read_header, read_patch
from celltyper.report.coverage import coverage_table
from celltyper.report.data import Cell, Metric, Table
from celltyper.types import Image

SHOWN = ("balanced_accuracy", "auroc", "auprc", "f1", "sensitivity", "specificity")
"""Scores of the table of models."""


def evaluation_page(found: PatchEvaluation) -> Page:
    """Everything that the page of an evaluation shows; windows of mistakes are read.

    Parameters
    ----------
    found : PatchEvaluation

    Returns
    -------
    Page
    """
    facts, scores, table = found.facts, found.scores, found.table
    tables = {}
    if found.singles:
        tables["Single models and their ensemble"] = _models(found)
    if found.domains:
        tables["By domain"] = _domains(found.domains)
    if found.by_coverage:
        tables["Names by coverage"] = coverage_table(found.by_coverage, "patches")
    if found.differences:
        tables["Compared with the other evaluation"] = _differences(found)
    name = "ensemble" if found.singles else found.runs[0]
    tested = {name: Tested(table.labels, found.mean, scores, found.uncalibrated)}
    several = "ensemble of " if found.singles else ""
    card = facts["model_card"]
    return Page(
        title=f"celltyper evaluation: {facts['data']['name']}",
        interval=f"95 % interval, bootstrap over {scores.clusters:,} slides or patients",
        notice=facts["data"]["notice"],
        warnings=warnings_of(found),
        metrics=metrics_of(scores),
        tables=tables,
        sections=[*sections_of(tested), _mistakes(found)],
        facts={
            "evaluated on": f"{facts['data']['path']}, {len(table):,} patches of "
            f"{scores.clusters:,} slides or patients",
            "model": f"{several}{', '.join(found.runs)} in {facts['model']}",
            **({"model card": card} if card else {}),
            "positive class": f"{facts['positive']}, {threshold_text(found)}",
            "window": f"{facts['size']} px at {facts['mpp'] or 'unknown'} µm a pixel, averaged "
            f"over {facts['symmetries']} symmetries",
            "device": facts["device"],
            "celltyper": __version__,
        },
        config=found.config,
    )


def _models(found: PatchEvaluation) -> Table:
    rows: list[list[Cell]] = [
        [name, *(found.singles[key].values[m] for key in SHOWN)]
        for m, name in enumerate(found.runs)
    ]
    spread: list[Cell] = [
        Metric(NAMES[key], found.singles[key].mean, None, None, "", found.singles[key].deviation)
        for key in SHOWN
    ]
    whole: list[Cell] = [metric_of(NAMES[key], found.scores.scores[key]) for key in SHOWN]
    caption = (
        "Every model at its own threshold, on all of these patches; mean ± standard deviation "
        "(n - 1) over models. Ensemble: the mean of their probabilities."
    )
    return Table(
        ["model", *(NAMES[key] for key in SHOWN)],
        [*rows, ["mean", *spread], ["ensemble", *whole]],
        caption,
    )


def _domains(domains: Mapping[str, PatchScores]) -> Table:
    first = next(iter(domains.values()))
    positive = first.classes[first.positive]
    rows: list[list[Cell]] = [
        [
            name,
            scores.patches,
            int(scores.confusion[scores.positive].sum()),
            *(metric_of(NAMES[key], scores.scores[key]) for key in OF_STRATA),
        ]
        for name, scores in domains.items()
    ]
    columns = ["domain", "patches", f"of them {positive}", *(NAMES[key] for key in OF_STRATA)]
    return Table(columns, rows)


def _differences(found: PatchEvaluation) -> Table:
    rows: list[list[Cell]] = [
        [NAMES[key], Metric(NAMES[key], d.difference, d.low, d.high, ""), d.p_value]
        for key, d in found.differences.items()
    ]
    caption = (
        f"This evaluation less {found.facts['against']}, on the same patches: paired bootstrap, "
        "both see the same drawn slides or patients."
    )
    return Table(["score", "difference", "p"], rows, caption)


def _mistakes(found: PatchEvaluation) -> Section:
    table = found.table
    positive = found.scores.positive
    kinds = find_mistakes(table.labels, found.mean, positive, threshold=found.threshold)
    images = {int(i): _picture(found, int(i)) for kind in kinds for i in kind.rows}
    several = bool((table.experts > 1).any())
    return mistakes_section(
        kinds,
        images,
        table.names,
        found.mean,
        table.classes,
        votes=table.votes if several else None,
        experts=table.experts if several else None,
        mpp=_mpp_of_pictures(found),
    )


def _picture(found: PatchEvaluation, i: int) -> Image:
    """A patch as it was annotated, or the window that the model saw around a point."""
    table, facts = found.table, found.facts
    if np.isnan(table.centers[i, 0]):
        return read_image(table.files[i]).image
    return read_patch(table, i, size=facts["size"], mpp=facts["mpp"])


def _mpp_of_pictures(found: PatchEvaluation) -> float | None:
    table = found.table
    whole = np.isnan(table.centers[:, 0])
    if not whole.any():
        return found.facts["mpp"] or table.mpp
    return (table.mpp or read_header(table.files[0]).mpp) if whole.all() else None
