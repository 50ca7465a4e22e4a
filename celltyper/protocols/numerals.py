"""Figures as text: in cells of CSV and Markdown, and in the columns of a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from celltyper.metrics.bootstrap import PairedDifference


class Figure(Protocol):
    """A score over several runs; NaN where it is not known."""

    @property
    def mean(self) -> float:
        """Over runs."""
        ...

    @property
    def deviation(self) -> float:
        """Over runs, with n - 1."""
        ...

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        ...

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        ...


def digits(value: float) -> str:
    """Six digits for a CSV, nothing if it is not known."""
    return "" if math.isnan(value) else f"{value:.6g}"


def line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def with_interval(value: float, low: float, high: float, deviation: float = math.nan) -> str:
    """``0.712 ± 0.020 (0.690 to 0.735)``, without what is not known."""
    if math.isnan(value):
        return "-"
    spread = "" if math.isnan(deviation) else f" ± {deviation:.3f}"
    ends = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
    return f"{value:.3f}{spread}{ends}"


def markdown_figure(f: Figure) -> str:
    """Mean, deviation and interval."""
    return with_interval(f.mean, f.low, f.high, f.deviation)


def markdown_difference(p: PairedDifference) -> str:
    """Signed difference, its interval and p-value."""
    if math.isnan(p.difference):
        return "-"
    interval = "" if math.isnan(p.low) else f" ({p.low:+.3f} to {p.high:+.3f}; p {p.p_value:.2g})"
    return f"{p.difference:+.3f}{interval}"


def short(value: float) -> str:
    """Three decimals without the leading zero."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def signed(value: float) -> str:
    """As `short`, with its sign."""
    return "-" if math.isnan(value) else ("+" if value >= 0 else "") + short(value)


def mean_and_deviation(f: Figure) -> str:
    """``.712±.020``."""
    return short(f.mean) + ("" if math.isnan(f.deviation) else f"±{short(f.deviation)}")


def ends(f: Figure) -> str:
    """``.690-.735``."""
    return "" if math.isnan(f.low) else f"{short(f.low)}-{short(f.high)}"


def signed_ends(p: PairedDifference) -> str:
    """``-.010 +.025``."""
    return "" if math.isnan(p.low) else f"{signed(p.low)} {signed(p.high)}"
