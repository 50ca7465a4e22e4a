"""Where tissue is: found by color, drawn by the user, or stated as a rectangle."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage
from PIL import ImageDraw

from celltyper.errors import ConfigError, DataError
from celltyper.slides import (
    Slide,
    open_slide,
    parse_region,
    read_mask,
    region_mask,
    tissue_mask,
    whole_slide,
)
from celltyper.slides.source import Tile
from celltyper.tiling import Region

GLASS, PINK, PALE, INK = (243, 242, 244), (214, 150, 190), (232, 208, 224), (12, 10, 14)


class Painted:
    """A slide that is an array, in tiles of 256 px; nothing but `Source` asks for."""

    path, format, magnification, icc = "/made/painted.slide", "painted", None, None

    def __init__(self, image: np.ndarray, mpp: tuple[float, float] | None = (2.0, 2.0)) -> None:
        self.image, self.mpp = image, mpp
        height, width = image.shape[:2]
        self.sizes, self.tiles = ((width, height),), ((256, 256),)
        self.bounds = Region(0, 0, height, width)

    def tile(self, level: int, row: int, col: int) -> Tile:
        y, x = 256 * row, 256 * col
        return Tile(self.image[y : y + 256, x : x + 256])

    def close(self) -> None:
        pass


def scene(seed: int = 0) -> np.ndarray:
    """1600 x 1200 px of 2 micrometres: two pieces of tissue, one with holes, debris, ink."""
    image = PillowImage.new("RGB", (1600, 1200), GLASS)
    draw = ImageDraw.Draw(image)
    draw.ellipse((200, 200, 800, 700), fill=PINK)
    draw.ellipse((400, 400, 460, 460), fill=GLASS)  # a vessel of 120 micrometres
    draw.rectangle((550, 350, 700, 560), fill=GLASS)  # a gap of 300 x 420
    draw.rectangle((1000, 800, 1300, 1000), fill=PALE)
    draw.ellipse((1400, 100, 1440, 140), fill=PINK)  # 80 micrometres of debris
    draw.rectangle((0, 1100, 1599, 1199), fill=INK)
    grain = np.random.default_rng(seed).normal(0, 2.5, (1200, 1600, 3))
    return (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)


def at(mask: Any, x: float, y: float) -> bool:
    return bool(mask.contains(np.array(x, float), np.array(y, float)))


def test_tissue_by_its_color() -> None:
    with Slide(Painted(scene())) as slide:
        mask = tissue_mask(slide)
    assert mask.grid.shape == (300, 400)
    assert mask.scale == (4, 4)
    assert mask.source == "otsu"
    assert at(mask, 300, 450)
    assert at(mask, 1150, 900)  # pale, but tissue
    assert at(mask, 430, 430)  # the vessel belongs to it
    assert not at(mask, 625, 455)  # the gap does not
    assert not at(mask, 1420, 120)  # debris
    assert not at(mask, 800, 1150)  # ink
    assert not at(mask, 100, 100)
    assert not at(mask, -1, 5)
    assert not at(mask, 1601, 5)
    # The rim of 16 micrometres, 8 px: the pale rectangle ends at x 1300.
    assert at(mask, 1306, 900)
    assert not at(mask, 1314, 900)
    assert mask.covers(Region(790, 990, 20, 20))
    assert not mask.covers(Region(0, 0, 150, 150))
    assert mask.covers(Region(-100, -100, 2000, 2000))
    assert not mask.covers(Region(-100, -100, 50, 50))
    # Ellipse and rectangle grow by 16 micrometres, the gap shrinks by them.
    truth = np.pi * 308 * 258 - 134 * 194 + 316 * 216
    assert mask.pixels == pytest.approx(truth, rel=0.03)


def test_the_mask_does_not_depend_on_the_slides_resolution() -> None:
    image = scene()
    twice = image.repeat(2, axis=0).repeat(2, axis=1)
    with Slide(Painted(image)) as slide, Slide(Painted(twice, (1.0, 1.0))) as finer:
        one, two = tissue_mask(slide), tissue_mask(finer)
    assert one.grid.shape == two.grid.shape
    assert (one.grid != two.grid).mean() < 0.005
    assert two.scale == (8, 8)


def test_slides_without_glass_or_without_tissue() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 2.5, (600, 600, 3))
    glass = (np.array(GLASS) + noise).clip(0, 255).astype(np.uint8)
    with Slide(Painted(glass)) as slide:
        assert not tissue_mask(slide).grid.any()
    with Slide(Painted(np.full((600, 600, 3), 255, np.uint8))) as slide:
        assert not tissue_mask(slide).grid.any()
    stained = np.where(rng.random((600, 600, 1)) < 0.5, PINK, (120, 90, 160)) + noise
    with Slide(Painted(stained.clip(0, 255).astype(np.uint8))) as slide:
        assert tissue_mask(slide).grid.all()
    with Slide(Painted(glass, None)) as slide, pytest.raises(DataError, match="--mpp"):
        tissue_mask(slide)
    with Slide(Painted(glass, (20.0, 20.0))) as slide:  # coarser than the mask would be
        assert tissue_mask(slide).scale == (1, 1)


def test_tissue_of_a_real_slide(real_data: Path) -> None:
    with open_slide(real_data / "slides" / "cmu-1-small-region.svs") as slide:
        mask = tissue_mask(slide)
        thumbnail = slide.thumbnail(600).astype(int)
    # Glass of this slide is above 225 in all channels; nuclei and stroma are not.
    glass = thumbnail.min(axis=2) > 225
    y, x = np.mgrid[:600, : thumbnail.shape[1]]
    scale = slide.size[1] / 600
    inside = mask.contains(x * scale, y * scale)
    assert 0.3 < inside.mean() < 0.9
    assert inside[~glass].mean() > 0.95


def feature(rings: Any, kind: str = "annotation", name: str = "Tissue", **more: Any) -> Any:
    geometry = {"type": "Polygon", "coordinates": rings} | more
    properties = {"objectType": kind, "classification": {"name": name, "color": [1, 2, 3]}}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def box(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]


def note(path: Path, features: Any) -> Path:
    text = json.dumps({"type": "FeatureCollection", "features": features})
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def test_annotations_of_qupath(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    features = [
        feature([box(100, 100, 400, 300), box(200, 200, 100, 100)]),
        feature([[box(1000, 800, 900, 100)], [box(1000, 100, 50, 50)]], type="MultiPolygon"),
        feature([box(450, 100, 100, 50)], name="Ignore*"),
        feature([box(700, 700, 10, 10)], kind="detection"),
        feature([1, 2], type="Point"),
    ]
    with Slide(Painted(scene())) as slide:
        for name in ("a.geojson", "a.geojson.gz"):
            mask = read_mask(note(tmp_path / name, features), slide)
            assert mask.source == f"annotations {name}"
            # 400 x 300, less the hole and the ignored; the rest is cut at the slide's border.
            assert mask.pixels == pytest.approx(120_000 - 10_000 - 2_500 + 60_000 + 2_500)
            for x, y, inside in [
                (100.5, 100.5, False),
                (99.5, 100.5, False),
                (450.5, 149.5, False),
                (449.5, 149.5, True),
                (455, 151, True),
                (250, 250, False),
                (199.5, 250, True),
                (705, 705, False),
                (1599, 899, True),
                (1001, 101, True),
            ]:
                inside = inside or (x, y) == (100.5, 100.5)
                assert at(mask, x, y) == inside, (x, y)
            assert mask.covers(Region(0, 0, 101, 101))
            assert not mask.covers(Region(0, 0, 100, 100))
            assert not mask.covers(Region(200, 200, 100, 100))
            assert mask.covers(Region(199, 200, 100, 100))
            assert mask.covers(Region(0, 0, 1200, 1600))
            assert mask.grid.mean() == pytest.approx(mask.pixels / 1600 / 1200, rel=0.03)
    assert "2 objects that outline no region are passed over" in caplog.text


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([feature([box(5000, 50, 10, 10)])], "feature 1 lies outside painted"),
        ([feature([box(5, 5, 10, 10)], kind="cell")], "no annotation with an area"),
        ([feature([box(5, 5, 10, 10)], name="Ignore*")], "no annotation with an area"),
        ([], "no annotation with an area"),
        ([{"type": "Feature"}], "feature 1 is no GeoJSON Feature"),
        ([feature([["a", "b"]])], "feature 1 is no GeoJSON Feature"),
        ({"a": 1}, "no GeoJSON: expected"),
    ],
)
def test_annotations_that_cannot_be_used(features: Any, message: str, tmp_path: Path) -> None:
    with (
        Slide(Painted(scene())) as slide,
        pytest.raises(DataError, match=rf"a\.json: {message}") as error,
    ):
        read_mask(note(tmp_path / "a.json", features), slide)
    assert "\n" not in str(error.value)


def test_a_mask_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = np.zeros((60, 80), np.uint8)
    image[10:20, 30:40] = 1
    PillowImage.fromarray(image).save(tmp_path / "m.png")
    with Slide(Painted(scene())) as slide:
        mask = read_mask(tmp_path / "m.png", slide)
        assert (mask.scale, mask.pixels, mask.source) == ((20, 20), 40_000, "mask m.png")
        assert at(mask, 600, 200)
        assert not at(mask, 599, 200)
        assert at(mask, 799.9, 399.9)
        assert not at(mask, 800, 399)
        assert mask.covers(Region(399, 799, 1, 1))
        assert not mask.covers(Region(400, 800, 100, 100))
        assert not caplog.records
        PillowImage.fromarray(np.ones((60, 80), np.uint8)).save(tmp_path / "full.png")
        assert read_mask(tmp_path / "full.png", slide).grid.all()
        assert "is 0 nowhere" in caplog.text
        for name, array, message in [
            ("wide.png", np.ones((60, 90)), "has other proportions than painted"),
            ("empty.png", np.zeros((60, 80)), "is 0 everywhere"),
        ]:
            PillowImage.fromarray(array.astype(np.uint8)).save(tmp_path / name)
            with pytest.raises(DataError, match=rf"{name}: .*{message}"):
                read_mask(tmp_path / name, slide)
        with pytest.raises(DataError, match="no such file; give a mask image"):
            read_mask(tmp_path / "no.png", slide)
        (tmp_path / "bad.png").write_bytes(b"no image")
        with pytest.raises(DataError, match=r"mask .*bad.png: unreadable"):
            read_mask(tmp_path / "bad.png", slide)


def test_rectangles() -> None:
    with Slide(Painted(scene())) as slide:
        region = parse_region(" 100, 50,400,300", slide)
        assert region == Region(50, 100, 300, 400)
        mask = region_mask(region, slide)
        assert mask.pixels == 120_000
        assert at(mask, 100.5, 50.5)
        assert not at(mask, 99.5, 50.5)
        assert mask.covers(Region(349, 499, 9, 9))
        assert not mask.covers(Region(350, 499, 9, 9))
        everything = whole_slide(slide)
        assert everything.pixels == 1600 * 1200
        assert everything.covers(Region(1199, 1599, 1, 1))
        assert not everything.covers(Region(1200, 0, 9, 9))
        for text, message in [
            ("1,2,3", "give x,y,width,height"),
            ("a,2,3,4", "give x,y,width,height"),
            ("1.5,2,3,4", "give x,y,width,height"),
            ("-1,2,3,4", "must be 0 or more"),
            ("1,2,0,4", "must be 0 or more"),
            ("1500,2,200,4", "reaches to x 1700, y 6, but painted has 1600 x 1200 px"),
        ]:
            with pytest.raises(ConfigError, match=message):
                parse_region(text, slide)


def test_a_source_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), Slide(Painted(scene())) as slide:
        assert repr(slide) == "<Slide 'painted': painted, 1600 x 1200 px, mpp 2>"
        assert np.array_equal(slide.read(Region(200, 200, 300, 300)), scene()[200:500, 200:500])
    assert not caplog.records
