from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
import shapely

from celltyper.cells.table import (
    cells_table,
    classes_of,
    concat_cells,
    read_cells,
    write_csv,
    write_parquet,
)
from celltyper.errors import DataError
from celltyper.types import Prediction

CLASSES = ("tumour", 'so-called "other"')


def prediction(labels, cells, mpp=0.5):
    cells = np.array(cells, np.float32).reshape(-1, 3)
    maps = np.zeros((3, *np.shape(labels)), np.float32)
    return Prediction(np.array(labels, np.int32), maps, cells, CLASSES, mpp, "field")


TWO = prediction([[1, 1, 0], [0, 0, 2]], [[0.5, 0.25, 0.25], [0.25, 0.125, 0.625]])


def test_values_by_hand():
    table = cells_table(TWO)
    outline = table.column_names[-1]
    assert outline == "outline"
    assert table.drop_columns("outline").to_pylist() == [
        {
            "cell_id": 1,
            "x": 1.0,
            "y": 0.5,
            "area_um2": 0.5,
            "area_px": 2,
            "phenotype": "tumour",
            "probability": 0.25,
            "p_background": 0.5,
            "p_tumour": 0.25,
            'p_so-called "other"': 0.25,
        },
        {
            "cell_id": 2,
            "x": 2.5,
            "y": 1.5,
            "area_um2": 0.25,
            "area_px": 1,
            "phenotype": 'so-called "other"',
            "probability": 0.625,
            "p_background": 0.25,
            "p_tumour": 0.125,
            'p_so-called "other"': 0.625,
        },
    ]
    cells = shapely.from_wkb(table["outline"].to_pylist())
    assert cells[0].equals(shapely.box(0, 0, 2, 1))
    assert cells[1].equals(shapely.box(2, 1, 3, 2))


def test_unknown_mpp_gives_null_area_and_an_argument_wins():
    blind = prediction([[1]], [[0, 1, 0]], mpp=None)
    assert cells_table(blind)["area_um2"].to_pylist() == [None]
    assert cells_table(blind, 2.0)["area_um2"].to_pylist() == [4.0]
    assert cells_table(blind)["area_px"].to_pylist() == [1]


def test_no_cells_gives_the_same_columns():
    empty = cells_table(prediction(np.zeros((4, 4)), []), image="a.png")
    full = cells_table(TWO, image="a.png")
    assert empty.num_rows == 0
    assert empty.schema.equals(full.schema)
    assert "bbox" not in json.loads(empty.schema.metadata[b"geo"])["columns"]["outline"]


def test_geoparquet_metadata():
    geo = json.loads(cells_table(TWO).schema.metadata[b"geo"])
    assert geo == {
        "version": "1.1.0",
        "primary_column": "outline",
        "columns": {
            "outline": {
                "encoding": "WKB",
                "geometry_types": ["Polygon"],
                "crs": None,
                "orientation": "counterclockwise",
                "edges": "planar",
                "bbox": [0.0, 0.0, 3.0, 2.0],
            }
        },
    }


def test_parquet_round_trip(tmp_path):
    for name, made in (("two", TWO), ("none", prediction(np.zeros((2, 2)), []))):
        table = cells_table(made, image="a")
        write_parquet(tmp_path / f"{name}.parquet", table)
        back = read_cells(tmp_path / f"{name}.parquet")
        assert back.to_pylist() == table.to_pylist()
        assert back.schema.equals(table.schema.remove_metadata())
        assert back.schema.metadata == table.schema.metadata
        assert classes_of(back) == CLASSES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.parquet", "two.parquet"]


def test_csv(tmp_path):
    write_csv(tmp_path / "cells.csv", cells_table(TWO, image="a, b"))
    with (tmp_path / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert "outline" not in rows[0]
    assert rows[0]["image"] == "a, b"
    assert rows[1]["phenotype"] == 'so-called "other"'
    assert float(rows[1]["x"]) == 2.5


def test_concat(tmp_path):
    tables = [cells_table(TWO, image="a"), cells_table(prediction([[1]], [0, 1, 0]), image="b")]
    both = concat_cells(tables)
    assert both["image"].to_pylist() == ["a", "a", "b"]
    assert json.loads(both.schema.metadata[b"geo"])["columns"]["outline"]["bbox"] == [0, 0, 3, 2]
    write_parquet(tmp_path / "both.parquet", both)
    assert read_cells(tmp_path / "both.parquet")["image"].to_pylist() == ["a", "a", "b"]
    with pytest.raises(DataError, match="different columns"):
        concat_cells([tables[0], cells_table(TWO)])


def test_bad_input(tmp_path):
    with pytest.raises(DataError, match=r"labels must be 1\.\.1 for 1 rows"):
        cells_table(prediction([[2]], [0, 1, 0]))
    with pytest.raises(DataError, match="mpp must be a positive number"):
        cells_table(TWO, 0.0)
    with pytest.raises(DataError, match="no such file"):
        read_cells(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(DataError, match="cannot read cells"):
        read_cells(tmp_path / "text.parquet")
    pa.parquet.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no column cell_id"):
        read_cells(tmp_path / "x.parquet")
    clash = Prediction(
        TWO.labels, TWO.probabilities, TWO.cell_probabilities, ("background", "b"), 0.5
    )
    with pytest.raises(DataError, match="two columns named p_background"):
        cells_table(clash)
