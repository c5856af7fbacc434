"""The warehouse: partitions are replaced whole, nothing is lost between processes, and mistakes are named."""

import re
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


def test_a_foreign_session_that_is_waited_for_is_named_meanwhile(warehouse, foreign_session, monkeypatch, caplog):
    monkeypatch.setattr("resources.warehouse.NOTICE_AFTER", 0.1)
    with pytest.raises(ExciseError):
        warehouse.read("checks")
    (notice,) = caplog.messages
    assert f"held by process {foreign_session.pid} " in notice


@pytest.mark.trial(28)
@pytest.mark.parametrize(("theirs", "ours"), [(False, "read"), (True, "write")])
def test_another_connection_of_this_process_is_to_be_closed(warehouse, theirs, ours):
    """As a notebook has it that looks at the results: DuckDB refuses a second one that is configured otherwise."""
    rows = checks_of("a", ["one"])
    warehouse.replace_partition("checks", rows, partition("a"))
    act = {
        "read": lambda: warehouse.read("checks"),
        "write": lambda: warehouse.replace_partition("checks", rows, partition("a")),
    }[ours]
    with duckdb.connect(warehouse.path, read_only=theirs) as connection:
        with pytest.raises(ExciseError, match=r"same process; close your connection \(con\.close\(\)\)") as refused:
            act()
        assert not harmful(str(refused.value))
        assert connection.execute("select count(*) from checks").fetchone() == (1,)
    act()


@pytest.mark.trial(28)
def test_a_connection_under_another_name_of_the_folder_is_seen_too(warehouse, tmp_path):
    warehouse.replace_partition("checks", checks_of("a", ["one"]), partition("a"))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with duckdb.connect(tmp_path / "link" / "excise.duckdb"), pytest.raises(ExciseError, match="close your connection"):
        warehouse.read("checks")


def harmful(message: str) -> bool:
    """Whether somebody who follows the advice could lose a file that is in use."""
    return re.search(r"\b(mov|delet|remov|renam)", message) is not None


@pytest.mark.trial(28)
@pytest.mark.parametrize("content", [b"not a database", b"", b"\0" * 20000, "damaged", "cut"])
def test_a_file_that_cannot_be_opened_is_never_to_be_moved_or_deleted(warehouse, content):
    if content in ("damaged", "cut"):
        warehouse.replace_partition("checks", checks_of("a", [str(i) for i in range(5000)]), partition("a"))
        whole = bytearray(warehouse.path.read_bytes())
        whole[16] ^= 255
        content = bytes(whole[:1000] if content == "cut" else whole)
    warehouse.path.parent.mkdir(exist_ok=True)
    warehouse.path.write_bytes(content)
    with pytest.raises(ExciseError, match=r"excise\.duckdb: is (no DuckDB database|damaged).*EXCISE_DATA") as refused:
        warehouse.read("checks")
    assert not harmful(str(refused.value))
    assert warehouse.path.read_bytes() == content


@pytest.mark.trial(28)
@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (
            "IO Error: Trying to read a database file with version number 99, but we can only read versions between 64 "
            "and 67.\nThe database file was created with DuckDB version v9.",
            "another version of DuckDB .* install",
        ),
        ("TransactionContext Error: Failed to commit: Could not write file: No space left on device", "disk is full"),
        ("IO Error: Cannot open file: Permission denied", "see that you may read and write"),
        ("IO Error: Cannot open file: Read-only file system", "see that you may read and write"),
        ("IO Error: Something new", "Something new"),
    ],
)
def test_what_duckdb_says_is_told_with_what_to_do(warehouse, monkeypatch, said, meant):
    def refuse(*_, **__):
        raise duckdb.IOException(said)

    warehouse.replace_partition("checks", checks_of("a", ["one"]), partition("a"))
    monkeypatch.setattr(duckdb, "connect", refuse)
    with pytest.raises(ExciseError, match=meant) as refused:
        warehouse.read("checks")
    assert not harmful(str(refused.value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("said", "holder"),
    [
        ('Could not set lock on file "x": Conflicting lock is held in /usr/bin/duckdb (PID 7)', "7 (/usr/bin/duckdb)"),
        ('Could not set lock on file "x": Conflicting lock is held in PID 7 by user eve', "process 7"),
        ('Could not set lock on file "x": No locks available', "another process (Could not set lock"),
    ],
)
def test_who_holds_the_file_is_told_as_far_as_duckdb_knows(said, holder):
    from resources.warehouse import _holder

    assert holder in _holder(said)


def test_a_warehouse_appears_when_it_is_whole(warehouse, monkeypatch):
    """A process that is killed, or a disk that is full, while the file is made leaves none that cannot be opened."""
    connect = duckdb.connect

    def break_off(path, **options):
        connect(path).close()
        path.write_bytes(path.read_bytes()[:5000])
        raise duckdb.IOException("No space left on device")

    monkeypatch.setattr(duckdb, "connect", break_off)
    with pytest.raises(ExciseError, match="the disk is full"):
        warehouse.replace_partition("checks", checks_of("a", ["one"]), partition("a"))
    monkeypatch.undo()
    assert [path.name for path in warehouse.path.parent.iterdir()] == ["excise.lock"]
    warehouse.replace_partition("checks", checks_of("a", ["one"]), partition("a"))
    assert warehouse.read("checks").height == 1


def test_a_full_disk_leaves_what_was_stored(warehouse):
    """A process may write no more than so many bytes to a file, which is how a full disk looks to DuckDB."""
    warehouse.replace_partition("checks", checks_of("a", ["old"]), partition("a"))
    code = """
import resource, sys
import polars as pl
from resources.tables import TABLES
from resources.warehouse import Warehouse
from excise.errors import ExciseError
keys = {"asset": "completions", "model": "a", "scenario": "s"}
rows = [keys | {"check_name": str(hash(str(number))), "passed": True} for number in range(200000)]
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    Warehouse(folder=sys.argv[1]).replace_partition("checks", pl.DataFrame(rows, schema=TABLES["checks"].schema), keys)
except ExciseError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code, warehouse.folder], cwd=ROOT, capture_output=True, text=True)
    assert "What was stored before is as it was" in told.stdout, told.stderr
    assert not harmful(told.stdout)
    assert warehouse.read("checks")["check_name"].to_list() == ["old"]


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
    with pytest.raises(ExciseError, match="is no DuckDB database; set EXCISE_DATA"):
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
