"""Tiles: write regions partition the image, and stitching a pixel-local model changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from celltyper.models import CellTyper
from celltyper.predict import predict_image, predict_maps
from celltyper.tiling import Region, Tile, read_padded, tile_grid


def test_small_grid_by_hand() -> None:
    assert tile_grid((5, 3), size=4, overlap=2) == [
        Tile(Region(-1, -1, 4, 4), Region(0, 0, 2, 2)),
        Tile(Region(-1, 1, 4, 4), Region(0, 2, 2, 1)),
        Tile(Region(1, -1, 4, 4), Region(2, 0, 2, 2)),
        Tile(Region(1, 1, 4, 4), Region(2, 2, 2, 1)),
        Tile(Region(3, -1, 4, 4), Region(4, 0, 1, 2)),
        Tile(Region(3, 1, 4, 4), Region(4, 2, 1, 1)),
    ]


@pytest.mark.parametrize("size", [8, 13, 64])
@pytest.mark.parametrize("overlap", [0, 3, 6])
@pytest.mark.parametrize("shape", [(1, 1), (7, 30), (64, 65)])
def test_every_pixel_is_written_once(size: int, overlap: int, shape: tuple[int, int]) -> None:
    written = np.zeros(shape, int)
    for read, write in tile_grid(shape, size, overlap):
        written[write.slices] += 1
        assert read.row <= write.row
        assert read.row + read.height >= write.row + write.height
        assert read.col <= write.col
        assert read.col + read.width >= write.col + write.width
    assert (written == 1).all()


def test_overlap_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="an overlap of 64 leaves nothing of a tile of 64"):
        tile_grid((10, 10), 64, 64)


def test_reading_beyond_the_border_mirrors_like_numpy() -> None:
    image = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    padded = np.pad(image, ((7, 9), (6, 11), (0, 0)), mode="symmetric")
    assert (read_padded(image, Region(-7, -6, 21, 21)) == padded).all()


class Pixelwise(nn.Module):
    """A fake encoder whose single map is the image: nothing depends on neighbours."""

    channels = (3,)
    patch_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


class Same(nn.Module):
    out_channels = 3

    def __init__(self, channels: list[int], patch_size: int) -> None:
        super().__init__()

    def forward(self, features: list[Tensor], images: Tensor) -> Tensor:
        return features[0]


@pytest.fixture
def pixelwise() -> CellTyper:
    torch.manual_seed(0)
    return CellTyper(Pixelwise(), Same, ("a", "b")).eval()


@pytest.mark.parametrize(("tile", "overlap", "batch"), [(32, 0, 1), (48, 16, 3), (40, 7, 8)])
def test_tiled_equals_whole_to_the_last_pixel(
    pixelwise: CellTyper, tile: int, overlap: int, batch: int
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (101, 67, 3), dtype=np.uint8)
    with torch.no_grad():
        whole = pixelwise.activate(
            pixelwise(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
        )
    tiled = predict_maps(pixelwise, image, tile=tile, overlap=overlap, batch_size=batch)
    assert tiled.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(tiled[name], values[0].numpy(), atol=1e-6)


def test_image_smaller_than_a_tile_and_empty_result(pixelwise: CellTyper) -> None:
    prediction = predict_image(pixelwise, np.full((9, 5, 3), 255, np.uint8))
    assert prediction.labels.shape == (9, 5)
    assert prediction.probabilities.shape == (3, 9, 5)
    assert prediction.cell_probabilities.shape == (len(prediction), 3)


def test_other_resolution_gives_the_image_s_own_pixels(pixelwise: CellTyper) -> None:
    pixelwise.mpp = 0.5
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    prediction = predict_image(pixelwise, image, mpp=0.25)
    assert prediction.labels.shape == (60, 80)
    assert prediction.probabilities.shape == (3, 60, 80)
    assert sorted(set(prediction.labels.ravel()) - {0}) == list(range(1, len(prediction) + 1))
    np.testing.assert_allclose(prediction.probabilities.sum(0), 1, atol=1e-5)


def test_missing_resolution_names_the_flag(pixelwise: CellTyper) -> None:
    pixelwise.mpp = 0.5
    with pytest.raises(ValueError, match="pass --mpp"):
        predict_image(pixelwise, np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"must lie in \[0.01, 100\]"):
        predict_image(pixelwise, np.zeros((9, 9, 3), np.uint8), mpp=-1)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_other_arrays_than_rgb_bytes_are_refused(pixelwise: CellTyper, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 and not empty"):
        predict_image(pixelwise, image)
