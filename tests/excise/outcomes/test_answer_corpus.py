"""The corpus of answers: what is read of each, and the figures that docs/answers.md and the end of a test run show."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import yaml

from excise.outcomes.answers import parse_completion, parse_number

PAGE = Path(__file__).parents[3] / "docs" / "answers.md"
CORPUS = yaml.safe_load((Path(__file__).parent / "answers.yaml").read_text(encoding="utf-8"))
COLUMNS = ("texts", "with a number", "right", "null", "wrong")


def same(number, right):
    return number == right or (None not in (number, right) and math.isclose(number, right, rel_tol=1e-12))


def figures(entries):
    """Texts, texts with one clear number, texts read rightly, clear numbers not read, wrong numbers."""
    read = [(parse_number(entry["text"]), entry["value"]) for entry in entries]
    right = sum(same(number, value) for number, value in read)
    missed = sum(number is None and value is not None for number, value in read)
    clear = sum(value is not None for _, value in read)
    return dict(zip(COLUMNS, (len(read), clear, right, missed, len(read) - right - missed), strict=True))


@pytest.fixture(scope="module")
def counted():
    families = {family: figures(entries) for family, entries in CORPUS.items()}
    return families, {column: sum(each[column] for each in families.values()) for column in COLUMNS}


def test_no_answer_of_the_corpus_is_read_wrongly_and_hardly_any_number_is_missed(counted, record_property):
    _, total = counted
    record_property("answers", json.dumps(total))
    wrong = [
        (entry["text"], entry["value"], number)
        for entries in CORPUS.values()
        for entry in entries
        if (number := parse_number(entry["text"])) is not None and not same(number, entry["value"])
    ]
    assert not wrong
    assert total["texts"] >= 400
    assert total["null"] <= 0.05 * total["with a number"]


def test_no_text_stands_in_the_corpus_twice_and_each_says_why():
    entries = [entry for entries in CORPUS.values() for entry in entries]
    assert len({entry["text"] for entry in entries}) == len(entries)
    assert all(set(entry) == {"text", "value", "why"} and entry["why"] for entry in entries)


def test_the_page_holds_the_figures_of_the_corpus(counted):
    families, total = counted
    rows = re.findall(
        r"^\| ([^|\n]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE.read_text("utf-8"), re.MULTILINE
    )
    shown = {name: dict(zip(COLUMNS, map(int, counts), strict=True)) for name, *counts in rows}
    assert shown == {**families, "all": total}


# --- inputs from the field --------------------------------------------------------------------------------------------


@pytest.mark.trial(4)
@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("100k-150k", 125e3),
        ("$1bn-2bn", 1.5e9),
        ("between 20k-30k", 25e3),
        ("$5M-$7M", 6e6),
        ("5 lakh-7 lakh", 6e5),
        ("10%-20%", 15),
        ("1h-3h", 2),
        ("20 kr-30 kr", 25),
        ("2 Mio.-3 Mio. \u20ac", 2.5e6),
        ("2\u4e07-4\u4e07", 3e4),
    ],
)
def test_a_range_whose_first_end_ends_in_letters_is_its_midpoint(text, number):
    assert parse_number(text) == number


@pytest.mark.trial(5)
@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12 lac", 1.2e6),
        ("\u20b92 Cr", 2e7),
        ("2 mln", 2e6),
        ("1,5 Mio. \u20ac", 1.5e6),
        ("3 Mrd", 3e9),
        ("$5 bil", 5e9),
        ("5 \u4e07", 5e4),
        ("5 zillion", None),
        ("$5 zillion", None),
        ("5zillion", None),
        ("$5zz", None),
        ("2 mil", None),
    ],
)
def test_a_scale_word_counts_and_an_unknown_one_leaves_no_number(text, number):
    assert parse_number(text) == number


@pytest.mark.trial(6)
@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("half million", 5e5),
        ("two point five", 2.5),
        ("half a million", 5e5),
        ("two point five million", 2.5e6),
        ("2 et demi", None),
        ("a quarter of a million", None),
        ("two million and a half", None),
    ],
)
def test_no_part_of_a_phrase_is_passed_over(text, number):
    assert parse_number(text) == number


@pytest.mark.trial(7)
@pytest.mark.parametrize(
    ("text", "number"),
    [
        (",89 \u20ac", 0.89),
        ("kr. 1.200,-", 1200),
        ("\u20ac ,50", 0.5),
        ("1.200,\u2013 \u20ac", 1200),
        ("R$ 1.200", 1200),
        ("Rp 15.000", 15000),
        (",89", None),
    ],
)
def test_a_decimal_comma_may_lack_digits_on_one_side(text, number):
    assert parse_number(text) == number


@pytest.mark.trial(24)
@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{$9{,}500}", 9500),
        (r"11,\!000", 11000),
        ("$120k - 150", 135e3),
        ("two and a half million", 2.5e6),
        (r"\text{\$1{,}000}", 1000),
        (r"11\,000", 11000),
        ("$1.2M - 1.4", 1.3e6),
    ],
)
def test_ordinary_spellings_are_read(text, number):
    assert parse_number(text) == number


# --- what must not change a number, and what must ---------------------------------------------------------------------


CLEAR = [entry["text"] for entries in CORPUS.values() for entry in entries if entry["value"] is not None]
PLAIN = [text for text in CLEAR if re.fullmatch(r"[$\u20ac\xa3]?[0-9][0-9.,]*( ?(k|million|dollars|%|hours))?", text)]


def test_a_locale_s_way_to_write_a_number_changes_it_in_no_case():
    draw = random.Random(5)
    for _ in range(300):
        number = round(draw.uniform(0, 10 ** draw.randint(1, 8)), 2)
        english = f"{number:,.2f}"
        for group, point in (",.", ".,", "'.", "\xa0,", "\u202f.", "\u2019,"):
            text = english.translate({ord(","): group, ord("."): point})
            for written in (text, f"{text} \u20ac", f"EUR {text}", f"kr. {text}", f"R$ {text}", f"Preis: {text} Euro"):
                assert parse_number(written) in (number, None), written
            assert parse_number(f"{text} \u20ac") == number


def test_digits_of_every_script_are_digits():
    for zero in "\u0660\u06f0\u0966\u09e6\u0e50\uff10\U0001d7ce":
        own = {ord(str(digit)): chr(ord(zero) + digit) for digit in range(10)}
        assert parse_number("1,250".translate(own)) == 1250
        assert parse_number("1250".translate(own)) == 1250


@pytest.mark.parametrize(
    "word", ["zillion", "flurb", "\u0437\u0438\u043b\u044c\u043e\u043d", "kk", "Mx", "\u0e0b\u0e34\u0e25", "\u57d3"]
)
def test_an_unknown_word_behind_a_number_leaves_no_number(word):
    for text in PLAIN:
        if re.search(r"[a-z%]$", text) is None:
            assert parse_number(f"{text} {word}") is None, text
            assert parse_number(f"${text.strip('$')}{word}") is None, text


@pytest.mark.parametrize(
    "wrapped",
    [
        "**{}**",
        "*{}*",
        "__{}__",
        "`{}`",
        "> {}",
        "- {}",
        "<b>{}</b>",
        r"\text{{{}}}",
        r"\boxed{{{}}}",
        "Answer: {}",
        "\n{}\n",
    ],
)
def test_markup_around_a_number_does_not_change_it(wrapped):
    for text in PLAIN:
        assert parse_number(wrapped.format(text)) == parse_number(text), text


def test_a_range_lies_between_its_ends():
    for low, high in (
        ("5", "7"),
        ("$5k", "$7k"),
        ("5 Mio. \u20ac", "7 Mio. \u20ac"),
        ("5 lakh", "7 lakh"),
        ("5%", "7%"),
    ):
        middle = (parse_number(low) + parse_number(high)) / 2
        for between in ("-", " - ", "\u2013", " to ", "-to-", " bis "):
            assert parse_number(low + between + high) in (middle, None), low + between + high


def test_every_scale_of_one_meaning_scales_and_no_other_does():
    from excise.outcomes.number_words import number_words

    words = number_words()
    for word, meanings in words.scales.items():
        factors = {meaning.factor for meaning in meanings}
        for text in (f"4 {word}", f"$4 {word}", f"4 {word} dollars", f"{word} 4"):
            number = parse_number(text)
            assert (
                number is None
                or any(math.isclose(number, 4 * factor) for factor in factors)
                or (text in ("4 m", f"{word} 4") and word in ({"m"} | words.prose))
            ), text
        if len(factors) == 1 and not any(meaning.beside_currency for meaning in meanings):
            assert math.isclose(parse_number(f"4 {word}"), 4 * factors.pop()), word


@pytest.mark.parametrize("text", CLEAR)
def test_an_answer_cut_anywhere_is_never_read_as_more_or_less(text):
    """Whatever is read of the beginning of an answer that was cut off is what is read of the whole."""
    whole = parse_number(text)
    for end in range(1, len(text)):
        cut = parse_completion(text[:end], finished=False)
        if cut is not None and len(re.findall(r"\d+", text)) == 1:
            assert same(cut, whole), text[:end]
