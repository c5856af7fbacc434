"""What the scale, the currency and the unit of a number make of its digits.

Words of several meanings (mil, billion) and points that may separate thousands are decided here, by the language of the
text and by the currency.
"""

import math
import re
from dataclasses import dataclass

from excise.outcomes.number_behind import Behind
from excise.outcomes.number_tokens import Tokens
from excise.outcomes.number_values import canonical_digits, grouped
from excise.outcomes.number_words import Currency, number_words

_LONGEST_BODY = 400  # characters; anything longer overflows a double or is noise
_ENGLISH = frozenset({"en"})


class Unreadable(Exception):
    """A number that is not understood, which makes its text unreadable."""


@dataclass(frozen=True)
class Digits:
    """The digits of a number as written: "1,200", the exponent behind them ("e3" or ""), and a fraction to add."""

    body: str
    exponent: str = ""
    fraction: float = 0.0


@dataclass(frozen=True)
class Value:
    """A number before its scale, the scale, and the product of both."""

    raw: float
    scale: float
    scaled: float


def value_of(tokens: Tokens, digits: Digits, currency: Currency | None, behind: Behind) -> Value | None:
    """The value of digits with what stands behind them; None where they make no single number ("1.2.3").

    currency: the one of the number, on whichever side of it. Raises Unreadable where a scale, or the points and commas,
    may be read in several ways.
    """
    scale, languages = _scale(tokens, digits.body, currency, behind)
    plain = ""
    if digits.body:
        if len(digits.body) > _LONGEST_BODY:
            raise Unreadable
        canonical = canonical_digits(digits.body, _points_group(tokens, digits.body, currency, behind, languages))
        if canonical is None:
            return None
        plain = canonical
    raw = (float(plain + digits.exponent) if plain else 0.0) + digits.fraction
    scaled = raw * scale
    # 1.005k is 1005 and not 1004.9999999999999: let the decimal exponent carry the scale
    if scale != 1 and plain and not (digits.fraction or digits.exponent):
        power = round(math.log10(scale))
        if math.isclose(scale, 10.0**power):
            scaled = float(f"{plain}e{power}")
    return Value(raw, scale, scaled)


def scale_of(tokens: Tokens, currency: Currency | None, behind: Behind) -> float:
    """What a number in words is multiplied by for what stands behind it. Raises Unreadable as `value_of`."""
    return _scale(tokens, "", currency, behind)[0]


def _scale(tokens: Tokens, body: str, currency: Currency | None, behind: Behind) -> tuple[float, frozenset[str] | None]:
    """The scale, and the languages its words belong to, None without words."""
    scale, languages = 1.0, None
    if behind.scales:
        scale, languages = _product(tokens, body, currency, behind)
    if currency:
        scale *= currency.scale
    if behind.cents:
        scale /= 100
    return scale, languages


def _points_group(
    tokens: Tokens, body: str, currency: Currency | None, behind: Behind, scale_languages: frozenset[str] | None
) -> bool:
    """Whether the point of 1.200 separates thousands; raises Unreadable where it, or a comma, may be either."""
    if behind.dashed:
        return True
    if body[0] == ",":
        if currency and len(body) <= 3:
            return False
        raise Unreadable
    foreign = bool(tokens.languages()) and "en" not in tokens.languages()
    foreign |= behind.unit_word != "" and behind.unit_word.casefold() not in number_words().lists["english_units"]
    if grouped(body, ".") and body.count(".") == 1 and "," not in body:
        if currency and currency.point_groups:
            if behind.scales:
                raise Unreadable
            return True
        if behind.scales:
            if scale_languages is not None and "en" not in scale_languages:
                raise Unreadable
            return False
        if currency or foreign:
            raise Unreadable
        return False
    if grouped(body, ",") and body.count(",") == 1 and "." not in body and body[0] != "0":
        if behind.scales and scale_languages is not None and "en" not in scale_languages:
            raise Unreadable
        if behind.scales and currency and currency.point_groups and behind.scales != ["k"]:
            if "en" not in tokens.languages() and behind.scales[0] not in ("million", "billion"):
                raise Unreadable
            return False
        if not currency and (foreign or behind.unit == "percent"):
            raise Unreadable
    return bool(currency and currency.point_groups)


def _product(
    tokens: Tokens, body: str, currency: Currency | None, behind: Behind
) -> tuple[float, frozenset[str] | None]:
    """The product of scale words, and the languages all of them belong to; raises Unreadable where one is ambiguous."""
    product, last = 1.0, 0.0
    languages: frozenset[str] | None = None
    for word in behind.scales:
        factor, spoken = _factor(tokens, word, body, currency, behind)
        if last and factor <= last and not (last == 1e5 and factor == 1e7):
            raise Unreadable
        product, last = product * factor, factor
        languages = spoken if languages is None else languages & spoken
    return product, languages


def _factor(
    tokens: Tokens, word: str, body: str, currency: Currency | None, behind: Behind
) -> tuple[float, frozenset[str]]:
    """The factor of one scale word by its language, and the languages in which it is known."""
    words = number_words()
    if word in words.spaceless_scales:
        return words.spaceless_scales[word], frozenset({"th"})
    meanings = [meaning for meaning in words.scales[word] if not meaning.beside_currency or currency]
    if not meanings:
        raise Unreadable
    spoken: frozenset[str] = frozenset().union(*(meaning.languages for meaning in meanings))
    if len({meaning.factor for meaning in meanings}) == 1:
        return meanings[0].factor, spoken
    if len(behind.scales) > 1 and word == "mil":
        return 1e3, frozenset({"es"})  # mil millones

    def factors(languages: frozenset[str]) -> set[float]:
        return {meaning.factor for meaning in meanings if meaning.languages & languages}

    of_text = factors(tokens.languages())
    tongues = currency.languages if currency else frozenset()
    of_currency = factors(tongues)
    default = next((meaning.factor for meaning in meanings if meaning.default), None)
    if of_text:
        if len(of_text) > 1:
            raise Unreadable
        factor = of_text.pop()
        if factor != default or not of_currency or of_currency == {factor} or "en" in tongues:
            return factor, spoken
        raise Unreadable
    if default is not None:
        trailing = (
            behind.currency is not None and "en" not in tongues and behind.currency.name not in ("pound", "dollar")
        )
        if ((of_currency - {default}) and "en" not in tongues) or (trailing and tongues):
            raise Unreadable
        return default, spoken
    dollar = currency is not None and currency.name == "dollar"
    if not tongues and dollar and re.fullmatch(r"[0-9]+\.[0-9]{1,2}", body):
        of_currency = factors(_ENGLISH)  # a decimal point beside a dollar sign
    if not of_currency and dollar and word in ("mil", "bil") and "en" in tokens.languages():
        of_currency = factors(_ENGLISH)
    if len(of_currency) != 1:
        raise Unreadable
    return of_currency.pop(), spoken
