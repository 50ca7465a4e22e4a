"""Reading of plain images and label images: PNG, JPEG, TIFF."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image as PillowImage

from celltyper.datasets.resolution import tiff_mpp
from celltyper.errors import DataError
from celltyper.types import Image, Labels

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".tif", ".tiff")
MAX_LABEL = 2**24 - 1
"""Highest label id: tables by id are kept as arrays, so wild ids would cost gigabytes."""

_PILLOW_LIMIT = threading.Lock()
_TIFF_ERRORS = (OSError, ValueError, KeyError, IndexError, RuntimeError, TypeError, MemoryError)


class ImageFile(NamedTuple):
    """An image and its resolution."""

    image: Image
    mpp: float | None


def read_image(path: str | Path) -> ImageFile:
    """Read an image as RGB.

    Parameters
    ----------
    path : str or Path
        PNG, JPEG or TIFF (Aperio's ``.svs`` too); any size. TIFF pyramids give their full
        resolution.

    Returns
    -------
    ImageFile
        ``image`` (H, W, 3) uint8 and ``mpp`` (micrometres per pixel from OME, ImageJ or TIFF
        resolution tags; None for other formats, if the tags state none, if they say a resolution
        that no microscope has, or if x and y differ by more than 1 %).

    Raises
    ------
    DataError
        If the file is missing, truncated, not an image, holds several pages, is CMYK or
        floating-point, or has more than 8 bits with values above 255 (how such values map to
        colors is not the reader's to guess).

    Notes
    -----
    Grey and palette images become RGB. An opaque alpha channel is dropped, another one is
    composited on white, the color of empty glass. The EXIF orientation is ignored: labels are
    drawn on the pixels as stored.
    """
    path = Path(path)
    _require_file(path)
    if path.suffix.lower() in (".tif", ".tiff", ".svs"):
        pixels, mpp = _read_tiff_colors(path)
    else:
        pixels, mpp = _read_pillow_colors(path), None
    return ImageFile(_to_rgb(pixels, path), mpp)


def read_label_image(path: str | Path) -> Labels:
    """Read an instance mask.

    Parameters
    ----------
    path : str or Path
        PNG (8 or 16 bit; a palette image gives its indices) or TIFF (8, 16 or 32 bit) of one
        channel.

    Returns
    -------
    ndarray of int32, shape (H, W)
        Label ids, 0 is background.

    Raises
    ------
    DataError
        If the file is missing, truncated, binary, in color or floating-point, or if an id is
        negative or above 2**24 - 1.
    """
    path = Path(path)
    _require_file(path)
    if path.suffix.lower() in (".tif", ".tiff"):
        try:
            raw = np.asarray(tifffile.imread(path))
        except _TIFF_ERRORS as error:
            raise _unreadable(path, error) from None
    else:
        raw = np.asarray(_open_pillow(path))
    if raw.ndim == 3 and 1 in raw.shape:
        raw = raw.squeeze()
    if raw.ndim != 2:
        raise DataError(
            f"{path}: instance mask must have one channel of label ids, got shape {raw.shape}"
        )
    if raw.dtype == np.bool_:
        raise DataError(f"{path}: binary mask; instance masks give every nucleus its own id")
    return as_labels(raw, path)


def as_labels(raw: NDArray[Any], where: object) -> Labels:
    """Convert label ids of any integer type to int32, or refuse them.

    Parameters
    ----------
    raw : ndarray of integers, shape (H, W)
        Label ids.
    where : object
        File or sample, for the message.

    Returns
    -------
    ndarray of int32, shape (H, W)
        Contiguous in memory.

    Raises
    ------
    DataError
        If the array is not two-dimensional or not integer, or an id is out of range.
    """
    if raw.ndim != 2 or not np.issubdtype(raw.dtype, np.integer):
        raise DataError(
            f"{where}: label ids must be an integer array (H, W), got {raw.shape} {raw.dtype}"
        )
    low, high = int(raw.min(initial=0)), int(raw.max(initial=0))
    if low < 0 or high > MAX_LABEL:
        raise DataError(
            f"{where}: label ids must lie in 0..{MAX_LABEL}, got {low}..{high}; renumber them "
            "from 1, for instance with skimage.segmentation.relabel_sequential"
        )
    return np.ascontiguousarray(raw, dtype=np.int32)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file")


def _unreadable(path: Path, error: BaseException) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path}: unreadable or truncated ({reason})")


def _open_pillow(path: Path) -> PillowImage.Image:
    # Pillow refuses large images as possible attacks; fields of a slide are large. The limit is
    # global, so it is lifted under a lock and put back.
    with _PILLOW_LIMIT:
        limit, PillowImage.MAX_IMAGE_PIXELS = PillowImage.MAX_IMAGE_PIXELS, None
        try:
            with PillowImage.open(path) as image:
                image.load()
                return image
        except (OSError, ValueError, SyntaxError, MemoryError) as error:
            raise _unreadable(path, error) from None
        finally:
            PillowImage.MAX_IMAGE_PIXELS = limit


def _read_pillow_colors(path: Path) -> NDArray[Any]:
    image = _open_pillow(path)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("1", "YCbCr", "PA", "La", "RGBa", "HSV", "LAB"):
        image = image.convert("RGBA" if image.mode in ("PA", "La", "RGBa") else "RGB")
    elif image.mode == "CMYK":
        raise DataError(f"{path}: CMYK image; convert it to RGB first")
    elif image.mode in ("L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image)


def _read_tiff_colors(path: Path) -> tuple[NDArray[Any], float | None]:
    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            page = series.keyframe
            pixels = series.asarray()
            axes = series.axes
            photometric = page.photometric
            colormap = page.colormap
            premultiplied = any(int(e) == 1 for e in page.extrasamples)
            mpp = tiff_mpp(tiff)
    except _TIFF_ERRORS as error:
        raise _unreadable(path, error) from None
    keep = [i for i, n in enumerate(pixels.shape) if n > 1 or axes[i] in "YX"]
    pixels = pixels.reshape([pixels.shape[i] for i in keep])
    axes = "".join(axes[i] for i in keep)
    if axes in ("SYX", "CYX") and pixels.shape[0] in (3, 4):
        pixels, axes = np.moveaxis(pixels, 0, -1), "YXS"
    if axes not in ("YX", "YXS", "YXC"):
        raise DataError(
            f"{path}: TIFF with axes {axes or '?'} of shape {pixels.shape} is not one RGB or grey "
            "image; save one page per file"
        )
    if photometric == tifffile.PHOTOMETRIC.SEPARATED:
        raise DataError(f"{path}: CMYK image; convert it to RGB first")
    if photometric == tifffile.PHOTOMETRIC.PALETTE and colormap is not None:
        pixels = (np.moveaxis(colormap, 0, -1)[pixels] >> 8).astype(np.uint8)
    elif photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype in (np.uint8, np.bool_):
        pixels = ~pixels
    if premultiplied and pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        white = pixels[..., :-1].astype(np.int32) + 255 - pixels[..., -1:]
        pixels = white.clip(0, 255).astype(pixels.dtype)
    return pixels, mpp


def _to_rgb(pixels: NDArray[Any], path: Path) -> Image:
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(pixels.dtype, np.integer):
        raise DataError(f"{path}: pixels are {pixels.dtype}; save the image as 8-bit RGB")
    if 0 in pixels.shape:
        raise DataError(f"{path}: image is empty, shape {pixels.shape}")
    if pixels.dtype != np.uint8:
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 255:
            raise DataError(
                f"{path}: {pixels.dtype} pixels with values {low}..{high}; only 0..255 are read, "
                "rescale the image to 8 bits first"
            )
        pixels = pixels.astype(np.uint8)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = pixels.shape[2]
    if channels in (2, 4):
        pixels = _on_white(pixels[..., :-1], pixels[..., -1:])
    elif channels not in (1, 3):
        raise DataError(f"{path}: {channels} channels; an H&E image has 1, 3 or 4 (with alpha)")
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels)


def _on_white(colors: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if int(alpha.min()) == 255:
        return colors
    a = alpha.astype(np.uint32)
    mixed = (colors * a + 255 * (255 - a) + 127) // 255
    return mixed.astype(np.uint8)
