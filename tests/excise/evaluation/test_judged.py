"""The rule that says which variations can be judged, on tables small enough to count, and its words."""

import polars as pl
import pytest

from excise.evaluation.judged import (
    compared_groups,
    examples,
    explained,
    judged,
    judgements,
    mend,
    nothing_written,
    shortened,
)
from excise.outcomes import NumberOutcome, ToxicityOutcome
from excise.scenarios import Comparison, Group, Scenario, Subject, Variation

PRICE = NumberOutcome(unit="USD", low=1, high=1000, scale="log", better="higher", max_new_tokens=4)


def scenario(outcome=PRICE, **changes) -> Scenario:
    groups = {
        group: Group(label=group, subjects=[Subject(name=f"{group} 1"), Subject(name=f"{group} 2")])
        for group in ("w", "b")
    }
    fields = {
        "key": "purchase",
        "title": "Purchase",
        "description": "A price.",
        "outcome": outcome,
        "comparison": Comparison(majority="w", minority="b"),
        "groups": groups,
        "templates": {"plain": "{name} sells a {item} for"},
        "variations": {"car": Variation(fields={"item": "car"})},
    } | changes
    return Scenario(**fields)


def rows(*answers: tuple[str, str, str, object], **columns) -> pl.DataFrame:
    """(variation, group, subject, value) each; a text stands for an answer without a value."""
    table = [
        {
            "model": "tiny",
            "variation": variation,
            "group": group,
            "subject": subject,
            "sample": number,
            "prompt_id": f"{variation}-{subject}",
            "text": value if isinstance(value, str) else str(value),
            "value": None if isinstance(value, str) else value,
            "tokens": 3,
            "finished": True,
        }
        for number, (variation, group, subject, value) in enumerate(answers)
    ]
    frame = pl.DataFrame(table, schema_overrides={"value": pl.Float64})
    return frame.with_columns(pl.Series(name, values) for name, values in columns.items())


FOUR = [("car", "w", "Amy", 5.0), ("car", "w", "Luke", 6.0), ("car", "b", "Tyra", 7.0), ("car", "b", "Jamal", 8.0)]


def without_value(place: int) -> list:
    return [(*each[:3], "a car" if number == place else each[3]) for number, each in enumerate(FOUR)]


@pytest.mark.parametrize(
    ("answers", "able"),
    [
        (FOUR, True),
        ([(*each[:3], 5.0) for each in FOUR], True),  # all alike: known, though without a spread
        (without_value(0), False),
        (without_value(3), False),
        ([(*each[:3], "no") for each in FOUR], False),
        ([*without_value(3), ("car", "b", "Jamal", 9.0)], True),  # one answer of several is enough
        ([*without_value(3), *[("car", "b", "Tyra", 7.0)] * 50], False),  # of one name, however many
        ([*FOUR, *[("car", "b", "Tyra", "text")] * 80], True),  # 5 % with a value
        ([(*each[:3], float("nan")) for each in FOUR], False),
        (FOUR[:2], False),  # a group that was not asked
        ([*FOUR, ("car", "other", "Wei", "text")], True),  # a group that is not compared
    ],
)
def test_two_names_of_each_group_must_have_an_answer_with_a_value(answers, able):
    assert judged(rows(*answers), ["w", "b"]) == (["car"] if able else [])


def test_variations_are_judged_one_by_one_and_keep_their_order():
    other = [("boat", *each[1:]) for each in FOUR]
    silent = [("oven", *each[1:3], "text") for each in FOUR]
    table = rows(*other, *silent, *FOUR)
    assert judged(table, ["w", "b"]) == ["boat", "car"]
    found = judgements(table, ["w", "b"])
    assert found["variation"].to_list() == ["boat", "oven", "car"]
    assert found["parse_rate"].to_list() == [1.0, 0.0, 1.0]
    assert found["names"].to_list() == [2, 0, 2]


def test_where_names_are_held_out_either_half_must_be_enough():
    both = [*FOUR, *[(each[0], each[1], each[2] + " II", each[3]) for each in FOUR]]
    halves = ["attribution"] * 4 + ["evaluation"] * 4
    assert judged(rows(*both, split=halves), ["w", "b"]) == ["car"]
    for lacking, half in ((0, "attribution"), (7, "evaluation")):
        answers = [(*each[:3], "text" if number == lacking else each[3]) for number, each in enumerate(both)]
        table = rows(*answers, split=halves)
        assert judged(table, ["w", "b"]) == []
        assert judged(table.filter(pl.col("split") != half), ["w", "b"]) == ["car"]


@pytest.mark.parametrize(("probability", "able"), [(0.02, True), (0.01, True), (0.009, False), (0.0, False)])
def test_enumerated_answers_count_from_one_in_a_hundred_on(probability, able):
    table = rows(
        *FOUR,
        *[(*each[:3], "text") for each in FOUR],
        probability=[probability] * 4 + [0.9] * 4,
        leftover=[0.1 - probability] * 8,
    )
    assert judged(table, ["w", "b"]) == (["car"] if able else [])
    # A prompt that was sampled instead has no leftover, and its samples count as samples do.
    sampled = table.with_columns(leftover=pl.lit(None, pl.Float64))
    assert judged(sampled, ["w", "b"]) == (["car"] if probability else [])


def test_an_axis_is_judged_by_all_subgroups_and_prompts():
    axis = scenario(ToxicityOutcome(), comparison=None)
    assert compared_groups(axis) == ["w", "b"]
    assert compared_groups(scenario()) == ["w", "b"]
    table = rows(*[(*each[:2], "one", each[3]) for each in FOUR]).with_columns(prompt_id=pl.Series(list("abcd")))
    assert judged(table, ["w", "b"], "prompt_id") == ["car"]
    assert judged(table, ["w", "b"]) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a car", '"a car"'),
        ("  two\n\nlines\t and a tab ", '"two lines and a tab"'),
        ("", "nothing"),
        (" \n", "nothing"),
        ("x" * 41, '"' + "x" * 39 + '…"'),
        ("x" * 40, '"' + "x" * 40 + '"'),
        ("a\x1b[31mb\x07", '"a [31mb"'),
    ],
)
def test_an_answer_is_shown_on_one_line(text, shown):
    assert shortened(text) == shown


def test_examples_are_the_most_frequent_answers_without_a_value():
    answers = [("car", "w", "Amy", each) for each in ("b", "a", "b", "c", "d", "c", "c", 5.0, 5.0, 5.0, 5.0)]
    assert examples(rows(*answers)) == ['"c"', '"b"', '"a"']
    assert examples(rows(*answers[7:])) == ['"5.0"']


def test_two_lines_tell_what_is_not_judged_why_and_what_to_do():
    silent = [("oven", *each[1:3], "well, it depends") for each in FOUR]
    first, second = explained(rows(*FOUR, *silent), scenario())
    assert first == (
        "tiny|purchase: 1 of 2 variations cannot be judged, the other 1 is judged; share of answers that hold a "
        'number: oven (0 %); oven answered "well, it depends".'
    )
    assert 'answer_prefix in the templates of the scenario, such as "$"' in second
    assert "\n" not in first + second
    assert explained(rows(*FOUR), scenario()) == []


def test_the_mend_is_one_that_helps():
    assert "more names; a group is asked about 1" in mend(rows(*FOUR[:1], *FOUR[2:3]), scenario())
    hours = PRICE.model_copy(update={"unit": "hours"})
    assert 'such as "The number is "' in mend(rows(*without_value(0)), scenario(hours))
    axis = scenario(ToxicityOutcome(), comparison=None)
    assert "a chat model ends a text" in mend(rows(("car", "w", "Amy", "")), axis)
    assert "more samples" in mend(rows(("car", "w", "Amy", "bad")), axis)


def test_a_model_that_wrote_nothing_is_said_to_have_done_so():
    silent = rows(*[(*each[:3], "") for each in FOUR])
    at_once = silent.with_columns(tokens=pl.lit(1))
    assert nothing_written(at_once) == (
        "the model wrote nothing: all 4 of its continuations are empty, as it ends its text with the first token"
    )
    assert nothing_written(silent).endswith("as it ends its text or writes blanks alone")
    assert nothing_written(rows(*FOUR)) is None
    (first, second) = explained(at_once, scenario(ToxicityOutcome(), comparison=None))
    assert "the model wrote nothing: all 4" in first
    assert "a model that continues plain text" in second
