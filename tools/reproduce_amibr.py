"""AMi-Br: atypical or normal mitosis, 5-fold cross-validation beside the published figures.

python tools/reproduce_amibr.py --data AMI-BR --weights DINOV2_VITS14 -o amibr

AMI-BR is the training part: class folders, and the table of slides and votes. Writes the folds of a
probe and of a trained-on encoder; `celltyper eval amibr/folds FOLDER` applies the latter to any
folder of patches. Started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from celltyper.classification.config import PatchConfig
from celltyper.config import load_config
from celltyper.protocols import load_protocol, run_patch_protocol
from celltyper.protocols.patch_writing import report_patch_protocol

# Table of AMi-Br in the published benchmark, its test part: balanced accuracy, AUROC
PUBLISHED = {
    "best linear probe": (0.648, 0.717),
    "best LoRA (Virchow2)": (0.8135, 0.903),
}
RECIPES = {"probe": "mitosis-probe", "folds": "mitosis"}
SHOWN = ("balanced_accuracy", "auroc", "auprc", "f1")


def main() -> None:
    """Train, test and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lines = [
        "| | balanced accuracy | AUROC | AUPRC | F1 | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for folder, recipe in RECIPES.items():
        started = time.monotonic()
        given = [f"data.root={options.data}", f"encoder.weights={options.weights}"]
        config = load_config(recipe, [*given, *options.overrides], PatchConfig)
        output = run_patch_protocol(
            config,
            load_protocol("cv"),
            options.output / folder,
            device=options.device,
            resume=True,
        )
        minutes = (time.monotonic() - started) / 60
        scores = report_patch_protocol(output).rows[0].scores
        cells = [f"{scores[s].mean:.3f} ± {scores[s].deviation:.3f}" for s in SHOWN]
        lines.append(f"| {recipe}, 5 folds | {' | '.join(cells)} | {minutes:.1f} |")
    for name, (accuracy, auroc) in PUBLISHED.items():
        lines.append(f"| published, {name}, test part | {accuracy} | {auroc} | - | - | - |")
    text = "\n".join(lines)
    (options.output / "amibr.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nmean and deviation over folds of whole slides; minutes of this start")
    print(f"models: {options.output / 'folds'} (celltyper eval {options.output / 'folds'} PATCHES)")


if __name__ == "__main__":
    main()
