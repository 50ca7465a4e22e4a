"""Counts of the images of many runs by cluster, so that all runs of an image are drawn together.

The scores are those of `celltyper.evaluation.summarise`. What differs is what is resampled: an
image that several runs predicted (one for every seed) is one cluster, or its blocks are, and the
images may be of several domains over which a score is averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.evaluation import (
    BLOCK_PX,
    MIN_GROUPS,
    ImageScores,
    sums_of_objects,
    values_of_images,
)
from celltyper.metrics.detection import detection_f1, typed_f1
from celltyper.metrics.ratios import mean_of_known, ratio
from celltyper.metrics.reference import class_f1, macro_f1
from celltyper.metrics.tallies import tally

Values = NDArray[np.float64]

HEADLINE = ("macro_f1", "detection_f1", "typed_f1", "bpq", "mpq", "aji")
"""Scores of the table, by their names in `celltyper.evaluation.SCORES`."""

PER_CLASS = ("typed_f1", "f1")
"""Scores of the table of classes, as in `celltyper.evaluation.Summary.per_class`."""


class Tested(NamedTuple):
    """A test image as one run predicted it."""

    image: ImageScores
    domain: int
    """Scores are averaged over domains 0, 1, ...; one domain pools all images."""


class Clusters(NamedTuple):
    """What is drawn for an interval."""

    keys: tuple[tuple[str, int], ...]
    """Of objects: (group, 0), or (image, block) where there are too few groups."""
    groups: tuple[str, ...]
    """Of images, for means over images."""
    blocks: bool

    @property
    def text(self) -> str:
        """Say it to the reader."""
        if not self.blocks:
            return f"{len(self.groups)} patients or fields"
        return (
            f"{len(self.keys)} blocks of {BLOCK_PX} px (fewer than {MIN_GROUPS} patients or "
            f"fields; bPQ, mPQ and AJI over the {len(self.groups)} patients or fields)"
        )


class Score(NamedTuple):
    """Counts by cluster and domain, and the score that their sum has."""

    counts: Values
    """Shape (clusters, domains, ...)."""
    statistic: Callable[[Values], Values]
    """Of one domain: (..., *counts) -> (...), or (..., K) for a score per class."""

    def of(self, sums: Values) -> Values:
        """Mean over domains, shape (..., domains, *counts) -> (...)."""
        return mean_of_known(self.statistic(sums))

    def of_class(self, number: int) -> Callable[[Values], Values]:
        """The same for one class of a score per class."""
        return lambda sums: mean_of_known(self.statistic(sums)[..., number])


def find_clusters(images: Sequence[ImageScores]) -> Clusters:
    """Patients or fields if there are at least eight, else blocks of the images.

    Parameters
    ----------
    images : sequence of ImageScores
        Of all runs, and of all variants that are compared.

    Returns
    -------
    Clusters
    """
    groups = tuple(sorted({i.group for i in images}))
    if len(groups) >= MIN_GROUPS:
        return Clusters(tuple((group, 0) for group in groups), groups, blocks=False)
    found = {
        (image.name, int(block))
        for image in images
        for block in np.concatenate([image.ref_block, image.pred_block])
    }
    return Clusters(tuple(sorted(found)), groups, blocks=True)


def pool(
    tested: Sequence[Tested], classes: int, clusters: Clusters
) -> tuple[dict[str, Score], dict[str, Score]]:
    """Counts of all scores.

    Parameters
    ----------
    tested : sequence of Tested
    classes : int
        Number K of phenotypes.
    clusters : Clusters
        Of these images, or of more.

    Returns
    -------
    headline : dict of str to Score
        By `HEADLINE`.
    per_class : dict of str to Score
        By `PER_CLASS`.
    """
    images, domain = [t.image for t in tested], np.array([t.domain for t in tested], np.int64)
    width = 1 + int(domain.max(initial=0))
    rows = [
        (ref * width + t.domain, pred * width + t.domain)
        for t, (ref, pred) in zip(tested, _rows(images, clusters), strict=True)
    ]
    sums = sums_of_objects(images, rows, len(clusters.keys) * width, classes)
    by_domain = {k: v.reshape(len(clusters.keys), width, *v.shape[1:]) for k, v in sums.items()}
    group = np.array([clusters.groups.index(i.group) for i in images], np.int64)
    means = {}
    for name, values in values_of_images(images, classes).items():
        if name in HEADLINE:
            known = ~np.isnan(values)
            means[name] = np.zeros((len(clusters.groups), width, 2))
            parts = np.stack([np.where(known, values, 0), known], axis=-1)
            tally(means[name], (group, domain), parts)
    near = by_domain["near"][:, :, 1:]
    headline = {
        "macro_f1": Score(by_domain["confusion"], macro_f1),
        "detection_f1": Score(by_domain["found"], detection_f1),
        "typed_f1": Score(near, lambda s: mean_of_known(typed_f1(s))),
        **{name: Score(v, lambda s: ratio(s[..., 0], s[..., 1])) for name, v in means.items()},
    }
    per_class = {"typed_f1": Score(near, typed_f1), "f1": Score(by_domain["confusion"], class_f1)}
    return headline, per_class


def _rows(
    images: Sequence[ImageScores], clusters: Clusters
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Cluster of every annotated nucleus and every predicted cell of every image."""
    row = {key: i for i, key in enumerate(clusters.keys)}
    for image in images:
        ref, pred = (
            np.array(
                [
                    row[(image.name, int(b)) if clusters.blocks else (image.group, 0)]
                    for b in blocks
                ],
                np.int64,
            )
            for blocks in (image.ref_block, image.pred_block)
        )
        yield ref, pred
