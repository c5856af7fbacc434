"""Expansion of a scenario into its prompts: one row per variation, template, group and subject.

Here belong the prompts table and the choice of a subset of subjects; chat formats and tokens belong to sampling.
Prompts are identified by a hash of what they say and stand for, so equal prompts have equal ids in every run.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import polars as pl

from excise.errors import ExciseError
from excise.scenarios.holistic_bias_groups import subgroup_sentences
from excise.scenarios.schema import Group, Scenario, Subject
from excise.scenarios.templates import fill, fill_prefix

PROMPTS_SCHEMA = pl.Schema(
    {
        "scenario": pl.String,
        "variation": pl.String,
        "template": pl.String,
        "group": pl.String,
        "subject": pl.String,
        "gender": pl.String,
        "prompt_id": pl.String,
        "text": pl.String,
        "answer_prefix": pl.String,
        "name_start": pl.Int64,
        "name_end": pl.Int64,
    }
)

SENTENCES_OF_A_DESCRIPTOR = 849  # 32 nouns in 26 templates, and alone in the 17 that need no noun (HolisticBias v1.1)


def expand(
    scenario: Scenario, *, variations: Iterable[str] | None = None, subjects_per_group: int | None = None
) -> pl.DataFrame:
    """All prompts of a scenario, ordered by variation, template, group and subject as the file has them.

    `variations` restricts to some variations. `subjects_per_group` restricts every group to so many subjects, the
    genders taking turns (the first man, the first woman, the second man, ...); the rows kept equal those of the full
    table. Social groups (of an axis) have unequal numbers of descriptors: a group with fewer keeps all.
    `name_start` and `name_end` are character offsets of the subject in `text`, end excluded. `gender` is null where
    none is given. Sentences of HolisticBias have the data set's template in `template`, several rows per subject.

    Raises ExciseError for an unknown variation, for more subjects than a group of names has, and for a HolisticBias
    folder that changed for the worse since the scenario was loaded.
    """
    chosen = _chosen_variations(scenario, variations)
    names = scenario.outcome.pairwise
    subjects = {
        key: _chosen_subjects(scenario.key, key, group, subjects_per_group, names=names)
        for key, group in scenario.groups.items()
    }
    rows = []
    for variation, template_key, group, subject, prefix, text, start, end in _texts(scenario, chosen, subjects):
        identity = f"{scenario.key}|{variation}|{template_key}|{group}|{subject.name}|{text}"
        if prefix:
            identity += f"|{prefix}"
        prompt_id = hashlib.sha256(identity.encode()).hexdigest()[:16]
        rows.append(
            (
                scenario.key,
                variation,
                template_key,
                group,
                subject.name,
                subject.gender,
                prompt_id,
                text,
                prefix,
                start,
                end,
            )
        )
    return pl.DataFrame(rows, schema=PROMPTS_SCHEMA, orient="row")


def prompt_count(scenario: Scenario) -> int:
    """How many prompts a scenario has, told without expanding it.

    Of sentences of HolisticBias it is an upper bound: the cap of each subgroup, or the 849 sentences that a descriptor
    of version 1.1 has if it goes with all nouns.
    """
    if scenario.holistic_bias is None:
        subjects = sum(len(group.subjects) for group in scenario.groups.values())
        return subjects * sum(len(scenario.templates_of(variation)) for variation in scenario.variations)
    cap = scenario.holistic_bias.per_subgroup
    sizes = [SENTENCES_OF_A_DESCRIPTOR * len(group.subjects) for group in scenario.groups.values()]
    return sum(size if cap is None else min(size, cap) for size in sizes)


def _texts(scenario: Scenario, variations: Sequence[str], subjects: Mapping[str, Sequence[Subject]]) -> Iterator[tuple]:
    """variation, template's key, group, subject, answer's prefix, text and the subject's offsets in it, of every
    prompt."""
    if scenario.holistic_bias is not None:
        wanted = {(group, subject.name): subject for group, members in subjects.items() for subject in members}
        sentences = subgroup_sentences(scenario.holistic_bias, scenario.groups).drop("split")
        for group, name, template, *rest in sentences.iter_rows():
            if (group, name) in wanted:
                yield variations[0], template, group, wanted[group, name], "", *rest
        return
    for variation in variations:
        fields = scenario.variations[variation].fields
        for template_key, template in scenario.templates_of(variation).items():
            prefix = fill_prefix(template.answer_prefix, fields)
            for group, members in subjects.items():
                for subject in members:
                    place = fill(template.text, {**fields, "name": subject.name})
                    yield variation, template_key, group, subject, prefix, *place


def _chosen_variations(scenario: Scenario, variations: Iterable[str] | None) -> list[str]:
    if variations is None:
        return list(scenario.variations)
    wanted = [variations] if isinstance(variations, str) else list(variations)
    unknown = [key for key in wanted if key not in scenario.variations]
    if unknown:
        raise ExciseError(
            f"scenario {scenario.key}: unknown variation {', '.join(map(repr, unknown))}; "
            f"known are {', '.join(scenario.variations)}"
        )
    if not wanted:
        raise ExciseError(f"scenario {scenario.key}: no variation chosen; known are {', '.join(scenario.variations)}")
    return [key for key in scenario.variations if key in wanted]


def _chosen_subjects(
    scenario_key: str, group_key: str, group: Group, count: int | None, *, names: bool
) -> Sequence[Subject]:
    if count is None:
        return group.subjects
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ExciseError(f"subjects_per_group is {count!r}: give a whole number of at least 1")
    if names and count > len(group.subjects):
        raise ExciseError(
            f"scenario {scenario_key}: subjects_per_group is {count}, but the group {group_key} has "
            f"{len(group.subjects)} subjects; ask for at most that many"
        )
    turns: dict[str | None, int] = {}
    places = []
    for place, subject in enumerate(group.subjects):
        turn = turns[subject.gender] = turns.get(subject.gender, 0) + 1
        places.append((turn, list(turns).index(subject.gender), place))
    kept = {place for _, _, place in sorted(places)[:count]}
    return [subject for place, subject in enumerate(group.subjects) if place in kept]
