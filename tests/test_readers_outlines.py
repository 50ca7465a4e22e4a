"""Outlines to labels, and the Aperio layouts: MoNuSeg and MoNuSAC."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image as PillowImage

from celltyper.datasets import read_image
from celltyper.errors import DataError
from celltyper.readers import monusac, monuseg
from celltyper.readers.aperio import read_aperio
from celltyper.readers.monusac import read_monusac
from celltyper.readers.monuseg import read_monuseg
from celltyper.readers.polygons import check_coordinates, phenotypes_at, rasterise, ring_polygon
from celltyper.types import UNKNOWN

Ring = list[tuple[float, float]]


def _labels(
    outlines: list[shapely.Geometry], shape: tuple[int, int], mpp: float | None = None
) -> np.ndarray:
    names = [f"region {i}" for i in range(1, len(outlines) + 1)]
    return rasterise(outlines, names, shape, "a.xml", mpp)


def _box(x0: float, y0: float, x1: float, y1: float) -> shapely.Polygon:
    return shapely.Polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def test_pixels_whose_centre_is_inside() -> None:
    found = _labels([_box(1, 0, 3, 2), _box(3.6, 1.4, 5.5, 2.6)], (3, 6))
    want = [
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 0, 2, 0],
        [0, 0, 0, 0, 2, 0],
    ]
    np.testing.assert_array_equal(found, want)
    assert found.dtype == np.int32


def test_a_centre_on_the_line_has_one_owner() -> None:
    # The shared diagonal passes through four centres, the shared edges through others.
    upper = shapely.Polygon([(0, 0), (4, 0), (4, 4)])
    lower = shapely.Polygon([(0, 0), (4, 4), (0, 4)])
    right = _box(0.5, 0.5, 2.5, 2.5)
    found = _labels([upper, lower], (4, 4))
    np.testing.assert_array_equal(found, [[1, 1, 1, 1], [2, 1, 1, 1], [2, 2, 1, 1], [2, 2, 2, 1]])
    np.testing.assert_array_equal(_labels([right], (4, 4))[:3, :3], [[1, 1, 0], [1, 1, 0], [0] * 3])


def test_rasterising_agrees_with_point_in_polygon() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 25)))
        radius = rng.uniform(2, 12, len(angles))
        x, y = rng.uniform(-3, 28), rng.uniform(-3, 18)
        ring = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
        outer = shapely.make_valid(shapely.Polygon(ring), method="structure", keep_collapsed=False)
        shape = outer.difference(shapely.Point(x, y).buffer(1.7))
        if shape.intersection(_box(0, 0, 25, 15)).area < 1:
            continue
        rows, cols = np.mgrid[:15, :25]
        want = shapely.contains_xy(shape, cols + 0.5, rows + 0.5)
        np.testing.assert_array_equal(_labels([shape], (15, 25)) == 1, want)


def test_holes_and_parts() -> None:
    ring = shapely.Polygon(_box(0, 0, 5, 5).exterior.coords, [_box(1, 1, 4, 4).exterior.coords])
    both = shapely.MultiPolygon([ring, _box(2, 2, 3, 3)])
    want = np.ones((5, 5), int)
    want[1:4, 1:4] = 0
    want[2, 2] = 1
    np.testing.assert_array_equal(_labels([both], (5, 5)), want)


def test_the_smaller_lies_on_top_in_any_order() -> None:
    large, small, tiny = _box(0, 0, 6, 4), _box(1, 1, 4, 3), _box(2, 1, 3, 2)
    want = np.full((4, 6), 10)
    want[1:3, 1:4] = 20
    want[1, 2] = 30
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        labels = _labels([[large, small, tiny][i] for i in order], (4, 6))
        named = np.array([0, *(10 * (i + 1) for i in order)])
        np.testing.assert_array_equal(named[labels], want)


def test_crossing_outlines_are_repaired() -> None:
    # Passed twice: the loop begins and ends with the same 2 x 2 square.
    twice = ring_polygon(
        np.array([(0, 0), (4, 0), (4, 4), (0, 4), (0, 0), (2, 0), (2, 2), (0, 2)], float)
    )
    np.testing.assert_array_equal(_labels([twice], (4, 4)), np.ones((4, 4)))
    eight = ring_polygon(np.array([(0, 0), (6, 6), (6, 0), (0, 6)], float))
    found = _labels([eight], (6, 6))
    assert found[3, 1] == found[3, 5] == 1
    assert found[0, 3] == found[5, 3] == 0


def test_outlines_without_pixels_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    outlines = [
        ring_polygon(np.array([(1.0, 1.0), (2.0, 2.0)])),  # two points
        _box(0, 0, 2, 2),
        ring_polygon(np.array([(0.0, 0.0), (3.0, 3.0), (1.0, 1.0)])),  # no area
        _box(0, 0, 2, 2),  # covered by the earlier twin
        _box(2.6, 2.6, 2.9, 2.9),  # between centres
    ]
    labels = _labels(outlines, (4, 4))
    np.testing.assert_array_equal(np.unique(labels), [0, 2])
    assert "a.xml: 4 of 5 outlines have no pixel" in caplog.text
    assert "'region 1', 'region 3', 'region 4', 'region 5'" in caplog.text
    assert phenotypes_at(labels, [7, 8, 9, 9, 9]).tolist() == [0, 0, 8]
    assert phenotypes_at(np.zeros((2, 2), np.int32), []).tolist() == [0]
    assert _labels([], (2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_outlines_are_cut_at_the_border() -> None:
    found = _labels([_box(-3, -2, 2, 1), _box(3, 2, 9, 99)], (3, 4))
    np.testing.assert_array_equal(found, [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]])


@pytest.mark.parametrize(
    ("outlines", "cause"),
    [
        ([_box(0, 0, 3, 3), _box(12, 3, 14, 6)], "remove it, or give the image"),
        ([_box(0, 0, 3, 3), _box(12, 3, 14, 6), _box(25, 9, 40, 12)], "reach 4.0 times the image"),
        ([_box(500, 300, 503, 304), _box(510, 300, 512, 304)], "of the whole slide"),
        ([_box(-9, 3, -5, 6)], "remove it"),
    ],
)
def test_outlines_outside_are_refused(outlines: list[shapely.Geometry], cause: str) -> None:
    with pytest.raises(DataError, match=r"a\.xml: region \d lies outside the image \(10 x 8 px\)"):
        _labels(outlines, (8, 10))
    with pytest.raises(DataError, match=cause):
        _labels(outlines, (8, 10))


def test_micrometres_are_noticed() -> None:
    rng = np.random.default_rng(0)
    centres = rng.uniform(6, 194, (30, 2))
    nuclei = [shapely.Point(c).buffer(6) for c in centres]  # 3 micrometres at 0.25
    assert _labels(nuclei, (200, 200), 0.25).any()
    microns = [shapely.affinity.scale(n, 0.25, 0.25, origin=(0, 0)) for n in nuclei]
    with pytest.raises(DataError, match="look like micrometres or a lower pyramid level"):
        _labels(microns, (200, 200), 0.25)
    # Nuclei of usual size in a corner are an annotated corner.
    corner = [shapely.Point(c).buffer(6) for c in rng.uniform(6, 44, (30, 2))]
    assert _labels(corner, (200, 200), 0.25).any()
    assert _labels(microns, (200, 200), None).any()


def test_points_in_micrometres_fill_the_corner() -> None:
    points = np.random.default_rng(0).uniform(0, 200, (40, 2))
    names = [f"row {i}" for i in range(40)]
    for mpp in (0.25, 0.5):
        check_coordinates(np.hstack([points, points]), names, (200, 200), "a.csv", mpp)
        small = np.hstack([points, points]) * mpp
        with pytest.raises(DataError, match=r"all 40 lie in x < .* of 200 x 200 px at"):
            check_coordinates(small, names, (200, 200), "a.csv", mpp)


def _xml(layers: dict[str, list[Ring]]) -> str:
    text = ['<?xml version="1.0"?>', '<Annotations MicronsPerPixel="0.252000">']
    for i, (name, rings) in enumerate(layers.items(), start=1):
        text.append(f'<Annotation Id="{i}" Name="" ReadOnly="0" Type="4"><Attributes>')
        text.append(f'<Attribute Name="{name}" Id="0" Value=""/></Attributes><Regions>')
        text.append('<RegionAttributeHeaders><AttributeHeader Id="9999" Name="Region"/>')
        text.append("</RegionAttributeHeaders>")
        for j, ring in enumerate(rings, start=1):
            text.append(f'<Region Id="{j}" Type="0" Text=""><Attributes/><Vertices>')
            text += [f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in ring]
            text.append("</Vertices></Region>")
        text.append("</Regions><Plots/></Annotation>")
    return "\n".join([*text, "</Annotations>"])


SQUARE: Ring = [(1, 1), (4, 1), (4, 4), (1, 4)]
INNER: Ring = [(2.2, 2.2), (3.4, 2.2), (3.4, 3.4), (2.2, 3.4)]
OTHER: Ring = [(6, 0), (8, 0), (8, 2), (6, 2), (6, 0)]
LINE: Ring = [(0, 0), (3, 0)]


def _image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_aperio_layers_regions_and_vertices(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(_xml({"Epithelial": [SQUARE, LINE], "Lymphocyte": [OTHER]}))
    found = read_aperio(path)
    assert [(r.layer, r.name, len(r.points)) for r in found] == [
        ("Epithelial", "region 1", 4),
        ("Epithelial", "region 2", 2),
        ("Lymphocyte", "region 1", 5),
    ]
    np.testing.assert_array_equal(found[0].points, SQUARE)
    path.write_text('<Annotations><Annotation Name="mine"><Regions><Region/></Regions></Annotation>'
                    "</Annotations>")  # fmt: skip
    assert [(r.layer, r.points.shape) for r in read_aperio(path)] == [("mine", (0, 2))]
    path.write_bytes(_xml({"Épithélial": [SQUARE]}).encode("utf-16"))
    assert read_aperio(path)[0].layer == "Épithélial"


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unreadable or truncated XML"),
        (_xml({"a": [SQUARE]})[:-30], "unreadable or truncated XML"),
        ("<html></html>", "not Aperio XML: begins with <html>, not <Annotations>"),
        (_xml({"a": [SQUARE]}).replace('X="4"', 'X="4,5"', 1), "line 9: a Vertex must have numb"),
        (_xml({"a": [SQUARE]}).replace('X="4"', 'X="nan"', 1), "a Vertex must have numbers"),
        (_xml({"a": [SQUARE]}).replace('X="4"', "", 1), "a Vertex must have numbers"),
        (BOMB + "]><Annotations>&m;</Annotations>", r"defines a document type \(DTD\)"),
    ],
)
def test_wrong_xml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_aperio(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


TRAIN = ("TCGA-18-5592-01Z-00-DX1", "TCGA-A7-A13E-01Z-00-DX1", "TCGA-A7-A13E-01Z-00-DX2", "own_1")


@pytest.fixture
def monuseg_folder(tmp_path: Path) -> Path:
    """MoNuSeg as published: the training part in two folders, the test part flat."""
    root = tmp_path / "unpacked"
    train, test = root / "MoNuSeg 2018 Training Data", root / "MoNuSegTestData"
    (train / "Tissue Images").mkdir(parents=True)
    (train / "Annotations").mkdir()
    test.mkdir()
    for seed, name in enumerate(TRAIN):
        tifffile.imwrite(train / "Tissue Images" / f"{name}.tif", _image(seed), photometric="rgb")
        (train / "Annotations" / f"{name}.xml").write_text(_xml({"": [SQUARE, LINE, INNER, OTHER]}))
    tifffile.imwrite(test / "TCGA-2Z-A9J9-01A-01-TS1.tif", _image(9), photometric="rgb")
    (test / "TCGA-2Z-A9J9-01A-01-TS1.xml").write_text(_xml({"Description": []}))
    return root


def test_monuseg(monuseg_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert monuseg.recognises(monuseg_folder)
    assert not monusac.recognises(monuseg_folder)
    data = pickle.loads(pickle.dumps(read_monuseg(monuseg_folder)))
    assert (data.classes, data.mpp, len(data)) == (("nucleus",), 0.25, 5)
    assert data.splits == {"train": TRAIN, "test": ("TCGA-2Z-A9J9-01A-01-TS1",)}
    assert [data.groups[n] for n in TRAIN] == ["TCGA-18-5592", *["TCGA-A7-A13E"] * 2, "own_1"]
    sample = data[TRAIN[1]]
    want = np.zeros((6, 8), int)
    want[1:4, 1:4], want[2, 2], want[:2, 6:] = 1, 3, 4
    np.testing.assert_array_equal(sample.labels, want)
    np.testing.assert_array_equal(sample.image, _image(1))
    assert sample.phenotypes.tolist() == [0, 1, 0, 1, 1]
    assert (sample.group, sample.mpp) == ("TCGA-A7-A13E", 0.25)
    assert "TCGA-A7-A13E-01Z-00-DX1.xml: 1 of 4 outlines have no pixel" in caplog.text
    assert data["TCGA-2Z-A9J9-01A-01-TS1"].phenotypes.tolist() == [0]


def test_monuseg_parts_by_themselves(monuseg_folder: Path) -> None:
    train = read_monuseg(monuseg_folder / "MoNuSeg 2018 Training Data")
    assert (train.names, train.splits) == (tuple(sorted(TRAIN)), {})
    assert len(read_monuseg(monuseg_folder / "MoNuSegTestData")) == 1


def test_wrong_monuseg(monuseg_folder: Path, tmp_path: Path) -> None:
    train = monuseg_folder / "MoNuSeg 2018 Training Data"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not MoNuSeg: found nothing; expected 'Tissue Images'/"):
        read_monuseg(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder; MoNuSeg is 'Tissue Images'"):
        read_monuseg(tmp_path / "none")
    assert not monuseg.recognises(tmp_path / "none")
    xml = train / "Annotations" / "own_1.xml"
    xml.rename(xml.with_name("own_2.xml"))
    with pytest.raises(DataError, match="no XML in Annotations for the images 'own_1'"):
        read_monuseg(monuseg_folder)
    (train / "Tissue Images" / "own_1.tif").unlink()
    with pytest.raises(DataError, match="no image in 'Tissue Images' for the XML of 'own_2'"):
        read_monuseg(monuseg_folder)
    xml.with_name("own_2.xml").unlink()
    for suffix in (".tif", ".xml"):
        source = next((train).rglob(f"{TRAIN[0]}{suffix}"))
        copy = monuseg_folder / "MoNuSegTestData" / source.name
        copy.write_bytes(source.read_bytes())
    with pytest.raises(DataError, match=r"'TCGA-18-5592-01Z-00-DX1' is in .*Images as well"):
        read_monuseg(monuseg_folder)
    for suffix in (".tif", ".xml"):
        copy = monuseg_folder / "MoNuSegTestData" / f"{TRAIN[0]}{suffix}"
        copy.rename(copy.with_name(f"TCGA-18-5592-02Z{suffix}"))
    with pytest.raises(DataError, match=r"group 'TCGA-18-5592' .* both splits 'train' and 'test'"):
        read_monuseg(monuseg_folder)


def test_truncated_monuseg_files_are_named(monuseg_folder: Path) -> None:
    data = read_monuseg(monuseg_folder)
    train = monuseg_folder / "MoNuSeg 2018 Training Data"
    for file in (train / "Annotations" / "own_1.xml", train / "Tissue Images" / "own_1.tif"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=f"{file.name}: unreadable or truncated"):
            data["own_1"]
        file.write_bytes(whole)
    assert data["own_1"].labels.any()


PATIENT = "TCGA-5P-A9K0-01Z-00-DX1"


@pytest.fixture
def monusac_folder(tmp_path: Path) -> Path:
    """MoNuSAC as published: .svs, .tif and .xml in one folder a patient."""
    root = tmp_path / "monusac"
    train = root / "MoNuSAC_images_and_annotations" / PATIENT
    test = root / "MoNuSAC Testing Data and Annotations" / "TCGA-2Z-A9JG-01Z-00-DX1"
    for folder, suffixes in ((train, (".svs", ".tif")), (test, (".svs",))):
        folder.mkdir(parents=True)
        for i in (1, 2):
            stem = f"{folder.name}_{i}"
            for suffix in suffixes:
                with (folder / f"{stem}{suffix}").open("wb") as file:
                    tifffile.imwrite(file, _image(i), photometric="rgb")
            layers = {"Epithelial": [SQUARE], "neutrophil ": [INNER], "Ambiguous": [OTHER]}
            (folder / f"{stem}.xml").write_text(_xml(layers if i == 1 else {"Macrophage": []}))
    return root


def test_monusac(monusac_folder: Path) -> None:
    assert monusac.recognises(monusac_folder)
    assert not monuseg.recognises(monusac_folder)
    data = pickle.loads(pickle.dumps(read_monusac(monusac_folder)))
    assert data.classes == ("Epithelial", "Lymphocyte", "Macrophage", "Neutrophil")
    assert (data.mpp, len(data)) == (0.25, 4)
    other = "TCGA-2Z-A9JG-01Z-00-DX1"
    assert data.splits == {
        "train": (f"{PATIENT}_1", f"{PATIENT}_2"),
        "test": (f"{other}_1", f"{other}_2"),
    }
    want = np.zeros((6, 8), int)
    want[1:4, 1:4], want[2, 2], want[:2, 6:] = 1, 2, 3
    for name in (f"{PATIENT}_1", f"{other}_1"):
        sample = data[name]
        np.testing.assert_array_equal(sample.labels, want)
        np.testing.assert_array_equal(sample.image, _image(1))
        assert sample.phenotypes.tolist() == [0, 1, 4, UNKNOWN]
        assert sample.group == name[:12]
    assert data[f"{PATIENT}_2"].phenotypes.tolist() == [0]


def test_monusac_one_part_or_patient(monusac_folder: Path) -> None:
    part = monusac_folder / "MoNuSAC_images_and_annotations"
    assert monusac.recognises(part)
    for path in (part, part / PATIENT):
        data = read_monusac(path)
        assert (data.splits, set(data.groups.values())) == ({}, {"TCGA-5P-A9K0"})


def test_wrong_monusac(monusac_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"not MoNuSAC: found nothing; expected <patient>/<name>"):
        read_monusac(tmp_path / "empty")
    folder = monusac_folder / "MoNuSAC_images_and_annotations" / PATIENT
    xml = folder / f"{PATIENT}_1.xml"
    whole = xml.read_text()
    data = read_monusac(monusac_folder)
    xml.write_text(whole.replace("Epithelial", "Plasma"))
    with pytest.raises(DataError, match=r"_1\.xml: region 1 is in the layer 'Plasma', not one of"):
        data[xml.stem]
    xml.write_text(whole.replace('X="6"', 'X="600"').replace('X="8"', 'X="800"'))
    with pytest.raises(DataError, match="region 1 of Ambiguous lies outside the image"):
        data[xml.stem]
    xml.unlink()
    with pytest.raises(DataError, match=f"{PATIENT}: no XML for '{PATIENT}_1'"):
        read_monusac(monusac_folder)
    (folder / f"{PATIENT}_3.xml").write_text(whole)
    for suffix in (".tif", ".svs"):
        (folder / f"{PATIENT}_1{suffix}").unlink()
    with pytest.raises(DataError, match=f"{PATIENT}: no image for '{PATIENT}_3'"):
        read_monusac(monusac_folder)


def test_svs_is_read_as_tiff(real_data: Path) -> None:
    image = read_image(real_data / "slides" / "cmu-1-small-region.svs").image
    assert image.shape == (2967, 2220, 3)
    assert 150 < image.mean() < 255
    assert np.asarray(PillowImage.fromarray(image).resize((1, 1))).min() > 100
