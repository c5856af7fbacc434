"""The stage `side_effects`: what masks do to plain text, and to scenarios they were not made for.

Every strategy's own masks and the first random control of each are tried, each distinct mask once. What is measured is
in `excise.evaluation.side_effects`; which scenarios, the settings say.
"""

from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.asking import asking_of
from assets.metadata import cost
from assets.partitions import Catalogue
from assets.stage import Step, grid_asset
from assets.upstream import completions_of, mask_opener, masks_to_ask, own_and_first_random, require_same_model
from excise.conditions import MASK

if TYPE_CHECKING:
    from excise.evaluation.mask_trials import Trial
    from excise.generation.under_masks import Asking


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
    def side_effects(step: Step) -> dg.MaterializeResult:
        from excise.evaluation.side_effects import of_masks
        from excise.reporting.side_effects import side_effects_markdown

        if not step.scenario.outcome.pairwise:
            return step.nothing(
                "Side effects are told of masks made in scenarios whose answers are numbers.", under="side_effects"
            )
        completions, _ = completions_of(step.warehouse, step.model, step.scenario.key)
        masks = _masks_to_try(masks_to_ask(step.warehouse, step.model, step.scenario, completions))
        if masks.is_empty():
            return step.nothing("There are no masks whose side effects could be measured.", under="side_effects")
        effects, costs = _measured(step, masks, completions)
        rows = of_masks(effects, masks.with_columns(**{key: pl.lit(value) for key, value in step.place.items()}))
        step.store("side_effects", rows)
        metadata = {"side_effects": dg.MetadataValue.md(side_effects_markdown(rows)), **costs}
        return step.result("side_effects", metadata, costs["model_fingerprint"], rows)

    return side_effects


def _masks_to_try(masks: pl.DataFrame) -> pl.DataFrame:
    """Of the masks that are asked, those of strategies and the first random control of each, one row each. Masks of
    single other scenarios are left out: they tell where a mask comes from."""
    from excise.evaluation.scenario_metrics import pooled_levels

    return pooled_levels(own_and_first_random(masks)).sort("mask", *MASK)


def _measured(step: Step, masks: pl.DataFrame, completions: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The effects of every distinct mask, and what they cost as metadata."""
    from excise.evaluation.mask_trials import tried
    from excise.evaluation.side_effects import nothing_asked
    from excise.generation.answering import Answering

    distinct = masks.unique("mask", keep="first", maintain_order=True)
    with step.loaded() as loaded:
        require_same_model(completions, loaded, step.scenario.key)
        asking = asking_of(step, loaded, Answering.of(completions))
        trial, left_out = _trial(step, asking, completions)
        effects, work = tried(asking, distinct, mask_opener(step.artifacts), trial, step.progress)
        device = step.gpu.report(loaded)
    if not step.audit.side_effect_scenarios:
        effects = pl.concat([effects, nothing_asked(distinct["mask"].to_list())])
    costs = {"targets": ", ".join(trial.names), "masks": distinct.height} | cost(work)
    if left_out:
        costs["scenarios_left_out"] = "\n".join(left_out)
    return effects, costs | device


def _trial(step: Step, asking: "Asking", completions: pl.DataFrame) -> tuple["Trial", list[str]]:
    """What the masks are tried on, and a line for each scenario that is left out as the model cannot be asked it; one
    that the settings name is never left out."""
    from excise.evaluation.mask_trials import Trial, targets_of
    from excise.evaluation.side_effects import effect_windows
    from excise.evaluation.texts import read_text

    audit = step.audit
    windows = effect_windows(
        asking.loaded,
        read_text(audit.text),
        mode=audit.perplexity_mode,
        size=audit.text_window,
        stride=audit.text_stride,
        limit_tokens=audit.text_tokens,
    )
    others = [step.catalogue.scenario(key) for key in audit.side_effect_scenarios]
    required = step.settings.side_effect_scenarios is not None
    targets, left_out = targets_of(asking, completions, others, audit.side_effect_names, required=required)
    return Trial(targets, windows, audit.perplexity_mode, audit.resamples, audit.seed), left_out
