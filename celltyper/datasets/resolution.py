"""Micrometres per pixel: of a TIFF file, from its OME, ImageJ or baseline tags; as a user says."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import tifffile

from celltyper.errors import DataError

PLAUSIBLE_MPP = (0.02, 20.0)
"""Outside this range a tag is a printer's resolution (72 dpi is 353), not a microscope's."""

_MICRONS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0}
_MICRONS |= {"\\u00B5m": 1.0, "mm": 1e3, "cm": 1e4}


def check_mpp(mpp: float | None) -> None:
    """Refuse a resolution that no microscope has.

    Raises
    ------
    DataError
        Unless `mpp` is None or lies in [0.01, 100] micrometres per pixel.
    """
    if mpp is not None and not 0.01 <= mpp <= 100:
        raise DataError(
            f"mpp must lie in [0.01, 100] micrometres per pixel, got {mpp}; "
            "a 20x scan has about 0.5, a 40x scan 0.25"
        )


def tiff_mpp(tiff: tifffile.TiffFile) -> float | None:
    """Micrometres per pixel that a TIFF file states.

    Parameters
    ----------
    tiff : tifffile.TiffFile
        An open file.

    Returns
    -------
    float or None
        None if nothing plausible is stated, or if x and y differ by more than 1 %.
    """
    found = stated_mpp(tiff)
    if found is None or abs(found[0] - found[1]) > 0.01 * found[0]:
        return None
    return found[0]


def stated_mpp(tiff: tifffile.TiffFile) -> tuple[float, float] | None:
    """Micrometres per pixel along x and y that a TIFF file states, None if not plausible."""
    found = _ome(tiff) or _imagej(tiff) or _baseline(tiff)
    if found is None or not all(PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] for mpp in found):
        return None
    return found


def _ome(tiff: tifffile.TiffFile) -> tuple[float, float] | None:
    if not tiff.is_ome or not tiff.ome_metadata:
        return None
    try:
        root = ElementTree.fromstring(tiff.ome_metadata)
    except ElementTree.ParseError:
        return None
    for pixels in root.iter():
        if not re.fullmatch(r"(\{.*\})?Pixels", pixels.tag):
            continue
        sizes = []
        for axis in "XY":
            scale = _MICRONS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
            value = pixels.get(f"PhysicalSize{axis}")
            if scale is None or value is None:
                return None
            sizes.append(float(value) * scale)
        return sizes[0], sizes[1]
    return None


def _imagej(tiff: tifffile.TiffFile) -> tuple[float, float] | None:
    scale = _MICRONS.get(str((tiff.imagej_metadata or {}).get("unit", "")))
    return None if scale is None else _per_pixel(tiff, scale)


def _baseline(tiff: tifffile.TiffFile) -> tuple[float, float] | None:
    if tiff.is_imagej:
        return None
    unit = tiff.pages.first.tags.valueof("ResolutionUnit", 2)
    scale = {2: 25_400.0, 3: 10_000.0}.get(int(unit))
    return None if scale is None else _per_pixel(tiff, scale)


def _per_pixel(tiff: tifffile.TiffFile, unit: float) -> tuple[float, float] | None:
    sizes = []
    for axis in "XY":
        numerator, denominator = tiff.pages.first.tags.valueof(f"{axis}Resolution", (0, 1))
        if not numerator or not denominator:
            return None
        sizes.append(unit * denominator / numerator)
    return sizes[0], sizes[1]
