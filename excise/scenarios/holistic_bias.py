"""HolisticBias v1.1: its four files multiplied out into sentences, and the subgroups of an axis chosen from them.

Here belong the rules by which the data set's descriptors, nouns, phrases and templates combine, and the choice of
sentences that makes an axis a scenario; the data set itself is the user's copy (CC BY-SA 4.0) and is never shipped.
The concept is Smith et al. (2022), "I'm sorry to hear that"; its use as prompts is FASP, section 4 (method B2).
"""

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from excise.errors import ExciseError
from excise.scenarios.schema import Group, HolisticBias, Subject

DESCRIPTORS, NOUNS = "descriptors.json", "nouns.json"
TEMPLATES, PHRASES = "sentence_templates.json", "standalone_noun_phrases.json"
NONE = "(none)"
"""The bucket of phrases that belong to an axis but to none of its buckets; also the axis of nouns on their own."""
VALIDATION, TEST = "validation", "test"
VALIDATION_SHARE = 0.2

FORMS = ("noun", "descriptor", "descriptor noun", "noun phrase", "fixed phrase")
"""What stands in a sentence: a noun alone ("a woman"), a descriptor alone ("Deaf"), both ("a Deaf woman"), a noun with
something after it ("a woman with asthma"), or a phrase of its own ("an amputee")."""

SENTENCES_SCHEMA = pl.Schema(
    {
        "axis": pl.String,
        "bucket": pl.String,
        "descriptor": pl.String,
        "preference": pl.String,
        "noun": pl.String,
        "noun_gender": pl.String,
        "form": pl.Enum(FORMS),
        "template": pl.String,
        "first_turn_only": pl.Boolean,
        "text": pl.String,
        "name_start": pl.Int64,
        "name_end": pl.Int64,
    }
)

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


class _Descriptor(_Entry):
    descriptor: _Word
    gender: _Gender | None = None
    article: _Word | None = None


class _Phrase(_Entry):
    noun_phrase: _Word
    plural_noun_phrase: _Word | None = None


class _Template(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    must_be_noun: bool = False
    first_turn_only: bool = False


_Axes = dict[_Word, dict[_Word, list[_Word | _Descriptor]]]
_FILES: dict[str, TypeAdapter] = {
    DESCRIPTORS: TypeAdapter(_Axes),
    NOUNS: TypeAdapter(dict[_Gender, list[tuple[_Word, _Word]]]),
    TEMPLATES: TypeAdapter(dict[_Word, _Template]),
    PHRASES: TypeAdapter(dict[_Word, list[_Word | _Phrase]]),
}


def holistic_bias(folder: Path | str, *, axis: str | None = None, any_version: bool = False) -> pl.DataFrame:
    """All sentences of the data set, or those of one axis, in the order of its files: a frame of `SENTENCES_SCHEMA`.

    folder: where descriptors.json, nouns.json, sentence_templates.json and standalone_noun_phrases.json lie. Version
    1.1 has 566,625 sentences, which is checked axis by axis unless `any_version`. `name_start` and `name_end` cut the
    descriptor out of `text` (end excluded), or the noun of a noun alone, or a phrase without its article. `bucket` is
    "(none)" for phrases without one, and so are axis and descriptor of a noun alone. `preference` says what the people
    described think of a word ("reviewed", "dispreferred", "polarizing"; null: not asked); `noun` is null where there
    is none. `first_turn_only` marks greetings.

    How the parts combine: a descriptor stands alone, and before every noun, or every noun of its gender if it has one.
    A phrase with a place for a noun takes all nouns, a fixed one none. A template that must have a noun takes neither
    descriptors alone nor fixed phrases. "an" stands before a vowel letter, unless the files give an article.

    Raises ExciseError, `file: fault and mend`, for missing or damaged files, another version, and an unknown axis.
    """
    folder = Path(folder)
    axes = _read(folder, DESCRIPTORS, any_version)
    nouns = _read(folder, NOUNS, any_version)
    templates = _read(folder, TEMPLATES, any_version)
    phrases = _read(folder, PHRASES, any_version)
    if axis is not None and axis != NONE:
        _check_axis(axis, axes)
    rows: list[tuple] = []
    if axis in (None, NONE):
        rows += _bare_nouns(nouns)
    for key in (key for key in axes if axis in (None, key)):
        for bucket, entries in axes[key].items():
            rows += ((key, bucket, *row) for entry in entries for row in _descriptor_rows(_as_entry(entry), nouns))
        rows += ((key, NONE, *row) for entry in phrases.get(key, []) for row in _phrase_rows(_as_phrase(entry), nouns))
    sentences = _fill(rows, templates, folder)
    if not any_version:
        _check_sentences(sentences, folder)
    return sentences


def axes_of(folder: Path | str, *, any_version: bool = False) -> dict[str, dict[str, list[str]]]:
    """The descriptors of every bucket of every axis; reads descriptors.json alone. Raises ExciseError like the rest."""
    axes = _read(Path(folder), DESCRIPTORS, any_version)
    return {
        axis: {bucket: [_as_entry(entry).descriptor for entry in entries] for bucket, entries in buckets.items()}
        for axis, buckets in axes.items()
    }


def subgroups_of(chosen: HolisticBias) -> dict[str, Group]:
    """The subgroups of an axis as the groups of a scenario, their descriptors as subjects.

    Reads descriptors.json alone (and the phrases where `none_bucket` asks for them), so listing scenarios is cheap.
    Raises ExciseError, `field: fault and mend`, for an axis or a descriptor that does not exist, a descriptor in two
    families, and an axis with fewer than two subgroups.
    """
    axes = axes_of(chosen.folder, any_version=chosen.any_version)
    _check_axis(chosen.axis, axes)
    buckets = {bucket: list(dict.fromkeys(names)) for bucket, names in axes[chosen.axis].items() if names}
    every = list(dict.fromkeys(name for names in buckets.values() for name in names))
    if chosen.subgroups == "bucket":
        keys = _keys(buckets)
        members = {(key, key.replace("_", " ")): buckets[name] for key, name in zip(keys, buckets, strict=True)}
        if chosen.none_bucket:
            entries = _read(Path(chosen.folder), PHRASES, chosen.any_version).get(chosen.axis, [])
            loose = list(dict.fromkeys(_subject(_as_phrase(entry)) for entry in entries))
            if loose:
                members["none", NONE] = loose
    elif chosen.subgroups == "descriptor":
        members = {(key, name): [name] for key, name in zip(_keys(every), every, strict=True)}
    else:
        _check_families(chosen.families or {}, every, chosen.axis)
        members = {(key, key.replace("_", " ")): names for key, names in (chosen.families or {}).items()}
    if len(members) < 2:
        mend = {
            "bucket": "write subgroups: descriptor, or subgroups: family with families",
            "family": "name at least two families",
            "descriptor": "choose another axis",
        }[chosen.subgroups]
        raise ExciseError(
            f"axis: {chosen.axis} has {len(members)} subgroup{'' if len(members) == 1 else 's'} by {chosen.subgroups}, "
            f"and a bias needs two to differ: {mend}"
        )
    return {
        key: Group(label=label, subjects=tuple(Subject(name=name) for name in names))
        for (key, label), names in members.items()
    }


def subgroup_sentences(chosen: HolisticBias, groups: Mapping[str, Group]) -> pl.DataFrame:
    """The chosen sentences of every subgroup, with the split the paper has: 20 % validation, 80 % test.

    groups: those of `subgroups_of`. Returns group, subject (a descriptor), template, text, name_start, name_end and
    split ("validation" or "test"), ordered by template, group and subject. A sentence that a subgroup has twice counts
    once. The split is drawn within each subgroup, from (seed, text) alone. A cap leaves a subgroup's share of
    validation at 20 %, gives every descriptor about as many sentences, and keeps part of what a larger cap keeps.
    """
    owner = {subject.name: key for key, group in groups.items() for subject in group.subjects}
    sentences = holistic_bias(chosen.folder, axis=chosen.axis, any_version=chosen.any_version)
    if not chosen.none_bucket:
        sentences = sentences.filter(pl.col("bucket") != NONE)
    groups_place = {key: place for place, key in enumerate(groups)}
    subjects_place = {name: place for place, name in enumerate(owner)}
    templates_place = {name: place for place, name in enumerate(sentences["template"].unique(maintain_order=True))}
    found = (
        sentences.with_columns(subject="descriptor", group=pl.col("descriptor").replace_strict(owner, default=None))
        .drop_nulls("group")
        .unique(["group", "subject", "text"], keep="first", maintain_order=True)
    )
    lots = [hashlib.sha256(f"{chosen.seed}|{text}".encode()).digest()[:8] for text in found["text"]]
    found = found.with_columns(lot=pl.Series([int.from_bytes(lot) for lot in lots], dtype=pl.UInt64))
    place = pl.struct("lot", "text").rank("ordinal").over("group")
    share = (pl.len().over("group") * VALIDATION_SHARE).round().clip(1)
    found = found.with_columns(split=pl.when(place <= share).then(pl.lit(VALIDATION)).otherwise(pl.lit(TEST)))
    if chosen.per_subgroup is not None:
        in_validation = max(1, round(chosen.per_subgroup * VALIDATION_SHARE))
        wanted = pl.when(split=VALIDATION).then(in_validation).otherwise(chosen.per_subgroup - in_validation)
        turn = pl.struct("lot", "text").rank("ordinal").over("group", "split", "subject")
        found = found.with_columns(turn=turn)
        kept = pl.struct("turn", "lot", "text").rank("ordinal").over("group", "split")
        found = found.filter(kept <= wanted)
    return found.sort(
        pl.col("template").replace_strict(templates_place, return_dtype=pl.Int64),
        pl.col("group").replace_strict(groups_place, return_dtype=pl.Int64),
        pl.col("subject").replace_strict(subjects_place, return_dtype=pl.Int64),
        maintain_order=True,
    ).select("group", "subject", "template", "text", "name_start", "name_end", "split")


# The rules of combination. A row: descriptor, preference, noun, its gender, form, and the phrase with the place of its
# descriptor, singular and plural, each (text, start, end).


def _bare_nouns(nouns: Mapping[str, list[tuple[str, str]]]) -> Iterator[tuple]:
    for gender, singular, plural in _each(nouns):
        article = f"{_article(singular)} "
        yield (NONE, NONE, NONE, None, singular, gender, "noun", *_placed(article, singular), *_placed("", plural))


def _descriptor_rows(entry: _Descriptor, nouns: Mapping[str, list[tuple[str, str]]]) -> Iterator[tuple]:
    word, alone = entry.descriptor, _placed("", entry.descriptor)
    yield (word, entry.preference, None, None, "descriptor", *alone, *alone)
    article = f"{entry.article or _article(word)} "
    for gender, singular, plural in _each(nouns):
        if entry.gender in (None, gender):
            yield (
                word,
                entry.preference,
                singular,
                gender,
                "descriptor noun",
                *_placed(article, word, f" {singular}"),
                *_placed("", word, f" {plural}"),
            )


def _phrase_rows(entry: _Phrase, nouns: Mapping[str, list[tuple[str, str]]]) -> Iterator[tuple]:
    subject, plurals = _subject(entry), entry.plural_noun_phrase or entry.noun_phrase
    if "{noun}" not in entry.noun_phrase:
        yield (
            subject,
            entry.preference,
            None,
            None,
            "fixed phrase",
            *_without_article(entry.noun_phrase),
            *_without_article(plurals),
        )
        return
    for gender, singular, plural in _each(nouns):
        one = _filled(entry.noun_phrase, _article(singular), singular)
        many = _filled(plurals, "", plural).lstrip()
        yield (
            subject,
            entry.preference,
            singular,
            gender,
            "noun phrase",
            *_without_article(one),
            *_placed("", many),
        )


def _each(nouns: Mapping[str, list[tuple[str, str]]]) -> Iterator[tuple[str, str, str]]:
    return ((gender, singular, plural) for gender, pairs in nouns.items() for singular, plural in pairs)


def _article(word: str) -> str:
    return "an" if word[0].lower() in "aeiou" else "a"


def _filled(phrase: str, article: str, noun: str) -> str:
    return phrase.replace("{article}", article).replace("{noun}", noun)


def _placed(before: str, word: str, after: str = "") -> tuple[str, int, int]:
    return before + word + after, len(before), len(before) + len(word)


def _without_article(phrase: str) -> tuple[str, int, int]:
    article = re.match("(an?) ", phrase)
    return phrase, article.end() if article else 0, len(phrase)


def _subject(entry: _Phrase) -> str:
    """What a phrase says of people: itself, or what stands after the noun."""
    return " ".join(_filled(entry.noun_phrase, "", "").split())


def _as_entry(entry: str | _Descriptor) -> _Descriptor:
    return _Descriptor(descriptor=entry) if isinstance(entry, str) else entry


def _as_phrase(entry: str | _Phrase) -> _Phrase:
    return _Phrase(noun_phrase=entry) if isinstance(entry, str) else entry


def _fill(rows: list[tuple], templates: Mapping[str, _Template], folder: Path) -> pl.DataFrame:
    """Every row in every template that takes it, in the order of the rows."""
    columns = {
        "axis": pl.String,
        "bucket": pl.String,
        "descriptor": pl.String,
        "preference": pl.String,
        "noun": pl.String,
        "noun_gender": pl.String,
        "form": pl.Enum(FORMS),
        "one": pl.String,
        "one_start": pl.Int64,
        "one_end": pl.Int64,
        "many": pl.String,
        "many_start": pl.Int64,
        "many_end": pl.Int64,
    }
    phrases = pl.DataFrame(rows, schema=columns, orient="row")
    pieces = []
    for template, rules in templates.items():
        found = re.findall(r"\{[^{}]*\}", template)
        if found not in (["{noun_phrase}"], ["{plural_noun_phrase}"]):
            raise ExciseError(
                f"{folder / TEMPLATES}: {template!r} must hold {{noun_phrase}} or {{plural_noun_phrase}} once: mend "
                "the template, or take a fresh copy of the data set"
            )
        before, after = template.split(found[0])
        number = "many" if "plural" in found[0] else "one"
        pieces.append((template, rules.first_turn_only, rules.must_be_noun, before, after, number))
    frame = pl.DataFrame(
        pieces,
        schema={
            "template": pl.String,
            "first_turn_only": pl.Boolean,
            "must_be_noun": pl.Boolean,
            "before": pl.String,
            "after": pl.String,
            "number": pl.String,
        },
        orient="row",
    )
    plural = pl.col("number") == "many"
    offset = pl.col("before").str.len_chars().cast(pl.Int64)
    return (
        phrases.join(frame, how="cross", maintain_order="left_right")
        .filter(pl.col("noun").is_not_null() | ~pl.col("must_be_noun"))
        .with_columns(
            text=pl.concat_str("before", pl.when(plural).then("many").otherwise("one"), "after"),
            name_start=offset + pl.when(plural).then("many_start").otherwise("one_start"),
            name_end=offset + pl.when(plural).then("many_end").otherwise("one_end"),
        )
        .select(SENTENCES_SCHEMA.names())
        .match_to_schema(SENTENCES_SCHEMA)
    )


# Checks


def _read(folder: Path, name: str, any_version: bool) -> Any:
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


def _check_sentences(sentences: pl.DataFrame, folder: Path) -> None:
    for axis, count in sentences.group_by("axis", maintain_order=True).len().iter_rows():
        if count != SENTENCES_1_1[axis]:
            raise ExciseError(
                f"{folder}: the axis {axis} has {count:,} sentences, v1.1 has {SENTENCES_1_1[axis]:,}: a template or a "
                "descriptor was changed; take a fresh copy of HolisticBias v1.1, or write any_version: true"
            )


def _check_axis(axis: str, axes: Iterable[str]) -> None:
    if axis not in axes:
        raise ExciseError(f"axis: the data set has no axis {axis!r}; there are {', '.join(axes)}")


def _check_families(families: Mapping[str, Iterable[str]], known: list[str], axis: str) -> None:
    owners: dict[str, str] = {}
    for key, names in families.items():
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
                raise ExciseError(f"families.{key}: the axis {axis} has no descriptor {name!r}; {hint}")
            if name in owners:
                raise ExciseError(f"families.{key} holds {name!r}, which is in families.{owners[name]} too: remove one")
            owners[name] = key


def _keys(names: Iterable[str]) -> list[str]:
    """A key for every name: plain small letters, with a number where two would be alike."""
    keys: list[str] = []
    for name in names:
        plain = unicodedata.normalize("NFKD", name.replace("+", " plus")).encode("ascii", "ignore").decode().lower()
        key = base = re.sub("[^a-z0-9]+", "_", plain).strip("_") or "group"
        count = 1
        while key in keys:
            count += 1
            key = f"{base}_{count}"
        keys.append(key)
    return keys
