"""Outlines to labels.

Coordinates are x, y in pixels of the image; pixel ``[0, 0]`` is the square from (0, 0) to (1, 1).

- A pixel belongs to an outline if its centre is inside. A centre exactly on the line belongs to
  the side to the right of or below it, so outlines that share an edge share no pixel.
- Where outlines overlap, the one of fewer pixels lies on top, so that a nucleus drawn inside
  another does not vanish; of two equal ones, the earlier.
- An outline that crosses itself is repaired: a part that is passed twice is filled, both halves of
  a figure of eight are kept.
- What reaches beyond the image is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from celltyper.datasets.dataset import listing
from celltyper.errors import DataError
from celltyper.types import Labels

logger = logging.getLogger(__name__)

MIN_DIAMETER = 2.5
"""Micrometres; nuclei whose median is smaller are drawn in other units than pixels."""


def ring_polygon(points: NDArray[np.float64]) -> shapely.Polygon:
    """Polygon of one closed line.

    Parameters
    ----------
    points : ndarray of float64, shape (n, 2)
        x, y; the last point may repeat the first.

    Returns
    -------
    shapely.Polygon
        Empty if there are fewer than 3 points.
    """
    return shapely.Polygon(points) if len(points) >= 3 else shapely.Polygon()


def rasterise(
    outlines: Sequence[shapely.Geometry],
    names: Sequence[str],
    shape: tuple[int, ...],
    where: object,
    mpp: float | None = None,
) -> Labels:
    """Labels of outlined nuclei, by the rules of this module.

    Parameters
    ----------
    outlines : sequence of shapely.Polygon or shapely.MultiPolygon
        In pixels of the image.
    names : sequence of str
        Of every outline, for messages, such as ``"region 7"``.
    shape : tuple of int
        Height and width of the image first.
    where : object
        File, for messages.
    mpp : float, optional
        Micrometres per pixel, to recognise coordinates in other units.

    Returns
    -------
    ndarray of int32, shape (H, W)
        Outline i has the label i + 1. Outlines that enclose nothing, hold no pixel's centre or are
        covered by others have no pixel; a warning counts and names them.

    Raises
    ------
    DataError
        If an outline lies outside the image as a whole, or the coordinates look like micrometres
        or another pyramid level.
    """
    height, width = shape[:2]
    labels = np.zeros((height, width), np.int32)
    shapes = np.array(outlines, dtype=object)
    for i in np.flatnonzero(~np.atleast_1d(shapely.is_valid(shapes))).tolist():
        shapes[i] = shapely.make_valid(shapes[i], method="structure", keep_collapsed=False)
    drawn = np.flatnonzero(np.atleast_1d(shapely.area(shapes)) > 0)
    check_coordinates(
        shapely.bounds(shapes[drawn]), [names[i] for i in drawn.tolist()], shape, where, mpp
    )
    owner, row, start, stop = _spans(shapes[drawn], height, width)
    order = painting_order(np.bincount(owner, stop - start, len(drawn)))
    rank = np.empty(len(drawn), np.int64)
    rank[order] = np.arange(len(drawn))
    by_rank = np.argsort(rank[owner], kind="stable")
    spans = np.stack([drawn[owner] + 1, row, start, stop], axis=1)[by_rank]
    for label, r, a, b in spans.tolist():
        labels[r, a:b] = label
    gone = np.flatnonzero(np.bincount(labels.ravel(), minlength=len(shapes) + 1) == 0)
    gone = gone[gone > 0]
    if len(gone):
        logger.warning(
            "%s: %d of %d outlines have no pixel (no area, smaller than a pixel, or covered): %s",
            where,
            len(gone),
            len(shapes),
            listing(names[i - 1] for i in gone.tolist()),
        )
    return labels


def painting_order(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Order of painting that leaves the smaller on top, and of equals the earlier.

    Parameters
    ----------
    sizes : ndarray, shape (n,)
        Number of pixels of every nucleus.

    Returns
    -------
    ndarray of int64, shape (n,)
        Positions, to be painted one over the other.
    """
    return np.argsort(sizes, kind="stable")[::-1].astype(np.int64)


def phenotypes_at(labels: Labels, kinds: Sequence[int]) -> NDArray[np.uint8]:
    """Lookup table of classes where label i + 1 has the class ``kinds[i]``.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Labels; some may have no pixel.
    kinds : sequence of int
        Class ids.

    Returns
    -------
    ndarray of uint8, shape (labels.max() + 1,)
        0 for labels without pixels.
    """
    present = np.bincount(labels.ravel()) > 0
    table = np.where(present, np.array([0, *kinds])[: len(present)], 0)
    table[0] = 0
    return table.astype(np.uint8)


def check_coordinates(
    bounds: NDArray[np.float64],
    names: Sequence[str],
    shape: tuple[int, ...],
    where: object,
    mpp: float | None,
) -> None:
    """Refuse objects outside the image, and coordinates that are no pixels of it.

    Parameters
    ----------
    bounds : ndarray of float64, shape (n, 4)
        Lowest x, y and highest x, y of every object; of a point both are the same.
    names : sequence of str
        Of every object.
    shape : tuple of int
        Height and width of the image first.
    where : object
        File, for the message.
    mpp : float or None
        Micrometres per pixel; without it, coordinates that are too small are not noticed.

    Raises
    ------
    DataError
        Naming the first object and the likely cause.
    """
    height, width = shape[:2]
    low, high = bounds[:, :2], bounds[:, 2:]
    size = np.array([width, height], np.float64)
    outside = np.flatnonzero(((high < 0) | (low > size)).any(axis=1))
    if len(outside):
        i = int(outside[0])
        reach = float((high / size).max())
        if (low.min(axis=0) > 0).all() and len(outside) == len(bounds) > 1:
            cause = "as all others: of the whole slide rather than of this image?"
        elif reach > 1.5:
            cause = (
                f"coordinates reach {reach:.1f} times the image: of another pyramid level, or in "
                "micrometres?"
            )
        else:
            cause = "remove it, or give the image that it belongs to"
        x0, y0, x1, y1 = bounds[i]
        raise DataError(
            f"{where}: {names[i]} lies outside the image ({width} x {height} px) at "
            f"x {x0:g}..{x1:g}, y {y0:g}..{y1:g}; {cause}"
        )
    if mpp is not None and _too_small(low, high, size, mpp):
        x, y = high.max(axis=0)
        raise DataError(
            f"{where}: coordinates look like micrometres or a lower pyramid level: all {len(low)} "
            f"lie in x < {x:.4g}, y < {y:.4g} of {width} x {height} px at {mpp:g} micrometres per "
            "pixel; give them in pixels of the image"
        )


def _too_small(
    low: NDArray[np.float64], high: NDArray[np.float64], size: NDArray[np.float64], mpp: float
) -> bool:
    """Whether all lies in the corner that micrometres leave, with a second sign of it.

    The second sign is impossible nuclei, or for points, that they fill just this corner.
    """
    corner = size * mpp
    if mpp > 0.8 or not (high <= 1.02 * corner).all() or mpp ** (2 * len(high)) > 1e-4:
        return False
    diameter = float(np.median(np.sqrt(np.prod(high - low, axis=1))))
    if diameter > 0:
        return diameter * mpp < MIN_DIAMETER
    return bool((high.max(axis=0) > 0.8 * corner).all())


def _spans(
    shapes: NDArray[Any], height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Runs of pixels of polygons: position, row, first column and column after the last."""
    parts, of_part = shapely.get_parts(shapes, return_index=True)
    rings, of_ring = shapely.get_rings(parts, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    edge = np.flatnonzero(ring[:-1] == ring[1:])
    # From top to bottom, so that an edge shared by two outlines crosses a row at the same x.
    down = (points[edge + 1, 1] >= points[edge, 1])[:, None]
    (x0, y0), (x1, y1) = (np.where(down, points[edge + a], points[edge + 1 - a]).T for a in (0, 1))
    first = np.ceil(y0 - 0.5).clip(0, height).astype(np.int64)
    counts = np.ceil(y1 - 0.5).clip(0, height).astype(np.int64) - first
    e = np.repeat(np.arange(len(edge)), counts)
    row = first[e] + np.arange(len(e)) - np.repeat(np.cumsum(counts) - counts, counts)
    x = x0[e] + (row + 0.5 - y0[e]) * ((x1[e] - x0[e]) / (y1[e] - y0[e]))
    owner = of_part[of_ring[ring[edge[e]]]]
    order = np.lexsort((x, row, owner))[: len(x)]
    column = np.ceil(x[order] - 0.5).clip(0, width).astype(np.int64)
    owner, row, start, stop = owner[order][::2], row[order][::2], column[::2], column[1::2]
    some = stop > start
    return owner[some], row[some], start[some], stop[some]
