"""Tools: what they import is there, and each says how it is used."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOOKS = [ROOT / hook for hook in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["hooks"]]
TOOLS = sorted({*(ROOT / "tools").glob("*.py")} - {*HOOKS})


@pytest.mark.parametrize("path", TOOLS, ids=lambda p: p.stem)
def test_tool_shows_its_help(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    # a script may import its neighbours
    monkeypatch.syspath_prepend(path.parent)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert path.name in capsys.readouterr().out
