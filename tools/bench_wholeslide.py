"""What a slide costs beside the network: time per megapixel, memory, cells; and at which size.

    python tools/bench_wholeslide.py --side 4096 --side 16384 --side 60000 -o FOLDER
    python tools/bench_wholeslide.py --side 8192 --vit -o FOLDER

Made JPEG pyramids (SVS-like TIFF, 0.25 micrometres per pixel, half of it tissue) are worked on from
reading to parquet, GeoJSON and report, by a model that gives maps of made nuclei at once, whatever
it sees. --nuclei says how many there are along 192 pixels: 5, the default, make 10,900 in a square
millimetre, as in lymphoid tissue. With --vit a ViT-S and its DPT decoder run first, whose
weights and maps do not matter, and their time is told apart. Megapixels are those of tissue.
Each size runs in a process of its own, whose largest resident memory is told, after a slide of
1,024 pixels, which has whatever is loaded once in a process loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
import torch
from torch import Tensor, nn

from celltyper.encoders import load_encoder
from celltyper.instances import HV
from celltyper.models import CellTyper
from celltyper.slides import open_slide, tissue_mask
from celltyper.types import PHENOTYPE, MapSpec
from celltyper.wholeslide import infer_slide

TILE, OVERLAP = 256, 64
STEP = TILE - OVERLAP
JPEG_TILE = 512
WARM_UP = 1024
CLASSES = ("neoplastic", "inflammatory", "connective")


def pattern(side: int) -> np.ndarray:
    """Labels of side x side nuclei on a square that repeats seamlessly."""
    rng = np.random.default_rng(0)
    labels = np.zeros((STEP, STEP), np.int32)
    yy, xx = np.mgrid[:STEP, :STEP]
    n = 0
    space = STEP / side
    for row in range(side):
        for col in range(side):
            y, x = (row + rng.uniform(0.3, 0.7)) * space, (col + rng.uniform(0.3, 0.7)) * space
            a, b, turn = rng.uniform(8, 13), rng.uniform(6, 10), rng.uniform(0, np.pi)
            dy = (yy - y + STEP / 2) % STEP - STEP / 2
            dx = (xx - x + STEP / 2) % STEP - STEP / 2
            u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
            n += 1
            labels[((u / a) ** 2 + (v / b) ** 2 <= 1) & (labels == 0)] = n
    return labels


class CannedModel(nn.Module):
    """Gives the same maps for every tile; neighbours fit together."""

    def __init__(self, nuclei: int, network: CellTyper | None) -> None:
        super().__init__()
        self.network, self.busy = network, 0.0
        self.weight = nn.Parameter(torch.ones(1))
        self.instances = HV()
        self.maps = {PHENOTYPE: MapSpec(4, "softmax", "bce_dice"), **self.instances.maps}
        self.classes, self.colors, self.mpp = CLASSES, (), 0.25
        self.calibration = self.domain = None
        self.tile, self.overlap, self.batch_size, self.symmetries = TILE, OVERLAP, 8, 1
        self.precision = "fp32"
        labels = np.tile(pattern(nuclei), (3, 3))
        # nuclei across the seam have one number on both sides, which is all that is needed here
        maps = HV().encode(_parted(labels))
        start = STEP - OVERLAP // 2
        cut = slice(start, start + TILE)
        nucleus = torch.from_numpy(maps["nucleus"][:, cut, cut].copy())
        kind = torch.from_numpy(np.eye(3, dtype=np.float32)[labels[cut, cut] % 3]).permute(2, 0, 1)
        soft = 0.9 * kind + 0.1 / 3
        self.canned = {
            PHENOTYPE: torch.cat([1 - nucleus, nucleus * soft]),
            "nucleus": 0.02 + 0.96 * nucleus,
            "hv": torch.from_numpy(maps["hv"][:, cut, cut].copy()),
        }

    @property
    def device(self) -> torch.device:
        """Of the maps."""
        return self.weight.device

    def forward(self, images: Tensor, features: object = None) -> dict[str, Tensor]:
        """Maps, as often as there are images; nothing is computed or copied."""
        if self.network is not None:
            started = time.perf_counter()
            self.network(images)
            self.busy += time.perf_counter() - started
        return {name: each.expand(len(images), *each.shape) for name, each in self.canned.items()}

    def activate(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """They are activated already."""
        return raw


def _parted(labels: np.ndarray) -> np.ndarray:
    """Give copies of one nucleus numbers of their own."""
    from skimage.measure import label

    return label(labels, connectivity=1, background=0).astype(np.int32)


def make_slide(path: Path, side: int) -> None:
    """JPEG pyramid whose left half is tissue-colored noise and whose right half is glass."""
    rng = np.random.default_rng(1)
    base = np.array([200, 130, 180]) + rng.normal(0, 18, (JPEG_TILE, JPEG_TILE, 1))
    tissue = np.clip(base + rng.normal(0, 6, (JPEG_TILE, JPEG_TILE, 3)), 0, 255).astype(np.uint8)
    glass = np.full_like(tissue, 244)

    @cache
    def encoded(width: int) -> bytes:
        """A tile of which so many columns are tissue."""
        image = np.concatenate([tissue[:, :width], glass[:, width:]], axis=1)
        return bytes(simplejpeg.encode_jpeg(image, quality=85, colorsubsampling="422"))

    def tiles(size: int) -> Iterator[bytes]:
        n = -(-size // JPEG_TILE)
        for _ in range(n):
            for col in range(n):
                yield encoded(min(JPEG_TILE, max(0, size // 2 - col * JPEG_TILE)))

    common = {
        "dtype": np.uint8,
        "tile": (JPEG_TILE, JPEG_TILE),
        "compression": "jpeg",
        "photometric": "ycbcr",
        "subsampling": (2, 1),
        "resolutionunit": "CENTIMETER",
    }
    sizes = [side, side // 4, side // 16]
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for i, size in enumerate(sizes):
            more = {"subifds": len(sizes) - 1} if i == 0 else {"subfiletype": 1}
            density = 1e4 / (0.25 * side / size)
            tiff.write(
                tiles(size), shape=(size, size, 3), resolution=(density, density), **common, **more
            )


def run(path: Path, output: Path, nuclei: int, vit: bool) -> dict[str, float]:
    """One slide, in this process."""
    network = None
    if vit:
        encoder = load_encoder("vit_small_patch16", "random")
        network = CellTyper(encoder, "dpt", CLASSES).eval()
    model = CannedModel(nuclei, network)
    with open_slide(path) as slide:
        started, cpu = time.perf_counter(), time.process_time()
        tissue = tissue_mask(slide)
        facts = infer_slide(model, slide, output, tissue, overwrite=True, progress=False)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    pixels = facts["tiles"] * STEP**2 / 1e6
    found = {
        "Mpx": pixels,
        "cells": facts["cells"],
        "seconds": seconds,
        "Mpx/s": pixels / seconds,
        "s/Mpx": seconds / pixels,
        "CPU s/Mpx": cpu / pixels,
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    if network is not None:
        alone = _alone(network, model.batch_size, facts["tiles"])
        found |= {
            "model s": model.busy,
            "model alone s": alone,
            "beside %": 100 * (1 - alone / seconds),
        }
    return found


def _alone(network: nn.Module, batch_size: int, tiles: int) -> float:
    """Seconds of so many tiles when nothing else runs.

    Of all of them: the first seconds after a pause are faster than a processor can keep up.
    """
    images = torch.rand(batch_size, 3, TILE, TILE)
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(tiles // batch_size):
            network(images)
    return (time.perf_counter() - started) * tiles / (tiles // batch_size * batch_size)


def main() -> None:
    """Run every size in a fresh process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, action="append", required=True)
    parser.add_argument("--nuclei", type=int, default=5, help="along 192 pixels")
    parser.add_argument("--vit", action="store_true", help="run a ViT-S too")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.here:
        (side,) = options.side
        for size in (WARM_UP, side):
            output = options.output / str(size)
            found = run(options.output / f"{size}.tif", output, options.nuclei, options.vit)
        print(json.dumps(found))
        return
    rows = []
    for side in (WARM_UP, *options.side):
        path = options.output / f"{side}.tif"
        if not path.exists():
            make_slide(path, side)
    for side in options.side:
        command = [sys.executable, __file__, "--side", str(side), "-o", str(options.output)]
        command += ["--nuclei", str(options.nuclei), *(["--vit"] if options.vit else [])]
        done = subprocess.run([*command, "--here"], check=True, capture_output=True, text=True)
        rows.append({"side": side, **json.loads(done.stdout.splitlines()[-1])})
    print("| " + " | ".join(rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        shown = [f"{value:,.3f}" if value < 10 else f"{value:,.0f}" for value in row.values()]
        print(f"| {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
