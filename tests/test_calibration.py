"""Scaled probabilities and thresholds: literals, scipy, scikit-learn, torch, loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from scipy.optimize import brentq
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from celltyper.calibration import (
    COVERAGES,
    FLOOR,
    Calibration,
    Scaling,
    calibration_of,
    class_probabilities,
    coverage_thresholds,
    fit_scaling,
)
from celltyper.cells.table import cells_table, colors_of, concat_cells, names_of, read_cells
from celltyper.config import Config
from celltyper.domain import evenly, fit_domain, ledoit_wolf, warning_of
from celltyper.errors import ConfigError
from celltyper.evaluation import TypedCells
from celltyper.metrics.calibration import classwise_calibration_error
from celltyper.types import Prediction, Sample

HALF = Scaling("temperature", (0.5, 0.5), (0.0, 0.0), FLOOR)
"""Temperature 2."""


def made(seed: int, n: int, k: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose logits are `sharpness` times those that the classes are drawn by."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, k))
    truth = np.array([rng.choice(k, p=p) for p in softmax(logits, axis=1)])
    return softmax(sharpness * logits, axis=1), truth


def test_scaled_probabilities_by_hand() -> None:
    # square roots of .8 and .2 are as 2 to 1
    np.testing.assert_allclose(HALF.apply([[0.8, 0.2]]), [[2 / 3, 1 / 3]])
    # weights 1 and 2: .8 and .04; the bias makes 5 of the .04
    vector = Scaling("vector", (1.0, 2.0), (0.0, float(np.log(5))))
    np.testing.assert_allclose(vector.apply([[0.8, 0.2]]), [[0.8, 0.2]])
    # a share of 0 counts as the floor: 1 and sqrt(.001)
    low = np.sqrt(FLOOR)
    np.testing.assert_allclose(HALF.apply([[1.0, 0.0]]), [[1 / (1 + low), low / (1 + low)]])


def test_cells_are_scaled_without_background() -> None:
    cells = [[0.5, 0.4, 0.1], [1.0, 0.0, 0.0]]
    np.testing.assert_allclose(class_probabilities(cells), [[0.8, 0.2], [0.5, 0.5]])
    np.testing.assert_allclose(class_probabilities(cells, HALF), [[2 / 3, 1 / 3], [0.5, 0.5]])
    assert class_probabilities(np.zeros((0, 3)), HALF).shape == (0, 2)


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_temperature_is_where_the_likelihood_is_stationary(sharpness: float) -> None:
    probabilities, truth = made(0, 2000, 4, sharpness)
    logs = np.log(probabilities)

    def slope(weight: float) -> float:
        expected = (softmax(weight * logs, axis=1) * logs).sum(axis=1)
        return float((expected - logs[np.arange(len(truth)), truth]).mean())

    found = fit_scaling(probabilities, truth, "temperature")
    assert found.weight == (found.weight[0],) * 4
    assert found.bias == (0.0,) * 4
    assert found.weight[0] == pytest.approx(brentq(slope, 0.01, 10), rel=1e-5)
    # the classes were drawn by logits `sharpness` times as small
    assert 1 / found.weight[0] == pytest.approx(sharpness, rel=0.15)


def test_of_two_classes_the_temperature_is_a_logistic_regression() -> None:
    probabilities, truth = made(1, 500, 2, 2.0)
    logs = np.log(probabilities)
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
    fit.fit(logs[:, 1:] - logs[:, :1], truth)
    found = fit_scaling(probabilities, truth, "temperature")
    assert found.weight[0] == pytest.approx(float(fit.coef_[0, 0]), rel=1e-4)


def test_cells_that_are_all_right_have_the_lowest_temperature() -> None:
    found = fit_scaling([[0.6, 0.4], [0.3, 0.7]], [0, 1], "temperature")
    assert found.weight[0] == pytest.approx(20, rel=1e-3)


def test_vector_scaling_equals_gradient_descent_by_torch() -> None:
    import torch

    probabilities, truth = made(2, 400, 3, 2.0)
    logs, target = torch.tensor(np.log(probabilities)), torch.tensor(truth)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_change=1e-14)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        prior = ((weight - 1) ** 2).sum() + (bias**2).sum()
        value = torch.nn.functional.cross_entropy(logs * weight + bias, target, reduction="sum")
        whole = value + prior / 2
        whole.backward()
        return whole

    optimizer.step(loss)
    found = fit_scaling(probabilities, truth, "vector")
    np.testing.assert_allclose(found.weight, weight.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(found.bias, bias.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("n", [1, 7, 100, 301])
def test_thresholds_equal_a_search_through_all_of_them(n: int) -> None:
    values = np.round(np.random.default_rng(n).uniform(0.3, 1, n), 2)
    found = coverage_thresholds(values)
    assert list(found) == [str(c) for c in COVERAGES]
    for percent, threshold in found.items():
        enough = [v for v in values if 100 * sum(values >= v) >= int(percent) * n]
        assert threshold == max(enough)


def test_a_calibration_is_the_same_after_json() -> None:
    own = Calibration(HALF, 123, coverage_thresholds([0.9, 0.6]))
    assert calibration_of(json.loads(json.dumps(own.facts()))) == own
    assert calibration_of(None) is None
    assert own.threshold(0.5) == 0.9
    assert own.threshold(0.55) == 0.6
    with pytest.raises(ConfigError, match=r"abstain 0\.995: .* hundredths, from 0\.5 to 0\.99"):
        own.threshold(0.995)


def test_classwise_error_by_hand() -> None:
    # a: .9 and .6 for one a each, alone in their bins: gaps .1, .4; b: .1 and .4, no b
    probabilities = [[0.9, 0.1], [0.6, 0.4]]
    assert classwise_calibration_error(probabilities, [0, 0]) == pytest.approx(0.25)
    # the second is b: a: gaps .1 and .6; b: gaps .1 and .6
    assert classwise_calibration_error(probabilities, [0, 1]) == pytest.approx(0.35)
    assert np.isnan(classwise_calibration_error(np.zeros((0, 2)), []))


def of_cells(threshold: float, scaling: Scaling | None = HALF) -> Prediction:
    """Two cells: shares .8 and .2, and .1 and .9; a quarter is background."""
    labels = np.array([[1, 0, 2]], np.int32)
    cells = np.array([[0.25, 0.6, 0.15], [0.25, 0.075, 0.675]], np.float32)
    calibration = None if scaling is None else Calibration(scaling, 100, {})
    maps = np.zeros((3, 1, 3), np.float32)
    return Prediction(labels, maps, cells, ("a", "b"), 0.5, "x", (), calibration, threshold)


def test_cells_below_the_threshold_have_no_name_but_keep_their_probabilities() -> None:
    # 2/3, and 3/4 because square roots of .9 and .1 are as 3 to 1
    every, some = cells_table(of_cells(0.0)), cells_table(of_cells(0.7))
    np.testing.assert_allclose(every["probability"], [2 / 3, 3 / 4], rtol=1e-6)
    assert every["phenotype"].to_pylist() == ["a", "b"]
    assert some["phenotype"].to_pylist() == ["unknown", "b"]
    assert of_cells(0.7).phenotypes.tolist() == [0, 0, 2]
    columns = ("probability", "p_background", "p_a", "p_b")
    assert some.select(columns).equals(every.select(columns))
    # three quarters of each, for the rest is background
    np.testing.assert_allclose(every["p_a"], [0.5, 3 / 16], rtol=1e-6)
    total = sum(every[name].to_numpy() for name in columns[1:])
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    plain = cells_table(of_cells(0.0, None))
    np.testing.assert_allclose(plain["probability"], [0.8, 0.9], rtol=1e-6)
    assert (names_of(every), names_of(some)) == (("a", "b"), ("a", "b", "unknown"))
    assert colors_of(some) == (*colors_of(every), "#9a9a9a")
    with pytest.raises(ValueError, match="with different classes"):
        concat_cells([every, some])


def test_unknown_cells_are_in_every_export(tmp_path: Path) -> None:
    from celltyper.cells.geojson import write_geojson
    from celltyper.cells.stream import CellsWriter, iter_cells, write_csv

    table = cells_table(of_cells(0.7))
    with CellsWriter(tmp_path / "cells.parquet", renumber=True) as cells:
        cells.write(table.slice(1))
        cells.write(table.slice(0, 1))
    read = pa.concat_tables(iter_cells(tmp_path / "cells.parquet"))
    assert read["phenotype"].to_pylist() == ["b", "unknown"]
    write_csv(tmp_path / "cells.csv", table)
    assert ',"unknown",' in (tmp_path / "cells.csv").read_text().splitlines()[1]
    write_geojson(tmp_path / "cells.geojson", table, {"a": "#ff0000", "b": "#00ff00"})
    features = json.loads((tmp_path / "cells.geojson").read_text())["features"]
    kinds = [each["properties"]["classification"] for each in features]
    assert kinds == [
        {"name": "unknown", "color": [154, 154, 154]},
        {"name": "b", "color": [0, 255, 0]},
    ]


# ---------------------------------------------------------------- of a run


def sure(sample: Sample, calibration: Calibration | None = None) -> Prediction:
    """Every nucleus found, .78 sure of a class, .02 of the other; three of four are right."""
    n = int(sample.labels.max())
    right = np.arange(n) % 4 > 0
    called = np.where(right, sample.phenotypes[1:], 3 - sample.phenotypes[1:])
    cells = np.full((n, 3), 0.02, np.float32)
    cells[:, 0] = 0.2
    cells[np.arange(n), called] = 0.78
    maps = np.full((3, *sample.labels.shape), 1 / 3, np.float32)
    names = ("blue", "brown")
    return Prediction(sample.labels, maps, cells, names, sample.mpp, sample.name, (), calibration)


WEIGHT = np.log(3) / np.log(39)
"""Makes .75, as odds 3 to 1, of .78 / .80, as odds 39 to 1."""


def test_training_stores_what_fits_the_cells_of_validation(
    tiny: Callable[..., Config],
    made_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    celltyper_command: Callable[..., Any],
) -> None:
    from celltyper import loop
    from celltyper.calibration import threshold_of
    from celltyper.checkpoints import load_model, read_tensors, write_tensors
    from celltyper.predict import predict_image
    from celltyper.readers import open_dataset
    from celltyper.training import train

    val = open_dataset(made_data / "val")
    monkeypatch.setattr(loop, "predict_image", lambda *_, name, **__: sure(val[name]))
    steps = ("train.steps=1", "train.validate_every=1", "train.ema=0.5")
    config = tiny(made_data, *steps, "calibration.min_cases=12")
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    model = load_model(run)
    known = model.calibration
    assert known is not None
    assert known.scaling.method == "temperature"
    np.testing.assert_allclose(known.scaling.weight, WEIGHT, rtol=1e-5)
    assert known.cases == 12
    np.testing.assert_allclose(list(known.thresholds.values()), 0.75, rtol=1e-6)
    facts = json.loads((run / "run.json").read_text())
    assert calibration_of(facts["calibration"]) == known

    # the best weights are as they were, and those of training went on
    best, last = (read_tensors(run / f"{name}.safetensors")[0] for name in ("model", "last"))
    assert all((best[key] == last[f"average.{key}"]).all() for key in best)

    image = val["val4"].image
    found = predict_image(model, image, 0.5, abstain=0.9)
    assert (found.calibration, found.threshold) == (known, known.threshold(0.9))
    assert predict_image(model, image, 0.5).threshold == 0

    # of an earlier version
    tensors, header = read_tensors(run / "model.safetensors")
    assert header.pop("calibration")
    write_tensors(tmp_path / "model.safetensors", tensors, header)
    old = load_model(tmp_path / "model.safetensors")
    assert old.calibration is None
    with pytest.raises(ConfigError, match="abstain: this model knows no thresholds"):
        threshold_of(old.calibration, old.classes, 0.9)

    words = ("infer", made_data / "val" / "images", "--mpp", 0.5, "--abstain", 0.9, "-q", "-m")
    code, _, err = celltyper_command(*words, tmp_path / "model.safetensors", "-o", tmp_path / "no")
    assert (code, err.count("\n")) == (2, 1)
    assert "knows no thresholds" in err
    assert not (tmp_path / "no").exists()
    assert celltyper_command(*words, run, "-o", tmp_path / "out")[0] == 0
    index = json.loads((tmp_path / "out" / "infer.json").read_text())
    assert index["threshold"] == known.threshold(0.9)
    assert calibration_of(index["calibration"]) == known


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("calibration.min_cases=13", "not calibrated: 12 validation cells are annotated, and"),
        ("calibration.method=none", ""),
    ],
)
def test_too_few_cells_are_said_in_one_line(
    tiny: Callable[..., Config],
    made_data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    override: str,
    said: str,
) -> None:
    from celltyper.training import train

    caplog.set_level("INFO", "celltyper")
    steps = ("train.steps=1", "train.validate_every=1")
    train(tiny(made_data, *steps, override), tmp_path / "run", device="cpu", progress=False)
    lines = [text for text in caplog.messages if "calibrated" in text]
    assert len(lines) == bool(said)
    assert not lines or said in lines[0]


def test_evaluation_says_the_error_before_and_after(made_data: Path, tmp_path: Path) -> None:
    from celltyper.evaluation import evaluate
    from celltyper.readers import open_dataset
    from celltyper.results import summary_text, write_evaluation

    data = open_dataset(made_data / "val")
    scaling = Scaling("temperature", (WEIGHT, WEIGHT), (0.0, 0.0), FLOOR)
    thresholds = {"95": 0.7, "90": 0.7, "80": 0.7, "70": 0.8}
    predictions = [sure(each, Calibration(scaling, 12, thresholds)) for each in data]
    summary = evaluate(predictions, data, resamples=0)
    write_evaluation(tmp_path, summary, predictions, data)
    found = json.loads((tmp_path / "metrics.json").read_text())
    said = found["calibration"]
    assert said["cells"] == 12
    assert said["before"]["expected_calibration_error"] == pytest.approx(0.975 - 0.75, abs=1e-6)
    assert said["after"]["expected_calibration_error"] == pytest.approx(0, abs=1e-6)
    assert found["expected_calibration_error"] == said["after"]["expected_calibration_error"]
    by_coverage = [(each["wanted"], each["coverage"]) for each in said["by_coverage"]]
    assert by_coverage == [(0.95, 1), (0.9, 1), (0.8, 1), (0.7, 0)]
    assert [each["accuracy"] for each in said["by_coverage"]] == [0.75] * 3 + [None]
    lines = summary_text(summary).splitlines()
    assert lines[-2:] == [
        "calibration: temperature 3.33, error 0.225 before, 0.000 after",
        "--abstain 0.9: 100% of these have a name, 0.750 right",
    ]
    page = (tmp_path / "report.html").read_text()
    for text in ("Before calibration", "After calibration", "Names by coverage"):
        assert page.count(f">{text}</h") == 1

    plain = [sure(each) for each in data]
    write_evaluation(tmp_path / "plain", evaluate(plain, data, resamples=0), plain, data)
    page = (tmp_path / "plain" / "report.html").read_text()
    assert "before calibration" not in page.lower()
    assert "Names by coverage" not in page


def test_accuracy_by_coverage_by_hand() -> None:
    thresholds = {"90": 0.6, "70": 0.85, "50": 1.0}
    raw = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.55, 0.45]])
    same = Scaling("temperature", (1.0, 1.0), (0.0, 0.0))
    typed = TypedCells(np.array([0, 0, 0, 1]), raw, Calibration(same, 4, thresholds))
    rows = typed.by_coverage((0.9, 0.7, 0.5))
    assert [tuple(row)[:3] for row in rows] == [(0.9, 0.6, 0.75), (0.7, 0.85, 0.25), (0.5, 1.0, 0)]
    assert rows[0].accuracy == pytest.approx(2 / 3)
    assert rows[1].accuracy == 1
    assert np.isnan(rows[2].accuracy)
    assert TypedCells(typed.truth, raw).by_coverage() == []


def test_slides_leave_the_same_cells_open_as_images(tmp_path: Path) -> None:
    from made_slides import PixelModel, made_labels, made_pixels, made_slide

    from celltyper.predict import predict_image
    from celltyper.slides import whole_slide
    from celltyper.wholeslide import infer_slide

    model: Any = PixelModel()
    # pure cells have 1 and, for 0, the floor: .969; others are of two nuclei of two classes
    model.calibration = Calibration(HALF, 100, {"90": 0.95})
    labels = made_labels(240, 300)
    slide = made_slide(labels)
    facts = infer_slide(
        model, slide, tmp_path, whole_slide(slide), block=160, abstain=0.9, progress=False
    )
    cells = read_cells(tmp_path / "cells.parquet")
    image = cells_table(predict_image(model, made_pixels(labels), 0.25, abstain=0.9))
    found, wanted = (
        sorted(zip(t["y"].to_pylist(), t["x"].to_pylist(), t["phenotype"].to_pylist(), strict=True))
        for t in (cells, image)
    )
    assert found == wanted
    called = cells["phenotype"].to_pylist()
    assert 0 < called.count("unknown") < len(called)
    assert facts["counts"] == {name: called.count(name) for name in ("tumor", "stroma", "unknown")}
    assert facts["classes"] == ["tumor", "stroma", "unknown"]
    assert facts["colors"] == ["#cc2222", "#22aa22", "#9a9a9a"]
    unsure = cells["probability"].to_numpy() < 0.95
    assert [name == "unknown" for name in called] == unsure.tolist()
    assert "unknown" in (tmp_path / "report.html").read_text()
    with pytest.raises(ConfigError, match="was begun with other settings"):
        infer_slide(model, slide, tmp_path, whole_slide(slide), block=160, progress=False)


def test_exported_files_know_the_calibration() -> None:
    from celltyper.exporting import cells_of_maps
    from celltyper.instances import HV

    maps = dict(HV().encode(np.pad(np.ones((12, 12), np.int32), 10)))
    maps["phenotype"] = np.full((3, 32, 32), 1 / 3, np.float32)
    own = Calibration(HALF, 9, {"90": 0.5})
    facts = {
        "maps": {name: {"channels": len(values)} for name, values in maps.items()},
        "instances": {"method": "hv", "options": None},
        "classes": ["a", "b"],
        "colors": ["#ff0000", "#00ff00"],
        "mpp": 0.5,
    }
    assert cells_of_maps(maps, facts).calibration is None
    assert cells_of_maps(maps, facts | {"calibration": own.facts()}).calibration == own


# ---------------------------------------------------------------- out of domain


def test_distances_equal_scikit_learn_and_scipy() -> None:
    from scipy.spatial.distance import mahalanobis
    from sklearn.covariance import LedoitWolf
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    train = rng.normal(size=(150, 90)) @ rng.normal(size=(90, 90)) + 5
    others = rng.normal(size=(40, 90)) @ rng.normal(size=(90, 90)) + 5
    domain = fit_domain(train, others, "validation")
    pca = PCA(64, svd_solver="full").fit(train)
    precision = LedoitWolf().fit(pca.transform(train)).precision_
    wanted = [mahalanobis(z, np.zeros(64), precision) for z in pca.transform(others)]
    # components are kept in half precision
    np.testing.assert_allclose(domain.distances(others), wanted, rtol=1e-2)
    assert domain.quantile == pytest.approx(np.quantile(wanted, 0.95), rel=1e-2)
    assert domain.components.shape == (64, 90)
    assert domain.tiles == 150


@pytest.mark.parametrize(("n", "d"), [(5, 20), (200, 7), (3, 1)])
def test_covariance_is_shrunk_as_by_scikit_learn(n: int, d: int) -> None:
    from sklearn.covariance import ledoit_wolf as theirs

    x = np.random.default_rng(n).normal(size=(n, d)) * np.arange(1, d + 1)
    np.testing.assert_allclose(ledoit_wolf(x), theirs(x)[0], rtol=1e-9)


def test_what_is_far_is_said() -> None:
    domain = fit_domain(np.eye(3), np.eye(3), "validation")
    assert domain.of_image([]) is None
    near, far = (domain.of_image([value, domain.quantile * 2, 0.0]) for value in (0.0, 1e3))
    assert near is not None
    assert far is not None
    # the middle one of three decides
    assert (near.is_far, near.warning, far.is_far) == (False, "", True)
    assert far.warning.startswith("Unlike the training images: distance ")
    assert warning_of({"a": near}) == ""
    assert warning_of({"a": near, "b": far}) == f"b: {far.warning}"
    farther = far._replace(value=far.value + 10)
    assert warning_of({"a": near, "b": farther, "c": far}).startswith(
        f"2 of 3 images are unlike the training images: distances {far.value:.3g} to "
        f"{farther.value:.3g}, and 95 % of the validation tiles are within {far.quantile:.3g}. The"
    )


def test_training_images_are_known_again(
    tiny: Callable[..., Config], made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from celltyper import loop
    from celltyper.checkpoints import load_model
    from celltyper.inference import infer, read_predictions
    from celltyper.readers import open_dataset
    from celltyper.training import train

    monkeypatch.setattr(loop, "FEWEST_TILES", 12)
    # three images of 96 px have four tiles of 64 px each
    steps = ("train.steps=1", "train.validate_every=1", "encoder.adapt=frozen")
    run = train(tiny(made_data, *steps), tmp_path / "run", device="cpu", progress=False)
    model = load_model(run)
    domain = model.domain
    assert domain is not None
    assert (domain.tiles, domain.held_out) == (12, "validation")

    def embeddings(part: str) -> np.ndarray:
        """Tiles from -8 and 40 on, mirrored beyond the border, one by one."""
        found = []
        for sample in open_dataset(made_data / part):
            padded = np.pad(sample.image, ((8, 8), (8, 8), (0, 0)), mode="symmetric")
            for row in (0, 48):
                for col in (0, 48):
                    tile = torch.tensor(padded[row : row + 64, col : col + 64] / 255).float()
                    with torch.no_grad():
                        last = model.encoder(tile.permute(2, 0, 1)[None])[-1]
                    found.append(last.mean(dim=(0, 2, 3)).numpy())
        return np.array(found)

    own = embeddings("train")
    np.testing.assert_allclose(domain.mean, own.mean(axis=0), atol=1e-5)
    held_out = domain.distances(embeddings("val"))
    assert domain.quantile == pytest.approx(np.quantile(held_out, 0.95), rel=1e-3)

    strange = tmp_path / "strange.png"
    pixels = 255 - open_dataset(made_data / "val")["val4"].image
    Image.fromarray(pixels).save(strange)
    images = [made_data / "val" / "images" / "val4.png", strange]
    out = infer(images, run, tmp_path / "out", mpp=0.5, progress=False)
    near, far = (prediction.distance for prediction in read_predictions(out))
    assert near is not None
    assert far is not None
    assert near.value == pytest.approx(np.median(held_out), rel=1e-3)
    assert near.quantile == far.quantile == domain.quantile
    assert far.is_far
    assert not near.is_far


def test_without_validation_every_fifth_image_is_left_out(
    tiny: Callable[..., Config], made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from celltyper import loop
    from celltyper.checkpoints import load_model
    from celltyper.training import train

    monkeypatch.setattr(loop, "FEWEST_TILES", 8)
    steps = ("train.steps=1", "train.validate_every=1", "data.val_fraction=0")
    config = tiny(made_data / "train", *steps)
    domain = load_model(train(config, tmp_path / "run", device="cpu", progress=False)).domain
    assert domain is not None
    # the first of three images, with four tiles each
    assert (domain.tiles, domain.held_out) == (8, "training images left out")


def test_evenly_spread_numbers() -> None:
    assert evenly(5, 9) == [0, 1, 2, 3, 4]
    assert evenly(9, 3) == [0, 4, 8]
    assert evenly(0, 3) == []
