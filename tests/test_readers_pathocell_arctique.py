"""PathoCell and Arctique: one field a file, in miniatures of the published trees."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from celltyper.errors import DataError
from celltyper.readers import arctique, pathocell
from celltyper.readers.arctique import read_arctique
from celltyper.readers.pathocell import read_pathocell

# Id, type and class as the benchmark publishes them; 17 is dirt.
MERGE = """
1 B; 2 macrophage/monocyte; 3 macrophage/monocyte; 4 dendritic; 5 macrophage/monocyte; 6 T; 7 T;
8 T; 9 T; 10 macrophage/monocyte; 11 macrophage/monocyte; 12 macrophage/monocyte; 13 T; 14 NK; 15 T;
16 adipocyte; 18 granulocyte; 19 other; 20 other; 21 vasculature/lymphatics; 22 nerve; 23 plasma;
24 smooth muscle; 25 stroma; 26 tumour; 27 other; 28 other; 29 vasculature/lymphatics
"""


def _pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)


def _nuclei() -> np.ndarray:
    nuclei = np.zeros((5, 7), np.int32)
    nuclei[0:2, 0:2], nuclei[0:2, 4:7], nuclei[3:5, 2:5], nuclei[4, 6] = 9, 2, 5, 3
    return nuclei


def _types() -> np.ndarray:
    types = np.zeros((5, 7), np.int32)
    types[0:2, 0:2], types[0:2, 4:7], types[3:5, 2:5] = 17, 29, 7
    types[3, 2], types[4, 0] = 26, 12  # one pixel of another type, and one outside all nuclei
    return types


def _hdf(path: Path, **arrays: Any) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    """Fields with axes as found: a leading one and channels first, or neither."""
    root = tmp_path / "phenobench"
    root.mkdir()
    maps = {"gt_inst": _nuclei()[None], "gt_ct": _types()[None]}
    for name in ("reg006_A", "reg006_B"):
        image = np.moveaxis(_pixels(), -1, 0)[None]
        _hdf(root / f"{name}.hdf", img=image, ifl=np.zeros((1, 4, 5, 7), np.uint8), **maps)
    flat = {"gt_inst": _nuclei() * 0, "gt_ct": _types()}
    _hdf(root / "spot.h5", img=_pixels(1).astype(np.float32), **flat)
    rows = ["sample_name,train_test_val_split", "reg006_A.hdf,train", "reg006_B.hdf,train"]
    (root / "split.csv").write_text("\n".join([*rows, "spot,test"]) + "\n")
    return root


def test_pathocell_is_read_as_published(fields: Path) -> None:
    data = pickle.loads(pickle.dumps(read_pathocell(fields)))
    assert (data.name, data.mpp, len(data.classes)) == ("PathoCell", None, 14)
    assert data.names == ("reg006_A", "reg006_B", "spot")
    assert data.groups == {"reg006_A": "reg006", "reg006_B": "reg006", "spot": "spot"}
    assert data.splits == {"train": ("reg006_A", "reg006_B"), "test": ("spot",)}
    assert data.domains == {}
    sample = data["reg006_A"]
    np.testing.assert_array_equal(sample.image, _pixels())
    # Nucleus 9 is dirt, 3 has no type.
    np.testing.assert_array_equal(sample.labels, np.where(_nuclei() == 9, 0, _nuclei()))
    named = {i: data.classes[sample.phenotypes[i] - 1] for i in (2, 5)}
    assert named == {2: "vasculature/lymphatics", 5: "T"}
    assert sample.phenotypes[[0, 1, 3, 4]].tolist() == [0, 0, 255, 0]
    assert len(sample.phenotypes) == 6
    assert data["spot"].phenotypes.tolist() == [0]
    np.testing.assert_array_equal(data["spot"].image, _pixels(1))


def test_published_merge_of_types(fields: Path) -> None:
    ids = np.arange(35, dtype=np.int32).reshape(5, 7)
    ids[ids > 29] = 0
    _hdf(fields / "spot.h5", img=_pixels(), gt_inst=ids, gt_ct=ids.astype(np.float32))
    data = read_pathocell(fields)
    table = data["spot"].phenotypes
    expected = dict(" ".join(row.split()).split(" ", 1) for row in MERGE.split(";"))
    assert {str(i): data.classes[c - 1] for i, c in enumerate(table) if c} == expected
    assert set(expected.values()) == set(data.classes)
    fine = read_pathocell(fields, fine=True)
    assert len(fine.classes) == len(set(fine.classes)) == 28
    assert fine["spot"].phenotypes.tolist() == [*range(17), 0, *range(17, 29)]
    assert (fine.classes[15], fine.classes[16]) == ("adipocytes", "granulocytes")


def test_only_dirt(fields: Path) -> None:
    _hdf(fields / "spot.h5", img=_pixels(), gt_inst=_nuclei(), gt_ct=np.full((5, 7), 17))
    sample = read_pathocell(fields)["spot"]
    assert (sample.labels.max(), sample.phenotypes.tolist()) == (0, [0])


def test_several_tables_give_splits_and_domains(fields: Path) -> None:
    (fields / "split.csv").unlink()
    (fields / "base.csv").write_text(
        "sample_name,train_test_val_split\nreg006_A.hdf,train\nreg006_B.hdf,train\nspot.h5,valid\n"
    )
    (fields / "by-stage").mkdir()
    (fields / "by-stage" / "split.csv").write_text(
        ",sample_name,stage,train_test_val_split\n0,reg006_A,3,train\n1,spot,4,test\n"
    )
    (fields / "tumour.csv").write_text("sample_name,tumour type\nspot,mucinous\nreg006_A,adeno\n")
    (fields / "markers.csv").write_text("marker\nCD4\n")
    data = read_pathocell(fields)
    assert data.splits == {
        "base-train": ("reg006_A", "reg006_B"),
        "base-valid": ("spot",),
        "by-stage-split-train": ("reg006_A",),
        "by-stage-split-test": ("spot",),
    }
    assert data.domains == {
        "stage": {"reg006_A": "3", "reg006_B": "unknown", "spot": "4"},
        "tumour type": {"reg006_A": "adeno", "reg006_B": "unknown", "spot": "mucinous"},
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("reg006_A.hdf,train", "reg007_A.hdf,test"), "no field 'reg007_A.hdf'"),
        (("reg006_A.hdf,train", "reg006_A,train"), "field 'reg006_A' is listed twice"),
        (("reg006_A.hdf,fold1",), "'reg006_A' is in split 'fold1'; splits are train"),
        (("reg006_A.hdf,train", "reg006_B,test"), "group 'reg006' .* is in both splits"),
        (("reg006_A.hdf",), "has 1 fields, the header 2"),
    ],
)
def test_wrong_tables_are_named(fields: Path, rows: tuple[str, ...], message: str) -> None:
    text = "\n".join(["sample_name,train_test_val_split", *rows]) + "\n"
    (fields / "split.csv").write_text(text)
    with pytest.raises(DataError, match=r"split\.csv: .*" + message):
        read_pathocell(fields)


def test_tables_that_contradict_each_other(fields: Path) -> None:
    (fields / "a.csv").write_text("sample_name,stage\nspot,3\n")
    (fields / "b.csv").write_text("sample_name,stage\nspot,4\n")
    with pytest.raises(DataError, match=r"b\.csv: stage of 'spot' is '4', but '3' in another"):
        read_pathocell(fields)


def test_wrong_fields_are_named(fields: Path) -> None:
    maps = {"gt_inst": _nuclei(), "gt_ct": _types()}
    data = read_pathocell(fields)
    for arrays, message in (
        ({"img": _pixels()[:, :6], **maps}, r"'gt_inst' is \(5, 7\), but 'img' \(5, 6, 3\)"),
        ({"img": _pixels()[..., 0], **maps}, r"'gt_inst' is \(5, 7\), but 'img' \(5, 7\)"),
        ({"img": _pixels() / 256, **maps}, r"'img': floating-point pixels in"),
        ({"img": _pixels(), "gt_inst": _nuclei()}, r"no array 'gt_ct' in it .found 'gt_inst'"),
        (
            {"img": _pixels(), **maps, "gt_ct": _types() + 4},
            r"nucleus \d has class 33; classes",
        ),
        ({"img": _pixels(), **maps, "gt_ct": _types()[:4]}, r"map of classes is \(4, 7\), but"),
        ({"img": _pixels(), **maps, "gt_inst": _nuclei() - 1}, r"label ids must lie in 0"),
        ({"img": _pixels(), **maps, "gt_inst": np.full((5, 7), b"a")}, r"ids must be numbers"),
    ):
        _hdf(fields / "spot.h5", **arrays)
        with pytest.raises(DataError, match=r"spot\.h5: .*" + message):
            data["spot"]


def test_truncated_hdf5_is_named(fields: Path) -> None:
    file = fields / "spot.h5"
    whole = file.read_bytes()
    data = read_pathocell(fields)
    for end in (0, 20, len(whole) // 2, len(whole) - 50):
        file.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"spot\.h5: unreadable or truncated"):
            data["spot"]


def test_pathocell_is_recognised(fields: Path, tmp_path: Path) -> None:
    assert pathocell.recognises(fields)
    assert pathocell.recognises(tmp_path)
    (fields / "aaa.h5").write_bytes(b"no HDF5")
    assert pathocell.recognises(fields)
    other = tmp_path / "other"
    other.mkdir()
    assert not pathocell.recognises(other)
    _hdf(other / "weights.h5", kernel=np.zeros(3))
    assert not pathocell.recognises(other)


def test_without_h5py_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reg001_A.hdf").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert pathocell.recognises(tmp_path)
    with pytest.raises(DataError, match=r"reg001_A\.hdf: .*pip install 'celltyper\[data\]'"):
        read_pathocell(tmp_path)
    PillowImage.fromarray(_pixels()).save(tmp_path / "a.png")
    assert not pathocell.recognises(tmp_path)


def test_wrong_trees_say_what_they_want(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"not PathoCell: found 'notes.txt'; expected one HDF5"):
        read_pathocell(tmp_path)
    with pytest.raises(DataError, match=r"not Arctique: found 'notes.txt'; expected images/img_"):
        read_arctique(tmp_path)
    for read in (read_pathocell, read_arctique):
        with pytest.raises(DataError, match="nowhere: no such folder"):
            read(tmp_path / "nowhere")


def _rendered(root: Path, key: int, npy: bool = False) -> None:
    nuclei = _nuclei().astype(np.uint16)
    classes = np.zeros((5, 7), np.uint8)
    for nucleus, kind in ((9, 5), (2, 1), (5, 4), (3, 2)):
        classes[nuclei == nucleus] = kind
    for kind, mask in (("instance", nuclei), ("semantic", classes)):
        folder = root / "masks" / kind
        folder.mkdir(parents=True, exist_ok=True)
        if npy:
            np.save(folder / f"{key}.npy", mask)
        else:
            PillowImage.fromarray(mask).save(folder / f"{key}.png")
    (root / "images").mkdir(exist_ok=True)
    PillowImage.fromarray(_pixels(key)).save(root / "images" / f"img_{key}.png")


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    root = tmp_path / "arctique"
    root.mkdir()
    _rendered(root, 3)
    _rendered(root, 12, npy=True)
    return root


def test_arctique_is_read_as_published(rendered: Path) -> None:
    assert arctique.recognises(rendered)
    assert arctique.recognises(rendered.parent)
    assert not arctique.recognises(rendered / "masks")
    data = pickle.loads(pickle.dumps(read_arctique(rendered.parent)))
    assert (data.name, data.mpp, data.splits) == ("Arctique", None, {})
    assert data.classes == ("epithelial", "plasma", "lymphocyte", "eosinophil", "fibroblast")
    assert data.groups == {"img_12": "img_12", "img_3": "img_3"}
    for key in (3, 12):
        sample = data[f"img_{key}"]
        np.testing.assert_array_equal(sample.image, _pixels(key))
        np.testing.assert_array_equal(sample.labels, _nuclei())
        assert sample.phenotypes.tolist() == [0, 0, 1, 2, 0, 4, 0, 0, 0, 5]


def test_parts_of_arctique_are_splits(tmp_path: Path) -> None:
    for part in ("train", "val"):
        _rendered(tmp_path / part, 0)
    data = read_arctique(tmp_path)
    assert data.splits == {"train": ("train_img_0",), "valid": ("val_img_0",)}
    assert read_arctique(tmp_path / "val").splits == {"valid": ("img_0",)}


def test_rendered_image_without_nuclei(rendered: Path) -> None:
    for kind in ("instance", "semantic"):
        np.save(rendered / "masks" / kind / "12.npy", np.zeros((5, 7, 1)))
    assert read_arctique(rendered)["img_12"].phenotypes.tolist() == [0]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("images/img_3.png", r"arctique: no image for masks/instance/ of '3\.png'"),
        ("masks/instance/3.png", r"arctique: no mask in masks/instance/ for 'img_3\.png'"),
        ("masks/semantic/12.npy", r"arctique: no mask in masks/semantic/ for 'img_12\.png'"),
    ],
)
def test_missing_partners_are_named(rendered: Path, missing: str, message: str) -> None:
    (rendered / missing).unlink()
    with pytest.raises(DataError, match=message):
        read_arctique(rendered)


def test_mask_as_png_and_as_npy(rendered: Path) -> None:
    np.save(rendered / "masks" / "semantic" / "3.npy", np.zeros((5, 7), np.uint8))
    with pytest.raises(DataError, match=r"'3\.npy' and '3\.png' have the same stem"):
        read_arctique(rendered)


def test_wrong_masks_are_named(rendered: Path) -> None:
    data = read_arctique(rendered)
    file = rendered / "masks" / "semantic" / "12.npy"
    for mask, message in (
        (np.full((5, 7), 6), r"nucleus 9 has class 6; classes are 1\.\.5 \(epithelial"),
        (np.zeros((5, 7)), r"nucleus 2 has class 0 \(background\)"),
        (np.full((5, 7), 1.5), r"must be whole numbers"),
        (np.ones((5, 6)), r"mask is \(5, 6\), but the image img_12\.png is \(5, 7\)"),
    ):
        np.save(file, mask)
        with pytest.raises(DataError, match=r"12\.npy: .*" + message):
            data["img_12"]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"12\.npy: unreadable or truncated"):
        data["img_12"]
    png = rendered / "masks" / "instance" / "3.png"
    png.write_bytes(png.read_bytes()[:50])
    with pytest.raises(DataError, match=r"3\.png: unreadable or truncated"):
        data["img_3"]
