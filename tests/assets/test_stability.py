"""The stage `stability`: masks of other splits, judged on names they were not made from, all from the caches."""

import polars as pl
import pytest

from assets.partitions import Catalogue
from excise.errors import ExciseError
from excise.evaluation.stability import METRICS
from excise.reporting.stability import NO_SPLIT, ONE_SPLIT
from resources.settings import AuditSettings, Preset
from tests.assets.test_chain import failures, lamp_of, materialized

RUN = ("audit_scenario", "tiny|lamp")
SPLITS = {"splits": 3, "held_out": True}


def test_masks_are_made_and_judged_on_every_split(house):
    house.write_scenario("shelf", lamp_of(house) | {"variations": {"shelf": {"item": "shelf"}}})
    for key in ("shelf", "lamp"):
        assert failures(house.run("prepare_scenario", f"tiny|{key}", **SPLITS)) == {}
    result = house.run("evaluate_scenario", "tiny|lamp", **SPLITS)
    assert failures(result) == {}
    rows = house.warehouse.read("stability")
    assert set(rows["split"]) == {0, 1, 2}
    assert set(rows["metric"]) <= set(METRICS)
    assert "unpruned" not in set(rows["strategy"])
    own = rows.filter(pl.col("split") == 0).drop("split", "splits")
    metrics = house.warehouse.read("metrics", scenario="lamp").select(own.columns)
    assert own.join(metrics, on=own.columns, how="anti", nulls_equal=True).is_empty()
    strategies = {(row["strategy"], row["level"]) for row in rows.filter(pl.col("split") > 0).iter_rows(named=True)}
    assert {("set_difference", "prompt_specific"), ("set_difference", "within_context")} <= strategies
    means = rows.filter(metric="gap_mean", variation="lamp", strategy="set_difference", level="prompt_specific")
    assert means["estimate"].n_unique() == 3
    assert ("set_difference", "cross_context") not in set(rows.select("strategy", "level").rows())
    told = materialized(result)["stability"]
    assert "splits" in told
    assert told["finding"].startswith(("Over 3 splits", "No strategy"))
    again = house.run("evaluate_scenario", "tiny|lamp", only=["stability"], **SPLITS)
    assert failures(again) == {}
    assert house.warehouse.read("stability").sort(pl.all()).equals(rows.sort(pl.all()))


@pytest.mark.parametrize(("held_out", "told"), [(True, ONE_SPLIT), (False, NO_SPLIT)])
def test_a_single_split_loads_no_model_and_says_what_is_not_known(house, held_out, told):
    house.run(*RUN, held_out=held_out, splits=1)
    result = house.run(*RUN, only=["stability"], held_out=held_out, splits=1)
    assert materialized(result)["stability"]["finding"] == told
    assert house.warehouse.read("stability").is_empty()


def test_splits_need_names_held_out(house):
    with pytest.raises(ExciseError, match="splits is 2: give 1, or set held_out: true"):
        AuditSettings(splits=2, held_out=False).audit_of(_lamp(house))
    with pytest.raises(ExciseError, match="splits is 0: give at least 1"):
        AuditSettings(splits=0).audit_of(_lamp(house))
    assert AuditSettings(preset=Preset.paper).audit_of(_lamp(house)).splits == 5
    assert AuditSettings(preset=Preset.paper, held_out=False).audit_of(_lamp(house)).splits == 1
    assert AuditSettings(preset=Preset.quick).audit_of(_lamp(house)).splits == 1


def _lamp(house):
    from assets.partitions import read_catalogue

    catalogue: Catalogue = read_catalogue([house.folder / "scenarios"], [house.folder / "models.yaml"], [])
    return catalogue.scenarios["lamp"]
