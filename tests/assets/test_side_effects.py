"""The stage `side_effects`: what masks are tried on, how often, and what it says where there is nothing to tell."""

import polars as pl
import pytest

from resources.gpu import GPUResource
from tests.assets.test_chain import failures, lamp_of, materialized

RUN = ("audit_scenario", "tiny|lamp")
PLACE = ["variation", "strategy", "level", "matched_to"]
OTHERS = {"side_effect_scenarios": ["shelf"], "side_effect_names": 2}


@pytest.fixture
def furnished(copied):
    """An audited house with another scenario of the same names."""
    variations = {"shelf": {"item": "shelf"}, "desk": {"item": "desk"}}
    copied.write_scenario("shelf", lamp_of(copied) | {"variations": variations})
    return copied


def tried(house) -> pl.DataFrame:
    """The masks of strategies and their first random controls, with how much each prunes."""
    masks = house.warehouse.read("masks").group_by(*PLACE, "draw", "mask").agg(pl.col("pruned").sum())
    return masks.filter(pl.col("matched_to").is_null() | ((pl.col("strategy") == "random") & (pl.col("draw") == 0)))


def test_every_mask_and_its_first_random_control_are_tried_on_text_and_on_other_scenarios(furnished):
    result = furnished.run(*RUN, only=["side_effects"], **OTHERS)
    assert failures(result) == {}
    told, rows = materialized(result)["side_effects"], furnished.warehouse.read("side_effects")
    assert told["dagster/row_count"] == rows.height
    assert told["targets"] == "text, shelf/shelf"
    masks = tried(furnished)
    assert set(rows.select(PLACE).unique().rows()) == set(masks.select(PLACE).rows())
    assert told["masks"] == masks["mask"].n_unique()
    metrics = {"inlier_ratio", "spread_ratio", "commonest_rise", "excess_change", "gap_mean", "gap_change"}
    of_target = {target: set(frame["metric"]) for (target,), frame in rows.partition_by("target", as_dict=True).items()}
    assert of_target == {"text": {"text_kl", "text_perplexity_ratio"}, "shelf/shelf": metrics}
    kl = rows.filter(metric="text_kl")
    prunes = masks.filter(pl.col("pruned") > 0).select(PLACE)
    assert (kl.join(prunes, on=PLACE, nulls_equal=True)["estimate"] > 0).all()
    assert (kl.join(prunes, on=PLACE, nulls_equal=True, how="anti")["estimate"] == 0).all()
    assert (kl["low"] <= kl["estimate"]).all()
    assert (kl["estimate"] <= kl["high"]).all()
    assert set(kl["names"]) == {8}
    assert rows.filter(metric="inlier_ratio")["names"].unique().to_list() == [2]
    assert "shelf/shelf" in told["side_effects"]
    assert "nats per token" in told["side_effects"]
    # All answers were kept: the second time none is drawn, and the figures are the same.
    again = furnished.run(*RUN, only=["side_effects"], **OTHERS)
    assert materialized(again)["side_effects"]["completions_drawn"] == 0
    assert furnished.warehouse.read("side_effects").equals(rows)


def test_equal_masks_are_measured_once_and_have_rows_in_each_place(furnished):
    keys = {"asset": "pruning_masks", "model": "tiny", "scenario": "lamp"}
    masks = furnished.warehouse.read("masks")
    own = masks.filter(variation="lamp", strategy="set_difference", level="prompt_specific")
    twin = own.with_columns(strategy=pl.lit("twin"))
    furnished.warehouse.replace_partition("masks", pl.concat([masks, twin]), keys)
    result = furnished.run(*RUN, only=["side_effects"], **OTHERS)
    assert failures(result) == {}
    rows = furnished.warehouse.read("side_effects").filter(pl.col("matched_to").is_null())
    first, second = (
        rows.filter(variation="lamp", strategy=name, level="prompt_specific").drop("strategy")
        for name in ("set_difference", "twin")
    )
    assert first.height > 0
    assert first.equals(second)
    assert materialized(result)["side_effects"]["masks"] == tried(furnished)["mask"].n_unique()


def test_without_other_scenarios_the_text_alone_is_told(furnished):
    result = furnished.run(*RUN, only=["side_effects"], side_effect_scenarios=[])
    assert failures(result) == {}
    assert set(furnished.warehouse.read("side_effects")["target"]) == {"text", "(none)"}
    assert materialized(result)["side_effects"]["targets"] == "text"


def test_left_out_the_first_scenarios_that_compare_the_same_groups_are_taken(furnished):
    other = lamp_of(furnished)
    turned = other | {"comparison": {"majority": "black", "minority": "white"}}
    furnished.write_scenario("turned", turned)
    told = materialized(furnished.run(*RUN, only=["side_effects"], side_effect_scenarios=None))["side_effects"]
    targets = [target.partition("/")[0] for target in told["targets"].split(", ")]
    assert len(targets) == 3
    assert not {"lamp", "turned"} & set(targets)


def test_a_scenario_the_model_cannot_be_asked_is_left_out_unless_it_is_named(furnished):
    long = {"seller": f"A used {{item}} of {{name}}. What do I offer? {500 * 'Tell me. '}"}
    # A scenario of many variations comes first in the catalogue.
    many = {f"shelf_{number}": {"item": "shelf"} for number in range(500)}
    furnished.write_scenario("shelf", lamp_of(furnished) | {"templates": long, "variations": many})
    result = furnished.run(*RUN, only=["side_effects"], side_effect_names=2, side_effect_scenarios=None)
    assert failures(result) == {}
    told = materialized(result)["side_effects"]
    assert told["scenarios_left_out"].startswith("shelf: ")
    assert "positions of the model" in told["scenarios_left_out"]
    message = failures(furnished.run(*RUN, only=["side_effects"], **OTHERS))["side_effects"]
    assert message.startswith("resources.settings.config.side_effect_scenarios: shelf: ")


def test_held_out_names_alone_are_asked(house, monkeypatch):
    from excise.evaluation import side_effects as s

    asked, prompts_of = [], s.target_prompts
    monkeypatch.setattr(s, "target_prompts", lambda *a, **k: asked.append(prompts_of(*a, **k)) or asked[-1])
    house.write_scenario("shelf", lamp_of(house) | {"variations": {"shelf": {"item": "shelf"}}})
    result = house.run(*RUN, held_out=True, **(OTHERS | {"side_effect_names": 4}))
    assert failures(result) == {}
    judged = house.warehouse.read("completions").filter(split="evaluation")
    assert set(asked[0]["subject"]) == set(judged["subject"])
    assert len(set(judged["subject"])) == 4
    rows = house.warehouse.read("side_effects").filter(target="shelf/shelf", metric="inlier_ratio")
    assert set(rows["names"]) == {2}


def test_answers_that_are_judged_have_no_side_effects(house, monkeypatch):
    monkeypatch.setattr(GPUResource, "_load", lambda *_: pytest.fail("a model was loaded"))
    house.write_scenario("insults", lamp_of(house) | {"outcome": {"kind": "toxicity"}})
    result = house.run("audit_scenario", "tiny|insults", only=["side_effects"], permutations=None)
    assert failures(result) == {}
    told = materialized(result)["side_effects"]
    assert told["dagster/row_count"] == 0
    assert "whose answers are numbers" in told["side_effects"]


def test_without_masks_no_model_is_loaded_and_it_says_so(furnished, monkeypatch):
    monkeypatch.setattr(GPUResource, "_load", lambda *_: pytest.fail("a model was loaded"))
    masks = furnished.warehouse.read("masks")
    keys = {"asset": "pruning_masks", "model": "tiny", "scenario": "lamp"}
    furnished.warehouse.replace_partition("masks", masks.clear(), keys)
    looked = furnished.warehouse.read("mask_paths").clear()
    row = dict.fromkeys(looked.columns) | keys | {"strategy": "gap_free", "level": "prompt_specific"}
    furnished.warehouse.replace_partition("mask_paths", pl.DataFrame([row], schema=looked.schema), keys)
    result = furnished.run(*RUN, only=["side_effects"])
    assert failures(result) == {}
    assert "no masks" in materialized(result)["side_effects"]["side_effects"]
    assert furnished.warehouse.read("side_effects").is_empty()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("shelv", "'shelv' (did you mean shelf?)"),
        ("lamp", "'lamp' is the scenario that the masks are made for"),
        ("gender", "'gender' scores continuations"),
        ("turned", "'turned' compares black and white"),
        ("odd", "scenario odd cannot be used"),
    ],
)
def test_a_scenario_that_cannot_be_compared_is_named_before_the_model_is_loaded(furnished, monkeypatch, named, message):
    monkeypatch.setattr(GPUResource, "_load", lambda *_: pytest.fail("a model was loaded"))
    furnished.write_scenario("turned", lamp_of(furnished) | {"comparison": {"majority": "black", "minority": "white"}})
    furnished.write_scenario("odd", "title: Odd\n")
    result = furnished.run(*RUN, only=["completions"], side_effect_scenarios=[named])
    assert failures(result)["completions"].startswith(f"resources.settings.config.side_effect_scenarios: {message}")


def test_metrics_are_not_judged_by_the_side_effects_of_other_masks(furnished):
    rows = furnished.warehouse.read("side_effects")
    assert rows["mask"].null_count() == 0
    place = {"model": "tiny", "scenario": "lamp"}
    furnished.warehouse.replace_partition("side_effects", rows.with_columns(mask=pl.lit("0" * 16)), place)
    result = furnished.run(*RUN, only=["evaluation_metrics"])
    assert "materialize side_effects of this partition again" in failures(result)["evaluation_metrics"]
    # Without any, what was not measured is unknown, and nothing fails.
    furnished.warehouse.replace_partition("side_effects", rows.clear(), place)
    assert failures(furnished.run(*RUN, only=["evaluation_metrics"])) == {}
