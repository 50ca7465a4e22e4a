"""Cells of a results folder in other formats: what is written where, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from made_results import made_cells, noise, write_results

from celltyper import formats
from celltyper.cells.table import concat_cells, read_cells
from celltyper.config import Config
from celltyper.errors import ConfigError, DataError, RunError
from celltyper.formats import FORMATS, export_cells
from celltyper.inference import infer
from celltyper.training import train

Command = Callable[..., Any]
SHAPE = (60, 47)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Of one image."""
    return write_results(tmp_path / "out", {"one": made_cells(noise(SHAPE))}, SHAPE)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_results_of_real_inference(
    tiny: Callable[..., Config], made_data: Path, tmp_path: Path, celltyper_command: Command
) -> None:
    """Two images, each in its folder, and AnnData of both; labels as inference found them."""
    steps = ("instances.method=distance", "train.steps=45", "train.lr=0.003")
    run = train(
        tiny(made_data, *steps, "train.validate_every=45"),
        tmp_path / "run",
        device="cpu",
        progress=False,
    )
    options = {"mpp": 0.5, "device": "cpu", "progress": False}
    out = infer([made_data / "test"], run, tmp_path / "out", **options)
    code, said, err = celltyper_command(
        "export", out, "--to", "ome-zarr, anndata,geojson.gz", "-o", tmp_path / "new"
    )
    assert (code, err) == (0, "")
    assert names(tmp_path / "new") == {"test5", "test6", "cells.h5ad"}
    assert names(tmp_path / "new" / "test5") == {"cells.ome.zarr", "cells.geojson.gz"}
    lines = said.splitlines()
    assert len(lines) == 5
    assert f"cells: {tmp_path / 'new' / 'test5' / 'cells.ome.zarr'}" in lines
    found = 0
    for name in ("test5", "test6"):
        with np.load(out / name / "labels.npz") as arrays:
            labels, kinds = arrays["inst"], arrays["type"]
        found += labels.max()
        store = zarr.open_group(str(tmp_path / "new" / name / "cells.ome.zarr"), mode="r")
        np.testing.assert_array_equal(store["labels/cells/0"][:], labels)
        np.testing.assert_array_equal(store["labels/phenotypes/0"][:], kinds)
        packed = gzip.decompress((tmp_path / "new" / name / "cells.geojson.gz").read_bytes())
        assert packed == (out / name / "cells.geojson").read_bytes()
    assert found > 5
    assert read_cells(out / "cells.parquet").num_rows == found


def test_every_image_has_its_own_files(tmp_path: Path) -> None:
    tables = {name: made_cells(noise(SHAPE, seed=i), name=name) for i, name in enumerate("ab")}
    out = write_results(tmp_path, tables, SHAPE)
    written = export_cells(out, ["csv", "geojson"], progress=False)
    assert written == [out / n / f"cells.{kind}" for kind in ("csv", "geojson") for n in "ab"]
    for name, table in tables.items():
        with (out / name / "cells.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["cell_id"] for row in rows] == [str(i) for i in table["cell_id"].to_pylist()]
        features = json.loads((out / name / "cells.geojson").read_text())["features"]
        assert len(features) == table.num_rows
    assert concat_cells(list(tables.values())).num_rows == sum(t.num_rows for t in tables.values())


@pytest.mark.parametrize("to", ["csv", "ome-zarr", "anndata"])
def test_what_is_there_is_replaced_only_if_asked(results: Path, to: str) -> None:
    (path,) = export_cells(results, to, progress=False)
    before = names(results)
    mine = path / "mine" if path.is_dir() else path
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=r"is there already; pass --overwrite or another folder"):
        export_cells(results, ["geojson", to], progress=False)
    assert mine.read_text() == "mine"
    assert names(results) == before  # nothing was written before the refusal
    assert export_cells(results, to, overwrite=True, progress=False) == [path]
    assert names(results) == before
    assert not mine.exists() or mine.read_bytes() != b"mine"


def test_what_is_in_the_way_is_not_removed(results: Path) -> None:
    (results / "cells.csv").mkdir()
    (results / "cells.ome.zarr").write_text("mine")
    for to in ("csv", "ome-zarr"):
        with pytest.raises(ConfigError, match="of this name is there; remove it"):
            export_cells(results, to, overwrite=True, progress=False)
    assert (results / "cells.ome.zarr").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_stopped_half_way_the_earlier_store_stays(
    results: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (path,) = export_cells(results, "ome-zarr", progress=False)
    (path / "mine").write_text("mine")
    before = names(results)

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("celltyper.cells.omezarr._mean_halved", fails)
    said = RunError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(said) as caught:
        export_cells(results, "ome-zarr", overwrite=True, progress=False)
    if said is RunError:
        assert str(caught.value) == (
            f"cannot write cells.ome.zarr to folder {results}: No space left on device"
        )
    assert names(results) == before
    assert (path / "mine").read_text() == "mine"


def test_a_package_that_is_missing_is_named(
    results: Path, monkeypatch: pytest.MonkeyPatch, celltyper_command: Command
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    for to in ("anndata", "spatialdata"):
        code, _, err = celltyper_command("export", results, "--to", f"csv,{to}")
        assert (code, err.count("\n")) == (2, 1)
        assert f"export to {to} needs {to}" in err
        assert "pip install 'celltyper[spatial]'" in err
    assert names(results) == {"cells.parquet", "infer.json"}
    export_cells(results, ["csv", "ome-zarr"], progress=False)  # need none


def test_folders_that_are_no_results_of_cells(results: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give a folder that 'celltyper infer' wrote"):
        export_cells(tmp_path / "none", "csv")
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "infer.json").write_text('{"task": "patches", "rows": 3}')
    with pytest.raises(DataError, match="holds patches"):
        export_cells(tmp_path / "patches", "csv")
    facts = json.loads((results / "infer.json").read_text())
    for text in ("{", "[]", "{}", '{"images": []}', json.dumps(facts | {"images": [{}]})):
        (results / "infer.json").write_text(text)
        with pytest.raises(DataError, match="run infer again"):
            export_cells(results, "csv")
    (results / "infer.json").write_text(json.dumps(facts))
    (results / "cells.parquet").write_text("damaged")
    for to in FORMATS:
        if to != "spatialdata":
            with pytest.raises(DataError, match="cannot read cells"):
                export_cells(results, to, progress=False)
    assert names(results) == {"cells.parquet", "infer.json"}


def test_flags_and_folder_that_do_not_fit(
    results: Path, tmp_path: Path, celltyper_command: Command
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("task: cells\n")
    for words, said in (
        ((results,), "holds cells: say --to"),
        ((results, "--format", "onnx"), "holds cells: say --to"),
        ((results, "--to", "csv", "--format", "onnx"), "--format is for a model"),
        ((results, "--to", "csv", "--tile", 64), "--tile is for a model"),
        ((results, "--to", "csv", "--weights", "w"), "--weights is for a model"),
        ((results, "--to", "csv", "--allow-code"), "--allow-code is for a model"),
        ((results, "--to", "cvs"), "unknown format of cells 'cvs'; did you mean 'csv'?"),
        ((results, "--to", ","), "give at least one format"),
        ((tmp_path / "run", "--to", "csv"), "--to is for results of infer"),
        ((tmp_path / "none", "--to", "csv"), "no infer.json in"),
        ((tmp_path / "none",), "no model at"),
    ):
        code, out, err = celltyper_command("export", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), words
        assert said in err
    assert names(results) == {"cells.parquet", "infer.json"}
    code, out, err = celltyper_command("export", results, "--to", "csv", "-q")
    assert (code, out, err) == (0, "", "")


def test_geojson_in_squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celltyper.formats.TILE", 40)
    cells = made_cells(noise(SHAPE))
    out = write_results(tmp_path / "out", {"one": cells}, SHAPE)
    (path,) = export_cells(out, "geojson-tiles", progress=False)
    x, y = cells["x"].to_numpy(), cells["y"].to_numpy()
    squares = {(int(a // 40) * 40, int(b // 40) * 40) for a, b in zip(x, y, strict=True)}
    assert names(path) == {f"{a}-{b}.geojson" for a, b in squares}
    assert len(squares) > 2
    found = [
        feature["properties"]["measurements"]["cell_id"]
        for file in path.iterdir()
        for feature in json.loads(file.read_text())["features"]
    ]
    assert sorted(found) == cells["cell_id"].to_pylist()
