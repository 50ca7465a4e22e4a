"""The page of patch mode: one HTML file of scores, charts and mistakes, for a run or many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from celltyper.atomic import write_text
from celltyper.classification.gallery import (
    STYLE,
    Mistakes,
    confusion_table,
    domain_table,
    gallery,
)
from celltyper.classification.plots import (
    LINES,
    Curve,
    curve_of,
    precision_recall_chart,
    reliability_chart,
    roc_chart,
)
from celltyper.errors import DataError
from celltyper.metrics.calibration import calibration_gap
from celltyper.metrics.classification import AGREEMENT, PatchScores, Score
from celltyper.metrics.ranking import SPECIFICITY
from celltyper.metrics.scoring import patch_reliability
from celltyper.report.data import Cell, Metric, Table
from celltyper.report.html import DASH, Chart, page_template
from celltyper.types import Image

NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "sensitivity_at_specificity": f"sensitivity at specificity {SPECIFICITY:g}",
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "kappa": "quadratic kappa",
    "ece": "calibration error",
    "brier": "Brier score",
    "macro_auroc": "macro AUROC",
    "macro_f1": "macro F1",
}
"""Scores of `celltyper.metrics.classification.SCORES` as readers call them."""

OF_STRATA = ("balanced_accuracy", "auroc", "f1", "sensitivity", "specificity")
"""Scores of the table by agreement."""

KINDS = 6
"""Kinds of mistakes that the gallery shows."""


class Tested(NamedTuple):
    """What a model, or the runs of a protocol together, said of some windows."""

    labels: NDArray[np.intp]
    """True classes, shape (n,)."""
    probabilities: NDArray[np.float64]
    """Shape (n, K)."""
    scores: PatchScores
    """Of these windows, with `PatchScores.strata` where there are votes."""
    uncalibrated: NDArray[np.float64] | None = None
    """Probabilities before calibration, shape (n, K), if there is one."""


class Crossed(NamedTuple):
    """Scores of every training domain on every test domain."""

    trained: Sequence[str]
    tested: Sequence[str]
    cells: Sequence[Sequence[Metric | None]]
    """By row and column."""
    chance: float
    """Score of guessing."""


@dataclass(frozen=True, eq=False)
class Section:
    """A heading and what is below it, in this order; what is empty is left out."""

    heading: str
    note: str = ""
    charts: Sequence[Chart] = ()
    html: Markup = field(default_factory=Markup)
    table: Table | None = None


@dataclass(frozen=True, eq=False)
class Page:
    """Everything on the page, from top to bottom; what is empty is left out.

    Parameters
    ----------
    title : str
        Heading of the page.
    interval : str
        What the intervals are, e.g. ``"95 % interval, bootstrap over 12 patients"``.
    lead : str
        What was done, below the title.
    notice : str
        What every reader must know before the numbers.
    warnings : sequence of str
        What went wrong or looked odd.
    metrics : sequence of Metric
        Headline figures, such as `metrics_of` gives.
    tables : mapping of str to Table
        Tables with intervals by heading.
    sections : sequence of Section
        Charts, confusion, domains, agreement and mistakes.
    facts : mapping of str to str
        What ran on what.
    config : str
        The resolved config as YAML.
    """

    title: str
    interval: str
    lead: str = ""
    notice: str = ""
    warnings: Sequence[str] = ()
    metrics: Sequence[Metric] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    sections: Sequence[Section] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    config: str = ""


def write_page(path: Path, page: Page) -> None:
    """Write a page as one HTML file: no address outside it, opens from disk.

    Parameters
    ----------
    path : Path
        File to write; appears only when complete.
    page : Page
        What to show.

    Raises
    ------
    DataError
        If the folder cannot be written.
    """
    template = page_template("patches.html.j2")
    text = template.render(report=page, dash=DASH, names=[], colors=[], style=Markup(STYLE))
    write_text(path, text)


def metrics_of(scores: PatchScores) -> list[Metric]:
    """Every score with its rule, for the head of a page.

    Parameters
    ----------
    scores : PatchScores

    Returns
    -------
    list of Metric
    """
    return [Metric(NAMES[n], *score, scores.rules[n]) for n, score in scores.scores.items()]


def sections_of(tested: Mapping[str, Tested]) -> list[Section]:
    """Curves, calibration, confusion and agreement of one or several sets of windows.

    Parameters
    ----------
    tested : mapping of str to Tested
        By the name of the model or the set, all of the same classes; curves, reliability and
        confusion are drawn of the first `LINES` of them.

    Returns
    -------
    list of Section
        Those for which there is something to show: no curves where all windows are of one class,
        no agreement without votes.
    """
    found = (of(tested) for of in (_curves, _calibration, _confusion, _agreement))
    return [section for section in found if section is not None]


def domain_section(scores: Mapping[str, Crossed]) -> Section:
    """Matrices of scores by training and test domain.

    Parameters
    ----------
    scores : mapping of str to Crossed
        By what they are of, such as ``"AUROC"``.

    Returns
    -------
    Section
    """
    parts = [
        Markup("<div><h3>{}</h3>{}</div>").format(
            name, domain_table(one.trained, one.tested, one.cells, chance=one.chance)
        )
        for name, one in scores.items()
    ]
    note = (
        "Rows: the domain that trained; columns: the domain that was tested. Small: deviation "
        "over runs or, of a single run, the 95 % interval. Shade: from chance, none, to 1."
    )
    html = Markup('<div class="stack">{}</div>').format(Markup("").join(parts))
    return Section("Trained on one domain, tested on the others", note, html=html)


def mistakes_section(
    kinds: Sequence[Mistakes],
    images: Mapping[int, Image] | None,
    names: Sequence[str],
    probabilities: ArrayLike,
    classes: Sequence[str],
    *,
    votes: ArrayLike | None = None,
    experts: ArrayLike | None = None,
    mpp: float | None = None,
    note: str = "",
) -> Section:
    """Gallery of the most certain mistakes or, without their pictures, a list of them.

    Parameters
    ----------
    kinds : sequence of Mistakes
        From `celltyper.classification.gallery.find_mistakes`; the most frequent `KINDS` are shown.
    images : mapping of int to ndarray of uint8, shape (H, W, 3), or None
        Window of every row in `kinds`; None if they are not to be had.
    names, probabilities, classes, votes, experts, mpp
        As in `celltyper.classification.gallery.gallery`.
    note : str
        What the reader must know, such as whose mistakes these are.

    Returns
    -------
    Section
    """
    shown, rest = kinds[:KINDS], kinds[KINDS:]
    if rest:
        others = sum(kind.total for kind in rest)
        note = f"{note} {others:,} mistakes of {len(rest)} rarer kinds are not shown.".strip()
    if images is not None:
        html = gallery(
            shown, images, names, probabilities, classes, votes=votes, experts=experts, mpp=mpp
        )
        return Section("Most certain mistakes", note, html=html)
    shares = np.asarray(probabilities, np.float64)
    rows: list[list[Cell]] = [
        [names[i], classes[kind.true], classes[kind.called], float(shares[i, kind.called])]
        for kind in shown
        for i in kind.rows.tolist()
    ]
    table = Table(["patch", "label", "called", "probability of the class called"], rows)
    return Section("Most certain mistakes", note, table=table if rows else None)


def _curves(tested: Mapping[str, Tested]) -> Section | None:
    curves: list[Curve] = []
    for name, one in tested.items():
        try:
            curves.append(curve_of(name, one.labels, one.probabilities, one.scores))
        except DataError:
            # Windows of a single class have no curve; their tables say so with dashes.
            continue
    if not curves:
        return None
    charts = roc_chart(curves), precision_recall_chart(curves)
    return Section("ROC and precision-recall", charts=charts)


def _calibration(tested: Mapping[str, Tested]) -> Section:
    charts = []
    for name, one in _first(tested):
        two = len(one.scores.classes) == 2
        positive = one.scores.classes[one.scores.positive]
        table = patch_reliability(one.labels, one.probabilities, one.scores.positive)
        chart = reliability_chart(table, positive if two else "", one.scores.scores["ece"])
        if one.uncalibrated is not None:
            table = patch_reliability(one.labels, one.uncalibrated, one.scores.positive)
            ece = Score(calibration_gap(table), math.nan, math.nan)
            before = reliability_chart(table, positive if two else "", ece)
            charts.append(before._replace(title=f"{before.title}, before calibration"))
            chart = chart._replace(title=f"{chart.title}, after calibration")
        charts.append(chart if len(tested) == 1 else chart._replace(title=name))
    return Section("Calibration", charts=charts, note=_not_shown(tested))


def _confusion(tested: Mapping[str, Tested]) -> Section:
    parts = []
    for name, one in _first(tested):
        heading = Markup("<h3>{}</h3>").format(name) if len(tested) > 1 else Markup("")
        # the rule of the accuracy says from which probability on a patch was called positive
        _, call = one.scores.rules["accuracy"].split("; ", 1)
        parts.append(
            Markup('<div>{}{}<p class="soft">Patches are {}.</p></div>').format(
                heading,
                confusion_table(one.scores.confusion, one.scores.classes),
                call if call.startswith("called") else f"called what is {call}",
            )
        )
    note = (
        "Rows are the labels, columns what was called; number of patches and share of the row. "
        f"Framed patches are right. {_not_shown(tested)}"
    )
    html = Markup('<div class="charts">{}</div>').format(Markup("").join(parts))
    return Section("Confusion", note, html=html)


def _agreement(tested: Mapping[str, Tested]) -> Section | None:
    """Table of scores by the experts' agreement."""
    several = len(tested) > 1
    rows: list[list[Cell]] = []
    for name, one in tested.items():
        for level in AGREEMENT:
            if level not in one.scores.strata:
                continue
            stratum = one.scores.strata[level]
            rows.append(
                [
                    f"{name}, {level}" if several else level,
                    stratum.patches,
                    int(stratum.confusion[stratum.positive].sum()),
                    *(metric_of(NAMES[n], stratum.scores[n]) for n in OF_STRATA),
                ]
            )
    if not rows:
        return None
    first = next(iter(tested.values())).scores
    caption = (
        "Unanimous: all experts chose one class; majority: more than half of them; split: neither. "
        "Patches that one expert alone saw are left out. F1, sensitivity and specificity are those "
        f"of {first.classes[first.positive]}; F1 depends on how rare it is in the stratum."
    )
    columns = ["agreement", "patches", f"of them {first.classes[first.positive]}"]
    table = Table([*columns, *(NAMES[n] for n in OF_STRATA)], rows, caption)
    return Section("By agreement of the experts", table=table)


def metric_of(name: str, score: Score) -> Metric:
    """Score with its interval as a cell of a table.

    Parameters
    ----------
    name : str
    score : Score

    Returns
    -------
    Metric
    """
    value, low, high = (None if math.isnan(part) else part for part in score)
    return Metric(name, value, low, high, "")


def _first(tested: Mapping[str, Tested]) -> Iterable[tuple[str, Tested]]:
    return list(tested.items())[:LINES]


def _not_shown(tested: Mapping[str, Tested]) -> str:
    rest = list(tested)[LINES:]
    return f"Not shown: {', '.join(rest)}." if rest else ""
