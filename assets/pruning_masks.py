"""The stage `pruning_masks`: which weights or heads every strategy and control prunes, within its scenario.

A mask is a file named by its fingerprint; the table `masks` counts what it prunes in each matrix. Masks made from other
scenarios are `cross_context_masks`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import dagster as dg
import polars as pl

from assets import checks
from assets.completions import completions_of, require_same_model, without
from assets.measured_paths import PathRows, paths_of
from assets.partitions import Catalogue
from assets.stage import data_version, grid_asset, mistakes, picture, rows_of, table_metadata
from excise.attribution import AttributionFile
from excise.conditions import ACROSS, MASK, PROMPT_SPECIFIC
from excise.errors import ExciseError
from excise.evaluation.judged import judged_of
from excise.interventions.masks import Mask
from excise.scenarios import Scenario
from excise.scenarios.subsets import EVALUATION
from excise.strategies.build import NamedMask
from excise.strategies.config import HEAD_SCORES, Strategy
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch


def pruning_masks_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Builds the masks of all chosen strategies, levels and controls."""

    @grid_asset(
        catalogue,
        group="pruning",
        kinds={"torch", "safetensors"},
        description="The weights or heads every strategy would prune, prompt-specific and within the context, and the "
        "controls that prune as many without knowing about groups.",
        deps=["attribution_scores", "head_impacts"],
        checks=[checks.spec("mask_density", "pruning_masks", catalogue)],
        uses_model=True,
        code_version="3",
    )
    def pruning_masks(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.reporting.figures import mask_density_by_layer
        from excise.strategies.build import build_head_masks, build_masks

        model, scenario = catalogue.partition(context)
        audit = catalogue.audit_of(settings, scenario)
        completions, prompts = completions_of(warehouse, model, scenario.key)
        learned, _ = without(EVALUATION, completions, prompts)
        chosen = catalogue.chosen_strategies(audit.strategies, audit.levels, scenario.outcome.kind, audit.alphas)
        of_heads = [each for each in chosen if each.score in HEAD_SCORES]
        strategies = [_within_the_scenario(each) for each in chosen if each.score not in HEAD_SCORES]
        partition = {"model": model, "scenario": scenario.key}
        relabellings, stored = 0, None
        if strategies:
            stored = warehouse.read("attribution_files", model=model, scenario=scenario.key)
            require_scores(stored, {each.score for each in strategies}, completions, learned, model, scenario)
            relabellings = min([audit.relabellings, *stored["relabellings"]])
        made: list[Iterator[NamedMask]] = []
        if of_heads:
            impacts = rows_of(warehouse, "head_impacts", model, scenario.key, made_by="head_impacts")
            if set(impacts["completions_version"]) != {data_version(completions).value}:
                raise ExciseError(
                    f"the head impacts of {model}|{scenario.key} are those of other completions; materialize "
                    "head_impacts of this partition again"
                )
            variations = completions["variation"].unique(maintain_order=True).to_list()
            made.append(
                build_head_masks(of_heads, impacts, variations, random_draws=audit.random_draws, seed=audit.seed)
            )
        files, found = MaskFiles(artifacts), PathRows(artifacts, "pruning_masks", model, scenario.key)
        with gpu.model(model, catalogue.models, stage=watch.stage(context)) as loaded:
            require_same_model(completions, loaded.fingerprint, model, scenario.key)
            if strategies:
                progress = watch.progress(context)
                made.append(
                    build_masks(
                        loaded,
                        strategies,
                        attribution_files_of(stored, artifacts),
                        scenario=scenario.key,
                        random_draws=audit.random_draws,
                        permutations=relabellings,
                        seed=audit.seed,
                        store=files.store,
                        paths=paths_of(warehouse, artifacts, catalogue, loaded, audit, found.note, progress),
                        progress=progress,
                    )
                )
            counted = [
                row
                for named in chain.from_iterable(made)
                for row in mask_rows(
                    named,
                    "pruning_masks",
                    model,
                    scenario.key,
                    path=artifacts.relative(files.store(named.mask)),
                    definition=definition_of(named, chosen, audit.seed),
                )
            ]
        rows = pl.DataFrame(counted, schema=TABLES["masks"].schema)
        # Rows of a version that did not note the asset would never be replaced.
        warehouse.replace_partition("masks", rows.clear(), {"asset": None, **partition})
        warehouse.replace_partition("masks", rows, {"asset": "pruning_masks", **partition})
        warehouse.replace_partition("mask_paths", found.frame(), {"asset": "pruning_masks", **partition})
        outcome = checks.mask_density(rows, audit.density_floor, audit.density_ceiling)
        if rows.is_empty() and not judged_of(learned, scenario):
            why = "There are no masks: no variation can be judged (judged_variations of completions)."
            outcome = replace(outcome, message=why)
        outcome = with_none_found(outcome, found)
        checks.record(warehouse, "pruning_masks", model, scenario.key, [outcome])
        masks = rows.select(*MASK, "mask").unique().height
        metadata = (
            table_metadata("masks", rows)
            | mistakes(catalogue)
            | {
                "masks": masks,
                "mask_files_written": files.written,
                "mask_files_reused": len(files.seen) - files.written,
            }
        )
        if not rows.is_empty():
            figure = mask_density_by_layer(rows)
            metadata = picture("mask_density_by_layer", figure, artifacts, model, scenario.key) | metadata
        return dg.MaterializeResult(
            metadata=metadata,
            data_version=data_version(rows.select(*MASK, "mask").unique()),
            check_results=[outcome.result()],
        )

    return pruning_masks


def with_none_found(outcome: checks.Outcome, found: PathRows) -> checks.Outcome:
    """The outcome, with the masks that were looked for in vain: a result, and no fault."""
    lines = [f"{line}." for line in found.none_found()]
    return replace(outcome, message=" ".join([outcome.message, *lines])) if lines else outcome


class MaskFiles:
    """Masks as files named by their fingerprint, each written once; counts how many were there already."""

    def __init__(self, artifacts: Artifacts) -> None:
        self.artifacts = artifacts
        self.folder = artifacts.tensors("masks")
        self.seen: set[str] = set()
        self.written = 0

    def store(self, mask: Mask) -> Path:
        """Keep a mask and return its path."""
        path = self.folder / f"{mask.fingerprint}.safetensors"
        self.seen.add(mask.fingerprint)
        if not path.exists():
            mask.save(path)
            self.written += 1
        return path


def _within_the_scenario(strategy: Strategy) -> Strategy:
    """The levels made here. Prompt-specific masks are wanted wherever masks across scenarios are."""
    levels = [PROMPT_SPECIFIC if level in ACROSS else level for level in strategy.levels]
    return strategy.model_copy(update={"levels": tuple(dict.fromkeys(levels))})


def require_scores(
    stored: pl.DataFrame,
    scores: set[str],
    completions: pl.DataFrame,
    learned: pl.DataFrame,
    model: str,
    scenario: Scenario,
) -> None:
    """Raise ExciseError unless the attribution files are of these completions and hold these scores of all variations
    that they can be learned from.

    learned: the completions that masks are made from.
    """
    from excise.attribution import scored_places
    from excise.generation.answering import Answering, as_samples

    place = f"{model}|{scenario.key}"
    if not stored.is_empty() and set(stored["completions_version"]) != {data_version(completions).value}:
        raise ExciseError(
            f"the attribution scores of {place} are those of other completions; materialize attribution_scores of "
            "this partition again"
        )
    samples = as_samples(learned, Answering.of(learned).samples)
    wanted = scored_places(samples, sorted(scores), comparison=scenario.comparison, outcome=scenario.outcome)
    if lacking := set(wanted) - set(stored.select("variation", "score").iter_rows()):
        raise ExciseError(
            f"the attribution scores of {place} lack {', '.join(sorted({score for _, score in lacking}))}, which a "
            "strategy needs; materialize attribution_scores of this partition"
        )


def attribution_files_of(stored: pl.DataFrame, artifacts: Artifacts) -> list[AttributionFile]:
    """Rows of the table `attribution_files` as `excise.strategies.build` takes them."""
    return [
        AttributionFile(
            variation=row["variation"],
            score=row["score"],
            path=artifacts.locate(row["path"], made_by="attribution_scores"),
            bytes=row["bytes"],
            reused=True,
            seconds=0.0,
        )
        for row in stored.iter_rows(named=True)
    ]


def definition_of(named: NamedMask, strategies: Sequence[Strategy], seed: int) -> str:
    """The definition of a mask: that of its strategy, or for a control of the strategy it is a control of."""
    strategy = next(each for each in strategies if each.key == (named.matched_to or named.strategy))
    return strategy.definition(None if named.matched_to is None else named.strategy, seed)


def mask_rows(named: NamedMask, asset: str, model: str, scenario: str, *, path: str, definition: str) -> list[dict]:
    """Rows of the table `masks`: one per matrix (for heads: per layer) of a mask."""
    rows = []
    for key, pruned in named.mask.counts().items():
        layer, role = key.split(".")
        out_features, in_features = named.mask.shapes[key]
        rows.append(
            {
                "asset": asset,
                "model": model,
                "scenario": scenario,
                "variation": named.variation,
                "strategy": named.strategy,
                "level": named.level,
                "matched_to": named.matched_to,
                "draw": named.draw,
                "mask": named.mask.fingerprint,
                "layer": int(layer),
                "role": role,
                "pruned": pruned,
                "size": out_features * in_features,
                "path": path,
                "definition": definition,
            }
        )
    return rows
