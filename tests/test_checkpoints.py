"""Delta checkpoints: what is in them, how large they are, where they load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from celltyper import loop
from celltyper.checkpoints import load_model, read_tensors, trained_state, write_tensors
from celltyper.config import Config, load_config
from celltyper.decoders import build_decoder
from celltyper.encoders import load_encoder
from celltyper.encoders.lora import save_lora
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import CheckpointError
from celltyper.models import CellTyper, build_model
from celltyper.training import train

Tiny = Callable[..., Config]

MODES = [
    ("vit_tiny_patch16", "frozen", ()),
    ("virchow2", "lora", ("encoder.lora.targets=attention+mlp", "encoder.lora.dropout=0.5")),
    ("uni", "dora", ("encoder.lora.dropout=0.5",)),
    ("efficientnetv2_m", "last-n", ("encoder.last_n=1", "train.ema=0.5")),
    ("vit_tiny_patch16", "last-n", ("encoder.last_n=2", "encoder.layer_decay=0.5")),
    ("vit_tiny_patch16", "bias", ("encoder.checkpointing=true",)),
    ("swin_base_patch4_window7", "norm", ()),
    ("uni", "full", ("encoder.layer_decay=0.5", "train.encoder_lr=1e-4")),
]


class KilledError(Exception):
    """Stands for a process that ends between two steps."""


@pytest.mark.parametrize(("name", "adapt", "more"), MODES)
def test_every_mode_resumes_exactly_and_loads(
    tiny: Tiny,
    made_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    adapt: str,
    more: tuple[str, ...],
) -> None:
    settings = ("train.steps=2", "train.validate_every=1", f"encoder.name={name}", *more)
    config = tiny(made_data, f"encoder.adapt={adapt}", *settings)
    whole = train(config, tmp_path / "whole", device="cpu", progress=False)
    objective, calls = loop.objective, []

    def dies_in_the_second_step(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KilledError
        return objective(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "objective", dies_in_the_second_step)
    with pytest.raises(KilledError):
        train(config, tmp_path / "killed", device="cpu", progress=False)
    monkeypatch.setattr(loop, "objective", objective)
    killed = train(config, tmp_path / "killed", device="cpu", progress=False, resume=True)
    for file in ("model.safetensors", "last.safetensors"):
        ours, theirs = (read_tensors(run / file)[0] for run in (whole, killed))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), file

    state, header = read_tensors(whole / "model.safetensors")
    base = load_encoder(name, "twin", adapt, last_n=config.encoder.last_n)  # type: ignore[arg-type]
    assert header["encoder_fingerprint"] == fingerprint(base)
    plain, unmerged = load_model(whole), load_model(whole, merge=False)
    layers = [n for n, _ in load_encoder(name, "twin", "full").named_parameters()]
    inner = plain.encoder if adapt == "full" else plain.encoder.encoder
    assert [n for n, _ in inner.named_parameters()] == layers
    own = unmerged.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in state.items())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = plain(images), unmerged(images)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
    in_encoder = {key for key in state if key.startswith("encoder.")}
    assert bool(in_encoder) == (adapt != "frozen")


@pytest.mark.parametrize(
    ("adapt", "more"),
    [("frozen", ()), ("lora", ()), ("dora", ()), ("bias", ()), ("last-n", ("encoder.last_n=1",))],
)
def test_loading_on_another_encoder_is_refused(
    tiny: Tiny, made_data: Path, tmp_path: Path, adapt: str, more: tuple[str, ...]
) -> None:
    settings = (f"encoder.adapt={adapt}", "train.steps=1", *more)
    run = train(tiny(made_data, *settings), tmp_path / "run", device="cpu", progress=False)
    state, header = read_tensors(run / "model.safetensors")
    # another seed is another base below the same trained tensors
    write_tensors(run / "model.safetensors", state, header | {"config": other_seed(header)})
    with pytest.raises(CheckpointError, match=r"was trained on other weights of vit_tiny_patch16"):
        load_model(run)


def other_seed(header: dict) -> dict:  # type: ignore[type-arg]
    return header["config"] | {"seed": 7}


@pytest.mark.parametrize("rank", [8, 16])
def test_delta_of_a_large_encoder_is_small_and_holds_no_base_weight(
    rank: int, tmp_path: Path
) -> None:
    with torch.device("meta"):
        lora = {"rank": rank, "targets": "attention+mlp"}
        encoder = load_encoder("virchow2", "random", "lora", lora=lora)
        model = CellTyper(encoder, build_decoder("dpt", encoder.channels, encoder.patch_size))
        base = {f"encoder.{n}" for n in load_encoder("virchow2", "random").state_dict()}
    parameters = sum(p.numel() for n, p in encoder.named_parameters() if ".lora_" not in n)
    assert parameters == pytest.approx(632e6, rel=0.01)
    delta = {n: torch.zeros_like(t, device="cpu") for n, t in trained_state(model).items()}
    of_encoder = {n for n in delta if n.startswith("encoder.")}
    # 32 blocks, four layers, two matrices
    assert len(of_encoder) == 32 * 4 * 2
    assert all(".lora_A." in n or ".lora_B." in n for n in of_encoder)
    assert not {n.replace(".base_layer.", ".") for n in delta} & base
    write_tensors(tmp_path / "model.safetensors", delta, {})
    assert (tmp_path / "model.safetensors").stat().st_size < 60e6
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == delta.keys()


def test_training_starts_from_a_folder_and_does_not_need_it_later(
    tiny: Tiny, made_data: Path, tmp_path: Path
) -> None:
    lora = {"rank": 3, "alpha": 5, "targets": ["blocks.1.attn.qkv", "blocks.2.mlp.fc2"]}
    start = load_encoder("vit_tiny_patch16", "twin", "lora", lora=lora)
    with torch.no_grad():
        for parameter in start.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_lora(start, tmp_path / "adapter")
    settings = ("encoder.adapt=lora", f"encoder.lora.adapter={tmp_path / 'adapter'}")
    config = tiny(made_data, *settings, "train.steps=1", "train.encoder_lr=1e-6")
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    written = load_config(run / "config.yaml").encoder.lora
    assert (written.rank, written.alpha) == (3, 5.0)
    assert set(written.targets) == set(lora["targets"])  # type: ignore[call-overload]
    # at such a rate one step leaves the adapter where it started
    for name, parameter in load_model(run, merge=False).encoder.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, start.get_parameter(name), rtol=0, atol=1e-5)
    train(config, run, device="cpu", progress=False, resume=True)
    for file in (tmp_path / "adapter").iterdir():
        file.unlink()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(run).encoder(images)[-1], start(images)[-1], rtol=1e-3, atol=1e-3
        )
    with pytest.raises(CheckpointError, match="no adapter in"):
        train(config, tmp_path / "again", device="cpu", progress=False)
    assert not (tmp_path / "again").exists()


def test_a_plain_encoder_is_saved_whole(tiny: Tiny, made_data: Path) -> None:
    encoder = load_encoder("vit_tiny_patch16", "twin", "full")
    model = CellTyper(encoder, "linear")
    assert trained_state(model).keys() == model.state_dict().keys()
    frozen = CellTyper(load_encoder("vit_tiny_patch16", "twin"), "linear")
    assert not any(name.startswith("encoder.") for name in trained_state(frozen))
    assert isinstance(frozen.encoder, nn.Module)


def test_building_a_model_leaves_the_global_random_state_alone(tiny: Tiny) -> None:
    config = tiny(Path(), "seed=3")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, same = (build_model(config, ("blue",), None).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], same[name]) for name in first)


def test_a_later_format_is_named_whatever_else_it_holds(tmp_path: Path) -> None:
    later = {"format": 2, "celltyper_version": "9.0", "config": {"new": 1}, "unheard": "of"}
    write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(1)}, later)
    with pytest.raises(CheckpointError, match=r"has checkpoint format 2, .*; use celltyper 9\.0"):
        load_model(tmp_path)
