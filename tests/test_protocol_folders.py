"""Parts that train on one domain or hold a share out; and the models that a folder stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from celltyper.config import Data
from celltyper.datasets import Dataset
from celltyper.datasets.merging import UNSTATED
from celltyper.errors import CheckpointError, DataError
from celltyper.library.files import model_folders
from celltyper.protocols.plan import PlannedRun, plan_runs
from celltyper.protocols.protocol import Protocol

OF = {"breast": 6, "colon": 4, "skin": 2, UNSTATED: 2}
"""Images of every domain, two of a patient; the last two are of an unknown one."""


def unread(name: str) -> NoReturn:
    raise AssertionError(name)


def made(**more: Any) -> Dataset:
    names = tuple(f"{domain}{i}" for domain, n in OF.items() for i in range(n))
    groups = {name: f"{name[:-1]}-patient{int(name[-1]) // 2}" for name in names}
    stated = {name: name[:-1] for name in names}
    facts = {"splits": {}, "domains": {"organ": stated}} | more
    return Dataset("t", Path("t"), ("a", "b"), None, names, groups, unread, **facts)


def plan(data: Dataset, seed: int = 0, val_fraction: float = 0.0, **rules: Any) -> list[PlannedRun]:
    counts = {name: np.array([3, 1]) for name in data.names}
    settings = Data(root=Path("t"), val_fraction=val_fraction)
    return plan_runs(Protocol.model_validate(rules), settings, data, counts, (seed,), [""])


def named(data: Dataset, *domains: str) -> set[str]:
    return {name for name in data.names if name[:-1] in domains}


# ---------------------------------------------------------------- train_on


def test_every_domain_trains_and_all_others_test() -> None:
    data = made()
    runs = {run.path: run for run in plan(data, train_on="organ")}
    assert [*runs] == ["trained-on-breast", "trained-on-colon", "trained-on-skin"]
    for domain in ("breast", "colon", "skin"):
        run = runs[f"trained-on-{domain}"]
        assert (run.domain, run.val) == (domain, ())
        assert set(run.train) == named(data, domain)
        others = {"breast", "colon", "skin"} - {domain}
        # images of no stated domain could be of the one that trains
        assert set(run.test) == named(data, *others)


def test_train_on_is_leave_out_turned_round() -> None:
    data = made()
    for on, out in zip(plan(data, train_on="organ"), plan(data, leave_out="organ"), strict=True):
        assert (on.train, on.test) == (out.test, out.train)


def test_validation_of_a_domain_is_its_own() -> None:
    data = made()
    (run,) = plan(data, val_fraction=1 / 3, train_on="organ", domains=["breast"])
    assert len(run.val) == 2
    assert set(run.train) | set(run.val) == named(data, "breast")
    assert set(run.test) == named(data, "colon", "skin")


def test_a_domain_that_cannot_train_is_named() -> None:
    said = r"no organ 'liver' to train on \(there are: breast, colon, skin\)"
    with pytest.raises(DataError, match=said):
        plan(made(), train_on="organ", domains=["colon", "liver"])
    with pytest.raises(DataError, match=r"samples state no 'scanner' .*\(stated: organ\)"):
        plan(made(), train_on="scanner")
    with pytest.raises(DataError, match=r"trained-on-skin: validation images cannot be held out"):
        plan(made(), val_fraction=0.5, train_on="organ", domains=["skin"])


def test_a_patient_in_two_domains_cannot_be_on_both_sides() -> None:
    data = made()
    groups = {**data.groups, "skin0": data.groups["colon0"]}
    mixed = Dataset(
        "t", Path("t"), data.classes, None, data.names, groups, unread, domains=data.domains
    )
    with pytest.raises(DataError, match=r"group 'colon-patient0' .* is of two domains"):
        plan(mixed, train_on="organ")


# ---------------------------------------------------------------- hold_out


def test_a_share_is_held_out_in_whole_groups_anew_for_every_seed() -> None:
    data = made()
    held = set()
    for seed in range(6):
        (run,) = plan(data, seed, hold_out=0.3)
        assert (run.path, run.part, run.domain, run.val) == ("held-out", "held-out", "", ())
        assert sorted(run.train + run.test) == sorted(data.names)
        # 2 of 7 patients are nearest to .3
        assert len({data.groups[name] for name in run.test}) == 2
        assert not {data.groups[n] for n in run.test} & {data.groups[n] for n in run.train}
        assert run == plan(data, seed, hold_out=0.3)[0]
        held.add(run.test)
    assert len(held) > 1


def test_fractions_and_validation_are_of_what_is_not_held_out() -> None:
    data = made()
    small, whole = plan(data, val_fraction=0.2, hold_out=0.3, fractions=[0.5, 1])
    assert (small.test, small.val) == (whole.test, whole.val)
    assert len(whole.val) == 2
    assert set(small.train) < set(whole.train)
    assert sorted(whole.train + whole.val + whole.test) == sorted(data.names)
    assert [small.path, whole.path] == ["held-out/fraction-0.5", "held-out/fraction-1"]


def test_a_split_for_tests_is_not_held_out_of() -> None:
    names = made().names
    data = made(splits={"train": names[:10], "test": names[10:]})
    (run,) = plan(data, hold_out=0.4)
    assert sorted(run.train + run.test) == sorted(names[:10])
    assert len(run.test) == 4


def test_one_patient_cannot_be_held_out() -> None:
    data = made().subset(["colon0", "colon1"])
    with pytest.raises(DataError, match="1 group, which cannot be split"):
        plan(data, hold_out=0.5)


# ---------------------------------------------------------------- models of a folder

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Folder of a protocol: fractions of its runs by path; of those in `finished` are models."""

    def write(entries: dict[str, float], finished: str | None = None) -> Path:
        runs = []
        for path, fraction in entries.items():
            variant = path.split("/")[0] if "/" in path else ""
            runs.append({"path": path, "variant": variant, "fraction": fraction})
            (tmp_path / path).mkdir(parents=True)
            if finished is None or path in finished.split():
                (tmp_path / path / "model.safetensors").write_bytes(b"")
        (tmp_path / "protocol.json").write_text(json.dumps({"runs": runs}))
        return tmp_path

    return write


def test_a_run_stands_for_itself(tmp_path: Path, folder: Folder) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert model_folders(tmp_path) == [tmp_path]
    assert model_folders(str(file)) == [file]
    file.unlink()
    path = folder({"fold-1": 1, "fold-2": 1})
    assert model_folders(path / "fold-2") == [path / "fold-2"]


def test_a_protocol_stands_for_its_finished_runs_on_all_data(folder: Folder) -> None:
    path = folder({f"fold-{i}/fraction-{f}": f for i in (2, 1, 3) for f in (0.1, 1)})
    (path / "fold-3/fraction-1/model.safetensors").unlink()
    # what lies there and is no run of the protocol is no model of it
    (path / "other").mkdir()
    (path / "other/model.safetensors").write_bytes(b"")
    plan = json.loads((path / "protocol.json").read_text())
    for entry in plan["runs"]:
        entry["variant"] = ""
    (path / "protocol.json").write_text(json.dumps(plan))
    assert model_folders(path) == [path / "fold-2/fraction-1", path / "fold-1/fraction-1"]
    assert model_folders(path / "fold-1") == [path / "fold-1/fraction-1"]


def test_of_several_variants_one_is_to_be_named(folder: Folder) -> None:
    path = folder({f"{v}/fold-{i}": 1 for v in ("votes", "labels") for i in (1, 2)})
    with pytest.raises(CheckpointError) as caught:
        model_folders(path)
    assert str(caught.value) == f"{path} compares labels, votes: give {path / 'labels'}"
    assert model_folders(path / "labels") == [path / "labels/fold-1", path / "labels/fold-2"]


def test_a_folder_without_models_says_what_to_do(tmp_path: Path, folder: Folder) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=f"no model at {path}: give a folder that 'cellt"):
            model_folders(path)
    path = folder({"fold-1": 1, "fold-2": 1}, finished="")
    with pytest.raises(CheckpointError, match="holds no finished run: go on with train --resume"):
        model_folders(path)


def test_small_fractions_alone_are_no_model(folder: Folder) -> None:
    path = folder({"fraction-0.1": 0.1, "fraction-0.5": 0.5})
    with pytest.raises(CheckpointError, match="holds no finished run"):
        model_folders(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"runs": [{"path": "a"}]}', '{"runs": 1}', '{"run": []}']
)
def test_a_damaged_plan_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "protocol.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"protocol\.json is damaged: "):
        model_folders(tmp_path)
