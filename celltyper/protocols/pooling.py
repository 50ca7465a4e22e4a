"""Counts of the images of many runs by cluster, so that all runs of an image are drawn together.

The scores are those of `celltyper.evaluation.summarise`. What differs is what is resampled: an
image that several runs predicted (one for every seed) is one cluster, or its blocks are, and the
images may be of several domains over which a score is averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.evaluation import BLOCK_PX, MIN_GROUPS, ImageScores
from celltyper.metrics.detection import detection_f1, typed_f1
from celltyper.metrics.panoptic import mpq_pannuke, pq_of_counts
from celltyper.metrics.ratios import mean_of_known, ratio
from celltyper.metrics.reference import class_f1, macro_f1
from celltyper.metrics.tallies import Objects, tally, tally_found, tally_quality, tally_typed

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
    row = {key: i for i, key in enumerate(clusters.keys)}
    group_row = {group: i for i, group in enumerate(clusters.groups)}
    domains = 1 + max((t.domain for t in tested), default=0)
    n = len(row) * domains
    sums = {
        "confusion": np.zeros((n, classes + 1, classes + 1)),
        "near": np.zeros((n, classes + 1, 5)),
        "found": np.zeros((n, 3)),
    }
    means = {name: np.zeros((len(group_row), domains, 2)) for name in ("bpq", "mpq", "aji")}
    for image, domain in tested:
        ref, pred = (_rows(image, blocks, clusters, row) for blocks in _blocks(image))
        objects = Objects(image.true, image.guess, ref * domains + domain, pred * domains + domain)
        tally(sums["confusion"], (objects.ref_cluster, image.true, image.seen), 1)
        tally_typed(sums["near"], objects, image.near)
        tally_found(sums["found"], objects, image.near)
        for name, value in _of_image(image, classes).items():
            if not np.isnan(value):
                means[name][group_row[image.group], domain] += value, 1
    # A class that no image annotates has no score, not the score 0.
    nowhere = sorted(set.intersection(*(set(t.image.unannotated) for t in tested)))
    sums["near"][:, nowhere] = 0
    sums["confusion"][:, :, 0] += sums["confusion"][:, :, nowhere].sum(-1)
    sums["confusion"][:, :, nowhere] = 0
    by_domain = {k: v.reshape(len(row), domains, *v.shape[1:]) for k, v in sums.items()}
    near = by_domain["near"][:, :, 1:]
    headline = {
        "macro_f1": Score(by_domain["confusion"], macro_f1),
        "detection_f1": Score(by_domain["found"], detection_f1),
        "typed_f1": Score(near, lambda s: mean_of_known(typed_f1(s))),
        **{name: Score(v, lambda s: ratio(s[..., 0], s[..., 1])) for name, v in means.items()},
    }
    per_class = {"typed_f1": Score(near, typed_f1), "f1": Score(by_domain["confusion"], class_f1)}
    return headline, per_class


def _blocks(image: ImageScores) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return image.ref_block, image.pred_block


def _rows(
    image: ImageScores,
    blocks: NDArray[np.int64],
    clusters: Clusters,
    row: dict[tuple[str, int], int],
) -> NDArray[np.int64]:
    """Cluster of every object."""
    if not clusters.blocks:
        return np.full(len(blocks), row[image.group, 0], np.int64)
    return np.array([row[image.name, int(block)] for block in blocks], np.int64)


def _of_image(image: ImageScores, classes: int) -> dict[str, float]:
    """Scores that are averaged over images."""
    by_class, binary = np.zeros((1, classes + 1, 4)), np.zeros((1, 4))
    ref, pred = np.zeros(len(image.true), np.int64), np.zeros(len(image.guess), np.int64)
    objects = Objects(image.true, image.guess, ref, pred)
    tally_quality(by_class, binary, objects, image.strict)
    return {
        "bpq": float(pq_of_counts(binary[0])),
        "mpq": float(mpq_pannuke(by_class[0, 1:])),
        "aji": image.aji,
    }
