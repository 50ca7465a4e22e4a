"""Stores: the same as their source, atomic, resumable, and random windows of them."""

from __future__ import annotations

import errno
import json
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from celltyper.datasets import Dataset, store, write_folder
from celltyper.datasets.store import Source, write_store
from celltyper.errors import ConfigError, DataError, RunError
from celltyper.readers import READERS, open_dataset, recognise
from celltyper.readers import store as reader
from celltyper.types import UNKNOWN, Sample

CLASSES = ("tumour", "immune")


def made(name: str, seed: int = 0, shape: tuple[int, int] = (50, 70), top: int = 9) -> Sample:
    """Noise with rectangles of wild ids; one nucleus is of unknown class."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    ids = [3, 4, top]
    for i, label in enumerate(ids):
        row, col = rng.integers(2, 8, 2)
        labels[row + 10 * i : row + 10 * i + 6, col : col + 5 + 10 * i] = label
    phenotypes = np.zeros(top + 1, np.uint8)
    phenotypes[ids] = 1, 2, UNKNOWN
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    return Sample(image, labels, phenotypes, name, f"patient {name}", 0.25)


def of(samples: list[Sample], path: Path, name: str = "Made", **more: object) -> Dataset:
    by_name = {s.name: s for s in samples}
    groups = {s.name: s.group for s in samples}
    data = Dataset(name, path, CLASSES, 0.25, tuple(by_name), groups, by_name.__getitem__)
    return replace(data, **more)  # type: ignore[arg-type]


def same(one: Sample, other: Sample) -> None:
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.phenotypes, other.phenotypes)
    for field in ("name", "group", "mpp", "unannotated"):
        assert getattr(one, field) == getattr(other, field)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images as a plain folder."""
    return write_folder(
        tmp_path / "cells", [made(n, i) for i, n in enumerate("abc")], CLASSES, 0.25
    )


def test_everything_comes_back_and_zarr_sees_the_same(tmp_path: Path) -> None:
    samples = [
        made("a", 1, top=70_000),
        replace(made("b", 2, (33, 41)), mpp=0.5, unannotated=(2,)),
        replace(
            made("no nuclei"), labels=np.zeros((50, 70), np.int32), phenotypes=np.zeros(1, "u1")
        ),
    ]
    data = of(
        samples,
        tmp_path / "source",
        splits={"train": ("a",), "test": ("b", "no nuclei")},
        colors=("#ff0000", "#00ff00"),
        domains={"centre": {"a": "x", "b": "y", "no nuclei": "x"}},
    )
    out = write_store(tmp_path / "s.zarr", [Source(data, "folder")], settings={"mpp": None})
    found = open_dataset(out)
    assert recognise(out) == "store"
    for field in ("name", "classes", "mpp", "names", "groups", "splits", "colors", "domains"):
        assert getattr(found, field) == getattr(data, field)
    for sample in samples:
        same(found[sample.name], sample)
    assert open_dataset(out, split="test").names == ("b", "no nuclei")
    root = zarr.open_group(out, mode="r")
    for i, sample in enumerate(samples):
        image, labels = root[f"image/{i:06d}"], root[f"labels/{i:06d}"]
        assert isinstance(image, zarr.Array)
        assert isinstance(labels, zarr.Array)
        np.testing.assert_array_equal(image[:], sample.image)
        np.testing.assert_array_equal(labels[:], sample.labels)
        assert image.dtype == np.uint8
        assert labels.dtype == (np.int32 if sample.name == "a" else np.uint16)
        assert image.shards is not None
        assert labels.shards is not None
        assert [type(c).__name__ for c in labels.compressors] == ["BloscCodec"]
    about = root.attrs["celltyper"]
    assert isinstance(about, dict)
    assert about["sources"] == [
        {"name": "Made", "path": str(tmp_path / "source"), "reader": "folder", "images": 3}
    ]


@pytest.mark.parametrize("kept", [2**28, 0])
@pytest.mark.parametrize("cache", [0, 2**29])
def test_windows_are_slices_over_chunks_and_shards(
    kept: int, cache: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of at most 17, 24 px, files of at most 48 px, so that windows cross all of them."""
    monkeypatch.setattr(store, "RAW_CHUNK", 24)
    monkeypatch.setattr(store, "LABEL_CHUNK", 17)
    monkeypatch.setattr(store, "SHARD", 48)
    monkeypatch.setattr(store, "LABELS_KEPT", kept)
    monkeypatch.setattr(reader, "LABEL_CACHE", cache)
    rng = np.random.default_rng(0)
    sample = made("a", shape=(101, 67), top=70_000)
    ids = np.array([0, 3, 4, 70_000], np.int32)
    sample = replace(sample, labels=ids[rng.integers(0, 4, (101, 67))])
    out = write_store(tmp_path / "s.zarr", [Source(of([sample], tmp_path), "x")])
    assert len(list((out / "labels").rglob("c/*/*"))) > 4
    data = open_dataset(out)
    again = pickle.loads(pickle.dumps(data))
    for _ in range(200):
        (row, height), (col, width) = (
            (low := int(rng.integers(side)), int(rng.integers(1, side - low + 1)))
            for side in (101, 67)
        )
        for one in (data, again):
            image, labels = one.read_window("a", row, col, height, width)
            part = np.s_[row : row + height, col : col + width]
            np.testing.assert_array_equal(image, sample.image[part])
            np.testing.assert_array_equal(labels, sample.labels[part])
            image[:], labels[:] = 0, 0  # a copy of its own
    for window in ((-1, 0, 5, 5), (97, 0, 5, 5), (0, 63, 5, 5), (0, 0, 0, 5)):
        with pytest.raises(DataError, match=r"'a'.*not inside the image of 101 x 67 px"):
            data.read_window("a", *window)
    with pytest.raises(DataError, match="no image 'z'"):
        data.read_window("z", 0, 0, 1, 1)


def test_labels_beyond_what_a_reader_keeps_are_not_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [made(n, i) for i, n in enumerate("abc")]
    monkeypatch.setattr(store, "LABELS_KEPT", 2 * samples[0].labels.size)
    out = write_store(tmp_path / "s.zarr", [Source(of(samples, tmp_path), "x")])
    root = zarr.open_group(out, mode="r")
    coded = [len(root[f"labels/{i:06d}"].compressors) for i in range(3)]  # type: ignore[union-attr]
    assert coded == [1, 1, 0]
    for sample in samples:
        same(open_dataset(out)[sample.name], sample)


def test_windows_of_other_layouts(folder: Path) -> None:
    data = open_dataset(folder)
    image, labels = data.read_window("b", 3, 4, 20, 30)
    np.testing.assert_array_equal(image, data["b"].image[3:23, 4:34])
    np.testing.assert_array_equal(labels, data["b"].labels[3:23, 4:34])
    with pytest.raises(DataError, match="not inside the image of 50 x 70"):
        data.read_window("b", 40, 0, 20, 20)


def counted(data: Dataset, seen: list[str], stop: str = "") -> Dataset:
    """A dataset that notes what is read of it, and breaks at one."""

    def read(name: str) -> Sample:
        if name == stop:
            raise KeyboardInterrupt
        seen.append(name)
        return data.read(name)

    return replace(data, read=read)


def test_interrupted_writing_goes_on_and_changed_images_start_again(
    folder: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "s.zarr", list[str]()
    data = open_dataset(folder)
    with pytest.raises(KeyboardInterrupt):
        write_store(out, [Source(counted(data, seen, stop="c"), "folder")])
    assert seen == ["a", "b"]
    assert not out.exists()
    (partial,) = tmp_path.glob(".s*")
    with pytest.raises(DataError, match="layout not recognised"):
        open_dataset(partial)
    with pytest.raises(DataError, match="not a finished store"):
        open_dataset(partial, reader="store")
    # image b is drawn anew; a is not touched
    changed = made("b", 17)
    np.savez_compressed(
        folder / "labels" / "b.npz", inst=changed.labels, type=changed.phenotypes[changed.labels]
    )
    seen.clear()
    write_store(out, [Source(counted(open_dataset(folder), seen), "folder")])
    assert seen == ["b", "c"]
    assert not list(tmp_path.glob(".s*"))
    found = open_dataset(out)
    np.testing.assert_array_equal(found["b"].labels, changed.labels)
    for name in "abc":
        same(found[name], open_dataset(folder)[name])


def test_other_settings_or_a_change_of_what_all_share_start_all_again(
    folder: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "s.zarr", list[str]()
    for change in (lambda: None, lambda: None, (folder / "meta.json").touch):
        change()
        data = counted(open_dataset(folder), seen, stop="c")
        with pytest.raises(KeyboardInterrupt):
            write_store(out, [Source(data, "folder")])
    assert seen == ["a", "b", "a", "b"]
    with pytest.raises(KeyboardInterrupt):
        write_store(out, [Source(data, "folder")], settings={"mpp": 1})
    assert seen == ["a", "b"] * 3
    # fewer images than the attempt before: nothing of it is left
    write_store(out, [Source(open_dataset(folder).subset(["c"]), "folder")])
    assert [f.name for f in (out / "image").iterdir() if f.is_dir()] == ["000000"]
    assert open_dataset(out).names == ("c",)


def test_a_kill_leaves_nothing_that_opens(folder: Path, tmp_path: Path) -> None:
    """The process dies while it writes the second image, after its pixels, before its labels."""
    code = """if True:
        import os, sys, zarr
        from celltyper.datasets.store import Source, write_store
        from celltyper.readers import open_dataset
        create = zarr.Group.create_array
        def dying(self, name, **more):
            if self.path == "labels" and name == "000001":
                os._exit(9)
            return create(self, name, **more)
        zarr.Group.create_array = dying
        write_store(sys.argv[2], [Source(open_dataset(sys.argv[1]), "folder")])
    """
    out, seen = tmp_path / "s.zarr", list[str]()
    assert subprocess.run([sys.executable, "-c", code, folder, out]).returncode == 9
    assert not out.exists()
    write_store(out, [Source(counted(open_dataset(folder), seen), "folder")])
    assert seen == ["b", "c"]
    for name in "abc":
        same(open_dataset(out)[name], open_dataset(folder)[name])


def test_two_at_once_are_one_after_the_other_and_a_dead_one_is_not_waited_for(
    folder: Path, tmp_path: Path
) -> None:
    code = """if True:
        import sys
        from dataclasses import replace
        from celltyper.datasets.store import Source, write_store
        from celltyper.readers import open_dataset
        data = open_dataset(sys.argv[1])
        def read(name):
            if name == "b":
                print("in the middle", flush=True)
                sys.stdin.readline()
            return data.read(name)
        write_store(sys.argv[2], [Source(replace(data, read=read), "folder")])
    """
    out = tmp_path / "s.zarr"
    sources = [Source(open_dataset(folder), "folder")]
    for ending in ("killed", "finished"):
        first = subprocess.Popen(
            [sys.executable, "-c", code, folder, out],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert first.stdout is not None
        assert first.stdout.readline() == "in the middle\n"
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=r"s\.zarr is being written by another process"):
                write_store(out, sources, overwrite=overwrite)
        assert not out.exists()
        if ending == "killed":
            first.kill()
        first.communicate("\n")
        assert (first.returncode == 0) == (ending == "finished")
    for name in "abc":
        same(open_dataset(out)[name], open_dataset(folder)[name])
    assert not list(tmp_path.glob(".s*"))


def test_a_store_that_another_process_just_finished_is_not_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, make_folder = tmp_path / "s.zarr", store.make_folder
    sources = [Source(open_dataset(folder), "folder")]

    def quicker(path: Path) -> None:
        monkeypatch.setattr(store, "make_folder", make_folder)
        write_store(out, [Source(open_dataset(folder).subset("a"), "folder")])

    monkeypatch.setattr(store, "make_folder", quicker)
    with pytest.raises(ConfigError, match="exists; pass --overwrite"):
        write_store(out, sources)
    assert open_dataset(out).names == ("a",)
    assert not list(tmp_path.glob(".s*"))


def test_a_full_disk_says_so_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    sources = [Source(open_dataset(folder), "folder")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no file of more than 5 kB: an image has 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
        with pytest.raises(RunError, match=r"cannot be written.*same command goes on") as caught:
            write_store(out, sources)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert not out.exists()
    write_store(out, sources)
    same(open_dataset(out)["a"], open_dataset(folder)["a"])


def test_only_stores_are_replaced(folder: Path, tmp_path: Path) -> None:
    sources = [Source(open_dataset(folder), "folder")]
    out = write_store(tmp_path / "s.zarr", sources)
    with pytest.raises(ConfigError, match="exists; pass --overwrite"):
        write_store(out, sources)
    write_store(out, [Source(open_dataset(folder).subset("ab"), "folder")], overwrite=True)
    assert open_dataset(out).names == ("a", "b")
    assert not list(tmp_path.glob(".s*"))
    with pytest.raises(ConfigError, match="no store, so it is not replaced"):
        write_store(folder, sources, overwrite=True)
    assert open_dataset(folder).names == ("a", "b", "c")


def truncate(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "labels/000001/c/0/0").unlink(),
        lambda out: truncate(out / "labels/000001/c/0/0", 10),
        lambda out: truncate(out / "labels/000001/c/0/0", 100),
        lambda out: truncate(out / "image/000001/c/0/0/0", 0),
        lambda out: truncate(out / "image/000001/c/0/0/0", 5000),
        lambda out: (out / "labels/000001/zarr.json").write_text("{"),
        lambda out: (out / "image/000001/zarr.json").write_text("{}"),
    ],
)
def test_damage_names_the_image(
    damage: Callable[[Path], object], folder: Path, tmp_path: Path
) -> None:
    out = write_store(tmp_path / "s.zarr", [Source(open_dataset(folder), "folder")])
    damage(out)
    data = open_dataset(out)
    same(data["a"], open_dataset(folder)["a"])
    with pytest.raises(DataError, match=r"s\.zarr, image 'b': damaged store .*prepare it again"):
        data["b"]


def test_stores_of_later_versions_are_refused(folder: Path, tmp_path: Path) -> None:
    out = write_store(tmp_path / "s.zarr", [Source(open_dataset(folder), "folder")])
    about = json.loads((out / "zarr.json").read_text())
    about["attributes"]["celltyper"] |= {"format": 2, "version": "7.1"}
    (out / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"celltyper 7\.1.*update celltyper"):
        open_dataset(out)


def test_a_wrong_class_stops_it(tmp_path: Path) -> None:
    sample = made("a")
    sample.phenotypes[4] = 3
    with pytest.raises(DataError, match=r"'a': label 4 has class 3; classes are 1\.\.2"):
        write_store(tmp_path / "s.zarr", [Source(of([sample], tmp_path), "x")])


def test_sources_are_merged_and_names_that_clash_say_where_they_are_from(tmp_path: Path) -> None:
    one = of(
        [made("a", 1), made("b", 2)],
        tmp_path / "1",
        "Lizard",
        splits={"train": ("a",)},
        domains={"centre": {"a": "x", "b": "y"}},
    )
    two = of([made("a", 3), made("c", 4)], tmp_path / "2", "PanNuke", splits={"train": ("c",)})
    out = write_store(tmp_path / "s.zarr", [Source(one, "lizard"), Source(two, "pannuke")])
    data = open_dataset(out)
    assert data.name == "lizard+pannuke"
    assert data.names == ("lizard/a", "lizard/b", "pannuke/a", "pannuke/c")
    assert data.groups["pannuke/a"] == "pannuke/patient a"
    assert data.splits == {"train": ("lizard/a", "pannuke/c")}
    assert data.domains["centre"]["lizard/b"] == "y"
    assert data.domains["centre"]["pannuke/c"] == "unknown"
    assert data.domains["dataset"]["pannuke/c"] == "pannuke"
    np.testing.assert_array_equal(data["pannuke/a"].image, made("a", 3).image)
    assert data["pannuke/a"].group == "pannuke/patient a"
    apart = of([made("d", 5)], tmp_path / "3", "CoNSeP")
    out = write_store(tmp_path / "t.zarr", [Source(two, "pannuke"), Source(apart, "consep")])
    assert open_dataset(out).names == ("a", "c", "d")
    assert open_dataset(out).groups["d"] == "patient d"
    other = replace(apart, classes=("tumour", "stroma"))
    with pytest.raises(DataError, match=r"tumour, immune.*tumour, stroma.*differ; give a taxonomy"):
        write_store(tmp_path / "u.zarr", [Source(one, "x"), Source(other, "x")])


def test_every_reader_is_registered_with_what_the_registry_asks_of_it() -> None:
    import importlib

    with pytest.raises(ConfigError) as refused:
        open_dataset(Path(__file__).parent, reader="nope")
    assert ", ".join(sorted(("auto", *READERS))) in str(refused.value)
    for name in READERS:
        module = importlib.import_module(f"celltyper.readers.{name}")
        assert module.TREE
        assert module.recognises(Path(__file__).parent) is False
        assert callable(getattr(module, f"read_{name}"))
