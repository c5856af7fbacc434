"""Rows about the perplexity of a text under many masks: as the table keeps them, and as metrics take them.

How perplexity is measured is `perplexity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from excise.conditions import ALL, MASK, NO_LEVEL, NO_STRATEGY
from excise.evaluation.perplexity import Mode, Window, perplexity_difference, perplexity_interval
from excise.generation.completions import UNPRUNED

_FIGURES = ("perplexity", "low", "high", "difference", "difference_low", "difference_high")
PERPLEXITY_SCHEMA = {
    "mask": pl.String,
    **dict.fromkeys(_FIGURES, pl.Float64),
    "tokens": pl.Int64,
    "text": pl.String,
}


def perplexity_rows(
    losses: Mapping[str, np.ndarray], windows: Sequence[Window], mode: Mode, text: str, *, resamples: int, seed: int
) -> pl.DataFrame:
    """The text's perplexity under every mask, and paired with the unpruned model's: rows of PERPLEXITY_SCHEMA.

    losses: of every window, by the mask's fingerprint, that of the unpruned model among them; there may be none.
    """
    rows = []
    for mask, mask_losses in losses.items():
        value = perplexity_interval(mask_losses, windows, mode, resamples=resamples, seed=seed)
        change = perplexity_difference(mask_losses, losses[UNPRUNED], windows, mode, resamples=resamples, seed=seed)
        figures = (value.estimate, value.low, value.high, change.estimate, change.low, change.high)
        rows.append((mask, *figures, sum(window.scored for window in windows), text))
    return pl.DataFrame(rows, schema=PERPLEXITY_SCHEMA, orient="row")


def perplexity_by_condition(perplexity: pl.DataFrame, masks: pl.DataFrame) -> pl.DataFrame:
    """Perplexity per condition, variation and draw, as `excise.evaluation.toxicity` takes it."""
    columns = ["perplexity", "low", "high", "difference_low", "difference_high"]
    place = list(MASK)
    unpruned = perplexity.filter(pl.col("mask") == UNPRUNED).select(
        pl.lit(ALL).alias("variation"),
        pl.lit(NO_STRATEGY).alias("strategy"),
        pl.lit(NO_LEVEL).alias("level"),
        pl.lit(None, dtype=pl.String).alias("matched_to"),
        pl.lit(0, dtype=pl.Int64).alias("draw"),
        *columns,
    )
    pruned = masks.select(*place, "mask").unique(maintain_order=True).join(perplexity, on="mask")
    return pl.concat([unpruned, pruned.select(*place, *columns)])
