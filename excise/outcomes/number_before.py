"""What stands before a number: its sign, its currency, and words that make it negative or no quantity.

What stands behind is in `excise.outcomes.number_behind`.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from excise.outcomes.number_behind import is_known, turns
from excise.outcomes.number_tokens import Tokens
from excise.outcomes.number_words import Currency, number_words, word_patterns

_YEAR = re.compile(r"(?:19|20)[0-9]{2}")

Said = Literal["", "minus", "skip", "year", "name", "unreadable"]
"""What the words before a number say: nothing, that it is negative, no quantity, a year or part of a name, or that it
cannot be read."""


@dataclass(frozen=True)
class Before:
    """What stands before a number: where it begins, and the signs outside and inside of its currency, "" for none."""

    start: int
    sign: str
    inner_sign: str
    currency: Currency | None


def read_before(tokens: Tokens, floor: int, token: int) -> Before:
    """Start, signs and currency before the number at `token`, among the tokens from `floor` on."""
    place, sign, inner = token - 1, "", ""
    currency: Currency | None = None
    start = tokens.starts[token]
    if place >= floor and tokens.piece(place) in ("-", "+", "\u2013"):
        sign, start, place = tokens.piece(place), tokens.starts[place], place - 1
    if mark := _currency_before(tokens, floor, place):
        currency, first = mark
        inner, sign = sign, ""
        start, place = tokens.starts[first], first - 1
        if place >= floor and tokens.piece(place) in ("-", "+", "\u2013"):
            sign, start = tokens.piece(place), tokens.starts[place]
    return Before(start, sign, inner, currency)


def _currency_before(tokens: Tokens, floor: int, token: int) -> tuple[Currency, int] | None:
    """The currency whose mark ends before or at `token`, a blank and a point apart at most, and its first token."""
    place = token
    if place >= floor and tokens.kind(place) == "blank" and tokens.ends[place] - tokens.starts[place] <= 2:
        place -= 1
    if place >= floor and tokens.piece(place) == "~" and tokens.kind(place - 1) == "other":
        place -= 1
    dotted = False
    if place > floor and tokens.piece(place) == "." and tokens.kind(place - 1) == "word":
        place, dotted = place - 1, True
    if place < floor:
        return None
    words, kind, piece = number_words(), tokens.kind(place), tokens.piece(place)
    if kind == "run":
        for length in range(min(4, len(piece)), 0, -1):
            if piece[-length:] in words.currencies:
                return words.currencies[piece[-length:]], place
        return None
    if kind == "other" and unicodedata.category(piece) == "Sc":
        if place > floor and tokens.kind(place - 1) == "word":
            before = tokens.word(place - 1)
            joined = words.key(before + piece, words.currencies)
            if joined:
                return words.currencies[joined], place - 1
            if code := words.key(before, words.currencies):
                return words.currencies[code], place - 1
            if len(before) <= 3 and piece == "$" and not words.key(before, words.scales):
                return words.currencies["$"], place - 1
        return words.currencies.get(piece) or Currency(piece, False, frozenset()), place
    if kind == "word":
        word = tokens.word(place)
        if dotted and len(word) > 3:
            return None
        key = words.key(word, words.currencies)
        if key:
            return words.currencies[key], place
    return None


def currency_start(tokens: Tokens, floor: int, token: int) -> int:
    """Where the currency mark before a token begins."""
    mark = _currency_before(tokens, floor, token - 1)
    return tokens.starts[mark[1]] if mark else tokens.starts[token]


def weigh_before(tokens: Tokens, floor: int, start: int, token: int, money: bool) -> Said:
    """What the words before a number that begins at `start` say of it.

    token: where its digits or words stand; money: whether a currency stands before it.
    """
    place = token
    while place > 0 and tokens.starts[place] >= start:
        place -= 1
    if place < floor or tokens.starts[place] >= start:
        return ""
    words, text = number_words(), tokens.text
    glued = True
    piece = tokens.piece(place)
    if piece == "." and not text[: tokens.starts[place]].endswith(".") and tokens.kind(place - 1) == "word":
        return "unreadable"  # approx.50
    if piece == "\xa7" or (piece == "_" and tokens.kind(place - 1) in ("word", "number")):
        return "skip"
    if piece == "^":
        return "unreadable"
    if piece in ("\xb1", "\u2213", "/", "\u221a") and piece:
        return "" if piece == "/" else "unreadable"
    while place >= floor and (
        tokens.kind(place) == "blank" or tokens.piece(place) in (".", ":", "#", "(", ")", "~", "\u2248", "=")
    ):
        glued = False
        place -= 1
    if not glued and place >= floor and (mark := _currency_before(tokens, floor, place)):  # Mio. \u20ac: 5
        scaled = mark[1] - 1
        while scaled > floor and (tokens.kind(scaled) == "blank" or tokens.piece(scaled) == "."):
            scaled -= 1
        if scaled >= floor and tokens.kind(scaled) == "word" and words.key(tokens.word(scaled), words.scales):
            return "unreadable"
    if place < floor:
        return ""
    kind = tokens.kind(place)
    if tokens.piece(place) in ("\xb1", "\u2213", "\u221a"):
        return "unreadable"
    if kind == "run":
        patterns, run = word_patterns(), tokens.piece(place)
        if patterns["percent_of_hundred"].search(run):
            return ""
        if patterns["ordinal_run"].search(run):
            return "skip"
        if patterns["minus_run"].search(run):
            return "minus"
        if run[-1] in words.ideograph_scales or (run[-1] in words.ideographs and not money):
            return "unreadable"
        return "unreadable" if patterns["part_run"].search(run) else ""
    if kind != "word":
        return ""
    word = tokens.word(place)
    between = text[tokens.ends[place] : start]
    if (
        money
        and between == " "
        and word.casefold() in ("a", "an", "one")
        and text[start : tokens.starts[token]].strip().isalpha()
    ):
        return "unreadable"  # a dollar fifty
    hyphenated_range = text[start] == "-" and tokens.piece(place - 1) == "-" and words.key(word, words.lists["range"])
    if glued and not money and not between and not hyphenated_range:
        return "unreadable" if word.casefold() == "x" else "skip"  # A4, Covid19
    for nearby in (place, place - 2, place - 4):
        if tokens.kind(nearby) == "word" and nearby >= floor and turns(tokens.word(nearby)):
            return "unreadable"
        if tokens.kind(nearby - 1) != "blank":
            break
    adjacent = "(" not in between and "." not in between
    if words.key(word, words.lists["negative"]) and adjacent and ":" not in between and "~" not in between:
        if place >= 2 and words.key(tokens.word(place - 2), words.lists["negative_after"]):
            return ""
        return "minus"
    if words.key(word, words.lists["year_after"]) and between == " " and _YEAR.fullmatch(tokens.piece(token)):
        return "year"
    if words.key(word, words.lists["labels"]) and ":" not in between and "=" not in between:
        return "skip"
    if words.key(word, words.lists["months"]) and word[0].isupper():
        return "skip"
    if words.key(word, words.lists["multiple"]):
        return "unreadable"
    if between.strip(" \t\xa0") == "" and any(map(str.isupper, word)) and not is_known(tokens, place, word):
        return "name" if not words.key(word, words.scales) else "unreadable"
    scale = words.key(word, words.scales)
    if scale:
        return "unreadable"
    return ""
