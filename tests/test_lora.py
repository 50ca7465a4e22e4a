"""Low-rank adapters: what they compute, which layers they touch, and peft's own format."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from celltyper.encoders import load_encoder
from celltyper.encoders.adapt import adapt_encoder
from celltyper.encoders.build import build_timm_model
from celltyper.encoders.cards import load_card
from celltyper.encoders.lora import add_lora, load_lora, merge_lora, read_adapter, save_lora
from celltyper.errors import CheckpointError, ConfigError

VIT = {
    "attention": {"attn.qkv"},
    "attention+output": {"attn.qkv", "attn.proj"},
    "attention+mlp": {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"},
}


def adapted_layers(module: nn.Module) -> set[str]:
    names = [name for name, _ in module.named_parameters() if ".lora_A" in name]
    return {name.rpartition(".lora_A")[0] for name in names}


def shake(module: nn.Module) -> None:
    """Give the zero half of every adapter values, so that it changes something."""
    loud(module)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "magnitude" in name:
                parameter.mul_(1.3)


def loud(module: nn.Module) -> None:
    """Layer scales of 1e-5, with which random blocks do next to nothing, become 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(".gamma"):
                parameter.fill_(1)


@pytest.mark.parametrize("targets", VIT)
@pytest.mark.parametrize("name", ["vit_tiny_patch16", "virchow2", "vit_small_patch16_dinov3"])
def test_lora_touches_named_layers_of_the_blocks_only(name: str, targets: str) -> None:
    plain = load_encoder(name, "twin", "full")
    encoder = load_encoder(name, "twin", "lora", lora={"targets": targets, "rank": 2})
    assert adapted_layers(encoder.model) == {
        f"blocks.{i}.{layer}" for i in range(4) for layer in VIT[targets]
    }
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in encoder.named_parameters() if ".lora_" in n}
    images = torch.rand(2, 3, 40, 32)
    for found, expected in zip(encoder(images), plain(images), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("targets", VIT)
def test_lora_fits_swin(targets: str) -> None:
    encoder = load_encoder("swin_base_patch4_window7", "twin", "lora", lora={"targets": targets})
    found = adapted_layers(encoder.model)
    assert {re.sub(r"\d+", "N", n, count=2) for n in found} == {
        f"layers.N.blocks.N.{layer}" for layer in VIT[targets]
    }
    assert len(found) == len(VIT[targets]) * sum(len(s.blocks) for s in encoder.model.layers)


def test_lora_fits_the_mlps_of_convnext_only() -> None:
    name = "convnextv2_base"
    encoder = load_encoder(name, "twin", "lora", lora={"targets": "attention+mlp"})
    found = {re.sub(r"\d+", "N", n, count=2) for n in adapted_layers(encoder.model)}
    assert found == {"stages.N.blocks.N.mlp.fc1", "stages.N.blocks.N.mlp.fc2"}
    with pytest.raises(ConfigError, match=r"has no attention; use 'attention\+mlp'"):
        load_encoder(name, "twin", "lora")
    with pytest.raises(ConfigError, match="use adapt 'last-n', 'norm' or 'full'"):
        load_encoder("efficientnetv2_m", "twin", "lora")


class Split(nn.Module):
    """Query, key and value as layers of their own, in the names of EVA and of BEiT-3."""

    def __init__(self) -> None:
        super().__init__()
        attn = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q_proj", "k_proj", "v_proj", "proj")})
        mlp = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("fc1_g", "fc1_x", "fc2")})
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": attn, "mlp": mlp})])
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(8, 8)})


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("attention", {"attn.q_proj", "attn.k_proj", "attn.v_proj"}),
        ("attention+output", {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj"}),
    ],
)
def test_lora_fits_split_projections(targets: str, layers: set[str]) -> None:
    encoder = add_lora(Split(), targets=targets)
    assert adapted_layers(encoder) == {f"blocks.0.{layer}" for layer in layers}
    everything = add_lora(Split(), targets="attention+mlp")
    assert not any(name.startswith("patch_embed") for name in adapted_layers(everything))
    assert len(adapted_layers(everything)) == 7


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_adapters_take_part_where_timm_reads_the_weights_itself(name: str) -> None:
    """EVA and BEiT with biases of query and value apart call ``F.linear`` on ``qkv.weight``."""
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "num_classes": 0}
    model = timm.create_model(name, **small).eval()
    patch = model.patch_embed.patch_size[0]
    images = torch.rand(1, 3, 32 // patch * patch, 32 // patch * patch)
    model = timm.create_model(name, **small | {"img_size": images.shape[-1]}).eval()
    before = model.forward_features(images)
    add_lora(model, targets="attention")
    torch.testing.assert_close(model.forward_features(images), before)
    shake(model)
    assert not torch.allclose(model.forward_features(images), before, atol=1e-3)


def test_lora_layers_by_their_full_names() -> None:
    encoder = nn.ModuleDict({"project": nn.Linear(8, 8), "conv": nn.Conv2d(3, 3, 1)})
    encoder["other"] = nn.ModuleDict({"project": nn.Linear(8, 8)})
    add_lora(encoder, targets=["project"])
    assert adapted_layers(encoder) == {"project"}
    with pytest.raises(ConfigError, match=r"\['conv'\] are no linear layers"):
        add_lora(encoder, targets=["conv"])
    with pytest.raises(ConfigError, match="no such linear layers"):
        add_lora(nn.Linear(3, 3))


def test_lora_adds_scaled_low_rank_product() -> None:
    encoder = load_encoder("uni", "twin", "lora", lora={"rank": 2, "alpha": 6, "dropout": 0.4})
    layer = encoder.model.blocks[2].attn.qkv
    base = layer.base_layer.weight.detach().clone()
    shake(encoder)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.rand(5, 48)
    expected = x @ (base + 6 / 2 * b @ a).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected)
    merge_lora(encoder)
    torch.testing.assert_close(encoder.model.blocks[2].attn.qkv.weight, base + 3 * b @ a)


def test_dora_scales_every_row_to_a_trained_length() -> None:
    encoder = load_encoder("uni", "twin", "dora", lora={"rank": 2, "alpha": 6})
    layer = encoder.model.blocks[2].attn.qkv
    base = layer.base_layer.weight.detach().clone()
    length = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(length, base.norm(dim=1))
    shake(encoder)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    moved = base + 3 * b @ a
    expected = length[:, None] * moved / moved.norm(dim=1, keepdim=True)
    x = torch.rand(5, 48)
    torch.testing.assert_close(layer(x), x @ expected.T + layer.base_layer.bias)
    merge_lora(encoder)
    torch.testing.assert_close(encoder.model.blocks[2].attn.qkv.weight, expected)


@pytest.mark.parametrize("adapt", ["lora", "dora"])
@pytest.mark.parametrize("name", ["uni", "virchow2", "musk", "swin_base_patch4_window7"])
def test_merged_equals_unmerged(name: str, adapt: str) -> None:
    lora = {"targets": "attention+mlp", "rank": 2}
    encoder = load_encoder(name, "twin", adapt, lora=lora)  # type: ignore[arg-type]
    names = [n for n, _ in load_encoder(name, "twin").named_parameters()]
    images = torch.rand(1, 3, 64, 64)
    loud(encoder)
    untrained = encoder(images)[-1]
    shake(encoder)
    before = encoder(images)
    assert not torch.allclose(before[-1], untrained, atol=1e-2)
    merge_lora(encoder)
    for found, expected in zip(encoder(images), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [n for n, _ in encoder.named_parameters()] == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank >= 1"),
        ({"dropout": 1.0}, "dropout < 1"),
        ({"alpha": 0}, "alpha > 0"),
        ({"targets": "atention"}, "did you mean 'attention'"),
        ({"ranks": 3}, "unknown lora option 'ranks'; did you mean 'rank'"),
    ],
)
def test_wrong_lora_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_encoder("uni", "twin", "lora", lora=options)


def twin_of_timm(name: str) -> nn.Module:
    """The timm model that the twin is made of, with the same random weights."""
    model: nn.Module = build_timm_model(load_card(name), twin=True)
    state = load_encoder(name, "twin", "full").model.state_dict()
    model.load_state_dict(state)
    loud(model)
    return model.eval()


@pytest.mark.parametrize("adapt", ["lora", "dora"])
@pytest.mark.parametrize("name", ["virchow2", "swin_base_patch4_window7"])
def test_peft_loads_what_is_saved(name: str, adapt: str, tmp_path: Path) -> None:
    lora = {"targets": "attention+mlp", "rank": 2, "alpha": 6}
    encoder = load_encoder(name, "twin", adapt, lora=lora)  # type: ignore[arg-type]
    shake(encoder)
    save_lora(encoder, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    theirs = PeftModel.from_pretrained(twin_of_timm(name), str(tmp_path / "adapter")).eval()
    # of which the windows of 7 of a Swin need no filling up, which is not timm's
    images = torch.rand(2, 3, 224, 224)
    torch.testing.assert_close(theirs(images), encoder.model(images))
    assert not torch.allclose(theirs(images), twin_of_timm(name)(images), atol=1e-2)
    again = load_encoder(name, "twin", adapt, lora={"adapter": tmp_path / "adapter"})  # type: ignore[arg-type]
    loud(again)
    torch.testing.assert_close(again(images)[-1], encoder(images)[-1])
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_lora(load_encoder(name, "twin"), tmp_path / "none")


def made_by_peft(folder: Path, **options: object) -> nn.Module:
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["qkv", "fc2"]} | options)  # type: ignore[arg-type]
    model = get_peft_model(twin_of_timm("uni"), config)  # type: ignore[arg-type]
    shake(model)
    model.save_pretrained(str(folder))
    return model.eval()


@pytest.mark.parametrize("adapt", ["lora", "dora"])
def test_training_starts_from_an_adapter_that_peft_made(adapt: str, tmp_path: Path) -> None:
    theirs = made_by_peft(tmp_path / "theirs", use_dora=adapt == "dora")
    lora = {"adapter": tmp_path / "theirs", "dropout": 0.5}
    encoder = load_encoder("uni", "twin", adapt, lora=lora)  # type: ignore[arg-type]
    loud(encoder)
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(encoder.model(images), theirs(images))
    assert not torch.allclose(theirs(images), twin_of_timm("uni")(images), atol=1e-2)
    trained = [p for n, p in encoder.named_parameters() if p.requires_grad]
    assert len(trained) == 8 * (3 if adapt == "dora" else 2)
    assert encoder.model.blocks[0].attn.qkv.lora_dropout["default"].p == 0.5
    save_lora(encoder, tmp_path / "ours")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("ours", "theirs")]
    mine, other = map(load_file, files)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    encoder = load_encoder("uni", "twin", "full")
    with pytest.raises(
        CheckpointError, match=r"no adapter in .*/none: it must hold adapter_config"
    ):
        read_adapter(tmp_path / "none")
    made_by_peft(tmp_path / "a")
    with pytest.raises(ConfigError, match="is made by lora: use adapt 'lora'"):
        adapt_encoder(encoder, "dora", lora={"adapter": tmp_path / "a"})
    with pytest.raises(ConfigError, match="lora rank is 4, but the adapter in"):
        adapt_encoder(encoder, "lora", lora={"adapter": tmp_path / "a", "rank": 4})
    with pytest.raises(ConfigError, match="are no linear layers of the encoder"):
        load_lora(load_encoder("swin_base_patch4_window7", "twin", "full"), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"lora_A.weight is \(3, 48\), expected \(3, "):
        load_lora(nn.ModuleDict({"blocks": other_blocks()}), tmp_path / "a")
    made_by_peft(tmp_path / "b", use_rslora=True, bias="all")
    with pytest.raises(CheckpointError, match=r"no plain LoRA or DoRA \(use_rslora, bias\)"):
        read_adapter(tmp_path / "b")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match=r"no plain LoRA or DoRA \(IA3\)"):
        read_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged or was not written by peft"):
        read_adapter(tmp_path / "a")


def other_blocks() -> nn.ModuleList:
    """Blocks whose layers have the names of a vision transformer's, and another width."""
    return nn.ModuleList(
        nn.ModuleDict(
            {
                "attn": nn.ModuleDict({"qkv": nn.Linear(24, 72)}),
                "mlp": nn.ModuleDict({"fc2": nn.Linear(96, 24)}),
            }
        )
        for _ in range(4)
    )
