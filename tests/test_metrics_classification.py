"""Scores of patches against scikit-learn, loops over pairs and explicit resampling."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import sklearn.metrics as reference

from celltyper import metrics
from celltyper.errors import ConfigError, DataError
from celltyper.metrics.classification import agreement, score_patches
from celltyper.metrics.comparison import ScoredPatches, paired_difference
from celltyper.metrics.confusion import (
    accuracy,
    call_classes,
    class_precision,
    class_recall,
    f1_of_classes,
    macro,
    quadratic_kappa,
    weighted_f1,
)
from celltyper.metrics.ranking import (
    auroc,
    average_precision,
    choose_threshold,
    operating_points,
    sensitivity_at_specificity,
)
from celltyper.metrics.scoring import brier_score, patch_reliability

NAN = float("nan")
TWO = ("Atypical", "Normal")
FOUR = ("a", "b", "c", "d")


def patches(seed: int = 0, n: int = 90, k: int = 2, clusters: int = 9, decimals: int = 2):
    """Labels, probabilities with many ties, groups of unequal size; class 0 is rare."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=[0.2, *[0.8 / (k - 1)] * (k - 1)])
    logits = rng.normal(0, 1, (n, k)) + 1.2 * np.eye(k)[labels]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if k == 2:
        first = shares[:, 0].round(decimals)
        shares = np.column_stack([first, 1 - first])
    groups = [f"slide {int(g)}" for g in np.sqrt(rng.integers(0, clusters**2, n))]
    return labels, shares, groups


def one_by_one(labels, shares, positive, threshold, specificity):
    """All scores of one set from scikit-learn and loops, NaN where a class has no patch."""
    k = shares.shape[1]
    there = [c for c in range(k) if (labels == c).any()]
    truth, p = labels == positive, shares[:, positive]
    called = np.where(p >= threshold, positive, 1 - positive) if k == 2 else shares.argmax(1)
    both = 0 < truth.sum() < len(truth)
    f1 = reference.f1_score(labels, called, labels=there, average=None, zero_division=0)
    recall = [(called[labels == c] == c).mean() for c in there]
    passing = [
        ((p >= t) & truth).sum() / truth.sum()
        for t in [*np.unique(p), np.inf]
        if both and ((p < t) & ~truth).sum() >= specificity * (~truth).sum() - 1e-6
    ]
    confidence = p if k == 2 else shares.max(1)
    right = truth if k == 2 else called == labels
    ece = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        inside |= (confidence == 0) & (i == 0)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    several = len(there) > 1
    scores = {
        "balanced_accuracy": np.mean(recall) if several else NAN,
        "auroc": reference.roc_auc_score(truth, p) if both else NAN,
        "auprc": reference.average_precision_score(truth, p) if both else NAN,
        "f1": f1[there.index(positive)] if positive in there else NAN,
        "sensitivity": (called[truth] == positive).mean() if truth.any() else NAN,
        "specificity": (called[~truth] != positive).mean() if (~truth).any() else NAN,
        "sensitivity_at_specificity": max(passing) if both else NAN,
        "accuracy": reference.accuracy_score(labels, called),
        "weighted_f1": reference.f1_score(
            labels, called, labels=there, average="weighted", zero_division=0
        ),
        "kappa": reference.cohen_kappa_score(
            labels, called, weights="quadratic", labels=list(range(k))
        )
        if several
        else NAN,
        "ece": ece,
        "brier": np.mean(((shares - np.eye(k)[labels]) ** 2).sum(1)) / 2,
    }
    if k > 2:
        each = [reference.roc_auc_score(labels == c, shares[:, c]) for c in there if several]
        scores["macro_auroc"] = np.mean(each) if several else NAN
        scores["macro_f1"] = f1.mean() if several else NAN
    return scores


def test_every_score_equals_scikit_learn_and_loops():
    for seed, k, threshold in [(0, 2, 0.5), (1, 2, 0.23), (2, 4, 0.5)]:
        labels, shares, groups = patches(seed, k=k)
        found = score_patches(
            labels, shares, (TWO, FOUR)[k > 2], 0, groups, threshold=threshold, resamples=10
        )
        expected = one_by_one(labels, shares, 0, threshold, 0.9)
        assert list(found.scores) == list(found.rules) == list(expected)
        for name, value in expected.items():
            assert found.scores[name].value == pytest.approx(value, abs=1e-12), name
        called = call_classes(shares, 0, threshold)
        report = reference.classification_report(
            labels, called, target_names=found.classes, output_dict=True, zero_division=0
        )
        for c, name in enumerate(found.classes):
            assert found.per_class[name]["recall"].value == pytest.approx(report[name]["recall"])
            assert found.per_class[name]["precision"].value == pytest.approx(
                report[name]["precision"]
            )
            assert found.per_class[name]["f1"].value == pytest.approx(report[name]["f1-score"])
            if k > 2:
                area = reference.roc_auc_score(labels == c, shares[:, c])
                assert found.per_class[name]["auroc"].value == pytest.approx(area)
        assert (found.confusion == reference.confusion_matrix(labels, called)).all()
        assert found.patches == 90
        assert found.clusters == len(set(groups))


@pytest.mark.parametrize(("k", "seed"), [(2, 3), (4, 4)])
def test_intervals_equal_a_slow_loop_over_the_same_draws(k, seed):
    # Nine slides and few patches: some resamples have no patch of the rare class.
    labels, shares, groups = patches(seed, n=24, k=k)
    found = score_patches(
        labels, shares, (TWO, FOUR)[k > 2], 0, groups, threshold=0.5, resamples=60, seed=7
    )
    names = sorted(set(groups))
    chances = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(7).multinomial(len(names), chances, size=60)
    drawn = []
    for draw in draws:
        rows = [
            i
            for name, times in zip(names, draw, strict=True)
            for _ in range(times)
            for i, group in enumerate(groups)
            if group == name
        ]
        drawn.append(one_by_one(labels[rows], shares[rows], 0, 0.5, 0.9))
    lacking = sum(np.isnan(scores["auroc"]) for scores in drawn)
    assert lacking > 0, "the case shall have resamples without the rare class"
    for name, score in found.scores.items():
        values = [scores[name] for scores in drawn if not np.isnan(scores[name])]
        low, high = np.quantile(values, [0.025, 0.975])
        assert (score.low, score.high) == (pytest.approx(low), pytest.approx(high)), name


def test_area_under_the_curve_counts_pairs_and_ties_by_weight():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 30), rng.integers(0, 6, 30) / 5
    weights = rng.integers(0, 4, (5, 30)).astype(float)
    found = auroc(operating_points(labels, scores, positive=1, weights=weights))
    for w, area in zip(weights, found, strict=True):
        won = total = 0.0
        for i, j in product(np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)):
            won += w[i] * w[j] * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
            total += w[i] * w[j]
        assert area == pytest.approx(won / total)
        precision = reference.average_precision_score(labels, scores, sample_weight=w)
        one = operating_points(labels, scores, positive=1, weights=w)
        assert average_precision(one) == pytest.approx(precision)


def test_operating_points_by_hand():
    #         called at: .9   .7        .4   .1
    scores, labels = [0.9, 0.7, 0.7, 0.4, 0.1], [2, 0, 2, 1, 0]
    points = operating_points(labels, scores, positive=2)
    assert points.thresholds.tolist() == [0.9, 0.7, 0.4, 0.1]
    assert points.true_positives.tolist() == [1, 2, 2, 2]
    assert points.false_positives.tolist() == [0, 1, 2, 3]
    # Pairs: .9 beats three; .7 beats two and ties one: 5.5 of 6.
    assert auroc(points) == pytest.approx(5.5 / 6)
    # Half the recall at precision 1, the other half at 2/3.
    assert average_precision(points) == pytest.approx((1 + 2 / 3) / 2)
    assert auroc(operating_points(labels, [0.5] * 5, positive=2)) == 0.5


def test_sensitivity_reads_the_last_threshold_that_is_specific_enough():
    # One of ten negatives may be called for .9, none for .91.
    labels = np.array([1, 0, 1, 0, 1, *[0] * 8])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, *[0.1] * 8])
    points = operating_points(labels, scores, positive=1)
    assert sensitivity_at_specificity(points, 0.90) == pytest.approx(2 / 3)
    assert sensitivity_at_specificity(points, 0.91) == pytest.approx(1 / 3)
    assert sensitivity_at_specificity(points, 0.80) == 1
    # 0.55 * 100 is a little more than 55 in floating point.
    fine = operating_points([*[0] * 45, 1, *[0] * 55], np.linspace(1, 0, 101), positive=1)
    assert sensitivity_at_specificity(fine, 0.55) == 1
    assert sensitivity_at_specificity(fine, 0.56) == 0
    # The highest score is a false alarm: nothing can be found at full specificity.
    assert sensitivity_at_specificity(operating_points([1, 0], [0.2, 0.3], positive=1), 1) == 0
    with pytest.raises(DataError, match="specificity 90"):
        sensitivity_at_specificity(points, 90)


def test_absent_classes_are_nan():
    shares = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    for labels, known in [
        ([1, 1, 1], {"specificity"}),
        ([0, 0, 0], {"f1", "sensitivity"}),
    ]:
        scores = score_patches(labels, shares, TWO, 0, ["x", "y", "z"], resamples=20).scores
        known = known | {"accuracy", "weighted_f1", "ece", "brier"}
        assert {name for name, score in scores.items() if not np.isnan(score.value)} == known
        assert {name for name, score in scores.items() if not np.isnan(score.low)} == known
    # Class 1 has no patch: no recall, precision, F1 of its own although a patch was called so.
    matrix = [[3, 1, 0], [0, 0, 0], [0, 0, 2]]
    assert class_recall(matrix) == pytest.approx([0.75, NAN, 1], nan_ok=True)
    assert class_precision(matrix) == pytest.approx([1, NAN, 1], nan_ok=True)
    assert f1_of_classes(matrix) == pytest.approx([6 / 7, NAN, 1], nan_ok=True)
    assert macro(class_recall(matrix)) == pytest.approx(0.875)
    assert np.isnan(macro([0.9, NAN, NAN]))
    # A class that has patches and finds none is 0, not NaN.
    assert f1_of_classes([[0, 2], [0, 2]])[0] == 0


def test_scores_of_a_confusion_matrix_by_hand():
    # 6 of 10 right; by chance (4 * 5 + 6 * 5) / 100 = .5: kappa .2.
    matrix = [[2, 2], [2, 4]]
    assert accuracy(matrix) == 0.6
    assert quadratic_kappa([[2, 2], [3, 3]]) == pytest.approx(0)
    assert quadratic_kappa(matrix) == pytest.approx((0.6 - 0.52) / 0.48)
    assert weighted_f1(matrix) == pytest.approx(0.4 * 0.5 + 0.6 * 2 / 3)
    assert np.isnan(quadratic_kappa([[3, 1], [0, 0]]))
    assert np.isnan(accuracy(np.zeros((2, 2))))


def test_threshold_by_hand_and_its_ties():
    def chosen(labels, scores, **how):
        return choose_threshold(labels, scores, positive=1, **how)

    assert chosen([0, 0, 1, 0, 1], [0.1, 0.2, 0.3, 0.6, 0.8]) == pytest.approx(0.25)
    # Cuts at .3 and .7 are as good; the lower is as near to .5.
    assert chosen([0, 1, 0, 1], [0.2, 0.4, 0.6, 0.8]) == pytest.approx(0.3)
    # The one at .8 is nearer than that at .1.
    assert chosen([0, 1, 0, 1], [0.0, 0.2, 0.75, 0.85]) == pytest.approx(0.8)
    # All that the scores say is wrong: calling everything is as good as can be.
    assert chosen([1, 0], [0.1, 0.9]) == 0
    # F1 of the rare class pays for alarms by number, not by share.
    labels = [1, *[0] * 4, 1, *[0] * 15]
    scores = [0.9, *[0.6] * 4, 0.4, *[0.1] * 15]
    assert chosen(labels, scores) == pytest.approx(0.25)
    assert chosen(labels, scores, rule="f1") == pytest.approx(0.75)
    # Two floats without a middle between them.
    low = 0.5
    high = np.nextafter(low, 1)
    assert chosen([0, 1], [low, high]) == high
    with pytest.raises(ConfigError, match="balanced accuracy"):
        chosen([0, 1], [0.2, 0.4], rule="balanced")
    with pytest.raises(DataError, match="no validation patch of the positive class 1"):
        chosen([0, 0], [0.2, 0.4])
    with pytest.raises(DataError, match="no validation patch outside"):
        chosen([1, 1], [0.2, 0.4])


@pytest.mark.parametrize("seed", range(5))
def test_threshold_is_the_best_of_all(seed):
    labels, shares, _ = patches(seed, n=40, decimals=1)
    p = shares[:, 0]

    def gain(threshold):
        return reference.balanced_accuracy_score(labels == 0, p >= threshold)

    found = choose_threshold(labels, p, positive=0)
    assert gain(found) == pytest.approx(max(gain(t) for t in [*np.unique(p), 2]))


def test_calibration_of_two_and_of_more_classes():
    # Positive is class 0: .8 came true once in two, .1 never.
    shares = np.array([[0.8, 0.2], [0.8, 0.2], [0.1, 0.9], [0.1, 0.9]])
    table = patch_reliability([0, 1, 1, 1], shares, 0, bins=10)
    full = table.cells > 0
    assert table.confidence[full] == pytest.approx([0.1, 0.8])
    assert table.accuracy[full] == pytest.approx([0, 0.5])
    assert table.cells[full].tolist() == [2, 2]
    labels, many, _ = patches(0, k=4)
    assert patch_reliability(labels, many, 0).confidence == pytest.approx(
        metrics.reliability_table(many, labels).confidence, nan_ok=True
    )
    assert brier_score([0, 1], [[1, 0], [0.3, 0.7]]) == pytest.approx(0.09 / 2)
    # (.25 + .04 + .09) / 2
    assert brier_score([0], [[0.5, 0.2, 0.3]]) == pytest.approx(0.19)
    assert np.isnan(brier_score([], np.zeros((0, 2))))


def test_strata_are_the_scores_of_their_patches_alone():
    labels, shares, groups = patches(5, n=120)
    votes = np.array([[1, 0], [2 / 3, 1 / 3], [1 / 3, 2 / 3], [0.5, 0.5]])[np.arange(120) % 4]
    assert agreement(votes)[:4].tolist() == [0, 1, 1, 2]
    assert agreement([[0.4, 0.4, 0.2], [0.6, 0.2, 0.2]]).tolist() == [2, 1]
    found = score_patches(labels, shares, TWO, 0, groups, votes=votes, resamples=40, seed=1)
    assert {name: part.patches for name, part in found.strata.items()} == {
        "unanimous": 30,
        "majority": 60,
        "split": 30,
    }
    inside = np.arange(120) % 4 == 3
    expected = one_by_one(labels[inside], shares[inside], 0, 0.5, 0.9)
    split = found.strata["split"].scores
    assert {name: split[name].value for name in split} == pytest.approx(expected)
    only = score_patches(labels, shares, TWO, 0, groups, votes=np.eye(2)[labels], resamples=5)
    assert list(only.strata) == ["unanimous"]
    with pytest.raises(DataError, match="sum 1"):
        agreement([[2, 1]])
    with pytest.raises(DataError, match="votes are"):
        score_patches(labels, shares, TWO, 0, groups, votes=votes[1:])


def test_one_patient_has_scores_and_no_interval():
    labels, shares, _ = patches()
    found = score_patches(labels, shares, TWO, 0, ["one"] * 90)
    assert found.scores["auroc"].value > 0.5
    assert np.isnan([s[1:] for s in found.scores.values()]).all()


def test_chunks_of_resamples_are_the_same_as_all_at_once(monkeypatch):
    labels, shares, groups = patches()
    whole = score_patches(labels, shares, TWO, 0, groups, resamples=50)
    monkeypatch.setattr("celltyper.metrics.scoring._CHUNK", 90 * 7)
    parts = score_patches(labels, shares, TWO, 0, groups, resamples=50)
    assert parts.scores == whole.scores


def two_runs(seed: int = 0):
    labels, shares, groups = patches(seed, n=200)
    other = np.clip(shares[:, 0] + np.random.default_rng(seed).normal(0, 0.15, 200), 0, 1)
    names = [f"patch {i}.png" for i in range(200)]
    first = ScoredPatches(names, labels, shares, groups, 0.4)
    second = ScoredPatches(names, labels, np.column_stack([other, 1 - other]), groups, 0.6)
    return first, second


def shuffled(run, order):
    return ScoredPatches(
        [run.names[i] for i in order],
        run.labels[order],
        run.probabilities[order],
        [run.groups[i] for i in order],
        run.threshold,
    )


def test_difference_of_two_runs_equals_the_paired_bootstrap_of_counts():
    # Accuracy is a ratio of counts, for which the paired bootstrap of counts is the answer.
    first, second = two_runs()
    groups = sorted(set(first.groups))
    counts = []
    for run in (first, second):
        right = (run.probabilities[:, 0] >= run.threshold) == (run.labels == 0)
        inside = np.array([[g == name for g in run.groups] for name in groups])
        counts.append(np.stack([(inside & right).sum(1), inside.sum(1)], axis=1))
    expected = metrics.paired_bootstrap(
        *counts, lambda s: metrics.ratio(s[..., 0], s[..., 1]), n=500, seed=3
    )
    found = paired_difference(first, second, TWO, 0, resamples=500, seed=3)
    assert list(found["accuracy"]) == pytest.approx(list(expected))
    a, b = (one_by_one(r.labels, r.probabilities, 0, r.threshold, 0.9) for r in (first, second))
    for name, difference in found.items():
        assert difference.difference == pytest.approx(a[name] - b[name], abs=1e-12), name


def test_difference_of_areas_equals_a_slow_loop_over_the_same_draws():
    first, second = two_runs(1)
    found = paired_difference(first, second, TWO, 0, resamples=99, seed=3)["auroc"]
    names = sorted(set(first.groups))
    draws = np.random.default_rng(3).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=99
    )
    drawn = []
    for draw in draws:
        times = np.array([draw[names.index(g)] for g in first.groups])
        rows = np.repeat(np.arange(200), times)
        drawn.append(
            reference.roc_auc_score(first.labels[rows] == 0, first.probabilities[rows, 0])
            - reference.roc_auc_score(second.labels[rows] == 0, second.probabilities[rows, 0])
        )
    drawn = np.array(drawn)
    assert found[1:3] == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    side = min((drawn <= 0).sum(), (drawn >= 0).sum())
    assert found.p_value == pytest.approx(2 * (side + 1) / 100)


def test_difference_does_not_depend_on_the_order_of_patches():
    first, second = two_runs()
    found = paired_difference(first, second, TWO, 0, resamples=50)
    order = np.random.default_rng(0).permutation(200)
    again = paired_difference(first, shuffled(second, order), TWO, 0, resamples=50)
    for name in found:
        assert again[name] == pytest.approx(found[name]), name
    same = paired_difference(first, shuffled(first, order), TWO, 0, resamples=50)
    assert same["auroc"] == pytest.approx((0, 0, 0, 1), abs=1e-12)


def test_runs_on_other_patches_are_refused():
    first, second = two_runs()
    with pytest.raises(DataError, match=r"1 only in the first \(such as 'patch 0.png'\)"):
        paired_difference(first, shuffled(second, np.arange(1, 200)), TWO, 0)
    flipped = ScoredPatches(
        first.names, 1 - first.labels, second.probabilities, first.groups, second.threshold
    )
    with pytest.raises(DataError, match="200 patches have another label in the second run"):
        paired_difference(first, flipped, TWO, 0)
    moved = ScoredPatches(first.names, first.labels, second.probabilities, ["x", *first.groups[1:]])
    with pytest.raises(DataError, match=r"1 patches have another group .*'patch 0.png'"):
        paired_difference(first, moved, TWO, 0)
    twice = ScoredPatches(["x"] * 200, first.labels, second.probabilities, first.groups)
    with pytest.raises(DataError, match="every name once"):
        paired_difference(first, twice, TWO, 0)
    short = ScoredPatches(first.names, first.labels[1:], first.probabilities, first.groups)
    with pytest.raises(DataError, match="the first run needs one label"):
        paired_difference(short, second, TWO, 0)


def test_bad_input_is_refused():
    labels, shares, groups = patches()

    def score(labels=labels, shares=shares, classes=TWO, positive=0, groups=groups, **more):
        return score_patches(labels, shares, classes, positive, groups, **more)

    for match, wrong in [
        ("89 groups", {"groups": groups[1:]}),
        ("expected", {"shares": shares[:, :1]}),
        ("no patches", {"labels": [], "shares": np.zeros((0, 2)), "groups": []}),
        ("positive class 2 of 2", {"positive": 2}),
        ("labels go from -1", {"labels": np.where(np.arange(90) == 3, -1, labels)}),
        ("labels go from 1 to 2", {"labels": labels + 1}),
        ("90 of 90 rows are no probabilities", {"shares": shares * 2}),
        ("row 4: .nan", {"shares": np.where(np.arange(90)[:, None] == 4, NAN, shares)}),
    ]:
        with pytest.raises(DataError, match=match):
            score(**wrong)
    four = patches(k=4)
    with pytest.raises(DataError, match=r"threshold 0\.3 for 4 classes"):
        score_patches(four[0], four[1], FOUR, 0, four[2], threshold=0.3)
    with pytest.raises(DataError, match="2 of 3 scores are NaN"):
        operating_points([0, 1, 1], [NAN, NAN, 1], positive=1)
    with pytest.raises(DataError, match="expected"):
        operating_points([0, 1, 1], [0.2, 0.3], positive=1)


def test_rules_say_what_was_done():
    labels, shares, groups = patches()
    rules = score_patches(
        labels, shares, TWO, 0, groups, threshold=0.31, specificity=0.95, resamples=1
    ).rules
    assert "called Atypical from 0.31 on" in rules["f1"]
    assert "at least 0.95" in rules["sensitivity_at_specificity"]
    assert f"by chance {np.mean(labels == 0):.2f}" in rules["auprc"]
    assert not any("{" in rule for rule in rules.values())
