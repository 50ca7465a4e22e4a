from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch import Tensor, nn

from celltyper.encoders import load_encoder
from celltyper.encoders.adapt import add_lora, freeze, merge_lora
from celltyper.encoders.trainability import check_trainability, fingerprint, parameter_digest
from celltyper.errors import ConfigError, TrainingError
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
        self.decoder = nn.Sequential(nn.Conv2d(encoder.channels[-1], 2, 1), nn.BatchNorm2d(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images)[-1])


def train_two_steps(model: nn.Module, lr: float = 0.1) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.1 if lr else 0)
    model.train()
    for _ in range(2):
        model(torch.rand(2, 3, 32, 32)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def test_frozen_stays_as_it_is_in_training() -> None:
    encoder = freeze(Restless())
    check_encoder(encoder)
    images = torch.rand(2, 3, 32, 32)
    before = encoder(images)[0]
    model = Model(encoder).train()
    assert not any(module.training for module in model.encoder.modules())
    assert model.decoder.training
    train_two_steps(model)
    assert torch.equal(encoder(images)[0], before)
    assert not encoder(images.requires_grad_())[0].requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    assert freeze(encoder) is encoder


def test_a_copy_of_a_frozen_encoder_is_frozen_and_its_own() -> None:
    encoder = freeze(Restless())
    twin = copy.deepcopy(encoder).train()
    assert not any(module.training for module in twin.modules())
    with torch.no_grad():
        twin.encoder.conv.weight.zero_()
    assert fingerprint(twin) != fingerprint(encoder)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("attention", {"attn.qkv"}),
        ("attention+output", {"attn.qkv", "attn.proj"}),
        ("attention+mlp", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
    ],
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16", "virchow2"])
def test_lora_touches_named_layers_of_the_blocks_only(
    name: str, targets: str, layers: set[str]
) -> None:
    plain = load_encoder(name, "twin", "full")
    encoder = load_encoder(name, "twin", "lora", lora={"targets": targets, "rank": 2})
    adapted = {n.rpartition(".lora_A")[0] for n, _ in encoder.named_parameters() if ".lora_A" in n}
    assert adapted == {f"model.blocks.{i}.{layer}" for i in range(4) for layer in layers}
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in encoder.named_parameters() if ".lora_" in n}
    images = torch.rand(2, 3, 40, 32)
    for found, expected in zip(encoder(images), plain(images), strict=True):
        torch.testing.assert_close(found, expected)
    check_encoder(encoder)


def test_lora_layers_by_their_full_names() -> None:
    encoder = Restless()
    encoder.project = nn.Linear(8, 8)
    add_lora(encoder, targets=["project"])
    assert encoder.project.lora_A["default"].weight.shape == (8, 8)
    with pytest.raises(ConfigError, match=r"\['conv'\] are no linear layers"):
        add_lora(Restless(), targets=["conv"])
    with pytest.raises(ConfigError, match="no such linear layers"):
        add_lora(Restless())


def test_lora_adds_scaled_low_rank_product_and_merges_to_the_same() -> None:
    encoder = load_encoder("uni", "twin", "lora", lora={"rank": 2, "alpha": 6, "dropout": 0.4})
    names = [n for n, _ in load_encoder("uni", "twin", "full").named_parameters()]
    layer = encoder.model.blocks[2].attn.qkv
    base = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.rand(5, 48)
    expected = x @ (base + 6 / 2 * b @ a).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected)
    images = torch.rand(1, 3, 32, 32)
    before = encoder(images)[-1]
    merge_lora(encoder)
    torch.testing.assert_close(encoder(images)[-1], before, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in encoder.named_parameters()] == names
    torch.testing.assert_close(encoder.model.blocks[2].attn.qkv.weight, base + 3 * b @ a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank >= 1"),
        ({"dropout": 1.0}, "dropout < 1"),
        ({"alpha": 0}, "alpha > 0"),
        ({"targets": "atention"}, "did you mean 'attention'"),
    ],
)
def test_wrong_lora_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_encoder("uni", "twin", "lora", lora=options)


def test_fingerprint_is_of_the_base_weights_alone() -> None:
    full = fingerprint(load_encoder("uni", "twin", "full"))
    assert len(full) == 64
    assert fingerprint(load_encoder("uni", "twin", "frozen")) == full
    lora = load_encoder("uni", "twin", "lora")
    assert fingerprint(lora) == full
    train_two_steps(Model(lora))
    assert fingerprint(lora) == full
    assert fingerprint(merge_lora(lora)) != full
    assert fingerprint(load_encoder("uni", "twin", seed=1)) != full
    # the same weights behind another normalisation are another encoder
    assert fingerprint(load_encoder("uni", "twin", mean=(0.5, 0.5, 0.5))) != full


def test_fingerprint_by_hand() -> None:
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -2.0]]))
        module.bias.zero_()
    said = hashlib.sha256(b"bias (1,) torch.float32" + bytes(4))
    # IEEE 754 single precision, little endian
    said.update(b"weight (1, 2) torch.float32" + bytes.fromhex("0000803f000000c0"))
    assert fingerprint(module) == said.hexdigest()
    assert fingerprint(module.bfloat16()) != said.hexdigest()


def test_digest_has_one_sum_for_every_part() -> None:
    model = Model(add_lora(load_encoder("uni", "twin", "full")))
    before = parameter_digest(model)
    assert set(before) == {
        "encoder", "encoder.lora", "encoder.buffers", "decoder", "decoder.buffers",
    }  # fmt: skip
    with torch.no_grad():
        model.encoder.model.blocks[3].mlp.fc2.bias[7] += 1e-6
    after = parameter_digest(model)
    assert {part for part in before if before[part] != after[part]} == {"encoder"}


@pytest.mark.parametrize(
    ("adapt", "changed"),
    [
        ("frozen", ("decoder", "decoder.buffers")),
        ("lora", ("decoder", "decoder.buffers", "encoder.lora")),
        ("full", ("decoder", "decoder.buffers", "encoder")),
    ],
)
def test_training_changes_what_was_promised(adapt: str, changed: tuple[str, ...]) -> None:
    model = Model(load_encoder("vit_small_patch14_dinov2", "twin", adapt))  # type: ignore[arg-type]
    before = parameter_digest(model)
    train_two_steps(model)
    record = check_trainability(before, parameter_digest(model), adapt)
    assert record.changed == changed
    assert record.adapt == adapt
    assert set(record.digests) == {*record.changed, *record.unchanged}


def test_broken_promises_are_found() -> None:
    # not frozen although promised, as in the published benchmark
    model = Model(load_encoder("uni", "twin", "full"))
    before = parameter_digest(model)
    train_two_steps(model)
    for adapt in ("frozen", "lora"):
        with pytest.raises(TrainingError, match=f"adapt is '{adapt}' but training changed 'enc"):
            check_trainability(before, parameter_digest(model), adapt)
    # no gradients, but running statistics
    model = Model(Restless().requires_grad_(False))
    before = parameter_digest(model)
    train_two_steps(model)
    with pytest.raises(TrainingError, match=r"training changed 'encoder\.buffers'"):
        check_trainability(before, parameter_digest(model), "frozen")
    # promised, but not trained
    model = Model(load_encoder("uni", "twin", "frozen"))
    before = parameter_digest(model)
    train_two_steps(model)
    after = parameter_digest(model)
    with pytest.raises(TrainingError, match=r"'encoder\.lora' is not there"):
        check_trainability(before, after, "lora")
    with pytest.raises(TrainingError, match="'encoder' did not change"):
        check_trainability(before, after, "full")
    # a learning rate of zero moves only the decoder's running statistics
    before = after
    train_two_steps(model, lr=0)
    assert parameter_digest(model) != before
    with pytest.raises(TrainingError, match="no weights at all"):
        check_trainability(before, parameter_digest(model), "frozen")
    with pytest.raises(TrainingError, match=r"other parts after training than before: head"):
        check_trainability(before, {**before, "head": "0"}, "frozen")
    with pytest.raises(ConfigError, match="unknown adapt"):
        check_trainability(before, before, "none")
