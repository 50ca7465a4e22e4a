from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import celltyper
from celltyper import devices
from celltyper.config import Augment, Config, parse_config
from celltyper.datasets import TileSampler
from celltyper.encoders import load_encoder
from celltyper.encoders.vit import TimmViT
from celltyper.errors import ConfigError
from celltyper.evaluation import score_image, summarise
from celltyper.features import FeatureCache
from celltyper.instances import build_instances
from celltyper.predict import predict_maps
from celltyper.targets import KeptTiles, Targets, view
from celltyper.tiling import Region
from celltyper.training import train
from celltyper.transforms import symmetry
from celltyper.types import Sample

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


def test_features_have_the_precision_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_has_bf16_instructions", lambda: True)
    encoder, image = load_encoder("vit_tiny_patch16", "twin"), picture()
    settings = {"tile": 64, "overlap": 32, "limit": GB}
    full, half = (
        FeatureCache(encoder, tmp_path, precision=precision, **settings)
        for precision in ("fp32", "bf16")
    )
    seen = []
    encoder.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    a, b = full.canvas(image), half.canvas(image)
    assert set(seen[: len(seen) // 2]) == {False}
    assert set(seen[len(seen) // 2 :]) == {True}
    # kept apart, and nearly the same
    assert a.file != b.file
    for x, y in zip(a.maps, b.maps, strict=True):
        assert (x != y).any()
        np.testing.assert_allclose(x, y, rtol=0.1, atol=0.1)


def test_model_on_kept_features_equals_the_model(tmp_path: Path) -> None:
    model = celltyper.CellTyper(load_encoder("vit_tiny_patch16", "twin"), "dpt").eval()
    cache = FeatureCache(model.encoder, tmp_path, tile=64, overlap=0, limit=GB)
    image = picture(64, 128)
    expected = predict_maps(model, image, tile=64, overlap=0)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    cache.canvas(image)
    assert calls
    calls.clear()
    found = predict_maps(model, image, features=cache)
    assert not calls
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=5e-3)
    expected = predict_maps(model, image, tile=64, overlap=0, symmetries=2)
    assert len(calls) == 2
    found = predict_maps(model, image, features=cache, symmetries=2)
    assert len(calls) == 3  # of the mirrored tiles alone
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=5e-3)


def test_views_are_functions_of_the_pixels_alone() -> None:
    one, strengths = disks(1), Augment()
    assert view(one, 0, strengths) is one
    first, second = view(one, 1, strengths), view(one, 2, strengths)
    assert not np.array_equal(first.image, second.image)
    np.testing.assert_array_equal(view(disks(1), 1, strengths).image, first.image)
    still = Augment(**dict.fromkeys(Augment.model_fields, 0) | {"dihedral": True})
    turned = view(one, 3, still)
    each = [symmetry(one.image, one.labels, which) for which in range(8)]
    same = [pair for pair in each if np.array_equal(pair[0], turned.image)]
    assert len(same) == 1
    np.testing.assert_array_equal(same[0][1], turned.labels)
    # every nucleus keeps its brightness, so labels and classes moved with the pixels
    inside = turned.labels > 0
    np.testing.assert_array_equal(turned.image[inside][:, 0], 40 * turned.labels[inside])


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


def disks(seed: int, size: int = 96) -> Sample:
    """Five nuclei, each of another brightness, so that a tile tells where it was cut."""
    labels = np.zeros((size, size + 16), np.int32)
    for i, (row, col) in enumerate([(14, 20), (50, 40), (75, 90), (20, 80), (80, 20)]):
        labels[row - 5 : row + 6, col - 4 : col + 7] = i + 1
    image = picture(*labels.shape, seed=seed)
    image[..., 0] = 40 * labels
    kinds = np.array([0, 1, 2, 1, 2, 1], np.uint8)
    return Sample(image, labels, kinds, f"s{seed}", f"g{seed}", 0.5)


def test_tiles_and_their_features_belong_together(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tile=32, overlap=0)
    views = [view(sample, which, Augment()) for sample in (disks(1), disks(2)) for which in (0, 1)]
    sampler = TileSampler(views, 32, balance=0.5, seed=0)
    kept = [cache.canvas(sample.image) for sample in views]
    tiles = KeptTiles(sampler, Targets(views, build_instances("hv")), kept, cache.patch)
    drawn = set()
    for index in range(80):
        item = tiles[index]
        # without overlap a canvas cell sees its own 32 px window alone: find it by brute force
        found = []
        for i, sample in enumerate(views):
            for row in range(0, sample.labels.shape[0] - 31, 16):
                for col in range(0, sample.labels.shape[1] - 31, 16):
                    part = sample.image[row : row + 32, col : col + 32]
                    pixels = torch.from_numpy(part.transpose(2, 0, 1).copy()).float() / 255
                    if torch.equal(pixels, item["image"]):
                        found.append((i, row, col))
        assert len(found) == 1
        i, row, col = found[0]
        drawn.add(i)
        for level, cells in enumerate(kept[i].maps):
            part = cells[row // 16 : row // 16 + 2, col // 16 : col // 16 + 2]
            expected = torch.from_numpy(part.astype(np.float32)).permute(2, 0, 1)
            assert torch.equal(item[f"features.{level}"], expected)
        kinds = views[i].phenotypes[views[i].labels[row : row + 32, col : col + 32]]
        np.testing.assert_array_equal(item["phenotype"], kinds)
        # as near to the place that was drawn as the patch grid allows
        place = sampler.place(index)
        assert place.sample == i
        assert abs(place.row - row) <= 16
        assert abs(place.col - col) <= 16
    assert drawn == set(range(4))


def settings(data: Path, **encoder: object) -> Config:
    values = {
        "data": {"root": str(data), "tile": 48},
        "encoder": {"name": "vit_tiny_patch16", "weights": "twin", "cache": 4} | encoder,
        "train": {"steps": 4, "batch_size": 2, "validate_every": 2, "warmup": 1},
        "infer": {"tile": 64, "overlap": 32},
    }
    return parse_config(values)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELLTYPER_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "features"


def test_training_runs_the_encoder_once_per_view(
    made_data: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = TimmViT.forward
    monkeypatch.setattr(TimmViT, "forward", lambda s, x: seen.append(len(x)) or forward(s, x))
    first = train(settings(made_data), tmp_path / "run", progress=False)
    # three images in four views, and one to validate; 96 px are 3 x 3 windows of 64
    assert sum(seen) == (3 * 4 + 1) * 9
    assert len(list(own_cache.glob("*.npy"))) == 13
    seen.clear()
    again = train(settings(made_data), tmp_path / "again", progress=False)
    assert not seen
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (first / "history.csv").read_text() == (again / "history.csv").read_text()


def test_model_works_on_the_tiles_it_was_trained_on(made_data: Path, tmp_path: Path) -> None:
    values = settings(made_data).model_dump()
    values["infer"] |= {"tile": 60, "overlap": 10}
    run = train(parse_config(values), tmp_path / "run", progress=False)
    model = celltyper.load_model(run, allow_code=False)
    assert (model.tile, model.overlap) == (64, 32)
    rows = csv.DictReader((run / "history.csv").read_text().splitlines())
    best = max(float(row["macro_f1"]) for row in rows)
    samples = celltyper.open_dataset(made_data, "val")
    scores = [score_image(celltyper.predict_image(model, s.image, s.mpp), s) for s in samples]
    found = summarise(scores, samples.classes, resamples=0).scores["macro_f1"].value
    assert found == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"cache_gb": 1e-6}}, "3 images in 4 views take 0.0 GB, more than"),
        ({"encoder": {"adapt": "lora"}}, "encoder.cache has no effect with encoder.adapt=lora"),
        (
            {"encoder": {"cache": 1}, "augment": {"rotate": 10}},
            "augment has no effect with encoder.cache=1",
        ),
        ({"data": {"tile": 128}}, "smaller than a tile of 128 px"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    made_data: Path, tmp_path: Path, change: dict[str, dict[str, object]], message: str
) -> None:
    values = settings(made_data).model_dump()
    for section, options in change.items():
        values[section] |= options
    with pytest.raises(ConfigError, match=message):
        train(parse_config(values), tmp_path / "run", progress=False)
    # before any feature is computed
    assert not (tmp_path / "run").exists()
