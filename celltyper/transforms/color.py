"""Color and sharpness of tiles: stain and color jitter, blur, noise."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.random import Generator

from celltyper.types import Image

# Optical density of haematoxylin, eosin and DAB in R, G, B: Ruifrok & Johnston 2001.
_RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS = _RUIFROK / np.linalg.norm(_RUIFROK, axis=1, keepdims=True)
_DENSITY = np.log10(255.0 / np.maximum(np.arange(256.0), 1.0)).astype(np.float32)
_GREY = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def hed_jitter(image: Image, rng: Generator, sigma: float = 0.025, bias: float = 0.05) -> Image:
    """Vary the stains: haematoxylin, eosin and residual, each scaled and offset.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB image.
    rng : numpy.random.Generator
        Source of randomness.
    sigma : float
        Every stain is scaled by a factor in ``1 - sigma .. 1 + sigma``.
    bias : float
        Then an amount in ``-bias .. bias`` is added, in optical density (decimal logarithm).

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        The input itself if both strengths are 0.

    Notes
    -----
    Tellez 2018, doi:10.1109/TMI.2018.2820199, with the stain matrix of Ruifrok & Johnston 2001
    (Anal Quant Cytol Histol 23:291). Separation, scaling and mixing are linear in optical density,
    hence one 3 x 3 matrix.
    """
    if sigma == 0 and bias == 0:
        return image
    factors = rng.uniform(1 - sigma, 1 + sigma, 3)
    offsets = rng.uniform(-bias, bias, 3)
    matrix = np.linalg.inv(_STAINS) @ np.diag(factors) @ _STAINS
    restained: Image = _restain(
        np.ascontiguousarray(image),
        _DENSITY,
        matrix.astype(np.float32),
        (offsets @ _STAINS).astype(np.float32),
    )
    return restained


def color_jitter(
    image: Image,
    rng: Generator,
    brightness: float = 0.1,
    contrast: float = 0.1,
    saturation: float = 0.1,
    hue: float = 0.02,
) -> Image:
    """Vary brightness, contrast, saturation and hue, in this order, clipped once at the end.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB image.
    rng : numpy.random.Generator
        Source of randomness.
    brightness, contrast, saturation : float
        Factors lie in ``1 - strength .. 1 + strength``: of the values, of their distance from the
        image's mean grey, and of their distance from the pixel's own grey.
    hue : float
        Largest turn of the hue in YIQ, as a share of the circle, either way.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        The input itself if all strengths are 0.
    """
    if brightness == 0 and contrast == 0 and saturation == 0 and hue == 0:
        return image
    b, c, s = (1 + rng.uniform(-x, x) for x in (brightness, contrast, saturation))
    turn = 2 * math.pi * rng.uniform(-hue, hue)
    rotate = np.eye(3)
    rotate[1:, 1:] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    chroma = np.linalg.inv(_YIQ) @ rotate @ _YIQ
    saturate = s * np.eye(3) + (1 - s) * np.outer(np.ones(3), _GREY)
    image = np.ascontiguousarray(image)
    pivot = b * float(_mean_color(image) @ _GREY) * (1 - c)
    matrix = chroma @ saturate * (c * b)
    offset = chroma @ saturate @ np.full(3, pivot)
    mixed: Image = _mix(image, matrix.astype(np.float32), offset.astype(np.float32))
    return mixed


def gaussian_blur(image: Image, sigma: float) -> Image:
    """Gaussian blur of an RGB image, truncated at three sigma, borders continued by their pixel.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB image.
    sigma : float
        Pixels; 0 gives the input itself.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        Blurred image.
    """
    if sigma == 0:
        return image
    radius = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    blurred: Image = _blur(np.ascontiguousarray(image), kernel)
    return blurred


def gaussian_noise(image: Image, rng: Generator, sigma: float) -> Image:
    """Add independent Gaussian noise of `sigma` grey levels; 0 gives the input itself."""
    if sigma == 0:
        return image
    noise = rng.standard_normal(image.shape, np.float32)
    noisy: Image = _add_noise(np.ascontiguousarray(image), noise, np.float32(sigma))
    return noisy


@njit(cache=True, nogil=True, inline="always")
def _to_byte(value):  # type: ignore[no-untyped-def]
    return np.uint8(min(max(value + np.float32(0.5), np.float32(0)), np.float32(255)))


@njit(cache=True, nogil=True)
def _restain(image, density, matrix, offset):  # type: ignore[no-untyped-def]
    out = np.empty_like(image)
    minus_log10 = np.float32(-2.302585093)
    for r in range(image.shape[0]):
        for c in range(image.shape[1]):
            red, green, blue = (
                density[image[r, c, 0]],
                density[image[r, c, 1]],
                density[image[r, c, 2]],
            )
            for k in range(3):
                value = red * matrix[0, k] + green * matrix[1, k] + blue * matrix[2, k] + offset[k]
                out[r, c, k] = _to_byte(np.float32(255) * np.exp(minus_log10 * value))
    return out


@njit(cache=True, nogil=True)
def _mix(image, matrix, offset):  # type: ignore[no-untyped-def]
    out = np.empty_like(image)
    for r in range(image.shape[0]):
        for c in range(image.shape[1]):
            red, green, blue = (
                np.float32(image[r, c, 0]),
                np.float32(image[r, c, 1]),
                np.float32(image[r, c, 2]),
            )
            for k in range(3):
                value = red * matrix[k, 0] + green * matrix[k, 1] + blue * matrix[k, 2] + offset[k]
                out[r, c, k] = _to_byte(value)
    return out


@njit(cache=True, nogil=True)
def _mean_color(image):  # type: ignore[no-untyped-def]
    red, green, blue = 0, 0, 0
    for r in range(image.shape[0]):
        for c in range(image.shape[1]):
            red += image[r, c, 0]
            green += image[r, c, 1]
            blue += image[r, c, 2]
    return np.array([red, green, blue]) / (image.shape[0] * image.shape[1])


@njit(cache=True, nogil=True)
def _blur(image, kernel):  # type: ignore[no-untyped-def]
    height, width = image.shape[:2]
    radius = len(kernel) // 2
    line = np.empty((width, 3), np.float32)
    out = np.empty_like(image)
    for r in range(height):
        line[:] = 0
        for k in range(len(kernel)):
            source = min(max(r + k - radius, 0), height - 1)
            for c in range(width):
                for channel in range(3):
                    line[c, channel] += kernel[k] * image[source, c, channel]
        for c in range(width):
            for channel in range(3):
                value = np.float32(0)
                for k in range(len(kernel)):
                    value += kernel[k] * line[min(max(c + k - radius, 0), width - 1), channel]
                out[r, c, channel] = _to_byte(value)
    return out


@njit(cache=True, nogil=True)
def _add_noise(image, noise, sigma):  # type: ignore[no-untyped-def]
    out = np.empty_like(image)
    for r in range(image.shape[0]):
        for c in range(image.shape[1]):
            for k in range(3):
                out[r, c, k] = _to_byte(image[r, c, k] + sigma * noise[r, c, k])
    return out
