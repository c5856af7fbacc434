"""The stage `evaluation_metrics`: disparity and usefulness, unpruned and under every mask.

The estimates are those of `excise.evaluation` and `excise.comparisons`; here they are stored, checked and drawn.
"""

import dagster as dg
import polars as pl

from assets import checks
from assets.completions import completions_of, require_paired, without
from assets.partitions import Catalogue
from assets.stage import data_version, grid_asset, picture, rows_of, table_metadata, table_value
from excise.scenarios.subsets import ATTRIBUTION
from excise.strategies import CROSS_CONTEXT
from resources.artifacts import Artifacts
from resources.settings import AuditSettings
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
        completions, prompts = without(ATTRIBUTION, *completions_of(warehouse, model, scenario.key))
        pruned = rows_of(warehouse, "pruned_completions", model, scenario.key, made_by="pruned_completions")
        require_paired(completions, pruned, model, scenario.key)
        masks = rows_of(warehouse, "masks", model, scenario.key, made_by="pruning_masks")
        sizes = {"resamples": audit.resamples, "permutations": audit.permutations, "seed": audit.seed}
        rows = evaluate(completions, pruned, masks, majority=groups.majority, minority=groups.minority, **sizes)
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
        metadata["other_comparisons"] = table_value(_unpruned_gaps(others))
        metadata["audit"] = dg.MetadataValue.md(markdown_table(told, **labels))
        metadata |= table_metadata("metrics", rows)
        return dg.MaterializeResult(
            metadata=metadata,
            data_version=data_version(rows, others),
            check_results=[outcome.result() for outcome in outcomes],
        )

    return evaluation_metrics


def _unpruned_gaps(others: pl.DataFrame) -> pl.DataFrame:
    """The unpruned model's standardized mean difference in every other comparison, over all variations."""
    return others.filter(
        (pl.col("strategy") == "unpruned") & (pl.col("variation") == "(all)") & (pl.col("metric") == "smd")
    ).select("comparison", smd="estimate", low="low", high="high", p_value="p_value", answers="n")
