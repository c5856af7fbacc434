"""The predicted drop is weight times gradient and the predicted harm the Fisher information, both by brute force.

Answers are enumerated with their exact probabilities where an expectation is claimed, so nothing hangs on luck.
"""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from excise.attribution.gap_gradient import gap_gradient, truncated_set
from excise.files.parts import Work
from excise.generation.sampling import SamplingParameters, sample
from excise.generation.tree import answer_tree, common_prefix
from excise.models.encoding import encode

PARAMETERS = SamplingParameters(temperature=0.8, top_k=3, top_p=0.95, max_new_tokens=2)
STEP = 3e-3  # some layers compute in float32 whatever the dtype, so no smaller
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def asked_of(loaded, prompts):
    return [prompt.tokens for prompt in encode(loaded, prompts)[:6]]


def trees_of(asked, answers, weights, trunk, sign=1.0):
    """One tree per prompt; sign: of the first weighting."""
    sides = np.array([np.sign(sign), 1.0])
    return [
        answer_tree(prompt[trunk:], some, weight * sides)
        for prompt, some, weight in zip(asked, answers, weights, strict=True)
    ]


def turned(trees):
    """The same trees with the first weighting's sign turned."""
    return [replace(tree, edge_visits=tree.edge_visits * [-1.0, 1.0]) for tree in trees]


def truncated(scores: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """Scores of the sampling distribution, by transformers."""
    scores = TemperatureLogitsWarper(parameters.temperature)(None, scores)
    if parameters.top_k:
        scores = TopKLogitsWarper(parameters.top_k)(None, scores)
    return TopPLogitsWarper(parameters.top_p)(None, scores) if parameters.top_p < 1 else scores


def log_probability(model, prompt, answer, parameters) -> torch.Tensor:
    """log q of an answer (tokens, and a stop token where it has one), the truncated set held fixed; differentiable."""
    tokens, stop = answer
    drawn = [*tokens, *([] if stop is None else [stop])]
    logits = model(torch.tensor([[*prompt, *drawn]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    left = truncated(logits.detach(), parameters).isfinite()
    assert left[torch.arange(len(drawn)), drawn].all()
    scores = (logits / parameters.temperature).masked_fill(~left, -torch.inf)
    return scores.log_softmax(dim=1)[torch.arange(len(drawn)), drawn].sum()


def brute_gradients(loaded, *objectives) -> list[dict[str, np.ndarray]]:
    """d objective / dW of every matrix, flat and in float64, on a float64 copy; one backward pass per objective."""
    model = copy.deepcopy(loaded.model).double()
    matrices = {linear.module: model.get_submodule(linear.module).weight for linear in loaded.topology.linears}
    for matrix in matrices.values():
        matrix.requires_grad_(True)
    found = []
    for objective in objectives:
        model.zero_grad()
        objective(model).backward()
        found.append(
            {each.key: each.of(matrices[each.module].grad).reshape(-1).numpy() for each in loaded.topology.linears}
        )
    return found


def weight_of(loaded, linear) -> np.ndarray:
    return linear.weight(loaded.model).detach().reshape(-1).double().numpy()


def every_drop(loaded, trunk, trees, **options) -> dict[str, np.ndarray]:
    """Predicted drops of all weights: those that raise the objective are candidates of the opposite one."""
    drops = {linear.key: np.zeros(linear.out_features * linear.in_features) for linear in loaded.topology.linears}
    for sign, some in ((1, trees), (-1, turned(trees))):
        found = gap_gradient(loaded, trunk, some, keep=1.0, seed=0, **options)
        for key, each in found.candidates.items():
            drops[key][each.index] = each.drop * sign
    return drops


def next_tokens(model, tokens, parameters) -> dict[int, float]:
    with torch.inference_mode():
        share = truncated(
            model(torch.tensor([list(tokens)]), use_cache=False).logits[:, -1].double(), parameters
        ).softmax(dim=1)[0]
    return {token: float(share[token]) for token in torch.nonzero(share)[:, 0].tolist()}


def enumerated(model, prompt, parameters, stops=frozenset({1})) -> list[tuple[tuple, float]]:
    """Every answer of at most two tokens as ((tokens, stop), probability)."""
    found = []
    for first, share in next_tokens(model, prompt, parameters).items():
        if first in stops:
            found.append((((), first), share))
            continue
        for second, after in next_tokens(model, [*prompt, first], parameters).items():
            found.append((((first,), second) if second in stops else ((first, second), None), share * after))
    assert abs(sum(share for _, share in found) - 1) < 1e-9
    return found


def outcome(answer) -> float:
    """Some number that every answer stands for."""
    tokens, stop = answer
    return float(np.random.default_rng([*tokens, stop or 0]).normal())


# The gradient


@pytest.fixture
def drawn(prompts):
    """Some answers of six prompts, drawn by the model, with any weights; many share their beginnings."""

    def make(loaded, parameters=PARAMETERS):
        asked = asked_of(loaded, prompts)
        draws = sample(loaded, asked, [range(4)] * len(asked), replace(parameters, max_new_tokens=3))
        answers = [[(draw.tokens, draw.stop) for draw in draws if draw.prompt == index] for index in range(len(asked))]
        rng = np.random.default_rng(3)
        weights = [np.column_stack([rng.normal(size=4), np.full(4, 0.25)]) for _ in asked]
        return asked, answers, weights

    return make


@pytest.mark.parametrize("batch", [2, 8])
def test_the_drop_is_weight_times_the_gradient(loaded, drawn, architecture, batch):
    """Against autograd of sum_n a_n log q(answer_n), one sequence at a time."""
    model = loaded(architecture)
    asked, answers, weights = drawn(model)
    trunk = common_prefix(asked)

    def objective(own):
        return sum(
            float(weight[0]) * log_probability(own, prompt, answer, PARAMETERS)
            for prompt, some, some_weights in zip(asked, answers, weights, strict=True)
            for answer, weight in zip(some, some_weights, strict=True)
        )

    (expected,) = brute_gradients(model, objective)
    trees = trees_of(asked, answers, weights, trunk)
    found = every_drop(model, asked[0][:trunk], trees, parameters=PARAMETERS, work=Work(batch=batch))
    for linear in model.topology.linears:
        drop = weight_of(model, linear) * expected[linear.key]
        assert np.abs(drop).max() > 0
        assert np.allclose(found[linear.key], drop, rtol=1e-3, atol=1e-3 * np.abs(drop).max()), linear.key


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=1.0, top_k=0, top_p=1.0),
        SamplingParameters(temperature=0.5, top_k=0, top_p=0.7),
        SamplingParameters(temperature=1.5, top_k=6, top_p=1.0),
    ],
)
def test_the_gradient_is_that_of_the_sampling_distribution(loaded, drawn, parameters):
    model = loaded("llama")
    asked, answers, weights = drawn(model, parameters)

    def objective(own):
        return sum(
            float(weight[0]) * log_probability(own, prompt, answer, parameters)
            for prompt, some, some_weights in zip(asked, answers, weights, strict=True)
            for answer, weight in zip(some, some_weights, strict=True)
        )

    (expected,) = brute_gradients(model, objective)
    found = every_drop(model, [], trees_of(asked, answers, weights, 0), parameters=parameters)
    for linear in model.topology.linears:
        drop = weight_of(model, linear) * expected[linear.key]
        assert np.allclose(found[linear.key], drop, rtol=1e-3, atol=1e-3 * np.abs(drop).max())


# The gap itself, enumerated


@pytest.fixture
def expected_gap(prompts):
    """Six prompts, three per group, all their answers with exact probabilities, and the gap of any model."""

    def make(loaded):
        asked = asked_of(loaded, prompts)
        signs = [1.0] * 3 + [-1.0] * 3
        exact = copy.deepcopy(loaded.model).double()
        answers = [enumerated(exact, prompt, PARAMETERS) for prompt in asked]

        def gap(model) -> float:
            total = 0.0
            for prompt, sign in zip(asked, signs, strict=True):
                total += (
                    sign / 3 * sum(share * outcome(answer) for answer, share in enumerated(model, prompt, PARAMETERS))
                )
            return total

        prompt_means = [sum(share * outcome(answer) for answer, share in own) for own in answers]
        means = {1.0: np.mean(prompt_means[:3]), -1.0: np.mean(prompt_means[3:])}
        weights = [
            np.array([[sign * share * (outcome(answer) - means[sign]) / 3, share] for answer, share in own])
            for own, sign in zip(answers, signs, strict=True)
        ]
        return asked, [[answer for answer, _ in own] for own in answers], weights, exact, gap, means[1.0] - means[-1.0]

    return make


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_the_drop_is_what_scaling_a_weight_does_to_the_gap(loaded, expected_gap, architecture):
    """|D| after scaling one weight by 1 - e falls by e times its drop, to first order."""
    model = loaded(architecture)
    asked, answers, weights, exact, gap, disparity = expected_gap(model)
    assert gap(exact) == pytest.approx(disparity, rel=1e-9)
    trunk = common_prefix(asked)
    found = gap_gradient(
        model,
        asked[0][:trunk],
        trees_of(asked, answers, weights, trunk, disparity),
        PARAMETERS,
        keep=1.0,
        seed=0,
    )
    for role in [linear.role for linear in model.topology.linears if linear.layer == 1]:
        linear = model.topology.linear(f"1.{role}")
        each = found.candidates[linear.key]
        best = int(each.drop.argmax())
        index, drop = np.unravel_index(each.index[best], linear.shape), each.drop[best]
        view = linear.weight(exact).data
        place = torch.zeros(linear.shape, dtype=torch.bool)
        place[index] = True
        place = place.reshape(view.shape)
        kept, gaps = view[place].clone(), []
        for scale in (1 - STEP, 1 + STEP):
            view[place] = kept * scale
            gaps.append(abs(gap(exact)))
        view[place] = kept
        assert (gaps[1] - gaps[0]) / (2 * STEP) == pytest.approx(drop, rel=5e-3), linear.key


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_the_best_weights_really_close_the_gap(loaded, expected_gap, architecture):
    """Zeroing one of the ten best weights mostly lowers the enumerated gap, by about its drop on average."""
    model = loaded(architecture)
    asked, answers, weights, exact, gap, disparity = expected_gap(model)
    found = gap_gradient(model, [], trees_of(asked, answers, weights, 0, disparity), PARAMETERS, keep=1.0, seed=0)
    ranking = sorted(
        (
            (drop / (harm + found.damping), drop, key, index)
            for key, each in found.candidates.items()
            for index, drop, harm in zip(each.index, each.drop, each.harm, strict=True)
        ),
        reverse=True,
    )[:10]
    fallen = []
    for _, _, key, index in ranking:
        linear = model.topology.linear(key)
        view = linear.weight(exact).data
        place = (torch.arange(linear.out_features * linear.in_features) == index).reshape(view.shape)
        kept = view[place].clone()
        view[place] = 0
        fallen.append(np.sign(disparity) * (disparity - gap(exact)))  # beyond a small gap counts as well
        view[place] = kept
    assert sum(each > 0 for each in fallen) >= 8
    assert 0.5 < sum(fallen) / sum(drop for _, drop, _, _ in ranking) < 2.5


# Fisher


@pytest.mark.parametrize(("architecture", "batch"), [("llama", 4), ("gpt_neox", 1)])
def test_the_harm_is_half_the_weight_squared_times_the_fisher_information(loaded, expected_gap, architecture, batch):
    """In expectation over the random signs; F by one backward pass per answer, weighed with its exact probability."""
    model = loaded(architecture)
    asked, answers, weights, *_ = expected_gap(model)
    every = [
        (partial(log_probability, prompt=prompt, answer=answer, parameters=PARAMETERS), share / len(asked))
        for prompt, own, weight in zip(asked, answers, weights, strict=True)
        for answer, (_, share) in zip(own, weight, strict=True)
    ]
    fisher = {linear.key: 0.0 for linear in model.topology.linears}
    for gradients, (_, share) in zip(brute_gradients(model, *(each for each, _ in every)), every, strict=True):
        for key, gradient in gradients.items():
            fisher[key] = fisher[key] + share * gradient**2
    trunk = common_prefix(asked)
    trees = trees_of(asked, answers, weights, trunk)
    seeds, harms = 40, {}
    for seed in range(seeds):
        found = gap_gradient(model, asked[0][:trunk], trees, PARAMETERS, keep=1.0, seed=seed, work=Work(batch=batch))
        for key, each in found.candidates.items():
            harms[key] = harms.get(key, 0) + each.harm.astype(float) / seeds
    places = {key: each.index for key, each in found.candidates.items()}
    totals = []
    for linear in model.topology.linears:
        expected = (0.5 * weight_of(model, linear) ** 2 * fisher[linear.key])[places[linear.key]]
        assert harms[linear.key].sum() == pytest.approx(expected.sum(), rel=0.25), linear.key
        # A mean of 40 squares of near-normal numbers is off by 22 % or so; ranks are kept.
        assert np.corrcoef(harms[linear.key], expected)[0, 1] > 0.9
        totals.append((harms[linear.key].sum(), expected.sum()))
    found_total, expected_total = np.sum(totals, axis=0)
    assert found_total == pytest.approx(expected_total, rel=0.15)


def test_lambda_is_the_median_harm_of_all_weights(loaded, drawn):
    model = loaded("llama")
    asked, answers, weights = drawn(model)
    trees = trees_of(asked, answers, weights, 0)
    harms = []
    for some in (trees, turned(trees)):
        found = gap_gradient(model, [], some, PARAMETERS, keep=1.0, seed=2)
        harms += [each.harm for each in found.candidates.values()]
    everything = np.concatenate(harms)
    assert len(everything) == sum(linear.out_features * linear.in_features for linear in model.topology.linears)
    assert found.damping == pytest.approx(np.median(everything), rel=0.02)


# Candidates


def test_candidates_are_the_best_of_each_matrix(loaded, drawn):
    model = loaded("gpt2")
    asked, answers, weights = drawn(model)
    trees = trees_of(asked, answers, weights, 0)
    everything = gap_gradient(model, [], trees, PARAMETERS, keep=1.0, seed=2)
    some = gap_gradient(model, [], trees, PARAMETERS, keep=0.01, seed=2)
    assert list(some.candidates) == [linear.key for linear in model.topology.linears]
    for key, each in some.candidates.items():
        whole = everything.candidates[key]
        linear = model.topology.linear(key)
        assert len(each.index) == int(0.01 * linear.out_features * linear.in_features)
        assert (np.diff(each.index) > 0).all()
        assert (each.drop > 0).all()
        place = np.searchsorted(whole.index, each.index)
        assert np.array_equal(whole.index[place], each.index)
        assert np.allclose(whole.drop[place], each.drop, rtol=1e-4)
        assert np.allclose(whole.harm[place], each.harm, rtol=1e-3, atol=1e-12)
        scores = whole.drop / (whole.harm + some.damping)
        left = np.delete(scores, place)
        assert scores[place].min() >= left.max() * (1 - 1e-4)


def test_the_sign_of_the_gap_decides_what_a_drop_is(loaded, drawn):
    """A gap to the majority's disadvantage is closed by the opposite weights."""
    model = loaded("llama")
    asked, answers, weights = drawn(model)
    trees = trees_of(asked, answers, weights, 0)
    plus, minus = (gap_gradient(model, [], some, PARAMETERS, keep=1.0, seed=0) for some in (trees, turned(trees)))
    for key in plus.candidates:
        assert not set(plus.candidates[key].index) & set(minus.candidates[key].index)


def test_without_a_gap_nothing_is_a_candidate(loaded, drawn):
    model = loaded("llama")
    asked, answers, weights = drawn(model)
    still = [np.column_stack([np.zeros(len(each)), each[:, 1]]) for each in weights]
    found = gap_gradient(model, [], trees_of(asked, answers, still, 0), PARAMETERS, keep=1.0, seed=0)
    assert not any(len(each.index) for each in found.candidates.values())
    assert found.damping > 0


def test_the_same_seed_gives_the_same_scores(loaded, drawn):
    model = loaded("llama")
    asked, answers, weights = drawn(model)
    trees = trees_of(asked, answers, weights, 0)
    one, two, three = (gap_gradient(model, [], trees, PARAMETERS, keep=1.0, seed=s) for s in (0, 0, 1))
    for key, each in one.candidates.items():
        assert np.array_equal(each.harm, two.candidates[key].harm)
        assert not np.array_equal(each.harm, three.candidates[key].harm)


def test_the_model_is_as_before_even_after_an_error(loaded, drawn):
    model = loaded("gpt_neox")
    asked, answers, weights = drawn(model)
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}

    def interrupt(label, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gap_gradient(
            model,
            [],
            trees_of(asked, answers, weights, 0),
            PARAMETERS,
            keep=1.0,
            seed=0,
            work=Work(progress=interrupt),
        )
    for name, parameter in model.model.named_parameters():
        assert parameter.equal(before[name])
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_at_temperature_0_the_likeliest_token_alone_is_left():
    scores = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.5, 0.4]])
    greedy = truncated_set(scores, SamplingParameters(temperature=0.0, top_p=1.0))
    assert greedy.tolist() == [[False, True, False], [True, False, False]]
