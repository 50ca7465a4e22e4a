"""Swin, ConvNeXt and EfficientNet: maps that get coarser with depth, under the same contract."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from celltyper.decoders import DECODERS, build_decoder, find_decoder
from celltyper.encoders import find_card, list_cards, load_card, load_encoder
from celltyper.encoders.build import build_timm_model
from celltyper.encoders.pyramid import TimmPyramid, in_timm_names
from celltyper.encoders.weights import load_weights, read_weights
from celltyper.errors import CheckpointError, ConfigError
from celltyper.models import CellTyper
from celltyper.testing import check_decoder, check_encoder

SWIN, CONVNEXT, EFFICIENTNET = "swin_base_patch4_window7", "convnextv2_tiny", "efficientnetv2_m"
KINDS = (SWIN, CONVNEXT, EFFICIENTNET)

# channels at strides 4, 8, 16 and 32, from the tables of the papers that the cards name
CHANNELS = {
    SWIN: [128, 256, 512, 1024],
    "convnextv2_tiny": [96, 192, 384, 768],
    "convnextv2_base": [128, 256, 512, 1024],
    EFFICIENTNET: [48, 80, 176, 512],
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def twin(name: str, **options: object) -> TimmPyramid:
    encoder = load_encoder(name, weights="twin", adapt="full", **options)
    assert isinstance(encoder, TimmPyramid)
    return encoder


def randomise(model: nn.Module) -> None:
    # zeros and ones, as which biases and norms begin, would hide any mistake in them
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.normal_(std=0.2).add_(1.0 if key.endswith("running_var") else 0.0)
            if key.endswith("running_var"):
                value.abs_()


def normalised(encoder: TimmPyramid, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.card.mean, encoder.card.std))
    return (images - mean) / std


def test_cards_of_pyramids() -> None:
    assert {n for n in list_cards() if load_card(n).family == "pyramid"} == CHANNELS.keys()


@pytest.mark.parametrize("name", CHANNELS)
def test_card_describes_its_architecture(name: str) -> None:
    card = load_card(name)
    with torch.device("meta"):
        model = build_timm_model(card)
    assert card.parameters is not None
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(card.parameters, rel=0.01)
    encoder = TimmPyramid(model, input_size=card.input_size).to("meta")
    assert encoder.channels == CHANNELS[name]
    assert encoder.strides == [4, 8, 16, 32]
    assert encoder.patch_size == card.patch_size == 32
    assert encoder.embed_dim == card.embed_dim
    shapes = [tuple(m.shape) for m in encoder(torch.rand(2, 3, 250, 190, device="meta"))]
    sizes = [(64, 48), (32, 24), (16, 12), (8, 6)]
    assert shapes == [(2, c, *size) for c, size in zip(CHANNELS[name], sizes, strict=True)]
    vectors = encoder.embed(torch.rand(2, 3, 250, 190, device="meta"))
    assert vectors.shape == (2, card.embed_dim)
    assert card.input_size % 32 == 0
    assert card.hub_id == f"timm/{timm.get_pretrained_cfg(card.timm_name).hf_hub_id[5:]}"
    published = timm.get_pretrained_cfg(card.timm_name)
    assert (card.mean, card.std) == (published.mean, published.std)
    assert card.input_size == published.input_size[-1]
    assert card.licence.lower() == published.license


def kinds_of_weights(model: nn.Module) -> set[str]:
    return {re.sub(r"(layers|blocks|stages|\b)\.\d+", "", name) for name in model.state_dict()}


@pytest.mark.parametrize("name", CHANNELS)
def test_twin_fits_the_contract_and_has_the_layout_of_its_card(name: str) -> None:
    encoder = twin(name)
    check_encoder(encoder)
    assert encoder.strides == [4, 8, 16, 32]
    assert sum(p.numel() for p in encoder.parameters()) < 1e6
    with torch.device("meta"):
        full = build_timm_model(load_card(name))
    assert kinds_of_weights(encoder.model) == kinds_of_weights(full)


@pytest.mark.parametrize("name", KINDS)
def test_maps_are_those_of_timm(name: str) -> None:
    card, encoder = load_card(name), twin(name)
    randomise(encoder.model)
    theirs = timm.create_model(
        card.timm_name,
        features_only=True,
        out_indices=(-4, -3, -2, -1),
        **card.timm_args,
        **card.twin,
    ).eval()
    state = encoder.model.state_dict()
    if name != EFFICIENTNET:  # timm lays the levels of the others out flat
        state = {re.sub(r"^(stem|stages|layers)\.(\d)", r"\1_\2", k): v for k, v in state.items()}
    assert not theirs.load_state_dict(state, strict=False).missing_keys
    # of Swin a size that whole windows fill
    images = torch.rand(2, 3, 224, 224) if name == SWIN else torch.rand(2, 3, 96, 64)
    expected = theirs(normalised(encoder, images))
    found = encoder(images)
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        if name == SWIN:
            b = b.permute(0, 3, 1, 2)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_embedding_is_what_timm_gives_its_classifier(name: str) -> None:
    encoder = twin(name, input_size=64)
    randomise(encoder.model)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = encoder.model(normalised(encoder, images))
        assert expected.std() > 1e-3
        torch.testing.assert_close(encoder.embed(images), expected)
        # the centre of a larger image, whose shorter side already fits
        wide = torch.cat([torch.zeros(2, 3, 64, 20), images, torch.zeros(2, 3, 64, 20)], dim=3)
        torch.testing.assert_close(encoder.embed(wide), expected)


@pytest.mark.parametrize(("rows", "cols"), [(224, 448), (256, 320)])
def test_swin_computes_what_torchvision_does(rows: int, cols: int) -> None:
    theirs = torchvision.models.SwinTransformer(
        [4, 4], 12, [2, 2, 2, 2], [1, 2, 4, 8], [7, 7], num_classes=1
    ).eval()
    randomise(theirs)
    theirs.head = nn.Identity()
    renames = (
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2}.downsample."),
        (r"^features\.([1357])\.", lambda m: f"layers.{int(m[1]) // 2}.blocks."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
    )
    weights = {}
    for key, value in theirs.state_dict().items():
        for pattern, new in renames:
            key = re.sub(pattern, new, key)
        weights[key] = value
    encoder = twin(SWIN)
    load_weights(encoder.model, in_timm_names(weights, encoder.model), "torchvision")
    images, square = torch.rand(1, 3, rows, cols), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        # the last level was a single window in training; torchvision shifts windows there as
        # soon as there are two, which the published model never saw
        wide, last = normalised(encoder, images), normalised(encoder, square)
        for i, part in enumerate(theirs.features):
            wide, last = part(wide), part(last)
            if i in (1, 3, 5):
                found = encoder(images)[i // 2].permute(0, 2, 3, 1)
                torch.testing.assert_close(found, wide, rtol=1e-3, atol=1e-4)
        found = encoder(square)[3].permute(0, 2, 3, 1)
        torch.testing.assert_close(found, last, rtol=1e-3, atol=1e-4)
        expected = theirs(normalised(encoder, square))
        torch.testing.assert_close(encoder.embed(square), expected, rtol=1e-3, atol=1e-4)


def test_windows_of_swin_do_not_depend_on_the_image() -> None:
    encoder = twin(SWIN, feature_blocks=[0])
    assert (encoder.channels, encoder.strides, encoder.patch_size) == ([12], [4], 32)
    for layer in encoder.model.layers:
        assert layer.blocks[0].window_size == (7, 7)
    # 224 px are a whole number of windows and of strides: the same is seen that far on
    images = torch.rand(1, 3, 448, 672)
    whole, part = encoder(images)[0], encoder(images[:, :, 224:, 448:])[0]
    inner = slice(7, -7)
    torch.testing.assert_close(part[:, :, inner, inner], whole[:, :, 56:, 112:][:, :, inner, inner])


def test_rows_of_swin_do_not_see_the_other_end_of_the_image() -> None:
    # 256 px are 64 tokens, nine windows and a token
    encoder = twin(SWIN, feature_blocks=[0])
    images = torch.rand(1, 3, 256, 256)
    before = encoder(images)[0]
    images[:, :, -8:] += 1
    change = (encoder(images)[0] - before).abs().amax(dim=(0, 1, 3))
    assert change[-1] > 0.1
    assert change[:-14].max() == 0
    # a copy attends with its own weights
    other, expected = copy.deepcopy(encoder), encoder(images)[0]
    randomise(encoder.model)
    assert torch.equal(other(images)[0], expected)


@pytest.mark.parametrize("name", KINDS)
def test_image_that_the_stride_does_not_divide_is_continued_at_bottom_and_right(name: str) -> None:
    encoder = twin(name)
    images = torch.rand(1, 3, 37, 50)
    whole = F.pad(images, (0, 14, 0, 27), mode="replicate")
    for found, expected, stride in zip(
        encoder(images), encoder(whole), (4, 8, 16, 32), strict=True
    ):
        assert found.shape[2:] == (64 // stride, 64 // stride)
        torch.testing.assert_close(found, expected)
    assert [m.shape[2:] for m in encoder(images[:, :, :1, :5])] == [
        (32 // s, 32 // s) for s in encoder.strides
    ]


@pytest.mark.parametrize("name", KINDS)
def test_maps_lie_where_the_image_is(name: str) -> None:
    encoder = twin(name)
    images = torch.rand(8, 3, 224, 224)
    before = encoder(images)
    images[:, :, 64:96, 128:160] = torch.rand(8, 3, 32, 32)
    for old, new, stride in zip(before, encoder(images), encoder.strides, strict=True):
        change = (new - old).detach().square().sum(dim=(0, 1))
        weight = change / change.sum()
        at = (torch.arange(len(change)) + 0.5) * stride
        # convolutions that halve are off by half a pixel of what they halve, to either side
        off = 4 + stride / 2
        assert float((weight.sum(dim=1) * at).sum()) == pytest.approx(80, abs=off)
        assert float((weight.sum(dim=0) * at).sum()) == pytest.approx(144, abs=off)


def test_levels_are_the_last_four_or_as_named() -> None:
    assert twin(EFFICIENTNET).levels == [1, 2, 3, 4]
    encoder = twin(EFFICIENTNET, feature_blocks=[0, 1, 2, 3])
    assert encoder.strides == [2, 4, 8, 16]
    assert encoder.patch_size == 32
    check_encoder(encoder)
    for wrong in ([0, 5], [1, 0], []):
        with pytest.raises(ConfigError, match=r"must ascend within 0\.\.4 without repeats"):
            twin(EFFICIENTNET, feature_blocks=wrong)
    with pytest.raises(ConfigError, match="needs a class token, which a pyramid has not"):
        twin(CONVNEXT, embedding="cls")


def test_magnification_divides_the_strides() -> None:
    encoder, plain = twin(CONVNEXT, magnify=2), twin(CONVNEXT)
    assert (encoder.patch_size, encoder.strides) == (16, [2, 4, 8, 16])
    check_encoder(encoder)
    images = torch.rand(1, 3, 48, 32)
    large = F.interpolate(images, scale_factor=2, mode="bicubic", antialias=True)
    for found, expected in zip(encoder(images), plain(large), strict=True):
        torch.testing.assert_close(found, expected)
    assert twin(CONVNEXT, magnify=0.5).strides == [8, 16, 32, 64]
    assert twin(CONVNEXT, magnify=32 / 24).strides == [3, 6, 12, 24]
    # 32 / 3 px are rounded to 11, of which a level at an eighth has no whole stride
    with pytest.raises(ConfigError, match=r"magnification 2\.91 .* take 2 or 4$"):
        twin(CONVNEXT, magnify=3)
    assert twin(CONVNEXT, magnify=4).strides == [1, 2, 4, 8]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("encoder", KINDS)
def test_decoder_on_a_pyramid(encoder: str, name: str) -> None:
    network = twin(encoder)
    decoder = build_decoder(name, network.channels, 32, network.strides, width=4)
    images = torch.rand(2, 3, 70, 45)
    out = decoder(network(images), images)
    assert out.shape == (2, decoder.out_channels, 70, 45)
    (out * torch.randn_like(out)).mean().backward()
    for part, tensor in (*decoder.named_parameters(), *network.named_parameters()):
        if not re.match(r"model\.(norm|head|conv_head|bn2)\.", part):
            assert tensor.grad is not None, part


@pytest.mark.parametrize("magnified", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_fits_the_contract_on_pyramids(name: str, magnified: bool) -> None:
    # the twins of Swin and ConvNeXt have the same channels
    channels = [8, 16, 24, 64] if magnified else [12, 24, 48, 96]
    strides = [2, 4, 8, 16] if magnified else [4, 8, 16, 32]
    check_decoder(find_decoder(name), channels, strides[-1], strides, width=4)


class OnePlace(nn.Module):
    """A decoder that knows of one grid only."""

    def __init__(self, channels: list[int], patch_size: int) -> None:
        super().__init__()
        self.out_channels = 4
        self.project = nn.Conv2d(channels[-1], 4, 1)

    def forward(self, features: Sequence[Tensor], images: Tensor) -> Tensor:
        return F.interpolate(self.project(features[-1]), images.shape[2:])


class AllPlaces(OnePlace):
    def __init__(self, channels: list[int], patch_size: int, strides: list[int]) -> None:
        super().__init__(channels, patch_size)
        self.told = strides


class OwnPyramid(nn.Module):
    """An encoder of one's own with maps of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.strides, self.patch_size = [4, 6, 8, 10], [2, 4, 8, 16], 16
        sizes = zip((3, *self.channels[:-1]), self.channels, strict=True)
        self.steps = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in sizes)

    def forward(self, images: Tensor) -> list[Tensor]:
        bottom, right = -images.shape[2] % 16, -images.shape[3] % 16
        maps = [F.pad(images, (0, right, 0, bottom), mode="replicate")]
        for step in self.steps:
            maps.append(step(maps[-1]))
        return maps[1:]


@pytest.mark.parametrize("decoder", [*DECODERS, AllPlaces])
def test_own_pyramid_with_every_decoder(decoder: str | type[nn.Module]) -> None:
    encoder = OwnPyramid()
    check_encoder(encoder)
    model = CellTyper(encoder, decoder, classes=("a", "b"))
    assert model(torch.rand(1, 3, 50, 33))["phenotype"].shape == (1, 3, 50, 33)
    if decoder is AllPlaces:
        assert model.decoder.told == [2, 4, 8, 16]


def test_decoder_without_strides_is_refused_on_a_pyramid_only() -> None:
    message = r"'OnePlace' takes maps of one grid only.*\[2, 4, 8, 16\]; give its constructor"
    with pytest.raises(ConfigError, match=message) as caught:
        CellTyper(OwnPyramid(), OnePlace)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="takes maps of one grid only"):
        build_decoder(f"{__name__}:OnePlace", [4, 6], 16, [8, 16])
    # strides that are all the patch size are no pyramid
    assert build_decoder(f"{__name__}:OnePlace", [4, 6], 16, [16, 16]).out_channels == 4


@pytest.mark.parametrize("adapt", ["frozen", "full"])
@pytest.mark.parametrize("name", KINDS)
def test_training_step(name: str, adapt: str) -> None:
    encoder = load_encoder(name, weights="twin", adapt=adapt)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    model = CellTyper(encoder, "dpt", classes=("a", "b")).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images, target = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    target[:, 10:30, 20:50] = 1
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(images)["phenotype"], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    changed = {k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])}
    if adapt == "frozen":
        assert not changed
    else:
        assert any(k.endswith("weight") for k in changed)
        # what a frozen encoder must keep does move here
        assert any(k.endswith("running_mean") for k in changed) == (name == EFFICIENTNET)


@pytest.mark.parametrize(
    ("name", "targets", "layers"),
    [(SWIN, "attention", 8), (SWIN, "attention+mlp", 32), (CONVNEXT, "attention+mlp", 10)],
)
def test_lora_finds_its_layers(name: str, targets: str, layers: int) -> None:
    encoder = load_encoder(name, weights="twin", adapt="lora", lora={"targets": targets})
    check_encoder(encoder)
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    # two matrices each; Swin has 8 blocks of qkv, proj, fc1 and fc2, ConvNeXt 5 of fc1 and fc2
    assert len(trained) == 2 * layers
    assert all("lora_" in n for n in trained)


@pytest.mark.parametrize(
    ("name", "targets"), [(CONVNEXT, "attention"), (EFFICIENTNET, "attention+mlp")]
)
def test_lora_without_layers_to_adapt_is_refused(name: str, targets: str) -> None:
    with pytest.raises(ConfigError, match=f"lora targets '{re.escape(targets)}'"):
        load_encoder(name, weights="twin", adapt="lora", lora={"targets": targets})


def swin_of_microsoft(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' naming: a level ends with its downsampling, and buffers are kept."""
    theirs = {}
    for key, value in state.items():
        found = re.match(r"layers\.(\d)\.downsample\.(.*)", key)
        theirs[f"layers.{int(found[1]) - 1}.downsample.{found[2]}" if found else key] = value
        if key.endswith("attn.qkv.weight"):
            index = key.replace("qkv.weight", "relative_position_index")
            theirs[index] = torch.zeros(49, 49, dtype=torch.long)
    theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return theirs | {"head.weight": torch.rand(3, 96), "head.bias": torch.rand(3)}


def test_weights_of_swin_in_old_and_new_naming(tmp_path: Path) -> None:
    theirs, ours = twin(SWIN), twin(SWIN, seed=1)
    randomise(theirs.model)
    state = theirs.model.state_dict()
    torch.save({"model": swin_of_microsoft(state)}, tmp_path / "old.pth")
    head = {"head.fc.weight": torch.rand(3, 96), "head.fc.bias": torch.rand(3)}
    mask = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    save_file(state | head | mask, tmp_path / "new.safetensors")
    images = torch.rand(1, 3, 96, 96)
    for file in ("old.pth", "new.safetensors"):
        randomise(ours.model)
        assert not torch.allclose(ours.embed(images), theirs.embed(images))
        tensors = in_timm_names(read_weights(tmp_path / file), ours.model)
        load_weights(ours.model, tensors, file)
        for key, value in ours.model.state_dict().items():
            assert torch.equal(value, state[key]), key
        assert torch.equal(ours.embed(images), theirs.embed(images))


def convnext_by_hand(w: dict[str, Tensor], images: Tensor, depths: Sequence[int]) -> Tensor:
    """Pooled embedding of ConvNeXt V2 (doi:10.48550/arXiv.2301.00808), in its authors' naming."""

    def norm(x: Tensor, at: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{at}.weight"], w[f"{at}.bias"], eps=1e-6)

    def conv(x: Tensor, at: str, **options: int) -> Tensor:
        x = F.conv2d(x.permute(0, 3, 1, 2), w[f"{at}.weight"], w[f"{at}.bias"], **options)
        return x.permute(0, 2, 3, 1)

    x = images.permute(0, 2, 3, 1)
    for i, depth in enumerate(depths):
        at = f"downsample_layers.{i}"
        if i == 0:
            x = norm(conv(x, f"{at}.0", stride=4), f"{at}.1")
        else:
            x = conv(norm(x, f"{at}.0"), f"{at}.1", stride=2)
        for j in range(depth):
            at = f"stages.{i}.{j}"
            y = norm(conv(x, f"{at}.dwconv", padding=3, groups=x.shape[-1]), f"{at}.norm")
            y = F.gelu(y @ w[f"{at}.pwconv1.weight"].T + w[f"{at}.pwconv1.bias"])
            size = y.square().sum(dim=(1, 2), keepdim=True).sqrt()
            share = size / (size.mean(dim=-1, keepdim=True) + 1e-6)
            y = w[f"{at}.grn.gamma"] * (y * share) + w[f"{at}.grn.beta"] + y
            x = x + y @ w[f"{at}.pwconv2.weight"].T + w[f"{at}.pwconv2.bias"]
    return norm(x.mean(dim=(1, 2)), "norm")


def test_weights_of_convnext_v2_in_its_authors_naming(tmp_path: Path) -> None:
    depths, dims = (1, 1, 2, 1), (12, 24, 48, 96)
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (96,), "norm.bias": (96,)}
    shapes |= {"head.weight": (3, 96), "head.bias": (3,)}
    for i, (depth, c) in enumerate(zip(depths, dims, strict=True)):
        before = dims[i - 1] if i else 3
        kernel, normed = (4, c) if i == 0 else (2, before)
        at, order = f"downsample_layers.{i}", (0, 1) if i == 0 else (1, 0)
        shapes[f"{at}.{order[0]}.weight"] = (c, before, kernel, kernel)
        shapes[f"{at}.{order[0]}.bias"] = (c,)
        shapes |= {f"{at}.{order[1]}.{kind}": (normed,) for kind in ("weight", "bias")}
        for j in range(depth):
            at = f"stages.{i}.{j}"
            shapes |= {f"{at}.dwconv.weight": (c, 1, 7, 7), f"{at}.dwconv.bias": (c,)}
            shapes |= {f"{at}.norm.weight": (c,), f"{at}.norm.bias": (c,)}
            shapes |= {f"{at}.pwconv1.weight": (4 * c, c), f"{at}.pwconv1.bias": (4 * c,)}
            shapes |= {f"{at}.grn.{kind}": (1, 1, 1, 4 * c) for kind in ("gamma", "beta")}
            shapes |= {f"{at}.pwconv2.weight": (c, 4 * c), f"{at}.pwconv2.bias": (c,)}
    theirs = {key: 0.3 * torch.randn(shape) for key, shape in shapes.items()}
    torch.save({"model": theirs}, tmp_path / "convnextv2.pt")
    encoder = twin(CONVNEXT, input_size=64)
    tensors = in_timm_names(read_weights(tmp_path / "convnextv2.pt"), encoder.model)
    load_weights(encoder.model, tensors, "a file")
    images = torch.rand(2, 3, 64, 64)
    expected = convnext_by_hand(theirs, normalised(encoder, images), depths)
    torch.testing.assert_close(encoder.embed(images), expected, rtol=1e-3, atol=1e-3)


def test_weights_of_efficientnet_without_their_classifier(tmp_path: Path) -> None:
    theirs, ours = twin(EFFICIENTNET), twin(EFFICIENTNET, seed=1)
    randomise(theirs.model)
    state = theirs.model.state_dict()
    head = {"classifier.weight": torch.rand(3, 1280), "classifier.bias": torch.rand(3)}
    save_file(state | head, tmp_path / "model.safetensors")
    tensors = in_timm_names(read_weights(tmp_path / "model.safetensors"), ours.model)
    load_weights(ours.model, tensors, "a file")
    for key, value in ours.model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_weights_that_do_not_fit_are_refused() -> None:
    swin, convnext, efficientnet = (twin(name).model for name in KINDS)
    for model, other in ((swin, convnext), (convnext, efficientnet), (efficientnet, swin)):
        tensors = in_timm_names(other.state_dict(), model)
        with pytest.raises(CheckpointError, match=r"missing .* left over"):
            load_weights(model, tensors, "a file")
    less = dict(swin.state_dict())
    del less["norm.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(norm\.bias\)"):
        load_weights(swin, in_timm_names(less, swin), "a file")


def test_pyramid_of_timm_by_name_with_weights_from_a_file(tmp_path: Path) -> None:
    theirs = timm.create_model("resnet10t", num_classes=5).eval()
    randomise(theirs)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    encoder = load_encoder("timm/resnet10t", weights=tmp_path / "model.safetensors", input_size=64)
    card = encoder.card
    assert (card.family, card.patch_size, card.embed_dim, card.embedding) == (
        "pyramid",
        32,
        512,
        "mean",
    )
    assert encoder.channels == [64, 128, 256, 512]
    check_encoder(encoder)
    images = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
    expected = theirs.forward_head(
        theirs.forward_features((images - mean) / std), pre_logits=True
    ).detach()
    torch.testing.assert_close(encoder.embed(images), expected)
    with pytest.raises(ConfigError, match="no tiny twin; take weights='random'"):
        load_encoder("timm/resnet10t", weights="twin")


def test_windowed_pyramid_of_timm_takes_any_size() -> None:
    card = find_card("timm/swin_tiny_patch4_window7_224")
    assert card.timm_args == {"strict_img_size": False}
    assert (card.family, card.embed_dim, card.prefix_tokens) == ("pyramid", 768, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/maxvit_tiny_tf_224", r"does not take any image size.*divisible by window"),
        ("timm/inception_v3", r"does not take any image size.*its maps are"),
        ("timm/mixer_b16_224", r"cannot be an encoder here"),
    ],
)
def test_networks_of_timm_that_fit_neither_family(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        find_card(name)
    assert "\n" not in str(caught.value)
