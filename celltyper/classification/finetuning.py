"""Training of a head by gradient, and with it of the encoder's adapted part.

Every random choice is a pure function of the seed and the step, so that a killed run goes on from
its last checkpoint to the same result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from celltyper.checkpoints import load_state, read_tensors, trained_state, write_tensors
from celltyper.classification.config import PatchConfig
from celltyper.classification.network import PatchNetwork, as_images
from celltyper.encoders.trainability import check_trainability, parameter_digest
from celltyper.errors import TrainingError
from celltyper.optim import (
    Average,
    learning_rate_factor,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import read_patch
from celltyper.runs import LAST_FILE, write_history
from celltyper.transforms import augment

logger = logging.getLogger("celltyper")

SURROUND = 1.5
"""Windows are read this much larger than asked, so that a rotation shows tissue, not mirrors."""


@dataclass
class Stand:
    """Where a training stands; stored in its last checkpoint."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    digest: dict[str, str] = field(default_factory=dict)


class TrainingWindows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Augmented windows; item i is a pure function of the seed and i.

    Every window is shown once before any is shown twice.

    Parameters
    ----------
    table : PatchTable
    rows : sequence of int
        Those that train.
    targets : ndarray of float64, shape (n, K)
        Of all rows of the table.
    weights : ndarray of float64, shape (n,)
    config : PatchConfig
        Resolved.
    seed : int
    """

    def __init__(
        self,
        table: PatchTable,
        rows: Sequence[int] | NDArray[np.intp],
        targets: NDArray[np.float64],
        weights: NDArray[np.float64],
        config: PatchConfig,
        seed: int,
    ) -> None:
        self.table = table
        self.rows = np.asarray(rows)
        self.targets = torch.from_numpy(targets).float()
        self.weights = torch.from_numpy(weights).float()
        self.size = config.data.size or 0
        self.mpp = config.data.mpp
        self.strengths = config.augment.model_dump()
        self.seed = seed

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``image`` (3, S, S) in [0, 1], ``target`` (K,), ``weight`` ()."""
        turn, place = divmod(index, len(self.rows))
        order = np.random.default_rng([self.seed, turn, 0]).permutation(len(self.rows))
        i = int(self.rows[order[place]])
        around = math.ceil(self.size * SURROUND)
        # of the same parity, so that cutting the middle out is exact
        around += (around - self.size) % 2
        window = read_patch(self.table, i, size=around, mpp=self.mpp)
        none = np.zeros(window.shape[:2], np.int32)
        rng = np.random.default_rng([self.seed, index, 1])
        moved = augment(window, none, np.zeros(1, np.uint8), rng, size=self.size, **self.strengths)
        return {
            "image": as_images(moved.image[None])[0],
            "target": self.targets[i],
            "weight": self.weights[i],
        }


def train_network(
    network: PatchNetwork,
    windows: TrainingWindows,
    class_weights: NDArray[np.float64],
    config: PatchConfig,
    output: Path,
    *,
    resume: bool,
    progress: bool,
    workers: int = 0,
) -> dict[str, Any]:
    """Train a network in place, and leave its averaged weights in it.

    The loss is the cross-entropy to the targets' shares, weighted by class and window.

    Parameters
    ----------
    network : PatchNetwork
    windows : TrainingWindows
    class_weights : ndarray of float64, shape (K,)
        Times the target's share of each class.
    config : PatchConfig
    output : Path
        Run folder for ``last.safetensors`` and ``history.csv``.
    resume : bool
        Go on from ``last.safetensors`` if it is there.
    progress : bool
    workers : int
        Processes that read and augment windows.

    Returns
    -------
    dict
        Steps, the last loss, and what training changed, for ``run.json``.

    Raises
    ------
    TrainingError
        If the loss is no longer finite, or training changed weights it must not.
    """
    train, device = config.train, network.embedder.device
    optimizer = make_optimizer(network, train, config.encoder.layer_decay)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    state, stand = trained_state(network), Stand(digest=parameter_digest(network))
    average = Average(state, train.ema) if train.ema else None
    if resume and (output / LAST_FILE).is_file():
        tensors, header = read_tensors(output / LAST_FILE)
        stand = Stand(**header["stand"])
        load_state(network, _part(tensors, "model."), where=str(output / LAST_FILE))
        if average:
            average.state = {k: v.to(device) for k, v in _part(tensors, "average.").items()}
        restore_optimizer(optimizer, tensors)
    share = torch.from_numpy(class_weights).float().to(device)
    loader = torch.utils.data.DataLoader(
        windows,
        batch_size=train.batch_size,
        sampler=range(stand.step * train.batch_size, train.steps * train.batch_size),
        num_workers=workers,
    )
    losses: list[float] = []
    bar = tqdm(
        total=train.steps,
        initial=stand.step,
        desc="train",
        unit="step",
        disable=None if progress else True,
    )
    with bar:
        for batch in loader:
            torch.manual_seed(windows.seed * 1_000_003 + stand.step)
            factor = learning_rate_factor(stand.step, train.warmup, train.steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            network.train()
            logits = network(batch["image"].to(device)).float()
            each = -(batch["target"].to(device) * share * logits.log_softmax(dim=1)).sum(dim=1)
            loss = (batch["weight"].to(device) * each).mean()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"{output}: loss is {losses[-1]} at step {stand.step + 1}; lower train.lr "
                    f"(now {train.lr})"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), train.clip)
            optimizer.step()
            optimizer.zero_grad()
            stand.step += 1
            if average:
                average.update(state, stand.step)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            if stand.step % train.save_every == 0 or stand.step == train.steps:
                row = {"step": float(stand.step), "loss": float(np.mean(losses))}
                stand.history.append(row | {"lr": train.lr * factor})
                losses.clear()
                _save(output, stand, state, average, optimizer)
    if average:
        with torch.no_grad():
            for name, tensor in average.state.items():
                state[name].copy_(tensor)
    changed = check_trainability(stand.digest, parameter_digest(network), config.encoder.adapt)
    network.eval()
    return {
        "steps": stand.step,
        "loss": stand.history[-1]["loss"],
        "trainability": asdict(changed),
    }


def _save(
    output: Path,
    stand: Stand,
    state: dict[str, Tensor],
    average: Average | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    write_history(output, stand.history, "csv")
    tensors = {f"model.{k}": v for k, v in state.items()}
    if average:
        tensors |= {f"average.{k}": v for k, v in average.state.items()}
    write_tensors(
        output / LAST_FILE, tensors | optimizer_tensors(optimizer), {"stand": asdict(stand)}
    )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
