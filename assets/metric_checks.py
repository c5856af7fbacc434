"""Checks of masks and of metrics: is every figure known, and does a mask keep within its bounds?"""

from dataclasses import replace

import polars as pl

from assets.checks import ERROR, WARN, Outcome, at_least, place_of, unmet_expectations
from excise.conditions import ALL, NO_STRATEGY, PLACE

REDUCTIONS = ("gap_reduction", "reduction_over_random", "smd_reduction", "smd_reduction_over_random", "bias_reduction")
STANDARDIZED = ("smd", "abs_smd")
"""Metrics that are not defined where a known gap has no deviation to be measured by."""
MAY_LACK = ("spread_ratio", "excess_change", "closed_by_majority", "closed_by_minority")
"""Metrics that are not defined where unpruned answers do not vary, or there is nothing to reduce."""
ALWAYS_DEFINED = ("parse_rate", "share_scored", "density", "judged_variations")


def metrics_finite(metrics: pl.DataFrame) -> Outcome:
    """Every estimate is a finite number, for every variation and mask.

    A reduction may be null: where the unpruned gap cannot be told from 0 there is nothing to reduce, and where all
    answers became the same nothing was. So may all figures of a variation, and over all of them, where a group gave no
    answer: `judged_variations` names it. So may figures in units of the answers' spread, where the raw gap is known.
    """
    import great_expectations.expectations as gxe

    largest = 1.7e308
    place = list(PLACE)
    gap_known = metrics.filter((pl.col("metric") == "gap_mean") & pl.col("estimate").is_not_null()).select(place)
    answered = metrics.join(gap_known.with_columns(gap_known=True), on=place, how="left", nulls_equal=True)
    may_lack = pl.col("metric").is_in([*REDUCTIONS, *MAY_LACK]) | (
        pl.col("metric").is_in(STANDARDIZED) & pl.col("gap_known")
    )
    answered = answered.join(
        _unanswered(metrics), on=[*place, "metric"], how="anti", nulls_equal=True, maintain_order="left"
    )
    expected = answered.filter(pl.col("estimate").is_not_null() | ~may_lack.fill_null(False))
    unmet = unmet_expectations(
        expected.select("metric", "estimate"),
        [
            gxe.ExpectTableRowCountToBeBetween(min_value=1),
            gxe.ExpectColumnValuesToNotBeNull(column="estimate"),
            gxe.ExpectColumnValuesToBeBetween(column="estimate", min_value=-largest, max_value=largest),
        ],
    )
    bad = expected.filter(pl.col("estimate").is_null() | ~pl.col("estimate").is_finite())
    worst = None
    if not bad.is_empty():
        row = bad.row(0, named=True)
        worst = f"{row['metric']} of {place_of(row)}"
    message = f"All {expected.height:,} metrics are finite."
    if undefined_count := metrics.height - expected.height:
        message += f" {undefined_count:,} are not defined: there is no clear gap to reduce, or the answers do not vary."
    if metrics.is_empty():
        message = "There are no metrics."
    elif worst is not None:
        message = f"{bad.height:,} of {metrics.height:,} metrics are not finite; first: {worst}."
    table = bad.select(*PLACE, "metric", "estimate").to_dicts()
    return Outcome("metrics_finite", not unmet, ERROR, message, float(bad.height), 0.0, worst, table, unmet)


def _unanswered(metrics: pl.DataFrame) -> pl.DataFrame:
    """The null estimates, by place and metric, that are so because a group has no answer with a value there, or in a
    variation of those together."""
    place = list(PLACE)
    silent = metrics.filter(pl.col("estimate").is_null()).filter(
        (pl.col("metric").is_in(["mean_majority", "mean_minority"]) & (pl.col("n") == 0))
        | (pl.col("metric") == "toxicity_bias")
    )
    silent = silent.select(place).unique()
    places = pl.concat([silent, silent.with_columns(variation=pl.lit(ALL))]).unique()
    lacking = metrics.filter(pl.col("estimate").is_null() & ~pl.col("metric").is_in(ALWAYS_DEFINED))
    return lacking.join(places, on=place, how="semi", nulls_equal=True).select(*place, "metric")


def mask_density(masks: pl.DataFrame, floor: float, ceiling: float) -> Outcome:
    """Every strategy's mask prunes more than `floor` and at most `ceiling` of the weights it could prune."""
    import great_expectations.expectations as gxe

    densities = (
        masks.filter(pl.col("matched_to").is_null())
        .group_by("variation", "strategy", "level", maintain_order=True)
        .agg(density=pl.col("pruned").sum() / pl.col("size").sum(), pruned=pl.col("pruned").sum())
        .sort("density")
    )
    unmet = unmet_expectations(
        densities.select("density"),
        [
            gxe.ExpectTableRowCountToBeBetween(min_value=1),
            gxe.ExpectColumnValuesToNotBeNull(column="density"),
            gxe.ExpectColumnValuesToBeBetween(column="density", min_value=floor, strict_min=True, max_value=ceiling),
        ],
    )
    if densities.is_empty():
        return Outcome("mask_density", False, WARN, "There are no masks.", None, ceiling, None, (), unmet)
    low, high = densities.row(0, named=True), densities.row(-1, named=True)
    row, bound = (low, floor) if low["density"] <= floor else (high, ceiling)
    worst, figure = place_of(row), float(row["density"])
    if not unmet:
        message = f"{densities.height} masks prune {low['density']:.3%} to {high['density']:.3%} of their weights."
    elif figure <= floor:
        message = f"{worst} prunes {figure:.3%}, which is not above {floor:.3%}."
    else:
        message = f"{worst} prunes {figure:.3%}, more than {ceiling:.3%}."
    return Outcome("mask_density", not unmet, WARN, message, figure, bound, worst, densities.to_dicts(), unmet)


def share_scored(metrics: pl.DataFrame, floor: float) -> Outcome:
    """Under every strategy's mask, enough continuations of every variation have a score.

    It takes the place of `inlier_ratio` where continuations are judged: an empty one has no score.
    """
    shares = (
        metrics.filter(
            (pl.col("metric") == "share_scored") & (pl.col("variation") != ALL) & pl.col("matched_to").is_null()
        )
        .select("variation", "strategy", "level", share_scored="estimate")
        .sort("share_scored", nulls_last=False)
    )
    outcome = at_least("share_scored", shares, "share_scored", floor, "continuations that have a score")
    return replace(outcome, check="inlier_ratio")


def inlier_ratio(metrics: pl.DataFrame, floor: float) -> Outcome:
    """Every strategy's mask keeps the inlier ratio of every variation at `floor` or above. Controls are not judged."""
    ratios = (
        metrics.filter(
            (pl.col("metric") == "inlier_ratio")
            & (pl.col("variation") != ALL)
            & (pl.col("strategy") != NO_STRATEGY)
            & pl.col("matched_to").is_null()
        )
        .select("variation", "strategy", "level", inlier_ratio="estimate")
        .sort("inlier_ratio", nulls_last=False)
    )
    return at_least("inlier_ratio", ratios, "inlier_ratio", floor, "answers in the unpruned model's range")


def within_budgets(verdicts: pl.DataFrame) -> Outcome:
    """No strategy's own mask is shown to close the gap and breaks a budget beside it, or leaves one unmeasured.

    verdicts: of `excise.evaluation.verdicts`. Masks that close no gap are no temptation, and controls are not judged.
    """
    of_strategies = verdicts.filter(pl.col("matched_to").is_null() & (pl.col("variation") != ALL))
    closing = of_strategies.filter("closes")
    columns = ("variation", "strategy", "level", "failed", "unknown", "not_measured")
    table = [
        {name: ", ".join(row[name]) if isinstance(row[name], list) else row[name] for name in columns}
        for row in closing.iter_rows(named=True)
    ]
    broken = [row for row in table if row["failed"]]
    unknown = [row for row in table if row["unknown"] and not row["failed"]]
    if of_strategies.is_empty():
        message = "There is no mask to judge."
    elif not table:
        message = f"None of {of_strategies.height} masks is shown to close a gap, so no budget is held against any."
    elif not broken and not unknown:
        message = f"Masks that close a gap: {len(table)} of {of_strategies.height}. All keep every budget."
    else:
        message = f"Masks that close a gap: {len(table)}; of these break a budget: {len(broken)}"
        message += f"; a budget is not known: {len(unknown)}" if unknown else ""
        message += ". "
        message += "; ".join(f"{place_of(row)}: {row['failed'] or row['unknown']}" for row in [*broken, *unknown][:3])
        message += "; and others." if len(broken) + len(unknown) > 3 else "."
    worst = place_of((broken or unknown)[0]) if broken or unknown else None
    return Outcome("within_budgets", worst is None, WARN, message, float(len(broken)), 0.0, worst, table)
