"""The warehouse: one DuckDB file with the tables of `tables`, replaced partition by partition.

DuckDB lets one process write and nobody read meanwhile, so every access queues on a file lock, opens the file briefly
and closes it again; no model work may happen in between. A partition is replaced as a whole in one transaction: readers
see the old rows or the new ones, a killed run leaves the old ones.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from excise.errors import ExciseError
from resources.artifacts import data_root
from resources.locks import file_lock
from resources.tables import TABLES, Table

if TYPE_CHECKING:
    import duckdb
    import polars as pl

FILE = "excise.duckdb"
NOTICE_AFTER = 2.0
"""Seconds another process may hold the file before a message says so."""


class Warehouse(dg.ConfigurableResource):
    """Reads and replaces partitions of the tables in `<folder>/excise.duckdb`."""

    folder: str = Field(description="Folder of all results; EXCISE_DATA sets it.")
    wait_seconds: float = Field(default=60.0, description="How long to wait for another process that holds the file.")

    @property
    def path(self) -> Path:
        return data_root(self.folder) / FILE

    def check(self) -> None:
        """Open the file, which is made where it lacks, before long work. Raises ExciseError where it cannot be had."""
        with self._open(read_only=False):
            pass

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
            import duckdb

            if not self.path.exists():
                _create(self.path)
            connection = _connect(self.path, read_only=read_only, wait_seconds=self.wait_seconds)
            try:
                try:
                    yield connection
                finally:
                    connection.close()  # an open transaction is rolled back
            except (duckdb.IOException, duckdb.TransactionException, duckdb.FatalException) as error:
                raise ExciseError(_refusal(self.path, str(error))) from error


def _create(path: Path) -> None:
    """An empty warehouse that appears under its name when it is whole."""
    import duckdb

    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        duckdb.connect(unfinished).close()
        unfinished.rename(path)
    except (duckdb.Error, OSError) as error:
        raise ExciseError(_refusal(path, str(error))) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _connect(path: Path, *, read_only: bool, wait_seconds: float) -> duckdb.DuckDBPyConnection:
    """Open the file, waiting for a foreign process (a DuckDB shell, a notebook) that holds it outside our queue."""
    import duckdb

    began, noticed = time.monotonic(), False
    while True:
        try:
            return duckdb.connect(path, read_only=read_only)
        except duckdb.Error as error:
            message = str(error)
            if "Could not set lock" not in message:
                raise ExciseError(_refusal(path, message)) from error
            waited, holder = time.monotonic() - began, _holder(message)
            if waited > wait_seconds:
                raise ExciseError(
                    f"{path}: locked for more than {wait_seconds:g} s by {holder}; close the DuckDB session or "
                    "notebook that has it open (con.close()), then run this again"
                ) from error
            if waited > NOTICE_AFTER and not noticed:
                logging.getLogger("excise").warning(
                    "%s is held by %s; waiting up to %g s for it", path, holder, wait_seconds
                )
                noticed = True
            time.sleep(0.1)


def _holder(message: str) -> str:
    """The process that DuckDB says holds the lock, as far as it can tell."""
    holder = re.search(r"held in (.+?) \(PID (\d+)\)", message)
    if holder is not None:
        return f"process {holder[2]} ({holder[1]})"
    number = re.search(r"PID (\d+)", message)
    return f"process {number[1]}" if number is not None else f"another process ({_reason(message)})"


def _refusal(path: Path, message: str) -> str:
    """What DuckDB's message means and what to do about it. The file may be in use, so it is never to be moved."""
    elsewhere = "set EXCISE_DATA to another folder"
    busy = (
        "is open in another connection of this same process; close your connection (con.close()), then run this again"
    )
    damaged = (
        "is damaged, or a copy that was made while the original was in use; copy it again while nothing uses it, "
        f"restore it, or {elsewhere}"
    )
    for words, meaning in (
        ("different configuration than existing", busy),
        ("already attached", busy),
        (
            "version number",
            f"was written by another version of DuckDB than the one installed; install that version, or {elsewhere}",
        ),
        (
            "not a valid DuckDB",
            f"is no DuckDB database; {elsewhere}, or restore the file from a copy",
        ),
        ("Corrupt", damaged),
        ("Could not read enough bytes", damaged),
        ("No space left", "the disk is full; free space and run this again. What was stored before is as it was"),
        ("File too large", "the file may not grow; raise the limit on its size. What was stored before is as it was"),
    ):
        if words in message:
            return f"{path}: {meaning} ({_reason(message)})"
    return (
        f"{path}: cannot be opened or written ({_reason(message)}); see that you may read and write this file and its "
        f"folder, or {elsewhere}"
    )


def _reason(message: str) -> str:
    return message.strip().splitlines()[0]


def _declared(table: str) -> Table:
    if table not in TABLES:
        raise ValueError(f"no table {table!r} is declared in resources/tables; there are {', '.join(TABLES)}")
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
    # SQL takes NaN for the largest of all numbers, and a mean with it is NaN: what is not defined is null.
    rows = rows.with_columns(pl.when(pl.col(pl.Float64).is_finite()).then(pl.col(pl.Float64)))
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
