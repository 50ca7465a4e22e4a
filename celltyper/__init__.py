"""Finds every nucleus on an H&E image, outlines it and names its phenotype.

The public names below are imported when they are first used, so that ``import celltyper`` and
``celltyper --help`` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celltyper import testing
    from celltyper.cells.table import cells_table
    from celltyper.checkpoints import load_model
    from celltyper.config import load_config
    from celltyper.datasets import read_image
    from celltyper.encoders import load_encoder
    from celltyper.evaluation import evaluate
    from celltyper.inference import infer
    from celltyper.models import CellTyper
    from celltyper.predict import predict_image
    from celltyper.readers import open_dataset
    from celltyper.training import train
    from celltyper.types import Prediction, Sample

__version__ = "0.1.0"

_PUBLIC = {
    "CellTyper": "models",
    "Prediction": "types",
    "Sample": "types",
    "cells_table": "cells.table",
    "evaluate": "evaluation",
    "infer": "inference",
    "load_config": "config",
    "load_encoder": "encoders",
    "load_model": "checkpoints",
    "open_dataset": "readers",
    "predict_image": "predict",
    "protocol_table": "protocols",
    "read_image": "datasets",
    "run_protocol": "protocols",
    "train": "training",
}

__all__ = [
    "CellTyper",
    "Prediction",
    "Sample",
    "cells_table",
    "evaluate",
    "infer",
    "load_config",
    "load_encoder",
    "load_model",
    "open_dataset",
    "predict_image",
    "protocol_table",
    "read_image",
    "run_protocol",
    "testing",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("celltyper.testing")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'celltyper' has no attribute {name!r}")
    return getattr(import_module(f"celltyper.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
