"""The schema of a scenario: outcome, groups of subjects, templates and variations, and the rules between them.

Here belongs everything that can be said about one scenario on its own; files, folders and subject sets are read in
`loading`. The rules follow BDB, sections 3 and 4, and FASP, section 3: what is compared must be stated, and every
prompt must name its subject exactly once.
"""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from excise.outcomes.answers import continued, parse_number
from excise.scenarios.templates import fill, fill_prefix, placeholders

KEY_PATTERN = "^[a-z0-9][a-z0-9_-]*$"
OWN_TEMPLATE = "own"  # the template key of a variation that brings a template of its own
SENTENCES = "sentences"  # the one variation of a scenario whose prompts are the sentences of HolisticBias


FLAG = "\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f"  # of England, Scotland, Wales: letters that show as one flag
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"


def _not_bool(value: Any) -> Any:
    if value is True or value is False:
        raise ValueError(f"is {str(value).lower()}, not a number")
    return value


Key = Annotated[str, StringConstraints(pattern=KEY_PATTERN)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
TokenCount = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NumberOutcome(_Part):
    """A number the model answers with, to a user turn in its chat format.

    `low`, `high` and `better` speak of the number as the model writes it, in `unit`s. The range is what a sensible
    answer lies in; it is checked and reported, answers are never clipped to it. `scale` says where differences are
    judged: `log` for prices, whose differences are ratios, else `linear`. `better` is the direction that is to the
    named person's advantage. `reverse_from` scores a rank r as `reverse_from - r`, so that more is better.
    """

    kind: Literal["number"] = "number"
    unit: Text
    low: Number
    high: Number
    scale: Literal["log", "linear"]
    better: Literal["higher", "lower"]
    max_new_tokens: TokenCount = 16
    reverse_from: Number | None = None

    @property
    def prompt_format(self) -> None:
        """None: prompts are put to a model in the format its entry in models.yaml names."""
        return None

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher *scored* value is to the person's advantage."""
        return (self.better == "higher") != (self.reverse_from is not None)

    @property
    def scored_range(self) -> tuple[float, float]:
        """The plausible range of scored values, low to high."""
        if self.reverse_from is None:
            return self.low, self.high
        return self.reverse_from - self.high, self.reverse_from - self.low

    def scored(self, answer: float) -> float:
        """The value an answer counts as: itself, or `reverse_from - answer` for ranks (method A2)."""
        return answer if self.reverse_from is None else self.reverse_from - answer


class ToxicityOutcome(_Part):
    """The toxicity, in [0, 1], of the model's continuation of a raw prompt, without a chat format (FASP, section 4).

    Prompts are cut at `max_prompt_tokens` tokens, which must not be before the descriptor's end. `temperature`, `top_k`
    and `top_p` say how continuations are drawn; 0 for `top_k` and 1 for `top_p` switch that truncation off. All
    defaults are the paper's settings, except for `scored`: with "continuation" the scorer reads what the model wrote
    and nothing else, so a scorer that reacts to the descriptor in the prompt is not mistaken for a biased model; the
    paper scores "prompt+continuation". `scorer` is a key
    of the registry of scorers, None the default scorer.
    """

    kind: Literal["toxicity"] = "toxicity"
    max_new_tokens: TokenCount = 40
    max_prompt_tokens: TokenCount = 22
    temperature: Annotated[Number, Field(ge=0)] = 1.0
    top_k: Count = 50
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    scored: Literal["continuation", "prompt+continuation"] = "continuation"
    scorer: Text | None = None

    @property
    def prompt_format(self) -> Literal["raw"]:
        """Raw text for every model: the prompt is an unfinished sentence, not a user's turn."""
        return "raw"


class HolisticBias(_Part):
    """Which sentences of HolisticBias are the prompts of a scenario (FASP, section 4; method B2).

    `folder` holds the user's copy of the data set. `subgroups` says what a subgroup of the axis is: a bucket of the
    data set, a single descriptor, or a family of descriptors named in `families` (all other descriptors are then left
    out). `none_bucket` counts the phrases without a bucket, `(none)`, as one subgroup more. `per_subgroup` caps the
    sentences of each subgroup, which `seed` chooses, with the split into validation and test. `any_version` takes
    another version of the data set, or a part of it, in the same files.
    """

    folder: Path
    axis: Text
    subgroups: Literal["bucket", "descriptor", "family"] = "bucket"
    families: dict[Key, Annotated[tuple[Text, ...], Field(min_length=1)]] | None = None
    none_bucket: bool = False
    per_subgroup: Annotated[int, BeforeValidator(_not_bool), Field(ge=2)] | None = None
    seed: Count = 0
    any_version: bool = False


class Comparison(_Part):
    """The two groups a disparity is measured between: `majority` is the one expected to be favoured."""

    majority: Key
    minority: Key


class Subject(_Part):
    """One person's full name, or one way to speak of a social group. `gender` (men, women, ...) balances subsets."""

    name: Text
    gender: Key | None = None


class Group(_Part):
    """A group of subjects and the label it has in tables and figures."""

    label: Text
    subjects: tuple[Subject, ...]


class Template(_Part):
    """A request with the placeholder `{name}`, and what the answer to it begins with.

    A file may write the text alone in place of both. `answer_prefix` stands where the answer begins, as it is: behind
    all of a chat format, or behind a raw prompt. The model continues it, and the number is read from both together. It
    may hold the fields of variations.
    """

    text: Text
    answer_prefix: str = ""

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, data: Any) -> Any:
        return data if isinstance(data, dict | Template) else {"text": data}


class Variation(_Part):
    """One variation: the fields filled into the templates, or a template of its own (or both).

    In a file the fields stand beside `template`: `car: {item: car}`.
    """

    fields: dict[str, Text] = {}
    template: Template | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict) or isinstance(data.get("fields"), dict):
            return data
        fields = {key: value for key, value in data.items() if key != "template"}
        return {"fields": fields, **({"template": data["template"]} if "template" in data else {})}


class Scenario(_Part):
    """A use of a model, described so that it can be expanded into prompts and its answers compared between groups.

    With `holistic_bias` the prompts are sentences of that data set: there are no templates, the groups are the
    subgroups of its axis (`holistic_bias.subgroups_of`), and the one variation is "sentences", without fields.

    Raises pydantic's ValidationError (a ValueError) that names each faulty field.
    """

    key: Key
    title: Text
    description: Text
    outcome: Annotated[NumberOutcome | ToxicityOutcome, Field(discriminator="kind")]
    comparison: Comparison | None = None
    groups: dict[Key, Group]
    templates: dict[Key, Template] = {}
    variations: dict[Key, Variation]
    holistic_bias: HolisticBias | None = None

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        faults = list(_faults(self))
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def templates_of(self, variation: str) -> dict[str, Template]:
        """The templates of a variation by key: its own one, else all of the scenario (none with `holistic_bias`)."""
        own = self.variations[variation].template
        return self.templates if own is None else {OWN_TEMPLATE: own}


def _faults(scenario: Scenario) -> Iterator[str]:
    """Every broken rule as `field: fault and mend`."""
    yield from _character_faults("title", scenario.title)
    yield from _character_faults("description", scenario.description, lines=True)
    yield from _outcome_faults(scenario.outcome)
    yield from _group_faults(scenario)
    yield from _comparison_faults(scenario)
    if scenario.holistic_bias is not None:
        yield from _holistic_bias_faults(scenario, scenario.holistic_bias)
        return
    text_faults = list(_text_faults(scenario))
    yield from text_faults or (*_prefix_faults(scenario), *_repeated_name_faults(scenario))


def _outcome_faults(outcome: NumberOutcome | ToxicityOutcome) -> Iterator[str]:
    if not isinstance(outcome, NumberOutcome):
        return
    yield from _character_faults("outcome.unit", outcome.unit)
    if outcome.low >= outcome.high:
        yield f"outcome.low ({outcome.low:g}) must be less than outcome.high ({outcome.high:g})"
    if outcome.scale == "log" and outcome.low <= 0:
        yield f"outcome.low ({outcome.low:g}) must be above 0 on a log scale; raise it or write scale: linear"
    if outcome.reverse_from is not None:
        if outcome.scale == "log":
            yield "outcome.scale must be linear where outcome.reverse_from is given"
        if outcome.better == "higher":
            yield "outcome.better must be lower where outcome.reverse_from is given: it turns ranks, 1 being the best"


def _group_faults(scenario: Scenario) -> Iterator[str]:
    if len(scenario.groups) < 2:
        yield "groups must hold at least two groups to compare"
    owners: dict[str, str] = {}
    for key, group in scenario.groups.items():
        yield from _character_faults(f"groups.{key}.label", group.label)
        if not group.subjects:
            yield f"groups.{key}.subjects is empty: give the group {key} its subjects"
        for subject in group.subjects:
            yield from _character_faults(f"groups.{key}.subjects", subject.name)
            # However a name is written: with combined letters or not, with characters that nobody sees or without.
            plain = unicodedata.normalize("NFKC", subject.name).casefold()
            same = " ".join("".join(each for each in plain if unicodedata.category(each) != "Cf").split())
            if same not in owners:
                owners[same] = key
            elif owners[same] == key:
                yield f"groups.{key}.subjects holds '{subject.name}' twice: remove one"
            else:
                yield f"groups.{key}.subjects holds '{subject.name}', which is in groups.{owners[same]} too: remove one"


def _comparison_faults(scenario: Scenario) -> Iterator[str]:
    comparison = scenario.comparison
    if comparison is None:
        if scenario.outcome.kind == "number":
            yield "comparison is missing: name the majority and the minority group, as a number is compared between two"
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
    if scenario.outcome.kind != "toxicity":
        yield "outcome.kind must be toxicity where holistic_bias is given: its sentences ask for no number"
    if scenario.templates:
        yield "templates must be absent where holistic_bias is given: the data set brings its own"
    if scenario.variations != {SENTENCES: Variation()}:
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
            yield from _character_faults(f"variations.{key}.{field}", variation.fields[field], lines=True)
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
    yield from _character_faults(field, template, lines=True)
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
    found: dict[str, None] = {}
    for key, variation in scenario.variations.items():
        for template_key, template in scenario.templates_of(key).items():
            own = variation.template is not None
            field = f"variations.{key}.template" if own else f"templates.{template_key}"
            if template.answer_prefix:
                found |= dict.fromkeys(_faults_of_prefix(scenario, f"{field}.answer_prefix", key, template))
    yield from found


def _faults_of_prefix(scenario: Scenario, field: str, key: str, template: Template) -> Iterator[str]:
    prefix, fields = template.answer_prefix, scenario.variations[key].fields
    if scenario.outcome.kind != "number":
        yield (
            f"{field}: only an answer that is a number has a prefix; a continuation begins where the template "
            "ends, so write it there"
        )
        return
    if faults := list(_character_faults(field, prefix, lines=True)):
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
        known = ", ".join(f"{{{each}}}" for each in sorted(fields)) or "none"
        yield f"{field} holds {{{unknown[0]}}}, which the variation {key} does not give: known here are {known}"
    if "name" in names or unknown:
        return
    filled = fill_prefix(prefix, fields)
    if any(map(str.isdigit, filled)) or parse_number(filled) is not None:
        yield (
            f"{field} holds a number ({filled!r}), which would be read as the answer, or as part of it: word it without"
        )
        return
    closed = "".join({"(": ")", "[": "]", "{": "}"}[each] for each in reversed(_still_open(filled)))
    for answer in ("50", "1200", "7"):
        read = {parse_number(continued(filled, answer)), parse_number(continued(filled, answer + closed))}
        if read - {None} != {float(answer)}:
            told = ", ".join(map(str, read - {None})) or "no number"
            yield (
                f"{field}: behind {filled!r} the answer {answer} is read as {told}: leave out what changes it, "
                "such as a minus sign or a scale"
            )
            return


def _still_open(text: str) -> list[str]:
    """The brackets that a text opens and does not close."""
    stack: list[str] = []
    for character in text:
        if character in "([{":
            stack.append(character)
        elif character in ")]}" and stack:
            stack.pop()
    return stack


def _character_faults(field: str, text: str, *, lines: bool = False) -> Iterator[str]:
    """Characters that are no text: a model would read them, and nobody would see them. lines: line breaks are text."""
    for character in dict.fromkeys(re.sub(FLAG, "", text)):
        if lines and character in "\n\t":
            continue
        category = unicodedata.category(character)
        if character in "\n\r\v\f\x1c\x1d\x1e\x85" or category in ("Zl", "Zp"):
            what, mend = "a line break", "write \\n for it" if lines else "write it in one line"
        elif category == "Cc":
            what, mend = "a control character", "remove it"
        elif category == "Co":
            what, mend = "a character of private use, which means nothing to a model", "write another one"
        elif character == "\ufffd":
            what, mend = "what is left of a character read in a wrong encoding", "write the character itself"
        elif character == "\ufeff" or ord(character) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(character) <= 0xFDEF:
            what, mend = "a mark of the encoding, which is no character", "remove it"
        elif "\U000e0000" <= character <= "\U000e007f":
            what, mend = "a letter that nobody sees", "remove it"
        elif "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u206f":
            what, mend = "a mark that changes the direction of the text", "remove it"
        else:
            continue
        shown = text.encode("unicode_escape").decode("ascii")
        yield f"{field}: '{shown}' holds {what} (U+{ord(character):04X}): {mend}"
    unseen = ("Cc", "Cf", "Zs", "Zl", "Zp")
    if all(unicodedata.category(character) in unseen or character in BLANK_LETTERS for character in text):
        yield f"{field} holds no character that can be seen: give it a text"


def _unfilled(template: str, variation: Variation) -> list[str]:
    return [name for name in dict.fromkeys(placeholders(template)) if name != "name" and name not in variation.fields]


def _known_placeholders(fields: Any) -> str:
    return "known here are " + ", ".join(f"{{{field}}}" for field in ("name", *sorted(fields)))


def _repeated_name_faults(scenario: Scenario) -> Iterator[str]:
    """A subject found a second time in its prompt: attention to "the name" would then be ambiguous."""
    for variation_key, variation in scenario.variations.items():
        for template_key, template in scenario.templates_of(variation_key).items():
            own = variation.template is not None
            field = f"variations.{variation_key}.template" if own else f"templates.{template_key}"
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
