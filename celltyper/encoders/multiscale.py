"""An encoder that looks at an image at several enlargements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from celltyper.encoders.cards import EncoderCard
from celltyper.errors import ConfigError


class MultiScale(nn.Module):
    """Features of an image and of its enlargements, joined (S2, doi:10.48550/arXiv.2403.13043).

    At scale s the image is enlarged s times and cut into s x s pieces of the image's own size,
    which the encoder sees one by one. Their maps are put together again, averaged over s x s
    patches to the grid of the first scale, and joined along the channels. Embeddings of the
    pieces are averaged. MUSK's published multi-scale option is ``scales=(1, 2)``.

    Parameters
    ----------
    encoder : nn.Module
        With ``prepare`` (see `celltyper.encoders.prepare.Prepare`) and ``embed_whole``, whose
        maps have one grid.
    scales : sequence of int
        Enlargements, 1 first.

    Raises
    ------
    ConfigError
        If the encoder's maps have several grids.
    """

    card: EncoderCard | None = None

    def __init__(self, encoder: nn.Module, scales: Sequence[int] = (1, 2)) -> None:
        super().__init__()
        inner: Any = encoder
        if len(set(getattr(inner, "strides", [0]))) > 1:
            raise ConfigError(
                f"scales {list(scales)} need maps of one grid, this encoder gives strides "
                f"{list(inner.strides)}; leave out 'scales'"
            )
        self.encoder = inner
        self.scales = tuple(scales)
        self.channels = [channels * len(self.scales) for channels in inner.channels]
        self.patch_size: int = inner.patch_size
        self.embed_dim: int = inner.embed_dim * len(self.scales)
        self.card = inner.card
        if hasattr(inner, "strides"):
            self.strides: list[int] = list(inner.strides)

    @property
    def model(self) -> nn.Module:
        """The network that is run at every scale."""
        model: nn.Module = self.encoder.model
        return model

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps, joined over scales.

        Parameters
        ----------
        images : Tensor, shape (B, 3, H, W)
            RGB in [0, 1].

        Returns
        -------
        list of Tensor, each (B, C * len(scales), ceil(H / p), ceil(W / p))
        """
        p = self.patch_size
        bottom, right = -images.shape[2] % p, -images.shape[3] % p
        if bottom or right:
            # before enlarging: a piece that is padded by itself would not join its neighbour
            images = F.pad(images, (0, right, 0, bottom), mode="replicate")
        of_scales = []
        for scale in self.scales:
            maps = self.encoder(_pieces(images, scale))
            of_scales.append([F.avg_pool2d(_joined(m, scale), scale) for m in maps])
        return [torch.cat(same, dim=1) for same in zip(*of_scales, strict=True)]

    def embed(self, images: Tensor) -> Tensor:
        """Pooled embedding, joined over scales: shape (B, embed_dim) of images (B, 3, H, W)."""
        images = self.encoder.prepare.crop(images)
        vectors = []
        for scale in self.scales:
            # the card's rule was for the image: a piece is not scaled and cut once more
            of_pieces = self.encoder.embed_whole(_pieces(images, scale))
            vectors.append(of_pieces.unflatten(0, (scale * scale, -1)).mean(dim=0))
        return torch.cat(vectors, dim=1)


def _pieces(images: Tensor, scale: int) -> Tensor:
    """Enlarge and cut into scale x scale pieces, (scale * scale * B, 3, H, W), row by row."""
    if scale == 1:
        return images
    large = F.interpolate(images, scale_factor=scale, mode="bicubic", align_corners=False)
    rows = large.chunk(scale, dim=2)
    return torch.cat([piece for row in rows for piece in row.chunk(scale, dim=3)])


def _joined(maps: Tensor, scale: int) -> Tensor:
    """Put the maps of `_pieces` together again."""
    # not chunk, which would fix the size of the batch in an exported model
    pieces = maps.reshape(scale * scale, -1, *maps.shape[1:]).unbind()
    rows = [torch.cat(pieces[i * scale : (i + 1) * scale], dim=3) for i in range(scale)]
    return torch.cat(rows, dim=2)
