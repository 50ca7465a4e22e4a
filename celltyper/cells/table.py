"""One row per cell: position, size, phenotype, probabilities, outline."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from celltyper.atomic import atomic_path
from celltyper.calibration import ABSTAINED
from celltyper.cells.colors import UNTYPED, default_colors
from celltyper.cells.morphology import Morphology, pixel_size
from celltyper.cells.outlines import Outlines, Place, outlines
from celltyper.cells.wkb import extent, to_wkb
from celltyper.errors import DataError
from celltyper.labels import LabelBoxes, centroids, label_boxes
from celltyper.types import Labels, Prediction

_REQUIRED = ("cell_id", "x", "y", "area_um2", "area_px", "phenotype", "probability", "outline")

ROW_GROUP = 1 << 16
"""Cells that are compressed together in a file, unless they have long embeddings."""
EMBEDDING = "embedding"
"""Column of what the encoder sees at a cell, in tables that have it."""
_EMBEDDING_BYTES = 1 << 26


def cells_table(
    prediction: Prediction,
    mpp: float | tuple[float, float] | None = None,
    *,
    image: str | None = None,
    found: Outlines | None = None,
    measured: Morphology | None = None,
    place: Place | None = None,
) -> pa.Table:
    """One row per cell of a prediction, as described in ``docs/outputs.md``.

    Parameters
    ----------
    prediction : Prediction
        Labels must be ``1..n`` for n cells.
    mpp : float or (float, float), optional
        Micrometres per pixel of the labels, wherever they lie, of square pixels or along x and y;
        by default ``prediction.mpp``. If both are None, ``area_um2`` is null.
    image : str, optional
        If given, the first column ``image`` holds it in every row.
    found : Outlines, optional
        `outlines` of the labels, if they are known already.
    measured : Morphology, optional
        From `celltyper.cells.morphology.measure` of the same labels: adds its columns.
    place : Place, optional
        Where the labels lie on a slide: ``x``, ``y``, ``outline`` and ``area_px`` are then those
        on the slide, and so is the mpp in the metadata. A cell has the same row whichever part of
        the slide it is taken from, if the place has the same grid.

    Returns
    -------
    pyarrow.Table
        ``cell_id`` is the label, ``x, y`` the centroid in pixels (the centre of pixel [0, 0] is
        (0.5, 0.5)), ``phenotype`` the most probable foreground class, or "unknown" below the
        prediction's threshold, ``probability`` how probable that class is given that there is a
        cell. Without cells, zero rows and the same columns. The schema's metadata has ``geo``
        (GeoParquet 1.1) and ``celltyper`` (classes, colors, threshold, mpp of the coordinates: one
        number, or x and y).

    Raises
    ------
    DataError
        If labels, cell probabilities and measurements do not belong together, or class names
        would give two columns of one name.
    ValueError
        If the scales of `place` are not positive.
    """
    pixel = pixel_size(prediction.mpp if mpp is None else mpp)
    place = place or Place()
    if not (math.inf > place.scale_x > 0 and math.inf > place.scale_y > 0):
        raise ValueError(f"scales of a place must be positive, got {place}")
    classes, n = prediction.classes, len(prediction)
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
    if measured is not None and len(measured.solidity) != n:
        raise DataError(
            f"image {prediction.name!r}: {len(measured.solidity)} cells are measured, {n} are in "
            "the labels"
        )
    found = outlines(prediction.labels) if found is None else found
    centers = _centers(prediction.labels, boxes, place)
    of_class = prediction.class_probabilities
    if prediction.calibration is not None:
        whole = 1 - probabilities[:, :1]
        probabilities = np.hstack([probabilities[:, :1], (whole * of_class).astype(np.float32)])
    unknown = np.full(n, pixel is None)
    width, height = pixel or (0.0, 0.0)
    area_px = np.rint(boxes.area * (place.scale_x * place.scale_y)).astype(np.int64)
    columns: list[tuple[str, Any]] = [] if image is None else [("image", _same(image, n))]
    columns += [
        ("cell_id", pa.array(boxes.ids, pa.int32())),
        ("x", pa.array(centers[:, 1], pa.float64())),
        ("y", pa.array(centers[:, 0], pa.float64())),
        ("area_um2", pa.array(boxes.area * (width * height), pa.float64(), mask=unknown)),
        ("area_px", pa.array(area_px)),
        ("phenotype", _phenotype_column(prediction)),
        ("probability", pa.array(of_class.max(axis=1, initial=0), pa.float32())),
    ]
    if measured is not None:
        # Lengths are NaN where the mpp is unknown; from_pandas makes them null.
        columns += [
            (name, pa.array(values, pa.float64(), from_pandas=True))
            for name, values in measured._asdict().items()
        ]
    for k, name in enumerate(("background", *classes)):
        columns.append((f"p_{name}", pa.array(probabilities[:, k], pa.float32())))
    columns.append(("outline", to_wkb(found, place)))
    names = [name for name, _ in columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"two columns named {', '.join(twice)}: rename one of the classes")
    facts = {"classes": classes, "colors": prediction.colors, "mpp": _on_slide(pixel, place)}
    if prediction.threshold:
        facts["threshold"] = prediction.threshold
    table = pa.table(dict(columns), metadata={"celltyper": json.dumps(facts)})
    return table.replace_schema_metadata(metadata_of(table))


def add_embeddings(table: pa.Table, values: NDArray[np.float32]) -> pa.Table:
    """Add the column ``embedding`` to a cell table.

    Parameters
    ----------
    table : pyarrow.Table
        From `cells_table`.
    values : ndarray of float32, shape (n, C)
        One row for each of the table. Files are half as large if float16 holds all values.

    Returns
    -------
    pyarrow.Table
        With one more column of type ``fixed_size_list<float>[C]``, the last.
    """
    kind = pa.list_(pa.field("element", pa.float32(), nullable=False), values.shape[1])
    flat = pa.array(values.ravel(), pa.float32())
    return table.append_column(EMBEDDING, pa.FixedSizeListArray.from_arrays(flat, type=kind))


def embeddings_of(table: pa.Table) -> NDArray[np.float32]:
    """Embeddings of a cell table: (n, C), in the order of the rows.

    Raises
    ------
    DataError
        If it has none.
    """
    if EMBEDDING not in table.column_names:
        raise DataError("these cells have no embeddings: run 'celltyper infer' with --embeddings")
    column = table[EMBEDDING].combine_chunks()
    values: NDArray[np.float32] = column.flatten().to_numpy()
    return values.reshape(len(table), column.type.list_size)


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
    for table in tables[1:]:
        check_alike(tables[0], table)
    stacked = pa.concat_tables(tables).unify_dictionaries()
    return stacked.replace_schema_metadata(joint_metadata(map(metadata_of, tables)))


def check_alike(first: pa.Table, other: pa.Table) -> None:
    """Check that two cell tables have the same columns and classes.

    Raises
    ------
    DataError
        If not, naming what differs.
    """
    if not other.schema.equals(first.schema):
        differ = sorted({f.name for f in set(first.schema) ^ set(other.schema)}) or ["their order"]
        what = f"columns ({', '.join(differ)})"
    elif names_of(other) != names_of(first):
        what = f"classes ({', '.join(names_of(first))}; {', '.join(names_of(other))})"
    else:
        return
    raise DataError(f"cell tables with different {what} cannot be stacked")


def metadata_of(table: pa.Table) -> dict[bytes, bytes]:
    """Metadata of a cell table, with the bounding box and kinds of the outlines it has by now."""
    kinds, bounds = extent(table["outline"])
    outline: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": kinds,
        "crs": None,
        "orientation": "counterclockwise",
        "edges": "planar",
    }
    if bounds is not None:
        outline["bbox"] = bounds
    geo = {"version": "1.1.0", "primary_column": "outline", "columns": {"outline": outline}}
    return {b"geo": json.dumps(geo).encode(), b"celltyper": table.schema.metadata[b"celltyper"]}


def joint_metadata(parts: Iterable[Mapping[bytes, bytes]]) -> dict[bytes, bytes]:
    """Metadata of cell tables of the same columns and classes put together.

    Parameters
    ----------
    parts : iterable of mapping
        From `metadata_of`, at least one.

    Returns
    -------
    dict of bytes to bytes
        As the first, but the bounding box spans all outlines, geometry types are those of all, and
        the mpp is null if it differs.
    """
    parts = list(parts)
    geo = json.loads(parts[0][b"geo"])
    outline = geo["columns"]["outline"]
    columns = [json.loads(part[b"geo"])["columns"]["outline"] for part in parts]
    outline["geometry_types"] = sorted({kind for c in columns for kind in c["geometry_types"]})
    boxes = np.array([c["bbox"] for c in columns if "bbox" in c], float)
    if len(boxes):
        outline["bbox"] = [*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist()]
    facts = [json.loads(part[b"celltyper"]) for part in parts]
    alike = all(f["mpp"] == facts[0]["mpp"] for f in facts)
    shared = {**facts[0], "mpp": facts[0]["mpp"] if alike else None}
    return {b"geo": json.dumps(geo).encode(), b"celltyper": json.dumps(shared).encode()}


def classes_of(table: pa.Table) -> tuple[str, ...]:
    """Phenotype names of a cell table, in the order of the class ids 1..K."""
    return tuple(_facts(table)["classes"])


def names_of(table: pa.Table) -> tuple[str, ...]:
    """What a cell of a table may be called: its classes and, with a threshold, "unknown"."""
    own = classes_of(table)
    return (*own, ABSTAINED) if _facts(table).get("threshold") else own


def colors_of(table: pa.Table, overrides: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Colors ``#rrggbb`` of the phenotypes of a cell table, in the order of `names_of`.

    Parameters
    ----------
    table : pyarrow.Table
        From `cells_table`.
    overrides : mapping of str to str, optional
        Colors that win over the model's own, by phenotype; the rest is `default_colors`.

    Raises
    ------
    ConfigError
        If an override names no class or is not ``#rrggbb``.
    """
    classes = classes_of(table)
    own = dict(zip(classes, _facts(table)["colors"], strict=False))
    found = default_colors(classes, {**own, **(overrides or {})})
    return (*found, UNTYPED) if len(names_of(table)) > len(classes) else found


def mpp_of(table: pa.Table) -> tuple[float, float] | None:
    """Micrometres per pixel of a cell table's coordinates along x and y, None if unknown."""
    mpp = _facts(table)["mpp"]
    return pixel_size(tuple(mpp) if isinstance(mpp, list) else mpp)


def write_parquet(path: str | Path, table: pa.Table) -> None:
    """Write a cell table as GeoParquet 1.1, atomically; errors as in `atomic_path`."""
    table = table.replace_schema_metadata(metadata_of(table))
    with atomic_path(path) as temporary:
        options = parquet_options(table.schema)
        pq.write_table(table, temporary, row_group_size=group_rows(table.schema), **options)


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How cell tables of a schema are written, for `pyarrow.parquet`."""
    options: dict[str, Any] = {"compression": "zstd"}
    if EMBEDDING in schema.names:
        # Values seldom repeat; those of half precision leave every fourth byte 0.
        options["use_dictionary"] = [name for name in schema.names if name != EMBEDDING]
        options["column_encoding"] = {f"{EMBEDDING}.list.element": "BYTE_STREAM_SPLIT"}
    return options


def group_rows(schema: pa.Schema) -> int:
    """Number of cells that are compressed together: all of them fit into memory."""
    if EMBEDDING not in schema.names:
        return ROW_GROUP
    size = 4 * schema.field(EMBEDDING).type.list_size
    return int(min(ROW_GROUP, max(1, _EMBEDDING_BYTES // size)))


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
    check_columns(path, table.schema)
    return table


def check_columns(path: Path, schema: pa.Schema) -> None:
    """Check that a file's schema is that of a cell table.

    Raises
    ------
    DataError
        If a column or the metadata is missing.
    """
    missing = [name for name in _REQUIRED if name not in schema.names]
    if missing or not {b"geo", b"celltyper"} <= (schema.metadata or {}).keys():
        raise DataError(
            f"{path} is not a table of cells written by celltyper"
            + (f": no column {', '.join(missing)}" if missing else ": its metadata is missing")
        )


def _centers(labels: Labels, boxes: LabelBoxes, place: Place) -> NDArray[np.float64]:
    # Sums of pixel coordinates are whole numbers: counted from the grid's origin, the one rounding
    # is the same from whichever array the cell is taken.
    area = boxes.area[:, None]
    sums = np.rint(centroids(labels) * area) + area * np.array([place.row, place.col])
    rows, columns = (sums / area + 0.5).T
    return np.stack((place.y + place.scale_y * rows, place.x + place.scale_x * columns), axis=1)


def _on_slide(pixel: tuple[float, float] | None, place: Place) -> float | list[float] | None:
    """Metadata for the mpp of the coordinates."""
    if pixel is None:
        return None
    # Twelve digits, so that 0.5 / (0.5 / 0.2501) reads 0.2501 again.
    x, y = (
        side if scale == 1 else float(f"{side / scale:.12g}")
        for side, scale in zip(pixel, (place.scale_x, place.scale_y), strict=True)
    )
    return x if x == y else [x, y]


def _same(text: str, n: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), pa.array([text], pa.string()))


def _phenotype_column(prediction: Prediction) -> pa.Array:
    names = [*prediction.classes, *([ABSTAINED] if prediction.threshold else [])]
    index = prediction.phenotypes[1:].astype(np.int16) - 1
    # the last of the names is that of cells without a class
    return pa.DictionaryArray.from_arrays(index % len(names), pa.array(names, pa.string()))


def _facts(table: pa.Table) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = json.loads(table.schema.metadata[b"celltyper"])
    return facts
