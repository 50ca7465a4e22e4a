"""Time the scores of two label images, beside ``stardist.matching``.

    python tools/bench_metrics.py [--peer-python OTHER_ENVIRONMENT/bin/python]

stardist brings TensorFlow's world with it, so it lives in an environment of its own::

    python -m venv stardist-env
    stardist-env/bin/pip install --no-deps stardist csbdeep
    stardist-env/bin/pip install numpy numba scipy scikit-image tqdm six

Both sides score the same two images in the same run, one after the other, single thread. The
first call, in which numba compiles, is left out on both sides. stardist matches at "IoU at least
the threshold", the panoptic quality at "more than one half": the peer gets the next number after
one half, so that pairs at exactly one half do not part the two.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PEER = """
import json, sys, time
import numpy as np
from stardist.matching import matching
pair = np.load(sys.argv[1])
times = []
above_half = float(np.nextafter(np.float32(0.5), np.float32(1)))
for _ in range(int(sys.argv[2]) + 1):
    start = time.perf_counter()
    found = matching(pair["reference"], pair["predicted"], thresh=above_half)
    times.append(time.perf_counter() - start)
keep = dict(pq=float(found.panoptic_quality), tp=found.tp, fp=found.fp, fn=found.fn)
print(json.dumps(dict(times=times[1:], **keep)))
"""


def nuclei(seed: int, size: int, grid: int) -> np.ndarray:
    """Ellipse-like nuclei, at most one a grid cell, with their ids in random order."""
    rng = np.random.default_rng(seed)
    step = size / grid
    rows, cols = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.int32)
    for i, number in enumerate(rng.permutation(grid * grid) + 1):
        r, c = (np.array(divmod(i, grid)) + 0.5) * step + rng.normal(0, 1.5, 2)
        a, b = rng.uniform(0.28, 0.45, 2) * step
        box = np.s_[
            max(0, int(r - step)) : int(r + step) + 1, max(0, int(c - step)) : int(c + step) + 1
        ]
        inside = ((rows[box] - r) / a) ** 2 + ((cols[box] - c) / b) ** 2 <= 1
        labels[box][inside & (labels[box] == 0)] = number
    return labels


def clock(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of every call after a first one that is thrown away."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="python of an environment that has stardist")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--grid", type=int, default=32, help="nuclei a side")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()

    from celltyper import metrics

    reference, predicted = (nuclei(seed, args.size, args.grid) for seed in (1, 2))
    rng = np.random.default_rng(0)
    ref_types, pred_types = rng.integers(1, 6, (2, args.grid**2 + 1)).astype(np.uint8)
    typed = (reference, ref_types, predicted, pred_types, 5)
    rows = {
        "panoptic quality": lambda: metrics.panoptic_quality(reference, predicted),
        "five-class mPQ and bPQ": lambda: metrics.multiclass_panoptic_quality(*typed),
        "AJI": lambda: metrics.aji(reference, predicted),
        "AJI+": lambda: metrics.aji_plus(reference, predicted),
        "detection, 12 px": lambda: metrics.detection(*typed, radius=12),
    }
    print(f"{args.size} x {args.size} px, {args.grid**2} nuclei each; after warm-up; milliseconds")
    print("| score | median | best |\n|---|---|---|")
    medians = {}
    for name, call in rows.items():
        times = clock(call, args.repeats)
        medians[name] = float(np.median(times))
        print(f"| {name} | {1e3 * np.median(times):.2f} | {1e3 * min(times):.2f} |")
    if not args.peer_python:
        print("stardist.matching: skipped, pass --peer-python (see the top of this file)")
        return
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder) / "pair.npz"
        np.savez(pair, reference=reference, predicted=predicted)
        command = [args.peer_python, "-c", PEER, str(pair), str(args.repeats)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peer = json.loads(answer.stdout.splitlines()[-1])
    times = peer["times"]
    print(f"| stardist.matching | {1e3 * np.median(times):.2f} | {1e3 * min(times):.2f} |")
    ours = metrics.panoptic_quality(reference, predicted)
    ratio = float(np.median(times)) / medians["panoptic quality"]
    print(f"PQ {ours.pq:.8f}, theirs {peer['pq']:.8f}: {abs(ours.pq - peer['pq']):.1e} apart")
    same = (ours.tp, ours.fp, ours.fn) == (peer["tp"], peer["fp"], peer["fn"])
    print(f"tp, fp, fn equal: {same}; {ratio:.1f} times faster (medians)")
    if not same or abs(ours.pq - peer["pq"]) > 1e-6:
        sys.exit("the two disagree")


if __name__ == "__main__":
    main()
