"""Counts, areas, densities, shares and times as readers want them: few digits, thousands apart."""

from __future__ import annotations

import math

from celltyper.report.html import DASH


def amount(value: float | None) -> str:
    """Three digits that count, thousands set apart, a dash for what is not known.

    Examples
    --------
    >>> amount(1234567.8), amount(45.678), amount(4.5678), amount(0.012345), amount(0), amount(None)
    ('1,234,568', '45.7', '4.57', '0.0123', '0', '–')
    """  # noqa: RUF002
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    # as many decimals as the rounded value needs: 99.96 is 100, not 100.0
    power = math.floor(math.log10(abs(float(f"{value:.3g}"))))
    return f"{value:,.{max(0, 2 - power)}f}"


def percent(share: float | None) -> str:
    """A share with one decimal; what is not nothing and not all never reads as 0 or 100.

    Examples
    --------
    >>> percent(0.1234), percent(0.0), percent(0.0002), percent(0.9999), percent(1.0)
    ('12.3 %', '0 %', '< 0.1 %', '> 99.9 %', '100 %')
    """
    if share is None or not math.isfinite(share):
        return DASH
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    if share < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if share >= 0.9995 else f"{100 * share:.1f} %"


def duration(seconds: float | None) -> str:
    """A time in its two largest units.

    Examples
    --------
    >>> duration(4.25), duration(75), duration(3725), duration(7199.9)
    ('4.2 s', '1 min 15 s', '1 h 2 min', '2 h 0 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def length(microns: float, known: bool = True) -> str:
    """A length in micrometres below a millimetre, else in millimetres; in pixels if not `known`.

    Examples
    --------
    >>> length(200.0), length(2000.0), length(2000.0, known=False)
    ('200 µm', '2 mm', '2,000 px')
    """
    if not known:
        return f"{microns:,g} px"
    return f"{microns:g} µm" if microns < 1000 else f"{microns / 1000:g} mm"


def ratio(part: float, whole: float | None) -> float:
    """A share or a density, NaN where there is nothing to divide by."""
    return part / whole if whole else math.nan
