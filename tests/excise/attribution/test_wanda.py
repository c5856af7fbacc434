"""Input norms from shared trees are those of the definition, where every sequence is read on its own."""

import numpy as np
import pytest
import torch

from excise.attribution.wanda import input_norms, sizes_of, wanda_scores
from excise.files.parts import Work
from excise.generation.tree import answer_tree, common_prefix
from excise.models.encoding import encode
from excise.models.topology import SITES

WEIGHTINGS = 3


@pytest.fixture
def sequences(prompts):
    """Five prompts with answers that repeat and share their beginnings, and a 0/1 membership per answer."""

    def make(loaded, seed=0):
        rng = np.random.default_rng(seed)
        asked = [prompt.tokens for prompt in encode(loaded, prompts)[1:6]]
        answers = [
            [
                (tuple(rng.integers(20, 23, rng.integers(0, 5)).tolist()), 1 if rng.random() < 0.5 else None)
                for _ in range(size)
            ]
            for size in (4, 1, 6, 3, 3)
        ]
        members = [rng.integers(0, 2, (len(each), WEIGHTINGS)).astype(float) for each in answers]
        return asked, answers, members

    return make


def trees_of(asked, answers, members, trunk):
    return [answer_tree(prompt[trunk:], *each) for prompt, *each in zip(asked, answers, members, strict=True)]


def record_inputs(loaded):
    """Hooks that keep every site's input of the last forward pass, [batch, time, in]."""
    seen, hooks = {}, []
    for layer in range(loaded.topology.layers):
        for site in SITES:

            def keep(module, given, place=(layer, site)):
                seen[place] = given[0].double()

            hooks.append(loaded.topology.site_module(loaded.model, layer, site).register_forward_pre_hook(keep))
    return seen, hooks


def definition(loaded, sequences, members) -> dict:
    """sqrt(1/N sum_n sum_t x[n,t]^2), one plain pass per sequence (method A5). members: [sequences, weightings]."""
    seen, hooks = record_inputs(loaded)
    sums: dict = {}
    with torch.inference_mode():
        for tokens, member in zip(sequences, members, strict=True):
            loaded.model(torch.tensor([tokens]), use_cache=False)
            for place, given in seen.items():
                squares = given[0].square().sum(dim=0).numpy()
                sums[place] = sums.get(place, 0) + np.outer(member, squares)
    for hook in hooks:
        hook.remove()
    totals = np.maximum(np.sum(members, axis=0), 1)[:, None]
    return {place: np.sqrt(total / totals) for place, total in sums.items()}


def check(found, expected):
    assert set(found) == set(expected)
    for place, norms in expected.items():
        assert found[place].shape == norms.shape
        assert found[place].dtype == np.float32
        assert np.allclose(found[place], norms, rtol=1e-4, atol=1e-6), place


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_norms_are_those_of_every_sequence_alone(loaded, sequences, architecture, batch):
    model = loaded(architecture)
    asked, answers, members = sequences(model)
    trunk = common_prefix(asked)
    totals = np.concatenate(members).sum(axis=0)
    found = input_norms(
        model, asked[0][:trunk], trees_of(asked, answers, members, trunk), totals, work=Work(batch=batch)
    )
    every = [[*prompt, *tokens] for prompt, own in zip(asked, answers, strict=True) for tokens, _ in own]
    check(found, definition(model, every, np.concatenate(members)))


def test_norms_without_a_trunk_are_the_same(loaded, sequences):
    model = loaded("gemma2")
    asked, answers, members = sequences(model)
    totals = np.concatenate(members).sum(axis=0)
    trunk = common_prefix(asked)
    one = input_norms(model, asked[0][:trunk], trees_of(asked, answers, members, trunk), totals)
    none = input_norms(model, [], trees_of(asked, answers, members, 0), totals)
    for place in one:
        assert np.allclose(one[place], none[place], rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_scores_are_those_of_a_left_padded_batch_without_its_padding(loaded, sequences, architecture):
    """The usual way: S = |W| sqrt(1/N sum_n sum_t x^2) over a batch padded to one length. Padding is no input."""
    model = loaded(architecture)
    asked, answers, members = sequences(model)
    every = [[*prompt, *tokens] for prompt, own in zip(asked, answers, strict=True) for tokens, _ in own]
    longest = max(map(len, every))
    pad = 7  # not the model's own padding token, whose embedding is all zeros in some architectures
    padded = torch.tensor([[pad] * (longest - len(each)) + each for each in every])
    attention = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in every])
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    assert (attention == 0).any()
    seen, hooks = record_inputs(model)
    with torch.inference_mode():
        model.model(padded, attention_mask=attention, position_ids=positions, use_cache=False)
    for hook in hooks:
        hook.remove()
    weights = np.concatenate(members)
    trunk = common_prefix(asked)
    norms = input_norms(model, asked[0][:trunk], trees_of(asked, answers, members, trunk), weights.sum(axis=0))

    def by_formula(linear, counted: torch.Tensor) -> np.ndarray:
        per_sequence = (seen[linear.layer, linear.site].square() * counted[:, :, None]).sum(dim=1).numpy()
        mean = weights.T @ per_sequence / weights.sum(axis=0)[:, None]
        size = linear.weight(model.model).detach().reshape(linear.shape).abs().numpy()
        return size * np.sqrt(mean)[:, None]

    for linear in model.topology.linears:
        scores = np.stack([wanda_scores(sizes_of(model, linear), own) for own in norms[linear.layer, linear.site]])
        assert np.allclose(scores, by_formula(linear, attention), rtol=1e-4, atol=1e-6), linear.key
        if linear.site != "attention_output":  # where nothing is attended to, as in the padding, attention gives 0
            assert not np.allclose(scores, by_formula(linear, torch.ones_like(attention)), rtol=1e-2), linear.key


def test_the_mean_is_over_sequences_not_tokens(loaded, prompts):
    """A sequence twice weighs as one: the norm of a group does not grow with its number of answers."""
    model = loaded("llama")
    prompt = encode(model, prompts)[0].tokens
    once = input_norms(model, [], [answer_tree(prompt, [((30, 31), 1)], np.ones((1, 1)))], np.array([1.0]))
    twice = input_norms(model, [], [answer_tree(prompt, [((30, 31), 1)] * 2, np.ones((2, 1)))], np.array([2.0]))
    for place in once:
        assert np.allclose(once[place], twice[place], rtol=1e-5)


def test_a_weighting_without_sequences_has_no_norms(loaded, prompts):
    model = loaded("llama")
    prompt = encode(model, prompts)[0].tokens
    tree = answer_tree(prompt, [((30,), 1)], np.array([[1.0, 0.0]]))
    norms = input_norms(model, [], [tree], np.array([1.0, 0.0]))
    assert all((each[1] == 0).all() and (each[0] > 0).any() for each in norms.values())


def test_hooks_are_gone_afterwards_even_after_an_error(loaded, prompts):
    model = loaded("llama")
    tree = answer_tree(encode(model, prompts)[0].tokens, [((30,), 1)], np.ones((1, 1)))

    def interrupt(label, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        input_norms(model, [], [tree], np.ones(1), work=Work(progress=interrupt))
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_scores_are_weight_times_norm(loaded, architecture):
    """By hand from the module's own output: dropping input j of output i changes the output by at most its score."""
    model = loaded(architecture)
    norms = np.random.default_rng(0).random(4096).astype(np.float32)
    for linear in model.topology.linears:
        own = norms[: linear.in_features]
        scores = wanda_scores(sizes_of(model, linear), own)
        assert scores.shape == linear.shape
        weight = linear.weight(model.model).detach().reshape(linear.shape).numpy()
        i, j = linear.out_features - 2, linear.in_features - 3
        assert scores[i, j] == np.abs(weight[i, j]) * own[j]
        assert np.array_equal(scores, np.abs(weight) * own[None])
