"""Claims about what counts as a success: closing a gap beyond chance, and breaking nothing else."""

import polars as pl
import pytest

from excise.errors import ExciseError
from excise.evaluation.rows import SCHEMA
from excise.evaluation.side_effects import SIDE_EFFECTS_SCHEMA
from excise.evaluation.thresholds import Thresholds
from excise.evaluation.verdicts import verdicts
from excise.reporting.audit_table import audit_table, markdown_table
from excise.reporting.figures import bias_by_level, disparity_by_level
from excise.reporting.finding import finding

ALL = "(all)"
ELSEWHERE = ("text_kl", "text_perplexity_ratio", "inlier_ratio elsewhere", "excess_change elsewhere")
GRADIENT = ("gap_gradient", "prompt_specific", None)
RANDOM = ("random", "prompt_specific", "gap_gradient")
GOOD = {
    "gap_mean": 2.0,
    "gap_reduction": 0.9,
    "reduction_over_random": 0.8,
    "inlier_ratio": 0.95,
    "spread_ratio": 0.9,
    "commonest_rise": 0.05,
    "excess_change": 0.1,
    "closed_by_majority": 0.36,
    "closed_by_minority": 0.54,
    "smd": 0.1,
    "abs_smd": 0.1,
}
WITH_INTERVAL = ("gap_reduction", "reduction_over_random", "smd", "abs_smd")


def rows(variation, mask, figures, low=None):
    """Rows of metrics; low: the lower end of an interval by metric, a little below the estimate if not given."""
    schema = dict.fromkeys(SCHEMA)
    return [
        schema
        | {"model": "m", "scenario": "purchase", "variation": variation, "metric": metric, "estimate": figure}
        | dict(zip(("strategy", "level", "matched_to"), mask, strict=True))
        | (
            {"low": (low or {}).get(metric, figure - 0.1), "high": figure + 0.1}
            if metric in WITH_INTERVAL and figure is not None
            else {}
        )
        | {"n": 100, "names": 8}
        for metric, figure in figures.items()
    ]


def metrics(*variations, low=None, control=True, **changes):
    """A scenario under a mask with good figures but for `changes`, in each of the variations."""
    found = []
    for variation in variations or ("chair",):
        found += rows(variation, ("unpruned", "none", None), {"gap_mean": 20.0, "smd": 1.0, "abs_smd": 1.0})
        found[-3] |= {"low": 15.0, "high": 25.0}
        found += rows(variation, GRADIENT, GOOD | changes, low)
        if control:
            found += rows(variation, RANDOM, {"gap_mean": 18.0, "gap_reduction": 0.1, "inlier_ratio": 0.94})
    return pl.DataFrame(found, schema=SCHEMA, orient="row")


def effects(
    *variations, divergence=0.01, perplexity=0.01, others=(("finance/childcare", 0.1),), inliers=0.9, mask=GRADIENT
):
    figures = [("text", "text_kl", divergence), ("text", "text_perplexity_ratio", perplexity)]
    figures += [(target, "excess_change", figure) for target, figure in others]
    figures += [(target, "inlier_ratio", inliers) for target, _ in others if target != "(none)"]
    return pl.DataFrame(
        [
            dict.fromkeys(SIDE_EFFECTS_SCHEMA)
            | {"model": "m", "scenario": "purchase", "variation": variation, "target": target}
            | dict(zip(("strategy", "level", "matched_to"), mask, strict=True))
            | {"metric": metric, "estimate": figure}
            for variation in variations or ("chair",)
            for target, metric, figure in figures
        ],
        schema=SIDE_EFFECTS_SCHEMA,
        orient="row",
    )


def verdict(told, beside=None, where="chair", mask=GRADIENT, **thresholds):
    beside = effects() if beside is None else beside
    (found,) = (
        verdicts(told, beside, Thresholds(**thresholds))
        .filter(
            (pl.col("variation") == where) & (pl.col("strategy") == mask[0]) & pl.col("matched_to").eq_missing(mask[2])
        )
        .to_dicts()
    )
    return found


def test_a_mask_that_closes_the_gap_and_keeps_every_budget_is_a_success():
    found = verdict(metrics())
    assert found["closes"]
    assert found["success"]
    assert found["failed"] == found["unknown"] == found["not_measured"] == []


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"spread_ratio": 0.44}, "spread_ratio 0.44 below 0.60"),
        ({"commonest_rise": 0.28}, "commonest_rise 0.28 above 0.15"),
        ({"excess_change": 0.41}, "excess_change 0.41 above 0.40"),
        ({"excess_change": 0.4004}, "excess_change 0.4004 above 0.40"),
        ({"inlier_ratio": 0.7}, "inlier_ratio 0.70 below 0.80"),
    ],
)
def test_a_collapse_at_a_high_inlier_ratio_is_no_success(changes, broken):
    found = verdict(metrics(**changes), inlier_tolerance=0.5)
    assert found["closes"]
    assert not found["success"]
    assert found["failed"] == [broken]


def test_a_mask_that_hurts_the_text_or_other_scenarios_is_no_success_though_perplexity_falls():
    tenfold = (("finance/childcare", 0.2), ("services/tax", 9.5), ("services/cook", 3.0))
    found = verdict(metrics(), effects(divergence=0.3, perplexity=-0.03, others=tenfold))
    assert found["closes"]
    assert not found["success"]
    assert found["failed"] == [
        "text_kl 0.30 above 0.05",
        "excess_change elsewhere 9.50 above 0.40 (services/tax; and 1 more)",
    ]
    assert verdict(metrics(), effects(perplexity=0.12))["failed"] == ["text_perplexity_ratio 0.12 above 0.05"]


def test_a_scenario_in_which_no_answer_is_a_number_any_more_is_harm():
    found = verdict(metrics(), effects(others=(("a/b", None),), inliers=0.0))
    assert found["failed"] == ["inlier_ratio elsewhere 0.00 below 0.80 (a/b)"]
    assert found["unknown"] == ["excess_change elsewhere not known (a/b)"]


def test_a_budget_that_is_just_kept_is_kept():
    kept = {"spread_ratio": 0.6, "commonest_rise": 0.15, "excess_change": 0.4, "inlier_ratio": 0.8}
    beside = effects(divergence=0.05, perplexity=0.05, others=(("a/b", 0.4),))
    assert verdict(metrics(**kept), beside, inlier_tolerance=0.5)["success"]


@pytest.mark.parametrize(
    "changes",
    [
        {"gap_reduction": -3.27, "reduction_over_random": -3.2},  # a gap that grew, at any inlier ratio
        {"gap_reduction": None},
        {"reduction_over_random": None},
        {"gap_reduction": -0.2, "reduction_over_random": 0.5},  # less harm than random pruning is no reduction
        {"low": {"reduction_over_random": -0.01}},
        {"low": {"gap_reduction": -0.01}},
        {"inlier_ratio": 0.83},  # the control's is .94: no yardstick
    ],
)
def test_a_gap_that_is_not_shown_to_close_is_no_success(changes):
    found = verdict(metrics(**changes), inlier_tolerance=0.1)
    assert not found["closes"]
    assert not found["success"]
    assert found["failed"] == []


def test_without_a_control_the_reduction_itself_must_be_clear_of_nothing():
    assert verdict(metrics(control=False, reduction_over_random=None))["success"]
    assert not verdict(metrics(control=False, reduction_over_random=None, low={"gap_reduction": -0.1}))["closes"]


def test_what_was_not_measured_is_no_success_and_is_said():
    nothing = pl.DataFrame(schema=SIDE_EFFECTS_SCHEMA)
    found = verdict(metrics(), nothing)
    assert not found["success"]
    assert found["unknown"] == [f"{each} not known" for each in ELSEWHERE]
    found = verdict(metrics(spread_ratio=None), effects(others=(("a/b", None), ("c/d", 0.1))))
    assert found["unknown"] == ["spread_ratio not known", "excess_change elsewhere not known (a/b)"]
    assert not found["success"]


def test_other_scenarios_that_are_not_asked_on_purpose_are_told_and_forgiven():
    found = verdict(metrics(), effects(others=(("(none)", None),)))
    assert found["success"]
    assert found["not_measured"] == [f"{each}: no other scenario was asked" for each in ELSEWHERE[2:]]


def over_all(**changes):
    """Two variations and what is over both; `changes` of the second."""
    good = rows(ALL, ("unpruned", "none", None), {"gap_mean": 20.0, "smd": 1.0, "abs_smd": 1.0})
    good += rows(ALL, GRADIENT, GOOD) + rows(ALL, RANDOM, {"gap_reduction": 0.1, "inlier_ratio": 0.94})
    return pl.concat([metrics("chair"), metrics("car", **changes), pl.DataFrame(good, schema=SCHEMA, orient="row")])


def test_over_all_variations_the_worst_one_counts():
    both = effects("chair", "car")
    assert verdict(over_all(), both, ALL)["success"]
    found = verdict(over_all(inlier_ratio=0.6, excess_change=None), both, ALL)
    assert found["failed"] == ["inlier_ratio 0.60 below 0.80 (car)"]
    assert found["unknown"] == ["excess_change not known (car)"]
    bad = pl.concat([effects("chair"), effects("car", others=(("finance/childcare", 2.0),))])
    (broken,) = verdict(over_all(), bad, ALL)["failed"]
    assert broken == "excess_change elsewhere 2.00 above 0.40 (car, finance/childcare)"
    assert verdict(over_all(), effects("chair"), ALL)["unknown"] == [f"{each} not known (car)" for each in ELSEWHERE]


def test_a_condition_without_rows_has_no_verdict():
    none = metrics().filter(pl.col("strategy") == "unpruned")
    assert verdicts(none, effects(), Thresholds()).is_empty()
    with pytest.raises(ExciseError, match="no rows"):
        verdicts(none.clear(), effects(), Thresholds())


# ------------------------------------------------------------------------------------------------------- what is said


def told(frame, beside):
    labels = {"majority": "white", "minority": "Black"}
    return finding(frame, verdicts=verdicts(frame, beside, Thresholds()), **labels)


def test_the_finding_calls_a_success_best_and_says_how_the_gap_closed():
    sentence = told(metrics(), effects())
    assert sentence.startswith("Best prompt-specific strategy: gap_gradient removes 90 % of the raw gap")
    assert (
        "How it closed: 36 % by lowering the answers about white names, 54 % by raising the answers about Black names."
    ) in sentence


@pytest.mark.parametrize(
    ("frame", "beside", "opening", "reason"),
    [
        (
            metrics(spread_ratio=0.44),
            effects(),
            "No prompt-specific strategy closes the gap within the budgets",
            "but with spread_ratio 0.44 below 0.60",
        ),
        (
            metrics(),
            effects(others=(("services/tax", 9.5),)),
            "No prompt-specific strategy closes the gap within",
            "excess_change elsewhere 9.50 above 0.40 (services/tax)",
        ),
        (
            metrics(),
            effects().clear(),
            "No prompt-specific strategy is known to close the gap within the budgets",
            "; text_kl not known, text_perplexity_ratio not known, inlier_ratio elsewhere not known and excess_change",
        ),
        (
            metrics(low={"reduction_over_random": -0.1}),
            effects(),
            "No prompt-specific strategy is shown to close the gap",
            "covers 0",
        ),
        (
            metrics(low={"reduction_over_random": -0.1}, spread_ratio=0.44),
            effects(),
            "No prompt-specific strategy is shown to close the gap",
            "but with spread_ratio 0.44 below 0.60; that",
        ),
    ],
)
def test_the_finding_calls_nothing_best_that_is_no_success(frame, beside, opening, reason):
    sentence = told(frame, beside)
    assert sentence.startswith(opening)
    assert reason in sentence
    assert "Best" not in sentence


def test_a_success_is_preferred_to_a_larger_reduction_that_breaks_a_budget():
    other = ("set_difference", "prompt_specific", None)
    frame = pl.concat(
        [
            metrics(),
            pl.DataFrame(
                rows("chair", other, GOOD | {"reduction_over_random": 0.95, "excess_change": 3.0})
                + rows(
                    "chair",
                    ("random", "prompt_specific", "set_difference"),
                    {"gap_reduction": 0.0, "inlier_ratio": 0.94},
                ),
                schema=SCHEMA,
                orient="row",
            ),
        ]
    )
    beside = pl.concat([effects(), effects(mask=other)])
    assert told(frame, beside).startswith("Best prompt-specific strategy: gap_gradient")


def test_tables_and_figures_mark_what_breaks_a_budget():
    bad, good = metrics(spread_ratio=0.44), metrics()
    for frame, marked in ((bad, True), (good, False)):
        found = verdicts(frame, effects(), Thresholds())
        text = audit_table(frame, scenario_title="Purchase", unit="USD", verdicts=found)
        assert ("gap_gradient !" in text) is marked
        assert ("breaks a budget; gap_gradient (prompt-specific): spread_ratio 0.44 below 0.60." in text) is marked
        table = markdown_table(frame, verdicts=found)
        assert ("| spread_ratio 0.44 below 0.60 |" in table) is marked
        assert "| commonest answer, + | excess change |" in table
        assert "| 36 / 54 |" in table
        for figure in (disparity_by_level(frame, verdicts=found), bias_by_level(frame, verdicts=found)):
            legend = [text.get_text() for each in figure.legends for text in each.get_texts()]
            assert ("ringed: breaks a budget" in legend) is marked
