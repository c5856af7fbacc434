"""The tables that the page of results is made of, by model and scenario, and how its cells are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from excise.conditions import ALL
from excise.errors import ExciseError
from excise.evaluation.rounding import floor_text, ratio_text
from excise.evaluation.table import Estimate, MetricTable, read_metrics
from excise.evaluation.thresholds import INLIER_TOLERANCE, Thresholds

PLANTED_SCENARIO = "purchase"
"""The one scenario with a gap in the model `planted-specific`."""
Judged = Mapping[tuple[str, str], Thresholds]
"""What the audit of a (model, scenario) was judged by."""
PLANTED_MODELS = ("planted-general", "planted-specific", "planted-neutral")
COLUMNS = {
    "transfer": ("model", "strategy", "matched_to", "source", "scenario", "level", "metric", "estimate", "low", "high"),
    "grid": (
        "model",
        "scenario",
        "strategy",
        "variation",
        "tau_min",
        "tau_maj",
        "density",
        "metric",
        "estimate",
        "low",
        "high",
        "chosen",
    ),
    "localisation": ("model", "strategy", "level", "matched_to", "density", "share", "chance", "deviation"),
    "overlap": (
        "model",
        "strategy",
        "level",
        "scenario",
        "variation",
        "reference_scenario",
        "reference_variation",
        "overlap",
        "chance",
    ),
}


@dataclass(frozen=True)
class ResultFrames:
    """What the page is made of: rows of one or more models.

    metrics, masks, transfer, grid, overlap, thresholds: of the tables `metrics`, `masks` (which only tells heads from
    weights), `transfer_matrix`, `grid_search`, `mask_overlap` and `thresholds` (what each audit and grid search was
    judged by). localisation: one row per mask with model, strategy, level, matched_to and the fields of
    `evaluation.localisation.EnergyShare`. Any but thresholds may be empty: its section is then one sentence.
    """

    metrics: pl.DataFrame
    masks: pl.DataFrame
    transfer: pl.DataFrame
    grid: pl.DataFrame
    localisation: pl.DataFrame
    overlap: pl.DataFrame
    thresholds: pl.DataFrame


def tolerances_text(judged: Judged) -> str:
    """The largest difference of comparable inlier ratios, of all audits."""
    tolerances = sorted({thresholds.inlier_tolerance for thresholds in judged.values()} or {INLIER_TOLERANCE})
    return " or ".join(map(floor_text, tolerances)) + (", as the audit was set," if len(tolerances) > 1 else "")


def metric_tables(metrics: pl.DataFrame, scenarios: Sequence[str]) -> dict[tuple[str, str], MetricTable]:
    """The metrics by model and scenario, in the page's order."""
    if not scenarios:
        raise ExciseError("results: scenarios is empty; name one at least")
    if metrics.is_empty():
        return {}
    tables = {}
    for model in ordered(metrics["model"]):
        for scenario in scenarios:
            rows = metrics.filter((pl.col("model") == model) & (pl.col("scenario") == scenario))
            if not rows.is_empty():
                tables[model, scenario] = read_metrics(rows)
    return tables


def strategies_of_heads(masks: pl.DataFrame) -> set[tuple[str, str]]:
    """(model, strategy) of the strategies that prune heads."""
    if masks.is_empty():
        return set()
    of_heads = masks.filter(pl.col("role").str.starts_with("head_") & pl.col("matched_to").is_null())
    return set(of_heads.select("model", "strategy").unique().iter_rows())


def where_judged(table: MetricTable) -> str:
    """The variation that stands for a scenario: all together, or the only one there is."""
    if len(table.variations) == 1:
        return table.variations[0]
    if not table.has_aggregate:
        raise ExciseError(f"results: the metrics of {table.model}, {table.scenario} hold nothing over all variations")
    return ALL


def ordered(models: Iterable[str]) -> list[str]:
    """The planted models first."""
    return sorted(
        set(models),
        key=lambda model: (PLANTED_MODELS.index(model) if model in PLANTED_MODELS else len(PLANTED_MODELS), model),
    )


def share_text(estimate: Estimate) -> str:
    """A ratio without its interval."""
    return ratio_text(estimate.value)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, whose cells may hold bars."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
