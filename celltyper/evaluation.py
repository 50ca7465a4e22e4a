"""Scores of predicted cells against annotated ones: both F1s, panoptic quality, intervals.

Every image becomes a table of its objects (annotated nuclei with what the model said of them,
predicted cells that match none); every score is a ratio of sums over those objects, so that one
resampling of clusters gives the interval of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from celltyper.calibration import Calibration, class_probabilities
from celltyper.errors import DataError
from celltyper.labels import centroids
from celltyper.metrics.bootstrap import cluster_bootstrap
from celltyper.metrics.calibration import expected_calibration_error
from celltyper.metrics.counts import count_moments, count_r2
from celltyper.metrics.detection import (
    PLAIN_WEIGHTS,
    detection_f1,
    match_points,
    typed_f1,
)
from celltyper.metrics.jaccard import aggregated_jaccard
from celltyper.metrics.matching import Matches, match_iou, overlap, types_of
from celltyper.metrics.panoptic import mpq_pannuke, mpq_plus, pq_of_counts
from celltyper.metrics.ratios import mean_of_known, ratio
from celltyper.metrics.reference import class_f1, macro_f1, reference_instance_classes
from celltyper.metrics.tallies import (
    Objects,
    tally,
    tally_found,
    tally_pairs,
    tally_quality,
    tally_typed,
)
from celltyper.types import Prediction, Sample

Values = NDArray[np.float64]

RADIUS_UM = 3.0
"""Largest centroid distance of a detection, micrometres: HoVer-Net's 12 px at 0.25 mpp."""

RADIUS_PX = 12.0
"""The same in pixels, where the resolution is unknown."""

BLOCK_PX = 256
"""Side of the blocks that are resampled where there are too few patients or fields."""

COVERAGES = (0.95, 0.9, 0.8, 0.7)
"""Shares of the validation cells that keep a name; an evaluation says how many of these are right.
"""

MIN_GROUPS = 8
"""From this many patients or fields on, they are resampled, not blocks."""

SCORES: dict[str, str] = {
    "macro_f1": "reference instances: mean class probability in each annotated nucleus, argmax "
    "including background, F1 per class, unweighted mean (PathoCellBench)",
    "detection_f1": "end to end: centroids paired one to one within {radius} (HoVer-Net F_d)",
    "typed_f1": "end to end: F_c of HoVer-Net on the same pairs, unweighted mean over classes",
    "typed_f1_iou": "end to end: F1 per class, pairs at IoU >= 0.5, unweighted mean over classes",
    "bpq": "panoptic quality whatever the class, IoU > 0.5, mean over images",
    "mpq": "panoptic quality per class, mean over classes of each image, then images (PanNuke)",
    "bpq_plus": "panoptic quality whatever the class, sums pooled over images",
    "mpq_plus": "panoptic quality per class, sums pooled over images, mean over classes (CoNIC)",
    "aji": "aggregated Jaccard index, mean over images (Kumar 2017)",
    "count_r2": "R2 of cell counts per image and class, mean over classes (CoNIC)",
}
"""Every score of a dense evaluation, with the rule it is computed by; see `Summary.rules`."""


@dataclass(frozen=True)
class Estimate:
    """A score with its 95 % bootstrap interval; NaN where it cannot be computed."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True, eq=False)
class ImageScores:
    """The objects of one image and how they match; sums of these give every score.

    Parameters
    ----------
    name, group : str
        Of the sample.
    true, guess : ndarray of int
        Class of every annotated nucleus (n,) and predicted cell (m,), ids ascending; 0 unknown.
    seen : ndarray of int, shape (n,)
        Class 0..K that the probability map gives each annotated nucleus.
    confidence : ndarray of float32, shape (n, K + 1)
        Mean probabilities inside each annotated nucleus.
    near, strict, loose : Matches
        Pairs by centroid distance, by IoU > 0.5 and by IoU >= 0.5.
    ref_block, pred_block : ndarray of int
        Block of the image that each centroid lies in.
    aji : float
        Aggregated Jaccard index of the image.
    radius : str
        Largest distance of ``near`` pairs, with its unit.
    unannotated : tuple of int
        Classes that the annotation does not cover.
    raw : ndarray of float64, shape (m, K), or None
        Class probabilities of predicted cells before calibration; None if they were not kept.
    calibration : Calibration or None
        That of the model.
    """

    name: str
    group: str
    true: NDArray[np.intp]
    guess: NDArray[np.intp]
    seen: NDArray[np.intp]
    confidence: NDArray[np.float32]
    near: Matches
    strict: Matches
    loose: Matches
    ref_block: NDArray[np.int64]
    pred_block: NDArray[np.int64]
    aji: float
    radius: str
    unannotated: tuple[int, ...] = ()
    raw: Values | None = None
    calibration: Calibration | None = None


class Selected(NamedTuple):
    """Cells or windows that have a name with a threshold."""

    wanted: float
    """Share of the validation cells that the threshold was chosen for."""
    threshold: float
    coverage: float
    """Share of these cells that has a name."""
    accuracy: float
    """Share of the cells with a name whose name is right, NaN without any."""


def select(
    probability: Values, right: NDArray[np.bool_], thresholds: Mapping[float, float]
) -> list[Selected]:
    """How many cells have a name, and how often it is right, with each of some thresholds.

    Parameters
    ----------
    probability : ndarray of float64, shape (n,)
        Of the most probable class.
    right : ndarray of bool, shape (n,)
        Whether its name is right.
    thresholds : mapping of float to float
        By the share of the validation cells that they were chosen for.

    Returns
    -------
    list of Selected
        One a threshold.
    """
    found = []
    for wanted, threshold in thresholds.items():
        named = probability >= threshold
        share = float(ratio(named.sum(), len(named)))
        accuracy = float(ratio(right[named].sum(), named.sum()))
        found.append(Selected(wanted, threshold, share, accuracy))
    return found


@dataclass(frozen=True, eq=False)
class TypedCells:
    """Predicted cells at an annotated nucleus of known class, with their class probabilities.

    Parameters
    ----------
    truth : ndarray of int, shape (n,)
        Annotated class, from 0.
    raw : ndarray of float64, shape (n, K)
        Probabilities given that there is a cell, before calibration.
    calibration : Calibration or None
        That of the model.
    """

    truth: NDArray[np.intp]
    raw: Values
    calibration: Calibration | None = None

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def calibrated(self) -> Values:
        """Probabilities after calibration, or `raw` without one, shape (n, K)."""
        return self.raw if self.calibration is None else self.calibration.scaling.apply(self.raw)

    def by_coverage(self, coverages: Sequence[float] = COVERAGES) -> list[Selected]:
        """How often names are right if so many of the surest validation cells keep theirs."""
        if self.calibration is None or not len(self):
            return []
        found = self.calibrated
        thresholds = {c: self.calibration.threshold(c) for c in coverages}
        return select(found.max(axis=1), found.argmax(axis=1) == self.truth, thresholds)


@dataclass(frozen=True, eq=False)
class Summary:
    """Scores of a set of images.

    Parameters
    ----------
    classes : tuple of str
    scores : dict of str to Estimate
        By the names of `SCORES`.
    per_class : dict of str to dict of str to Estimate
        ``f1`` (reference rule), ``typed_f1``, ``typed_f1_iou``, ``pq`` (pooled), ``count_r2`` and
        the number of annotated (``reference``) and predicted (``predicted``) cells.
    confusion : ndarray of int, shape (K + 1, K + 1)
        Annotated nuclei (rows) by the class their probabilities give (columns), background first.
    pairs : ndarray of int, shape (K + 1, K + 1)
        End to end: annotated (rows) and predicted class of centroid pairs; row 0 are predicted
        cells without partner, column 0 annotated ones.
    clusters : str
        What was resampled for the intervals.
    calibration_error : float
        Expected calibration error of the class probabilities of `typed`.
    typed : TypedCells
        Predicted cells at annotated nuclei.
    images : list of ImageScores
    radius : str
        Largest distance of a detection, with its unit.
    """

    classes: tuple[str, ...]
    scores: dict[str, Estimate]
    per_class: dict[str, dict[str, Estimate]]
    confusion: NDArray[np.int64]
    pairs: NDArray[np.int64]
    clusters: str
    calibration_error: float
    typed: TypedCells
    images: list[ImageScores]
    radius: str

    @property
    def rules(self) -> dict[str, str]:
        """Rule of every score, as it was applied here."""
        return {name: rule.format(radius=self.radius) for name, rule in SCORES.items()}


def score_image(prediction: Prediction, sample: Sample) -> ImageScores:
    """Match the cells of one image with its annotated nuclei.

    Parameters
    ----------
    prediction : Prediction
    sample : Sample
        Of the same image. Predicted cells of classes that its annotation does not cover are left
        out where they match no nucleus: they may well be there.

    Returns
    -------
    ImageScores

    Raises
    ------
    DataError
        If the two are of different size, or a class is outside the prediction's list.
    """
    if prediction.labels.shape != sample.labels.shape:
        raise DataError(
            f"prediction of {sample.name!r} is {prediction.labels.shape}, its annotation "
            f"{sample.labels.shape}: predict the same image"
        )
    n_classes = len(prediction.classes)
    mpp = sample.mpp or prediction.mpp
    radius = RADIUS_UM / mpp if mpp else RADIUS_PX
    if sample.unannotated:
        prediction = _without_possible(prediction, sample, radius)
    table = overlap(sample.labels, prediction.labels)
    known = sample.known_phenotypes
    reference = reference_instance_classes(sample.labels, known, prediction.probabilities)
    centers = centroids(sample.labels), centroids(prediction.labels)
    width = -(-sample.labels.shape[1] // BLOCK_PX)
    blocks = [(c // BLOCK_PX).astype(np.int64) @ np.array([width, 1]) for c in centers]
    return ImageScores(
        name=sample.name,
        group=sample.group or sample.name,
        true=types_of(table.ref_ids, known, n_classes),
        guess=types_of(table.pred_ids, prediction.phenotypes, n_classes),
        seen=reference.predicted,
        confidence=reference.probabilities,
        near=match_points(*centers, radius),
        strict=match_iou(table),
        loose=match_iou(table, inclusive=True),
        ref_block=blocks[0],
        pred_block=blocks[1],
        aji=aggregated_jaccard(table).score,
        radius=f"{RADIUS_UM:g} um" if mpp else f"{RADIUS_PX:g} px (resolution unknown)",
        unannotated=sample.unannotated,
        raw=class_probabilities(prediction.cell_probabilities),
        calibration=prediction.calibration,
    )


def typed_cells(images: Sequence[ImageScores], n_classes: int) -> TypedCells:
    """Predicted cells whose centroid lies at an annotated nucleus of known class.

    Parameters
    ----------
    images : sequence of ImageScores
        Those without class probabilities are passed over.
    n_classes : int
        Number K of phenotypes.

    Returns
    -------
    TypedCells
        Without calibration if it is not the same for all, as of several runs.
    """
    truth, raw = [np.zeros(0, np.intp)], [np.zeros((0, n_classes))]
    for image in images:
        if image.raw is None:
            continue
        known = image.true[image.near.ref] > 0
        truth.append(image.true[image.near.ref][known] - 1)
        raw.append(image.raw[image.near.pred][known])
    every = [image.calibration for image in images]
    calibration = every[0] if every and all(each == every[0] for each in every) else None
    return TypedCells(np.concatenate(truth), np.concatenate(raw), calibration)


def _without_possible(prediction: Prediction, sample: Sample, radius: float) -> Prediction:
    """Leave out cells of unannotated classes that match no nucleus by distance or overlap."""
    table = overlap(sample.labels, prediction.labels)
    near = match_points(centroids(sample.labels), centroids(prediction.labels), radius)
    gone = np.isin(prediction.phenotypes, sample.unannotated)
    for matched in (near.pred, match_iou(table, inclusive=True).pred):
        gone[table.pred_ids[matched]] = False
    kept = ~gone[1:]
    new = np.concatenate([[0], np.cumsum(kept) * kept]).astype(np.int32)
    return replace(
        prediction,
        labels=new[prediction.labels],
        cell_probabilities=prediction.cell_probabilities[kept],
    )


def summarise(
    images: Sequence[ImageScores],
    classes: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Summary:
    """Scores over images, each with a 95 % interval from a clustered bootstrap.

    Patients or fields are resampled where there are at least eight, else blocks of 256 px; for
    means over images, and for the counts per image, it is always patients or fields (but blocks
    for bPQ and mPQ of a single image).

    Parameters
    ----------
    images : sequence of ImageScores
        From `score_image`.
    classes : sequence of str
        The K phenotypes.
    resamples : int
        Bootstrap resamples; 0 leaves the intervals out.
    seed : int
        Of the resampling.

    Returns
    -------
    Summary
    """
    clusters, text = _clusters(images)
    n = 1 + max((int(c.max(initial=0)) for pair in clusters for c in pair), default=0)
    k = len(classes)
    sums = sums_of_objects(images, clusters, n, k)
    pairs = np.zeros((k + 1, k + 1), np.int64)
    for image, rows in zip(images, clusters, strict=True):
        tally_pairs(pairs, Objects(image.true, image.guess, *rows), image.near)

    def estimate(counts: Values, statistic: Callable[[Values], Values]) -> Estimate:
        value = float(statistic(counts.sum(0)))
        if not resamples or len(counts) < 2:
            return Estimate(value)
        interval = cluster_bootstrap(counts, statistic, n=resamples, seed=seed)
        return Estimate(value, float(interval.low), float(interval.high))

    per_image = values_of_images(images, k)
    groups, by_image = np.unique([i.group for i in images], return_inverse=True)
    moments = np.zeros((len(groups), k, 4))
    tally(moments, by_image, per_image["moments"])

    def of_class(counts: Values, score: Callable[[Values], Values], c: int) -> Estimate:
        return estimate(counts, lambda s: score(s)[..., c])

    def image_mean(values: Values) -> Estimate:
        known = ~np.isnan(values)
        parts = np.stack([np.where(known, values, 0), known], axis=-1)
        counts = np.zeros((len(groups), 2))
        tally(counts, by_image, parts)
        return estimate(counts, lambda s: ratio(s[..., 0], s[..., 1]))

    near, loose, quality = (sums[key][:, 1:] for key in ("near", "loose", "class_pq"))
    one = len(images) == 1
    scores = {
        "macro_f1": estimate(sums["confusion"], macro_f1),
        "detection_f1": estimate(sums["found"], detection_f1),
        "typed_f1": estimate(near, lambda s: mean_of_known(typed_f1(s))),
        "typed_f1_iou": estimate(loose, lambda s: mean_of_known(_plain_f1(s))),
        "bpq": estimate(sums["pq"], pq_of_counts) if one else image_mean(per_image["bpq"]),
        "mpq": estimate(quality, mpq_pannuke) if one else image_mean(per_image["mpq"]),
        "bpq_plus": estimate(sums["pq"], pq_of_counts),
        "mpq_plus": estimate(quality, mpq_plus),
        "aji": image_mean(per_image["aji"]),
        "count_r2": estimate(moments, lambda s: mean_of_known(count_r2(s))),
    }
    per_class = {
        name: {
            "f1": of_class(sums["confusion"], class_f1, c),
            "typed_f1": of_class(near, typed_f1, c),
            "typed_f1_iou": of_class(loose, _plain_f1, c),
            "pq": of_class(quality, pq_of_counts, c),
            "count_r2": of_class(moments, count_r2, c),
            "reference": Estimate(float(sum((i.true == c + 1).sum() for i in images))),
            "predicted": Estimate(float(sum((i.guess == c + 1).sum() for i in images))),
        }
        for c, name in enumerate(classes)
    }
    typed = typed_cells(images, k)
    return Summary(
        classes=tuple(classes),
        scores=scores,
        per_class=per_class,
        confusion=sums["confusion"].sum(0).astype(np.int64),
        pairs=pairs,
        clusters=text,
        calibration_error=expected_calibration_error(typed.calibrated, typed.truth),
        typed=typed,
        images=list(images),
        radius=" or ".join(sorted({i.radius for i in images})),
    )


def evaluate(
    predictions: Iterable[Prediction],
    references: Iterable[Sample],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Summary:
    """Score predictions against annotated images of the same names.

    Parameters
    ----------
    predictions : iterable of Prediction
    references : iterable of Sample
        Such as a `celltyper.datasets.Dataset`.
    resamples, seed
        See `summarise`.

    Returns
    -------
    Summary

    Raises
    ------
    DataError
        If there is nothing to score, a reference has no prediction, two predictions have the
        same name, or their classes differ.
    """
    by_name: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.name in by_name:
            raise DataError(f"two predictions for image {prediction.name!r}: keep one")
        by_name[prediction.name] = prediction
    lists = {prediction.classes for prediction in by_name.values()}
    if len(lists) > 1:
        raise DataError(f"predictions have different classes: {' and '.join(map(str, lists))}")
    scores = []
    for sample in references:
        if sample.name not in by_name:
            known = ", ".join(sorted(by_name)[:5]) or "none"
            raise DataError(f"no prediction for image {sample.name!r} (there are: {known})")
        scores.append(score_image(by_name[sample.name], sample))
    if not scores:
        raise DataError("nothing to evaluate: there are no annotated images")
    classes = next(iter(by_name.values())).classes
    return summarise(scores, classes, resamples=resamples, seed=seed)


def _clusters(
    images: Sequence[ImageScores],
) -> tuple[list[tuple[NDArray[np.int64], NDArray[np.int64]]], str]:
    """Cluster of every object of every image, and what the clusters are."""
    groups = sorted({i.group for i in images})
    if len(groups) >= MIN_GROUPS:
        rows = [groups.index(i.group) for i in images]
        return [
            (np.full(len(i.true), r), np.full(len(i.guess), r))
            for i, r in zip(images, rows, strict=True)
        ], f"{len(groups)} patients or fields"
    clusters, used = [], 0
    for image in images:
        blocks, flat = np.unique(
            np.concatenate([image.ref_block, image.pred_block]), return_inverse=True
        )
        split = len(image.ref_block)
        clusters.append((flat[:split] + used, flat[split:] + used))
        used += len(blocks)
    return clusters, f"{used} blocks of {BLOCK_PX} px (fewer than {MIN_GROUPS} patients or fields)"


def sums_of_objects(
    images: Sequence[ImageScores],
    clusters: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    n_clusters: int,
    n_classes: int,
) -> dict[str, Values]:
    """Sums of every cluster that the scores over all objects are made of.

    Parameters
    ----------
    images : sequence of ImageScores
    clusters : sequence of (ndarray, ndarray)
        For every image the cluster of its annotated nuclei (n,) and of its predicted cells (m,).
    n_clusters, n_classes : int
        Numbers N of clusters and K of phenotypes.

    Returns
    -------
    dict of str to ndarray of float64
        ``confusion`` (N, K + 1, K + 1); ``near`` and ``loose`` (N, K + 1, 5), ``found`` (N, 3),
        ``class_pq`` (N, K + 1, 4) and ``pq`` (N, 4), see `celltyper.metrics.tallies`. A class
        that no image annotates has no counts, and so no score rather than the score 0.
    """
    n, k = n_clusters, n_classes
    sums = {
        "confusion": np.zeros((n, k + 1, k + 1)),
        "near": np.zeros((n, k + 1, 5)),
        "loose": np.zeros((n, k + 1, 5)),
        "found": np.zeros((n, 3)),
        "class_pq": np.zeros((n, k + 1, 4)),
        "pq": np.zeros((n, 4)),
    }
    for image, (ref, pred) in zip(images, clusters, strict=True):
        objects = Objects(image.true, image.guess, ref, pred)
        tally(sums["confusion"], (ref, image.true, image.seen), 1)
        tally_typed(sums["near"], objects, image.near)
        tally_typed(sums["loose"], objects, image.loose)
        tally_found(sums["found"], objects, image.near)
        tally_quality(sums["class_pq"], sums["pq"], objects, image.strict)
    nowhere = sorted(set.intersection(*(set(i.unannotated) for i in images))) if images else []
    for kind in ("near", "loose", "class_pq"):
        sums[kind][:, nowhere] = 0
    sums["confusion"][:, :, 0] += sums["confusion"][:, :, nowhere].sum(-1)
    sums["confusion"][:, :, nowhere] = 0
    return sums


def values_of_images(images: Sequence[ImageScores], n_classes: int) -> dict[str, Values]:
    """Scores that are averaged over images.

    Parameters
    ----------
    images : sequence of ImageScores
        N of them.
    n_classes : int
        Number K of phenotypes.

    Returns
    -------
    dict of str to ndarray of float64
        ``bpq``, ``mpq`` and ``aji`` (N,), NaN where an image has no score; ``moments``
        (N, K, 4), see `celltyper.metrics.counts.count_moments`.
    """
    bpq, mpq, moments = [], [], []
    for image in images:
        by_class, binary = np.zeros((1, n_classes + 1, 4)), np.zeros((1, 4))
        ref, pred = np.zeros(len(image.true), np.int64), np.zeros(len(image.guess), np.int64)
        objects = Objects(image.true, image.guess, ref, pred)
        tally_quality(by_class, binary, objects, image.strict)
        bpq.append(float(pq_of_counts(binary[0])))
        mpq.append(float(mpq_pannuke(by_class[0, 1:])))
        counts = [np.bincount(c, minlength=n_classes + 1)[1:] for c in (image.true, image.guess)]
        row = count_moments(*counts)
        row[[k - 1 for k in image.unannotated]] = 0
        moments.append(row)
    return {
        "bpq": np.array(bpq),
        "mpq": np.array(mpq),
        "aji": np.array([i.aji for i in images]),
        "moments": np.array(moments).reshape(-1, n_classes, 4),
    }


def _plain_f1(typed: Values) -> Values:
    return typed_f1(typed, PLAIN_WEIGHTS)
