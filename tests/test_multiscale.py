from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from celltyper.encoders import load_encoder
from celltyper.errors import ConfigError
from celltyper.models import CellTyper
from celltyper.testing import check_encoder


def test_maps_and_embedding_equal_those_made_piece_by_piece() -> None:
    joined = load_encoder("vit_tiny_patch16", "twin", scales=(1, 2))
    single = load_encoder("vit_tiny_patch16", "twin", input_size=None)
    check_encoder(joined)
    assert joined.channels == [2 * channels for channels in single.channels]
    images = torch.rand(2, 3, 48, 32)
    large = F.interpolate(images, size=(96, 64), mode="bicubic", align_corners=False)
    maps = joined(images)
    for found, plain, *corners in zip(
        maps,
        single(images),
        single(large[:, :, :48, :32]),
        single(large[:, :, :48, 32:]),
        single(large[:, :, 48:, :32]),
        single(large[:, :, 48:, 32:]),
        strict=True,
    ):
        assert found.shape == (2, 96, 3, 2)
        torch.testing.assert_close(found[:, :48], plain)
        # grid of the pieces: 3 x 2 each, 6 x 4 together; patch (2, 1) is rows 4-5, columns 2-3
        lower_right = corners[3]
        expected = lower_right[:, :, 1:3, 0:2].mean(dim=(2, 3))
        torch.testing.assert_close(found[:, 48:, 2, 1], expected)
        # patch (1, 0) is rows 2-3, columns 0-1: half of it lies in the upper left piece
        expected = (corners[0][:, :, 2, 0:2] + corners[2][:, :, 0, 0:2]).mean(dim=2) / 2
        torch.testing.assert_close(found[:, 48:, 1, 0], expected)


def test_embedding_is_the_mean_over_pieces_of_the_cropped_image() -> None:
    joined = load_encoder("vit_tiny_patch16", "twin", scales=(1, 3), input_size=32)
    single = load_encoder("vit_tiny_patch16", "twin", input_size=None)
    image = torch.rand(1, 3, 32, 48)
    centre = image[:, :, :, 8:40]
    large = F.interpolate(centre, size=(96, 96), mode="bicubic", align_corners=False)
    pieces = [large[:, :, r : r + 32, c : c + 32] for r in (0, 32, 64) for c in (0, 32, 64)]
    found = joined.embed(image)
    torch.testing.assert_close(found[:, :48], single.embed(centre))
    torch.testing.assert_close(found[:, 48:], torch.stack([*map(single.embed, pieces)]).mean(0))


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "swin_base_patch4_window7"])
def test_pieces_are_not_scaled_and_cropped_again(name: str) -> None:
    """Cards with `resize` (Prov-GigaPath): the published rule is for the image, once."""
    options = {"input_size": 64, "resize": 96, "feature_blocks": (3,)}
    joined = load_encoder(name, "twin", scales=(1, 2), **options)
    single = load_encoder(name, "twin", **options)
    images = torch.rand(2, 3, 70, 90)
    centre = single.encoder.prepare.crop(images)
    large = F.interpolate(centre, size=(128, 128), mode="bicubic", align_corners=False)
    pieces = [large[:, :, r : r + 64, c : c + 64] for r in (0, 64) for c in (0, 64)]
    as_is = load_encoder(name, "twin", **options | {"input_size": None, "resize": None})
    found = joined.embed(images)
    width = single.embed_dim
    torch.testing.assert_close(found[:, :width], single.embed(images))
    torch.testing.assert_close(found[:, width:], torch.stack([*map(as_is.embed, pieces)]).mean(0))


def test_one_level_of_a_pyramid_keeps_its_stride() -> None:
    encoder = load_encoder("swin_base_patch4_window7", "twin", scales=(1, 2), feature_blocks=(1,))
    check_encoder(encoder)
    model = CellTyper(encoder, "linear").eval()
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, 40:56, 40:56] = 1
    with torch.no_grad():
        change = (model(image)["phenotype"] - model(0 * image)["phenotype"]).abs().sum(1)[0]
    row, column = divmod(int(change.argmax()), 64)
    # where the image differs, not at 4 times the distance from the corner
    assert 32 <= row < 64
    assert 32 <= column < 64
    assert list(encoder.strides) == [8]


@pytest.mark.parametrize("scales", [(2,), (1, 1), (2, 1), ()])
def test_scales_ascend_from_one(scales: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="scales"):
        load_encoder("vit_tiny_patch16", "twin", scales=scales)
