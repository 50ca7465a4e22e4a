"""Training tiles, drawn so that rare classes are seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.random import SeedSequence, default_rng
from numpy.typing import NDArray

from celltyper.errors import DataError
from celltyper.labels import centroids, label_ids
from celltyper.transforms import Tile, split_mirrored
from celltyper.types import UNKNOWN, Sample


class Place(NamedTuple):
    """Position of a sample among all, and the upper left corner of a tile in it."""

    sample: int
    row: int
    col: int


class TileSampler:
    """Draws tiles of a dataset; tile i is a pure function of the seed and i.

    Nothing is remembered from tile to tile, so any number of workers may draw in any order, and a
    resumed run goes on at the next index.

    Parameters
    ----------
    samples : iterable of Sample
        A list or a `Dataset`; held decoded in memory (7 bytes a pixel).
    size : int
        Height and width of a tile in pixels.
    balance : float
        Classes are drawn in proportion to ``count ** (1 - balance)``: 0 as often as they occur, 1
        equally often. Nuclei of unknown class count as one class more.
    seed : int
        Not negative.
    random_share : float
        Share of tiles cut anywhere instead of around a nucleus, so that empty tissue is seen too.
    jitter : float
        The drawn nucleus lies within this share of the tile around its middle, unless the border
        of the image pushes the tile inwards.

    Attributes
    ----------
    cells : ndarray of int64, shape (K,)
        Nuclei of every class, up to the highest that occurs.
    pixels : ndarray of int64, shape (K + 1,)
        Pixels of background and of every class, for class weights.

    Raises
    ------
    DataError
        If there are no samples.
    ValueError
        If a parameter is out of range.
    """

    def __init__(
        self,
        samples: Iterable[Sample],
        size: int,
        balance: float,
        seed: int,
        *,
        random_share: float = 0.1,
        jitter: float = 0.75,
    ) -> None:
        if size < 1 or seed < 0:
            raise ValueError(f"size must be positive and seed not negative, got {size} and {seed}")
        for name, share in (
            ("balance", balance),
            ("random_share", random_share),
            ("jitter", jitter),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {share}")
        self.samples = tuple(samples)
        if not self.samples:
            raise DataError("no images to draw tiles from")
        self.size, self.seed = size, seed
        self._random_share, self._jitter = random_share, jitter
        classes = max(int(s.known_phenotypes.max()) for s in self.samples)
        self.pixels = np.zeros(classes + 1, np.int64)
        cells = []
        for position, sample in enumerate(self.samples):
            found = sample.phenotypes[sample.labels]
            self.pixels += np.bincount(found[found != UNKNOWN], minlength=classes + 1)
            ids = label_ids(sample.labels)
            row = np.empty((len(ids), 4))
            row[:, 0], row[:, 1] = position, sample.phenotypes[ids]
            row[:, 2:] = centroids(sample.labels)
            cells.append(row)
        table = np.concatenate(cells)
        self._shapes = np.array([sample.labels.shape for sample in self.samples], np.int64)
        areas = self._shapes.prod(axis=1, dtype=np.float64)
        self._image_share = np.cumsum(areas) / areas.sum()
        kinds = (*range(1, classes + 1), UNKNOWN)
        self._by_class = [table[table[:, 1] == kind] for kind in kinds]
        counts = np.array([len(rows) for rows in self._by_class], np.int64)
        self.cells = counts[:-1]
        wanted = np.where(counts > 0, np.maximum(counts, 1.0) ** (1 - balance), 0.0)
        self._class_share = np.cumsum(wanted) / max(wanted.sum(), 1.0)

    def tile(self, index: int) -> Tile:
        """Tile of this index.

        Parameters
        ----------
        index : int
            Not negative; without end.

        Returns
        -------
        Tile
            Image and labels ``(size, size)``, ids as in the sample. An image smaller than the tile
            is continued by reflection, mirrored copies of nuclei having ids of their own.
        """
        place = self.place(index)
        return _cut(self.samples[place.sample], place.row, place.col, self.size)

    def place(self, index: int) -> Place:
        """Where the tile of this index is cut."""
        rng = default_rng(SeedSequence([self.seed, index]))
        if self._class_share[-1] == 0 or rng.random() < self._random_share:
            position = int(np.searchsorted(self._image_share, rng.random(), side="right"))
            spare = np.maximum(self._shapes[position] - self.size, 0)
            row, col = rng.integers(spare, endpoint=True)
        else:
            kind = int(np.searchsorted(self._class_share, rng.random(), side="right"))
            cell = self._by_class[kind][rng.integers(len(self._by_class[kind]))]
            position = int(cell[0])
            away = rng.uniform(-0.5, 0.5, 2) * self._jitter * self.size
            spare = np.maximum(self._shapes[position] - self.size, 0)
            row, col = np.clip(np.rint(cell[2:] + away - (self.size - 1) / 2), 0, spare)
        small = np.minimum(self._shapes[position] - self.size, 0)
        return Place(position, int(row) + int(small[0]) // 2, int(col) + int(small[1]) // 2)


def _cut(sample: Sample, row: int, col: int, size: int) -> Tile:
    height, width = sample.labels.shape
    if row >= 0 and col >= 0 and row + size <= height and col + size <= width:
        window = np.s_[row : row + size, col : col + size]
        image, labels = sample.image[window].copy(), sample.labels[window].copy()
        return Tile(image, labels, sample.phenotypes)
    rows, cols = _reflected(row, size, height), _reflected(col, size, width)
    image = sample.image[rows[:, None], cols]
    labels = sample.labels[rows[:, None], cols]
    outside = (rows != np.arange(row, row + size))[:, None] | (cols != np.arange(col, col + size))
    labels, phenotypes = split_mirrored(labels, outside, sample.phenotypes)
    return Tile(image, labels, phenotypes)


def _reflected(start: int, count: int, length: int) -> NDArray[np.int64]:
    """Give the indices start .. start + count, reflected about the first and the last pixel."""
    if length == 1:
        return np.zeros(count, np.int64)
    period = 2 * (length - 1)
    folded = np.arange(start, start + count) % period
    return np.minimum(folded, period - folded)
