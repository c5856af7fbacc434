"""What stands behind the digits or words of a number: scale, currency, unit, and whether all of it is understood.

What stands before is in `excise.outcomes.number_before`; what a scale amounts to is in `number_scales`.
"""

import re
import unicodedata
from dataclasses import dataclass

from excise.outcomes.characters import BLANK, LETTER, ONE_LETTER, is_symbol
from excise.outcomes.number_tokens import Tokens
from excise.outcomes.number_values import SPOKEN_START
from excise.outcomes.number_words import Currency, number_words, word_patterns

_DASH_FOR_CENTS = re.compile(rf"[.,]{BLANK}?[-\u2013\u2014]{{1,2}}(?![0-9])|/-(?![0-9])")
_ORDINAL = re.compile(rf"(?:st|nd|rd|th)(?!{ONE_LETTER})", re.IGNORECASE)
_OF_MONTH = re.compile(rf"{BLANK}(?:of{BLANK})?({ONE_LETTER}+)")
_CLOCK_AFTER = re.compile(rf"{BLANK}?(?:[ap]\.?m\b|o'clock\b|uhr\b)", re.IGNORECASE)
_RANGE_OR_ISH = re.compile(r"-(?:to|ish)\b", re.IGNORECASE)


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


def read_behind(tokens: Tokens, token: int, position: int, money: bool) -> Behind:
    """Scale, currency and unit behind `position`, where the token `token` begins; `weigh_behind` says the rest.

    money: whether a currency stands before the number.
    """
    words = number_words()
    behind = Behind(position, token, [])
    text = tokens.text
    if match := _DASH_FOR_CENTS.match(text, position):
        behind.dashed, behind.end = True, match.end()
        behind.token = tokens.after(token, behind.end)
    for _ in range(8):
        token = behind.token
        glued = True
        if tokens.kind(token) == "blank" and tokens.ends[token] - tokens.starts[token] <= 2:
            token, glued = token + 1, False
        elif tokens.piece(token) == "-" and tokens.kind(token + 1) == "word":
            if _RANGE_OR_ISH.match(text, behind.end) and text[behind.end + 1 : behind.end + 3].lower() == "to":
                break
            token, glued = token + 1, False
        elif tokens.piece(token) == "." and behind.scales and not behind.counted:
            ahead = token + 1 + (tokens.kind(token + 1) == "blank")
            if tokens.kind(ahead) != "number" and (
                tokens.currency(ahead)
                or (tokens.kind(ahead) == "word" and tokens.scale(ahead))
                or tokens.piece(ahead) in ("-", "\u2013", "~")
                or words.key(tokens.word(ahead), words.lists["range"])
            ):
                behind.token, behind.end = ahead, tokens.starts[ahead]
                continue
            break
        kind = tokens.kind(token)
        if kind == "run":
            if not _take_spaceless(tokens, behind, token):
                break
            continue
        mark = tokens.currency(token)
        scale = tokens.scale(token) if kind == "word" else None
        if scale and not (
            mark and mark[0].scale == 1.0 and not _means_scale(scale[0], money or behind.currency is not None)
        ):
            word = scale[0]
            hyphen = not glued and text[tokens.starts[token] - 1] == "-"
            if behind.unit or len(behind.scales) == 2 or (hyphen and len(word) < 3):
                behind.unclear = True
                return behind
            priced = money or behind.currency or _currency_behind(tokens, scale[1])
            if word == "m" and not glued and not priced:
                behind.unit, behind.counted = "length", True  # "5 m" is five metres
            else:
                behind.scales.append(word)
            behind.token, behind.end = scale[1], tokens.ends[scale[1] - 1]
            continue
        if mark and not _is_prefix_of_number(tokens, mark[1], kind):
            if behind.currency and behind.currency.name != mark[0].name:
                behind.unclear = True
            behind.currency, behind.counted = mark[0], True
            behind.token, behind.end = mark[1], tokens.ends[mark[1] - 1]
            continue
        if kind == "other" and (unit := words.units.get(tokens.piece(token))):
            behind.unit, behind.counted = unit, True
            behind.cents |= unit == "hundredth"
            behind.token, behind.end = token + 1, tokens.ends[token]
            continue
        single_capital = tokens.piece(token).isupper() and tokens.ends[token] - tokens.starts[token] == 1  # 5G
        if kind == "word" and not single_capital and (phrase := tokens.phrase(token, words.units)):
            if glued and text[tokens.ends[phrase[1] - 1] : tokens.ends[phrase[1] - 1] + 1].isdigit():
                behind.attached = True  # 10h30
                return behind
            hyphen = not glued and text[tokens.starts[token] - 1] == "-"
            unit = words.units[phrase[0]]
            behind.compound |= hyphen and unit != "about"
            behind.unit, behind.unit_word = behind.unit or unit, behind.unit_word or phrase[0]
            behind.counted |= unit != "about"
            behind.cents |= unit == "hundredth"
            behind.token, behind.end = phrase[1], tokens.ends[phrase[1] - 1]
            continue
        break
    return behind


def _currency_behind(tokens: Tokens, token: int) -> bool:
    """Whether a currency stands at `token`, a point and a blank apart at most."""
    token += tokens.piece(token) == "."
    token += tokens.kind(token) == "blank"
    mark = tokens.currency(token)
    return mark is not None and not _is_prefix_of_number(tokens, mark[1], tokens.kind(token))


def _is_prefix_of_number(tokens: Tokens, token: int, kind: str) -> bool:
    """Whether the mark before `token` belongs to a number behind it: "5 $6"."""
    if kind == "other" or tokens.kind(token - 1) == "other":
        token += tokens.kind(token) == "blank"
        return tokens.kind(token) == "number"
    return False


def _take_spaceless(tokens: Tokens, behind: Behind, token: int) -> bool:
    """Take a scale, currency or unit from the beginning of a run; False if there is none, or no more."""
    position = max(behind.end, tokens.starts[token])
    run_end = tokens.ends[token]
    if position >= run_end:
        return False
    patterns = word_patterns()
    if match := patterns["scale_run"].match(tokens.text, position):
        behind.scales.append(match[0])
        behind.end = match.end()
    elif entry := tokens.run_entry(position, run_end):
        table, listed = entry
        if table == "currency":
            behind.currency = number_words().currencies[listed]
        else:
            behind.unit = number_words().units[listed]
        behind.counted = True
        behind.end = position + len(listed)
    else:
        return False
    if behind.end >= run_end:
        behind.token = token + 1
        return True
    behind.token = token
    return True


def _means_scale(word: str, money: bool) -> bool:
    """Whether a word is a scale, as some are only beside a currency."""
    return any(not meaning.beside_currency or money for meaning in number_words().scales[word])


def weigh_behind(tokens: Tokens, behind: Behind, money: bool) -> None:
    """Say of what stands behind a number whether it is understood: sets unclear, attached, ordinal, compound."""
    words = number_words()
    text, end, token = tokens.text, behind.end, behind.token
    after = text[end : end + 1]
    if not after:
        return
    patterns = word_patterns()
    if tokens.kind(token) == "run":
        position = max(end, tokens.starts[token])
        if patterns["factors"].match(text, position) or not patterns["harmless_run"].match(text, position):
            behind.unclear = True
        if patterns["part_run"].match(text, position):
            behind.unclear = True
        return
    if tokens.kind(token) == "word" and tokens.starts[token] == end:
        if not (behind.scales or behind.counted) and (ordinal := _ORDINAL.match(text, end)):
            behind.ordinal, behind.end, behind.token = True, ordinal.end(), token + 1
            month = _OF_MONTH.match(text, behind.end)
            behind.attached = bool(month and words.key(month[1], words.lists["months"]))
        elif money or behind.scales:
            behind.unclear = True
        else:
            behind.attached = True  # 3D, 1080p, 90s
        return
    unread = text[end + (after in " \t\xa0") :][:1]
    if after in "^@_\u2033\xa7" or unicodedata.category(after) == "No" or is_symbol(unread):
        behind.unclear = True
        return
    if unread and (unread in "\xd7\xb7\xf7\u221a" or unread in words.lists["unread"]):
        behind.unclear = True
        return
    if after in "'\"" and (LETTER.match(text, end + 1) or (after == '"' and text[:end].count('"') % 2 == 0)):
        behind.attached = True  # 1980's, 27"
        return
    if after == "." and not behind.scales and not behind.counted and LETTER.match(text, end + 1):
        behind.unclear = True  # 5.k
        return
    if after == "-" and LETTER.match(text, end + 1) and not _RANGE_OR_ISH.match(text, end):
        behind.compound = True
        return
    if _CLOCK_AFTER.match(text, end) and not money:
        behind.attached = True
        return
    _weigh_next_word(tokens, behind, token, money)


def _weigh_next_word(tokens: Tokens, behind: Behind, token: int, money: bool) -> None:
    """Say of the word behind a number whether it is understood."""
    words = number_words()
    opened = False
    if tokens.piece(token) in (",", ":", ";") and tokens.piece(token):
        ahead = token + 1 + (tokens.kind(token + 1) == "blank")
        if tokens.kind(ahead) == "word" and (scale := tokens.scale(ahead)) and not _is_article(tokens.word(ahead)):
            behind.unclear |= tokens.kind(scale[1]) != "number"  # 5, k
        return
    if tokens.kind(token) == "blank":
        token += 1
    if tokens.piece(token) in ("(", "[", "/", '"', "-", "\u2013") and tokens.piece(token):
        opened = True
        token += 1
        token += tokens.kind(token) == "blank"
    kind = tokens.kind(token)
    if kind == "run":
        patterns = word_patterns()
        position = tokens.starts[token]
        if patterns["factors"].match(tokens.text, position) or patterns["scale_run"].match(tokens.text, position):
            behind.unclear = True
        elif not (patterns["harmless_run"].match(tokens.text, position) or behind.counted or opened):
            behind.unclear = tokens.run_entry(position, tokens.ends[token]) is None
        return
    if kind != "word":
        return
    word = tokens.word(token)
    gross = word.casefold() == "gross" and (money or behind.currency)
    if tokens.phrase(token, words.lists["unread"]) and not (tokens.phrase(token, words.units) or gross):
        behind.unclear = True
        return
    for place in (token, token + 2, token + 4):  # "2 et demi", "5 and a half"
        if tokens.kind(place) == "word" and turns(tokens.word(place)) and not behind.unit:
            behind.unclear = True
            return
        if tokens.kind(place + 1) != "blank":
            break
    scale = tokens.scale(token)
    if scale and (not _is_article(word) or opened):
        behind.unclear = behind.unclear or not (opened and words.key(word, words.currencies))
        return
    if words.key(word, words.lists["months"]) and (word[0].isupper() or word.casefold() not in ("may", "mar", "mars")):
        behind.attached = True
        return
    if any(words.key(word, words.lists[name]) for name in ("multiple", "relative")):
        behind.unclear = True
        return
    if tokens.kind(token + 1) == "number" or (len(word) == 1 and word not in "aAI" and tokens.currency(token + 2)):
        behind.unclear = True  # 5 e3, 500 e Ft
        return
    if words.key(word, words.lists["negative"]) and not words.key(word, words.harmless):
        behind.unclear = True
        return
    if opened or behind.counted or is_known(tokens, token, word):
        return
    behind.unclear = True


def turns(word: str) -> bool:
    """Whether a word near a number makes it a part of something, or a loss."""
    words = number_words()
    return any(words.key(word, words.lists[name]) is not None for name in ("part", "loss"))


def _is_article(word: str) -> bool:
    return word.casefold() in ("a", "an")


def is_known(tokens: Tokens, token: int, word: str) -> bool:
    """Whether the word at `token` may follow a number without changing it."""
    words = number_words()
    folded = word.casefold()
    return (
        folded in words.harmless
        or (folded in SPOKEN_START and folded != "point")
        or any(folded in words.lists[name] for name in ("range", "and", "hedge", "between", "negative", "labels"))
        or tokens.currency(token) is not None
        or (tokens.phrase(token, words.units) is not None and not (word.isupper() and len(word) == 1))
    )
