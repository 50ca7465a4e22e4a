"""Own annotations: QuPath GeoJSON and points."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image as PillowImage

from celltyper.cells.outlines import outlines, to_shapely
from celltyper.errors import DataError
from celltyper.readers import points, qupath
from celltyper.readers.points import read_points
from celltyper.readers.qupath import read_qupath
from celltyper.types import UNKNOWN

Raw = dict[str, Any]


def _image(seed: int = 0, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _box(x0: float, y0: float, x1: float, y1: float) -> Raw:
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    return {"type": "Polygon", "coordinates": [ring]}


def _feature(geometry: Raw, kind: Any = None, objects: str = "detection", **more: Any) -> Raw:
    properties: Raw = {"objectType": objects}
    if kind is not None:
        properties["classification"] = kind if isinstance(kind, dict) else {"name": kind}
    return {"type": "Feature", "geometry": geometry, "properties": properties, **more}


def _write(path: Path, features: list[Raw], bare: bool = False) -> None:
    raw: Any = features if bare else {"type": "FeatureCollection", "features": features}
    text = json.dumps(raw).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture
def qu(tmp_path: Path) -> Path:
    """Images a, b and c with the three kinds of files."""
    root = tmp_path / "quproject"
    root.mkdir()
    for seed, name in enumerate("abc"):
        PillowImage.fromarray(_image(seed)).save(root / f"{name}.png")
    tumour = {"name": "Tumor", "color": [200, 0, 10]}
    cell = _feature(_box(0, 0, 8, 6), {"name": "Immune", "colorRGB": -16776961}, "cell")
    cell["nucleusGeometry"] = _box(5, 1, 7, 3)
    _write(
        root / "a.geojson",
        [_feature(_box(1, 1, 4, 4), tumour), cell, _feature(_box(0, 5, 1, 6), None)],
    )
    derived = {"names": ["Tumor", "Positive"], "color": [1, 2, 3]}
    _write(
        root / "b.geojson.gz",
        [
            _feature(_box(0, 0, 8, 6), objects="tma_core"),
            _feature(_box(0, 0, 2, 2), derived, "annotation"),
            _feature({"type": "Point", "coordinates": [1, 1]}, tumour, "annotation"),
        ],
    )
    _write(root / "c.json", [], bare=True)
    return root


def test_qupath(qu: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert qupath.recognises(qu)
    assert not points.recognises(qu)
    data = pickle.loads(pickle.dumps(read_qupath(qu)))
    assert (data.names, data.mpp, data.name) == (("a", "b", "c"), None, "quproject")
    assert data.classes == ("Immune", "Tumor", "Tumor: Positive")
    assert data.colors == ("#0000ff", "#c8000a", "#010203")
    sample = data["a"]
    want = np.zeros((6, 8), int)
    want[1:4, 1:4], want[1:3, 5:7], want[5, 0] = 1, 2, 3
    np.testing.assert_array_equal(sample.labels, want)
    assert sample.phenotypes.tolist() == [0, 2, 1, UNKNOWN]
    np.testing.assert_array_equal(sample.image, _image(0))
    want = np.zeros((6, 8), int)
    want[:2, :2] = 1
    np.testing.assert_array_equal(data["b"].labels, want)
    assert data["b"].phenotypes.tolist() == [0, 3]
    assert "b.geojson.gz: 2 objects that outline no nucleus are left out" in caplog.text
    assert data["c"].phenotypes.tolist() == [0]


def test_qupath_one_level_up_and_in_folders(qu: Path) -> None:
    assert qupath.recognises(qu.parent)
    (qu / "images").mkdir()
    (qu / "annotations").mkdir()
    for file in list(qu.iterdir()):
        if file.is_file():
            to = "images" if file.suffix == ".png" else "annotations"
            file.rename(qu / to / file.name.replace("a.geojson", "a.png.geojson"))
    data = read_qupath(qu.parent)
    assert data["a"].phenotypes.tolist() == [0, 2, 1, UNKNOWN]


def test_qupath_without_classes_and_with_meta(qu: Path) -> None:
    _write(qu / "a.geojson", [_feature(_box(1, 1, 4, 4))])
    _write(qu / "b.geojson.gz", [])
    data = read_qupath(qu)
    assert (data.classes, data.colors) == (("nucleus",), ())
    assert data["a"].phenotypes.tolist() == [0, 1]
    (qu / "meta.json").write_text(
        '{"classes": ["Tumor", "Immune"], "mpp": 0.5, "groups": {"a": "p", "b": "p"},'
        '"splits": {"train": ["a", "b"], "test": ["c"]}}'
    )
    _write(qu / "b.geojson.gz", [_feature(_box(1, 1, 4, 4), "Immune")])
    data = read_qupath(qu)
    assert (data.classes, data.mpp, data.groups["b"]) == (("Tumor", "Immune"), 0.5, "p")
    assert data.splits == {"train": ("a", "b"), "test": ("c",)}
    assert data["a"].phenotypes.tolist() == [0, UNKNOWN]
    assert data["b"].phenotypes.tolist() == [0, 2]


def test_qupath_of_version_2(qu: Path) -> None:
    core, old = (
        {"type": "Feature", "id": f"Path{kind}Object", "geometry": _box(0, 0, x, 3),
         "properties": {"classification": {"name": "Tumor", "colorRGB": -3670006}}}
        for kind, x in (("TMACore", 8), ("Detection", 3))
    )  # fmt: skip
    core["id"] = "TMACoreObject"
    _write(qu / "a.geojson", [core, old])
    data = read_qupath(qu)
    assert data["a"].labels.sum() == 9
    assert data.colors[0] == "#c8000a"


def test_qupath_multipolygon_with_hole(qu: Path) -> None:
    ring = _box(0, 0, 3, 3)["coordinates"] + _box(1, 1, 2, 2)["coordinates"]
    parts = [ring, _box(5, 4, 7, 6)["coordinates"], [[[0, 0], [1, 1]]]]
    _write(qu / "a.geojson", [_feature({"type": "MultiPolygon", "coordinates": parts}, "Tumor")])
    want = np.zeros((6, 8), int)
    want[:3, :3] = 1
    want[1, 1] = 0
    want[4:, 5:7] = 1
    np.testing.assert_array_equal(read_qupath(qu)["a"].labels, want)


def test_qupath_reads_what_celltyper_writes(qu: Path) -> None:
    # Blobs of random pixels: with holes, in pieces, touching at corners.
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((6, 8)) < 0.6, rng.integers(1, 6, (6, 8)), 0).astype(np.int32)
    features = [
        json.loads(shapely.to_geojson(shape)) for shape in to_shapely(outlines(labels)).tolist()
    ]
    _write(qu / "a.geojson", [_feature(f, f"class {i}") for i, f in enumerate(features, start=1)])
    sample = read_qupath(qu)["a"]
    np.testing.assert_array_equal(sample.labels, labels)


def test_qupath_regions_are_no_nuclei(qu: Path, caplog: pytest.LogCaptureFixture) -> None:
    region = _feature(_box(0, 0, 8, 6), "Tumor", "annotation")
    nuclei = [_feature(_box(x, 1, x + 1, 2), "Immune") for x in (0, 2, 4)]
    _write(qu / "a.geojson", [region, *nuclei])
    sample = read_qupath(qu)["a"]
    assert (sample.labels > 0).sum() == 3
    assert "a.geojson: 1 annotations are regions and left out" in caplog.text
    _write(qu / "a.geojson", [region, *nuclei[:2]])
    assert (read_qupath(qu)["a"].labels > 0).all()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([_feature(_box(0, 0, 1, 1), "tumor")], "classes 'Tumor' and 'tumor' differ only in case"),
        ([_feature(_box(0, 0, 1, 1), "Tumor ")], "classes 'Tumor' and 'Tumor ' differ only in"),
        ([{"type": "Point"}], r"a\.geojson: feature 1 is no GeoJSON Feature"),
        ([_feature(_box(0, 0, 1, 1), {"name": "Tumor"}), 3], "feature 2 is no GeoJSON Feature"),
        ([{"type": "Feature", "geometry": [1, 2]}], "feature 1 is no GeoJSON Feature"),
    ],
)
def test_wrong_qupath_features(qu: Path, features: list[Raw], message: str) -> None:
    _write(qu / "a.geojson", features)
    _write(qu / "b.geojson.gz", [_feature(_box(0, 0, 1, 1), "Tumor")])
    with pytest.raises(DataError, match=message):
        read_qupath(qu)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (_box(90, 1, 92, 3), "feature 1 lies outside the image"),
        ({"type": "Polygon", "coordinates": [[["a", 1], [2, 2], [3, 1]]]}, "feature 1: coordinat"),
        ({"type": "Polygon", "coordinates": [[1, 1], [2, 2], [3, 1]]}, "feature 1: coordinates"),
        ({"type": "Polygon"}, "feature 1: coordinates are no rings"),
        ({"type": "Polygon", "coordinates": [[[np.nan, 1], [2, 2], [3, 1]]]}, "not finite"),
    ],
)
def test_wrong_qupath_outlines(qu: Path, geometry: Raw, message: str) -> None:
    _write(qu / "a.geojson", [_feature(geometry, "Tumor")])
    with pytest.raises(DataError, match=rf"a\.geojson: .*{message}"):
        read_qupath(qu)["a"]


def test_qupath_in_micrometres(qu: Path) -> None:
    (qu / "meta.json").write_text('{"mpp": 0.25}')
    PillowImage.fromarray(_image(0, 200, 200)).save(qu / "a.png")
    boxes = [_feature(_box(x, y, x + 8, y + 8)) for x in (10, 90, 180) for y in (20, 100, 180)]
    _write(qu / "a.geojson", boxes)
    assert read_qupath(qu)["a"].labels.max() == 9
    small = [[[c * 0.25 for c in p] for p in b["geometry"]["coordinates"][0]] for b in boxes]
    _write(qu / "a.geojson", [_feature({"type": "Polygon", "coordinates": [r]}) for r in small])
    with pytest.raises(DataError, match=r"a\.geojson: coordinates look like micrometres"):
        read_qupath(qu)["a"]


@pytest.mark.parametrize("name", ["a.geojson", "b.geojson.gz"])
def test_truncated_geojson(qu: Path, name: str) -> None:
    whole = (qu / name).read_bytes()
    (qu / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{name}: unreadable or truncated GeoJSON") as error:
        read_qupath(qu)
    assert "\n" not in str(error.value)


def test_geojson_that_is_none(qu: Path) -> None:
    (qu / "a.geojson").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"a\.geojson: no GeoJSON: expected a FeatureCollection"):
        read_qupath(qu)
    (qu / "a.geojson").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"a\.geojson: unreadable"):
        read_qupath(qu)


@pytest.mark.parametrize(
    "names", [("a.geojson", "a.json"), ("a_alice.geojson", "a_bob.geojson"),
              ("annotations/a.geojson", "a.geojson")]
)  # fmt: skip
def test_two_annotators(qu: Path, names: tuple[str, str]) -> None:
    (qu / "a.geojson").unlink()
    for name in names:
        _write(qu / name, [_feature(_box(0, 0, 1, 1))])
    with pytest.raises(DataError, match=r"image 'a\.png' has 2 annotation files, ") as error:
        read_qupath(qu)
    assert all(repr(n) in str(error.value) for n in names)


def test_qupath_files_must_pair_up(qu: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"not QuPath annotations: found nothing; expected <name>"):
        read_qupath(tmp_path / "empty")
    (qu / "a.geojson").rename(qu / "a_alice.geojson")
    with pytest.raises(DataError, match=r"no image of the same stem for 'a_alice\.geojson'"):
        read_qupath(qu)
    (qu / "a_alice.geojson").unlink()
    with pytest.raises(DataError, match=r"no annotation file for the images 'a\.png'"):
        read_qupath(qu)
    for file in qu.glob("*.png"):
        file.unlink()
    assert not qupath.recognises(qu)
    (qu / "meta.json").write_text('{"classes": ["Immune"]}')
    PillowImage.fromarray(_image()).save(qu / "b.png")
    (qu / "c.json").unlink()
    with pytest.raises(DataError, match=r"class 'Tumor: Positive' is not in meta\.json"):
        read_qupath(qu)


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """Images a and b with tables of points."""
    root = tmp_path / "marked"
    root.mkdir()
    for seed, name in enumerate("ab"):
        PillowImage.fromarray(_image(seed)).save(root / f"{name}.png")
    (root / "a.csv").write_text("X,Y,Class\n2.5,2.5,tumour\n5.5,2.5,immune\n0,5.9,\n")
    (root / "b.csv").write_text("x,y,class\n")
    (root / "meta.json").write_text('{"mpp": 2.0}')
    return root


def test_points_become_discs(marked: Path) -> None:
    assert points.recognises(marked)
    assert points.recognises(marked.parent)
    assert not qupath.recognises(marked)
    data = pickle.loads(pickle.dumps(read_points(marked)))
    assert (data.names, data.classes, data.mpp) == (("a", "b"), ("immune", "tumour"), 2.0)
    sample = data["a"]
    # The radius is 1.5 px: of a centre of a pixel, also its neighbours across a corner, at 1.41.
    # The point (0, 5.9) reaches the centres (0.5, 5.5) at 0.64 and (0.5, 4.5) at 1.49, but not
    # (1.5, 5.5) at 1.55.
    want = np.zeros((6, 8), int)
    want[1:4, 1:4], want[1:4, 4:7], want[4:, 0] = 1, 2, 3
    np.testing.assert_array_equal(sample.labels, want)
    assert sample.phenotypes.tolist() == [0, 2, 1, UNKNOWN]
    assert data["b"].phenotypes.tolist() == [0]


def test_discs_agree_with_brute_force(marked: Path) -> None:
    rng = np.random.default_rng(0)
    PillowImage.fromarray(_image(0, 40, 50)).save(marked / "a.png")
    xy = np.round(rng.uniform(0, 1, (60, 2)) * (50, 40), 3)
    rows = [f"{x},{y},k" for x, y in xy]
    (marked / "a.csv").write_text("\n".join(["x,y,class", *rows]))
    (marked / "meta.json").write_text('{"mpp": 0.5, "radius_um": 2.4}')
    r, c = np.mgrid[:40, :50] + 0.5
    distance = np.hypot(c[..., None] - xy[:, 0], r[..., None] - xy[:, 1])
    own = np.zeros(distance.shape, bool)
    own[np.floor(xy[:, 1]).astype(int), np.floor(xy[:, 0]).astype(int), np.arange(60)] = True
    distance[(distance > 4.8) & ~own] = np.inf
    want = np.where(np.isfinite(distance.min(-1)), distance.argmin(-1) + 1, 0)
    np.testing.assert_array_equal(read_points(marked)["a"].labels, want)


def test_points_labels_and_radii(marked: Path) -> None:
    (marked / "a.csv").write_text("label,x,y,radius_um\n7,1.5,1.5,1\n4,5.5,3.5,4\n")
    (marked / "b.csv").unlink()
    (marked / "b.png").unlink()
    data = read_points(marked)
    assert data.classes == ("nucleus",)
    sample = data["a"]
    assert sample.phenotypes.tolist() == [0, 0, 0, 0, 1, 0, 0, 1]
    assert np.bincount(sample.labels.ravel()).tolist() == [48 - 1 - 13, 0, 0, 0, 13, 0, 0, 1]


def test_resolution_of_points(marked: Path) -> None:
    (marked / "meta.json").unlink()
    with pytest.raises(DataError, match=r"micrometres per pixel unknown.*'radius_px' in meta.json"):
        read_points(marked)["a"]
    (marked / "meta.json").write_text('{"radius_px": 1.5}')
    by_pixels = read_points(marked)["a"]
    (marked / "meta.json").unlink()
    (marked / "a.png").unlink()
    cm = 10_000 / 2.0
    tifffile.imwrite(
        marked / "a.tif", _image(), photometric="rgb", resolution=(cm, cm), resolutionunit=3
    )
    sample = read_points(marked)["a"]
    assert sample.mpp == 2.0
    np.testing.assert_array_equal(sample.labels, by_pixels.labels)


def test_one_table_of_points(marked: Path) -> None:
    for name in "ab":
        (marked / f"{name}.csv").unlink()
    table = marked / "points.csv"
    table.write_text("image,x,y,class\nb.png,2.5,2.5,tumour\nb,5.5,2.5,immune\n")
    assert points.recognises(marked)
    data = read_points(marked)
    assert data["a"].phenotypes.tolist() == [0]
    assert data["b"].phenotypes.tolist() == [0, 2, 1]
    table.write_text("image,x,y,class\nz,2.5,2.5,tumour\n")
    with pytest.raises(DataError, match=r"points\.csv: no image 'z'"):
        read_points(marked)
    table.write_text("x,y,class\n2.5,2.5,tumour\n")
    with pytest.raises(DataError, match=r"points\.csv: no column image"):
        read_points(marked)
    table.write_text("image,x,y,class\na,1,1,t\nb,80,2.5,t\n")
    with pytest.raises(DataError, match=r"points\.csv: row 2 lies outside the image \(8 x 6 px\)"):
        read_points(marked)["b"]
    (marked / "a.csv").write_text("x,y\n1,1\n")
    with pytest.raises(DataError, match=r"points\.csv and 'a\.csv'; keep one table"):
        read_points(marked)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["x,y,class", "1,2,tumour", "1,2,Tumour"], "'Tumour' and 'tumour' differ only in case"),
        (["x,y,class", "1,2,1"], "class ids '1'; give classes by name"),
        (["x,y,class", "1,two,t"], r"a\.csv: row 1: could not convert"),
        (["x,y,class", "1,inf,t"], r"a\.csv: row 1: x 1.0, y inf"),
        (["x,y,label", "1,2,tumour"], r"row 1: .*a class is given as 'class'"),
        (["x,y,label", "1,2,5", "3,4,5"], "a label is given to two points"),
        (["x,y,radius_um", "1,2,-5"], "radius_um must be positive"),
        (["x,y,class", "1,2"], r"a\.csv: row '1,2' has 2 fields"),
    ],
)
def test_wrong_points(marked: Path, rows: list[str], message: str) -> None:
    (marked / "a.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=message):
        read_points(marked)


def test_points_apart_by_semicolons(marked: Path) -> None:
    """As spreadsheets save where the comma is the decimal mark."""
    for sign in ";\t":
        (marked / "a.csv").write_text(sign.join("xy") + f"{sign}class\n2,5{sign}2,5{sign}tumour\n")
        assert points.recognises(marked)
        with pytest.raises(DataError, match=r"a\.csv: columns are parted by .*; save it with com"):
            read_points(marked)


def test_misplaced_points(marked: Path, caplog: pytest.LogCaptureFixture) -> None:
    (marked / "a.csv").write_text("x,y,class\n8.5,2,t\n")
    with pytest.raises(DataError, match=r"a\.csv: row 1 lies outside the image \(8 x 6 px\)"):
        read_points(marked)["a"]
    (marked / "a.csv").write_text("x,y,class\n3,2,t\n3.0,2,u\n")
    with pytest.raises(DataError, match=r"row 1 and row 2 are at the same place, x 3, y 2, but of"):
        read_points(marked)["a"]
    (marked / "a.csv").write_text("x,y,class\n3,2,t\n3.0,2,t\n")
    assert read_points(marked)["a"].phenotypes.tolist() == [0, 1]
    assert "a.csv: 1 of 2 points have no pixel, too near others: label 2" in caplog.text
    (marked / "a.csv").write_text("x,y,class\n8,6,t\n")
    assert read_points(marked)["a"].labels[5, 7] == 1


def test_points_in_micrometres(marked: Path) -> None:
    PillowImage.fromarray(_image(0, 100, 120)).save(marked / "a.png")
    (marked / "meta.json").write_text('{"mpp": 0.25}')
    xy = np.random.default_rng(0).uniform(0, 1, (20, 2)) * (120, 100)
    for scale in (1.0, 0.25):
        rows = [f"{x * scale},{y * scale},t" for x, y in xy]
        (marked / "a.csv").write_text("\n".join(["x,y,class", *rows]))
        if scale == 1:
            assert read_points(marked)["a"].labels.any()
    with pytest.raises(DataError, match=r"a\.csv: coordinates look like micrometres"):
        read_points(marked)["a"]


def test_point_tables_must_pair_up(marked: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"not point annotations: found nothing; expected <name>"):
        read_points(tmp_path / "empty")
    (marked / "patients.csv").write_text("image,patient\na,p1\n")
    assert len(read_points(marked)) == 2
    (marked / "b.csv").rename(marked / "c.csv")
    with pytest.raises(DataError, match=r"no image of the same stem for 'c\.csv' \(images: 'a\.pn"):
        read_points(marked)
    (marked / "c.csv").unlink()
    with pytest.raises(DataError, match=r"no annotation file for the images 'b\.png'"):
        read_points(marked)
    (marked / "b.csv").write_text("x,y\n1,1\n")
    (marked / "meta.json").write_text('{"radius_px": "4"}')
    with pytest.raises(DataError, match=r"meta\.json: 'radius_px' must be a positive number"):
        read_points(marked)
