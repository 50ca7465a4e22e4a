from __future__ import annotations

import csv
import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from celltyper.cells.outlines import Place
from celltyper.cells.stream import CellsWriter, iter_cells, write_csv
from celltyper.cells.table import cells_table, concat_cells, read_cells, write_parquet
from celltyper.errors import ConfigError, DataError
from celltyper.types import Prediction

CLASSES = ("tumour", "immune", "never seen")


def made(n=40, seed=0, place=None, image=None, mpp: float | None = 0.5, classes=CLASSES):
    """Cells of one to three pixels in a row each."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((n, 5), np.int32)
    for i in range(n):
        labels[i, : rng.integers(1, 4)] = i + 1
    cells = rng.dirichlet(np.ones(4), n).astype(np.float32).reshape(n, 4)
    cells[:, 3] = 0
    maps = np.zeros((4, 0, 0), np.float32)
    made = Prediction(labels, maps, cells, classes, mpp)
    return cells_table(made, place=place, image=image)


def pieces(table, cuts):
    return [table.slice(a, b - a) for a, b in pairwise([0, *cuts, table.num_rows])]


def written(path, tables, **options):
    with CellsWriter(path, **options) as writer:
        for table in tables:
            writer.write(table)
    return path


def test_file_says_what_one_table_says(tmp_path):
    tables = [made(7, 1), made(0), made(30, 2, Place(50, 60.5, 2, 2))]
    path = written(tmp_path / "a.parquet", tables)
    joint = concat_cells(tables)
    assert read_cells(path).to_pylist() == joint.to_pylist()
    assert read_cells(path).schema.equals(joint.schema.remove_metadata())
    assert read_cells(path).schema.metadata == joint.schema.metadata
    assert pq.read_metadata(path).metadata.keys() == {b"ARROW:schema", b"geo", b"celltyper"}


def test_geoparquet_metadata_spans_all_parts(tmp_path):
    other = made(30, 2, Place(50, 60.5, 0.5, 2))
    path = written(tmp_path / "a.parquet", [made(7, 1), other])
    schema = read_cells(path).schema
    (name, outline), *more = json.loads(schema.metadata[b"geo"])["columns"].items()
    assert (name, more) == ("outline", [])
    cells = shapely.from_wkb(read_cells(path)["outline"].to_pylist())
    assert outline["bbox"] == shapely.total_bounds(cells).tolist()
    assert outline["geometry_types"] == ["Polygon"]
    assert (outline["encoding"], outline["crs"]) == ("WKB", None)
    # 0.5 um at one end, 1 um x 0.25 um at the other
    assert json.loads(schema.metadata[b"celltyper"])["mpp"] is None
    pieces_of_cell = cells_table(
        Prediction(
            np.array([[1, 0, 1]], np.int32),
            np.zeros((4, 0, 0), np.float32),
            np.full((1, 4), 0.25, np.float32),
            CLASSES,
            0.5,
        )
    )
    path = written(tmp_path / "b.parquet", [made(3), pieces_of_cell, made(0)])
    geo = json.loads(read_cells(path).schema.metadata[b"geo"])
    assert geo["columns"]["outline"]["geometry_types"] == ["MultiPolygon", "Polygon"]


@pytest.mark.parametrize("group", [8, 1000])
def test_bytes_do_not_depend_on_the_cuts(tmp_path, monkeypatch, group):
    monkeypatch.setattr("celltyper.cells.table.ROW_GROUP", group)
    tables = [made(20, 1, image="a"), made(33, 2, image="b"), made(1, 3, image="c")]
    whole = concat_cells(tables)
    one = written(tmp_path / "one.parquet", [whole])
    assert pq.read_metadata(one).num_row_groups == -(-54 // group)
    expected = one.read_bytes()
    for cuts in ([20, 53], [], [0, 0, 1, 8, 54], [16, 17, 30]):
        parts = tables if cuts == [20, 53] else pieces(whole, cuts)
        assert written(tmp_path / "parts.parquet", parts).read_bytes() == expected
    # Parts that were files before, with dictionaries of what they hold
    files = []
    for i, part in enumerate(pieces(whole, [5, 21])):
        write_parquet(tmp_path / f"{i}.parquet", part)
        files.append(read_cells(tmp_path / f"{i}.parquet"))
    assert written(tmp_path / "parts.parquet", files).read_bytes() == expected


def test_renumbered(tmp_path, monkeypatch):
    monkeypatch.setattr("celltyper.cells.table.ROW_GROUP", 8)
    tables = [made(5, 1), made(0), made(9, 2), made(3, 3)]
    back = read_cells(written(tmp_path / "a.parquet", tables, renumber=True))
    assert back["cell_id"].to_pylist() == list(range(1, 18))
    assert back["cell_id"].type == pa.int32()
    assert back.drop_columns("cell_id").equals(concat_cells(tables).drop_columns("cell_id"))
    back = read_cells(written(tmp_path / "a.parquet", tables))
    assert back["cell_id"].to_pylist() == [*range(1, 6), *range(1, 10), *range(1, 4)]


def test_more_cells_than_int32_counts(tmp_path):
    writer = CellsWriter(tmp_path / "a.parquet", renumber=True)

    def too_many():
        with writer:
            writer.write(made(1))
            writer.rows = 2**31 - 2
            writer.write(made(1))  # the last that fits
            writer.write(made(1))

    with pytest.raises(DataError, match="too many cells for int32: 2147483648"):
        too_many()
    assert list(tmp_path.iterdir()) == []


def test_no_cells(tmp_path):
    path = written(tmp_path / "a.parquet", [made(0), made(0)])
    assert read_cells(path).equals(made(0), check_metadata=True)
    (only,) = iter_cells(path)
    assert only.equals(made(0), check_metadata=True)


def test_a_failure_leaves_the_old_file(tmp_path):
    path = written(tmp_path / "a.parquet", [made(4)])
    before = path.read_bytes()
    for tables, message in (
        ([], "there is no table of cells"),
        ([made(3), made(3, image="a")], r"different columns \(image\)"),
        ([made(3), made(3, classes=("a", "b", "c"))], "different columns"),
        ([made(3), made(3).append_column("m", pa.array([1, 2, 3]))], r"columns \(m\)"),
        ([made(3), made(3).select(made(3).column_names[::-1])], "their order"),
        ([made(3).drop_columns("x")], "no column x"),
        ([made(3).replace_schema_metadata()], "its metadata is missing"),
    ):
        with pytest.raises(DataError, match=message):
            written(path, tables)

    def interrupted():
        yield made(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(path, interrupted())
    with pytest.raises(DataError, match="is not a folder"):
        written(tmp_path / "absent" / "a.parquet", [made(3)])
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("rows", [1, 7, 8, 100])
def test_parts_are_the_file(tmp_path, monkeypatch, rows):
    monkeypatch.setattr("celltyper.cells.table.ROW_GROUP", 8)
    table = made(50, image="a")
    path = written(tmp_path / "a.parquet", [table])
    parts = list(iter_cells(path, rows=rows))
    assert max(part.num_rows for part in parts) <= rows
    assert concat_cells(parts).to_pylist() == table.to_pylist()
    for part in parts:
        assert part.schema.equals(table.schema.remove_metadata())
        assert part.schema.metadata == table.schema.metadata
    parts = list(iter_cells(path, ["y", "phenotype"], rows))
    assert {tuple(part.column_names) for part in parts} == {("y", "phenotype")}
    assert [y for part in parts for y in part["y"].to_pylist()] == table["y"].to_pylist()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        iter_cells(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(DataError, match="cannot read cells"):
        iter_cells(tmp_path / "text.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no column cell_id"):
        iter_cells(tmp_path / "x.parquet")
    path = written(tmp_path / "a.parquet", [made(50)])
    with pytest.raises(ConfigError, match=r"unknown column of a\.parquet 'area'"):
        iter_cells(path, ["area"])
    damaged = bytearray(path.read_bytes())
    damaged[4:400] = bytes(396)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="cannot read cells"):
        list(iter_cells(path))


def test_csv_of_a_stream(tmp_path):
    tables = [made(7, 1, image="a, b"), made(0, image="c"), made(5, 2, image="d", mpp=None)]
    write_csv(tmp_path / "parts.csv", tables)
    write_csv(tmp_path / "whole.csv", concat_cells(tables))
    text = (tmp_path / "parts.csv").read_bytes()
    assert text == (tmp_path / "whole.csv").read_bytes()
    with (tmp_path / "parts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = concat_cells(tables).drop_columns("outline").to_pylist()
    assert list(rows[0]) == list(expected[0])
    for row, cell in zip(rows, expected, strict=True):
        for name, value in cell.items():
            if isinstance(value, float):
                assert float(row[name]) == pytest.approx(value, rel=1e-6)
            else:
                assert row[name] == ("" if value is None else str(value))
    path = written(tmp_path / "a.parquet", tables)
    write_csv(tmp_path / "some.csv", iter_cells(path, ["cell_id", "phenotype"]))
    assert (tmp_path / "some.csv").read_text().splitlines()[0] == '"cell_id","phenotype"'
    with pytest.raises(DataError, match="there is no table"):
        write_csv(tmp_path / "none.csv", [])
    assert not (tmp_path / "none.csv").exists()
