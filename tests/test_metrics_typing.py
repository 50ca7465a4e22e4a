"""Detection, reference-instance F1, counts, calibration: loops, literals, scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.metrics import confusion_matrix, f1_score, r2_score
from torchmetrics.classification import MulticlassCalibrationError

from celltyper import metrics
from celltyper.errors import ConfigError, DataError


@pytest.mark.parametrize("seed", range(4))
def test_points_equal_a_dense_assignment(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((80, 2)) * 100, rng.random((70, 2)) * 100
    distance = cdist(a, b)
    gain = np.where(distance <= 12, 1000 - distance, 0)
    rows, cols = linear_sum_assignment(gain, maximize=True)
    expected = distance[rows, cols][distance[rows, cols] <= 12]
    pairs = metrics.match_points(a, b, 12)
    assert len(set(pairs.ref)) == len(set(pairs.pred)) == len(pairs.ref) == len(expected)
    assert pairs.score == pytest.approx(distance[pairs.ref, pairs.pred])
    assert pairs.score.sum() == pytest.approx(expected.sum())
    # HoVer-Net's script: assignment of all points, then the radius. Never more pairs.
    rows, cols = linear_sum_assignment(distance)
    assert (distance[rows, cols] <= 12).sum() <= len(pairs.ref)


def test_points_at_the_radius_and_no_points():
    a, b = np.array([[0.0, 0.0]]), np.array([[0.0, 12.0]])
    assert len(metrics.match_points(a, b, 12).ref) == 1
    assert len(metrics.match_points(a, b, 11.999999).ref) == 0
    assert len(metrics.match_points(a, np.empty((0, 2)), 12).ref) == 0
    with pytest.raises(ConfigError, match="radius"):
        metrics.match_points(a, b, 0)


def test_two_pairs_beat_one_shorter_pair():
    # Nearest first would pair 2 with 1.5 and leave 0 alone.
    a, b = np.array([[0.0, 0], [2.0, 0]]), np.array([[1.5, 0], [3.9, 0]])
    pairs = metrics.match_points(a, b, 2)
    assert (pairs.ref.tolist(), pairs.pred.tolist()) == ([0, 1], [0, 1])


def one_pixel_cells(columns, width=60):
    labels = np.zeros((1, width), np.int32)
    for i, c in enumerate(columns, 1):
        labels[0, c] = 3 * i
    return labels


def lookup(classes):
    table = np.zeros(3 * len(classes) + 1, np.uint8)
    table[3::3] = classes
    return table


def test_detection_by_hand():
    # Pairs (1,1), (1,2), (2,2); reference class 1 missed at 45; predicted class 2 extra at 55.
    reference, ref_types = one_pixel_cells([5, 15, 25, 45]), lookup([1, 1, 2, 1])
    predicted, pred_types = one_pixel_cells([6, 15, 27, 55]), lookup([1, 2, 2, 2])
    counts = metrics.detection(reference, ref_types, predicted, pred_types, 2, radius=3)
    assert counts.found.tolist() == [3, 1, 1]
    assert counts.typed.tolist() == [[1, 0, 1, 0, 1], [1, 1, 0, 1, 0]]
    assert metrics.detection_f1(counts.found) == pytest.approx(6 / 8)
    # F_c = 2 tp / (2 tp + 2 fp_c + 2 fn_c + fp_d + fn_d)
    assert metrics.typed_f1(counts.typed) == pytest.approx([2 / 5, 2 / 5])
    assert metrics.typed_f1(counts.typed, metrics.PLAIN_WEIGHTS) == pytest.approx([2 / 4, 2 / 4])


@pytest.mark.parametrize("seed", range(3))
def test_typed_f1_equals_hovernets_rule_spelled_out(seed):
    rng = np.random.default_rng(seed)
    true, guess = rng.integers(1, 4, 50), rng.integers(1, 4, 45)
    ref, pred = rng.permutation(50)[:30], rng.permutation(45)[:30]
    counts = metrics.count_detections(true, guess, metrics.Matches(ref, pred, np.zeros(30)), 3)
    t, g = true[ref], guess[pred]
    lone_t, lone_g = np.delete(true, ref), np.delete(guess, pred)
    for c in (1, 2, 3):
        tp = ((t == c) & (g == c)).sum()
        wrong = ((t != c) & (g == c)).sum() + ((t == c) & (g != c)).sum()
        alone = (lone_t == c).sum() + (lone_g == c).sum()
        expected = 2 * tp / (2 * tp + 2 * wrong + alone)
        assert metrics.typed_f1(counts.typed)[c - 1] == pytest.approx(expected)
        total = (true == c).sum() + (guess == c).sum()
        plain = metrics.typed_f1(counts.typed, metrics.PLAIN_WEIGHTS)[c - 1]
        assert plain == pytest.approx(2 * tp / total)


def test_detection_by_iou_includes_one_half_and_counts_unknown_classes_once():
    reference, predicted = np.array([[3, 3, 3, 0, 6, 6]]), np.array([[0, 3, 3, 3, 6, 6]])
    table = metrics.overlap(reference, predicted)
    counts = metrics.detection_iou(table, lookup([1, 0]), lookup([1, 1]), 1)
    assert counts.found.tolist() == [2, 0, 0]
    assert counts.typed.tolist() == [[1, 1, 0, 0, 0]]
    none = metrics.detection_iou(metrics.overlap(reference * 0, predicted * 0), [0], [0], 1)
    assert np.isnan(metrics.detection_f1(none.found))
    assert np.isnan(metrics.typed_f1(none.typed)).all()


def test_detection_refuses_images_of_other_size():
    with pytest.raises(DataError, match="same height and width"):
        metrics.detection(np.zeros((2, 2), int), [0], np.zeros((2, 3), int), [0], 1, radius=3)


def test_reference_instances_by_hand():
    labels = np.array([[4, 4, 0, 9]], np.int32)
    table = np.zeros(10, np.uint8)
    table[[4, 9]] = 1, 2
    # Label 4: means .35 background, .4 and .25. Label 9: background wins.
    maps = np.array([[[0.6, 0.1, 1, 0.8]], [[0.0, 0.8, 0, 0.1]], [[0.4, 0.1, 0, 0.1]]], np.float32)
    found = metrics.reference_instance_classes(labels, table, maps)
    assert (found.true.tolist(), found.predicted.tolist()) == ([1, 2], [1, 0])
    assert found.probabilities == pytest.approx(np.array([[0.35, 0.4, 0.25], [0.8, 0.1, 0.1]]))
    with pytest.raises(DataError, match="expected"):
        metrics.reference_instance_classes(labels, table, maps[:, :, 1:])


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    true, seen = rng.integers(1, 5, 200), rng.integers(0, 5, 200)
    matrix = metrics.confusion_matrix(true, seen, 4)
    assert (matrix == confusion_matrix(true, seen, labels=range(5))).all()
    assert metrics.macro_f1(matrix) == pytest.approx(
        f1_score(true, seen, labels=[1, 2, 3, 4], average="macro")
    )
    expected = f1_score(true, seen, labels=[1, 2, 3, 4], average=None)
    assert metrics.class_f1(np.stack([matrix, 2 * matrix])) == pytest.approx(
        np.stack([expected, expected])
    )


def test_macro_f1_leaves_out_absent_classes_and_unknown_nuclei():
    matrix = metrics.confusion_matrix([1, 1, 0], [1, 1, 2], 3)
    assert metrics.class_f1(matrix)[0] == 1
    assert np.isnan(metrics.class_f1(matrix)[1:]).all()
    assert metrics.macro_f1(matrix) == 1
    assert metrics.class_f1(metrics.confusion_matrix([1], [2], 2)).tolist() == [0, 0]
    assert np.isnan(metrics.macro_f1(np.zeros((3, 3))))
    with pytest.raises(DataError, match="0 to 2"):
        metrics.confusion_matrix([3], [1], 2)


def test_count_r2_equals_scikit_learn():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 50, (12, 3))
    guess = true + rng.integers(-9, 9, (12, 3))
    moments = metrics.count_moments(true, guess).sum(0)
    expected = r2_score(true, guess, multioutput="raw_values")
    assert metrics.count_r2(moments) == pytest.approx(expected)
    assert np.isnan(metrics.count_r2(metrics.count_moments([[3], [3]], [[3], [1]]).sum(0))).all()


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_equals_torchmetrics(bins):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.4] * 4, 500)
    truth = rng.integers(0, 4, 500)
    theirs = MulticlassCalibrationError(4, n_bins=bins, norm="l1")
    expected = float(theirs(torch.from_numpy(probabilities), torch.from_numpy(truth)))
    ours = metrics.expected_calibration_error(probabilities, truth, bins)
    assert ours == pytest.approx(expected, abs=1e-6)


def test_reliability_by_hand():
    probabilities, truth = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.0, 1.0]], [0, 1, 1, 1]
    table = metrics.reliability_table(probabilities, truth, bins=2)
    assert table.cells.tolist() == [0, 4]
    assert table.confidence[1] == pytest.approx(3.3 / 4)
    assert table.accuracy[1] == pytest.approx(3 / 4)
    error = metrics.expected_calibration_error(probabilities, truth, bins=2)
    assert error == pytest.approx(0.075)
    assert np.isnan(metrics.expected_calibration_error(np.empty((0, 3)), np.empty(0, int)))
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        metrics.reliability_table([[2.0, -1.0]], [0])
    with pytest.raises(DataError, match="expected"):
        metrics.reliability_table(probabilities, truth[:2])
