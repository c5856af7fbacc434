"""Where in the model masks lie: the pruned share of every matrix, and of every layer among all that is pruned.

Here: layers against roles, for all strategies at once or for one in detail (BDB, Fig. 4). Not here: how far masks lie
in each other (see `overlap`). Counts come from the tables `masks` and `mask_distribution`; no mask is opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars

from excise.conditions import NO_STRATEGY, PLACE, Condition, condition_order
from excise.errors import ExciseError
from excise.evaluation.rounding import level_label
from excise.reporting.figures.canvas import (
    INK,
    WIDTH,
    blank_figure,
    drawing,
    note,
    palette,
    percent,
    require_columns,
    require_one,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def mask_density_by_layer(masks: polars.DataFrame) -> Figure:
    """The pruned share of every matrix, layers by roles, one panel for each strategy and level (BDB, Fig. 4).

    Counts are summed over variations. Beside each heat map stands each layer's share of all pruned weights. Random
    controls have the same counts by construction, so controls are not drawn. `masks` has columns strategy, level,
    matched_to, layer, role, pruned and size. Raises ExciseError on a missing column or when it holds no strategy.
    """
    require_columns(masks, "masks", (*PLACE, "layer", "role", "pruned", "size"))
    of_strategies = masks.filter(polars.col("matched_to").is_null() & (polars.col("strategy") != NO_STRATEGY))
    if of_strategies.is_empty():
        raise ExciseError("masks: only controls or no rows; build the strategies' masks first")
    names = sorted(
        (Condition(*row) for row in of_strategies.select("strategy", "level").unique().iter_rows()),
        key=condition_order,
    )
    layers = sorted(of_strategies["layer"].unique().to_list())
    roles = _in_order(of_strategies["role"].unique().to_list())
    across = min(len(names), 4)
    down = math.ceil(len(names) / across)
    cell_width, cell_height, caption = WIDTH / max(across, 3), 4.3, 0.55
    width, height = max(cell_width * across, 4.5), cell_height * down + caption
    with drawing(grid="white"):
        figure = blank_figure((width, height), layout="none")
        text = "Colour: pruned share of each matrix (%).\nBars: each layer's share of all pruned weights (%)."
        figure.text(0.1 / width, 1 - 0.1 / height, text, va="top", fontsize=9)
        for index, name in enumerate(names):
            rows = of_strategies.filter((polars.col("strategy") == name.strategy) & (polars.col("level") == name.level))
            left, bottom = cell_width * (index % across), cell_height * (down - 1 - index // across)
            # Inches from the cell's corner: a heat map, bars beside it and the colour scale below it.
            wide = cell_width - 0.7
            heat, side, bar = (
                figure.add_axes(((left + x) / width, (bottom + y) / height, w / width, h / height))
                for x, y, w, h in (
                    (0.52, 1.03, 0.66 * wide, 2.7),
                    (0.57 + 0.66 * wide, 1.03, 0.32 * wide, 2.7),
                    (0.52, 0.45, 0.66 * wide, 0.08),
                )
            )
            _density_panel(heat, side, bar, rows, name, layers, roles)
    return figure


def _density_panel(
    heat: Axes,
    side: Axes,
    bar: Axes,
    rows: polars.DataFrame,
    name: Condition,
    layers: Sequence[int],
    roles: Sequence[str],
) -> None:
    import numpy as np
    import seaborn
    from matplotlib.ticker import MaxNLocator

    counts = rows.group_by("layer", "role").agg(polars.col("pruned").sum(), polars.col("size").sum())
    share = np.full((len(layers), len(roles)), np.nan)
    by_layer = np.zeros(len(layers))
    for layer, role, pruned, size in counts.iter_rows():
        share[layers.index(layer), roles.index(role)] = 100 * pruned / size if size else np.nan
        by_layer[layers.index(layer)] += pruned
    total, entries = int(counts["pruned"].sum()), int(counts["size"].sum())
    seaborn.heatmap(
        share,
        ax=heat,
        vmin=0,
        vmax=_top(share),
        cmap="Blues",
        yticklabels=False,
        xticklabels=list(roles),
        cbar_ax=bar,
        cbar_kws={"orientation": "horizontal", "ticks": MaxNLocator(3)},
    )
    bar.set_xlabel("% of the matrix", fontsize=8)
    bar.tick_params(labelsize=8, length=2)
    step = max(1, math.ceil(len(layers) / 12))
    heat.set_yticks([index + 0.5 for index in range(0, len(layers), step)], [str(n) for n in layers[::step]])
    heat.tick_params(axis="y", length=0, labelrotation=0)
    heat.tick_params(axis="x", length=0, labelrotation=90, labelsize=8)
    heat.set_ylabel("layer", labelpad=2)
    for spine in heat.spines.values():
        spine.set_visible(True)
    variations = rows["variation"].n_unique()
    pruned = f"{100 * total / entries:.2g} % pruned" if entries else "no weights"
    heat.set_title(
        f"{name.strategy}\n{level_label(name.level)}\n{pruned}, {variations} mask{'' if variations == 1 else 's'}",
        fontsize=9,
        loc="left",
    )
    if total:
        side.barh(np.arange(len(layers)) + 0.5, 100 * by_layer / total, height=0.8, color=INK)
    else:
        note(heat, "nothing pruned")
    side.set_xlim(left=0)
    side.set_ylim(heat.get_ylim())
    side.set_xlabel("% of all", fontsize=8)
    side.xaxis.set_major_locator(MaxNLocator(2))
    side.tick_params(axis="y", length=0, labelleft=False)
    side.tick_params(axis="x", labelsize=8)
    for edge in ("top", "right", "left"):
        side.spines[edge].set_visible(False)


def mask_distribution_heat_map(distribution: polars.DataFrame) -> Figure:
    """The pruned share of every matrix, layers by roles, and each layer's share of all pruned weights (BDB, Fig. 4).

    `distribution` holds rows of the table `mask_distribution` of one model, strategy and level; counts are summed over
    its masks. In the panel beside, the line is all masks together, the band their range, and the dashed line the
    layer's share of all maskable weights: what pruning without regard to layers would give. Heads are drawn alike.

    Raises ExciseError on a missing column, no rows, and several models, strategies or levels.
    """
    import seaborn
    from matplotlib.ticker import MaxNLocator

    needed = ("model", "scenario", "variation", "strategy", "level", "layer", "role", "pruned", "size")
    require_columns(distribution, "mask_distribution", needed)
    require_one(distribution, "mask_distribution", ("model", "strategy", "level"))
    layers = sorted(distribution["layer"].unique().to_list())
    roles = _in_order(distribution["role"].unique().to_list())
    share, by_layer, uniform, ranges = _shares(distribution, layers, roles)
    height = 1.5 + min(max(0.19 * len(layers), 2.4), 7.0)
    wide = 0.52 * max(len(roles), 3)
    with drawing(grid="white"):
        figure = blank_figure((min(WIDTH, wide + 5.2), height))
        heat, side = figure.subplots(1, 2, width_ratios=(wide, 3.2))
        seaborn.heatmap(
            share,
            ax=heat,
            vmin=0,
            vmax=_top(share),
            cmap="Blues",
            xticklabels=[_role(role) for role in roles],
            yticklabels=False,
            cbar_kws={"pad": 0.03, "aspect": 40, "ticks": MaxNLocator(4)},
            linewidths=0.3,
            annot=_cells(share) if len(layers) <= 40 else None,
            fmt="",
            annot_kws={"fontsize": 6.8},
        )
        heat.set_facecolor("#e2e2e2")
        heat.set_title("% of the matrix pruned", fontsize=9)
        heat.set_ylabel("layer")
        step = max(1, math.ceil(len(layers) / 40))
        places = [index + 0.5 for index in range(0, len(layers), step)]
        heat.set_yticks(places, [str(layer) for layer in layers[::step]])
        heat.tick_params(length=0, labelsize=7.5, labelrotation=0)
        _layer_shares(side, by_layer, uniform, ranges)
        side.set_ylim(heat.get_ylim())
        side.set_yticks(places, [])
        masks = distribution.select("scenario", "variation").unique()
        pruned, size = int(distribution["pruned"].sum()), int(distribution["size"].sum())
        scenarios = masks["scenario"].unique().to_list()
        figure.suptitle(
            f"{distribution['strategy'][0]}, {level_label(distribution['level'][0])}: {distribution['model'][0]}\n"
            f"{scenarios[0] if len(scenarios) == 1 else f'{len(scenarios)} scenarios'}, {masks.height} "
            f"mask{'' if masks.height == 1 else 's'}, {100 * pruned / size if size else 0:.2g} % pruned",
            fontsize=9.5,
        )
    return figure


def _shares(
    distribution: polars.DataFrame, layers: Sequence[int], roles: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """In percent: pruned of each matrix [layers, roles], each layer's of all pruned, of all weights, and its range."""
    import numpy as np

    share = np.full((len(layers), len(roles)), np.nan)
    sizes = np.zeros(len(layers))
    pruned: dict[tuple[str, str], np.ndarray] = {}
    counts = distribution.group_by("layer", "role").agg(polars.col("pruned").sum(), polars.col("size").sum())
    for layer, role, part, size in counts.iter_rows():
        share[layers.index(layer), roles.index(role)] = 100 * part / size if size else np.nan
        sizes[layers.index(layer)] += size
    for scenario, variation, layer, part in distribution.select("scenario", "variation", "layer", "pruned").iter_rows():
        pruned.setdefault((scenario, variation), np.zeros(len(layers)))[layers.index(layer)] += part
    shares = np.array([100 * known / known.sum() for known in pruned.values() if known.sum()])
    total: np.ndarray = sum(pruned.values(), np.zeros(len(layers)))
    by_layer = 100 * total / total.sum() if total.sum() else total
    ranges = np.array([shares.min(axis=0), shares.max(axis=0)]) if len(shares) > 1 else None
    return share, by_layer, 100 * sizes / max(sizes.sum(), 1), ranges


def _layer_shares(axes: Axes, by_layer: np.ndarray, uniform: np.ndarray, ranges: np.ndarray | None) -> None:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    places = np.arange(len(by_layer)) + 0.5
    colour = palette(1)[0]
    if ranges is not None:
        axes.fill_betweenx(places, *ranges, color=colour, alpha=0.2, linewidth=0, label="range of the masks")
    if by_layer.any():
        axes.plot(
            by_layer,
            places,
            color=colour,
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            label="all masks" if ranges is not None else "the mask",
        )
    else:
        note(axes, "nothing pruned")
    axes.plot(uniform, places, color=INK, linewidth=1.1, linestyle=(0, (5, 2)), label="chance: the layer's size")
    axes.set_xlim(0.0, 1.08 * max(by_layer.max(), uniform.max(), 0.0 if ranges is None else ranges.max()))
    axes.set_title("layer's share of all pruned, %", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False, ncols=1)


def _cells(share: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.array([[percent(value / 100) for value in row] for row in share]).reshape(share.shape)


def _role(role: str) -> str:
    return role.replace("_", "\n")


def _in_order(roles: Sequence[str]) -> list[str]:
    order = ("q", "k", "v", "o", "gate", "up", "down")
    return sorted(roles, key=lambda role: (order.index(role) if role in order else len(order), role))


def _top(share: np.ndarray) -> float:
    """The colour scale's end in percent: at least a hair above 0, so that an empty mask has a scale."""
    import numpy as np

    finite = share[np.isfinite(share)]
    return max(float(finite.max()) if finite.size else 0.0, 1e-6)
