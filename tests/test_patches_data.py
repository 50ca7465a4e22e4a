"""Every layout of annotated patches in miniature, drawn here; and the two real ones."""

from __future__ import annotations

import csv
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from celltyper.errors import ConfigError, DataError
from celltyper.patches.reading import open_patches, recognise
from celltyper.patches.table import PatchTable

BOTH = ("Normal", "Atypical")


def draw(file: Path, shade: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    """A grey picture, width and height given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(file)
    return file


def write_csv(file: Path, header: str, *rows: str) -> Path:
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


def ami_br(root: Path) -> Path:
    """Two data sets that both have a slide 1.tif."""
    for i, name in enumerate(("Atypical/a_1", "Atypical/b_1", "Normal/a_2", "Normal/b_2")):
        draw(root / f"{name}.png", shade=10 * i)
    write_csv(
        root / "ami.csv",
        "slide,dataset,final_label,dataset_uid,x,y,"
        "expert1_label,expert1_atypical,expert2_atypical,expert3_atypical",
        "1.tif,A,Atypical,a_1.png,900,800,AMF other,True,True,True",
        "1.tif,A,Normal,a_2.png,700,600,NMF metaphase,False,True,False",
        "1.tif,B,Atypical,b_1.png,500,400,AMF other,True,False,True",
        "1.tif,B,Normal,b_2.png,300,200,NMF metaphase,False,False,False",
        "2.tif,B,Normal,kept-elsewhere.png,3,2,NMF metaphase,False,False,False",
    )
    return root


def test_class_folders_with_the_table_of_ami_br(tmp_path: Path) -> None:
    table = open_patches(ami_br(tmp_path), classes=BOTH, mpp=0.25)
    assert table.classes == BOTH
    assert table.names == (
        "Atypical/a_1.png",
        "Atypical/b_1.png",
        "Normal/a_2.png",
        "Normal/b_2.png",
    )
    assert table.labels.tolist() == [1, 1, 0, 0]
    assert table.groups == ("A/1.tif", "B/1.tif", "A/1.tif", "B/1.tif")
    assert table.domains == ("A", "B", "A", "B")
    np.testing.assert_allclose(table.votes, [[0, 1], [1 / 3, 2 / 3], [2 / 3, 1 / 3], [1, 0]])
    assert table.experts.tolist() == [3, 3, 3, 3]
    assert np.isnan(table.centers).all()  # x and y of the table are of the slide
    assert table.mpp == 0.25
    assert table.files[0] == tmp_path / "Atypical" / "a_1.png"


def test_flat_folder_with_the_table_of_ami_br(tmp_path: Path) -> None:
    ami_br(tmp_path)
    for folder in ("Atypical", "Normal"):
        for file in (tmp_path / folder).iterdir():
            file.rename(tmp_path / file.name)
    text = (tmp_path / "ami.csv").read_text().splitlines()
    (tmp_path / "ami.csv").write_text("\n".join(text[:-1]))
    table = open_patches(tmp_path)
    assert table.names == ("a_1.png", "a_2.png", "b_1.png", "b_2.png")
    assert table.classes == ("Atypical", "Normal")
    np.testing.assert_allclose(table.votes[:, 0], [1, 1 / 3, 2 / 3, 0])
    assert table.groups == ("A/1.tif", "A/1.tif", "B/1.tif", "B/1.tif")
    assert np.isnan(table.centers).all()


def test_votes_in_words_of_their_own(tmp_path: Path) -> None:
    for name in ("Atypical/p1", "Normal/p2", "Normal/p3"):
        draw(tmp_path / f"{name}.png")
    write_csv(
        tmp_path / "votes.csv",
        "Filename,Expert_1,Expert_2,Expert_3,Expert_4,Expert_5,Majority",
        "p1.png,AMF,AMF,AMF,NMF,NMF,AMF",
        "p2.png,NMF,NMF,NMF,NMF,NMF,NMF",
        "p3.png,NMF,,NMF,AMF,NMF,NMF",
    )
    table = open_patches(tmp_path)
    np.testing.assert_allclose(table.votes, [[0.6, 0.4], [0, 1], [0.25, 0.75]])
    assert table.experts.tolist() == [5, 5, 4]


def test_class_folders_alone_say_that_patients_are_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("B/1.png", "B/2.jpg", "A/1.tif"):
        draw(tmp_path / name)
    (tmp_path / "A" / "notes.txt").touch()
    (tmp_path / "meta.json").write_text('{"mpp": 0.5}')
    with caplog.at_level(logging.WARNING, "celltyper"):
        table = open_patches(tmp_path)
    assert table.names == table.groups == ("A/1.tif", "B/1.png", "B/2.jpg")
    assert (table.classes, table.labels.tolist(), table.mpp) == (("A", "B"), [0, 1, 1], 0.5)
    assert table.votes.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert table.experts.tolist() == [1, 1, 1]
    assert len(caplog.records) == 1
    assert "no slides or patients" in caplog.text


def test_class_folders_in_parts(tmp_path: Path) -> None:
    for name in ("train/A/1.png", "train/B/2.png", "test/A/3.png", "test/B/4.png"):
        draw(tmp_path / name)
    table = open_patches(tmp_path)
    assert dict(zip(table.names, table.splits, strict=True)) == {
        "train/A/1.png": "train",
        "train/B/2.png": "train",
        "test/A/3.png": "test",
        "test/B/4.png": "test",
    }
    assert table.subset("test").names == ("test/A/3.png", "test/B/4.png")
    with pytest.raises(DataError, match=r"no split 'valid' \(its splits: 'test', 'train'\)"):
        table.subset("valid")


def test_patches_of_unknown_class(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    draw(tmp_path / "2.png")
    table = open_patches(tmp_path, classes=BOTH)
    assert table.labels.tolist() == [-1, -1]
    assert np.isnan(table.votes).all()
    assert table.experts.tolist() == [0, 0]
    with pytest.raises(DataError, match=r"2 images beside the folders \(none\).*in the folder of"):
        open_patches(tmp_path)


def test_other_classes_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("A/1.png", "B/2.png", "unsure/3.png"):
        draw(tmp_path / name)
    table = open_patches(tmp_path, classes=("B", "A"))
    assert table.names == ("A/1.png", "B/2.png")
    assert "left out: 1 of 'unsure'" in caplog.text


def a_folder(root: Path) -> Path:
    for name in ("Atypical/1.png", "Normal/2.png"):
        draw(root / name)
    return root


def empty(root: Path) -> None:
    (root / "Normal" / "2.png").unlink()


def table_of(*rows: str) -> Callable[[Path], None]:
    return lambda root: [write_csv(root / "t.csv", *rows), None][1]


def nothing(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "classes", "message"),
    [
        (empty, None, r"Normal: class folder without images .*fill it, or remove it"),
        (empty, BOTH, r"Normal: class folder without images"),
        (nothing, ("normal", "Atypical"), r"no folder of class 'normal'; did you mean 'Normal'\?"),
        (nothing, ("Normal", "Atipycal"), r"class 'Atipycal'; did you mean 'Atypical'\? \(found"),
        (nothing, ("Normal",), "at least two classes"),
        (nothing, ("Normal", "Normal", "Atypical"), "named twice"),
        (
            table_of("file,label", "1.png,Normal", "2.png,Normal"),
            None,
            r"t.csv: row 1: label is 'Normal', but the file is Atypical/1.png \(1 such rows\); "
            "move the file, or correct",
        ),
        (
            table_of("file,majority", "1.png,NMF", "2.png,AMF", "3.png,AMF"),
            None,
            None,
        ),
        (
            table_of("file,label", "1.png,Atypical"),
            None,
            r"1 of 2 patches are not in column 'file', such as Normal/2.png; add their rows",
        ),
        (
            table_of("file,label", "1.png,Atypical", "2.png,Normal", "1.png,Atypical"),
            None,
            r"rows 1 and 3 are both '1.png'",
        ),
        (
            table_of("file,label,Expert_1", "1.png,Atypical,Atypcal", "2.png,Normal,Normal"),
            None,
            "row 1: expert_1 is 'Atypcal'; expected 'atypical', 'normal'",
        ),
        (
            table_of("file,expert1_atypical", "1.png,3", "2.png,no"),
            None,
            "row 1: expert1_atypical is '3'; expected 'true', 'yes', '1'",
        ),
        (table_of("file,slide"), None, "a header and no rows"),
    ],
)
def test_mistakes_in_class_folders(
    tmp_path: Path,
    spoil: Callable[[Path], None],
    classes: Sequence[str] | None,
    message: str | None,
) -> None:
    spoil(a_folder(tmp_path))
    if message is None:  # other words for the same classes
        assert open_patches(tmp_path, classes=classes).labels.tolist() == [0, 1]
        return
    with pytest.raises(DataError, match=message):
        open_patches(tmp_path, classes=classes, reader="folders")


def test_same_file_name_in_two_classes(tmp_path: Path) -> None:
    draw(tmp_path / "A" / "1.png")
    draw(tmp_path / "B" / "1.png")
    assert open_patches(tmp_path).names == ("A/1.png", "B/1.png")
    write_csv(tmp_path / "t.csv", "file,slide", "1.png,s")
    with pytest.raises(DataError, match=r"'1.png' could be A/1.png or B/1.png; write the folder"):
        open_patches(tmp_path)
    write_csv(tmp_path / "t.csv", "file,slide", "A/1.png,s", "B/1.png,t")
    assert open_patches(tmp_path).groups == ("s", "t")


def test_tables_that_do_not_say_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_folder(tmp_path)
    write_csv(tmp_path / "other.csv", "stain,year", "HE,2020")
    open_patches(tmp_path)
    assert "other.csv: no column holds names of the patches, so it is not used" in caplog.text
    for name in ("t", "u"):
        write_csv(tmp_path / f"{name}.csv", "file,slide", "1.png,s", "2.png,t")
    with pytest.raises(DataError, match=r"'t.csv', 'u.csv' all list the patches; keep one"):
        open_patches(tmp_path)


def fields(root: Path) -> Path:
    """Two fields of 100 x 80 px with points, as MIDOG's table has them."""
    for name in ("001.png", "002.png"):
        draw(root / name, size=(100, 80))
    write_csv(
        root / "midog.csv",
        "x,y,label,filename,slide,split,tumortype",
        "10,20,mitotic figure,001.png,s1,train,breast",
        "30.5,40,hard negative,001.png,s1,train,breast",
        "50,60,mitotic figure,002.png,s2,test,lung",
        "70,70,,002.png,s2,test,lung",
    )
    return root


def test_points_of_fields(tmp_path: Path) -> None:
    table = open_patches(fields(tmp_path))
    assert table.classes == ("hard negative", "mitotic figure")
    assert table.names == ("001.png:10:20", "001.png:30.5:40", "002.png:50:60", "002.png:70:70")
    assert table.labels.tolist() == [1, 0, 1, -1]
    assert table.centers.tolist() == [[10, 20], [30.5, 40], [50, 60], [70, 70]]
    assert table.groups == ("s1", "s1", "s2", "s2")
    assert table.domains == ("breast", "breast", "lung", "lung")
    assert table.splits == ("train", "train", "test", "test")
    assert table.files[2] == tmp_path / "002.png"
    assert open_patches(tmp_path, groups="tumortype", domains="slide").groups[0] == "breast"


def test_images_elsewhere_or_nowhere(tmp_path: Path) -> None:
    fields(tmp_path)
    elsewhere = tmp_path / "pixels"
    elsewhere.mkdir()
    (tmp_path / "001.png").rename(elsewhere / "001.png")
    with pytest.raises(DataError, match=r"no image '001.png' in .*; 1 of 2 are missing"):
        open_patches(tmp_path)
    (tmp_path / "002.png").rename(elsewhere / "002.png")
    assert len(open_patches(tmp_path / "midog.csv", images=elsewhere)) == 4
    assert len(open_patches(tmp_path, pixels=False)) == 4
    with pytest.raises(DataError, match=r"nowhere: no such folder; it should hold"):
        open_patches(tmp_path, images=tmp_path / "nowhere")


def test_numbers_as_labels(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    draw(tmp_path / "2.png")
    path = write_csv(tmp_path / "t.csv", "path,label,patient", "1.png,2,p", "2.png,1,q")
    with pytest.raises(DataError, match=r"labels are the numbers 1, 2; name .*in ascending order"):
        open_patches(path)
    with pytest.raises(DataError, match=r"the 2 numbers 1, 2, but there are 3 classes"):
        open_patches(path, classes=("a", "b", "c"))
    table = open_patches(path, classes=("figure", "look-alike"))
    assert [table.classes[i] for i in table.labels] == ["look-alike", "figure"]
    assert table.groups == ("p", "q")
    # Ten comes after two, and 2.0 is 2.
    path = write_csv(tmp_path / "t.csv", "path,label,patient", "1.png,10,p", "2.png,2.0,q")
    table = open_patches(path, classes=("low", "high"))
    assert [table.classes[i] for i in table.labels] == ["high", "low"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("label,stain", "a,b"), "no CSV with a column such as filename in it, or with x and y"),
        (("x,y,label,filename", "1,two,a,001.png"), "row 1: x '1' and y 'two' must be numbers"),
        (("x,y,label,filename", "1,nan,a,001.png"), "row 1: x '1' and y 'nan' must be numbers"),
        (("x,y,label,filename", "1,2,a,"), "row 1: no filename; name its file"),
        (("x;y;label;filename", "1;2;a;001.png"), "parted by semicolons"),
        (("x,y,filename", "1,2,001.png"), "patches of no class; two classes are needed"),
        (("x,y,label,filename", "1,2,a,001.png"), "patches of 'a'; two classes are needed"),
        (
            ("x,y,label,filename", "1,2,a,001.png", "1,2,b,001.png"),
            r"row 1 and row 2 are the same window, 001.png:1:2, but of the classes 'a' and 'b'",
        ),
        (
            ("x,y,label,filename", "1,2,a,001.png", "130,2,b,001.png"),
            r"001.png:130:2: x 130, y 2 is outside 001.png \(100 x 80 px\); remove the row",
        ),
        (
            ("x,y,label,filename", "1,2,a,001.png", "3,400,b,001.png"),
            r"y 400 is outside 001.png \(100 x 80 px\); 5.0 times the image: in pixels of another",
        ),
        (
            ("x,y,label,filename", "1,2,a,001.png", "1,2,A,001.png"),
            "'A' and 'a' differ only in case",
        ),
    ],
)
def test_mistakes_in_tables(tmp_path: Path, rows: tuple[str, ...], message: str) -> None:
    draw(tmp_path / "001.png", size=(100, 80))
    write_csv(tmp_path / "t.csv", *rows)
    with pytest.raises(DataError, match=message):
        open_patches(tmp_path, reader="tables")


def test_outside_in_micrometres(tmp_path: Path) -> None:
    draw(tmp_path / "001.png", size=(100, 80))
    write_csv(tmp_path / "t.csv", "x,y,label,filename", "1,2,a,001.png", "150,100,b,001.png")
    with pytest.raises(DataError, match=r"in micrometres\? At 2 a pixel it would be 75, 50"):
        open_patches(tmp_path, mpp=2)


def test_asked_classes_and_columns_that_are_not_there(tmp_path: Path) -> None:
    path = fields(tmp_path)
    with pytest.raises(DataError, match=r"no patch of class 'Mitotic Figure'; did you mean 'mit"):
        open_patches(path, classes=("hard negative", "Mitotic Figure"))
    with pytest.raises(DataError, match=r"no column 'slides'; did you mean 'slide'\? \(columns: x"):
        open_patches(path, groups="slides")


def test_window_listed_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(tmp_path / "001.png", size=(100, 80))
    rows = ("1,2,a,001.png", "3,4,b,001.png", "1,2,a,001.png")
    write_csv(tmp_path / "t.csv", "x,y,label,filename", *rows)
    assert open_patches(tmp_path).names == ("001.png:1:2", "001.png:3:4")
    assert "1 windows are listed twice" in caplog.text


def test_table_of_patches_of_slides(tmp_path: Path) -> None:
    """As in the training set of MIDOG 2025: image_id is the patch, filename its slide."""
    for name in ("p1.png", "p2.png"):
        draw(tmp_path / "images" / name)
    write_csv(
        tmp_path / "train.csv",
        "image_id,filename,majority,Tumor,fold",
        "p1.png,007.tiff,AMF,lung,1",
        "p2.png,008.tiff,NMF,skin,2",
    )
    table = open_patches(tmp_path)
    assert table.names == ("p1.png", "p2.png")
    assert table.groups == ("007.tiff", "008.tiff")
    assert table.domains == ("lung", "skin")
    assert table.splits == ("fold1", "fold2")


def test_one_table_for_every_slide(tmp_path: Path) -> None:
    for name, x in (("s1", 5), ("s2", 6)):
        draw(tmp_path / "images" / f"{name}.png", size=(100, 80))
        write_csv(tmp_path / f"{name}.csv", "x,y,label", f"{x},7,a", f"{x},9,b")
    table = open_patches(tmp_path)
    assert table.names == ("s1:5:7", "s1:5:9", "s2:6:7", "s2:6:9")
    assert table.groups == ("s1", "s1", "s2", "s2")
    assert table.files[0] == tmp_path / "images" / "s1.png"


def coco(**changes: Any) -> dict[str, Any]:
    raw = {
        "images": [
            {"id": 1, "file_name": "1.tiff", "width": 900, "height": 800, "tumor_type": "lung"},
            {"id": 2, "file_name": "2.tiff", "width": 900, "height": 800, "tumor_type": "skin"},
            {"id": 3, "file_name": "3.tiff", "width": 900, "height": 800, "tumor_type": "skin"},
        ],
        "categories": [{"id": 2, "name": "look-alike"}, {"id": 1, "name": "figure"}],
        "annotations": [
            {"id": 7, "image_id": 1, "category_id": 1, "bbox": [400, 300, 450, 350]},
            {"id": 8, "image_id": 2, "category_id": 2, "bbox": [20, 30, 70, 80]},
            {"id": 9, "image_id": 2, "category_id": 1, "bbox": [-27, 5, 23, 55]},
        ],
    }
    return raw | changes


def test_midog(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = coco()
    raw["annotations"][1]["labels"] = [2, 1, 2]
    (tmp_path / "m.json").write_text(json.dumps(raw))
    with caplog.at_level(logging.INFO, "celltyper"):
        table = open_patches(tmp_path, pixels=False)
    assert "boxes are read as corners x0, y0, x1, y1" in caplog.text
    assert "2 of 3 images have annotations" in caplog.text
    assert table.classes == ("figure", "look-alike")  # in order of the ids
    assert table.names == ("1.tiff:425:325", "2.tiff:45:55", "2.tiff:-2:30")
    assert table.centers.tolist() == [[425, 325], [45, 55], [-2, 30]]
    assert table.labels.tolist() == [0, 1, 0]
    np.testing.assert_allclose(table.votes, [[1, 0], [1 / 3, 2 / 3], [1, 0]])
    assert table.experts.tolist() == [1, 3, 1]
    assert table.groups == ("1.tiff", "2.tiff", "2.tiff")
    assert table.domains == ("lung", "skin", "skin")
    assert open_patches(tmp_path, pixels=False, groups="tumor_type").groups == table.domains
    with pytest.raises(DataError, match=r"m.json: no image '1.tiff' in .*; 2 of 2 are missing"):
        open_patches(tmp_path)
    for name in ("1.tiff", "2.tiff"):  # a centre just beyond the border is a cell on it
        draw(tmp_path / name, size=(900, 800))
    assert len(open_patches(tmp_path)) == 3


@pytest.mark.parametrize(
    ("boxes", "kind", "first"),
    [
        # Corners cannot end before they begin.
        ([[400, 300, 50, 50], [20, 30, 50, 50]], "x, y, width, height", (425, 325)),
        # As sizes all would be alike, but reach far out of the image.
        ([[700, 600, 850, 780], [400, 300, 850, 780]], "corners", (775, 690)),
        # As both they are inside: those of one size are right.
        ([[10, 20, 60, 70], [30, 5, 80, 55]], "corners", (35, 45)),
        ([[10, 20, 50, 50], [30, 5, 50, 50]], "x, y, width, height", (35, 45)),
        ([[10, 20, 50, 50]], "corners", (30, 35)),
    ],
)
def test_boxes_are_corners_or_sizes(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    boxes: list[list[int]],
    kind: str,
    first: tuple[float, float],
) -> None:
    notes = [
        {"id": i, "image_id": 1, "category_id": 1 + i % 2, "bbox": box}
        for i, box in enumerate(boxes)
    ]
    (tmp_path / "m.json").write_text(json.dumps(coco(annotations=notes)))
    with caplog.at_level(logging.INFO, "celltyper"):
        table = open_patches(tmp_path, pixels=False)
    assert f"boxes are read as {kind}" in caplog.text
    assert tuple(table.centers[0]) == first


def note(**changes: Any) -> dict[str, Any]:
    one = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]} | changes
    return coco(annotations=[one])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (note(bbox=[1, 2, 3]), "needs a 'bbox' of 4 numbers"),
        (note(bbox=[1, 2, None, 4]), "needs a 'bbox' of 4 numbers"),
        (note(bbox=[50, 50, 40, 0]), "neither corners .* annotation 7 is"),
        (note(image_id=4), "annotation 7 is of image 4, which is not listed"),
        (note(category_id=5), "annotation 7 is of category 5, which is not listed .1 figure, 2"),
        (coco(annotations=[]), "no annotations"),
        (coco(images=[{"id": 1}]), "an image needs 'id' and 'file_name'"),
        (coco(images=coco()["images"] * 2), "two images have the id 1"),
        (coco(categories=["figure"]), "'categories' must be"),
        ({"images": []}, "no COCO annotations"),
    ],
)
def test_mistakes_in_midog(tmp_path: Path, raw: dict[str, Any], message: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=message):
        open_patches(path, pixels=False)
    path.write_text(path.read_text()[:-4])
    with pytest.raises(DataError, match="not readable as JSON"):
        open_patches(path, pixels=False)


def test_midog_without_categories(tmp_path: Path) -> None:
    raw = coco()
    del raw["categories"]
    (tmp_path / "m.json").write_text(json.dumps(raw))
    assert open_patches(tmp_path, pixels=False).classes == ("mitotic figure", "hard negative")
    with pytest.raises(DataError, match=r"images have no 'tumour_type'; did you mean 'tumor_type'"):
        open_patches(tmp_path, pixels=False, domains="tumour_type")


def sliderunner(path: Path) -> Path:
    with sqlite3.connect(path) as database:
        database.executescript(
            """
            CREATE TABLE Slides (uid INTEGER PRIMARY KEY, filename TEXT, width INTEGER);
            CREATE TABLE Classes (uid INTEGER PRIMARY KEY, name TEXT);
            CREATE TABLE Annotations (uid INTEGER PRIMARY KEY, slide INTEGER,
                deleted INTEGER DEFAULT 0, type INTEGER, agreedClass INTEGER);
            CREATE TABLE Annotations_coordinates (uid INTEGER PRIMARY KEY, coordinateX INTEGER,
                coordinateY INTEGER, slide INTEGER, annoId INTEGER, orderIdx INTEGER);
            CREATE TABLE Annotations_label (uid INTEGER PRIMARY KEY, person INTEGER,
                class INTEGER, annoId INTEGER);
            INSERT INTO Slides VALUES (1, 'one.svs', 0), (2, 'two.svs', 0);
            INSERT INTO Classes VALUES (1, 'Granulocyte'), (2, 'Mitosis'), (3, 'Tumor'),
                (7, 'Like');
            INSERT INTO Annotations (uid, slide, type, agreedClass, deleted) VALUES
                (10, 1, 1, 2, 0), (11, 1, 5, 7, 0), (12, 2, 1, 2, 0), (13, 2, 3, 3, 0),
                (14, 2, 1, 2, 1), (15, 2, 4, 0, 0);
            INSERT INTO Annotations_coordinates (coordinateX, coordinateY, slide, annoId) VALUES
                (100, 200, 1, 10), (300, 400, 1, 11), (351, 450, 1, 11), (500, 600, 2, 12),
                (0, 0, 2, 13), (9, 0, 2, 13), (9, 9, 2, 13), (1, 1, 2, 14), (700, 800, 2, 15);
            INSERT INTO Annotations_label (person, class, annoId) VALUES
                (1, 2, 10), (2, 2, 10), (1, 7, 11), (2, 2, 11), (3, 7, 11), (1, 2, 15);
            """
        )
    database.close()
    return path


def test_sliderunner(tmp_path: Path) -> None:
    table = open_patches(sliderunner(tmp_path / "cells.sqlite"), pixels=False)
    # The polygon and what was deleted are not cells; the agreed class 0 is no class.
    assert table.names == (
        "one.svs:100:200",
        "one.svs:325.5:425",
        "two.svs:500:600",
        "two.svs:700:800",
    )
    assert table.classes == ("Mitosis", "Like")  # in order of their ids, those that cells have
    assert table.labels.tolist() == [0, 1, 0, -1]
    np.testing.assert_allclose(
        table.votes, [[1, 0], [1 / 3, 2 / 3], [1, 0], [np.nan, np.nan]], equal_nan=True
    )
    assert table.experts.tolist() == [2, 3, 1, 0]
    assert table.groups == ("one.svs", "one.svs", "two.svs", "two.svs")
    assert recognise(tmp_path) == "ccmct"
    with pytest.raises(ConfigError, match="leave 'groups' and 'domains' out"):
        open_patches(tmp_path, groups="person", pixels=False)


def test_mistakes_in_sliderunner(tmp_path: Path) -> None:
    path = sliderunner(tmp_path / "cells.sqlite")
    with pytest.raises(DataError, match=r"no image 'one.svs' in .*; 2 of 2 are missing"):
        open_patches(path)
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM Slides WHERE uid = 2")
    database.close()
    with pytest.raises(DataError, match="annotation 12, 15 is of a slide that is not in Slides"):
        open_patches(path, pixels=False)
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE Classes")
    database.close()
    with pytest.raises(DataError, match="it lacks the tables 'Classes'"):
        open_patches(path, pixels=False)
    whole = sliderunner(tmp_path / "whole.sqlite").read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(DataError, match=r"cells.sqlite: unreadable or damaged SQLite database \("):
        open_patches(path, pixels=False)
    path.write_bytes(b"PNG" * 1000)
    with pytest.raises(DataError, match=r"cells.sqlite: unreadable or damaged SQLite database \("):
        open_patches(path, pixels=False)


def test_recognition(tmp_path: Path) -> None:
    assert recognise(ami_br(tmp_path / "a")) == "folders"  # the table belongs to the folders
    (tmp_path / "b").mkdir()
    assert recognise(fields(tmp_path / "b")) == "tables"
    (tmp_path / "b" / "m.json").write_text(json.dumps(coco()))
    with pytest.raises(DataError, match=r"of several layouts \(tables, midog\); name the file"):
        open_patches(tmp_path / "b")
    assert len(open_patches(tmp_path / "b", reader="midog", pixels=False)) == 3
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="no annotated patches; name the file or the reader"):
        open_patches(tmp_path / "c")
    with pytest.raises(DataError, match="no such file or folder"):
        open_patches(tmp_path / "d")
    with pytest.raises(ConfigError, match="did you mean 'midog'"):
        open_patches(tmp_path / "a", reader="midogs")
    (tmp_path / "e.txt").touch()
    with pytest.raises(DataError, match="annotations are CSV, JSON or SQLite"):
        open_patches(tmp_path / "e.txt")


def small_table() -> PatchTable:
    return PatchTable(
        path=Path("t"),
        classes=("a", "b"),
        names=("p", "q", "r"),
        labels=np.array([0, 1, -1], np.intp),
        votes=np.array([[1, 0], [0.25, 0.75], [np.nan, np.nan]]),
        experts=np.array([1, 4, 0], np.intp),
        groups=("s", "s", "t"),
        domains=("", "", ""),
        splits=("train", "train", ""),
        files=(Path("p"), Path("q"), Path("r")),
        centers=np.array([[np.nan, np.nan], [1, 2], [3, 4]]),
        mpp=0.5,
    )


def test_rows_of_a_table() -> None:
    table = small_table()
    assert len(table) == 3
    taken = table.take([2, 0])
    assert taken.names == ("r", "p")
    assert taken.groups == ("t", "s")
    assert taken.labels.tolist() == [-1, 0]
    assert taken.centers.tolist()[0] == [3, 4]
    assert taken.experts.tolist() == [0, 1]
    assert table.take(np.array([False, True, True])).names == ("q", "r")
    assert len(table.take([])) == 0
    assert table.subset("train").names == ("p", "q")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("a",)}, "at least two classes"),
        ({"classes": ("a", "A")}, "differ only in case"),
        ({"names": ("p", "q", "q")}, "names must be unique; 'q' occurs twice"),
        ({"groups": ("s",)}, r"groups must be \(3,\) for 3 names of 2 classes, got \(1,\)"),
        ({"centers": np.zeros((3, 3))}, r"centers must be \(3, 2\)"),
        ({"labels": np.array([0, 2, -1])}, "q: label must lie in 0..1"),
        ({"votes": np.array([[1, 0], [1, 0.5], [np.nan, np.nan]])}, "q: votes must be shares"),
        ({"votes": np.array([[2, -1], [1, 0], [np.nan, np.nan]])}, "p: votes must be shares"),
        ({"votes": np.array([[1, 0], [1, 0], [1, 0]])}, "r: votes must be NaN"),
        ({"experts": np.array([1, 0, 0])}, "q: experts must be at least 1"),
        ({"experts": np.array([1, 1, 1])}, "r: experts must be at least 1, and 0 where"),
        ({"centers": np.array([[np.nan, 1], [1, 2], [3, 4]])}, "p: the centre must be two"),
        ({"mpp": 0.0}, "mpp must be positive"),
    ],
)
def test_a_table_checks_itself(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(small_table(), **change)


def test_real_ami_br(real_data: Path) -> None:
    root = real_data / "ami-br"
    if not root.is_dir():
        pytest.skip("no AMi-Br beside the checkout")
    table = open_patches(root, classes=BOTH, mpp=0.25)
    assert len(table) == 2894
    assert len(set(table.groups)) == 146
    assert (table.labels == 1).sum() == 648
    assert set(table.domains) == {"TUPAC16", "MIDOG21"}
    # The label is the majority of the three experts, as the README of the data says.
    assert (table.experts == 3).all()
    np.testing.assert_array_equal(table.votes[:, 1] > 0.5, table.labels == 1)
    with (root / "ami-br.csv").open(newline="") as file:
        rows = {row["dataset_uid"]: row for row in csv.DictReader(file)}
    for i in (0, 700, 2893):
        row = rows[table.files[i].name]
        chosen = [row[f"expert{k}_atypical"] == "True" for k in (1, 2, 3)]
        assert table.votes[i, 1] == pytest.approx(sum(chosen) / 3)
        assert table.groups[i] == f"{row['dataset']}/{row['slide']}"


def test_real_midog(real_data: Path) -> None:
    if not (real_data / "midogpp").is_dir():
        pytest.skip("no MIDOG++ beside the checkout")
    table = open_patches(real_data / "midogpp", pixels=False)
    assert len(table) == 26286
    assert table.classes == ("mitotic figure", "not mitotic figure")
    assert (table.labels == 0).sum() == 11937
    assert len(set(table.files)) == len(set(table.groups)) == 503
    images = Counter(dict(zip(table.groups, table.domains, strict=True)).values())
    assert images == {
        "human breast cancer": 150,
        "canine soft tissue sarcoma": 100,
        "canine lymphosarcoma": 55,
        "human neuroendocrine tumor": 55,
        "canine cutaneous mast cell tumor": 50,
        "human melanoma": 49,
        "canine lung cancer": 44,
    }
    # Boxes of 50 px: corners, since as sizes every box would be another.
    assert tuple(table.centers[0]) == (4361, 371)
    # Two experts, and a third where they differ.
    assert Counter(table.experts.tolist()) == {2: 17727, 3: 8559}
    assert (table.votes[np.arange(len(table)), table.labels] > 0.5).all()
