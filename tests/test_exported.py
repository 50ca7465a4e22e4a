"""Exported models and that of the box run without torch, and find what the model in torch finds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from celltyper import evaluate, exported, infer, load_model, open_dataset, predict_image
from celltyper.cells.colors import colors_of
from celltyper.config import Config
from celltyper.domain import fit_domain, packed_domain, unpacked_domain
from celltyper.encoders.trainability import parameter_digest
from celltyper.errors import CheckpointError, ConfigError
from celltyper.exported import EXPORTED_FILE, ExportedModel, exported_for, may_have_gpu
from celltyper.exporting import export_model, read_facts
from celltyper.inference import read_predictions
from celltyper.library.shelf import box_folder
from celltyper.made import made_sample
from celltyper.models import CellTyper
from celltyper.symmetries import turn, turn_back
from celltyper.training import train
from celltyper.types import Sample

Tiny = Callable[..., Config]
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tiny: Tiny, made_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny(made_data, "train.steps=30", "infer.symmetries=2")
    return train(config, tmp_path_factory.mktemp("exported") / "run", device="cpu", progress=False)


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    return export_model(run, run / EXPORTED_FILE).path


@pytest.fixture(scope="module")
def known(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CellTyper, Path]:
    """A model that knows its training images, and its file."""
    model = load_model(run)
    rng = np.random.default_rng(0)
    width = model.encoder.channels[-1]
    model.domain = fit_domain(rng.normal(size=(120, width)), rng.normal(size=(40, width)), "made")
    path = tmp_path_factory.mktemp("known") / "known.onnx"
    return model, export_model(model, path).path


@pytest.fixture(scope="module")
def box() -> tuple[CellTyper, ExportedModel]:
    folder = box_folder() / "nuclei"
    return load_model(folder), ExportedModel(folder / EXPORTED_FILE)


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Several tiles, and many cells."""
    return made_sample(3, "sample", size=512, cells=300)


@pytest.fixture(scope="module")
def image(made_data: Path) -> NDArray[np.uint8]:
    return next(iter(open_dataset(made_data / "test"))).image


def test_infer_finds_the_same_cells_with_the_file(
    run: Path, file: Path, made_data: Path, tmp_path: Path
) -> None:
    images = made_data / "val" / "images"
    for model, name in ((run, "torch"), (file, "onnx")):
        infer([images], model, tmp_path / name, mpp=0.5, device="cpu", progress=False)
    for a, b in zip(*(read_predictions(tmp_path / n) for n in ("torch", "onnx")), strict=True):
        assert len(a)
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.phenotypes, b.phenotypes)
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1.01 / 255)
    facts = json.loads((tmp_path / "onnx" / "infer.json").read_text())
    assert (facts["precision"], facts["symmetries"], facts["device"]) == ("fp32", 2, "cpu")


@pytest.mark.parametrize("symmetries", [1, 2, 4, 8])
def test_symmetries_are_those_of_torch(
    symmetries: int, run: Path, file: Path, image: NDArray[np.uint8]
) -> None:
    found, expected = (
        predict_image(model, image, 0.5, symmetries=symmetries)
        for model in (ExportedModel(file), load_model(run))
    )
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-4)
    np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.parametrize("which", range(8))
def test_turns_are_those_of_torch(which: int) -> None:
    maps = np.random.default_rng(which).normal(size=(2, 4, 5, 7)).astype(np.float32)
    tensor = torch.from_numpy(maps)
    np.testing.assert_array_equal(exported._turned(maps, which), turn(tensor, which))
    for vector in (False, True):
        np.testing.assert_array_equal(
            exported._turned_back(maps, which, vector=vector),
            turn_back(tensor, which, vector=vector),
        )


def test_the_distance_from_the_training_images_is_that_of_torch(
    known: tuple[CellTyper, Path], image: NDArray[np.uint8]
) -> None:
    model, path = known
    expected = predict_image(model, image, 0.5).distance
    found = predict_image(ExportedModel(path), image, 0.5).distance
    assert expected is not None
    assert found is not None
    assert found.value == pytest.approx(expected.value, rel=1e-3)
    assert found.quantile == expected.quantile
    # a sequence of outputs that begins with the maps, as docs/export.md says
    outputs = [output.name for output in onnx.load(path).graph.output]
    assert outputs == [*read_facts(path)["maps"], "embedding"]


def test_a_domain_survives_being_text(known: tuple[CellTyper, Path]) -> None:
    own = known[0].domain
    assert own is not None
    back = unpacked_domain(json.loads(json.dumps(packed_domain(own))))
    assert back is not None
    assert back.facts() == own.facts()
    for name, array in own.tensors().items():
        np.testing.assert_array_equal(back.tensors()[name], array)
        assert back.tensors()[name].dtype == array.dtype
    assert unpacked_domain(packed_domain(None)) is None


def test_the_graph_of_the_box_is_of_its_weights(box: tuple[CellTyper, ExportedModel]) -> None:
    """It was made of the file that lies beside it: tools/box_graph.py after every training."""
    facts = read_facts(box[1].path)
    assert facts["digests"] == parameter_digest(load_model(box_folder() / "nuclei", merge=False))
    assert (box[1].tile, box[1].overlap) == (box[0].tile, box[0].overlap)
    assert (box[1].classes, box[1].mpp) == (box[0].classes, box[0].mpp)
    assert colors_of(box[1]) == colors_of(box[0])
    assert box[1].instances == box[0].instances


def test_the_box_in_int8_finds_what_it_finds_in_fp32(
    box: tuple[CellTyper, ExportedModel], sample: Sample
) -> None:
    expected = predict_image(box[0], sample.image, sample.mpp, precision="fp32")
    found = predict_image(box[1], sample.image, sample.mpp)
    assert len(expected) > 20
    scores = evaluate([found], [Sample(
        sample.image, expected.labels, expected.phenotypes, found.name, mpp=sample.mpp
    )]).scores  # fmt: skip
    assert scores["detection_f1"].value > 0.97
    assert scores["bpq"].value > 0.93
    assert np.abs(found.probabilities - expected.probabilities).mean() < 0.005
    assert found.distance is not None
    assert expected.distance is not None
    assert found.distance.value == pytest.approx(expected.distance.value, rel=0.02)


def test_in_int8_a_tile_does_not_depend_on_the_others(
    box: tuple[CellTyper, ExportedModel], sample: Sample
) -> None:
    one, many = (
        predict_image(box[1], sample.image, sample.mpp, batch_size=size) for size in (1, 5)
    )
    np.testing.assert_array_equal(one.probabilities, many.probabilities)
    np.testing.assert_array_equal(one.labels, many.labels)


def test_what_is_not_needed_is_not_loaded_for_the_box(made_data: Path, tmp_path: Path) -> None:
    image = str(made_data / "test" / "images")
    code = (
        "import sys; from celltyper.__main__ import cli; "
        f"cli(['infer', {image!r}, '-o', {str(tmp_path / 'out')!r}, '--device', 'cpu'],"
        " standalone_mode=False); slow = {'torch', 'scipy.ndimage', 'skimage.morphology'};"
        " assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    facts = json.loads((tmp_path / "out" / "infer.json").read_text())
    assert (facts["device"], facts["precision"]) == ("cpu", "int8")


@pytest.mark.parametrize("threads", [1, 2, 19])
def test_tiles_are_the_same_on_any_number_of_processors(file: Path, threads: int) -> None:
    model = ExportedModel(file, threads=threads)
    rng = np.random.default_rng(3)
    tiles = rng.integers(0, 256, (5, model.tile, model.tile, 3), np.uint8)
    together = model.predict_tiles(tiles, symmetries=2).maps
    for i, tile in enumerate(tiles):
        alone = model.predict_tiles(tile[None], symmetries=2).maps
        for name, values in alone.items():
            np.testing.assert_array_equal(together[name][i], values[0])


def test_which_file_stands_for_a_model(
    run: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = box_folder() / "nuclei"
    monkeypatch.setattr(exported, "may_have_gpu", lambda: False)
    assert exported_for(box, "auto", None) == box / EXPORTED_FILE
    assert exported_for(box, "cuda", None) is None
    assert exported_for(box, "cpu", "fp32") is None
    # a run may have been trained on since
    assert exported_for(run, "auto", None) is None
    assert exported_for(file, "auto", None) == file
    with pytest.raises(ConfigError, match="computes on the CPU"):
        exported_for(file, "cuda", None)
    monkeypatch.setattr(exported, "may_have_gpu", lambda: True)
    assert exported_for(box, "auto", None) is None
    assert exported_for(box, "cpu", None) == box / EXPORTED_FILE


def test_a_gpu_is_seen_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not may_have_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "exists", lambda self: self == Path("/dev/nvidia0"))
    assert may_have_gpu()
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert not may_have_gpu()


def test_bad_input(
    run: Path, file: Path, made_data: Path, tmp_path: Path, celltyper_command: Command
) -> None:
    model = ExportedModel(file)
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ConfigError, match=f"takes tiles of {model.tile} px"):
        predict_image(model, image, 0.5, tile=model.tile + 32)
    with pytest.raises(ConfigError, match="computes in fp32, not in bf16"):
        predict_image(model, image, 0.5, precision="bf16")
    half = tmp_path / "half.onnx"
    half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"half\.onnx cannot be loaded"):
        ExportedModel(half)
    with pytest.raises(CheckpointError, match=r"none\.onnx cannot be loaded"):
        ExportedModel(tmp_path / "none.onnx")
    # the graph of the box without its weights
    lone = tmp_path / EXPORTED_FILE
    lone.write_bytes((box_folder() / "nuclei" / EXPORTED_FILE).read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.onnx cannot be loaded.*model\.safetensors"):
        ExportedModel(lone)
    other = onnx.load(file)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(CheckpointError, match="not written by 'celltyper export'"):
        ExportedModel(tmp_path / "other.onnx")
    with pytest.raises(CheckpointError, match=r"is an exported model, .* give the run"):
        load_model(file)
    images = made_data / "val" / "images"
    out = tmp_path / "out"
    for words, message in (
        (("--precision", "bf16"), "computes in fp32: leave out --precision"),
        (("--weights", run), "holds the whole model: leave out --weights"),
        (("--device", "cuda"), "computes on the CPU"),
    ):
        words = ("infer", images, "-m", file, "-o", out, "--mpp", 0.5, *words)
        done = celltyper_command(*words)
        assert (done.code, message in done.err) == (2, True), done.err
        assert not out.exists()
