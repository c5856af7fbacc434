"""The real default model and its planted versions, from the package's weights to the metrics table.

These claims are about the method: it finds a gap that was planted, removes it beyond what random damage does, and finds
none where none was planted. Small sizes keep them fast; tiny random models test the mechanics elsewhere.
"""

from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import torch

from excise.conditions import ALL
from excise.evaluation.numbers import evaluate
from excise.generation.answering import Answering
from excise.generation.completions import complete
from excise.generation.sampling import SamplingParameters, sample
from excise.generation.settings import Enumeration
from excise.models.loading import load_model
from excise.models.specs import load_registry
from excise.scenarios import expand, load_scenarios
from pipelines.definitions import build_definitions
from tests.conftest import blank

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "data" / "models"  # converting the packaged weights takes half a minute; a demo's are used again
REGISTRY, _ = load_registry()
PURCHASE = load_scenarios([])[0]["purchase"]
SIZES = {
    "preset": "quick",
    "variations": ["bicycle", "chair"],
    "subjects_per_group": 8,
    "samples": 16,
    "random_draws": 1,
    "resamples": 500,
    "permutations": 499,
    "strategies": ["set_difference", "gap_gradient"],
}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    MODELS.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(MODELS, target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def audit(data_folder):
    """The job `audit_scenario` for the planted gap, and what the warehouse holds afterwards."""
    definitions = build_definitions(data_folder=data_folder)
    run_config = {"resources": {"settings": {"config": SIZES}}}
    with dg.DagsterInstance.ephemeral() as instance:
        result = definitions.resolve_job_def("audit_scenario").execute_in_process(
            partition_key="planted-specific|purchase", instance=instance, run_config=run_config
        )
    assert result.success
    return result, definitions.resources["warehouse"].read("metrics", model="planted-specific", scenario="purchase")


def row(metrics, metric, *, variation=ALL, strategy="unpruned", level="none", matched_to=None):
    found = metrics.filter(
        (pl.col("metric") == metric)
        & (pl.col("variation") == variation)
        & (pl.col("strategy") == strategy)
        & (pl.col("level") == level)
        & pl.col("matched_to").eq_missing(pl.lit(matched_to, pl.String))
    )
    assert found.height == 1, found
    return found.row(0, named=True)


def test_the_planted_gap_is_found_on_every_variation(audit):
    _, metrics = audit
    for variation in SIZES["variations"]:
        assert row(metrics, "smd", variation=variation)["low"] > 0
        assert row(metrics, "parse_rate", variation=variation)["estimate"] > 0.98
    overall = row(metrics, "smd")
    assert 0.6 <= overall["estimate"] <= 1.5
    assert overall["low"] > 0


def test_gap_gradient_removes_half_of_the_gap_beyond_its_random_control(audit):
    _, metrics = audit
    named = {"strategy": "gap_gradient", "level": "prompt_specific"}
    over_random = row(metrics, "reduction_over_random", **named)
    assert over_random["estimate"] >= 0.5
    assert over_random["low"] > 0
    assert row(metrics, "inlier_ratio", **named)["estimate"] >= 0.9
    assert row(metrics, "density", **named)["estimate"] < 0.001


def test_every_mask_stands_beside_random_masks_of_its_size(audit):
    _, metrics = audit
    for strategy, level in (
        ("set_difference", "prompt_specific"),
        ("set_difference", "within_context"),
        ("gap_gradient", "prompt_specific"),
        ("gap_gradient", "within_context"),
    ):
        own = row(metrics, "density", strategy=strategy, level=level)["estimate"]
        random = row(metrics, "density", strategy="random", level=level, matched_to=strategy)["estimate"]
        assert own == pytest.approx(random, rel=1e-12)
        beyond = row(metrics, "reduction_over_random", strategy=strategy, level=level)
        assert (beyond["low"] is None) == (beyond["estimate"] is None)
        if strategy == "gap_gradient":  # random masks as large as the paper's may leave too few answers
            assert beyond["low"] is not None
    for control in ("pooled_band", "reversed", "permuted"):
        named = {"strategy": control, "level": "prompt_specific", "matched_to": "set_difference"}
        own = row(metrics, "density", strategy="set_difference", level="prompt_specific")["estimate"]
        assert row(metrics, "density", **named)["estimate"] == pytest.approx(own, rel=1e-12)
        beyond = row(metrics, "reduction_over_random", **named)
        assert (beyond["low"] is None) == (beyond["estimate"] is None)


def test_a_second_run_draws_nothing(audit, data_folder, monkeypatch):
    monkeypatch.setattr("excise.reporting.figures.save", blank)
    definitions = build_definitions(data_folder=data_folder)
    with dg.DagsterInstance.ephemeral() as instance:
        result = definitions.resolve_job_def("audit_scenario").execute_in_process(
            partition_key="planted-specific|purchase",
            instance=instance,
            run_config={"resources": {"settings": {"config": SIZES}}},
        )
    events = result.get_asset_materialization_events()
    seen = {event.asset_key.to_user_string(): event.materialization.metadata for event in events}
    for asset in ("completions", "pruned_completions"):
        assert seen[asset]["completions_drawn"].value == 0
        assert seen[asset]["completions_reused"].value > 0
    assert seen["attribution_scores"]["files_computed"].value == 0
    _, before = audit
    after = definitions.resources["warehouse"].read("metrics", model="planted-specific", scenario="purchase")
    assert after.equals(before)


def test_neutral_shows_no_gap():
    loaded = load_model(REGISTRY["planted-neutral"], REGISTRY, device="cpu", home=MODELS)
    prompts = expand(PURCHASE, subjects_per_group=16)
    rows, _ = complete(loaded, prompts, 8, SamplingParameters(), outcome=PURCHASE.outcome)
    empty = pl.DataFrame()
    metrics = evaluate(rows, empty, empty, majority="white", minority="black", resamples=500, permutations=499)
    overall = row(metrics, "smd")
    assert overall["low"] < 0 < overall["high"]
    assert abs(overall["estimate"]) < 0.15
    assert row(metrics, "parse_rate")["estimate"] > 0.98


def test_the_sampler_follows_generate_on_the_default_model():
    from excise.models.encoding import encode

    loaded = load_model(REGISTRY["smollm2-135m-instruct"], REGISTRY, device="cpu", home=MODELS)
    prompts = [each.tokens for each in encode(loaded, expand(PURCHASE, variations=["bicycle"], subjects_per_group=2))]
    draws = sample(loaded, prompts, [[0]] * len(prompts), SamplingParameters(temperature=0, max_new_tokens=12))
    for draw, prompt in zip(draws, prompts, strict=True):
        tokens = torch.tensor([prompt])
        output = loaded.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        expected = output[0, len(prompt) :].tolist()
        assert list(draw.tokens) == [token for token in expected if token not in loaded.stop_tokens]


def test_batch_size_changes_no_answer_of_the_planted_model():
    loaded = load_model(REGISTRY["planted-specific"], REGISTRY, device="cpu", home=MODELS)
    prompts = expand(PURCHASE, variations=["piano"], subjects_per_group=8)
    one, _ = complete(loaded, prompts, 8, SamplingParameters(), outcome=PURCHASE.outcome, batch_prompts=3)
    other, _ = complete(loaded, prompts, 8, SamplingParameters(), outcome=PURCHASE.outcome, batch_prompts=16)
    # Rounding differs with the batch and could flip a token whose noise lies on the very edge; none does here.
    assert one.equals(other)


def test_exact_answers_of_the_planted_model_bound_what_sampling_finds(data_folder):
    """Leftover of 1 % at most, no more prefixes than 100 samples visit, and 3,000 samples a name within the bounds."""
    loaded = load_model(REGISTRY["planted-general"], REGISTRY, device="cpu", home=MODELS)
    prompts = expand(PURCHASE, variations=["bicycle"], subjects_per_group=4)
    parameters = SamplingParameters(temperature=0.6, top_p=0.9, max_new_tokens=PURCHASE.outcome.max_new_tokens)
    exact, work = Answering(100, parameters, Enumeration(leftover=0.01)).answers(
        loaded, prompts, outcome=PURCHASE.outcome
    )
    assert exact["leftover"].max() <= 0.01
    drawn, _ = complete(loaded, prompts, 3000, parameters, outcome=PURCHASE.outcome)
    visited = {
        (prompt, *ids[:length])
        for prompt, ids in drawn.filter(pl.col("sample") < 100).select("prompt_id", "token_ids").rows()
        for length in range(len(ids))
    }
    assert work.tokens <= 1.1 * len(visited)
    sizes = {"majority": "white", "minority": "black", "resamples": 50, "permutations": 20}
    found, sampled = (
        evaluate(rows, pl.DataFrame(), pl.DataFrame(), answer_range=PURCHASE.outcome.scored_range, **sizes)
        for rows in (exact, drawn)
    )
    for metric, error in (("smd", 0.05), ("inlier_ratio", 0.02), ("parse_rate", 0.01)):
        bounds = row(found, metric)
        assert bounds["lowest"] <= bounds["estimate"] <= bounds["highest"]
        assert bounds["highest"] - bounds["lowest"] < 0.15
        assert bounds["lowest"] - error < row(sampled, metric)["estimate"] < bounds["highest"] + error
