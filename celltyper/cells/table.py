"""One row per cell: position, size, phenotype, probabilities, outline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from celltyper.atomic import atomic_path
from celltyper.cells.outlines import Outlines, outlines
from celltyper.cells.wkb import to_wkb
from celltyper.errors import DataError
from celltyper.labels import centroids, label_boxes
from celltyper.types import Prediction

_REQUIRED = ("cell_id", "x", "y", "area_um2", "area_px", "phenotype", "probability", "outline")


def cells_table(
    prediction: Prediction,
    mpp: float | None = None,
    *,
    image: str | None = None,
    found: Outlines | None = None,
) -> pa.Table:
    """One row per cell of a prediction, as described in ``docs/outputs.md``.

    Parameters
    ----------
    prediction : Prediction
        Labels must be ``1..n`` for n cells.
    mpp : float, optional
        Micrometres per pixel of the labels; by default ``prediction.mpp``. If both are None,
        ``area_um2`` is null.
    image : str, optional
        If given, the first column ``image`` holds it in every row.
    found : Outlines, optional
        `outlines` of the labels, if they are known already.

    Returns
    -------
    pyarrow.Table
        ``cell_id`` is the label, ``x, y`` the centroid in pixels (the centre of pixel [0, 0] is
        (0.5, 0.5)), ``phenotype`` the most probable foreground class, ``probability`` its mean
        softmax inside the cell (not renormalised without background). Without cells, zero rows
        and the same columns. The schema's metadata has ``geo`` (GeoParquet 1.1) and
        ``celltyper`` (classes, colors, mpp).

    Raises
    ------
    DataError
        If labels and cell probabilities do not belong together, or class names would give two
        columns of one name.
    """
    mpp = prediction.mpp if mpp is None else mpp
    classes, n = prediction.classes, len(prediction)
    if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
        raise DataError(f"mpp must be a positive number of micrometres per pixel, got {mpp}")
    boxes = label_boxes(prediction.labels)
    if not np.array_equal(boxes.ids, np.arange(1, n + 1)):
        raise DataError(
            f"image {prediction.name!r}: labels must be 1..{n} for {n} rows of cell "
            f"probabilities, got {len(boxes.ids)} labels up to {boxes.ids.max(initial=0)}"
        )
    probabilities = np.asarray(prediction.cell_probabilities, np.float32)
    if probabilities.shape != (n, len(classes) + 1):
        raise DataError(
            f"image {prediction.name!r}: cell probabilities must be (n, {len(classes) + 1}) "
            f"for {len(classes)} classes, got {probabilities.shape}"
        )
    found = outlines(prediction.labels) if found is None else found
    centers = centroids(prediction.labels) + 0.5
    phenotypes = prediction.phenotypes[1:]
    unknown = np.full(n, mpp is None)
    columns: list[tuple[str, Any]] = [] if image is None else [("image", _same(image, n))]
    columns += [
        ("cell_id", pa.array(boxes.ids, pa.int32())),
        ("x", pa.array(centers[:, 1], pa.float64())),
        ("y", pa.array(centers[:, 0], pa.float64())),
        ("area_um2", pa.array(boxes.area * (mpp or 0.0) ** 2, pa.float64(), mask=unknown)),
        ("area_px", pa.array(boxes.area, pa.int64())),
        ("phenotype", _phenotype_column(phenotypes.astype(np.int16), classes)),
        ("probability", pa.array(probabilities[np.arange(n), phenotypes], pa.float32())),
    ]
    for k, name in enumerate(("background", *classes)):
        columns.append((f"p_{name}", pa.array(probabilities[:, k], pa.float32())))
    columns.append(("outline", to_wkb(found)))
    names = [name for name, _ in columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"two columns named {', '.join(twice)}: rename one of the classes")
    facts = {"classes": classes, "colors": prediction.colors, "mpp": mpp}
    metadata = {"geo": json.dumps(_geo(found)), "celltyper": json.dumps(facts)}
    table = pa.table(dict(columns))
    return table.replace_schema_metadata(metadata)


def concat_cells(tables: Sequence[pa.Table]) -> pa.Table:
    """Stack cell tables of several images (with column ``image``) and the same classes.

    Parameters
    ----------
    tables : sequence of pyarrow.Table
        From `cells_table`, at least one.

    Returns
    -------
    pyarrow.Table
        All rows; the metadata's bounding box spans all outlines, and mpp is None if it differs.

    Raises
    ------
    DataError
        If columns or classes differ.
    """
    if any(not t.schema.equals(tables[0].schema) for t in tables) or any(
        classes_of(t) != classes_of(tables[0]) for t in tables
    ):
        raise DataError("cell tables with different columns or classes cannot be stacked")
    columns = [json.loads(t.schema.metadata[b"geo"])["columns"]["outline"] for t in tables]
    geo = json.loads(tables[0].schema.metadata[b"geo"])
    outline = geo["columns"]["outline"]
    outline["geometry_types"] = sorted({kind for c in columns for kind in c["geometry_types"]})
    boxes = np.array([c["bbox"] for c in columns if "bbox" in c], float)
    if len(boxes):
        outline["bbox"] = [*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist()]
    facts = [_facts(t) for t in tables]
    shared = {**facts[0], "mpp": facts[0]["mpp"] if len({f["mpp"] for f in facts}) == 1 else None}
    stacked = pa.concat_tables(tables).unify_dictionaries()
    return stacked.replace_schema_metadata(
        {"geo": json.dumps(geo), "celltyper": json.dumps(shared)}
    )


def classes_of(table: pa.Table) -> tuple[str, ...]:
    """Phenotype names of a cell table, in the order of the class ids 1..K."""
    return tuple(_facts(table)["classes"])


def write_parquet(path: str | Path, table: pa.Table) -> None:
    """Write a cell table as GeoParquet 1.1, atomically; errors as in `atomic_path`."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=65536)


def write_csv(path: str | Path, table: pa.Table) -> None:
    """Write a cell table as CSV without the outlines, atomically; errors as in `atomic_path`."""
    flat = table.drop_columns("outline")
    for i, column in enumerate(flat.schema):
        if pa.types.is_dictionary(column.type):
            flat = flat.set_column(i, column.name, flat[column.name].cast(pa.string()))
    with atomic_path(path) as temporary:
        pyarrow.csv.write_csv(flat, temporary)


def read_cells(path: str | Path) -> pa.Table:
    """Read a cell table that `write_parquet` wrote.

    Raises
    ------
    DataError
        If the file is missing, no Parquet file, or no cell table.
    """
    path = Path(path)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = "no such file" if not path.exists() else str(error).splitlines()[0]
        raise DataError(f"cannot read cells from {path}: {reason}") from error
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing or b"celltyper" not in (table.schema.metadata or {}):
        raise DataError(
            f"{path} is not a table of cells written by celltyper"
            + (f": no column {', '.join(missing)}" if missing else ": its metadata is missing")
        )
    return table


def _same(text: str, n: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), pa.array([text], pa.string()))


def _phenotype_column(phenotypes: Any, classes: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(phenotypes - 1, pa.array(classes, pa.string()))


def _facts(table: pa.Table) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = json.loads(table.schema.metadata[b"celltyper"])
    return facts


def _geo(found: Outlines) -> dict[str, Any]:
    several = np.diff(found.cell_offsets) > 1
    kinds = ["MultiPolygon"] * bool(several.any()) + ["Polygon"] * bool((~several).any())
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": kinds,
        "crs": None,
        "orientation": "counterclockwise",
        "edges": "planar",
    }
    if len(found.coordinates):
        low, high = found.coordinates.min(axis=0), found.coordinates.max(axis=0)
        column["bbox"] = [float(v) for v in (*low, *high)]
    return {"version": "1.1.0", "primary_column": "outline", "columns": {"outline": column}}
