"""The report of a protocol in patch mode: from made scores of made runs to the page."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image
from sklearn import metrics

from celltyper.classification import page as pages
from celltyper.classification.config import PatchConfig, PatchData
from celltyper.classification.page import Page, Section, sections_of, write_page
from celltyper.metrics.classification import score_patches
from celltyper.protocols.patch_page import read_pictures
from celltyper.protocols.patch_pooling import (
    compare_pooled,
    pool_runs,
    pooled_mistakes,
    score_pooled,
)
from celltyper.protocols.patch_table import patch_table
from celltyper.protocols.patch_writing import report_patch_protocol, table_text
from celltyper.protocols.patches import TypedPatches, read_typed, write_typed
from celltyper.protocols.protocol import Protocol

Run = Callable[..., Any]

CLASSES = ("Atypical", "Normal")


def typed(
    names: Sequence[str],
    labels: Sequence[int],
    shares: Sequence[float],
    threshold: float = 0.5,
    *,
    groups: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
    atypical: Sequence[int] | None = None,
    experts: int = 3,
) -> TypedPatches:
    """What a run said: probability of class 0, and how many experts chose it."""
    p = np.asarray(shares, float)
    votes = np.eye(2)[list(labels)]
    if atypical is not None:
        first = np.asarray(atypical) / experts
        votes = np.column_stack([first, 1 - first])
    return TypedPatches(
        names=tuple(names),
        groups=tuple(groups or names),
        domains=tuple(domains or [""] * len(names)),
        labels=np.array(labels, np.intp),
        votes=votes,
        experts=np.full(len(names), 1 if atypical is None else experts, np.intp),
        probabilities=np.column_stack([p, 1 - p]),
        threshold=threshold,
    )


A = typed(list("abcd"), [0, 0, 1, 1], [0.9, 0.4, 0.6, 0.1], 0.7, groups=list("xxyy"))
"""At .7: a is called Atypical, b is missed, c and d are right."""
B = typed(list("efgh"), [0, 1, 1, 1], [0.3, 0.25, 0.1, 0.05], 0.2, groups=list("zzww"))
"""At .2: e is called Atypical, f wrongly so."""


# ---------------------------------------------------------------- pooling


def test_every_run_is_called_at_its_own_threshold() -> None:
    scores = score_pooled(pool_runs({"A": A, "B": B}), CLASSES, 0, resamples=0)
    assert scores.confusion.tolist() == [[2, 1], [1, 4]]
    assert scores.scores["balanced_accuracy"].value == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores.scores["f1"].value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores.per_class["Normal"]["precision"].value == pytest.approx(4 / 5)
    assert np.isnan(scores.threshold)
    assert scores.rules["f1"] == (
        "F1 of Atypical; called Atypical from the threshold of each run on, 0.20 to 0.70"
    )
    # Rankings and calibration are those of the probabilities.
    labels, shares = [0, 0, 1, 1, 0, 1, 1, 1], [0.9, 0.4, 0.6, 0.1, 0.3, 0.25, 0.1, 0.05]
    positive = 1 - np.array(labels)
    assert scores.scores["auroc"].value == pytest.approx(metrics.roc_auc_score(positive, shares))
    assert scores.scores["auprc"].value == pytest.approx(
        metrics.average_precision_score(positive, shares)
    )
    assert scores.scores["brier"].value == pytest.approx(metrics.brier_score_loss(positive, shares))
    assert "by chance 0.38" in scores.rules["auprc"]


def test_one_threshold_is_that_of_the_page() -> None:
    half = [run._replace(threshold=0.5) for run in (A, B)]
    scores = score_pooled(pool_runs({"A": half[0], "B": half[1]}), CLASSES, 0, resamples=0)
    assert scores.threshold == 0.5
    assert scores.confusion.tolist() == [[1, 2], [1, 4]]


def test_strata_leave_out_what_one_expert_saw() -> None:
    several = typed(
        list("abcde"),
        [0, 0, 1, 1, 1],
        [0.9, 0.2, 0.6, 0.1, 0.3],
        atypical=[3, 2, 1, 0, 0],
        groups=list("vwxyz"),
    )
    alone = typed(["f"], [1], [0.9])
    strata = score_pooled(pool_runs({"s": several, "o": alone}), CLASSES, 0, resamples=0).strata
    assert [*strata] == ["unanimous", "majority"]
    assert strata["unanimous"].confusion.tolist() == [[1, 0], [0, 2]]
    assert strata["majority"].confusion.tolist() == [[0, 1], [1, 0]]
    assert score_pooled(pool_runs({"o": alone}), CLASSES, 0, resamples=0).strata == {}


def test_differences_are_paired_over_patients_and_runs_keep_their_thresholds() -> None:
    rng = np.random.default_rng(3)
    sides: list[dict[str, TypedPatches]] = [{}, {}]
    for number in range(2):
        names = [f"{number}-{i}" for i in range(30)]
        labels = (rng.random(30) < 0.6).astype(int)
        # patients of several windows, and the same ones in both runs
        groups = [f"p{i % 7}" for i in range(30)]
        for side, noise in zip(sides, (0.3, 0.8), strict=True):
            shares = np.clip(0.5 + 0.3 * (1 - 2 * labels) + noise * rng.normal(size=30), 0.01, 0.99)
            threshold = float(rng.uniform(0.3, 0.7))
            order = rng.permutation(30)
            side[f"run {number}"] = typed(
                [names[i] for i in order],
                labels[order].tolist(),
                shares[order].tolist(),
                threshold,
                groups=[groups[i] for i in order],
            )
    found = compare_pooled(*map(pool_runs, sides), CLASSES, 0, resamples=60)

    def score(side: Mapping[str, TypedPatches], drawn: Sequence[str], what: str) -> float:
        truth, called, shares = [], [], []
        for run in side.values():
            for patient in drawn:
                rows = [i for i, group in enumerate(run.groups) if group == patient]
                truth += run.labels[rows].tolist()
                shares += run.probabilities[rows, 0].tolist()
                called += np.where(run.probabilities[rows, 0] >= run.threshold, 0, 1).tolist()
        if what == "auroc":
            return float(metrics.roc_auc_score(1 - np.array(truth), shares))
        return float(metrics.balanced_accuracy_score(truth, called))

    patients = sorted({group for run in sides[0].values() for group in run.groups})
    weights = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=60)
    for what in ("balanced_accuracy", "auroc"):
        whole = score(sides[0], patients, what) - score(sides[1], patients, what)
        assert found[what].difference == pytest.approx(whole)
        drawn = [np.repeat(patients, row).tolist() for row in weights]
        values = [score(sides[0], d, what) - score(sides[1], d, what) for d in drawn]
        assert found[what][1:3] == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
        below = min(sum(v <= 0 for v in values), sum(v >= 0 for v in values))
        assert found[what].p_value == pytest.approx(min(1, 2 * (below + 1) / 61))


def test_a_window_that_several_runs_called_wrong_is_one_mistake() -> None:
    first = typed(list("abc"), [0, 0, 1], [0.1, 0.4, 0.6], 0.5)
    second = typed(list("abd"), [0, 0, 1], [0.2, 0.8, 0.3], 0.25)
    missed, false = pooled_mistakes(pool_runs({"1": first, "2": second}), 0)
    # a: .9 Normal in the first run, .8 in the second; b: in the first run only
    assert (missed.true, missed.called, missed.total) == (0, 1, 2)
    assert missed.rows.tolist() == [0, 1]
    # c: .6 in the first run; d: .3, called from .25 on
    assert (false.true, false.called, false.total) == (1, 0, 2)
    assert false.rows.tolist() == [2, 5]
    assert [k.rows.tolist() for k in pooled_mistakes(pool_runs({"1": first}), 0, most=1)] == [
        [0],
        [2],
    ]


# ---------------------------------------------------------------- made protocols


def made(
    folder: Path,
    runs: Mapping[tuple[str, str, float, int], TypedPatches | None],
    protocol: dict[str, Any],
    *,
    variants: Mapping[str, dict[str, Any]] | None = None,
    domains: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    classes: Sequence[str] = CLASSES,
    root: Path | None = None,
) -> Path:
    """Folder of a protocol with runs by variant, part, fraction and seed; None: not finished."""
    base = {"data": {"root": str(root), "classes": list(classes), "size": 16, "mpp": 0.25}}
    base["encoder"] = {"name": "vit_small_patch14_dinov2", "weights": "twin"}
    names = dict.fromkeys(key[0] for key in runs)
    configs = {
        name: PatchConfig.model_validate(base | dict((variants or {}).get(name, {})))
        for name in names
    }
    entries = []
    for (variant, part, fraction, seed), run in runs.items():
        path = "-".join(str(value) for value in (variant or "run", part, fraction, seed))
        entries.append(
            {
                "path": path,
                "variant": variant,
                "part": part,
                "domain": (domains or {}).get(part, ""),
                "fraction": fraction,
                "reached": fraction,
                "seed": seed,
                "train": 40,
                "val": 0,
                "test": 10,
            }
        )
        if run is not None:
            (folder / path).mkdir(parents=True)
            write_typed(folder / path / "scores.npz", run)
            if facts is not None:
                (folder / path / "run.json").write_text(json.dumps(facts))
    about = {
        "task": "patches",
        "celltyper": "9.9",
        "protocol": Protocol.model_validate(protocol).model_dump(mode="json"),
        "variants": {name: config.model_dump(mode="json") for name, config in configs.items()},
        "data": {"name": "made", "patches": 100, "groups": 20},
        "classes": list(classes),
        "positive": classes[0],
        "runs": entries,
    }
    (folder / "protocol.json").write_text(json.dumps(about))
    return folder


def random_run(rng: np.random.Generator, prefix: str, n: int = 40, **more: Any) -> TypedPatches:
    labels = (rng.random(n) < 0.7).astype(int)
    labels[:2] = 0, 1
    shares = np.clip(0.5 + 0.2 * (1 - 2 * labels) + 0.25 * rng.normal(size=n), 0.01, 0.99)
    names = [f"{CLASSES[label]}/{prefix}{i}.png" for i, label in enumerate(labels)]
    groups = [f"{prefix}-slide{i % 5}" for i in range(n)]
    return typed(names, labels.tolist(), shares.tolist(), groups=groups, **more)


@pytest.fixture(scope="module")
def cv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds of two variants with votes, and the patches of the mistakes."""
    folder, root = (tmp_path_factory.mktemp(name) for name in ("cv", "patches"))
    rng = np.random.default_rng(0)
    runs: dict[tuple[str, str, float, int], TypedPatches | None] = {}
    rows = ["patch,slide"]
    for part in ("fold-1", "fold-2"):
        run = random_run(rng, part)
        votes = np.where(run.labels == 0, rng.choice([2, 3], 40), rng.choice([0, 1], 40))
        run = run._replace(
            votes=np.column_stack([votes, 3 - votes]) / 3, experts=np.full(40, 3, np.intp)
        )
        noise = np.clip(run.probabilities[:, 0] + 0.1 * rng.normal(size=40), 0, 1)
        other = run._replace(probabilities=np.column_stack([noise, 1 - noise]), threshold=0.4)
        runs["plain", part, 1.0, 0], runs["votes", part, 1.0, 0] = run, other
        for name, slide in zip(run.names, run.groups, strict=True):
            (root / name).parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (24, 24, 3)).astype(np.uint8)).save(root / name)
            rows.append(f"{name},{slide}")
    (root / "made.csv").write_text("\n".join(rows) + "\n")
    protocol = {"folds": 2, "variants": {"plain": {}, "votes": {"loss.targets": "votes"}}}
    facts = {"encoder_passes": 100, "seconds": {"fit": 1.5}, "torch": "2.6", "threshold": 0.5}
    return made(
        folder,
        runs,
        protocol,
        variants={"votes": {"loss": {"targets": "votes"}}},
        facts=facts,
        root=root,
    )


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.DOTALL)
    body = re.sub(r"<title>[^<]*</title>", " ", body)
    return " ".join(Markup(re.sub(r"<[^>]+>", " ", body)).unescape().split())


def section(page: str, heading: str) -> str:
    """HTML below a heading."""
    found = re.search(rf"<h2[^>]*>{re.escape(heading)}</h2>(.*?)(?=<h2|</main>)", page, re.DOTALL)
    assert found, heading
    return found[1]


def test_a_report_has_everything_and_needs_nothing_beside_it(
    cv: Path, celltyper_command: Run
) -> None:
    code, out, err = celltyper_command("report", cv, "--resamples", 50)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert out.endswith(f"report: {cv / 'report.html'}\n")
    page = (cv / "report.html").read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == [
        "Scores",
        "Differences to the first variant",
        "Variants",
        "ROC and precision-recall",
        "Calibration",
        "Confusion",
        "By agreement of the experts",
        "Most certain mistakes",
        "What ran on what",
    ]
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert ".gallery" in page  # its rules
    assert "loss.targets: votes" in section(page, "Variants")
    facts = text_of(section(page, "What ran on what"))
    # 100 windows once, against (40 + 10) in each of four runs
    assert (
        "100 for all 4 runs; a script that runs the encoder in every run needs 200 for one epoch, "
        "2.0 times as many"
    ) in facts
    assert "6.0 to train all 4 runs" in facts
    assert "0.40 to 0.50, each run its own" in facts
    assert "loss.targets" not in facts
    assert "loss.class_weights" in facts


def test_pages_differences_are_those_of_the_csv_and_of_the_text(cv: Path) -> None:
    table = report_patch_protocol(cv, resamples=50)
    (row,) = csv.DictReader(io.StringIO((cv / "differences.csv").read_text()))
    assert [row[k] for k in ("variant", "less", "fraction", "runs", "slides")] == [
        "votes",
        "plain",
        "1",
        "2",
        "10",
    ]
    with_runs = {
        v: [r for k, r in runs_of(cv).items() if k.startswith(v)] for v in ("plain", "votes")
    }
    truth = np.concatenate([run.labels for run in with_runs["plain"]])
    called = {
        v: np.concatenate([np.where(r.probabilities[:, 0] >= r.threshold, 0, 1) for r in runs])
        for v, runs in with_runs.items()
    }
    difference = metrics.balanced_accuracy_score(
        truth, called["votes"]
    ) - metrics.balanced_accuracy_score(truth, called["plain"])
    assert float(row["balanced_accuracy_difference"]) == pytest.approx(difference, abs=1e-6)
    shown = f"{difference:+.3f}".replace("0.", ".", 1)
    assert f"votes less plain\n{' ' * 20}{shown:>6}" in table_text(table)
    cells = section((cv / "report.html").read_text(), "Differences to the first variant")
    assert f">{difference:.3f}<br>" in cells
    assert f">{float(row['auroc_p_value']):.3f}</td>" in cells


def runs_of(folder: Path) -> dict[str, TypedPatches]:
    return {f.parent.name: read_typed(f) for f in sorted(folder.glob("*/scores.npz"))}


def test_gallery_shows_the_middle_of_the_patches_of_the_best_variant(cv: Path) -> None:
    table = report_patch_protocol(cv, resamples=0)
    best = max(table.pooled, key=lambda v: table.pooled[v].scores.scores["balanced_accuracy"])
    shown = section((cv / "report.html").read_text(), "Most certain mistakes")
    assert f"Mistakes of {best}, the variant with the highest balanced accuracy." in text_of(shown)
    windows = table.pooled[best].windows
    called = np.where(windows.probabilities[:, 0] >= windows.thresholds, 0, 1)
    wrong = called != windows.labels
    certainty = np.where(called == 0, *windows.probabilities.T)
    names = {}
    for true in (0, 1):
        rows = np.flatnonzero(wrong & (windows.labels == true))
        names[true] = [windows.names[i] for i in rows[np.argsort(-certainty[rows])][:12]]
    found = re.findall(r'alt="H&amp;E patch (\S+): label (\w+)', shown)
    for true in (0, 1):
        assert [name for name, label in found if label == CLASSES[true]] == names[true]
    assert "Each picture is 4 µm wide." in shown
    config = PatchConfig.model_validate(table.about["variants"][best])
    kinds = pooled_mistakes(windows, 0)
    pictures = read_pictures(config.data, windows.names, kinds)
    row = int(kinds[0].rows[0])
    assert config.data.root is not None
    whole = np.asarray(Image.open(config.data.root / windows.names[row]))
    assert np.array_equal(pictures[row], whole[4:20, 4:20])


def test_without_the_data_mistakes_are_listed(cv: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cv, tmp_path / "copy")
    about = json.loads((copy / "protocol.json").read_text())
    gone = tmp_path / "gone"
    for config in about["variants"].values():
        config["data"]["root"] = str(gone)
    (copy / "protocol.json").write_text(json.dumps(about))
    report_patch_protocol(copy, resamples=0)
    shown = section((copy / "report.html").read_text(), "Most certain mistakes")
    assert f"Without pictures, for the data cannot be read: {gone}: no such file" in text_of(shown)
    assert "<img" not in shown
    assert "Normal/fold-" in shown
    # another data set in its place
    (gone / "Normal").mkdir(parents=True)
    (gone / "Atypical").mkdir()
    for kind in CLASSES:
        Image.new("RGB", (24, 24)).save(gone / kind / "other.png")
    (gone / "m.csv").write_text("patch,slide\nNormal/other.png,a\nAtypical/other.png,b\n")
    report_patch_protocol(copy, resamples=0)
    shown = section((copy / "report.html").read_text(), "Most certain mistakes")
    assert "has no window 'Atypical/fold-" in text_of(shown)


def test_pictures_of_files_without_resolution_are_at_that_of_the_config(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in CLASSES:
        (tmp_path / kind).mkdir()
        pixels = rng.integers(0, 255, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / kind / "0.png")
    (tmp_path / "m.csv").write_text("patch,slide\nNormal/0.png,a\nAtypical/0.png,b\n")
    kinds = pooled_mistakes(pool_runs({"": typed(["Normal/0.png"], [1], [0.9])}), 0)
    data = PatchData(root=tmp_path, size=24, mpp=0.5)
    assert read_pictures(data, ["Normal/0.png"], kinds)[0].shape == (24, 24, 3)


def test_scaling_draws_every_run_and_says_what_was_reached(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    runs: dict[tuple[str, str, float, int], TypedPatches | None] = {}
    expected = []
    for seed in range(3):
        tested = random_run(rng, f"s{seed}")
        for fraction in (0.1, 1.0):
            for variant in ("plain", "votes"):
                shares = np.clip(tested.probabilities[:, 0] + 0.1 * rng.normal(size=40), 0, 1)
                said = np.column_stack([shares, 1 - shares])
                runs[variant, "held-out", fraction, seed] = tested._replace(probabilities=said)
                if (variant, fraction) == ("plain", 0.1):
                    expected.append(metrics.roc_auc_score(1 - tested.labels, shares))
    protocol = {"hold_out": 0.2, "fractions": [0.1, 1.0], "seeds": [0, 1, 2]}
    table = report_patch_protocol(made(tmp_path, runs, protocol), resamples=20)
    assert [(row.variant, row.fraction) for row in table.rows] == [
        ("plain", 0.1),
        ("plain", 1.0),
        ("votes", 0.1),
        ("votes", 1.0),
    ]
    assert table.rows[0].scores["auroc"].values == pytest.approx(expected)
    page = (tmp_path / "report.html").read_text()
    charts = section(page, "Share of the training data").split("<h3>")[1:]
    assert [re.match(r"[^<]*", chart)[0].split(" over ")[0] for chart in charts] == [  # type: ignore[index]
        "Balanced accuracy",
        "AUROC",
    ]
    for chart in charts:
        assert len(re.findall(r'class="dot s0"[^>]*r="2"', chart)) == 6
        assert len(re.findall(r'class="dot s1"[^>]*r="2"', chart)) == 6
    pooled = table.pooled["plain"].windows.probabilities
    largest = [run for key, run in runs.items() if run and (key[0], key[2]) == ("plain", 1.0)]
    assert np.array_equal(pooled, np.concatenate([run.probabilities for run in largest]))
    assert "all runs at the largest fraction together, each window tested once" in text_of(page)
    assert "10\N{NO-BREAK SPACE}%" in section(page, "Scores")
    assert max(map(len, table_text(table).splitlines())) <= 80


def test_domains_are_a_matrix(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    names = ("breast", "colon", "skin")
    runs, expected = {}, {}
    for name in names:
        others = [n for n in names if n != name]
        run = random_run(rng, name, domains=[others[i % 2] for i in range(40)])
        runs["", f"trained-on-{name}", 1.0, 0] = run
        for other in others:
            rows = [i for i, d in enumerate(run.domains) if d == other]
            called = np.where(run.probabilities[rows, 0] >= 0.5, 0, 1)
            expected[name, other] = metrics.balanced_accuracy_score(run.labels[rows], called)
    made(
        tmp_path,
        runs,
        {"train_on": "domain"},
        domains={f"trained-on-{name}": name for name in names},
    )
    table = report_patch_protocol(tmp_path, resamples=20)
    shown = section(
        (tmp_path / "report.html").read_text(), "Trained on one domain, tested on the others"
    )
    matrix = shown.split("<table")[1]
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', matrix, re.DOTALL)
    assert [name for name, _ in rows] == list(names)
    for name, cells in rows:
        values = re.findall(r"<td[^>]*>([^<]*)", cells)
        wanted = [
            "\N{EN DASH}" if other == name else f"{expected[name, other]:.3f}" for other in names
        ]
        mean = np.mean([v for (a, _), v in expected.items() if a == name])
        assert values == [*wanted, f"{mean:.3f}"]
    assert "breast → colon" in table_text(table)


def test_what_is_missing_or_too_little_is_said_first(tmp_path: Path) -> None:
    run = typed(list("abcd"), [0, 0, 1, 1], [0.9, 0.4, 0.6, 0.1], groups=list("xxyy"))
    runs = {("", "fold-1", 1.0, 0): run, ("", "fold-2", 1.0, 0): None}
    made(tmp_path, runs, {"folds": 2})
    table = report_patch_protocol(tmp_path, resamples=20)
    text, page = table_text(table), text_of((tmp_path / "report.html").read_text())
    for said in (text.replace("\n  ", " "), page, (tmp_path / "table.md").read_text()):
        assert "1 of 2 runs are not finished: run-fold-2-1.0-0" in said
        assert "Only 2 patients or slides were tested in 1 of 1 rows" in said
    assert page.startswith("celltyper protocol: made 1 run, tested on 4 windows of 2 patients")
    assert re.search(r"^balanced accuracy +\.500 ", text, re.MULTILINE)
    assert not (tmp_path / "differences.csv").exists()
    # nothing is known of what ran
    assert "encoder passes" not in page


def test_passes_of_a_trained_encoder_are_those_of_all_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    runs = {("", f"fold-{i}", 1.0, 0): random_run(rng, f"f{i}") for i in range(2)}
    trained = {
        "head": {"name": "linear"},
        "train": {"steps": 10, "batch_size": 4},
        "view": {"symmetries": 1},
    }
    # 100 windows for embeddings, which both runs share, and 40 in the training of each
    made(tmp_path, runs, {"folds": 2}, variants={"": trained}, facts={"encoder_passes": 140})
    report_patch_protocol(tmp_path, resamples=0)
    facts = text_of(section((tmp_path / "report.html").read_text(), "What ran on what"))
    assert "encoder passes 180 for all 2 runs" in facts
    assert "script" not in facts
    assert "10 steps of 4 windows, learning rate 0.0001" in facts


def test_many_classes_and_no_threshold(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    labels = np.arange(60) % 3
    shares = rng.dirichlet([1, 1, 1], 60) + np.eye(3)[labels] * 0.4
    shares /= shares.sum(1, keepdims=True)
    names = tuple(f"{i}.png" for i in range(60))
    run = TypedPatches(
        names=names,
        groups=tuple(f"g{i % 9}" for i in range(60)),
        domains=("",) * 60,
        labels=labels.astype(np.intp),
        votes=np.eye(3)[labels],
        experts=np.ones(60, np.intp),
        probabilities=shares,
        threshold=0.5,
    )
    kinds = ("atypical", "normal", "look-alike")
    made(tmp_path, {("", "test", 1.0, 0): run}, {"test": "test"}, classes=kinds)
    table = patch_table(tmp_path, resamples=0)
    accuracy = metrics.accuracy_score(labels, shares.argmax(1))
    assert table.rows[0].scores["accuracy"].mean == pytest.approx(accuracy)
    report_patch_protocol(tmp_path, resamples=0)
    page = (tmp_path / "report.html").read_text()
    assert "the most probable class is called" in text_of(section(page, "What ran on what"))
    assert section(page, "Confusion").count('<th scope="row">') == 3
    assert "By agreement of the experts" not in page


# ---------------------------------------------------------------- the page of one evaluation


def test_windows_of_one_class_have_no_curves() -> None:
    shares = np.array([[0.8, 0.2], [0.3, 0.7]])
    scores = score_patches([0, 0], shares, CLASSES, 0, ["a", "b"], resamples=0)
    tested = {"set": pages.Tested(np.zeros(2, np.intp), shares, scores)}
    assert [s.heading for s in sections_of(tested)] == ["Calibration", "Confusion"]


def test_what_is_empty_is_left_out_and_names_are_escaped(tmp_path: Path) -> None:
    sections = [Section("Only <this>", note="a & b")]
    write_page(tmp_path / "p.html", Page("Title <1>", "95 % interval", sections=sections))
    page = (tmp_path / "p.html").read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == ["Only &lt;this&gt;"]
    assert "<h1>Title &lt;1&gt;</h1>" in page
    assert "a &amp; b" in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver on the path")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Selenium leaves the driver's pipes to the garbage collector.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        yield browser
        browser.quit()


def test_the_page_fits_the_window_without_errors(browser: Any, cv: Path) -> None:
    report_patch_protocol(cv, resamples=20)
    browser.get((cv / "report.html").as_uri())
    for width in (1280, 400):
        for scheme in ("light", "dark"):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
            wide = "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
            assert browser.execute_script(wide) == 0
            ink, paper = browser.execute_script(
                "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
            )
            light, dark = (sum(map(int, c[4:-1].split(","))) for c in (paper, ink))
            assert (light > dark) == (scheme == "light")
    shown = "return [...document.images].every((image) => image.naturalWidth > 0)"
    assert browser.execute_script(shown)
    assert browser.get_log("browser") == []
