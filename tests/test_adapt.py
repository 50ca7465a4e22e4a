"""Adaptation: what each mode trains, what stands still, and at which rate."""

from __future__ import annotations

import copy
import re
from typing import get_args

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from celltyper.config import Config, Encoder, parse_config
from celltyper.encoders import load_encoder
from celltyper.encoders.adapt import ADAPTS, adapt_encoder, freeze
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import ConfigError
from celltyper.optim import make_optimizer
from celltyper.testing import check_encoder


class Restless(nn.Module):
    """Everything that moves in training: dropout, norm statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = [8]
        self.patch_size = 4
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> list[Tensor]:
        rows, cols = -images.shape[2] % 4, -images.shape[3] % 4
        padded = nn.functional.pad(images, (0, cols, 0, rows), mode="replicate")
        return [self.drop(self.norm(self.conv(padded)))]


class Model(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Conv2d(encoder.channels[-1], 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images)[-1])


def test_frozen_stays_as_it_is_in_training() -> None:
    encoder = freeze(Restless())
    check_encoder(encoder)
    images = torch.rand(2, 3, 32, 32)
    before = encoder(images)[0]
    model = Model(encoder).train()
    assert not any(module.training for module in model.encoder.modules())
    assert model.decoder.training
    model(images).sum().backward()
    assert torch.equal(encoder(images)[0], before)
    assert not encoder(images.requires_grad_())[0].requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_copy_of_a_frozen_encoder_is_frozen_and_its_own() -> None:
    encoder = freeze(Restless())
    twin = copy.deepcopy(encoder).train()
    assert not any(module.training for module in twin.modules())
    with torch.no_grad():
        twin.encoder.conv.weight.zero_()
    assert fingerprint(twin) != fingerprint(encoder)


# names in the twin of a plain vision transformer with four blocks, by eye
PROMISED = {
    "frozen": r"$.",
    "lora": r"blocks\.\d\.attn\.qkv\.lora_[AB]\.default\.weight",
    "dora": r"blocks\.\d\.attn\.qkv\.(lora_[AB]|lora_magnitude_vector)\.default\.weight",
    "last-n": r"(blocks\.[23]|norm)\..*",
    "bias": r".*\.bias",
    "norm": r"(blocks\.\d\.norm[12]|norm)\.(weight|bias)",
    "full": r".*",
}


def test_modes_are_the_same_everywhere() -> None:
    assert set(PROMISED) == set(ADAPTS)
    assert get_args(Encoder.model_fields["adapt"].annotation) == ADAPTS


def gradients(encoder: nn.Module, model: nn.Module) -> tuple[set[str], set[str]]:
    """Names with a gradient that is not zero, of all names."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # zero at first, which makes the gradient of the other half zero
                parameter.normal_()
    sum((m * torch.randn_like(m)).sum() for m in encoder(torch.rand(2, 3, 64, 64))).backward()
    moved = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    return moved, {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("adapt", [a for a in ADAPTS if a != "frozen"])
def test_exactly_what_is_promised_gets_a_gradient(adapt: str) -> None:
    encoder = load_encoder("vit_tiny_patch16", "twin", adapt, last_n=2).train()  # type: ignore[arg-type]
    moved, names = gradients(encoder, encoder.model)
    expected = {name for name in names if re.fullmatch(PROMISED[adapt], name)}
    assert moved == expected
    assert expected
    flagged = {name for name, p in encoder.model.named_parameters() if p.requires_grad}
    assert flagged == expected


def last_block(model: nn.Module) -> tuple[str, nn.Module]:
    """Last block of a twin, and its name."""
    parts = [
        (name, module)
        for name, module in model.named_modules()
        if re.fullmatch(r"(layers|stages)\.\d+\.blocks\.\d+|blocks\.\d+(\.\d+)?", name)
    ]
    return parts[-1]


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("virchow2", True),
        ("vit_small_patch16_dinov3", True),
        ("musk", True),
        # maps of a pyramid do not pass the final norm
        ("swin_base_patch4_window7", False),
        ("convnextv2_base", False),
        ("efficientnetv2_m", False),
    ],
)
def test_last_block_of_every_kind(name: str, norm: bool) -> None:
    encoder = load_encoder(name, "twin", "last-n", last_n=1).train()
    model = encoder.model
    where = f"{last_block(model)[0]}."
    parts = [where, *(["norm."] if norm else [])]
    if ".blocks.0." in where:
        # timm counts what makes a stage coarser to its first block
        parts.append(where.replace("blocks.0", "downsample"))
    moved, names = gradients(encoder, model)
    assert moved == {n for n in names if n.startswith(tuple(parts))}
    holders = {n for n, m in model.named_modules() if m.training}
    assert where.removesuffix(".") in holders
    assert all(n in moved for h in holders for n in names if n.startswith(f"{h}."))


@pytest.mark.parametrize("scales", [(1,), (1, 2)])
def test_last_blocks_are_those_that_lead_to_a_map(scales: tuple[int, ...]) -> None:
    options = {"feature_blocks": (0, 2), "scales": scales}
    encoder = load_encoder("uni", "twin", "last-n", last_n=1, **options)
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert trained
    assert all(re.match(r"(encoder\.)+model\.(blocks\.2|norm)\.", n) for n in trained)
    sum(m.square().mean() for m in encoder(torch.rand(1, 3, 32, 32))).backward()
    assert all(p.grad is not None for n, p in encoder.named_parameters() if n in trained)
    with pytest.raises(ConfigError, match="last_n is 4, but the encoder has 3 blocks"):
        load_encoder("uni", "twin", "last-n", last_n=4, **options)


@pytest.mark.parametrize("name", ["swin_base_patch4_window7", "convnextv2_base", "uni2-h"])
@pytest.mark.parametrize("adapt", ["bias", "norm"])
def test_every_bias_and_norm_of_the_maps_gets_a_gradient(name: str, adapt: str) -> None:
    encoder = load_encoder(name, "twin", adapt).train()  # type: ignore[arg-type]
    moved, names = gradients(encoder, encoder.model)
    assert moved == {n for n, p in encoder.model.named_parameters() if p.requires_grad}
    rule = r".*\.bias" if adapt == "bias" else r".*(norm\w*|grn|(stem|downsample)\.[01])\.\w+"
    candidates = {n for n in names if re.fullmatch(rule, n)}
    beyond = {n for n in candidates if n.startswith(("norm.", "head."))}
    convolutions = {n for n in names if "stem.0" in n or "downsample.1" in n}
    expected = candidates - (beyond if name != "uni2-h" else set())
    assert moved == (expected if adapt == "bias" else expected - convolutions)


@pytest.mark.parametrize(
    ("adapt", "active"),
    [
        ("frozen", r"$."),
        ("bias", r"$."),
        ("norm", r"$."),
        ("lora", r"blocks\.\d\.attn\.qkv(\..*)?"),
        ("dora", r"blocks\.\d\.attn\.qkv(\..*)?"),
        ("last-n", r"(blocks\.[23]|norm)(\..*)?"),
        ("full", r".*"),
    ],
)
def test_only_what_is_trained_is_in_training_mode(adapt: str, active: str) -> None:
    lora = {"dropout": 0.5}
    encoder = load_encoder("vit_tiny_patch16", "twin", adapt, lora=lora, last_n=2)  # type: ignore[arg-type]
    assert not any(m.training for m in encoder.modules())
    encoder.train()
    running = {n for n, m in encoder.model.named_modules() if m.training}
    assert running == {n for n, _ in encoder.model.named_modules() if re.fullmatch(active, n)}
    images = torch.rand(1, 3, 32, 32)
    if adapt in ("lora", "dora"):
        gradients(encoder, encoder.model)
        assert not torch.equal(encoder(images)[-1], encoder(images)[-1])
    encoder.eval()
    assert not any(m.training for m in encoder.modules())
    assert torch.equal(encoder(images)[-1], encoder(images)[-1])


@pytest.mark.parametrize("adapt", ADAPTS)
def test_adapting_changes_no_output(adapt: str) -> None:
    images = torch.rand(1, 3, 40, 32)
    encoder = load_encoder("vit_small_patch14_dinov2", "twin", adapt)  # type: ignore[arg-type]
    plain = load_encoder("vit_small_patch14_dinov2", "twin", "full")
    for found, expected in zip(encoder(images), plain(images), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(encoder.embed(images), plain.embed(images))
    assert (encoder.channels, encoder.embed_dim) == (plain.channels, plain.embed_dim)
    check_encoder(encoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt": "freeze"}, "unknown adapt 'freeze'; did you mean 'frozen'"),
        ({"adapt": "last-n", "last_n": 5}, "last_n is 5, but the encoder has 4 blocks"),
        ({"adapt": "last-n", "last_n": 0}, "last_n is 0, but the encoder has 4 blocks"),
        ({"checkpointing": True}, "checkpointing has no effect with adapt 'frozen'"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_encoder("uni", "twin", **options)  # type: ignore[arg-type]


def test_modes_that_an_encoder_cannot_take() -> None:
    with pytest.raises(ConfigError, match="does not tell its blocks"):
        adapt_encoder(Restless(), "last-n")
    with pytest.raises(ConfigError, match="cannot recompute its blocks"):
        adapt_encoder(Restless(), "full", checkpointing=True)
    plain = Restless()
    plain.conv, plain.norm = nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.Identity()
    for adapt in ("bias", "norm"):
        with pytest.raises(ConfigError, match=f"adapt '{adapt}': the encoder has no such param"):
            adapt_encoder(plain, adapt)  # type: ignore[arg-type]
    encoder = adapt_encoder(Restless(), "norm")
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"encoder.norm.weight", "encoder.norm.bias"}


@pytest.mark.parametrize(
    "override",
    [
        "encoder.lora.rank=4",
        "encoder.last_n=2",
        "encoder.layer_decay=0.8",
        "encoder.checkpointing=true",
    ],
)
def test_options_without_effect_are_refused(override: str) -> None:
    option = ".".join(override.partition("=")[0].split(".")[:2])
    with pytest.raises(ConfigError, match=rf"^config: {option} has no effect with encoder.adapt="):
        parse_config({}, [override])
    useful = {"lora": "dora", "last_n": "last-n", "layer_decay": "full", "checkpointing": "bias"}
    parse_config({}, [override, f"encoder.adapt={useful[option.partition('.')[2]]}"])


def rates(model: nn.Module, config: Config) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay by name of the parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in make_optimizer(model, config.train, config.encoder.layer_decay).param_groups
        for parameter in group["params"]
    }


def test_layer_decay_by_hand() -> None:
    model = Model(load_encoder("vit_tiny_patch16", "twin", "full"))
    settings = ["encoder.layer_decay=0.5", "train.lr=1", "train.encoder_lr=0.8"]
    found = rates(model, parse_config({}, [*settings, "encoder.adapt=full"]))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    by_depth = {"norm": 0.8, "3": 0.8, "2": 0.4, "1": 0.2, "0": 0.1}
    for name, (rate, decay) in found.items():
        parts = name.removeprefix("encoder.model.").split(".")
        where = parts[1] if parts[0] == "blocks" else parts[0]
        expected = 1.0 if name.startswith("decoder") else by_depth.get(where, 0.05)
        assert rate == pytest.approx(expected), name
        matrix = not name.endswith((".bias", "norm1.weight", "norm2.weight", ".norm.weight"))
        assert decay == (0.03 if matrix else 0.0), name
    assert found["encoder.model.patch_embed.proj.weight"][0] == pytest.approx(0.05)
    # and the last two blocks alone
    model = Model(load_encoder("vit_tiny_patch16", "twin", "last-n", last_n=2))
    found = rates(model, parse_config({}, [*settings, "encoder.adapt=last-n"]))
    assert {rate for rate, _ in found.values()} == {1.0, 0.8, 0.4}
    assert found["encoder.encoder.model.blocks.2.mlp.fc1.weight"] == (0.4, 0.03)
    # the last block is the last that is run
    encoder = load_encoder("vit_tiny_patch16", "twin", "last-n", last_n=2, feature_blocks=(0, 2))
    found = rates(Model(encoder), parse_config({}, [*settings, "encoder.adapt=last-n"]))
    assert found["encoder.encoder.model.norm.weight"] == (0.8, 0.0)
    assert found["encoder.encoder.model.blocks.2.mlp.fc1.weight"] == (0.8, 0.03)
    assert found["encoder.encoder.model.blocks.1.mlp.fc1.weight"] == (0.4, 0.03)


@pytest.mark.parametrize("name", ["uni", "swin_base_patch4_window7", "convnextv2_base"])
def test_layer_decay_is_that_of_timm(name: str) -> None:
    encoder = load_encoder(name, "twin", "full")
    config = parse_config(
        {}, ["encoder.adapt=full", "encoder.layer_decay=0.7", "train.encoder_lr=1"]
    )
    found = rates(Model(encoder), config)
    names = {p: f"encoder.model.{n}" for n, p in encoder.model.named_parameters()}
    groups = param_groups_layer_decay(encoder.model, layer_decay=0.7)
    theirs = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    # timm lets a norm that no map passes count as one more layer
    behind = 0.7 if any(n.startswith("encoder.model.head.") for n in theirs) else 1.0
    for name, scale in theirs.items():
        if ".head." not in name:
            assert found[name][0] == pytest.approx(scale / behind), name


def test_no_layer_decay_is_one_rate() -> None:
    model = Model(load_encoder("vit_tiny_patch16", "twin", "full"))
    found = rates(model, parse_config({}, ["encoder.adapt=full", "train.lr=0.1"]))
    assert {rate for rate, _ in found.values()} == {0.1}


@pytest.mark.parametrize("adapt", ["lora", "full", "last-n"])
@pytest.mark.parametrize(
    "name",
    ["uni", "vit_small_patch16_dinov3", "swin_base_patch4_window7", "convnextv2_base",
     "efficientnetv2_m"],
)  # fmt: skip
def test_checkpointing_recomputes_blocks_and_changes_no_gradient(name: str, adapt: str) -> None:
    if name == "efficientnetv2_m" and adapt == "lora":
        return
    found = {}
    for checkpointing in (False, True):
        lora = {"targets": "attention+mlp"}
        encoder = load_encoder(
            name, "twin", adapt, lora=lora, last_n=1, checkpointing=checkpointing  # type: ignore[arg-type]
        )  # fmt: skip
        model = encoder.model
        calls: list[int] = []
        # before the block, because what is behind its last saved tensor is not recomputed
        last_block(model)[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        moved, _ = gradients(encoder, model)
        found[checkpointing] = {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None
        }
        assert moved
        assert len(calls) == (2 if checkpointing else 1)
    assert found[True].keys() == found[False].keys()
    for key, gradient in found[True].items():
        torch.testing.assert_close(gradient, found[False][key])
