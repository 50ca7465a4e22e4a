"""Models that need nothing else and are half as large: what the box holds, and its use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_library import CARD
from torch import Tensor

import celltyper
from celltyper import publishing
from celltyper.calibration import Calibration, Scaling
from celltyper.checkpoints import load_model, read_tensors, write_tensors
from celltyper.config import Config
from celltyper.domain import fit_domain
from celltyper.encoders import load_encoder
from celltyper.errors import CheckpointError, ConfigError, RunError
from celltyper.library import shelf
from celltyper.models import CellTyper
from celltyper.publishing import HALF_TOLERANCE, export_half
from celltyper.training import train

Run = Callable[..., Any]
Tiny = Callable[..., Config]

ENCODER = "timm/test_vit"
"""Six blocks of 64 channels; unlike a twin it is nothing without its weights."""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Published weights of the encoder, say."""
    inner: Any = load_encoder(ENCODER, "random", "full", seed=5)
    path = tmp_path / "weights.safetensors"
    save_file({n: t.contiguous() for n, t in inner.model.state_dict().items()}, path)
    return path


def trained(tiny: Tiny, made_data: Path, weights: Path, run: Path, *settings: str) -> Path:
    names = (f"encoder.name={ENCODER}", f"encoder.weights={weights}", "encoder.options.depth=5")
    config = tiny(made_data, *names, "train.steps=2", "train.lr=0.01", *settings)
    return train(config, run, device="cpu", progress=False)


def maps_of(model: CellTyper) -> dict[str, Tensor]:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.activate(model(images))


def block_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were looked for")

    for name in ("find_weights", "download_weights", "download_config"):
        monkeypatch.setattr(f"celltyper.encoders.hub.{name}", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_an_encoder_trained_as_a_whole_needs_no_other_weights(
    tiny: Tiny, made_data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tiny, made_data, weights, tmp_path / "run", "encoder.adapt=full")
    model = load_model(run)
    expected = maps_of(model)
    # the weights count: those of another seed give other maps
    other, grey = load_encoder(ENCODER, "random", depth=5), torch.full((1, 3, 32, 32), 0.5)
    assert not torch.equal(other(grey)[0], model.encoder(grey)[0])
    (tmp_path / "elsewhere").mkdir()
    shutil.move(run / "model.safetensors", tmp_path / "elsewhere")
    shutil.rmtree(run)
    weights.unlink()
    block_all_weights(monkeypatch)
    found = maps_of(load_model(tmp_path / "elsewhere"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("adapt", ["frozen", "lora", "last-n"])
def test_a_whole_copy_needs_no_other_weights(
    tiny: Tiny,
    made_data: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapt: str,
) -> None:
    more = ("encoder.last_n=1",) if adapt == "last-n" else ()
    run = trained(tiny, made_data, weights, tmp_path / "run", f"encoder.adapt={adapt}", *more)
    model = load_model(run)
    exact = maps_of(model)
    done = export_half(run, tmp_path / "copy", whole=True)
    assert 0 < done.largest_difference <= HALF_TOLERANCE
    # the same rounding by NumPy
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim > 1:
                rounded = tensor.numpy().astype(np.float16).astype(np.float32)
                tensor.copy_(torch.from_numpy(rounded))
    expected = maps_of(model)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"does not exist; check encoder\.weights or"):
        load_model(run)
    block_all_weights(monkeypatch)
    found = maps_of(load_model(tmp_path / "copy"))
    for name, values in expected.items():
        assert torch.equal(found[name], values)
        assert (found[name] - exact[name]).abs().max() <= HALF_TOLERANCE
    assert exact["phenotype"].std() > 0.01  # else anything would be near
    files = sorted((tmp_path / "copy").iterdir())
    assert [path.name for path in files] == ["config.yaml", "model.safetensors", "run.json"]
    # who may read one may read all
    assert len({path.stat().st_mode for path in files}) == 1


def test_a_copy_of_a_delta_stays_one(tiny: Tiny, made_data: Path, tmp_path: Path) -> None:
    run = train(
        tiny(made_data, "encoder.adapt=lora", "train.steps=1", "decoder.name=dpt"),
        tmp_path / "run",
        device="cpu",
        progress=False,
    )
    export_half(run, tmp_path / "copy")
    (own, header), (half, same) = (
        read_tensors(folder / "model.safetensors") for folder in (run, tmp_path / "copy")
    )
    assert same == header
    assert own.keys() == half.keys()
    assert any(".lora_" in name for name in half)
    for name, tensor in own.items():
        matrix = tensor.ndim > 1
        assert half[name].dtype == (torch.float16 if matrix else tensor.dtype)
        np.testing.assert_array_equal(
            half[name].numpy(), tensor.numpy().astype(np.float16) if matrix else tensor.numpy()
        )
    sizes = [(f / "model.safetensors").stat().st_size for f in (tmp_path / "copy", run)]
    assert sizes[0] < 0.6 * sizes[1]
    exact, found = maps_of(load_model(run)), maps_of(load_model(tmp_path / "copy"))
    for name, values in exact.items():
        assert found[name].dtype == torch.float32
        assert 0 < (found[name] - values).abs().max() <= HALF_TOLERANCE


@pytest.mark.parametrize("whole", [False, True])
def test_a_copy_is_calibrated_and_knows_the_training_images(
    tiny: Tiny, made_data: Path, tmp_path: Path, whole: bool
) -> None:
    run = train(tiny(made_data, "train.steps=1"), tmp_path / "run", device="cpu", progress=False)
    rng = np.random.default_rng(0)
    # in half precision their inverse covariance would not be finite
    tiles = rng.normal(size=(150, 8)) * 1e-3
    domain = fit_domain(tiles, tiles[:20], "validation")
    assert domain.precision.max() > np.finfo(np.float16).max
    scaling = Calibration(Scaling("vector", (0.5, 0.7), (0.1, -0.1)), 200, {"90": 0.6})
    tensors, header = read_tensors(run / "model.safetensors")
    tensors |= {f"domain.{name}": torch.from_numpy(a) for name, a in domain.tensors().items()}
    header |= {"domain": domain.facts(), "calibration": scaling.facts()}
    write_tensors(run / "model.safetensors", tensors, header)
    export_half(run, tmp_path / "copy", whole=whole)
    copy = load_model(tmp_path / "copy")
    assert copy.calibration == scaling
    assert copy.domain is not None
    np.testing.assert_array_equal(copy.domain.distances(tiles), domain.distances(tiles))
    assert copy.domain.quantile == domain.quantile


def test_what_does_not_fit_into_half_is_not_written(
    tiny: Tiny, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tiny(made_data, "train.steps=1"), tmp_path / "run", device="cpu", progress=False)
    with pytest.raises(ConfigError, match="is there already; pass --overwrite"):
        export_half(run, run)
    monkeypatch.setattr(publishing, "HALF_TOLERANCE", 0.0)
    with pytest.raises(RunError, match="copy was not written: in half precision its maps differ"):
        export_half(run, tmp_path / "copy")
    tensors, header = read_tensors(run / "model.safetensors")
    encoder = header["config"]["encoder"] | {"name": "owner/tiny"}
    (tmp_path / "of_hub").mkdir()
    changed = header | {"config": header["config"] | {"encoder": encoder}}
    write_tensors(tmp_path / "of_hub" / "model.safetensors", tensors, changed)
    with pytest.raises(ConfigError, match="architecture of owner/tiny would still come from the"):
        export_half(tmp_path / "of_hub", tmp_path / "copy", whole=True)
    shutil.rmtree(tmp_path / "of_hub")
    tensors["heads.phenotype.weight"][0, 0] = 70_000
    write_tensors(run / "model.safetensors", tensors, header)
    with pytest.raises(RunError, match="weight are too large for half precision"):
        export_half(run, tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_model_of_the_box_from_export_to_report(
    tiny: Tiny,
    made_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    celltyper_command: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CELLTYPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shelf, "box_folder", lambda: tmp_path / "box")
    train(tiny(made_data, "encoder.adapt=lora"), "run", device="cpu", progress=False)
    Path("run/card.yaml").write_text(yaml.safe_dump(CARD))
    Path("box").mkdir()
    words = ("export", "run", "--format", "half", "--whole", "-o", "box/nuclei")
    code, out, err = celltyper_command(*words)
    assert code == 0, err
    assert "largest difference to the model: " in out
    assert "half: box/nuclei/model.safetensors" in out
    assert Path("box/nuclei/card.yaml").read_bytes() == Path("run/card.yaml").read_bytes()

    image = next((made_data / "test" / "images").iterdir())
    code, said, err = celltyper_command("infer", image, "-o", "out", "--mpp", "0.5")
    assert code == 0, err
    assert "model: nuclei, of the box" in said
    for name, out in (("nuclei", "named"), ("box/nuclei", "path")):
        assert celltyper_command("infer", image, "-m", name, "-o", out, "--mpp", 0.5).code == 0
    tables = {Path(out, "cells.csv").read_bytes() for out in ("out", "named", "path")}
    assert len(tables) == 1
    folder = str((tmp_path / "box" / "nuclei").absolute())
    assert json.loads(Path("out/infer.json").read_text())["model"] == folder
    expected = maps_of(load_model(Path("box/nuclei")))
    for model in (celltyper.load_model(), celltyper.load_model("nuclei")):
        found = maps_of(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    score = ("eval", "nuclei", made_data / "test", "--resamples", "0")
    for refused in (score, ("export", "nuclei", "--format", "half")):
        code, _, err = celltyper_command(*refused)
        assert (code, err.count("\n")) == (2, 1)
        assert "nuclei is a model of the box: say with -o where results go" in err
    code, _, err = celltyper_command(*score, "-o", "scores")
    assert code == 0, err
    page = Path("scores/report.html").read_text(encoding="utf-8")
    assert "nuclei (Apache-2.0), trained on DSB 2018, histolytics fields; not for diagnosis" in page
