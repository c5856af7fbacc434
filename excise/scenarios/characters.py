"""Characters that may not stand in a text that a model reads: nobody would see them.

Not here: which texts there are (`rules`).
"""

import re
import unicodedata
from collections.abc import Iterator

FLAG = "\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f"  # of England, Scotland, Wales: letters that show as one flag
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"


def character_faults(field: str, text: str, *, lines: bool = False) -> Iterator[str]:
    """What of a text is no text, as `field: fault and mend`. lines: line breaks are text."""
    for character in dict.fromkeys(re.sub(FLAG, "", text)):
        if lines and character in "\n\t":
            continue
        category = unicodedata.category(character)
        if character in "\n\r\v\f\x1c\x1d\x1e\x85" or category in ("Zl", "Zp"):
            what, mend = "a line break", "write \\n for it" if lines else "write it in one line"
        elif category == "Cc":
            what, mend = "a control character", "remove it"
        elif category == "Co":
            what, mend = "a character of private use, which means nothing to a model", "write another one"
        elif character == "\ufffd":
            what, mend = "what is left of a character read in a wrong encoding", "write the character itself"
        elif character == "\ufeff" or ord(character) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(character) <= 0xFDEF:
            what, mend = "a mark of the encoding, which is no character", "remove it"
        elif "\U000e0000" <= character <= "\U000e007f":
            what, mend = "a letter that nobody sees", "remove it"
        elif "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u206f":
            what, mend = "a mark that changes the direction of the text", "remove it"
        else:
            continue
        shown = text.encode("unicode_escape").decode("ascii")
        yield f"{field}: '{shown}' holds {what} (U+{ord(character):04X}): {mend}"
    unseen = ("Cc", "Cf", "Zs", "Zl", "Zp")
    if all(unicodedata.category(character) in unseen or character in BLANK_LETTERS for character in text):
        yield f"{field} holds no character that can be seen: give it a text"
