"""Claims about what the report says of hand-made metrics, and of what it refuses to say."""

from __future__ import annotations

import polars
import pytest

from excise.conditions import Condition, condition_order
from excise.errors import ExciseError
from excise.evaluation.numbers import evaluate
from excise.evaluation.table import read_metrics
from excise.reporting.audit_table import audit_table, markdown_table
from excise.reporting.figures import disparity_by_level
from excise.reporting.finding import finding
from excise.reporting.words import reuse_sentence

UNPRUNED = ("unpruned", "none", None)
GRADIENT = ("gap_gradient", "prompt_specific", None)
GRADIENT_RANDOM = ("random", "prompt_specific", "gap_gradient")
DIFFERENCE = ("set_difference", "prompt_specific", None)
DIFFERENCE_RANDOM = ("random", "prompt_specific", "set_difference")

SCHEMA = {
    **dict.fromkeys(("model", "scenario", "variation", "strategy", "level", "matched_to", "metric"), polars.String),
    **dict.fromkeys(("estimate", "low", "high", "p_value", "p_holm"), polars.Float64),
    "n": polars.Int64,
}


def row(variation, mask, metric, estimate, low=None, high=None, **other):
    strategy, level, matched_to = mask
    return {
        "model": "planted-specific",
        "scenario": "purchase",
        "variation": variation,
        "strategy": strategy,
        "level": level,
        "matched_to": matched_to,
        "metric": metric,
        "estimate": estimate,
        "low": low,
        "high": high,
        "p_value": None,
        "p_holm": None,
        "n": 128,
        **other,
    }


def frame(*rows):
    return polars.DataFrame(rows, schema=SCHEMA)


def unpruned(variation="bicycle", gap=(70.0, 60.0, 80.0), smd=(1.2, 1.0, 1.4)):
    return [
        row(variation, UNPRUNED, "mean_majority", 138.6),
        row(variation, UNPRUNED, "mean_minority", 68.5),
        row(variation, UNPRUNED, "median_majority", 135.0),
        row(variation, UNPRUNED, "median_minority", 65.0),
        row(variation, UNPRUNED, "gap_mean", *gap),
        row(variation, UNPRUNED, "smd", *smd),
        row(variation, UNPRUNED, "inlier_ratio", 0.94),
        row(variation, UNPRUNED, "density", 0.0),
    ]


def pruned(mask, beyond, *, inliers, removed=0.9, by_chance=0.1, density=0.0003, variation="bicycle"):
    control = ("random", mask[1], mask[0])
    return [
        row(variation, mask, "gap_reduction", removed),
        row(variation, mask, "reduction_over_random", *beyond),
        row(variation, mask, "inlier_ratio", inliers),
        row(variation, mask, "density", density),
        row(variation, mask, "gap_mean", 7.0, 1.0, 13.0),
        row(variation, control, "gap_mean", 63.0, 55.0, 71.0),
        row(variation, control, "gap_reduction", by_chance),
        row(variation, control, "inlier_ratio", inliers),
    ]


CLEAR = (0.8, 0.65, 0.95)


# -------------------------------------------------------------------------------------------------------------- finding


def test_the_best_strategy_is_the_largest_reduction_beyond_random_that_keeps_the_inlier_ratio():
    metrics = frame(
        *unpruned(),
        *pruned(GRADIENT, CLEAR, inliers=0.95),
        *pruned(DIFFERENCE, (0.9, 0.8, 1.0), inliers=0.69),
    )
    assert finding(metrics) == (
        "Best prompt-specific strategy: gap_gradient removes 90 % of the raw gap, 80 percentage points [65, 95] more "
        "than its matched random control, at inlier ratio 0.95 (floor 0.80)."
    )


def test_a_reduction_whose_interval_covers_zero_is_not_called_a_success():
    metrics = frame(*unpruned(), *pruned(GRADIENT, (0.1, -0.05, 0.25), inliers=0.95))
    assert finding(metrics).endswith("; that interval covers 0, so it is not shown to beat random pruning.")


def test_a_reduction_without_an_interval_is_a_lead():
    metrics = frame(*unpruned(), *pruned(GRADIENT, (0.1, None, None), inliers=0.95))
    assert finding(metrics).endswith("; without an interval this is a lead, not a result.")


def test_nothing_is_to_reduce_where_the_unpruned_interval_covers_zero():
    metrics = frame(*unpruned(gap=(2.0, -3.0, 7.0)), *pruned(GRADIENT, CLEAR, inliers=0.95))
    assert finding(metrics) == (
        "No gap detectable: the unpruned raw gap is 2.00 [-3.00, 7.00]; up to 7.00 (1.40 SMD) is not excluded."
    )


def test_variations_that_cancel_on_average_are_named():
    metrics = frame(
        *unpruned("chair", gap=(10.0, 5.0, 15.0)),
        *unpruned("car", gap=(-900.0, -1200.0, -600.0)),
        *unpruned("oven", gap=(1.0, -5.0, 7.0)),
        row("(all)", UNPRUNED, "smd", 0.02, -0.1, 0.14),
        *pruned(GRADIENT, CLEAR, inliers=0.95, variation="(all)"),
    )
    told = finding(metrics)
    assert "mean SMD is 0.02 [-0.10, 0.14]; up to 0.14 SMD is not excluded" in told
    assert "Taken singly, chair (SMD 1.20 [1.00, 1.40]) and car (SMD 1.20 [1.00, 1.40]) stand out" in told
    assert "Best prompt-specific strategy: gap_gradient" in told


def test_a_published_strategy_that_fails_its_control_is_named_with_both_reductions():
    metrics = frame(
        *unpruned(),
        *pruned(GRADIENT, CLEAR, inliers=0.95),
        *pruned(DIFFERENCE, (-0.36, -0.5, -0.2), inliers=0.69, removed=0.41, by_chance=0.77),
    )
    assert finding(metrics).endswith(
        "The published set_difference is not shown to beat its matched random control; of the raw gap it removes "
        "prompt-specific 41 % against 77 % (-36 percentage points [-50, -20])."
    )


def test_a_random_control_that_wrecks_the_model_is_no_yardstick():
    rows = [*unpruned(), *pruned(GRADIENT, CLEAR, inliers=0.97), *pruned(DIFFERENCE, (9.0, 8.0, 10.0), inliers=0.6)]
    half = len(unpruned()) + len(pruned(GRADIENT, CLEAR, inliers=0.97)) - 1  # what follows is set_difference's
    wrecked = [
        {**each, "estimate": 0.2} if each["matched_to"] and each["metric"] == "inlier_ratio" and i > half else each
        for i, each in enumerate(rows)
    ]
    sentence = finding(frame(*wrecked))
    assert "gap_gradient removes 90 %" in sentence
    assert "no yardstick: inlier ratio prompt-specific 0.60 against 0.20" in sentence
    lines = table(frame(*wrecked)).splitlines()
    assert next(line for line in lines if line.strip().startswith("set_difference")).endswith("+900 [800, 1,000]*")
    assert any(line.startswith("* not at comparable usefulness") for line in lines)
    assert "*" not in table(frame(*rows))


def test_a_published_strategy_is_accused_once_and_only_if_published():
    metrics = frame(*unpruned(), *pruned(DIFFERENCE, (0.05, -0.1, 0.2), inliers=0.95))
    assert finding(metrics).count("set_difference") == 1
    weak = frame(
        *unpruned(), *pruned(GRADIENT, CLEAR, inliers=0.95), *pruned(DIFFERENCE, (0.0, -0.1, 0.1), inliers=0.95)
    )
    assert "set_difference" not in finding(weak, published=())
    assert "set_difference" in finding(weak)


def test_a_strategy_below_the_floor_is_told_as_such():
    metrics = frame(*unpruned(), *pruned(DIFFERENCE, CLEAR, inliers=0.69))
    assert finding(metrics, inlier_floor=0.9) == (
        "No prompt-specific strategy keeps the inlier ratio at the floor of 0.90: the largest difference from its "
        "matched random control, 80 percentage points [65, 95] by set_difference, comes at inlier ratio 0.69."
    )
    assert finding(metrics, inlier_floor=0.6).startswith("Best prompt-specific strategy: set_difference")


def test_a_ratio_just_below_the_floor_does_not_print_as_the_floor():
    metrics = frame(*unpruned(), *pruned(GRADIENT, CLEAR, inliers=0.8996))
    assert "comes at inlier ratio 0.8996." in finding(metrics, inlier_floor=0.9)


def test_a_strategy_worse_than_random_wins_nothing():
    metrics = frame(*unpruned(), *pruned(GRADIENT, (-0.05, -0.1, 0.0), inliers=0.95))
    assert finding(metrics).startswith(
        "No prompt-specific strategy at inlier ratio 0.80 or more removes more of the raw gap than random pruning"
    )


def test_over_variations_the_sentence_names_those_below_the_floor():
    metrics = frame(
        *unpruned("chair"),
        *unpruned("car"),
        row("(all)", UNPRUNED, "smd", 1.0, 0.8, 1.2),
        *pruned(GRADIENT, CLEAR, inliers=0.97, variation="chair"),
        *pruned(GRADIENT, CLEAR, inliers=0.85, variation="car"),
        *pruned(GRADIENT, CLEAR, inliers=0.91, variation="(all)"),
    )
    assert "over all variations" in finding(metrics)
    told = finding(metrics, inlier_floor=0.9)
    assert told.endswith("at inlier ratio 0.91 (floor 0.90), though below that floor on car (0.85).")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (unpruned(), "No prompt-specific strategy was evaluated."),
        (
            [*unpruned(), row("bicycle", GRADIENT, "gap_reduction", 0.9)],
            "No prompt-specific strategy could be compared with a matched random control: nothing is claimed.",
        ),
        (
            unpruned() + pruned(GRADIENT, (None, None, None), inliers=0.95, removed=None, by_chance=None),
            "No reduction is defined: the raw gap of the unpruned model cannot be told from 0.",
        ),
        ([row("bicycle", GRADIENT, "smd", 0.5)], "No finding: the metrics hold no gap of the unpruned model."),
        (unpruned(gap=(70.0, None, None)), "No finding: the unpruned raw gap is 70.0 and has no interval."),
        (
            unpruned("chair") + unpruned("car"),
            "No finding: the metrics hold several variations and nothing over all of them.",
        ),
    ],
)
def test_where_something_lacks_the_finding_says_what(rows, sentence):
    assert finding(frame(*rows)) == sentence


# --------------------------------------------------------------------------------------------------------------- tables


def full(variations=("chair", "car"), scale=1.0):
    rows = []
    for variation in (*variations, "(all)"):
        rows += unpruned(variation, gap=(70.0 * scale, 60.0 * scale, 80.0 * scale))
        rows += pruned(GRADIENT, CLEAR, inliers=0.95, variation=variation)
        rows += pruned(DIFFERENCE, (-0.3, -0.4, -0.2), inliers=0.69, density=0.05, variation=variation)
        rows += [row(variation, ("reversed", "prompt_specific", "set_difference"), "gap_mean", 34.0 * scale)]
        rows += pruned(
            ("gap_gradient", "within_context", None), (0.3, 0.1, 0.5), inliers=0.93, removed=0.4, variation=variation
        )
    return frame(*rows)


def table(metrics, **options):
    return audit_table(
        metrics, scenario_title="Purchase", unit="US dollars", majority="white", minority="Black", **options
    )


def test_the_table_tells_unpruned_first_then_levels_with_controls_below_their_strategy():
    lines = table(full()).splitlines()
    start = lines.index("chair")
    labels = [
        line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0] for line in lines[start:]
    ]
    assert labels[: labels.index("")] == [
        "chair",
        "unpruned",
        "prompt-specific",
        "gap_gradient",
        "random",
        "set_difference",
        "random",
        "reversed",
        "within-context",
        "gap_gradient",
        "random",
    ]


def test_a_row_holds_every_figure_of_its_mask():
    lines = table(full(("bicycle",))).splitlines()
    start = lines.index("bicycle")
    told = " ".join(lines[start + 1].split())
    assert told == "unpruned 139 / 68 135 / 65 70.0 [60.0, 80.0] - - 1.20 [1.00, 1.40] 0.94 - -"
    told = " ".join(lines[start + 3].split())
    assert told == "gap_gradient - - 7.0 [1.0, 13.0] - - - 0.95 90 % +80 [65, 95]"


def test_the_table_ends_with_the_block_over_all_variations_and_the_finding():
    text = table(full())
    assert "All 2 variations together" in text
    assert text.index("car\n") < text.index("All 2 variations") < text.index("Best prompt-specific strategy")
    assert text.rstrip().endswith("[-40, -20]).")


@pytest.mark.trial(26)
def test_the_block_over_all_says_how_many_variations_it_is_of():
    metrics = full(("chair", "car", "oven"))
    for judged, title, scope in (
        (3.0, "All 3 variations together", "over all variations"),
        (2.0, "The 2 of 3 variations that can be judged, together", "over the 2 of 3 variations that can be judged"),
    ):
        counted = frame(row("(all)", UNPRUNED, "judged_variations", judged))
        text = table(polars.concat([metrics, counted]))
        assert {title, f"{title}: reductions"} <= set(text.splitlines())
        assert f"of the raw gap {scope}, " in " ".join(text.split())


@pytest.mark.parametrize("scale", [1.0, 1e3, -1e7])
def test_the_table_is_never_wider_than_asked(scale):
    long = "a_strategy_of_the_users_own_with_a_name_that_goes_on_and_on"
    metrics = full(scale=scale).with_columns(
        polars.col("strategy").str.replace("set_difference", long),
        polars.col("matched_to").str.replace("set_difference", long),
        polars.when(polars.col("metric").str.contains("^me(an|dian)_"))
        .then(polars.col("estimate") * scale)
        .otherwise("estimate"),
    )
    text = audit_table(
        metrics,
        scenario_title="A" * 200,
        unit="US dollars",
        majority="white Americans of the Midwest",
        minority="Black Americans of the Midwest",
    )
    assert max(len(line) for line in text.splitlines()) <= 160


def test_undefined_estimates_print_as_a_dash():
    metrics = frame(
        *unpruned(),
        row("bicycle", GRADIENT, "gap_mean", None),
        row("bicycle", GRADIENT, "smd", float("nan"), float("nan"), float("nan")),
        row("bicycle", GRADIENT, "inlier_ratio", None),
    )
    text = table(metrics)
    assert "nan" not in text.lower()
    assert "None" not in text
    line = next(line for line in text.splitlines() if line.strip().startswith("gap_gradient"))
    assert set(line.split()[1:]) == {"-"}
    assert "nan" not in markdown_table(metrics)


def test_thousands_are_separated_and_small_densities_keep_two_digits():
    metrics = frame(
        row("car", UNPRUNED, "mean_majority", 28512.4),
        row("car", UNPRUNED, "mean_minority", 9900.6),
        row("car", UNPRUNED, "gap_mean", -18611.8, -20000.0, -17000.2),
        row("(all)", UNPRUNED, "density", 0.000123),
    )
    text = table(metrics)
    assert "28,512 / 9,901" in text
    assert "-18,612 [-20,000, -17,000]" in text
    assert "0.012 %" in text


def test_the_markdown_table_has_a_row_for_each_variation_and_mask():
    metrics = full()
    lines = markdown_table(metrics, majority="white", minority="Black").split("\n\n")[0].splitlines()
    masks = metrics.select("variation", "strategy", "level", "matched_to").unique().height
    assert len(lines) == masks + 2
    assert {line.count(" | ") for line in lines} == {20}
    assert any("random (control of set_difference) | prompt-specific" in line for line in lines)


def test_the_markdown_table_shows_the_adjusted_p_value_of_the_gap():
    metrics = frame(
        row("car", UNPRUNED, "gap_mean", 5.0, 1.0, 9.0, p_value=0.01, p_holm=0.02),
        row("car", GRADIENT, "gap_mean", 5.0, 1.0, 9.0, p_value=0.0001),
    )
    text, note = markdown_table(metrics).split("\n\n")
    shown = [line.split(" | ")[6:8] for line in text.splitlines()]
    assert shown == [["p (no gap)", "p (gap as unpruned)"], ["---:", "---:"], ["0.020", "-"], ["-", "< 0.001"]]
    assert "p (no gap): test that the groups' means are alike, in the unpruned model" in note


def test_evaluated_answers_can_be_told_and_drawn():
    answers = polars.DataFrame(
        [
            ("planted", "purchase", variation, group, f"{group} {name}", base + 10 * favoured + name % 5 + sample)
            for variation, base in (("chair", 50.0), ("car", 90.0))
            for group, favoured in (("white", 1), ("black", 0))
            for name in range(8)
            for sample in range(4)
        ],
        schema=["model", "scenario", "variation", "group", "subject", "value"],
        orient="row",
    )

    def masked(strategy, matched_to, draw, lift):
        lifted = polars.col("value") + lift * (polars.col("group") == "black")
        return answers.with_columns(
            lifted.alias("value"),
            strategy=polars.lit(strategy),
            level=polars.lit("prompt_specific"),
            matched_to=polars.lit(matched_to, polars.String),
            draw=polars.lit(draw),
        )

    masks = [masked("gap_gradient", None, 0, 9.0), masked("random", "gap_gradient", 0, 1.0)]
    masks.append(masked("random", "gap_gradient", 1, -1.0))
    metrics = evaluate(
        answers,
        polars.concat(masks),
        polars.DataFrame(),
        majority="white",
        minority="black",
        resamples=50,
        permutations=99,
    )
    text = table(metrics)
    assert "Best prompt-specific strategy: gap_gradient removes 90 % of the raw gap over all variations" in text
    assert max(len(line) for line in text.splitlines()) <= 160
    assert [axes.get_ylabel().split("\n")[0] for axes in disparity_by_level(metrics).axes] == [
        "|SMD|",
        "raw gap left",
        "inlier ratio",
    ]


def test_bars_in_names_do_not_break_the_markdown_table():
    lines = markdown_table(frame(*unpruned("a|b"))).splitlines()
    assert lines[2].startswith("| a\\|b | unpruned |")


# -------------------------------------------------------------------------------------------------------------- reading


def test_controls_sort_after_their_own_strategy():
    masks = [Condition(*mask) for mask in (DIFFERENCE_RANDOM, GRADIENT_RANDOM, DIFFERENCE, GRADIENT, UNPRUNED)]
    ordered = sorted(masks, key=condition_order)
    assert ordered == [Condition(*m) for m in (UNPRUNED, GRADIENT, GRADIENT_RANDOM, DIFFERENCE, DIFFERENCE_RANDOM)]


def test_variations_keep_the_order_of_the_frame():
    assert read_metrics(full(("oven", "car", "chair"))).variations == ("oven", "car", "chair")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (frame(), "no rows"),
        (frame(*unpruned()).drop("low"), "columns low are missing"),
        (frame(*unpruned(), *unpruned()), "mean_majority of unpruned .* appears twice"),
        (frame(*unpruned(), row("car", UNPRUNED, "smd", 1.0, model="neutral")), "2 values of model"),
    ],
)
def test_frames_that_cannot_be_told_are_refused(metrics, message):
    with pytest.raises(ExciseError, match=message):
        table(metrics)


@pytest.mark.parametrize(
    ("drawn", "reused", "sentence"),
    [
        (0, 0, "No completion was asked for."),
        (0, 1920, "Nothing was sampled anew: 1,920 completions from earlier runs reused, since nothing changed."),
        (1920, 0, "1,920 completions sampled, none reused: nothing in the cache matched."),
        (480, 1440, "480 completions sampled, 1,440 completions (75 %) reused from earlier runs."),
        (1, 1919, "1 completion sampled, 1,919 completions (over 99 %) reused from earlier runs."),
        (9999, 1, "9,999 completions sampled, 1 completion (under 1 %) reused from earlier runs."),
    ],
)
def test_reuse_is_told_in_a_sentence(drawn, reused, sentence):
    assert reuse_sentence(drawn, reused) == sentence


def test_a_negative_count_of_completions_is_refused():
    with pytest.raises(ExciseError, match="cannot be negative"):
        reuse_sentence(-1, 0)
