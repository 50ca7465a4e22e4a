"""Settings of the whole suite, and data that several tests share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from celltyper.__main__ import main
from celltyper.config import Config, parse_config
from celltyper.datasets import write_folder
from celltyper.made import made_sample

# A tiny model on two shared cores runs faster on one thread, and so do two pytest workers.
torch.set_num_threads(1)

DATA = Path(__file__).parents[2] / "shared" / "data"

TINY = (
    "encoder.name=vit_tiny_patch16",
    "encoder.weights=twin",
    "encoder.adapt=full",
    "decoder.name=linear",
    "data.tile=64",
    "infer.overlap=16",
    "train.steps=4",
    "train.batch_size=2",
    "train.warmup=1",
    "train.validate_every=2",
)
"""Overrides that make a run of seconds out of any recipe."""


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """A config of seconds on a dataset: ``tiny(root, "section.key=value", ...)``."""

    def make(root: Path, *overrides: str) -> Config:
        return parse_config({"data": {"root": str(root)}}, [*TINY, *overrides])

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images beside the checkout; never part of the repository."""
    if not DATA.is_dir():
        pytest.skip("no real data beside the checkout")
    return DATA


@pytest.fixture(scope="session")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the parts train, val and test, two classes, 0.5 micrometres per pixel."""
    root = tmp_path_factory.mktemp("made")
    for part, seeds in (("train", (1, 2, 3)), ("val", (4,)), ("test", (5, 6))):
        samples = [made_sample(seed, f"{part}{seed}") for seed in seeds]
        write_folder(root / part, samples, ("blue", "brown"), 0.5)
    return root


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def celltyper_command(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Run ``celltyper ...`` in this process; the log is put back as it was."""
    logger = logging.getLogger("celltyper")
    kept = logger.handlers, logger.propagate, logger.level

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, captured.out, captured.err)

    yield run
    logger.handlers, logger.propagate = kept[:2]
    logger.setLevel(kept[2])
