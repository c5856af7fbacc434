"""The plain form of an answer: LaTeX, Markdown, HTML, foreign digits and rare signs in the few forms that numbers are
read from. What the numbers are is in `excise.outcomes.number_reader`.
"""

import html
import re
import unicodedata
from functools import cache

from excise.outcomes.characters import ONE_LETTER, is_sign
from excise.outcomes.number_words import number_words

_CHARACTERS = {
    "\u2212": "-",
    "\u2010": "-",
    "\u2011": "-",
    "\ufe63": "-",
    "\u2012": "\u2013",
    "\u2015": "\u2014",
    "\u301c": "~",
    "\u223c": "~",
    "\uff5e": "~",
    "\u2019": "'",
    "\u02bc": "'",
    "\u2018": "'",
    "\u2032": "'",
    "\xb4": "'",
    "\u066b": ".",
    "\u066c": ",",
    "\u060c": ",",
    "\u066a": "%",
    "\ufe6a": "%",
    "\ufe50": ",",
    "\uffe0": "\xa2",
    "\uffe1": "\xa3",
    "\uffe5": "\xa5",
    "\uffe6": "\u20a9",
    "\u0640": "",
}
_SUPERSCRIPTS = {
    ord(character): str(digit)
    for digit, character in enumerate("\u2070\xb9\xb2\xb3\u2074\u2075\u2076\u2077\u2078\u2079")
}
_SUPERSCRIPTS |= {0x207B: "-", 0x207A: "+"}

_LATEX_TEXT = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox|emph|underline|bm|textsf)\s?\{([^{}]*)\}"
)
_LATEX_FRACTION = re.compile(r"([0-9]{1,9})?\s?\\[dt]?frac\s?\{([0-9]{1,9})\}\s?\{([0-9]{1,9})\}(?![0-9^])")
_LATEX = {
    r"\,": "\xa0",
    r"\;": " ",
    r"\:": " ",
    r"\ ": " ",
    r"\!": "",
    r"\$": "$",
    r"\%": "%",
    r"\&": "&",
    r"\#": "#",
    r"\_": "_",
    r"\(": " ",
    r"\)": " ",
    r"\[": " ",
    r"\]": " ",
    r"\{": " ",
    r"\}": " ",
    r"\\": "\n",
    r"\-": "-",
    r"\*": "",
    r"\'": "'",
    r"\~": "~",
    r"\.": ".",
    r"\|": "|",
    r"\>": ">",
    r"\<": "<",
    r"\+": "+",
    r"\"": '"',
    r"\/": "/",
    r"\`": "",
}
_LATEX_COMMANDS = {
    "times": "\xd7",
    "cdot": "\xd7",
    "approx": "\u2248",
    "sim": "\u2248",
    "simeq": "\u2248",
    "euro": "\u20ac",
    "texteuro": "\u20ac",
    "pounds": "\xa3",
    "textsterling": "\xa3",
    "textdollar": "$",
    "quad": " ",
    "qquad": " ",
    "left": "",
    "right": "",
    "ge": "\u2265",
    "geq": "\u2265",
    "le": "\u2264",
    "leq": "\u2264",
    "n": "\n",
    "pm": "\xb1",
    "displaystyle": " ",
    "bf": " ",
    "rm": " ",
    "Huge": " ",
    "large": " ",
    "to": " to ",
    "textendash": "\u2013",
    "t": " ",
}
_MARKUP = re.compile(
    r"</?(?:b|strong|em|i|u|code|span|mark|big|small|font|td|th|answer)(?:\s[^<>]{0,80})?>", re.IGNORECASE
)
_BREAK = re.compile(r"</?(?:br|p|div|li|tr)(?:\s[^<>]{0,80})?/?>", re.IGNORECASE)
_STRUCK = re.compile(r"~~|</?(?:s|del|strike|sup|sub)>", re.IGNORECASE)
_LINK = re.compile(r"(?:https?://|www\.)[^\s<>()]+")
_EMPHASIS = re.compile(r"\*+|`+|(?<![^\W_])_+|_+(?![^\W_])")


def _plain_character(match: re.Match) -> str:
    """Digits of any script, full-width forms, dashes and spaces in the few forms the grammar knows."""
    character = match[0]
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if "\uff01" <= character <= "\uff5e":
        return chr(ord(character) - 0xFEE0)
    category = unicodedata.category(character)
    if category == "Zs":
        return "\xa0"
    return character


def _without_latex(text: str) -> str | None:
    """The text with its LaTeX written plainly; None where a command is left that may change a number."""
    text = text.replace("{,}", ",").replace("{.}", ".")
    for _ in range(4):
        if "\\" not in text:
            break
        text, count = _LATEX_TEXT.subn(lambda match: match[1], text)
        if not count:
            break
    text = _LATEX_FRACTION.sub(
        lambda match: f" {int(match[1] or 0) + int(match[2]) / int(match[3])!r} " if int(match[3]) else match[0], text
    )
    text = re.sub(r"\^\{([-+]?[0-9]{1,3})\}", r"^\1", text)
    unknown = False

    def command(match: re.Match) -> str:
        nonlocal unknown
        if match[1]:
            unknown |= match[1] not in _LATEX_COMMANDS
            return _LATEX_COMMANDS.get(match[1], match[0])
        unknown |= match[0] not in _LATEX
        return _LATEX.get(match[0], match[0])

    text = re.sub(r"\\(?:([A-Za-z]+)|.|$)", command, text, flags=re.DOTALL)
    return None if unknown else text


def _without_emphasis(match: re.Match) -> str:
    """Nothing for signs of emphasis, the sign itself between two digits, where it may multiply."""
    before, after = match.string[: match.start()][-2:].rstrip(), match.string[match.end() : match.end() + 2].lstrip()
    return match[0] if before[-1:].isdigit() and (after[:1].isdigit() or after[:1] == ".") else ""


def _spaces_as_separators(text: str) -> str:
    """Plain spaces between thousands become no-break spaces where a currency or the whole text leaves no doubt."""
    if not re.search(r"[0-9] [0-9]{3}", text):
        return text
    grouped = r"[0-9]{1,3}(?: [0-9]{3})+(?![0-9]|[.,][0-9]{3}|/)(?:[.,][0-9]{1,2}(?![0-9]))?"
    if re.fullmatch(r"[\s*]*[0-9]{1,2}(?: [0-9]{3})+(?:[.,][0-9]{1,2})?[\s*.]*", text):
        return re.sub(r"(?<=[0-9]) (?=[0-9])", "\xa0", text)
    words = number_words()

    def bind(match: re.Match) -> str:
        first = re.match(rf" ?({ONE_LETTER}+)", text[match.end() : match.end() + 24])
        beside = text[match.end() : match.end() + 2].lstrip(" ")[:1]
        before = text[max(0, match.start() - 2) : match.start()].rstrip(" ")[-1:]
        word = first[1] if first else ""
        known = words.key(word, words.currencies) or words.key(word, words.units) or words.key(word, words.scales)
        left_word = re.search(rf"({ONE_LETTER}+)\.? ?$", text[max(0, match.start() - 8) : match.start()])
        marked = left_word and words.key(left_word[1], words.currencies)
        return match[0].replace(" ", "\xa0") if known or marked or is_sign(beside) or is_sign(before) else match[0]

    return re.sub(rf"(?<![0-9.,]){grouped}", bind, text)


@cache
def _names() -> re.Pattern:
    """Names that look like numbers with a scale."""
    names = "|".join(re.escape(name) for name in number_words().lists["names"])
    return re.compile(rf"(?<![\w$.,])(?:{names})(?!\w)", re.IGNORECASE)


def plain_form(text: str) -> str | None:
    """The text in the few forms the grammar knows; None if it holds marks that make its numbers uncertain."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        if re.search(r"[0-9]\W?\ufffd", text) or "\u20e3" in text:
            return None  # half a character behind a number, or key caps
        if re.search(r"\d[\u200b-\u200d\u2060\ufeff]+\d", text):
            return None
        text = re.sub(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\xad\u061c\ufe0e\ufe0f]", "", text)
        text = re.sub(
            r"(?<=\d)([\u2070\xb9\xb2\xb3\u2074-\u2079\u207a\u207b]+)",
            lambda match: "^" + match[1].translate(_SUPERSCRIPTS),
            text,
        )
        text = re.sub(r"[^\x00-\x7f]", _plain_character, text)
    if "\\" in text or "{" in text:
        without = _without_latex(text)
        if without is None:
            return None
        text = without
    if "&" in text:
        text = re.sub(r"[^\x00-\x7f]", _plain_character, html.unescape(text))
    if "401" in text or "403" in text or "457" in text:
        text = _names().sub(" ", text)
    if "+" in text:
        text = re.sub(r"\+\s?/\s?[-\u2013]", "\xb1", text)
    if "<" in text or "~~" in text:
        if _STRUCK.search(text):
            return None
        text = _BREAK.sub("\n", _MARKUP.sub("", text))
    if "://" in text or "www." in text:
        text = _LINK.sub(" ", text)
    if "*" in text or "_" in text or "`" in text:
        text = _EMPHASIS.sub(_without_emphasis, text)
    return _spaces_as_separators(text)
