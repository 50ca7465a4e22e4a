"""Charts of patch mode: ROC, precision-recall, reliability and scaling, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from celltyper.errors import DataError
from celltyper.metrics.calibration import ReliabilityTable
from celltyper.metrics.classification import PatchScores, Score
from celltyper.metrics.confusion import Values
from celltyper.metrics.ranking import OperatingPoints, operating_points
from celltyper.report.html import DASH, Chart, number
from celltyper.report.plots import (
    BOTTOM,
    DASHES,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    axes,
    line_key,
    place,
    svg_of,
    ticks,
)

LINES = len(DASHES)
"""Lines that one chart can hold and a reader tell apart."""

_UNIT = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_BARS = 74
"""Height of the bars under a reliability diagram, in units of the charts."""


class Curve(NamedTuple):
    """One set of patches in a chart over all thresholds."""

    name: str
    positive: str
    """Name of the positive class."""
    points: OperatingPoints
    threshold: float
    """Where the ring is drawn; NaN for none."""
    auroc: Score
    auprc: Score


def curve_of(name: str, labels: ArrayLike, probabilities: ArrayLike, scores: PatchScores) -> Curve:
    """Curve of scored patches.

    Parameters
    ----------
    name : str
        For the key.
    labels : array_like of int, shape (n,)
        True classes.
    probabilities : array_like, shape (n, K)
        Class probabilities.
    scores : PatchScores
        Of these patches.

    Returns
    -------
    Curve

    Raises
    ------
    DataError
        If only one of positive and other patches occurs: there is no curve.
    """
    shares = np.asarray(probabilities, np.float64)[:, scores.positive]
    points = operating_points(labels, shares, positive=scores.positive)
    positive = scores.classes[scores.positive]
    if not points.true_positives[-1] or not points.false_positives[-1]:
        raise DataError(f"{name}: a curve needs patches of {positive} and others; leave it out")
    areas = scores.scores["auroc"], scores.scores["auprc"]
    return Curve(name, positive, points, scores.threshold, *areas)


def roc_chart(curves: Sequence[Curve]) -> Chart:
    """Sensitivity over the share of false alarms, a ring at the threshold in use.

    Parameters
    ----------
    curves : sequence of Curve
        All of one positive class; at most `LINES` are drawn, the others named.

    Returns
    -------
    Chart
        The key gives the area under each curve with its interval.
    """
    shown = curves[:LINES]
    corner = (place(0, 0, _UNIT, _UNIT), place(1, 1, _UNIT, _UNIT))
    parts = [axes(_UNIT, _UNIT, "false alarms (1 - specificity)", "sensitivity"), _dashed(*corner)]
    for i, curve in enumerate(shown):
        hits, alarms = curve.points.true_positives, curve.points.false_positives
        x, y = np.append(0, alarms / alarms[-1]), np.append(0, hits / hits[-1])
        parts.append(_line(i, x, y, curve.name))
        called = int((curve.points.thresholds >= curve.threshold).sum())
        if not math.isnan(curve.threshold):
            parts.append(_ring(i, x[called], y[called], curve))
    title = f"ROC curve, {curves[0].positive} against the rest"
    keys = [(line_key(i), _key("AUROC", curve.name, curve.auroc)) for i, curve in enumerate(shown)]
    note = "Dashed: chance." + _ring_note(shown) + _left_out([c.name for c in curves[LINES:]])
    return Chart(title, svg_of(title, Markup("").join(parts)), keys, note)


def precision_recall_chart(curves: Sequence[Curve]) -> Chart:
    """Precision over sensitivity in steps, as the average precision adds them up.

    Parameters
    ----------
    curves : sequence of Curve
        All of one positive class; at most `LINES` are drawn, the others named.

    Returns
    -------
    Chart
        The key gives the average precision of each curve with its interval.
    """
    shown = curves[:LINES]
    parts = [axes(_UNIT, _UNIT, "sensitivity (recall)", "precision")]
    # Curves of the same patches have one line of chance.
    chances = {round(float((c.points.true_positives / _called(c))[-1]), 6) for c in shown}
    parts += [
        _dashed(place(0, chance, _UNIT, _UNIT), place(1, chance, _UNIT, _UNIT))
        for chance in sorted(chances)
    ]
    for i, curve in enumerate(shown):
        hits = curve.points.true_positives
        recall, precision = hits / hits[-1], hits / _called(curve)
        x = np.repeat(np.append(0, recall), 2)[1:-1]
        parts.append(_line(i, x, np.repeat(precision, 2), curve.name))
        called = int((curve.points.thresholds >= curve.threshold).sum())
        if called and not math.isnan(curve.threshold):
            parts.append(_ring(i, recall[called - 1], precision[called - 1], curve))
    title = f"Precision and recall of {curves[0].positive}"
    keys = [(line_key(i), _key("AUPRC", c.name, c.auprc)) for i, c in enumerate(shown)]
    note = (
        f"Dashed: chance, the share of {curves[0].positive}."
        + _ring_note(shown)
        + _left_out([c.name for c in curves[LINES:]])
    )
    return Chart(title, svg_of(title, Markup("").join(parts)), keys, note)


def reliability_chart(table: ReliabilityTable, positive: str, ece: Score) -> Chart:
    """Observed share over predicted probability, and the patches in each bin below.

    Parameters
    ----------
    table : ReliabilityTable
        From `celltyper.metrics.scoring.patch_reliability`.
    positive : str
        Name of the positive class; empty where the table is that of the largest probability.
    ece : Score
        Expected calibration error.

    Returns
    -------
    Chart
    """
    observed = f"share that is {positive}" if positive else "share called right"
    parts = [
        axes(_UNIT, _UNIT, "", "observed share"),
        _dashed(place(0, 0, _UNIT, _UNIT), place(1, 1, _UNIT, _UNIT)),
    ]
    full = np.flatnonzero(table.cells)
    most = int(table.cells.max(initial=1))
    parts.append(_line(0, table.confidence[full], table.accuracy[full], ""))
    for k in full:
        x, y = place(table.confidence[k], table.accuracy[k], _UNIT, _UNIT)
        spoken = (
            f"{table.cells[k]:,} patches: predicted {table.confidence[k]:.2f}, "
            f"{observed} {table.accuracy[k]:.2f}"
        )
        dot = Markup('<circle class="dot s0" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">{}</circle>')
        size = 2 + 6 * math.sqrt(table.cells[k] / most)
        parts.append(dot.format(x, y, size, Markup("<title>{}</title>").format(spoken)))
    title = f"Reliability of the probability of {positive}" if positive else "Reliability"
    note = (
        f"Expected calibration error {_with_interval(ece)}. On the dashed line a probability is as "
        "good as its word. Bars and numbers: patches in the bin; a dot of few patches says little."
    )
    svg = svg_of(f"{title}: {observed} over predicted probability", Markup("").join(parts))
    return Chart(title, svg + _bars(table), [], note)


def scaling_chart(score: str, lines: Mapping[str, Mapping[float, Sequence[float]]]) -> Chart:
    """Score over the share of the training patches: every run a dot, lines through the means.

    Parameters
    ----------
    score : str
        Name of the score.
    lines : mapping of str to mapping of float to sequence of float
        By method and share, in (0, 1], the scores of its runs; NaN are left out. At most `LINES`
        methods are drawn, the others named.

    Returns
    -------
    Chart
        Shares on a logarithmic axis; without a finite score the drawing is empty.
    """
    known = {
        name: {
            share: [v for v in values if math.isfinite(v)] for share, values in sorted(runs.items())
        }
        for name, runs in lines.items()
    }
    shown = dict(list(known.items())[:LINES])
    shares = sorted({share for runs in shown.values() for share, v in runs.items() if v})
    title = f"{score[:1].upper()}{score[1:]} over the share of the training patches"
    if not shares:
        return Chart(title, Markup(""), [], "No run has this score.")
    every = [v for runs in shown.values() for values in runs.values() for v in values]
    ys = ticks(min(every), max(every))
    low, high = math.log10(shares[0]), math.log10(shares[-1])
    # Room for the dots beside the first and last share.
    pad = 0.05 * (high - low) or 0.5
    xs = [low - pad, high + pad]
    parts = [_log_axes(shares, xs, ys, score)]
    for i, (name, runs) in enumerate(shown.items()):
        # Dots of several methods at one share would hide each other.
        aside = 3.0 * (i - (len(shown) - 1) / 2)
        means = []
        for share, values in runs.items():
            for value in values:
                x, y = place(math.log10(share), value, xs, ys)
                parts.append(
                    Markup(
                        '<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="2" opacity=".45"/>'
                    ).format(i, x + aside, y)
                )
            if values:
                means.append((share, sum(values) / len(values)))
        places = [place(math.log10(share), mean, xs, ys) for share, mean in means]
        parts.append(_polyline(i, places, name))
        parts += [
            Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="3.5">{}</circle>').format(
                i, x, y, Markup("<title>{}: {}</title>").format(name, number(mean))
            )
            for (x, y), (_, mean) in zip(places, means, strict=True)
        ]
    note = "Small dots: single runs. Lines: their means." + _left_out(list(known)[LINES:])
    keys = [(line_key(i), name) for i, name in enumerate(shown)]
    return Chart(title, svg_of(title, Markup("").join(parts)), keys, note)


def _line(index: int, x: Values, y: Values, name: str) -> Markup:
    return _polyline(index, [place(a, b, _UNIT, _UNIT) for a, b in zip(x, y, strict=True)], name)


def _polyline(index: int, places: Sequence[tuple[float, float]], name: str) -> Markup:
    """Line through places; of a straight run only the ends are written."""
    rounded = [(round(x, 1), round(y, 1)) for x, y in places]
    points = [p for i, p in enumerate(rounded) if i == 0 or p != rounded[i - 1]]
    kept = [
        point
        for i, point in enumerate(points)
        if i in (0, len(points) - 1)
        # The middle of three on one vertical or horizontal line adds nothing.
        or not any(points[i - 1][k] == point[k] == points[i + 1][k] for k in (0, 1))
    ]
    title = Markup("<title>{}</title>").format(name) if name else Markup("")
    return Markup(
        '<polyline class="line s{}" stroke-dasharray="{}" points="{}">{}</polyline>'
    ).format(index, DASHES[index], " ".join(f"{x:g},{y:g}" for x, y in kept), title)


def _called(curve: Curve) -> Values:
    return curve.points.true_positives + curve.points.false_positives


def _dashed(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    return Markup('<path class="ideal" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(*start, *end)


def _ring(index: int, x: float, y: float, curve: Curve) -> Markup:
    across, up = place(x, y, _UNIT, _UNIT)
    return Markup(
        '<circle class="line s{}" cx="{:.1f}" cy="{:.1f}" r="5.5"><title>{}</title></circle>'
    ).format(index, across, up, f"{curve.name}, threshold {curve.threshold:.2f}")


def _ring_note(curves: Sequence[Curve]) -> str:
    """What the rings are."""
    used = [f"{c.threshold:.2f}" for c in curves if not math.isnan(c.threshold)]
    # Each once, in the order of the curves.
    return f" Ring: at the threshold in use ({', '.join(dict.fromkeys(used))})." if used else ""


def _left_out(names: Sequence[str]) -> str:
    return f" Not drawn: {', '.join(names)}." if names else ""


def _key(kind: str, name: str, score: Score) -> str:
    return f"{name}: {kind} {_with_interval(score)}"


def _with_interval(score: Score) -> str:
    value, low, high = (number(part) for part in score)
    return value if DASH in (low, high) else f"{value} ({low} to {high})"


def _bars(table: ReliabilityTable) -> Markup:
    """Patches in each bin, on the x axis of the diagram above."""
    most = int(table.cells.max(initial=1))
    span = WIDTH - LEFT - RIGHT
    # Room above the highest bar for its number.
    full = _BARS - 34
    parts = [
        Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, _BARS - 18, WIDTH - RIGHT),
        Markup('<text x="{}" y="{}" text-anchor="middle">predicted probability</text>').format(
            LEFT + span / 2, _BARS - 3
        ),
        Markup(
            '<text transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>'
        ).format(_BARS / 2 - 6, "patches"),
    ]
    for low, high, count in zip(table.low, table.high, table.cells, strict=True):
        # Even a single patch is to be seen.
        tall = max(1.0, full * int(count) / most) if count else 0.0
        left, right = LEFT + span * float(low), LEFT + span * float(high)
        parts.append(
            Markup(
                '<rect class="dot s0" opacity=".55" x="{:.1f}" y="{:.1f}" width="{:.1f}" '
                'height="{:.1f}"><title>{}</title></rect>'
                '<text x="{:.1f}" y="{:.1f}" text-anchor="middle" style="font-size:9px">{}</text>'
            ).format(
                left + 1,
                _BARS - 18 - tall,
                right - left - 2,
                tall,
                f"{low:.2f} to {high:.2f}: {count:,} patches",
                (left + right) / 2,
                _BARS - 21 - tall,
                f"{count / 1000:.0f}k" if count >= 10_000 else int(count),
            )
        )
    return Markup(
        '<svg class="chart" style="margin-top:-5%" viewBox="0 0 {} {}" aria-hidden="true">{}</svg>'
    ).format(WIDTH, _BARS, Markup("").join(parts))


def _log_axes(
    shares: Sequence[float], xs: Sequence[float], ys: Sequence[float], y_label: str
) -> Markup:
    """Axes with a tick at every share, whose places are logarithms."""
    base = HEIGHT - BOTTOM
    parts = []
    for value in ys:
        _, y = place(xs[0], value, xs, ys)
        parts.append(
            Markup(
                '<path class="grid" d="M{} {:.1f}H{}"/>'
                '<text x="{}" y="{:.1f}" text-anchor="end">{:g}</text>'
            ).format(LEFT, y, WIDTH - RIGHT, LEFT - 6, y + 4, value)
        )
    edge = -math.inf
    for share in shares:
        x, _ = place(math.log10(share), ys[0], xs, ys)
        parts.append(Markup('<path class="axis" d="M{:.1f} {}v4"/>').format(x, base))
        if x - edge > 36:
            edge = x
            parts.append(
                Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{:g} %</text>').format(
                    x, base + 17, float(f"{100 * share:.3g}")
                )
            )
    middle, centre = (WIDTH + LEFT - RIGHT) / 2, base / 2
    parts.append(
        Markup(
            '<path class="axis" d="M{} {}H{}"/>'
            '<text x="{}" y="{}" text-anchor="middle">share of the training patches</text>'
            '<text transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>'
        ).format(LEFT, base, WIDTH - RIGHT, middle, HEIGHT - 8, centre, y_label)
    )
    return Markup("").join(parts)
