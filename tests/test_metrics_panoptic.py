"""Overlap, panoptic quality and AJI against loops over pairs, literals and torchmetrics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchmetrics.detection import PanopticQuality as TorchPanopticQuality

from celltyper import metrics
from celltyper.errors import DataError


def scene(seed: int, size: int = 64, n: int = 40, largest: int = 5000):
    """Overlapping squares with ids that are far from contiguous."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((size, size), np.int32)
    for i in rng.choice(np.arange(1, largest), n, replace=False):
        r, c, h, w = rng.integers([0, 0, 4, 4], [size - 8, size - 8, 11, 11])
        labels[r : r + h, c : c + w] = i
    return labels


def shifted(labels, seed: int):
    """A prediction that is partly right: shifted, some labels lost, new ids."""
    rng = np.random.default_rng(seed)
    table = rng.permutation(np.arange(1, 9001)).astype(np.int32)[: labels.max() + 1]
    table[rng.random(len(table)) < 0.2] = 0
    table[0] = 0
    return table[np.roll(labels, rng.integers(0, 3, 2), (0, 1))]


def types(seed: int, length: int, k: int, low: int = 1):
    return np.random.default_rng(seed).integers(low, k + 1, length).astype(np.uint8)


def masks(labels):
    return {int(i): labels == i for i in np.unique(labels) if i}


def loop_iou(reference, predicted):
    ref, pred = masks(reference), masks(predicted)
    return {
        (i, j): (a & b).sum() / (a | b).sum()
        for (i, a), (j, b) in itertools.product(ref.items(), pred.items())
        if (a & b).any()
    }


def loop_pq(reference, predicted):
    good = [v for v in loop_iou(reference, predicted).values() if v > 0.5]
    fp = len(masks(predicted)) - len(good)
    fn = len(masks(reference)) - len(good)
    return np.array([len(good), fp, fn, sum(good)])


SCENES = [(scene(s), shifted(scene(s), s + 100)) for s in range(4)]


@pytest.mark.parametrize(("reference", "predicted"), SCENES)
def test_overlap_equals_a_loop_over_pairs(reference, predicted):
    table = metrics.overlap(reference, predicted)
    assert table.ref_ids.tolist() == sorted(masks(reference))
    assert table.pred_ids.tolist() == sorted(masks(predicted))
    assert table.ref_areas.tolist() == [(reference == i).sum() for i in table.ref_ids]
    assert table.pred_areas.tolist() == [(predicted == i).sum() for i in table.pred_ids]
    ours = zip(table.ref_ids[table.pair_ref], table.pred_ids[table.pair_pred], strict=True)
    found = dict(zip(((int(i), int(j)) for i, j in ours), metrics.iou_pairs(table), strict=True))
    assert found == pytest.approx(loop_iou(reference, predicted))
    assert list(found) == sorted(found)


def test_overlap_of_more_pairs_than_the_table_starts_with():
    reference = np.arange(1, 40001, dtype=np.int32).reshape(200, 200)
    table = metrics.overlap(reference, reference[::-1] * 50000)
    assert len(table.intersection) == 40000
    assert (table.intersection == 1).all()
    assert (table.pred_ids == np.arange(1, 40001) * 50000).all()


def test_overlap_accepts_other_integers_views_and_the_largest_id():
    a = np.array([[2**31 - 1, 0, 4]], np.int64)
    table = metrics.overlap(a, np.array([[4], [4], [0]], np.uint16).T)
    assert table.ref_ids.tolist() == [4, 2**31 - 1]
    assert (table.pair_ref.tolist(), table.intersection.tolist()) == ([1], [1])
    assert len(metrics.overlap(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.int32)).ref_ids) == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 3), np.int32), "same height and width"),
        (np.full((2, 2), -1, np.int32), "negative"),
        (np.zeros((2, 2)), "integers"),
        (np.full((2, 2), 2**31), "fit into int32"),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_overlap_refuses(bad, message, swap):
    good = np.ones((2, 2), np.int32)
    with pytest.raises(DataError, match=message):
        metrics.overlap(*((bad, good) if swap else (good, bad)))


def test_iou_of_exactly_one_half():
    # Intersection 2, union 4: no match for PQ, a match for F1 at IoU >= 0.5.
    reference = np.array([[1, 1, 1, 0]], np.int32)
    predicted = np.array([[0, 2, 2, 2]], np.int32)
    table = metrics.overlap(reference, predicted)
    assert metrics.iou_pairs(table).tolist() == [0.5]
    assert len(metrics.match_iou(table).score) == 0
    assert len(metrics.match_iou(table, inclusive=True).score) == 1
    assert metrics.panoptic_quality(reference, predicted)[3:] == (0, 1, 1)
    assert metrics.panoptic_quality(reference, predicted).pq == 0


def test_two_halves_at_exactly_one_half_give_one_match():
    table = metrics.overlap(np.array([[7, 7]]), np.array([[1, 2]]))
    pairs = metrics.match_iou(table, inclusive=True)
    assert (len(pairs.ref), pairs.score.tolist()) == (1, [0.5])


@pytest.mark.parametrize(("reference", "predicted"), SCENES)
def test_low_thresholds_equal_a_dense_assignment(reference, predicted):
    table = metrics.overlap(reference, predicted)
    dense = np.zeros((len(table.ref_ids), len(table.pred_ids)))
    dense[table.pair_ref, table.pair_pred] = metrics.iou_pairs(table)
    gain = np.where(dense > 0.1, 1000 + dense, 0)
    rows, cols = linear_sum_assignment(gain, maximize=True)
    expected = dense[rows, cols][dense[rows, cols] > 0.1]
    pairs = metrics.match_iou(table, 0.1)
    assert len(set(pairs.ref)) == len(set(pairs.pred)) == len(pairs.score) == len(expected)
    assert pairs.score.sum() == pytest.approx(expected.sum())


@pytest.mark.parametrize(("reference", "predicted"), SCENES)
def test_panoptic_quality_equals_the_loop(reference, predicted):
    tp, fp, fn, iou = loop_pq(reference, predicted)
    score = metrics.panoptic_quality(reference, predicted)
    assert (score.tp, score.fp, score.fn) == (tp, fp, fn)
    assert score.tp > 0
    assert score.dq == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert score.sq == pytest.approx(iou / tp)
    assert score.pq == pytest.approx(iou / (tp + fp / 2 + fn / 2))


def test_panoptic_quality_by_hand_and_of_empty_images():
    empty, one = np.zeros((1, 5), np.int32), np.array([[1, 1, 1, 0, 2]], np.int32)
    # IoU 2/3 for label 1, label 2 missed: PQ = (2/3) / 1.5.
    score = metrics.panoptic_quality(one, np.array([[5, 5, 0, 0, 0]], np.int32))
    assert score == pytest.approx((4 / 9, 2 / 3, 2 / 3, 1, 0, 1))
    assert np.isnan(metrics.panoptic_quality(empty, empty)[:3]).all()
    assert metrics.panoptic_quality(one, empty) == (0, 0, 0, 0, 0, 2)
    assert metrics.panoptic_quality(empty, one) == (0, 0, 0, 0, 2, 0)
    assert metrics.panoptic_quality(one, one).pq == 1


@pytest.mark.parametrize(("reference", "predicted"), SCENES)
def test_multiclass_equals_every_class_alone(reference, predicted):
    k = 5
    ref_types, pred_types = types(1, reference.max() + 1, k, 0), types(2, predicted.max() + 1, k)
    pred_types[::2] = 3
    score = metrics.multiclass_panoptic_quality(reference, ref_types, predicted, pred_types, k)
    for c in range(1, k + 1):
        alone = [
            np.where(t[labels] == c, labels, 0)
            for labels, t in ((reference, ref_types), (predicted, pred_types))
        ]
        assert score.counts[c - 1] == pytest.approx(loop_pq(*alone))
        assert score.pq[c - 1] == pytest.approx(metrics.panoptic_quality(*alone).pq, nan_ok=True)
    assert score.binary == pytest.approx(loop_pq(reference, predicted))
    assert score.bpq == pytest.approx(metrics.panoptic_quality(reference, predicted).pq)
    assert score.mpq == pytest.approx(np.nanmean(score.pq))


def test_multiclass_equals_torchmetrics():
    reference, predicted = SCENES[0]
    ref_types, pred_types = types(1, reference.max() + 1, 3), types(1, predicted.max() + 1, 3)
    pred_types[:] = 1 + np.arange(len(pred_types)) % 3
    theirs = TorchPanopticQuality(things={1, 2, 3}, stuffs={0}, return_per_class=True)

    def both(labels, t):
        known = np.where(labels > 0, t[labels], 0)
        return torch.from_numpy(np.stack([known, labels], -1).astype(np.int64))[None]

    theirs.update(both(predicted, pred_types), both(reference, ref_types))
    ours = metrics.multiclass_panoptic_quality(reference, ref_types, predicted, pred_types, 3)
    assert ours.pq == pytest.approx(theirs.compute().numpy().ravel()[:3], abs=1e-6)


def test_pooling_rules_differ_as_published():
    # Image 1: class 1 perfect, class 2 predicted but not in the reference.
    # Image 2: class 1 missed, class 2 found with IoU .8.
    counts = np.array([[[1, 0, 0, 1], [0, 2, 0, 0]], [[0, 0, 1, 0], [1, 0, 0, 0.8]]])
    assert metrics.mpq_pannuke(counts).tolist() == [1.0, 0.4]  # the false class 2 is not seen
    assert metrics.mpq_plus(counts.sum(0)) == pytest.approx((1 / 1.5 + 0.8 / 2) / 2)
    assert np.isnan(metrics.mpq_pannuke(np.zeros((2, 4))))
    assert np.isnan(metrics.mpq_plus(np.zeros((2, 4))))


def test_types_are_checked():
    labels = np.array([[3]], np.int32)
    good = np.array([0, 0, 0, 1], np.uint8)
    with pytest.raises(DataError, match="type table has 3 entries"):
        metrics.multiclass_panoptic_quality(labels, good[:3], labels, good, 1)
    with pytest.raises(DataError, match="class 7"):
        metrics.multiclass_panoptic_quality(labels, good * 7, labels, good, 5)


@pytest.mark.parametrize(("reference", "predicted"), SCENES)
def test_aji_equals_the_loop(reference, predicted):
    ref, pred = masks(reference), masks(predicted)
    inter, union, used = 0, 0, set()
    for a in ref.values():
        iou = {j: (a & b).sum() / (a | b).sum() for j, b in pred.items()}
        best = max(iou, key=iou.get)
        if iou[best] == 0:
            union += a.sum()
            continue
        inter += (a & pred[best]).sum()
        union += (a | pred[best]).sum()
        used.add(best)
    union += sum(b.sum() for j, b in pred.items() if j not in used)
    assert metrics.aji(reference, predicted) == pytest.approx(inter / union)


@pytest.mark.parametrize(("reference", "predicted"), SCENES)
def test_aji_plus_equals_a_dense_assignment(reference, predicted):
    ref, pred = list(masks(reference).values()), list(masks(predicted).values())
    iou = np.array([[(a & b).sum() / (a | b).sum() for b in pred] for a in ref])
    pairs = [(i, j) for i, j in zip(*linear_sum_assignment(-iou), strict=True) if iou[i, j]]
    inter = sum((ref[i] & pred[j]).sum() for i, j in pairs)
    union = sum(m.sum() for m in ref) + sum(m.sum() for m in pred) - inter
    assert metrics.aji_plus(reference, predicted) == pytest.approx(inter / union)


def test_aji_by_hand():
    # Both reference labels take the one prediction: intersections 2 + 1, unions 3 + 3.
    reference, predicted = np.array([[1, 1, 2]]), np.array([[9, 9, 9]])
    assert metrics.aji(reference, predicted) == pytest.approx(3 / 6)
    assert metrics.aji_plus(reference, predicted) == pytest.approx(2 / 4)
    assert np.isnan(metrics.aji(reference * 0, predicted * 0))
    assert metrics.aji(reference * 0, predicted) == metrics.aji(reference, predicted * 0) == 0
