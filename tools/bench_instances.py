"""Time and quality of instance decoding with a class table, beside a published post-processing.

The peer is the HoVer-Net family's post-processing as the PyPI package ``cellvit`` carries it. It
runs in an environment of its own, on the same maps, in turn with ours::

    python -m venv peer
    peer/bin/pip install --no-deps cellvit
    peer/bin/pip install numpy scipy "opencv-python-headless<5" scikit-image einops ray pandas torch
    python tools/bench_instances.py --peer-python peer/bin/python --data ../shared/data/consep

Without ``--data`` (a folder with ``labels/*.npz``: ``inst``, ``type``) the real maps are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

# One thread on both sides; the libraries read these when they are loaded.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

CLASSES = 4
KINDS = ("easy", "noisy", "real")
PROBABILITIES = ("nucleus", "boundary")


def synthetic(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and class table of ellipses, 1000 in 1024 x 1024 px, many of them touching."""
    rng = np.random.default_rng(seed)
    step = 32.4
    cells = round(size / step)
    labels = np.zeros((size, size), np.int32)
    rows, cols = np.meshgrid(np.arange(cells), np.arange(cells), indexing="ij")
    centres = (np.stack([rows, cols], -1).reshape(-1, 2) + 0.5) * size / cells
    # Pairs move towards each other, so that about half of the nuclei touch a neighbour.
    centres[1::2, 1] -= rng.uniform(6, 16, len(centres[1::2]))
    centres += rng.uniform(-5, 5, centres.shape)
    for i, (r, c) in enumerate(centres, 1):
        a, b = rng.uniform(6, 11, 2)
        angle = rng.uniform(0, np.pi)
        top, left = max(int(r) - 12, 0), max(int(c) - 12, 0)
        window = labels[top : int(r) + 13, left : int(c) + 13]
        y, x = np.indices(window.shape)
        y, x = y + top - r, x + left - c
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        window[((u / a) ** 2 + (v / b) ** 2 <= 1) & (window == 0)] = i
    types = rng.integers(1, CLASSES + 1, len(centres) + 1).astype(np.uint8)
    types[0] = 0
    return labels, types


def annotated(folder: Path, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and class table of annotated images, put side by side or cropped to the size."""
    files = sorted((folder / "labels").glob("*.npz"))
    if not files:
        raise SystemExit(f"no labels/*.npz in {folder}")
    labels = np.zeros((size, size), np.int32)
    types = [np.zeros(1, np.uint8)]
    top, file = 0, 5 * seed
    for r in range(0, size, 1000):
        for c in range(0, size, 1000):
            with np.load(files[file % len(files)]) as data:
                inst, kind = data["inst"].astype(np.int32), data["type"]
            file += 1
            table = np.zeros(int(inst.max()) + 1, np.uint8)
            table[inst] = kind
            rows, cols = (min(n, size - k) for n, k in zip(inst.shape, (r, c), strict=True))
            # A crop comes from the middle.
            up, left = (inst.shape[0] - rows) // 2, (inst.shape[1] - cols) // 2
            cut = inst[up : up + rows, left : left + cols]
            labels[r : r + rows, c : c + cols] = np.where(cut > 0, cut + top, 0)
            types.append(table[1:])
            top += len(table) - 1
    return labels, np.concatenate(types)


def noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Correlated noise with standard deviation 1."""
    from scipy.ndimage import gaussian_filter

    white = rng.standard_normal(shape, np.float32)
    return gaussian_filter(white, (0, sigma, sigma)) * np.float32(2 * np.sqrt(np.pi) * sigma)


def as_predicted(
    labels: np.ndarray, types: np.ndarray, kind: str, seed: int, method: str = "hv"
) -> dict[str, np.ndarray]:
    """Maps as a network would give them: encoded truth, blurred, with correlated noise."""
    from scipy.ndimage import gaussian_filter

    from celltyper.instances import build_instances

    rng = np.random.default_rng(seed)
    maps = build_instances(method).encode(labels)
    classes = np.stack([types[labels] == k for k in range(CLASSES + 1)]).astype(np.float32)
    if kind == "easy":
        return {**maps, "type": classes}
    blur, spread = (1.0, 0.2) if kind == "noisy" else (1.5, 0.15)
    inside = maps["nucleus"]
    predicted = {}
    # Coordinates first, whose noise is then the same whatever else a method has.
    for name in sorted(maps, key=lambda k: k in PROBABILITIES):
        values = gaussian_filter(maps[name], (0, blur, blur))
        if name in PROBABILITIES:
            logits = 12 * (values - 0.5) + 1.5 * noise(values.shape, 2, rng)
            values = 1 / (1 + np.exp(-logits))
        else:
            # Outside of nuclei networks are not trained on coordinates: more noise there.
            values += noise(values.shape, 1.5, rng) * (spread + 0.1 * (1 - inside))
        predicted[name] = values.astype(np.float32)
    scores = 6 * gaussian_filter(classes, (0, 2, 2)) + 1.5 * noise(classes.shape, 4, rng)
    scores = np.exp(scores - scores.max(0))
    return {
        **predicted,
        "type": (scores / scores.sum(0)).astype(np.float32),
    }


def peer_serve() -> None:
    """Decode maps with cellvit for every line ``folder repeats`` on standard input."""
    import cv2
    from cellvit.inference.postprocessing_numpy import DetectionCellPostProcessor

    cv2.setNumThreads(1)
    process = DetectionCellPostProcessor(wsi=None, nr_types=CLASSES + 1)
    print("ready", flush=True)
    for line in sys.stdin:
        folder, repeats = line.split()
        maps = {k: np.load(Path(folder) / f"{k}.npy") for k in ("nucleus", "hv", "type")}
        seconds = []
        for _ in range(int(repeats)):
            start = time.perf_counter()
            stacked = np.stack(
                [maps["type"].argmax(0), maps["nucleus"][0] >= 0.5, *maps["hv"]], axis=-1
            )
            labels, cells = process.post_process_single_image(stacked)
            seconds.append(time.perf_counter() - start)
        types = np.zeros(int(labels.max(initial=0)) + 1, np.uint8)
        for i, cell in cells.items():
            types[i] = cell["type"]
        np.save(Path(folder) / "labels.npy", labels.astype(np.int32))
        np.save(Path(folder) / "types.npy", types)
        print(json.dumps(min(seconds)), flush=True)


def ours(maps: dict[str, np.ndarray], repeats: int, method: str = "hv") -> tuple[Any, ...]:
    """Best time, labels and class table of celltyper."""
    from celltyper.instances import build_instances
    from celltyper.labels import mean_in_labels

    decode = build_instances(method).decode
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        labels = decode(maps)
        table = mean_in_labels(labels, maps["type"])
        types = np.concatenate([[0], 1 + table[:, 1:].argmax(1)]).astype(np.uint8)
        seconds.append(time.perf_counter() - start)
    return min(seconds), labels, types


class Quality:
    """Panoptic sums over images: bPQ, and mPQ as the mean over classes of pooled sums (mPQ+)."""

    def __init__(self) -> None:
        self.binary, self.counts, self.seconds = np.zeros(4), np.zeros((CLASSES, 4)), []

    def add(
        self,
        truth: tuple[np.ndarray, np.ndarray],
        labels: np.ndarray,
        types: np.ndarray,
        seconds: float,
    ) -> None:
        """Add one image."""
        from celltyper.metrics import multiclass_panoptic_quality

        result = multiclass_panoptic_quality(*truth, labels, types, CLASSES)
        self.binary += result.binary
        self.counts += result.counts
        self.seconds.append(seconds)

    def __str__(self) -> str:
        from celltyper.metrics import mpq_plus, pq_of_counts

        return f"{float(pq_of_counts(self.binary)):.3f} | {float(mpq_plus(self.counts)):.3f}"


class Peer:
    """A running process of the peer's environment."""

    def __init__(self, python: Path) -> None:
        command = [python, __file__, "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self.answer() != "ready":
            raise SystemExit("the peer did not start; see the docstring for its packages")

    def answer(self) -> str:
        """Next line of the process."""
        return self.process.stdout.readline().strip()  # type: ignore[union-attr]

    def decode(self, maps: dict[str, np.ndarray], repeats: int) -> tuple[Any, ...]:
        """Best time, labels and class table of the peer."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for key, values in maps.items():
                np.save(folder / f"{key}.npy", values)
            self.process.stdin.write(f"{folder} {repeats}\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
            seconds = json.loads(self.answer())
            return seconds, np.load(folder / "labels.npy"), np.load(folder / "types.npy")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def main() -> None:
    """Print one line for each kind of maps and size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with cellvit")
    parser.add_argument("--data", type=Path, help="folder of annotated images for real maps")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--peer-up-to", type=int, default=2048, help="largest size of the peer")
    parser.add_argument("--pixels", type=int, default=5 << 20, help="images make up so many")
    parser.add_argument("--method", default="hv", help="instance method; the peer knows hv only")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        peer_serve()
        return
    peer = Peer(args.peer_python) if args.peer_python else None
    if peer is None:
        print("no --peer-python: ours alone; the docstring says how to install the peer")

    print(
        "| maps | px | images | nuclei | ours ms | ns/px | bPQ | mPQ+ | peer ms | bPQ | mPQ+ | x |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for kind in KINDS if args.data else KINDS[:2]:
        for size in args.sizes:
            mine, theirs = Quality(), Quality()
            images = min(max(args.pixels // size**2, 1), 27)
            nuclei = 0
            for seed in range(images):
                truth = (
                    annotated(args.data, size, seed) if kind == "real" else synthetic(size, seed)
                )
                nuclei += len(np.unique(truth[0])) - 1
                maps = as_predicted(*truth, kind, seed, args.method)
                if seed == 0:
                    ours(maps, 1, args.method)
                seconds, labels, types = ours(maps, 3, args.method)
                mine.add(truth, labels, types, seconds)
                if peer and size <= args.peer_up_to:
                    seconds, labels, types = peer.decode(maps, 2 if size < 2048 else 1)
                    theirs.add(truth, labels, types, seconds)
            time_mine = np.mean(mine.seconds)
            line = (
                f"| {kind} | {size} | {images} | {nuclei} | {1e3 * time_mine:.1f} "
                f"| {time_mine / size**2 * 1e9:.0f} | {mine} "
            )
            if theirs.seconds:
                time_theirs = np.mean(theirs.seconds)
                line += f"| {1e3 * time_theirs:.0f} | {theirs} | {time_theirs / time_mine:.0f} |"
            else:
                line += "| | | | |"
            print(line, flush=True)
    if peer:
        peer.close()


if __name__ == "__main__":
    main()
