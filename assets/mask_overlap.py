"""The analysis `mask_overlap`: do different prompts find the same weights? (BDB, Fig. 3)

Every prompt-specific mask of every scenario is laid upon those of the reference scenario, purchases where there are
any. The counting streams from the mask files (`excise.evaluation.overlap`); chance level and excess stand beside every
share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.mask_definitions import require_one_definition
from assets.metadata import table_value
from assets.partitions import Catalogue
from assets.stage import Analysis, model_asset
from excise.conditions import PROMPT_SPECIFIC


def mask_overlap_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Counts what the scenarios' masks share."""

    @model_asset(
        catalogue,
        kinds={"numpy", "duckdb"},
        description="How much of every prompt-specific mask lies in those of the reference scenario (purchase; every "
        "scenario where that has no masks), beside the share that chance alone gives.",
        deps=["pruning_masks"],
    )
    def mask_overlap(analysis: Analysis) -> dg.MaterializeResult:
        from excise.evaluation.mask_tables import overlap_by_scenario

        masks = _prompt_specific(analysis)
        scenarios, left_out = analysis.scenarios_of(masks, made_by="pruning_masks")
        if not scenarios:
            return analysis.nothing_judged(left_out)
        masks = masks.filter(pl.col("scenario").is_in(scenarios))
        require_one_definition(masks, again="pruning_masks")
        frames = [
            _overlaps(analysis, rows, scenarios)
            for rows in masks.sort("strategy").partition_by("strategy", maintain_order=True)
        ]
        rows = pl.concat(frames)
        by_scenario = table_value(overlap_by_scenario(rows), limit=500)
        metadata = {"scenarios": ", ".join(scenarios), "by_scenario": by_scenario}
        return analysis.result(rows, left_out | _pictures(analysis, frames) | metadata)

    return mask_overlap


def _prompt_specific(analysis: Analysis) -> pl.DataFrame:
    """Every strategy's prompt-specific masks of the model, one row each."""
    masks = analysis.warehouse.read(
        "masks", asset="pruning_masks", model=analysis.model, level=PROMPT_SPECIFIC, matched_to=None
    )
    return masks.select("scenario", "variation", "strategy", "matched_to", "path", "definition").unique()


def _overlaps(analysis: Analysis, masks: pl.DataFrame, scenarios: Sequence[str]) -> pl.DataFrame:
    """Rows of the table `mask_overlap` for one strategy's masks, in the catalogue's order."""
    from excise.evaluation.mask_tables import overlap_rows

    (strategy,), definition = masks["strategy"].unique(), dict(masks.select("strategy", "definition").rows())
    files: dict[tuple[str, str], Path] = {
        (scenario, variation): analysis.artifacts.locate(path, made_by="pruning_masks")
        for scenario, variation, path in masks.select("scenario", "variation", "path").iter_rows()
    }
    ordered = [(key, variation) for key in scenarios for variation in analysis.catalogue.scenarios[key].variations]
    rows = overlap_rows(strategy, {place: files[place] for place in ordered if place in files})
    return rows.with_columns(model=pl.lit(analysis.model), definition=pl.lit(definition[strategy]))


def _pictures(analysis: Analysis, frames: Sequence[pl.DataFrame]) -> dict[str, Any]:
    """A heat map for every strategy and reference scenario."""
    from excise.reporting.figures import overlap_heat_map

    metadata: dict[str, Any] = {}
    for rows in frames:
        for part in rows.partition_by("reference_scenario", maintain_order=True):
            name = f"overlap_{part['strategy'][0]}_with_{part['reference_scenario'][0]}"
            metadata |= analysis.picture(name, overlap_heat_map(part))
    return metadata
