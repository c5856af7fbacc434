"""The schema of a scenario: outcome, groups of subjects, templates and variations.

Here belong the fields of everything that a scenario file holds but the outcome, whose fields are its own. The rules
between them are in `rules`; files, folders and subject sets are read in `loading`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator
from pydantic_core import PydanticCustomError

from excise.errors import ExciseError
from excise.files.fields import Count, Key, Text, no_truth_value
from excise.files.yaml_files import described
from excise.outcomes import Outcome, outcome_of
from excise.scenarios.rules import faults_of
from excise.scenarios.templates import OWN_TEMPLATE

OUTCOME_KIND = "outcome_kind"
"""Pydantic's type of an error about the kind of an outcome; `fault` in its context says what is wrong."""


def _of_its_kind(data: Any) -> Any:
    """An outcome as a file has it as one of its kind. What is no mapping is left to the schema."""
    if not isinstance(data, Mapping):
        return data
    try:
        outcome = outcome_of(data.get("kind"))
    except ExciseError as error:
        written = f"is {described(data['kind'])}" if "kind" in data else "is missing"
        raise PydanticCustomError(OUTCOME_KIND, "{fault}", {"fault": f"{written}: {error}"}) from None
    return outcome.model_validate(data)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
    per_subgroup: Annotated[int, BeforeValidator(no_truth_value), Field(ge=2)] | None = None
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
    outcome: SerializeAsAny[Annotated[Outcome, BeforeValidator(_of_its_kind)]]
    comparison: Comparison | None = None
    groups: dict[Key, Group]
    templates: dict[Key, Template] = {}
    variations: dict[Key, Variation]
    holistic_bias: HolisticBias | None = None

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        faults = list(faults_of(self))
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def templates_of(self, variation: str) -> dict[str, Template]:
        """The templates of a variation by key: its own one, else all of the scenario (none with `holistic_bias`)."""
        its_template = self.variations[variation].template
        return self.templates if its_template is None else {OWN_TEMPLATE: its_template}
