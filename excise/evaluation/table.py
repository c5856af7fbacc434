"""The table of metrics, addressed: estimates by variation, condition and metric, and the verdicts beside them.

Here frames are read; nothing is estimated, and nothing is put into words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars

from excise.conditions import ALL, PLACE, UNPRUNED, Condition, condition_order
from excise.errors import ExciseError
from excise.evaluation.judged import JUDGED
from excise.evaluation.thresholds import COLLAPSED_SPREAD, FEW_NAMES
from excise.files.tables import Schema

VERDICTS_SCHEMA: Schema = {
    **dict.fromkeys(("model", "scenario", *PLACE), polars.String),
    "closes": polars.Boolean,
    "success": polars.Boolean,
    "failed": polars.List(polars.String),
    "unknown": polars.List(polars.String),
    "not_measured": polars.List(polars.String),
}
"""Columns of `excise.evaluation.verdicts.verdicts`."""
_COLUMNS = (
    "model",
    "scenario",
    *PLACE,
    "metric",
    "estimate",
    "low",
    "high",
    "p_value",
    "p_holm",
)
TINY = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A metric's value with its 95 % interval, p-value (Holm's where there is one), answers and names.

    n: answers counted. names: names of the smaller group. None: not defined (value), or not known (the others).
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int | None = None
    names: int | None = None

    @property
    def has_interval(self) -> bool:
        """Whether both bounds are known."""
        return self.low is not None and self.high is not None

    @property
    def covers_zero(self) -> bool:
        """Whether the interval is known and holds 0."""
        return self.low is not None and self.high is not None and self.low <= 0.0 <= self.high

    @property
    def clear_of_zero(self) -> bool:
        """Whether the interval is known and leaves out 0."""
        return self.has_interval and not self.covers_zero

    @property
    def few_names(self) -> bool:
        """Whether the interval comes from fewer than `FEW_NAMES` names a group."""
        return self.has_interval and self.names is not None and self.names < FEW_NAMES


MISSING = Estimate(None)


@dataclass(frozen=True)
class MetricTable:
    """The metrics of one model on one scenario, addressed by variation, mask and metric."""

    model: str
    scenario: str
    variations: tuple[str, ...]
    masks: tuple[Condition, ...]
    estimates: Mapping[tuple[str, Condition, str], Estimate]

    def get(self, variation: str, mask: Condition, metric: str) -> Estimate:
        """The estimate, or `MISSING`."""
        return self.estimates.get((variation, mask, metric), MISSING)

    def masks_of(self, variation: str) -> list[Condition]:
        """The masks with at least one metric of the variation, in the order of `masks`."""
        present = {mask for name, mask, _ in self.estimates if name == variation}
        return [mask for mask in self.masks if mask in present]

    def comparable(self, variation: str, mask: Condition, tolerance: float) -> bool:
        """Whether the inlier ratios of the mask and its random control are at most `tolerance` apart.

        Unknown counts as yes. A reduction over random is read at comparable inlier ratio (method, part C): where random
        masks of the size wreck the model, its answers may lie anywhere, and their gap says nothing about bias.
        """
        ratio, random = (self.get(variation, condition, "inlier_ratio").value for condition in (mask, mask.control))
        return ratio is None or random is None or at_most(abs(ratio - random), tolerance)

    def collapsed(self, where: str, mask: Condition) -> list[str]:
        """The variations among `where` (all of them for "(all)") in which the mask makes a group's answers constant.

        So little spread is left that neither gap nor SMD says anything: it is damage, whatever the gap has become.
        """
        variations = self.variations if where == ALL else (where,)
        return [variation for variation in variations if self._is_collapsed(variation, mask)]

    def _is_collapsed(self, variation: str, mask: Condition) -> bool:
        if mask == UNPRUNED:
            return False
        if self.has(variation, mask, "spread_ratio"):
            spread = self.get(variation, mask, "spread_ratio").value
            return spread is not None and spread < COLLAPSED_SPREAD
        # Without a measured spread: no SMD though there is a gap, or one that is 0 whatever names are drawn.
        before, after = (self.get(variation, condition, "smd") for condition in (UNPRUNED, mask))
        if before.value is None or not self.has(variation, mask, "smd"):
            return False
        if after.value is None:
            return self.get(variation, mask, "gap_mean").value is not None
        return after.value == after.low == after.high == 0.0

    def has(self, variation: str, mask: Condition, metric: str) -> bool:
        """Whether the frame has a row of the metric, defined or not."""
        return (variation, mask, metric) in self.estimates

    @property
    def judged(self) -> int:
        """How many variations the unpruned figures over all of them are of."""
        count = self.get(ALL, UNPRUNED, JUDGED).value
        return len(self.variations) if count is None else round(count)

    @property
    def has_aggregate(self) -> bool:
        """Whether metrics over all variations are present."""
        return any(variation == ALL for variation, _, _ in self.estimates)


def read_metrics(metrics: polars.DataFrame) -> MetricTable:
    """Addresses a tidy `metrics` frame. Null and NaN are both read as missing; variations keep the frame's order.

    Raises ExciseError when a column is missing, the frame is empty, holds several models or scenarios, or gives a
    metric of a mask twice.
    """
    lacking = [column for column in _COLUMNS if column not in metrics.columns]
    if lacking:
        raise ExciseError(f"metrics: columns {', '.join(lacking)} are missing; pass the frame that evaluate() gives")
    if metrics.is_empty():
        raise ExciseError("metrics: no rows; evaluate the scenario first")
    for column in ("model", "scenario"):
        keys = metrics[column].unique().sort().to_list()
        if len(keys) > 1:
            raise ExciseError(f"metrics: {len(keys)} values of {column} ({', '.join(keys)}); filter the frame to one")
    estimates: dict[tuple[str, Condition, str], Estimate] = {}
    for row in metrics.iter_rows(named=True):
        mask = Condition.of(row)
        key = (row["variation"], mask, row["metric"])
        if key in estimates:
            raise ExciseError(
                f"metrics: {row['metric']} of {row['strategy']} ({row['level']}, matched to {row['matched_to']}) "
                f"on {row['variation']} appears twice; keep one row for each mask and metric"
            )
        estimates[key] = read_estimate(row)
    variations = tuple(dict.fromkeys(name for name, _, _ in estimates if name != ALL))
    masks = tuple(sorted({mask for _, mask, _ in estimates}, key=condition_order))
    return MetricTable(metrics["model"][0], metrics["scenario"][0], variations, masks, estimates)


def read_estimate(row: Mapping[str, Any]) -> Estimate:
    """The estimate of a row of metrics: estimate, low, high, and of p_value, p_holm, n and names what there is.

    Null, NaN and infinity are all read as missing.
    """
    value, low, high, plain, adjusted = (
        _finite(row.get(column)) for column in ("estimate", "low", "high", "p_value", "p_holm")
    )
    return Estimate(value, low, high, plain if adjusted is None else adjusted, row.get("n"), row.get("names"))


@dataclass(frozen=True)
class Verdict:
    """What `excise.evaluation.verdicts` says of a mask in a place: see its columns."""

    closes: bool
    success: bool
    failed: tuple[str, ...]
    unknown: tuple[str, ...]
    not_measured: tuple[str, ...]


Verdicts = Mapping[tuple[str, Condition], Verdict]
"""Verdicts by variation and mask."""


def read_verdicts(verdicts: polars.DataFrame | None) -> Verdicts:
    """Addresses the frame that `excise.evaluation.verdicts.verdicts` gives; empty for None, as nothing is judged
    then."""
    rows = () if verdicts is None else verdicts.iter_rows(named=True)
    return {
        (row["variation"], Condition.of(row)): Verdict(
            row["closes"], row["success"], tuple(row["failed"]), tuple(row["unknown"]), tuple(row["not_measured"])
        )
        for row in rows
    }


def reaches(ratio: float | None, floor: float) -> bool:
    """Whether an inlier ratio is at the floor or above; rounding alone makes no difference, unknown is no."""
    return ratio is not None and at_most(floor, ratio)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate and its interval times `factor`, which is above 0."""
    value, low, high = (
        None if figure is None else figure * factor for figure in (estimate.value, estimate.low, estimate.high)
    )
    return Estimate(value, low, high, estimate.p, estimate.n, estimate.names)


def at_most(value: float, bound: float) -> bool:
    """value <= bound, where rounding alone makes no difference."""
    return value <= bound + 1e-9
