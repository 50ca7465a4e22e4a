"""Cells as OME-Zarr: labels to the last pixel, metadata by the standard's own models."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import zarr
from made_results import made_cells, noise, phenotypes_of, write_results
from ome_zarr_models.v05.image import Image
from ome_zarr_models.v05.image_label import ImageLabel, ImageLabelAttrs
from ome_zarr_models.v05.labels import LabelsAttrs

from celltyper.cells import omezarr
from celltyper.cells.omezarr import halved, paint_pyramids
from celltyper.cells.outlines import Place
from celltyper.errors import DataError
from celltyper.formats import export_cells
from celltyper.slides import open_slide
from celltyper.types import Labels


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 64 pixels, so that a small image has many of them and several levels."""
    for name, value in {"_SIDE": 64, "_CHUNK": 16, "_SMALL": 50}.items():
        monkeypatch.setattr(omezarr, name, value)


def painted(table: pa.Table, shape: tuple[int, int], folder: Path, rows: int = 16) -> zarr.Group:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "cells.parquet", row_group_size=rows)
    group = zarr.open_group(str(folder / "labels"), mode="w", zarr_format=3)
    levels = paint_pyramids(group, folder / "cells.parquet", *shape)
    assert sorted(group["cells"].array_keys()) == [str(k) for k in range(levels)]
    return group


def by_counting(labels: Labels) -> Labels:
    """The rule of a coarser level, one pixel after another."""
    small = np.zeros((-(-labels.shape[0] // 2), -(-labels.shape[1] // 2)), np.int32)
    for (row, col), _ in np.ndenumerate(small):
        four = labels[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].ravel().tolist()
        counts = Counter(four)
        small[row, col] = max(counts, key=lambda v: (counts[v], v != 0, -four.index(v)))
    return small


@pytest.mark.parametrize(("rows", "shuffled"), [(16, False), (16, True), (10_000, False)])
def test_every_level_to_the_last_pixel(
    tmp_path: Path, small_parts: None, rows: int, shuffled: bool
) -> None:
    labels = noise((300, 211), cells=400)
    table = made_cells(labels)
    kinds = phenotypes_of(table)
    outlines = shapely.from_wkb(table["outline"].to_numpy())
    assert {g.geom_type for g in outlines} == {"Polygon", "MultiPolygon"}
    assert shapely.get_num_interior_rings(outlines).any()
    if shuffled:
        table = table.take(np.random.default_rng(0).permutation(table.num_rows))
    group = painted(table, labels.shape, tmp_path, rows)
    assert len(list(group["cells"].array_keys())) == 4  # 300, 150, 75, 38
    expected = labels
    for k in range(4):
        cells, phenotypes = group[f"cells/{k}"], group[f"phenotypes/{k}"]
        assert (cells.dtype, phenotypes.dtype) == (np.int32, np.uint8)
        np.testing.assert_array_equal(cells[:], expected)
        np.testing.assert_array_equal(phenotypes[:], kinds[expected])
        expected = by_counting(expected)


def test_rule_of_coarser_levels() -> None:
    labels = np.array(
        [[1, 2, 0, 0, 5], [2, 3, 0, 4, 0], [0, 0, 7, 8, 0], [6, 6, 8, 7, 9]], np.int32
    )
    assert halved(labels).tolist() == [[2, 0, 5], [6, 7, 9]]


@pytest.mark.parametrize("scale", [0.5, 1.5, 2.0013, 3.7])
def test_slide_read_at_another_resolution(tmp_path: Path, small_parts: None, scale: float) -> None:
    """A pixel of the slide has the label that its centre lies in."""
    labels = noise((60, 47))
    table = made_cells(labels, place=Place(scale_x=scale, scale_y=scale))
    height, width = (int(n * scale) for n in labels.shape)
    group = painted(table, (height, width), tmp_path)
    row = np.floor((np.arange(height) + 0.5) / scale).astype(int)
    col = np.floor((np.arange(width) + 0.5) / scale).astype(int)
    np.testing.assert_array_equal(group["cells/0"][:], labels[row[:, None], col[None]])


def test_slanted_outlines_by_the_centres_of_pixels(tmp_path: Path, small_parts: None) -> None:
    """Against shapely; cells beyond the image's edges are cut there, those outside are not seen."""
    rng = np.random.default_rng(3)
    table = made_cells(noise((60, 47), cells=12)).slice(0, 8)
    shapes = []
    for _ in range(table.num_rows):
        center, angles = rng.uniform(0, 150, 2), np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = rng.uniform(3, 60, 9)
        ring = center + radius[:, None] * np.stack((np.cos(angles), np.sin(angles)), axis=1)
        shapes.append(shapely.Polygon(ring).difference(shapely.Point(center).buffer(2)))
    shapes[0] = shapely.box(-40, -40, -20, -20)
    shapes[1] = shapely.box(500, 1e300, 600, 1e301)
    at = table.column_names.index("outline")
    table = table.set_column(at, "outline", pa.array(shapely.to_wkb(shapes, byte_order=1)))
    group = painted(table, (150, 140), tmp_path)
    x, y = np.meshgrid(np.arange(140) + 0.5, np.arange(150) + 0.5)
    expected = np.zeros((150, 140), np.int32)
    for cell, shape in zip(table["cell_id"].to_pylist(), shapes, strict=True):
        # row groups one after another: where made cells overlap, the last wins
        expected[shapely.contains_xy(shape, x, y)] = cell
    assert len(np.unique(expected)) > 6
    np.testing.assert_array_equal(group["cells/0"][:], expected)


def test_cells_that_share_an_edge_share_no_pixel_and_leave_none(tmp_path: Path) -> None:
    """Two halves of a square along many slanted lines, some of them through centres."""
    table = made_cells(noise((30, 30), cells=4)).slice(0, 2)
    at = table.column_names.index("outline")
    for shift in (0.0, 0.5, 1.25, 7.0, 19.5):
        ends = (shift, 0.0), (20 - shift, 20.0)
        halves = [
            shapely.Polygon([(0, 0), *ends, (0, 20)]),
            shapely.Polygon([*ends, (20, 20), (20, 0)]),
        ]
        both = table.set_column(at, "outline", pa.array(shapely.to_wkb(halves, byte_order=1)))
        group = painted(both, (20, 20), tmp_path / str(shift))
        assert (group["cells/0"][:] > 0).all()
        right = painted(both.slice(1), (20, 20), tmp_path / f"{shift}r")["cells/0"][:]
        left = painted(both.slice(0, 1), (20, 20), tmp_path / f"{shift}l")["cells/0"][:]
        assert ((right > 0) ^ (left > 0)).all()


def test_parts_without_cells_are_not_written(tmp_path: Path, small_parts: None) -> None:
    labels = np.zeros((300, 200), np.int32)
    labels[70:80, 130:140] = 1
    group = painted(made_cells(labels), labels.shape, tmp_path)
    np.testing.assert_array_equal(group["cells/0"][:], labels)
    folder = tmp_path / "labels" / "cells"
    written = [str(p.relative_to(folder)) for p in folder.rglob("c/*/*") if p.is_file()]
    assert sorted(written) == ["0/c/1/2", "1/c/0/1", "2/c/0/0", "3/c/0/0"]


def test_no_cells(tmp_path: Path) -> None:
    group = painted(made_cells(np.zeros((20, 30), np.int32)), (20, 30), tmp_path)
    assert group["cells/0"].shape == (20, 30)
    assert not group["cells/0"][:].any()


def test_outline_that_is_no_polygon(tmp_path: Path) -> None:
    table = made_cells(noise((30, 30), cells=4))
    at = table.column_names.index("outline")
    wkb = table["outline"].to_pylist()
    for wrong in (shapely.to_wkb(shapely.Point(1, 2)), wkb[1][:-5], b"", wkb[1] + b"\0"):
        broken = table.set_column(at, "outline", pa.array([wkb[0], wrong, *wkb[2:]]))
        with pytest.raises(DataError, match=r"outline of cell 2 is no polygon"):
            painted(broken, (30, 30), tmp_path)


@pytest.fixture
def pixels() -> Any:
    coarse = np.random.default_rng(0).integers(0, 255, (25, 18, 3), np.uint8)
    return coarse.repeat(12, axis=0).repeat(12, axis=1)[:300, :211]


def exported(folder: Path, table: pa.Table, shape: tuple[int, int], image: Path | None) -> Path:
    images = None if image is None else {"one": image}
    write_results(folder, {"one": table}, shape, images)
    (path,) = export_cells(folder, "ome-zarr", progress=False)
    return path


def test_metadata_by_the_models_of_the_standard(
    tmp_path: Path, small_parts: None, pixels: Any
) -> None:
    PIL.Image.fromarray(pixels).save(tmp_path / "one.png")
    labels = noise((300, 211), cells=400)
    path = exported(tmp_path / "out", made_cells(labels), labels.shape, tmp_path / "one.png")
    assert path == tmp_path / "out" / "cells.ome.zarr"
    root = zarr.open_group(str(path), mode="r")
    np.testing.assert_array_equal(root["labels/cells/0"][:], labels)

    kinds = ImageLabel.from_zarr(root["labels/phenotypes"]).attributes.ome
    colors = {color.label_value: color.rgba for color in kinds.image_label.colors}
    assert colors[0] == (0, 0, 0, 0)
    assert [colors[k] for k in (1, 2, 3)] == [
        (0xD5, 0x5E, 0x00, 255),
        (0x00, 0x9E, 0x73, 255),
        (10, 11, 12, 255),
    ]
    names = {p.label_value: p.model_dump()["name"] for p in kinds.image_label.properties}
    assert names == {0: "background", 1: "tumour", 2: "stroma", 3: "other"}
    # Labels without colors are valid, but not when these models read them from a store.
    cells = ImageLabelAttrs.model_validate(root["labels/cells"].attrs["ome"])
    assert cells.image_label.colors is None
    assert cells.image_label.source.image == "../../"
    Image.from_zarr(root["labels/cells"])
    assert LabelsAttrs.model_validate(root["labels"].attrs["ome"]).labels == ["cells", "phenotypes"]
    shutil.copytree(path, tmp_path / "bare.zarr", ignore=shutil.ignore_patterns("labels"))
    image = Image.from_zarr(zarr.open_group(str(tmp_path / "bare.zarr"), mode="r"))

    # By the standard an image has as many levels as its labels.
    found = [image.attributes.ome, kinds, Image.from_zarr(root["labels/cells"]).attributes.ome]
    for attributes, axes in zip(found, ("cyx", "yx", "yx"), strict=True):
        (multiscale,) = attributes.multiscales
        assert "".join(axis.name for axis in multiscale.axes) == axes
        assert {a.unit for a in multiscale.axes if a.type == "space"} == {"micrometer"}
        assert [d.path for d in multiscale.datasets] == ["0", "1", "2", "3"]
        for k, dataset in enumerate(multiscale.datasets):
            scale, shift = dataset.coordinateTransformations
            # Of the pixels 0 .. 2**k - 1 that the first pixel stands for, the middle.
            middle = 0.25 * np.arange(2**k).mean()
            assert scale.scale[-2:] == pytest.approx([0.25 * 2**k] * 2)
            assert shift.translation[-2:] == pytest.approx([middle] * 2)


def test_image_around_the_labels_is_the_slide(tmp_path: Path, pixels: Any) -> None:
    PIL.Image.fromarray(pixels).save(tmp_path / "one.png")
    labels = noise((300, 211))
    path = exported(tmp_path / "out", made_cells(labels), labels.shape, tmp_path / "one.png")
    root = zarr.open_group(str(path), mode="r")
    np.testing.assert_array_equal(root["0"][:].transpose(1, 2, 0), pixels)
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((0.25, 0.25))


def test_thumbnail_of_a_large_slide_lies_where_the_slide_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: Any
) -> None:
    monkeypatch.setattr(omezarr, "_THUMBNAIL", 50)
    monkeypatch.setattr(omezarr, "_SMALL", 100)
    PIL.Image.fromarray(pixels).save(tmp_path / "one.png")
    labels = noise((300, 211))
    path = exported(tmp_path / "out", made_cells(labels), labels.shape, tmp_path / "one.png")
    root = zarr.open_group(str(path), mode="r")
    assert [root[str(k)].shape for k in range(3)] == [(3, 50, 35), (3, 25, 18), (3, 13, 9)]
    first, second = (
        d["coordinateTransformations"][0]["scale"]
        for d in root.attrs["ome"]["multiscales"][0]["datasets"][:2]
    )
    assert first == pytest.approx([1, 0.25 * 300 / 50, 0.25 * 211 / 35])
    assert second == pytest.approx([1, *(2 * s for s in first[1:])])
    means = root["0"][:, :, :34].reshape(3, 25, 2, 17, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(root["1"][:, :, :17], means, atol=0.51)


def test_image_that_is_gone_leaves_the_thumbnail_white(
    tmp_path: Path, pixels: Any, caplog: pytest.LogCaptureFixture
) -> None:
    labels = noise((300, 211))
    with caplog.at_level(logging.WARNING, "celltyper"):
        path = exported(tmp_path / "out", made_cells(labels), labels.shape, None)
    assert "one: no thumbnail beside the labels" in caplog.text
    root = zarr.open_group(str(path), mode="r")
    assert root["0"].shape == (3, 300, 211)
    assert (root["0"][:] == 255).all()
    caplog.clear()
    PIL.Image.fromarray(pixels[:200]).save(tmp_path / "other.png")
    with caplog.at_level(logging.WARNING, "celltyper"):
        exported(tmp_path / "two", made_cells(labels), labels.shape, tmp_path / "other.png")
    assert "is another image than inference read" in caplog.text


def test_unknown_mpp_is_in_pixels(tmp_path: Path) -> None:
    labels = noise((60, 47))
    path = exported(tmp_path / "out", made_cells(labels, mpp=None), labels.shape, None)
    (multiscale,) = zarr.open_group(str(path), mode="r")["labels/cells"].attrs["ome"]["multiscales"]
    assert multiscale["axes"] == [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    assert multiscale["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0, 1.0]
