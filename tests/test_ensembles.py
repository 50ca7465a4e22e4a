"""Several models of dense cell phenotyping as one: the runs of a protocol."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from celltyper.checkpoints import load_model
from celltyper.config import Config, parse_config
from celltyper.errors import CheckpointError, ConfigError, DataError
from celltyper.exporting import export_model
from celltyper.library.files import model_folders
from celltyper.models import CellTyper, Ensemble, build_model
from celltyper.predict import predict_image
from celltyper.protocols import load_protocol, run_protocol
from celltyper.results import evaluate_run

SMALL = (
    "encoder.weights=twin",
    "data.tile=56",
    "decoder.options.width=8",
    "train.steps=2",
    "train.batch_size=2",
    "train.warmup=0",
    "infer.tile=56",
    "infer.overlap=14",
)


def made(seed: int, *overrides: str) -> CellTyper:
    config = parse_config({}, [*SMALL, *overrides])
    model = build_model(config, ("a", "b"), 0.25)
    torch.manual_seed(seed)
    for parameter in [*model.decoder.parameters(), *model.heads.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_maps_are_the_mean_of_the_activated_maps() -> None:
    models = [made(seed) for seed in (1, 2, 3)]
    images = torch.rand(2, 3, 56, 56)
    with torch.inference_mode():
        each = [model.activate(model(images)) for model in models]
        together = Ensemble(models).eval()
        found = together.activate(together(images))
    assert found.keys() == each[0].keys()
    for name, maps in found.items():
        mean = sum(m[name].numpy().astype(np.float64) for m in each) / 3
        np.testing.assert_allclose(maps.numpy(), mean, atol=1e-6)
        assert np.abs(maps.numpy() - each[0][name].numpy()).max() > 1e-3


def test_a_frozen_encoder_runs_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [made(seed) for seed in (1, 2, 3)]
    together = Ensemble(models)
    assert len({id(model.encoder) for model in models}) == 1
    calls = []
    inner = type(models[0].encoder).forward
    monkeypatch.setattr(
        type(models[0].encoder),
        "forward",
        lambda self, images: (calls.append(1), inner(self, images))[1],
    )
    together(torch.rand(1, 3, 56, 56))
    assert len(calls) == 1


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_encoders_that_were_adapted_stay_apart(adapt: str) -> None:
    models = [made(1, f"encoder.adapt={adapt}"), made(2, f"encoder.adapt={adapt}")]
    for model, factor in zip(models, (0.5, 1.5), strict=True):
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * factor)
    images = torch.rand(1, 3, 56, 56)
    with torch.inference_mode():
        each = [model.activate(model(images))["phenotype"] for model in models]
        found = Ensemble(models).eval()(images)["phenotype"]
    assert (each[0] - each[1]).abs().max() > 1e-4
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)


def test_models_that_do_not_fit_make_no_ensemble() -> None:
    config = parse_config({}, SMALL)
    other = build_model(config, ("a", "c"), 0.25)
    with pytest.raises(ConfigError, match="other classes, resolution or maps"):
        Ensemble([made(1), other])
    with pytest.raises(ConfigError, match="other classes, resolution or maps"):
        Ensemble([made(1), build_model(config, ("a", "b"), 0.5)])


@pytest.fixture(scope="module")
def folds(made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folds")
    (folder / "two.yaml").write_text("folds: 2\n")
    config: Config = parse_config(
        {}, [*SMALL, f"data.root={made_data / 'train'}", "data.val_fraction=0"]
    )
    output = folder / "out"
    protocol = load_protocol(folder / "two.yaml")
    return run_protocol(config, protocol, output, device="cpu", progress=False)


def test_the_folder_of_a_protocol_is_an_ensemble(folds: Path) -> None:
    together = load_model(folds)
    assert isinstance(together, Ensemble)
    alone = [load_model(folder) for folder in model_folders(folds)]
    assert len(alone) == 2
    image = np.random.default_rng(0).integers(0, 255, (90, 75, 3)).astype(np.uint8)
    found = predict_image(together, image, 0.25, symmetries=2)
    each = [predict_image(model, image, 0.25, symmetries=2).probabilities for model in alone]
    np.testing.assert_allclose(found.probabilities, np.mean(each, axis=0), atol=1e-5)


def test_images_that_any_member_was_trained_on_are_refused(folds: Path, made_data: Path) -> None:
    with pytest.raises(DataError, match="are of the training data"):
        evaluate_run(folds, made_data / "train", device="cpu", progress=False)
    summary, output = evaluate_run(
        folds, made_data / "train", device="cpu", progress=False, allow_seen=True, resamples=0
    )
    assert (output / "report.html").is_file()
    assert json.loads((output / "metrics.json").read_text())
    assert summary.images


def test_an_ensemble_is_not_exported(folds: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ensemble of 2 models: export one"):
        export_model(folds, tmp_path / "m.pt", "torchscript")


def test_what_is_no_run_and_no_protocol_is_said(folds: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model at"):
        load_model(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "protocol.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(broken)
    (broken / "protocol.json").write_text((folds / "protocol.json").read_text())
    with pytest.raises(CheckpointError, match="no finished run"):
        load_model(broken)
