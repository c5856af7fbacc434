"""Our draws are those of transformers' `generate`: token for token when greedy, in distribution when sampled.

And what `generate` does not promise: the same answers at any batch size, in any order, and after running out of memory.
"""

from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from excise.errors import ExciseError
from excise.generation.sampling import SamplingParameters, next_tokens, sample, uniforms
from excise.interventions.weights import WeightMask
from excise.models.encoding import encode

GREEDY = SamplingParameters(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def texts(prompts):
    """Tokens of prompts of different lengths, with a shared beginning; the last is much longer than the others."""

    def make(loaded, count=5):
        tokens = [prompt.tokens for prompt in encode(loaded, prompts)][:count]
        return [*tokens[:-1], tokens[-1][:-1] + tuple(range(40, 70))]

    return make


def under(loaded, mask):
    return nullcontext() if mask is None else mask.applied(loaded)


def answer_tokens(draw):
    return [*draw.tokens, *([] if draw.stop is None else [draw.stop])]


def generate(loaded, prompt, parameters, samples=1):
    """Answers by transformers, as lists of tokens that end with the stop token where there is one."""
    greedy = parameters.temperature == 0
    options = (
        {}
        if greedy
        else {
            "temperature": parameters.temperature,
            "top_k": parameters.top_k,
            "top_p": parameters.top_p,
            "num_return_sequences": samples,
        }
    )
    tokens = torch.tensor([list(prompt)])
    output = loaded.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=not greedy,
        max_new_tokens=parameters.max_new_tokens,
        eos_token_id=sorted(loaded.stop_tokens),
        pad_token_id=0,
        **options,
    )[:, len(prompt) :]
    answers = []
    for row in output.tolist():
        ends = [place for place, token in enumerate(row) if token in loaded.stop_tokens]
        answers.append(row[: ends[0] + 1] if ends else row)
    return answers


# Greedy


@pytest.mark.parametrize("masked", [False, True])
def test_greedy_is_generate_token_for_token(loaded, texts, some_mask, architecture, masked):
    model = loaded(architecture)
    asked = texts(model)
    assert len({len(prompt) for prompt in asked}) > 2
    with under(model, some_mask(model) if masked else None):
        expected = [generate(model, prompt, GREEDY)[0] for prompt in asked]
        for size in (1, 3, None):
            draws = sample(model, asked, [[0]] * len(asked), GREEDY, batch_prompts=size)
            assert [answer_tokens(draw) for draw in draws] == expected
    assert len({tuple(answer) for answer in expected}) > 1


def test_greedy_stops_where_generate_stops(loaded, texts):
    """The numeric model ends its answers: short ones, long ones, and ones that are cut off."""
    model = loaded("llama", numeric=True)
    asked = [(*prompt, token) for prompt in texts(model) for token in range(30, 36)]
    parameters = SamplingParameters(temperature=0, max_new_tokens=3)
    draws = sample(model, asked, [[0]] * len(asked), parameters, batch_prompts=7)
    assert [answer_tokens(draw) for draw in draws] == [generate(model, prompt, parameters)[0] for prompt in asked]
    ends = Counter(draw.stop for draw in draws)
    assert set(ends) == {1, None}, "the test needs both kinds of answers"
    assert all(len(draw.tokens) == 3 for draw in draws if draw.stop is None)
    assert not any(set(draw.tokens) & model.stop_tokens for draw in draws)


def test_samples_of_a_greedy_answer_are_all_alike(loaded, texts):
    model = loaded("llama")
    draws = sample(model, texts(model), [range(3)] * 5, GREEDY)
    assert len({(draw.prompt, draw.tokens, draw.stop) for draw in draws}) == 5
    assert [(draw.prompt, draw.sample) for draw in draws] == [(p, s) for p in range(5) for s in range(3)]


# The distribution

SAMPLED = (
    SamplingParameters(temperature=1.0, top_k=6, top_p=1.0, max_new_tokens=2, seed=5),
    SamplingParameters(temperature=0.7, top_k=0, top_p=0.6, max_new_tokens=2, seed=6),
    SamplingParameters(temperature=1.3, top_k=9, top_p=0.8, max_new_tokens=2, seed=7),
)
DRAWS = 1500


def exact_distribution(loaded, prompt, parameters, next_distribution) -> dict[tuple[int, ...], float]:
    """Probability of every answer of at most two tokens, stop token included, by plain passes."""
    found = {}
    first = next_distribution(loaded, prompt, parameters)
    for token in torch.nonzero(first)[:, 0].tolist():
        if token in loaded.stop_tokens:
            found[token,] = float(first[token])
            continue
        second = next_distribution(loaded, [*prompt, token], parameters)
        for after in torch.nonzero(second)[:, 0].tolist():
            found[token, after] = float(first[token] * second[after])
    return found


def chi_square(counts: Counter, expected: dict) -> float:
    """p-value; answers expected fewer than five times count together."""
    assert set(counts) <= set(expected), "an answer outside the truncated set was drawn"
    total = sum(counts.values())
    often = [answer for answer, share in expected.items() if share * total >= 5]
    observed = [counts[answer] for answer in often]
    wanted = [expected[answer] * total for answer in often]
    rest = total - sum(wanted)
    if rest > 1e-6 * total:
        observed, wanted = [*observed, total - sum(observed)], [*wanted, rest]
    return scipy.stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue


@pytest.mark.parametrize("masked", [False, True])
def test_draws_have_the_exact_distribution(loaded, texts, some_mask, next_distribution, architecture, masked):
    """Two tokens against their enumerated probabilities, every prompt of a batch on its own."""
    model = loaded(architecture)
    asked = texts(model, 3)
    parameters = SAMPLED[len(architecture) % 3]
    with under(model, some_mask(model) if masked else None):
        draws = sample(model, asked, [range(DRAWS)] * 3, parameters, batch_prompts=2)
        for index, prompt in enumerate(asked):
            expected = exact_distribution(model, prompt, parameters, next_distribution)
            assert len(expected) > 5, "too few answers for a test"
            counts = Counter(tuple(answer_tokens(draw)) for draw in draws if draw.prompt == index)
            assert counts.total() == DRAWS
            assert chi_square(counts, expected) > 0.001


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neo"])
def test_draws_are_distributed_as_those_of_generate(loaded, texts, some_mask, architecture, masked):
    """A two-sample test of whole answers, the rare ones together."""
    model = loaded(architecture)
    prompt = texts(model, 2)[0]
    parameters, count = SamplingParameters(temperature=0.8, top_k=5, top_p=0.9, max_new_tokens=3, seed=3), 800
    with under(model, some_mask(model, seed=1) if masked else None):
        ours = Counter(tuple(answer_tokens(draw)) for draw in sample(model, [prompt], [range(count)], parameters))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            theirs = Counter(map(tuple, generate(model, prompt, parameters, count)))
    often = [answer for answer, times in (ours + theirs).items() if times >= 20]
    assert len(often) > 3
    table = np.array(
        [[each[answer] for answer in often] + [count - sum(each[a] for a in often)] for each in (ours, theirs)]
    )
    assert scipy.stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue > 0.001


def test_the_distribution_test_can_fail(loaded, texts, next_distribution):
    """A slightly different temperature is noticed with as many draws."""
    model = loaded("llama")
    prompt = texts(model, 2)[0]
    parameters = SAMPLED[0]
    hotter = SamplingParameters(**{**vars(parameters), "temperature": 1.25})
    counts = Counter(tuple(answer_tokens(draw)) for draw in sample(model, [prompt], [range(DRAWS)], hotter))
    assert chi_square(counts, exact_distribution(model, prompt, parameters, next_distribution)) < 0.001


# One step of it


def ours_dense(logits: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """The sampling distribution as float64 [rows, vocabulary]; every row is given once."""
    dense, seen = torch.zeros(logits.shape, dtype=torch.float64), []
    for rows, ids, cumulative in next_tokens(logits, parameters):
        shares = torch.diff(cumulative, dim=1, prepend=torch.zeros(len(rows), 1, dtype=torch.float64))
        for row, own, share in zip(rows, ids, shares, strict=True):
            inside = own < logits.shape[1]
            dense[row, own[inside]] += share[inside]
            assert (share >= 0).all()
        assert (cumulative[:, -1] == 1).all()
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(logits)))
    return dense


def reference(logits: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """transformers' own processors, in its order."""
    scores = TemperatureLogitsWarper(parameters.temperature)(None, logits.double())
    if parameters.top_k:
        scores = TopKLogitsWarper(parameters.top_k)(None, scores)
    if parameters.top_p < 1:
        scores = TopPLogitsWarper(parameters.top_p)(None, scores)
    return scores.softmax(dim=1)


@pytest.mark.parametrize("vocabulary", [3, 40, 1000])
@pytest.mark.parametrize("spread", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [
        (0, 1.0),
        (0, 0.9),
        (0, 0.5),
        (0, 1e-6),
        (1, 1.0),
        (1, 0.3),
        (7, 1.0),
        (7, 0.8),
        (40, 0.95),
        (5000, 1.0),
        (5000, 0.9),
    ],
)
def test_the_next_token_s_distribution_is_that_of_transformers(vocabulary, spread, temperature, top_k, top_p):
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(vocabulary + top_k)) * spread
    parameters = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p)
    ours, theirs = ours_dense(logits, parameters), reference(logits, parameters)
    assert (ours - theirs).abs().max() < 1e-6
    certain = (theirs == 0) | (theirs > 1e-7)  # the last digits of a cumulative sum decide about the others
    assert torch.equal((ours > 0)[certain], (theirs > 0)[certain])


@pytest.mark.parametrize(
    ("top_k", "top_p", "left"), [(3, 1.0, 3), (0, 0.25, 3), (5, 0.5, 3), (0, 1.0, 10), (20, 1.0, 10)]
)
def test_ties_leave_as_few_tokens_as_asked(top_k, top_p, left):
    """Ten tokens alike: transformers keeps all that tie with the k-th, we keep k of them."""
    dense = ours_dense(torch.zeros(2, 10), SamplingParameters(temperature=1.0, top_k=top_k, top_p=top_p))
    assert (dense > 0).sum(dim=1).tolist() == [left, left]
    assert torch.allclose(dense[dense > 0], torch.tensor(1 / left, dtype=torch.float64))


def test_a_tie_at_the_edge_drops_no_better_token():
    logits = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0, 0.0]])
    kept = ours_dense(logits, SamplingParameters(temperature=1.0, top_k=4, top_p=1))[0] > 0
    assert kept[[0, 2]].all()
    assert kept[[1, 3, 4]].sum() == 2
    assert not kept[5]


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [7, 30]] = torch.tensor([1.0, 0.0])
    for top_k, top_p in ((0, 1.0), (0, 0.95), (5, 1.0), (60, 0.99)):
        dense = ours_dense(logits, SamplingParameters(temperature=1.0, top_k=top_k, top_p=top_p))
        assert torch.nonzero(dense[0])[:, 0].tolist() == [7, 30]
        assert not dense.isnan().any()


def test_rows_that_need_more_tokens_do_not_disturb_the_others():
    """One row is certain, one needs the whole vocabulary: each comes with its own distribution."""
    logits = torch.zeros(3, 2000)
    logits[1, 123] = 50.0
    logits[2] = torch.linspace(0, 3, 2000)
    parameters = SamplingParameters(temperature=1.0, top_k=0, top_p=0.97)
    assert (ours_dense(logits, parameters) - reference(logits, parameters)).abs().max() < 2e-3  # ties of row 0
    assert (ours_dense(logits[1:], parameters) - reference(logits[1:], parameters)).abs().max() < 1e-6


def test_greedy_takes_the_first_of_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, 0.5]])
    ((rows, ids, cumulative),) = next_tokens(logits, GREEDY)
    assert (rows.tolist(), ids.tolist(), cumulative.tolist()) == ([0, 1], [[1], [0]], [[1.0], [1.0]])


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-0.1, float("nan"), float("inf"))),
        *({"top_p": value} for value in (0, 1.1, float("nan"))),
        *({"seed": value} for value in (-1, 2**64)),
        {"top_k": -1},
        {"max_new_tokens": 0},
    ],
)
def test_parameters_out_of_range_are_said(wrong):
    with pytest.raises(ExciseError, match="sampling parameters out of range"):
        SamplingParameters(**wrong)


# Common random numbers

WARM = SamplingParameters(temperature=1.0, top_k=0, top_p=0.95, max_new_tokens=6, seed=11)


def by_place(draws):
    return {(draw.prompt, draw.sample): (draw.tokens, draw.stop) for draw in draws}


def test_the_batch_size_does_not_matter(loaded, texts, architecture):
    model = loaded(architecture)
    asked = texts(model)
    answers = [by_place(sample(model, asked, [range(4)] * 5, WARM, batch_prompts=size)) for size in (1, 2, 3, 5, None)]
    assert all(each == answers[0] for each in answers)
    assert len(set(answers[0].values())) > 10


def test_order_company_and_number_of_samples_do_not_matter(loaded, texts):
    model = loaded("gpt_neo")
    asked = texts(model)
    answers = by_place(sample(model, asked, [range(6)] * 5, WARM))
    backwards = by_place(sample(model, asked[::-1], [range(6)] * 5, WARM, batch_prompts=2))
    assert {(4 - prompt, number): answer for (prompt, number), answer in backwards.items()} == answers
    some = by_place(sample(model, asked, [[5], [], [3, 1], [0], []], WARM))
    assert some == {place: answers[place] for place in [(0, 5), (2, 1), (2, 3), (3, 0)]}
    alone = by_place(sample(model, [asked[2]], [[4]], WARM))
    assert alone == {(0, 4): answers[2, 4]}
    more = by_place(sample(model, asked, [range(9)] * 5, WARM))
    assert more.items() > answers.items()


def test_longer_answers_begin_as_the_shorter_ones(loaded, texts):
    model = loaded("llama")
    asked = texts(model)
    short, long = (
        by_place(sample(model, asked, [range(5)] * 5, SamplingParameters(**{**vars(WARM), "max_new_tokens": size})))
        for size in (3, 9)
    )
    assert all(long[place][0][: len(tokens)] == tokens for place, (tokens, _) in short.items())
    assert any(len(tokens) > 3 for tokens, _ in long.values())


def test_seeds_prompts_and_samples_have_noise_of_their_own(loaded, texts):
    model = loaded("llama")
    asked = texts(model)
    answers = by_place(sample(model, asked, [range(8)] * 5, WARM))
    other = by_place(sample(model, asked, [range(8)] * 5, SamplingParameters(**{**vars(WARM), "seed": 12})))
    assert sum(answers[place] == other[place] for place in answers) < 10
    noise = np.stack([uniforms(seed, prompt, range(20), 30) for seed in (0, 1) for prompt in ((1, 2), (2, 1))])
    assert len(np.unique(noise)) == noise.size
    assert scipy.stats.kstest(noise.ravel(), "uniform").pvalue > 0.01
    again = np.concatenate([uniforms(1, (2, 1), [number], 7) for number in range(20)])
    assert np.array_equal(again, noise[3, :, :7])


def test_the_same_noise_meets_a_pruned_model(loaded, texts, some_mask):
    """An empty mask changes nothing, a light one leaves most first tokens as they were: the comparison is paired."""
    model = loaded("llama")
    asked = texts(model)
    plain = by_place(sample(model, asked, [range(20)] * 5, WARM))
    nothing = WeightMask.from_arrays(
        {linear.key: np.zeros(linear.shape, dtype=bool) for linear in model.topology.linears}
    )
    with nothing.applied(model):
        assert by_place(sample(model, asked, [range(20)] * 5, WARM)) == plain
    with some_mask(model, density=0.0002).applied(model):
        light = by_place(sample(model, asked, [range(20)] * 5, WARM))
    other = by_place(sample(model, asked, [range(20)] * 5, SamplingParameters(**{**vars(WARM), "seed": 12})))
    same, chance = (sum(each[at][0][:1] == plain[at][0][:1] for at in plain) for each in (light, other))
    assert light != plain
    assert same > 60
    assert chance < 30


def test_equal_prompts_and_single_tokens_can_be_asked(loaded):
    model = loaded("llama")
    draws = sample(model, [(30,), (31, 32), (30,), (31, 32)], [range(3)] * 4, WARM)
    answers = by_place(draws)
    assert [answers[0, number] for number in range(3)] == [answers[2, number] for number in range(3)]
    assert [answers[1, number] for number in range(3)] == [answers[3, number] for number in range(3)]
    assert sample(model, [(30,)], [[]], WARM) == []
    assert sample(model, [], [], WARM) == []


# Memory


class Memory:
    """Lets the model's forward pass fail, as a device does, when a batch has more rows than fit."""

    def __init__(self, loaded, rows: int, error: Exception) -> None:
        self.rows, self.error, self.batches, self.failures = rows, error, [], 0
        self.hook = loaded.model.base_model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module, args, kwargs):
        size = len(kwargs["input_ids"])
        if size > self.rows:
            self.failures += 1
            raise self.error
        self.batches.append(size)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GiB, max allowed: 18.13 GiB)"),
        RuntimeError("Invalid buffer size: 24.00 GiB"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch_and_loses_nothing(loaded, texts, error):
    model = loaded("llama")
    asked = texts(model)
    expected = sample(model, asked, [range(3)] * 5, WARM)
    memory, batches = Memory(model, 2, error), []
    try:
        found = sample(model, asked, [range(3)] * 5, WARM, batch_prompts=5, on_batch=batches.append)
    finally:
        memory.hook.remove()
    assert found == expected
    assert memory.failures == 1
    assert max(memory.batches) == 2
    assert [len({draw.prompt for draw in batch}) for batch in batches] == [2, 2, 1]
    assert (
        sorted((draw for batch in batches for draw in batch), key=lambda draw: (draw.prompt, draw.sample)) == expected
    )


def test_running_out_of_memory_half_way_keeps_the_finished_batches(loaded, texts):
    """Once, in the middle of the second batch's answers."""
    model = loaded("llama")
    asked = texts(model)
    expected = sample(model, asked, [range(3)] * 5, WARM)
    calls, batches = [], []

    def fail_once(module, args, kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 10:
            raise torch.OutOfMemoryError

    hook = model.model.base_model.register_forward_pre_hook(fail_once, with_kwargs=True)
    try:
        found = sample(model, asked, [range(3)] * 5, WARM, batch_prompts=2, on_batch=batches.append)
    finally:
        hook.remove()
    assert found == expected
    assert [len({draw.prompt for draw in batch}) for batch in batches] == [2, 1, 1, 1]


def test_a_single_prompt_that_does_not_fit_is_an_error(loaded, texts):
    model = loaded("llama")
    memory = Memory(model, 0, torch.OutOfMemoryError("CUDA out of memory"))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            sample(model, texts(model), [[0]] * 5, WARM)
    finally:
        memory.hook.remove()


def test_other_errors_are_not_taken_for_memory(loaded, texts):
    model = loaded("llama")
    memory = Memory(model, 2, RuntimeError("shapes do not fit"))
    try:
        with pytest.raises(RuntimeError, match="shapes"):
            sample(model, texts(model), [[0]] * 5, WARM)
    finally:
        memory.hook.remove()


# Cost


def test_no_token_is_read_twice(loaded, texts):
    """The trunk once, the rest of every prompt once, and one column per distinct beginning of the answers."""
    model = loaded("llama")
    asked = texts(model)
    read = []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        draws = sample(
            model, asked, [range(50)] * 5, SamplingParameters(temperature=0.5, top_k=2, top_p=1, max_new_tokens=3)
        )
    finally:
        hook.remove()
    trunk, rest, *steps = read
    shared = next(place for place, column in enumerate(zip(*asked, strict=False)) if len(set(column)) > 1)
    assert trunk == (1, shared)
    assert rest == (5, max(map(len, asked)) - shared)
    for step, shape in enumerate(steps, 1):
        distinct = {(draw.prompt, draw.tokens[:step]) for draw in draws if len(draw.tokens) >= step}
        per_prompt = Counter(prompt for prompt, _ in distinct)
        assert shape == (len(per_prompt), max(per_prompt.values()))
    assert len(steps) == 2
