"""The figure of what axes share: do heads that carry one bias carry another?

Here: correlations of head impacts between axes, and the overlap of their most harmful heads (FASP, section 6; method,
B6). Not here: these estimates (see `excise.evaluation.bias_correlation`), and the impacts of single heads (see
`head_map`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars

from excise.errors import ExciseError
from excise.evaluation.bias_correlation import ALL_HEADS, ORDINARY_HEADS
from excise.reporting.figures.canvas import WIDTH, blank_figure, drawing, note, require_columns, require_one

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = (
    "model",
    "scenario",
    "measure",
    "other_scenario",
    "other_measure",
    "heads",
    "statistic",
    "estimate",
    "low",
    "high",
)
_STATISTICS = {"pearson": "Pearson", "spearman": "Spearman", "top_excess": "top fifth shared,\nbeyond chance"}
_HEADS = {ALL_HEADS: "all heads", ORDINARY_HEADS: "without catastrophic heads"}
_WITHIN = {"z_ppl": "perplexity", "z_mean": "mean toxicity"}


def impact_correlation(correlations: polars.DataFrame) -> Figure:
    """Correlations of z_bias between axes, of one model, with and without catastrophic heads, as heat maps.

    `correlations` is what `impact_correlations` gives. Columns behind the line hold an axis's z_bias against its own
    impacts on perplexity and on mean toxicity. Right: the share of the most harmful fifth of the heads that two axes
    have in common, less what chance gives. A star stands where the 95 % interval covers 0.

    Raises ExciseError on a missing column, no rows, or several models.
    """
    require_columns(correlations, "bias_correlation", _COLUMNS)
    require_one(correlations, "bias_correlation", ("model",))
    named = [*correlations["scenario"], *correlations["other_scenario"]]
    axes_names = list(dict.fromkeys(named))
    within = [measure for measure in _WITHIN if measure in correlations["other_measure"].to_list()]
    if len(axes_names) < 2 and not within:
        raise ExciseError("bias_correlation: one axis alone has nothing to correlate with; add another")
    count = len(axes_names)
    with drawing(grid="white"):
        widths = [count + len(within), count + len(within), count]
        figure = blank_figure((max(WIDTH, 0.42 * sum(widths) + 2.0), 1.4 + 2 * (0.5 + 0.42 * max(count, 3))))
        panels = figure.subplots(2, 3, squeeze=False, width_ratios=widths)
        for row, (heads, title) in enumerate(_HEADS.items()):
            for column, statistic in enumerate(_STATISTICS):
                shown = correlations.filter(
                    (polars.col("heads") == heads)
                    & (polars.col("statistic") == statistic)
                    & (polars.col("measure") == "z_bias")
                )
                panel = panels[row][column]
                _panel(panel, shown, axes_names, within if column < 2 else [])
                panel.set_title(_STATISTICS[statistic] if row == 0 else "", fontsize=9.5)
                panel.tick_params(labelbottom=row == 1, labelleft=column == 0)
            panels[row][0].set_ylabel(title, fontsize=9)
        figure.suptitle(
            f"{correlations['model'][0]}: impacts of the same heads on different biases\n"
            "* the 95 % interval covers 0; blue: heads that carry one carry the other; grey: not defined",
            fontsize=9.5,
        )
    return figure


def _panel(axes: Axes, rows: polars.DataFrame, names: Sequence[str], within: Sequence[str]) -> None:
    import seaborn

    values = np.full((len(names), len(names) + len(within)), np.nan)
    text = np.full(values.shape, "", dtype=object)
    for row in rows.iter_rows(named=True):
        if row["estimate"] is None or not math.isfinite(row["estimate"]):
            continue
        one, other = names.index(row["scenario"]), names.index(row["other_scenario"])
        if row["other_measure"] == "z_bias":
            places = [(one, other), (other, one)]
        elif row["other_measure"] in within:
            places = [(one, len(names) + within.index(row["other_measure"]))]
        else:
            continue
        for place in places:
            values[place] = row["estimate"]
            text[place] = _cell(row)
    columns = [*names, *(_WITHIN[measure] for measure in within)]
    if np.isnan(values).all():
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks([])
        note(axes, "none")
    else:
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
            annot_kws={"fontsize": 7.5},
            linewidths=0.6,
            linecolor="white",
            xticklabels=[column.replace("_", " ") for column in columns],
            yticklabels=[name.replace("_", " ") for name in names],
        )
        if within:
            axes.axvline(len(names), color="#444444", linewidth=1.2)
    axes.set_facecolor("#eeeeee")
    axes.tick_params(length=0, labelsize=8)
    axes.tick_params(axis="y", labelrotation=0)
    axes.tick_params(axis="x", labelrotation=40)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")


def _cell(row: dict) -> str:
    star = "*" if row["low"] is not None and row["high"] is not None and row["low"] <= 0 <= row["high"] else ""
    value = round(row["estimate"], 2) + 0.0
    return f"{value:.2f}".replace("0.", ".", 1) + star if abs(value) < 1 else f"{value:.0f}{star}"
