"""The sentences of HolisticBias v1.1: its four files multiplied out.

Here belong the rules by which the data set's descriptors, nouns, phrases and templates combine. Its files are read in
`holistic_bias_files`; which sentences make a scenario is in `holistic_bias_groups`.
The concept is Smith et al. (2022), "I'm sorry to hear that".
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl

from excise.errors import ExciseError
from excise.files.tables import Schema
from excise.scenarios.holistic_bias_files import (
    DESCRIPTORS,
    NONE,
    NOUNS,
    PHRASES,
    TEMPLATES,
    Descriptor,
    Phrase,
    Template,
    as_descriptor,
    as_phrase,
    check_axis,
    check_sentences,
    read_file,
)

FORMS = ("noun", "descriptor", "descriptor noun", "noun phrase", "fixed phrase")
"""What stands in a sentence: a noun alone ("a woman"), a descriptor alone ("Deaf"), both ("a Deaf woman"), a noun with
something after it ("a woman with asthma"), or a phrase of its own ("an amputee")."""
_SENTENCE: Schema = {
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
SENTENCES_SCHEMA = pl.Schema(_SENTENCE)


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
    axes = read_file(folder, DESCRIPTORS, any_version)
    nouns = read_file(folder, NOUNS, any_version)
    templates = read_file(folder, TEMPLATES, any_version)
    phrases = read_file(folder, PHRASES, any_version)
    if axis is not None and axis != NONE:
        check_axis(axis, axes)
    rows: list[tuple] = []
    if axis in (None, NONE):
        rows += _bare_nouns(nouns)
    for key in (key for key in axes if axis in (None, key)):
        for bucket, entries in axes[key].items():
            rows += ((key, bucket, *row) for entry in entries for row in _descriptor_rows(as_descriptor(entry), nouns))
        rows += ((key, NONE, *row) for entry in phrases.get(key, []) for row in _phrase_rows(as_phrase(entry), nouns))
    sentences = _fill(rows, templates, folder)
    if not any_version:
        check_sentences(sentences, folder)
    return sentences


def _bare_nouns(nouns: Mapping[str, list[tuple[str, str]]]) -> Iterator[tuple]:
    for gender, singular, plural in _singular_and_plural(nouns):
        article = f"{_article(singular)} "
        yield (NONE, NONE, NONE, None, singular, gender, "noun", *_placed(article, singular), *_placed("", plural))


def _descriptor_rows(entry: Descriptor, nouns: Mapping[str, list[tuple[str, str]]]) -> Iterator[tuple]:
    word, alone = entry.descriptor, _placed("", entry.descriptor)
    yield (word, entry.preference, None, None, "descriptor", *alone, *alone)
    article = f"{entry.article or _article(word)} "
    for gender, singular, plural in _singular_and_plural(nouns):
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


def _phrase_rows(entry: Phrase, nouns: Mapping[str, list[tuple[str, str]]]) -> Iterator[tuple]:
    subject, plurals = subject_of(entry), entry.plural_noun_phrase or entry.noun_phrase
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
    for gender, singular, plural in _singular_and_plural(nouns):
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


def _singular_and_plural(nouns: Mapping[str, list[tuple[str, str]]]) -> Iterator[tuple[str, str, str]]:
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


def subject_of(entry: Phrase) -> str:
    """What a phrase says of people: itself, or what stands after the noun."""
    return " ".join(_filled(entry.noun_phrase, "", "").split())


def _fill(rows: list[tuple], templates: Mapping[str, Template], folder: Path) -> pl.DataFrame:
    """Every row in every template that takes it, in the order of the rows."""
    columns: Schema = {
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
        fields = re.findall(r"\{[^{}]*\}", template)
        if fields not in (["{noun_phrase}"], ["{plural_noun_phrase}"]):
            raise ExciseError(
                f"{folder / TEMPLATES}: {template!r} must hold {{noun_phrase}} or {{plural_noun_phrase}} once: mend "
                "the template, or take a fresh copy of the data set"
            )
        before, after = template.split(fields[0])
        number = "many" if "plural" in fields[0] else "one"
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
