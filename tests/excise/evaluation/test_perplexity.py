"""Perplexity is what the model's own loss says, over windows in which every token counts as often as it should."""

import copy
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from excise.errors import ExciseError
from excise.evaluation import perplexity as module
from excise.evaluation.perplexity import (
    LossCache,
    Window,
    paper_windows,
    perplexity,
    perplexity_difference,
    perplexity_interval,
    sliding_windows,
    text_windows,
    window_losses,
)
from excise.evaluation.texts import read_text
from excise.interventions.heads import heads_mask

TEXT = "The train to Stanmere is late again, and the clerk at the window knows why. " * 4


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(5, 300, count).tolist()


def own_loss(loaded, window, ignored=None) -> float:
    """Mean loss by transformers, with labels of -100 for all tokens but the last `scored` ones."""
    tokens = torch.tensor([window.tokens])
    labels = tokens.clone()
    labels[:, : len(window.tokens) - window.scored if ignored is None else ignored] = -100
    with torch.inference_mode():
        return float(loaded.model(input_ids=tokens, labels=labels).loss)


# --- windows ---------------------------------------------------------------------------------------------------------


def test_sliding_windows_by_hand():
    assert sliding_windows(range(9), size=4, stride=2) == [
        Window((0, 1, 2, 3), 3),
        Window((2, 3, 4, 5), 2),
        Window((4, 5, 6, 7), 2),
        Window((6, 7, 8), 1),
    ]
    assert sliding_windows([7, 8, 9], size=100, stride=50) == [Window((7, 8, 9), 2)]


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_sliding_windows_score_every_token_but_the_first_once_with_enough_context(count, size, data):
    stride = data.draw(st.integers(1, size - 1))
    windows = sliding_windows(range(count), size, stride)
    assert [token for window in windows for token in window.tokens[-window.scored :]] == list(range(1, count))
    assert all(1 <= window.scored < len(window.tokens) <= size for window in windows)
    assert all(len(window.tokens) - window.scored >= size - stride for window in windows[1:])


@pytest.mark.parametrize(("size", "stride"), [(4, 4), (4, 0), (1, 1)])
def test_windows_need_room_for_context(size, stride):
    with pytest.raises(ExciseError, match="stride"):
        sliding_windows(range(9), size, stride)


def test_paper_windows_leave_out_text_where_a_quarter_of_the_positions_is_shorter_than_the_stride():
    windows = paper_windows(range(1300), 1024)
    assert [(window.tokens[0], len(window.tokens), window.scored) for window in windows] == [
        (0, 256, 255),
        (512, 256, 255),
        (1024, 256, 255),
    ]


def test_paper_windows_overlap_where_it_is_longer():
    windows = paper_windows(range(1700), 4096)
    assert [(window.tokens[0], len(window.tokens), window.scored) for window in windows] == [
        (0, 1024, 1023),
        (512, 1024, 512),
        (1024, 676, 164),
    ]


def test_a_last_paper_window_of_one_token_has_no_loss_and_is_left_out():
    assert [len(window.tokens) for window in paper_windows(range(513), 1024)] == [256]


def test_a_text_of_one_token_has_no_perplexity():
    for cut in (lambda: sliding_windows([3], 4, 2), lambda: paper_windows([3], 1024)):
        with pytest.raises(ExciseError, match="at least two"):
            cut()


def test_text_windows_keep_to_the_models_positions(loaded):
    small = loaded("llama", config={"max_position_embeddings": 64})
    windows = text_windows(small, TEXT)
    tokens = small.tokenizer(TEXT)["input_ids"]
    assert windows == sliding_windows(tokens, 64, 32)
    with pytest.raises(ExciseError, match="64 positions"):
        text_windows(small, TEXT, size=65)
    with pytest.raises(ExciseError, match="64 positions"):
        window_losses(small, [Window(tuple(tokens[:65]), 3)])
    assert text_windows(small, TEXT, mode="paper") == paper_windows(tokens, 64)


def test_text_windows_of_the_beginning_of_a_text(loaded):
    tiny = loaded("gpt2")
    tokens = tiny.tokenizer(TEXT)["input_ids"]
    assert text_windows(tiny, TEXT, limit_tokens=50, size=20, stride=5) == sliding_windows(tokens[:50], 20, 5)
    with pytest.raises(ExciseError, match="limit_tokens"):
        text_windows(tiny, TEXT, limit_tokens=1)
    with pytest.raises(ExciseError, match="mode 'slide'"):
        text_windows(tiny, TEXT, mode="slide")
    with pytest.raises(ExciseError, match="own size"):
        text_windows(tiny, TEXT, mode="paper", size=20)


def test_windows_begin_as_the_tokenizer_begins_texts(loaded):
    from tokenizers.processors import TemplateProcessing

    tiny = loaded("llama")
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", 2)]
    )
    opened = replace(tiny, tokenizer=tokenizer)
    plain = text_windows(tiny, TEXT, size=31, stride=10)
    assert text_windows(opened, TEXT, size=32, stride=10) == [
        Window((2, *window.tokens), window.scored) for window in plain
    ]
    paper = text_windows(opened, TEXT, mode="paper")
    assert [window.tokens[0] == 2 for window in paper] == [True]
    assert paper[0].tokens[1:] == tuple(tiny.tokenizer(TEXT)["input_ids"])[: len(paper[0].tokens) - 1]


# --- losses ----------------------------------------------------------------------------------------------------------


def test_losses_are_the_models_own(loaded, architecture):
    tiny = loaded(architecture)
    windows = sliding_windows(random_tokens(90), size=40, stride=15)
    assert len({len(window.tokens) for window in windows}) > 1
    expected = [own_loss(tiny, window) * window.scored for window in windows]
    for batch in (None, 1, 2):
        np.testing.assert_allclose(window_losses(tiny, windows, batch=batch), expected, rtol=2e-5)


def test_a_window_may_fill_all_positions_of_a_model(loaded):
    tiny = loaded("gpt2")
    window = Window(tuple(random_tokens(1024)), 1023)
    np.testing.assert_allclose(window_losses(tiny, [window]), own_loss(tiny, window) * 1023, rtol=2e-5)


def test_windows_of_equal_length_may_score_different_numbers_of_tokens(loaded):
    tiny = loaded("gpt_neox")
    tokens = tuple(random_tokens(30))
    windows = [Window(tokens, 29), Window(tokens[:7], 6), Window(tokens, 1), Window(tokens[::-1], 12)]
    expected = [own_loss(tiny, window) * window.scored for window in windows]
    np.testing.assert_allclose(window_losses(tiny, windows), expected, rtol=2e-5)


def test_logits_in_chunks_change_nothing(loaded, monkeypatch):
    tiny = loaded("gemma2")
    windows = sliding_windows(random_tokens(70), size=30, stride=10)
    whole = window_losses(tiny, windows)
    monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", 304 * 7)
    np.testing.assert_allclose(window_losses(tiny, windows), whole, rtol=1e-6)


def test_running_out_of_memory_only_makes_batches_smaller(loaded, monkeypatch):
    tiny, windows = loaded("llama"), sliding_windows(random_tokens(90), size=20, stride=10)
    whole, original, sizes, seen = window_losses(tiny, windows), module._batch_losses, [], []

    def scarce(loaded, batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too much")
        return original(loaded, batch)

    monkeypatch.setattr(module, "_batch_losses", scarce)
    losses = window_losses(tiny, windows, progress=lambda label, done, total: seen.append((done, total)))
    np.testing.assert_allclose(losses, whole, rtol=1e-6)
    assert max(sizes) > 2
    assert sizes[-1] <= 2
    assert seen[0] == (0, len(windows))
    assert seen[-1] == (len(windows), len(windows))


def test_a_window_without_a_scored_token_is_refused(loaded):
    for window in (Window((5, 6), 0), Window((5, 6), 2)):
        with pytest.raises(ExciseError, match="window 0"):
            window_losses(loaded("gpt2"), [window])


# --- perplexity ------------------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(loaded):
    tiny = loaded("gpt_neo")
    blank = replace(tiny, model=copy.deepcopy(tiny.model))
    blank.model.get_output_embeddings().weight = torch.nn.Parameter(
        torch.zeros_like(blank.model.get_output_embeddings().weight), requires_grad=False
    )
    for mode in ("sliding", "paper"):
        windows = text_windows(blank, TEXT, mode=mode)
        assert perplexity(window_losses(blank, windows), windows, mode) == pytest.approx(304, rel=1e-5)


def test_sliding_perplexity_is_a_mean_over_tokens_and_the_papers_one_over_windows():
    windows = [Window((1, 2), 1), Window((1, 2, 3, 4), 3)]
    losses = np.array([1.0, 9.0])
    assert perplexity(losses, windows) == pytest.approx(math.exp(10 / 4))
    assert perplexity(losses, windows, "paper") == pytest.approx(math.exp((1 + 3) / 2))


@pytest.mark.parametrize("positions", [1024, 4096])
def test_paper_perplexity_is_the_exponential_of_the_mean_of_the_models_losses(loaded, positions):
    tiny = loaded("llama", config={"max_position_embeddings": positions})
    tokens = random_tokens(1700)
    windows = paper_windows(tokens, positions)
    # A label is ignored if it lies more than (end of this window - end of the one before) from the end.
    ends = [0, *(tokens_end for tokens_end in (min(512 * k + positions // 4, 1700) for k in range(len(windows))))]
    ignored = [
        max(0, len(window.tokens) - (end - before))
        for window, before, end in zip(windows, ends, ends[1:], strict=False)
    ]
    losses = [own_loss(tiny, window, count) for window, count in zip(windows, ignored, strict=True)]
    assert perplexity(window_losses(tiny, windows), windows, "paper") == pytest.approx(
        math.exp(np.mean(losses)), rel=1e-5
    )


def test_an_interval_is_wide_where_windows_differ_and_closed_where_they_do_not():
    windows = [Window(tuple(range(11)), 10)] * 40
    even = perplexity_interval(np.full(40, 30.0), windows)
    assert (even.low, even.high) == pytest.approx((math.exp(3), math.exp(3)))
    assert even.standard_error == pytest.approx(0, abs=1e-9)
    losses = np.random.default_rng(0).normal(30, 5, 40)
    uneven = perplexity_interval(losses, windows)
    assert uneven.low < uneven.estimate == perplexity(losses, windows) < uneven.high
    # By the delta method: the perplexity times the standard error of the mean loss per token.
    assert uneven.standard_error == pytest.approx(uneven.estimate * losses.std() / 10 / math.sqrt(40), rel=0.1)
    assert perplexity_interval(losses, windows) == uneven


def test_a_difference_is_paired_so_that_the_texts_difficulty_cancels():
    windows = [Window(tuple(range(11)), 10)] * 40
    losses = np.random.default_rng(1).normal(30, 8, 40)
    change = perplexity_difference(losses, losses + 10 * math.log(1.1), windows, relative=True)
    assert (change.estimate, change.low, change.high) == pytest.approx((1 / 1.1 - 1,) * 3)
    assert change.standard_error == pytest.approx(0, abs=1e-9)
    assert perplexity_interval(losses, windows).standard_error > 1
    points = perplexity_difference(losses, losses + 1, windows)
    assert points.estimate == pytest.approx(perplexity(losses, windows) - perplexity(losses + 1, windows))
    assert points.low < points.estimate < points.high < 0


def test_one_window_has_a_perplexity_but_no_interval():
    alone = perplexity_interval(np.array([3.0]), [Window((1, 2, 3, 4), 3)])
    assert alone.estimate == pytest.approx(math.e)
    assert np.isnan([alone.low, alone.high, alone.standard_error]).all()


def test_losses_belong_to_their_windows():
    with pytest.raises(ExciseError, match="one loss per window"):
        perplexity(np.zeros(3), [Window((1, 2), 1)])
    with pytest.raises(ExciseError, match="one loss per window"):
        perplexity(np.zeros(0), [])
    with pytest.raises(ExciseError, match="mode"):
        perplexity(np.zeros(1), [Window((1, 2), 1)], "other")


# --- texts -----------------------------------------------------------------------------------------------------------


def test_the_embedded_text_is_long_and_does_not_repeat_itself():
    text = read_text()
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    assert 3500 <= len(text.split()) <= 5000
    assert len(set(paragraphs)) == len(paragraphs) > 50


def test_a_text_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Größe\n = Heading = \n", encoding="utf-8")
    assert read_text(path) == read_text(str(path)) == "Größe\n = Heading = \n"


def test_files_without_text_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    for name, message in (("latin.txt", "UTF-8"), ("empty.txt", "no text"), ("missing.txt", "cannot be read")):
        with pytest.raises(ExciseError, match=rf"{name}.*{message}"):
            read_text(tmp_path / name)


def test_a_data_set_needs_its_library_and_a_whole_address(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ExciseError, match="pip install datasets"):
        read_text("hub:Salesforce/wikitext/wikitext-2-raw-v1/validation/text")
    with pytest.raises(ExciseError, match="hub:name/config/split/column"):
        read_text("hub:wikitext/validation")


# --- the cache -------------------------------------------------------------------------------------------------------


def test_losses_under_a_mask_are_computed_once_and_are_those_of_the_pruned_model(loaded, tmp_path, monkeypatch):
    model = loaded("gpt2")
    windows = text_windows(model, TEXT, size=20, stride=10)
    mask = heads_mask(np.array([[True, False, False, True]] + [[False] * 4] * 2), "zero_output")
    cache = LossCache(tmp_path / "losses")
    plain, without = cache.window_losses(model, windows), cache.window_losses(model, windows, mask)
    np.testing.assert_array_equal(plain, window_losses(model, windows))
    with mask.applied(model):
        np.testing.assert_array_equal(without, window_losses(model, windows))
    assert np.abs(without - plain).max() > 1e-3
    monkeypatch.setattr(module, "window_losses", None)  # from here on nothing can be computed
    np.testing.assert_array_equal(cache.window_losses(model, windows, mask), without)
    np.testing.assert_array_equal(LossCache(tmp_path / "losses").window_losses(model, windows), plain)
    with pytest.raises(TypeError):
        cache.window_losses(model, windows[:-1], mask)
