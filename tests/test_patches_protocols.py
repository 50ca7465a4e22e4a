"""Protocols of patch mode as a user types them: who trains, who is tested, what is computed."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn import metrics

import celltyper.protocols.patches as protocols
from celltyper.classification.embedding import Embedder
from celltyper.classification.model import load_patch_model, load_patch_models
from celltyper.errors import DataError
from celltyper.patches.reading import open_patches
from celltyper.patches.table import PatchTable

Run = Callable[..., Any]

SLIDES, EACH = 15, 4
DOMAINS = ("breast", "colon", "skin")


def write_patches(
    root: Path, slides: int = SLIDES, rare: Callable[[int], bool] | None = None
) -> Path:
    """Stripes (rare: the last patch of every slide) among noise, domains in turn."""
    rng, rows = np.random.default_rng(0), ["patch,slide,tumortype"]
    for slide in range(slides):
        for i in range(EACH):
            is_rare = i == EACH - 1 and (rare is None or rare(slide))
            image = rng.normal(160, 60, (28, 28, 3))
            if is_rare:
                image[::4] -= rng.uniform(10, 60)
            file = root / ("common", "rare")[is_rare] / f"{slide}-{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file)
            rows.append(f"{file.name},s{slide},{DOMAINS[slide % 3]}")
    (root / "made.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patches(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def table(made: Path) -> PatchTable:
    return open_patches(made)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELLTYPER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Images that encoders have seen, one entry a batch."""
    seen: list[int] = []
    embed = Embedder.__call__

    def counted(self: Embedder, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(Embedder, "__call__", counted)
    return seen


RECIPE = {
    "task": "patches",
    "encoder": {"name": "vit_small_patch14_dinov2", "weights": "twin"},
    "view": {"input": 28, "pool": "cls+mean"},
    "head": {"options": {"strengths": [1, 0.1, 0.01]}},
}


@pytest.fixture
def train(made: Path, tmp_path: Path, celltyper_command: Run) -> Run:
    """``celltyper train`` in a protocol, given as values or as the name of one that comes along."""

    def start(
        protocol: dict[str, Any] | str, *overrides: str, root: Path = made, flags: str = ""
    ) -> Any:
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump(RECIPE | {"data": {"root": str(root)}})
        )
        if not isinstance(protocol, str):
            (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(protocol))
            protocol = str(tmp_path / "protocol.yaml")
        words = ["train", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--protocol", protocol]
        words += [word for override in overrides for word in ("--set", override)]
        return celltyper_command(*words, "--device", "cpu", "-q", *flags.split())

    return start


def scores(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "scores.npz", allow_pickle=False) as archive:
        return dict(archive)


def split_of(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((folder / "split.json").read_text())
    return found


def groups_of(table: PatchTable, names: list[str]) -> set[str]:
    return {table.groups[table.names.index(name)] for name in names}


def contents(folder: Path) -> dict[str, Any]:
    """All that a protocol wrote but how long it took."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    for name in [name for name in found if name.endswith("run.json")]:
        found[name] = {k: v for k, v in json.loads(found[name]).items() if k != "seconds"}
    return found


def figures(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open() as stream:
        return list(csv.DictReader(stream))


# ---------------------------------------------------------------- cv


def test_cv_tests_every_window_once_with_one_pass_of_the_encoder(
    train: Run, tmp_path: Path, table: PatchTable, passes: list[int], celltyper_command: Run
) -> None:
    code, _, err = train("cv")
    assert (code, err) == (0, "")
    assert sum(passes) == SLIDES * EACH
    runs = [tmp_path / "out" / f"fold-{i}" for i in range(1, 6)]
    tested = [name for run in runs for name in scores(run)["names"].tolist()]
    assert sorted(tested) == sorted(table.names)
    for run in runs:
        assert {path.name for path in run.iterdir() if path.name[0] != "."} == {
            "config.yaml",
            "model.safetensors",
            "run.json",
            "scores.npz",
            "split.json",
        }
        split, said = split_of(run), scores(run)
        assert split["test"] == said["names"].tolist()
        assert split["val"] == []
        assert sorted(split["train"] + split["test"]) == sorted(table.names)
        assert not groups_of(table, split["train"]) & groups_of(table, split["test"])
        assert said["groups"].tolist() == [f"s{Path(n).stem.split('-')[0]}" for n in split["test"]]
        assert said["labels"].tolist() == [int(n.startswith("rare/")) for n in split["test"]]
        assert said["threshold"] == 0.5
        # the model that was written gives what was scored
        rows = [table.names.index(name) for name in split["test"]]
        again = load_patch_model(run).probabilities(table.take(rows), progress=False)
        np.testing.assert_array_equal(again, said["probabilities"])
    assert sum(passes) > SLIDES * EACH  # of the tests one by one, whose files are others


def test_figures_of_cv_are_scikit_learns_on_the_written_probabilities(
    train: Run, tmp_path: Path, celltyper_command: Run
) -> None:
    out = tmp_path / "out"
    assert train("cv", "data.val_fraction=0.25").code == 0
    assert celltyper_command("report", out, "-q").code == 0
    expected: dict[str, list[float]] = {}
    thresholds = []
    for fold in range(1, 6):
        said = scores(out / f"fold-{fold}")
        truth, rare = said["labels"], said["probabilities"][:, 1]
        called = (rare >= said["threshold"]).astype(int)
        thresholds.append(float(said["threshold"]))
        found = {
            "balanced_accuracy": metrics.balanced_accuracy_score(truth, called),
            "auroc": metrics.roc_auc_score(truth, rare),
            "auprc": metrics.average_precision_score(truth, rare),
            "f1": metrics.f1_score(truth, called),
            "sensitivity": metrics.recall_score(truth, called),
            "specificity": metrics.recall_score(truth, called, pos_label=0),
            "accuracy": metrics.accuracy_score(truth, called),
            "weighted_f1": metrics.f1_score(truth, called, average="weighted"),
            "kappa": metrics.cohen_kappa_score(truth, called, weights="quadratic"),
            "brier": metrics.brier_score_loss(truth, rare),
        }
        for name, value in found.items():
            expected.setdefault(name, []).append(value)
    (row,) = figures(out)
    assert (row["runs"], row["planned"], row["slides"]) == ("5", "5", str(SLIDES))
    for name, values in expected.items():
        assert float(row[f"{name}_mean"]) == pytest.approx(np.mean(values), abs=1e-5), name
        assert float(row[f"{name}_deviation"]) == pytest.approx(np.std(values, ddof=1), abs=1e-5)
        assert float(row[f"{name}_low"]) <= np.mean(values) <= float(row[f"{name}_high"])
    # otherwise mistakes of the threshold or of the class would not show
    assert len(set(thresholds)) > 1
    assert 0.55 < np.mean(expected["auroc"]) < 0.999


# ---------------------------------------------------------------- scaling, domains, variants


@pytest.mark.parametrize("of", ["windows", "groups"])
def test_fractions_are_nested_and_seeds_divide_anew(
    of: str, train: Run, tmp_path: Path, table: PatchTable, passes: list[int]
) -> None:
    rules = {"hold_out": 0.2, "fractions": [0.3, 1], "seeds": [0, 1]}
    rules |= {"fraction_of": "groups"} if of == "groups" else {}
    assert train(rules, "data.val_fraction=0.2").code == 0
    assert sum(passes) == SLIDES * EACH
    out = tmp_path / "out" / "held-out"
    splits = {
        (fraction, seed): split_of(out / f"fraction-{fraction}" / f"seed-{seed}")
        for fraction in ("0.3", "1")
        for seed in (0, 1)
    }
    for seed in (0, 1):
        part, whole = splits["0.3", seed], splits["1", seed]
        assert (part["val"], part["test"]) == (whole["val"], whole["test"])
        assert set(part["train"]) < set(whole["train"])
        assert sorted(whole["train"] + whole["val"] + whole["test"]) == sorted(table.names)
        sides = [groups_of(table, whole[side]) for side in ("train", "val", "test")]
        # a fifth of 15 slides, and a fifth of the 12 others
        assert [len(side) for side in sides] == [10, 2, 3]
        assert len(set.union(*sides)) == SLIDES
        # .3 of 40 windows, a quarter of them rare
        assert len(part["train"]) == 12
        assert sum(name.startswith("rare/") for name in part["train"]) == 3
        assert (len(groups_of(table, part["train"])) == 3) == (of == "groups")
    assert splits["1", 0]["test"] != splits["1", 1]["test"]
    for seed in (0, 1):
        run = out / "fraction-1" / f"seed-{seed}"
        facts = json.loads((run / "run.json").read_text())
        assert facts["seed"] == seed
        assert facts["data"]["train"]["names"] == splits["1", seed]["train"]
        # by itself too, a run finds the encoder that all of them share
        rows = [table.names.index(name) for name in splits["1", seed]["test"]]
        found = load_patch_model(run).probabilities(table.take(rows), progress=False)
        np.testing.assert_array_equal(found, scores(run)["probabilities"])


def test_scaling_goes_down_to_one_window_of_each_class(
    train: Run, tmp_path: Path, table: PatchTable, passes: list[int], celltyper_command: Run
) -> None:
    assert train("scaling").code == 0
    assert sum(passes) == SLIDES * EACH
    out = tmp_path / "out"
    asked = {"0.001": 2, "0.01": 2, "0.1": 5, "1": 48}
    sizes = {}
    for seed in range(5):
        runs = {f: out / "held-out" / f"fraction-{f}" / f"seed-{seed}" for f in asked}
        splits = {f: split_of(run) for f, run in runs.items()}
        tested = splits["1"]["test"]
        for fraction, size in asked.items():
            split = splits[fraction]
            assert split["test"] == tested
            assert len(set(split["train"])) == size
            assert not groups_of(table, split["train"]) & groups_of(table, tested)
            assert {name.split("/")[0] for name in split["train"]} == {"common", "rare"}
            probe = json.loads((runs[fraction] / "run.json").read_text())["probe"]
            by_default = probe["chosen_by"].startswith("default: too few slides or patients")
            sizes[by_default] = {*sizes.get(by_default, ()), size}
            assert scores(runs[fraction])["names"].tolist() == tested
            if by_default:
                assert probe["strength"] == 1  # the strongest of the recipe
        names = [set(splits[fraction]["train"]) for fraction in asked]
        assert names[0] == names[1] < names[2] < names[3]
    # two windows are of two slides; of five, one at most is rare
    assert sizes[True] >= {2}
    assert sizes[False] >= {48}
    assert not sizes[False] & {2, 5}
    assert celltyper_command("report", out, "-q").code == 0
    reached = {row["fraction"]: float(row["reached"]) for row in figures(out)}
    assert reached == pytest.approx({f: size / 48 for f, size in asked.items()}, rel=1e-3)


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("logistic", "{}"),
        ("mlp", "{hidden: 8}"),
        ("knn", "{}"),
        ("knn", "{k: 15}"),
        ("prototype", "{}"),
        ("linear", "{}"),
        ("attention", "{width: 8}"),
    ],
)
def test_every_head_trains_on_two_windows(
    head: str, options: str, train: Run, tmp_path: Path
) -> None:
    overrides = [f"head.name={head}", f"head.options={options}", "loss.targets=votes"]
    if head in ("linear", "attention"):
        overrides += ["encoder.adapt=lora", "train.steps=2", "train.batch_size=4"]
    if head == "attention":
        overrides += ["view.pool=card"]
    assert train({"hold_out": 0.2, "fractions": [0.001]}, *overrides) == (0, "", "")
    run = tmp_path / "out" / "held-out"
    assert len(split_of(run)["train"]) == 2
    assert len(scores(run)["names"]) == 12
    found = scores(run)["probabilities"]
    assert np.isfinite(found).all()
    assert np.ptp(found[:, 0]) > 0


def test_every_domain_trains_a_model_that_the_others_test(
    train: Run, tmp_path: Path, table: PatchTable, passes: list[int], celltyper_command: Run
) -> None:
    assert train("domains").code == 0
    assert sum(passes) == SLIDES * EACH
    out = tmp_path / "out"
    assert celltyper_command("report", out, "-q").code == 0
    rows = {(row["trained_on"], row["tested_on"]): row for row in figures(out)}
    assert rows.keys() == {(a, b) for a in DOMAINS for b in DOMAINS if a != b}
    for domain in DOMAINS:
        run = out / f"trained-on-{domain}"
        split, said = split_of(run), scores(run)
        own = [n for n, d in zip(table.names, table.domains, strict=True) if d == domain]
        assert split["train"] == own
        assert split["val"] == []
        assert sorted(split["test"]) == sorted(set(table.names) - set(own))
        for other in set(DOMAINS) - {domain}:
            of_other = said["domains"] == other
            assert of_other.sum() == SLIDES * EACH / 3
            value = metrics.roc_auc_score(
                said["labels"][of_other], said["probabilities"][of_other, 1]
            )
            assert float(rows[domain, other]["auroc_mean"]) == pytest.approx(value, abs=1e-5)


def test_leaving_domains_out_is_the_other_way_round(
    train: Run, tmp_path: Path, table: PatchTable
) -> None:
    assert train({"leave_out": "domain", "domains": ["colon"]}).code == 0
    assert [path.name for path in (tmp_path / "out").glob("*/")] == ["domain-colon"]
    split = split_of(tmp_path / "out" / "domain-colon")
    colon = [n for n, d in zip(table.names, table.domains, strict=True) if d == "colon"]
    assert split["test"] == colon
    assert sorted(split["train"]) == sorted(set(table.names) - set(colon))


def test_variants_share_what_the_encoder_saw_unless_their_view_differs(
    train: Run, tmp_path: Path, passes: list[int]
) -> None:
    variants = {
        "logistic": {},
        "prototype": {"head.name": "prototype", "head.options": {}},
        "flipped": {"view.symmetries": 2},
    }
    assert train({"folds": 3, "variants": variants}).code == 0
    assert sum(passes) == (1 + 2) * SLIDES * EACH
    said = {name: scores(tmp_path / "out" / name / "fold-2") for name in variants}
    assert said["logistic"]["names"].tolist() == said["flipped"]["names"].tolist()
    for name in ("prototype", "flipped"):
        assert (said[name]["probabilities"] != said["logistic"]["probabilities"]).any()
    for name in variants:
        models = load_patch_models(tmp_path / "out" / name)
        assert len(models) == 3
        assert len({id(model.predictor.embedder) for model in models}) == 1
    facts = json.loads((tmp_path / "out" / "flipped" / "fold-1" / "run.json").read_text())
    assert facts["probe"]["cases"] == 2 * len(facts["data"]["train"]["names"])


# ---------------------------------------------------------------- killed, resumed, changed


def test_killed_between_runs_and_resumed_gives_the_same_files(
    train: Run, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert train("cv").code == 0
    whole = contents(out)
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()

    write, calls = protocols.write_typed, []

    def killed(path: Path, typed: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(path, typed)

    with monkeypatch.context() as patch:
        patch.setattr(protocols, "write_typed", killed)
        code, _, err = train("cv")
    assert code == 130
    assert "stopped; go on with: celltyper train" in err
    assert err.rstrip().endswith("--resume")
    assert sorted(path.parent.name for path in out.rglob("scores.npz")) == ["fold-1", "fold-2"]
    assert "already holds a protocol; pass --resume" in train("cv").err
    passes.clear()
    times = {path: path.stat().st_mtime_ns for path in (out / "fold-1").iterdir()}
    assert train("cv", flags="--resume").code == 0
    assert not passes
    assert {path: path.stat().st_mtime_ns for path in (out / "fold-1").iterdir()} == times
    assert contents(out) == whole
    # and once more there is nothing to do
    assert train("cv", flags="--resume").code == 0
    assert contents(out) == whole


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("head.options.folds=3", "head.options.folds: None then, 3 now"),
        ("view.pool=mean", "view.pool: 'cls+mean' then, 'mean' now"),
        ("loss.targets=votes", "loss.targets: 'label' then, 'votes' now"),
        ("data.positive=common", "data.positive: 'rare' then, 'common' now"),
        ("data.size=20", "data.size: 28 then, 20 now"),
    ],
)
def test_a_changed_config_is_not_gone_on_with(
    override: str, said: str, train: Run, tmp_path: Path
) -> None:
    assert train({"folds": 2}).code == 0
    before = contents(tmp_path / "out")
    code, _, err = train({"folds": 2}, override, flags="--resume")
    assert code == 2
    assert f"was started with another protocol or config ({said})" in err
    assert contents(tmp_path / "out") == before


def test_a_changed_protocol_is_started_over_only_if_asked(train: Run, tmp_path: Path) -> None:
    assert train({"folds": 2}).code == 0
    code, _, err = train({"folds": 3}, flags="--resume")
    assert (code, "(folds: 2 then, 3 now)" in err) == (2, True)
    assert train({"folds": 3}, flags="--overwrite").code == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*/")) == [
        "fold-1",
        "fold-2",
        "fold-3",
    ]


def test_changed_data_are_not_gone_on_with(train: Run, tmp_path: Path) -> None:
    root = write_patches(tmp_path / "data", slides=6)
    assert train({"folds": 2}, root=root).code == 0
    (root / "common" / "0-0.png").unlink()
    code, _, err = train({"folds": 2}, root=root, flags="--resume")
    assert code == 2
    assert "gives other splits than when" in err


def test_damaged_scores_are_named(train: Run, tmp_path: Path, celltyper_command: Run) -> None:
    assert train({"folds": 2}).code == 0
    file = tmp_path / "out" / "fold-1" / "scores.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"scores\.npz: damaged; delete it and go on with --resume"):
        protocols.read_typed(file)
    code, _, err = celltyper_command("report", tmp_path / "out")
    assert (code, "fold-1/scores.npz: damaged; delete it" in err) == (2, True)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("protocol", "slides_of_rare", "overrides", "said"),
    [
        (
            {"folds": 7},
            [0, 1, 2, 3, 4, 5],
            (),
            "6 patients, slides or fields cannot be divided into 7 folds; ask for fewer",
        ),
        (
            {"folds": 4},
            [0, 1, 2],
            (),
            "test windows is of class rare; ask for fewer folds",
        ),
        (
            {"folds": 2},
            [3],
            (),
            "training windows is of class rare; take more slides: a larger fraction, fewer f",
        ),
        (
            {"hold_out": 0.3, "fractions": [0.1], "fraction_of": "groups"},
            [0, 1],
            (),
            "training windows is of class rare; take more slides: a larger fraction, fewer f",
        ),
        (
            {"hold_out": 0.3},
            [0, 1],
            ("data.val_fraction=0.3",),
            "windows is of class rare; ",
        ),
        (
            {"folds": 2, "variants": {"a": {}, "b": {"data.positive": "common"}}},
            [0, 1],
            (),
            "variant 'b' sets data.positive: variants are compared on the same images, classes",
        ),
        (
            {"folds": 2, "variants": {"a": {}, "b": {"head.options": {"strenghts": [1]}}}},
            [0, 1],
            (),
            "unknown option of 'logistic' 'strenghts'; did you mean 'strengths'?",
        ),
        (
            {
                "folds": 2,
                "variants": {
                    "a": {},
                    "b": {
                        "head": {"name": "linear"},
                        "encoder.adapt": "last-n",
                        "encoder.last_n": 99,
                    },
                },
            },
            [0, 1],
            (),
            "last_n is 99, but the encoder has 4 blocks: use 1 to 4",
        ),
        (
            {"folds": 2, "variants": {"a": {}, "b": {"data.mpp": 0.5}}},
            [0, 1],
            (),
            "its files state no micrometres per pixel, so no window at 0.5 can be cut; set data.m",
        ),
        ({"train_on": "scanner"}, [0, 1], (), "samples state no 'scanner' to leave out"),
        ({"train_on": "domain", "domains": ["liver"]}, [0], (), "no domain 'liver' to train on"),
    ],
    ids=[
        *("groups", "test", "training", "fraction", "validation"),
        *("positive", "options", "adapted", "mpp", "axis", "domain"),
    ],
)
def test_runs_that_cannot_be_made_are_refused_before_the_first(
    protocol: dict[str, Any],
    slides_of_rare: list[int],
    overrides: tuple[str, ...],
    said: str,
    train: Run,
    tmp_path: Path,
    passes: list[int],
) -> None:
    root = write_patches(tmp_path / "data", 6, rare=lambda slide: slide in slides_of_rare)
    code, _, err = train(protocol, *overrides, root=root)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not passes
    assert not (tmp_path / "out").exists()


def test_a_fold_with_one_slide_of_a_class_takes_the_default(train: Run, tmp_path: Path) -> None:
    root = write_patches(tmp_path / "data", 6, rare=lambda slide: slide in (0, 1))
    assert train({"folds": 2}, root=root).code == 0
    for fold in (1, 2):
        facts = json.loads((tmp_path / "out" / f"fold-{fold}" / "run.json").read_text())
        assert facts["probe"]["chosen_by"].startswith("default: too few slides or patients")
        assert facts["probe"]["strength"] == 1


# ---------------------------------------------------------------- several processes

WORKER = """
import os, sys, time
from pathlib import Path

import torch

import celltyper.protocols.patches as protocols
from celltyper.__main__ import main

torch.set_num_threads(1)
meet, own = Path(sys.argv[1]), str(os.getpid())
run = protocols._run


def wait_for_both(where):
    (meet / where / own).touch()
    while len(list((meet / where).iterdir())) < 2:
        time.sleep(0.005)


def noted(planned, *rest, **more):
    if not (meet / "runs" / own).exists():
        # each holds a run now, so that neither can do all of them
        wait_for_both("runs")
    run(planned, *rest, **more)
    with (meet / "done").open("a") as file:
        file.write(f"{own} {planned.path}\\n")


protocols._run = noted
wait_for_both("starts")
main(sys.argv[2:])
"""


def test_two_processes_share_the_runs_and_the_result_is_that_of_one(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rules = tmp_path / "out", {"folds": 3, "fractions": [0.5, 1], "seeds": [0, 1]}
    assert train(rules, flags="--resume").code == 0
    alone = contents(out)
    planned = [entry["path"] for entry in json.loads(alone["protocol.json"])["runs"]]
    assert len(planned) == 12
    out.rename(tmp_path / "alone")
    for place in ("starts", "runs"):
        (tmp_path / "meet" / place).mkdir(parents=True)
    monkeypatch.setenv("CELLTYPER_CACHE", str(tmp_path / "other-cache"))
    words = ["train", tmp_path / "recipe.yaml", "-o", out, "--device", "cpu", "-q", "--resume"]
    words += ["--protocol", tmp_path / "protocol.yaml"]
    command = [sys.executable, "-W", "error", "-c", WORKER, tmp_path / "meet", *words]
    workers = [subprocess.Popen(map(str, command), stderr=subprocess.PIPE) for _ in range(2)]
    for worker in workers:
        _, err = worker.communicate(timeout=120)
        assert (worker.returncode, err) == (0, b"")
    done = [line.split() for line in (tmp_path / "meet" / "done").read_text().splitlines()]
    assert sorted(path for _, path in done) == sorted(planned)
    assert {int(pid) for pid, _ in done} == {worker.pid for worker in workers}
    assert contents(out) == alone


def test_a_folder_that_another_process_is_just_starting_is_no_other_folder(
    train: Run, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".0123456789ab.tmp.protocol.json").touch()
    assert train({"folds": 2}, flags="--resume").code == 0
