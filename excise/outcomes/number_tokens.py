"""The tokens of a plain text, and which of the listed words stand at them.

What tokens make up a number is in `excise.outcomes.number_reader`; the words are in `excise.outcomes.number_words`.
"""

import re
import unicodedata
from collections.abc import Container

from excise.outcomes.characters import BLANK, ONE_LETTER, SPACELESS
from excise.outcomes.number_words import Currency, number_words

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


class Tokens:
    """The tokens of a plain text in order. Token -1 and those behind the last are empty, of the kind "end".

    kinds: "number", "word", "run" (of a script without blanks), "blank", "line" or "other", one of each token; starts,
    ends: where it stands.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = number_words()
        self.kinds: list[str] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        for match in _TOKEN.finditer(text):
            self.kinds.append(match.lastgroup or "other")
            self.starts.append(match.start())
            self.ends.append(match.end())
        self._languages: frozenset[str] | None = None

    def piece(self, token: int) -> str:
        """The text of a token."""
        return self.text[self.starts[token] : self.ends[token]] if 0 <= token < len(self.kinds) else ""

    def kind(self, token: int) -> str:
        """What a token is: see the class."""
        return self.kinds[token] if 0 <= token < len(self.kinds) else "end"

    def word(self, token: int) -> str:
        """The word of a token, without the points of an abbreviation and without what a Turkish apostrophe adds."""
        piece = self.piece(token)
        return piece.replace(".", "") if "." in piece else piece

    def after(self, token: int, position: int) -> int:
        """The first token from `token` on that begins at `position` or later."""
        while token < len(self.starts) and self.starts[token] < position:
            token += 1
        return token

    def languages(self) -> frozenset[str]:
        """The languages the words of the text belong to, those of most words."""
        if self._languages is None:
            votes: dict[str, int] = {}
            for token, kind in enumerate(self.kinds):
                if kind == "word" and len(word := self.word(token).casefold()) > 1:
                    for language in self.words.harmless.get(word, ()):
                        votes[language] = votes.get(language, 0) + 1
            most = max(votes.values(), default=0)
            self._languages = frozenset(language for language, count in votes.items() if count == most)
        return self._languages

    def phrase(self, token: int, table: Container[str]) -> tuple[str, int] | None:
        """The longest entry of a table that begins with the word at `token`, and the token behind it."""
        word = self.word(token)
        reach = self.words.phrases.get(word.casefold(), 1)
        for count in range(reach, 0, -1):
            pieces, place = [word], token + 1
            while len(pieces) < count and self.kind(place) == "blank" and self.kind(place + 1) == "word":
                pieces.append(self.word(place + 1))
                place += 2
            if len(pieces) == count and (key := self.words.key(" ".join(pieces), table)):
                return key, place
        if "'" in word and (key := self.words.key(word.split("'")[0], table)):
            return key, token + 1  # TL'ye
        return None

    def currency(self, token: int) -> tuple[Currency, int] | None:
        """The currency whose mark begins at `token`, and the token behind it."""
        kind = self.kind(token)
        if kind == "other":
            piece = self.piece(token)
            if piece in self.words.units:
                return None
            if unicodedata.category(piece) == "Sc":
                return self.words.currencies.get(piece) or Currency(piece, False, frozenset()), token + 1
            return None
        if kind == "run":
            return None
        if kind == "word":
            following = self.piece(token + 1)
            if following and self.kind(token + 1) == "other" and unicodedata.category(following) == "Sc":
                joined = self.words.key(self.word(token) + following, self.words.currencies)
                if joined:
                    return self.words.currencies[joined], token + 2
            if phrase := self.phrase(token, self.words.currencies):
                return self.words.currencies[phrase[0]], phrase[1]
        return None

    def run_entry(self, position: int, run_end: int) -> tuple[str, str] | None:
        """The longest currency or unit that a run of a script without blanks begins with: ("currency" | "unit", it)."""
        for length in range(min(9, run_end - position), 0, -1):
            entry = self.text[position : position + length]
            if entry in self.words.currencies:
                return "currency", entry
            if entry in self.words.units:
                return "unit", entry
        return None

    def scale(self, token: int) -> tuple[str, int] | None:
        """The scale word or words at `token`, and the token behind them."""
        return self.phrase(token, self.words.scales)
