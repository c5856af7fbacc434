"""The stage `side_effects`: what masks do to plain text, and to scenarios they were not made for.

Every strategy's own masks and the first random control of each are tried, each distinct mask once. What is measured is
in `excise.evaluation.side_effects`; which scenarios, the settings say.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import dagster as dg
import polars as pl

from assets.completions import completions_of, require_same_model
from assets.partitions import Catalogue
from assets.pruned_completions import masks_to_ask, own_and_first_random
from assets.stage import data_version, grid_asset, nothing_to_tell, table_metadata
from excise.conditions import CROSS_CONTEXT, MASK, PLACE
from excise.errors import ExciseError
from excise.scenarios import Scenario
from excise.scenarios.subsets import ATTRIBUTION
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import Audit, AuditSettings
from resources.warehouse import Warehouse
from resources.watch import RunWatch


def side_effects_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Tries masks on a text and on other scenarios."""

    @grid_asset(
        catalogue,
        group="evaluation",
        kinds={"torch", "scipy", "duckdb"},
        description="What every strategy's mask and its first random control do to plain text (divergence of the "
        "next-token distributions, perplexity) and to the answers in scenarios that they were not made for.",
        deps=["completions", "pruning_masks", "cross_context_masks", "pruned_completions"],
        uses_model=True,
        code_version="2",
    )
    def side_effects(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.evaluation import side_effects as s
        from excise.reporting.side_effects import side_effects_markdown

        model, scenario = catalogue.partition(context)
        audit, place = catalogue.audit_of(settings, scenario), {"model": model, "scenario": scenario.key}

        nothing = partial(nothing_to_tell, warehouse, "side_effects", place, under="side_effects")
        if scenario.outcome.kind != "number":
            return nothing("Side effects are told of masks made in scenarios whose answers are numbers.")
        completions, _ = completions_of(warehouse, model, scenario.key)
        masks = _masks_to_try(masks_to_ask(warehouse, model, scenario, completions))
        if masks.is_empty():
            return nothing("There are no masks whose side effects could be measured.")
        others = [catalogue.scenario(key) for key in audit.side_effect_scenarios]
        named = settings.side_effect_scenarios is not None
        effects, told = _measured(masks, completions, others, named, audit, catalogue, artifacts, gpu, watch, context)
        rows = s.of_masks(effects, masks.with_columns(**{key: pl.lit(value) for key, value in place.items()}))
        warehouse.replace_partition("side_effects", rows, place)
        return dg.MaterializeResult(
            metadata={"side_effects": dg.MetadataValue.md(side_effects_markdown(rows))}
            | told
            | table_metadata("side_effects", rows),
            data_version=data_version(told["model_fingerprint"], rows),
        )

    return side_effects


def side_effects_of(warehouse: Warehouse, model: str, scenario: str, masks: pl.DataFrame) -> pl.DataFrame:
    """A partition's rows of `side_effects`; empty where nothing was measured.

    masks: the partition's, of the table of that name. Raises ExciseError where others were tried.
    """
    rows, named = warehouse.read("side_effects", model=model, scenario=scenario), [*PLACE, "mask"]
    changed = rows.select(named).unique().join(masks.select(named).unique(), on=named, how="anti", nulls_equal=True)
    if not changed.is_empty():
        raise ExciseError(
            f"the side effects of {model}|{scenario} were measured under masks of "
            f"{', '.join(sorted(set(changed['strategy'])))} that have changed since; materialize side_effects of this "
            "partition again"
        )
    return rows


def _masks_to_try(masks: pl.DataFrame) -> pl.DataFrame:
    """Of the masks that are asked, those of strategies and the first random control of each, one row each. Masks of
    single other scenarios are left out: they tell where a mask comes from."""
    pooled = ~pl.col("level").str.starts_with(f"{CROSS_CONTEXT}/")
    return own_and_first_random(masks).filter(pooled).sort("path", *MASK)


def _measured(
    masks: pl.DataFrame,
    completions: pl.DataFrame,
    others: Sequence[Scenario],
    named: bool,
    audit: Audit,
    catalogue: Catalogue,
    artifacts: Artifacts,
    gpu: GPUResource,
    watch: RunWatch,
    context: dg.AssetExecutionContext,
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The effects of every distinct mask, and what they cost as metadata.

    named: whether the settings name the other scenarios. Otherwise one that the model cannot be asked is left out, and
    the metadata say why.
    """
    from excise.evaluation import side_effects as s
    from excise.evaluation.perplexity import read_text
    from excise.generation.answering import Answering
    from excise.generation.completions import CompletionCache, Work
    from excise.interventions.masks import Mask
    from excise.reporting.words import reuse_sentence

    how, model, progress = Answering.of(completions), completions["model"][0], watch.progress(context)
    drawn = {"resamples": audit.resamples, "seed": audit.seed}
    distinct = masks.unique("mask", keep="first", maintain_order=True)
    before, work, frames = 0, Work(), []

    def so_far(_: str, done: int, __: int) -> None:
        progress("side effects", before + done, total)

    with gpu.model(model, catalogue.models, stage=watch.stage(context)) as loaded:
        require_same_model(completions, loaded.fingerprint, model, completions["scenario"][0])
        windows = s.effect_windows(
            loaded,
            read_text(audit.text),
            mode=audit.perplexity_mode,
            size=audit.text_window,
            stride=audit.text_stride,
            limit_tokens=audit.text_tokens,
        )
        text = s.text_unpruned(loaded, windows)
        asked, left_out = _prompts(loaded, completions, others, named, how, audit)
        total = sum(prompts.height for _, prompts in asked) * how.samples * (1 + distinct.height)
        cache = CompletionCache(artifacts.completion_cache)

        def answers(other: Scenario, prompts: pl.DataFrame, mask: Mask | None) -> pl.DataFrame:
            nonlocal before, work
            found, cost = how.answers(loaded, prompts, outcome=other.outcome, mask=mask, cache=cache, progress=so_far)
            before, work = before + prompts.height * how.samples, work + cost
            return found

        unpruned = {other.key: answers(other, prompts, None) for other, prompts in asked}
        pruned: dict[str, dict[str, pl.DataFrame]] = {other.key: {} for other, _ in asked}
        for row in distinct.iter_rows(named=True):
            mask = Mask.load(artifacts.locate(row["path"], made_by=row["asset"]))
            try:
                found = s.text_effect(loaded, text, mask, mode=audit.perplexity_mode, **drawn)
                for other, prompts in asked:
                    pruned[other.key][row["mask"]] = answers(other, prompts, mask)
            except ExciseError as error:
                raise ExciseError(
                    f"side effects of {row['strategy']} at level {row['level']}, variation {row['variation']}: {error}"
                ) from error
            frames.append(s.text_rows(row["mask"], found, len(windows)))
        device = gpu.report(loaded)
    frames += [s.scenario_effects(unpruned[other.key], pruned[other.key], other, **drawn) for other, _ in asked]
    if not others:
        frames.append(s.nothing_asked(distinct["mask"].to_list()))
    told = {
        "targets": ", ".join([s.TEXT, *(s.target_name(prompts) for _, prompts in asked)]),
        "masks": distinct.height,
        "reuse": reuse_sentence(work.drawn, work.reused),
    }
    if left_out:
        told["scenarios_left_out"] = "\n".join(left_out)
    return pl.concat(frames), told | work.metadata() | device


def _prompts(
    loaded: Any, completions: pl.DataFrame, others: Sequence[Scenario], named: bool, how: Any, audit: Audit
) -> tuple[list[tuple[Scenario, pl.DataFrame]], list[str]]:
    """The scenarios that the model can be asked with their prompts, and a line for each that it cannot."""
    from excise.evaluation import side_effects as s
    from excise.models.encoding import encode

    subjects = completions.group_by("group").agg(pl.col("subject").n_unique())["subject"].max()
    held_out = ATTRIBUTION in set(completions["split"])
    found, left_out = [], []
    for other in others:
        try:
            prompts = s.target_prompts(
                other,
                names=audit.side_effect_names,
                subjects_per_group=subjects,
                held_out=held_out,
                seed=how.parameters.seed,
            )
            encode(loaded.asked_for(other.outcome), prompts, new_tokens=other.outcome.max_new_tokens)
        except ExciseError as error:
            if named:
                raise ExciseError(f"resources.settings.config.side_effect_scenarios: {other.key}: {error}") from error
            left_out.append(f"{other.key}: {error}")
        else:
            found.append((other, prompts))
    return found, left_out
