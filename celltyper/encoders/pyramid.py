"""Networks whose maps get coarser with depth (Swin, ConvNeXt, EfficientNet) as encoders."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from celltyper.encoders.cards import EmbeddingRule, EncoderCard
from celltyper.encoders.layouts import to_timm
from celltyper.encoders.prepare import Prepare, Prepared
from celltyper.errors import ConfigError


class TimmPyramid(Prepared):
    """A timm network with several resolutions that gives feature maps for images of any size.

    The maps are those of timm's ``features_only`` models: as they leave a level, without the
    final norm, which belongs to the pooled embedding.

    Where the windows of a Swin do not divide a map, it is filled up with zeros before the
    windows are shifted, as in the authors' code for segmentation and in torchvision. timm does
    it the other way round, which lets the top rows of a map see its bottom rows.

    Parameters
    ----------
    model : nn.Module
        timm model with ``feature_info`` and ``forward_intermediates``, made with
        ``num_classes=0``, that takes any image size its coarsest stride divides.
    levels : sequence of int or "quarters"
        Levels (from 0) whose maps are given; "quarters" takes the last four.
    mean, std : sequence of 3 float
        Normalisation of RGB in [0, 1].
    embedding : "mean"
        Pooled embedding: what timm's own pooling makes of the last level.
    **preparation
        Passed to `celltyper.encoders.prepare.Prepare`: magnify, input_size, resize,
        interpolation.

    Attributes
    ----------
    channels : list of int
        Channels of every map.
    strides : list of int
        Pixels of the image per pixel of every map, along a side.
    patch_size : int
        Coarsest stride of the network, to whose multiple images are continued.
    embed_dim : int
        Length of the pooled embedding.

    Raises
    ------
    ConfigError
        If the levels are not there, another embedding is asked for, or the magnification
        leaves a level without a whole stride.
    """

    card: EncoderCard | None = None

    def __init__(
        self,
        model: nn.Module,
        levels: Sequence[int] | str = "quarters",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        embedding: EmbeddingRule = "mean",
        **preparation: Any,
    ) -> None:
        super().__init__()
        if embedding != "mean":
            raise ConfigError(
                f"embedding {embedding!r} needs a class token, which a pyramid has not; take 'mean'"
            )
        timm_model: Any = model
        self.model = timm_model
        reductions = [int(info["reduction"]) for info in timm_model.feature_info]
        self.levels = _level_indices(levels, len(reductions))
        self.channels = [int(timm_model.feature_info[i]["num_chs"]) for i in self.levels]
        self.prepare = Prepare(mean, std, max(reductions), **preparation)
        self.patch_size = self.prepare.patch_size
        self.strides = _strides([reductions[i] for i in self.levels], self.prepare)
        self.embed_dim = int(timm_model.head_hidden_size)
        for block in timm_model.modules():
            if hasattr(block, "_attn") and hasattr(block, "shift_size"):
                block._attn = partial(_attend_in_whole_windows, block._attn, block.window_size)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the chosen levels.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            RGB in [0, 1].

        Returns
        -------
        list of Tensor, each (B, C_i, ceil(H / p) * p / s_i, ceil(W / p) * p / s_i)
            From shallow to deep, p the `patch_size` and s_i the `strides`. Where p does not
            divide the image, maps reach past its border, into a repeat of the border pixels.
        """
        maps: list[Tensor] = self.model.forward_intermediates(
            self.prepare(images), indices=self.levels, stop_early=True, intermediates_only=True
        )
        return list(maps)

    def embed_whole(self, images: Tensor) -> Tensor:
        """As `embed`, of images that are neither scaled nor cut.

        What timm's classifier would get.
        """
        features = self.model.forward_features(self.prepare.whole(images))
        vectors: Tensor = self.model.forward_head(features, pre_logits=True)
        return vectors

    def tokens(self, images: Tensor) -> tuple[None, Tensor]:
        """No class token, and the map of the deepest level.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            RGB in [0, 1]; neither scaled nor cut.

        Returns
        -------
        tuple of None and Tensor, shape (B, C, ceil(H / p), ceil(W / p))
            p the coarsest stride in pixels of the network.
        """
        maps: list[Tensor] = self.model.forward_intermediates(
            self.prepare.whole(images), indices=self.levels[-1:], intermediates_only=True
        )
        return None, maps[-1]


def _attend_in_whole_windows(
    attend: Callable[[Tensor], Tensor], window: tuple[int, int], x: Tensor
) -> Tensor:
    """Fill maps (B, H, W, C) up with zeros to whole windows, attend, and cut them again."""
    rows, cols = x.shape[1:3]
    bottom, right = -rows % window[0], -cols % window[1]
    if not bottom and not right:
        return attend(x)
    return attend(F.pad(x, (0, 0, 0, right, 0, bottom)))[:, :rows, :cols]


def in_timm_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring the published weights of a pyramid to the names and shapes of the installed timm.

    Wrapper prefixes, the classifier, and attention masks and indices, which are computed and no
    weights, are dropped. The authors' own namings (Swin, ConvNeXt) are turned by timm itself.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Weights as published.
    model : nn.Module
        timm model made with ``num_classes=0``.

    Returns
    -------
    dict of str to Tensor
        Weights; what timm cannot turn stays as it is, for `load_weights` to refuse.
    """
    plain: Any = model
    expected = model.state_dict().keys()
    found = to_timm(tensors, expected)
    turn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if turn is not None:
        try:
            found = turn(found, model)
        except (AttributeError, KeyError, RuntimeError):
            return dict(tensors)
    classifier = plain.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    unused = tuple(f"{head}." for head in heads)
    return {k: v for k, v in found.items() if k in expected or not k.startswith(unused)}


def _level_indices(levels: Sequence[int] | str, depth: int) -> list[int]:
    if levels == "quarters":
        if depth < 4:
            raise ConfigError(f"feature_blocks 'quarters' needs 4 levels, the encoder has {depth}")
        return list(range(depth - 4, depth))
    indices = [int(level) for level in levels]
    if not indices or sorted(set(indices)) != indices or not 0 <= indices[0] <= indices[-1] < depth:
        raise ConfigError(
            f"feature_blocks of a pyramid must ascend within 0..{depth - 1} without repeats, "
            f"got {indices}"
        )
    return indices


def _strides(reductions: Sequence[int], prepare: Prepare) -> list[int]:
    """Strides in pixels of the image, where `reductions` are in pixels of the network."""
    p, coarsest = prepare.patch_size, prepare.stride
    if any(r * p % coarsest for r in reductions):
        step = coarsest // math.gcd(coarsest, *reductions)
        below, above = max(step, p // step * step), (p // step + 1) * step
        raise ConfigError(
            f"magnification {coarsest / p:.3g} leaves strides of this pyramid that are no whole "
            f"pixels; take {coarsest / above:.4g} or {coarsest / below:.4g}"
        )
    return [r * p // coarsest for r in reductions]
