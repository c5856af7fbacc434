"""The metrics table on simulated answers whose gap, noise and damage are known."""

import numpy as np
import polars as pl
import pytest

from excise.conditions import ALL
from excise.errors import ExciseError
from excise.evaluation import metrics as m
from excise.evaluation import permutation
from excise.evaluation.numbers import evaluate
from excise.evaluation.rows import SCHEMA
from excise.evaluation.thresholds import COLLAPSED_SPREAD

KEYS = {"strategy": pl.String, "level": pl.String, "matched_to": pl.String, "draw": pl.Int64}


def answers(variation, values):
    """values: {group: {subject: [answers]}}"""
    rows = [
        {"variation": variation, "group": group, "subject": subject, "value": value}
        for group, subjects in values.items()
        for subject, given in subjects.items()
        for value in given
    ]
    frame = pl.DataFrame(
        rows, schema={"variation": pl.String, "group": pl.String, "subject": pl.String, "value": pl.Float64}
    )
    return frame.with_columns(model=pl.lit("m"), scenario=pl.lit("purchase"))


def under(strategy, frame, level="prompt_specific", matched_to=None, draw=0):
    values = {"strategy": strategy, "level": level, "matched_to": matched_to, "draw": draw}
    return frame.with_columns(pl.lit(value, dtype=KEYS[key]).alias(key) for key, value in values.items())


def mask_rows(pruned, share=(3, 10)):
    keys = ["model", "scenario", "variation", *KEYS]
    return pruned.select(keys).unique(maintain_order=True).with_columns(pruned=pl.lit(share[0]), size=pl.lit(share[1]))


def simulated(variation, gap, seed, names=10, samples=8, level=100.0, noise=10.0, jitter=0.0):
    """Names differ by noise / 4. The same seed gives the same noise, as common random numbers do."""
    rng = np.random.default_rng(seed)
    other = np.random.default_rng(seed + 1000)
    values = {}
    for group, shift in (("white", gap / 2), ("black", -gap / 2)):
        draws = level + shift + rng.normal(0, noise / 4, (names, 1)) + rng.normal(0, noise, (names, samples))
        draws += other.normal(0, 1, draws.shape) * jitter
        values[group] = {f"{group} {name}": list(draws[name]) for name in range(names)}
    return answers(variation, values)


def run(completions, pruned=None, masks=None, **settings):
    settings = {"resamples": 300, "permutations": 499, "majority": "white", "minority": "black"} | settings
    pruned = pl.DataFrame() if pruned is None else pruned
    if masks is None:
        masks = pl.DataFrame() if pruned.is_empty() else mask_rows(pruned)
    metrics = evaluate(completions, pruned, masks, **settings)
    assert metrics.schema == pl.Schema(SCHEMA)
    for column in ("estimate", "low", "high", "p_value", "p_holm"):
        assert metrics[column].drop_nulls().is_finite().all()
    assert not metrics.select("variation", "strategy", "level", "matched_to", "metric").is_duplicated().any()
    return metrics


def row(metrics, metric, variation="chair", strategy="unpruned", matched_to=None):
    found = metrics.filter(
        (pl.col("metric") == metric)
        & (pl.col("variation") == variation)
        & (pl.col("strategy") == strategy)
        & pl.col("matched_to").eq_missing(pl.lit(matched_to, dtype=pl.String))
    )
    return found.row(0, named=True) if len(found) else None


def estimate(metrics, metric, *where, **more):
    return row(metrics, metric, *where, **more)["estimate"]


SMALL = {"white": {"Jake": [10, 20, None], "Luke": [30, 40]}, "black": {"Jamal": [10, 10], "Ebony": [20, 40]}}


def test_unpruned_estimates_by_hand():
    metrics = run(answers("chair", SMALL), winsorize=None)
    expected = {
        "mean_majority": 25,
        "mean_minority": 20,
        "median_majority": 25,
        "median_minority": 15,
        "gap_mean": 5,
        "gap_median": 10,
        "smd": 5 / np.sqrt((500 / 3 + 200) / 2),
        "abs_smd": 5 / np.sqrt((500 / 3 + 200) / 2),
        "parse_rate": 8 / 9,
        "earth_movers_distance": 5,
        "inlier_ratio": 8 / 9,
        "density": 0,
    }
    for variation in ("chair", ALL):
        assert {metric: estimate(metrics, metric, variation) for metric in expected} == pytest.approx(expected)
    assert row(metrics, "mean_majority")["n"] == 4
    assert row(metrics, "gap_mean")["n"] == 8
    assert row(metrics, "parse_rate")["n"] == 9
    assert row(metrics, "gap_mean")["level"] == "none"
    assert row(metrics, "gap_reduction") is None


def test_estimates_equal_the_plain_functions():
    frame = simulated("chair", 20, 0)
    pruned = simulated("chair", 5, 1, level=90)
    metrics = run(frame, under("set_difference", pruned))
    of = {group: pruned.filter(pl.col("group") == group)["value"].to_numpy() for group in ("white", "black")}
    where = {"strategy": "set_difference"}
    smd = m.standardized_mean_difference(of["white"], of["black"], 0.05)
    assert estimate(metrics, "smd", **where) == pytest.approx(smd)
    before = [frame.filter(pl.col("group") == group)["value"].to_numpy() for group in ("white", "black")]
    assert estimate(metrics, "smd") == pytest.approx(m.standardized_mean_difference(*before, 0.05))
    inliers = m.inlier_ratio(pruned["value"].to_numpy(), frame["value"].to_numpy())
    assert estimate(metrics, "inlier_ratio", **where) == pytest.approx(inliers)
    distance = m.earth_movers_distance(of["white"], of["black"])
    assert estimate(metrics, "earth_movers_distance", **where) == pytest.approx(distance)
    assert estimate(metrics, "gap_median", **where) == pytest.approx(np.median(of["white"]) - np.median(of["black"]))
    assert estimate(metrics, "density", **where) == pytest.approx(0.3)


def test_reductions_and_their_controls_by_definition():
    frame = simulated("chair", 40, 0)
    pruned = [under("gap_gradient", simulated("chair", 10, 0))]
    for draw, gap in enumerate((38, 30)):
        pruned.append(under("random", simulated("chair", gap, 0), matched_to="gap_gradient", draw=draw))
    pruned.append(under("pooled_band", simulated("chair", 20, 0), matched_to="gap_gradient"))
    metrics = run(frame, pl.concat(pruned))
    gap = estimate(metrics, "gap_mean")
    after = estimate(metrics, "gap_mean", strategy="gap_gradient")
    random = {"strategy": "random", "matched_to": "gap_gradient"}
    assert gap - after == pytest.approx(30)
    assert estimate(metrics, "gap_change", strategy="gap_gradient") == pytest.approx(30)
    assert estimate(metrics, "gap_reduction", strategy="gap_gradient") == pytest.approx(30 / gap)
    assert estimate(metrics, "gap_mean", **random) == pytest.approx(gap - 6)
    assert estimate(metrics, "gap_reduction", **random) == pytest.approx(6 / gap)
    assert estimate(metrics, "reduction_over_random", strategy="gap_gradient") == pytest.approx(24 / gap)
    assert row(metrics, "reduction_over_random", **random) is None
    # a control has as many weights as its strategy's mask, so it is held against the same random masks
    control = {"strategy": "pooled_band", "matched_to": "gap_gradient"}
    assert estimate(metrics, "reduction_over_random", **control) == pytest.approx(14 / gap)
    unpruned, under_mask = (estimate(metrics, "smd", strategy=s) for s in ("unpruned", "gap_gradient"))
    assert estimate(metrics, "smd_reduction", strategy="gap_gradient") == pytest.approx(1 - under_mask / unpruned)
    assert row(metrics, "smd_reduction_over_random", strategy="gap_gradient")["estimate"] is not None
    assert row(metrics, "gap_mean", **random)["n"] == 2 * 160
    assert row(metrics, "density", **random)["n"] == 2
    # with one variation, "(all)" is that variation
    for metric in ("gap_reduction", "reduction_over_random", "smd_reduction", "gap_change"):
        one, overall = (row(metrics, metric, variation, "gap_gradient") for variation in ("chair", ALL))
        for column in ("estimate", "low", "high"):
            assert one[column] == pytest.approx(overall[column])


def test_a_paired_change_is_known_better_than_either_gap():
    """Common noise cancels: every name's answers move alike, so the change has no uncertainty at all."""
    metrics = run(simulated("chair", 40, 0), under("gap_gradient", simulated("chair", 10, 0)))
    gap, change = row(metrics, "gap_mean"), row(metrics, "gap_change", strategy="gap_gradient")
    assert gap["high"] - gap["low"] > 2
    assert change["high"] - change["low"] < 1e-6


def test_draws_of_a_control_widen_its_interval():
    def width(gaps):
        pruned = pl.concat(
            [
                under("random", simulated("chair", gap, 0), matched_to="gap_gradient", draw=draw)
                for draw, gap in enumerate(gaps)
            ]
        )
        found = row(run(simulated("chair", 40, 0), pruned), "gap_change", strategy="random", matched_to="gap_gradient")
        return found["high"] - found["low"]

    assert width([30, 30, 30]) < 1e-6
    assert 5 < width([20, 30, 40]) <= 20


def test_expensive_variations_do_not_swamp_the_overall_reduction():
    """The chair's gap is removed, the car's, a thousand times larger, is not: half of the relative gap remains."""
    frame = pl.concat([simulated("chair", 40, 0), simulated("car", 40_000, 0, level=1e5, noise=1e4)])
    pruned = pl.concat([simulated("chair", 0, 0), simulated("car", 40_000, 0, level=1e5, noise=1e4)])
    metrics = run(frame, under("gap_gradient", pruned))
    # the simulated names add the same relative noise to both gaps, so the chair's remaining gap is that noise
    left = abs(estimate(metrics, "gap_mean", strategy="gap_gradient")) / estimate(metrics, "gap_mean")
    found = row(metrics, "gap_reduction", ALL, "gap_gradient")
    assert found["estimate"] == pytest.approx((1 - left) / 2, abs=0.01)
    assert estimate(metrics, "gap_mean", ALL) == pytest.approx(
        (estimate(metrics, "gap_mean") + estimate(metrics, "gap_mean", "car")) / 2
    )


def test_nothing_to_reduce_leaves_reductions_null_and_the_change_given():
    """Means are equal by construction: white and Black names share their answers."""
    rng = np.random.default_rng(0)
    given = [list(rng.normal(100, 10, 8)) for _ in range(8)]
    same = {group: {f"{group} {i}": given[i] for i in range(8)} for group in ("white", "black")}
    metrics = run(answers("chair", same), under("gap_gradient", simulated("chair", 10, 0, names=8)))
    assert row(metrics, "gap_mean")["low"] < 0 < row(metrics, "gap_mean")["high"]
    assert row(metrics, "gap_mean")["p_value"] == 1.0
    for variation in ("chair", ALL):
        for metric in ("gap_reduction", "smd_reduction"):
            found = row(metrics, metric, variation, "gap_gradient")
            assert (found["estimate"], found["low"], found["high"]) == (None, None, None)
        assert row(metrics, "gap_change", variation, "gap_gradient")["estimate"] < 0


def test_p_values():
    frame = pl.concat([simulated("chair", 40, 0), simulated("car", 0, 5)])
    pruned = pl.concat([simulated("chair", 5, 0, jitter=3), simulated("car", 0, 5, jitter=3)])
    same = under("identity", frame)
    metrics = run(frame, pl.concat([under("gap_gradient", pruned), same]))
    assert row(metrics, "gap_mean")["p_value"] == 1 / 500
    assert row(metrics, "smd")["p_value"] == 1 / 500
    assert row(metrics, "gap_mean", "car")["p_value"] > 0.01
    assert row(metrics, "gap_mean")["p_holm"] == pytest.approx(2 / 500)
    assert row(metrics, "gap_mean", strategy="gap_gradient")["p_value"] == 1 / 500
    assert row(metrics, "gap_mean", "car", "gap_gradient")["p_value"] > 0.01
    assert row(metrics, "gap_mean", ALL, "gap_gradient")["p_value"] == 1 / 500
    for variation in ("chair", "car", ALL):
        assert row(metrics, "gap_mean", variation, "identity")["p_value"] == 1.0
    assert row(metrics, "gap_mean", ALL)["p_holm"] is None
    tested = metrics.filter(pl.col("p_value").is_not_null())
    assert set(tested["metric"]) == {"gap_mean", "smd"}
    assert set(tested.filter(pl.col("metric") == "smd")["strategy"]) == {"unpruned"}


def test_rows_do_not_depend_on_the_order_of_the_input_or_on_other_masks():
    frame = simulated("chair", 20, 0)
    one = under("gap_gradient", simulated("chair", 10, 0, jitter=2))
    two = under("set_difference", simulated("chair", 15, 0, jitter=2))
    alone, together = run(frame, one), run(frame.reverse(), pl.concat([two, one.reverse()]))
    keys = ["strategy", "variation", "metric"]
    shared = together.filter(pl.col("strategy") != "set_difference").sort(keys)
    for column in ("estimate", "low", "high", "p_value"):
        left, right = alone.sort(keys)[column], shared[column]
        assert left.is_null().to_list() == right.is_null().to_list()
        assert left.drop_nulls().to_numpy() == pytest.approx(right.drop_nulls().to_numpy())


def test_answers_that_never_parse_under_a_mask_are_null_and_so_is_the_mean_they_belong_to():
    frame = pl.concat([simulated("chair", 40, 0), simulated("car", 40, 1)])
    broken = simulated("chair", 40, 0).with_columns(value=pl.lit(None, dtype=pl.Float64))
    metrics = run(frame, under("set_difference", pl.concat([broken, simulated("car", 20, 1)])))
    where = {"strategy": "set_difference"}
    for metric in ("mean_majority", "gap_mean", "smd", "earth_movers_distance", "gap_change", "gap_reduction"):
        assert row(metrics, metric, **where)["estimate"] is None
        assert estimate(metrics, metric, "car", **where) is not None
        assert row(metrics, metric, ALL, **where)["estimate"] is None  # not the mean of the variation that is left
    assert estimate(metrics, "parse_rate", **where) == 0
    assert estimate(metrics, "inlier_ratio", **where) == 0
    assert estimate(metrics, "parse_rate", ALL, **where) == pytest.approx(0.5)
    assert row(metrics, "gap_mean", **where)["p_value"] is None


def test_a_name_without_a_parsed_answer_and_one_missing_under_a_mask():
    values = {group: dict(names) for group, names in SMALL.items()}
    values["white"]["Seth"] = [None, None]
    pruned = {"white": {"Jake": [20], "Seth": [25, None]}, "black": {"Jamal": [20], "Ebony": [20]}}
    metrics = run(answers("chair", values), under("gap_gradient", answers("chair", pruned)))
    assert estimate(metrics, "gap_mean", strategy="gap_gradient") == pytest.approx(2.5)
    assert row(metrics, "gap_mean", strategy="gap_gradient")["p_value"] is None  # one white name has both answers
    pruned["white"]["Luke"] = [35]
    metrics = run(answers("chair", values), under("gap_gradient", answers("chair", pruned)))
    assert row(metrics, "gap_mean", strategy="gap_gradient")["p_value"] is not None


def test_a_variation_missing_under_one_mask():
    frame = pl.concat([simulated("chair", 40, 0), simulated("car", 40, 1)])
    metrics = run(frame, under("gap_gradient", simulated("car", 20, 1)))
    assert row(metrics, "gap_mean", "chair", "gap_gradient") is None
    overall = estimate(metrics, "gap_reduction", ALL, "gap_gradient")
    assert overall == pytest.approx(estimate(metrics, "gap_reduction", "car", "gap_gradient"))


def test_one_name_per_group_has_no_interval_and_no_reduction():
    one = {"white": {"Jake": [10.0, 12.0]}, "black": {"Jamal": [5.0, 6.0]}}
    metrics = run(answers("chair", one), under("gap_gradient", answers("chair", one)))
    assert estimate(metrics, "gap_mean") == pytest.approx(5.5)
    assert metrics["low"].null_count() == metrics["high"].null_count() == len(metrics)
    assert row(metrics, "gap_reduction", strategy="gap_gradient")["estimate"] is None
    assert estimate(metrics, "gap_change", strategy="gap_gradient") == 0


def test_constant_and_absurd_answers_stay_finite():
    constant = {"white": {"Jake": [0.1] * 3, "Luke": [0.1] * 2}, "black": {"Jamal": [0.1], "Ebony": [0.1] * 4}}
    metrics = run(answers("chair", constant), under("gap_gradient", answers("chair", constant)))
    assert estimate(metrics, "smd") == 0
    assert estimate(metrics, "gap_mean") == 0
    assert row(metrics, "gap_reduction", strategy="gap_gradient")["estimate"] is None
    absurd = {"white": {"Jake": [1e300, 0], "Luke": [-1e300, 3]}, "black": {"Jamal": [1e308] * 3, "Ebony": [0, 0]}}
    run(answers("chair", absurd), under("gap_gradient", answers("chair", absurd)))


def test_the_interval_of_the_gap_covers_the_planted_one():
    covered = []
    for seed in range(60):
        found = row(run(simulated("chair", 20, seed, names=16), permutations=1, resamples=200), "gap_mean")
        covered.append(found["low"] <= 20 <= found["high"])
    assert np.mean(covered) >= 0.82


def test_density_is_pooled_over_layers_and_roles_and_averaged_over_draws():
    frame = simulated("chair", 20, 0)
    pruned = pl.concat([under("random", frame, matched_to="x", draw=draw) for draw in (0, 1)])
    masks = pl.concat([mask_rows(pruned, (1, 10)), mask_rows(pruned, (4, 90))])
    metrics = run(frame, pruned, masks)
    assert estimate(metrics, "density", strategy="random", matched_to="x") == pytest.approx(0.05)
    unknown = run(frame, pruned, pl.DataFrame())
    assert row(unknown, "density", strategy="random", matched_to="x")["estimate"] is None


def test_mistakes_are_named():
    frame = simulated("chair", 20, 0)
    with pytest.raises(ExciseError, match=r"purchase.*'asian'.*black, white"):
        run(frame, minority="asian")
    half = pl.concat([frame, simulated("car", 20, 0).filter(pl.col("group") == "white")])
    with pytest.raises(ExciseError, match="purchase/car: no completions for the group 'black'"):
        run(half)
    with pytest.raises(ExciseError, match=r"purchase/chair, gap_gradient.*'white'"):
        run(frame, under("gap_gradient", frame.filter(pl.col("group") == "black")))
    with pytest.raises(ExciseError, match=r"purchase/car, gap_gradient.*no unpruned"):
        run(frame, under("gap_gradient", simulated("car", 20, 0)))
    with pytest.raises(ExciseError, match="white 9"):
        run(frame.filter(pl.col("subject") != "white 9"), under("gap_gradient", frame))
    with pytest.raises(ExciseError, match="subject"):
        run(frame.drop("subject"))
    with pytest.raises(ExciseError, match="no completions"):
        run(frame.clear())
    with pytest.raises(ExciseError, match="one model at a time"):
        run(pl.concat([frame, frame.with_columns(model=pl.lit("n"))]))
    with pytest.raises(ExciseError, match="two groups"):
        run(frame, minority="white")


# --- undefined is null, and nothing undefined is a success -----------------------------------------------------------


def same(white, black, variation="chair", names=6, samples=5):
    """Every name of a group gives the same answer always."""
    values = {"white": white, "black": black}
    return answers(
        variation,
        {
            group: {f"{group} {name}": [float(value)] * samples for name in range(names)}
            for group, value in values.items()
        },
    )


def some_other(frame, value, every):
    """Every so-many-th answer is another one."""
    return frame.with_columns(value=pl.when(pl.int_range(pl.len()) % every == 0).then(value).otherwise("value"))


REDUCED = ("gap_reduction", "smd_reduction", "reduction_over_random", "smd_reduction_over_random")


@pytest.mark.trial(1)
def test_a_gap_without_deviation_has_no_smd_and_no_reduction_of_it():
    metrics = run(same(500, 300), under("gap_gradient", same(450, 400)))
    for variation in ("chair", ALL):
        for where in ({"strategy": "unpruned"}, {"strategy": "gap_gradient"}):
            for metric in ("smd", "abs_smd"):
                found = row(metrics, metric, variation, **where)
                assert {found[each] for each in ("estimate", "low", "high", "p_value", "p_holm")} == {None}
        assert estimate(metrics, "gap_mean", variation) == 200
        assert row(metrics, "smd_reduction", variation, "gap_gradient")["estimate"] is None
        # nothing collapsed: the unpruned model said the same to everybody of a group already
        assert row(metrics, "spread_ratio", variation, "gap_gradient")["estimate"] is None
        assert estimate(metrics, "gap_reduction", variation, "gap_gradient") == pytest.approx(0.75)


@pytest.mark.trial(1)
@pytest.mark.parametrize(
    "pruned",
    [
        same(700, 300),
        same(400, 400),
        some_other(same(400, 400), 440.0, 30),  # 29 of 30 answers are equal
        some_other(same(400, 400), 401.0, 2),  # two figures close together
    ],
    ids=["wider", "equal", "nearly", "two"],
)
def test_a_mask_that_leaves_a_group_one_answer_is_no_success(pruned):
    frame = simulated("chair", 200, 0, names=6, samples=5, level=400, noise=20)
    control = under("random", simulated("chair", 190, 0, names=6, samples=5, level=400, noise=20), matched_to="mask")
    metrics = run(frame, pl.concat([under("mask", pruned), control]))
    for variation in ("chair", ALL):
        assert estimate(metrics, "gap_reduction", variation, "random", matched_to="mask") > 0
        for metric in REDUCED:
            found = row(metrics, metric, variation, "mask")
            assert (found["estimate"], found["low"], found["high"]) == (None, None, None)
        assert estimate(metrics, "spread_ratio", variation, "mask") < COLLAPSED_SPREAD
        assert row(metrics, "gap_change", variation, "mask")["estimate"] is not None


@pytest.mark.trial(1)
def test_one_collapsed_variation_or_draw_leaves_nothing_to_be_told_over_all():
    def both(chair, car):
        return pl.concat([chair, car.with_columns(variation=pl.lit("car"))])

    usual, half = simulated("chair", 40, 0), simulated("chair", 20, 0)
    collapsed = same(100, 100, names=10, samples=8)
    metrics = run(
        both(usual, usual),
        pl.concat(
            [
                under("mask", both(collapsed, half)),
                under("whole", both(half, half)),
                under("random", both(usual, half), matched_to="whole", draw=0),
                under("random", both(usual, collapsed), matched_to="whole", draw=1),
            ]
        ),
    )
    assert row(metrics, "gap_reduction", ALL, "mask")["estimate"] is None
    assert estimate(metrics, "gap_reduction", "car", "mask") > 0.4
    assert estimate(metrics, "spread_ratio", ALL, "mask") == 0  # the smallest, not the mean
    assert estimate(metrics, "spread_ratio", "car", "mask") == pytest.approx(1)
    assert estimate(metrics, "gap_reduction", ALL, "whole") > 0.4
    assert estimate(metrics, "reduction_over_random", "chair", "whole") > 0.4
    for variation in ("car", ALL):
        assert row(metrics, "reduction_over_random", variation, "whole")["estimate"] is None
        assert row(metrics, "gap_reduction", variation, "random", "whole")["estimate"] is None


@pytest.mark.trial(1)
def test_a_reduction_that_too_many_resamples_leave_undefined_is_not_told():
    frame = simulated("chair", 40, 0)
    # Under the mask two names of one group answer: many a resample holds one of them, or none.
    few = simulated("chair", 20, 0).with_columns(
        value=pl.when(pl.col("subject").is_in([f"black {name}" for name in range(2, 10)])).then(None).otherwise("value")
    )
    metrics = run(frame, pl.concat([under("mask", few), under("random", frame, matched_to="mask")]))
    for metric in REDUCED:
        found = row(metrics, metric, strategy="mask")
        assert (found["estimate"], found["low"], found["high"]) == (None, None, None), metric
    assert row(metrics, "gap_mean", strategy="mask")["estimate"] is not None


def test_a_mask_may_narrow_answers_and_still_reduce_their_gap():
    frame, narrow = simulated("chair", 40, 0), simulated("chair", 20, 0, noise=4.0)
    metrics = run(frame, under("mask", narrow))
    assert estimate(metrics, "spread_ratio", strategy="mask") == pytest.approx(0.4, abs=0.1)
    assert estimate(metrics, "gap_reduction", strategy="mask") > 0.3


@pytest.mark.trial(12)
def test_answers_whose_mean_overflows_have_no_gap_rather_than_none():
    huge = {"white": {"Jake": [1e308, 1e308], "Luke": [5, 6]}, "black": {"Jamal": [5, 6], "Ebony": [7, 8]}}
    usual = {"white": {"Jake": [9, 8], "Luke": [5, 6]}, "black": {"Jamal": [5, 6], "Ebony": [7, 8]}}
    for before, after in ((huge, huge), (huge, usual), (usual, huge)):
        metrics = run(answers("chair", before), under("mask", answers("chair", after)))
        gaps = [("mask", variation) for variation in ("chair", ALL)]
        if before is huge:
            gaps += [("unpruned", variation) for variation in ("chair", ALL)]
        for strategy, variation in gaps:
            # a pruned gap that is known stands beside a change that is not
            undefined = ["gap_change", "gap_reduction", "smd_reduction"] if strategy == "mask" else []
            undefined += ["gap_mean", "abs_gap_mean", "smd"] if strategy == "unpruned" or after is huge else []
            for metric in undefined:
                found = row(metrics, metric, variation, strategy)
                assert {found[each] for each in ("estimate", "low", "high", "p_value", "p_holm")} == {None}, metric
            assert row(metrics, "gap_mean", variation, strategy)["p_value"] is None


@pytest.mark.trial(13)
def test_the_p_values_of_a_mask_do_not_depend_on_the_others():
    frame = pl.concat([simulated("chair", 4, 0, names=33), simulated("car", 3, 1, names=33)])
    masks = [
        under(
            f"mask {number}",
            pl.concat(
                [
                    simulated(variation, gap, number, names=33, jitter=2)
                    for variation, gap in (("chair", 3.5), ("car", 3))
                ]
            ),
        )
        for number in range(60)
    ]

    def tests(of):
        metrics = run(frame, pl.concat(of), permutations=9999, resamples=10)
        found = metrics.filter((pl.col("metric") == "gap_mean") & pl.col("strategy").str.starts_with("mask"))
        return {row[:2]: row[2:] for row in found.select("strategy", "variation", "p_value", "p_holm").iter_rows()}

    together = tests(masks)
    assert len({p_value for p_value, _ in together.values()}) > 100
    for some in (masks[:1], masks[::-1], masks[7:31]):
        found = tests(some)
        assert len(found) == 3 * len(some)
        assert found == {place: together[place] for place in found}


@pytest.mark.trial(39)
def test_every_figure_tells_from_how_many_names_it_is():
    few = {
        "white": {f"w{name}": [500.0, 510 + name] for name in range(7)},
        "black": {"b0": [300.0, 310], "b1": [305.0, 320], "b2": [None, None]},
    }
    fewer = few | {
        "white": {f"w{name}": [400.0, 390 + name] for name in range(7)},
        "black": {"b0": [300.0, 310], "b1": [None, None], "b2": [300.0, 302]},
    }
    frame = pl.concat(
        [
            answers("chair", few),
            simulated("car", 40, 0, names=7).with_columns(
                subject=pl.col("subject").str.replace("white ", "w").str.replace("black ", "b")
            ),
        ]
    )
    metrics = run(frame, under("mask", answers("chair", fewer)))
    for metric, behind in (("gap_mean", 2), ("smd", 2), ("mean_majority", 2), ("parse_rate", 3), ("inlier_ratio", 3)):
        assert row(metrics, metric)["names"] == behind
        assert row(metrics, metric, "car")["names"] == 7
        assert row(metrics, metric, ALL)["names"] == behind  # the fewest
        assert row(metrics, metric, strategy="mask")["names"] == behind
    for metric in ("gap_change", "gap_reduction"):
        assert row(metrics, metric, strategy="mask")["names"] == 2
    assert row(metrics, "density")["names"] is None


@pytest.mark.trial(39)
def test_one_name_that_answers_leaves_no_interval_and_no_test():
    """Resampling draws that name or nothing: an interval would have the width 0."""
    frame = simulated("chair", 40, 0)
    lonely = frame.with_columns(
        value=pl.when((pl.col("group") == "black") & (pl.col("subject") != "black 3")).then(None).otherwise("value")
    )
    for metrics, where in ((run(lonely), {}), (run(frame, under("mask", lonely)), {"strategy": "mask"})):
        for metric in ("gap_mean", "smd", "median_minority", "earth_movers_distance"):
            found = row(metrics, metric, **where)
            assert found["estimate"] is not None
            assert (found["low"], found["high"], found["p_value"], found["names"]) == (None, None, None, 1)
        assert row(metrics, "parse_rate", **where)["low"] is not None


@pytest.mark.trial(45)
def test_gaps_of_opposite_sign_do_not_hide_each_other():
    frame = pl.concat([simulated("chair", 40, 0), simulated("car", -40, 0)])
    half = pl.concat([simulated("chair", 20, 0), simulated("car", -20, 0)])
    metrics = run(frame, under("mask", half))
    gaps = [estimate(metrics, "gap_mean", variation) for variation in ("chair", "car")]
    overall = row(metrics, "gap_mean", ALL)
    assert overall["low"] < 0 < overall["high"]
    found = row(metrics, "abs_gap_mean", ALL)
    assert found["estimate"] == pytest.approx(np.abs(gaps).mean())
    assert 0 < found["low"] <= found["estimate"] <= found["high"]
    assert estimate(metrics, "abs_gap_mean", "car") == pytest.approx(abs(gaps[1]))
    tests = {each: row(metrics, "gap_mean", each)["p_holm"] for each in ("chair", "car")}
    assert permutation.rejected(tests) == ["chair", "car"]
    # so there is something to reduce over all variations, and half of it is gone
    for metric in ("gap_reduction", "smd_reduction"):
        assert estimate(metrics, metric, ALL, "mask") == pytest.approx(0.5, abs=0.02)


def test_a_variation_of_zeros_has_no_size_to_tell_a_new_gap_in():
    nothing = same(0, 0, "car", names=10, samples=8)
    frame = pl.concat([simulated("chair", 40, 0), nothing])
    left = run(frame, under("mask", pl.concat([simulated("chair", 20, 0), nothing])))
    alone = estimate(left, "gap_reduction", strategy="mask")
    assert estimate(left, "gap_reduction", ALL, "mask") == pytest.approx(alone)
    opened = run(frame, under("mask", pl.concat([simulated("chair", 20, 0), simulated("car", 20, 1)])))
    assert row(opened, "gap_reduction", ALL, "mask")["estimate"] is None
    assert row(opened, "gap_mean", ALL, "mask")["p_value"] is None


def test_a_variation_the_unpruned_model_did_not_answer_is_no_part_of_the_mean():
    silent = simulated("car", 40, 1).with_columns(value=pl.lit(None, dtype=pl.Float64))
    frame, half = simulated("chair", 40, 0), simulated("chair", 20, 0)
    alone = run(frame, under("mask", half))
    metrics = run(pl.concat([frame, silent]), under("mask", pl.concat([half, silent])))
    for metric in ("gap_mean", "smd", "inlier_ratio", "gap_reduction", "gap_change", "spread_ratio"):
        for column in ("estimate", "low", "high", "names"):
            assert row(metrics, metric, ALL, "mask")[column] == row(alone, metric, ALL, "mask")[column]
    assert estimate(metrics, "parse_rate", ALL) == 0.5


# Damage, and how a gap closed


def shifted(frame, **by):
    """The answers of a group moved by so much."""
    moved = pl.col("value")
    for group, shift in by.items():
        moved = pl.when(pl.col("group") == group).then(pl.col("value") + shift).otherwise(moved)
    return frame.with_columns(value=moved)


def gap_of_twenty(variation="chair"):
    rng = np.random.default_rng(4)
    names = {group: [f"{group} {number}" for number in range(8)] for group in ("white", "black")}
    rows = [
        {
            "model": "m",
            "scenario": "purchase",
            "variation": variation,
            "group": group,
            "subject": name,
            "value": float(round(level + offset + noise, 1)),
        }
        for group, level in (("white", 120), ("black", 100))
        for name in names[group]
        for offset in [rng.normal(0, 1)]
        for noise in rng.normal(0, 6, size=20)
    ]
    return pl.DataFrame(rows)


def test_shifts_that_close_the_gap_are_no_damage_and_tell_how_it_closed():
    frame = gap_of_twenty()
    gap = estimate(run(frame), "gap_mean")
    metrics = run(frame, under("set_difference", shifted(frame, white=-0.75 * gap, black=0.25 * gap)))
    where = {"strategy": "set_difference"}
    assert estimate(metrics, "gap_reduction", **where) == pytest.approx(1, abs=1e-6)
    assert estimate(metrics, "excess_change", **where) == pytest.approx(0, abs=1e-6)
    assert estimate(metrics, "closed_by_majority", **where) == pytest.approx(0.75)
    assert estimate(metrics, "closed_by_minority", **where) == pytest.approx(0.25)
    assert estimate(metrics, "spread_ratio", **where) == pytest.approx(1)
    both = run(frame, under("set_difference", shifted(frame, white=10, black=10)))
    assert estimate(both, "closed_by_majority", **where) == pytest.approx(-10 / gap)
    assert estimate(both, "closed_by_minority", **where) == pytest.approx(10 / gap)
    deviation = np.sqrt(np.mean([frame.filter(group=each)["value"].var() for each in ("white", "black")]))
    assert estimate(both, "excess_change", **where) == pytest.approx(10 / deviation, rel=1e-3)
    interval = row(both, "excess_change", **where)
    assert interval["low"] < interval["estimate"] < interval["high"]


def test_a_reversed_gap_is_told_the_other_way_round():
    frame = gap_of_twenty().with_columns(
        group=pl.when(pl.col("group") == "white").then(pl.lit("black")).otherwise(pl.lit("white"))
    )
    gap = estimate(run(frame), "gap_mean")
    assert gap < 0
    metrics = run(frame, under("set_difference", shifted(frame, white=-gap)))
    assert estimate(metrics, "closed_by_majority", strategy="set_difference") == pytest.approx(1)
    assert estimate(metrics, "closed_by_minority", strategy="set_difference") == pytest.approx(0)


def test_answers_that_flock_to_one_figure_are_seen():
    frame = gap_of_twenty()
    most = pl.int_range(pl.len()) % 10 < 7
    flocked = frame.with_columns(value=pl.when(most).then(110.0).otherwise(pl.col("value")))
    metrics = run(frame, under("set_difference", flocked))
    where = {"strategy": "set_difference"}
    assert estimate(metrics, "commonest_answer", **where) == pytest.approx(0.7, abs=0.01)
    before = max(part["value"].value_counts()["count"].max() / part.height for part in frame.partition_by("group"))
    assert estimate(metrics, "commonest_rise", **where) == pytest.approx(0.7 - before, abs=0.01)
    assert estimate(metrics, "spread_ratio", **where) < 0.9


def test_a_group_that_answers_as_the_other_did_is_not_damaged():
    """Damage is what goes beyond one distribution for both, which is all that a closed gap can mean."""
    frame = gap_of_twenty()
    white = pl.col("group") == "white"
    wide = frame.with_columns(value=pl.when(white).then(2 * pl.col("value") - 110).otherwise("value"))
    as_black = frame.filter(group="black")["value"].to_list()
    same = frame.sort("group", maintain_order=True).with_columns(value=pl.Series([*as_black, *as_black]))
    where = {"strategy": "set_difference"}
    metrics = run(wide, under("set_difference", same))
    assert estimate(metrics, "spread_ratio", **where) == pytest.approx(1)
    assert estimate(metrics, "commonest_rise", **where) <= 1e-9
    narrow = run(wide, under("set_difference", frame.with_columns(value=100 + (pl.col("value") - 100) / 4)))
    assert estimate(narrow, "spread_ratio", **where) == pytest.approx(0.25, abs=0.02)


def test_logarithms_decide_how_far_answers_moved():
    frame = gap_of_twenty()
    doubled = frame.with_columns(value=2 * pl.col("value"))
    plain, logs = (
        estimate(
            run(frame, under("set_difference", doubled), log_scale=scale),
            "excess_change",
            "chair",
            strategy="set_difference",
        )
        for scale in (False, True)
    )
    values = frame.with_columns(pl.col("value").log())
    deviation = np.sqrt(np.mean([values.filter(group=each)["value"].var() for each in ("white", "black")]))
    assert logs == pytest.approx(np.log(2) / deviation, rel=1e-3)
    assert plain != pytest.approx(logs, rel=0.05)


def test_over_variations_and_draws_the_worst_damage_counts():
    chair, car = gap_of_twenty(), gap_of_twenty("car")
    frame = pl.concat([chair, car])
    pruned = pl.concat([shifted(chair, white=-5), shifted(car, white=8, black=8)])
    metrics = run(frame, under("set_difference", pruned))
    where = {"strategy": "set_difference"}
    own = [estimate(metrics, "excess_change", variation, **where) for variation in ("chair", "car")]
    assert estimate(metrics, "excess_change", "(all)", **where) == pytest.approx(max(own))
    assert own[1] > own[0]
    still = run(frame, under("set_difference", frame))
    assert estimate(still, "closed_by_majority", "(all)", **where) == pytest.approx(0)
    assert estimate(still, "excess_change", "(all)", **where) == pytest.approx(0)
