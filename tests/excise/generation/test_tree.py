"""Packed answer trees give every token the hidden state that a plain pass over its own sequence gives it."""

import shutil

import numpy as np
import pytest
import torch
import transformers

from excise.generation.tree import Rows, answer_tree, common_prefix, logits_of, pack
from excise.models.encoding import encode
from excise.models.loading import load_model
from excise.models.specs import ModelSpec

TOLERANCE = 1e-4


def plain_hidden(loaded, tokens) -> torch.Tensor:
    """Last hidden states [time, hidden] of one sequence on its own."""
    with torch.inference_mode():
        return loaded.model.base_model(torch.tensor([list(tokens)]), use_cache=False).last_hidden_state[0]


def some_prompts(loaded, prompts) -> list[tuple[int, ...]]:
    """Prompts of three lengths."""
    return [prompt.tokens for prompt in encode(loaded, prompts)[2:5]]


def some_answers(seed: int, count: int = 7) -> list[tuple[tuple[int, ...], int | None]]:
    """Answers of 0 to 6 tokens out of three, so that many share their beginning; some cut off."""
    rng = np.random.default_rng(seed)
    return [
        (tuple(rng.integers(20, 23, rng.integers(0, 7)).tolist()), 1 if rng.random() < 0.7 else None)
        for _ in range(count)
    ]


def columns_of(tree) -> list[list[int]]:
    """The path of columns that leads to each column, itself last."""
    paths = []
    for column, parent in enumerate(tree.parents):
        paths.append([*(paths[parent] if parent >= 0 else []), column])
    return paths


def check_against_plain(loaded, prompts, trunk, batches):
    """Every column of every tree against the plain pass over the sequence that ends there."""
    trees = [answer_tree(prompt[trunk:], some_answers(seed), np.ones((7, 1))) for seed, prompt in enumerate(prompts)]
    head = prompts[0][:trunk]
    with torch.inference_mode():
        shared = Rows(loaded, head)
        if trunk:
            assert (shared.trunk_hidden[0] - plain_hidden(loaded, head)).abs().max() < TOLERANCE
        for batch in batches:
            packed = pack([trees[index] for index in batch], trunk)
            hidden = shared.copy(len(batch)).forward(packed.tokens, packed.positions, packed.attends)
            for row, index in enumerate(batch):
                for column, path in enumerate(columns_of(trees[index])):
                    if column + 1 < len(prompts[index]) - trunk:
                        continue
                    expected = plain_hidden(loaded, [*head, *(int(trees[index].tokens[step]) for step in path)])
                    assert (hidden[row, column] - expected[-1]).abs().max() < TOLERANCE
                    assert (hidden[row, path] - expected[trunk:]).abs().max() < TOLERANCE


def test_trees_equal_plain_passes(loaded, prompts, architecture):
    model = loaded(architecture)
    texts = some_prompts(model, prompts)
    trunk = common_prefix(texts)
    assert trunk > 12, "the trunk should be longer than the windows"
    check_against_plain(model, texts, trunk, [(0,), (0, 1, 2), (2, 1)])


def test_trees_equal_plain_passes_without_a_trunk(loaded, prompts, architecture):
    model = loaded(architecture)
    check_against_plain(model, some_prompts(model, prompts), 0, [(0, 1, 2)])


MIXED = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
KINDS = ["full_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("architecture", "config", "windows"),
    [
        ("gemma2", {}, (512, None, 512)),  # no window is ever reached
        ("gpt_neo", {}, (None, 64)),
        ("mistral", {}, (None, None, None)),
        ("mistral", {"sliding_window": 12}, (12, 12, 12)),
        ("qwen2", MIXED | {"layer_types": KINDS}, (None, 12, 12)),
        ("qwen2", MIXED | {"layer_types": ["sliding_attention"] * 3}, (12, 12, 12)),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, (None, None, None)),
        ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0}, (None, None)),
        ("llama", {"attention_bias": False, "num_key_value_heads": 2}, (None, None, None)),
    ],
)
def test_trees_follow_the_configuration(loaded, prompts, architecture, config, windows):
    model = loaded(architecture, config=config)
    assert model.topology.windows == windows
    texts = some_prompts(model, prompts)
    check_against_plain(model, texts, common_prefix(texts), [(0, 1, 2)])


GROUPED = {
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


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (transformers.Qwen3Config(**GROUPED), (None, None, None)),
        (transformers.GemmaConfig(**GROUPED), (None, None, None)),
        (transformers.Gemma3TextConfig(**GROUPED, sliding_window=12, layer_types=ALTERNATING), (12, None, 12)),
    ],
)
def test_trees_equal_plain_passes_in_the_other_families(tiny_model, prompts, tmp_path, config, windows):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = load_model(ModelSpec(key="other", folder=folder), {}, device="cpu", home=tmp_path / "home")
    assert model.topology.windows == windows
    texts = some_prompts(model, prompts)
    check_against_plain(model, texts, common_prefix(texts), [(0, 1, 2)])


@pytest.mark.parametrize("over", [1, 0, -1])
def test_a_window_just_reached(loaded, prompts, over):
    """The last token's window excludes one column, or none."""
    length = len(encode(loaded("mistral"), prompts)[0].tokens)
    model = loaded("mistral", config={"sliding_window": length - over})
    tokens = encode(model, prompts)[0].tokens
    with torch.inference_mode():
        rows = Rows(model, tokens)
        assert (rows.trunk_hidden[0] - plain_hidden(model, tokens)).abs().max() < TOLERANCE
    full = plain_hidden(loaded("mistral", config={}), tokens)
    seen = (plain_hidden(model, tokens) - full).abs().max() > TOLERANCE
    assert seen == (over > 0)


def test_logits_are_the_model_s(loaded, prompts, architecture):
    model = loaded(architecture)
    tokens = encode(model, prompts)[0].tokens
    with torch.inference_mode():
        expected = model.model(torch.tensor([tokens])).logits
        found = logits_of(model, plain_hidden(model, tokens)[None])
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < TOLERANCE


def test_rows_grow_in_pieces_and_keep_some(loaded, prompts, architecture):
    """Column by column, with a row dropped half way: what is left sees what it saw."""
    model = loaded(architecture)
    texts = some_prompts(model, prompts)
    trunk, size = common_prefix(texts), 6
    with torch.inference_mode():
        shared = Rows(model, texts[0][:trunk])
        rows, left = shared.copy(3), [0, 1, 2]
        for step in range(size):
            if step == 3:
                rows.keep(np.array([0, 2]))
                left = [0, 2]
            tokens = torch.tensor([[texts[index][trunk + step]] for index in left])
            positions = torch.full((len(left), 1), trunk + step)
            hidden = rows.forward(tokens, positions, torch.ones(len(left), 1, trunk + step + 1, dtype=torch.bool))
            for row, index in enumerate(left):
                expected = plain_hidden(model, texts[index][: trunk + step + 1])[-1]
                assert (hidden[row, 0] - expected).abs().max() < TOLERANCE
        assert shared.key_positions.shape == (1, trunk)
        again = shared.copy(1).forward(
            torch.tensor([[texts[1][trunk]]]), torch.tensor([[trunk]]), torch.ones(1, 1, trunk + 1, dtype=torch.bool)
        )
        assert (again[0, 0] - plain_hidden(model, texts[1][: trunk + 1])[-1]).abs().max() < TOLERANCE


def test_the_model_is_as_before(loaded, prompts):
    """GPT-Neo's own masks are lifted for the pass only, an exception in it included."""
    model = loaded("gpt_neo")
    tokens = encode(model, prompts)[0].tokens
    before = plain_hidden(model, tokens)
    rows = Rows(model, tokens)
    with pytest.raises((IndexError, RuntimeError)):
        rows.copy(1).forward(
            torch.tensor([[10**6]]), torch.tensor([[len(tokens)]]), torch.ones(1, 1, len(tokens) + 1).bool()
        )
    assert torch.equal(plain_hidden(model, tokens), before)
    buffers = dict(model.model.named_buffers())
    assert not any(module._forward_pre_hooks for module in model.model.modules())
    assert all(
        buffer.shape == (1, 1, 1024, 1024) for name, buffer in buffers.items() if name.endswith("attention.bias")
    )


# The trees themselves, by hand


def test_a_tree_by_hand():
    """Prompt 5 6; answers 7 8 (ended by 1), 7 8 cut off, 7 9 (ended by 2), and one that ends at once."""
    weights = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0]])
    tree = answer_tree((5, 6), [((7, 8), 1), ((7, 8), None), ((7, 9), 2), ((), 1)], weights)
    assert tree.tokens.tolist() == [5, 6, 7, 8, 9]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 2]
    assert tree.visits.tolist() == [[15, 150], [15, 150], [7, 70], [3, 30], [4, 40]]
    edges = {tuple(edge): visits.tolist() for edge, visits in zip(tree.edges.tolist(), tree.edge_visits, strict=True)}
    assert edges == {
        (1, 7): [7, 70],
        (2, 8): [3, 30],
        (2, 9): [4, 40],  # tokens
        (3, 1): [1, 10],
        (4, 2): [4, 40],
        (1, 1): [8, 80],  # ends
    }
    assert tree.prompt_length == 2


def test_packing_by_hand():
    trees = [
        answer_tree((5,), [((7,), 1), ((8,), 1)], np.ones((2, 1))),
        answer_tree((5, 6), [((7, 8), None)], np.ones((1, 1))),
    ]
    packed = pack(trees, 1)
    assert packed.tokens.tolist() == [[5, 7, 8, 0], [5, 6, 7, 8]]
    assert packed.positions[0, :3].tolist() == [1, 2, 2]
    assert packed.positions[1].tolist() == [1, 2, 3, 4]
    assert packed.attends[0, :3].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]
    assert packed.attends[1].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert packed.visits[:, :, 0].tolist() == [[2, 1, 1, 0], [1, 1, 1, 1]]
    assert packed.edges.tolist() == [[0, 0, 7], [0, 1, 1], [0, 0, 8], [0, 2, 1], [1, 1, 7], [1, 2, 8]]


@pytest.mark.parametrize(
    ("sequences", "length"),
    [
        ([(1, 2, 3), (1, 2, 4)], 2),
        ([(1, 2, 3), (1, 2, 3)], 2),  # every prompt keeps a token of its own
        ([(1, 2), (1, 2, 3)], 1),
        ([(1, 2, 3)], 2),
        ([(2, 1), (1, 2)], 0),
        ([(1,), (1, 2)], 0),
        ([(1, 2, 3, 4), (1, 2, 9), (1, 2, 3, 5)], 2),
    ],
)
def test_the_common_prefix(sequences, length):
    assert common_prefix(sequences) == length
