"""Masks tried on a text and on scenarios they were not made for: which prompts are asked, and the rows of the effects.

What an effect is, and how it is estimated, is `side_effects`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import polars as pl

from excise.errors import ExciseError
from excise.evaluation import side_effects as s
from excise.evaluation.perplexity import Mode, Window
from excise.generation.completions import Work
from excise.generation.under_masks import Asking
from excise.models.encoding import encode
from excise.progress import Progress
from excise.scenarios.schema import Scenario
from excise.scenarios.subsets import ATTRIBUTION

if TYPE_CHECKING:
    from excise.interventions.protocol import Intervention

LABEL = "side effects"


@dataclass(frozen=True)
class Trial:
    """What masks are tried on. targets: other scenarios, and the prompts of them that are asked; text: windows and how
    they were cut. resamples, seed: of the intervals."""

    targets: Sequence[tuple[Scenario, pl.DataFrame]]
    windows: Sequence[Window]
    mode: Mode
    resamples: int
    seed: int

    @property
    def names(self) -> list[str]:
        """The targets as the table names them."""
        return [s.TEXT, *(s.target_name(prompts) for _, prompts in self.targets)]


def targets_of(
    asking: Asking, completions: pl.DataFrame, others: Sequence[Scenario], names: int, *, required: bool
) -> tuple[list[tuple[Scenario, pl.DataFrame]], list[str]]:
    """The scenarios that the model can be asked, with their prompts, and a line for each that it cannot.

    completions: those of the scenario that the masks are made for. names: per group. required: whether one that cannot
    be asked is an ExciseError.
    """
    subjects = max(completions.group_by("group").agg(pl.col("subject").n_unique())["subject"].to_list())
    held_out = ATTRIBUTION in set(completions["split"])
    targets, left_out = [], []
    for other in others:
        try:
            prompts = s.target_prompts(
                other,
                names=names,
                subjects_per_group=subjects,
                held_out=held_out,
                seed=asking.how.parameters.seed,
            )
            encode(asking.loaded.asked_for(other.outcome), prompts, new_tokens=other.outcome.answer_tokens(None))
        except ExciseError as error:
            if required:
                raise ExciseError(f"resources.settings.config.side_effect_scenarios: {other.key}: {error}") from error
            left_out.append(f"{other.key}: {error}")
        else:
            targets.append((other, prompts))
    return targets, left_out


def tried(
    asking: Asking,
    masks: pl.DataFrame,
    opened: Callable[[Mapping[str, Any]], Intervention],
    trial: Trial,
    progress: Progress,
) -> tuple[pl.DataFrame, Work]:
    """The effects of every mask, rows of EFFECT_SCHEMA, and what the answers cost.

    masks: a row per distinct mask. opened: the mask of a row. Raises ExciseError that names the mask.
    """
    work, before, samples = Work(), 0, asking.how.sample_count
    total = sum(prompts.height for _, prompts in trial.targets) * samples * (1 + masks.height)
    text, drawn = s.text_unpruned(asking.loaded, trial.windows), {"resamples": trial.resamples, "seed": trial.seed}

    def answers(other: Scenario, prompts: pl.DataFrame, mask: Intervention | None) -> pl.DataFrame:
        nonlocal before, work
        rows, cost = replace(asking, outcome=other.outcome).answers(
            prompts, mask, lambda _, done, __: progress(LABEL, before + done, total)
        )
        before, work = before + prompts.height * samples, work + cost
        return rows

    unpruned = {other.key: answers(other, prompts, None) for other, prompts in trial.targets}
    pruned: dict[str, dict[str, pl.DataFrame]] = {other.key: {} for other, _ in trial.targets}
    frames = []
    for row in masks.iter_rows(named=True):
        mask = opened(row)
        try:
            effect = s.text_effect(asking.loaded, text, mask, mode=trial.mode, **drawn)
            for other, prompts in trial.targets:
                pruned[other.key][row["mask"]] = answers(other, prompts, mask)
        except ExciseError as error:
            raise ExciseError(
                f"side effects of {row['strategy']} at level {row['level']}, variation {row['variation']}: {error}"
            ) from error
        frames.append(s.text_rows(row["mask"], effect, len(trial.windows)))
    frames += [s.scenario_effects(unpruned[other.key], pruned[other.key], other, **drawn) for other, _ in trial.targets]
    return pl.concat(frames), work
