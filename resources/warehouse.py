"""The warehouse: one DuckDB file with the tables of `tables`, replaced partition by partition.

DuckDB lets one process write and nobody read meanwhile, so every access queues on a file lock, opens the file briefly
and closes it again; no model work may happen in between. A partition is replaced as a whole in one transaction: readers
see the old rows or the new ones, a killed run leaves the old ones.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from excise.errors import ExciseError
from resources.locks import file_lock
from resources.tables import TABLES, Table

if TYPE_CHECKING:
    import duckdb
    import polars as pl

FILE = "excise.duckdb"


class Warehouse(dg.ConfigurableResource):
    """Reads and replaces partitions of the tables in `<folder>/excise.duckdb`."""

    folder: str = Field(description="Folder of all results; EXCISE_DATA sets it.")
    wait_seconds: float = Field(default=60.0, description="How long to wait for another process that holds the file.")

    @property
    def path(self) -> Path:
        return Path(self.folder).absolute() / FILE

    def replace_partition(self, table: str, frame: pl.DataFrame, keys: Mapping[str, str | None]) -> None:
        """Replace the rows of `table` whose key columns equal `keys` by `frame`, in one transaction.

        `frame` has exactly the declared columns, in any order; `keys` maps the table's key columns to the partition
        (None stands for null). Raises ValueError where `frame` or `keys` do not fit the declaration, ExciseError
        where the file cannot be had.
        """
        declared = _declared(table)
        rows = _fitting(declared, frame, keys)
        where, values = _condition(declared, keys)
        with self._open(read_only=False) as connection:
            connection.execute("begin")
            _create_or_extend(connection, declared)
            connection.execute(f'delete from "{table}" where {where}', values)
            connection.register("rows_to_insert", rows.to_arrow())
            connection.execute(f'insert into "{table}" by name select * from rows_to_insert')
            connection.execute("commit")

    def read(self, table: str, **where: str | Sequence[str] | None) -> pl.DataFrame:
        """The rows of `table` whose columns equal the given values (a list: any of them), in no particular order.

        A table or file that does not exist yet has no rows. Columns and types are those declared.
        """
        import polars as pl

        declared = _declared(table)
        condition, values = _condition(declared, where)
        if not self.path.exists():
            return pl.DataFrame(schema=declared.schema)
        with self._open(read_only=True) as connection:
            present = _present(connection, declared)
            if not present:
                return pl.DataFrame(schema=declared.schema)
            chosen = ", ".join(f'"{name}"' if name in present else f'null as "{name}"' for name in declared.names)
            missing = [name for name in where if name not in present]
            if missing:
                raise ExciseError(f"{self.path}: table {table} has no column {', '.join(missing)} yet")
            frame = connection.execute(f'select {chosen} from "{table}" where {condition}', values).pl()
        return frame.cast(dict(declared.schema))

    @contextmanager
    def _open(self, *, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        with file_lock(self.path.with_suffix(".lock"), what=f"the warehouse {self.path}", timeout=self.wait_seconds):
            connection = _connect(self.path, read_only=read_only, wait_seconds=self.wait_seconds)
            try:
                yield connection
            finally:
                connection.close()  # an open transaction is rolled back


def _connect(path: Path, *, read_only: bool, wait_seconds: float) -> duckdb.DuckDBPyConnection:
    """Open the file, waiting for a foreign process (a DuckDB shell, a notebook) that holds it outside our queue."""
    import duckdb

    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            return duckdb.connect(path, read_only=read_only)
        except duckdb.IOException as error:
            holder = re.search(r"held in (.+?) \(PID (\d+)\)", str(error))
            if holder is None:
                raise ExciseError(_unreadable(path, str(error))) from error
            if time.monotonic() > deadline:
                raise ExciseError(
                    f"{path}: locked for more than {wait_seconds:g} s by process {holder[2]} ({holder[1]}); "
                    "close the DuckDB session or notebook that has it open, then run this again"
                ) from error
            time.sleep(0.1)
        except duckdb.Error as error:
            raise ExciseError(_unreadable(path, str(error))) from error


def _unreadable(path: Path, message: str) -> str:
    reason = message.strip().splitlines()[0]
    if "newer" in message or "version number" in message:
        return (
            f"{path}: was written by a newer DuckDB than the one installed ({reason}); install that version, or move "
            "the file away and materialize again"
        )
    return f"{path}: cannot be opened as a DuckDB file ({reason}); check its permissions, or move the file away"


def _declared(table: str) -> Table:
    if table not in TABLES:
        raise ValueError(f"no table {table!r} is declared in resources/tables.py; there are {', '.join(TABLES)}")
    return TABLES[table]


def _fitting(table: Table, frame: pl.DataFrame, keys: Mapping[str, str | None]) -> pl.DataFrame:
    """`frame` in the declared types and order of columns; ValueError where it does not fit."""
    import polars as pl

    if set(keys) != set(table.keys):
        raise ValueError(f"table {table.name}: a partition is told by {', '.join(table.keys)}, not {', '.join(keys)}")
    lacking = [name for name in table.names if name not in frame.columns]
    unknown = [name for name in frame.columns if name not in table.names]
    if lacking or unknown:
        raise ValueError(f"table {table.name}: the frame lacks {lacking} and has undeclared {unknown}")
    rows = frame.select(pl.col(name).cast(type_) for name, type_ in table.schema.items())
    for key, value in keys.items():
        if not rows[key].eq_missing(pl.Series([value], dtype=rows[key].dtype)).all():
            raise ValueError(f"table {table.name}: the frame has rows whose {key} is not {value!r}")
    return rows


def _condition(table: Table, where: Mapping[str, str | Sequence[str] | None]) -> tuple[str, list]:
    parts, values = ["true"], []
    for name, value in where.items():
        if name not in table.names:
            raise ValueError(f"table {table.name} has no column {name!r}")
        if value is None:
            parts.append(f'"{name}" is null')
        elif isinstance(value, str | int | float | bool):
            parts.append(f'"{name}" = ?')
            values.append(value)
        else:
            parts.append(f'"{name}" in (select unnest(?))')
            values.append(list(value))
    return " and ".join(parts), values


def _present(connection: duckdb.DuckDBPyConnection, table: Table) -> set[str]:
    """The columns the table has in the file; empty where there is no such table."""
    query = "select column_name from information_schema.columns where table_schema = 'main' and table_name = ?"
    return {name for (name,) in connection.execute(query, [table.name]).fetchall()}


def _create_or_extend(connection: duckdb.DuckDBPyConnection, table: Table) -> None:
    present = _present(connection, table)
    if not present:
        columns = ", ".join(f'"{column.name}" {column.type}' for column in table.columns)
        connection.execute(f'create table "{table.name}" ({columns})')
        return
    for column in table.columns:
        if column.name not in present:
            connection.execute(f'alter table "{table.name}" add column "{column.name}" {column.type}')
