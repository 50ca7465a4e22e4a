"""Settings of the whole suite, and data that several tests share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from skimage.draw import disk

from celltyper.__main__ import main
from celltyper.config import Config, parse_config
from celltyper.datasets import write_folder
from celltyper.types import Sample

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


def made_sample(seed: int, name: str, size: int = 96, cells: int = 12) -> Sample:
    """Pink ground with blue (class 1) and brown (class 2) disks that do not touch."""
    rng = np.random.default_rng(seed)
    image = rng.normal((225, 190, 215), 6, (size, size, 3))
    labels = np.zeros((size, size), np.int32)
    phenotypes = [0]
    for _ in range(20 * cells):
        center, radius = rng.uniform(6, size - 6, 2), rng.uniform(4, 7)
        if not labels[disk(center, radius + 2, shape=labels.shape)].any() and radius:
            phenotypes.append(1 + len(phenotypes) % 2)
            inside = disk(center, radius, shape=labels.shape)
            labels[inside] = len(phenotypes) - 1
            color = ((70, 60, 150), (140, 80, 50))[phenotypes[-1] - 1]
            image[inside] = rng.normal(color, 6, (len(inside[0]), 3))
        if len(phenotypes) > cells:
            break
    pixels = image.clip(0, 255).astype(np.uint8)
    return Sample(pixels, labels, np.array(phenotypes, np.uint8), name, group=name, mpp=0.5)


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
