"""Bootstrap intervals against explicit resampling and a case with known answer."""

from __future__ import annotations

import numpy as np
import pytest

from celltyper import metrics
from celltyper.errors import DataError


def share(sums):
    return metrics.ratio(sums[..., 0], sums[..., 1])


def clusters(seed: int, n: int = 12):
    rng = np.random.default_rng(seed)
    size = rng.integers(20, 60, n)
    return np.stack([rng.binomial(size, 0.7), size], axis=-1)


def test_interval_equals_explicit_resampling():
    counts = clusters(0)
    rng = np.random.default_rng(5)
    scores = [share(counts[rng.integers(0, len(counts), len(counts))].sum(0)) for _ in range(20000)]
    expected = np.quantile(scores, [0.025, 0.975])
    assert metrics.cluster_bootstrap(counts, share, n=20000) == pytest.approx(expected, abs=0.003)
    narrow = metrics.cluster_bootstrap(counts, share, n=20000, level=0.5)
    assert narrow == pytest.approx(np.quantile(scores, [0.25, 0.75]), abs=0.003)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # 40 normal cluster means: the percentile interval covers close to 95 %.
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(400):
        counts = np.stack([rng.normal(3, 1, 40), np.ones(40)], axis=-1)
        low, high = metrics.cluster_bootstrap(counts, share, n=400, seed=seed)
        hits += low <= 3 <= high
    assert 0.90 <= hits / 400 <= 0.98


def test_counts_of_any_shape_and_the_same_seed():
    counts = np.random.default_rng(0).integers(0, 9, (10, 4, 4))
    first = metrics.cluster_bootstrap(counts, metrics.macro_f1, seed=3)
    assert first == metrics.cluster_bootstrap(counts, metrics.macro_f1, seed=3)
    assert first != metrics.cluster_bootstrap(counts, metrics.macro_f1, seed=4)
    assert first.low < metrics.macro_f1(counts.sum(0)) < first.high


def test_resamples_without_score_are_left_out():
    # Only the first cluster has anything to score: its score in all resamples that hold it.
    assert metrics.cluster_bootstrap([[3, 4], [0, 0]], share) == (0.75, 0.75)
    assert np.isnan(metrics.cluster_bootstrap([[0, 0], [0, 0]], share)).all()


def test_one_cluster_has_no_interval():
    assert np.isnan(metrics.cluster_bootstrap([[3, 4]], share)).all()
    paired = metrics.paired_bootstrap([[3, 4]], [[2, 4]], share)
    assert paired.difference == 0.25
    assert np.isnan(paired[1:]).all()


def test_paired_difference_equals_explicit_resampling():
    a, b = clusters(0), clusters(0)
    b[:, 0] = np.maximum(0, b[:, 0] - np.random.default_rng(1).integers(-2, 3, len(b)))
    rng = np.random.default_rng(5)
    drawn = [rng.integers(0, len(a), len(a)) for _ in range(20000)]
    differences = np.array([share(a[d].sum(0)) - share(b[d].sum(0)) for d in drawn])
    found = metrics.paired_bootstrap(a, b, share, n=20000)
    assert found.difference == pytest.approx(share(a.sum(0)) - share(b.sum(0)))
    assert found[1:3] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.002)
    p_value = 2 * min((differences <= 0).mean(), (differences >= 0).mean())
    assert found.p_value == pytest.approx(min(1, p_value), abs=0.02)


def test_paired_extremes():
    a = clusters(0)
    assert metrics.paired_bootstrap(a, a, share) == (0, 0, 0, 1)
    worse = a - [[5, 0]]
    sure = metrics.paired_bootstrap(a, worse, share, n=999)
    assert sure.low > 0
    assert sure.p_value == pytest.approx(0.002)
    with pytest.raises(DataError, match="same clusters"):
        metrics.paired_bootstrap(a, a[1:], share)
