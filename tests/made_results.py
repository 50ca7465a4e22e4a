"""Folders as inference writes them, from label images whose cells are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from celltyper.cells.outlines import Place
from celltyper.cells.table import cells_table
from celltyper.types import Labels, Prediction

CLASSES = ("tumour", "stroma", "other")
COLORS = ("#d55e00", "#009e73", "#0a0B0c")


def noise(shape: tuple[int, int], cells: int = 60, seed: int = 1) -> Labels:
    """Labels 1..n that are torn into many pieces, with holes."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(1, cells + 1, (shape[0] // 9 + 1, shape[1] // 9 + 1))
    labels = coarse.repeat(9, axis=0).repeat(9, axis=1)[: shape[0], : shape[1]]
    labels = labels * (rng.random(shape) < 0.8) * (coarse % 3 > 0).repeat(9, 0).repeat(9, 1)[
        : shape[0], : shape[1]
    ]  # fmt: skip
    return np.unique(labels, return_inverse=True)[1].reshape(shape).astype(np.int32)


def made_cells(
    labels: Labels, mpp: float | None = 0.25, name: str = "one", place: Place | None = None
) -> pa.Table:
    """A table of cells, of known mpp of the labels, with made probabilities."""
    n = int(labels.max())
    probabilities = np.random.default_rng(5).dirichlet(np.ones(4), n).reshape(n, 4)
    maps = np.zeros((4, *labels.shape), np.float32)
    cells = probabilities.astype(np.float32)
    prediction = Prediction(labels, maps, cells, CLASSES, mpp, name, COLORS)
    return cells_table(prediction, image=name, place=place)


def phenotypes_of(table: pa.Table) -> NDArray[np.uint8]:
    """Phenotype 1..K by cell id, 0 for background."""
    kinds = np.zeros(table.num_rows + 1, np.uint8)
    names = table["phenotype"].to_pylist()
    kinds[table["cell_id"].to_numpy()] = [CLASSES.index(name) + 1 for name in names]
    return kinds


def write_results(
    folder: Path,
    tables: dict[str, pa.Table],
    shape: tuple[int, int],
    images: dict[str, Path] | None = None,
    **more: Any,
) -> Path:
    """Write a folder of results, without what is not needed to export cells."""
    entries = []
    for name, table in tables.items():
        place = "." if len(tables) == 1 else name
        (folder / place).mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / place / "cells.parquet", row_group_size=16)
        entries.append(
            {
                "name": name,
                "image": str((images or {}).get(name, folder / "gone.png")),
                "folder": place,
                "height": shape[0],
                "width": shape[1],
                "mpp": 0.25,
                "cells": table.num_rows,
                "seconds": 1.0,
            }
        )
    facts = {
        "celltyper": "0.1.0",
        "model": "/runs/one",
        "classes": list(CLASSES),
        "colors": list(COLORS),
        "model_mpp": 0.5,
        "images": entries,
        "failed": [],
    }
    (folder / "infer.json").write_text(json.dumps(facts | more))
    return folder
