"""What the report of an evaluation shows, gathered from scores, predictions and the run."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper import __version__
from celltyper.cells.colors import default_colors
from celltyper.datasets import Dataset
from celltyper.datasets.dataset import listing
from celltyper.evaluation import Estimate, ImageScores, Summary, summarise
from celltyper.library.cards import card_line
from celltyper.library.files import CONFIG_FILE, RUN_FILE
from celltyper.metrics.calibration import expected_calibration_error, reliability_table
from celltyper.report.coverage import coverage_table
from celltyper.report.data import Metric, Reliability, Report, ReportImage, Table
from celltyper.runs import HISTORY_FILE
from celltyper.types import Prediction, Sample

SHOWN_IMAGES = 12
"""The worst images, by bPQ, that a report shows."""


def make_report(
    summary: Summary, predictions: Sequence[Prediction], dataset: Dataset, run: Path | None
) -> Report:
    """Collect what the report shows.

    Parameters
    ----------
    summary : Summary
    predictions : sequence of Prediction
    dataset : Dataset
    run : Path or None
        Run folder, if there is one.

    Returns
    -------
    Report
    """
    by_name = {p.name: p for p in predictions}
    worst = sorted(summary.images, key=lambda i: image_scores(i)["bpq"])[:SHOWN_IMAGES]
    colors = predictions[0].colors or dataset.colors or default_colors(summary.classes)
    typed = summary.typed
    selected = typed.by_coverage()
    facts = read_json(run / RUN_FILE) if run else {}
    return Report(
        title=f"celltyper evaluation: {dataset.name}",
        classes=summary.classes,
        colors=colors,
        notice=notice_of(dataset),
        warnings=[*_warnings(summary), *_far(predictions)],
        metrics=[_metric(name, summary.scores[name], rule) for name, rule in summary.rules.items()],
        interval=f"95 % interval, bootstrap over {summary.clusters}",
        tables={"Names by coverage": coverage_table(selected)} if selected else {},
        per_class=_class_table(summary),
        confusion=summary.pairs,
        confusion_rule=f"Cells and annotated nuclei paired by centroid within {summary.radius}.",
        reliability=_reliability(typed.calibrated, typed.truth),
        uncalibrated=_reliability(typed.raw, typed.truth) if typed.calibration else None,
        history=_history(run / HISTORY_FILE) if run else {},
        images=[_report_image(dataset[i.name], by_name[i.name], i) for i in worst],
        worst_by="bPQ",
        facts=_facts_text(facts, dataset, card_line(run) if run else None),
        config=(run / CONFIG_FILE).read_text("utf-8")
        if run and (run / CONFIG_FILE).is_file()
        else "",
    )


def notice_of(dataset: Dataset) -> str:
    """Read from ``meta.json`` what every reader must know (``note``); may be empty."""
    return str(read_json(dataset.path / "meta.json").get("note", ""))


def image_scores(image: ImageScores) -> dict[str, float]:
    """Scores of one image for the table and the order of the report."""
    classes = [str(k) for k in range(1, image.confidence.shape[1])]
    one = summarise([image], classes, resamples=0).scores
    return {name: one[name].value for name in ("macro_f1", "detection_f1", "bpq", "mpq", "aji")}


def _metric(name: str, estimate: Estimate, rule: str = "") -> Metric:
    return Metric(name, estimate.value, estimate.low, estimate.high, rule)


def _class_table(summary: Summary) -> Table:
    columns = {
        "f1": "F1 (reference)",
        "typed_f1": "F_c (centroids)",
        "typed_f1_iou": "F1 (IoU ≥ 0.5)",
        "pq": "PQ",
        "count_r2": "count R2",
    }
    rows: list[list[Any]] = []
    for name, row in summary.per_class.items():
        cells = [_metric(columns[key], row[key]) for key in columns]
        counts = [int(row[key].value) for key in ("reference", "predicted")]
        rows.append([name, *cells, *counts])
    return Table(["class", *columns.values(), "annotated", "predicted"], rows)


def _reliability(probabilities: NDArray[np.float64], truth: NDArray[np.intp]) -> Reliability | None:
    if not len(truth):
        return None
    table = reliability_table(probabilities, truth)
    return Reliability(
        table.confidence,
        table.accuracy,
        table.cells,
        expected_calibration_error(probabilities, truth),
        "Cells found at an annotated nucleus, largest class probability against being right.",
    )


def _report_image(sample: Sample, prediction: Prediction, scores: ImageScores) -> ReportImage:
    values = image_scores(scores)
    return ReportImage(
        name=sample.name,
        image=sample.image,
        labels=prediction.labels,
        phenotypes=prediction.phenotypes,
        ref_labels=sample.labels,
        ref_phenotypes=sample.known_phenotypes,
        scores={"bPQ": values["bpq"], "macro F1": values["macro_f1"]},
        mpp=prediction.mpp,
    )


def _warnings(summary: Summary) -> list[str]:
    absent = [n for n, row in summary.per_class.items() if not row["reference"].value]
    found = []
    if absent:
        found.append(f"not annotated in these images: {', '.join(absent)}")
    if "blocks" in summary.clusters:
        found.append(
            f"intervals resample {summary.clusters}; they say how sure the figures are for these "
            "images, not for other patients"
        )
    return found


def _far(predictions: Sequence[Prediction]) -> list[str]:
    """Images unlike those of training, in one line."""
    far = [p.name for p in predictions if p.distance is not None and p.distance.is_far]
    if not far:
        return []
    return [
        f"{len(far)} of {len(predictions)} images are unlike the training images (median tile "
        f"farther than 95 % of the validation tiles): {listing(far)}"
    ]


def _facts_text(facts: Mapping[str, Any], dataset: Dataset, card: str | None) -> dict[str, str]:
    shown: dict[str, str] = {"evaluated on": f"{dataset.name}, {len(dataset)} images"}
    if card:
        shown["model card"] = card
    shown["celltyper"] = __version__
    for key in ("device", "torch", "python", "seed", "steps", "best_step", "seconds"):
        if key in facts:
            shown[key.replace("_", " ")] = str(facts[key])
    if "parameters" in facts:
        shown["parameters"] = f"{facts['parameters']:,} ({facts['trainable_parameters']:,} trained)"
    if "trainability" in facts:
        kept = facts["trainability"]
        shown["trainability"] = (
            f"{kept['adapt']}, checked by hashes: changed {', '.join(kept['changed'])}; "
            f"unchanged {', '.join(kept['unchanged']) or 'none'}"
        )
    for part, data in facts.get("data", {}).items():
        cells = ", ".join(f"{n} {count}" for n, count in data["cells"].items())
        shown[f"{part} data"] = f"{data['images']} images, cells: {cells}"
    return shown


def _history(path: Path) -> dict[str, list[float | None]]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = ("step", "loss", "macro_f1", "detection_f1", "bpq")
    return {key: [float(row[key]) for row in rows] for key in shown if rows and key in rows[0]}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file, or nothing where there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
