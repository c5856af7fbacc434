"""The pictures of an audit, drawn from the tidy frames and saved as PNG and SVG.

Here: one function for each figure of the method (A9), each giving a `matplotlib.figure.Figure`, and `save`.
Not here: estimates (see `excise.evaluation`), which every figure only draws, and tables (see `excise.report`).
Figures own their canvas: nothing touches pyplot's state, so that they may be drawn in any thread or process.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars

from excise.errors import ExciseError
from excise.report import (
    ALL_VARIATIONS,
    INLIER_FLOOR,
    UNPRUNED,
    UNPRUNED_MASK,
    Estimate,
    MaskName,
    MetricTable,
    level_label,
    mask_order,
    read_metrics,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches: 900 px at 100 dots per inch
PNG_BYTES = 100_000
_RESOLUTIONS = (100, 90, 80, 72, 60)
_COLOURS = (256, 64, 32)
_INK = "#222222"
_CONTROL = "#8a8a8a"
GAP_LEFT_TOP = 250.0
"""Percent of the unpruned gap up to which the panel of what is left is drawn."""
_CROWDED = 60  # marks of a panel, controls not counted, above which every level gets its own panel
_MARKERS = {"none": "D", "prompt_specific": "o", "within_context": "s", "cross_context": "^"}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "axes.titlesize": 10.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
}


@dataclass(frozen=True)
class SavedFigure:
    """A figure as stored: the PNG's bytes (under 100 kB, to be shown inline) and the paths of both files."""

    png: bytes
    png_path: Path
    svg_path: Path

    @property
    def paths(self) -> tuple[Path, Path]:
        """The PNG's and the SVG's path."""
        return self.png_path, self.svg_path


# ------------------------------------------------------------------------------------------------------------ answers


def answers_by_group(
    completions: polars.DataFrame, *, unit: str, majority: str, minority: str, scale: str = "linear"
) -> Figure:
    """The distribution of the parsed answers by group, one panel for each variation.

    Boxes hold the middle half of a group's answers, whiskers the middle 90 %, dots are the means of single names
    and the black bar is the group's mean. `completions` has columns variation, group, subject and value (null:
    unparsed); `majority` and `minority` are group keys and are drawn first, other groups after them. `scale` is
    "log" or "linear"; a log axis cannot show answers of 0 or less, so a panel says how many it lacks.

    Raises ExciseError on a missing column, no rows, an unknown scale, or when neither group occurs.
    """
    if scale not in ("log", "linear"):
        raise ExciseError(f"outcome.scale: {scale!r} is unknown; choose 'log' or 'linear'")
    _require(completions, "completions", ("variation", "group", "subject", "value"))
    found = completions["group"].unique().sort().to_list()
    if majority not in found and minority not in found:
        raise ExciseError(f"completions: neither {majority!r} nor {minority!r} among the groups {', '.join(found)}")
    groups = [majority, minority, *(group for group in found if group not in (majority, minority))]
    variations = completions["variation"].unique(maintain_order=True).to_list()
    across = len(variations) if len(variations) <= 4 else 5 if len(variations) > 8 else 4
    down = math.ceil(len(variations) / across)
    with _drawing():
        figure = _figure((min(WIDTH, 1.6 + 2.6 * across), 0.6 + (3.2 if down == 1 else 2.6) * down))
        axes = figure.subplots(down, across, squeeze=False)
        colours = _palette(len(groups))
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
        Line2D([], [], color=_INK, linewidth=2, label="mean of the group"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=1 if narrow else 3, frameon=False,
        title="below each group: share of its answers parsed", title_fontsize=8.5,
    )  # fmt: skip


def _answers_panel(axes: Axes, frame: polars.DataFrame, groups: Sequence[str], colours: Sequence, scale: str) -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    ticks, hidden, shown = [], 0, 0
    for position, (group, colour) in enumerate(zip(groups, colours, strict=True)):
        rows = frame.filter(polars.col("group") == group)
        parsed = rows.filter(polars.col("value").is_not_null() & polars.col("value").is_not_nan())
        drawn = parsed.filter(polars.col("value") > 0) if scale == "log" else parsed
        hidden += parsed.height - drawn.height
        shown += drawn.height
        ticks.append(f"{group}\n{_share(parsed.height, rows.height)}")
        if drawn.is_empty():
            continue
        axes.boxplot(
            [drawn["value"].to_numpy()], positions=[position], widths=0.62, whis=(5, 95), showfliers=False,
            patch_artist=True, manage_ticks=False, zorder=2,
            boxprops={"facecolor": (*colour, 0.28), "edgecolor": colour, "linewidth": 1.2},
            medianprops={"color": colour, "linewidth": 1.6}, whiskerprops={"color": colour, "linewidth": 1.2},
            capprops={"color": colour, "linewidth": 1.2},
        )  # fmt: skip
        means = drawn.group_by("subject", maintain_order=True).agg(polars.col("value").mean())["value"].to_numpy()
        spread = position + generator.uniform(-0.2, 0.2, len(means))
        axes.scatter(spread, means, s=9, color=colour, edgecolor="white", linewidth=0.3, zorder=3)
        mean = drawn["value"].mean()
        axes.plot([position - 0.36, position + 0.36], [mean, mean], color=_INK, linewidth=2, zorder=4)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_xticks(range(len(groups)), ticks)
    axes.grid(axis="x", visible=False)
    if shown == 0:
        axes.set_yticks([])
        _note(axes, "no parsed answer to draw")
        return
    _value_axis(axes, scale)
    if hidden:
        axes.annotate(
            f"{hidden:,} of 0 or less not shown", (0.5, 0.01), xycoords="axes fraction", ha="center", fontsize=7.5
        )


def _value_axis(axes: Axes, scale: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if scale == "log":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # Less than a decade shows too few powers of ten, so intermediate steps get their own labels.
        steps = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 1000 else (1,)
        if high / low < 5:
            steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


# ---------------------------------------------------------------------------------------------------------- disparity


def disparity_by_level(
    metrics: polars.DataFrame, *, inlier_floor: float = INLIER_FLOOR, controls: Sequence[str] = ("random",)
) -> Figure:
    """|SMD| per variation for the unpruned model and every strategy and level, the inlier ratios below (BDB, Fig. 2).

    Between the two: the share of the raw gap that is left, because noise alone lowers |SMD| (method, part C); the
    panel is left out when no mask has a gap reduction. Bars are 95 % intervals, dashed lines the means over
    variations, grey hollow marks the matched controls named in `controls`, drawn beside their strategy; an arrow at the
    top edge stands for a gap that grew beyond the panel. Errors as `excise.report.read_metrics`.
    """
    table = read_metrics(metrics)
    strategies = [mask for mask in table.masks if not mask.is_control]
    drawn_controls = [mask for mask in table.masks if mask.is_control and mask.strategy in controls]
    slots = [UNPRUNED_MASK, *(mask for mask in strategies if mask != UNPRUNED_MASK)]
    blocks = [*table.variations, *([ALL_VARIATIONS] if table.has_aggregate and len(table.variations) > 1 else [])]
    panels = [_Panel("abs_smd", "|SMD|\n(pooled deviations)", 1.5)]
    if any(metric == "gap_reduction" and known.value is not None for (_, _, metric), known in table.estimates.items()):
        panels.append(_Panel("gap_left", "raw gap left\n(% of unpruned)", 1.2))
    levels = list(dict.fromkeys(mask.level for mask in slots[1:]))
    if len(blocks) * len(slots) > _CROWDED and len(levels) > 1:
        panels = [_Panel(panel.metric, panel.label, 1.1, level) for panel in panels for level in levels]
    panels.append(_Panel("inlier_ratio", "inlier ratio", 1.0))
    with _drawing():
        heights = [panel.height for panel in panels]
        legend_rows = math.ceil((len(slots) + 1) / 3)
        figure = _figure((WIDTH, 0.7 + 1.75 * sum(heights) + 0.18 * legend_rows))
        axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        looks = _looks(slots)
        for room, panel in zip(axes, panels, strict=True):
            shown = [mask for mask in slots if panel.level is None or mask.level in ("none", panel.level)]
            _disparity_panel(room, table, panel, blocks, shown, drawn_controls, looks)
        _inlier_axis(axes[-1], inlier_floor)
        names = ["mean" if block == ALL_VARIATIONS else block.replace(" ", "\n") for block in blocks]
        axes[-1].set_xticks(range(len(blocks)), names)
        axes[-1].set_xlim(-0.5, len(blocks) - 0.5)
        figure.suptitle(f"{table.scenario}: {table.model}", fontsize=10)
        _disparity_legend(
            figure, slots, looks, list(dict.fromkeys(control.strategy for control in drawn_controls)), blocks
        )
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
    table: MetricTable,
    panel: _Panel,
    blocks: Sequence[str],
    slots: Sequence[MaskName],
    controls: Sequence[MaskName],
    looks: dict[MaskName, tuple],
) -> None:
    size = 4.2 if len(blocks) * len(slots) > 50 else 6.0
    step = 0.84 / len(slots)  # of the width between two variations
    values: list[float] = [100.0] if panel.metric == "gap_left" else []
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
                known = _drawn_estimate(table, variation, drawn, panel.metric)
                at = place + (order - len(beside) / 2) * share
                colour, marker = looks[mask] if order == 0 else (_CONTROL, looks[mask][1])
                if panel.metric == "gap_left" and (known.value or 0.0) > GAP_LEFT_TOP:
                    # A wrecked model's gap may be any size; an arrow at the edge stands for it.
                    axes.plot([at], [0.95 * GAP_LEFT_TOP], marker="^", color=colour, markersize=0.85 * size)
                    beyond = True
                    continue
                _mark(axes, at, known, colour, marker, size if order == 0 else 0.85 * size, hollow=order > 0)
                values.append(known.value or 0.0)
                bounds.append(known.high or 0.0)
    if ALL_VARIATIONS in blocks:
        for mask in slots:
            mean = _drawn_estimate(table, ALL_VARIATIONS, mask, panel.metric).value
            if mean is not None and not (panel.metric == "gap_left" and mean > GAP_LEFT_TOP):
                axes.axhline(
                    mean, color=looks[mask][0], linewidth=0.9, linestyle=_dashes(mask.level), alpha=0.75, zorder=1
                )
    if panel.metric != "inlier_ratio":
        # A wide interval may leave the panel; it must not squeeze every point into its lower edge.
        top = max(values)
        axes.set_ylim(0.0, max(1.03 * min(max(bounds), 1.35 * top), 1.06 * top, 0.1))
    if panel.metric == "gap_left":
        axes.set_ylim(0.0, GAP_LEFT_TOP if beyond else min(axes.get_ylim()[1], GAP_LEFT_TOP))
        axes.axhline(100.0, color=_INK, linewidth=0.9, zorder=1)
    if panel.level is not None:
        axes.set_title(level_label(panel.level), fontsize=9, loc="left")
    axes.set_ylabel(panel.label)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)


def _mark(axes: Axes, place: float, known: Estimate, colour, marker: str, size: float, *, hollow: bool) -> None:
    if known.value is None:
        return
    zorder = 3 if hollow else 4
    if known.low is not None and known.high is not None:
        axes.vlines(place, known.low, known.high, color=colour, linewidth=0.8 if hollow else 1.2, zorder=zorder - 0.5)
    axes.plot(
        [place], [known.value], marker=marker, color=colour, markersize=size, linestyle="none", zorder=zorder,
        markerfacecolor="white" if hollow else colour, markeredgewidth=1.0 if hollow else 0.0,
    )  # fmt: skip


def _drawn_estimate(table: MetricTable, variation: str, mask: MaskName, metric: str) -> Estimate:
    if metric == "gap_left":
        removed = table.get(variation, mask, "gap_reduction")
        if mask == UNPRUNED_MASK:
            return Estimate(100.0)
        low, value, high = (
            None if part is None else 100 * (1 - part) for part in (removed.high, removed.value, removed.low)
        )
        return Estimate(value, None if low is None else max(low, 0.0), high)
    known = table.get(variation, mask, metric)
    if metric == "abs_smd" and known.value is None and variation != ALL_VARIATIONS:
        signed = table.get(variation, mask, "smd")
        if signed.value is None or not signed.has_interval:
            return Estimate(None if signed.value is None else abs(signed.value))
        ends = sorted((abs(signed.low), abs(signed.high)))
        return Estimate(abs(signed.value), 0.0 if signed.covers_zero else ends[0], ends[1])
    return known


def _inlier_axis(axes: Axes, floor: float) -> None:
    low, _ = axes.get_ylim()
    axes.set_ylim(min(low, floor - 0.1), 1.005)
    axes.axhline(floor, color="#b00020", linewidth=1.1, zorder=1)
    axes.annotate(
        f"floor {floor:.2f}", (1.0, floor), xycoords=axes.get_yaxis_transform(), xytext=(-4, -3),
        textcoords="offset points", ha="right", va="top", color="#b00020", fontsize=8,
    )  # fmt: skip


def _looks(slots: Sequence[MaskName]) -> dict[MaskName, tuple]:
    strategies = sorted({mask.strategy for mask in slots if mask.strategy != UNPRUNED})
    colours = dict(zip(strategies, _palette(len(strategies)), strict=True))
    return {mask: (colours.get(mask.strategy, _INK), _MARKERS.get(mask.level, "v")) for mask in slots}


def _disparity_legend(
    figure: Figure,
    slots: Sequence[MaskName],
    looks: dict[MaskName, tuple],
    controls: Sequence[str],
    blocks: Sequence[str],
) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for mask in slots:
        colour, marker = looks[mask]
        name = UNPRUNED if mask == UNPRUNED_MASK else f"{mask.strategy}, {level_label(mask.level)}"
        line = _dashes(mask.level) if ALL_VARIATIONS in blocks else "none"
        handles.append(
            Line2D([], [], color=colour, marker=marker, markersize=6, linewidth=0.9, linestyle=line, label=name)
        )
    if controls:
        name = f"{controls[0] if len(controls) == 1 else 'a'} control of the mark to its left"
        handles.append(
            Line2D(
                [], [], color=_CONTROL, marker="o", markersize=5, markerfacecolor="white", linestyle="none", label=name
            )
        )
    title = "bars: 95 % intervals" + ("; dashed: means over variations" if ALL_VARIATIONS in blocks else "")
    if len(controls) > 1:
        title += f"; controls, where there are several: {', '.join(controls)}"
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, handlelength=3.2,
        title=title, title_fontsize=8.5,
    )  # fmt: skip


def _dashes(level: str) -> tuple[float, tuple[float, ...]]:
    return (0, {"none": (6, 2), "prompt_specific": (4, 2), "within_context": (2, 2)}.get(level, (1, 1.5)))


# -------------------------------------------------------------------------------------------------------- mask density


def mask_density_by_layer(masks: polars.DataFrame) -> Figure:
    """The pruned share of every matrix, layers by roles, one panel for each strategy and level (BDB, Fig. 4).

    Counts are summed over variations. Beside each heat map stands each layer's share of all pruned weights. Random
    controls have the same counts by construction, so controls are not drawn. `masks` has columns strategy, level,
    matched_to, layer, role, pruned and size. Raises ExciseError on a missing column or when it holds no strategy.
    """
    _require(masks, "masks", ("variation", "strategy", "level", "matched_to", "layer", "role", "pruned", "size"))
    own = masks.filter(polars.col("matched_to").is_null() & (polars.col("strategy") != UNPRUNED))
    if own.is_empty():
        raise ExciseError("masks: only controls or no rows; build the strategies' masks first")
    names = sorted(
        (MaskName(*row) for row in own.select("strategy", "level").unique().iter_rows()),
        key=mask_order,
    )
    layers = sorted(own["layer"].unique().to_list())
    order = ("q", "k", "v", "o", "gate", "up", "down")
    roles = sorted(own["role"].unique().to_list(), key=lambda role: (order.index(role) if role in order else 7, role))
    across = min(len(names), 4)
    down = math.ceil(len(names) / across)
    cell_width, cell_height, caption = WIDTH / max(across, 3), 4.3, 0.55
    width, height = max(cell_width * across, 4.5), cell_height * down + caption
    with _drawing(grid="white"):
        figure = _figure((width, height), layout="none")
        text = "Colour: pruned share of each matrix (%).\nBars: each layer's share of all pruned weights (%)."
        figure.text(0.1 / width, 1 - 0.1 / height, text, va="top", fontsize=9)
        for index, name in enumerate(names):
            rows = own.filter((polars.col("strategy") == name.strategy) & (polars.col("level") == name.level))
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
    heat: Axes, side: Axes, bar: Axes, rows: polars.DataFrame, name: MaskName, layers: Sequence[int],
    roles: Sequence[str],
) -> None:  # fmt: skip
    import numpy as np
    import seaborn
    from matplotlib.ticker import MaxNLocator

    counts = rows.group_by("layer", "role").agg(polars.col("pruned").sum(), polars.col("size").sum())
    share = np.full((len(layers), len(roles)), np.nan)
    by_layer = np.zeros(len(layers))
    for layer, role, pruned, size in counts.iter_rows():
        share[layers.index(layer), roles.index(role)] = 100 * pruned / size if size else np.nan
        by_layer[layers.index(layer)] += pruned
    total, entries = counts["pruned"].sum(), counts["size"].sum()
    seaborn.heatmap(
        share, ax=heat, vmin=0, vmax=_top(share), cmap="Blues", yticklabels=False, xticklabels=list(roles),
        cbar_ax=bar, cbar_kws={"orientation": "horizontal", "ticks": MaxNLocator(3)},
    )  # fmt: skip
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
        fontsize=9, loc="left",
    )  # fmt: skip
    if total:
        side.barh(np.arange(len(layers)) + 0.5, 100 * by_layer / total, height=0.8, color=_INK)
    else:
        _note(heat, "nothing pruned")
    side.set_xlim(left=0)
    side.set_ylim(heat.get_ylim())
    side.set_xlabel("% of all", fontsize=8)
    side.xaxis.set_major_locator(MaxNLocator(2))
    side.tick_params(axis="y", length=0, labelleft=False)
    side.tick_params(axis="x", labelsize=8)
    for edge in ("top", "right", "left"):
        side.spines[edge].set_visible(False)


def _top(share: np.ndarray) -> float:
    """The colour scale's end in percent: at least a hair above 0, so that an empty mask has a scale."""
    import numpy as np

    finite = share[np.isfinite(share)]
    return max(float(finite.max()) if finite.size else 0.0, 1e-6)


# --------------------------------------------------------------------------------------------------------------- saving


def save(figure: Figure, stem: Path) -> SavedFigure:
    """Writes `stem`.png (under 100 kB) and `stem`.svg, each whole or not at all.

    The PNG loses colours first and resolution after that until it is small enough. The same figure gives the same
    bytes. Raises ExciseError when the folder cannot be written or no PNG is small enough.
    """
    import matplotlib

    png = _png(figure)
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "excise", "svg.fonttype": "path"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    png_path, svg_path = (stem.with_name(stem.name + suffix) for suffix in (".png", ".svg"))
    _write(png_path, png)
    _write(svg_path, drawn.getvalue())
    return SavedFigure(png, png_path, svg_path)


def _png(figure: Figure) -> bytes:
    from PIL import Image

    smallest = math.inf
    for resolution in _RESOLUTIONS:
        plain = io.BytesIO()
        figure.savefig(plain, format="png", dpi=resolution, metadata={"Software": None})
        picture = Image.open(plain).convert("RGB")
        for colours in _COLOURS:
            reduced = io.BytesIO()
            picture.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
                reduced, format="png", optimize=True
            )
            smallest = min(smallest, reduced.tell())
            if reduced.tell() < PNG_BYTES:
                return reduced.getvalue()
    raise ExciseError(f"figure: its smallest PNG has {smallest:,} bytes, over {PNG_BYTES:,}; draw fewer variations")


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ExciseError(f"{path}: cannot be written ({error.strerror}); make the folder writable") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise ExciseError(f"{path}: cannot be written ({error.strerror}); free some space") from error


# -------------------------------------------------------------------------------------------------------------- drawing


@contextmanager
def _drawing(grid: str = "whitegrid") -> Iterator[None]:
    """The look of every figure, while it is drawn and no longer."""
    import matplotlib
    import seaborn

    with matplotlib.rc_context({**seaborn.axes_style(grid), **_STYLE}):
        yield


def _figure(inches: tuple[float, float], layout: str = "constrained") -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=_RESOLUTIONS[0], layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _palette(count: int) -> list[tuple[float, float, float]]:
    """Colours told apart with a colour vision deficiency, grey (the controls' colour) left out."""
    import seaborn

    colours = [colour for index, colour in enumerate(seaborn.color_palette("colorblind")) if index != 7]
    return [colours[index % len(colours)] for index in range(count)]


def _note(axes: Axes, text: str) -> None:
    axes.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color="#555555")


def _require(frame: polars.DataFrame, name: str, columns: Sequence[str]) -> None:
    lacking = [column for column in columns if column not in frame.columns]
    if lacking:
        raise ExciseError(f"{name}: columns {', '.join(lacking)} are missing")
    if frame.is_empty():
        raise ExciseError(f"{name}: no rows to draw")


def _share(part: int, whole: int) -> str:
    if whole == 0:
        return "none"
    percent = 100 * part / whole
    return "> 99 %" if 99.5 <= percent < 100 else f"{percent:.0f} %"


def _short(value: float) -> str:
    """An axis label: 950, 1.5k, 20k, 1.2M."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if suffix == 'k' else factor):g}{suffix}"
    return f"{value:,.10g}"
