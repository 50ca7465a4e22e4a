"""Probes against scikit-learn, scipy and arithmetic; their choices against plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from celltyper.checkpoints import read_tensors, write_tensors
from celltyper.errors import CheckpointError, ConfigError, DataError
from celltyper.probes import logistic
from celltyper.probes.cases import DEFAULT, check_cases, choose, standard_of
from celltyper.probes.folds import grouped_folds
from celltyper.probes.logistic import STRENGTHS, choose_strength
from celltyper.probes.neighbours import NEIGHBOURS
from celltyper.probes.probe import PROBES, check_options, fit_probe, load_probe

Float = NDArray[np.float64]

FAST: dict[str, dict[str, Any]] = {"mlp": {"epochs": 3, "hidden": 8}}


def table(
    n: int = 120, d: int = 6, k: int = 2, seed: int = 0
) -> tuple[Float, NDArray[np.intp], list[str]]:
    """Unequal classes that overlap, on features of very different scale, in ten groups."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=np.arange(k, 0, -1) / (k * (k + 1) / 2))
    x = rng.normal(size=(n, d)) + rng.normal(size=(k, d))[labels]
    return x * 10.0 ** rng.integers(-2, 3, d) + 5, labels, [f"s{i % 10}" for i in range(n)]


def one_hot(labels: NDArray[np.intp]) -> Float:
    return np.eye(int(labels.max()) + 1)[labels]


# folds


def test_folds_keep_groups_whole_and_classes_in_proportion() -> None:
    rng = np.random.default_rng(0)
    member = np.repeat(np.arange(40), rng.integers(5, 40, 40))
    labels = (rng.random(len(member)) < np.where(member % 4 == 0, 0.6, 0.1)).astype(int)
    groups = [f"slide {m}" for m in member]
    fold = grouped_folds(one_hot(labels), groups, 5, 3)
    assert sorted(set(fold)) == [0, 1, 2, 3, 4]
    assert all(len(set(fold[member == m])) == 1 for m in range(40))
    for c in (0, 1):
        shares = np.bincount(fold[labels == c]) / (labels == c).sum()
        assert np.abs(shares - 0.2).max() < 0.03
    order = rng.permutation(len(member))
    again = grouped_folds(one_hot(labels)[order], [groups[i] for i in order], 5, 3)
    np.testing.assert_array_equal(again, fold[order])
    assert (grouped_folds(one_hot(labels), groups, 5, 4) != fold).any()


def test_folds_need_groups() -> None:
    with pytest.raises(DataError, match=r"train\.csv: 2 slides or patients .* 3 folds"):
        grouped_folds(np.eye(2), ["a", "b"], 3, 0, where="train.csv")


# logistic regression


@pytest.mark.parametrize("rule", ["balanced", "none"])
@pytest.mark.parametrize(("n", "d", "k"), [(120, 6, 2), (120, 6, 3), (30, 50, 2), (30, 50, 4)])
def test_logistic_is_scikit_learns_optimum(n: int, d: int, k: int, rule: str) -> None:
    x, labels, groups = table(n, d, k)
    weights = np.random.default_rng(1).uniform(0.2, 2, n)
    strength = 0.05
    probe = fit_probe(
        "logistic",
        x,
        one_hot(labels),
        groups,
        weights=weights,
        class_weights=rule,  # type: ignore[arg-type]
        strength=strength,
    )
    # class weights there do not count the weights of cases, so both go in as one
    mass = np.bincount(labels, weights)
    total = weights / mass[labels] if rule == "balanced" else weights
    c = (2 if k == 2 else 1) / (strength * total.sum())
    standard = StandardScaler().fit(x)
    other = LogisticRegression(C=c, tol=1e-10, max_iter=10_000)
    other.fit(standard.transform(x), labels, total)
    fresh = table(50, d, k, seed=2)[0]
    np.testing.assert_allclose(
        probe.probabilities(fresh), other.predict_proba(standard.transform(fresh)), atol=1e-5
    )
    weight = probe.tensors()["weight"].numpy() * standard.scale_[:, None]
    if k == 2:
        np.testing.assert_allclose(weight[:, 1] - weight[:, 0], other.coef_[0], atol=1e-4)
    else:
        np.testing.assert_allclose(weight.T, other.coef_, atol=1e-4)


@pytest.mark.parametrize("rule", ["balanced", "sqrt", "none"])
def test_logistic_with_soft_targets_is_the_minimum_of_its_objective(rule: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    targets = rng.dirichlet([3, 2, 1], 40)
    weights = rng.uniform(0.1, 1, 40)
    probe = fit_probe(
        "logistic",
        x,
        targets,
        ["a"] * 40,
        weights=weights,
        class_weights=rule,  # type: ignore[arg-type]
        strength=0.02,
    )
    z = (x - x.mean(0)) / x.std(0)
    frequency = (targets * weights[:, None]).sum(0) / weights.sum()
    power = {"balanced": -1.0, "sqrt": -0.5, "none": 0.0}[rule]
    a = targets * weights[:, None] * frequency**power

    def objective(theta: Float) -> float:
        b, bias = theta[:9].reshape(3, 3), theta[9:]
        logits = z @ b + bias
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-(a * log_p).sum() / a.sum() + 0.01 * (b**2).sum())

    best = minimize(objective, np.zeros(12), method="BFGS", options={"gtol": 1e-8})
    logits = z @ best.x[:9].reshape(3, 3) + best.x[9:]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probe.probabilities(x), expected, atol=1e-5)


def test_logistic_on_constant_embeddings_gives_the_weighted_frequencies() -> None:
    x = np.full((10, 3), 0.1, np.float32)
    targets = one_hot(np.array([0] * 8 + [1] * 2))
    groups = ["a"] * 10
    for rule, rare in (("none", 0.2), ("balanced", 0.5), ("sqrt", 1 / 3)):
        probe = fit_probe(
            "logistic",
            x,
            targets,
            groups,
            class_weights=rule,  # type: ignore[arg-type]
            strength=1.0,
        )
        # of another value, which training cannot know anything about
        np.testing.assert_allclose(
            probe.probabilities(np.full((1, 3), 0.7)), [[1 - rare, rare]], atol=1e-6
        )


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("d", [6, 130])
def test_choice_of_strength_is_that_of_a_loop_over_folds(k: int, d: int) -> None:
    x, labels, groups = table(90, d, k, seed=4)
    # one group scatters more: standardising over all cases would show it to the others
    far = np.array(groups) == "s3"
    x[far] += 2 * (x[far] - x.mean(0))
    cases = check_cases(x, one_hot(labels), groups, None, "balanced")
    fold = cases.inner_folds(3, 0)
    assert fold is not None
    strengths = [0.003, 3.0, 0.1]
    accuracy, loss = [], []
    for strength in sorted(strengths, reverse=True):
        unseen = np.zeros((len(x), k))
        for f in range(3):
            train = fold != f
            standard = StandardScaler().fit(x[train])
            other = LogisticRegression(
                C=(2 if k == 2 else 1) / (strength * train.sum()),
                class_weight="balanced",
                tol=1e-10,
                max_iter=10_000,
            ).fit(standard.transform(x[train]), labels[train])
            unseen[~train] = other.predict_proba(standard.transform(x[~train]))
        accuracy.append(balanced_accuracy_score(labels, unseen.argmax(1)))
        own = np.log(unseen[np.arange(len(x)), labels])
        loss.append(np.mean([own[labels == c].mean() for c in range(k)]))
    found = choose_strength(cases, strengths, "balanced_accuracy", fold)
    np.testing.assert_allclose(found.scores, accuracy, atol=1e-9)
    assert found.value == sorted(strengths, reverse=True)[int(np.argmax(accuracy))]
    found = choose_strength(cases, strengths, "log_loss", fold)
    np.testing.assert_allclose(found.scores, loss, atol=1e-3)


def test_few_cases_of_many_features_are_no_hard_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every inner training part standardises by itself and spans a subspace of its own. Guided by
    # one bound of the curvature for all parts, these took some 1500 steps.
    rng = np.random.default_rng(0)
    labels = (np.arange(24) % 4 == 0).astype(int)
    x = rng.normal(size=(24, 300)) @ rng.normal(size=(300, 300)) + labels[:, None]
    targets = np.where(one_hot(labels) > 0, 2 / 3, 1 / 3)
    cases = check_cases(x, targets, [f"{i}" for i in range(24)], None, "balanced")
    fold = cases.inner_folds(5, 0)
    assert fold is not None
    monkeypatch.setattr(logistic, "_ITERATIONS", 300)
    found = choose_strength(cases, STRENGTHS, "log_loss", fold)
    assert np.isfinite(found.scores).all()


def test_of_equal_scores_the_strongest_wins() -> None:
    labels = np.array([0, 1] * 10)
    probe = fit_probe("logistic", np.ones((20, 2)), one_hot(labels), [f"{i}" for i in range(20)])
    facts = probe.facts()
    assert facts["scores"] == [facts["scores"][0]] * 9
    assert facts["strength"] == max(facts["strengths"]) == 10


def test_rounding_of_a_constant_is_no_feature() -> None:
    x = np.column_stack([np.full(1001, 0.1), np.arange(1001.0)])
    assert x[:, 0].std() > 0
    np.testing.assert_allclose(standard_of(x).scale, [1, np.arange(1001).std()])


def test_score_counts_classes_alike() -> None:
    targets = np.array([[1, 0], [0.9, 0.1], [0.6, 0.4], [1, 0], [0, 1]])
    cases = check_cases(np.zeros((5, 1)), targets, ["a"] * 5, None, "none")
    always_first = np.tile([0.9, 0.1], (5, 1))
    three = np.array([[0.9, 0.1], [0.4, 0.6], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
    found = choose([1, 2], [always_first, three], cases)
    np.testing.assert_allclose(found.scores, [(1 + 0) / 2, (3 / 4 + 1) / 2])
    assert found.value == 2
    found = choose([1], [always_first], cases, "log_loss")
    # 3.5 cases of the first class, 1.5 of the second
    np.testing.assert_allclose(found.scores, [(3.5 * np.log(0.9) + 1.5 * np.log(0.1)) / 5])


# neighbours


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbours_are_scikit_learns(metric: str) -> None:
    x, labels, groups = table(80, 5, 3)
    probe = fit_probe("knn", x, one_hot(labels), groups, class_weights="none", k=7, metric=metric)
    standard = StandardScaler().fit(x)
    other = KNeighborsClassifier(7, weights="distance", metric=metric, algorithm="brute")
    other.fit(standard.transform(x), labels)
    fresh = table(1100, 5, 3, seed=2)[0]  # more than one block of rows
    np.testing.assert_allclose(
        probe.probabilities(fresh), other.predict_proba(standard.transform(fresh)), atol=1e-4
    )
    np.testing.assert_allclose(probe.probabilities(x)[np.arange(80), labels], 1, atol=1e-4)


def test_votes_of_a_rare_class_weigh_more() -> None:
    # Standardising one feature scales all distances alike.
    x = np.array([[0.0], [2.0], [3.0], [4.0], [50.0], [60.0], [70.0], [80.0]])
    labels = np.array([1, 0, 0, 0, 0, 0, 0, 1])
    groups = [f"{i}" for i in range(8)]
    at = np.array([[1.0]])
    plain = fit_probe("knn", x, one_hot(labels), groups, class_weights="none", k=4)
    # at 1: distances 1 (rare), 1, 2, 3
    votes = np.array([1 + 1 / 2 + 1 / 3, 1])
    np.testing.assert_allclose(plain.probabilities(at)[0], votes / votes.sum(), atol=1e-6)
    balanced = fit_probe("knn", x, one_hot(labels), groups, k=4)
    votes = np.array([(1 + 1 / 2 + 1 / 3) / 6, 1 / 2])
    np.testing.assert_allclose(balanced.probabilities(at)[0], votes / votes.sum(), atol=1e-6)
    weighted = fit_probe(
        "knn", x, one_hot(labels), groups, class_weights="none", k=2, weights=[1, 3, *[1] * 6]
    )
    np.testing.assert_allclose(weighted.probabilities(at)[0], [0.75, 0.25], atol=1e-6)


def test_choice_of_neighbours_is_that_of_a_loop_over_folds() -> None:
    x, labels, groups = table(60, 4, 2, seed=7)
    probe = fit_probe("knn", x, one_hot(labels), groups, class_weights="none", folds=4)
    facts = probe.facts()
    fold = grouped_folds(one_hot(labels), groups, 4, 0)
    fewest = min((fold != f).sum() for f in range(4))
    assert facts["ks"] == [k for k in NEIGHBOURS if k <= fewest]
    expected = []
    for k in facts["ks"]:
        unseen = np.zeros(60, int)
        for f in range(4):
            standard = StandardScaler().fit(x[fold != f])
            other = KNeighborsClassifier(k, weights="distance")
            other.fit(standard.transform(x[fold != f]), labels[fold != f])
            unseen[fold == f] = other.predict(standard.transform(x[fold == f]))
        expected.append(balanced_accuracy_score(labels, unseen))
    np.testing.assert_allclose(facts["scores"], expected)
    assert facts["k"] == facts["ks"][int(np.argmax(expected))]


# prototypes


@pytest.mark.parametrize("k", [2, 3])
def test_prototypes_are_scikit_learns_discriminant_analysis(k: int) -> None:
    x, labels, groups = table(90, 6, k)
    standard = StandardScaler().fit(x)
    z, fresh = standard.transform(x), table(50, 6, k, seed=2)[0]
    for shrinkage in (0.05, 1.0):
        probe = fit_probe(
            "prototype", x, one_hot(labels), groups, class_weights="none", shrinkage=shrinkage
        )
        other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(z, labels)
        np.testing.assert_allclose(
            probe.probabilities(fresh),
            other.predict_proba(standard.transform(fresh)),
            atol=1e-6,
        )


def test_fully_shrunk_and_balanced_prototypes_are_the_nearest_class_mean() -> None:
    x, labels, groups = table(90, 6, 3)
    probe = fit_probe("prototype", x, one_hot(labels), groups, shrinkage=1)
    z, scale = (x - x.mean(0)) / x.std(0), x.std(0)
    means = np.stack([z[labels == c].mean(0) for c in range(3)])
    fresh = table(50, 6, 3, seed=2)[0]
    far = (((fresh - x.mean(0)) / scale)[:, None] - means) ** 2
    np.testing.assert_array_equal(probe.probabilities(fresh).argmax(1), far.sum(2).argmin(1))


def test_balanced_prototypes_have_equal_priors_and_the_covariance_of_all_cases() -> None:
    x, labels, groups = table(90, 4, 2)
    probe = fit_probe("prototype", x, one_hot(labels), groups, shrinkage=0.2)
    z = (x - x.mean(0)) / x.std(0)
    means = np.stack([z[labels == c].mean(0) for c in range(2)])
    covariance = np.mean([np.outer(r, r) for r in z - means[labels]], axis=0)
    covariance = 0.8 * covariance + 0.2 * np.trace(covariance) / 4 * np.eye(4)
    far = [np.einsum("nd,de,ne->n", z - m, np.linalg.inv(covariance), z - m) for m in means]
    odds = np.exp((far[0] - far[1]) / 2)
    np.testing.assert_allclose(probe.probabilities(x)[:, 1], odds / (1 + odds), atol=1e-8)


def test_choice_of_shrinkage_is_that_of_a_loop_over_folds() -> None:
    x, labels, groups = table(60, 8, 2, seed=3)
    facts = fit_probe("prototype", x, one_hot(labels), groups, class_weights="none").facts()
    fold = grouped_folds(one_hot(labels), groups, 5, 0)
    expected = []
    for shrinkage in facts["shrinkages"]:
        unseen = np.zeros(60, int)
        for f in range(5):
            standard = StandardScaler().fit(x[fold != f])
            other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
            other.fit(standard.transform(x[fold != f]), labels[fold != f])
            unseen[fold == f] = other.predict(standard.transform(x[fold == f]))
        expected.append(balanced_accuracy_score(labels, unseen))
    np.testing.assert_allclose(facts["scores"], expected)
    assert facts["shrinkages"] == sorted(facts["shrinkages"], reverse=True)
    assert facts["shrinkage"] == facts["shrinkages"][int(np.argmax(expected))]


# perceptron


def test_perceptron_learns_what_no_linear_probe_can() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    labels = (x[:, 0] * x[:, 1] > 0).astype(int)
    groups = [f"{i % 20}" for i in range(400)]
    fresh = rng.normal(size=(400, 2))
    truth = (fresh[:, 0] * fresh[:, 1] > 0).astype(int)
    options = {"hidden": 32, "learning_rate": 0.02, "epochs": 60, "dropout": 0.0}
    found = {}
    for name in ("mlp", "logistic"):
        probe = fit_probe(name, x, one_hot(labels), groups, **(options if name == "mlp" else {}))
        found[name] = (probe.probabilities(fresh).argmax(1) == truth).mean()
    assert found["mlp"] > 0.9
    assert found["logistic"] < 0.65


def test_perceptron_stops_where_the_held_out_groups_are_best() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 20)), np.arange(60) % 2
    groups = [f"{i // 6}" for i in range(60)]
    facts = fit_probe(
        "mlp", x, one_hot(labels), groups, learning_rate=0.01, patience=4, epochs=100
    ).facts()
    # labels are noise, so what is learnt is wrong elsewhere
    assert facts["epochs"] == facts["best_epoch"] + 4 < 100
    assert facts["best_epoch"] == 1 + int(np.argmax(facts["scores"]))


def test_perceptron_is_a_function_of_its_seed() -> None:
    x, labels, groups = table(60)
    runs = []
    for before, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        probe = fit_probe("mlp", x, one_hot(labels), groups, seed=seed, **FAST["mlp"])
        assert torch.equal(state, torch.get_rng_state())
        runs.append(probe.probabilities(x))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


def test_perceptron_by_hand() -> None:
    tensors = {
        "weight1": torch.tensor([[1.0, -1.0]], dtype=torch.float64),
        "bias1": torch.tensor([0.0, 1.0], dtype=torch.float64),
        "weight2": torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64),
        "bias2": torch.tensor([0.0, 1.0], dtype=torch.float64),
    }
    probe = load_probe({"name": "mlp", "features": 1}, tensors)
    # units (3, 0): logits (3, 1); units (0, 2): logits (0, 5)
    expected = [[1, np.exp(-2)], [np.exp(-5), 1]]
    np.testing.assert_allclose(
        probe.probabilities([[3.0], [-1.0]]), expected / np.sum(expected, 1, keepdims=True)
    )


# what all probes promise


@pytest.mark.parametrize("name", PROBES)
def test_probe_survives_saving_bit_for_bit(name: str, tmp_path: Path) -> None:
    x, labels, groups = table(90, 7, 3)
    soft = 0.7 * one_hot(labels) + 0.1
    probe = fit_probe(
        name, x.astype(np.float32), soft, groups, class_weights="sqrt", **FAST.get(name, {})
    )
    write_tensors(tmp_path / "probe.safetensors", probe.tensors(), probe.facts())
    tensors, facts = read_tensors(tmp_path / "probe.safetensors")
    assert facts == probe.facts()
    assert facts["name"] == name
    assert (facts["cases"], facts["features"], facts["classes"], facts["groups"]) == (90, 7, 3, 10)
    fresh = table(50, 7, 3, seed=2)[0]
    found = probe.probabilities(fresh)
    assert found.shape == (50, 3)
    assert found.dtype == np.float64
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1)
    np.testing.assert_array_equal(load_probe(facts, tensors).probabilities(fresh), found)
    assert probe.probabilities(fresh[:0]).shape == (0, 3)


@pytest.mark.parametrize("name", PROBES)
def test_case_of_weight_zero_is_left_out(name: str) -> None:
    x, labels, groups = table(90)
    weights = np.where(np.arange(90) < 70, 1.0, 0.0)
    options = FAST.get(name, {})
    found = fit_probe(name, x, one_hot(labels), groups, weights=weights, **options)
    without = fit_probe(name, x[:70], one_hot(labels)[:70], groups[:70], **options)
    assert found.facts() == without.facts()
    np.testing.assert_array_equal(found.probabilities(x), without.probabilities(x))


@pytest.mark.parametrize("name", PROBES)
def test_rare_class_can_win(name: str) -> None:
    # Classes of 9 : 1 whose means are two deviations apart: without weights, half of the rare
    # class is lost; with balanced ones, both are found as often.
    rng = np.random.default_rng(0)
    labels = (np.arange(600) % 10 == 0).astype(int)
    x = rng.normal(size=(600, 3)) + 2 * labels[:, None] * np.array([1, 0, 0])
    groups = [f"{i // 20}" for i in range(600)]
    truth = np.arange(400) % 2
    fresh = rng.normal(size=(400, 3)) + 2 * truth[:, None] * np.array([1, 0, 0])
    options = {"learning_rate": 0.01, "hidden": 16} if name == "mlp" else {}
    recall = {}
    for rule in ("balanced", "none"):
        probe = fit_probe(
            name,
            x,
            one_hot(labels),
            groups,
            class_weights=rule,  # type: ignore[arg-type]
            **options,
        )
        recall[rule] = (probe.probabilities(fresh).argmax(1)[truth == 1] == 1).mean()
    assert recall["none"] < 0.6
    assert recall["balanced"] > 0.7


@pytest.mark.parametrize("name", PROBES)
def test_inner_folds_are_as_many_as_the_groups_allow(name: str) -> None:
    x, labels, _ = table(90)
    three = [f"{i % 3}" for i in range(90)]
    facts = fit_probe(name, x, one_hot(labels), three, **FAST.get(name, {})).facts()
    assert facts["inner_folds"] == 3
    assert facts["chosen_by"] == "inner cross-validation"


SETTINGS: dict[str, dict[str, Any]] = {
    "logistic": {"strength": 10.0},
    "knn": {"k": 90},
    "prototype": {"shrinkage": 0.9},
}
"""What is taken for 90 cases where nothing can be chosen."""


@pytest.mark.parametrize("name", PROBES)
def test_of_one_slide_the_setting_is_a_stated_default(name: str) -> None:
    x, labels, _ = table(90)
    probe = fit_probe(name, x, one_hot(labels), ["a"] * 90)
    facts = probe.facts()
    assert facts["chosen_by"] == ("default: too few slides or patients for inner cross-validation")
    assert "inner_folds" not in facts
    if name == "mlp":
        assert (facts["epochs"], facts["best_epoch"]) == (10, 10)
        return
    assert facts[next(iter(SETTINGS[name]))] == next(iter(SETTINGS[name].values()))
    given = fit_probe(name, x, one_hot(labels), ["a"] * 90, **SETTINGS[name])
    assert given.facts()["chosen_by"] == "given"
    np.testing.assert_array_equal(probe.probabilities(x), given.probabilities(x))


def test_the_default_is_one_of_the_candidates() -> None:
    x, labels, _ = table(20)
    one = {"targets": one_hot(labels), "groups": ["a"] * 20}
    found = fit_probe("logistic", x, strengths=[0.01, 0.3, 0.1], **one).facts()
    assert (found["chosen_by"], found["strength"]) == (DEFAULT, 0.3)
    found = fit_probe("knn", x, ks=[3, 15, 5], **one).facts()
    assert (found["chosen_by"], found["k"]) == (DEFAULT, 15)
    found = fit_probe("prototype", x, shrinkages=[0.1, 1.0, 0.7], **one).facts()
    assert (found["chosen_by"], found["shrinkage"]) == (DEFAULT, 1.0)
    found = fit_probe("mlp", x, epochs=4, **one).facts()
    assert (found["chosen_by"], found["epochs"]) == (DEFAULT, 4)


@pytest.mark.parametrize("name", PROBES)
def test_two_cases_are_enough(name: str) -> None:
    # Standardised, they are +1 and -1 in every feature; another case halfway has no class.
    x = np.random.default_rng(0).normal(size=(2, 50))
    probe = fit_probe(name, x, np.eye(2), ["a", "b"])
    assert (probe.facts()["cases"], probe.facts()["chosen_by"]) == (2, DEFAULT)
    found = probe.probabilities([x[0], x[1], x.mean(0)])
    assert found[0, 0] > 0.5
    assert found[1, 1] > 0.5
    if name == "logistic":
        # along the line between them: log(1 + exp(-u)) + strength * u**2 / (4 * 50) is least
        u = brentq(lambda u: 10 * u / 100 - 1 / (1 + np.exp(u)), 0, 10)
        np.testing.assert_allclose(found[0, 0], 1 / (1 + np.exp(-u)), atol=1e-6)
    elif name == "knn":
        assert probe.facts()["k"] == 2
    elif name == "prototype":
        # a variance of 50, as they scatter in total, and means at a squared distance of 4 * 50
        np.testing.assert_allclose(found[0, 0], 1 / (1 + np.exp(-2)))
    if name != "mlp":
        np.testing.assert_allclose(found[0], found[1, ::-1], atol=1e-6)
        np.testing.assert_allclose(found[2], 0.5, atol=1e-6)


def test_given_training_of_two_cases_the_network_sees_both() -> None:
    x = np.random.default_rng(0).normal(size=(2, 50))
    found = fit_probe("mlp", x, np.eye(2), ["a", "b"], learning_rate=0.01).probabilities(x)
    assert found[[0, 1], [0, 1]].min() > 0.95


def test_every_inner_training_part_has_every_class() -> None:
    # The rare class is in two groups of ten: more than two folds would hold out none of it, or
    # both groups together.
    labels = np.zeros(100, int)
    groups = [f"{i // 10}" for i in range(100)]
    labels[[3, 4, 55]] = 1
    cases = check_cases(np.zeros((100, 1)), one_hot(labels), groups, None, "balanced")
    for seed in range(5):
        fold = cases.inner_folds(5, seed)
        assert fold is not None
        assert set(fold) == {0, 1}
        assert set(fold[labels == 1]) == {0, 1}
    labels[55] = 0
    cases = check_cases(np.zeros((100, 1)), one_hot(labels), groups, None, "balanced")
    assert cases.inner_folds(5, 0) is None
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        cases.inner_folds(1, 0)


def test_votes_do_not_make_a_case_one_of_a_class() -> None:
    # All cases have votes for both classes; those of the second class are of one slide, then two.
    second = np.zeros(12, bool)
    second[:3] = True
    groups = [f"{i // 3}" for i in range(12)]
    targets = np.where(np.c_[~second, second], 2 / 3, 1 / 3)
    assert check_cases(np.zeros((12, 1)), targets, groups, None, "none").inner_folds(5, 0) is None
    targets[3] = [1 / 3, 2 / 3]
    fold = check_cases(np.zeros((12, 1)), targets, groups, None, "none").inner_folds(5, 0)
    assert fold is not None
    assert set(fold) == {0, 1}
    assert fold[0] != fold[3]
    # a class that is no case's own still needs votes on both sides
    three = np.c_[targets * 0.9, np.full(12, 0.1)]
    cases = check_cases(np.zeros((12, 1)), three, groups, None, "none")
    assert cases.inner_folds(5, 0) is not None
    three[1:] = np.c_[targets[1:], np.zeros(11)]
    cases = check_cases(np.zeros((12, 1)), three, groups, None, "none")
    assert cases.inner_folds(5, 0) is None


def test_no_two_folds_where_every_class_shares_its_slides() -> None:
    # Each of three classes is in two of three slides: any two folds hold one class on one side.
    targets = np.eye(3)[[0, 2, 0, 1, 1, 2]]
    cases = check_cases(np.zeros((6, 1)), targets, list("aabbcc"), None, "balanced")
    assert cases.inner_folds(5, 0) is None


def broken(what: str) -> dict[str, Any]:
    x, labels, groups = table(20)
    case: dict[str, Any] = {"embeddings": x, "targets": one_hot(labels), "groups": groups}
    if what == "nan":
        x[4, 1] = np.nan
    elif what == "class":
        case["targets"] = np.eye(3)[labels]
    elif what == "shares":
        case["targets"][7] = np.nan
    elif what == "negative":
        case["targets"][7] = [1.5, -0.5]
    elif what == "groups":
        case["groups"] = groups[1:]
    elif what == "single":
        case["targets"] = np.ones((20, 1))
    elif what == "weights":
        case["weights"] = np.full(20, -1.0)
    elif what == "rule":
        case["class_weights"] = "balance"
    return case


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "1 of 20 embeddings are not finite .first: row 4."),
        ("class", "no case of class 2 among 20"),
        ("shares", "targets of 1 cases .*first: row 7"),
        ("negative", "targets of 1 cases .*first: row 7"),
        ("groups", "19 groups .* do not fit"),
        ("single", "1 class; a probe tells at least two apart"),
        ("weights", "weights of cases must be finite and not negative"),
        ("rule", "unknown class weight rule 'balance'; did you mean 'balanced'"),
    ],
)
def test_what_cannot_be_fitted_is_named(what: str, message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        fit_probe("logistic", **broken(what))


def test_unknown_names_list_the_known_ones() -> None:
    x, labels, groups = table(20)
    with pytest.raises(ConfigError, match=r"unknown probe 'logistics'.*known: knn, logistic, mlp"):
        fit_probe("logistics", x, one_hot(labels), groups)
    with pytest.raises(ConfigError, match="unknown probe"):
        load_probe({"name": "svm", "features": 3}, {})
    with pytest.raises(ConfigError, match="unknown score 'auroc'"):
        fit_probe("logistic", x, one_hot(labels), groups, score="auroc")
    with pytest.raises(ConfigError, match="unknown metric of neighbours"):
        fit_probe("knn", x, one_hot(labels), groups, metric="manhattan")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("logistic", {"strength": 0.0}),
        ("logistic", {"strengths": [1.0, -1.0]}),
        ("knn", {"k": 0}),
        ("prototype", {"shrinkage": 0.0}),
        ("prototype", {"shrinkages": [0.5, 1.5]}),
    ],
)
def test_settings_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    x, labels, groups = table(20)
    with pytest.raises(ValueError, match="must"):
        fit_probe(name, x, one_hot(labels), groups, **options)


def test_more_neighbours_than_cases_are_all_cases() -> None:
    x, labels, groups = table(20)
    more, all_of_them = (fit_probe("knn", x, one_hot(labels), groups, k=k) for k in (21, 20))
    assert (more.facts()["k"], more.facts()["chosen_by"]) == (20, "given: 21, of all cases")
    assert all_of_them.facts()["chosen_by"] == "given"
    np.testing.assert_array_equal(more.probabilities(x), all_of_them.probabilities(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("logistic", {"strenght": 1}, "unknown option of 'logistic' 'strenght'; did you mean 'str"),
        ("logistic", {"seed": 1}, "unknown option of 'logistic' 'seed'"),
        ("logistic", {"class_weights": "none"}, "unknown option of 'logistic' 'class_weights'"),
        (
            "logistic",
            {"strength": -1},
            "probe 'logistic' does not take {'strength': -1}: strengths",
        ),
        ("logistic", {"strength": "high"}, "probe 'logistic' does not take {'strength': 'high'}: "),
        (
            "logistic",
            {"strengths": []},
            "probe 'logistic' does not take {'strengths': []}: strengths",
        ),
        ("logistic", {"score": "auroc"}, "unknown score 'auroc'"),
        ("logistic", {"folds": 1}, "probe 'logistic' does not take {'folds': 1}: folds must be"),
        ("knn", {"metric": "manhattan"}, "unknown metric of neighbours"),
        ("mlp", {"dropout": 2.0}, "probe 'mlp' does not take {'dropout': 2.0}: dropout prob"),
        ("mlp", {"hidden": -1}, "probe 'mlp' does not take {'hidden': -1}: "),
        ("forest", {}, "unknown probe 'forest'"),
    ],
)
def test_options_are_checked_without_data(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_options(name, options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("logistic", {"strength": 1e-6}),
        ("logistic", {"strengths": [1, 0.1], "score": "log_loss", "folds": 10}),
        ("mlp", {"epochs": 3, "hidden": 8}),
        ("knn", {"k": 501, "metric": "cosine"}),
        ("prototype", {"shrinkages": [1]}),
    ],
)
def test_options_that_fit_pass(name: str, options: dict[str, Any]) -> None:
    check_options(name, options)


def test_embeddings_of_another_encoder_are_refused() -> None:
    x, labels, groups = table(20)
    probe = fit_probe("logistic", x, one_hot(labels), groups, strength=1.0)
    with pytest.raises(DataError, match=r"embeddings are \(20, 5\), .* fitted to \(n, 6\)"):
        probe.probabilities(x[:, :5])
    x[3] = np.inf
    with pytest.raises(DataError, match="row 3"):
        probe.probabilities(x)


def test_damaged_probe_is_named() -> None:
    tensors: dict[str, Tensor] = {"weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="needs the tensors bias, weight, got weight"):
        load_probe({"name": "logistic", "features": 2}, tensors)
    with pytest.raises(CheckpointError, match="lack 'name' or 'features'"):
        load_probe({"name": "logistic"}, tensors)


def test_facts_are_plain_json() -> None:
    x, labels, groups = table(40)
    for name in PROBES:
        facts = fit_probe(name, x, one_hot(labels), groups, **FAST.get(name, {})).facts()
        assert json.loads(json.dumps(facts)) == facts
