"""Cell tables too long for memory: written, read and turned into CSV part by part."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from celltyper.atomic import atomic_path
from celltyper.cells.table import (
    EMBEDDING,
    check_alike,
    check_columns,
    group_rows,
    joint_metadata,
    metadata_of,
    names_of,
    parquet_options,
)
from celltyper.errors import DataError, unknown_name


class CellsWriter:
    """Write one GeoParquet file from cell tables that come one after the other, atomically.

    The file appears when the ``with`` block ends, and not at all if it fails. Its bytes depend on
    the rows and their order, not on how they were cut into tables. Memory holds one row group.

    Parameters
    ----------
    path : str or Path
        Final place; an existing file is replaced.
    renumber : bool
        Whether to count ``cell_id`` anew from 1 through all tables.

    Raises
    ------
    DataError
        If the tables differ in columns or classes, there is none, or the folder is not writable.
    RunError
        If the disk is full.

    Examples
    --------
    >>> with CellsWriter("cells.parquet", renumber=True) as cells:  # doctest: +SKIP
    ...     for block in blocks:
    ...         cells.write(block)
    """

    def __init__(self, path: str | Path, *, renumber: bool = False) -> None:
        self._path, self._renumber = Path(path), renumber
        self._stack = ExitStack()
        self._first: pa.Table | None = None
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self.rows = 0
        """Cells so far."""

    def __enter__(self) -> Self:
        self._temporary = self._stack.enter_context(atomic_path(self._path))
        return self

    def write(self, table: pa.Table) -> None:
        """Add the cells of a table from `celltyper.cells.table.cells_table`; it may be empty."""
        if self._first is None:
            check_columns(self._path, table.schema)
            self._metadata = metadata_of(table)
            self._first = table.slice(0, 0)
            self._group_rows = group_rows(table.schema)
            # The final metadata is known at the end only, and so is the schema that holds it.
            self._file = self._stack.enter_context(
                pq.ParquetWriter(
                    self._temporary,
                    table.schema.remove_metadata(),
                    store_schema=False,
                    **parquet_options(table.schema),
                )
            )
        else:
            check_alike(self._first, table)
            self._metadata = joint_metadata([self._metadata, metadata_of(table)])
        if self._renumber:
            last = self.rows + table.num_rows
            if last > np.iinfo(np.int32).max:
                raise DataError(f"{self._path.name}: too many cells for int32: {last}")
            at = table.column_names.index("cell_id")
            ids = np.arange(self.rows + 1, last + 1, dtype=np.int32)
            table = table.set_column(at, "cell_id", pa.array(ids))
        self.rows += table.num_rows
        self._pending.append(table)
        self._pending_rows += table.num_rows
        while self._pending_rows >= self._group_rows:
            self._flush()

    def _flush(self) -> None:
        cells = pa.concat_tables(self._pending)
        group, rest = cells.slice(0, self._group_rows), cells.slice(self._group_rows)
        self._pending, self._pending_rows = [rest], rest.num_rows
        for i, field in enumerate(group.schema):
            if pa.types.is_dictionary(field.type):
                # Parts may have dictionaries of their own, with values that no row here has.
                names = group[field.name].cast(pa.string())
                if field.name == "phenotype":
                    known = pa.array(names_of(group), pa.string())
                    index = pc.index_in(names, known).combine_chunks().cast(field.type.index_type)
                    coded = pa.DictionaryArray.from_arrays(index, known)
                else:
                    coded = names.combine_chunks().dictionary_encode().cast(field.type)
                group = group.set_column(i, field, coded)
        self._file.write_table(group, row_group_size=self._group_rows)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if self._first is None:
                raise DataError(f"{self._path.name}: there is no table of cells to write")
            if self._pending_rows or not self.rows:
                self._flush()
            schema = self._first.schema.with_metadata(self._metadata)
            stored = {b"ARROW:schema": b64encode(schema.serialize().to_pybytes())}
            self._file.add_key_value_metadata(self._metadata | stored)


def iter_cells(
    path: str | Path,
    columns: Sequence[str] | None = None,
    rows: int = 1 << 14,
    *,
    embeddings: bool = True,
) -> Iterator[pa.Table]:
    """Read a cell table part by part.

    Parameters
    ----------
    path : str or Path
        A ``cells.parquet``.
    columns : sequence of str, optional
        Those to read; by default all.
    rows : int
        Largest number of cells at once.
    embeddings : bool
        Whether "all" has the embeddings, if there are any.

    Returns
    -------
    iterator of pyarrow.Table
        In the order of the file, at least one, all with the same columns and the metadata of the
        file. Memory holds one part.

    Raises
    ------
    DataError
        If the file is missing, no Parquet file, or no cell table; while reading, if it is damaged.
    ConfigError
        If there is no such column.
    """
    path = Path(path)
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    schema = file.schema_arrow
    try:
        check_columns(path, schema)
        for name in columns or ():
            if name not in schema.names:
                raise unknown_name(f"column of {path.name}", name, schema.names)
    except (DataError, ValueError):
        file.close()
        raise
    if columns is None and not embeddings and EMBEDDING in schema.names:
        columns = [name for name in schema.names if name != EMBEDDING]
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns], schema.metadata)
    return _parts(file, path, schema, columns, rows)


def _parts(
    file: pq.ParquetFile, path: Path, schema: pa.Schema, names: Sequence[str] | None, rows: int
) -> Iterator[pa.Table]:
    with file:
        some = False
        try:
            # One row group after the other: a reader of all of them keeps what it has read.
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(rows, row_groups=[group], columns=names):
                    table = pa.Table.from_batches([batch]).select(schema.names)
                    yield table.replace_schema_metadata(schema.metadata)
                    some = True
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error
        if not some:
            yield schema.empty_table()


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = "no such file" if not path.exists() else str(error).splitlines()[0]
    return DataError(f"cannot read cells from {path}: {reason}")


def alike(tables: pa.Table | Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Pass tables on, checking each against the first.

    Raises
    ------
    DataError
        If columns or classes differ, or there is no table.
    """
    first = None
    for table in [tables] if isinstance(tables, pa.Table) else tables:
        if first is None:
            first = table.slice(0, 0)
        else:
            check_alike(first, table)
        yield table
    if first is None:
        raise DataError("there is no table of cells to write")


def write_csv(path: str | Path, tables: pa.Table | Iterable[pa.Table]) -> None:
    """Write cells as CSV without outlines and embeddings, atomically.

    Parameters
    ----------
    path : str or Path
        Final place; an existing file is replaced.
    tables : pyarrow.Table or iterable of them
        From `celltyper.cells.table.cells_table` or `iter_cells`. Memory holds one at a time.

    Raises
    ------
    DataError
        If the tables differ in columns or classes, there is none, or the folder is not writable.
    RunError
        If the disk is full.
    """
    with atomic_path(path) as temporary, ExitStack() as stack:
        file = None
        for table in alike(tables):
            flat = table.select([n for n in table.column_names if n not in ("outline", EMBEDDING)])
            for i, field in enumerate(flat.schema):
                if pa.types.is_dictionary(field.type):
                    flat = flat.set_column(i, field.name, flat[field.name].cast(pa.string()))
            if file is None:
                file = stack.enter_context(pyarrow.csv.CSVWriter(temporary, flat.schema))
            file.write_table(flat)
