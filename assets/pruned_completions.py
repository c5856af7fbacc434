"""The stage `pruned_completions`: what the model answers under every mask.

Prompts, samples, parameters and noise are those of `completions`, so pruned and unpruned answers come in pairs. Names
that masks were made from are not asked, where names are held out.
"""

from dataclasses import replace

import dagster as dg
import polars as pl

from assets import checks
from assets.completions import completions_of, require_same_model, require_same_prompts, scorer_of, windows_of, without
from assets.mask_definitions import require_one_definition
from assets.partitions import Catalogue
from assets.stage import data_version, grid_asset, table_metadata
from excise.conditions import MASK, PLACE, RANDOM
from excise.errors import ExciseError
from excise.evaluation.judged import judged_of
from excise.scenarios import Scenario
from excise.scenarios.subsets import ATTRIBUTION, EVALUATION
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import Audit, AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch

MASK_COLUMNS = (*MASK, "mask", "path")


def pruned_completions_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Samples the model under every mask of the partition."""

    @grid_asset(
        catalogue,
        group="pruning",
        kinds={"torch", "duckdb"},
        description="What the model answers to the same prompts under every mask, with the same noise as unpruned.",
        deps=["completions", "pruning_masks", "cross_context_masks"],
        checks=[checks.spec("completions_complete_and_balanced", "pruned_completions", catalogue)],
        uses_model=True,
        code_version="3",
    )
    def pruned_completions(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.evaluation.perplexity import LossCache
        from excise.generation.answering import Answering
        from excise.generation.completions import UNPRUNED, CompletionCache, Work
        from excise.interventions.masks import Mask
        from excise.outcomes.toxicity import ScoreCache
        from excise.reporting.words import reuse_sentence

        model, scenario = catalogue.partition(context)
        everything, every_prompt = completions_of(warehouse, model, scenario.key)
        completions, prompts = without(ATTRIBUTION, everything, every_prompt)
        how = Answering.of(completions)
        masks = masks_to_ask(warehouse, model, scenario, everything)
        audit, scorer = catalogue.audit_of(settings, scenario), scorer_of(catalogue, scenario)
        cache, scores = CompletionCache(artifacts.completion_cache), ScoreCache(artifacts.score_cache)
        progress = watch.progress(context)
        wanted = {row["variation"]: 0 for row in masks.iter_rows(named=True)}
        for variation in wanted:
            wanted[variation] = prompts.filter(pl.col("variation") == variation).height * how.samples
        total = sum(wanted[row["variation"]] for row in masks.iter_rows(named=True))
        frames, work, before, opened = [], Work(), 0, (None, None)
        losses = {}
        with gpu.model(model, catalogue.models, stage=watch.stage(context)) as loaded:
            require_same_model(completions, loaded.fingerprint, model, scenario.key)
            require_same_prompts(completions, prompts, loaded, scenario)
            windows = windows_of(loaded, audit) if scorer else []
            known = LossCache(artifacts.tensors("perplexity"))
            if windows:
                losses[UNPRUNED] = known.window_losses(loaded, windows)
            for row in masks.iter_rows(named=True):
                if opened[0] != row["path"]:
                    opened = row["path"], Mask.load(artifacts.locate(row["path"], made_by=row["asset"]))
                try:
                    frame, done = how.answers(
                        loaded,
                        prompts.filter(pl.col("variation") == row["variation"]),
                        outcome=scenario.outcome,
                        scorer=scorer,
                        scores=scores,
                        mask=opened[1],
                        cache=cache,
                        progress=lambda _, done, __, before=before: progress(
                            "pruned completions", before + done, total
                        ),
                    )
                    if windows and row["mask"] not in losses:
                        losses[row["mask"]] = known.window_losses(loaded, windows, opened[1])
                except ExciseError as error:
                    raise ExciseError(
                        f"variation {row['variation']}, {row['strategy']} at level {row['level']}: {error}"
                    ) from error
                named = [
                    pl.lit(row[name], dtype=TABLES["pruned_completions"].schema[name]).alias(name)
                    for name in (*MASK[1:], "mask")
                ]
                frames.append(frame.with_columns(named))
                work, before = work + done, before + wanted[row["variation"]]
            device = gpu.report(loaded)
        rows = pl.concat(frames) if frames else pl.DataFrame(schema=TABLES["pruned_completions"].schema)
        warehouse.replace_partition("pruned_completions", rows, {"model": model, "scenario": scenario.key})
        told = _perplexities(model, scenario.key, losses, windows, audit)
        warehouse.replace_partition("perplexity", told, {"model": model, "scenario": scenario.key})
        asked = prompts.join(masks.select(MASK), on="variation")
        outcome = checks.completions_complete_and_balanced(
            rows, asked, how.samples, masked=True, balanced=scorer is None
        )
        if masks.is_empty():
            nothing = "There are no masks: either no variation can be judged (judged_variations of completions), or no "
            nothing += "mask was found (mask_density of pruning_masks)."
            outcome = replace(outcome, passed=True, message=nothing, unmet=())
        checks.record(warehouse, "pruned_completions", model, scenario.key, [outcome])
        left_out = sorted(set(completions["variation"]) - set(judged_of(completions, scenario)))
        return dg.MaterializeResult(
            metadata=table_metadata("pruned_completions", rows)
            | ({"not_judged": ", ".join(left_out)} if left_out else {})
            | {"reuse": reuse_sentence(work.drawn, work.reused), "masks": masks.height}
            | work.metadata()
            | device,
            data_version=data_version(device["model_fingerprint"], rows),
            check_results=[outcome.result()],
        )

    return pruned_completions


def _perplexities(model: str, scenario: str, losses: dict, windows: list, audit: Audit) -> pl.DataFrame:
    """Rows of the table `perplexity`: the text under every mask, and paired with the unpruned model."""
    from excise.evaluation.perplexity import perplexity_difference, perplexity_interval

    rows, drawn = [], {"resamples": audit.resamples, "seed": audit.seed}
    for mask, found in losses.items():
        own = perplexity_interval(found, windows, audit.perplexity_mode, **drawn)
        change = perplexity_difference(found, losses["unpruned"], windows, audit.perplexity_mode, **drawn)
        rows.append(
            {
                "model": model,
                "scenario": scenario,
                "mask": mask,
                "perplexity": own.estimate,
                "low": own.low,
                "high": own.high,
                "difference": change.estimate,
                "difference_low": change.low,
                "difference_high": change.high,
                "tokens": sum(window.scored for window in windows),
                "text": audit.text or "built-in",
            }
        )
    return pl.DataFrame(rows, schema=TABLES["perplexity"].schema)


def masks_to_ask(warehouse: Warehouse, model: str, scenario: Scenario, completions: pl.DataFrame) -> pl.DataFrame:
    """The masks of a partition under which its variations are asked, one row each; those that share a file (as
    cross-context ones do) follow each other.

    completions: all of the partition. Masks of variations that are not asked any more, or cannot be judged, are left
    aside; there may be none at all. Raises ExciseError when there are no masks of the scenario itself though there
    should be, or some for variations without completions, or masks of one strategy made in different ways.
    """
    place = f"{model}|{scenario.key}"
    learned = completions.filter(pl.col("split") != EVALUATION)
    judged = judged_of(completions.filter(pl.col("split") != ATTRIBUTION), scenario)
    rows = warehouse.read("masks", model=model, scenario=scenario.key)
    require_one_definition(rows, again="pruning_masks and cross_context_masks")
    masks = rows.select(*MASK_COLUMNS, "asset").unique().sort("path", *MASK_COLUMNS)
    own = masks.filter(pl.col("asset") == "pruning_masks")
    if unasked := set(own["variation"]) - set(completions["variation"]):
        raise ExciseError(
            f"there are masks for {', '.join(sorted(unasked))} of {place}, but no completions; materialize "
            "pruning_masks of this partition again"
        )
    looked_for = warehouse.read("mask_paths", asset="pruning_masks", model=model, scenario=scenario.key)
    if own.is_empty() and looked_for.is_empty() and judged and judged_of(learned, scenario):
        raise ExciseError(f"{place} has no masks of its own; materialize pruning_masks of this partition first")
    return masks.filter(pl.col("variation").is_in(judged))


def own_and_first_random(masks: pl.DataFrame) -> pl.DataFrame:
    """Of rows of masks, those of strategies and of the first random control of each strategy that is there."""
    first = pl.col("draw") == pl.col("draw").min().over(PLACE)
    strategies = pl.col("strategy").filter(pl.col("matched_to").is_null()).unique().implode()
    control = (pl.col("strategy") == RANDOM) & first & pl.col("matched_to").is_in(strategies)
    return masks.filter(pl.col("matched_to").is_null() | control)
