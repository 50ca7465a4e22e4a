"""Training: exact resume, the trainability contract, and what goes wrong said in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from celltyper.checkpoints import load_model, read_tensors
from celltyper.config import Config, dump_config
from celltyper.datasets import write_folder
from celltyper.errors import CheckpointError, ConfigError, DataError, TrainingError
from celltyper.optim import learning_rate_factor
from celltyper.parts import divide
from celltyper.readers import open_dataset
from celltyper.results import evaluate_run
from celltyper.training import train

Tiny = Callable[..., Config]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_run_folder_holds_what_is_needed_to_know_it(
    tiny: Tiny, made_data: Path, tmp_path: Path
) -> None:
    run = train(tiny(made_data), tmp_path / "run", device="cpu", progress=False)
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        "history.csv",
        "last.safetensors",
        "model.safetensors",
        "run.json",
    }
    facts = json.loads((run / "run.json").read_text())
    assert facts["steps"] == 4
    assert facts["classes"] == ["blue", "brown"]
    assert facts["data"]["val"] == {
        "path": str(made_data / "val"),
        "images": 1,
        "names": ["val4"],
        "groups": ["val4"],
        "cells": {"blue": 6, "brown": 6},
    }
    assert facts["trainability"]["adapt"] == "full"
    assert "encoder" in facts["trainability"]["changed"]
    rows = (run / "history.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,lr,macro_f1,")
    assert [r.split(",")[0] for r in rows[1:]] == ["2", "4"]


class KilledError(Exception):
    """Stands for a process that ends between two steps."""


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.ema=0.9", "train.accumulate=2"),
        ("encoder.adapt=lora", "encoder.lora.dropout=0.5"),
        ("data.val_fraction=0", "train.ema=0.9"),
    ],
)
def test_killed_and_resumed_ends_with_the_same_bytes(
    tiny: Tiny,
    made_data: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = "data.val_fraction=0" in overrides
    config = tiny(made_data / "train" if alone else made_data, *overrides)
    whole = train(config, tmp_path / "whole", device="cpu", progress=False)

    from celltyper import loop

    step = loop.objective
    calls = {"n": 0}

    def dies_in_the_third_step(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls["n"] += 1
        if calls["n"] == 2 * config.train.accumulate + 1:
            raise KilledError
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "objective", dies_in_the_third_step)
    with pytest.raises(KilledError):
        train(config, tmp_path / "killed", device="cpu", progress=False)
    monkeypatch.setattr(loop, "objective", step)
    torch.rand(7)
    killed = train(config, tmp_path / "killed", device="cpu", progress=False, resume=True)
    assert_same(weights(whole), weights(killed))
    ours, theirs = (read_tensors(r / "last.safetensors") for r in (whole, killed))
    assert_same(ours[0], theirs[0])
    assert (whole / "history.csv").read_text() == (killed / "history.csv").read_text()


@pytest.mark.slow
def test_sigkill_at_any_moment(tiny: Tiny, made_data: Path, tmp_path: Path) -> None:
    """A process killed by the system, again and again, still ends with the same weights."""
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny(made_data, "train.steps=60", "train.validate_every=5")))
    command = [sys.executable, "-m", "celltyper", "train", str(config), "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, env=env)
    for delay in (8, 9, 10, 300):
        process = subprocess.Popen([*command, "-o", str(tmp_path / "killed"), "--resume"], env=env)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.1)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("encoder.options={feature_blocks: [0, 1]}",)])
def test_two_processes_save_what_they_trained(
    tiny: Tiny, made_data: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Halves of one batch on two processes end near the whole batch on one, and resume."""
    settings = ("train.ema=0.5", "train.steps=4", "decoder.name=linear", *overrides)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
    for steps, more in ((2, []), (4, ["--resume"]), (4, ["--overwrite"])):
        config = tiny(made_data, *settings, "train.batch_size=2", f"train.steps={steps}")
        (tmp_path / "c.yaml").write_text(dump_config(config))
        command = ["-m", "celltyper", "train", str(tmp_path / "c.yaml"), "--device", "cpu"]
        command += ["-o", str(tmp_path / f"run{steps}"), *more]
        subprocess.run([sys.executable, *torchrun, *command], check=True, env=env)
    start = train(
        tiny(made_data, *settings, "train.lr=1e-12", "train.batch_size=4"),
        tmp_path / "start",
        device="cpu",
        progress=False,
    )
    one = train(
        tiny(made_data, *settings, "train.batch_size=4"),
        tmp_path / "one",
        device="cpu",
        progress=False,
    )
    first, whole, halves = (
        torch.cat([t.flatten() for k, t in sorted(tensors.items()) if k.startswith("model.heads")])
        for tensors, _ in (
            read_tensors(r / "last.safetensors") for r in (start, one, tmp_path / "run4")
        )
    )
    assert (halves - first).abs().max() > 1e-4
    # Batch statistics are those of each half, so the steps are alike, not the same.
    assert torch.cosine_similarity(whole - first, halves - first, dim=0) > 0.8


@pytest.mark.parametrize("adapt", ["frozen", "lora"])
def test_base_weights_stay_out_of_checkpoint_and_of_training(
    tiny: Tiny, made_data: Path, tmp_path: Path, adapt: str
) -> None:
    config = tiny(made_data, f"encoder.adapt={adapt}")
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    saved = weights(run)
    assert all(not n.startswith("encoder.") or "lora_" in n for n in saved)
    assert any("lora_" in n for n in saved) == (adapt == "lora")
    facts = json.loads((run / "run.json").read_text())["trainability"]
    assert "encoder" in facts["unchanged"]
    model = load_model(run)
    assert model.classes == ("blue", "brown")
    for name, tensor in model.state_dict().items():
        if name in saved:
            assert torch.equal(tensor, saved[name])


def test_loading_onto_other_base_weights_is_refused(
    tiny: Tiny, made_data: Path, tmp_path: Path
) -> None:
    config = tiny(made_data, "encoder.adapt=frozen", "train.steps=2")
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    with pytest.raises(CheckpointError, match=r"trained on other weights.*--weights"):
        # The full-size architecture with random weights is another encoder than its twin.
        load_model(run, encoder_weights="random")


def test_code_of_a_checkpoint_needs_permission(tiny: Tiny, made_data: Path, tmp_path: Path) -> None:
    config = tiny(
        made_data, "decoder.name=celltyper.decoders.linear:LinearDecoder", "train.steps=2"
    )
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    with pytest.raises(CheckpointError, match="--allow-code"):
        load_model(run)
    assert load_model(run, allow_code=True).classes == ("blue", "brown")


def test_damaged_or_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model at"):
        load_model(tmp_path)
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"not a checkpoint at all")
    with pytest.raises(CheckpointError, match="damaged or was not written by celltyper"):
        load_model(tmp_path)


def test_loss_that_explodes_stops_and_keeps_the_last_checkpoint(
    tiny: Tiny, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from celltyper import loop

    step, calls = loop.objective, {"n": 0}

    def explodes(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls["n"] += 1
        return step(*args, **kwargs) * (float("nan") if calls["n"] == 4 else 1.0)

    monkeypatch.setattr(loop, "objective", explodes)
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"loss is nan at step 4; the last good .*last\.safe"):
        train(tiny(made_data), run, device="cpu", progress=False)
    _, header = read_tensors(run / "last.safetensors")
    assert header["progress"]["step"] == 2
    assert all(t.isfinite().all() for t in weights(run).values())


def test_folder_of_another_run_is_left_alone(tiny: Tiny, made_data: Path, tmp_path: Path) -> None:
    run = train(tiny(made_data), tmp_path / "run", device="cpu", progress=False)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(ConfigError, match="already holds a run; pass --resume"):
        train(tiny(made_data), run, device="cpu", progress=False)
    with pytest.raises(ConfigError, match=r"another config \(train.lr: 0.0003 then, 0.1 now\)"):
        train(tiny(made_data, "train.lr=0.1"), run, device="cpu", progress=False, resume=True)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        train(tiny(made_data), other, device="cpu", progress=False, overwrite=True)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


def test_wrong_input_is_refused_before_anything_is_written(
    tiny: Tiny, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celltyper.runs.find_spec", lambda name: None)
    for config, said in (
        (Config(), "data.root is not set"),
        (tiny(made_data, "train.metric=f2"), "train.metric 'f2' is unknown: macro_f1"),
        (tiny(made_data, "decoder.name=unter"), "unknown decoder 'unter'"),
        (tiny(made_data, "encoder.name=unni"), "unknown encoder 'unni'"),
        (tiny(made_data, "instances.method=hw"), "unknown instance method 'hw'"),
        (tiny(made_data, "train.log=tensorboard"), "needs the package tensorboard"),
        (tiny(made_data, "train.precision=fp16"), "fp16 is not supported by this CPU"),
    ):
        with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
            train(config, tmp_path / "run", device="cpu", progress=False)
    with pytest.raises(ConfigError, match="device 'cuda:9' is not available"):
        train(tiny(made_data), tmp_path / "run", device="cuda:9", progress=False)
    with pytest.raises(DataError, match="no such folder"):
        train(tiny(tmp_path / "none"), tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


def test_patient_on_both_sides_is_refused(tiny: Tiny, made_data: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(made_data / "train")
    with pytest.raises(DataError, match="3 patients or slides are in training and validation"):
        train(tiny(tmp_path), tmp_path / "run", device="cpu", progress=False)


def test_learning_rate_by_hand() -> None:
    factors = [learning_rate_factor(step, warmup=2, steps=6) for step in range(6)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_early_stop_counts_validations_without_gain(
    tiny: Tiny, made_data: Path, tmp_path: Path
) -> None:
    config = tiny(
        made_data, "train.lr=1e-9", "train.steps=40", "train.validate_every=1", "train.patience=2"
    )
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    assert json.loads((run / "run.json").read_text())["steps"] == 3


def test_without_validation_images_the_last_averaged_model_is_kept(
    tiny: Tiny, made_data: Path, tmp_path: Path
) -> None:
    config = tiny(made_data / "train", "data.val_fraction=0", "train.ema=0.5")
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    rows = (run / "history.csv").read_text().splitlines()
    assert rows[0] == "step,loss,lr"
    assert [r.split(",")[0] for r in rows[1:]] == ["2", "4"]
    facts = json.loads((run / "run.json").read_text())
    assert facts["best_step"] == 4
    assert facts["best"] == {"macro_f1": None}
    assert facts["data"].keys() == {"train"}
    assert len(facts["data"]["train"]["names"]) == 3
    last, _ = read_tensors(run / "last.safetensors")
    average = {k.removeprefix("average."): v for k, v in last.items() if k.startswith("average.")}
    assert_same(weights(run), average)
    model = {k.removeprefix("model."): v for k, v in last.items() if k.startswith("model.")}
    assert any(not torch.equal(model[k], v) for k, v in average.items())
    _, folder = evaluate_run(run, made_data / "val", resamples=0, device="cpu", progress=False)
    page = (folder / "report.html").read_text()
    assert "Loss" in page
    assert "Validation scores" not in page
    waiting = tiny(made_data / "train", "data.val_fraction=0", "train.patience=3")
    with pytest.raises(ConfigError, match=r"train\.patience=3 needs validation images"):
        train(waiting, tmp_path / "waiting", device="cpu", progress=False)


def test_a_file_of_splits_says_which_images_train_and_which_are_left_for_eval(
    tiny: Tiny, made_data: Path, tmp_path: Path
) -> None:
    split = tmp_path / "split.yaml"
    split.write_text("{train: [train1], val: [train2], test: [train3]}")
    root = made_data / "train"
    config = tiny(root, f"data.split={split}", "train.steps=2")
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    parts = json.loads((run / "run.json").read_text())["data"]
    assert {part: about["names"] for part, about in parts.items()} == {
        "train": ["train1"],
        "val": ["train2"],
        "test": ["train3"],
    }
    summary, _ = evaluate_run(run, root, split="test", resamples=0, device="cpu", progress=False)
    assert [image.name for image in summary.images] == ["train3"]
    # A folder of parts may be divided anew; without val nothing is validated.
    split.write_text(json.dumps({"train": ["train1", "test5"], "val": []}))
    train_data, val_data, others = divide(tiny(made_data, f"data.split={split}").data, seed=0)
    assert (train_data.names, val_data.names, others) == (("train1", "test5"), (), {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{train: [train1, x]}", "split 'train' names 'x', which is not among the images"),
        ("{train: [train1, train1]}", "split 'train' lists an image twice"),
        ("{train: [train1], test: [train1]}", "group 'train1' (image 'train1') is in both splits"),
        ("{val: [train1]}", "no images to train on under 'train'"),
        ("{train: [12]}", "'train' holds 12, not names; expected {train: [image names]"),
        ("{train: train1}", "'train' holds 'train1', not names"),
        ("- train1", "expected {train: [image names]"),
        ("{", "cannot be read as YAML or JSON"),
        (None, "cannot be read as YAML or JSON: [Errno 2] No such file"),
    ],
)
def test_wrong_files_of_splits_are_refused_in_one_line(
    tiny: Tiny, made_data: Path, tmp_path: Path, text: str | None, said: str
) -> None:
    split = tmp_path / "split.yaml"
    if text is not None:
        split.write_text(text)
    with pytest.raises(DataError) as caught:
        divide(tiny(made_data / "train", f"data.split={split}").data, seed=0)
    assert said in str(caught.value)
    assert str(split) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_the_data_keep_for_a_test_never_train(
    tiny: Tiny, made_data: Path, tmp_path: Path
) -> None:
    """Splits train and test, but no val: validation images are held out of train alone."""
    source = open_dataset(made_data / "train")
    copies = [replace(s, name=f"{s.name}{i}", group="") for s in source for i in (0, 1)]
    write_folder(tmp_path / "d", copies, source.classes, 0.5)
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    meta["splits"] = {"train": ["train10", "train20", "train30", "train11"], "test": ["train21"]}
    (tmp_path / "d" / "meta.json").write_text(json.dumps(meta))
    train_data, val_data, _ = divide(tiny(tmp_path / "d").data, seed=0)
    assert val_data.names
    assert sorted(train_data.names + val_data.names) == sorted(meta["splits"]["train"])


def test_one_process_trains_at_one_precision_and_then_at_another(
    tiny: Tiny, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celltyper.devices._has_bf16_instructions", lambda: True)
    for precision in ("bf16", "fp32"):
        config = tiny(made_data, f"train.precision={precision}", "train.steps=1")
        assert train(config, tmp_path / precision, device="cpu", progress=False).is_dir()
    half, full = (weights(tmp_path / p) for p in ("bf16", "fp32"))
    assert any(not torch.equal(half[name], tensor) for name, tensor in full.items())
