"""The stage `prompts`: a scenario's file expanded into its prompts.

The asset is partitioned by scenario, the rest of the chain by model and scenario; one job can hold only one kind of
partition, so the first stage of the grid brings the prompts up to date itself, through `up_to_date_prompts`.
"""

import dagster as dg
import polars as pl

from assets.metadata import data_version, mistakes, table_metadata, table_value
from assets.partitions import Catalogue
from assets.stage import ONE_RUN_PER_PARTITION, clear_failures
from excise.scenarios import Scenario, expand
from resources.warehouse import Warehouse

CODE_VERSION = "1"


def prompts_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Expands a scenario and stores its prompts."""

    @dg.asset(
        partitions_def=catalogue.scenario_partitions,
        backfill_policy=ONE_RUN_PER_PARTITION,
        group_name="audit",
        kinds={"yaml", "duckdb"},
        code_version=CODE_VERSION,
        description="Every prompt of a scenario: its templates filled with every variation and every name.",
    )
    @clear_failures
    def prompts(context: dg.AssetExecutionContext, warehouse: Warehouse) -> dg.MaterializeResult:
        scenario = catalogue.scenario(context.partition_key)
        rows = expand(scenario)
        warehouse.replace_partition("prompts", rows, {"scenario": scenario.key})
        return dg.MaterializeResult(metadata=_metadata(rows, catalogue), data_version=data_version(rows))

    return prompts


def up_to_date_prompts(
    context: dg.AssetExecutionContext, warehouse: Warehouse, scenario: Scenario, catalogue: Catalogue
) -> None:
    """Expand the scenario anew if the warehouse lacks its prompts or holds those of an earlier version of its file.

    Where Dagster knew of any prompts before, the step starts again, so that its lineage names the new ones.
    """
    stored, rows = warehouse.read("prompts", scenario=scenario.key), expand(scenario)
    if data_version(stored) == data_version(rows):
        return
    warehouse.replace_partition("prompts", rows, {"scenario": scenario.key})
    context.log.info(f"scenario {scenario.key} was expanded: {rows.height} prompts")
    known = context.instance.get_latest_materialization_event(dg.AssetKey("prompts")) is not None
    context.log_event(
        dg.AssetMaterialization(
            "prompts",
            partition=scenario.key,
            metadata=_metadata(rows, catalogue),
            tags={"dagster/data_version": data_version(rows).value, "dagster/code_version": CODE_VERSION},
        )
    )
    if known:
        raise dg.RetryRequested(max_retries=1, seconds_to_wait=0)


def _metadata(rows: pl.DataFrame, catalogue: Catalogue) -> dict:
    metadata = table_metadata("prompts", rows)
    examples = rows.group_by("variation", "template", "group", maintain_order=True).first()
    metadata["examples"] = table_value(examples.select("variation", "template", "group", "subject", "text"))
    return metadata | mistakes(catalogue)
