"""Charts of many systems, each of which the page can show and hide: curves, profiles, costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from celltyper.report.plots import (
    BOTTOM,
    DASHES,
    RIGHT,
    TOP,
    WIDTH,
    axes,
    place,
    svg_of,
    ticks,
)

_ROW = 46
"""Height of a row of a profile."""

_SHAPES = (
    "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0",
    "M-3 -3h6v6h-6z",
    "M0 -4l4 7h-8z",
    "M0 -4.4l4.4 4.4l-4.4 4.4l-4.4 -4.4z",
    "M-4 -3h8l-4 7z",
    "M-1.3 -4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
)
COLORS = 6


class Point(NamedTuple):
    """A value with its interval; NaN where there is none."""

    x: float
    y: float
    low: float
    high: float


class Series(NamedTuple):
    """What is drawn of one system: color and mark follow from its number."""

    number: int
    name: str
    points: Sequence[Point]


def series_key(number: int) -> Markup:
    """Short sample of the line and the mark of a system, for the legend."""
    return Markup(
        '<svg class="key" viewBox="0 0 30 10" aria-hidden="true">'
        '<path class="line s{}" stroke-dasharray="{}" d="M1 5h28"/>{}</svg>'
    ).format(number % COLORS, _dashes(number), _mark(number, 15, 5))


def curve_chart(
    title: str, x_label: str, series: Sequence[Series], *, logarithmic: bool = False
) -> Markup:
    """Chart of y over x with intervals; points of a series are joined.

    Parameters
    ----------
    title : str
        Read out by screen readers.
    x_label : str
    series : sequence of Series
        Points with finite x and y; x above 0 if the axis is logarithmic.
    logarithmic : bool
        Of the x axis.

    Returns
    -------
    Markup
        An ``<svg>`` element; empty without points. Names are escaped.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return Markup("")
    across = [math.log10(p.x) if logarithmic else p.x for p in points]
    # in whole decades, so that every tick is a round number
    low, high = min(across), max(across)
    if logarithmic:
        xs = [
            float(i) for i in range(math.floor(low), max(math.ceil(high), math.floor(low) + 1) + 1)
        ]
    else:
        xs = ticks(low, high)
    ys = _ticks_of(points)
    names = [_short(10**x) for x in xs] if logarithmic else None
    parts = [axes(xs, ys, x_label, "", names)]
    for one in series:
        drawn = []
        for p in one.points:
            x, y = place(math.log10(p.x) if logarithmic else p.x, p.y, xs, ys)
            ends = [place(xs[0], end, xs, ys)[1] for end in (p.low, p.high) if math.isfinite(end)]
            drawn.append((x, y, [(x, end) for end in ends]))
        parts.append(_series(one, drawn))
    return svg_of(title, Markup("").join(parts))


def profile_chart(
    title: str, x_label: str, names: Sequence[str], series: Sequence[Series]
) -> Markup:
    """Chart of values with intervals in named rows; the points of a series are joined.

    Parameters
    ----------
    title : str
        Read out by screen readers.
    x_label : str
    names : sequence of str
        Of the rows, from the top.
    series : sequence of Series
        Of every point, `x` is the number of its row and `y` the value, finite.

    Returns
    -------
    Markup
        An ``<svg>`` element; empty without points. Names are escaped.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return Markup("")
    values, left = _ticks_of(points), 14
    height = TOP + _ROW * len(names) + BOTTOM
    base = height - BOTTOM

    def across(value: float) -> float:
        share = (value - values[0]) / (values[-1] - values[0])
        return left + share * (WIDTH - left - RIGHT)

    parts = []
    for value in values:
        x = across(value)
        parts.append(Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(x, TOP, base))
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>').format(
                x, base + 17, value
            )
        )
    for row, name in enumerate(names):
        parts.append(
            Markup('<text x="{}" y="{}">{}</text>').format(left, TOP + _ROW * row + 11, name)
        )
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            WIDTH / 2, height - 8, x_label
        )
    )
    lane = _ROW - 22
    for i, one in enumerate(series):
        shift = 16 + lane * (i + 0.5) / len(series)
        drawn = []
        for p in one.points:
            x, y = across(p.y), TOP + _ROW * p.x + shift
            drawn.append(
                (x, y, [(across(end), y) for end in (p.low, p.high) if math.isfinite(end)])
            )
        parts.append(_series(one, drawn))
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(WIDTH, height, title, Markup("").join(parts))


def _series(
    one: Series, drawn: Sequence[tuple[float, float, Sequence[tuple[float, float]]]]
) -> Markup:
    color = one.number % COLORS
    parts = []
    for _, _, ends in drawn:
        if len(ends) == 2:
            (x0, y0), (x1, y1) = ends
            parts.append(
                Markup('<path class="whisker s{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(
                    color, x0, y0, x1, y1
                )
            )
    if len(drawn) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in drawn)
        parts.append(
            Markup('<polyline class="line s{}" stroke-dasharray="{}" points="{}"/>').format(
                color, _dashes(one.number), path
            )
        )
    parts += [_mark(one.number, x, y) for x, y, _ in drawn]
    return Markup('<g class="y{}" data-words="{}"><title>{}</title>{}</g>').format(
        one.number, one.name, one.name, Markup("").join(parts)
    )


def _mark(number: int, x: float, y: float) -> Markup:
    shape = _SHAPES[number // COLORS % len(_SHAPES)]
    return Markup('<path class="dot s{}" transform="translate({:.1f} {:.1f})" d="{}"/>').format(
        number % COLORS, x, y, shape
    )


def _dashes(number: int) -> str:
    return DASHES[number // COLORS % len(DASHES)]


def _ticks_of(points: Sequence[Point]) -> list[float]:
    ends = [end for p in points for end in (p.y, p.low, p.high) if math.isfinite(end)]
    return ticks(min(ends), max(ends))


def _short(value: float) -> str:
    """``1 M`` for a million."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
