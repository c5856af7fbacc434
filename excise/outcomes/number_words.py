"""The words that belong to numbers: number_words.yaml in the form in which the reader of numbers asks for it.

Only words and the patterns made of them live here; how they make up a number is in `excise.outcomes.number_reader`.
"""

import re
import unicodedata
from collections.abc import Container
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from excise.files.yaml_files import load_yaml
from excise.outcomes.characters import BLANK

FILE = Path(__file__).parent / "number_words.yaml"


@dataclass(frozen=True)
class Meaning:
    """One meaning of a scale word: its factor, the languages in which it has it, whether it needs a currency beside it,
    and whether it holds where nothing tells the language."""

    factor: float
    languages: frozenset[str]
    beside_currency: bool
    default: bool


@dataclass(frozen=True)
class Currency:
    """A currency by the marks that stand beside amounts; `point_groups`: three digits behind a point are thousands."""

    name: str
    point_groups: bool
    languages: frozenset[str]
    scale: float = 1.0


@dataclass
class Words:
    """All words. Those with a capital letter count only as written, all others in any case."""

    scales: dict[str, list[Meaning]] = field(default_factory=dict)
    prose: set[str] = field(default_factory=set)
    currencies: dict[str, Currency] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    lists: dict[str, frozenset[str]] = field(default_factory=dict)
    harmless: dict[str, frozenset[str]] = field(default_factory=dict)
    spaceless_scales: dict[str, float] = field(default_factory=dict)
    ideographs: dict[str, int] = field(default_factory=dict)
    ideograph_scales: dict[str, int] = field(default_factory=dict)
    phrases: dict[str, int] = field(default_factory=dict)
    continuations: frozenset[str] = frozenset()

    def key(self, written: str, table: Container[str]) -> str | None:
        """`written` as it stands in a table: a word with capitals as it is, else folded; None if it does not stand
        there."""
        if written in table:
            return written
        folded = written.casefold()
        return folded if folded in table else None


def _unaccented(word: str) -> str:
    """A Latin word without its accents; words of other scripts as they are."""
    plain = "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")
    return plain if plain.isascii() else word


def _split(words: str) -> list[str]:
    return [unicodedata.normalize("NFC", word.replace("_", " ")) for word in words.split()]


def _spellings(words: str) -> list[str]:
    """The listed words, long ones also without their accents."""
    spellings = []
    for word in _split(words):
        plain = _unaccented(word)
        spellings += [word, plain] if word != plain and len(plain) > 3 else [word]
    return spellings


@cache
def number_words() -> Words:
    """The words of number_words.yaml."""
    data = load_yaml(FILE, "kinds of words to words")
    words = Words()
    for group in data["scales"]:
        languages = frozenset(group["languages"].split())
        for name in ("words", "beside_currency"):
            for factor, listed in group.get(name, {}).items():
                meaning = Meaning(float(factor), languages, name == "beside_currency", group.get("default", False))
                for word in _spellings(listed):
                    if meaning not in words.scales.setdefault(word, []):
                        words.scales[word].append(meaning)
        words.prose |= set(_spellings(group.get("prose", "")))
    for entry in data["currencies"]:
        currency = Currency(entry["name"], entry.get("point_groups", False), frozenset(entry["languages"].split()))
        for mark in _spellings(entry["marks"]):
            words.currencies.setdefault(mark, currency)
    for name, scaled in data["scaled_currencies"].items():
        groups = name in ("euro", "krone", "forint")
        for factor, marks in scaled.items():
            for mark in _split(marks):
                words.currencies[mark] = Currency(name, groups, frozenset(), float(factor))
    for unit, listed in data["units"].items():
        for word in _spellings(listed):
            words.units.setdefault(word, unit)
    for name in (
        "unread",
        "negative",
        "range",
        "between",
        "and",
        "multiple",
        "part",
        "hedge",
        "months",
        "labels",
        "negative_after",
        "relative",
        "loss",
        "year_after",
        "names",
        "english_units",
    ):
        words.lists[name] = frozenset(_spellings(data[name]))
    for name in (
        "negative_spaceless",
        "range_spaceless",
        "part_spaceless",
        "harmless_spaceless",
        "ordinal_spaceless",
        "indefinite_spaceless",
    ):
        words.lists[name] = frozenset(_split(data[name]))
    languages_of: dict[str, set[str]] = {}
    for language, listed in data["harmless"].items():
        for word in _spellings(listed):
            languages_of.setdefault(word, set()).add(language)
    words.harmless = {word: frozenset(known) for word, known in languages_of.items()}
    words.spaceless_scales = {
        word: float(factor) for factor, text in data["spaceless_scales"].items() for word in _split(text)
    }
    words.ideographs = {sign: digit for digit, text in data["ideographs"]["digits"].items() for sign in text}
    words.ideograph_scales = {sign: factor for factor, text in data["ideographs"]["scales"].items() for sign in text}
    for table in (words.scales, words.currencies, words.units, words.lists["unread"]):
        for word in table:
            if " " in word:
                first = word.split()[0]
                words.phrases[first] = max(words.phrases.get(first, 1), len(word.split()))
    words.continuations = frozenset(
        {*words.scales, *words.lists["range"], *words.lists["part"], *words.lists["and"]}
        | {word for word, unit in words.units.items() if unit == "hundredth"}
        | {mark.casefold() for mark, currency in words.currencies.items() if currency.scale != 1}
        | words.lists["unread"]
    )
    return words


@cache
def word_patterns() -> dict[str, re.Pattern]:
    """Patterns made of the listed words: runs of ideographs, what connects two numbers, what stands before a range."""
    words = number_words()

    def any_of(*names: str) -> str:
        listed = {word for name in names for word in words.lists[name]}
        return "|".join(re.escape(word) for word in sorted(listed, key=len, reverse=True))

    numerals = "".join(words.ideographs)
    factors = "".join(words.ideograph_scales)
    hedge = rf"(?:(?:{any_of('hedge')})\.?{BLANK})?"
    return {
        "factors": re.compile(rf"{BLANK}?[{factors}]"),
        "ideographic": re.compile(
            rf"(?:[0-9][0-9.,]*|[{numerals}])?{BLANK}?[{factors}]+(?:{BLANK}?(?:[0-9]+|[{numerals}]){BLANK}?[{factors}]+)*"
            rf"(?:{BLANK}?(?:[0-9]{{1,4}}(?![0-9.,])|[{numerals}]))?"
        ),
        "numerals": re.compile(rf"[{numerals}{factors}]+"),
        "connector": re.compile(
            rf"{BLANK}{{0,3}}(?:(?:(?:per|an?){BLANK}|/{BLANK}?)[a-z]{{1,12}}{BLANK})?"
            rf"(?:(?P<dash>-{{1,2}}|\u2013|~)|(?P<tight>\u2014)|(?P<to>-?(?:{any_of('range')})\b-?|"
            rf"(?:{any_of('range_spaceless')}))|(?P<and>(?:{any_of('and')})\b|\u548c|\u3068)|){BLANK}{{0,3}}{hedge}",
            re.IGNORECASE,
        ),
        "between": re.compile(rf"\b(?:{any_of('between')}){BLANK}{{0,3}}{hedge}$|\u5728$", re.IGNORECASE),
        "minus_run": re.compile(rf"(?:{any_of('negative_spaceless')})$"),
        "ordinal_run": re.compile(rf"(?:{any_of('ordinal_spaceless')})$"),
        "part_run": re.compile(rf"{any_of('part_spaceless')}"),
        "harmless_run": re.compile(rf"{any_of('harmless_spaceless', 'range_spaceless')}"),
        "scale_run": re.compile("|".join(words.spaceless_scales)),
        "percent_of_hundred": re.compile(r"(?:\u767e\u5206\u4e4b|\u767e\u5206\u306e)$"),
    }
