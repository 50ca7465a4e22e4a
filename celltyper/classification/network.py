"""An encoder with a head on its tokens, trained together: images of windows to class logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from celltyper.classification.config import PatchConfig
from celltyper.classification.embedding import Embedder
from celltyper.encoders.adapt import Adapted, adapt_encoder
from celltyper.errors import ConfigError
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import read_patch
from celltyper.symmetries import turn
from celltyper.transforms.geometry import ORDER


class PatchNetwork(nn.Module):
    """Images of windows to class logits.

    Parameters
    ----------
    embedder : Embedder
        What the encoder is shown; its encoder becomes a part of this module.
    head : nn.Module
        ``head(embedder, images) -> (B, K)``; see `LinearHead` and `AttentionHead`.
    """

    def __init__(self, embedder: Embedder, head: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        self.encoder = embedder.encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of RGB windows (B, 3, S, S) in [0, 1]."""
        logits: Tensor = self.head(self.embedder, images)
        return logits

    @torch.inference_mode()
    def probabilities(
        self,
        table: PatchTable,
        *,
        size: int,
        mpp: float | None,
        symmetries: int,
        batch_size: int,
        progress: bool,
    ) -> NDArray[np.float64]:
        """Class probabilities (n, K) of windows, averaged over symmetries of the square."""
        self.eval()
        found = []
        per_pass = max(1, batch_size // symmetries)
        bar = tqdm(total=len(table), desc="type", unit="patch", disable=None if progress else True)
        with bar:
            for start in range(0, len(table), per_pass):
                rows = range(start, min(start + per_pass, len(table)))
                windows = np.stack([read_patch(table, i, size=size, mpp=mpp) for i in rows])
                images = as_images(windows).to(self.embedder.device)
                turned = torch.stack([turn(images, which) for which in ORDER[:symmetries]], dim=1)
                logits = self(turned.flatten(0, 1)).double()
                each = logits.softmax(dim=1).reshape(len(rows), symmetries, -1)
                found.append(each.mean(dim=1).cpu().numpy())
                bar.update(len(rows))
        return np.concatenate(found)


class LinearHead(nn.Module):
    """A linear layer on the standardised embedding.

    Parameters
    ----------
    features, classes : int
        D and K.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.linear = nn.Linear(features, classes)

    def forward(self, embedder: Embedder, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.linear((embedder(images) - self.mean) / self.scale)
        return logits

    @torch.no_grad()
    def start_from(self, probe: Mapping[str, Tensor], embeddings: NDArray[np.float32]) -> None:
        """Start from a logistic regression on the frozen encoder's embeddings.

        A random head would first distort features that are good already (Kumar et al. 2022,
        doi:10.48550/arXiv.2202.10054).

        Parameters
        ----------
        probe : mapping of str to Tensor
            ``weight`` (D, K) and ``bias`` (K,), for embeddings as they are.
        embeddings : ndarray of float32, shape (n, D)
            Those that it was fitted to; their mean and deviation standardise.
        """
        deviation = embeddings.std(axis=0, dtype=np.float64)
        mean = torch.from_numpy(embeddings.mean(axis=0, dtype=np.float64))
        scale = torch.from_numpy(np.where(deviation > 0, deviation, 1.0))
        weight = probe["weight"].double()
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.linear.weight.copy_((weight * scale[:, None]).T)
        self.linear.bias.copy_(probe["bias"].double() + mean @ weight)


class AttentionHead(nn.Module):
    """Gated attention over the patch tokens (Ilse et al. 2018, doi:10.48550/arXiv.1802.04712).

    Parameters
    ----------
    channels, classes : int
        C of a token, and K.
    width : int
        Of the layer that weighs tokens.
    """

    def __init__(self, channels: int, classes: int, width: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.value = nn.Linear(channels, width)
        self.gate = nn.Linear(channels, width)
        self.score = nn.Linear(width, 1)
        self.linear = nn.Linear(channels, classes)

    def forward(self, embedder: Embedder, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        tokens = self.norm(embedder.tokens(images)[1].flatten(2).transpose(1, 2))
        scores = self.score(torch.tanh(self.value(tokens)) * torch.sigmoid(self.gate(tokens)))
        pooled = (scores.softmax(dim=1) * tokens).sum(dim=1)
        logits: Tensor = self.linear(pooled)
        return logits


def build_network(
    config: PatchConfig, embedder: Embedder, classes: int, seed: int, *, shared: bool
) -> PatchNetwork:
    """Join an encoder, of which training may change what the config says, and a new head.

    Parameters
    ----------
    config : PatchConfig
    embedder : Embedder
        Of the frozen encoder.
    classes : int
        K.
    seed : int
        Of head and adapters.
    shared : bool
        Whether others go on using the encoder of `embedder`: then a copy is adapted.

    Returns
    -------
    PatchNetwork

    Raises
    ------
    ConfigError
        If the encoder cannot be adapted so, or the head does not take an option.
    """
    settings = config.encoder
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        plain: Any = embedder.encoder
        plain = plain.encoder if isinstance(plain, Adapted) else plain
        encoder = adapt_encoder(
            copy.deepcopy(plain) if shared else plain,
            settings.adapt,
            lora=settings.lora.model_dump(),
            last_n=settings.last_n,
            checkpointing=settings.checkpointing,
        )
        own = Embedder(encoder, "+".join(embedder.parts), embedder.input_size)
        side = own.input_size or int(encoder.patch_size)  # type: ignore[arg-type]
        with torch.no_grad():
            blank = torch.zeros(1, 3, side, side, device=embedder.device)
            channels = own.tokens(blank)[1].shape[1]
            features = own(blank).shape[1]
        try:
            head = (
                AttentionHead(channels, classes, **config.head.options)
                if config.head.name == "attention"
                else LinearHead(features, classes, **config.head.options)
            )
        except (TypeError, RuntimeError) as error:
            raise ConfigError(
                f"head {config.head.name!r} does not take head.options {config.head.options}"
            ) from error
    return PatchNetwork(own, head.to(embedder.device))


def as_images(windows: NDArray[np.uint8]) -> Tensor:
    """Windows (B, S, S, 3) as float images (B, 3, S, S) in [0, 1]."""
    return torch.from_numpy(windows).permute(0, 3, 1, 2).float() / 255
