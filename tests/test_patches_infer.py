"""``celltyper infer`` with a model of patches: patches, tables, points of an image."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
import shapely
import yaml
from PIL import Image

from celltyper.cells.geojson import write_geojson
from celltyper.cells.stream import write_csv
from celltyper.cells.table import cells_table, write_parquet
from celltyper.types import Prediction

Run = Callable[..., Any]

SIDE, SLIDES, EACH = 40, 9, 4
MPP = 0.25
RECIPE = {
    "task": "patches",
    "encoder": {"name": "vit_small_patch14_dinov2", "weights": "twin"},
    "data": {"positive": "bar", "mpp": MPP, "size": 32, "val_fraction": 0.34},
    "view": {"input": 28, "pool": "cls+mean"},
    "head": {"options": {"strengths": [1, 0.1, 0.01]}},
}


class Made(NamedTuple):
    """Labelled patches, a run on them, and a protocol of three folds."""

    root: Path
    run: Path
    folds: Path


def picture(rng: np.random.Generator, bar: bool) -> np.ndarray:
    image = rng.normal(200, 40, (SIDE, SIDE, 3))
    if bar:
        image[16:24, 6:34] -= 120
    else:
        image[12:28, 12:28] -= 90
    return image.clip(0, 255).astype(np.uint8)


def write_patches(root: Path) -> Path:
    rng, rows = np.random.default_rng(0), ["patch,slide"]
    for slide in range(SLIDES):
        for i in range(EACH):
            label = "bar" if i % 3 == 0 else "box"
            file = root / label / f"{slide}-{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(rng, label == "bar")).save(file)
            rows.append(f"{file.name},s{slide}")
    (root / "made.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLTYPER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    from celltyper.classification.config import PatchConfig
    from celltyper.classification.training import train_patches
    from celltyper.config import parse_config
    from celltyper.protocols import load_protocol, run_patch_protocol

    folder = tmp_path_factory.mktemp("made")
    root = write_patches(folder / "patches")
    config = parse_config(RECIPE, [f"data.root={root}"], PatchConfig)
    run = train_patches(config, folder / "run", device="cpu", progress=False)
    (folder / "folds.yaml").write_text(yaml.safe_dump({"folds": 3}))
    protocol = load_protocol(str(folder / "folds.yaml"))
    folds = run_patch_protocol(config, protocol, folder / "cv", device="cpu", progress=False)
    return Made(root, run, folds)


class Typed(NamedTuple):
    folder: Path
    out: str
    err: str

    def rows(self) -> list[dict[str, str]]:
        with (self.folder / "patches.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def column(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows()]

    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "infer.json").read_text())

    def features(self) -> list[dict[str, Any]]:
        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        text = (self.folder / "patches.geojson").read_text()
        return json.loads(text, parse_constant=refuse)["features"]


@pytest.fixture
def infer(made: Made, tmp_path: Path, celltyper_command: Run) -> Callable[..., Typed]:
    def start(*words: object, model: Path = made.run, to: str = "out", **_: Any) -> Typed:
        code, out, err = celltyper_command(
            "infer", *words, "-m", model, "-o", tmp_path / to, "--device", "cpu"
        )
        assert code == 0, err
        return Typed(tmp_path / to, out, err)

    return start


@pytest.fixture
def refused(made: Made, tmp_path: Path, celltyper_command: Run) -> Callable[..., str]:
    """Message of a command that must fail with one line and write nothing."""

    def start(*words: object, model: Path = made.run) -> str:
        to = tmp_path / "refused"
        code, out, err = celltyper_command("infer", *words, "-m", model, "-o", to)
        assert (code, out) == (2, "")
        assert not to.exists()
        return err.splitlines()[-1]

    return start


# ---------------------------------------------------------------- patches


def test_folder_gives_a_row_for_every_patch(infer: Run, made: Made) -> None:
    done = infer(made.root, "--mpp", MPP)
    rows = done.rows()
    assert list(rows[0]) == ["name", "file", "type", "p_bar", "p_box", "entropy_bits"]
    names = [f"{label}/{p.name}" for label in ("bar", "box") for p in (made.root / label).iterdir()]
    assert sorted(row["name"] for row in rows) == sorted(names)
    assert all(Path(row["file"]) == made.root / row["name"] for row in rows)
    p = np.array([done.column("p_bar"), done.column("p_box")])
    np.testing.assert_allclose(p.sum(axis=0), 1, atol=1e-9)
    expected = scipy.stats.entropy(p, base=2)
    np.testing.assert_allclose(done.column("entropy_bits"), expected, atol=1e-9)
    threshold = json.loads((made.run / "run.json").read_text())["threshold"]
    assert [row["type"] for row in rows] == ["bar" if x >= threshold else "box" for x in p[0]]
    # the two figures differ enough for any encoder
    right = [row["name"].startswith(row["type"]) for row in rows]
    assert np.mean(right) > 0.8

    table = pq.read_table(done.folder / "patches.parquet").to_pydict()
    assert table["name"] == [row["name"] for row in rows]
    np.testing.assert_allclose(table["p_bar"], p[0])
    facts = done.facts()
    counts = {k: sum(row["type"] == k for row in rows) for k in ("bar", "box")}
    assert (facts["task"], facts["patches"], facts["types"]) == ("patches", len(rows), counts)
    assert (facts["positive"], facts["threshold"]) == ("bar", threshold)
    assert facts["over_the_border"] == 0
    first, last = done.out.splitlines()
    assert first == f"36 patches: {counts['bar']} bar, {counts['box']} box"
    assert last == f"patches: {done.folder / 'patches.csv'}"
    assert not (done.folder / "patches.geojson").exists()


def test_protocol_types_as_an_ensemble(infer: Run, made: Made) -> None:
    done = infer(made.root, "--mpp", MPP, model=made.folds)
    folds = sorted(made.folds.glob("fold-*"))
    single = [infer(made.root, "--mpp", MPP, model=f, to=f.name) for f in folds]
    each = np.array([one.column("p_bar") for one in single])
    assert each.shape == (3, SLIDES * EACH)
    assert np.ptp(each, axis=0).max() > 1e-4
    np.testing.assert_allclose(done.column("p_bar"), each.mean(axis=0), atol=1e-12)
    mean = each.mean(axis=0)
    squares = ((each - mean) ** 2).sum(axis=0)
    np.testing.assert_allclose(done.column("deviation"), np.sqrt(squares / 2), atol=1e-12)
    facts = done.facts()
    assert facts["models"] == [str(fold) for fold in folds]
    assert facts["threshold"] == pytest.approx(np.mean(facts["thresholds"]))
    kinds = ["bar" if x >= facts["threshold"] else "box" for x in mean]
    assert [row["type"] for row in done.rows()] == kinds


def test_symmetries_make_turned_patches_the_same(infer: Run, tmp_path: Path) -> None:
    image = picture(np.random.default_rng(5), True)
    (tmp_path / "turned").mkdir()
    for name, turned in (("a", image), ("b", np.rot90(image)), ("c", image[:, ::-1])):
        Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / "turned" / f"{name}.png")
    plain = infer(tmp_path / "turned", "--mpp", MPP).column("p_bar")
    assert np.ptp(plain) > 1e-3
    words = ("--mpp", MPP, "--symmetries", 8)
    averaged = infer(tmp_path / "turned", *words, to="eight")
    assert np.ptp(averaged.column("p_bar")) < 1e-4
    assert averaged.facts()["symmetries"] == 8
    whole = infer(tmp_path / "turned", *words, "--batch-size", 3, to="three")
    np.testing.assert_allclose(whole.column("p_bar"), averaged.column("p_bar"), atol=1e-5)


def test_files_flat_folders_and_tables_are_the_same_patches(
    infer: Run, made: Made, tmp_path: Path
) -> None:
    files = sorted((made.root / "bar").iterdir())[:3]
    of_files = infer(*files, "--mpp", MPP)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in files:
        shutil.copy(file, flat)
    # what meta.json states needs no option
    (flat / "meta.json").write_text(json.dumps({"mpp": MPP}))
    of_folder = infer(flat, to="folder")
    # labels of other classes are not looked at
    text = "filename,label\n" + "".join(f"{f.name},{i + 1}\n" for i, f in enumerate(files))
    (flat / "list.csv").write_text(text)
    of_table = infer(flat / "list.csv", to="table")
    (tmp_path / "list.csv").write_text(text)
    elsewhere = infer(tmp_path / "list.csv", "--images", flat, "--mpp", MPP, to="elsewhere")
    wanted = of_files.column("p_bar")
    for one in (of_folder, of_table, elsewhere):
        assert [row["name"] for row in one.rows()] == [f.name for f in files]
        assert one.column("p_bar") == wanted
        assert "slide" not in one.err
    both = infer(made.root / "bar", flat, "--mpp", MPP, to="both")
    assert {row["name"].split("/")[0] for row in both.rows()} == {"bar", "flat"}


def test_corrupt_patch_is_named_and_left_out_only_if_told(
    infer: Run, refused: Run, made: Made, tmp_path: Path
) -> None:
    broken = shutil.copytree(made.root, tmp_path / "broken")
    file = broken / "box" / "3-1.png"
    file.write_bytes(file.read_bytes()[:500])
    message = refused(broken, "--mpp", MPP)
    assert str(file) in message
    assert "1 of 36 patches cannot be read" in message
    assert "--skip-bad" in message
    done = infer(broken, "--mpp", MPP, "--skip-bad")
    assert len(done.rows()) == 35
    assert "box/3-1.png" not in {row["name"] for row in done.rows()}
    assert [entry["name"] for entry in done.facts()["failed"]] == ["box/3-1.png"]
    assert "1 left out" in done.out
    assert "'box/3-1.png'" in done.err


def test_resolution_is_asked_for_and_never_guessed(
    refused: Run, made: Made, tmp_path: Path, infer: Run
) -> None:
    message = refused(made.root)
    assert "micrometres per pixel unknown (36 such files)" in message
    assert message.endswith("pass --mpp")
    # at twice the resolution a window of 32 px at .25 is 64 px of a file of 40: over the border
    done = infer(made.root, "--mpp", MPP / 2)
    assert done.facts()["over_the_border"] == 36
    assert "36 of 36 windows reach over the border" in done.err


def test_results_are_replaced_only_if_told(
    infer: Run, made: Made, tmp_path: Path, celltyper_command: Run
) -> None:
    done = infer(made.root / "bar", "--mpp", MPP)
    words = ("infer", made.root, "-m", made.run, "--mpp", MPP, "--device", "cpu", "-o")
    code, _, err = celltyper_command(*words, done.folder)
    assert code == 2
    assert "pass --overwrite" in err
    assert len(done.rows()) == 18
    assert celltyper_command(*words, done.folder, "--overwrite", "-q")[:2] == (0, "")
    assert len(done.rows()) == 36
    for folder in (made.run, made.folds):
        code, _, err = celltyper_command(*words, folder, "--overwrite")
        assert code == 2
        assert "holds a run" in err
    cells = tmp_path / "cells"
    cells.mkdir()
    (cells / "infer.json").write_text('{"images": []}')
    code, _, err = celltyper_command(*words, cells, "--overwrite")
    assert code == 2
    assert "holds cells" in err


def test_folder_without_index_is_not_finished(
    infer: Run, made: Made, monkeypatch: pytest.MonkeyPatch, celltyper_command: Run
) -> None:
    done = infer(made.root / "bar", "--mpp", MPP)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("celltyper.classification.inference.write_table", full)
    words = ("infer", made.root, "-m", made.run, "--mpp", MPP, "-o", done.folder, "--overwrite")
    assert celltyper_command(*words)[0] == 1
    assert not (done.folder / "infer.json").exists()
    assert not list(done.folder.glob("*.tmp*"))


def test_wrong_input_is_one_line(refused: Run, made: Made, tmp_path: Path) -> None:
    assert "no such image, folder or table" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(tmp_path / "empty")
    one, other = made.root / "bar" / "0-0.png", tmp_path / "0-0.png"
    shutil.copy(one, other)
    assert "would both be '0-0.png'" in refused(one, other, "--mpp", MPP)
    field = tmp_path / "field.png"
    Image.new("RGB", (1300, 200)).save(field)
    assert "1300 x 200 px" in (message := refused(field, "--mpp", MPP))
    assert "--points FILE" in message
    for option, value in (("--precision", "bf16"), ("--allow-code", None)):
        words = (option,) if value is None else (option, value)
        assert f"{option} is for images of cells" in refused(one, *words)
    (tmp_path / "note.txt").write_text("x")
    assert "is no image" in refused(tmp_path / "note.txt")
    assert "is for a table" in refused(one, "--images", tmp_path, "--mpp", MPP)


# ---------------------------------------------------------------- points


class Field(NamedTuple):
    """Patches side by side on one image that is wider than high."""

    image: Path
    patches: list[Path]
    centers: list[tuple[float, float]]


@pytest.fixture
def field(made: Made, tmp_path: Path) -> Field:
    patches = [*sorted((made.root / "bar").iterdir())[:3], *sorted((made.root / "box").iterdir())]
    patches = patches[:8]
    canvas = np.full((2 * SIDE, 4 * SIDE, 3), 240, np.uint8)
    centers = []
    for i, file in enumerate(patches):
        row, col = SIDE * (i // 4), SIDE * (i % 4)
        canvas[row : row + SIDE, col : col + SIDE] = np.asarray(Image.open(file))
        centers.append((col + SIDE / 2, row + SIDE / 2))
    Image.fromarray(canvas).save(tmp_path / "field.png")
    return Field(tmp_path / "field.png", patches, centers)


def write_points(path: Path, centers: list[tuple[float, float]], more: str = "") -> Path:
    path.write_text("X,Y\n" + "".join(f"{x},{y}{more}\n" for x, y in centers))
    return path


def test_points_see_what_patches_see(infer: Run, field: Field, tmp_path: Path) -> None:
    alone = infer(*field.patches, "--mpp", MPP)
    points = write_points(tmp_path / "points.csv", field.centers)
    done = infer(field.image, "--points", points, "--mpp", MPP, to="points")
    np.testing.assert_allclose(done.column("p_bar"), alone.column("p_bar"), atol=1e-6)
    assert [(float(r["x"]), float(r["y"])) for r in done.rows()] == field.centers
    assert done.rows()[5]["name"] == "field.png:60:60"
    for feature, row in zip(done.features(), done.rows(), strict=True):
        assert feature["geometry"] == {
            "type": "Point",
            "coordinates": [float(row["x"]), float(row["y"])],
        }
        assert feature["properties"]["objectType"] == "detection"
        assert feature["properties"]["classification"]["name"] == row["type"]
        measured = feature["properties"]["measurements"]
        assert measured["p_bar"] == pytest.approx(float(row["p_bar"]), abs=1e-6)
    colors = {
        f["properties"]["classification"]["name"]: tuple(f["properties"]["classification"]["color"])
        for f in done.features()
    }
    assert len(set(colors.values())) == len(colors) == 2


def test_points_at_the_border_are_counted_and_repeated_ones_stay(
    infer: Run, field: Field, tmp_path: Path
) -> None:
    # a window of 32 px fits from 16 px on
    centers = [(16.0, 16.0), (15.0, 40.0), (144.0, 64.0), (145.0, 40.0), (16.0, 16.0)]
    points = write_points(tmp_path / "points.csv", centers)
    done = infer(field.image, "--points", points, "--mpp", MPP)
    assert done.facts()["over_the_border"] == 2
    assert "2 of 5 windows reach over the border" in done.err
    names = [row["name"] for row in done.rows()]
    assert (names[0], names[4]) == ("field.png:16:16", "field.png:16:16#2")
    assert done.column("p_bar")[0] == done.column("p_bar")[4]


def test_points_outside_are_named_and_counted(refused: Run, field: Field, tmp_path: Path) -> None:
    points = write_points(tmp_path / "points.csv", [(20, 20), (900, 20), (20, -300), (30, 30)])
    message = refused(field.image, "--points", points, "--mpp", MPP)
    assert "x 900, y 20 is outside field.png (160 x 80 px)" in message
    assert "2 of 4 points are outside" in message
    write_points(points, [(20, 20)])
    assert "pass --mpp" in refused(field.image, "--points", points)
    assert "give one, not 2 inputs" in refused(field.image, field.image, "--points", points)
    points.write_text("a,b\n1,2\n")
    assert "no columns x and y" in refused(field.image, "--points", points, "--mpp", MPP)
    points.write_text("x,y\n1,two\n")
    assert "row 1: x '1' and y 'two'" in refused(field.image, "--points", points, "--mpp", MPP)
    points.write_text("filename,x,y\nother.png,1,2\n")
    assert "no points of field.png, but of 'other.png'" in refused(
        field.image, "--points", points, "--mpp", MPP
    )
    assert "no such file of points" in refused(field.image, "--points", tmp_path / "no.csv")


def test_table_of_several_images_gives_the_points_of_this_one(
    infer: Run, field: Field, tmp_path: Path
) -> None:
    points = tmp_path / "points.csv"
    points.write_text("filename,x,y\nfield.png,20,20\nother.png,9000,1\nfield,60,60\n")
    done = infer(field.image, "--points", points, "--mpp", MPP)
    assert [row["name"] for row in done.rows()] == ["field.png:20:20", "field.png:60:60"]
    assert "2 of 3 points are of field.png" in done.err


@pytest.fixture
def cells(field: Field, tmp_path: Path) -> Path:
    """Cells as ``celltyper infer`` writes them: one in the middle of every patch, one with a hole.

    Labels are not in the order of the patches.
    """
    labels = np.zeros((2 * SIDE, 4 * SIDE), np.int32)
    order = [3, 1, 2, 8, 7, 6, 5, 4]
    for label, (x, y) in zip(order, field.centers, strict=True):
        row, col = int(y), int(x)
        labels[row - 4 : row + 4, col - 6 : col + 6] = label
    labels[18:22, 18:22] = 0
    shares = np.full((8, 3), 1 / 3, np.float32)
    prediction = Prediction(
        labels, np.zeros((3, 1, 1), np.float32), shares, ("a", "b"), MPP, "field"
    )
    table = cells_table(prediction, image="field")
    write_parquet(tmp_path / "cells.parquet", table)
    write_csv(tmp_path / "cells.csv", table)
    write_geojson(tmp_path / "cells.geojson", table)
    return tmp_path


def test_cells_are_typed_with_their_outlines(infer: Run, field: Field, cells: Path) -> None:
    alone = infer(*field.patches, "--mpp", MPP).column("p_bar")
    wanted = dict(zip([3, 1, 2, 8, 7, 6, 5, 4], alone, strict=True))
    own = json.loads((cells / "cells.geojson").read_text())["features"]
    for kind in ("parquet", "csv", "geojson"):
        done = infer(
            field.image, "--points", cells / f"cells.{kind}", "--mpp", MPP, to=f"of-{kind}"
        )
        assert [int(row["cell_id"]) for row in done.rows()] == list(range(1, 9))
        found = {int(row["cell_id"]): float(row["p_bar"]) for row in done.rows()}
        assert found == pytest.approx(wanted, abs=1e-6)
        for feature, before, row in zip(done.features(), own, done.rows(), strict=True):
            measured = feature["properties"]["measurements"]
            assert measured["cell_id"] == int(row["cell_id"])
            assert feature["properties"]["classification"]["name"] == row["type"]
            if kind == "csv":
                assert feature["geometry"]["type"] == "Point"
            else:
                drawn = shapely.from_geojson(json.dumps(feature["geometry"]))
                assert drawn.equals(shapely.from_geojson(json.dumps(before["geometry"])))
                # 12 x 8 pixels, less the hole of 4 x 4 in the first patch
                assert drawn.area == (80 if row["cell_id"] == "3" else 96)
        if kind == "geojson":
            assert done.features()[0]["properties"]["measurements"]["area_px"] == 96


def test_qupath_objects_keep_what_they_are(infer: Run, field: Field, tmp_path: Path) -> None:
    def box(x: float, y: float, half: float) -> dict[str, Any]:
        low, high = (x - half, y - half), (x + half, y + half)
        ring = [low, (high[0], low[1]), high, (low[0], high[1]), low]
        return {"type": "Polygon", "coordinates": [[list(p) for p in ring]]}

    cell = {
        "type": "Feature",
        "id": "6f9b",
        "geometry": box(65, 22, 12),
        "nucleusGeometry": box(60, 20, 4),
        "properties": {
            "objectType": "cell",
            "name": "Anna's",
            "classification": {"name": "Tumor", "color": [1, 2, 3]},
            "measurements": [{"name": "Nucleus: Area", "value": 16.0}],
        },
    }
    dots = {
        "type": "Feature",
        "geometry": {"type": "MultiPoint", "coordinates": [[20, 20], [100, 60]]},
        "properties": {"objectType": "annotation"},
    }
    line = {"type": "Feature", "geometry": {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}}
    text = json.dumps({"type": "FeatureCollection", "features": [cell, dots, line]})
    (tmp_path / "objects.geojson.gz").write_bytes(gzip.compress(text.encode()))
    done = infer(field.image, "--points", tmp_path / "objects.geojson.gz", "--mpp", MPP)
    places = [(float(row["x"]), float(row["y"])) for row in done.rows()]
    assert places == [(60, 20), (20, 20), (100, 60)]  # of the cell, where its nucleus is
    assert "1 LineString" in done.err
    first, second, _ = done.features()
    assert (first["id"], first["geometry"]) == ("6f9b", cell["geometry"])
    assert first["nucleusGeometry"] == cell["nucleusGeometry"]
    assert first["properties"]["objectType"] == "cell"
    assert first["properties"]["name"] == "Anna's"
    assert first["properties"]["classification"]["name"] in ("bar", "box")
    assert first["properties"]["measurements"]["Nucleus: Area"] == 16.0
    assert second["geometry"] == {"type": "Point", "coordinates": [20, 20]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "unreadable or truncated GeoJSON"),
        ('{"a": 1}', "no GeoJSON"),
        ('[{"type": "Feature"}]', "feature 1 is no GeoJSON Feature with a geometry"),
        ('[{"geometry": {"type": "Polygon", "coordinates": []}}]', "coordinates are no Polygon"),
        ('[{"geometry": {"type": "Polygon", "coordinates": [[[0]]]}}]', "are no Polygon"),
        ('[{"geometry": {"type": "MultiPoint", "coordinates": [["a", 1]]}}]', "are no MultiPoint"),
        ("[]", "no points in it"),
    ],
)
def test_wrong_geojson_is_named(
    text: str, said: str, refused: Run, field: Field, tmp_path: Path
) -> None:
    (tmp_path / "wrong.geojson").write_text(text)
    assert said in refused(field.image, "--points", tmp_path / "wrong.geojson", "--mpp", MPP)


# ---------------------------------------------------------------- the other task


def test_options_of_patches_are_refused_for_models_of_cells(
    tiny: Callable[..., Any], made_data: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    from celltyper.library.files import task_of_run
    from celltyper.training import train

    run = train(tiny(made_data, "train.steps=2"), tmp_path / "dense", device="cpu", progress=False)
    assert task_of_run(run) == task_of_run(run / "model.safetensors") == "cells"
    image = made_data / "test" / "images" / "test5.png"
    words = ("infer", image, "-m", run, "-o", tmp_path / "out")
    for more in (("--points", image), ("--images", tmp_path), ("--skip-bad",)):
        code, _, err = celltyper_command(*words, *more)
        assert code == 2
        assert err.startswith(f"celltyper: {more[0]} is for patches, and this is about images of")
    assert not (tmp_path / "out").exists()


def test_task_of_a_run_of_patches(made: Made) -> None:
    from celltyper.library.files import task_of_run

    for path in (made.run, made.run / "model.safetensors", made.folds, made.folds / "fold-2"):
        assert task_of_run(path) == "patches"


def test_model_without_a_resolution_takes_pixels(made: Made, tmp_path: Path, infer: Run) -> None:
    from celltyper.classification.config import PatchConfig
    from celltyper.classification.inference import infer_patches
    from celltyper.classification.training import train_patches
    from celltyper.config import parse_config
    from celltyper.errors import ConfigError

    data = {**RECIPE["data"], "mpp": None, "root": str(made.root)}
    config = parse_config({**RECIPE, "data": data}, [], PatchConfig)
    run = train_patches(config, tmp_path / "run", device="cpu", progress=False)
    done = infer(made.root, model=run)
    # the same 32 px of the same patches, so the same head
    same = infer(made.root, "--mpp", MPP, to="same")
    np.testing.assert_allclose(done.column("p_bar"), same.column("p_bar"), atol=1e-6)
    with pytest.raises(ConfigError, match="--mpp has no effect"):
        infer_patches([made.root], run, tmp_path / "no", mpp=MPP, progress=False)
