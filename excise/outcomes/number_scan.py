"""One number of a plain text, and the scan over its tokens that finds all of them.

What a number's digits or words amount to, and what stands around them, is in modules of their own (`number_*`).
"""

import math
import re
from dataclasses import dataclass, field

from excise.outcomes.characters import LETTER
from excise.outcomes.number_before import Before, Said
from excise.outcomes.number_behind import Behind
from excise.outcomes.number_scales import Unreadable, Value
from excise.outcomes.number_tokens import Tokens
from excise.outcomes.number_values import grouped
from excise.outcomes.number_words import Currency, word_patterns

# A number expression competes only with its own kind: words count if there are no plain digits, and numbers that merely
# describe something ("a 1600-rated opponent", "the 5th") count if there is nothing else.
# What is no quantity ("3D", "10:30") counts never, but must not stand in for one end of a range: "5-7x" is not 5.
PLAIN, WORDS, DESCRIPTIVE, PASSED = 0, 1, 2, 3

_COMMON_SIGN = re.compile(
    r"(?:^|[:=(\n,;]|\b(?:is|be|of|about|around|approximately|equals|at|to|say|roughly))\s*$", re.I
)


@dataclass(frozen=True)
class Number:
    """One number expression: where it stands, its value before and after the scale ("2" and 2000 in "2k"), its kind.

    signed: the sign character that directly precedes it, "" if none; text: its digits; unit: the name of its currency
    or unit, "" if none; point: whether the point of 1.200 was read as a decimal one for lack of a currency.
    """

    start: int
    end: int
    raw: float
    scale: float
    value: float
    kind: int
    signed: str = ""
    text: str = ""
    unit: str = ""
    currency: Currency | None = None
    point: bool = False


@dataclass(frozen=True)
class Span:
    """Digits with what stands before them.

    body: the digits, "" where they are not written plainly; said: what the words before say of the number; touching:
    whether another number ends where this one begins.
    """

    body: str
    before: Before
    said: Said
    touching: bool = False


@dataclass
class Scan:
    """How far the reading of a text has come: its tokens, the numbers so far, the first token that none has taken."""

    tokens: Tokens
    numbers: list[Number] = field(default_factory=list)
    floor: int = 0

    def skip(self, start: int, end: int) -> None:
        """Note something that is no quantity."""
        self.numbers.append(Number(start, end, math.nan, 1.0, math.nan, PASSED))

    def shared_currency(self, start: int) -> Currency | None:
        """The currency of the number before, where this one is the second end of its range: "$2-3m"."""
        if not self.numbers or self.numbers[-1].currency is None:
            return None
        text, last = self.tokens.text, self.numbers[-1]
        match = word_patterns()["connector"].fullmatch(text, last.end, start) if start - last.end <= 12 else None
        ranged = (match and (match["dash"] or match["to"])) or text[start : start + 1] in ("-", "\u2013")
        return last.currency if ranged and (match or not text[last.end : start].strip()) else None

    def keep(self, digits: Span, value: Value, kind: int, currency: Currency | None, behind: Behind) -> None:
        """Add a number with its sign; raises Unreadable where that, or the value, is not understood."""
        before = digits.before
        text, start, sign, inner = self.tokens.text, before.start, before.sign, before.inner_sign
        minus = sign in ("-", "\u2013") or inner in ("-", "\u2013")
        neighbour = text[start - 1] if start else ""
        if (
            sign
            and not digits.touching
            and (neighbour == "-" or (neighbour and (LETTER.match(neighbour) or neighbour == ")")))
        ):
            minus = inner in ("-", "\u2013")  # a dash between words, not a sign
        elif sign and neighbour == "+":
            raise Unreadable
        elif sign == "\u2013" and neighbour and not digits.touching and not neighbour.isdigit():
            earlier = self.numbers[-1].end if self.numbers else -1
            apart = earlier < 0 or text[earlier:start].strip(" \t\xa0")
            if apart and _COMMON_SIGN.search(text, max(0, start - 16), start) is None:
                raise Unreadable
        if digits.said == "minus" and minus:
            raise Unreadable
        if not (math.isfinite(value.scaled) and math.isfinite(value.raw)):
            raise Unreadable
        unit = currency.name if currency else ("" if behind.unit == "about" else behind.unit)
        factor = -1.0 if minus or digits.said == "minus" else 1.0
        body = digits.body
        self.numbers.append(
            Number(
                start,
                behind.end,
                factor * value.raw,
                value.scale,
                factor * value.scaled,
                kind,
                sign,
                body,
                unit,
                currency,
                not currency and body.count(".") == 1 and "," not in body and grouped(body, "."),
            )
        )
