"""Detection and typing scores of predicted instances.

Instances are paired first, whatever their class: by the distance of their centroids (HoVer-Net's
rule) or by IoU. The same five sums per class then give HoVer-Net's F_c, which punishes a wrong
class twice, and the plain F1 per class. All sums add over images.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree

from celltyper.errors import ConfigError, DataError
from celltyper.labels import centroids, label_ids
from celltyper.metrics.assignment import best_pairing
from celltyper.metrics.matching import Matches, Overlap, match_iou, types_of
from celltyper.metrics.ratios import ratio
from celltyper.types import Labels

HOVERNET_WEIGHTS = (2.0, 2.0, 1.0, 1.0)
"""Weights of wrong class (predicted, missed) and of extra and missed instances in F_c."""

PLAIN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
"""Weights with which the score is the F1 of the class."""


class DetectionCounts(NamedTuple):
    """Sums of one image; add them over images, or stack them for the bootstrap."""

    found: NDArray[np.float64]
    """``tp, fp, fn`` whatever the class, shape (3,)."""
    typed: NDArray[np.float64]
    """Per class, shape (K, 5): pairs of two such (``tp``), pairs that only the prediction calls
    so (``fp_c``), pairs that only the reference calls so (``fn_c``), unpaired predicted
    (``fp_d``) and unpaired reference instances (``fn_d``) of the class."""


def match_points(
    reference: NDArray[np.float64], predicted: NDArray[np.float64], radius: float
) -> Matches:
    """Pair points one to one within a radius.

    As many pairs as possible are made, and among those pairings the one with the smallest sum of
    distances is taken. HoVer-Net's script solves the assignment over all points first and drops
    pairs beyond the radius afterwards, so that far points may cost near ones their partner; its
    number of pairs is never larger.

    Parameters
    ----------
    reference : ndarray of float64, shape (n, 2)
        Reference points, pixels.
    predicted : ndarray of float64, shape (m, 2)
        Predicted points, pixels.
    radius : float
        Largest distance of a pair in pixels, itself included.

    Returns
    -------
    Matches
        Rows of the paired points with their distances.

    Raises
    ------
    ConfigError
        If the radius is not positive.
    """
    if not radius > 0:
        raise ConfigError(f"match radius must be positive, got {radius} px")
    if not len(reference) or not len(predicted):
        nothing = np.empty(0, np.intp)
        return Matches(nothing, nothing, np.empty(0))
    # The tree's own cut-off rounds; ask for a little more and cut exactly.
    near = KDTree(reference).sparse_distance_matrix(
        KDTree(predicted), radius * (1 + 1e-9), output_type="ndarray"
    )
    near = near[near["v"] <= radius]
    ref, pred, distance = near["i"], near["j"], near["v"]
    # One pair more outweighs any saving in distance, which is at most one for each pair.
    gain = len(reference) + 1 + (1 - distance / radius)
    keep = best_pairing(ref, pred, gain)
    keep = keep[np.argsort(ref[keep], kind="stable")]
    return Matches(ref[keep], pred[keep], distance[keep])


def detection(
    reference: Labels,
    ref_types: NDArray[np.uint8],
    predicted: Labels,
    pred_types: NDArray[np.uint8],
    n_classes: int,
    *,
    radius: float,
) -> DetectionCounts:
    """Count detections by the distance of centroids (HoVer-Net's rule).

    Parameters
    ----------
    reference, predicted : ndarray of int32, shape (H, W)
        Instance labels, 0 is background.
    ref_types, pred_types : ndarray of uint8
        Class of every label id as lookup table; 0 is "no class".
    n_classes : int
        Number K of foreground classes.
    radius : float
        Largest distance of paired centroids in pixels: 12 at 0.25 micrometres per pixel, which
        is ``3.0 / mpp``.

    Returns
    -------
    DetectionCounts
        For `detection_f1` and `typed_f1`.

    Raises
    ------
    DataError
        If the images do not fit together, a table is too short or a class is above K.
    ConfigError
        If the radius is not positive.

    References
    ----------
    Graham et al., 2019, doi:10.1016/j.media.2019.101563
    """
    if reference.shape != predicted.shape:
        raise DataError(
            f"reference labels are {reference.shape}, predicted {predicted.shape}: "
            "both must have the same height and width"
        )
    true = types_of(label_ids(reference), ref_types, n_classes)
    guess = types_of(label_ids(predicted), pred_types, n_classes)
    pairs = match_points(centroids(reference), centroids(predicted), radius)
    return count_detections(true, guess, pairs, n_classes)


def detection_iou(
    table: Overlap,
    ref_types: NDArray[np.uint8],
    pred_types: NDArray[np.uint8],
    n_classes: int,
    *,
    threshold: float = 0.5,
) -> DetectionCounts:
    """Count detections by IoU, the threshold itself included.

    Parameters
    ----------
    table : Overlap
        From `celltyper.metrics.overlap`.
    ref_types, pred_types : ndarray of uint8
        Class of every label id as lookup table; 0 is "no class".
    n_classes : int
        Number K of foreground classes.
    threshold : float
        Smallest IoU of a pair.

    Returns
    -------
    DetectionCounts
        For `detection_f1` and, with `PLAIN_WEIGHTS`, `typed_f1`.

    Raises
    ------
    DataError
        If a table is too short or a class is above K.
    """
    true = types_of(table.ref_ids, ref_types, n_classes)
    guess = types_of(table.pred_ids, pred_types, n_classes)
    pairs = match_iou(table, threshold, inclusive=True)
    return count_detections(true, guess, pairs, n_classes)


def count_detections(
    true: NDArray[np.intp], guess: NDArray[np.intp], pairs: Matches, n_classes: int
) -> DetectionCounts:
    """Sum up paired and unpaired instances by class.

    Parameters
    ----------
    true, guess : ndarray of int, shapes (n,) and (m,)
        Class of every reference and predicted instance, 0 is "no class".
    pairs : Matches
        Rows of ``true`` and ``guess`` that belong together.
    n_classes : int
        Number K of foreground classes.

    Returns
    -------
    DetectionCounts
        An instance without class counts for detection; for the classes only its partner does.
    """
    size = n_classes + 1
    paired_true, paired_guess = true[pairs.ref], guess[pairs.pred]
    agree = paired_true == paired_guess
    tp = np.bincount(paired_true[agree], minlength=size)
    of_pairs = np.bincount(paired_guess, minlength=size), np.bincount(paired_true, minlength=size)
    extra = np.bincount(guess, minlength=size) - of_pairs[0]
    missed = np.bincount(true, minlength=size) - of_pairs[1]
    typed = np.stack([tp, of_pairs[0] - tp, of_pairs[1] - tp, extra, missed], axis=-1)[1:]
    matched = len(pairs.ref)
    found = np.array([matched, len(guess) - matched, len(true) - matched], np.float64)
    return DetectionCounts(found, typed.astype(np.float64))


def detection_f1(found: ArrayLike) -> NDArray[np.float64]:
    """Compute the detection F1 (F_d) from sums.

    Parameters
    ----------
    found : array_like, shape (..., 3)
        ``tp, fp, fn``.

    Returns
    -------
    ndarray of float64, shape (...)
        NaN where there is nothing to find and nothing was found.
    """
    found = np.asarray(found, np.float64)
    return ratio(2 * found[..., 0], 2 * found[..., 0] + found[..., 1] + found[..., 2])


def typed_f1(
    typed: ArrayLike, weights: tuple[float, float, float, float] = HOVERNET_WEIGHTS
) -> NDArray[np.float64]:
    """F1 of every class from sums.

    ``2 tp / (2 tp + w0 fp_c + w1 fn_c + w2 fp_d + w3 fn_d)``. The paper's TN_c (pairs that
    neither side gives the class) is 0, as in the published script, which looks only at pairs
    that one side gives the class.

    Parameters
    ----------
    typed : array_like, shape (..., K, 5)
        Sums of `DetectionCounts.typed`.
    weights : tuple of four float
        `HOVERNET_WEIGHTS` for F_c, `PLAIN_WEIGHTS` for the ordinary F1 of the class.

    Returns
    -------
    ndarray of float64, shape (..., K)
        NaN where neither side has the class.
    """
    typed = np.asarray(typed, np.float64)
    hits = 2 * typed[..., 0]
    return ratio(hits, hits + typed[..., 1:] @ np.asarray(weights, np.float64))
