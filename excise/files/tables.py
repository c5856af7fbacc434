"""Files of rows (Parquet) that appear under their names only when they are whole, as work is kept to be used again.

Here is how such files are written and read, whatever their folder is called. What is in them, and what they are named
by, is decided where it is computed. Tensors are kept by `excise.files.tensors`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import polars as pl
from polars.datatypes import DataType, DataTypeClass

from excise.errors import ExciseError
from excise.files.tensors import NO_ROOM

Schema: TypeAlias = dict[str, DataType | DataTypeClass]
"""The columns of a table and their types."""


def save_table(path: Path, rows: pl.DataFrame) -> None:
    """Write rows as Parquet, in full or not at all; folders are made where they lack.

    Raises ExciseError, naming the file, where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            rows.write_parquet(file)
        os.replace(partial, path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ExciseError(f"{path}: cannot be written ({_first_line(error)}); {NO_ROOM}") from error
    finally:
        with suppress(OSError):  # it has its name by now, or there never was a folder for it
            partial.unlink()


def read_table(path: Path, columns: Iterable[str] | None = None) -> pl.DataFrame:
    """Read a file that `save_table` has written: some columns of it, or all.

    Raises ExciseError, saying whether the file is out of reach or damaged.
    """
    try:
        # Given a name, polars takes brackets and stars in it for a pattern; an open file has none.
        with path.open("rb") as file:
            return pl.read_parquet(file, columns=None if columns is None else list(columns))
    except OSError as error:
        raise ExciseError(f"{path}: cannot be read ({error}); mend its permissions or the disk") from error
    except pl.exceptions.ColumnNotFoundError as error:
        raise ExciseError(
            f"{path}: {_first_line(error)}; another version of Excise wrote it: use that one, or another EXCISE_DATA"
        ) from error
    except pl.exceptions.PolarsError as error:
        raise ExciseError(
            f"{path}: is damaged ({_first_line(error)}); delete this file, and what was in it is made again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip("; ")
