"""What goes into a model and what comes out of it: inputs from the field that were wrong without a word.

Every way of asking is tried alike: sampled and enumerated answers, continuations, windows of text, attribution, heads.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import re
import shutil

import numpy as np
import polars as pl
import pytest
import tokenizers
import transformers
from safetensors.torch import load_file, save_file

from excise.attribution import Answered, attribute, file_scores
from excise.attribution.head_impacts import Compared, Sampled, Text, head_impacts
from excise.attribution.head_scores import head_gradient, head_magnitude
from excise.errors import ExciseError
from excise.evaluation.perplexity import Window, text_windows, window_losses
from excise.generation.answering import TREE_CACHE_SCHEMA
from excise.generation.completions import CACHE_SCHEMA, CompletionCache, cache_address, complete
from excise.generation.enumeration import answer_distributions
from excise.generation.sampling import SamplingParameters, sample
from excise.generation.settings import tree_settings
from excise.models.encoding import encode
from excise.models.loading import load_model
from excise.models.specs import ModelSpec
from excise.outcomes import NumberOutcome, ToxicityOutcome
from excise.outcomes.answers import parse_completion
from excise.scenarios import Scenario, expand
from tests.conftest import SPECIAL_TOKENS
from tests.excise.generation.test_exact import exact_completions
from tests.excise.models.test_encoding import frame, with_template

PARAMETERS = SamplingParameters(temperature=0.9, top_p=0.95, seed=1, max_new_tokens=4)
NUMBER = NumberOutcome(unit="USD", low=1, high=9999, scale="log", better="higher", max_new_tokens=4)
ASKED = frame(("Ask {name}", "Claire Becker"))


def read(loaded, prompts=ASKED) -> str:
    (prompt,) = encode(loaded, prompts)
    return loaded.tokenizer.decode(prompt.tokens)


# The clock, chance, and failing templates


@pytest.mark.trial(3)
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%Y-%m-%d') }} ", "2024-07-26 "),
        ("{{ strftime_now(format='%A, %-d %B %Y, %H:%M') }} ", "Friday, 26 July 2024, 00:00 "),
        (
            "{% set day = strftime_now('%d') %}{% for _ in [1] %}{{ day }}.{{ strftime_now('%m') }} {% endfor %}",
            "26.07 ",
        ),
        ("{% macro day() %}{{ strftime_now('100%% %d/%m/%y') }} {% endmacro %}{{ day() }}", "100% 26/07/24 "),
        (
            "{% if strftime_now is defined %}{% set now = strftime_now('%d %b %Y') %}{% endif %}{{ now }} ",
            "26 Jul 2024 ",
        ),
        (
            "{% if today is not defined %}{% set today = strftime_now('%x %X %j %p') %}{% endif %}{{ today }} ",
            "07/26/24 00:00:00 208 AM ",
        ),
    ],
)
def test_no_template_sees_the_clock(loaded, monkeypatch, template, text):
    model = with_template(loaded("llama"), template + "{{ messages[0]['content'] }}")
    assert read(model) == f"{text}Ask Claire Becker"

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2, 3, 4, 5)

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Later)
    assert read(model) == f"{text}Ask Claire Becker"


@pytest.mark.trial(3)
def test_a_clock_that_stands_changes_nothing_else(loaded):
    """Line breaks and blanks at the beginning of a template are its own."""
    for template in ("\n  {{ bos_token }}", "  {%- if true %}\nx{% endif %}\n", "{# a #}\n\n y\n"):
        text = template + "{{ messages[0]['content'] }}"
        model = with_template(loaded("llama"), text)
        turns = [{"role": "user", "content": "Ask Claire Becker"}]
        assert read(model) == model.tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.trial(3)
@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ ['Hi', 'Hello'] | random }}", "uses random"),
        ("{% filter random %}ab{% endfilter %}", "uses random"),
        ("{{ [['Hi', 'Hello']] | map('random') | first }}", "uses random"),
        ("{{ lipsum(1) }}", "uses lipsum"),
        ("{{ raise_exception }}", "prints an object of this process"),
        ("{{ joiner() | string | lower or cycler }}{{ cycler('a').next }}", "prints an object of this process"),
        ("{{ raise_exception('no such turn') }}", "fails for a user's turn \\(no such turn\\)"),
        ("{{ 1 / 0 }}", "fails for a user's turn"),
        ("{{ none + 'a' }}", "fails for a user's turn"),
    ],
)
def test_a_template_that_differs_each_time_or_fails_is_refused(loaded, template, word):
    with pytest.raises(ExciseError, match=f"models.yaml: tiny-llama: the chat template {word}"):
        encode(with_template(loaded("llama"), template + "{{ messages[0]['content'] }}"), ASKED)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("No random | lipsum. ", "No random | lipsum. "),
        ("{# lipsum #}{% raw %}{{ [1, 2] | random }}{% endraw %} ", "{{ [1, 2] | random }} "),
        ("{% if tools %}{{ range(9) | random }}{% endif %}", ""),
        ("{{ [7] | random }} ", "7 "),
    ],
)
def test_chance_that_no_prompt_hangs_on_is_fine(loaded, template, text):
    model = with_template(loaded("llama"), template + "{{ messages[0]['content'] }}")
    assert read(model) == f"{text}Ask Claire Becker"


@pytest.mark.trial(3)
def test_answers_carry_the_hash_of_their_prompts_and_are_used_for_no_others(loaded, prompts, scenario, tmp_path):
    """Scores and head impacts of answers to prompts that the model would read otherwise are refused."""
    model = loaded("llama", numeric=True)
    rows, _ = complete(model, prompts, 3, PARAMETERS, outcome=scenario.outcome)
    assert rows.group_by("prompt_id").agg(pl.col("prompt_hash").n_unique())["prompt_hash"].to_list() == [1] * 12
    assert rows["prompt_hash"].n_unique() == 12
    exact, _ = exact_completions(model, prompts, PARAMETERS, outcome=scenario.outcome)
    assert set(exact.select("prompt_id", "prompt_hash").rows()) == set(rows.select("prompt_id", "prompt_hash").rows())
    other = with_template(model, "Today is Friday. {{ messages[0]['content'] }}")
    options = {"comparison": scenario.comparison, "outcome": scenario.outcome}
    message = r"scenario purchase: the model reads prompt [0-9a-f]{16} otherwise .* materialize completions again"
    for score in file_scores():
        with pytest.raises(ExciseError, match=message):
            attribute(Answered(other, prompts, rows, **options), [score], folder=tmp_path)
    with pytest.raises(ExciseError, match=message):
        head_impacts(Sampled(other, prompts, rows, PARAMETERS), Compared("gap", ["white", "black"]))
    (one,) = attribute(Answered(model, prompts, rows, **options), ["wanda"], folder=tmp_path)[:1]
    hashed = rows.with_columns(prompt_hash=pl.col("prompt_hash").str.to_uppercase())
    with pytest.raises(ExciseError, match=message):
        attribute(Answered(model, prompts, hashed, **options), ["wanda"], folder=tmp_path)
    assert one.path.is_file()


# Where prompts begin and end


def ending_tokenizer(post: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer that begins (<s>) and ends (</s>) texts as `post` says."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["Ask Claire Becker"], trainer)
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in ("<s>", "</s>")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=post, special_tokens=marks)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "<s>[{{ messages[0]['content'] }}]"
    return fast


@pytest.mark.trial(9)
@pytest.mark.parametrize(
    ("post", "begins"),
    [
        ("$A </s>", ""),
        ("<s> $A </s>", "<s>"),
        ("<s> $A", "<s>"),
        ("<s> <s> $A </s> </s>", "<s><s>"),
        ("$A", ""),
    ],
)
def test_a_raw_prompt_begins_as_texts_do_and_does_not_end(loaded, post, begins):
    model = dataclasses.replace(loaded("llama", prompt_format="raw"), tokenizer=ending_tokenizer(post))
    assert read(model) == f"{begins}Ask Claire Becker"
    (prompt,) = encode(model, ASKED)
    assert model.tokenizer.decode(prompt.tokens[slice(*prompt.name)]).strip() == "Claire Becker"
    longer = frame(("Ask {name} now and then", "Claire Becker"))
    cut = model.asked_for(ToxicityOutcome(max_prompt_tokens=len(prompt.tokens) + 2))
    assert encode(cut, longer)[0].tokens == encode(model, longer)[0].tokens[: len(prompt.tokens) + 2]
    whole = model.asked_for(ToxicityOutcome(max_prompt_tokens=100))
    assert encode(whole, ASKED)[0].tokens == prompt.tokens
    chat = dataclasses.replace(model, prompt_format="chat")
    assert read(chat) == "<s>[Ask Claire Becker]"
    windows = text_windows(model, "Ask Claire Becker. " * 5, size=20)
    assert not any(model.tokenizer.eos_token_id in window.tokens for window in windows)
    assert all(model.tokenizer.decode(window.tokens).startswith(begins) for window in windows)


@pytest.mark.trial(9)
def test_a_text_that_has_its_beginning_gets_no_second_one(loaded):
    model = dataclasses.replace(loaded("llama", prompt_format="raw"), tokenizer=ending_tokenizer("<s> $A </s>"))
    assert read(model, frame(("<s>Ask {name}", "Claire Becker"))) == "<s>Ask Claire Becker"


# Names that a model cannot read


def letters(unknown: str | None, normalizer=None) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of ASCII letters; what it does not know is the token `unknown`, or left out."""
    known = [chr(code) for code in range(32, 127)]
    words = {word: number for number, word in enumerate(["</s>", *([unknown] if unknown else []), *known])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[], unk_token=unknown))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token=unknown)


@pytest.mark.trial(30)
@pytest.mark.parametrize("unknown", ["<unk>", None])
@pytest.mark.parametrize(("name", "lost"), [("Оля", "Оля"), ("雅子", "雅子"), ("José", "é"), ("Jo</s>", "</s>")])
def test_a_name_that_the_tokenizer_does_not_read_is_refused(loaded, unknown, name, lost):
    """Otherwise all such names are one to the model, and their answers show no gap."""
    model = dataclasses.replace(loaded("llama", prompt_format="raw"), tokenizer=letters(unknown))
    assert len(encode(model, frame(("Ask {name} about €5", "Anne-Marie O'Neil")))) == 1
    with pytest.raises(ExciseError, match=rf"prompt .* of the model tiny-llama does not read '{lost}' of '{name}'"):
        encode(model, frame(("Ask {name}", "Claire"), ("Ask {name}", name)))


@pytest.mark.trial(30)
def test_names_that_the_tokenizer_reads_alike_are_refused(loaded):
    bare = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()])
    model = dataclasses.replace(loaded("llama", prompt_format="raw"), tokenizer=letters("<unk>", bare))
    one, other = (encode(model, frame(("Ask {name}", name)))[0] for name in ("José", "Jose"))
    assert one.tokens == other.tokens
    with pytest.raises(ExciseError, match="reads 'Jose' and 'José' alike"):
        encode(model, frame(("Ask {name}", "José"), ("Ask {name}", "Anne"), ("Ask {name}", "Jose")))


# Templates that leave no room for the answer


@pytest.mark.trial(32)
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<|user|>{{ messages[0]['content'] }}<|end|>", r"ends a prompt with <\|end\|>, where the model's turn is to"),
        ("{{ messages[0]['content'] }}<|end|>\n", r"ends a prompt with <\|end\|>"),
        ("{{ messages[0]['content'] }}<|user|><think>\n", "has the model think aloud before it answers"),
        ("{{ messages[0]['content'] }} [THINK]", "has the model think aloud"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "prints the text of a prompt more than once"),
    ],
)
def test_a_template_after_which_no_answer_begins_is_refused(loaded, template, message):
    with pytest.raises(ExciseError, match=f"models.yaml: tiny-llama: the chat template {message}"):
        encode(with_template(loaded("llama"), template), ASKED)


@pytest.mark.trial(32)
@pytest.mark.parametrize("end", ["<|end|>\n<|user|>", "<think>\n\n</think>", " [/INST]", ""])
def test_a_template_that_opens_the_answer_is_used(loaded, end):
    text = read(with_template(loaded("llama"), "{{ messages[0]['content'] }}" + end))
    assert text == f"Ask Claire Becker{end}"


# Special tokens within an answer

FORTY_TWO, SEVEN = ("4", "2"), ("7",)


def ids(model, *texts: str) -> list[int]:
    return model.tokenizer.convert_tokens_to_ids(list(texts))


def cached_answer(model, outcome, folder, tokens, prompts=ASKED, finished=True):
    """The row that `complete` makes of an answer with these tokens, which the cache has already."""
    cache, parameters = CompletionCache(folder), dataclasses.replace(PARAMETERS, max_new_tokens=outcome.max_new_tokens)
    loaded = model.asked_for(outcome)
    (prompt,) = encode(loaded, prompts)
    key = _key(prompt)
    answer = [*tokens, *(ids(model, "<|end|>") if finished else [])]
    rows = pl.DataFrame([(key, 0, answer, finished)], schema=CACHE_SCHEMA, orient="row")
    address = cache_address(loaded, None, json.dumps(dataclasses.asdict(parameters), sort_keys=True))
    cache.add(address, rows)
    scored = {} if outcome.kind == "number" else {"scorer": Words()}
    found, work = complete(model, _described(prompts), 1, parameters, outcome=outcome, cache=cache, **scored)
    assert work.drawn == 0
    return found.row(0, named=True)


def _key(prompt) -> str:
    """What a prompt is called in the cache."""
    return hashlib.sha256(json.dumps(list(prompt.tokens)).encode()).hexdigest()[:24]


def _described(prompts: pl.DataFrame) -> pl.DataFrame:
    names = ("scenario", "variation", "template", "group", "subject")
    return prompts.with_columns(pl.lit("x").alias(name) for name in names)


class Words:
    """A scorer that counts words; NaN for none."""

    key, fingerprint, measures = "words", "0" * 16, "words"

    def score(self, texts):
        return np.array([float(len(text.split())) for text in texts])


@pytest.mark.trial(8)
@pytest.mark.parametrize(("between", "finished"), [("<|user|>", True), ("<|pad|>", True), ("<|system|>", False)])
def test_an_answer_ends_at_its_first_special_token(loaded, tmp_path, between, finished):
    """`42`, a special token that does not stop, `7`: not 427. What ended at a mark is no number that was cut off."""
    model = loaded("llama", numeric=True)
    row = cached_answer(model, NUMBER, tmp_path, ids(model, *FORTY_TWO, between, *SEVEN), finished=finished)
    assert (row["text"], row["value"]) == ("42", 42)


@pytest.mark.trial(8)
def test_an_answer_ends_at_the_first_token_that_the_tokenizer_does_not_have(loaded, tmp_path):
    """Embeddings are often padded: 42, a row of the padding, 7 are not 427."""
    model = loaded("llama", numeric=True)
    beyond = len(model.tokenizer)
    assert beyond < model.model.get_input_embeddings().num_embeddings
    row = cached_answer(model, NUMBER, tmp_path, [*ids(model, *FORTY_TWO), beyond, *ids(model, *SEVEN)])
    assert (row["text"], row["value"]) == ("42", 42)


@pytest.mark.trial(8)
def test_an_answer_that_begins_with_a_special_token_is_none(loaded, tmp_path):
    model = loaded("llama", numeric=True)
    row = cached_answer(model, NUMBER, tmp_path, ids(model, "<|user|>", *FORTY_TWO))
    assert (row["text"], row["value"]) == ("", None)


@pytest.mark.trial(8)
def test_a_continuation_ends_at_its_first_special_token(loaded, tmp_path):
    model = loaded("llama")
    tokens = [*model.tokenizer("dear all", add_special_tokens=False)["input_ids"], *ids(model, "<|user|>", "7", "7")]
    row = cached_answer(model, ToxicityOutcome(max_new_tokens=16), tmp_path, tokens)
    assert (row["text"], row["value"]) == ("dear all", 2)


@pytest.mark.trial(8)
def test_an_enumerated_answer_ends_at_its_first_special_token(loaded, tmp_path):
    model = loaded("llama", numeric=True)
    cache = CompletionCache(tmp_path)
    (prompt,) = encode(model, ASKED)
    how = {"answers": "exact", "leftover": 0.01, "max_nodes": 256, "samples": None}
    settings = tree_settings(json.dumps(dataclasses.asdict(PARAMETERS) | how))
    tokens = ids(model, *FORTY_TWO, "<|user|>", *SEVEN)
    row = (_key(prompt), 0, tokens, False, 1.0, 0.0, 1)
    cache.add(cache_address(model, None, settings), pl.DataFrame([row], schema=TREE_CACHE_SCHEMA, orient="row"))
    found, _ = exact_completions(model, _described(ASKED), PARAMETERS, outcome=NUMBER, samples=None, cache=cache)
    assert found.select("text", "value").row(0) == ("42", 42)


@pytest.mark.trial(8)
def test_ordinary_text_that_is_flagged_special_is_text(loaded, tmp_path):
    """Digits, commas, blanks and words without a role: leaving them out would make other numbers."""
    model = loaded("llama", numeric=True)
    folder = tmp_path / "tokenizer"
    model.tokenizer.save_pretrained(folder)
    flagged = transformers.AutoTokenizer.from_pretrained(folder)
    marks = ["5", " ", ",", "$", "million dollars", "Answer", "<|note|>"]
    flagged.add_special_tokens({"additional_special_tokens": marks})
    changed = dataclasses.replace(model, tokenizer=flagged)
    for pieces, text, value in (
        (("1", "5", "0"), "150", 150),
        (("1", "<|note|>", "0"), "1", 1),
        (("Answer", " ", "7"), "Answer 7", 7),
        (("$", "1", ",", "0", "0", "0"), "$1,000", 1000),
        (("5", " ", "million dollars"), "5 million dollars", 5e6),
        (("7", "<|pad|>", "5"), "7", 7),
    ):
        row = cached_answer(changed, NUMBER, tmp_path / text, ids(changed, *pieces))
        assert (row["text"], row["value"]) == (text, value)


# Numbers of the model that are none


@pytest.fixture
def broken(loaded):
    """`broken("llama", value)`: the model while one of its weights has the value."""
    changed = []

    def change(architecture, value, **options):
        model = loaded(architecture, **options)
        weight = model.topology.linear("1.down").weight(model.model)
        changed.append((weight, weight[0, 0].clone()))
        weight[0, 0] = value
        return model

    yield change
    for weight, before in reversed(changed):
        weight[0, 0] = before


WINDOWS = [Window(tuple(range(20, 30)), 5)]
WAYS = {
    "sampled": lambda model, prompts, scenario, folder: complete(
        model, prompts, 2, PARAMETERS, outcome=scenario.outcome, cache=CompletionCache(folder)
    ),
    "greedy": lambda model, prompts, scenario, folder: complete(
        model,
        prompts,
        1,
        dataclasses.replace(PARAMETERS, temperature=0),
        outcome=scenario.outcome,
        cache=CompletionCache(folder),
    ),
    "continuations": lambda model, prompts, scenario, folder: complete(
        model,
        prompts,
        1,
        PARAMETERS,
        outcome=ToxicityOutcome(max_prompt_tokens=200),
        scorer=Words(),
        cache=CompletionCache(folder),
    ),
    "exact": lambda model, prompts, scenario, folder: exact_completions(
        model, prompts, PARAMETERS, outcome=scenario.outcome, cache=CompletionCache(folder)
    ),
    "perplexity": lambda model, prompts, scenario, folder: window_losses(model, WINDOWS),
    "head gradient": lambda model, prompts, scenario, folder: head_gradient(model, WINDOWS),
}


@pytest.mark.trial(10)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_a_broken_weight_is_refused_before_anything_is_stored(broken, prompts, scenario, tmp_path, way, value):
    model = broken("llama", value, numeric=True)
    message = "models.yaml: tiny-llama: the model's logits are not finite in float32: .*dtype: float32"
    with pytest.raises(ExciseError, match=message):
        WAYS[way](model, prompts, scenario, tmp_path / "cache")
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.trial(10)
@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "gpt_neox"])
def test_a_broken_weight_is_seen_in_every_family(broken, prompts, scenario, kind):
    """Gemma 2 caps its logits, which makes infinity finite."""
    with pytest.raises(ExciseError, match=f"models.yaml: tiny-{kind}: the model's logits are not finite"):
        complete(broken(kind, math.inf), prompts, 2, PARAMETERS, outcome=scenario.outcome)


@pytest.mark.trial(10)
def test_the_mask_is_named_under_which_logits_are_not_finite(loaded, prompts, scenario, some_mask, tmp_path):
    """A pruned model may overflow where the whole one does not: here the head is scaled while the mask is on."""
    model, mask = loaded("llama", numeric=True), some_mask(loaded("llama", numeric=True))
    head = model.model.get_output_embeddings()
    hook = head.register_forward_hook(
        lambda module, given, output: output / (model.topology.linear("0.q").weight(model.model) != 0).all()
    )
    try:
        complete(model, prompts, 1, PARAMETERS, outcome=scenario.outcome)
        cache = CompletionCache(tmp_path)
        with pytest.raises(ExciseError, match=f"under the mask {mask.fingerprint}: models.yaml: tiny-llama: .*finite"):
            complete(model, prompts, 1, PARAMETERS, outcome=scenario.outcome, intervention=mask, cache=cache)
    finally:
        hook.remove()
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.trial(10)
@pytest.mark.parametrize("score", file_scores())
def test_scores_of_a_broken_model_are_refused(loaded, broken, prompts, scenario, tmp_path, score):
    """The answers are those of the sound model, so nothing but the scores can tell."""
    model = loaded("llama", numeric=True)
    rows, _ = complete(model, prompts, 5, PARAMETERS, outcome=scenario.outcome)
    with pytest.raises(ExciseError, match="not finite in float32"):
        attribute(
            Answered(broken("llama", math.nan, numeric=True), prompts, rows, scenario.comparison, scenario.outcome),
            [score],
            folder=tmp_path,
        )
    assert not list(tmp_path.rglob(f"{score}/*.safetensors"))


@pytest.mark.trial(10)
def test_head_impacts_of_a_broken_model_are_refused(loaded, broken, prompts, scenario, tmp_path):
    model = loaded("llama", numeric=True)
    rows, _ = complete(model, prompts, 2, PARAMETERS, outcome=scenario.outcome)
    with pytest.raises(ExciseError, match="not finite in float32"):
        head_impacts(
            Sampled(broken("llama", math.nan, numeric=True), prompts, rows, PARAMETERS),
            Compared("gap", ["white", "black"], resamples=2),
            text=Text(WINDOWS),
            folder=tmp_path,
            heads=[(0, 1)],
        )
    weight = model.topology.linear("1.q").weight(model.model)
    before = weight[0, 0].clone()
    try:
        weight[0, 0] = math.nan
        with pytest.raises(ExciseError, match="weights are not finite"):
            head_magnitude(model)
    finally:
        weight[0, 0] = before


def test_a_token_that_a_model_never_gives_is_no_fault(loaded, prompts, scenario):
    """-inf for some tokens is finite enough: they have no probability."""
    model = loaded("llama", numeric=True)
    banned = ids(model, "7")

    def ban(module, given, output):
        output[..., banned] = -math.inf
        return output

    hook = model.model.get_output_embeddings().register_forward_hook(ban)
    try:
        rows, _ = complete(model, prompts, 8, PARAMETERS, outcome=scenario.outcome)
    finally:
        hook.remove()
    assert rows["value"].is_not_null().any()
    assert not rows["token_ids"].list.contains(banned[0]).any()


# Room


@pytest.mark.trial(29)
def test_a_prompt_beyond_the_positions_is_refused_before_any_pass(tiny_model, tmp_path, architecture):
    """Room for all that is read: the prompt and all new tokens but the last."""
    model = _with_positions(tiny_model, tmp_path, architecture, 40)
    passes = []
    model.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    (prompt,) = encode(model, ASKED)
    fits = 40 - len(prompt.tokens) + 1
    outcome = NUMBER.model_copy(update={"max_new_tokens": fits})
    rows, _ = complete(model, _described(ASKED), 2, PARAMETERS, outcome=outcome)
    assert rows.height == 2
    passes.clear()
    outcome = NUMBER.model_copy(update={"max_new_tokens": fits + 1})
    message = (
        rf"prompt 0 \('Ask Claire Becker'\) has {len(prompt.tokens)} tokens and up to {fits + 1} of an answer, more "
        f"than the 40 positions of the model {model.key}; shorten it, or lower max_new_tokens"
    )
    for ask in (complete, exact_completions):
        given = {"samples": 2, "parameters": PARAMETERS, "outcome": outcome}
        with pytest.raises(ExciseError, match=message):
            ask(model, _described(ASKED), **given)
    too_long = dataclasses.replace(PARAMETERS, max_new_tokens=fits + 1)
    with pytest.raises(ExciseError, match=r"prompt 0 has .* more than the 40 positions"):
        sample(model, [prompt.tokens], [[0]], too_long)
    with pytest.raises(ExciseError, match=r"prompt 0 has .* more than the 40 positions"):
        answer_distributions(model, [prompt.tokens], too_long)
    long = dataclasses.replace(PARAMETERS, max_new_tokens=40)
    with pytest.raises(ExciseError, match="more than the 40 positions"):
        complete(model, _described(ASKED), 1, long, outcome=ToxicityOutcome(), scorer=Words())
    with pytest.raises(ExciseError, match="more than the 40 positions"):
        encode(model, frame(("Ask {name}" + " and ask again" * 9, "Claire Becker")))
    long = [Window(tuple(range(20, 61)), 5)]
    for measure in (window_losses, head_gradient):
        with pytest.raises(ExciseError, match="window 0 has 41 tokens, more than the 40 positions"):
            measure(model, long)
    with pytest.raises(ExciseError, match="size 41 is more than the 40 positions"):
        text_windows(model, "Ask Claire Becker. " * 9, size=41)
    assert not passes


def _with_positions(tiny_model, folder, architecture, limit):
    """A tiny model of so many positions: those with a table of positions lose the rest of it."""
    copy = folder / architecture
    shutil.copytree(tiny_model(architecture), copy)
    config = json.loads((copy / "config.json").read_text())
    name = "n_positions" if "n_positions" in config else "max_position_embeddings"
    (copy / "config.json").write_text(json.dumps(config | {name: limit}))
    tensors = load_file(copy / "model.safetensors")
    for key in tensors:
        if key.endswith("wpe.weight"):
            tensors[key] = tensors[key][:limit].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return load_model(ModelSpec(key=f"tiny-{architecture}", folder=copy), {}, device="cpu", home=folder / "home")


@pytest.mark.trial(29)
def test_head_impacts_of_windows_beyond_the_positions_are_refused(tiny_model, tmp_path, prompts, scenario):
    model = _with_positions(tiny_model, tmp_path, "gpt_neox", 200)
    rows, _ = complete(model, prompts, 2, PARAMETERS, outcome=scenario.outcome)
    with pytest.raises(ExciseError, match="window 0 has 201 tokens, more than the 200 positions"):
        head_impacts(
            Sampled(model, prompts, rows, PARAMETERS),
            Compared("gap", ["white", "black"], resamples=2),
            text=Text([Window(tuple([25] * 201), 5)]),
        )


# Seeds


@pytest.mark.trial(33)
@pytest.mark.parametrize("seed", [2**63, 2**64, -1, 1.5])
def test_a_seed_that_no_table_holds_is_refused(seed):
    with pytest.raises(ExciseError, match=re.escape("0 <= seed < 2^63")):
        SamplingParameters(seed=seed)


@pytest.mark.parametrize("temperature", [1e-40, -1.0, math.nan, math.inf])
def test_a_temperature_that_makes_logits_infinite_is_refused(temperature):
    with pytest.raises(ExciseError, match="temperature 0 or >= 1e-6"):
        SamplingParameters(temperature=temperature)


@pytest.mark.trial(33)
def test_the_largest_seed_works(loaded, prompts, scenario):
    model, parameters = loaded("llama", numeric=True), dataclasses.replace(PARAMETERS, seed=2**63 - 1)
    rows, _ = complete(model, prompts, 1, parameters, outcome=scenario.outcome)
    exact, _ = exact_completions(model, prompts, parameters, outcome=scenario.outcome)
    assert rows["seed"].unique().to_list() == exact["seed"].unique().to_list() == [2**63 - 1]


# The beginning of an answer


def begun(scenario, prefix, *, variation=None) -> Scenario:
    fields = scenario.model_dump()
    fields["templates"]["plain"]["answer_prefix"] = prefix
    if variation is not None:
        fields["variations"] = {"car": {"fields": variation}}
    return Scenario.model_validate(fields)


def test_an_answer_is_read_with_its_prefix(loaded, scenario, tmp_path):
    """The prefix stands behind all of the chat format; the number is that of prefix and continuation together."""
    model = loaded("llama", numeric=True)
    prompts = expand(begun(scenario, "For the {item}: $"))
    first = prompts.row(0, named=True)
    assert first["answer_prefix"] == "For the car: $"
    assert read(model, prompts[:1]) == f"<|user|>{first['text']}<|end|><|assistant|>For the car: $"
    assert prompts["prompt_id"].to_list() != expand(scenario)["prompt_id"].to_list()
    plain, primed = encode(model, expand(scenario)), encode(model, prompts)
    assert [each.name for each in plain] == [each.name for each in primed]
    assert not {each.hash for each in plain} & {each.hash for each in primed}
    raw = dataclasses.replace(model, prompt_format="raw")
    assert read(raw, prompts[:1]) == f"{first['text']}For the car: $"


def values_of(model, rows, prefix="-") -> list:
    """What prefix and text name together; what ended at a special token is whole, too."""
    found, special = [], set(model.tokenizer.all_special_ids) | set(ids(model, *SPECIAL_TOKENS))
    for text, finished, tokens in rows.select("text", "finished", "token_ids").iter_rows():
        found.append(parse_completion(prefix + text, finished or bool(special & set(tokens))))
    return found


def test_answers_with_a_prefix_are_drawn_enumerated_and_attributed(loaded, scenario, tmp_path):
    model, prompts = loaded("llama", numeric=True), expand(scenario).with_columns(answer_prefix=pl.lit("-"))
    rows, _ = complete(model, prompts, 6, PARAMETERS, outcome=scenario.outcome)
    drawn = sample(model, [each.tokens for each in encode(model, prompts)], [range(6)] * 12, PARAMETERS)
    assert rows["tokens"].to_list() == [len(draw.tokens) + (draw.stop is not None) for draw in drawn]
    assert rows["value"].to_list() == values_of(model, rows)
    assert (rows["value"] < 0).any()
    exact, _ = exact_completions(
        model, prompts, PARAMETERS, outcome=scenario.outcome, samples=None, cache=CompletionCache(tmp_path / "cache")
    )
    assert exact["value"].to_list() == values_of(model, exact)
    again, work = exact_completions(
        model, prompts, PARAMETERS, outcome=scenario.outcome, samples=None, cache=CompletionCache(tmp_path / "cache")
    )
    assert again.equals(exact)
    assert work.drawn == 0
    linear = scenario.outcome.model_copy(update={"scale": "linear"})
    files = attribute(Answered(model, prompts, rows, scenario.comparison, linear), ["gap_gradient"], folder=tmp_path)
    assert [file.variation for file in files] == ["car", "oven"]


def test_one_prompt_whose_parts_are_divided_otherwise_has_other_answers(loaded, scenario):
    """Two raw prompts of the same tokens, of which one has its last character as the beginning of the answer."""
    model = loaded("llama", numeric=True, prompt_format="raw")
    prompts = expand(scenario)[:1]
    two = pl.concat(
        [
            prompts.with_columns(text=pl.col("text") + "-"),
            prompts.with_columns(answer_prefix=pl.lit("-"), prompt_id=pl.lit("other")),
        ]
    )
    rows, work = complete(model, two, 8, PARAMETERS, outcome=scenario.outcome)
    assert work.drawn == 8
    exact, _ = exact_completions(model, two, PARAMETERS, outcome=scenario.outcome, samples=None)
    for found in (rows, exact):
        plain, primed = found.partition_by("prompt_id", maintain_order=True)
        assert plain["text"].to_list() == primed["text"].to_list()
        assert plain["value"].to_list() == values_of(model, plain, "")
        assert primed["value"].to_list() == values_of(model, primed)
        assert plain["value"].to_list() != primed["value"].to_list()


def test_a_word_and_a_number_do_not_touch(loaded, scenario, tmp_path):
    """Some tokenizers drop the blank before a text's first word: "is" and "500" are no word."""
    prompts = expand(begun(scenario, "My offer is"))[:1]
    model = loaded("llama", numeric=True)
    row = cached_answer(model, scenario.outcome, tmp_path, ids(model, "5", "0", "0"), prompts)
    assert (row["text"], row["value"]) == ("500", 500)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("About 5", "holds a number ('About 5'), which would be read as the answer"),
        ("Two hundred", "holds a number ('Two hundred')"),
        ("٣ ", "holds a number"),
        ("For {name}: $", "holds {name}: the name stands in the text"),
        ("For {thing}: $", "holds {thing}, which the variation car does not give: known here are {item}"),
        ("\\boxed{", "for a brace in the text write it twice"),
        ("Price -", "behind 'Price -' the answer 50 is read as -50.0: leave out what changes it"),
        ("minus ", "is read as -50.0"),
        ("half of ", "is read as no number"),
        ("$\u202e", "holds a mark that changes the direction of the text (U+202E)"),
    ],
)
def test_prefixes_that_would_falsify_are_refused(scenario, prefix, message):
    with pytest.raises(ValueError, match=r"templates\.plain\.answer_prefix.*" + re.escape(message)):
        begun(scenario, prefix)


def test_a_number_in_a_field_counts_and_a_doubled_brace_does_not(scenario):
    with pytest.raises(ValueError, match=re.escape("answer_prefix holds a number ('For 2 cars: $')")):
        begun(scenario, "For {item}: $", variation={"item": "2 cars"})
    boxed = expand(begun(scenario, "\\boxed{{\\$"))
    assert boxed["answer_prefix"].unique().to_list() == ["\\boxed{\\$"]
