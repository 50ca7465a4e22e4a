"""Cells as SpatialData, read back with spatialdata."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from made_results import CLASSES, made_cells, noise, phenotypes_of, write_results

from celltyper.cells import omezarr
from celltyper.cells.omezarr import halved
from celltyper.cells.outlines import Place
from celltyper.formats import export_cells

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its libraries, about each other
    import spatialdata
    from spatialdata.transformations import get_transformation


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small parts; and what spatialdata sets up in logging is taken back."""
    for name, value in {"_SIDE": 64, "_CHUNK": 16, "_SMALL": 50}.items():
        monkeypatch.setattr(omezarr, name, value)
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers = handlers


def read(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spatialdata.read_zarr(path)


def matrix(element: Any, system: str) -> Any:
    transformation = get_transformation(element, system)
    return transformation.to_affine_matrix(("x", "y"), ("x", "y"))


def test_labels_shapes_and_table_of_a_slide(tmp_path: Path) -> None:
    labels = noise((120, 91), cells=90)
    table = made_cells(labels, mpp=0.5, place=Place(scale_x=2, scale_y=2))
    write_results(tmp_path, {"one": table}, (240, 182))
    (path,) = export_cells(tmp_path, "spatialdata", progress=False)
    assert path == tmp_path / "cells.spatialdata.zarr"
    assert {p.name for p in tmp_path.iterdir()} == {"cells.parquet", "infer.json", path.name}
    data = read(path)
    assert set(data.labels) == {"cells_labels", "phenotypes_labels"}
    assert (set(data.shapes), set(data.tables)) == ({"cells"}, {"table"})

    expected = labels.repeat(2, axis=0).repeat(2, axis=1)
    kinds = phenotypes_of(table)
    for k in range(4):  # 240, 120, 60, 30
        cells = data.labels["cells_labels"][f"scale{k}"]["image"]
        np.testing.assert_array_equal(cells.to_numpy(), expected)
        phenotypes = data.labels["phenotypes_labels"][f"scale{k}"]["image"].to_numpy()
        np.testing.assert_array_equal(phenotypes, kinds[expected])
        assert cells.coords["y"][0] == pytest.approx(2**k / 2)  # centre of the first pixel
        expected = halved(expected)

    shapes = data.shapes["cells"]
    assert shapes.index.tolist() == table["cell_id"].to_pylist()
    outlines = shapely.from_wkb(table["outline"].to_pylist())
    assert shapely.equals_exact(shapes.geometry.to_numpy(), outlines).all()

    for element in (*data.labels.values(), shapes):
        np.testing.assert_array_equal(matrix(element, "global"), np.eye(3))
        np.testing.assert_allclose(matrix(element, "micrometer"), np.diag([0.25, 0.25, 1]))

    annotated = data.tables["table"]
    assert annotated.uns["spatialdata_attrs"] == {
        "region": "cells",
        "region_key": "region",
        "instance_key": "cell_id",
    }
    assert annotated.obs["phenotype"].tolist() == table["phenotype"].to_pylist()
    assert annotated.obs["phenotype"].cat.categories.tolist() == list(CLASSES)
    element, joined = spatialdata.join_spatialelement_table(
        sdata=data, spatial_element_names="cells", table_name="table", how="inner"
    )
    assert len(element["cells"]) == joined.n_obs == table.num_rows


def test_unknown_mpp_and_no_cells(tmp_path: Path) -> None:
    write_results(tmp_path, {"one": made_cells(np.zeros((70, 90), np.int32), None)}, (70, 90))
    (path,) = export_cells(tmp_path, "spatialdata", progress=False)
    data = read(path)
    assert not data.shapes
    assert not data.tables
    assert data.coordinate_systems == ["global"]
    assert not data.labels["cells_labels"]["scale0"]["image"].to_numpy().any()
