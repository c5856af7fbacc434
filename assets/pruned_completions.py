"""The stage `pruned_completions`: what the model answers under every mask.

Prompts, samples, parameters and noise are those of `completions`, so pruned and unpruned answers come in pairs. Names
that masks were made from are not asked, where names are held out.
"""

import dagster as dg
import polars as pl

from assets import checks
from assets.completions import completions_of, require_same_model, scorer_of, without
from assets.head_impacts import windows_of
from assets.partitions import Catalogue
from assets.stage import data_version, grid_asset, rows_of, table_metadata
from excise.errors import ExciseError
from excise.scenarios.subsets import ATTRIBUTION
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import Audit, AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch

MASK_COLUMNS = (*checks.MASK, "mask", "path")


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
        code_version="2",
    )
    def pruned_completions(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.completions import UNPRUNED, CompletionCache, Work
        from excise.exact import Answering
        from excise.masks import Mask
        from excise.perplexity import LossCache
        from excise.report import reuse_sentence
        from excise.toxicity import ScoreCache

        model, scenario = catalogue.partition(context)
        completions, prompts = without(ATTRIBUTION, *completions_of(warehouse, model, scenario.key))
        how = Answering.of(completions)
        masks = _masks_of(warehouse, model, scenario.key, set(prompts["variation"]))
        audit, scorer = settings.audit_of(scenario), scorer_of(catalogue, scenario)
        cache, scores = CompletionCache(artifacts.completion_cache), ScoreCache(artifacts.score_cache)
        progress = watch.progress(context)
        wanted = {row["variation"]: 0 for row in masks.iter_rows(named=True)}
        for variation in wanted:
            wanted[variation] = prompts.filter(pl.col("variation") == variation).height * how.samples
        total = sum(wanted[row["variation"]] for row in masks.iter_rows(named=True))
        frames, work, before, opened = [], Work(), 0, (None, None)
        losses = {}
        with gpu.model(model, catalogue.models, waiting=context.log.info) as loaded:
            require_same_model(completions, loaded.fingerprint, model, scenario.key)
            windows = windows_of(loaded, audit) if scorer else []
            known = LossCache(artifacts.tensors("perplexity"))
            if windows:
                losses[UNPRUNED] = known.window_losses(loaded, windows)
            for row in masks.iter_rows(named=True):
                if opened[0] != row["path"]:
                    opened = row["path"], Mask.load(artifacts.locate(row["path"], made_by=row["asset"]))
                frame, done = how.answers(
                    loaded,
                    prompts.filter(pl.col("variation") == row["variation"]),
                    outcome=scenario.outcome,
                    scorer=scorer,
                    scores=scores,
                    mask=opened[1],
                    cache=cache,
                    progress=lambda _, done, __, before=before: progress("pruned completions", before + done, total),
                )
                if windows and row["mask"] not in losses:
                    losses[row["mask"]] = known.window_losses(loaded, windows, opened[1])
                named = [
                    pl.lit(row[name], dtype=TABLES["pruned_completions"].schema[name]).alias(name)
                    for name in (*checks.MASK[1:], "mask")
                ]
                frames.append(frame.with_columns(named))
                work, before = work + done, before + wanted[row["variation"]]
            device = gpu.report(loaded)
        rows = pl.concat(frames)
        warehouse.replace_partition("pruned_completions", rows, {"model": model, "scenario": scenario.key})
        told = _perplexities(model, scenario.key, losses, windows, audit)
        warehouse.replace_partition("perplexity", told, {"model": model, "scenario": scenario.key})
        asked = prompts.join(masks.select(checks.MASK), on="variation")
        outcome = checks.completions_complete_and_balanced(
            rows, asked, how.samples, masked=True, balanced=scorer is None
        )
        checks.record(warehouse, "pruned_completions", model, scenario.key, [outcome])
        return dg.MaterializeResult(
            metadata=table_metadata("pruned_completions", rows)
            | {"reuse": reuse_sentence(work.drawn, work.reused), "masks": masks.height}
            | work.metadata()
            | device,
            data_version=data_version(device["model_fingerprint"], rows),
            check_results=[outcome.result()],
        )

    return pruned_completions


def _perplexities(model: str, scenario: str, losses: dict, windows: list, audit: Audit) -> pl.DataFrame:
    """Rows of the table `perplexity`: the text under every mask, and paired with the unpruned model."""
    from excise.perplexity import perplexity_difference, perplexity_interval

    rows = []
    for mask, found in losses.items():
        own = perplexity_interval(found, windows, audit.perplexity_mode, seed=audit.seed)
        change = perplexity_difference(found, losses["unpruned"], windows, audit.perplexity_mode, seed=audit.seed)
        rows.append(
            {
                "model": model, "scenario": scenario, "mask": mask, "perplexity": own.estimate, "low": own.low,
                "high": own.high, "difference": change.estimate, "difference_low": change.low,
                "difference_high": change.high, "tokens": sum(window.scored for window in windows),
                "text": audit.text or "built-in",
            }
        )  # fmt: skip
    return pl.DataFrame(rows, schema=TABLES["perplexity"].schema)


def _masks_of(warehouse: Warehouse, model: str, scenario: str, variations: set[str]) -> pl.DataFrame:
    """The masks of a partition, one row each; those that share a file (as cross-context ones do) follow each other.

    There need not be cross-context masks, and those of variations that are not asked any more are left aside. Raises
    ExciseError when there are no masks of the scenario itself, or some for variations without completions.
    """
    rows = rows_of(warehouse, "masks", model, scenario, made_by="pruning_masks")
    masks = rows.select(*MASK_COLUMNS, "asset").unique().sort("path", *MASK_COLUMNS)
    own = masks.filter(pl.col("asset") == "pruning_masks")
    if unasked := set(own["variation"]) - variations:
        raise ExciseError(
            f"there are masks for {', '.join(sorted(unasked))} of {model}|{scenario}, but no completions; "
            "materialize pruning_masks of this partition again"
        )
    if own.is_empty():
        raise ExciseError(f"{model}|{scenario} has no masks of its own; materialize pruning_masks of it first")
    return masks.filter(pl.col("variation").is_in(list(variations)))
