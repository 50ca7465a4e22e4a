"""Any timm vision transformer as an encoder: maps from four blocks, and a pooled embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from celltyper.encoders.cards import EmbeddingRule, EncoderCard
from celltyper.encoders.prepare import Prepare, Prepared
from celltyper.errors import ConfigError


class TimmViT(Prepared):
    """A timm vision transformer that gives feature maps for images of any size.

    The maps are those of timm's ``forward_intermediates`` without prefix tokens; the last one
    has passed the model's final norm, as in the model's own output.

    Parameters
    ----------
    model : nn.Module
        timm model with ``blocks`` and ``forward_intermediates``, made with ``num_classes=0`` and
        ``dynamic_img_size=True``.
    blocks : sequence of int or "quarters"
        Blocks (from 0) whose maps are given; "quarters" takes the last block of each quarter of
        the depth; of an encoder of fewer than four blocks it takes some twice.
    mean, std : sequence of 3 float
        Normalisation of RGB in [0, 1].
    embedding : {"cls", "mean", "cls+mean"}
        Pooled embedding: class token, mean over patch tokens, or both behind each other.
    **preparation
        Passed to `celltyper.encoders.prepare.Prepare`: magnify, input_size, resize,
        interpolation.

    Attributes
    ----------
    channels : list of int
        Channels of every map.
    patch_size : int
        Side of a patch in pixels of the image.
    embed_dim : int
        Length of the pooled embedding.
    """

    card: EncoderCard | None = None

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[int] | str = "quarters",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        embedding: EmbeddingRule = "cls",
        **preparation: Any,
    ) -> None:
        super().__init__()
        timm_model: Any = model
        self.model = timm_model
        self.blocks = _block_indices(blocks, len(timm_model.blocks))
        self.channels = [int(timm_model.embed_dim)] * len(self.blocks)
        rows, cols = timm_model.patch_embed.patch_size
        if rows != cols:
            raise ConfigError(f"patches must be square, this encoder has {rows} x {cols} px")
        self.prepare = Prepare(mean, std, int(rows), **preparation)
        self.patch_size = self.prepare.patch_size
        if embedding != "mean" and getattr(timm_model, "cls_token", None) is None:
            raise ConfigError(f"embedding {embedding!r} needs a class token, which is not there")
        self.embedding = embedding
        self.embed_dim = self.channels[-1] * (2 if embedding == "cls+mean" else 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the chosen blocks.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            RGB in [0, 1].

        Returns
        -------
        list of Tensor, each (B, C, ceil(H / p), ceil(W / p))
            From shallow to deep. Where p does not divide the image, the last row and column of
            patches reach past its border, into a repeat of the border pixels.
        """
        x = self.prepare(images)
        different = sorted(set(self.blocks))
        tokens, found = self.model.forward_intermediates(
            x, indices=different, norm=False, stop_early=True, output_fmt="NCHW"
        )
        by_block = dict(zip(different, found, strict=True))
        maps = [by_block[block] for block in self.blocks]
        rows, cols = (side // self.prepare.stride for side in x.shape[2:])
        last = tokens[:, self.model.num_prefix_tokens :].transpose(1, 2)
        maps[-1] = last.unflatten(2, (rows, cols))
        return maps

    def embed_whole(self, images: Tensor) -> Tensor:
        """As `embed`, of images that are neither scaled nor cut.

        By the card's rule; register tokens never take part.
        """
        first, patches = self.tokens(images)
        parts = [] if first is None or self.embedding == "mean" else [first]
        if self.embedding in ("mean", "cls+mean"):
            parts.append(patches.mean(dim=(2, 3)))
        return torch.cat(parts, dim=1)

    def tokens(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Class token and patch tokens after the final norm, in one pass.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            RGB in [0, 1]; neither scaled nor cut.

        Returns
        -------
        first : Tensor or None, shape (B, C)
            Class token, None if the network has none. Register tokens never take part.
        patches : Tensor, shape (B, C, ceil(H / p), ceil(W / p))
            p the patch in pixels of the network.
        """
        x = self.prepare.whole(images)
        tokens = self.model.forward_features(x)
        rows, cols = (side // self.prepare.stride for side in x.shape[2:])
        patches = tokens[:, self.model.num_prefix_tokens :].transpose(1, 2)
        has_class = getattr(self.model, "cls_token", None) is not None
        return tokens[:, 0] if has_class else None, patches.unflatten(2, (rows, cols))


def _block_indices(blocks: Sequence[int] | str, depth: int) -> list[int]:
    if blocks == "quarters":
        return [max(round(depth * quarter / 4), 1) - 1 for quarter in (1, 2, 3, 4)]
    indices = [int(block) for block in blocks]
    if not indices or sorted(set(indices)) != indices or not 0 <= indices[0] <= indices[-1] < depth:
        raise ConfigError(
            f"feature_blocks must ascend within 0..{depth - 1} without repeats, got {indices}"
        )
    return indices
