"""Slides through the command line: which, where to, what is done again, what is said."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from made_slides import ArraySource, PixelModel, made_labels, made_pixels, made_slide
from numpy.typing import NDArray
from PIL import Image as PillowImage
from tqdm import tqdm

from celltyper import cohort, formats, inference
from celltyper import inputs as slide_inputs
from celltyper import outputs as results
from celltyper.config import Config
from celltyper.errors import ConfigError, DataError
from celltyper.inference import read_predictions
from celltyper.inputs import Entry, are_slides, find_slides
from celltyper.made import made_sample
from celltyper.slides import Slide, whole_slide
from celltyper.training import train
from celltyper.wholeslide import infer_slide
from celltyper.wholeslide import slide as wholeslide
from celltyper.wholeslide.plan import make_plan
from celltyper.wholeslide.worker import Worker

Run = Callable[..., Any]
SIDE = 288
OF_ONE_SLIDE = {"cells.parquet", "cells.geojson", "report.html", "slide.json"}
OF_A_COHORT = {"infer.json", "slides.csv", "report.html"}


@pytest.fixture(scope="module")
def trained(
    tiny: Callable[..., Config], made_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that finds cells, at 0.5 micrometres per pixel."""
    config = tiny(
        made_data,
        "instances.method=distance",
        "train.steps=60",
        "train.lr=0.003",
        "train.validate_every=60",
    )
    return train(config, tmp_path_factory.mktemp("run"), device="cpu", progress=False)


def pixels(seed: int = 0) -> NDArray[np.uint8]:
    fields = [made_sample(100 + 10 * seed + i, "").image for i in range(9)]
    return np.concatenate([np.concatenate(fields[i : i + 3], 1) for i in (0, 3, 6)], 0)


def write_slide(path: Path, seed: int = 0, mpp: float | None = 0.5, plain: bool = False) -> Path:
    """A TIFF in tiles, with two more levels unless `plain`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels(seed)
    with tifffile.TiffWriter(path) as tiff:
        for i in range(1 if plain else 3):
            per_cm = None if mpp is None else (1e4 / (mpp * 2**i),) * 2
            tiff.write(
                image[:: 2**i, :: 2**i],
                tile=(64, 64),
                photometric="rgb",
                compression="deflate",
                subfiletype=int(i > 0),
                resolution=per_cm,
                resolutionunit=None if mpp is None else "CENTIMETER",
                metadata=None,
            )
    return path


def write_zarr(path: Path, seed: int = 0) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    datasets = []
    for i in range(2):
        data = np.moveaxis(pixels(seed)[:: 2**i, :: 2**i], 2, 0)
        array = group.create_array(str(i), shape=data.shape, dtype="u1", chunks=(3, 64, 64))
        array[:] = data
        scale = [{"type": "scale", "scale": [1, 0.5 * 2**i, 0.5 * 2**i]}]
        datasets.append({"path": str(i), "coordinateTransformations": scale})
    unit = {"type": "space", "unit": "micrometer"}
    axes = [{"name": "c", "type": "channel"}, {"name": "y"} | unit, {"name": "x"} | unit]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes, "datasets": datasets}],
    }
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three slides; never written to."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate("abc"):
        write_slide(folder / f"{name}.tif", seed)
    return folder


@pytest.fixture(scope="module")
def finished(slides: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the three slides; never written to."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return cohort.infer_slides([slides], trained, out, device="cpu", progress=False)


@pytest.fixture
def infer(trained: Path, celltyper_command: Run) -> Run:
    """``celltyper infer WORDS -m RUN --device cpu``."""
    return lambda *words: celltyper_command("infer", *words, "-m", trained, "--device", "cpu")


def index(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "infer.json").read_text()))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def cells(folder: Path) -> pa.Table:
    return pq.read_table(folder / "cells.parquet")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_refused(outcome: Any, *parts: object, code: int = 2) -> None:
    """One line on stderr that has all parts, nothing on stdout."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    last = outcome.err.splitlines()[-1]
    assert last.startswith("celltyper: ")
    for part in parts:
        assert str(part) in last


# ---------------------------------------------------------------- which slides


def test_one_slide_as_tiff_zarr_url_and_png(
    slides: Path, finished: Path, tmp_path: Path, infer: Run
) -> None:
    outcome = infer(slides / "a.tif", "-o", tmp_path / "tiff")
    found = cells(tmp_path / "tiff")
    area = SIDE**2 * 0.25e-6
    assert outcome.code == 0
    assert re.fullmatch(
        rf"a: {len(found)} cells on {area:.4f} mm² of tissue in [\d.]+ s\n"
        rf"report: {tmp_path}/tiff/report.html\n",
        outcome.out,
    )
    assert outcome.err == ""
    assert names(tmp_path / "tiff") == OF_ONE_SLIDE | {"infer.json"}
    assert len(found) > 20
    # of the very same pixels, by other readers
    store = write_zarr(tmp_path / "a.ome.zarr")
    PillowImage.fromarray(pixels()).save(tmp_path / "a.png")
    for number, words in enumerate(
        ([store], [f"file://{store}"], [tmp_path / "a.png", "--mpp", 0.5, "--block", 100])
    ):
        out = tmp_path / str(number)
        assert infer(*words, "-o", out, "--quiet") == (0, "", "")
        same = cells(out)
        if "--block" in words:
            same = same.take(np.lexsort((same["x"].to_numpy(), same["y"].to_numpy())))
            order = np.lexsort((found["x"].to_numpy(), found["y"].to_numpy()))
            assert same["x"].equals(found.take(order)["x"])
        else:
            assert same.equals(found)
    assert found.equals(cells(finished / "a"))


def test_folder_pattern_and_table_of_slides(slides: Path, tmp_path: Path) -> None:
    paths = [str(slides / f"{name}.tif") for name in "abc"]
    (tmp_path / "notes.txt").write_text("no slide")
    expected = [Entry(path, name) for path, name in zip(paths, "abc", strict=True)]
    assert find_slides([slides]) == expected
    assert find_slides([slides / "*"]) == expected
    shutil.copytree(slides, tmp_path / "deep" / "er")
    deep = [replace(e, path=e.path.replace(str(slides), f"{tmp_path}/deep/er")) for e in expected]
    assert find_slides([tmp_path / "**" / "[a-c].tif"]) == deep
    assert find_slides(paths) == expected
    # given twice, it is worked on once
    assert find_slides([slides, paths[0]]) == expected
    url = "s3://bucket/some/slide.ome.zarr"
    assert find_slides([url], mpp=0.3) == [Entry(url, "slide", 0.3)]
    assert are_slides([url])


def test_columns_of_a_table(slides: Path, tmp_path: Path) -> None:
    where = os.path.relpath(slides, tmp_path)
    (tmp_path / "mask.png").touch()
    (tmp_path / "some.csv").write_text(
        "patient,slide,name,mpp,tissue,region\n"
        f"1,{where}/a.tif,,,,\n"
        f"1,{where}/a.tif,upper,,,\"0,0,100,50\"\n"
        f"2,{where}/b.tif,second,0.25,all,\n"
        f"3,{where}/c.tif,,,mask.png,\n"
        "4,s3://bucket/d.zarr,,,,\n"
    )  # fmt: skip
    at = f"{tmp_path}/{where}"
    assert find_slides([tmp_path / "some.csv"], mpp=0.4) == [
        Entry(f"{at}/a.tif", "a", 0.4),
        Entry(f"{at}/a.tif", "upper", 0.4, region="0,0,100,50"),
        Entry(f"{at}/b.tif", "second", 0.25, "all"),
        Entry(f"{at}/c.tif", "c", 0.4, str(tmp_path / "mask.png")),
        Entry("s3://bucket/d.zarr", "d", 0.4),
    ]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("path\na.tif\n", "no column 'slide'; columns are path, known ones slide, name, mpp"),
        ("slide\n", "names no slide"),
        ("slide\na.tif\nz.tif\n", "line 3: no such slide: "),
        ("slide,mpp\na.tif,\n,0.5\n", "line 3: names no slide"),
        ("slide,mpp\na.tif,fine\n", "line 2: mpp 'fine' is no number of micrometres per pixel"),
        ("slide,mpp\na.tif,1000\n", "line 2: mpp '1000' is no number"),
        ("slide,mpp\na.tif,nan\n", "line 2: mpp 'nan' is no number"),
        ('slide,region\na.tif,"1,2,3"\n', "line 2: region '1,2,3': give x,y,width,height"),
        ("slide,region\na.tif,all\n", "line 2: region 'all': give x,y,width,height"),
        ('slide,region,tissue\na.tif,"0,0,9,9",all\n', "line 2: give a region or where the"),
        ("slide,tissue\na.tif,mask.png\n", "mask.png: no such file; give auto, all, a mask"),
        ("slide,name\na.tif,../x\n", "line 2: name '../x' cannot be that of a folder"),
        ("slide,name\na.tif,x\nb.tif,x\n", "have the same name 'x'"),
        ('slide,region\na.tif,"0,0,9,9"\na.tif,"9,9,9,9"\n', "have the same name 'a'"),
        ("slide;mpp\na.tif;0.5\n", "semicolons"),
    ],
)
def test_wrong_table_is_refused_before_anything_is_written(
    table: str, said: str, slides: Path, tmp_path: Path, infer: Run
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.tif").symlink_to(slides / f"{name}.tif")
    (tmp_path / "list.csv").write_text(table)
    assert_refused(infer(tmp_path / "list.csv", "-o", tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_there(slides: Path, tmp_path: Path, infer: Run) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "deep").mkdir(parents=True)
    write_slide(tmp_path / "other" / "a.tif")
    out = tmp_path / "out"
    for words, said in (
        ([tmp_path / "empty"], f"{tmp_path}/empty holds no image (.jpeg, .jpg,"),
        ([tmp_path / "gone.svs"], f"no such image or folder: {tmp_path}/gone.svs"),
        ([tmp_path / "*.svs"], f"no slide or image matches {tmp_path}/*.svs"),
        ([tmp_path / "gone.csv"], "gone.csv"),
        ([slides, tmp_path / "other"], "have the same name 'a'; rename one, or give names"),
    ):
        assert_refused(infer(*words, "-o", out), said)
    assert not out.exists()


def test_what_is_worked_on_as_a_slide(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_slide(tmp_path / "plain.tif", plain=True)
    png = tmp_path / "small.png"
    PillowImage.fromarray(pixels()).save(png)
    (tmp_path / "broken.tif").write_bytes(plain.read_bytes()[:100])
    assert not are_slides([plain, png, tmp_path / "broken.tif"])
    assert are_slides([png, slides / "a.tif"])
    assert are_slides([write_zarr(tmp_path / "store.zarr")])
    assert are_slides([tmp_path / "store.zarr", png])
    monkeypatch.setattr(slide_inputs, "LARGE", SIDE**2 - 1)
    assert are_slides([plain])
    assert are_slides([png])
    monkeypatch.setattr(slide_inputs, "LARGE", SIDE**2)
    assert not are_slides([plain, png])


def test_images_of_a_dataset_stay_images(made_data: Path, tmp_path: Path, infer: Run) -> None:
    """A folder ``images`` is looked into, as for images."""
    assert infer(made_data / "test", "-o", tmp_path / "out", "--mpp", 0.5).code == 0
    assert names(tmp_path / "out") == {"cells.parquet", "infer.json", "test5", "test6"}
    outcome = infer(made_data / "test", "-o", tmp_path / "slides", "--mpp", 0.5, "--tissue", "all")
    assert outcome.code == 0
    assert names(tmp_path / "slides") == {"test5", "test6"} | OF_A_COHORT


def test_image_and_slide_in_one_call(slides: Path, tmp_path: Path, infer: Run) -> None:
    PillowImage.fromarray(pixels()).save(tmp_path / "small.png")
    words = (tmp_path / "small.png", slides / "b.tif", "-o", tmp_path / "out")
    outcome = infer(*words)
    assert_refused(outcome, "1 of 2 slides failed", "small.png: states no micro", "--mpp", code=1)
    assert infer(*words, "--mpp", 0.5).code == 0
    assert [each["name"] for each in index(tmp_path / "out")["images"]] == ["small", "b"]


# ---------------------------------------------------------------- cohorts


def test_results_of_a_cohort(slides: Path, finished: Path) -> None:
    assert names(finished) == {"a", "b", "c"} | OF_A_COHORT
    facts = index(finished)
    assert [each["folder"] for each in facts["images"]] == ["a", "b", "c"]
    assert facts["failed"] == []
    table = rows(finished / "slides.csv")
    for name, row, entry in zip("abc", table, facts["images"], strict=True):
        assert names(finished / name) == OF_ONE_SLIDE
        count = len(cells(finished / name))
        assert row["name"] == entry["name"] == name
        assert int(row["cells"]) == entry["cells"] == count > 0
        assert row["path"] == entry["image"] == str(slides / f"{name}.tif")
        assert entry["tissue_mm2"] == pytest.approx(SIDE**2 * 0.25e-6)
        assert f'href="{name}/report.html"' in (finished / "report.html").read_text()


def test_broken_slide_is_passed_over_and_tried_again(
    slides: Path, tmp_path: Path, infer: Run
) -> None:
    folder, out = tmp_path / "slides", tmp_path / "out"
    shutil.copytree(slides, folder)
    whole = (folder / "b.tif").read_bytes()
    (folder / "b.tif").write_bytes(whole[:200])
    outcome = infer(folder, "-o", out)
    assert_refused(
        outcome, "1 of 3 slides failed", folder / "b.tif", out / "report.html", "2 are done", code=1
    )
    assert [line[:7] for line in outcome.err.splitlines()[:-1]] == ["1 of 3:", "2 of 3:", "3 of 3:"]
    facts = index(out)
    assert [each["name"] for each in facts["images"]] == ["a", "c"]
    assert [(each["name"], each["path"]) for each in facts["failed"]] == [
        ("b", str(folder / "b.tif"))
    ]
    row = next(row for row in rows(out / "slides.csv") if row["name"] == "b")
    assert row["cells"] == ""
    assert row["error"] == facts["failed"][0]["error"]
    assert str(folder / "b.tif") in (out / "report.html").read_text()
    assert not (out / "b").exists()

    before = stamps(out / "a") | stamps(out / "c")
    assert infer(folder, "-o", out).code == 1
    (folder / "b.tif").write_bytes(whole)
    outcome = infer(folder, "-o", out)
    assert outcome.code == 0
    assert [line.endswith(", done before") for line in outcome.err.splitlines()] == [
        True,
        False,
        True,
    ]
    assert stamps(out / "a") | stamps(out / "c") == before
    assert index(out)["failed"] == []
    assert {row["error"] for row in rows(out / "slides.csv")} == {""}
    assert str(folder / "b.tif") not in (out / "report.html").read_text()


def test_failure_that_nobody_thought_of_is_one_slide_s(
    slides: Path, tmp_path: Path, infer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: Any, slide: Slide, *rest: Any, **options: Any) -> Any:
        if slide.name == "a":
            raise KeyError("some tag")
        return infer_slide(model, slide, *rest, **options)

    monkeypatch.setattr(cohort, "infer_slide", fails)
    out = tmp_path / "out"
    assert_refused(infer(slides, "-o", out), "1 of 3 slides failed, the first: KeyError", code=1)
    assert [each["name"] for each in index(out)["images"]] == ["b", "c"]


def test_slides_that_come_and_go(slides: Path, finished: Path, tmp_path: Path, infer: Run) -> None:
    folder, out = tmp_path / "slides", tmp_path / "out"
    folder.mkdir()
    shutil.copy(slides / "a.tif", folder)
    assert infer(folder, "-o", out).code == 0
    # a folder with one slide so far: there may be more
    assert names(out) == {"a"} | OF_A_COHORT
    before = stamps(out / "a")
    shutil.copy(slides / "b.tif", folder)
    assert infer(folder, "-o", out).code == 0
    assert stamps(out / "a") == before
    assert cells(out / "b").equals(cells(finished / "b"))
    (folder / "a.tif").unlink()
    assert infer(folder, "-o", out).code == 0
    assert [each["name"] for each in index(out)["images"]] == ["b"]
    assert [row["name"] for row in rows(out / "slides.csv")] == ["b"]
    assert stamps(out / "a") == before


def test_one_slide_each_then_one_summary(
    slides: Path, finished: Path, tmp_path: Path, infer: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tasks of a SLURM array do it."""
    out = tmp_path / "out"
    for name in "abc":
        assert infer(slides / f"{name}.tif", "-o", out / name).code == 0
    before = stamps(out)

    def no_work(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(wholeslide, "run_blocks", no_work)
    assert infer(slides, "-o", out).code == 0
    after = stamps(out)
    assert {path.name for path in after.keys() - before.keys()} == OF_A_COHORT
    assert {path: after[path] for path in before} == before
    assert [row["cells"] for row in rows(out / "slides.csv")] == [
        row["cells"] for row in rows(finished / "slides.csv")
    ]


def test_other_settings_are_refused_before_any_slide(
    slides: Path, finished: Path, tmp_path: Path, infer: Run
) -> None:
    folder, out = tmp_path / "slides", tmp_path / "out"
    shutil.copytree(slides, folder)
    shutil.copytree(finished, out)
    write_slide(folder / "0-new.tif", 7)
    before = stamps(out)
    outcome = infer(folder, "-o", out, "--symmetries", 2)
    assert_refused(outcome, out / "a", "was begun with other settings")
    assert stamps(out) == before


# ---------------------------------------------------------------- where to look


def test_region_and_masks_give_the_cells_inside(
    slides: Path, finished: Path, tmp_path: Path, infer: Run
) -> None:
    left, top, width, height = 50, 90, 120, 100
    mask = np.zeros((SIDE // 2, SIDE // 2), np.uint8)
    mask[top // 2 : (top + height) // 2, left // 2 : (left + width) // 2] = 255
    PillowImage.fromarray(mask).save(tmp_path / "mask.png")
    corners = [(0, 0), (width, 0), (width, height), (0, height), (0, 0)]
    ring = [[left + x, top + y] for x, y in corners]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation"},
    }
    (tmp_path / "part.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": [feature]})
    )
    everything = cells(finished / "a")
    x, y = everything["x"].to_numpy(), everything["y"].to_numpy()
    inside = (x > left) & (x < left + width) & (y > top) & (y < top + height)
    assert 3 < inside.sum() < len(x) - 10
    expected = everything.filter(inside).drop_columns("cell_id")
    for number, words in enumerate(
        (
            ("--region", f"{left},{top},{width},{height}"),
            ("--tissue", tmp_path / "mask.png"),
            ("--tissue", tmp_path / "part.geojson"),
        )
    ):
        out = tmp_path / str(number)
        assert infer(slides / "a.tif", "-o", out, *words).code == 0
        assert cells(out).drop_columns("cell_id").equals(expected)
        assert index(out)["images"][0]["tissue_mm2"] == pytest.approx(width * height * 0.25e-6)
    assert infer(slides / "a.tif", "-o", tmp_path / "all", "--tissue", "all").code == 0
    assert cells(tmp_path / "all").equals(everything)
    # a rectangle of each of several slides
    outcome = infer(slides, "-o", tmp_path / "each", "--region", f"{left},{top},{width},{height}")
    assert outcome.code == 0
    assert cells(tmp_path / "each" / "a").drop_columns("cell_id").equals(expected)


def test_two_regions_of_one_slide(slides: Path, finished: Path, tmp_path: Path, infer: Run) -> None:
    (tmp_path / "list.csv").write_text(
        "slide,name,region\n"
        f'{slides}/a.tif,upper,"0,0,{SIDE},{SIDE // 2}"\n'
        f'{slides}/a.tif,lower,"0,{SIDE // 2},{SIDE},{SIDE // 2}"\n'
    )
    out = tmp_path / "out"
    assert infer(tmp_path / "list.csv", "-o", out).code == 0
    found = [(each["name"], each["cells"]) for each in index(out)["images"]]
    y = cells(finished / "a")["y"].to_numpy()
    assert found == [
        ("upper", int((y < SIDE // 2).sum())),
        ("lower", int((y > SIDE // 2).sum())),
    ]
    assert "<h1>upper</h1>" in (out / "upper" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--region", "0,0,9,9", "--tissue", "all"), "give a region or where the tissue is, not"),
        (("--region", "0,0,9"), "region '0,0,9': give x,y,width,height in pixels of the full"),
        (("--region", "0,0,0,9"), "width and height 1 or more"),
        (("--region", "0,0,289,9"), "reaches to x 289, y 9, but a has 288 x 288 px"),
        (("--tissue", "al"), "al: no such file; give auto, all, a mask image or a GeoJSON"),
        (("--workers", 2, "--cluster", "tcp://127.0.0.1:1"), "--workers, 1 or more, or --cluster"),
        (("--mpp", 500), "mpp must lie in"),
        (("--points", "cells.csv"), "--points is for patches"),
    ],
)
def test_options_that_make_no_sense(
    words: tuple[Any, ...], said: str, slides: Path, tmp_path: Path, infer: Run
) -> None:
    assert_refused(infer(slides / "a.tif", "-o", tmp_path / "out", *words), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--region", "0,0,9,9"),
        ("--tissue", "all"),
        ("--block", 512),
        ("--workers", 2),
        ("--cluster", "tcp://127.0.0.1:1"),
        ("--keep-maps",),
        ("--strict",),
    ],
    ids=lambda words: words[0],
)
def test_options_of_slides_are_not_for_patches(
    words: tuple[Any, ...],
    slides: Path,
    tmp_path: Path,
    infer: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("celltyper.library.files.task_of_run", lambda _: "patches")
    outcome = infer(slides / "a.tif", "-o", tmp_path / "out", *words)
    assert_refused(outcome, f"{words[0]} is for images of cells, and this is about patches")


def test_mask_of_one_slide_is_not_for_several(slides: Path, tmp_path: Path, infer: Run) -> None:
    PillowImage.fromarray(np.full((9, 9), 255, np.uint8)).save(tmp_path / "mask.png")
    outcome = infer(slides, "-o", tmp_path / "out", "--tissue", tmp_path / "mask.png")
    assert_refused(outcome, "mask.png shows the tissue of one slide, and these are 3; give a CSV")


def test_region_outside_of_one_of_several_is_that_one_s(
    slides: Path, tmp_path: Path, infer: Run
) -> None:
    small = tmp_path / "small.png"
    PillowImage.fromarray(pixels()[:100, :100]).save(small)
    words = (small, slides / "a.tif", "--mpp", 0.5, "--region", "100,100,60,60")
    outcome = infer(*words, "-o", tmp_path / "out")
    assert_refused(outcome, "1 of 2 slides failed", small, "reaches to x 160, y 160", code=1)
    assert [each["name"] for each in index(tmp_path / "out")["images"]] == ["a"]


# ---------------------------------------------------------------- what is warned of


def warnings_of(folder: Path) -> list[str]:
    return list(json.loads((folder / "slide.json").read_text())["warnings"])


def test_resolution_given_by_hand(slides: Path, tmp_path: Path, infer: Run) -> None:
    bare = write_slide(tmp_path / "bare.tif", mpp=None)
    assert_refused(infer(bare, "-o", tmp_path / "out"), bare, "states no micrometres", "--mpp 0.25")
    outcome = infer(bare, "-o", tmp_path / "out", "--mpp", 0.5)
    said = "0.5 µm per pixel was given by hand: the file states none."
    assert warnings_of(tmp_path / "out") == [said]
    assert outcome.err == f"bare: {said}\n"
    assert said in (tmp_path / "out" / "report.html").read_text()

    assert infer(slides / "a.tif", "-o", tmp_path / "same", "--mpp", 0.5).err == ""
    assert warnings_of(tmp_path / "same") == []

    infer(slides / "a.tif", "-o", tmp_path / "other", "--mpp", 0.25)
    assert warnings_of(tmp_path / "other") == [
        "0.25 µm per pixel was given by hand: the file states 0.5 µm."
    ]
    area = index(tmp_path / "other")["images"][0]["tissue_mm2"]
    assert area == pytest.approx(SIDE**2 * 0.0625e-6)
    # other sizes are other settings, of the same slide
    outcome = infer(slides / "a.tif", "-o", tmp_path / "other")
    assert_refused(outcome, "other was begun with other settings; ")


@pytest.mark.parametrize(("mpp", "times"), [(0.5, 0), (0.74, 0), (1.0, "2.0"), (0.25, 0)])
def test_slide_coarser_than_the_model(
    mpp: float, times: Any, tmp_path: Path, trained: Path, infer: Run
) -> None:
    slide = write_slide(tmp_path / "a.tif", mpp=mpp)
    infer(slide, "-o", tmp_path / "out", "--region", "0,0,100,100")
    found = [text for text in warnings_of(tmp_path / "out") if "enlarged" in text]
    if times:
        assert found == [
            f"The slide has {mpp:g} µm per pixel, the model works at 0.5 µm: the slide was "
            f"enlarged {times} times and lacks the details it needs."
        ]
    else:
        assert found == []


def test_empty_and_damaged_slides(tmp_path: Path, infer: Run) -> None:
    white = tmp_path / "white.png"
    PillowImage.fromarray(np.full((200, 200, 3), 255, np.uint8)).save(white)
    words = (white, "--mpp", 0.5)
    assert infer(*words, "-o", tmp_path / "white", "--tissue", "auto").code == 0
    assert warnings_of(tmp_path / "white")[1:] == ["There is no tissue: nothing was looked at."]
    assert infer(*words, "-o", tmp_path / "all", "--tissue", "all").code == 0
    assert warnings_of(tmp_path / "all")[1:] == ["No cell was found."]

    damaged = write_slide(tmp_path / "damaged.tif")
    with tifffile.TiffFile(damaged) as tiff:
        start, size = tiff.pages[0].dataoffsets[6], tiff.pages[0].databytecounts[6]
    content = bytearray(damaged.read_bytes())
    content[start : start + size] = bytes(size)
    damaged.write_bytes(content)
    outcome = infer(damaged, "-o", tmp_path / "damaged", "--keep-maps")
    # 5 tiles of 64 px a row: the seventh is the second of the second row
    assert f"{damaged}: damaged tile at x 64, y 64 (64 x 64 px" in outcome.err
    assert warnings_of(tmp_path / "damaged") == ["1 damaged tile was taken for background."]
    assert outcome.code == 0
    assert (tmp_path / "damaged" / "maps.zarr").is_dir()
    outcome = infer(damaged, "-o", tmp_path / "strict", "--strict")
    assert_refused(outcome, "damaged tile at x 64, y 64", "--strict")


# ---------------------------------------------------------------- one folder, one run


def test_every_file_that_is_written_can_be_cleared() -> None:
    known = {*results.FILES, *results.STORES, *results.OF_ALL, results.SLIDE_FILE}
    assert {each.target for each in formats.FORMATS.values()} <= known
    assert {inference.CSV_FILE, inference.OVERLAY_FILE, *OF_ONE_SLIDE, *OF_A_COHORT} <= known


def test_overwrite_leaves_nothing_of_the_run_before(
    slides: Path, trained: Path, finished: Path, tmp_path: Path, celltyper_command: Run, infer: Run
) -> None:
    out = tmp_path / "out"
    one, image = slides / "a.tif", tmp_path / "small.png"
    PillowImage.fromarray(pixels()).save(image)
    assert infer(one, "-o", out, "--keep-maps").code == 0
    (out / "mine.txt").write_text("kept")
    words = ("export", out, "--to", "csv,geojson.gz,ome-zarr,anndata")
    assert celltyper_command(*words).code == 0
    exports = {"cells.csv", "cells.geojson.gz", "cells.ome.zarr", "cells.h5ad"}
    assert names(out) >= exports | {"maps.zarr"}

    # slide -> slide
    assert_refused(infer(one, "-o", out, "--symmetries", 2), "begun with other settings")
    assert infer(one, "-o", out, "--symmetries", 2, "--overwrite").code == 0
    assert names(out) == OF_ONE_SLIDE | {"infer.json", "mine.txt"}
    # slide -> image
    celltyper_command("export", out, "--to", "anndata")
    words = (image, "-o", out, "--mpp", 0.5)
    assert_refused(infer(*words), f"{out} already holds results of infer; pass --overwrite or")
    assert infer(*words, "--overwrite").code == 0
    of_image = {"cells.parquet", "cells.csv", "cells.geojson", "labels.npz", "overlay.png"}
    assert names(out) == of_image | {"infer.json", "mine.txt"}
    # image -> slide
    assert_refused(infer(one, "-o", out), f"{out} already holds results of infer; pass --overwrite")
    assert infer(one, "-o", out, "--overwrite").code == 0
    assert names(out) == OF_ONE_SLIDE | {"infer.json", "mine.txt"}
    # slide -> slides
    assert_refused(infer(slides, "-o", out), "holds the results of a alone; give another folder")
    assert infer(slides, "-o", out, "--overwrite").code == 0
    assert names(out) == {"a", "b", "c", "mine.txt"} | OF_A_COHORT
    assert cells(out / "b").equals(cells(finished / "b"))
    # slides -> slide
    assert_refused(infer(one, "-o", out), "holds the results of several slides; ", out / "NAME")
    (out / "b" / "notes.txt").write_text("kept")
    assert infer(one, "-o", out, "--overwrite").code == 0
    assert names(out) == OF_ONE_SLIDE | {"infer.json", "mine.txt", "b"}
    assert names(out / "b") == {"notes.txt"}
    # slides -> images
    assert infer(slides, "-o", out, "--overwrite").code == 0
    images = tmp_path / "images"
    images.mkdir()
    for name in "xy":
        shutil.copy(image, images / f"{name}.png")
    assert infer(images, "-o", out, "--mpp", 0.5, "--overwrite").code == 0
    assert names(out) == {"cells.parquet", "infer.json", "mine.txt", "b", "x", "y"}
    assert names(out / "b") == {"notes.txt"}


def test_folder_of_a_run_and_of_patches_is_refused(
    slides: Path, trained: Path, tmp_path: Path, infer: Run
) -> None:
    image = tmp_path / "image.png"
    PillowImage.fromarray(pixels()).save(image)
    patches = tmp_path / "patches"
    patches.mkdir()
    (patches / "infer.json").write_text('{"task": "patches"}')
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "protocol.json").write_text("{}")
    for words in ((slides,), (image, "--mpp", 0.5)):
        for more in ((), ("--overwrite",)):
            for place in (trained, runs):
                assert_refused(infer(*words, "-o", place, *more), f"{place} holds a run; give anot")
            assert_refused(infer(*words, "-o", patches, *more), f"{patches} holds patches; give an")
    assert (patches / "infer.json").exists()


def test_failing_with_overwrite_loses_nothing(
    slides: Path, finished: Path, tmp_path: Path, infer: Run
) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad.svs"
    shutil.copytree(finished / "a", out)
    shutil.copy(finished / "infer.json", out)
    bad.write_bytes((slides / "a.tif").read_bytes()[:200])
    before = stamps(out)
    assert_refused(infer(bad, "-o", out, "--overwrite"), bad)
    assert stamps(out) == before


def test_table_that_was_removed_is_made_again(
    slides: Path, finished: Path, tmp_path: Path, infer: Run
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "b" / "cells.parquet").unlink()
    assert infer(slides, "-o", out).code == 0
    assert cells(out / "b").equals(cells(finished / "b"))


def test_foreign_work_is_not_touched(slides: Path, tmp_path: Path, infer: Run) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    for more in ((), ("--overwrite",)):
        assert_refused(infer(slides / "a.tif", "-o", tmp_path, *more), "work is in the way")
    assert (tmp_path / "work" / "thesis.tex").read_text() == "mine"


def test_cells_of_slides_are_not_scored(
    finished: Path, made_data: Path, celltyper_command: Run
) -> None:
    before = stamps(finished)
    with pytest.raises(DataError, match="holds cells of slides"):
        read_predictions(finished)
    for more in ((), ("--overwrite",)):
        outcome = celltyper_command("eval", "--pred", finished, "--ref", made_data / "test", *more)
        assert_refused(outcome, f"{finished} holds cells of slides", "infer the annotated fields")
    assert stamps(finished) == before


# ---------------------------------------------------------------- stopped and gone on with


class Stop(BaseException):
    pass


class Stopping(PixelModel):
    """Ends, as if killed, after some tiles."""

    left = 10**9

    def forward(self, images: Any, features: Any = None) -> Any:
        self.left -= len(images)
        if self.left < 0:
            raise Stop
        return super().forward(images, features)


def half_done(out: Path, **options: Any) -> tuple[Slide, Stopping]:
    slide, model = made_slide(made_labels(400, 500)), Stopping()
    model.left = 20
    with pytest.raises(Stop):
        infer_slide(
            model, slide, out, whole_slide(slide), block=160, progress=False, **options  # type: ignore[arg-type]
        )  # fmt: skip
    model.left = 10**9
    assert list((out / "work" / "predicted").iterdir())
    return slide, model


def go_on(out: Path, slide: Slide, model: PixelModel, **options: Any) -> dict[str, Any]:
    return infer_slide(
        model, slide, out, whole_slide(slide), block=160, progress=False, **options  # type: ignore[arg-type]
    )  # fmt: skip


def test_time_of_earlier_sessions_counts_and_pauses_do_not(tmp_path: Path) -> None:
    slide, model = half_done(tmp_path)
    clock = tmp_path / "work" / "clock.json"
    last = time.time() - 3600
    for each in (tmp_path / "work").iterdir():
        os.utime(each, (last, last))
    # a session of 100 s after others of 1000 s, an hour ago
    clock.write_text(json.dumps({"before": 1000.0, "began": last - 100}))
    started = time.monotonic()
    seconds = go_on(tmp_path, slide, model)["seconds"]
    assert 1100 <= seconds <= 1100 + time.monotonic() - started + 1


def test_tiles_of_earlier_sessions_are_not_speed(tmp_path: Path) -> None:
    slide, model = half_done(tmp_path)
    plan = make_plan(model, slide, whole_slide(slide), block=160)  # type: ignore[arg-type]
    worker = Worker(
        tmp_path / "work", plan, slide, whole_slide(slide), model, None, 4, 1, "fp32"  # type: ignore[arg-type]
    )  # fmt: skip
    done = sum(
        json.loads(file.read_text())["tiles"]
        for file in (tmp_path / "work" / "predicted").iterdir()
    )
    assert done > 0
    name = wholeslide._short("TCGA-A2-A0CM-01Z-00-DX1.AC4901DE-4B6D-4185-BB9F-156033839828")
    text = io.StringIO()
    form = wholeslide._BAR
    with tqdm(total=44_444, file=text, ncols=80, desc=name, bar_format=form) as bar:
        # as if the bar had been there for a minute before the work began
        bar.start_t -= 60
        bar.last_print_t -= 60
        show = wholeslide._show(bar, worker)
        assert bar.n == done
        time.sleep(0.2)
        show(10, 1, 1_234_567)
        facts = bar.format_dict
        rate = (facts["n"] - facts["initial"]) / facts["elapsed"]
        assert 5 < rate <= 50
        bar.refresh()
        line = text.getvalue().split("\r")[-1]
    assert len(line) <= 80
    # 80 px are kept of a tile of 96
    found = re.fullmatch(
        r"TCGA-A2-…3839828   0%\|.+\| (\d+)/44444 \[00:00<([\d:]+), 1.23M cells, (\S+) Mpx/s\]",
        line.strip(),
    )
    assert found, line
    assert int(found[1]) == done + 10
    assert 0 < float(found[3]) <= 10 * 80**2 / 1e6 / 0.2
    hours, minutes, seconds = (int(part) for part in f"0:{found[2]}".split(":")[-3:])
    left = 3600 * hours + 60 * minutes + seconds
    assert left >= (44_444 - done - 10) / 50 - 1


def test_maps_are_kept_even_if_it_ends_at_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, model = made_slide(made_labels(200, 300)), PixelModel()
    go_on(tmp_path / "straight", slide, model, keep_maps=True)

    def stops(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(wholeslide, "_tidy", stops)
        with pytest.raises(Stop):
            go_on(tmp_path / "out", slide, model, keep_maps=True)
    facts = go_on(tmp_path / "out", slide, model, keep_maps=True)
    assert facts["cells"] > 0
    assert not (tmp_path / "out" / "work").exists()
    maps, same = (
        zarr.open_group(tmp_path / each / "maps.zarr", mode="r") for each in ("out", "straight")
    )
    assert same["nucleus"][:].any()
    for name in ("phenotype", "nucleus", "hv"):
        assert np.array_equal(maps[name][:], same[name][:])
    # who does not want them is not refused
    assert go_on(tmp_path / "out", slide, model) == facts


def test_maps_that_were_dropped_are_not_taken_for_kept(tmp_path: Path) -> None:
    slide, model = half_done(tmp_path)
    with pytest.raises(ConfigError, match="begun with other settings"):
        go_on(tmp_path, slide, model, keep_maps=True)
    go_on(tmp_path, slide, model)
    with pytest.raises(ConfigError, match="begun with other settings"):
        go_on(tmp_path, slide, model, keep_maps=True)


def test_half_removed_work_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it removes what --overwrite replaces."""
    slide, model = half_done(tmp_path)

    def stops(*_: Any, **__: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(results.shutil, "rmtree", lambda path, ignore_errors=False: (
            None if ignore_errors else stops()
        ))  # fmt: skip
        with pytest.raises(Stop):
            go_on(tmp_path, slide, model, overwrite=True)
    model.seen = 0
    go_on(tmp_path, slide, model)
    plan = make_plan(model, slide, whole_slide(slide), block=160)  # type: ignore[arg-type]
    assert model.seen == int(plan.run.sum())
    assert names(tmp_path) == OF_ONE_SLIDE


class Folder(ArraySource):
    """A slide that is no file, of which only the pixels are known."""


def test_another_store_at_the_same_place_is_noticed(tmp_path: Path) -> None:
    first, second = made_labels(300, 400, seed=1), made_labels(300, 400, seed=2)
    go_on(tmp_path, Slide(Folder(made_pixels(first))), PixelModel())
    go_on(tmp_path, Slide(Folder(made_pixels(first))), PixelModel())
    with pytest.raises(ConfigError, match="begun with another slide"):
        go_on(tmp_path, Slide(Folder(made_pixels(second))), PixelModel())


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_interrupt_in_this_process_says_how_to_go_on(
    more: tuple[str, ...],
    slides: Path,
    tmp_path: Path,
    infer: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wholeslide, "run_blocks", interrupted)
        outcome = infer(slides, "-o", tmp_path / "out", *more)
    without = " without --overwrite" if more else ""
    assert outcome == (
        130,
        "",
        f"\ncelltyper: stopped; the same command{without} goes on where it was\n",
    )
    assert infer(slides, "-o", tmp_path / "out").code == 0


@pytest.mark.slow
def test_interrupt_of_a_process_ends_it_within_seconds(
    trained: Path, finished: Path, tmp_path: Path, slides: Path
) -> None:
    image = np.tile(pixels(), (5, 5, 1))
    slide, out = tmp_path / "large.tif", tmp_path / "out"
    tifffile.imwrite(
        slide, image, tile=(256, 256), photometric="rgb", compression="deflate",
        resolution=(2e4, 2e4), resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip
    command = [sys.executable, "-m", "celltyper", "infer", str(slide), "-m", str(trained)]
    command += ["-o", str(out), "--device", "cpu", "--block", "256", "--batch-size", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("work/cells/*.parquet")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    assert process.stderr is not None
    # a terminal shows ^C on the line before
    said = process.stderr.readline() + process.stderr.readline()
    assert said == "\ncelltyper: stopped; the same command goes on where it was\n"
    assert time.monotonic() - sent < 5
    # Python then takes itself apart: two seconds, more on a busy machine
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130
    assert not (out / "slide.json").exists()
    kept = stamps(out / "work" / "predicted")
    assert kept
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("large: ")
    assert names(out) == OF_ONE_SLIDE | {"infer.json"}
