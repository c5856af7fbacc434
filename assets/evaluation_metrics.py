"""The stage `evaluation_metrics`: disparity and usefulness, unpruned and under every mask.

The estimates are `excise.evaluation`'s; here they are stored, checked and drawn.
"""

import dagster as dg

from assets import checks
from assets.completions import completions_of, require_paired
from assets.partitions import Catalogue
from assets.stage import data_version, grid_asset, picture, rows_of, table_metadata
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
        deps=["completions", "pruning_masks", "pruned_completions"],
        checks=[
            checks.spec("metrics_finite", "evaluation_metrics", catalogue),
            checks.spec("inlier_ratio", "evaluation_metrics", catalogue),
        ],
    )
    def evaluation_metrics(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.evaluation import evaluate
        from excise.figures import disparity_by_level
        from excise.report import finding, markdown_table

        model, scenario = catalogue.partition(context)
        audit, groups = settings.audit_of(scenario), scenario.comparison
        completions, _ = completions_of(warehouse, model, scenario.key)
        pruned = rows_of(warehouse, "pruned_completions", model, scenario.key, made_by="pruned_completions")
        require_paired(completions, pruned, model, scenario.key)
        rows = evaluate(
            completions,
            pruned,
            rows_of(warehouse, "masks", model, scenario.key, made_by="pruning_masks"),
            majority=groups.majority,
            minority=groups.minority,
            resamples=audit.resamples,
            permutations=audit.permutations,
            seed=audit.seed,
        )
        warehouse.replace_partition("metrics", rows, {"model": model, "scenario": scenario.key})
        outcomes = [checks.metrics_finite(rows), checks.inlier_ratio(rows, audit.inlier_floor)]
        checks.record(warehouse, "evaluation_metrics", model, scenario.key, outcomes)
        labels = {side: scenario.groups[getattr(groups, side)].label for side in ("majority", "minority")}
        figure = disparity_by_level(rows, inlier_floor=audit.inlier_floor)
        metadata = {"finding": finding(rows)}
        metadata |= picture("disparity_by_level", figure, artifacts, model, scenario.key)
        metadata["audit"] = dg.MetadataValue.md(markdown_table(rows, **labels))
        metadata |= table_metadata("metrics", rows)
        return dg.MaterializeResult(
            metadata=metadata,
            data_version=data_version(rows),
            check_results=[outcome.result() for outcome in outcomes],
        )

    return evaluation_metrics
