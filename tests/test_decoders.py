from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from celltyper.decoders import DECODERS, build_decoder, find_decoder
from celltyper.decoders.grid import pad_to_grid, to_pixels
from celltyper.encoders import load_encoder
from celltyper.errors import ConfigError
from celltyper.testing import check_decoder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


NARROW = {"linear": 8, "unetr": 4, "dpt": 8, "unet": 4}


def made(p: int, rows: int, cols: int, batch: int = 1) -> tuple[list[Tensor], Tensor]:
    grid = -(-rows // p), -(-cols // p)
    return [torch.rand(batch, 6, *grid) for _ in range(4)], torch.rand(batch, 3, rows, cols)


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_fits_the_contract(name: str, patch_size: int) -> None:
    check_decoder(find_decoder(name), patch_size=patch_size, width=NARROW[name])


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_on_a_real_layout(name: str) -> None:
    encoder = load_encoder("uni2-h", "twin", "lora")
    decoder = build_decoder(name, encoder.channels, encoder.patch_size, width=NARROW[name])
    images = torch.rand(2, 3, 45, 30)
    out = decoder(encoder(images), images)
    assert out.shape == (2, decoder.out_channels, 45, 30)
    out.square().mean().backward()
    reached = [p.grad is not None for n, p in encoder.named_parameters() if ".lora_" in n]
    assert reached
    assert all(reached)


def test_grid_is_enlarged_before_it_is_cut() -> None:
    # two columns of patches, 4 px each, over an image of 5 columns. Enlarged bilinearly with
    # pixel edges on pixel edges: 0, 0, .125, .375, .625, .875, 1, 1; the image has the first 5.
    x = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
    found = to_pixels(x, x, torch.zeros(1, 3, 3, 5), 4)
    assert found.shape == (1, 1, 3, 5)
    for row in found[0, 0]:
        assert row.tolist() == pytest.approx([0, 0, 0.125, 0.375, 0.625])


def test_images_are_continued_to_the_grid() -> None:
    images = torch.arange(6.0).reshape(1, 1, 2, 3)
    found = pad_to_grid(images, torch.zeros(1, 1, 1, 1), 4)
    assert found[0, 0].tolist() == [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]


def test_linear_decoder_is_linear_in_the_tokens() -> None:
    decoder = build_decoder("linear", [6, 6], 16, width=5)
    (_, _, _, last), images = made(16, 40, 33)
    features = [torch.zeros(0), last]
    weight, bias = decoder.project.weight[:, :, 0, 0], decoder.project.bias
    tokens = torch.einsum("oc,bchw->bohw", weight, last) + bias[None, :, None, None]
    # at the corner of the image the nearest patch counts alone
    torch.testing.assert_close(decoder(features, images)[:, :, 0, 0], tokens[:, :, 0, 0])
    # pixel 24 lies half a pixel behind the centre of patch 1 (pixels 16 to 31)
    mixed = tokens[:, :, 0, 1] * (1 - 0.5 / 16) + tokens[:, :, 0, 2] * (0.5 / 16)
    torch.testing.assert_close(decoder(features, images)[:, :, 0, 24], mixed)


@pytest.mark.parametrize("name", DECODERS)
def test_pixels_far_away_do_not_matter(name: str) -> None:
    # what statistics of the tile would break, and with them "tiled equals whole"
    decoder = build_decoder(name, [6] * 4, 16, width=NARROW[name]).eval()
    assert not any(
        isinstance(m, (nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)) for m in decoder.modules()
    )
    features, images = made(16, 256, 32)
    before = decoder(features, images)
    for f in features:
        f[:, :, -1] += 5
    images[:, :, -16:] += 5
    after = decoder(features, images)
    assert torch.equal(before[:, :, :64], after[:, :, :64])
    assert not torch.allclose(before[:, :, -16:], after[:, :, -16:])


@pytest.mark.parametrize("name", ["unetr", "unet"])
def test_image_stem_sees_single_pixels(name: str) -> None:
    # wide enough that some unit is on at the pixel
    decoder = build_decoder(name, [6] * 4, 16, width=16).eval()
    features, images = made(16, 64, 64)
    before = decoder(features, images)
    images[:, :, 40, 20] += 1
    change = (decoder(features, images) - before).abs().sum(dim=(0, 1))
    assert change.max() > 0
    rows, cols = torch.nonzero(change > 0.3 * change.max()).T
    assert (rows - 40).abs().max() < 10
    assert (cols - 20).abs().max() < 10


@pytest.mark.parametrize("name", ["unetr", "dpt", "unet"])
def test_wrong_number_of_maps(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"decoder '{name}' needs 4 feature maps"):
        build_decoder(name, [8, 8, 8], 16)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("strides", [[8, 16], [32, 16, 8, 4], [8, 8, 16, 32], [0, 8, 16, 32]])
def test_wrong_strides(name: str, strides: list[int]) -> None:
    message = rf"decoder '{name}' needs a stride for each of 4 maps, from fine to coarse"
    with pytest.raises(ConfigError, match=message):
        build_decoder(name, [8] * 4, 32, strides)


def test_strides_that_do_not_double() -> None:
    strides = [2, 8, 16, 32]
    with pytest.raises(ConfigError, match=r"needs strides that double.*\[2, 8, 16, 32\].*'dpt'"):
        build_decoder("unetr", [8] * 4, 32, strides)
    features = [torch.rand(1, 8, 64 // s, 64 // s) for s in strides]
    for name in ("linear", "dpt", "unet"):
        decoder = build_decoder(name, [8] * 4, 32, strides, width=NARROW[name])
        assert decoder(features, torch.rand(1, 3, 61, 34)).shape[2:] == (61, 34)


def test_strides_of_one_grid_change_nothing() -> None:
    for name in DECODERS:
        plain, told = (
            build_decoder(name, [6] * 4, 16, *more).state_dict() for more in ([], [[16] * 4])
        )
        assert [(k, v.shape) for k, v in plain.items()] == [(k, v.shape) for k, v in told.items()]


def test_pyramid_is_used_at_its_own_resolution() -> None:
    # maps of a pyramid are not resampled, and the finest of them shows at its own stride
    for name in ("unetr", "dpt", "unet"):
        decoder = build_decoder(name, [6] * 4, 32, [4, 8, 16, 32], width=8).eval()
        features = [torch.rand(1, 6, 128 // s, 128 // s) for s in (4, 8, 16, 32)]
        images = torch.rand(1, 3, 128, 128)
        before = decoder(features, images)
        features[0][:, :, 20, 9] += 5
        change = (decoder(features, images) - before).detach().abs().sum(dim=(0, 1))
        rows, cols = torch.nonzero(change > 0.5 * change.max()).double().T
        assert (rows - 82).abs().max() < 12
        assert (cols - 38).abs().max() < 12


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unter", {}, "unknown decoder 'unter'; did you mean 'unet.*known: dpt, linear, package"),
        ("dpt", {"widht": 8}, "option of decoder 'dpt' 'widht'; did you mean 'width'"),
        (
            "dpt",
            {"strides": [4, 8, 16, 32]},
            "option of decoder 'dpt' 'strides'.*finest, stem, width",
        ),
        ("dpt", {"stem": -1}, "stem of 0 channels or more, got -1"),
        ("dpt", {"finest": 3}, "finest of 1, 2, 4 or 8, got 3"),
        ("dpt", {"width": 1}, "width of 2 or more"),
        ("unetr", {"width": 0}, "decoder 'unetr' needs a width of 1 or more, got 0"),
        ("linear", {"width": "wide"}, "decoder 'linear' needs a width of 1 or more, got 'wide'"),
        ("no.such.module:Class", {}, "cannot import 'no.such.module'"),
        ("torch.nn:NoClass", {}, "module 'torch.nn' has no class 'NoClass'"),
        ("celltyper.labels:np", {}, "has no class 'np'"),
        ("collections:OrderedDict", {}, "cannot be built with"),
    ],
)
def test_wrong_decoders(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_decoder(name, [8] * 4, 16, **options)
    assert "\n" not in str(caught.value)


def test_own_decoder_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_decoders.py").write_text(
        "from torch import nn\n"
        "from torch.nn.functional import interpolate\n"
        "class Nearest(nn.Module):\n"
        "    def __init__(self, channels, patch_size, depth=4):\n"
        "        super().__init__()\n"
        "        self.out_channels, self.p = depth, patch_size\n"
        "        self.conv = nn.Conv2d(channels[-1], depth, 1)\n"
        "    def forward(self, features, images):\n"
        "        x = interpolate(self.conv(features[-1]), scale_factor=self.p)\n"
        "        return x[:, :, :images.shape[2], :images.shape[3]]\n"
        "class Mute(Nearest):\n"
        "    def __init__(self, channels, patch_size):\n"
        "        super().__init__(channels, patch_size)\n"
        "        del self.out_channels\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    decoder = build_decoder("my_decoders:Nearest", [8], 14, depth=3)
    assert decoder.out_channels == 3
    check_decoder(find_decoder("my_decoders:Nearest"), patch_size=14)
    with pytest.raises(ConfigError, match=r"option .* 'width'.*known: depth"):
        build_decoder("my_decoders:Nearest", [8], 14, width=3)
    with pytest.raises(ConfigError, match="no integer attribute out_channels"):
        build_decoder("my_decoders:Mute", [8], 14)
    del sys.modules["my_decoders"]


def test_stem_of_dpt_sees_the_image_near_each_pixel() -> None:
    torch.manual_seed(0)
    features = [torch.randn(1, 6, 5, 5) for _ in range(4)]
    images = torch.rand(1, 3, 67, 70)
    changed = images.clone()
    changed[..., 30, 40] += 1
    plain = build_decoder("dpt", [6] * 4, 14, width=8).eval()
    assert torch.equal(plain(features, images), plain(features, changed))
    stem = build_decoder("dpt", [6] * 4, 14, width=8, stem=4).eval()
    # four convolutions of 3 pixels reach 4 pixels far
    moved = (stem(features, images) != stem(features, changed)).any(1)[0].nonzero()
    assert moved.min(0).values.tolist() == [26, 36]
    assert moved.max(0).values.tolist() == [34, 44]
    assert stem(features, images).shape == (1, stem.out_channels, 67, 70)


@pytest.mark.parametrize(("finest", "sides"), [(1, 6), (2, 12), (4, 24), (8, 48)])
def test_finest_map_of_dpt(finest: int, sides: int) -> None:
    decoder = build_decoder("dpt", [5] * 4, 14, width=4, finest=finest).eval()
    seen: list[tuple[int, ...]] = []
    decoder.leave[0].register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    out = decoder([torch.rand(2, 5, 6, 6) for _ in range(4)], torch.rand(2, 3, 80, 75))
    assert seen == [(2, 4, sides, sides)]
    assert out.shape == (2, 2, 80, 75)


def test_finest_is_for_one_grid() -> None:
    with pytest.raises(ConfigError, match="finest is for maps of one size"):
        build_decoder("dpt", [5] * 4, 32, [4, 8, 16, 32], width=4, finest=2)
