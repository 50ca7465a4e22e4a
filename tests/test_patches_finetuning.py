"""Networks of patch mode that are trained by gradient: heads, adapted encoders, resuming."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

import celltyper.classification.finetuning as finetuning
from celltyper.classification.config import PatchConfig
from celltyper.classification.embedding import Embedder
from celltyper.classification.finetuning import TrainingWindows
from celltyper.classification.model import load_patch_model, load_patch_models
from celltyper.classification.network import AttentionHead
from celltyper.classification.preparing import open_labelled
from celltyper.classification.training import train_patches
from celltyper.config import parse_config
from celltyper.encoders import load_encoder
from celltyper.errors import CheckpointError, ConfigError, TrainingError
from celltyper.patches.windows import read_patch
from celltyper.protocols import load_protocol, run_patch_protocol
from celltyper.protocols.patches import read_typed

ENCODER = "vit_small_patch14_dinov2"
SHORT = ("train.steps=4", "train.batch_size=4", "train.save_every=2", "train.warmup=0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Dark and bright squares of 42 px, on eight slides."""
    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    rows = ["file,slide,label"]
    for i in range(32):
        label = ("dark", "light")[i % 2]
        pixels = rng.normal((90, 190)[i % 2], 40, (42, 42, 3)).clip(0, 255).astype(np.uint8)
        (root / label).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / label / f"{i}.png")
        rows.append(f"{label}/{i}.png,s{i // 4},{label}")
    (root / "made.csv").write_text("\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLTYPER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield root


def config_of(root: Path, *overrides: str) -> PatchConfig:
    values: dict[str, Any] = {
        "data": {"root": str(root / "made.csv"), "positive": "dark", "size": 28},
        "encoder": {"name": ENCODER, "weights": "twin"},
        "view": {"input": 28},
        "head": {"name": "linear"},
    }
    return parse_config(values, [*SHORT, *overrides], PatchConfig)


def start(root: Path, output: Path, *overrides: str, **options: Any) -> Path:
    config = config_of(root, *overrides)
    return train_patches(config, output, device="cpu", progress=False, **options)


def facts(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def kept(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("encoder.adapt=frozen",), {"head"}),
        (("encoder.adapt=lora", "encoder.lora.rank=2"), {"head", "encoder.lora"}),
        (("encoder.adapt=last-n", "encoder.last_n=1"), {"head", "encoder.trained"}),
        (("encoder.adapt=full",), {"head", "encoder"}),
        (("encoder.adapt=lora", "head.name=attention"), {"head", "encoder.lora"}),
        (("encoder.adapt=norm", "encoder.options.depth=4"), {"head", "encoder.trained"}),
    ],
)
def test_training_changes_what_it_says_and_the_file_gives_it_back(
    overrides: tuple[str, ...], parts: set[str], made: Path, tmp_path: Path
) -> None:
    run = start(made, tmp_path / "run", *overrides)
    assert set(facts(run)["training"]["trainability"]["changed"]) == parts
    table = open_labelled(config_of(made).data, progress=False)
    model = load_patch_model(run)
    found = model.probabilities(table, progress=False)
    assert found.shape == (32, 2)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    # by hand: the network on the windows, one after the other
    for i in (0, 31):
        window = read_patch(table, i, size=28)
        image = torch.from_numpy(window).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            own = model.predictor(image).softmax(dim=1)  # type: ignore[operator]
        np.testing.assert_allclose(found[i], own[0], atol=1e-6)


def test_only_what_was_trained_is_written(made: Path, tmp_path: Path) -> None:
    run = start(made, tmp_path / "run", "encoder.adapt=last-n", "encoder.last_n=1")
    names = set(kept(run))
    assert {n for n in names if not n.startswith(("head.", "encoder."))} == set()
    inner = {n.split("blocks.")[1][0] for n in names if "blocks." in n}
    last = len(load_encoder(ENCODER, weights="twin").encoder.model.blocks) - 1
    assert inner == {str(last)}


def test_a_linear_head_starts_from_the_probe(made: Path, tmp_path: Path) -> None:
    """A rate of nearly nothing leaves the logistic regression on the same embeddings."""
    tiny = ("train.lr=1e-12", "train.weight_decay=0", "train.ema=0", "encoder.adapt=lora")
    run = start(made, tmp_path / "run", *tiny, "train.steps=1")
    probe = start(made, tmp_path / "probe", "head.name=logistic", *_plain())
    table = open_labelled(config_of(made).data, progress=False)
    own, other = (load_patch_model(r).probabilities(table, progress=False) for r in (run, probe))
    np.testing.assert_allclose(own, other, atol=5e-3)
    assert np.ptp(own[:, 0]) > 0.1


def _plain() -> list[str]:
    """Settings of `SHORT` back at their defaults, which a probe wants."""
    train = PatchConfig().train
    names = [text.split("=")[0].removeprefix("train.") for text in SHORT]
    return [f"train.{name}={getattr(train, name)}" for name in names]


def test_training_makes_the_loss_smaller(made: Path, tmp_path: Path) -> None:
    rates = ("train.steps=40", "train.save_every=10", "train.lr=1e-3", "head.name=attention")
    run = start(made, tmp_path / "run", *rates, "encoder.adapt=full", "augment.hed_sigma=0")
    rows = [line.split(",") for line in (run / "history.csv").read_text().split()[1:]]
    assert float(rows[-1][1]) < 0.5 * float(rows[0][1])
    table = open_labelled(config_of(made).data, progress=False)
    called = load_patch_model(run).probabilities(table, progress=False).argmax(axis=1)
    assert (called == table.labels).mean() > 0.9


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_a_killed_training_goes_on_to_the_same_result(
    adapt: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = (f"encoder.adapt={adapt}",)
    whole = start(made, tmp_path / "whole", *adapted)
    plain, calls = finetuning._save, []

    def killing(*arguments: Any) -> None:
        plain(*arguments)
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "_save", killing)
    with pytest.raises(KeyboardInterrupt):
        start(made, tmp_path / "killed", *adapted)
    monkeypatch.undo()
    assert len(calls) == 1
    assert not (tmp_path / "killed" / "run.json").exists()
    killed = start(made, tmp_path / "killed", *adapted, resume=True)
    one, two = kept(whole), kept(killed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (whole / "history.csv").read_text() == (killed / "history.csv").read_text()


def test_a_run_is_a_function_of_its_seed(made: Path, tmp_path: Path) -> None:
    attention = ("head.name=attention", "encoder.adapt=lora")
    runs = [
        start(made, tmp_path / str(i), *attention, f"seed={s}") for i, s in enumerate((1, 1, 2))
    ]
    first, same, other = (kept(run)["head.score.weight"] for run in runs)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_every_window_is_shown_once_before_any_is_shown_twice(made: Path) -> None:
    table = open_labelled(config_of(made).data, progress=False)
    still = [f"augment.{k}={v}" for k, v in STILL.items()]
    config = config_of(made, *still)
    targets = np.eye(2)[table.labels]
    rows = np.arange(0, 32, 3)
    windows = TrainingWindows(table, rows, targets, np.arange(32.0), config, seed=5)
    once = [windows[i] for i in range(len(rows))]
    assert sorted(float(item["weight"]) for item in once) == rows.tolist()
    again = [float(windows[i]["weight"]) for i in range(len(rows), 2 * len(rows))]
    assert sorted(again) == rows.tolist()
    assert again != [float(item["weight"]) for item in once]
    for item in once:
        i = int(item["weight"])
        window = read_patch(table, i, size=28)
        np.testing.assert_allclose(item["image"].permute(1, 2, 0) * 255, window, atol=1e-4)
        np.testing.assert_array_equal(item["target"], targets[i])


STILL = {
    "dihedral": "false",
    "affine_probability": 0,
    "hed_sigma": 0,
    "hed_bias": 0,
    "color": 0,
    "blur": 0,
    "noise": 0,
}


def test_attention_is_the_published_formula() -> None:
    torch.manual_seed(0)
    head = AttentionHead(6, 3, width=4).double()

    class Tokens:
        def tokens(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
            return None, images

    maps = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    found = head(Tokens(), maps)  # type: ignore[arg-type]
    for b in range(2):
        scores, tokens = [], []
        for token in maps[b].reshape(6, 6).T:
            h = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
            gate = 1 / (1 + torch.exp(-(head.gate.weight @ h + head.gate.bias)))
            value = torch.tanh(head.value.weight @ h + head.value.bias)
            scores.append(head.score.weight[0] @ (value * gate) + head.score.bias[0])
            tokens.append(h)
        shares = torch.exp(torch.stack(scores)) / torch.exp(torch.stack(scores)).sum()
        pooled = sum(share * token for share, token in zip(shares, tokens, strict=True))
        expected = head.linear.weight @ pooled + head.linear.bias
        torch.testing.assert_close(found[b], expected)


def test_votes_and_agreement_reach_the_loss(made: Path, tmp_path: Path) -> None:
    """Without experts votes are the labels, so that both settings change nothing."""
    plain = start(made, tmp_path / "a", "encoder.adapt=frozen")
    votes = start(made, tmp_path / "b", "encoder.adapt=frozen", "loss.targets=votes")
    name = "head.linear.weight"
    torch.testing.assert_close(kept(plain)[name], kept(votes)[name])
    none = start(made, tmp_path / "c", "encoder.adapt=frozen", "loss.class_weights=sqrt")
    torch.testing.assert_close(kept(plain)[name], kept(none)[name])  # classes are as frequent


def test_a_loss_that_is_not_finite_stops_the_training(made: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss is .* at step \d; lower train.lr"):
        start(made, tmp_path / "run", "train.lr=1e30", "train.clip=1e30", "encoder.adapt=full")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("head.name=logistic", *_plain(), "encoder.adapt=lora"), "take head.name=linear"),
        (("head.name=logistic",), "train has no effect on head 'logistic'"),
        (("head.name=knn", *_plain(), "augment.blur=0"), "augment has no effect on head 'knn'"),
        (("head.name=attention", "view.pool=mean"), "view.pool has no effect on head 'attention'"),
    ],
)
def test_settings_without_effect_are_refused(
    overrides: tuple[str, ...], said: str, made: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(made, *overrides)


def test_unknown_options_of_a_head_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"head 'linear' does not take head\.options"):
        start(made, tmp_path / "run", "head.options.width=3")


def test_a_network_of_other_weights_is_refused(made: Path, tmp_path: Path) -> None:
    run = start(made, tmp_path / "run", "encoder.adapt=lora")
    other = load_encoder(ENCODER, weights="twin", seed=9)
    with pytest.raises(CheckpointError, match="was trained on other weights"):
        load_patch_model(run, embedder=Embedder(other, "card", 28))
    whole = start(made, tmp_path / "whole", "encoder.adapt=full")
    with pytest.raises(CheckpointError, match="holds the whole encoder"):
        load_patch_model(whole, encoder_weights="somewhere.safetensors")


def protocol(made: Path, output: Path, **options: Any) -> Path:
    text = output.parent / "two.yaml"
    text.write_text("folds: 2\n")
    config = config_of(made, "encoder.adapt=lora")
    return run_patch_protocol(
        config, load_protocol(text), output, device="cpu", progress=False, **options
    )


def test_folds_are_networks_of_their_own(made: Path, tmp_path: Path) -> None:
    output = protocol(made, tmp_path / "cv")
    table = open_labelled(config_of(made).data, progress=False)
    models = load_patch_models(output)
    first, second = (model.probabilities(table, progress=False) for model in models)
    assert np.abs(first - second).max() > 1e-6
    for fold, own in (("fold-1", first), ("fold-2", second)):
        typed = read_typed(output / fold / "scores.npz")
        rows = [table.names.index(name) for name in typed.names]
        np.testing.assert_allclose(typed.probabilities, own[rows], atol=1e-6)
        alone = load_patch_model(output / fold)
        np.testing.assert_allclose(alone.probabilities(table, progress=False), own)


def test_a_run_in_the_hands_of_another_process_is_left_to_it(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = protocol(made, tmp_path / "whole")
    output = tmp_path / "cv"
    (output / "fold-1").mkdir(parents=True)
    text = (whole / "protocol.json").read_text()
    (output / "protocol.json").write_text(text)
    with FileLock(output / "fold-1" / ".lock"), caplog.at_level(logging.INFO, "celltyper"):
        protocol(made, output, resume=True)
    assert "1 run is in the hands of other processes" in caplog.text
    assert not (output / "fold-1" / "scores.npz").exists()
    assert (output / "fold-2" / "scores.npz").exists()
    protocol(made, output, resume=True)
    for fold in ("fold-1", "fold-2"):
        one, two = kept(whole / fold), kept(output / fold)
        assert all(torch.equal(one[name], two[name]) for name in one)
