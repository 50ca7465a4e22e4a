"""Opening a slide: the format is told by what is in the file, not by its name.

| content | reader |
| --- | --- |
| SVS whose tiles are all JPEG | libjpeg-turbo, tile by tile |
| other formats of OpenSlide (NDPI, MRXS, SCN, BIF, Philips, DICOM, ...) | OpenSlide |
| OME-TIFF, plain TIFF and BigTIFF, in tiles or strips | libjpeg-turbo or tifffile |
| OME-Zarr 0.4 and 0.5 in a folder or at a URL | zarr |
| PNG, JPEG, TIFF with palette and the like | decoded as a whole |

``tools/bench_slides.py`` measures the readers against each other.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import openslide

from celltyper.datasets.resolution import PLAUSIBLE_MPP
from celltyper.errors import DataError
from celltyper.slides.levels import SAME_SCALE
from celltyper.slides.picture import PictureSource
from celltyper.slides.slide import Slide
from celltyper.slides.source import Source, plausible
from celltyper.slides.tiff import NotInTilesError, TiffSource
from celltyper.slides.vendor import VendorSource, dicom_series

logger = logging.getLogger(__name__)

READS = "SVS, NDPI, MRXS, SCN, BIF, DICOM, TIFF, OME-TIFF, OME-Zarr, PNG and JPEG"

_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_TIFF_SUFFIXES = (".tif", ".tiff", ".svs")
_MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"} | dict.fromkeys(_TIFF, "tiff")
_ZARR = ("zarr.json", ".zgroup", ".zattrs")


def open_slide(
    path: str | Path, *, mpp: float | tuple[float, float] | None = None, strict: bool = False
) -> Slide:
    """Open a slide or image.

    Parameters
    ----------
    path : str or Path
        File; folder of an OME-Zarr image, of the DICOM files of one slide, or of a MIRAX slide; or
        fsspec URL of an OME-Zarr image, such as ``s3://bucket/slide.zarr``.
    mpp : float or (float, float), optional
        Micrometres per pixel, or those along x and y, instead of what the file states.
    strict : bool
        Raise where a tile is damaged; otherwise it is white, logged, and listed in
        ``slide.damaged``.

    Returns
    -------
    Slide

    Raises
    ------
    DataError
        If it is missing, empty, truncated, no slide, or of a kind that is not read, naming it.
    """
    if mpp is not None:
        mpp = _checked(mpp)
    text = os.fspath(path)
    slide = Slide(_remote(text) if "://" in text else _local(Path(text)), mpp, strict)
    if slide.mpp is not None and abs(slide.mpp[0] / slide.mpp[1] - 1) > SAME_SCALE:
        logger.warning(
            "%s: pixels are %g wide and %g micrometres high; both are used", slide.path, *slide.mpp
        )
    return slide


def _checked(mpp: float | tuple[float, float]) -> tuple[float, float]:
    x, y = mpp if isinstance(mpp, Sequence) else (mpp, mpp)
    found = plausible(x, y)
    if found is None:
        low, high = PLAUSIBLE_MPP
        raise DataError(
            f"mpp {mpp} is no microscope's: give micrometres per pixel, {low:g} to {high:g}, such "
            "as 0.25 (often called 40x)"
        )
    return found


def _remote(url: str) -> Source:
    from celltyper.slides.omezarr import ZarrSource

    if url.split("?")[0].lower().endswith((".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".dcm")):
        raise DataError(f"{url}: only OME-Zarr is read from URLs; download the file")
    return ZarrSource(url)


def _local(path: Path) -> Source:
    # Not resolved: OpenSlide finds the folder of a MIRAX slide by the name of the file.
    path = Path(os.path.abspath(path))  # noqa: PTH100
    if path.is_dir():
        return _folder(path)
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not head:
        raise DataError(f"{path}: empty file; copy it again")
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    vendor = openslide.OpenSlide.detect_format(path)
    if vendor == "aperio":
        try:
            return TiffSource(str(path), only_jpeg=True)
        except NotInTilesError:
            return VendorSource(str(path))
    if vendor not in (None, "generic-tiff"):
        return VendorSource(str(path))
    if kind is None:
        raise DataError(f"{path}: no slide: its content is none of {READS}")
    if kind == "tiff":
        return _plain_tiff(path, vendor)
    if path.suffix.lower() in _TIFF_SUFFIXES:
        raise DataError(f"{path}: a {kind.upper()} by its content; name it .{kind}")
    return PictureSource(str(path), kind)


def _plain_tiff(path: Path, vendor: str | None) -> Source:
    try:
        return TiffSource(str(path))
    except NotInTilesError as error:
        if vendor is not None:
            return VendorSource(str(path))
        if path.suffix.lower() in _TIFF_SUFFIXES:
            return PictureSource(str(path), "tiff")
        raise DataError(f"{path}: TIFF with {error}; save it as 8-bit RGB") from None


def _folder(path: Path) -> Source:
    from celltyper.slides.omezarr import ZarrSource

    if any((path / name).is_file() for name in _ZARR):
        return ZarrSource(str(path))
    if (path / "Slidedat.ini").is_file():
        return _local(path.with_name(path.name + ".mrxs"))
    files = sorted(file for file in path.iterdir() if file.is_file())
    mirax = [file for file in files if file.suffix.lower() == ".mrxs"]
    if len(mirax) == 1:
        return _local(mirax[0])
    series = dicom_series(files)
    if len(series) == 1:
        return VendorSource(next(iter(series.values())))
    if len(series) > 1 or len(mirax) > 1:
        raise DataError(f"{path}: holds {max(len(series), len(mirax))} slides; give one of them")
    raise DataError(f"{path}: a folder, but no OME-Zarr, DICOM or MIRAX slide; give a slide")
