"""A slide whose work stops at a gate, for tests that kill who works on it in the middle.

``python gated_slides.py OUT GATE N`` works on it with N processes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from made_slides import PixelModel, made_labels, made_slide

from celltyper.slides import Slide, whole_slide
from celltyper.wholeslide import infer_slide, process_pool

OPTIONS: dict[str, Any] = {"block": 160, "progress": False}
BLOCKS = 4
"""So many of twelve go through before the gate counts: some others cannot have begun by then."""


def finished(out: Path) -> dict[Path, int]:
    """When the maps of each block were finished."""
    folder = out / "work" / "predicted"
    return {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}


class GatedModel(PixelModel):
    """Gives what a `PixelModel` gives; once some blocks are done, it waits while there is a gate.

    So a test may take its time, on however slow a machine, and the work is in the middle. The gate
    is a folder, in which each process that waits leaves a file.
    """

    def __init__(self, out: Path, gate: Path) -> None:
        super().__init__()
        self.out, self.gate = out, gate

    def forward(self, images: torch.Tensor, features: Any = None) -> dict[str, torch.Tensor]:
        if self.gate.exists() and len(finished(self.out)) >= BLOCKS:
            with suppress(FileNotFoundError):
                (self.gate / str(os.getpid())).touch()
            end = time.monotonic() + 120
            while self.gate.exists():
                assert time.monotonic() < end, "nobody opened the gate"
                time.sleep(0.01)
        return super().forward(images, features)


class GatedSource:
    """Takes the place of a `ModelSource`."""

    run = "gated"

    def __init__(self, out: Path, gate: Path) -> None:
        self.out, self.gate = out, gate

    def load(self) -> Any:
        return GatedModel(self.out, self.gate)


class DeadlySource:
    """Kills the process that asks for the model."""

    run = "deadly"

    def load(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def gated_slide() -> Slide:
    return made_slide(made_labels(420, 610))


if __name__ == "__main__":
    slide, out = gated_slide(), Path(sys.argv[1])
    with process_pool(int(sys.argv[3])) as pool:
        infer_slide(
            PixelModel(),  # type: ignore[arg-type]
            slide,
            out,
            whole_slide(slide),
            pool=pool,
            source=GatedSource(out, Path(sys.argv[2])),  # type: ignore[arg-type]
            **OPTIONS,
        )
