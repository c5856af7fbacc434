"""Turns a prompt's text into the tokens a model reads, finds the name among them, and turns answers back into text.

The name is located by character offsets, never by token ids, so any tokenizer and any template will do. Sampling and
attribution take tokens from here only, so they always see the same prompt; its hash is what stages compare.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from excise.errors import ExciseError
from excise.models.loading import LoadedModel
from excise.models.thoughts import open_thoughts

if TYPE_CHECKING:
    import torch

PINNED = datetime(2024, 7, 26)
PINNED_DATE = PINNED.strftime("%d %b %Y")
"""Some chat templates print today's date; a fixed one keeps answers repeatable. Those of Llama 3.1 and later take it as
a variable, others ask the clock.

Others (Qwen3) let the model think aloud first unless told otherwise; here it answers at once.
"""
LOTS = 32
"""How often a template that can draw lots is tried."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class EncodedPrompt:
    """tokens: all token ids. name: half-open range of token positions that carry the subject's name."""

    prompt_id: str
    tokens: tuple[int, ...]
    name: tuple[int, int]

    @property
    def hash(self) -> str:
        return prompt_hash(self.tokens)


def prompt_hash(tokens: Sequence[int]) -> str:
    """24 hex digits that change with anything a model reads of a prompt: the hash of its tokens."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()[:24]


# --- text into tokens ------------------------------------------------------------------------------------------------


def encode(loaded: LoadedModel, prompts: pl.DataFrame, *, new_tokens: int = 1) -> list[EncodedPrompt]:
    """Encode a frame of prompts (columns prompt_id, text, name_start, name_end), in its order.

    Chat models get the text as a single user turn through their own template, without a system prompt of ours; a raw
    prompt begins as the tokenizer begins texts, does not end as it ends them, and is cut behind
    `loaded.max_prompt_tokens` tokens. A column `answer_prefix` holds what stands at the beginning of the answer. No
    template sees the clock: the date is `PINNED_DATE`.

    new_tokens: how long an answer may become. Raises ExciseError, naming the prompt, where prompt and answer are longer
    than the model can read, where the prompt is cut before the end of the name, and where the tokenizer does not know
    the name or reads two alike; and, naming the entry in models.yaml, for a chat template that changes the prompt's
    text, fails, prints something else each time, or does not leave the answer to begin.
    """
    columns = ["prompt_id", "text", "name_start", "name_end"]
    prefixes = prompts["answer_prefix"] if "answer_prefix" in prompts.columns else [""] * prompts.height
    encoded = []
    named: dict[tuple[int, ...], str] = {}
    no_text = special_tokens(loaded.tokenizer) | {loaded.tokenizer.unk_token_id}
    opening = opening_tokens(loaded.tokenizer) if loaded.prompt_format == "raw" else ()
    for (prompt_id, text, start, end), prefix in zip(prompts.select(columns).iter_rows(), prefixes, strict=True):
        if loaded.prompt_format == "chat":
            whole = _user_turn(loaded, text)
            start, end = start + whole.index(text), end + whole.index(text)
        else:
            whole = text
        reading = loaded.tokenizer(
            whole + (prefix or ""), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        prompt_tokens = tuple(reading["input_ids"])
        before = () if prompt_tokens[: len(opening)] == opening else opening
        tokens = (*before, *prompt_tokens)[: loaded.max_prompt_tokens]
        what = f"prompt {prompt_id} ({_shortened(text)!r})"
        require_positions(loaded, what, len(tokens), new_tokens)
        require_embeddings(loaded, what, tokens)
        offsets = [
            (0, 0) if token in no_text else at
            for token, at in zip(prompt_tokens, reading["offset_mapping"], strict=True)
        ]
        carries = _require_name(loaded, what, whole, (start, end), offsets)
        name = carries[0] + len(before), carries[-1] + 1 + len(before)
        if name[1] > len(tokens):
            raise ExciseError(
                f"{what} is cut behind {len(tokens)} tokens, before the end of {whole[start:end]!r}: such prompts are "
                "the same for several groups; raise outcome.max_prompt_tokens of the scenario"
            )
        if (twin := named.setdefault(tokens, whole[start:end])) != whole[start:end]:
            raise ExciseError(
                f"{what}: the model {loaded.key} reads {whole[start:end]!r} and {twin!r} alike, as its tokenizer drops "
                "what they differ in: their answers would count twice; keep one of them"
            )
        encoded.append(EncodedPrompt(prompt_id, tokens, name))
    return encoded


def _require_name(
    loaded: LoadedModel, what: str, whole: str, place: tuple[int, int], offsets: Sequence[tuple[int, int]]
) -> list[int]:
    """The places of the tokens that carry the name, in ascending order. offsets: of every token; empty of those that
    are no text.

    Raises ExciseError where the tokenizer leaves characters of it out or has no token for them: other names would be
    read alike, and their answers show no gap.
    """
    start, end = place
    carries = [number for number, (low, high) in enumerate(offsets) if low < end and high > start and high > low]
    known = {character for number in carries for character in range(*offsets[number])}
    lost = [whole[k] for k in range(start, end) if k not in known and not _unseen(whole[k])]
    if lost or not carries:
        raise ExciseError(
            f"{what}: the tokenizer of the model {loaded.key} does not read {''.join(lost) or whole[start:end]!r} of "
            f"{whole[start:end]!r} as text, so the model cannot tell who is meant; name subjects in letters that it "
            "knows, or audit a model that reads these"
        )
    return carries


def _unseen(character: str) -> bool:
    """Blanks and marks without a shape of their own, which tokenizers may leave out."""
    return character.isspace() or unicodedata.category(character) in ("Cf", "Mn", "Me", "Cc")


def opening_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts before a text; what it puts behind one belongs to no prompt."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return tuple(whole[: next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)])


def positions(loaded: LoadedModel) -> int | None:
    """How many tokens the model can read at once, by its configuration; None where that does not say."""
    return getattr(loaded.model.config, "max_position_embeddings", None)


def require_positions(loaded: LoadedModel, what: str, length: int, new_tokens: int = 1) -> None:
    """Raise ExciseError where a text of `length` tokens and an answer of `new_tokens` are more than the model can read.

    what: which text. The last token of an answer is never read.
    """
    limit = positions(loaded)
    if limit is not None and length + new_tokens - 1 > limit:
        answer = f" and up to {new_tokens} of an answer" if new_tokens > 1 else ""
        raise ExciseError(
            f"{what} has {length} tokens{answer}, more than the {limit} positions of the model {loaded.key}; shorten "
            f"it{', or lower max_new_tokens' if answer else ''}"
        )


def require_embeddings(loaded: LoadedModel, what: str, tokens: Iterable[int]) -> None:
    """Raise ExciseError where a text holds a token without an embedding: a special one that is spelt out in it, or that
    a chat template writes. what: which text."""
    embedding = cast("torch.nn.Embedding", loaded.model.get_input_embeddings())
    rows, largest = embedding.num_embeddings, max(tokens, default=0)
    if largest >= rows:
        raise ExciseError(
            f"models.yaml: {loaded.key}: {what} holds {loaded.tokenizer.convert_ids_to_tokens(largest)!r} ({largest}), "
            f"and the model has embeddings for {rows} tokens only; leave it out, name another chat_template in "
            "models.yaml if the template writes it, or name the tokenizer that belongs to the weights"
        )


def require_same_prompts(encoded: Iterable[EncodedPrompt], answers: pl.DataFrame, made_by: str = "completions") -> None:
    """Raise ExciseError unless the answers were given to the prompts as the model would read them now.

    answers: with columns scenario, prompt_id and prompt_hash. made_by: the asset that made them.
    """
    now = {prompt.prompt_id: prompt.hash for prompt in encoded}
    asked = answers.select("scenario", "prompt_id", "prompt_hash").unique(maintain_order=True)
    for scenario, prompt_id, then in asked.iter_rows():
        if prompt_id in now and now[prompt_id] != then:
            raise ExciseError(
                f"scenario {scenario}: the model reads prompt {prompt_id} otherwise than when {made_by} asked it (its "
                f"chat template or tokenizer has changed); materialize {made_by} again"
            )


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- chat templates --------------------------------------------------------------------------------------------------


def _user_turn(loaded: LoadedModel, text: str) -> str:
    """The text as a user's turn, up to where the answer begins."""
    from jinja2 import TemplateError

    where = f"models.yaml: {loaded.key}: the chat template"
    try:
        template = loaded.tokenizer.get_chat_template()
        # What draws lots may stand where no user's turn gets to: only what comes out tells.
        word = _randomness(template)
        wholes = {
            loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                chat_template=_FROZEN_CLOCK + template,
                tokenize=False,
                add_generation_prompt=True,
                date_string=PINNED_DATE,
                enable_thinking=False,
            )
            for _ in range(LOTS if word else 1)
        }
        if len(wholes) > 1:
            raise ExciseError(f"{where} uses {word}, which makes another prompt each time; name another chat_template")
        (whole,) = wholes
    except ExciseError:
        raise
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ExciseError(f"{where} fails for a user's turn ({error}); name another chat_template") from error
    if re.search(r" at 0x[0-9a-fA-F]{4,}", whole.replace(text, "")):
        raise ExciseError(f"{where} prints an object of this process, another one each time; name another one")
    if whole.count(text) != 1:
        does = "prints the text of a prompt more than once" if text in whole else "changes the text of a prompt"
        raise ExciseError(f"{where} {does}, so the name cannot be found in it; name another chat_template")
    _require_open_end(loaded, whole[whole.index(text) + len(text) :].rstrip())
    return whole


def _require_open_end(loaded: LoadedModel, behind: str) -> None:
    """Raise ExciseError where the answer cannot begin behind the prompt. behind: what the template puts there."""
    where = f"models.yaml: {loaded.key}: the chat template"
    ends = [loaded.tokenizer.convert_ids_to_tokens(token) for token in sorted(loaded.stop_tokens)]
    if last := next((end for end in ends if end and behind.endswith(end)), None):
        raise ExciseError(
            f"{where} ends a prompt with {last}, where the model's turn is to begin; name one with chat_template that "
            "writes its beginning where add_generation_prompt is set"
        )
    if open_thoughts(behind):
        raise ExciseError(
            f"{where} has the model think aloud before it answers, and the answer would be cut off; name one with "
            "chat_template that closes the thoughts, or leaves them out, where enable_thinking is false"
        )


@lru_cache
def _randomness(template: str) -> str | None:
    """What a template draws at random with, if anything."""
    import jinja2

    # Only words in code count, and among texts those that can name a filter.
    for _, kind, word in jinja2.Environment().lex(template):
        if kind in ("name", "string") and word.strip("'\"") in ("random", "lipsum"):
            return word.strip("'\"")
    return None


def _clock_that_stands() -> str:
    """A macro in place of `strftime_now`, which templates ask for the date; it comes before the template, in a line of
    its own. (A function cannot be handed to a template: transformers lets plain data through only.)"""
    codes = {code: PINNED.strftime(f"%{code}") for code in "aAbBcdDeFGghHIjmMnprRStTuUVwWxXyYzZ"}
    codes |= {f"{flag}{code}": codes[code].lstrip("0") or "0" for flag in "-#" for code in "deHIjmMSUWy"}
    codes |= {"f": "000000", "s": "1721952000"}
    filters = "".join(f"|replace('%{code}', '{value}')" for code, value in codes.items() if value.isprintable())
    return (
        "{% macro strftime_now(format) %}{{ format|replace('%%', '\x00')" + filters + "|replace('\x00', '%') }}"
        "{% endmacro %}\n"
    )


_FROZEN_CLOCK = _clock_that_stands()


# --- tokens into text ------------------------------------------------------------------------------------------------


def reader(loaded: LoadedModel) -> Callable[[Sequence[int]], tuple[str, bool]]:
    """A function from an answer's tokens, without the one that ended it, to its text.

    The text ends before the first special token, or the first that is none of the tokenizer's, and the function says
    whether there was one: what stands behind it is no part of the answer, and must not be joined to what stands before.
    """
    tokenizer = loaded.tokenizer
    special, largest = special_tokens(tokenizer), len(tokenizer)

    def no_text(token: int) -> bool:
        """Many models have more embeddings than their tokenizer has tokens."""
        return token in special or token >= largest or tokenizer.convert_ids_to_tokens(token) is None

    def read(tokens: Sequence[int]) -> tuple[str, bool]:
        length = next((place for place, token in enumerate(tokens) if no_text(token)), len(tokens))
        text = tokenizer.decode(list(tokens[:length]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text, length < len(tokens)

    return read


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """The tokens that are marks and no text.

    Some tokenizers flag ordinary text as special. What has no brackets or bars is text, unless it is a word that ends
    texts, fills them up or the like: without it numbers would be other ones. So is a single byte, as <0xE2>.
    """
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    flagged = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = set()
    for number in {*flagged, *tokenizer.all_special_ids}:
        content = flagged.get(number) or tokenizer.convert_ids_to_tokens(number)
        bracketed = any(character in "<>[]{}|" for character in content) and not _BYTE.fullmatch(content)
        if bracketed or (number in roles and any(map(str.isalpha, content))):
            special.add(number)
    return frozenset(special)
