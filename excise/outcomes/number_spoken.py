"""Reading numbers in English words from a plain text: "twenty five", "half a million", "two point five".

What the words amount to is in `excise.outcomes.number_values`.
"""

import re
from dataclasses import replace

from excise.outcomes.characters import BLANK
from excise.outcomes.number_before import currency_start, read_before, weigh_before
from excise.outcomes.number_behind import read_behind, weigh_behind
from excise.outcomes.number_scales import Unreadable, scale_of
from excise.outcomes.number_scan import WORDS, Number, Scan
from excise.outcomes.number_values import LARGE, SMALL, SPOKEN_START, spoken, spoken_decimals
from excise.outcomes.number_words import word_patterns

_WORD = "|".join(sorted([*SMALL, *LARGE, "hundred", "dozen"], key=len, reverse=True))
_DIGIT_WORD = "zero|oh|one|two|three|four|five|six|seven|eight|nine"
_SPOKEN = re.compile(
    rf"""
    (?P<opening>half(?:{BLANK}an?)?|an?|(?:few|several|many|some|couple|couple{BLANK}of|of)(?:{BLANK}a)?)
      [ \t\xa0-](?P<article_words>(?:hundred|thousand|grand|million|billion|trillion|dozen|lakh|crore)\b
        (?:(?:{BLANK}and{BLANK}|-|{BLANK})(?:{_WORD})\b)*)
    | (?P<words>(?:{_WORD})\b(?:(?:{BLANK}and{BLANK}|(?<=sand|lion|lakh|rore),{BLANK}|-|{BLANK})(?:{_WORD})\b)*)
      (?P<half>{BLANK}and{BLANK}a{BLANK}half\b)?
      (?:{BLANK}point(?P<decimals>(?:[ \t\xa0-](?:{"|".join(sorted(SMALL, key=len, reverse=True))}|oh)\b)+))?
    | point(?P<only_decimals>(?:[ \t\xa0-](?:{_DIGIT_WORD})\b)+)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_AND_BEFORE_HALF = re.compile(rf"\band{BLANK}+$", re.IGNORECASE)
_IN_BEFORE = re.compile(r"\bin\s$", re.IGNORECASE)


def match_spoken(scan: Scan, token: int) -> re.Match[str] | None:
    """The number words that begin at a token."""
    tokens = scan.tokens
    if tokens.word(token).casefold() not in SPOKEN_START:
        return None
    return _SPOKEN.match(tokens.text, tokens.starts[token])


def read_spoken(scan: Scan, match: re.Match[str], token: int) -> int:
    """Read the English number words of a match; the token behind them."""
    tokens = scan.tokens
    text, start, end = tokens.text, match.start(), match.end()
    place = tokens.after(token, end)
    if ends := _ends_of_range(text, match):
        behind = read_behind(tokens, place, end, False)
        if behind.unclear:
            raise Unreadable
        scale = scale_of(tokens, behind.currency, behind)
        unit = behind.currency.name if behind.currency else behind.unit
        low, high = (replace(number, value=number.value * scale, unit=unit) for number in ends)
        scan.numbers += [low, replace(high, end=behind.end)]
        scan.floor = behind.token
        return behind.token
    value, trailing = _value(text, match)
    before = read_before(tokens, scan.floor, token)
    money = before.currency
    begins = tokens.starts[token] if money is None else currency_start(tokens, scan.floor, token)
    said = weigh_before(tokens, scan.floor, begins, token, money is not None)
    behind = read_behind(tokens, place, end, money is not None)
    scan.floor = behind.token
    if (match["opening"] or "").lower().startswith("a") and _IN_BEFORE.search(text, max(0, start - 4), start):
        raise Unreadable  # one in a million
    weigh_behind(tokens, behind, False)
    if behind.ordinal or (behind.compound and not behind.counted) or said == "skip" or behind.attached:
        scan.skip(start, behind.end)
        return behind.token  # three-bedroom
    if said == "unreadable" or behind.unclear or before.sign:
        decimals = match["decimals"] or match["only_decimals"]
        if value > 12 or behind.scales or decimals or behind.counted or money is not None:
            raise Unreadable
        scan.skip(start, behind.end)
        return behind.token
    currency = money or behind.currency
    factor = scale_of(tokens, currency, behind)
    negative = -1.0 if said == "minus" else 1.0
    scaled, scale = value * factor, trailing * factor
    unit = currency.name if currency else behind.unit
    scan.numbers.append(
        Number(start, behind.end, negative * scaled / scale, scale, negative * scaled, WORDS, unit=unit)
    )
    return behind.token


def _value(text: str, match: re.Match[str]) -> tuple[float, float]:
    """The value of the words of a match, and their trailing scale."""
    opening = (match["opening"] or "").lower()
    if (opening and not re.fullmatch(r"half|half\san?|an?", opening)) or (
        _AND_BEFORE_HALF.search(text, max(0, match.start() - 8), match.start()) and opening.startswith("half")
    ):
        raise Unreadable  # several hundred, a quarter of a million
    words = match["words"] or match["article_words"]
    worth = spoken(words) if words else (0.0, 1.0)
    bare_scale = match["words"] and match["words"].lower().split()[0].split("-")[0] not in SMALL
    if worth is None or bare_scale:
        raise Unreadable  # umpteen thousand
    value, trailing = worth
    if opening.startswith("half"):
        value /= 2
    if match["words"] and match["half"]:
        if trailing > 12:
            raise Unreadable  # two million and a half
        value += 0.5
    if decimals := match["decimals"] or match["only_decimals"]:
        digits = spoken_decimals(decimals)
        if digits is None or trailing != 1 or match["half"]:
            raise Unreadable
        value = float(f"{int(value)}.{digits}")
    return value, trailing


def _ends_of_range(text: str, match: re.Match[str]) -> list[Number]:
    """The two ends of "between five and ten", whose words stand together like one number's; [] for any other."""
    halves = (match["words"] or "").lower().split(" and ")
    if len(halves) != 2 or match["half"] or match["decimals"]:
        return []
    if not word_patterns()["between"].search(text, max(0, match.start() - 30), match.start()):
        return []
    low, high = map(spoken, halves)
    if low is None or high is None:
        return []
    middle = match.start() + len(halves[0])
    places = [(match.start(), middle), (middle + len(" and "), match.end())]
    return [
        Number(*place, value / scale, scale, value, WORDS)
        for place, (value, scale) in zip(places, (low, high), strict=True)
    ]
