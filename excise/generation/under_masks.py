"""A model asked the same prompts under one mask after another, and how it is asked, which no mask changes.

Here belongs the loop over masks of a table, which are only applied; what they are, is `interventions`, and how answers
are had `enumeration`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from excise.conditions import MASK
from excise.errors import ExciseError
from excise.generation.answering import Answering
from excise.generation.completions import CompletionCache, Work
from excise.progress import Progress, silent

if TYPE_CHECKING:
    from excise.interventions.protocol import Intervention
    from excise.models.loading import LoadedModel
    from excise.outcomes import Outcome
    from excise.outcomes.scorers import Scorer
    from excise.outcomes.scoring import ScoreCache

MASK_SCHEMA = {name: pl.String() for name in (*MASK[1:], "mask")} | {"draw": pl.Int64()}
"""The columns that say under which mask an answer was given, beside its variation."""


@dataclass(frozen=True)
class Asking:
    """A loaded model, and how it is asked: the same for all prompts and masks. scorer: where answers are judged."""

    loaded: LoadedModel
    how: Answering
    outcome: Outcome
    cache: CompletionCache | None = None
    scorer: Scorer | None = None
    scores: ScoreCache | None = None

    def answers(
        self, prompts: pl.DataFrame, intervention: Intervention | None = None, progress: Progress = silent
    ) -> tuple[pl.DataFrame, Work]:
        """The answers to the prompts, with the columns of EXACT_SCHEMA, and what they cost."""
        scoring = {} if self.scorer is None else {"scorer": self.scorer, "scores": self.scores}
        return self.how.answers(
            self.loaded,
            prompts,
            outcome=self.outcome,
            intervention=intervention,
            cache=self.cache,
            progress=progress,
            **scoring,
        )


def with_mask(rows: pl.DataFrame, mask: Mapping[str, Any]) -> pl.DataFrame:
    """The answers with the columns that say under which mask they were given."""
    return rows.with_columns(pl.lit(mask[name], dtype=kind).alias(name) for name, kind in MASK_SCHEMA.items())


@contextmanager
def naming(mask: Mapping[str, Any], whose: str = "") -> Iterator[None]:
    """Put the mask in front of the message of an ExciseError."""
    try:
        yield
    except ExciseError as error:
        place = f"variation {mask['variation']}, {mask['strategy']} at level {mask['level']}"
        raise ExciseError(f"{whose}{place}: {error}") from error


def answers_under_masks(
    asking: Asking,
    prompts: pl.DataFrame,
    masks: pl.DataFrame,
    opened: Callable[[Mapping[str, Any]], Intervention],
    *,
    so_far: Callable[[int], None],
    whose: str = "",
    afterwards: Callable[[Mapping[str, Any], Intervention], None] | None = None,
) -> tuple[list[pl.DataFrame], Work]:
    """The answers to the prompts of every mask's variation under that mask, a frame a mask, and what they cost.

    masks: a row a mask, with the columns of MASK and `mask`. opened: the mask of a row. so_far: is told how many
    completions there are. afterwards: is called with the row and the mask when its answers are there. Raises
    ExciseError that names the mask.
    """
    frames, work, before = [], Work(), 0
    for row in masks.iter_rows(named=True):
        mask, asked = opened(row), prompts.filter(pl.col("variation") == row["variation"])
        with naming(row, whose):
            rows, cost = asking.answers(asked, mask, lambda _, done, __, before=before: so_far(before + done))
            if afterwards is not None:
                afterwards(row, mask)
        frames.append(with_mask(rows, row))
        work, before = work + cost, before + asked.height * asking.how.sample_count
    return frames, work


def completions_under(masks: pl.DataFrame, prompts: pl.DataFrame, samples: int) -> int:
    """How many completions there are of the prompts under the masks of their variations."""
    sizes = dict(prompts.group_by("variation").len().iter_rows())
    return samples * sum(sizes.get(variation, 0) for variation in masks["variation"])
