"""The analysis `transfer_matrix`: what masks made in one scenario do in another.

The diagonal holds the within-context masks, the rest the cross-context masks of single scenarios, which the setting
per_source makes. Every figure is taken from the table `metrics`, with its interval; nothing is estimated here.
"""

from collections.abc import Sequence
from typing import Any

import dagster as dg
import polars as pl

from assets.mask_definitions import require_one_definition
from assets.metadata import table_value
from assets.partitions import Catalogue
from assets.stage import Analysis, model_asset
from assets.upstream import thresholds_of
from excise.conditions import ALL
from resources.tables import TABLES


def transfer_matrix_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Arranges the metrics of all scenarios by where the masks come from."""

    @model_asset(
        catalogue,
        kinds={"polars", "duckdb"},
        description="Reduction of the gap and usefulness by the scenario the masks come from and the scenario they are "
        "evaluated in: is the bias one thing, or does each context have its own?",
        deps=["evaluation_metrics"],
    )
    def transfer_matrix(analysis: Analysis) -> dg.MaterializeResult:
        from excise.evaluation.mask_tables import beyond_random, transfers

        metrics = analysis.warehouse.read("metrics", model=analysis.model, variation=ALL)
        scenarios, left_out = analysis.scenarios_of(metrics, made_by="evaluation_metrics")
        if not scenarios:
            return analysis.nothing_judged(left_out)
        metrics = metrics.filter(pl.col("scenario").is_in(scenarios))
        require_one_definition(metrics, again="pruning_masks and what follows")
        rows = transfers(metrics, list(analysis.catalogue.scenarios)).select(TABLES["transfer_matrix"].names)
        beyond = table_value(beyond_random(rows), limit=500)
        metadata = {"scenarios": ", ".join(scenarios), "beyond_random": beyond}
        return analysis.result(rows, left_out | _metadata(analysis, rows, scenarios) | metadata)

    return transfer_matrix


def _metadata(analysis: Analysis, rows: pl.DataFrame, scenarios: Sequence[str]) -> dict[str, Any]:
    """The heat map, or why there is none, and whether masks of single scenarios were evaluated."""
    from excise.reporting.figures import transfer_heat_map

    metadata: dict[str, Any] = {}
    of_strategies = rows.filter(pl.col("matched_to").is_null())
    if of_strategies.filter((pl.col("metric") == "gap_reduction") & pl.col("estimate").is_not_null()).is_empty():
        metadata["finding"] = (
            "No reduction is defined: no scenario has a detectable gap, or the masks leave no answers that differ."
        )
    else:
        tolerances = {
            key: thresholds_of(analysis.warehouse, "evaluation_metrics", analysis.model, key).inlier_tolerance
            for key in scenarios
        }
        metadata |= analysis.picture("transfer", transfer_heat_map(rows, inlier_tolerance=tolerances))
    if of_strategies.filter(pl.col("source") != pl.col("scenario")).is_empty():
        metadata["single_sources"] = "none: no masks of single other scenarios were evaluated (setting per_source)"
    return metadata
