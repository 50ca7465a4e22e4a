"""Embeddings of windows: one pass of the encoder, kept on disk, for all folds, seeds and heads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from celltyper.atomic import atomic_path, make_folder
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import ConfigError
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import read_patch
from celltyper.symmetries import turn
from celltyper.transforms.geometry import ORDER

_FORMAT = 1
CHUNK = 256
"""Windows to a file: what a killed pass loses at most."""


class Embedder:
    """What an encoder is shown of a window, and what is taken of what it gives.

    Parameters
    ----------
    encoder : nn.Module
        With ``embed_whole`` and ``tokens``, as `celltyper.load_encoder` gives.
    pool : str
        ``"card"``, or ``"cls"``, ``"mean"`` and ``"center"`` joined by ``+``: class token, mean of
        all patch tokens, mean of those in the middle half of rows and columns.
    input_size : int or None
        Side in pixels of what the network sees; None takes the card's, or the window as it is.

    Raises
    ------
    ConfigError
        If the encoder has no such tokens, or the side is not a whole number of its patches.
    """

    def __init__(self, encoder: nn.Module, pool: str = "card", input_size: int | None = None):
        self.encoder = encoder.eval()
        self.parts = pool.split("+")
        card = getattr(encoder, "card", None)
        self.input_size = input_size or (card.input_size if card else None)
        patch = int(encoder.patch_size)  # type: ignore[arg-type]
        if self.input_size is not None and self.input_size % patch:
            near = max(1, round(self.input_size / patch)) * patch
            raise ConfigError(
                f"view.input {self.input_size} is no whole number of patches of {patch} px; "
                f"take {near}"
            )
        inner = getattr(encoder, "encoder", encoder)
        if not hasattr(inner, "embed_whole" if pool == "card" else "tokens"):
            raise ConfigError(
                f"view.pool {pool!r} cannot be taken of this encoder; leave out "
                "encoder.options.scales"
            )
        if "cls" in self.parts:
            self._check_class_token(patch)

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return next(self.encoder.parameters()).device

    def __call__(self, images: Tensor) -> Tensor:
        """Embed windows.

        Parameters
        ----------
        images : Tensor, shape (B, 3, S, S)
            RGB in [0, 1].

        Returns
        -------
        Tensor, shape (B, D)
        """
        if self.parts == ["card"]:
            whole: Tensor = self.encoder.embed_whole(self._sized(images))  # type: ignore[operator]
            return whole
        first, patches = self.tokens(images)
        return torch.cat([_pooled(part, first, patches) for part in self.parts], dim=1)

    def tokens(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Class token (B, C), if there is one, and patch tokens (B, C, h, w) of windows."""
        first, patches = self.encoder.tokens(self._sized(images))  # type: ignore[operator]
        return first, patches

    def _sized(self, images: Tensor) -> Tensor:
        side = self.input_size
        if side is None or images.shape[2:] == (side, side):
            return images
        return F.interpolate(
            images, (side, side), mode="bicubic", align_corners=False, antialias=True
        ).clamp(0, 1)

    def key(self) -> bytes:
        """Digest of all that an embedding depends on beside the pixels."""
        digest = hashlib.sha256(fingerprint(self.encoder).encode())
        for name, buffer in self.encoder.named_buffers():
            digest.update(name.encode() + buffer.cpu().numpy().tobytes())
        card, taken = getattr(self.encoder, "card", None), [*self.parts]
        if taken == ["card"] and card is not None:
            # encoder.options change the rule, and no weight with it
            taken.append(card.embedding)
        digest.update(repr((_FORMAT, taken, self.input_size)).encode())
        return digest.digest()

    @torch.inference_mode()
    def _check_class_token(self, patch: int) -> None:
        """Refuse an encoder without class token before many windows are embedded."""
        one = torch.zeros(1, 3, patch, patch, device=self.device)
        if self.encoder.tokens(one)[0] is None:  # type: ignore[operator]
            raise ConfigError("view.pool 'cls': this encoder has no class token; take 'mean'")


def _pooled(part: str, first: Tensor | None, patches: Tensor) -> Tensor:
    if part == "cls":
        assert first is not None
        return first
    if part == "center":
        rows, cols = patches.shape[2:]
        patches = patches[:, :, _middle(rows), _middle(cols)]
    return patches.mean(dim=(2, 3))


def _middle(length: int) -> slice:
    """Middle half, symmetric about the centre."""
    return slice((length + 1) // 4, length - (length + 1) // 4)


def embed_table(
    embedder: Embedder,
    table: PatchTable,
    folder: Path,
    *,
    size: int,
    mpp: float | None = None,
    symmetries: int = 1,
    batch_size: int = 32,
    progress: bool = True,
) -> NDArray[np.float32]:
    """Embeddings of all windows, from disk or computed now.

    Files are found by what they were computed from, so that any run over the same windows shares
    them, and a killed pass goes on where it was.

    Parameters
    ----------
    embedder : Embedder
    table : PatchTable
    folder : Path
        Where the files are.
    size : int
        Side of a window in pixels at `mpp`.
    mpp : float or None
        Micrometres per pixel; None takes pixels as they are.
    symmetries : int
        1, 2, 4 or 8: how many symmetries of the square are seen, the window itself first.
    batch_size : int
        Images per forward pass.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    ndarray of float32, shape (n, symmetries, D)
    """
    key, chunks = embedder.key(), []
    bar = tqdm(total=len(table), desc="embed", unit="patch", disable=None if progress else True)
    with bar:
        for start in range(0, len(table), CHUNK):
            rows = range(start, min(start + CHUNK, len(table)))
            windows = np.stack([read_patch(table, i, size=size, mpp=mpp) for i in rows])
            digest = hashlib.sha256(key)
            digest.update(repr((windows.shape, symmetries)).encode() + windows.tobytes())
            path = folder / f"{digest.hexdigest()[:40]}.npy"
            found = _read(path, len(rows))
            if found is None:
                found = np.concatenate(list(_computed(embedder, windows, symmetries, batch_size)))
                make_folder(folder)
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.save(file, found)
            chunks.append(found)
            bar.update(len(rows))
    return np.concatenate(chunks)


@torch.inference_mode()
def _computed(
    embedder: Embedder, windows: NDArray[np.uint8], symmetries: int, batch_size: int
) -> Iterator[NDArray[np.float32]]:
    per_pass = max(1, batch_size // symmetries)
    for start in range(0, len(windows), per_pass):
        part = torch.from_numpy(windows[start : start + per_pass]).to(embedder.device)
        images = part.permute(0, 3, 1, 2).float() / 255
        turned = torch.stack([turn(images, which) for which in ORDER[:symmetries]], dim=1)
        found = embedder(turned.flatten(0, 1)).float()
        yield found.reshape(len(part), symmetries, -1).cpu().numpy()


def _read(path: Path, rows: int) -> NDArray[np.float32] | None:
    """Embeddings that are there already; a damaged file is as good as none."""
    try:
        found: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 3 and len(found) == rows else None
