"""Reading the one number out of a model's free-text answer: `parse_number` and `parse_completion`.

Only text becomes a number here; what the number means (units, plausible ranges, statistics) belongs to `scenarios`
and `metrics`. The rule behind every decision: a text is an answer only if it names a single quantity whose scale, sign
and unit are understood, because a missing answer is reported (parse rate) while a wrongly read one silently moves a
group's mean. The words that are understood are data, in number_words.yaml; docs/answers.md tells readers the rule.
"""

import math
import re
from dataclasses import replace

from excise.models.thoughts import behind_thoughts, open_thoughts
from excise.outcomes.number_reader import NO_WORD, PASSED, WORDS, Number, Reader, word_patterns
from excise.outcomes.number_words import SPACELESS, number_words
from excise.outcomes.plain_text import BLANK, ONE_LETTER, plain_form

_FURTHEST = 100.0  # the ends of a range differ at most so: "60-70,000" is no range from 60
_WIDEST = 10.0  # ends of a range that share one scale word differ at most so: "$120k - 150", "1-2k", not "1k - 500"

_BEFORE_BARE_WORD = re.compile(
    r"[\W_]*(?:(?:about|around|approximately|roughly|maybe|perhaps|probably|answer|number|offer|is|say|i|would|d|the|my|it"
    r"|between|from|minus|negative)[\W_]+)*",
    re.IGNORECASE,
)
_MINUS_BEHIND = re.compile("[-\u2010\u2011\u2013\u2212](?=[^\\w\n\r]*(?:[\n\r]|$))")
"""Accounts write losses as 500-."""
_ON_A_SCALE = re.compile(rf"\bscale{BLANK}(?:of|from|between){BLANK}(?:from{BLANK})?$", re.IGNORECASE)


def _leading_zero(number: Number) -> bool:
    return len(number.text) > 1 and number.text[0] == "0" and number.text.isdigit()


def _joined(low: Number, high: Number, between: bool) -> Number | str | None:
    """The midpoint of a range; "skip" for a date-like pair; None if the pair is no range but more than one number."""
    if low.unit and high.unit and low.unit != high.unit:
        return None
    for one, other in ((low, high), (high, low)):
        if one.point and other.currency:  # 1.200 - 1.500 kr
            if one.scale != 1 or other.scale != 1 or not other.currency.point_groups:
                return None
            whole = replace(one, raw=one.raw * 1000, value=one.value * 1000, point=False, currency=other.currency)
            low, high = (whole, other) if one is low else (other, whole)
            break
    if low.scale == 1 and high.scale != 1 and abs(low.raw) < abs(high.raw):  # 1-2k, 50-75 cents
        if (high.scale < 1 and low.unit) or abs(high.raw) > _WIDEST * abs(low.raw) > 0:
            return None
        low = replace(low, scale=high.scale, value=low.raw * high.scale)
    elif low.scale > 1 and high.scale == 1 and low.value > high.value:  # $120k - 150
        if not abs(low.raw) < abs(high.raw) <= _WIDEST * abs(low.raw):
            return None
        high = replace(high, scale=low.scale, value=high.raw * low.scale)
    if _leading_zero(low) or _leading_zero(high):
        return "skip"
    if (low.value > high.value and not between) or low.value == high.value:
        return None
    if low.value and high.value / low.value > _FURTHEST:
        return None  # $60-70,000
    middle = low.value / 2 + high.value / 2
    return Number(low.start, high.end, middle, 1.0, middle, min(low.kind, high.kind), unit=low.unit or high.unit)


def _connection(low: Number, high: Number, text: str) -> str | None:
    """How two neighbouring numbers hang together: "dash", "to", "and", "slash", "sum", or None."""
    if high.start - low.end > 48:
        return None
    gap = text[low.end : high.start]
    if gap.strip() == "/":
        return "slash"
    if gap.strip() in ("+", "*", "**", "\xd7", "x", "X", "\xf7", "^", "\xb1", "+/-", "=") and gap.strip():
        return "sum"
    if "\n" in gap or "\r" in gap:
        return None
    match = word_patterns()["connector"].fullmatch(gap)
    if match is None:
        return None
    if match["dash"] or (match["tight"] and gap == "\u2014"):
        return "dash"
    if match["to"]:
        return "to"
    if match["and"]:
        return "and"
    if not gap.strip() and high.signed in ("-", "\u2013"):
        return "dash"
    if not gap.strip() and high.signed == "+":
        return "sum"
    return "touching" if not gap.strip() else None


def _merge(numbers: list[Number], text: str) -> list[Number] | None:
    """Join ranges into their midpoints, drop dates and idioms; None if two numbers hang together in any other way."""
    merged: list[Number] = []
    position = 0
    while position < len(numbers):
        chain, links = [numbers[position]], []
        while position + len(chain) < len(numbers):
            following = numbers[position + len(chain)]
            link = _connection(chain[-1], following, text)
            if link is None or (link in ("and", "touching") and links):
                break
            if link == "and" and not word_patterns()["between"].search(
                text, max(0, chain[0].start - 30), chain[0].start
            ):
                link = "touching" if WORDS in (chain[-1].kind, following.kind) else None
                if link is None:
                    break
            chain.append(following)
            links.append(link)
        position += len(chain)
        if not links:
            merged.append(chain[0])
        elif any(number.kind == PASSED for number in chain):
            return None
        elif len(links) > 1:
            if not (set(links) <= {"dash"} or set(links) <= {"slash"}):
                return None
            # 2024-05-01, 555-123-4567, 1/5/2024, the 50/30/20 rule: no answers, but no rivals of one either
        elif links[0] == "slash":
            if (chain[0].text, chain[1].text) != ("24", "7"):
                return None
        elif links[0] in ("sum", "touching"):
            return None
        else:
            low, high = chain
            gap = text[low.end : high.start]
            if links[0] == "dash" and low.value < 0 and high.signed and not re.search(r"\s", gap):
                return None  # -5-3, -5--3
            if links[0] == "dash" and high.signed and (not gap.strip() or not gap[-1].isspace()):
                high = replace(high, raw=abs(high.raw), value=abs(high.value))  # the dash of the range, not a sign
            if _ON_A_SCALE.search(text, max(0, low.start - 30), low.start):
                continue
            joined = _joined(low, high, links[0] == "and")
            if joined is None:
                return None
            if joined != "skip":
                merged.append(joined)
    return merged


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
    reader = Reader(plain)
    reader.read()
    if reader.unreadable:
        return None
    merged = _merge(reader.numbers, plain)
    if not merged:
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
    found = _answer(text)
    return None if found is None else found[0].value + 0.0  # + 0.0 turns -0.0 into 0.0


def parse_completion(text: str, finished: bool) -> float | None:
    """`parse_number` of a completion, None also where the number may be cut off: the model was stopped before it had
    finished, and the number stands at the very end ("$1,2", "$200.", "100 to", "2 mil").
    """
    found = _answer(text)
    if found is None:
        return None
    number, plain = found
    if not finished and _may_go_on(number, plain, number.end):
        return None
    return number.value + 0.0


_REST = re.compile(rf"(?P<marks>[^\w\n\r]*)(?P<word>(?:{ONE_LETTER}|{SPACELESS})*)(?P<more>.?)", re.DOTALL)
_OPEN_WORDS = frozenset({"per", "in", "out", "a", "an", "and", "et", "y", "und", "e", "or", "to"})


def _may_go_on(number: Number, text: str, end: int) -> bool:
    """Whether what stands behind a number may be the beginning of more of it: a separator, part of a scale or range."""
    rest = _REST.match(text, end)
    marks, word = rest["marks"], rest["word"].casefold()
    if not word:
        marks = marks.strip(" \t\xa0")
        return not rest["more"] and (not marks or any(each not in ')]}!;?"' and each.isprintable() for each in marks))
    if re.search(r"[.!?;)\]]['\"]?[ \t\xa0]", marks):
        return False
    words = number_words()
    behind = rest.end("word")
    if text[behind:].strip(" \t\xa0"):
        return word in _OPEN_WORDS and _may_go_on(number, text, behind)
    begins = words.continuations | (words.currencies.keys() if number.point else frozenset())
    known = word in words.harmless or word in words.units
    return not known or word in _OPEN_WORDS or any(each.startswith(word) for each in begins)
