"""The models of a run or protocol at work: one or several on the same windows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from celltyper.calibration import ABSTAINED
from celltyper.classification.model import PatchModel, load_patch_models
from celltyper.errors import ConfigError, DataError
from celltyper.library.cards import card_line
from celltyper.library.files import model_folders
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import padded, read_header

logger = logging.getLogger("celltyper")


def load_models(
    run: str | Path, device: torch.device, encoder_weights: str | None, batch_size: int | None
) -> tuple[PatchModel, ...]:
    """Load the models of a run or protocol, to work in batches of a size."""
    models = load_patch_models(run, device=device, encoder_weights=encoder_weights)
    if batch_size is None:
        return models
    configs = [
        model.config.model_copy(
            update={"view": model.config.view.model_copy(update={"batch_size": batch_size})}
        )
        for model in models
    ]
    return tuple(replace(m, config=config) for m, config in zip(models, configs, strict=True))


def mean_threshold(models: Sequence[PatchModel]) -> float:
    """Probability from which an ensemble calls a window positive: the mean of its models'."""
    return float(np.mean([model.threshold for model in models]))


def thresholds_of(
    models: Sequence[PatchModel], shares: Sequence[float]
) -> dict[float, float] | None:
    """Probability that a window needs for a name, as an ensemble the mean of its models'.

    Parameters
    ----------
    models : sequence of PatchModel
    shares : sequence of float
        Of the validation windows that keep a name.

    Returns
    -------
    dict of float to float, or None
        By share; None if one of the models is not calibrated.

    Raises
    ------
    ConfigError
        If there is no threshold for a share.
    """
    known = [model.calibration for model in models if model.calibration is not None]
    if len(known) < len(models):
        return None
    return {share: float(np.mean([c.threshold(share) for c in known])) for share in shares}


def least_probability(models: Sequence[PatchModel], abstain: float | None) -> float:
    """Probability below which a window is "unknown"; 0 if every window has a name.

    Raises
    ------
    ConfigError
        If a model knows no threshold for it, or has a class called "unknown" of its own.
    """
    if abstain is None:
        return 0.0
    found = thresholds_of(models, [abstain])
    if found is None:
        raise ConfigError(
            "abstain: a model knows no thresholds, which are found on validation windows at the "
            "end of training (docs/calibration.md); leave --abstain out, or take a calibrated run"
        )
    if ABSTAINED in models[0].classes:
        raise ConfigError(f"abstain: the model has a class called {ABSTAINED!r} of its own")
    return found[abstain]


def count_padded(model: PatchModel, table: PatchTable) -> int:
    """Count windows that reach over the border of their image, and say so in a warning."""
    over = int(padded(table, size=model.size, mpp=model.mpp).sum())
    if over:
        logger.warning(
            "%d of %d windows reach over the border of their image: what lies outside is mirrored",
            over,
            len(table),
        )
    return over


def model_facts(
    run: str | Path, models: Sequence[PatchModel], symmetries: int | None
) -> dict[str, Any]:
    """Say which models typed, for ``infer.json`` and ``metrics.json``."""
    first = models[0]
    return {
        "model": str(Path(run).absolute()),
        "model_card": card_line(Path(run)),
        "models": [str(folder.absolute()) for folder in model_folders(run)],
        "classes": list(first.classes),
        "positive": first.classes[first.positive],
        "threshold": mean_threshold(models),
        "thresholds": [model.threshold for model in models],
        "scalings": [
            None if model.calibration is None else model.calibration.scaling.text
            for model in models
        ],
        "size": first.size,
        "mpp": first.mpp,
        "symmetries": symmetries or first.config.view.symmetries,
    }


def check_resolution_wanted(model: PatchModel, mpp: float | None, run: str | Path) -> None:
    """Refuse a resolution for a model that takes pixels as they are.

    Raises
    ------
    ConfigError
        If a resolution is given and the model has none.
    """
    if mpp is not None and model.mpp is None:
        raise ConfigError(
            f"--mpp has no effect: {run} was trained without a resolution, on windows of "
            f"{model.size} px as they are"
        )


def check_resolution_known(model: PatchModel, table: PatchTable) -> None:
    """Refuse files of unknown resolution for a model that needs one.

    Raises
    ------
    DataError
        Naming the first file and how many there are.
    """
    if model.mpp is None or table.mpp is not None:
        return
    unknown = [file for file in dict.fromkeys(table.files) if read_header(file).mpp is None]
    if unknown:
        raise DataError(
            f"{unknown[0]}: micrometres per pixel unknown ({len(unknown):,} such files), and the "
            f"model looks at {model.size} px of {model.mpp:g}: pass --mpp"
        )
