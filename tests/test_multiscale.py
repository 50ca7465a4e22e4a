from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from celltyper.encoders import load_encoder
from celltyper.errors import ConfigError
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


@pytest.mark.parametrize("scales", [(2,), (1, 1), (2, 1), ()])
def test_scales_ascend_from_one(scales: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="scales"):
        load_encoder("vit_tiny_patch16", "twin", scales=scales)
