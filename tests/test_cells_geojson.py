from __future__ import annotations

import gzip
import json
import re
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import shapely
from shapely.geometry import shape

from celltyper.cells import geojson
from celltyper.cells.colors import default_colors
from celltyper.cells.geojson import write_geojson
from celltyper.cells.outlines import Place
from celltyper.cells.table import cells_table
from celltyper.cells.tiles import write_geojson_tiles
from celltyper.errors import ConfigError, DataError
from celltyper.types import Prediction

CLASSES = ("tumour", 'Zelle "ä" \\ 細胞', "other")


def made(labels, seed=0, mpp: float | None = 0.25, **placed):
    n = int(labels.max())
    cells = np.random.default_rng(seed).dirichlet(np.ones(4), n).astype(np.float32).reshape(n, 4)
    maps = np.zeros((4, *labels.shape), np.float32)
    return cells_table(Prediction(labels, maps, cells, CLASSES, mpp), **placed)


def with_outlines(table, outlines):
    return table.set_column(table.num_columns - 1, "outline", pa.array(outlines, pa.binary()))


def noise(shape=(40, 50)):
    rng = np.random.default_rng(1)
    labels = rng.integers(1, 40, shape) * (rng.random(shape) < 0.7)
    labels = np.unique(labels, return_inverse=True)[1].reshape(shape).astype(np.int32)
    labels[5:10, 5:10] = 1
    labels[7, 7] = 0
    return labels


@pytest.mark.parametrize("chunk", [1, 7, 8192])
def test_read_back(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(geojson, "_CHUNK_CELLS", chunk)
    labels = noise()
    table = made(labels)
    write_geojson(tmp_path / "cells.geojson", table)
    read = json.loads((tmp_path / "cells.geojson").read_text("utf-8"))
    assert read["type"] == "FeatureCollection"
    assert len(read["features"]) == labels.max()
    cells = np.array([shape(feature["geometry"]) for feature in read["features"]])
    assert shapely.is_valid(cells).all()
    assert shapely.area(cells).tolist() == np.bincount(labels.ravel())[1:].tolist()
    # RFC 7946: exteriors counter-clockwise, holes clockwise
    parts = shapely.get_parts(cells)
    assert shapely.is_ccw(shapely.get_exterior_ring(parts)).all()
    assert any(len(part.interiors) for part in parts)
    assert not any(shapely.is_ccw(ring) for part in parts for ring in part.interiors)
    expected = shapely.from_wkb(table["outline"].to_pylist())
    assert shapely.equals_exact(cells, expected).all()
    for row, feature in zip(table.to_pylist(), read["features"], strict=True):
        assert feature["type"] == "Feature"
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["classification"]["name"] == row["phenotype"]
        measured = properties["measurements"]
        assert list(measured) == [
            "cell_id",
            "area_um2",
            "area_px",
            "probability",
            *(f"p_{name}" for name in ("background", *CLASSES)),
        ]
        for name, value in measured.items():
            assert value == pytest.approx(row[name], abs=5.1e-7)


def test_exact_bytes(tmp_path):
    table = made(np.array([[0, 1]], np.int32), mpp=None)
    write_geojson(tmp_path / "cells.geojson", table, dict.fromkeys(CLASSES, "#0a0B0c"))
    (feature,) = json.loads((tmp_path / "cells.geojson").read_text())["features"]
    assert feature["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[2, 0], [2, 1], [1, 1], [1, 0], [2, 0]]],
    }
    assert feature["properties"]["classification"]["color"] == [10, 11, 12]
    assert "area_um2" not in feature["properties"]["measurements"]  # null: left out


def test_numbers(tmp_path):
    table = made(np.array([[1, 2, 3, 4, 5, 6]], np.int32))
    values = [0.0, -0.0000004, -1.5, 0.000001, 123456789.25, float("nan")]
    table = table.append_column("m", pa.array(values))
    write_geojson(tmp_path / "cells.geojson", table)
    read = json.loads((tmp_path / "cells.geojson").read_text())["features"]
    measured = [feature["properties"]["measurements"] for feature in read]
    assert [m.get("m") for m in measured] == [0, 0, -1.5, 0.000001, 123456789.25, None]


def test_no_cells_and_gzip(tmp_path):
    table = made(np.zeros((3, 3), np.int32))
    write_geojson(tmp_path / "none.geojson", table)
    assert json.loads((tmp_path / "none.geojson").read_text())["features"] == []
    table = made(noise())
    write_geojson(tmp_path / "a.geojson", table)
    for name in ("a.geojson.gz", "b.geojson.gz"):
        write_geojson(tmp_path / name, table)
    packed = (tmp_path / "a.geojson.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "a.geojson").read_bytes()
    assert packed == (tmp_path / "b.geojson.gz").read_bytes()


def test_bad_input_writes_nothing(tmp_path):
    table = made(noise())
    with pytest.raises(DataError, match="there is no table of cells"):
        write_geojson(tmp_path / "a.geojson", [])
    with pytest.raises(DataError, match=r"different columns \(m\)"):
        write_geojson(tmp_path / "a.geojson", [table, table.append_column("m", table["x"])])
    with pytest.raises(ConfigError, match="no such class"):
        write_geojson(tmp_path / "a.geojson", table, {"x": "#000000"})
    with pytest.raises(DataError, match="is not a folder"):
        write_geojson(tmp_path / "absent" / "a.geojson", table)
    assert list(tmp_path.iterdir()) == []


def test_colors_are_those_of_the_model(tmp_path):
    probabilities = np.array([[0, 1, 0], [0, 0, 1]], np.float32)
    labels = np.array([[1, 2]], np.int32)
    colors = ("#010203", "#0a0b0c")
    maps = np.zeros((3, 1, 2), np.float32)
    table = cells_table(Prediction(labels, maps, probabilities, ("a", "b"), None, "", colors))
    write_geojson(tmp_path / "cells.geojson", table, {"b": "#ff0000"})
    features = json.loads((tmp_path / "cells.geojson").read_text())["features"]
    kinds = [feature["properties"]["classification"]["color"] for feature in features]
    assert kinds == [[1, 2, 3], [255, 0, 0]]


def test_stream_is_one_collection(tmp_path):
    table = made(noise())
    cuts = [0, 0, 1, 20, 20, table.num_rows]
    parts = (table.slice(a, b - a) for a, b in pairwise(cuts))
    write_geojson(tmp_path / "parts.geojson", parts)
    write_geojson(tmp_path / "whole.geojson", table)
    assert (tmp_path / "parts.geojson").read_bytes() == (tmp_path / "whole.geojson").read_bytes()


def test_fractions_have_two_decimals_and_stay_valid(tmp_path):
    labels = noise()
    place = Place(-20.25, 3.125, 0.497, 4 / 3, row=700, col=12)
    table = made(labels, place=place)
    write_geojson(tmp_path / "cells.geojson", table)
    text = (tmp_path / "cells.geojson").read_text("utf-8")
    drawn = [feature["geometry"] for feature in json.loads(text)["features"]]
    cells = np.array([shape(each) for each in drawn])
    assert shapely.is_valid(cells).all()
    exact = shapely.from_wkb(table["outline"].to_pylist())
    apart = shapely.get_coordinates(cells) - shapely.get_coordinates(exact)
    assert 0.004 < np.abs(apart).max() <= 0.005 + 1e-9
    assert (shapely.get_coordinates(cells) < 0).any()
    numbers = set(re.findall(r"-?[0-9.]+", "".join(re.findall(r'"coordinates":([^"]*)', text))))
    assert all(re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]?[1-9])?", number) for number in numbers)


def test_numbers_of_coordinates(tmp_path):
    table = made(np.array([[1]], np.int32))
    xs = [0.0, 7.0, 1e9, -3.0, 0.004, -0.004, -0.006, 9.996, 12.5, 12.25, 12.05, 123456.789]
    expected = [
        "0",
        "7",
        "1000000000",
        "-3",
        "0",
        "0",
        "-0.01",
        "10",
        "12.5",
        "12.25",
        "12.05",
        "123456.79",
    ]
    for x, text in zip(xs, expected, strict=True):
        ring = shapely.polygons([(x, 0), (x, 5), (-1e9, 5), (x, 0)])
        outline = [shapely.to_wkb(ring)]
        write_geojson(tmp_path / "a.geojson", with_outlines(table, outline))
        (line,) = (tmp_path / "a.geojson").read_text().splitlines()[1:-1]
        drawn = f"[[[{text},0],[{text},5],[-1000000000,5],[{text},0]]]"
        assert f'"coordinates":{drawn}' in line


@pytest.mark.parametrize("with_holes", [False, True])
def test_polygons_of_others(tmp_path, with_holes):
    cells = [shapely.Point(10 * i, 5.5).buffer(4 + i) for i in range(5)]
    if with_holes:
        cells = [cell.difference(cell.centroid.buffer(2)) for cell in cells]
    cells[2] = shapely.MultiPolygon([cells[2], shapely.box(100, 100, 101, 101)])
    table = made(np.array([[1, 2, 3, 4, 5]], np.int32))
    table = with_outlines(table, shapely.to_wkb(cells))
    write_geojson(tmp_path / "a.geojson", table)
    read = json.loads((tmp_path / "a.geojson").read_text())["features"]
    found = np.array([shape(feature["geometry"]) for feature in read])
    np.testing.assert_allclose(
        shapely.get_coordinates(found), shapely.get_coordinates(cells), atol=0.005 + 1e-9
    )
    assert [each.geom_type for each in found] == [each.geom_type for each in cells]
    assert [shapely.get_num_interior_rings(each) for each in found] == [
        shapely.get_num_interior_rings(each) for each in cells
    ]


def wkb(text, **how):
    return shapely.to_wkb(shapely.from_wkt(text), **how)


SQUARE = wkb("POLYGON ((0 0, 1 0, 1 1, 0 0))")


@pytest.mark.parametrize(
    "outline",
    [
        b"",
        SQUARE[:8],
        SQUARE[:12],
        SQUARE[:-1],
        SQUARE + b"\0",
        wkb("POLYGON ((0 0, 1 0, 1 1, 0 0))", byte_order=0),
        wkb("POLYGON Z ((0 0 0, 1 0 0, 1 1 0, 0 0 0))"),
        wkb("POLYGON EMPTY"),
        wkb("MULTIPOLYGON EMPTY"),
        wkb("POINT (1 2)"),
        wkb("POLYGON ((0 0, 1e10 0, 1 1, 0 0))"),
        # A count of rings, and of corners, far beyond the end
        SQUARE[:5] + b"\xff\xff\xff\xff" + SQUARE[9:],
        SQUARE[:9] + b"\xff\xff\xff\xff" + SQUARE[13:],
    ],
)
def test_what_is_no_polygon_is_named(tmp_path, outline):
    table = made(np.array([[1, 2]], np.int32))
    table = with_outlines(table, [SQUARE, outline])
    with pytest.raises(DataError, match="outline of cell 2 is no polygon"):
        write_geojson(tmp_path / "a.geojson", table)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [3, 1000])
def test_tiles(tmp_path, rows):
    r, c = np.indices((90, 70))
    labels = (r // 7 * 10 + c // 7 + 1).astype(np.int32)
    table = made(labels, place=Place(1000, 2000))
    parts = [table.slice(at, rows) for at in range(0, table.num_rows, rows)]
    write_geojson_tiles(tmp_path / "tiles", parts, 16)
    write_geojson(tmp_path / "whole.geojson", table)
    wanted: dict[str, list[object]] = {}
    whole = json.loads((tmp_path / "whole.geojson").read_text())["features"]
    for cell, feature in zip(table.select(["x", "y"]).to_pylist(), whole, strict=True):
        name = f"{int(cell['x']) // 16 * 16}-{int(cell['y']) // 16 * 16}.geojson"
        wanted.setdefault(name, []).append(feature)
    assert len(wanted) > 5
    found = {
        path.name: json.loads(path.read_text())["features"]
        for path in (tmp_path / "tiles").iterdir()
    }
    assert found == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiles", "whole.geojson"]


def test_tiles_leave_nothing_behind(tmp_path):
    table = made(noise())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not an empty folder"):
        write_geojson_tiles(tmp_path / "full", table, 16)
    with pytest.raises(ConfigError, match="at least 1 px"):
        write_geojson_tiles(tmp_path / "tiles", table, 0)
    with pytest.raises(DataError, match="different columns"):
        write_geojson_tiles(tmp_path / "tiles", [table, table.drop_columns("y")], 16)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    write_geojson_tiles(tmp_path / "tiles", table.slice(0, 0), 16)
    assert list((tmp_path / "tiles").iterdir()) == []
    write_geojson_tiles(tmp_path / "tiles", table, 1000)  # an empty folder may be there
    assert [path.name for path in (tmp_path / "tiles").iterdir()] == ["0-0.geojson"]


def test_default_colors():
    pannuke = ("neoplastic", "inflammatory", "connective", "dead", "non-neoplastic epithelial")
    assert default_colors(pannuke) == ("#d55e00", "#0072b2", "#009e73", "#f0e442", "#e69f00")
    assert default_colors(("other",)) == ("#999999",)
    assert default_colors(("a", "tumour")) == ("#0072b2", "#d55e00")
    many = default_colors([f"class {i}" for i in range(40)])
    assert len(set(many)) == 40
    assert default_colors(("a", "b"), {"a": "#0072B2"})[0] == "#0072b2"
    with pytest.raises(ConfigError, match="must be '#rrggbb'"):
        default_colors(("a",), {"a": "red"})
