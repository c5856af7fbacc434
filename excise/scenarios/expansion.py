"""Expansion of a scenario into its prompts: one row per variation, template, group and subject.

Here belong the prompts table and the choice of a subset of subjects; chat formats and tokens belong to sampling.
Prompts are identified by a hash of what they say and stand for, so equal prompts have equal ids in every run.
"""

import hashlib
from collections.abc import Iterable, Sequence

import polars as pl

from excise.errors import ExciseError
from excise.scenarios.schema import Group, Scenario, Subject
from excise.scenarios.templates import fill

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
        "name_start": pl.Int64,
        "name_end": pl.Int64,
    }
)


def expand(
    scenario: Scenario, *, variations: Iterable[str] | None = None, subjects_per_group: int | None = None
) -> pl.DataFrame:
    """All prompts of a scenario, ordered by variation, template, group and subject as the file has them.

    `variations` restricts to some variations. `subjects_per_group` restricts every group to so many subjects, the
    genders taking turns (the first man, the first woman, the second man, ...); the rows kept equal those of the full
    table. `name_start` and `name_end` are character offsets of the subject in `text`, end excluded. `gender` is null
    where none is given.

    Raises ExciseError for an unknown variation and for more subjects than a group has.
    """
    chosen = _chosen_variations(scenario, variations)
    subjects = {key: _chosen_subjects(scenario.key, key, group, subjects_per_group)
                for key, group in scenario.groups.items()}
    rows = []
    for variation in chosen:
        fields = scenario.variations[variation].fields
        for template_key, template in scenario.templates_of(variation).items():
            for group, members in subjects.items():
                for subject in members:
                    text, start, end = fill(template, {**fields, "name": subject.name})
                    identity = f"{scenario.key}|{variation}|{template_key}|{group}|{subject.name}|{text}"
                    prompt_id = hashlib.sha256(identity.encode()).hexdigest()[:16]
                    rows.append((scenario.key, variation, template_key, group, subject.name, subject.gender,
                                 prompt_id, text, start, end))
    return pl.DataFrame(rows, schema=PROMPTS_SCHEMA, orient="row")


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


def _chosen_subjects(scenario_key: str, group_key: str, group: Group, count: int | None) -> Sequence[Subject]:
    if count is None:
        return group.subjects
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ExciseError(f"subjects_per_group is {count!r}: give a whole number of at least 1")
    if count > len(group.subjects):
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
