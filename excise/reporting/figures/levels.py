"""The figure of generality: one strategy's bias at every level, from the mask of the same prompt to other contexts.

Here: BDB's Fig. 2, one panel column for each strategy. Not here: all strategies against each other (see `disparity`).
How the levels come about is method A8; each mark stands beside the random control of its own size.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars

from excise.conditions import (
    ALL,
    LEVELS,
    NO_LEVEL,
    UNPRUNED,
    Condition,
)
from excise.errors import ExciseError
from excise.evaluation.rounding import floor_text, level_label
from excise.evaluation.table import MetricTable, read_metrics, read_verdicts
from excise.evaluation.thresholds import INLIER_FLOOR
from excise.reporting.figures.canvas import (
    CONTROL_GREY,
    FLOOR_RED,
    INK,
    WIDTH,
    blank_figure,
    drawing,
    legend_title,
    limits_of,
    mark_cut_ends,
    mark_handles,
    palette,
)
from excise.reporting.figures.disparity import MARKERS, JudgedTable, Look, dashes, drawn_estimate, mark_estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_METRICS = ("abs_smd", "smd", "inlier_ratio")


def bias_by_level(
    metrics: polars.DataFrame,
    *,
    majority: str = "majority",
    minority: str = "minority",
    verdicts: polars.DataFrame | None = None,
    inlier_floor: float = INLIER_FLOOR,
) -> Figure:
    """|SMD|, signed SMD and inlier ratio per variation, unpruned and at the levels (BDB, Fig. 2).

    `metrics` is one scenario's frame; every strategy in it that is no control has three panels below each other:
    bars are 95 % intervals, dashed lines each level's mean over the variations, grey hollow marks the matched random
    control of the mark to their left. Cross-context is the pooled level; single source scenarios are
    `transfer_heat_map`'s. A panel's scale is the same for all strategies. `majority` and `minority` are the groups'
    labels. A red ring surrounds masks that break a budget by `verdicts`, of `excise.evaluation.verdicts`.

    Raises ExciseError when no strategy has a mask at one of the levels, and as `excise.evaluation.table.read_metrics`.
    """
    table = read_metrics(metrics)
    judged = JudgedTable(table, read_verdicts(verdicts))
    levels: dict[str, list[str]] = {}
    for mask in table.masks:
        if not mask.is_control and mask.level in LEVELS:
            levels.setdefault(mask.strategy, []).append(mask.level)
    if not levels:
        raise ExciseError(f"metrics: no strategy at {', '.join(LEVELS)}; evaluate a strategy's masks first")
    blocks = [*table.variations, *([ALL] if table.has_aggregate and len(table.variations) > 1 else [])]
    across = min(len(levels), 1 if len(blocks) > 4 else 2 if len(blocks) > 1 else 3)
    down = math.ceil(len(levels) / across)
    colours = dict(zip((NO_LEVEL, *LEVELS), [_rgb(INK), *palette(len(LEVELS))], strict=True))
    with drawing():
        figure = blank_figure((WIDTH if across > 1 or len(blocks) > 4 else 5.0, 1.1 + 4.3 * down))
        rooms = figure.subfigures(down, across, squeeze=False)
        panels: dict[str, list[Axes]] = {metric: [] for metric in _METRICS}
        for index, (strategy, known) in enumerate(levels.items()):
            room = rooms[index // across][index % across]
            room.suptitle(strategy, fontsize=9.5, fontweight="bold")
            axes = room.subplots(3, 1, sharex=True, height_ratios=(1.3, 1.3, 1.0))
            masks = [UNPRUNED, *(Condition(strategy, level) for level in LEVELS if level in known)]
            for metric, panel in zip(_METRICS, axes, strict=True):
                _draw(panel, judged, metric, blocks, masks, colours)
                panels[metric].append(panel)
            if index % across == 0:
                labels = ("|SMD|", f"SMD\n+: {majority} more\n−: {minority} more", "inlier ratio")
                for panel, label in zip(axes, labels, strict=True):
                    panel.set_ylabel(label)
            chars = max(8, round(90 / across / len(blocks)))
            ticks = [
                "mean" if block == ALL else textwrap.fill(block, chars, break_long_words=False) for block in blocks
            ]
            axes[-1].set_xticks(range(len(blocks)), ticks)
            axes[-1].set_xlim(-0.5, len(blocks) - 0.5)
        _limits(table, panels, blocks, levels, inlier_floor)
        figure.suptitle(f"{table.scenario}: {table.model}", fontsize=10)
        drawn = [level for level in LEVELS if any(level in known for known in levels.values())]
        controls = any(
            Condition(strategy, level).control in table.masks for strategy, known in levels.items() for level in known
        )
        marks = mark_handles([panel for known in panels.values() for panel in known])
        names = [
            known.names
            for (_, _, metric), known in table.estimates.items()
            if metric in _METRICS and known.has_interval
        ]
        several = len(table.variations) > 1
        figure.legend(
            handles=[*_handles(drawn, colours, inlier_floor, several=several, controls=controls), *marks],
            loc="outside lower center",
            ncols=3 if across > 1 or len(blocks) > 4 else 2,
            frameon=False,
            handlelength=3.0,
            columnspacing=1.4,
            title=legend_title("bars", names, "dashed: means over variations" if several else ""),
            title_fontsize=8.5,
        )
    return figure


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def _draw(
    axes: Axes,
    judged: JudgedTable,
    metric: str,
    blocks: Sequence[str],
    masks: Sequence[Condition],
    colours: dict[str, tuple[float, float, float]],
) -> None:
    table = judged.table
    step = 0.84 / len(masks)
    size = 5.0 if len(blocks) > 4 else 6.0
    for block, variation in enumerate(blocks):
        if block % 2 == 1:
            axes.axvspan(block - 0.5, block + 0.5, color="#f4f4f4", zorder=0, linewidth=0)
        for slot, mask in enumerate(masks):
            place = block + (slot - (len(masks) - 1) / 2) * step
            colour, marker = colours[mask.level], MARKERS[mask.level]
            controlled = mask != UNPRUNED and mask.control in table.masks
            aside = 0.22 * step if controlled else 0.0
            mark_estimate(axes, place - aside, judged, variation, mask, metric, Look(colour, marker, size))
            if controlled:
                look = Look(CONTROL_GREY, marker, 0.8 * size, hollow=True)
                mark_estimate(axes, place + aside, judged, variation, mask.control, metric, look)
    if len(table.variations) > 1:
        for mask in masks:
            if metric != "inlier_ratio" and table.collapsed(ALL, mask):
                continue
            mean = _mean(table, mask, metric)
            if mean is not None:
                axes.axhline(
                    mean, color=colours[mask.level], linewidth=1.0, linestyle=dashes(mask.level), alpha=0.8, zorder=1
                )
    if metric == "smd":
        axes.axhline(0.0, color=INK, linewidth=0.8, zorder=0.9)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)


def _mean(table: MetricTable, mask: Condition, metric: str) -> float | None:
    """The level's mean over variations: the one that was estimated, else that of the estimates there are."""
    known = drawn_estimate(table, ALL, mask, metric).value
    if known is not None:
        return known
    values = [drawn_estimate(table, variation, mask, metric).value for variation in table.variations]
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _limits(
    table: MetricTable,
    panels: dict[str, list[Axes]],
    blocks: Sequence[str],
    levels: dict[str, list[str]],
    inlier_floor: float,
) -> None:
    """One scale per metric, and a mark where an interval goes on beyond it."""
    masks = [UNPRUNED]
    for strategy, known in levels.items():
        of_strategy = [Condition(strategy, level) for level in known]
        masks += of_strategy + [mask.control for mask in of_strategy]
    for metric in ("abs_smd", "smd"):
        drawn = [
            drawn_estimate(table, block, mask, metric)
            for block in blocks
            for mask in masks
            if not table.collapsed(block, mask)
        ]
        values = [0.0, *(known.value for known in drawn if known.value is not None)]
        ends = [end for known in drawn if known.value is not None for end in (known.low, known.high) if end is not None]
        low, high = limits_of(values, ends)
        high = max(1.03 * high, 1.08 * max(values), 0.1)
        low = min(1.03 * low, 1.08 * min(values), 0.0)
        for panel in panels[metric]:
            panel.set_ylim((0.0 if metric == "abs_smd" else low) - 0.03 * (high - low), high)
    lowest = min(panel.get_ylim()[0] for panel in panels["inlier_ratio"])
    for panel in panels["inlier_ratio"]:
        panel.set_ylim(min(lowest, inlier_floor - 0.1), 1.005)
        panel.axhline(inlier_floor, color=FLOOR_RED, linewidth=1.1, zorder=1)
    for panel in (panel for known in panels.values() for panel in known):
        mark_cut_ends(panel)


def _handles(
    levels: Sequence[str],
    colours: dict[str, tuple[float, float, float]],
    floor: float,
    *,
    several: bool,
    controls: bool,
) -> list[Line2D]:
    """Legend entries of levels, of their controls and of the floor. several: whether means are drawn."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=colours[level],
            marker=MARKERS[level],
            markersize=6,
            linewidth=1.0,
            linestyle=dashes(level) if several else "none",
            label=name,
        )
        for level, name in ((NO_LEVEL, "unpruned"), *((level, level_label(level)) for level in levels))
    ]
    if controls:
        handles.append(
            Line2D(
                [],
                [],
                color=CONTROL_GREY,
                marker="o",
                markersize=5,
                markerfacecolor="white",
                linestyle="none",
                label="random control of the mark to its left",
            )
        )
    floor_name = f"floor of the inlier ratio, {floor_text(floor)}"
    handles.append(Line2D([], [], color=FLOOR_RED, linewidth=1.1, label=floor_name))
    return handles
