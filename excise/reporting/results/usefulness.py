"""Strategies compared at equal usefulness: at the floor of the inlier ratio, ours and the published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from excise.conditions import ALL, OWN_SCENARIO, UNPRUNED
from excise.errors import ExciseError
from excise.evaluation.rounding import density_text, floor_text, interval_text, level_label, per_cent, percent_text
from excise.evaluation.table import MISSING, Estimate, MetricTable, reaches, read_estimate
from excise.evaluation.thresholds import stored_thresholds
from excise.reporting.results.frames import ResultFrames, markdown_table, ordered, share_text, where_judged
from excise.reporting.results.verdicts import SCENARIO_LEVELS
from excise.reporting.words import listed

PUBLISHED = (
    "set_difference",
    "set_difference_small",
    "attention_heads",
    "attention_heads_removed",
    "snip",
    "fasp",
    "fairness_only",
    "performance_only",
    "magnitude",
    "gradient",
    "random_heads",
)
"""The papers' strategies, by what stands before a dash and a number."""


def equal_usefulness_section(
    tables: Mapping[tuple[str, str], MetricTable], frames: ResultFrames, scenario: str, published: Sequence[str]
) -> str:
    """Masks of a scenario at the floor of its grid search. published: strategies that are not ours."""
    grid = frames.grid
    if not grid.is_empty():
        grid = grid.filter(pl.col("scenario") == scenario)
    if grid.is_empty():
        return "No grid search was run yet, so strategies cannot be compared at equal usefulness."
    parts = [
        f"Masks in {scenario} at the floor of the inlier ratio or above it: for a strategy with two thresholds the "
        "point of its grid with the smallest raw gap (prompt-specific masks), for all strategies their masks as "
        "configured, of every level. A point of a grid is picked by the very answers it is judged on, which flatters "
        "it."
    ]
    for model in ordered(grid["model"]):
        floor = stored_thresholds(frames.thresholds, asset="grid_search", model=model, scenario=scenario).inlier_floor
        parts += [f"### {model}", f"Floor of the inlier ratio: {floor_text(floor)}."]
        useful, short = _grid_rows(grid.filter(pl.col("model") == model), floor)
        table = tables.get((model, scenario))
        collapsed = [] if table is None else _as_configured(table, floor, useful, short)
        useful.sort(key=lambda row: -math.inf if row.reduction.value is None else row.reduction.value, reverse=True)
        if useful:
            header = ["strategy", "", "mask", "variations", "density", "gap reduction, %", "SMD", "inlier ratio"]
            rows = [
                [
                    row.strategy,
                    "published" if row.strategy.partition("-")[0] in published else "ours",
                    row.mask,
                    str(row.variations),
                    density_text(row.density),
                    per_cent(row.reduction),
                    interval_text(row.smd, decimals=2),
                    share_text(row.ratio),
                ]
                for row in useful
            ]
            parts.append(markdown_table(header, rows))
        parts.append(_compared(useful, floor, published))
        if short:
            parts.append(f"Below the floor: {listed(short)}.")
        if collapsed:
            parts.append(f"Answers of a group collapse to one number, which is damage: {listed(collapsed)}.")
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Useful:
    """A mask at the floor of the inlier ratio or above. variations: how many its figures are over."""

    strategy: str
    mask: str
    variations: int
    density: Estimate
    reduction: Estimate
    smd: Estimate
    ratio: Estimate


def _as_configured(table: MetricTable, floor: float, useful: list[Useful], short: list[str]) -> list[str]:
    """Add the masks as configured to the useful ones or to those below the floor; returns those under which answers
    collapse."""
    where, collapsed = where_judged(table), []
    for mask in table.masks:
        if mask == UNPRUNED or mask.is_control or mask.level not in (*SCENARIO_LEVELS, OWN_SCENARIO):
            continue
        ratio, reduction, smd, density = (
            table.get(where, mask, metric) for metric in ("inlier_ratio", "gap_reduction", "smd", "density")
        )
        name = f"{mask.strategy} {level_label(mask.level)}"
        if table.collapsed(where, mask):
            collapsed.append(name)
        elif not reaches(ratio.value, floor):
            short.append(f"{name} ({share_text(ratio)})")
        else:
            kind = f"{level_label(mask.level)}, as configured"
            useful.append(Useful(mask.strategy, kind, len(table.variations), density, reduction, smd, ratio))
    return collapsed


def _grid_rows(grid: pl.DataFrame, floor: float) -> tuple[list[Useful], list[str]]:
    """One model's chosen points, and what is to be said of strategies that have none."""
    useful, short = [], []
    for strategy in grid["strategy"].unique().sort():
        points = grid.filter(pl.col("strategy") == strategy)
        variations = [key for key in points["variation"].unique(maintain_order=True) if key != ALL]
        if ALL in points["variation"]:
            points = points.filter(pl.col("variation") == ALL)
        elif len(variations) > 1:
            raise ExciseError(f"results: the grid of {strategy} has no rows over all variations; run it again")
        chosen = points.filter(pl.col("chosen"))
        if chosen.is_empty():
            ratios = points.filter(pl.col("metric") == "inlier_ratio")
            best: float | None = ratios.select(pl.col("estimate").max()).item()
            if reaches(best, floor):
                short.append(f"{strategy} at no point, as no gap was detectable to choose by or answers collapsed")
            else:
                short.append(f"{strategy} at every point of its grid (at most {share_text(Estimate(best))})")
            continue
        first = chosen.row(0, named=True)
        if chosen.select("tau_min", "tau_maj").n_unique() > 1:
            raise ExciseError(f"results: the grid of {strategy} has more than one chosen point; run it again")
        figures = {row["metric"]: read_estimate(row) for row in chosen.iter_rows(named=True)}
        useful.append(
            Useful(
                strategy,
                f"thresholds {first['tau_min']:g} / {first['tau_maj']:g}",
                len(variations),
                Estimate(first["density"]),
                *(figures.get(metric, MISSING) for metric in ("gap_reduction", "smd", "inlier_ratio")),
            )
        )
    return useful, short


def _compared(useful: Sequence[Useful], floor: float, published: Sequence[str]) -> str:
    """The best of ours beside the best published one, in words."""
    known = [row for row in useful if row.reduction.value is not None]
    theirs = next((row for row in known if row.strategy.partition("-")[0] in published), None)
    ours = next((row for row in known if row.strategy.partition("-")[0] not in published), None)
    if ours is None:
        if theirs is None:
            return f"At inlier ratio {floor_text(floor)} or more there is nothing to compare."
        return f"The best published one, {_told(theirs)}; of ours there is no figure at this usefulness."
    if theirs is None:
        return f"The best of ours, {_told(ours)}; of the published strategies there is no figure at this usefulness."
    first, second = ours.reduction, theirs.reduction
    ahead = 100 * (_known(first) - _known(second))
    side = "more" if ahead >= 0 else "less"
    if first.low is None or first.high is None or second.low is None or second.high is None:
        doubt = ", without an interval"
    else:
        doubt = ", though their intervals overlap" if first.low <= second.high and second.low <= first.high else ""
    return (
        f"The best of ours, {_told(ours)}; the best published one, {_told(theirs)}: ours removes {abs(ahead):.0f} "
        f"percentage points {side}{doubt}."
    )


def _known(reduction: Estimate) -> float:
    return math.nan if reduction.value is None else reduction.value


def _told(row: Useful) -> str:
    return f"{row.strategy} ({row.mask}), {_removes(row.reduction)}"


def _removes(reduction: Estimate) -> str:
    if _known(reduction) <= 0:
        return f"does not reduce the raw gap ({percent_text(reduction)})"
    return f"removes {percent_text(reduction)} of the raw gap"
