"""The analysis `mask_distribution`: in which layers and matrices the masks of a model lie (BDB, Fig. 4).

It reads the counts in the table `masks`; no mask is opened. Controls have the same counts by construction and are left
out.
"""

from typing import Any

import dagster as dg
import polars as pl

from assets.mask_definitions import require_one_definition
from assets.metadata import table_value
from assets.partitions import Catalogue
from assets.stage import Analysis, model_asset
from excise.conditions import PUBLISHED_LEVELS
from resources.tables import TABLES


def mask_distribution_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Turns the counts of all scenarios into shares."""

    @model_asset(
        catalogue,
        kinds={"polars", "duckdb"},
        description="Where every strategy's masks lie: the pruned share of each matrix, and each matrix's share of all "
        "that the mask prunes, for all scenarios and levels.",
        deps=["pruning_masks", "cross_context_masks"],
    )
    def mask_distribution(analysis: Analysis) -> dg.MaterializeResult:
        from excise.evaluation.mask_tables import shares, shares_by_role

        masks = analysis.warehouse.read("masks", model=analysis.model, matched_to=None)
        masks = masks.filter(pl.col("asset").is_not_null())
        scenarios, left_out = analysis.scenarios_of(masks, made_by="pruning_masks")
        if not scenarios:
            return analysis.nothing_judged(left_out)
        masks = masks.filter(pl.col("scenario").is_in(scenarios))
        require_one_definition(masks, again="pruning_masks and cross_context_masks")
        rows = shares(masks).select(TABLES["mask_distribution"].names)
        by_role = table_value(shares_by_role(rows), limit=500)
        metadata = {"scenarios": ", ".join(scenarios), "by_role": by_role}
        return analysis.result(rows, left_out | _pictures(analysis, rows) | metadata)

    return mask_distribution


def _pictures(analysis: Analysis, rows: pl.DataFrame) -> dict[str, Any]:
    """A heat map for every strategy and level, but those of single other scenarios."""
    from excise.reporting.figures import mask_distribution_heat_map

    metadata: dict[str, Any] = {}
    drawn = rows.filter(pl.col("level").is_in(PUBLISHED_LEVELS))
    for (strategy, level), part in drawn.partition_by("strategy", "level", as_dict=True).items():
        metadata |= analysis.picture(f"distribution_{strategy}_{level}", mask_distribution_heat_map(part))
    return metadata
