"""Readers, writer, splits, resampling and tiles, on small folders made here."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage
from scipy import ndimage

from celltyper.datasets import (
    Dataset,
    TileSampler,
    read_image,
    read_label_image,
    resample,
    split_by_group,
    write_folder,
)
from celltyper.errors import ConfigError, DataError
from celltyper.readers import open_dataset
from celltyper.readers.folder import read_folder
from celltyper.readers.masks import read_masks
from celltyper.types import Sample

CLASSES = ("tumour", "immune")


def _image(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _labels() -> tuple[np.ndarray, np.ndarray]:
    inst, types = np.zeros((6, 8), np.int32), np.zeros((6, 8), np.uint8)
    inst[1:3, 1:3], types[1:3, 1:3] = 3, 2
    inst[4:, 5:], types[4:, 5:] = 7, 1
    return inst, types


def _meta(folder: Path, **values: object) -> None:
    (folder / "meta.json").write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain folder of images a and b."""
    path = tmp_path / "cells"
    (path / "images").mkdir(parents=True)
    (path / "labels").mkdir()
    inst, types = _labels()
    for seed, name in enumerate("ab"):
        PillowImage.fromarray(_image(seed=seed)).save(path / "images" / f"{name}.png")
        np.savez(path / "labels" / f"{name}.npz", inst=inst, type=types)
    _meta(path, classes={"1": "tumour", "2": "immune"}, mpp=0.25)
    return path


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """A folder of instance masks a (16-bit PNG) and b (32-bit TIFF)."""
    path = tmp_path / "masks-cells"
    (path / "images").mkdir(parents=True)
    (path / "masks").mkdir()
    inst, _ = _labels()
    for name in "ab":
        PillowImage.fromarray(_image()).save(path / "images" / f"{name}.png")
    PillowImage.fromarray(inst.astype(np.uint16)).save(path / "masks" / "a.png")
    tifffile.imwrite(path / "masks" / "b.tif", inst.astype(np.uint32))
    rows = ["image,label,class", "a,3,immune", "a.png,7,tumour", "b,3,immune", "b,7,immune"]
    (path / "classes.csv").write_text("\n".join(rows) + "\n")
    return path


def test_folder_is_read_as_written(folder: Path) -> None:
    data = read_folder(folder)
    assert (data.classes, data.mpp, data.names, len(data)) == (CLASSES, 0.25, ("a", "b"), 2)
    sample = data["b"]
    np.testing.assert_array_equal(sample.image, _image(seed=1))
    np.testing.assert_array_equal(sample.labels, _labels()[0])
    assert sample.phenotypes.tolist() == [0, 0, 0, 2, 0, 0, 0, 1]
    assert (sample.name, sample.group, sample.mpp) == ("b", "b", 0.25)
    assert [s.name for s in data] == ["a", "b"]


def test_dataset_travels_to_workers(folder: Path) -> None:
    copy = pickle.loads(pickle.dumps(read_folder(folder)))
    np.testing.assert_array_equal(copy[0].labels, read_folder(folder)[0].labels)


def test_folder_without_types_has_one_class(folder: Path) -> None:
    for name in "ab":
        np.savez(folder / "labels" / f"{name}.npz", inst=_labels()[0].astype(np.uint16))
    (folder / "meta.json").unlink()
    data = read_folder(folder)
    assert data.classes == ("nucleus",)
    assert data.mpp is None
    assert data[0].phenotypes.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    _meta(folder, classes=["tumour", "immune"])
    with pytest.raises(DataError, match=r"a\.npz: no 'type' in it, but meta.json lists 2 classes"):
        read_folder(folder)[0]


def test_image_without_nuclei_is_fine(folder: Path) -> None:
    zero = np.zeros((6, 8), np.int32)
    np.savez(folder / "labels" / "a.npz", inst=zero, type=zero.astype(np.uint8))
    assert read_folder(folder)[0].phenotypes.tolist() == [0]


def _two_types(inst: np.ndarray, types: np.ndarray) -> None:
    types[2, 2] = 1


def _type_zero(inst: np.ndarray, types: np.ndarray) -> None:
    types[inst == 3] = 0


def _type_nine(inst: np.ndarray, types: np.ndarray) -> None:
    types[inst == 7] = 9


def _negative(inst: np.ndarray, types: np.ndarray) -> None:
    inst[0, 0] = -1


def _huge(inst: np.ndarray, types: np.ndarray) -> None:
    inst[0, 0] = 2**30


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_two_types, r"a\.npz: label 3 has two types, 1 and 2|label 3 has two types, 2 and 1"),
        (_type_zero, r"a\.npz: label 3 has type 0 \(background\); classes are 1..2 \(tumour, imm"),
        (_type_nine, r"a\.npz: label 7 has type 9; classes are 1..2"),
        (_negative, r"a\.npz: label ids must lie in 0\.\."),
        (_huge, r"a\.npz: label ids must lie in 0\.\..*relabel_sequential"),
    ],
)
def test_wrong_labels_are_named(
    folder: Path, spoil: Callable[[np.ndarray, np.ndarray], None], message: str
) -> None:
    inst, types = _labels()
    spoil(inst, types)
    np.savez(folder / "labels" / "a.npz", inst=inst, type=types)
    with pytest.raises(DataError, match=message) as error:
        read_folder(folder)[0]
    assert "\n" not in str(error.value)


def test_labels_of_another_size(folder: Path) -> None:
    np.savez(folder / "labels" / "a.npz", inst=np.zeros((6, 9), np.int32))
    with pytest.raises(DataError, match=r"labels are \(6, 9\), but the image a.png is \(6, 8\)"):
        read_folder(folder)[0]


def test_float_labels_and_missing_arrays(folder: Path) -> None:
    np.savez(folder / "labels" / "a.npz", inst=np.zeros((6, 8)))
    with pytest.raises(DataError, match="must be an integer array"):
        read_folder(folder)[0]
    np.savez(folder / "labels" / "a.npz", mask=np.zeros((6, 8), np.int32))
    with pytest.raises(DataError, match=r"no array 'inst' in it \(found 'mask'\)"):
        read_folder(folder)[0]


@pytest.mark.parametrize("file", ["images/a.png", "labels/a.npz"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_truncated_files_are_named(folder: Path, file: str, share: float) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=f"{file}: unreadable or truncated") as error:
        read_folder(folder)[0]
    assert "\n" not in str(error.value)


def test_labels_never_unpickle(folder: Path) -> None:
    np.savez(folder / "labels" / "a.npz", inst=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="unreadable"):
        read_folder(folder)[0]
    with (folder / "labels" / "a.npz").open("wb") as file:
        np.save(file, _labels()[0])
    with pytest.raises(DataError, match="unreadable"):
        read_folder(folder)[0]


def test_images_and_labels_must_pair_up(folder: Path) -> None:
    (folder / "labels" / "b.npz").rename(folder / "labels" / "c.npz")
    with pytest.raises(DataError, match="no file in labels/ for the images 'b'"):
        read_folder(folder)
    (folder / "images" / "b.png").unlink()
    with pytest.raises(DataError, match="no file in images/ for labels/ of 'c'"):
        read_folder(folder)
    PillowImage.fromarray(_image()).save(folder / "images" / "a.jpg")
    with pytest.raises(DataError, match=r"'a\.jpg' and 'a\.png' have the same stem"):
        read_folder(folder)


def test_hidden_files_are_passed_over(folder: Path) -> None:
    (folder / "images" / "._a.png").write_bytes(b"resource fork")
    (folder / "images" / "Thumbs.db").write_bytes(b"")
    assert read_folder(folder).names == ("a", "b")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"classes": {"1": "a", "3": "b"}}, r"class ids must be 1\.\.2 without gaps"),
        ({"classes": ["a", "a"]}, "class 'a' is listed twice"),
        ({"classes": "tumour"}, "'classes' must be a list"),
        ({"mpp": 0}, "'mpp' must be positive"),
        ({"mpp": "0.5"}, "'mpp' must be a number or null"),
        ({"mpp": float("nan")}, "'mpp' must be positive"),
        ({"splits": {"train": "a"}}, "'splits' must be"),
        ({"splits": {"train": ["a", "z"]}}, "split 'train' names 'z'"),
        ({"splits": {"train": ["a"], "test": ["a"]}}, r"group 'a' \(image 'a'\) is in both"),
        (
            {"splits": {"train": ["a"], "test": ["b"]}, "groups": {"a": "p1", "b": "p1"}},
            "group 'p1' .* is in both splits 'train' and 'test'",
        ),
        ({"groups": {"z": "p1"}}, "gives groups for 'z'"),
        ({"classes": ["a"], "colors": {"a": "red"}}, "color 'red' is not of the form"),
        ({"classes": ["a"], "colors": {"b": "#ff0000"}}, "'colors' must give"),
    ],
)
def test_wrong_meta(folder: Path, meta: dict[str, object], message: str) -> None:
    _meta(folder, **meta)
    with pytest.raises(DataError, match=message):
        read_folder(folder)


def test_meta_that_is_not_json(folder: Path) -> None:
    (folder / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta\.json: not readable as JSON"):
        read_folder(folder)


def test_splits_groups_and_colors(folder: Path) -> None:
    _meta(
        folder,
        classes=list(CLASSES),
        splits={"train": ["b"], "test": ["a"]},
        groups={"a": "patient 1"},
        colors={"immune": "#00ff00", "tumour": "#ff0000"},
    )
    test = open_dataset(folder, split="test")
    assert test.names == ("a",)
    assert test[0].group == "patient 1"
    assert test.colors == ("#ff0000", "#00ff00")
    with pytest.raises(DataError, match=r"no split 'val' \(its splits: train, test\)"):
        open_dataset(folder, split="val")
    with pytest.raises(DataError, match="no image 'z'"):
        read_folder(folder)["z"]


def test_masks_are_read(masks: Path) -> None:
    data = read_masks(masks)
    assert data.classes == ("immune", "tumour")
    for sample in data:
        np.testing.assert_array_equal(sample.labels, _labels()[0])
    assert data["a"].phenotypes.tolist() == [0, 0, 0, 1, 0, 0, 0, 2]
    assert data["b"].phenotypes.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]


def test_masks_with_class_ids_and_stated_order(masks: Path) -> None:
    _meta(masks, classes=list(CLASSES), mpp=0.5)
    (masks / "classes.csv").write_text(
        "label,class,image\n3,2,a\n7,tumour,a\n3,immune,b\n7,1,b\n", encoding="utf-8-sig"
    )
    assert read_masks(masks)["a"].phenotypes.tolist() == [0, 0, 0, 2, 0, 0, 0, 1]
    assert read_masks(masks)["a"].mpp == 0.5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["image,label,class", "a,3,x", "a,3,x"], "line 3: label 3 of image 'a' has a row already"),
        (["image,label,class", "a,3,x", "a.png,3,x"], "line 3: label 3 of image 'a' has a row"),
        (["image,label,kind", "a,3,x"], "columns must be image,label,class, got image,label,kind"),
        (["image,label,class,note", "a,3,x,y"], "columns must be image,label,class"),
        (["image,label,class", "z,3,x"], "line 2: no image 'z'"),
        (["image,label,class", "a,3"], "line 2: must have 3 fields"),
        (["image,label,class", "a,3,x,y"], "line 2: must have 3 fields"),
        (["image,label,class", "a,x,3"], "line 2: label must be an integer"),
        (["image,label,class", "a,0,x"], "line 2: label must be an integer"),
        (["image,label,class", "a,3,1"], "class ids '1' without names"),
        (["image,label,class"], "no rows"),
        (["image,label,class", "a,3,Tumour", "a,7,tumour"], "'Tumour' and 'tumour' differ only in"),
        ([""], "columns must be"),
    ],
)
def test_wrong_class_tables(masks: Path, rows: list[str], message: str) -> None:
    (masks / "classes.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=message):
        read_masks(masks)


def test_class_table_must_fit_the_masks(masks: Path) -> None:
    table = masks / "classes.csv"
    whole = table.read_text()
    table.write_text(whole.replace("a.png,7,tumour\n", ""))
    with pytest.raises(DataError, match="image 'a': no row for label 7"):
        read_masks(masks)["a"]
    table.write_text(whole + "b,9,immune\n")
    with pytest.raises(DataError, match=r"image 'b': label 9 has a row but no pixel in b\.tif"):
        read_masks(masks)["b"]
    _meta(masks, classes=["immune"])
    with pytest.raises(DataError, match=r"unknown class 'tumour' \(known: immune\)"):
        read_masks(masks)
    table.unlink()
    with pytest.raises(DataError, match=r"classes\.csv: no such file"):
        read_masks(masks)


def test_auto_finds_the_reader(folder: Path, masks: Path, tmp_path: Path) -> None:
    assert open_dataset(folder).classes == CLASSES
    assert open_dataset(masks).classes == ("immune", "tumour")
    assert open_dataset(tmp_path, split="cells").names == ("a", "b")
    with pytest.raises(DataError, match=r"layout not recognised.*images/<name>.png with labels/"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="unknown reader 'coco'"):
        open_dataset(folder, reader="coco")
    (folder / "masks").mkdir()
    with pytest.raises(DataError, match="may be read as folder or masks"):
        open_dataset(folder)
    assert open_dataset(folder, reader="folder").classes == CLASSES


def test_images_of_every_mode(tmp_path: Path) -> None:
    rgb = _image()
    grey = rgb[..., 0]
    cases = {
        "rgb.png": PillowImage.fromarray(rgb),
        "grey.png": PillowImage.fromarray(grey),
        "opaque.png": PillowImage.fromarray(np.dstack([rgb, np.full_like(grey, 255)])),
        "palette.png": PillowImage.fromarray(rgb // 64 * 64).quantize(256),
        "low16.png": PillowImage.fromarray(grey.astype(np.uint16)),
    }
    for name, image in cases.items():
        image.save(tmp_path / name)
    want = {
        "rgb.png": rgb,
        "opaque.png": rgb,
        "grey.png": np.dstack([grey] * 3),
        "low16.png": np.dstack([grey] * 3),
        "palette.png": np.asarray(cases["palette.png"].convert("RGB")),
    }
    for name, pixels in want.items():
        found, mpp = read_image(tmp_path / name)
        np.testing.assert_array_equal(found, pixels, err_msg=name)
        assert (found.dtype, mpp) == (np.uint8, None)


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    rgba = np.dstack([_image(), np.random.default_rng(1).integers(0, 256, (6, 8), np.uint8)])
    image = PillowImage.fromarray(rgba)
    image.save(tmp_path / "a.png")
    white = PillowImage.new("RGBA", image.size, "white")
    want = np.asarray(PillowImage.alpha_composite(white, image).convert("RGB")).astype(int)
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    for name in ("a.png", "a.tif"):
        assert np.abs(read_image(tmp_path / name).image - want).max() <= 1


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    PillowImage.fromarray(_image()).save(tmp_path / "a.jpg", exif=exif, quality=100)
    assert read_image(tmp_path / "a.jpg").image.shape == (6, 8, 3)


def test_tiff_layouts(tmp_path: Path) -> None:
    rgb = _image()
    path = tmp_path / "a.tif"
    for kwargs in (
        {"photometric": "rgb"},
        {"photometric": "rgb", "compression": "lzw", "predictor": True},
        {"photometric": "rgb", "compression": "zlib", "tile": (16, 16)},
    ):
        tifffile.imwrite(path, rgb, **kwargs)
        np.testing.assert_array_equal(read_image(path).image, rgb)
    tifffile.imwrite(path, np.moveaxis(rgb, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(path).image, rgb)
    tifffile.imwrite(path, rgb[..., 0], photometric="minisblack")
    np.testing.assert_array_equal(read_image(path).image, rgb[..., :1].repeat(3, axis=2))
    tifffile.imwrite(path, rgb[..., 0], photometric="miniswhite")
    np.testing.assert_array_equal(read_image(path).image, 255 - rgb[..., :1].repeat(3, axis=2))
    PillowImage.fromarray(rgb // 64 * 64).quantize(256).save(path)
    want = np.asarray(PillowImage.open(path).convert("RGB"))
    np.testing.assert_array_equal(read_image(path).image, want)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4, 3), 4000, np.uint16), "uint16 pixels with values 4000..4000; only 0..255"),
        (np.zeros((4, 4), np.float32), "pixels are float32"),
        (np.zeros((5, 6, 7), np.uint8), "TIFF with axes .* is not one RGB or grey image"),
        (np.zeros((4, 4, 2), np.int16) - 1, "TIFF with axes|values -1"),
    ],
)
def test_refused_tiffs(tmp_path: Path, pixels: np.ndarray, message: str) -> None:
    photometric = "rgb" if pixels.shape[-1] == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric=photometric)
    with pytest.raises(DataError, match=message):
        read_image(tmp_path / "a.tif")


def test_refused_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: no such file"):
        read_image(tmp_path / "a.png")
    (tmp_path / "a.tif").write_bytes(b"II*\0nonsense")
    (tmp_path / "a.png").write_text("nonsense")
    for name in ("a.tif", "a.png"):
        with pytest.raises(DataError, match=f"{name}: unreadable or truncated"):
            read_image(tmp_path / name)
    PillowImage.new("CMYK", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="CMYK"):
        read_image(tmp_path / "a.jpg")
    PillowImage.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"uint16 pixels with values 300\.\.300"):
        read_image(tmp_path / "b.png")


def test_large_images_are_no_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PillowImage.fromarray(_image()).save(tmp_path / "a.png")
    monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", 10)
    assert read_image(tmp_path / "a.png").image.shape == (6, 8, 3)
    assert PillowImage.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize(
    ("kwargs", "mpp"),
    [
        ({"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (101_600, 101_600), "resolutionunit": "INCH"}, 0.25),
        ({"resolution": (20_000, 10_000), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (4, 4), "resolutionunit": "NONE"}, None),
        ({}, None),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.4, "PhysicalSizeY": 0.4}}, 0.4),
        (
            {
                "ome": True,
                "metadata": {
                    "PhysicalSizeX": 250,
                    "PhysicalSizeXUnit": "nm",
                    "PhysicalSizeY": 250,
                    "PhysicalSizeYUnit": "nm",
                },
            },
            0.25,
        ),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um"}}, 0.25),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "pixel"}}, None),
    ],
)
def test_resolution_tags(tmp_path: Path, kwargs: dict[str, object], mpp: float | None) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, _image(), photometric="rgb", **kwargs)
    assert read_image(path).mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-4))


def test_label_images(tmp_path: Path) -> None:
    inst, _ = _labels()
    PillowImage.fromarray(inst.astype(np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label_image(tmp_path / "a.png"), inst)
    tifffile.imwrite(tmp_path / "a.tif", inst.astype(np.int32) * 10_000)
    np.testing.assert_array_equal(read_label_image(tmp_path / "a.tif"), inst * 10_000)
    PillowImage.fromarray(_image()).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="one channel of label ids"):
        read_label_image(tmp_path / "b.png")
    PillowImage.fromarray(inst > 0).save(tmp_path / "c.png")
    with pytest.raises(DataError, match="binary mask"):
        read_label_image(tmp_path / "c.png")
    tifffile.imwrite(tmp_path / "d.tif", inst.astype(np.float32))
    with pytest.raises(DataError, match="must be an integer array"):
        read_label_image(tmp_path / "d.tif")


def _discs(name: str, group: str, kinds: list[int], size: int = 64, mpp: float = 0.5) -> Sample:
    """Nuclei of the given classes on a row of discs."""
    labels = np.zeros((size, size), np.int32)
    row, col = np.mgrid[:size, :size]
    for i in range(len(kinds)):
        labels[(row - 8 - 14 * (i // 4)) ** 2 + (col - 8 - 14 * (i % 4)) ** 2 < 25] = i + 1
    image = np.full((size, size, 3), 230, np.uint8)
    image[labels > 0] = (90, 40, 120)
    return Sample(image, labels, np.array([0, *kinds], np.uint8), name, group, mpp)


def test_written_folders_read_back(tmp_path: Path) -> None:
    samples = [_discs("x", "p1", [1, 2, 2]), _discs("y", "p2", [])]
    path = write_folder(tmp_path / "out", iter(samples), CLASSES, 0.5, {"licence": "CC0"})
    data = open_dataset(path)
    assert (data.classes, data.mpp) == (CLASSES, 0.5)
    for mine, given in zip(data, samples, strict=True):
        np.testing.assert_array_equal(mine.image, given.image)
        np.testing.assert_array_equal(mine.labels, given.labels)
        np.testing.assert_array_equal(mine.phenotypes, given.phenotypes)
        assert (mine.name, mine.group, mine.mpp) == (given.name, given.group, given.mpp)
    meta = json.loads((path / "meta.json").read_text())
    assert meta["nuclei_per_class"] == {"tumour": 1, "immune": 2}
    assert meta["licence"] == "CC0"


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    good, twice = _discs("x", "", [1]), _discs("x", "", [1])
    with pytest.raises(DataError, match="two samples are named 'x'"):
        write_folder(tmp_path / "out", [good, twice], CLASSES, None)
    with pytest.raises(DataError, match=r"label 1 has type 3; classes are 1..2"):
        write_folder(tmp_path / "out", [_discs("z", "", [3])], CLASSES, None)
    with pytest.raises(DataError, match="is no file name"):
        write_folder(tmp_path / "out", [_discs("../z", "", [1])], CLASSES, None)
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "out", [good], CLASSES, None)
    with pytest.raises(DataError, match="exists and is not empty"):
        write_folder(tmp_path / "out", [good], CLASSES, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_folder(tmp_path / "file" / "out", [good], CLASSES, None)


def _dataset(samples: list[Sample]) -> Dataset:
    by_name = {s.name: s for s in samples}
    groups = {s.name: s.group for s in samples}
    return Dataset("t", Path("t"), CLASSES, 0.5, tuple(by_name), groups, by_name.__getitem__)


def test_hold_out_keeps_groups_whole_and_classes_in_proportion() -> None:
    rng = np.random.default_rng(0)
    samples = [
        _discs(f"s{i}", f"p{i // 2}", [1] * int(rng.integers(1, 9)) + [2] * (4 if i < 8 else 0))
        for i in range(24)
    ]
    data = _dataset(samples)
    for seed in range(5):
        rest, held = split_by_group(data, 0.25, seed)
        assert not {rest.groups[n] for n in rest.names} & {held.groups[n] for n in held.names}
        assert sorted(rest.names + held.names) == sorted(data.names)
        for k in (1, 2):
            n_held, n_all = (sum(int((s.phenotypes == k).sum()) for s in d) for d in (held, data))
            assert 0.15 <= n_held / n_all <= 0.4
        assert split_by_group(data, 0.25, seed).held_out.names == held.names
    assert len({split_by_group(data, 0.25, seed).held_out.names for seed in range(5)}) > 1


def test_hold_out_needs_two_groups() -> None:
    two = _dataset([_discs("a", "p1", []), _discs("b", "p2", [])])
    rest, held = split_by_group(two, 0.01, 0)
    assert (len(rest), len(held)) == (1, 1)
    with pytest.raises(DataError, match="1 group, which cannot be split"):
        split_by_group(_dataset([_discs("a", "p", [1]), _discs("b", "p", [1])]), 0.5, 0)
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1"):
        split_by_group(two, 1.0, 0)


def test_resampling_moves_nuclei_with_the_image() -> None:
    sample = _discs("a", "p", [1, 2, 1, 2, 1])
    for mpp, size in ((0.25, 128), (0.4, 80), (1.0, 32)):
        found = resample(sample, mpp)
        assert found.labels.shape == (size, size)
        assert found.mpp == mpp
        np.testing.assert_array_equal(found.phenotypes, sample.phenotypes)
        for label in range(1, 6):
            # Centres in micrometres stay, to a third of the larger pixel.
            before = np.array(ndimage.center_of_mass(sample.labels == label)) + 0.5
            after = np.array(ndimage.center_of_mass(found.labels == label)) + 0.5
            assert np.abs(before * 0.5 - after * mpp).max() < max(mpp, 0.5) / 3
        dark = found.image[..., 1] < 135
        assert (dark != (found.labels > 0)).mean() < 0.04
    assert resample(sample, 0.5) is sample


def test_resampling_does_not_alias() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[::2] = 200
    sample = Sample(image, np.zeros((64, 64), np.int32), np.zeros(1, np.uint8), mpp=0.25)
    inner = resample(sample, 1.0).image[2:-2, 2:-2]
    assert np.abs(inner.astype(int) - 100).max() <= 3


def test_lost_nuclei_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.zeros((8, 8), np.int32)
    labels[4:, 4:], labels[7, 7] = 1, 2
    table = np.array([0, 1, 2], np.uint8)
    sample = Sample(np.zeros((8, 8, 3), np.uint8), labels, table, "tiny", mpp=0.25)
    found = resample(sample, 1.0)
    assert found.phenotypes.tolist() == [0, 1]
    assert "'tiny': 1 nuclei are too small" in caplog.text
    assert "labels 2" in caplog.text
    nameless = Sample(sample.image, labels, table, "tiny")
    with pytest.raises(DataError, match=r"micrometres per pixel unknown.*state 'mpp'"):
        resample(nameless, 1.0)


def _field(size: int = 200) -> Sample:
    """200 nuclei of class 1 and 4 of class 2, each of 3 x 3 px."""
    labels = np.zeros((size, size), np.int32)
    kinds = [0]
    for i in range(204):
        row, col = 6 + 13 * (i // 14), 6 + 13 * (i % 14)
        labels[row : row + 3, col : col + 3] = i + 1
        kinds.append(2 if i % 51 == 0 else 1)
    image = np.repeat((np.arange(size * size) % 251).reshape(size, size, 1), 3, 2).astype(np.uint8)
    return Sample(image, labels, np.array(kinds, np.uint8), "f", "f")


def test_a_tile_is_a_function_of_seed_and_index() -> None:
    first, second = (TileSampler([_field(), _discs("d", "d", [1])], 32, 0.5, 3) for _ in range(2))
    forward = [first.tile(i) for i in range(10)]
    for i in reversed(range(10)):
        np.testing.assert_array_equal(second.tile(i).image, forward[i].image)
        np.testing.assert_array_equal(second.tile(i).labels, forward[i].labels)
    other = TileSampler([_field(), _discs("d", "d", [1])], 32, 0.5, 4)
    assert any((other.tile(i).image != forward[i].image).any() for i in range(10))


def test_tiles_are_cut_out_unchanged() -> None:
    sample = _field()
    sampler = TileSampler([sample], 48, 0.5, 0)
    windows = np.lib.stride_tricks.sliding_window_view(sample.labels, (48, 48))
    for i in range(20):
        tile = sampler.tile(i)
        assert tile.image.shape == (48, 48, 3)
        np.testing.assert_array_equal(tile.phenotypes, sample.phenotypes)
        places = np.argwhere((windows[:, :, ::8, ::8] == tile.labels[::8, ::8]).all(axis=(2, 3)))
        assert any(
            (sample.image[r : r + 48, c : c + 48] == tile.image).all()
            and (sample.labels[r : r + 48, c : c + 48] == tile.labels).all()
            for r, c in places
        )


@pytest.mark.parametrize(("balance", "share"), [(0.0, 4 / 204), (0.5, 0.124), (1.0, 0.5)])
def test_rare_classes_are_drawn_as_often_as_asked(balance: float, share: float) -> None:
    # Tiles of 5 px without jitter hold the drawn nucleus alone.
    sampler = TileSampler([_field()], 5, balance, 0, random_share=0.0, jitter=0.0)
    assert sampler.cells.tolist() == [200, 4]
    assert sampler.pixels.tolist() == [200 * 200 - 9 * 204, 9 * 200, 9 * 4]
    n = 3000
    rare = sum(int(t.phenotypes[t.labels].max() == 2) for t in map(sampler.tile, range(n)))
    assert abs(rare / n - share) < 4 * np.sqrt(share * (1 - share) / n)


def test_jitter_keeps_the_nucleus_in_view_and_random_tiles_are_spread() -> None:
    sampler = TileSampler([_field()], 32, 1.0, 0, random_share=0.0, jitter=0.75)
    assert all(sampler.tile(i).labels.any() for i in range(200))
    sparse = Sample(
        np.zeros((400, 400, 3), np.uint8),
        np.pad(np.ones((3, 3), np.int32), (0, 397)),
        np.array([0, 1], np.uint8),
    )
    sampler = TileSampler([sparse], 32, 0.5, 0, random_share=0.5)
    seen = sum(bool(sampler.tile(i).labels.any()) for i in range(400))
    assert 160 < seen < 240


def test_images_smaller_than_the_tile_are_reflected() -> None:
    sample = _discs("d", "d", [1, 2], size=30)
    tile = TileSampler([sample], 50, 0.5, 0).tile(0)
    want = np.pad(sample.image, ((10, 10), (10, 10), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(tile.image, want)
    kinds = np.pad(sample.phenotypes[sample.labels], 10, mode="reflect")
    np.testing.assert_array_equal(tile.phenotypes[tile.labels], kinds)
    for label in np.unique(tile.labels)[1:]:
        assert ndimage.label(tile.labels == label, np.ones((3, 3)))[1] == 1
    empty = Sample(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.int32), np.zeros(1, np.uint8))
    assert TileSampler([empty], 8, 0.5, 0).tile(0).image.shape == (8, 8, 3)


def test_sampler_refuses_wrong_input() -> None:
    with pytest.raises(DataError, match="no images"):
        TileSampler([], 8, 0.5, 0)
    with pytest.raises(ValueError, match=r"balance must lie in 0..1"):
        TileSampler([_field()], 8, 1.5, 0)


def test_real_consep(real_data: Path) -> None:
    data = open_dataset(real_data / "consep")
    assert data.classes == ("other", "inflammatory", "epithelial", "spindle-shaped")
    assert (len(data), data.mpp) == (27, 0.25)
    sample = data[0]
    with np.load(real_data / "consep" / "labels" / f"{sample.name}.npz") as raw:
        np.testing.assert_array_equal(sample.phenotypes[sample.labels], raw["type"])
        np.testing.assert_array_equal(sample.labels, raw["inst"])


def test_real_dsb2018(real_data: Path) -> None:
    data = open_dataset(real_data / "dsb2018-he")
    assert (len(data), data.classes, data.mpp) == (107, ("nucleus",), None)
    assert sum(len(np.unique(s.labels)) - 1 for s in data) == 4550
