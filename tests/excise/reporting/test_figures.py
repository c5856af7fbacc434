"""Claims about the figures: what they show, that missing parts do not break them, and how they are stored."""

from __future__ import annotations

import io
import subprocess
import sys

import polars
import pytest
from PIL import Image

from excise.errors import ExciseError
from excise.reporting.figures import PNG_BYTES, answers_by_group, disparity_by_level, mask_density_by_layer, save
from excise.reporting.figures.canvas import INTERVAL

TEN = (
    "chair",
    "car",
    "oven",
    "mattress",
    "grill",
    "television",
    "air conditioner",
    "camera",
    "bicycle",
    "piano",
)
LEVELS = ("prompt_specific", "within_context")
ROLES = ("down", "gate", "k", "q", "up", "v")

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")


def completions(variations=("chair", "car"), groups=("white", "black"), value=lambda subject, sample: 50.0 + subject):
    return polars.DataFrame(
        [
            (variation, group, f"{group} {subject}", value(subject + 10 * (group == "white"), sample))
            for variation in variations
            for group in groups
            for subject in range(4)
            for sample in range(5)
        ],
        schema={
            "variation": polars.String,
            "group": polars.String,
            "subject": polars.String,
            "value": polars.Float64,
        },
        orient="row",
    )


def metrics(variations=("chair", "car"), strategies=("gap_gradient", "set_difference"), levels=LEVELS, drop=()):
    rows = []

    def add(variation, strategy, level, matched_to, **values):
        for metric, estimate in values.items():
            if metric not in drop:
                low, high = (None, None) if estimate is None else (estimate - 0.1, estimate + 0.1)
                high = min(high, 1.0) if metric == "inlier_ratio" else high
                key = ("planted", "purchase", variation, strategy, level, matched_to, metric)
                rows.append((*key, estimate, low, high, None, None))

    for variation in (*variations, "(all)"):
        add(variation, "unpruned", "none", None, abs_smd=0.9, smd=0.9, inlier_ratio=0.94)
        for strategy in strategies:
            for level in levels:
                add(variation, strategy, level, None, abs_smd=0.2, smd=-0.2, gap_reduction=0.8, inlier_ratio=0.93)
                add(variation, "random", level, strategy, abs_smd=0.8, smd=0.8, gap_reduction=0.1, inlier_ratio=0.93)
    schema = dict.fromkeys(
        ("model", "scenario", "variation", "strategy", "level", "matched_to", "metric"), polars.String
    ) | dict.fromkeys(("estimate", "low", "high", "p_value", "p_holm"), polars.Float64)
    return polars.DataFrame(rows, schema=schema, orient="row")


def masks(strategies=("gap_gradient", "set_difference"), levels=LEVELS, layers=4, pruned=10):
    return polars.DataFrame(
        [
            (variation, strategy, level, None, layer, role, pruned, 1000)
            for variation in ("chair", "car")
            for strategy in strategies
            for level in levels
            for layer in range(layers)
            for role in ROLES
        ],
        schema=["variation", "strategy", "level", "matched_to", "layer", "role", "pruned", "size"],
        schema_overrides={"matched_to": polars.String},
        orient="row",
    )


def visible(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def legend_labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# -------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("variations", [("chair",), ("chair", "car", "oven"), TEN])
@pytest.mark.parametrize("scale", ["log", "linear"])
def test_answers_have_one_panel_for_each_variation_with_the_unit_at_the_axis(variations, scale, tmp_path):
    figure = answers_by_group(
        completions(variations), unit="US dollars", majority="white", minority="black", scale=scale
    )
    assert [axes.get_title() for axes in visible(figure)] == list(variations)
    assert {axes.get_yscale() for axes in visible(figure)} == {scale}
    assert visible(figure)[0].get_ylabel() == "answer (US dollars)"
    assert [label.get_text() for label in visible(figure)[0].get_xticklabels()] == ["white\n100 %", "black\n100 %"]
    assert len(save(figure, tmp_path / "answers").png) < PNG_BYTES


def test_unparsed_answers_are_told_and_answers_a_log_axis_cannot_show_are_counted(tmp_path):
    frame = completions(("chair",), value=lambda subject, sample: (None, 0.0, 40.0, 50.0, 60.0)[sample])
    figure = answers_by_group(frame, unit="US dollars", majority="white", minority="black", scale="log")
    assert visible(figure)[0].get_xticklabels()[0].get_text() == "white\n80 %"
    assert [text.get_text() for text in visible(figure)[0].texts] == ["8 of 0 or less not shown"]
    save(figure, tmp_path / "answers")


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_a_variation_without_a_parsed_answer_says_so(scale, tmp_path):
    frame = completions(("chair",), value=lambda subject, sample: None if sample % 2 else float("nan"))
    figure = answers_by_group(frame, unit="US dollars", majority="white", minority="black", scale=scale)
    assert [text.get_text() for text in visible(figure)[0].texts] == ["no parsed answer to draw"]
    save(figure, tmp_path / "answers")


def test_a_constant_answer_and_an_absent_group_are_drawn(tmp_path):
    frame = completions(("chair",), groups=("white",), value=lambda subject, sample: 50.0)
    figure = answers_by_group(frame, unit="US dollars", majority="white", minority="black", scale="log")
    assert visible(figure)[0].get_xticklabels()[1].get_text() == "black\nnone"
    save(figure, tmp_path / "answers")


def test_further_groups_follow_the_compared_ones():
    frame = completions(("chair",), groups=("asian", "black", "white"))
    figure = answers_by_group(frame, unit="US dollars", majority="white", minority="black")
    labels = [label.get_text().split("\n")[0] for label in visible(figure)[0].get_xticklabels()]
    assert labels == ["white", "black", "asian"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda frame: frame, {"scale": "cubic"}, "outcome.scale"),
        (lambda frame: frame.drop("value"), {}, "columns value are missing"),
        (lambda frame: frame.clear(), {}, "no rows"),
        (lambda frame: frame, {"majority": "a", "minority": "b"}, "neither 'a' nor 'b'"),
    ],
)
def test_answers_that_cannot_be_drawn_are_refused(change, options, message):
    with pytest.raises(ExciseError, match=message):
        answers_by_group(change(completions()), **{"unit": "$", "majority": "white", "minority": "black", **options})


# ------------------------------------------------------------------------------------------------------------ disparity


def test_disparity_stands_above_the_gap_left_and_the_inlier_ratios_with_its_floor(tmp_path):
    figure = disparity_by_level(metrics(), inlier_floor=0.9)
    labels = [axes.get_ylabel().split("\n")[0] for axes in figure.axes]
    assert labels == ["|SMD|", "raw gap left", "inlier ratio"]
    assert [text.get_text() for text in figure.axes[-1].texts] == ["floor 0.90"]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["chair", "car", "mean"]
    assert len(save(figure, tmp_path / "disparity").png) < PNG_BYTES


def test_every_mask_and_the_random_control_are_in_the_legend():
    assert legend_labels(disparity_by_level(metrics())) == [
        "unpruned",
        "gap_gradient, prompt-specific",
        "set_difference, prompt-specific",
        "gap_gradient, within-context",
        "set_difference, within-context",
        "random control of the mark to its left",
    ]


def test_ten_variations_of_many_masks_get_a_panel_for_each_level(tmp_path):
    figure = disparity_by_level(metrics(TEN, ("a", "b", "c", "d")))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["prompt-specific", "within-context"] * 2 + [""]
    saved = save(figure, tmp_path / "disparity")
    assert len(saved.png) < PNG_BYTES
    assert Image.open(io.BytesIO(saved.png)).width == 900


def test_disparity_is_drawn_without_strategies_aggregate_gaps_or_estimates(tmp_path):
    complete = metrics()
    unknown = [polars.lit(None, polars.Float64).alias(name) for name in ("estimate", "low", "high")]
    undefined = [polars.lit(float("nan")).alias(name) for name in ("estimate", "low", "high")]
    sparse = {
        "unpruned alone": complete.filter(polars.col("strategy") == "unpruned"),
        "no aggregate": complete.filter(polars.col("variation") != "(all)"),
        "no |SMD| but signed": metrics(drop=("abs_smd",)),
        "only null": complete.with_columns(unknown),
        "only nan": complete.with_columns(undefined),
        "no intervals": complete.with_columns(unknown[1:]),
        "no controls": complete.filter(polars.col("matched_to").is_null()),
    }
    panels = {}
    for name, frame in sparse.items():
        figure = disparity_by_level(frame)
        panels[name] = len(figure.axes)
        save(figure, tmp_path / name)
    assert panels == {
        "unpruned alone": 2,
        "no aggregate": 3,
        "no |SMD| but signed": 3,
        "only null": 2,
        "only nan": 2,
        "no intervals": 3,
        "no controls": 3,
    }
    assert not any("control" in label for label in legend_labels(disparity_by_level(sparse["no controls"])))


def test_the_gap_left_is_drawn_with_its_interval_turned_round():
    frame = metrics(("chair",), ("gap_gradient",), ("prompt_specific",))
    heights = sorted(
        {
            tuple(round(float(end), 6) for end in line.get_ydata())
            for line in disparity_by_level(frame).axes[1].lines
            if line.get_label() == INTERVAL
        }
    )
    assert heights == [(10.0, 30.0), (80.0, 100.0)]


# --------------------------------------------------------------------------------------------------------- mask density


def test_density_has_a_heat_map_bars_and_a_scale_for_each_strategy_and_level(tmp_path):
    figure = mask_density_by_layer(masks())
    assert len(figure.axes) == 4 * 3
    heat, side, scale = figure.axes[:3]
    assert heat.get_title(loc="left") == "gap_gradient\nprompt-specific\n1 % pruned, 2 masks"
    assert [label.get_text() for label in heat.get_xticklabels()] == ["q", "k", "v", "gate", "up", "down"]
    assert (heat.get_ylabel(), side.get_xlabel(), scale.get_xlabel()) == ("layer", "% of all", "% of the matrix")
    assert [patch.get_width() for patch in side.patches] == pytest.approx([25.0] * 4)
    assert len(save(figure, tmp_path / "density").png) < PNG_BYTES


def test_controls_are_not_drawn_as_strategies_and_an_empty_mask_says_so(tmp_path):
    frame = masks(("gap_gradient",), ("prompt_specific",), pruned=0)
    control = frame.with_columns(strategy=polars.lit("random"), matched_to=polars.lit("gap_gradient"))
    figure = mask_density_by_layer(polars.concat([frame, control]))
    assert len(figure.axes) == 3
    assert [text.get_text() for text in figure.axes[0].texts] == ["nothing pruned"]
    save(figure, tmp_path / "density")
    with pytest.raises(ExciseError, match="only controls"):
        mask_density_by_layer(control)


def test_large_models_and_many_masks_stay_small(tmp_path):
    frame = masks(("a", "b", "c", "d"), layers=80)
    assert len(save(mask_density_by_layer(frame), tmp_path / "density").png) < PNG_BYTES


# ------------------------------------------------------------------------------------------------------------- saving


def test_the_same_frame_gives_the_same_bytes_and_leaves_no_partial_file(tmp_path):
    first, second = (save(disparity_by_level(metrics()), tmp_path / name / "v1.2") for name in ("a", "b"))
    assert first.svg_path.read_bytes() == second.svg_path.read_bytes()
    assert b"<dc:date>" not in first.svg_path.read_bytes()
    assert first.png == second.png == first.png_path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["v1.2.png", "v1.2.svg"]


def test_a_noisy_figure_loses_colours_or_resolution_until_it_is_small(tmp_path):
    import numpy
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7))
    figure.add_axes((0, 0, 1, 1)).imshow(numpy.random.default_rng(0).random((700, 900)), cmap="viridis", aspect="auto")
    with pytest.raises(ExciseError, match="smallest PNG"):
        save(figure, tmp_path / "noise")
    assert not list(tmp_path.iterdir())

    figure = Figure(figsize=(9, 6))
    figure.subplots().imshow(numpy.random.default_rng(0).random((90, 120)), cmap="viridis", interpolation="nearest")
    assert len(save(figure, tmp_path / "noise").png) < PNG_BYTES


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExciseError, match="cannot be written"):
        save(disparity_by_level(metrics()), tmp_path / "file" / "figure")


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    disparity_by_level(metrics())
    mask_density_by_layer(masks())
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []


def test_importing_the_module_loads_no_plotting_library():
    code = "import sys, excise.reporting.figures; print({'seaborn', 'matplotlib', 'torch'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "set()"
