"""The images of a report: a window of each, its outlines as paths, and its counts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from celltyper.labels import label_boxes
from celltyper.report.agreement import MISSED, RIGHT, SPURIOUS, WRONG_CLASS, compare, fate_counts
from celltyper.report.data import ReportImage
from celltyper.report.outlines import outline_paths
from celltyper.report.overlay import class_counts, scale_bar
from celltyper.types import Image

WINDOW = 1000
"""Longest side in pixels of what is shown of an image."""


class Figure(NamedTuple):
    """One image, ready for the page."""

    name: str
    width: int
    height: int
    jpeg: str
    """Data URI."""
    predicted: list[str]
    """Path of every class, entry 0 cells without a class."""
    reference: list[str]
    """The same, empty without reference."""
    agreement: list[str]
    """Path of every fate (see `celltyper.report.agreement`), empty without reference."""
    counts: list[list[int]]
    """Per class: predicted, then with a reference: reference, right, wrong class, missed,
    spurious; entry 0 cells without a class."""
    scores: Mapping[str, float | None]
    window: str
    """What part is shown, empty if all of it is."""
    bar_pixels: float
    bar_microns: float

    @property
    def size(self) -> int:
        """Characters that the figure adds to the page."""
        return len(self.jpeg) + sum(map(len, self.predicted + self.reference + self.agreement))


def make_figure(image: ReportImage, n_classes: int) -> Figure:
    """Cut the most telling window out of an image and trace its cells.

    Of an image larger than `WINDOW`, the window with the most disagreements is shown, without a
    reference the one with the most cells; the counts are those of the whole image.

    Parameters
    ----------
    image : ReportImage
        Image and labels.
    n_classes : int
        Number K of classes.

    Returns
    -------
    Figure
        JPEG at quality 85, and outlines in pixels of the window.
    """
    pred, ref, ref_types = image.labels, image.ref_labels, image.ref_phenotypes
    counts = class_counts(pred, image.phenotypes, n_classes)[:, None]
    boxes = label_boxes(pred)
    row, col = (boxes.row_start + boxes.row_stop) / 2, (boxes.col_start + boxes.col_stop) / 2
    agreement = None
    if ref is not None and ref_types is not None:
        agreement = compare(ref, ref_types, pred, image.phenotypes)
        of_pred = fate_counts(agreement.predicted, image.phenotypes, n_classes)
        of_ref = fate_counts(agreement.reference, ref_types, n_classes)
        fates = [of_ref[:, RIGHT], of_ref[:, WRONG_CLASS], of_ref[:, MISSED], of_pred[:, SPURIOUS]]
        counts = np.column_stack([counts, of_ref.sum(axis=1), *fates])
        ref_boxes = label_boxes(ref)
        wrong = agreement.predicted[boxes.ids] != RIGHT
        missed = agreement.reference[ref_boxes.ids] == MISSED
        ref_row = (ref_boxes.row_start + ref_boxes.row_stop) / 2
        ref_col = (ref_boxes.col_start + ref_boxes.col_stop) / 2
        row = np.concatenate([row[wrong], ref_row[missed]])
        col = np.concatenate([col[wrong], ref_col[missed]])
    height, width = image.image.shape[:2]
    rows, cols = busiest_window((height, width), row, col)
    pred = pred[rows, cols]
    reference, fate_paths = [], []
    if agreement is not None and ref is not None and ref_types is not None:
        ref = ref[rows, cols]
        reference = outline_paths(ref, ref_types.astype(np.intp), n_classes + 1)
        fate_paths = outline_paths(pred, agreement.predicted, MISSED)
        missed_only = np.where(agreement.reference == MISSED, 0, -1)
        fate_paths += outline_paths(ref, missed_only, 1)
    whole = pred.shape == (height, width)
    bar = scale_bar(pred.shape[1], image.mpp) if image.mpp else 0.0
    return Figure(
        name=image.name,
        width=pred.shape[1],
        height=pred.shape[0],
        jpeg=jpeg_uri(image.image[rows, cols]),
        predicted=outline_paths(pred, image.phenotypes.astype(np.intp), n_classes + 1),
        reference=reference,
        agreement=fate_paths,
        counts=counts.tolist(),
        scores=image.scores,
        window=""
        if whole
        else f"Cropped for the page: columns {cols.start} to {cols.stop}, rows {rows.start} to "
        f"{rows.stop} of {width} x {height} px, the window with the most "
        f"{'cells' if agreement is None else 'disagreements'}. Counts and scores are those of "
        "the whole image.",
        bar_pixels=bar / image.mpp if image.mpp else 0.0,
        bar_microns=bar,
    )


def make_figures(
    images: Sequence[ReportImage], n_classes: int, worst_by: str, budget: int
) -> tuple[list[Figure], list[str]]:
    """Make figures, from the lowest score up, until the page is full.

    Parameters
    ----------
    images : sequence of ReportImage
        Images.
    n_classes : int
        Number K of classes.
    worst_by : str
        Name of the score to sort by; empty keeps the order. Images without it come last.
    budget : int
        Characters that the figures may take together.

    Returns
    -------
    figures : list of Figure
        At least one if there is an image.
    left_out : list of str
        Names of the images for which there was no room.
    """

    def score(image: ReportImage) -> float:
        value = image.scores.get(worst_by)
        return math.inf if value is None or math.isnan(value) else value

    figures: list[Figure] = []
    order = sorted(images, key=score) if worst_by else list(images)
    for i, image in enumerate(order):
        figure = make_figure(image, n_classes)
        if figures and figure.size > budget:
            return figures, [left.name for left in order[i:]]
        budget -= figure.size
        figures.append(figure)
    return figures, []


def busiest_window(
    shape: tuple[int, int], row: NDArray[np.float64], col: NDArray[np.float64]
) -> tuple[slice, slice]:
    """Find the window of at most `WINDOW` pixels a side that holds the most points.

    Windows are tried every quarter of their side; of equals the first from the top left is taken.

    Parameters
    ----------
    shape : tuple of int
        Height and width of the image.
    row, col : ndarray of float64, shape (n,)
        Points in pixels.

    Returns
    -------
    tuple of slice
        Rows and columns.
    """
    starts = [
        sorted({*range(0, max(side - WINDOW, 0), WINDOW // 4), max(side - WINDOW, 0)})
        for side in shape
    ]
    best, found = -1, (0, 0)
    for top in starts[0]:
        across = col[(row >= top) & (row < top + WINDOW)]
        for left in starts[1]:
            inside = int(((across >= left) & (across < left + WINDOW)).sum())
            if inside > best:
                best, found = inside, (top, left)
    stops = [min(start + WINDOW, side) for start, side in zip(found, shape, strict=True)]
    return slice(found[0], stops[0]), slice(found[1], stops[1])


def jpeg_uri(image: Image) -> str:
    """Encode an RGB image as a ``data:image/jpeg`` address."""
    buffer = io.BytesIO()
    # Full color resolution: hue is what tells haematoxylin from eosin at a nucleus' edge.
    PIL.Image.fromarray(image).save(buffer, format="JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
