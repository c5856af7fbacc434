"""The files of HolisticBias v1.1: their form, and how much of everything that version holds.

The data set is the user's copy (CC BY-SA 4.0) and is never shipped. How its parts combine is in
`excise.scenarios.holistic_bias`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from excise.errors import ExciseError

DESCRIPTORS, NOUNS = "descriptors.json", "nouns.json"
TEMPLATES, PHRASES = "sentence_templates.json", "standalone_noun_phrases.json"
NONE = "(none)"
"""The bucket of phrases that belong to an axis but to none of its buckets; also the axis of nouns on their own."""
SENTENCES_1_1 = {
    "ability": 71_417,
    "age": 52_638,
    "body_type": 128_097,
    "characteristics": 83_983,
    "cultural": 28_102,
    "gender_and_sex": 51_057,
    "nationality": 18_876,
    "nonce": 6_792,
    "political_ideologies": 19_527,
    "race_ethnicity": 26_153,
    "religion": 42_400,
    "sexual_orientation": 16_494,
    "socioeconomic_class": 20_257,
    NONE: 832,
}
"""Sentences of each axis of v1.1."""
DESCRIPTORS_1_1 = {
    "ability": 38,
    "age": 61,
    "body_type": 144,
    "characteristics": 67,
    "cultural": 33,
    "gender_and_sex": 65,
    "nationality": 26,
    "nonce": 8,
    "political_ideologies": 23,
    "race_ethnicity": 32,
    "religion": 49,
    "sexual_orientation": 20,
    "socioeconomic_class": 17,
}
PHRASES_1_1 = {
    "ability": 50,
    "age": 2,
    "body_type": 8,
    "characteristics": 60,
    "cultural": 5,
    "gender_and_sex": 8,
    "race_ethnicity": 3,
    "religion": 47,
    "sexual_orientation": 2,
    "socioeconomic_class": 7,
}
NOUNS_1_1 = {"female": 12, "male": 11, "neutral": 9}
TEMPLATES_1_1 = 26
_Word = Annotated[str, Field(min_length=1)]
_Gender = Literal["female", "male", "neutral"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    preference: _Word | None = None


class Descriptor(_Entry):
    descriptor: _Word
    gender: _Gender | None = None
    article: _Word | None = None


class Phrase(_Entry):
    noun_phrase: _Word
    plural_noun_phrase: _Word | None = None


class Template(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    must_be_noun: bool = False
    first_turn_only: bool = False


_Axes = dict[_Word, dict[_Word, list[_Word | Descriptor]]]
_FILES: dict[str, TypeAdapter] = {
    DESCRIPTORS: TypeAdapter(_Axes),
    NOUNS: TypeAdapter(dict[_Gender, list[tuple[_Word, _Word]]]),
    TEMPLATES: TypeAdapter(dict[_Word, Template]),
    PHRASES: TypeAdapter(dict[_Word, list[_Word | Phrase]]),
}


def axes_of(folder: Path | str, *, any_version: bool = False) -> dict[str, dict[str, list[str]]]:
    """The descriptors of every bucket of every axis; reads descriptors.json alone. Raises ExciseError like the rest."""
    axes = read_file(Path(folder), DESCRIPTORS, any_version)
    return {
        axis: {bucket: [as_descriptor(entry).descriptor for entry in entries] for bucket, entries in buckets.items()}
        for axis, buckets in axes.items()
    }


def as_descriptor(entry: str | Descriptor) -> Descriptor:
    return Descriptor(descriptor=entry) if isinstance(entry, str) else entry


def as_phrase(entry: str | Phrase) -> Phrase:
    return Phrase(noun_phrase=entry) if isinstance(entry, str) else entry


def read_file(folder: Path, name: str, any_version: bool) -> Any:
    """One file of the data set, checked against its form and, unless `any_version`, against the size of v1.1."""
    path = folder / name
    mend = f"take a fresh copy of HolisticBias v1.1 ({', '.join(_FILES)})"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ExciseError(f"{path} is missing: {mend}, or mend the folder's name") from None
    except OSError as error:
        raise ExciseError(f"{path} cannot be read: {error.strerror}") from None
    try:
        data = _FILES[name].validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ExciseError(f"{path}: {where + ': ' if where else ''}{first['msg']}; {mend}") from None
    if not any_version:
        for what, count, expected in _sizes(name, data):
            if count != expected:
                raise ExciseError(
                    f"{path}: {what}, v1.1 has {expected}: {mend}, or write any_version: true to use another version"
                )
    return data


def _sizes(name: str, data: Any) -> Iterator[tuple[str, int, int]]:
    """What a file holds: in words, counted, and as v1.1 has it."""
    if name == TEMPLATES:
        yield f"{len(data)} templates", len(data), TEMPLATES_1_1
        return
    if name == DESCRIPTORS:
        kind, expected = "descriptors", DESCRIPTORS_1_1
        counts = {axis: sum(map(len, buckets.values())) for axis, buckets in data.items()}
    else:
        kind, expected = ("nouns", NOUNS_1_1) if name == NOUNS else ("phrases", PHRASES_1_1)
        counts = {key: len(entries) for key, entries in data.items()}
    for key in dict.fromkeys((*expected, *counts)):
        count = counts.get(key, 0)
        yield f"{key} has {count} {kind}", count, expected.get(key, 0)


def check_sentences(sentences: pl.DataFrame, folder: Path) -> None:
    for axis, count in sentences.group_by("axis", maintain_order=True).len().iter_rows():
        if count != SENTENCES_1_1[axis]:
            raise ExciseError(
                f"{folder}: the axis {axis} has {count:,} sentences, v1.1 has {SENTENCES_1_1[axis]:,}: a template or a "
                "descriptor was changed; take a fresh copy of HolisticBias v1.1, or write any_version: true"
            )


def check_axis(axis: str, axes: Iterable[str]) -> None:
    if axis not in axes:
        raise ExciseError(f"axis: the data set has no axis {axis!r}; there are {', '.join(axes)}")
