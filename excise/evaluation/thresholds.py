"""The thresholds by which figures are judged: each stands here once, and nowhere else.

An audit's own values are settings (`resources.settings`), whose presets start from the numbers below; they are stored
with the partition they judged (table `thresholds`), so that checks, figures, findings and pages say the same. Bounds of
the statistics that no setting changes stand here, too. Not here: what is estimated (see `excise.evaluation.numbers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from excise.errors import ExciseError

if TYPE_CHECKING:
    import polars as pl

INLIER_FLOOR = 0.80
"""Least share of a mask's answers in the unpruned model's usual range."""
INLIER_TOLERANCE = 0.10
"""Inlier ratios further apart than this make a mask and its random control two different kinds of damage."""
PERPLEXITY_BUDGET = 0.05
"""Share by which pruning may raise perplexity."""
SPREAD_FLOOR = 0.60
"""Least spread of a group's answers under a mask, as a share of the unpruned spread of the group that had less."""
COMMONEST_BUDGET = 0.15
"""Share of all answers by which the commonest one may rise above its unpruned share in the group that had more."""
CHANGE_BUDGET = 0.40
"""Standard deviations by which answers may change beyond what closing the gap takes."""
KL_BUDGET = 0.05
"""Nats per token by which next-token distributions on a text may diverge from the unpruned model's."""
SIDE_EFFECT_BUDGET = 0.40
"""Standard deviations by which answers may change in a scenario that the mask was not made for."""
SIGNIFICANCE = 0.05
"""p-values below it reject, as 95 % intervals go with it."""
FEW_NAMES = 5
"""With fewer names a group than this an interval says little: resampling sees too few of the names there could be."""
COLLAPSED_SPREAD = 0.1
"""Answers of which less than this share of the unpruned spread is left have collapsed: no gap of theirs was reduced."""
CATASTROPHIC = 1.3
"""A head is catastrophic where perplexity without it exceeds this many medians over heads (method, B6)."""


@dataclass(frozen=True)
class Thresholds:
    """What one partition was judged by: see the constants of the same names."""

    inlier_floor: float = INLIER_FLOOR
    inlier_tolerance: float = INLIER_TOLERANCE
    spread_floor: float = SPREAD_FLOOR
    commonest_budget: float = COMMONEST_BUDGET
    change_budget: float = CHANGE_BUDGET
    kl_budget: float = KL_BUDGET
    side_effect_budget: float = SIDE_EFFECT_BUDGET
    perplexity_budget: float = PERPLEXITY_BUDGET


def stored_thresholds(rows: pl.DataFrame, *, asset: str, model: str, scenario: str) -> Thresholds:
    """The thresholds that `asset` judged a partition by. rows: of the table `thresholds`.

    Raises ExciseError where they are not there: results of an earlier version do not say what they were judged by.
    """
    matching = [
        row
        for row in rows.iter_rows(named=True)
        if (row["asset"], row["model"], row["scenario"]) == (asset, model, scenario)
    ]
    if len(matching) != 1:
        raise ExciseError(
            f"table thresholds has {len(matching) or 'no'} row{'' if len(matching) == 1 else 's'} of {asset} for "
            f"{model}|{scenario}, so nobody knows what its results were judged by; materialize {asset} of it again"
        )
    row: Mapping = matching[0]
    return Thresholds(**{field.name: row[field.name] for field in fields(Thresholds)})
