"""bf16, accumulation and torch.compile: what they compute, or why they are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from celltyper import devices, loop
from celltyper.checkpoints import read_tensors
from celltyper.config import Config, dump_config
from celltyper.decoders.linear import LinearDecoder
from celltyper.errors import ConfigError
from celltyper.loop import check_compile
from celltyper.training import train

Tiny = Callable[..., Config]


def last(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "last.safetensors")[0]


def test_bf16_trains_and_validates_in_bf16_and_keeps_weights_in_fp32(
    tiny: Tiny, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_has_bf16_instructions", lambda: True)
    seen: list[tuple[bool, torch.dtype]] = []
    forward = LinearDecoder.forward

    def noting(self: LinearDecoder, features: list[Tensor], images: Tensor) -> Tensor:
        out = forward(self, features, images)
        seen.append((self.training, out.dtype))
        return out

    monkeypatch.setattr(LinearDecoder, "forward", noting)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        config = tiny(made_data, f"train.precision={precision}", "train.steps=2")
        run = train(config, tmp_path / precision, device="cpu", progress=False)
        assert set(seen) == {(True, dtype), (False, dtype)}
        assert all(t.dtype == torch.float32 for n, t in last(run).items() if n.endswith("weight"))
    assert (tmp_path / "fp32" / "history.csv").read_text() != (
        tmp_path / "bf16" / "history.csv"
    ).read_text()


@pytest.mark.parametrize(("supported", "taken"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_processor_multiplies_it(
    tiny: Tiny,
    made_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    supported: bool,
    taken: str,
) -> None:
    monkeypatch.setattr(devices, "_has_bf16_instructions", lambda: supported)
    runs = [
        train(
            tiny(made_data, f"train.precision={precision}", "train.steps=2"),
            tmp_path / precision,
            device="cpu",
            progress=False,
        )
        for precision in ("auto", taken)
    ]
    facts = [json.loads((run / "run.json").read_text()) for run in runs]
    assert [f["precision"] for f in facts] == [taken, taken]
    assert (runs[0] / "history.csv").read_text() == (runs[1] / "history.csv").read_text()
    weights = [last(run) for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_bf16_is_refused_where_it_would_be_emulated(
    tiny: Tiny, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_has_bf16_instructions", lambda: False)
    with pytest.raises(ConfigError, match="precision bf16 is not supported by this CPU; use fp32"):
        train(tiny(made_data, "train.precision=bf16"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_two_passes_of_two_tiles_have_the_gradient_of_four(
    tiny: Tiny, made_data: Path, tmp_path: Path
) -> None:
    """For a mean over pixels; dice and weighted means are ratios, those of halves do not add up."""
    mean = ("loss.dice=0", "loss.instances=0", "loss.class_weights=none", "train.clip=1e9")

    def gradients(name: str, *settings: str) -> Tensor:
        config = tiny(made_data, *mean, "train.steps=1", *settings)
        tensors = last(train(config, tmp_path / name, device="cpu", progress=False))
        # AdamW's first moment is a tenth of the first gradient
        moments = [t.flatten() for n, t in sorted(tensors.items()) if n.endswith("exp_avg")]
        return torch.cat(moments)

    whole = gradients("whole", "train.batch_size=4")
    parts = gradients("parts", "train.batch_size=2", "train.accumulate=2")
    half = gradients("half", "train.batch_size=2")
    size = whole.norm()
    assert (parts - whole).norm() < 1e-4 * size
    assert (half - whole).norm() > 1e-2 * size


class Recorded:
    """A backend that runs what torch captured as it is, and counts."""

    def __init__(self) -> None:
        self.graphs = 0
        self.passes = 0

    def __call__(self, module: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*inputs: Any) -> Any:
            self.passes += 1
            return module.forward(*inputs)

        return run


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Compile without a compiler: capture the model, then run it as captured."""
    backend, compiled = Recorded(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend=backend))
    return backend


class KilledError(Exception):
    """Stands for a process that ends between two steps."""


@pytest.mark.slow
def test_compiled_training_resumes_and_gives_the_weights_of_plain_training(
    tiny: Tiny,
    made_data: Path,
    tmp_path: Path,
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = ("encoder.adapt=lora", "encoder.lora.dropout=0.5", "decoder.branches=separate")
    plain = train(tiny(made_data, *settings), tmp_path / "plain", device="cpu", progress=False)
    assert recorded.passes == 0

    config = tiny(made_data, *settings, "train.compile=true")
    objective, passes = loop.objective, []

    def dies_in_the_third_step(*args: object, **kwargs: object) -> object:
        passes.append(recorded.passes)
        if len(passes) == 3:
            raise KilledError
        return objective(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "objective", dies_in_the_third_step)
    with pytest.raises(KilledError):
        train(config, tmp_path / "run", device="cpu", progress=False)
    # one graph, run once a step: validation after the second ran the model itself
    steps = [n - passes[0] for n in passes]
    assert steps == [0, 1, 2]
    monkeypatch.setattr(loop, "objective", objective)
    run = train(config, tmp_path / "run", device="cpu", progress=False, resume=True)
    for file in ("model.safetensors", "last.safetensors"):
        ours, expected = (read_tensors(r / file)[0] for r in (run, plain))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in expected), file


@pytest.mark.slow
def test_more_runs_of_one_process_than_torch_compiles_by_itself(
    tiny: Tiny, made_data: Path, tmp_path: Path, recorded: Recorded
) -> None:
    config = tiny(made_data, "train.compile=true", "train.steps=1")
    for number in range(9):
        before = recorded.graphs
        train(config, tmp_path / f"{number}", device="cpu", progress=False)
        assert recorded.graphs > before


def test_compile_is_refused_with_the_reason_of_torch(
    tiny: Tiny, made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(model: object) -> None:
        raise RuntimeError("torch.compile is not supported\non Python 3.99+")

    monkeypatch.setattr(torch, "compile", refuses)
    said = (
        r"^train.compile does not work on cpu here \(torch.compile is not supported on Python "
        r"3.99\+\); use train.compile=false$"
    )
    with pytest.raises(ConfigError, match=said):
        check_compile(torch.device("cpu"))
    with pytest.raises(ConfigError, match=said):
        train(tiny(made_data, "train.compile=true"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    train(tiny(made_data, "train.steps=1"), tmp_path / "run", device="cpu", progress=False)


@pytest.mark.slow
def test_compile_without_a_compiler_is_refused_in_one_line(
    tiny: Tiny, made_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(dump_config(tiny(made_data, "train.compile=true")))
    (tmp_path / "no programs").mkdir()
    command = ["-m", "celltyper", "train", str(tmp_path / "c.yaml"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *command, "-o", str(tmp_path / "run")],
        env={k: v for k, v in os.environ.items() if k != "CXX"}
        | {"PATH": str(tmp_path / "no programs"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "train.compile does not work on cpu here" in done.stderr.splitlines()[-1]
    assert "use train.compile=false" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
