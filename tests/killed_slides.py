"""One slide in a process that is killed again and again: ``python killed_slides.py OUT KILLS``.

Says how often it was killed before the slide was done. It is forked from one that has all modules,
as starting takes longer than the slide.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from made_slides import PixelModel, made_labels, made_slide

from celltyper.slides import whole_slide
from celltyper.wholeslide import infer_slide


def work(out: Path) -> None:
    slide = made_slide(made_labels(420, 610))
    infer_slide(PixelModel(), slide, out, whole_slide(slide), block=160, progress=False)  # type: ignore[arg-type]


def count(out: Path) -> int:
    """Files at a moment; some may go meanwhile."""
    return sum(len(files) for _, _, files in os.walk(out))


if __name__ == "__main__":
    out, kills = Path(sys.argv[1]), 0
    rng = np.random.default_rng(0)
    while True:
        before, more = count(out), int(rng.integers(1, 8))
        child = os.fork()
        if not child:
            status = 1
            try:
                work(out)
                status = 0
            except Exception:  # noqa: BLE001 - said here, as a fork must not go on
                traceback.print_exc()
            finally:
                os._exit(status)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if kills < int(sys.argv[2]) and abs(count(out) - before) >= more:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        if os.WIFEXITED(ended[1]):
            sys.stdout.write(str(kills))
            sys.exit(os.WEXITSTATUS(ended[1]))
        kills += 1
