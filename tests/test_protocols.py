"""Protocols: what is run on which images, what survives a kill, and the figures of the table."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from celltyper.classification.config import PatchData
from celltyper.config import Config, Data
from celltyper.datasets import Dataset, write_folder
from celltyper.errors import ConfigError, DataError
from celltyper.evaluation import ImageScores, score_image, summarise
from celltyper.features import FeatureCache
from celltyper.library.files import PROTOCOL_FILE
from celltyper.protocols import load_protocol, protocol_table, report_protocol, run_protocol
from celltyper.protocols.plan import PlannedRun, plan_runs
from celltyper.protocols.protocol import FIXED, Protocol, protocol_files, variant_configs
from celltyper.protocols.scores import SCORES_FILE, read_scores, write_scores
from celltyper.protocols.writing import FILES, table_text
from celltyper.readers import open_dataset
from celltyper.types import Prediction, Sample

Tiny = Callable[..., Config]
Run = Callable[..., Any]

CLASSES = ("a", "b")


# ---------------------------------------------------------------- the file


def protocol(**values: Any) -> Protocol:
    return Protocol.model_validate(values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "fractions: [1]",
            "hold_out, test and splits, got none",
        ),
        (
            "{folds: 3, test: test}",
            "hold_out, test and splits, got folds, test",
        ),
        ("{folds: 3, domains: [a]}", "domains has no effect without leave_out"),
        ("{splits: [{train: a}]}", "each of splits names train and test, and may name val"),
        ("{splits: [{train: a, tset: b}]}", "splits.0.tset"),
        ("{splits: [{train: 1, test: 2}, {test: 2, train: 1}]}", "splits lists a value twice"),
        ("folds: 1", "folds: input should be greater than or equal to 2, got 1"),
        ("{folds: 2, fraction: [1]}", "unknown key 'fraction'; did you mean 'fractions'?"),
        ("{folds: 2, fractions: [1, 1.0]}", "fractions lists a value twice"),
        ("{folds: 2, fractions: []}", "fractions: "),
        ("{folds: 2, seeds: [0, 0]}", "seeds lists a value twice"),
        ("{folds: 2, variants: {a: {seed: 1}}}", "variant 'a' sets seed: variants are compared"),
        ("{folds: 2, variants: {a: {data.root: x}}}", "variant 'a' sets data.root"),
        ("{folds: 2, variants: {a: {data.positive: x}}}", "variant 'a' sets data.positive: var"),
        ("{folds: 2, variants: {a: {data.classes: [x]}}}", "variant 'a' sets data.classes: var"),
        ("{folds: 2, variants: {a: {data.images: x}}}", "variant 'a' sets data.images: variants"),
        ("{folds: 2, variants: {a: {data.skip_bad: true}}}", "variant 'a' sets data.skip_bad: va"),
        ("{folds: 2, variants: {a: {data: {positive: x}}}}", "variant 'a' sets data: variants"),
        ("{folds: 2, variants: {a: {' seed': 1}}}", "variant 'a' sets  seed: variants"),
        ("{folds: 2, fraction_of: windows}", "fraction_of has no effect without fractions below"),
        ("{folds: 2, fractions: [0.1], fraction_of: slides}", "fraction_of: "),
        ("{folds: 2, variants: {a/b: {}}}", "variants.a/b"),
        ("- 1", "must hold keys such as 'folds:'"),
        ("{", "cannot be read as YAML"),
    ],
)
def test_wrong_protocols_are_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_protocol(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_protocols_that_come_along_are_found_by_name(tmp_path: Path) -> None:
    assert [*protocol_files()] == [
        "cv",
        "domains",
        "fractions",
        "kfold",
        "leave-domain-out",
        "lizard-glas",
        "pannuke-folds",
        "scaling",
    ]
    assert load_protocol("kfold").folds == 5
    assert load_protocol("fractions").fractions == (1, 0.5, 0.2, 0.1, 0.05, 0.01)
    assert load_protocol("leave-domain-out").leave_out == "centre"
    assert load_protocol("lizard-glas").domains == ("glas",)
    assert len(load_protocol("pannuke-folds").splits or ()) == 3
    with pytest.raises(ConfigError, match="unknown protocol 'kfolds'; did you mean 'kfold'"):
        load_protocol("kfolds")
    with pytest.raises(ConfigError, match="does not exist; those that come along: cv"):
        load_protocol(tmp_path / "none.yaml")


def test_variants_are_values_in_place_of_the_configs() -> None:
    rules = protocol(
        folds=2, variants={"unetr": {"decoder.name": "unetr", "train.lr": 1e-05}, "as-is": {}}
    )
    configs = variant_configs(rules, Config())
    assert configs["unetr"].decoder.name == "unetr"
    assert configs["unetr"].train.lr == 1e-05
    assert configs["as-is"] == Config()
    wrong = protocol(folds=2, variants={"x": {"decoder.nam": "unetr"}})
    with pytest.raises(ConfigError, match=r"variant 'x': decoder.nam: unknown key 'nam'"):
        variant_configs(wrong, Config())


def test_every_key_of_the_data_is_fixed_or_may_differ_between_variants() -> None:
    may_differ = {"mpp", "size", "tile", "balance", "workers"}
    keys = Data.model_fields.keys() | PatchData.model_fields.keys()
    assert keys - may_differ == set(FIXED)


# ---------------------------------------------------------------- who is on which side


def made(splits: dict[str, int], **more: Any) -> Dataset:
    """Images ``train0``, ``train1``, ... without pixels, two a group, in the splits given."""
    by_split = {part: tuple(f"{part}{i}" for i in range(n)) for part, n in splits.items()}
    names = tuple(n for part in by_split.values() for n in part)
    groups = {n: f"{n[:-1]}{int(n[-1]) // 2}" for n in names}

    def refuse(name: str) -> Sample:
        raise AssertionError(name)

    return Dataset("t", Path("t"), CLASSES, None, names, groups, refuse, by_split, **more)


def plan(rules: Protocol, data: Dataset, seeds: tuple[int, ...] = (0,), **settings: Any) -> Any:
    counts = {n: np.array([3, 2]) for n in data.names}
    variants = list(rules.variants) or [""]
    return plan_runs(rules, Data(root=Path("t"), **settings), data, counts, seeds, variants)


def sides(run: PlannedRun) -> list[set[str]]:
    return [set(run.train), set(run.val), set(run.test)]


def test_plan_of_folds_fractions_seeds_and_variants() -> None:
    data = made({"all": 10, "more": 10})
    rules = protocol(
        folds=4, fractions=[1, 0.5, 0.2], variants={"x": {}, "y": {"decoder.name": "unetr"}}
    )
    runs = plan(rules, data, seeds=(0, 1))
    assert len(runs) == 4 * 3 * 2 * 2
    assert len({run.path for run in runs}) == len(runs)
    assert runs[0].path == "x/fold-1/fraction-1/seed-0"
    by_key = {(r.variant, r.part, r.fraction, r.seed): r for r in runs}
    for seed in (0, 1):
        tested = [n for f in range(1, 5) for n in by_key["x", f"fold-{f}", 1, seed].test]
        assert sorted(tested) == sorted(data.names)
    for run in runs:
        train, val, test = sides(run)
        assert train
        assert val
        assert test
        groups = [{data.groups[n] for n in side} for side in (train, val, test)]
        assert not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])
        whole = by_key[run.variant, run.part, 1, run.seed]
        assert whole.val == run.val
        assert whole.test == run.test
        assert train <= set(whole.train)
        assert sides(whole)[0] | val | test == set(data.names)
        twin = by_key["y", run.part, run.fraction, run.seed]
        assert sides(twin) == sides(run)
    assert by_key["x", "fold-1", 1, 0].test != by_key["x", "fold-1", 1, 1].test


def test_levels_of_one_value_are_left_out_of_the_path() -> None:
    runs = plan(protocol(folds=2), made({"all": 8}), val_fraction=0)
    assert [run.path for run in runs] == ["fold-1", "fold-2"]
    assert [run.val for run in runs] == [(), ()]


def test_folds_never_touch_the_test_split_of_the_data() -> None:
    data = made({"train": 8, "val": 2, "test": 6})
    runs = plan(protocol(folds=3), data)
    used = {n for run in runs for side in sides(run) for n in side}
    assert used == {n for n in data.names if not n.startswith("test")}


def test_a_named_split_is_tested_and_named_validation_images_validate() -> None:
    data = made({"train": 8, "val": 2, "test": 6})
    (run,) = plan(protocol(test="test"), data)
    assert (run.path, *map(len, sides(run))) == ("test", 8, 2, 6)
    assert run.val == ("val0", "val1")
    with pytest.raises(DataError, match=r"no split 'tset' to test on \(there are: test\)"):
        plan(protocol(test="tset"), data)
    # Where no split is called train, all others train.
    (run,) = plan(protocol(test="b"), made({"a": 8, "b": 4}), val_fraction=0.25)
    assert set(run.test) == {"b0", "b1", "b2", "b3"}
    assert {n[0] for n in (*run.train, *run.val)} == {"a"}
    assert run.val


def test_a_group_on_two_sides_is_refused() -> None:
    data = made({"train": 8, "test": 4})
    leaky = replace(data, groups=data.groups | {"test3": data.groups["train0"]})
    with pytest.raises(DataError, match="'train0' would be on two sides of training, validation"):
        plan(protocol(test="test"), leaky)


def test_a_domain_is_left_out_and_unknown_ones_take_no_part() -> None:
    data = made({"a": 4, "b": 4, "c": 4, "x": 2})
    centre = {n: {"a": "A/1", "b": "B", "c": "C", "x": "unknown"}[n[0]] for n in data.names}
    runs = plan(protocol(leave_out="centre"), replace(data, domains={"centre": centre}))
    assert [run.path for run in runs] == ["centre-A-1", "centre-B", "centre-C"]
    assert [run.domain for run in runs] == ["A/1", "B", "C"]
    for run, letter in zip(runs, "abc", strict=True):
        train, val, test = sides(run)
        assert {n[0] for n in test} == {letter}
        assert {n[0] for n in train | val} == set("abc") - {letter}


def test_only_the_domains_that_are_listed_are_left_out() -> None:
    """Lizard is published with GlaS left out, and no other centre."""
    data = made({"a": 4, "b": 4, "c": 4})
    data = replace(data, domains={"centre": {n: n[0] for n in data.names}})
    (run,) = plan(protocol(leave_out="centre", domains=["b"]), data)
    assert (run.path, run.domain, {n[0] for n in run.test}) == ("centre-b", "b", {"b"})
    assert {n[0] for n in (*run.train, *run.val)} == {"a", "c"}
    with pytest.raises(DataError, match=r"no centre 'x' to leave out \(there are: a, b, c\)"):
        plan(protocol(leave_out="centre", domains=["a", "x"]), data)


def test_divisions_that_the_data_name() -> None:
    """The published protocol of PanNuke: every fold trains once, and fold 3 is tested twice."""
    folds = [(1, 2, 3), (2, 1, 3), (3, 2, 1)]
    rules = protocol(splits=[dict(zip(("train", "val", "test"), f, strict=True)) for f in folds])
    data = made({"1": 4, "2": 2, "3": 4})
    runs = plan(rules, data)
    assert [run.path for run in runs] == ["1-2-3", "2-1-3", "3-2-1"]
    assert [[{n[0] for n in side} for side in sides(run)] for run in runs] == [
        [{str(part)} for part in fold] for fold in folds
    ]
    (run,) = plan(protocol(splits=[{"train": "1", "test": "3"}]), data, val_fraction=0.5)
    assert [len(side) for side in sides(run)] == [2, 2, 4]
    with pytest.raises(DataError, match=r"no split '4' \(there are: 1, 2, 3\)"):
        plan(protocol(splits=[{"train": 1, "test": 4}]), data)
    leaky = replace(data, groups=data.groups | {"30": data.groups["10"]})
    with pytest.raises(DataError, match="would be on two sides of training, validation"):
        plan(rules, leaky)


def test_two_runs_never_share_a_folder() -> None:
    data = made({"a": 4, "b": 4, "c": 4})
    centre = {n: {"a": "A/1", "b": "A 1", "c": "C"}[n[0]] for n in data.names}
    with pytest.raises(DataError, match="two runs would be in the folder centre-A-1; rename"):
        plan(protocol(leave_out="centre"), replace(data, domains={"centre": centre}))


# ---------------------------------------------------------------- fractions of windows


def windows(a: int, b: int, slides: int = 6) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Windows of two classes on slides in turn, half of them in a split for tests."""
    names = tuple(f"{label}{i}" for label, n in (("a", a), ("b", b)) for i in range(2 * n))
    groups = {n: f"s{int(n[1:]) % slides + slides * (int(n[1:]) % 2)}" for n in names}
    sides = {"train": 0, "test": 1}
    splits = {s: tuple(n for n in names if int(n[1:]) % 2 == odd) for s, odd in sides.items()}
    counts = {n: np.array([n[0] == "a", n[0] == "b"], np.int64) for n in names}
    unread = made({"one": 1}).read
    return Dataset("t", Path("t"), CLASSES, None, names, groups, unread, splits), counts


def plan_windows(
    rules: Protocol, a: int, b: int, seeds: tuple[int, ...] = (0,)
) -> tuple[Dataset, dict[tuple[float, int], PlannedRun]]:
    data, counts = windows(a, b)
    runs = plan_runs(rules, PatchData(root=Path("t")), data, counts, seeds, [""])
    return data, {(run.fraction, run.seed): run for run in runs}


def test_fractions_of_windows_are_nested_and_hold_every_class_in_proportion() -> None:
    a, b = 33, 10
    fractions = [0.001, *(m / 43 for m in range(3, 43)), 1]
    _, runs = plan_windows(protocol(test="test", fractions=fractions), a, b, seeds=(0, 1))
    seats = {"a": 1, "b": 1}
    for m in range(2, 44):
        for seed in (0, 1):
            run = runs[fractions[m - 2], seed]
            assert len(set(run.train)) == len(run.train) == m
            assert all(int(name[1:]) % 2 == 0 for name in run.train)
            assert run.reached == pytest.approx(m / 43)
            assert {c: sum(n[0] == c for n in run.train) for c in "ab"} == seats
            if m > 2:
                assert set(runs[fractions[m - 3], seed].train) < set(run.train)
        # one more seat goes to the largest quotient of Webster's method; 33 and 10 never tie
        seats["a" if a / (2 * seats["a"] + 1) > b / (2 * seats["b"] + 1) else "b"] += 1
    assert set(runs[1, 0].train) == set(runs[1, 1].train)
    assert set(runs[fractions[5], 0].train) != set(runs[fractions[5], 1].train)


def test_which_windows_are_taken_is_random_and_not_by_slide() -> None:
    data, runs = plan_windows(
        protocol(test="test", fractions=[0.3, 1]), 18, 6, seeds=tuple(range(300))
    )
    times = dict.fromkeys(data.splits["train"], 0)
    for seed in range(300):
        small = runs[0.3, seed].train
        assert len({data.groups[name] for name in small}) > 1
        # in the order of the data
        assert [*small] == [name for name in data.names if name in set(small)]
        for name in small:
            times[name] += 1
    # 5 of 18 and 2 of 6: four standard deviations of a binomial count are 31 and 33
    assert all(abs(times[n] - 300 * 5 / 18) < 31 for n in times if n[0] == "a")
    assert all(abs(times[n] - 300 * 2 / 6) < 33 for n in times if n[0] == "b")


def test_patches_are_taken_in_whole_slides_if_asked_and_cells_always() -> None:
    rules = protocol(test="test", fractions=[0.3, 1], fraction_of="groups")
    data, runs = plan_windows(rules, 18, 6)
    small = runs[0.3, 0].train
    whole = {data.groups[name] for name in small}
    assert {n for n in data.splits["train"] if data.groups[n] in whole} == set(small)
    assert len(whole) < len({data.groups[name] for name in data.splits["train"]})
    images = made({"train": 8, "test": 2})
    for of in ({}, {"fraction_of": "groups"}):
        run, _ = plan(protocol(test="test", fractions=[0.5, 1], **of), images, val_fraction=0)
        groups = {images.groups[name] for name in run.train}
        assert {n for n in images.splits["train"] if images.groups[n] in groups} == {*run.train}
    with pytest.raises(ConfigError, match="fraction_of: windows is for patches; of images of"):
        plan(protocol(test="test", fractions=[0.5], fraction_of="windows"), images)


def test_there_must_be_a_window_to_take() -> None:
    data, counts = windows(4, 4)
    only = replace(data, splits={"test": data.names})
    rules = protocol(test="test", fractions=[0.5])
    with pytest.raises(DataError, match="there are no training windows to take a fraction of"):
        plan_runs(rules, PatchData(root=Path("t")), only, counts, (0,), [""])


def test_too_few_groups_name_the_part() -> None:
    with pytest.raises(DataError, match=r"fold-1: .*1 group.*or data\.val_fraction=0"):
        plan(protocol(folds=2), made({"a": 4}))


# ---------------------------------------------------------------- running


@pytest.fixture(scope="module")
def cells(made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six annotated images in one folder, none in a split."""
    root = tmp_path_factory.mktemp("cells")
    samples = [s for part in ("train", "val", "test") for s in open_dataset(made_data / part)]
    write_folder(root, samples, ("blue", "brown"), 0.5)
    return root


def finished(output: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(output.rglob(SCORES_FILE))}


class KilledError(Exception):
    """Stands for a process that ends between two steps."""


def test_killed_and_resumed_gives_the_same_table(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from celltyper import loop

    config = tiny(cells, "data.val_fraction=0", "train.ema=0.5")
    rules = protocol(folds=2, fractions=[1, 0.3])
    whole = run_protocol(config, rules, tmp_path / "whole", device="cpu", progress=False)
    step, calls = loop.objective, {"n": 0}

    def dies_in_the_third_step_of_the_third_run(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls["n"] += 1
        if calls["n"] == 2 * config.train.steps + 3:
            raise KilledError
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "objective", dies_in_the_third_step_of_the_third_run)
    killed = tmp_path / "killed"
    with pytest.raises(KilledError):
        run_protocol(config, rules, killed, device="cpu", progress=False)
    monkeypatch.setattr(loop, "objective", step)

    before = finished(killed)
    assert len(before) == 2
    text = table_text(report_protocol(killed, resamples=20))
    assert "2 of 4 runs are not finished: fold-2/fraction-1, fold-2/fraction-0.3" in text

    run_protocol(config, rules, killed, device="cpu", progress=False, resume=True)
    assert {k: v for k, v in finished(killed).items() if k in before} == before
    for output in (whole, killed):
        report_protocol(output, resamples=20)
    assert (whole / "table.csv").read_bytes() == (killed / "table.csv").read_bytes()
    for path in ("fold-1/fraction-1", "fold-2/fraction-1", "fold-2/fraction-0.3"):
        ours, theirs = (load_file(o / path / "model.safetensors") for o in (whole, killed))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    # What was trained on is what was planned, in every run.
    for run in whole.glob("fold-*/*"):
        split = json.loads((run / "split.json").read_text())
        facts = json.loads((run / "run.json").read_text())["data"]
        assert facts.keys() == {"train", "test"}
        assert {part: facts[part]["names"] for part in facts} | {"val": []} == split
        assert not set(split["train"]) & set(split["test"])
        images, _ = read_scores(run / SCORES_FILE)
        assert [i.name for i in images] == split["test"]

    # Nothing else may be resumed there, and an ordinary run is no protocol.
    for changed, rule, said in (
        (config, protocol(folds=2, fractions=[1, 0.4]), "0.3.*then.*0.4.*now"),
        (tiny(cells, "data.val_fraction=0"), rules, "train.ema: 0.5 then, 0.0 now"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_protocol(changed, rule, killed, device="cpu", progress=False, resume=True)
    with pytest.raises(ConfigError, match="already holds a protocol; pass --resume"):
        run_protocol(config, rules, killed, device="cpu", progress=False)
    with pytest.raises(DataError, match="is a single run, not a protocol: celltyper eval"):
        protocol_table(killed / "fold-1" / "fraction-1")
    split = killed / "fold-1" / "fraction-1" / "split.json"
    split.write_text(split.read_text().replace("train1", "train9"))
    with pytest.raises(DataError, match="lists other images than the data give now"):
        run_protocol(config, rules, killed, device="cpu", progress=False, resume=True)


def test_features_are_computed_once_for_all_runs(
    tiny: Tiny, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLTYPER_CACHE", str(tmp_path / "cache"))
    compute, computed = FeatureCache.compute, []

    def counted(self: FeatureCache, image: Any) -> Any:
        computed.append(image.tobytes())
        return compute(self, image)

    monkeypatch.setattr(FeatureCache, "compute", counted)
    config = tiny(cells, "encoder.adapt=frozen", "encoder.cache=1", "train.steps=1")
    rules = protocol(folds=2, variants={"hv": {}, "distance": {"instances.method": "distance"}})
    output = run_protocol(config, rules, tmp_path / "out", device="cpu", progress=False)
    assert len(finished(output)) == 4
    assert len(computed) == len(set(computed)) == 6

    # Starting over leaves nothing of what was there.
    report_protocol(output, resamples=0)
    rules = protocol(folds=2)
    run_protocol(config, rules, output, device="cpu", progress=False, overwrite=True)
    assert len(computed) == 6
    assert [str(Path(p).relative_to(output)) for p in finished(output)] == [
        "fold-1/scores.npz",
        "fold-2/scores.npz",
    ]
    assert not any((output / name).exists() for name in FILES)


def test_wrong_input_is_refused_before_anything_is_written(
    tiny: Tiny, cells: Path, tmp_path: Path
) -> None:
    folds = protocol(folds=2)

    def variant(**values: Any) -> Protocol:
        return protocol(
            folds=2, variants={"a": {}, "b": {k.replace("_", ".", 1): v for k, v in values.items()}}
        )

    for overrides, rules, said in (
        ((), protocol(folds=7), "6 patients, slides or fields cannot be divided into 7 folds"),
        ((), protocol(test="test"), "no split 'test' to test on"),
        ((), protocol(leave_out="centre"), "no 'centre' to leave out"),
        ((), variant(decoder_name="unter"), "unknown decoder 'unter'"),
        ((), variant(instances_method="hw"), "unknown instance method 'hw'"),
        ((), variant(train_metric="f2"), "train.metric 'f2' is unknown"),
        (("data.val_fraction=0", "train.patience=2"), folds, "patience=2 needs validation images"),
        (
            ("encoder.adapt=frozen", "encoder.cache=8", "encoder.cache_gb=1e-6"),
            folds,
            "features of 2 images in 8 views take",
        ),
    ):
        with pytest.raises((ConfigError, DataError), match=said):
            run_protocol(
                tiny(cells, *overrides), rules, tmp_path / "out", device="cpu", progress=False
            )
    assert not (tmp_path / "out").exists()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        run_protocol(tiny(cells), folds, tmp_path, device="cpu", progress=False, overwrite=True)


# ---------------------------------------------------------------- figures


def scored(seed: int, group: str, right: float = 0.7) -> ImageScores:
    """Random squares, annotated and shifted, retyped, dropped."""
    rng = np.random.default_rng(seed)
    reference, predicted = np.zeros((2, 40, 300), np.int32)
    types, guesses = [0], []
    for row in range(0, 40, 10):
        for col in range(0, 300, 10):
            if rng.random() < 0.5:
                types.append(int(rng.integers(1, 3)))
                reference[row : row + 7, col : col + 7] = len(types) - 1
                if rng.random() < 0.8:
                    guesses.append(types[-1] if rng.random() < right else 3 - types[-1])
                    r, c = row + rng.integers(0, 4), col + rng.integers(0, 4)
                    predicted[r : r + 6, c : c + 6] = len(guesses)
    image = np.zeros((40, 300, 3), np.uint8)
    sample = Sample(image, reference, np.array(types, np.uint8), f"image of {group}", group, 3.0)
    pixels = np.array([0, *guesses])[predicted]
    probabilities = np.full((3, 40, 300), 0.1, np.float32)
    np.put_along_axis(probabilities, pixels[None], 0.8, axis=0)
    sure = np.full((len(guesses), 3), 0.1, np.float32)
    sure[np.arange(len(guesses)), guesses] = 0.8
    return score_image(
        Prediction(predicted, probabilities, sure, CLASSES, 3.0, sample.name), sample
    )


def write_runs(output: Path, runs: list[tuple[dict[str, Any], list[ImageScores] | None]]) -> Path:
    """Folder of a protocol as if it had been run; without scores, a run is not finished."""
    output.mkdir()
    entries = []
    for number, (about, images) in enumerate(runs):
        entry = {"variant": "", "part": "fold-1", "domain": "", "fraction": 1.0, "reached": 1.0}
        entry |= {"seed": 0, "path": f"run{number}"} | about
        entries.append(entry)
        if images is not None:
            (output / entry["path"]).mkdir()
            write_scores(output / entry["path"] / SCORES_FILE, images, CLASSES)
    variants = {name: {} for name in dict.fromkeys(e["variant"] for e in entries)}
    about = {"protocol": {"folds": 2}, "variants": variants, "classes": CLASSES, "runs": entries}
    about |= {"data": {"name": "made", "images": 4, "notice": ""}, "colors": []}
    (output / PROTOCOL_FILE).write_text(json.dumps(about))
    return output


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    nothing = Prediction(
        np.zeros((8, 8), np.int32),
        np.full((3, 8, 8), 1 / 3, np.float32),
        np.zeros((0, 3), np.float32),
        CLASSES,
        name="e",
    )
    empty = Sample(np.zeros((8, 8, 3), np.uint8), nothing.labels, np.zeros(1, np.uint8), "e", "g")
    blank = replace(score_image(nothing, empty), unannotated=(2,))
    images = [scored(0, "p"), blank, scored(1, "q")]
    write_scores(tmp_path / "s.npz", images, CLASSES)
    back, classes = read_scores(tmp_path / "s.npz")
    assert classes == CLASSES
    assert len(back) == 3
    for kept, image in zip(back, images, strict=True):
        for field in fields(ImageScores):
            np.testing.assert_equal(getattr(kept, field.name), getattr(image, field.name))
        assert kept.true.dtype == image.true.dtype
    (tmp_path / "s.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:200])
    with pytest.raises(DataError, match="damaged; delete it and go on with --resume"):
        read_scores(tmp_path / "s.npz")


def test_figures_are_means_over_runs_and_intervals_over_groups(tmp_path: Path) -> None:
    """With eight groups and more, the interval is that of an evaluation of all test images."""
    folds = [[scored(10 * f + i, f"p{f}{i}") for i in range(5)] for f in range(2)]
    runs = [({"part": f"fold-{f + 1}"}, images) for f, images in enumerate(folds)]
    table = protocol_table(write_runs(tmp_path / "out", runs), resamples=200)
    (row,) = table.rows
    assert (row.runs, row.planned, table.clusters) == (2, 2, "10 patients or fields")
    pooled = summarise([*folds[0], *folds[1]], CLASSES, resamples=200)
    alone = [summarise(images, CLASSES, resamples=0) for images in folds]
    for name, figure in row.scores.items():
        values = [s.scores[name].value for s in alone]
        assert figure.mean == pytest.approx(np.mean(values))
        assert figure.deviation == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))
        expected = pooled.scores[name]
        found = figure.pooled, figure.low, figure.high
        assert found == pytest.approx((expected.value, expected.low, expected.high)), name
    for name, scores in row.per_class.items():
        for key, figure in scores.items():
            expected = pooled.per_class[name][key]
            found = figure.pooled, figure.low, figure.high
            assert found == pytest.approx((expected.value, expected.low, expected.high)), key
    assert table.rules["detection_f1"] == pooled.rules["detection_f1"]


def test_all_seeds_of_an_image_are_drawn_together(tmp_path: Path) -> None:
    """Twice the same prediction says nothing new: the interval stays, by groups and by blocks."""
    for groups in (9, 2):
        images = [scored(i, f"p{i}") for i in range(groups)]
        runs = [({"seed": seed, "path": f"seed-{seed}"}, images) for seed in (0, 1)]
        once, twice = (
            protocol_table(write_runs(tmp_path / f"{groups} {len(part)}", part), resamples=100)
            for part in (runs[:1], runs)
        )
        for name, figure in twice.rows[0].scores.items():
            one = once.rows[0].scores[name]
            found = figure.mean, figure.pooled, figure.low, figure.high
            assert found == pytest.approx((one.mean, one.pooled, one.low, one.high)), name
            assert figure.high > figure.low
            assert figure.deviation == 0
            assert np.isnan(one.deviation)
        assert ("blocks" in twice.clusters) == (groups == 2)


def test_difference_of_two_variants_is_paired(tmp_path: Path) -> None:
    """Detection F1 by hand: 2 tp / (2 tp + fp + fn) of drawn groups, the same for both."""
    worse, better = (
        [scored(100 * v + i, f"p{i}", right) for i in range(9)] for v, right in ((0, 0.2), (1, 1.0))
    )
    half = [scored(999, "p0")]
    runs = [
        ({"variant": "a"}, worse),
        ({"variant": "a", "seed": 1}, half),  # b has not finished this one: left out of the pair
        ({"variant": "b"}, better),
        ({"variant": "b", "seed": 1}, None),
    ]
    table = protocol_table(write_runs(tmp_path / "out", runs), resamples=300)
    (difference,) = table.differences
    assert (difference.variant, difference.first, difference.runs) == ("b", "a", 1)
    weights = np.random.default_rng(0).multinomial(9, np.full(9, 1 / 9), size=300)

    def f1(images: list[ImageScores], drawn: np.ndarray) -> np.ndarray:
        both = np.array([2 * len(i.near.ref) for i in images])
        cells = np.array([len(i.true) + len(i.guess) for i in images])
        return (drawn @ both) / (drawn @ cells)

    drawn = f1(better, weights) - f1(worse, weights)
    found = difference.scores["detection_f1"]
    value = float(f1(better, np.ones(9)) - f1(worse, np.ones(9)))
    assert found.difference == pytest.approx(value)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    assert difference.scores["typed_f1"].low > 0
    assert table.missing == ["run3"]


def test_mean_over_domains_weighs_them_equally(tmp_path: Path) -> None:
    """Domain A has one image, B has three; the mean is of the two rows."""
    domains = {"A": [scored(0, "a0", 0.9)], "B": [scored(i, f"b{i}", 0.5) for i in (1, 2, 3)]}
    runs = [({"part": f"centre-{d}", "domain": d}, images) for d, images in domains.items()]
    table = protocol_table(write_runs(tmp_path / "out", runs), resamples=50)
    assert [row.domain for row in table.rows] == ["A", "B", "mean"]
    alone = [summarise(images, CLASSES, resamples=0).scores for images in domains.values()]
    for name, figure in table.rows[2].scores.items():
        values = [scores[name].value for scores in alone]
        assert figure.mean == figure.pooled == pytest.approx(np.mean(values))
        assert figure.deviation == pytest.approx(np.std(values, ddof=1))
    # Without a domain there is no mean over all of them.
    part = protocol_table(write_runs(tmp_path / "part", [runs[0], (runs[1][0], None)]), resamples=0)
    assert [row.domain for row in part.rows] == ["A"]


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of 1 runs is finished yet"):
        protocol_table(write_runs(tmp_path / "out", [({}, None)]))
    with pytest.raises(DataError, match="holds no protocol: celltyper train --protocol writes one"):
        protocol_table(tmp_path)
    (tmp_path / "out" / PROTOCOL_FILE).write_text("{}")
    with pytest.raises(DataError, match="damaged, or of another version"):
        protocol_table(tmp_path / "out")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants, two fractions and two centres."""
    runs = []
    for v, variant in enumerate(("unetr", "a<b>")):
        for f, fraction in enumerate((1.0, 0.1)):
            for d, domain in enumerate(("a centre | of a long name", "B")):
                images = [scored(100 * v + 10 * f + d + i, f"{d}{i}") for i in range(4)]
                about = {"variant": variant, "fraction": fraction, "reached": fraction + 0.02 * f}
                runs.append((about | {"part": f"centre-{d}", "domain": domain}, images))
    output = write_runs(tmp_path_factory.mktemp("reported") / "out", runs)
    report_protocol(output, resamples=50)
    return output


def test_tables_on_disk_hold_the_figures(reported: Path) -> None:
    table = protocol_table(reported, resamples=50)
    rows = list(csv.DictReader(io.StringIO((reported / "table.csv").read_text())))
    assert len(rows) == len(table.rows) == 2 * 2 * 3
    for written, row in zip(rows, table.rows, strict=True):
        assert (written["variant"], float(written["fraction"])) == (row.variant, row.fraction)
        assert float(written["macro_f1_mean"]) == pytest.approx(row.scores["macro_f1"].mean, 1e-5)
        assert float(written["aji_high"]) == pytest.approx(row.scores["aji"].high, 1e-5)
    assert {r["reached"] for r in rows} == {"1", "0.12"}
    classes = list(csv.DictReader(io.StringIO((reported / "classes.csv").read_text())))
    assert len(classes) == 2 * len(rows)
    assert {r["class"] for r in classes} == {"a", "b"}
    differences = list(csv.DictReader(io.StringIO((reported / "differences.csv").read_text())))
    assert [(d["variant"], d["less"]) for d in differences] == [("a<b>", "unetr")] * 6
    lines = (reported / "table.md").read_text().splitlines()
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 9 for line in lines if line[:1] == "|")


def test_table_fits_a_terminal(reported: Path) -> None:
    text = table_text(protocol_table(reported, resamples=50))
    assert max(map(len, text.splitlines())) <= 80
    assert "Interval: 95 %" in text
    assert "a<b> less unetr" in text


def test_page_needs_nothing_beside_it(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    assert "default-src 'none'" in page
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in page
    assert "a<b>" not in page
    assert "a&lt;b&gt;" in page
    assert page.count("<polyline") == 3 * 2
    assert "Differences to the first variant" in page
    assert re.search(
        r"\nbPQ: panoptic quality[^\n]*\nmPQ: ", page
    )  # names as they are, a line each
    row = next(r for r in protocol_table(reported, resamples=0).rows if r.domain == "B")
    figure = row.scores["macro_f1"]
    assert f"{figure.mean:.3f}" in page


# ---------------------------------------------------------------- the command


def test_commands(tiny: Tiny, cells: Path, tmp_path: Path, celltyper_command: Run) -> None:
    from celltyper.config import dump_config

    recipe, rules = tmp_path / "c.yaml", tmp_path / "p.yaml"
    recipe.write_text(dump_config(tiny(cells, "train.steps=1", "data.val_fraction=0")))
    rules.write_text("folds: 2")
    out = tmp_path / "out"
    words = ("train", recipe, "-o", out, "--protocol", rules, "--device", "cpu")
    code, said, err = celltyper_command(*words)
    assert (code, said) == (0, f"protocol: {out} (celltyper report {out} makes the table)\n")
    assert "run 2/2: fold-2" in err
    code, said, _ = celltyper_command("report", out, "--resamples", 20)
    assert code == 0
    assert said.splitlines()[0].split() == [
        "macro",
        "F1",
        "F1",
        "det.",
        "F_c",
        "mean",
        "bPQ",
        "mPQ",
        "AJI",
    ]
    assert said.endswith(f"report: {out / 'report.html'}\n")
    assert {p.name for p in out.iterdir()} >= {"table.csv", "classes.csv", "table.md"}
    assert celltyper_command("report", out, "--resamples", 0, "-q") == (0, "", "")
    code, _, err = celltyper_command("report", out / "fold-1")
    assert (code, err.count("\n")) == (2, 1)
    assert "is a single run, not a protocol" in err
    code, _, err = celltyper_command(*words)
    assert (code, err.count("\n")) == (2, 1)
