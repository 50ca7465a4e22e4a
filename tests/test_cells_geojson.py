from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
import shapely
from shapely.geometry import shape

from celltyper.cells import geojson
from celltyper.cells.colors import default_colors
from celltyper.cells.geojson import write_geojson
from celltyper.cells.outlines import outlines
from celltyper.cells.table import cells_table
from celltyper.errors import ConfigError, DataError
from celltyper.types import Prediction

CLASSES = ("tumour", 'Zelle "ä" \\ 細胞', "other")


def made(labels, seed=0, mpp: float | None = 0.25):
    n = int(labels.max())
    cells = np.random.default_rng(seed).dirichlet(np.ones(4), n).astype(np.float32).reshape(n, 4)
    maps = np.zeros((4, *labels.shape), np.float32)
    found = outlines(labels)
    return cells_table(Prediction(labels, maps, cells, CLASSES, mpp), found=found), found


def noise(shape=(40, 50)):
    rng = np.random.default_rng(1)
    labels = rng.integers(1, 40, shape) * (rng.random(shape) < 0.7)
    return np.unique(labels, return_inverse=True)[1].reshape(shape).astype(np.int32)


@pytest.mark.parametrize("chunk", [1, 50, 1 << 18])
def test_read_back(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(geojson, "_CHUNK_CORNERS", chunk)
    labels = noise()
    table, found = made(labels)
    write_geojson(tmp_path / "cells.geojson", table, found)
    read = json.loads((tmp_path / "cells.geojson").read_text("utf-8"))
    assert read["type"] == "FeatureCollection"
    assert len(read["features"]) == labels.max()
    cells = np.array([shape(feature["geometry"]) for feature in read["features"]])
    assert shapely.is_valid(cells).all()
    assert shapely.area(cells).tolist() == np.bincount(labels.ravel())[1:].tolist()
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
    table, found = made(np.array([[0, 1]], np.int32), mpp=None)
    write_geojson(tmp_path / "cells.geojson", table, found, dict.fromkeys(CLASSES, "#0a0B0c"))
    (feature,) = json.loads((tmp_path / "cells.geojson").read_text())["features"]
    assert feature["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[2, 0], [2, 1], [1, 1], [1, 0], [2, 0]]],
    }
    assert feature["properties"]["classification"]["color"] == [10, 11, 12]
    assert "area_um2" not in feature["properties"]["measurements"]  # null: left out


def test_numbers(tmp_path):
    table, found = made(np.array([[1, 2, 3, 4, 5, 6]], np.int32))
    values = [0.0, -0.0000004, -1.5, 0.000001, 123456789.25, float("nan")]
    table = table.append_column("m", pa.array(values))
    write_geojson(tmp_path / "cells.geojson", table, found)
    read = json.loads((tmp_path / "cells.geojson").read_text())["features"]
    measured = [feature["properties"]["measurements"] for feature in read]
    assert [m.get("m") for m in measured] == [0, 0, -1.5, 0.000001, 123456789.25, None]


def test_no_cells_and_gzip(tmp_path):
    table, found = made(np.zeros((3, 3), np.int32))
    write_geojson(tmp_path / "none.geojson", table, found)
    assert json.loads((tmp_path / "none.geojson").read_text())["features"] == []
    table, found = made(noise())
    write_geojson(tmp_path / "a.geojson", table, found)
    for name in ("a.geojson.gz", "b.geojson.gz"):
        write_geojson(tmp_path / name, table, found)
    packed = (tmp_path / "a.geojson.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "a.geojson").read_bytes()
    assert packed == (tmp_path / "b.geojson.gz").read_bytes()


def test_bad_input_writes_nothing(tmp_path):
    table, found = made(noise())
    with pytest.raises(DataError, match="not of the same cells"):
        write_geojson(tmp_path / "a.geojson", table.slice(1), found)
    with pytest.raises(ConfigError, match="no such class"):
        write_geojson(tmp_path / "a.geojson", table, found, {"x": "#000000"})
    with pytest.raises(DataError, match="is not a folder"):
        write_geojson(tmp_path / "absent" / "a.geojson", table, found)
    assert list(tmp_path.iterdir()) == []


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
