"""Rows of the analyses of a model's masks over all its scenarios: what they share, where they lie, where they work.

Counts of shared weights are `overlap`; here they, the counts of the table `masks` and the rows of `metrics` are
arranged, and nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from excise.conditions import CROSS_CONTEXT, PROMPT_SPECIFIC, RANDOM, WITHIN_CONTEXT
from excise.evaluation.overlap import overlap_table

REFERENCE = "purchase"
"""The scenario whose masks the others are laid upon, where it has any."""
OVERLAP_SCHEMA = {
    "strategy": pl.String,
    "level": pl.String,
    "scenario": pl.String,
    "variation": pl.String,
    "reference_scenario": pl.String,
    "reference_variation": pl.String,
    "shared": pl.Int64,
    "count": pl.Int64,
    "overlap": pl.Float64,
    "chance": pl.Float64,
    "excess": pl.Float64,
}
_OF_MASK = ("scenario", "variation", "strategy", "level")


def overlap_rows(strategy: str, paths: Mapping[tuple[str, str], Path]) -> pl.DataFrame:
    """Rows of OVERLAP_SCHEMA for one strategy; `paths` has the file of the prompt-specific mask of each (scenario,
    variation)."""
    places = list(paths)
    columns = [place for place in places if place[0] == REFERENCE] or places
    counts = overlap_table([paths[place] for place in places], [paths[place] for place in columns])
    rows = [
        (
            strategy,
            PROMPT_SPECIFIC,
            *place,
            *reference,
            int(counts.shared[row, column]),
            int(counts.row_counts[row]),
            float(counts.fraction[row, column]),
            float(counts.chance[column]),
            float(counts.excess[row, column]),
        )
        for row, place in enumerate(places)
        for column, reference in enumerate(columns)
    ]
    frame = pl.DataFrame(rows, schema=OVERLAP_SCHEMA, orient="row")
    return frame.with_columns(pl.col("overlap", "chance", "excess").fill_nan(None))


def overlap_by_scenario(rows: pl.DataFrame) -> pl.DataFrame:
    """Mean overlap of two scenarios' masks, over pairs of different masks."""
    different = (pl.col("scenario") != pl.col("reference_scenario")) | (
        pl.col("variation") != pl.col("reference_variation")
    )
    return (
        rows.filter(different)
        .group_by("strategy", "scenario", "reference_scenario", maintain_order=True)
        .agg(pl.col("overlap", "chance", "excess").mean())
    )


def shares(masks: pl.DataFrame) -> pl.DataFrame:
    """Rows of the table `masks` with share_of_matrix and share_of_mask, sorted by mask, layer and role."""
    whole = pl.col("pruned").sum().over(_OF_MASK)
    return masks.with_columns(
        share_of_matrix=pl.col("pruned") / pl.col("size"),
        share_of_mask=pl.when(whole > 0).then(pl.col("pruned") / whole),
    ).sort(*_OF_MASK, "layer", "role")


def shares_by_role(rows: pl.DataFrame) -> pl.DataFrame:
    """Of each strategy and level: the pruned share of each role's matrices, and the role's share of all that is pruned.

    Sums over scenarios and variations.
    """
    sums = rows.group_by("strategy", "level", "role").agg(pl.col("pruned", "size").sum())
    return sums.select(
        "strategy",
        "level",
        "role",
        share_of_matrices=pl.col("pruned") / pl.col("size"),
        share_of_masks=(pl.col("pruned") / pl.col("pruned").sum().over("strategy", "level")).fill_nan(None),
    ).sort("strategy", "level", "role")


def transfers(metrics: pl.DataFrame, scenarios: Sequence[str]) -> pl.DataFrame:
    """Rows of `metrics` over all variations whose masks come from a scenario, with that as `source`, sorted.

    scenarios: all keys in order; masks of a scenario that is not among them are left out. The source is null where all
    scenarios but the evaluated one were pooled.
    """
    level = pl.col("level")
    source = (
        pl.when(level == WITHIN_CONTEXT)
        .then(pl.col("scenario"))
        .when(level.str.starts_with(f"{CROSS_CONTEXT}/"))
        .then(level.str.strip_prefix(f"{CROSS_CONTEXT}/"))
    )
    places = {key: place for place, key in enumerate(scenarios)}
    order = [pl.col(name).replace_strict(places, default=None) for name in ("source", "scenario")]
    return (
        metrics.with_columns(source=source)
        .filter(pl.col("source").is_in(scenarios) | (level == CROSS_CONTEXT))
        .sort(*order, "strategy", "matched_to", "metric", nulls_last=True)
    )


def beyond_random(rows: pl.DataFrame) -> pl.DataFrame:
    """The headline of every mask of `transfers`, with the inlier ratios of the mask and of its random control."""
    keys = ["strategy", "source", "scenario", "level"]
    of_strategies = rows.filter(pl.col("matched_to").is_null())
    beyond = of_strategies.filter(pl.col("metric") == "reduction_over_random").select(
        *keys, reduction_over_random="estimate", low="low", high="high"
    )
    inliers = rows.filter(pl.col("metric") == "inlier_ratio")
    masks = inliers.filter(pl.col("matched_to").is_null()).select(*keys, inlier_ratio="estimate")
    random = inliers.filter(pl.col("strategy") == RANDOM).select(
        strategy="matched_to", source="source", scenario="scenario", level="level", random_inlier_ratio="estimate"
    )
    for figures in (beyond, random):
        masks = masks.join(figures, on=keys, how="left", nulls_equal=True, maintain_order="left")
    return masks.select(*keys, "reduction_over_random", "low", "high", "inlier_ratio", "random_inlier_ratio")
