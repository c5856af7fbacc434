"""A stranger's outcome, the number of letters of an answer: one class, which an installed package names, and no other
line goes from the scenario's file to the metrics."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import polars as pl
import pytest
import yaml

from excise.evaluation.numbers import evaluate
from excise.outcomes import Answer, NumberOutcome, Outcome, Words, known_outcomes, outcome_of
from excise.scenarios import load_scenarios
from tests.conftest import SMALL_SCENARIO


class LengthOutcome(Outcome):
    """How many letters an answer has, up to `most`."""

    kind: Literal["length"] = "length"
    most: int = 1000

    words: ClassVar[Words] = Words(
        asks="asks for answers of a length", value="a length", valued="answers with a length", hold="have a length"
    )

    def values(self, answers: Sequence[Answer], judge: Any = None) -> list[float | None]:
        return [float(min(self.most, sum(map(str.isalnum, answer.text)))) for answer in answers]


class NumberAgain(NumberOutcome):
    """A kind that there is already."""


OUTCOME = {"kind": "length", "max_new_tokens": 6}
LENGTHS = SMALL_SCENARIO | {"title": "Lengths", "outcome": OUTCOME}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`installed(name, place)`: a package with an entry point of that name, as `pip install` would leave it."""

    def install(name: str = "length", place: str = f"{__name__}:LengthOutcome") -> None:
        package = tmp_path / "packages" / f"{name}-1.0.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (package / "entry_points.txt").write_text(f"[excise.outcomes]\n{name} = {place}\n")
        monkeypatch.syspath_prepend(package.parent)

    return install


def problems_of(folder, **outcome) -> list:
    """What is wrong with a file of that outcome, in words; the outcome itself where nothing is."""
    (folder / "words.yaml").write_text(yaml.safe_dump(LENGTHS | {"outcome": outcome}), encoding="utf-8")
    scenarios, problems = load_scenarios([folder])
    return [str(problem) for problem in problems] if problems else [scenarios["words"].outcome]


def test_an_installed_outcome_is_known_by_its_kind(installed, tmp_path):
    assert list(known_outcomes()) == ["number", "toxicity"]
    assert "outcome.kind is 'length': write number or toxicity" in problems_of(tmp_path, kind="length")[0]
    installed()
    assert list(known_outcomes()) == ["number", "toxicity", "length"]
    assert outcome_of("length") is LengthOutcome
    assert problems_of(tmp_path, kind="length", most=7) == [LengthOutcome(most=7)]
    assert "outcome.kind is missing: write number, toxicity or length" in problems_of(tmp_path, most=7)[0]
    assert "outcome.mots is not a known field: did you mean most?" in problems_of(tmp_path, kind="length", mots=7)[0]
    assert "outcome.most: Input should be a valid integer" in problems_of(tmp_path, kind="length", most="many")[0]


@pytest.mark.parametrize(
    ("name", "place", "fault"),
    [
        ("length", "no_such_package:LengthOutcome", "(no_such_package:LengthOutcome) cannot be imported: No module"),
        ("length", f"{__name__}:OUTCOME", "name a class of Outcome"),
        ("number", f"{__name__}:NumberAgain", "is a second outcome number; rename it"),
    ],
)
def test_an_outcome_that_cannot_be_used_is_named_and_takes_no_scenario_of_ours_down(
    installed, tmp_path, name, place, fault
):
    installed(name, place)
    (problem,) = problems_of(tmp_path, kind="length")
    assert "outcome.kind is 'length': excise.outcomes: the entry point " in problem
    assert fault in problem
    assert "purchase" in load_scenarios([tmp_path])[0]
    assert outcome_of("number") is NumberOutcome


def test_an_outcome_nobody_knew_goes_through_the_whole_chain(house, installed):
    installed()
    house.write_scenario("lengths", LENGTHS)
    house.write_scenario("more_lengths", LENGTHS | {"title": "More lengths"})
    result = house.run("audit_scenario", "tiny|lengths", inlier_floor=0.0)
    failures = [event.step_failure_data.error.to_string() for event in result.get_step_failure_events()]
    assert failures == []
    completions = house.warehouse.read("completions")
    assert completions.height == 2 * 8 * 4
    assert completions["value"].to_list() == [sum(map(str.isalnum, text)) for text in completions["text"]]
    masks, pruned = house.warehouse.read("masks"), house.warehouse.read("pruned_completions")
    assert {"set_difference", "gap_gradient", "random"} <= set(masks["strategy"])
    assert pruned["value"].to_list() == [sum(map(str.isalnum, text)) for text in pruned["text"]]
    metrics = house.warehouse.read("metrics")
    assert {"gap_mean", "smd", "gap_reduction", "inlier_ratio", "density"} <= set(metrics["metric"])
    # The figures are those of the answers, as the evaluation of any numbers tells them.
    expected = evaluate(
        completions, pl.DataFrame(), pl.DataFrame(), majority="white", minority="black", resamples=40, permutations=40
    )
    place = ["variation", "metric", "estimate", "low", "high", "p_value"]
    unpruned = metrics.filter((pl.col("strategy") == "unpruned") & (pl.col("metric") != "judged_variations"))
    assert unpruned.select(place).equals(expected.select(place))
    (told,) = house.warehouse.read("checks").filter(pl.col("check_name") == "parse_rate")["message"]
    assert told.startswith("answers with a length: lowest 100.0%")
    assert house.warehouse.read("side_effects").filter(pl.col("target") != "text").height > 0
