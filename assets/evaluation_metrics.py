"""The stage `evaluation_metrics`: disparity and usefulness, unpruned and under every mask.

The estimates are those of `excise.evaluation` and `excise.comparisons`; here they are stored, checked and drawn.
"""

import dagster as dg
import polars as pl

from assets import checks
from assets.completions import completions_of, require_paired, without
from assets.partitions import Catalogue
from assets.stage import data_version, grid_asset, picture, rows_of, table_metadata, table_value
from excise.scenarios import Scenario
from excise.scenarios.subsets import ATTRIBUTION
from excise.strategies import CROSS_CONTEXT
from resources.artifacts import Artifacts
from resources.settings import Audit, AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch


def evaluation_metrics_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Estimates every metric of every mask."""

    @grid_asset(
        catalogue,
        group="evaluation",
        kinds={"scipy", "duckdb"},
        description="The disparity between the groups and the usefulness of the answers, unpruned and under every "
        "mask, with intervals, tests, and the reduction over the matched random control.",
        deps=["completions", "pruning_masks", "cross_context_masks", "pruned_completions"],
        checks=[
            checks.spec("metrics_finite", "evaluation_metrics", catalogue),
            checks.spec("inlier_ratio", "evaluation_metrics", catalogue),
        ],
        code_version="2",
    )
    def evaluation_metrics(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.comparisons import comparisons
        from excise.evaluation import evaluate
        from excise.figures import bias_by_level, disparity_by_level
        from excise.report import finding, markdown_table

        model, scenario = catalogue.partition(context)
        audit, groups = settings.audit_of(scenario), scenario.comparison
        if scenario.outcome.kind == "toxicity":
            return _toxicity_metrics(warehouse, artifacts, model, scenario, audit, catalogue)
        completions, prompts = without(ATTRIBUTION, *completions_of(warehouse, model, scenario.key))
        pruned = rows_of(warehouse, "pruned_completions", model, scenario.key, made_by="pruned_completions")
        require_paired(completions, pruned, model, scenario.key)
        masks = rows_of(warehouse, "masks", model, scenario.key, made_by="pruning_masks")
        sizes = {"resamples": audit.resamples, "permutations": audit.permutations, "seed": audit.seed}
        rows = evaluate(
            completions,
            pruned,
            masks,
            majority=groups.majority,
            minority=groups.minority,
            answer_range=scenario.outcome.scored_range,
            **sizes,
        )
        others = comparisons(completions, prompts, pruned, masks, scenario=scenario, **sizes)
        warehouse.replace_partition("metrics", rows, {"model": model, "scenario": scenario.key})
        warehouse.replace_partition("comparisons", others, {"model": model, "scenario": scenario.key})
        outcomes = [checks.metrics_finite(rows), checks.inlier_ratio(rows, audit.inlier_floor)]
        checks.record(warehouse, "evaluation_metrics", model, scenario.key, outcomes)
        labels = {side: scenario.groups[getattr(groups, side)].label for side in ("majority", "minority")}
        # What masks of single other scenarios do is told by the transfer matrix.
        told = rows.filter(~pl.col("level").str.starts_with(f"{CROSS_CONTEXT}/"))
        figure = disparity_by_level(told, inlier_floor=audit.inlier_floor)
        metadata = {"finding": finding(told)}
        metadata |= picture("disparity_by_level", figure, artifacts, model, scenario.key)
        metadata |= picture(
            "bias_by_level",
            bias_by_level(told, **labels, inlier_floor=audit.inlier_floor),
            artifacts,
            model,
            scenario.key,
        )
        if rows["lowest"].is_not_null().any():
            metadata["bounds_of_exact_answers"] = table_value(_bounds(told))
        metadata["other_comparisons"] = table_value(_unpruned_gaps(others))
        metadata["audit"] = dg.MetadataValue.md(markdown_table(told, **labels))
        metadata |= table_metadata("metrics", rows)
        return dg.MaterializeResult(
            metadata=metadata,
            data_version=data_version(rows, others),
            check_results=[outcome.result() for outcome in outcomes],
        )

    return evaluation_metrics


def _toxicity_metrics(
    warehouse: Warehouse, artifacts: Artifacts, model: str, scenario: Scenario, audit: Audit, catalogue: Catalogue
) -> dg.MaterializeResult:
    """The metrics of an axis of social groups (FASP): differences of toxicity between subgroups, and perplexity."""
    from excise.bias_correlation import gamma_choice, gamma_points
    from excise.figures import gamma_sweep, toxicity_by_subgroup, trade_off
    from excise.toxicity_evaluation import evaluate_toxicity
    from excise.toxicity_report import choice_sentence, toxicity_finding, toxicity_markdown

    completions, _ = without(ATTRIBUTION, *completions_of(warehouse, model, scenario.key))
    pruned = rows_of(warehouse, "pruned_completions", model, scenario.key, made_by="pruned_completions")
    require_paired(completions, pruned, model, scenario.key)
    masks = rows_of(warehouse, "masks", model, scenario.key, made_by="pruning_masks")
    rows = evaluate_toxicity(
        completions,
        pruned,
        masks,
        _perplexity_by_condition(warehouse.read("perplexity", model=model, scenario=scenario.key), masks),
        subgroups=list(scenario.groups),
        cluster="subject",
        resamples=audit.resamples,
        seed=audit.seed,
    )
    warehouse.replace_partition("metrics", rows, {"model": model, "scenario": scenario.key})
    # Two-group comparisons are the other outcome's.
    nothing = pl.DataFrame(schema=TABLES["comparisons"].schema)
    warehouse.replace_partition("comparisons", nothing, {"model": model, "scenario": scenario.key})
    outcomes = [checks.metrics_finite(rows), checks.share_scored(rows, audit.parse_floor)]
    checks.record(warehouse, "evaluation_metrics", model, scenario.key, outcomes)
    labels = {key: group.label for key, group in scenario.groups.items()}
    metadata = {"finding": toxicity_finding(rows)}
    by_alpha = rows.filter(~pl.col("strategy").is_in(catalogue.gamma_variants()))
    if by_alpha["strategy"].str.contains(r"-[0-9.]+$").any():
        metadata |= picture("trade_off", trade_off(by_alpha), artifacts, model, scenario.key)
    points = gamma_choice(gamma_points(rows, catalogue.fasp_parameters()), audit.perplexity_budget)
    if points["gamma"].n_unique() > 2:  # null, the unpruned model, is one
        metadata["choice"] = choice_sentence(points, audit.perplexity_budget)
        figure = gamma_sweep(points, budget=audit.perplexity_budget)
        metadata |= picture("gamma_sweep", figure, artifacts, model, scenario.key)
    metadata |= picture("toxicity_by_subgroup", toxicity_by_subgroup(rows, labels), artifacts, model, scenario.key)
    metadata["audit"] = dg.MetadataValue.md(toxicity_markdown(rows))
    metadata |= table_metadata("metrics", rows)
    return dg.MaterializeResult(
        metadata=metadata, data_version=data_version(rows), check_results=[outcome.result() for outcome in outcomes]
    )


def _perplexity_by_condition(perplexity: pl.DataFrame, masks: pl.DataFrame) -> pl.DataFrame:
    """Perplexity per condition, variation and draw, as `excise.toxicity_evaluation` takes it."""
    columns = ["perplexity", "low", "high", "difference_low", "difference_high"]
    place = ["variation", "strategy", "level", "matched_to", "draw"]
    unpruned = perplexity.filter(pl.col("mask") == "unpruned").select(
        pl.lit("(all)").alias("variation"),
        pl.lit("unpruned").alias("strategy"),
        pl.lit("none").alias("level"),
        pl.lit(None, dtype=pl.String).alias("matched_to"),
        pl.lit(0, dtype=pl.Int64).alias("draw"),
        *columns,
    )
    pruned = masks.select(*place, "mask").unique(maintain_order=True).join(perplexity, on="mask")
    return pl.concat([unpruned, pruned.select(*place, *columns)])


def _bounds(metrics: pl.DataFrame) -> pl.DataFrame:
    """Where SMD and inlier ratio lie whatever the unread answers are, over all variations, strategies alone."""
    return metrics.filter(
        (pl.col("variation") == "(all)")
        & pl.col("metric").is_in(["smd", "inlier_ratio", "leftover", "sampled"])
        & pl.col("matched_to").is_null()
    ).select("strategy", "level", "metric", "estimate", "lowest", "highest")


def _unpruned_gaps(others: pl.DataFrame) -> pl.DataFrame:
    """The unpruned model's standardized mean difference in every other comparison, over all variations."""
    return others.filter(
        (pl.col("strategy") == "unpruned") & (pl.col("variation") == "(all)") & (pl.col("metric") == "smd")
    ).select("comparison", smd="estimate", low="low", high="high", p_value="p_value", answers="n")
