"""``celltyper encoders`` as a user types it, and ``--weights`` of train, infer and eval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from celltyper.__main__ import cli
from celltyper.encoders import list_cards, load_card, load_encoder
from celltyper.encoders.examine import examine
from celltyper.errors import DataError, RunError

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("CELLTYPER_WEIGHTS", raising=False)
    return tmp_path / "cache"


PINNED = str(load_card("uni").revision)


def cached(cache: Path, hub_id: str, name: str, commit: str) -> Path:
    path = cache / f"models--{hub_id.replace('/', '--')}" / "snapshots" / commit / name
    path.parent.mkdir(parents=True)
    path.touch()
    return path


# ---------------------------------------------------------------- list and show


@pytest.mark.parametrize("command", ["", "show", "fetch", "check"])
def test_help_fits_a_terminal(command: str, celltyper_command: Run) -> None:
    code, out, err = celltyper_command("encoders", *command.split(), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) < 80
    assert "..." not in out.replace("NAME...", "").replace("[ARGS]...", "")
    assert "\\b" not in out
    group = cli.commands["encoders"]
    for parameter in group.commands[command].params if command else ():
        if parameter.param_type_name == "option":
            assert parameter.help
            assert parameter.opts[-1] in out


def test_list_has_all_cards_in_80_columns_and_says_what_is_here(
    celltyper_command: Run, no_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(no_weights, "MahmoodLab/UNI", "pytorch_model.bin", PINNED)
    own = tmp_path / "own"
    own.mkdir()
    (own / "virchow2.safetensors").touch()
    monkeypatch.setenv("CELLTYPER_WEIGHTS", str(own))
    code, out, _ = celltyper_command("encoders")
    head, *rows = out.splitlines()
    assert code == 0
    assert head.split() == [
        "name",
        "size",
        "patch",
        "dim",
        "input",
        "mpp",
        "licence",
        "gate",
        "have",
    ]
    assert max(map(len, out.splitlines())) < 80
    assert [row.split()[0] for row in rows] == list_cards()
    by_name = {row.split()[0]: row.split()[1:] for row in rows}
    # MahmoodLab/UNI: ViT-L/16 of 303 million, 224 px at 20x, CC-BY-NC-ND-4.0, gated
    assert by_name["uni"] == ["303M", "16", "1024", "224", "0.5", "BY-NC-ND", "yes", "cache"]
    assert by_name["virchow2"][-2:] == ["yes", "folder"]
    assert by_name["vit_tiny_patch16"][-3:] == ["Apache-2.0", "-", "-"]
    assert by_name["phikon-v2"][5:7] == ["Owkin", "NC"]


def test_show_tells_everything(celltyper_command: Run, no_weights: Path) -> None:
    code, out, _ = celltyper_command("encoders", "show", "uni")
    text = " ".join(out.split())
    assert code == 0
    assert "licence CC-BY-NC-ND-4.0" in text
    assert "gated yes, terms on huggingface.co/MahmoodLab/UNI" in text
    assert f"published MahmoodLab/UNI, revision {PINNED}" in text
    assert f"not here (CELLTYPER_WEIGHTS is not set; hub cache {no_weights}): celltyper enc" in text
    assert load_card("uni").notes in text
    path = cached(no_weights, "MahmoodLab/UNI", "model.safetensors", PINNED)
    out = celltyper_command("encoders", "show", "uni").out
    assert f"{path} (commit {PINNED})" in " ".join(out.split())


def test_show_every_card_and_a_model_of_timm(celltyper_command: Run) -> None:
    for name in (*list_cards(), "timm/vit_tiny_patch16_224"):
        code, out, _ = celltyper_command("encoders", "show", name)
        assert code == 0
        assert out.startswith(f"{name}\n  architecture ")
        assert "None" not in out
    assert "5.5 million" in celltyper_command("encoders", "show", "vit_tiny_patch16").out


def test_unknown_names_list_near_ones(celltyper_command: Run) -> None:
    for command in ("show", "fetch", "check"):
        code, out, err = celltyper_command("encoders", command, "vit_tiny_patch61")
        assert (code, out) == (2, "")
        assert "did you mean 'vit_tiny_patch16'" in err
        assert err.count("\n") == 1
    code, _, err = celltyper_command("encoders", "uni")
    assert code == 2
    assert "No such command 'uni'" in err


# ---------------------------------------------------------------- check


class Made(nn.Module):
    """An encoder whose embedding is a function of the mean colour, known by hand."""

    patch_size = 16
    channels = (3,)

    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(7, 11))
        self.embed = embed

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images[:, :, ::16, ::16]]


def two_colours() -> np.ndarray:
    """224 x 448 px: pure red, then pure green; three crops, the middle one half and half."""
    image = np.zeros((224, 448, 3), np.uint8)
    image[:, :224, 0] = 255
    image[:, 224:, 1] = 255
    return image


def test_statistics_of_known_embeddings() -> None:
    """Crops at 0, 112 and 224 px have the mean colours (1,0,0), (.5,.5,0) and (0,1,0)."""
    found = examine(Made(lambda images: images.mean((2, 3))), two_colours())
    assert (found.parameters, found.crops, found.embed_dim) == (77, 3, 3)
    assert found.map_shapes == ((3, 14, 14),)
    assert found.dead_channels == 1
    assert found.mean == pytest.approx(3 / 9)
    # squared deviations of (1,0,0, .5,.5,0, 0,1,0) from 1/3 sum to 2.5 - 9/9; eight degrees
    assert found.std == pytest.approx(math.sqrt(1.5 / 8))
    assert found.norm_range == pytest.approx((math.sqrt(0.5), 1))
    # red and green 0, either with their mixture sqrt(1/2)
    assert found.between_crops == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3)
    assert found.with_flip == pytest.approx(1)
    # the colours of the left half only: red, red, green; mirrored red, green, green
    half = examine(Made(lambda images: images[..., :112].mean((2, 3))), two_colours())
    assert half.with_flip == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("embed", "said"),
    [
        (lambda images: images.mean((2, 3)) * math.nan, "embeddings of the encoder hold 18 values"),
        (lambda images: 1 / images[:, 2].mean((1, 2))[:, None], "hold 6 values that are not fin"),
        (lambda images: torch.ones(len(images), 5), "the same embedding for 3 different crops"),
        (lambda images: torch.zeros(len(images), 5), "the same embedding for 3 different crops"),
    ],
)
def test_broken_embeddings_are_an_error(embed: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(RunError, match=said):
        examine(Made(embed), two_colours())


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((224, 335), "335 x 224 px holds no two crops of 224 px"),
        ((100, 900), "900 x 100 px holds no two"),
        ((448, 448), "the same content everywhere"),
    ],
)
def test_images_that_tell_nothing_are_refused(shape: tuple[int, int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        examine(Made(lambda images: images.mean((2, 3))), np.zeros((*shape, 3), np.uint8))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(60, 250, (12, 20, 3), np.uint8))
    path = tmp_path / "photo.png"
    coarse.resize((400, 240)).save(path)
    return path


def test_check_says_what_was_loaded(photo: Path, tmp_path: Path, celltyper_command: Run) -> None:
    words = ("encoders", "check", "vit_tiny_patch16", "--image", photo, "--device", "cpu")
    code, out, err = celltyper_command(*words)
    assert (code, out) == (2, "")
    assert "run 'celltyper encoders fetch vit_tiny_patch16' or pass --weights PATH" in err
    encoder = load_encoder("vit_tiny_patch16", weights="random", seed=1)
    tensors = {k.removeprefix("model."): v for k, v in _inner(encoder).state_dict().items()}
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(tensors, folder / "vit_tiny_patch16.safetensors")
    code, out, err = celltyper_command(*words, "--weights", folder)
    text = " ".join(out.split())
    assert (code, err) == (0, "")
    assert f"weights {folder / 'vit_tiny_patch16.safetensors'} commit unknown" in text
    assert "parameters 5.5 million" in text
    assert "feature maps 192 x 14 x 14, 192 x 14 x 14, 192 x 14 x 14, 192 x 14 x 14" in text
    assert "embedding 192 values, 0 of them dead" in text
    save_file(
        {k: torch.full_like(v, math.nan) for k, v in tensors.items()},
        folder / "vit_tiny_patch16.safetensors",
    )
    code, out, err = celltyper_command(*words, "--weights", folder)
    assert (code, out) == (1, "")
    assert "values that are not finite" in err
    assert err.count("\n") == 1


def _inner(encoder: nn.Module) -> nn.Module:
    return next(m for m in encoder.modules() if hasattr(m, "patch_embed"))


# ---------------------------------------------------------------- --weights


def test_weights_of_train_infer_and_eval(
    made_data: Path, tmp_path: Path, celltyper_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with an odd name is written into the run as an absolute path; a moved one is given
    to infer and eval."""
    monkeypatch.chdir(tmp_path)
    encoder = load_encoder("vit_tiny_patch16", weights="random", seed=1)
    tensors = {k.removeprefix("model."): v for k, v in _inner(encoder).state_dict().items()}
    folder = Path("weights: 1")
    folder.mkdir()
    save_file(tensors, folder / "vit_tiny_patch16.safetensors")
    settings = ["encoder.name=vit_tiny_patch16", f"data.root={made_data}", "data.tile=64"]
    settings += ["train.steps=2", "train.batch_size=2", "train.warmup=1", "infer.overlap=16"]
    settings += ["train.validate_every=2"]
    words = [word for setting in settings for word in ("--set", setting)]
    train = ("train", "linear", "-o", "run", *words)
    code, _, err = celltyper_command(*train, "--weights", "elsewhere")
    assert (code, Path("run").exists()) == (2, False)
    assert "weights file elsewhere does not exist" in err
    code, _, err = celltyper_command(*train, "--weights", folder)
    assert code == 0, err
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["encoder"]["weights"] == str(folder.absolute())
    moved = folder.rename("moved")
    image = next((made_data / "test" / "images").iterdir())
    infer = ("infer", image, "-m", "run", "-o", "out", "--mpp", "0.5")
    code, _, err = celltyper_command(*infer)
    assert code == 2
    assert f"{folder.absolute()} does not exist" in err
    assert celltyper_command(*infer, "--weights", moved).code == 0
    score = ("eval", "run", made_data / "test", "--resamples", "0")
    code, _, err = celltyper_command(*score, "--weights", moved)
    assert code == 0, err
    assert json.loads(Path("run/eval/metrics.json").read_text())
    other = {k: v + 1 if k == "norm.bias" else v for k, v in tensors.items()}
    save_file(other, "other.safetensors")
    code, _, err = celltyper_command(*infer, "--overwrite", "--weights", "other.safetensors")
    assert code == 2
    assert "pass the right file with --weights" in err


def test_weights_are_for_a_model_only(celltyper_command: Run, tmp_path: Path) -> None:
    words = ("eval", "--pred", tmp_path, "--ref", tmp_path, "--weights", "x")
    code, _, err = celltyper_command(*words)
    assert code == 2
    assert "--weights is for RUN and DATA: --pred runs no model" in err
