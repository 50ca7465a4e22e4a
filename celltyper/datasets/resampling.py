"""Resampling of a sample to another resolution."""

from __future__ import annotations

import logging

import numpy as np
from PIL import Image as PillowImage

from celltyper.datasets.dataset import listing
from celltyper.errors import DataError
from celltyper.labels import label_ids, resize_labels
from celltyper.types import Image, Sample

logger = logging.getLogger(__name__)


def resample(sample: Sample, mpp: float) -> Sample:
    """Bring a sample to a resolution.

    Parameters
    ----------
    sample : Sample
        Must state its mpp.
    mpp : float
        Micrometres per pixel wanted.

    Returns
    -------
    Sample
        Image by Lanczos with the support of the larger pixel (no aliasing), labels by
        `resize_labels`; ids stay. The new height and width are rounded, at least 1. A nucleus
        smaller than a pixel may lose it to another nucleus: such losses are logged as a warning
        with their ids.

    Raises
    ------
    DataError
        If the sample has no mpp.
    ValueError
        If `mpp` is not positive.
    """
    if sample.mpp is None:
        raise DataError(
            f"sample {sample.name!r}: micrometres per pixel unknown, so it cannot be brought to "
            f"{mpp}; state 'mpp' in meta.json"
        )
    if not mpp > 0:
        raise ValueError(f"mpp must be positive, got {mpp}")
    if sample.mpp == mpp:
        return sample
    height, width = sample.labels.shape
    shape = (
        max(1, round(height * sample.mpp / mpp)),
        max(1, round(width * sample.mpp / mpp)),
    )
    labels = resize_labels(sample.labels, shape)
    lost = np.setdiff1d(label_ids(sample.labels), label_ids(labels))
    phenotypes = sample.phenotypes[: int(labels.max(initial=0)) + 1].copy()
    phenotypes[lost[lost < len(phenotypes)]] = 0
    image = resize_image(sample.image, shape)
    if len(lost):
        logger.warning(
            "sample %r: %d nuclei are too small to be seen at %g µm per pixel and are lost "
            "(labels %s)",
            sample.name,
            len(lost),
            mpp,
            listing(lost),
        )
    return Sample(image, labels, phenotypes, sample.name, sample.group, mpp, sample.unannotated)


def resize_image(image: Image, shape: tuple[int, int]) -> Image:
    """Resize an image by Lanczos, antialiased when it shrinks.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB image.
    shape : (int, int)
        New height and width.

    Returns
    -------
    ndarray of uint8, shape (height, width, 3)
        Corners stay corners.
    """
    resized = PillowImage.fromarray(image).resize(
        (shape[1], shape[0]), PillowImage.Resampling.LANCZOS
    )
    return np.asarray(resized)
