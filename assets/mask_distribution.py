"""The analysis `mask_distribution`: in which layers and matrices the masks of a model lie (BDB, Fig. 4).

It reads the counts in the table `masks`; no mask is opened. Controls have the same counts by construction and are left
out.
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
)
from excise.conditions import PUBLISHED_LEVELS
from resources.artifacts import Artifacts
from resources.tables import TABLES
from resources.warehouse import Warehouse

MASK = ("scenario", "variation", "strategy", "level")


def mask_distribution_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Turns the counts of all scenarios into shares."""

    @model_asset(
        catalogue,
        kinds={"polars", "duckdb"},
        description="Where every strategy's masks lie: the pruned share of each matrix, and each matrix's share of all "
        "that the mask prunes, for all scenarios and levels.",
        deps=["pruning_masks", "cross_context_masks"],
    )
    def mask_distribution(
        context: dg.AssetExecutionContext, warehouse: Warehouse, artifacts: Artifacts
    ) -> dg.MaterializeResult:
        from excise.reporting.figures import mask_distribution_heat_map

        model = context.partition_key
        masks = warehouse.read("masks", model=model, matched_to=None).filter(pl.col("asset").is_not_null())
        scenarios, left_out = scenarios_with_results(context, warehouse, masks, catalogue, made_by="pruning_masks")
        if not scenarios:
            return nothing_judged(warehouse, "mask_distribution", model, left_out)
        masks = masks.filter(pl.col("scenario").is_in(scenarios))
        require_one_definition(masks, again="pruning_masks and cross_context_masks")
        rows = shares(masks)
        warehouse.replace_partition("mask_distribution", rows, {"model": model})
        metadata = dict(left_out)
        drawn = rows.filter(pl.col("level").is_in(PUBLISHED_LEVELS))  # not those of single other scenarios
        for (strategy, level), part in drawn.partition_by("strategy", "level", as_dict=True).items():
            figure = mask_distribution_heat_map(part)
            metadata |= picture(f"distribution_{strategy}_{level}", figure, artifacts, model)
        metadata |= table_metadata("mask_distribution", rows) | {
            "scenarios": ", ".join(scenarios),
            "by_role": table_value(_by_role(rows), limit=500),
        }
        return dg.MaterializeResult(metadata=metadata, data_version=data_version(rows))

    return mask_distribution


def shares(masks: pl.DataFrame) -> pl.DataFrame:
    """Rows of the table `mask_distribution` from those of the table `masks`."""
    whole = pl.col("pruned").sum().over(MASK)
    return (
        masks.with_columns(
            share_of_matrix=pl.col("pruned") / pl.col("size"),
            share_of_mask=pl.when(whole > 0).then(pl.col("pruned") / whole),
        )
        .select(TABLES["mask_distribution"].names)
        .sort(*MASK, "layer", "role")
    )


def _by_role(rows: pl.DataFrame) -> pl.DataFrame:
    """Of each strategy and level: the pruned share of each role's matrices, and the role's share of all that is pruned.

    Sums over scenarios and variations.
    """
    sums = rows.group_by("strategy", "level", "role").agg(pl.col("pruned", "size").sum())
    return sums.select(
        "strategy",
        "level",
        "role",
        share_of_matrices=pl.col("pruned") / pl.col("size"),
        share_of_masks=(pl.col("pruned") / pl.col("pruned").sum().over("strategy", "level")).fill_nan(None),
    ).sort("strategy", "level", "role")
