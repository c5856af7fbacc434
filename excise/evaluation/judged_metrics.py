"""Metrics of a scenario of which some variations cannot be judged: their rows, and over how many the others are.

Here rows of `excise.evaluation.numbers` or `excise.evaluation.toxicity` are put together; what can be judged is decided
in `excise.evaluation.judged`, and no figure is estimated here.
"""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from excise.conditions import ALL, COLUMNS
from excise.evaluation.judged import JUDGED
from excise.evaluation.rows import SCHEMA

WITHOUT_VALUES = (
    "parse_rate",
    "leftover",
    "sampled",
    "share_scored",
    "prompt_toxicity_bias",
    "prompt_mean_toxicity",
    "perplexity",
    "density",
)
"""Metrics that are told of a variation that cannot be judged: those that need no answer with a value."""
_GAPS = ("gap_mean", "toxicity_bias")


def metrics_of(
    evaluate: Callable[[pl.DataFrame, pl.DataFrame], pl.DataFrame],
    completions: pl.DataFrame,
    pruned: pl.DataFrame,
    judged: list[str],
) -> pl.DataFrame:
    """The metrics of the judged variations, and what can be told of the others.

    evaluate: makes rows with the columns of `SCHEMA` from unpruned and pruned completions, the latter perhaps none.
    "(all)" is made of judged variations alone, and one row more per condition, of the metric `JUDGED`, says of how many
    a gap is known. Of the others there are unpruned rows, all null (n 0) but for `WITHOUT_VALUES`.
    """
    asked = completions["variation"].n_unique()
    able = pl.col("variation").is_in(judged)
    parts = []
    if judged:
        rows = evaluate(completions.filter(able), pruned.filter(able))
        parts += [rows, _counts(rows, asked)]
    if len(judged) < asked:
        rows = evaluate(completions.filter(~able), pruned.clear()).filter(pl.col("variation") != ALL)
        without_values = pl.col("metric").is_in(WITHOUT_VALUES)
        figures = [name for name, kind in rows.schema.items() if kind == pl.Float64]
        rows = rows.with_columns(
            *(pl.when(without_values).then(pl.col(name)).alias(name) for name in figures),
            n=pl.when(without_values).then(pl.col("n")).otherwise(0),
        )
        parts.append(rows)
    return pl.concat(parts)


def _counts(rows: pl.DataFrame, asked: int) -> pl.DataFrame:
    """A row of the metric `JUDGED` per condition that has rows over all variations."""
    known = rows.filter(pl.col("metric").is_in(_GAPS) & (pl.col("variation") != ALL) & pl.col("estimate").is_not_null())
    counted = {tuple(key): count for *key, count in known.group_by(COLUMNS).agg(pl.len()).iter_rows()}
    places = rows.filter(pl.col("variation") == ALL).select("model", "scenario", "variation", *COLUMNS)
    added = [
        {
            **row,
            "metric": JUDGED,
            "estimate": float(counted.get(tuple(row[column] for column in COLUMNS), 0)),
            "n": asked,
        }
        for row in places.unique(maintain_order=True).iter_rows(named=True)
    ]
    return pl.DataFrame(added, schema=rows.schema if added else SCHEMA)
