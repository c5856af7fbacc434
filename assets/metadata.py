"""Results as Dagster shows and versions them: pictures, tables, schemas, and what of the user's files cannot be used.

Here belongs the form of metadata. Which figures a stage tells is decided in its own module.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl
import polars.selectors as cs

from assets.partitions import Catalogue
from resources.artifacts import Artifacts
from resources.tables import TABLES

if TYPE_CHECKING:
    from excise.generation.completions import Work


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


def cost(work: "Work") -> dict[str, Any]:
    """What answers cost, and how many of them were drawn before, as metadata."""
    from excise.reporting.words import reuse_sentence

    return {"reuse": reuse_sentence(work.drawn, work.reused), **work.metadata()}


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
