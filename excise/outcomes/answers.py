"""Reading the one number out of a model's free-text answer: `parse_number` and `parse_completion`.

Only text becomes a number here; what the number means (units, plausible ranges, statistics) belongs to `scenarios`
and `metrics`. The rule behind every decision: a text is an answer only if it names a single quantity whose scale, sign
and unit are understood, because a missing answer is reported (parse rate) while a wrongly read one silently moves a
group's mean. The words that are understood are data, in number_words.yaml; docs/answers.md tells readers the rule.
"""

import math
import re

from excise.models.thoughts import behind_thoughts, open_thoughts
from excise.outcomes.characters import NO_WORD, ONE_LETTER, SPACELESS
from excise.outcomes.number_ranges import merge_ranges
from excise.outcomes.number_reader import read_numbers
from excise.outcomes.number_scan import PASSED, WORDS, Number
from excise.outcomes.number_words import number_words
from excise.outcomes.plain_text import plain_form

_BEFORE_BARE_WORD = re.compile(
    r"[\W_]*(?:(?:about|around|approximately|roughly|maybe|perhaps|probably|answer|number|offer|is|say|i|would|d|the|my|it"
    r"|between|from|minus|negative)[\W_]+)*",
    re.IGNORECASE,
)
_MINUS_BEHIND = re.compile("[-\u2010\u2011\u2013\u2212](?=[^\\w\n\r]*(?:[\n\r]|$))")
"""Accounts write losses as 500-."""


def _counts_as_answer(number: Number, text: str) -> bool:
    """Small number words are often pronouns ("one of the", "the two"): they need a unit, or to be the whole answer."""
    if number.kind != WORDS or number.value > 12 or number.value % 1 or number.unit:
        return True
    alone_before = _BEFORE_BARE_WORD.fullmatch(text, 0, number.start) is not None
    return alone_before and NO_WORD.fullmatch(text, number.end) is not None


def _in_accounting_brackets(number: Number, text: str) -> bool:
    """Whether a number alone stands in brackets, which in accounts makes it negative."""
    return text[number.start - 1 : number.start] == "(" and text[number.end : number.end + 1] == ")"


def _answer(text: str) -> tuple[Number, str] | None:
    """The single number of the text with its place in the plain form of the text, which is returned beside it."""
    if open_thoughts(text):
        return None
    plain = plain_form(text[behind_thoughts(text) :])
    if plain is None:
        return None
    numbers = read_numbers(plain)
    merged = None if numbers is None else merge_ranges(numbers, plain)
    if merged is None:
        return None
    merged = [number for number in merged if number.kind != PASSED and _counts_as_answer(number, plain)]
    if not merged:
        return None
    kind = min(number.kind for number in merged)
    rivals = [number for number in merged if number.kind <= max(kind, WORDS)]
    if not all(math.isclose(number.value, rivals[0].value, rel_tol=1e-9) for number in rivals):
        return None
    units = {number.unit for number in rivals if number.unit != "numeral"}
    if len(units - {""}) > 1 or units == {"", "percent"}:
        return None
    if len(merged) == 1 and _in_accounting_brackets(merged[0], plain):
        return None
    if any(_MINUS_BEHIND.match(plain, number.end) for number in rivals):
        return None
    return [number for number in rivals if number.kind == kind][-1], plain


def continued(prefix: str, text: str) -> str:
    """An answer from its beginning: the prefix that it was given, and what the model wrote.

    Some tokenizers drop the blank before a text's first word, so one is put where two words would touch.
    """
    return f"{prefix} {text}" if prefix[-1:].isalnum() and text[:1].isalnum() else prefix + text


def parse_number(text: str) -> float | None:
    """The single number a text names, None if it names none or several, or one whose scale, sign or unit is not
    understood. Never raises on a string; always finite.

    Read as numbers: currency signs, codes and words of many languages on either side; thousands as 1,200, 1'200,
    1.234.567, the Indian 1,00,000 and with no-break or thin spaces (plain spaces only beside a currency, a unit or as
    the whole text); 12% and 12 percent as 12; scales of many languages (k, mn, lakh, Mio., mil millones, \u4e07, ...);
    minus signs; digits of any script; 2\xbd and 2 1/2; 1.5 x 10^5; cents as hundredths; English number words if no
    digits compete ("twenty five", "half a million", "two point five"); LaTeX and Markdown around any of them. Ranges
    give their midpoint ("$100 to $150", "between 5 and 10", "10-20%"), and a scale of one end covers both ("1-2k" is
    1500) if the ends are then at most tenfold apart. A number said twice is one number.

    Decisions where writers differ:
      * 1,5 and 12,50 have a decimal comma, 1,200 has thousands; 1.200 is 1200 beside a euro, R$, TL, VND, Rp, kr and
        other currencies that number_words.yaml marks, None beside any other currency, else 1.2; 1.234,56 and 1.200,00
        are European.
      * The word directly behind a number must be known: a scale, currency, unit or one that changes nothing.
      * Words of several meanings (mil, billion) need the text's language or a currency that tells.
      * Words up to twelve are often pronouns or determiners ("one of the", "the two"), so they need a unit ("two
        hours") or to be the whole answer.
      * Passed over, as no quantities: digits attached to letters (A4, Covid-19, 3D), clock times and ratios (10:30,
        3:1), dates, versions, 24/7, markers of a list counted from 1, labels (Step 1), "on a scale of 1 to 10".
      * Descriptions such as "1600-rated" and ordinals such as "5th" count only if there is no other number.
      * What stands within <think> and </think> or the like is no answer; the one behind it is.
      * None: fractions and scores (1/2, 8/10), sums, falling ranges (10-5), alternatives (5 or 6), lists (1,2,3),
        a price beside a count ("2 pairs from $349"), a number alone in brackets or with a minus behind it (a loss in
        accounts), "several hundred", numbers too large for a double.
    """
    answer = _answer(text)
    return None if answer is None else answer[0].value + 0.0  # + 0.0 turns -0.0 into 0.0


def parse_completion(text: str, finished: bool) -> float | None:
    """`parse_number` of a completion, None also where the number may be cut off: the model was stopped before it had
    finished, and the number stands at the very end ("$1,2", "$200.", "100 to", "2 mil").
    """
    answer = _answer(text)
    if answer is None:
        return None
    number, plain = answer
    if not finished and _may_go_on(number, plain, number.end):
        return None
    return number.value + 0.0


_REST = re.compile(rf"(?P<marks>[^\w\n\r]*)(?P<word>(?:{ONE_LETTER}|{SPACELESS})*)(?P<more>.?)", re.DOTALL)
_OPEN_WORDS = frozenset({"per", "in", "out", "a", "an", "and", "et", "y", "und", "e", "or", "to"})


def _may_go_on(number: Number, text: str, end: int) -> bool:
    """Whether what stands behind a number may be the beginning of more of it: a separator, part of a scale or range."""
    rest = _REST.match(text, end)
    assert rest is not None  # it may be empty
    marks, word = rest["marks"], rest["word"].casefold()
    if not word:
        marks = marks.strip(" \t\xa0")
        return not rest["more"] and (not marks or any(mark not in ')]}!;?"' and mark.isprintable() for mark in marks))
    if re.search(r"[.!?;)\]]['\"]?[ \t\xa0]", marks):
        return False
    words = number_words()
    behind = rest.end("word")
    if text[behind:].strip(" \t\xa0"):
        return word in _OPEN_WORDS and _may_go_on(number, text, behind)
    begins = words.continuations | (words.currencies.keys() if number.point else frozenset())
    known = word in words.harmless or word in words.units
    return not known or word in _OPEN_WORDS or any(begin.startswith(word) for begin in begins)
