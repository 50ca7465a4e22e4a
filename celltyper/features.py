"""Feature maps of a frozen encoder, computed once per image and kept on disk.

A frozen encoder gives the same features of the same pixels in every epoch. Training a decoder on
kept features never runs the encoder again; what it gives up is a fresh augmentation for every
tile.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from celltyper.atomic import atomic_path, make_folder
from celltyper.devices import autocast
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import ConfigError
from celltyper.tiling import Region, read_padded, tile_grid
from celltyper.types import Image

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Canvas:
    """Features of one image and of a margin around it, and how to cut windows out of them.

    Parameters
    ----------
    file : Path
        Holds the arrays of all levels behind each other.
    shapes : tuple of (int, int, int)
        Rows, columns and channels of every level.
    strides : tuple of int
        Pixels per cell along a side, by level.
    margin : int
        Pixels around the image that the maps cover; mirrored image. Cell (0, 0) begins there.
    """

    file: Path
    shapes: tuple[tuple[int, int, int], ...]
    strides: tuple[int, ...]
    margin: int

    @cached_property
    def maps(self) -> tuple[NDArray[np.float16], ...]:
        """Arrays of float16 (rows, columns, channels), mapped from disk."""
        flat = np.load(self.file, mmap_mode="r")
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        if flat.shape != (ends[-1],) or flat.dtype != np.float16:
            raise ValueError(f"{self.file} holds something else")
        parts = np.split(flat, ends[:-1])
        return tuple(part.reshape(s) for part, s in zip(parts, self.shapes, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # a worker maps the file itself; pickling an array would copy it
        return {name: value for name, value in vars(self).items() if name != "maps"}

    def window(self, region: Region) -> list[Tensor]:
        """Cut out the features of a region.

        Parameters
        ----------
        region : Region
            In pixels of the image; may lie in the margin. Its corner, less the margin, and its
            sides must be multiples of the coarsest stride.

        Returns
        -------
        list of Tensor of float32, each (C, height / stride, width / stride)
        """
        windows = []
        for cells, stride in zip(self.maps, self.strides, strict=True):
            row, col = ((x + self.margin) // stride for x in region[:2])
            part = cells[row : row + region.height // stride, col : col + region.width // stride]
            # a copy, as the file is read-only; numpy takes four times as long to widen it
            half = torch.from_numpy(np.array(part))
            windows.append(half.float().movedim(-1, 0))
        return windows


class FeatureCache:
    """Features of a frozen encoder on disk, found by what they were computed from.

    The name of a file is a digest of the encoder's fingerprint and settings, of the pixels, and
    of the tiles. Two processes may fill a cache at once: a file appears whole or not at all, and
    both would write the same.

    Parameters
    ----------
    encoder : nn.Module
        Frozen; see `celltyper.encoders.adapt.freeze`.
    folder : Path
        Where the files are.
    tile, overlap : int
        Side of the windows that the encoder sees, and pixels shared by neighbours; rounded up to
        what the encoder's patches divide.
    limit : int
        Bytes that the folder may hold. Files that were not used for longest go first.
    batch_size : int
        Windows per forward pass.
    precision : {"fp32", "bf16", "fp16"}
        Of the forward pass; what is kept has 16 bits in any case.

    Attributes
    ----------
    tile, overlap : int
        As rounded.
    """

    def __init__(
        self,
        encoder: nn.Module,
        folder: Path,
        *,
        tile: int,
        overlap: int,
        limit: int,
        batch_size: int = 4,
        precision: str = "fp32",
    ) -> None:
        self.encoder = encoder
        self.folder = folder
        self.patch: int = encoder.patch_size  # type: ignore[assignment]
        self.channels: list[int] = list(encoder.channels)  # type: ignore[arg-type]
        strides = getattr(encoder, "strides", None)
        self.strides = tuple(strides or [self.patch] * len(self.channels))
        self.tile = self.rounded(tile)
        self.overlap = -(-overlap // (2 * self.patch)) * 2 * self.patch
        if self.overlap >= self.tile:
            raise ConfigError(
                f"infer.overlap {overlap} leaves nothing of a tile of {tile} at patches of "
                f"{self.patch} px; lower it or raise the tile"
            )
        self.limit = limit
        self.batch_size = batch_size
        self.precision = precision
        self.key = self._key()

    def rounded(self, size: int) -> int:
        """Smallest multiple of the patch that is at least `size`."""
        return -(-size // self.patch) * self.patch

    def bytes_of(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Bytes that the features of images (height, width) take."""
        return 2 * sum(math.prod(s) for shape in shapes for s in self._shapes(shape))

    def canvas(self, image: Image) -> Canvas:
        """Features of an image, from disk or computed now.

        Parameters
        ----------
        image : ndarray of uint8, shape (H, W, 3)
            RGB at the resolution of the model.

        Returns
        -------
        Canvas
        """
        path = self._path(image)
        shapes = tuple(self._shapes(image.shape[:2]))
        canvas = Canvas(path, shapes, self.strides, self.overlap // 2)
        try:
            # mapped now: another process may delete the file, but not what is mapped
            _ = canvas.maps
            os.utime(path)
        except (OSError, ValueError):
            self._fill(path, image)
            _ = canvas.maps
        return canvas

    @torch.inference_mode()
    def compute(self, image: Image) -> list[NDArray[np.float16]]:
        """Features of an image and its margin, window by window.

        Every window gives its inner part, less half the overlap; windows at the border of the
        image give their part of the margin too.

        Parameters
        ----------
        image : ndarray of uint8, shape (H, W, 3)

        Returns
        -------
        list of ndarray of float16, each (rows, columns, channels)
        """
        device = next(self.encoder.parameters()).device
        margin, (height, width) = self.overlap // 2, image.shape[:2]
        maps = [np.empty(shape, np.float16) for shape in self._shapes((height, width))]
        reads = [tile.read for tile in tile_grid((height, width), self.tile, self.overlap)]
        last_row, last_col = reads[-1].row, reads[-1].col
        for start in range(0, len(reads), self.batch_size):
            part = reads[start : start + self.batch_size]
            pixels = np.stack([read_padded(image, read) for read in part])
            batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
            with autocast(device, self.precision):
                levels = self.encoder(batch)
            for cells, stride, found in zip(maps, self.strides, levels, strict=True):
                side = self.tile // stride
                host = found.permute(0, 2, 3, 1).half().cpu().numpy()
                if not np.isfinite(host).all():
                    raise ConfigError(
                        "features of this encoder do not fit into float16, so they cannot be kept: "
                        "use encoder.cache=0"
                    )
                for read, window in zip(part, host, strict=True):
                    edge = margin // stride
                    top = 0 if read.row == -margin else edge
                    left = 0 if read.col == -margin else edge
                    bottom = side if read.row == last_row else side - edge
                    right = side if read.col == last_col else side - edge
                    row, col = ((x + margin) // stride for x in read[:2])
                    place = np.s_[row + top : row + bottom, col + left : col + right]
                    cells[place] = window[top:bottom, left:right]
        return maps

    def _fill(self, path: Path, image: Image) -> None:
        make_folder(self.folder)
        flat = np.concatenate([cells.ravel() for cells in self.compute(image)])
        self._make_room(flat.nbytes)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, flat)

    def _make_room(self, needed: int) -> None:
        """Delete the files that were not used for longest until the new one fits."""
        files = [(f.stat().st_mtime, f.stat().st_size, f) for f in self.folder.glob("*.npy")]
        used = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if used + needed <= self.limit:
                return
            # another process may have been quicker; one that reads it keeps its mapping
            file.unlink(missing_ok=True)
            used -= size

    def _shapes(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        step = self.tile - self.overlap
        sides = [-(-side // step) * step + self.overlap for side in shape[:2]]
        return [
            (sides[0] // stride, sides[1] // stride, channels)
            for stride, channels in zip(self.strides, self.channels, strict=True)
        ]

    def _key(self) -> bytes:
        """What the features depend on beside the pixels."""
        settings = {
            name: repr(getattr(module, name))
            for module in self.encoder.modules()
            for name in ("blocks", "levels", "scales", "patch_size", "interpolation")
            if name in vars(module)
        }
        digest = hashlib.sha256(fingerprint(self.encoder).encode())
        for name, buffer in self.encoder.named_buffers():
            digest.update(name.encode() + buffer.cpu().numpy().tobytes())
        digest.update(repr((_FORMAT, sorted(settings.items()), self.tile, self.overlap)).encode())
        if self.precision != "fp32":
            digest.update(self.precision.encode())
        return digest.digest()

    def _path(self, image: Image) -> Path:
        digest = hashlib.sha256(self.key)
        digest.update(repr(image.shape).encode())
        digest.update(image.tobytes())
        return self.folder / f"{digest.hexdigest()[:40]}.npy"
