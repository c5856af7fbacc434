"""The stage `pruned_completions`: what the model answers under every mask.

Prompts, samples, parameters and noise are those of `completions`, so pruned and unpruned answers come in pairs. Names
that masks were made from are not asked, where names are held out.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.answer_checks import completions_complete_and_balanced
from assets.asking import asking_of, scorer_of, windows_of
from assets.checks import Outcome
from assets.metadata import cost
from assets.partitions import Catalogue
from assets.stage import Step, grid_asset
from assets.upstream import completions_of, mask_opener, masks_to_ask, require_same_model, require_same_prompts
from excise.conditions import MASK
from excise.evaluation.judged import judged_of
from excise.scenarios.subsets import ATTRIBUTION, without
from resources.tables import TABLES

if TYPE_CHECKING:
    import numpy as np

    from excise.evaluation.perplexity import Window
    from excise.interventions.protocol import Intervention
    from excise.models.loading import LoadedModel
    from excise.outcomes.scorers import Scorer


def pruned_completions_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Samples the model under every mask of the partition."""

    @grid_asset(
        catalogue,
        group="pruning",
        kinds={"torch", "duckdb"},
        description="What the model answers to the same prompts under every mask, with the same noise as unpruned.",
        deps=["completions", "pruning_masks", "cross_context_masks"],
        checks=["completions_complete_and_balanced"],
        uses_model=True,
        code_version="3",
    )
    def pruned_completions(step: Step) -> dg.MaterializeResult:
        everything, every_prompt = completions_of(step.warehouse, step.model, step.scenario.key)
        completions, prompts = without(ATTRIBUTION, everything, every_prompt)
        masks = masks_to_ask(step.warehouse, step.model, step.scenario, everything)
        scorer = scorer_of(step.catalogue, step.scenario)
        rows, perplexities, metadata = _asked(step, completions, prompts, masks, scorer)
        step.store("perplexity", perplexities)
        step.store("pruned_completions", rows)
        wanted, samples = prompts.join(masks.select(MASK), on="variation"), _samples(completions)
        complete = completions_complete_and_balanced(rows, wanted, samples, masked=True, balanced=scorer is None)
        outcome = complete if masks.height else _none(complete)
        metadata |= _left_out(completions, judged_of(completions, step.scenario)) | {"masks": masks.height}
        return step.result("pruned_completions", metadata, metadata["model_fingerprint"], rows, outcomes=[outcome])

    return pruned_completions


def _asked(
    step: Step, completions: pl.DataFrame, prompts: pl.DataFrame, masks: pl.DataFrame, scorer: "Scorer | None"
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, Any]]:
    """The answers under every mask, the text's perplexity where continuations are judged, and metadata of both."""
    from excise.generation.answering import Answering
    from excise.generation.under_masks import answers_under_masks

    how, opened = Answering.of(completions), mask_opener(step.artifacts)
    with step.loaded() as loaded:
        require_same_model(completions, loaded, step.scenario.key)
        require_same_prompts(completions, prompts, loaded, step.scenario)
        windows = windows_of(loaded, step.audit) if scorer else []
        losses, measure = _losses(step, loaded, windows)
        asking, so_far = asking_of(step, loaded, how, scorer), _watched(step, masks, prompts, how.sample_count)
        frames, work = answers_under_masks(asking, prompts, masks, opened, so_far=so_far, afterwards=measure)
        device = step.gpu.report(loaded)
    rows = pl.concat(frames) if frames else pl.DataFrame(schema=TABLES["pruned_completions"].schema)
    return rows, _perplexities(step, losses, windows), cost(work) | device


def _samples(completions: pl.DataFrame) -> int:
    """How many samples a prompt has; of enumerated answers, one that rambles."""
    from excise.generation.answering import Answering

    return Answering.of(completions).samples


def _watched(step: Step, masks: pl.DataFrame, prompts: pl.DataFrame, samples: int) -> Callable[[int], None]:
    """Returns the function that reports how many completions under masks there are."""
    from excise.generation.under_masks import completions_under

    progress, total = step.progress, completions_under(masks, prompts, samples)
    return lambda done: progress("pruned completions", done, total)


def _losses(
    step: Step, loaded: "LoadedModel", windows: list["Window"]
) -> tuple[dict[str, "np.ndarray"], Callable[[Mapping[str, Any], "Intervention"], None]]:
    """Losses of the text's windows by mask, those of the unpruned model so far, and what adds those under a mask.

    Without windows there are none.
    """
    from excise.evaluation.perplexity import LossCache
    from excise.generation.completions import UNPRUNED

    known = LossCache(step.artifacts.tensors("perplexity"))
    losses = {UNPRUNED: known.window_losses(loaded, windows)} if windows else {}

    def measure(row: Mapping[str, Any], intervention: "Intervention") -> None:
        if windows and row["mask"] not in losses:
            losses[row["mask"]] = known.window_losses(loaded, windows, intervention)

    return losses, measure


def _perplexities(step: Step, losses: Mapping[str, "np.ndarray"], windows: list["Window"]) -> pl.DataFrame:
    """Rows of the table `perplexity`."""
    from excise.evaluation.perplexity_table import perplexity_rows

    audit = step.audit
    drawn = {"resamples": audit.resamples, "seed": audit.seed}
    rows = perplexity_rows(losses, windows, audit.perplexity_mode, audit.text or "built-in", **drawn)
    return rows.with_columns(**{name: pl.lit(key) for name, key in step.place.items()})


def _none(outcome: Outcome) -> Outcome:
    """The outcome where no mask is asked: nothing lacks."""
    why = (
        "There are no masks: either no variation can be judged (judged_variations of completions), or no "
        "mask was found (mask_density of pruning_masks)."
    )
    return replace(outcome, passed=True, message=why, unmet=())


def _left_out(completions: pl.DataFrame, judged: list[str]) -> dict[str, str]:
    """Metadata that names the variations that are not asked under masks."""
    left_out = sorted(set(completions["variation"]) - set(judged))
    return {"not_judged": ", ".join(left_out)} if left_out else {}
