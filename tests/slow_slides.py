"""A slide that takes its time, for tests that kill who works on it.

``python slow_slides.py OUT N`` works on it with N processes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
from made_slides import PixelModel, made_labels, made_slide

from celltyper.slides import Slide, whole_slide
from celltyper.wholeslide import infer_slide, process_pool

OPTIONS: dict[str, Any] = {"block": 160, "progress": False}


class SlowModel(PixelModel):
    """Gives what a `PixelModel` gives."""

    def forward(self, images: torch.Tensor, features: Any = None) -> dict[str, torch.Tensor]:
        time.sleep(0.1)
        return super().forward(images, features)


class SlowSource:
    run = "slow"

    def load(self) -> Any:
        return SlowModel()


class DeadlySource:
    """Kills the process that asks for the model."""

    run = "deadly"

    def load(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def slow_slide() -> Slide:
    return made_slide(made_labels(420, 610))


if __name__ == "__main__":
    slide = slow_slide()
    with process_pool(int(sys.argv[2])) as pool:
        infer_slide(
            PixelModel(),  # type: ignore[arg-type]
            slide,
            sys.argv[1],
            whole_slide(slide),
            pool=pool,
            source=SlowSource(),  # type: ignore[arg-type]
            **OPTIONS,
        )
