"""What a report shows, as plain data that knows nothing of models or files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.errors import DataError
from celltyper.types import Image, Labels


class Metric(NamedTuple):
    """One headline figure with the rule by which it was computed."""

    name: str
    value: float | None
    low: float | None
    """Lower end of the interval, None or NaN where there is none."""
    high: float | None
    rule: str
    """One line that tells the reader what was counted, e.g. ``"IoU > 0.5, classes averaged"``."""
    deviation: float | None = None
    """Standard deviation over runs, if there are several."""


Cell = str | int | float | Metric | None
"""A table cell; of a `Metric` the value is shown with its interval."""


class Table(NamedTuple):
    """Rows under column names; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


class Curves(NamedTuple):
    """Charts of scores over something else than training steps."""

    title: str
    x_label: str
    charts: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
    """Points ``(x, y)``, finite, by line, by chart."""


class Reliability(NamedTuple):
    """Confidence against accuracy in bins; empty bins are not drawn."""

    confidence: NDArray[np.float64]
    """Mean confidence of the bin, shape (n,)."""
    accuracy: NDArray[np.float64]
    """Share of right answers in the bin, shape (n,)."""
    cells: NDArray[np.int64]
    """Cells in the bin, shape (n,)."""
    ece: float
    """Expected calibration error, doi:10.1609/aaai.v29i1.9602."""
    rule: str = ""
    """Which cells were counted, and what was right."""


@dataclass(frozen=True, eq=False)
class ReportImage:
    """One image with what was found on it.

    Parameters
    ----------
    name : str
        Name of the image.
    image : ndarray of uint8, shape (H, W, 3)
        RGB image.
    labels : ndarray of int32, shape (H, W)
        Predicted instances, 0 is background.
    phenotypes : ndarray of uint8, shape (labels.max() + 1,)
        Class of every predicted label as lookup table; 0 is "no class".
    ref_labels, ref_phenotypes : ndarray, optional
        The same of the reference; both or neither.
    scores : mapping of str to float
        Scores of this image.
    mpp : float, optional
        Micrometres per pixel, for the scale bar.

    Raises
    ------
    DataError
        If the arrays do not fit together, naming the image.
    """

    name: str
    image: Image
    labels: Labels
    phenotypes: NDArray[np.uint8]
    ref_labels: Labels | None = None
    ref_phenotypes: NDArray[np.uint8] | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    mpp: float | None = None

    def __post_init__(self) -> None:
        where = f"report image {self.name!r}"
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise DataError(
                f"{where}: image must be (H, W, 3) uint8, got {self.image.shape} {self.image.dtype}"
            )
        if (self.ref_labels is None) != (self.ref_phenotypes is None):
            raise DataError(f"{where}: give reference labels and phenotypes both, or neither")
        check_labels(self.image, self.labels, self.phenotypes, f"{where}, prediction")
        if self.ref_labels is not None and self.ref_phenotypes is not None:
            check_labels(self.image, self.ref_labels, self.ref_phenotypes, f"{where}, reference")


@dataclass(frozen=True, eq=False)
class Report:
    """Everything on the page, from top to bottom; what is empty is left out.

    Parameters
    ----------
    title : str
        Heading of the page.
    classes : sequence of str
        Names of the K phenotypes; class k is ``classes[k - 1]``.
    colors : sequence of str
        One ``"#rrggbb"`` for every class.
    notice : str
        What every reader must know before the numbers, e.g. that the labels are model-made.
    warnings : sequence of str
        What went wrong or looked odd.
    metrics : sequence of Metric
        Headline figures.
    interval : str
        What the intervals are, e.g. ``"95 % interval, bootstrap over 12 patients"``.
    tables : mapping of str to Table
        Further tables by heading.
    curves : Curves, optional
        Further charts.
    per_class : Table, optional
        One row per class.
    confusion : ndarray, shape (K + 1, K + 1), optional
        Rows reference, columns predicted, entry 0 "no nucleus": row 0 holds spurious cells and
        column 0 missed ones.
    confusion_rule : str
        Which cells were counted.
    reliability : Reliability, optional
        Calibration of the cells' probabilities.
    uncalibrated : Reliability, optional
        The same before they were calibrated.
    history : mapping of str to sequence of float
        Columns of ``history.csv``: ``step`` (or ``epoch``) and what was logged; None and NaN are
        steps without that value.
    images : sequence of ReportImage
        Images in the order of interest.
    worst_by : str
        Name of an image score, higher is better; the images are shown from its lowest up.
    facts : mapping of str to str
        What ran on what: versions, device, encoder, decoder, data.
    config : str
        The resolved config as YAML.

    Raises
    ------
    DataError
        If colors, classes and confusion matrix do not fit together.
    """

    title: str
    classes: Sequence[str]
    colors: Sequence[str]
    notice: str = ""
    warnings: Sequence[str] = ()
    metrics: Sequence[Metric] = ()
    interval: str = "95 % interval"
    tables: Mapping[str, Table] = field(default_factory=dict)
    curves: Curves | None = None
    per_class: Table | None = None
    confusion: NDArray[np.generic] | None = None
    confusion_rule: str = ""
    reliability: Reliability | None = None
    uncalibrated: Reliability | None = None
    history: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    images: Sequence[ReportImage] = ()
    worst_by: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    config: str = ""

    def __post_init__(self) -> None:
        check_colors(self.classes, self.colors)
        size = len(self.classes) + 1
        if self.confusion is not None and self.confusion.shape != (size, size):
            raise DataError(
                f"report: the confusion matrix must be {size} x {size} (no nucleus and "
                f"{size - 1} classes), got {self.confusion.shape}"
            )
        for table in (*self.tables.values(), *([self.per_class] if self.per_class else [])):
            for row in table.rows:
                if len(row) != len(table.columns):
                    raise DataError(
                        f"report: table row {row[:1]} has {len(row)} cells for "
                        f"{len(table.columns)} columns"
                    )
        for image in self.images:
            for classes in (image.phenotypes, image.ref_phenotypes):
                top = 0 if classes is None else int(classes.max(initial=0))
                if top >= size:
                    raise DataError(
                        f"report image {image.name!r}: a cell has class {top}, "
                        f"but only {size - 1} classes are named"
                    )


def check_colors(classes: Sequence[str], colors: Sequence[str]) -> None:
    """Refuse colors that are not ``#rrggbb`` or not one for every class.

    Raises
    ------
    DataError
        Naming the color.
    """
    if len(colors) != len(classes):
        raise DataError(f"{len(classes)} classes need as many colors, got {len(colors)}")
    for color in colors:
        # Colors go into the page's style sheet, where escaping would not help.
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", color):
            raise DataError(f"color {color!r} must be written as '#rrggbb'")


def check_labels(image: Image, labels: Labels, phenotypes: NDArray[np.uint8], where: str) -> None:
    """Refuse labels of another size than the image and ids outside the lookup table.

    Raises
    ------
    DataError
        Beginning with `where`.
    """
    if labels.shape != image.shape[:2]:
        raise DataError(f"{where}: labels are {labels.shape}, the image is {image.shape[:2]}")
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) >= len(phenotypes)):
        raise DataError(
            f"{where}: label ids go from {int(labels.min())} to {int(labels.max())}, but the "
            f"lookup table of phenotypes has {len(phenotypes)} entries"
        )
