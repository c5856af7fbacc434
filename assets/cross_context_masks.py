"""The stage `cross_context_masks`: what a scenario's model is pruned of when other scenarios were looked at.

The masks are made of the prompt-specific masks of all other scenarios of the same model (BDB, section 4) and, at the
level `all_contexts`, of the scenario's own, too; so a partition depends on all partitions of its model. Measured paths
ask the model itself about all of their variations; the others need no model in memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.checks import WARN, Outcome
from assets.mask_files import MaskFiles, mask_rows, masks_result
from assets.measured_paths import PathRows, learned_of, paths_of
from assets.metadata import table_value
from assets.partitions import Catalogue
from assets.stage import Step, grid_asset
from assets.upstream import completions_of, require_same_model, source_files, source_masks, unjudged_scenarios
from excise.conditions import ACROSS, ALL_CONTEXTS
from excise.strategies.config import MEASURED_PATH, Strategy

if TYPE_CHECKING:
    from excise.strategies.build import NamedMask, Paths


def cross_context_masks_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Combines the masks of all other scenarios."""

    @grid_asset(
        catalogue,
        group="pruning",
        kinds={"torch", "safetensors"},
        description="The weights or heads every strategy would prune knowing only the other scenarios of the model: "
        "all of them together and, where asked for, each alone; or knowing all scenarios; and random controls of the "
        "same size.",
        deps=[
            dg.AssetDep("completions", partition_mapping=catalogue.all_scenarios),
            dg.AssetDep("attribution_scores", partition_mapping=catalogue.all_scenarios),
            dg.AssetDep("pruning_masks", partition_mapping=catalogue.all_scenarios),
        ],
        checks=["mask_density"],
        uses_model=True,
        code_version="3",
    )
    def cross_context_masks(step: Step) -> dg.MaterializeResult:
        model, key = step.model, step.scenario.key
        completions, _ = completions_of(step.warehouse, model, key)
        strategies = [strategy for strategy in step.strategies() if set(ACROSS) & set(strategy.levels)]
        sources = source_masks(step.warehouse, model, key, step.catalogue, strategies, completions)
        unjudged = unjudged_scenarios(step.warehouse, model)
        lacking = left_out(sources, key, step.catalogue.scenarios_like(key), strategies, unjudged)
        for line in lacking:
            step.context.log.info(f"left out: {line}")
        files, paths = MaskFiles(step.artifacts), PathRows(step)
        with ExitStack() as borrowed:
            followed = _paths(step, borrowed, completions, strategies, paths) if sources.height else None
            made = _masks(step, completions, sources, strategies, followed)
            rows = mask_rows(step, made, strategies, files)
        metadata = _sources_metadata(sources, key, lacking)
        return masks_result(step, rows, paths, files, metadata, lambda outcome: _judged(outcome, strategies, lacking))

    return cross_context_masks


def _paths(
    step: Step, borrowed: ExitStack, completions: pl.DataFrame, strategies: Sequence[Strategy], paths: PathRows
) -> "Paths | None":
    """How paths are followed, with the model in memory until `borrowed` is closed; None where no strategy has one."""
    if not any(strategy.selection == MEASURED_PATH for strategy in strategies):
        return None
    loaded = borrowed.enter_context(step.loaded())
    require_same_model(completions, loaded, step.scenario.key)
    return paths_of(step, loaded, paths.note, learned_of(step, loaded), step.audit.seed)


def _masks(
    step: Step,
    completions: pl.DataFrame,
    sources: pl.DataFrame,
    strategies: Sequence[Strategy],
    followed: "Paths | None",
) -> Iterator["NamedMask"]:
    """The masks for the variations that were asked."""
    from excise.strategies.build import Making, build_cross_context_masks

    asked = set(completions["variation"])
    return build_cross_context_masks(
        strategies,
        source_files(sources, step.artifacts),
        step.scenario.key,
        [variation for variation in step.scenario.variations if variation in asked],
        Making(step.audit.random_draws, step.audit.seed, paths=followed, progress=step.progress),
        per_source=step.audit.per_source,
    )


def left_out(
    sources: pl.DataFrame, scenario: str, alike: Sequence[str], strategies: Sequence[Strategy], unjudged: set[str]
) -> list[str]:
    """What is left out, a line each: per strategy the other scenarios that have no mask of it, and why.

    alike: the scenarios that masks can come from. unjudged: those of which no variation can be judged.
    """
    lines = []
    for strategy in strategies:
        there = set(sources.filter(pl.col("strategy") == strategy.key)["scenario"])
        missing = [key for key in alike if key not in there and key != scenario]
        for keys, why in (
            ([key for key in missing if key in unjudged], "no variation can be judged, so there is no mask"),
            ([key for key in missing if key not in unjudged], "no mask yet; materialize pruning_masks of it first"),
        ):
            if keys:
                lines.append(f"{', '.join(keys)}: {why} ({strategy.key})")
        if not there - {scenario}:
            lines.append(f"{strategy.key} has no mask across contexts, as no other scenario has one of it")
        elif ALL_CONTEXTS in strategy.levels and scenario not in there:
            lines.append(f"{strategy.key} has no all-contexts mask, as {scenario} has none of its own")
    return lines


def _judged(outcome: Outcome, strategies: Sequence[Strategy], lacking: Sequence[str]) -> Outcome:
    """The outcome of mask_density, with what was left out; it passes where nothing was asked for."""
    if not strategies:
        return Outcome("mask_density", True, WARN, "No strategy is asked for across contexts.")
    if lacking:
        return replace(outcome, message=" ".join([outcome.message, *(f"Left out: {line}." for line in lacking)]))
    return outcome


def _sources_metadata(sources: pl.DataFrame, scenario: str, lacking: Sequence[str]) -> dict[str, Any]:
    """Metadata: which scenarios lent masks, how many, and what was left out."""
    used = (
        sources.filter(pl.col("scenario") != scenario)
        .group_by("scenario", maintain_order=True)
        .agg(variations=pl.col("variation").n_unique(), masks=pl.len())
    )
    metadata: dict[str, Any] = {"scenarios_used": ", ".join(used["scenario"]), "sources": table_value(used)}
    if lacking:
        metadata["left_out"] = dg.MetadataValue.md("\n".join(f"* {line}" for line in lacking))
    return metadata
