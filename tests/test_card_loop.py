"""The tiny twin of every card runs the complete loop: train, infer, evaluate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from celltyper.config import Config
from celltyper.encoders import list_cards
from celltyper.inference import infer
from celltyper.results import evaluate_run
from celltyper.training import train


@pytest.mark.parametrize("name", list_cards())
def test_twin_of_a_card_runs_train_infer_and_eval(
    name: str, tiny: Callable[..., Config], made_data: Path, tmp_path: Path
) -> None:
    config = tiny(
        made_data,
        f"encoder.name={name}",
        "encoder.adapt=frozen",
        "decoder.name=dpt",
        "decoder.options.width=8",
        "train.steps=2",
    )
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    image = sorted((made_data / "test" / "images").iterdir())[0]
    cells = infer([image], run, tmp_path / "cells", mpp=0.5, device="cpu", progress=False)
    with np.load(cells / "labels.npz") as labels:
        assert labels["inst"].shape == (96, 96)
    summary, report = evaluate_run(
        run, made_data / "test", device="cpu", resamples=10, progress=False
    )
    assert len(summary.images) == 2
    assert (report / "report.html").is_file()
