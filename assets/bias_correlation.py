"""The analysis `bias_correlation`: are the heads that are harmful on one axis harmful on another (FASP, section 6)?

Every figure is made from the table `head_impacts`; nothing is measured here.
"""

import dagster as dg
import polars as pl

from assets.metadata import table_value
from assets.partitions import Catalogue
from assets.stage import Analysis, model_asset
from resources.tables import TABLES


def bias_correlation_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Correlates the head impacts of all scenarios of a model."""

    @model_asset(
        catalogue,
        kinds={"polars", "duckdb"},
        description="Correlations between the head impacts of different scenarios, with and without heads the model "
        "cannot do without, and the overlap of the most harmful heads beside chance.",
        deps=["head_impacts"],
    )
    def bias_correlation(analysis: Analysis) -> dg.MaterializeResult:
        from excise.evaluation.bias_correlation import impact_correlations
        from excise.reporting.figures import impact_correlation

        impacts = analysis.warehouse.read("head_impacts", model=analysis.model)
        scenarios, left_out = analysis.scenarios_of(impacts, made_by="head_impacts")
        if not scenarios:
            return analysis.nothing_judged(left_out)
        rows = impact_correlations(impacts.filter(pl.col("scenario").is_in(scenarios)))
        rows = rows.select(TABLES["bias_correlation"].names)
        drawn = analysis.picture("impact_correlation", impact_correlation(rows)) if len(scenarios) > 1 else {}
        metadata = {"scenarios": ", ".join(scenarios), "correlations": table_value(rows, limit=500)}
        return analysis.result(rows, left_out | drawn | metadata)

    return bias_correlation
