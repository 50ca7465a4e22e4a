"""Every recipe trains one step, and those of a published study hold its published values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from celltyper.classification.config import PatchConfig
from celltyper.classification.model import load_patch_model
from celltyper.classification.preparing import open_labelled
from celltyper.classification.training import train_patches
from celltyper.config import Loss, load_config, recipes, task_of
from celltyper.decoders import build_decoder
from celltyper.errors import ConfigError
from celltyper.loop import class_weights
from celltyper.models import build_model
from celltyper.training import train

SMALL = (
    "encoder.weights=twin",
    "data.tile=56",
    "train.steps=1",
    "train.batch_size=2",
    "train.warmup=0",
    "train.accumulate=1",
    "infer.tile=56",
    "infer.overlap=14",
)

FROZEN = ("pathocellbench-linear", "pathocellbench-unetr", "pathocellbench-dpt")
STUDY = (*FROZEN, "pathocellbench-baseline")

# The frozen encoders of PathoCellBench.
ENCODERS = (
    "uni",
    "uni2-h",
    "phikon-v2",
    "virchow",
    "virchow2",
    "prov-gigapath",
    "h-optimus-0",
    "h-optimus-1",
    "h0-mini",
    "titan-v",
    "musk",
)


CELLS = sorted(name for name in recipes() if task_of(name) == "cells")


@pytest.mark.parametrize("name", CELLS)
def test_recipe_trains_one_step(name: str, made_data: Path, tmp_path: Path) -> None:
    small = SMALL
    if load_config(name).start is not None:
        # the network is that of the model to start from
        small = tuple(setting for setting in SMALL if not setting.startswith("encoder."))
    config = load_config(name, [f"data.root={made_data}", *small])
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    facts = json.loads((run / "run.json").read_text())
    assert facts["steps"] == 1
    assert facts["trainability"]["adapt"] == config.encoder.adapt


PATCHES = sorted(name for name in recipes() if task_of(name) == "patches")


@pytest.fixture(scope="module")
def made_patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six atypical and six normal patches of 72 px, of four slides."""
    root, rng = tmp_path_factory.mktemp("patches"), np.random.default_rng(0)
    rows = ["file,slide,label"]
    for i in range(12):
        label = ("Atypical", "Normal")[i % 2]
        (root / label).mkdir(exist_ok=True)
        pixels = rng.normal((110, 170)[i % 2], 30, (72, 72, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / label / f"{i}.png")
        rows.append(f"{label}/{i}.png,s{i // 3},{label}")
    (root / "patches.csv").write_text("\n".join(rows) + "\n")
    return root / "patches.csv"


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        *((name, None) for name in PATCHES),
        ("amibr-baseline", "vit_large_patch16"),
        ("amibr-baseline", "swin_base_patch4_window7"),
        ("amibr-lora", "uni2-h"),
        ("midog-lora", "h-optimus-1"),
    ],
)
def test_patch_recipe_trains_one_step(
    name: str,
    encoder: str | None,
    made_patches: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CELLTYPER_CACHE", str(tmp_path / "cache"))
    small = [f"data.root={made_patches}", "encoder.weights=twin"]
    config = load_config(name, small, PatchConfig)
    if encoder:
        small.append(f"encoder.name={encoder}")
    if config.head.by_gradient:
        if config.encoder.adapt == "last-n":
            small.append("encoder.last_n=2")  # a twin has but four blocks
        small += ["train.steps=2", "train.batch_size=4", "train.warmup=0"]
    if config.data.size and config.data.size > 72:
        small.append("data.size=64")
    config = load_config(name, small, PatchConfig)
    run = train_patches(config, tmp_path / "run", device="cpu", progress=False)
    model = load_patch_model(run)
    table = open_labelled(config.data, progress=False)
    found = model.probabilities(table, progress=False)
    assert found.shape == (12, 2)
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_study_of_atypical_mitoses_is_as_published() -> None:
    config = load_config("amibr-lora", [], PatchConfig)
    lora = config.encoder.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (8, 16, 0.3, "attention+mlp")
    for name in ("amibr-lora", "amibr-baseline"):
        train = load_config(name, [], PatchConfig).train
        assert (train.lr, train.weight_decay, train.batch_size) == (1e-4, 1e-5, 8)
    assert load_config("amibr-baseline", [], PatchConfig).encoder.adapt == "full"


def test_study_of_look_alikes_is_as_published() -> None:
    lora = load_config("midog-lora", [], PatchConfig).encoder.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (16, 16, 0.1, "attention")


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "examples").glob("*.yaml")))
def test_example_config_trains_one_step(
    file: Path, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(file.parent)
    config = load_config(file, [f"data.root={made_data}", *SMALL])
    assert train(config, tmp_path / "run", device="cpu", progress=False).is_dir()


def test_docs_list_every_recipe() -> None:
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    assert [name for name in recipes() if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize("name", STUDY)
def test_pathocellbench_optimises_as_published(name: str) -> None:
    config = load_config(name)
    assert config.data.tile == 224
    assert config.data.balance == 1
    settings = config.train
    assert (settings.lr, settings.encoder_lr, settings.weight_decay) == (3e-5, None, 0.03)
    assert (settings.batch_size * settings.accumulate, settings.clip) == (64, 2.0)
    assert (settings.warmup, settings.validate_every, settings.metric) == (1000, 200, "macro_f1")
    assert 10_000 <= settings.steps <= 20_000
    moves = config.augment
    assert (moves.dihedral, moves.rotate, moves.shift, moves.scale) == (True, 180, 0.1, 0.2)
    assert (moves.hed_sigma, moves.hed_bias) == (0.025, 0.05)
    assert (moves.color, moves.blur, moves.noise) == (0, 0, 0)
    # Uniform noise of [-1, 1] has a deviation of 1 / sqrt(3); a Gaussian of sigma 32 divides it by
    # 2 sqrt(pi) sigma, alpha 63 multiplies it.
    displacement = 63 / math.sqrt(3) / (2 * math.sqrt(math.pi) * 32)
    assert moves.elastic == pytest.approx(displacement, rel=0.1)


@pytest.mark.parametrize("name", FROZEN)
def test_pathocellbench_loss_is_cross_entropy(name: str) -> None:
    loss = load_config(name).loss
    assert (loss.cross_entropy, loss.label_smoothing, loss.dice, loss.focal) == (1, 0.05, 0, 0)


def test_pathocellbench_baseline_loss_is_focal() -> None:
    config = load_config("pathocellbench-baseline")
    loss = config.loss
    assert (loss.cross_entropy, loss.dice, loss.focal, loss.focal_gamma) == (0, 0, 1, 2)
    assert config.encoder.adapt == "full"


@pytest.mark.parametrize("name", STUDY)
def test_pathocellbench_class_weights_are_corrected_and_the_published_an_option(name: str) -> None:
    """Pixel counts of ratio 153, as between the classes of the study."""
    counts = np.array([153_000, 15_300, 1_000])

    def ratio(loss: Loss) -> float:
        weights = class_weights(loss, counts)
        assert weights is not None
        return float(weights[2] / weights[0])

    assert ratio(load_config(name).loss) == pytest.approx(153)
    shares = 1 / counts / (1 / counts).sum()
    published = ratio(load_config(name, ["loss.class_weights=published"]).loss)
    assert published == pytest.approx(math.exp(shares[2] - shares[0]))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", FROZEN)
def test_pathocellbench_decoder_fits_every_encoder_of_the_study(name: str, encoder: str) -> None:
    small = ("encoder.weights=twin", "decoder.options.width=8")
    config = load_config(name, [f"encoder.name={encoder}", *small])
    model = build_model(config, ("a", "b"), None)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    with torch.inference_mode():
        assert model.eval()(torch.rand(1, 3, 56, 56))["phenotype"].shape == (1, 3, 56, 56)


def test_pathocellbench_unetr_has_the_published_channels() -> None:
    decoder = load_config("pathocellbench-unetr").decoder
    with torch.device("meta"):
        built = build_decoder(decoder.name, [1536] * 4, 14, **decoder.options)
    layers = [m for m in built.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert {layer.out_channels for layer in layers} == {64, 128, 256, 512}
    assert built.out_channels == 64


def test_pathocellbench_linear_probe_has_no_bottleneck() -> None:
    """A width below the number of output maps would make a probe of less than full rank."""
    config = load_config("pathocellbench-linear", ["encoder.weights=twin"])
    model = build_model(config, [f"class{i}" for i in range(14)], None)
    assert sum(spec.channels for spec in model.maps.values()) <= model.decoder.out_channels


@pytest.mark.parametrize("name", FROZEN)
def test_pathocellbench_trains_on_kept_features_of_augmented_views(name: str) -> None:
    config = load_config(name, ["encoder.cache=8"])
    assert config.encoder.cache == 8
    assert config.augment == load_config(name).augment
    with pytest.raises(ConfigError, match="leave it out"):
        load_config(name, ["encoder.cache=1"])
