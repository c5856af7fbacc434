"""Claims about the heat maps: cells say what their rows say, chance and intervals are there, nothing is invented."""

from __future__ import annotations

import numpy as np
import polars
import pytest
from matplotlib.patches import Rectangle

from excise.errors import ExciseError
from excise.reporting.figures import (
    PNG_BYTES,
    grid_heat_maps,
    mask_distribution_heat_map,
    overlap_heat_map,
    save,
    transfer_heat_map,
)
from excise.reporting.figures.canvas import INTERVAL

pytestmark = pytest.mark.filterwarnings(
    "error::UserWarning", "error::RuntimeWarning", "ignore:The set_bad function:PendingDeprecationWarning"
)


def cells(axes):
    """The texts of a heat map, by (column, row)."""
    return {
        tuple(int(part) for part in text.get_position()): text.get_text()
        for text in axes.texts
        if text.get_transform() == axes.transData
    }


def ticks(labels):
    return [label.get_text() for label in labels]


# -------------------------------------------------------------------------------------------------------------- overlap


def overlaps(**changed):
    """Masks of chair and car in both scenarios against those of purchase; that of loan has no weights."""
    rows = []
    for scenario, variation, shares in (
        ("finance", "stocks", (0.20, 0.08)),
        ("purchase", "chair", (1.0, 0.5)),
        ("purchase", "car", (0.25, 1.0)),
        ("finance", "loan", (None, None)),
    ):
        for reference, share, chance in zip(("chair", "car"), shares, (0.05, 0.1), strict=True):
            excess = None if share is None else share - chance
            key = ("tiny", "wanda", "prompt_specific", scenario, variation, "purchase", reference)
            rows.append((*key, 1, 1, share, chance, excess))
    schema = dict.fromkeys(
        ("model", "strategy", "level", "scenario", "variation", "reference_scenario", "reference_variation"),
        polars.String,
    ) | {"shared": polars.Int64, "count": polars.Int64}
    schema |= dict.fromkeys(("overlap", "chance", "excess"), polars.Float64)
    return polars.DataFrame(rows, schema=schema, orient="row").with_columns(**changed)


def test_overlap_and_its_excess_stand_beside_each_other_with_the_chance_level_above(tmp_path):
    figure = overlap_heat_map(overlaps())
    left, right = figure.axes
    assert ticks(left.get_yticklabels()) == ["chair", "car", "stocks", "loan"]  # the reference scenario comes first
    assert ticks(left.get_xticklabels()) == ticks(right.get_xticklabels()) == ["chair", "car"]
    assert cells(left) == {(0, 0): "100", (1, 0): "50", (0, 1): "25", (1, 1): "100", (0, 2): "20", (1, 2): "8.0"}
    assert cells(right) == {(0, 0): "95", (1, 0): "40", (0, 1): "20", (1, 1): "90", (0, 2): "15", (1, 2): "-2.0"}
    (above,) = left.child_axes
    assert ticks(above.get_xticklabels()) == ["5.0", "10"]
    assert "chance level" in above.get_xlabel()
    assert [text.get_text() for text in left.texts if text.get_transform() != left.transData][-2:] == [
        "purchase",
        "finance",
    ]
    assert "grey: the row's mask is empty" in figure.get_suptitle()
    assert len(save(figure, tmp_path / "overlap").png) < PNG_BYTES


def test_a_mask_upon_itself_does_not_stretch_the_colours_and_excess_is_centred_at_0():
    left, right = overlap_heat_map(overlaps()).axes
    assert left.collections[0].get_clim() == (0.0, 0.5)
    assert right.collections[0].get_clim() == pytest.approx((-0.4, 0.4))


def test_thirty_masks_against_ten_stay_small(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        (
            "tiny",
            "wanda",
            "prompt_specific",
            f"scenario {number // 3}",
            f"a rather long variation, number {number}",
            "scenario 0",
            f"thing {reference}",
            share,
            0.05,
            share - 0.05,
        )
        for number in range(30)
        for reference in range(10)
        for share in [rng.random()]
    ]
    schema = [name for name in overlaps().columns if name not in ("shared", "count")]
    figure = overlap_heat_map(polars.DataFrame(rows, schema=schema, orient="row"))
    assert len(save(figure, tmp_path / "overlap").png) < PNG_BYTES


# --------------------------------------------------------------------------------------------------------- distribution


def distribution(pruned):
    """Two masks; `pruned` gives for each the counts [layer][q, down], of matrices of 100 and 300 weights."""
    rows = [
        ("tiny", "purchase", variation, "wanda", "prompt_specific", layer, role, count, size)
        for variation, layers in pruned.items()
        for layer, counts in enumerate(layers)
        for role, count, size in zip(("down", "q"), counts[::-1], (300, 100), strict=True)
    ]
    schema = ["model", "scenario", "variation", "strategy", "level", "layer", "role", "pruned", "size"]
    return polars.DataFrame(rows, schema=schema, orient="row")


def test_distribution_shows_the_share_of_each_matrix_and_each_layers_share_beside_chance(tmp_path):
    figure = mask_distribution_heat_map(distribution({"chair": [(10, 30), (0, 0)], "car": [(20, 0), (10, 10)]}))
    heat, side = figure.axes[:2]
    assert ticks(heat.get_xticklabels()) == ["q", "down"]
    assert cells(heat) == {(0, 0): "15", (1, 0): "5.0", (0, 1): "5.0", (1, 1): "1.7"}
    together, chance = side.lines
    assert together.get_xdata().tolist() == [75.0, 25.0]  # 60 and 20 of the 80 weights of both masks
    assert (chance.get_xdata().tolist(), chance.get_linestyle()) == ([50.0, 50.0], "--")
    extent = side.collections[0].get_paths()[0].get_extents()
    assert (extent.x0, extent.x1) == (0.0, 100.0)  # of chair all lie in layer 0, none in layer 1
    assert ticks(side.get_legend().get_texts()) == ["range of the masks", "all masks", "chance: the layer's size"]
    assert figure.get_suptitle().endswith("purchase, 2 masks, 5 % pruned")
    assert len(save(figure, tmp_path / "distribution").png) < PNG_BYTES


def test_one_mask_has_no_range_and_an_empty_one_says_so():
    _, side = mask_distribution_heat_map(distribution({"chair": [(1, 0), (0, 0)]})).axes[:2]
    assert ticks(side.get_legend().get_texts()) == ["the mask", "chance: the layer's size"]
    _, side = mask_distribution_heat_map(distribution({"chair": [(0, 0), (0, 0)]})).axes[:2]
    assert [text.get_text() for text in side.texts] == ["nothing pruned"]


def test_heads_and_eighty_layers_are_drawn_alike(tmp_path):
    frame = polars.DataFrame(
        [
            ("tiny", "purchase", "chair", "attention", "within_context", layer, "head_query", layer % 3, 64)
            for layer in range(80)
        ],
        schema=distribution({}).columns,
        orient="row",
    )
    figure = mask_distribution_heat_map(frame)
    assert ticks(figure.axes[0].get_xticklabels()) == ["head\nquery"]
    assert ticks(figure.axes[0].get_yticklabels())[:3] == ["0", "2", "4"]
    assert len(save(figure, tmp_path / "distribution").png) < PNG_BYTES


# ----------------------------------------------------------------------------------------------------------------- grid

POINTS = {  # (tau_min, tau_maj): |SMD|, inlier ratio, on the front, chosen
    (0.2, 0.2): (0.8, 0.95, True, False),
    (0.4, 0.2): (0.3, 0.90, True, True),
    (0.4, 0.4): (0.5, 0.85, False, False),
}


def grid(points=POINTS, variation="(all)"):
    rows = []
    for (first, second), (smd, inliers, front, chosen) in points.items():
        for metric, value in (("abs_smd", smd), ("inlier_ratio", inliers), ("gap_mean", 30.0)):
            bounds = (None, None) if value is None else (value - 0.05, value + 0.05)
            point = ("tiny", "purchase", "wanda", variation, first, second, 0.1)
            rows.append((*point, metric, value, *bounds, front, chosen))
    schema = dict.fromkeys(("model", "scenario", "strategy", "variation"), polars.String)
    schema |= dict.fromkeys(("tau_min", "tau_maj", "density"), polars.Float64) | {"metric": polars.String}
    schema |= dict.fromkeys(("estimate", "low", "high"), polars.Float64)
    schema |= dict.fromkeys(("pareto", "chosen"), polars.Boolean)
    return polars.DataFrame(rows, schema=schema, orient="row")


def panels(figure):
    """The two heat maps and the trade-off, colour scales left out."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_a_grid_shows_both_figures_at_every_point_that_was_sampled(tmp_path):
    figure = grid_heat_maps(grid())
    bias, use, _ = panels(figure)
    assert (ticks(bias.get_xticklabels()), ticks(bias.get_yticklabels())) == (["0.2", "0.4"], ["0.4", "0.2"])
    assert cells(bias) == {(0, 1): ".80", (1, 1): ".30", (1, 0): ".50"}  # tau_maj rises upwards
    assert cells(use) == {(0, 1): ".95", (1, 1): ".90", (1, 0): ".85"}
    assert bias.get_xlabel() == "tau_min (fraction, minority)"
    assert len(save(figure, tmp_path / "grid").png) < PNG_BYTES


def test_front_and_choice_are_marked_in_all_three_panels():
    bias, use, trade = panels(grid_heat_maps(grid(), inlier_floor=0.88))
    for axes in (bias, use):
        outlined = [patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle)]
        assert [(int(x), int(y)) for x, y in outlined] == [(0, 1), (1, 1)]
        assert [(int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axes.lines] == [(1, 1)]
    drawn = {line.get_label(): line for line in trade.lines}
    assert drawn["Pareto front"].get_xydata().tolist() == [[0.9, 0.3], [0.95, 0.8]]
    assert drawn["chosen: 0.4 / 0.2"].get_xydata().tolist() == [[0.9, 0.3]]
    assert (drawn["floor 0.88"].get_xdata()[0], drawn["floor 0.88"].get_linestyle()) == (0.88, "--")
    bars = [np.round(line.get_xydata(), 6).tolist() for line in trade.lines if line.get_label() == INTERVAL]
    assert [[0.9, 0.25], [0.9, 0.35]] in bars
    assert [[0.85, 0.3], [0.95, 0.3]] in bars
    assert len(bars) == 6


def test_counts_of_heads_are_named_as_such_and_points_without_figures_are_left_out():
    counts = {
        (5.0, 0.0): (0.8, 0.9, True, False),
        (10.0, 0.0): (None, None, False, False),
        (10.0, 5.0): (0.4, 0.8, True, False),
    }
    bias, _, trade = panels(grid_heat_maps(grid(counts)))
    assert bias.get_xlabel() == "k_min (heads, minority)"
    assert (ticks(bias.get_xticklabels()), ticks(bias.get_yticklabels())) == (["5", "10"], ["5", "0"])
    assert cells(bias) == {(0, 1): ".80", (1, 0): ".40"}
    assert not any(str(line.get_label()).startswith("chosen") for line in trade.lines)


def test_a_grid_is_drawn_over_all_variations_unless_one_is_named():
    chair = grid({(0.2, 0.2): (0.11, 0.9, True, True)}, "chair")
    both = polars.concat([chair, grid()])
    assert len(cells(panels(grid_heat_maps(both))[0])) == 3
    assert cells(panels(grid_heat_maps(both, variation="chair"))[0]) == {(0, 0): ".11"}
    assert cells(panels(grid_heat_maps(chair))[0]) == {(0, 0): ".11"}
    with pytest.raises(ExciseError, match="no variation 'oven'; pick one of chair, \\(all\\)"):
        grid_heat_maps(both, variation="oven")


# ------------------------------------------------------------------------------------------------------------- transfer


def transfer(rows):
    """`rows`: (strategy, matched_to, source, scenario, level, metric, estimate); intervals are 0.2 to each side."""
    schema = dict.fromkeys(
        ("model", "strategy", "matched_to", "source", "scenario", "level", "metric"), polars.String
    ) | dict.fromkeys(("estimate", "low", "high"), polars.Float64)
    full = [("tiny", *row, *((None, None) if row[-1] is None else (row[-1] - 0.2, row[-1] + 0.2))) for row in rows]
    return polars.DataFrame(full, schema=schema, orient="row")


PAIRS = [
    ("wanda", None, "finance", "finance", "within_context", "gap_reduction", 0.6),
    ("wanda", None, "finance", "finance", "prompt_specific", "gap_reduction", 0.99),
    ("wanda", None, "purchase", "finance", "cross_context/purchase", "gap_reduction", 0.1),
    ("wanda", None, None, "finance", "cross_context", "gap_reduction", -2.5),
    ("wanda", None, "purchase", "purchase", "within_context", "gap_reduction", 0.8),
    ("wanda", None, "finance", "purchase", "cross_context/finance", "gap_reduction", None),
    ("random", "wanda", "purchase", "purchase", "within_context", "gap_reduction", 0.33),
    ("wanda", None, "purchase", "purchase", "within_context", "inlier_ratio", 0.77),
]


def test_transfer_shows_sources_against_scenarios_with_intervals_and_a_star_where_they_cover_0(tmp_path):
    figure = transfer_heat_map(transfer(PAIRS))
    (axes,) = figure.axes
    assert ticks(axes.get_yticklabels()) == ["finance", "purchase", "all others"]
    assert ticks(axes.get_xticklabels()) == ["finance", "purchase"]
    assert cells(axes) == {
        (0, 0): "60\n[40, 80]",
        (0, 1): "10*\n[-10, 30]",
        (0, 2): "-250\n[-270, -230]",
        (1, 1): "80\n[60, 100]",
    }
    assert axes.collections[0].get_clim() == (-1.0, 1.0)
    assert len(save(figure, tmp_path / "transfer").png) < PNG_BYTES


def test_the_reduction_over_random_has_a_panel_of_its_own_beside_each_strategy():
    beyond = [("wanda", None, "purchase", "purchase", "within_context", "reduction_over_random", 0.5)]
    other = [("snip", None, "purchase", "purchase", "within_context", "gap_reduction", 0.4)]
    figure = transfer_heat_map(transfer(PAIRS + beyond + other))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "wanda: gap reduction, %",
        "wanda: beyond the random control, points",
        "snip: gap reduction, %",
        "snip: beyond the random control, points",
    ]
    assert [cells(axes).get((1, 1)) for axes in figure.axes] == ["80\n[60, 100]", "50\n[30, 70]", "40\n[20, 60]", None]


@pytest.mark.trial(15)
def test_a_mask_whose_control_is_another_kind_of_damage_has_no_figure_beyond_random():
    rows = [
        ("wanda", None, "purchase", place, "within_context", "reduction_over_random", 190.0)
        for place in ("purchase", "finance")
    ] + [
        (*mask, "purchase", place, "within_context", "inlier_ratio", ratio)
        for mask, ratio in ((("wanda", None), 0.9), (("random", "wanda"), 0.7))
        for place in ("purchase", "finance")
    ]
    reduction = ("wanda", None, "purchase", "purchase", "within_context", "gap_reduction", 0.5)
    undefined = ("wanda", None, "purchase", "purchase", "prompt_specific", "reduction_over_random", None)
    figure = transfer_heat_map(transfer([reduction, undefined, *rows]), {"finance": 0.2})
    own, beyond = figure.axes
    assert set(cells(own).values()) == {"50\n[30, 70]"}
    assert sorted(cells(beyond).values()) == ["19000\n[18980, 19020]", "no\nyardstick"]
    assert "no yardstick: random masks leave another inlier ratio" in figure.get_suptitle()
    assert "yardstick" not in transfer_heat_map(transfer([reduction, *rows[:2]])).get_suptitle()


def test_many_strategies_of_many_scenarios_show_the_headline_alone_and_stay_small(tmp_path):
    names = [f"scenario {number}" for number in range(8)]
    figure = transfer_heat_map(
        transfer(
            [
                (f"strategy {strategy}", None, source, scenario, "within_context", metric, (strategy - place) / 10)
                for strategy in range(7)
                for source in names
                for place, scenario in enumerate(names)
                for metric in ("gap_reduction", "reduction_over_random")
            ]
        )
    )
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [
        f"strategy {number}: beyond the random control, points" for number in range(7)
    ]
    assert cells(shown[3])[0, 0] == "30"
    assert cells(shown[3])[2, 0] == "10*"
    assert [bool(axes.get_xlabel()) for axes in shown] == 5 * [False] + [True, True]
    assert len(save(figure, tmp_path / "transfer").png) < PNG_BYTES


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("draw", "frame", "several"),
    [
        (overlap_heat_map, overlaps(), ("strategy", "level", "model", "reference_scenario")),
        (mask_distribution_heat_map, distribution({"chair": [(1, 1)]}), ("strategy", "level", "model")),
        (grid_heat_maps, grid(), ("strategy", "scenario", "model")),
        (transfer_heat_map, transfer(PAIRS), ("model",)),
    ],
)
def test_frames_without_rows_or_columns_or_of_several_kinds_are_refused(draw, frame, several):
    with pytest.raises(ExciseError, match="no rows to draw"):
        draw(frame.clear())
    with pytest.raises(ExciseError, match="columns strategy are missing"):
        draw(frame.drop("strategy"))
    for column in several:
        with pytest.raises(ExciseError, match=f"2 values of {column}"):
            draw(polars.concat([frame, frame.with_columns(polars.lit("other").alias(column))]))


def test_frames_without_figures_are_refused():
    with pytest.raises(ExciseError, match="unknown at every point"):
        grid_heat_maps(grid().with_columns(estimate=polars.lit(None, polars.Float64)))
    with pytest.raises(ExciseError, match="only controls or no known gap_reduction"):
        transfer_heat_map(transfer([row for row in PAIRS if row[1]]))
