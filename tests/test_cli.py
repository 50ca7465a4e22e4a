"""The commands as a user types them: what they print, write and return."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image as PillowImage

import celltyper.demo
from celltyper.__main__ import cli, main
from celltyper.config import Config, dump_config, load_config, parse_config
from celltyper.datasets import write_folder
from celltyper.library.shelf import find_model
from celltyper.training import train

Tiny = Callable[..., Config]

OF_ONE_IMAGE = {
    "cells.parquet",
    "cells.csv",
    "cells.geojson",
    "labels.npz",
    "overlay.png",
}
ENOUGH_TO_FIND_CELLS = (
    "instances.method=distance",
    "train.steps=60",
    "train.lr=0.003",
    "train.validate_every=60",
)
COMMANDS = ("train", "infer", "eval", "report", "benchmark", "demo", "export", "encoders")


Run = Callable[..., Any]
"""What the fixture ``celltyper_command`` gives."""


@pytest.fixture(scope="module")
def recipe(tiny: Tiny, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file of four steps."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(dump_config(tiny(made_data)))
    return path


@pytest.fixture(scope="module")
def trained(tiny: Tiny, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained long enough to find some cells."""
    config = tiny(made_data, *ENOUGH_TO_FIND_CELLS)
    return train(config, tmp_path_factory.mktemp("run"), device="cpu", progress=False)


@pytest.fixture(scope="module")
def image(made_data: Path) -> Path:
    return made_data / "test" / "images" / "test5.png"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def strict_json(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


# ---------------------------------------------------------------- help, encoders, exit codes


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_terminal_and_tells_every_option(command: str, celltyper_command: Run) -> None:
    code, out, err = celltyper_command(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) < 80
    for parameter in cli.commands[command].params if command else cli.params:
        if isinstance(parameter, click.Option):
            assert parameter.help
            assert parameter.opts[-1] in out


def test_exit_codes_of_the_process() -> None:
    """As a shell sees them: no traceback, one line, and 0, 1 or 2."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "celltyper", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = run("--version")
    assert (good.returncode, good.stderr) == (0, "")
    wrong = run("encoders", "show", "unni")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("celltyper: unknown encoder 'unni'; did you mean 'uni'? (known:")
    assert wrong.stderr.count("\n") == 1
    debug = run("--debug", "encoders", "show", "unni")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
    assert "ConfigError: unknown encoder 'unni'" in debug.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("out of memory\n  tried 3 GB"), "out of memory tried 3 GB"),
        (KeyError("a"), "KeyError: 'a'"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_any_failure_is_one_line_and_exit_code_1(
    error: Exception, said: str, celltyper_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: str) -> None:
        raise error

    monkeypatch.setattr("celltyper.encoders.find_card", fails)
    code, out, err = celltyper_command("encoders", "show", "uni")
    assert (code, out) == (1, "")
    assert err == f"celltyper: {said} (celltyper --debug shows where)\n"
    with pytest.raises(type(error)):
        main(["--debug", "encoders", "show", "uni"])


# ---------------------------------------------------------------- train


def test_train_from_a_file_with_overrides(
    recipe: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    run = tmp_path / "run"
    words = ("train", recipe, "-o", run, "--device", "cpu", "--set", "train.lr=0.01")
    code, out, err = celltyper_command(*words, "--set", "seed=7")
    assert (code, out) == (0, f"run: {run}\n")
    assert [line.split("  ")[0] for line in err.splitlines()] == [
        "step 2/4",
        "step 4/4",
        "class probabilities are not calibrated: 12 validation cells are annotated, and "
        "calibration.min_cases is 100",
    ]
    written = load_config(run / "config.yaml")
    assert (written.train.lr, written.seed) == (0.01, 7)
    assert written.train.batch_size == load_config(recipe).train.batch_size


def test_train_never_takes_a_used_folder_without_being_told(
    recipe: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    run = tmp_path / "run"
    words = ("train", recipe, "-o", run, "--device", "cpu", "--quiet", "--set", "train.steps=2")
    assert celltyper_command(*words) == (0, "", "")
    before = {p.name: p.read_bytes() for p in run.iterdir()}

    code, out, err = celltyper_command(*words)
    assert (code, out) == (2, "")
    assert err == (
        f"celltyper: {run} already holds a run; pass --resume to go on with it, --overwrite to "
        "start over, or another folder\n"
    )
    assert celltyper_command(*words, "--resume") == (0, "", "")
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    code, _, err = celltyper_command(*words, "--set", "seed=1", "--resume")
    assert code == 2
    assert "another config (seed: 0 then, 1 now)" in err

    assert celltyper_command(*words, "--set", "seed=1", "--overwrite") == (0, "", "")
    assert load_config(run / "config.yaml").seed == 1
    assert (run / "model.safetensors").read_bytes() != before["model.safetensors"]


# ---------------------------------------------------------------- infer


def test_one_image_goes_straight_into_the_folder(
    trained: Path, image: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    out = tmp_path / "out"
    code, said, _ = celltyper_command("infer", image, "-m", trained, "-o", out, "--mpp", 0.5)
    assert (code, said) == (0, f"cells: {out / 'cells.parquet'}\n")
    assert names(out) == OF_ONE_IMAGE | {"infer.json"}

    table = pq.read_table(out / "cells.parquet")
    assert table.num_rows > 0
    assert set(table["image"].to_pylist()) == {"test5"}
    assert set(table["phenotype"].to_pylist()) <= {"blue", "brown"}
    with np.load(out / "labels.npz") as arrays:
        inst, kind = arrays["inst"], arrays["type"]
        assert arrays["prob"].shape == (3, 96, 96)
    ids, areas = np.unique(inst[inst > 0], return_counts=True)
    assert table["cell_id"].to_pylist() == ids.tolist()
    assert table["area_px"].to_pylist() == areas.tolist()
    assert table["area_um2"].to_pylist() == pytest.approx((areas / 4).tolist())
    kinds = [("blue", "brown")[int(kind[inst == i][0]) - 1] for i in ids]
    assert table["phenotype"].to_pylist() == kinds

    features = strict_json(out / "cells.geojson")["features"]
    assert len(features) == table.num_rows
    assert [f["properties"]["classification"]["name"] for f in features] == kinds

    with (out / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [c for c in table.column_names if c != "outline"]
    for column in ("image", "phenotype"):
        assert [row[column] for row in rows] == table[column].to_pylist()
    for column in ("cell_id", "x", "y", "area_um2", "area_px", "probability", "p_blue"):
        values = [float(row[column]) for row in rows]
        assert values == pytest.approx(table[column].to_pylist(), rel=1e-6)

    facts = strict_json(out / "infer.json")
    assert facts["classes"] == ["blue", "brown"]
    assert facts["failed"] == []
    assert [(i["name"], i["cells"], i["mpp"]) for i in facts["images"]] == [
        ("test5", table.num_rows, 0.5)
    ]


def test_folder_of_images_goes_into_one_folder_each_and_a_joint_table(
    trained: Path, made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    out = tmp_path / "out"
    images = made_data / "test" / "images"
    words = ("infer", images, "-m", trained, "-o", out, "--mpp", 0.5, "--quiet")
    assert celltyper_command(*words) == (0, "", "")
    assert names(out) == {"cells.parquet", "infer.json", "test5", "test6"}
    joint = pq.read_table(out / "cells.parquet").to_pylist()
    apart = []
    for name in ("test5", "test6"):
        assert names(out / name) == OF_ONE_IMAGE
        apart += pq.read_table(out / name / "cells.parquet").to_pylist()
    assert joint == apart
    assert {row["image"] for row in joint} == {"test5", "test6"}

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    code, _, err = celltyper_command(*words)
    assert code == 2
    assert err == (
        f"celltyper: {out} already holds results of infer; pass --overwrite or another folder\n"
    )
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert celltyper_command(*words, "--overwrite", "--batch-size", 1)[0] == 0
    again = pq.read_table(out / "cells.parquet").to_pylist()
    assert [row["cell_id"] for row in again] == [row["cell_id"] for row in joint]


def test_png_tiff_and_jpeg_of_one_image_give_its_cells(
    trained: Path, image: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    pixels = np.asarray(PillowImage.open(image))
    files = [image, tmp_path / "t.tif", tmp_path / "j.jpg"]
    tifffile.imwrite(files[1], pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER")
    PillowImage.fromarray(pixels).save(files[2], quality=95)
    found = {}
    for file in files:
        out = tmp_path / f"out-{file.suffix[1:]}"
        # The TIFF states 20,000 pixels per centimetre, 0.5 micrometres per pixel.
        mpp = () if file.suffix == ".tif" else ("--mpp", 0.5)
        assert celltyper_command("infer", file, "-m", trained, "-o", out, *mpp)[0] == 0
        found[file.suffix] = pq.read_table(out / "cells.parquet").drop_columns("image")
    assert found[".png"].num_rows > 0
    assert found[".tif"].equals(found[".png"])
    assert found[".jpg"].num_rows == pytest.approx(found[".png"].num_rows, abs=2)


def test_image_of_another_resolution_gets_cells_in_its_own_pixels(
    trained: Path, image: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    large = tmp_path / "large.png"
    original = PillowImage.open(image)
    original.resize((192, 192), PillowImage.Resampling.BICUBIC).save(large)
    tables = {}
    for file, mpp in ((image, 0.5), (large, 0.25)):
        out = tmp_path / f"out-{file.stem}"
        assert celltyper_command("infer", file, "-m", trained, "-o", out, "--mpp", mpp)[0] == 0
        tables[file.stem] = pq.read_table(out / "cells.parquet")
    with np.load(tmp_path / "out-large" / "labels.npz") as arrays:
        assert arrays["inst"].shape == (192, 192)
        assert arrays["prob"].shape == (3, 192, 192)
    small, big = tables["test5"], tables["large"]
    assert big.num_rows == pytest.approx(small.num_rows, abs=2)
    # The same tissue: equal areas in square micrometres, four times as many pixels.
    area = sum(small["area_um2"].to_pylist())
    assert sum(big["area_um2"].to_pylist()) == pytest.approx(area, rel=0.1)
    assert sum(big["area_px"].to_pylist()) == pytest.approx(16 * area, rel=0.1)
    for axis in ("x", "y"):
        near = [min(abs(v / 2 - w) for w in small[axis].to_pylist()) for v in big[axis].to_pylist()]
        assert np.median(near) < 1


# ---------------------------------------------------------------- eval


def test_evaluating_a_run_equals_evaluating_its_results(
    trained: Path, made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    data, out, scored = made_data / "test", tmp_path / "out", tmp_path / "eval"
    code, said, _ = celltyper_command(
        "eval", trained, data, "-o", scored, "--resamples", 20, "--device", "cpu"
    )
    assert code == 0
    assert names(scored) == {"metrics.json", "per_class.csv", "per_image.csv", "report.html"}
    assert said.splitlines()[-1] == f"report: {scored / 'report.html'}"
    table = said.splitlines()[:-1]
    assert max(map(len, table)) <= 80
    assert any(line.startswith("macro_f1 ") for line in table)
    assert any(line.startswith("detection_f1 ") for line in table)

    assert celltyper_command("infer", data, "-m", trained, "-o", out, "--mpp", 0.5)[0] == 0
    words = ("eval", "--pred", out, "--ref", data, "--resamples", 20, "--quiet")
    assert celltyper_command(*words) == (0, "", "")
    ours, theirs = (strict_json(folder / "metrics.json") for folder in (scored, out))
    assert 0 < ours["scores"]["detection_f1"]["value"] < 1
    # Probabilities of results on disk are 255ths: only what is computed from them may differ.
    error = "expected_calibration_error"
    assert theirs.pop(error) == pytest.approx(ours.pop(error), abs=2 / 255)
    for result in (ours, theirs):
        assert 0 <= result["scores"].pop("macro_f1")["value"] <= 1
        result.pop("confusion_reference_rule")
        for row in result["per_class"].values():
            row.pop("f1")
    assert ours == theirs

    code, _, err = celltyper_command(*words)
    assert code == 2
    assert "already holds an evaluation; pass --overwrite or another folder with -o" in err
    assert celltyper_command(*words, "--overwrite") == (0, "", "")


def test_labels_of_another_program_score_one_against_themselves(
    made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    pred, ref = tmp_path / "theirs", made_data / "test"
    shutil.copytree(ref, pred)
    code, _, _ = celltyper_command("eval", "--pred", pred, "--ref", ref, "-o", tmp_path / "eval")
    assert code == 0
    metrics = strict_json(tmp_path / "eval" / "metrics.json")
    # Both images have six cells of each class, and R2 needs counts that vary.
    assert metrics["scores"].pop("count_r2")["value"] is None
    for name, score in metrics["scores"].items():
        assert score["value"] == pytest.approx(1), name
    assert metrics["expected_calibration_error"] == pytest.approx(0)
    pairs = np.array(metrics["confusion_end_to_end"])
    assert pairs.sum() == np.trace(pairs) == 24
    assert names(pred) == names(ref)


# ---------------------------------------------------------------- demo


@pytest.fixture
def small_demo(tiny: Tiny, made_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's recipe with the steps of `tiny`, on somewhat larger tiles."""

    def load(source: str, overrides: list[str]) -> Config:
        config = load_config(source, overrides)
        small = tiny(config.data.root, "data.tile=98")  # type: ignore[arg-type]
        sections = {name: getattr(small, name) for name in ("data", "train")}
        return parse_config(config.model_copy(update=sections).model_dump(mode="json"))

    monkeypatch.setattr(celltyper.demo, "load_config", load)


def test_first_command_works_without_model_and_resolution(
    image: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    bare = tmp_path / "bare.png"
    PillowImage.fromarray(np.asarray(PillowImage.open(image))).save(bare)
    code, _, warned = celltyper_command("infer", bare, "-o", tmp_path / "out")
    assert code == 0
    assert (
        "bare states no resolution: taken as 0.25 micrometres per pixel, a 40x scan; say" in warned
    )
    facts = strict_json(tmp_path / "out" / "infer.json")
    assert facts["images"][0]["mpp"] == 0.25
    assert facts["model"] == str(find_model())
    # of many images once
    shutil.copy(bare, tmp_path / "other.png")
    code, _, warned = celltyper_command("infer", bare, tmp_path / "other.png", "-o", tmp_path / "2")
    assert (code, warned.count("resolution"), warned.count("unlike the training")) == (0, 1, 1)
    assert "bare states no resolution: taken, like all others that state none, as 0.25" in warned
    assert celltyper.load_model().classes == ("neoplastic", "inflammatory", "connective")
    # a model that was asked for has its own resolution, and so must the image
    code, _, err = celltyper_command("infer", bare, "-m", "nuclei", "-o", tmp_path / "other")
    assert (code, "pass --mpp" in err) == (2, True)


def test_demo_has_both_models_side_by_side(
    small_demo: None, made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    known = ("neoplastic", "inflammatory", "connective")
    for part in ("train", "val", "test"):
        data = celltyper.open_dataset(made_data / part)
        write_folder(tmp_path / "data" / part, list(data), known, 0.5)
    words = ("--quick", "--data", tmp_path / "data", "-o", tmp_path / "demo", "--device", "cpu")
    code, said, _ = celltyper_command("demo", *words)
    assert code == 0
    assert {"box", "run", "report.html"} <= names(tmp_path / "demo")
    rows = said[said.index("score  ") : said.index("report: ")].splitlines()
    assert rows[0].split() == ["score", "in", "the", "box", "trained", "further"]
    for folder, column in ((tmp_path / "demo" / "box", 1), (tmp_path / "demo", 5)):
        scores = strict_json(folder / "metrics.json")["scores"]
        assert rows[1].split()[0] == "detection_f1"
        assert rows[1].split()[column] == f"{scores['detection_f1']['value']:.3f}"
    assert max(map(len, rows)) <= 80


@pytest.mark.usefixtures("small_demo")
def test_demo_is_the_commands_that_it_prints(
    made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    out = tmp_path / "demo"
    words = ("demo", "--quick", "--data", made_data, "-o", out, "--device", "cpu")
    code, said, _ = celltyper_command(*words)
    assert code == 0
    assert {"run", "cells.parquet", "infer.json", "metrics.json", "report.html"} <= names(out)
    for name in ("test5", "test6"):
        assert names(out / name) == OF_ONE_IMAGE
    assert "data" not in names(out)
    assert said.splitlines()[-1] == f"report: {out / 'report.html'}"

    shown = [shlex.split(line[2:]) for line in said.splitlines() if line.startswith("$ ")]
    assert [line[:2] for line in shown] == [["celltyper", c] for c in ("train", "infer", "eval")]
    for _, command, *arguments in shown:
        cli.commands[command].make_context(command, list(arguments))
    recipe, output, overrides = (
        cli.commands["train"].make_context("train", list(shown[0][2:])).params[key]
        for key in ("config", "output", "overrides")
    )
    assert load_config(recipe, overrides).data.root == made_data
    assert output == out / "run"

    before = strict_json(out / "metrics.json")
    for _, *arguments in shown[1:]:
        assert celltyper_command(*arguments, "--overwrite")[0] == 0
    assert strict_json(out / "metrics.json") == before

    code, _, err = celltyper_command(*words)
    assert code == 2
    assert "already holds a demonstration; pass --overwrite" in err


def test_demo_says_which_part_own_data_lack(
    made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    code, _, err = celltyper_command("demo", "--data", made_data / "test", "-o", tmp_path / "demo")
    assert code == 2
    assert "lacks the folder train" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_decoder_of_the_user_from_yaml_in_a_fresh_process(made_data: Path, tmp_path: Path) -> None:
    examples = Path(__file__).parents[1] / "examples"
    env = os.environ | {"PYTHONPATH": str(examples), "OMP_NUM_THREADS": "1"}
    settings = [f"data.root={made_data}", "encoder.weights=twin", "train.steps=1", "data.tile=64"]
    settings += ["train.batch_size=2", "train.warmup=0", "infer.overlap=16"]
    base = [sys.executable, "-m", "celltyper"]
    train = [*base, "train", str(examples / "custom_decoder.yaml"), "-o", "run", "--device", "cpu"]
    train += [word for s in settings for word in ("--set", s)]
    subprocess.run(train, check=True, cwd=tmp_path, env=env)
    score = [*base, "eval", "run", str(made_data / "test"), "--device", "cpu", "--quiet"]
    refused = subprocess.run(
        score, check=False, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "--allow-code" in refused.stderr
    subprocess.run([*score, "--allow-code"], check=True, cwd=tmp_path, env=env)


def test_images_of_the_training_are_not_scored_unasked(
    celltyper_command: Run, trained: Path, made_data: Path, tmp_path: Path
) -> None:
    command = ("eval", trained, made_data / "train", "-o", tmp_path / "e")
    refused = celltyper_command(*command)
    assert refused.code == 2
    assert "3 of 3 images" in refused.err
    assert not (tmp_path / "e").exists()
    assert celltyper_command(*command, "--allow-seen").code == 0


def test_overwriting_leaves_nothing_of_the_earlier_result(
    celltyper_command: Run, trained: Path, made_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    images = sorted((made_data / "test" / "images").iterdir())
    options = ("-m", trained, "--mpp", "0.5", "--overwrite")
    for some in (images, images[:1], images):
        assert celltyper_command("infer", *some, "-o", out, *options).code == 0
    assert names(out) == {"cells.parquet", "infer.json", "notes.txt", "test5", "test6"}
    assert celltyper_command("infer", images[0], "-o", out, *options).code == 0
    assert {"test5", "test6"}.isdisjoint(names(out))
    into_run = celltyper_command("infer", images[0], "-o", trained, *options)
    assert into_run.code == 2
    assert "holds a run" in into_run.err


def test_model_options_without_a_model_are_refused(celltyper_command: Run) -> None:
    refused = celltyper_command("eval", "--pred", "a", "--ref", "b", "--device", "cuda:9")
    assert refused.code == 2
    assert "--device is for RUN and DATA" in refused.err


def test_demo_without_its_data_leaves_the_earlier_one(
    celltyper_command: Run, tmp_path: Path
) -> None:
    earlier = tmp_path / "demo" / "run" / "model.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"earlier")
    (tmp_path / "demo" / ".celltyper-demo").touch()
    (tmp_path / "empty").mkdir()
    refused = celltyper_command(
        "demo", "-o", tmp_path / "demo", "--overwrite", "--data", tmp_path / "empty"
    )
    assert refused.code == 2
    assert "lacks the folder train" in refused.err
    assert earlier.read_bytes() == b"earlier"
