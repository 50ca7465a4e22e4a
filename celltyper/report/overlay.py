"""Outlines of cells drawn on the image in the colors of their phenotypes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageColor, ImageDraw, ImageFont

from celltyper.atomic import atomic_path
from celltyper.calibration import ABSTAINED
from celltyper.cells.colors import UNTYPED
from celltyper.errors import DataError
from celltyper.labels import label_boxes, label_ids
from celltyper.report.data import check_colors, check_labels
from celltyper.types import Image, Labels

SMALL_NUCLEUS = 24.0
"""Median diameter in pixels below which an outline would hide much of the nucleus."""
SMALL_IMAGE = 800
"""Pixels a side up to which a picture may be drawn twice as large: beyond, that takes seconds."""


def boundary(labels: Labels, width: int = 1) -> NDArray[np.bool_]:
    """Pixels inside a label that touch another label or background.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    width : int
        Width of the line in pixels, at least 1; neighbours are the four next pixels.

    Returns
    -------
    ndarray of bool, shape (H, W)
        The line lies inside the label, so that touching cells keep a line each. The image's own
        border is no boundary: a cell cut by it stays open there.

    Examples
    --------
    >>> import numpy as np
    >>> boundary(np.array([[1, 1, 1, 0, 2, 2]])).astype(int).tolist()
    [[0, 0, 1, 0, 1, 0]]
    """
    inside = labels
    line = np.zeros(labels.shape, bool)
    for _ in range(width):
        ring = np.zeros(labels.shape, bool)
        rows, cols = inside[1:] != inside[:-1], inside[:, 1:] != inside[:, :-1]
        ring[1:] |= rows
        ring[:-1] |= rows
        ring[:, 1:] |= cols
        ring[:, :-1] |= cols
        ring &= inside > 0
        line |= ring
        inside = np.where(ring, 0, inside)
    return line


def draw_outlines(
    image: Image,
    labels: Labels,
    phenotypes: NDArray[np.uint8],
    colors: Sequence[str],
    width: int = 1,
    *,
    scale: int = 1,
) -> Image:
    """Draw the outline of every cell in the color of its phenotype.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB image; not changed.
    labels : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    phenotypes : ndarray of uint8, shape (at least labels.max() + 1,)
        Class of every label id as lookup table; 0 is drawn in grey.
    colors : sequence of str
        ``"#rrggbb"`` of class k at ``k - 1``.
    width : int
        Line width in pixels of the result.
    scale : int
        Enlarges the image first, so that a thin line leaves small nuclei in sight.

    Returns
    -------
    ndarray of uint8, shape (scale * H, scale * W, 3)
        The image with outlines.

    Raises
    ------
    DataError
        If image, labels, phenotypes and colors do not fit together.
    """
    check_labels(image, labels, phenotypes, "overlay")
    check_colors(colors, colors)
    if int(phenotypes.max(initial=0)) > len(colors):
        raise DataError(
            f"overlay: a cell has class {int(phenotypes.max())}, but only {len(colors)} "
            "colors are given"
        )
    if scale > 1:
        size = (image.shape[1] * scale, image.shape[0] * scale)
        image = np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BICUBIC))
        labels = labels.repeat(scale, axis=0).repeat(scale, axis=1)
    palette = np.array([ImageColor.getrgb(c) for c in (UNTYPED, *colors)], np.uint8)
    drawn: Image = image.copy()
    line = boundary(labels, width)
    drawn[line] = palette[phenotypes[labels[line]]]
    return drawn


def legend(
    classes: Sequence[str],
    colors: Sequence[str],
    width: int,
    *,
    counts: Sequence[int] | None = None,
    mpp: float | None = None,
) -> Image:
    """Strip with the name and color of every class, for a picture that stands alone.

    Parameters
    ----------
    classes, colors : sequence of str
        Names and ``"#rrggbb"`` of the classes.
    width : int
        Width of the strip in pixels; entries wrap.
    counts : sequence of int, optional
        Number of cells of every class, written behind its name.
    mpp : float, optional
        Micrometres per pixel of the picture; adds a scale bar.

    Returns
    -------
    ndarray of uint8, shape (height, width, 3)
        Dark text on white.

    Raises
    ------
    DataError
        If the number of colors is not that of the classes.
    """
    check_colors(classes, colors)
    font, row, pad = _font(14), 24, 8
    texts = (
        list(classes)
        if counts is None
        else [f"{name} ({count:,})" for name, count in zip(classes, counts, strict=True)]
    )
    entries: list[tuple[str, str | None, float]] = [
        (text, color, 16 + 6 + font.getlength(text))
        for text, color in zip(texts, colors, strict=True)
    ]
    if mpp is not None:
        microns = scale_bar(width, mpp)
        text = f"{microns:g} µm"
        entries.append((text, None, microns / mpp + 6 + font.getlength(text)))
    places, x, y = [], float(pad), pad
    for _, _, length in entries:
        if x > pad and x + length > width - pad:
            x, y = float(pad), y + row
        places.append((x, y))
        x += length + 20
    strip = PIL.Image.new("RGB", (width, y + row + pad // 2), "white")
    pen = ImageDraw.Draw(strip)
    for (text, color, length), (x, y) in zip(entries, places, strict=True):
        if color is None:
            mark = length - 6 - font.getlength(text)
            pen.rectangle((x, y + 7, x + mark - 1, y + 10), fill="black")
        else:
            mark = 16
            pen.rectangle((x, y + 1, x + 15, y + 16), fill=color, outline="#444444")
        pen.text((x + mark + 6, y), text, fill="#111111", font=font)
    return np.asarray(strip)


def save_overlay(
    path: Path,
    image: Image,
    labels: Labels,
    phenotypes: NDArray[np.uint8],
    classes: Sequence[str],
    colors: Sequence[str],
    *,
    mpp: float | None = None,
) -> None:
    """Write the image with outlines, legend, counts and scale bar; PNG or JPEG by the name's end.

    Where nuclei are small (median diameter below `SMALL_NUCLEUS`), the picture is twice as large,
    if the image has at most `SMALL_IMAGE` pixels a side.

    Parameters
    ----------
    path : Path
        File to write; appears only when complete.
    image, labels, phenotypes, colors
        See `draw_outlines`.
    classes : sequence of str
        Names for the legend.
    mpp : float, optional
        Micrometres per pixel of the image, for the scale bar.

    Raises
    ------
    DataError
        If the arrays do not fit together.
    """
    scale = 2 if median_diameter(labels) < SMALL_NUCLEUS and max(image.shape) <= SMALL_IMAGE else 1
    drawn = draw_outlines(image, labels, phenotypes, colors, width=2, scale=scale)
    counts = class_counts(labels, phenotypes, len(classes))
    names, paint = list(classes), list(colors)
    if counts[0]:
        names, paint = [*names, ABSTAINED], [*paint, UNTYPED]
    counts = np.concatenate([counts[1:], counts[:1] if counts[0] else counts[:0]])
    bar = None if mpp is None else mpp / scale
    strip = legend(names, paint, max(drawn.shape[1], 240), counts=counts.tolist(), mpp=bar)
    page = np.full((len(drawn) + len(strip), strip.shape[1], 3), 255, np.uint8)
    page[: len(drawn), : drawn.shape[1]] = drawn
    page[len(drawn) :] = strip
    jpeg = path.suffix.lower() in (".jpg", ".jpeg")
    with atomic_path(path) as temporary:
        # of a picture of tissue, level 6 saves 6 % of the bytes and takes four times as long
        how: dict[str, Any] = {"format": "JPEG"} if jpeg else {"format": "PNG", "compress_level": 1}
        PIL.Image.fromarray(page).save(temporary, **how)


def class_counts(
    labels: Labels, phenotypes: NDArray[np.uint8], n_classes: int
) -> NDArray[np.int64]:
    """Count the cells of every class; entry 0 counts cells without a class.

    Returns
    -------
    ndarray of int64, shape (n_classes + 1,)
        Ids that the lookup table knows but the image does not hold are not counted.
    """
    counts: NDArray[np.int64] = np.bincount(phenotypes[label_ids(labels)], minlength=n_classes + 1)
    return counts


def median_diameter(labels: Labels) -> float:
    """Median diameter in pixels of the disks with the cells' areas; infinite without cells."""
    areas = label_boxes(labels).area
    return float(2 * np.sqrt(np.median(areas) / np.pi)) if len(areas) else float("inf")


def scale_bar(width: float, mpp: float) -> float:
    """Length in micrometres, of 1, 2 or 5 times a power of ten, of about a sixth of the width."""
    longest = width * mpp / 5
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(step * power for step in (1, 2, 5) if step * power <= longest))


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font has neither micro nor Greek letters; matplotlib, which takes a third of a
    # second to import, ships one that does.
    package = find_spec("matplotlib")
    assert package is not None
    assert package.origin is not None
    fonts = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(fonts / "DejaVuSans.ttf", size)
