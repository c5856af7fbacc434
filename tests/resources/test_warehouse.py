"""The warehouse: partitions are replaced whole, nothing is lost between processes, and mistakes are named."""

import subprocess
import sys
from pathlib import Path

import duckdb
import polars as pl
import pytest

from excise.errors import ExciseError
from resources.tables import TABLES, Column, Table
from resources.warehouse import Warehouse

ROOT = Path(__file__).resolve().parents[2]


def checks_of(model: str, names: list[str], *, passed: bool = True) -> pl.DataFrame:
    """Rows of the table `checks` for one partition."""
    return pl.DataFrame(
        [partition(model) | {"check_name": name, "passed": passed} for name in names],
        schema=TABLES["checks"].schema,
    )


def partition(model: str) -> dict[str, str]:
    return {"asset": "completions", "model": model, "scenario": "s"}


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(folder=str(tmp_path / "data"), wait_seconds=0.3)


def test_a_partition_is_replaced_and_the_others_stay(warehouse):
    warehouse.replace_partition("checks", checks_of("a", ["one", "two"]), partition("a"))
    warehouse.replace_partition("checks", checks_of("b", ["one"]), partition("b"))
    warehouse.replace_partition("checks", checks_of("a", ["three"]), partition("a"))
    assert sorted(warehouse.read("checks").select("model", "check_name").rows()) == [("a", "three"), ("b", "one")]


def test_columns_are_matched_by_name_and_typed_as_declared(warehouse):
    frame = checks_of("a", ["one"]).select(reversed(TABLES["checks"].names))
    warehouse.replace_partition("checks", frame, partition("a"))
    read = warehouse.read("checks")
    assert dict(read.schema) == TABLES["checks"].schema
    assert read["check_name"].to_list() == ["one"]


def test_lists_of_tokens_survive(warehouse):
    schema = TABLES["completions"].schema
    row = dict.fromkeys(schema) | {"model": "m", "scenario": "s", "token_ids": [5, 6, 1]}
    warehouse.replace_partition("completions", pl.DataFrame([row], schema=schema), {"model": "m", "scenario": "s"})
    assert warehouse.read("completions")["token_ids"].to_list() == [[5, 6, 1]]


def test_a_null_key_is_a_partition_of_its_own(warehouse):
    rows = checks_of("a", ["one"]).with_columns(model=pl.lit(None, pl.String))
    for _ in range(2):
        warehouse.replace_partition("checks", rows, partition("a") | {"model": None})
    assert warehouse.read("checks", model=None).height == 1


def test_an_empty_frame_empties_the_partition(warehouse):
    warehouse.replace_partition("checks", checks_of("a", ["one"]), partition("a"))
    warehouse.replace_partition("checks", checks_of("a", []), partition("a"))
    assert warehouse.read("checks").is_empty()


def test_what_was_never_written_has_no_rows(warehouse):
    assert warehouse.read("metrics").schema == pl.Schema(TABLES["metrics"].schema)
    warehouse.replace_partition("checks", checks_of("a", ["one"]), partition("a"))
    assert warehouse.read("metrics", model="a").is_empty()


def test_reading_filters_by_value_and_by_list(warehouse):
    for model in "abc":
        warehouse.replace_partition("checks", checks_of(model, ["one"]), partition(model))
    assert warehouse.read("checks", model="b").height == 1
    assert warehouse.read("checks", model=["a", "c"], scenario="s").height == 2
    assert warehouse.read("checks", model=[]).is_empty()


@pytest.mark.parametrize(
    ("frame", "keys", "message"),
    [
        (checks_of("a", ["one"]).drop("worst"), partition("a"), "lacks"),
        (checks_of("a", ["one"]).with_columns(extra=pl.lit(1)), partition("a"), "undeclared"),
        (checks_of("a", ["one"]), partition("b"), "whose model is not 'b'"),
        (checks_of("a", ["one"]), {"model": "a"}, "told by asset, model, scenario"),
    ],
)
def test_rows_that_do_not_fit_are_refused(warehouse, frame, keys, message):
    with pytest.raises(ValueError, match=message):
        warehouse.replace_partition("checks", frame, keys)
    assert warehouse.read("checks").is_empty()


def test_a_failed_insert_leaves_the_old_rows(warehouse, tmp_path):
    warehouse.replace_partition("checks", checks_of("a", ["old"]), partition("a"))
    with duckdb.connect(warehouse.path) as connection:
        connection.execute("alter table checks add column must integer default 1")
        connection.execute("alter table checks alter column must set not null")
        connection.execute("alter table checks alter column must drop default")
    with pytest.raises(duckdb.ConstraintException):
        warehouse.replace_partition("checks", checks_of("a", ["new"]), partition("a"))
    assert warehouse.read("checks")["check_name"].to_list() == ["old"]


def test_a_table_of_an_earlier_version_gains_the_new_column(warehouse, monkeypatch):
    old = TABLES["checks"]
    short = Table(old.name, old.description, old.keys, tuple(c for c in old.columns if c.name != "worst"))
    monkeypatch.setitem(TABLES, "checks", short)
    warehouse.replace_partition("checks", checks_of("a", ["one"]), partition("a"))
    monkeypatch.setitem(TABLES, "checks", old)
    assert warehouse.read("checks")["worst"].to_list() == [None]
    warehouse.replace_partition("checks", checks_of("b", ["one"]).with_columns(worst=pl.lit("here")), partition("b"))
    assert set(warehouse.read("checks")["worst"]) == {None, "here"}


def test_three_processes_lose_nothing(warehouse):
    writer = """
import sys
import polars as pl
from resources.tables import TABLES
from resources.warehouse import Warehouse
warehouse = Warehouse(folder=sys.argv[1])
for number in range(15):
    model = f"{sys.argv[2]}-{number}"
    row = {"asset": "completions", "check_name": "one", "model": model, "scenario": "s", "passed": True}
    keys = {"asset": "completions", "model": model, "scenario": "s"}
    warehouse.replace_partition("checks", pl.DataFrame([row], schema=TABLES["checks"].schema), keys)
    assert warehouse.read("checks", model=model).height == 1
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", writer, warehouse.folder, str(number)], cwd=ROOT) for number in range(3)
    ]
    assert [each.wait(timeout=120) for each in writers] == [0, 0, 0]
    assert warehouse.read("checks")["model"].n_unique() == 45


@pytest.fixture
def foreign_session(warehouse):
    """A process that opens the file outside the queue, as a DuckDB shell or a notebook would."""
    warehouse.replace_partition("checks", checks_of("a", ["one"]), partition("a"))
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(warehouse.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"open\n"
    yield process
    process.stdin.close()
    process.wait(timeout=30)


def test_a_foreign_session_is_named(warehouse, foreign_session):
    with pytest.raises(ExciseError, match=rf"locked .* by process {foreign_session.pid}.*close the DuckDB"):
        warehouse.read("checks")


def test_a_foreign_session_that_ends_in_time_is_waited_for(warehouse, foreign_session):
    patient = Warehouse(folder=warehouse.folder, wait_seconds=30)
    foreign_session.stdin.close()
    assert patient.read("checks").height == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    warehouse = Warehouse(folder=str(tmp_path / "file" / "data"))
    with pytest.raises(ExciseError, match=r"file/data: cannot be written .* EXCISE_DATA"):
        warehouse.replace_partition("checks", checks_of("a", []), partition("a"))


def test_a_file_that_is_no_warehouse_is_named(warehouse):
    warehouse.path.parent.mkdir()
    warehouse.path.write_text("not a database")
    with pytest.raises(ExciseError, match="cannot be opened as a DuckDB file"):
        warehouse.read("checks")


def test_every_type_declared_is_known_to_duckdb_and_polars():
    with duckdb.connect() as connection:
        for table in TABLES.values():
            assert list(table.schema) == list(table.names)
            assert set(table.keys) <= set(table.names)
            for column in table.columns:
                assert isinstance(column, Column)
                assert column.description
                connection.execute(f"select null::{column.type}")
