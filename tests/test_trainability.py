"""Proof of what training changed: fingerprints, digests, and broken promises."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

from celltyper.encoders import load_encoder
from celltyper.encoders.adapt import adapt_encoder, freeze
from celltyper.encoders.lora import add_lora, merge_lora
from celltyper.encoders.trainability import check_trainability, fingerprint, parameter_digest
from celltyper.errors import ConfigError, TrainingError


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
        return [self.drop(self.norm(self.conv(images)))]


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
        model(torch.rand(2, 3, 64, 64)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


CHANGED = [
    ("frozen", ()),
    ("lora", ("encoder.lora",)),
    ("dora", ("encoder.lora",)),
    ("last-n", ("encoder.trained",)),
    ("bias", ("encoder.trained",)),
    ("norm", ("encoder.trained",)),
    ("full", ("encoder",)),
]


@pytest.mark.parametrize(("adapt", "changed"), CHANGED)
def test_training_changes_what_was_promised(adapt: str, changed: tuple[str, ...]) -> None:
    encoder = load_encoder("vit_small_patch14_dinov2", "twin", adapt, last_n=1)  # type: ignore[arg-type]
    model = Model(encoder)
    before = parameter_digest(model)
    train_two_steps(model)
    record = check_trainability(before, parameter_digest(model), adapt)
    assert record.changed == ("decoder", "decoder.buffers", *changed)
    assert record.adapt == adapt
    assert set(record.digests) == {*record.changed, *record.unchanged}


@pytest.mark.parametrize("adapt", ["frozen", "lora", "dora", "last-n", "bias", "norm"])
def test_a_weight_that_moved_and_must_not_is_found(adapt: str) -> None:
    encoder = load_encoder("uni", "twin", adapt, last_n=2)  # type: ignore[arg-type]
    model = Model(encoder)
    before = parameter_digest(model)
    # as if a bug had let it train: what is promised is written down, not read from the flag
    moved = encoder.get_parameter("encoder.model.patch_embed.proj.weight").requires_grad_()
    train_two_steps(model)
    if adapt == "frozen":
        # nothing flows back into a frozen encoder, so it is moved by hand
        with torch.no_grad():
            moved[0, 0, 0, 0] += 1e-6
    with pytest.raises(TrainingError, match=f"adapt is '{adapt}' but training changed 'encoder'"):
        check_trainability(before, parameter_digest(model), adapt)


@pytest.mark.parametrize("adapt", ["lora", "dora", "last-n", "bias", "norm", "full"])
def test_training_that_left_out_what_was_promised_is_found(adapt: str) -> None:
    model = Model(load_encoder("uni", "twin", adapt))  # type: ignore[arg-type]
    before = parameter_digest(model)
    model.encoder.requires_grad_(False)
    train_two_steps(model)
    with pytest.raises(TrainingError, match="did not change in training"):
        check_trainability(before, parameter_digest(model), adapt)


@pytest.mark.parametrize("adapt", ["bias", "norm", "last-n"])
def test_norm_statistics_move_in_trained_blocks_only(adapt: str) -> None:
    encoder = load_encoder("efficientnetv2_m", "twin", adapt, last_n=1)  # type: ignore[arg-type]
    model = Model(encoder)
    before = parameter_digest(model)
    still = {n: b.clone() for n, b in encoder.model.named_buffers()}
    train_two_steps(model)
    stages = encoder.model.blocks
    last = f"blocks.{len(stages) - 1}.{len(stages[-1]) - 1}."
    moved = {n for n, b in encoder.model.named_buffers() if not torch.equal(b, still[n])}
    expected = {n for n in still if n.startswith(last)} if adapt == "last-n" else set()
    assert moved == expected
    assert bool(moved) == (adapt == "last-n")
    assert "encoder.buffers" in check_trainability(before, parameter_digest(model), adapt).unchanged
    with torch.no_grad():
        encoder.model.get_buffer("bn1.running_mean").add_(1)
    with pytest.raises(TrainingError, match=r"training changed 'encoder\.buffers'"):
        check_trainability(before, parameter_digest(model), adapt)


def test_broken_promises_are_found() -> None:
    # not frozen although promised, as in the published benchmark
    model = Model(load_encoder("uni", "twin", "full"))
    before = parameter_digest(model)
    train_two_steps(model)
    for adapt in ("frozen", "lora", "bias"):
        with pytest.raises(TrainingError, match=f"adapt is '{adapt}' but training changed 'enc"):
            check_trainability(before, parameter_digest(model), adapt)
    # no gradients, but running statistics
    model = Model(Restless().requires_grad_(False))
    before = parameter_digest(model)
    train_two_steps(model)
    with pytest.raises(TrainingError, match=r"training changed 'encoder\.buffers'"):
        check_trainability(before, parameter_digest(model), "frozen")
    # promised, but not there
    model = Model(load_encoder("uni", "twin", "frozen"))
    before = parameter_digest(model)
    train_two_steps(model)
    after = parameter_digest(model)
    with pytest.raises(TrainingError, match=r"'encoder\.lora' is not there"):
        check_trainability(before, after, "lora")
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


def test_fingerprint_is_of_the_base_weights_alone() -> None:
    full = fingerprint(load_encoder("uni", "twin", "full"))
    assert len(full) == 64
    assert fingerprint(load_encoder("uni", "twin", "frozen")) == full
    for adapt in ("lora", "dora"):
        lora = load_encoder("uni", "twin", adapt)  # type: ignore[arg-type]
        assert fingerprint(lora) == full
        train_two_steps(Model(lora))
        assert fingerprint(lora) == full
    assert fingerprint(merge_lora(lora)) != full
    assert fingerprint(load_encoder("uni", "twin", seed=1)) != full
    # the same weights behind another normalisation are another encoder
    assert fingerprint(load_encoder("uni", "twin", mean=(0.5, 0.5, 0.5))) != full


@pytest.mark.parametrize("adapt", ["last-n", "bias", "norm"])
def test_fingerprint_does_not_change_in_training(adapt: str) -> None:
    encoder = load_encoder("uni", "twin", adapt, last_n=2)  # type: ignore[arg-type]
    before = fingerprint(encoder)
    train_two_steps(Model(encoder))
    assert fingerprint(encoder) == before
    other = load_encoder("uni", "twin", adapt, last_n=2, seed=1)  # type: ignore[arg-type]
    assert fingerprint(other) != before


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


def test_digest_of_a_part_follows_the_promise() -> None:
    model = Model(freeze(adapt_encoder(load_encoder("uni", "twin", "full"), "bias")))
    assert "encoder.trained" not in parameter_digest(model)
    model = Model(adapt_encoder(load_encoder("uni", "twin", "full"), "bias"))
    model.encoder.requires_grad_(False)
    before = parameter_digest(model)
    with torch.no_grad():
        model.encoder.model.norm.bias[0] = 1
    after = parameter_digest(model)
    assert {part for part in before if before[part] != after[part]} == {"encoder.trained"}
