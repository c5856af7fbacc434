"""Claims about the grid search: its points, its front and the point the rule picks, all on points put down by hand."""

import polars as pl
import pytest

from excise.errors import ExciseError
from excise.evaluation.grid import (
    SCHEMA,
    choose,
    grid_points,
    grid_search,
    pareto,
    point_label,
    points_frame,
    read_label,
)
from excise.evaluation.numbers import evaluate
from excise.evaluation.rows import SCHEMA as METRICS_SCHEMA


def points(*rows):
    """(|SMD|, gap, inlier ratio, density, tau_min)"""
    columns = ["abs_smd", "gap_mean", "inlier_ratio", "density", "tau_min"]
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.Float64), orient="row").with_columns(tau_maj=pl.lit(0.1))


def test_no_point_has_a_majority_threshold_above_the_minority_threshold():
    assert grid_points([0.1, 0.3, 0.2]) == [(0.1, 0.1), (0.2, 0.1), (0.2, 0.2), (0.3, 0.1), (0.3, 0.2), (0.3, 0.3)]
    assert grid_points([5, 10], [0, 5, 10]) == [(5, 0), (5, 5), (10, 0), (10, 5), (10, 10)]
    with pytest.raises(ExciseError, match="no pair"):
        grid_points([5], [10])
    with pytest.raises(ExciseError, match="negative"):
        grid_points([-0.1])


@pytest.mark.parametrize("point", [(0.4, 0.35), (40, 5), (0.0005, 0.0), (1, 1e-7)])
def test_a_label_can_be_read_again(point):
    assert read_label(point_label("my_own", *point)) == ("my_own", *point)


@pytest.mark.parametrize("label", ["set_difference", "set_difference@0.4", "@0.4/0.35", "a@b/c"])
def test_a_label_of_no_point_is_refused(label):
    with pytest.raises(ExciseError, match="names no point"):
        read_label(label)


def test_the_front_holds_what_no_point_beats_in_both():
    frame = points((0.1, 5, 0.7, 0.1, 0.4), (0.3, 9, 0.95, 0.1, 0.3), (0.4, 9, 0.9, 0.1, 0.2), (0.2, 1, 0.6, 0.1, 0.1))
    assert pareto(frame).tolist() == [True, True, False, False]
    assert pareto(frame, "gap_mean").tolist() == [True, True, False, True]


def test_a_point_as_useful_as_another_but_more_biased_is_off_the_front_and_twins_stay_together():
    frame = points((0.3, 5, 0.9, 0.1, 0.4), (0.5, 5, 0.9, 0.1, 0.3), (0.3, 5, 0.9, 0.2, 0.2))
    assert pareto(frame).tolist() == [True, False, True]


def test_the_sign_of_the_bias_does_not_matter_on_the_front():
    frame = points((0.1, -9, 0.9, 0.1, 0.4), (0.1, 2, 0.9, 0.1, 0.3))
    assert pareto(frame, "gap_mean").tolist() == [False, True]


def test_a_point_without_figures_neither_is_on_the_front_nor_drives_others_off_it():
    frame = points((0.0, 0, None, 0.1, 0.4), (None, None, 1.0, 0.1, 0.3), (0.5, 5, 0.9, 0.1, 0.2))
    assert pareto(frame).tolist() == [False, False, True]
    assert pareto(points()).tolist() == []


def test_the_rule_takes_the_smallest_raw_gap_above_the_floor_whatever_the_smd():
    frame = points((0, 40, 0.96, 0.1, 0.4), (0.9, -10, 0.95, 0.1, 0.3), (0, 0, 0.94, 0.1, 0.2), (0.9, 12, 1, 0.1, 0.1))
    assert choose(frame, 0.95) == 1
    assert choose(frame, 0.94) == 2
    assert choose(frame, 0.97) == 3
    assert choose(frame, 1.01) is None
    assert choose(points(), 0.5) is None


def test_of_equal_gaps_the_rule_takes_the_lower_density_then_the_lower_threshold():
    assert choose(points((0, 10, 0.96, 0.2, 0.1), (0, -10, 0.99, 0.1, 0.4)), 0.95) == 1
    assert choose(points((0, 10, 0.96, 0.1, 0.3), (0, 10, 0.99, 0.1, 0.2), (0, 10, 0.99, 0.2, 0.1)), 0.95) == 1
    assert choose(points((0, 0.1 + 0.2, 0.96, 0.1, 0.1), (0, 0.3, 0.99, 0.2, 0.1)), 0.95) == 0
    assert choose(points((0, 10, 0.96, None, 0.1), (0, 10, 0.96, 0.3, 0.4)), 0.95) == 1


@pytest.mark.trial(1)
def test_a_point_whose_answers_collapsed_is_neither_chosen_nor_on_the_front():
    frame = points((0, 0, 1, 0.1, 0.4), (0.9, 10, 0.96, 0.1, 0.3), (0.8, 12, 0.97, 0.1, 0.2), (0, 0, 1, 0.1, 0.1))
    spread = frame.with_columns(spread_ratio=pl.Series([0.0, 0.5, None, 0.09]))
    assert choose(spread, 0.95) == 1
    assert pareto(spread).tolist() == [False, False, True, False]
    assert choose(spread[[0, 3]], 0.95) is None


def test_a_point_without_a_gap_is_never_chosen():
    assert choose(points((0, None, 0.99, 0.1, 0.1), (0, 7, 0.96, 0.1, 0.1)), 0.95) == 1
    assert choose(points((0, None, 0.99, 0.1, 0.1), (0, 7, None, 0.1, 0.1)), 0.95) is None


# --------------------------------------------------------------------------------------------- from evaluated answers


def answers(**minority):
    """Four white names answer 100 and more about a chair, 10000 about a car; minority: what is lacking to that."""
    rows = [
        (
            "m",
            "purchase",
            variation,
            group,
            f"{group} {number}",
            base + number - (group == "black") * minority[variation],
        )
        for variation, base in (("chair", 100.0), ("car", 10000.0))
        for group in ("white", "black")
        for number in range(4)
    ]
    return pl.DataFrame(rows, schema=["model", "scenario", "variation", "group", "subject", "value"], orient="row")


def at(tau_min, tau_maj, matched_to=None, level="grid", strategy=None, **minority):
    return answers(**minority).with_columns(
        strategy=pl.lit(strategy or point_label("set_difference", tau_min, tau_maj)),
        level=pl.lit(level),
        matched_to=pl.lit(matched_to, dtype=pl.String),
        draw=pl.lit(0),
    )


@pytest.fixture(scope="module")
def metrics():
    """Three points: one leaves chair's gap, one leaves half of each, one turns car's gap around."""
    pruned = pl.concat(
        [
            at(0.2, 0.1, chair=40, car=0),
            at(0.3, 0.1, chair=20, car=1000),
            at(0.3, 0.2, chair=0, car=-1200),
            at(0, 0, chair=0, car=0, level="prompt_specific", strategy="ours"),
            at(0, 0, chair=9, car=9, matched_to="set_difference@0.2/0.1", strategy="random"),
        ]
    )
    keys = ["model", "scenario", "variation", "strategy", "level", "matched_to", "draw"]
    masks = pruned.select(keys).unique().with_columns(pruned=pl.lit(3), size=pl.lit(10))
    return evaluate(
        answers(chair=40, car=2000), pruned, masks, majority="white", minority="black", resamples=50, permutations=19
    )


def test_the_points_table_tells_what_evaluate_found_at_each_point(metrics):
    frame = points_frame(metrics)
    chair = frame.filter(pl.col("variation") == "chair")
    assert chair.select("strategy", "tau_min", "tau_maj", "density", "gap_mean").rows() == [
        ("set_difference", 0.2, 0.1, 0.3, 40.0),
        ("set_difference", 0.3, 0.1, 0.3, 20.0),
        ("set_difference", 0.3, 0.2, 0.3, 0.0),
    ]
    assert frame["variation"].unique(maintain_order=True).to_list() == ["chair", "car", "(all)"]


def test_the_search_table_is_long_and_marks_front_and_choice_within_each_variation(metrics):
    table = grid_search(metrics, 0.0)
    assert table.schema == pl.Schema(SCHEMA)
    assert len(table) == 3 * 3 * 6
    chosen = table.filter(pl.col("chosen") & (pl.col("metric") == "gap_mean"))
    assert dict(chosen.select("variation", "estimate").iter_rows())["chair"] == 0.0
    assert dict(chosen.select("variation", "tau_min").iter_rows())["car"] == 0.2
    # chair 100 % and car 0 % of the gap left, half of each, or car's turned around: scaled by their answers' sizes
    left = points_frame(metrics).filter(pl.col("variation") == "(all)").sort("tau_min", "tau_maj")
    total = 40 / 81.5 + 2000 / 9001.5
    assert (1 - left["gap_reduction"]).to_list() == pytest.approx(
        [40 / 81.5 / total, 0.5, 1200 / 9001.5 / total], rel=1e-3
    )
    best = chosen.filter(pl.col("variation") == "(all)").row(0, named=True)
    assert (best["tau_min"], best["tau_maj"]) == (0.3, 0.2)
    for (variation,), part in table.filter(pl.col("metric") == "smd").partition_by("variation", as_dict=True).items():
        expected = pareto(points_frame(metrics).filter(pl.col("variation") == variation))
        assert part["pareto"].to_list() == expected.tolist()


def test_nothing_is_chosen_where_nothing_reaches_the_floor_and_every_metric_has_its_interval(metrics):
    table = grid_search(metrics, 1.01)
    assert not table["chosen"].any()
    row = table.filter((pl.col("metric") == "gap_reduction") & (pl.col("tau_maj") == 0.2)).row(0, named=True)
    source = metrics.filter((pl.col("metric") == "gap_reduction") & (pl.col("strategy") == "set_difference@0.3/0.2"))
    assert (row["low"], row["high"], row["n"]) == source.select("low", "high", "n").row(0)


def test_a_grid_of_nothing_is_an_empty_table():
    empty = pl.DataFrame(schema=METRICS_SCHEMA)
    assert grid_search(empty, 0.9).schema == pl.Schema(SCHEMA)
    assert points_frame(empty).is_empty()
