"""The heads of a model measured about one scenario: impacts and the baselines' scores, side by side.

What an impact is, and how it is estimated, is `head_impacts`; scores of the weights alone are `head_scores`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl

from excise.attribution.head_impacts import Compared, Removal, Sampled, head_impacts
from excise.attribution.head_scores import head_gradient, head_magnitude
from excise.evaluation.judged import compared_groups
from excise.generation.answering import as_samples
from excise.generation.under_masks import Asking

if TYPE_CHECKING:
    from collections.abc import Sequence

    from excise.evaluation.perplexity import Window
    from excise.interventions.protocol import Intervention
    from excise.models.loading import LoadedModel
    from excise.scenarios.schema import Scenario


def impacts_on(
    asking: Asking,
    learned: tuple[pl.DataFrame, pl.DataFrame],
    scenario: Scenario,
    removal: Removal,
    *,
    resamples: int,
    seed: int = 0,
    **options: Any,
) -> pl.DataFrame:
    """The heads' impacts on a scenario's disparity, rows of `head_impacts.SCHEMA`.

    learned: the completions that masks may be made from, enumerated or sampled, and their prompts. removal: its
    `regenerate` is that of `asking`. resamples, seed: as in `Compared`. options: text, heads, folder and progress, as
    `head_impacts` takes them.
    """
    completions, prompts = learned

    def regenerate(intervention: Intervention) -> pl.DataFrame:
        rows, _ = asking.answers(prompts, intervention)
        return as_samples(rows, asking.how.sample_count)

    samples = as_samples(completions, asking.how.sample_count)
    sampled = Sampled(asking.loaded.asked_for(asking.outcome), prompts, samples, asking.how.parameters)
    outcome, groups = scenario.outcome, compared_groups(scenario)
    compared = Compared(outcome.disparity, groups, outcome.cluster, resamples=resamples, seed=seed)
    return head_impacts(sampled, compared, removal=replace(removal, regenerate=regenerate), **options)


def with_baselines(impacts: pl.DataFrame, loaded: LoadedModel, windows: Sequence[Window]) -> pl.DataFrame:
    """The heads' rows with `magnitude` and `gradient`, the scores of FASP's baselines. windows: of a text."""
    magnitude, gradient = head_magnitude(loaded), head_gradient(loaded, windows)
    heads = impacts.select("layer", "head").rows()
    return impacts.with_columns(
        magnitude=pl.Series([float(magnitude[head]) for head in heads]),
        gradient=pl.Series([float(gradient[head]) for head in heads]),
    )
