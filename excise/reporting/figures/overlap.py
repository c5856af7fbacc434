"""The figure of overlap: how much of every variation's mask lies in those of one scenario.

Here: BDB's Fig. 3, beside it what is left of it above chance. Not here: the counting (see `excise.evaluation.overlap`).
Overlap is asymmetric and means little without its chance level, the density of the column's mask, printed above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import polars

from excise.evaluation.rounding import level_label
from excise.reporting.figures.canvas import WIDTH, blank_figure, drawing, percent, require_columns, require_one

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

_COLUMNS = (
    "model",
    "strategy",
    "level",
    "scenario",
    "variation",
    "reference_scenario",
    "reference_variation",
    "overlap",
    "chance",
    "excess",
)
_LONGEST = 24


def overlap_heat_map(overlaps: polars.DataFrame) -> Figure:
    """The share of each row's mask that lies in each column's, in percent, and that share less chance (BDB, Fig. 3).

    `overlaps` holds rows of the table `mask_overlap` of one model, strategy, level and reference scenario, whose
    variations are the columns; rows are every variation of every scenario, the reference scenario's first. A mask's
    overlap with itself is left out of the colour scales. Grey cells: the row's mask is empty.

    Raises ExciseError on a missing column, no rows, several strategies, levels, models or reference scenarios.
    """
    import numpy as np

    require_columns(overlaps, "mask_overlap", _COLUMNS)
    require_one(overlaps, "mask_overlap", ("model", "strategy", "level", "reference_scenario"))
    reference = overlaps["reference_scenario"][0]
    pairs = overlaps.select("scenario", "variation").unique(maintain_order=True).rows()
    order = list(dict.fromkeys(scenario for scenario, _ in pairs))
    rows = sorted(pairs, key=lambda pair: (pair[0] != reference, order.index(pair[0])))
    columns = overlaps["reference_variation"].unique(maintain_order=True).to_list()
    share, excess = (np.full((len(rows), len(columns)), np.nan) for _ in range(2))
    chance = dict.fromkeys(columns, float("nan"))
    for scenario, variation, column, value, level, over in overlaps.select(
        "scenario", "variation", "reference_variation", "overlap", "chance", "excess"
    ).iter_rows():
        place = rows.index((scenario, variation)), columns.index(column)
        share[place], excess[place] = (np.nan if known is None else known for known in (value, over))
        chance[column] = np.nan if level is None else level
    itself = np.array([[row == (reference, column) for column in columns] for row in rows])
    with drawing(grid="white"):
        figure = blank_figure((WIDTH, 2.3 + 0.235 * max(len(rows), 6)))
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, share, itself, rows, columns, diverging=False)
        _panel(right, excess, itself, rows, columns, diverging=True)
        left.set_title("overlap: % of the row's mask", fontsize=9)
        right.set_title("excess: overlap less chance, points", fontsize=9)
        above = left.secondary_xaxis("top")
        above.set_xticks([index + 0.5 for index in range(len(columns))], [percent(chance[name]) for name in columns])
        above.tick_params(length=0, labelsize=7.5, labelrotation=90 if len(columns) > 6 else 0, pad=2)
        above.set_xlabel("chance level: density of the column's mask, %", fontsize=8)
        above.spines["top"].set_visible(False)
        right.tick_params(labelleft=False)
        _name_scenarios(figure, left, rows)
        blank = "; grey: the row's mask is empty" if np.isnan(share).any() else ""
        figure.suptitle(
            f"{overlaps['strategy'][0]}, {level_label(overlaps['level'][0])}: {overlaps['model'][0]}\n"
            f"rows: where a mask comes from; columns: the masks of {reference}{blank}",
            fontsize=9.5,
        )
    return figure


def _panel(
    axes: Axes,
    values: np.ndarray,
    itself: np.ndarray,
    rows: Sequence[tuple[str, str]],
    columns: Sequence[str],
    *,
    diverging: bool,
) -> None:
    import numpy as np
    import seaborn

    others = values[~itself & np.isfinite(values)]
    top = max(float(np.abs(others).max()) if others.size else 0.0, 1e-6)
    labels = np.array([[percent(value) for value in row] for row in values]).reshape(values.shape)
    font = 7.0 if len(columns) <= 10 else 5.5
    seaborn.heatmap(
        values,
        ax=axes,
        vmin=-top if diverging else 0.0,
        vmax=top,
        cmap="RdBu" if diverging else "Blues",
        annot=labels,
        fmt="",
        annot_kws={"fontsize": font},
        cbar=False,
        linewidths=0.4,
        linecolor="white",
        xticklabels=[_shortened(column) for column in columns],
        yticklabels=[_shortened(variation) for _, variation in rows],
    )
    axes.set_facecolor("#e2e2e2")
    axes.tick_params(length=0, labelsize=8)
    axes.tick_params(axis="x", labelrotation=90)
    axes.tick_params(axis="y", labelrotation=0)
    for index in range(1, len(rows)):
        if rows[index][0] != rows[index - 1][0]:
            axes.axhline(index, color="#222222", linewidth=1.0)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _name_scenarios(figure: Figure, axes: Axes, rows: Sequence[tuple[str, str]]) -> None:
    """Each scenario's key left of its first row, clear of the longest variation."""
    renderer = cast("FigureCanvasAgg", figure.canvas).get_renderer()
    widest = max(label.get_window_extent(renderer).width for label in axes.get_yticklabels()) * 72 / figure.dpi
    for index, (scenario, _) in enumerate(rows):
        if index == 0 or scenario != rows[index - 1][0]:
            axes.annotate(
                scenario,
                (0.0, index + 0.5),
                xycoords=axes.get_yaxis_transform(),
                xytext=(-widest - 12, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                fontweight="bold",
                annotation_clip=False,
            )


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1].rstrip() + "…"
