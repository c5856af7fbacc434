"""Numbers of a text that hang together: ranges become their midpoints, dates and idioms are dropped.

What the numbers are is in `excise.outcomes.number_reader`; which of them is the answer is in `answers`.
"""

import re
from dataclasses import replace
from typing import Literal

from excise.outcomes.characters import BLANK
from excise.outcomes.number_scan import PASSED, WORDS, Number
from excise.outcomes.number_words import word_patterns

_FURTHEST = 100.0  # the ends of a range differ at most so: "60-70,000" is no range from 60
_WIDEST = 10.0  # ends of a range that share one scale word differ at most so: "$120k - 150", "1-2k", not "1k - 500"
_ON_A_SCALE = re.compile(rf"\bscale{BLANK}(?:of|from|between){BLANK}(?:from{BLANK})?$", re.IGNORECASE)


def _leading_zero(number: Number) -> bool:
    return len(number.text) > 1 and number.text[0] == "0" and number.text.isdigit()


def _joined(low: Number, high: Number, between: bool) -> Number | Literal["skip"] | None:
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


def merge_ranges(numbers: list[Number], text: str) -> list[Number] | None:
    """Join ranges into their midpoints, drop dates and idioms; None if two numbers hang together in any other way."""
    merged: list[Number] = []
    position = 0
    while position < len(numbers):
        chain = [numbers[position]]
        links: list[str] = []
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
