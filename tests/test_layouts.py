"""Published namings: loaded weights compute what their own code computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from celltyper.encoders import load_card, load_encoder
from celltyper.encoders.build import build_timm_model
from celltyper.encoders.weights import load_weights, read_weights
from celltyper.errors import CheckpointError

Tensors = dict[str, Tensor]
WIDTH, DEPTH, HEADS = 48, 4, 3


def twin_of(name: str) -> Any:
    return build_timm_model(load_card(name), twin=True).eval()


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            # bias, layer scale and tokens would be zero or one, and any mistake in them unseen
            p.normal_(std=0.3)
    return model.eval()


def made(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def assert_tokens(model: nn.Module, images: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        found = model.forward_features(images)
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# transformers


def transformers_model(kind: str, card: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        patch_size=load_card(card).patch_size,
        **options,
    )
    torch.manual_seed(1)
    return randomised(getattr(transformers, f"{kind}Model")(config))


def transformers_file(model: Any, folder: Path) -> Tensors:
    # not its state_dict: transformers 5 renames in memory what it reads and writes
    model.save_pretrained(folder)
    return read_weights(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["phikon-v2", "midnight", "hibou-b", "hibou-l"])
def test_dinov2_of_transformers(name: str, tmp_path: Path) -> None:
    card, model = load_card(name), twin_of(name)
    size = card.twin["img_size"]
    options: dict[str, Any] = {"use_swiglu_ffn": "Glu" in type(model.blocks[0].mlp).__name__}
    kind = "Dinov2"
    if card.prefix_tokens > 1:
        kind, options = "Dinov2WithRegisters", options | {"num_register_tokens": 4}
    theirs = transformers_model(kind, name, image_size=size, **options)
    load_weights(model, transformers_file(theirs, tmp_path), "a file")
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(pixel_values=images).last_hidden_state
    assert expected.shape[1] == card.prefix_tokens + (size // card.patch_size) ** 2
    assert_tokens(model, images, expected)


@pytest.mark.parametrize("prefix", ["", "vit.", "module."])
def test_vit_of_transformers(prefix: str, tmp_path: Path) -> None:
    options = {"image_size": 64, "intermediate_size": 4 * WIDTH, "layer_norm_eps": 1e-6}
    theirs = transformers_model("ViT", "phikon", **options)
    tensors = {f"{prefix}{k}": v for k, v in transformers_file(theirs, tmp_path).items()}
    assert f"{prefix}pooler.dense.weight" in tensors
    if prefix == "vit.":
        tensors |= made({"classifier.weight": (2, WIDTH), "classifier.bias": (2,)})
    model = twin_of("phikon")
    load_weights(model, tensors, "a file")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_tokens(model, images, theirs(pixel_values=images).last_hidden_state)


@pytest.mark.parametrize("biases", ["kept", "zero", "lost"])
def test_dinov3_of_transformers(biases: str, tmp_path: Path) -> None:
    name = "vit_small_patch16_dinov3"
    options = {"intermediate_size": 4 * WIDTH, "num_register_tokens": 4}
    theirs = transformers_model("DINOv3ViT", name, **options)
    # timm has this model with biases of query and value, and without
    card, model = load_card(name), twin_of(name)
    if biases == "kept":
        card = card.model_copy(update={"timm_name": f"{name}_qkvb"})
        model = build_timm_model(card, twin=True).eval()
    elif biases == "zero":
        with torch.no_grad():
            for key, value in theirs.named_parameters():
                if key.endswith(("q_proj.bias", "v_proj.bias")):
                    value.zero_()
    tensors = transformers_file(theirs, tmp_path)
    assert sum(key.endswith("_proj.bias") and "attention" in key for key in tensors) == 3 * DEPTH
    if biases == "lost":
        with pytest.raises(CheckpointError, match=r"8 left over \(blocks.0.attn.q_proj.bias, "):
            load_weights(model, tensors, "a file")
        return
    load_weights(model, tensors, "a file")
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        assert_tokens(model, images, theirs(pixel_values=images).last_hidden_state)


def test_part_of_a_file_of_transformers_is_refused(tmp_path: Path) -> None:
    theirs = transformers_model("Dinov2", "phikon-v2", image_size=64)
    tensors = transformers_file(theirs, tmp_path)
    model = twin_of("phikon-v2")
    less = {k: v for k, v in tensors.items() if not k.endswith("0.attention.attention.key.weight")}
    message = r"1 missing \(blocks.0.attn.qkv.weight\); 2 left over \(blocks.0.attn.q_proj.weight, "
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, less, "a file")
    less = {k: v for k, v in tensors.items() if not k.endswith("0.attention.attention.value.bias")}
    with pytest.raises(CheckpointError, match=r"1 missing \(blocks.0.attn.qkv.bias\)"):
        load_weights(model, less, "a file")


# the forward of a vision transformer as DINO, DINOv2 and timm write it


def norm(w: Tensors, x: Tensor, at: str, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{at}.weight"], w[f"{at}.bias"], eps)


def linear(w: Tensors, x: Tensor, at: str) -> Tensor:
    return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def patches(w: Tensors, images: Tensor, at: str) -> Tensor:
    kernel = w[f"{at}.weight"]
    x = F.conv2d(images, kernel, w[f"{at}.bias"], stride=kernel.shape[-1])
    return x.flatten(2).transpose(1, 2)


def vit_by_hand(
    w: Tensors, images: Tensor, block: Callable[[int], str] = "blocks.{}.".format
) -> Tensor:
    """Tokens of a vision transformer, pre-norm, with registers after the positions are added."""
    x = patches(w, images, "patch_embed.proj")
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    if "register_tokens" in w:
        registers = w["register_tokens"].expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
    one = torch.ones(1)
    for i in range(DEPTH):
        at = block(i)
        q, k, v = linear(w, norm(w, x, f"{at}norm1"), f"{at}attn.qkv").chunk(3, dim=-1)
        x = x + linear(w, attention(q, k, v), f"{at}attn.proj") * w.get(f"{at}ls1.gamma", one)
        y = norm(w, x, f"{at}norm2")
        if f"{at}mlp.w12.weight" in w:
            gate, value = linear(w, y, f"{at}mlp.w12").chunk(2, dim=-1)
            y = linear(w, F.silu(gate) * value, f"{at}mlp.w3")
        else:
            y = linear(w, F.gelu(linear(w, y, f"{at}mlp.fc1")), f"{at}mlp.fc2")
        x = x + y * w.get(f"{at}ls2.gamma", one)
    return norm(w, x, "norm")


def dino_shapes(patch: int, tokens: int, block: Callable[[int], str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + tokens, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, patch, patch),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        for layer in ("norm1", "norm2"):
            shapes |= {f"{block(i)}{layer}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
        for layer, shape in layers.items():
            shapes[f"{block(i)}{layer}.weight"] = shape
            shapes[f"{block(i)}{layer}.bias"] = shape[:1]
    return shapes


def mlp_shapes(
    names: tuple[str, str], first: int, second: int, at: str
) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}mlp.{names[0]}.weight": (first, WIDTH),
        f"{at}mlp.{names[0]}.bias": (first,),
        f"{at}mlp.{names[1]}.weight": (WIDTH, second),
        f"{at}mlp.{names[1]}.bias": (WIDTH,),
    }


def dinov2_weights(*, gated: bool, registers: int, block: Callable[[int], str]) -> Tensors:
    shapes = dino_shapes(14, 16, block)
    for i in range(DEPTH):
        shapes |= {f"{block(i)}ls{j}.gamma": (WIDTH,) for j in (1, 2)}
        if gated:
            # two thirds of four times the width, up to a multiple of 8: DINOv2's fused SwiGLU
            hidden = 8 * -(-int(4 * WIDTH * 2 / 3) // 8)
            shapes |= mlp_shapes(("w12", "w3"), 2 * hidden, hidden, block(i))
        else:
            shapes |= mlp_shapes(("fc1", "fc2"), 4 * WIDTH, 4 * WIDTH, block(i))
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    return made(shapes | {"mask_token": (1, WIDTH)})


def heads(*names: str) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        shapes |= {
            f"{name}.mlp.0.weight": (8, WIDTH),
            f"{name}.mlp.0.bias": (8,),
            f"{name}.last_layer.weight_g": (9, 1),
            f"{name}.last_layer.weight_v": (9, 8),
        }
    return made(shapes)


def behind(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{k}": v for k, v in tensors.items()}


def in_chunks(i: int) -> str:
    # the first chunk of DINOv2 holds blocks 0 and 1, the second 2 and 3
    return f"blocks.{i // 2}.{i}."


def plain(i: int) -> str:
    return f"blocks.{i}."


@pytest.mark.parametrize("wrapping", ["teacher", "flat", "module", "none"])
@pytest.mark.parametrize(
    ("name", "gated", "registers"),
    [("vit_giant_patch14_reg4_dinov2", True, 4), ("vit_small_patch14_dinov2", False, 0)],
)
def test_dinov2_of_its_own_code(
    name: str, gated: bool, registers: int, wrapping: str, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    block = plain if wrapping == "none" else in_chunks
    teacher = dinov2_weights(gated=gated, registers=registers, block=block)
    student = dinov2_weights(gated=gated, registers=registers, block=block)
    beside = heads("dino_head", "ibot_head")
    content: dict[str, Any] = {
        "teacher": {
            "student": behind("backbone.", student) | beside,
            "teacher": behind("backbone.", teacher) | beside,
            "iteration": 3,
        },
        "flat": {
            "model": behind("student.backbone.", student)
            | behind("teacher.backbone.", teacher)
            | behind("teacher.", beside)
            | made({"dino_loss.center": (1, 9)}),
        },
        "module": {"state_dict": behind("module.backbone.", teacher) | behind("module.", beside)},
        "none": teacher,
    }[wrapping]
    torch.save(content, tmp_path / "teacher_checkpoint.pth")
    card = load_card(name)
    model = build_timm_model(
        card.model_copy(update={"twin": card.twin | {"img_size": 56}}), twin=True
    )
    load_weights(model.eval(), read_weights(tmp_path / "teacher_checkpoint.pth"), "a file")
    images = torch.randn(2, 3, 56, 56)
    assert_tokens(model, images, vit_by_hand(teacher, images, block))


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_dino_of_its_own_code(which: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    shapes = dino_shapes(16, 16, plain)
    for i in range(DEPTH):
        shapes |= mlp_shapes(("fc1", "fc2"), 4 * WIDTH, 4 * WIDTH, plain(i))
    one, other = made(shapes), made(shapes)
    # iBOT adds a second output layer
    beside = heads("head") | made({"head.last_layer2.weight_g": (9, 1)})
    content = {which: behind("module.backbone.", one) | behind("module.", beside), "epoch": 3}
    if which == "teacher":
        content = {"student": behind("module.backbone.", other)} | content
    torch.save(content, tmp_path / "checkpoint.pth")
    model = twin_of("vit_small_patch16")
    load_weights(model, read_weights(tmp_path / "checkpoint.pth"), "a file")
    images = torch.randn(2, 3, 64, 64)
    assert_tokens(model, images, vit_by_hand(one, images))


def test_dinov2_of_another_depth_is_refused() -> None:
    tensors = dinov2_weights(gated=False, registers=0, block=in_chunks)
    less = {k: v for k, v in tensors.items() if not k.startswith("blocks.1.3.")}
    with pytest.raises(CheckpointError, match=r"14 missing \(blocks.3.attn.proj.bias, "):
        load_weights(twin_of("vit_small_patch14_dinov2"), less, "a file")
    tensors["register_tokens"] = torch.zeros(1, 4, WIDTH)
    with pytest.raises(CheckpointError, match=r"1 left over \(reg_token\)"):
        load_weights(twin_of("vit_small_patch14_dinov2"), tensors, "a file")


# the trunk of a vision-language model


@pytest.mark.parametrize(("name", "prefix"), [("titan-v", "trunk."), ("conch", "visual.trunk.")])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_trunk_is_taken_out_of_a_vision_language_model(
    name: str, prefix: str, wrapper: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    shapes = {k: tuple(v.shape) for k, v in twin_of(name).state_dict().items()}
    theirs = made(shapes)
    beside = prefix.removesuffix("trunk.")
    whole = behind(prefix, theirs) | {
        f"{beside}attn_pool_contrast.query": torch.rand(1, 48),
        f"{beside}ln_contrast.weight": torch.rand(48),
        "text.positional_embedding": torch.rand(9, 48),
        "logit_scale": torch.rand(()),
    }
    torch.save(behind(wrapper, whole), tmp_path / "pytorch_model.bin")
    unprepared = {"mean": (0, 0, 0), "std": (1, 1, 1), "input_size": None}
    encoder = load_encoder(name, weights="twin", adapt="full", **unprepared)
    load_weights(encoder.model, read_weights(tmp_path / "pytorch_model.bin"), "a file")
    images = torch.rand(2, 3, 64, 64)
    expected = vit_by_hand(theirs, images)
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed(images), expected[:, 0], rtol=1e-4, atol=1e-4)
        found = encoder(images)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected[:, 1:], rtol=1e-4, atol=1e-4)


def test_a_trunk_that_is_not_whole_or_not_one_is_refused() -> None:
    model = twin_of("titan-v")
    trunk = behind("visual.trunk.", dict(model.state_dict()))
    less = {k: v for k, v in trunk.items() if not k.endswith("norm.bias")}
    with pytest.raises(CheckpointError, match=r"1 missing \(norm.bias\)"):
        load_weights(model, less, "a file")
    with pytest.raises(CheckpointError, match="left over"):
        load_weights(model, trunk | {"text.trunk.norm.bias": torch.zeros(48)}, "a file")


# BEiT-3 and MUSK


def multiway_weights(tokens: int = 16) -> Tensors:
    """MUSK's file: every layer twice, A for images and B for text, and what lies beside them."""
    shapes: dict[str, tuple[int, ...]] = {
        "beit3.vision_embed.cls_token": (1, 1, WIDTH),
        "beit3.vision_embed.mask_token": (1, 1, WIDTH),
        "beit3.vision_embed.proj.weight": (WIDTH, 3, 16, 16),
        "beit3.vision_embed.proj.bias": (WIDTH,),
        "beit3.text_embed.weight": (11, WIDTH),
        # two rows that are never used, the class token, the patches
        "beit3.encoder.embed_positions.A.weight": (3 + tokens, WIDTH),
        "beit3.encoder.embed_positions.B.weight": (9, WIDTH),
        "language_head.weight": (WIDTH, WIDTH),
        "vision_head.weight": (WIDTH, WIDTH),
        "logit_scale": (),
    }
    for way in "AB":
        shapes |= {f"beit3.encoder.layer_norm.{way}.{k}": (WIDTH,) for k in ("weight", "bias")}
        for i in range(DEPTH):
            at = f"beit3.encoder.layers.{i}."
            layers = {f"self_attn.{p}_proj.{way}": (WIDTH, WIDTH) for p in ("q", "k", "v", "out")}
            layers |= {f"ffn.{way}.fc1": (4 * WIDTH, WIDTH), f"ffn.{way}.fc2": (WIDTH, 4 * WIDTH)}
            for norm_name, width in (
                (f"self_attn_layer_norm.{way}", WIDTH),
                (f"final_layer_norm.{way}", WIDTH),
                (f"self_attn.inner_attn_ln.{way}", WIDTH),
                (f"ffn.{way}.ffn_layernorm", 4 * WIDTH),
            ):
                shapes |= {f"{at}{norm_name}.{k}": (width,) for k in ("weight", "bias")}
            for layer, shape in layers.items():
                shapes[f"{at}{layer}.weight"] = shape
                shapes[f"{at}{layer}.bias"] = shape[:1]
    return made(shapes)


def beit3_by_hand(tensors: Tensors, images: Tensor) -> Tensor:
    """Tokens of BEiT-3 of an image: pre-norm, and a norm inside attention and inside the MLP."""
    w = {k.removeprefix("beit3."): v for k, v in tensors.items()}
    x = patches(w, images, "vision_embed.proj")
    x = torch.cat([w["vision_embed.cls_token"].expand(len(x), -1, -1), x], dim=1)
    # positions are counted from 2
    x = x + w["encoder.embed_positions.A.weight"][2 : 2 + x.shape[1]]
    for i in range(DEPTH):
        at = f"encoder.layers.{i}."
        y = norm(w, x, f"{at}self_attn_layer_norm.A", 1e-5)
        q, k, v = (linear(w, y, f"{at}self_attn.{p}_proj.A") for p in "qkv")
        y = norm(w, attention(q, k, v), f"{at}self_attn.inner_attn_ln.A", 1e-5)
        x = x + linear(w, y, f"{at}self_attn.out_proj.A")
        y = norm(w, x, f"{at}final_layer_norm.A", 1e-5)
        y = norm(w, F.gelu(linear(w, y, f"{at}ffn.A.fc1")), f"{at}ffn.A.ffn_layernorm", 1e-5)
        x = x + linear(w, y, f"{at}ffn.A.fc2")
    return norm(w, x, "encoder.layer_norm.A", 1e-5)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_vision_branch_is_taken_out_of_musk(wrapper: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    tensors = multiway_weights()
    save_file(behind(wrapper, tensors), tmp_path / "model.safetensors")
    model = twin_of("musk")
    load_weights(model, read_weights(tmp_path / "model.safetensors"), "a file")
    images = torch.randn(2, 3, 64, 64)
    assert_tokens(model, images, beit3_by_hand(tensors, images))


def test_positions_of_musk_are_resampled_to_another_grid() -> None:
    tensors = multiway_weights(tokens=64)
    positions = tensors["beit3.encoder.embed_positions.A.weight"]
    # a class token of 5, and a ramp along columns
    positions[2] = 5
    positions[3:] = torch.arange(8.0).repeat(8)[:, None]
    model = twin_of("musk")
    load_weights(model, tensors, "a file")
    assert (model.pos_embed[0, 0] == 5).all()
    grid = model.pos_embed[0, 1:, 0].reshape(4, 4)
    # away from the border the mean of two neighbours: 2.5 and 4.5
    assert grid[1, 1:3].tolist() == pytest.approx([2.5, 4.5], abs=0.1)


def test_part_of_musk_is_refused() -> None:
    tensors, model = multiway_weights(), twin_of("musk")
    key = "beit3.encoder.layers.2.ffn.A.ffn_layernorm.bias"
    less = {k: v for k, v in tensors.items() if k != key}
    with pytest.raises(CheckpointError, match=r"1 missing \(blocks.2.mlp.norm.bias\)"):
        load_weights(model, less, "a file")
    with pytest.raises(CheckpointError, match=r"1 left over \(pooler.dense.bias\)"):
        load_weights(model, tensors | {"pooler.dense.bias": torch.zeros(1)}, "a file")
    language = {k.replace(".A.", ".B."): v for k, v in tensors.items()}
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(model, language, "a file")


# query, key and value


def test_fused_weights_are_split_for_a_model_that_has_them_apart() -> None:
    torch.manual_seed(5)
    sizes = {"embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "img_size": 56}
    apart, other = (
        timm.create_model("eva02_base_patch14_224", num_classes=0, **sizes) for _ in range(2)
    )
    randomised(apart)
    fused = dict(apart.state_dict())
    for i in range(2):
        at = f"blocks.{i}.attn."
        parts = [fused.pop(f"{at}{p}_proj.weight") for p in "qkv"]
        fused[f"{at}qkv.weight"] = torch.cat(parts)
        biases = [fused.pop(f"{at}q_proj.bias"), torch.randn(WIDTH), fused.pop(f"{at}v_proj.bias")]
        fused[f"{at}qkv.bias"] = torch.cat(biases)
    load_weights(other.eval(), fused, "a file")
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert_tokens(other, images, apart.forward_features(images))


def test_weights_apart_without_a_key_bias_are_joined() -> None:
    torch.manual_seed(6)
    whole, other = randomised(twin_of("vit_tiny_patch16")), twin_of("vit_tiny_patch16")
    apart = dict(whole.state_dict())
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            parts = apart.pop(f"blocks.{i}.attn.qkv.{kind}").chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                apart[f"blocks.{i}.attn.{letter}_proj.{kind}"] = part
        # it adds the same to all scores of a query, so the softmax stays as it is
        assert apart.pop(f"blocks.{i}.attn.k_proj.bias").abs().min() > 0
    load_weights(other, apart, "a file")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_tokens(other, images, whole.forward_features(images))
