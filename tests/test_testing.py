"""Every check of celltyper.testing is seen to fail on a component that is broken in one way."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from celltyper.testing import check_decoder, check_encoder, check_instances
from celltyper.types import MapSpec


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.channels: Any = [6, 8]
        self.patch_size: Any = 4
        self.embed_dim: Any = 8
        self.first = nn.Conv2d(3, 6, 4, stride=4)
        self.second = nn.Conv2d(6, 8, 1)

    def forward(self, images: Tensor) -> Any:
        bottom, right = -images.shape[2] % 4, -images.shape[3] % 4
        x = self.first(F.pad(images, (0, right, 0, bottom), mode="replicate"))
        return [x, self.second(x)]

    def embed(self, images: Tensor) -> Tensor:
        return self(images)[-1].mean(dim=(2, 3))


class NoPatchSize(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.patch_size = (4, 4)


class NoChannels(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.channels = None


class OneMapLess(Encoder):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)[1:]


class WrongChannels(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.channels = [6, 6]


class CutsTheBorder(Encoder):
    def forward(self, images: Tensor) -> Any:
        x = self.first(images)
        return [x, self.second(x)]


class HalfPrecision(Encoder):
    def forward(self, images: Tensor) -> Any:
        return [m.half() for m in super().forward(images)]


class NotFinite(Encoder):
    def forward(self, images: Tensor) -> Any:
        return [m / 0 for m in super().forward(images)]


class ChangesImages(Encoder):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images.sub_(0.5))


class MixesTheBatch(Encoder):
    def forward(self, images: Tensor) -> Any:
        return [m - m.mean(dim=0, keepdim=True) / 2 for m in super().forward(images)]


class Blind(Encoder):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images * 0)


class Detached(Encoder):
    def forward(self, images: Tensor) -> Any:
        return [m.detach() for m in super().forward(images)]


class NoEmbedDim(Encoder):
    def __init__(self) -> None:
        super().__init__()
        del self.embed_dim


class LongEmbedding(Encoder):
    def embed(self, images: Tensor) -> Tensor:
        return self(images)[-1].flatten(1)


class NanEmbedding(Encoder):
    def embed(self, images: Tensor) -> Tensor:
        return super().embed(images) * float("nan")


class MixedEmbedding(Encoder):
    def embed(self, images: Tensor) -> Tensor:
        return super().embed(images) - super().embed(images).mean(dim=0) / 2


class Pyramid(Encoder):
    """Maps at strides 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: Any = [2, 4]
        self.first = nn.Conv2d(3, 6, 2, stride=2)
        self.second = nn.Conv2d(6, 8, 2, stride=2)


class StridesOfOneMap(Pyramid):
    def __init__(self) -> None:
        super().__init__()
        self.strides = [2]


class StridesThatDoNotDivide(Pyramid):
    def __init__(self) -> None:
        super().__init__()
        self.strides = [3, 4]


class OtherStrides(Pyramid):
    def __init__(self) -> None:
        super().__init__()
        self.strides = [4, 4]


def test_good_pyramid_passes() -> None:
    check_encoder(Pyramid())


def test_good_encoder_passes_and_keeps_its_mode() -> None:
    encoder = Encoder().train()
    before = copy.deepcopy(encoder.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check_encoder(encoder)
    assert encoder.training
    assert torch.equal(torch.rand(1), expected)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NoPatchSize, "patch_size must be a positive int"),
        (NoChannels, "channels must be a list of int"),
        (OneMapLess, "must give a list of 2 maps"),
        (WrongChannels, r"map 1 is \(2, 8, 2, 3\) instead of \(2, 6, 2, 3\)"),
        (CutsTheBorder, r"images of 9 x 11 px: map 0 is .* instead of \(2, 6, 3, 3\)"),
        (HalfPrecision, "float16 instead of float32"),
        (NotFinite, "not finite"),
        (ChangesImages, "changes the images"),
        (MixesTheBatch, "depends on the rest of the batch"),
        (Blind, "the same for two different images"),
        (Detached, "the maps carry none"),
        (NoEmbedDim, "embed_dim must be int"),
        (LongEmbedding, r"embed gives \(2, 48\) instead of \(2, 8\)"),
        (NanEmbedding, "embed is not finite"),
        (MixedEmbedding, "embed of an image depends on the rest"),
        (StridesOfOneMap, r"strides must be a list of 2 int that divide patch_size 4.*got \[2\]"),
        (StridesThatDoNotDivide, r"strides must be .*got \[3, 4\]"),
        (OtherStrides, r"map 0 is \(2, 6, 4, 6\) instead of \(2, 6, 2, 3\)"),
    ],
)
def test_broken_encoders(broken: type[Encoder], message: str) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        check_encoder(broken())
    assert "\n" not in str(caught.value)


class Decoder(nn.Module):
    def __init__(self, channels: list[int], patch_size: int) -> None:
        super().__init__()
        self.out_channels: Any = 3
        self.p = patch_size
        self.conv = nn.Conv2d(channels[-1], 3, 1)

    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        x = F.interpolate(self.conv(features[-1]), scale_factor=self.p)
        return x[:, :, : images.shape[2], : images.shape[3]]


class NoOutChannels(Decoder):
    def __init__(self, channels: list[int], patch_size: int) -> None:
        super().__init__(channels, patch_size)
        self.out_channels = [3]


class OtherOutChannels(Decoder):
    def __init__(self, channels: list[int], patch_size: int) -> None:
        super().__init__(channels, patch_size)
        self.out_channels = 4


class NotCut(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        return F.interpolate(self.conv(features[-1]), scale_factor=self.p)


class Squeezed(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        return F.interpolate(self.conv(features[-1]), size=images.shape[2:], mode="bilinear")


class Turned(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        return super().forward([f.flip(2) for f in features], images)


class Tuples(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        return (super().forward(features, images),)


class DoublePrecision(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        return super().forward(features, images).double()


class Infinite(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        return super().forward(features, images) / 0


class MixedBatch(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        y = super().forward(features, images)
        return y - y.mean(dim=0, keepdim=True) / 2


class Deaf(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        return super().forward([f * 0 for f in features], images)


class NoGradient(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        return super().forward(features, images).detach()


class CutOff(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        return super().forward([f.detach() for f in features], images)


class Idle(Decoder):
    def __init__(self, channels: list[int], patch_size: int) -> None:
        super().__init__(channels, patch_size)
        self.spare = nn.Linear(2, 2)


class NanGradient(Decoder):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        # the root's slope at zero is infinite, and infinity times zero is not a number
        return super().forward(features, images) + 0 * (0 * self.conv.weight.sum()).sqrt()


def test_good_decoder_passes() -> None:
    check_decoder(Decoder)
    check_decoder(Decoder, channels=(5,), patch_size=14)


class OnStrides(nn.Module):
    """A decoder of the finest map."""

    def __init__(self, channels: list[int], patch_size: int, strides: list[int]) -> None:
        super().__init__()
        self.out_channels = 3
        self.p = strides[0]
        self.conv = nn.Conv2d(channels[0], 3, 1)

    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        x = F.interpolate(self.conv(features[0]), scale_factor=self.p)
        return x[:, :, : images.shape[2], : images.shape[3]]


class SqueezedStrides(OnStrides):
    def forward(self, features: list[Tensor], images: Tensor) -> Any:
        return F.interpolate(self.conv(features[0]), size=images.shape[2:], mode="bilinear")


def test_good_decoder_of_a_pyramid_passes() -> None:
    check_decoder(OnStrides, channels=(5, 6), patch_size=16, strides=(4, 16))
    # not all of a squeezed map's shift is left at a finer stride, but enough to see
    with pytest.raises(AssertionError, match="patches around rows 112 px show at 10"):
        check_decoder(SqueezedStrides, channels=(5, 6), patch_size=16, strides=(4, 16))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NoOutChannels, "out_channels must be int"),
        (OtherOutChannels, r"give \(2, 3, 32, 48\) instead of \(2, 4, 32, 48\)"),
        (NotCut, r"images of 33 x 63 px give \(2, 3, 48, 64\)"),
        (Squeezed, "patches around rows 112 px show at 10"),
        (Turned, "patches around rows 112 px show at"),
        (Tuples, "must give one Tensor"),
        (DoublePrecision, "float64 instead of float32"),
        (Infinite, "output is not finite"),
        (MixedBatch, "depends on the rest of the batch"),
        (Deaf, "does not depend on the features"),
        (NoGradient, "carries no gradient"),
        (CutOff, "no gradient reaches the features"),
        (Idle, r"no gradient reaches \['spare.weight', 'spare.bias'\]"),
        (NanGradient, r"gradient of \['conv.weight'\] is not a number"),
    ],
)
def test_broken_decoders(broken: type[Decoder], message: str) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        check_decoder(broken)
    assert "\n" not in str(caught.value)


def test_decoder_must_be_a_module() -> None:
    with pytest.raises(AssertionError, match=r"not a torch\.nn\.Module"):
        check_decoder(lambda channels, patch_size: "a decoder")  # type: ignore[arg-type,return-value]


class Ids:
    """Carries the ids themselves in a map: the simplest method that fits."""

    maps: ClassVar[Any] = {"ids": MapSpec(1, "identity", "mse")}

    def encode(self, labels: Any) -> Any:
        return {"ids": labels[None].astype(np.float32)}

    def decode(self, maps: Any) -> Any:
        return np.rint(maps["ids"][0]).astype(np.int32)


class NoMaps(Ids):
    maps: ClassVar[Any] = {}


class NoSpecs(Ids):
    maps: ClassVar[Any] = {"ids": 1}


class OtherName(Ids):
    def encode(self, labels: Any) -> Any:
        return {"id": super().encode(labels)["ids"]}


class FlatMap(Ids):
    def encode(self, labels: Any) -> Any:
        return {"ids": super().encode(labels)["ids"][0]}


class DoubleMap(Ids):
    def encode(self, labels: Any) -> Any:
        return {"ids": super().encode(labels)["ids"].astype(np.float64)}


class NanMap(Ids):
    def encode(self, labels: Any) -> Any:
        return {"ids": np.where(labels == 0, np.nan, labels)[None].astype(np.float32)}


class WritesLabels(Ids):
    def encode(self, labels: Any) -> Any:
        labels[labels > 0] += 1
        return super().encode(labels)


class LongLabels(Ids):
    def decode(self, maps: Any) -> Any:
        return super().decode(maps).astype(np.int64)


class SmallerLabels(Ids):
    def decode(self, maps: Any) -> Any:
        return super().decode(maps)[:-1]


class NegativeLabels(Ids):
    def decode(self, maps: Any) -> Any:
        return super().decode(maps) - 1


class MergesCells(Ids):
    """Connected components of the foreground: cells that touch become one."""

    def decode(self, maps: Any) -> Any:
        return ndimage.label(maps["ids"][0] > 0)[0].astype(np.int32)


class ShrinksCells(Ids):
    def decode(self, maps: Any) -> Any:
        labels = super().decode(maps)
        return np.where(ndimage.minimum_filter(labels, 7) == labels, labels, 0).astype(np.int32)


class SeesCellsInNothing(Ids):
    def decode(self, maps: Any) -> Any:
        labels = super().decode(maps)
        if not labels.any():
            labels[3:9, 3:9] = 1
        return labels


class NormalisesTheTile(Ids):
    """Drops what is small beside the largest object of the tile."""

    def decode(self, maps: Any) -> Any:
        labels = super().decode(maps)
        areas = np.bincount(labels.ravel(), minlength=1)
        areas[0] = 0
        return np.where(areas[labels] > 0.05 * areas.max(), labels, 0).astype(np.int32)


def test_good_instance_method_passes() -> None:
    check_instances(Ids())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NoMaps, "maps is empty"),
        (NoSpecs, "must be a MapSpec"),
        (OtherName, r"gives maps \['id'\] instead of \['ids'\]"),
        (FlatMap, r"map 'ids' is \(96, 110\) instead of \(1, 96, 110\)"),
        (DoubleMap, "map 'ids' is float64 instead of float32"),
        (NanMap, "map 'ids' is not finite"),
        (WritesLabels, "changes the labels it is given"),
        (LongLabels, "int64 instead of int32"),
        (SmallerLabels, r"gives \(95, 110\) instead of \(96, 110\)"),
        (NegativeLabels, "negative labels"),
        (MergesCells, "8 made cells come back as 6"),
        (ShrinksCells, "comes back with an IoU of 0"),
        (SeesCellsInNothing, "an image without cells comes back with 1"),
        (NormalisesTheTile, "not statistics of the tile"),
    ],
)
def test_broken_instance_methods(broken: type[Ids], message: str) -> None:
    with pytest.raises(AssertionError, match=message) as caught:
        check_instances(broken())
    assert "\n" not in str(caught.value)
