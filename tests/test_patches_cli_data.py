"""``celltyper data check | info`` on annotated patches, as a user types them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., Any]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six slides of two patches each, one of each class, in two domains."""
    rng, rows = np.random.default_rng(0), ["patch,slide,tumortype,split"]
    for slide in range(6):
        for label in ("normal", "rare"):
            file = tmp_path / "data" / label / f"{slide}{label[0]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(image).save(file)
            domain, split = ("breast", "colon")[slide % 2], ("train", "test")[slide // 4]
            rows.append(f"{file.name},s{slide},{domain},{split}")
    (tmp_path / "data" / "list.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "data"


def test_patches_are_recognised_and_described(root: Path, celltyper_command: Run) -> None:
    for command in ("info", "check"):
        code, out, err = celltyper_command("data", command, root)
        assert (code, err) == (0, "")
        lines = [line.split() for line in out.splitlines()]
        for wanted in (
            ["layout", "folders"],
            ["size", "20", "x", "24", "px"],
            ["mpp", "unknown"],
            ["groups", "6"],
            ["domain", "breast", "(6),", "colon", "(6)"],
            ["class", "train", "test", "all"],
            ["normal", "4", "50.0%", "2", "50.0%", "6", "50.0%"],
            ["patches", "8", "4", "12"],
        ):
            assert wanted in lines
        # how long the path is, the user decides
        assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("path"))
    assert out.endswith("no errors, no warnings\n")


def test_check_finds_leaks_cut_windows_and_missing_folds(
    root: Path, celltyper_command: Run
) -> None:
    shutil.copy(root / "rare" / "0r.png", root / "rare" / "5r.png")  # train, then test
    text = (root / "list.csv").read_text().replace("3n.png,s3,colon,train", "3n.png,s4,colon,train")
    (root / "list.csv").write_text(text)
    file = root / "normal" / "1n.png"
    file.write_bytes(file.read_bytes()[:200])
    words = ("--folds", 7, "--size", 22, "--classes", "normal,rar")
    code, out, err = celltyper_command("data", "check", root, *words)
    assert (code, err) == (2, "")
    for said in (
        "error: unreadable (1)",
        "error: group in two splits (1)",
        "group 's4' in train and test",
        "error: same pixels in two splits (1)",
        "rare/0r.png: same pixels as 'rare/5r.png'",
        "error: fewer groups than folds (1)",
        "6 groups for 7 folds",
        "no class 'rar'; did you mean 'rare'?",
        # of 20 rows, 22 are asked for
        "warning: window over the border (11)",
    ):
        assert said in out
    assert "5 errors, 1 warning\n" in out
    assert celltyper_command("data", "check", root, "--folds", 5)[0] == 2


def test_numbers_get_their_names_from_the_option(
    root: Path, tmp_path: Path, celltyper_command: Run
) -> None:
    rows = [f"{p},{1 + (p.parent.name == 'rare')}" for p in sorted(root.rglob("*.png"))]
    table = tmp_path / "numbers.csv"
    table.write_text("\n".join(["filename,label", *rows]) + "\n")
    code, _, err = celltyper_command("data", "info", table)
    assert code == 2
    assert "labels are the numbers 1, 2" in err
    code, out, _ = celltyper_command("data", "info", table, "--classes", "normal,rare")
    assert code == 0
    assert ["rare", "6", "50.0%"] in [line.split() for line in out.splitlines()]


def test_images_need_not_be_there_for_info(tmp_path: Path, celltyper_command: Run) -> None:
    coco = {
        "images": [{"id": 1, "file_name": "1.tiff", "width": 900, "height": 800}],
        "categories": [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "look-alike"}],
        "annotations": [
            {
                "id": i,
                "image_id": 1,
                "category_id": 1 + i % 2,
                "bbox": [50 * i, 40, 50 * i + 50, 90],
            }
            for i in range(6)
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    code, out, _ = celltyper_command("data", "info", tmp_path)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["layout", "midog"] in lines
    assert ["size", "unknown"] in lines
    assert ["patches", "6"] in lines
    code, _, err = celltyper_command("data", "check", tmp_path)
    assert code == 2
    assert "no image '1.tiff'" in err
    (tmp_path / "fields").mkdir()
    Image.new("RGB", (900, 800)).save(tmp_path / "fields" / "1.tiff")
    code, out, _ = celltyper_command("data", "check", tmp_path, "--images", tmp_path / "fields")
    assert ["size", "800", "x", "900", "px"] in [line.split() for line in out.splitlines()]


def test_cells_stay_cells(made_data: Path, root: Path, celltyper_command: Run) -> None:
    code, out, _ = celltyper_command("data", "info", made_data)
    assert code == 0
    assert "layout  folder\n" in out
    assert "nuclei" in out
    code, _, err = celltyper_command("data", "check", made_data, "--folds", 3)
    assert code == 2
    assert "--folds is for patches, and this is about images of cells" in err
    code, _, err = celltyper_command("data", "check", root, "--taxonomy", root / "list.csv")
    assert code == 2
    assert "--taxonomy is for images of cells" in err
    about = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []}
    (root / "annotations.json").write_text(json.dumps(about))
    code, _, err = celltyper_command("data", "info", root)
    assert code == 2
    assert "of several layouts (folders, midog)" in err
    code, out, _ = celltyper_command("data", "info", root, "--reader", "folders")
    assert code == 0
