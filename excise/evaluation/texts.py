"""Plain texts to measure a model on: the one that comes with Excise, a file, or a data set of the hub.

How a text is cut into windows and what a model loses on them is in `excise.evaluation.perplexity`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from excise.errors import ExciseError
from excise.files.paths import home_expanded

EMBEDDED_TEXT = Path(__file__).parents[1] / "texts" / "plain.txt"
HUB = "hub:"
"""What the name of a data set begins with, where a path could stand."""


def read_text(source: str | Path | None = None) -> str:
    """The text to measure on.

    source: None for the text that comes with Excise; the path of a UTF-8 file; or `hub:name/config/split/column`, a
    data set read through the `datasets` library, its rows joined by empty lines (for WikiText-2:
    `hub:Salesforce/wikitext/wikitext-2-raw-v1/validation/text`). Raises ExciseError where there is no such text.
    """
    if source is not None and str(source).startswith(HUB):
        return _hub_text(str(source))
    path = EMBEDDED_TEXT if source is None else home_expanded(source, "text")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExciseError(f"{path}: cannot be read ({error.strerror}); name a text file in UTF-8") from error
    except UnicodeDecodeError as error:
        raise ExciseError(f"{path}: is no UTF-8 text (see byte {error.start}); save it as UTF-8") from error
    if not text.strip():
        raise ExciseError(f"{path}: holds no text; perplexity needs some sentences")
    return text


def _hub_text(source: str) -> str:
    parts = source.removeprefix(HUB).rsplit("/", 3)
    if len(parts) != 4 or not all(parts):
        raise ExciseError(
            f"text {source!r}: write hub:name/config/split/column, such as "
            "hub:Salesforce/wikitext/wikitext-2-raw-v1/validation/text"
        )
    name, config, split, column = parts
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ExciseError(
            f"text {source!r}: needs the library datasets; run `pip install datasets`, or name a text file by its path"
        ) from error
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ExciseError(
            f"text {source!r}: cannot be loaded: {reason}. "
            "Check name, config, split and the network, or name a text file by its path"
        ) from error
    if column not in rows.column_names:
        raise ExciseError(f"text {source!r}: no column {column!r}; there are {', '.join(rows.column_names)}")
    text = "\n\n".join(str(row) for row in rows[column])
    if not text.strip():
        raise ExciseError(f"text {source!r}: the column {column!r} holds no text; name another one")
    return text
