"""Claims about the built-in axes of social groups: alike in structure, fit for continuation, split by templates."""

import math

import polars as pl
import pytest

from excise.errors import ExciseError
from excise.outcomes import NumberOutcome, ToxicityOutcome
from excise.scenarios import (
    PROMPTS_SCHEMA,
    Scenario,
    expand,
    held_out_split,
    load_scenarios,
    prompt_count,
    template_halves,
)
from excise.scenarios.subsets import ATTRIBUTION, EVALUATION, halves

AXES = ("gender", "race", "religion", "sexual_orientation", "nationality")
SCENARIOS, PROBLEMS = load_scenarios()
PROMPTS = {key: expand(SCENARIOS[key]) for key in AXES}


@pytest.fixture(params=AXES)
def axis(request: pytest.FixtureRequest) -> Scenario:
    return SCENARIOS[request.param]


def changed(scenario: Scenario, **fields) -> Scenario:
    return Scenario.model_validate(scenario.model_dump() | fields)


# The files


def test_the_five_axes_of_the_paper_are_built_in_and_continued_as_in_the_paper():
    assert not PROBLEMS
    assert {key for key, scenario in SCENARIOS.items() if scenario.outcome.kind == "toxicity"} == set(AXES)
    for key in AXES:
        outcome = SCENARIOS[key].outcome
        assert (outcome.temperature, outcome.top_k, outcome.top_p) == (1, 50, 1)
        assert (outcome.max_new_tokens, outcome.max_prompt_tokens) == (40, 22)
        assert (outcome.scored, outcome.scorer, outcome.prompt_format) == ("continuation", None, "raw")


def test_every_axis_has_the_same_templates_and_nouns_so_that_axes_can_be_pooled(axis):
    gender = SCENARIOS["gender"]
    assert axis.templates == gender.templates
    assert len(axis.templates) == 14
    assert {key: variation.fields for key, variation in axis.variations.items()} == {
        noun: {"noun": noun} for noun in ("person", "neighbor", "colleague", "parent")
    }


def test_an_axis_has_eight_subgroups_of_two_to_four_descriptors_and_a_pair_to_compare(axis):
    assert len(axis.groups) == 8
    assert {len(group.subjects) for group in axis.groups.values()} <= {2, 3, 4}
    assert axis.comparison.majority in axis.groups
    assert axis.comparison.minority in axis.groups


def test_prompts_are_unfinished_sentences_that_fit_the_paper_s_cut(axis):
    for text in PROMPTS[axis.key]["text"]:
        assert text[-1] not in ".?! "
        assert "  " not in text
        # No usual tokenizer needs more pieces than one for every four letters begun, and one for a beginning-of-text.
        assert 1 + sum(math.ceil(len(word) / 4) for word in text.split()) <= axis.outcome.max_prompt_tokens


def test_no_article_stands_before_a_descriptor_and_the_noun_follows_it(axis):
    for row in PROMPTS[axis.key].iter_rows(named=True):
        before, after = row["text"][: row["name_start"]], row["text"][row["name_end"] :]
        assert before.split()[-1].lower() not in ("a", "an")
        assert after.startswith(f" {row['variation']}")
        assert row["text"][row["name_start"] : row["name_end"]] == row["subject"]


def test_every_subgroup_s_descriptors_meet_every_template_and_noun_once(axis):
    prompts = PROMPTS[axis.key]
    descriptors = sum(len(group.subjects) for group in axis.groups.values())
    assert prompts.schema == PROMPTS_SCHEMA
    assert prompts.height == prompts["prompt_id"].n_unique() == descriptors * 14 * 4 == prompt_count(axis)
    assert prompts.group_by("subject").len()["len"].unique().to_list() == [14 * 4]


def test_a_subset_of_descriptors_keeps_all_of_a_smaller_subgroup():
    race = SCENARIOS["race"]
    few = expand(race, variations=["parent"], subjects_per_group=3)
    counts = dict(few.group_by("group").agg(pl.col("subject").n_unique()).iter_rows())
    assert counts == {key: min(3, len(group.subjects)) for key, group in race.groups.items()}
    assert set(counts.values()) == {2, 3}
    assert set(few["prompt_id"]) < set(PROMPTS["race"]["prompt_id"])
    with pytest.raises(ExciseError, match="subjects_per_group is 0"):
        expand(race, subjects_per_group=0)


# The outcome


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", False),
        ("top_p", 0),
        ("top_p", 1.1),
        ("scored", "prompt"),
        ("scorer", " "),
    ],
)
def test_what_no_continuation_can_be_drawn_or_scored_with_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        ToxicityOutcome.model_validate({"kind": "toxicity", field: value})


def test_a_number_is_asked_for_in_the_model_s_own_format():
    assert NumberOutcome(unit="USD", low=1, high=2, scale="log", better="higher").prompt_format is None


def test_an_axis_needs_no_comparison_and_a_scorer_may_be_named():
    axis = changed(SCENARIOS["race"], comparison=None, outcome={"kind": "toxicity", "scorer": "mine", "top_k": 0})
    assert (axis.comparison, axis.outcome.scorer, axis.outcome.top_k) == (None, "mine", 0)


# The held-out split


def test_template_halves_hold_every_subgroup_and_descriptor_and_no_template_twice():
    prompts = PROMPTS["religion"]
    split = template_halves(prompts, 0)
    assert split.columns == ["template", "split"]
    assert sorted(split["template"]) == sorted(SCENARIOS["religion"].templates)
    assert split["split"].value_counts().sort("split").rows() == [(ATTRIBUTION, 7), (EVALUATION, 7)]
    for half in (ATTRIBUTION, EVALUATION):
        held = prompts.join(split.filter(split=half), on="template")
        assert held["subject"].n_unique() == prompts["subject"].n_unique()


def test_template_halves_depend_on_the_seed_alone():
    one = template_halves(PROMPTS["religion"], 5)
    assert template_halves(PROMPTS["gender"].reverse(), 5).equals(one)
    assert len({tuple(template_halves(PROMPTS["religion"], seed)["split"]) for seed in range(6)}) > 1


def test_an_odd_template_goes_to_the_evaluation_and_a_single_one_is_refused():
    split = template_halves(pl.DataFrame({"template": ["a", "b", "c", "c"]}), 1)
    assert split["split"].value_counts().sort("split").rows() == [(ATTRIBUTION, 1), (EVALUATION, 2)]
    with pytest.raises(ExciseError, match="one template only"):
        template_halves(pl.DataFrame({"template": ["a", "a"]}), 1)


def test_an_axis_is_held_out_by_templates_and_names_by_names():
    prompts = PROMPTS["gender"].sample(fraction=1, shuffle=True, seed=2)
    split = held_out_split(SCENARIOS["gender"], prompts, 4)
    assert split.columns == ["prompt_id", "split"]
    assert split["prompt_id"].equals(prompts["prompt_id"])
    by_template = prompts.join(template_halves(prompts, 4), on="template", maintain_order="left")
    assert split["split"].equals(by_template["split"])

    purchase = SCENARIOS["purchase"]
    asked = expand(purchase, variations=["car"], subjects_per_group=6)
    split = held_out_split(purchase, asked, 4)
    by_name = asked.join(halves(asked, 4), on=["group", "subject"], maintain_order="left")
    assert split.rows() == by_name.select("prompt_id", "split").rows()


def test_a_variation_with_one_template_of_its_own_cannot_be_held_out():
    axis = changed(
        SCENARIOS["gender"], variations={"person": {"noun": "person"}, "crowd": {"template": "All {name} people in"}}
    )
    with pytest.raises(ExciseError, match="scenario gender: all prompts of variation crowd about group women"):
        held_out_split(axis, expand(axis), 0)
