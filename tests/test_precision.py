"""In which precision a model runs: what is asked for, or its own where the device is faster so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from celltyper import devices, infer, load_model, models, predict_image
from celltyper.config import Config
from celltyper.errors import ConfigError
from celltyper.models import CellTyper
from celltyper.training import train

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def run(tiny: Tiny, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny(made_data, "train.steps=1", "infer.precision=bf16")
    return train(config, tmp_path_factory.mktemp("precision") / "run", device="cpu", progress=False)


@pytest.mark.parametrize("supported", [True, False])
def test_a_model_has_its_own_where_the_processor_multiplies_it(
    supported: bool, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_has_bf16_instructions", lambda: supported)
    model = load_model(run, device="cpu")
    assert model.precision == "bf16"
    assert models.pick_precision(model, None) == ("bf16" if supported else "fp32")
    assert models.pick_precision(model, "fp32") == "fp32"
    if not supported:
        with pytest.raises(ConfigError, match="bf16 is not supported by this CPU; use fp32"):
            models.pick_precision(model, "bf16")
    with pytest.raises(ConfigError, match="fp16 is not supported by this CPU"):
        models.pick_precision(model, "fp16")


def seen_types(model: CellTyper) -> list[torch.dtype]:
    """Types that the decoder's first convolution gives, from here on."""
    types: list[torch.dtype] = []
    layer = next(m for m in model.decoder.modules() if isinstance(m, torch.nn.Conv2d))
    layer.register_forward_hook(lambda _module, _given, out: types.append(out.dtype))
    return types


def test_the_network_computes_in_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_has_bf16_instructions", lambda: True)
    model = load_model(run, device="cpu")
    types = seen_types(model)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    found = predict_image(model, image, model.mpp)
    predict_image(model, image, model.mpp, precision="fp32")
    assert set(types) == {torch.bfloat16, torch.float32}
    assert types[0] == torch.bfloat16
    assert found.probabilities.dtype == np.float32


def test_the_folder_says_which(
    run: Path, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_has_bf16_instructions", lambda: False)
    images = made_data / "val" / "images"
    infer([images], run, tmp_path / "out", mpp=0.5, device="cpu", progress=False)
    assert json.loads((tmp_path / "out" / "infer.json").read_text())["precision"] == "fp32"
