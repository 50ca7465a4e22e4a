"""What the leaderboard says in words: names, rules, verdicts."""

from __future__ import annotations

from celltyper.benchmark.leaderboard import LEVEL, Board, Leaderboard
from celltyper.classification.page import NAMES as PATCH_NAMES
from celltyper.evaluation import SCORES as CELL_SCORES
from celltyper.protocols.wording import CLASS_NAMES, NAMES

_CLASS_NAMES = {"cells": CLASS_NAMES, "patches": {"recall": "recall"}}


def score_name(task: str, score: str) -> str:
    """A score as readers call it."""
    if task == "patches":
        return PATCH_NAMES.get(score, score)
    return NAMES.get(score) or CLASS_NAMES.get(score, score)


def verdict(board: Board) -> str:
    """How many pairs of systems differ."""
    shown, pairs = sum(c.shown for c in board.comparisons), len(board.comparisons)
    which = "pair" if pairs == 1 else "pairs"
    return f"Differences: shown for {shown} of {pairs} {which} of systems"


def comparison_rule(board: Board) -> str:
    """How the systems of a board were compared."""
    pairs = len(board.comparisons)
    return (
        f"{score_name(board.task, board.score)}, mean over the runs that both systems have "
        f"finished; paired bootstrap of {board.resamples:,} resamples: both see the same drawn "
        f"patients, slides or fields, in all runs. P-values are corrected for all {pairs} pairs of "
        f"this table (Holm); below {LEVEL:g} a difference is shown."
    )


def overview_note(found: Leaderboard) -> str:
    """What the cells of the overview are."""
    text = (
        "Mean ± standard deviation over runs (test parts x seeds) and 95 % interval, at the "
        "largest share of the training data. Bold: no other system is shown to be better there."
    )
    if any(board.published for board in found.boards):
        text += " Published figures are as printed, and not compared."
    return text


def rules_of(found: Leaderboard) -> list[str]:
    """How every figure was computed."""
    rules = [
        "Value: mean and standard deviation (n - 1) over runs, that is test parts x seeds; where "
        "domains are left out of images, unweighted mean over the domains.",
        "Interval: 95 %, percentiles of a bootstrap over patients, slides or fields, with all runs "
        "of an image together. Where these are fewer than eight, blocks of images of cells are "
        "drawn: then they say how sure figures are for these images, not for other patients.",
        "Place: one more than the number of systems that are shown to be better.",
    ]
    tasks = {board.task for board in found.boards}
    if "cells" in tasks:
        radius = "3 um (12 px where the resolution is unknown)"
        rules += [f"{NAMES[name]}: {CELL_SCORES[name].format(radius=radius)}." for name in NAMES]
    if "patches" in tasks:
        rules.append(
            "Patches are called at the threshold that validation windows of the run chose; recall "
            "of the positive class is its sensitivity. Rules of all scores: docs/metrics.md."
        )
    for source, doi in dict.fromkeys((p.source, p.doi) for b in found.boards for p in b.published):
        rules.append(f"Published: {source}, doi:{doi}.")
    return rules
