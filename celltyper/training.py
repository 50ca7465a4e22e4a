"""Training: one readable loop on accelerate that can be killed at any moment and resumed exactly.

Every random choice is a pure function of the seed and the step (which tile, how it is augmented,
which units drop out), so a resumed run needs the tensors of the last checkpoint and nothing else.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from celltyper.atomic import write_json
from celltyper.cache import cache_folder
from celltyper.checkpoints import read_tensors
from celltyper.config import Config, Train
from celltyper.datasets import Dataset, resample
from celltyper.datasets.tiles import TileSampler
from celltyper.devices import autocast, multiplies_bf16, pick_device
from celltyper.encoders.trainability import check_trainability, parameter_digest
from celltyper.errors import ConfigError, DataError, TrainingError
from celltyper.evaluation import SCORES
from celltyper.features import Canvas, FeatureCache
from celltyper.library.files import MODEL_FILE, RUN_FILE
from celltyper.loop import Loop, check_compile, class_weights
from celltyper.models import CellTyper, build_model
from celltyper.parts import Parts, divide
from celltyper.predict import SAME_MPP
from celltyper.runs import (
    LAST_FILE,
    Progress,
    check_log,
    check_output,
    resolve_encoder,
    run_facts,
    start_folder,
)
from celltyper.starting import start_decoder, with_network_of
from celltyper.targets import KeptTiles, Targets, TrainingTiles, view
from celltyper.types import Sample

logger = logging.getLogger("celltyper")

Tiles = TrainingTiles | KeptTiles

SURROUND = 1.25
"""Tiles are cut this much larger than asked, so that a rotation shows tissue, not mirrors."""


def train(
    config: Config,
    output: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Train a model and write its run folder.

    Parameters
    ----------
    config : Config
        ``data.root`` must be set.
    output : str or Path
        The run folder: ``model.safetensors`` (best on validation), ``last.safetensors``,
        ``config.yaml``, ``history.csv``, ``run.json``.
    device : str
        See `celltyper.devices.pick_device`.
    resume : bool
        Go on with an unfinished run of the same config; the result equals an uninterrupted run.
    overwrite : bool
        Start over where another run is.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    ConfigError, DataError, CheckpointError
        For wrong input, before anything is written.
    TrainingError
        If the loss is no longer finite (the last good checkpoint stays), or training changed
        weights it must not, or did not change those it should.
    """
    output = Path(output)
    place = check_settings(config, device)
    precision = training_precision(config, place)
    parts = divide(config.data, config.seed)
    check_stopping(config, parts)
    samples = list(parts.train)
    # Validation images are read here once, so that wrong labels are found before training.
    config = resolve(config, parts.train, (s.mpp for s in chain(samples, parts.val)))
    # One process may train several runs, each with its own precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        gradient_accumulation_steps=config.train.accumulate,
        cpu=place.type == "cpu",
        # Blocks of the encoder behind the last map that a decoder reads get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    model = build_model(config, parts.train.classes, config.data.mpp, parts.train.colors)
    if config.start is not None:
        new = start_decoder(model, config.start)
        if new:
            logger.info("%s does not know %s", config.start, ", ".join(new))
    samples = [_at_mpp(sample, config.data.mpp) for sample in samples]
    cache = feature_cache(config, model, place) if config.encoder.cache else None
    if cache is not None:
        # The model is used on such tiles as it was trained and validated on.
        model.tile, model.overlap = cache.tile, cache.overlap
        own = {"tile": cache.tile, "overlap": cache.overlap}
        config = config.model_copy(update={"infer": config.infer.model_copy(update=own)})
    if accelerator.is_main_process:
        check_output(output, config, resume=resume, overwrite=overwrite)
    if cache is not None:
        check_room(config, cache, [s.labels.shape for s in samples])
        views = range(config.encoder.cache)
        samples = [view(sample, which, config.augment) for sample in samples for which in views]
    # on kept features nothing is rotated, so no surroundings are needed
    side = round(SURROUND * config.data.tile) if cache is None else cache.rounded(config.data.tile)
    if cache is not None:
        check_sizes(samples, side)
    sampler = TileSampler(samples, side, config.data.balance, config.seed)
    state = Progress(digest=parameter_digest(model))
    tensors: dict[str, Tensor] = {}
    accelerator.wait_for_everyone()
    asked, resume = resume, resume and (output / LAST_FILE).is_file()
    if resume:
        tensors, header = read_tensors(output / LAST_FILE)
        state = Progress(**header["progress"])
        # the facts are written last
        if state.finished and (output / RUN_FILE).is_file():
            logger.info("%s is finished: nothing to resume", output)
            return output
    elif asked:
        logger.info("nothing to resume in %s: starting from the first step", output)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        start_folder(output, config, keep=resume)
    model.to(accelerator.device)
    pixels = np.pad(sampler.pixels, (0, len(model.classes) + 1 - len(sampler.pixels)))
    weights = class_weights(config.loss, pixels)
    loop = Loop(config, model, accelerator, weights, cache, precision=precision)
    loop.restore(tensors, where=str(output / LAST_FILE))
    targets = Targets(samples, model.instances)
    tiles: Tiles = TrainingTiles(sampler, targets, config)
    if cache is not None:
        with accelerator.main_process_first():
            canvases = _canvases(cache, samples, progress=progress)
        tiles = KeptTiles(sampler, targets, canvases, cache.patch)
    _run(loop, state, tiles, parts.val, output, progress)
    trainability = check_trainability(state.digest, parameter_digest(model), config.encoder.adapt)
    state.finished = True
    if accelerator.is_main_process:
        loop.save(output, state, improved=False)
        loop.calibrate(parts.train, parts.val, output)
        data = {"train": parts.train, "val": parts.val, **parts.others}
        facts = run_facts(config, model, state, {k: part for k, part in data.items() if len(part)})
        facts |= {"precision": precision, "trainability": asdict(trainability)}
        write_json(output / RUN_FILE, facts)
    return output


def check_settings(config: Config, device: str) -> torch.device:
    """Refuse what can be refused without data, and choose the device.

    Raises
    ------
    ConfigError
        If the device is not there, cannot compute at ``train.precision``, or ``train.metric`` or
        ``train.log`` is unknown.
    """
    place = pick_device(device)
    if config.train.precision != "auto":
        autocast(place, config.train.precision)
    if config.train.metric not in SCORES:
        raise ConfigError(f"train.metric {config.train.metric!r} is unknown: {', '.join(SCORES)}")
    check_log(config.train.log)
    if config.train.compile:
        check_compile(place)
    return place


def check_stopping(config: Config, parts: Parts) -> None:
    """Refuse to stop on the scores of validation images where there are none."""
    if config.train.patience is not None and not len(parts.val):
        raise ConfigError(
            f"train.patience={config.train.patience} needs validation images, and there are none: "
            "pass --set train.patience=null, or raise data.val_fraction or name 'val' in data.split"
        )


def training_precision(config: Config, place: torch.device) -> str:
    """Precision of training on a device: as configured, or bf16 where it is multiplied."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if multiplies_bf16(place) else "fp32"


def feature_cache(config: Config, model: CellTyper, place: torch.device) -> FeatureCache:
    """Where the features of a frozen encoder are kept, and how they are computed."""
    return FeatureCache(
        model.encoder,
        cache_folder() / "features",
        tile=model.tile,
        overlap=model.overlap,
        limit=int(config.encoder.cache_gb * 1e9),
        batch_size=config.infer.batch_size,
        precision=training_precision(config, place),
    )


def check_sizes(samples: Iterable[Sample], tile: int) -> None:
    """Refuse images that are smaller than a tile, of which there are no kept features.

    Raises
    ------
    ConfigError
        Naming the first.
    """
    for sample in samples:
        if min(sample.labels.shape) < tile:
            raise ConfigError(
                f"image {sample.name!r} is smaller than a tile of {tile} px, whose features "
                "encoder.cache keeps: lower data.tile or use encoder.cache=0"
            )


def check_room(config: Config, cache: FeatureCache, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse features that cannot fit, before any is computed.

    Parameters
    ----------
    config : Config
    cache : FeatureCache
    shapes : sequence of tuple of int
        Height and width of the training images, as the model sees them.

    Raises
    ------
    ConfigError
        Saying what they take.
    """
    needed = config.encoder.cache * cache.bytes_of([(s[0], s[1]) for s in shapes])
    if needed > cache.limit:
        raise ConfigError(
            f"features of {len(shapes)} images in {config.encoder.cache} views take "
            f"{needed / 1e9:.1f} GB, more than encoder.cache_gb={config.encoder.cache_gb:g}: raise "
            "it, or lower encoder.cache"
        )


def _canvases(cache: FeatureCache, samples: Sequence[Sample], *, progress: bool) -> list[Canvas]:
    """Features of every view, computed now or found."""
    logger.info("features of %d views", len(samples))
    bar = tqdm(samples, desc="features", unit="view", disable=None if progress else True)
    return [cache.canvas(sample.image) for sample in bar]


def _run(
    loop: Loop,
    state: Progress,
    tiles: Tiles,
    val_data: Dataset,
    output: Path,
    progress: bool,
) -> None:
    """Step until the last step or until validation no longer improves."""
    config, accelerator = loop.config, loop.accelerator
    settings = config.train
    per_step = settings.batch_size * settings.accumulate * accelerator.num_processes
    loader = accelerator.prepare(
        DataLoader(
            tiles,
            batch_size=settings.batch_size,
            sampler=range(state.step * per_step, settings.steps * per_step),
            num_workers=config.data.workers,
        )
    )
    if _waited(state) >= (settings.patience or math.inf):
        return
    started = time.monotonic() - state.seconds
    losses: list[float] = []
    bar = tqdm(
        total=settings.steps,
        initial=state.step,
        desc="train",
        unit="step",
        disable=None if progress else True,
        dynamic_ncols=True,
    )
    with bar:
        for number, batch in enumerate(loader):
            # Dropout is a function of the step, so a resumed run drops the same units.
            part = number % settings.accumulate
            torch.manual_seed(config.seed * 1_000_003 + state.step * settings.accumulate + part)
            with accelerator.accumulate(loop.model):
                losses.append(loop.step(batch, state.step))
            if not math.isfinite(losses[-1]):
                raise TrainingError(_diverged(losses[-1], state.step + 1, output, settings))
            if not accelerator.sync_gradients:
                continue
            state.step += 1
            loop.after_step(state.step)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            last = state.step == settings.steps
            if last or state.step % settings.validate_every == 0:
                scores: dict[str, float] = {}
                if len(val_data):
                    scores = loop.validate(val_data) if accelerator.is_main_process else {}
                    scores = broadcast_object_list([scores])[0]
                row = {"step": float(state.step), "loss": float(np.mean(losses)), "lr": loop.lr}
                losses.clear()
                stop = _record(state, row | scores, settings, last=last)
                state.seconds = time.monotonic() - started
                if accelerator.is_main_process:
                    loop.save(output, state, improved=state.best_step == state.step)
                bar.clear()
                logger.info(_row_text(row | scores, settings))
                if stop:
                    break


def _diverged(loss: float, step: int, output: Path, settings: Train) -> str:
    kept = [n for n in (LAST_FILE, MODEL_FILE) if (output / n).is_file()]
    return (
        f"loss is {loss} at step {step}; "
        + (f"the last good checkpoint stays in {output / kept[0]}; " if kept else "")
        + f"lower train.lr (now {settings.lr}) or use train.precision=fp32"
    )


def resolve(config: Config, data: Dataset, resolutions: Iterable[float | None]) -> Config:
    """Write into a config what was decided: absolute paths, resolution, commit of weights.

    Parameters
    ----------
    config : Config
    data : Dataset
        The training images.
    resolutions : iterable of float or None
        Micrometres per pixel of every image.

    Returns
    -------
    Config

    Raises
    ------
    DataError
        If the images are of several resolutions and the config chooses none.
    ConfigError, CheckpointError
        If weights, or the model to start from, cannot be had or do not fit.
    """
    if config.start is not None:
        config = with_network_of(config)
    mpp = config.data.mpp or data.mpp
    found = set(resolutions)
    if mpp is None and found != {None}:
        if len(found) > 1:
            known = ", ".join(sorted(str(value or "unknown") for value in found))
            raise DataError(
                f"{data.path}: images of several resolutions ({known} micrometres per pixel); "
                "set data.mpp to the one to work at"
            )
        mpp = found.pop()
    files = {
        key: value.absolute()
        for key in ("root", "taxonomy", "split")
        if (value := getattr(config.data, key))
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"mpp": mpp, **files}),
            "encoder": resolve_encoder(config.encoder),
        }
    )


def _record(state: Progress, row: dict[str, float], train: Train, *, last: bool) -> bool:
    """Add a row to the history, note an improvement, and say whether to stop early."""
    state.history.append(row)
    score = row.get(train.metric, math.nan)
    # As long as no score could be computed, the newest model is as good as any.
    if score > state.best or not math.isfinite(state.best):
        state.best, state.best_step = (score if math.isfinite(score) else -math.inf), state.step
    return not last and _waited(state) >= (train.patience or math.inf)


def _waited(state: Progress) -> int:
    """Validations since the best one."""
    return sum(past["step"] > state.best_step for past in state.history)


def _at_mpp(sample: Sample, mpp: float | None) -> Sample:
    if mpp is None or sample.mpp is None or abs(sample.mpp / mpp - 1) < SAME_MPP:
        return sample
    return resample(sample, mpp)


def _row_text(row: dict[str, float], train: Train) -> str:
    scores = [f"{k} {row[k]:.3f}" for k in ("macro_f1", "detection_f1", "bpq") if k in row]
    return "  ".join([f"step {row['step']:.0f}/{train.steps}", f"loss {row['loss']:.3f}", *scores])
