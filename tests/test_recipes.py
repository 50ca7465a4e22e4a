"""Every recipe trains one step with its own decoder, losses and augmentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from celltyper.config import load_config, recipes
from celltyper.training import train

SMALL = (
    "encoder.weights=twin",
    "data.tile=56",
    "train.steps=1",
    "train.batch_size=2",
    "train.warmup=0",
    "train.accumulate=1",
    "infer.tile=56",
    "infer.overlap=14",
)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipe_trains_one_step(name: str, made_data: Path, tmp_path: Path) -> None:
    config = load_config(name, [f"data.root={made_data}", *SMALL])
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    facts = json.loads((run / "run.json").read_text())
    assert facts["steps"] == 1
    assert facts["trainability"]["adapt"] == config.encoder.adapt


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "examples").glob("*.yaml")))
def test_example_config_trains_one_step(
    file: Path, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(file.parent)
    config = load_config(file, [f"data.root={made_data}", *SMALL])
    assert train(config, tmp_path / "run", device="cpu", progress=False).is_dir()
