from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from celltyper.encoders import list_cards, load_card, load_encoder
from celltyper.encoders.build import build_timm_model
from celltyper.encoders.layouts import from_dinov2_hf
from celltyper.encoders.weights import load_weights, read_weights
from celltyper.errors import CheckpointError
from celltyper.testing import check_encoder

# Millions of parameters, an account of the architectures that is not ours. Sources:
# L: param_size in models/vision/*.py of rendeirolab/LazySlide
# H: model card, page or collection on the hub; of a float32 file alone its bytes / 4
# T: results/results-imagenet.csv or model cards of timm, without the classifier that it counts in
PUBLISHED_SIZE = {
    "conch": 86,  # ViT-B/16: README of clemsgrs/slide2vec
    "h-optimus-0": 1130,  # L; H 1aurent/vit_giant_patch14_reg4_224.h-optimus-v0
    "h-optimus-1": 1130,  # L
    "h0-mini": 85.7,  # L
    "hibou-b": 85.7,  # L; H histai/hibou-foundation-models
    "hibou-l": 303.7,  # L; H histai/hibou-L says 304
    "kaiko-vitb16": 343 / 4,  # H 1aurent/vit_base_patch16_224.kaiko_ai_...
    "kaiko-vitb8": 85.8,  # the same ViT-B/8: H timm/vit_base_patch8_224.dino
    "kaiko-vitl14": 1220 / 4,  # H 1aurent/vit_large_patch14_reg4_224.kaiko_ai_...
    "kaiko-vits16": 86.7 / 4,  # H 1aurent/vit_small_patch16_224.kaiko_ai_...
    "kaiko-vits8": 21.7,  # the same ViT-S/8: H 1aurent/vit_small_patch8_224.lunit_dino
    "midnight": 1140,  # L
    "phikon-v2": 303.4,  # L
    "prov-gigapath": 1130,  # H originbio/TinyPath, which was pruned from it
    "titan-v": 304.33 - 1.025,  # T; no figure of the trunk alone, a ViT-L/16
    "uni": 304.33 - 1.025,  # T; a ViT-L/16
    "uni2-h": 681.4,  # L
    "virchow": 631.2,  # L
    "virchow2": 631.2,  # L; doi:10.48550/arXiv.2408.00738 says 632
    "vit_base_patch14_dinov2": 86.6,  # H timm/vit_*_patch14_*dinov2.lvd142m
    "vit_base_patch14_reg4_dinov2": 86.6,
    "vit_giant_patch14_dinov2": 1136.5,
    "vit_giant_patch14_reg4_dinov2": 1136.5,
    "vit_large_patch14_dinov2": 304.4,
    "vit_large_patch14_reg4_dinov2": 304.4,
    "vit_small_patch14_dinov2": 22.1,
    "vit_small_patch14_reg4_dinov2": 22.1,
    "vit_base_patch16_dinov3": 85.7,  # H facebook/dinov3
    "vit_large_patch16_dinov3": 1210 / 4,  # H timm/vit_large_patch16_dinov3_qkvb.lvd1689m
    "vit_small_patch16_dinov3": 21.6,  # H facebook/dinov3
    "vit_large_patch16": 304.33 - 1.025,  # T
    "vit_small_patch16": 22.05 - 0.385,  # T
    "vit_tiny_patch16": 5.7 - 0.193,  # T
}


@pytest.mark.parametrize("name", list_cards())
def test_card_describes_its_architecture(name: str) -> None:
    card = load_card(name)
    with torch.device("meta"):
        model = build_timm_model(card)
    assert model.embed_dim == card.embed_dim
    assert model.num_prefix_tokens == card.prefix_tokens
    assert model.patch_embed.patch_size == (card.patch_size, card.patch_size)
    assert card.input_size % card.patch_size == 0
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED_SIZE[name], rel=0.01)
    assert not card.gated or card.gate_page
    assert card.hub_id


def kinds_of_weights(model: torch.nn.Module) -> set[str]:
    return {re.sub(r"blocks\.\d+", "blocks", name) for name in model.state_dict()}


@pytest.mark.parametrize("name", list_cards())
def test_twin_fits_the_contract_and_has_the_layout_of_its_card(name: str) -> None:
    card = load_card(name)
    encoder = load_encoder(name, weights="twin", adapt="full")
    check_encoder(encoder)
    assert encoder.patch_size == card.patch_size
    model = encoder.model
    assert model.num_prefix_tokens == card.prefix_tokens
    assert sum(p.numel() for p in encoder.parameters()) < 1e6
    with torch.device("meta"):
        full = build_timm_model(card)
    assert kinds_of_weights(model) == kinds_of_weights(full)
    assert type(model.blocks[0].mlp) is type(full.blocks[0].mlp)
    # the last map is the model's own output, whatever class of timm the model is
    images = torch.rand(1, 3, 2 * card.patch_size, 3 * card.patch_size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
    tokens = model.forward_features((images - mean) / std)[:, card.prefix_tokens :]
    torch.testing.assert_close(encoder(images)[-1].flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "hibou-b", "conch"])
def test_twin_takes_lora(name: str) -> None:
    encoder = load_encoder(name, weights="twin", adapt="lora")
    check_encoder(encoder)
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)


def transformers_model(name: str, size: int) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    registers = load_card(name).prefix_tokens - 1
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    twin = build_timm_model(load_card(name), twin=True)
    options = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=size,
        patch_size=load_card(name).patch_size,
        use_swiglu_ffn="Glu" in type(twin.blocks[0].mlp).__name__,
        **options,
    )
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        for p in model.parameters():
            # bias, layer scale and tokens would be zero or one, and any mistake in them unseen
            p.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", ["phikon-v2", "midnight", "hibou-b", "hibou-l"])
def test_weights_of_transformers_compute_the_same_in_timm(name: str, tmp_path: Path) -> None:
    card = load_card(name)
    assert card.key_layout == "dinov2-hf"
    size = card.twin["img_size"]
    torch.manual_seed(1)
    theirs = transformers_model(name, size)
    # not its state_dict: transformers 5 renames in memory what it reads and writes
    theirs.save_pretrained(tmp_path)
    ours = build_timm_model(card, twin=True)
    load_weights(ours, from_dinov2_hf(read_weights(tmp_path / "model.safetensors")), "a file")
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(pixel_values=images).last_hidden_state
        found = ours.eval().forward_features(images)
    assert found.shape[1] == card.prefix_tokens + (size // card.patch_size) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def vit_by_hand(tensors: dict[str, Tensor], images: Tensor, heads: int, patch: int) -> Tensor:
    """Tokens of a pre-norm vision transformer, from its weights behind ``visual.trunk.``."""
    w = {k.removeprefix("visual.").removeprefix("trunk."): v for k, v in tensors.items()}

    def norm(x: Tensor, at: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{at}.weight"], w[f"{at}.bias"], eps=1e-6)

    def linear(x: Tensor, at: str) -> Tensor:
        return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]

    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    for i in range(4):
        at = f"blocks.{i}."
        qkv = linear(norm(x, f"{at}norm1"), f"{at}attn.qkv")
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        out = linear(mixed.transpose(1, 2).flatten(2), f"{at}attn.proj")
        x = x + out * w.get(f"{at}ls1.gamma", torch.ones(1))
        out = linear(F.gelu(linear(norm(x, f"{at}norm2"), f"{at}mlp.fc1")), f"{at}mlp.fc2")
        x = x + out * w.get(f"{at}ls2.gamma", torch.ones(1))
    return norm(x, "norm")


@pytest.mark.parametrize(("name", "prefix"), [("titan-v", "trunk."), ("conch", "visual.trunk.")])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_trunk_is_taken_out_of_a_vision_language_model(
    name: str, prefix: str, wrapper: str, tmp_path: Path
) -> None:
    card = load_card(name)
    torch.manual_seed(1)
    shapes = {k: v.shape for k, v in build_timm_model(card, twin=True).state_dict().items()}
    theirs = {f"{prefix}{k}": 0.3 * torch.randn(shape) for k, shape in shapes.items()}
    beside = prefix.removesuffix("trunk.")
    whole = theirs | {
        f"{beside}attn_pool_contrast.query": torch.rand(1, 48),
        f"{beside}ln_contrast.weight": torch.rand(48),
        "text.positional_embedding": torch.rand(9, 48),
        "logit_scale": torch.rand(()),
    }
    torch.save({f"{wrapper}{k}": v for k, v in whole.items()}, tmp_path / "pytorch_model.bin")
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "input_size": None}
    encoder = load_encoder(name, weights="twin", adapt="full", **plain)
    load_weights(encoder.model, read_weights(tmp_path / "pytorch_model.bin"), "a file")
    images = torch.rand(2, 3, 64, 64)
    expected = vit_by_hand(theirs, images, heads=3, patch=16)
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed(images), expected[:, 0], rtol=1e-4, atol=1e-4)
        found = encoder(images)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected[:, 1:], rtol=1e-4, atol=1e-4)


def test_a_trunk_that_is_not_whole_or_not_one_is_refused() -> None:
    model = build_timm_model(load_card("titan-v"), twin=True)
    trunk = {f"visual.trunk.{k}": v for k, v in model.state_dict().items()}
    less = {k: v for k, v in trunk.items() if not k.endswith("norm.bias")}
    with pytest.raises(CheckpointError, match=r"1 missing \(norm.bias\)"):
        load_weights(model, less, "a file")
    with pytest.raises(CheckpointError, match="left over"):
        load_weights(model, trunk | {"text.trunk.norm.bias": torch.zeros(48)}, "a file")
