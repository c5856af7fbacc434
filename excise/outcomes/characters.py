"""The classes of characters that numbers are read by: blanks, letters, scripts without blanks, symbols.

Words are in `excise.outcomes.number_words`; what characters become in the plain form of a text is in `plain_text`.
"""

import re
import unicodedata

BLANK = r"[ \t\xa0]"
SPACELESS = (
    r"[\u0e00-\u0e3e\u0e40-\u0eff\u1000-\u109f\u1780-\u17d3\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)
"""A character of a script that writes no blanks between words."""
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0971-\u0dff"  # parts of words
_NUMERALS = (
    "\xb2\xb3\xb9\xbc-\xbe\u2070-\u209c\u2150-\u218b\u2460-\u249b\u24ea-\u24ff\u2776-\u2793"  # no letters, no digits
)
ONE_LETTER = rf"(?:(?!{SPACELESS}|[{_NUMERALS}])[^\W\d_]|[{_MARKS}])"
LETTER = re.compile(ONE_LETTER)
VULGAR = "\xbc-\xbe\u2150-\u215e"
"""Fractions in one character."""
NO_WORD = re.compile(r"[\W_]*")


def is_symbol(character: str) -> bool:
    """Whether a character is a symbol that may be a unit, such as a degree sign; pictures are none."""
    return (
        character != ""
        and unicodedata.category(character) == "So"
        and not ("\u2600" <= character <= "\u27bf" or character >= "\U0001f000")
    )


def is_sign(character: str) -> bool:
    """Whether a character is the sign of a currency or of percent."""
    return character == "%" or (character != "" and unicodedata.category(character) == "Sc")
