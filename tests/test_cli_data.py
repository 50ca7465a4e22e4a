"""``celltyper data prepare | check | info`` as a user types them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from celltyper.config import Config, dump_config
from celltyper.datasets import store
from celltyper.parts import divide
from celltyper.readers import open_dataset
from celltyper.training import train

Run = Callable[..., Any]


@pytest.mark.parametrize("command", ["", "prepare", "check", "info"])
def test_help_fits_a_terminal(command: str, celltyper_command: Run) -> None:
    code, out, err = celltyper_command("data", *command.split(), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) < 80
    assert "..." not in out.replace("SRC...", "").replace("[ARGS]...", "")
    assert "\\b" not in out


def test_prepare_makes_one_store_of_several_folders(
    made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    out = tmp_path / "cells.zarr"
    code, said, err = celltyper_command(
        "data", "prepare", made_data / "train", made_data / "test", "-o", out, "--mpp", "0.4"
    )
    assert (code, said) == (0, f"store: {out}\n"), err
    data = open_dataset(out)
    assert data.names == ("train1", "train2", "train3", "test5", "test6")
    assert data.mpp == data["test5"].mpp == 0.4
    source = open_dataset(made_data / "test")["test6"]
    np.testing.assert_array_equal(data["test6"].labels, source.labels)
    np.testing.assert_array_equal(data["test6"].image, source.image)
    again = ("data", "prepare", made_data / "val", "-o", out, "-q")
    code, said, err = celltyper_command(*again)
    assert (code, said) == (2, "")
    assert "exists; pass --overwrite" in err
    assert celltyper_command(*again, "--overwrite") == (0, "", "")
    assert open_dataset(out).names == ("val4",)


def test_prepare_says_how_to_go_on(
    made_data: Path, tmp_path: Path, celltyper_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_write_sample", interrupt)
    out = tmp_path / "s.zarr"
    code, _, err = celltyper_command("data", "prepare", made_data / "val", "-o", out)
    assert code == 130
    assert "the same command goes on where it was" in err
    assert not out.exists()


def test_parts_are_splits_and_a_taxonomy_merges_classes(
    made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    rules = tmp_path / "t.yaml"
    rules.write_text("classes: {cell: [blue, brown], mitosis: []}")
    out = tmp_path / "s.zarr"
    code, _, err = celltyper_command(
        "data", "prepare", made_data, "-o", out, "--taxonomy", rules, "-q"
    )
    assert code == 0, err
    data = open_dataset(out)
    assert data.splits["val"] == ("val4",)
    assert data.classes == ("cell", "mitosis")
    assert data["val4"].unannotated == (2,)
    assert set(data["val4"].phenotypes) == {0, 1}
    code, said, _ = celltyper_command("data", "info", out)
    assert code == 0
    lines = [line.split() for line in said.splitlines()]
    assert ["layout", "store"] in lines
    assert ["not", "annotated", "mitosis", "(in", "6", "of", "6", "images)"] in lines
    assert ["class", "train", "val", "test"] in lines
    rules.write_text("classes: {cell: [blue]}")
    code, _, err = celltyper_command("data", "info", made_data / "val", "--taxonomy", rules)
    assert code == 2
    assert "says nothing of 'brown'" in err


def test_check_exits_with_2_for_errors_only(
    made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    code, said, err = celltyper_command("data", "check", made_data)
    assert (code, err) == (0, "")
    assert said.endswith("no errors, no warnings\n")
    assert "layout  folder\n" in said
    broken = shutil.copytree(made_data, tmp_path / "broken")
    meta = json.loads((broken / "val" / "meta.json").read_text())
    meta["groups"]["val4"] = "train1"
    (broken / "val" / "meta.json").write_text(json.dumps(meta))
    file = broken / "test" / "labels" / "test5.npz"
    file.write_bytes(file.read_bytes()[:100])
    code, said, err = celltyper_command("data", "check", broken)
    assert (code, err) == (2, "")
    assert said.startswith("error: unreadable (1): these images cannot be used\n    test5:\n")
    assert "    group 'train1' in train and val\n" in said
    assert said.endswith("2 errors, no warnings\n")
    code, said, err = celltyper_command("data", "check", tmp_path)
    assert (code, said) == (2, "")
    assert "layout not recognised" in err


def test_a_warning_of_a_reader_is_shown_once(
    tmp_path: Path, celltyper_command: Run, tiny: Callable[..., Config]
) -> None:
    """Training and validation read an image many times; points too near others are named once."""
    rng = np.random.default_rng(0)
    for name in "abc":
        image = rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)
        PillowImage.fromarray(image).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.csv").write_text("x,y,class\n30,30,t\n30,30,t\n9,9,u\n")
    (tmp_path / "meta.json").write_text('{"mpp": 0.5}')
    recipe = tmp_path / "c.yaml"
    recipe.write_text(dump_config(tiny(tmp_path, "data.val_fraction=0.3")))
    out = tmp_path / "run"
    code, _, err = celltyper_command("train", recipe, "-o", out, "--device", "cpu")
    assert code == 0
    for name in "abc":
        assert err.count(f"{name}.csv: 1 of 3 points have no pixel") == 1


def test_training_takes_a_store_and_a_taxonomy(
    made_data: Path, tmp_path: Path, tiny: Callable[..., Config], celltyper_command: Run
) -> None:
    """Brown cells are not annotated in the first source, and all trains the same model."""
    (tmp_path / "blue.yaml").write_text("{classes: {blue: [blue], brown: []}, drop: [brown]}")
    for part, more in (("train", ("--taxonomy", tmp_path / "blue.yaml")), ("val", ())):
        command = ("data", "prepare", made_data / part, "-o", tmp_path / "d" / part, "-q")
        assert celltyper_command(*command, *more).code == 0
    config = tiny(tmp_path / "d", "loss.focal=1")
    rest, held_out, _ = divide(config.data, seed=0)
    assert rest["train1"].unannotated == (2,)
    assert held_out["val4"].unannotated == ()
    run = train(config, tmp_path / "run", progress=False)
    assert "blue" in (run / "run.json").read_text()
    merged = tmp_path / "merged.yaml"
    merged.write_text("classes: {cell: [blue, brown]}")
    config = tiny(made_data, f"data.taxonomy={merged}")
    assert divide(config.data, seed=0).train.classes == ("cell",)


def test_a_run_on_merged_classes_is_scored_on_merged_classes(
    tmp_path: Path, made_data: Path, celltyper_command: Run
) -> None:
    merged = tmp_path / "merged.yaml"
    merged.write_text("classes: {cell: [blue, brown]}\n")
    settings = ["data.tile=64", "train.steps=1", "train.batch_size=2", "train.warmup=1"]
    settings += ["infer.overlap=16", "encoder.name=vit_tiny_patch16", "encoder.weights=twin"]
    settings += [f"data.root={made_data}", f"data.taxonomy={merged}"]
    words = [word for setting in settings for word in ("--set", setting)]
    run = tmp_path / "run"
    trained = celltyper_command("train", "linear", "-o", run, *words)
    assert trained.code == 0, trained.err
    plain = celltyper_command("eval", run, made_data / "test", "--resamples", 0)
    assert plain.code == 2
    assert "--taxonomy merges and renames classes" in plain.err
    words = ["--resamples", 0, "--taxonomy", merged]
    scored = celltyper_command("eval", run, made_data / "test", *words)
    assert scored.code == 0, scored.err
    assert "cell " in scored.out
    assert "blue" not in scored.out
