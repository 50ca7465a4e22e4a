"""Every format that OpenSlide reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openslide

from celltyper.errors import DataError
from celltyper.slides.source import Tile, on_white, piece, plausible, reason, white
from celltyper.tiling import Region

_SIDE = 512
_DICOM_AT = 128
_BOUNDS = ("bounds-x", "bounds-y", "bounds-width", "bounds-height")


class VendorSource:
    """Tiles of a slide of any vendor, see `celltyper.slides.source.Source`.

    A slide that states what part of it was scanned (MIRAX, Leica) is that part alone: positions
    count from its corner, as in QuPath.

    Parameters
    ----------
    path : str
        Absolute.

    Raises
    ------
    DataError
        If OpenSlide cannot open it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        slide = _opened(path)
        stated: Mapping[str, str] = slide.properties
        self._slide = slide
        self._process = os.getpid()
        self.format = {"generic-tiff": "tiff"}.get(
            stated["openslide.vendor"], stated["openslide.vendor"]
        )
        self.bounds = _bounds(slide)
        self.mpp = plausible(stated.get("openslide.mpp-x"), stated.get("openslide.mpp-y"))
        power = stated.get("openslide.objective-power")
        self.magnification = float(power) if power else None
        profile = slide.color_profile
        self.icc = profile.tobytes() if profile is not None else None
        # Its own, 4.0003 for 4, are needed to hit the pixels that are meant.
        self._downsamples = slide.level_downsamples
        sizes = slide.level_dimensions
        if self.bounds[2:] != (slide.dimensions[1], slide.dimensions[0]):
            sizes = tuple(
                (max(1, round(self.bounds.width / d)), max(1, round(self.bounds.height / d)))
                for d in self._downsamples
            )
        self.sizes = sizes
        self._native = [
            tuple(
                int(stated.get(f"openslide.level[{i}].tile-{side}", _SIDE))
                for side in ("height", "width")
            )
            for i in range(len(sizes))
        ]
        self.tiles = tuple(
            (h * max(1, round(_SIDE / h)), w * max(1, round(_SIDE / w))) for h, w in self._native
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return VendorSource, (self.path,)

    def tile(self, level: int, row: int, col: int) -> Tile:
        """Several stored tiles at once; of a damaged one the rest is kept."""
        region = piece(row, col, self.tiles[level], self.sizes[level])
        try:
            return Tile(self._read(level, region))
        except openslide.OpenSlideError as error:
            why = reason(error)
        pixels, damaged = white(region.height, region.width), []
        height, width = self._native[level]
        for top in range(0, region.height, height):
            for left in range(0, region.width, width):
                part = Region(
                    top, left, min(height, region.height - top), min(width, region.width - left)
                )
                at = Region(region.row + top, region.col + left, part.height, part.width)
                try:
                    pixels[part.slices] = self._read(level, at)
                except openslide.OpenSlideError:
                    damaged.append(part)
        return Tile(pixels, tuple(damaged), why)

    def _read(self, level: int, region: Region) -> Any:
        slide = self._slide
        if self._process != os.getpid():  # files that are shared after a fork share their position
            slide = self._slide = _opened(self.path)
            self._process = os.getpid()
        try:
            return self._pixels(slide, level, region)
        except openslide.OpenSlideError:
            # After an error, which may have been another thread's, a handle gives nothing more.
            fresh = _opened(self.path)
            pixels = self._pixels(fresh, level, region)
            self._slide = fresh
            return pixels

    def _pixels(self, slide: openslide.OpenSlide, level: int, region: Region) -> Any:
        scale = self._downsamples[level]
        location = (
            self.bounds.col + round(region.col * scale),
            self.bounds.row + round(region.row * scale),
        )
        size = (region.width, region.height)
        colors = np.asarray(slide.read_region(location, level, size))
        return on_white(colors[..., :3], colors[..., 3])

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


def _opened(path: str) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise DataError(f"{path}: no slide that OpenSlide reads") from None
    except openslide.OpenSlideError as error:
        raise DataError(f"{path}: damaged or truncated slide ({reason(error)})") from None


def _bounds(slide: openslide.OpenSlide) -> Region:
    width, height = slide.dimensions
    try:
        x, y, w, h = (int(slide.properties[f"openslide.{name}"]) for name in _BOUNDS)
    except (KeyError, ValueError):
        return Region(0, 0, height, width)
    return Region(y, x, h, w)


def dicom_series(files: Iterable[Path]) -> dict[str, str]:
    """One file of every DICOM slide, by the identity of its series."""
    found: dict[str, str] = {}
    for file in files:
        with file.open("rb") as stream:
            stream.seek(_DICOM_AT)
            if stream.read(4) != b"DICM":
                continue
        with suppress(DataError), _opened(str(file)) as slide:
            found.setdefault(slide.properties.get("dicom.SeriesInstanceUID", ""), str(file))
    return found
