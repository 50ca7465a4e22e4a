from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import celltyper
from celltyper.encoders import load_encoder
from celltyper.errors import ConfigError
from celltyper.features import FeatureCache
from celltyper.predict import predict_maps
from celltyper.tiling import Region

GB = 2**30


def picture(height: int = 90, width: int = 110, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cache_of(tmp_path: Path, name: str = "vit_tiny_patch16", **options: int) -> FeatureCache:
    settings = {"tile": 64, "overlap": 32, "limit": GB} | options
    return FeatureCache(load_encoder(name, "twin"), tmp_path, **settings)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "convnextv2_tiny"])
def test_window_of_a_tile_alone_is_what_the_encoder_gives(tmp_path: Path, name: str) -> None:
    """An image of one tile: the whole canvas is one window, mirrored margin and all."""
    cache = cache_of(tmp_path, name, tile=128, overlap=64)
    image = picture(64, 64)
    canvas = cache.canvas(image)
    padded = np.pad(image, ((32, 32), (32, 32), (0, 0)), mode="symmetric")
    batch = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255
    for found, expected in zip(
        canvas.window(Region(-32, -32, 128, 128)), cache.encoder(batch), strict=True
    ):
        torch.testing.assert_close(found, expected[0], rtol=2e-3, atol=2e-3)


def test_canvas_is_put_together_from_the_inner_parts_of_windows(tmp_path: Path) -> None:
    """90 x 110 px, tile 64, overlap 32: windows begin at -16, 16, 48 and keep 32 px each."""
    cache = cache_of(tmp_path)
    image = picture()
    canvas = cache.canvas(image)
    assert canvas.maps[0].shape == ((3 * 32 + 32) // 16, (4 * 32 + 32) // 16, 48)
    padded = np.pad(image, ((16, 64), (16, 64), (0, 0)), mode="symmetric")
    # the middle of the window whose corner is at (16, 48): rows 32 to 64, columns 64 to 96
    batch = torch.from_numpy(padded[32:96, 64:128]).permute(2, 0, 1)[None].float() / 255
    expected = cache.encoder(batch)[2][0, :, 1:3, 1:3]
    found = canvas.window(Region(32, 64, 32, 32))[2]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_model_on_kept_features_equals_the_model(tmp_path: Path) -> None:
    model = celltyper.CellTyper(load_encoder("vit_tiny_patch16", "twin"), "dpt").eval()
    cache = FeatureCache(model.encoder, tmp_path, tile=64, overlap=0, limit=GB)
    image = picture(64, 128)
    expected = predict_maps(model, image, tile=64, overlap=0)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    canvas = cache.canvas(image)
    assert calls
    calls.clear()
    found = predict_maps(model, image, tile=64, overlap=0, canvas=canvas)
    assert not calls
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=5e-3)


def test_every_symmetry_has_its_own_features(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    image = picture()
    turned = np.ascontiguousarray(np.rot90(image)[:, ::-1])
    np.testing.assert_array_equal(cache.canvas(image, 5).maps[0], cache.canvas(turned).maps[0])
    # 0 and 5; the turned image is that of symmetry 5, found again
    assert len(list(tmp_path.glob("*.npy"))) == 1
    cache.canvas(image)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_kept_features_are_not_computed_again(tmp_path: Path) -> None:
    first = cache_of(tmp_path).canvas(picture())
    again = cache_of(tmp_path)
    again.encoder.register_forward_hook(lambda *_: pytest.fail("the encoder was run"))
    np.testing.assert_array_equal(again.canvas(picture()).maps[3], first.maps[3])


@pytest.mark.parametrize(
    "change",
    ["weights", "blocks", "mean", "tile", "overlap", "magnify", "pixels", "scales"],
)
def test_anything_else_is_computed_anew(tmp_path: Path, change: str) -> None:
    cache_of(tmp_path).canvas(picture())
    options = {
        "weights": {"seed": 1},
        "blocks": {"feature_blocks": (0, 1, 2)},
        "mean": {"mean": (0.1, 0.2, 0.3)},
        "magnify": {"magnify": 2.0},
        "scales": {"scales": (1, 2)},
    }.get(change, {})
    tiles = {"tile": {"tile": 96}, "overlap": {"overlap": 0}}.get(change, {})
    encoder = load_encoder("vit_tiny_patch16", "twin", **options)
    settings = {"tile": 64, "overlap": 32, "limit": GB} | tiles
    other = FeatureCache(encoder, tmp_path, **settings)
    ran = []
    encoder.register_forward_hook(lambda *_: ran.append(1))
    other.canvas(picture(seed=1) if change == "pixels" else picture())
    assert ran


def test_damaged_file_is_computed_again(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    good = np.array(cache.canvas(picture()).maps[0])
    (file,) = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:1000])
    np.testing.assert_array_equal(cache.canvas(picture()).maps[0], good)


def test_folder_stays_within_its_limit_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    size = cache.bytes_of([(90, 110)])
    cache.limit = 2 * size + 1000
    old = cache.canvas(picture(seed=1))
    kept = np.array(old.maps[0])
    for age, file in enumerate(tmp_path.glob("*.npy")):
        os.utime(file, (1000 - age, 1000 - age))
    cache.canvas(picture(seed=2))
    (first,) = (f for f in tmp_path.glob("*.npy") if f.stat().st_mtime < 2000)
    cache.canvas(picture(seed=3))
    files = list(tmp_path.glob("*.npy"))
    assert len(files) == 2
    assert first not in files
    assert sum(f.stat().st_size for f in files) <= cache.limit
    # whoever has it open goes on reading
    np.testing.assert_array_equal(old.maps[0], kept)


def test_tiles_are_rounded_to_patches(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, "vit_small_patch14_dinov2", tile=256, overlap=64)
    assert (cache.tile, cache.overlap) == (266, 84)
    with pytest.raises(ConfigError, match="leaves nothing"):
        cache_of(tmp_path, tile=64, overlap=64)
