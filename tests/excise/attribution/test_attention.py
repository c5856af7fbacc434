"""Attention to the name from shared trees is that of the definition, where every answer is read on its own."""

import copy
import shutil
import weakref

import numpy as np
import pytest
import torch
import transformers

from excise.attribution.attention import attention_to_name
from excise.errors import ExciseError
from excise.files.parts import Work
from excise.generation.tree import answer_tree, common_prefix
from excise.interventions.heads import heads_mask
from excise.models.encoding import encode
from excise.models.loading import load_model
from excise.models.specs import ModelSpec

REST = {
    "vocab_size": 304,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = 24
"""From some of the answers' tokens it reaches a part of the name, from others nothing of it."""
WINDOWED = {
    "gpt_neo": {"window_size": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "mistral": {"sliding_window": WINDOW},
}


@pytest.fixture
def material(prompts):
    """Five prompts of both groups, their names' tokens, answers that repeat and share beginnings, two weightings."""

    def make(loaded):
        rng = np.random.default_rng(4)
        encoded = encode(loaded, prompts)[:5]
        answers = [
            [
                (tuple(rng.integers(20, 23, rng.integers(0, 6)).tolist()), 1 if rng.random() < 0.5 else None)
                for _ in range(size)
            ]
            for size in (4, 1, 6, 3, 3)
        ]
        answers[0][1] = answers[0][0] = ((20, 21, 22), 1)
        return encoded, answers, [rng.integers(0, 3, (len(own), 2)).astype(float) for own in answers]

    return make


def found_by_trees(loaded, encoded, answers, weights, *, trunk=None, **options):
    trunk = common_prefix([each.tokens for each in encoded]) if trunk is None else trunk
    trees = [answer_tree(prompt.tokens[trunk:], *each) for prompt, *each in zip(encoded, answers, weights, strict=True)]
    names = [tuple(place - trunk for place in prompt.name) for prompt in encoded]
    return attention_to_name(loaded, encoded[0].tokens[:trunk], trees, names, work=Work(**options))


def open_copy(loaded):
    """A copy of the model that gives its attention probabilities; transformers leaves hooks of its own in it."""
    model = copy.deepcopy(loaded.model)
    model.set_attn_implementation("eager")
    return model


def definition(loaded, encoded, answers, weights) -> dict[str, np.ndarray]:
    """Method A7 word by word: one plain pass per answer, all its attention matrices, loops over its tokens."""
    total = {"mean": 0.0, "max": 0.0}
    steps = 0.0
    model = open_copy(loaded)
    with torch.inference_mode():
        for prompt, own, own_weights in zip(encoded, answers, weights, strict=True):
            for (answer, _), weight in zip(own, own_weights, strict=True):
                every = model(
                    torch.tensor([[*prompt.tokens, *answer]]), use_cache=False, output_attentions=True
                ).attentions
                attention = torch.cat(every).double().numpy()  # [layers, heads, queries, keys]
                name = attention[..., prompt.name[0] : prompt.name[1]]
                for query in range(len(prompt.tokens), len(prompt.tokens) + len(answer)):
                    total["mean"] = total["mean"] + np.multiply.outer(weight, name[:, :, query].mean(axis=-1))
                    total["max"] = total["max"] + np.multiply.outer(weight, name[:, :, query].max(axis=-1))
                    steps = steps + weight
    return {key: value / steps[:, None, None] for key, value in total.items()}


def check(loaded, found, expected):
    shape = (2, loaded.topology.layers, loaded.topology.heads)
    assert list(found) == ["mean", "max"]
    for key, scores in found.items():
        assert scores.shape == expected[key].shape == shape
        assert scores.dtype == np.float32
        assert np.abs(scores - expected[key]).max() < 1e-5
    # What is compared is no constant: heads and weightings differ.
    assert expected["mean"].std() > 1e-3
    assert np.abs(expected["mean"][0] - expected["mean"][1]).max() > 1e-4
    assert (expected["max"] > expected["mean"] + 1e-4).any()


@pytest.mark.parametrize("batch", [2, 8])
def test_scores_are_those_of_every_answer_alone(loaded, material, architecture, batch):
    model = loaded(architecture, config=WINDOWED.get(architecture, {}))
    given = material(model)
    lengths = {end - start for start, end in (prompt.name for prompt in given[0])}
    assert len(lengths) > 2, "names should differ in their number of tokens"
    check(model, found_by_trees(model, *given, batch=batch), definition(model, *given))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
        ("gpt_neo", {}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("mistral", {}),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": WINDOW,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            },
        ),
    ],
)
def test_scores_follow_the_configuration(loaded, material, architecture, config):
    model = loaded(architecture, config=config)
    given = material(model)
    check(model, found_by_trees(model, *given), definition(model, *given))


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen3Config(**REST),
        transformers.GemmaConfig(**REST),
        transformers.Gemma3TextConfig(**REST, sliding_window=WINDOW, layer_types=ALTERNATING),
    ],
    ids=lambda config: config.model_type,
)
def test_scores_in_the_other_families(tiny_model, material, tmp_path, config):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = load_model(ModelSpec(key="other", folder=folder), {}, device="cpu", home=tmp_path / "home")
    given = material(model)
    check(model, found_by_trees(model, *given), definition(model, *given))


def test_the_batch_size_and_the_trunk_do_not_matter(loaded, material):
    model = loaded("gemma2", config=WINDOWED["gemma2"])
    given = material(model)
    usual = found_by_trees(model, *given)
    for options in ({"batch": 1}, {"batch": 3}, {"trunk": 0}, {"trunk": 5, "batch": 2}):
        other = found_by_trees(model, *given, **options)
        for key in usual:
            assert np.allclose(other[key], usual[key], atol=1e-6), options


def test_a_name_beyond_the_window_gets_no_attention(loaded, material):
    """Every layer of this model sees twelve tokens back, and the names stand further from the answer."""
    model = loaded("mistral")
    for scores in found_by_trees(model, *material(model)).values():
        assert (scores == 0).all()


def test_uniform_attention_is_one_over_the_visible_tokens_by_hand(loaded, material):
    """With all queries zero a token at place t attends 1 / (t + 1) to each token, so to each of the name."""
    model = loaded("llama")
    encoded, answers, weights = material(model)
    terms = [
        (weight / (len(prompt.tokens) + step + 1), weight)
        for prompt, own, own_weights in zip(encoded, answers, weights, strict=True)
        for (answer, _), weight in zip(own, own_weights, strict=True)
        for step in range(len(answer))
    ]
    expected = sum(share for share, _ in terms) / sum(weight for _, weight in terms)
    everything = np.ones((model.topology.layers, model.topology.heads), dtype=bool)
    with heads_mask(everything, "zero_query").applied(model):
        found = found_by_trees(model, encoded, answers, weights)
    for scores in found.values():
        assert np.allclose(scores, expected[:, None, None], rtol=1e-5)


def test_an_answer_counts_as_often_as_it_was_given(loaded, material):
    model = loaded("gpt_neox")
    encoded, answers, weights = material(model)
    repeated = [[*own, *own] for own in answers]
    once = found_by_trees(model, encoded, answers, weights)
    twice = found_by_trees(model, encoded, repeated, [np.concatenate([own, own]) for own in weights])
    weighed = found_by_trees(model, encoded, answers, [2 * own for own in weights])
    for key in once:
        assert np.allclose(once[key], twice[key], atol=1e-7)
        assert np.allclose(once[key], weighed[key], atol=1e-7)


def test_one_layer_s_probabilities_are_held_at_a_time(loaded, material):
    """Whenever a layer's probabilities appear, those of the layers before it are gone."""
    model = loaded("llama")
    alive, most = [], []

    def watch(module, given, output):
        alive.append(weakref.ref(output[1]))
        most.append(sum(each() is not None for each in alive))

    hooks = [
        model.topology.attention_module(model.model, layer).register_forward_hook(watch)
        for layer in range(model.topology.layers)
    ]
    found_by_trees(model, *material(model), trunk=0)
    for hook in hooks:
        hook.remove()
    assert len(most) == model.topology.layers
    assert max(most) == 1


def test_the_model_is_left_as_it_was_even_after_an_error(loaded, material, architecture):
    model = loaded(architecture)
    given = material(model)
    before = model.model.config._attn_implementation
    hooks = [dict(module._forward_hooks) for module in model.model.modules()]

    def interrupt(label, done, total):
        raise KeyboardInterrupt

    found_by_trees(model, *given)
    with pytest.raises(KeyboardInterrupt):
        found_by_trees(model, *given, progress=interrupt)
    assert model.model.config._attn_implementation == before
    assert [dict(module._forward_hooks) for module in model.model.modules()] == hooks
    assert before == ("eager" if architecture in ("gemma2", "gpt_neo", "gptj") else "sdpa")


def test_progress_counts_prompts(loaded, material):
    model = loaded("gpt2")
    seen = []
    found_by_trees(model, *material(model), batch=2, progress=lambda *report: seen.append(report), label="heads")
    assert seen == [("heads", 0, 5), ("heads", 2, 5), ("heads", 4, 5), ("heads", 5, 5)]


# Errors


def test_a_weighting_without_a_generated_token_is_said(loaded, material):
    model = loaded("llama")
    encoded, answers, weights = material(model)
    for own in weights:
        own[:, 1] = 0
    with pytest.raises(ExciseError, match="weighting 1 has no generated token"):
        found_by_trees(model, encoded, answers, weights)
    with pytest.raises(ExciseError, match="weighting 0 has no generated token"):
        found_by_trees(model, encoded[:1], [[((), 1)]], [np.ones((1, 2))], trunk=0)


@pytest.mark.parametrize("name", [(2, 2), (3, 2), (-1, 2), (3, 5)])
def test_a_name_outside_its_prompt_is_said(loaded, name):
    tree = answer_tree((30, 31, 32, 33), [((34,), 1)], np.ones((1, 1)))
    with pytest.raises(ExciseError, match=f"name of prompt 1 is at columns {name[0]} to {name[1]} of 4"):
        attention_to_name(loaded("llama"), [40], [tree, tree], [(0, 4), name])


def test_every_prompt_needs_its_name(loaded):
    tree = answer_tree((30, 31), [((34,), 1)], np.ones((1, 1)))
    for trees, names in (([tree], []), ([], [])):
        with pytest.raises(ExciseError, match="give one name per prompt"):
            attention_to_name(loaded("llama"), [40], trees, names)
