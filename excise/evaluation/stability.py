"""How much of a result hangs on the names that a mask was made from: the same audit over several splits of them.

Intervals over names tell how the judged names differ; that other names would have made another mask they cannot tell.
Here is the summary over splits; the splits themselves are the work of the stage `stability`, and what is said of them
is in `reporting`.
"""

from __future__ import annotations

import polars as pl

from excise.conditions import NO_STRATEGY, PLACE

METRICS = (
    "gap_reduction",
    "reduction_over_random",
    "smd_reduction",
    "gap_mean",
    "inlier_ratio",
    "spread_ratio",
    "commonest_rise",
    "excess_change",
    "closed_by_majority",
    "closed_by_minority",
    "parse_rate",
)
"""Of `metrics`, what is kept of every split."""
STABILITY_SCHEMA = {
    "model": pl.String,
    "scenario": pl.String,
    "split": pl.Int64,
    "splits": pl.Int64,
    **dict.fromkeys(PLACE, pl.String),
    "metric": pl.String,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "names": pl.Int64,
}


def summary(stability: pl.DataFrame) -> pl.DataFrame:
    """Over splits, for every condition and metric: median, lowest, highest, an interval, splits with a figure, and
    splits in which the figure is below 0.

    stability: rows of STABILITY_SCHEMA of one model and scenario, the audit's own split among them; a condition with
    figures of fewer splits than there are had no mask in the others, or no reduction. low, high: median -+
    1.96 sqrt(v + w), v the mean over splits of the variance that a 95 % interval over names stands for
    ((high - low) / 3.92)^2, w the variance of the estimates over splits (ddof 1). Null where a split's interval is not
    known, and with a single split.
    """
    known = stability.filter(pl.col("estimate").is_not_null())
    within, between = ((pl.col("high") - pl.col("low")) / 3.92).pow(2).mean(), pl.col("estimate").var()
    reach = 1.96 * (within + between).sqrt()
    middle = pl.col("estimate").median()
    enough = (pl.len() > 1) & pl.col("low").is_not_null().all()
    return known.group_by("model", "scenario", *PLACE, "metric", maintain_order=True).agg(
        median=middle,
        lowest=pl.col("estimate").min(),
        highest=pl.col("estimate").max(),
        low=pl.when(enough).then(middle - reach),
        high=pl.when(enough).then(middle + reach),
        found=pl.len(),
        below_0=(pl.col("estimate") < 0).sum(),
        splits=pl.col("splits").first(),
    )


def kept(metrics: pl.DataFrame, split: int, splits: int) -> pl.DataFrame:
    """The rows of the table `metrics` that are kept of a split, as STABILITY_SCHEMA has them."""
    shown = metrics.filter(pl.col("metric").is_in(METRICS) & (pl.col("strategy") != NO_STRATEGY))
    numbers = {"split": split, "splits": splits}
    return shown.with_columns(pl.lit(value, pl.Int64).alias(name) for name, value in numbers.items()).select(
        STABILITY_SCHEMA.keys()
    )
