"""What the figures of a mask allow to say, by a stated rule, and what is known to be true of a planted model.

The claims follow the method, part C: the reduction of the raw gap beyond the matched random control, at comparable
inlier ratio.
"""

from __future__ import annotations

from excise.conditions import ALL, CROSS_CONTEXT, LEVELS, Condition
from excise.evaluation.table import MetricTable
from excise.evaluation.thresholds import INLIER_TOLERANCE
from excise.reporting.finding import standing_out, unpruned_gap
from excise.reporting.results.frames import PLANTED_SCENARIO

SCENARIO_LEVELS = LEVELS[:4]
"""Level of strategies that rank whole heads over a scenario."""
BEATS_RANDOM = "beats random"
NOT_BEYOND = "not beyond random"
NO_YARDSTICK = "no yardstick"
NO_REDUCTION = "no reduction"
NO_GAP = "no gap detectable"
NO_GAP_ON_AVERAGE = "no gap on average"
NO_CONTROL = "no random control"
NO_INTERVAL = "no interval"
NO_ANSWERS = "no answers left to compare"
NO_MASK = "no mask"
ANSWERS_COLLAPSED = "answers collapsed"


def verdict(table: MetricTable, where: str, mask: Condition, tolerance: float = INLIER_TOLERANCE) -> str:
    """What the figures of a mask allow to say, in the words of the reading guide (method, part C).

    where: a variation, or "(all)". tolerance: the setting `inlier_tolerance` of the audit. Every reduction is undefined
    where no gap is detectable; where only this mask's is, too few of its answers parsed or they are all the same.
    """
    if table.collapsed(where, mask):
        return ANSWERS_COLLAPSED
    reduction, beyond = (table.get(where, mask, metric) for metric in ("gap_reduction", "reduction_over_random"))
    if reduction.value is None:
        if not unpruned_gap(table, where)[1].has_interval:
            return NO_INTERVAL
        others = [other for other in table.masks if not table.collapsed(where, other)]
        unanswered = table.has(where, mask, "gap_mean") and table.get(where, mask, "gap_mean").value is None
        if unanswered or any(table.get(where, other, "gap_reduction").value is not None for other in others):
            return NO_ANSWERS
        return NO_GAP_ON_AVERAGE if where == ALL and standing_out(table) else NO_GAP
    if table.collapsed(where, mask.control):
        return NO_YARDSTICK
    if beyond.value is None:
        return NO_CONTROL
    if not table.comparable(where, mask, tolerance):
        return NO_YARDSTICK
    if beyond.low is None or beyond.high is None:
        return NO_INTERVAL
    if beyond.low <= 0:
        return NOT_BEYOND
    return BEATS_RANDOM if reduction.value > 0 else NO_REDUCTION


def expected_verdict(model: str, scenario: str, level: str) -> str | None:
    """What a method that finds the planted bias shows; None for a model without a known truth."""
    if model == "planted-neutral" or (model == "planted-specific" and scenario != PLANTED_SCENARIO):
        return NO_GAP
    if model == "planted-specific":
        return NOT_BEYOND if level == CROSS_CONTEXT else BEATS_RANDOM
    return BEATS_RANDOM if model == "planted-general" else None
