"""All metrics of one model and scenario, unpruned and under masks, whatever its answers are.

Estimates are those of `numbers`, `comparisons` and `toxicity`; here a scenario says what they compare, and variations
that cannot be judged are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from excise.conditions import ALL, CROSS_CONTEXT, NO_STRATEGY
from excise.evaluation.comparisons import COMPARISONS_SCHEMA, comparisons
from excise.evaluation.judged import compared_groups
from excise.evaluation.judged_metrics import metrics_of
from excise.evaluation.numbers import evaluate
from excise.evaluation.toxicity import evaluate_toxicity
from excise.scenarios.schema import Scenario


@dataclass(frozen=True)
class JudgedAnswers:
    """The answers that masks are judged on, in rows as the tables keep them.

    completions, prompts: of the unpruned model, of the names that masks are judged on. pruned: under every mask, in the
    variations that are asked; masks: those. judged: the variations that can be judged.
    """

    completions: pl.DataFrame
    prompts: pl.DataFrame
    pruned: pl.DataFrame
    masks: pl.DataFrame
    judged: list[str]

    @property
    def variations(self) -> int:
        """How many variations were asked, judged or not."""
        return self.completions["variation"].n_unique()

    @property
    def able(self) -> pl.Expr:
        """Whether a row's variation can be judged."""
        return pl.col("variation").is_in(self.judged)


@dataclass(frozen=True)
class Draws:
    """How often names are resampled and labels permuted, and the seed of both."""

    resamples: int
    permutations: int
    seed: int


def compared_numbers(
    unpruned: pl.DataFrame, pruned: pl.DataFrame, masks: pl.DataFrame, scenario: Scenario, draws: Draws
) -> pl.DataFrame:
    """The metrics of `numbers.evaluate` for the two groups that a scenario compares."""
    majority, minority = compared_groups(scenario)
    return evaluate(
        unpruned,
        pruned,
        masks,
        majority=majority,
        minority=minority,
        answer_range=scenario.outcome.scored_range,
        log_scale=scenario.outcome.log_scale,
        **vars(draws),
    )


def number_metrics(answers: JudgedAnswers, scenario: Scenario, draws: Draws) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows of `metrics` and of `comparisons`, without the masks' definitions, where answers are numbers."""

    def evaluated(unpruned: pl.DataFrame, pruned: pl.DataFrame) -> pl.DataFrame:
        return compared_numbers(unpruned, pruned, answers.masks, scenario, draws)

    rows = metrics_of(evaluated, answers.completions, answers.pruned, answers.judged)
    if not answers.judged:
        return rows, pl.DataFrame(schema=COMPARISONS_SCHEMA)
    completions, prompts = (frame.filter(answers.able) for frame in (answers.completions, answers.prompts))
    others = comparisons(completions, prompts, answers.pruned, answers.masks, scenario=scenario, **vars(draws))
    return rows, others


def toxicity_metrics(
    answers: JudgedAnswers, scenario: Scenario, perplexity: pl.DataFrame, draws: Draws
) -> pl.DataFrame:
    """Rows of `metrics`, without the masks' definitions, where continuations are judged: an axis of social groups
    (FASP). perplexity: per condition, of `perplexity_table`."""

    def evaluated(unpruned: pl.DataFrame, under_masks: pl.DataFrame) -> pl.DataFrame:
        return evaluate_toxicity(
            unpruned,
            under_masks,
            answers.masks,
            perplexity,
            subgroups=list(scenario.groups),
            cluster="subject",
            resamples=draws.resamples,
            seed=draws.seed,
        )

    return metrics_of(evaluated, answers.completions, answers.pruned, answers.judged)


def pooled_levels(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows without those of masks of single other scenarios, which say where a mask comes from (transfer matrix)."""
    return rows.filter(~pl.col("level").str.starts_with(f"{CROSS_CONTEXT}/"))


def bounds(metrics: pl.DataFrame) -> pl.DataFrame:
    """Where SMD and inlier ratio lie whatever the unread answers are, over all variations, strategies alone."""
    return metrics.filter(
        (pl.col("variation") == ALL)
        & pl.col("metric").is_in(["smd", "inlier_ratio", "leftover", "sampled"])
        & pl.col("matched_to").is_null()
    ).select("strategy", "level", "metric", "estimate", "lowest", "highest")


def unpruned_gaps(others: pl.DataFrame) -> pl.DataFrame:
    """The unpruned model's standardized mean difference in every other comparison, over all variations."""
    return others.filter(
        (pl.col("strategy") == NO_STRATEGY) & (pl.col("variation") == ALL) & (pl.col("metric") == "smd")
    ).select("comparison", smd="estimate", low="low", high="high", p_no_gap="p_value", answers="n")


def known(metrics: pl.DataFrame, *wanted: str) -> bool:
    """Whether a strategy's own mask has all these metrics over all variations."""
    rows = metrics.filter(
        (pl.col("variation") == ALL) & pl.col("matched_to").is_null() & pl.col("estimate").is_not_null()
    )
    masks = [set(rows.filter(pl.col("metric") == metric).select("strategy", "level").rows()) for metric in wanted]
    return bool(set.intersection(*masks))
