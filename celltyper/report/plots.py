"""Line charts and the reliability diagram as inline SVG that follows the page's colors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from celltyper.report.data import Reliability

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 12, 44
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")


def line_chart(title: str, x_label: str, series: Sequence[tuple[str, Points]]) -> Markup:
    """Chart of named lines over a common x axis, each with a dash pattern of its own.

    Parameters
    ----------
    title : str
        Read out by screen readers.
    x_label : str
        Name of the x axis.
    series : sequence of (str, points)
        Points ``(x, y)``, finite; a line of one point is drawn as a dot.

    Returns
    -------
    Markup
        An ``<svg>`` element; empty if there is no point. Names are escaped.
    """
    points = [point for _, line in series for point in line]
    if not points:
        return Markup("")
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    parts = [axes(x_ticks, y_ticks, x_label, "")]
    for i, (name, line) in enumerate(series):
        places = [place(x, y, x_ticks, y_ticks) for x, y in line]
        look = Markup('class="line s{}" stroke-dasharray="{}"').format(i % 6, DASHES[i % 6])
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            Markup('<polyline {} points="{}"><title>{}</title></polyline>').format(look, path, name)
        )
        if len(places) < 30:
            parts += [
                Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(
                    i % 6, x, y
                )
                for x, y in places
            ]
    return svg_of(title, Markup("").join(parts))


def line_key(index: int) -> Markup:
    """Short sample of line `index` of a chart, for the legend beside it."""
    return Markup(
        '<svg class="key" viewBox="0 0 30 8" aria-hidden="true">'
        '<path class="line s{}" stroke-dasharray="{}" d="M1 4h28"/></svg>'
    ).format(index % 6, DASHES[index % 6])


def reliability_diagram(table: Reliability) -> Markup:
    """Accuracy over confidence with the diagonal; dot areas grow with the cells in the bin.

    Parameters
    ----------
    table : Reliability
        Bins; empty ones are left out.

    Returns
    -------
    Markup
        An ``<svg>`` element.
    """
    unit = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    parts = [axes(unit, unit, "mean confidence", "accuracy")]
    x0, y0 = place(0, 0, unit, unit)
    x1, y1 = place(1, 1, unit, unit)
    parts.append(
        Markup('<path class="ideal" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(x0, y0, x1, y1)
    )
    count = np.asarray(table.cells)
    full = count > 0
    most = float(count.max(initial=1))
    places = [
        (*place(float(x), float(y), unit, unit), int(n))
        for x, y, n in zip(
            np.asarray(table.confidence)[full],
            np.asarray(table.accuracy)[full],
            count[full],
            strict=True,
        )
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    parts.append(Markup('<polyline class="line s0" points="{}"/>').format(path))
    for x, y, n in places:
        parts.append(
            Markup(
                '<circle class="dot s0" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">'
                "<title>{} cells</title></circle>"
            ).format(x, y, 2 + 6 * math.sqrt(n / most), n)
        )
    return svg_of("Reliability diagram: accuracy over confidence", Markup("").join(parts))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that span an interval: steps of 1, 2 or 5 times a power of ten.

    Parameters
    ----------
    low, high : float
        Ends of the interval, finite.
    most : int
        Largest number of steps.

    Returns
    -------
    list of float
        Ascending, at least two, the first at most `low` and the last at least `high`.

    Examples
    --------
    >>> ticks(0.13, 0.98)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:
        half = abs(low) / 2 or 0.5
        low, high = low - half, low + half
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        # Rounding noise must not add a step beyond an end that is itself a round number.
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def place(x: float, y: float, xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Place in the drawing of a point between the ends of both axes."""
    across = (x - xs[0]) / (xs[-1] - xs[0])
    up = (y - ys[0]) / (ys[-1] - ys[0])
    return (
        LEFT + across * (WIDTH - LEFT - RIGHT),
        HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
    )


def axes(
    xs: Sequence[float],
    ys: Sequence[float],
    x_label: str,
    y_label: str,
    x_names: Sequence[str] | None = None,
) -> Markup:
    """Axes with a tick at every given number and names; `x_names` in place of the numbers."""
    parts = []
    for value in ys:
        _, y = place(xs[0], value, xs, ys)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value, name in zip(xs, x_names or [f"{value:g}" for value in xs], strict=True):
        x, _ = place(value, ys[0], xs, ys)
        base = HEIGHT - BOTTOM
        parts.append(f'<path class="axis" d="M{x:.1f} {base}v4"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{escape(name)}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (WIDTH + LEFT - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    if y_label:
        centre = (HEIGHT - BOTTOM + TOP) / 2
        parts.append(
            f'<text transform="translate(13 {centre}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )
    return Markup("".join(parts))


def svg_of(title: str, body: Markup) -> Markup:
    """Drawing of the size of all charts."""
    frame = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return frame.format(WIDTH, HEIGHT, title, body)
