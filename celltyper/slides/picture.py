"""Images that are decoded as a whole: PNG, JPEG, and TIFF of rarer kinds."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import tifffile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from celltyper.datasets.images import read_image
from celltyper.datasets.resolution import stated_mpp
from celltyper.errors import DataError
from celltyper.slides.source import Tile, piece, reason
from celltyper.slides.tiff import BAD_BYTES, MOST_AT_ONCE, quiet_tifffile
from celltyper.tiling import Region
from celltyper.types import Image

_TILE = 512
_PILLOW = {"png": PngImageFile, "jpeg": JpegImageFile}


class PictureSource:
    """Tiles of an image that is kept in memory, see `celltyper.slides.source.Source`.

    Parameters
    ----------
    path : str
        Absolute; decoded when the first tile is wanted, by `celltyper.datasets.images.read_image`.
    format : str
        ``"png"``, ``"jpeg"`` or ``"tiff"``.

    Raises
    ------
    DataError
        If it is no image, or too large to be decoded at once.
    """

    icc: bytes | None
    mpp: tuple[float, float] | None = None
    magnification = None

    def __init__(self, path: str, format: str) -> None:
        self.path, self.format = path, format
        self._lock = Lock()
        self._pixels: Image | None = None
        try:
            width, height = self._read_tiff() if format == "tiff" else self._read_header()
        except (OSError, SyntaxError, *BAD_BYTES) as error:
            raise DataError(f"{path}: damaged or truncated image ({reason(error)})") from None
        if width * height > MOST_AT_ONCE:
            raise DataError(
                f"{path}: {width} x {height} px are too many to be decoded at once; save it as "
                "TIFF in tiles, for instance with 'vips tiffsave --tile --pyramid'"
            )
        self.sizes = ((width, height),)
        self.tiles = ((_TILE, _TILE),)
        self.bounds = Region(0, 0, height, width)

    def _read_header(self) -> tuple[int, int]:
        with _PILLOW[self.format](self.path) as image:
            self.icc = image.info.get("icc_profile") or None
            return image.size

    def _read_tiff(self) -> tuple[int, int]:
        with quiet_tifffile(), tifffile.TiffFile(self.path) as tiff:
            self.mpp = stated_mpp(tiff)
            page = tiff.series[0].keyframe
            profile = page.tags.valueof("InterColorProfile")
            self.icc = bytes(profile) if profile else None
            return int(page.imagewidth), int(page.imagelength)

    def __reduce__(self) -> tuple[Any, ...]:
        return PictureSource, (self.path, self.format)

    def tile(self, level: int, row: int, col: int) -> Tile:
        """Cut out of the image; an image that cannot be decoded is an error, not a tile."""
        with self._lock:
            if self._pixels is None:
                self._pixels = read_image(Path(self.path)).image
        return Tile(self._pixels[piece(row, col, self.tiles[level], self.sizes[level]).slices])

    def close(self) -> None:
        """Free the memory."""
        self._pixels = None
