"""The grid search over both thresholds of the set difference: its points, their table, the front, and the choice.

Here is arithmetic on tables only: scores, masks, sampling and `evaluate` are run by the caller, with every point of the
grid as a strategy of its own at the level "grid"; the heat maps are in `figures`.
The search is BDB's (Fig. 5), for weights by fractions and for heads by counts. The rule that picks a point is ours, and
explicit (method, A9): the smallest raw gap at an inlier ratio that is still good enough.
"""

import re
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from excise.conditions import ALL, GRID
from excise.errors import ExciseError
from excise.evaluation.thresholds import COLLAPSED_SPREAD
from excise.files.tables import Schema

METRICS = ("gap_mean", "smd", "abs_smd", "gap_reduction", "inlier_ratio", "spread_ratio")
"""What `grid_search` tells of a point, each with its interval."""
SCHEMA: Schema = {
    "model": pl.String,
    "scenario": pl.String,
    "strategy": pl.String,
    "variation": pl.String,
    "tau_min": pl.Float64,
    "tau_maj": pl.Float64,
    "density": pl.Float64,
    "metric": pl.String,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "n": pl.Int64,
    "names": pl.Int64,
    "pareto": pl.Boolean,
    "chosen": pl.Boolean,
}

_POINT = ["model", "scenario", "strategy", "variation", "tau_min", "tau_maj"]
_LABEL = re.compile(r"(?P<key>.+)@(?P<minority>[^@/]+)/(?P<majority>[^@/]+)")
_ROUNDING = 1e-9


def grid_points(minority: Sequence[float], majority: Sequence[float] | None = None) -> list[tuple[float, float]]:
    """All pairs (tau_min, tau_maj) with tau_maj <= tau_min, in rising order (BDB, Fig. 5).

    minority: fractions of a matrix, or counts of heads; majority: those of the other group, where they differ (for
    heads (0, 5, 10, ...): counts may be 0). Above tau_min, tau_maj would leave nearly nothing to prune.

    Raises ExciseError for a negative threshold and for thresholds of which no pair is left.
    """
    seconds = sorted(set(minority if majority is None else majority))
    points = [(first, second) for first in sorted(set(minority)) for second in seconds if second <= first]
    if not points:
        raise ExciseError("grid: no pair of thresholds with tau_maj <= tau_min; give a tau_min as large as a tau_maj")
    if min(min(point) for point in points) < 0:
        raise ExciseError("grid: a threshold is negative; give fractions in 0..1, or counts of heads")
    return points


def point_label(strategy: str, tau_min: float, tau_maj: float) -> str:
    """The name a point of the grid has as a strategy of its own: `set_difference@0.4/0.35`."""
    return f"{strategy}@{tau_min:g}/{tau_maj:g}"


def read_label(label: str) -> tuple[str, float, float]:
    """(strategy, tau_min, tau_maj) of a `point_label`. Raises ExciseError where it is none."""
    match = _LABEL.fullmatch(label)
    try:
        if match is None:
            raise ValueError
        return match["key"], float(match["minority"]), float(match["majority"])
    except ValueError:
        raise ExciseError(f"grid: {label!r} names no point; one is named like set_difference@0.4/0.35") from None


def points_frame(metrics: pl.DataFrame) -> pl.DataFrame:
    """One row per strategy, variation and point of the grid: its thresholds, density and estimates of `METRICS`.

    metrics: what `evaluate` gives for completions under the grid's masks (level "grid", strategies named by
    `point_label`); other levels and controls are left out. Columns: model, scenario, strategy, variation, tau_min,
    tau_maj, density, then one per metric, null where undefined. Variations in the order of `metrics`.
    """
    rows = _decoded(metrics)
    wide = {name: pl.col("estimate").filter(pl.col("metric") == name).first() for name in ("density", *METRICS)}
    return rows.group_by(_POINT, maintain_order=True).agg(**wide)


def pareto(points: pl.DataFrame, bias: str = "abs_smd") -> NDArray[np.bool_]:
    """Which points are on the front of small bias and high inlier ratio: bool [points].

    A point is on it where no other is at least as good in both |bias| and inlier_ratio and better in one. Points with
    equal figures stand or fall together; a point that lacks a figure, or whose answers collapsed, is off the front and
    drives nobody off it. bias: the column whose absolute value is to be small.
    """
    size, ratio = np.abs(_figures(points, bias)), _figures(points, "inlier_ratio")
    known = np.isfinite(size) & np.isfinite(ratio) & ~_collapsed(points)
    with np.errstate(invalid="ignore"):
        as_good = (size[:, None] <= size) & (ratio[:, None] >= ratio)  # [by, of]
        better = (size[:, None] < size) | (ratio[:, None] > ratio)
    return known & ~(as_good & better & known[:, None]).any(axis=0)


def choose(points: pl.DataFrame, floor: float, gap: str = "gap_mean") -> int | None:
    """The row of the point the rule picks, None where no point reaches the floor.

    Among points with inlier_ratio >= `floor` whose answers did not collapse the one with the smallest |gap|, whatever
    its SMD, which noise alone lowers; of equals the one of lower density, then of lower tau_min (then tau_maj). gap:
    the column of the raw gap. Gaps and ratios that differ by rounding alone are equal.
    """
    if points.is_empty():
        return None
    size, ratio = np.abs(_figures(points, gap)), _figures(points, "inlier_ratio")
    allowed = np.flatnonzero(np.isfinite(size) & (ratio >= floor - _ROUNDING) & ~_collapsed(points))
    if not len(allowed):
        return None
    smallest = size[allowed].min()
    equals = allowed[size[allowed] <= smallest * (1 + _ROUNDING)]
    density = np.nan_to_num(_figures(points, "density"), nan=np.inf)
    lower = (density, _figures(points, "tau_min"), _figures(points, "tau_maj"))
    return int(min(equals, key=lambda row: tuple(column[row] for column in lower)))


def grid_search(metrics: pl.DataFrame, floor: float) -> pl.DataFrame:
    """The table `grid_search`: one row per strategy, variation, point and metric, with the columns of `SCHEMA`.

    metrics: as for `points_frame`. pareto: the point is on the front of |SMD| and inlier ratio among the strategy's
    points for this variation. chosen: the rule picks it, by the raw gap; over all variations, whose units differ, by
    the share of the raw gap that is left (1 - gap_reduction). Nothing is chosen where nothing reaches the floor, nor
    over all variations where there was no gap to reduce.
    """
    points = points_frame(metrics)
    marked = [points.with_columns(pareto=pl.lit(None, pl.Boolean), chosen=pl.lit(None, pl.Boolean)).clear()]
    for (*_, variation), part in points.partition_by(
        "model", "scenario", "strategy", "variation", as_dict=True, maintain_order=True
    ).items():
        left = part.with_columns(gap_left=1 - pl.col("gap_reduction"))
        chosen = choose(left, floor, "gap_left" if variation == ALL else "gap_mean")
        picked = [row == chosen for row in range(len(part))]
        marked.append(part.with_columns(pareto=pl.Series(pareto(part)), chosen=pl.Series(picked, dtype=pl.Boolean)))
    marks = pl.concat(marked).select(*_POINT, "density", "pareto", "chosen")
    rows = _decoded(metrics).filter(pl.col("metric").is_in(METRICS))
    return rows.join(marks, on=_POINT, maintain_order="left").select(SCHEMA.keys()).cast(pl.Schema(SCHEMA))


def _decoded(metrics: pl.DataFrame) -> pl.DataFrame:
    """The grid's own rows, each label taken apart into strategy, tau_min and tau_maj."""
    rows = metrics.filter((pl.col("level") == GRID) & pl.col("matched_to").is_null())
    labels = rows["strategy"].unique().sort().to_list()
    parts = pl.DataFrame(
        [(label, *read_label(label)) for label in labels],
        schema={"label": pl.String, "strategy": pl.String, "tau_min": pl.Float64, "tau_maj": pl.Float64},
        orient="row",
    )
    return rows.rename({"strategy": "label"}).join(parts, on="label", maintain_order="left")


def _collapsed(points: pl.DataFrame) -> NDArray[np.bool_]:
    """Where less than `COLLAPSED_SPREAD` is left of the answers' spread; where it is not known, other figures tell."""
    if "spread_ratio" not in points.columns:
        return np.zeros(len(points), dtype=bool)
    return _figures(points, "spread_ratio") < COLLAPSED_SPREAD


def _figures(points: pl.DataFrame, column: str) -> NDArray[np.float64]:
    """A column as float64, NaN for null."""
    if column not in points.columns:
        raise ExciseError(f"grid: the points lack the column {column}; make them with points_frame")
    return points[column].cast(pl.Float64).fill_null(np.nan).to_numpy()
