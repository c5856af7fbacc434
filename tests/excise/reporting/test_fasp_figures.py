"""Claims about the figures of toxicity axes: what is drawn where, in which colour, and that it can be stored."""

import numpy as np
import polars as pl
import pytest
from matplotlib.colors import to_rgb

from excise.errors import ExciseError
from excise.evaluation.bias_correlation import gamma_choice, impact_correlations
from excise.reporting.figures import PNG_BYTES, gamma_sweep, head_kinds, head_map, impact_correlation, save, trade_off
from excise.reporting.figures.canvas import CUT, CUT_NOTE

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")


def stored(figure, folder) -> str:
    """The SVG's text, after both files are there and small enough."""
    saved = save(figure, folder / "figure")
    assert 5_000 < len(saved.png) < PNG_BYTES
    assert all(path.is_file() for path in saved.paths)
    return saved.svg_path.read_text()


def words(figure) -> str:
    import matplotlib.text

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


# Trade-off


def point(strategy, reduction, ratio, matched_to=None, scenario="gender", width=0.05, level="within_context"):
    return [
        (
            "m",
            scenario,
            "(all)",
            strategy,
            level,
            matched_to,
            metric,
            value,
            value and value - width,
            value and value + width,
        )
        for metric, value in (("bias_reduction", reduction), ("perplexity_ratio", ratio))
    ]


def metrics(*points) -> pl.DataFrame:
    columns = ("model", "scenario", "variation", "strategy", "level", "matched_to", "metric", "estimate", "low", "high")
    rows = [row for each in points for row in each]
    return pl.DataFrame(
        rows, schema=dict.fromkeys(columns[:7], pl.String) | dict.fromkeys(columns[7:], pl.Float64), orient="row"
    )


SOME = (
    point("fasp-0.10", 0.3, 1.05),
    point("fasp-0.02", 0.1, 1.01),
    point("magnitude-0.02", 0.05, 1.20),
    point("random", -0.02, 1.10, matched_to="fasp-0.10"),
    point("reversed", 0.9, 1.00, matched_to="fasp-0.10"),
    point("gap_gradient", 0.9, 1.00),
)


def lines(axes) -> list[list[tuple[float, float]]]:
    return [[(round(x, 6), round(y, 6)) for x, y in line.get_xydata()] for line in axes.get_lines()]


def test_every_ratio_of_a_method_is_drawn_at_its_changes_in_order(tmp_path):
    figure = trade_off(metrics(*SOME))
    (axes,) = figure.axes
    drawn = lines(axes)
    assert [(1.0, -10.0), (5.0, -30.0)] in drawn  # alpha .02 before .10
    assert [(20.0, -5.0)] in drawn
    assert [(10.0, 2.0)] in drawn  # the matched control
    assert [(0, 0)] in drawn  # unpruned
    assert [(5.0, -35.0), (5.0, -25.0)] in drawn  # a smaller reduction is the upper end of the change
    assert [(0.0, -30.0), (10.0, -30.0)] in drawn
    assert not any((0.0, -90.0) in line for line in drawn)  # other controls, and strategies without alpha
    text = stored(figure, tmp_path)
    for word in ("fasp", "magnitude", "random: as many heads", "unpruned", "Pareto front", "0.1"):
        assert word in words(figure)
        assert word.split(":")[0] in text
    assert "gap_gradient" not in words(figure)


def test_the_front_is_a_staircase_of_what_nothing_beats():
    (axes,) = trade_off(metrics(*SOME)).axes
    (front,) = (line for line in axes.get_lines() if line.get_drawstyle() == "steps-post")
    assert front.get_xydata().round(6).tolist() == [[0.0, 0.0], [1.0, -10.0], [5.0, -30.0]]


def test_every_axis_has_its_panel_and_large_changes_a_logarithmic_scale(tmp_path):
    far = metrics(*SOME, point("fairness_only-0.20", 0.5, 30.0, scenario="race"), point("fasp-0.20", 0.4, 1.1))
    figure = trade_off(far)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["gender", "race"]
    assert {axes.get_xscale() for axes in shown} == {"symlog"}
    assert shown[1].get_xlim()[1] > 2900
    stored(figure, tmp_path)
    (axes,) = trade_off(metrics(*SOME)).axes
    assert axes.get_xscale() == "linear"


def test_levels_of_one_axis_are_told_apart():
    figure = trade_off(metrics(*SOME, point("fasp-0.10", 0.1, 1.05, level="cross_context/race")))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["gender, within-context", "gender, cross-context/race"]


def test_a_wide_interval_leaves_the_panel_rather_than_squeezing_the_marks():
    (axes,) = trade_off(metrics(point("fasp-0.10", 0.3, 1.05, width=50.0))).axes
    low, high = axes.get_ylim()
    assert high - low < 300
    assert low < -30 < 0 < high
    cut = [line for line in axes.lines if line.get_label() == CUT]
    assert sorted(line.get_marker() for line in cut) == ["<", ">", "^", "v"]
    assert {float(line.get_ydata()[0]) for line in cut if line.get_marker() in "^v"} == {low, high}
    assert CUT_NOTE in words(axes.figure)


def test_points_lacking_a_figure_are_left_out_and_nothing_left_is_an_error():
    lacking = metrics(*SOME, point("fasp-0.20", None, 1.3), point("fasp-0.30", 0.5, None))
    (axes,) = trade_off(lacking).axes
    assert [(1.0, -10.0), (5.0, -30.0)] in lines(axes)
    for wrong, message in (
        (metrics(point("gap_gradient", 0.2, 1.1)), "no strategy like fasp-0.10"),
        (metrics(*SOME).filter(pl.col("metric") == "bias_reduction"), "no strategy like fasp-0.10"),
        (metrics(*SOME).drop("low"), "columns low are missing"),
        (metrics(*SOME).clear(), "no rows"),
        (pl.concat([metrics(*SOME), metrics(*SOME).with_columns(model=pl.lit("n"))]), "2 values of model"),
    ):
        with pytest.raises(ExciseError, match=message):
            trade_off(wrong)


# Gamma


def search(budget=0.05, **columns) -> pl.DataFrame:
    rows = [
        (0.0, None, 0.40, 1.00),
        (0.1, 0.3, 0.30, 1.04),
        (0.1, 0.5, 0.35, 1.02),
        (0.2, 0.3, 0.20, 1.20),
        (0.2, 0.5, 0.36, 1.03),
    ]
    frame = pl.DataFrame(rows, schema=["alpha", "gamma", "bias", "perplexity_ratio"], orient="row")
    return gamma_choice(frame.with_columns(**columns), budget)


def test_the_sweep_shows_points_front_budget_and_choice(tmp_path):
    from matplotlib.patches import Polygon, Rectangle

    figure = gamma_sweep(search(bias_low=pl.col("bias") - 0.02, bias_high=pl.col("bias") + 0.02), budget=0.05)
    bias, perplexity, scatter = figure.axes
    rows = [label.get_text() for label in bias.get_yticklabels()]
    assert rows == ["0.5", "0.3"]  # protection grows upwards
    for axes in (bias, perplexity):
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.2"]
        outlined = {tuple(np.floor(patch.get_xy()).astype(int)) for patch in axes.patches if type(patch) is Rectangle}
        assert outlined == {(0, 0), (0, 1), (1, 1)}
        beyond = [patch.get_xy().min(axis=0).astype(int).tolist() for patch in axes.patches if type(patch) is Polygon]
        assert beyond == [[1, 1]]
        (star,) = (line for line in axes.get_lines() if line.get_marker() == "*")
        assert np.floor(star.get_xydata()).tolist() == [[0, 1]]
    assert {text.get_text() for text in bias.texts} == {".300", ".350", ".200", ".360"}
    assert {text.get_text() for text in perplexity.texts} == {"2", "3", "4", "20"}
    drawn = lines(scatter)
    assert [(4.0, 0.3), (20.0, 0.2)] in drawn
    assert [(0.0, 0.4)] in drawn
    assert [(0.0, 0.4), (2.0, 0.35), (4.0, 0.3), (20.0, 0.2)] in drawn  # the front
    assert [(4.0, 0.28), (4.0, 0.32)] in drawn
    assert any(line[0][0] == 5.0 == line[1][0] for line in drawn if len(line) == 2)
    assert "alpha 0.1, gamma 0.3" in words(figure)
    assert "budget, 5 %" in stored(figure, tmp_path)


def test_a_sweep_without_a_choice_or_of_one_point_is_drawn(tmp_path):
    nothing = search(0.0).filter(pl.col("alpha") > 0)
    stored(gamma_sweep(gamma_choice(nothing, 0.0)), tmp_path)
    one = gamma_choice(search().head(1), 0.05)
    figure = gamma_sweep(one)
    assert len(figure.axes) == 1
    stored(figure, tmp_path)


def test_a_sweep_that_cannot_be_drawn_is_named():
    for wrong, message in (
        (search().drop("chosen"), "columns chosen are missing"),
        (pl.concat([search(), search()]), "is there twice"),
        (search().with_columns(bias=pl.lit(None, pl.Float64)), "no point has both"),
        (search(model=pl.Series(["m", "n", "m", "m", "m"])), "2 values of model"),
    ):
        with pytest.raises(ExciseError, match=message):
            gamma_sweep(wrong)


# Heads


def heads(scenario="gender", **columns) -> pl.DataFrame:
    """Two layers of three heads: harmful, weaker harmful, helpful | unclear, critical, unknown."""
    return pl.DataFrame(
        {
            "model": ["m"] * 6,
            "scenario": [scenario] * 6,
            "layer": [0, 0, 0, 1, 1, 1],
            "head": [0, 1, 2, 0, 1, 2],
            "perplexity_without": [20.0, 21.0, 20.0, 20.0, 90.0, 20.0],
            "z_bias": [0.10, 0.02, -0.05, 0.04, 3.0, None],
            "z_bias_low": [0.05, 0.01, -0.09, -0.01, 2.0, None],
            "z_bias_high": [0.15, 0.03, -0.01, 0.09, 4.0, None],
            **columns,
        }
    )


def test_heads_are_of_the_kind_their_interval_says():
    assert head_kinds(heads()) == ["harmful", "harmful", "helpful", "unclear", "critical", None]
    unsure = heads().with_columns(z_bias_low=pl.lit(None, pl.Float64), z_bias_high=pl.lit(None, pl.Float64))
    assert head_kinds(unsure) == ["unclear"] * 4 + ["critical", None]


def test_colours_tell_kind_and_size(tmp_path):
    from excise.reporting.figures.canvas import INK, palette

    blue, orange = palette(2)
    figure = head_map(heads())
    (axes,) = figure.axes
    picture = np.asarray(axes.images[0].get_array())
    assert picture[0, 0] == pytest.approx(orange, abs=0.02)  # the largest impact, the full colour
    assert np.abs(picture[0, 1] - orange).max() > 0.3  # weaker
    assert np.abs(picture[0, 2] - blue).max() < np.abs(picture[0, 2] - orange).max()
    assert picture[1, 1] == pytest.approx(to_rgb(INK))  # a critical head sets no scale
    assert picture[1, 0] == pytest.approx(to_rgb("#ececec"))
    assert picture[1, 2] == pytest.approx((1, 1, 1))
    (crosses,) = axes.get_lines()
    assert crosses.get_xydata().tolist() == [[1, 1]]
    assert "2 harmful, 1 helpful" in words(figure)
    assert "critical" in stored(figure, tmp_path)


def test_a_map_of_many_heads_and_axes_is_small_enough(tmp_path):
    rng = np.random.default_rng(0)
    z = rng.normal(size=1024) * 0.01
    large = pl.concat(
        [
            pl.DataFrame(
                {
                    "model": ["m"] * 1024,
                    "scenario": [name] * 1024,
                    "layer": np.arange(1024) // 32,
                    "head": np.arange(1024) % 32,
                    "perplexity_without": [20.0] * 1024,
                    "z_bias": z,
                    "z_bias_low": z - 0.01,
                    "z_bias_high": z + 0.01,
                }
            )
            for name in ("gender", "race")
        ]
    )
    figure = head_map(large)
    assert [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes] == ["gender", "race"]
    stored(figure, tmp_path)


def test_a_map_that_cannot_be_drawn_is_named():
    with pytest.raises(ExciseError, match="columns z_bias_low are missing"):
        head_map(heads().drop("z_bias_low"))
    with pytest.raises(ExciseError, match="there twice"):
        head_map(pl.concat([heads(), heads()]))


# Correlations


def correlations(names=("gender", "race", "religion"), n=60) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    base = rng.normal(size=n)
    return impact_correlations(
        pl.concat(
            [
                pl.DataFrame(
                    {
                        "model": ["m"] * n,
                        "scenario": [name] * n,
                        "layer": np.arange(n) // 6,
                        "head": np.arange(n) % 6,
                        "perplexity_without": [20.0] * n,
                        "z_ppl": rng.normal(size=n),
                        "z_bias": base + rng.normal(size=n),
                        "mean_without": -base,
                    }
                )
                for name in names
            ]
        ),
        resamples=40,
    )


def test_correlations_stand_in_both_halves_of_the_matrix(tmp_path):
    table = correlations()
    figure = impact_correlation(table)
    assert len(figure.axes) == 6
    first = figure.axes[0]
    values = first.collections[0].get_array().reshape(3, 5)
    known = table.filter((pl.col("heads") == "all") & (pl.col("statistic") == "pearson"))["estimate"].to_list()
    assert [values[0, 1], values[0, 2], values[1, 2]] == pytest.approx(known[:3])
    assert [values[1, 0], values[2, 0], values[2, 1]] == pytest.approx(known[:3])
    assert [values[0, 3], values[0, 4]] == pytest.approx(known[3:5])  # perplexity, mean toxicity
    assert figure.axes[2].collections[0].get_array().size == 9
    columns = [label.get_text() for label in figure.axes[3].get_xticklabels()]
    assert columns == ["gender", "race", "religion", "perplexity", "mean toxicity"]
    text = stored(figure, tmp_path)
    assert "without catastrophic heads" in text


def test_a_correlation_that_may_be_none_has_a_star():
    table = correlations()
    row = table.filter((pl.col("heads") == "all") & (pl.col("statistic") == "pearson")).row(3, named=True)
    assert row["other_measure"] == "z_ppl"
    texts = [text.get_text() for text in impact_correlation(table).axes[0].texts]
    written = next(text for text in texts if text.strip("*") == f"{row['estimate']:.2f}".replace("0.", ".", 1))
    assert written.endswith("*") == (row["low"] <= 0 <= row["high"])
    assert any(text.endswith("*") for text in texts)
    assert not all(text.endswith("*") for text in texts)


def test_one_axis_is_held_against_perplexity_alone(tmp_path):
    figure = impact_correlation(correlations(("gender",)))
    assert "none" in words(figure)  # no overlap with another axis
    stored(figure, tmp_path)
    with pytest.raises(ExciseError, match="columns heads are missing"):
        impact_correlation(correlations(("gender",)).drop("heads"))
