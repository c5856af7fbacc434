"""The stage `restoration`: does a mask bring a model back to what it was before a bias was put in, and nothing else?

The model's own answers are those of `completions` and `pruned_completions`. Its reference
(`excise.models.specs.reference_of`) is asked the same prompts here, unpruned and under every strategy's own masks and
their first random control. Only one model is in memory at a time. What is estimated is in
`excise.evaluation.restoration`.
"""

from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.asking import asking_of
from assets.mask_definitions import with_definitions
from assets.metadata import cost
from assets.partitions import Catalogue
from assets.stage import Step, grid_asset
from assets.upstream import judged_answers, mask_opener, own_and_first_random
from excise.conditions import MASK
from excise.errors import ExciseError
from excise.evaluation.judged import compared_groups
from excise.models.specs import ModelSpec, reference_of
from resources.tables import TABLES

if TYPE_CHECKING:
    from excise.evaluation.scenario_metrics import JudgedAnswers
    from excise.models.loading import LoadedModel


def restoration_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Compares edited models with their reference, and the reference with itself under the same masks."""

    @grid_asset(
        catalogue,
        group="evaluation",
        kinds={"torch", "scipy", "duckdb"},
        description="How far every mask brings the answers back to those of the model's reference, the model it was "
        "before a bias was put in, and how far the same mask moves the reference itself. Empty without a reference.",
        deps=["completions", "pruning_masks", "cross_context_masks", "pruned_completions"],
        uses_model=True,
    )
    def restoration(step: Step) -> dg.MaterializeResult:
        from excise.evaluation.scenario_metrics import pooled_levels
        from excise.reporting.restoration import restoration_markdown

        if (why := _nothing_to_restore(step)) is not None:
            return step.nothing(why, under="restoration")
        answers = judged_answers(step.warehouse, step.model, step.scenario)
        if not answers.judged:
            return step.nothing(
                "No variation can be judged (check judged_variations of completions).", under="restoration"
            )
        unpruned, edited, costs = _asked(step, answers)
        rows = with_definitions(_restored(step, answers, unpruned, edited), answers.masks)
        step.store("restoration", rows)
        metadata = {"restoration": dg.MetadataValue.md(restoration_markdown(pooled_levels(rows))), **costs}
        return step.result("restoration", metadata, costs["model_fingerprint"], rows)

    return restoration


def _nothing_to_restore(step: Step) -> str | None:
    """Why there is nothing to tell of a partition, whatever was answered."""
    if reference_of(step.model, step.catalogue.models) is None:
        return (
            f"{step.model} has no reference to be restored to: name in models.yaml the model that it was before a bias "
            "was put in (reference: its key), if there is one."
        )
    if not step.scenario.outcome.pairwise:
        return "Restoration is told of scenarios whose answers are numbers."
    return None


def _restored(step: Step, answers: "JudgedAnswers", unpruned: pl.DataFrame, edited: pl.DataFrame) -> pl.DataFrame:
    """How far masks bring the model back. unpruned, edited: the reference's answers, unpruned and under masks."""
    from excise.evaluation.restoration import restoration

    return restoration(
        answers.completions.filter(answers.able),
        answers.pruned,
        unpruned,
        edited,
        groups=compared_groups(step.scenario),
        log=step.scenario.outcome.log_scale,
        resamples=step.audit.resamples,
        seed=step.audit.seed,
    )


def _masks_for_reference(answers: "JudgedAnswers") -> pl.DataFrame:
    """The masks that the reference is asked under, one row each: those of strategies, and the first random control of
    each, as far as the model itself was asked under them. Those that share a file follow each other."""
    named = [*MASK, "mask"]
    files = answers.masks.select(*named, "path", "control_seed", "asset").unique()
    asked = answers.pruned.select(named).unique().join(files, on=named, nulls_equal=True)
    return own_and_first_random(asked).sort("mask", *named)


def _asked(step: Step, answers: "JudgedAnswers") -> tuple[pl.DataFrame, pl.DataFrame, dict[str, Any]]:
    """The reference's answers to the prompts, unpruned and under masks, and what they cost as metadata.

    Raises ExciseError, before any answer is drawn, where the reference reads the prompts otherwise than the model did.
    """
    from excise.generation.answering import Answering
    from excise.generation.under_masks import answers_under_masks, completions_under

    reference, models = reference_of(step.model, step.catalogue.models), step.catalogue.models
    completions, prompts = answers.completions.filter(answers.able), answers.prompts.filter(answers.able)
    how, masks, progress = Answering.of(answers.completions), _masks_for_reference(answers), step.progress
    alone = prompts.height * how.sample_count
    total = alone + completions_under(masks, prompts, how.sample_count)

    def so_far(done: int) -> None:
        progress("answers of the reference", done, total)

    registry = {**models, reference.key: reference}
    with step.gpu.model(reference.key, registry, stage=step.watch.stage(step.context)) as loaded:
        _require_same_reading(step, reference, loaded, completions, prompts)
        asking, opened = asking_of(step, loaded, how), mask_opener(step.artifacts)
        unpruned, work = asking.answers(prompts, progress=lambda _, done, __: so_far(done))
        frames, more = answers_under_masks(
            asking,
            prompts,
            masks,
            opened,
            so_far=lambda done: so_far(alone + done),
            whose=f"reference {reference.key}, ",
        )
        device = step.gpu.report(loaded)
    edited = pl.concat(frames) if frames else pl.DataFrame(schema=TABLES["pruned_completions"].schema)
    return unpruned, edited, {"reference": reference.key, "masks": masks.height} | cost(work + more) | device


def _require_same_reading(
    step: Step, reference: ModelSpec, loaded: "LoadedModel", completions: pl.DataFrame, prompts: pl.DataFrame
) -> None:
    """Raise ExciseError where the reference reads a prompt otherwise than the model did."""
    from excise.models.encoding import encode

    then = dict(completions.select("prompt_id", "prompt_hash").unique().iter_rows())
    for prompt in encode(loaded.asked_for(step.scenario.outcome), prompts):
        if then[prompt.prompt_id] != prompt.hash:
            raise ExciseError(
                f"scenario {step.scenario.key}: {reference.key}, the reference of {step.model}, reads prompt "
                f"{prompt.prompt_id} otherwise than {step.model} did, so answers tell no difference of weights; name "
                f"in models.yaml: {step.model}.reference a model with the same tokenizer and chat template, or false"
            )
