"""Scores of labels and phenotypes, with intervals."""

from __future__ import annotations

from celltyper.metrics.bootstrap import (
    Interval,
    PairedDifference,
    cluster_bootstrap,
    paired_bootstrap,
)
from celltyper.metrics.calibration import (
    ReliabilityTable,
    classwise_calibration_error,
    expected_calibration_error,
    reliability_table,
)
from celltyper.metrics.classification import PatchScores, agreement, score_patches
from celltyper.metrics.comparison import ScoredPatches, paired_difference
from celltyper.metrics.counts import count_moments, count_r2
from celltyper.metrics.detection import (
    HOVERNET_WEIGHTS,
    PLAIN_WEIGHTS,
    DetectionCounts,
    count_detections,
    detection,
    detection_f1,
    detection_iou,
    match_points,
    typed_f1,
)
from celltyper.metrics.jaccard import AggregatedJaccard, aggregated_jaccard, aji, aji_plus
from celltyper.metrics.matching import Matches, Overlap, iou_pairs, match_iou, overlap
from celltyper.metrics.panoptic import (
    MulticlassPanopticQuality,
    PanopticQuality,
    mpq_pannuke,
    mpq_plus,
    multiclass_panoptic_quality,
    multiclass_panoptic_quality_of,
    panoptic_quality,
    panoptic_quality_of,
    pq_of_counts,
)
from celltyper.metrics.ranking import (
    OperatingPoints,
    auroc,
    average_precision,
    choose_threshold,
    operating_points,
    sensitivity_at_specificity,
)
from celltyper.metrics.ratios import mean_of_known, ratio
from celltyper.metrics.reference import (
    ReferenceClasses,
    class_f1,
    confusion_matrix,
    macro_f1,
    reference_instance_classes,
)

__all__ = [
    "HOVERNET_WEIGHTS",
    "PLAIN_WEIGHTS",
    "AggregatedJaccard",
    "DetectionCounts",
    "Interval",
    "Matches",
    "MulticlassPanopticQuality",
    "OperatingPoints",
    "Overlap",
    "PairedDifference",
    "PanopticQuality",
    "PatchScores",
    "ReferenceClasses",
    "ReliabilityTable",
    "ScoredPatches",
    "aggregated_jaccard",
    "agreement",
    "aji",
    "aji_plus",
    "auroc",
    "average_precision",
    "choose_threshold",
    "class_f1",
    "classwise_calibration_error",
    "cluster_bootstrap",
    "confusion_matrix",
    "count_detections",
    "count_moments",
    "count_r2",
    "detection",
    "detection_f1",
    "detection_iou",
    "expected_calibration_error",
    "iou_pairs",
    "macro_f1",
    "match_iou",
    "match_points",
    "mean_of_known",
    "mpq_pannuke",
    "mpq_plus",
    "multiclass_panoptic_quality",
    "multiclass_panoptic_quality_of",
    "operating_points",
    "overlap",
    "paired_bootstrap",
    "paired_difference",
    "panoptic_quality",
    "panoptic_quality_of",
    "pq_of_counts",
    "ratio",
    "reference_instance_classes",
    "reliability_table",
    "score_patches",
    "sensitivity_at_specificity",
    "typed_f1",
]
