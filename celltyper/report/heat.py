"""Pictures of a slide for the page: densities in one color map, phenotypes in theirs, outlines."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache

import numpy as np
import PIL.Image
import shapely
from numpy.typing import NDArray
from skimage.measure import find_contours

from celltyper.cells.colors import rgb
from celltyper.types import Image

_MAP = "magma_r"
_SHADES = 255


@cache
def palette() -> NDArray[np.uint8]:
    """Colors from little to much, pale to dark in even steps of lightness, shape (255, 3)."""
    import matplotlib as mpl

    # The palest end would be that of glass, the darkest hide where a map has its maximum.
    colors = mpl.colormaps[_MAP](np.linspace(0.04, 0.92, _SHADES))
    return np.round(255 * colors[:, :3]).astype(np.uint8)


def gradient() -> str:
    """The color map as a gradient of CSS, from left to right."""
    stops = palette()[np.linspace(0, _SHADES - 1, 17).round().astype(np.intp)]
    colors = (f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in stops.tolist())
    return f"linear-gradient(90deg, {', '.join(colors)})"


def heat_png(values: NDArray[np.float32], top: float) -> str:
    """Draw a density in colors.

    Parameters
    ----------
    values : ndarray of float32, shape (H, W)
        NaN is left transparent.
    top : float
        What the last color stands for; more is drawn like it.

    Returns
    -------
    str
        ``data:image/png`` address.
    """
    shade = np.round(np.nan_to_num(values / top).clip(0, 1) * (_SHADES - 1)).astype(np.uint8)
    return _indexed_png(np.where(np.isnan(values), 0, shade + 1), palette().tolist())


def classes_png(classes: NDArray[np.uint8], colors: Sequence[str]) -> str:
    """Draw the classes 1..K in their colors; 0 is transparent. Address as of `heat_png`."""
    return _indexed_png(classes, [list(rgb(color)) for color in colors])


def faded(image: Image) -> Image:
    """The image without its colors and pale, so that it does not compete with what lies on it."""
    gray = np.asarray(PIL.Image.fromarray(image).convert("L"), np.float32)
    return np.repeat((95 + gray * (160 / 255)).round().astype(np.uint8)[..., None], 3, axis=2)


def contour_path(inside: NDArray[np.bool_], tolerance: float) -> str:
    """SVG path data of the outlines of a mask, in its pixels, off by at most `tolerance`."""
    lines = find_contours(np.pad(inside, 1).astype(np.float32), 0.5)
    # the centre of pixel [0, 0] is (0.5, 0.5) on the page, and (1, 1) in the padded mask
    rings = [shapely.linearrings(line[:, ::-1] - 0.5) for line in lines]
    parts = []
    for ring in shapely.simplify(rings, tolerance, preserve_topology=False):
        points = shapely.get_coordinates(ring)[:-1].tolist()
        parts += ["M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "z"] if points else []
    return "".join(parts)


def _indexed_png(index: NDArray[np.uint8], colors: Sequence[Sequence[int]]) -> str:
    picture = PIL.Image.fromarray(index.astype(np.uint8))
    picture.putpalette([255, 255, 255, *(channel for color in colors for channel in color)])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", transparency=0)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
