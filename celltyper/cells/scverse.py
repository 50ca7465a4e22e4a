"""Cells for the programs of scverse: AnnData (scanpy, squidpy) and SpatialData (napari)."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr

from celltyper.atomic import atomic_path
from celltyper.cells.omezarr import CELLS, PHENOTYPES, Progress, paint_pyramids
from celltyper.cells.stream import iter_cells
from celltyper.cells.table import (
    EMBEDDING,
    check_alike,
    classes_of,
    colors_of,
    embeddings_of,
    mpp_of,
    names_of,
)

_TABLE = "table"
_REGION = "region"


def to_anndata(cells: Mapping[str, str | Path], facts: Mapping[str, Any] | None = None) -> Any:
    """Cells of images as AnnData: what is known of each, and how probable each phenotype is.

    Parameters
    ----------
    cells : mapping of str to path
        A ``cells.parquet`` of each image, by the image's name; at least one.
    facts : mapping, optional
        Text and numbers about where the cells come from, for ``uns["celltyper"]``.

    Returns
    -------
    anndata.AnnData
        ``X`` float32, cells x (background, classes): mean softmax inside the cell, rows sum to 1.
        ``obs`` named ``image-cell_id``: `image`, `phenotype` (categorical, in the order of the
        class ids) and all other columns with one number a cell. ``obsm["spatial"]``: x, y in
        pixels of the image or of the slide's full resolution; ``obsm["X_encoder"]``: the
        embeddings, float32, if the cells have any. ``uns``: ``phenotype_colors``, and
        ``celltyper``, with the mpp of every image in the table ``images``.

    Raises
    ------
    DataError
        If a table cannot be read, or columns or classes differ.
    """
    import pandas as pd
    from anndata import AnnData

    tables, sizes = [], []
    for path in cells.values():
        head = next(iter_cells(path, rows=1))
        names = [name for name in head.column_names if name not in ("image", "outline")]
        tables.append(pa.concat_tables(iter_cells(path, names)))
        check_alike(tables[0], tables[-1])
        sizes.append(tables[-1].num_rows)
    mpps = [mpp_of(table) or (np.nan, np.nan) for table in tables]
    classes, colors = classes_of(tables[0]), colors_of(tables[0])
    table = pa.concat_tables(tables).unify_dictionaries()
    of_class = {f"p_{name}": name for name in ("background", *classes)}
    places = {}
    if EMBEDDING in table.column_names:
        places["X_encoder"] = embeddings_of(table)
        table = table.drop_columns(EMBEDDING)
    frame = table.drop_columns([*of_class, "phenotype"]).to_pandas()
    frame.insert(0, "image", pd.Categorical.from_codes(np.repeat(range(len(cells)), sizes), cells))
    phenotype = pd.Categorical(table["phenotype"].to_pandas(), categories=names_of(table))
    frame.insert(2, "phenotype", phenotype)
    frame.index = frame["image"].astype(str) + "-" + frame["cell_id"].astype(str)
    frame.index.name = None
    probabilities = np.empty((len(frame), len(of_class)), np.float32)
    for k, column in enumerate(of_class):
        probabilities[:, k] = table[column].to_numpy()
    images = pd.DataFrame(mpps, index=list(cells), columns=["mpp_x", "mpp_y"], dtype=float)
    return AnnData(
        probabilities,
        obs=frame,
        var=pd.DataFrame(index=list(of_class.values())),
        obsm={"spatial": frame[["x", "y"]].to_numpy(), **places},
        uns={
            "phenotype_colors": list(colors),
            "celltyper": {**(facts or {}), "images": images},
        },
    )


def write_anndata(
    path: str | Path, cells: Mapping[str, str | Path], facts: Mapping[str, Any] | None = None
) -> None:
    """Write `to_anndata` as ``.h5ad``, atomically; errors as there and in `atomic_path`."""
    with atomic_path(path) as temporary:
        to_anndata(cells, facts).write_h5ad(temporary, compression="gzip")


def write_spatialdata(
    folder: str | Path,
    cells: str | Path,
    height: int,
    width: int,
    *,
    name: str = "",
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the cells of an image or slide as SpatialData.

    Elements: labels ``cells_labels`` and ``phenotypes_labels`` (the pyramids of
    `celltyper.cells.omezarr.paint_pyramids`), shapes ``cells`` (outlines by ``cell_id``) and
    ``table`` (`to_anndata`), which annotates the shapes; without cells only the labels. All are in
    pixels; the coordinate system ``global`` has pixels too, ``micrometer`` (if the mpp is known)
    micrometres. The outlines are held in memory, some 2 kB a cell.

    Parameters
    ----------
    folder : str or Path
        Store to write, not there yet; its parent takes the label images meanwhile.
    cells : str or Path
        A ``cells.parquet`` of one image.
    height, width : int
        Pixels of the image, or of the slide's full resolution.
    name : str
        Of the image.
    facts : mapping, optional
        See `to_anndata`.
    progress : callable, optional
        Gets the parts of the label images done and their number.

    Raises
    ------
    DataError
        If the table cannot be read, or an outline is no polygon.
    """
    import geopandas
    import pandas as pd
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    folder = Path(folder)
    table = pa.concat_tables(iter_cells(cells, ["cell_id", "outline"]))
    mpp = mpp_of(table)
    systems: dict[str, Any] = {"global": Identity()}
    if mpp is not None:
        systems["micrometer"] = Scale(list(mpp), axes=("x", "y"))
    elements: dict[str, Any] = {}
    if table.num_rows:  # spatialdata knows no empty shapes
        shapes = geopandas.GeoDataFrame(
            geometry=geopandas.GeoSeries.from_wkb(table["outline"].to_numpy()).to_numpy(),
            index=table["cell_id"].to_pandas(),
        )
        annotated = to_anndata({name: cells}, facts)
        annotated.obs[_REGION] = pd.Categorical([CELLS] * len(shapes))
        elements["shapes"] = {CELLS: ShapesModel.parse(shapes, transformations=systems)}
        elements["tables"] = {
            _TABLE: TableModel.parse(
                annotated, region=CELLS, region_key=_REGION, instance_key="cell_id"
            )
        }
    with tempfile.TemporaryDirectory(prefix=".labels.", dir=folder.parent) as scratch:
        group = zarr.open_group(scratch, mode="w", zarr_format=3)
        levels = paint_pyramids(group, cells, height, width, progress)
        elements["labels"] = {
            f"{kind}_labels": _tree([group[f"{kind}/{k}"] for k in range(levels)], systems)
            for kind in (CELLS, PHENOTYPES)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of spatialdata's libraries, about each other
            SpatialData(**elements).write(folder)


def _tree(arrays: list[Any], systems: Mapping[str, Any]) -> Any:
    """Arrays of a pyramid as spatialdata has them; it puts the centre of a pixel at a half."""
    import dask.array
    from spatialdata.transformations import set_transformation
    from xarray import DataArray, Dataset, DataTree

    levels = {}
    for k, array in enumerate(arrays):
        sizes = zip("yx", arrays[0].shape, array.shape, strict=True)
        coords = {axis: (np.arange(n) + 0.5) * (full / n) for axis, full, n in sizes}
        pixels = dask.array.from_zarr(array, chunks=array.shards)
        levels[f"scale{k}"] = Dataset({"image": DataArray(pixels, dims=("y", "x"), coords=coords)})
    tree = DataTree.from_dict(levels)
    set_transformation(tree, dict(systems), set_all=True)
    return tree
