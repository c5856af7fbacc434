"""The figure of the answers themselves: how they are distributed in each group, by variation.

Here: boxes, names and means as they were parsed. Not here: any disparity (see `disparity` and `levels`).
Every other figure sums these answers up; this one shows whether a summary of them means anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars

from excise.errors import ExciseError
from excise.reporting.figures.canvas import (
    INK,
    WIDTH,
    axis_number,
    blank_figure,
    drawing,
    note,
    palette,
    require_columns,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def answers_by_group(
    completions: polars.DataFrame, *, unit: str, majority: str, minority: str, scale: str = "linear"
) -> Figure:
    """The distribution of the parsed answers by group, one panel for each variation.

    Boxes hold the middle half of a group's answers, whiskers the middle 90 %, dots are the means of single names
    and the black bar is the group's mean. `completions` has columns variation, group, subject and value (null:
    unparsed); `majority` and `minority` are group keys and are drawn first, other groups after them. `scale` is
    "log" or "linear"; a log axis cannot show answers of 0 or less, and none shows infinite ones, so a panel says how
    many it lacks.

    Raises ExciseError on a missing column, no rows, an unknown scale, or when neither group occurs.
    """
    if scale not in ("log", "linear"):
        raise ExciseError(f"outcome.scale: {scale!r} is unknown; choose 'log' or 'linear'")
    require_columns(completions, "completions", ("variation", "group", "subject", "value"))
    known = completions["group"].unique().sort().to_list()
    if majority not in known and minority not in known:
        raise ExciseError(f"completions: neither {majority!r} nor {minority!r} among the groups {', '.join(known)}")
    groups = [majority, minority, *(group for group in known if group not in (majority, minority))]
    variations = completions["variation"].unique(maintain_order=True).to_list()
    across = len(variations) if len(variations) <= 4 else 5 if len(variations) > 8 else 4
    down = math.ceil(len(variations) / across)
    with drawing():
        figure = blank_figure((min(WIDTH, 1.6 + 2.6 * across), 0.6 + (3.2 if down == 1 else 2.6) * down))
        axes = figure.subplots(down, across, squeeze=False)
        colours = palette(len(groups))
        for index, variation in enumerate(variations):
            panel = axes[index // across][index % across]
            _answers_panel(panel, completions.filter(polars.col("variation") == variation), groups, colours, scale)
            panel.set_title(variation)
            panel.set_ylabel(f"answer ({unit})" if index % across == 0 else "")
        for index in range(len(variations), across * down):
            axes[index // across][index % across].set_visible(False)
        _answers_legend(figure, narrow=across == 1)
    return figure


def _answers_legend(figure: Figure, *, narrow: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor="#dddddd", edgecolor="#777777", label="middle half of the answers, middle 90 %"),
        Line2D([], [], color="#777777", marker="o", markersize=3, linestyle="none", label="mean of one name"),
        Line2D([], [], color=INK, linewidth=2, label="mean of the group"),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=1 if narrow else 3,
        frameon=False,
        title="below each group: share of its answers parsed",
        title_fontsize=8.5,
    )


def _answers_panel(axes: Axes, frame: polars.DataFrame, groups: Sequence[str], colours: Sequence, scale: str) -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    ticks, hidden, infinite, shown = [], 0, 0, 0
    for position, (group, colour) in enumerate(zip(groups, colours, strict=True)):
        rows = frame.filter(polars.col("group") == group)
        parsed = rows.filter(polars.col("value").is_not_null() & polars.col("value").is_not_nan())
        finite = parsed.filter(polars.col("value").is_finite())
        infinite += parsed.height - finite.height
        drawn = finite.filter(polars.col("value") > 0) if scale == "log" else finite
        hidden += finite.height - drawn.height
        shown += drawn.height
        ticks.append(f"{group}\n{_share(parsed.height, rows.height)}")
        if drawn.is_empty():
            continue
        axes.boxplot(
            [drawn["value"].to_numpy()],
            positions=[position],
            widths=0.62,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            zorder=2,
            boxprops={"facecolor": (*colour, 0.28), "edgecolor": colour, "linewidth": 1.2},
            medianprops={"color": colour, "linewidth": 1.6},
            whiskerprops={"color": colour, "linewidth": 1.2},
            capprops={"color": colour, "linewidth": 1.2},
        )
        means = drawn.group_by("subject", maintain_order=True).agg(polars.col("value").mean())["value"].to_numpy()
        spread = position + generator.uniform(-0.2, 0.2, len(means))
        axes.scatter(spread, means, s=9, color=colour, edgecolor="white", linewidth=0.3, zorder=3)
        mean: float | None = drawn.select(polars.col("value").mean()).item()
        assert mean is not None  # groups without a drawn answer are left out above
        axes.plot([position - 0.36, position + 0.36], [mean, mean], color=INK, linewidth=2, zorder=4)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_xticks(range(len(groups)), ticks)
    axes.grid(axis="x", visible=False)
    lacking = [f"{hidden:,} of 0 or less"] * bool(hidden) + [f"{infinite:,} infinite"] * bool(infinite)
    if lacking:
        text = f"{' and '.join(lacking)} not shown"
        axes.annotate(text, (0.5, 0.01), xycoords="axes fraction", ha="center", fontsize=7.5)
    if shown == 0:
        axes.set_yticks([])
        note(axes, "no parsed answer to draw")
        return
    _value_axis(axes, scale)


def _value_axis(axes: Axes, scale: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if scale == "log":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # Less than a decade shows too few powers of ten, so intermediate steps get their own labels.
        steps: tuple[float, ...] = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 1000 else (1,)
        if high / low < 5:
            steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: axis_number(value)))


def _share(part: int, whole: int) -> str:
    if whole == 0:
        return "none"
    percent = 100 * part / whole
    return "> 99 %" if 99.5 <= percent < 100 else f"{percent:.0f} %"
