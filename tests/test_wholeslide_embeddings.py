"""Embeddings of cells: the encoder's last feature map at their centroids, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import zarr
from made_results import made_cells, noise, write_results
from made_slides import PixelModel, made_labels, made_slide
from scipy.ndimage import map_coordinates
from torch import Tensor, nn

from celltyper.cells.geojson import write_geojson
from celltyper.cells.stream import CellsWriter, iter_cells, write_csv
from celltyper.cells.table import (
    add_embeddings,
    concat_cells,
    embeddings_of,
    read_cells,
    write_parquet,
)
from celltyper.domain import Domain
from celltyper.encoders import load_encoder
from celltyper.encoders.adapt import freeze
from celltyper.errors import ConfigError, DataError
from celltyper.formats import export_cells
from celltyper.models import CellTyper, Ensemble
from celltyper.slides import Slide, region_mask, whole_slide
from celltyper.tiling import Region
from celltyper.wholeslide import infer_slide, make_plan
from celltyper.wholeslide.embeddings import FeatureGrid
from celltyper.wholeslide.maps import MapStore

HEIGHT, WIDTH = 300, 410
TILE, OVERLAP = 96, 16
STEP, MARGIN = 80, 8
CLOSE = 1.5e-3
"""Two roundings of values up to 1 to float16, of at most 2**-12 each, and some room."""


class MeanColor(nn.Module):
    """Mean red, green and blue of every square, and before that a map that nothing may use."""

    def __init__(self, patch: int = 8, strides: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.channels, self.patch_size = [5, 3], patch
        if strides is not None:
            self.strides = list(strides)
        self.seen = 0

    def forward(self, images: Tensor) -> list[Tensor]:
        self.seen += len(images)
        p = self.patch_size
        bottom, right = -images.shape[2] % p, -images.shape[3] % p
        images = F.pad(images * self.gain, (0, right, 0, bottom), mode="replicate")
        first, last = getattr(self, "strides", (p, p))
        shallow = torch.full((len(images), 5, *(n // first for n in images.shape[2:])), 7.0)
        return [shallow.to(images), F.avg_pool2d(images, last)]


class SeeingModel(PixelModel):
    """Cells of the pixels, and an encoder beside them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(TILE, OVERLAP)
        self.encoder = encoder

    def forward(self, images: Tensor, features: Any = None) -> dict[str, Tensor]:
        if features is None:
            self.encoder(images)
        return super().forward(images, features)


@pytest.fixture(scope="module")
def slide() -> Slide:
    return made_slide(made_labels(HEIGHT, WIDTH))


def run(slide: Slide, out: Path, model: Any = None, **options: Any) -> pa.Table:
    options.setdefault("tissue", whole_slide(slide))
    options.setdefault("block", 160)
    options.setdefault("embeddings", True)
    infer_slide(model or SeeingModel(MeanColor()), slide, out, progress=False, **options)
    return read_cells(out / "cells.parquet")


@pytest.fixture(scope="module")
def straight(slide: Slide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("straight")
    run(slide, out)
    return out


def tile_at(pixels: np.ndarray, row: int, col: int) -> np.ndarray:
    """What the model sees of one tile; the slide is mirrored about its edges."""
    padded = np.pad(pixels, ((MARGIN, TILE), (MARGIN, TILE), (0, 0)), mode="symmetric")
    return padded[row * STEP : row * STEP + TILE, col * STEP : col * STEP + TILE] / 255


def by_hand(table: pa.Table, pixels: np.ndarray, stride: int, scale: float = 1) -> np.ndarray:
    """Mean colors of squares of the tile of every cell, bilinear at its centroid."""
    found = []
    side = -(-TILE // stride)
    for x, y in zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True):
        x, y = x / scale, y / scale
        row, col = int(y // STEP), int(x // STEP)
        over = side * stride - TILE
        seen = np.pad(tile_at(pixels, row, col), ((0, over), (0, over), (0, 0)), mode="edge")
        means = seen.reshape(side, stride, side, stride, 3).mean(axis=(1, 3))
        at = [
            (y - row * STEP + MARGIN) / stride - 0.5,
            (x - col * STEP + MARGIN) / stride - 0.5,
        ]
        found.append(
            [
                map_coordinates(means[..., c], np.array(at)[:, None], order=1, mode="nearest")[0]
                for c in range(3)
            ]
        )
    return np.array(found)


def test_distance_of_a_slide_is_the_median_of_its_tiles(slide: Slide, tmp_path: Path) -> None:
    model = SeeingModel(MeanColor())
    # the distance of a tile is then the length of its mean color
    plain = np.eye(3, dtype=np.float32)
    axes = plain.astype(np.float16)
    model.domain = Domain(np.zeros(3, np.float32), axes, plain, 0.5, 100, "validation")
    run(slide, tmp_path, model, embeddings=False)
    pixels, tiles = pixels_of(slide), [(row, col) for row in range(4) for col in range(6)]
    assert model.encoder.seen == len(tiles)
    wanted = [np.linalg.norm(tile_at(pixels, *at).mean(axis=(0, 1))) for at in tiles]
    facts = json.loads((tmp_path / "slide.json").read_text())
    assert facts["domain"] == {"value": pytest.approx(np.median(wanted), abs=2e-3), "quantile": 0.5}
    (warning,) = facts["warnings"]
    assert warning.startswith("Unlike the training images: distance 1.")
    assert warning in (tmp_path / "report.html").read_text()


def pixels_of(slide: Slide, mpp: float = 0.25) -> np.ndarray:
    grid = slide.grid(mpp)
    return slide.read(Region(0, 0, grid.height, grid.width), mpp)


@pytest.mark.parametrize(
    ("encoder", "stride"),
    [
        (MeanColor(20), 20),  # reaches past the border of the tile
        (MeanColor(16, (4, 8)), 8),
        (MeanColor(96), 96),  # one pixel for the whole tile
    ],
    ids=["beyond the tile", "pyramid", "one"],
)
def test_features_at_the_centroid(
    encoder: MeanColor, stride: int, slide: Slide, tmp_path: Path
) -> None:
    table = run(slide, tmp_path, SeeingModel(encoder))
    expected = by_hand(table, pixels_of(slide), stride)
    assert len(table) > 120
    assert table.schema.field("embedding").type == pa.list_(
        pa.field("element", pa.float32(), nullable=False), 3
    )
    assert np.abs(embeddings_of(table) - expected).max() < CLOSE
    # with the map a quarter of a square further on it would not be so
    if stride < TILE:
        moved = by_hand(table, np.roll(pixels_of(slide), stride // 4, axis=1), stride)
        assert np.abs(embeddings_of(table) - moved).max() > 20 * CLOSE


def test_on_a_slide_of_another_resolution(tmp_path: Path) -> None:
    fine = made_slide(made_labels(2 * HEIGHT, 2 * WIDTH, spacing=60), mpp=(0.125, 0.125))
    table = run(fine, tmp_path)
    assert len(table) > 30
    assert table["x"].to_numpy().max() > WIDTH
    expected = by_hand(table, pixels_of(fine), 8, scale=2)
    assert np.abs(embeddings_of(table) - expected).max() < CLOSE


def test_where_only_a_part_is_looked_at(slide: Slide, tmp_path: Path) -> None:
    part = region_mask(Region(90, 70, 155, 200), slide)
    table = run(slide, tmp_path, tissue=part, block=80)
    plan = make_plan(SeeingModel(MeanColor()), slide, part)  # type: ignore[arg-type]
    assert not plan.run.all()
    assert 20 < len(table) < 100
    expected = by_hand(table, pixels_of(slide), 8)
    assert np.abs(embeddings_of(table) - expected).max() < CLOSE


@pytest.mark.parametrize(
    "options", [{"block": 80, "batch_size": 64}, {"block": 10_000, "batch_size": 1}], ids=str
)
def test_not_how_the_work_is_cut(
    options: dict[str, int], straight: Path, slide: Slide, tmp_path: Path
) -> None:
    first, second = (
        t.take(np.lexsort((t["x"].to_numpy(), t["y"].to_numpy()))).drop_columns("cell_id")
        for t in (read_cells(straight / "cells.parquet"), run(slide, tmp_path, **options))
    )
    assert first.equals(second)


def test_the_encoder_runs_once(slide: Slide, tmp_path: Path) -> None:
    tiles = int(make_plan(PixelModel(), slide, whole_slide(slide)).run.sum())  # type: ignore[arg-type]
    for turns in (1, 2):
        model = SeeingModel(encoder := MeanColor())
        table = run(slide, tmp_path / str(turns), model, symmetries=turns)
        assert encoder.seen == turns * tiles
        # of the tile as it is, however often it is turned for the maps
        expected = by_hand(table, pixels_of(slide), 8)
        assert np.abs(embeddings_of(table) - expected).max() < CLOSE


@pytest.mark.parametrize(("together", "symmetries"), [(False, 4), (True, 1)])
def test_maps_are_those_without(
    together: bool, symmetries: int, slide: Slide, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    encoder = MeanColor()
    models = [
        CellTyper(freeze(encoder), "linear", ("a", "b"), mpp=0.25, tile=TILE, overlap=OVERLAP)
        for _ in range(2)
    ]
    part = region_mask(Region(0, 0, 60, 60), slide)
    options = {"symmetries": symmetries, "keep_maps": True, "tissue": part}
    model = Ensemble(models) if together else models[0]
    for embeddings in (False, True):
        run(slide, tmp_path / str(embeddings), model, embeddings=embeddings, **options)
    plain, more = (
        zarr.open_group(tmp_path / name / "maps.zarr", mode="r") for name in ("False", "True")
    )
    assert "features" not in plain
    assert more["features"].shape == (4, 6, 3, 12, 12)
    for name in plain:
        assert np.array_equal(plain[name][:], more[name][:]), name
    assert plain["phenotype"][:].std() > 0
    seen = tile_at(pixels_of(slide), 0, 1).reshape(12, 8, 12, 8, 3).mean(axis=(1, 3))
    assert np.abs(more["features"][0, 1] - seen.transpose(2, 0, 1)).max() < CLOSE
    # not looked at
    assert not more["features"][3, 5].any()


def test_encoder_of_patches(slide: Slide, tmp_path: Path) -> None:
    encoder = load_encoder("vit_tiny_patch16", weights="twin").eval()
    table = run(slide, tmp_path, SeeingModel(encoder), block=10_000)
    pixels = pixels_of(slide)
    found = embeddings_of(table)
    for x, y, embedding in list(
        zip(table["x"].to_pylist(), table["y"].to_pylist(), found, strict=True)
    )[::10]:
        row, col = int(y // STEP), int(x // STEP)
        seen = torch.from_numpy(tile_at(pixels, row, col)).float().permute(2, 0, 1)[None]
        with torch.inference_mode():
            last = encoder(seen)[-1][0].numpy()
        place = [[(y - row * STEP + 8) / 16 - 0.5], [(x - col * STEP + 8) / 16 - 0.5]]
        expected = [map_coordinates(each, place, order=1, mode="nearest")[0] for each in last]
        assert len(embedding) == len(expected) == encoder.channels[-1]
        assert np.allclose(embedding, expected, rtol=2e-3, atol=2e-3)
        assert np.std(expected) > 0.1


class Killed(BaseException):
    pass


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    straight: Path, slide: Slide, tmp_path: Path
) -> None:
    model = SeeingModel(MeanColor())
    lives = [0]

    def live(*_: Any) -> None:
        lives[0] -= 1
        if lives[0] < 0:
            raise Killed

    model.register_forward_pre_hook(live)
    starts = 0
    while not (tmp_path / "often" / "slide.json").exists():
        starts += 1
        lives[0] = 2
        try:
            run(slide, tmp_path / "often", model)
        except Killed:
            with pytest.raises(ConfigError, match="begun with other settings"):
                run(slide, tmp_path / "often", model, embeddings=False)
    assert starts > 2
    for name in ("cells.parquet", "cells.geojson"):
        assert (tmp_path / "often" / name).read_bytes() == (straight / name).read_bytes()


def test_another_wish_is_another_setting(slide: Slide, tmp_path: Path) -> None:
    assert "embedding" not in run(slide, tmp_path, embeddings=False).column_names
    with pytest.raises(ConfigError, match="begun with other settings"):
        run(slide, tmp_path)
    assert json.loads((tmp_path / "slide.json").read_text())["settings"]["embeddings"] is False


def test_slide_without_cells(tmp_path: Path) -> None:
    empty = made_slide(np.zeros((100, 100), np.int32))
    table = run(empty, tmp_path)
    assert embeddings_of(table).shape == (0, 3)


def test_models_with_different_encoders_are_refused(slide: Slide, tmp_path: Path) -> None:
    encoders = [MeanColor(), MeanColor()]
    with torch.no_grad():
        encoders[1].gain.fill_(2)
    together = Ensemble(
        [CellTyper(freeze(each), "linear", mpp=0.25, tile=TILE) for each in encoders]
    )
    with pytest.raises(ConfigError, match=r"different encoders.* leave out --embeddings"):
        run(slide, tmp_path / "out", together)
    assert not (tmp_path / "out").exists()


def test_features_too_large_are_refused(slide: Slide, tmp_path: Path) -> None:
    encoder = MeanColor()
    with torch.no_grad():
        encoder.gain.fill_(1e6)
    with pytest.raises(ConfigError, match="do not fit into float16"):
        run(slide, tmp_path, SeeingModel(encoder))


def test_features_go_with_the_maps(slide: Slide, tmp_path: Path) -> None:
    model = PixelModel(TILE, OVERLAP)
    plan = make_plan(model, slide, whole_slide(slide), block=160)  # type: ignore[arg-type]
    store = MapStore(tmp_path, plan, model.maps, FeatureGrid(2, 3, 32))
    store.create()
    rng = np.random.default_rng(0)
    written = {}
    for block in plan.blocks:
        tiles = plan.tiles(block)
        values = rng.random((len(tiles), 2, 3, 3)).astype(np.float16)
        store.write_features(block, tiles, values)
        for tile, value in zip(tiles, values, strict=True):
            written[tile.write.row // STEP, tile.write.col // STEP] = value
    assert len(written) == 4 * 6
    for row in range(4):
        assert np.array_equal(store.features(row, 1, 6), [written[row, c] for c in range(1, 6)])
    files = {f for f in (tmp_path / "features" / "c").rglob("*") if f.is_file()}
    assert len(files) == len(plan.blocks) == 6
    store.drop(plan.blocks[1])
    assert not store.features(0, 2, 4).any()
    assert np.array_equal(store.features(0, 0, 2), [written[0, c] for c in range(2)])
    assert np.array_equal(store.features(2, 2, 4), [written[2, c] for c in range(2, 4)])
    assert len({f for f in files if f.exists()}) == 5
    with pytest.raises(ConfigError, match="a map of the model is called 'features'"):
        MapStore(tmp_path, plan, {"features": model.maps["hv"]}, FeatureGrid(2, 3, 32))


def with_embeddings(n: int = 40, seed: int = 0) -> tuple[pa.Table, np.ndarray]:
    table = made_cells(noise((60, 47))).slice(0, n)
    values = np.random.default_rng(seed).standard_normal((len(table), 6)).astype(np.float32)
    return add_embeddings(table, values), values


def test_tables_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, values = with_embeddings()
    assert len(table) > 10
    write_parquet(tmp_path / "a.parquet", table)
    back = read_cells(tmp_path / "a.parquet")
    assert back.schema.equals(table.schema)
    assert np.array_equal(embeddings_of(back), values)
    assert np.array_equal(embeddings_of(back.slice(3, 4)), values[3:7])
    both = concat_cells([table, back])
    assert np.array_equal(embeddings_of(both), np.concatenate([values, values]))
    # files whose groups hold few cells, for their embeddings are long
    monkeypatch.setattr("celltyper.cells.table._EMBEDDING_BYTES", 4 * 6 * 8)
    whole = tmp_path / "whole.parquet"
    with CellsWriter(whole) as writer:
        writer.write(both)
    facts = pq.read_metadata(whole)
    assert facts.num_row_groups == -(-len(both) // 8)
    column = facts.schema.names.index("element")
    assert facts.row_group(0).column(column).path_in_schema == "embedding.list.element"
    assert "BYTE_STREAM_SPLIT" in facts.row_group(0).column(column).encodings
    with CellsWriter(tmp_path / "parts.parquet") as writer:
        for part in (both.slice(0, 5), back.slice(5), table.slice(0, 0), table):
            writer.write(part)
    assert (tmp_path / "parts.parquet").read_bytes() == whole.read_bytes()
    parts = list(iter_cells(whole, rows=7))
    assert np.array_equal(np.concatenate([embeddings_of(p) for p in parts]), embeddings_of(both))
    assert pa.concat_tables(iter_cells(whole, embeddings=False)).column_names == [
        name for name in table.column_names if name != "embedding"
    ]


def test_tables_without() -> None:
    table = made_cells(noise((60, 47)))
    with pytest.raises(DataError, match="no embeddings: run 'celltyper infer' with --embeddings"):
        embeddings_of(table)
    with pytest.raises(DataError, match=r"columns \(embedding\)"):
        concat_cells([with_embeddings()[0], table])


def test_half_precision_makes_small_files(tmp_path: Path) -> None:
    table = made_cells(noise((60, 47)))
    values = np.random.default_rng(0).standard_normal((len(table), 1000)).astype(np.float32)
    write_parquet(tmp_path / "full.parquet", add_embeddings(table, values))
    half = values.astype(np.float16).astype(np.float32)
    write_parquet(tmp_path / "half.parquet", add_embeddings(table, half))
    files = [pq.read_metadata(tmp_path / f"{name}.parquet") for name in ("half", "full")]
    column = files[0].schema.names.index("element")
    sizes = [file.row_group(0).column(column).total_compressed_size for file in files]
    # 0.75 without the encoding; 0.52 where there are more cells
    assert sizes[0] < 0.65 * sizes[1]


def test_geojson_and_csv_pass_them_over(tmp_path: Path) -> None:
    table, _ = with_embeddings()
    plain = table.drop_columns("embedding")
    for which, cells in (("with", table), ("without", plain)):
        write_geojson(tmp_path / f"{which}.geojson", cells)
        write_csv(tmp_path / f"{which}.csv", cells)
    for suffix in ("geojson", "csv"):
        found = (tmp_path / f"with.{suffix}").read_bytes()
        assert found == (tmp_path / f"without.{suffix}").read_bytes()
        assert b"embedding" not in found


def test_exports(tmp_path: Path) -> None:
    (one, first), (two, second) = with_embeddings(30), with_embeddings(20, seed=1)
    write_results(tmp_path, {"one": one, "two": two}, (60, 47))
    export_cells(tmp_path, ["anndata", "csv", "geojson"], progress=False)
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert read.obsm["X_encoder"].dtype == np.float32
    assert np.array_equal(read.obsm["X_encoder"], np.concatenate([first, second]))
    assert "embedding" not in read.obs
    assert read.obsm["spatial"].tolist() == [
        [row["x"], row["y"]] for table in (one, two) for row in table.to_pylist()
    ]
