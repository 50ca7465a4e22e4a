"""Training that starts from a trained model, and encoders that are those of a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from celltyper.checkpoints import load_model
from celltyper.config import Config, load_config
from celltyper.encoders import load_encoder
from celltyper.errors import CheckpointError, ConfigError
from celltyper.library import shelf
from celltyper.models import build_model
from celltyper.publishing import export_half
from celltyper.starting import start_decoder, with_network_of
from celltyper.training import train

Tiny = Callable[..., Config]

WHOLE = ("encoder.weights=random", "encoder.options.depth=4", "encoder.options.grid=4")
"""Of the real architecture, as a twin has no weights to hand on."""
PLAIN = {"train.steps": 2, "train.batch_size": 2, "data.tile": 96, "train.warmup": 0}


@pytest.fixture(scope="module")
def start(tiny: Tiny, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose encoder was trained as a whole, on the classes blue and brown."""
    folder = tmp_path_factory.mktemp("start") / "run"
    config = tiny(made_data, *WHOLE, "decoder.name=dpt", "decoder.options.width=8")
    return train(config, folder, device="cpu", progress=False)


def config_from(start: str | Path, root: Path, *overrides: str) -> Config:
    own = [f"{key}={value}" for key, value in PLAIN.items()]
    path = root.parent / "recipe.yaml"
    path.write_text(f"start: {start}\ndata: {{root: {root}}}\n", encoding="utf-8")
    return load_config(path, [*own, *overrides])


@pytest.fixture
def data(made_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_data, tmp_path / "data"))


def test_network_and_weights_are_the_models_and_classes_go_by_name(start: Path, data: Path) -> None:
    old = load_model(start)
    config = with_network_of(config_from(start, data))
    assert config.decoder.options == {"width": 8}
    assert config.data.mpp == old.mpp == 0.5
    assert (config.infer.overlap, config.encoder.adapt) == (16, "frozen")
    assert with_network_of(config) == config
    new = build_model(config, ("green", "brown", "blue"), config.data.mpp).eval()
    assert start_decoder(new, str(start)) == ["green"]
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = old(image), new(image)
    torch.testing.assert_close(after["nucleus"], before["nucleus"])
    torch.testing.assert_close(after["hv"], before["hv"])
    # background, blue, brown
    torch.testing.assert_close(after["phenotype"][:, [0, 3, 2]], before["phenotype"])


def test_run_from_a_model_trains_further_and_is_loaded_with_its_encoder(
    start: Path, data: Path, tmp_path: Path
) -> None:
    run = train(config_from(start, data), tmp_path / "run", device="cpu", progress=False)
    names = load_file(run / "model.safetensors").keys()
    assert not any(name.startswith("encoder.") for name in names)
    old, new = load_model(start), load_model(run)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for mine, theirs in zip(new.encoder(image), old.encoder(image), strict=True):
            torch.testing.assert_close(mine, theirs)
        change = (new(image)["nucleus"] - old(image)["nucleus"]).abs().max()
    # two steps of a decoder that starts from the other's
    assert 0 < change < 1
    again = train(
        config_from(start, data), tmp_path / "run", device="cpu", progress=False, resume=True
    )
    assert again == run
    whole = export_half(run, tmp_path / "whole", whole=True)
    assert any(n.startswith("encoder.model.") for n in load_file(whole.path))
    with pytest.raises(CheckpointError, match="without the weights of its encoder, which was fro"):
        load_encoder("vit_tiny_patch16", run / "model.safetensors", depth=4, grid=4)


def test_model_is_found_by_name_from_anywhere(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = tmp_path / "box"
    shutil.copytree(start, box / "nuclei")
    monkeypatch.setattr(shelf, "box_folder", lambda: box)
    config = with_network_of(config_from("nuclei", data))
    # the box of another machine lies elsewhere
    assert (config.start, config.encoder.weights) == ("nuclei", "model:nuclei")
    monkeypatch.chdir(start.parent)
    config = with_network_of(config_from("./run", data))
    assert config.start == config.encoder.weights == str(start / "model.safetensors")
    same = load_encoder("vit_tiny_patch16", start / "model.safetensors", depth=4, grid=4)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for mine, theirs in zip(same(image), load_model(start).encoder(image), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("decoder.name=unetr", r"decoder\.name=unetr is not what the model to start from has \(dp"),
        ("encoder.options.depth=5", "encoder.options=.* is not what the model to start from has"),
        ("instances.method=distance", r"instances\.method=distance is not what"),
        ("data.mpp=0.25", "works at 0.5 micrometres per pixel: leave data.mpp out"),
    ],
)
def test_another_network_is_refused(start: Path, data: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_network_of(config_from(start, data, override))


def test_what_cannot_be_started_from_is_one_line(
    start: Path, data: Path, tmp_path: Path, tiny: Tiny
) -> None:
    with pytest.raises(CheckpointError, match=r"^start: no model at .*missing"):
        with_network_of(config_from(tmp_path / "missing", data))
    twin = train(tiny(data, "train.steps=1"), tmp_path / "twin", device="cpu", progress=False)
    with pytest.raises(CheckpointError, match="is a twin"):
        with_network_of(config_from(twin, data))
    adapted = shutil.copytree(start, tmp_path / "adapted") / "model.safetensors"
    tensors = load_file(adapted)
    header = json.loads(_metadata(adapted))
    header["config"]["encoder"]["adapt"] = "lora"
    save_file(tensors, adapted, metadata={"celltyper": json.dumps(header)})
    with pytest.raises(CheckpointError, match="was adapted by lora; start from what"):
        with_network_of(config_from(adapted, data))


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["celltyper"])


def test_cut_encoder_and_its_grid_of_positions(tmp_path: Path) -> None:
    whole = load_encoder("vit_tiny_patch16", "random").model.state_dict()
    save_file(whole, tmp_path / "whole.safetensors")
    cut = load_encoder("vit_tiny_patch16", tmp_path / "whole.safetensors", depth=4, grid=6)
    tensors = cut.model.state_dict()
    assert not any(name.startswith("blocks.4.") for name in tensors)
    assert torch.equal(tensors["blocks.3.attn.qkv.weight"], whole["blocks.3.attn.qkv.weight"])
    side = round((whole["pos_embed"].shape[1] - 1) ** 0.5)
    square = whole["pos_embed"][:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    smaller = F.interpolate(square, size=(6, 6), mode="bicubic", antialias=True)
    expected = smaller.permute(0, 2, 3, 1).reshape(1, 36, -1)
    torch.testing.assert_close(tensors["pos_embed"][:, 1:], expected)
    # a file that holds no more than these blocks does as well
    save_file(tensors, tmp_path / "cut.safetensors")
    again = load_encoder("vit_tiny_patch16", tmp_path / "cut.safetensors", depth=4, grid=6)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    with pytest.raises(CheckpointError, match=r"do not fit the encoder: .* missing"):
        load_encoder("vit_tiny_patch16", tmp_path / "cut.safetensors", depth=5, grid=6)
    with pytest.raises(ConfigError, match="grid is for plain vision transformers"):
        load_encoder("convnextv2_tiny", "random", grid=6)
