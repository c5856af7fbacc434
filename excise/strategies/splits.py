"""Masks made and judged again on another split of the names of the same answers.

A split only relabels the names of completions that are there; everything dear comes from the caches of scores, paths
and answers. What is kept of a split, and summed up over splits, is `excise.evaluation.stability`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import polars as pl

from excise.attribution import Answered, AttributionFile, attribute
from excise.conditions import ACROSS, RANDOM
from excise.evaluation.judged import judged_of
from excise.evaluation.scenario_metrics import Draws, compared_numbers
from excise.evaluation.stability import STABILITY_SCHEMA, kept
from excise.generation.answering import Answering, as_samples
from excise.generation.under_masks import Asking, with_mask
from excise.interventions.packed import Mask
from excise.progress import Progress, silent
from excise.scenarios.schema import Comparison, Scenario
from excise.scenarios.subsets import ATTRIBUTION, EVALUATION, held_out_split, without
from excise.strategies.build import Making, NamedMask, Paths, SourceMask, build_cross_context_masks, build_masks
from excise.strategies.config import MEASURED_PATH, Strategy
from excise.strategies.mask_rows import counted

Half = tuple[pl.DataFrame, pl.DataFrame]
"""Completions of some of the names, and their prompts."""


@dataclass(frozen=True)
class Split:
    """One more split of the names of a model's scenarios: its number, and the seed that draws its halves.

    asking: the model, and where its answers are kept. answered: the completions and prompts of a scenario, by key.
    folder: of attribution files.
    """

    number: int
    seed: int
    asking: Asking
    scenarios: Mapping[str, Scenario]
    answered: Callable[[str], Half]
    folder: Path
    progress: Progress = silent

    def labelled(self, key: str) -> Half:
        """A scenario's completions with the halves of this split, and their prompts."""
        completions, prompts = self.answered(key)
        halves = held_out_split(self.scenarios[key], prompts, self.seed)
        return completions.drop("split").join(halves, on="prompt_id", how="left", maintain_order="left"), prompts

    def learned(self, key: str) -> Half:
        """The half of a scenario's names that masks are made from."""
        return without(EVALUATION, *self.labelled(key))

    def attributed(self, key: str, scores: set[str]) -> list[AttributionFile]:
        """The scores of a scenario's answers, of the half that masks are made from."""
        learned, prompts = self.learned(key)
        answered = Answered(
            self.asking.loaded,
            prompts,
            as_samples(learned, Answering.of(learned).sample_count),
            cast(Comparison, self.scenarios[key].comparison),
            self.scenarios[key].outcome,
            seed=self.seed,
            cache=self.asking.cache,
        )
        return attribute(answered, sorted(scores), folder=self.folder, progress=self.progress)


def repeatable(strategies: Sequence[Strategy]) -> list[Strategy]:
    """The strategies whose masks are made anew for a split, with their random control alone."""
    return [
        strategy.model_copy(update={"controls": tuple(control for control in strategy.controls if control == RANDOM)})
        for strategy in strategies
        if not strategy.of_scenario
    ]


def repeated(strategies: Sequence[Strategy]) -> list[tuple[str, str]]:
    """Strategies and levels whose masks are made anew. Across contexts these are paths alone: other masks would need
    those of all scenarios for this split."""
    return [
        (strategy.key, level)
        for strategy in strategies
        for level in strategy.levels
        if level not in ACROSS or strategy.selection == MEASURED_PATH
    ]


def split_masks(
    split: Split,
    key: str,
    strategies: Sequence[Strategy],
    sources: Sequence[str],
    paths: Paths,
    store: Callable[[Mask], Path],
) -> Iterator[NamedMask]:
    """The masks of a scenario that a split makes. strategies: of `repeatable`. sources: keys of the scenarios that were
    asked, the scenario's own among them, for paths across contexts. store: as in `build_masks`."""
    files = split.attributed(key, {strategy.score for strategy in strategies})
    within = [_within(strategy) for strategy in strategies if set(strategy.levels) - set(ACROSS)]
    making = Making(random_draws=1, seed=split.seed, paths=paths, progress=split.progress)
    yield from build_masks(split.asking.loaded, within, files, making, scenario=key, store=store)
    across = [
        strategy
        for strategy in strategies
        if set(strategy.levels) & set(ACROSS) and strategy.selection == MEASURED_PATH
    ]
    lent = [
        SourceMask(source, file.variation, strategy.key, None, file.path)
        for strategy in across
        for source in sources
        for file in (files if source == key else split.attributed(source, {strategy.score}))
        if file.score == strategy.score
    ]
    variations = list(dict.fromkeys(file.variation for file in files))
    yield from build_cross_context_masks(across, lent, key, variations, making, per_source=False)


def judged_split(split: Split, key: str, masks: Iterator[NamedMask], draws: Draws, splits: int) -> pl.DataFrame:
    """The metrics of a split's masks on the half that judges them, one split of `splits`: rows of STABILITY_SCHEMA."""
    scenario = split.scenarios[key]
    completions, prompts = without(ATTRIBUTION, *split.labelled(key))
    able = judged_of(completions, scenario)
    made = [named for named in masks if named.variation in able]
    if not made:
        return pl.DataFrame(schema=STABILITY_SCHEMA)
    asking = replace(split.asking, how=Answering.of(completions), outcome=scenario.outcome)
    frames, counts = [], []
    for number, named in enumerate(made):
        rows, _ = asking.answers(prompts.filter(pl.col("variation") == named.variation), named.mask)
        frames.append(with_mask(rows, {**vars(named), "mask": named.mask.fingerprint}))
        counts += counted(named)
        split.progress(f"split {split.number}: pruned completions", number + 1, len(made))
    known = {"model": pl.lit(asking.loaded.key), "scenario": pl.lit(key)}
    table = pl.DataFrame(counts, infer_schema_length=None).with_columns(pl.col("matched_to").cast(pl.String), **known)
    metrics = compared_numbers(
        completions.filter(pl.col("variation").is_in(able)), pl.concat(frames), table, scenario, draws
    )
    return kept(metrics, split.number, splits)


def _within(strategy: Strategy) -> Strategy:
    return strategy.model_copy(update={"levels": tuple(level for level in strategy.levels if level not in ACROSS)})
