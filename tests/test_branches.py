"""Separate branches: a decoder for the phenotype map and one for the maps cells are cut from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from celltyper import loop
from celltyper.checkpoints import load_model, read_tensors, trained_state, write_tensors
from celltyper.config import Config, Loss, dump_config, load_config, parse_config
from celltyper.encoders import load_encoder
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import ConfigError
from celltyper.exporting import export_model
from celltyper.instances import build_instances
from celltyper.models import CellTyper, build_model
from celltyper.objective import objective
from celltyper.training import train

Tiny = Callable[..., Config]
SEPARATE = "decoder.branches=separate"


def made(decoder: str = "linear", adapt: str = "frozen", **more: object) -> CellTyper:
    """A model of two decoders whose weights differ."""
    torch.manual_seed(0)
    encoder = load_encoder("vit_tiny_patch16", "twin", adapt)  # type: ignore[arg-type]
    return CellTyper(encoder, decoder, ("a", "b"), instance_decoder=decoder, **more)  # type: ignore[arg-type]


def total(model: CellTyper, loss: Loss) -> torch.Tensor:
    """The loss of one made image with a square of class 1 and one of class 2."""
    labels = np.zeros((48, 48), np.int32)
    labels[8:20, 8:20], labels[26:40, 24:38] = 1, 2
    targets = {"phenotype": torch.from_numpy(labels)[None].long()}
    for name, target in model.instances.encode(labels).items():
        targets[name] = torch.from_numpy(target)[None]
    return objective(model(torch.rand(1, 3, 48, 48)), targets, model.maps, loss)


@pytest.mark.parametrize(
    ("loss", "reached", "untouched"),
    [
        (Loss(instances=0), "decoder", "instance_decoder"),
        (Loss(cross_entropy=0, dice=0), "instance_decoder", "decoder"),
    ],
)
def test_each_loss_reaches_its_own_decoder_and_the_encoder(
    loss: Loss, reached: str, untouched: str
) -> None:
    model = made(adapt="full")
    total(model, loss).backward()
    moved = {
        name
        for name, part in model.named_children()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    }
    assert moved == {"encoder", reached, "heads"}
    assert all(p.grad is None for p in model.get_submodule(untouched).parameters())


@pytest.mark.parametrize("decoder", ["linear", "unetr", "dpt", "unet"])
def test_each_map_is_that_of_a_model_with_its_decoder_alone(decoder: str) -> None:
    model = made(decoder).eval()
    images = torch.rand(2, 3, 48, 40)
    with torch.no_grad():
        found = model(images)
        assert list(found) == ["phenotype", "nucleus", "hv"]
        for part, names in ((model.decoder, ["phenotype"]), (model.instance_decoder, found)):
            assert part is not None
            alone = CellTyper(model.encoder, part, ("a", "b")).eval()
            alone.heads.load_state_dict(model.heads.state_dict())
            expected = alone(images)
            own = set(names) - ({"phenotype"} if part is model.instance_decoder else set())
            for name in own:
                assert torch.equal(found[name], expected[name])
            for name in set(found) - own:
                assert not torch.allclose(found[name], expected[name])


class Narrow(nn.Module):
    """A decoder of five channels."""

    out_channels = 5

    def __init__(self, channels: list[int], patch_size: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 5, 1)

    def forward(self, features: list[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        return self.mix(images)


def test_the_two_may_be_of_another_kind_and_width_but_not_one_and_the_same() -> None:
    encoder = load_encoder("vit_tiny_patch16", "twin")
    model = CellTyper(encoder, "linear", instance_decoder=Narrow)
    assert model.heads["phenotype"].in_channels == 32
    assert model.heads["hv"].in_channels == 5
    assert model(torch.rand(1, 3, 20, 30))["hv"].shape == (1, 2, 20, 30)
    with pytest.raises(ConfigError, match="the decoder itself: leave it out"):
        CellTyper(encoder, model.decoder, instance_decoder=model.decoder)


def test_tensors_of_a_shared_decoder_have_the_names_they_had(tmp_path: Path) -> None:
    values = {
        "encoder": {"name": "vit_tiny_patch16", "weights": "twin"},
        "decoder": {"name": "linear", "options": {"width": 8}},
    }
    model = build_model(parse_config(values), ("a", "b"), None)
    heads = [f"heads.{m}.{kind}" for m in model.maps for kind in ("weight", "bias")]
    names = ["decoder.project.weight", "decoder.project.bias", *heads]
    assert sorted(trained_state(model)) == sorted(names)
    # a checkpoint of before, whose config has no branches
    shapes = {"decoder.project": (8, 48, 1, 1), "heads.phenotype": (3, 8, 1, 1)}
    shapes |= {"heads.nucleus": (1, 8, 1, 1), "heads.hv": (2, 8, 1, 1)}
    tensors = {f"{k}.weight": torch.randn(shape) for k, shape in shapes.items()}
    tensors |= {f"{k}.bias": torch.randn(shape[0]) for k, shape in shapes.items()}
    header = {
        "config": values,
        "classes": ["a", "b"],
        "colors": [],
        "mpp": None,
        "encoder_fingerprint": fingerprint(model.encoder),
    }
    write_tensors(tmp_path / "model.safetensors", tensors, header)
    loaded = load_model(tmp_path)
    assert loaded.instance_decoder is None
    assert torch.equal(loaded.state_dict()["heads.hv.weight"], tensors["heads.hv.weight"])


def test_the_two_start_apart_and_the_first_as_if_it_were_shared() -> None:
    values = {"encoder": {"name": "vit_tiny_patch16", "weights": "twin"}}
    shared, separate = (
        build_model(parse_config(values, [f"decoder.branches={b}"]), ("a",), None).state_dict()
        for b in ("shared", "separate")
    )
    for name, tensor in shared.items():
        if name.startswith("decoder."):
            assert torch.equal(tensor, separate[name])
    kernel = next(n for n, t in shared.items() if n.startswith("decoder.") and t.ndim == 4)
    assert not torch.equal(separate[kernel], separate[f"instance_{kernel}"])


class KilledError(Exception):
    """Stands for a process that ends between two steps."""


@pytest.mark.parametrize(
    "more", [("encoder.adapt=lora", "train.ema=0.5"), ("encoder.adapt=frozen", "encoder.cache=2")]
)
def test_training_resumes_says_what_it_trained_and_loads(
    tiny: Tiny,
    made_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
) -> None:
    monkeypatch.setenv("CELLTYPER_CACHE", str(tmp_path / "kept"))
    config = tiny(made_data, SEPARATE, "decoder.options={width: 8}", *more)
    whole = train(config, tmp_path / "whole", device="cpu", progress=False)
    plain, calls = loop.objective, []

    def dies_in_the_third_step(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KilledError
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "objective", dies_in_the_third_step)
    with pytest.raises(KilledError):
        train(config, tmp_path / "killed", device="cpu", progress=False)
    monkeypatch.setattr(loop, "objective", plain)
    killed = train(config, tmp_path / "killed", device="cpu", progress=False, resume=True)
    for file in ("model.safetensors", "last.safetensors"):
        ours, theirs = (read_tensors(run / file)[0] for run in (whole, killed))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), file

    state = read_tensors(whole / "model.safetensors")[0]
    loaded = load_model(whole, merge=False).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    facts = json.loads((whole / "run.json").read_text())
    assert {"decoder", "instance_decoder", "heads"} <= set(facts["trainability"]["changed"])
    # linear of width 8 on 48 channels, twice; 3 + 1 + 2 maps
    of_encoder = sum(t.numel() for name, t in state.items() if name.startswith("encoder."))
    assert facts["trainable_parameters"] - of_encoder == 2 * 8 * (48 + 1) + (3 + 1 + 2) * (8 + 1)


@pytest.mark.parametrize(
    ("format", "suffix"),
    [
        ("torchscript", ".pt"),
        pytest.param("onnx", ".onnx", marks=pytest.mark.slow),
        pytest.param("torch-export", ".pt2", marks=pytest.mark.slow),
    ],
)
def test_both_decoders_go_into_an_exported_file(format: str, suffix: str, tmp_path: Path) -> None:
    model = made(adapt="lora", tile=32, overlap=8).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_()
    # compared with the model inside, or refused
    _, difference, facts = export_model(model, tmp_path / f"m{suffix}", format)
    assert difference < 1e-3
    assert list(facts["maps"]) == ["phenotype", "nucleus", "hv"]
    assert "instance_decoder" in facts["digests"]


def test_the_supervised_baseline_has_two_decoders_as_published() -> None:
    config = load_config("pathocellbench-baseline", ["encoder.weights=twin"])
    model = build_model(config, ("a", "b"), None)
    assert model.instances == build_instances("centers")
    assert type(model.instance_decoder) is type(model.decoder)
    assert model.instance_decoder is not model.decoder


@pytest.mark.slow
def test_two_processes_train_both_decoders(tiny: Tiny, made_data: Path, tmp_path: Path) -> None:
    config = tiny(made_data, SEPARATE, "train.steps=2")
    (tmp_path / "c.yaml").write_text(dump_config(config))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29513"]
    command = ["-m", "celltyper", "train", str(tmp_path / "c.yaml"), "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["-o", str(tmp_path / "run")]
    subprocess.run([sys.executable, *torchrun, *command], check=True, env=env)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {"decoder", "instance_decoder"} <= set(facts["trainability"]["changed"])
    assert load_model(tmp_path / "run").instance_decoder is not None


def test_instances_may_have_options_of_their_own(made_data: Path, tiny: Tiny) -> None:
    config = tiny(
        made_data,
        "encoder.weights=twin",
        "decoder.name=dpt",
        SEPARATE,
        "decoder.options={width: 8}",
        "decoder.instance_options={stem: 4}",
    )
    model = build_model(config, ("a", "b"), 0.5)
    names = {name for name, _ in model.named_parameters()}
    assert any(name.startswith("instance_decoder.stem.") for name in names)
    assert not any(name.startswith("decoder.stem.") for name in names)
    assert model.decoder.out_channels == model.instance_decoder.out_channels == 4
    with pytest.raises(ConfigError, match=r"instance_options has no effect.*branches=separate"):
        tiny(made_data, "decoder.instance_options={stem: 4}")
