"""What the model in the box is trained on, and that what is published names no path."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from celltyper.checkpoints import load_model, read_tensors
from celltyper.config import Config
from celltyper.library.cards import read_card
from celltyper.training import train
from celltyper.types import UNKNOWN, Prediction, Sample

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "train_box_model.py"
    spec = importlib.util.spec_from_file_location("tool_of_the_box", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_fields_of_unknown_resolution_have_nuclei_of_typical_size(tool: ModuleType) -> None:
    labels = np.zeros((400, 400), np.int32)
    for i, side in enumerate((5, 10, 20)):
        labels[20 * i : 20 * i + side, :side] = i + 1
    image = np.full((400, 400, 3), 255, np.uint8)
    field = Sample(image, labels, np.array([0, 1, 1, 1], np.uint8), "a" * 40)
    found = tool._of_typical_size(field)
    # the median has 100 px and is to have 25 square micrometres
    assert found.mpp == pytest.approx(0.5)
    assert found.phenotypes.tolist() == [0, UNKNOWN, UNKNOWN, UNKNOWN]
    assert found.name == "dsb-" + "a" * 16
    # large nuclei: the field keeps 196 px
    labels = np.zeros((400, 400), np.int32)
    labels[:200, :200] = 1
    large = tool._of_typical_size(replace(field, labels=labels, phenotypes=field.phenotypes[:2]))
    assert large.mpp * 400 == pytest.approx(196 * 0.25)


def predicted(name: str) -> Prediction:
    """Two nuclei, one of which is hardly more inflammatory than neoplastic."""
    labels = np.zeros((4, 8), np.int32)
    labels[1:3, 1:3], labels[1:3, 5:7] = 1, 2
    cells = np.array([[0.1, 0.8, 0.05, 0.05], [0.2, 0.38, 0.42, 0.0]], np.float32)
    maps = np.zeros((4, 4, 8), np.float32)
    maps[0] = 1
    for i in (0, 1):
        maps[:, labels == i + 1] = cells[i, :, None]
    return Prediction(labels, maps, cells, ("a", "b", "c"), 0.25, name)


def test_classes_are_summed_where_another_dataset_has_others(tool: ModuleType) -> None:
    one = tool._of_one_class(predicted("x"))
    assert one.classes == ("nucleus",)
    np.testing.assert_allclose(one.cell_probabilities, [[0.1, 0.9], [0.2, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(one.probabilities.sum(axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(one.probabilities[1][one.labels == 1], 0.9, rtol=1e-6)


def test_published_model_names_no_path(
    tool: ModuleType, tiny: Tiny, made_data: Path, tmp_path: Path
) -> None:
    small = ("encoder.weights=random", "encoder.options.depth=4", "encoder.options.grid=4")
    config = tiny(made_data, *small, "train.steps=1", "decoder.options={}")
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    rows = [
        {"source": "Other", "images": 3, "score": "bpq", "value": 0.5}
        | {"low": 0.4, "high": 0.6, "apart": "source"}
    ]
    tool.ship(run, made_data / "train", rows, tmp_path / "box" / "nuclei")
    folder = tmp_path / "box" / "nuclei"
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "run.json", "card.yaml"}
    _, header = read_tensors(folder / "model.safetensors")
    for text in (json.dumps(header), *(f.read_text() for f in folder.glob("*.[jy]*"))):
        assert str(made_data.parent) not in text
        assert str(tmp_path) not in text
    card = read_card(folder)
    assert card is not None
    assert card.figures[0].value == 0.5
    assert "diagnosis" in yaml.safe_load((folder / "card.yaml").read_text())["not_for"]
    assert load_model(folder).classes == ("blue", "brown")
