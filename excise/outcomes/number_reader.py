"""The numbers in a plain text: digits and number words with their signs, scales, currencies and units, one by one.

A number that is not understood makes its text unreadable. Which of several numbers is the answer is decided in
`excise.outcomes.answers`; the words are listed in number_words.yaml.
"""

import re
import unicodedata
from dataclasses import replace

from excise.outcomes.characters import BLANK, ONE_LETTER, VULGAR
from excise.outcomes.number_before import read_before, weigh_before
from excise.outcomes.number_behind import Behind, read_behind, weigh_behind
from excise.outcomes.number_ideographs import read_digits_among_ideographs, read_run
from excise.outcomes.number_scales import Digits, Unreadable, value_of
from excise.outcomes.number_scan import DESCRIPTIVE, PLAIN, Number, Scan, Span
from excise.outcomes.number_spoken import match_spoken, read_spoken
from excise.outcomes.number_tokens import Tokens
from excise.outcomes.number_words import Currency, number_words, word_patterns

_MIXED = {2, 4, 5, 8}  # denominators of mixed fractions such as 2 1/2
_AND_A_HALF = re.compile(rf"{BLANK}and{BLANK}a{BLANK}half\b", re.IGNORECASE)
_MIXED_FRACTION = re.compile(rf"{BLANK}(?P<above>[0-9])/(?P<below>[0-9])(?![0-9/.,^]|{ONE_LETTER})")
_POWER = re.compile(rf"{BLANK}*[x\xd7*\xb7]{BLANK}*10{BLANK}?\^{BLANK}?(?P<exponent>[-+]?[0-9]{{1,3}})(?![0-9.,])")
_ONLY_POWER = re.compile(rf"{BLANK}?\^{BLANK}?(?P<exponent>[-+]?[0-9]{{1,3}})(?![0-9.,])")
_LIST_MARKER = re.compile(r"^[ \t*_#>-]*([0-9]{1,2})[.)](?=[ \t*_]+\S)", re.MULTILINE)
_CLOCK = re.compile(r"[0-9]+(?::[0-9]+)+")
_VULGAR_FRACTION = re.compile(f"[{VULGAR}]")
_FRACTION_BEHIND = re.compile(rf"{BLANK}?([{VULGAR}])")


def read_numbers(text: str) -> list[Number] | None:
    """All numbers of a plain text in order, from one scan over its tokens; None where one is not understood."""
    scan = Scan(Tokens(text))
    try:
        _read(scan)
    except Unreadable:
        return None
    return scan.numbers


def _read(scan: Scan) -> None:
    tokens, words = scan.tokens, number_words()
    markers = _list_markers(tokens.text)
    token = 0
    while token < len(tokens.kinds):
        kind, start = tokens.kinds[token], tokens.starts[token]
        if kind == "number":
            if clock := _CLOCK.match(tokens.text, start):
                scan.skip(start, clock.end())
                token = tokens.after(token, clock.end())
            elif start in markers:
                token += 1
            else:
                token = _read_digits(scan, token)
        elif kind == "other" and _VULGAR_FRACTION.match(tokens.text[start]):
            token = _read_digits(scan, token)
        elif kind == "word" and (match := match_spoken(scan, token)):
            token = read_spoken(scan, match, token)
        elif kind == "run":
            token = read_run(scan, token)
        elif kind == "word" and (scale := words.key(tokens.word(token), words.scales)):
            # A scale that no number has taken: "(in thousands)", "hundreds of dollars".
            if scale not in words.prose or tokens.word(token - 2).casefold() == "in":
                raise Unreadable
            token += 1
        else:
            token += 1


def _read_digits(scan: Scan, token: int) -> int:
    """Read the number whose digits stand at `token`; the token behind it."""
    tokens = scan.tokens
    before = read_before(tokens, scan.floor, token)
    start, money = before.start, before.currency
    touching = start > 0 and token > 0 and scan.floor > 0 and start == tokens.ends[scan.floor - 1]
    said = weigh_before(tokens, scan.floor, start, token, money is not None)
    money = money or scan.shared_currency(start)
    digits, position = _digits_at(tokens, token)
    place = tokens.after(token + 1, position)
    if digits.body and not digits.exponent and word_patterns()["factors"].match(tokens.text, position):
        span = Span("", replace(before, currency=money), said)
        return read_digits_among_ideographs(scan, token, span)
    behind = read_behind(tokens, place, position, money is not None)
    weigh_behind(tokens, behind, money is not None)
    scan.floor = max(behind.token, token + 1)
    if re.fullmatch("0{3,}", digits.body):
        raise Unreadable  # in '000
    if said == "skip" and not money:
        scan.skip(start, behind.end)
        return scan.floor
    if touching and not (before.sign or money):
        raise Unreadable  # 0b11
    if said in ("year", "name"):  # in 2024, Route 66
        if not (behind.scales or behind.counted or money):
            scan.skip(start, behind.end)
            return scan.floor
        said = ""
    if behind.attached:
        if money is not None:
            raise Unreadable
        scan.skip(start, behind.end)
        return scan.floor
    if said == "unreadable" or behind.unclear:
        raise Unreadable
    currency = _currency(money, behind)
    value = value_of(tokens, digits, currency, behind)
    if value is None:
        if not _is_version_or_date(digits.body, currency, behind):
            raise Unreadable
        return scan.floor
    kind = DESCRIPTIVE if behind.ordinal or behind.compound else PLAIN
    scan.keep(Span(digits.body, before, said, touching), value, kind, currency, behind)
    return scan.floor


def _digits_at(tokens: Tokens, token: int) -> tuple[Digits, int]:
    """The digits at a token with the fraction or power of ten behind them, and the position behind those."""
    text, position = tokens.text, tokens.ends[token]
    body = tokens.piece(token) if tokens.kinds[token] == "number" else ""
    exponent, fraction = "", 0.0
    if body and (power_of_ten := re.search("e[-+]?[0-9]+$", body, re.IGNORECASE)):
        exponent, body = power_of_ten[0], body[: power_of_ten.start()]
    if not body:
        fraction = unicodedata.numeric(text[tokens.starts[token]])
    elif match := _FRACTION_BEHIND.match(text, position):
        fraction, position = unicodedata.numeric(match[1]), match.end()
    elif (
        (match := _MIXED_FRACTION.match(text, position))
        and body.isdigit()
        and (int(match["below"]) in _MIXED and 0 < int(match["above"]) < int(match["below"]))
    ):
        fraction, position = int(match["above"]) / int(match["below"]), match.end()
    if match := _AND_A_HALF.match(text, position):
        fraction, position = fraction + 0.5, match.end()
    if fraction and re.search("[.,]", body):
        raise Unreadable  # 2.5 and a half
    only_power = _ONLY_POWER.match(text, position) if body == "10" else None
    power = only_power or _POWER.match(text, position)
    if power and not (fraction or exponent):
        exponent = f"e{int(power['exponent']) - (only_power is not None)}"
        position = power.end()
    return Digits(body, exponent, fraction), position


def _currency(money: Currency | None, behind: Behind) -> Currency | None:
    """The currency of a number with one before it, behind it or both; raises Unreadable where the two differ."""
    if money and behind.currency and money.name != behind.currency.name:
        if money is not number_words().currencies["$"]:
            raise Unreadable
        return behind.currency  # $500.000 COP
    return money or behind.currency


def _is_version_or_date(body: str, currency: Currency | None, behind: Behind) -> bool:
    """Whether digits with several points are no quantity and no rival of one: 1.2.3, 05.01.2024, a height of 5'10."""
    if currency or behind.scales or behind.unit or "," in body:
        return False
    return body.count(".") != 1 and len(re.findall(r"[.']", body)) in (1, 2)


def _list_markers(text: str) -> set[int]:
    """Where the digits of list markers stand: lines that open with "1.", then "2.", and so on."""
    positions, expected = set(), 1
    for match in _LIST_MARKER.finditer(text):
        if int(match[1]) in (1, expected):
            positions.add(match.start(1))
            expected = int(match[1]) + 1
    return positions
