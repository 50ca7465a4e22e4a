"""Figures that others have published, as rows beside one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import Field, ValidationError, model_validator

from celltyper.benchmark.spec import SCORES, Cell
from celltyper.config import Section, first_problem, one_line
from celltyper.errors import ConfigError, unknown_name


class Published(NamedTuple):
    """A figure from the literature."""

    system: str
    dataset: str
    protocol: str
    test: str
    """Name of a further test, "" for the protocol's own."""
    score: str
    value: float
    source: str
    doi: str


class PublishedColumn(Section):
    """Where the figures of a column belong."""

    dataset: str
    protocol: str
    test: str = ""
    score: str


class PublishedTable(Section):
    """A published table: ``rows`` by the name of a system, null where there is no figure."""

    source: str = Field(min_length=1)
    doi: str = Field(pattern=r"^10\.\d{4,9}/\S+$")
    columns: tuple[PublishedColumn, ...] = Field(min_length=1)
    rows: dict[str, tuple[float | None, ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _rows_are_whole(self) -> PublishedTable:
        for name, row in self.rows.items():
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {name!r} has {len(row)} figures for {len(self.columns)} columns; write "
                    "null where there is none"
                )
        return self


def read_published(beside: Path, name: str, cells: Sequence[Cell]) -> list[Published]:
    """Read a table of published figures.

    Parameters
    ----------
    beside : Path
        The benchmark's file; `name` is relative to its folder.
    name : str
        A YAML file, see `PublishedTable`.
    cells : sequence of Cell
        Of the benchmark: figures of a dataset and protocol that it does not have are refused.

    Returns
    -------
    list of Published

    Raises
    ------
    ConfigError
        If the file cannot be read or is wrong, naming the key.
    """
    file = beside.parent / name
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        table = PublishedTable.model_validate(values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"published figures {file}: {one_line(error)}") from error
    except ValidationError as error:
        raise ConfigError(f"{file}: {first_problem(error, PublishedTable)}") from error
    boards = {
        "/".join(part for part in (cell.dataset, cell.protocol, test) if part): cell.task
        for cell in cells
        for test in ("", *cell.tests)
    }
    for column in table.columns:
        parts = (column.dataset, column.protocol, column.test)
        board = "/".join(part for part in parts if part)
        if board not in boards:
            raise ConfigError(f"{file}: {unknown_name('dataset/protocol', board, boards)}")
        known = SCORES[boards[board]]
        if column.score not in known:
            raise ConfigError(f"{file}: {unknown_name('score', column.score, known)}")
    return [
        Published(system, c.dataset, c.protocol, c.test, c.score, value, table.source, table.doi)
        for system, row in table.rows.items()
        for c, value in zip(table.columns, row, strict=True)
        if value is not None
    ]
