"""The README's commands and code run as written."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile

from celltyper.__main__ import cli, main
from celltyper.checkpoints import load_model
from celltyper.config import Config
from celltyper.training import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = (
    "--set encoder.weights=twin --set train.steps=2 --set train.batch_size=2 --set train.warmup=1 "
    "--set data.tile=56 --set infer.tile=56 --set infer.overlap=14"
)


DENSE, _, AFTER = README.partition("## Whole slides")
SLIDES, _, PATCHES = AFTER.partition("## Patches")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str = README) -> list[list[str]]:
    """Words of every ``celltyper X ...`` line."""
    lines = "".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w[:1] == ["celltyper"]]


@pytest.fixture
def workplace(made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the README takes for granted: DATA, image.png."""
    shutil.copytree(made_data, tmp_path / "DATA")
    image = np.full((60, 80, 3), 220, np.uint8)
    PIL.Image.fromarray(image).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_run(workplace: Path) -> None:
    assert [c[1] for c in commands(DENSE)] == ["train", "train", "infer", "eval", "eval"]
    shutil.rmtree(workplace / "DATA" / "val")
    for command in commands(DENSE):
        extra = shlex.split(TINY) if command[1] == "train" else []
        if "--pred" in command:
            shutil.rmtree(workplace / "out")
            main_exits(["infer", "DATA/test", "-m", "run", "-o", "out", "--mpp", "0.5"])
        main_exits([*command[1:], *extra])
    assert (workplace / "out" / "report.html").is_file()
    assert (workplace / "run" / "eval" / "report.html").is_file()


def test_commands_of_slides_run(workplace: Path, tiny: Callable[..., Config]) -> None:
    assert [c[1] for c in commands(SLIDES)] == ["infer", "infer", "export"]
    train(tiny(workplace / "DATA"), workplace / "run", device="cpu", progress=False)
    slide = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    options = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER", "tile": (64, 64)}
    with tifffile.TiffWriter(workplace / "slide.tif") as tiff:
        tiff.write(slide, subifds=1, **options)
        tiff.write(slide[::2, ::2], subfiletype=1, **options)
    (workplace / "slides.csv").write_text("slide,name\nslide.tif,one\nslide.tif,two\n")
    for command in commands(SLIDES):
        main_exits(command[1:])
    assert (workplace / "slide" / "report.html").is_file()
    for name in ("one", "two"):
        assert (workplace / "cohort" / name / "cells.spatialdata.zarr").is_dir()
    assert (workplace / "cohort" / "cells.h5ad").is_file()


def test_commands_of_patches_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [c[1] for c in commands(PATCHES)] == ["train", "eval", "infer"]
    rng = np.random.default_rng(0)
    for folder in ("PATCHES", "OTHER_PATCHES"):
        for i in range(12):
            place = tmp_path / folder / ("Atypical", "Normal")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.normal((100, 180)[i % 2], 30, (64, 64, 3)).clip(0, 255)
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(place / f"{folder}{i}.png")
        (tmp_path / folder / "meta.json").write_text('{"mpp": 0.25}')
    slide = rng.integers(0, 255, (200, 300, 3), dtype=np.uint8)
    per_cm = (1e4 / 0.25, 1e4 / 0.25)
    tifffile.imwrite(tmp_path / "slide.tif", slide, resolution=per_cm, resolutionunit="CENTIMETER")
    (tmp_path / "mitoses.csv").write_text("x,y\n100,80\n250,20\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CELLTYPER_CACHE", str(tmp_path / "cache"))
    for command in commands(PATCHES):
        extra = ["--set", "encoder.weights=twin"] if command[1] == "train" else []
        main_exits([*command[1:], *extra])
    assert (tmp_path / "run" / "eval" / "report.html").is_file()
    assert (tmp_path / "out" / "patches.geojson").is_file()


def main_exits(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0, arguments


def test_python_blocks_run_one_after_the_other(
    workplace: Path, tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(workplace / "DATA"), workplace / "run", device="cpu", progress=False)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("Estimate(value=")
    assert load_model(workplace / "run").classes == ("blue", "brown")


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_mentioned_options_exist() -> None:
    for command in commands():
        known = {o for p in cli.commands[command[1]].params for o in p.opts} | {"-h", "--help"}
        shown = {word.split("=")[0] for word in command[2:] if re.match("--?[a-z]", word)}
        assert shown <= known, command
