from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from celltyper.encoders import find_card, load_card, load_encoder
from celltyper.encoders.build import build_timm_model
from celltyper.encoders.layouts import from_dinov2_hf
from celltyper.encoders.vit import TimmViT
from celltyper.encoders.weights import load_weights, read_weights
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
    weight = "model.blocks.1.attn.qkv.lora_A.default.weight"
    for key in ("model.patch_embed.proj.weight", weight):
        assert torch.equal(first[key], same[key])
        assert not torch.equal(first[key], other[key])


@pytest.mark.parametrize("how", ["safetensors", "half", "pt", "bin", "nested", "prefix", "head"])
def test_local_weights_come_back(tmp_path: Path, tiny: TimmViT, how: str) -> None:
    tensors = dict(tiny.model.state_dict())
    path = tmp_path / "weights.safetensors"
    if how == "safetensors":
        save_file(tensors, path)
    elif how == "half":
        save_file({k: v.half() for k, v in tensors.items()}, path)
    elif how == "prefix":
        save_file({f"module.backbone.{k}": v for k, v in tensors.items()}, path)
    elif how == "head":
        classifier = {"head.weight": torch.rand(9, 48), "head.bias": torch.rand(9)}
        save_file(tensors | classifier, path)
    else:
        path = tmp_path / ("weights.bin" if how == "bin" else "weights.pt")
        torch.save({"state_dict": tensors, "epoch": 3} if how == "nested" else tensors, path)
    other = build_timm_model(load_card("vit_tiny_patch16"), twin=True)
    load_weights(other, read_weights(path), path.name)
    tolerance = 1e-3 if how == "half" else 0
    for key, value in other.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, tensors[key], rtol=tolerance, atol=tolerance)


def test_position_embedding_is_resampled_to_the_grid_of_the_model(tiny: TimmViT) -> None:
    tensors = dict(tiny.model.state_dict())
    # a class token of 5 and a ramp along columns on a grid of 8 x 8 instead of 4 x 4
    ramp = torch.arange(8.0).repeat(8, 1).reshape(1, 64, 1).expand(1, 64, 48)
    tensors["pos_embed"] = torch.cat([torch.full((1, 1, 48), 5.0), ramp], dim=1)
    load_weights(tiny.model, tensors, "a file")
    position = tiny.model.pos_embed.detach()
    assert position.shape == (1, 17, 48)
    assert (position[0, 0] == 5).all()
    grid = position[0, 1:, 0].reshape(4, 4)
    assert torch.allclose(grid[0], grid[3], atol=1e-5)
    # away from the border the mean of two neighbours: 2.5 and 4.5
    assert grid[0, 1:3].tolist() == pytest.approx([2.5, 4.5], abs=0.1)
    tensors["pos_embed"] = torch.zeros(1, 1 + 63, 48)
    with pytest.raises(CheckpointError, match="no square grid"):
        load_weights(tiny.model, tensors, "a file")


def test_weights_of_another_encoder_are_refused_with_the_keys(tiny: TimmViT) -> None:
    tensors = dict(tiny.model.state_dict())
    less = {k: v for k, v in tensors.items() if not k.startswith("blocks.3.")}
    with pytest.raises(CheckpointError, match=r"12 missing \(blocks.3.attn.proj.bias, .*\.\.\.\)"):
        load_weights(tiny.model, less, "a file")
    with pytest.raises(CheckpointError, match=r"1 left over \(reg_token\)"):
        load_weights(tiny.model, {**tensors, "reg_token": torch.zeros(1, 4, 48)}, "a file")
    with pytest.raises(CheckpointError, match=r"1 other shape \(norm.bias \(7,\) instead of \(48,"):
        load_weights(tiny.model, {**tensors, "norm.bias": torch.zeros(7)}, "a file")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('exploded').touch()",)


def test_code_in_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1), "bomb": Bomb()}, "weights.pt")
    with pytest.raises(CheckpointError, match="never runs"):
        load_encoder("vit_tiny_patch16", weights="weights.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"bomb": Bomb()}))
    with pytest.raises(CheckpointError, match=r"plain\.pt"):
        load_encoder("vit_tiny_patch16", weights="plain.pt")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.bin"])
def test_unreadable_weights_are_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(CheckpointError, match="does not exist"):
        load_encoder("uni", weights=path)
    for content in (b"", b"no weights at all"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_encoder("vit_tiny_patch16", weights=path)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_weights_of_no_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    torch.save(torch.zeros(3), tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_weights(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no table of tensors"):
        read_weights(tmp_path / "b.pt")


def hub_error(kind: type[Exception]) -> Exception:
    # what the hub's errors are built from differs between its versions
    return kind.__new__(kind, "message")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(GatedRepoError), "accept the terms on huggingface.co/MahmoodLab/UNI, run"),
        (hub_error(RepositoryNotFoundError), "the hub has no MahmoodLab/UNI"),
        (LocalEntryNotFoundError("offline"), "out of reach: go online once"),
        (ConnectionError("no route"), "out of reach: go online once"),
        (EntryNotFoundError("no such file"), "has none of model.safetensors"),
    ],
)
def test_hub_failures_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError) as caught:
        load_encoder("uni")
    assert message in str(caught.value)
    assert "encoder.weights=PATH" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_weights_come_from_the_pinned_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: TimmViT
) -> None:
    asked = []
    torch.save(tiny.model.state_dict(), tmp_path / "pytorch_model.bin")

    def fetch(repo: str, filename: str, revision: str | None) -> str:
        asked.append((repo, filename, revision))
        if filename != "pytorch_model.bin":
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    card = load_card("vit_tiny_patch16")
    pinned = card.model_copy(update={"revision": "abc", "timm_args": card.twin})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr("celltyper.encoders.find_card", lambda name: pinned)
    encoder = load_encoder("vit_tiny_patch16", seed=5)
    assert asked == [(card.hub_id, f, "abc") for f in ("model.safetensors", "pytorch_model.bin")]
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(encoder(images), tiny(images))


def test_dinov2_weights_of_transformers_are_renamed() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, embed_dim=8, depth=1, num_heads=2, init_values=1.0
    )
    layer = "encoder.layer.0."
    theirs = {
        "embeddings.cls_token": (1, 1, 8),
        "embeddings.mask_token": (1, 8),
        "embeddings.position_embeddings": (1, 197, 8),
        "embeddings.patch_embeddings.projection.weight": (8, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": (8,),
        f"{layer}norm1.weight": (8,),
        f"{layer}norm1.bias": (8,),
        f"{layer}attention.attention.query.weight": (8, 8),
        f"{layer}attention.attention.query.bias": (8,),
        f"{layer}attention.attention.key.weight": (8, 8),
        f"{layer}attention.attention.key.bias": (8,),
        f"{layer}attention.attention.value.weight": (8, 8),
        f"{layer}attention.attention.value.bias": (8,),
        f"{layer}attention.output.dense.weight": (8, 8),
        f"{layer}attention.output.dense.bias": (8,),
        f"{layer}layer_scale1.lambda1": (8,),
        f"{layer}norm2.weight": (8,),
        f"{layer}norm2.bias": (8,),
        f"{layer}mlp.fc1.weight": (32, 8),
        f"{layer}mlp.fc1.bias": (32,),
        f"{layer}mlp.fc2.weight": (8, 32),
        f"{layer}mlp.fc2.bias": (8,),
        f"{layer}layer_scale2.lambda1": (8,),
        "layernorm.weight": (8,),
        "layernorm.bias": (8,),
    }
    tensors = {name: torch.rand(shape) for name, shape in theirs.items()}
    load_weights(model, from_dinov2_hf(tensors), "a file")
    attention = f"{layer}attention.attention."
    for row, part in enumerate(("query", "key", "value")):
        rows = slice(8 * row, 8 * row + 8)
        qkv = model.blocks[0].attn.qkv
        assert torch.equal(qkv.weight[rows], tensors[f"{attention}{part}.weight"])
        assert torch.equal(qkv.bias[rows], tensors[f"{attention}{part}.bias"])
    assert torch.equal(model.blocks[0].ls2.gamma, tensors[f"{layer}layer_scale2.lambda1"])
    assert torch.equal(model.norm.bias, tensors["layernorm.bias"])


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
        ("timm/resnet18", "cannot be an encoder"),
        ("timm/swin_base_patch4_window7_224", "no plain vision transformer"),
        ("timm/no_such_model", "timm has no model"),
    ],
)
def test_unknown_encoders(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_encoder(name, weights="random")


def test_hub_id_without_card_needs_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="hub is out of reach; take an encoder card"):
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
