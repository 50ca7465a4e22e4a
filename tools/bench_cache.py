"""A step of decoder training on kept features, side by side with one that runs the encoder.

python tools/bench_cache.py --weights FILE [--rounds 5] [--threads 2] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from celltyper.config import load_config
from celltyper.datasets.tiles import TileSampler
from celltyper.features import FeatureCache
from celltyper.loop import Loop
from celltyper.models import build_model
from celltyper.targets import KeptTiles, Targets, TrainingTiles, view
from celltyper.types import Sample


def made(size: int, rng: np.random.Generator) -> Sample:
    """Give an image of noise with a nucleus of 24 px in every square of 40."""
    rows, cols = np.mgrid[:size, :size]
    ids = (rows // 40) * (size // 40 + 1) + cols // 40 + 1
    inside = (rows % 40 - 20) ** 2 + (cols % 40 - 20) ** 2 < 144
    labels = np.where(inside, ids, 0).astype(np.int32)
    kinds = np.r_[0, 1 + np.arange(labels.max()) % 4].astype(np.uint8)
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Sample(image, labels, kinds, "made", "made", 0.25)


def main() -> None:
    """Print seconds of a step, of the features, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="random")
    parser.add_argument("--recipe", default="consep")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = load_config(options.recipe, [f"encoder.weights={options.weights}"])
    sample = made(1000, np.random.default_rng(0))
    classes = ["other", "inflammatory", "epithelial", "spindle-shaped"]
    model = build_model(config, classes, 0.25).to(options.device)
    accelerator = Accelerator(cpu=options.device == "cpu")
    loop = Loop(config, model, accelerator, None)
    targets = Targets([sample], model.instances)
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(
            model.encoder,
            Path(folder),
            tile=model.tile,
            overlap=model.overlap,
            limit=10**11,
            batch_size=config.infer.batch_size,
        )
        start = time.perf_counter()
        canvas = cache.canvas(sample.image)
        once = time.perf_counter() - start
        side = cache.rounded(config.data.tile)
        kept = KeptTiles(TileSampler([sample], side, 0.5, 0), targets, [canvas], cache.patch)
        fresh = TrainingTiles(
            TileSampler([sample], round(1.25 * side), 0.5, 0),
            targets,
            config.model_copy(update={"data": config.data.model_copy(update={"tile": side})}),
        )
        start = time.perf_counter()
        view(sample, 1, config.augment)
        augmenting = time.perf_counter() - start
        seconds: dict[str, list[float]] = {"encoder": [], "kept": []}
        for number in range(options.rounds + 1):
            for name, tiles in (("encoder", fresh), ("kept", kept)):
                batch_size = config.train.batch_size
                first = number * batch_size
                indices = range(first, first + batch_size)
                start = time.perf_counter()
                batch = next(iter(DataLoader(tiles, batch_size, sampler=indices)))
                loop.step({k: v.to(options.device) for k, v in batch.items()}, number)
                if number:
                    seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["encoder"], seconds["kept"], strict=True)]
    print(f"{config.encoder.name}, recipe {options.recipe}, {batch_size} tiles of {side} px")
    print(f"torch {torch.__version__}, {options.threads} threads, {options.device}\n")
    print("| step | s (median) |\n|---|---|")
    print(f"| encoder in every step | {statistics.median(seconds['encoder']):.2f} |")
    print(f"| kept features | {statistics.median(seconds['kept']):.2f} |")
    print(f"| ratio | {statistics.median(ratios):.1f} |")
    print(f"\nonce a view of 1000 x 1000 px: {once:.1f} s features, {augmenting:.1f} s augmenting")
    print(f"ratios of the turns: {', '.join(f'{r:.1f}' for r in ratios)}")


if __name__ == "__main__":
    main()
