"""Conditions: under which mask an answer was given, said once for every table.

A *condition* is a strategy at a level of generality, one of its controls, or no mask at all. Its three columns, with
`draw` for the repetitions of a control, stand in every table of masks, answers and metrics. Words that people read are
made in `reporting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ALL = "(all)"
"""In the place of a variation: over all variations."""
NO_STRATEGY, NO_LEVEL = "unpruned", "none"
RANDOM = "random"
CONTROLS = (RANDOM, "pooled_band", "reversed", "permuted")
"""Strategies that show what a mask's size alone does."""
PROMPT_SPECIFIC, WITHIN_CONTEXT, CROSS_CONTEXT = "prompt_specific", "within_context", "cross_context"
ALL_CONTEXTS, OWN_SCENARIO = "all_contexts", "own_scenario"
LEVELS = (PROMPT_SPECIFIC, WITHIN_CONTEXT, CROSS_CONTEXT, ALL_CONTEXTS, OWN_SCENARIO)
"""What a mask is made from: the variation itself; the other variations of its scenario; other scenarios (BDB, section
4); all of them (ours: what one would prune knowing everything there is); all variations of the scenario together (FASP,
whose scores are of whole heads)."""
PUBLISHED_LEVELS = LEVELS[:3]
"""Those of BDB."""
ACROSS = (CROSS_CONTEXT, ALL_CONTEXTS)
"""Levels whose masks need other scenarios."""
GRID = "grid"
"""The level of a grid search's masks."""
COLUMNS = ("strategy", "level", "matched_to")
PLACE = ("variation", *COLUMNS)
MASK = (*PLACE, "draw")
"""What names a figure in a table of one model and scenario, and what names a mask there."""


class Condition(NamedTuple):
    """A strategy's mask at a level; `matched_to` names the strategy that a control belongs to. Fields as COLUMNS."""

    strategy: str
    level: str
    matched_to: str | None = None

    @classmethod
    def of(cls, row: Mapping[str, str | None]) -> Condition:
        """The condition of a table's row."""
        return cls(str(row["strategy"]), str(row["level"]), row["matched_to"])

    @property
    def is_control(self) -> bool:
        """Whether the mask is some strategy's control."""
        return self.matched_to is not None

    @property
    def control(self) -> Condition:
        """The random control of a strategy, and of its other controls: the same count per matrix, at the same level."""
        return Condition(RANDOM, self.level, self.matched_to or self.strategy)


UNPRUNED = Condition(NO_STRATEGY, NO_LEVEL)


def condition_order(condition: Condition) -> tuple[int, str, str, int, int, str]:
    """Sort key: unpruned first, then by level and strategy, every strategy followed by its controls."""
    levels = (NO_LEVEL, *LEVELS)
    level = levels.index(condition.level) if condition.level in levels else len(levels)
    control = CONTROLS.index(condition.strategy) if condition.strategy in CONTROLS else len(CONTROLS)
    strategy = condition.matched_to or condition.strategy
    return (level, condition.level, strategy, condition.is_control, control, condition.strategy)
