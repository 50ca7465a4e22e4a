"""Readers of annotated images, each giving `Sample` by `Sample`."""

from __future__ import annotations

from celltyper.datasets.dataset import Dataset
from celltyper.datasets.folder import read_folder
from celltyper.datasets.images import read_image, read_label_image
from celltyper.datasets.masks import read_masks
from celltyper.datasets.opening import READERS, open_dataset
from celltyper.datasets.resampling import resample
from celltyper.datasets.splitting import split_by_group
from celltyper.datasets.tiles import TileSampler
from celltyper.datasets.writing import write_folder

__all__ = [
    "READERS",
    "Dataset",
    "TileSampler",
    "open_dataset",
    "read_folder",
    "read_image",
    "read_label_image",
    "read_masks",
    "resample",
    "split_by_group",
    "write_folder",
]
