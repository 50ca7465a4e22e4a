"""What a benchmark is made of, how its YAML file is read, and the cells of its matrix."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from celltyper.classification.config import PatchConfig
from celltyper.config import (
    Config,
    Section,
    first_problem,
    load_config,
    parse_config,
    read_named,
    recipes,
    task_of,
)
from celltyper.errors import ConfigError, unknown_name
from celltyper.protocols.patch_table import SHOWN
from celltyper.protocols.pooling import HEADLINE
from celltyper.protocols.protocol import Name, Protocol, Seed, Text, load_protocol

Task = Literal["cells", "patches"]

SCORES: dict[str, tuple[str, ...]] = {"cells": HEADLINE, "patches": SHOWN}
"""Scores of the leaderboard by task."""


class FurtherData(Section):
    """Further patches on which the models of all runs are tested."""

    root: Path | None = None
    reader: str = "auto"
    images: Path | None = None
    made: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _of_somewhere(self) -> FurtherData:
        _check_origin(self.root, self.made)
        return self


class BenchmarkData(Section):
    """A dataset: where it is, and the protocols that are run on it.

    ``root`` and ``images`` are paths, relative to the folder of data, for ``data.root`` and
    ``data.images``. ``made`` is the seed of made data instead.
    ``set`` are values of ``section.key`` for every config on these data. ``protocols`` are files,
    names of those that come along, or the keys of one. ``tests`` are further patches on which the
    models of all runs that train on everything are tested; not for cells.
    """

    task: Task = "cells"
    title: str = ""
    root: Path | None = None
    images: Path | None = None
    made: int | None = Field(None, ge=0)
    set: dict[str, Any] = Field(default_factory=dict)
    protocols: dict[Name, Text | dict[str, Any]] = Field(min_length=1)
    tests: dict[Name, FurtherData] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _of_somewhere(self) -> BenchmarkData:
        if self.tests and self.task == "cells":
            raise ValueError("tests are for patches: name a split in a protocol instead")
        _check_origin(self.root, self.made)
        return self


class Systems(Section):
    """One system, or one for every combination of encoders, adaptations, decoders and heads.

    ``recipe`` is the name of a recipe or a config file; ``encoders``, ``adapt``, ``decoders`` and
    ``heads`` stand for ``encoder.name``, ``encoder.adapt``, ``decoder.name`` and ``head.name``.
    The combinations are named after these and the system. By default a system is run on all
    datasets of its task, in all protocols.
    """

    recipe: Text
    encoders: tuple[Text, ...] = ()
    adapt: tuple[Text, ...] = ()
    decoders: tuple[Text, ...] = ()
    heads: tuple[Text, ...] = ()
    set: dict[str, Any] = Field(default_factory=dict)
    datasets: tuple[Name, ...] = ()
    protocols: tuple[Name, ...] = ()


AXES = {
    "encoders": "encoder.name",
    "adapt": "encoder.adapt",
    "decoders": "decoder.name",
    "heads": "head.name",
}


class Benchmark(Section):
    """Which systems are run on which datasets in which protocols.

    ``seeds`` are those of all protocols that list none. ``rank_by`` is the score by which systems
    are compared, by task. ``published`` are files of published figures, beside this one.
    """

    title: str
    datasets: dict[Name, BenchmarkData] = Field(min_length=1)
    systems: dict[Name, Systems] = Field(min_length=1)
    seeds: tuple[Seed, ...] = ()
    rank_by: dict[Task, str] = Field(default_factory=dict)
    published: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Benchmark:
        protocols = {name for data in self.datasets.values() for name in data.protocols}
        for name, system in self.systems.items():
            for kind, chosen, known in (
                ("dataset", system.datasets, self.datasets),
                ("protocol", system.protocols, protocols),
            ):
                for one in chosen:
                    if one not in known:
                        raise ValueError(f"system {name!r}: {unknown_name(kind, one, known)}")
        for task, score in self.rank_by.items():
            if score not in SCORES[task]:
                raise ValueError(f"rank_by.{task}: {unknown_name('score', score, SCORES[task])}")
        return self

    def score_of(self, task: str) -> str:
        """Score by which systems of a task are compared."""
        default = {"cells": "macro_f1", "patches": "balanced_accuracy"}
        return self.rank_by.get(task, default[task])  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True, eq=False)
class Cell:
    """One system on one dataset in one protocol: a folder of runs.

    Parameters
    ----------
    dataset, system, protocol : str
        Names; its folder is ``dataset/system/protocol``.
    config : Config or PatchConfig
    rules : Protocol
    made : int or None
        Seed of made data, which are written before the first run.
    tests : mapping of str to FurtherData
        Further patches to test on.
    """

    dataset: str
    system: str
    protocol: str
    config: Config | PatchConfig
    rules: Protocol
    made: int | None = None
    tests: Mapping[str, FurtherData] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """``cells`` or ``patches``."""
        return self.config.task

    @property
    def path(self) -> str:
        """Its folder, inside that of the benchmark."""
        return f"{self.dataset}/{self.system}/{self.protocol}"

    def about(self) -> dict[str, Any]:
        """All that decides what it computes, JSON-ready."""
        return {
            "config": self.config.model_dump(mode="json"),
            "rules": self.rules.model_dump(mode="json"),
            "tests": {name: test.model_dump(mode="json") for name, test in self.tests.items()},
            "made": self.made,
        }


def benchmark_files() -> dict[str, Path]:
    """Benchmarks that come with celltyper, by name."""
    folder = next(iter(recipes().values())).parent / "benchmarks"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_benchmark(
    source: str | Path, overrides: Sequence[str] = ()
) -> tuple[Benchmark, Path, list[str]]:
    """Read a benchmark and apply the overrides that are of it.

    Parameters
    ----------
    source : str or Path
        YAML file, or the name of a benchmark that comes along (see `benchmark_files`).
    overrides : sequence of str
        Assignments: of a key of the benchmark (``seeds=[0]``, ``datasets.lizard.root=DATA``), or of
        a key of every config (``train.steps=10``).

    Returns
    -------
    benchmark : Benchmark
    file : Path
        Where it was read; paths of recipes and published figures are relative to its folder.
    rest : list of str
        Overrides of the configs.

    Raises
    ------
    ConfigError
        If the file is missing or not YAML, a key is unknown or a value is out of bounds.
    """
    file, values = read_named(source, "benchmark", benchmark_files(), "keys such as 'systems:'")
    own = [o for o in overrides if re.split(r"[.=]", o.strip())[0] in Benchmark.model_fields]
    return (
        parse_config(values, own, Benchmark, where=str(file)),
        file,
        [override for override in overrides if override not in own],
    )


def cells_of(
    benchmark: Benchmark,
    file: Path,
    output: Path,
    *,
    data: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[Cell]:
    """Cells of the matrix, in the order of the file: datasets, protocols, systems.

    Parameters
    ----------
    benchmark : Benchmark
    file : Path
        Where it was read.
    output : Path
        Folder of the benchmark, which holds made data.
    data : Path or None
        Folder to which roots are relative; by default the working directory.
    overrides : sequence of str
        Assignments for every config.

    Returns
    -------
    list of Cell

    Raises
    ------
    ConfigError
        If a recipe, protocol, key or value is wrong, naming system and dataset; if no system is of
        a dataset's task; or if two systems have the same name.
    """
    places = {
        name: _placed(one, (data or Path()).absolute(), output.absolute() / "data" / name)
        for name, one in benchmark.datasets.items()
    }
    systems: dict[str, tuple[str, Systems, list[str]]] = {}
    for family, one in benchmark.systems.items():
        task = task_of(_near(file, one.recipe))
        for name, values in _combinations(family, one):
            if name in systems:
                raise ConfigError(f"{file}: two systems are named {name!r}; rename one")
            systems[name] = task, one, values
    cells = []
    for dataset, chosen in places.items():
        rules = {
            name: _rules(benchmark, file, dataset, name, source)
            for name, source in chosen.protocols.items()
        }
        fitting = {
            name: (one, values)
            for name, (task, one, values) in systems.items()
            if task == chosen.task and dataset in (one.datasets or [dataset])
        }
        if not fitting:
            raise ConfigError(f"{file}: no system for dataset {dataset!r} of task {chosen.task}")
        for protocol, rule in rules.items():
            for name, (one, values) in fitting.items():
                if protocol not in (one.protocols or [protocol]):
                    continue
                given = [*_assignments(chosen.set), *values, *_assignments(one.set), *overrides]
                files = {"data.root": chosen.root, "data.images": chosen.images}
                given[:0] = _assignments({k: str(v) for k, v in files.items() if v is not None})
                model: type[Any] = Config if chosen.task == "cells" else PatchConfig
                try:
                    config = load_config(_near(file, one.recipe), given, model)
                except ConfigError as error:
                    where = f"{file}, system {name!r} on {dataset!r}"
                    raise ConfigError(f"{where}: {error}") from None
                cells.append(Cell(dataset, name, protocol, config, rule, chosen.made, chosen.tests))
    return cells


def _combinations(family: str, one: Systems) -> Iterator[tuple[str, list[str]]]:
    """Name and assignments of every combination of the lists of a system."""
    axes = {key: getattr(one, axis) for axis, key in AXES.items() if getattr(one, axis)}
    for values in itertools.product(*axes.values()):
        parts = [re.sub(r"[^\w-]+", "-", value) for value in values]
        assigned = [f"{k}={json.dumps(v)}" for k, v in zip(axes, values, strict=True)]
        yield "-".join([*parts, family]), assigned


def _rules(
    benchmark: Benchmark, file: Path, dataset: str, name: str, source: str | dict[str, Any]
) -> Protocol:
    """The protocol, with the seeds of the benchmark if it lists none."""
    where = f"{file}: datasets.{dataset}.protocols.{name}"
    if isinstance(source, str):
        protocol = load_protocol(_near(file, source))
    else:
        try:
            protocol = Protocol.model_validate(source)
        except ValidationError as error:
            raise ConfigError(f"{where}: {first_problem(error, Protocol)}") from error
    if protocol.variants:
        raise ConfigError(f"{where} lists variants; list them as systems")
    return protocol if protocol.seeds else protocol.model_copy(update={"seeds": benchmark.seeds})


def _assignments(values: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """``section.key=value`` of values that are nested, or have such keys."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _assignments(value, f"{where}{key}.")
        else:
            yield f"{where}{key}={json.dumps(value)}"


def _near(file: Path, name: str) -> str:
    """A file beside the benchmark, or the name as it is."""
    beside = file.parent / name
    return str(beside) if beside.is_file() else name


def _placed(one: BenchmarkData, data: Path, made: Path) -> BenchmarkData:
    """The dataset with its roots as they are on this machine."""
    tests = {
        name: test.model_copy(
            update={
                "root": made.parent / f"{made.name}-{name}"
                if test.root is None
                else data / test.root,
                "images": test.images and data / test.images,
            }
        )
        for name, test in one.tests.items()
    }
    root = made if one.root is None else data / one.root
    images = one.images and data / one.images
    return one.model_copy(update={"root": root, "images": images, "tests": tests})


def _check_origin(root: Path | None, made: int | None) -> None:
    if (root is None) == (made is None):
        raise ValueError("give root, where the data are, or made, the seed of made data")
