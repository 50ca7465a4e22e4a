"""One LoRA training step, side by side with plain peft on the timm model.

python tools/bench_lora.py [--encoder vit_large_patch16] [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from celltyper.encoders import load_card, load_encoder

SIDES = ("peft", "celltyper")
RANK, ALPHA, DROPOUT = 8, 16.0, 0.1


def ours(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Adapt by celltyper; the loss is on the last map."""
    lora = {"rank": RANK, "alpha": ALPHA, "dropout": DROPOUT, "targets": "attention"}
    encoder = load_encoder(name, "random", "lora", lora=lora)
    return encoder, lambda images: encoder(images)[-1].square().mean()


def plain(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Adapt by peft as its documentation shows it; the loss is on the same tokens."""
    card = load_card(name)
    model = timm.create_model(card.timm_name, num_classes=0, **card.timm_args)
    first = model.num_prefix_tokens
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=["qkv"])
    adapted = get_peft_model(model, config)
    return adapted, lambda images: model.forward_features(images)[:, first:].square().mean()


def stepper(side: str, name: str) -> Callable[[Tensor], None]:
    """Give the training step of a side, and say how many weights it trains."""
    module, loss = (ours if side == "celltyper" else plain)(name)
    trained = [p for p in module.parameters() if p.requires_grad]
    print(f"{side}: {sum(p.numel() for p in trained):,} trained", file=sys.stderr)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    module.train()

    def step(images: Tensor) -> None:
        loss(images).backward()
        torch.nn.utils.clip_grad_norm_(trained, 2.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Print seconds, memory and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="vit_large_patch16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="busy machine: one thread, CPU time")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    clock = time.process_time if options.busy else time.perf_counter
    torch.set_num_threads(1 if options.busy else options.threads)
    images = torch.rand(options.batch, 3, options.side, options.side)
    if options.memory_of:
        stepper(options.memory_of, options.encoder)(images)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return

    peak = {}
    for side in SIDES:
        # a process of its own, because the peak of a process never falls
        command = [sys.executable, *sys.argv, "--memory-of", side]
        # a fixed limit: the allocator of glibc learns its own from chance otherwise
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        peak[side] = float(run.stdout)
    steps = {side: stepper(side, options.encoder) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(options.rounds + 1):
        # who goes first changes, so that neither profits from a warm cache
        for side in SIDES if number % 2 else SIDES[::-1]:
            start = clock()
            steps[side](images)
            if number:
                seconds[side].append(clock() - start)
    ratios = [a / b for a, b in zip(seconds["celltyper"], seconds["peft"], strict=True)]
    print(f"{options.encoder}, batch {options.batch}, {options.side} px, float32")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {clock.__name__}\n")
    print("| | s a step (median) | peak memory, GiB |\n|---|---|---|")
    for side in SIDES:
        print(f"| {side} | {statistics.median(seconds[side]):.2f} | {peak[side]:.2f} |")
    print(f"| ratio | {statistics.median(ratios):.3f} | {peak['celltyper'] / peak['peft']:.3f} |")
    print(f"\nratios of the turns: {', '.join(f'{r:.3f}' for r in ratios)}")


if __name__ == "__main__":
    main()
