"""The stage `cross_context_masks`: what a scenario's model is pruned of when other scenarios were looked at.

The masks are made of the prompt-specific masks of all other scenarios of the same model (BDB, section 4) and, at the
level `all_contexts`, of the scenario's own, too; so a partition depends on all partitions of its model. Measured paths
ask the model itself about all of their variations; the others need no model in memory.
"""

from contextlib import ExitStack
from dataclasses import replace

import dagster as dg
import polars as pl

from assets import checks
from assets.completions import completions_of, require_same_model
from assets.mask_definitions import require_defined_as
from assets.measured_paths import PathRows, paths_of
from assets.partitions import Catalogue
from assets.pruning_masks import MaskFiles, definition_of, mask_rows, with_none_found
from assets.stage import data_version, grid_asset, table_metadata, table_value
from excise.conditions import ACROSS, ALL_CONTEXTS, MASK, OWN_SCENARIO, PROMPT_SPECIFIC
from excise.errors import ExciseError
from excise.strategies.build import SourceMask, build_cross_context_masks
from excise.strategies.config import MEASURED_PATH, Strategy
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch

NAME = "cross_context_masks"


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
        checks=[checks.spec("mask_density", NAME, catalogue)],
        uses_model=True,
        code_version="3",
    )
    def cross_context_masks(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        model, scenario = catalogue.partition(context)
        audit = catalogue.audit_of(settings, scenario)
        completions, _ = completions_of(warehouse, model, scenario.key)
        strategies = [
            each
            for each in catalogue.chosen_strategies(
                audit.strategies, audit.levels, scenario.outcome.strategies_of, audit.alphas
            )
            if set(ACROSS) & set(each.levels)
        ]
        found = _source_masks(warehouse, model, scenario.key, catalogue, strategies, completions)
        lacking = _lacking(warehouse, model, found, scenario.key, catalogue, strategies)
        for line in lacking:
            context.log.info(f"left out: {line}")
        files, notes = MaskFiles(artifacts), PathRows(artifacts, NAME, model, scenario.key)
        asked = set(completions["variation"])
        variations = [variation for variation in scenario.variations if variation in asked]
        sources, counted = _sources(found, artifacts), []
        with ExitStack() as borrowed:
            paths = None
            if any(strategy.selection == MEASURED_PATH for strategy in strategies) and sources:
                loaded = borrowed.enter_context(gpu.model(model, catalogue.models, stage=watch.stage(context)))
                require_same_model(completions, loaded.fingerprint, model, scenario.key)
                progress = watch.progress(context)
                paths = paths_of(warehouse, artifacts, catalogue, loaded, audit, notes.note, progress)
            for named in build_cross_context_masks(
                strategies,
                sources,
                scenario.key,
                variations,
                per_source=audit.per_source,
                random_draws=audit.random_draws,
                seed=audit.seed,
                paths=paths,
                progress=watch.progress(context),
            ):
                counted += mask_rows(
                    named,
                    NAME,
                    model,
                    scenario.key,
                    path=artifacts.relative(files.store(named.mask)),
                    definition=definition_of(named, strategies, audit.seed),
                )
        rows = pl.DataFrame(counted, schema=TABLES["masks"].schema)
        place = {"asset": NAME, "model": model, "scenario": scenario.key}
        warehouse.replace_partition("masks", rows, place)
        warehouse.replace_partition("mask_paths", notes.frame(), place)
        outcome = checks.mask_density(rows, audit.density_floor, audit.density_ceiling)
        if not strategies:
            outcome = checks.Outcome("mask_density", True, checks.WARN, "No strategy is asked for across contexts.")
        elif lacking:
            outcome = replace(outcome, message=" ".join([outcome.message, *(f"Left out: {each}." for each in lacking)]))
        outcome = with_none_found(outcome, notes)
        checks.record(warehouse, NAME, model, scenario.key, [outcome])
        used = (
            found.filter(pl.col("scenario") != scenario.key)
            .group_by("scenario", maintain_order=True)
            .agg(variations=pl.col("variation").n_unique(), masks=pl.len())
        )
        metadata = table_metadata("masks", rows) | {
            "masks": rows.select(*MASK, "mask").unique().height,
            "mask_files_written": files.written,
            "mask_files_reused": len(files.seen) - files.written,
            "scenarios_used": ", ".join(used["scenario"]),
            "sources": table_value(used),
        }
        if lacking:
            metadata["left_out"] = dg.MetadataValue.md("\n".join(f"* {line}" for line in lacking))
        return dg.MaterializeResult(
            metadata=metadata,
            data_version=data_version(rows.select(*MASK, "mask").unique()),
            check_results=[outcome.result()],
        )

    return cross_context_masks


def _source_masks(
    warehouse: Warehouse,
    model: str,
    scenario: str,
    catalogue: Catalogue,
    strategies: list[Strategy],
    completions: pl.DataFrame,
) -> pl.DataFrame:
    """All scenarios' prompt-specific masks of the strategies, and the scores they come from, in catalogue order; of
    measured paths the scores alone.

    The scenario's own only where a strategy has the level all_contexts. Columns: scenario, variation, strategy, path
    (of the mask), score_path. Raises ExciseError when a strategy has none in its own scenario though it needs that and
    they can be made, when some were made by other parameters than the strategy's, and when some are of another model
    than the completions.
    """
    others = [key for key in catalogue.scenarios_like(scenario) if key != scenario]
    schema = dict.fromkeys(("scenario", "variation", "strategy", "path", "score_path"), pl.String)
    if not strategies:
        return pl.DataFrame(schema=schema)
    scores = warehouse.read("attribution_files", model=model, scenario=[*others, scenario])
    measured = [strategy for strategy in strategies if strategy.selection == MEASURED_PATH]
    combined = [strategy for strategy in strategies if strategy not in measured]
    masks = (
        warehouse.read(
            "masks",
            asset="pruning_masks",
            model=model,
            scenario=[*others, scenario],
            level=[PROMPT_SPECIFIC, OWN_SCENARIO],
            matched_to=None,
            strategy=[strategy.key for strategy in combined],
        )
        .select("scenario", "variation", "strategy", "path", "definition")
        .unique()
    )
    require_defined_as(masks, combined, again="pruning_masks")
    by_strategy = pl.DataFrame(
        [(each.key, each.score) for each in strategies], schema=["strategy", "score"], orient="row"
    )
    read_from = scores.select("scenario", "variation", "score", score_path="path")
    found = masks.join(by_strategy, on="strategy").join(read_from, on=["scenario", "variation", "score"], how="left")
    lent = by_strategy.filter(pl.col("strategy").is_in([strategy.key for strategy in measured]))
    found = pl.concat(
        [
            found.select(schema.keys()),
            read_from.join(lent, on="score").with_columns(path=pl.lit(None, pl.String)).select(schema.keys()),
        ]
    )
    asked_of_all = [strategy.key for strategy in strategies if ALL_CONTEXTS in strategy.levels]
    found = found.filter((pl.col("scenario") != scenario) | pl.col("strategy").is_in(asked_of_all))
    for key in asked_of_all:
        own = found.filter((pl.col("strategy") == key) & (pl.col("scenario") == scenario))
        if own.is_empty() and scenario not in _unjudged(warehouse, model):
            raise ExciseError(
                f"{model}|{scenario} has no masks of {key} yet, which all_contexts needs, too; materialize "
                "pruning_masks of this partition first, or leave all_contexts out of resources.settings.config.levels"
            )
    (own,) = completions["model_fingerprint"].unique()
    used = scores.filter(pl.col("scenario").is_in(found["scenario"].unique().to_list()))
    if changed := sorted(set(used.filter(pl.col("model_fingerprint") != own)["scenario"])):
        raise ExciseError(
            f"the masks of {', '.join(changed)} are of another version of model {model} than the completions of "
            f"{model}|{scenario}; materialize completions, attribution_scores and pruning_masks of the older ones again"
        )
    places = {key: place for place, key in enumerate(catalogue.scenarios)}
    ordered = found.sort(pl.col("scenario").replace_strict(places), "strategy", "variation")
    return ordered.select(schema.keys())


def _lacking(
    warehouse: Warehouse,
    model: str,
    found: pl.DataFrame,
    scenario: str,
    catalogue: Catalogue,
    strategies: list[Strategy],
) -> list[str]:
    """What is left out, a line each: per strategy the other scenarios that have no mask of it, and why."""
    unjudged, lines = _unjudged(warehouse, model), []
    for strategy in strategies:
        there = set(found.filter(pl.col("strategy") == strategy.key)["scenario"])
        missing = [key for key in catalogue.scenarios_like(scenario) if key not in there and key != scenario]
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


def _unjudged(warehouse: Warehouse, model: str) -> set[str]:
    """The scenarios of a model that were sampled and of which no variation can be judged."""
    checked = warehouse.read("checks", asset="completions", check_name="judged_variations", model=model)
    return set(checked.filter(pl.col("figure") == 0)["scenario"])


def _sources(found: pl.DataFrame, artifacts: Artifacts) -> list[SourceMask]:
    def file(path: str | None, asset: str):
        return None if path is None else artifacts.locate(path, made_by=asset)

    return [
        SourceMask(
            scenario=row["scenario"],
            variation=row["variation"],
            strategy=row["strategy"],
            mask=file(row["path"], "pruning_masks"),
            score=file(row["score_path"], "attribution_scores"),
        )
        for row in found.iter_rows(named=True)
    ]
