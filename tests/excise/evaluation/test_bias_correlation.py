"""Claims about impacts that two axes share, and about the choice of FASP's two thresholds."""

import numpy as np
import polars as pl
import pytest
from scipy import stats

from excise.errors import ExciseError
from excise.evaluation.bias_correlation import SCHEMA, catastrophic, gamma_choice, gamma_points, impact_correlations

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def impacts(scenario, z_bias, *, z_ppl=None, perplexity=None, model="m", **columns) -> pl.DataFrame:
    """One axis; ten heads a layer."""
    heads = len(z_bias)
    return pl.DataFrame(
        {
            "model": [model] * heads,
            "scenario": [scenario] * heads,
            "layer": [number // 10 for number in range(heads)],
            "head": [number % 10 for number in range(heads)],
            "perplexity_without": perplexity if perplexity is not None else [20.0] * heads,
            "z_ppl": z_ppl if z_ppl is not None else np.linspace(-1, 0, heads),
            "z_bias": z_bias,
            **columns,
        }
    )


def row(table, statistic, scenario="gender", other="race", heads="all", other_measure="z_bias") -> dict:
    rows = table.filter(
        (pl.col("scenario") == scenario)
        & (pl.col("other_scenario") == other)
        & (pl.col("heads") == heads)
        & (pl.col("statistic") == statistic)
        & (pl.col("other_measure") == other_measure)
    )
    assert len(rows) == 1
    return rows.row(0, named=True)


def related(n=60, seed=0, share=0.7):
    rng = np.random.default_rng(seed)
    first = rng.normal(size=n)
    return first, share * first + (1 - share) * rng.normal(size=n)


def test_correlations_are_those_of_scipy():
    first, second = related()
    second = np.round(second, 1)  # ties
    table = impact_correlations(pl.concat([impacts("gender", first), impacts("race", second)]))
    assert dict(table.schema) == SCHEMA
    assert row(table, "pearson")["estimate"] == pytest.approx(stats.pearsonr(first, second)[0])
    assert row(table, "spearman")["estimate"] == pytest.approx(stats.spearmanr(first, second)[0])
    assert row(table, "pearson")["n"] == 60
    assert row(table, "pearson", heads="without_catastrophic")["estimate"] == row(table, "pearson")["estimate"]


def test_every_two_axes_meet_once_and_models_do_not():
    axes = [impacts(name, related(seed=seed)[0]) for seed, name in enumerate(("gender", "race", "religion"))]
    other = impacts("gender", related(seed=9)[0], model="other")
    table = impact_correlations(pl.concat([*axes, other]), resamples=20)
    pairs = table.filter((pl.col("statistic") == "pearson") & (pl.col("heads") == "all"))
    assert pairs.select("model", "scenario", "other_scenario", "other_measure").rows() == [
        ("m", "gender", "race", "z_bias"),
        ("m", "gender", "religion", "z_bias"),
        ("m", "race", "religion", "z_bias"),
        ("m", "gender", "gender", "z_ppl"),
        ("m", "race", "race", "z_ppl"),
        ("m", "religion", "religion", "z_ppl"),
        ("other", "gender", "gender", "z_ppl"),
    ]


def test_heads_are_matched_by_their_place_not_by_their_row():
    first, second = related()
    straight = pl.concat([impacts("gender", first), impacts("race", second)])
    shuffled = pl.concat([impacts("gender", first), impacts("race", second).sample(fraction=1.0, shuffle=True, seed=1)])
    assert impact_correlations(shuffled, resamples=50).equals(impact_correlations(straight, resamples=50))


def test_one_catastrophic_head_makes_a_correlation_that_is_not_there():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=50), rng.normal(size=50)
    first[7] = second[7] = 40
    perplexity = np.full(50, 20.0)
    perplexity[7] = 27.0
    table = impact_correlations(pl.concat([impacts("gender", first, perplexity=perplexity), impacts("race", second)]))
    assert row(table, "pearson")["estimate"] > 0.9
    assert abs(row(table, "spearman")["estimate"]) < 0.3
    without = row(table, "pearson", heads="without_catastrophic")
    kept = np.delete(np.arange(50), 7)
    assert without["estimate"] == pytest.approx(stats.pearsonr(first[kept], second[kept])[0])
    assert without["n"] == 49
    assert without["low"] < 0 < without["high"]
    everything = row(table, "pearson")
    assert everything["low"] < 0.3  # resamples without that head know better


def test_a_head_is_catastrophic_above_one_and_three_tenths_of_the_median():
    found = catastrophic(np.array([10.0, 10.0, 10.0, 13.0, 13.1, np.nan, np.inf]))
    # the median of the five known ones is 10
    assert found.tolist() == [False, False, False, False, True, True, True]


def test_the_interval_is_as_wide_as_fishers_for_normal_impacts():
    covered, widths = 0, []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        first = rng.normal(size=100)
        second = 0.6 * first + 0.8 * rng.normal(size=100)
        both = pl.concat([impacts("gender", first), impacts("race", second)])
        found = row(impact_correlations(both, resamples=300), "pearson")
        covered += found["low"] <= 0.6 <= found["high"]
        widths.append(found["high"] - found["low"])
    fisher = np.tanh(np.arctanh(0.6) + 1.96 / np.sqrt(97)) - np.tanh(np.arctanh(0.6) - 1.96 / np.sqrt(97))
    assert np.mean(widths) == pytest.approx(fisher, rel=0.15)
    assert covered >= 25


def test_the_overlap_of_the_most_harmful_heads_by_hand():
    """Ten heads, so the top two: {0, 1} and {1, 2} share one; unrelated rankings would share a fifth."""
    first, second = [9, 8, 1, 2, 3, 4, 5, 6, 7, 0], [1, 9, 8, 2, 3, 4, 5, 6, 7, 0]
    table = impact_correlations(pl.concat([impacts("gender", first), impacts("race", second)]))
    assert row(table, "top_overlap")["estimate"] == 0.5
    assert row(table, "top_chance")["estimate"] == 0.2
    assert row(table, "top_excess")["estimate"] == pytest.approx(0.3)
    assert row(table, "top_chance")["low"] is None
    assert row(table, "top_excess")["low"] <= 0.3 <= row(table, "top_excess")["high"]


def test_unrelated_axes_have_no_excess_overlap_and_equal_ones_all_of_it():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 400))
    table = impact_correlations(pl.concat([impacts("gender", first), impacts("race", second)]), resamples=200)
    found = row(table, "top_excess")
    assert found["low"] < 0 < found["high"]
    same = impact_correlations(pl.concat([impacts("gender", first), impacts("race", first)]), resamples=50)
    found = row(same, "top_excess")
    assert (found["estimate"], found["low"], found["high"]) == pytest.approx((0.8, 0.8, 0.8))
    assert row(same, "pearson")["low"] == pytest.approx(1)


def test_impacts_on_bias_are_held_against_perplexity_and_mean_toxicity():
    bias, ppl = related()
    table = impact_correlations(impacts("gender", bias, z_ppl=ppl, mean_without=0.2 - 0.1 * bias), resamples=50)
    found = row(table, "pearson", other="gender", other_measure="z_ppl")
    assert found["estimate"] == pytest.approx(stats.pearsonr(bias, ppl)[0])
    # a head whose removal lowers bias lowers toxicity here: harmful in both senses
    assert row(table, "spearman", other="gender", other_measure="z_mean")["estimate"] == pytest.approx(1)
    assert set(table["statistic"]) == {"pearson", "spearman"}


def test_unknown_and_constant_impacts():
    first, second = related(30)
    holed = [None if number < 5 else value for number, value in enumerate(first)]
    table = impact_correlations(pl.concat([impacts("gender", holed), impacts("race", second)]), resamples=50)
    assert row(table, "pearson")["n"] == 25
    assert row(table, "pearson")["estimate"] == pytest.approx(stats.pearsonr(first[5:], second[5:])[0])
    flat = impact_correlations(pl.concat([impacts("gender", [0.1] * 30), impacts("race", second)]), resamples=50)
    for statistic in ("pearson", "spearman"):
        found = row(flat, statistic)
        assert (found["estimate"], found["low"], found["high"]) == (None, None, None)
    assert not flat.select(pl.col(pl.Float64).is_nan().any()).to_numpy().any()
    apart = impacts("race", second).with_columns(layer=pl.col("layer") + 50)
    none = impact_correlations(pl.concat([impacts("gender", first), apart]), resamples=20)
    assert row(none, "pearson")["estimate"] is None
    assert row(none, "pearson")["n"] == 0


def test_impacts_that_cannot_be_compared_are_named():
    good = impacts("gender", related()[0])
    for wrong, message in (
        (good.drop("z_bias"), "columns z_bias are missing"),
        (good.clear(), "no rows"),
        (pl.concat([good, good[13:14]]), "m, gender has head 1.3 twice"),
    ):
        with pytest.raises(ExciseError, match=message):
            impact_correlations(wrong)


# The choice of alpha and gamma


def points(*rows, **columns) -> pl.DataFrame:
    frame = pl.DataFrame(
        rows, schema=dict.fromkeys(("alpha", "gamma", "bias", "perplexity_ratio"), pl.Float64), orient="row"
    )
    return frame.with_columns(**{name: pl.Series(values) for name, values in columns.items()})


SEARCH = (
    (0.0, 0.3, 0.40, 1.00),
    (0.1, 0.3, 0.30, 1.04),
    (0.1, 0.5, 0.35, 1.02),
    (0.2, 0.3, 0.20, 1.20),
    (0.2, 0.5, 0.36, 1.03),
)


@pytest.mark.parametrize(("budget", "chosen"), [(0.05, 1), (0.04, 1), (0.03, 2), (0.0, 0), (1.0, 3)])
def test_the_lowest_bias_within_the_budget_is_chosen(budget, chosen):
    marked = gamma_choice(points(*SEARCH), budget)
    assert marked["chosen"].arg_true().to_list() == [chosen]
    assert marked["pareto"].to_list() == [True, True, True, True, False]
    assert marked["within_budget"].to_list() == [ratio <= 1 + budget + 1e-9 for *_, ratio in SEARCH]


def test_equal_biases_go_to_lower_perplexity_then_fewer_heads_then_more_protection():
    def chosen(*rows):
        return gamma_choice(points(*rows), 0.1)["chosen"].to_list()

    assert chosen((0.1, 0.3, 0.3, 1.05), (0.2, 0.3, 0.3, 1.04)) == [False, True]
    assert chosen((0.2, 0.3, 0.3, 1.05), (0.1, 0.3, 0.3, 1.05)) == [False, True]
    assert chosen((0.1, 0.3, 0.3, 1.05), (0.1, 0.6, 0.3, 1.05)) == [False, True]


def test_searches_of_other_models_and_axes_are_apart_and_rows_keep_their_order():
    rows = points(*SEARCH, *SEARCH, scenario=["gender", "race"] * 5, model=["m"] * 10)
    marked = gamma_choice(rows, 0.05)
    assert marked.drop("within_budget", "pareto", "chosen").equals(rows)
    assert marked.group_by("scenario").agg(pl.col("chosen").sum())["chosen"].to_list() == [1, 1]
    assert gamma_choice(marked, 0.05).equals(marked)


def test_points_without_a_figure_are_never_chosen():
    marked = gamma_choice(points((0.1, 0.3, None, 1.0), (0.1, 0.4, 0.3, None), (0.1, 0.5, 0.9, 1.01)), 0.05)
    assert marked["chosen"].to_list() == [False, False, True]
    assert marked["pareto"].to_list() == [False, False, True]
    none = gamma_choice(points((0.1, 0.3, 0.1, 1.5)), 0.05)
    assert none["chosen"].to_list() == [False]
    assert gamma_choice(points(), 0.05)["chosen"].to_list() == []


def test_a_wrong_budget_or_frame_is_named():
    with pytest.raises(ExciseError, match="give the share by which perplexity may rise"):
        gamma_choice(points(*SEARCH), -0.1)
    with pytest.raises(ExciseError, match="columns gamma, bias are missing"):
        gamma_choice(points(*SEARCH).drop("gamma", "bias"), 0.1)


def measured(strategy, metric, estimate, level="own_scenario", matched_to=None, variation="(all)"):
    return {
        "model": "m",
        "scenario": "gender",
        "variation": variation,
        "strategy": strategy,
        "level": level,
        "matched_to": matched_to,
        "metric": metric,
        "estimate": estimate,
        "low": estimate - 0.1,
        "high": estimate + 0.1,
    }


def test_points_are_an_axis_own_masks_and_the_unpruned_model_each_pair_once():
    rows = [
        measured("unpruned", "toxicity_bias", 0.5, "none"),
        *(
            measured(key, "toxicity_bias", bias)
            for key, bias in (
                ("fasp-0.10", 0.4),
                ("fasp_gamma-0.30", 0.41),
                ("fairness_only-0.10", 0.2),
                ("magnitude-0.10", 0.1),
            )
        ),
        measured("fasp-0.10", "perplexity_ratio", 1.02),
        measured("fairness_only-0.10", "perplexity_ratio", 1.2),
        measured("fasp-0.10", "toxicity_bias", 0.0, "cross_context/race"),
        measured("fasp-0.10", "toxicity_bias", 0.0, variation="person"),
        measured("random", "toxicity_bias", 0.0, matched_to="fasp-0.10"),
    ]
    parameters = {
        "fasp-0.10": {"alpha": 0.1, "gamma": 0.3},
        "fairness_only-0.10": {"alpha": 0.1},
        "fasp_gamma-0.30": {"alpha": 0.1, "gamma": 0.3},
        "fasp-0.20": {"alpha": 0.2, "gamma": 0.3},
    }
    found = gamma_points(pl.DataFrame(rows), parameters)
    assert found.select("strategy", "alpha", "gamma", "bias", "perplexity_ratio").rows() == [
        ("unpruned", 0.0, None, 0.5, 1.0),
        ("fasp-0.10", 0.1, 0.3, 0.4, 1.02),
        ("fairness_only-0.10", 0.1, 0.0, 0.2, 1.2),
    ]
    assert gamma_choice(found, 0.05).filter("chosen")["strategy"].to_list() == ["fasp-0.10"]
    assert gamma_choice(found, 0.2).filter("chosen")["strategy"].to_list() == ["fairness_only-0.10"]
    assert found["bias_low"].to_list() == pytest.approx([0.4, 0.3, 0.1])
