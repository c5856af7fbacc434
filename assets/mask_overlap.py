"""The analysis `mask_overlap`: do different prompts find the same weights? (BDB, Fig. 3)

Every prompt-specific mask of every scenario is laid upon those of the reference scenario, purchases where there are
any. The counting streams from the mask files (`excise.evaluation.overlap`); chance level and excess stand beside every
share.
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
from excise.conditions import PROMPT_SPECIFIC
from resources.artifacts import Artifacts
from resources.tables import TABLES
from resources.warehouse import Warehouse

REFERENCE = "purchase"


def mask_overlap_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Counts what the scenarios' masks share."""

    @model_asset(
        catalogue,
        kinds={"numpy", "duckdb"},
        description="How much of every prompt-specific mask lies in those of the reference scenario (purchase; every "
        "scenario where that has no masks), beside the share that chance alone gives.",
        deps=["pruning_masks"],
    )
    def mask_overlap(
        context: dg.AssetExecutionContext, warehouse: Warehouse, artifacts: Artifacts
    ) -> dg.MaterializeResult:
        from excise.reporting.figures import overlap_heat_map

        model = context.partition_key
        masks = (
            warehouse.read("masks", asset="pruning_masks", model=model, level=PROMPT_SPECIFIC, matched_to=None)
            .select("scenario", "variation", "strategy", "matched_to", "path", "definition")
            .unique()
        )
        scenarios, left_out = scenarios_with_results(context, warehouse, masks, catalogue, made_by="pruning_masks")
        if not scenarios:
            return nothing_judged(warehouse, "mask_overlap", model, left_out)
        masks = masks.filter(pl.col("scenario").is_in(scenarios))
        require_one_definition(masks, again="pruning_masks")
        definitions = dict(masks.select("strategy", "definition").rows())
        ordered = [
            (scenario, variation) for scenario in scenarios for variation in catalogue.scenarios[scenario].variations
        ]
        frames, metadata = [], dict(left_out)
        for strategy in sorted(set(masks["strategy"])):
            paths = {
                (scenario, variation): artifacts.locate(path, made_by="pruning_masks")
                for scenario, variation, path in masks.filter(pl.col("strategy") == strategy)
                .select("scenario", "variation", "path")
                .iter_rows()
            }
            there = {place: paths[place] for place in ordered if place in paths}
            rows = overlaps(model, strategy, there, definitions[strategy])
            frames.append(rows)
            for (reference,), part in rows.partition_by(
                "reference_scenario", as_dict=True, maintain_order=True
            ).items():
                metadata |= picture(f"overlap_{strategy}_with_{reference}", overlap_heat_map(part), artifacts, model)
        found = pl.concat(frames)
        warehouse.replace_partition("mask_overlap", found, {"model": model})
        metadata |= table_metadata("mask_overlap", found) | {
            "scenarios": ", ".join(scenarios),
            "by_scenario": table_value(_by_scenario(found), limit=500),
        }
        return dg.MaterializeResult(metadata=metadata, data_version=data_version(found))

    return mask_overlap


def overlaps(model: str, strategy: str, paths: dict, definition: str) -> pl.DataFrame:
    """Rows of the table `mask_overlap` for one strategy; `paths` has the file of each (scenario, variation)."""
    from excise.evaluation.overlap import overlap_table

    places = list(paths)
    columns = [place for place in places if place[0] == REFERENCE] or places
    found = overlap_table([paths[place] for place in places], [paths[place] for place in columns])
    rows = [
        {
            "model": model,
            "strategy": strategy,
            "level": PROMPT_SPECIFIC,
            "scenario": place[0],
            "variation": place[1],
            "reference_scenario": reference[0],
            "reference_variation": reference[1],
            "shared": int(found.shared[row, column]),
            "count": int(found.row_counts[row]),
            "overlap": float(found.fraction[row, column]),
            "chance": float(found.chance[column]),
            "excess": float(found.excess[row, column]),
            "definition": definition,
        }
        for row, place in enumerate(places)
        for column, reference in enumerate(columns)
    ]
    return pl.DataFrame(rows, schema=TABLES["mask_overlap"].schema).with_columns(
        pl.col("overlap", "chance", "excess").fill_nan(None)
    )


def _by_scenario(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over pairs of different masks."""
    different = (pl.col("scenario") != pl.col("reference_scenario")) | (
        pl.col("variation") != pl.col("reference_variation")
    )
    return (
        rows.filter(different)
        .group_by("strategy", "scenario", "reference_scenario", maintain_order=True)
        .agg(pl.col("overlap", "chance", "excess").mean())
    )
