"""DICOM slides, which are folders of files; written here byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import openslide
import pytest
import simplejpeg

from celltyper.errors import DataError
from celltyper.slides import open_slide
from celltyper.tiling import Region

WSI, JPEG = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.1.2.4.50"


def element(group: int, number: int, kind: str, value: bytes | str | int) -> bytes:
    """A data element, explicit representation, little endian."""
    if isinstance(value, int):
        value = struct.pack({"US": "<H", "UL": "<I"}[kind], value)
    data = value.encode() if isinstance(value, str) else value
    data += (b"\0" if kind in ("UI", "OB") else b" ") * (len(data) % 2)
    head = struct.pack("<HH2s", group, number, kind.encode())
    length = (
        struct.pack("<HI", 0, len(data)) if kind in ("OB", "SQ") else struct.pack("<H", len(data))
    )
    return head + length + data


def item(data: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(data)) + data


def write_dicom(path: Path, image: np.ndarray, mpp: float, series: str = "1.2.3") -> None:
    """One level of a slide, in tiles of 128 px."""
    height, width = image.shape[:2]
    padded = np.full((-(-height // 128) * 128, -(-width // 128) * 128, 3), 255, np.uint8)
    padded[:height, :width] = image
    tiles = [
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(padded[y : y + 128, x : x + 128]), 95, colorsubsampling="422"
        )
        for y in range(0, height, 128)
        for x in range(0, width, 128)
    ]
    about = b"".join(
        [
            element(2, 1, "OB", b"\0\1"),
            element(2, 2, "UI", WSI),
            element(2, 3, "UI", "1.2.5"),
            element(2, 0x10, "UI", JPEG),
            element(2, 0x12, "UI", "1.2"),
        ]
    )
    spacing = element(0x28, 0x30, "DS", f"{mpp / 1000}\\{mpp / 1000}")
    measures = element(0x28, 0x9110, "SQ", item(element(0x18, 0x50, "DS", "0.001") + spacing))
    counts = [(0x10, 128), (0x11, 128), (0x100, 8), (0x101, 8), (0x102, 7), (0x103, 0)]
    elements = [
        element(8, 8, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"),
        element(8, 0x16, "UI", WSI),
        element(8, 0x18, "UI", "1.2.5"),
        element(0x20, 0xD, "UI", "1.2"),
        element(0x20, 0xE, "UI", series),
        element(0x20, 0x9311, "CS", "TILED_FULL"),
        element(0x28, 2, "US", 3),
        element(0x28, 4, "CS", "YBR_FULL_422"),
        element(0x28, 6, "US", 0),
        element(0x28, 8, "IS", str(len(tiles))),
        *(element(0x28, number, "US", value) for number, value in counts),
        element(0x48, 6, "UL", width),
        element(0x48, 7, "UL", height),
        element(0x48, 0x105, "SQ", item(element(0x48, 0x106, "SH", "1"))),
        element(0x5200, 0x9229, "SQ", item(measures)),
        struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF),
        item(b""),
        *(item(tile + b"\0" * (len(tile) % 2)) for tile in tiles),
        struct.pack("<HHI", 0xFFFE, 0xE0DD, 0),
    ]
    length = element(2, 0, "UL", len(about))
    path.write_bytes(bytes(128) + b"DICM" + length + about + b"".join(elements))


def test_dicom_by_its_folder_or_one_of_its_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 25, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    write_dicom(tmp_path / "low", image[::2, ::2], 0.5)
    write_dicom(tmp_path / "high.dcm", image, 0.25)
    (tmp_path / "notes.txt").write_text("scanned on a Monday")
    with openslide.OpenSlide(tmp_path / "high.dcm") as reference:
        expected = np.asarray(reference.read_region((0, 0), 0, (400, 320)))[..., :3]
    assert np.abs(expected.astype(int) - image).mean() < 3
    for path in (tmp_path, tmp_path / "high.dcm", tmp_path / "low"):
        with open_slide(path) as slide:
            assert (slide.format, slide.size) == ("dicom", (400, 320))
            assert slide.mpp == pytest.approx((0.25, 0.25))
            assert [level.downsample for level in slide.levels] == [1, 2]
            assert np.array_equal(slide.read(Region(0, 0, 320, 400)), expected)
    write_dicom(tmp_path / "other.dcm", image, 0.25, series="1.2.4")
    with pytest.raises(DataError, match="holds 2 slides; give one of them"):
        open_slide(tmp_path)
