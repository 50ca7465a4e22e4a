"""Wrong input, full disk, interruption: one line, the exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file

import celltyper.atomic
import celltyper.loop
import celltyper.training
from celltyper.cells.morphology import Morphology
from celltyper.checkpoints import read_tensors, write_tensors
from celltyper.config import Config, dump_config
from celltyper.training import train

Tiny = Callable[..., Config]


Run = Callable[..., Any]
"""What the fixture ``celltyper_command`` gives."""


@pytest.fixture(scope="module")
def recipe(tiny: Tiny, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(dump_config(tiny(made_data, "instances.method=distance")))
    return path


@pytest.fixture(scope="module")
def trained(tiny: Tiny, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained long enough to find some cells."""
    config = tiny(
        made_data,
        "instances.method=distance",
        "train.steps=60",
        "train.lr=0.003",
        "train.validate_every=60",
    )
    return train(config, tmp_path_factory.mktemp("run"), device="cpu", progress=False)


@pytest.fixture(scope="module")
def image(made_data: Path) -> Path:
    return made_data / "test" / "images" / "test5.png"


@pytest.fixture
def data(made_data: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may spoil."""
    return Path(shutil.copytree(made_data, tmp_path / "data"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder, hidden ones too."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in folder.rglob("*")
    }


def assert_one_line(err: str, *said: object) -> None:
    """The last line is the error; a log may come before it, a traceback never."""
    line = err.splitlines()[-1]
    assert line.startswith("celltyper: "), err
    assert err.count("celltyper: ") == 1
    assert "Traceback" not in err
    for text in said:
        assert str(text) in line


def assert_refused(outcome: Any, folder: Path, before: dict[str, bytes], *said: object) -> None:
    """Exit code 2, one line and nothing else, and not a file or folder more or less."""
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    assert_one_line(outcome.err, *said)
    assert content(folder) == before


# ---------------------------------------------------------------- images


def truncated(image: Path, path: Path) -> Path:
    path.write_bytes(image.read_bytes()[:2000])
    return path


def text_as_png(image: Path, path: Path) -> Path:
    path.write_text("I am no image.\n" * 50)
    return path


def empty_file(image: Path, path: Path) -> Path:
    path.write_bytes(b"")
    return path


def table(image: Path, path: Path) -> Path:
    path = path.with_suffix(".csv")
    path.write_text("image,x,y\na,1,2\n")
    return path


def deep(image: Path, path: Path) -> Path:
    values = np.asarray(PillowImage.open(image))[..., 0].astype(np.uint16) * 257
    PillowImage.fromarray(values).save(path)
    return path


def floating(image: Path, path: Path) -> Path:
    path = path.with_suffix(".tif")
    tifffile.imwrite(
        path, np.asarray(PillowImage.open(image)).astype(np.float32), photometric="rgb"
    )
    return path


def cmyk(image: Path, path: Path) -> Path:
    path = path.with_suffix(".jpg")
    PillowImage.open(image).convert("CMYK").save(path)
    return path


def stack(image: Path, path: Path) -> Path:
    path = path.with_suffix(".tif")
    pixels = np.asarray(PillowImage.open(image))
    tifffile.imwrite(path, np.stack([pixels] * 5), photometric="rgb")
    return path


def missing(image: Path, path: Path) -> Path:
    return path


def folder_without_images(image: Path, path: Path) -> Path:
    path.mkdir()
    (path / "notes.txt").write_text("none here")
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (missing, "no such image or folder"),
        (folder_without_images, "holds no image (.jpeg, .jpg, .png, .tif, .tiff)"),
        (truncated, "unreadable or truncated"),
        (text_as_png, "unreadable or truncated (cannot identify image file"),
        (empty_file, "unreadable or truncated"),
        (table, "no column 'slide'"),
        (deep, "only 0..255 are read, rescale the image to 8 bits"),
        (floating, "pixels are float32; save the image as 8-bit RGB"),
        (cmyk, "CMYK image; convert it to RGB first"),
        (stack, "save one page per file"),
    ],
)
def test_image_that_cannot_be_read(
    make: Callable[[Path, Path], Path],
    said: str,
    trained: Path,
    image: Path,
    tmp_path: Path,
    celltyper_command: Run,
) -> None:
    bad = make(image, tmp_path / "bad.png")
    before = content(tmp_path)
    outcome = celltyper_command("infer", bad, "-m", trained, "-o", tmp_path / "out", "--mpp", 0.5)
    assert_refused(outcome, tmp_path, before, bad.name, said)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "LA", "1"])
def test_image_of_another_kind_is_converted(
    mode: str, trained: Path, image: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    original = PillowImage.open(image)
    path, out = tmp_path / "other.png", tmp_path / "out"
    if mode == "I;16":
        PillowImage.fromarray(np.asarray(original.convert("L")).astype(np.uint16)).save(path)
    else:
        original.convert(mode).save(path)
    outcome = celltyper_command("infer", path, "-m", trained, "-o", out, "--mpp", 0.5)
    assert outcome.code == 0, outcome
    assert json.loads((out / "infer.json").read_text())["images"][0]["width"] == 96


@pytest.mark.parametrize("shape", [(20, 30), (1, 1), (300, 3)])
def test_image_smaller_than_a_tile_works(
    shape: tuple[int, int], trained: Path, image: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    small, out = tmp_path / "small.png", tmp_path / "out"
    PillowImage.open(image).resize(shape).save(small)
    code, _, err = celltyper_command("infer", small, "-m", trained, "-o", out, "--mpp", 0.5)
    assert (code, err) == (0, "")
    with np.load(out / "labels.npz") as arrays:
        assert arrays["inst"].shape == shape[::-1]


def test_one_bad_image_of_several_is_named_and_the_others_are_done(
    trained: Path, image: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    bad, out = text_as_png(image, tmp_path / "bad.png"), tmp_path / "out"
    words = ("infer", bad, image, "-m", trained, "-o", out, "--mpp", 0.5)
    code, _, err = celltyper_command(*words)
    assert code == 2
    assert_one_line(err, "1 of 2 images failed", bad, out / "infer.json", "the other 1 are done")
    facts = json.loads((out / "infer.json").read_text())
    assert [f["image"] for f in facts["failed"]] == [str(bad)]
    assert [i["name"] for i in facts["images"]] == ["test5"]
    assert {p.name for p in out.iterdir()} == {"cells.parquet", "infer.json", "test5"}


def test_earlier_results_survive_a_bad_image(
    trained: Path, image: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    bad, out = text_as_png(image, tmp_path / "bad.png"), tmp_path / "out"
    options = ("-m", trained, "-o", out, "--mpp", 0.5, "--overwrite")
    assert celltyper_command("infer", image, *options).code == 0
    before = content(tmp_path)
    assert_refused(celltyper_command("infer", bad, *options), tmp_path, before, bad)


def test_two_images_of_one_name(
    trained: Path, image: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    twin = tmp_path / "test5.tif"
    tifffile.imwrite(twin, np.asarray(PillowImage.open(image)))
    before = content(tmp_path)
    outcome = celltyper_command(
        "infer", image, twin, "-m", trained, "-o", tmp_path / "out", "--mpp", 0.5
    )
    assert_refused(outcome, tmp_path, before, image, twin, "same name 'test5'; rename one")


# ---------------------------------------------------------------- no cells


def test_no_cells_is_a_valid_result(
    tiny: Tiny, made_data: Path, data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    """Empty table with all columns, empty collection, and an evaluation without a division."""
    config = tiny(made_data, "train.steps=2", "instances.options={min_area: 1000000}")
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    out, white = tmp_path / "out", tmp_path / "white.png"
    PillowImage.new("RGB", (80, 70), "white").save(white)
    assert celltyper_command("infer", white, "-m", run, "-o", out, "--mpp", 0.5).code == 0
    cells = pq.read_table(out / "cells.parquet")
    columns = ["image", "cell_id", "x", "y", "area_um2", "area_px", "phenotype", "probability"]
    columns += [*Morphology._fields, "p_background", "p_blue", "p_brown"]
    assert cells.num_rows == 0
    assert cells.column_names == [*columns, "outline"]
    rows = (out / "cells.csv").read_text().splitlines()
    assert [name.strip('"') for name in rows[0].split(",")] == columns
    assert len(rows) == 1
    collection = json.loads((out / "cells.geojson").read_text())
    assert collection == {"type": "FeatureCollection", "features": []}
    with PillowImage.open(out / "overlay.png") as overlay:
        assert overlay.width >= 80

    outcome = celltyper_command("eval", run, data / "test", "--resamples", 20)
    assert outcome.code == 0, outcome
    scores = json.loads((run / "eval" / "metrics.json").read_text())["scores"]
    assert scores["detection_f1"]["value"] == scores["bpq"]["value"] == 0

    for labels in (data / "test" / "labels").iterdir():
        zero = np.zeros((96, 96), np.int32)
        np.savez(labels, inst=zero, type=zero)
    nothing = tmp_path / "nothing"
    outcome = celltyper_command("eval", run, data / "test", "-o", nothing, "--resamples", 20)
    assert outcome.code == 0, outcome
    metrics = json.loads((nothing / "metrics.json").read_text())
    assert metrics["scores"]["detection_f1"]["value"] is None
    assert np.sum(metrics["confusion_end_to_end"]) == 0
    report = (nothing / "report.html").read_text()
    assert "not annotated in these images: blue, brown" in report


# ---------------------------------------------------------------- labels


def spoil(part: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Rewrite the first labels of a dataset."""
    path = min((part / "labels").iterdir())
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez(path, **arrays)
    return path


def other_size(arrays: dict[str, Any]) -> None:
    for name in ("inst", "type"):
        arrays[name] = arrays[name][:90]


def unknown_type(arrays: dict[str, Any]) -> None:
    arrays["type"][arrays["inst"] == 3] = 9


def no_type(arrays: dict[str, Any]) -> None:
    arrays["type"][arrays["inst"] == 3] = 0


def two_types(arrays: dict[str, Any]) -> None:
    rows, cols = np.nonzero(arrays["inst"] == 3)
    arrays["type"][rows[0], cols[0]] = 3 - arrays["type"][rows[0], cols[0]]


def negative(arrays: dict[str, Any]) -> None:
    arrays["inst"][0, 0] = -1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_size, "labels are (90, 96), but the image"),
        (unknown_type, "label 3 has type 9; classes are 1..2 (blue, brown)"),
        (no_type, "label 3 has type 0 (background); classes are 1..2 (blue, brown)"),
        (two_types, "label 3 has two types"),
        (negative, "label ids must lie in 0..16777215, got -1"),
        (lambda arrays: arrays.pop("inst"), "no array 'inst' in it"),
        (lambda arrays: arrays.pop("type"), "no 'type' in it, but meta.json lists 2 classes"),
    ],
)
def test_wrong_labels(
    change: Callable[[dict[str, Any]], None],
    said: str,
    recipe: Path,
    trained: Path,
    data: Path,
    tmp_path: Path,
    celltyper_command: Run,
) -> None:
    for part in ("train", "val", "test"):
        path = spoil(data / part, change)
        before = content(tmp_path)
        command = (
            ("eval", trained, data / part, "-o", tmp_path / "out")
            if part == "test"
            else ("train", recipe, "-o", tmp_path / "out", "--set", f"data.root={data}")
        )
        assert_refused(celltyper_command(*command), tmp_path, before, path, said)
        shutil.rmtree(data / part)
        shutil.copytree(recipe_data(recipe) / part, data / part)


def recipe_data(recipe: Path) -> Path:
    from celltyper.config import load_config

    root = load_config(recipe).data.root
    assert root is not None
    return root


def test_data_that_are_not_there(
    recipe: Path, trained: Path, data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    (data / "test" / "labels" / "test5.npz").unlink()
    (data / "val" / "meta.json").write_text("{")
    before = content(tmp_path)
    out = ("-o", tmp_path / "out")
    for command, *said in (
        (("eval", trained, tmp_path / "none", *out), tmp_path / "none", "no such folder"),
        (("eval", trained, data, *out), data, "layout not recognised: found 'test/'"),
        (("data", "info", data / "test" / "meta.json"), "meta.json: a file; give the folder"),
        (("eval", trained, data / "test", *out), "no file in labels/ for the images", "test5"),
        (("train", recipe, *out, "--set", f"data.root={data}"), "meta.json"),
        (("train", "unetr", *out), "data.root is not set"),
    ):
        assert_refused(celltyper_command(*command), tmp_path, before, *said)


# ---------------------------------------------------------------- config and options


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lrr=1", "train.lrr: unknown key 'lrr'; did you mean 'lr'?"),
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
        ("train.lr=-1", "train.lr: input should be greater than 0, got -1"),
        ("train.lr=fast", "train.lr: input should be a valid number"),
        ("train.lr", "expected section.key=value"),
        ("train=3", "train: "),
        ("seed.x=3", "'seed' is a value, not a section"),
        ("encoder.name=unni", "unknown encoder 'unni'; did you mean 'uni'?"),
        ("encoder.name=timm/vit_huge", "timm has no model 'vit_huge'"),
        ("encoder.weights=none.safetensors", "none.safetensors does not exist"),
        ("encoder.options={depht: 3}", "depht"),
        ("decoder.name=unter", "unknown decoder 'unter'; did you mean 'unetr'?"),
        ("decoder.name=no_such_package:Decoder", "no_such_package"),
        ("decoder.options={widht: 8}", "unknown option of decoder 'linear' 'widht'"),
        ("instances.method=hw", "unknown instance method 'hw' (known: centers, distance, hv)"),
        ("instances.options={treshold: 1}", "did you mean 'threshold'?"),
        ("loss.class_weights=efective", "loss.class_weights: input should be 'none'"),
        ("train.metric=f2", "train.metric 'f2' is unknown: macro_f1"),
        ("data.tile=8", "data.tile: input should be greater than or equal to 32"),
    ],
)
def test_wrong_config(
    override: str, said: str, recipe: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    outcome = celltyper_command("train", recipe, "-o", tmp_path / "run", "--set", override)
    assert_refused(outcome, tmp_path, {}, said)


def test_wrong_recipe(tmp_path: Path, celltyper_command: Run) -> None:
    broken, listed = tmp_path / "broken.yaml", tmp_path / "list.yaml"
    broken.write_text("train: {lr: [1\n")
    listed.write_text("- train\n")
    before = content(tmp_path)
    for config, *said in (
        ("unter", "unknown recipe 'unter'; did you mean 'unetr'?"),
        (tmp_path / "none.yaml", "none.yaml does not exist; those that come along:"),
        (broken, broken, "cannot be read as YAML"),
        (listed, "must hold sections such as 'encoder:'"),
    ):
        outcome = celltyper_command("train", config, "-o", tmp_path / "run")
        assert_refused(outcome, tmp_path, before, *said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mpp", "0"), "mpp must lie in [0.01, 100] micrometres per pixel, got 0.0"),
        (("--mpp", "-0.5"), "mpp must lie in [0.01, 100] micrometres per pixel, got -0.5"),
        (("--mpp", "nan"), "mpp must lie in [0.01, 100] micrometres per pixel, got nan"),
        (("--mpp", "inf"), "mpp must lie in [0.01, 100] micrometres per pixel, got inf"),
        (("--mpp", "half"), "'half' is not a valid float (see celltyper infer --help)"),
        ((), "no resolution and the model works at 0.5 micrometres per pixel: pass --mpp"),
        (("--batch-size", "0"), "'--batch-size': 0 is not in the range x>=1"),
        (("--device", "cuda:9"), "device 'cuda:9' is not available here"),
        (("--device", "gpu"), "device 'gpu' is not available here"),
        (("--precision", "fp8"), "'fp8' is not one of 'fp32', 'bf16', 'fp16'"),
        (("--precison", "fp16"), "--precison"),
        (("-m", "nowhere"), "no model at nowhere: give a folder"),
        (("--weights",), "requires an argument"),
    ],
)
def test_wrong_options_of_infer(
    options: tuple[str, ...],
    said: str,
    trained: Path,
    image: Path,
    tmp_path: Path,
    celltyper_command: Run,
) -> None:
    words = ("infer", image, "-m", trained, "-o", tmp_path / "out", *options)
    assert_refused(celltyper_command(*words), tmp_path, {}, said)


def test_wrong_options_of_eval(
    trained: Path, made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    ref = made_data / "test"
    for words in ((), (trained,), (trained, ref, "--ref", ref), ("--pred", ref), ("--ref", ref)):
        outcome = celltyper_command("eval", *words, "-o", tmp_path / "out")
        assert_refused(outcome, tmp_path, {}, "give RUN and DATA, or --pred and --ref")
    outcome = celltyper_command("eval", trained, ref, "-o", tmp_path / "out", "--mpp", 0)
    assert_refused(outcome, tmp_path, {}, "mpp must lie in [0.01, 100]")


def test_predictions_that_do_not_fit_the_annotations(
    trained: Path, image: Path, data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    out, test = tmp_path / "out", data / "test"
    assert celltyper_command("infer", image, "-m", trained, "-o", out, "--mpp", 0.5).code == 0
    words = ("eval", "--pred", out, "--ref", test, "-o", tmp_path / "eval")

    def refused(*said: object) -> None:
        before = content(tmp_path)
        assert_refused(celltyper_command(*words), tmp_path, before, *said)

    refused("no prediction for image 'test6' (there are: test5)")
    for name in ("images/test6.png", "labels/test6.npz"):
        (test / name).unlink()
    meta = json.loads((test / "meta.json").read_text())
    meta["groups"].pop("test6")
    (test / "meta.json").write_text(json.dumps(meta | {"classes": ["brown", "blue"]}))
    refused("predictions have classes blue, brown", "has brown, blue")
    (test / "meta.json").write_text(json.dumps(meta))
    small = PillowImage.open(test / "images" / "test5.png").crop((0, 0, 90, 90))
    small.save(test / "images" / "test5.png")
    spoil(test, lambda a: a.update(inst=a["inst"][:90, :90], type=a["type"][:90, :90]))
    refused("test5", "(96, 96)", "(90, 90)")
    (out / "labels.npz").write_bytes((out / "labels.npz").read_bytes()[:500])
    refused(out / "labels.npz", "run infer again")
    for text in ("{", "[]", "{}"):
        (out / "infer.json").write_text(text)
        refused(out / "infer.json", "run infer again")


# ---------------------------------------------------------------- folders


def test_output_that_is_a_file_or_below_one(
    recipe: Path,
    trained: Path,
    image: Path,
    made_data: Path,
    tmp_path: Path,
    celltyper_command: Run,
) -> None:
    file = tmp_path / "thesis.tex"
    file.write_text("mine")
    before = content(tmp_path)
    for output in (file, file / "below"):
        for words in (
            ("train", recipe, "--device", "cpu"),
            ("infer", image, "-m", trained, "--mpp", 0.5),
            ("eval", trained, made_data / "test", "--resamples", 0),
            ("demo", "--data", made_data),
        ):
            outcome = celltyper_command(*words, "-o", output)
            assert_refused(outcome, tmp_path, before, file)


def test_folder_that_holds_something_else(
    recipe: Path, made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    before = content(tmp_path)
    for words in (("train", recipe), ("demo", "--data", made_data)):
        for more in ((), ("--overwrite",)):
            outcome = celltyper_command(*words, "-o", tmp_path, *more)
            assert_refused(outcome, tmp_path, before, tmp_path, "holds other files; give an empty")


def test_folder_that_may_not_be_written(
    recipe: Path,
    trained: Path,
    image: Path,
    made_data: Path,
    tmp_path: Path,
    celltyper_command: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system refuses new files there; root may write anywhere, so it is made to refuse."""
    locked, opened = tmp_path / "locked", os.open

    def refuses(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(locked)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *rest, **named)

    locked.mkdir()
    before = content(tmp_path)
    monkeypatch.setattr(celltyper.atomic.os, "open", refuses)
    for words in (
        ("train", recipe, "--device", "cpu"),
        ("infer", image, "-m", trained, "--mpp", 0.5),
        ("eval", trained, made_data / "test", "--resamples", 0),
        ("demo", "--data", made_data),
    ):
        outcome = celltyper_command(*words, "-o", locked)
        assert_refused(outcome, tmp_path, before, locked, "not writable", "choose another folder")


# ---------------------------------------------------------------- full disk, interruption


def assert_nothing_half_written(folder: Path) -> None:
    assert not [p for p in folder.rglob("*") if "tmp" in p.name or p.name.startswith(".")]


@pytest.mark.parametrize(
    "name",
    ["labels.npz", "overlay.png", "cells.geojson", "cells.csv", "cells.parquet", "infer.json"],
)
def test_disk_that_fills_up_during_infer(
    name: str,
    trained: Path,
    image: Path,
    tmp_path: Path,
    celltyper_command: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flush, out = celltyper.atomic.flush, tmp_path / "out"

    def full(path: Path) -> None:
        if path.name.endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    words = ("infer", image, "-m", trained, "-o", out, "--mpp", 0.5)
    monkeypatch.setattr(celltyper.atomic, "flush", full)
    code, said, err = celltyper_command(*words)
    assert (code, said) == (1, "")
    assert_one_line(err, f"cannot write {name}: the disk of folder {out} is full; free space")
    assert_nothing_half_written(out)
    assert not (out / name).exists()
    assert not (out / "infer.json").exists()
    monkeypatch.setattr(celltyper.atomic, "flush", flush)
    assert celltyper_command(*words).code == 0


@pytest.mark.parametrize("which", [0, 1, 2])
def test_disk_that_fills_up_at_one_of_several_images(
    which: int,
    trained: Path,
    image: Path,
    tmp_path: Path,
    celltyper_command: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flush, out, folder = celltyper.atomic.flush, tmp_path / "out", tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        shutil.copy(image, folder / f"{name}.png")

    def full(path: Path) -> None:
        if path.parent == out / "abc"[which]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    monkeypatch.setattr(celltyper.atomic, "flush", full)
    code, said, err = celltyper_command("infer", folder, "-m", trained, "-o", out, "--mpp", 0.5)
    assert (code, said) == (1, "")
    assert_one_line(err, f"the disk of folder {out / 'abc'[which]} is full; free space")
    assert_nothing_half_written(out)
    # those before are whole, there is no index, and no image after it was begun
    assert [(out / name / "cells.parquet").exists() for name in "abc"] == [
        i < which for i in range(3)
    ]
    assert not (out / "infer.json").exists()


def stops_in_step(number: int, error: BaseException) -> Callable[..., Any]:
    step, calls = celltyper.loop.objective, {"n": 0}

    def objective(*args: Any, **named: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == number:
            raise error
        return step(*args, **named)

    return objective


def test_interrupted_training_says_how_to_go_on_and_a_full_disk_keeps_the_checkpoint(
    recipe: Path, tmp_path: Path, celltyper_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    run = tmp_path / "my run"
    words = ("train", recipe, "-o", run, "--set", "seed=3")
    monkeypatch.setattr(celltyper.loop, "objective", stops_in_step(3, KeyboardInterrupt()))
    code, said, err = celltyper_command(*words)
    monkeypatch.undo()
    assert (code, said) == (130, "")
    assert_one_line(
        err, f"stopped; go on with: celltyper train {recipe} -o '{run}' --set seed=3 --resume"
    )
    assert read_tensors(run / "last.safetensors")[1]["progress"]["step"] == 2
    assert_nothing_half_written(run)

    before = content(run)
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system itself refuses to write beyond 20 kB, in the middle of a checkpoint.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, kept[1]))
    try:
        code, said, err = celltyper_command(*words, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert (code, said) == (1, "")
    assert_one_line(err, ".safetensors: the disk of folder", str(run), "is full; free space")
    assert_nothing_half_written(run)
    after = content(run)
    for name in ("last.safetensors", "model.safetensors", "config.yaml"):
        assert after[name] == before[name], name

    code, said, _ = celltyper_command(*words, "--resume")
    assert (code, said) == (0, f"run: {run}\n")


def test_interrupted_before_anything_was_written(
    recipe: Path, tmp_path: Path, celltyper_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(celltyper.training, "build_model", stop)
    code, _, err = celltyper_command("train", recipe, "-o", tmp_path / "run")
    assert (code, err.strip()) == (130, "celltyper: stopped")
    assert content(tmp_path) == {}


def test_loss_that_is_not_finite_is_a_failure(
    recipe: Path, tmp_path: Path, celltyper_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = celltyper.loop.objective
    monkeypatch.setattr(celltyper.loop, "objective", lambda *a, **k: step(*a, **k) * float("nan"))
    code, _, err = celltyper_command("train", recipe, "-o", tmp_path / "run")
    assert code == 1
    assert_one_line(err, "loss is nan at step 1; lower train.lr (now 0.0003)")


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("shape", "does not fit the model: "),
        ("missing", "is missing"),
        ("left over", "encoder.extra is left over"),
        ("elsewhere", "is damaged or was not written by celltyper"),
        ("truncated", "is damaged or was not written by celltyper"),
        ("text", "is damaged or was not written by celltyper"),
        ("last", "is not a celltyper model"),
        ("format", "has checkpoint format 99, this celltyper reads 1"),
        ("encoder", "does not fit the model: "),
    ],
)
def test_checkpoint_that_does_not_fit(
    kind: str,
    said: str,
    trained: Path,
    image: Path,
    tmp_path: Path,
    celltyper_command: Run,
) -> None:
    file = tmp_path / "model.safetensors"
    tensors, header = read_tensors(trained / "model.safetensors")
    name = min(k for k in tensors if k.startswith("decoder.") and tensors[k].ndim > 1)
    if kind == "shape":
        tensors[name] = tensors[name][:-1]
    elif kind == "missing":
        del tensors[name]
    elif kind == "left over":
        tensors["encoder.extra"] = tensors[name]
    elif kind == "format":
        header["format"] = 99
    elif kind == "encoder":
        header["config"]["encoder"]["name"] = "vit_small_patch14_dinov2"
    write_tensors(file, tensors, header)
    if kind == "elsewhere":
        save_file(load_file(file), file)
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "text":
        file.write_text("weights")
    elif kind == "last":
        file = trained / "last.safetensors"
    before = content(tmp_path)
    outcome = celltyper_command("infer", image, "-m", file, "-o", tmp_path / "out", "--mpp", 0.5)
    assert_refused(outcome, tmp_path, before, file, said)


def test_resuming_from_a_truncated_checkpoint(
    recipe: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    run = tmp_path / "run"
    words = ("train", recipe, "-o", run, "--set", "train.steps=2")
    assert celltyper_command(*words).code == 0
    last = run / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    before = content(tmp_path)
    outcome = celltyper_command(*words, "--resume")
    assert_refused(outcome, tmp_path, before, last, "is damaged", "--overwrite")
    assert celltyper_command(*words, "--overwrite").code == 0
