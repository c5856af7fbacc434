"""The stage `attribution_scores`: how much each input and weight matters, per variation and group.

The scores are files, found again by their content; the table `attribution_files` says where they lie.
"""

from collections.abc import Sequence

import dagster as dg
import polars as pl

from assets.completions import completions_of, require_same_model, without
from assets.partitions import Catalogue
from assets.stage import data_version, grid_asset, table_metadata, table_value
from excise.errors import ExciseError
from excise.scenarios.subsets import EVALUATION
from excise.strategies.config import HEAD_SCORES, Strategy
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch


def attribution_scores_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Attributes the answers of every variation."""

    @grid_asset(
        catalogue,
        group="pruning",
        kinds={"torch", "safetensors"},
        description="What every strategy needs to know about the unpruned model: input norms, gradients, attention to "
        "the name, per variation and group, computed from the completions (of one half of the names, where names are "
        "held out).",
        deps=["completions"],
        uses_model=True,
        code_version="4",
    )
    def attribution_scores(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.attribution import attribute, scored_places
        from excise.generation.answering import Answering, as_samples
        from excise.generation.completions import CompletionCache

        model, scenario = catalogue.partition(context)
        audit = catalogue.audit_of(settings, scenario)
        completions, prompts = completions_of(warehouse, model, scenario.key)
        if scenario.comparison is None:
            raise ExciseError(
                f"scenario {scenario.key}: comparison is missing; attribution compares two groups, so name majority "
                "and minority (head_impacts takes all groups without it)"
            )
        strategies = [
            each
            for each in catalogue.chosen_strategies(audit.strategies, audit.levels, scenario.outcome.kind, audit.alphas)
            if each.score not in HEAD_SCORES
        ]
        with gpu.model(model, catalogue.models, stage=watch.stage(context)) as loaded:
            require_same_model(completions, loaded.fingerprint, model, scenario.key)
            learned, asked = without(EVALUATION, completions, prompts)
            samples, scores = as_samples(learned, Answering.of(learned).samples), _scores_of(strategies)
            groups = {"comparison": scenario.comparison, "outcome": scenario.outcome}
            files = attribute(
                loaded,
                asked,
                samples,
                **groups,
                scores=scores,
                permutations=audit.relabellings,
                seed=audit.seed,
                folder=artifacts.tensors("attribution"),
                cache=CompletionCache(artifacts.completion_cache),
                progress=watch.progress(context),
            )
            device = gpu.report(loaded)
        stored = [artifacts.describe(file.path) for file in files]
        version = data_version(completions).value
        rows = pl.DataFrame(
            [
                {
                    "model": model,
                    "scenario": scenario.key,
                    "variation": file.variation,
                    "score": file.score,
                    "relabellings": audit.relabellings,
                    "path": where.path,
                    "sha256": where.sha256,
                    "bytes": where.bytes,
                    "model_fingerprint": device["model_fingerprint"],
                    "completions_version": version,
                }
                for file, where in zip(files, stored, strict=True)
            ],
            schema=TABLES["attribution_files"].schema,
        )
        warehouse.replace_partition("attribution_files", rows, {"model": model, "scenario": scenario.key})
        metadata = table_metadata("attribution_files", rows) | device
        metadata |= _left_out(samples, scores, scored_places(samples, scores, **groups))
        metadata |= {
            "files_computed": sum(not file.reused for file in files),
            "files_reused": sum(file.reused for file in files),
            "seconds": round(sum(file.seconds for file in files), 1),
            "bytes": sum(where.bytes for where in stored),
            "files": table_value(rows.select("variation", "score", "path", "bytes")),
        }
        # A path says what the content is made of; the same tensors may lie in a file in another order.
        return dg.MaterializeResult(metadata=metadata, data_version=data_version(rows.drop("sha256")))

    return attribution_scores


def _scores_of(strategies: Sequence[Strategy]) -> list[str]:
    return sorted({strategy.score for strategy in strategies})


def _left_out(
    completions: pl.DataFrame, scores: Sequence[str], places: Sequence[tuple[str, str]]
) -> dict[str, dg.MetadataValue]:
    """Metadata that names, by score, the variations whose answers it cannot be learned from."""
    lines = []
    for score in scores:
        lacking = [each for each in completions["variation"].unique(maintain_order=True) if (each, score) not in places]
        if lacking:
            lines.append(f"* {score}: too few answers to {', '.join(lacking)} (judged_variations of completions)")
    return {"left_out": dg.MetadataValue.md("\n".join(lines))} if lines else {}
