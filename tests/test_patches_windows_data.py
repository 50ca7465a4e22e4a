"""Windows of patches and fields: every pixel of the drawn images says where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from celltyper.datasets.images import read_image
from celltyper.errors import DataError
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import (
    Header,
    check_centers,
    in_micrometres,
    open_image,
    padded,
    read_header,
    read_patch,
)
from celltyper.tiling import Region

NAN = (np.nan, np.nan)


def located(height: int, width: int) -> np.ndarray:
    """Red is the column, green the row, both below 256."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return image


def table_of(file: Path, *centers: tuple[float, float], mpp: float | None = None) -> PatchTable:
    n = len(centers)
    return PatchTable(
        path=file.parent / "t.csv",
        classes=("a", "b"),
        names=tuple(f"p{i}" for i in range(n)),
        labels=np.zeros(n, np.intp),
        votes=np.tile([1.0, 0.0], (n, 1)),
        experts=np.ones(n, np.intp),
        groups=("g",) * n,
        domains=("",) * n,
        splits=("",) * n,
        files=(file,) * n,
        centers=np.array(centers, np.float64),
        mpp=mpp,
    )


def saved(file: Path, image: np.ndarray) -> Path:
    Image.fromarray(image).save(file)
    return file


def test_window_around_a_point(tmp_path: Path) -> None:
    image = located(90, 120)
    file = saved(tmp_path / "a.png", image)
    table = table_of(file, (40, 30), (40.5, 30.5), (40.4, 30.6))
    # The centre x = 40 is the border between columns 39 and 40.
    np.testing.assert_array_equal(read_patch(table, 0, size=10), image[25:35, 35:45])
    # x = 40.5 is the middle of column 40.
    np.testing.assert_array_equal(read_patch(table, 1, size=9), image[26:35, 36:45])
    # In between, the nearest whole pixel.
    np.testing.assert_array_equal(read_patch(table, 2, size=10), image[26:36, 35:45])
    assert not padded(table, size=10).any()


def test_a_patch_is_cut_in_its_middle(tmp_path: Path) -> None:
    image = located(20, 30)
    table = table_of(saved(tmp_path / "a.png", image), NAN)
    np.testing.assert_array_equal(read_patch(table, 0, size=8), image[6:14, 11:19])
    assert not padded(table, size=20).any()
    assert padded(table, size=22).all()
    larger = read_patch(table, 0, size=40)
    np.testing.assert_array_equal(
        larger, np.pad(image, ((10, 10), (5, 5), (0, 0)), mode="symmetric")
    )


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_over_the_border_is_mirrored_and_counted(tmp_path: Path, name: str) -> None:
    image = located(90, 120)
    if name == "a.tif":
        tifffile.imwrite(tmp_path / name, image, tile=(16, 32), photometric="rgb")
    else:
        saved(tmp_path / name, image)
    centers = [(2, 3), (118, 88), (-20, 45), (140, 110), (60, 45), (8, 45), (112, 82)]
    table = table_of(tmp_path / name, *centers)
    around = np.pad(image, ((50, 50), (50, 50), (0, 0)), mode="symmetric")
    for i, (x, y) in enumerate(centers):
        expected = around[y + 50 - 8 : y + 50 + 8, x + 50 - 8 : x + 50 + 8]
        np.testing.assert_array_equal(read_patch(table, i, size=16), expected)
    # A window that ends at the border does not reach over it.
    assert padded(table, size=16).tolist() == [True] * 4 + [False] * 3


def test_window_larger_than_the_image(tmp_path: Path) -> None:
    image = located(5, 7)
    table = table_of(saved(tmp_path / "a.png", image), (3, 2))
    around = np.pad(image, ((30, 30), (30, 30), (0, 0)), mode="symmetric")
    np.testing.assert_array_equal(read_patch(table, 0, size=40), around[12:52, 13:53])


def test_another_resolution(tmp_path: Path) -> None:
    # A ramp stays a ramp when it shrinks: column k covers the file's columns 2k and 2k + 1.
    image = located(200, 240)
    table = table_of(saved(tmp_path / "a.png", image), (120, 100), mpp=0.25)
    half = read_patch(table, 0, size=40, mpp=0.5)
    assert half.shape == (40, 40, 3)
    columns = 80 + 2 * np.arange(40) + 0.5
    inner = slice(4, -4)  # Lanczos sees the edge of the window in the outer three columns
    assert np.abs(half[20, inner, 0] - columns[inner]).max() <= 1
    twice = read_patch(table, 0, size=40, mpp=0.125)
    assert np.abs(twice[20, inner, 0] - (110 + (np.arange(40) + 0.5) / 2 - 0.5)[inner]).max() <= 1
    np.testing.assert_array_equal(
        read_patch(table, 0, size=40, mpp=0.25), read_patch(table, 0, size=40)
    )
    # 40 px at 1.0 are 160 px of the file, which reach from 40 to 200 and from 20 to 180.
    assert not padded(table, size=40, mpp=1.0).any()
    assert padded(table, size=51, mpp=1.0).all()


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    table = table_of(saved(tmp_path / "a.png", stripes), NAN, mpp=0.25)
    grey = read_patch(table, 0, size=32, mpp=1.0)[4:-4, 4:-4]
    assert np.abs(grey.astype(float) - 127.5).max() < 8


def test_resolution_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    tifffile.imwrite(
        file, located(80, 80), photometric="rgb", resolution=(20000, 20000), resolutionunit=3
    )
    assert read_header(file) == Header(80, 80, 0.5)
    table = table_of(file, NAN)
    assert np.ptp(read_patch(table, 0, size=20, mpp=1.0)[10, 4:-4, 0]) == pytest.approx(22, abs=1)
    plain = table_of(saved(tmp_path / "a.png", located(80, 80)), NAN)
    with pytest.raises(DataError, match=r"a.png: micrometres per pixel unknown.*data\.mpp"):
        read_patch(plain, 0, size=20, mpp=1.0)
    with pytest.raises(DataError, match=r"data\.mpp"):
        padded(plain, size=20, mpp=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (32, 48)},
        {"tile": (32, 48), "compression": "deflate", "predictor": True},
        {"rowsperstrip": 7, "compression": "lzw"},
        {"rowsperstrip": 1},
        {},
    ],
)
def test_parts_of_tiff(tmp_path: Path, options: dict[str, object]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (101, 131, 3), np.uint8)
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, image, photometric="rgb", **options)
    source = open_image(file)
    assert type(source).__name__ == "_Segments"
    assert source.header == Header(131, 101, None)
    for region in (Region(0, 0, 101, 131), Region(31, 47, 3, 2), Region(90, 100, 11, 31)):
        np.testing.assert_array_equal(source.read(region), image[region.slices])


@pytest.mark.parametrize("kind", ["grey", "planar", "alpha"])
def test_other_tiff_is_read_as_a_whole(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    file = tmp_path / "a.tif"
    if kind == "grey":
        tifffile.imwrite(file, rng.integers(0, 256, (50, 40), np.uint8))
    elif kind == "planar":
        pixels = rng.integers(0, 256, (3, 50, 40), np.uint8)
        tifffile.imwrite(file, pixels, photometric="rgb", planarconfig="separate")
    else:
        pixels = rng.integers(0, 256, (50, 40, 4), np.uint8)
        tifffile.imwrite(file, pixels, photometric="rgb", extrasamples=["unassalpha"])
    source = open_image(file)
    assert source.header == Header(40, 50, None)
    region = Region(3, 5, 20, 30)
    np.testing.assert_array_equal(source.read(region), read_image(file).image[region.slices])


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.png", np.zeros((30, 30, 3), np.uint8))
    table = table_of(file, (15, 15))
    assert read_patch(table, 0, size=4).max() == 0
    saved(file, located(40, 50))
    assert read_patch(table, 0, size=4)[0, 0].tolist() == [13, 13, 0]
    assert read_header(file) == Header(50, 40, None)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = saved(tmp_path / "a.png", rng.integers(0, 256, (64, 64, 3), np.uint8)).read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:2000])
    (tmp_path / "b.png").write_bytes(b"nothing")
    (tmp_path / "c.tif").write_bytes(b"nothing")
    tifffile.imwrite(tmp_path / "d.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    tiff = (tmp_path / "d.tif").read_bytes()
    (tmp_path / "d.tif").write_bytes(tiff[:-5000])
    for name in ("a.png", "b.png", "c.tif", "d.tif"):
        with pytest.raises(DataError, match=rf"{name}: unreadable or truncated"):
            read_patch(table_of(tmp_path / name, (30, 60)), 0, size=16)
    with pytest.raises(DataError, match=r"e.png: no such file"):
        read_patch(table_of(tmp_path / "e.png", NAN), 0, size=16)


def test_points_outside(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.png", located(80, 100))
    check_centers(table_of(file, (-25, 80), (125, 105), NAN))
    for x, y in ((-26, 5), (126, 5), (5, -26), (5, 106)):
        table = table_of(file, (50, 40), (x, y))
        with pytest.raises(DataError, match=rf"t.csv: p1: x {x}, y {y} is outside a.png \(100 x"):
            check_centers(table)
        with pytest.raises(DataError, match="p1: x"):
            read_patch(table, 1, size=8)


def test_micrometres_are_noticed() -> None:
    header = Header(1000, 800, None)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, (1000, 800), (20, 2))
    assert not in_micrometres(pixels, [header] * 20, 0.25)
    assert in_micrometres(pixels * 0.25, [header] * 20, 0.25)
    assert in_micrometres(pixels * 0.25, [header._replace(mpp=0.25)] * 20, None)
    assert not in_micrometres(pixels * 0.25, [header] * 20, None)
    # Four points at .25 may well lie there by chance: .25 ** 8 is above one in a million.
    assert not in_micrometres(pixels[:4] * 0.25, [header] * 4, 0.25)
    assert in_micrometres(pixels[:5] * 0.25, [header] * 5, 0.25)


def test_real_slide(real_data: Path) -> None:
    file = real_data / "slides" / "cmu-1-small-region.svs"
    whole = read_image(file).image
    source = open_image(file)
    assert type(source).__name__ == "_Segments"
    assert source.header == Header(2220, 2967, 0.499)
    for region in (Region(230, 235, 300, 400), Region(2900, 2200, 67, 20)):
        np.testing.assert_array_equal(source.read(region), whole[region.slices])
    window = read_patch(table_of(file, (1000, 2000)), 0, size=64, mpp=0.998)
    assert window.shape == (64, 64, 3)
    source_mean = whole[1936:2064, 936:1064].mean(axis=(0, 1))
    np.testing.assert_allclose(window.mean(axis=(0, 1)), source_mean, atol=1)
