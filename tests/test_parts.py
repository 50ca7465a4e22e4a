"""Which images train and validate: splits are taken by their names, and none is passed over."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from celltyper.config import Data
from celltyper.datasets import Dataset, write_folder
from celltyper.errors import DataError
from celltyper.parts import divide, open_whole
from celltyper.readers import open_dataset


def written(made_data: Path, root: Path, splits: dict[str, tuple[str, ...]]) -> Path:
    """Four images in one folder, divided as told."""
    samples = [s for part in ("train", "val") for s in open_dataset(made_data / part)]
    write_folder(root, samples, ("blue", "brown"), 0.5, {"splits": splits})
    return root


def names(data: Dataset) -> set[str]:
    return set(data.names)


def test_validation_images_may_be_called_valid(made_data: Path, tmp_path: Path) -> None:
    """As in PathoCell's tables and Arctique's folders."""
    held = ("train1", "train2")
    root = written(made_data, tmp_path / "a", {"train": ("train3", "val4"), "valid": held})
    train, val, _ = divide(Data(root=root), seed=0)
    assert (names(train), names(val)) == ({"train3", "val4"}, set(held))
    assert open_whole(Data(root=root)).splits == {"train": ("train3", "val4"), "val": held}
    _, val, _ = divide(Data(root=root, val="valid"), seed=0)
    assert names(val) == set(held)
    for part, folder in (("train", "train"), ("val", "valid")):
        shutil.copytree(made_data / part, tmp_path / "b" / folder)
    train, val, _ = divide(Data(root=tmp_path / "b"), seed=0)
    assert names(val) == names(open_dataset(made_data / "val"))
    assert names(train) == names(open_dataset(made_data / "train"))


@pytest.mark.parametrize("key", ["train", "val"])
def test_a_split_that_is_named_must_be_there(made_data: Path, tmp_path: Path, key: str) -> None:
    root = written(made_data, tmp_path / "a", {"fold1": ("train1",), "fold2": ("train2",)})
    said = f"no split 'fold_1' for data.{key} .its splits: fold1, fold2."
    for place in (root, root / "none"):
        config = Data(root=place, **{key: "fold_1"})
        with pytest.raises(DataError, match=said if place == root else "no such folder"):
            divide(config, seed=0)
        with pytest.raises(DataError, match=said if place == root else "no such folder"):
            open_whole(config)
    with pytest.raises(DataError, match=r"no folder tuning for data\.val"):
        divide(Data(root=made_data, val="tuning"), seed=0)
    split = tmp_path / "s.yaml"
    split.write_text("{train: [train1, train2], val: [train3]}")
    with pytest.raises(
        DataError, match=rf"s\.yaml: no split 'fold_1' for data\.{key} .its splits: "
    ):
        divide(Data(root=root, split=split, **{key: "fold_1"}), seed=0)


def test_splits_that_take_no_part_are_said(
    made_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    root = written(made_data, tmp_path / "a", {"1": ("train1",), "2": ("train2", "train3")})
    train, val, _ = divide(Data(root=root), seed=0)
    assert names(train) | names(val) == names(open_dataset(root))
    assert "none of its splits (1, 2) is 'train': all images train" in caplog.text
    caplog.clear()
    train, val, _ = divide(Data(root=root, train="2", val="1"), seed=0)
    assert (names(train), names(val)) == ({"train2", "train3"}, {"train1"})
    assert not caplog.text
