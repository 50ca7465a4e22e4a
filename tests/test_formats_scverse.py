"""Cells as AnnData, read back with anndata."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from made_results import CLASSES, made_cells, noise, write_results

from celltyper.cells.table import concat_cells
from celltyper.errors import DataError
from celltyper.formats import export_cells


def test_one_image(tmp_path: Path) -> None:
    table = made_cells(noise((60, 47)))
    table = table.append_column("solidity", [[0.5] * (table.num_rows - 1) + [None]])
    rows = table.to_pylist()
    write_results(tmp_path, {"one": table}, (60, 47))
    assert export_cells(tmp_path, "anndata", progress=False) == [tmp_path / "cells.h5ad"]
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert read.obs_names.tolist() == [f"one-{row['cell_id']}" for row in rows]
    assert read.var_names.tolist() == ["background", *CLASSES]
    assert read.X.dtype == np.float32
    for k, name in enumerate(read.var_names):
        assert read.X[:, k].tolist() == [row[f"p_{name}"] for row in rows]
    assert read.obs["phenotype"].tolist() == [row["phenotype"] for row in rows]
    assert read.obs["phenotype"].cat.categories.tolist() == list(CLASSES)
    # scanpy takes the colors in the order of the categories
    assert list(read.uns["phenotype_colors"]) == ["#d55e00", "#009e73", "#0a0b0c"]
    assert read.obsm["spatial"].tolist() == [[row["x"], row["y"]] for row in rows]
    numbers = ("cell_id", "x", "y", "area_um2", "area_px", "probability", "solidity")
    assert list(read.obs) == ["image", "cell_id", "phenotype", *numbers[1:]]
    for name in numbers[:-1]:
        assert read.obs[name].tolist() == [row[name] for row in rows]
    assert read.obs["solidity"].tolist()[:-1] == [0.5] * (len(rows) - 1)
    assert np.isnan(read.obs["solidity"].iloc[-1])
    facts = read.uns["celltyper"]
    assert (facts["version"], facts["model"], facts["model_mpp"]) == ("0.1.0", "/runs/one", 0.5)
    assert facts["images"].loc["one"].to_dict() == {"mpp_x": 0.25, "mpp_y": 0.25}


def test_images_of_a_folder_together(tmp_path: Path) -> None:
    """One without cells, one of unknown mpp; a phenotype that no cell has keeps its color."""
    first, second = made_cells(noise((60, 47))), made_cells(noise((50, 50), 9), None, "two")
    kept = second.filter(np.array(second["phenotype"].to_pylist()) == "stroma")
    empty = made_cells(np.zeros((9, 9), np.int32), name="none")
    write_results(tmp_path, {"one": first, "none": empty, "two": kept}, (60, 47))
    export_cells(tmp_path, "anndata", tmp_path / "new", progress=False)
    read = anndata.read_h5ad(tmp_path / "new" / "cells.h5ad")
    rows = concat_cells([first, kept]).to_pylist()
    assert 0 < kept.num_rows < second.num_rows
    assert read.obs["image"].tolist() == [row["image"] for row in rows]
    assert read.obs["image"].cat.categories.tolist() == ["one", "none", "two"]
    assert read.obs_names.is_unique
    assert read.obs["cell_id"].tolist() == [row["cell_id"] for row in rows]
    assert read.obs["phenotype"].cat.categories.tolist() == list(CLASSES)
    assert np.isnan(read.obs["area_um2"][read.obs["image"] == "two"]).all()
    assert read.uns["celltyper"]["images"]["mpp_x"].tolist()[:2] == [0.25, 0.25]
    assert np.isnan(read.uns["celltyper"]["images"].loc["two", "mpp_x"])


def test_no_cells_at_all(tmp_path: Path) -> None:
    write_results(tmp_path, {"one": made_cells(np.zeros((9, 9), np.int32))}, (9, 9))
    (path,) = export_cells(tmp_path, "anndata", progress=False)
    read = anndata.read_h5ad(path)
    assert read.shape == (0, 4)
    assert read.obsm["spatial"].shape == (0, 2)


def test_images_of_different_columns_are_refused(tmp_path: Path) -> None:
    first, second = made_cells(noise((60, 47))), made_cells(noise((50, 50)), name="two")
    second = second.append_column("solidity", [[0.5] * second.num_rows])
    write_results(tmp_path, {"one": first, "two": second}, (60, 47))
    with pytest.raises(DataError, match=r"different columns \(solidity\)"):
        export_cells(tmp_path, "anndata", progress=False)
    assert not (tmp_path / "cells.h5ad").exists()
