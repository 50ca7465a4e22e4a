"""Weights from files, folders and a hub that runs on this machine; secrets stay secret."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from fake_hub import COMMIT, OLDER, FakeHub, closed_port
from safetensors.torch import save

from celltyper.config import load_config
from celltyper.encoders import find_card, load_card, load_encoder
from celltyper.encoders.folders import WEIGHTS_FILES, commit_of, present_weights
from celltyper.encoders.hub import fetch_weights, find_weights, weights_here
from celltyper.errors import CheckpointError
from celltyper.training import train

Run = Callable[..., Any]

TOKEN = "hf_SENTINELtoken"
PASSWORD = "SENTINELpassword"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that this process takes for the real one, and an empty cache."""
    with FakeHub() as fake:
        fake.stand_in(monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("CELLTYPER_WEIGHTS", raising=False)
        yield fake


def run_command(
    *words: object, endpoint: str, home: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``celltyper`` as a shell does, with the environment of a user who has a token."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "CELLTYPER_"))}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, **variables}
    return subprocess.run(
        [sys.executable, "-m", "celltyper", *map(str, words)],
        env=kept | own,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def files_with(text: str, *folders: Path) -> list[Path]:
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and text.encode() in path.read_bytes()
    ]


# as of a card that pins nothing; pinned ones are served by the same hub
UNI = load_card("uni").model_copy(update={"revision": None})


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert TOKEN not in text
    assert PASSWORD not in text
    return text


# ---------------------------------------------------------------- files and folders


@pytest.mark.parametrize(
    "place",
    [
        "uni.safetensors",
        "uni.bin",
        "uni.pt",
        "uni.pth",
        "uni/pytorch_model.bin",
        "MahmoodLab/UNI/model.safetensors",
        f"models--MahmoodLab--UNI/snapshots/{COMMIT}/pytorch_model.bin",
        "model.safetensors",
    ],
)
def test_a_folder_is_searched_and_a_file_is_taken(tmp_path: Path, place: str) -> None:
    with pytest.raises(CheckpointError, match=r"has no weights of uni: looked for uni{.safete"):
        find_weights(UNI, tmp_path)
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert find_weights(UNI, tmp_path) == path
    assert find_weights(UNI, str(path)) == path
    with pytest.raises(CheckpointError, match=r"none\.pt does not exist; check encoder\.weights"):
        find_weights(UNI, tmp_path / "none.pt")


def test_order_in_a_folder(tmp_path: Path) -> None:
    order = ["uni.safetensors", "uni.bin", "uni/model.safetensors", "uni/pytorch_model.bin"]
    order += ["MahmoodLab/UNI/model.safetensors", "model.safetensors", "pytorch_model.bin"]
    for place in reversed(order):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert find_weights(UNI, tmp_path) == path


def test_other_encoders_of_a_folder_are_not_taken(tmp_path: Path) -> None:
    for place in ("uni2-h.safetensors", "virchow/model.safetensors", "MahmoodLab/UNI2-h/a.bin"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    with pytest.raises(CheckpointError, match=r"looked for .*MahmoodLab/UNI/FILE, models--Mah"):
        find_weights(UNI, tmp_path)


def test_cache_layout_knows_revisions(tmp_path: Path) -> None:
    snapshots = tmp_path / "models--MahmoodLab--UNI" / "snapshots"
    for age, commit in ((200, OLDER), (100, COMMIT)):
        (snapshots / commit).mkdir(parents=True)
        (snapshots / commit / "pytorch_model.bin").touch()
        os.utime(snapshots / commit, (time.time() - age,) * 2)
    assert commit_of(find_weights(UNI, tmp_path)) == COMMIT
    assert commit_of(find_weights(UNI, tmp_path, revision=OLDER)) == OLDER
    pinned = UNI.model_copy(update={"revision": OLDER})
    assert commit_of(find_weights(pinned, tmp_path)) == OLDER
    refs = tmp_path / "models--MahmoodLab--UNI" / "refs"
    refs.mkdir()
    (refs / "main").write_text(OLDER)
    assert commit_of(find_weights(UNI, tmp_path)) == OLDER
    with pytest.raises(CheckpointError, match="has no weights of uni"):
        find_weights(UNI, tmp_path, revision="f" * 40)


def test_own_folder_comes_before_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["MahmoodLab/UNI"] = {"pytorch_model.bin": b"of the hub"}
    own = tmp_path / "own"
    monkeypatch.setenv("CELLTYPER_WEIGHTS", str(own))
    with pytest.raises(CheckpointError, match=r"CELLTYPER_WEIGHTS names .*own, which is no folder"):
        find_weights(UNI)
    own.mkdir()
    # a plain name in a folder of many encoders may be anybody's
    (own / "model.safetensors").touch()
    assert find_weights(UNI).read_bytes() == b"of the hub"
    assert present_weights(UNI).place == "cache"
    asked = len(hub.asked)
    (own / "uni.pt").touch()
    assert find_weights(UNI) == own / "uni.pt"
    assert present_weights(UNI) == (own / "uni.pt", "folder")
    assert len(hub.asked) == asked


# ---------------------------------------------------------------- the hub


def test_download_is_exact_and_its_commit_known(hub: FakeHub) -> None:
    hub.files["MahmoodLab/UNI"] = {"pytorch_model.bin": b"new"}
    hub.older["MahmoodLab/UNI"] = {"pytorch_model.bin": b"old"}
    path = find_weights(UNI)
    assert (path.read_bytes(), commit_of(path)) == (b"new", COMMIT)
    assert hub.authorizations[-1] == f"Bearer {TOKEN}"
    # a pinned revision wins over main, and needs no hub once it is here
    pinned = UNI.model_copy(update={"revision": OLDER})
    assert find_weights(pinned).read_bytes() == b"old"
    asked = len(hub.asked)
    assert commit_of(find_weights(pinned)) == OLDER
    assert weights_here(pinned).read_bytes() == b"old"
    assert len(hub.asked) == asked
    assert find_weights(UNI, revision=COMMIT).read_bytes() == b"new"


@pytest.mark.parametrize("name", WEIGHTS_FILES)
def test_every_published_name_is_found(hub: FakeHub, name: str) -> None:
    card = load_card("titan-v")
    hub.files[card.hub_id] = {"README.md": b"#", name: b"weights"}
    assert find_weights(card).read_bytes() == b"weights"
    assert hub.downloads == [f"{card.hub_id}/resolve/{card.revision}/{name}"]


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((403, "GatedRepo"), "gated: accept the terms on huggingface.co/MahmoodLab/UNI, run 'hf"),
        ((401, "GatedRepo"), "gated: accept the terms on huggingface.co/MahmoodLab/UNI, run 'hf"),
        ((401, "RepoNotFound"), "has no MahmoodLab/UNI (revision main), or not for you"),
        ((404, "RevisionNotFound"), "has no MahmoodLab/UNI (revision main): take the newest with"),
        ((401, None), "did not accept your token for MahmoodLab/UNI (revision main) (401)"),
        ((403, None), "did not accept your token for MahmoodLab/UNI (revision main) (403)"),
        ((404, None), "has none of model.safetensors, pytorch_model.bin, open_clip_model.saf"),
        ((404, "EntryNotFound"), "conch_v1_5_pytorch_model.bin in MahmoodLab/UNI (revision main)"),
        ((500, None), "answered 500 for MahmoodLab/UNI (revision main): try again later"),
        ((503, None), "answered 503 for MahmoodLab/UNI (revision main): try again later"),
        ((429, None), "answered 429 for MahmoodLab/UNI (revision main): try again later"),
    ],
)
def test_refusals_say_what_to_do(
    hub: FakeHub, refusal: tuple[int, str | None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.refusals["MahmoodLab/UNI"] = refusal
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        find_weights(UNI)
    assert time.monotonic() - start < 3
    text = one_line(caught.value)
    assert said in text
    assert "give a local file or folder with encoder.weights=PATH (--weights PATH)" in text
    # nor does a traceback tell
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert f"Bearer {TOKEN}" in hub.authorizations
    assert TOKEN not in caplog.text


def test_unknown_revision(hub: FakeHub) -> None:
    hub.files["MahmoodLab/UNI"] = {"pytorch_model.bin": b"new"}
    with pytest.raises(
        CheckpointError, match=r"has no MahmoodLab/UNI \(revision v9\).*encoder.revision=main"
    ):
        find_weights(UNI, revision="v9")


def test_unreachable_hub_fails_at_once_or_answers_from_the_cache(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    away = template.replace(hub.address, f"127.0.0.1:{closed_port()}")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", away)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        find_weights(UNI)
    assert time.monotonic() - start < 3
    assert "is out of reach: go online once, or give a local file" in one_line(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub.files["MahmoodLab/UNI"] = {"model.safetensors": b"weights"}
    path = find_weights(UNI)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", away)
    assert find_weights(UNI) == path


def test_slow_mirror_is_waited_for(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr(huggingface_hub.constants, "DEFAULT_ETAG_TIMEOUT", 0.5)
    hub.files["MahmoodLab/UNI"] = {"model.safetensors": b"weights"}
    hub.delay = 0.8
    assert find_weights(UNI).read_bytes() == b"weights"


def test_silent_server_is_given_up(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr("celltyper.encoders.hub._PATIENCE", 0.3)
    hub.delay = 2
    with pytest.raises(CheckpointError, match="is out of reach"):
        find_weights(UNI)


def test_login_page_of_a_network_is_no_hub(hub: FakeHub) -> None:
    hub.no_hub = True
    with pytest.raises(CheckpointError, match=r"is none: check HF_ENDPOINT and your network"):
        find_weights(UNI)


def test_offline_mode_takes_the_cache_or_says_so(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["MahmoodLab/UNI"] = {"model.safetensors": b"weights"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set: run 'celltyper encoders fe"):
        find_weights(UNI)
    with pytest.raises(CheckpointError, match=r"run 'celltyper encoders fetch uni' or pass --wei"):
        weights_here(UNI)
    assert hub.asked == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    path = find_weights(UNI)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_weights(UNI) == path


@pytest.mark.parametrize("wrong", ["truncated", "other bytes"])
@pytest.mark.parametrize("folder", [None, "folder"])
def test_damaged_download_is_an_error_and_never_used(
    hub: FakeHub,
    tmp_path: Path,
    wrong: str,
    folder: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.files["MahmoodLab/UNI"] = {"model.safetensors": b"weights" * 100}
    hub.truncate, hub.flip = (350, False) if wrong == "truncated" else (None, True)
    said = "broke off: run it again" if wrong == "truncated" else "another SHA-256 than on the hub"
    to = tmp_path / folder if folder else None
    for _ in range(2):
        with pytest.raises(CheckpointError, match=said) as caught:
            fetch_weights(UNI, to)
        one_line(caught.value)
        assert present_weights(UNI) is None
        assert not list(tmp_path.rglob("uni*"))
        assert not list(tmp_path.rglob("model.safetensors"))
    hub.truncate, hub.flip = None, False
    assert fetch_weights(UNI, to).path.read_bytes() == b"weights" * 100


def test_full_disk_is_no_lack_of_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["MahmoodLab/UNI"] = {"model.safetensors": b"weights"}

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(CheckpointError, match=r"cannot write .* \(No space left on device\): free"):
        find_weights(UNI)


# ---------------------------------------------------------------- fetch


def test_fetch_fills_a_folder_for_a_machine_without_network(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights"
    hub.files["MahmoodLab/UNI"] = {"pytorch_model.bin": b"weights"}
    got = fetch_weights(UNI, folder)
    assert got == (folder / "uni.bin", 7, COMMIT, True)
    assert sorted(p.name for p in folder.iterdir()) == ["uni.bin", "uni.source.json"]
    source = json.loads((folder / "uni.source.json").read_text())
    assert source["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert source["licence"] == "CC-BY-NC-ND-4.0"
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch_weights(UNI, folder) == got._replace(new=False)
    path = find_weights(UNI, folder)
    assert (path, commit_of(path)) == (folder / "uni.bin", COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    path.write_bytes(b"damaged")
    assert fetch_weights(UNI, folder).new
    assert path.read_bytes() == b"weights"


def test_fetch_leaves_a_users_own_file_and_takes_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["MahmoodLab/UNI"] = {"pytorch_model.bin": b"weights"}
    cached = fetch_weights(UNI)
    assert (cached.new, cached.commit) == (True, COMMIT)
    assert not fetch_weights(UNI).new
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "uni.pt").write_bytes(b"mine")
    own = fetch_weights(UNI, tmp_path / "own")
    assert (own.path.read_bytes(), own.commit, own.new) == (b"mine", None, False)
    downloads = len(hub.downloads)
    copied = fetch_weights(UNI, tmp_path / "copy")
    assert (copied.path.read_bytes(), copied.commit) == (b"weights", COMMIT)
    assert len(hub.downloads) == downloads
    assert cached.path.read_bytes() == b"weights"


def test_damage_in_the_cache_is_found(hub: FakeHub) -> None:
    hub.files["MahmoodLab/UNI"] = {"pytorch_model.bin": b"weights"}
    path = fetch_weights(UNI).path
    path.resolve().write_bytes(b"rotten!")
    with pytest.raises(CheckpointError, match="another SHA-256 than on the hub and was removed"):
        fetch_weights(UNI)
    assert fetch_weights(UNI).path.read_bytes() == b"weights"


def test_fetch_command_goes_on_past_a_failure(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    with FakeHub() as hub:
        virchow = load_card("virchow2").hub_id
        hub.files = {virchow: {"model.safetensors": b"weights"}}
        hub.refusals["MahmoodLab/UNI"] = (403, "GatedRepo")
        words = ("encoders", "fetch", "uni", "virchow2", "--to", folder)
        done = run_command(*words, endpoint=f"http://{hub.address}", home=tmp_path / "home")
        assert done.returncode == 1
        said = done.stderr.splitlines()
        pinned = load_card("uni").revision
        assert said[0].startswith(
            f"celltyper: encoder 'uni': MahmoodLab/UNI (revision {pinned[:12]}) is gated"
        )
        assert said[1:] == ["celltyper: 1 of 2 not fetched: uni"]
        assert done.stdout == (
            f"virchow2: fetched, 0.0 MB, commit {load_card('virchow2').revision}, CC-BY-NC-ND-4.0, "
            f"{folder / 'virchow2.safetensors'}\n"
        )
        words = ("encoders", "fetch", "virchow2", "--revision", "main")
        done = run_command(*words, endpoint=f"http://{hub.address}", home=tmp_path / "home")
        assert f"commit {COMMIT}" in done.stdout
        asked = len(hub.asked)
        words = ("encoders", "fetch", "unni", "virchow2")
        done = run_command(*words, endpoint=f"http://{hub.address}", home=tmp_path / "home")
        assert done.returncode == 2
        assert "did you mean 'uni'" in done.stderr
        assert len(hub.asked) == asked


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize("status", [200, 401, 503])
@pytest.mark.parametrize("debug", [False, True])
def test_secrets_of_token_and_mirror_are_never_told(
    tmp_path: Path, status: int, debug: bool
) -> None:
    with FakeHub() as hub:
        hub.files["MahmoodLab/UNI"] = {"pytorch_model.bin": b"weights"}
        if status != 200:
            hub.refusals["MahmoodLab/UNI"] = (status, None)
        done = run_command(
            *(["--debug"] if debug else []),
            *("encoders", "fetch", "uni", "--to", tmp_path / "weights"),
            endpoint=f"http://user:{PASSWORD}@{hub.address}",
            home=tmp_path / "home",
        )
        assert hub.asked
    assert done.returncode == (0 if status == 200 else 1)
    said = done.stdout + done.stderr
    assert PASSWORD not in said
    assert TOKEN not in said
    if status != 200:
        assert f"the mirror {hub.address} (HF_ENDPOINT)" in said
    assert ("Traceback" in said) == (debug and status != 200)
    assert (tmp_path / "weights").exists()
    assert files_with(TOKEN, tmp_path) == files_with(PASSWORD, tmp_path) == []


def tiny_repository() -> dict[str, bytes]:
    """A timm model of a few kilobytes, as it is published."""
    arguments = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 64}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(tensors)}


def test_train_and_infer_with_weights_of_a_hub_keep_the_token(
    hub: FakeHub,
    made_data: Path,
    tmp_path: Path,
    celltyper_command: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.files["owner/tiny"] = tiny_repository()
    settings = ["encoder.name=owner/tiny", f"data.root={made_data}", "decoder.name=linear"]
    settings += ["data.tile=64", "train.steps=2", "train.batch_size=2", "train.warmup=1"]
    settings += ["train.validate_every=2", "infer.overlap=16"]
    words = [word for setting in settings for word in ("--set", setting)]
    run, out = tmp_path / "run", tmp_path / "out"
    trained = celltyper_command("train", "linear", "-o", run, *words)
    assert trained.code == 0, trained.err
    # the card pins nothing, the run does
    assert f"revision: {COMMIT}" in (run / "config.yaml").read_text()
    image = next((made_data / "test" / "images").iterdir())
    typed = celltyper_command("infer", image, "-m", run, "-o", out, "--mpp", "0.5")
    assert typed.code == 0, typed.err
    assert f"Bearer {TOKEN}" in hub.authorizations
    assert TOKEN not in trained.out + trained.err + typed.out + typed.err + caplog.text
    assert (run / "model.safetensors").is_file()
    assert files_with(TOKEN, tmp_path) == []


def test_a_run_on_fetched_weights_says_their_commit(
    hub: FakeHub, made_data: Path, tmp_path: Path, celltyper_command: Run, tiny: Callable[..., Any]
) -> None:
    hub.files["owner/tiny"] = tiny_repository()
    folder = tmp_path / "weights"
    assert celltyper_command("encoders", "fetch", "owner/tiny", "--to", folder).code == 0
    named = ("encoder.name=owner/tiny", f"encoder.weights={folder}", "encoder.adapt=frozen")
    config = tiny(made_data, *named, "train.steps=1", "train.validate_every=1")
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    written = load_config(run / "config.yaml").encoder
    assert (written.revision, written.weights) == (COMMIT, str(folder))
    # the same command goes on with the run
    assert train(config, run, device="cpu", resume=True, progress=False) == run


def test_weights_of_the_hub_are_those_that_run(hub: FakeHub) -> None:
    hub.files["owner/tiny"] = tiny_repository()
    encoder = load_encoder("owner/tiny")
    torch.manual_seed(0)
    arguments = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 64}
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **arguments
    )
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.eval().forward_features((images - 0.5) / 0.5)[:, 0]
        torch.testing.assert_close(encoder.embed(images), expected)
    assert find_card("owner/tiny").hub_id == "owner/tiny"
