"""Models by name: the box, the cache, what fills it, and cards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import yaml
from fake_hub import COMMIT, OLDER, FakeHub, closed_port
from filelock import FileLock
from safetensors.numpy import save

from celltyper.__main__ import cli
from celltyper.errors import CheckpointError, ConfigError
from celltyper.exported import EXPORTED_FILE
from celltyper.library import shelf
from celltyper.library.cards import card_line, read_card
from celltyper.library.fetching import fetch_model, read_source, remove_model
from celltyper.library.files import CONFIG_FILE, MODEL_FILE, is_half, read_header
from celltyper.library.listing import description, table
from celltyper.library.shelf import find_model, list_models, results_folder

Run = Callable[..., Any]

CARD = {
    "summary": "Finds nuclei and tells tumour cells from the rest.",
    "licence": "Apache-2.0",
    "trained_on": [
        {
            "source": "DSB 2018",
            "licence": "CC0-1.0",
            "what": "40 images, 2,000 nuclei",
            "labels": "by hand",
        },
        {
            "source": "histolytics fields",
            "licence": "BSD-3-Clause",
            "what": "2 fields, 1,718 nuclei",
            "labels": "by a model",
        },
    ],
    "figures": [
        {
            "source": "CoNSeP test",
            "images": 14,
            "score": "detection_f1",
            "value": 0.612,
            "low": 0.553,
            "high": 0.661,
            "apart": "source",
        }
    ],
    "limits": ["Mitoses are often missed."],
    "not_for": ["diagnosis", "fluorescence"],
}


def model_bytes(dtype: type = np.float32, **header: Any) -> bytes:
    """The file of a model, with one tensor and a header of celltyper."""
    encoder = {"name": "vit_tiny_patch16", "adapt": "full"}
    facts = {
        "config": {"encoder": encoder},
        "classes": ["tumour", "immune"],
        "mpp": 0.5,
        "format": 1,
        "celltyper_version": "0.1.0",
    }
    tensors = {"heads.phenotype.weight": np.ones((3, 4), dtype)}
    return save(tensors, metadata={"celltyper": json.dumps(facts | header)})


MODEL = model_bytes()
SHA256 = hashlib.sha256(MODEL).hexdigest()


def put(folder: Path, content: bytes = MODEL, card: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / MODEL_FILE).write_bytes(content)
    if card is not None:
        (folder / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    return folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An empty box and an empty cache, in an empty folder to work in."""
    box, cache, here = tmp_path / "box", tmp_path / "cache", tmp_path / "here"
    box.mkdir()
    here.mkdir()
    monkeypatch.setattr(shelf, "box_folder", lambda: box)
    monkeypatch.setenv("CELLTYPER_CACHE", str(cache))
    monkeypatch.chdir(here)
    return box, cache / "models"


@pytest.fixture
def hub(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """A hub and server of plain addresses that publishes one model with its card."""
    card = yaml.safe_dump(CARD).encode()
    with FakeHub() as fake:
        fake.stand_in(monkeypatch, tmp_path / "hub")
        fake.files["lab/nuclei"] = {MODEL_FILE: MODEL, "card.yaml": card, "run.json": b"{}"}
        yield fake


def address(hub: FakeHub, file: str = MODEL_FILE, repository: str = "lab/nuclei") -> str:
    return f"http://{hub.address}/{repository}/resolve/main/{file}"


def nothing_kept(cache: Path) -> bool:
    """Whether no model appeared and only locks are left."""
    return not list_models() and all(path.suffix == ".lock" for path in cache.iterdir())


# ---------------------------------------------------------------- names and paths


def test_a_word_is_a_name_or_a_folder_and_never_both(places: tuple[Path, Path]) -> None:
    box, cache = places
    own, cached = put(Path("own")), put(cache / "nuclei")
    assert find_model("own") == Path("own")
    assert find_model("nuclei") == cached
    # a folder of results is no model
    Path("nuclei").mkdir()
    Path("nuclei", "infer.json").touch()
    assert find_model("nuclei") == cached
    # an unfinished run is one, or the words would mean another model until it ends
    Path("nuclei", "config.yaml").touch()
    with pytest.raises(CheckpointError, match="a run in this folder and a model of the cache: wr"):
        find_model("nuclei")
    assert find_model("./nuclei") == find_model(Path("nuclei")) == Path("nuclei")
    assert find_model(str(cached)) == cached
    assert find_model("./none") == Path("none")
    with pytest.raises(CheckpointError, match=r"^no model at nucle: give a folder .*'nuclei'\?$"):
        find_model("nucle")
    put(box / "other")
    put(cache / "other")
    with pytest.raises(CheckpointError, match="both box and cache have a model other: write"):
        find_model("other")
    assert find_model(own / MODEL_FILE) == own / MODEL_FILE


def test_the_folder_of_a_protocol_is_a_run(places: tuple[Path, Path]) -> None:
    put(places[1] / "folds")
    Path("folds").mkdir()
    Path("folds", "protocol.json").touch()
    with pytest.raises(CheckpointError, match="is a run in this folder and a model of the cache"):
        find_model("folds")


def test_without_a_name_it_is_the_first_of_the_box_that_finds_cells(
    places: tuple[Path, Path],
) -> None:
    box, cache = places
    put(cache / "aaa")
    put(box / "atypical", model_bytes(task="patches"))
    with pytest.raises(CheckpointError) as caught:
        find_model()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("no model is in the box of this celltyper: give one with -m")
    assert "; by name there are atypical, aaa; " in text
    assert "'celltyper models fetch URL_OR_HUB_ID' gets one" in text
    second, first = put(box / "nuclei"), put(box / "cells")
    assert find_model() == first
    assert find_model("nuclei") == second
    assert [kept.name for kept in list_models()] == ["atypical", "cells", "nuclei", "aaa"]


def test_results_do_not_go_into_box_or_cache(places: tuple[Path, Path]) -> None:
    box, cache = places
    for folder, place in ((put(box / "nuclei"), "box"), (put(cache / "other"), "cache")):
        for run in (folder, folder / MODEL_FILE):
            with pytest.raises(ConfigError, match=f"is a model of the {place}: say with -o where"):
                results_folder(run)
    own = put(Path("own"))
    assert results_folder(own) == results_folder(own / MODEL_FILE) == own


def test_commands_without_a_model_say_so_in_one_line(
    places: tuple[Path, Path], celltyper_command: Run
) -> None:
    Path("image.png").touch()
    code, out, err = celltyper_command("infer", "image.png", "-o", "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no model is in the box of this celltyper: give one with -m" in err
    assert not Path("out").exists()
    code, out, err = celltyper_command("models")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert text.startswith("no model in the box (")
    assert (
        f"nor in the cache ({places[1]}): 'celltyper models fetch URL_OR_HUB_ID' gets one" in text
    )
    for words in (("eval", "nuclei", "data"), ("export", "nuclei"), ("models", "show", "nuclei")):
        code, _, err = celltyper_command(*words)
        assert (code, err.count("\n")) == (2, 1)
        assert "no model at nuclei: give a folder that 'celltyper train' wrote, or a name" in err


# ---------------------------------------------------------------- list and show


@pytest.mark.parametrize("command", ["", "show", "fetch", "remove"])
def test_help_fits_a_terminal(command: str, celltyper_command: Run) -> None:
    code, out, err = celltyper_command("models", *command.split(), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) < 80
    group = cli.commands["models"]
    for parameter in group.commands[command].params if command else ():
        if parameter.param_type_name == "option":
            assert parameter.help
            assert parameter.opts[-1] in out


def test_list_fits_80_columns_and_says_what_each_is(
    places: tuple[Path, Path], celltyper_command: Run
) -> None:
    box, cache = places
    put(box / "nuclei", card=CARD)
    many = [f"phenotype {i}" for i in range(12)]
    foreign = {"encoder": {"name": "owner/a-name-that-is-rather-long", "adapt": "lora"}}
    put(cache / "own", model_bytes(classes=many, mpp=None, config=foreign))
    put(cache / "typing", model_bytes(task="patches", classes=["normal", "\x1b[2Jatypical"]))
    put(cache / "broken", b"no model")
    # what is being fetched has no name yet
    put(cache / ".half.part")
    code, out, _ = celltyper_command("models")
    lines = out.splitlines()
    assert code == 0
    assert max(map(len, lines)) < 80
    assert lines[0].split() == ["name", "mpp", "encoder", "size", "licence", "from"]
    rows = {line.split()[0]: line.split()[1:] for line in lines if not line.startswith(" ")}
    assert list(rows) == ["name", "nuclei", "broken", "own", "typing"]
    assert rows["nuclei"] == ["0.5", "vit_tiny_patch16", "0.0", "MB", "Apache-2.0", "box"]
    assert rows["own"] == ["any", "owner/a-name-that-is-rath.", "0.0", "MB", "-", "cache"]
    assert rows["broken"][-1] == "cache"
    text = " ".join(out.split())
    assert "tumour, immune broken" in text
    assert ", ".join(many) in text
    assert "patches: normal, ?[2Jatypical" in text
    assert "broken - - 0.0 MB - cache damaged: 'celltyper models show broken' says what" in text
    code, _, err = celltyper_command("models", "show", "broken")
    assert (code, err.count("\n")) == (2, 1)
    assert "is damaged or was not written by celltyper" in err


def test_show_tells_the_card(places: tuple[Path, Path], celltyper_command: Run) -> None:
    folder = put(places[0] / "nuclei", model_bytes(np.float16), CARD)
    code, out, err = celltyper_command("models", "show", "nuclei")
    assert (code, err) == (0, "")
    assert max(len(line) for line in out.splitlines() if str(folder) not in line) < 80
    text = " ".join(out.split())
    for said in (
        f"place {folder} (box)",
        "finds tumour, immune",
        "resolution 0.5 micrometres per pixel",
        "encoder vit_tiny_patch16, its weights are in the model",
        "size 0.0 MB, half precision",
        "licence Apache-2.0",
        "about Finds nuclei and tells tumour cells from the rest.",
        "trained on - DSB 2018 (CC0-1.0): 40 images, 2,000 nuclei; labels by hand - histolytics",
        "fields (BSD-3-Clause): 2 fields, 1,718 nuclei; labels by a model",
        "detection_f1 0.612 0.553 to 0.661 CoNSeP test, 14 images; nothing of it trained on",
        "limits - Mitoses are often missed.",
        "must not be used for - diagnosis - fluorescence",
    ):
        assert said in text
    other = {"encoder": {"name": "uni", "adapt": "lora"}}
    plain = put(Path("run"), model_bytes(config=other))
    for given in ("run", "./run", plain / MODEL_FILE):
        text = " ".join(celltyper_command("models", "show", given).out.split())
        assert "encoder uni (lora); its own weights: celltyper encoders fetch uni" in text
        assert "licence not stated about no card" in text
        assert "half" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limits": []}, "limits: Tuple should have at least 1 item"),
        ({"not_for": None}, "not_for: "),
        ({"author": "me"}, "author: Extra inputs are not permitted"),
        ({"figures": [{**CARD["figures"][0], "high": 0.6}]}, "0.612 is not between 0.553 and 0.6"),
        (
            {"figures": [{**CARD["figures"][0], "source": "DSB 2018"}]},
            "DSB 2018 is in trained_on, so not apart as a source",
        ),
        (
            {"figures": [{**CARD["figures"][0], "apart": "left out"}]},
            "CoNSeP test is not in trained_on, so apart as a source",
        ),
    ],
)
def test_a_wrong_card_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = put(tmp_path / "model", card=CARD | change)
    with pytest.raises(CheckpointError) as caught:
        read_card(folder)
    assert str(caught.value).startswith(f"model card {folder / 'card.yaml'}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    # a report is not lost for it
    assert card_line(folder / MODEL_FILE) == str(caught.value)


def test_the_card_in_the_docs_is_a_card(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(text.split("```text\n")[1].split("```")[0])
    card = read_card(put(tmp_path / "model", card=shown))
    assert card is not None
    assert set(shown) == set(type(card).model_fields)
    assert (card.figures[0].value, card.not_for) == (0.61, ("diagnosis",))


@pytest.mark.parametrize(
    ("apart", "said"),
    [
        ("left out", "by a model trained alike without it"),
        ("patients", "patients not trained on"),
        ("slides", "slides not trained on"),
        ("images", "images not trained on"),
    ],
)
def test_parts_of_a_source_that_trained_may_be_apart(tmp_path: Path, apart: str, said: str) -> None:
    figure = {**CARD["figures"][0], "source": "DSB 2018", "apart": apart}
    folder = put(tmp_path / "model", card=CARD | {"figures": [figure]})
    card = read_card(folder)
    assert card is not None
    assert card.figures[0].apart == apart
    assert said in " ".join(description(folder).split())


def test_a_card_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    put(tmp_path / "model", card=CARD)
    (tmp_path / "model" / "card.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"card\.yaml cannot be read: .*") as caught:
        read_card(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert read_card(put(tmp_path / "plain")) is None


def test_the_line_of_a_report(tmp_path: Path) -> None:
    folder = put(tmp_path / "nuclei", card=CARD)
    line = (
        "nuclei (Apache-2.0), trained on DSB 2018, histolytics fields; not for diagnosis, "
        "fluorescence; celltyper models show nuclei"
    )
    assert card_line(folder) == card_line(folder / MODEL_FILE) == line
    assert card_line(put(tmp_path / "plain")) is None


# ---------------------------------------------------------------- fetch


def test_an_address_becomes_a_name(
    hub: FakeHub, places: tuple[Path, Path], celltyper_command: Run
) -> None:
    folder = places[1] / "main"
    code, out, err = celltyper_command("models", "fetch", address(hub), "--sha256", SHA256.upper())
    assert (code, err) == (0, "")
    assert out == f"main: fetched, 0.0 MB, Apache-2.0, SHA-256 {SHA256}, {folder}\n"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["card.yaml", MODEL_FILE, "run.json", "source.json"]
    assert (folder / MODEL_FILE).read_bytes() == MODEL
    assert find_model("main") == folder
    asked = len(hub.asked)
    code, out, _ = celltyper_command("models", "fetch", address(hub))
    assert out.startswith("main: there already, ")
    assert len(hub.asked) == asked
    said = " ".join(celltyper_command("models", "show", "main").out.split())
    assert f"from {address(hub)} SHA-256 {SHA256}" in said
    # the folder around the file, by another name
    got = fetch_model(address(hub, ""), name="nuclei", progress=False)
    assert (got.name, got.new, got.sha256) == ("nuclei", True, SHA256)
    with pytest.raises(ConfigError, match="the cache has a model main already, from http"):
        fetch_model(address(hub, repository="lab/other"), progress=False)
    with pytest.raises(CheckpointError, match=f"the cache has main with the SHA-256 {SHA256}"):
        fetch_model(address(hub), sha256="0" * 64, progress=False)
    (folder / MODEL_FILE).write_bytes(b"rotten")
    with pytest.raises(CheckpointError, match="is damaged: 'celltyper models remove main', fetch"):
        fetch_model(address(hub), progress=False)


def test_a_file_with_a_name_brings_the_card_of_that_name(
    hub: FakeHub, places: tuple[Path, Path]
) -> None:
    card = yaml.safe_dump(CARD | {"licence": "MIT"}).encode()
    hub.files["lab/nuclei"] |= {"small.safetensors": MODEL, "small.card.yaml": card}
    got = fetch_model(f"{address(hub, 'small.safetensors')}?signature=SECRET", progress=False)
    assert got.name == "small"
    assert read_card(got.folder).licence == "MIT"  # type: ignore[union-attr]
    assert not (got.folder / "run.json").exists()
    assert read_source(got.folder)["source"] == address(hub, "small.safetensors")
    assert not any("SECRET" in path.read_text("latin-1") for path in got.folder.iterdir())


def test_a_repository_of_the_hub(hub: FakeHub, places: tuple[Path, Path]) -> None:
    hub.older["lab/nuclei"] = {MODEL_FILE: model_bytes(mpp=0.25)}
    got = fetch_model("lab/nuclei", sha256=SHA256, progress=False)
    assert (got.name, got.folder, got.new) == ("nuclei", places[1] / "nuclei", True)
    assert sorted(path.name for path in got.folder.iterdir()) == [
        "card.yaml",
        MODEL_FILE,
        "run.json",
        "source.json",
    ]
    assert read_source(got.folder) == {
        "source": "lab/nuclei",
        "revision": None,
        "commit": COMMIT,
        "sha256": SHA256,
    }
    assert f"lab/nuclei, commit {COMMIT[:12]}" in description(got.folder)
    listed = " ".join(table(list_models()).split())
    assert f"tumour, immune; from lab/nuclei, commit {COMMIT[:12]}" in listed
    assert not fetch_model("lab/nuclei", progress=False).new
    with pytest.raises(ConfigError, match="has a model nuclei already, from lab/nuclei"):
        fetch_model("lab/nuclei", revision=OLDER, progress=False)
    old = fetch_model("lab/nuclei", revision=OLDER, name="old", progress=False)
    assert read_header(old.folder / MODEL_FILE)["mpp"] == 0.25
    assert sorted(path.name for path in old.folder.iterdir()) == [MODEL_FILE, "source.json"]


LATER = model_bytes(format=2, celltyper_version="9.0", unheard="of")
OTHER = save({"a": np.ones(2)}, metadata={"of": "another"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>please log in</html>", "is no model of celltyper ("),
        (MODEL[:-4], "is no model of celltyper ("),
        (OTHER, "is no model of celltyper ('celltyper'): nothing was kept"),
        (LATER, "has checkpoint format 2, this celltyper reads 1; use celltyper 9.0"),
    ],
)
@pytest.mark.parametrize("place", ["address", "hub"])
def test_what_is_no_model_is_not_kept(
    hub: FakeHub, places: tuple[Path, Path], place: str, content: bytes, said: str
) -> None:
    hub.files["lab/nuclei"][MODEL_FILE] = content
    source = address(hub) if place == "address" else "lab/nuclei"
    with pytest.raises(CheckpointError) as caught:
        fetch_model(source, progress=False)
    assert f"{source} {said}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert nothing_kept(places[1])


def test_a_wrong_card_or_hash_is_not_kept(hub: FakeHub, places: tuple[Path, Path]) -> None:
    for source in (address(hub), "lab/nuclei"):
        with pytest.raises(CheckpointError, match=f"has the SHA-256 {SHA256}, not 000.*was kept$"):
            fetch_model(source, sha256="0" * 64, progress=False)
        assert nothing_kept(places[1])
    hub.files["lab/nuclei"]["card.yaml"] = b"licence: MIT"
    with pytest.raises(CheckpointError, match=r"^model card lab/nuclei/card.yaml: summary: Field"):
        fetch_model("lab/nuclei", progress=False)
    assert nothing_kept(places[1])


@pytest.mark.parametrize(
    ("refusal", "by_address", "by_hub"),
    [
        (
            (404, "EntryNotFound"),
            "there is nothing at http",
            "has none of model.safetensors in",
        ),
        ((401, "RepoNotFound"), "is not for everybody (status 401)", "has no lab/nuclei (revision"),
        (
            (403, "GatedRepo"),
            "is not for everybody (status 403)",
            "is gated: accept the terms on",
        ),
        ((503, None), "cannot be had now (status 503)", "answered 503 for lab/nuclei"),
    ],
)
def test_refusals_are_one_line(
    hub: FakeHub,
    places: tuple[Path, Path],
    refusal: tuple[int, str | None],
    by_address: str,
    by_hub: str,
) -> None:
    hub.refusals["lab/nuclei"] = refusal
    for source, said in ((address(hub), by_address), ("lab/nuclei", by_hub)):
        with pytest.raises(CheckpointError) as caught:
            fetch_model(source, progress=False)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert nothing_kept(places[1])


def test_out_of_reach(
    hub: FakeHub, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(CheckpointError, match=r"is out of reach \(.*refused\): see that you are"):
        fetch_model(f"{gone}/{MODEL_FILE}", name="nuclei", progress=False)
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    away = template.replace(f"http://{hub.address}", gone)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", away)
    with pytest.raises(
        CheckpointError, match=r"^model 'lab/nuclei': lab/nuclei \(revision main\) "
    ):
        fetch_model("lab/nuclei", progress=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="run 'celltyper models fetch lab/nuclei' online on"):
        fetch_model("lab/nuclei", progress=False)
    assert hub.asked == []
    assert nothing_kept(places[1])


def test_a_download_that_breaks_off_starts_anew(hub: FakeHub, places: tuple[Path, Path]) -> None:
    hub.truncate = 100
    with pytest.raises(CheckpointError, match=f"the download of {address(hub)} broke off: run it"):
        fetch_model(address(hub), progress=False)
    assert nothing_kept(places[1])
    # what a killed process leaves
    put(places[1] / ".main.part", b"half").joinpath("rubbish").touch()
    hub.truncate = None
    got = fetch_model(address(hub), progress=False)
    assert (got.folder / MODEL_FILE).read_bytes() == MODEL
    assert not (got.folder / "rubbish").exists()
    assert not (places[1] / ".main.part").exists()


def test_two_processes_do_not_fetch_the_same(hub: FakeHub, places: tuple[Path, Path]) -> None:
    places[1].mkdir(parents=True)
    with (
        FileLock(places[1] / ".nuclei.lock"),
        pytest.raises(CheckpointError, match="nuclei is being fetched by another process"),
    ):
        fetch_model("lab/nuclei", progress=False)
    assert fetch_model("lab/nuclei", progress=False).new


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("nuclei", {}, "'nuclei' says not where from: give the address"),
        ("ftp://a/b.safetensors", {}, "is no address of the web"),
        ("https://", {}, "is no address of the web"),
        ("http://u:SECRET@a/b.safetensors", {}, "leave user and password out"),
        ("lab/nuclei", {"sha256": "abc"}, "wants 64 hexadecimal digits"),
        ("lab/nuclei", {"name": "../x"}, "cannot be the name of a model"),
        ("lab/nuclei", {"name": ".x"}, "cannot be the name of a model"),
        ("http://a/b.safetensors", {"revision": "main"}, "--revision is for models of the hub"),
        ("lab/boxed", {}, "the box has a model boxed already: give another name with --name"),
        ("boxed", {}, "boxed is there already"),
    ],
)
def test_wrong_words_ask_nobody(
    hub: FakeHub, places: tuple[Path, Path], source: str, options: dict[str, str], said: str
) -> None:
    put(places[0] / "boxed")
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        fetch_model(source, progress=False, **options)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert hub.asked == []
    assert not places[1].exists()


def test_remove_takes_models_of_the_cache_only(
    places: tuple[Path, Path], celltyper_command: Run
) -> None:
    box, cache = places
    put(box / "nuclei")
    folder = put(cache / "other", card=CARD)
    for name, said in (("nuclei", "is in the box, a part of celltyper"), ("othre", "'other'")):
        with pytest.raises(ConfigError, match=said):
            remove_model(name)
    code, out, _ = celltyper_command("models", "remove", "other")
    assert (code, out) == (0, f"removed: {folder}\n")
    assert list(cache.iterdir()) == []
    assert [kept.name for kept in list_models()] == ["nuclei"]
    assert "nuclei" in table(list_models())


# ---------------------------------------------------------------- the box itself


def keeps_its_promise(folder: Path) -> None:
    """At most 16 MB, whole or on another model, with a card that forbids diagnosis."""
    file = folder / MODEL_FILE
    header, card = read_header(file), read_card(folder)
    assert file.stat().st_size <= 16e6
    assert is_half(file) or file.stat().st_size < 8e6
    encoder = header["config"]["encoder"]
    assert encoder["adapt"] == "full" or encoder["weights"].startswith("model:")
    assert card is not None
    assert any("diagnos" in text for text in card.not_for)
    assert card.figures
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert files.keys() <= {MODEL_FILE, EXPORTED_FILE, CONFIG_FILE, "card.yaml", "run.json"}
    # the graph is no second copy of the weights
    assert files.get(EXPORTED_FILE, 0) < 2e6


def test_models_of_the_box_keep_its_promise(tmp_path: Path) -> None:
    keeps_its_promise(put(tmp_path / "good", card=CARD))
    for kept in list_models():
        if kept.place == "box":
            keeps_its_promise(kept.folder)
            header = read_header(kept.folder / MODEL_FILE)
            assert yaml.safe_load((kept.folder / CONFIG_FILE).read_text()) == header["config"]
            assert "classes" in json.loads((kept.folder / "run.json").read_text())
    for wrong in (None, CARD | {"not_for": ["fluorescence"]}, CARD | {"figures": []}):
        with pytest.raises(AssertionError):
            keeps_its_promise(put(tmp_path / str(id(wrong)), card=wrong))
