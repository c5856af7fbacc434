"""`answers: exact` through Dagster on a tiny real model: what is stored, what the metrics say, what a rerun reuses."""

import numpy as np
import polars as pl
import pytest

from excise.evaluation import metrics as m
from tests.assets.test_chain import failures, materialized
from tests.conftest import open_house

SETTINGS = {"answers": "exact", "leftover": 0.01, "max_nodes": 3000, "top_p": 0.6, "samples": 20}


@pytest.fixture(scope="module")
def enumerated(tmp_path_factory, tiny_model):
    house = open_house(tmp_path_factory.mktemp("enumerated") / "house", tiny_model("llama", numeric=True))
    result = house.run("audit_scenario", "tiny|lamp", grid_taus=[0.3], **SETTINGS)
    assert failures(result) == {}
    return house, result


def metric(house, name, strategy="unpruned", level="none", variation=None):
    rows = house.warehouse.read("metrics", metric=name, strategy=strategy, level=level).filter(
        pl.col("matched_to").is_null() & (pl.col("variation") != "(all)")
    )
    return rows.filter(variation=variation).row(0, named=True) if variation else rows


def test_every_prompt_has_its_distribution_unpruned_and_under_every_mask(enumerated):
    house, _ = enumerated
    rows, pruned = house.warehouse.read("completions"), house.warehouse.read("pruned_completions")
    of_mask = ["mask", "strategy", "matched_to", "level", "draw"]
    for frame, keys in ((rows, ["prompt_id"]), (pruned, ["prompt_id", *of_mask])):
        whole = frame.group_by(keys).agg(pl.col("probability").sum(), pl.col("leftover").max().fill_null(0.0))
        np.testing.assert_allclose(whole["probability"] + whole["leftover"], 1.0, atol=1e-9)
        assert whole["leftover"].max() <= 0.01
    assert rows["prompt_id"].n_unique() == 16
    assert rows["leftover"].null_count() == 0
    assert rows["value"].n_unique() > 5
    assert set(pruned["prompt_id"]) == set(rows["prompt_id"])


def test_metrics_are_those_of_the_distributions(enumerated):
    house, _ = enumerated
    completions = house.warehouse.read("completions")
    for (variation,), rows in completions.group_by("variation"):
        rows = rows.sort("prompt_id", "sample")
        found = metric(house, "smd", variation=variation)
        written = [
            np.repeat(
                own["value"].fill_null(np.nan).to_numpy(),
                np.round((own["probability"] / (1 - own["leftover"])).to_numpy() * 4000).astype(int),
            )
            for own in (rows.filter(group=group) for group in ("white", "black"))
        ]
        assert found["estimate"] == pytest.approx(
            m.standardized_mean_difference(*written, winsorize=(0.05, 0.95)), abs=0.02
        )
        assert found["lowest"] <= found["estimate"] <= found["highest"]
        assert found["highest"] - found["lowest"] < 1
        assert found["low"] < found["high"]
        assert metric(house, "leftover", variation=variation)["estimate"] <= 0.01
        assert metric(house, "sampled", variation=variation)["estimate"] == 0
        assert found["n"] == rows["value"].is_not_null().sum()
    pruned = metric(house, "smd", "gap_gradient", "prompt_specific")
    assert pruned["lowest"].null_count() == 0
    assert metric(house, "gap_reduction", "gap_gradient", "prompt_specific")["lowest"].null_count() == pruned.height


def test_masks_come_from_answers_that_stand_for_the_distribution(enumerated):
    _, result = enumerated
    told = materialized(result)
    assert told["attribution_scores"]["files_computed"] > 0
    assert told["completions"]["prompts_sampled_instead"] == 0
    assert told["completions"]["leftover"] <= 0.01
    assert told["pruning_masks"]["dagster/row_count"] > 0
    bounds = told["evaluation_metrics"]["bounds_of_exact_answers"]
    found = [record.data for record in bounds.records]
    unpruned = {record["metric"]: record for record in found if record["strategy"] == "unpruned"}
    assert unpruned["smd"]["lowest"] < unpruned["smd"]["highest"]
    assert unpruned["leftover"]["estimate"] <= 0.01


def test_a_rerun_reads_no_tree_again_and_gives_the_same(enumerated):
    house, _ = enumerated
    before = {name: house.warehouse.read(name) for name in ("completions", "pruned_completions", "metrics")}
    result = house.run("audit_scenario", "tiny|lamp", grid_taus=[0.3], **SETTINGS)
    assert failures(result) == {}
    for asset in ("completions", "pruned_completions"):
        assert materialized(result)[asset]["completions_drawn"] == 0
    for name, rows in before.items():
        again = house.warehouse.read(name)
        assert again.sort(rows.columns[:8]).equals(rows.sort(rows.columns[:8])) or again.equals(rows)


def test_a_grid_enumerates_too(enumerated):
    house, _ = enumerated
    result = house.run("search_grid", "tiny|lamp", grid_taus=[0.3], grid_variations=1, **SETTINGS)
    assert failures(result) == {}
    assert house.warehouse.read("grid_search").filter(metric="abs_smd")["estimate"].null_count() == 0


def test_pruned_answers_of_another_run_are_refused(enumerated):
    house, _ = enumerated
    result = house.run("audit_scenario", "tiny|lamp", only=["completions"], **SETTINGS | {"leftover": 0.05})
    assert failures(result) == {}
    result = house.run("audit_scenario", "tiny|lamp", only=["evaluation_metrics"], **SETTINGS)
    assert "do not go with its completions" in failures(result)["evaluation_metrics"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"answers": "guessed"}, "answers: 'guessed'; there are sampled, exact"),
        ({"leftover": 1.0}, "leftover is 1.0"),
        ({"max_nodes": 0}, "max_nodes is 0"),
    ],
)
def test_wrong_settings_are_named(house, wrong, named):
    result = house.run("audit_scenario", "tiny|lamp", only=["completions"], **SETTINGS | wrong)
    assert named in failures(result)["completions"]
