"""Every card: its architecture at full size, without memory, and its tiny twin at work."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch

from celltyper.decoders import DECODERS, build_decoder
from celltyper.encoders import list_cards, load_card, load_encoder
from celltyper.testing import check_encoder

VITS = [name for name in list_cards() if load_card(name).family == "vit"]


@cache
def full_size(name: str) -> Any:
    """Encoder of a card as published, without memory: shapes only."""
    with torch.device("meta"):
        return load_encoder(name, weights="random", adapt="full")


@pytest.mark.parametrize("name", list_cards())
def test_card_builds_an_encoder_of_the_published_size(name: str) -> None:
    card, encoder = load_card(name), full_size(name)
    p = card.patch_size
    assert card.parameters is not None
    millions = sum(q.numel() for q in encoder.parameters()) / 1e6
    assert millions == pytest.approx(card.parameters, rel=0.01)
    assert encoder.embed_dim == card.embed_dim * (2 if card.embedding == "cls+mean" else 1)
    assert len(encoder.channels) == 4
    assert encoder.patch_size == p == card.patch_size
    with torch.no_grad():
        maps = encoder(torch.rand(2, 3, 2 * p, 3 * p, device="meta"))
    strides = getattr(encoder, "strides", [p] * 4)
    for m, channels, stride in zip(maps, encoder.channels, strides, strict=True):
        assert m.shape == (2, channels, 2 * p // stride, 3 * p // stride)
    assert not card.gated or card.gate_page
    assert card.hub_id


@pytest.mark.parametrize("name", VITS)
def test_card_of_a_vision_transformer_tells_its_tokens(name: str) -> None:
    card, encoder = load_card(name), full_size(name)
    assert encoder.model.num_prefix_tokens == card.prefix_tokens
    assert encoder.model.patch_embed.patch_size == (card.patch_size, card.patch_size)
    assert encoder.channels == [card.embed_dim] * 4
    assert card.input_size is not None
    assert card.input_size % card.patch_size == 0


def kinds_of_weights(model: torch.nn.Module) -> set[str]:
    return {re.sub(r"blocks\.\d+", "blocks", name) for name in model.state_dict()}


@pytest.mark.parametrize("name", VITS)
def test_twin_fits_the_contract_and_has_the_layout_of_its_card(name: str) -> None:
    card = load_card(name)
    encoder = load_encoder(name, weights="twin", adapt="full")
    check_encoder(encoder)
    assert encoder.patch_size == card.patch_size
    model = encoder.model
    assert model.num_prefix_tokens == card.prefix_tokens
    assert sum(p.numel() for p in encoder.parameters()) < 1e6
    full = full_size(name).model
    assert kinds_of_weights(model) == kinds_of_weights(full)
    assert type(model.blocks[0].mlp) is type(full.blocks[0].mlp)
    # the last map is the model's own output, whatever class of timm the model is
    images = torch.rand(1, 3, 2 * card.patch_size, 3 * card.patch_size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
    tokens = model.forward_features((images - mean) / std)[:, card.prefix_tokens :]
    torch.testing.assert_close(encoder(images)[-1].flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("name", list_cards())
def test_twin_feeds_every_decoder_and_gives_them_gradients(name: str) -> None:
    encoder = load_encoder(name, weights="twin", adapt="full")
    strides = getattr(encoder, "strides", None)
    # few channels may all be cut off by a ReLU
    torch.manual_seed(0)
    # a size that no patch divides
    images = torch.rand(1, 3, 45, 52)
    for decoder_name in DECODERS:
        decoder = build_decoder(
            decoder_name, encoder.channels, encoder.patch_size, strides, width=16
        ).eval()
        encoder.zero_grad()
        out = decoder(encoder(images), images)
        assert out.shape == (1, decoder.out_channels, 45, 52)
        out.square().mean().backward()
        first = next(p for p in encoder.parameters() if p.ndim == 4)
        assert first.grad is not None
        assert first.grad.abs().sum() > 0, decoder_name


@pytest.mark.parametrize("name", VITS)
def test_twin_takes_lora(name: str) -> None:
    encoder = load_encoder(name, weights="twin", adapt="lora")
    check_encoder(encoder)
    trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        before = encoder(images)
        for value in trained.values():
            value.normal_(std=0.3)
        after = encoder(images)
    # an adapter in every block
    for map_before, map_after in zip(before, after, strict=True):
        assert not torch.equal(map_after, map_before)
