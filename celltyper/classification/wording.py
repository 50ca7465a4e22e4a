"""What an evaluation in patch mode says in words, on the terminal and on its page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

from celltyper.classification.evaluation import PatchEvaluation
from celltyper.datasets.dataset import listing
from celltyper.metrics.classification import PatchScores, Score

WIDTH = 80
NAMES = {
    "balanced_accuracy": "balanced acc.",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "sensitivity_at_specificity": "sens. at spec.",
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "kappa": "kappa",
    "ece": "ECE",
    "brier": "Brier",
    "macro_auroc": "macro AUROC",
    "macro_f1": "macro F1",
}
"""Names of scores that fit a column."""

PARTS = ("balanced_accuracy", "auroc", "auprc", "f1")
"""Scores of single strata and domains."""


def evaluation_text(found: PatchEvaluation) -> str:
    """Scores as tables for a terminal of 80 columns.

    Parameters
    ----------
    found : PatchEvaluation

    Returns
    -------
    str
    """
    scores = found.scores
    lines = [f"{'score':14}  value  95 % interval   rule"]
    for name, score in scores.scores.items():
        head = f"{NAMES[name]:14}  {_value(score)}  "
        lines += textwrap.wrap(head + scores.rules[name], WIDTH, subsequent_indent=" " * len(head))
    if found.singles:
        lines += ["", f"{len(found.runs)} models, each alone: mean ± deviation"]
        for name, spread in found.singles.items():
            lines.append(f"{NAMES[name]:14}  {_short(spread.mean)} ± {_short(spread.deviation)}")
    lines += _parts("agreement", scores.strata)
    lines += _parts("domain", found.domains)
    lines += ["", *_confusion(scores)]
    if found.differences:
        lines += ["", f"{'difference':14}  value  95 % interval       p"]
        for name, d in found.differences.items():
            lines.append(
                f"{NAMES[name]:14} {d.difference:+.3f}  {_bounds(d.low, d.high, '+.3f'):16}  "
                f"{_short(d.p_value)}"
            )
    lines += ["", f"positive: {scores.classes[scores.positive]}, {threshold_text(found)}"]
    lines.append(f"intervals: bootstrap over {scores.clusters:,} slides or patients")
    for warning in warnings_of(found):
        lines += textwrap.wrap(f"note: {warning}", WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def threshold_text(found: PatchEvaluation) -> str:
    """From where on a window is called positive, and who decided that."""
    if len(found.scores.classes) > 2:
        return "the most probable class is called"
    several = f" (mean of {len(found.runs)} models)" if found.singles else ""
    return f"called from {found.threshold:.3g} on{several}, as fixed in training"


def warnings_of(found: PatchEvaluation) -> list[str]:
    """What a reader must know before the figures."""
    facts, table = found.facts, found.table
    total, warnings = len(table), []
    if facts["seen_in_training"]:
        warnings.append(
            f"{facts['seen_in_training']:,} of these windows, or their slides, trained "
            f"{'one or more of the models' if found.singles else 'the model'}: this is no test."
        )
    if facts["failed"]:
        warnings.append(
            f"left out, for they could not be read: {listing(p['name'] for p in facts['failed'])}."
        )
    if facts["over_the_border"]:
        warnings.append(
            f"{facts['over_the_border']:,} of {total:,} windows reach over the border of their "
            "image; what lies outside is mirrored."
        )
    if total > 1 and len(set(table.groups)) == total:
        warnings.append(
            "No slides or patients are stated, so that single patches were drawn: the intervals "
            "say how sure the figures are for these patients, not for others."
        )
    return warnings


def _parts(what: str, parts: Mapping[str, PatchScores]) -> list[str]:
    if not parts:
        return []
    width = min(max(len(name) for name in (what, *parts)), 26)
    first = next(iter(parts.values()))
    positive = first.classes[first.positive][:10]
    head = "  ".join(f"{NAMES[name]:>5}" for name in PARTS)
    lines = ["", f"{what:{width}}  patches  {positive:>10}  {head}"]
    for name, scores in parts.items():
        cells = "  ".join(
            f"{_short(scores.scores[key].value):>{max(5, len(NAMES[key]))}}" for key in PARTS
        )
        rare = int(scores.confusion[scores.positive].sum())
        lines.append(f"{name[:width]:{width}}  {scores.patches:>7,}  {rare:>10,}  {cells}")
    return lines


def _confusion(scores: PatchScores) -> list[str]:
    """Patches by label and by what was called, as far as the columns fit."""
    names = [name[:12] for name in scores.classes]
    left = max(len("label"), *map(len, names))
    wide = [max(7, len(name)) for name in names]
    if left + sum(w + 2 for w in wide) > WIDTH:
        return [f"confusion: {len(names)} x {len(names)} classes, in metrics.json"]
    lines = [f"{'label':{left}}" + "".join(f"  {n:>{w}}" for n, w in zip(names, wide, strict=True))]
    for name, row in zip(names, scores.confusion.tolist(), strict=True):
        lines.append(
            f"{name:{left}}" + "".join(f"  {n:>{w},}" for n, w in zip(row, wide, strict=True))
        )
    lines[0] += "  called"
    return lines


def _value(score: Score) -> str:
    return f"{_short(score.value):>5}  {_bounds(score.low, score.high):14}"


def _bounds(low: float, high: float, form: str = ".3f") -> str:
    return "" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
