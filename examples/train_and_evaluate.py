"""Train and evaluate: ``python train_and_evaluate.py DATA RUN [KEY=VALUE ...]``.

DATA holds ``train``, ``val`` and ``test``, each a folder with ``images/*.png``, ``labels/*.npz``
(``inst`` and ``type``) and ``meta.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import celltyper


def main(data: str, run: str, *overrides: str) -> None:
    """Train on DATA/train, evaluate on DATA/test."""
    config = celltyper.load_config("demo", [f"data.root={data}", *overrides])
    celltyper.train(config, run)

    model = celltyper.load_model(run)
    test = celltyper.open_dataset(Path(data) / "test")
    predictions = [celltyper.predict_image(model, s.image, s.mpp, name=s.name) for s in test]
    summary = celltyper.evaluate(predictions, test)
    for name, score in summary.scores.items():
        print(f"{name:14} {score.value:.3f}  ({score.low:.3f} to {score.high:.3f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
