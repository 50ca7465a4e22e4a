"""Weights files: read without running code, and refused in one line when they do not fit."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from celltyper.encoders import load_card, load_encoder
from celltyper.encoders.build import build_timm_model
from celltyper.encoders.vit import TimmViT
from celltyper.encoders.weights import load_weights, read_weights
from celltyper.errors import CheckpointError


@pytest.fixture
def tiny() -> TimmViT:
    encoder = load_encoder("vit_tiny_patch16", weights="twin", adapt="full", input_size=None)
    assert isinstance(encoder, TimmViT)
    return encoder


@pytest.mark.parametrize("how", ["safetensors", "half", "pt", "bin", "nested", "prefix", "head"])
def test_local_weights_come_back(tmp_path: Path, tiny: TimmViT, how: str) -> None:
    tensors = dict(tiny.model.state_dict())
    path = tmp_path / "weights.safetensors"
    if how == "safetensors":
        save_file(tensors, path)
    elif how == "half":
        save_file({k: v.half() for k, v in tensors.items()}, path)
    elif how == "prefix":
        save_file({f"module.backbone.{k}": v for k, v in tensors.items()}, path)
    elif how == "head":
        classifier = {"head.weight": torch.rand(9, 48), "head.bias": torch.rand(9)}
        save_file(tensors | classifier, path)
    else:
        path = tmp_path / ("weights.bin" if how == "bin" else "weights.pt")
        torch.save({"state_dict": tensors, "epoch": 3} if how == "nested" else tensors, path)
    other = build_timm_model(load_card("vit_tiny_patch16"), twin=True)
    load_weights(other, read_weights(path), path.name)
    tolerance = 1e-3 if how == "half" else 0
    for key, value in other.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, tensors[key], rtol=tolerance, atol=tolerance)


def test_position_embedding_is_resampled_to_the_grid_of_the_model(tiny: TimmViT) -> None:
    tensors = dict(tiny.model.state_dict())
    # a class token of 5 and a ramp along columns on a grid of 8 x 8 instead of 4 x 4
    ramp = torch.arange(8.0).repeat(8, 1).reshape(1, 64, 1).expand(1, 64, 48)
    tensors["pos_embed"] = torch.cat([torch.full((1, 1, 48), 5.0), ramp], dim=1)
    load_weights(tiny.model, tensors, "a file")
    position = tiny.model.pos_embed.detach()
    assert position.shape == (1, 17, 48)
    assert (position[0, 0] == 5).all()
    grid = position[0, 1:, 0].reshape(4, 4)
    assert torch.allclose(grid[0], grid[3], atol=1e-5)
    # away from the border the mean of two neighbours: 2.5 and 4.5
    assert grid[0, 1:3].tolist() == pytest.approx([2.5, 4.5], abs=0.1)
    tensors["pos_embed"] = torch.zeros(1, 1 + 63, 48)
    with pytest.raises(CheckpointError, match="no square grid"):
        load_weights(tiny.model, tensors, "a file")


def test_weights_of_another_encoder_are_refused_with_the_keys(tiny: TimmViT) -> None:
    tensors = dict(tiny.model.state_dict())
    less = {k: v for k, v in tensors.items() if not k.startswith("blocks.3.")}
    with pytest.raises(CheckpointError, match=r"12 missing \(blocks.3.attn.proj.bias, .*\.\.\.\)"):
        load_weights(tiny.model, less, "a file")
    with pytest.raises(CheckpointError, match=r"1 left over \(reg_token\)"):
        load_weights(tiny.model, {**tensors, "reg_token": torch.zeros(1, 4, 48)}, "a file")
    with pytest.raises(CheckpointError, match=r"1 other shape \(norm.bias \(7,\) instead of \(48,"):
        load_weights(tiny.model, {**tensors, "norm.bias": torch.zeros(7)}, "a file")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('exploded').touch()",)


def test_code_in_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1), "bomb": Bomb()}, "weights.pt")
    with pytest.raises(CheckpointError, match="never runs"):
        load_encoder("vit_tiny_patch16", weights="weights.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"bomb": Bomb()}))
    with pytest.raises(CheckpointError, match=r"plain\.pt"):
        load_encoder("vit_tiny_patch16", weights="plain.pt")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.bin"])
def test_unreadable_weights_are_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(CheckpointError, match="does not exist"):
        load_encoder("uni", weights=path)
    for content in (b"", b"no weights at all"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_encoder("vit_tiny_patch16", weights=path)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_damaged_pickles_are_one_line(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "weights.bin"
    torch.save({"weight": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=new)
    whole, messages = path.read_bytes(), []
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            read_weights(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all("weights.bin" in text and "\n" not in text for text in messages)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html>", b"junk"]
)
def test_text_in_place_of_weights_is_not_called_code(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.bin is no file of torch.* Git LFS"):
        read_weights(path)


def test_weights_of_no_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    torch.save(torch.zeros(3), tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_weights(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no table of tensors"):
        read_weights(tmp_path / "b.pt")
