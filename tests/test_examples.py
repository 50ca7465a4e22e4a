"""Every example runs as a user would run it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = (
    "encoder.weights=twin",
    "train.steps=2",
    "train.warmup=1",
    "train.batch_size=2",
    "data.tile=64",
    "infer.tile=64",
    "infer.overlap=16",
)
ARGUMENTS = {
    "custom_decoder.py": lambda data, tmp: [],
    "train_and_evaluate.py": lambda data, tmp: [str(data), str(tmp / "run"), *TINY],
}


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_example(
    name: str,
    made_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name](made_data, tmp_path)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    expected = {"custom_decoder.py": "cells on 300 x 200 px", "train_and_evaluate.py": "macro_f1"}
    assert expected[name] in capsys.readouterr().out
