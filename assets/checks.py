"""The quality checks: each a Great Expectations suite over a small table of figures, and what it found in words.

Here belong the checks, their results as Dagster shows them, and as the table `checks` keeps them for the roll-up.
Every suite asks for rows and for values first: expectations about values pass on an empty table and ignore nulls.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import polars as pl

from assets.partitions import Catalogue
from assets.stage import table_value
from excise.conditions import ALL, COLUMNS, MASK, NO_STRATEGY, PLACE
from excise.evaluation.judged import (
    compared_groups,
    each_unjudged,
    judgements,
    mend,
    nothing_written,
    percent,
    share_with_value,
)
from excise.scenarios import Scenario
from resources.tables import TABLES
from resources.warehouse import Warehouse

ERROR = dg.AssetCheckSeverity.ERROR
WARN = dg.AssetCheckSeverity.WARN
REDUCTIONS = ("gap_reduction", "reduction_over_random", "smd_reduction", "smd_reduction_over_random", "bias_reduction")
STANDARDIZED = ("smd", "abs_smd")
"""Metrics that are not defined where a known gap has no deviation to be measured by."""
MAY_LACK = ("spread_ratio", "excess_change", "closed_by_majority", "closed_by_minority")
"""Metrics that are not defined where unpruned answers do not vary, or there is nothing to reduce."""
ALWAYS_DEFINED = ("parse_rate", "share_scored", "density", "judged_variations")

DESCRIPTIONS = {
    "completions_complete_and_balanced": "Every prompt has all its samples, once each; groups have equally many.",
    "judged_variations": "Every variation has enough answers of every group to be judged.",
    "parse_rate": "Enough answers of every variation and group hold a single number.",
    "mask_density": "Every strategy's mask prunes something, and not too much of the model.",
    "within_budgets": "No strategy's mask closes the gap and breaks a budget: spread, answers, text, other scenarios.",
    "metrics_finite": "Every metric of every mask is there and is a finite number.",
    "inlier_ratio": "Under every strategy's mask, enough answers stay in the range of the unpruned model's.",
    "all_checks_pass": "No check of any partition fails.",
}
MASS_ERROR = 1e-6
"""How far from 1 rounding may take the probabilities of a prompt's answers."""
BLOCKING = ("completions_complete_and_balanced",)


@dataclass(frozen=True)
class Outcome:
    """What a check found: the worst figure, the bound it was held against, and where."""

    check: str
    passed: bool
    severity: dg.AssetCheckSeverity
    message: str
    figure: float | None = None
    bound: float | None = None
    worst: str | None = None
    table: Sequence[dict[str, Any]] = field(default=(), repr=False)
    unmet: Sequence[str] = ()

    def result(self) -> dg.AssetCheckResult:
        """As Dagster shows it."""
        metadata: dict[str, Any] = {"finding": self.message}
        for name, value in (("figure", self.figure), ("bound", self.bound), ("worst", self.worst)):
            if value is not None:
                metadata[name] = value
        if self.unmet:
            metadata["unmet_expectations"] = dg.MetadataValue.md("\n".join(f"* {each}" for each in self.unmet))
        if self.table:
            metadata["figures"] = table_value(self.table)
        return dg.AssetCheckResult(
            check_name=self.check,
            passed=self.passed,
            severity=self.severity,
            metadata=metadata,
            description=self.message,
        )


def spec(check: str, asset: str, catalogue: Catalogue) -> dg.AssetCheckSpec:
    """A partitioned check of an asset of the grid."""
    return dg.AssetCheckSpec(
        check,
        asset=asset,
        description=DESCRIPTIONS[check],
        blocking=check in BLOCKING,
        partitions_def=catalogue.grid,
    )


def record(warehouse: Warehouse, asset: str, model: str, scenario: str, outcomes: Sequence[Outcome]) -> None:
    """Keep the outcomes in the table `checks`, in place of those of the partition's earlier run."""
    rows = [
        {
            "asset": asset,
            "check_name": outcome.check,
            "model": model,
            "scenario": scenario,
            "passed": outcome.passed,
            "severity": outcome.severity.value,
            "figure": outcome.figure,
            "floor": outcome.bound,
            "worst": outcome.worst,
            "message": outcome.message,
            "checked_at": datetime.now(UTC).replace(tzinfo=None),
        }
        for outcome in outcomes
    ]
    keys = {"asset": asset, "model": model, "scenario": scenario}
    warehouse.replace_partition("checks", pl.DataFrame(rows, schema=TABLES["checks"].schema), keys)


def completions_complete_and_balanced(
    completions: pl.DataFrame, prompts: pl.DataFrame, samples: int, *, masked: bool = False, balanced: bool = True
) -> Outcome:
    """Every prompt (under every mask, if `masked`) has samples 0 ... `samples`-1 once, and groups are of equal size.

    Of enumerated answers every prompt has some whose probabilities and leftover sum to 1. `prompts` has a row per
    wanted prompt (and mask), with the columns that tell them apart. balanced: groups must be of equal size, which
    subgroups of an axis need not be.
    """
    import great_expectations.expectations as gxe

    identity = ["prompt_id", *MASK[1:]] if masked else ["prompt_id"]
    exact = bool(completions["probability"].is_not_null().any())
    counted = completions.group_by(identity).agg(
        found=pl.len(),
        distinct=pl.col("sample").n_unique(),
        last=pl.col("sample").max(),
        mass=pl.col("probability").sum() + pl.col("leftover").max().fill_null(0.0),
    )
    if exact:
        samples = 1  # whole distribution
        whole = (pl.col("mass") - 1).abs() < MASS_ERROR
        counted = counted.with_columns(
            found=whole.cast(pl.Int64), distinct=(pl.col("distinct") == pl.col("found")).cast(pl.Int64), last=0
        )
    wanted = prompts.join(counted, on=identity, how="left", nulls_equal=True).with_columns(
        pl.col("found", "distinct").fill_null(0), last=pl.col("last").fill_null(-1)
    )
    unmet = unmet_expectations(
        wanted.select(*identity[:1], "found", "distinct", "last"),
        [
            gxe.ExpectTableRowCountToBeBetween(min_value=1),
            gxe.ExpectColumnValuesToNotBeNull(column="prompt_id"),
            *(
                gxe.ExpectColumnValuesToBeBetween(column=column, min_value=value, max_value=value)
                for column, value in (("found", samples), ("distinct", samples), ("last", samples - 1))
            ),
        ],
    )
    told = completions.unique(identity) if exact else completions
    unmet += unmet_expectations(
        told.select("text", "prompt_id"),
        [
            gxe.ExpectTableRowCountToEqual(value=wanted.height * samples),
            gxe.ExpectColumnValuesToNotBeNull(column="text"),
        ],
    )
    sizes = _group_sizes(told, list(MASK) if masked else ["variation"])
    if balanced:
        unmet += unmet_expectations(
            sizes.select("smallest", "largest"),
            [gxe.ExpectColumnPairValuesToBeEqual(column_A="smallest", column_B="largest")],
        )
    incomplete = wanted.filter((pl.col("found") != samples) | (pl.col("distinct") != samples))
    unbalanced = sizes.filter(pl.lit(balanced) & (pl.col("smallest") != pl.col("largest")))
    worst, figure = None, samples
    if not incomplete.is_empty():
        row = incomplete.sort("found").row(0, named=True)
        worst, figure = f"{_place(row)}, {row['subject']}", row["found"]
    elif not unbalanced.is_empty():
        worst = _place(unbalanced.row(0, named=True))
    if not unmet:
        each = "their answers enumerated" if exact else f"{samples} samples each"
        message = f"{wanted.height:,} prompts with {each}" + ("; the groups are of equal size." if balanced else ".")
    elif wanted.is_empty():
        message = "There are no prompts."
    elif not incomplete.is_empty() and exact:
        message = f"{incomplete.height:,} of {wanted.height:,} prompts lack a part of their answers; first: {worst}."
    elif not incomplete.is_empty():
        message = f"{incomplete.height:,} of {wanted.height:,} prompts do not have {samples} samples; "
        message += f"worst: {worst} has {figure}."
    elif not unbalanced.is_empty():
        message = f"The groups are not of equal size in {unbalanced.height} of {sizes.height} places; first: {worst}."
    else:
        message = "There are rows that belong to no wanted prompt, or empty texts."
    return Outcome(
        "completions_complete_and_balanced",
        not unmet,
        ERROR,
        message,
        float(figure),
        float(samples),
        worst,
        sizes.to_dicts(),
        unmet,
    )


def judged_variations(completions: pl.DataFrame, scenario: Scenario) -> Outcome:
    """Every variation can be judged (`excise.evaluation.judged`). An error only where none can: the others go on
    without it."""
    asked = completions["variation"].n_unique()
    unjudged = each_unjudged(completions, scenario)
    count = asked - unjudged.height
    if unjudged.is_empty():
        message = f"All {asked} variations can be judged." if asked > 1 else "The variation can be judged."
        return Outcome("judged_variations", True, WARN, message, float(count), float(asked))
    of_them = completions.filter(pl.col("variation").is_in(unjudged["variation"].implode()))
    words = scenario.outcome.words
    told = "; ".join(
        f"{row['variation']} ({percent(row['parse_rate'])} of the {words.answers} {words.hold}: {row['examples']})"
        for row in unjudged.iter_rows(named=True)
    )
    if silence := nothing_written(of_them):
        told = f"{', '.join(unjudged['variation'])}: {silence}"
    enough = f"answers about two {words.units} that {words.hold}"
    message = f"{unjudged.height} of {asked} variations cannot be judged, which takes {enough}:"
    message += f" {told}. {mend(of_them, scenario)}"
    return Outcome(
        "judged_variations",
        False,
        WARN if count else ERROR,
        message,
        float(count),
        float(asked),
        unjudged["variation"][0],
        unjudged.to_dicts(),
    )


def judged_under_masks(pruned: pl.DataFrame, scenario: Scenario, judged: Sequence[str], asked: int) -> Outcome:
    """Every variation that can be judged unpruned can be judged under every strategy's mask, too.

    pruned: the pruned completions; judged: those variations, of `asked` in all. Controls are not looked at, as their
    figures are null where they have no answers. An error only where there is nothing to judge at all.
    """
    unjudged, places = [], 0
    own = pruned.filter(pl.col("matched_to").is_null())
    for (strategy, level, _), rows in own.partition_by(*COLUMNS, as_dict=True, maintain_order=True).items():
        found = judgements(rows, compared_groups(scenario), scenario.outcome.cluster)
        places += found.height
        unjudged += [
            {**row, "strategy": strategy, "level": level} for row in found.filter(~pl.col("judged")).to_dicts()
        ]
    count = float(len(judged))
    if not judged:
        message = "No variation can be judged, unpruned or under a mask; why is said by the check of completions."
        return Outcome("judged_variations", False, ERROR, message, 0.0, float(asked))
    left_out = f" Over {len(judged)} of {asked} variations, as the unpruned answers to the others are too few."
    left_out = left_out if len(judged) < asked else ""
    if not unjudged:
        message = f"{len(judged)} variations can be judged under every mask.{left_out}"
        return Outcome("judged_variations", not left_out, WARN, message, count, float(asked))
    told = "; ".join(f"{_place(row)} ({percent(row['parse_rate'])} with a value)" for row in unjudged[:5])
    more = f"; and {len(unjudged) - 5} more" if len(unjudged) > 5 else ""
    message = f"{len(unjudged)} of {places} masks leave a variation too few answers to be judged: {told}{more}. "
    message += f"Their figures are null: prune less.{left_out}"
    return Outcome("judged_variations", False, WARN, message, count, float(asked), unjudged[0]["variation"], unjudged)


def parse_rate(completions: pl.DataFrame, floor: float) -> Outcome:
    """The share of answers with a number, by variation and group, is at least `floor`."""
    rates = (
        completions.group_by("variation", "group", maintain_order=True)
        .agg(parse_rate=share_with_value(), answers=pl.len())
        .sort("parse_rate", maintain_order=True)
    )
    return _at_least("parse_rate", rates, "parse_rate", floor, "answers that hold a number")


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
    found = _at_least("share_scored", shares, "share_scored", floor, "continuations that have a score")
    return replace(found, check="inlier_ratio")


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
    return _at_least("inlier_ratio", ratios, "inlier_ratio", floor, "answers in the unpruned model's range")


def within_budgets(verdicts: pl.DataFrame) -> Outcome:
    """No strategy's own mask is shown to close the gap and breaks a budget beside it, or leaves one unmeasured.

    verdicts: of `excise.evaluation.verdicts`. Masks that close no gap are no temptation, and controls are not judged.
    """
    own = verdicts.filter(pl.col("matched_to").is_null() & (pl.col("variation") != ALL))
    closing = own.filter("closes")
    columns = ("variation", "strategy", "level", "failed", "unknown", "not_measured")
    table = [
        {name: ", ".join(row[name]) if isinstance(row[name], list) else row[name] for name in columns}
        for row in closing.iter_rows(named=True)
    ]
    broken = [row for row in table if row["failed"]]
    unknown = [row for row in table if row["unknown"] and not row["failed"]]
    if own.is_empty():
        message = "There is no mask to judge."
    elif not table:
        message = f"None of {own.height} masks is shown to close a gap, so no budget is held against any."
    elif not broken and not unknown:
        message = f"Masks that close a gap: {len(table)} of {own.height}. All keep every budget."
    else:
        message = f"Masks that close a gap: {len(table)}; of these break a budget: {len(broken)}"
        message += f"; a budget is not known: {len(unknown)}" if unknown else ""
        message += ". "
        message += "; ".join(f"{_place(row)}: {row['failed'] or row['unknown']}" for row in [*broken, *unknown][:3])
        message += "; and others." if len(broken) + len(unknown) > 3 else "."
    worst = _place((broken or unknown)[0]) if broken or unknown else None
    return Outcome("within_budgets", worst is None, WARN, message, float(len(broken)), 0.0, worst, table)


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
    told = metrics.join(gap_known.with_columns(gap_known=True), on=place, how="left", nulls_equal=True)
    may_lack = pl.col("metric").is_in([*REDUCTIONS, *MAY_LACK]) | (
        pl.col("metric").is_in(STANDARDIZED) & pl.col("gap_known")
    )
    told = told.join(_unanswered(metrics), on=[*place, "metric"], how="anti", nulls_equal=True, maintain_order="left")
    expected = told.filter(pl.col("estimate").is_not_null() | ~may_lack.fill_null(False))
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
        worst = f"{row['metric']} of {_place(row)}"
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
    worst, figure = _place(row), float(row["density"])
    if not unmet:
        message = f"{densities.height} masks prune {low['density']:.3%} to {high['density']:.3%} of their weights."
    elif figure <= floor:
        message = f"{worst} prunes {figure:.3%}, which is not above {floor:.3%}."
    else:
        message = f"{worst} prunes {figure:.3%}, more than {ceiling:.3%}."
    return Outcome("mask_density", not unmet, WARN, message, figure, bound, worst, densities.to_dicts(), unmet)


def unmet_expectations(frame: pl.DataFrame, expectations: Sequence[Any]) -> list[str]:
    """Validate a frame and return what it does not meet, one sentence per expectation."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    batch = (
        context.data_sources.add_pandas("frames")
        .add_dataframe_asset("frame")
        .add_batch_definition_whole_dataframe("whole")
        .get_batch({"dataframe": frame.to_pandas()})
    )
    suite = gx.ExpectationSuite(name="suite", expectations=list(expectations))
    found = batch.validate(suite).to_json_dict()
    return [_sentence(result) for result in found["results"] if not result["success"]]


def _sentence(result: dict[str, Any]) -> str:
    config, seen = result["expectation_config"], result.get("result") or {}
    wanted = {name: value for name, value in config["kwargs"].items() if name not in ("batch_id", "severity")}
    text = f"{config['type']}({', '.join(f'{name}={value!r}' for name, value in wanted.items() if value is not None)})"
    if result.get("exception_info", {}).get("exception_message"):
        return f"{text}: {result['exception_info']['exception_message']}"
    if "observed_value" in seen:
        return f"{text}: found {seen['observed_value']}"
    if "unexpected_count" in seen:
        return f"{text}: {seen['unexpected_count']} of {seen['element_count']} rows do not"
    return text


def _at_least(check: str, rates: pl.DataFrame, column: str, floor: float, meaning: str) -> Outcome:
    """`rates` has the rates in `column`, lowest first, beside the columns that say where."""
    import great_expectations.expectations as gxe

    unmet = unmet_expectations(
        rates.select(column),
        [
            gxe.ExpectTableRowCountToBeBetween(min_value=1),
            gxe.ExpectColumnValuesToNotBeNull(column=column),
            gxe.ExpectColumnValuesToBeBetween(column=column, min_value=floor, max_value=1.0),
        ],
    )
    if rates.is_empty():
        return Outcome(check, False, WARN, "There is nothing to judge: no rows.", None, floor, None, (), unmet)
    row = rates.row(0, named=True)
    figure, worst = row[column], _place(row)
    below = rates.filter(pl.col(column).is_null() | (pl.col(column) < floor)).height
    shown = "unknown" if figure is None or math.isnan(figure) else f"{figure:.1%}"
    message = f"{meaning}: lowest {shown} ({worst}), floor {floor:.1%}"
    message += f"; {below} of {rates.height} are below." if below else "."
    return Outcome(check, not unmet, WARN, message, figure, floor, worst, rates.to_dicts(), unmet)


def _group_sizes(completions: pl.DataFrame, places: list[str]) -> pl.DataFrame:
    """Smallest and largest number of completions of a group, by variation (and mask)."""
    groups = completions["group"].n_unique()
    return (
        completions.group_by(*places, "group", maintain_order=True)
        .agg(pl.len().alias("completions"))
        .group_by(places, maintain_order=True)
        .agg(
            smallest=pl.when(pl.len() == groups).then(pl.col("completions").min()).otherwise(0),
            largest=pl.col("completions").max(),
        )
    )


def _place(row: dict[str, Any]) -> str:
    """Variation, group and mask of a row, as far as it has them."""
    parts = [str(row["variation"])]
    if row.get("group"):
        parts.append(str(row["group"]))
    if row.get("strategy") and row["strategy"] != NO_STRATEGY:
        control = f" (control of {row['matched_to']})" if row.get("matched_to") else ""
        parts.append(f"{row['strategy']}{control}, {str(row['level']).replace('_', '-')}")
    return ", ".join(parts)
