"""What a model said of windows, as tables and as GeoJSON for QuPath."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from celltyper.atomic import atomic_path
from celltyper.calibration import ABSTAINED
from celltyper.cells.colors import UNTYPED, default_colors, rgb
from celltyper.metrics.confusion import call_classes
from celltyper.patches.table import PatchTable

Values = NDArray[np.float64]


def typed_table(
    table: PatchTable,
    probabilities: Values,
    positive: int,
    threshold: float,
    columns: Mapping[str, Sequence[Any]] | None = None,
    least: float = 0.0,
) -> pa.Table:
    """One row per window: where it is, its class, and how sure that is.

    Parameters
    ----------
    table : PatchTable
        Of n windows.
    probabilities : ndarray of float64, shape (M, n, K)
        Of every model.
    positive : int
        The positive class.
    threshold : float
        Mean probability from which a window is called positive.
    columns : mapping of str to sequence, optional
        Put behind the place of the window.
    least : float
        Windows whose largest mean probability is below are "unknown".

    Returns
    -------
    pyarrow.Table
        ``name``, ``file``, of points ``x`` and ``y``, then `columns`, ``type``, ``p_<class>`` (mean
        over models), ``entropy_bits`` of that mean, and of several models ``deviation``: standard
        deviation (M - 1) of their probability of the positive class.
    """
    mean = probabilities.mean(axis=0)
    called = call_classes(mean, positive, threshold)
    found: dict[str, Any] = {
        "name": table.names,
        "file": [str(file.absolute()) for file in table.files],
    }
    if np.isfinite(table.centers).any():
        found |= {"x": table.centers[:, 0], "y": table.centers[:, 1]}
    found |= columns or {}
    named = mean.max(axis=1, initial=0) >= least
    found["type"] = [
        table.classes[k] if known else ABSTAINED for k, known in zip(called, named, strict=True)
    ]
    found |= {f"p_{name}": mean[:, k] for k, name in enumerate(table.classes)}
    found["entropy_bits"] = entropy_bits(mean)
    if len(probabilities) > 1:
        found["deviation"] = probabilities[:, :, positive].std(axis=0, ddof=1)
    return pa.table({name: pa.array(values) for name, values in found.items()})


def entropy_bits(probabilities: Values) -> Values:
    """Entropy of probabilities (n, K) in bits: 0 if one class is certain, log2 K if none is."""
    logs = np.log2(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    entropy: Values = -(probabilities * logs).sum(axis=1)
    # -0.0 reads as if something were missing
    return entropy + 0.0


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as CSV or Parquet, as the name of the file says, atomically."""
    with atomic_path(path) as temporary:
        if path.suffix == ".csv":
            pyarrow.csv.write_csv(table, temporary)
        else:
            pq.write_table(table, temporary, compression="zstd")


def write_typed_points(
    path: Path, features: Sequence[Mapping[str, Any]], typed: pa.Table, classes: Sequence[str]
) -> None:
    """Write points or outlines with their class for QuPath, atomically.

    Parameters
    ----------
    path : Path
    features : sequence of mapping
        GeoJSON Features in the order of the rows. Identity, geometries and other properties stay;
        objects of no stated kind become detections.
    typed : pyarrow.Table
        From `typed_table`.
    classes : sequence of str
        The K names; they decide the colors.
    """
    kinds = {
        name: {"name": name, "color": rgb(color)}
        for name, color in zip(classes, default_colors(classes), strict=True)
    }
    kinds.setdefault(ABSTAINED, {"name": ABSTAINED, "color": rgb(UNTYPED)})
    measured = [n for n in typed.column_names if n.startswith("p_")]
    measured += [n for n in ("entropy_bits", "deviation") if n in typed.column_names]
    rows = typed.select(["type", *measured]).to_pylist()
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for i, (feature, row) in enumerate(zip(features, rows, strict=True)):
            own = feature.get("properties") or {}
            values = {name: round(row[name], 6) for name in measured}
            properties = {
                "objectType": "detection",
                **own,
                "classification": kinds[row["type"]],
                "measurements": measurements_of(feature) | values,
            }
            text = json.dumps({**feature, "properties": properties}, separators=(",", ":"))
            file.write(",\n" * (i > 0) + "\n" * (i == 0) + text)
        file.write("\n]}\n")


def measurements_of(feature: Mapping[str, Any]) -> dict[str, int | float]:
    """Measurements of a GeoJSON Feature; QuPath 0.3 wrote a list of names and values."""
    raw = (feature.get("properties") or {}).get("measurements") or {}
    if isinstance(raw, list):
        raw = {str(m.get("name")): m.get("value") for m in raw if isinstance(m, dict)}
    # JSON has no NaN
    return {name: v for name, v in raw.items() if isinstance(v, int | float) and math.isfinite(v)}
