"""What measured paths ask a model: about the names that masks are made of, in whichever scenario they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, cast

import polars as pl

from excise.attribution.gap_free import Asked, ask
from excise.scenarios.schema import Comparison

if TYPE_CHECKING:
    from excise.generation.completions import CompletionCache
    from excise.models.loading import LoadedModel
    from excise.scenarios.schema import Scenario


def questions(
    loaded: LoadedModel,
    scenarios: Mapping[str, Scenario],
    learned: Callable[[str], tuple[pl.DataFrame, pl.DataFrame]],
    *,
    seed: int,
    answers: CompletionCache,
) -> Callable[[str, str, float], Asked]:
    """`ask` of `excise.strategies.build.Paths`: scenario, variation and significance -> what was asked; each once.

    learned: by a scenario's key the completions, and their prompts, of the names that masks are made of.
    """
    known = cache(learned)

    @cache
    def asked(key: str, variation: str, significance: float) -> Asked:
        completions, prompts = known(key)
        return ask(
            loaded,
            prompts,
            completions.filter(pl.col("variation") == variation),
            place=f"{key}/{variation}",
            comparison=cast(Comparison, scenarios[key].comparison),
            outcome=scenarios[key].outcome,
            significance=significance,
            seed=seed,
            cache=answers,
        )

    return asked
