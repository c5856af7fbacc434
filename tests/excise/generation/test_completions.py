"""Completions: every prompt's answers as rows, and a cache that never draws one twice nor gives a wrong one."""

import json
import time

import polars as pl
import pytest

from excise.errors import ExciseError
from excise.generation.completions import COMPLETIONS_SCHEMA, CompletionCache, Work, complete
from excise.generation.sampling import SamplingParameters, sample
from excise.models.encoding import encode, reader
from excise.outcomes.answers import parse_completion
from excise.scenarios import expand

WARM = SamplingParameters(temperature=1.0, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded("llama", numeric=True)


@pytest.fixture
def ask(model, prompts, scenario, tmp_path):
    """`ask(samples=4, ...)`: complete with a cache in a fresh folder; returns rows and work."""

    def run(samples=4, *, frame=prompts, parameters=WARM, loaded=model, cached=True, **options):
        cache = CompletionCache(tmp_path / "cache") if cached else None
        options = {"outcome": scenario.outcome, "batch_prompts": 5} | options
        return complete(loaded, frame, samples, parameters, cache=cache, **options)

    return run


def files(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.parquet"))


# Rows


def test_rows_are_the_drawn_answers(model, prompts, scenario, ask):
    rows, work = ask(cached=False)
    assert rows.schema == COMPLETIONS_SCHEMA
    assert rows.height == prompts.height * 4 == work.drawn
    assert rows["prompt_id"].to_list() == [each for each in prompts["prompt_id"] for _ in range(4)]
    assert rows["sample"].to_list() == list(range(4)) * prompts.height
    encoded = encode(model, prompts)
    parameters = SamplingParameters(**{**vars(WARM), "max_new_tokens": scenario.outcome.max_new_tokens})
    draws = sample(model, [prompt.tokens for prompt in encoded], [range(4)] * len(encoded), parameters)
    assert rows["token_ids"].to_list() == [[*draw.tokens, *([draw.stop] if draw.stop else [])] for draw in draws]
    assert rows["finished"].to_list() == [draw.stop is not None for draw in draws]
    assert rows["tokens"].to_list() == rows["token_ids"].list.len().to_list()
    read = [reader(model)(draw.tokens) for draw in draws]
    assert rows["text"].to_list() == [text for text, _ in read]
    ended = [finished or special for finished, (_, special) in zip(rows["finished"], read, strict=True)]
    values = [parse_completion(text, end) for text, end in zip(rows["text"], ended, strict=True)]
    assert rows["value"].to_list() == values
    assert rows["prompt_hash"].to_list() == [prompt.hash for prompt in encoded for _ in range(4)]
    assert any(value is None for value in values)
    assert sum(value is not None for value in values) > 2
    assert rows.select("scenario", "variation", "template", "group", "subject").rows() == [
        row for row in prompts.select("scenario", "variation", "template", "group", "subject").rows() for _ in range(4)
    ]
    for name, value in {"model": "tiny-llama", "seed": 3, "model_fingerprint": model.fingerprint}.items():
        assert rows[name].unique().to_list() == [value]
    (settings,) = rows["parameters"].unique().to_list()
    assert SamplingParameters(**json.loads(settings)) == parameters
    assert parameters.max_new_tokens == 4 != WARM.max_new_tokens


def test_stop_tokens_are_counted_but_not_read(ask):
    rows, _ = ask()
    finished = rows.filter("finished")
    assert (finished["token_ids"].list.last() == 1).all()
    assert not rows["text"].str.contains("<|end|>", literal=True).any()
    assert not rows.filter(~pl.col("finished"))["token_ids"].list.contains(1).any()
    assert (rows.filter(~pl.col("finished"))["tokens"] == 4).all()


def test_ranks_are_scored_from_the_top(model, prompts, scenario, ask):
    plain, _ = ask()
    ranked = scenario.outcome.model_copy(update={"scale": "linear", "better": "lower", "reverse_from": 101.0})
    rows, work = ask(outcome=ranked)
    assert work.drawn == 0  # the answers are the same, only their value is another
    assert rows["value"].to_list() == [None if value is None else 101 - value for value in plain["value"]]


def test_an_answer_is_the_same_with_and_without_a_cache(ask):
    assert ask(cached=False)[0].equals(ask()[0])
    assert ask(cached=False, batch_prompts=1)[0].equals(ask()[0])


def test_a_mask_changes_the_answers_and_leaves_the_model(model, prompts, scenario, ask, some_mask):
    mask = some_mask(model)
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    rows, _ = ask(intervention=mask)
    assert all(parameter.equal(before[name]) for name, parameter in model.model.named_parameters())
    with mask.applied(model):
        assert ask(cached=False)[0].equals(rows)
    assert not ask()[0]["text"].equals(rows["text"])


# The cache


def test_a_second_call_draws_nothing(ask, tmp_path):
    rows, work = ask()
    assert (work.drawn, work.reused, work.tokens) == (rows.height, 0, rows["tokens"].sum())
    again, free = ask()
    assert again.equals(rows)
    assert (free.drawn, free.reused, free.tokens, free.seconds) == (0, rows.height, 0, 0.0)
    assert len(files(tmp_path)) == 3  # one per batch of the first call
    assert CompletionCache(tmp_path / "cache").size() == sum(file.stat().st_size for file in files(tmp_path))


def test_more_samples_and_more_names_cost_the_new_ones(ask, prompts):
    few = prompts.filter(pl.col("subject") != "Jamal Washington")
    first, work = ask(2, frame=few)
    assert work.drawn == 20
    _, work = ask(3, frame=few)
    assert (work.drawn, work.reused) == (10, 20)
    rows, work = ask(3)
    assert (work.drawn, work.reused) == (6, 30)
    assert rows.equals(ask(3, cached=False)[0])
    fewer, work = ask(2, frame=few)
    assert (work.drawn, work.reused) == (0, 20)
    assert fewer.equals(first)


def test_what_decides_an_answer_decides_its_address(ask, model, loaded, some_mask):
    """Another mask, model or parameter draws anew; the tokens an answer may have come from the outcome."""
    from dataclasses import replace

    ask()
    others = [
        {"intervention": some_mask(model, seed=1)},
        {"intervention": some_mask(model, seed=2)},
        {"intervention": some_mask(model, density=0.0)},
        {"loaded": replace(model, fingerprint="0" * 16)},
        *(
            {"parameters": replace(WARM, **change)}
            for change in ({"seed": 4}, {"temperature": 0.9}, {"top_k": 5}, {"top_p": 0.9})
        ),
    ]
    for other in others:
        assert ask(**other)[1].reused == 0, other
    assert ask(parameters=replace(WARM, max_new_tokens=99))[1].drawn == 0
    for other in others:
        assert ask(**other)[1].drawn == 0, other


def test_the_outcome_s_length_is_part_of_the_address(ask, scenario):
    ask()
    longer = scenario.outcome.model_copy(update={"max_new_tokens": 5})
    assert ask(outcome=longer)[1].reused == 0


def test_the_same_text_under_two_names_is_drawn_once(ask, prompts):
    """Rows of both, from the same answers."""
    twin = prompts.head(1).with_columns(prompt_id=pl.lit("twin"), subject=pl.lit("Someone Else"))
    rows, work = ask(frame=pl.concat([prompts.head(2), twin]))
    assert (work.drawn, work.reused) == (8, 4)
    assert rows["prompt_id"].to_list() == [each for each in (*prompts["prompt_id"][:2], "twin") for _ in range(4)]
    assert rows["text"].to_list()[:4] == rows["text"].to_list()[8:]
    assert rows["subject"].to_list()[8:] == ["Someone Else"] * 4


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_an_interrupted_run_goes_on_where_it_was(ask, calls):
    undisturbed, _ = ask(cached=False)
    seen = []

    def interrupt(label, done, total):
        seen.append((done, total))
        if len(seen) > calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(progress=interrupt)
    kept = 20 * calls
    reports = []
    rows, work = ask(progress=lambda *each: reports.append(each), label="again")
    assert (work.drawn, work.reused) == (max(48 - kept, 0), min(kept, 48))
    assert rows.equals(undisturbed)
    assert reports[0] == ("again", min(kept, 48), 48)
    assert reports[-1] == ("again", 48, 48)


def test_a_run_that_fails_under_a_mask_gives_the_weights_back(ask, model, some_mask):
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}

    def interrupt(label, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(intervention=some_mask(model), progress=interrupt)
    assert all(parameter.equal(before[name]) for name, parameter in model.model.named_parameters())


def test_half_written_files_are_ignored(ask, tmp_path):
    rows, _ = ask()
    folder = files(tmp_path)[0].parent
    (folder / ".0123.partial").write_bytes(b"half of a file")
    again, work = ask()
    assert work.drawn == 0
    assert again.equals(rows)
    assert not list(folder.glob(".*.partial"))[1:]


def test_two_processes_may_have_drawn_the_same(ask, tmp_path):
    """Both files are there afterwards; every answer still counts once."""
    rows, _ = ask()
    one = files(tmp_path)[0]
    (one.parent / "another.parquet").write_bytes(one.read_bytes())
    again, work = ask()
    assert again.equals(rows)
    assert (work.drawn, work.reused) == (0, rows.height)


def test_a_cache_that_cannot_be_written_is_said(ask, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(ExciseError, match=r"cache.*cannot be written .* EXCISE_DATA"):
        ask()


def test_no_samples_are_no_rows(ask):
    rows, work = ask(0)
    assert rows.is_empty()
    assert rows.schema == COMPLETIONS_SCHEMA
    assert (work.drawn, work.reused) == (0, 0)


def test_a_name_more_in_the_scenario_costs_that_name(ask, scenario):
    """From the scenario on: the prompts of the other names keep their answers."""
    _, work = ask(frame=expand(scenario, subjects_per_group=2))
    assert work.drawn == 2 * 2 * 2 * 4
    _, work = ask(frame=expand(scenario))
    assert (work.drawn, work.reused) == (16, 32)


# Work


def test_work_adds_up_and_gives_rates_only_where_something_was_drawn():
    total = Work(10, 2, 2.0, 50, 2**20 * 3) + Work(0, 5, 0.0, 0, 2**20 * 2)
    assert total == Work(10, 7, 2.0, 50, 2**20 * 3)
    assert total.metadata() == {
        "completions_drawn": 10,
        "completions_reused": 7,
        "sampling_seconds": 2.0,
        "peak_memory_mb": 3,
        "completions_per_second": 5.0,
        "tokens_per_second": 25.0,
    }
    assert set(Work(0, 5).metadata()) == {
        "completions_drawn",
        "completions_reused",
        "sampling_seconds",
        "peak_memory_mb",
    }


def test_work_measures_time_and_memory(ask):
    started = time.perf_counter()
    _, work = ask()
    assert 0 < work.seconds <= time.perf_counter() - started
    assert work.peak_memory_bytes > 2**26


def test_a_damaged_file_of_the_cache_is_named(tmp_path):
    cache = CompletionCache(tmp_path)
    cache.add("model/mask", pl.DataFrame({"prompt": ["a"], "sample": [0], "token_ids": [[1]], "finished": [True]}))
    assert cache.read("model/mask").height == 1
    (file,) = tmp_path.rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ExciseError, match=f"{file.name}: is damaged .*; delete this file"):
        cache.read("model/mask")
