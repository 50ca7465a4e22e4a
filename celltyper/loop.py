"""What one training step needs, and what the checkpoint of a step holds."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from celltyper.calibration import FLOOR, Calibration, coverage_thresholds, fit_scaling
from celltyper.checkpoints import load_state, read_tensors, save_model, trained_state, write_tensors
from celltyper.config import Config, Loss, one_line
from celltyper.datasets import Dataset
from celltyper.domain import FEWEST_TILES, MOST_TILES, Domain, evenly, fit_domain
from celltyper.encoders.trainability import fingerprint
from celltyper.errors import ConfigError
from celltyper.evaluation import ImageScores, score_image, summarise, typed_cells
from celltyper.features import FeatureCache
from celltyper.library.files import MODEL_FILE
from celltyper.losses import effective_class_weights
from celltyper.metrics.calibration import expected_calibration_error
from celltyper.models import CellTyper
from celltyper.objective import objective
from celltyper.optim import (
    Average,
    learning_rate_factor,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from celltyper.predict import predict_image, tile_embeddings
from celltyper.runs import LAST_FILE, Progress, cells_per_class, write_history
from celltyper.targets import FEATURES
from celltyper.tiling import tile_grid
from celltyper.types import Sample

logger = logging.getLogger("celltyper")


class Loop:
    """What one step needs, and what the checkpoint of a step holds."""

    def __init__(
        self,
        config: Config,
        model: CellTyper,
        accelerator: Accelerator,
        weights: NDArray[np.float64] | None,
        cache: FeatureCache | None = None,
        *,
        precision: str,
    ) -> None:
        self.config = config
        self.precision = precision
        self.cache = cache
        self.accelerator = accelerator
        self.bare = model
        self.base = fingerprint(model.encoder)
        self.optimizer = make_optimizer(model, config.train, config.encoder.layer_decay)
        self.rates = [float(g["lr"]) for g in self.optimizer.param_groups]
        self.weights = (
            None
            if weights is None
            else torch.as_tensor(weights, dtype=torch.float32).to(accelerator.device)
        )
        self.model, self.wrapped = accelerator.prepare(model, self.optimizer)
        if config.train.compile:
            # torch stops compiling, without an error, after eight models of one process
            torch.compiler.reset()
            # around the model, so that its weights keep their names and validation runs it bare
            self.model = torch.compile(self.model)
        # Only now: preparing for several processes gives the parameters new storage.
        self.state = trained_state(model)
        self.average = Average(self.state, config.train.ema) if config.train.ema else None
        self.lr = 0.0

    def restore(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Put back weights, average and optimiser of a last checkpoint; empty does nothing."""
        if not tensors:
            return
        load_state(self.bare, _part(tensors, "model."), where=where)
        if self.average:
            self.average.state = {
                k: v.to(self.accelerator.device) for k, v in _part(tensors, "average.").items()
            }
        restore_optimizer(self.optimizer, tensors)
        if self.accelerator.scaler is not None:
            scaler = _part(tensors, "scaler.").items()
            self.accelerator.scaler.load_state_dict({k: v.item() for k, v in scaler})

    def step(self, batch: dict[str, Tensor], step: int) -> float:
        """One forward and backward pass; the optimiser steps when enough are accumulated."""
        train = self.config.train
        factor = learning_rate_factor(step, train.warmup, train.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.lr = train.lr * factor
        self.model.train()
        images = batch.pop("image")
        kept = sorted(name for name in batch if name.startswith(FEATURES))
        features = [batch.pop(name) for name in kept] or None
        with self.accelerator.autocast():
            raw = self.model(images, features)
        loss = objective(raw, batch, self.bare.maps, self.config.loss, self.weights)
        value = float(self.accelerator.reduce(loss.detach(), reduction="mean"))
        if math.isfinite(value):
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), train.clip)
            self.wrapped.step()
            self.wrapped.zero_grad()
        return value

    def after_step(self, step: int) -> None:
        """Move the average, if there is one, towards the weights after this step."""
        if self.average:
            self.average.update(self.state, step)

    def validate(self, data: Dataset) -> dict[str, float]:
        """Scores on whole validation images, with the averaged weights if there are any."""
        own = {name: t.detach().clone() for name, t in self.state.items()} if self.average else {}
        self._put(self.average.state if self.average else {})
        # several symmetries cost as many encoder passes, which `encoder.cache` is to spare
        scores = self._scored(data, symmetries=1)
        self._put(own)
        return {s: e.value for s, e in summarise(scores, data.classes, resamples=0).scores.items()}

    def calibrate(self, train: Dataset, val: Dataset, output: Path) -> None:
        """Find out on held-out images what the best model's answers are worth, and write it down.

        The model has its best weights from then on.

        Parameters
        ----------
        train, val : Dataset
            The training and validation images. The best model was chosen on the latter too, which
            a scaling of one number, or of two per class, hardly notices.
        output : Path
            The run folder, whose ``model.safetensors`` gets the scaling of class probabilities and
            the embeddings of the training images, as far as there are enough cells and tiles.
        """
        tensors, _ = read_tensors(output / MODEL_FILE)
        best = {name: tensors[name] for name in self.state}
        self._put(best)
        self.bare.eval()
        self.bare.calibration = self._calibration(val)
        self.bare.domain = self._domain(train, val)
        if self.bare.calibration is not None or self.bare.domain is not None:
            save_model(output / MODEL_FILE, self.bare, self.config, best, self.base)

    def _calibration(self, data: Dataset) -> Calibration | None:
        """Scaling of class probabilities, if there are enough validation cells."""
        settings, classes = self.config.calibration, self.bare.classes
        if settings.method == "none" or len(classes) < 2:
            return None
        n = sum(cells_per_class(data).values()) if len(data) else 0
        kind = "are annotated"
        if n >= settings.min_cases:
            # as many symmetries as in use, which make probabilities less extreme
            scores = self._scored(data, symmetries=self.config.infer.symmetries)
            typed = typed_cells(scores, len(classes))
            n, kind = len(typed), "were found"
        if n < settings.min_cases:
            logger.info(
                "class probabilities are not calibrated: %d validation cells %s, and "
                "calibration.min_cases is %d",
                n,
                kind,
                settings.min_cases,
            )
            return None
        scaling = fit_scaling(typed.raw, typed.truth, settings.method, floor=FLOOR)
        scaled = scaling.apply(typed.raw)
        logger.info(
            "class probabilities calibrated on %d cells: %s, error %.3f before, %.3f after",
            n,
            scaling.text,
            expected_calibration_error(typed.raw, typed.truth),
            expected_calibration_error(scaled, typed.truth),
        )
        return Calibration(scaling, n, coverage_thresholds(scaled.max(axis=1)))

    def _domain(self, train: Dataset, val: Dataset) -> Domain | None:
        """What the encoder sees of the training images, if they have enough tiles."""
        kept, others, held_out = list(train.names), val, "validation"
        if not len(val):
            # every fifth
            others, held_out = train.subset(kept[::5]), "training images left out"
            kept = [name for i, name in enumerate(kept) if i % 5]
        # counted before the encoder runs; every image has a tile
        if len(kept) < FEWEST_TILES:
            sizes = (self._size(train[name], train) for name in kept)
            tiles = sum(len(tile_grid(s, self.bare.tile, self.bare.overlap)) for s in sizes)
            if tiles < FEWEST_TILES:
                return None
        own = self._embeddings(train.subset(kept))
        return fit_domain(own, self._embeddings(others), held_out)

    def _embeddings(self, data: Dataset) -> NDArray[np.float32]:
        """Of `MOST_TILES` tiles or somewhat more, evenly from the images: (tiles, C)."""
        some = [data.names[i] for i in evenly(len(data), MOST_TILES)]
        found = [
            tile_embeddings(
                self.bare,
                sample.image,
                sample.mpp or data.mpp or self.bare.mpp,
                most=-(-MOST_TILES // len(some)),
                precision=self.precision,
                features=self.cache,
            )
            for sample in data.subset(some)
        ]
        return np.concatenate(found)

    def _size(self, sample: Sample, data: Dataset) -> tuple[int, int]:
        """Height and width of an image as the model sees it, pixels."""
        mpp, own = sample.mpp or data.mpp or self.bare.mpp, self.bare.mpp
        factor = mpp / own if mpp and own else 1.0
        height, width = (max(1, round(side * factor)) for side in sample.labels.shape)
        return height, width

    def _scored(self, data: Dataset, *, symmetries: int) -> list[ImageScores]:
        """Whole images predicted and scored."""
        scores = []
        for sample in data:
            prediction = predict_image(
                self.bare,
                sample.image,
                sample.mpp or data.mpp or self.bare.mpp,
                batch_size=self.config.infer.batch_size,
                symmetries=symmetries,
                precision=self.precision,
                name=sample.name,
                features=self.cache,
            )
            scores.append(score_image(prediction, sample))
        return scores

    def save(self, output: Path, state: Progress, *, improved: bool) -> None:
        """Write the best model if this is it, the history, and last the last checkpoint."""
        if improved:
            best = self.average.state if self.average else None
            save_model(output / MODEL_FILE, self.bare, self.config, best, self.base)
        write_history(output, state.history, self.config.train.log)
        tensors = {f"model.{k}": v for k, v in self.state.items()}
        if self.average:
            tensors |= {f"average.{k}": v for k, v in self.average.state.items()}
        tensors |= optimizer_tensors(self.optimizer)
        if self.accelerator.scaler is not None:
            scaler = self.accelerator.scaler.state_dict()
            tensors |= {f"scaler.{k}": torch.as_tensor(v) for k, v in scaler.items()}
        write_tensors(output / LAST_FILE, tensors, {"progress": asdict(state)})

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.state[name].copy_(tensor)


def check_compile(device: torch.device) -> None:
    """Refuse ``train.compile`` where torch cannot compile, by compiling the smallest training step.

    Parameters
    ----------
    device : torch.device

    Raises
    ------
    ConfigError
        With torch's reason: no compiler, or a platform or Python that it does not support.
    """
    x = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: x.sin().sum())(x).backward()
    # What is missing decides what is raised: of dynamo, inductor, Triton, or the system.
    except Exception as error:
        reason = one_line(error).partition(" Set TORCHDYNAMO_VERBOSE")[0]
        raise ConfigError(
            f"train.compile does not work on {device.type} here ({reason}); use train.compile=false"
        ) from error


def class_weights(loss: Loss, counts: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Weights of background and the K phenotypes in the cross-entropy, or None for all equal.

    Parameters
    ----------
    loss : Loss
    counts : ndarray of int64, shape (K + 1,)
        Pixels of each class in the training images.

    Returns
    -------
    ndarray of float64, shape (K + 1,) or None
    """
    if loss.class_weights == "none":
        return None
    return effective_class_weights(counts, rule=loss.class_weights)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
