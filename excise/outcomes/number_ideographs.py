"""Reading Chinese, Japanese and Korean numerals from a plain text, alone in a run or with digits among them.

What they amount to is in `excise.outcomes.number_values`.
"""

import re

from excise.outcomes.characters import BLANK, NO_WORD
from excise.outcomes.number_behind import Behind, read_behind, weigh_behind
from excise.outcomes.number_scales import Unreadable, Value
from excise.outcomes.number_scan import PLAIN, WORDS, Number, Scan, Span
from excise.outcomes.number_values import ideographic
from excise.outcomes.number_words import number_words, word_patterns


def read_digits_among_ideographs(scan: Scan, token: int, digits: Span) -> int:
    """Read digits with Chinese, Japanese or Korean scales among them; the token behind them."""
    tokens, money = scan.tokens, digits.before.currency
    match = word_patterns()["ideographic"].match(tokens.text, tokens.starts[token])
    value = ideographic(match[0]) if match else None
    if match is None or value is None:
        raise Unreadable
    end = match.end()
    place = tokens.after(token, end)
    if place > 0 and tokens.ends[place - 1] > end:
        place -= 1
    behind = read_behind(tokens, place, end, money is not None)
    weigh_behind(tokens, behind, money is not None)
    if behind.unclear or behind.attached or digits.said in ("unreadable", "skip") or behind.scales:
        raise Unreadable
    scan.floor = max(behind.token, token + 1)
    raw, scale = value, 1.0
    if whole := re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?){BLANK}?[^0-9]+", match[0]):
        raw = float(whole[1])
        scale = value / raw if raw else 1.0
    scan.keep(digits, Value(raw, scale, value), PLAIN, money or behind.currency, behind)
    return _token_behind(scan, behind)


def _token_behind(scan: Scan, behind: Behind) -> int:
    """The token to go on with behind a number that may end within a run."""
    tokens = scan.tokens
    if behind.token < len(tokens.kinds) and tokens.starts[behind.token] < behind.end:
        rest = tokens.text[behind.end : tokens.ends[behind.token]]
        if word_patterns()["numerals"].search(rest):
            raise Unreadable
        return behind.token + 1
    return behind.token


def read_run(scan: Scan, token: int) -> int:
    """Read the numerals of a run, if it holds one number and what follows is known; the token behind it."""
    patterns, tokens = word_patterns(), scan.tokens
    start = tokens.starts[token]
    run = tokens.piece(token)
    inside = max(0, (scan.numbers[-1].end if scan.numbers else 0) - start)
    matches = [
        match
        for match in patterns["numerals"].finditer(run, inside)
        if not patterns["percent_of_hundred"].fullmatch(run[match.start() : match.end() + 2])
    ]
    if patterns["scale_run"].search(run, inside):
        raise Unreadable
    for match in matches:
        _read_numerals(scan, token, start + match.start(), match[0])
    return token + 1


def _read_numerals(scan: Scan, token: int, start: int, numerals: str) -> None:
    """Read numerals that begin at `start`, within the run at `token`."""
    words, patterns, tokens = number_words(), word_patterns(), scan.tokens
    text = tokens.text
    scaled = any(character in words.ideograph_scales for character in numerals)
    value = ideographic(numerals) if patterns["ideographic"].fullmatch(numerals) or len(numerals) == 1 else None
    end = start + len(numerals)
    behind = read_behind(tokens, token if end < tokens.ends[token] else token + 1, end, False)
    before = text[tokens.starts[token] : start]
    alone = NO_WORD.fullmatch(text, 0, start) and NO_WORD.fullmatch(text, behind.end)
    if not (scaled or behind.currency or behind.unit == "percent" or alone):
        return  # a numeral within a word
    hangul = any("\uac00" <= character <= "\ud7af" for character in numerals)
    if hangul and not (behind.currency or behind.unit == "percent" or alone):
        large = any(words.ideograph_scales.get(character, 0) >= 10_000 for character in numerals)
        if large and re.search("[0-9]", text):
            raise Unreadable
        return  # syllables that are numerals, too
    weigh_behind(tokens, behind, False)
    if before[-1:] in words.lists["indefinite_spaceless"]:
        raise Unreadable
    if (
        value is None
        or behind.unclear
        or patterns["part_run"].search(before[-2:])
        or patterns["ordinal_run"].search(before)
    ):
        raise Unreadable
    factor = -1.0 if patterns["minus_run"].search(before) else 1.0
    unit = behind.currency.name if behind.currency else behind.unit
    scan.numbers.append(Number(start, behind.end, factor * value, 1.0, factor * value, WORDS, unit=unit or "numeral"))
    scan.floor = max(behind.token, token + 1)
