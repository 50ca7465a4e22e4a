"""TIFF files whose tiles are decoded one by one: OME-TIFF, plain (Big)TIFF, Aperio's SVS in JPEG.

Only the bytes of the tiles that are wanted are read. JPEG, in which nearly all slides are stored,
goes straight to libjpeg-turbo, which takes a warning of the decoder (a broken stream that still
gives pixels) for damage, as OpenSlide does; every other compression goes through tifffile.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from celltyper.datasets.resolution import stated_mpp
from celltyper.errors import DataError
from celltyper.slides.source import WHITE, Tile, on_white, piece, plausible, reason, white
from celltyper.tiling import Region
from celltyper.types import Image

MOST_AT_ONCE = 1 << 28
"""Pixels; what can only be decoded in one piece must not be larger."""

BAD_BYTES = (ValueError, KeyError, IndexError, RuntimeError, TypeError)
"""What decoders raise. A disk or network that fails (OSError) is another matter: it damages no
tile, and must not turn a slide into glass."""

_JPEG = tifffile.COMPRESSION.JPEG
_PHOTOMETRIC = tifffile.PHOTOMETRIC
_APERIO = re.compile(r"\|\s*(MPP|AppMag)\s*=\s*([0-9.]+)")
_STRIP_BYTES = 1 << 20
_END_OF_JPEG = b"\xff\xd9"
_HEAD = 256
_PROBES = 8


class NotInTilesError(Exception):
    """A TIFF whose tiles are of a kind that is not read here."""


class TiffSource:
    """Tiles of a TIFF file, see `celltyper.slides.source.Source`.

    Parameters
    ----------
    path : str
        Absolute.
    only_jpeg : bool
        Refuse what is not all JPEG, without gaps.

    Raises
    ------
    NotInTilesError
        If the pixels are of a kind that is not read tile by tile, such as palettes.
    DataError
        If the file is truncated or holds several planes, or if nothing reads its compression.
    """

    def __init__(self, path: str, only_jpeg: bool = False) -> None:
        self.path = path
        self._only_jpeg = only_jpeg
        self._file = _File(path)
        try:
            with quiet_tifffile(), tifffile.TiffFile(path) as tiff:
                self._read_header(tiff)
        except (NotInTilesError, DataError):
            raise
        except (OSError, *BAD_BYTES) as error:
            raise DataError(f"{path}: damaged or truncated TIFF ({reason(error)})") from None

    def _read_header(self, tiff: tifffile.TiffFile) -> None:
        levels = [_level(self.path, self._file, pages) for pages in _images(self.path, tiff)]
        if self._only_jpeg and not all(level.turbo and level.counts.all() for level in levels):
            raise NotInTilesError
        for level in levels:
            _check(self.path, level)
        self._levels = levels
        self.sizes = tuple(level.size for level in levels)
        self.tiles = tuple(level.tile for level in levels)
        self.bounds = Region(0, 0, self.sizes[0][1], self.sizes[0][0])
        self.format = "aperio" if tiff.is_svs else "ome-tiff" if tiff.is_ome else "tiff"
        self.mpp = stated_mpp(tiff)
        self.magnification: float | None = None
        if tiff.is_svs:
            stated = dict(_APERIO.findall(tiff.pages.first.description))
            self.mpp = plausible(stated.get("MPP"), stated.get("MPP"))
            self.magnification = float(stated["AppMag"]) if "AppMag" in stated else None
        profile = tiff.pages.first.tags.valueof("InterColorProfile")
        self.icc = bytes(profile) if profile else None

    def __reduce__(self) -> tuple[Any, ...]:
        return TiffSource, (self.path, self._only_jpeg)

    def tile(self, level: int, row: int, col: int) -> Tile:
        """Tile, decoded; white where the file has none."""
        stored = self._levels[level]
        try:
            return Tile(stored.decode(self._file, row, col))
        except BAD_BYTES as error:
            _, _, height, width = piece(row, col, stored.tile, stored.size)
            return Tile(white(height, width), (Region(0, 0, height, width),), reason(error))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _File:
    """A file that several threads, and processes after a fork, may read at once."""

    def __init__(self, path: str) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
        self.close = weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        self._lock = threading.Lock()

    def read(self, offset: int, count: int) -> bytes:
        if hasattr(os, "pread"):
            data = os.pread(self._descriptor, count, offset)
        else:
            with self._lock:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                data = os.read(self._descriptor, count)
        if len(data) < count:
            raise ValueError(f"{count - len(data)} of {count} bytes are missing")
        return data


@dataclass(frozen=True, eq=False)
class _Level:
    """One resolution: where its tiles lie and how they are decoded.

    Parameters
    ----------
    page : tifffile.TiffPage
        Whose tags hold for all planes.
    size, tile : tuple of int
        Width and height; height and width.
    offsets, counts : ndarray of int64, shape (planes, tiles)
        Bytes.
    turbo : bytes
        What comes before every JPEG, or nothing if tifffile has to decode.
    raw : bool
        Whether rows follow each other as they are.
    """

    page: Any
    size: tuple[int, int]
    tile: tuple[int, int]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    turbo: bytes
    raw: bool

    def decode(self, file: _File, row: int, col: int) -> Image:
        index = row * math.ceil(self.size[0] / self.tile[1]) + col
        _, _, height, width = piece(row, col, self.tile, self.size)
        counts = self.counts[:, index].tolist()
        if not all(counts):  # an empty tile of a sparse file
            return white(height, width)
        data = [
            file.read(o, n) for o, n in zip(self.offsets[:, index].tolist(), counts, strict=True)
        ]
        if self.turbo:
            stream = self.turbo + data[0][2:] + _END_OF_JPEG
            pixels: Image = simplejpeg.decode_jpeg(stream, "RGB")
            if pixels.shape[:2] != self.tile:
                raise ValueError(f"JPEG of {pixels.shape[:2]} pixels in a tile of {self.tile}")
            return pixels
        if self.raw:
            parts = [np.frombuffer(d, np.uint8).reshape(height, width, -1) for d in data]
        else:
            parts = [self._segment(d, plane, index) for plane, d in enumerate(data)]
        samples = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        return _colors(samples[:height, :width], self.page)

    def _segment(self, data: bytes, plane: int, index: int) -> NDArray[np.uint8]:
        page = self.page
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            index += plane * self.counts.shape[1]
        segment, *_ = page.decode(
            data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader
        )
        found: NDArray[np.uint8] = segment[0]
        return found


def _colors(samples: NDArray[np.uint8], page: Any) -> Image:
    """RGB of one or three samples, or of two or four with alpha."""
    if page.photometric == _PHOTOMETRIC.MINISWHITE:
        samples = ~samples
    shape = (*samples.shape[:2], 3)
    if samples.shape[2] in (1, 3):
        return np.ascontiguousarray(np.broadcast_to(samples, shape))
    colors, alpha = np.broadcast_to(samples[..., :-1], shape), samples[..., -1]
    if any(int(extra) == 1 for extra in page.extrasamples):  # multiplied by alpha already
        mixed = colors.astype(np.uint16) + (WHITE - alpha)[..., None]
        return mixed.clip(0, WHITE).astype(np.uint8)
    return on_white(colors, alpha)


def _images(path: str, tiff: tifffile.TiffFile) -> list[list[Any]]:
    """Pages of all resolutions, the full one first; several pages are the planes of one image."""
    series = tiff.series
    if not series:
        raise DataError(f"{path}: damaged or truncated TIFF: no image in it; copy it again")
    main = series[0]
    if tiff.is_ome:  # label and macro images may come first
        main = max(series, key=lambda s: math.prod(s.shape[s.axes.index(a)] for a in "YX"))
    images = [_planes(path, level) for level in main.levels]
    first = images[0][0]
    if len(images) == 1 and not tiff.is_ome and first.is_tiled:
        # Pyramids that tifffile takes for images of their own: pages in a row, or below the first.
        others = [*(first.pages or []), *(p for p in tiff.pages if p.index != first.index)]
        images += [[page] for page in others if _smaller(tiff, page, first)]
    if any(page.parent is not tiff for pages in images for page in pages):
        raise DataError(f"{path}: OME-TIFF of several files; save it in one")
    return images


def _smaller(tiff: tifffile.TiffFile, page: Any, first: Any) -> bool:
    alike = ("is_tiled", "samplesperpixel", "bitspersample", "planarconfig")
    return (tiff.is_svs or page.is_reduced) and all(
        getattr(page, name) == getattr(first, name) for name in alike
    )


def _planes(path: str, series: Any) -> list[Any]:
    axes = [(a, n) for a, n in zip(series.axes, series.shape, strict=True) if n > 1 or a in "YX"]
    names = "".join(a for a, _ in axes)
    colors = max((n for a, n in axes if a in "CS"), default=1)
    if names not in ("YX", "YXS", "YXC", "SYX", "CYX") or colors > 4:
        raise DataError(
            f"{path}: TIFF with axes {names} of shape {series.shape} is not one RGB or grey image; "
            "save one plane with 3 channels per file"
        )
    pages = list(series.pages)
    if any(page is None for page in pages):
        raise DataError(f"{path}: damaged TIFF: {pages.count(None)} planes are missing")
    return pages


def _level(path: str, file: _File, pages: Sequence[Any]) -> _Level:
    page = pages[0].keyframe
    try:
        offsets = np.concatenate([p.dataoffsets for p in pages]).astype(np.int64)
        counts = np.concatenate([p.databytecounts for p in pages]).astype(np.int64)
        reach = int((offsets + counts).max())
    except ValueError:
        raise DataError(f"{path}: damaged or truncated TIFF: no tiles; copy it again") from None
    if reach > file.size:
        raise DataError(
            f"{path}: truncated: its tiles reach to byte {reach:,}, but it ends at "
            f"{file.size:,}; copy it again"
        )
    samples = page.samplesperpixel * len(pages)
    jpeg = page.compression == _JPEG
    plain = (_PHOTOMETRIC.RGB, _PHOTOMETRIC.MINISBLACK, _PHOTOMETRIC.MINISWHITE)
    if page.dtype != np.uint8 or page.bitspersample != 8:
        raise NotInTilesError(f"{page.bitspersample} bits per sample")
    if not (page.photometric in plain or (jpeg and page.photometric == _PHOTOMETRIC.YCBCR)):
        raise NotInTilesError(f"photometric {page.photometric}")
    if page.imagedepth > 1 or samples > 4:
        raise NotInTilesError(f"{samples} samples")
    size = (page.imagewidth, page.imagelength)
    tile = (page.tilelength, page.tilewidth)
    if not page.is_tiled:
        tile = (min(page.rowsperstrip, size[1]), size[0])
    number = math.ceil(size[0] / tile[1]) * math.ceil(size[1] / tile[0])
    planes = len(pages) * (1 if page.planarconfig == tifffile.PLANARCONFIG.CONTIG else samples)
    try:
        offsets, counts = offsets.reshape(planes, number), counts.reshape(planes, number)
    except ValueError:
        raise DataError(
            f"{path}: damaged or truncated TIFF: {planes * number} tiles or strips expected; copy "
            "it again"
        ) from None
    row_bytes = size[0] * samples // planes
    raw = (
        page.compression == tifffile.COMPRESSION.NONE
        and page.predictor == tifffile.PREDICTOR.NONE
        and not page.is_tiled
        and bool((counts.sum(axis=1) == row_bytes * size[1]).all())
        and bool((offsets[:, 1:] == (offsets + counts)[:, :-1]).all())
    )
    if raw:  # what is stored in one piece is read in small ones
        tile = (max(1, min(_STRIP_BYTES // row_bytes, size[1])), size[0])
        rows = np.arange(0, size[1], tile[0])
        offsets = offsets[:, :1] + rows * row_bytes
        counts = np.broadcast_to(np.minimum(tile[0], size[1] - rows) * row_bytes, offsets.shape)
    direct = jpeg and page.is_tiled and planes == 1 and samples == 3
    turbo = _turbo(file, page, offsets[0], counts[0]) if direct else b""
    return _Level(page, size, tile, offsets, counts, turbo, raw)


def _turbo(file: _File, page: Any, offsets: Any, counts: Any) -> bytes:
    """What makes a tile a complete JPEG with its colors as the TIFF tags state them, or nothing."""
    ycbcr = page.photometric == _PHOTOMETRIC.YCBCR
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([ycbcr])
    start = b"\xff\xd8" + adobe + (page.jpegtables or b"")[2:-2]
    some = np.flatnonzero(counts)
    for i in some[:: max(1, len(some) // _PROBES)][:_PROBES].tolist():
        try:
            stream = file.read(int(offsets[i]), int(counts[i]))
            simplejpeg.decode_jpeg(start + stream[2:] + _END_OF_JPEG, "RGB")
        except (OSError, ValueError):
            continue
        head = (page.jpegtables or b"")[:_HEAD] + stream[:_HEAD]
        # A marker of the tile's own would win over the tag.
        return b"" if b"Adobe" in head or (b"JFIF" in head and not ycbcr) else start
    return b""


def _check(path: str, level: _Level) -> None:
    page = level.page
    if not level.raw and page.compression not in tifffile.TIFF.DECOMPRESSORS:
        name = getattr(page.compression, "name", "unknown")
        raise DataError(
            f"{path}: TIFF compression {int(page.compression)} ({name}) cannot be decoded; save it "
            "with JPEG, LZW or deflate"
        )
    if math.prod(level.tile) > MOST_AT_ONCE:
        raise DataError(
            f"{path}: {level.size[0]} x {level.size[1]} px compressed in one piece; save it in "
            "tiles, for instance with 'vips tiffsave --tile --pyramid'"
        )


_MUTED: set[int] = set()


def _heard(_: logging.LogRecord) -> bool:
    return threading.get_ident() not in _MUTED


@contextmanager
def quiet_tifffile() -> Iterator[None]:
    """Keep tifffile from logging in this thread what an error or a fallback says anyway."""
    logger, thread = logging.getLogger("tifffile"), threading.get_ident()
    logger.addFilter(_heard)
    _MUTED.add(thread)
    try:
        yield
    finally:
        _MUTED.discard(thread)
