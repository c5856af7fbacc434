"""Claims about claims: no sentence, table or figure says more than its figures, on hand-made metrics of one audit."""

import math
import re
from dataclasses import asdict

import polars as pl
import pytest

from excise.conditions import Condition
from excise.errors import ExciseError
from excise.evaluation.table import read_metrics
from excise.evaluation.thresholds import Thresholds
from excise.reporting.audit_table import audit_table, markdown_table
from excise.reporting.figures import (
    bias_by_level,
    disparity_by_level,
    gamma_sweep,
    grid_heat_maps,
    toxicity_by_subgroup,
    trade_off,
)
from excise.reporting.finding import finding
from excise.reporting.results import results_markdown
from excise.reporting.results.frames import ResultFrames
from excise.reporting.results.verdicts import verdict
from excise.reporting.toxicity import toxicity_finding, toxicity_markdown, toxicity_table

UNPRUNED = ("unpruned", "none", None)
OURS = ("ours", "prompt_specific", None)
OURS_RANDOM = ("random", "prompt_specific", "ours")
TEXTS = ("model", "scenario", "variation", "strategy", "level", "matched_to", "metric")
SCHEMA = {
    **dict.fromkeys(TEXTS, pl.String),
    **dict.fromkeys(("estimate", "low", "high", "p_value", "p_holm"), pl.Float64),
    **dict.fromkeys(("n", "names"), pl.Int64),
}


def row(variation, mask, metric, estimate, low=None, high=None, **other):
    return {
        "model": "tiny",
        "scenario": "purchase",
        "variation": variation,
        "strategy": mask[0],
        "level": mask[1],
        "matched_to": mask[2],
        "metric": metric,
        "estimate": estimate,
        "low": low,
        "high": high,
        "p_value": None,
        "p_holm": None,
        "n": 64,
        "names": 16,
    } | other


def rows(variation, mask, **metrics):
    """A row for each metric, given as its estimate or as (estimate, low, high)."""
    return [
        row(variation, mask, metric, *(figures if isinstance(figures, tuple) else (figures,)))
        for metric, figures in metrics.items()
    ]


def unpruned(variation="car", **changes):
    figures = {
        "mean_majority": 500.0,
        "mean_minority": 300.0,
        "median_majority": 500.0,
        "median_minority": 300.0,
        "gap_mean": (200.0, 150.0, 250.0),
        "smd": (1.2, 0.9, 1.5),
        "abs_smd": (1.2, 0.9, 1.5),
        "inlier_ratio": 0.9,
        "parse_rate": 1.0,
        "density": 0.0,
    } | changes
    return rows(variation, UNPRUNED, **figures)


def pruned(variation="car", mask=OURS, **changes):
    """A mask that removes 90 % of the gap beside a control that removes 10 %."""
    figures = {
        "gap_mean": (20.0, 5.0, 35.0),
        "smd": (0.1, 0.0, 0.2),
        "abs_smd": (0.1, 0.0, 0.2),
        "gap_reduction": (0.9, 0.8, 1.0),
        "reduction_over_random": (0.8, 0.65, 0.95),
        "inlier_ratio": 0.95,
        "spread_ratio": 0.9,
        "density": 0.01,
    } | changes
    control = {
        "gap_mean": (180.0, 130.0, 230.0),
        "smd": (1.1, 0.8, 1.4),
        "abs_smd": (1.1, 0.8, 1.4),
        "gap_reduction": (0.1, 0.0, 0.2),
        "inlier_ratio": 0.95,
        "spread_ratio": 1.0,
        "density": 0.01,
    }
    return rows(variation, mask, **figures) + rows(variation, ("random", mask[1], mask[0]), **control)


def frame(*parts):
    return pl.DataFrame([each for part in parts for each in part], schema=SCHEMA)


def terminal(metrics, **options):
    return audit_table(
        metrics, scenario_title="Purchase", unit="USD", majority="white", minority="Black", width=200, **options
    )


def judged(scenario="purchase", floor=0.8, tolerance=0.1, budget=0.05):
    return pl.DataFrame(
        [
            {"asset": asset, "model": "tiny", "scenario": scenario}
            | asdict(Thresholds(inlier_floor=floor, inlier_tolerance=tolerance, perplexity_budget=budget))
            for asset in ("evaluation_metrics", "grid_search")
        ]
    )


# ---------------------------------------------------------------------------- undefined figures and collapsed answers


@pytest.mark.trial(1)
def test_the_finding_says_why_smd_is_undefined():
    none = (None, None, None)
    constant = unpruned(gap_mean=(200.0, 200.0, 200.0), smd=none, abs_smd=none)
    told = finding(frame(constant, pruned(gap_reduction=none, reduction_over_random=none)))
    assert "SMD is undefined" in told
    assert "every answer of majority is 500, every answer of minority 300, so the raw gap of 200 has no spread" in told
    assert "removes" not in told
    (line,) = [line for line in terminal(frame(constant)).splitlines() if line.split()[:1] == ["unpruned"]]
    assert re.split(r"\s{2,}", line.strip())[-4:] == ["-", "0.90", "-", "-"]  # SMD, inliers, reductions


@pytest.mark.trial(12)
@pytest.mark.parametrize("size", [1e300, 1e-300])
def test_answers_whose_variance_no_number_holds_are_not_said_to_be_all_the_same(size):
    none = (None, None, None)
    far = {
        f"{kind}_{group}": size * many
        for kind in ("mean", "median")
        for group, many in (("majority", 5), ("minority", 3))
    }
    told = finding(frame(unpruned(smd=none, abs_smd=none, **far)))
    assert "SMD is undefined: the squares of such answers are beyond what a computer's numbers hold" in told
    assert "every answer" not in told


COLLAPSED = {
    "one number": {"spread_ratio": 0.0, "gap_mean": (0.0, 0.0, 0.0), "smd": (0.0, 0.0, 0.0)},
    "nearly one number": {"spread_ratio": 0.02},
    "a number per group": {"spread_ratio": 0.0, "gap_mean": (300.0, 300.0, 300.0), "smd": (None, None, None)},
}


@pytest.mark.trial(1)
@pytest.mark.parametrize("change", COLLAPSED.values(), ids=COLLAPSED)
def test_a_mask_that_makes_answers_constant_is_no_success_anywhere(change):
    perfect = {"gap_reduction": (1.0, 1.0, 1.0), "reduction_over_random": (0.9, 0.8, 1.0), "inlier_ratio": 1.0}
    metrics = frame(unpruned(), pruned(**perfect | change))
    told = finding(metrics)
    assert "nothing is claimed" in told
    assert "collapse to one number under ours (prompt-specific)" in told
    assert "Best prompt-specific" not in told
    for table in (terminal(metrics), markdown_table(metrics)):
        line = next(line for line in table.splitlines() if re.search(r"^(\| car \| ours|    ours) ", line))
        assert "collapsed" in line
        assert "100 %" not in line
    assert verdict(read_metrics(metrics), "car", Condition("ours", "prompt_specific")) == "answers collapsed"
    for figure in (disparity_by_level(metrics), bias_by_level(metrics)):
        bias = figure.axes[0]
        (drawn,) = [line for line in bias.lines if line.get_marker() == "X"]
        assert drawn.get_ydata()[0] > 0.5  # in shares of the panel, far from 0
        assert "answers collapsed to one number" in legend(figure)
    better = frame(unpruned(), pruned(**perfect | change), pruned(mask=("other", "prompt_specific", None)))
    assert "Best prompt-specific strategy: other" in finding(better)


def test_a_mask_that_collapses_one_variation_of_several_is_not_the_best():
    metrics = frame(
        *(unpruned(name) for name in ("car", "chair", "(all)")),
        pruned("car"),
        pruned("chair", spread_ratio=0.0),
        pruned("(all)", spread_ratio=0.45),
    )
    told = finding(metrics)
    assert "under ours (prompt-specific) on chair: damage" in told
    assert "Best" not in told


def test_a_control_that_collapses_makes_no_mask_look_good():
    wrecked = [
        each | {"estimate": 0.0} if (each["strategy"], each["metric"]) == ("random", "spread_ratio") else each
        for each in pruned()
    ]
    told = finding(frame(unpruned(), wrecked))
    assert "Under every matched random control answers collapse" in told
    assert "Best" not in told


def test_a_chosen_thing_of_the_grid_is_crossed_out_where_answers_collapse():
    def point(tau, spread, smd):
        place = {
            "model": "tiny",
            "scenario": "purchase",
            "strategy": "wanda",
            "variation": "car",
            "tau_min": tau,
            "tau_maj": tau,
            "density": 0.1,
            "pareto": False,
            "chosen": False,
        }
        return [
            place | {"metric": name, "estimate": value, "low": value, "high": value}
            for name, value in (("abs_smd", smd), ("inlier_ratio", 0.9), ("spread_ratio", spread))
        ]

    figure = grid_heat_maps(pl.DataFrame(point(0.1, 0.0, 0.0) + point(0.2, 0.8, 0.5)))
    panels = [axes for axes in figure.axes if axes.get_xlabel()]
    assert [sum(line.get_marker() == "X" for line in axes.lines) for axes in panels] == [1, 1, 1]
    assert "cross: answers collapsed" in figure.get_suptitle()


# ------------------------------------------------------------------------------------------------- the same thresholds


@pytest.mark.trial(15)
def test_toxicity_findings_name_the_budget_of_the_audit():
    metrics = axis(ratio=1.15)
    assert "No mask keeps perplexity within 5 %" in toxicity_finding(metrics, perplexity_budget=0.05)
    told = toxicity_finding(metrics, perplexity_budget=0.2)
    assert "Of the masks that cost at most 20 % of perplexity" in told
    assert "1.1 " not in told
    assert "tenth" not in told


@pytest.mark.trial(15)
@pytest.mark.parametrize(("floor", "shown"), [(0.6, "0.60"), (0.965, "0.965"), (0.0, "0.00")])
def test_findings_and_figures_name_the_floor_of_the_audit(floor, shown):
    metrics = frame(unpruned(), pruned())
    told = finding(metrics, inlier_floor=floor)
    assert f"floor {shown}" in told or f"floor of {shown}" in told
    assert not re.search(r"floor (of )?0\.[89]0", told)
    assert f"floor of the inlier ratio, {shown}" in legend(bias_by_level(metrics, inlier_floor=floor))
    notes = [text.get_text() for text in disparity_by_level(metrics, inlier_floor=floor).axes[-1].texts]
    assert notes == [f"floor {shown}"]


def test_how_far_inlier_ratios_may_be_apart_is_a_setting_too():
    metrics = frame(unpruned(), pruned(inlier_ratio=0.7))
    assert "comparable to random's" in finding(metrics, inlier_floor=0.5, inlier_tolerance=0.1)
    assert "Best prompt-specific" in finding(metrics, inlier_floor=0.5, inlier_tolerance=0.25)  # .95 - .7 is .25
    assert "over 0.10 away" in terminal(metrics, inlier_tolerance=0.1)
    assert "*" not in terminal(metrics, inlier_tolerance=0.3)
    mask = Condition("ours", "prompt_specific")
    assert verdict(read_metrics(metrics), "car", mask, 0.1) == "no yardstick"
    assert verdict(read_metrics(metrics), "car", mask, 0.3) == "beats random"


def test_a_page_without_the_thresholds_of_its_audits_is_refused():
    metrics = frame(unpruned(), pruned())
    empty = pl.DataFrame()
    assert "at most 0.25 apart" in results_markdown(ResultFrames(metrics, *[empty] * 5, judged(tolerance=0.25)))
    with pytest.raises(ExciseError, match=r"tiny\|purchase, .*materialize evaluation_metrics"):
        results_markdown(ResultFrames(metrics, *[empty] * 5, judged(scenario="finance")))


# ---------------------------------------------------------------------------------------------- figures cut no interval


def segments(axes):
    """The straight pieces in a panel's own coordinates: bars of intervals, whatever they are drawn with."""
    for collection in axes.collections:
        if hasattr(collection, "get_segments"):
            yield from (part.tolist() for part in collection.get_segments())
    for line in axes.lines:
        if line.get_transform() == axes.transData and len(line.get_xdata()) == 2 and line.get_linestyle() == "-":
            yield line.get_xydata().tolist()


def cut_without_a_word(figure):
    """Ends of bars beyond their panel without a mark where they leave it."""
    missing = []
    for axes in figure.axes:
        marks = [
            (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
            for line in axes.lines
            if len(line.get_xdata()) == 1 and line.get_marker() in ("^", "v", "<", ">")
        ]
        limits = [sorted(axes.get_xlim()), sorted(axes.get_ylim())]
        for piece in segments(axes):
            for end in piece:
                edge = [min(max(value, low), high) for value, (low, high) in zip(end, limits, strict=True)]
                inside = all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(end, edge, strict=True))
                marked = any(math.dist(mark, edge) < 1e-6 for mark in marks)
                if not inside and not (marked and any("beyond the axis" in text for text in legend(figure))):
                    missing.append(end)
    return missing


def legend(figure):
    import matplotlib.legend

    return [text.get_text() for each in figure.findobj(matplotlib.legend.Legend) for text in each.get_texts()]


def wide(high):
    return frame(
        *(unpruned(name, smd=(0.2, -high, high), abs_smd=(0.2, 0.0, high)) for name in ("car", "chair", "(all)")),
        *(pruned(name, smd=(0.1, -2 * high, 3.0), gap_reduction=(0.3, -high * 5, 0.9)) for name in ("car", "(all)")),
    )


@pytest.mark.trial(37)
@pytest.mark.parametrize("high", [0.3, 0.89, 7.0, 4000.0])
@pytest.mark.parametrize("draw", [disparity_by_level, bias_by_level])
def test_every_end_of_an_interval_is_in_the_panel_or_marked(draw, high):
    assert cut_without_a_word(draw(wide(high))) == []


@pytest.mark.trial(37)
def test_an_interval_as_wide_as_four_estimates_is_not_cut_at_all():
    figure = disparity_by_level(frame(unpruned(smd=(0.2, -0.75, 0.75), abs_smd=(0.2, 0.0, 0.75))))
    assert figure.axes[0].get_ylim()[1] > 0.75
    assert not any("beyond the axis" in text for text in legend(figure))


@pytest.mark.trial(37)
@pytest.mark.parametrize("width", [0.1, 3.0, 900.0])
def test_trade_offs_and_sweeps_mark_what_they_cut(width):
    metrics = axis(reduction=(0.4, 0.4 - width, 0.4 + width), ratio=1.03)
    assert cut_without_a_word(trade_off(metrics)) == []
    assert cut_without_a_word(toxicity_by_subgroup(metrics)) == []
    points = pl.DataFrame(
        {
            "alpha": [0.0, 0.1, 0.2],
            "gamma": [None, 0.3, 0.3],
            "bias": [0.4, 0.3, 0.2],
            "bias_low": [0.4 - width] * 3,
            "bias_high": [0.4 + width] * 3,
            "perplexity_ratio": [1.0, 1.02, 1.2],
            "within_budget": [True, True, False],
            "pareto": [True, True, True],
            "chosen": [False, True, False],
        }
    )
    assert cut_without_a_word(gamma_sweep(points, budget=0.05)) == []
    grid = pl.DataFrame(
        [
            {
                "model": "tiny",
                "scenario": "purchase",
                "strategy": "wanda",
                "variation": "car",
                "tau_min": tau,
                "tau_maj": 0.1,
                "density": 0.1,
                "metric": name,
                "estimate": 0.4,
                "low": 0.0,
                "high": 0.4 + width,
                "pareto": tau == 0.2,
                "chosen": tau == 0.2,
            }
            for tau in (0.1, 0.2)
            for name in ("abs_smd", "inlier_ratio")
        ]
    )
    assert cut_without_a_word(grid_heat_maps(grid)) == []


def test_figures_mark_what_is_not_defined_instead_of_leaving_it_out():
    undefined = (math.inf, None, None)
    metrics = frame(unpruned("car"), unpruned("chair", smd=undefined, abs_smd=undefined), pruned("car"))
    for figure in (disparity_by_level(metrics), bias_by_level(metrics)):
        assert "not defined" in legend(figure)
        assert [line.get_marker() for line in figure.axes[0].lines].count("x") == 1
    missing = pl.concat([axis(), axis(reduction=(None, None, None), strategy="fasp-0.20")])
    assert "(not drawn: 1 without a defined figure)" in trade_off(missing).axes[0].get_title(loc="left")
    points = pl.DataFrame(
        {
            "alpha": [0.1, 0.2],
            "gamma": [0.3, 0.3],
            "bias": [0.4, math.nan],
            "perplexity_ratio": [1.0, 1.0],
            "within_budget": [True, True],
            "pareto": [True, False],
            "chosen": [True, False],
        }
    )
    assert "not drawn: 1 point without a defined figure" in gamma_sweep(points).get_suptitle()


# ------------------------------------------------------------------------------------------------- what a p-value tests


@pytest.mark.trial(38)
def test_p_values_stand_in_the_column_of_what_they_test():
    metrics = frame(
        [row("car", UNPRUNED, "gap_mean", 2.27, -2.97, 7.5, p_value=0.4), row("car", UNPRUNED, "smd", 0.1, -0.1, 0.3)],
        [row("car", OURS, "gap_mean", 9.0, 5.0, 13.0, p_value=0.002)],
    )
    lines = [line.split(" | ") for line in markdown_table(metrics).splitlines() if line.startswith("|")]
    no_gap, change = (lines[0].index(name) for name in ("p (no gap)", "p (gap as unpruned)"))
    assert [(line[no_gap], line[change]) for line in lines[2:]] == [("0.400", "-"), ("-", "0.002")]
    text = terminal(metrics)
    for label, shown in (("unpruned", "0.400 -"), ("ours", "- 0.002")):
        line = next(line for line in text.splitlines() if line.split()[:1] == [label])
        assert f"] {shown} " in " ".join(line.split())
    for told in (text, markdown_table(metrics)):
        note = " ".join(told.split())
        assert "p (no gap): test that the groups' means are alike, in the unpruned model" in note
        assert "p (gap as unpruned): test that a mask leaves the raw gap as it was" in note


# ----------------------------------------------------------------------------------------------------------- few names


@pytest.mark.trial(39)
def test_an_interval_from_few_names_carries_a_warning_everywhere():
    def of(names):
        every = [*unpruned("car"), *pruned("car")]
        return frame([each | {"names": names} for each in every])

    for names, warned in ((2, True), (4, True), (5, False), (None, False)):
        metrics = of(names)
        warning = f"An interval from {names} names a group says little"
        assert (warning in finding(metrics)) is warned
        for table in (terminal(metrics), markdown_table(metrics)):
            assert ("200 [150, 250]†" in table) is warned
            assert (f"† {warning}" in " ".join(table.split())) is warned
        for figure in (disparity_by_level(metrics), bias_by_level(metrics)):
            title = figure.legends[0].get_title().get_text()
            assert (f"from {names} names a group" in title) is warned
        page = results_markdown(ResultFrames(metrics, *[pl.DataFrame()] * 5, judged()))
        assert (f"† {warning}" in page) is warned
        assert (f"interval from {names} descriptors a subgroup" in toxicity_finding(axis(names=names))) is warned


# ---------------------------------------------------------------------------------- no gap detectable, gaps that cancel


@pytest.mark.trial(44)
def test_what_is_not_excluded_is_told_where_no_gap_is_detectable():
    metrics = frame(unpruned(gap_mean=(1.0, -7.0, 5.0), smd=(0.02, -0.09, 0.06)), pruned())
    told = finding(metrics)
    assert told.startswith("No gap detectable: ")
    assert "up to 7.00 (0.09 SMD) is not excluded" in told
    assert "nothing to reduce" not in told
    every = [unpruned(name, gap_mean=(1.0, -7.0, 5.0), smd=(0.02, -0.09, 0.06)) for name in ("car", "chair", "(all)")]
    assert "up to 0.09 SMD is not excluded" in finding(frame(*every))


@pytest.mark.trial(44)
def test_no_bias_detectable_says_how_much_is_not_excluded():
    told = toxicity_finding(axis(covered=1.0, debiased=(0.01, 0.0, 0.06)))
    assert "No bias detectable; up to 0.060 is not excluded" in told
    assert "changes the bias" not in told
    overdone = toxicity_finding(axis(covered=1.0, debiased=(-0.2, -0.6, -0.1)))
    assert "No bias detectable; up to 0.300 is not excluded" in overdone  # as far as the bias itself may go


def cancelling(**overall):
    return [
        unpruned("car", gap_mean=(900.0, 600.0, 1200.0), smd=(0.8, 0.5, 1.1)),
        unpruned("chair", gap_mean=(-9.0, -14.0, -4.0), smd=(-0.7, -1.0, -0.4)),
        unpruned("oven", gap_mean=(1.0, -5.0, 7.0), smd=(0.01, -0.2, 0.2)),
        unpruned(
            "(all)", smd=(0.04, -0.2, 0.3), abs_smd=(0.5, 0.3, 0.8), abs_gap_mean=(303.0, 200.0, 400.0), **overall
        ),
    ]


@pytest.mark.trial(45)
def test_gaps_that_cancel_are_named_and_their_mean_size_is_told():
    metrics = frame(*cancelling(gap_mean=(297.0, -100.0, 600.0)))
    told = finding(metrics)
    assert "No gap detectable on average, as gaps of opposite sign cancel" in told
    assert "car (SMD 0.80 [0.50, 1.10]) and chair (SMD -0.70 [-1.00, -0.40]) stand out" in told
    assert "the mean absolute gap is 0.50 [0.30, 0.80] (SMD) and 303 [200, 400] (raw gap)" in told
    assert "nothing to reduce" not in told
    assert "303" in terminal(metrics).split("All 3 variations together")[1]
    lines = [line.split(" | ") for line in markdown_table(metrics).splitlines() if line.startswith("|")]
    column = lines[0].index("mean absolute gap")
    assert next(line[column] for line in lines if line[0] == "| (all)") == "303 [200, 400]"


@pytest.mark.trial(45)
def test_a_variation_that_its_test_rejects_stands_out_too():
    rejected = [
        each | {"p_holm": 0.004} if (each["variation"], each["metric"]) == ("oven", "gap_mean") else each
        for each in [*unpruned("oven", gap_mean=(1.0, -0.1, 7.0)), *unpruned("car", gap_mean=(0.0, -1.0, 1.0))]
    ]
    overall = unpruned("(all)", smd=(0.04, -0.2, 0.3))
    told = finding(frame(rejected, overall))
    assert "No gap detectable on average: " in told
    assert "Taken singly, oven (SMD 1.20 [0.90, 1.50], p = 0.004) stands out" in told
    mask = pruned("(all)", gap_reduction=(None, None, None), reduction_over_random=(None, None, None))
    nothing = [each for each in mask if each["strategy"] != "random"]
    table = read_metrics(frame(rejected, overall, nothing))
    assert verdict(table, "(all)", Condition("ours", "prompt_specific")) == "no gap on average"


# ----------------------------------------------------------------------------------- other claims that would not follow


def test_interval_and_test_that_disagree_are_told_as_open():
    def with_p(p, gap):
        every = [each | {"p_value": p} if each["metric"] == "gap_mean" else each for each in unpruned(gap_mean=gap)]
        return finding(frame(every))

    assert "open: the unpruned raw gap is 0.485 [0.370, 0.600], but the test of no gap does not reject (p = 0.330)" in (
        with_p(0.33, (0.485, 0.37, 0.60))
    )
    assert "which covers 0, though the test of no gap rejects (p < 0.001). So is any reduction of it." in (
        with_p(0.0004, (1.0, -0.1, 2.1))
    )


def test_a_gap_of_exactly_0_and_one_without_names_to_draw_are_told_as_such():
    same = unpruned(gap_mean=(0.0, 0.0, 0.0), smd=(0.0, 0.0, 0.0))
    assert finding(frame(same)) == "No gap: the unpruned raw gap is 0 [0, 0], whatever names are drawn."
    alone = [each | {"names": 1} for each in unpruned(gap_mean=(200.0, None, None))]
    assert finding(frame(alone)).endswith("gap is 200 and has no interval, as a group has one name.")


def test_many_undefined_variations_are_counted():
    none = (None, None, None)
    every = [unpruned(f"thing {n}", smd=none) for n in range(9)]
    told = finding(frame(*every, unpruned("(all)", smd=none)))
    assert told.count("SMD is undefined on thing") == 2
    assert "So it is on 7 more variations." in told


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"gap_reduction": (-0.3, -0.5, -0.1)}, "its own reduction is -30 %"),
        ({"gap_reduction": (0.1, -0.5, 0.7)}, "it only harms less than random pruning"),
        ({"gap_reduction": (0.999, 0.99, 1.0)}, "removes 99.9 % of the raw gap"),
        ({"gap_reduction": (1.0, 0.99, 1.0)}, "removes 100 % of the raw gap"),
        ({"inlier_ratio": 0.9996}, "at inlier ratio 0.9996"),
        ({"spread_ratio": 0.44}, "with 0.44 of the spread within the groups"),
        (
            {
                "gap_mean": (None, None, None),
                "gap_reduction": (None, None, None),
                "reduction_over_random": (None, None, None),
            },
            "do enough answers hold a value",
        ),
        ({"reduction_over_random": (None, None, None)}, "No reduction over random is defined"),
    ],
)
def test_the_best_strategy_is_told_as_its_figures_allow(change, claim):
    told = finding(frame(unpruned(), pruned(**change)))
    assert claim in told


def test_verdicts_do_not_call_a_widened_gap_a_win():
    widened = frame(unpruned(), pruned(gap_reduction=(-0.3, -0.5, -0.1)))
    assert verdict(read_metrics(widened), "car", Condition("ours", "prompt_specific")) == "no reduction"


@pytest.mark.parametrize(
    ("options", "claim", "never"),
    [
        ({"reduction": (-0.2, -0.3, -0.1)}, "changes the bias by +20 % [10, 30]", "a result"),
        ({"beyond": (None, None, None)}, "it was not held against random heads, this is a lead", "Beyond what"),
        ({"beyond": (-0.1, -0.3, 0.1)}, "is -10 [-30, 10] percentage points", "more than"),
        ({"ratio": None}, "Perplexity under the masks is unknown", "changes the bias"),
        ({"reduction": (None, None, None)}, "No reduction of the bias is defined", "changes the bias"),
        ({"spread": 0.0}, "all scores of a subgroup are alike", "changes the bias"),
        ({"p": 0.00004}, "(p < 0.001)", "0.000)"),
    ],
)
def test_toxicity_findings_follow_from_the_figures(options, claim, never):
    told = toxicity_finding(axis(**options))
    assert claim in told
    assert never not in told


def axis(
    reduction=(0.4, 0.2, 0.6),
    beyond=(0.3, 0.1, 0.5),
    ratio=1.03,
    covered=0.0,
    debiased=(0.15, 0.02, 0.25),
    spread=0.9,
    p=0.01,
    names=16,
    strategy="fasp-0.10",
):
    """The metrics of an axis of social groups with one strategy."""
    fasp, control = (strategy, "own_scenario", None), ("random", "own_scenario", strategy)
    ends = (None, None) if ratio is None else (ratio - 0.01, ratio + 0.01)
    every = [
        *rows(
            "(all)",
            UNPRUNED,
            toxicity_bias_debiased=debiased,
            toxicity_bias_if_equal=(0.08, 0.03, 0.12),
            all_equal_covered=covered,
            perplexity_ratio=1.0,
        ),
        row("(all)", UNPRUNED, "toxicity_bias", 0.2, 0.1, 0.3, p_value=p),
        row("(all)", UNPRUNED, "mean_toxicity/women", 0.2, 0.1, 0.3),
        *rows(
            "(all)",
            fasp,
            toxicity_bias=0.12,
            bias_reduction=reduction,
            reduction_over_random=beyond,
            perplexity_ratio=(ratio, *ends),
            spread_ratio=spread,
        ),
        *rows("(all)", control, toxicity_bias=0.18, bias_reduction=(0.1, -0.1, 0.3), perplexity_ratio=1.02),
    ]
    return frame([each | {"names": names} for each in every])


def test_toxicity_tables_name_what_p_tests_and_what_collapsed():
    for told in (toxicity_table(axis(spread=0.0)), toxicity_markdown(axis(spread=0.0))):
        assert "p (labels do not matter)" in told
        assert "collapsed: all scores of a subgroup are alike" in told
        assert "40 %" not in told
