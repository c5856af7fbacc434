"""How much of a model the masks prune, as the metrics tell it.

Not here: what pruning did to the answers (`numbers`, `toxicity`).
"""

from __future__ import annotations

import polars as pl

from excise.conditions import COLUMNS
from excise.evaluation.cells import require_table

_COLUMNS = ("model", "scenario", "variation", *COLUMNS, "draw", "pruned", "size")


def mask_densities(masks: pl.DataFrame, model: str, scenario: str) -> dict[tuple, list[float]]:
    """Pruned share of the weights per (condition, variation), one for each draw."""
    if masks.is_empty():
        return {}
    require_table(masks, _COLUMNS, "masks")
    keys = [*COLUMNS, "variation", "draw"]
    rows = masks.filter((pl.col("model") == model) & (pl.col("scenario") == scenario))
    sums = rows.group_by(keys, maintain_order=True).agg(pl.col("pruned").sum(), pl.col("size").sum())
    result: dict[tuple, list[float]] = {}
    for *condition, variation, _draw, count, size in sums.select(*keys, "pruned", "size").iter_rows():
        if size:
            result.setdefault((tuple(condition), variation), []).append(count / size)
    return result
