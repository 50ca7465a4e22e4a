"""PanNuke and CoNIC: stacks of patches in miniatures of the published trees."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from celltyper.errors import DataError
from celltyper.readers import conic, pannuke
from celltyper.readers.conic import read_conic
from celltyper.readers.pannuke import read_pannuke

SIZE = 6


def _images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.float64)


def _masks(count: int) -> np.ndarray:
    """Patches of background; 1 as floating-point number where there is none of the nuclei."""
    masks = np.zeros((count, SIZE, SIZE, 6))
    masks[..., 5] = 1
    return masks


def _put(
    masks: np.ndarray, row: int, where: tuple[slice, slice], channel: int, nucleus: int
) -> None:
    masks[(row, *where, channel)] = nucleus
    masks[(row, *where, 5)] = 0


@pytest.fixture
def pannuke_folder(tmp_path: Path) -> Path:
    """Fold 1 with two patches, of which the second is empty, and fold 3 with one."""
    root = tmp_path / "PanNuke"
    first, third = _masks(2), _masks(1)
    # The id 4 is a neoplastic nucleus and, elsewhere, an epithelial one.
    _put(first, 0, np.s_[0:2, 0:2], 0, 4)
    _put(first, 0, np.s_[0:2, 4:6], 0, 9)
    _put(first, 0, np.s_[4:6, 0:3], 4, 4)
    _put(first, 0, np.s_[4:6, 2:5], 2, 7)  # overlaps the epithelial nucleus in column 2
    _put(third, 0, np.s_[2:4, 2:4], 3, 1)
    folds = ((1, first, ["Breast", "Bile-duct"]), (3, third, ["Colon"]))
    for fold, masks, types in folds:
        images, labels = root / f"Fold {fold}" / "images", root / f"Fold {fold}" / "masks"
        for folder in (images, labels):
            (folder / f"fold{fold}").mkdir(parents=True)
        np.save(images / f"fold{fold}" / "images.npy", _images(len(types), seed=fold))
        np.save(images / f"fold{fold}" / "types.npy", np.array(types))
        np.save(labels / f"fold{fold}" / "masks.npy", masks)
    return root


def _array(root: Path, name: str) -> Path:
    return next(root.glob(f"Fold 1/*/fold1/{name}"))


def test_pannuke_is_read_as_published(pannuke_folder: Path) -> None:
    data = pickle.loads(pickle.dumps(read_pannuke(pannuke_folder)))
    assert (data.name, data.mpp) == ("PanNuke", 0.25)
    assert data.classes == ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
    assert data.names == ("fold1_00000", "fold1_00001", "fold3_00000")
    assert data.splits == {"fold1": data.names[:2], "fold3": data.names[2:]}
    tissues = dict(zip(data.names, ("Breast", "Bile-duct", "Colon"), strict=True))
    assert data.domains == {"tissue": tissues}
    assert data.groups == {name: name for name in data.names}
    sample = data["fold1_00000"]
    np.testing.assert_array_equal(sample.image, _images(2, seed=1)[0])
    assert (sample.image.dtype, sample.labels.dtype) == (np.uint8, np.int32)
    # By class, then by id: 1 and 2 neoplastic (4 and 9), 3 connective, 4 epithelial.
    expected = [
        [1, 1, 0, 0, 2, 2],
        [1, 1, 0, 0, 2, 2],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [4, 4, 4, 3, 3, 0],
        [4, 4, 4, 3, 3, 0],
    ]
    assert sample.labels.tolist() == expected
    assert sample.phenotypes.tolist() == [0, 1, 1, 3, 5]
    assert data["fold1_00001"].phenotypes.tolist() == [0]
    assert data["fold3_00000"].phenotypes.tolist() == [0, 4]


def test_nucleus_that_is_covered_wholly_is_dropped(pannuke_folder: Path) -> None:
    masks = _masks(2)
    _put(masks, 0, np.s_[0:2, 0:2], 0, 1)
    _put(masks, 0, np.s_[4:6, 4:6], 1, 1)
    _put(masks, 0, np.s_[0:3, 0:3], 4, 1)
    _put(masks, 1, np.s_[0:3, 0:3], 4, 1)
    _put(masks, 1, np.s_[0:2, 0:2], 3, 2)
    np.save(_array(pannuke_folder, "masks.npy"), masks)
    data = read_pannuke(pannuke_folder)
    assert data[0].phenotypes.tolist() == [0, 0, 2, 5]
    assert np.unique(data[0].labels).tolist() == [0, 2, 3]
    assert data[1].phenotypes.tolist() == [0, 0, 5]
    assert np.unique(data[1].labels).tolist() == [0, 2]


def test_one_fold_and_other_nestings(pannuke_folder: Path, tmp_path: Path) -> None:
    assert read_pannuke(pannuke_folder / "Fold 3").names == ("fold3_00000",)
    assert read_pannuke(tmp_path).splits.keys() == {"fold1", "fold3"}
    flat = tmp_path / "flat" / "fold_2"
    flat.mkdir(parents=True)
    for name in pannuke.FILES:
        (flat / name).write_bytes(_array(pannuke_folder, name).read_bytes())
    assert read_pannuke(flat.parent).splits.keys() == {"fold2"}
    assert read_pannuke(flat)["fold2_00000"].phenotypes.tolist() == [0, 1, 1, 3, 5]
    nameless = flat.rename(flat.with_name("download"))
    assert read_pannuke(nameless).names == ("fold_00000", "fold_00001")
    np.save(nameless / "types.npy", np.array([b"Breast", b"Colon"]))
    assert read_pannuke(nameless).domains["tissue"]["fold_00001"] == "Colon"


def test_arrays_stay_on_disk(pannuke_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    load = np.load

    def spy(*args: object, **options: object) -> object:
        modes.append(options.get("mmap_mode"))
        return load(*args, **options)

    monkeypatch.setattr(np, "load", spy)
    read_pannuke(pannuke_folder)["fold1_00000"]
    assert set(modes) == {"r"}


def test_stacks_are_recognised(pannuke_folder: Path, conic_folder: Path) -> None:
    assert pannuke.recognises(pannuke_folder)
    assert not conic.recognises(pannuke_folder)
    assert conic.recognises(conic_folder)
    assert conic.recognises(conic_folder.parent)
    assert not pannuke.recognises(conic_folder)


@pytest.mark.parametrize("name", ["images.npy", "masks.npy", "types.npy"])
def test_missing_array_is_named(pannuke_folder: Path, name: str) -> None:
    _array(pannuke_folder, name).unlink()
    with pytest.raises(DataError, match=rf"fold1 has .*, but no {name}; expected PanNuke: Fold"):
        read_pannuke(pannuke_folder)


@pytest.mark.parametrize("name", ["images.npy", "masks.npy", "types.npy"])
def test_truncated_array_is_named(pannuke_folder: Path, name: str) -> None:
    file = _array(pannuke_folder, name)
    whole = file.read_bytes()
    for end in (0, 5, 70, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(DataError, match=rf"{name}: unreadable or truncated"):
            read_pannuke(pannuke_folder)


def test_pickled_and_zipped_arrays_are_refused(pannuke_folder: Path) -> None:
    file = _array(pannuke_folder, "types.npy")
    np.save(file, np.array(["Breast", "Colon"], object))
    with pytest.raises(DataError, match=r"types\.npy: unreadable or truncated"):
        read_pannuke(pannuke_folder)
    with file.open("wb") as stream:
        np.savez(stream, types=np.array(["Breast", "Colon"]))
    with pytest.raises(DataError, match=r"types\.npy: an \.npz archive"):
        read_pannuke(pannuke_folder)


def test_arrays_that_do_not_fit_are_named(pannuke_folder: Path) -> None:
    for name, array, message in (
        ("types.npy", np.array(["Breast"]), r"types\.npy: 1 tissues for 2 patches"),
        ("masks.npy", _masks(3), r"masks\.npy: shape \(3, 6, 6, 6\), but images.npy is \(2, 6"),
        ("masks.npy", _masks(2)[..., :5], r"masks\.npy: shape \(2, 6, 6, 5\), expected \(n, H, W"),
        ("images.npy", _images(2)[..., 0], r"images\.npy: shape \(2, 6, 6\), expected \(n, H, W"),
    ):
        file = _array(pannuke_folder, name)
        kept = file.read_bytes()
        np.save(file, array)
        with pytest.raises(DataError, match=message):
            read_pannuke(pannuke_folder)
        file.write_bytes(kept)


def test_two_arrays_of_one_fold(pannuke_folder: Path) -> None:
    copy = pannuke_folder / "copy" / "fold1" / "images.npy"
    copy.parent.mkdir(parents=True)
    np.save(copy, _images(2))
    with pytest.raises(DataError, match=r"images\.npy and .*images\.npy belong to the same fold"):
        read_pannuke(pannuke_folder)


def test_wrong_values_of_pannuke_are_named(pannuke_folder: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            read_pannuke(pannuke_folder)["fold1_00000"]

    file = _array(pannuke_folder, "masks.npy")
    masks = kept = np.load(file)
    for value, message in (
        (0.5, "must be whole numbers"),
        (np.nan, "must be whole numbers"),
        (np.inf, "must be whole numbers"),
        (1e300, "must be whole numbers"),
        (-2, "nucleus -2 in masks.npy"),
    ):
        masks = kept.copy()
        masks[0, 0, 0, 1] = value
        np.save(file, masks)
        refused(r"masks\.npy, patch 0: .*" + message)
    masks = kept.copy()
    masks[..., 5] = 1
    np.save(file, masks)
    refused(r"masks\.npy, patch 0: the background channel covers more than half of the nuclei")
    np.save(file, kept)
    images = _array(pannuke_folder, "images.npy")
    for scale, message in ((1 / 255, r"0\.\.1, expected 0\.\.255"), (2, r"must lie in 0\.\.255")):
        np.save(images, _images(2) * scale)
        refused(r"images\.npy, patch 0: .*" + message)


def test_wrong_trees_say_what_they_want(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"not PanNuke: found 'notes.txt'; expected Fold <k>/imag"):
        read_pannuke(tmp_path)
    with pytest.raises(DataError, match=r"not CoNIC: found 'notes.txt'; expected images.npy \(N"):
        read_conic(tmp_path)
    for read in (read_pannuke, read_conic):
        with pytest.raises(DataError, match="nowhere: no such folder"):
            read(tmp_path / "nowhere")


@pytest.fixture
def conic_folder(tmp_path: Path) -> Path:
    root = tmp_path / "CoNIC" / "data"
    root.mkdir(parents=True)
    labels = np.zeros((3, SIZE, SIZE, 2), np.uint16)
    labels[0, 0:2, 0:2], labels[0, 4:6, 3:6] = (7, 6), (3, 2)
    labels[2, 1:4, 1:4] = (1, 1)
    np.save(root / "images.npy", _images(3).astype(np.uint8))
    np.save(root / "labels.npy", labels)
    (root / "patch_info.csv").write_text("patch_info\ndpath_1-0000\ndpath_1-0004\nglas_2-0001\n")
    (root / "counts.csv").write_text("neutrophil\n0\n0\n1\n")
    return root


def test_conic_is_read_as_published(conic_folder: Path) -> None:
    data = pickle.loads(pickle.dumps(read_conic(conic_folder.parent)))
    assert (data.name, data.mpp, data.splits) == ("CoNIC", 0.5, {})
    assert data.classes[::5] == ("neutrophil", "connective")
    assert data.names == ("dpath_1-0000", "dpath_1-0004", "glas_2-0001")
    assert list(data.groups.values()) == ["dpath_1", "dpath_1", "glas_2"]
    assert list(data.domains["centre"].values()) == ["dpath", "dpath", "glas"]
    sample = data["dpath_1-0000"]
    np.testing.assert_array_equal(sample.image, _images(3)[0])
    assert np.argwhere(sample.labels == 3).tolist() == [[r, c] for r in (4, 5) for c in (3, 4, 5)]
    assert sample.phenotypes.tolist() == [0, 0, 0, 2, 0, 0, 0, 6]
    assert sample.group == "dpath_1"
    assert data["dpath_1-0004"].phenotypes.tolist() == [0]


def test_wrong_names_of_conic_are_named(conic_folder: Path) -> None:
    file = conic_folder / "patch_info.csv"
    for text, message in (
        ("patch_info\na-1\nb-1\n", "2 names, but images.npy has 3 patches"),
        ("patch_info\na-1\nb-1\na-1\n", "patch 'a-1' is listed twice"),
        ("name,y\na-1,0\nb-1,0\nc-1,0\n", "columns name,y, expected patch_info alone"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=r"patch_info\.csv: " + message):
            read_conic(conic_folder)
    file.unlink()
    with pytest.raises(DataError, match=r"data: no patch_info\.csv; expected CoNIC: images\.npy"):
        read_conic(conic_folder)


def test_wrong_arrays_of_conic_are_named(conic_folder: Path) -> None:
    file = conic_folder / "labels.npy"
    labels = np.load(file)
    np.save(file, labels[:2])
    with pytest.raises(DataError, match=r"images\.npy is \(3, 6, 6, 3\), but labels\.npy \(2, 6, "):
        read_conic(conic_folder)
    np.save(file, labels[..., 0])
    with pytest.raises(DataError, match=r"labels\.npy: shape \(3, 6, 6\), expected \(N, H, W, 2\)"):
        read_conic(conic_folder)
    for kind, message in ((9, "nucleus 3 has class 9; classes are 1..6"), (0, "class 0 .backgr")):
        labels[0, 4:6, 3:6, 1] = kind
        np.save(file, labels)
        with pytest.raises(DataError, match=r"labels\.npy, patch 'dpath_1-0000': .*" + message):
            read_conic(conic_folder)["dpath_1-0000"]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"labels\.npy: unreadable or truncated"):
        read_conic(conic_folder)


def test_two_conic_folders(conic_folder: Path) -> None:
    copy = conic_folder.with_name("copy")
    copy.mkdir()
    np.save(copy / "images.npy", _images(1))
    with pytest.raises(DataError, match=r"images\.npy or labels\.npy in 'copy', 'data'; expected"):
        read_conic(conic_folder.parent)
