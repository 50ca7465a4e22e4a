"""CoNSeP, end to end: 3-fold cross-validation beside HoVer-Net; the folds' models are the model.

python tools/reproduce_consep.py --data CONSEP --weights DINOV2_VITS14 -o consep

CONSEP is the published folder or the 27 training images in another layout; only images of its
split `train` are used if it names one. Started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from celltyper.config import load_config
from celltyper.protocols import Protocol, report_protocol, run_protocol
from celltyper.protocols.table import Figure

# Graham et al. 2019, doi:10.1016/j.media.2019.101563, test images of CoNSeP: tables 4 and 5
PUBLISHED = {
    "bpq": 0.547,
    "aji": 0.571,
    "detection_f1": 0.748,
    "epithelial": 0.635,
    "inflammatory": 0.631,
    "spindle-shaped": 0.566,
}
NAMES = {"bpq": "PQ", "aji": "AJI", "detection_f1": "detection F1"}


def main() -> None:
    """Train, test and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    config = load_config(
        "consep",
        [f"data.root={options.data}", f"encoder.weights={options.weights}", *options.overrides],
    )
    # A fourth model of all images would cost each fold a quarter of its steps, and the mean of the
    # folds' maps measures better than one model: `celltyper infer IMAGES -m consep`.
    folds = options.output
    run_protocol(config, Protocol(folds=options.folds), folds, device=options.device, resume=True)
    minutes = (time.monotonic() - started) / 60
    row = report_protocol(folds).rows[0]
    figures: dict[str, Figure] = {name: row.scores[name] for name in NAMES}
    figures |= {name: scores["typed_f1"] for name, scores in row.per_class.items()}
    lines = [
        f"| | {options.folds}-fold, training images | 95 % interval | HoVer-Net, test images |",
        "|---|---|---|---|",
    ]
    for name, figure in figures.items():
        known = f"{PUBLISHED[name]:.3f}" if name in PUBLISHED else "-"
        lines.append(
            f"| {NAMES.get(name, f'F1 {name}')} | {figure.mean:.3f} ± {figure.deviation:.3f} "
            f"| {figure.low:.3f} to {figure.high:.3f} | {known} |"
        )
    macro = row.scores["macro_f1"]
    lines.append(f"| macro F1 | {macro.mean:.3f} | {macro.low:.3f} to {macro.high:.3f} | - |")
    text = "\n".join(lines)
    (options.output / "consep.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nmean and deviation over folds; intervals over {row.clusters}")
    print(f"{minutes:.0f} minutes in this start; model: {folds}")


if __name__ == "__main__":
    main()
