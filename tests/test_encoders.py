from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError

from celltyper.encoders import find_card, load_card, load_encoder
from celltyper.encoders.vit import TimmViT
from celltyper.errors import CheckpointError, ConfigError
from celltyper.testing import check_encoder


@pytest.fixture
def tiny() -> TimmViT:
    encoder = load_encoder("vit_tiny_patch16", weights="twin", adapt="full", input_size=None)
    assert isinstance(encoder, TimmViT)
    return encoder


def test_maps_are_those_of_timm_with_the_last_one_normed(tiny: TimmViT) -> None:
    images = torch.rand(2, 3, 48, 80)
    normalised = (images - 0.5) / 0.5
    raw = tiny.model.forward_intermediates(normalised, intermediates_only=True)
    tokens = tiny.model.forward_features(normalised)
    maps = tiny(images)
    for found, expected in zip(maps[:3], raw[:3], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # token 1 + 5 * r + c is the patch at row r, column c
    torch.testing.assert_close(maps[3][:, :, 2, 4], tokens[:, 1 + 5 * 2 + 4])
    torch.testing.assert_close(tiny.embed(images), tokens[:, 0])


def test_embedding_rules() -> None:
    images = torch.rand(1, 3, 28, 42)
    encoder = load_encoder("virchow2", weights="twin", adapt="full", input_size=None)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.card.mean, encoder.card.std))
    tokens = encoder.model.forward_features((images - mean) / std)
    # one class token, four registers that count for nothing, six patches
    assert tokens.shape[1] == 1 + 4 + 2 * 3
    expected = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], dim=1)
    torch.testing.assert_close(encoder.embed(images), expected)


def test_image_that_the_patch_does_not_divide_is_continued_at_bottom_and_right(
    tiny: TimmViT,
) -> None:
    images = torch.rand(1, 3, 37, 50)
    whole = np.pad(images.numpy(), ((0, 0), (0, 0), (0, 11), (0, 14)), mode="edge")
    for found, expected in zip(tiny(images), tiny(torch.from_numpy(whole)), strict=True):
        assert found.shape[2:] == (3, 4)
        torch.testing.assert_close(found, expected)


def test_image_smaller_than_a_patch(tiny: TimmViT) -> None:
    assert tiny(torch.rand(1, 3, 1, 5))[0].shape == (1, 48, 1, 1)


def test_feature_blocks_are_quarters_or_as_named() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=12, embed_dim=48, num_heads=3)
    assert TimmViT(model).blocks == [2, 5, 8, 11]
    named = TimmViT(model, blocks=[1, 4])
    assert named.channels == [48, 48]
    shallow = load_encoder("uni", "twin", "full", feature_blocks=(0, 1))
    images = torch.rand(1, 3, 32, 32)
    deep = load_encoder("uni", "twin", "full")
    torch.testing.assert_close(shallow(images)[0], deep(images)[0])
    torch.testing.assert_close(
        shallow(images)[1],
        deep.model.norm(deep(images)[1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    )
    for wrong in ([4, 1], [1, 1], [12], [-1], []):
        with pytest.raises(ConfigError, match="feature_blocks must ascend"):
            TimmViT(model, blocks=wrong)


def test_an_encoder_of_fewer_than_four_blocks_gives_some_maps_twice() -> None:
    options = {"depth": 3, "embed_dim": 48, "num_heads": 3, "dynamic_img_size": True}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    encoder = TimmViT(model).eval()
    assert encoder.blocks == [0, 1, 1, 2]
    images = torch.rand(1, 3, 32, 48)
    x = model.norm_pre(model._pos_embed(model.patch_embed(encoder.prepare(images))))
    after = []
    for block in model.blocks:
        x = block(x)
        after.append(x)
    expected = [after[0], after[1], after[1], model.norm(after[2])]
    for found, tokens in zip(encoder(images), expected, strict=True):
        patches = tokens[:, 1:].transpose(1, 2).reshape(1, 48, 2, 3)
        torch.testing.assert_close(found, patches)
    for depth, blocks in ((2, [0, 0, 1, 1]), (1, [0, 0, 0, 0])):
        model.blocks = model.blocks[:depth]
        shallow = TimmViT(model)
        assert (shallow.blocks, len(shallow(images))) == (blocks, 4)


def test_blocks_behind_the_last_map_are_not_computed() -> None:
    encoder = load_encoder("uni", "twin", "full", feature_blocks=(0, 2))
    computed = []
    for i, block in enumerate(encoder.model.blocks):
        block.register_forward_hook(lambda *_, i=i: computed.append(i))
    images = torch.rand(2, 3, 32, 48)
    first, last = encoder(images)
    assert computed == [0, 1, 2]
    computed.clear()
    raw = encoder.model.forward_intermediates(
        encoder.prepare(images), indices=[0, 2], stop_early=False, intermediates_only=True
    )
    assert computed == [0, 1, 2, 3]
    torch.testing.assert_close(first, raw[0], rtol=0, atol=0)
    normed = encoder.model.norm(raw[1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(last, normed)


def test_random_weights_follow_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, same, other = (
        load_encoder("uni", "twin", "lora", seed=s).state_dict() for s in (0, 0, 1)
    )
    assert torch.equal(torch.rand(3), expected)
    weight = "encoder.model.blocks.1.attn.qkv.lora_A.default.weight"
    for key in ("encoder.model.patch_embed.proj.weight", weight):
        assert torch.equal(first[key], same[key])
        assert not torch.equal(first[key], other[key])


def test_the_random_state_of_gpus_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(7)
    assert seeded == [7]  # it is by this that torch seeds them
    load_encoder("uni", "twin", "lora", seed=3)
    assert seeded == [7]


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/vit_tiny_patch16_224.dino"])
def test_unknown_tag_or_known_model_of_timm(name: str) -> None:
    if name.endswith("dino"):
        with pytest.raises(ConfigError, match="no weights 'dino'"):
            find_card(name)
    else:
        encoder = load_encoder(name, weights="twin")
        assert encoder.card.mean == (0.5, 0.5, 0.5)
        assert encoder.card.hub_id.startswith("timm/vit_tiny_patch16_224.")
        check_encoder(encoder)


def test_hub_id_of_a_card_is_that_card() -> None:
    assert find_card("MahmoodLab/UNI2-h") is load_card("uni2-h")
    assert find_card("hf-hub:paige-ai/Virchow2") is load_card("virchow2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch61", "did you mean 'vit_tiny_patch16'.*known: .*uni2-h"),
        ("timm/mixer_b16_224", "cannot be an encoder"),
        ("timm/no_such_model", "timm has no model"),
    ],
)
def test_unknown_encoders(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_encoder(name, weights="random")


def test_hub_id_without_card_needs_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set.* or timm/NAME"):
        load_encoder("owner/name", weights="random")


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match="unknown adapt 'freeze'; did you mean 'frozen'"):
        load_encoder("uni", "twin", adapt="freeze")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown lora option 'rang'; did you mean 'rank'"):
        load_encoder("uni", "twin", "lora", lora={"rang": 4})
    with pytest.raises(ConfigError, match="unknown encoder option 'blocks'"):
        load_encoder("uni", "twin", blocks=[1])
    with pytest.raises(ConfigError, match="encoder option embedding"):
        load_encoder("uni", "twin", embedding="max")


def test_cards_are_strict_and_fixed() -> None:
    card = load_card("uni")
    with pytest.raises(ValidationError):
        card.licence = "mine"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        type(card)(name="a", timm_name="b", patch_size=16, embed_dim=4, color="red")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="unknown encoder 'UNI'"):
        load_card("UNI")


def test_cards_are_read_without_torch() -> None:
    code = "import sys, celltyper.encoders as e; e.load_card('uni'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_real_weights_of_half_precision(real_data: Path) -> None:
    path = real_data.parent / "weights" / "vit_small_patch14_dinov2.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the checkout")
    encoder = load_encoder("vit_small_patch14_dinov2", weights=path)
    assert encoder.encoder.model.patch_embed.grid_size == (37, 37)
    image = Image.open(next((real_data / "consep" / "images").glob("*.png"))).convert("RGB")
    field = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    one, other = field[:, :, :224, :224], field[:, :, -224:, -224:]
    maps = encoder(one)
    assert [tuple(m.shape) for m in maps] == [(1, 384, 16, 16)] * 4
    # trained tokens follow the tissue when it is mirrored; random ones do not as much
    mirrored = encoder(one.flip(3))[-1].flip(3)
    unlike = encoder(other)[-1]
    assert F.cosine_similarity(maps[-1], mirrored).mean() > 0.8
    assert F.cosine_similarity(maps[-1], unlike).mean() < 0.6
