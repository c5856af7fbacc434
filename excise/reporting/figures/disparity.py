"""The figure of an audit: disparity, gap left and inlier ratio of every strategy and level side by side.

Here: all masks of one scenario in one panel per metric. Not here: one strategy's levels alone (see `levels`).
It draws the estimates of `excise.evaluation.numbers` and makes none (BDB, Fig. 2; controls by method, part C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars

from excise.conditions import (
    ALL,
    ALL_CONTEXTS,
    CROSS_CONTEXT,
    NO_LEVEL,
    NO_STRATEGY,
    OWN_SCENARIO,
    PROMPT_SPECIFIC,
    RANDOM,
    UNPRUNED,
    WITHIN_CONTEXT,
    Condition,
)
from excise.evaluation.rounding import floor_text, level_label
from excise.evaluation.table import Estimate, MetricTable, Verdicts, read_metrics, read_verdicts
from excise.evaluation.thresholds import INLIER_FLOOR
from excise.reporting.figures.canvas import (
    COLLAPSED,
    CONTROL_GREY,
    CUT,
    FLOOR_RED,
    INK,
    UNDEFINED,
    WIDTH,
    Colour,
    blank_figure,
    drawing,
    interval_bar,
    legend_title,
    limits_of,
    mark_cut_ends,
    mark_handles,
    mark_missing,
    palette,
    ring,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

GAP_LEFT_TOP = 250.0
"""Percent of the unpruned gap up to which the panel of what is left is drawn."""
_CROWDED = 60  # marks of a panel, controls not counted, above which every level gets its own panel
MARKERS = {
    NO_LEVEL: "D",
    PROMPT_SPECIFIC: "o",
    WITHIN_CONTEXT: "s",
    CROSS_CONTEXT: "^",
    ALL_CONTEXTS: "v",
    OWN_SCENARIO: "P",
}


def disparity_by_level(
    metrics: polars.DataFrame,
    *,
    verdicts: polars.DataFrame | None = None,
    inlier_floor: float = INLIER_FLOOR,
    controls: Sequence[str] = (RANDOM,),
) -> Figure:
    """|SMD| per variation for the unpruned model and every strategy and level, the inlier ratios below (BDB, Fig. 2).

    Between the two: the share of the raw gap that is left, because noise alone lowers |SMD| (method, part C); the
    panel is left out when no mask has a gap reduction. Bars are 95 % intervals, dashed lines the means over
    variations, grey hollow marks the matched controls named in `controls`, drawn beside their strategy. A triangle at
    the edge stands for an interval or a gap that goes on beyond it, a cross for a figure that is not defined, a filled
    one for answers that collapsed. A red ring surrounds strategies' masks that break a budget by `verdicts`, of
    `excise.evaluation.verdicts`. Errors as `excise.evaluation.table.read_metrics`.
    """
    table = read_metrics(metrics)
    strategies = [mask for mask in table.masks if not mask.is_control]
    drawn_controls = [mask for mask in table.masks if mask.is_control and mask.strategy in controls]
    slots = [UNPRUNED, *(mask for mask in strategies if mask != UNPRUNED)]
    blocks = [*table.variations, *([ALL] if table.has_aggregate and len(table.variations) > 1 else [])]
    panels = [_Panel("abs_smd", "|SMD|\n(pooled deviations)", 1.5)]
    if any(metric == "gap_reduction" and known.value is not None for (_, _, metric), known in table.estimates.items()):
        panels.append(_Panel("gap_left", "raw gap left\n(% of unpruned)", 1.2))
    levels = list(dict.fromkeys(mask.level for mask in slots[1:]))
    if len(blocks) * len(slots) > _CROWDED and len(levels) > 1:
        panels = [_Panel(panel.metric, panel.label, 1.1, level) for panel in panels for level in levels]
    panels.append(_Panel("inlier_ratio", "inlier ratio", 1.0))
    with drawing():
        heights = [panel.height for panel in panels]
        legend_rows = math.ceil((len(slots) + 1) / 3)
        figure = blank_figure((WIDTH, 0.7 + 1.75 * sum(heights) + 0.18 * legend_rows))
        axes = list(figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
        looks, judged = _looks(slots), JudgedTable(table, read_verdicts(verdicts))
        for room, panel in zip(axes, panels, strict=True):
            shown = [mask for mask in slots if panel.level is None or mask.level in (NO_LEVEL, panel.level)]
            _disparity_panel(room, judged, panel, blocks, shown, drawn_controls, looks)
        inlier_axis(axes[-1], inlier_floor)
        for room in axes:
            mark_cut_ends(room)
        ticks = ["mean" if block == ALL else block.replace(" ", "\n") for block in blocks]
        axes[-1].set_xticks(range(len(blocks)), ticks)
        axes[-1].set_xlim(-0.5, len(blocks) - 0.5)
        figure.suptitle(f"{table.scenario}: {table.model}", fontsize=10)
        names = [
            known.names
            for (_, _, metric), known in table.estimates.items()
            if metric in ("smd", "abs_smd") and known.has_interval
        ]
        kinds = list(dict.fromkeys(control.strategy for control in drawn_controls))
        _disparity_legend(figure, slots, looks, kinds, blocks, mark_handles(axes), names)
    return figure


@dataclass(frozen=True)
class _Panel:
    """A row of the disparity figure: its metric, axis label, relative height, and the one level shown (None: all)."""

    metric: str
    label: str
    height: float
    level: str | None = None


def _disparity_panel(
    axes: Axes,
    judged: JudgedTable,
    panel: _Panel,
    blocks: Sequence[str],
    slots: Sequence[Condition],
    controls: Sequence[Condition],
    looks: dict[Condition, Look],
) -> None:
    table = judged.table
    size = 4.2 if len(blocks) * len(slots) > 50 else 6.0
    step = 0.84 / len(slots)  # of the width between two variations
    values: list[float] = [100.0] if panel.metric == "gap_left" else [0.0]
    beyond = False
    bounds: list[float] = []
    for block, variation in enumerate(blocks):
        if block % 2 == 1:
            axes.axvspan(block - 0.5, block + 0.5, color="#f4f4f4", zorder=0, linewidth=0)
        for slot, mask in enumerate(slots):
            place = block + (slot - (len(slots) - 1) / 2) * step
            beside = [known for known in controls if (known.matched_to, known.level) == (mask.strategy, mask.level)]
            share = step / (len(beside) + 1)
            for order, drawn in enumerate((mask, *beside)):
                known = drawn_estimate(table, variation, drawn, panel.metric)
                at = place + (order - len(beside) / 2) * share
                colour = looks[mask].colour if order == 0 else CONTROL_GREY
                grown = panel.metric == "gap_left" and (known.value or 0.0) > GAP_LEFT_TOP
                if grown and not table.collapsed(variation, drawn):
                    # A wrecked model's gap may be any size; an arrow at the edge stands for it.
                    axes.plot([at], [0.95 * GAP_LEFT_TOP], marker="^", color=colour, markersize=0.85 * size, label=CUT)
                    beyond = True
                    continue
                look = Look(colour, looks[mask].marker, size if order == 0 else 0.85 * size, hollow=order > 0)
                marked = mark_estimate(axes, at, judged, variation, drawn, panel.metric, look)
                if marked and known.value is not None:
                    values.append(known.value)
                    bounds += [end for end in (known.low, known.high) if end is not None]
    if ALL in blocks:
        for mask in slots:
            if panel.metric != "inlier_ratio" and table.collapsed(ALL, mask):
                continue
            mean = drawn_estimate(table, ALL, mask, panel.metric).value
            if mean is not None and not (panel.metric == "gap_left" and mean > GAP_LEFT_TOP):
                axes.axhline(
                    mean, color=looks[mask].colour, linewidth=0.9, linestyle=dashes(mask.level), alpha=0.75, zorder=1
                )
    if panel.metric != "inlier_ratio":
        high = limits_of(values, bounds)[1]
        axes.set_ylim(0.0, max(1.03 * high, 1.06 * max(values), 0.1))
    if panel.metric == "gap_left":
        axes.set_ylim(0.0, GAP_LEFT_TOP if beyond else min(axes.get_ylim()[1], GAP_LEFT_TOP))
        axes.axhline(100.0, color=INK, linewidth=0.9, zorder=1)
    if panel.level is not None:
        axes.set_title(level_label(panel.level), fontsize=9, loc="left")
    axes.set_ylabel(panel.label)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)


@dataclass(frozen=True)
class JudgedTable:
    """A scenario's metrics, and the verdicts that say which masks break a budget."""

    table: MetricTable
    verdicts: Verdicts


@dataclass(frozen=True)
class Look:
    """How an estimate is marked. hollow: as a control's."""

    colour: Colour
    marker: str
    size: float = 6.0
    hollow: bool = False


def mark_estimate(
    axes: Axes, place: float, judged: JudgedTable, variation: str, mask: Condition, metric: str, look: Look
) -> bool:
    """Draws a mask's estimate as a mark with its interval as a bar, hollow for controls; whether it is defined.

    In place of one that is not, or that is made of answers which collapsed, stands a cross at the panel's edge; nothing
    where the mask was not evaluated on the variation. A ring surrounds a mask that breaks a budget, unless
    it is hollow.
    """
    table, colour, hollow = judged.table, look.colour, look.hollow
    known = drawn_estimate(table, variation, mask, metric)
    collapsed = metric != "inlier_ratio" and bool(table.collapsed(variation, mask))
    if collapsed or known.value is None:
        if mask in table.masks_of(variation):
            mark_missing(axes, place, colour, COLLAPSED if collapsed else UNDEFINED)
        return False
    zorder = 3 if hollow else 4
    if known.low is not None and known.high is not None:
        interval_bar(
            axes, place, known.low, known.high, color=colour, linewidth=0.8 if hollow else 1.2, zorder=zorder - 0.5
        )
    axes.plot(
        [place],
        [known.value],
        marker=look.marker,
        color=colour,
        markersize=look.size,
        linestyle="none",
        zorder=zorder,
        markerfacecolor="white" if hollow else colour,
        markeredgewidth=1.0 if hollow else 0.0,
    )
    if not hollow and (verdict := judged.verdicts.get((variation, mask))) is not None and verdict.failed:
        ring(axes, place, known.value, look.size)
    return True


def drawn_estimate(table: MetricTable, variation: str, mask: Condition, metric: str) -> Estimate:
    """The estimate as drawn: `gap_left` in percent, `abs_smd` from the signed SMD where it is not given."""
    if metric == "gap_left":
        removed = table.get(variation, mask, "gap_reduction")
        if mask == UNPRUNED:
            return Estimate(100.0)
        low, value, high = (
            None if part is None else 100 * (1 - part) for part in (removed.high, removed.value, removed.low)
        )
        return Estimate(value, None if low is None else max(low, 0.0), high)
    known = table.get(variation, mask, metric)
    if metric == "abs_smd" and known.value is None and variation != ALL:
        signed = table.get(variation, mask, "smd")
        if signed.value is None or signed.low is None or signed.high is None:
            return Estimate(None if signed.value is None else abs(signed.value))
        ends = sorted((abs(signed.low), abs(signed.high)))
        return Estimate(abs(signed.value), 0.0 if signed.covers_zero else ends[0], ends[1])
    return known


def inlier_axis(axes: Axes, floor: float) -> None:
    """Limits of a panel of inlier ratios and the line of their floor."""
    low, _ = axes.get_ylim()
    axes.set_ylim(min(low, floor - 0.1), 1.005)
    axes.axhline(floor, color=FLOOR_RED, linewidth=1.1, zorder=1)
    axes.annotate(
        f"floor {floor_text(floor)}",
        (1.0, floor),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-4, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color=FLOOR_RED,
        fontsize=8,
    )


def _looks(slots: Sequence[Condition]) -> dict[Condition, Look]:
    strategies = sorted({mask.strategy for mask in slots if mask.strategy != NO_STRATEGY})
    colours: dict[str, Colour] = dict(zip(strategies, palette(len(strategies)), strict=True))
    return {mask: Look(colours.get(mask.strategy, INK), MARKERS.get(mask.level, "v")) for mask in slots}


def _disparity_legend(
    figure: Figure,
    slots: Sequence[Condition],
    looks: dict[Condition, Look],
    controls: Sequence[str],
    blocks: Sequence[str],
    marks: Sequence[Line2D],
    names: Sequence[int | None],
) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for mask in slots:
        look = looks[mask]
        name = NO_STRATEGY if mask == UNPRUNED else f"{mask.strategy}, {level_label(mask.level)}"
        handles.append(
            Line2D(
                [],
                [],
                color=look.colour,
                marker=look.marker,
                markersize=6,
                linewidth=0.9,
                linestyle=dashes(mask.level) if ALL in blocks else "none",
                label=name,
            )
        )
    if controls:
        name = f"{controls[0] if len(controls) == 1 else 'a'} control of the mark to its left"
        handles.append(
            Line2D(
                [],
                [],
                color=CONTROL_GREY,
                marker="o",
                markersize=5,
                markerfacecolor="white",
                linestyle="none",
                label=name,
            )
        )
    handles += marks
    title = legend_title(
        "bars",
        names,
        "dashed: means over variations" if ALL in blocks else "",
        f"controls, where there are several: {', '.join(controls)}" if len(controls) > 1 else "",
    )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        handlelength=3.2,
        title=title,
        title_fontsize=8.5,
    )


def dashes(level: str) -> tuple[float, tuple[float, ...]]:
    """The line style of a level's mean."""
    return (0, {NO_LEVEL: (6, 2), PROMPT_SPECIFIC: (4, 2), WITHIN_CONTEXT: (2, 2)}.get(level, (1, 1.5)))
