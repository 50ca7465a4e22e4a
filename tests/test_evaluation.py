"""Scores of whole evaluations: by hand, and against the metrics computed image by image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from celltyper.evaluation import SCORES, evaluate, score_image, summarise
from celltyper.metrics import (
    PLAIN_WEIGHTS,
    aji,
    detection,
    detection_f1,
    detection_iou,
    mean_of_known,
    mpq_pannuke,
    mpq_plus,
    multiclass_panoptic_quality,
    overlap,
    panoptic_quality,
    pq_of_counts,
    reference_instance_classes,
    typed_f1,
)
from celltyper.types import Prediction, Sample

CLASSES = ("a", "b")


def sample_of(labels: list[list[int]], phenotypes: list[int], name: str = "x") -> Sample:
    array = np.array(labels, np.int32)
    image = np.zeros((*array.shape, 3), np.uint8)
    return Sample(image, array, np.array(phenotypes, np.uint8), name, mpp=3.0)


def prediction_of(labels: list[list[int]], classes: list[int], name: str = "x") -> Prediction:
    """Every pixel of a predicted cell is 80 % sure of its class, other pixels of background."""
    array = np.array(labels, np.int32)
    pixels = np.array([0, *classes])[array]
    probabilities = np.full((3, *array.shape), 0.1, np.float32)
    np.put_along_axis(probabilities, pixels[None], 0.8, axis=0)
    cells = np.full((len(classes), 3), 0.1, np.float32)
    cells[np.arange(len(classes)), classes] = 0.8
    return Prediction(array, probabilities, cells, CLASSES, 3.0, name)


def test_every_score_by_hand() -> None:
    """Four annotated cells: found, found with the wrong class, half found, missed; one extra."""
    reference = sample_of(
        [
            [1, 1, 0, 2, 2, 0, 3, 3, 3, 3, 0, 0, 0, 4],
            [1, 1, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 4],
        ],
        [0, 1, 1, 2, 2],
    )
    predicted = prediction_of(
        [
            [1, 1, 0, 2, 2, 0, 3, 3, 0, 0, 0, 4, 0, 0],
            [1, 1, 0, 2, 2, 0, 0, 0, 0, 0, 0, 4, 0, 0],
        ],
        [1, 2, 2, 1],
    )
    summary = evaluate([predicted], [reference], resamples=0)
    value = {name: estimate.value for name, estimate in summary.scores.items()}
    # On annotated nuclei: 1 -> a, 2 -> b (wrong), 3 half b half background (tie: background), 4 ->
    # background. a: tp 1, fn 1. b: fp 1, fn 2.
    assert summary.confusion.tolist() == [[0, 0, 0], [0, 1, 1], [2, 0, 0]]
    assert value["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    # Radius 1 px (3 um at 3 um a pixel): 1, 2 and 3 (centres 1 apart) pair; 4 is 2 px away.
    assert value["detection_f1"] == pytest.approx(6 / 8)
    # F_c of a: tp 1, one pair only annotated a (weight 2), one extra a: 2 / (2 + 2 + 1).
    # F_c of b: tp 1 (cell 3), one pair only predicted b (weight 2), one missed: 2 / (2 + 2 + 1).
    assert value["typed_f1"] == pytest.approx((2 / 5 + 2 / 5) / 2)
    # IoU >= .5 keeps the pair at exactly one half: a 2 / (2 + 1 + 1), b the same.
    assert value["typed_f1_iou"] == pytest.approx(0.5)
    # IoU > .5 does not: two pairs of IoU 1, two missed, two extra.
    assert value["bpq"] == value["bpq_plus"] == pytest.approx(2 / (2 + 1 + 1))
    # a: one pair, one missed (called b), one extra. b: no pair, two missed, two extra.
    assert value["mpq"] == value["mpq_plus"] == pytest.approx((1 / 2 + 0) / 2)
    # AJI: intersections 4 + 4 + 2, unions 4 + 4 + 4, missed 2, extra 2.
    assert value["aji"] == pytest.approx(10 / 16)
    # End-to-end matrix: spurious cells in row 0, missed ones in column 0.
    assert summary.pairs.tolist() == [[0, 1, 0], [0, 1, 1], [1, 0, 1]]
    assert value.keys() == SCORES.keys()


def many(seed: int, n: int = 12) -> tuple[list[Prediction], list[Sample]]:
    """Random squares, annotated and shifted, retyped, dropped."""
    rng = np.random.default_rng(seed)
    predictions, samples = [], []
    for number in range(n):
        reference, predicted = np.zeros((2, 80, 80), int)
        types, guesses = [0], []
        for row in range(0, 80, 10):
            for col in range(0, 80, 10):
                if rng.random() < 0.7:
                    types.append(int(rng.integers(1, 3)))
                    reference[row : row + 7, col : col + 7] = len(types) - 1
                if rng.random() < 0.7:
                    right = types[-1] if len(types) > 1 else 1
                    guesses.append(right if rng.random() < 0.7 else 3 - right)
                    r, c = row + rng.integers(0, 4), col + rng.integers(0, 4)
                    predicted[r : r + 6, c : c + 6] = len(guesses)
        samples.append(sample_of(reference.tolist(), types, f"{number}"))
        predictions.append(prediction_of(predicted.tolist(), guesses, f"{number}"))
    return predictions, samples


def test_sums_over_objects_equal_the_metrics_of_the_images() -> None:
    predictions, samples = many(0)
    value = {k: e.value for k, e in evaluate(predictions, samples, resamples=0).scores.items()}
    found, near, loose, binary, by_class, truth, seen = [], [], [], [], [], [], []
    for p, s in zip(predictions, samples, strict=True):
        counts = detection(s.labels, s.phenotypes, p.labels, p.phenotypes, 2, radius=1.0)
        found.append(counts.found)
        near.append(counts.typed)
        table = overlap(s.labels, p.labels)
        loose.append(detection_iou(table, s.phenotypes, p.phenotypes, 2).typed)
        quality = multiclass_panoptic_quality(s.labels, s.phenotypes, p.labels, p.phenotypes, 2)
        binary.append(quality.binary)
        by_class.append(quality.counts)
        classes = reference_instance_classes(s.labels, s.phenotypes, p.probabilities)
        truth += classes.true.tolist()
        seen += classes.predicted.tolist()
    pairs = list(zip(samples, predictions, strict=True))
    expected = {
        "macro_f1": f1_score(truth, seen, labels=[1, 2], average="macro"),
        "detection_f1": detection_f1(np.sum(found, 0)),
        "typed_f1": typed_f1(np.sum(near, 0)).mean(),
        "typed_f1_iou": typed_f1(np.sum(loose, 0), PLAIN_WEIGHTS).mean(),
        "bpq": np.mean([panoptic_quality(s.labels, p.labels).pq for s, p in pairs]),
        "mpq": mean_of_known(mpq_pannuke(np.array(by_class))),
        "bpq_plus": pq_of_counts(np.sum(binary, 0)),
        "mpq_plus": mpq_plus(np.sum(by_class, 0)),
        "aji": np.mean([aji(s.labels, p.labels) for s, p in pairs]),
    }
    for name, score in expected.items():
        assert value[name] == pytest.approx(float(score)), name


def test_intervals_hold_the_value_and_resample_patients() -> None:
    predictions, samples = many(1)
    summary = evaluate(predictions, samples, resamples=400)
    assert summary.clusters == "12 patients or fields"
    for name, estimate in summary.scores.items():
        if name != "count_r2":
            assert estimate.low < estimate.value < estimate.high, name
            assert estimate.high - estimate.low < 0.4, name
    again = evaluate(predictions, samples, resamples=400)
    assert summary.scores == again.scores


def test_few_fields_are_resampled_by_blocks() -> None:
    predictions, samples = many(2, n=2)
    summary = evaluate(predictions, samples, resamples=50)
    assert "2 blocks of 256 px (fewer than 8 patients or fields)" in summary.clusters
    assert not np.isnan(summary.scores["bpq"].low)
    assert not np.isnan(summary.scores["bpq_plus"].low)
    one = evaluate(predictions[:1], samples[:1], resamples=50)
    assert np.isnan(one.scores["aji"].low)


def test_two_predictions_of_one_image_are_refused() -> None:
    predictions, samples = many(4, n=2)
    with pytest.raises(ValueError, match="two predictions for image '0': keep one"):
        evaluate([*predictions, predictions[0]], samples)


def test_unknown_resolution_is_said_in_the_rule() -> None:
    predictions, samples = many(5, n=1)
    without = [replace(samples[0], mpp=None)]
    summary = evaluate([replace(predictions[0], mpp=None)], without, resamples=0)
    assert "within 12 px (resolution unknown)" in summary.rules["detection_f1"]
    known = evaluate(predictions, samples, resamples=0)
    assert "within 3 um" in known.rules["detection_f1"]


def test_nothing_annotated_and_nothing_found_is_not_zero() -> None:
    empty = np.zeros((10, 10), int).tolist()
    summary = evaluate([prediction_of(empty, [])], [sample_of(empty, [0])])
    assert all(np.isnan(e.value) for e in summary.scores.values())
    assert np.isnan(summary.calibration_error)


def test_missing_prediction_or_other_size_is_named() -> None:
    predictions, samples = many(3, n=2)
    with pytest.raises(ValueError, match=r"no prediction for image '1' \(there are: 0\)"):
        evaluate(predictions[:1], samples)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(predictions, [])
    small = prediction_of([[0]], [], "0")
    with pytest.raises(ValueError, match=r"prediction of '0' is \(1, 1\), its annotation"):
        score_image(small, samples[0])


def test_summaries_of_no_image() -> None:
    assert np.isnan(summarise([], CLASSES).scores["macro_f1"].value)
