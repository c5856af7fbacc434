"""The analysis `bias_correlation`: are the heads that are harmful on one axis harmful on another (FASP, section 6)?

Every figure is made from the table `head_impacts`; nothing is measured here.
"""

import dagster as dg

from assets.partitions import Catalogue
from assets.stage import (
    data_version,
    model_asset,
    nothing_judged,
    picture,
    scenarios_with_results,
    table_metadata,
    table_value,
)
from resources.artifacts import Artifacts
from resources.tables import TABLES
from resources.warehouse import Warehouse


def bias_correlation_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Correlates the head impacts of all scenarios of a model."""

    @model_asset(
        catalogue,
        kinds={"polars", "duckdb"},
        description="Correlations between the head impacts of different scenarios, with and without heads the model "
        "cannot do without, and the overlap of the most harmful heads beside chance.",
        deps=["head_impacts"],
    )
    def bias_correlation(
        context: dg.AssetExecutionContext, warehouse: Warehouse, artifacts: Artifacts
    ) -> dg.MaterializeResult:
        import polars as pl

        from excise.evaluation.bias_correlation import impact_correlations
        from excise.reporting.figures import impact_correlation

        model = context.partition_key
        impacts = warehouse.read("head_impacts", model=model)
        scenarios, left_out = scenarios_with_results(context, warehouse, impacts, catalogue, made_by="head_impacts")
        if not scenarios:
            return nothing_judged(warehouse, "bias_correlation", model, left_out)
        rows = impact_correlations(impacts.filter(pl.col("scenario").is_in(scenarios)))
        rows = rows.select(TABLES["bias_correlation"].names)
        warehouse.replace_partition("bias_correlation", rows, {"model": model})
        metadata = dict(left_out) | table_metadata("bias_correlation", rows) | {"scenarios": ", ".join(scenarios)}
        if len(scenarios) > 1:
            metadata |= picture("impact_correlation", impact_correlation(rows), artifacts, model)
        metadata["correlations"] = table_value(rows, limit=500)
        return dg.MaterializeResult(metadata=metadata, data_version=data_version(rows))

    return bias_correlation
