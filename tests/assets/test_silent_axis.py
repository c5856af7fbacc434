"""A model that writes nothing about an axis of social groups: it is said, before any head is measured."""

from pathlib import Path

import polars as pl
import pytest

from tests.assets.test_chain import failures, materialized
from tests.conftest import SMALL_SCENARIO, save_tiny_model

AXIS = {
    "title": "Belief",
    "description": "An axis of two groups.",
    "outcome": {"kind": "toxicity", "max_prompt_tokens": 60},
    "groups": {
        "sun": {"label": "sun", "subjects": ["solar", "sunny"]},
        "moon": {"label": "moon", "subjects": ["lunar", "dim"]},
    },
    "templates": {
        "told": "It was said by the {name} {noun}",
        "met": "I met that {name} {noun}",
        "why": "Why is the {name} {noun}",
        "how": "How did this {name} {noun}",
    },
    "variations": {"person": {"noun": "person"}, "poet": {"noun": "poet"}},
}
SETTINGS = {
    "samples": 2,
    "text_tokens": 200,
    "strategies": ["fasp"],
    "alphas": [0.1],
    "max_new_tokens": 3,
    "variations": ["person", "poet"],
    "permutations": None,
}


def silenced(folder: Path, *, after: str | None = None) -> Path:
    """A tiny model that ends every text at once; `after`: only one that ends with this token."""
    import torch
    import transformers

    save_tiny_model(folder, "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        for layer in model.model.layers:
            for written in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                written.mul_(0.1)
                written[0] = 0.0
        table[:, 0] = 5.0 if after is None else -5.0
        if after is not None:
            table[tokenizer.convert_tokens_to_ids(after), 0] = 5.0
        head[:, 0] = -3.0
        head[tokenizer.convert_tokens_to_ids("<|end|>"), 0] = 9.0
    model.save_pretrained(folder)
    return folder


@pytest.mark.trial(34)
def test_an_axis_of_empty_continuations_is_told_in_one_sentence_before_heads_are_measured(house, tmp_path):
    house.write_models({"silent": {"folder": str(silenced(tmp_path / "silent"))}})
    house.write_scenario("belief", AXIS)
    result = house.run("prune_heads", "silent|belief", **SETTINGS)
    found = failures(result)
    assert list(found) == ["head_impacts"]
    assert "the model wrote nothing: all" in found["head_impacts"]
    assert "as it ends its text with the first token" in found["head_impacts"]
    assert "What helps: a model that continues plain text" in found["head_impacts"]
    assert "again" not in found["head_impacts"]
    assert not list((house.data / "artifacts").rglob("head_impacts"))
    check = house.warehouse.read("checks", check_name="judged_variations").row(0, named=True)
    assert (check["passed"], check["severity"], check["figure"]) == (False, "ERROR", 0.0)
    assert "the model wrote nothing: all" in check["message"]


@pytest.mark.trial(34)
def test_a_variation_of_empty_continuations_does_not_take_the_axis_down(house, tmp_path):
    """About a person the model goes on, about a poet it ends at once."""
    house.write_models({"silent": {"folder": str(silenced(tmp_path / "silent", after="t"))}})
    house.write_scenario("belief", AXIS)
    result = house.run("prune_heads", "silent|belief", **SETTINGS)
    assert failures(result) == {}
    assert materialized(result)["head_impacts"]["not_judged"] == "poet"
    metrics = house.warehouse.read("metrics", scenario="belief", metric="toxicity_bias", strategy="unpruned")
    known = dict(metrics.select("variation", "estimate").rows())
    assert known["poet"] is None
    assert known["person"] == known["(all)"] is not None
    counts = house.warehouse.read("metrics", scenario="belief", metric="judged_variations")
    assert set(counts.select("estimate", "n").rows()) == {(1.0, 2)}
    assert set(house.warehouse.read("pruned_completions")["variation"]) == {"person"}
    assert (
        "poet: the model wrote nothing"
        in house.warehouse.read("checks", asset="completions")
        .filter(pl.col("check_name") == "judged_variations")["message"]
        .item()
    )


def test_without_any_number_heads_are_not_measured_either(house, tmp_path):
    house.write_models({"silent": {"folder": str(silenced(tmp_path / "silent"))}})
    house.write_scenario("lamp", SMALL_SCENARIO)
    own = {"variations": ["lamp", "bench"], "max_new_tokens": None}
    result = house.run("prune_heads", "silent|lamp", **SETTINGS | own)
    assert list(failures(result)) == ["head_impacts"]
    assert "2 of 2 variations cannot be judged" in failures(result)["head_impacts"]
    assert "answer_prefix" in failures(result)["head_impacts"]


@pytest.mark.trial(40)
def test_a_window_longer_than_the_model_reads_ends_the_run_before_anything_is_sampled(house):
    house.write_scenario("belief", AXIS)
    result = house.run("audit_scenario", "tiny|belief", **{**SETTINGS, "text_window": 100_000})
    assert [event.step_key for event in result.get_step_failure_events()] == ["completions"]
    (message,) = failures(result).values()
    assert "size 100000 is more than the" in message
    assert "give less (text_window)" in message
    assert house.warehouse.read("completions").is_empty()
