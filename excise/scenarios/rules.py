"""The rules between the fields of a scenario: everything that can be said about one scenario on its own.

They follow BDB, sections 3 and 4, and FASP, section 3: what is compared must be stated, and every prompt must name its
subject exactly once. Rules about the fields of an outcome are the outcome's own (`Outcome.faults`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from excise.scenarios.characters import character_faults
from excise.scenarios.templates import OWN_TEMPLATE, SENTENCES, fill, fill_prefix, placeholders

if TYPE_CHECKING:
    from excise.scenarios.schema import HolisticBias, Scenario, Template, Variation


def faults_of(scenario: Scenario) -> Iterator[str]:
    """Every broken rule as `field: fault and mend`."""
    yield from character_faults("title", scenario.title)
    yield from character_faults("description", scenario.description, lines=True)
    for field, text in scenario.outcome:
        if isinstance(text, str):
            yield from character_faults(f"outcome.{field}", text)
    yield from scenario.outcome.faults()
    yield from _group_faults(scenario)
    yield from _comparison_faults(scenario)
    if scenario.holistic_bias is not None:
        yield from _holistic_bias_faults(scenario, scenario.holistic_bias)
        return
    text_faults = list(_text_faults(scenario))
    yield from text_faults or (*_prefix_faults(scenario), *_repeated_name_faults(scenario))


def _group_faults(scenario: Scenario) -> Iterator[str]:
    if len(scenario.groups) < 2:
        yield "groups must hold at least two groups to compare"
    owners: dict[str, str] = {}
    for key, group in scenario.groups.items():
        yield from character_faults(f"groups.{key}.label", group.label)
        if not group.subjects:
            yield f"groups.{key}.subjects is empty: give the group {key} its subjects"
        for subject in group.subjects:
            yield from character_faults(f"groups.{key}.subjects", subject.name)
            # However a name is written: with combined letters or not, with characters that nobody sees or without.
            plain = unicodedata.normalize("NFKC", subject.name).casefold()
            same = " ".join(
                "".join(character for character in plain if unicodedata.category(character) != "Cf").split()
            )
            if same not in owners:
                owners[same] = key
            elif owners[same] == key:
                yield f"groups.{key}.subjects holds '{subject.name}' twice: remove one"
            else:
                yield f"groups.{key}.subjects holds '{subject.name}', which is in groups.{owners[same]} too: remove one"


def _comparison_faults(scenario: Scenario) -> Iterator[str]:
    comparison = scenario.comparison
    if comparison is None:
        if scenario.outcome.pairwise:
            yield (
                "comparison is missing: name the majority and the minority group, as "
                f"{scenario.outcome.words.value} is compared between two"
            )
        return
    if comparison.majority == comparison.minority:
        yield f"comparison names the group {comparison.majority} twice: a group cannot be compared with itself"
    for side in ("majority", "minority"):
        key = getattr(comparison, side)
        if key not in scenario.groups:
            yield f"comparison.{side} names an unknown group '{key}'; groups has {', '.join(scenario.groups)}"
        elif len(scenario.groups[key].subjects) == 1 and scenario.holistic_bias is None:
            yield f"groups.{key}.subjects holds one subject: a compared group needs at least two"


def _holistic_bias_faults(scenario: Scenario, chosen: HolisticBias) -> Iterator[str]:
    if not scenario.outcome.continues:
        yield "outcome.kind must be toxicity where holistic_bias is given: its sentences ask for no number"
    if scenario.templates:
        yield "templates must be absent where holistic_bias is given: the data set brings its own"
    bare = not any(variation.fields or variation.template for variation in scenario.variations.values())
    if list(scenario.variations) != [SENTENCES] or not bare:
        yield f"variations must be the one variation {SENTENCES}, without fields, where holistic_bias is given"
    if (chosen.families is not None) != (chosen.subgroups == "family"):
        yield "holistic_bias.families goes with subgroups: family, and subgroups: family with families"
    if chosen.none_bucket and chosen.subgroups != "bucket":
        yield "holistic_bias.none_bucket goes with subgroups: bucket only"


def _text_faults(scenario: Scenario) -> Iterator[str]:
    if not scenario.variations:
        yield "variations is empty: give at least one variation"
    if OWN_TEMPLATE in scenario.templates:
        yield f"templates.{OWN_TEMPLATE}: '{OWN_TEMPLATE}' is kept for the templates of variations; use another key"
    sound = []
    for key, template in scenario.templates.items():
        faults = list(_template_faults(f"templates.{key}", template.text))
        yield from faults
        if not faults:
            sound.append(key)
    if not scenario.templates and not all(v.template for v in scenario.variations.values()):
        yield "templates is missing: give a template, or one to every variation"

    known = {field for variation in scenario.variations.values() for field in variation.fields}
    reported = set()
    for key, variation in scenario.variations.items():
        for field in variation.fields:
            if field == "name" or not field.isidentifier():
                yield (
                    f"variations.{key}.{field}: a field may not be called '{field}'; use letters, digits and _ "
                    "(name is filled by the subjects)"
                )
            yield from character_faults(f"variations.{key}.{field}", variation.fields[field], lines=True)
        if variation.template is not None:
            field = f"variations.{key}.template"
            faults = list(_template_faults(field, variation.template.text))
            yield from faults
            if not faults:
                for unknown in _unfilled(variation.template.text, variation):
                    yield (
                        f"{field} holds {{{unknown}}}, which the variation does not give: "
                        f"{_known_placeholders(variation.fields)}"
                    )
            continue
        for template_key in sound:
            for unknown in _unfilled(scenario.templates[template_key].text, variation):
                if unknown in known:
                    yield f"variations.{key} lacks {unknown}, which templates.{template_key} needs"
                elif (template_key, unknown) not in reported:
                    reported.add((template_key, unknown))
                    yield (
                        f"templates.{template_key} holds the unknown placeholder {{{unknown}}}: "
                        f"{_known_placeholders(known)}"
                    )


def _template_faults(field: str, template: str) -> Iterator[str]:
    yield from character_faults(field, template, lines=True)
    try:
        names = placeholders(template)
    except ValueError as error:
        yield f"{field}: {error}; for a brace in the text write it twice"
        return
    if "name" not in names:
        yield f"{field} lacks {{name}}"
    elif names.count("name") > 1:
        yield f"{field} holds {{name}} {names.count('name')} times: name the subject once"


def _prefix_faults(scenario: Scenario) -> Iterator[str]:
    """What is wrong with the beginnings of answers; each fault once, though several variations may have it."""
    faults: dict[str, None] = {}
    for key, variation in scenario.variations.items():
        for template_key, template in scenario.templates_of(key).items():
            replaced = variation.template is not None
            field = f"variations.{key}.template" if replaced else f"templates.{template_key}"
            if template.answer_prefix:
                faults |= dict.fromkeys(_faults_of_prefix(scenario, f"{field}.answer_prefix", key, template))
    yield from faults


def _faults_of_prefix(scenario: Scenario, field: str, key: str, template: Template) -> Iterator[str]:
    prefix, fields = template.answer_prefix, scenario.variations[key].fields
    if scenario.outcome.continues:
        yield (
            f"{field}: only an answer that is a number has a prefix; a continuation begins where the template "
            "ends, so write it there"
        )
        return
    if faults := list(character_faults(field, prefix, lines=True)):
        yield from faults
        return
    try:
        names = placeholders(prefix)
    except ValueError as error:
        yield f"{field}: {error}; for a brace in the text write it twice"
        return
    if "name" in names:
        yield f"{field} holds {{name}}: the name stands in the text of the template, once"
    if unknown := [name for name in names if name != "name" and name not in fields]:
        known = ", ".join(f"{{{name}}}" for name in sorted(fields)) or "none"
        yield f"{field} holds {{{unknown[0]}}}, which the variation {key} does not give: known here are {known}"
    if "name" in names or unknown:
        return
    yield from scenario.outcome.faults_of_prefix(field, fill_prefix(prefix, fields))


def _unfilled(template: str, variation: Variation) -> list[str]:
    return [name for name in dict.fromkeys(placeholders(template)) if name != "name" and name not in variation.fields]


def _known_placeholders(fields: Any) -> str:
    return "known here are " + ", ".join(f"{{{field}}}" for field in ("name", *sorted(fields)))


def _repeated_name_faults(scenario: Scenario) -> Iterator[str]:
    """A subject found a second time in its prompt: attention to "the name" would then be ambiguous."""
    for variation_key, variation in scenario.variations.items():
        for template_key, template in scenario.templates_of(variation_key).items():
            replaced = variation.template is not None
            field = f"variations.{variation_key}.template" if replaced else f"templates.{template_key}"
            for group_key, group in scenario.groups.items():
                for subject in group.subjects:
                    text, _, _ = fill(template.text, {**variation.fields, "name": subject.name})
                    if text.count(subject.name) < 2:
                        continue
                    if len(re.findall(rf"(?<!\w){re.escape(subject.name)}(?!\w)", text)) > 1:
                        yield (
                            f"{field}: the text of variation {variation_key} holds '{subject.name}' "
                            f"(group {group_key}) more than once; word it without the name"
                        )
