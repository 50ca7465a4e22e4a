"""Tables and pictures of patch mode: confusion, domains, and the most certain mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from celltyper.errors import DataError
from celltyper.metrics.confusion import call_classes
from celltyper.report.data import Metric
from celltyper.report.figures import jpeg_uri
from celltyper.report.html import DASH, interval, number
from celltyper.types import Image

STYLE = """
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  gap: .9rem 1rem; margin: .5rem 0 1.6rem; }
.gallery img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; background: #f4eef2;
  border: 1px solid var(--line); }
.gallery figcaption { line-height: 1.35; margin-top: .25rem; font-size: .78rem;
  overflow-wrap: anywhere; }
.gallery figcaption b { color: var(--ink); font-weight: 600; font-size: .875rem; }
.confusion td small { white-space: nowrap; }
.confusion td.sum { border: 0; color: var(--soft); }
"""
"""Rules that the page's style sheet needs besides those of the report."""

THUMBNAIL = 256
"""Longest side in pixels of a picture in the gallery."""


class Mistakes(NamedTuple):
    """Patches of one class that were called one other."""

    true: int
    called: int
    total: int
    """How many there are."""
    rows: NDArray[np.intp]
    """Those with the highest probability of the class called, highest first."""


def find_mistakes(
    labels: ArrayLike,
    probabilities: ArrayLike,
    positive: int,
    *,
    threshold: float = 0.5,
    most: int = 12,
) -> list[Mistakes]:
    """Find the mistakes of which the model was most certain, each kind for itself.

    A rare class is rarely called, so that a single list would hold hardly anything but misses.

    Parameters
    ----------
    labels : array_like of int, shape (n,)
        True classes.
    probabilities : array_like, shape (n, K)
        Class probabilities.
    positive : int
        The positive class.
    threshold : float
        As in `celltyper.metrics.confusion.call_classes`.
    most : int
        Largest number of rows of each kind.

    Returns
    -------
    list of Mistakes
        The kinds that occur, the most frequent first. Of equally certain mistakes the first row
        comes first.
    """
    labels, shares = np.asarray(labels, np.intp), np.asarray(probabilities, np.float64)
    called = call_classes(shares, positive, threshold)
    kinds = []
    for true, other in sorted({(int(t), int(c)) for t, c in zip(labels, called, strict=True)}):
        if true != other:
            rows = np.flatnonzero((labels == true) & (called == other))
            order = np.argsort(-shares[rows, other], kind="stable")
            kinds.append(Mistakes(true, other, len(rows), rows[order[:most]]))
    return sorted(kinds, key=lambda kind: -kind.total)


def gallery(
    kinds: Sequence[Mistakes],
    images: Mapping[int, Image],
    names: Sequence[str],
    probabilities: ArrayLike,
    classes: Sequence[str],
    *,
    votes: ArrayLike | None = None,
    experts: ArrayLike | None = None,
    mpp: float | None = None,
) -> Markup:
    """Pictures of mistakes with what the model and the experts said.

    Parameters
    ----------
    kinds : sequence of Mistakes
        From `find_mistakes`.
    images : mapping of int to ndarray of uint8, shape (H, W, 3)
        Patch of every row in ``kinds``, as it was annotated.
    names : sequence of str, length n
    probabilities : array_like, shape (n, K)
        Class probabilities.
    classes : sequence of str
        The K names.
    votes, experts : array_like, shapes (n, K) and (n,), optional
        Share of the experts for each class and their number; both or neither. Patches that one
        expert saw show no votes.
    mpp : float, optional
        Micrometres per pixel of the images.

    Returns
    -------
    Markup
        Needs `STYLE` in the page.

    Raises
    ------
    DataError
        If votes come without the number of experts.
    """
    if (votes is None) != (experts is None):
        raise DataError("gallery: give votes and the number of experts both, or neither")
    if not kinds:
        return Markup("<p>No patch was called wrong.</p>")
    shares = np.asarray(probabilities, np.float64)
    counts: NDArray[np.intp] | None = None
    if votes is not None and experts is not None:
        seen = np.asarray(experts)[:, None]
        counts = np.rint(np.nan_to_num(np.asarray(votes, float)) * seen).astype(np.intp)
    parts = []
    for kind in kinds:
        called, shown = classes[kind.called], len(kind.rows)
        wide = {images[int(i)].shape[1] for i in kind.rows}
        width = (
            f" Each picture is {wide.pop() * mpp:.3g} µm wide." if mpp and len(wide) == 1 else ""
        )
        chosen = (
            f"The {shown} most certain of {kind.total:,}."
            if shown < kind.total
            else f"All {kind.total:,}, the most certain first."
        )
        said = "" if counts is None else "the votes of the experts, "
        below = f" Below: the class called and its probability, {said}the patch."
        parts.append(
            Markup(
                '<h3>Label {}, called {}</h3><p class="soft">{}</p><div class="gallery">'
            ).format(classes[kind.true], called, chosen + below + width)
        )
        for i in kind.rows.tolist():
            probability = f"{shares[i, kind.called]:.2f}"
            votes_of = "" if counts is None else _votes(counts[i], classes)
            spoken = f"H&E patch {names[i]}: label {classes[kind.true]}, called {called}"
            parts.append(
                Markup(
                    '<figure><img src="{}" alt="{}"><figcaption><b>{} {}</b>{}<br>{}</figcaption>'
                    "</figure>"
                ).format(
                    jpeg_uri(_thumbnail(images[i])),
                    spoken,
                    called,
                    probability,
                    Markup("<br>{}").format(votes_of) if votes_of else "",
                    # A long path breaks behind a folder, not inside the name of the file.
                    escape(names[i]).replace("/", Markup("/<wbr>")),
                )
            )
        parts.append(Markup("</div>"))
    return Markup("").join(parts)


def confusion_table(matrix: NDArray[np.int64], classes: Sequence[str]) -> Markup:
    """Confusion matrix with the share of every row.

    Parameters
    ----------
    matrix : ndarray of int, shape (K, K)
        Patches by true (rows) and called class (columns).
    classes : sequence of str
        The K names.

    Returns
    -------
    Markup
        A table; the note below it is the caller's.
    """
    parts = [_head("label ↓ called →", [*classes, "patches"])]
    for true, (name, row) in enumerate(zip(classes, matrix.tolist(), strict=True)):
        total = sum(row)
        parts.append(Markup('<tr><th scope="row">{}</th>').format(name))
        for called, count in enumerate(row):
            share = count / total if total else None
            below = "" if share is None else f"{100 * share:.0f} %"
            parts.append(_cell(number(count), below, share, true == called))
        parts.append(Markup('<td class="sum">{}</td></tr>').format(number(total)))
    return _table("Confusion matrix", parts)


def domain_table(
    trained: Sequence[str],
    tested: Sequence[str],
    cells: Sequence[Sequence[Metric | None]],
    *,
    chance: float,
) -> Markup:
    """Score of every training domain on every test domain, and its mean on the others.

    Parameters
    ----------
    trained, tested : sequence of str
        Domains of the rows and columns; equal names are the same domain, which is framed.
    cells : sequence of sequence of Metric
        A score by row and column, None where there is none.
    chance : float
        Score of guessing: cells are shaded from there, not at all, to 1.

    Returns
    -------
    Markup
        A table; the note below it is the caller's.

    Raises
    ------
    DataError
        If the cells are not one for every pair of domains.
    """
    if len(cells) != len(trained) or any(len(row) != len(tested) for row in cells):
        raise DataError(
            f"domain table: {len(trained)} x {len(tested)} domains need as many cells, one row "
            "for each training domain"
        )
    parts = [_head("trained on ↓ tested on →", [*tested, "mean of the others"])]
    for name, row in zip(trained, cells, strict=True):
        parts.append(Markup('<tr><th scope="row">{}</th>').format(name))
        others = []
        for domain, metric in zip(tested, row, strict=True):
            value = None if metric is None else metric.value
            if value is None or not np.isfinite(value):
                parts.append(Markup("<td>{}</td>").format(DASH))
                continue
            if domain != name:
                others.append(value)
            heat = (value - chance) / (1 - chance)
            parts.append(_cell(number(value), _spread(metric), heat, domain == name))
        mean = number(sum(others) / len(others)) if others else DASH
        parts.append(Markup('<td class="sum">{}</td></tr>').format(mean))
    return _table("Scores by training and test domain", parts)


def _spread(metric: Metric | None) -> str:
    """Deviation over runs or, of a single one, the interval."""
    if metric is None:
        return ""
    if metric.deviation is not None and np.isfinite(metric.deviation):
        return f"± {number(metric.deviation)}"
    within = interval(metric)
    return "" if within == DASH else within


def _table(label: str, rows: Sequence[Markup]) -> Markup:
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table class="confusion">'
        "{}</tbody></table></div>"
    ).format(label, Markup("").join(rows))


def _head(corner: str, columns: Sequence[str]) -> Markup:
    cells = [Markup('<th scope="col">{}</th>').format(name) for name in columns]
    return Markup('<thead><tr><th scope="col" class="text">{}</th>{}</tr></thead><tbody>').format(
        corner, Markup("").join(cells)
    )


def _cell(value: str, below: str, heat: float | None, framed: bool) -> Markup:
    shade = 0.5 * min(max(heat or 0.0, 0.0), 1.0)
    return Markup('<td{} style="background:rgba(var(--heat), {:.2f})">{}{}</td>').format(
        Markup(' class="right"') if framed else "",
        shade,
        value,
        Markup("<small>{}</small>").format(below) if below else "",
    )


def _votes(counts: NDArray[np.intp], classes: Sequence[str]) -> str:
    """Votes of several experts in words, as ``"2 Normal, 1 Atypical"``; empty for fewer."""
    if counts.sum() < 2:
        return ""
    order = np.argsort(-counts, kind="stable")
    return ", ".join(f"{counts[k]} {classes[k]}" for k in order if counts[k])


def _thumbnail(image: Image) -> Image:
    picture = PIL.Image.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(picture)
