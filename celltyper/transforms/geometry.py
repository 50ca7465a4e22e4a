"""Geometry of tiles: symmetries, and one coordinate map for image and labels."""

from __future__ import annotations

import math

import cc3d
import numpy as np
from numba import njit
from numpy.random import Generator
from numpy.typing import NDArray

from celltyper.types import Image, Labels

ORDER = (0, 4, 2, 6, 1, 3, 5, 7)
"""Symmetries in the order in which few of them are taken: as it is, mirrored, quarter turns."""

ELASTIC_SPACING = 32
"""Pixels between the control points of the elastic field."""

_FIELD_STD = 0.48  # of a cubic B-spline surface over control points of variance 1


def symmetry(image: Image, labels: Labels, which: int) -> tuple[Image, Labels]:
    """Apply one of the eight symmetries of the square, as views.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB image.
    labels : ndarray of int32, shape (H, W)
        Instance labels.
    which : int
        0 to 7: ``which % 4`` counter-clockwise quarter turns, then left and right are swapped if
        4 or more. Height and width swap for odd quarter turns.

    Returns
    -------
    image, labels : ndarray
        Views of the input.
    """
    image, labels = np.rot90(image, which % 4), np.rot90(labels, which % 4)
    return (image[:, ::-1], labels[:, ::-1]) if which >= 4 else (image, labels)


def affine_matrix(angle: float, scale: float) -> NDArray[np.float64]:
    """Matrix from output to input (row, col), for a counter-clockwise turn and a magnification.

    Parameters
    ----------
    angle : float
        Radians.
    scale : float
        Above 1 enlarges.

    Returns
    -------
    ndarray of float64, shape (2, 2)
        Exactly the identity for ``(0, 1)``.
    """
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    return np.array([[c, s], [-s, c]])


def elastic_field(
    shape: tuple[int, int], rms: float, rng: Generator, spacing: int = ELASTIC_SPACING
) -> NDArray[np.float64]:
    """Control points of a smooth random displacement: a cubic B-spline surface.

    Parameters
    ----------
    shape : (int, int)
        Height and width of the output.
    rms : float
        Root mean square displacement along each axis, in pixels. (The usual "alpha 63, sigma 32"
        of a Gaussian-smoothed uniform field is 0.3 px, which does nothing.)
    rng : numpy.random.Generator
        Source of randomness.
    spacing : int
        Pixels between control points; the field's correlation length.

    Returns
    -------
    ndarray of float64, shape (rows, cols, 2)
        Displacement in pixels of every control point, for `warp`.
    """
    points = (shape[0] // spacing + 4, shape[1] // spacing + 4, 2)
    return rng.standard_normal(points) * (rms / _FIELD_STD)


def warp(
    image: Image,
    labels: Labels,
    matrix: NDArray[np.float64],
    offset: NDArray[np.float64],
    field: NDArray[np.float64] | None,
    shape: tuple[int, int],
    spacing: int = ELASTIC_SPACING,
) -> tuple[Image, Labels, NDArray[np.bool_]]:
    """Move image and labels through one coordinate map, so that both are resampled once.

    The output pixel p shows the input at ``centre_in + matrix @ (p - centre_out) + offset +
    field(p)``, with ``centre_in`` rounded so that the identity falls on pixels. The input goes on
    beyond its border by reflection about the edge pixels.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        Interpolated linearly.
    labels : ndarray of int32, shape (H, W)
        Nearest neighbour.
    matrix : ndarray of float64, shape (2, 2)
        From output to input.
    offset : ndarray of float64, shape (2,)
        Pixels of the input.
    field : ndarray of float64, shape (rows, cols, 2), or None
        From `elastic_field` for the same shape and spacing.
    shape : (int, int)
        Height and width of the output.
    spacing : int
        Pixels between control points.

    Returns
    -------
    image : ndarray of uint8, shape (height, width, 3)
        The input itself if the map is the identity.
    labels : ndarray of int32, shape (height, width)
        Likewise.
    mirrored : ndarray of bool, shape (height, width)
        True where the output shows a reflection.
    """
    same = field is None and not offset.any() and (matrix == np.eye(2)).all()
    if same and labels.shape == tuple(shape):
        return image, labels, np.zeros(shape, np.bool_)
    if field is None:
        field = np.zeros((0, 0, 2))
    weights = _spline_weights(max(shape), spacing)
    moved: tuple[Image, Labels, NDArray[np.bool_]] = _warp(
        np.ascontiguousarray(image),
        np.ascontiguousarray(labels),
        matrix,
        offset,
        field,
        weights,
        spacing,
        shape[0],
        shape[1],
    )
    return moved


def split_mirrored(
    labels: Labels, mirrored: NDArray[np.bool_], phenotypes: NDArray[np.uint8]
) -> tuple[Labels, NDArray[np.uint8]]:
    """Give mirrored copies of nuclei ids of their own.

    A reflection shows a nucleus twice; under one id, its centre would lie between the two and
    every distance map would be wrong.

    Parameters
    ----------
    labels : ndarray of int32, shape (H, W)
        Labels that may show an id several times.
    mirrored : ndarray of bool, shape (H, W)
        True where a pixel is a reflection.
    phenotypes : ndarray of uint8
        Class by label id.

    Returns
    -------
    labels : ndarray of int32, shape (H, W)
        Connected parts that lie in the reflection entirely have new ids from ``len(phenotypes)``
        on; a part that goes on beyond the border into its own reflection stays one.
    phenotypes : ndarray of uint8
        Lengthened by the new ids.
    """
    if not labels[mirrored].any():
        return labels, phenotypes
    parts = cc3d.connected_components(np.ascontiguousarray(labels), connectivity=8)
    origin = np.zeros(int(parts.max()) + 1, np.int32)
    origin[parts.ravel()] = labels.ravel()
    real = np.bincount(parts[~mirrored], minlength=len(origin)) > 0
    copies = np.flatnonzero(~real & (origin > 0))
    ids = origin.copy()
    ids[copies] = len(phenotypes) + np.arange(len(copies))
    return ids[parts], np.concatenate([phenotypes, phenotypes[origin[copies]]])


def _spline_weights(length: int, spacing: int) -> NDArray[np.float64]:
    """Cubic B-spline weights of the four control points around every position."""
    t = np.arange(length) % spacing / spacing
    basis = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    return np.stack(basis, axis=1) / 6


@njit(cache=True, nogil=True, inline="always")
def _mirror(i, n):  # type: ignore[no-untyped-def]
    if 0 <= i < n:
        return i
    if n == 1:
        return 0
    period = 2 * (n - 1)
    i = abs(i) % period
    return min(i, period - i)


@njit(cache=True, nogil=True)
def _warp(image, labels, matrix, offset, field, weights, spacing, height, width):  # type: ignore[no-untyped-def]
    rows, cols = labels.shape
    out = np.empty((height, width, 3), np.uint8)
    ids = np.empty((height, width), np.int32)
    mirrored = np.zeros((height, width), np.bool_)
    bend_y, bend_x = np.zeros(field.shape[1]), np.zeros(field.shape[1])
    one, half = np.float32(1), np.float32(0.5)
    # Whole pixels between the corners, so that cutting an odd from an even size blurs nothing.
    middle_y = (rows - height) // 2 + (height - 1) / 2 + offset[0]
    middle_x = (cols - width) // 2 + (width - 1) / 2 + offset[1]
    for r in range(height):
        if field.shape[0]:
            bend_y[:] = 0
            bend_x[:] = 0
            for k in range(4):
                for g in range(field.shape[1]):
                    bend_y[g] += weights[r, k] * field[r // spacing + k, g, 0]
                    bend_x[g] += weights[r, k] * field[r // spacing + k, g, 1]
        dr = r - (height - 1) / 2
        for c in range(width):
            dc = c - (width - 1) / 2
            y = middle_y + matrix[0, 0] * dr + matrix[0, 1] * dc
            x = middle_x + matrix[1, 0] * dr + matrix[1, 1] * dc
            if field.shape[0]:
                left = c // spacing
                for k in range(4):
                    y += weights[c, k] * bend_y[left + k]
                    x += weights[c, k] * bend_x[left + k]
            ya, xa = int(np.floor(y)), int(np.floor(x))
            fy, fx = np.float32(y - ya), np.float32(x - xa)
            yb, xb = ya + 1, xa + 1
            near_y, near_x = (yb if fy >= half else ya), (xb if fx >= half else xa)
            if ya < 0 or xa < 0 or yb >= rows or xb >= cols:
                mirrored[r, c] = near_y < 0 or near_x < 0 or near_y >= rows or near_x >= cols
                near_y, near_x = _mirror(near_y, rows), _mirror(near_x, cols)
                ya, yb = _mirror(ya, rows), _mirror(yb, rows)
                xa, xb = _mirror(xa, cols), _mirror(xb, cols)
            ids[r, c] = labels[near_y, near_x]
            aa, ab = (one - fy) * (one - fx), (one - fy) * fx
            ba, bb = fy * (one - fx), fy * fx
            for k in range(3):
                value = image[ya, xa, k] * aa + image[ya, xb, k] * ab + half
                out[r, c, k] = np.uint8(value + image[yb, xa, k] * ba + image[yb, xb, k] * bb)
    return out, ids, mirrored
