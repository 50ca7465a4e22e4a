"""Maps averaged over the symmetries of a tile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from celltyper.config import Config, parse_config
from celltyper.encoders import load_encoder
from celltyper.errors import ConfigError
from celltyper.instances import METHODS, build_instances
from celltyper.models import CellTyper
from celltyper.predict import predict_maps
from celltyper.symmetries import turn, turn_back
from celltyper.training import train
from celltyper.transforms import symmetry
from celltyper.transforms.geometry import ORDER

TILE = {"tile": 64, "overlap": 16}


def model_of(method: str = "hv") -> CellTyper:
    torch.manual_seed(0)
    model = CellTyper(load_encoder("vit_tiny_patch16", "twin"), "dpt", ("a", "b"), method, **TILE)
    return model.eval()


def picture(side: int = 48) -> np.ndarray:
    """With an overlap of 16, one tile of 64 px covers it and as much on every side."""
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_order_names_all_eight_and_starts_with_the_image() -> None:
    assert sorted(ORDER) == list(range(8))
    assert ORDER[0] == 0


@pytest.mark.parametrize("which", range(8))
def test_batches_turn_as_images_do(which: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected, _ = symmetry(image, image[..., 0].astype(np.int32), which)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    turned = turn(batch, which)
    np.testing.assert_array_equal(turned[0].permute(1, 2, 0), expected)
    assert torch.equal(turn_back(turned, which), batch)


@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("method", sorted(METHODS))
def test_targets_of_a_turned_image_turn_back_to_those_of_the_image(method: str, which: int) -> None:
    labels = np.zeros((40, 48), np.int32)
    for i, (row, col, height, width) in enumerate([(3, 4, 9, 5), (3, 9, 12, 8), (20, 30, 6, 15)]):
        labels[row : row + height, col : col + width] = i + 1
    labels[20:23, 30:34] = 0
    way = build_instances(method)
    _, turned = symmetry(np.zeros((*labels.shape, 3), np.uint8), labels, which)
    found = way.encode(np.ascontiguousarray(turned))
    for name, expected in way.encode(labels).items():
        back = turn_back(torch.from_numpy(found[name])[None], which, vector=way.maps[name].vector)
        np.testing.assert_allclose(back[0], expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ["hv", "distance"])
def test_with_all_symmetries_the_maps_turn_with_the_image(method: str) -> None:
    model, image = model_of(method), picture()
    plain = predict_maps(model, image)
    maps = predict_maps(model, image, symmetries=8)
    for which in (1, 4, 6):
        shown = np.ascontiguousarray(symmetry(image, np.zeros((48, 48), np.int32), which)[0])
        for name, spec in model.maps.items():
            given = torch.from_numpy(predict_maps(model, shown, symmetries=8)[name])[None]
            back = turn_back(given, which, vector=spec.vector)[0].numpy()
            np.testing.assert_allclose(back, maps[name], atol=1e-5)
            alone = torch.from_numpy(predict_maps(model, shown)[name])[None]
            once = turn_back(alone, which, vector=spec.vector)[0].numpy()
            assert np.abs(once - plain[name]).max() > 1e-4


def test_two_symmetries_are_the_mean_of_the_image_and_its_mirror() -> None:
    model, image = model_of(), picture()
    model.symmetries = 2
    maps = predict_maps(model, image)
    one = predict_maps(model, image, symmetries=1)
    other = predict_maps(model, np.ascontiguousarray(image[:, ::-1]), symmetries=1)
    for name, found in maps.items():
        mirrored = other[name][:, :, ::-1].copy()
        if name == "hv":
            mirrored[0] *= -1
        np.testing.assert_allclose(found, (one[name] + mirrored) / 2, atol=1e-6)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="symmetries must be 1, 2, 4 or 8, got 3"):
        predict_maps(model_of(), picture(), symmetries=3)
    with pytest.raises(ConfigError, match=r"infer\.symmetries"):
        parse_config({"infer": {"symmetries": 3}})


def test_infer_writes_what_was_averaged(
    made_data: Path,
    tiny: Callable[..., Config],
    tmp_path: Path,
    celltyper_command: Callable[..., Any],
) -> None:
    run = train(tiny(made_data, "train.steps=1"), tmp_path / "run", progress=False)
    image = next((made_data / "test" / "images").iterdir())
    words = ("infer", image, "-m", run, "--mpp", "0.5", "-q", "-o")
    for value, expected in (((), 1), (("--symmetries", "4"), 4)):
        out = tmp_path / str(expected)
        assert celltyper_command(*words, out, *value).code == 0
        assert json.loads((out / "infer.json").read_text())["symmetries"] == expected
    assert celltyper_command(*words, tmp_path / "x", "--symmetries", "3").code == 2
    assert not (tmp_path / "x").exists()
