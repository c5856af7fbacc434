"""The numbers in a plain text: digits and number words with their signs, scales, currencies and units, one by one.

A number that is not understood makes its text unreadable. Which of several numbers is the answer is decided in
`excise.outcomes.answers`; the words are listed in number_words.yaml.
"""

import math
import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cache

from excise.outcomes.number_words import SPACELESS, Currency, Meaning, Words, number_words
from excise.outcomes.plain_text import BLANK, LETTER, ONE_LETTER, is_symbol

# A number expression competes only with its own kind: words count if there are no plain digits, and numbers that merely
# describe something ("a 1600-rated opponent", "the 5th") count if there is nothing else.
# What is no quantity ("3D", "10:30") counts never, but must not stand in for one end of a range: "5-7x" is not 5.
PLAIN, WORDS, DESCRIPTIVE, PASSED = 0, 1, 2, 3

_LONGEST_BODY = 400  # characters; anything longer overflows a double or is noise
_MIXED = {2, 4, 5, 8}  # denominators of mixed fractions such as 2 1/2

_SMALL = {
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
_LARGE = {"thousand": 1e3, "grand": 1e3, "lakh": 1e5, "million": 1e6, "crore": 1e7, "billion": 1e9, "trillion": 1e12}
_SPOKEN_SCALES = {"dozen": 12.0, "hundred": 1e2, **_LARGE}

_VULGAR = "\xbc-\xbe\u2150-\u215e"
_TOKEN = re.compile(
    rf"""
    (?P<number>(?:[0-9]+(?:[.,'\xa0][0-9]+)*|(?<![\w.,]{{1}})[.,][0-9]+)(?:e[-+]?[0-9]{{1,4}}(?![0-9]|{ONE_LETTER}))?)
    | (?P<word>(?:(?:[a-z]\.){{2,}}(?:[a-z](?!{ONE_LETTER}))?|{ONE_LETTER}+(?:['\u05f4]{ONE_LETTER}+)*))
    | (?P<run>{SPACELESS}+)
    | (?P<blank>{BLANK}+)
    | (?P<line>[\r\n]+)
    | (?P<other>.)
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_WORD = "|".join(sorted([*_SMALL, *_LARGE, "hundred", "dozen"], key=len, reverse=True))
_DIGIT_WORD = "zero|oh|one|two|three|four|five|six|seven|eight|nine"
_SPOKEN = re.compile(
    rf"""
    (?P<opening>half(?:{BLANK}an?)?|an?|(?:few|several|many|some|couple|couple{BLANK}of|of)(?:{BLANK}a)?)
      [ \t\xa0-](?P<article_words>(?:hundred|thousand|grand|million|billion|trillion|dozen|lakh|crore)\b
        (?:(?:{BLANK}and{BLANK}|-|{BLANK})(?:{_WORD})\b)*)
    | (?P<words>(?:{_WORD})\b(?:(?:{BLANK}and{BLANK}|(?<=sand|lion|lakh|rore),{BLANK}|-|{BLANK})(?:{_WORD})\b)*)
      (?P<half>{BLANK}and{BLANK}a{BLANK}half\b)?
      (?:{BLANK}point(?P<decimals>(?:[ \t\xa0-](?:{"|".join(sorted(_SMALL, key=len, reverse=True))}|oh)\b)+))?
    | point(?P<only_decimals>(?:[ \t\xa0-](?:{_DIGIT_WORD})\b)+)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SPOKEN_START = frozenset(
    {*_SMALL, *_LARGE, "hundred", "dozen", "half", "a", "an", "few", "several", "many", "some", "couple", "of", "point"}
)
_AND_BEFORE_HALF = re.compile(rf"\band{BLANK}+$", re.IGNORECASE)
_AND_A_HALF = re.compile(rf"{BLANK}and{BLANK}a{BLANK}half\b", re.IGNORECASE)
_MIXED_FRACTION = re.compile(rf"{BLANK}(?P<above>[0-9])/(?P<below>[0-9])(?![0-9/.,^]|{ONE_LETTER})")
_POWER = re.compile(rf"{BLANK}*[x\xd7*\xb7]{BLANK}*10{BLANK}?\^{BLANK}?(?P<exponent>[-+]?[0-9]{{1,3}})(?![0-9.,])")
_ONLY_POWER = re.compile(rf"{BLANK}?\^{BLANK}?(?P<exponent>[-+]?[0-9]{{1,3}})(?![0-9.,])")
_DASH_FOR_CENTS = re.compile(rf"[.,]{BLANK}?[-\u2013\u2014]{{1,2}}(?![0-9])|/-(?![0-9])")
_LIST_MARKER = re.compile(r"^[ \t*_#>-]*([0-9]{1,2})[.)](?=[ \t*_]+\S)", re.MULTILINE)
_ORDINAL = re.compile(rf"(?:st|nd|rd|th)(?!{ONE_LETTER})", re.IGNORECASE)
_OF_MONTH = re.compile(rf"{BLANK}(?:of{BLANK})?({ONE_LETTER}+)")
_YEAR = re.compile(r"(?:19|20)[0-9]{2}")
_CLOCK = re.compile(r"[0-9]+(?::[0-9]+)+")
_CLOCK_AFTER = re.compile(rf"{BLANK}?(?:[ap]\.?m\b|o'clock\b|uhr\b)", re.IGNORECASE)
_RANGE_OR_ISH = re.compile(r"-(?:to|ish)\b", re.IGNORECASE)
_IN_BEFORE = re.compile(r"\bin\s$", re.IGNORECASE)
NO_WORD = re.compile(r"[\W_]*")
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


@dataclass
class Behind:
    """What stands behind the digits or words of a number: where it ends (position, next token), and what it says.

    unclear: something there that is not understood; attached: letters glued to it that make it no quantity ("3D").
    """

    end: int
    token: int
    scales: list[str]
    currency: Currency | None = None
    unit: str = ""
    unit_word: str = ""
    cents: bool = False
    dashed: bool = False
    unclear: bool = False
    attached: bool = False
    ordinal: bool = False
    compound: bool = False
    counted: bool = False  # whether a unit or currency follows


def _grouped(integer: str, separator: str) -> bool:
    """Whether `integer` is grouped like 1,234,567 or, with commas, like the Indian 12,34,567."""
    first, *rest = integer.split(separator)
    if not (rest and 1 <= len(first) <= 3 and first[0] != "0" and len(rest[-1]) == 3):
        return False
    if all(len(group) == 3 for group in rest):
        return True
    return separator == "," and len(first) <= 2 and all(len(group) == 2 for group in rest[:-1])


def _canonical(body: str, points_group: bool) -> str | None:
    """The digits of a number in Python's notation, or None if its separators make no single number of it."""
    separators = [character for character in body if not "0" <= character <= "9"]
    if not separators or body[0] == ".":
        return body
    if body[0] == ",":
        return body.replace(",", ".")
    kinds = set(separators)
    if len(kinds) == 1:
        only, groups = separators[0], body.split(separators[0])
        if only == "." and len(groups) == 2 and not (points_group and _grouped(body, ".")):
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
            current = (current or 1) * _SPOKEN_SCALES[part]
            room = 100 if part == "hundred" else 0
        else:
            if _LARGE[part] >= ceiling:
                return None
            total += (current or 1) * _LARGE[part]
            ceiling, current, room = _LARGE[part], 0.0, 1000
    return total + current, _SPOKEN_SCALES.get(parts[-1], 1.0)


def _decimals(words: str) -> str | None:
    """The digits after "point": single digits one by one, or None ("two point fifty" is said of prices)."""
    digits = [_SMALL.get("zero" if part == "oh" else part, 10) for part in re.findall(r"[a-z]+", words.lower())]
    return "".join(map(str, digits)) if all(digit < 10 for digit in digits) else None


@cache
def word_patterns() -> dict[str, re.Pattern]:
    """Patterns made of the listed words: runs of ideographs, what connects two numbers, what stands before a range."""
    words = number_words()

    def any_of(*names: str) -> str:
        found = {word for name in names for word in words.lists[name]}
        return "|".join(re.escape(word) for word in sorted(found, key=len, reverse=True))

    numerals = "".join(words.ideographs)
    factors = "".join(words.ideograph_scales)
    hedge = rf"(?:(?:{any_of('hedge')})\.?{BLANK})?"
    return {
        "factors": re.compile(rf"{BLANK}?[{factors}]"),
        "ideographic": re.compile(
            rf"(?:[0-9][0-9.,]*|[{numerals}])?{BLANK}?[{factors}]+(?:{BLANK}?(?:[0-9]+|[{numerals}]){BLANK}?[{factors}]+)*"
            rf"(?:{BLANK}?(?:[0-9]{{1,4}}(?![0-9.,])|[{numerals}]))?"
        ),
        "numerals": re.compile(rf"[{numerals}{factors}]+"),
        "connector": re.compile(
            rf"{BLANK}{{0,3}}(?:(?:(?:per|an?){BLANK}|/{BLANK}?)[a-z]{{1,12}}{BLANK})?"
            rf"(?:(?P<dash>-{{1,2}}|\u2013|~)|(?P<tight>\u2014)|(?P<to>-?(?:{any_of('range')})\b-?|"
            rf"(?:{any_of('range_spaceless')}))|(?P<and>(?:{any_of('and')})\b|\u548c|\u3068)|){BLANK}{{0,3}}{hedge}",
            re.IGNORECASE,
        ),
        "between": re.compile(rf"\b(?:{any_of('between')}){BLANK}{{0,3}}{hedge}$|\u5728$", re.IGNORECASE),
        "minus_run": re.compile(rf"(?:{any_of('negative_spaceless')})$"),
        "ordinal_run": re.compile(rf"(?:{any_of('ordinal_spaceless')})$"),
        "part_run": re.compile(rf"{any_of('part_spaceless')}"),
        "harmless_run": re.compile(rf"{any_of('harmless_spaceless', 'range_spaceless')}"),
        "scale_run": re.compile("|".join(words.spaceless_scales)),
        "percent_of_hundred": re.compile(r"(?:\u767e\u5206\u4e4b|\u767e\u5206\u306e)$"),
    }


def _ideographic(text: str) -> float | None:
    """The value of digits mixed with Chinese, Japanese or Korean scales ("1\u4e075\u5343"), None if there is none."""
    words = number_words()
    total = section = 0.0
    pending: float | None = None
    small, large = math.inf, math.inf
    parts = re.findall(r"[0-9][0-9.,]*|[^0-9.,\s]", text)
    for position, part in enumerate(parts):
        if part[0].isdigit():
            digits = _canonical(part, False)
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


class Reader:
    """The numbers of one plain text, found in one scan from left to right over its tokens."""

    def __init__(self, text: str):
        self.text = text
        self.words: Words = number_words()
        self.kinds: list[str] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        for match in _TOKEN.finditer(text):
            self.kinds.append(match.lastgroup)
            self.starts.append(match.start())
            self.ends.append(match.end())
        self.numbers: list[Number] = []
        self.unreadable = False
        self.floor = 0  # the first token that no number has taken
        self._languages: frozenset[str] | None = None

    # --- tokens ---

    def _piece(self, token: int) -> str:
        return self.text[self.starts[token] : self.ends[token]] if 0 <= token < len(self.kinds) else ""

    def _kind(self, token: int) -> str:
        return self.kinds[token] if 0 <= token < len(self.kinds) else "end"

    def _word(self, token: int) -> str:
        """The word of a token, without the points of an abbreviation and without what a Turkish apostrophe adds."""
        piece = self._piece(token)
        return piece.replace(".", "") if "." in piece else piece

    def _after(self, token: int, position: int) -> int:
        """The first token from `token` on that begins at `position` or later."""
        while token < len(self.starts) and self.starts[token] < position:
            token += 1
        return token

    def languages(self) -> frozenset[str]:
        """The languages the words of the text belong to, those of most words."""
        if self._languages is None:
            votes: dict[str, int] = {}
            for token, kind in enumerate(self.kinds):
                if kind == "word" and len(word := self._word(token).casefold()) > 1:
                    for language in self.words.harmless.get(word, ()):
                        votes[language] = votes.get(language, 0) + 1
            most = max(votes.values(), default=0)
            self._languages = frozenset(language for language, count in votes.items() if count == most)
        return self._languages

    # --- what stands behind ---

    def _phrase(self, token: int, table) -> tuple[str, int] | None:
        """The longest entry of a table that begins with the word at `token`, and the token behind it."""
        word = self._word(token)
        reach = self.words.phrases.get(word.casefold(), 1)
        for count in range(reach, 0, -1):
            pieces, place = [word], token + 1
            while len(pieces) < count and self._kind(place) == "blank" and self._kind(place + 1) == "word":
                pieces.append(self._word(place + 1))
                place += 2
            if len(pieces) == count and (key := self.words.key(" ".join(pieces), table)):
                return key, place
        if "'" in word and (key := self.words.key(word.split("'")[0], table)):
            return key, token + 1  # TL'ye
        return None

    def _mark(self, token: int) -> tuple[Currency, int] | None:
        """The currency whose mark begins at `token`, and the token behind it."""
        kind = self._kind(token)
        if kind == "other":
            piece = self._piece(token)
            if piece in self.words.units:
                return None
            if unicodedata.category(piece) == "Sc":
                return self.words.currencies.get(piece) or Currency(piece, False, frozenset()), token + 1
            return None
        if kind == "run":
            return None
        if kind == "word":
            following = self._piece(token + 1)
            if following and self._kind(token + 1) == "other" and unicodedata.category(following) == "Sc":
                joined = self.words.key(self._word(token) + following, self.words.currencies)
                if joined:
                    return self.words.currencies[joined], token + 2
            found = self._phrase(token, self.words.currencies)
            if found:
                return self.words.currencies[found[0]], found[1]
        return None

    def _run_entry(self, position: int, run_end: int) -> tuple[str, str] | None:
        """The longest currency or unit that a run of a script without blanks begins with: ("currency" | "unit", it)."""
        for length in range(min(9, run_end - position), 0, -1):
            entry = self.text[position : position + length]
            if entry in self.words.currencies:
                return "currency", entry
            if entry in self.words.units:
                return "unit", entry
        return None

    def right_of(self, token: int, position: int, money: bool) -> Behind:
        """Scale, currency and unit behind `position`, where the token `token` begins, and whether all is understood."""
        right = Behind(position, token, [])
        text = self.text
        if match := _DASH_FOR_CENTS.match(text, position):
            right.dashed, right.end = True, match.end()
            right.token = self._after(token, right.end)
        for _ in range(8):
            token = right.token
            glued = True
            if self._kind(token) == "blank" and self.ends[token] - self.starts[token] <= 2:
                token, glued = token + 1, False
            elif self._piece(token) == "-" and self._kind(token + 1) == "word":
                if _RANGE_OR_ISH.match(text, right.end) and text[right.end + 1 : right.end + 3].lower() == "to":
                    break
                token, glued = token + 1, False
            elif self._piece(token) == "." and right.scales and not right.counted:
                ahead = token + 1 + (self._kind(token + 1) == "blank")
                if self._kind(ahead) != "number" and (
                    self._mark(ahead)
                    or (self._kind(ahead) == "word" and self._scale(ahead))
                    or self._piece(ahead) in ("-", "\u2013", "~")
                    or self.words.key(self._word(ahead), self.words.lists["range"])
                ):
                    right.token, right.end = ahead, self.starts[ahead]
                    continue
                break
            kind = self._kind(token)
            if kind == "run":
                if not self._spaceless(right, token):
                    break
                continue
            mark = self._mark(token)
            scale = self._scale(token) if kind == "word" else None
            if scale and not (
                mark and mark[0].scale == 1.0 and not self._means_scale(scale[0], money or right.currency)
            ):
                word = scale[0]
                hyphen = not glued and text[self.starts[token] - 1] == "-"
                if right.unit or len(right.scales) == 2 or (hyphen and len(word) < 3):
                    right.unclear = True
                    return right
                if word == "m" and not glued and not money and not right.currency and not self._mark_behind(scale[1]):
                    right.unit, right.counted = "length", True  # "5 m" is five metres
                else:
                    right.scales.append(word)
                right.token, right.end = scale[1], self.ends[scale[1] - 1]
                continue
            if mark and not self._is_prefix_of_number(mark[1], kind):
                if right.currency and right.currency.name != mark[0].name:
                    right.unclear = True
                right.currency, right.counted = mark[0], True
                right.token, right.end = mark[1], self.ends[mark[1] - 1]
                continue
            if kind == "other" and (unit := self.words.units.get(self._piece(token))):
                right.unit, right.counted = unit, True
                right.cents |= unit == "hundredth"
                right.token, right.end = token + 1, self.ends[token]
                continue
            single_capital = self._piece(token).isupper() and self.ends[token] - self.starts[token] == 1  # 5G
            if kind == "word" and not single_capital and (found := self._phrase(token, self.words.units)):
                if glued and text[self.ends[found[1] - 1] : self.ends[found[1] - 1] + 1].isdigit():
                    right.attached = True  # 10h30
                    return right
                hyphen = not glued and text[self.starts[token] - 1] == "-"
                unit = self.words.units[found[0]]
                right.compound |= hyphen and unit != "about"
                right.unit, right.unit_word = right.unit or unit, right.unit_word or found[0]
                right.counted |= unit != "about"
                right.cents |= unit == "hundredth"
                right.token, right.end = found[1], self.ends[found[1] - 1]
                continue
            break
        return right

    def _mark_behind(self, token: int) -> bool:
        """Whether a currency stands at `token`, a point and a blank apart at most."""
        token += self._piece(token) == "."
        token += self._kind(token) == "blank"
        mark = self._mark(token)
        return mark is not None and not self._is_prefix_of_number(mark[1], self._kind(token))

    def _is_prefix_of_number(self, token: int, kind: str) -> bool:
        """Whether the mark before `token` belongs to a number behind it: "5 $6"."""
        if kind == "other" or self._kind(token - 1) == "other":
            token += self._kind(token) == "blank"
            return self._kind(token) == "number"
        return False

    def _spaceless(self, right: Behind, token: int) -> bool:
        """Take a scale, currency or unit from the beginning of a run; False if there is none, or no more."""
        position = max(right.end, self.starts[token])
        run_end = self.ends[token]
        if position >= run_end:
            return False
        patterns = word_patterns()
        if match := patterns["scale_run"].match(self.text, position):
            right.scales.append(match[0])
            right.end = match.end()
        elif entry := self._run_entry(position, run_end):
            name, found = entry
            if name == "currency":
                right.currency = self.words.currencies[found]
            else:
                right.unit = self.words.units[found]
            right.counted = True
            right.end = position + len(found)
        else:
            return False
        if right.end >= run_end:
            right.token = token + 1
            return True
        right.token = token
        return True

    def _scale(self, token: int) -> tuple[str, int] | None:
        return self._phrase(token, self.words.scales)

    def _means_scale(self, word: str, currency) -> bool:
        return any(not meaning.beside_currency or currency for meaning in self.words.scales[word])

    def follows(self, right: Behind, kind: int, money: bool) -> None:
        """Say of what stands behind a number whether it is understood: sets unclear, attached, ordinal, compound."""
        text, end, token = self.text, right.end, right.token
        after = text[end : end + 1]
        if not after:
            return
        patterns = word_patterns()
        if self._kind(token) == "run":
            position = max(end, self.starts[token])
            if patterns["factors"].match(text, position) or not patterns["harmless_run"].match(text, position):
                right.unclear = True
            if patterns["part_run"].match(text, position):
                right.unclear = True
            return
        if self._kind(token) == "word" and self.starts[token] == end:
            if not (right.scales or right.counted) and (ordinal := _ORDINAL.match(text, end)):
                right.ordinal, right.end, right.token = True, ordinal.end(), token + 1
                month = _OF_MONTH.match(text, right.end)
                right.attached = bool(month and self.words.key(month[1], self.words.lists["months"]))
            elif money or right.scales:
                right.unclear = True
            else:
                right.attached = True  # 3D, 1080p, 90s
            return
        unread = text[end + (after in " \t\xa0") :][:1]
        if after in "^@_\u2033\xa7" or unicodedata.category(after) == "No" or is_symbol(unread):
            right.unclear = True
            return
        if unread and (unread in "\xd7\xb7\xf7\u221a" or unread in self.words.lists["unread"]):
            right.unclear = True
            return
        if after in "'\"" and (LETTER.match(text, end + 1) or (after == '"' and text[:end].count('"') % 2 == 0)):
            right.attached = True  # 1980's, 27"
            return
        if after == "." and not right.scales and not right.counted and LETTER.match(text, end + 1):
            right.unclear = True  # 5.k
            return
        if after == "-" and LETTER.match(text, end + 1) and not _RANGE_OR_ISH.match(text, end):
            right.compound = True
            return
        if _CLOCK_AFTER.match(text, end) and not money:
            right.attached = True
            return
        self._next_word(right, token, money)

    def _next_word(self, right: Behind, token: int, money: bool) -> None:
        words = self.words
        opened = False
        if self._piece(token) in (",", ":", ";") and self._piece(token):
            ahead = token + 1 + (self._kind(token + 1) == "blank")
            if (
                self._kind(ahead) == "word"
                and (scale := self._scale(ahead))
                and not self._is_article(self._word(ahead))
            ):
                right.unclear |= self._kind(scale[1]) != "number"  # 5, k
            return
        if self._kind(token) == "blank":
            token += 1
        if self._piece(token) in ("(", "[", "/", '"', "-", "\u2013") and self._piece(token):
            opened = True
            token += 1
            token += self._kind(token) == "blank"
        kind = self._kind(token)
        if kind == "run":
            patterns = word_patterns()
            position = self.starts[token]
            if patterns["factors"].match(self.text, position) or patterns["scale_run"].match(self.text, position):
                right.unclear = True
            elif not (patterns["harmless_run"].match(self.text, position) or right.counted or opened):
                right.unclear = self._run_entry(position, self.ends[token]) is None
            return
        if kind != "word":
            return
        word = self._word(token)
        gross = word.casefold() == "gross" and (money or right.currency)
        if self._phrase(token, words.lists["unread"]) and not (self._phrase(token, words.units) or gross):
            right.unclear = True
            return
        for place in (token, token + 2, token + 4):  # "2 et demi", "5 and a half"
            if self._kind(place) == "word" and self._turns(self._word(place)) and not right.unit:
                right.unclear = True
                return
            if self._kind(place + 1) != "blank":
                break
        scale = self._scale(token)
        if scale and (not self._is_article(word) or opened):
            right.unclear = right.unclear or not (opened and words.key(word, words.currencies))
            return
        if words.key(word, words.lists["months"]) and (
            word[0].isupper() or word.casefold() not in ("may", "mar", "mars")
        ):
            right.attached = True
            return
        if any(words.key(word, words.lists[name]) for name in ("multiple", "relative")):
            right.unclear = True
            return
        if self._kind(token + 1) == "number" or (len(word) == 1 and word not in "aAI" and self._mark(token + 2)):
            right.unclear = True  # 5 e3, 500 e Ft
            return
        if words.key(word, words.lists["negative"]) and not words.key(word, words.harmless):
            right.unclear = True
            return
        if opened or right.counted or self._is_known(token, word):
            return
        right.unclear = True

    def _turns(self, word: str) -> bool:
        """Whether a word near a number makes it a part of something, or a loss."""
        return any(self.words.key(word, self.words.lists[name]) is not None for name in ("part", "loss"))

    def _is_article(self, word: str) -> bool:
        return word.casefold() in ("a", "an")

    def _is_known(self, token: int, word: str) -> bool:
        """Whether a word may follow a number without changing it."""
        words = self.words
        folded = word.casefold()
        return (
            folded in words.harmless
            or (folded in _SPOKEN_START and folded != "point")
            or any(folded in words.lists[name] for name in ("range", "and", "hedge", "between", "negative", "labels"))
            or self._mark(token) is not None
            or (self._phrase(token, words.units) is not None and not (word.isupper() and len(word) == 1))
        )

    # --- what stands before ---

    def left_of(self, token: int) -> tuple[int, str, str, Currency | None]:
        """Start, outer sign, inner sign and currency before the number at `token`."""
        place, sign, inner, currency = token - 1, "", "", None
        start = self.starts[token]
        if place >= self.floor and self._piece(place) in ("-", "+", "\u2013"):
            sign, start, place = self._piece(place), self.starts[place], place - 1
        if found := self._mark_before(place):
            currency, first = found
            inner, sign = sign, ""
            start, place = self.starts[first], first - 1
            if place >= self.floor and self._piece(place) in ("-", "+", "\u2013"):
                sign, start = self._piece(place), self.starts[place]
        return start, sign, inner, currency

    def _mark_before(self, token: int) -> tuple[Currency, int] | None:
        """The currency whose mark ends before or at `token`, a blank and a point apart at most, and its first token."""
        place = token
        if place >= self.floor and self._kind(place) == "blank" and self.ends[place] - self.starts[place] <= 2:
            place -= 1
        if place >= self.floor and self._piece(place) == "~" and self._kind(place - 1) == "other":
            place -= 1
        dotted = False
        if place > self.floor and self._piece(place) == "." and self._kind(place - 1) == "word":
            place, dotted = place - 1, True
        if place < self.floor:
            return None
        kind, piece = self._kind(place), self._piece(place)
        if kind == "run":
            for length in range(min(4, len(piece)), 0, -1):
                if piece[-length:] in self.words.currencies:
                    return self.words.currencies[piece[-length:]], place
            return None
        if kind == "other" and unicodedata.category(piece) == "Sc":
            if place > self.floor and self._kind(place - 1) == "word":
                before = self._word(place - 1)
                joined = self.words.key(before + piece, self.words.currencies)
                if joined:
                    return self.words.currencies[joined], place - 1
                if self.words.key(before, self.words.currencies):
                    return self.words.currencies[self.words.key(before, self.words.currencies)], place - 1
                if len(before) <= 3 and piece == "$" and not self.words.key(before, self.words.scales):
                    return self.words.currencies["$"], place - 1
            return self.words.currencies.get(piece) or Currency(piece, False, frozenset()), place
        if kind == "word":
            word = self._word(place)
            if dotted and len(word) > 3:
                return None
            key = self.words.key(word, self.words.currencies)
            if key:
                return self.words.currencies[key], place
        return None

    def _mark_start(self, token: int) -> int:
        """Where the currency mark before a token begins."""
        found = self._mark_before(token - 1)
        return self.starts[found[1]] if found else self.starts[token]

    def before(self, start: int, token: int, money: bool) -> str:
        """What stands before a number that begins at `start`: "", "minus", "skip" or "unreadable"."""
        place = token
        while place > 0 and self.starts[place] >= start:
            place -= 1
        if place < self.floor or self.starts[place] >= start:
            return ""
        words, text = self.words, self.text
        glued = True
        piece = self._piece(place)
        if piece == "." and not text[: self.starts[place]].endswith(".") and self._kind(place - 1) == "word":
            return "unreadable"  # approx.50
        if piece == "\xa7" or (piece == "_" and self._kind(place - 1) in ("word", "number")):
            return "skip"
        if piece == "^":
            return "unreadable"
        if piece in ("\xb1", "\u2213", "/", "\u221a") and piece:
            return "" if piece == "/" else "unreadable"
        while place >= self.floor and (
            self._kind(place) == "blank" or self._piece(place) in (".", ":", "#", "(", ")", "~", "\u2248", "=")
        ):
            glued = False
            place -= 1
        if not glued and place >= self.floor and self._mark_before(place):  # Mio. \u20ac: 5
            scaled = self._mark_before(place)[1] - 1
            while scaled > self.floor and (self._kind(scaled) == "blank" or self._piece(scaled) == "."):
                scaled -= 1
            if (
                scaled >= self.floor
                and self._kind(scaled) == "word"
                and self.words.key(self._word(scaled), words.scales)
            ):
                return "unreadable"
        if place < self.floor:
            return ""
        kind = self._kind(place)
        if self._piece(place) in ("\xb1", "\u2213", "\u221a"):
            return "unreadable"
        if kind == "run":
            patterns, run = word_patterns(), self._piece(place)
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
        word = self._word(place)
        between = text[self.ends[place] : start]
        if (
            money
            and between == " "
            and word.casefold() in ("a", "an", "one")
            and text[start : self.starts[token]].strip().isalpha()
        ):
            return "unreadable"  # a dollar fifty
        hyphenated_range = (
            text[start] == "-" and self._piece(place - 1) == "-" and words.key(word, words.lists["range"])
        )
        if glued and not money and not between and not hyphenated_range:
            return "unreadable" if word.casefold() == "x" else "skip"  # A4, Covid19
        for nearby in (place, place - 2, place - 4):
            if self._kind(nearby) == "word" and nearby >= self.floor and self._turns(self._word(nearby)):
                return "unreadable"
            if self._kind(nearby - 1) != "blank":
                break
        adjacent = "(" not in between and "." not in between
        if words.key(word, words.lists["negative"]) and adjacent and ":" not in between and "~" not in between:
            if place >= 2 and words.key(self._word(place - 2), words.lists["negative_after"]):
                return ""
            return "minus"
        if words.key(word, words.lists["year_after"]) and between == " " and _YEAR.fullmatch(self._piece(token)):
            return "year"
        if words.key(word, words.lists["labels"]) and ":" not in between and "=" not in between:
            return "skip"
        if words.key(word, words.lists["months"]) and word[0].isupper():
            return "skip"
        if words.key(word, words.lists["multiple"]):
            return "unreadable"
        if between.strip(" \t\xa0") == "" and any(each.isupper() for each in word) and not self._is_known(place, word):
            return "name" if not words.key(word, words.scales) else "unreadable"
        scale = words.key(word, words.scales)
        if scale:
            return "unreadable"
        return ""

    # --- the scan ---

    def read(self) -> None:
        """Find all numbers; `unreadable` tells of one that is not understood."""
        markers = _list_markers(self.text)
        token = 0
        while token < len(self.kinds) and not self.unreadable:
            kind, start = self.kinds[token], self.starts[token]
            if kind == "number":
                clock = _CLOCK.match(self.text, start)
                if clock:
                    self._pass(start, clock.end())
                    token = self._after(token, clock.end())
                    continue
                if start in markers:
                    token += 1
                    continue
                token = self._digits(token)
            elif kind == "other" and re.match(f"[{_VULGAR}]", self.text[start]):
                token = self._digits(token)
            elif (
                kind == "word"
                and self._word(token).casefold() in _SPOKEN_START
                and (match := _SPOKEN.match(self.text, start))
            ):
                token = self._words(match, token)
            elif kind == "run":
                token = self._run(token)
            elif kind == "word" and (scale := self.words.key(self._word(token), self.words.scales)):
                # A scale that no number has taken: "(in thousands)", "hundreds of dollars".
                if scale not in self.words.prose or self._word(token - 2).casefold() == "in":
                    self.unreadable = True
                token += 1
            else:
                token += 1

    def _digits(self, token: int) -> int:
        """Read the number whose digits stand at `token`; the token behind it."""
        text = self.text
        start, sign, inner, money = self.left_of(token)
        body = self._piece(token) if self.kinds[token] == "number" else ""
        touching = start > 0 and token > 0 and self.floor > 0 and start == self.ends[self.floor - 1]
        state = self.before(start, token, money is not None)
        money = money or self._shared(start)
        position, place = self.ends[token], token + 1
        exponent, fraction = "", 0.0
        if body and (found := re.search("e[-+]?[0-9]+$", body, re.IGNORECASE)):
            exponent, body = found[0], body[: found.start()]
        if not body:
            fraction = unicodedata.numeric(text[self.starts[token]])
        elif match := re.compile(rf"{BLANK}?([{_VULGAR}])").match(text, position):
            fraction, position = unicodedata.numeric(match[1]), match.end()
        elif (
            (match := _MIXED_FRACTION.match(text, position))
            and body.isdigit()
            and (int(match["below"]) in _MIXED and 0 < int(match["above"]) < int(match["below"]))
        ):
            fraction, position = int(match["above"]) / int(match["below"]), match.end()
        if match := _AND_A_HALF.match(text, position):
            fraction, position = fraction + 0.5, match.end()
        power = _ONLY_POWER.match(text, position) if body == "10" else None
        power = power or _POWER.match(text, position)
        if fraction and re.search("[.,]", body):
            self.unreadable = True  # 2.5 and a half
            return token + 1
        if power and not (fraction or exponent):
            exponent = f"e{int(power['exponent']) + (body == '10' and power.re is _ONLY_POWER) * -1}"
            position = power.end()
        place = self._after(token + 1, position)
        if body and not exponent and not power and word_patterns()["factors"].match(text, position):
            return self._with_ideographs(token, start, sign, inner, money, state)
        right = self.right_of(place, position, money is not None)
        self.follows(right, PLAIN, money is not None)
        self.floor = max(right.token, token + 1)
        if re.fullmatch("0{3,}", body):
            self.unreadable = True  # in '000
            return self.floor
        if state == "skip" and not money:
            self._pass(start, right.end)
            return self.floor
        if touching and not (sign or money):
            self.unreadable = True  # 0b11
            return self.floor
        if state in ("year", "name"):  # in 2024, Route 66
            if not (right.scales or right.counted or money):
                self._pass(start, right.end)
                return self.floor
            state = ""
        if right.attached:
            self.unreadable |= money is not None
            self._pass(start, right.end)
            return self.floor
        if state == "unreadable" or right.unclear:
            self.unreadable = True
            return self.floor
        currency = money or right.currency
        if money and right.currency and money.name != right.currency.name:
            if money is not self.words.currencies["$"]:
                self.unreadable = True
                return self.floor
            currency = right.currency  # $500.000 COP
        value = self._value(body, exponent, fraction, currency, right)
        if value is None:
            # 1.2.3 and 05.01.2024 are versions and dates, 5'10 a height: no quantities, but no rivals of one either
            harmless = (
                set(body) & set(".'") and "," not in body and not currency and not right.scales and not right.unit
            )
            self.unreadable |= not (harmless and len(re.findall(r"[.']", body)) in (1, 2) and body.count(".") != 1)
            return self.floor
        raw, scale, scaled = value
        kind = DESCRIPTIVE if right.ordinal or right.compound else PLAIN
        self._keep(start, right, raw, scale, scaled, kind, sign, inner, body, currency, state, touching)
        return self.floor

    def _shared(self, start: int) -> Currency | None:
        """The currency of the number before, where this one is the second end of its range: "$2-3m"."""
        if not self.numbers or self.numbers[-1].currency is None:
            return None
        last = self.numbers[-1]
        match = word_patterns()["connector"].fullmatch(self.text, last.end, start) if start - last.end <= 12 else None
        ranged = (match and (match["dash"] or match["to"])) or self.text[start : start + 1] in ("-", "\u2013")
        return last.currency if ranged and (match or not self.text[last.end : start].strip()) else None

    def _pass(self, start: int, end: int) -> None:
        """Note something that is no quantity."""
        self.numbers.append(Number(start, end, math.nan, 1.0, math.nan, PASSED))

    def _keep(self, start, right, raw, scale, scaled, kind, sign, inner, body, currency, state, touching) -> None:
        """Add a number with its sign."""
        text = self.text
        minus = sign in ("-", "\u2013") or inner in ("-", "\u2013")
        before = text[start - 1] if start else ""
        if sign and not touching and (before == "-" or (before and (LETTER.match(before) or before == ")"))):
            minus = inner in ("-", "\u2013")  # a dash between words, not a sign
        elif sign and before == "+":
            self.unreadable = True
        elif sign == "\u2013" and before and not touching and not before.isdigit():
            earlier = self.numbers[-1].end if self.numbers else -1
            if text[earlier:start].strip(" \t\xa0") if earlier >= 0 else True:
                self.unreadable |= _COMMON_SIGN.search(text, max(0, start - 16), start) is None
        if state == "minus" and minus:
            self.unreadable = True
        if not (math.isfinite(scaled) and math.isfinite(raw)):
            self.unreadable = True
            return
        unit = currency.name if currency else ("" if right.unit == "about" else right.unit)
        factor = -1.0 if minus or state == "minus" else 1.0
        self.numbers.append(
            Number(
                start,
                right.end,
                factor * raw,
                scale,
                factor * scaled,
                kind,
                sign,
                body,
                unit,
                currency,
                not currency and body.count(".") == 1 and "," not in body and _grouped(body, "."),
            )
        )

    def _with_ideographs(self, token, start, sign, inner, money, state) -> int:
        """Read digits with Chinese, Japanese or Korean scales among them."""
        first = self.starts[token]
        match = word_patterns()["ideographic"].match(self.text, first)
        value = _ideographic(match[0]) if match else None
        if value is None:
            self.unreadable = True
            return len(self.kinds)
        end = match.end()
        place = self._after(token, end)
        if place > 0 and self.ends[place - 1] > end:
            place -= 1
        right = self.right_of(place, end, money is not None)
        self.follows(right, PLAIN, money is not None)
        self.unreadable |= right.unclear or right.attached or state in ("unreadable", "skip") or bool(right.scales)
        self.floor = max(right.token, token + 1)
        raw, scale = value, 1.0
        if whole := re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?){BLANK}?[^0-9]+", match[0]):
            raw = float(whole[1])
            scale = value / raw if raw else 1.0
        self._keep(start, right, raw, scale, value, PLAIN, sign, inner, "", money or right.currency, state, False)
        return self._behind(right)

    def _behind(self, right: Behind) -> int:
        """The token to go on with behind a number that may end within a run."""
        if right.token < len(self.kinds) and self.starts[right.token] < right.end:
            rest = self.text[right.end : self.ends[right.token]]
            if word_patterns()["numerals"].search(rest):
                self.unreadable = True
            return right.token + 1
        return right.token

    def _run(self, token: int) -> int:
        """Read Chinese, Japanese or Korean numerals from a run, if it holds one number and what follows is known."""
        patterns = word_patterns()
        start, end = self.starts[token], self.ends[token]
        run = self.text[start:end]
        inside = max(0, (self.numbers[-1].end if self.numbers else 0) - start)
        found = [
            match
            for match in patterns["numerals"].finditer(run, inside)
            if not patterns["percent_of_hundred"].fullmatch(run[match.start() : match.end() + 2])
        ]
        if patterns["scale_run"].search(run, inside):
            self.unreadable = True
        for match in found:
            self._numerals(token, start + match.start(), match[0])
        return token + 1

    def _numerals(self, token: int, start: int, numerals: str) -> None:
        words, patterns = self.words, word_patterns()
        scaled = any(each in words.ideograph_scales for each in numerals)
        value = _ideographic(numerals) if patterns["ideographic"].fullmatch(numerals) or len(numerals) == 1 else None
        end = start + len(numerals)
        right = Behind(end, token if end < self.ends[token] else token + 1, [])
        behind = self.right_of(right.token, end, False)
        before = self.text[self.starts[token] : start]
        alone = NO_WORD.fullmatch(self.text, 0, start) and NO_WORD.fullmatch(self.text, behind.end)
        if not (scaled or behind.currency or behind.unit == "percent" or alone):
            return  # a numeral within a word
        hangul = any("\uac00" <= each <= "\ud7af" for each in numerals)
        if hangul and not (behind.currency or behind.unit == "percent" or alone):
            if any(words.ideograph_scales.get(each, 0) >= 10_000 for each in numerals) and re.search(
                "[0-9]", self.text
            ):
                self.unreadable = True
            return  # syllables that are numerals, too
        self.follows(behind, WORDS, False)
        if before[-1:] in words.lists["indefinite_spaceless"]:
            self.unreadable = True
            return
        if (
            value is None
            or behind.unclear
            or patterns["part_run"].search(before[-2:])
            or patterns["ordinal_run"].search(before)
        ):
            self.unreadable = True
            return
        factor = -1.0 if patterns["minus_run"].search(before) else 1.0
        unit = behind.currency.name if behind.currency else behind.unit
        self.numbers.append(
            Number(start, behind.end, factor * value, 1.0, factor * value, WORDS, unit=unit or "numeral")
        )
        self.floor = max(behind.token, token + 1)

    def _value(self, body, exponent, fraction, currency, right) -> tuple[float, float, float] | None:
        """Digits before and after their scale, and the scale; None where they are not understood."""
        scale, scale_languages = 1.0, None
        if right.scales:
            resolved = self._scaled(right.scales, currency, body, right)
            if resolved is None:
                self.unreadable = True
                return None
            scale, scale_languages = resolved
        if currency:
            scale *= currency.scale
        digits = ""
        if body:
            if len(body) > _LONGEST_BODY:
                self.unreadable = True
                return None
            groups = self._points_group(body, currency, right, scale_languages)
            if groups is None:
                self.unreadable = True
                return None
            digits = _canonical(body, groups)
            if digits is None:
                return None
        raw = (float(digits + exponent) if digits else 0.0) + fraction
        if right.cents:
            scale /= 100
        scaled = raw * scale
        # 1.005k is 1005 and not 1004.9999999999999: let the decimal exponent carry the scale
        if scale != 1 and digits and not (fraction or exponent):
            power = round(math.log10(scale))
            if math.isclose(scale, 10.0**power):
                scaled = float(f"{digits}e{power}")
        return raw, scale, scaled

    def _points_group(self, body, currency, right, scale_languages) -> bool | None:
        """Whether the point of 1.200 separates thousands; None where it, or the comma of 1,200, may be either."""
        if right.dashed:
            return True
        if body[0] == ",":
            return False if currency and len(body) <= 3 else None
        foreign = bool(self.languages()) and "en" not in self.languages()
        foreign |= right.unit_word != "" and right.unit_word.casefold() not in self.words.lists["english_units"]
        if _grouped(body, ".") and body.count(".") == 1 and "," not in body:
            if currency and currency.point_groups:
                return None if right.scales else True
            if right.scales:
                return False if scale_languages is None or "en" in scale_languages else None
            if currency:
                return None
            return None if foreign else False
        if _grouped(body, ",") and body.count(",") == 1 and "." not in body and body[0] != "0":
            if right.scales and scale_languages is not None and "en" not in scale_languages:
                return None
            if right.scales and currency and currency.point_groups and right.scales != ["k"]:
                return None if "en" not in self.languages() and right.scales[0] not in ("million", "billion") else False
            if not currency and (foreign or right.unit == "percent"):
                return None
        return bool(currency and currency.point_groups)

    def _scaled(self, scales, currency, body, right) -> tuple[float, frozenset[str]] | None:
        """The product of scale words, and the languages all of them belong to; None where one is ambiguous."""
        product, last, languages = 1.0, 0.0, None
        for word in scales:
            found = self._factor(word, currency, body, right, len(scales) > 1)
            if found is None:
                return None
            factor, spoken = found
            if last and factor <= last and not (last == 1e5 and factor == 1e7):
                return None
            product, last = product * factor, factor
            languages = spoken if languages is None else languages & spoken
        return product, languages

    def _factor(self, word, currency, body, right, several) -> tuple[float, frozenset[str]] | None:
        """The factor of one scale word by its language, and the languages in which it is known."""
        words = self.words
        if word in words.spaceless_scales:
            return words.spaceless_scales[word], frozenset({"th"})
        meanings: list[Meaning] = [m for m in words.scales[word] if not m.beside_currency or currency]
        if not meanings:
            return None
        spoken = frozenset().union(*(meaning.languages for meaning in meanings))
        if len({meaning.factor for meaning in meanings}) == 1:
            return meanings[0].factor, spoken
        if several and word == "mil":
            return 1e3, frozenset({"es"})  # mil millones

        def of(languages) -> set[float]:
            return {meaning.factor for meaning in meanings if meaning.languages & languages}

        said = of(self.languages())
        tongues = currency.languages if currency else frozenset()
        if len(self.languages()) and said:
            if len(said) > 1:
                return None
            factor = said.pop()
            other = of(tongues)
            default = next((meaning.factor for meaning in meanings if meaning.default), None)
            return (factor, spoken) if factor != default or not other or other == {factor} or "en" in tongues else None
        default = next((meaning.factor for meaning in meanings if meaning.default), None)
        marked = of(tongues)
        if default is not None:
            trailing = (
                right.currency is not None and "en" not in tongues and right.currency.name not in ("pound", "dollar")
            )
            return (
                None if ((marked - {default}) and "en" not in tongues) or (trailing and tongues) else (default, spoken)
            )
        if not tongues and currency and currency.name == "dollar" and re.fullmatch(r"[0-9]+\.[0-9]{1,2}", body):
            marked = of(frozenset({"en"}))  # a decimal point beside a dollar sign
        if (
            not marked
            and currency
            and currency.name == "dollar"
            and word in ("mil", "bil")
            and "en" in self.languages()
        ):
            marked = of(frozenset({"en"}))
        return (marked.pop(), spoken) if len(marked) == 1 else None

    def _words(self, match: re.Match, token: int) -> int:
        """Read the English number words of a match; the token behind them."""
        text = self.text
        opening = (match["opening"] or "").lower()
        start, end = match.start(), match.end()
        place = self._after(token, end)
        ends = self._between_words(match)
        spoken_words = match["words"] or match["article_words"]
        spoken = _spoken(spoken_words) if spoken_words else (0.0, 1.0)
        floor = self.floor
        self.floor = place
        if ends:
            right = self.right_of(place, end, False)
            scaled = self._value("", "", 1.0, right.currency, right) if not right.unclear else None
            if scaled is None:
                self.unreadable = True
                return place
            unit = right.currency.name if right.currency else right.unit
            ends = [replace(each, value=each.value * scaled[1], unit=unit) for each in ends]
            self.numbers += [ends[0], replace(ends[1], end=right.end)]
            self.floor = right.token
            return right.token
        if (opening and not re.fullmatch(r"half|half\san?|an?", opening)) or (
            _AND_BEFORE_HALF.search(text, max(0, start - 8), start) and (opening.startswith("half"))
        ):
            self.unreadable = True
            return place  # several hundred, a quarter of a million
        bare_scale = match["words"] and match["words"].lower().split()[0].split("-")[0] not in _SMALL
        if spoken is None or bare_scale:
            self.unreadable = True  # umpteen thousand
            return place
        value, trailing = spoken
        if opening.startswith("half"):
            value /= 2
        if match["words"] and match["half"]:
            if trailing > 12:
                self.unreadable = True  # two million and a half
                return place
            value += 0.5
        if written := match["decimals"] or match["only_decimals"]:
            digits = _decimals(written)
            if digits is None or trailing != 1 or match["half"]:
                self.unreadable = True
                return place
            value = float(f"{int(value)}.{digits}")
        self.floor = floor
        _, sign, _, money = self.left_of(token)
        state = self.before(self.starts[token] if money is None else self._mark_start(token), token, money is not None)
        right = self.right_of(place, end, money is not None)
        self.floor = right.token
        if opening.startswith("a") and _IN_BEFORE.search(text, max(0, start - 4), start):
            self.unreadable = True
            return right.token  # one in a million
        self.follows(right, WORDS, False)
        bare = value <= 12 and not right.scales and not written
        if right.ordinal or (right.compound and not right.counted) or state == "skip" or right.attached:
            self._pass(start, right.end)
            return right.token  # three-bedroom
        if state == "unreadable" or right.unclear or sign:
            self.unreadable |= not bare or right.counted or bool(right.scales) or money is not None
            self._pass(start, right.end)
            return right.token
        factor = self._value("", "", 1.0, money or right.currency, right)
        if factor is None:
            self.unreadable = True
            return right.token
        negative = -1.0 if state == "minus" else 1.0
        unit = (money or right.currency).name if money or right.currency else right.unit
        scaled = value * factor[1]
        scale = trailing * factor[1]
        self.numbers.append(
            Number(start, right.end, negative * scaled / scale, scale, negative * scaled, WORDS, unit=unit)
        )
        return right.token

    def _between_words(self, match: re.Match) -> list[Number]:
        """The two ends of "between five and ten", whose words stand together like one number's; [] for any other."""
        halves = (match["words"] or "").lower().split(" and ")
        if len(halves) != 2 or match["half"] or match["decimals"]:
            return []
        if not word_patterns()["between"].search(self.text, max(0, match.start() - 30), match.start()):
            return []
        ends = [_spoken(half) for half in halves]
        if None in ends:
            return []
        middle = match.start() + len(halves[0])
        places = [(match.start(), middle), (middle + len(" and "), match.end())]
        return [
            Number(*place, value / scale, scale, value, WORDS)
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
