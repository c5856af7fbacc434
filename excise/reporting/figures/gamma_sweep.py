"""The figure of FASP's two thresholds: bias and perplexity at every share pruned and protected, and the chosen point.

Here: the search over alpha and gamma (FASP, section 5; method, B4 and B6). Not here: the rule and the front, which
`excise.evaluation.bias_correlation.gamma_choice` marks, and the comparison with other methods (see `trade_off`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars

from excise.errors import ExciseError
from excise.reporting.figures.canvas import (
    FLOOR_RED,
    INK,
    WIDTH,
    axis_number,
    blank_figure,
    drawing,
    interval_bar,
    mark_cut_ends,
    mark_handles,
    palette,
    require_columns,
    require_one,
    stacked,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

_COLUMNS = ("alpha", "gamma", "bias", "perplexity_ratio", "within_budget", "pareto", "chosen")


def gamma_sweep(rows: polars.DataFrame, *, budget: float | None = None) -> Figure:
    """Bias and change of perplexity over (alpha, gamma), and one against the other.

    `rows` is what `gamma_choice` gives for one model and scenario; columns bias_low and bias_high, where there are
    any, are drawn as intervals. Outlined cells and marks joined by a dark line are the Pareto front, the star is the
    chosen point, a dark corner is beyond the budget, the red line is the budget (a share: .05 = 5 %). Without gamma a
    point (alpha 0, unpruned) is drawn in the lower panel alone. The title counts points that lack a figure.

    Raises ExciseError on a missing column, no rows, several models or scenarios, a point that is there twice, or where
    no point has both figures.
    """
    require_columns(rows, "gamma_sweep", _COLUMNS)
    require_one(rows, "gamma_sweep", [name for name in ("model", "scenario") if name in rows.columns])
    if rows.select("alpha", "gamma").is_duplicated().any():
        raise ExciseError("gamma_sweep: a pair (alpha, gamma) is there twice; give one row per point")
    points = [
        row
        for row in rows.sort("gamma", "alpha").iter_rows(named=True)
        if all(row[name] is not None and math.isfinite(row[name]) for name in ("alpha", "bias", "perplexity_ratio"))
    ]
    if not points:
        raise ExciseError("gamma_sweep: no point has both bias and perplexity_ratio; evaluate its masks first")
    cells = [point for point in points if point["gamma"] is not None]
    with drawing(grid="white"):
        down = len({point["gamma"] for point in cells})
        upper = (0.8 + 0.3 * max(down, 3)) if cells else 0.0
        figure = blank_figure((WIDTH, 0.9 + upper + 3.6))
        lower: FigureBase = figure
        if cells:
            top, lower = stacked(figure, (upper + 0.4, 3.6))
            first, second = top.subplots(1, 2, sharey=True)
            _heat_map(first, cells, lambda point: point["bias"], "bias", "Oranges", _short)
            _heat_map(second, cells, _rise, "change of perplexity, %", "Blues", lambda value: f"{value:.3g}")
            second.set_ylabel("")
        _scatter(lower.subplots(), points, budget)
        names = [rows[name][0] for name in ("scenario", "model") if name in rows.columns]
        bound = f"within a budget of {100 * budget:g} %" if budget is not None else "within the budget"
        figure.suptitle(
            f"{': '.join(names)}\noutlined: Pareto front; star: lowest bias {bound}; dark corner: beyond it"
            f"{_not_drawn(rows.height - len(points))}".strip(),
            fontsize=9.5,
        )
    return figure


def _not_drawn(count: int) -> str:
    return f"\nnot drawn: {count} point{'' if count == 1 else 's'} without a defined figure" if count else ""


def _rise(point: dict) -> float:
    return 100 * (point["perplexity_ratio"] - 1)


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def _heat_map(axes: Axes, points: Sequence[dict], value, title: str, colours: str, text) -> None:
    import numpy as np
    import seaborn
    from matplotlib.patches import Rectangle

    across = sorted({point["alpha"] for point in points})
    up = sorted({point["gamma"] for point in points}, reverse=True)
    values = np.full((len(up), len(across)), np.nan)
    for point in points:
        values[up.index(point["gamma"]), across.index(point["alpha"])] = value(point)
    known = values[np.isfinite(values)]
    labels = np.array([["" if math.isnan(number) else text(number) for number in row] for row in values])
    seaborn.heatmap(
        values,
        ax=axes,
        cmap=colours,
        vmin=known.min(),
        vmax=np.quantile(known, 0.9) if len(known) > 4 else None,
        annot=labels if len(across) <= 12 else None,
        fmt="",
        annot_kws={"fontsize": 6.6},
        linewidths=0.4,
        linecolor="white",
        cbar=False,
        xticklabels=[f"{number:g}" for number in across],
        yticklabels=[f"{number:g}" for number in up],
    )
    for point in points:
        x, y = across.index(point["alpha"]), up.index(point["gamma"])
        if not point["within_budget"]:
            axes.fill([x + 0.66, x + 0.98, x + 0.98], [y + 0.98, y + 0.98, y + 0.66], color=INK, linewidth=0)
        if point["pareto"] or point["chosen"]:
            axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=1.5))
        if point["chosen"]:
            axes.plot(
                [x + 0.82], [y + 0.2], marker="*", markersize=9, color=INK, markeredgecolor="white", markeredgewidth=0.6
            )
    axes.set_title(title + (", full colour from the 90th percentile on" if len(known) > 4 else ""), fontsize=9.5)
    axes.set_xlabel("alpha (share of heads pruned)")
    axes.set_ylabel("gamma (share of heads protected)")
    axes.tick_params(length=0, labelsize=8)
    axes.tick_params(axis="x", labelrotation=0)
    axes.tick_params(axis="y", labelrotation=0)


def _scatter(axes: Axes, points: Sequence[dict], budget: float | None) -> None:
    gammas = sorted({point["gamma"] for point in points if point["gamma"] is not None})
    colours = dict(zip(gammas, palette(len(gammas)), strict=True)) | {None: INK}
    markers = dict(zip(gammas, "os^DvPX<>h" * (1 + len(gammas) // 10), strict=False)) | {None: "."}
    axes.grid(visible=True)
    for gamma in [*gammas, None]:
        of_gamma = [point for point in points if point["gamma"] == gamma]
        if not of_gamma:
            continue
        for point in of_gamma:
            low, high = point.get("bias_low"), point.get("bias_high")
            if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
                look = {"color": colours[gamma], "linewidth": 0.9, "alpha": 0.4, "zorder": 2}
                interval_bar(axes, _rise(point), low, high, **look)
        axes.plot(
            [_rise(point) for point in of_gamma],
            [point["bias"] for point in of_gamma],
            linestyle="none",
            zorder=3,
            marker=markers[gamma],
            markersize=9 if gamma is None else 5.5,
            color=colours[gamma],
            label="unpruned" if gamma is None else f"gamma {gamma:g}",
        )
    front = sorted((_rise(point), point["bias"]) for point in points if point["pareto"])
    axes.step(
        [x for x, _ in front],
        [y for _, y in front],
        where="post",
        color=INK,
        linewidth=1.3,
        alpha=0.75,
        zorder=2.2,
        label="Pareto front",
    )
    for point in points:
        if point["chosen"]:
            where = f"alpha {point['alpha']:g}" + ("" if point["gamma"] is None else f", gamma {point['gamma']:g}")
            axes.plot(
                [_rise(point)],
                [point["bias"]],
                marker="*",
                markersize=14,
                color=INK,
                markeredgecolor="white",
                linestyle="none",
                zorder=4,
                label=f"chosen:\n{where}",
            )
    if budget is not None:
        axes.axvline(100 * budget, color=FLOOR_RED, linewidth=1.1, zorder=1, label=f"budget, {100 * budget:g} %")
    if max(_rise(point) for point in points) > 200:
        axes.set_xscale("symlog", linthresh=10)
        axes.xaxis.set_major_formatter(lambda value, _: axis_number(value))
    axes.set_xlabel("change of perplexity, %")
    axes.set_ylabel("bias")
    mark_cut_ends(axes)
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(handles=[*handles, *mark_handles([axes])], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
