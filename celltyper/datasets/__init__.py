"""Annotated images as samples: reading on demand, splitting, resampling, tiles, writing."""

from __future__ import annotations

from celltyper.datasets.dataset import Dataset
from celltyper.datasets.images import read_image, read_label_image
from celltyper.datasets.resampling import resample
from celltyper.datasets.splitting import split_by_group
from celltyper.datasets.tiles import TileSampler
from celltyper.datasets.writing import write_folder

__all__ = [
    "Dataset",
    "TileSampler",
    "read_image",
    "read_label_image",
    "resample",
    "split_by_group",
    "write_folder",
]
