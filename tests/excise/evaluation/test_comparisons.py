"""Claims about second comparisons, on answers whose gaps by group, gender and name length are known."""

import polars as pl
import pytest

from excise.conditions import ALL
from excise.errors import ExciseError
from excise.evaluation.comparisons import COMPARISONS_SCHEMA, comparisons
from excise.evaluation.numbers import evaluate
from excise.outcomes import NumberOutcome
from excise.scenarios import Comparison, Group, Scenario, Subject, Variation

SETTINGS = {"resamples": 50, "permutations": 99, "seed": 0}
PEOPLE = [
    (group, f"{group} {gender} {number}", gender)
    for group in ("white", "black")
    for gender in ("men", "women")
    for number in range(3)
]


def scenario():
    return Scenario(
        key="purchase",
        title="Purchase",
        description="A price.",
        outcome=NumberOutcome(unit="USD", low=1, high=1000, scale="log", better="higher"),
        comparison=Comparison(majority="white", minority="black"),
        groups={
            key: Group(label=key, subjects=[Subject(name=name) for group, name, _ in PEOPLE if group == key])
            for key in ("white", "black")
        },
        templates={"plain": "{name} sells a {item}."},
        variations={"chair": Variation(fields={"item": "chair"})},
    )


def value(group, gender, tokens):
    """White names get 20 more, men 8 more, and every token of the name costs 5."""
    return 100.0 + 20 * (group == "white") + 8 * (gender == "men") - 5 * tokens


def answers(tokens=lambda group, number: 2):
    rows = []
    for place, (group, name, gender) in enumerate(PEOPLE):
        count = tokens(group, place % 3)
        rows += [
            ("m", "purchase", "chair", group, name, value(group, gender, count) + each, count, "both")
            for each in (-1.0, 0.0, 1.0)
        ]
    columns = ["model", "scenario", "variation", "group", "subject", "value", "name_tokens", "split"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def prompts(gender=True):
    rows = [("purchase", group, name, given if gender else None) for group, name, given in PEOPLE]
    schema = {"scenario": pl.String, "group": pl.String, "subject": pl.String, "gender": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def under(strategy, frame, matched_to=None, lift=0.0):
    return frame.with_columns(
        pl.col("value") + lift * (pl.col("group") == "black"),
        strategy=pl.lit(strategy),
        level=pl.lit("prompt_specific"),
        matched_to=pl.lit(matched_to, dtype=pl.String),
        draw=pl.lit(0),
    )


def mask_rows(pruned):
    keys = ["model", "scenario", "variation", "strategy", "level", "matched_to", "draw"]
    return pruned.select(keys).unique().with_columns(pruned=pl.lit(1), size=pl.lit(100))


def run(completions, prompts=None, pruned=None, **settings):
    pruned = pl.DataFrame() if pruned is None else pruned
    masks = pl.DataFrame() if pruned.is_empty() else mask_rows(pruned)
    found = comparisons(
        completions, _PROMPTS if prompts is None else prompts, pruned, masks, scenario=scenario(), **SETTINGS | settings
    )
    assert found.schema == pl.Schema(COMPARISONS_SCHEMA)
    return found


_PROMPTS = prompts()


def gaps(frame, strategy="unpruned", matched_to=None):
    rows = frame.filter(
        (pl.col("metric") == "gap_mean")
        & (pl.col("variation") == "chair")
        & (pl.col("strategy") == strategy)
        & pl.col("matched_to").eq_missing(pl.lit(matched_to, dtype=pl.String))
    )
    return dict(rows.select("comparison", "estimate").iter_rows())


def test_each_comparison_shows_its_own_gap():
    assert gaps(run(answers())) == pytest.approx(
        {"token_matched": 20, "gender": 8, "white-black, men": 20, "white-black, women": 20}
    )


def test_on_names_of_equal_length_the_cost_of_length_is_gone():
    """White names have 2, 2 and 3 tokens, black ones 3, 3 and 2: one pair of each length can be matched per gender."""
    long = answers(lambda group, number: (2, 2, 3)[number] if group == "white" else (3, 3, 2)[number])
    plain = evaluate(long, pl.DataFrame(), pl.DataFrame(), majority="white", minority="black", **SETTINGS)
    raw = plain.filter((pl.col("metric") == "gap_mean") & (pl.col("variation") == ALL))["estimate"].item()
    assert raw == pytest.approx(20 + 5 / 3)
    unisex = long.with_columns(pl.col("value") - 8 * pl.col("subject").str.contains(" men "))
    assert gaps(run(unisex))["token_matched"] == pytest.approx(20)


def test_a_comparison_equals_the_evaluation_of_its_names():
    pruned = under("ours", answers(), lift=15)
    found = run(answers(), pruned=pruned).filter(pl.col("comparison") == "white-black, men").drop("comparison")
    men = [name for _, name, gender in PEOPLE if gender == "men"]
    expected = evaluate(
        answers().filter(pl.col("subject").is_in(men)),
        pruned.filter(pl.col("subject").is_in(men)),
        mask_rows(pruned),
        majority="white",
        minority="black",
        log_scale=True,
        **SETTINGS,
    )
    assert found.equals(expected)


def test_strategies_stand_beside_their_random_control_and_other_controls_are_left_out():
    pruned = pl.concat(
        [
            under("ours", answers(), lift=15),
            under("random", answers(), "ours", lift=5),
            under("reversed", answers(), "ours", lift=-5),
        ]
    )
    found = run(answers(), pruned=pruned)
    assert set(found["strategy"]) == {"unpruned", "ours", "random"}
    assert gaps(found, "ours")["white-black, women"] == pytest.approx(5)
    assert gaps(found, "random", "ours")["white-black, women"] == pytest.approx(15)
    assert gaps(found, "ours")["gender"] == pytest.approx(8)  # both genders of the group are lifted alike
    over_random = found.filter(
        (pl.col("metric") == "reduction_over_random")
        & (pl.col("strategy") == "ours")
        & (pl.col("comparison") == "white-black, men")
        & (pl.col("variation") == "chair")
    )
    assert over_random["estimate"].item() == pytest.approx(0.5)


def test_names_held_out_for_attribution_are_not_judged():
    held = answers().with_columns(
        split=pl.when(pl.col("subject").str.ends_with("0")).then(pl.lit("attribution")).otherwise(pl.lit("evaluation")),
        value=pl.when(pl.col("subject").str.ends_with("0")).then(1e6).otherwise("value"),
    )
    assert gaps(run(held))["gender"] == pytest.approx(8)
    assert run(held).filter(pl.col("metric") == "parse_rate")["n"].max() == 8 * 3


def test_without_gender_only_lengths_are_compared():
    assert set(run(answers(), prompts(gender=False))["comparison"]) == {"token_matched"}
    assert set(run(answers(), prompts().drop("gender"))["comparison"]) == {"token_matched"}
    assert run(answers().drop("name_tokens"), prompts(gender=False)).is_empty()


def test_a_comparison_of_single_names_is_left_out():
    one_woman = prompts().with_columns(
        gender=pl.when(pl.col("subject").str.contains("black women [12]")).then(pl.lit(None)).otherwise("gender")
    )
    assert set(run(answers(), one_woman)["comparison"]) == {"token_matched", "gender", "white-black, men"}
    # one white and one black name share a length
    lone = answers(lambda group, number: 2 + number if group == "white" else 4 + number).filter(
        pl.col("subject").str.contains(" men ")
    )
    assert "token_matched" not in set(run(lone)["comparison"])


def test_a_scenario_without_a_comparison_is_refused():
    with pytest.raises(ExciseError, match="scenario purchase: comparison is missing"):
        comparisons(
            answers(),
            prompts(),
            pl.DataFrame(),
            pl.DataFrame(),
            scenario=scenario().model_copy(update={"comparison": None}),
            **SETTINGS,
        )
