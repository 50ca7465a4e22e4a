"""Nuclei whose class the annotation leaves open: there, but not typed."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from celltyper.config import Config
from celltyper.datasets import TileSampler, split_by_group, write_folder
from celltyper.evaluation import evaluate
from celltyper.objective import objective
from celltyper.readers import open_dataset
from celltyper.targets import Targets, TrainingTiles
from celltyper.types import UNKNOWN, MapSpec, Prediction, Sample

CLASSES = ("tumour", "immune")


def sample(name: str = "a", phenotypes: tuple[int, ...] = (0, 1, 2, UNKNOWN)) -> Sample:
    """Three nuclei of 4 x 4 px in a row."""
    labels = np.zeros((8, 24), np.int32)
    for i in range(3):
        labels[2:6, 8 * i + 2 : 8 * i + 6] = i + 1
    image = np.full((8, 24, 3), 200, np.uint8)
    return Sample(image, labels, np.array(phenotypes, np.uint8), name, name, 0.5)


def prediction(name: str, kinds: tuple[int, int, int]) -> Prediction:
    labels = sample().labels
    probabilities = np.zeros((3, 8, 24), np.float32)
    probabilities[0] = labels == 0
    for i, kind in enumerate(kinds):
        probabilities[kind][labels == i + 1] = 1
    return Prediction(
        labels, probabilities, np.eye(3, dtype=np.float32)[[*kinds]], CLASSES, 0.5, name
    )


def test_scores_of_types_leave_it_out_and_those_of_detection_count_it() -> None:
    """Nucleus 1 right, nucleus 2 (immune) taken for tumour, nucleus 3 of unknown class."""
    found = evaluate([prediction("a", (1, 1, 2))], [sample()], resamples=0)
    assert found.scores["detection_f1"].value == 1
    assert found.scores["bpq"].value == 1
    # tumour: one hit, one false alarm, F1 2/3; immune: one miss, no hit
    assert found.per_class["tumour"]["f1"].value == 2 / 3
    assert found.per_class["immune"]["f1"].value == 0
    assert found.per_class["tumour"]["typed_f1_iou"].value == 2 / 3
    assert found.per_class["immune"]["typed_f1_iou"].value == 0
    np.testing.assert_allclose(found.per_class["tumour"]["pq"].value, 2 / 3)
    assert found.per_class["immune"]["reference"].value == 1
    np.testing.assert_array_equal(found.pairs, [[0, 0, 0], [0, 1, 0], [0, 1, 0]])
    whatever = evaluate([prediction("a", (1, 1, 1))], [sample()], resamples=0)
    for name in ("macro_f1", "typed_f1", "typed_f1_iou", "mpq_plus"):
        assert whatever.scores[name].value == found.scores[name].value


def test_its_pixels_are_ignored_by_the_class_loss_and_used_by_the_instance_loss() -> None:
    class Method:
        maps: ClassVar = {"inside": MapSpec(1, "sigmoid", "mse")}

        def encode(self, labels: np.ndarray) -> dict[str, np.ndarray]:
            return {"inside": (labels > 0).astype(np.float32)[None]}

    config = Config.model_validate(
        {"data": {"tile": 32}, "infer": {"overlap": 0}, "augment": {"dihedral": False}}
    )
    still = dict.fromkeys(("affine_probability", "elastic", "hed_sigma", "hed_bias"), 0.0)
    still |= dict.fromkeys(("color", "blur", "noise"), 0.0)
    config = config.model_copy(update={"augment": config.augment.model_copy(update=still)})
    sampler = TileSampler([sample()], 32, balance=0.5, seed=0)
    item = TrainingTiles(sampler, Targets(sampler.samples, Method()), config)[0]
    inside = item["inside"][0] > 0
    ignored = item["phenotype"] == -1
    assert ignored.any()
    assert (item["phenotype"][~inside] == 0).all()
    assert inside[ignored].all()
    targets = {k: v[None] for k, v in item.items() if k != "image"}
    maps = {"phenotype": MapSpec(3, "softmax", "bce_dice"), **Method.maps}
    logits = torch.zeros(1, 3, 32, 32, requires_grad=True)
    raw = {"phenotype": logits, "inside": torch.zeros(1, 1, 32, 32)}
    value = objective(raw, targets, maps, config.loss)
    value.backward()
    assert logits.grad is not None
    assert not logits.grad[0, :, ignored].any()
    assert logits.grad[0, :, ~ignored].any(dim=0).all()
    # the instance loss sees its pixels: without them the target would be met
    raw["inside"] = (inside & ~ignored)[None, None].float()
    missed = objective(raw, targets, maps, config.loss)
    raw["inside"] = inside[None, None].float()
    assert objective(raw, targets, maps, config.loss) < missed


def test_sampler_and_split_count_known_classes_only() -> None:
    samples = [sample("a"), sample("b", (0, 1, 1, UNKNOWN))]
    sampler = TileSampler(samples, 8, balance=1.0, seed=0)
    np.testing.assert_array_equal(sampler.cells, [3, 1])
    # 16 px a nucleus; the two unknown ones are in no class and not background
    np.testing.assert_array_equal(sampler.pixels, [2 * (192 - 48), 48, 16])
    nobody = TileSampler([sample("a", (0, UNKNOWN, UNKNOWN, UNKNOWN))], 8, balance=1.0, seed=0)
    assert nobody.tile(3).image.shape == (8, 8, 3)


def test_nuclei_of_unknown_class_are_drawn_as_one_class_more() -> None:
    image = np.full((64, 64, 3), 200, np.uint8)
    labels = np.zeros((64, 64), np.int32)
    labels[4:8, 4:8], labels[50:54, 50:54] = 1, 2
    both = Sample(image, labels, np.array([0, 1, UNKNOWN], np.uint8), "both")
    sampler = TileSampler([both], 9, balance=1.0, seed=0, random_share=0.0, jitter=0.0)
    middles = [(place.row + 4, place.col + 4) for place in map(sampler.place, range(200))]
    assert set(middles) == {(6, 6), (52, 52)}
    assert 70 < middles.count((52, 52)) < 130


def test_folder_keeps_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", [sample("a"), sample("b")], CLASSES, 0.5)
    data = open_dataset(tmp_path / "data")
    np.testing.assert_array_equal(data["a"].phenotypes, [0, 1, 2, UNKNOWN])
    rest, held_out = split_by_group(data, 0.5, seed=0)
    assert len(rest) == len(held_out) == 1
