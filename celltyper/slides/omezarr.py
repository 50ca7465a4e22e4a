"""OME-Zarr 0.4 (zarr v2) and 0.5 (zarr v3), in a folder or at an fsspec URL."""

from __future__ import annotations

import gzip
import lzma
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr

from celltyper.errors import DataError, RunError
from celltyper.slides.source import Tile, on_white, piece, plausible, reason, white
from celltyper.tiling import Region
from celltyper.types import Image

_SIDE = 1024
_BAD_BYTES = (
    ValueError,
    RuntimeError,
    TypeError,
    IndexError,
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
)
"""What codecs raise, and no file system does."""
_MICRONS = {
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
}


class ZarrSource:
    """Tiles of an OME-Zarr image, see `celltyper.slides.source.Source`.

    Chunks that were never written have the fill value of the array, as zarr defines.

    Parameters
    ----------
    path : str
        Absolute path of a folder, or a URL.

    Raises
    ------
    DataError
        If it cannot be reached, is no OME-Zarr image, or no image of 1, 3 or 4 channels of 8 bits.
    """

    format = "ome-zarr"
    magnification = None
    icc = None

    def __init__(self, path: str) -> None:
        self.path = path
        image, metadata = _image(path, _group(path, path))
        datasets = metadata.get("datasets")
        axes = [a if isinstance(a, dict) else {"name": a} for a in metadata.get("axes", "tczyx")]
        self._axes = [str(a.get("name")) for a in axes]
        if not datasets or not {"x", "y"} <= set(self._axes):
            raise DataError(f"{path}: damaged OME-Zarr: its multiscales lack datasets or axes")
        try:
            found = [image[d["path"]] for d in datasets]
        except (KeyError, OSError, ValueError) as error:
            raise DataError(f"{path}: damaged OME-Zarr: a level is missing ({error})") from None
        arrays = _checked(path, self._axes, found)
        y, x = (self._axes.index(name) for name in "yx")
        self._arrays = arrays
        self.sizes = tuple((a.shape[x], a.shape[y]) for a in self._arrays)
        self.bounds = Region(0, 0, self.sizes[0][1], self.sizes[0][0])
        self._chunks = [(a.chunks[y], a.chunks[x]) for a in self._arrays]
        self.tiles = tuple(
            (h * max(1, _SIDE // h), w * max(1, _SIDE // w)) for h, w in self._chunks
        )
        self.mpp = _mpp(metadata, datasets[0], axes, x, y)

    def __reduce__(self) -> tuple[Any, ...]:
        return ZarrSource, (self.path,)

    def tile(self, level: int, row: int, col: int) -> Tile:
        """Several chunks at once; of a damaged one the rest is kept."""
        region = piece(row, col, self.tiles[level], self.sizes[level])
        try:
            return Tile(self._read(level, region))
        except _BAD_BYTES as error:
            why = reason(error)
        pixels, damaged = white(region.height, region.width), []
        height, width = self._chunks[level]
        for top in range(0, region.height, height):
            for left in range(0, region.width, width):
                part = Region(
                    top, left, min(height, region.height - top), min(width, region.width - left)
                )
                at = Region(region.row + top, region.col + left, part.height, part.width)
                try:
                    pixels[part.slices] = self._read(level, at)
                except _BAD_BYTES:
                    damaged.append(part)
        return Tile(pixels, tuple(damaged), why)

    def _read(self, level: int, region: Region) -> Image:
        spans = dict(zip("yx", region.slices, strict=True)) | {"c": slice(None)}
        index = tuple(spans.get(a, 0) for a in self._axes)
        try:
            found = np.asarray(self._arrays[level][index])
        except _BAD_BYTES:
            raise
        except Exception as error:  # noqa: BLE001 - file systems raise what they like
            raise RunError(
                f"{self.path}: reading failed ({reason(error)}); is the disk or network still "
                "there?"
            ) from None
        left = [a for a in self._axes if a in spans]
        planes = found.transpose([left.index(a) for a in "cyx" if a in left])
        planes = planes.reshape(-1, region.height, region.width)
        out = np.empty((region.height, region.width, 3), np.uint8)
        for i in range(3):  # three times as fast as one transposed copy
            out[..., i] = planes[i if len(planes) > 1 else 0]
        return on_white(out, planes[3]) if len(planes) == 4 else out

    def close(self) -> None:
        """Nothing is held open."""


def _group(path: str, place: str) -> zarr.Group:
    try:
        return zarr.open_group(place, mode="r")
    except ImportError as error:
        raise DataError(f"{path}: cannot be reached: {reason(error)}; install it") from None
    except Exception as error:  # noqa: BLE001 - file systems raise what they like
        if "://" in path and not isinstance(error, FileNotFoundError):
            raise DataError(f"{path}: cannot be reached ({reason(error)})") from None
        raise _no_image(path) from None


def _no_image(path: str) -> DataError:
    kind = "no OME-Zarr there" if "://" in path else "a folder, but no OME-Zarr image"
    return DataError(f"{path}: {kind}: no 'multiscales' in its metadata; give a slide")


def _image(path: str, group: zarr.Group) -> tuple[zarr.Group, Mapping[str, Any]]:
    """Group of the image and its multiscales; of bioformats2raw's layout the first image."""
    for place in (group, None):
        if place is None:
            if "0" not in group or not isinstance(group["0"], zarr.Group):
                break
            place = group["0"]
        attributes = place.attrs.asdict()
        inner = attributes.get("ome", attributes)
        scales = inner.get("multiscales") if isinstance(inner, dict) else None
        if isinstance(scales, list) and scales and isinstance(scales[0], dict):
            return place, scales[0]
        if isinstance(inner, dict) and "plate" in inner:
            raise DataError(f"{path}: a plate of many images; give the path of one of them")
    raise _no_image(path)


def _checked(path: str, axes: Sequence[str], found: Sequence[Any]) -> list[zarr.Array[Any]]:
    for array in found:
        if not isinstance(array, zarr.Array) or len(array.shape) != len(axes):
            raise DataError(f"{path}: damaged OME-Zarr: a level does not have the axes {axes}")
        for name, size in zip(axes, array.shape, strict=True):
            if (name == "c" and size not in (1, 3, 4)) or (name not in "cyx" and size != 1):
                raise DataError(
                    f"{path}: {size} planes along axis {name!r} (shape {array.shape}); a slide has "
                    "1, 3 or 4 channels and one plane"
                )
        if array.dtype != np.uint8:
            raise DataError(f"{path}: pixels are {array.dtype}; save the image as 8-bit RGB")
    return list(found)


def _mpp(
    metadata: Mapping[str, Any],
    dataset: Mapping[str, Any],
    axes: Sequence[Mapping[str, Any]],
    x: int,
    y: int,
) -> tuple[float, float] | None:
    scale = [1.0] * len(axes)
    for holder in (dataset, metadata):
        for transformation in holder.get("coordinateTransformations") or []:
            factors = transformation.get("scale")
            if transformation.get("type") == "scale" and len(factors or []) == len(axes):
                scale = [s * float(f) for s, f in zip(scale, factors, strict=True)]
    units = [_MICRONS.get(str(axes[i].get("unit")), math.nan) for i in (x, y)]
    return plausible(scale[x] * units[0], scale[y] * units[1])
