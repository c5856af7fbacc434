"""Perplexities of a text as rows of an axis's metrics, beside the unpruned one's.

Not here: how they are measured (`perplexity`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from excise.conditions import ALL, COLUMNS, UNPRUNED, Condition
from excise.evaluation.cells import require_table
from excise.evaluation.rows import MetricRows, finite_or_none

_COLUMNS = (*COLUMNS, "variation", "draw", "perplexity", "low", "high")


def with_bounds(table: MetricRows, low: float | None, high: float | None) -> None:
    """Give the last row bounds that do not come from resampled clusters; none where its estimate is not defined."""
    if table.rows[-1]["estimate"] is not None:
        table.rows[-1] |= {"low": finite_or_none(low), "high": finite_or_none(high)}


def perplexities(frame: pl.DataFrame | None) -> dict[tuple[Condition, str], list[dict]]:
    """Rows of the perplexity frame by condition and variation."""
    if frame is None or frame.is_empty():
        return {}
    require_table(frame, _COLUMNS, "perplexities")
    rows: dict[tuple[Condition, str], list[dict]] = {}
    for row in frame.sort("draw", maintain_order=True).iter_rows(named=True):
        # One that is not known must not leave the mean to the others.
        known = row["perplexity"] is not None and np.isfinite(row["perplexity"])
        row["perplexity"] = row["perplexity"] if known else np.nan
        rows.setdefault((Condition.of(row), row["variation"] or ALL), []).append(row)
    return rows


def _found(texts: dict[tuple[Condition, str], list[dict]], condition: Condition, variation: str) -> list[dict]:
    """A variation's rows, else those for all; for all without rows of its own, those of every variation."""
    known = texts.get((condition, variation)) or texts.get((condition, ALL))
    if known is None and variation == ALL:
        known = [row for (of_condition, _), rows in texts.items() if of_condition == condition for row in rows]
    return known or []


def perplexity_rows(table: MetricRows, texts: dict, variation: str, condition: Condition) -> None:
    rows = _found(texts, condition, variation)
    if not rows:
        return
    mean = float(np.mean([row["perplexity"] for row in rows]))
    table.add(variation, condition, "perplexity", mean, len(rows))
    with_bounds(table, *_outermost(rows, "low", "high"))
    unpruned = _found(texts, UNPRUNED, variation)
    if not unpruned:
        return
    base = float(np.mean([row["perplexity"] for row in unpruned]))
    base = base if base > 0 else np.nan
    table.add(variation, condition, "perplexity_ratio", mean / base, len(rows))
    if condition != UNPRUNED:
        low, high = _outermost(rows, "difference_low", "difference_high")
        with_bounds(table, None if low is None else 1 + low / base, None if high is None else 1 + high / base)


def _outermost(rows: Sequence[dict], low: str, high: str) -> tuple[float | None, float | None]:
    """The lowest and the highest bound of the rows; None where one of them has none."""
    lows, highs = ([row[name] for row in rows if row.get(name) is not None] for name in (low, high))
    return (min(lows) if len(lows) == len(rows) else None), (max(highs) if len(highs) == len(rows) else None)
