"""The marks of thoughts that a model writes before it answers, as <think> opens them and </think> closes them."""

from __future__ import annotations

import re

_THOUGHTS = "think|thinking|thought|thoughts|reasoning|reason|reflection|scratchpad|analysis"
_OPENED = re.compile(rf"<({_THOUGHTS})>|\[({_THOUGHTS})\]|\u25c1({_THOUGHTS})\u25b7", re.IGNORECASE)
_CLOSED = re.compile(rf"</({_THOUGHTS})>|\[/({_THOUGHTS})\]|\u25c1/({_THOUGHTS})\u25b7", re.IGNORECASE)


def open_thoughts(text: str) -> bool:
    """Whether a text ends within thoughts that a model writes before it answers, as <think> opens them."""
    return _OPENED.search(text, behind_thoughts(text)) is not None


def behind_thoughts(text: str) -> int:
    """Where the answer begins: behind the end of the model's thoughts, if it wrote any."""
    return max((match.end() for match in _CLOSED.finditer(text)), default=0)
