"""The figure of an axis: how toxic the continuations about each subgroup are, unpruned and pruned.

Here: the subgroups' means behind FASP's bias (method, B1), each with its interval. Not here: any estimate (see
`excise.evaluation.toxicity`), and the trade-off between methods (see `trade_off`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import polars

from excise.conditions import ALL, NO_STRATEGY, PLACE
from excise.errors import ExciseError
from excise.evaluation.table import read_estimate
from excise.reporting.figures.canvas import (
    INK,
    UNDEFINED,
    blank_figure,
    drawing,
    interval_bar,
    legend_title,
    mark_cut_ends,
    mark_handles,
    mark_missing,
    palette,
    require_columns,
    require_one,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = ("model", "scenario", *PLACE, "metric", "estimate", "low", "high")
_MEAN = "mean_toxicity/"
MOST = 4
"""Masks drawn beside the unpruned model."""


def toxicity_by_subgroup(metrics: polars.DataFrame, labels: Mapping[str, str] | None = None) -> Figure:
    """Mean toxicity of every subgroup with its 95 % interval, unpruned and under at most `MOST` strategies' masks.

    `metrics` is one scenario's frame. Those of `fasp` are drawn, or of the first strategies where there are none;
    the dashed line is the unpruned mean over all prompts: the bias is the sum of the distances from it. A cross at the
    edge stands for a mean that is not defined. labels: the subgroups' names as people read them, by key. Raises
    ExciseError where no subgroup has a mean.
    """
    from matplotlib.lines import Line2D

    require_columns(metrics, "metrics", _COLUMNS)
    require_one(metrics, "metrics", ("model", "scenario"))
    averages = metrics.filter((polars.col("variation") == ALL) & polars.col("matched_to").is_null())
    means = averages.filter(polars.col("metric").str.starts_with(_MEAN))
    if not means["estimate"].is_finite().any():
        raise ExciseError("metrics: no mean toxicity of a subgroup; evaluate the scenario first")
    before = means.filter(polars.col("strategy") == NO_STRATEGY).sort("estimate", nulls_last=True)
    subgroups = [name.removeprefix(_MEAN) for name in before["metric"]]
    names = sorted(set(means["strategy"]) - {NO_STRATEGY})
    chosen = ([name for name in names if name.startswith("fasp-")] or names)[-MOST:]
    colours = dict(zip([NO_STRATEGY, *chosen], [INK, *palette(len(chosen))], strict=True))
    with drawing():
        figure = blank_figure((6.5, 1.6 + 0.24 * len(subgroups) * (1 + 0.6 * len(chosen))))
        axes = figure.subplots()
        axes.margins(x=0.08)
        step = 0.7 / max(1, len(chosen))
        handles: list[Line2D] = []
        for slot, (strategy, colour) in enumerate(colours.items()):
            rows = {
                row["metric"].removeprefix(_MEAN): row
                for row in means.filter(polars.col("strategy") == strategy).iter_rows(named=True)
            }
            for place, subgroup in enumerate(subgroups):
                if subgroup not in rows:
                    continue
                known = read_estimate(rows[subgroup])
                height = place + (slot - len(chosen) / 2) * step * (len(chosen) > 0)
                if known.value is None:
                    mark_missing(axes, height, colour, UNDEFINED, along="y")
                    continue
                if known.low is not None and known.high is not None:
                    interval_bar(axes, height, known.low, known.high, along="x", color=colour, linewidth=1.2)
                marker = "o" if strategy == NO_STRATEGY else "s"
                axes.plot([known.value], [height], marker, color=colour, markersize=4.5)
            handles.append(
                Line2D(
                    [],
                    [],
                    color=colour,
                    marker="o" if strategy == NO_STRATEGY else "s",
                    markersize=4.5,
                    linestyle="none",
                    label=strategy,
                )
            )
        overall = averages.filter((polars.col("strategy") == NO_STRATEGY) & (polars.col("metric") == "mean_toxicity"))
        if not overall.is_empty() and overall["estimate"].is_finite().all():
            axes.axvline(overall["estimate"][0], color=INK, linestyle=(0, (5, 3)), linewidth=1.0, zorder=0.9)
        axes.set_ylim(-0.6, len(subgroups) - 0.4)
        axes.set_yticks(range(len(subgroups)), [(labels or {}).get(name, name) for name in subgroups])
        axes.set_xlabel("mean score of continuations; dashed: unpruned, all prompts")
        axes.grid(axis="y", visible=False)
        mark_cut_ends(axes)
        title = legend_title("bars", means["names"].to_list() if "names" in means.columns else [])
        handles += mark_handles([axes])
        figure.legend(
            handles=handles, loc="outside lower center", ncols=3, frameon=False, title=title, title_fontsize=8.5
        )
        figure.suptitle(f"{before['scenario'][0]}: {before['model'][0]}", fontsize=10)
    return figure
