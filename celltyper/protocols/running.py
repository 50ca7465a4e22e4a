"""Running a protocol: every run in turn, resumably, each scored on its test images."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from tqdm import tqdm

from celltyper import __version__
from celltyper.atomic import make_folder, write_json
from celltyper.checkpoints import load_model
from celltyper.config import Config, parse_config
from celltyper.datasets import Dataset
from celltyper.datasets.splitting import class_counts
from celltyper.errors import ConfigError, DataError
from celltyper.evaluation import score_image, summarise
from celltyper.models import build_model
from celltyper.parts import Parts, open_whole, read_splits
from celltyper.predict import predict_image
from celltyper.protocols.plan import PlannedRun, plan_runs
from celltyper.protocols.protocol import Protocol, variant_configs
from celltyper.protocols.scores import SCORES_FILE, write_scores
from celltyper.protocols.table import PROTOCOL_FILE, read_plan
from celltyper.protocols.writing import FILES
from celltyper.reporting import notice_of
from celltyper.runs import CONFIG_FILE, RUN_FILE, SPLIT_FILE, difference
from celltyper.training import (
    check_room,
    check_settings,
    check_stopping,
    feature_cache,
    resolve,
    train,
)

logger = logging.getLogger("celltyper")

TEST = "test"
"""Name of the test images in the split file of a run."""


@dataclass(frozen=True)
class _Seen:
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
        See `celltyper.predict.pick_device`.
    resume : bool
        Go on with the same protocol: finished runs stay, an unfinished one goes on exactly.
    overwrite : bool
        Start over; runs of the protocol that is there are deleted.
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
    """
    output = Path(output)
    variants = variant_configs(protocol, config)
    for variant in variants.values():
        place = check_settings(variant, device)
    whole = open_whole(config.data)
    seen = _look(whole, progress)
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
        "runs": [_entry(run) for run in runs],
    }
    state = PartialState(cpu=place.type == "cpu")
    _check_output(output, about, runs, whole, resolved, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()
    if state.is_main_process:
        _start(output, about, overwrite=overwrite)
    _say_plan(runs, whole)
    state.wait_for_everyone()
    started = time.monotonic()
    todo = [run for run in runs if not (output / run.path / SCORES_FILE).is_file()]
    if len(todo) < len(runs):
        logger.info("%d of %d runs are finished", len(runs) - len(todo), len(runs))
    for done, run in enumerate(todo):
        left = (time.monotonic() - started) / done * (len(todo) - done) / 60 if done else 0.0
        hint = f", about {left:.0f} min left" if left >= 1 else ""
        logger.info("run %d/%d: %s%s", runs.index(run) + 1, len(runs), run.path, hint)
        _run(run, output, resolved[run.variant], whole, place, progress, state)
    return output


def _look(whole: Dataset, progress: bool) -> _Seen:
    """Read every image once: its classes, resolution and size."""
    seen = _Seen({}, {}, {})
    bar = tqdm(whole.names, desc="read", unit="image", disable=None if progress else True)
    for name in bar:
        sample = whole[name]
        seen.counts[name] = class_counts(sample, len(whole.classes))
        seen.mpp[name] = sample.mpp
        seen.shape[name] = (sample.labels.shape[0], sample.labels.shape[1])
    return seen


def _check_variant(
    config: Config, runs: Sequence[PlannedRun], whole: Dataset, seen: _Seen
) -> Config:
    """Build the model of a variant, and refuse what its runs would refuse."""
    names = {n for run in runs for n in (*run.train, *run.val, *run.test)}
    config = resolve(config, whole, (seen.mpp[n] for n in sorted(names)))
    for run in runs:
        check_stopping(config, Parts(whole.subset(run.train), whole.subset(run.val), {}))
    model = build_model(config, whole.classes, config.data.mpp, whole.colors)
    if config.encoder.cache:
        cache = feature_cache(config, model)
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


def _entry(run: PlannedRun) -> dict[str, Any]:
    """A run as ``protocol.json`` holds it; names are in its split file."""
    fields = asdict(run)
    return fields | {part: len(fields[part]) for part in ("train", "val", "test")}


def _splits(run: PlannedRun, config: Config) -> dict[str, list[str]]:
    data = config.data
    return {data.train: list(run.train), data.val: list(run.val), TEST: list(run.test)}


def _check_output(
    output: Path,
    about: Mapping[str, Any],
    runs: Sequence[PlannedRun],
    whole: Dataset,
    configs: Mapping[str, Config],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Refuse a folder that holds something else than the protocol to be continued."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give a folder for the protocol")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / PROTOCOL_FILE).is_file():
        raise ConfigError(f"{output} holds other files; give an empty or new folder")
    if overwrite:
        return
    if not resume:
        raise ConfigError(
            f"{output} already holds a protocol; pass --resume to go on with it, --overwrite to "
            "start over, or another folder"
        )
    old = read_plan(output)
    was, now = (Protocol.model_validate(side["protocol"]) for side in (old, about))
    changed = difference(was, now)
    for name, config in configs.items():
        if not changed and name in old["variants"]:
            changed = difference(parse_config(old["variants"][name]), config)
    if changed:
        raise ConfigError(
            f"{output} was started with another protocol or config ({changed}); resume with the "
            "same ones, or give another folder"
        )
    if old["runs"] != about["runs"] or old["classes"] != about["classes"]:
        raise DataError(
            f"{whole.path} gives other splits than when {output} was started: its images, groups "
            "or classes have changed; put them back, or give another folder"
        )
    for run in runs:
        file = output / run.path / SPLIT_FILE
        if file.is_file():
            kept = {part: list(names) for part, names in read_splits(file).items()}
            if kept != _splits(run, configs[run.variant]):
                raise DataError(
                    f"{file} lists other images than the data give now: put the data back, or "
                    "give another folder"
                )


def _start(output: Path, about: Mapping[str, Any], *, overwrite: bool) -> None:
    """Create the folder and write what is to be run; runs of an earlier protocol go."""
    make_folder(output)
    if overwrite and (output / PROTOCOL_FILE).is_file():
        for entry in read_plan(output)["runs"]:
            folder = (output / entry["path"]).resolve()
            if folder != output.resolve() and folder.is_relative_to(output.resolve()):
                shutil.rmtree(folder, ignore_errors=True)
        for name in FILES:
            (output / name).unlink(missing_ok=True)
    write_json(output / PROTOCOL_FILE, about)


def _say_plan(runs: Sequence[PlannedRun], whole: Dataset) -> None:
    """Log how many runs there are, images that take no part, and fractions that are the same."""
    used = {n for run in runs for n in (*run.train, *run.val, *run.test)}
    logger.info("%d run%s on %d images", len(runs), "s" * (len(runs) > 1), len(used))
    if len(used) < len(whole):
        logger.info("%d images of %s take no part", len(whole) - len(used), whole.path)
    same: dict[tuple[Any, ...], float] = {}
    for run in runs:
        key = run.variant, run.part, run.seed, run.train
        other = same.setdefault(key, run.fraction)
        if other != run.fraction:
            logger.warning(
                "%s: fraction %g trains on the same images as %g, for whole groups hold %.1f %%",
                run.path,
                run.fraction,
                other,
                100 * run.reached,
            )


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
        write_json(folder / SPLIT_FILE, _splits(run, config))
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
    cache = feature_cache(config, model) if config.encoder.cache else None
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
