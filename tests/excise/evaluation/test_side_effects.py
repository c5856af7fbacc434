"""Side effects of masks: divergences and their intervals by hand, who is asked, and what the tables say."""

import math

import numpy as np
import polars as pl
import pytest
import torch

from excise.errors import ExciseError
from excise.evaluation.perplexity import Window, perplexity, text_windows, window_losses
from excise.evaluation.side_effects import (
    EFFECT_SCHEMA,
    SIDE_EFFECTS_SCHEMA,
    TEXT_SIZE,
    TEXT_WINDOWS,
    effect_windows,
    mean_interval,
    of_masks,
    scenario_effects,
    target_name,
    target_prompts,
    text_effect,
    text_rows,
    text_unpruned,
    token_kl,
)
from excise.generation.completions import complete
from excise.generation.sampling import SamplingParameters
from excise.interventions.weights import WeightMask
from excise.models.loading import load_model
from excise.models.specs import load_registry
from excise.reporting.side_effects import SHOWN, side_effects_markdown
from excise.scenarios import expand, load_scenarios
from excise.scenarios.subsets import EVALUATION, first_names, held_out_split


@pytest.fixture(scope="module")
def purchase():
    return load_scenarios()[0]["purchase"]


@pytest.fixture(scope="module")
def loaded(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "models.yaml").write_text(f"tiny: {{folder: {tiny_model('llama', numeric=True)}}}\n")
    registry, _ = load_registry([folder / "models.yaml"])
    return load_model(registry["tiny"], registry, device="cpu", home=folder)


@pytest.fixture(scope="module")
def mask(loaded):
    """A tenth of the weights of every value matrix."""
    rng = np.random.default_rng(0)
    return WeightMask.from_arrays(
        {
            linear.key: rng.random((linear.out_features, linear.in_features)) < 0.1
            for linear in loaded.topology.linears
            if linear.role == "v"
        }
    )


def test_divergence_of_two_small_distributions():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert token_kl(p.log(), q.log() + 3.0).tolist() == pytest.approx([expected, 0.0], abs=1e-6)


def test_tokens_never_given_add_nothing_and_one_that_is_lost_is_infinitely_far():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert token_kl(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(2), abs=1e-6)
    assert token_kl(q.log(), p.log()).item() == math.inf


def test_the_mean_is_of_tokens_and_its_interval_of_windows():
    sums, counts = np.array([2.0, 9.0]), np.array([1, 9])
    estimate, low, high = mean_interval(sums, counts, resamples=4000)
    assert estimate == pytest.approx(11 / 10)
    # Of two windows drawn, one in four is the first twice, and one in four the second twice.
    assert (low, high) == pytest.approx((1.0, 2.0))
    assert all(map(math.isnan, mean_interval(sums[:1], counts[:1])[1:]))
    estimate, *ends = mean_interval(np.array([1.0, math.inf]), counts)
    assert estimate == math.inf
    assert all(map(math.isnan, ends))


def test_text_effects_are_those_of_whole_distributions(loaded, mask):
    windows = text_windows(loaded, "The lamp stands beside the bench, and nobody lights it. " * 6, size=24, stride=16)
    found = text_effect(loaded, text_unpruned(loaded, windows), mask, resamples=200)

    def distributions() -> list[torch.Tensor]:
        with torch.inference_mode():
            every = [loaded.model(torch.tensor([window.tokens])).logits[0, :-1] for window in windows]
        return [each[-window.scored :].double().log_softmax(-1) for each, window in zip(every, windows, strict=True)]

    before, losses = distributions(), window_losses(loaded, windows)
    with mask.applied(loaded):
        after, pruned_losses = distributions(), window_losses(loaded, windows)
    expected = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]).mean().item()
    estimate, low, high = found["text_kl"]
    assert expected > 1e-4
    assert estimate == pytest.approx(expected, rel=1e-4)
    assert low < estimate < high
    ratio = perplexity(pruned_losses, windows) / perplexity(losses, windows) - 1
    assert found["text_perplexity_ratio"][0] == pytest.approx(ratio, rel=1e-4)


def test_without_a_mask_nothing_changes_and_one_window_has_no_interval(loaded):
    windows = text_windows(loaded, "The lamp stands beside the bench.", size=16)[:1]
    found = text_effect(loaded, text_unpruned(loaded, windows), None)
    assert found == {"text_kl": (0.0, None, None), "text_perplexity_ratio": (0.0, None, None)}
    rows = text_rows("ab", found, 1)
    assert rows.select("target", "names").unique().rows() == [("text", 1)]
    with pytest.raises(ExciseError, match="window 0"):
        text_unpruned(loaded, [Window((1, 2), 2)])


def test_the_first_windows_of_the_text_are_read_and_score_each_token_once(loaded):
    text = "The lamp stands beside the bench, and nobody lights it. " * 200
    windows, tokens = effect_windows(loaded, text), loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [len(window.tokens) for window in windows] == [TEXT_SIZE] * TEXT_WINDOWS
    assert [window.scored for window in windows] == [TEXT_SIZE - 1] * TEXT_WINDOWS
    scored = [token for window in windows for token in window.tokens[-window.scored :]]
    assert scored == tokens[1 : len(scored) + 1]
    assert effect_windows(loaded, text, size=40) == text_windows(loaded, text, size=40)[:TEXT_WINDOWS]
    assert effect_windows(loaded, text, mode="paper") == text_windows(loaded, text, mode="paper")[:TEXT_WINDOWS]


def test_first_names_take_turns_as_those_of_an_audit_do(purchase):
    everything = expand(purchase, variations=["chair"])
    for count in (1, 3, 8):
        assert first_names(everything, count).equals(expand(purchase, variations=["chair"], subjects_per_group=count))
    assert first_names(everything, 1000).equals(everything)


def test_the_first_variation_and_names_of_the_half_that_judges_are_asked(purchase):
    prompts = target_prompts(purchase, names=3, subjects_per_group=8, held_out=True, seed=5)
    assert target_name(prompts) == f"purchase/{next(iter(purchase.variations))}"
    audit = expand(purchase, variations=[prompts["variation"][0]], subjects_per_group=8)
    split = held_out_split(purchase, audit, 5)
    assert set(prompts["prompt_id"]) <= set(split.filter(split=EVALUATION)["prompt_id"])
    assert dict(prompts.group_by("group").agg(pl.col("subject").n_unique()).rows()) == {"white": 3, "black": 3}
    assert prompts.group_by("group").agg(pl.col("gender").n_unique())["gender"].to_list() == [2, 2]
    free = target_prompts(purchase, names=3, subjects_per_group=8, held_out=False, seed=5)
    assert free.equals(expand(purchase, variations=[prompts["variation"][0]], subjects_per_group=3))
    # An audit of more names than the scenario has asks all that it has.
    assert target_prompts(purchase, names=99, subjects_per_group=99, held_out=False, seed=0)["subject"].n_unique() == 64


def test_answers_that_did_not_change_have_no_side_effect(loaded, purchase):
    prompts = target_prompts(purchase, names=3, subjects_per_group=8, held_out=False, seed=0)
    parameters = SamplingParameters(temperature=0.6, top_p=0.9, max_new_tokens=8)
    answers, _ = complete(loaded, prompts, 8, parameters, outcome=purchase.outcome)
    moved = answers.with_columns(value=pl.col("value") * 4)  # on the log scale the gap stays
    found = scenario_effects(answers, {"same": answers, "moved": moved}, purchase, resamples=50, seed=0)
    assert dict(zip(found.columns, found.dtypes, strict=True)) == EFFECT_SCHEMA
    assert set(found["target"]) == {target_name(prompts)}
    estimates = {(mask, metric): value for mask, metric, value in found.select("mask", "metric", "estimate").rows()}
    assert estimates["same", "excess_change"] == pytest.approx(0.0, abs=1e-9)
    assert estimates["same", "gap_change"] == 0
    assert estimates["same", "spread_ratio"] == pytest.approx(1.0)
    assert estimates["same", "commonest_rise"] <= 0  # both groups' commonest answer is no commoner than either's
    assert estimates["moved", "excess_change"] > 0.1
    assert scenario_effects(answers, {}, purchase, resamples=50, seed=0).is_empty()
    both = pl.concat([answers, answers.with_columns(variation=pl.lit("other"))])
    with pytest.raises(ExciseError, match="not of one variation"):
        scenario_effects(both, {"same": answers}, purchase, resamples=50, seed=0)


def test_a_mask_that_leaves_no_number_is_told_by_the_inlier_ratio_alone(purchase):
    prompts = target_prompts(purchase, names=3, subjects_per_group=8, held_out=False, seed=0)
    answers = pl.concat(
        [prompts.with_columns(model=pl.lit("m"), sample=pl.lit(k), value=pl.lit(100.0 + k)) for k in range(6)]
    )
    silent = answers.with_columns(value=pl.lit(None, pl.Float64))
    found = scenario_effects(answers, {"mute": silent}, purchase, resamples=50, seed=0)
    known = found.filter(pl.col("estimate").is_not_null())
    assert known.select("metric", "estimate").rows() == [("inlier_ratio", 0.0)]
    # A scenario that the unpruned model does not answer either tells nothing.
    assert scenario_effects(silent, {"mute": silent}, purchase, resamples=50, seed=0)["estimate"].null_count() == 6


def effects(mask: str, target: str, **figures: float | None) -> pl.DataFrame:
    rows = [(mask, target, metric, value, None, None, 3) for metric, value in figures.items()]
    return pl.DataFrame(rows, schema=EFFECT_SCHEMA, orient="row")


def place(mask: str, variation: str = "lamp", strategy: str = "snip", matched_to: str | None = None) -> dict:
    return {
        "model": "m",
        "scenario": "s",
        "variation": variation,
        "strategy": strategy,
        "level": "prompt_specific",
        "matched_to": matched_to,
        "mask": mask,
    }


def test_every_place_of_a_mask_has_its_effects_and_the_worst_target_is_told_first():
    found = pl.concat(
        [
            effects("a", "shelf/desk", inlier_ratio=0.9, excess_change=0.1, gap_change=-2.0),
            effects("b", "shelf/desk", inlier_ratio=0.4, excess_change=0.7, gap_change=1.0),
            effects("b", "jobs/cook", inlier_ratio=0.2, excess_change=0.7),
            effects("c", "shelf/desk", inlier_ratio=None, excess_change=None),
            effects("a", "text", text_kl=0.01, text_perplexity_ratio=0.02),
            effects("b", "text", text_kl=0.5, text_perplexity_ratio=0.4),
        ]
    )
    places = pl.DataFrame(
        [
            place("a"),
            place("a", "bench"),
            place("b", strategy="random", matched_to="snip"),
            place("c", "desk"),
        ]
    )
    rows = of_masks(found, places)
    assert dict(zip(rows.columns, rows.dtypes, strict=True)) == SIDE_EFFECTS_SCHEMA
    assert rows.height == 2 * 5 + 7 + 2
    text = side_effects_markdown(rows)
    order = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ") and "target" not in line]
    assert order == [
        ["| shelf/desk", "snip, prompt-specific, desk"],
        ["| jobs/cook", "random, prompt-specific, lamp (control of snip)"],
        ["| shelf/desk", "random, prompt-specific, lamp (control of snip)"],
        ["| shelf/desk", "snip, prompt-specific, lamp"],
        ["| shelf/desk", "snip, prompt-specific, bench"],
        ["| text", "random, prompt-specific, lamp (control of snip)"],
        ["| text", "snip, prompt-specific, lamp"],
        ["| text", "snip, prompt-specific, bench"],
    ]
    assert "| text | random, prompt-specific, lamp (control of snip) | 0.500 | +40 |" in text


def test_a_long_table_is_cut_and_says_so():
    many = pl.DataFrame([place("a", f"v{number}") for number in range(SHOWN + 4)])
    text = side_effects_markdown(of_masks(effects("a", "text", text_kl=0.1, text_perplexity_ratio=0.0), many))
    assert "4 more rows are in the table `side_effects`." in text
    assert sum(line.startswith("| text") for line in text.splitlines()) == SHOWN
