"""Slides that are broken, inside or as a whole, and files that are none."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image as PillowImage

from celltyper.errors import DataError, RunError
from celltyper.slides import Slide, open_slide, read_ahead
from celltyper.slides.tiff import TiffSource
from celltyper.slides.vendor import VendorSource
from celltyper.tiling import Region

APERIO = "Aperio Image Library v11.2.1 \r\n600x500 (128x128) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
WHOLE = Region(0, 0, 500, 600)
TILE = Region(128, 256, 128, 128)  # number 7 of 5 in a row


def picture(height: int = 500, width: int = 600) -> np.ndarray:
    """Nowhere white."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 200 // width, y * 200 // height, (x + y) % 180], axis=2).astype(np.uint8)


def write_svs(path: Path, compression: str = "jpeg") -> tuple[int, int]:
    """Write a slide of two levels; place and size of tile 7 of the first."""
    options = {"tile": (128, 128), "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        for level in (picture(), picture()[::2, ::2]):
            tiff.write(level, compression=compression, description=APERIO, **options)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        return page.dataoffsets[7], page.databytecounts[7]


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def expected_without(path: Path, *regions: Region) -> np.ndarray:
    with open_slide(path) as slide:
        image = slide.read(WHOLE).copy()
    for region in regions:
        image[region.slices] = 255
    return image


HARM: dict[str, Callable[[int, int], tuple[int, bytes]]] = {
    "zeros": lambda at, n: (at, bytes(n)),
    "lower half zeros": lambda at, n: (at + n // 2, bytes(n - n // 2)),
    "a sector inside": lambda at, n: (at + n // 2, bytes(200)),
    "end of image too early": lambda at, n: (at + n // 2, b"\xff\xd9"),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("source", [TiffSource, VendorSource])
def test_a_damaged_tile_is_white_and_said(
    harm: str, source: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.svs"
    at, count = write_svs(path)
    expected = expected_without(path, TILE)
    overwrite(path, *HARM[harm](at, count))
    with Slide(source(str(path))) as slide:
        assert np.array_equal(slide.read(WHOLE), expected)
        assert slide.damaged == [TILE]
        slide._cache.clear()
        assert np.array_equal(slide.read(Region(100, 300, 200, 10)), expected[100:300, 300:310])
        assert slide.damaged == [TILE]
        with pickle.loads(pickle.dumps(slide)) as again:
            assert again.damaged == []
    (record,) = caplog.records
    assert "damaged tile at x 256, y 128 (128 x 128 px" in record.getMessage()
    assert "taken for background" in record.getMessage()
    with Slide(source(str(path)), strict=True) as slide:
        assert np.array_equal(slide.read(Region(0, 0, 100, 200)), expected[:100, :200])
        with pytest.raises(DataError, match=r"damaged tile at x 256, y 128 .*--strict"):
            slide.read(WHOLE)
        with pytest.raises(DataError, match="damaged tile"):
            list(read_ahead(slide, [WHOLE]))


def test_one_threads_damage_is_not_anothers(tmp_path: Path) -> None:
    # An OpenSlide handle is dead after an error, for all threads that use it.
    path = tmp_path / "a.svs"
    at, count = write_svs(path)
    expected = expected_without(path, TILE)
    overwrite(path, at, bytes(count))
    regions = [Region(r, c, 60, 60) for r in range(0, 440, 40) for c in range(0, 540, 40)]
    with Slide(VendorSource(str(path))) as slide, ThreadPoolExecutor(4) as pool:
        slide._source.tiles = ((128, 128), (128, 128))  # type: ignore[misc]
        for region, got in zip(regions, pool.map(slide.read, regions), strict=True):
            assert np.array_equal(got, expected[region.slices])
        assert slide.damaged == [TILE]


def test_damage_of_a_lower_level_is_a_place_of_the_full_resolution(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    write_svs(path)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[1]
        overwrite(path, page.dataoffsets[5], bytes(page.databytecounts[5]))
    with open_slide(path) as slide:
        level = slide.read(Region(0, 0, 250, 300), 1.0)
        assert (level[128:, 256:] == 255).all()
        assert not (level[:128] == 255).any()
        assert slide.damaged == [Region(256, 512, 244, 88)]
        assert not (slide.read(WHOLE) == 255).any()


@pytest.mark.parametrize("compression", ["lzw", "zlib", "zstd", "jpeg2000", "webp"])
def test_damage_under_other_compressions(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, picture(), tile=(128, 128), compression=compression, photometric="rgb", metadata=None
    )
    expected = expected_without(path, TILE)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        overwrite(path, page.dataoffsets[7], b"\xff" * page.databytecounts[7])
    with open_slide(path) as slide:
        assert np.array_equal(slide.read(WHOLE), expected)
        assert slide.damaged == [TILE]


def test_a_damaged_chunk_of_zarr(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=2)
    array = group.create_array("0", shape=(3, 500, 600), chunks=(3, 128, 128), dtype="u1")
    array[:] = np.moveaxis(picture(), 2, 0)
    axes = [{"name": name} for name in "cyx"]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}]}]
    expected = expected_without(path, TILE)
    (path / "0" / "0.1.2").write_bytes(b"no chunk")
    with open_slide(path) as slide:
        assert np.array_equal(slide.read(WHOLE), expected)
        assert slide.damaged == [TILE]
    # What was never written has the fill value: black, as zarr says.
    (path / "0" / "0.1.2").unlink()
    with open_slide(path) as slide:
        assert (slide.read(TILE) == 0).all()
        assert slide.damaged == []


def test_the_log_does_not_drown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tif"
    options = {"tile": (16, 16), "photometric": "rgb", "metadata": None, "compression": "zlib"}
    tifffile.imwrite(path, picture(96, 96), **options)
    with tifffile.TiffFile(path) as tiff:
        for at in tiff.pages.first.dataoffsets:
            overwrite(path, at, b"\xff\xff")
    with open_slide(path) as slide:
        assert (slide.read(Region(0, 0, 96, 96)) == 255).all()
        assert len(slide.damaged) == 36
    assert len(caplog.records) == 20
    assert "further ones are only counted" in caplog.records[-1].getMessage()


def test_a_disk_that_fails_damages_no_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.svs"
    write_svs(path)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_slide(path) as slide:
        monkeypatch.setattr(slide._source._file, "read", fail)  # type: ignore[attr-defined]
        with pytest.raises(RunError, match=r"a.svs: reading failed \(Input/output error\)"):
            slide.read(WHOLE)
        assert slide.damaged == []
        monkeypatch.undo()
        assert slide.read(WHOLE).shape == (500, 600, 3)


def test_a_sparse_tile_is_glass_not_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiles = iter([b"" if i == 7 else bytes(128 * 128 * 3) for i in range(20)])
        tiff.write(
            tiles,
            shape=(500, 600, 3),
            dtype=np.uint8,
            tile=(128, 128),
            photometric="rgb",
            metadata=None,
        )
    with open_slide(path) as slide:
        image = slide.read(WHOLE)
        assert (image[TILE.slices] == 255).all()
        assert image.sum() == 128 * 128 * 3 * 255
        assert slide.damaged == []


def _cut(path: Path, share: float) -> Path:
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    return path


def _truncated_svs(folder: Path) -> Path:
    write_svs(folder / "a.svs")
    return _cut(folder / "a.svs", 0.6)


def _truncated_tiff(folder: Path) -> Path:
    with tifffile.TiffWriter(folder / "a.tif") as tiff:
        tiff.write(picture(), tile=(128, 128), photometric="rgb", metadata=None)
    return _cut(folder / "a.tif", 0.9)


def _header_only(folder: Path) -> Path:
    write_svs(folder / "a.svs")
    return _cut(folder / "a.svs", 0.003)


def _broken_mirax(folder: Path) -> Path:
    (folder / "a.mrxs").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    (folder / "a").mkdir()
    (folder / "a" / "Slidedat.ini").write_text("[GENERAL]\n")
    return folder / "a.mrxs"


def _unknown_compression(folder: Path) -> Path:
    path = folder / "a.tif"
    tifffile.imwrite(path, picture(), tile=(128, 128), photometric="rgb", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages.first.tags["Compression"].valueoffset
    overwrite(path, at, struct.pack("<H", 65123))
    return path


def _array(folder: Path, name: str, array: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(folder / name, array, **options)
    return folder / name


def _text(folder: Path, name: str, text: bytes) -> Path:
    (folder / name).write_bytes(text)
    return folder / name


def _png(folder: Path, name: str) -> Path:
    PillowImage.fromarray(picture()).save(folder / name, "png")
    return folder / name


def _zarr(folder: Path, attributes: dict[str, Any], shape: tuple[int, ...], dtype: str) -> Path:
    group = zarr.open_group(folder / "a.zarr", mode="w", zarr_format=2)
    group.create_array("0", shape=shape, dtype=dtype)
    group.attrs.update(attributes)
    return folder / "a.zarr"


def _scales(axes: str) -> dict[str, Any]:
    return {"multiscales": [{"axes": [{"name": a} for a in axes], "datasets": [{"path": "0"}]}]}


def _two_mirax(folder: Path) -> Path:
    for name in ("a.mrxs", "b.mrxs"):
        _text(folder, name, b"x")
    return folder


ERRORS: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "missing": (lambda f: f / "no.svs", "no such file"),
    "empty": (lambda f: _text(f, "a.svs", b""), "empty file; copy it again"),
    "text": (lambda f: _text(f, "a.svs", b"hello, I am a slide"), "no slide: its content is none"),
    "another kind": (lambda f: _png(f, "a.tif"), "a PNG by its content; name it .png"),
    "no image": (lambda f: _text(f, "a.tif", b"II*\0\x08\0\0\0\0\0"), "TIFF"),
    "cut svs": (_truncated_svs, "truncated"),
    "cut tiff": (_truncated_tiff, "truncated: its tiles reach to byte [0-9,]+, but it ends at"),
    "header": (_header_only, "truncated"),
    "no mirax": (_broken_mirax, "damaged or truncated slide|no slide"),
    "compression": (_unknown_compression, "TIFF compression 65123 .* cannot be decoded"),
    "16 bits": (
        lambda f: _array(f, "a.qptiff", np.ones((64, 64, 3), np.uint16), photometric="rgb"),
        "16 bits per sample; save it as 8-bit RGB",
    ),
    "channels": (
        lambda f: _array(f, "a.ome.tif", np.ones((7, 64, 64), np.uint8), metadata={"axes": "CYX"}),
        "axes CYX",
    ),
    "stack": (
        lambda f: _array(f, "a.ome.tif", np.ones((4, 64, 64), np.uint8), metadata={"axes": "ZYX"}),
        "axes ZYX",
    ),
    "folder": (lambda f: f, "a folder, but no OME-Zarr, DICOM or MIRAX slide"),
    "two slides": (_two_mirax, "holds 2 slides; give one"),
    "zarr without image": (lambda f: _zarr(f, {}, (9,), "u1"), "no 'multiscales'"),
    "plate": (lambda f: _zarr(f, {"plate": {}}, (9,), "u1"), "a plate"),
    "zarr 16 bits": (lambda f: _zarr(f, _scales("yx"), (9, 9), "u2"), "pixels are uint16"),
    "zarr stack": (lambda f: _zarr(f, _scales("zyx"), (2, 9, 9), "u1"), "2 planes along axis 'z'"),
    "zarr axes": (lambda f: _zarr(f, _scales("cyx"), (9, 9), "u1"), "does not have the axes"),
    "zarr levels": (
        lambda f: _zarr(f, {"multiscales": [{"axes": ["y", "x"]}]}, (9, 9), "u1"),
        "lack datasets or axes",
    ),
    "url of a file": (lambda f: "s3://bucket/a.svs", "only OME-Zarr is read from URLs; download"),
    "url of nothing": (lambda f: "memory://nothing/here.zarr", "no OME-Zarr there"),
    "no such protocol": (lambda f: "gopher://host/a.zarr", "cannot be reached"),
    "protocol not installed": (lambda f: "dropbox://bucket/a.zarr", "cannot be reached"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_no_slide_is_said_in_one_line(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, message = ERRORS[case]
    path = make(tmp_path)
    with caplog.at_level(logging.DEBUG), pytest.raises(DataError, match=message) as error:
        open_slide(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert not [r for r in caplog.records if r.name.startswith(("celltyper", "tifffile"))]


def test_a_truncated_image_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    with (
        open_slide(_cut(_png(tmp_path, "a.png"), 0.5)) as slide,
        pytest.raises(DataError, match=r"a.png: unreadable or truncated"),
    ):
        slide.read(WHOLE)


def test_a_closed_slide_is_not_read(tmp_path: Path) -> None:
    slide = open_slide(_png(tmp_path, "a.png"))
    slide.read(WHOLE)
    slide.close()
    with pytest.raises(ValueError, match="closed"):
        slide.read(WHOLE)
