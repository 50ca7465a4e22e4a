"""The architecture: imports go one way, and the command line stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import celltyper

PACKAGE = Path(celltyper.__file__).parent

LAYERS = [
    {"__main__", "testing"},
    {"demo", "commands"},
    {"publishing"},
    {"benchmark"},
    {"results", "protocols"},
    {"training", "inference", "reporting", "exporting", "classification", "formats"},
    {"cohort"},
    {"loop", "wholeslide"},
    {"inputs", "outputs"},
    {"evaluation", "predict", "objective", "targets", "runs", "index", "starting"},
    {"checkpoints", "optim"},
    {"models", "exported", "features", "parts", "probes", "patches"},
    {"library"},
    {"config", "encoders", "report", "decoders", "readers"},
    {"slides", "made"},
    {"datasets"},
    {"instances", "cells", "metrics", "losses", "transforms", "symmetries"},
    {"labels", "tiling", "atomic", "cache", "devices"},
    {"types"},
    {"calibration", "domain"},
    {"errors"},
]
"""From the command line down; a part imports only from below, or from inside its own package."""


def rank(part: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if part in layer]
    assert found, f"give the new part {part!r} its place in LAYERS"
    return found[0]


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n.split(".")[1] for n in names if n.startswith("celltyper.")}


def test_imports_go_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if part != "__init__":
            for other in imports_of(path) - {part}:
                where = f"{path.relative_to(PACKAGE)} imports {other}"
                assert rank(part) < rank(other), where


def test_package_is_at_most_two_deep() -> None:
    deepest = max(len(p.relative_to(PACKAGE).parts) for p in PACKAGE.rglob("*.py"))
    assert deepest == 2


def test_help_is_light() -> None:
    code = (
        "import sys; from celltyper.__main__ import cli; "
        "heavy = {'torch', 'timm', 'monai', 'peft', 'numpy', 'numba'} & set(sys.modules); "
        "sys.exit(','.join(heavy) or None)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_public_names_can_be_imported_and_are_listed() -> None:
    for name in celltyper.__all__:
        assert getattr(celltyper, name).__doc__
    assert set(celltyper.__all__) <= set(dir(celltyper))
