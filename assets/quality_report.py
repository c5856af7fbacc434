"""The roll-up: every check of every partition in one place, and the files that could not be used.

The badge of a partitioned check shows only the partition run last; this asset is the one to look at before signing off.
"""

from typing import Any

import dagster as dg
import polars as pl

from assets import checks
from assets.metadata import data_version, mistakes, table_metadata, table_value
from assets.partitions import Catalogue
from assets.stage import clear_failures
from resources.warehouse import Warehouse

CHECKED_ASSETS = ("completions", "pruning_masks", "cross_context_masks", "pruned_completions", "evaluation_metrics")


def quality_report_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Reads the table `checks` and judges all of it."""

    @dg.asset(
        group_name="quality",
        kinds={"duckdb", "greatexpectations"},
        code_version="1",
        deps=list(CHECKED_ASSETS),
        check_specs=[
            dg.AssetCheckSpec(
                "all_checks_pass", asset="quality_report", description=checks.DESCRIPTIONS["all_checks_pass"]
            )
        ],
        description="Every check of every partition, failures first, and what is wrong with the user's files.",
    )
    @clear_failures
    def quality_report(warehouse: Warehouse) -> dg.MaterializeResult:
        outcomes = warehouse.read("checks").sort("passed", "severity", "model", "scenario", "asset", "check_name")
        judged = judge(outcomes, catalogue)
        metadata = table_metadata("checks", outcomes) | _told(outcomes, catalogue) | mistakes(catalogue)
        return dg.MaterializeResult(
            metadata=metadata,
            data_version=data_version(outcomes.drop("checked_at"), list(catalogue.problems)),
            check_results=[judged.result()],
        )

    return quality_report


def _told(outcomes: pl.DataFrame, catalogue: Catalogue) -> dict[str, Any]:
    """Metadata: how many partitions were checked, how many have no results, and every outcome."""
    partitions = outcomes.select("model", "scenario").unique().height
    evaluated = outcomes.filter(pl.col("asset") == "evaluation_metrics").select("model", "scenario").unique().height
    columns = ("passed", "model", "scenario", "asset", "check_name", "figure", "floor", "worst", "message")
    return {
        "partitions_checked": partitions,
        "partitions_without_results": len(list(catalogue.grid.get_partition_keys())) - evaluated,
        "checks": table_value(outcomes.select(columns), limit=500),
    }


def judge(outcomes: pl.DataFrame, catalogue: Catalogue) -> checks.Outcome:
    """One outcome for the table `checks`: fails on any failed check, as an error if one of them is an error."""
    import great_expectations.expectations as gxe

    unmet = checks.unmet_expectations(
        outcomes.select("asset", "passed"),
        [
            gxe.ExpectTableRowCountToBeBetween(min_value=1),
            gxe.ExpectColumnValuesToNotBeNull(column="passed"),
            gxe.ExpectColumnValuesToBeInSet(column="passed", value_set=[True]),
        ],
    )
    failed = outcomes.filter(~pl.col("passed"))
    severity = checks.ERROR if (failed["severity"] == "ERROR").any() or outcomes.is_empty() else checks.WARN
    worst = None
    if not failed.is_empty():
        row = failed.sort("severity").row(0, named=True)
        worst = f"{row['model']}|{row['scenario']}: {row['check_name']} of {row['asset']}"
    if outcomes.is_empty():
        message = "No partition has been checked yet."
    elif worst is None:
        message = f"All {outcomes.height} checks pass."
    else:
        message = f"{failed.height} of {outcomes.height} checks fail; first: {worst}."
    if catalogue.problems:
        message += f" {len(catalogue.problems)} of the user's files or entries cannot be used:"
        message += "".join(f"\n{problem}" for problem in catalogue.problems)
    return checks.Outcome(
        "all_checks_pass", not unmet, severity, message, float(failed.height), 0.0, worst, failed.to_dicts(), unmet
    )
