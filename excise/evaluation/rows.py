"""Rows of the metrics table: estimates with intervals, means over variations and over the draws of a control.

Here measures over resamples become rows. Nothing here knows answers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import polars as pl

from excise.conditions import ALL, COLUMNS, PLACE, Condition
from excise.evaluation import bootstrap, permutation
from excise.evaluation.cells import DRAWS, Cell
from excise.evaluation.distributions import Bounds

SCHEMA = {
    **dict.fromkeys(("model", "scenario", *PLACE), pl.String),
    "metric": pl.String,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "p_value": pl.Float64,
    "p_holm": pl.Float64,
    "n": pl.Int64,
    "names": pl.Int64,
    "lowest": pl.Float64,
    "highest": pl.Float64,
}
_OF_ALL_ANSWERS = ("inlier_ratio", "parse_rate", "leftover", "sampled")
_SMALLEST = ("spread_ratio",)  # over draws and variations the smallest tells, not the mean
_LARGEST = ("commonest_rise", "excess_change")  # and of these the largest


def answers_counted(cell: Cell, metric: str) -> int:
    if metric in ("inlier_ratio", "parse_rate"):
        return cell.answers
    if metric.endswith("_majority"):
        return cell.parsed[0]
    if metric.endswith("_minority"):
        return cell.parsed[1]
    return sum(cell.parsed)


def names_behind(cells: Iterable[Cell], metric: str) -> int:
    """Names behind a metric: of the group that has fewer, the fewest over the cells."""
    return min((cell.names[0 if metric in _OF_ALL_ANSWERS else 1] for cell in cells), default=0)


def scale_of(pair: tuple[bootstrap.NamedAnswers, bootstrap.NamedAnswers]) -> float:
    """Mean size of the unpruned answers, both groups pooled; NaN if there are none or their sum overflows."""
    both = bootstrap.pooled(*pair)
    total = float(np.diff(both.cumulative.sum(axis=0)) @ np.abs(both.values))
    count = both.parsed.sum()
    return total / count if count > 0 and np.isfinite(total) else float("nan")


def scaled_by(values: np.ndarray, scale: float) -> np.ndarray:
    """values / scale; where all unpruned answers are 0, 0 stays 0 and anything else has no size to be told in: NaN."""
    if scale > 0:
        return values / scale
    return np.where((values == 0) & (scale == 0), 0.0, np.nan)


def over_variations(metric: str, arrays: list[np.ndarray]) -> np.ndarray | None:
    """A metric over variations from arrays [resamples + 1], the mean unless the worst tells. None without any, and
    where one is undefined."""
    if not arrays or not all(_is_known(metric, array[0]) for array in arrays):
        return None
    return _worst(metric, arrays) if metric in _SMALLEST + _LARGEST else np.mean(arrays, axis=0)


def over_draws(metric: str, arrays: list[np.ndarray], seed: int) -> np.ndarray:
    return _worst(metric, arrays) if metric in _SMALLEST + _LARGEST else mean_over_draws(arrays, seed)


def _worst(metric: str, arrays: list[np.ndarray]) -> np.ndarray:
    return np.min(arrays, axis=0) if metric in _SMALLEST else np.max(arrays, axis=0)


def _is_known(metric: str, estimate: float) -> bool:
    """Whether an estimate can be gathered with others; an infinite ratio can: there was nothing to lose."""
    return not np.isnan(estimate) if metric in _SMALLEST else bool(np.isfinite(estimate))


def mean_over_draws(arrays: list[np.ndarray], seed: int) -> np.ndarray:
    """Mean over a control's draws [resamples + 1]: all of them in the estimate, resampled ones in every resample.

    All NaN where the estimate of a draw is undefined: a mean of the others would flatter or blame the control. Equal
    numbers of draws are resampled alike, in every variation and metric, as a mask may serve several variations.
    """
    if not all(np.isfinite(array[0]) for array in arrays):
        return np.full_like(arrays[0], np.nan)
    if len(arrays) == 1:
        return arrays[0]
    rng = np.random.default_rng([seed, DRAWS])
    weights = bootstrap.resampled_names(len(arrays), len(arrays[0]) - 1, rng) / len(arrays)
    # a draw that is not chosen must not spoil a resample in which it is undefined
    stack = np.where(weights.T > 0, np.array(arrays), 0.0)
    return np.einsum("rd,dr->r", weights, stack)


def reduction_of(unpruned: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """1 - |pruned| / |unpruned|, NaN where there was nothing or one of them is not finite."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratio = 1 - np.abs(pruned) / np.abs(unpruned)
    ratio = np.where(np.isfinite(ratio), ratio, np.nan)
    return np.where((unpruned != 0) & np.isfinite(unpruned) & np.isfinite(pruned), ratio, np.nan)


def excludes_zero(resampled: np.ndarray) -> bool:
    """Whether the interval [low, high] of a measure leaves out 0; an undefined interval does not."""
    low, high = bootstrap.percentile_interval(resampled[1:])
    return low > 0 or high < 0


class MetricRows:
    """The rows so far. Turns measures into estimates with intervals, and whatever is undefined into null."""

    def __init__(self, model: str, scenario: str, intervals: bool):
        self.model, self.scenario, self.intervals = model, scenario, intervals
        self.rows: list[dict] = []

    def add(  # an argument a column of the table
        self,
        variation: str,
        condition: Condition,
        metric: str,
        values: np.ndarray | float | None,
        n: int,
        p_value: float | None = None,
        bounds: Bounds | None = None,
        names: int | None = None,
    ) -> None:
        """values: [resamples + 1] with the estimate first, one number if there is no interval, None for no value.

        bounds: where the estimate lies whatever was left over; rounding must not put it outside. names: what is
        resampled, of the group that has fewer; of one there is nothing to resample.
        """
        intervals = self.intervals and (names is None or names >= 2)
        low = high = None
        if not isinstance(values, np.ndarray):
            estimate = values
        else:
            estimate = float(values[0])
            if intervals and np.isfinite(estimate) and metric not in ("leftover", "sampled"):
                low, high = bootstrap.percentile_interval(values[1:])
        if "reduction" in metric and finite_or_none(low) is None:
            estimate = None  # without an interval nobody knows whether there was a gap to reduce
        lowest = highest = None
        if bounds is not None and (known := finite_or_none(estimate)) is not None:
            lowest, highest = min(bounds.lowest, known), max(bounds.highest, known)
        self.rows.append(
            {
                "model": self.model,
                "scenario": self.scenario,
                "variation": variation,
                **dict(zip(COLUMNS, condition, strict=True)),
                "metric": metric,
                "estimate": finite_or_none(estimate),
                "low": finite_or_none(low),
                "high": finite_or_none(high),
                "p_value": finite_or_none(p_value),
                "p_holm": None,
                "n": int(n),
                "names": names,
                "lowest": finite_or_none(lowest),
                "highest": finite_or_none(highest),
            }
        )

    def frame(self) -> pl.DataFrame:
        tests: dict[tuple, list[dict]] = {}
        for row in self.rows:
            if row["p_value"] is not None and row["variation"] != ALL:
                tests.setdefault((*(row[key] for key in COLUMNS), row["metric"]), []).append(row)
        for rows in tests.values():
            for row, adjusted in zip(rows, permutation.holm([row["p_value"] for row in rows]), strict=True):
                row["p_holm"] = float(adjusted)
        return pl.DataFrame(self.rows, schema=SCHEMA, orient="row")


def mean_bounds(metric: str, cells: list[Cell]) -> Bounds | None:
    """Bounds of the mean over cells; None where one of them has none."""
    if not cells or not all(metric in cell.bounds for cell in cells):
        return None
    return _mean_of([cell.bounds[metric] for cell in cells])


def bounds_overall(metric: str, by_variation: Iterable[list[Cell]]) -> Bounds | None:
    """Bounds of the mean over variations, each of them the mean over its draws."""
    parts = []
    for cells in by_variation:
        if (bounds := mean_bounds(metric, cells)) is None:
            return None
        parts.append(bounds)
    return _mean_of(parts) if parts else None


def _mean_of(bounds: list[Bounds]) -> Bounds:
    lowest, highest = ([limits.lowest for limits in bounds], [limits.highest for limits in bounds])
    return Bounds(float(np.mean(lowest)), float(np.mean(highest)))


def finite_or_none(value: float | None) -> float | None:
    """The value as a float, None where it is not finite."""
    return float(value) if value is not None and np.isfinite(value) else None
