"""What cannot be computed is NaN or null, or refused in words: every function of numbers, every kind of odd input.

A row of a table is a function of one array; the columns are arrays that leave something undefined. No result may be
infinite, nothing may warn or raise anything but an ExciseError, and 0 may stand only where it was computed.
"""

import json
import math

import numpy as np
import polars as pl
import pytest

import excise
from excise.attribution.head_impacts import split_half_reliability
from excise.errors import ExciseError
from excise.evaluation import bootstrap, permutation
from excise.evaluation import metrics as m
from excise.evaluation.axis_noise import bias_from_sums, debiased_bias
from excise.evaluation.bias_correlation import catastrophic, gamma_choice, gamma_points, impact_correlations
from excise.evaluation.distributions import group_answers, inlier_bounds, moment_bounds, smd_bounds
from excise.evaluation.metrics import folded_noise
from excise.evaluation.overlap import chance_level, overlap_fraction
from excise.evaluation.perplexity import Window, perplexity, perplexity_difference, perplexity_interval
from excise.evaluation.rows import mean_over_draws, reduction_of
from excise.strategies.selection import fasp, pooled_band, set_difference, set_difference_of_count, top

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

NAN, INF = math.nan, math.inf
HUGE = 1.7e308
USUAL = np.array([3.0, 5.0, 8.0, 13.0])
ODD = {
    "empty": [],
    "one": [4.0],
    "constant": [4.0] * 4,
    "zeros": [0.0] * 4,
    "NaN": [NAN] * 4,
    "a NaN": [4.0, NAN, 6, 7],
    "infinite": [4.0, INF, 6, 7],
    "below all": [-INF, 4, 6, 7],
    "both ends": [-INF, INF, 6, 7],
    "huge": [HUGE] * 4,
    "huge of both signs": [HUGE, -HUGE, HUGE, -HUGE],
    "tiny": [5e-324] * 4,
    "None": [None, 4.0, 6, 7],
}
LOST = {"empty", "NaN", "infinite", "below all", "both ends"}
"""Inputs of which no figure of a group's answers can be told."""


def _named(values):
    values = np.asarray(values, dtype=float)
    return bootstrap.named_answers(values, np.arange(len(values)) % 2, 2)


def _weights():
    return bootstrap.resampled_names(2, 20, np.random.default_rng(0))


def _of_names(function):
    return lambda values: function(_named(values), _named(USUAL), (_weights(), _weights()))


def _losses(values):
    return np.asarray(values, dtype=float), [Window(tuple(range(9)), 8)] * len(values)


PAIR = {
    "smd": lambda values: m.standardized_mean_difference(values, USUAL),
    "smd, second": lambda values: m.standardized_mean_difference(USUAL, values),
    "smd, winsorised": lambda values: m.standardized_mean_difference(values, USUAL, 0.05),
    "smd, itself": lambda values: m.standardized_mean_difference(values, values),
    "earth mover": lambda values: m.earth_movers_distance(values, USUAL),
    "earth mover, itself": lambda values: m.earth_movers_distance(values, values),
    "inliers of a baseline": lambda values: m.inlier_ratio(USUAL, values),
    "toxicity": lambda values: m.toxicity_bias(values, ["a", "b"] * (len(values) // 2) + ["a"] * (len(values) % 2)),
    "paired test": lambda values: permutation.paired_permutation_test(values, USUAL[: max(len(values), 1)], 99),
}
"""Functions of which a group's answers make one figure."""

OTHERS = {
    "inliers": lambda values: m.inlier_ratio(values, USUAL),
    "parse rate": m.parse_rate,
    "difference": lambda values: m.exact_difference(np.array(values, float), np.array(values, float)),
    "interval": lambda values: np.array(bootstrap.percentile_interval(np.array(values, float))),
    "holm": lambda values: permutation.holm(np.clip(np.array(values, float), 0, 1)),
    "p-value": lambda values: permutation.permutation_p_value(2.0, np.array(values, float)),
    "p-value of it": lambda values: [
        permutation.permutation_p_value(value, USUAL) for value in np.array(values, float)
    ],
    "sign flips": lambda values: permutation.sign_flip_p_values(np.array(values, float)[:, None], 99, 0),
    "weighted smd": _of_names(bootstrap.weighted_smd),
    "weighted smd, winsorised": _of_names(lambda *args: bootstrap.weighted_smd(*args, 0.05)),
    "weighted earth mover": _of_names(bootstrap.weighted_earth_movers_distance),
    "weighted quantiles": lambda values: bootstrap.weighted_quantiles(_named(values), _weights(), (0.05, 0.5)),
    "weighted parse rate": lambda values: bootstrap.weighted_parse_rate(_named(values), _weights()),
    "reduction": lambda values: reduction_of(np.array(values, float), np.ones(len(values))),
    "reduction to it": lambda values: reduction_of(np.ones(len(values)), np.array(values, float)),
    "bias from sums": lambda values: bias_from_sums(np.array(values, float), np.full(len(values), 3.0)),
    "bias from counts": lambda values: bias_from_sums(np.ones(len(values)), np.array(values, float)),
    "debiased": lambda values: debiased_bias(np.array(values, float), np.full(len(values), 0.1)),
    "folded noise": lambda values: folded_noise(np.full(len(values), 0.1), np.abs(np.array(values, float))),
    "overlap": lambda values: overlap_fraction(np.array(values, float) > 4, np.array(values, float) > 4),
    "chance": lambda values: chance_level(np.array(values, float) > 4),
    "catastrophic": lambda values: catastrophic(np.array(values, float)),
    "fasp": lambda values: fasp(values, values, 0.25, 0.25),
    "fasp, ties": lambda values: fasp(values, values, 0.25, 0.25, paper_ties=True),
    "top": lambda values: top(np.array(values, float), 1),
    "set difference": lambda values: set_difference(np.array(values, float), np.array(values, float), 0.5, 0.25),
    "set difference of a count": lambda values: set_difference_of_count(values, values, 0.25, 1),
    "band": lambda values: pooled_band(np.array(values, float), 0, 1),
    "perplexity": lambda values: perplexity(*_losses(values)),
    "perplexity interval": lambda values: perplexity_interval(*_losses(values), resamples=20).low,
    "perplexity difference": lambda values: (
        perplexity_difference(_losses(values)[0], *_losses(values), relative=True, resamples=20).estimate
    ),
}


@pytest.mark.trial(12)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", PAIR)
def test_a_group_without_a_figure_has_none(name, kind):
    found = PAIR[name](ODD[kind])
    assert not math.isinf(found)
    if kind in LOST:
        assert math.isnan(found)
    if kind.startswith("huge") and "smd" in name and "itself" not in name:
        assert math.isnan(found)
    if kind == "constant" and name in ("smd, itself", "earth mover, itself"):
        assert found == 0


@pytest.mark.trial(12)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", OTHERS)
def test_odd_input_gives_a_figure_or_none_or_a_sentence(name, kind):
    try:
        found = np.asarray(OTHERS[name](ODD[kind]), dtype=float)
    except ExciseError:
        return
    assert not np.isinf(found).any() or name in ("difference", "perplexity")  # as large as the input itself


@pytest.mark.trial(12)
@pytest.mark.parametrize("kind", ["NaN", "a NaN", "infinite", "below all", "both ends"])
def test_what_is_not_known_is_not_tested(kind):
    values = np.array(ODD[kind], float)
    for value in values[~np.isfinite(values)]:
        assert math.isnan(permutation.permutation_p_value(value, USUAL))
    assert np.isnan(permutation.sign_flip_p_values(values[:, None], 99, 0)).all()
    both = permutation.sign_flip_p_values(np.stack([values, USUAL], axis=1), 99, 0)
    assert math.isnan(both[0])
    assert both[1] == permutation.sign_flip_p_values(USUAL[:, None], 99, 0)[0]


def test_without_names_nothing_is_tested():
    assert np.isnan(permutation.sign_flip_p_values(np.zeros((0, 3)), 99, 0)).tolist() == [True] * 3
    assert permutation.sign_flip_p_values(np.zeros((3, 0)), 99, 0).tolist() == []
    assert math.isnan(permutation.paired_permutation_test([], []))
    with pytest.raises(ExciseError, match="draws is 0"):
        permutation.paired_permutation_test([1.0], [2.0], draws=0)


def test_what_is_no_number_is_refused_in_words():
    for values in (["a", "b"], [[1, 2], [3]], [10**400, 1], [{}]):
        for function in (
            lambda v: m.standardized_mean_difference(v, USUAL),
            m.parse_rate,
            lambda v: m.inlier_ratio(v, USUAL),
            lambda v: m.earth_movers_distance(USUAL, v),
            lambda v: m.toxicity_bias(v, ["a", "b"]),
        ):
            with pytest.raises(ExciseError, match="not all are numbers"):
                function(values)


def test_the_top_level_offers_what_a_notebook_wants():
    assert math.isnan(excise.standardized_mean_difference([500] * 9, [300] * 9))
    assert excise.inlier_ratio([5, 50], np.arange(101.0)) == 1
    assert excise.toxicity_bias([0.6, 0.8], ["a", "b"]) == pytest.approx(0.2)
    assert excise.overlap_fraction([True, True], [True, False]) == 0.5
    assert excise.fasp([1, 2, 3, 4], [4, 3, 2, 1], 0.25, 0.25).tolist() == [2]
    assert excise.set_difference([1, 2], [2, 1], 0.5, 0.5).tolist() == [False, True]
    assert excise.parse_number("$12") == 12
    assert set(dir(excise)) >= set(excise.__all__)
    assert all(callable(getattr(excise, name)) for name in excise.__all__)
    with pytest.raises(AttributeError, match="no attribute 'smd'"):
        excise.smd  # noqa: B018


# --- means over draws and reductions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [NAN, INF])
def test_a_draw_without_a_figure_leaves_no_mean_of_the_others(broken):
    assert np.isnan(mean_over_draws([np.ones(5), np.full(5, broken)], 0)).all()
    spoiled = np.ones(5)
    spoiled[2] = broken  # a resample alone
    found = mean_over_draws([np.ones(5), spoiled], 0)
    assert found[0] == 1
    assert np.isfinite(found[[1, 3, 4]]).all()


def test_nothing_infinite_is_reduced_to_nothing():
    before, after = np.array([0.0, INF, NAN, 2.0, 2.0, 2.0]), np.array([1.0, 1.0, 1.0, INF, NAN, 1.0])
    assert reduction_of(before, after) == pytest.approx([NAN] * 5 + [0.5], nan_ok=True)


# --- enumerated answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "probability", "leftover"),
    [([NAN], [1.0], 0.0), ([], [], 1.0), ([5.0], [1.0], 0.0), ([5.0, NAN], [0.5, 0.5], 0.0), ([0.0], [0.5], 0.5)],
)
def test_bounds_of_odd_distributions(values, probability, leftover):
    odd = group_answers(values, probability, [0] * len(values), [leftover])
    usual = group_answers([3.0, 8.0], [0.5, 0.5], [0, 0], [0.0])
    for bounds in (
        *moment_bounds(odd, 0, 9),
        smd_bounds(odd, usual, 0, 9),
        smd_bounds(usual, odd, 0, 9),
        smd_bounds(odd, odd, 0, 9, 0.05),
        inlier_bounds(odd, usual, 0, 9),
        inlier_bounds(usual, odd, 0, 9),
    ):
        assert not bounds.lowest > bounds.highest
    if not np.isfinite(values).any() and not leftover:
        assert math.isnan(smd_bounds(odd, usual, 0, 9).lowest)


# --- heads -----------------------------------------------------------------------------------------------------------


def _impacts(scenario, **columns):
    heads = len(next(iter(columns.values())))
    filled = {"perplexity_without": [20.0] * heads, "z_ppl": [-1.0] * heads, "z_bias": [0.1] * heads} | columns
    return pl.DataFrame(
        {"model": ["m"] * heads, "scenario": [scenario] * heads, "layer": [0] * heads, "head": range(heads), **filled},
        schema_overrides=dict.fromkeys(filled, pl.Float64),
    )


@pytest.mark.parametrize(
    "odd",
    [
        [0.3] * 6,
        [None] * 6,
        [NAN] * 6,
        [INF, 0.1, 0.2, 0.3, 0.4, 0.5],
        [0.1],
        [0.1, 0.2],
        [HUGE, -HUGE] * 3,
        [0.1, None, 0.3, NAN, 0.2, 0.4],
    ],
)
def test_correlations_with_what_does_not_vary_are_null(odd):
    usual = _impacts("race", z_bias=[0.2, 0.1, 0.5, 0.4, 0.3, 0.9][: len(odd)])
    table = impact_correlations(pl.concat([_impacts("gender", z_bias=odd), usual]), resamples=30)
    figures = table.select("estimate", "low", "high").to_numpy().astype(float).ravel()
    assert not np.isinf(figures).any()
    assert table.select(pl.col("estimate", "low", "high").is_nan().sum()).row(0) == (0, 0, 0)
    known = [value for value in odd if value is not None and math.isfinite(value)]
    if len(set(known)) < 2 or len(known) < 3:
        pairs = table.filter(
            (pl.col("scenario") != pl.col("other_scenario")) & pl.col("statistic").is_in(["pearson", "spearman"])
        )
        assert pairs["estimate"].null_count() == pairs.height > 0


def test_reliability_of_halves_that_do_not_vary_is_null():
    for first, second in (([0.1] * 4, [0.1, 0.2, 0.3, 0.4]), ([None] * 4, [0.1] * 4), ([], [])):
        impacts = pl.DataFrame(
            {"z_bias_half_1": first, "z_bias_half_2": second, "perplexity_without": [10.0] * len(first)},
            schema=dict.fromkeys(("z_bias_half_1", "z_bias_half_2", "perplexity_without"), pl.Float64),
        )
        found = split_half_reliability(impacts)
        assert found["pearson"].null_count() == found["spearman_corrected"].null_count() == 2


@pytest.mark.trial(1)
def test_the_best_strength_of_pruning_has_not_collapsed():
    """A mask under which every continuation scores the same has a bias of 0, and is not the choice."""

    def strategy(name, bias, spread, ratio=1.01):
        return [
            (name, "own_scenario", metric, value)
            for metric, value in (("toxicity_bias", bias), ("perplexity_ratio", ratio), ("spread_ratio", spread))
        ]

    rows = [("unpruned", "none", "toxicity_bias", 0.4), *strategy("dull", 0.0, 0.0), *strategy("good", 0.3, 0.8)]
    metrics = pl.DataFrame(rows, schema=["strategy", "level", "metric", "estimate"], orient="row").with_columns(
        model=pl.lit("m"),
        scenario=pl.lit("s"),
        variation=pl.lit("(all)"),
        matched_to=pl.lit(None, pl.String),
        low=pl.col("estimate"),
        high=pl.col("estimate"),
    )
    points = gamma_points(metrics, {"dull": {"alpha": 0.2, "gamma": 0.3}, "good": {"alpha": 0.1, "gamma": 0.3}})
    assert dict(points.select("strategy", "bias").iter_rows()) == {"unpruned": 0.4, "dull": None, "good": 0.3}
    chosen = gamma_choice(points, 0.05).filter("chosen")
    assert chosen["strategy"].to_list() == ["good"]
    assert gamma_choice(points, 0.05).filter("pareto")["strategy"].to_list() == ["unpruned", "good"]


def test_what_is_not_defined_is_null_in_the_warehouse(tmp_path):
    """SQL takes NaN for the largest number of all."""
    import duckdb

    from resources.tables import TABLES
    from resources.warehouse import Warehouse

    warehouse = Warehouse(folder=str(tmp_path))
    schema = TABLES["mask_distribution"].schema
    blank = dict.fromkeys(schema)
    rows = [blank | {"model": "m", "share_of_mask": value} for value in (NAN, INF, -INF, None, 0.5)]
    warehouse.replace_partition("mask_distribution", pl.DataFrame(rows, schema=schema), {"model": "m"})
    with duckdb.connect(tmp_path / "excise.duckdb", read_only=True) as connection:
        query = "select avg(share_of_mask), max(share_of_mask), count(share_of_mask) from mask_distribution"
        assert connection.execute(query).fetchone() == (0.5, 0.5, 1)
    assert json.dumps(warehouse.read("mask_distribution")["share_of_mask"].to_list()).count("null") == 4
