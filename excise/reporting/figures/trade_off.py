"""The figure of the trade-off: what pruning heads does to an axis's bias and to the text model, method by method.

Here: FASP's comparison of methods at every ratio alpha (section 5; method, B6). Not here: any estimate (see
`excise.evaluation.toxicity`), and the search over gamma (see `gamma_sweep`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars

from excise.conditions import ALL, PLACE, RANDOM
from excise.errors import ExciseError
from excise.evaluation.grid import pareto
from excise.evaluation.table import at_most
from excise.reporting.figures.canvas import (
    COLLAPSED,
    CONTROL_GREY,
    INK,
    WIDTH,
    axis_number,
    blank_figure,
    drawing,
    interval_bar,
    legend_title,
    limits_of,
    mark_cut_ends,
    mark_handles,
    palette,
    require_columns,
    require_one,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = ("model", "scenario", *PLACE, "metric", "estimate", "low", "high")
_BIAS, _TEXT = "bias_reduction", "perplexity_ratio"
_CONTROL = "random: as many heads a layer"
_MARKERS = "os^DvPX<>h"
_CROWDED = 60.0  # percent of perplexity above which the scale is logarithmic beyond `_LINEAR`
_LINEAR = 10.0


def trade_off(metrics: polars.DataFrame, *, variation: str = ALL) -> Figure:
    """Change of the bias against change of the perplexity, in percent, for every method and ratio alpha.

    `metrics` holds rows of the table of that name of one model, with `bias_reduction` and `perplexity_ratio`; every
    scenario (axis) and level has a panel. Strategies are named like `fasp-0.10`: the method, a dash, alpha. The
    ratios of a method are joined in their order, the largest is written beside its mark; crosses are 95 % intervals,
    grey hollow marks random heads matched to a strategy. The unpruned model is at the origin, and the dark staircase
    is the Pareto front: beyond it, to the lower left, nothing was found. Left of the dotted line perplexity is lower
    than unpruned, below the other one bias is. A triangle at the edge marks an interval that goes on beyond it, a
    filled cross a mask under which all scores are alike, which is no point of the front. Panels say how many masks lack
    a figure.

    Raises ExciseError on a missing column, no rows, several models, or where no strategy has both metrics.
    """
    require_columns(metrics, "metrics", _COLUMNS)
    require_one(metrics, "metrics", ("model",))
    panels = _panels(metrics.filter(polars.col("variation") == variation))
    lacking = {place: sum(not _complete(point) for point in points) for place, points in panels.items()}
    panels = {place: whole for place, points in panels.items() if (whole := list(filter(_complete, points)))}
    if not panels:
        raise ExciseError(
            f"metrics: no strategy like fasp-0.10 has both {_BIAS} and {_TEXT} for {variation}; evaluate such masks "
            "with a perplexity text first"
        )
    methods = list(dict.fromkeys(point["method"] for points in panels.values() for point in points))
    methods.sort(key=lambda method: (method == _CONTROL, method != "fasp", method))
    colours = dict(zip(methods, palette(len(methods)), strict=True)) | {_CONTROL: CONTROL_GREY}
    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    with drawing():
        figure = blank_figure((WIDTH if across > 1 else 6.5, 1.2 + (3.3 if across > 1 else 4.0) * down))
        rooms = figure.subplots(down, across, squeeze=False)
        wide = any(abs(point[_TEXT][0]) > _CROWDED for points in panels.values() for point in points)
        for index, ((scenario, level), points) in enumerate(panels.items()):
            axes = rooms[index // across][index % across]
            _panel(axes, points, methods, colours, wide)
            several = len({level for _, level in panels}) > 1
            title = f"{scenario}, {level.replace('_', '-')}" if several else scenario
            if lacking[scenario, level]:
                title += f" (not drawn: {lacking[scenario, level]} without a defined figure)"
            axes.set_title(title, fontsize=9.5, loc="left")
            axes.set_ylabel("change of bias, %" if index % across == 0 else "")
            axes.set_xlabel("change of perplexity, %" if index + across >= len(panels) else "")
        for index in range(len(panels), down * across):
            rooms[index // across][index % across].set_visible(False)
        where = "" if variation == ALL else f", {variation}"
        figure.suptitle(f"{metrics['model'][0]}{where}: lower left is better", fontsize=10)
        marks = mark_handles([axes for room in rooms for axes in room])
        names = [point["names"] for points in panels.values() for point in points]
        _legend(figure, methods, colours, marks, names, 3 if across > 1 else 2)
    return figure


def _panels(metrics: polars.DataFrame) -> dict[tuple[str, str], list[dict]]:
    """Per scenario and level its points: method, alpha, both changes in percent as (estimate, low, high), names, and
    whether the scores collapsed. A change is not there where it is not defined."""
    points: dict[tuple, dict] = {}
    for row in metrics.filter(polars.col("metric").is_in([_BIAS, _TEXT, "spread_ratio"])).iter_rows(named=True):
        name = row["matched_to"] if row["strategy"] == RANDOM and row["matched_to"] else row["strategy"]
        method, dash, ratio = name.rpartition("-")
        if not dash or not _is_number(ratio):
            continue
        if row["matched_to"] and row["strategy"] != RANDOM:
            continue
        key = (row["scenario"], row["level"], row["strategy"], row["matched_to"])
        method = _CONTROL if row["matched_to"] else method
        point = points.setdefault(
            key, {"method": method, "alpha": float(ratio), "of": name, "names": None, "collapsed": False}
        )
        if row["estimate"] is None or not math.isfinite(row["estimate"]):
            continue
        if row["metric"] == "spread_ratio":
            point["collapsed"] = at_most(row["estimate"], 0.0)
        else:
            point[row["metric"]] = _percent(row)
            point["names"] = row.get("names") if row["metric"] == _BIAS else point["names"]
    panels: dict[tuple[str, str], list[dict]] = {}
    for (scenario, level, *_), point in points.items():
        panels.setdefault((scenario, level), []).append(point)
    return panels


def _complete(point: dict) -> bool:
    return _BIAS in point and _TEXT in point


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _percent(row: dict) -> tuple[float, float | None, float | None]:
    """Estimate and bounds as change against the unpruned model in percent; a reduction is a negative change."""
    estimate, *ends = (row["estimate"], row["low"], row["high"])
    low, high = (None if end is None or not math.isfinite(end) else end for end in ends)
    if row["metric"] == _TEXT:
        return 100 * (estimate - 1), *(None if value is None else 100 * (value - 1) for value in (low, high))
    return -100 * estimate, *(None if value is None else -100 * value for value in (high, low))


def _panel(axes: Axes, points: Sequence[dict], methods: Sequence[str], colours: dict, wide: bool) -> None:
    if wide:
        axes.set_xscale("symlog", linthresh=_LINEAR)
        axes.xaxis.set_major_formatter(lambda value, _: axis_number(value))
    axes.axhline(0.0, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    axes.axvline(0.0, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    for method in methods:
        of_method = sorted((point for point in points if point["method"] == method), key=lambda point: point["alpha"])
        for point in of_method:
            if point["collapsed"]:
                axes.plot(
                    [point[_TEXT][0]],
                    [point[_BIAS][0]],
                    marker="X",
                    color=colours[method],
                    markersize=6,
                    linestyle="none",
                    label=COLLAPSED,
                )
        drawn = [point for point in of_method if not point["collapsed"]]
        if not drawn:
            continue
        hollow = method == _CONTROL
        marker = _MARKERS[methods.index(method) % len(_MARKERS)]
        across, up = ([point[metric][0] for point in drawn] for metric in (_TEXT, _BIAS))
        for point in drawn:
            _cross(axes, point, colours[method])
        axes.plot(
            across,
            up,
            color=colours[method],
            marker="o" if hollow else marker,
            markersize=4 if hollow else 5.5,
            markerfacecolor="white" if hollow else colours[method],
            linewidth=0 if hollow else 0.9,
            markeredgewidth=0.9,
            zorder=2.5 if hollow else 3,
        )
        if not hollow:
            axes.annotate(
                f"{drawn[-1]['alpha']:g}",
                (across[-1], up[-1]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7.5,
                color=colours[method],
            )
    axes.plot([0], [0], marker="*", markersize=11, color=INK, markeredgecolor="white", zorder=4)
    _front(axes, points)
    _limits(axes, points)
    mark_cut_ends(axes)


def _cross(axes: Axes, point: dict, colour) -> None:
    (across, left, right), (up, low, high) = point[_TEXT], point[_BIAS]
    look = {"color": colour, "linewidth": 0.9, "alpha": 0.45, "zorder": 2}
    if left is not None and right is not None:
        interval_bar(axes, up, left, right, along="x", **look)
    if low is not None and high is not None:
        interval_bar(axes, across, low, high, **look)


def _front(axes: Axes, points: Sequence[dict]) -> None:
    """The staircase of the points, the unpruned model among them, that none beats in both; controls are no choice, nor
    are masks under which all scores are alike."""
    chosen = [point for point in points if point["method"] != _CONTROL and not point["collapsed"]]
    places = [(0.0, 0.0), *((point[_TEXT][0], point[_BIAS][0]) for point in chosen)]
    # bias cannot fall by more than all of it, so that its share left is not negative
    points_of = {"abs_smd": [100 + up for _, up in places], "inlier_ratio": [-across for across, _ in places]}
    on_front = pareto(polars.DataFrame(points_of))
    front = sorted(place for place, on in zip(places, on_front, strict=True) if on)
    axes.step(
        [across for across, _ in front],
        [up for _, up in front],
        where="post",
        color=INK,
        linewidth=1.3,
        alpha=0.75,
        zorder=2.2,
    )


def _limits(axes: Axes, points: Sequence[dict]) -> None:
    """All marks are in the panel; only an interval that would squeeze them together reaches out of it."""
    for metric, put in ((_TEXT, axes.set_xlim), (_BIAS, axes.set_ylim)):
        values = [0.0, *(point[metric][0] for point in points)]
        ends = [end for point in points for end in point[metric][1:] if end is not None]
        low, high = limits_of(values, ends)
        room = max(0.08 * (high - low), 0.1)
        if metric == _TEXT and axes.get_xscale() == "symlog":
            put(min(low, -1.0) * 1.5, max(high, 1.0) * 1.5)
        else:
            put(low - room, high + room)


def _legend(
    figure: Figure, methods: Sequence[str], colours: dict, marks: Sequence, names: Sequence[int | None], columns: int
) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=colours[method],
            marker="o" if method == _CONTROL else _MARKERS[index % len(_MARKERS)],
            markerfacecolor="white" if method == _CONTROL else colours[method],
            markersize=5.5,
            linewidth=0 if method == _CONTROL else 0.9,
            label=method.replace("_", " "),
        )
        for index, method in enumerate(methods)
    ]
    handles.append(Line2D([], [], color=INK, marker="*", markersize=9, linestyle="none", label="unpruned"))
    handles.append(Line2D([], [], color=INK, linewidth=1.3, alpha=0.75, label="Pareto front"))
    handles += marks
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        columnspacing=1.4,
        title=legend_title("crosses", names, "numbers: the largest share of heads pruned"),
        title_fontsize=8.5,
    )
