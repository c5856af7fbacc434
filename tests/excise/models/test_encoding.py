"""A prompt's tokens are the model's own chat format, and the name's tokens are exactly those that carry the name."""

import dataclasses

import polars as pl
import pytest
import tokenizers
import transformers

from excise.errors import ExciseError
from excise.models.encoding import PINNED_DATE, encode
from excise.outcomes import NumberOutcome, ToxicityOutcome

NAMES = ["D'Andre Washington", "Claire Becker", "Zoë O’Brien-Núñez", "Li", "A", "李 小龍", "Mr. 3 <|x|>", "Ng"]
TEXTS = [
    "{name} offers a car.",
    "A car is offered by {name}.",
    "Ask {name}",
    "{name}",
    "Is it ({name})'s?",
    "By:{name}\nNow",
]


def frame(*pairs: tuple[str, str]) -> pl.DataFrame:
    rows = [
        (f"{index}", text.format(name=name), text.index("{name}"), text.index("{name}") + len(name))
        for index, (text, name) in enumerate(pairs)
    ]
    return pl.DataFrame(rows, schema=["prompt_id", "text", "name_start", "name_end"], orient="row")


def metaspace_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the Llama 2 kind: the blank before a word belongs to the word, and a BOS is added."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator([*NAMES[:2], "A car is offered by"] * 5, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fast.chat_template = "<s>[INST] {{ messages[0]['content'] }} [/INST]"
    return fast


@pytest.fixture(params=["byte-level", "metaspace"])
def asked(request, loaded):
    """`asked(prompt_format)`: a model with one of two kinds of tokenizer."""

    def make(prompt_format):
        model = loaded("llama", prompt_format=prompt_format)
        return model if request.param == "byte-level" else dataclasses.replace(model, tokenizer=metaspace_tokenizer())

    return make


def whole_text(loaded, text: str) -> str:
    if loaded.prompt_format == "raw":
        return text
    turns = [{"role": "user", "content": text}]
    return loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("prompt_format", ["raw", "chat"])
@pytest.mark.parametrize("name", NAMES)
def test_the_span_carries_the_name_and_nothing_but_it(asked, prompt_format, name):
    """By decoding: the span reads as the name, and less of it does not."""
    loaded = asked(prompt_format)
    prompts = frame(*((text, name) for text in TEXTS))
    for text, prompt in zip(prompts["text"], encode(loaded, prompts), strict=True):
        whole = whole_text(loaded, text)
        assert list(prompt.tokens) == loaded.tokenizer(whole, add_special_tokens=prompt_format == "raw")["input_ids"]
        start, end = prompt.name
        assert loaded.tokenizer.decode(prompt.tokens[start:end]).strip() == name
        if text.startswith(name) and not loaded.tokenizer.decode(prompt.tokens[start : start + 1]).strip():
            start += 1  # the blank such a tokenizer puts before a text has the offsets of its first letter
        for shorter in (prompt.tokens[start + 1 : end], prompt.tokens[start : end - 1]):
            assert loaded.tokenizer.decode(shorter).strip() != name


def test_a_name_with_an_apostrophe_by_hand(loaded):
    """Every character but some merged ones is a token of its own in the tiny tokenizer."""
    loaded = loaded("llama", prompt_format="raw")
    (prompt,) = encode(loaded, frame(("Ask {name}!", "D'Andre Washington")))
    pieces = loaded.tokenizer.convert_ids_to_tokens(prompt.tokens)
    start, end = prompt.name
    assert "".join(pieces[start:end]).replace("Ġ", " ").strip() == "D'Andre Washington"
    assert "".join(pieces[:start]).replace("Ġ", " ").strip() == "Ask"
    assert "".join(pieces[end:]) == "!"


def test_chat_prompts_are_one_user_turn_without_a_system_prompt(loaded):
    model = loaded("llama")
    (prompt,) = encode(model, frame(("Ask {name}", "Claire Becker")))
    assert model.tokenizer.decode(prompt.tokens) == "<|user|>Ask Claire Becker<|end|><|assistant|>"
    raw = loaded("llama", prompt_format="raw")
    (prompt,) = encode(raw, frame(("Ask {name}", "Claire Becker")))
    assert raw.tokenizer.decode(prompt.tokens) == "Ask Claire Becker"


def test_special_tokens_are_added_once(asked):
    """A chat template writes its own BOS; a raw prompt gets the tokenizer's."""
    for prompt_format in ("raw", "chat"):
        loaded = asked(prompt_format)
        if loaded.tokenizer.bos_token == "<s>":
            (prompt,) = encode(loaded, frame(("Ask {name}", "Claire Becker")))
            assert prompt.tokens.count(loaded.tokenizer.bos_token_id) == 1
            assert prompt.tokens[0] == loaded.tokenizer.bos_token_id


def with_template(loaded, template: str):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=loaded.tokenizer.backend_tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(loaded, tokenizer=tokenizer)


def test_a_template_that_prints_the_date_gets_a_fixed_one(loaded):
    dated = with_template(loaded("llama"), "Today: {{ date_string }}. {{ messages[0]['content'] }}")
    (prompt,) = encode(dated, frame(("Ask {name}", "Claire Becker")))
    assert dated.tokenizer.decode(prompt.tokens) == f"Today: {PINNED_DATE}. Ask Claire Becker"


def test_a_template_that_changes_the_text_is_said(loaded):
    shouting = with_template(loaded("llama"), "{{ messages[0]['content'] | upper }}")
    with pytest.raises(ExciseError, match=r"tiny-llama: the chat template changes the text .* chat_template"):
        encode(shouting, frame(("Ask {name}", "Claire Becker")))


def test_prompts_keep_their_order_and_ids(loaded, prompts):
    encoded = encode(loaded("llama"), prompts.reverse())
    assert [prompt.prompt_id for prompt in encoded] == prompts["prompt_id"].reverse().to_list()
    assert encode(loaded("llama"), prompts) == encoded[::-1]


def test_continuations_are_asked_for_with_a_raw_prompt_that_is_cut(loaded):
    model = loaded("llama")
    prompts = frame(("{name} offers a car, and", "Claire Becker"), ("A car is offered by somebody called {name}", "Li"))
    whole = encode(dataclasses.replace(model, prompt_format="raw"), prompts)
    cut = encode(model.asked_for(ToxicityOutcome(max_prompt_tokens=8)), prompts[:1])
    assert cut[0].tokens == whole[0].tokens[:8]
    assert cut[0].name == whole[0].name
    last = whole[1].name[1]
    assert encode(model.asked_for(ToxicityOutcome(max_prompt_tokens=last)), prompts)[1].name == whole[1].name
    with pytest.raises(ExciseError, match=rf"is cut behind {last - 1} tokens, .* 'Li': .* raise outcome.max_prompt_"):
        encode(model.asked_for(ToxicityOutcome(max_prompt_tokens=last - 1)), prompts)
    number = NumberOutcome(unit="USD", low=1, high=9, scale="log", better="higher")
    assert model.asked_for(number) is model
