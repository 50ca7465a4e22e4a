"""Evaluations on disk: ``metrics.json``, tables as CSV, and the report."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from celltyper import __version__
from celltyper.atomic import make_folder, write_json, write_text
from celltyper.checkpoints import load_model
from celltyper.datasets import Dataset
from celltyper.datasets.resolution import check_mpp
from celltyper.devices import autocast, pick_device
from celltyper.errors import DataError
from celltyper.evaluation import (
    Estimate,
    Summary,
    TypedCells,
    evaluate,
    score_image,
    summarise,
)
from celltyper.index import INDEX_FILE, read_index
from celltyper.inference import read_predictions
from celltyper.labels import label_ids, mean_in_labels
from celltyper.library.files import RUN_FILE, model_folders
from celltyper.library.shelf import find_model, results_folder
from celltyper.metrics.calibration import (
    classwise_calibration_error,
    expected_calibration_error,
)
from celltyper.predict import predict_image
from celltyper.readers import open_dataset, open_parts
from celltyper.report.html import write_report
from celltyper.reporting import image_scores, make_report, notice_of, read_json
from celltyper.runs import METRICS_FILE, evaluation_folder
from celltyper.types import Prediction, Sample

REPORT_FILE = "report.html"

PER_CLASS = ("f1", "typed_f1", "typed_f1_iou", "pq", "count_r2")


def evaluate_run(
    run: str | Path,
    data: str | Path,
    output: str | Path | None = None,
    *,
    split: str | None = None,
    reader: str = "auto",
    taxonomy: str | Path | None = None,
    mpp: float | None = None,
    resamples: int = 1000,
    overwrite: bool = False,
    allow_seen: bool = False,
    device: str = "auto",
    batch_size: int | None = None,
    symmetries: int | None = None,
    precision: str | None = None,
    encoder_weights: str | None = None,
    allow_code: bool = False,
    progress: bool = True,
) -> tuple[Summary, Path]:
    """Predict annotated images with a model, score them and write the evaluation.

    Parameters
    ----------
    run : str or Path
        Run folder, checkpoint, or the folder of a protocol, whose models make an ensemble; or the
        name of a model, see `celltyper.library.shelf.find_model`.
    data : str or Path
        Annotated images.
    output : str or Path or None
        Folder to write; None is ``eval`` inside the run folder.
    split : str or None
        Only this split of the data: one that its ``meta.json`` names, or ``train`` or ``val`` as
        the run divided the same folder.
    reader, taxonomy
        How to read the data, see `celltyper.open_dataset`.
    mpp : float or None
        Micrometres per pixel; None takes what the data state.
    resamples : int
        Bootstrap resamples of the intervals.
    overwrite : bool
        Replace an earlier evaluation.
    allow_seen : bool
        Score images that the run was trained on as well.
    device, batch_size, symmetries, precision, encoder_weights, allow_code, progress
        See `celltyper.infer`.

    Returns
    -------
    tuple of Summary and Path
        The scores, and the folder with ``metrics.json``, ``per_class.csv``, ``per_image.csv`` and
        ``report.html``.

    Raises
    ------
    DataError, ConfigError, CheckpointError
        For wrong input, before anything is written.
    """
    run = find_model(run)
    check_mpp(mpp)
    folder = evaluation_folder(
        Path(output) if output else results_folder(run) / "eval", overwrite=overwrite
    )
    place = pick_device(device)
    if precision is not None:
        autocast(place, precision)
    facts = _facts(run) if run.is_dir() else {}
    dataset = _at(_open(data, split, facts, reader=reader, taxonomy=taxonomy), mpp)
    if not allow_seen:
        _check_unseen(dataset, facts)
    model = load_model(
        run,
        device=place,
        encoder_weights=encoder_weights,
        allow_code=allow_code,
    )
    _same_classes(model.classes, dataset)
    scores, predictions = [], []
    bar = tqdm(
        dataset,
        desc="eval",
        unit="image",
        disable=None if progress else True,
        dynamic_ncols=True,
    )
    for sample in bar:
        prediction = predict_image(
            model,
            sample.image,
            sample.mpp,
            batch_size=batch_size,
            symmetries=symmetries,
            precision=precision,
            name=sample.name,
        )
        scores.append(score_image(prediction, sample))
        # The report needs the labels only; probability maps of a cohort would fill the memory.
        predictions.append(replace(prediction, probabilities=prediction.probabilities[:, :0]))
    summary = summarise(scores, model.classes, resamples=resamples)
    write_evaluation(folder, summary, predictions, dataset, run=run)
    return summary, folder


def evaluate_predictions(
    pred: str | Path,
    ref: str | Path,
    output: str | Path | None = None,
    *,
    split: str | None = None,
    reader: str = "auto",
    taxonomy: str | Path | None = None,
    mpp: float | None = None,
    resamples: int = 1000,
    overwrite: bool = False,
) -> tuple[Summary, Path]:
    """Score predictions that are on disk.

    Parameters
    ----------
    pred : str or Path
        What `celltyper.infer` wrote, or any annotated-images folder with predicted labels (of
        another program, say); the latter has hard classes, so every pixel counts as certain.
    ref : str or Path
        Annotated images of the same names.
    output : str or Path or None
        Folder to write; None is `pred`.
    split, reader, taxonomy, mpp, resamples, overwrite
        See `evaluate_run`; the split is one that ``meta.json`` names.

    Returns
    -------
    tuple of Summary and Path

    Raises
    ------
    DataError, ConfigError
        For wrong input, before anything is written.
    """
    check_mpp(mpp)
    folder = evaluation_folder(Path(output) if output else Path(pred), overwrite=overwrite)
    dataset = _at(open_dataset(ref, split, reader, taxonomy), mpp)
    facts: dict[str, Any] = {}
    if (Path(pred) / INDEX_FILE).is_file():
        facts = read_index(pred)
        # cells without a name are scored by what they would be called
        predictions = [replace(each, threshold=0.0) for each in read_predictions(pred)]
    else:
        foreign = open_dataset(pred)
        predictions = [_certain(sample, foreign.classes) for sample in foreign]
    if not predictions:
        raise DataError(f"{pred} holds no predictions")
    _same_classes(predictions[0].classes, dataset)
    summary = evaluate(predictions, dataset, resamples=resamples)
    run = Path(facts["model"]) if "model" in facts else None
    write_evaluation(folder, summary, predictions, dataset, run=run)
    return summary, folder


def write_evaluation(
    folder: Path,
    summary: Summary,
    predictions: Sequence[Prediction],
    dataset: Dataset,
    *,
    run: Path | None = None,
) -> None:
    """Write ``metrics.json``, ``per_class.csv``, ``per_image.csv`` and ``report.html``.

    Parameters
    ----------
    folder : Path
    summary : Summary
    predictions : sequence of Prediction
    dataset : Dataset
        The annotated images.
    run : Path or None
        Run folder; its learning curve, config and facts go into the report.
    """
    make_folder(folder)
    write_json(folder / METRICS_FILE, metrics_json(summary, dataset))
    rows = [
        [name, *(_digits(row[key].value) for key in (*PER_CLASS, "reference", "predicted"))]
        for name, row in summary.per_class.items()
    ]
    _write_csv(folder / "per_class.csv", ["class", *PER_CLASS, "reference", "predicted"], rows)
    images = [
        [
            i.name,
            i.group,
            len(i.true),
            len(i.guess),
            *(f"{v:.6g}" for v in image_scores(i).values()),
        ]
        for i in summary.images
    ]
    scores = list(image_scores(summary.images[0]))
    _write_csv(
        folder / "per_image.csv", ["image", "group", "reference", "predicted", *scores], images
    )
    write_report(folder / REPORT_FILE, make_report(summary, predictions, dataset, run))


def metrics_json(summary: Summary, dataset: Dataset) -> dict[str, Any]:
    """Every score with its interval and rule, JSON-ready."""
    return {
        "celltyper": __version__,
        "data": {"name": dataset.name, "images": len(dataset), "notice": notice_of(dataset)},
        "classes": list(summary.classes),
        "intervals": f"95 %, bootstrap over {summary.clusters}",
        "scores": {
            name: {**_interval(estimate), "rule": summary.rules[name]}
            for name, estimate in summary.scores.items()
        },
        "per_class": {
            name: {key: _interval(e) for key, e in row.items()}
            for name, row in summary.per_class.items()
        },
        "expected_calibration_error": _known(summary.calibration_error),
        "calibration": _calibration_json(summary.typed),
        "confusion_reference_rule": summary.confusion.tolist(),
        "confusion_end_to_end": summary.pairs.tolist(),
    }


def _calibration_json(typed: TypedCells) -> dict[str, Any]:
    """Errors of the class probabilities, and names by coverage."""
    scaling = None if typed.calibration is None else typed.calibration.scaling
    sets = {"before": typed.raw} | ({} if scaling is None else {"after": typed.calibrated})
    return {
        "cells": len(typed),
        "scaling": None if scaling is None else asdict(scaling),
        **{
            name: {
                "expected_calibration_error": _known(expected_calibration_error(p, typed.truth)),
                "classwise_calibration_error": _known(classwise_calibration_error(p, typed.truth)),
            }
            for name, p in sets.items()
        },
        "by_coverage": [
            {key: _known(value) for key, value in each._asdict().items()}
            for each in typed.by_coverage()
        ],
    }


def summary_text(summary: Summary) -> str:
    """Scores as a table for a terminal of 80 columns.

    Parameters
    ----------
    summary : Summary

    Returns
    -------
    str
    """
    lines = ["score         value  95 % interval  rule"]
    for name, rule in summary.rules.items():
        lines += _wrapped(f"{name:12}  {_value(summary.scores[name])}  ", rule)
    width = max(len(c) for c in ("class", *summary.classes))
    lines += ["", f"{'class':{width}}  F1 (ref)  F_c (near)  F1 (IoU)     PQ  annotated  found"]
    for name, row in summary.per_class.items():
        f1, typed, iou, pq, ref, found = (
            row[k].value for k in ("f1", "typed_f1", "typed_f1_iou", "pq", "reference", "predicted")
        )
        lines.append(
            f"{name:{width}}  {_short(f1):>8}  {_short(typed):>10}  {_short(iou):>8}  "
            f"{_short(pq):>5}  {ref:>9.0f}  {found:>5.0f}"
        )
    lines.append(f"intervals: bootstrap over {summary.clusters}")
    lines += _calibration_text(summary.typed)
    return "\n".join(lines)


def _calibration_text(typed: TypedCells) -> list[str]:
    if typed.calibration is None or not len(typed):
        return []
    before, after = (
        expected_calibration_error(p, typed.truth) for p in (typed.raw, typed.calibrated)
    )
    (named,) = typed.by_coverage((0.9,))
    how = typed.calibration.scaling.text
    return [
        f"calibration: {how}, error {before:.3f} before, {after:.3f} after",
        f"--abstain 0.9: {named.coverage:.0%} of these have a name, {_short(named.accuracy)} right",
    ]


def _same_classes(classes: Sequence[str], dataset: Dataset) -> None:
    if tuple(classes) != dataset.classes:
        raise DataError(
            f"the predictions have classes {', '.join(classes)}, {dataset.path} has "
            f"{', '.join(dataset.classes)}: both must name the same in the same order "
            "(--taxonomy merges and renames classes)"
        )


def _facts(run: Path) -> dict[str, Any]:
    """What a run says of itself; of a protocol, which images any of its models was trained on."""
    if (run / RUN_FILE).is_file():
        return read_json(run / RUN_FILE)
    parts = [read_json(f / RUN_FILE).get("data", {}).get("train") for f in model_folders(run)]
    known = [part for part in parts if part]
    if not known:
        return {}
    group_of = {n: g for part in known for n, g in zip(part["names"], part["groups"], strict=True)}
    union = {"names": [*group_of], "groups": [*group_of.values()]}
    return {"data": {"train": known[0] | union}}


def _open(data: str | Path, split: str | None, facts: Mapping[str, Any], **reading: Any) -> Dataset:
    """Open annotated images, or the part of them that the run or the dataset calls `split`."""
    if split is None:
        return open_dataset(data, **reading)
    part = facts.get("data", {}).get(split)
    if part and Path(part["path"]) == Path(data).absolute():
        return open_parts(data, **reading)[0].subset(part["names"], f"{split} part of {data}")
    return open_dataset(data, split, **reading)


def _at(dataset: Dataset, mpp: float | None) -> Dataset:
    """Override the resolution of a dataset."""
    if mpp is None:
        return dataset
    return replace(dataset, mpp=mpp, read=lambda name: replace(dataset.read(name), mpp=mpp))


def _check_unseen(dataset: Dataset, facts: Mapping[str, Any]) -> None:
    """Refuse images, or patients, that the run was trained on."""
    part = facts.get("data", {}).get("train")
    if not part:
        return
    same = Path(part["path"]) == dataset.path.absolute()
    names = set(part["names"]) if same else set()
    # A group that is just the image's name says nothing about another folder.
    groups = {g for n, g in zip(part["names"], part["groups"], strict=True) if g != n}
    seen = [n for n in dataset.names if n in names or dataset.groups[n] in groups]
    if seen:
        raise DataError(
            f"{len(seen)} of {len(dataset)} images of {dataset.path} are of the training data or "
            f"its patients ({', '.join(seen[:5])}); pass --split to score others, or --allow-seen"
        )


def _certain(sample: Sample, classes: Sequence[str]) -> Prediction:
    """Labels of another program as a prediction that is certain of every pixel's class."""
    pixels = sample.phenotypes[sample.labels]
    probabilities = np.stack([pixels == k for k in range(len(classes) + 1)]).astype(np.float32)
    ids = label_ids(sample.labels)
    renumber = np.zeros(int(sample.labels.max(initial=0)) + 1, np.int32)
    renumber[ids] = np.arange(1, len(ids) + 1)
    return Prediction(
        labels=renumber[sample.labels],
        probabilities=probabilities,
        cell_probabilities=mean_in_labels(sample.labels, probabilities),
        classes=tuple(classes),
        mpp=sample.mpp,
        name=sample.name,
    )


def _interval(estimate: Estimate) -> dict[str, float | None]:
    return {key: _known(getattr(estimate, key)) for key in ("value", "low", "high")}


def _known(value: float) -> float | None:
    """JSON has no NaN: what could not be computed is null."""
    return value if math.isfinite(value) else None


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _value(estimate: Estimate) -> str:
    bounds = "" if math.isnan(estimate.low) else f"{estimate.low:.3f} to {estimate.high:.3f}"
    return f"{_short(estimate.value):>5}  {bounds:14}"


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(head + text, 80, subsequent_indent=" " * len(head))
