"""Templates: texts with placeholders in braces, of which `{name}` is filled by the subject.

Here belong reading a template's placeholders and filling them; what may be filled in is the schema's concern.
Only plain placeholders exist (`{item}`); `{{` and `}}` stand for braces, and values are never read as templates again.
"""

import string
from collections.abc import Mapping

OWN_TEMPLATE = "own"  # the template key of a variation that brings a template of its own
SENTENCES = "sentences"  # the one variation of a scenario whose prompts are the sentences of HolisticBias


def placeholders(template: str) -> list[str]:
    """The placeholders of a template in their order, repeats included.

    Raises ValueError when braces do not pair up.
    """
    return [field for _, field in _pieces(template) if field is not None]


def fill(template: str, values: Mapping[str, str]) -> tuple[str, int, int]:
    """Fill a template and tell where the name came to stand.

    Returns the text and the character offsets [start, end) of the value of `name` in it. Every placeholder of the
    template must be in `values` (KeyError otherwise); `{name}` must occur in it (ValueError otherwise).
    """
    text = ""
    start = end = None
    for literal, field in _pieces(template):
        text += literal
        if field is not None:
            if field == "name":
                start, end = len(text), len(text) + len(values[field])
            text += values[field]
    if start is None or end is None:
        raise ValueError("the template lacks {name}")
    return text, start, end


def fill_prefix(prefix: str, values: Mapping[str, str]) -> str:
    """Fill the placeholders of an answer's prefix, all of which must be in `values` (KeyError otherwise)."""
    return "".join(literal + ("" if field is None else values[field]) for literal, field in _pieces(prefix))


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """Literal text and the placeholder after it; a conversion or format stays in the placeholder, so it is unknown."""
    pieces: list[tuple[str, str | None]] = []
    for literal, field, form, conversion in string.Formatter().parse(template):
        if field is not None:
            field += (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        pieces.append((literal, field))
    return pieces
