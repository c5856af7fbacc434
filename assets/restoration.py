"""The stage `restoration`: does a mask bring a model back to what it was before a bias was put in, and nothing else?

The model's own answers are those of `completions` and `pruned_completions`. Its reference
(`excise.models.specs.reference_of`) is asked the same prompts here, unpruned and under every strategy's own masks and
their first random control. Only one model is in memory at a time. What is estimated is in
`excise.evaluation.restoration`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import dagster as dg
import polars as pl

from assets.completions import completions_of, without
from assets.evaluation_metrics import pruned_answers
from assets.mask_definitions import with_definitions
from assets.partitions import Catalogue
from assets.pruned_completions import own_and_first_random
from assets.stage import data_version, grid_asset, nothing_to_tell, table_metadata
from excise.conditions import CROSS_CONTEXT, MASK
from excise.errors import ExciseError
from excise.evaluation.judged import compared_groups, judged_of
from excise.models.specs import ModelSpec, reference_of
from excise.scenarios import Scenario
from excise.scenarios.subsets import ATTRIBUTION
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch


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
    def restoration(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.evaluation import restoration as r
        from excise.generation.answering import Answering
        from excise.reporting.restoration import restoration_markdown

        model, scenario = catalogue.partition(context)
        audit, place = catalogue.audit_of(settings, scenario), {"model": model, "scenario": scenario.key}
        reference = reference_of(model, catalogue.models)

        nothing = partial(nothing_to_tell, warehouse, "restoration", place, under="restoration")
        if reference is None:
            return nothing(
                f"{model} has no reference to be restored to: name in models.yaml the model that it was before a bias "
                "was put in (reference: its key), if there is one."
            )
        if scenario.outcome.kind != "number":
            return nothing("Restoration is told of scenarios whose answers are numbers.")
        everything, asked = completions_of(warehouse, model, scenario.key)
        completions, prompts = without(ATTRIBUTION, everything, asked)
        pruned, masks = pruned_answers(warehouse, model, scenario, everything, completions)
        judged = pl.col("variation").is_in(judged_of(completions, scenario))
        how = Answering.of(completions)
        completions, prompts = completions.filter(judged), prompts.filter(judged)
        if completions.is_empty():
            return nothing("No variation can be judged (check judged_variations of completions).")
        own, edited, told = _asked(
            reference,
            _masks_for_reference(pruned, masks),
            completions,
            prompts,
            scenario,
            how,
            catalogue.models,
            artifacts,
            gpu,
            watch,
            context,
        )
        rows = r.restoration(
            completions,
            pruned,
            own,
            edited,
            groups=compared_groups(scenario),
            log=scenario.outcome.scale == "log",
            resamples=audit.resamples,
            seed=audit.seed,
        )
        rows = with_definitions(rows, masks)
        warehouse.replace_partition("restoration", rows, place)
        # What masks of single other scenarios do is left to the table.
        shown = rows.filter(~pl.col("level").str.starts_with(f"{CROSS_CONTEXT}/"))
        return dg.MaterializeResult(
            metadata={"restoration": dg.MetadataValue.md(restoration_markdown(shown))}
            | told
            | table_metadata("restoration", rows),
            data_version=data_version(told["model_fingerprint"], rows),
        )

    return restoration


def _masks_for_reference(pruned: pl.DataFrame, masks: pl.DataFrame) -> pl.DataFrame:
    """The masks that the reference is asked under, one row each: those of strategies, and the first random control of
    each, as far as the model itself was asked under them. Those that share a file follow each other."""
    named = [*MASK, "mask"]
    found = (
        pruned.select(named).unique().join(masks.select(*named, "path", "asset").unique(), on=named, nulls_equal=True)
    )
    return own_and_first_random(found).sort("path", *named)


def _asked(
    reference: ModelSpec,
    masks: pl.DataFrame,
    completions: pl.DataFrame,
    prompts: pl.DataFrame,
    scenario: Scenario,
    how: Any,
    models: Mapping[str, ModelSpec],
    artifacts: Artifacts,
    gpu: GPUResource,
    watch: RunWatch,
    context: dg.AssetExecutionContext,
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, Any]]:
    """The reference's answers to the prompts, unpruned and under masks, and what they cost as metadata.

    Raises ExciseError, before any answer is drawn, where the reference reads the prompts otherwise than the model did.
    """
    from excise.generation.completions import CompletionCache
    from excise.interventions.masks import Mask
    from excise.models.encoding import encode
    from excise.reporting.words import reuse_sentence

    model, progress = completions["model"][0], watch.progress(context)
    sizes = dict(prompts.group_by("variation").len().iter_rows())
    total = (prompts.height + sum(sizes[variation] for variation in masks["variation"])) * how.samples
    answers = {"outcome": scenario.outcome, "cache": CompletionCache(artifacts.completion_cache)}
    frames, before, opened = [], 0, (None, None)

    def so_far(_: str, done: int, __: int) -> None:
        progress("answers of the reference", before + done, total)

    with gpu.model(reference.key, {**models, reference.key: reference}, stage=watch.stage(context)) as loaded:
        then = dict(completions.select("prompt_id", "prompt_hash").unique().iter_rows())
        for prompt in encode(loaded.asked_for(scenario.outcome), prompts):
            if then[prompt.prompt_id] != prompt.hash:
                raise ExciseError(
                    f"scenario {scenario.key}: {reference.key}, the reference of {model}, reads prompt "
                    f"{prompt.prompt_id} otherwise than {model} did, so answers tell no difference of weights; name in "
                    f"models.yaml: {model}.reference a model with the same tokenizer and chat template, or false"
                )
        own, work = how.answers(loaded, prompts, progress=so_far, **answers)
        before += prompts.height * how.samples
        for row in masks.iter_rows(named=True):
            if opened[0] != row["path"]:
                opened = row["path"], Mask.load(artifacts.locate(row["path"], made_by=row["asset"]))
            try:
                asked = prompts.filter(pl.col("variation") == row["variation"])
                frame, done = how.answers(loaded, asked, mask=opened[1], progress=so_far, **answers)
            except ExciseError as error:
                raise ExciseError(
                    f"reference {reference.key}, variation {row['variation']}, {row['strategy']} at level "
                    f"{row['level']}: {error}"
                ) from error
            kinds = TABLES["pruned_completions"].schema
            named = [pl.lit(row[name], dtype=kinds[name]).alias(name) for name in (*MASK[1:], "mask")]
            frames.append(frame.with_columns(named))
            work, before = work + done, before + asked.height * how.samples
        device = gpu.report(loaded)
    edited = pl.concat(frames) if frames else pl.DataFrame(schema=TABLES["pruned_completions"].schema)
    told = {"reference": reference.key, "reuse": reuse_sentence(work.drawn, work.reused), "masks": masks.height}
    return own, edited, told | work.metadata() | device
