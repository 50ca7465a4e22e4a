"""How often names are right where unsure cells are left without one, as a table."""

from __future__ import annotations

from collections.abc import Iterable

from celltyper.report.data import Table

Row = tuple[float, float, float, float]
"""Share of the validation cells, threshold, share of these cells, accuracy of their names."""


def coverage_table(found: Iterable[Row], kind: str = "cells") -> Table:
    """Table of thresholds, what they leave, and how good that is.

    Parameters
    ----------
    found : iterable of (float, float, float, float)
        Such as `celltyper.evaluation.Selected`.
    kind : str
        What has the names, in the plural.

    Returns
    -------
    Table
    """
    caption = (
        f"With celltyper infer --abstain SHARE, {kind} of a lower class probability than the "
        f"threshold are unknown. It was chosen so that the given share of the validation {kind} "
        f"keeps a name; beside it, the share of the {kind} here, and how many of those are right."
    )
    columns = ["of validation", "threshold", "named here", "accuracy of names"]
    return Table(columns, [[f"{wanted:.0%}", *rest] for wanted, *rest in found], caption)
