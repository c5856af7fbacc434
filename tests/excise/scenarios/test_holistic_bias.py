"""Claims about HolisticBias: how its files multiply out into sentences, and how an axis of it becomes a scenario.

A folder made by hand in the data set's format shows every rule. The published counts are checked on a copy of v1.1:
the folder EXCISE_HOLISTIC_BIAS names, or one called holisticbias near the repository.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import yaml

from excise.errors import ExciseError
from excise.outcomes import ToxicityOutcome
from excise.scenarios import (
    PROMPTS_SCHEMA,
    HolisticBias,
    Scenario,
    Variation,
    expand,
    held_out_split,
    load_scenarios,
    prompt_count,
)
from excise.scenarios.holistic_bias import SENTENCES_SCHEMA, holistic_bias
from excise.scenarios.holistic_bias_files import DESCRIPTORS_1_1, NONE, SENTENCES_1_1
from excise.scenarios.holistic_bias_groups import subgroup_sentences, subgroups_of
from excise.scenarios.subsets import ATTRIBUTION, EVALUATION

REPOSITORY = Path(__file__).parents[3]
NEARBY = (place for root in (REPOSITORY, REPOSITORY.parent) for place in sorted(root.glob("*/*/holisticbias")))
PUBLISHED = Path(os.environ.get("EXCISE_HOLISTIC_BIAS") or next(NEARBY, "no copy"))
FILES = {
    "descriptors.json": {
        "hair": {
            "dark": ["ash-brown", {"descriptor": "Umber", "article": "a", "preference": "reviewed"}],
            "light": [{"descriptor": "blonde", "gender": "female"}],
        },
        "faith": {"all": ["Bahá'í", "Jain", "LGBT", "LGBT+"]},
    },
    "nouns.json": {"female": [["aunt", "aunts"]], "neutral": [["child", "children"]]},
    "sentence_templates.json": {
        "I'm {noun_phrase}.": {},
        "Hi! I'm {noun_phrase}.": {"first_turn_only": True},
        "I like {plural_noun_phrase}.": {"must_be_noun": True},
        "My friends are {plural_noun_phrase}.": {},
    },
    "standalone_noun_phrases.json": {
        "hair": [
            {"noun_phrase": "{article} {noun} with a wig", "plural_noun_phrase": "{article} {noun} with wigs"},
            "{article} {noun} of the comb",
            {"noun_phrase": "an eel", "plural_noun_phrase": "eels", "preference": "dispreferred"},
        ]
    },
}


def write(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in FILES.items():
        (folder / name).write_text(json.dumps(changes.get(name.partition(".")[0], data)), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "data")


def chosen(folder: Path, **fields) -> HolisticBias:
    return HolisticBias(**{"folder": folder, "axis": "hair", "any_version": True} | fields)


def scenario_of(spec: HolisticBias) -> Scenario:
    return Scenario(
        key="hair",
        title="Hair",
        description="Hair.",
        outcome=ToxicityOutcome(),
        groups=subgroups_of(spec),
        variations={"sentences": Variation()},
        holistic_bias=spec,
    )


# How the files multiply out


def test_every_rule_of_combination_on_one_axis(folder):
    sentences = holistic_bias(folder, axis="hair", any_version=True)
    assert sentences.schema == SENTENCES_SCHEMA
    texts = Counter(sentences["text"])
    expected = []
    for word, article, nouns in (
        ("ash-brown", "an", ("aunt", "child")),
        ("Umber", "a", ("aunt", "child")),
        ("blonde", "a", ("aunt",)),
    ):
        # alone in the templates that need no noun, and with the nouns of its gender in all of them
        expected += [f"I'm {word}.", f"Hi! I'm {word}.", f"My friends are {word}."]
        for noun in nouns:
            many = {"aunt": "aunts", "child": "children"}[noun]
            expected += [
                f"I'm {article} {word} {noun}.",
                f"Hi! I'm {article} {word} {noun}.",
                f"I like {word} {many}.",
                f"My friends are {word} {many}.",
            ]
    for one, many in (
        ("an aunt with a wig", "aunts with wigs"),
        ("a child with a wig", "children with wigs"),
        ("an aunt of the comb", "aunts of the comb"),
        ("a child of the comb", "children of the comb"),
    ):
        expected += [f"I'm {one}.", f"Hi! I'm {one}.", f"I like {many}.", f"My friends are {many}."]
    expected += ["I'm an eel.", "Hi! I'm an eel.", "My friends are eels."]
    assert texts == Counter(expected)
    assert max(texts.values()) == 1


def test_nouns_alone_form_an_axis_of_their_own(folder):
    everything = holistic_bias(folder, any_version=True)
    alone = everything.filter(axis=NONE)
    assert alone["text"].to_list() == [
        "I'm an aunt.",
        "Hi! I'm an aunt.",
        "I like aunts.",
        "My friends are aunts.",
        "I'm a child.",
        "Hi! I'm a child.",
        "I like children.",
        "My friends are children.",
    ]
    parts = [holistic_bias(folder, axis=axis, any_version=True) for axis in (NONE, "hair", "faith")]
    assert everything.equals(pl.concat(parts))


def test_the_place_of_the_descriptor_is_known_in_every_sentence(folder):
    rows = holistic_bias(folder, any_version=True)
    cut = pl.Series([row["text"][row["name_start"] : row["name_end"]] for row in rows.iter_rows(named=True)])
    plain = rows["form"].is_in(["descriptor", "descriptor noun"])
    assert cut.filter(plain).equals(rows["descriptor"].filter(plain), check_names=False)
    assert set(cut.filter(rows["form"] == "noun")) == {"aunt", "aunts", "child", "children"}
    assert set(cut.filter(rows["form"] == "fixed phrase")) == {"eel", "eels"}
    phrases = set(cut.filter(rows["form"] == "noun phrase"))
    assert {"aunt with a wig", "aunts with wigs", "child of the comb", "children of the comb"} <= phrases
    assert len(phrases) == 8


def test_what_the_data_set_says_of_words_and_templates_is_kept(folder):
    rows = holistic_bias(folder, axis="hair", any_version=True)
    assert dict(rows.select("descriptor", "preference").unique().iter_rows()) == {
        "ash-brown": None,
        "Umber": "reviewed",
        "blonde": None,
        "with a wig": None,
        "of the comb": None,
        "an eel": "dispreferred",
    }
    assert set(rows.filter("first_turn_only")["template"]) == {"Hi! I'm {noun_phrase}."}
    assert set(rows.filter(pl.col("noun").is_null())["form"]) == {"descriptor", "fixed phrase"}
    assert set(rows.filter(noun="aunt")["noun_gender"]) == {"female"}
    assert set(rows.filter(pl.col("form").is_in(["noun phrase", "fixed phrase"]))["bucket"]) == {NONE}


# Damaged folders and other versions


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nouns.json", None, r"nouns\.json is missing: take a fresh copy"),
        ("nouns.json", '{"female": [["aunt"', r"nouns\.json: Invalid JSON: .*; take a fresh copy"),
        ("nouns.json", '{"female": [["aunt"]]}', r"nouns\.json: female\.0\.1: Field required"),
        ("descriptors.json", '{"hair": ["blonde"]}', r"descriptors\.json: hair: Input should be"),
        ("descriptors.json", '{"hair": {"dark": [{"word": "x"}]}}', r"descriptors\.json: hair\.dark\.0"),
        ("sentence_templates.json", '{"I am here.": {}}', r"sentence_templates\.json: 'I am here\.' must hold"),
        ("sentence_templates.json", '{"{noun_phrase} {noun_phrase}": {}}', "once: mend the template"),
        ("standalone_noun_phrases.json", "[]", r"standalone_noun_phrases\.json: Input should be"),
    ],
)
def test_a_damaged_file_is_named_with_a_mend(folder, name, text, message):
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(ExciseError, match=message) as error:
        holistic_bias(folder, any_version=True)
    assert str(folder / name) in str(error.value)


def test_another_version_is_refused_unless_asked_for(folder):
    with pytest.raises(ExciseError, match=r"descriptors\.json: ability has 0 descriptors, v1\.1 has 38: .*any_version"):
        holistic_bias(folder)
    with pytest.raises(ExciseError, match="the data set has no axis 'height'; there are hair, faith"):
        holistic_bias(folder, axis="height", any_version=True)


def test_a_changed_template_of_a_complete_looking_copy_is_found_by_the_number_of_sentences(tmp_path):
    descriptors = {axis: {"all": [f"{axis} {n}" for n in range(count)]} for axis, count in DESCRIPTORS_1_1.items()}
    nouns = {
        key: [[f"{key}{n}", f"{key}{n}s"] for n in range(count)]
        for key, count in (("female", 12), ("male", 11), ("neutral", 9))
    }
    templates = {f"{n} {{noun_phrase}}.": {"must_be_noun": n < 9} for n in range(26)}
    copy = write(tmp_path / "copy", descriptors=descriptors, nouns=nouns, sentence_templates=templates)
    with pytest.raises(ExciseError, match=r"standalone_noun_phrases\.json: ability has 0 phrases, v1\.1 has 50"):
        holistic_bias(copy)
    phrases = {"religion": [f"a {n}" for n in range(47)]}
    copy = write(
        tmp_path / "copy",
        descriptors=descriptors,
        nouns=nouns,
        sentence_templates=templates,
        standalone_noun_phrases=phrases,
    )
    assert len(holistic_bias(copy, axis="religion", any_version=True)) == 49 * (32 * 26 + 17) + 47 * 17 == 42_400


# Subgroups


def test_buckets_are_subgroups_and_phrases_without_one_are_not_unless_asked_for(folder):
    groups = subgroups_of(chosen(folder))
    assert {key: [subject.name for subject in group.subjects] for key, group in groups.items()} == {
        "dark": ["ash-brown", "Umber"],
        "light": ["blonde"],
    }
    loose = subgroups_of(chosen(folder, none_bucket=True))
    assert list(loose) == ["dark", "light", "none"]
    assert loose["none"].label == NONE
    assert [subject.name for subject in loose["none"].subjects] == ["with a wig", "of the comb", "an eel"]
    sentences = subgroup_sentences(chosen(folder, none_bucket=True), loose)
    assert len(sentences.filter(group="none")) == 4 * 4 + 3
    assert "none" not in set(subgroup_sentences(chosen(folder), groups)["group"])


def test_descriptors_get_keys_that_differ(folder):
    groups = subgroups_of(chosen(folder, axis="faith", subgroups="descriptor"))
    assert {key: group.label for key, group in groups.items()} == {
        "baha_i": "Bahá'í",
        "jain": "Jain",
        "lgbt": "LGBT",
        "lgbt_plus": "LGBT+",
    }


def test_families_group_descriptors_and_leave_the_others_out(folder):
    families = {"one": ("Jain", "Bahá'í"), "two": ("LGBT",)}
    spec = chosen(folder, axis="faith", subgroups="family", families=families)
    assert set(expand(scenario_of(spec)).select("group", "subject").unique().iter_rows()) == {
        ("one", "Jain"),
        ("one", "Bahá'í"),
        ("two", "LGBT"),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axis": "faith"}, "axis: faith has 1 subgroup by bucket, and a bias needs two to differ: write sub"),
        ({"axis": "eyes"}, "axis: the data set has no axis 'eyes'; there are hair, faith"),
        ({"subgroups": "family", "families": {"a": ("blond",), "b": ("Umber",)}}, "families.a: .*did you mean blonde"),
        ({"subgroups": "family", "families": {"a": ("Umber",), "b": ("Umber",)}}, "families.b holds 'Umber', which is"),
        ({"subgroups": "family", "families": {"a": ("Umber",)}}, "has 1 subgroup by family"),
    ],
)
def test_subgroups_that_cannot_be_compared_are_refused(folder, fields, message):
    with pytest.raises(ExciseError, match=message):
        subgroups_of(chosen(folder, **fields))


# Prompts, caps and the split


def test_expansion_gives_the_sentences_as_prompts(folder):
    scenario = scenario_of(chosen(folder))
    prompts = expand(scenario)
    assert prompts.schema == PROMPTS_SCHEMA
    assert set(prompts["variation"]) == {"sentences"}
    assert len(prompts) == (3 + 8) + (3 + 8) + (3 + 4) == prompts["prompt_id"].n_unique()
    assert prompts["template"].unique(maintain_order=True).to_list() == [
        "I'm {noun_phrase}.",
        "Hi! I'm {noun_phrase}.",
        "My friends are {plural_noun_phrase}.",
        "I like {plural_noun_phrase}.",
    ]
    for row in prompts.iter_rows(named=True):
        assert row["text"][row["name_start"] : row["name_end"]] == row["subject"]
    assert prompts.equals(expand(scenario))
    one_each = expand(scenario, subjects_per_group=1)
    assert set(one_each["subject"]) == {"ash-brown", "blonde"}
    assert set(one_each["prompt_id"]) < set(prompts["prompt_id"])


def test_a_fifth_of_every_subgroup_is_validation_whatever_is_asked_for_besides(folder):
    spec = chosen(folder)
    sentences = subgroup_sentences(spec, subgroups_of(spec))
    assert dict(sentences.filter(split="validation").group_by("group").len().iter_rows()) == {"dark": 4, "light": 1}
    assert sentences.equals(subgroup_sentences(spec, subgroups_of(spec)))
    others = {tuple(subgroup_sentences(chosen(folder, seed=seed), subgroups_of(spec))["split"]) for seed in range(5)}
    assert len(others) > 1
    split = held_out_split(scenario_of(spec), prompts := expand(scenario_of(spec)), 99)
    assert split["prompt_id"].equals(prompts["prompt_id"])
    named = split["split"].replace({ATTRIBUTION: "validation", EVALUATION: "test"})
    assert named.to_list() == sentences["split"].to_list()


def test_a_cap_keeps_descriptors_and_the_split_in_balance_and_grows_by_adding(folder):
    kept = {}
    for cap in (5, 10, 15):
        spec = chosen(folder, per_subgroup=cap)
        rows = subgroup_sentences(spec, subgroups_of(spec))
        dark = rows.filter(group="dark")
        assert (len(dark), len(rows.filter(group="light"))) == (cap, min(cap, 7))
        assert len(dark.filter(split="validation")) == cap // 5
        counts = dict(dark.filter(split="test").group_by("subject").len().iter_rows())
        assert abs(counts["ash-brown"] - counts["Umber"]) <= 1
        kept[cap] = set(rows["text"])
        assert prompt_count(scenario_of(spec)) == 2 * cap
    assert kept[5] < kept[10] < kept[15]
    whole = subgroup_sentences(chosen(folder), subgroups_of(chosen(folder)))
    parts = dict(whole.select("text", "split").iter_rows())
    assert all(parts[text] == part for text, part in rows.select("text", "split").iter_rows())


def test_a_part_left_empty_and_foreign_prompts_are_refused(folder):
    scenario = scenario_of(chosen(folder))
    prompts = expand(scenario)
    test_part = held_out_split(scenario, prompts, 0)["split"] == EVALUATION
    with pytest.raises(ExciseError, match=r"about group dark fall into the part 'evaluation' .*raise holistic_b"):
        held_out_split(scenario, prompts.filter(test_part), 0)
    with pytest.raises(ExciseError, match="25 of its prompts are not sentences"):
        held_out_split(scenario, prompts.with_columns(text=pl.lit("x")).head(25), 0)


# Scenario files


def file_of(tmp_path: Path, chosen: object, **fields) -> Path:
    (tmp_path / "scenarios").mkdir(exist_ok=True)
    data = {"title": "Hair", "description": "Hair.", "outcome": {"kind": "toxicity"}, "holistic_bias": chosen} | fields
    (tmp_path / "scenarios" / "hair.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return tmp_path / "scenarios"


HAIR = {"folder": "../data", "axis": "hair", "per_subgroup": 5, "any_version": True}


def test_a_file_names_the_data_set_s_folder_from_where_it_lies(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    pair = {"majority": "light", "minority": "dark"}
    scenarios, problems = load_scenarios([file_of(tmp_path, HAIR, comparison=pair)])
    assert not problems
    hair = scenarios["hair"]
    assert list(hair.groups) == ["dark", "light"]
    assert hair.holistic_bias.folder == folder
    assert expand(hair).group_by("group").len().sort("group").rows() == [("dark", 5), ("light", 5)]
    assert Scenario.model_validate(hair.model_dump()) == hair


def test_listing_scenarios_reads_the_descriptors_alone(folder, tmp_path):
    for name in ("nouns.json", "sentence_templates.json", "standalone_noun_phrases.json"):
        (folder / name).unlink()
    scenarios, problems = load_scenarios([file_of(tmp_path, HAIR)])
    assert not problems
    with pytest.raises(ExciseError, match=r"nouns\.json is missing"):
        expand(scenarios["hair"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "../nowhere"}, "hair.yaml: holistic_bias.folder: .*nowhere/descriptors.json is missing: take a"),
        ({"any_version": False}, "holistic_bias.folder: .*descriptors.json: ability has 0 descriptors, v1.1 has 38"),
        ({"axis": "faith"}, "hair.yaml: holistic_bias.axis: faith has 1 subgroup by bucket"),
        ({"axis": "face"}, "hair.yaml: holistic_bias.axis: the data set has no axis 'face'"),
        ({"axes": "hair"}, "holistic_bias.axes is not a known field: did you mean axis?"),
        ({"subgroups": "bukket"}, "holistic_bias.subgroups: Input should be 'bucket', 'descriptor' or 'family'"),
        ({"per_subgroup": 1}, "holistic_bias.per_subgroup: Input should be greater than or equal to 2"),
        ({"per_subgroup": True}, "holistic_bias.per_subgroup is true, not a number"),
        ({"families": {"a": ["Umber"], "b": ["blonde"]}}, "holistic_bias.families goes with subgroups: family"),
        ({"subgroups": "descriptor", "none_bucket": True}, "holistic_bias.none_bucket goes with subgroups: bucket"),
        ({"subgroups": "family", "families": {"A b": ["Umber"]}}, "holistic_bias.families.A b: a key may hold small"),
    ],
)
def test_a_fault_of_the_choice_is_named_with_file_and_field(folder, tmp_path, change, message):
    scenarios, problems = load_scenarios([file_of(tmp_path, HAIR | change)])
    assert "hair" not in scenarios
    assert re.search(message, str(problems[0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"templates": {"a": "{name} is"}}, "scenarios/hair.yaml: templates: holistic_bias brings its own templates"),
        ({"groups": {}, "variations": {}}, "groups: holistic_bias brings its own groups"),
        ({"holistic_bias": "../data"}, "hair.yaml: holistic_bias must be a mapping of fields, but is '../data'"),
        ({"comparison": {"majority": "light", "minority": "red"}}, "comparison.minority names an unknown group 'red'"),
        (
            {"outcome": {"kind": "number", "unit": "USD", "low": 1, "high": 2, "scale": "log", "better": "higher"}},
            "outcome.kind must be toxicity where holistic_bias is given",
        ),
    ],
)
def test_a_scenario_of_sentences_has_no_prompts_of_its_own(folder, tmp_path, fields, message):
    scenarios, problems = load_scenarios([file_of(tmp_path, HAIR, **fields)])
    assert "hair" not in scenarios
    assert message in str(problems[0])


# The published data set


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no copy of HolisticBias v1.1 here")
def test_version_1_1_has_as_many_sentences_as_published():
    counts = dict(holistic_bias(PUBLISHED).group_by("axis").len().iter_rows())
    assert sum(counts.values()) == 566_625
    assert counts == SENTENCES_1_1
    published = {
        "gender_and_sex": 51_057,
        "race_ethnicity": 26_153,
        "religion": 42_400,
        "sexual_orientation": 16_494,
        "nationality": 18_876,
    }
    assert {axis: counts[axis] for axis in published} == published


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no copy of HolisticBias v1.1 here")
def test_the_religions_of_version_1_1_make_a_scenario_of_descriptors(tmp_path):
    choice = {"folder": str(PUBLISHED), "axis": "religion", "subgroups": "descriptor", "per_subgroup": 50, "seed": 0}
    scenarios, problems = load_scenarios([file_of(tmp_path, choice)])
    assert not problems
    prompts = expand(scenarios["hair"])
    assert prompts.group_by("group").len()["len"].to_list() == [50] * 49
    for row in prompts.iter_rows(named=True):
        assert row["text"][row["name_start"] : row["name_end"]] == row["subject"]
    split = held_out_split(scenarios["hair"], prompts, 0)
    assert split["split"].value_counts().sort("split").rows() == [(ATTRIBUTION, 490), (EVALUATION, 1960)]
    _, problems = load_scenarios([file_of(tmp_path, choice | {"subgroups": "bucket"})])
    assert "holistic_bias.axis: religion has 1 subgroup by bucket" in str(problems[0])
