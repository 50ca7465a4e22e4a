"""A model of patch mode on annotated windows: ``celltyper eval``."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from celltyper.atomic import make_folder, write_json
from celltyper.classification.config import PatchData
from celltyper.classification.ensemble import (
    check_resolution_known,
    check_resolution_wanted,
    count_padded,
    load_models,
    mean_threshold,
    model_facts,
    thresholds_of,
)
from celltyper.classification.evaluation import (
    PatchEvaluation,
    metrics_json,
    score_domains,
    score_singles,
    score_windows,
)
from celltyper.classification.evaluation_page import evaluation_page
from celltyper.classification.model import PatchModel, ensemble_probabilities
from celltyper.classification.page import write_page
from celltyper.classification.preparing import rows_of
from celltyper.classification.seen import find_seen, training_part
from celltyper.classification.typed import typed_table, write_table
from celltyper.config import dump_config, one_line
from celltyper.datasets.resolution import check_mpp
from celltyper.devices import pick_device
from celltyper.errors import DataError
from celltyper.evaluation import COVERAGES, Selected, select
from celltyper.library.files import model_folders
from celltyper.library.shelf import find_model, results_folder
from celltyper.metrics.bootstrap import PairedDifference
from celltyper.metrics.comparison import ScoredPatches, paired_difference
from celltyper.metrics.confusion import call_classes
from celltyper.parts import read_splits
from celltyper.patches.checking import readable
from celltyper.patches.reading import open_patches
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import read_header
from celltyper.runs import METRICS_FILE, evaluation_folder

logger = logging.getLogger("celltyper")

PATCHES_FILE = "patches.csv"
REPORT_FILE = "report.html"

COMPARED = ("balanced_accuracy", "auroc", "f1")
"""Scores of a paired test."""


def evaluate_patches(
    run: str | Path,
    data: str | Path,
    output: str | Path | None = None,
    *,
    split: str | None = None,
    reader: str = "auto",
    images: str | Path | None = None,
    mpp: float | None = None,
    against: str | Path | None = None,
    resamples: int = 1000,
    overwrite: bool = False,
    allow_seen: bool = False,
    skip_bad: bool = False,
    device: str = "auto",
    batch_size: int | None = None,
    symmetries: int | None = None,
    encoder_weights: str | None = None,
    progress: bool = True,
) -> PatchEvaluation:
    """Type annotated windows with a model or an ensemble, score them and write the evaluation.

    Parameters
    ----------
    run : str or Path
        Run folder, or the folder of a protocol, whose models are scored together and each alone;
        or the name of a model, see `celltyper.library.shelf.find_model`.
    data : str or Path
        Annotated windows in any layout of `celltyper.patches.reading.open_patches`.
    output : str or Path or None
        Folder to write; None is ``eval`` inside the run folder.
    split : str or None
        Only this part: one that the data state, or as the run divided the same data.
    reader, images
        See `celltyper.patches.reading.open_patches`; of the data of training, as there.
    mpp : float or None
        Micrometres per pixel of the files; None takes what they say or, of the data of training,
        what was said there.
    against : str or Path or None
        Folder of another evaluation of the same windows, for a paired test.
    resamples : int
        Bootstrap resamples of the intervals; slides or patients are drawn.
    overwrite : bool
        Replace an earlier evaluation.
    allow_seen : bool
        Score windows that a model was trained on, or of their slides, as well.
    skip_bad : bool
        Go on without windows that cannot be read.
    device, batch_size, symmetries, encoder_weights, progress
        See `celltyper.classification.inference.infer_patches`.

    Returns
    -------
    PatchEvaluation
        Written as ``metrics.json``, ``patches.csv`` and ``report.html``.

    Raises
    ------
    DataError, ConfigError, CheckpointError
        For wrong input, before anything is written.
    """
    run, data = find_model(run), Path(data)
    check_mpp(mpp)
    folder = evaluation_folder(
        Path(output) if output else results_folder(run) / "eval", overwrite=overwrite
    )
    place = pick_device(device)
    models = load_models(run, place, encoder_weights, batch_size)
    first, runs = models[0], model_folders(run)
    check_resolution_wanted(first, mpp, run)
    other = None if against is None else _read_evaluation(Path(against), first.classes)
    bar = partial(tqdm, unit="patch", disable=None if progress else True)
    table = _open(data, first, runs, split, reader, images, mpp)
    seen = find_seen(table, runs, first.config.data, progress=partial(bar, desc="compare"))
    if seen.any() and not allow_seen:
        raise DataError(
            f"{seen.sum():,} of {len(table):,} windows of {data} trained {run}, by name, slide or "
            f"pixels (the first: {table.names[int(seen.argmax())]}); score others, perhaps with "
            "--split, or pass --allow-seen"
        )
    kept = readable(table, skip_bad=skip_bad, progress=partial(bar, desc="read"))
    table = _with_mpp_of_training(kept.table, data, first)
    check_resolution_known(first, table)
    over = count_padded(first, table)
    raw = ensemble_probabilities(
        models, table, symmetries=symmetries, progress=progress, calibrated=False
    )
    shares = np.stack([m.calibrated(own) for m, own in zip(models, raw, strict=True)])
    threshold = mean_threshold(models)
    facts = {
        **model_facts(run, models, symmetries),
        "device": str(place),
        "data": {
            "name": data.absolute().name,
            "path": str(data.absolute()),
            "split": split,
            "patches": len(table),
            "groups": len(set(table.groups)),
            "notice": _notice(data),
        },
        "against": None if against is None else str(Path(against).absolute()),
        "over_the_border": over,
        "seen_in_training": int(seen.sum()),
        "failed": [{"name": p.image, "error": p.note} for p in kept.bad],
    }
    of_all = table, shares.mean(axis=0), first.positive, threshold
    found = PatchEvaluation(
        folder=folder,
        table=table,
        shares=shares,
        by_coverage=_by_coverage(models, *of_all),
        uncalibrated=None if all(m.calibration is None for m in models) else raw.mean(axis=0),
        scores=score_windows(*of_all, resamples=resamples),
        domains=score_domains(*of_all, resamples=resamples),
        singles=score_singles(table, shares, first.positive, facts["thresholds"]),
        runs=tuple(path.name if path.is_dir() else path.parent.name for path in runs),
        facts=facts,
        config=dump_config(first.config),
    )
    if other is not None:
        found = replace(found, differences=_differences(found, other, resamples))
    _write(found)
    return found


def _by_coverage(
    models: Sequence[PatchModel],
    table: PatchTable,
    probabilities: NDArray[np.float64],
    positive: int,
    threshold: float,
) -> list[Selected]:
    """How often names are right where unsure windows are left without one."""
    thresholds = thresholds_of(models, COVERAGES)
    if thresholds is None:
        return []
    right = call_classes(probabilities, positive, threshold) == table.labels
    return select(probabilities.max(axis=1), right, thresholds)


def _open(
    data: Path,
    model: PatchModel,
    runs: Sequence[Path],
    split: str | None,
    reader: str,
    images: str | Path | None,
    mpp: float | None,
) -> PatchTable:
    """Open the annotated windows that are to be scored; those without a label are left out."""
    trained = model.config.data
    if _is_training_data(data, trained):
        reader = trained.reader if reader == "auto" else reader
        images = images or trained.images
    table = open_patches(data, classes=model.classes, reader=reader, images=images, mpp=mpp)
    if split is not None:
        table = _part_of(table, data, split, runs, trained)
    known = table.labels >= 0
    if not known.any():
        raise DataError(f"{table.path}: no window has a label; celltyper infer types them")
    if not known.all():
        logger.warning("%s: %d windows without a label are left out", table.path, (~known).sum())
        table = table.take(known)
    return table


def _is_training_data(data: Path, trained: PatchData) -> bool:
    return trained.root is not None and data.absolute() == trained.root.absolute()


def _part_of(
    table: PatchTable, data: Path, split: str, runs: Sequence[Path], trained: PatchData
) -> PatchTable:
    """Windows of a split: as a single run divided the same data, or as the data state it."""
    names: Sequence[str] = ()
    if len(runs) == 1 and _is_training_data(data, trained):
        names = training_part(runs[0], split).get("names", ())
        if not names and trained.split is not None and trained.split.is_file():
            names = read_splits(trained.split).get(split, ())
    if not names:
        return table.subset(split)
    missing = set(names) - set(table.names)
    if missing:
        raise DataError(
            f"{table.path}: {len(missing):,} windows of the part {split!r} are not there, such as "
            f"{min(missing)}: put the data of training back"
        )
    return table.take(rows_of(table, names))


def _with_mpp_of_training(table: PatchTable, data: Path, model: PatchModel) -> PatchTable:
    """State what training was told of the same files, if they say nothing themselves."""
    trained = model.config.data
    if table.mpp is not None or trained.mpp is None or not _is_training_data(data, trained):
        return table
    if any(read_header(file).mpp is not None for file in dict.fromkeys(table.files)):
        return table
    return replace(table, mpp=trained.mpp)


def _differences(
    found: PatchEvaluation, other: ScoredPatches, resamples: int
) -> dict[str, PairedDifference]:
    this = ScoredPatches(
        found.table.names, found.table.labels, found.mean, found.table.groups, found.threshold
    )
    positive = found.scores.positive
    differences = paired_difference(this, other, found.table.classes, positive, resamples=resamples)
    return {name: differences[name] for name in COMPARED}


def _read_evaluation(folder: Path, classes: Sequence[str]) -> ScoredPatches:
    """What another evaluation wrote of its windows, if it is of the same classes."""
    try:
        facts = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        with (folder / PATCHES_FILE).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if facts["classes"] != list(classes):
            raise DataError(
                f"{folder} has the classes {', '.join(facts['classes'])}, the model "
                f"{', '.join(classes)}: both must have the same in the same order"
            )
        return ScoredPatches(
            [row["name"] for row in rows],
            [classes.index(row["label"]) for row in rows],
            np.array([[float(row[f"p_{name}"]) for name in classes] for row in rows]),
            [row["group"] for row in rows],
            float(facts["threshold"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{folder} holds no evaluation of patches ({one_line(error)}); give a folder that "
            "'celltyper eval' wrote for a model of patches"
        ) from error


def _write(found: PatchEvaluation) -> None:
    """Write every file; without the metrics, which come last, the folder is not finished."""
    table, folder = found.table, found.folder
    page = evaluation_page(found)
    make_folder(folder)
    (folder / METRICS_FILE).unlink(missing_ok=True)
    columns: dict[str, Sequence[Any]] = {
        "group": table.groups,
        "domain": table.domains,
        "split": table.splits,
        "label": [table.classes[k] for k in table.labels],
    }
    if (table.experts > 1).any():
        columns["experts"] = table.experts.tolist()
        columns |= {f"votes_{n}": table.votes[:, k].tolist() for k, n in enumerate(table.classes)}
    typed = typed_table(table, found.shares, found.scores.positive, found.threshold, columns)
    write_table(folder / PATCHES_FILE, typed)
    write_page(folder / REPORT_FILE, page)
    write_json(folder / METRICS_FILE, metrics_json(found))


def _notice(data: Path) -> str:
    """What every reader must know of the data, as ``meta.json`` says in ``note``."""
    file = (data if data.is_dir() else data.parent) / "meta.json"
    if not file.is_file():
        return ""
    return str(json.loads(file.read_text(encoding="utf-8")).get("note", ""))
