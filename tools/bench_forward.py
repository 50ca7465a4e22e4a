"""Time encoders and decoders on one 256 px tile, side by side with timm's own forward.

python tools/bench_forward.py [--encoder vit_small_patch16] [--threads 2] [--compile]
python tools/bench_forward.py --encoder swin_base_patch4_window7 --tile 224 --encoder-only
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from celltyper.decoders import build_decoder
from celltyper.encoders import load_encoder

WIDTHS = {
    "linear": (32, 64),
    "unetr": (8, 16, 24, 32, 64),
    "dpt": (32, 64, 96, 128, 256),
    "unet": (8, 16, 32),
}


def seconds(
    calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Take turns, so that a busy machine slows all alike; the fastest turn of each counts."""
    best = dict.fromkeys(calls, float("inf"))
    with torch.inference_mode():
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                start = clock()
                call()
                best[name] = min(best[name], clock() - start)
    return best


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="vit_small_patch16")
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument(
        "--busy", action="store_true", help="for a busy machine: one thread, CPU time"
    )
    parser.add_argument("--encoder-only", action="store_true", help="leave out the decoders")
    options = parser.parse_args()
    clock = time.process_time if options.busy else time.perf_counter
    options.threads = 1 if options.busy else options.threads
    torch.set_num_threads(options.threads)

    encoder: Any = load_encoder(options.encoder, weights="random")
    model = encoder.encoder.model
    images = torch.rand(1, 3, options.tile, options.tile)
    p = encoder.patch_size
    side = -(-options.tile // p) * p
    # what timm is given: an image that its patches divide, already normalised
    ready = torch.rand(1, 3, side, side)
    with torch.inference_mode():
        features = encoder(images)

    print(f"{options.encoder}, {options.tile} px tile, {options.threads} threads, float32")
    print(f"torch {torch.__version__}, best of {options.rounds}, {clock.__name__}\n")
    calls = {"timm forward_features": lambda: model.forward_features(ready)}
    calls["celltyper encoder"] = lambda: encoder(images)
    if options.compile:
        compiled = torch.compile(encoder)
        calls["celltyper encoder, compiled"] = lambda: compiled(images)
    times = seconds(calls, 2 * options.rounds, clock)
    base = times["timm forward_features"]
    print("| encoder | s per tile | against timm |\n|---|---|---|")
    for name, value in times.items():
        print(f"| {name} | {value:.4f} | {value / base:.3f} |")

    if options.encoder_only:
        return
    own = times["celltyper encoder"]
    print("\n| decoder | width | channels out | parameters | s per tile | with encoder |")
    print("|---|---|---|---|---|---|")
    for name, widths in WIDTHS.items():
        for width in widths:
            strides = getattr(encoder, "strides", None)
            decoder = build_decoder(name, encoder.channels, p, strides, width=width).eval()
            runs: dict[str, Callable[[], Any]] = {"": lambda d=decoder: d(features, images)}
            if options.compile:
                faster = torch.compile(decoder)
                runs[", compiled"] = lambda d=faster: d(features, images)
            count = sum(q.numel() for q in decoder.parameters()) / 1e6
            for how, value in seconds(runs, max(3, options.rounds // 3), clock).items():
                print(
                    f"| {name}{how} | {width} | {decoder.out_channels} | {count:.2f} M "
                    f"| {value:.4f} | {own + value:.4f} |"
                )


if __name__ == "__main__":
    main()
