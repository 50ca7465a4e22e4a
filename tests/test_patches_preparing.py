"""From a config to windows: their size and resolution, their classes, and which of them train."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from celltyper.classification.config import PatchConfig, PatchData
from celltyper.classification.preparing import (
    as_dataset,
    check_classes,
    counts_of,
    divide_rows,
    open_labelled,
    positive_class,
    rows_of,
    size_of,
)
from celltyper.classification.training import resolve_patches
from celltyper.errors import ConfigError, DataError
from celltyper.patches.reading import open_patches
from celltyper.patches.table import PatchTable

POINTS = 8


def field(file: Path, mpp: float | None = None) -> None:
    """A TIFF of noise that states its resolution, or none."""
    pixels = np.random.default_rng(1).integers(0, 256, (90, 110, 3), dtype=np.uint8)
    stated: dict[str, Any] = {}
    if mpp is not None:
        stated = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": 3}
    tifffile.imwrite(file, pixels, photometric="rgb", **stated)


def points(root: Path, *mpp: float | None, split: str = "") -> Path:
    """Fields ``0.tif``, ``1.tif``, ... with eight points each, of two patients and two classes.

    Every third point is of class b, and `split` is what the table says, a letter a patient.
    """
    root.mkdir(exist_ok=True)
    parts = {"t": "train", "v": "val", "x": "test", "-": ""}
    lines = ["filename,x,y,label,patient,split,tumortype"]
    for number, stated in enumerate(mpp):
        field(root / f"{number}.tif", stated)
        for i in range(POINTS):
            patient = 2 * number + i % 2
            label, part = "aab"[i % 3], parts[split[patient]] if split else ""
            lines.append(
                f"{number}.tif,{30 + 5 * i},{30 + 4 * i},{label},p{patient},{part},T{number}"
            )
    (root / "cells.csv").write_text("\n".join(lines) + "\n")
    return root


def labelled(root: Path, **data: Any) -> PatchTable:
    return open_labelled(PatchData(root=root, **data), progress=False)


# ---------------------------------------------------------------- size


def test_points_need_a_size(tmp_path: Path) -> None:
    table = labelled(points(tmp_path, None))
    with pytest.raises(ConfigError, match=r"holds points on images: set data\.size"):
        size_of(PatchData(), table)
    assert size_of(PatchData(size=40), table) == 40


def test_patches_are_taken_whole_if_they_are_of_one_size(tmp_path: Path) -> None:
    for name, side in (("a", 24), ("b", 24)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (side, side + 8)).save(tmp_path / name / "0.png")
    assert size_of(PatchData(), labelled(tmp_path)) == 24
    Image.new("RGB", (40, 30)).save(tmp_path / "b" / "1.png")
    table = labelled(tmp_path)
    with pytest.raises(ConfigError, match=r"holds patches of 24 to 30 px: set data\.size to the"):
        size_of(PatchData(), table)
    assert size_of(PatchData(size=16), table) == 16


# ---------------------------------------------------------------- resolution


@pytest.mark.parametrize(
    ("stated", "asked", "of_files", "of_windows"),
    [
        # nobody says it: pixels are taken as they are
        ((None, None), None, None, None),
        # no file says it: the config does
        ((None, None), 0.25, 0.25, 0.25),
        # the files say it: their own pixels, and a model will know
        ((0.25, 0.25), None, 0.25, 0.25),
        # the files say it, every one its own; the config says that of the windows
        ((0.25, 0.25), 0.5, None, 0.5),
        ((0.25, 0.5), 0.25, None, 0.25),
    ],
    ids=str,
)
def test_resolution_of_files_and_windows(
    stated: tuple[float | None, ...],
    asked: float | None,
    of_files: float | None,
    of_windows: float | None,
    tmp_path: Path,
) -> None:
    data = PatchData(root=points(tmp_path, *stated), mpp=asked, size=16)
    table = open_labelled(data, progress=False)
    assert table.mpp == (None if of_files is None else pytest.approx(of_files))
    config = PatchConfig.model_validate({"encoder": {"weights": "twin"}, "data": data})
    resolved = resolve_patches(config, table).data.mpp
    assert resolved == (None if of_windows is None else pytest.approx(of_windows))


def test_files_of_several_resolutions_need_that_of_the_windows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds images of 0\.25 to 0\.5 micromet.*set data\.mpp"):
        labelled(points(tmp_path, 0.25, 0.5))
    # scanners of one model differ by less than a hundredth
    assert labelled(points(tmp_path, 0.2500, 0.2503)).mpp == pytest.approx(0.25)


@pytest.mark.parametrize("stated", [(None, 0.25), (0.25, None)], ids=["first", "last"])
@pytest.mark.parametrize("asked", [None, 0.25, 0.5])
def test_a_file_that_alone_states_no_resolution_is_named(
    stated: tuple[float | None, ...], asked: float | None, tmp_path: Path
) -> None:
    silent = stated.index(None)
    with pytest.raises(DataError) as caught:
        labelled(points(tmp_path, *stated), mpp=asked)
    assert f"{silent}.tif states no micrometres per pixel, but" in str(caught.value)
    assert f"{1 - silent}.tif does" in str(caught.value)
    (tmp_path / "meta.json").write_text('{"mpp": 0.25}')
    assert labelled(tmp_path, mpp=asked).mpp == 0.25


# ---------------------------------------------------------------- classes


def test_windows_without_a_label_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = points(tmp_path, None)
    text = (root / "cells.csv").read_text()
    (root / "cells.csv").write_text(text.replace(",a,p1", ",,p1"))
    table = labelled(root)
    # points 0 to 7 are a a b a a b a a, those of p1 are the odd ones
    assert "2 windows without a label are left out" not in caplog.text
    assert "3 windows without a label are left out" in caplog.text
    assert [table.classes[k] for k in table.labels] == ["a", "b", "a", "b", "a"]
    assert table.groups == ("p0", "p0", "p0", "p1", "p0")


def test_the_positive_class_is_named_or_the_rarest(tmp_path: Path) -> None:
    table = labelled(points(tmp_path, None))
    assert np.bincount(table.labels).tolist() == [6, 2]
    assert positive_class(PatchData(), table) == 1
    assert positive_class(PatchData(positive="a"), table) == 0
    with pytest.raises(ConfigError, match=r"data.positive 'c' is no class of .*cells.csv \(a, b\)"):
        positive_class(PatchData(positive="c"), table)


# ---------------------------------------------------------------- who trains, who validates


def names_of(table: PatchTable, rows: np.ndarray) -> set[str]:
    return {table.groups[i] for i in rows}


def test_without_splits_all_train_or_a_share_of_patients_validates(tmp_path: Path) -> None:
    table = labelled(points(tmp_path, None, None, None, None, None))
    train, val = divide_rows(PatchData(), table, 0)
    assert train.tolist() == [*range(5 * POINTS)]
    assert not len(val)
    train, val = divide_rows(PatchData(val_fraction=0.2), table, 0)
    assert sorted([*train, *val]) == [*range(5 * POINTS)]
    assert len(names_of(table, val)) == 2
    assert not names_of(table, train) & names_of(table, val)
    others = [divide_rows(PatchData(val_fraction=0.2), table, seed).val for seed in range(1, 5)]
    assert any(names_of(table, rows) != names_of(table, val) for rows in others)


def test_splits_of_the_table(tmp_path: Path) -> None:
    table = labelled(points(tmp_path, None, None, None, split="tvtx-x"))
    train, val = divide_rows(PatchData(), table, 0)
    assert (names_of(table, train), names_of(table, val)) == ({"p0", "p2"}, {"p1"})
    # p4 has no split, and the test part is nobody's
    train, val = divide_rows(PatchData(train="test", val="none"), table, 0)
    assert (names_of(table, train), names_of(table, val)) == ({"p3", "p5"}, set())
    train, val = divide_rows(PatchData(val="none", val_fraction=0.5), table, 0)
    assert names_of(table, train) | names_of(table, val) == {"p0", "p2"}
    assert len(val) == len(train) == POINTS / 2
    with pytest.raises(DataError, match=r"no split 'all' for data\.train \(its splits: train, val"):
        divide_rows(PatchData(train="all"), table, 0)


def test_a_file_of_splits_replaces_those_of_the_table(tmp_path: Path) -> None:
    table = labelled(points(tmp_path, None, split="tv"))
    file = tmp_path / "splits.json"
    p0, p1 = table.names[::2], table.names[1::2]

    def divided(**parts: Any) -> tuple[list[int], list[int]]:
        file.write_text(json.dumps(parts))
        train, val = divide_rows(PatchData(split=file), table, 0)
        return train.tolist(), val.tolist()

    assert divided(train=p1, val=p0) == ([1, 3, 5, 7], [0, 2, 4, 6])
    assert divided(train=p0) == ([0, 2, 4, 6], [])
    with pytest.raises(DataError, match=r"'p0' in training and validation; keep a patient or sl"):
        divided(train=p0[1:], val=[*p1, p0[0]])
    with pytest.raises(DataError, match=r"'val' names 'none:1:2', which is not among the patches"):
        divided(train=p0, val=["none:1:2"])


def test_as_a_dataset_windows_keep_names_groups_and_domains(tmp_path: Path) -> None:
    table = open_patches(points(tmp_path, None, None, split="tt-v"))
    data = as_dataset(table, PatchData())
    assert data.names == table.names
    assert [data.groups[name] for name in data.names] == [*table.groups]
    assert data.splits == {"train": table.names[:8], "val": table.names[9::2]}
    domains = data.domains["domain"]
    assert [domains[name] for name in data.names] == ["T0"] * 8 + ["T1"] * 8
    partly = replace(table, domains=("T0",) * 8 + ("",) * 8)
    # a window of no stated domain is of an unknown one
    assert as_dataset(partly, PatchData()).domains["domain"][table.names[8]] == "unknown"
    assert len(divide_rows(PatchData(val="none", val_fraction=0.5), partly, 0).val)
    assert as_dataset(replace(table, domains=("",) * 16), PatchData()).domains == {}
    counts = counts_of(table)
    assert sum(counts.values()).tolist() == [12, 4]
    assert rows_of(table, [table.names[5], table.names[0]]).tolist() == [5, 0]


def test_validation_of_several_classes_may_lack_one(tmp_path: Path) -> None:
    """It chooses no threshold; a class that does not train is refused all the same."""
    table = labelled(points(tmp_path, None, None, None, split="ttttvv"))
    rows = {"training": np.arange(16), "validation": np.flatnonzero(table.labels[:8] == 0)}
    with pytest.raises(DataError, match=r"none of the 6 validation windows is of class b; raise"):
        check_classes(table, rows)
    labels = table.labels.copy()
    three = replace(table, classes=("a", "b", "c"), votes=np.eye(3)[labels])
    with pytest.raises(DataError, match="none of the 16 training windows is of class c; take mor"):
        check_classes(three, rows)
    labels[:8:2] = 2
    three = replace(three, labels=labels, votes=np.eye(3)[labels])
    check_classes(three, rows | {"test": np.array([], int)})
    with pytest.raises(DataError, match="here: none of the 8 test windows is of class c; ask for "):
        check_classes(three, {"test": np.arange(8, 16)}, "here")
