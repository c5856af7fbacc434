"""Whether a mask is a success: it closes the gap, beyond its matched random control, and breaks nothing else.

A gap also closes when answers collapse towards one figure, when both groups drift, or when a model is hurt elsewhere.
So a success keeps every budget of `excise.evaluation.thresholds`, and a budget that was not measured is no success.
Here is the judgement alone, on the tables `metrics` and `side_effects`; the figures are estimated in
`excise.evaluation.numbers` and `excise.evaluation.side_effects`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from excise.conditions import ALL, RANDOM, UNPRUNED, Condition
from excise.evaluation.rounding import floor_text, ratio_text
from excise.evaluation.side_effects import CHANGE, KL, NO_TARGET, RATIO, TEXT
from excise.evaluation.table import VERDICTS_SCHEMA, MetricTable, at_most, read_metrics
from excise.evaluation.thresholds import Thresholds


@dataclass(frozen=True)
class Budget:
    """A bound on a metric: `threshold` names it in `Thresholds`; least: figures below break it, else those above.

    of: the scenario itself (table `metrics`), or by the table `side_effects` the text or other scenarios.
    """

    metric: str
    threshold: str
    least: bool = False
    of: Literal["itself", "text", "others"] = "itself"

    @property
    def name(self) -> str:
        """What it is called in verdicts: the metric; elsewhere stands for other scenarios."""
        return f"{self.metric} elsewhere" if self.of == "others" else self.metric


BUDGETS = (
    Budget("inlier_ratio", "inlier_floor", least=True),
    Budget("spread_ratio", "spread_floor", least=True),
    Budget("commonest_rise", "commonest_budget"),
    Budget("excess_change", "change_budget"),
    Budget(KL, "kl_budget", of="text"),
    Budget(RATIO, "perplexity_budget", of="text"),
    # Where no answer is a number any more, nothing else is known of a scenario.
    Budget("inlier_ratio", "inlier_floor", least=True, of="others"),
    Budget(CHANGE, "side_effect_budget", of="others"),
)

_Figures = Sequence[tuple[str, float | None]]  # where a figure is measured (empty: here), and the figure


def verdicts(metrics: pl.DataFrame, side_effects: pl.DataFrame, thresholds: Thresholds) -> pl.DataFrame:
    """One row per condition (variation, strategy, level, matched_to) of a model and scenario, "(all)" among them.

    metrics, side_effects: rows of the tables of those names, the latter empty where nothing was measured. A condition
    without rows of metrics has no verdict. Columns as `excise.evaluation.table.VERDICTS_SCHEMA`:

      * closes: the mask is shown to close the gap. Its gap_reduction is above 0 with its interval, and so is
        reduction_over_random where it has a matched random control, which must be at comparable usefulness
        (inlier ratios at most `inlier_tolerance` apart). Without a control gap_reduction's interval alone counts.
      * failed: the budgets broken by an estimate, as `spread_ratio 0.44 below 0.60`; behind it, in brackets, where, if
        that is another variation or scenario, the worst one first.
      * unknown: the budgets of which a figure is not known.
      * not_measured: the budgets that were not measured on purpose, as no other scenario was to be asked.
      * success: closes, nothing failed, nothing unknown.

    For "(all)" every variation of the condition that the unpruned model answered must keep every budget. Raises
    ExciseError as `read_metrics`.
    """
    table = read_metrics(metrics)
    effects = _by_condition(side_effects)
    rows = []
    for variation in dict.fromkeys(metrics["variation"]):
        masks = dict.fromkeys(table.masks_of(variation))
        for mask in masks:
            if mask == UNPRUNED:
                continue
            variations = [variation]
            if variation == ALL:
                variations = [part for part in table.variations if _answered(table, part, mask)]
            controlled = mask.strategy != RANDOM and mask.control in masks
            closes = _closes(table, variation, mask, controlled, thresholds.inlier_tolerance)
            failed, unknown, not_measured = [], [], []
            for budget in BUDGETS:
                figures, switched_off = _figures(budget, table, effects, mask, variations, variation)
                if switched_off and not figures:
                    not_measured.append(f"{budget.name}: no other scenario was asked")
                else:
                    failed += _broken(budget, figures, getattr(thresholds, budget.threshold))
                    unknown += _unmeasured(budget, figures)
            rows.append(
                {
                    "model": table.model,
                    "scenario": table.scenario,
                    "variation": variation,
                    "strategy": mask.strategy,
                    "level": mask.level,
                    "matched_to": mask.matched_to,
                    "closes": closes,
                    "success": closes and not failed and not unknown,
                    "failed": failed,
                    "unknown": unknown,
                    "not_measured": not_measured,
                }
            )
    return pl.DataFrame(rows, schema=VERDICTS_SCHEMA, orient="row")


def _by_condition(side_effects: pl.DataFrame) -> Mapping[tuple[str, Condition], list[dict]]:
    effects: dict[tuple[str, Condition], list[dict]] = {}
    for row in side_effects.iter_rows(named=True):
        mask = Condition.of(row)
        effects.setdefault((row["variation"], mask), []).append(row)
    return effects


def _answered(table: MetricTable, variation: str, mask: Condition) -> bool:
    """Whether the mask was asked on a variation that has a gap to be known, so that figures over all count it."""
    return table.has(variation, mask, "gap_mean") and table.get(variation, UNPRUNED, "gap_mean").value is not None


def _closes(table: MetricTable, where: str, mask: Condition, controlled: bool, tolerance: float) -> bool:
    reduction = table.get(where, mask, "gap_reduction")
    if reduction.low is None or reduction.low <= 0.0:
        return False
    if not controlled:
        return True
    beyond = table.get(where, mask, "reduction_over_random")
    return beyond.low is not None and beyond.low > 0.0 and table.comparable(where, mask, tolerance)


def _figures(
    budget: Budget,
    table: MetricTable,
    effects: Mapping[tuple[str, Condition], list[dict]],
    mask: Condition,
    variations: Iterable[str],
    where: str,
) -> tuple[_Figures, bool]:
    """All figures a budget is held against, and whether there are none on purpose in one of the variations at least."""
    figures: list[tuple[str, float | None]] = []
    switched_off = False
    for variation in variations:
        here = "" if variation == where else variation
        if budget.of == "itself":
            figures.append((here, table.get(variation, mask, budget.metric).value))
            continue
        rows = [row for row in effects.get((variation, mask), ()) if (row["target"] == TEXT) == (budget.of == "text")]
        off_here = any(row["target"] == NO_TARGET for row in rows)
        switched_off = switched_off or off_here
        asked = [row for row in rows if row["metric"] == budget.metric and row["target"] != NO_TARGET]
        for row in asked:
            place = row["target"] if budget.of == "others" else ""
            figures.append((", ".join(part for part in (here, place) if part), row["estimate"]))
        if not asked and not off_here:
            figures.append((here, None))
    return figures, switched_off


def _broken(budget: Budget, figures: _Figures, bound: float) -> list[str]:
    beyond = [
        (place, figure)
        for place, figure in figures
        if figure is not None and not (at_most(bound, figure) if budget.least else at_most(figure, bound))
    ]
    if not beyond:
        return []
    place, figure = (min if budget.least else max)(beyond, key=lambda pair: pair[1])
    others = f"and {len(beyond) - 1} more" if len(beyond) > 1 else ""
    shown = "; ".join(part for part in (place, others) if part)
    side = "below" if budget.least else "above"
    return [f"{budget.name} {_beside(figure, bound)} {side} {floor_text(bound)}" + (f" ({shown})" if shown else "")]


def _beside(figure: float, bound: float) -> str:
    """A figure with two decimals, or as many as it takes not to look like the bound that it breaks."""
    decimals = 2
    while round(figure, decimals) == round(bound, decimals) and decimals < 6:
        decimals += 1
    return ratio_text(figure) if decimals == 2 else f"{figure:.{decimals}f}"


def _unmeasured(budget: Budget, figures: _Figures) -> list[str]:
    if figures and all(figure is not None for _, figure in figures):
        return []
    shown = "; ".join(place for place, figure in figures if figure is None and place)
    return [f"{budget.name} not known" + (f" ({shown})" if shown else "")]
