"""What the digits or words of one number amount to: 1,234.5, "two hundred and five", numerals of East Asia.

Where they stand in a text, and what stands around them, is in `excise.outcomes.number_reader`.
"""

import math
import re

from excise.outcomes.number_words import number_words

SMALL = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "thirteen": 13,
    "fourteen": 14,
    "fifteen": 15,
    "sixteen": 16,
    "seventeen": 17,
    "eighteen": 18,
    "nineteen": 19,
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
LARGE = {"thousand": 1e3, "grand": 1e3, "lakh": 1e5, "million": 1e6, "crore": 1e7, "billion": 1e9, "trillion": 1e12}
SPOKEN_SCALES = {"dozen": 12.0, "hundred": 1e2, **LARGE}
SPOKEN_START = frozenset(
    {*SMALL, *LARGE, "hundred", "dozen", "half", "a", "an", "few", "several", "many", "some", "couple", "of", "point"}
)


def grouped(integer: str, separator: str) -> bool:
    """Whether `integer` is grouped like 1,234,567 or, with commas, like the Indian 12,34,567."""
    first, *rest = integer.split(separator)
    if not (rest and 1 <= len(first) <= 3 and first[0] != "0" and len(rest[-1]) == 3):
        return False
    if all(len(group) == 3 for group in rest):
        return True
    return separator == "," and len(first) <= 2 and all(len(group) == 2 for group in rest[:-1])


def canonical_digits(body: str, points_group: bool) -> str | None:
    """The digits of a number in Python's notation, or None if its separators make no single number of it."""
    separators = [character for character in body if not "0" <= character <= "9"]
    if not separators or body[0] == ".":
        return body
    if body[0] == ",":
        return body.replace(",", ".")
    kinds = set(separators)
    if len(kinds) == 1:
        only, groups = separators[0], body.split(separators[0])
        if only == "." and len(groups) == 2 and not (points_group and grouped(body, ".")):
            return body
        if grouped(body, only):
            return body.replace(only, "")
        if only == "," and len(groups) == 2 and (len(groups[1]) <= 2 or groups[0] == "0"):
            return body.replace(",", ".")
        return None
    point = separators[-1]
    integer, decimals = body.rsplit(point, 1)
    (group,) = kinds - {point} if len(kinds) == 2 else (None,)
    if group is None or point not in ".," or point in integer or not grouped(integer, group):
        return None
    return f"{integer.replace(group, '')}.{decimals}"


def spoken(words: str) -> tuple[float, float] | None:
    """(value, trailing scale) of English number words, None if they do not make up one number."""
    parts = [part for part in re.split(r"[^a-z]+", words.lower()) if part]
    total = current = 0.0
    ceiling = math.inf  # the next big word must be smaller than the one before: two thousand million is no number here
    room = math.inf  # what the next small word may be: below ten after twenty, below a hundred after a hundred
    for position, part in enumerate(parts):
        if part == "and":
            if position == len(parts) - 1 or room is math.inf:
                return None
            continue
        if part in SMALL:
            if SMALL[part] >= room or (SMALL[part] == 0 and len(parts) > 1 and position > 0):
                return None
            current += SMALL[part]
            room = 10 if SMALL[part] >= 20 else 0
        elif part in ("hundred", "dozen"):
            if current >= 100 or (room is not math.inf and current == 0):
                return None
            current = (current or 1) * SPOKEN_SCALES[part]
            room = 100 if part == "hundred" else 0
        else:
            if LARGE[part] >= ceiling:
                return None
            total += (current or 1) * LARGE[part]
            ceiling, current, room = LARGE[part], 0.0, 1000
    return total + current, SPOKEN_SCALES.get(parts[-1], 1.0)


def spoken_decimals(words: str) -> str | None:
    """The digits after "point": single digits one by one, or None ("two point fifty" is said of prices)."""
    digits = [SMALL.get("zero" if part == "oh" else part, 10) for part in re.findall(r"[a-z]+", words.lower())]
    return "".join(map(str, digits)) if all(digit < 10 for digit in digits) else None


def ideographic(text: str) -> float | None:
    """The value of digits mixed with Chinese, Japanese or Korean scales ("1\u4e075\u5343"), None if there is none."""
    words = number_words()
    total = section = 0.0
    pending: float | None = None
    small, large = math.inf, math.inf
    parts = re.findall(r"[0-9][0-9.,]*|[^0-9.,\s]", text)
    for position, part in enumerate(parts):
        if part[0].isdigit():
            digits = canonical_digits(part, False)
            if pending is not None or digits is None:
                return None
            pending = float(digits)
            if position == len(parts) - 1 and position and len(part) < 4:
                return None  # 1\u4e075: 15000 in speech, 10005 on paper
        elif part in words.ideographs:
            if pending is not None and pending != 0:
                return None
            pending = float(words.ideographs[part])
            if position == len(parts) - 1 and len(parts) > 2 and words.ideograph_scales.get(parts[-2], 1) > 10:
                return None
        elif words.ideograph_scales[part] < 10_000:
            factor = words.ideograph_scales[part]
            if factor >= small:
                return None
            section += (1.0 if pending is None else pending) * factor
            pending, small = None, factor
        else:
            factor = words.ideograph_scales[part]
            section += pending or 0.0
            if not section and position and parts[position - 1] in words.ideograph_scales and total:
                total *= factor  # \u4e07\u4ebf
            elif factor >= large:
                return None
            else:
                total += (section or 1.0) * factor
            large, section, pending, small = factor, 0.0, None, math.inf
    return total + section + (pending or 0.0)
