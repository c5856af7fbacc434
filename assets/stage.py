"""What all stages share: how an asset of the grid is declared, how it fails, and the metadata of its result.

Here belong Dagster's conventions (groups, pools, versions, schema and pictures as metadata). What a single stage does
is in the module of its name.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg
import polars as pl
import polars.selectors as cs

from assets.partitions import Catalogue
from excise.errors import ExciseError
from excise.evaluation.thresholds import Thresholds, stored_thresholds
from resources.artifacts import Artifacts
from resources.tables import TABLES
from resources.warehouse import Warehouse

# All assets of a grid need the same policy, or Dagster splits a backfill into more runs than there are partitions.
ONE_RUN_PER_PARTITION = dg.BackfillPolicy.multi_run(max_partitions_per_run=1)
INLINE_PICTURE_BYTES = 100_000


def clear_failures(function: Callable) -> Callable:
    """Turn a mistake the user can mend into a failure that says so; trying again would not help."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ExciseError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from error

    return guarded


def grid_asset(
    catalogue: Catalogue,
    *,
    group: str,
    kinds: set[str],
    description: str,
    deps: Sequence[str | dg.AssetDep],
    checks: Sequence[dg.AssetCheckSpec] = (),
    uses_model: bool = False,
    code_version: str = "1",
) -> Callable[[Callable], dg.AssetsDefinition]:
    """Declare an asset partitioned by model and scenario. Stages that use the model hold the pool `gpu`."""

    def declare(function: Callable) -> dg.AssetsDefinition:
        return dg.asset(
            partitions_def=catalogue.grid,
            backfill_policy=ONE_RUN_PER_PARTITION,
            group_name=group,
            kinds=kinds,
            description=description,
            deps=list(deps),
            check_specs=list(checks),
            pool="gpu" if uses_model else None,
            code_version=code_version,
        )(clear_failures(function))

    return declare


def model_asset(
    catalogue: Catalogue, *, kinds: set[str], description: str, deps: Sequence[str], code_version: str = "1"
) -> Callable[[Callable], dg.AssetsDefinition]:
    """Declare an analysis over all scenarios of a model: partitioned by model, its `deps` by model and scenario."""

    def declare(function: Callable) -> dg.AssetsDefinition:
        return dg.asset(
            partitions_def=catalogue.model_partitions,
            backfill_policy=ONE_RUN_PER_PARTITION,
            group_name="analysis",
            kinds=kinds,
            description=description,
            deps=[
                dg.AssetDep(name, partition_mapping=dg.MultiToSingleDimensionPartitionMapping("model")) for name in deps
            ],
            code_version=code_version,
        )(clear_failures(function))

    return declare


def scenarios_with_results(
    context: dg.AssetExecutionContext, warehouse: Warehouse, rows: pl.DataFrame, catalogue: Catalogue, *, made_by: str
) -> tuple[list[str], dict[str, str]]:
    """The scenarios that have rows, in the catalogue's order, and as metadata those that have none, and why.

    Scenarios without results are named in the log, too. Raises ExciseError when there are no results at all, unless
    none can be had as nothing can be judged (`nothing_judged`).
    """
    model, found = context.partition_key, set(rows["scenario"])
    known = [key for key in catalogue.scenarios if key in found]
    lacking = [key for key in catalogue.scenarios if key not in found]
    checked = warehouse.read("checks", asset="completions", check_name="judged_variations", model=model)
    unjudged = [key for key in lacking if key in set(checked.filter(pl.col("figure") == 0)["scenario"])]
    why = f"no variation of {', '.join(unjudged)} can be judged (check judged_variations of completions)"
    if not known and not unjudged:
        raise ExciseError(f"no scenario of {model} has results yet; materialize {made_by} of its partitions first")
    metadata = {}
    if unmade := [key for key in lacking if key not in unjudged]:
        context.log.info(f"left out, as {made_by} has no results yet: {', '.join(unmade)}")
    broken = [key for key in catalogue.scenarios.broken if key in found]
    for key in broken:
        context.log.warning(f"left out: {catalogue.scenarios.why_not(key)}")
    if left_out := [*unmade, *(f"{key} (its file has a mistake)" for key in broken)]:
        metadata["scenarios_left_out"] = ", ".join(left_out)
    if unjudged:
        context.log.info(f"left out: {why}")
        metadata["scenarios_not_judged"] = ", ".join(unjudged)
    return known, metadata


def nothing_judged(warehouse: Warehouse, table: str, model: str, left_out: Mapping[str, str]) -> dg.MaterializeResult:
    """The result of an analysis of a model none of whose scenarios can be judged: an empty table that says so."""
    rows = pl.DataFrame(schema=TABLES[table].schema)
    warehouse.replace_partition(table, rows, {"model": model})
    finding = "No variation of any scenario can be judged, so there is nothing to analyse (check judged_variations)."
    metadata = {**left_out, "finding": finding} | table_metadata(table, rows)
    return dg.MaterializeResult(metadata=metadata, data_version=data_version(rows))


def nothing_to_tell(
    warehouse: Warehouse, table: str, place: Mapping[str, str], why: str, *, under: str
) -> dg.MaterializeResult:
    """The result of a stage that has nothing to tell of a partition: an empty table, and `why` as metadata `under`."""
    rows = pl.DataFrame(schema=TABLES[table].schema)
    warehouse.replace_partition(table, rows, place)
    return dg.MaterializeResult(
        metadata={under: why} | table_metadata(table, rows), data_version=data_version(rows, why)
    )


def rows_of(warehouse: Warehouse, table: str, model: str, scenario: str, *, made_by: str) -> pl.DataFrame:
    """A partition's rows. Raises ExciseError naming the asset to materialize when there are none."""
    rows = warehouse.read(table, model=model, scenario=scenario)
    if rows.is_empty():
        raise ExciseError(
            f"table {table} has no rows for {model}|{scenario}; materialize {made_by} of this partition first"
        )
    return rows


def record_thresholds(warehouse: Warehouse, asset: str, model: str, scenario: str, thresholds: Thresholds) -> None:
    """Keep what an asset's results were judged by, in place of those of the partition's earlier run."""
    keys = {"asset": asset, "model": model, "scenario": scenario}
    rows = pl.DataFrame([keys | asdict(thresholds)], schema=TABLES["thresholds"].schema)
    warehouse.replace_partition("thresholds", rows, keys)


def thresholds_of(warehouse: Warehouse, asset: str, model: str, scenario: str) -> Thresholds:
    """What an asset's results were judged by. Raises ExciseError where the partition does not say."""
    rows = warehouse.read("thresholds", asset=asset, model=model, scenario=scenario)
    return stored_thresholds(rows, asset=asset, model=model, scenario=scenario)


def data_version(*parts: Any) -> dg.DataVersion:
    """A version that changes with any of the given values or frames (whatever the order of rows and columns)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, pl.DataFrame):
            columns = sorted(part.columns)
            plain = part.select(columns).with_columns(cs.list().cast(pl.List(pl.String)).list.join(" "))
            digest.update(plain.sort(columns).write_csv(null_value="\x00").encode())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\x1e")
    return dg.DataVersion(digest.hexdigest()[:16])


def mistakes(catalogue: Catalogue) -> dict[str, Any]:
    """What of the user's files cannot be used, as metadata; nothing where all of it can."""
    if not catalogue.problems:
        return {}
    return {"files_with_mistakes": dg.MetadataValue.md("\n".join(f"* {problem}" for problem in catalogue.problems))}


def table_metadata(table: str, rows: pl.DataFrame) -> dict[str, Any]:
    """Row count, table name and described columns, under the keys Dagster shows specially."""
    columns = [
        dg.TableColumn(column.name, column.type.lower(), description=column.description)
        for column in TABLES[table].columns
    ]
    return {
        "dagster/row_count": rows.height,
        "dagster/table_name": table,
        "dagster/column_schema": dg.TableSchema(columns=columns),
    }


def picture(name: str, figure: Any, artifacts: Artifacts, *partition: str) -> dict[str, dg.MetadataValue]:
    """Save a figure in the partition's folder and return it as metadata, drawn inline and as a path."""
    from excise.reporting.figures import save

    saved = save(figure, artifacts.figures(*partition) / name)
    encoded = base64.b64encode(saved.png).decode()
    return {
        name: dg.MetadataValue.md(f"![{name.replace('_', ' ')}](data:image/png;base64,{encoded})"),
        f"{name}_file": dg.MetadataValue.path(str(saved.svg_path)),
    }


def table_value(rows: Sequence[Mapping[str, Any]] | pl.DataFrame, *, limit: int = 100) -> dg.TableMetadataValue:
    """Rows as a table in the UI; of many rows the first `limit`."""
    records = rows.to_dicts() if isinstance(rows, pl.DataFrame) else list(rows)
    columns = list(records[0]) if records else []
    return dg.MetadataValue.table(
        records=[dg.TableRecord({name: _shown(record[name]) for name in columns}) for record in records[:limit]],
        schema=dg.TableSchema(columns=[dg.TableColumn(name, _kind(records, name)) for name in columns]),
    )


def _shown(value: Any) -> str | int | float | bool:
    if value is None:
        return ""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value if isinstance(value, str | int | bool) else str(value)


def _kind(records: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [record[name] for record in records if record[name] is not None]
    if values and all(isinstance(value, bool) for value in values):
        return "bool"
    return "float" if values and all(isinstance(value, int | float) for value in values) else "string"
