"""What a check is: what it found in words, how Dagster shows it, and how the table `checks` keeps it for the roll-up.

Here belong the outcome of a check and the suites of Great Expectations. What is checked is in `table_checks` (what the
declaration of a table asks for), `answer_checks` and `metric_checks`. Every suite is over a small table of figures and
asks for rows and for values first: expectations about values pass on an empty table and ignore nulls.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import polars as pl

from assets.metadata import table_value
from assets.partitions import Catalogue
from excise.conditions import NO_STRATEGY
from resources.tables import TABLES
from resources.warehouse import Warehouse

ERROR = dg.AssetCheckSeverity.ERROR
WARN = dg.AssetCheckSeverity.WARN
DESCRIPTIONS = {
    "completions_complete_and_balanced": "Every prompt has all its samples, once each; groups have equally many.",
    "judged_variations": "Every variation has enough answers of every group to be judged.",
    "parse_rate": "Enough answers of every variation and group hold a single number.",
    "mask_density": "Every strategy's mask prunes something, and not too much of the model.",
    "within_budgets": "No strategy's mask closes the gap and breaks a budget: spread, answers, text, other scenarios.",
    "metrics_finite": "Every metric of every mask is there and is a finite number.",
    "inlier_ratio": "Under every strategy's mask, enough answers stay in the range of the unpruned model's.",
    "rows_as_declared": "The stored tables have the rows, keys and values that their declarations ask for.",
    "all_checks_pass": "No check of any partition fails.",
}
BLOCKING = ("completions_complete_and_balanced",)


@dataclass(frozen=True)
class Outcome:
    """What a check found: the worst figure, the bound it was held against, and where."""

    check: str
    passed: bool
    severity: dg.AssetCheckSeverity
    message: str
    figure: float | None = None
    bound: float | None = None
    worst: str | None = None
    table: Sequence[dict[str, Any]] = field(default=(), repr=False)
    unmet: Sequence[str] = ()

    def result(self) -> dg.AssetCheckResult:
        """As Dagster shows it."""
        metadata: dict[str, Any] = {"finding": self.message}
        for name, value in (("figure", self.figure), ("bound", self.bound), ("worst", self.worst)):
            if value is not None:
                metadata[name] = value
        if self.unmet:
            metadata["unmet_expectations"] = dg.MetadataValue.md("\n".join(f"* {sentence}" for sentence in self.unmet))
        if self.table:
            metadata["figures"] = table_value(self.table)
        return dg.AssetCheckResult(
            check_name=self.check,
            passed=self.passed,
            severity=self.severity,
            metadata=metadata,
            description=self.message,
        )


def check_spec(check: str, asset: str, catalogue: Catalogue) -> dg.AssetCheckSpec:
    """A partitioned check of an asset of the grid."""
    return dg.AssetCheckSpec(
        check,
        asset=asset,
        description=DESCRIPTIONS[check],
        blocking=check in BLOCKING,
        partitions_def=catalogue.grid,
    )


def record(warehouse: Warehouse, asset: str, place: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    """Keep the outcomes in the table `checks`, in place of those of the partition's earlier run."""
    keys = {"asset": asset, **place}
    rows = [
        {
            **keys,
            "check_name": outcome.check,
            "passed": outcome.passed,
            "severity": outcome.severity.value,
            "figure": outcome.figure,
            "floor": outcome.bound,
            "worst": outcome.worst,
            "message": outcome.message,
            "checked_at": datetime.now(UTC).replace(tzinfo=None),
        }
        for outcome in outcomes
    ]
    warehouse.replace_partition("checks", pl.DataFrame(rows, schema=TABLES["checks"].schema), keys)


def unmet_expectations(frame: pl.DataFrame, expectations: Sequence[Any]) -> list[str]:
    """Validate a frame and return what it does not meet, one sentence per expectation."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    batch = (
        context.data_sources.add_pandas("frames")
        .add_dataframe_asset("frame")
        .add_batch_definition_whole_dataframe("whole")
        .get_batch({"dataframe": frame.to_pandas()})
    )
    suite = gx.ExpectationSuite(name="suite", expectations=list(expectations))
    validation = batch.validate(suite).to_json_dict()
    return [_sentence(result) for result in validation["results"] if not result["success"]]


def _sentence(result: dict[str, Any]) -> str:
    config, seen = result["expectation_config"], result.get("result") or {}
    wanted = {name: value for name, value in config["kwargs"].items() if name not in ("batch_id", "severity")}
    text = f"{config['type']}({', '.join(f'{name}={value!r}' for name, value in wanted.items() if value is not None)})"
    if result.get("exception_info", {}).get("exception_message"):
        return f"{text}: {result['exception_info']['exception_message']}"
    if "observed_value" in seen:
        return f"{text}: found {seen['observed_value']}"
    if "unexpected_count" in seen:
        return f"{text}: {seen['unexpected_count']} of {seen['element_count']} rows do not"
    return text


def at_least(check: str, rates: pl.DataFrame, column: str, floor: float, meaning: str) -> Outcome:
    """`rates` has the rates in `column`, lowest first, beside the columns that say where."""
    import great_expectations.expectations as gxe

    unmet = unmet_expectations(
        rates.select(column),
        [
            gxe.ExpectTableRowCountToBeBetween(min_value=1),
            gxe.ExpectColumnValuesToNotBeNull(column=column),
            gxe.ExpectColumnValuesToBeBetween(column=column, min_value=floor, max_value=1.0),
        ],
    )
    if rates.is_empty():
        return Outcome(check, False, WARN, "There is nothing to judge: no rows.", None, floor, None, (), unmet)
    row = rates.row(0, named=True)
    figure, worst = row[column], place_of(row)
    below = rates.filter(pl.col(column).is_null() | (pl.col(column) < floor)).height
    shown = "unknown" if figure is None or math.isnan(figure) else f"{figure:.1%}"
    message = f"{meaning}: lowest {shown} ({worst}), floor {floor:.1%}"
    message += f"; {below} of {rates.height} are below." if below else "."
    return Outcome(check, not unmet, WARN, message, figure, floor, worst, rates.to_dicts(), unmet)


def place_of(row: dict[str, Any]) -> str:
    """Variation, group and mask of a row, as far as it has them."""
    parts = [str(row["variation"])]
    if row.get("group"):
        parts.append(str(row["group"]))
    if row.get("strategy") and row["strategy"] != NO_STRATEGY:
        control = f" (control of {row['matched_to']})" if row.get("matched_to") else ""
        parts.append(f"{row['strategy']}{control}, {str(row['level']).replace('_', '-')}")
    return ", ".join(parts)
