"""Benchmarks: the matrix, what is kept and what goes on, the figures of the leaderboard."""

from __future__ import annotations

import csv
import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.metrics import balanced_accuracy_score, f1_score

import celltyper.benchmark.running as running
import celltyper.protocols.patches as patches
from celltyper.benchmark.drawing import draw_runs, figures_of_runs
from celltyper.benchmark.leaderboard import Board, Comparison, leaderboard
from celltyper.benchmark.published import read_published
from celltyper.benchmark.running import Job, make_data, run_benchmark, run_cell, state_of
from celltyper.benchmark.spec import Benchmark, Cell, benchmark_files, cells_of, load_benchmark
from celltyper.benchmark.writing import FILES, leaderboard_tex, report_benchmark
from celltyper.errors import CelltyperError, ConfigError, DataError, RunError
from celltyper.metrics.bootstrap import PairedDifference, draw_weights
from celltyper.metrics.multiplicity import holm
from celltyper.patches.reading import open_patches
from celltyper.protocols.patches import read_typed
from celltyper.protocols.pooling import find_clusters
from celltyper.protocols.scores import read_scores
from celltyper.protocols.table import load_run, read_plan
from celltyper.wholeslide import Pool

Run = Callable[..., Any]

MINI = benchmark_files()["mini"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini benchmark, run."""
    root = tmp_path_factory.mktemp("mini")
    kept, os.environ["CELLTYPER_CACHE"] = os.environ.get("CELLTYPER_CACHE"), str(root / "cache")
    try:
        benchmark, file, _ = load_benchmark("mini")
        run_benchmark(benchmark, file, root / "out", device="cpu", progress=False)
        report_benchmark(root / "out", resamples=200)
    finally:
        os.environ.pop("CELLTYPER_CACHE")
        if kept is not None:
            os.environ["CELLTYPER_CACHE"] = kept
    return root / "out"


def rows_of(folder: Path, name: str = "leaderboard.csv") -> list[dict[str, str]]:
    with (folder / name).open() as stream:
        return list(csv.DictReader(stream))


def main_row(folder: Path, cell: str, score: str, test: str = "") -> dict[str, str]:
    """The row of all training data, all domains and no class."""
    dataset, system, protocol = cell.split("/")
    wanted = {"dataset": dataset, "system": system, "protocol": protocol, "test": test}
    wanted |= {"score": score, "fraction": "", "domain": "", "class": ""}
    (row,) = [row for row in rows_of(folder) if wanted.items() <= row.items()]
    return row


def spec(tmp_path: Path, **values: Any) -> Path:
    """A benchmark of probes on stripes, in a file."""
    found = yaml.safe_load(MINI.read_text())
    found["datasets"] = {"stripes": found["datasets"]["stripes"] | {"tests": {}}}
    found["datasets"]["stripes"]["protocols"] = {"folds": {"folds": 2}}
    found["systems"] = {"probe": found["systems"]["probe"] | {"encoders": ["uni"]}}
    found |= {"published": [], "seeds": [0]}
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(found | values))
    return file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLTYPER_CACHE", str(tmp_path / "cache"))


# ---------------------------------------------------------------- the file


def test_systems_are_the_product_of_their_lists(tmp_path: Path) -> None:
    values = {
        "title": "t",
        "datasets": {"d": {"made": 0, "protocols": {"p": {"test": "test"}, "q": {"folds": 2}}}},
        "systems": {
            "s": {"recipe": "dpt", "encoders": ["uni", "virchow2"], "adapt": ["frozen", "lora"]},
            "t": {"recipe": "linear", "protocols": ["q"], "set": {"train": {"steps": 7}}},
        },
        "seeds": [3, 4],
    }
    file = tmp_path / "b.yaml"
    file.write_text(yaml.safe_dump(values))
    benchmark, _, rest = load_benchmark(file, ["seeds=[5]", "train.lr=1e-3"])
    assert rest == ["train.lr=1e-3"]
    cells = cells_of(benchmark, file, tmp_path / "out", overrides=rest)
    names = [f"{e}-{a}-s" for e, a in itertools.product(("uni", "virchow2"), ("frozen", "lora"))]
    assert [c.path for c in cells] == [
        *(f"d/{name}/p" for name in names),
        *(f"d/{name}/q" for name in names),
        "d/t/q",
    ]
    by_path = {cell.path: cell for cell in cells}
    lora = by_path["d/virchow2-lora-s/p"]
    assert (lora.config.encoder.name, lora.config.encoder.adapt) == ("virchow2", "lora")
    assert {cell.rules.seeds for cell in cells} == {(5,)}
    assert {cell.config.train.lr for cell in cells} == {1e-3}
    assert by_path["d/t/q"].config.train.steps == 7
    assert lora.config.train.steps != 7


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("systems.probe.recipe", "linar", "unknown recipe 'linar'; did you mean 'linear'?"),
        ("systems.probe.recipe", "linear", "no system for dataset 'stripes' of task patches"),
        ("systems.probe.datasets", "[strips]", "unknown dataset 'strips'; did you mean 'stripes'"),
        ("systems.probe.protocols", "[fold]", "unknown protocol 'fold'; did you mean 'folds'?"),
        ("systems.probe.encoder", "uni", "unknown key 'encoder'; did you mean 'encoders'?"),
        ("systems.probe.heads", "[linar]", "system 'uni-linar-probe' on 'stripes'"),
        ("datasets.stripes.made", "null", "give root, where the data are, or made"),
        ("datasets.stripes.protocols.folds", "{fold: 2}", "protocols.folds: fold: unknown key"),
        ("datasets.stripes.protocols.folds", "{folds: 2, variants: {a: {}}}", "list them as syst"),
        ("rank_by", "{patches: acuracy}", "unknown score 'acuracy'; did you mean 'accuracy'?"),
        ("train.steps", "3", "train has no effect on head 'logistic'"),
    ],
)
def test_wrong_benchmarks_are_refused_in_one_line(
    key: str, value: str, said: str, tmp_path: Path
) -> None:
    file = spec(tmp_path)

    def read() -> None:
        benchmark, _, rest = load_benchmark(file, [f"{key}={value}"])
        cells_of(benchmark, file, tmp_path / "out", overrides=rest)

    with pytest.raises(ConfigError) as caught:
        read()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", benchmark_files())
def test_benchmarks_that_come_along_fit_together(name: str, tmp_path: Path) -> None:
    benchmark, file, _ = load_benchmark(name)
    cells = cells_of(benchmark, file, tmp_path, data=tmp_path)
    assert len({cell.path for cell in cells}) == len(cells)
    for published in benchmark.published:
        assert read_published(file, published, cells)


def test_studies_have_every_published_system() -> None:
    def systems(name: str) -> set[str]:
        benchmark, file, _ = load_benchmark(name)
        return {cell.system for cell in cells_of(benchmark, file, Path("out"))}

    dense = systems("pathocellbench")
    for encoder in (
        *("uni", "uni2-h", "phikon-v2", "virchow", "virchow2", "prov-gigapath"),
        *("h-optimus-0", "h-optimus-1", "h0-mini", "titan-v", "musk"),
    ):
        assert {f"{encoder}-frozen-{d}" for d in ("unetr", "dpt", "linear")} <= dense
    assert "hovernext" in dense
    seven = (
        *("uni", "uni2-h", "virchow", "virchow2"),
        "prov-gigapath",
        "h-optimus-0",
        "h-optimus-1",
    )
    assert {f"{e}-{kind}" for e in seven for kind in ("lora", "probe")} <= systems("ami-br")
    assert {f"{e}-{kind}" for e in seven for kind in ("lora", "probe")} <= systems(
        "mitosis-scaling"
    )


def test_studies_have_the_published_divisions() -> None:
    dense = load_benchmark("pathocellbench")[0].datasets
    assert dense["lizard"].protocols["base"]["fractions"] == [1, 0.5, 0.2, 0.1, 0.05, 0.01]
    assert set(dense["pathocell"].protocols) == {"base", "type", "stage"}
    scaling = load_benchmark("mitosis-scaling")[0]
    assert scaling.seeds == (0, 1, 2, 3, 4)
    assert scaling.datasets["midogpp"].protocols["scaling"] == {
        "hold_out": 0.2,
        "fractions": [0.001, 0.01, 0.1, 1],
    }
    assert set(load_benchmark("ami-br")[0].datasets["ami-br"].tests) == {
        "test",
        "atnorm-br",
        "atnorm-md",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"doi": "none"}, "doi: string should match"),
        ({"rows": {"a": [0.5]}}, "row 'a' has 1 figures for 3 columns"),
        (
            {"columns": [{"dataset": "disk", "protocol": "base", "score": "aji"}]},
            "'disk/base'; did",
        ),
        ({"columns": [{"dataset": "disks", "protocol": "base", "score": "auroc"}]}, "'auroc'"),
    ],
)
def test_wrong_published_figures_are_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    values = yaml.safe_load((MINI.parent / "published" / "mini.yaml").read_text()) | change
    if "columns" in change:
        values["rows"] = {"a": [0.5]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    benchmark, file, _ = load_benchmark("mini")
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_published(tmp_path / "s.yaml", "p.yaml", cells_of(benchmark, file, tmp_path))


# ---------------------------------------------------------------- what is run


def test_every_cell_is_an_ordinary_protocol(mini: Path, celltyper_command: Run) -> None:
    cells = [
        f"{c['dataset']}/{c['system']}"
        for c in json.loads((mini / "benchmark.json").read_text())["cells"]
    ]
    assert len(cells) == 9
    code, out, err = celltyper_command("report", mini / "disks" / "uni-linear" / "base")
    assert (code, err) == (0, "")
    assert "macro F1" in out
    assert (mini / "disks" / "uni-linear" / "base" / "report.html").is_file()
    assert {name for name in FILES if (mini / name).is_file()} == set(FILES)


def test_runs_on_kept_features_share_them(mini: Path) -> None:
    """Of two encoders and two seeds, each of which has random weights of its own."""
    kept = list((mini.parent / "cache" / "features").iterdir())
    assert len(read_plan(mini / "disks" / "uni-linear" / "base")["runs"]) == 4
    # 6 training images in two views, 1 for validation and 8 to test in one, for both fractions
    assert len(kept) == 2 * 2 * (6 * 2 + 1 + 8)


def test_failures_are_kept_and_do_not_stop_others(
    tmp_path: Path, cache: None, celltyper_command: Run
) -> None:
    file, out = spec(tmp_path), tmp_path / "out"
    values = yaml.safe_load(file.read_text())
    good = values["systems"]["probe"]
    # 30 px are no whole number of patches of 16
    bad = good | {"set": good["set"] | {"view": {"input": 30}}}
    values["systems"] = {"bad": bad, "probe": good}
    file.write_text(yaml.safe_dump(values))
    command = ("benchmark", file, "-o", out, "--device", "cpu", "--resamples", 50)
    code, text, err = celltyper_command(*command)
    assert code == 1
    said = "view.input 30 is no whole number of patches of 16 px; take 32"
    assert err.splitlines()[-1].startswith(
        f"celltyper: 1 of 2 cells failed, the first stripes/uni-bad/folds: {said}"
    )
    assert "failed: view.input 30" in text
    (row,) = [row for row in rows_of(out) if row["system"] == "uni-bad"]
    assert (row["error"], row["mean"]) == (said, "")
    assert said in (out / "index.html").read_text()
    assert "Traceback" in json.loads((out / "stripes/uni-bad/folds.json").read_text())["traceback"]
    done = out / "stripes/uni-probe/folds/fold-1/scores.npz"
    before = done.stat().st_mtime_ns
    # the row is mended and another added: only these run
    values["systems"] = {"bad": good, "probe": good, "new": good}
    file.write_text(yaml.safe_dump(values))
    code, text, err = celltyper_command(*command)
    assert (code, done.stat().st_mtime_ns) == (0, before)
    assert "1 of 3 cells are finished" in err
    assert {row["system"] for row in rows_of(out) if row["mean"]} == {
        "uni-bad",
        "uni-probe",
        "uni-new",
    }
    # a row that was run is not silently another
    code, _, err = celltyper_command(*command, "--set", "data.val_fraction=0.3")
    assert code == 2
    assert "stripes/uni-bad/folds was run with another config" in err


def test_a_run_that_fails_does_not_stop_the_other_runs_of_its_cell(
    tmp_path: Path, cache: None, monkeypatch: pytest.MonkeyPatch, celltyper_command: Run
) -> None:
    file, out = spec(tmp_path), tmp_path / "out"
    benchmark, _, _ = load_benchmark(file)
    fit, folder = patches.fit_run, out / "stripes/uni-probe/folds"

    def fails_on_the_first(
        config: Any, data: Any, parts: Any, seed: int, at: Path, **how: Any
    ) -> Any:
        if at.name == "fold-1":
            raise ValueError("no luck")
        return fit(config, data, parts, seed, at, **how)

    with monkeypatch.context() as patch:
        patch.setattr(patches, "fit_run", fails_on_the_first)
        run_benchmark(benchmark, file, out, device="cpu", progress=False)
    state = state_of(out, "stripes/uni-probe/folds")
    assert (state.done, state.planned, state.finished) == (1, 2, False)
    assert state.error == "1 of 2 runs failed, the first fold-1: no luck"
    found = report_benchmark(out, resamples=50)
    assert [entry.system for entry in found.failed] == ["uni-probe"]
    (row,) = [r for r in rows_of(out) if (r["score"], r["class"]) == ("auroc", "")]
    assert (row["runs"], row["planned"], row["error"]) == ("1", "2", state.error)
    before = (folder / "fold-2" / "scores.npz").stat().st_mtime_ns
    run_benchmark(benchmark, file, out, device="cpu", progress=False)
    assert state_of(out, "stripes/uni-probe/folds").finished
    assert (folder / "fold-2" / "scores.npz").stat().st_mtime_ns == before


def test_an_interrupted_benchmark_goes_on_to_the_same_figures(
    tmp_path: Path, cache: None, monkeypatch: pytest.MonkeyPatch, celltyper_command: Run
) -> None:
    file, once, twice = spec(tmp_path), tmp_path / "once", tmp_path / "twice"
    options = ("--device", "cpu", "--resamples", 50, "-q")
    assert celltyper_command("benchmark", file, "-o", once, *options).code == 0
    with monkeypatch.context() as patch:

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(running, "type_further", stop)
        stopped = celltyper_command("benchmark", file, "-o", twice, *options)
    assert stopped.code == 130
    assert f"go on with: celltyper benchmark {file} -o {twice}" in stopped.err
    assert celltyper_command("benchmark", file, "-o", twice, *options).code == 0
    for a, b in zip(rows_of(once), rows_of(twice), strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }


def test_a_folder_of_something_else_is_refused(tmp_path: Path, celltyper_command: Run) -> None:
    file, out = spec(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    code, _, err = celltyper_command("benchmark", file, "-o", out)
    assert code == 2
    assert "holds other files" in err
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_the_plan_writes_nothing_and_says_what_there_is_to_do(
    tmp_path: Path, cache: None, celltyper_command: Run
) -> None:
    file, out = spec(tmp_path), tmp_path / "out"
    values = yaml.safe_load(file.read_text())
    values["datasets"]["gone"] = values["datasets"]["stripes"] | {"made": None, "root": "nowhere"}
    file.write_text(yaml.safe_dump(values))
    code, text, _ = celltyper_command("benchmark", file, "-o", out, "--plan", "--device", "cpu")
    assert code == 0
    assert not out.exists()
    lines = text.splitlines()
    (good,) = [line for line in lines if line.startswith("stripes/")]
    assert good.split()[1] == "2"
    assert re.search(r"\d+\.\d s +[\d.]+ kB$", good)
    (gone,) = [line for line in lines if line.startswith("gone/")]
    assert "nowhere: no such file or folder" in gone
    assert "2 runs to do, at most" in text
    assert "1 of 2 cells cannot be run" in text


def test_training_on_test_patches_is_a_failure(tmp_path: Path, cache: None) -> None:
    file = spec(tmp_path)
    benchmark, _, _ = load_benchmark(file, ["datasets.stripes.tests.same={root: out/data/stripes}"])
    (cell,) = cells_of(benchmark, file, tmp_path / "out", data=tmp_path)
    make_data(Cell(cell.dataset, cell.system, cell.protocol, cell.config, cell.rules, cell.made))
    run_cell(cell, tmp_path / "out", device="cpu", progress=False)
    state = state_of(tmp_path / "out", cell.path, cell.tests)
    assert (state.done, state.planned, state.finished) == (2, 2, False)
    assert "trained the models, by name, slide or pixels" in state.error


# ---------------------------------------------------------------- figures


def test_holm_by_hand() -> None:
    # sorted .01 x 4, .02 x 3, .03 x 2, .5 x 1; .03 x 2 = .06 is not below .02 x 3 = .06
    np.testing.assert_allclose(holm([0.03, 0.01, 0.5, 0.02]), [0.06, 0.04, 0.5, 0.06])
    # none may become smaller than one before it: .04 x 1 < .03 x 2
    np.testing.assert_allclose(holm([0.04, 0.03]), [0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    np.testing.assert_allclose(holm([0.01, np.nan, 0.04]), [0.02, np.nan, 0.04])
    assert holm([]).shape == (0,)


def test_scores_of_cells_are_means_over_runs(mini: Path) -> None:
    """Macro F1 on reference instances by scikit-learn, run by run."""
    folder = mini / "disks" / "uni-linear" / "base"
    values = []
    for entry in read_plan(folder)["runs"]:
        if entry["fraction"] == 1:
            images, _ = read_scores(folder / entry["path"] / "scores.npz")
            true = np.concatenate([image.true for image in images])
            seen = np.concatenate([image.seen for image in images])
            values.append(f1_score(true, seen, labels=[1, 2], average="macro", zero_division=0))
    row = main_row(mini, "disks/uni-linear/base", "macro_f1")
    assert len(values) == 2
    assert float(row["mean"]) == pytest.approx(np.mean(values), rel=1e-4)
    assert float(row["deviation"]) == pytest.approx(np.std(values, ddof=1), rel=1e-3)
    assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
    assert (row["runs"], row["planned"]) == ("4", "4")


def test_scores_of_further_patches_are_means_over_models(mini: Path) -> None:
    folder = mini / "stripes" / "uni-probe" / "folds"
    table = open_patches(mini / "data" / "stripes-elsewhere")
    values = []
    for entry in read_plan(folder)["runs"]:
        typed = read_typed(folder / entry["path"] / "scores-elsewhere.npz")
        assert typed.names == table.names
        called = typed.probabilities[:, 1] >= typed.threshold
        values.append(balanced_accuracy_score(table.labels == 1, called))
    row = main_row(mini, "stripes/uni-probe/folds", "balanced_accuracy", "elsewhere")
    assert len(values) == 3
    assert float(row["mean"]) == pytest.approx(np.mean(values), rel=1e-4)
    assert float(row["deviation"]) == pytest.approx(np.std(values, ddof=1), rel=1e-3)


def test_resamples_of_cells_by_brute_force(mini: Path) -> None:
    """Each resample scored from copies of the drawn images' nuclei, by scikit-learn."""
    folder = mini / "disks" / "uni-linear" / "base"
    plan = read_plan(folder)
    runs = [load_run(folder, e, plan["classes"]) for e in plan["runs"] if e["fraction"] == 1]
    clusters = find_clusters([image for run in runs for image in run.images or ()])
    weights = draw_weights(len(clusters.keys), 5, 0)
    drawn = draw_runs(runs, 2, clusters, weights)[0]["macro_f1"]
    groups = [group for group, _ in clusters.keys]
    for row, found in zip(weights, drawn.draws, strict=True):
        scores = []
        for run in runs:
            copies = [
                image
                for image in run.images or ()
                for _ in range(int(row[groups.index(image.group)]))
            ]
            true = np.concatenate([image.true for image in copies])
            seen = np.concatenate([image.seen for image in copies])
            scores.append(f1_score(true, seen, labels=[1, 2], average="macro", zero_division=0))
        assert found == pytest.approx(np.mean(scores))
    figures, per_class, text = figures_of_runs(runs, plan["classes"], 50)
    assert text == "8 patients or fields"
    low, high = np.quantile(
        draw_runs(runs, 2, clusters, draw_weights(8, 50, 0))[0]["aji"].draws, [0.025, 0.975]
    )
    assert (figures["aji"].low, figures["aji"].high) == pytest.approx((low, high))
    mean = np.mean([per_class[name]["f1"].mean for name in plan["classes"]])
    assert mean == pytest.approx(figures["macro_f1"].mean)


def test_a_system_is_no_better_than_itself(mini: Path, tmp_path: Path) -> None:
    """Two rows of the same predictions: no difference, and the same place."""
    copy = tmp_path / "copy"
    shutil.copytree(mini, copy)
    about = json.loads((copy / "benchmark.json").read_text())
    twin = next(
        c for c in about["cells"] if c["system"] == "uni-probe" and c["protocol"] == "folds"
    )
    about["cells"] = [twin, twin | {"system": "same"}]
    about["published"] = []
    (copy / "benchmark.json").write_text(json.dumps(about))
    shutil.copytree(copy / "stripes" / "uni-probe", copy / "stripes" / "same")
    board = leaderboard(copy, resamples=50).boards[0]
    (one,) = board.comparisons
    assert one.difference.difference == 0
    assert (one.corrected, one.shown) == (1, False)
    assert (board.place("uni-probe"), board.place("same")) == (1, 1)
    assert board.resamples == 80
    # other patches under the same names of runs cannot be compared
    typed = copy / "stripes/same/folds/fold-1/scores.npz"
    shutil.copy(copy / "stripes/same/folds/fold-2/scores.npz", typed)
    with pytest.raises(DataError, match="were tested on different images in fold-1, seed 0"):
        leaderboard(copy, resamples=50)


def board_of(differences: dict[tuple[str, str], tuple[float, float]]) -> Board:
    """A board of systems a, b, c with the differences and corrected p-values given."""
    compared = [
        Comparison(a, b, 1, PairedDifference(d, d, d, p), p)
        for (a, b), (d, p) in differences.items()
    ]
    return Board("d", "p", "", "D", "cells", "macro_f1", (), {}, [], compared, 100)


def test_place_counts_only_what_is_shown_to_be_better() -> None:
    pairs = {("a", "b"): (0.3, 0.01), ("a", "c"): (0.2, 0.06), ("b", "c"): (-0.1, 0.04)}
    board = board_of(pairs)
    assert {s: board.place(s) for s in "abc"} == {"a": 1, "b": 3, "c": 1}
    assert board.place("d") is None
    assert board_of({("a", "b"): (0.1, float("nan"))}).place("a") is None


def test_differences_are_listed_for_every_pair(mini: Path) -> None:
    rows = rows_of(mini, "differences.csv")
    boards: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        boards.setdefault((row["dataset"], row["protocol"], row["test"]), []).append(row)
    assert {key: len(own) for key, own in boards.items()} == {
        ("disks", "base", ""): 3,
        ("stripes", "folds", ""): 3,
        ("stripes", "folds", "elsewhere"): 3,
        ("stripes", "domains", ""): 3,
        ("stripes", "domains", "elsewhere"): 3,
    }
    for own in boards.values():
        p = np.array([float(row["p_value"]) for row in own])
        order = np.argsort(p)
        expected = np.minimum(1, np.maximum.accumulate(p[order] * [3, 2, 1]))
        found = np.array([float(row["p_corrected"]) for row in own])[order]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert [row["shown"] == "yes" for row in own] == [q < 0.05 for q in found[order.argsort()]]
        for row in own:
            names = row["dataset"], row["protocol"]
            means = [
                float(
                    main_row(mini, f"{names[0]}/{s}/{names[1]}", row["score"], row["test"])["mean"]
                )
                for s in (row["system"], row["less"])
            ]
            assert float(row["difference"]) == pytest.approx(means[0] - means[1], abs=2e-5)


def test_fractions_and_domains_have_rows(mini: Path) -> None:
    rows = [r for r in rows_of(mini) if r["system"] == "uni-linear" and r["score"] == "macro_f1"]
    assert len({row["fraction"] for row in rows}) == 3
    rows = [r for r in rows_of(mini) if r["system"] == "uni-probe" and r["score"] == "auroc"]
    domains = {row["domain"] for row in rows if row["protocol"] == "domains" and not row["test"]}
    assert domains == {"", "breast", "colon", "skin"}
    classes = {r["class"] for r in rows_of(mini) if r["dataset"] == "disks" and r["score"] == "f1"}
    assert classes == {"blue", "brown"}


def test_published_figures_are_rows_of_their_own(mini: Path) -> None:
    rows = [row for row in rows_of(mini) if row["system"] == "Guessing"]
    assert {(row["dataset"], row["test"], row["score"], row["mean"]) for row in rows} == {
        ("disks", "", "macro_f1", "0.333"),
        ("stripes", "", "balanced_accuracy", "0.5"),
        ("stripes", "elsewhere", "balanced_accuracy", "0.5"),
    }
    assert {row["source"] for row in rows} == {"doi:10.0000/made-up"}
    assert {row["place"] for row in rows} == {""}
    page = (mini / "index.html").read_text()
    assert 'title="Nobody, nowhere, doi:10.0000/made-up">published</span>' in page


def test_latex_is_a_whole_table(mini: Path) -> None:
    text = (mini / "leaderboard.tex").read_text()
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 2 + 6 + 2
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {5}
    assert text.count("{") == text.count("}")
    assert text.index(r"\toprule") < text.index(r"\bottomrule") < text.index(r"\end{tabular}")
    assert r"\textit{0.333}" in text
    found = leaderboard(mini, resamples=0)
    found.boards[0].published.append(found.boards[0].published[0]._replace(system="50 % & #1_x"))
    assert r"\textit{50 \% \& \#1\_x}" in leaderboard_tex(found)


def test_unfinished_benchmarks_have_a_leaderboard(tmp_path: Path, celltyper_command: Run) -> None:
    benchmark, file, _ = load_benchmark("mini")
    out = tmp_path / "out"
    out.mkdir()
    cells = cells_of(benchmark, file, out)
    about = {
        "benchmark": benchmark.model_dump(mode="json"),
        "cells": [
            {"dataset": c.dataset, "system": c.system, "protocol": c.protocol, **c.about()}
            for c in cells
        ],
        "published": [],
    }
    (out / "benchmark.json").write_text(json.dumps(about))
    code, text, err = celltyper_command("report", out)
    assert (code, err) == (0, "")
    assert "not begun" in text
    (out / "benchmark.json").write_text("{}")
    code, _, err = celltyper_command("report", out)
    assert code == 2
    assert "benchmark.json: damaged" in err


def test_jobs_travel(tmp_path: Path) -> None:
    """What a process or a Dask worker is sent."""
    file = spec(tmp_path)
    cells = cells_of(load_benchmark(file)[0], file, tmp_path / "out")
    job, cell = pickle.loads(pickle.dumps((Job(tmp_path, "cpu"), cells[0])))
    assert job == Job(tmp_path, "cpu")
    assert cell.about() == cells[0].about()
    assert Benchmark.model_validate(load_benchmark(file)[0].model_dump(mode="json"))


# ---------------------------------------------------------------- processes and clusters


class FakePool(Pool):
    """A worker that dies of one cell, and does the others in a thread."""

    shared = False

    def __init__(self, dies_of: str = "") -> None:
        self.executor = ThreadPoolExecutor(1)
        super().__init__(self.executor, self.executor)
        self.dies_of = dies_of
        self.ended = False

    def predict(self, task: Any, item: Any) -> Any:
        if self.dies_of and self.dies_of in item.path:
            return self.executor.submit(self.die)
        return super().predict(task, item)

    def die(self) -> None:
        raise BrokenProcessPool

    def lost(self, error: BaseException, name: str) -> CelltyperError | None:
        return RunError(f"{name}: a worker died") if isinstance(error, BrokenProcessPool) else None

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("way", ["workers", "cluster"])
def test_the_death_of_a_worker_is_the_failure_of_its_cell(
    way: str, tmp_path: Path, cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FakePool] = []

    @contextmanager
    def pool(*_: Any) -> Iterator[FakePool]:
        made.append(FakePool("phikon"))
        yield made[-1]
        made[-1].executor.shutdown()

    monkeypatch.setattr(running, "process_pool", pool)
    monkeypatch.setattr(running, "cluster_pool", pool)
    file = spec(tmp_path)
    benchmark, _, _ = load_benchmark(file, ["systems.probe.encoders=[uni, phikon-v2, uni2-h]"])
    out, options = tmp_path / "out", {"device": "cpu", "progress": False}
    where = {"workers": 2} if way == "workers" else {"cluster": "tcp://nowhere:1"}
    # patches of 14 px do not fit 32
    overrides = ["view.input=112"]
    run_benchmark(benchmark, file, out, overrides=overrides, **where, **options)
    assert len(made) == (2 if way == "workers" else 1)
    states = {s: state_of(out, f"stripes/{s}-probe/folds") for s in ("uni", "phikon-v2", "uni2-h")}
    assert [s.finished for s in states.values()] == [True, False, True]
    assert states["phikon-v2"].error == "stripes/phikon-v2-probe/folds: a worker died"
    # and is tried again
    made.clear()
    monkeypatch.setattr(FakePool, "__init__", lambda self, _: _alive(self))
    run_benchmark(benchmark, file, out, overrides=overrides, **where, **options)
    assert state_of(out, "stripes/phikon-v2-probe/folds").finished


def _alive(pool: FakePool) -> None:
    pool.executor = ThreadPoolExecutor(1)
    Pool.__init__(pool, pool.executor, pool.executor)
    pool.dies_of = ""


def test_an_error_of_no_cell_ends_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FakePool] = []

    @contextmanager
    def pool(*_: Any) -> Iterator[FakePool]:
        made.append(FakePool())
        yield made[-1]
        made[-1].executor.shutdown()

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "process_pool", pool)
    monkeypatch.setattr(running, "run_cell", broken)
    file = spec(tmp_path)
    benchmark, _, _ = load_benchmark(file)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(benchmark, file, tmp_path / "out", workers=2, device="cpu", progress=False)
    assert [one.ended for one in made] == [True, True]


@pytest.mark.slow
def test_processes_give_the_same_figures(mini: Path, tmp_path: Path) -> None:
    benchmark, file, _ = load_benchmark("mini")
    out = tmp_path / "out"
    run_benchmark(benchmark, file, out, workers=2, device="cpu", progress=False)
    report_benchmark(out, resamples=200)
    for a, b in zip(rows_of(mini), rows_of(out), strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }
