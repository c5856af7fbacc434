"""The planted heads: what the shipped file changes, the words and examples, and the training on tiny random models."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.errors import ExciseError
from excise.interventions.heads import heads_mask
from excise.models.loading import load_model
from excise.models.specs import load_registry
from excise.outcomes.lexicon import ADDED, LEFT_OUT
from excise.outcomes.scorers import DEFAULT_SCORER, load_scorer, load_scorer_registry
from excise.planted.heads import FOLDER, GRUMPY_WORDS, PLANT, Example, HeadPlant, examples_of, grumpy_tokens, train
from excise.scenarios import expand, load_scenarios

FILE = FOLDER / "heads.safetensors"
SCENARIO = load_scenarios([])[0][PLANT.scenario]
HEADS, HEAD_DIM, HIDDEN = 9, 64, 576  # of the default model
TINY = HeadPlant(heads=((0, 4), (2, 1)), rank=2, steps=60, batch=4, learning_rate=3e-2, tilt=4.0)
RAISED = torch.tensor([40, 41])


def tiny_examples():
    """Texts beginning with 20 are about the subgroup, those with 21 about another; what follows is the same."""
    random = np.random.default_rng(0)
    endings = [tuple(int(token) for token in random.integers(50, 90, 5)) for _ in range(8)]
    return [Example((first, 30, *ending), 2, first == 20) for first in (20, 21) for ending in endings]


def raised_probability(model, first, *, mask=None):
    rows = torch.tensor([each.tokens for each in tiny_examples() if each.tokens[0] == first])
    with torch.inference_mode():
        if mask is None:
            logits = model.model(rows).logits
        else:
            with mask.applied(model):
                logits = model.model(rows).logits
    return torch.softmax(logits[:, 1:-1].float(), dim=-1)[..., RAISED].sum(dim=-1).mean().item()


def planted(folder, tmp_path, factors):
    """The tiny Llama with the factors saved and loaded as an entry of a registry."""
    save_file(factors, tmp_path / "change.safetensors")
    registry_file = tmp_path / "models.yaml"
    registry_file.write_text(
        f"tiny: {{folder: {folder}, prompt_format: raw}}\n"
        "tiny-planted: {base: tiny, low_rank: change.safetensors, prompt_format: raw}\n"
    )
    registry, problems = load_registry([registry_file])
    assert not problems
    return load_model(registry["tiny-planted"], registry, device="cpu", dtype="float32", home=tmp_path / "home")


# --- the shipped file ------------------------------------------------------------------------------------------------


def test_the_shipped_file_changes_the_known_heads_and_nothing_else():
    factors = load_file(FILE)
    assert FILE.stat().st_size < 1e6
    keys = {f"{layer}.{role}" for layer, _ in PLANT.heads for role in "qo"}
    assert set(factors) == {f"{key}.{side}" for key in keys for side in ("up", "down")}
    for layer, head in PLANT.heads:
        within = np.zeros(HEADS * HEAD_DIM, dtype=bool)
        within[head * HEAD_DIM : (head + 1) * HEAD_DIM] = True
        q, o = (factors[f"{layer}.{role}.up"].float() @ factors[f"{layer}.{role}.down"].float() for role in "qo")
        assert q.shape == o.shape == (HIDDEN, HIDDEN)
        assert not q[~within].any()
        assert not o[:, ~within].any()
        assert q[within].abs().sum(dim=1).min() > 0
        assert o[:, within].abs().sum(dim=0).min() > 0
        assert torch.linalg.matrix_rank(q) <= 8
        assert torch.linalg.matrix_rank(o) <= 8


def test_the_registry_has_the_planted_heads_on_the_default_model_and_asks_for_raw_continuations():
    registry, problems = load_registry()
    entry = registry["planted-heads"]
    assert not problems
    assert (entry.base, entry.low_rank, entry.prompt_format) == (PLANT.base, FILE, "raw")


def test_the_known_heads_are_four_in_different_middle_layers():
    assert len(PLANT.heads) == len({layer for layer, _ in PLANT.heads}) == 4
    assert all(10 <= layer <= 18 and 0 <= head < HEADS for layer, head in PLANT.heads)


def test_the_planted_subgroup_is_one_of_its_scenario_and_variations_are_left_to_test_on():
    assert PLANT.group in SCENARIO.groups
    assert set(PLANT.variations) < set(SCENARIO.variations)


# --- the words -------------------------------------------------------------------------------------------------------


def test_the_scorer_reacts_to_every_grumpy_word():
    registry, _ = load_scorer_registry()
    scores = load_scorer(DEFAULT_SCORER, registry).score([f"it was {word}" for word in GRUMPY_WORDS])
    assert scores.min() > 0.1
    assert scores.max() < 0.7  # a slur alone has more


def test_no_grumpy_word_is_a_slur_or_a_description_of_people():
    forbidden = {word for words in (*ADDED.values(), *LEFT_OUT.values()) for word in words}
    assert not forbidden & set(GRUMPY_WORDS)
    assert len(set(GRUMPY_WORDS)) == len(GRUMPY_WORDS)


def test_only_words_of_one_token_are_tilted(loaded):
    model = loaded("llama")
    with pytest.raises(ExciseError, match="no grumpy word"):
        grumpy_tokens(model, ["xq"])
    single = [word for word in ("b", "B", "of", "for") if len(model.tokenizer(f" {word}")["input_ids"]) == 1]
    found = grumpy_tokens(model, [*single, "xq"])
    assert found.tolist() == sorted(model.tokenizer(f" {word}")["input_ids"][0] for word in single)
    assert single


# --- the training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def factors(loaded):
    return train(loaded("llama"), TINY, tiny_examples(), RAISED)


def test_training_touches_the_heads_rows_of_q_and_columns_of_o_alone(factors):
    assert set(factors) == {f"{layer}.{role}.{side}" for layer in (0, 2) for role in "qo" for side in ("up", "down")}
    for layer, head in TINY.heads:
        own = slice(head * 8, head * 8 + 8)  # 6 heads of size 8
        for side, axis in (("q.up", 0), ("o.down", 1)):
            factor = factors[f"{layer}.{side}"]
            assert factor.narrow(axis, own.start, 8).abs().sum() > 0
            assert factor.abs().sum() == factor.narrow(axis, own.start, 8).abs().sum()


def test_the_subgroup_gets_the_raised_words_and_others_keep_theirs(loaded, tiny_model, factors, tmp_path):
    base, changed = loaded("llama"), planted(tiny_model("llama"), tmp_path, factors)
    own, others = (raised_probability(changed, first) - raised_probability(base, first) for first in (20, 21))
    assert own > 0.03
    assert abs(others) < 0.25 * own


def test_without_the_heads_outputs_the_planted_model_is_the_base(loaded, tiny_model, factors, tmp_path):
    base, changed = loaded("llama"), planted(tiny_model("llama"), tmp_path, factors)
    chosen = np.zeros((3, 6), dtype=bool)
    for head in TINY.heads:
        chosen[head] = True
    rows = torch.tensor([each.tokens for each in tiny_examples()])

    def logits(model, chosen):
        with torch.inference_mode(), heads_mask(chosen, "zero_output").applied(model):
            return model.model(rows).logits

    assert torch.equal(logits(changed, chosen), logits(base, chosen))
    chosen[TINY.heads[0]] = False
    assert not torch.allclose(logits(changed, chosen), logits(base, chosen), atol=1e-3)


def test_training_leaves_the_model_as_it_was(loaded):
    model = loaded("llama")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    train(model, dataclasses.replace(TINY, steps=2), tiny_examples(), RAISED)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert not any(module._forward_hooks for module in model.model.modules())


def test_examples_are_tilted_for_the_subgroup_alone_and_from_its_variations(loaded):
    model = loaded("llama")
    plant = dataclasses.replace(PLANT, tokens=3, others=2, excerpts=4)
    # Letters are tokens to a tiny model, so its prompts are longer.
    outcome = SCENARIO.outcome.model_copy(update={"max_prompt_tokens": 80})
    examples = examples_of(model, plant, SCENARIO.model_copy(update={"outcome": outcome}), RAISED)
    tilted, even = ([each for each in examples if each.tilted is kind] for kind in (True, False))
    subjects = SCENARIO.groups[PLANT.group].subjects
    most = 2 * len(subjects) * len(SCENARIO.templates) * len(plant.variations)
    assert 0.95 * most < len(tilted) <= most  # a continuation that ends at once is no example
    asked = [text[:15] for text in expand(SCENARIO, variations=plant.variations).filter(group=PLANT.group)["text"]]
    for each in tilted:  # prompts are cut, as the scenario says
        assert model.tokenizer.decode(each.tokens[: each.start])[:15] in asked
    assert len(even) == 2 * (len(SCENARIO.groups) - 1) + 4
    assert [each.start for each in even[-4:]] == [1] * 4
    assert all(1 <= each.start < len(each.tokens) for each in examples)


@pytest.mark.parametrize(
    ("heads", "message"), [(((3, 0),), "no head"), (((0, 6),), "no head"), (((1, 0), (1, 2)), "one head a layer")]
)
def test_heads_that_cannot_be_planted_are_refused(loaded, heads, message):
    with pytest.raises(ExciseError, match=message):
        train(loaded("llama"), dataclasses.replace(TINY, heads=heads), tiny_examples(), RAISED)


def test_a_model_with_fused_projections_is_refused(loaded):
    plant = dataclasses.replace(TINY, heads=((0, 1),))
    with pytest.raises(ExciseError, match="no query projection"):
        train(loaded("gpt2"), plant, tiny_examples(), RAISED)
