"""SNIP scores are |W dL/dW| of every answer alone, by brute force, whatever shares a pass with what."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from excise.attribution import gradients
from excise.attribution.snip import snip
from excise.errors import ExciseError
from excise.files.parts import Work
from excise.generation.tree import common_prefix
from excise.models.encoding import encode

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
ANSWERS = ((30, 1), (31, 32, 33, 1), (40, 41), (1,), (30, 1), (50, 51, 52))
WEIGHTS = np.array([[3.0, 0], [1, 2], [0, 5], [2, 0], [0, 1], [0, 0]])
"""How often each of two weightings has an answer; the last answer has none and must not count."""


@pytest.fixture
def asked(prompts):
    """`asked(model)`: the trunk of six prompts, and (rest of the prompt, answer) of each."""

    def make(model):
        whole = [prompt.tokens for prompt in encode(model, prompts)[:6]]
        length = common_prefix(whole)
        return whole[0][:length], [(each[length:], answer) for each, answer in zip(whole, ANSWERS, strict=True)]

    return make


def brute_force(loaded, trunk, answers, weights) -> dict[str, np.ndarray]:
    """The definition: one backward pass per answer in float64, gradients of the parameters themselves."""
    model = copy.deepcopy(loaded.model).double()
    matrices = {linear.module: model.get_submodule(linear.module).weight for linear in loaded.topology.linears}
    for matrix in matrices.values():
        matrix.requires_grad_(True)
    sums: dict = {linear.key: np.zeros((weights.shape[1], *linear.shape)) for linear in loaded.topology.linears}
    for (prompt, answer), weight in zip(answers, weights, strict=True):
        model.zero_grad()
        logits = model(torch.tensor([[*trunk, *prompt, *answer]]), use_cache=False).logits[0]
        surprise = -logits[-len(answer) - 1 : -1].log_softmax(dim=1)[torch.arange(len(answer)), list(answer)]
        surprise.mean().backward()
        for linear in loaded.topology.linears:
            gradient = linear.of(matrices[linear.module].grad).reshape(linear.shape).abs().numpy()
            sums[linear.key] += weight[:, None, None] * gradient
    for linear in loaded.topology.linears:
        size = linear.weight(model).detach().reshape(linear.shape).abs().numpy()
        sums[linear.key] *= size / weights.sum(axis=0)[:, None, None]
    return sums


def check(found: dict, expected: dict, rtol=2e-4):
    assert list(found) == list(expected)
    for key, scores in expected.items():
        assert found[key].dtype == np.float32
        assert found[key].shape == scores.shape
        assert np.allclose(found[key], scores, rtol=rtol, atol=rtol / 10 * scores.max()), key


def test_scores_are_weight_times_gradient_of_every_answer_alone(loaded, asked, architecture):
    model = loaded(architecture)
    trunk, answers = asked(model)
    assert len(trunk) > 12  # attention windows end within the trunk
    check(dict(snip(model, trunk, answers, WEIGHTS, roles=ROLES)), brute_force(model, trunk, answers, WEIGHTS))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(("batch", "layers_at_once"), [(1, 1), (2, 2), (4, 1), (16, 9)])
def test_neither_batches_nor_rounds_change_a_score(loaded, asked, architecture, batch, layers_at_once):
    model = loaded(architecture)
    trunk, answers = asked(model)
    whole = dict(snip(model, trunk, answers, WEIGHTS, roles=ROLES, work=Work(batch=3)))
    parts = dict(
        snip(model, trunk, answers, WEIGHTS, roles=ROLES, work=Work(batch=batch, layers_at_once=layers_at_once))
    )
    check(parts, whole, rtol=1e-4)


def test_the_trunk_is_part_of_every_sample(loaded, asked):
    model = loaded("mistral")
    trunk, answers = asked(model)
    bare = [((*trunk, *prompt), answer) for prompt, answer in answers]
    check(dict(snip(model, trunk, answers, WEIGHTS, roles=ROLES)), dict(snip(model, (), bare, WEIGHTS, roles=ROLES)))


def test_padding_does_not_count(loaded):
    """A short answer beside a much longer one in the same pass scores as it does alone."""
    model = loaded("gpt_neo")
    short, long = ((20, 21), (30, 1)), (tuple(range(20, 60)), (30, 31, 32, 1))
    weights = np.array([[1.0, 0], [0, 1]])
    together = dict(snip(model, (9, 8), [short, long], weights, roles=ROLES, work=Work(batch=2)))
    for number, answer in enumerate((short, long)):
        for key, scores in snip(model, (9, 8), [answer], np.ones((1, 1)), roles=ROLES):
            assert np.allclose(together[key][number], scores[0], rtol=1e-4, atol=1e-5 * scores.max()), key


def test_a_weight_counts_answers(loaded, asked):
    """Three times the same answer is that answer with weight 3, and a common factor cancels."""
    model = loaded("llama")
    trunk, answers = asked(model)
    apart = [answers[0], answers[0], answers[1], answers[0]]
    one = dict(snip(model, trunk, apart, np.ones((4, 1)), roles=ROLES))
    check(dict(snip(model, trunk, answers[:2], np.array([[3.0], [1.0]]), roles=ROLES)), one)
    check(dict(snip(model, trunk, answers[:2], np.array([[0.3], [0.1]]), roles=ROLES)), one)


def test_gradients_of_different_answers_do_not_cancel(loaded, asked):
    """The mean of absolute gradients is at least the absolute mean gradient, and here well above it."""
    model = loaded("llama")
    trunk, answers = asked(model)
    linear = model.topology.linear("1.down")
    matrix = copy.deepcopy(model.model)
    weight = linear.weight(matrix).requires_grad_(True)
    for prompt, answer in answers:
        logits = matrix(torch.tensor([[*trunk, *prompt, *answer]]), use_cache=False).logits[0, -len(answer) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).backward()
    of_the_mean = (weight * weight.grad).abs().detach().numpy() / len(answers)
    found = dict(snip(model, trunk, answers, np.ones((len(answers), 1)), roles=("down",)))["1.down"][0]
    assert (found >= of_the_mean * 0.999 - 1e-9).all()
    assert found.sum() > 1.2 * of_the_mean.sum()


def test_only_the_answer_s_tokens_count(loaded):
    """A model sure of its answer has nothing to learn from it, however surprising the prompt."""
    model = loaded("llama")
    prompt = (100, 7, 61, 33, 5)
    with torch.inference_mode():
        scores = model.model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    likely, unlikely = int(scores.argmax()), int(scores.argmin())
    sure = copy.deepcopy(model.model)
    sure.get_output_embeddings().weight.data *= 100
    found = dict(
        snip(replace(model, model=sure), (), [(prompt, (likely,)), (prompt, (unlikely,))], np.eye(2), roles=("down",))
    )
    for scores in found.values():
        assert scores[0].max() < 1e-6 * scores[1].max()


def test_only_the_roles_asked_for_are_scored_and_layer_comes_after_layer(loaded, asked):
    for architecture in ("gpt2", "llama"):
        model = loaded(architecture)
        trunk, answers = asked(model)
        every = dict(snip(model, trunk, answers, WEIGHTS, roles=ROLES))
        some = dict(snip(model, trunk, answers, WEIGHTS, roles=("v", "up"), work=Work(layers_at_once=2)))
        assert list(some) == [f"{layer}.{role}" for layer in range(3) for role in ("v", "up")]
        check(some, {key: every[key] for key in some})
    assert list(snip(loaded("gpt2"), trunk, answers, WEIGHTS, roles=("gate",))) == []


def test_a_weighting_without_answers_scores_nothing(loaded, asked):
    model = loaded("qwen2")
    trunk, answers = asked(model)
    weights = np.column_stack([WEIGHTS[:, 0], np.zeros(len(answers))])
    for _, scores in snip(model, trunk, answers, weights, roles=("q", "down")):
        assert (scores[0] > 0).any()
        assert not scores[1].any()


def test_a_round_is_run_only_when_its_layers_are_asked_for(loaded, asked):
    """Gradients of one layer at a time: the second layer's passes begin when the first layer has been taken."""
    model = loaded("llama")
    trunk, answers = asked(model)
    seen = []
    scores = snip(
        model,
        trunk,
        answers,
        WEIGHTS,
        roles=ROLES,
        work=Work(progress=lambda label, done, total: seen.append((done, total)), batch=2, layers_at_once=1),
    )
    assert seen == []
    first = [next(scores)[0] for _ in ROLES]
    assert first == [f"0.{role}" for role in ROLES]
    assert seen == [(0, 15), (2, 15), (4, 15), (5, 15)]  # five answers that count, three rounds
    assert next(scores)[0] == "1.q"
    assert seen[4:] == [(5, 15), (7, 15), (9, 15), (10, 15)]


def test_by_default_a_round_has_as_many_layers_as_memory_is_granted_for(loaded, asked, monkeypatch):
    model = loaded("llama")
    trunk, answers = asked(model)
    layer = 4 * 2 * sum(linear.out_features * linear.in_features for linear in model.topology.linears) // 3
    for granted, rounds in ((layer - 1, 3), (2 * layer - 1, 3), (2 * layer, 2), (3 * layer, 1)):
        monkeypatch.setattr(gradients, "ACCUMULATOR_BYTES", granted)
        seen: list = []

        def note(*report, seen=seen):
            seen.append(report)

        dict(snip(model, trunk, answers, WEIGHTS, roles=ROLES, work=Work("SNIP", note)))
        assert seen[-1] == ("SNIP", 5 * rounds, 5 * rounds)


def state(model) -> list:
    return [
        (name, parameter.requires_grad, parameter.grad, parameter.detach().clone())
        for name, parameter in model.named_parameters()
    ]


def hooked(model) -> bool:
    return any(each._forward_hooks or each._forward_pre_hooks or each._backward_hooks for each in model.modules())


def test_the_model_is_left_as_it_was(loaded, asked, architecture):
    model = loaded(architecture)
    trunk, answers = asked(model)
    before = state(model.model)
    scores = snip(model, trunk, answers, WEIGHTS, roles=ROLES, work=Work(layers_at_once=1))
    next(scores)
    assert not hooked(model.model)  # not even between two rounds
    assert torch.is_grad_enabled()
    list(scores)
    assert not hooked(model.model)
    for (_, wanted, gradient, value), (_, *then) in zip(state(model.model), before, strict=True):
        assert (wanted, gradient) == (False, None) == tuple(then[:2])
        assert torch.equal(value, then[2])


def test_a_trainable_model_keeps_its_gradients(loaded, asked):
    model = replace(loaded("gpt2"), model=copy.deepcopy(loaded("gpt2").model).requires_grad_(True))
    trunk, answers = asked(model)
    for parameter in model.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        found = dict(snip(model, trunk, answers, WEIGHTS, roles=ROLES))
    assert all(each.requires_grad and (each.grad == 1).all() for each in model.model.parameters())
    check(found, dict(snip(loaded("gpt2"), trunk, answers, WEIGHTS, roles=ROLES)))


def test_hooks_are_gone_after_an_error(loaded, asked):
    model = loaded("llama")
    trunk, answers = asked(model)

    def interrupt(label, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(snip(model, trunk, answers, WEIGHTS, roles=ROLES, work=Work(progress=interrupt)))
    assert not hooked(model.model)


def test_a_half_precision_model_gives_nearly_the_same_scores_in_float32(loaded, asked):
    model = loaded("llama")
    half = replace(model, model=copy.deepcopy(model.model).bfloat16(), dtype=torch.bfloat16)
    trunk, answers = asked(model)
    whole = dict(snip(model, trunk, answers, WEIGHTS, roles=ROLES))
    for key, scores in snip(half, trunk, answers, WEIGHTS, roles=ROLES):
        assert scores.dtype == np.float32
        assert np.corrcoef(scores.reshape(-1), whole[key].reshape(-1))[0, 1] > 0.98, key


@pytest.mark.parametrize(
    ("answers", "weights", "options", "message"),
    [
        ([((20,), (30,)), ((21,), ())], np.ones((2, 1)), {}, r"answers\[1\] has no answer tokens"),
        ([((), (30,))], np.ones((1, 1)), {}, r"answers\[0\] has no prompt tokens"),
        ([((20,), (30,))], np.ones((2, 1)), {}, r"shape \(2, 1\): give one row for each of the 1 answers"),
        ([((20,), (30,))], np.ones(1), {}, r"shape \(1,\)"),
        ([((20,), (30,))], np.array([[-1.0]]), {}, "not negative"),
        ([((20,), (30,))], np.array([[np.nan]]), {}, "finite"),
        ([((20,), (30,))], np.ones((1, 1)), {"work": Work(layers_at_once=0)}, "layers_at_once is 0"),
    ],
)
def test_what_has_no_meaning_is_refused_at_once(loaded, answers, weights, options, message):
    with pytest.raises(ExciseError, match=message):
        snip(loaded("llama"), (), answers, weights, roles=ROLES, **options)
