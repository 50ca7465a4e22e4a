"""Exported files compute what the model computes, and say what they are."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import celltyper
from celltyper import exporting
from celltyper.checkpoints import save_model
from celltyper.config import Config
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import CheckpointError, ConfigError, DataError, RunError
from celltyper.exporting import cells_of_maps, export_adapter, export_model, read_facts
from celltyper.models import CellTyper, build_model

Command = Callable[..., Any]


def lively(model: nn.Module, parts: str = r"pos_embed|heads|lora_B") -> None:
    """Weights that show: a fresh model's position embeddings, adapters and heads barely do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(parts, name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def made(encoder: str, decoder: str = "linear", adapt: str = "frozen", **options: Any) -> CellTyper:
    torch.manual_seed(0)
    built = celltyper.load_encoder(encoder, weights="twin", adapt=adapt)  # type: ignore[arg-type]
    model = CellTyper(built, decoder, ("blue", "brown"), mpp=0.5, **options).eval()
    lively(model)
    return model


def run_onnx(path: Path, images: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))


def eager(model: CellTyper, images: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    with torch.no_grad():
        return {name: values.numpy() for name, values in model.activate(model(images)).items()}


@pytest.mark.parametrize(
    ("encoder", "decoder", "adapt"),
    [
        # patch 14 on a grid that is not the embedding's, padded: 100 px are 8 patches of 14
        ("vit_small_patch14_dinov2", "linear", "lora"),
        pytest.param("uni", "dpt", "frozen", marks=pytest.mark.slow),
        # registers, SwiGLU
        pytest.param("virchow2", "linear", "frozen", marks=pytest.mark.slow),
        # rotary position
        pytest.param("vit_small_patch16_dinov3", "linear", "full", marks=pytest.mark.slow),
    ],
)
def test_onnx_computes_what_the_model_computes(
    encoder: str, decoder: str, adapt: str, tmp_path: Path
) -> None:
    model = made(encoder, decoder, adapt, tile=100)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path, difference, _ = export_model(model, tmp_path / "m.onnx")
    assert difference < 1e-3
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for count in (1, 5):
        images = torch.rand(count, 3, 100, 100)
        expected, found = eager(model, images), run_onnx(path, images)
        assert list(found) == list(expected)
        assert expected["phenotype"].std() > 0.1  # else anything would be near
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-3, rtol=0)
    if decoder == "linear":
        # one, of the maps to the pixels: position embeddings were resampled before
        assert sum(node.op_type == "Resize" for node in onnx.load(path).graph.node) == 1
    # raw grey: normalised with the card's mean and standard deviation inside, or the maps differ
    grey = torch.full((2, 3, 100, 100), 0.5)
    for name, values in eager(model, grey).items():
        np.testing.assert_allclose(run_onnx(path, grey)[name], values, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_several_scales_go_into_a_file_for_any_batch(tmp_path: Path) -> None:
    encoder = celltyper.load_encoder("musk", weights="twin", scales=(1, 2))
    model = CellTyper(encoder, "linear", ("blue", "brown"), mpp=0.5, tile=48).eval()
    lively(model)
    path, _, _ = export_model(model, tmp_path / "m.onnx")
    for count in (1, 5):
        images = torch.rand(count, 3, 48, 48)
        expected, found = eager(model, images), run_onnx(path, images)
        assert expected["phenotype"].std() > 0.05
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("format", "suffix"), [("torchscript", ".pt"), ("torch-export", ".pt2")])
def test_torch_files_compute_what_the_model_computes(
    format: str, suffix: str, tmp_path: Path
) -> None:
    model = made("vit_tiny_patch16", "linear", "lora", tile=64)
    path, difference, facts = export_model(model, tmp_path / f"m{suffix}", format)
    assert difference < 1e-3
    assert read_facts(path) == facts
    images = torch.rand(5, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of TorchScript, by newer torch
        loaded = (
            torch.jit.load(str(path))  # type: ignore[no-untyped-call]
            if format == "torchscript"
            else torch.export.load(path).module()
        )
    with torch.no_grad():
        found = loaded(images)
    for own, values in zip(found, eager(model, images).values(), strict=True):
        np.testing.assert_allclose(own.numpy(), values, atol=1e-3, rtol=0)


def test_facts_say_what_the_file_is(tmp_path: Path) -> None:
    model = made("vit_tiny_patch16", tile=32, overlap=8, colors=("#0000ff", "#802000"))
    path, difference, facts = export_model(model, tmp_path / "m.onnx", tile=48)
    entries = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(entries["celltyper"]) == read_facts(path) == facts
    assert facts["classes"] == ["blue", "brown"]
    assert facts["colors"] == ["#0000ff", "#802000"]
    assert (facts["mpp"], facts["tile"], facts["overlap"]) == (0.5, 48, 8)
    assert facts["maps"] == {
        "phenotype": {"channels": 3, "activation": "softmax"},
        "nucleus": {"channels": 1, "activation": "sigmoid"},
        "hv": {"channels": 2, "activation": "identity"},
    }
    assert facts["instances"]["method"] == "hv"
    assert facts["instances"]["options"]["min_area"] == 10
    assert facts["largest_difference"] == difference
    assert facts["celltyper"] == celltyper.__version__
    assert facts["encoder_fingerprint"] == fingerprint(model.encoder)
    assert run_onnx(path, torch.rand(2, 3, 48, 48))["phenotype"].shape == (2, 3, 48, 48)


@pytest.fixture
def run(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    """A run of LoRA whose model finds something."""
    config = tiny(tmp_path, "encoder.adapt=lora", "infer.overlap=0", "infer.tile=64")
    model = build_model(config, ("blue", "brown"), 0.5)
    lively(model, "heads|lora_B")  # the base weights are not in the checkpoint
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run" / "model.safetensors", model, config)
    return tmp_path / "run"


def test_maps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    facts = {"maps": {"phenotype": {"channels": 3, "activation": "softmax"}}}
    with pytest.raises(DataError, match=r"map 'phenotype' must be \(3, H, W\), got \(2, 4, 4\)"):
        cells_of_maps({"phenotype": np.zeros((2, 4, 4), np.float32)}, facts)
    with pytest.raises(DataError, match="got None"):
        cells_of_maps({}, facts)


def test_adapters_go_to_a_folder_in_pefts_format(run: Path, celltyper_command: Command) -> None:
    code, out, err = celltyper_command("export", run, "--format", "peft")
    assert code == 0, err
    assert f"adapter: {run / 'adapter'}" in out
    assert {p.name for p in (run / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    with pytest.raises(ConfigError, match="is there already"):
        export_adapter(run, run / "adapter")


class Moody(nn.Module):
    """A decoder that changes with every call, which no file can hold."""

    out_channels = 4

    def __init__(self, channels: list[int], patch_size: int) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, features: list[Tensor], images: Tensor) -> Tensor:
        self.calls += 1
        return images[:, :1].expand(-1, 4, -1, -1) * self.calls


class Counting(Moody):
    """A decoder that takes the size of the batch for a constant."""

    def forward(self, features: list[Tensor], images: Tensor) -> Tensor:
        return images[:, :1].reshape(len(images), 1, *images.shape[2:]).expand(-1, 4, -1, -1)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [(Moody, "m.pt2 was not written: its maps differ"), (Counting, "fixes the size of the batch")],
)
def test_a_model_that_no_file_can_hold_leaves_none(
    decoder: type[nn.Module], message: str, tmp_path: Path
) -> None:
    model = made("vit_tiny_patch16", tile=32)
    model = CellTyper(model.encoder, decoder, ("blue",)).eval()
    lively(model)
    with pytest.raises(RunError, match=message):
        export_model(model, tmp_path / "m.pt2", "torch-export", tile=32)
    assert not list(tmp_path.iterdir())


def test_wrong_input_is_refused_in_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("vit_tiny_patch16", tile=32)
    with pytest.raises(ConfigError, match=r"unknown export format 'onxx'; did you mean 'onnx'\?"):
        export_model(model, tmp_path / "m.onnx", "onxx")
    with pytest.raises(ConfigError, match=r"does not end in .onnx, as onnx does: m.onnx"):
        export_model(model, tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="create it first"):
        export_model(model, tmp_path / "no" / "m.onnx")
    with pytest.raises(CheckpointError, match="no model at"):
        export_model(tmp_path / "none", tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(ConfigError, match="pass --overwrite"):
        export_model(run, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "mine"
    with pytest.raises(CheckpointError, match="was not written by 'celltyper export'"):
        read_facts(tmp_path / "m.txt")
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnx" else name)
    with pytest.raises(ConfigError, match=r"needs onnx: pip install 'celltyper\[export\]'"):
        export_model(model, tmp_path / "new.onnx")


def test_commands_say_what_is_wrong(run: Path, celltyper_command: Command) -> None:
    code, _, err = celltyper_command("export", run.parent / "none")
    assert (code, err.count("\n")) == (2, 1)
    assert "no model at" in err
    code, _, err = celltyper_command("export", run, "--format", "peft", "--tile", 64)
    assert code == 2
    assert "peft writes adapters only" in err
