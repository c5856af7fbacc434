"""Reading the one number out of a model's free-text answer: `parse_number` and `parse_completion`.

Only text becomes a number here; what the number means (units, plausible ranges, statistics) belongs to `scenarios`
and `metrics`. The rule behind every decision: a text is an answer only if it names a single quantity, because a
missing answer is reported (parse rate) while a wrongly read one silently moves a group's mean.
"""

import math
import re
import unicodedata
from dataclasses import dataclass, replace

# A number expression competes only with its own kind: words count if there are no plain digits, and numbers that merely
# describe something ("a 1600-rated opponent", "the 5th") count if there is nothing else.
_PLAIN, _WORDS, _DESCRIPTIVE = 0, 1, 2

_LONGEST_BODY = 400  # characters; anything longer overflows a double or is noise

_SMALL = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_LARGE = {"thousand": 1e3, "grand": 1e3, "lakh": 1e5, "million": 1e6, "crore": 1e7, "billion": 1e9, "trillion": 1e12}
_SCALES = {
    "k": 1e3, "m": 1e6, "mn": 1e6, "mil": 1e6, "b": 1e9, "bn": 1e9, "tn": 1e12, "dozen": 12.0, "hundred": 1e2,
    "lakhs": 1e5, "crores": 1e7, **_LARGE,
}  # fmt: skip

_SPACE = r"[ \t\xa0]"
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts that write no space between a number and a word
_LETTER = re.compile(rf"[^\W\d_{_IDEOGRAPH}]")
_CODES = "usd|eur|gbp|jpy|inr|cad|aud|nzd|chf|cny|rmb|sek|nok|dkk|mxn|brl|zar|hkd|sgd|krw"
_UNIT_WORDS = (
    r"percentage points?|percent|per cent|pct|(?:u\.?s\.? |american |canadian |australian )?dollars?|bucks?|euros?"
    rf"|pounds?|sterling|yen|rupees?|yuan|francs?|pesos?|{_CODES}"
    r"|hours?|hrs?|h|minutes?|mins?|days?|weeks?|wks?|months?|years?|yrs?|points?|pts?|ish"
)
_WORD = "|".join(sorted([*_SMALL, *_LARGE, "hundred", "dozen"], key=len, reverse=True))

# One scan from left to right. Every repetition is either bounded or followed only by optional parts, so that the scan
# is linear in the length of the text.
_EXPRESSION = re.compile(
    rf"""
    (?P<clock>[0-9]+(?::[0-9]+)+)
    | (?P<sign>[-+\u2013])?
      (?P<money>(?:(?<![^\W\d_])(?:{_CODES}|rs\.?|[a-z]{{1,3}}(?=\$))|(?=[$\u20ac])){_SPACE}?[$\u20ac]?{_SPACE}?)?
      (?P<inner>[-+])?
      (?:
        (?P<body>[0-9]+(?:[.,'\xa0][0-9]+)*|(?<![^\W\d_])(?<!\.)\.[0-9]+)
        (?P<exponent>e[-+]?[0-9]{{1,4}}(?![0-9]|[^\W\d_]))?
        (?:{_SPACE}?(?P<vulgar>[\xbc-\xbe\u2150-\u215e]))?
        | (?P<only_vulgar>[\xbc-\xbe\u2150-\u215e])
      )
      (?P<half>{_SPACE}and{_SPACE}a{_SPACE}half(?![^\W\d_]))?
      (?:(?:(?P<letter>k|mn|m|bn|b|tn)|{_SPACE}(?P<spaced>k|mn|m|bn|b)
          |[ \t\xa0-]?(?P<scale>dozen|hundred|thousand|grand|lakhs?|mil|million|crores?|billion|trillion)
           (?:{_SPACE}(?P<scale2>thousand|million|billion|trillion))?)(?![^\W_]))?
      (?P<unit>{_SPACE}?(?:%|\u2030|\xa2|cents?(?![^\W\d_])|[$\u20ac](?!{_SPACE}?[.0-9])|-?(?:{_UNIT_WORDS})(?![^\W\d_]))
          (?:{_SPACE}?(?:{_CODES})(?![^\W\d_]))?)?
    | (?<![\w])(?P<opening>half{_SPACE}an?|an?|(?:few|several|many|some|couple|couple{_SPACE}of|of)(?:{_SPACE}a)?)
      {_SPACE}(?P<article_words>(?:hundred|thousand|grand|million|billion|trillion|dozen)\b
        (?:(?:{_SPACE}and{_SPACE}|-|{_SPACE})(?:{_WORD})\b)*)
    | (?<![\w])(?P<words>(?:{_WORD})\b(?:(?:{_SPACE}and{_SPACE}|,{_SPACE}|-|{_SPACE})(?:{_WORD})\b)*)
      (?P<words_half>{_SPACE}and{_SPACE}a{_SPACE}half\b)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_HEDGE = r"(?:about|around|approximately|approx\.?|roughly|maybe|perhaps|say|only|nearly|almost)"
_CONNECTOR = re.compile(
    rf"{_SPACE}{{0,3}}(?:(?:(?:per|an?){_SPACE}|/{_SPACE}?)[a-z]{{1,12}}{_SPACE})?"
    rf"(?:(?P<dash>-{{1,2}}|\u2013|~)|(?P<tight>\u2014)|(?P<to>-?to|through|thru|until|till)\b-?|(?P<and>and)\b|)"
    rf"{_SPACE}{{0,3}}(?:{_HEDGE}{_SPACE})?",
    re.IGNORECASE,
)
_BETWEEN = re.compile(rf"\bbetween{_SPACE}{{0,3}}(?:{_HEDGE}{_SPACE})?$", re.IGNORECASE)
_MINUS = re.compile(rf"\b(?:minus|negative){_SPACE}$", re.IGNORECASE)
_ON_A_SCALE = re.compile(rf"\bscale{_SPACE}(?:of|from|between){_SPACE}(?:from{_SPACE})?$", re.IGNORECASE)
_LABEL = re.compile(
    rf"\b(?:step|option|part|question|figure|table|chapter|section|page|version|example|scenario|note){_SPACE}#?$",
    re.IGNORECASE,
)
_LIST_MARKER = re.compile(r"^[ \t*_#>-]*([0-9]{1,2})[.)](?=[ \t*_]+\S)", re.MULTILINE)
_BEFORE_BARE_WORD = re.compile(
    r"[\W_]*(?:(?:about|around|approximately|roughly|maybe|perhaps|probably|answer|number|offer|is|say|i|would|d|the|my|it"
    r"|between|from|minus|negative)[\W_]+)*",
    re.IGNORECASE,
)
_UNIT_AFTER = re.compile(rf"[ \t\xa0-]{{0,2}}(?:%|{_UNIT_WORDS})(?![^\W\d_])", re.IGNORECASE)
_CENTS = re.compile(r"\xa2|(?<![^\W_])cents?", re.IGNORECASE)
_OPEN_END = re.compile(
    r"[ \t\xa0*_`]*[.,'$\u20ac~\u2013\u2014+/:-]*[ \t\xa0]*([a-z]*)(?:[ \t\xa0](a|a[ ]h[alf]*))?", re.IGNORECASE
)
_ORDINAL = re.compile(r"(?:st|nd|rd|th)(?![^\W_])", re.IGNORECASE)
_CLOCK_AFTER = re.compile(rf"{_SPACE}?(?:[ap]\.?m\b|o'clock\b)", re.IGNORECASE)
_RANGE_OR_ISH = re.compile(r"-(?:to|ish)\b", re.IGNORECASE)
_HOURS_SIGN = re.compile(r"\s?h", re.IGNORECASE)
_IN_BEFORE = re.compile(r"\bin\s$", re.IGNORECASE)
_NO_WORD = re.compile(r"[\W_]*")
_MAY_FOLLOW = tuple({*_SCALES, *_SMALL, "to", "through", "and", "percent", "cents"})

_CHARACTERS = {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-", "\u2012": "\u2013", "\u2015": "\u2014",
    "\u301c": "~", "\u223c": "~", "\uff5e": "~", "\u2019": "'", "\u02bc": "'", "\u066b": ".", "\u066c": ",",
    "\u066a": "%", "\u20ac": "\u20ac", "\xa2": "\xa2",
}  # fmt: skip


@dataclass(frozen=True)
class _Number:
    """One number expression: where it stands, its value before and after the scale ("2" and 2000 in "2k"), its kind."""

    start: int
    end: int
    raw: float
    scale: float
    value: float
    kind: int
    signed: str = ""  # the sign character that directly precedes it, "" if none
    text: str = ""


def _plain_character(match: re.Match) -> str:
    """Digits of any script, full-width forms, currency signs, dashes and spaces in the few forms the grammar knows."""
    character = match[0]
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if "\uff01" <= character <= "\uff5e":
        return chr(ord(character) - 0xFEE0)
    category = unicodedata.category(character)
    if category == "Sc":
        return "$"
    if category == "Zs":
        return "\xa0"
    return character


def _is_letter(character: str) -> bool:
    return _LETTER.fullmatch(character) is not None


def _grouped(integer: str, separator: str) -> bool:
    """Whether `integer` is grouped like 1,234,567 or, with commas, like the Indian 12,34,567."""
    first, *rest = integer.split(separator)
    if not (1 <= len(first) <= 3 and first[0] != "0" and len(rest[-1]) == 3):
        return False
    if all(len(group) == 3 for group in rest):
        return True
    return separator == "," and len(first) <= 2 and all(len(group) == 2 for group in rest[:-1])


def _canonical(body: str, euro: bool) -> str | None:
    """The digits of a number in Python's notation, or None if its separators make no single number of it."""
    separators = [character for character in body if not "0" <= character <= "9"]
    if not separators or body[0] == ".":
        return body
    kinds = set(separators)
    if len(kinds) == 1:
        only, groups = separators[0], body.split(separators[0])
        if only == "." and len(groups) == 2 and not (euro and _grouped(body, ".")):
            return body
        if _grouped(body, only):
            return body.replace(only, "")
        if only == "," and len(groups) == 2 and (len(groups[1]) <= 2 or groups[0] == "0"):
            return body.replace(",", ".")
        return None
    point = separators[-1]
    integer, decimals = body.rsplit(point, 1)
    (group,) = kinds - {point} if len(kinds) == 2 else (None,)
    if group is None or point not in ".," or point in integer or not _grouped(integer, group):
        return None
    return f"{integer.replace(group, '')}.{decimals}"


def _spoken(words: str) -> tuple[float, float] | None:
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
        if part in _SMALL:
            if _SMALL[part] >= room or (_SMALL[part] == 0 and len(parts) > 1 and position > 0):
                return None
            current += _SMALL[part]
            room = 10 if _SMALL[part] >= 20 else 0
        elif part in ("hundred", "dozen"):
            if current >= 100 or (room is not math.inf and current == 0):
                return None
            current = (current or 1) * _SCALES[part]
            room = 100 if part == "hundred" else 0
        else:
            if _LARGE[part] >= ceiling:
                return None
            total += (current or 1) * _LARGE[part]
            ceiling, current, room = _LARGE[part], 0.0, 1000
    return total + current, _SCALES.get(parts[-1], 1.0)


def _digits(match: re.Match, text: str, markers: set[int]) -> _Number | str | None:
    """The number a match of digits stands for, "skip" for one that is no quantity, None for one that cannot be read."""
    start, end = match.start(), match.end()
    first = match.start("body") if match["body"] else match.start("only_vulgar")
    if first in markers:
        return "skip"
    money, sign = match["money"] or "", match["sign"] or ""
    before = text[start - 1] if start else ""
    after = text[end : end + 1]
    hyphenated_range = text[max(0, start - 4) : start].lower().endswith("-to")  # 5-to-10
    if _is_letter(before) and not money and sign != "\u2013" and not hyphenated_range:
        return "skip"  # A4, Covid19, Covid-19
    if _LABEL.search(text, max(0, start - 24), start):
        return "skip"
    if _HOURS_SIGN.fullmatch(match["unit"] or "") and after.isdigit():
        return "skip"  # 10h30
    if after and (after.isdigit() or after in "\u4e07\u842c\u5343\u767e\u4ebf\u5104^"):
        return None  # a multiplier or an exponent this grammar does not read
    if after and (unicodedata.category(after) == "No" or text[end : end + 2].lower() in ("'s", "'d")):
        return "skip"
    kind = _PLAIN
    if after and _is_letter(after):
        ending = _ORDINAL.match(text, end)
        if not ending or match["letter"] or match["unit"]:
            return "skip"  # 3D, 1080p, 90s
        kind, end = _DESCRIPTIVE, ending.end()
    elif _hyphenated(match, text, end):
        kind = _DESCRIPTIVE
    if _CLOCK_AFTER.match(text, end):
        return "skip"
    return _digit_value(match, text, kind, end)


def _hyphenated(match: re.Match, text: str, end: int) -> bool:
    """Whether the number is the first part of a compound: 1600-rated, 20-hour."""
    if match["unit"]:
        return match["unit"].startswith("-") and match["unit"].lower() != "-ish"
    return text[end : end + 1] == "-" and _is_letter(text[end + 1 : end + 2]) and not _RANGE_OR_ISH.match(text, end)


def _digit_value(match: re.Match, text: str, kind: int, end: int) -> _Number | str | None:
    money, sign = match["money"] or "", match["sign"] or ""
    unit = match["unit"] or ""
    if match["body"]:
        if len(match["body"]) > _LONGEST_BODY:
            return None
        digits = _canonical(match["body"], "\u20ac" in money + unit or "eur" in (money + unit).lower())
        if digits is None:
            # 1.2.3 and 05.01.2024 are versions and dates, 5'10 a height; 1,2,3 is several numbers
            return "skip" if set(match["body"]) & set(".'") and "," not in match["body"] else None
        raw = float(digits + (match["exponent"] or ""))
    else:
        raw = 0.0
    vulgar = match["vulgar"] or match["only_vulgar"]
    if vulgar:
        raw += unicodedata.numeric(vulgar)
    if match["half"]:
        raw += 0.5
    scale = 1.0
    if match["spaced"] and match["spaced"].lower() in "mb" and not money:
        end, unit = match.start("spaced") - 1, ""  # "5 m" is five metres
    elif match["letter"] and match["letter"].lower() == "b" and not money:
        return "skip"  # 7B
    else:
        for name in ("letter", "spaced", "scale", "scale2"):
            if match[name]:
                scale *= _SCALES[match[name].lower()]
    if _CENTS.search(unit):
        scale /= 100
    minus = sign in ("-", "\u2013") or match["inner"] == "-"
    before = text[match.start() - 1] if match.start() else ""
    if sign and (_is_letter(before) or before == "-"):
        minus = match["inner"] == "-"  # a dash between words, not a sign
    scaled = raw * scale
    # 1.005k is 1005 and not 1004.9999999999999: let the decimal exponent carry the scale
    if scale != 1 and match["body"] and not (vulgar or match["half"] or match["exponent"]):
        exponent = round(math.log10(scale))
        if math.isclose(scale, 10.0**exponent):
            scaled = float(f"{digits}e{exponent}")
    if not math.isfinite(scaled):
        return None
    factor = -1.0 if minus or _MINUS.search(text, max(0, match.start() - 12), match.start()) else 1.0
    return _Number(match.start(), end, factor * raw, scale, factor * scaled, kind, sign, match["body"] or "")


def _words(match: re.Match, text: str) -> _Number | str | None:
    """The number a match of English number words stands for; "skip" and None as for digits."""
    opening = (match["opening"] or "").lower()
    spoken = _spoken(match["words"] or match["article_words"])
    if opening and not re.fullmatch(r"half\san?|an?", opening):
        return None  # several hundred, a quarter of a million
    compound = text[match.end() : match.end() + 1] == "-" and _is_letter(text[match.end() + 1 : match.end() + 2])
    if compound and not _UNIT_AFTER.match(text, match.end()) and not _RANGE_OR_ISH.match(text, match.end()):
        return "skip"  # three-bedroom
    if spoken is None:
        return None
    value, scale = spoken
    if opening.startswith("half"):
        value /= 2
    if match["words"] and match["words_half"]:
        value += 0.5 * scale
    if _MINUS.search(text, max(0, match.start() - 12), match.start()):
        value = -value
    if opening.startswith("a") and _IN_BEFORE.search(text, max(0, match.start() - 4), match.start()):
        return "skip"  # one in a million
    return _Number(match.start(), match.end(), value / scale, scale, value, _WORDS)


def _between_words(match: re.Match, text: str) -> list[_Number]:
    """The two ends of "between five and ten", whose words stand together like one number's; [] for any other match."""
    halves = (match["words"] or "").lower().split(" and ")
    if len(halves) != 2 or not _BETWEEN.search(text, max(0, match.start() - 30), match.start()):
        return []
    ends = [_spoken(half) for half in halves]
    if None in ends:
        return []
    middle = match.start() + len(halves[0])
    places = [(match.start(), middle), (middle + len(" and "), match.end())]
    return [
        _Number(*place, value / scale, scale, value, _WORDS)
        for place, (value, scale) in zip(places, ends, strict=True)
    ]


def _list_markers(text: str) -> set[int]:
    """Where the digits of list markers stand: lines that open with "1.", then "2.", and so on."""
    positions, expected = set(), 1
    for match in _LIST_MARKER.finditer(text):
        if int(match[1]) in (1, expected):
            positions.add(match.start(1))
            expected = int(match[1]) + 1
    return positions


def _leading_zero(number: _Number) -> bool:
    return len(number.text) > 1 and number.text[0] == "0" and number.text.isdigit()


def _joined(low: _Number, high: _Number, text: str, between: bool) -> _Number | str | None:
    """The midpoint of a range; "skip" for a date-like pair; None if the pair is no range but more than one number."""
    if low.scale == 1 and high.scale != 1 and abs(low.raw) < abs(high.raw):
        low = replace(low, scale=high.scale, value=low.raw * high.scale)  # 1-2k
    if _leading_zero(low) or _leading_zero(high):
        return "skip"
    if low.value > high.value and not between:
        return None
    middle = low.value / 2 + high.value / 2
    return _Number(low.start, high.end, middle, 1.0, middle, min(low.kind, high.kind))


def _connection(low: _Number, high: _Number, text: str) -> str | None:
    """How two neighbouring numbers hang together: "dash", "to", "and", "slash", "sum", or None."""
    if high.start - low.end > 48:
        return None
    gap = text[low.end : high.start]
    if gap.strip() == "/":
        return "slash"
    if gap.strip() in ("+", "*", "\xd7", "x", "\xf7", "^") and gap.strip():
        return "sum"
    if "\n" in gap or "\r" in gap:
        return None
    gap = re.sub(r"[*_`]+", "", gap)
    match = _CONNECTOR.fullmatch(gap)
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


def _merge(numbers: list[_Number], text: str) -> list[_Number] | None:
    """Join ranges into their midpoints, drop dates and idioms; None if two numbers hang together in any other way."""
    merged: list[_Number] = []
    position = 0
    while position < len(numbers):
        chain, links = [numbers[position]], []
        while position + len(chain) < len(numbers):
            following = numbers[position + len(chain)]
            link = _connection(chain[-1], following, text)
            if link is None or (link in ("and", "touching") and links):
                break
            if link == "and" and not _BETWEEN.search(text, max(0, chain[0].start - 30), chain[0].start):
                link = "touching" if _WORDS in (chain[-1].kind, following.kind) else None
                if link is None:
                    break
            chain.append(following)
            links.append(link)
        position += len(chain)
        if not links:
            merged.append(chain[0])
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
            if links[0] == "dash" and high.signed and (not gap.strip() or not gap[-1].isspace()):
                high = replace(high, raw=abs(high.raw), value=abs(high.value))  # the dash of the range, not a sign
            if _ON_A_SCALE.search(text, max(0, low.start - 30), low.start):
                continue
            joined = _joined(low, high, text, links[0] == "and")
            if joined is None:
                return None
            if joined != "skip":
                merged.append(joined)
    return merged


def _counts_as_answer(number: _Number, text: str) -> bool:
    """Small number words are often pronouns ("one of the", "the two"): they need a unit, or to be the whole answer."""
    if number.kind != _WORDS or number.value > 12:
        return True
    if _UNIT_AFTER.match(text, number.end):
        return True
    alone_before = _BEFORE_BARE_WORD.fullmatch(text, 0, number.start) is not None
    return alone_before and _NO_WORD.fullmatch(text, number.end) is not None


def _spaces_as_separators(text: str) -> str:
    """Plain spaces between thousands become no-break spaces where a currency or the whole text leaves no doubt."""
    grouped = r"[0-9]{1,3}(?: [0-9]{3})+(?![0-9]|[.,][0-9]{3})(?:[.,][0-9]{1,2})?"
    if re.fullmatch(r"[\s*]*[0-9]{1,2}(?: [0-9]{3})+(?:[.,][0-9]{1,2})?[\s*.]*", text):
        return re.sub(r"(?<=[0-9]) (?=[0-9])", "\xa0", text)

    def bind(match: re.Match) -> str:
        return match[0].replace(" ", "\xa0") if match["before"] or match["after"] else match[0]

    return re.sub(
        rf"(?P<before>[$\u20ac] ?)?(?<![0-9.,]){grouped}"
        rf"(?P<after> ?(?:[$\u20ac](?! ?[0-9])|(?:{_UNIT_WORDS})(?![^\W_])))?",
        bind, text, flags=re.IGNORECASE,
    )  # fmt: skip


def _answer(text: str) -> tuple[_Number, str] | None:
    """The single number of the text with its place in the plain form of the text, which is returned beside it."""
    text = re.sub(r"[^\x00-\x7f]", _plain_character, text)
    text = _spaces_as_separators(text)
    markers = _list_markers(text)
    numbers: list[_Number] = []
    unreadable = {_PLAIN: False, _WORDS: False}
    for match in _EXPRESSION.finditer(text):
        if match["clock"]:
            continue
        spoken = match["words"] or match["article_words"]
        number = _words(match, text) if spoken else _digits(match, text, markers)
        if number is None and spoken and (ends := _between_words(match, text)):
            numbers += ends
        elif number is None:
            unreadable[_WORDS if spoken else _PLAIN] = True
        elif number != "skip":
            numbers.append(number)
    if unreadable[_PLAIN]:
        return None
    merged = _merge(numbers, text)
    if not merged:
        return None
    merged = [number for number in merged if _counts_as_answer(number, text)]
    if not merged:
        return None
    kind = min(number.kind for number in merged)
    if kind != _PLAIN and unreadable[_WORDS]:
        return None
    rivals = [number for number in merged if number.kind == kind]
    if not all(math.isclose(number.value, rivals[0].value, rel_tol=1e-9) for number in rivals):
        return None
    return rivals[-1], text


def parse_number(text: str) -> float | None:
    """The single number a text names, None if it names none or several. Never raises on a string; always finite.

    Read as numbers: currency signs and codes on either side; thousands as 1,200, 1'200, 1.234.567, the Indian 1,00,000
    and with no-break or thin spaces (plain spaces only beside a currency or as the whole text); 12% and 12 percent as
    12; k, m, mn, bn, thousand, million, ...; minus signs; digits of any script; 2½; cents as hundredths; English number
    words if no digits compete ("twenty five", "a hundred"). Ranges give their midpoint ("$100 to $150", "between 5 and
    10", "10-20%"), and a scale after the second end covers both ("1-2k" is 1500). A number said twice is one number.

    Decisions where writers differ:
      * 1,5 and 12,50 have a decimal comma, 1,200 has thousands; 1.200 is 1.2 except beside a euro; 1.234,56 and
        1.200,00 are European.
      * Words up to twelve are often pronouns or determiners ("one of the", "the two"), so they need a unit ("two
        hours") or to be the whole answer.
      * Passed over, as no quantities: digits attached to letters (A4, Covid-19, 3D), clock times and ratios (10:30,
        3:1), dates, versions, 24/7, markers of a list counted from 1, labels (Step 1), "on a scale of 1 to 10".
      * Descriptions such as "1600-rated" and ordinals such as "5th" count only if there is no other number.
      * None: fractions and scores (1/2, 8/10), sums, falling ranges (10-5), alternatives (5 or 6), lists (1,2,3),
        "several hundred", numbers too large for a double.
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
    if not finished:
        rest = _OPEN_END.fullmatch(plain, number.end)
        if number.end >= len(plain) or (rest and _unclosed(plain[number.end :], rest)):
            return None
    return number.value + 0.0


def _unclosed(rest: str, match: re.Match) -> bool:
    """Whether the rest of the text may begin a continuation of the number: separators, part of a scale or a range."""
    word = match[1].lower()
    if match[2]:
        return word == "and"
    if word:
        return any(candidate.startswith(word) for candidate in _MAY_FOLLOW)
    return bool(rest.strip(" \t\xa0*_`"))
