"""The analysis `transfer_matrix`: what masks made in one scenario do in another.

The diagonal holds the within-context masks, the rest the cross-context masks of single scenarios, which the setting
per_source makes. Every figure is taken from the table `metrics`, with its interval; nothing is estimated here.
"""

import dagster as dg
import polars as pl

from assets.mask_definitions import require_one_definition
from assets.partitions import Catalogue
from assets.stage import (
    data_version,
    model_asset,
    nothing_judged,
    picture,
    scenarios_with_results,
    table_metadata,
    table_value,
    thresholds_of,
)
from excise.conditions import ALL, CROSS_CONTEXT, RANDOM, WITHIN_CONTEXT
from resources.artifacts import Artifacts
from resources.tables import TABLES
from resources.warehouse import Warehouse


def transfer_matrix_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Arranges the metrics of all scenarios by where the masks come from."""

    @model_asset(
        catalogue,
        kinds={"polars", "duckdb"},
        description="Reduction of the gap and usefulness by the scenario the masks come from and the scenario they are "
        "evaluated in: is the bias one thing, or does each context have its own?",
        deps=["evaluation_metrics"],
    )
    def transfer_matrix(
        context: dg.AssetExecutionContext, warehouse: Warehouse, artifacts: Artifacts
    ) -> dg.MaterializeResult:
        from excise.reporting.figures import transfer_heat_map

        model = context.partition_key
        metrics = warehouse.read("metrics", model=model, variation=ALL)
        scenarios, left_out = scenarios_with_results(
            context, warehouse, metrics, catalogue, made_by="evaluation_metrics"
        )
        if not scenarios:
            return nothing_judged(warehouse, "transfer_matrix", model, left_out)
        metrics = metrics.filter(pl.col("scenario").is_in(scenarios))
        require_one_definition(metrics, again="pruning_masks and what follows")
        rows = arranged(metrics, list(catalogue.scenarios))
        warehouse.replace_partition("transfer_matrix", rows, {"model": model})
        metadata = dict(left_out)
        own = rows.filter(pl.col("matched_to").is_null())
        if own.filter((pl.col("metric") == "gap_reduction") & pl.col("estimate").is_not_null()).is_empty():
            metadata["finding"] = (
                "No reduction is defined: no scenario has a detectable gap, or the masks leave no answers that differ."
            )
        else:
            tolerances = {
                scenario: thresholds_of(warehouse, "evaluation_metrics", model, scenario).inlier_tolerance
                for scenario in scenarios
            }
            metadata |= picture("transfer", transfer_heat_map(rows, inlier_tolerance=tolerances), artifacts, model)
        if own.filter(pl.col("source") != pl.col("scenario")).is_empty():
            metadata["single_sources"] = "none: no masks of single other scenarios were evaluated (setting per_source)"
        metadata |= table_metadata("transfer_matrix", rows) | {
            "scenarios": ", ".join(scenarios),
            "beyond_random": table_value(_beyond_random(rows), limit=500),
        }
        return dg.MaterializeResult(metadata=metadata, data_version=data_version(rows))

    return transfer_matrix


def arranged(metrics: pl.DataFrame, scenarios: list[str]) -> pl.DataFrame:
    """Rows of the table `transfer_matrix`: those of `metrics` over all variations whose masks come from a scenario.

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
        .select(TABLES["transfer_matrix"].names)
    )


def _beyond_random(rows: pl.DataFrame) -> pl.DataFrame:
    """The headline of every mask, with the inlier ratios of the mask and of its random control."""
    keys = ["strategy", "source", "scenario", "level"]
    own = rows.filter(pl.col("matched_to").is_null())
    beyond = own.filter(pl.col("metric") == "reduction_over_random").select(
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
