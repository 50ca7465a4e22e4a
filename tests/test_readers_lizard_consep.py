"""Lizard and CoNSeP: ``.mat`` labels in miniatures of the published trees."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image as PillowImage

from celltyper.datasets import Dataset
from celltyper.errors import DataError
from celltyper.readers import consep, lizard
from celltyper.readers.consep import read_consep
from celltyper.readers.lizard import read_lizard
from celltyper.readers.matlab import read_mat

LIZARD_CLASSES = ("neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective")


def _png(path: Path, height: int = 5, width: int = 7, alpha: bool = False) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3), np.uint8)
    opaque = np.full((height, width, 1), 255, np.uint8)
    PillowImage.fromarray(np.concatenate([pixels, opaque], 2) if alpha else pixels).save(path)
    return pixels


def _mat(path: Path, **arrays: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, arrays, do_compression=True)


def _nuclei() -> np.ndarray:
    """Nuclei 2, 5 and 9: ids with gaps, as where authors deleted some."""
    nuclei = np.zeros((5, 7), np.int32)
    nuclei[0:2, 0:2], nuclei[0:2, 4:7], nuclei[3:5, 2:5] = 9, 2, 5
    return nuclei


def _column(*values: int) -> np.ndarray:
    return np.array(values, np.float64).reshape(-1, 1)


@pytest.fixture
def lizard_folder(tmp_path: Path) -> Path:
    root = tmp_path / "Lizard"
    labels = root / "lizard_labels" / "Lizard_Labels"
    _png(root / "lizard_images1" / "Lizard_Images1" / "dpath_1.png")
    _png(root / "lizard_images2" / "Lizard_Images2" / "glas_3.png")
    # Listed in another order than that of the ids: row i belongs to id[i].
    rows = {"id": _column(9, 2, 5), "class": _column(3, 6, 1)}
    extra = {"bbox": np.ones((3, 4)), "centroid": np.ones((3, 2))}
    _mat(labels / "Labels" / "dpath_1.mat", inst_map=_nuclei(), **rows, **extra)
    empty = {"id": np.zeros((0, 0)), "class": np.zeros((0, 0))}
    _mat(labels / "Labels" / "glas_3.mat", inst_map=np.zeros((5, 7)), **empty)
    info = "Filename,Source,Split\ndpath_1,dpath,2\nglas_3.png,GlaS,1\ncrag_9,CRAG,3\n"
    (labels / "info.csv").write_text(info)
    return root


def test_lizard_is_read_as_published(lizard_folder: Path) -> None:
    data = read_lizard(lizard_folder)
    assert (data.name, data.classes, data.mpp) == ("Lizard", LIZARD_CLASSES, 0.5)
    assert data.names == ("dpath_1", "glas_3")
    assert data.groups == {"dpath_1": "dpath_1", "glas_3": "glas_3"}
    assert data.splits == {"1": ("glas_3",), "2": ("dpath_1",)}
    assert data.domains == {
        "centre": {"dpath_1": "dpath", "glas_3": "glas"},
        "source": {"dpath_1": "dpath", "glas_3": "GlaS"},
    }
    sample = data["dpath_1"]
    assert sample.labels.dtype == np.int32
    np.testing.assert_array_equal(sample.labels, _nuclei())
    assert sample.phenotypes.tolist() == [0, 0, 6, 0, 0, 1, 0, 0, 0, 3]
    assert (sample.name, sample.group, sample.mpp) == ("dpath_1", "dpath_1", 0.5)


def test_lizard_field_without_nuclei_and_without_info(lizard_folder: Path) -> None:
    (lizard_folder / "lizard_labels" / "Lizard_Labels" / "info.csv").unlink()
    data = pickle.loads(pickle.dumps(read_lizard(lizard_folder)))
    assert data["glas_3"].phenotypes.tolist() == [0]
    assert (data.splits, list(data.domains)) == ({}, ["centre"])


def test_lizard_unpacked_elsewhere(lizard_folder: Path, tmp_path: Path) -> None:
    """One level more above, flat, and with overlays that bear the names of the images."""
    _png(lizard_folder / "Overlay" / "dpath_1.png")
    assert read_lizard(tmp_path).names == ("dpath_1", "glas_3")
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in [*lizard_folder.rglob("Labels/*.mat"), *lizard_folder.rglob("*mages?/*.png")]:
        (flat / file.name).write_bytes(file.read_bytes())
    assert read_lizard(flat)["dpath_1"].phenotypes[9] == 3


def test_each_is_recognised_by_its_variables(lizard_folder: Path, consep_folder: Path) -> None:
    assert lizard.recognises(lizard_folder)
    assert not lizard.recognises(consep_folder)
    assert consep.recognises(consep_folder)
    assert not consep.recognises(lizard_folder)
    empty = lizard_folder.parent / "empty"
    empty.mkdir()
    assert not lizard.recognises(empty)
    assert not consep.recognises(empty)
    # One unreadable file does not hide the layout of the others.
    (lizard_folder / "aaa.mat").write_bytes(b"no mat file")
    assert lizard.recognises(lizard_folder)


@pytest.mark.parametrize(
    ("ids", "classes", "message"),
    [
        ((9, 2, 5), (3, 7, 1), r"nucleus 2 has class 7; classes are 1..6 \(neutrophil, epi"),
        ((9, 2, 5), (3, 0, 1), r"nucleus 2 has class 0 \(background\)"),
        ((9, 2, 4), (3, 6, 1), r"no class for nucleus 5 of the map"),
        ((9, 2, 5, 2), (3, 6, 1, 6), r"id 2 is listed twice"),
        ((9, 2, 5), (3, 6), r"3 ids, but 2 classes"),
        ((9, 2.5, 5), (3, 6, 1), r"'id': ids must be whole numbers"),
        ((9, np.nan, 5), (3, 6, 1), r"'id': ids must be whole numbers"),
    ],
)
def test_wrong_rows_of_lizard_are_named(
    lizard_folder: Path, ids: tuple[float, ...], classes: tuple[int, ...], message: str
) -> None:
    file = next(lizard_folder.rglob("dpath_1.mat"))
    _mat(file, inst_map=_nuclei(), id=_column(*ids), **{"class": _column(*classes)})
    with pytest.raises(DataError, match=r"dpath_1\.mat.*" + message):
        read_lizard(lizard_folder)["dpath_1"]


def test_row_without_pixels_is_passed_over(lizard_folder: Path) -> None:
    file = next(lizard_folder.rglob("dpath_1.mat"))
    rows = {"id": _column(9, 2, 5, 12, 3), "class": _column(3, 6, 1, 4, 4)}
    _mat(file, inst_map=_nuclei(), **rows)
    assert read_lizard(lizard_folder)[0].phenotypes.tolist() == [0, 0, 6, 0, 0, 1, 0, 0, 0, 3]


def test_missing_partners_are_named(lizard_folder: Path) -> None:
    spare = next(lizard_folder.rglob("glas_3.mat"))
    kept = spare.read_bytes()
    spare.unlink()
    with pytest.raises(DataError, match=r"no \.mat file for the image '.*glas_3\.png'; Lizard is"):
        read_lizard(lizard_folder)
    spare.write_bytes(kept)
    next(lizard_folder.rglob("glas_3.png")).unlink()
    with pytest.raises(DataError, match=r"no image for the labels '.*glas_3\.mat'; Lizard is liz"):
        read_lizard(lizard_folder)


def test_wrong_info_is_named(lizard_folder: Path) -> None:
    info = next(lizard_folder.rglob("info.csv"))
    for text, message in (
        ("Filename,Source,Split\ndpath_1,dpath,1\n", "no row for the images 'glas_3'"),
        ("Filename,Split\ndpath_1,1\ndpath_1.png,2\nglas_3,1\n", "'dpath_1' is listed twice"),
        ("image,Split\ndpath_1,1\n", r"no column Filename \(found image,Split\)"),
        ("Filename,Split\ndpath_1\n", "has 1 fields, the header 2"),
        ("", "empty; a header"),
    ):
        info.write_text(text)
        with pytest.raises(DataError, match=r"info\.csv: .*" + message):
            read_lizard(lizard_folder)


def test_wrong_tree_says_what_it_wants(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    for read, layout, tree in (
        (read_lizard, "Lizard", "lizard_labels"),
        (read_consep, "CoNSeP", "Train/Images"),
    ):
        with pytest.raises(DataError, match=rf"not {layout}: found 'notes.txt'; expected.*{tree}"):
            read(tmp_path)
        with pytest.raises(DataError, match="nowhere: no such folder"):
            read(tmp_path / "nowhere")


def test_two_images_of_one_name(lizard_folder: Path) -> None:
    _png(lizard_folder / "lizard_images2" / "dpath_1.png")
    with pytest.raises(DataError, match=r"dpath_1\.png and .*dpath_1\.png have the same stem"):
        read_lizard(lizard_folder)


def test_sizes_that_differ_are_named(lizard_folder: Path) -> None:
    _png(next(lizard_folder.rglob("dpath_1.png")), 5, 6)
    with pytest.raises(DataError, match=r"dpath_1\.mat: .*\(5, 7\).*dpath_1\.png is \(5, 6\)"):
        read_lizard(lizard_folder)["dpath_1"]


def test_truncated_mat_is_named_wherever_it_ends(lizard_folder: Path) -> None:
    file = next(lizard_folder.rglob("dpath_1.mat"))
    whole = file.read_bytes()
    data = read_lizard(lizard_folder)
    readable = []
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        message = _refusal(data)
        if message is None:
            readable.append(end)
        else:
            assert message.startswith(f"{file}: ")
            assert "\n" not in message
    # Only what follows the last variable that is needed may be missing.
    assert min(readable, default=len(whole)) > 300


def test_damaged_mat_is_an_error_or_read(lizard_folder: Path) -> None:
    file = next(lizard_folder.rglob("dpath_1.mat"))
    whole = file.read_bytes()
    data = read_lizard(lizard_folder)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = rng.integers(256)
        file.write_bytes(bytes(damaged))
        refused += _refusal(data) is not None
    assert refused > 100


def _refusal(data: Dataset) -> str | None:
    try:
        data["dpath_1"]
    except DataError as error:
        return str(error)
    return None


def test_other_files_named_mat(lizard_folder: Path) -> None:
    file = next(lizard_folder.rglob("dpath_1.mat"))
    data = read_lizard(lizard_folder)
    file.write_text("id,class\n1,2\n" * 20)
    with pytest.raises(DataError, match=r"dpath_1\.mat: unreadable or truncated"):
        data["dpath_1"]
    _mat(file, inst_map=_nuclei(), id=_column(2, 5, 9))
    with pytest.raises(DataError, match=r"no variable 'class' in it \(found 'id', 'inst_map'\)"):
        data["dpath_1"]
    _mat(file, inst_map="text", id=_column(2), **{"class": _column(2)})
    with pytest.raises(DataError, match=r"'inst_map': ids must be numbers"):
        data["dpath_1"]


def test_mat_of_matlab_7_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MATLAB 7.3 files are HDF5 with 512 bytes before it and columns first."""
    h5py = pytest.importorskip("h5py")
    file = tmp_path / "a.mat"
    with h5py.File(file, "w", userblock_size=512) as opened:
        opened["inst_map"] = _nuclei().astype(np.float64).T
        opened["id"] = _column(2, 5, 9).T
        opened["class"] = np.array([0, 0], np.uint64)
        opened["class"].attrs["MATLAB_empty"] = np.uint8(1)
    with file.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file".ljust(512, b"\0"))
    arrays = read_mat(file, ("inst_map", "id", "class"))
    np.testing.assert_array_equal(arrays["inst_map"], _nuclei())
    assert arrays["id"].shape == (3, 1)
    assert arrays["class"].size == 0
    with pytest.raises(DataError, match=r"a\.mat: no variable 'type_map' in it \(found 'class', "):
        read_mat(file, ("type_map",))
    assert lizard.recognises(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(DataError, match=r"a\.mat: an HDF5 file.*pip install 'celltyper\[data\]'"):
        read_mat(file, ("inst_map",))
    whole = file.read_bytes()
    monkeypatch.undo()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.mat: unreadable or truncated"):
        read_mat(file, ("inst_map",))


@pytest.fixture
def consep_folder(tmp_path: Path) -> Path:
    root = tmp_path / "CoNSeP"
    types = np.zeros((5, 7))
    types[0:2, 0:2], types[0:2, 4:7], types[3:5, 2:5] = 7, 4, 2
    types[0, 4] = 3  # one pixel of another class, and one without
    types[1, 4] = 0
    types[4, 6] = 5  # outside all nuclei
    arrays = {"inst_map": _nuclei().astype(np.float64), "type_map": types}
    arrays["inst_type"], arrays["inst_centroid"] = _column(4, 2, 7), np.ones((3, 2))
    for split, name, alpha in (("Train", "train_1", True), ("Test", "test_1", False)):
        _png(root / split / "Images" / f"{name}.png", alpha=alpha)
        _mat(root / split / "Labels" / f"{name}.mat", **arrays)
        _png(root / split / "Overlay" / f"{name}.png")
    return root


def test_consep_is_read_as_published(consep_folder: Path) -> None:
    pixels = _png(consep_folder / "Train" / "Images" / "train_1.png", alpha=True)
    data = pickle.loads(pickle.dumps(read_consep(consep_folder)))
    assert (data.name, data.mpp, data.names) == ("CoNSeP", 0.25, ("test_1", "train_1"))
    assert data.classes == ("other", "inflammatory", "epithelial", "spindle-shaped")
    assert data.splits == {"train": ("train_1",), "test": ("test_1",)}
    assert data.groups == {"train_1": "train_1", "test_1": "test_1"}
    sample = data["train_1"]
    np.testing.assert_array_equal(sample.image, pixels)
    np.testing.assert_array_equal(sample.labels, _nuclei())
    assert sample.phenotypes.tolist() == [0, 0, 3, 0, 0, 2, 0, 0, 0, 4]


def test_consep_with_all_classes(consep_folder: Path) -> None:
    data = read_consep(consep_folder, fine=True)
    assert data.classes[2:4] == ("healthy epithelial", "dysplastic/malignant epithelial")
    assert len(data.classes) == 7
    assert data["test_1"].phenotypes.tolist() == [0, 0, 4, 0, 0, 2, 0, 0, 0, 7]


def test_all_seven_classes_of_consep_merge_to_four(consep_folder: Path) -> None:
    nuclei = np.zeros((5, 7))
    nuclei[0] = np.arange(1, 8)
    file = consep_folder / "Train" / "Labels" / "train_1.mat"
    _mat(file, inst_map=nuclei, type_map=nuclei)
    table = read_consep(consep_folder)["train_1"].phenotypes
    assert table.tolist() == [0, 1, 2, 3, 3, 4, 4, 4]


def test_parts_of_consep_open_alone(consep_folder: Path) -> None:
    assert read_consep(consep_folder.parent).splits.keys() == {"train", "test"}
    assert read_consep(consep_folder / "Train").splits == {"train": ("train_1",)}
    other = consep_folder / "Test"
    assert read_consep(other.rename(other.with_name("fields"))).splits == {}


def test_consep_without_type_map(consep_folder: Path) -> None:
    """Rows of 'inst_type' go by the order of the ids: 2, 5, 9."""
    file = consep_folder / "Train" / "Labels" / "train_1.mat"
    _mat(file, inst_map=_nuclei(), inst_type=_column(1, 6, 3))
    assert consep.recognises(consep_folder)
    table = read_consep(consep_folder)["train_1"].phenotypes
    assert table.tolist() == [0, 0, 1, 0, 0, 4, 0, 0, 0, 3]
    _mat(file, inst_map=_nuclei(), inst_type=_column(1, 6))
    with pytest.raises(DataError, match=r"train_1\.mat: 'inst_type' has 2 rows.*3 nuclei"):
        read_consep(consep_folder)["train_1"]
    _mat(file, inst_map=_nuclei())
    with pytest.raises(DataError, match=r"train_1\.mat: neither 'type_map' nor 'inst_type'"):
        read_consep(consep_folder)["train_1"]


def test_consep_field_without_nuclei(consep_folder: Path) -> None:
    zero = np.zeros((5, 7))
    _mat(consep_folder / "Train" / "Labels" / "train_1.mat", inst_map=zero, type_map=zero)
    assert read_consep(consep_folder)["train_1"].phenotypes.tolist() == [0]


def test_wrong_classes_of_consep_are_named(consep_folder: Path) -> None:
    file = consep_folder / "Train" / "Labels" / "train_1.mat"
    for value, message in (
        (8, r"nucleus 9 has class 8; classes are 1..7"),
        (-1, r"nucleus 9 has class -1; classes are 1..7"),
        (0, r"nucleus 2 has class 0 \(background\)"),
    ):
        types = np.zeros((5, 7))
        types[0, 0] = value
        _mat(file, inst_map=_nuclei(), type_map=types)
        with pytest.raises(DataError, match=r"train_1\.mat: " + message):
            read_consep(consep_folder)["train_1"]
    _mat(file, inst_map=_nuclei(), type_map=np.ones((5, 6)))
    with pytest.raises(DataError, match=r"train_1\.mat: map of classes is \(5, 6\).*\(5, 7\)"):
        read_consep(consep_folder)["train_1"]


def test_consep_image_and_labels_in_different_splits(consep_folder: Path) -> None:
    labels = consep_folder / "Train" / "Labels" / "train_1.mat"
    labels.rename(consep_folder / "Test" / "Labels" / "train_1.mat")
    with pytest.raises(DataError, match=r"train_1\.png and .*train_1\.mat lie in different splits"):
        read_consep(consep_folder)


def test_truncated_png_is_named(consep_folder: Path) -> None:
    file = consep_folder / "Train" / "Images" / "train_1.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError, match=r"train_1\.png: unreadable or truncated"):
        read_consep(consep_folder)["train_1"]
