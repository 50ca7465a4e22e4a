"""Where on a slide the cells are: counts in pixels of a small picture, smoothed to densities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from celltyper.errors import DataError
from celltyper.slides import Grid, Slide, TissueMask, require_mpp
from celltyper.tiling import Region
from celltyper.types import Image

LONGEST = 1000
"""Pixels of the longer side of a view."""

BANDWIDTH = 100.0
"""Micrometres, standard deviation of the Gaussian window: some hundred cells of dense tissue.

Of a slide without stated resolution a pixel takes the place of a micrometre, here and below, and a
megapixel that of a square millimetre."""

_SHARPEST = 30
_BLUNTEST = 2
_COLUMNS = ("x", "y", "phenotype", "probability", "area_um2")
_ROWS = 65536

# A fixed histogram instead of all areas: memory does not grow, medians are right to 0.1 %.
_AREAS = np.geomspace(0.1, 1e5, 8193)


class Cells(NamedTuple):
    """Some cells of a slide, a row each."""

    x: NDArray[np.float64]
    """Pixels of the full resolution, shape (n,)."""
    y: NDArray[np.float64]
    phenotype: NDArray[np.intp]
    """Index into the classes, from 0."""
    probability: NDArray[np.floating]
    area_um2: NDArray[np.float64]
    """NaN where it is not known."""


@dataclass(frozen=True)
class View:
    """A part of a slide as a picture.

    Parameters
    ----------
    grid : Grid
        Pixels of the slide at the picture's resolution.
    region : Region
        Which of them are in the picture.
    mpp : (float, float)
        Width and height of a pixel of the picture in micrometres.
    asked : float or None
        Micrometres per pixel by which the slide gives `grid`; None if it states no resolution.
    """

    grid: Grid
    region: Region
    mpp: tuple[float, float]
    asked: float | None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.region.height, self.region.width

    @property
    def microns(self) -> tuple[float, float]:
        """Width and height."""
        return self.region.width * self.mpp[0], self.region.height * self.mpp[1]

    @property
    def bandwidth(self) -> float:
        """Micrometres of the window of a density: `BANDWIDTH`, unless the view is tiny or huge."""
        sharp, blunt = max(self.microns) / _SHARPEST, _BLUNTEST * max(self.mpp)
        return max(blunt, min(BANDWIDTH, sharp))

    def read(self, slide: Slide) -> Image:
        """The picture, shape (H, W, 3)."""
        if self.asked is None:
            return slide.thumbnail(LONGEST)
        return slide.read(self.region, self.asked)

    def centers(self) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Centres of its columns and of its rows, as x and y of the full resolution."""
        x = (np.arange(self.region.width) + self.region.col + 0.5) * self.grid.scale_x
        y = (np.arange(self.region.height) + self.region.row + 0.5) * self.grid.scale_y
        return x, y

    def rectangle(self, region: Region) -> tuple[float, float, float, float]:
        """Column, row, width and height in the picture of a region of the full resolution."""
        x, y = self.grid.scale_x, self.grid.scale_y
        return (
            region.col / x - self.region.col,
            region.row / y - self.region.row,
            region.width / x,
            region.height / y,
        )


def whole_view(slide: Slide) -> View:
    """All of a slide, `LONGEST` pixels long or as long as it is."""
    width, height = slide.size
    if slide.mpp is not None:
        return _view(slide, Region(0, 0, height, width))
    scale = max(1.0, max(slide.size) / LONGEST)
    cols, rows = (max(1, round(n / scale)) for n in slide.size)
    side = width / cols, height / rows
    return View(Grid(cols, rows, *side, 0, False), Region(0, 0, rows, cols), side, None)


def tissue_view(slide: Slide, tissue: TissueMask) -> View:
    """The tissue from its first to its last row and column, or the slide if that is half of it."""
    width, height = slide.size
    if slide.mpp is None:
        return whole_view(slide)
    if tissue.outline is not None:
        left, top, right, bottom = tissue.outline.bounds
    elif tissue.grid.any():
        rows, cols = (np.flatnonzero(tissue.grid.any(axis=axis)) for axis in (1, 0))
        left, right = (int(cols[0]) * tissue.scale[0], (int(cols[-1]) + 1) * tissue.scale[0])
        top, bottom = (int(rows[0]) * tissue.scale[1], (int(rows[-1]) + 1) * tissue.scale[1])
    else:
        return whole_view(slide)
    margin = 0.02 * max(right - left, bottom - top)
    left, top = (max(0, math.floor(start - margin)) for start in (left, top))
    right, bottom = min(width, math.ceil(right + margin)), min(height, math.ceil(bottom + margin))
    if (right - left) * (bottom - top) > width * height / 2:
        return whole_view(slide)
    return _view(slide, Region(top, left, bottom - top, right - left))


def _view(slide: Slide, part: Region) -> View:
    x, y = require_mpp(slide)
    # A square pixel of the picture is square on the glass, whatever those of the scanner are.
    asked = max(part.width * x / LONGEST, part.height * y / LONGEST, x, y)
    grid = slide.grid(asked)
    row, col = math.floor(part.row / grid.scale_y), math.floor(part.col / grid.scale_x)
    bottom = min(grid.height, math.ceil((part.row + part.height) / grid.scale_y))
    right = min(grid.width, math.ceil((part.col + part.width) / grid.scale_x))
    region = Region(row, col, bottom - row, right - col)
    return View(grid, region, (grid.scale_x * x, grid.scale_y * y), asked)


def tissue_in(tissue: TissueMask, view: View) -> NDArray[np.bool_]:
    """Which pixels of a view have their centre in the tissue, shape as the view."""
    x, y = view.centers()
    return tissue.contains(x, y[:, None])


@dataclass(frozen=True, eq=False)
class Tally:
    """What a pass over all cells of a slide leaves.

    Parameters
    ----------
    counts : ndarray of uint32, shape (K, H, W)
        Cells of every class in every pixel of the view.
    cells : ndarray of int64, shape (K,)
        Cells of every class on the slide, in view or not.
    probability_sum : ndarray of float64, shape (K,)
        Of the probabilities of these cells.
    areas : ndarray of int64, shape (K, n)
        Cells of every class by area.
    outside : int
        Cells whose centre is not in the tissue.
    """

    counts: NDArray[np.uint32]
    cells: NDArray[np.int64]
    probability_sum: NDArray[np.float64]
    areas: NDArray[np.int64]
    outside: int

    def median_area(self, classes: slice) -> float:
        """Median area in square micrometres of classes together.

        Returns
        -------
        float
            Right to 0.1 %, NaN without cells of known area.
        """
        upto = np.cumsum(self.areas[classes].sum(axis=0))
        n = int(upto[-1])
        if n == 0:
            return math.nan
        bins = np.searchsorted(upto, [(n - 1) // 2, n // 2], side="right")
        return float(np.sqrt(_AREAS[bins] * _AREAS[bins + 1]).mean())


def read_batches(path: Path, classes: Sequence[str]) -> Iterator[Cells]:
    """Cells of a ``cells.parquet``, some ten thousand at a time.

    Parameters
    ----------
    path : Path
    classes : sequence of str
        Names of the phenotypes.

    Yields
    ------
    Cells

    Raises
    ------
    DataError
        If the file is missing, no table of cells, or holds another phenotype.
    """
    number = {name: i for i, name in enumerate(classes)}
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path}: no table of cells: no column {', '.join(missing)}")
            for batch in file.iter_batches(_ROWS, columns=list(_COLUMNS)):
                phenotypes = batch.column("phenotype")
                if not pa.types.is_dictionary(phenotypes.type):
                    phenotypes = phenotypes.dictionary_encode()
                names = phenotypes.dictionary.to_pylist()
                # the last entry is that of a cell without phenotype
                lookup = np.array([number.get(name, -1) for name in [*names, None]], np.intp)
                of_cell = lookup[phenotypes.indices.fill_null(len(names)).to_numpy()]
                if (of_cell < 0).any():
                    strange = sorted({str(name) for name in names if name not in number})
                    raise DataError(
                        f"{path}: cells of phenotype {', '.join(strange) or 'null'}, but the slide "
                        f"has the classes {', '.join(classes)}; is the table of another model?"
                    )
                x, y, probability, area = (
                    batch.column(name).to_numpy(zero_copy_only=False)
                    for name in ("x", "y", "probability", "area_um2")
                )
                yield Cells(x, y, of_cell, probability, np.asarray(area, np.float64))
    except (OSError, pa.ArrowException) as error:
        reason = "no such file" if not path.exists() else str(error).splitlines()[0]
        raise DataError(f"cannot read cells from {path}: {reason}") from error


def tally(batches: Iterable[Cells], n_classes: int, view: View, tissue: TissueMask) -> Tally:
    """Count cells by class, place and area in memory that does not grow with them.

    Parameters
    ----------
    batches : iterable of Cells
        All cells of the slide.
    n_classes : int
        Number K of classes.
    view : View
        In whose pixels they are counted.
    tissue : TissueMask

    Returns
    -------
    Tally

    Raises
    ------
    DataError
        If a cell is not on the slide.
    """
    height, width = view.shape
    counts = np.zeros(n_classes * height * width, np.uint32)
    cells = np.zeros(n_classes, np.int64)
    probability = np.zeros(n_classes)
    areas = np.zeros((n_classes, len(_AREAS) - 1), np.int64)
    outside = 0
    for batch in batches:
        col, row = batch.x / view.grid.scale_x, batch.y / view.grid.scale_y
        lost = ~((col >= 0) & (row >= 0) & (col <= view.grid.width) & (row <= view.grid.height))
        if lost.any():
            i = int(lost.argmax())
            raise DataError(
                f"a cell at x {batch.x[i]:g}, y {batch.y[i]:g} is not on the slide; are these the "
                "cells of another one?"
            )
        cells += np.bincount(batch.phenotype, minlength=n_classes)
        probability += np.bincount(batch.phenotype, batch.probability, n_classes)
        known = np.isfinite(batch.area_um2)
        size = np.searchsorted(_AREAS, batch.area_um2[known], side="right") - 1
        np.add.at(areas, (batch.phenotype[known], size.clip(0, areas.shape[1] - 1)), 1)
        outside += int((~tissue.contains(batch.x, batch.y)).sum())
        col, row = np.floor(col) - view.region.col, np.floor(row) - view.region.row
        seen = (col >= 0) & (row >= 0) & (col < width) & (row < height)
        place = (batch.phenotype[seen] * height + row[seen].astype(np.intp)) * width
        np.add.at(counts, place + col[seen].astype(np.intp), 1)
    return Tally(counts.reshape(n_classes, height, width), cells, probability, areas, outside)


def densities(
    counts: NDArray[np.uint32], inside: NDArray[np.bool_], view: View
) -> Iterator[NDArray[np.float32]]:
    """Cells per square millimetre of tissue.

    Cells and tissue are both summed in a Gaussian window (`View.bandwidth`, cut off at four of it)
    and divided, so that a density at the rim of the tissue is not lowered by the glass beside it.

    Parameters
    ----------
    counts : ndarray of uint32, shape (K, H, W)
        Cells of every class in every pixel of the view.
    inside : ndarray of bool, shape (H, W)
        Which pixels are tissue; cells elsewhere are left out.
    view : View

    Yields
    ------
    ndarray of float32, shape (H, W)
        Of every class; NaN outside the tissue.
    """
    sides = zip(view.shape, view.mpp[::-1], strict=True)
    (rows, row_between), (cols, col_between) = (_line(n, view.bandwidth / mpp) for n, mpp in sides)

    def smooth(values: NDArray[np.float32]) -> NDArray[np.float32]:
        sums = row_between @ (rows @ values @ cols.T) @ col_between.T
        return sums[inside].astype(np.float32)

    area = smooth(inside.astype(np.float32)) * (view.mpp[0] * view.mpp[1] / 1e6)
    for of_class in counts:
        result = np.full(inside.shape, np.nan, np.float32)
        result[inside] = smooth(np.where(inside, of_class, np.float32(0))) / area
        yield result


def _line(n: int, sigma: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gaussian sums along n pixels, as matrices: their time does not depend on the window's width.

    Returns
    -------
    weights : ndarray of float32, shape (m, n)
        Of every pixel in the sums at m of them, an eighth of sigma apart.
    between : ndarray of float32, shape (n, m)
        Sums at all pixels, linear between those: at a peak too low by 0.2 % at most.
    """
    pixels = np.arange(n)
    at = np.append(pixels[: n - 1 : max(1, int(sigma / 8))], n - 1)
    distance = np.abs(at[:, None] - pixels) / sigma
    weights = np.where(distance > 4, 0, np.exp(-(distance**2) / 2))
    between = np.stack([np.interp(pixels, at, of_one) for of_one in np.eye(len(at))], axis=1)
    return weights.astype(np.float32), between.astype(np.float32)
