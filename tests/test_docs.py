"""The documentation: its code runs as written, its links lead somewhere, its tables are complete.

Every page, and every part of the README, runs from top to bottom in a folder of its own that holds
made images, slides, annotations and a small trained model under the names that the pages use.
Commands and Python run in this process. Encoders are twins, training is two steps, protocols have
two folds. Blocks of ``text`` and ``console`` do not run; they are listed below with the reason.
"""

from __future__ import annotations

import csv
import functools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
import pytest
import tifffile
import timm
import yaml
from conftest import made_sample
from fenced import Block, blocks_of, commands_of, run_block
from made_leaderboard import made_leaderboard
from safetensors.torch import save_file

import celltyper
from celltyper.__main__ import cli
from celltyper.benchmark.published import read_published
from celltyper.benchmark.writing import differences_csv, leaderboard_csv
from celltyper.cells.table import cells_table, read_cells, write_parquet
from celltyper.checkpoints import load_model
from celltyper.config import load_config, parse_config
from celltyper.datasets import write_folder
from celltyper.encoders import foreign
from celltyper.labels import centroids
from celltyper.predict import predict_image
from celltyper.protocols import load_protocol
from celltyper.training import train

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FILES = {p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for p in sorted(DOCS.rglob("*.md"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def parts_of_readme() -> dict[str, str]:
    """Sections that each begin afresh."""
    dense, _, rest = README.partition("## Whole slides")
    slides, _, rest = rest.partition("## Patches")
    patches, _, python = rest.partition("## From Python")
    parts = {"": dense, " slides": slides, " patches": patches, " python": python}
    return {f"README.md{name}": text for name, text in parts.items()}


CLASSES = ("tumour", "immune")
PAGES = {**parts_of_readme(), **FILES}
RUN = ("bash", "python", "pycon", "yaml", "json", "csv")
EXAMPLES = {page for page, text in PAGES.items() if any(b.language in RUN for b in blocks_of(text))}

SMALL = (
    *("data.tile=56", "train.steps=2", "train.batch_size=2", "train.warmup=1"),
    *("train.validate_every=2", "infer.tile=112", "infer.overlap=14"),
)
"""Of training that goes by steps; the recipes of patches that the pages run fit a regression."""


def made_patches(path: Path, seed: int) -> None:
    """Windows of two classes, dark and pale, of six slides, with the votes of three experts."""
    rng = np.random.default_rng(seed)
    rows = ["file,label,slide,expert1_atypical,expert2_atypical,expert3_atypical"]
    for i in range(24):
        name = ("Atypical", "Normal")[i % 2]
        (path / name).mkdir(parents=True, exist_ok=True)
        votes = (i % 2 == 0, i % 2 == 0, i % 3 == 0)
        file, slide = f"{path.name}{i}.png", f"{path.name}-slide{i // 4}"
        rows.append(",".join([file, name, slide, *map(str, votes)]))
        pixels = rng.normal((100, 180)[i % 2], 30, (64, 64, 3)).clip(0, 255)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(path / name / file)
    (path / "meta.json").write_text('{"mpp": 0.25}')
    (path / "labels.csv").write_text("\n".join(rows))


def made_slide(path: Path, seed: int) -> None:
    """A TIFF of two levels, 0.5 micrometres per pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [made_sample(100 + 10 * seed + i, "").image for i in range(6)]
    pixels = np.concatenate([np.concatenate(fields[i : i + 3], 1) for i in (0, 3)], 0)
    options = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER", "tile": (64, 64)}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, subfiletype=0, **options)
        tiff.write(pixels[::2, ::2], subfiletype=1, **options)


def annotate(folder: Path, numbers: Iterable[int]) -> None:
    """Fields with circles around their nuclei, as QuPath exports annotations."""
    folder.mkdir()
    turn = np.linspace(0, 2 * np.pi, 17)
    for number in numbers:
        sample = made_sample(10 + number, "")
        PIL.Image.fromarray(sample.image).save(folder / f"field{number}.png")
        features = []
        for i, (row, col) in enumerate(centroids(sample.labels), start=1):
            radius = np.sqrt((sample.labels == i).sum() / np.pi)
            center = np.array([col + 0.5, row + 0.5])
            ring = center + radius * np.stack([np.cos(turn), np.sin(turn)], 1)
            kind = ("Tumor", "Lymphocyte", "Plasma cell")[sample.phenotypes[i] - 1 + (i % 5 == 0)]
            about = {"objectType": "annotation", "classification": {"name": kind}}
            shape = {"type": "Polygon", "coordinates": [ring.clip(0, 96).tolist()]}
            features.append({"type": "Feature", "geometry": shape, "properties": about})
        collection = {"type": "FeatureCollection", "features": features}
        (folder / f"field{number}.geojson").write_text(json.dumps(collection))


@pytest.fixture(scope="session")
def props(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted, under the names that they use; never written to."""
    root = tmp_path_factory.mktemp("props")
    for part, seeds in (("train", range(1, 6)), ("val", (6, 7))):
        samples = [made_sample(seed, f"{part}{seed}") for seed in seeds]
        write_folder(root / "DATA" / part, samples, CLASSES, 0.5)
    # the test part is image.png of the pages, large enough for several blocks of the bootstrap
    image = made_sample(8, "image", size=270, cells=50)
    write_folder(root / "DATA" / "test", [image], CLASSES, 0.5)
    shutil.copytree(root / "DATA", root / "demo" / "data")
    annotate(root / "my-cells", range(1, 6))
    annotate(root / "my-test", (6, 7))
    (root / "new-fields").mkdir()
    for number in (8, 9):
        pixels = made_sample(10 + number, "").image
        PIL.Image.fromarray(pixels).save(root / "new-fields" / f"field{number}.png")
    shutil.copy(root / "DATA" / "test" / "images" / "image.png", root)
    PIL.Image.fromarray(made_sample(9, "", size=340).image).save(root / "field.png")
    for name in ("slide.tif", "slide.svs", "slides/a.svs", "slides/b.svs", "archive/one/deep.svs"):
        made_slide(root / name, len(name))
    (root / "list.csv").write_text("slide,name\nslides/a.svs,first\n")
    (root / "slides.csv").write_text("slide,name\nslide.tif,one\nslide.tif,two\n")
    ring = [[50, 90], [170, 90], [170, 190], [50, 190], [50, 90]]
    shape = {"type": "Polygon", "coordinates": [ring]}
    regions = [{"type": "Feature", "geometry": shape, "properties": {"objectType": "annotation"}}]
    (root / "regions.geojson").write_text(json.dumps(regions))
    for seed, name in enumerate(("AMI-BR", "PATCHES", "OTHER_PATCHES", "TEST")):
        made_patches(root / name, seed)
    (root / "mitoses.csv").write_text("x,y\n100,80\n250,20\n")
    (root / "weights").mkdir()
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=48)
    save_file(vit.state_dict(), root / "weights" / "vit_tiny_patch16.safetensors")
    made = ("encoder.name=vit_tiny_patch16", "encoder.weights=twin", "encoder.adapt=full")
    learns = ("decoder.name=linear", "instances.method=distance", "data.tile=64")
    steps = ("train.steps=60", "train.batch_size=2", "train.warmup=1", "train.lr=0.003")
    ends = ("train.validate_every=60", "infer.tile=128", "infer.overlap=16")
    ends += ("calibration.min_cases=2",)
    data = {"data": {"root": str(root / "DATA")}}
    config = parse_config(data, [*made, *learns, *steps, *ends])
    train(config, root / "run", device="cpu", progress=False)
    pixels = celltyper.read_image(root / "slide.svs").image
    found = predict_image(load_model(root / "run"), pixels, 0.5)
    write_parquet(root / "cells.parquet", cells_table(found))
    return root


def small_config(source: Any, overrides: Any = (), model: Any = None) -> Any:
    """`load_config`, but training takes two narrow steps, and weights of the hub are a twin's."""
    full = load_config(source, overrides, model)
    small = list(SMALL) if full.task == "cells" else []
    if full.task == "cells" and full.start is not None:
        # the network is that of the model to start from
        return load_config(source, [*overrides, *small], model)
    if full.task == "cells" and full.decoder.name == "dpt":
        small.append("decoder.options.width=8")
    if full.encoder.weights in ("auto", "random"):
        small.append("encoder.weights=twin")
    return load_config(source, [*overrides, *small], model)


def small_protocol(source: Any) -> Any:
    """`load_protocol`, but folds are two and seeds one."""
    full = load_protocol(source)
    folds = full.folds and 2
    return full.model_copy(update={"folds": folds, "seeds": full.seeds[:1]})


@pytest.fixture
def place(props: Path, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a page, with what it names of `props` and its commands do not make."""
    text = PAGES[page]
    blocks = [block for block in blocks_of(text) if block.language == "bash"]
    commands = [words for block in blocks for words in commands_of(block)]
    makes = {words[words.index("-o") + 1] for words in commands if "-o" in words}
    for path in props.iterdir():
        if path.name in text and path.name not in makes:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CELLTYPER_CACHE", str(tmp_path / "cache"))
    # weights of a file are a real model's, so it is made narrow, and its facts are found out once
    narrow = functools.partial(timm.models.vit_tiny_patch16_224, embed_dim=48)
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "vit_tiny_patch16_224", narrow)
    monkeypatch.setattr(foreign, "card_from_timm", functools.cache(foreign.card_from_timm))
    monkeypatch.setattr("celltyper.config.load_config", small_config)
    monkeypatch.setattr("celltyper.protocols.load_protocol", small_protocol)
    monkeypatch.setattr("celltyper.benchmark.spec.load_config", small_config)
    monkeypatch.setattr("celltyper.benchmark.spec.load_protocol", small_protocol)
    return tmp_path


@pytest.mark.parametrize("page", sorted(EXAMPLES))
def test_a_page_runs_from_top_to_bottom(
    page: str, place: Path, celltyper_command: Callable[..., Any]
) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    modules = set(sys.modules)
    for block in blocks_of(PAGES[page]):
        if block.language in RUN:
            run_block(block, names, celltyper_command)
    if page in AFTER:
        AFTER[page](place, names)
    # another page may have another module of the same name
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(place)):
            del sys.modules[name]


def same_region_either_way(place: Path, names: dict[str, Any]) -> None:
    """A rectangle in numbers and the same rectangle drawn give the same cells."""
    part, drawn = (read_cells(place / name / "cells.parquet") for name in ("part", "drawn"))
    assert part.equals(drawn)
    both = {"a", "b", "infer.json", "slides.csv", "report.html"}
    assert {path.name for path in (place / "cohort").iterdir()} == both
    assert {path.name for path in (place / "array").iterdir()} == both


def same_cells_from_the_file(place: Path, names: dict[str, Any]) -> None:
    """What the page cuts out of the maps of ONNX are the cells of the model."""
    pixels = celltyper.read_image(place / "image.png").image[:128, :128]
    own = predict_image(load_model(place / "run"), pixels, 0.5, overlap=0)
    assert len(own) > 1
    np.testing.assert_array_equal(names["cells"].labels, own.labels)
    np.testing.assert_allclose(names["cells"].cell_probabilities, own.cell_probabilities, atol=1e-3)


def table_of(page: str, *head: str) -> dict[str, str]:
    """Names in the first column of the table with this head, and what the second says of them."""
    _, found, rest = PAGES[page].partition("| " + " | ".join(head))
    assert found, head
    named = {}
    for line in rest.partition("\n\n")[0].splitlines()[2:]:
        names, second = (cell.strip() for cell in line.split("|")[1:3])
        for name in re.findall("`(.+?)`", names):
            for kind in CLASSES if "<class>" in name else ("",):
                named[name.replace("<class>", kind)] = second
    return named


ARROW = {
    "int32": "int32",
    "int64": "int64",
    "float32": "float",
    "float64": "double",
    "string (dictionary)": "dictionary<values=string",
    "binary (WKB)": "binary",
    "fixed-size list of float32": "fixed_size_list<element: float",
}


def tables_name_every_column(place: Path, names: dict[str, Any]) -> None:
    """Columns and keys on the page are those of the files, neither more nor less."""
    told = table_of("docs/outputs.md", "column", "type", "unit", "meaning")
    of_image = read_cells(place / "out" / "cells.parquet").schema
    of_slide = read_cells(place / "cohort" / "a" / "cells.parquet").schema
    assert of_image.names == [name for name in told if name != "embedding"]
    assert of_slide.names == [name for name in told if name != "image"]
    for field in (*of_image, *of_slide):
        assert str(field.type).startswith(ARROW[told[field.name]]), field
    with np.load(place / "out" / "labels.npz") as arrays:
        told = table_of("docs/outputs.md", "array", "type", "meaning")
        assert {name: str(arrays[name].dtype) for name in arrays} == {
            name: kind.partition(" ")[0] for name, kind in told.items()
        }
    (place / "leaderboard.csv").write_text(leaderboard_csv(made_leaderboard()), "utf-8")
    (place / "differences.csv").write_text(differences_csv(made_leaderboard()), "utf-8")
    for file in (
        *("out/infer.json", "cohort/infer.json", "cohort/a/slide.json", "cohort/slides.csv"),
        *("run/history.csv", "run/run.json"),
        *("scores/metrics.json", "scores/per_class.csv", "scores/per_image.csv"),
        *("leaderboard.csv", "differences.csv"),
    ):
        path = place / file
        kind = "key" if path.suffix == ".json" else "column"
        text = path.read_text(encoding="utf-8")
        own, *rows = [json.loads(text)] if kind == "key" else csv.reader(text.splitlines())
        told = table_of("docs/outputs.md", f"{kind} of `{path.name}`", "meaning")
        assert set(own) == set(told), file
        assert {len(row) for row in rows} <= {len(own)}, file
    scores = json.loads((place / "scores" / "metrics.json").read_text(encoding="utf-8"))
    told = table_of("docs/outputs.md", "key of `calibration` in `metrics.json`", "meaning")
    assert set(scores["calibration"]) == set(told)
    files = {path.name for path in (place / "run").iterdir()}
    assert files == set(table_of("docs/outputs.md", "file of a run", "meaning"))


def published_figures_belong_somewhere(place: Path, names: dict[str, Any]) -> None:
    """Those of the page are of datasets and protocols that its benchmark has."""
    found = read_published(place / "lizard.yaml", "published.yaml", names["cells"])
    assert [figure.value for figure in found] == [0.7159, 0.6426, 0.6844]


AFTER = {
    "docs/benchmark.md": published_figures_belong_somewhere,
    "docs/slides.md": same_region_either_way,
    "docs/export.md": same_cells_from_the_file,
    "docs/outputs.md": tables_name_every_column,
}


NOT_RUN = {
    "shows a session of minutes": [
        ("README.md", "make demo # environment, real H&E, infer, train, eval, report"),
        ("README.md", "$ celltyper infer demo/data/test/images -o demo/box --mpp 0.5"),
        ("docs/start.md", "$ git clone REPOSITORY celltyper && cd celltyper"),
        ("docs/box.md", "$ python tools/train_box_model.py"),
        ("docs/box.md", "$ python tools/bench_box.py"),
    ],
    "shows files": [
        ("README.md", "DATA/train/images/slide1_a.png RGB"),
        ("docs/benchmark.md", "out/benchmark.json what is to be run"),
        ("docs/own-labels.md", "my-cells/"),
        ("docs/models.md", "summary: Finds nuclei in H&E"),
        ("docs/patches.md", "run/model.safetensors head, threshold, classes"),
        ("docs/protocols.md", "runs/protocol.json what is to be run"),
        ("docs/start.md", "run/model.safetensors the best model on the validation part"),
    ],
    "shows what a command prints on data that may not be handed on": [
        ("docs/patches.md", "balanced accuracy AUROC AUPRC F1"),
    ],
    "installs or downloads": [
        ("docs/cluster.md", "$ pip install 'celltyper[cluster]'"),
        ("docs/export.md", "$ pip install 'celltyper[export]'"),
        ("docs/models.md", "$ celltyper models # what is in the box"),
        ("docs/offline.md", "$ pip download --dest wheels --requirement requirements.lock"),
        ("docs/offline.md", "$ python3.11 -m venv venv && source venv/bin/activate"),
    ],
    "needs a cluster (test_wholeslide_cluster.py starts one)": [
        ("docs/cluster.md", "$ CUDA_VISIBLE_DEVICES=0 dask worker ADDRESS --nthreads 2 &"),
        ("docs/benchmark.md", "#!/bin/bash"),
        ("docs/cluster.md", "#!/bin/bash"),
        ("docs/cluster.md", "$ celltyper infer '/data/cohort/*.svs' -m /data/run -o /data/out"),
    ],
    "needs a GPU": [("docs/recipes.md", "$ celltyper train dpt -o run-3 ")],
    "takes half a minute, and runs in test_benchmark.py": [
        ("docs/benchmark.md", "$ celltyper benchmark mini -o mini # made data"),
        ("docs/benchmark.md", "$ celltyper benchmark mini -o mini --plan"),
    ],
    "takes seconds a file, and runs in test_export.py": [
        ("docs/export.md", "$ celltyper export run --format torchscript -o model.pt"),
    ],
}
"""Blocks that do not run, by reason: page, and how the first line begins."""

WRITTEN_ONLY = {"on_slurm.py": "needs SLURM"}


def test_every_block_runs_or_is_listed_with_a_reason() -> None:
    """Measurements, in docs/benchmarks, take minutes and quiet machines: none of them runs."""
    expected = {entry for entries in NOT_RUN.values() for entry in entries}
    for page, text in PAGES.items():
        file = page.split()[0]
        titles = set()
        for block in blocks_of(text):
            where = f"{page}:{block.line}"
            known = {e for e in expected if e[0] == file and block.first.startswith(e[1])}
            if block.language in RUN:
                titles |= {block.title} if block.title else set()
            elif block.language == "math":
                continue  # make docs translates it, or fails
            elif page.startswith("docs/benchmarks/"):
                assert block.language == "console", where
            else:
                assert block.language in ("console", "text", ""), f"{where}: {block.language}"
                assert len(known) == 1, f"{where} does not run: say why in NOT_RUN"
                expected -= known
            if block.language == "console":
                check_options(block, where)
        for title in titles - set(WRITTEN_ONLY):
            name = Path(title).name.removesuffix(".py")
            assert text.count(name) > 1, f"{page}: nothing uses {title}"
            if title.endswith(".py"):
                assert re.search(rf"(from|import) {name}\b", text), f"{page}: import {title}"
    assert not expected, "these blocks are gone"


def check_options(block: Block, where: str) -> None:
    """Refuse options that do not exist, in commands that do not run."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] != ["celltyper"] or not line.startswith("$ "):
            continue
        command: Any = cli
        words = words[1:]
        while isinstance(command, click.Group) and words:
            command, words = command.commands[words[0]], words[1:]
        options = {o for p in command.params for o in p.opts}
        assert {word for word in words if re.match("--?[a-z]", word)} <= options, where


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of the other pages are checked where the site is built: make docs."""
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_every_page_and_public_name_is_on_the_site() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [f"docs/{page}" for section in nav for pages in section.values() for page in pages]
    assert sorted(listed) == sorted(FILES)
    reference = "".join(text for page, text in FILES.items() if page.startswith("docs/api/"))
    shown = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    for name in set(celltyper.__all__) - {"testing"}:
        value = getattr(celltyper, name)
        assert {value.__module__, f"{value.__module__}.{name}"} & shown, name


def test_pictures_are_small_and_shown() -> None:
    for path in DOCS.glob("*.png"):
        assert path.stat().st_size < 400_000, path
        assert any(path.name in text for text in PAGES.values()), f"{path} is on no page"
