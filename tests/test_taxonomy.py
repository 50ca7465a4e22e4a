"""Taxonomies, and what partly annotated images mean for the loss and the scores."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from celltyper import losses
from celltyper.config import Config
from celltyper.datasets import Dataset, TileSampler, resample, write_folder
from celltyper.datasets.taxonomy import Taxonomy, apply_taxonomy, read_taxonomy
from celltyper.errors import DataError
from celltyper.evaluation import evaluate
from celltyper.objective import objective
from celltyper.readers import open_dataset, open_sources
from celltyper.targets import Targets, TrainingTiles
from celltyper.types import UNKNOWN, MapSpec, Prediction, Sample

FINE = ("plasma", "tumour", "lymphocyte", "dirt", "other")
RULES = """
classes:
  tumour: [tumour]
  immune: [lymphocyte, plasma]
  nerve: []
unknown: [other]
drop: [dirt]
"""


def fine(name: str = "a") -> Sample:
    """Labels 2, 3, 5, 7, 9 in a row, one of each class of `FINE` in that order."""
    labels = np.zeros((8, 40), np.int32)
    table = np.zeros(10, np.uint8)
    for i, label in enumerate((2, 3, 5, 7, 9)):
        labels[2:6, 8 * i + 2 : 8 * i + 6] = label
        table[label] = i + 1
    return Sample(np.full((8, 40, 3), 200, np.uint8), labels, table, name, name, 0.5)


def of(
    sample: Sample,
    name: str = "Made",
    classes: tuple[str, ...] = FINE,
    colors: tuple[str, ...] = (),
) -> Dataset:
    read = {sample.name: sample}.__getitem__
    groups = {sample.name: sample.group}
    return Dataset(name, Path("made"), classes, 0.5, (sample.name,), groups, read, colors=colors)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Taxonomy]:
    def write(text: str) -> Taxonomy:
        (tmp_path / "t.yaml").write_text(text)
        return read_taxonomy(tmp_path / "t.yaml")

    return write


# ---------------------------------------------------------------- rules


def test_classes_are_merged_kept_open_and_dropped(written: Callable[[str], Taxonomy]) -> None:
    data = apply_taxonomy(of(fine()), written(RULES))
    assert data.classes == ("tumour", "immune", "nerve")
    sample = pickle.loads(pickle.dumps(data))["a"]
    # plasma 2, tumour 3, lymphocyte 5, dirt 7 (gone), other 9
    np.testing.assert_array_equal(sample.phenotypes, [0, 0, 2, 1, 0, 2, 0, 0, 0, UNKNOWN])
    wanted = fine().labels
    wanted[wanted == 7] = 0
    np.testing.assert_array_equal(sample.labels, wanted)
    assert sample.unannotated == (3,)
    assert resample(sample, 1.0).unannotated == (3,)
    image, labels = data.read_window("a", 0, 24, 8, 16)
    assert image.shape == (8, 16, 3)
    np.testing.assert_array_equal(np.unique(labels), [0, 9])


def test_the_highest_id_may_be_dropped(written: Callable[[str], Taxonomy]) -> None:
    rules = written("{classes: {a: [plasma, tumour, lymphocyte, dirt]}, drop: [other]}")
    sample = apply_taxonomy(of(fine()), rules)["a"]
    assert sample.labels.max() == 7
    np.testing.assert_array_equal(sample.phenotypes, [0, 0, 1, 1, 0, 1, 0, 1])
    assert sample.unannotated == ()


def test_colors_stay_where_every_class_has_one(written: Callable[[str], Taxonomy]) -> None:
    colors = ("#000001", "#000002", "#000003", "#000004", "#000005")
    data = of(fine(), colors=colors)
    assert apply_taxonomy(data, written(RULES)).colors == ()
    rules = written(RULES.replace("  nerve: []\n", ""))
    assert apply_taxonomy(data, rules).colors == ("#000002", "#000003")


def test_a_class_with_an_unannotated_source_is_unannotated(
    written: Callable[[str], Taxonomy],
) -> None:
    """Lymphocytes are not annotated in this image, so its background may hold immune cells."""
    data = of(replace(fine(), unannotated=(3,)))
    assert apply_taxonomy(data, written(RULES))["a"].unannotated == (2, 3)


def test_datasets_have_rules_of_their_own(written: Callable[[str], Taxonomy]) -> None:
    rules = written(
        "classes: {tumour: [tumour, neoplastic], immune: [inflammatory]}\n"
        "datasets: {MADE: {classes: {immune: [plasma, lymphocyte], tumour: [tumour]}, "
        "drop: [dirt, other]}}"
    )
    assert apply_taxonomy(of(fine()), rules)["a"].phenotypes[[2, 3, 5]].tolist() == [2, 1, 2]
    # the shared rules may list what other datasets have
    shared = apply_taxonomy(of(fine(), "PanNuke", ("neoplastic",) * 5), rules)
    assert shared.classes == ("tumour", "immune")
    assert shared["a"].unannotated == (2,)
    alone = written("datasets: {lizard: {classes: {b: [b]}}, monusac: {classes: {c: [c], b: [x]}}}")
    assert alone.classes == ("b", "c")
    with pytest.raises(
        DataError, match=r"no rules for dataset 'Made' \(there are: lizard, monusac"
    ):
        apply_taxonomy(of(fine()), alone)


def test_everything_that_does_not_fit_is_listed(written: Callable[[str], Taxonomy]) -> None:
    rules = written("{classes: {a: [tumour, Plasma, stroma]}, drop: [dirt]}")
    with pytest.raises(
        DataError,
        match=r"'Made', the taxonomy says nothing of 'plasma', 'lymphocyte', 'other' and lists "
        r"'Plasma', 'stroma', which it does not have",
    ):
        apply_taxonomy(of(fine()), rules)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{classes: {a: [x, y], b: [y]}, drop: [x]}", "mentioned twice: 'x', 'y'"),
        ("{classes: {a: [x]}, ignore: [y]}", "unknown key 'ignore' (known: classes, unknown, drop"),
        ("classes: {a: [x], a: [y]}", "key 'a' is given twice"),
        ("classes: {a: [x], ' A': [y]}", "differ only in case or blanks"),
        ("classes: {a: x}", "class 'a': must be a list of source classes, got 'x'"),
        ("classes: [a]", "'classes' must be {new class: [source classes]}"),
        ("drop: [x]", "0 new classes"),
        ("[a]", "must hold 'classes:"),
        ("classes: {a: [", "not readable as YAML"),
        ("datasets: {Lizard: {classes: {a: [x]}}, lizard: {}}", "twice, in different case"),
        ("datasets: {lizard: {class: {a: [x]}}}", "dataset lizard: unknown key 'class'"),
    ],
)
def test_wrong_files_say_what_is_wrong(
    text: str, said: str, written: Callable[[str], Taxonomy]
) -> None:
    with pytest.raises(DataError) as caught:
        written(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_of_a_store_share_rules(tmp_path: Path) -> None:
    for name, classes in (("one", ("x", "y")), ("two", ("y", "z"))):
        sample = replace(fine(), phenotypes=np.minimum(fine().phenotypes, 2))
        write_folder(tmp_path / name, [sample], classes, 0.5)
    rules = tmp_path / "t.yaml"
    rules.write_text("classes: {ex: [x], why: [y], zed: [z]}")
    paths = [tmp_path / "one", tmp_path / "two"]
    one, two = (s.dataset for s in open_sources(paths, taxonomy=rules, mpp=0.25))
    assert (one["a"].unannotated, two["a"].unannotated) == ((3,), (1,))
    assert two["a"].mpp == two.mpp == 0.25
    np.testing.assert_array_equal(two["a"].phenotypes[[2, 3]], [2, 3])
    with pytest.raises(DataError, match="lists 'z', which it does not have"):
        open_dataset(paths[0], taxonomy=rules)


# ---------------------------------------------------------------- loss

P = torch.tensor([0.5, 0.2, 0.3])


def logits_of(*probabilities: torch.Tensor) -> torch.Tensor:
    """One image of one row."""
    return torch.log(torch.stack(probabilities, dim=1))[None, :, None, :].clone().requires_grad_()


def test_background_is_background_or_any_unannotated_class() -> None:
    """-log(p0 + p2); d/dz_j is p_j - p_j / (p0 + p2) inside the set and p_j outside."""
    logits = logits_of(P)
    open_ = torch.tensor([[False, False, True]])
    loss = losses.cross_entropy(
        logits, torch.tensor([[[0]]]), label_smoothing=0.0, unannotated=open_
    )
    assert loss.item() == pytest.approx(-math.log(0.8), rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    wanted = [0.5 - 0.5 / 0.8, 0.2, 0.3 - 0.3 / 0.8]
    np.testing.assert_allclose(logits.grad[0, :, 0, 0], wanted, rtol=1e-5)


def test_nuclei_weights_and_smoothing_of_a_partly_annotated_image() -> None:
    """Pixels: background, a nucleus of class 1, one of unknown class."""
    logits = logits_of(P, P, P)
    weights = torch.tensor([0.5, 2.0, 1.0])
    loss = losses.cross_entropy(
        logits,
        torch.tensor([[[0, 1, -1]]]),
        weights,
        label_smoothing=0.3,
        unannotated=torch.tensor([[False, False, True]]),
    )
    spread = -(0.5 * math.log(0.5) + 2 * math.log(0.2) + 1 * math.log(0.3)) / 3
    background = 0.7 * 0.5 * -math.log(0.8) + 0.3 * spread
    nucleus = 0.7 * 2 * -math.log(0.2) + 0.3 * spread
    assert loss.item() == pytest.approx((background + nucleus) / 2.5, rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[..., 2].any()


def test_images_annotated_in_full_are_torchs_cross_entropy() -> None:
    """A batch of both kinds: the mean of each, weighted by its weights."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(2, 4, 5, 6, generator=generator)
    target = torch.randint(-1, 4, (2, 5, 6), generator=generator)
    target[1][target[1] == 0] = 2  # no background in the partly annotated one
    weights = torch.tensor([0.3, 1.0, 2.0, 0.7])
    open_ = torch.tensor([[False] * 4, [False, True, True, False]])
    found = losses.cross_entropy(logits, target, weights, 0.1, unannotated=open_)
    wanted = torch.nn.functional.cross_entropy(
        logits, target, weights, ignore_index=-1, label_smoothing=0.1
    )
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_instance_losses_by_hand_on_valid_pixels() -> None:
    pred = torch.tensor([[[[0.0, 3.0, 9.0]]]])
    target = torch.tensor([[[[0.5, 0.0, 0.0]]]])
    valid = torch.tensor([[[[True, True, False]]]])
    for name, wanted in (("mse", (0.25 + 9) / 2), ("smooth_l1", (0.125 + 2.5) / 2)):
        loss = losses.map_loss(name)(pred, target, valid, valid)  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(wanted)
    logit, mask = torch.zeros(1, 1, 1, 3), torch.tensor([[[[1.0, 0.0, 0.0]]]])
    # half of two pixels: entropy log 2; dice (2 * .5 + 1) / (1 + 1 + 1)
    loss = losses.map_loss("bce_dice")(logit, mask, valid, valid)
    assert loss.item() == pytest.approx(math.log(2) + 1 - 2 / 3)
    two = torch.tensor([[[[1.0, 9.0]], [[1.0, 9.0]]]])
    nothing = torch.zeros(1, 1, 1, 2, dtype=torch.bool)
    loss = losses.map_loss("hv")(two, 0 * two, nothing, torch.tensor([[[[True, False]]]]))
    assert loss.item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["mse", "smooth_l1", "bce_dice", "hv"])
def test_instance_losses_ignore_what_is_there(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    pred = torch.randn(1, 2, 6, 12, generator=generator, requires_grad=True)
    target = torch.rand(1, 2, 6, 12, generator=generator)
    nuclei = torch.zeros(1, 1, 6, 12, dtype=torch.bool)
    nuclei[..., :3] = True
    valid = torch.ones(1, 1, 6, 12, dtype=torch.bool)
    valid[..., 6:] = False
    loss = losses.map_loss(name)(pred, target, nuclei, valid)  # type: ignore[arg-type]
    loss.backward()
    assert pred.grad is not None
    assert not pred.grad[..., 6:].any()
    assert pred.grad[..., :6].any()
    cut = losses.map_loss(name)(pred[..., :6], target[..., :6], nuclei[..., :6])  # type: ignore[arg-type]
    if name != "hv":  # its kernel continues the edge of the cut
        assert loss.item() == pytest.approx(cut.item(), rel=1e-5)


class Inside:
    """An instance method of one map."""

    maps: ClassVar = {"inside": MapSpec(1, "sigmoid", "mse")}

    def encode(self, labels: np.ndarray) -> dict[str, np.ndarray]:
        return {"inside": (labels > 0).astype(np.float32)[None]}


def test_tiles_carry_it_and_the_objective_uses_it() -> None:
    config = Config.model_validate({"data": {"tile": 32}, "infer": {"overlap": 0}})
    whole, partial = fine("whole"), replace(fine("partial"), unannotated=(2, 4))
    alone = TrainingTiles(TileSampler([whole], 40, 0.5, seed=0), Targets([whole], Inside()), config)
    assert "unannotated" not in alone[0]
    sampler = TileSampler([whole, partial], 40, 0.5, seed=0)
    tiles = TrainingTiles(sampler, Targets(sampler.samples, Inside()), config)
    seen = set()
    for index in range(12):
        item = tiles[index]
        name = sampler.samples[sampler.place(index).sample].name
        # the image itself says where it is from
        np.testing.assert_array_equal(sampler.tile(index).image.shape, (40, 40, 3))
        seen.add(name)
        wanted = [False, False, True, False, True] if name == "partial" else [False] * 5
        assert item["unannotated"].tolist() == wanted
    assert seen == {"whole", "partial"}


def test_objective_leaves_open_background_to_the_cross_entropy() -> None:
    """Pixels: background of a partly annotated image, a nucleus of class 1 in it."""
    maps = {"phenotype": MapSpec(3, "softmax", "bce_dice"), **Inside.maps}
    targets = {
        "phenotype": torch.tensor([[[0, 1]]]),
        "inside": torch.tensor([[[[0.0, 1.0]]]]),
        "unannotated": torch.tensor([[False, False, True]]),
    }
    raw = {"phenotype": logits_of(P, P), "inside": torch.tensor([[[[7.0, 0.5]]]])}
    none = dict.fromkeys(("cross_entropy", "dice", "focal", "instances", "label_smoothing"), 0.0)
    terms = {
        "cross_entropy": (-math.log(0.8) - math.log(0.2)) / 2,
        # of class 1 alone, over its pixel alone: 1 - (2 * .2 + 1) / (.2 + 1 + 1)
        "dice": 1 - 1.4 / 2.2,
        "focal": 0.8**2 * -math.log(0.2),
        "instances": 0.25,
    }
    base = Config().loss
    for term, wanted in terms.items():
        loss = base.model_copy(update=none | {term: 1.0})
        found = objective(raw, targets, maps, loss)
        assert found.item() == pytest.approx(wanted, rel=1e-5), term
    # the mask may be shorter than the classes are many
    short = targets | {"unannotated": torch.tensor([[False, True]])}
    loss = base.model_copy(update=none | {"cross_entropy": 1.0})
    wanted = (-math.log(0.7) - math.log(0.2)) / 2
    assert objective(raw, short, maps, loss).item() == pytest.approx(wanted, rel=1e-5)


# ---------------------------------------------------------------- scores


def prediction(kinds: tuple[int, ...], name: str = "a") -> Prediction:
    """Cells of these classes where the five nuclei are."""
    labels = np.searchsorted([0, 2, 3, 5, 7, 9], fine().labels).astype(np.int32)
    probabilities = np.zeros((4, 8, 40), np.float32)
    for i, kind in enumerate(kinds):
        probabilities[kind][labels == i + 1] = 1
    probabilities[0][labels == 0] = 1
    cells = np.eye(4, dtype=np.float32)[[*kinds]]
    return Prediction(labels, probabilities, cells, ("x", "y", "z"), 0.5, name)


def partly(unannotated: tuple[int, ...], name: str = "a") -> Sample:
    """The first two nuclei are annotated, both of class 1."""
    labels = np.where(fine().labels > 3, 0, fine().labels).astype(np.int32)
    table = np.array([0, 0, 1, 1], np.uint8)
    return replace(fine(), labels=labels, phenotypes=table, name=name, unannotated=unannotated)


def test_cells_of_unannotated_classes_are_no_false_alarms() -> None:
    """Predicted x, z on the two nuclei; y, z, z where nothing is annotated."""
    guess = prediction((1, 3, 2, 3, 3))
    full = evaluate([guess], [partly(())], resamples=0)
    assert full.scores["detection_f1"].value == pytest.approx(2 * 2 / (2 * 2 + 3))
    found = evaluate([guess], [partly((3,))], resamples=0)
    # the two z in the background are left out, y is a false alarm
    assert found.scores["detection_f1"].value == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert found.scores["bpq"].value == pytest.approx(2 / 2.5)
    assert found.scores["aji"].value == pytest.approx(32 / 48)
    # x: one hit, one miss; y: false alarm only; z is annotated nowhere and has no score
    assert found.per_class["x"]["typed_f1_iou"].value == pytest.approx(2 / 3)
    assert found.per_class["y"]["typed_f1_iou"].value == 0
    assert math.isnan(found.per_class["z"]["typed_f1_iou"].value)
    assert math.isnan(found.per_class["z"]["f1"].value)
    assert found.scores["typed_f1_iou"].value == pytest.approx(1 / 3)
    # on reference nuclei: x has one hit and one miss; nothing is said of y
    assert found.scores["macro_f1"].value == pytest.approx(2 / 3)


def test_a_class_that_another_image_annotates_is_scored_there() -> None:
    """The count of z is judged by the images that annotate it."""
    guesses = [prediction((1, 3, 3, 3, 3), n) for n in "abc"]
    other = replace(partly((), "b"), phenotypes=np.array([0, 0, 1, 3], np.uint8))
    third = replace(partly((), "c"), phenotypes=np.array([0, 0, 3, 3], np.uint8))
    found = evaluate(guesses, [partly((3,)), other, third], resamples=0)
    # z of b and c, annotated 1 and 2, predicted 4 and 4: 1 - (9 + 4) / .5
    assert found.per_class["z"]["count_r2"].value == pytest.approx(1 - 13 / 0.5)
    # a: wrong z on a nucleus of class x; b: hit, 3 false alarms; c: hit, miss, 3 false alarms
    assert found.per_class["z"]["typed_f1_iou"].value == pytest.approx(2 * 2 / (2 * 2 + 1 + 6 + 1))
