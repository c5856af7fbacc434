"""Tables are held against their declarations: what lacks, what is there twice, what is empty."""

import polars as pl
import pytest

from assets.table_checks import faults, rows_as_declared
from resources.tables import TABLES, Column, Table

SCORES = Table(
    "scores",
    "Scores of two names.",
    keys=("model",),
    rows=("name",),
    columns=(
        Column("model", "VARCHAR", "the model"),
        Column("name", "VARCHAR", "the name"),
        Column("score", "DOUBLE", "its score"),
        Column("low", "DOUBLE", "its lower bound", optional=True),
    ),
    filled=True,
)


def scores(*rows: tuple[str | None, float | None, float | None]) -> pl.DataFrame:
    return pl.DataFrame([("m", *row) for row in rows], schema=SCORES.schema, orient="row")


def found(rows: pl.DataFrame) -> dict[str, int]:
    return {fault: count for _, fault, count in faults(SCORES, rows) if count}


def test_rows_as_declared_have_no_fault_though_an_optional_column_lacks_values():
    assert found(scores(("Amy", 1.0, None), ("Luke", 2.0, 1.5))) == {}


@pytest.mark.parametrize(
    ("rows", "faulty"),
    [
        ([("Amy", 1.0, None), (None, 2.0, None)], {"without name": 1}),
        ([("Amy", None, 0.0), ("Luke", float("nan"), 0.0)], {"without score": 2}),  # kept as null
        ([("Amy", 1.0, 0.0), ("Amy", 1.5, 0.0), ("Luke", 2.0, 0.0)], {"twice (model, name)": 1}),
        ([], {"lacking, as there are none": 1}),
    ],
)
def test_a_fault_is_counted_by_what_was_declared(rows, faulty):
    assert found(scores(*rows)) == faulty


def test_the_check_names_table_and_fault():
    names = ("asset", "model", "scenario")
    row = dict.fromkeys(TABLES["thresholds"].names, 0.5) | dict.fromkeys(names, "a")
    good = pl.DataFrame([row], schema=TABLES["thresholds"].schema)
    outcome = rows_as_declared({"thresholds": good})
    assert outcome.passed
    assert outcome.message == "As declared (thresholds: 1 rows)."
    bad = good.with_columns(kl_budget=pl.lit(None, pl.Float64))
    outcome = rows_as_declared({"thresholds": good, "checks": pl.DataFrame(schema=TABLES["checks"].schema)})
    assert outcome.passed
    outcome = rows_as_declared({"thresholds": bad})
    assert not outcome.passed
    assert (outcome.figure, outcome.bound, outcome.worst) == (1.0, 0.0, "thresholds: 1 rows without kl_budget")
    assert outcome.unmet


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_what_tells_rows_apart_are_columns_of_the_table(table):
    assert {*table.keys, *table.rows} <= set(table.names)
    assert len(set(table.names)) == len(table.names)
    assert not [column.name for column in table.columns if column.optional and column.name in table.keys]
