"""Layouts of one folder an image or organ: DSB 2018 and NuInsSeg."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage

from celltyper.errors import DataError
from celltyper.readers import dsb2018, nuinsseg
from celltyper.readers.dsb2018 import read_dsb2018
from celltyper.readers.nuinsseg import read_nuinsseg


def _image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def _mask(*window: slice) -> np.ndarray:
    mask = np.zeros((6, 8), np.uint8)
    mask[window] = 255
    return mask


@pytest.fixture
def dsb(tmp_path: Path) -> Path:
    """Two ids below stage1_train, RGBA images, and stage1_test without masks beside."""
    root = tmp_path / "bowl"
    masks = {
        "aa11": {"f0": _mask(np.s_[1:4], np.s_[1:6]), "c3": _mask(np.s_[:2], np.s_[:3])},
        "bb22": {},
    }
    for seed, (name, nuclei) in enumerate(masks.items()):
        folder = root / "stage1_train" / name
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        rgba = np.dstack([_image(seed), np.full((6, 8), 255, np.uint8)])
        PillowImage.fromarray(rgba).save(folder / "images" / f"{name}.png")
        for file, mask in nuclei.items():
            PillowImage.fromarray(mask).save(folder / "masks" / f"{file}.png")
    (root / "stage1_test" / "cc33" / "images").mkdir(parents=True)
    return root


def test_dsb2018(dsb: Path) -> None:
    for path in (dsb, dsb / "stage1_train", dsb.parent):
        assert dsb2018.recognises(path)
    assert not dsb2018.recognises(dsb / "stage1_test")
    (dsb / "stage1_train" / "aa11" / "images" / "aa11.png").rename(dsb / "a.png")
    (dsb / "stage1_train" / "bb22" / "images" / "bb22.png").rename(dsb / "b.png")
    assert not dsb2018.recognises(dsb)  # a folder of instance-mask datasets is another layout
    (dsb / "a.png").rename(dsb / "stage1_train" / "aa11" / "images" / "aa11.png")
    (dsb / "b.png").rename(dsb / "stage1_train" / "bb22" / "images" / "bb22.png")
    data = pickle.loads(pickle.dumps(read_dsb2018(dsb)))
    assert (data.names, data.classes, data.mpp) == (("aa11", "bb22"), ("nucleus",), None)
    assert data.groups == {"aa11": "aa11", "bb22": "bb22"}
    sample = data["aa11"]
    np.testing.assert_array_equal(sample.image, _image(0))
    # c3 is the first by name; it has 6 pixels, f0 15, so c3 keeps the overlap.
    want = np.zeros((6, 8), int)
    want[1:4, 1:6] = 2
    want[:2, :3] = 1
    np.testing.assert_array_equal(sample.labels, want)
    assert sample.phenotypes.tolist() == [0, 1, 1]
    assert data["bb22"].phenotypes.tolist() == [0]


def test_dsb2018_masks_in_other_modes(dsb: Path, caplog: pytest.LogCaptureFixture) -> None:
    masks = dsb / "stage1_train" / "aa11" / "masks"
    PillowImage.fromarray(_mask(np.s_[5:], np.s_[7:])).convert("1").save(masks / "g.png")
    PillowImage.fromarray(_mask(np.s_[5:], np.s_[:1])).convert("RGBA").save(masks / "h.png")
    PillowImage.fromarray(_mask(np.s_[:0], np.s_[:0])).save(masks / "d.png")
    labels = read_dsb2018(dsb)["aa11"].labels
    assert (labels[5, 7], labels[5, 0], labels[0, 0]) == (4, 5, 1)
    assert "aa11: 1 of 5 masks are empty or covered by others: 'd.png'" in caplog.text


def test_wrong_dsb2018(dsb: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not DSB 2018: found nothing; expected <id>/images"):
        read_dsb2018(tmp_path / "empty")
    data = read_dsb2018(dsb)
    folder = dsb / "stage1_train" / "aa11"
    mask = folder / "masks" / "c3.png"
    whole = mask.read_bytes()
    mask.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"c3\.png: unreadable or truncated"):
        data["aa11"]
    PillowImage.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(mask)
    with pytest.raises(DataError, match=r"c3\.png: 48 different values; a mask is 0 outside"):
        data["aa11"]
    PillowImage.fromarray(np.zeros((5, 8), np.uint8)).save(mask)
    with pytest.raises(DataError, match=r"c3\.png: mask is \(5, 8\), but the image aa11\.png is"):
        data["aa11"]
    (dsb / "stage1_train" / "bb22" / "masks").rmdir()
    with pytest.raises(DataError, match="bb22: no folder masks for its image"):
        read_dsb2018(dsb)
    (folder / "images" / "aa11.png").rename(folder / "images" / "aa11.txt")
    with pytest.raises(DataError, match="aa11/images: must hold one image, found none"):
        read_dsb2018(dsb)


def test_real_dsb2018_as_published(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "dsb2018-he"
    stems = sorted(f.stem for f in (source / "labels").iterdir())[:3]
    for stem in stems:
        with np.load(source / "labels" / f"{stem}.npz") as raw:
            inst = raw["inst"]
        folder = tmp_path / stem
        (folder / "masks").mkdir(parents=True)
        (folder / "images").mkdir()
        PillowImage.open(source / "images" / f"{stem}.png").save(folder / "images" / f"{stem}.png")
        for label in np.unique(inst)[1:]:
            mask = (inst == label).astype(np.uint8) * 255
            PillowImage.fromarray(mask).save(folder / "masks" / f"{label:05}.png")
        found = read_dsb2018(tmp_path)[stem].labels
        kept, new = np.unique(inst, return_inverse=True)
        np.testing.assert_array_equal(found, new.reshape(inst.shape))
        assert found.max() == len(kept) - 1


@pytest.fixture
def nuins(tmp_path: Path) -> Path:
    """Two organs: one of label masks of both kinds, one of masks of the first kind only."""
    root = tmp_path / "NuInsSeg"
    inst = np.zeros((6, 8), np.uint16)
    inst[1:3, 1:3], inst[4:, 5:] = 2, 5
    overlap = inst.copy()
    overlap[1, 1] = 9
    for seed, organ in enumerate(("human bladder", "mouse liver")):
        name = organ.replace(" ", "_") + "_01"
        for folder in ("tissue images", "label masks", "mask binary", "Imagej_zips"):
            (root / organ / folder).mkdir(parents=True)
        PillowImage.fromarray(_image(seed)).save(root / organ / "tissue images" / f"{name}.png")
        tifffile.imwrite(root / organ / "label masks" / f"{name}.tif", overlap)
        PillowImage.fromarray(_mask(np.s_[:])).save(root / organ / "mask binary" / f"{name}.png")
    (root / "human bladder" / "label masks modify").mkdir()
    tifffile.imwrite(root / "human bladder" / "label masks modify" / "human_bladder_01.tif", inst)
    return root


def test_nuinsseg(nuins: Path) -> None:
    for path in (nuins, nuins.parent, nuins / "mouse liver"):
        assert nuinsseg.recognises(path)
    data = pickle.loads(pickle.dumps(read_nuinsseg(nuins)))
    names = ("human_bladder_01", "mouse_liver_01")
    assert (data.names, data.classes, data.mpp) == (names, ("nucleus",), None)
    assert data.groups == {n: n for n in names}
    assert data.domains == {
        "organ": dict(zip(names, ("human bladder", "mouse liver"), strict=True))
    }
    sample = data[names[0]]
    np.testing.assert_array_equal(sample.image, _image(0))
    assert sample.labels[1, 1] == 2
    assert sample.phenotypes.tolist() == [0, 0, 1, 0, 0, 1]
    assert data[names[1]].labels[1, 1] == 9
    one = read_nuinsseg(nuins / "mouse liver")
    assert one.domains == {"organ": {"mouse_liver_01": "mouse liver"}}
    (nuins / "meta.json").write_text('{"mpp": 0.23, "groups": {"mouse_liver_01": "m1"}}')
    stated = read_nuinsseg(nuins)
    assert (stated["mouse_liver_01"].mpp, stated["mouse_liver_01"].group) == (0.23, "m1")


def test_nuinsseg_imagej_zips(nuins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roifile = pytest.importorskip("roifile")
    (nuins / "mouse liver" / "label masks" / "mouse_liver_01.tif").unlink()
    path = nuins / "mouse liver" / "Imagej_zips" / "mouse_liver_01.zip"
    square = roifile.ImagejRoi.frompoints([(1, 1), (4, 1), (4, 4), (1, 4)])
    corner = roifile.ImagejRoi.frompoints([(6.4, 0.0), (9.0, 0.0), (9.0, 1.6), (6.4, 1.6)])
    line = roifile.ImagejRoi.frompoints([(0, 5), (7, 5)])
    line.roitype = roifile.ROI_TYPE.LINE
    with zipfile.ZipFile(path, "w") as archive:
        for name, roi in (("0002-1.roi", square), ("0001-2.roi", corner), ("0003-3.roi", line)):
            archive.writestr(name, roi.tobytes())
    sample = read_nuinsseg(nuins)["mouse_liver_01"]
    want = np.zeros((6, 8), int)
    want[1:4, 1:4], want[:2, 6:] = 1, 2
    np.testing.assert_array_equal(sample.labels, want)
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:40] + b"\0" * 20 + whole[60:], b""):
        path.write_bytes(part)
        with pytest.raises(DataError, match=r"mouse_liver_01\.zip: unreadable or truncated"):
            read_nuinsseg(nuins)["mouse_liver_01"]
    monkeypatch.setitem(sys.modules, "roifile", None)
    with pytest.raises(DataError, match=r"pip install 'celltyper\[data\]'"):
        read_nuinsseg(nuins)["mouse_liver_01"]


def test_wrong_nuinsseg(nuins: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"not NuInsSeg: found nothing; expected <organ>/'tissue"):
        read_nuinsseg(tmp_path / "empty")
    data = read_nuinsseg(nuins)
    mask = nuins / "human bladder" / "label masks modify" / "human_bladder_01.tif"
    tifffile.imwrite(mask, np.zeros((6, 9), np.uint16))
    with pytest.raises(DataError, match=r"mask is \(6, 9\), but the image human_bladder_01.png is"):
        data["human_bladder_01"]
    tifffile.imwrite(mask, _image())
    with pytest.raises(DataError, match=r"human_bladder_01\.tif: instance mask must have one chan"):
        data["human_bladder_01"]
    mask.write_bytes(mask.read_bytes()[:60])
    with pytest.raises(DataError, match=r"human_bladder_01\.tif: unreadable or truncated"):
        data["human_bladder_01"]
    mask.rename(mask.with_name("x.tif"))
    with pytest.raises(DataError, match="masks modify: no file for the images 'human_bladder_01'"):
        read_nuinsseg(nuins)
    (nuins / "human bladder" / "tissue images" / "human_bladder_01.png").unlink()
    with pytest.raises(DataError, match="tissue images: no image for label masks modify 'x'"):
        read_nuinsseg(nuins)
    mask.with_name("x.tif").rename(mask.with_name("mouse_liver_01.tif"))
    twin = nuins / "human bladder" / "tissue images" / "mouse_liver_01.png"
    PillowImage.fromarray(_image()).save(twin)
    with pytest.raises(
        DataError, match=r"'mouse_liver_01' is in .*human bladder/tissue images too"
    ):
        read_nuinsseg(nuins)
