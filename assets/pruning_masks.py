"""The stage `pruning_masks`: which weights or heads every strategy and control prunes, within its scenario.

A mask is a file named by its fingerprint; the table `masks` counts what it prunes in each matrix. Masks made from other
scenarios are `cross_context_masks`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import dagster as dg
import polars as pl

from assets.checks import Outcome
from assets.mask_files import MaskFiles, mask_rows, masks_result
from assets.measured_paths import PathRows, learned_of, paths_of
from assets.metadata import mistakes
from assets.partitions import Catalogue
from assets.stage import Step, grid_asset
from assets.upstream import completions_of, head_impacts_of, require_same_model, score_files, scores_of
from excise.conditions import ACROSS, PROMPT_SPECIFIC
from excise.evaluation.judged import judged_of
from excise.scenarios.subsets import EVALUATION
from excise.strategies.config import Strategy

if TYPE_CHECKING:
    from excise.models.loading import LoadedModel
    from excise.strategies.build import NamedMask


def pruning_masks_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Builds the masks of all chosen strategies, levels and controls."""

    @grid_asset(
        catalogue,
        group="pruning",
        kinds={"torch", "safetensors"},
        description="The weights or heads every strategy would prune, prompt-specific and within the context, and the "
        "controls that prune as many without knowing about groups.",
        deps=["attribution_scores", "head_impacts"],
        checks=["mask_density"],
        uses_model=True,
        code_version="3",
    )
    def pruning_masks(step: Step) -> dg.MaterializeResult:
        from excise.reporting.figures import mask_density_by_layer

        completions, _ = completions_of(step.warehouse, step.model, step.scenario.key)
        chosen = step.strategies()
        files, paths = MaskFiles(step.artifacts), PathRows(step)
        made = [_head_masks(step, completions, [strategy for strategy in chosen if strategy.of_scenario])]
        within = [_within_the_scenario(strategy) for strategy in chosen if not strategy.of_scenario]
        stored = _scores(step, completions, within)
        with step.loaded() as loaded:
            require_same_model(completions, loaded, step.scenario.key)
            made.append(_weight_masks(step, loaded, within, stored, files, paths))
            rows = mask_rows(step, chain.from_iterable(made), chosen, files)
        # Rows of a version that did not note the asset would never be replaced.
        step.warehouse.replace_partition("masks", rows.clear(), {"asset": None, **step.place})
        learned = completions.filter(pl.col("split") != EVALUATION)
        silent = rows.is_empty() and not judged_of(learned, step.scenario)
        drawn = {} if rows.is_empty() else step.picture("mask_density_by_layer", mask_density_by_layer(rows))
        metadata = drawn | mistakes(step.catalogue)
        return masks_result(step, rows, paths, files, metadata, _silent if silent else lambda outcome: outcome)

    return pruning_masks


def _silent(outcome: Outcome) -> Outcome:
    why = "There are no masks: no variation can be judged (judged_variations of completions)."
    return replace(outcome, message=why)


def _scores(step: Step, completions: pl.DataFrame, strategies: Sequence[Strategy]) -> pl.DataFrame | None:
    """The scores that strategies are made of; None where there are no strategies."""
    if not strategies:
        return None
    scores = {strategy.score for strategy in strategies}
    return scores_of(step.warehouse, step.model, step.scenario, scores, completions)


def _head_masks(step: Step, completions: pl.DataFrame, strategies: Sequence[Strategy]) -> Iterator["NamedMask"]:
    """The masks of strategies of whole heads that are chosen by impact."""
    from excise.strategies.build import build_head_masks

    if not strategies:
        return iter(())
    impacts = head_impacts_of(step.warehouse, step.model, step.scenario.key, completions)
    variations = completions["variation"].unique(maintain_order=True).to_list()
    return build_head_masks(strategies, impacts, variations, random_draws=step.audit.random_draws, seed=step.audit.seed)


def _weight_masks(
    step: Step,
    loaded: "LoadedModel",
    strategies: Sequence[Strategy],
    stored: pl.DataFrame | None,
    files: MaskFiles,
    paths: PathRows,
) -> Iterator["NamedMask"]:
    """The masks of the other strategies, of the scores that are stored."""
    from excise.strategies.build import Making, build_masks

    if stored is None:
        return iter(())
    making = Making(
        step.audit.random_draws,
        step.audit.seed,
        permutations=min([step.audit.relabellings, *stored["relabellings"]]),
        paths=paths_of(step, loaded, paths.note, learned_of(step, loaded), step.audit.seed),
        progress=step.progress,
    )
    sources = score_files(stored, step.artifacts)
    return build_masks(loaded, strategies, sources, making, scenario=step.scenario.key, store=files.store)


def _within_the_scenario(strategy: Strategy) -> Strategy:
    """The levels made here. Prompt-specific masks are wanted wherever masks across scenarios are."""
    levels = [PROMPT_SPECIFIC if level in ACROSS else level for level in strategy.levels]
    return strategy.model_copy(update={"levels": tuple(dict.fromkeys(levels))})
