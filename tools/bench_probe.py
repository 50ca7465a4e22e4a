"""A probe on kept embeddings, side by side with the encoder run in every fold and epoch.

python tools/bench_probe.py --data AMI-BR --weights DINOV2_VITS14 [--epochs 1] [--threads 2]

The second way is that of the published scripts: a linear layer on a frozen encoder, trained for
some epochs of batch 8 in each of five folds, the held-out fold scored after every epoch. `--epochs`
of them are run; a whole training has up to 100.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from celltyper.classification.config import PatchConfig
from celltyper.classification.model import build_embedder
from celltyper.classification.network import as_images
from celltyper.classification.preparing import open_labelled
from celltyper.config import load_config
from celltyper.patches.windows import read_patch
from celltyper.protocols import load_protocol, run_patch_protocol
from celltyper.protocols.patch_writing import report_patch_protocol
from celltyper.protocols.patches import read_typed


def main() -> None:
    """Print passes and seconds of both ways, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = [f"data.root={options.data}", f"encoder.weights={options.weights}"]
    config = load_config("mitosis-probe", given, PatchConfig)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CELLTYPER_CACHE"] = f"{folder}/cache"
        seconds = {}
        for which in ("with the encoder's pass", "embeddings kept"):
            started = time.perf_counter()
            output = Path(folder) / which.split()[0]
            run_patch_protocol(config, load_protocol("cv"), output, progress=False)
            report_patch_protocol(output)
            seconds[which] = time.perf_counter() - started
        folds = [read_typed(output / f"fold-{i}" / "scores.npz").names for i in range(1, 6)]
    table = open_labelled(config.data, progress=False)
    print(f"{len(table)} windows, 5 folds, regularisation, scores, intervals:")
    for which, value in seconds.items():
        print(f"  {which:28} {value:7.1f} s")
    started, passes = time.perf_counter(), 0
    embedder, size = build_embedder(config), config.data.size or 0
    for names in folds:
        held_out = set(names)
        head = None
        for _ in range(options.epochs):
            for train in (True, False):
                rows = [i for i, n in enumerate(table.names) if (n not in held_out) == train]
                for start in range(0, len(rows), 8):
                    part = rows[start : start + 8]
                    windows = np.stack([read_patch(table, i, size=size, mpp=0.25) for i in part])
                    with torch.no_grad():
                        found = embedder(as_images(windows))
                    passes += len(part)
                    if head is None:
                        head = torch.nn.Linear(found.shape[1], len(table.classes))
                        optimizer = torch.optim.Adam(head.parameters(), 1e-4)
                    loss = torch.nn.functional.cross_entropy(
                        head(found), torch.from_numpy(table.labels[part])
                    )
                    if train:
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
    spent = time.perf_counter() - started
    whole = seconds["with the encoder's pass"]
    print(
        f"encoder in every fold, {options.epochs} epoch{'s' * (options.epochs > 1)}: {spent:.1f} s"
    )
    print(f"  encoder passes {passes} against {len(table)}: {passes / len(table):.0f} times")
    print(f"  time: {spent / whole:.1f} times, of {options.epochs} epoch(s)")
    each = spent / options.epochs
    print(f"  100 epochs, extrapolated: {100 * each / 3600:.1f} h, {100 * each / whole:.0f} times")


if __name__ == "__main__":
    main()
