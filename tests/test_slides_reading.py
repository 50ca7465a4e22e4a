"""Reading of slides: every format gives its own pixels, whatever region they are asked in."""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
import zarr
from PIL import Image as PillowImage

from celltyper.errors import DataError
from celltyper.slides import Grid, Level, Slide, open_slide, read_ahead, require_mpp
from celltyper.slides.cache import TileCache
from celltyper.slides.levels import grid_at, levels_of
from celltyper.slides.source import Tile
from celltyper.slides.vendor import VendorSource
from celltyper.tiling import Region

WIDTH, HEIGHT = 700, 530
APERIO = "Aperio Image Library v11.2.1 \r\n700x530 (128x128) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"


def coordinates(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Pixels that say where they are: x, y, and both above 255."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x % 256, y % 256, x // 256 + 16 * (y // 256)], axis=2).astype(np.uint8)


def smooth(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """Blobs of all sizes, as JPEG likes them."""
    rng = np.random.default_rng(seed)
    image = PillowImage.new("RGB", (width, height))
    for side in (4, 24, 96):
        grain = PillowImage.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        image = PillowImage.blend(image, grain.resize(image.size, 3), 0.6)
    return np.asarray(image)


def halved(image: np.ndarray, times: int) -> list[np.ndarray]:
    """The image and smaller ones, odd rests cut off."""
    found = [image]
    for _ in range(times):
        a = found[-1][: found[-1].shape[0] // 2 * 2, : found[-1].shape[1] // 2 * 2].astype(int)
        found.append((a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2] + 2) // 4)
    return [a.astype(np.uint8) for a in found]


def write_pyramid(path: Path, levels: list[np.ndarray], **options: Any) -> Path:
    """A TIFF with a page per level."""
    options = {"tile": (128, 128), "photometric": "rgb", "metadata": None} | options
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as tiff:
        for i, level in enumerate(levels):
            tiff.write(level, subfiletype=int(i > 0), **options)
            options.pop("description", None)
    return path


def rgb_jpegs(image: np.ndarray, height: int, width: int) -> Iterator[bytes]:
    """JPEG of tiles as Aperio's scanners write it: RGB without a marker that says so."""
    rows, cols = -(-image.shape[0] // height), -(-image.shape[1] // width)
    padding = ((0, rows * height - image.shape[0]), (0, cols * width - image.shape[1]), (0, 0))
    padded = np.pad(image, padding, "edge")
    for row, col in np.ndindex(rows, cols):
        tile = padded[row * height :, col * width :][:height, :width]
        data = imagecodecs.jpeg8_encode(tile, 70, colorspace="RGB", outcolorspace="RGB")
        at = data.index(b"\xff\xee")
        yield data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]


def write_svs(path: Path, photometric: str = "rgb") -> Path:
    """Aperio's layout: full resolution, thumbnail in strips, lower levels."""
    levels = halved(smooth(), 2)
    options: dict[str, Any] = {"compression": "jpeg", "metadata": None, "description": APERIO}
    options["photometric"] = photometric
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate((levels[0], levels[2], *levels[1:])):
            tile = (128, 128) if i != 1 else None
            more: dict[str, Any] = {"tile": tile} if tile else {"rowsperstrip": 16}
            if photometric == "ycbcr":
                tiff.write(level, compressionargs={"level": 70}, **options, **more)
                continue
            tiles = rgb_jpegs(level, *(tile or (16, level.shape[1])))
            more |= {"shape": level.shape, "dtype": np.uint8, "subsampling": (1, 1)}
            tiff.write(tiles, compressionargs={"outcolorspace": "rgb"}, **options, **more)
    return path


def write_ome_tiff(path: Path, planar: bool = False) -> Path:
    """As Bio-Formats and QuPath write it: lower levels below the first page."""
    levels = halved(coordinates(), 2)
    if planar:
        levels = [np.ascontiguousarray(np.moveaxis(level, 2, 0)) for level in levels]
    about = {
        "axes": "CYX" if planar else "YXS",
        "PhysicalSizeX": 0.25,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": 0.25,
        "PhysicalSizeYUnit": "µm",
    }
    options = {
        "tile": (128, 128),
        "compression": "zlib",
        "photometric": "minisblack" if planar else "rgb",
    }
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as tiff:
        tiff.write(levels[0], subifds=2, metadata=about, **options)
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, metadata=None, **options)
        if not planar:
            label = np.full((60, 40, 3), 7, np.uint8)
            tiff.write(label, metadata={"axes": "YXS"}, photometric="rgb")
    return path


def write_zarr(
    path: str | Path, version: str, unit: str | None = "micrometer", **options: Any
) -> str | Path:
    """OME-Zarr with axes t, c, z, y, x, in chunks of 64 px."""
    v3 = version == "0.5"
    group = zarr.open_group(path, mode="w", zarr_format=3 if v3 else 2)
    spatial = [{"name": n, "type": "space"} | ({"unit": unit} if unit else {}) for n in "zyx"]
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}, *spatial]
    datasets = []
    for i, level in enumerate(halved(coordinates(), 2)):
        data = np.moveaxis(level, 2, 0)[None, :, None]
        if v3:
            options = {"shards": (1, 3, 1, 256, 256)}
        array = group.create_array(
            str(i), shape=data.shape, dtype="u1", chunks=(1, 3, 1, 64, 64), **options
        )
        array[:] = data
        scale = [{"type": "scale", "scale": [1, 1, 1, 0.125 * 2**i, 0.125 * 2**i]}]
        datasets.append({"path": str(i), "coordinateTransformations": scale})
    whole = [{"type": "scale", "scale": [1, 1, 1, 2, 2]}]
    multiscales = [{"axes": axes, "datasets": datasets, "coordinateTransformations": whole}]
    if v3:
        group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
    else:
        group.attrs["multiscales"] = [multiscales[0] | {"version": "0.4"}]
    return path


def write_grey(path: Path) -> Path:
    tifffile.imwrite(path, coordinates()[..., 0], rowsperstrip=7, compression="lzw")
    return path


def write_alpha(path: Path) -> Path:
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:100] = 0
    image = np.concatenate([coordinates(), alpha], axis=2)
    tifffile.imwrite(
        path, image, tile=(128, 128), photometric="rgb", extrasamples=["unassalpha"], metadata=None
    )
    return path


def write_palette(path: Path) -> Path:
    PillowImage.fromarray(coordinates()[..., 0]).convert("P").save(path)
    return path


def write_scn(path: Path) -> Path:
    """A Leica slide, scanned at x 200, y 400 of 4096 x 2048 px."""
    view = (
        '<image name="{0}" uuid="{0}"><creationDate>2010-01-01T00:00:00Z</creationDate>'
        '<device model="Leica SCN400;Leica SCN" version="1"/><pixels sizeX="{1}" sizeY="{2}">{3}'
        '</pixels><view sizeX="{4}" sizeY="{5}" offsetX="{6}" offsetY="{7}" spacingZ="0"/>'
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>"
        "<illuminationSettings><numericalAperture>0.4</numericalAperture><illuminationSource>"
        "brightfield</illuminationSource></illuminationSettings></scanSettings></image>"
    )
    dimension = '<dimension sizeX="{}" sizeY="{}" r="{}" ifd="{}"/>'
    macro = dimension.format(256, 256, 0, 2)
    scan = dimension.format(768, 1024, 0, 0) + dimension.format(384, 512, 1, 1)
    text = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" '
        'uuid="u"><collection name="c" uuid="u" sizeX="2048000" sizeY="1024000">'
        + view.format("a", 256, 256, macro, 2048000, 1024000, 0, 0)
        + view.format("b", 768, 1024, scan, 384000, 512000, 100000, 200000)
        + "</collection></scn>"
    )
    image = smooth(768, 1024)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for page in (image, image[::2, ::2], image[::4, ::4][:256, :256]):
            page = np.resize(page, (256, 256, 3)) if len(page) == 256 else page
            tiff.write(
                page,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                description=text,
                metadata=None,
            )
            text = None
    return path


Expected = tuple[Callable[[Path], Any], str, float | None, int]
COORDINATES: dict[str, Expected] = {
    "plain.tif": (
        lambda p: write_pyramid(p, [coordinates()], tile=None, bigtiff=True),
        "tiff",
        None,
        1,
    ),
    "pages.tiff": (
        lambda p: write_pyramid(
            p,
            halved(coordinates(), 2),
            compression="lzw",
            predictor=True,
            resolution=(20_000, 20_000),
            resolutionunit="CENTIMETER",
        ),
        "tiff",
        0.5,
        3,
    ),
    "strips.tif": (
        lambda p: write_pyramid(p, [coordinates()], tile=None, rowsperstrip=9, compression="zstd"),
        "tiff",
        None,
        1,
    ),
    "planes.tif": (
        lambda p: tifffile.imwrite(
            p,
            np.moveaxis(coordinates(), 2, 0),
            planarconfig="separate",
            photometric="rgb",
            tile=(128, 128),
            metadata=None,
        ),
        "tiff",
        None,
        1,
    ),
    "slide.ome.tif": (write_ome_tiff, "ome-tiff", 0.25, 3),
    "planar.ome.tiff": (lambda p: write_ome_tiff(p, planar=True), "ome-tiff", 0.25, 3),
    "v2.zarr": (lambda p: write_zarr(p, "0.4"), "ome-zarr", 0.25, 3),
    "v3.ome.zarr": (lambda p: write_zarr(p, "0.5"), "ome-zarr", 0.25, 3),
    "image.png": (lambda p: PillowImage.fromarray(coordinates()).save(p), "png", None, 1),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a made slide by name, written once."""
    root = tmp_path_factory.mktemp("slides")
    more: dict[str, Callable[[Path], Any]] = {
        "rgb.svs": write_svs,
        "ycbcr.svs": lambda p: write_svs(p, "ycbcr"),
        "jpeg.tif": lambda p: write_pyramid(
            p,
            halved(smooth(), 2),
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
            resolution=(10_000, 10_000),
            resolutionunit="CENTIMETER",
        ),
        "leica.scn": write_scn,
        "grey.tif": write_grey,
        "alpha.tif": write_alpha,
        "palette.tif": write_palette,
    }

    def get(name: str) -> Path:
        path = root / name
        if not path.exists():
            write = COORDINATES[name][0] if name in COORDINATES else more[name]
            write(path)
        return path

    return get


def everything(slide: Slide) -> Region:
    width, height = slide.size
    return Region(0, 0, height, width)


@pytest.mark.parametrize("name", COORDINATES)
def test_every_format_gives_its_pixels_where_they_are(
    name: str, files: Callable[[str], Path]
) -> None:
    _, kind, mpp, levels = COORDINATES[name]
    with open_slide(files(name)) as slide:
        assert (slide.format, slide.size, len(slide.levels)) == (kind, (WIDTH, HEIGHT), levels)
        assert slide.mpp == (None if mpp is None else pytest.approx((mpp, mpp)))
        assert slide.name == name.split(".")[0]
        assert slide.bounds == everything(slide)
        assert np.array_equal(slide.read(everything(slide)), coordinates())
        # Over the corners of tiles, and over the border of the slide: white.
        got = slide.read(Region(HEIGHT - 100, WIDTH - 500, 200, 700))
        assert np.array_equal(got[:100, :500], coordinates()[-100:, -500:])
        assert (got[100:] == 255).all()
        assert (got[:, 500:] == 255).all()
        assert (slide.read(Region(-90, -80, 30, 20)) == 255).all()
        for i, expected in enumerate(halved(coordinates(), levels - 1)):
            grid = grid_at(slide.levels, 2.0**i, 2.0**i)
            assert grid == (*expected.shape[1::-1], 2.0**i, 2.0**i, i, True)
            if mpp is not None:
                region = Region(0, 0, grid.height, grid.width)
                assert np.array_equal(slide.read(region, mpp * 2**i), expected)


@pytest.mark.parametrize("name", ["rgb.svs", "ycbcr.svs", "jpeg.tif"])
def test_jpeg_pyramids_are_openslides_pixels(name: str, files: Callable[[str], Path]) -> None:
    with open_slide(files(name)) as slide, openslide.OpenSlide(files(name)) as reference:
        assert not isinstance(slide._source, VendorSource)
        assert slide.format == ("aperio" if name.endswith("svs") else "tiff")
        assert slide.mpp == pytest.approx((0.499, 0.499) if name.endswith("svs") else (1, 1))
        assert [level[:2] for level in slide.levels] == list(reference.level_dimensions)
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        for level, size in enumerate(reference.level_dimensions):
            grid = Grid(*size, 2.0**level, 2.0**level, level, True)
            got = slide._read(grid, Region(0, 0, size[1], size[0]))
            expected = np.asarray(reference.read_region((0, 0), level, size))
            assert np.array_equal(got, expected[..., :3])
        with tifffile.TiffFile(files(name)) as tiff:
            page = tiff.pages.first
            assert page.photometric == (2 if name == "rgb.svs" else 6)
            assert np.array_equal(slide.read(everything(slide)), page.asarray())


def test_a_real_slide_is_openslides_pixels(real_data: Path) -> None:
    path = real_data / "slides" / "cmu-1-small-region.svs"
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert (slide.format, slide.name) == ("aperio", "cmu-1-small-region")
        assert (slide.size, slide.mpp, slide.magnification) == ((2220, 2967), (0.499, 0.499), 20)
        whole = np.asarray(reference.read_region((0, 0), 0, slide.size))[..., :3]
        assert np.array_equal(slide.read(everything(slide)), whole)
        rng = np.random.default_rng(0)
        every = slide.read(Region(0, 0, *slide.grid(0.61)[1::-1]), 0.61)
        for row, col, height, width in rng.integers(1, 700, (5, 4)).tolist():
            region = Region(row, col, height, width)
            assert np.array_equal(slide.read(region), whole[region.slices])
            assert np.array_equal(slide.read(region, 0.61), every[region.slices])


def test_through_openslide_the_same_pixels(files: Callable[[str], Path]) -> None:
    path = files("rgb.svs")
    with Slide(VendorSource(str(path))) as slow, open_slide(path) as fast:
        assert (slow.mpp, slow.levels, slow.magnification) == (
            fast.mpp,
            fast.levels,
            fast.magnification,
        )
        assert np.array_equal(slow.read(everything(slow)), fast.read(everything(fast)))
        region = Region(31, 57, 90, 140)
        assert np.array_equal(slow.read(region, 1.2), fast.read(region, 1.2))


def test_positions_count_from_the_part_that_was_scanned(files: Callable[[str], Path]) -> None:
    path = files("leica.scn")
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert reference.dimensions == (4096, 2048)
        assert (slide.format, slide.size) == ("leica", (768, 1024))
        assert slide.bounds == Region(400, 200, 1024, 768)
        assert slide.levels == (Level(768, 1024, 1), Level(384, 512, 2))
        with tifffile.TiffFile(path) as tiff:
            pages = [page.asarray() for page in tiff.pages[:2]]
        assert np.array_equal(slide.read(everything(slide)), pages[0])
        assert np.array_equal(slide.read(Region(700, 400, 50, 60)), pages[0][700:750, 400:460])
        assert np.array_equal(
            slide._read(grid_at(slide.levels, 2, 2), Region(0, 0, 512, 384)), pages[1]
        )


def test_grey_is_rgb_and_transparent_is_white(files: Callable[[str], Path]) -> None:
    with open_slide(files("grey.tif")) as slide:
        got = slide.read(everything(slide))
        assert np.array_equal(got, np.repeat(coordinates()[..., :1], 3, axis=2))
    with open_slide(files("alpha.tif")) as slide:
        got = slide.read(everything(slide))
        assert (got[:100] == 255).all()
        assert np.array_equal(got[100:], coordinates()[100:])
    with open_slide(files("palette.tif")) as slide:
        colors = np.asarray(PillowImage.open(files("palette.tif")).convert("RGB"))
        assert np.array_equal(slide.read(everything(slide)), colors)


EXACT = ["jpeg.tif", "rgb.svs", "slide.ome.tif", "v3.ome.zarr", "leica.scn"]


@pytest.mark.parametrize("name", EXACT)
def test_pixels_do_not_depend_on_the_region(name: str, files: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(1)
    with open_slide(files(name), mpp=0.25) as slide:
        for mpp in (0.25, 0.3137, 0.5, 0.7, 0.1931, 1.9):
            grid = slide.grid(mpp)
            whole = slide.read(Region(0, 0, grid.height, grid.width), mpp)
            for _ in range(6):
                row, height = sorted(rng.integers(0, grid.height, 2).tolist())
                col, width = sorted(rng.integers(0, grid.width, 2).tolist())
                region = Region(row, col, height - row + 1, width - col + 1)
                assert np.array_equal(slide.read(region, mpp), whole[region.slices]), (mpp, region)
            # Outside of the grid there is nothing.
            beyond = slide.read(Region(grid.height - 5, grid.width - 7, 20, 20), mpp)
            assert np.array_equal(beyond[:5, :7], whole[-5:, -7:])
            assert (beyond[5:] == 255).all()
            assert (beyond[:, 7:] == 255).all()


def test_large_reductions_are_made_in_pieces(
    files: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_slide(files("plain.tif"), mpp=0.25) as slide:
        grid = slide.grid(1.7)
        region = Region(-3, -3, grid.height + 5, grid.width + 9)
        at_once = slide.read(region, 1.7)
        monkeypatch.setattr("celltyper.slides.slide._MOST_SOURCE", 1000)
        sizes = []
        stored = slide._stored
        monkeypatch.setattr(
            slide, "_stored", lambda level, r: sizes.append(r[2] * r[3]) or stored(level, r)
        )
        assert np.array_equal(slide.read(region, 1.7), at_once)
        assert max(sizes) < 10_000


def test_resampling_is_pillows(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (320, 480, 3), dtype=np.uint8)
    PillowImage.fromarray(image).save(tmp_path / "noise.png")
    with open_slide(tmp_path / "noise.png", mpp=0.25) as slide:
        for mpp, size in ((0.3125, (384, 256)), (0.2, (600, 400)), (1.25, (96, 64))):
            expected = PillowImage.fromarray(image).resize(size, PillowImage.Resampling.LANCZOS)
            assert slide.grid(mpp)[:2] == size
            got = slide.read(Region(0, 0, size[1], size[0]), mpp)
            assert np.array_equal(got, np.asarray(expected))


def test_x_and_y_have_their_own_scale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = smooth(300, 200)
    tifffile.imwrite(
        tmp_path / "wide.tif",
        image,
        photometric="rgb",
        metadata=None,
        resolution=(20_000, 40_000),
        resolutionunit="CENTIMETER",
    )
    with caplog.at_level(logging.WARNING), open_slide(tmp_path / "wide.tif") as slide:
        assert slide.mpp == pytest.approx((0.5, 0.25))
        assert "0.5 wide and 0.25 micrometres high" in caplog.text
        assert slide.grid(0.5)[:4] == pytest.approx((300, 100, 1, 2))
        expected = PillowImage.fromarray(image).resize((300, 100), PillowImage.Resampling.LANCZOS)
        assert np.array_equal(slide.read(Region(0, 0, 100, 300), 0.5), np.asarray(expected))


def test_levels_by_hand() -> None:
    # Halved with the odd rest cut (175 of 351) or padded; a square thumbnail; twice the same.
    sizes = [(351, 1001), (175, 500), (88, 251), (100, 100), (175, 500), (58, 166)]
    levels, indices = levels_of(sizes)
    assert levels == (
        Level(351, 1001, 1),
        Level(175, 500, 2),
        Level(88, 251, 4),
        Level(58, 166, 6),
    )
    assert indices == (0, 1, 2, 5)
    assert levels_of([(1000, 800), (400, 320)])[0][1].downsample == 2.5


def test_the_level_is_chosen_by_the_scale_alone() -> None:
    levels = (Level(1000, 800, 1), Level(500, 400, 2), Level(125, 100, 8))
    assert grid_at(levels, 1.009, 1.009) == Grid(1000, 800, 1, 1, 0, True)
    assert grid_at(levels, 1.98, 1.98) == Grid(506, 405, 1.98, 1.98, 0, False)
    assert grid_at(levels, 1.985, 1.985) == Grid(500, 400, 2, 2, 1, True)
    assert grid_at(levels, 7.0, 7.0) == Grid(143, 115, 7, 7, 1, False)
    assert grid_at(levels, 0.5, 0.5) == Grid(2000, 1600, 0.5, 0.5, 0, False)
    assert grid_at(levels, 2.0, 4.0) == Grid(500, 200, 2, 4, 1, False)
    assert grid_at(levels, 2.5, 2.5).on_slide(Region(2, 4, 3, 1)) == Region(5, 10, 8, 3)


def test_threads_and_other_processes_read_the_same(files: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(5)
    regions = [Region(r, c, 90, 110) for r, c in rng.integers(-20, 400, (24, 2)).tolist()]
    for name in ("jpeg.tif", "leica.scn", "v2.zarr", "image.png"):
        with open_slide(files(name), mpp=0.25) as slide:
            expected = [slide.read(region, 0.41) for region in regions]
        with open_slide(files(name), mpp=0.25) as slide, ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda region: slide.read(region, 0.41), regions))
            assert all(map(np.array_equal, got, expected))
            assert all(map(np.array_equal, read_ahead(slide, regions, 0.41), expected))
            with pickle.loads(pickle.dumps(slide)) as again:
                assert again is not slide
                assert (again.path, again.mpp) == (slide.path, (0.25, 0.25))
                assert np.array_equal(again.read(regions[0], 0.41), expected[0])


def test_read_ahead_holds_a_bounded_number(files: Callable[[str], Path]) -> None:
    drawn: list[int] = []

    def regions() -> Any:
        for i in range(20):
            drawn.append(i)
            yield Region(i, 0, 4, 4)

    with open_slide(files("plain.tif")) as slide:
        for done, image in enumerate(read_ahead(slide, regions(), threads=2, ahead=3)):
            assert np.array_equal(image, coordinates()[done : done + 4, :4])
            assert len(drawn) <= done + 4
        assert len(drawn) == 20
        with pytest.raises(DataError, match="--mpp"):
            next(read_ahead(slide, [Region(0, 0, 1, 1)], 0.5))


def test_thumbnail(tmp_path: Path) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tif", halved(smooth(), 2))) as slide:
        assert slide.thumbnail(10_000).shape == (HEIGHT, WIDTH, 3)
        assert np.array_equal(slide.thumbnail(WIDTH), slide.read(everything(slide)))
        level = slide._read(grid_at(slide.levels, 2, 2), Region(0, 0, 265, 350))
        assert np.array_equal(slide.thumbnail(350), level)
        small = slide.thumbnail(100)
        expected = PillowImage.fromarray(smooth()).resize((100, 76), 1)
        assert small.shape == (76, 100, 3)
        assert np.abs(small.astype(int) - np.asarray(expected)).mean() < 3


def test_color_profile_is_noted(tmp_path: Path) -> None:
    image, profile = coordinates(40, 30), b"profile of a scanner"
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", iccprofile=profile)
    PillowImage.fromarray(image).save(tmp_path / "a.png", icc_profile=profile)
    for name in ("a.tif", "a.png"):
        with open_slide(tmp_path / name) as slide:
            assert slide.icc == profile
            assert np.array_equal(slide.read(everything(slide)), image)


@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [
        ((50_800, 50_800), "INCH", 0.5),
        ((40_000, 40_000), "CENTIMETER", 0.25),
        ((72, 72), "INCH", None),
        ((300, 300), "INCH", None),
        ((40_000, 40_000), "NONE", None),
        ((1, 1), "CENTIMETER", None),
    ],
)
def test_resolution_tags_count_with_a_unit_of_a_microscope(
    tmp_path: Path, resolution: tuple[int, int], unit: str, mpp: float | None
) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif",
        coordinates(64, 64),
        photometric="rgb",
        metadata=None,
        resolution=resolution,
        resolutionunit=unit,
    )
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == (None if mpp is None else pytest.approx((mpp, mpp)))


def test_mpp_is_stated_or_asked_for(
    tmp_path: Path, files: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with open_slide(files("plain.tif")) as slide:
        with pytest.raises(DataError, match=r"plain.tif: states no .*; pass it with --mpp"):
            require_mpp(slide)
        with pytest.raises(DataError, match="--mpp"):
            slide.read(Region(0, 0, 1, 1), 0.5)
    with open_slide(files("plain.tif"), mpp=0.25) as slide:
        assert require_mpp(slide) == (0.25, 0.25)
    with open_slide(files("plain.tif"), mpp=(0.25, 0.5)) as slide:
        assert require_mpp(slide) == (0.25, 0.5)
    with open_slide(files("rgb.svs"), mpp=0.25) as slide:
        assert slide.mpp == (0.25, 0.25)
    with open_slide(write_zarr(tmp_path / "mm.zarr", "0.4", "millimeter")) as slide:
        assert slide.mpp is None
    with open_slide(write_zarr(tmp_path / "none.zarr", "0.4", None)) as slide:
        assert slide.mpp is None
    nm = {f"PhysicalSize{a}": 250 for a in "XY"} | {f"PhysicalSize{a}Unit": "nm" for a in "XY"}
    tifffile.imwrite(
        tmp_path / "nm.ome.tif", coordinates(64, 64), photometric="rgb", metadata={**nm}
    )
    with open_slide(tmp_path / "nm.ome.tif") as slide:
        assert slide.mpp == pytest.approx((0.25, 0.25))
    write_svs(tmp_path / "no.svs")
    tifffile.tiffcomment(tmp_path / "no.svs", APERIO.split("|MPP")[0].encode())
    with open_slide(tmp_path / "no.svs") as slide, pytest.raises(DataError, match=r"only .* 20x"):
        require_mpp(slide)
    for wrong in (40, 0, -1, float("nan")):
        with pytest.raises(DataError, match="no microscope's"):
            open_slide(files("plain.tif"), mpp=wrong)
    assert len(caplog.records) == 1  # of the pixels that are not square


def test_zarr_at_a_url_and_in_the_layout_of_bioformats2raw(tmp_path: Path) -> None:
    write_zarr("memory://bucket/slide.zarr", "0.4")
    with open_slide("memory://bucket/slide.zarr") as slide:
        assert (slide.name, slide.size) == ("slide", (WIDTH, HEIGHT))
        assert np.array_equal(slide.read(everything(slide)), coordinates())
        with pickle.loads(pickle.dumps(slide)) as again:
            assert np.array_equal(again.read(Region(9, 9, 9, 9)), coordinates()[9:18, 9:18])
    zarr.open_group(tmp_path / "raw.zarr", mode="w", zarr_format=2).attrs.update(
        {"bioformats2raw.layout": 3}
    )
    write_zarr(tmp_path / "raw.zarr" / "0", "0.4")
    with open_slide(tmp_path / "raw.zarr") as slide:
        assert np.array_equal(slide.read(everything(slide)), coordinates())


def test_zarr_over_http(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    write_zarr(tmp_path / "v2.zarr", "0.4")  # shards need ranges, which this server does not know
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        with open_slide(f"{url}/v2.zarr") as slide:
            assert np.array_equal(slide.read(everything(slide)), coordinates())
        with pytest.raises(DataError, match="no OME-Zarr there"):
            open_slide(f"{url}/other.zarr")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(DataError, match="cannot be reached"):
        open_slide(f"{url}/v2.zarr")


def test_threads_that_want_one_tile_decode_it_once() -> None:
    cache, decoded, start = TileCache(3 * 12), [], threading.Barrier(4)

    def decode(key: int) -> Tile:
        decoded.append(key)
        threading.Event().wait(0.05)
        return Tile(np.full((2, 2, 3), key, np.uint8))

    def get(_: int) -> int:
        start.wait()
        return int(cache.get(7, lambda: decode(7)).pixels[0, 0, 0])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(get, range(4))) == [7] * 4
    assert decoded == [7]
    for key in (1, 2, 7, 3, 7, 1):  # three fit; 7 is used again in time, 1 is not
        cache.get(key, lambda: decode(key))  # noqa: B023
    assert decoded == [7, 1, 2, 3, 1]
    with pytest.raises(ZeroDivisionError):
        cache.get(9, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert cache.get(9, lambda: decode(9)).pixels[0, 0, 0] == 9
