"""How a table of the warehouse is declared: its columns, what tells its partitions and its rows apart.

The warehouse, the documentation, the schema that the UI shows and the check `rows_as_declared` are made of a
declaration. Which tables there are is said in the modules beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Column:
    """A column: its DuckDB type and what it holds, with the unit where there is one; `optional` if it may be null."""

    name: str
    type: str
    description: str
    optional: bool = False


@dataclass(frozen=True)
class Table:
    """A table. `keys` are the columns that tell a partition's rows from the rest, `rows` those that tell the rows of a
    partition apart (none: it has one row). A partition of a `filled` table has rows."""

    name: str
    description: str
    keys: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[str, ...] = ()
    filled: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """The polars types of the columns, in order."""
        import polars as pl

        types = {
            "VARCHAR": pl.String(),
            "BIGINT": pl.Int64(),
            "DOUBLE": pl.Float64(),
            "BOOLEAN": pl.Boolean(),
            "TIMESTAMP": pl.Datetime("us"),
            "BIGINT[]": pl.List(pl.Int64()),
        }
        return {column.name: types[column.type] for column in self.columns}
