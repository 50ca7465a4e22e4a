from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from celltyper.config import parse_config
from celltyper.encoders import load_encoder
from celltyper.encoders.prepare import Prepare
from celltyper.errors import ConfigError
from celltyper.models import build_model
from celltyper.testing import check_encoder

MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_normalisation_is_that_of_the_mean_and_deviation() -> None:
    prepare = Prepare(MEAN, STD, 4)
    images = torch.rand(2, 3, 8, 12)
    expected = (images.numpy() - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(prepare(images), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(prepare.whole(images), expected, rtol=0, atol=1e-6)


def test_magnified_image_covers_whole_patches() -> None:
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    prepare = Prepare(**plain, stride=14, magnify=2)
    assert prepare.patch_size == 7
    images = torch.rand(1, 3, 15, 21)
    found = prepare(images)
    # 15 rows are three patches of 7, the last rows repeated; each becomes 14 px
    assert found.shape == (1, 3, 42, 42)
    padded = np.pad(images[0, 0].numpy(), ((0, 6), (0, 0)), mode="edge")
    expected = Image.fromarray(padded).resize((42, 42), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_shrunk_image_equals_pillow(interpolation: str) -> None:
    prepare = Prepare((0, 0, 0), (1, 1, 1), 8, magnify=0.5, interpolation=interpolation)
    assert prepare.patch_size == 16
    images = torch.rand(1, 3, 32, 64)
    how = getattr(Image.Resampling, interpolation.upper())
    expected = Image.fromarray(images[0, 1].numpy()).resize((32, 16), how)
    np.testing.assert_allclose(prepare(images)[0, 1], expected, atol=1e-5)


def test_magnification_is_rounded_to_whole_patches() -> None:
    assert Prepare(MEAN, STD, 14, magnify=1.8).patch_size == 8
    for wrong in (0, -1, float("nan"), 40):
        with pytest.raises(ConfigError, match="magnification"):
            Prepare(MEAN, STD, 14, magnify=wrong)


def test_crop_is_that_of_the_published_rule() -> None:
    """Prov-GigaPath: shorter side to 256 px, bicubic, central 224 px."""
    prepare = Prepare(MEAN, STD, 16, input_size=224, resize=256)
    image = torch.rand(3, 300, 512)
    how = Image.Resampling.BICUBIC
    planes = [np.asarray(Image.fromarray(c.numpy()).resize((436, 256), how)) for c in image]
    expected = np.stack(planes)[:, 16:240, 106:330]
    np.testing.assert_allclose(prepare.crop(image[None])[0], expected, atol=1e-4)
    assert prepare.whole(prepare.crop(image[None])).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(("rows", "cols"), [(67, 64), (65, 64), (64, 71), (64, 69), (73, 64)])
def test_crop_is_where_torchvision_cuts(rows: int, cols: int) -> None:
    """torchvision rounds half a pixel to even; (67 - 64) / 2 is row 2, (65 - 64) / 2 row 0."""
    image = torch.rand(1, 3, rows, cols)
    found = Prepare(MEAN, STD, 16, input_size=64).crop(image)
    assert torch.equal(found, torchvision.transforms.CenterCrop(64)(image))


def test_without_input_size_an_embedding_is_of_the_whole_image() -> None:
    prepare = Prepare(MEAN, STD, 16)
    images = torch.rand(1, 3, 20, 32)
    assert torch.equal(prepare.crop(images), images)
    assert prepare.whole(images).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("magnify", [0.5, 2, 1.6])
def test_magnified_encoder_keeps_the_contract(magnify: float) -> None:
    encoder = load_encoder("vit_tiny_patch16", "twin", magnify=magnify)
    assert encoder.patch_size == {0.5: 32, 2: 8, 1.6: 10}[magnify]
    check_encoder(encoder)
    # an embedding has its own input size, whatever the maps are computed at
    plain = load_encoder("vit_tiny_patch16", "twin")
    images = torch.rand(1, 3, 40, 40)
    torch.testing.assert_close(encoder.embed(images), plain.embed(images))


def test_resize_needs_an_input_size() -> None:
    with pytest.raises(ConfigError, match="resize 200 needs an input_size"):
        load_encoder("vit_tiny_patch16", "twin", resize=200)


@pytest.mark.parametrize(("mpp", "patch"), [(None, 16), (0.25, 8), (1.0, 32), ("card", 16)])
def test_config_says_at_which_resolution_the_network_sees(mpp: float | str, patch: int) -> None:
    """The model works at 0.5, prov-gigapath was trained at 0.5."""
    encoder = {"name": "prov-gigapath", "weights": "twin", "mpp": mpp}
    model = build_model(parse_config({"encoder": encoder}), ("nucleus",), 0.5)
    assert model.encoder.patch_size == patch
    assert model.eval()(torch.rand(1, 3, 64, 64))["phenotype"].shape == (1, 2, 64, 64)


@pytest.mark.parametrize(
    ("name", "mpp", "of_model", "message"),
    [
        ("virchow2", "card", 0.5, "the card of virchow2 states no resolution"),
        ("uni", 0.25, None, "needs the resolution of the images.* set data.mpp"),
        ("uni", 0.001, 0.5, "magnification 500 leaves less than one pixel"),
    ],
)
def test_resolution_that_cannot_be_had(
    name: str, mpp: float | str, of_model: float | None, message: str
) -> None:
    config = parse_config({"encoder": {"name": name, "weights": "twin", "mpp": mpp}})
    with pytest.raises(ConfigError, match=message):
        build_model(config, ("nucleus",), of_model)
