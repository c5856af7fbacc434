"""Claims about the baselines for heads: the sizes of their slices, and the loss's slope along each head, by hand."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from excise.attribution.head_scores import head_gradient, head_magnitude
from excise.errors import ExciseError


@dataclass(frozen=True)
class Window:
    tokens: tuple[int, ...]
    scored: int


def texts(*lengths, scored=None, seed=0) -> list[Window]:
    rng = np.random.default_rng(seed)
    return [Window(tuple(rng.integers(5, 300, length).tolist()), scored or length - 1) for length in lengths]


def slices(model, kind, layer, head, size, shared):
    """A head's own weights, in the modules that transformers gives the architecture."""
    own = slice(head * size, (head + 1) * size)
    if kind == "gpt2":
        attention = model.transformer.h[layer].attn
        width = attention.c_proj.weight.shape[0]
        parts = [attention.c_attn.weight[:, part * width + own.start : part * width + own.stop] for part in range(3)]
        return [*parts, attention.c_proj.weight[own]]
    if kind == "gpt_neox":
        attention = model.gpt_neox.layers[layer].attention
        return [
            attention.query_key_value.weight[3 * own.start : 3 * own.stop],
            attention.dense.weight[:, own],
        ]
    keys = slice(head // shared * size, (head // shared + 1) * size)
    attention = {
        "gpt_neo": lambda: model.transformer.h[layer].attn.attention,
        "gptj": lambda: model.transformer.h[layer].attn,
    }.get(kind, lambda: model.model.layers[layer].self_attn)()
    o = attention.out_proj if kind in ("gpt_neo", "gptj") else attention.o_proj
    return [
        attention.q_proj.weight[own],
        attention.k_proj.weight[keys],
        attention.v_proj.weight[keys],
        o.weight[:, own],
    ]


def test_the_magnitude_is_the_norm_of_a_heads_slices_over_the_largest(loaded, architecture):
    model = loaded(architecture)
    topology = model.topology
    norms = np.array(
        [
            [
                torch.cat(
                    [
                        part.flatten()
                        for part in slices(
                            model.model,
                            architecture,
                            layer,
                            head,
                            topology.head_dim,
                            topology.heads // topology.kv_heads,
                        )
                    ]
                )
                .norm()
                .item()
                for head in range(topology.heads)
            ]
            for layer in range(topology.layers)
        ]
    )
    found = head_magnitude(model)
    assert found.shape == (topology.layers, topology.heads)
    assert found == pytest.approx(norms / norms.max(), rel=1e-5)
    assert found.max() == 1
    assert found.std() > 1e-3


def test_shared_keys_count_for_each_of_their_heads(loaded):
    """Keys of the first of two key heads made large: half of the layer's six heads are large with them."""
    model = loaded("llama")
    own = replace(model, model=copy.deepcopy(model.model))
    with torch.no_grad():
        own.model.model.layers[1].self_attn.k_proj.weight[: model.topology.head_dim] *= 100
    found = head_magnitude(own)
    assert (found[1, :3] > 0.9).all()
    assert (found[1, 3:] < 0.1).all()
    assert (found[[0, 2]] < 0.1).all()


def slopes(model, windows, step=4e-3) -> np.ndarray:
    """|dL/d mask| of each window by central differences, [windows, layers, heads].

    Scaling a head's columns of the output projection is scaling its input. Norms stay in float32 in some
    architectures, which forbids smaller steps.
    """
    topology = model.topology
    copied = copy.deepcopy(model.model).double()
    found = np.zeros((len(windows), topology.layers, topology.heads))
    for layer in range(topology.layers):
        linear = topology.linear(f"{layer}.o")
        for head in range(topology.heads):
            own = slice(head * topology.head_dim, (head + 1) * topology.head_dim)
            for sign in (1, -1):
                with torch.no_grad():
                    linear.weight(copied)[:, own] *= 1 + sign * step
                    for number, window in enumerate(windows):
                        tokens = torch.tensor([window.tokens])
                        log_p = copied(tokens, use_cache=False).logits[0, :-1].double().log_softmax(dim=-1)
                        right = log_p.gather(1, tokens[0, 1:, None])[-window.scored :]
                        found[number, layer, head] += sign * -right.mean().item() / (2 * step)
                    linear.weight(copied)[:, own] /= 1 + sign * step
    return np.abs(found)


def normalised(totals):
    return totals / np.sqrt((totals**2).sum(axis=1, keepdims=True))


def test_the_gradient_is_the_slope_of_the_loss(loaded, architecture):
    """Longer than the attention windows of the tiny models, with windows that score all tokens and some."""
    model = loaded(architecture)
    windows = [*texts(20), *texts(20, 14, scored=5, seed=1)]
    expected = normalised(slopes(model, windows).sum(axis=0))
    found = head_gradient(model, windows)
    assert found.shape == (model.topology.layers, model.topology.heads)
    assert found == pytest.approx(expected, rel=5e-3, abs=2e-4)
    assert found.std() > 0.01


def test_windows_do_not_cancel(loaded):
    """The sum of absolute slopes, not the absolute sum: these differ for windows whose slopes differ in sign."""
    model = loaded("gpt2")
    windows = texts(16, 16, 16, 9, seed=3)
    apart = slopes(model, windows)
    found = head_gradient(model, windows)
    assert found == pytest.approx(normalised(apart.sum(axis=0)), rel=5e-3, abs=2e-4)
    with_one = head_gradient(model, windows[:1])
    assert np.abs(found - with_one).max() > 0.05


def test_layers_have_length_one_and_batches_change_nothing(loaded):
    model = loaded("llama")
    windows = texts(12, 7, 12, 12, 7, 12, 12)
    found = head_gradient(model, windows, batch=4)
    assert (found**2).sum(axis=1) == pytest.approx(1)
    for batch in (1, 7):
        assert head_gradient(model, windows, batch=batch) == pytest.approx(found, rel=1e-4)
    assert head_gradient(model, windows[::-1], batch=2) == pytest.approx(found, rel=1e-4)


def test_a_head_that_writes_nothing_has_no_gradient_and_a_silent_layer_none_at_all(loaded):
    model = loaded("llama")
    own = replace(model, model=copy.deepcopy(model.model))
    size = model.topology.head_dim
    with torch.no_grad():
        own.model.model.layers[0].self_attn.o_proj.weight[:, 2 * size : 3 * size] = 0
        own.model.model.layers[2].self_attn.o_proj.weight.zero_()
    found = head_gradient(own, texts(12))
    assert found[0, 2] == 0
    assert (found[0, [0, 1, 3, 4, 5]] > 0).all()
    assert (found[2] == 0).all()


def interrupted(*_):
    raise KeyboardInterrupt


def test_the_model_is_as_before(loaded, monkeypatch):
    model = loaded("gpt_neox")
    hooks = lambda: sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in model.model.modules())  # noqa: E731
    before = hooks()
    told = []
    head_gradient(model, texts(8, 8, 6), batch=2, progress=lambda label, done, total: told.append((done, total)))
    assert hooks() == before
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert told == [(1, 3), (3, 3)]
    monkeypatch.setattr("excise.attribution.head_scores._losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        head_gradient(model, texts(8))
    assert hooks() == before


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "no windows"),
        ([Window((5, 6, 7), 3)], "window 0: 3 of 3 tokens scored"),
        ([Window((5, 6, 7), 2), Window((5, 6), 0)], "window 1: 0 of 2 tokens scored"),
    ],
)
def test_windows_without_a_prediction_are_named(loaded, windows, message):
    with pytest.raises(ExciseError, match=message):
        head_gradient(loaded("gpt2"), windows)
