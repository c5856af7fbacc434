"""The figure of a grid search: bias and usefulness at every pair of thresholds, the Pareto front, the chosen point.

Here: BDB's Fig. 5 and the trade-off it leaves open. Not here: the front or the choice (the table `grid_search` has
both, and `excise.evaluation.grid` the rule). Thresholds are fractions of a matrix, or counts for attention heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars

from excise.conditions import ALL
from excise.errors import ExciseError
from excise.evaluation.rounding import floor_text
from excise.evaluation.table import read_estimate
from excise.evaluation.thresholds import COLLAPSED_SPREAD, INLIER_FLOOR
from excise.reporting.figures.canvas import (
    COLLAPSED,
    FLOOR_RED,
    INK,
    WIDTH,
    blank_figure,
    drawing,
    few_names_line,
    interval_bar,
    limits_of,
    mark_cut_ends,
    mark_handles,
    palette,
    require_columns,
    require_one,
    stacked,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = (
    "model",
    "scenario",
    "strategy",
    "variation",
    "tau_min",
    "tau_maj",
    "metric",
    "estimate",
    "low",
    "high",
    "pareto",
    "chosen",
)
_BIAS, _USE, _SPREAD = "abs_smd", "inlier_ratio", "spread_ratio"


def grid_heat_maps(
    grid: polars.DataFrame, *, variation: str | None = None, inlier_floor: float = INLIER_FLOOR
) -> Figure:
    """|SMD| and inlier ratio over (tau_min, tau_maj), and one against the other (BDB, Fig. 5).

    `grid` holds rows of the table `grid_search` of one model, scenario and strategy; `variation` picks one (default:
    "(all)" where it is there, else the only one). Outlined cells and filled marks joined by a line are the Pareto
    front, the star is the chosen point, the dashed line the floor of the inlier ratio, bars are 95 % intervals.
    White cells were not sampled, or are not defined. A cross marks a point whose answers collapse: no success, whatever
    its |SMD|.

    Raises ExciseError on a missing column, no rows, several models, scenarios or strategies, an unknown variation, or
    where no point has either
    metric.
    """
    require_columns(grid, "grid_search", _COLUMNS)
    require_one(grid, "grid_search", ("model", "scenario", "strategy"))
    known = grid["variation"].unique(maintain_order=True).to_list()
    wanted = variation or (known[0] if len(known) == 1 else ALL)
    if wanted not in known:
        raise ExciseError(f"grid_search: no variation {wanted!r}; pick one of {', '.join(known)}")
    points = _points(grid.filter(polars.col("variation") == wanted))
    if not points:
        raise ExciseError(f"grid_search: {_BIAS} and {_USE} are unknown at every point of {wanted}; sample it first")
    counts = max(point["tau_min"] for point in points) > 1
    with drawing(grid="white"):
        size = max(len({point["tau_maj"] for point in points}), 4)
        height = min(0.27 * size, 4.2)
        figure = blank_figure((WIDTH, 1.6 + height + 3.4))
        upper, lower = stacked(figure, (1.0 + height, 3.4))
        first, second = upper.subplots(1, 2, sharey=True)
        _heat_map(first, points, _BIAS, "|SMD|", "Oranges", counts)
        _heat_map(second, points, _USE, "inlier ratio", "Blues", counts)
        second.set_ylabel("")
        _trade_off(lower.subplots(), points, inlier_floor, counts)
        where = "all variations" if wanted == ALL else wanted
        figure.suptitle(
            f"{grid['strategy'][0]}: {grid['scenario'][0]}, {where}: {grid['model'][0]}\n"
            f"outlined: Pareto front; star: chosen point; white: not sampled or not defined{_crossed(points)}"
            + few_names_line(grid),
            fontsize=9.5,
        )
    return figure


def _crossed(points: list[dict]) -> str:
    return "; cross: answers collapsed" if any(point["collapsed"] for point in points) else ""


def _points(rows: polars.DataFrame) -> list[dict]:
    """Per pair of thresholds: its place, flags, and per metric (estimate, low, high); points without both are out."""
    points: dict[tuple[float, float], dict] = {}
    for row in rows.filter(polars.col("metric").is_in([_BIAS, _USE, _SPREAD])).iter_rows(named=True):
        key = (row["tau_min"], row["tau_maj"])
        flags = dict.fromkeys(("pareto", "chosen", "collapsed"), False)
        point = points.setdefault(key, {"tau_min": key[0], "tau_maj": key[1]} | flags)
        point["pareto"] |= bool(row["pareto"])
        point["chosen"] |= bool(row["chosen"])
        known = read_estimate(row)
        if known.value is not None and row["metric"] == _SPREAD:
            point["collapsed"] = known.value < COLLAPSED_SPREAD
        elif known.value is not None:
            point[row["metric"]] = (known.value, known.low, known.high)
    return [point for _, point in sorted(points.items()) if _BIAS in point or _USE in point]


def _threshold(value: float, counts: bool) -> str:
    return f"{value:.0f}" if counts else f"{value:.3g}"


def _heat_map(axes: Axes, points: list[dict], metric: str, title: str, colours: str, counts: bool) -> None:
    import numpy as np
    import seaborn
    from matplotlib.patches import Rectangle

    across = sorted({point["tau_min"] for point in points})
    up = sorted({point["tau_maj"] for point in points}, reverse=True)
    values = np.full((len(up), len(across)), np.nan)
    for point in points:
        values[up.index(point["tau_maj"]), across.index(point["tau_min"])] = point.get(metric, (np.nan,))[0]
    text = np.array([[_cell(value) for value in row] for row in values]).reshape(values.shape)
    seaborn.heatmap(
        values,
        ax=axes,
        cmap=colours,
        annot=text if len(across) <= 12 else None,
        fmt="",
        annot_kws={"fontsize": 7.0},
        linewidths=0.4,
        linecolor="white",
        cbar_kws={"pad": 0.02, "aspect": 30},
        xticklabels=[_threshold(value, counts) for value in across],
        yticklabels=[_threshold(value, counts) for value in up],
    )
    for point in points:
        x, y = across.index(point["tau_min"]), up.index(point["tau_maj"])
        if point["pareto"] or point["chosen"]:
            axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=1.5))
        if point["collapsed"]:
            axes.plot(
                [x + 0.5], [y + 0.5], marker="X", markersize=8, color=INK, markeredgecolor="white", label=COLLAPSED
            )
        if point["chosen"]:
            axes.plot(
                [x + 0.82],
                [y + 0.22],
                marker="*",
                markersize=9,
                color=INK,
                markeredgecolor="white",
                markeredgewidth=0.6,
            )
    axes.set_title(title, fontsize=9.5)
    axes.set_xlabel("k_min (heads, minority)" if counts else "tau_min (fraction, minority)")
    axes.set_ylabel("k_maj (heads, majority)" if counts else "tau_maj (fraction, majority)")
    axes.tick_params(length=0, labelsize=8)
    axes.tick_params(axis="x", labelrotation=90 if len(across) > 6 and not counts else 0)
    axes.tick_params(axis="y", labelrotation=0)


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.2f}".replace("0.", ".") if abs(value) < 1 else f"{value:.2f}"


def _trade_off(axes: Axes, points: list[dict], floor: float, counts: bool) -> None:
    colour = palette(1)[0]
    both = [point for point in points if _BIAS in point and _USE in point]
    for point in both:
        (x, left, right), (y, low, high) = point[_USE], point[_BIAS]
        if point["collapsed"]:
            axes.plot([x], [y], marker="X", markersize=6, color=INK, linestyle="none", zorder=3, label=COLLAPSED)
            continue
        front = point["pareto"] or point["chosen"]
        shade = colour if front else "#9a9a9a"
        width = 1.1 if front else 0.6
        if low is not None and high is not None:
            interval_bar(axes, x, low, high, color=shade, linewidth=width, alpha=0.8, zorder=2)
        if left is not None and right is not None:
            interval_bar(axes, y, left, right, along="x", color=shade, linewidth=width, alpha=0.8, zorder=2)
        axes.plot([x], [y], "o", markersize=5, color=shade, markerfacecolor=shade if front else "white", zorder=3)
    front = sorted((point[_USE][0], point[_BIAS][0]) for point in both if point["pareto"])
    if front:
        axes.plot(*zip(*front, strict=True), color=colour, linewidth=1.4, zorder=2.5, label="Pareto front")
    for point in both:
        if point["chosen"]:
            name = f"chosen: {_threshold(point['tau_min'], counts)} / {_threshold(point['tau_maj'], counts)}"
            axes.plot(
                [point[_USE][0]],
                [point[_BIAS][0]],
                marker="*",
                markersize=14,
                color="#de8f05",
                zorder=4,
                markeredgecolor=INK,
                linestyle="none",
                label=name,
            )
    name = f"floor {floor_text(floor)}"
    axes.axvline(floor, color=FLOOR_RED, linewidth=1.1, linestyle=(0, (5, 2)), label=name, zorder=1)
    axes.plot(
        [],
        [],
        marker="o",
        markersize=5,
        color="#9a9a9a",
        markerfacecolor="white",
        linewidth=0.6,
        label="other points, 95 % intervals",
    )
    if both:
        sizes = [point[_BIAS] for point in both]
        ends = [end for _, *ends in sizes for end in ends if end is not None]
        high = limits_of([0.0, *(size for size, _, _ in sizes)], ends)[1]
        axes.set_ylim(0.0, max(1.05 * high, 0.05))
    mark_cut_ends(axes)
    axes.set_xlabel("inlier ratio (better to the right)")
    axes.set_ylabel("|SMD| (better below)")
    axes.grid(visible=True)
    lacking = len(points) - len(both)
    if lacking:
        label = f"not drawn: {lacking} without\n|SMD| or inlier ratio"
        axes.plot([], [], linestyle="none", label=label)
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        handles=[*handles, *mark_handles([axes])],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        borderaxespad=0.0,
    )
