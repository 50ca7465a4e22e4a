from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
import shapely
from scipy import ndimage
from skimage import measure as skimage_measure

from celltyper.cells.morphology import measure
from celltyper.cells.outlines import Place
from celltyper.cells.stream import write_csv
from celltyper.cells.table import (
    cells_table,
    classes_of,
    colors_of,
    concat_cells,
    mpp_of,
    read_cells,
    write_parquet,
)
from celltyper.errors import ConfigError, DataError
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
            "probability": 0.5,
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
            "probability": pytest.approx(0.625 / 0.75),
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


MORPHOLOGY = [
    "perimeter_um",
    "axis_major_length_um",
    "axis_minor_length_um",
    "eccentricity",
    "orientation",
    "solidity",
    "hematoxylin_od",
    "eosin_od",
]


def blobs(shape=(60, 70)):
    rng = np.random.default_rng(2)
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 2)
    labels, n = ndimage.label(field > 0.5 * field.std())
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    return labels.astype(np.int32), rng.dirichlet(np.ones(3), n).astype(np.float32), image


def test_morphology_columns_are_those_of_regionprops():
    labels, cells, image = blobs()
    table = cells_table(prediction(labels, cells), measured=measure(labels, image, 0.5))
    names = ["cell_id", "x", "y", "area_um2", "area_px", "phenotype", "probability", *MORPHOLOGY]
    names += ["p_background", "p_tumour", 'p_so-called "other"', "outline"]
    assert table.column_names == names
    assert {table.schema.field(name).type for name in MORPHOLOGY} == {pa.float64()}
    regions = skimage_measure.regionprops(labels)
    assert table.num_rows == len(regions) > 20
    for row, region in zip(table.to_pylist(), regions, strict=True):
        y, x = region.centroid
        assert (row["x"], row["y"]) == pytest.approx((x + 0.5, y + 0.5), rel=1e-12)
        assert row["area_px"] == region.num_pixels
        assert row["area_um2"] == region.num_pixels / 4
        assert row["perimeter_um"] == pytest.approx(region.perimeter / 2)
        assert row["axis_major_length_um"] == pytest.approx(region.axis_major_length / 2)
        assert row["solidity"] == region.solidity


def test_morphology_without_mpp_has_null_lengths():
    labels, cells, image = blobs()
    blind = prediction(labels, cells, mpp=None)
    table = cells_table(blind, measured=measure(labels, image, None))
    empty = {name for name in table.column_names if table[name].null_count == table.num_rows}
    assert empty == {"area_um2", "perimeter_um", "axis_major_length_um", "axis_minor_length_um"}
    assert sum(table[name].null_count for name in table.column_names) == 4 * table.num_rows


def test_stacking_needs_morphology_in_all_tables_or_none():
    labels, cells, image = blobs()
    with_it = cells_table(prediction(labels, cells), measured=measure(labels, image, 0.5))
    without = cells_table(prediction(labels, cells))
    assert concat_cells([with_it, with_it]).num_rows == 2 * with_it.num_rows
    with pytest.raises(DataError, match=r"different columns \(axis_major_length_um, .*solidity\)"):
        concat_cells([with_it, without])
    with pytest.raises(DataError, match=r"2 cells are measured, \d+ are in the labels"):
        cells_table(
            prediction(labels, cells),
            measured=measure(labels[:1] * 0 + [[1] + [2] * 69], image[:1], 0.5),
        )


def test_place_on_the_slide_by_hand():
    table = cells_table(TWO, 0.5, place=Place(100, 10, 2, 4, row=1, col=3))
    first, second = table.to_pylist()
    # Centroids (1, 0.5) and (2.5, 1.5) in the array
    assert (first["x"], first["y"]) == (100 + 2 * 4, 10 + 4 * 1.5)
    assert (second["x"], second["y"]) == (100 + 2 * 5.5, 10 + 4 * 2.5)
    assert (first["area_px"], first["area_um2"]) == (16, 0.5)
    one, other = shapely.from_wkb(table["outline"].to_pylist())
    assert one.equals(shapely.box(106, 14, 110, 18))
    assert other.equals(shapely.box(110, 18, 112, 22))
    assert one.exterior.is_ccw
    geo = json.loads(table.schema.metadata[b"geo"])["columns"]["outline"]
    assert geo["bbox"] == [106, 14, 112, 22]
    assert json.loads(table.schema.metadata[b"celltyper"])["mpp"] == [0.25, 0.125]
    assert mpp_of(table) == (0.25, 0.125)


def test_place_at_the_origin_changes_nothing():
    labels, cells, _ = blobs()
    plain = cells_table(prediction(labels, cells))
    placed = cells_table(prediction(labels, cells), place=Place(0, 0, 1, 1))
    assert placed.equals(plain, check_metadata=True)
    assert mpp_of(plain) == (0.5, 0.5)
    assert json.loads(plain.schema.metadata[b"celltyper"])["mpp"] == 0.5
    far = cells_table(prediction(labels, cells), place=Place(98765, 123456))
    moved = shapely.get_coordinates(shapely.from_wkb(far["outline"].to_pylist()))
    still = shapely.get_coordinates(shapely.from_wkb(plain["outline"].to_pylist()))
    assert (moved == still + np.array([98765, 123456])).all()


def test_mpp_of_the_slide_comes_back():
    scales = 0.5 / 0.2501, 0.5 / 0.2503
    table = cells_table(TWO, 0.5, place=Place(0, 0, *scales))
    assert mpp_of(table) == (0.2501, 0.2503)
    narrow = cells_table(TWO, (0.5, 0.4))
    assert narrow["area_um2"].to_pylist() == [0.4, 0.2]
    assert mpp_of(narrow) == (0.5, 0.4)
    assert mpp_of(cells_table(prediction([[1]], [0, 1, 0], mpp=None))) is None


@pytest.mark.parametrize("scale", [1.0, 2.0136, 1 / 3])
def test_rows_do_not_depend_on_the_array_that_a_cell_is_cut_from(scale):
    """Bit for bit, with everything that is measured."""
    labels, cells, image = blobs()
    whole = cells_table(
        prediction(labels, cells),
        measured=measure(labels, image, 0.5),
        place=Place(7.3, 0.1, scale, scale * 1.01, row=30_001, col=12_345),
    ).drop_columns("cell_id")
    seen = 0
    for row, col, height, width in [(0, 0, 33, 70), (5, 9, 40, 40), (20, 31, 40, 39)]:
        part = labels[row : row + height, col : col + width]
        kept = np.setdiff1d(np.unique(part), [0])
        uncut = [i for i in kept if (part == i).sum() == (labels == i).sum()]
        lookup = np.zeros(labels.max() + 1, np.int32)
        lookup[uncut] = np.arange(len(uncut)) + 1
        picked = image[row : row + height, col : col + width]
        rows = np.array(uncut) - 1
        table = cells_table(
            prediction(lookup[part], cells[rows]),
            measured=measure(lookup[part], picked, 0.5),
            place=Place(7.3, 0.1, scale, scale * 1.01, row=30_001 + row, col=12_345 + col),
        ).drop_columns("cell_id")
        assert table.equals(whole.take(rows))
        seen += len(uncut)
    assert seen > 10


def test_colors_of():
    assert colors_of(cells_table(TWO)) == ("#d55e00", "#999999")
    own = Prediction(
        TWO.labels, TWO.probabilities, TWO.cell_probabilities, CLASSES, 0.5, "", ("#000001", "#2")
    )
    with pytest.raises(ConfigError, match="must be '#rrggbb'"):
        colors_of(cells_table(own))
    assert colors_of(cells_table(own), {CLASSES[1]: "#0000FF"}) == ("#000001", "#0000ff")


def test_metadata_is_that_of_the_rows_that_are_left(tmp_path):
    table = cells_table(prediction([[1, 2], [2, 1], [0, 3]], np.full((3, 3), 1 / 3)))
    left = table.filter(np.array([False, False, True]))
    write_parquet(tmp_path / "left.parquet", left)
    geo = json.loads(read_cells(tmp_path / "left.parquet").schema.metadata[b"geo"])
    outline = geo["columns"]["outline"]
    assert (outline["bbox"], outline["geometry_types"]) == ([1, 2, 2, 3], ["Polygon"])
    geo = json.loads(concat_cells([table, left]).schema.metadata[b"geo"])
    outline = geo["columns"]["outline"]
    assert outline["bbox"] == [0, 0, 2, 3]
    assert outline["geometry_types"] == ["MultiPolygon", "Polygon"]


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
    with pytest.raises(DataError, match="mpp must be a positive number"):
        cells_table(TWO, (0.5, -0.5))
    with pytest.raises(ValueError, match="scales of a place must be positive"):
        cells_table(TWO, place=Place(0, 0, 1, 0))
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
