"""Whole slides: the same cells however the work is cut, stopped and shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from made_slides import (
    MIDDLE,
    ArraySource,
    PixelModel,
    made_labels,
    made_pixels,
    made_slide,
)

from celltyper.cells.table import cells_table
from celltyper.errors import ConfigError, DataError
from celltyper.predict import predict_image
from celltyper.slides import Slide, open_slide, region_mask, tissue_mask, whole_slide
from celltyper.tiling import Region
from celltyper.wholeslide import infer_slide, make_plan

HEIGHT, WIDTH = 500, 730


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return made_labels(HEIGHT, WIDTH)


def run(slide: Slide, out: Path, model: Any = None, **options: Any) -> dict[str, Any]:
    options.setdefault("tissue", whole_slide(slide))
    options.setdefault("block", 160)
    return infer_slide(model or PixelModel(), slide, out, progress=False, **options)


def check_same(path: Path, expected: pa.Table) -> None:
    """The same cells, ids apart, in any order: all columns to the last bit but probabilities.

    These are kept in 255ths, and the division rounds.
    """
    found = pq.read_table(path)
    assert len(found) == len(expected)
    found, expected = (
        t.take(np.lexsort((t["x"].to_numpy(), t["y"].to_numpy()))) for t in (found, expected)
    )
    assert found.column_names == expected.column_names
    for name in found.column_names[1:]:
        if name.startswith("p_") or name == "probability":
            assert np.allclose(found[name].to_numpy(), expected[name].to_numpy(), atol=1e-6)
        else:
            assert found[name].to_pylist() == expected[name].to_pylist(), name


def whole(labels: np.ndarray) -> pa.Table:
    """Cells of the slide as one image in memory, by a path that knows no blocks."""
    from celltyper.cells.morphology import measure

    pixels = made_pixels(labels)
    found = predict_image(PixelModel(), pixels, 0.25)  # type: ignore[arg-type]
    return cells_table(found, measured=measure(found.labels, pixels, 0.25))


def test_cells_are_those_of_the_whole_slide_at_once(labels: np.ndarray, tmp_path: Path) -> None:
    facts = run(made_slide(labels), tmp_path)
    assert facts["cells"] > 300
    check_same(tmp_path / "cells.parquet", whole(labels))
    ids = pq.read_table(tmp_path / "cells.parquet")["cell_id"].to_pylist()
    assert ids == list(range(1, facts["cells"] + 1))
    assert not (tmp_path / "work").exists()


def test_maps_are_those_of_the_pixels(labels: np.ndarray, tmp_path: Path) -> None:
    run(made_slide(labels), tmp_path, keep_maps=True)
    maps = zarr.open_group(tmp_path / "maps.zarr", mode="r")
    pixels = made_pixels(labels).transpose(2, 0, 1).astype(np.float32)
    assert np.array_equal(maps["nucleus"][0], np.where(pixels[0] < 150, 255, 0))
    assert np.array_equal(maps["hv"][:], ((pixels[1:] - MIDDLE) / MIDDLE).astype(np.float16))


@pytest.mark.parametrize(
    "options",
    [
        {"block": 80},
        {"block": 10_000},
        {"batch_size": 1},
        {"batch_size": 64},
        {"tile": 64, "overlap": 8},
        {"tile": 777, "overlap": 0},
    ],
    ids=str,
)
def test_cells_do_not_depend_on_how_the_work_is_cut(
    options: dict[str, int], labels: np.ndarray, tmp_path: Path
) -> None:
    run(made_slide(labels), tmp_path, **options)
    check_same(tmp_path / "cells.parquet", whole(labels))


def test_cells_of_a_real_slide_do_not_depend_on_how_the_work_is_cut(
    real_data: Path, tmp_path: Path
) -> None:
    part = Region(900, 900, 300, 400)
    # what is dark is a nucleus to this model, and color its coordinates: worse than any network
    found = []
    for i, options in enumerate(({"block": 10_000}, {"block": 150, "batch_size": 1})):
        with open_slide(real_data / "slides" / "cmu-1-small-region.svs") as slide:
            model = PixelModel()
            model.mpp = 0.4
            tissue = region_mask(part, slide)
            facts = run(slide, tmp_path / str(i), model, tissue=tissue, **options)
            assert facts["cells"] > 100
        found.append(pq.read_table(tmp_path / str(i) / "cells.parquet"))
    check_same(tmp_path / "0" / "cells.parquet", found[1])


class Killed(BaseException):
    pass


class Mortal(PixelModel):
    """Fails after some tiles, like a process that is killed."""

    lives = 10**9

    def forward(self, images: torch.Tensor, features: Any = None) -> dict[str, torch.Tensor]:
        if self.seen >= self.lives:
            raise Killed
        return super().forward(images, features)


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(labels: np.ndarray, tmp_path: Path) -> None:
    slide = made_slide(labels)
    run(slide, tmp_path / "straight")
    model = Mortal()
    plan = make_plan(model, slide, whole_slide(slide), block=160)  # type: ignore[arg-type]
    starts = 0
    while True:
        model.lives = model.seen + 17
        starts += 1
        try:
            run(slide, tmp_path / "often", model)
            break
        except Killed:
            assert not (tmp_path / "often" / "cells.parquet").exists()
    assert starts > 3
    # at most the two blocks in work are done again
    largest = max(len(plan.tiles(block)) for block in plan.blocks)
    assert model.seen <= plan.run.sum() + 2 * largest * starts
    for name in ("cells.parquet", "cells.geojson"):
        straight = (tmp_path / "straight" / name).read_bytes()
        assert (tmp_path / "often" / name).read_bytes() == straight


def test_finished_blocks_are_not_done_again(labels: np.ndarray, tmp_path: Path) -> None:
    slide, model = made_slide(labels), Mortal()
    model.lives = 40
    with pytest.raises(Killed):
        run(slide, tmp_path, model)
    done = sorted((tmp_path / "work" / "predicted").iterdir())
    plan = make_plan(model, slide, whole_slide(slide), block=160)  # type: ignore[arg-type]
    kept = sum(json.loads(file.read_text())["tiles"] for file in done)
    assert kept > 0
    # what a process leaves that is killed while it writes a file
    done[0].with_name(f".0123456789ab.tmp.{done[0].name}").touch()
    model.lives, before = 10**9, model.seen
    run(slide, tmp_path, model)
    assert model.seen - before == int(plan.run.sum()) - kept


def test_killed_at_the_very_beginning(labels: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".0123456789ab.tmp.plan.json").touch()
    assert run(made_slide(labels), tmp_path)["cells"] > 0
    assert not (tmp_path / "work").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_slides.py")
    command = [sys.executable, str(script), str(tmp_path / "killed"), "5"]
    kills = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    assert int(kills) >= 3  # it may be done before the fifth
    run(made_slide(made_labels(420, 610)), tmp_path / "straight")
    for name in ("cells.parquet", "cells.geojson"):
        straight, killed = (tmp_path / each / name for each in ("straight", "killed"))
        assert killed.read_bytes() == straight.read_bytes()
    assert not list((tmp_path / "killed").glob("*.tmp*"))


def test_another_model_slide_or_setting_is_refused(labels: np.ndarray, tmp_path: Path) -> None:
    slide, model = made_slide(labels), Mortal()
    model.lives = 30
    with pytest.raises(Killed):
        run(slide, tmp_path, model)
    model.lives = 10**9
    with pytest.raises(ConfigError, match=r"begun with other settings; .*--overwrite"):
        run(slide, tmp_path, model, tile=64)
    with pytest.raises(ConfigError, match="begun with other settings"):
        run(slide, tmp_path, model, tissue=region_mask(Region(0, 0, 200, 200), slide))
    with pytest.raises(ConfigError, match="begun with another slide"):
        run(made_slide(made_labels(HEIGHT, WIDTH - 1)), tmp_path, model, block=10_000, tile=777)
    with torch.no_grad():
        model.scale.fill_(2)
    with pytest.raises(ConfigError, match="begun with another model; "):
        run(slide, tmp_path, model)
    assert (tmp_path / "work").is_dir()
    run(slide, tmp_path, model, overwrite=True)
    check_same(tmp_path / "cells.parquet", whole(labels))


def test_what_is_done_is_left_as_it_is(labels: np.ndarray, tmp_path: Path) -> None:
    slide, model = made_slide(labels), PixelModel()
    facts = run(slide, tmp_path, model)
    stamp, seen = (tmp_path / "cells.parquet").stat().st_mtime_ns, model.seen
    assert run(slide, tmp_path, model) == facts
    assert (tmp_path / "cells.parquet").stat().st_mtime_ns == stamp
    assert model.seen == seen
    with pytest.raises(ConfigError, match="other settings"):
        run(slide, tmp_path, model, tile=64)


def test_two_at_work_in_one_folder_are_refused(labels: np.ndarray, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another process"):
        run(made_slide(labels), tmp_path)


def test_region_gives_the_cells_in_it(labels: np.ndarray, tmp_path: Path) -> None:
    slide = made_slide(labels)
    part = Region(130, 210, 201, 300)
    facts = run(slide, tmp_path, tissue=region_mask(part, slide))
    assert facts["tiles"] < make_plan(PixelModel(), slide, whole_slide(slide)).run.sum()  # type: ignore[arg-type]
    table = whole(labels)
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    inside = (x >= 210) & (x <= 510) & (y >= 130) & (y <= 331)
    assert 0 < inside.sum() < len(x)
    check_same(tmp_path / "cells.parquet", table.filter(inside))


class TwoLevels(ArraySource):
    """Every stored pixel of the second level is four of the first."""

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__(pixels, mpp=(0.125, 0.125))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        height, width = self.pixels.shape[:2]
        return (2 * width, 2 * height), (width, height)

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        return (self.side, self.side), (self.side, self.side)

    @property
    def bounds(self) -> Region:
        return Region(0, 0, *(2 * n for n in self.pixels.shape[:2]))

    def tile(self, level: int, row: int, col: int) -> Any:
        own = self.pixels
        if level == 0:
            self.pixels = np.repeat(np.repeat(own, 2, axis=0), 2, axis=1)
        try:
            cut = self.pixels[
                row * self.side : (row + 1) * self.side, col * self.side : (col + 1) * self.side
            ]
        finally:
            self.pixels = own
        from celltyper.slides.source import Tile

        return Tile(cut)


def test_positions_are_those_of_the_full_resolution(labels: np.ndarray, tmp_path: Path) -> None:
    import shapely

    slide = Slide(TwoLevels(made_pixels(labels)))
    facts = run(slide, tmp_path)
    assert (facts["width"], facts["height"]) == (2 * WIDTH, 2 * HEIGHT)
    table, same = pq.read_table(tmp_path / "cells.parquet"), whole(labels)
    order = [np.lexsort((t["x"].to_numpy(), t["y"].to_numpy())) for t in (table, same)]
    table, same = table.take(order[0]), same.take(order[1])
    for name in ("x", "y"):
        assert np.array_equal(table[name].to_numpy(), 2 * same[name].to_numpy())
    assert table["area_um2"].equals(same["area_um2"])
    assert np.array_equal(table["area_px"].to_numpy(), 4 * same["area_px"].to_numpy())
    doubled = shapely.transform(shapely.from_wkb(same["outline"].to_numpy()), lambda p: 2 * p)
    assert shapely.equals(shapely.from_wkb(table["outline"].to_numpy()), doubled).all()
    feature = json.loads((tmp_path / "cells.geojson").read_text())["features"][0]
    assert shapely.geometry.shape(feature["geometry"]).area > 0


def test_damaged_tiles_are_background_and_told(labels: np.ndarray, tmp_path: Path) -> None:
    slide = made_slide(labels, broken=frozenset({(1, 2)}))
    facts = run(slide, tmp_path)
    assert facts["damaged"] == [[200, 400, 200, 200]]
    assert any("1 damaged tile" in warning for warning in facts["warnings"])
    table = pq.read_table(tmp_path / "cells.parquet")
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    assert not ((x > 420) & (x < 580) & (y > 220) & (y < 380)).any()
    assert 250 < len(table) < len(whole(labels))
    strict = made_slide(labels, broken=frozenset({(1, 2)}))
    strict.strict = True
    with pytest.raises(DataError, match="damaged tile at x 400, y 200"):
        run(strict, tmp_path / "strict")


def test_slide_without_tissue(tmp_path: Path) -> None:
    slide = Slide(ArraySource(np.full((700, 900, 3), 255, np.uint8)))
    facts = run(slide, tmp_path, tissue=tissue_mask(slide))
    assert facts["cells"] == 0
    assert facts["tiles"] == 0
    assert any("no tissue" in warning for warning in facts["warnings"])
    assert pq.read_table(tmp_path / "cells.parquet").num_rows == 0
    assert json.loads((tmp_path / "cells.geojson").read_text())["features"] == []
    assert "no tissue" in (tmp_path / "report.html").read_text()


def test_slide_without_resolution(labels: np.ndarray, tmp_path: Path) -> None:
    slide = made_slide(labels, mpp=None)
    with pytest.raises(DataError, match="--mpp"):
        run(slide, tmp_path)
    assert not list(tmp_path.iterdir())
    model = PixelModel()
    model.mpp = None
    run(slide, tmp_path, model)
    table = pq.read_table(tmp_path / "cells.parquet")
    assert table["area_um2"].null_count == len(table) > 300


def test_full_disk_is_one_line_and_loses_nothing(
    labels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import zarr.storage._local as local

    from celltyper.errors import RunError

    put, left = local._put, [30]

    def full(*arguments: Any, **options: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(*arguments, **options)

    monkeypatch.setattr(local, "_put", full)
    with pytest.raises(RunError, match="free space and give the same command again"):
        run(made_slide(labels), tmp_path)
    monkeypatch.undo()
    run(made_slide(labels), tmp_path)
    check_same(tmp_path / "cells.parquet", whole(labels))
