"""What decides a mask, beside every figure about it: the column `definition`.

A strategy's name says nothing about its parameters, which a user's file may change between two runs. So rows carry the
definition (`Strategy.definition`), and masks of one name with different definitions are never put together.
"""

import json
from collections.abc import Sequence

import polars as pl

from excise.conditions import NO_STRATEGY
from excise.errors import ExciseError
from excise.strategies.config import Strategy

MASK = ("strategy", "level", "matched_to")


def require_one_definition(rows: pl.DataFrame, *, again: str) -> None:
    """Raise ExciseError where rows of one strategy are about masks that were made in different ways.

    rows: columns scenario, strategy, matched_to and definition. again: what to materialize again.
    """
    of_strategies = rows.filter(pl.col("matched_to").is_null() & (pl.col("strategy") != NO_STRATEGY))
    first: dict[str, tuple[str, str]] = {}
    for scenario, strategy, definition in (
        of_strategies.select("scenario", "strategy", "definition").unique().sort(pl.all()).rows()
    ):
        made = _without_seed(definition, scenario, again)
        earlier = first.setdefault(strategy, (scenario, made))
        if earlier[1] != made:
            raise ExciseError(
                f"masks of {strategy} were made in two ways: {earlier[1]} ({earlier[0]}) and {made} ({scenario}); "
                f"materialize {again} again where that is not how you want them"
            )


def require_defined_as(masks: pl.DataFrame, strategies: Sequence[Strategy], *, again: str) -> None:
    """Raise ExciseError where stored masks of the strategies were not made as these make them now.

    masks: columns scenario, strategy and definition, of strategies' own masks. again: what to materialize again.
    """
    now = {strategy.key: strategy.definition() for strategy in strategies}
    for scenario, strategy, definition in (
        masks.select("scenario", "strategy", "definition").unique().sort(pl.all()).rows()
    ):
        made = _without_seed(definition, scenario, again)
        if made != now[strategy]:
            raise ExciseError(
                f"the masks of {strategy} in {scenario} were made by {made}, but {strategy} is now {now[strategy]}; "
                f"materialize {again} of {scenario} again"
            )


def _without_seed(definition: str | None, scenario: str, again: str) -> str:
    """A definition as compared: draws of another seed are masks of the same kind."""
    if definition is None:
        raise ExciseError(
            f"masks of {scenario} were stored by a version that did not note what decides them; materialize {again} of "
            f"{scenario} again"
        )
    return json.dumps({name: value for name, value in json.loads(definition).items() if name != "seed"}, sort_keys=True)


def with_definitions(rows: pl.DataFrame, masks: pl.DataFrame) -> pl.DataFrame:
    """Rows of metrics with the definition of their masks; null where nothing is pruned.

    rows: columns strategy, level and matched_to. masks: rows of the table of that name, of one model and scenario.
    """
    known = masks.select(*MASK, "definition").unique(list(MASK), keep="first", maintain_order=True)
    return rows.join(known, on=list(MASK), how="left", nulls_equal=True, maintain_order="left")
