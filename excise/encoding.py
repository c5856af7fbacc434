"""Turns a prompt's text into the tokens a model reads, and finds the name among them.

The name is located by character offsets, never by token ids, so any tokenizer and any template will do. Sampling and
attribution take tokens from here only, so they always see the same prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from excise.errors import ExciseError
from excise.models import LoadedModel

PINNED_DATE = "26 Jul 2024"
"""Some chat templates (Llama 3.1 and later) print today's date; a fixed one keeps answers repeatable.

Others (Qwen3) let the model think aloud first unless told otherwise; here it answers at once.
"""


@dataclass(frozen=True)
class EncodedPrompt:
    """tokens: all token ids. name: half-open range of token positions that carry the subject's name.

    Where a prompt is cut before its name, the range is that of the last token.
    """

    prompt_id: str
    tokens: tuple[int, ...]
    name: tuple[int, int]


def encode(loaded: LoadedModel, prompts: pl.DataFrame) -> list[EncodedPrompt]:
    """Encode a frame of prompts (columns prompt_id, text, name_start, name_end), in its order.

    Chat models get the text as a single user turn through their own template, without a system prompt of ours; a raw
    prompt is cut behind `loaded.max_prompt_tokens` tokens.
    """
    encoded = []
    for prompt_id, text, start, end in prompts.select("prompt_id", "text", "name_start", "name_end").iter_rows():
        if loaded.prompt_format == "chat":
            whole = loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                date_string=PINNED_DATE,
                enable_thinking=False,
            )
            found = whole.find(text)
            if found < 0:
                raise ExciseError(
                    f"models.yaml: {loaded.key}: the chat template changes the text of a prompt, so the name cannot be "
                    "found in it; name another chat_template"
                )
            start, end = start + found, end + found
        else:
            whole = text
        reading = loaded.tokenizer(
            whole, add_special_tokens=loaded.prompt_format == "raw", return_offsets_mapping=True, verbose=False
        )
        carries = [
            position
            for position, (low, high) in enumerate(reading["offset_mapping"])
            if low < end and high > start and high > low
        ]
        tokens = tuple(reading["input_ids"])[: loaded.max_prompt_tokens]
        carries = [position for position in carries if position < len(tokens)] or [len(tokens) - 1]
        encoded.append(EncodedPrompt(prompt_id, tokens, (carries[0], carries[-1] + 1)))
    return encoded
