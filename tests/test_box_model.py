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
from skimage.color import rgb2lab

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
    # as for a script, whose neighbours it may import
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
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


def test_tissue_gets_the_colors_of_a_known_stain(tool: ModuleType) -> None:
    rng = np.random.default_rng(0)
    pale = rng.normal((220, 200, 215), 8, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    dark = rng.normal((120, 70, 140), 20, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    pale[:10] = 0  # outside its slide
    changed = tool.stained_like(pale, tool.colors(dark))
    assert (changed[:10] == 0).all()
    means, deviations = (
        [getattr(rgb2lab(image), how)(axis=(0, 1)) for image in (changed[10:], dark)]
        for how in ("mean", "std")
    )
    np.testing.assert_allclose(*means, atol=1)
    np.testing.assert_allclose(*deviations, atol=1)


def test_labels_of_a_teacher(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mitotic figure in the middle of a window, a doubtful nucleus, one on black, a sure one."""
    labels = np.zeros((512, 512), np.int32)
    cells = {1: (60, 60), 2: (20, 20), 3: (20, 240), 4: (20, 400)}
    for i, (row, col) in cells.items():
        labels[row : row + 8, col : col + 8] = i
    chances = np.array(
        [[0, 0.1, 0.9, 0], [0.1, 0.45, 0.45, 0], [0, 0.9, 0.1, 0], [0.3, 0, 0.1, 0.6]], np.float32
    )
    image = np.full((512, 512, 3), 200, np.uint8)
    image[:128, 236:256] = 0
    maps = np.zeros((4, 512, 512), np.float32)
    found = Prediction(labels, maps, chances, tool.CLASSES, 0.25, "x")
    monkeypatch.setattr(tool, "predict_image", lambda *_, **__: found)
    sample = tool._unlabelled(image, "amibr-000", 0.25)
    known = tool._labelled(None, sample, tool.colors(image))
    assert {
        int(known.labels[r, c]): int(known.phenotypes[known.labels[r, c]])
        for r, c in cells.values()
    } == {
        1: 1,  # neoplastic, as all mitotic figures there
        2: UNKNOWN,
        0: 0,
        4: 3,
    }


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
    files = {"model.safetensors", "run.json", "card.yaml", "config.yaml"}
    assert {p.name for p in folder.iterdir()} == files
    _, header = read_tensors(folder / "model.safetensors")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == header["config"]
    for text in (json.dumps(header), *(f.read_text() for f in folder.glob("*.[jy]*"))):
        assert str(made_data.parent) not in text
        assert str(tmp_path) not in text
    card = read_card(folder)
    assert card is not None
    assert card.figures[0].value == 0.5
    assert "diagnosis" in yaml.safe_load((folder / "card.yaml").read_text())["not_for"]
    assert load_model(folder).classes == ("blue", "brown")
