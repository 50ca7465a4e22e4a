"""Windows cut out of patches, fields and slides, at a stated resolution and size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image as PillowImage

from celltyper.datasets.images import read_image
from celltyper.datasets.resampling import resize_image
from celltyper.datasets.resolution import tiff_mpp
from celltyper.errors import DataError
from celltyper.patches.table import PatchTable
from celltyper.tiling import Region, read_padded
from celltyper.types import Image

SLACK_PX = 25
"""How far outside its image a centre may lie: half a box of MIDOG, two of whose published boxes are
drawn over the border of their image and have their centre beyond it."""

_TIFF_SUFFIXES = (".tif", ".tiff", ".svs")
_TIFF_ERRORS = (OSError, ValueError, KeyError, IndexError, RuntimeError, TypeError, MemoryError)
_APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.]+)")


class Header(NamedTuple):
    """What an image says before its pixels are decoded."""

    width: int
    height: int
    mpp: float | None


class Source(Protocol):
    """An image to cut windows from, at full resolution."""

    @property
    def header(self) -> Header:
        """Size and resolution."""

    def read(self, region: Region) -> Image:
        """Pixels (height, width, 3) of a region that lies inside the image."""


def read_header(path: Path) -> Header:
    """Read size and resolution of an image, not its pixels.

    Parameters
    ----------
    path : Path
        PNG, JPEG, TIFF or SVS.

    Returns
    -------
    Header
        Of the full resolution. ``mpp`` is None where the file states none.

    Raises
    ------
    DataError
        If the file is missing or no image.
    """
    return _header(path, *_version(path))


def open_image(path: Path) -> Source:
    """Open an image to cut windows from.

    Parameters
    ----------
    path : Path
        PNG, JPEG, TIFF or SVS. Of RGB TIFF files of 8 bits only the tiles or strips that a window
        touches are decoded; other files are decoded as a whole, and the last two kept.

    Returns
    -------
    Source

    Raises
    ------
    DataError
        If the file is missing or no image.
    """
    header = read_header(path)
    if path.suffix.lower() in _TIFF_SUFFIXES and _in_segments(path, *_version(path)):
        return _Segments(path, header)
    return _Whole(path, header)


def read_patch(table: PatchTable, i: int, *, size: int, mpp: float | None = None) -> Image:
    """Read the window of a row.

    Parameters
    ----------
    table : PatchTable
    i : int
        Row.
    size : int
        Side of the window in pixels at `mpp`.
    mpp : float, optional
        Micrometres per pixel wanted; without it, those of the file.

    Returns
    -------
    ndarray of uint8, shape (size, size, 3)
        Around the centre, or around the middle of a file that is the patch. What lies outside the
        image is mirrored, see `padded`. From another resolution it is resized by Lanczos,
        antialiased; its side is then rounded to whole pixels of the file.

    Raises
    ------
    DataError
        If the file cannot be read, a resolution is asked for that the file does not state, or the
        centre lies outside the image.
    """
    source = open_image(table.files[i])
    header = source.header
    region = _region(table, i, header, size, mpp)
    inside = _needed(region, header)
    pixels = source.read(inside)
    shifted = Region(region.row - inside.row, region.col - inside.col, *region[2:])
    image = read_padded(pixels, shifted)
    return image if region.height == size else resize_image(image, (size, size))


def padded(table: PatchTable, *, size: int, mpp: float | None = None) -> NDArray[np.bool_]:
    """Which windows reach over the border of their image.

    Parameters
    ----------
    table : PatchTable
    size : int
    mpp : float, optional
        As in `read_patch`.

    Returns
    -------
    ndarray of bool, shape (n,)

    Raises
    ------
    DataError
        As `read_patch`, but no pixels are read.
    """
    over = np.zeros(len(table), np.bool_)
    for i, file in enumerate(table.files):
        header = read_header(file)
        region = _region(table, i, header, size, mpp)
        over[i] = (
            region.row < 0
            or region.col < 0
            or region.row + region.height > header.height
            or region.col + region.width > header.width
        )
    return over


def check_centers(table: PatchTable) -> None:
    """Refuse centres that lie outside their image; only headers are read.

    Parameters
    ----------
    table : PatchTable

    Raises
    ------
    DataError
        Naming the first of them, its file and size, and the likely cause.
    """
    for i in np.flatnonzero(np.isfinite(table.centers[:, 0])):
        _check_center(table, int(i), read_header(table.files[i]))


def in_micrometres(
    centers: NDArray[np.float64], headers: Iterable[Header], mpp: float | None
) -> bool:
    """Whether points look as if they were given in micrometres instead of pixels.

    Parameters
    ----------
    centers : ndarray of float64, shape (n, 2)
        x, y.
    headers : iterable of Header
        Of the image of each.
    mpp : float or None
        Of all images, where they do not state it.

    Returns
    -------
    bool
        All lie in the top left corner of their image that micrometres would leave them, which n
        points do by chance with probability ``mpp ** (2 n)``; that must be below one in a million.
        At more than .9 micrometres per pixel the two cannot be told apart.
    """
    log_chance = 0.0
    for (x, y), header in zip(centers, headers, strict=True):
        scale = mpp or header.mpp
        if scale is None or scale > 0.9:
            return False
        if x > header.width * scale or y > header.height * scale:
            return False
        log_chance += 2 * math.log10(scale)
    return log_chance < -6


def _region(table: PatchTable, i: int, header: Header, size: int, mpp: float | None) -> Region:
    """Square of the file that becomes the window; may leave the image."""
    own = table.mpp or header.mpp
    side = size
    if mpp is not None:
        if own is None:
            raise DataError(
                f"{table.files[i]}: micrometres per pixel unknown, so a window at {mpp:g} cannot "
                "be cut; state the resolution of the files as 'mpp' in meta.json or data.mpp"
            )
        side = max(1, round(size * mpp / own))
    if math.isnan(table.centers[i, 0]):
        x, y = header.width / 2, header.height / 2
    else:
        _check_center(table, i, header)
        x, y = map(float, table.centers[i])
    return Region(math.floor(y - side / 2 + 0.5), math.floor(x - side / 2 + 0.5), side, side)


def _check_center(table: PatchTable, i: int, header: Header) -> None:
    x, y = map(float, table.centers[i])
    width, height, mpp = header.width, header.height, table.mpp or header.mpp

    def holds(x: float, y: float) -> bool:
        in_width = -SLACK_PX <= x <= width + SLACK_PX
        return in_width and -SLACK_PX <= y <= height + SLACK_PX

    if holds(x, y):
        return
    reach = max(x / width, y / height)
    if mpp is not None and mpp > 1 and holds(x / mpp, y / mpp):
        cause = f"in micrometres? At {mpp:g} a pixel it would be {x / mpp:g}, {y / mpp:g}"
    elif reach > 1.5:
        cause = (
            f"{reach:.1f} times the image: in pixels of another pyramid level, in micrometres, or "
            "of another image?"
        )
    else:
        cause = "remove the row, or name the image that it is of"
    raise DataError(
        f"{table.path}: {table.names[i]}: x {x:g}, y {y:g} is outside {table.files[i].name} "
        f"({width} x {height} px); {cause}"
    )


def _needed(region: Region, header: Header) -> Region:
    """Part of the image that a region shows, mirrored parts included."""
    row, height = _span(region.row, region.height, header.height)
    col, width = _span(region.col, region.width, header.width)
    return Region(row, col, height, width)


def _span(start: int, length: int, size: int) -> tuple[int, int]:
    stop = start + length
    before, after = max(0, -start), max(0, stop - size)
    # Mirrored pixels are as many as lie outside, counted from the border inwards.
    low = max(0, min(start, size - after))
    high = min(size, max(stop, before))
    return low, high - low


def _version(path: Path) -> tuple[int, int]:
    """Time and size of a file: what was read of an older one is not used again."""
    try:
        about = path.stat()
    except OSError:
        raise DataError(f"{path}: no such file") from None
    return about.st_mtime_ns, about.st_size


@lru_cache(maxsize=65536)
def _header(path: Path, *_: int) -> Header:
    if path.suffix.lower() not in _TIFF_SUFFIXES:
        try:
            with PillowImage.open(path) as image:
                return Header(*image.size, None)
        except (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError) as error:
            raise _unreadable(path, error) from None
    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            height, width = (series.shape[series.axes.index(a)] for a in "YX")
            return Header(int(width), int(height), tiff_mpp(tiff) or _aperio_mpp(tiff))
    except _TIFF_ERRORS as error:
        raise _unreadable(path, error) from None


def _aperio_mpp(tiff: tifffile.TiffFile) -> float | None:
    found = _APERIO_MPP.search(tiff.pages.first.description or "")
    return float(found[1]) if found else None


def _unreadable(path: Path, error: BaseException) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path}: unreadable or truncated ({reason})")


@lru_cache(maxsize=4096)
def _in_segments(path: Path, *_: int) -> bool:
    """Whether a TIFF is plain RGB, so that its segments are pixels as `read_image` gives them."""
    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        page = series.keyframe
        return bool(
            series.axes == "YXS"
            and series.shape[2] == 3
            and series.dtype == np.uint8
            and len(series.pages) == 1
            and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
            and page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
        )


@lru_cache(maxsize=2)
def _pixels(path: Path, *_: int) -> Image:
    return read_image(path).image


@dataclass(frozen=True)
class _Whole:
    """An image that is decoded as a whole."""

    path: Path
    header: Header

    def read(self, region: Region) -> Image:
        pixels = _pixels(self.path, *_version(self.path))
        return np.ascontiguousarray(pixels[region.slices])


@dataclass(frozen=True)
class _Segments:
    """A TIFF of which only the tiles or strips are decoded that are asked for."""

    path: Path
    header: Header

    def read(self, region: Region) -> Image:
        try:
            with tifffile.TiffFile(self.path) as tiff:
                return _decode(tiff, region)
        except _TIFF_ERRORS as error:
            raise _unreadable(self.path, error) from None


def _decode(tiff: tifffile.TiffFile, region: Region) -> Image:
    page = tiff.series[0].keyframe
    if page.is_tiled:
        height, width = page.tilelength, page.tilewidth
    else:
        height, width = min(page.rowsperstrip, page.imagelength), page.imagewidth
    across = math.ceil(page.imagewidth / width)
    out = np.full((region.height, region.width, 3), page.nodata, np.uint8)
    bottom, right = region.row + region.height, region.col + region.width
    for i in range(region.row // height, math.ceil(bottom / height)):
        for j in range(region.col // width, math.ceil(right / width)):
            index = i * across + j
            if not page.databytecounts[index]:  # an empty tile of a sparse slide
                continue
            tiff.filehandle.seek(page.dataoffsets[index])
            data = tiff.filehandle.read(page.databytecounts[index])
            segment, *_ = page.decode(
                data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader
            )
            rows = slice(max(region.row, i * height), min(bottom, (i + 1) * height))
            cols = slice(max(region.col, j * width), min(right, (j + 1) * width))
            if segment is not None:
                out[_shifted(rows, region.row), _shifted(cols, region.col)] = segment[
                    0, _shifted(rows, i * height), _shifted(cols, j * width)
                ]
    return out


def _shifted(span: slice, by: int) -> slice:
    return slice(span.start - by, span.stop - by)
