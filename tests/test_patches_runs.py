"""Runs of patch mode: what is fitted, what is written, and what is refused before that."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage.draw import disk
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torchmetrics.classification import BinaryCalibrationError

from celltyper.checkpoints import load_model, read_tensors, save_model, write_tensors
from celltyper.classification.config import PatchConfig
from celltyper.classification.embedding import Embedder, embed_table
from celltyper.classification.evaluating import evaluate_patches
from celltyper.classification.inference import infer_patches
from celltyper.classification.model import load_patch_model
from celltyper.classification.training import train_patches
from celltyper.config import Config, load_config, parse_config
from celltyper.encoders import load_encoder
from celltyper.errors import CheckpointError, ConfigError, DataError
from celltyper.models import build_model
from celltyper.patches.reading import open_patches
from celltyper.patches.table import PatchTable
from celltyper.probes import fit_probe

ENCODER = "vit_small_patch14_dinov2"
VIEW = ("view.input=56", "view.pool=cls+mean+center", "data.size=48")
SLIDES, EACH = 12, 6


class Made(NamedTuple):
    """Discs (Normal) and bars (Atypical), a third of them bars, on slides of three data sets."""

    root: Path
    cache: Path


def picture(rng: np.random.Generator, bar: bool) -> np.ndarray:
    image = rng.normal((225, 190, 215), 25, (56, 56, 3))
    row, col = 28 + rng.integers(-4, 5, 2)
    inside = np.zeros((56, 56), bool)
    if bar:
        inside[row - 4 : row + 4, col - 14 : col + 14] = True
    else:
        inside[disk((row, col), 8.5)] = True
    image[inside] -= rng.uniform(30, 90)
    return image.clip(0, 255).astype(np.uint8)


def write_ami_br(root: Path, slides: int = SLIDES, bars: Callable[[int, int], bool] | None = None):
    """As AMi-Br: class folders, and a table of slides and votes of three experts beside them."""
    bars = bars or (lambda slide, i: i % 3 == 0)
    rng, rows = np.random.default_rng(0), []
    for slide in range(slides):
        for i in range(EACH):
            bar = bars(slide, i)
            label, dataset = ("Normal", "Atypical")[bar], "ABC"[slide % 3]
            file = root / label / f"{dataset}_{EACH * slide + i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(rng, bar)).save(file)
            votes = [bar] * 3
            if rng.random() < 0.4:
                votes[rng.integers(3)] ^= True
            # two data sets may number their slides alike
            rows.append([f"{slide // 3:03}.tiff", dataset, label, file.name, 900, 800, *votes])
    with (root / "made.csv").open("w", newline="") as stream:
        out = csv.writer(stream)
        experts = [f"expert{n}_atypical" for n in (1, 2, 3)]
        out.writerow(["slide", "dataset", "final_label", "dataset_uid", "x", "y", *experts])
        out.writerows(rows)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("CELLTYPER_CACHE", str(cache))
        yield Made(write_ami_br(tmp_path_factory.mktemp("made")), cache)


def config_of(root: Path, *overrides: str) -> PatchConfig:
    values = {"data": {"root": str(root)}, "encoder": {"name": ENCODER, "weights": "twin"}}
    return parse_config(values, [*VIEW, *overrides], PatchConfig)


@pytest.fixture(scope="module")
def run(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a third of the slides for validation."""
    config = config_of(made.root, "data.val_fraction=0.34", "seed=3")
    folder = tmp_path_factory.mktemp("run") / "run"
    return train_patches(config, folder, device="cpu", progress=False)


@pytest.fixture
def train(made: Made, tmp_path: Path) -> Callable[..., Path]:
    def start(*overrides: str, root: Path = made.root, **options: Any) -> Path:
        config = config_of(root, *overrides)
        return train_patches(config, tmp_path / "run", device="cpu", progress=False, **options)

    return start


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that encoders have seen, one entry a batch."""
    seen: list[int] = []
    embed = Embedder.__call__

    def counted(self: Embedder, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(Embedder, "__call__", counted)
    return seen


def facts_of(run: Path) -> Any:
    return json.loads((run / "run.json").read_text())


def embeddings_of(table: PatchTable, folder: Path, seed: int = 0, **more: Any) -> np.ndarray:
    """Of the encoder and view that all runs here have, computed apart from any run."""
    encoder = load_encoder(ENCODER, weights="twin", seed=seed)
    embedder = Embedder(encoder, "cls+mean+center", 56)
    return embed_table(embedder, table, folder / "own", size=48, **more)


def rows_named(table: PatchTable, names: list[str]) -> np.ndarray:
    return np.array([table.names.index(name) for name in names])


# ---------------------------------------------------------------- the run folder


def test_run_folder_says_what_ran_on_what(run: Path, made: Made) -> None:
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "model.safetensors",
        "run.json",
    }
    facts, table = facts_of(run), open_patches(made.root)
    assert (facts["task"], facts["seed"], facts["size"]) == ("patches", 3, 48)
    assert facts["classes"] == ["Atypical", "Normal"]
    assert facts["positive"] == "Atypical"  # the rarer one
    assert facts["encoder_passes"] == SLIDES * EACH
    train, val = facts["data"]["train"], facts["data"]["val"]
    assert sorted(train["names"] + val["names"]) == sorted(table.names)
    assert not set(train["groups"]) & set(val["groups"])
    assert len(set(val["groups"])) == 4
    for part in (train, val):
        rows = rows_named(table, part["names"])
        assert part["groups"] == [table.groups[i] for i in rows]
        assert part["patches"] == len(rows)
        assert part["classes"] == {
            "Atypical": sum("Atypical/" in name for name in part["names"]),
            "Normal": sum("Normal/" in name for name in part["names"]),
        }
    written = load_config(run / "config.yaml", (), PatchConfig)
    assert written.data.root == made.root
    assert (written.data.size, written.data.classes) == (48, ("Atypical", "Normal"))
    assert (written.data.positive, written.encoder.weights) == ("Atypical", "twin")


def test_loaded_model_is_the_head_by_hand(run: Path, made: Made, tmp_path: Path) -> None:
    table = open_patches(made.root).take(np.arange(0, 40, 3))
    head = {k: v.numpy() for k, v in load_file(run / "model.safetensors").items()}
    assert {name: value.shape for name, value in head.items()} == {"weight": (144, 2), "bias": (2,)}
    logits = embeddings_of(table, tmp_path, seed=3)[:, 0] @ head["weight"] + head["bias"]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for path in (run, run / "model.safetensors"):
        model = load_patch_model(path)
        found = model.probabilities(table, progress=False)
        np.testing.assert_allclose(found, expected, atol=1e-9)
    assert (model.classes, model.positive) == (("Atypical", "Normal"), 0)
    assert (model.size, model.mpp, model.threshold) == (48, None, facts_of(run)["threshold"])
    # more symmetries than it was trained with: their mean
    turned = embeddings_of(table, tmp_path, seed=3, symmetries=4)
    logits = turned @ head["weight"] + head["bias"]
    shares = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    found = model.probabilities(table, symmetries=4, progress=False)
    np.testing.assert_allclose(found, shares.mean(1), atol=1e-9)
    assert np.abs(found - expected).max() > 1e-3


def test_no_weight_of_the_encoder_is_written(run: Path) -> None:
    stored = load_file(run / "model.safetensors")
    encoder = load_encoder(ENCODER, weights="twin", seed=3)
    assert sum(tensor.numel() for tensor in stored.values()) == 2 * 144 + 2
    shapes = {tuple(parameter.shape) for parameter in encoder.parameters()}
    assert not shapes & {tuple(tensor.shape) for tensor in stored.values()}
    assert sum(path.stat().st_size for path in run.iterdir()) < 100_000


def test_other_weights_of_the_encoder_are_refused(run: Path, tmp_path: Path) -> None:
    other = Embedder(load_encoder(ENCODER, weights="twin", seed=4), "cls+mean+center", 56)
    with pytest.raises(CheckpointError, match=r"trained on other weights of vit_small.*--weights"):
        load_patch_model(run, embedder=other)
    tensors, header = read_tensors(run / "model.safetensors")
    header["config"]["encoder"]["options"] = {"mean": [0.5, 0.5, 0.5]}
    write_tensors(tmp_path / "model.safetensors", tensors, header)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        load_patch_model(tmp_path)


def test_damaged_missing_and_later_models_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"give a run that .celltyper train. wrote"):
        load_patch_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes((run / "model.safetensors").read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="is damaged or was not written by celltyper"):
        load_patch_model(tmp_path)
    tensors, header = read_tensors(run / "model.safetensors")
    write_tensors(file, tensors, header | {"format": 99, "celltyper_version": "9.1"})
    with pytest.raises(CheckpointError, match=r"format 99, this .* use celltyper 9\.1"):
        load_patch_model(tmp_path)


def test_models_of_the_other_task_are_refused(
    run: Path, tiny: Callable[..., Config], tmp_path: Path, celltyper_command: Callable[..., Any]
) -> None:
    with pytest.raises(CheckpointError, match="types patches: it does not find cells on images"):
        load_model(run)
    config = tiny(tmp_path)
    cells = build_model(config, ("a", "b"), 0.5)
    save_model(tmp_path / "model.safetensors", cells, config)
    with pytest.raises(CheckpointError, match="finds cells on images: it does not type patches"):
        load_patch_model(tmp_path)


# ---------------------------------------------------------------- again, and again otherwise


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_finished_run_is_left_alone_unless_overwritten(
    train: Callable[..., Path], passes: list[int]
) -> None:
    run = train("view.symmetries=2")
    assert sum(passes) == 2 * SLIDES * EACH
    before, written = contents(run), (run / "model.safetensors").stat().st_mtime_ns
    assert train("view.symmetries=2", resume=True) == run
    assert (run / "model.safetensors").stat().st_mtime_ns == written
    assert contents(run) == before
    with pytest.raises(ConfigError, match=r"already holds a run; pass --resume .* --overwrite"):
        train("view.symmetries=2")
    with pytest.raises(ConfigError, match=r"another config \(loss.class_weights: 'balanced' then"):
        train("view.symmetries=2", "loss.class_weights=none", resume=True)
    assert contents(run) == before
    train("loss.class_weights=none", overwrite=True)
    assert facts_of(run)["probe"]["class_weights"] == "none"
    assert facts_of(run)["encoder_passes"] == SLIDES * EACH
    (run / "model.safetensors").unlink()
    train("view.symmetries=2", overwrite=True)
    assert contents(run)["model.safetensors"] == before["model.safetensors"]


def test_an_unfinished_run_goes_on(train: Callable[..., Path], passes: list[int]) -> None:
    run = train()
    before = contents(run)
    passes.clear()
    for name in ("run.json", "model.safetensors"):
        (run / name).unlink()
    with pytest.raises(ConfigError, match="already holds a run"):
        train()
    train(resume=True)
    assert not passes  # what was embedded stays
    after = contents(run)
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after["config.yaml"] == before["config.yaml"]
    assert after.keys() == before.keys()


# ---------------------------------------------------------------- the threshold


def test_threshold_is_the_best_of_the_validation_windows(run: Path, made: Made) -> None:
    facts, table = facts_of(run), open_patches(made.root)
    assert facts["threshold_from"] == "validation"
    rows = rows_named(table, facts["data"]["val"]["names"])
    found = load_patch_model(run).probabilities(table.take(rows), progress=False)[:, 0]
    truth = table.labels[rows] == 0

    def score(threshold: float) -> float:
        return float(metrics.balanced_accuracy_score(truth, found >= threshold))

    ordered = np.sort(found)
    middles = [0.0, *((ordered[1:] + ordered[:-1]) / 2)]
    best = max(map(score, middles))
    assert score(facts["threshold"]) == pytest.approx(best)
    nearest = min(abs(t - 0.5) for t in middles if score(t) > best - 1e-9)
    assert abs(facts["threshold"] - 0.5) == pytest.approx(nearest, abs=1e-9)
    # it is not that of the training windows, and not one half
    assert 0 < best < 1
    assert abs(facts["threshold"] - 0.5) > 1e-3


def test_probabilities_are_scaled_by_the_validation_windows(
    train: Callable[..., Path], run: Path, made: Made, tmp_path: Path
) -> None:
    plain = run
    run = train("data.val_fraction=0.34", "seed=3", "calibration.min_cases=20")
    facts, table = facts_of(run), open_patches(made.root)
    rows = rows_named(table, facts["data"]["val"]["names"])
    model = load_patch_model(run)
    view = model.how(symmetries=None, progress=False)
    raw = model.predictor.probabilities(table.take(rows), **view)
    # of two classes the temperature is that of a regression on the difference of logarithms
    logs = np.log(raw)
    regression = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
    regression.fit(logs[:, 1:] - logs[:, :1], table.labels[rows])
    weight = float(regression.coef_[0, 0])
    assert facts["calibration"]["scaling"]["weight"] == pytest.approx([weight] * 2, rel=1e-3)
    assert facts["calibration"]["cases"] == len(rows)
    odds = (raw[:, 0] / raw[:, 1]) ** weight
    found = model.probabilities(table.take(rows), progress=False)
    np.testing.assert_allclose(found[:, 0], odds / (1 + odds), atol=1e-4)
    # the threshold is one of these probabilities
    truth = table.labels[rows] == 0

    def score(threshold: float) -> float:
        return float(metrics.balanced_accuracy_score(truth, found[:, 0] >= threshold))

    assert score(facts["threshold"]) == pytest.approx(max(map(score, found[:, 0])))

    done = evaluate_patches(
        run, made.root, tmp_path / "eval", split="val", resamples=0, device="cpu", progress=False
    )
    said = json.loads((done.folder / "metrics.json").read_text())
    error = BinaryCalibrationError(n_bins=15)
    for name, own in (("before", raw), ("after", found)):
        wanted = float(error(torch.from_numpy(own[:, 0]), torch.from_numpy(truth)))
        assert said["expected_calibration_error"][name] == pytest.approx(wanted, abs=1e-6)
    after = said["expected_calibration_error"]["after"]
    assert said["scores"]["ece"]["value"] == pytest.approx(after)
    # as many validation windows have a name as was asked for, and ties
    top, right = found.max(axis=1), (found[:, 0] >= facts["threshold"]) == truth
    for each in said["by_coverage"]:
        least = np.sort(top)[::-1][int(np.ceil(round(each["wanted"] * len(top), 6))) - 1]
        assert each["threshold"] == pytest.approx(least)
        assert each["coverage"] == np.mean(top >= least)
        assert each["accuracy"] == pytest.approx(np.mean(right[top >= least]))

    options = {"overwrite": True, "device": "cpu", "progress": False}
    typed = infer_patches([made.root], run, tmp_path / "out", abstain=0.7, **options)
    with (typed.folder / "patches.csv").open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    unsure = [max(float(row["p_Atypical"]), float(row["p_Normal"])) for row in lines]
    least = facts["calibration"]["thresholds"]["70"]
    assert [row["type"] == "unknown" for row in lines] == [p < least for p in unsure]
    assert 0 < typed.counts["unknown"] < len(lines)
    with pytest.raises(ConfigError, match="abstain: a model knows no thresholds"):
        infer_patches([made.root], plain, tmp_path / "no", abstain=0.7, **options)

    page = (done.folder / "report.html").read_text()
    assert "Names by coverage" in page
    assert page.count("before calibration") == page.count("after calibration") > 0


def test_vector_scaling_makes_mean_probabilities_the_frequencies(
    train: Callable[..., Path], made: Made
) -> None:
    options = ("data.val_fraction=0.34", "calibration.min_cases=20", "calibration.method=vector")
    run = train(*options)
    facts, table = facts_of(run), open_patches(made.root)
    assert facts["calibration"]["scaling"]["method"] == "vector"
    rows = rows_named(table, facts["data"]["val"]["names"])
    found = load_patch_model(run).probabilities(table.take(rows), progress=False)
    often = np.bincount(table.labels[rows]) / len(rows)
    # but for the prior: the likelihood is stationary in the biases
    wanted = often - np.array(facts["calibration"]["scaling"]["bias"]) / len(rows)
    np.testing.assert_allclose(found.mean(axis=0), wanted, atol=1e-4)


def test_threshold_is_one_half_without_validation(train: Callable[..., Path], made: Made) -> None:
    run = train("data.val_fraction=0")
    facts = facts_of(run)
    assert (facts["threshold"], facts["threshold_from"]) == (0.5, "one half")
    assert facts["data"].keys() == {"train"}
    assert sorted(facts["data"]["train"]["names"]) == sorted(open_patches(made.root).names)
    assert load_patch_model(run).threshold == 0.5


def test_a_file_of_splits_says_who_validates(
    train: Callable[..., Path], made: Made, tmp_path: Path
) -> None:
    table = open_patches(made.root)
    of_b = [n for n, g in zip(table.names, table.groups, strict=True) if g.startswith("B/")]
    of_a = [n for n, g in zip(table.names, table.groups, strict=True) if g.startswith("A/")]
    file = tmp_path / "splits.json"

    def split(**parts: list[str]) -> str:
        file.write_text(json.dumps(parts))
        return f"data.split={file}"

    data = facts_of(train(split(train=of_a, val=of_b)))["data"]
    assert sorted(data["train"]["names"]) == sorted(of_a)
    assert sorted(data["val"]["names"]) == sorted(of_b)
    only = [name for name in of_b if "Normal" in name]
    with pytest.raises(DataError, match=r"splits\.json: none of the 16 validation windows is of"):
        train(split(train=of_a, val=only), overwrite=True)


# ---------------------------------------------------------------- the fit


def by_scikit_learn(
    embeddings: np.ndarray, shares: np.ndarray, weights: np.ndarray, rule: str, strength: float
) -> LogisticRegression:
    """A case is one case of every class, with the share as its weight; see `fit_logistic` for C."""
    mass = (shares * weights[:, None]).sum(0)
    of_class = {"balanced": 1 / mass, "sqrt": mass**-0.5, "none": np.ones(2)}[rule]
    loss = shares * weights[:, None] * of_class
    loss /= loss.sum()
    n = len(embeddings)
    fit = LogisticRegression(C=2 / strength, tol=1e-8, solver="newton-cholesky")
    return fit.fit(np.tile(embeddings, (2, 1)), np.repeat([0, 1], n), loss.T.ravel())


@pytest.mark.parametrize("rule", ["balanced", "sqrt", "none"])
@pytest.mark.parametrize(
    ("targets", "agreement", "symmetries"),
    [("label", False, 1), ("votes", False, 1), ("label", True, 1), ("votes", True, 2)],
)
def test_the_fit_is_scikit_learns(
    rule: str,
    targets: str,
    agreement: bool,
    symmetries: int,
    train: Callable[..., Path],
    made: Made,
    tmp_path: Path,
) -> None:
    run = train(
        f"loss.class_weights={rule}",
        f"loss.targets={targets}",
        f"loss.agreement={agreement}",
        f"view.symmetries={symmetries}",
        "head.options.strength=0.3",
    )
    table = open_patches(made.root)
    # from the columns of the table that was written, not from what was read of it
    with (made.root / "made.csv").open() as stream:
        rows = {row["dataset_uid"]: row for row in csv.DictReader(stream)}
    atypical = np.array(
        [
            np.mean([rows[Path(n).name][f"expert{i}_atypical"] == "True" for i in (1, 2, 3)])
            for n in table.names
        ]
    )
    label = np.array([n.startswith("Normal/") for n in table.names], int)
    votes = np.stack([atypical, 1 - atypical], axis=1)
    shares = votes if targets == "votes" else np.eye(2)[label]
    weights = votes[np.arange(len(label)), label] if agreement else np.ones(len(label))
    assert len(np.unique(votes[:, 0])) == 4
    found = embeddings_of(table, tmp_path, symmetries=symmetries)
    standard = StandardScaler().fit(found.reshape(-1, 144))
    flat = standard.transform(found.reshape(-1, 144))
    fit = by_scikit_learn(flat, shares.repeat(symmetries, 0), weights.repeat(symmetries), rule, 0.3)
    expected = fit.predict_proba(flat).reshape(len(table), symmetries, 2).mean(1)
    own = load_patch_model(run).probabilities(table, progress=False)
    np.testing.assert_allclose(own, expected, atol=2e-5)


@pytest.mark.parametrize("head", ["mlp", "knn", "prototype"])
def test_other_heads_are_those_of_their_package(
    head: str, train: Callable[..., Path], made: Made, tmp_path: Path
) -> None:
    run = train(f"head.name={head}", "seed=1", "data.classes=[Normal,Atypical]")
    table = open_patches(made.root)
    found, groups = embeddings_of(table, tmp_path, seed=1)[:, 0], list(table.groups)
    targets = np.eye(2)[np.array([name.startswith("Atypical/") for name in table.names], int)]
    expected = fit_probe(head, found, targets, groups, seed=1).probabilities(found)
    model = load_patch_model(run)
    assert (model.classes, model.positive) == (("Normal", "Atypical"), 1)
    np.testing.assert_allclose(model.probabilities(table, progress=False), expected, atol=1e-9)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.root=null", ["data.root is not set: pass --set data.root=FOLDER"]),
        (
            "data.positive=Atipical",
            ["data.positive 'Atipical' is no class of", "Atypical, Normal)"],
        ),
        ("encoder.mpp=0.5", ["encoder.mpp has no effect on patches: set data.size and view.input"]),
        ("encoder.cache=1", ["encoder.cache has no effect on patches: embeddings are always"]),
        (
            "head.options.strenght=1",
            ["unknown option of 'logistic' 'strenght'; did you mean 'strength'?"],
        ),
        (
            "head.options.strength=-1",
            ["probe 'logistic' does not take {'strength': -1}: strengths must be above 0"],
        ),
        ("head.options.score=auroc", ["unknown score 'auroc'"]),
        ("view.input=60", ["view.input 60 is no whole number of patches of 14 px; take 56"]),
        (
            "head.name=forest",
            ["head.name: ", "'logistic', 'mlp', 'knn', 'prototype'", "'forest'"],
        ),
        ("loss.class_weight=none", ["unknown key 'class_weight'; did you mean 'class_weights'"]),
    ],
)
def test_wrong_configs_are_refused_before_anything_is_written(
    override: str, said: list[str], train: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(override)
    assert all(words in str(caught.value) for words in said)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("head={name: linear, options: {width: 3}}",),
            "head 'linear' does not take head.options {'width': 3}",
        ),
        (
            ("head={name: attention, options: {width: -3}}", "view.pool=card"),
            "head 'attention' does not take head.options {'width': -3}",
        ),
        (
            ("head.name=linear", "encoder={adapt: lora, lora: {targets: [nope]}, weights: twin}"),
            "lora targets ['nope'] are no linear layers of the encoder",
        ),
        (
            ("head.name=linear", "encoder={adapt: last-n, last_n: 99, weights: twin}"),
            "last_n is 99, but the encoder has 4 blocks: use 1 to 4",
        ),
    ],
    ids=["linear", "attention", "lora", "last-n"],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    overrides: tuple[str, ...], said: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(*overrides)
    assert str(caught.value) == said
    assert not (tmp_path / "run").exists()


def test_a_misspelt_class_is_named_with_the_folders(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no folder of class 'Atipical'; did you mean 'Atypical'"):
        train("data.classes=[Normal,Atipical]")
    assert not (tmp_path / "run").exists()


def test_a_damaged_file_is_named_and_left_out_only_if_asked(
    train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_ami_br(tmp_path / "data", slides=4)
    bad = root / "Atypical" / "A_0.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DataError, match=r"A_0\.png.*; 1 of 24 patches cannot be read: .*--skip-ba"):
        train(root=root)
    assert not (tmp_path / "run").exists()
    run = train("data.skip_bad=true", root=root)
    assert "going on without 1 patches that cannot be read: 'Atypical/A_0.png'" in caplog.text
    names = facts_of(run)["data"]["train"]["names"]
    assert len(names) == 23
    assert "Atypical/A_0.png" not in names


@pytest.mark.parametrize(
    ("fraction", "part"), [("0.3", "validation"), ("0.7", "training")], ids=["val", "train"]
)
def test_one_slide_with_all_windows_of_a_class_cannot_be_on_both_sides(
    fraction: str, part: str, train: Callable[..., Path], tmp_path: Path
) -> None:
    root = write_ami_br(tmp_path / "data", slides=6, bars=lambda slide, i: slide == 2 and i < 3)
    with pytest.raises(DataError, match=f" {part} windows is of class Atypical; ") as caught:
        train(f"data.val_fraction={fraction}", "head.options.strength=1", root=root)
    assert ("raise data.val_fraction, or set it to 0" in str(caught.value)) == (fraction == "0.3")
    assert not (tmp_path / "run").exists()


def test_one_slide_with_all_windows_of_a_class_takes_the_default_and_says_so(
    train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_ami_br(tmp_path / "data", slides=6, bars=lambda slide, i: slide == 2 and i < 3)
    facts = facts_of(train(root=root))["probe"]
    said = "default: too few slides or patients for inner cross-validation"
    assert (facts["strength"], facts["chosen_by"]) == (10, said)
    assert f"head logistic: setting by {said}" in caplog.text
    caplog.clear()
    facts = facts_of(train("head.options.strength=1", root=root, overwrite=True))["probe"]
    assert (facts["strength"], facts["chosen_by"]) == (1, "given")
    facts = facts_of(train(overwrite=True))["probe"]
    assert facts["chosen_by"] == "inner cross-validation"
    assert "setting by" not in caplog.text


def test_votes_that_leave_no_window_to_a_class_are_refused(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    root = write_ami_br(tmp_path / "data", slides=6)
    text = (root / "made.csv").read_text()
    # the label of every bar is Atypical, but no expert says so
    (root / "made.csv").write_text(text.replace("True", "False"))
    said = "experts' votes leave none of the 36 training windows to class Atypical; take more sl"
    for override in ("loss.targets=votes", "loss.agreement=true"):
        with pytest.raises(DataError, match=said):
            train(override, root=root)
        assert not (tmp_path / "run").exists()
    assert train(root=root).is_dir()
