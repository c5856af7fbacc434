"""The stage `restoration`: which model is asked what, what is kept, and what it says where there is nothing to tell."""

import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import save_file

from excise.evaluation.restoration import NOTHING, restoration
from excise.models.loading import load_model
from excise.models.specs import load_registry
from resources.gpu import GPUResource
from tests.assets.test_chain import failures, lamp_of, materialized

SMALL = {"strategies": ["gap_gradient", "set_difference"], "random_draws": 2}


@pytest.fixture(scope="module")
def change(tiny_model, tmp_path_factory):
    """A low-rank change of the tiny model that keeps its answers numbers and makes them others."""
    folder = tmp_path_factory.mktemp("change")
    (folder / "models.yaml").write_text(yaml.safe_dump({"tiny": {"folder": str(tiny_model("llama", numeric=True))}}))
    registry, _ = load_registry([folder / "models.yaml"])
    topology = load_model(registry["tiny"], registry, device="cpu", home=folder).topology
    generator, factors = torch.Generator().manual_seed(3), {}
    for linear in topology.linears:
        if linear.role in ("q", "v", "up"):
            factors[f"{linear.key}.up"] = 0.4 * torch.randn(linear.out_features, 2, generator=generator)
            factors[f"{linear.key}.down"] = 0.4 * torch.randn(2, linear.in_features, generator=generator)
    save_file(factors, folder / "change.safetensors")
    return folder / "change.safetensors"


@pytest.fixture
def planted(house, tiny_model, change):
    """A house in which `bent` is the tiny model with that change."""
    tiny = {"folder": str(tiny_model("llama", numeric=True))}
    house.write_models({"tiny": tiny, "bent": {"base": "tiny", "low_rank": str(change)}})
    return house


@pytest.mark.parametrize("answers", ["sampled", "exact"])
def test_a_planted_model_is_held_against_its_base_under_the_same_masks(planted, answers):
    settings = SMALL | {"answers": answers, "held_out": True} | ({"leftover": 0.2} if answers == "exact" else {})
    result = planted.run("audit_scenario", "bent|lamp", **settings)
    assert failures(result) == {}
    told, rows = materialized(result)["restoration"], planted.warehouse.read("restoration")
    assert told["dagster/row_count"] == rows.height
    assert told["reference"] == "tiny"
    assert "Reference: tiny." in told["restoration"]
    assert set(rows["reference"]) == {"tiny"}
    assert rows.filter(strategy="unpruned", variation="(all)", metric="distance")["estimate"].item() > 0
    # Every mask the model was asked under is there; the reference is asked under those of strategies and one random.
    pruned, mask = planted.warehouse.read("pruned_completions"), ["variation", "strategy", "level", "matched_to"]
    own = rows.filter(pl.col("variation") != "(all)")
    for metric, asked in (
        ("restoration", pruned),
        ("specificity", pruned.filter(pl.col("matched_to").is_null() | (pl.col("strategy") == "random"))),
    ):
        found = own.filter(metric=metric).select(mask)
        assert set(found.rows()) == set(asked.select(mask).unique().rows()), metric
    assert pruned["draw"].max() == 1
    one = pruned.filter((pl.col("strategy") != "random") | (pl.col("draw") == 0)).select(*mask, "draw").unique()
    assert told["masks"] == one.filter(pl.col("matched_to").is_null() | (pl.col("strategy") == "random")).height
    defined = rows.filter(pl.col("strategy") != "unpruned")["definition"]
    assert defined.null_count() == 0
    assert (rows["estimate"].is_null() == rows["reason"].is_not_null()).all()
    # All was kept: the second time nothing is drawn, and the figures are the same.
    again = planted.run("audit_scenario", "bent|lamp", only=["restoration"], **settings)
    assert materialized(again)["restoration"]["completions_drawn"] == 0
    assert planted.warehouse.read("restoration").equals(rows)


def test_the_reference_answers_as_in_an_audit_of_its_own(planted):
    planted.run("audit_scenario", "tiny|lamp", only=["completions"])
    result = planted.run("audit_scenario", "bent|lamp", **SMALL)
    assert failures(result) == {}
    assert materialized(result)["restoration"]["completions_reused"] >= 64
    completions, reference = (planted.warehouse.read("completions", model=model) for model in ("bent", "tiny"))
    pruned = planted.warehouse.read("pruned_completions", model="bent")
    expected = restoration(
        completions, pruned, reference, pruned.clear(), groups=["white", "black"], log=True, resamples=40
    )
    found = planted.warehouse.read("restoration").filter(~pl.col("metric").str.starts_with("specificity"))
    order = [*expected.columns[:7]]
    assert found.drop("definition").sort(order).equals(expected.sort(order))


def test_without_a_reference_nothing_is_loaded_and_it_says_so(copied, monkeypatch):
    monkeypatch.setattr(GPUResource, "_load", lambda *_: pytest.fail("a model was loaded"))
    result = copied.run("audit_scenario", "tiny|lamp", only=["restoration"])
    assert failures(result) == {}
    told = materialized(result)["restoration"]
    assert told["dagster/row_count"] == 0
    assert "tiny has no reference" in told["restoration"]
    assert copied.warehouse.read("restoration").is_empty()


def test_answers_that_are_judged_have_no_restoration(planted, monkeypatch):
    monkeypatch.setattr(GPUResource, "_load", lambda *_: pytest.fail("a model was loaded"))
    planted.write_scenario("insults", lamp_of(planted) | {"outcome": {"kind": "toxicity"}})
    result = planted.run("audit_scenario", "bent|insults", only=["restoration"], permutations=None)
    assert failures(result) == {}
    assert "whose answers are numbers" in materialized(result)["restoration"]["restoration"]


def test_any_entry_may_name_a_reference_and_from_itself_nothing_can_be_restored(copied, tiny_model):
    folder = str(tiny_model("llama", numeric=True))
    copied.write_models({"tiny": {"folder": folder, "reference": "twin"}, "twin": {"folder": folder}})
    result = copied.run("audit_scenario", "tiny|lamp", only=["restoration"])
    assert failures(result) == {}
    rows = copied.warehouse.read("restoration")
    assert set(rows["reference"]) == {"twin"}
    restored = rows.filter(pl.col("metric").is_in(["restoration", "restoration_over_random"]))
    assert set(restored["reason"]) == {NOTHING}
    # Of the same model under the same masks with the same noise both sides are one.
    pair = rows.filter(pl.col("metric").is_in(["distance", "specificity"]) & pl.col("matched_to").is_null())
    by_metric = pair.filter(pl.col("strategy") != "unpruned").pivot(
        "metric", index=["variation", "strategy", "level"], values="estimate"
    )
    assert by_metric.height > 0
    assert (by_metric["distance"] == by_metric["specificity"]).all()


def test_masks_that_were_not_found_have_no_rows_and_the_others_stay(copied, tiny_model):
    folder = str(tiny_model("llama", numeric=True))
    copied.write_models({"tiny": {"folder": folder, "reference": "twin"}, "twin": {"folder": folder}})
    place = {"model": "tiny", "scenario": "lamp"}
    lost = pl.col("strategy").eq("gap_gradient") | pl.col("matched_to").eq("gap_gradient").fill_null(False)
    for table, keys in (("masks", place | {"asset": "pruning_masks"}), ("pruned_completions", place)):
        rows = copied.warehouse.read(table)
        copied.warehouse.replace_partition(table, rows.filter(~(lost & (pl.col("variation") == "lamp"))), keys)
    assert failures(copied.run("audit_scenario", "tiny|lamp", only=["restoration"])) == {}
    rows = copied.warehouse.read("restoration")
    assert set(rows.filter(strategy="gap_gradient")["variation"]) == {"bench", "(all)"}
    assert set(rows.filter(strategy="set_difference")["variation"]) == {"lamp", "bench", "(all)"}


def test_a_reference_that_reads_the_prompts_otherwise_is_refused_before_anything_is_asked(copied, tiny_model):
    other = tiny_model("llama", numeric=True, chat_template="{{ messages[0]['content'] }}<|assistant|>")
    own = str(tiny_model("llama", numeric=True))
    copied.write_models({"tiny": {"folder": own, "reference": "other"}, "other": {"folder": str(other)}})
    message = failures(copied.run("audit_scenario", "tiny|lamp", only=["restoration"]))["restoration"]
    assert "other, the reference of tiny, reads prompt" in message
    assert "tiny.reference" in message
