"""The figure of a model's heads: which of them its text cannot do without, and which carry an axis's bias.

Here: layers by heads, coloured by the kind of head (FASP, section 4; method, B3 and B8). Not here: the impacts (see
`excise.attribution.head_impacts`) and what they share between axes (see `impact_correlation`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import polars

from excise.errors import ExciseError
from excise.evaluation.bias_correlation import catastrophic
from excise.evaluation.thresholds import CATASTROPHIC
from excise.reporting.figures.canvas import INK, blank_figure, drawing, palette, require_columns, require_one

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("critical", "harmful", "helpful", "unclear")
_COLUMNS = ("model", "scenario", "layer", "head", "perplexity_without", "z_bias", "z_bias_low", "z_bias_high")
_BY_CHANCE = 0.025  # share of the heads without any impact whose 95 % interval lies on one side of 0 all the same
_UNCLEAR, _UNKNOWN = "#ececec", "#ffffff"


def head_kinds(impacts: polars.DataFrame) -> list[str | None]:
    """The kind of each head of one axis, in the order of its rows; None where its impact on bias is unknown.

    critical: without it perplexity is over `CATASTROPHIC` times the median. Of the others harmful: the interval of
    z_bias is above 0, so bias falls without the head; helpful: below 0; unclear: it holds 0, or is not there.
    """
    wrecked = catastrophic(impacts["perplexity_without"].cast(polars.Float64).fill_null(math.nan).to_numpy())
    kinds: list[str | None] = []
    for critical, row in zip(wrecked, impacts.iter_rows(named=True), strict=True):
        low, high = row["z_bias_low"], row["z_bias_high"]
        if critical:
            kinds.append("critical")
        elif row["z_bias"] is None or not math.isfinite(row["z_bias"]):
            kinds.append(None)
        elif low is not None and low > 0:
            kinds.append("harmful")
        else:
            kinds.append("helpful" if high is not None and high < 0 else "unclear")
    return kinds


def head_map(impacts: polars.DataFrame) -> Figure:
    """Every head of one model by what its removal does, a panel for each axis: layers from top to bottom.

    `impacts` holds rows of the table `head_impacts`. Dark cells with a cross are critical heads (`head_kinds`), orange
    ones carry bias and blue ones hold it down, each the stronger the larger |z_bias| is among the panel's heads that
    are not critical; grey ones do not differ from 0, white ones are unknown. Beside the counts stands how many heads
    of each of the two kinds chance alone would give.

    Raises ExciseError on a missing column, no rows, several models, or a head that is there twice.
    """
    require_columns(impacts, "head_impacts", _COLUMNS)
    require_one(impacts, "head_impacts", ("model",))
    if impacts.select("scenario", "layer", "head").is_duplicated().any():
        raise ExciseError("head_impacts: a head is there twice for one scenario; give one row per scenario and head")
    axes_of = impacts.partition_by("scenario", as_dict=True, maintain_order=True)
    layers, heads = 1 + max(impacts["layer"]), 1 + max(impacts["head"])
    cell = min(0.24, 7.5 / heads)
    wide = max(1.5, cell * heads) + 0.55
    across = max(1, min(len(axes_of), int(9.5 // wide)))
    down = math.ceil(len(axes_of) / across)
    with drawing(grid="white"):
        tall = max(1.0, min(cell, 0.2) * layers) + 0.65
        figure = blank_figure((max(5.0, wide * across), 1.2 + tall * down))
        rooms = figure.subplots(down, across, squeeze=False)
        kinds_of_all: set[str | None] = set()
        for index, ((scenario,), frame) in enumerate(axes_of.items()):
            panel = rooms[index // across][index % across]
            kinds = _panel(panel, frame, layers, heads)
            kinds_of_all |= set(kinds)
            counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS[1:3])
            chance = _BY_CHANCE * sum(kinds.count(kind) for kind in KINDS[1:])
            panel.set_title(f"{scenario}\n{counts} ({chance:.0f} by chance)", fontsize=8.5, loc="left")
            panel.set_ylabel("layer" if index % across == 0 else "")
            panel.set_xlabel("head" if index + across >= len(axes_of) else "")
        for index in range(len(axes_of), down * across):
            rooms[index // across][index % across].set_visible(False)
        figure.suptitle(f"{impacts['model'][0]}: what each head is to the bias", fontsize=10)
        _legend(figure, unknown=None in kinds_of_all)
    return figure


def _shades(kind: str):
    """Colours of a kind from faint to full: orange and blue differ in lightness to every eye beside grey."""
    import seaborn

    blue, orange = palette(2)
    return seaborn.blend_palette(["#fbe3c4", orange] if kind == "harmful" else ["#d3e3f2", blue], as_cmap=True)


def _panel(axes: Axes, frame: polars.DataFrame, layers: int, heads: int) -> list[str | None]:
    from matplotlib.colors import to_rgb

    kinds = head_kinds(frame)
    sizes = [abs(row) if row is not None and math.isfinite(row) else 0.0 for row in frame["z_bias"]]
    largest = max((size for size, kind in zip(sizes, kinds, strict=True) if kind in KINDS[1:3]), default=1.0) or 1.0
    shades = {kind: _shades(kind) for kind in KINDS[1:3]}
    picture = np.ones((layers, heads, 3))
    crosses = []
    for layer, head, kind, size in zip(frame["layer"], frame["head"], kinds, sizes, strict=True):
        if kind == "critical":
            picture[layer, head] = to_rgb(INK)
            crosses.append((head, layer))
        elif kind in shades:
            picture[layer, head] = shades[kind](size / largest)[:3]
        else:
            picture[layer, head] = to_rgb(_UNKNOWN if kind is None else _UNCLEAR)
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    if crosses:
        axes.plot(
            *zip(*crosses, strict=True),
            marker="x",
            markersize=3.5,
            color="white",
            linestyle="none",
            markeredgewidth=0.8,
        )
    for count, put in ((heads, axes.set_xticks), (layers, axes.set_yticks)):
        put(range(0, count, max(1, math.ceil(count / 12))))
        put(np.arange(-0.5, count), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=7.5)
    return kinds


def _legend(figure: Figure, *, unknown: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    full = {kind: _shades(kind)(0.85) for kind in KINDS[1:3]}
    handles = [
        Patch(color=full["harmful"], label="harmful: bias falls without it"),
        Patch(color=full["helpful"], label="helpful: bias rises without it"),
        Patch(color=_UNCLEAR, label="unclear: its interval holds 0"),
        Line2D(
            [],
            [],
            marker="s",
            markersize=9,
            color=INK,
            linestyle="none",
            label=f"critical: perplexity over {CATASTROPHIC:g} x the median without it",
        ),
    ]
    if unknown:
        handles.append(Patch(facecolor=_UNKNOWN, edgecolor="#777777", label="unknown: its impact is not defined"))
    columns = 2 if figure.get_figwidth() > 6 else 1
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        columnspacing=1.4,
        title="the stronger the colour, the larger the impact",
        title_fontsize=8.5,
    )
