"""The point of a grid that the rule picks, in words."""

from __future__ import annotations

import polars as pl

from excise.conditions import ALL
from excise.evaluation.rounding import floor_text, interval_text, percent_text, ratio_text
from excise.evaluation.table import MISSING, reaches, read_estimate
from excise.evaluation.thresholds import COLLAPSED_SPREAD
from excise.strategies.config import Strategy


def chosen_in_words(rows: pl.DataFrame, strategy: Strategy, floor: float) -> str:
    """The point the rule picks for a strategy over all variations of the grid, or why it picks none.

    rows: the strategy's rows of the table `grid_search`. floor: the least inlier ratio.
    """
    rule = f"the smallest raw gap at an inlier ratio of {floor_text(floor)} or more"
    overall = rows.filter(pl.col("variation") == ALL)
    chosen = overall.filter(pl.col("chosen"))
    if chosen.is_empty():
        ratios = overall.filter((pl.col("metric") == "inlier_ratio") & pl.col("estimate").is_finite())["estimate"]
        best = max(ratios.to_list(), default=None)
        if not reaches(best, floor):
            highest = ratio_text(best) if best is not None else "unknown"
            return f"No point is chosen: none reaches an inlier ratio of {floor_text(floor)} (highest {highest})."
        spreads = overall.filter(pl.col("metric") == "spread_ratio")["estimate"].drop_nulls()
        if len(spreads) and (spreads < COLLAPSED_SPREAD).all():
            return "No point is chosen: under every mask the answers of a group collapse to one number."
        return (
            "No point is chosen: over all variations no gap is detectable, or at every point of that inlier ratio the "
            "answers of a group collapse to one number."
        )
    figures = {row["metric"]: read_estimate(row) for row in chosen.iter_rows(named=True)}
    tau_min, tau_maj = chosen.row(0, named=True)["tau_min"], chosen.row(0, named=True)["tau_maj"]
    places = "{:.0f} heads and {:.0f} heads" if strategy.of_heads else "{:.0%} and {:.0%} of the weights"
    parts = [f"the top {places.format(tau_min, tau_maj)} (minority, majority): {rule}"]
    reduction = figures.get("gap_reduction", MISSING)
    if reduction.value is not None:
        verb = "it removes" if reduction.value > 0 else "it does not reduce the gap: it removes"
        parts.append(f"{verb} {percent_text(reduction)} of the raw gap")
    size, ratio = (figures.get(metric, MISSING) for metric in ("abs_smd", "inlier_ratio"))
    parts.append(f"mean |SMD| {interval_text(size, decimals=2)}, inlier ratio {ratio_text(ratio.value)}")
    return "; ".join(parts) + "."
