"""A command's exit status: 0 only if all that was asked for has a figure; checks count where that is wished."""

import math

import polars as pl
import pytest

from excise.scenarios import load_scenarios
from resources.tables import TABLES
from resources.warehouse import Warehouse

SCENARIO = load_scenarios()[0]["purchase"].model_copy(update={"key": "lamp"})
FEW, UNDEFINED = "too few answers have a value", "it is undefined, though answers have values"
PLACE = {"model": "tiny", "scenario": "lamp"}


def rows(table: str, *given: dict) -> pl.DataFrame:
    schema = TABLES[table].schema
    return pl.DataFrame([dict.fromkeys(schema) | PLACE | row for row in given], schema=schema)


def answers(**values: list[float | None]) -> pl.DataFrame:
    """Answers about variations, one a name; the first half of each is about one group, the second about the other."""
    return rows(
        "completions",
        *(
            {"variation": variation, "group": group, "subject": f"{group} {name}", "value": value, "text": str(value)}
            for variation, some in values.items()
            for group, half in (("white", some[: len(some) // 2]), ("black", some[len(some) // 2 :]))
            for name, value in enumerate(half)
        ),
    )


def gaps(**estimates: float | None) -> pl.DataFrame:
    unpruned = {"strategy": "unpruned", "metric": "gap_mean"}
    found = ({"variation": variation, "estimate": value} | unpruned for variation, value in estimates.items())
    return rows("metrics", {"variation": "(all)", "estimate": 1.0} | unpruned, *found)


@pytest.fixture
def warehouse(tmp_path) -> Warehouse:
    made = Warehouse(folder=str(tmp_path))
    made.replace_partition("completions", answers(lamp=[1, None, 2, 3, 4, 5], bench=[5, 6, 7, None, 8, 9]), PLACE)
    made.replace_partition("metrics", gaps(lamp=-2.0, bench=0.0), PLACE)
    return made


def conclude(warehouse: Warehouse, *, evaluated: bool = True, failed: bool = False, fail_on: str | None = None) -> int:
    from pipelines.verdict import conclude as concluded

    keys = ["lamp"] if evaluated else []
    return concluded(warehouse, "tiny", [SCENARIO], evaluated=keys, failed=failed, fail_on=fail_on)


@pytest.mark.trial(41)
def test_all_that_was_asked_for_is_there(warehouse, capsys):
    assert conclude(warehouse, fail_on="checks") == 0
    assert capsys.readouterr().err == ""
    assert conclude(warehouse, failed=True) == 1


@pytest.mark.trial(41)
@pytest.mark.parametrize(
    ("answered", "measured", "evaluated", "message"),
    [
        # One name alone of a group has a value, whatever the metrics say.
        (answers(lamp=[1, 2, 3, 4], bench=[5, 6, 7, None]), gaps(lamp=1.0, bench=1.0), True, f"bench ({FEW})"),
        (answers(lamp=[1, 2, 3, 4], bench=[5, 6, 7, None]), gaps(), False, f"bench ({FEW})"),
        (answers(lamp=[None] * 4, bench=[None] * 4), gaps(), True, f"lamp, bench ({FEW})"),
        # Names enough have values, and the gap is undefined all the same.
        (answers(lamp=[1, 2, 3, 4], bench=[5, 6, 7, 8]), gaps(lamp=1.0, bench=None), True, f"bench ({UNDEFINED})"),
        (answers(lamp=[1, 2, 3, 4], bench=[5, 6, 7, 8]), gaps(lamp=1.0, bench=math.nan), True, f"bench ({UNDEFINED})"),
        (answers(lamp=[1, 2, 3, 4], bench=[5, 6, 7, 8]), gaps(lamp=1.0, bench=math.inf), True, f"bench ({UNDEFINED})"),
        (
            answers(lamp=[1, 2, 3, 4], bench=[None] * 4),
            gaps(lamp=None),
            True,
            f"bench ({FEW}); tiny|lamp has no gap for lamp ({UNDEFINED})",
        ),
    ],
)
def test_what_has_no_figure_is_named_in_one_line(warehouse, capsys, answered, measured, evaluated, message):
    warehouse.replace_partition("completions", answered, PLACE)
    warehouse.replace_partition("metrics", measured, PLACE)
    assert conclude(warehouse, evaluated=evaluated) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"Not everything asked for was computed: tiny|lamp has no gap for {message}."


def test_continuations_are_judged_by_their_bias(warehouse):
    biased = gaps(lamp=0.1, bench=0.2).with_columns(metric=pl.lit("toxicity_bias"))
    warehouse.replace_partition("metrics", biased, PLACE)
    assert conclude(warehouse) == 0


@pytest.mark.trial(41)
@pytest.mark.parametrize(
    ("severity", "fail_on", "status"),
    [
        ("WARN", None, 0),
        ("ERROR", None, 0),
        ("WARN", "checks", 3),
        ("ERROR", "checks", 3),
        ("WARN", "errors", 0),
        ("ERROR", "errors", 3),
    ],
)
def test_failing_checks_count_where_that_is_asked_for(warehouse, capsys, severity, fail_on, status):
    check = {"asset": "completions", "check_name": "parse_rate", "severity": severity, "message": "too few"}
    found = rows("checks", check | {"passed": False}, check | {"check_name": "other", "passed": True})
    warehouse.replace_partition("checks", found, {"asset": "completions"} | PLACE)
    assert conclude(warehouse, fail_on=fail_on) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"Check parse_rate of completions, tiny|lamp ({severity}): too few"
    assert conclude(warehouse, failed=True, fail_on=fail_on) == 1


@pytest.mark.trial(26)
def test_what_cannot_be_judged_is_explained_once(warehouse, capsys):
    """Two lines for standard output; the check that says so at length is not told a second time, and counts."""
    from pipelines.verdict import unjudged

    assert unjudged(warehouse, "tiny", [SCENARIO]) == []
    few = answers(lamp=[1, 2, 3, 4], bench=[5, 6, 7, None])
    warehouse.replace_partition("completions", few.with_columns(split=pl.lit("")), PLACE)
    empty, first, second = unjudged(warehouse, "tiny", [SCENARIO])
    assert empty == ""
    assert first.startswith("tiny|lamp: 1 of 2 variations cannot be judged, the other 1 is judged; ")
    assert second.startswith("What helps: ")
    long = {"check_name": "judged_variations", "severity": "WARN", "message": "long", "passed": False}
    for asset in ("completions", "evaluation_metrics"):
        place = {"asset": asset} | PLACE
        warehouse.replace_partition("checks", rows("checks", long | place), place)
    assert conclude(warehouse, fail_on="checks") == 1
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in told] == [
        "Not everything asked for was computed",
        "Check judged_variations of evaluation_metrics, tiny|lamp (WARN)",
    ]
