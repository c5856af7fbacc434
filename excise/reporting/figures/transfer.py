"""The figure of transfer: what masks from one scenario do to the gap of another.

Here: the matrix of sources against evaluated scenarios, for every strategy. Not here: any estimate (they are those of
`excise.evaluation.numbers`). BDB asks this for one evaluated scenario (section 5, method A8); here every scenario is
one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import polars

from excise.conditions import CROSS_CONTEXT, PROMPT_SPECIFIC, RANDOM, WITHIN_CONTEXT
from excise.errors import ExciseError
from excise.evaluation.table import at_most
from excise.evaluation.thresholds import COLLAPSED_SPREAD, INLIER_TOLERANCE
from excise.reporting.figures.canvas import WIDTH, blank_figure, drawing, few_names_line, require_columns, require_one

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = ("model", "strategy", "matched_to", "source", "scenario", "level", "metric", "estimate", "low", "high")
_METRICS = {"gap_reduction": "gap reduction, %", "reduction_over_random": "beyond the random control, points"}
_OTHERS = "all others"
_CROWDED = 320  # cells above which the headline alone is drawn, and then the figures without their intervals
# Where several masks lead from one scenario to another, the one the matrix shows.
_PREFERRED = (WITHIN_CONTEXT, CROSS_CONTEXT, PROMPT_SPECIFIC)


def transfer_heat_map(transfer: polars.DataFrame, inlier_tolerance: Mapping[str, float] | None = None) -> Figure:
    """The share of the raw gap that masks from each source scenario remove in each evaluated scenario, in percent.

    `transfer` holds rows of the table `transfer_matrix` of one model; each strategy (controls are left out) has a
    panel of `gap_reduction` and one of `reduction_over_random` where that is known, with the 95 % interval below each
    figure and a star where it covers 0. Blue removes the gap, red widens it; colours end at 100. Where a source and
    a scenario meet at several levels the within-context one is drawn, which no evaluated prompt had a part in. Cells
    say "collapsed" where the masks make a group's answers (nearly) constant, and beyond the random control "no
    yardstick" where inlier ratios of mask and control are further apart than `inlier_tolerance` gives for the evaluated
    scenario (by default .10 for each): the two are different kinds of damage. Grey cells are not defined or not there.
    A missing source stands for all other scenarios pooled. Where all that is too much for one picture, it shows the
    reduction over random alone, and if need be without the intervals' ends: draw one strategy then.

    Raises ExciseError on a missing column, no rows, several models, or when there are only controls or no estimates.
    """
    require_columns(transfer, "transfer_matrix", _COLUMNS)
    require_one(transfer, "transfer_matrix", ("model",))
    rows = transfer.filter(polars.col("matched_to").is_null()).with_columns(polars.col("source").fill_null(_OTHERS))
    finite = rows.filter(polars.col("metric").is_in(list(_METRICS)) & polars.col("estimate").is_finite())
    constant = (polars.col("metric") == "spread_ratio") & (polars.col("estimate") < COLLAPSED_SPREAD)
    collapsed = rows.filter(constant & polars.col("strategy").is_in(finite["strategy"].to_list()))
    if finite.is_empty():
        raise ExciseError("transfer_matrix: only controls or no known gap_reduction; evaluate the scenarios first")
    apart = _apart(transfer.with_columns(polars.col("source").fill_null(_OTHERS)), inlier_tolerance or {})
    drawn = polars.concat([finite, collapsed])
    scenarios = drawn["scenario"].unique(maintain_order=True).to_list()
    sources = drawn["source"].unique(maintain_order=True).to_list()
    sources = [
        *(name for name in scenarios if name in sources),
        *sorted(name for name in sources if name not in (*scenarios, _OTHERS)),
        *([_OTHERS] if _OTHERS in sources else []),
    ]
    strategies = finite["strategy"].unique(maintain_order=True).to_list()
    metrics = [metric for metric in _METRICS if metric in finite["metric"].to_list()]
    cells = len(strategies) * len(sources) * len(scenarios)
    if cells * len(metrics) > _CROWDED:
        metrics = metrics[-1:]
    panels = [(strategy, metric) for strategy in strategies for metric in metrics]
    intervals = cells * len(metrics) <= _CROWDED
    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    cell = 0.58 if len(scenarios) > 5 else 0.8
    with drawing(grid="white"):
        width = min(max(1.6 + cell * len(scenarios) * across, 5.0 if across == 1 else WIDTH), 11.0)
        figure = blank_figure((width, 1.1 + (0.35 + (0.42 if intervals else 0.3) * max(len(sources), 2)) * down))
        axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for index, (strategy, metric) in enumerate(panels):
            panel = axes[index // across][index % across]
            chosen = finite.filter((polars.col("strategy") == strategy) & (polars.col("metric") == metric))
            wrecked = collapsed.filter(polars.col("strategy") == strategy).select("source", "scenario", "level").rows()
            words = dict.fromkeys(wrecked, "collapsed")
            if metric == "reduction_over_random":
                words = dict.fromkeys(apart.get(strategy, ()), "no\nyardstick") | words
            _panel(panel, chosen, sources, scenarios, intervals, words)
            panel.set_title(f"{strategy}: {_METRICS[metric]}", fontsize=9, loc="left")
            lowest = index + across >= len(panels)
            panel.tick_params(labelbottom=lowest)
            panel.set_xlabel("evaluated on" if lowest else "")
            panel.set_ylabel("mask from" if index % across == 0 else "")
        for index in range(len(panels), down * across):
            axes[index // across][index % across].set_visible(False)
        intervals_text = "[95 % interval], * where it covers 0" if intervals else "* the 95 % interval covers 0"
        figure.suptitle(
            f"{finite['model'][0]}: transfer of masks between scenarios\n{intervals_text}; blue: the gap shrinks, "
            "red: it grows, full colour from 100 on\ngrey: no gap detectable, not defined or not evaluated"
            + ("; collapsed: answers (nearly) all the same" if len(collapsed) else "")
            + ("\nno yardstick: random masks leave another inlier ratio" if apart else "")
            + few_names_line(finite),
            fontsize=9.5,
        )
    return figure


def _panel(
    axes: Axes,
    rows: polars.DataFrame,
    sources: Sequence[str],
    scenarios: Sequence[str],
    intervals: bool,
    words: Mapping[tuple[str, str, str], str],
) -> None:
    """words: what stands in place of a figure, by source, scenario and level."""
    import numpy as np
    import seaborn

    best: dict[tuple[int, int], dict] = {}
    for row in rows.iter_rows(named=True):
        place = sources.index(row["source"]), scenarios.index(row["scenario"])
        if place not in best or _rank(row["level"]) < _rank(best[place]["level"]):
            best[place] = row
    values = np.full((len(sources), len(scenarios)), np.nan)
    text = np.full(values.shape, "", dtype=object)
    for (source, scenario, level), word in sorted(words.items(), key=lambda item: -_rank(item[0][2])):
        place = sources.index(source), scenarios.index(scenario)
        if place not in best or best[place]["level"] == level:
            best.pop(place, None)
            text[place] = word
    for place, row in best.items():
        values[place] = row["estimate"]
        text[place] = _points(row["estimate"])
        if all(end is not None and math.isfinite(end) for end in (row["low"], row["high"])):
            text[place] += "*" if row["low"] <= 0 <= row["high"] else ""
            text[place] += f"\n[{_points(row['low'])}, {_points(row['high'])}]" if intervals else ""
    seaborn.heatmap(
        values,
        ax=axes,
        vmin=-1,
        vmax=1,
        center=0,
        cmap="RdBu",
        annot=text,
        fmt="",
        cbar=False,
        annot_kws={"fontsize": 6.8 if len(scenarios) > 5 else 7.5, "linespacing": 1.15},
        linewidths=0.6,
        linecolor="white",
        xticklabels=list(scenarios),
        yticklabels=list(sources),
    )
    for row, column in zip(*np.nonzero(np.isnan(values) & (text != "")), strict=True):
        axes.text(column + 0.5, row + 0.5, text[row, column], ha="center", va="center", fontsize=6.8, color="#555555")
    axes.set_facecolor("#eeeeee")
    axes.tick_params(length=0, labelsize=8)
    axes.tick_params(axis="y", labelrotation=0)
    axes.tick_params(axis="x", labelrotation=30 if len(scenarios) > 3 else 0)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right" if len(scenarios) > 3 else "center")


def _apart(rows: polars.DataFrame, tolerances: Mapping[str, float]) -> dict[str, set[tuple[str, str, str]]]:
    """By strategy: source, scenario and level of masks that leave another inlier ratio than their random control."""
    keys = ["strategy", "source", "scenario", "level"]
    apart: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    ratios = rows.filter((polars.col("metric") == "inlier_ratio") & polars.col("estimate").is_finite())
    beyond = (polars.col("metric") == "reduction_over_random") & polars.col("estimate").is_finite()
    masks = ratios.filter(polars.col("matched_to").is_null()).select(*keys, own="estimate")
    random = ratios.filter(polars.col("strategy") == RANDOM).select(
        strategy="matched_to", source="source", scenario="scenario", level="level", random="estimate"
    )
    compared = masks.join(rows.filter(beyond), on=keys, how="semi").join(random, on=keys)
    for strategy, source, scenario, level, ratio, by_chance in compared.iter_rows():
        if not at_most(abs(ratio - by_chance), tolerances.get(scenario, INLIER_TOLERANCE)):
            apart[strategy].add((source, scenario, level))
    return apart


def _points(share: float) -> str:
    return f"{round(100 * share):d}"


def _rank(level: str) -> int:
    stem = level.split("/")[0]
    return _PREFERRED.index(stem) if stem in _PREFERRED else len(_PREFERRED)
