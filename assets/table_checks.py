"""The check that holds stored tables against their declarations: columns that lack nothing, rows told apart by keys.

There is nothing to add here for a new table: what is asked of it stands in `resources.tables`.
"""

from collections.abc import Mapping

import polars as pl

from assets.checks import ERROR, Outcome, unmet_expectations
from resources.tables import TABLES, Table

DECLARED = "rows_as_declared"


def rows_as_declared(stored: Mapping[str, pl.DataFrame]) -> Outcome:
    """Whether the rows that a partition's run stored, by table, are as the tables' declarations say."""
    import great_expectations.expectations as gxe

    figures = pl.DataFrame(
        [row for name, rows in stored.items() for row in faults(TABLES[name], rows)],
        schema={"table": pl.String, "fault": pl.String, "rows": pl.Int64},
        orient="row",
    )
    unmet = unmet_expectations(
        figures,
        [
            gxe.ExpectTableRowCountToBeBetween(min_value=1),
            gxe.ExpectColumnValuesToNotBeNull(column="rows"),
            gxe.ExpectColumnValuesToBeBetween(column="rows", min_value=0, max_value=0),
        ],
    )
    faulty = figures.filter(pl.col("rows") > 0)
    counted = ", ".join(f"{name}: {rows.height:,} rows" for name, rows in stored.items())
    lines = [f"{table}: {rows:,} rows {fault}" for table, fault, rows in faulty.iter_rows()]
    message = f"Not as declared: {'; '.join(lines)}." if lines else f"As declared ({counted})."
    worst = lines[0] if lines else None
    return Outcome(
        DECLARED, not unmet, ERROR, message, float(faulty["rows"].sum()), 0.0, worst, faulty.to_dicts(), unmet
    )


def faults(table: Table, rows: pl.DataFrame) -> list[tuple[str, str, int]]:
    """Table, fault and number of rows that have it, for everything the declaration forbids; 0 where it is kept."""
    # The warehouse keeps what is not a number as null.
    known = rows.select(table.names).with_columns(pl.col(pl.Float64).fill_nan(None))
    counts = [
        (f"without {column.name}", known[column.name].null_count()) for column in table.columns if not column.optional
    ]
    keys = [*table.keys, *table.rows]
    twice = rows.height - rows.select(keys).unique().height
    counts.append((f"twice ({', '.join(keys)})", twice))
    if table.filled:
        counts.append(("lacking, as there are none", int(rows.is_empty())))
    return [(table.name, fault, count) for fault, count in counts]
