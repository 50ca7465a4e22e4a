"""Protocols of patch mode: one pass of the encoder, then a head for every run."""

from __future__ import annotations

import json
import logging
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from celltyper import __version__
from celltyper.atomic import atomic_path, write_json, write_text
from celltyper.classification.config import PatchConfig
from celltyper.classification.model import build_embedder
from celltyper.classification.preparing import (
    PatchParts,
    as_dataset,
    check_classes,
    counts_of,
    open_labelled,
    rows_of,
)
from celltyper.classification.training import (
    Embedded,
    check_network,
    check_targets,
    embed_data,
    fit_run,
    resolve_patches,
    type_rows,
)
from celltyper.config import dump_config
from celltyper.devices import pick_device
from celltyper.errors import DataError
from celltyper.library.files import CONFIG_FILE
from celltyper.patches.table import PatchTable
from celltyper.protocols.folder import (
    check_folder,
    claim_runs,
    entry_of,
    kept_failure,
    raise_failures,
    say_plan,
    splits_of,
    start_protocol,
)
from celltyper.protocols.plan import PlannedRun, plan_runs
from celltyper.protocols.protocol import FIXED, Protocol, variant_configs
from celltyper.protocols.scores import SCORES_FILE
from celltyper.runs import SPLIT_FILE

logger = logging.getLogger("celltyper")

_FORMAT = 1


class TypedPatches(NamedTuple):
    """What a run said of its test windows."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    domains: tuple[str, ...]
    labels: NDArray[np.intp]
    votes: NDArray[np.float64]
    """(n, K); rows of one expert alone are one-hot."""
    experts: NDArray[np.intp]
    probabilities: NDArray[np.float64]
    """(n, K)"""
    threshold: float


def run_patch_protocol(
    config: PatchConfig,
    protocol: Protocol,
    output: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    keep_going: bool = False,
    progress: bool = True,
) -> Path:
    """Train and test every run of a protocol in patch mode.

    All windows are read and all splits are made before the first run starts. The encoder sees
    every window once, whatever the number of folds, fractions, seeds and heads.

    Parameters
    ----------
    config : PatchConfig
        ``data.root`` must be set.
    protocol : Protocol
        From `celltyper.protocols.load_protocol`.
    output : str or Path
        Folder of the protocol: ``protocol.json`` and a run folder for every run, each with
        ``split.json`` and ``scores.npz`` beside what `train_patches` writes.
    device, resume, overwrite, keep_going, progress
        As in `celltyper.protocols.run_protocol`.

    Returns
    -------
    Path
        The folder, for `celltyper.protocols.report_protocol`.

    Raises
    ------
    ConfigError, DataError, CheckpointError
        For wrong input, before anything is written.
    RunError
        If runs failed with `keep_going`.
    """
    output = Path(output)
    place = pick_device(device)
    variants = variant_configs(protocol, config)
    table = open_labelled(config.data, progress=progress)
    whole, seeds = as_dataset(table, config.data), protocol.seeds or (config.seed,)
    runs = plan_runs(protocol, config.data, whole, counts_of(table), seeds, list(variants))
    for run in runs:
        parts = {"training": run.train, "validation": run.val}
        # a domain may lack a class; a fold that does has no score
        parts |= {"test": run.test} if protocol.folds else {}
        rows = {part: rows_of(table, names) for part, names in parts.items()}
        check_classes(table, rows, f"{table.path}, {run.path}")
        loss = variants[run.variant].loss
        check_targets(loss, table, rows["training"], f"{table.path}, {run.path}")
    resolved = {name: resolve_patches(own, table) for name, own in variants.items()}
    about = {
        "task": "patches",
        "celltyper": __version__,
        "protocol": protocol.model_dump(mode="json"),
        "variants": {name: own.model_dump(mode="json") for name, own in resolved.items()},
        "data": {"name": table.path.name, "patches": len(table), "groups": len(set(table.groups))},
        "classes": list(table.classes),
        "positive": next(iter(resolved.values())).data.positive,
        "runs": [entry_of(run) for run in runs],
    }
    check_folder(output, about, runs, whole, resolved, resume=resume, overwrite=overwrite)
    embedders = {}
    for own in resolved.values():
        if _view(own) not in embedders:
            embedders[_view(own)] = build_embedder(own, place)
        check_network(own, table, embedders[_view(own)])
    start_protocol(output, about, overwrite=overwrite)
    say_plan(runs, whole)
    todo = [run for run in runs if not (output / run.path / SCORES_FILE).is_file()]
    if len(todo) < len(runs):
        logger.info("%d of %d runs are finished", len(runs) - len(todo), len(runs))
    started = time.monotonic()
    failed: dict[str, Exception] = {}
    for view, embedder in embedders.items():
        same = [run for run in todo if _view(resolved[run.variant]) == view]
        if not same:
            continue
        data = embed_data(resolved[same[0].variant], table, embedder, progress=progress)
        bar = tqdm(same, desc="runs", unit="run", disable=None if progress else True)
        for run in claim_runs(same, output):
            with kept_failure(failed, run.path, keep_going=keep_going):
                _run(run, output, resolved[run.variant], data, progress=progress)
            bar.update()
        bar.close()
    raise_failures(failed, len(runs))
    logger.info("%d runs in %.0f s", len(todo), time.monotonic() - started)
    return output


def _view(config: PatchConfig) -> str:
    """What of a config decides embeddings, as one string."""
    values = config.model_dump(mode="json")
    data = {k: v for k, v in values["data"].items() if k not in FIXED}
    # what is trained of the encoder, a run adapts in a copy of its own
    own = {"adapt", "lora", "last_n", "layer_decay", "checkpointing"}
    encoder = {k: v for k, v in values["encoder"].items() if k not in own}
    kinds = config.head.by_gradient, config.head.name == "attention"
    return json.dumps([data, encoder, values["view"], kinds], sort_keys=True)


def _run(
    run: PlannedRun, output: Path, config: PatchConfig, data: Embedded, *, progress: bool
) -> None:
    """Train one model and keep what it says of the test windows; the scores come last."""
    folder, table = output / run.path, data.table
    write_json(folder / SPLIT_FILE, splits_of(run, config))
    split = config.data.model_copy(update={"split": (folder / SPLIT_FILE).absolute()})
    config = config.model_copy(update={"data": split})
    parts = PatchParts(rows_of(table, run.train), rows_of(table, run.val))
    # random weights of the encoder, which all runs share, are of the config's own seed
    write_text(folder / CONFIG_FILE, dump_config(config.model_copy(update={"seed": run.seed})))
    try:
        model = fit_run(
            config,
            data,
            parts,
            run.seed,
            folder,
            shared=True,
            resume=True,
            progress=progress,
            facts={"seed": run.seed},
        )
    except DataError as error:
        raise DataError(f"{run.path}: {error}") from None
    rows = rows_of(table, run.test)
    probabilities = type_rows(model, data, rows, progress=progress)
    write_typed(folder / SCORES_FILE, typed_patches(table, rows, probabilities, model.threshold))


def typed_patches(
    table: PatchTable,
    rows: NDArray[np.intp],
    probabilities: NDArray[np.float64],
    threshold: float,
) -> TypedPatches:
    """What a model said of some windows, with what is known of them."""
    return TypedPatches(
        names=tuple(table.names[i] for i in rows),
        groups=tuple(table.groups[i] for i in rows),
        domains=tuple(table.domains[i] for i in rows),
        labels=table.labels[rows],
        votes=table.votes[rows],
        experts=table.experts[rows],
        probabilities=probabilities,
        threshold=threshold,
    )


def write_typed(path: Path, typed: TypedPatches) -> None:
    """Write what a run said, atomically and without pickle."""
    values: dict[str, Any] = {k: np.asarray(v) for k, v in typed._asdict().items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, format=_FORMAT, **values)


def read_typed(path: Path) -> TypedPatches:
    """Read what `write_typed` wrote.

    Raises
    ------
    DataError
        If the file is damaged, or of another version of celltyper.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            values = dict(archive.items())
        if int(values.pop("format")) != _FORMAT:
            raise DataError(f"{path}: written by another version of celltyper; run it again")
        text: Sequence[str] = ("names", "groups", "domains")
        values |= {key: tuple(values[key].tolist()) for key in text}
        values["threshold"] = float(values["threshold"])
        return TypedPatches(**values)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged; delete it and go on with --resume") from error
