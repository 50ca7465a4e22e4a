"""``celltyper eval`` with a model of patches: scores, windows of training, reports."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn import metrics

from celltyper.classification.config import PatchConfig
from celltyper.classification.training import train_patches
from celltyper.config import parse_config
from celltyper.protocols import load_protocol, run_patch_protocol

Run = Callable[..., Any]

SIDE, SLIDES, EACH = 40, 12, 4
MPP = 0.25
RECIPE = {
    "task": "patches",
    "encoder": {"name": "vit_small_patch14_dinov2", "weights": "twin"},
    "data": {"positive": "bar", "mpp": MPP, "size": 32, "val_fraction": 0.34},
    "view": {"input": 28, "pool": "cls+mean"},
    "head": {"options": {"strengths": [1, 0.1, 0.01]}},
}


class Made(NamedTuple):
    """Patches of two domains with votes, a run on some, a protocol, and patches of others."""

    root: Path
    run: Path
    folds: Path
    outside: Path


def picture(rng: np.random.Generator, bar: bool) -> np.ndarray:
    # faint enough that some are mistaken
    image = rng.normal(200, 50, (SIDE, SIDE, 3))
    dark = rng.uniform(5, 40)
    if bar:
        image[16:24, 6:34] -= dark
    else:
        image[12:28, 12:28] -= dark
    return image.clip(0, 255).astype(np.uint8)


def write_patches(root: Path, seed: int, slide: str) -> Path:
    """Class folders with a table: three experts, one of them alone on the last of a slide."""
    rng, rows = np.random.default_rng(seed), []
    for s in range(SLIDES):
        for i in range(EACH):
            bar = (i + s) % 3 == 0
            file = root / ("bar" if bar else "box") / f"{slide}{s}-{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(rng, bar)).save(file)
            votes: list[object] = [bar] * 3
            if i == 1:
                votes[2] = not bar
            if i == EACH - 1:
                votes[1:] = ["", ""]
            rows.append([file.name, f"{slide}{s}", ("breast", "colon")[s % 2], *votes])
    with (root / "made.csv").open("w", newline="") as stream:
        out = csv.writer(stream)
        out.writerow(["patch", "slide", "tumortype", *(f"expert{n}_bar" for n in (1, 2, 3))])
        out.writerows(rows)
    return root


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLTYPER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    root = write_patches(folder / "patches", 0, "s")
    outside = write_patches(folder / "outside", 1, "t")
    config = parse_config(RECIPE, [f"data.root={root}"], PatchConfig)
    run = train_patches(config, folder / "run", device="cpu", progress=False)
    (folder / "folds.yaml").write_text(yaml.safe_dump({"folds": 3}))
    protocol = load_protocol(str(folder / "folds.yaml"))
    folds = run_patch_protocol(config, protocol, folder / "cv", device="cpu", progress=False)
    return Made(root, run, folds, outside)


class Scored(NamedTuple):
    folder: Path
    out: str
    err: str

    @property
    def metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return found

    def rows(self) -> list[dict[str, str]]:
        with (self.folder / "patches.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def score(made: Made, tmp_path: Path, celltyper_command: Run) -> Callable[..., Scored]:
    def start(run: Path, data: Path, *words: object, to: str = "out") -> Scored:
        more = () if "--resamples" in words else ("--resamples", 50)
        code, out, err = celltyper_command(
            "eval", run, data, "-o", tmp_path / to, "--device", "cpu", *words, *more
        )
        assert code == 0, err
        return Scored(tmp_path / to, out, err)

    return start


@pytest.fixture
def refused(tmp_path: Path, celltyper_command: Run) -> Callable[..., str]:
    """Message of a command that must fail with one line and write nothing."""

    def start(run: Path, data: Path, *words: object) -> str:
        to = tmp_path / "refused"
        code, out, err = celltyper_command("eval", run, data, "-o", to, *words)
        assert (code, out) == (2, "")
        assert not to.exists()
        return str(err.splitlines()[-1])

    return start


def by_hand(rows: list[dict[str, str]], p: np.ndarray, threshold: float) -> dict[str, float]:
    truth = np.array([row["label"] == "bar" for row in rows])
    called = p >= threshold
    return {
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, called),
        "auroc": metrics.roc_auc_score(truth, p),
        "auprc": metrics.average_precision_score(truth, p),
        "f1": metrics.f1_score(truth, called),
        "brier": float(np.mean((p - truth) ** 2)),
    }


def column(rows: list[dict[str, str]], name: str = "p_bar") -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def values(scores: dict[str, Any]) -> dict[str, float]:
    return {name: scores[name]["value"] for name in by_hand_names}


by_hand_names = ("balanced_accuracy", "auroc", "auprc", "f1", "brier")


# ---------------------------------------------------------------- scores


def test_scores_of_a_run_are_those_of_its_table(score: Run, made: Made) -> None:
    done = score(made.run, made.outside, "--mpp", MPP)
    found, rows = done.metrics, done.rows()
    threshold = json.loads((made.run / "run.json").read_text())["threshold"]
    assert threshold != 0.5  # fixed on validation windows, not on these
    assert (found["threshold"], found["positive"]) == (threshold, "bar")
    assert values(found["scores"]) == pytest.approx(by_hand(rows, column(rows), threshold))
    assert {row["name"] for row in rows} == {
        f"{k}/{p.name}" for k in ("bar", "box") for p in (made.outside / k).iterdir()
    }
    assert all(row["name"].startswith(row["label"] + "/") for row in rows)
    called = [row["type"] for row in rows]
    assert called == ["bar" if p >= threshold else "box" for p in column(rows)]
    confusion = metrics.confusion_matrix([row["label"] for row in rows], called)
    assert found["confusion"] == confusion.tolist()
    assert confusion[0, 1] + confusion[1, 0] > 0  # so that there are mistakes to show
    for name, one in found["scores"].items():
        # few patches to a bin: resamples have a larger calibration error than the whole
        assert one["low"] <= one["value"] <= one["high"] or name == "ece"
        assert one["rule"]
    assert found["data"]["groups"] == SLIDES
    assert found["intervals"] == f"95 %, bootstrap over {SLIDES} slides or patients"
    assert (found["single_models"], found["seen_in_training"], found["failed"]) == ({}, 0, [])


def test_scores_by_agreement_and_domain_are_those_of_the_parts(score: Run, made: Made) -> None:
    done = score(made.run, made.outside, "--mpp", MPP)
    found, rows = done.metrics, done.rows()
    parts = {
        "agreement": {
            "unanimous": [r for r in rows if r["experts"] == "3" and r["votes_bar"] in "01"],
            "majority": [r for r in rows if r["experts"] == "3" and r["votes_bar"] not in "01"],
        },
        "domains": {d: [r for r in rows if r["domain"] == d] for d in ("breast", "colon")},
    }
    assert len(parts["agreement"]["unanimous"]) == 2 * SLIDES
    assert len(parts["agreement"]["majority"]) == SLIDES
    for kind, of_kind in parts.items():
        assert found[kind].keys() == of_kind.keys()
        for name, part in of_kind.items():
            assert found[kind][name]["patches"] == len(part)
            hand = by_hand(part, column(part), found["threshold"])
            assert values(found[kind][name]["scores"]) == pytest.approx(hand)


def test_folds_are_scored_together_and_each_alone(
    score: Run, made: Made, tmp_path: Path, celltyper_command: Run
) -> None:
    done = score(made.folds, made.outside, "--mpp", MPP)
    found, rows = done.metrics, done.rows()
    each = []
    for fold in sorted(made.folds.glob("fold-*")):
        to = tmp_path / fold.name
        words = ("infer", made.outside, "-m", fold, "-o", to, "--mpp", MPP, "-q")
        assert celltyper_command(*words)[0] == 0
        with (to / "patches.csv").open(newline="") as file:
            typed = {row["name"]: float(row["p_bar"]) for row in csv.DictReader(file)}
        each.append(np.array([typed[row["name"]] for row in rows]))
    thresholds = [
        json.loads((fold / "run.json").read_text())["threshold"]
        for fold in sorted(made.folds.glob("fold-*"))
    ]
    np.testing.assert_allclose(column(rows), np.mean(each, axis=0), atol=1e-9)
    together = by_hand(rows, np.mean(each, axis=0), float(np.mean(thresholds)))
    assert values(found["scores"]) == pytest.approx(together)
    alone = [by_hand(rows, p, t) for p, t in zip(each, thresholds, strict=True)]
    for name in by_hand_names:
        spread = found["single_models"][name]
        of_folds = [one[name] for one in alone]
        assert spread["values"] == pytest.approx(of_folds)
        assert spread["mean"] == pytest.approx(np.mean(of_folds))
        assert spread["deviation"] == pytest.approx(np.std(of_folds, ddof=1))
    assert "3 models, each alone: mean ± deviation" in done.out
    page = (done.folder / "report.html").read_text()
    assert page.count("fold-1") >= 1
    assert "Single models and their ensemble" in page


def test_terminal_and_page_say_the_same(score: Run, made: Made) -> None:
    done = score(made.run, made.outside, "--mpp", MPP)
    lines = done.out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1] == f"report: {done.folder / 'report.html'}"
    shown = {line[:14].strip(): line[16:21] for line in lines if re.match(r"\S.{15}0\.", line)}
    found = done.metrics["scores"]
    assert shown["AUROC"] == f"{found['auroc']['value']:.3f}"
    assert shown["balanced acc."] == f"{found['balanced_accuracy']['value']:.3f}"
    assert len(shown) == len(found) == 12
    text = " ".join(done.out.split())
    assert f"positive: bar, called from {done.metrics['threshold']:.3g} on" in text
    page = (done.folder / "report.html").read_text()
    for score_ in found.values():
        assert f"{score_['value']:.3f}" in page
    (bars, boxes) = done.metrics["confusion"]
    # every mistake has its picture: fewer than a dozen of each kind
    wrong = min(bars[1], 12) + min(boxes[0], 12)
    assert page.count("<figure><img src=") == wrong
    assert ".gallery {" in page
    for heading in ("By domain", "Calibration", "Confusion", "By agreement of the experts"):
        assert f">{heading}</h2>" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


# ---------------------------------------------------------------- windows of training


def test_windows_of_training_are_refused(
    score: Run, refused: Run, made: Made, tmp_path: Path
) -> None:
    message = refused(made.run, made.root)
    trained = json.loads((made.run / "run.json").read_text())["data"]["train"]["patches"]
    assert f"{trained} of 48 windows of {made.root} trained {made.run}" in message
    assert "--split" in message
    assert "--allow-seen" in message
    # of a protocol, what any of its models was trained on
    folds = [json.loads(f.read_text()) for f in made.folds.glob("fold-*/run.json")]
    union = {name for facts in folds for name in facts["data"]["train"]["names"]}
    assert len(union) > max(facts["data"]["train"]["patches"] for facts in folds)
    assert f"{len(union)} of 48 windows" in refused(made.folds, made.root)
    done = score(made.run, made.root, "--allow-seen")
    assert done.metrics["seen_in_training"] == trained
    assert "this is no test" in done.out
    assert "this is no test" in (done.folder / "report.html").read_text()


def test_parts_of_the_data_of_training_need_no_resolution(
    score: Run, refused: Run, made: Made
) -> None:
    val = score(made.run, made.root, "--split", "val")
    names = json.loads((made.run / "run.json").read_text())["data"]["val"]["names"]
    assert sorted(row["name"] for row in val.rows()) == sorted(names)
    fold = made.folds / "fold-1"
    test = score(fold, made.root, "--split", "test", to="test")
    kept = json.loads((fold / "split.json").read_text())["test"]
    assert sorted(row["name"] for row in test.rows()) == sorted(kept)
    # what the protocol itself kept of its test windows
    with np.load(fold / "scores.npz", allow_pickle=False) as archive:
        place = {name: i for i, name in enumerate(archive["names"].tolist())}
        wanted = archive["probabilities"][[place[row["name"]] for row in test.rows()], 0]
    np.testing.assert_allclose(column(test.rows()), wanted, atol=1e-6)
    assert "no split 'other' (its splits: none)" in refused(made.run, made.root, "--split", "other")


def test_windows_of_training_are_known_by_slide_and_pixels_elsewhere(
    refused: Run, score: Run, made: Made, tmp_path: Path
) -> None:
    facts = json.loads((made.run / "run.json").read_text())["data"]["train"]
    copy = shutil.copytree(made.root, tmp_path / "copy")
    for folder in ("bar", "box"):
        for file in (copy / folder).iterdir():
            image = np.array(Image.open(file))
            image[0, 0] ^= 1
            Image.fromarray(image).save(file)
    # other pixels, the same slides
    assert f"{facts['patches']} of 48 windows" in refused(made.run, copy, "--mpp", MPP)
    # other slides, the same pixels under other names, in another format
    (tmp_path / "new" / "bar").mkdir(parents=True)
    (tmp_path / "new" / "box").mkdir()
    chosen = facts["names"][:3] + facts["names"][-2:]
    for i, name in enumerate(chosen):
        image = Image.open(made.root / name)
        image.save(tmp_path / "new" / name.split("/")[0] / f"new{i}.tif")
    for name in ("t0-0.png", "t3-0.png"):
        shutil.copy(made.outside / "bar" / name, tmp_path / "new" / "bar")
    message = refused(made.run, tmp_path / "new", "--mpp", MPP)
    assert "5 of 7 windows" in message


# ---------------------------------------------------------------- comparison


def test_paired_test_against_another_evaluation(
    score: Run, refused: Run, made: Made, tmp_path: Path
) -> None:
    words = ("--mpp", MPP)
    one = score(made.run, made.outside, *words, to="one")
    two = score(
        made.run, made.outside, *words, "--symmetries", 8, "--against", one.folder, to="two"
    )
    for name in ("balanced_accuracy", "auroc", "f1"):
        found = two.metrics["differences"][name]
        first, second = (e.metrics["scores"][name]["value"] for e in (two, one))
        assert found["difference"] == pytest.approx(first - second, abs=1e-9)
        assert found["low"] <= found["difference"] <= found["high"]
    assert "difference" in two.out
    assert two.metrics["against"] == str(one.folder)
    same = score(made.run, made.outside, *words, "--against", one.folder, to="same")
    for difference in same.metrics["differences"].values():
        assert (difference["difference"], difference["p_value"]) == (0, 1)
    fold = score(made.folds / "fold-1", made.root, "--split", "test", to="fold")
    assert "scored different patches" in refused(
        made.run, made.outside, *words, "--against", fold.folder
    )
    assert "holds no evaluation of patches" in refused(
        made.run, made.outside, *words, "--against", tmp_path
    )


# ---------------------------------------------------------------- bad input


def test_classes_of_the_data_must_be_those_of_the_model(
    refused: Run, score: Run, made: Made, tmp_path: Path
) -> None:
    other = shutil.copytree(made.outside, tmp_path / "other")
    (other / "bar").rename(other / "Bar")
    message = refused(made.run, other, "--mpp", MPP)
    assert "no folder of class 'bar'; did you mean 'Bar'?" in message
    # a table that names the classes in another order is the same data
    rows = ["filename,label,slide"]
    for kind in ("box", "bar"):
        rows += [f"{p},{kind},{p.stem.split('-')[0]}" for p in (made.outside / kind).iterdir()]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    of_table = score(made.run, tmp_path / "list.csv", "--mpp", MPP, to="table")
    of_folders = score(made.run, made.outside, "--mpp", MPP, to="folders")
    assert values(of_table.metrics["scores"]) == pytest.approx(values(of_folders.metrics["scores"]))
    assert of_table.metrics["agreement"] == {}


def test_unlabelled_unreadable_and_unresolved(
    refused: Run, score: Run, made: Made, tmp_path: Path
) -> None:
    assert "pass --mpp" in refused(made.run, made.outside)
    broken = shutil.copytree(made.outside, tmp_path / "broken")
    file = broken / "box" / "t3-2.png"
    file.write_bytes(file.read_bytes()[:300])
    message = refused(made.run, broken, "--mpp", MPP)
    assert str(file) in message
    assert "1 of 48" in message
    done = score(made.run, broken, "--mpp", MPP, "--skip-bad")
    assert [entry["name"] for entry in done.metrics["failed"]] == ["box/t3-2.png"]
    assert len(done.rows()) == 47
    assert "note: left out, for they could not be read: 'box/t3-2.png'" in done.out
    rows = [f"{p},{'bar' if i else ''}" for i, p in enumerate((made.outside / "bar").iterdir())]
    (tmp_path / "some.csv").write_text("\n".join(["filename,label", *rows]) + "\n")
    done = score(made.run, tmp_path / "some.csv", "--mpp", MPP, to="some")
    assert "1 windows without a label are left out" in done.err
    # of one class alone there is no ranking, and nothing breaks
    assert done.metrics["scores"]["auroc"]["value"] is None
    assert done.metrics["scores"]["sensitivity"]["value"] is not None
    assert "single patches were drawn" in done.out.replace("\n  ", " ")
    (tmp_path / "none.csv").write_text("\n".join(["filename", *(r[:-4] for r in rows[1:])]) + "\n")
    assert "no window has a label" in refused(made.run, tmp_path / "none.csv", "--mpp", MPP)


def test_folder_and_options_are_checked_first(
    score: Run, refused: Run, made: Made, celltyper_command: Run, tmp_path: Path
) -> None:
    for words in (("--taxonomy", tmp_path), ("--precision", "fp16"), ("--allow-code",)):
        message = refused(made.run, made.outside, *words)
        assert f"{words[0]} is for images of cells, and this is about patches" in message
    done = score(made.run, made.outside, "--mpp", MPP)
    words = ("eval", made.run, made.outside, "--mpp", MPP, "-o", done.folder)
    code, _, err = celltyper_command(*words)
    assert code == 2
    assert "already holds an evaluation; pass --overwrite" in err
    code, out, _ = celltyper_command(*words, "--overwrite", "--resamples", 0, "-q")
    assert (code, out) == (0, "")
    assert done.metrics["scores"]["auroc"]["low"] is None
    code, _, err = celltyper_command("eval", "--pred", tmp_path, "--ref", tmp_path, "--skip-bad")
    assert code == 2
    assert "--skip-bad is for patches" in err


def test_default_folder_is_inside_the_run(made: Made, celltyper_command: Run) -> None:
    words = ("eval", made.run, made.outside, "--mpp", MPP, "--resamples", 0, "-q")
    assert celltyper_command(*words) == (0, "", "")
    assert {p.name for p in (made.run / "eval").iterdir()} == {
        "metrics.json",
        "patches.csv",
        "report.html",
    }
    shutil.rmtree(made.run / "eval")
