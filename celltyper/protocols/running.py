"""Running a protocol: every run in turn, resumably, each scored on its test images."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from tqdm import tqdm

from celltyper import __version__
from celltyper.atomic import make_folder, write_json
from celltyper.checkpoints import load_model
from celltyper.config import Config
from celltyper.datasets import Dataset
from celltyper.datasets.splitting import class_counts
from celltyper.evaluation import score_image, summarise
from celltyper.library.files import CONFIG_FILE, RUN_FILE
from celltyper.models import build_model
from celltyper.parts import Parts, open_whole
from celltyper.predict import predict_image
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
from celltyper.protocols.protocol import Protocol, variant_configs
from celltyper.protocols.scores import SCORES_FILE, write_scores
from celltyper.reporting import notice_of
from celltyper.runs import SPLIT_FILE
from celltyper.training import (
    check_room,
    check_settings,
    check_stopping,
    feature_cache,
    resolve,
    train,
)

logger = logging.getLogger("celltyper")


@dataclass(frozen=True)
class Seen:
    """What one pass over the images found, by sample name."""

    counts: dict[str, NDArray[np.int64]]
    mpp: dict[str, float | None]
    shape: dict[str, tuple[int, int]]


def run_protocol(
    config: Config,
    protocol: Protocol,
    output: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    keep_going: bool = False,
    progress: bool = True,
) -> Path:
    """Train and test every run of a protocol.

    Everything is checked before the first run starts: all images are read once, all splits are
    made, and the model of every variant is built.

    Parameters
    ----------
    config : Config
        ``data.root`` must be set.
    protocol : Protocol
        From `celltyper.protocols.load_protocol`.
    output : str or Path
        Folder of the protocol: ``protocol.json`` and a run folder for every run, each with
        ``split.json`` and ``scores.npz`` beside what `celltyper.train` writes.
    device : str
        See `celltyper.devices.pick_device`.
    resume : bool
        Go on with the same protocol: finished runs stay, an unfinished one goes on exactly.
    overwrite : bool
        Start over; runs of the protocol that is there are deleted.
    keep_going : bool
        Do the other runs where one fails, and raise its error at the end.
    progress : bool
        Show progress bars on a terminal.

    Returns
    -------
    Path
        The folder, for `celltyper.protocols.report_protocol`.

    Raises
    ------
    ConfigError, DataError, CheckpointError
        For wrong input, before anything is written.
    TrainingError
        As `celltyper.train`; `resume` goes on from there.
    RunError
        If runs failed with `keep_going`.
    """
    output = Path(output)
    variants = variant_configs(protocol, config)
    for variant in variants.values():
        place = check_settings(variant, device)
    whole = open_whole(config.data)
    seen = look_at(whole, progress)
    seeds = protocol.seeds or (config.seed,)
    runs = plan_runs(protocol, config.data, whole, seen.counts, seeds, list(variants))
    resolved = {
        name: _check_variant(variant, [r for r in runs if r.variant == name], whole, seen)
        for name, variant in variants.items()
    }
    about = {
        "celltyper": __version__,
        "protocol": protocol.model_dump(mode="json"),
        "variants": {name: c.model_dump(mode="json") for name, c in resolved.items()},
        "data": {"name": whole.name, "images": len(whole), "notice": notice_of(whole)},
        "classes": list(whole.classes),
        "colors": list(whole.colors),
        "runs": [entry_of(run) for run in runs],
    }
    state = PartialState(cpu=place.type == "cpu")
    check_folder(output, about, runs, whole, resolved, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()
    if state.is_main_process:
        start_protocol(output, about, overwrite=overwrite)
    say_plan(runs, whole)
    state.wait_for_everyone()
    started = time.monotonic()
    todo = [run for run in runs if not (output / run.path / SCORES_FILE).is_file()]
    if len(todo) < len(runs):
        logger.info("%d of %d runs are finished", len(runs) - len(todo), len(runs))
    # processes of one distributed training work on the same run
    mine = claim_runs(todo, output) if state.num_processes == 1 else todo
    failed: dict[str, Exception] = {}
    for done, run in enumerate(mine):
        left = (time.monotonic() - started) / done * (len(todo) - done) / 60 if done else 0.0
        hint = f", about {left:.0f} min left" if left >= 1 else ""
        logger.info("run %d/%d: %s%s", runs.index(run) + 1, len(runs), run.path, hint)
        with kept_failure(failed, run.path, keep_going=keep_going):
            _run(run, output, resolved[run.variant], whole, place, progress, state)
    raise_failures(failed, len(runs))
    return output


def look_at(whole: Dataset, progress: bool) -> Seen:
    """Read every image once: its classes, resolution and size.

    Parameters
    ----------
    whole : Dataset
        From `celltyper.parts.open_whole`.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    Seen
    """
    seen = Seen({}, {}, {})
    bar = tqdm(whole.names, desc="read", unit="image", disable=None if progress else True)
    for name in bar:
        sample = whole[name]
        seen.counts[name] = class_counts(sample, len(whole.classes))
        seen.mpp[name] = sample.mpp
        seen.shape[name] = (sample.labels.shape[0], sample.labels.shape[1])
    return seen


def _check_variant(
    config: Config, runs: Sequence[PlannedRun], whole: Dataset, seen: Seen
) -> Config:
    """Build the model of a variant, and refuse what its runs would refuse."""
    names = {n for run in runs for n in (*run.train, *run.val, *run.test)}
    config = resolve(config, whole, (seen.mpp[n] for n in sorted(names)))
    for run in runs:
        check_stopping(config, Parts(whole.subset(run.train), whole.subset(run.val), {}))
    model = build_model(config, whole.classes, config.data.mpp, whole.colors)
    if config.encoder.cache:
        cache = feature_cache(config, model, model.device)
        shapes = {n: _shape_at(seen.shape[n], seen.mpp[n], config.data.mpp) for n in names}
        for run in runs:
            check_room(config, cache, [shapes[n] for n in run.train])
        needed = config.encoder.cache * cache.bytes_of(list(shapes.values()))
        if needed > cache.limit:
            logger.warning(
                "features of all %d images take %.1f GB, more than encoder.cache_gb=%g: some are "
                "computed again for every run",
                len(names),
                needed / 1e9,
                config.encoder.cache_gb,
            )
    return config


def _shape_at(shape: tuple[int, int], mpp: float | None, wanted: float | None) -> tuple[int, int]:
    factor = mpp / wanted if mpp and wanted else 1.0
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def _run(
    run: PlannedRun,
    output: Path,
    config: Config,
    whole: Dataset,
    place: torch.device,
    progress: bool,
    state: PartialState,
) -> None:
    """Train one run, or go on with it, and score its test images."""
    folder = output / run.path
    if state.is_main_process:
        make_folder(folder)
        write_json(folder / SPLIT_FILE, splits_of(run, config))
    state.wait_for_everyone()
    if not (folder / RUN_FILE).is_file():
        data = config.data.model_copy(update={"split": (folder / SPLIT_FILE).absolute()})
        own = config.model_copy(update={"data": data, "seed": run.seed})
        started = (folder / CONFIG_FILE).is_file()
        train(own, folder, device=str(place), resume=started, progress=progress)
    if state.is_main_process:
        _score(run, folder, config, whole, place, progress)
    state.wait_for_everyone()


def _score(
    run: PlannedRun,
    folder: Path,
    config: Config,
    whole: Dataset,
    place: torch.device,
    progress: bool,
) -> None:
    """Predict the test images of a trained run and keep how their cells matched."""
    model = load_model(folder, device=place, allow_code=True)
    cache = feature_cache(config, model, place) if config.encoder.cache else None
    images = []
    bar = tqdm(run.test, desc="test", unit="image", disable=None if progress else True)
    for name in bar:
        sample = whole[name]
        prediction = predict_image(
            model,
            sample.image,
            sample.mpp or whole.mpp or model.mpp,
            batch_size=config.infer.batch_size,
            name=name,
            features=cache,
        )
        images.append(score_image(prediction, sample))
    write_scores(folder / SCORES_FILE, images, whole.classes)
    scores = summarise(images, whole.classes, resamples=0).scores
    shown = "  ".join(f"{n} {scores[n].value:.3f}" for n in ("macro_f1", "detection_f1", "bpq"))
    logger.info("%s: test %s", run.path, shown)
