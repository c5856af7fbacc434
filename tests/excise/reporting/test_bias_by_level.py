"""Claims about the figure of generality: every level beside its control, with intervals, means and the floor."""

from __future__ import annotations

import polars
import pytest

from excise.errors import ExciseError
from excise.reporting.figures import PNG_BYTES, bias_by_level, save
from excise.reporting.figures.canvas import INTERVAL

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")

LEVELS = ("prompt_specific", "within_context", "cross_context")
SMD = {"prompt_specific": 0.1, "within_context": -0.3, "cross_context": 0.5}


def metrics(variations=("chair", "car"), strategies=("gap_gradient",), levels=(*LEVELS, "cross_context/finance")):
    """Unpruned 0.9, controls 0.7, the levels as in SMD; over all variations everything is 0.01 higher."""
    rows = []

    def add(variation, strategy, level, matched_to, smd, inliers):
        more = 0.01 if variation == "(all)" else 0.0
        for metric, value in (("abs_smd", abs(smd) + more), ("smd", smd + more), ("inlier_ratio", inliers)):
            key = ("planted", "purchase", variation, strategy, level, matched_to, metric)
            rows.append((*key, value, value - 0.02, value + 0.02, None, None))

    for variation in (*variations, "(all)"):
        add(variation, "unpruned", "none", None, 0.9, 0.95)
        for strategy in strategies:
            for level in levels:
                add(variation, strategy, level, None, SMD.get(level, 5.0), 0.93)
                add(variation, "random", level, strategy, 0.7, 0.8)
    schema = dict.fromkeys(
        ("model", "scenario", "variation", "strategy", "level", "matched_to", "metric"), polars.String
    ) | dict.fromkeys(("estimate", "low", "high", "p_value", "p_holm"), polars.Float64)
    return polars.DataFrame(rows, schema=schema, orient="row")


def heights(axes, dashed):
    """Where a panel has lines across, dashed ones or solid ones."""
    across = [line for line in axes.lines if len(line.get_ydata()) == 2 and len(set(line.get_ydata())) == 1]
    return sorted(round(line.get_ydata()[0], 6) for line in across if (line.get_linestyle() == "--") == dashed)


def marks(axes):
    return sorted(round(line.get_ydata()[0], 6) for line in axes.lines if len(line.get_ydata()) == 1)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_each_strategy_has_disparity_signed_disparity_and_inlier_ratio_below_each_other(tmp_path):
    figure = bias_by_level(metrics(strategies=("gap_gradient", "wanda")), majority="white", minority="Black")
    assert [axes.get_ylabel().split("\n") for axes in figure.axes[:3]] == [
        ["|SMD|"],
        ["SMD", "+: white more", "−: Black more"],
        ["inlier ratio"],
    ]
    assert [room.get_suptitle() for room in figure.subfigs] == ["gap_gradient", "wanda"]
    assert len(figure.axes) == 6
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["chair", "car", "mean"]
    assert legend(figure) == [
        "unpruned",
        "prompt-specific",
        "within-context",
        "cross-context",
        "random control of the mark to its left",
        "floor of the inlier ratio, 0.80",
    ]
    assert len(save(figure, tmp_path / "levels").png) < PNG_BYTES


def test_every_level_and_its_control_is_marked_with_its_interval_and_single_sources_are_not():
    absolute, signed, inliers = bias_by_level(metrics()).axes
    assert marks(signed) == sorted(2 * [0.9, 0.1, -0.3, 0.5, 0.7, 0.7, 0.7] + [0.91, 0.11, -0.29, 0.51] + 3 * [0.71])
    assert marks(absolute)[-4:] == [0.71, 0.9, 0.9, 0.91]
    assert marks(inliers) == sorted(9 * [0.8] + 9 * [0.93] + 3 * [0.95])
    drawn = [line.get_ydata() for line in signed.lines if line.get_label() == INTERVAL]
    bars = {tuple(round(float(end), 6) for end in ends) for ends in drawn}
    assert {(0.88, 0.92), (-0.32, -0.28), (0.68, 0.72)} < bars
    hollow = [line for line in signed.lines if line.get_markerfacecolor() == "white"]
    assert sorted({round(line.get_ydata()[0], 6) for line in hollow}) == [0.7, 0.71]


def test_dashed_lines_are_the_estimated_means_over_variations():
    absolute, signed, inliers = bias_by_level(metrics(), inlier_floor=0.85).axes
    assert heights(signed, dashed=True) == [-0.29, 0.11, 0.51, 0.91]
    assert heights(absolute, dashed=True) == [0.11, 0.31, 0.51, 0.91]
    assert heights(signed, dashed=False) == [0.0]
    assert heights(inliers, dashed=False) == [0.85]


def test_without_a_row_over_all_variations_the_means_are_those_of_the_marks():
    frame = (
        metrics()
        .filter(polars.col("variation") != "(all)")
        .with_columns(
            estimate=polars.when((polars.col("variation") == "car") & (polars.col("strategy") == "unpruned"))
            .then(polars.col("estimate") + 0.04)
            .otherwise("estimate")
        )
    )
    figure = bias_by_level(frame)
    assert heights(figure.axes[1], dashed=True) == [-0.3, 0.1, 0.5, 0.92]
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["chair", "car"]


def test_one_variation_has_no_means():
    figure = bias_by_level(metrics(("chess",), levels=("within_context",)))
    assert heights(figure.axes[1], dashed=True) == []
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["chess"]
    assert legend(figure)[:2] == ["unpruned", "within-context"]


def test_ten_variations_of_several_strategies_stay_small_and_share_their_scale(tmp_path):
    frame = metrics([f"the {number}th thing" for number in range(10)], ("a", "b", "c"))
    wide = polars.when((polars.col("strategy") == "b") & (polars.col("metric") == "smd"))
    figure = bias_by_level(frame.with_columns(estimate=wide.then(polars.col("estimate") * 3).otherwise("estimate")))
    assert len({axes.get_ylim() for axes in figure.axes[1::3]}) == 1
    assert len(save(figure, tmp_path / "levels").png) < PNG_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.clear(), "no rows"),
        (lambda frame: frame.drop("low"), "low are missing"),
        (lambda frame: frame.filter(polars.col("strategy") == "unpruned"), "no strategy at prompt_specific"),
        (lambda frame: frame.filter(polars.col("level") == "cross_context/finance"), "no strategy at prompt_specific"),
    ],
)
def test_nothing_to_draw_is_refused(change, message):
    with pytest.raises(ExciseError, match=message):
        bias_by_level(change(metrics()))
