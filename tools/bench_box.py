"""What the model in the box costs from PNG to cells: megapixels a second, and memory.

python tools/bench_box.py IMAGES [--mpp 0.25] [--model nuclei]

Runs `celltyper infer` on the folder, then on one image of 2,000 x 2,000 px put together from
the first ones, each in a process of its own, started anew: its time has all that Python loads.
Medians of three runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from celltyper.datasets import read_image
from celltyper.inference import find_images

SIDE = 2000
RUNS = 3


def main() -> None:
    """Print seconds, megapixels a second and gigabytes of both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--mpp", type=float, default=0.25)
    parser.add_argument("--model", default="nuclei")
    options = parser.parse_args()
    pictures = [read_image(path).image for path in find_images([options.images]).values()]
    with tempfile.TemporaryDirectory() as work:
        single = Path(work) / "single.png"
        Image.fromarray(patchwork(pictures, SIDE)).save(single)
        megapixels = {options.images: sum(p.shape[0] * p.shape[1] for p in pictures) / 1e6}
        megapixels[single] = SIDE * SIDE / 1e6
        print(f"| {os.cpu_count()} cores | Mpx | s | Mpx/s | peak memory, GB |")
        print("|---|---|---|---|---|")
        for source, size in megapixels.items():
            command = [sys.executable, "-m", "celltyper", "infer", source, "-m", options.model]
            command += ["--mpp", str(options.mpp), "-o", Path(work) / f"out-{source.stem}"]
            runs = [cost([*command, "-q", "--overwrite"]) for _ in range(RUNS)]
            seconds, memory = (statistics.median(values) for values in zip(*runs, strict=True))
            name = f"{len(pictures)} images" if source == options.images else "one image"
            print(f"| {name} | {size:.1f} | {seconds:.1f} | {size / seconds:.2f} | {memory:.2f} |")


def cost(command: Sequence[str | Path]) -> tuple[float, float]:
    """Seconds of a process, and gigabytes at its peak."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command} failed")
    return seconds, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def patchwork(pictures: list[np.ndarray], side: int) -> np.ndarray:
    """A square of pictures beside each other, again and again if they are too few."""
    height, width = (min(p.shape[axis] for p in pictures) for axis in (0, 1))
    rows, cols = -(-side // height), -(-side // width)
    chosen = [pictures[i % len(pictures)][:height, :width] for i in range(rows * cols)]
    lines = [np.hstack(chosen[row * cols : (row + 1) * cols]) for row in range(rows)]
    return np.vstack(lines)[:side, :side]


if __name__ == "__main__":
    main()
