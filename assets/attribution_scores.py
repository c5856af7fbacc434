"""The stage `attribution_scores`: how much each input and weight matters, per variation and group.

The scores are files, found again by their content; the table `attribution_files` says where they lie.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.metadata import data_version, table_value
from assets.partitions import Catalogue
from assets.stage import Step, grid_asset
from assets.upstream import completions_of, require_same_model
from excise.errors import ExciseError
from excise.scenarios.subsets import EVALUATION, without
from resources.tables import TABLES

if TYPE_CHECKING:
    from excise.attribution import AttributionFile
    from excise.models.loading import LoadedModel


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
    def attribution_scores(step: Step) -> dg.MaterializeResult:
        from excise.generation.answering import Answering, as_samples

        completions, prompts = completions_of(step.warehouse, step.model, step.scenario.key)
        _require_comparison(step)
        scores = sorted({strategy.score for strategy in step.strategies() if not strategy.of_scenario})
        learned, asked = without(EVALUATION, completions, prompts)
        samples = as_samples(learned, Answering.of(learned).sample_count)
        with step.loaded() as loaded:
            require_same_model(completions, loaded, step.scenario.key)
            files = _attributed(step, loaded, asked, samples, scores)
            device = step.gpu.report(loaded)
        rows = _rows(step, files, device["model_fingerprint"], data_version(completions).value)
        step.store("attribution_files", rows)
        metadata = device | _left_out(step, samples, scores) | _metadata(files, rows)
        # A path says what the content is made of; the same tensors may lie in a file in another order.
        return step.result("attribution_files", metadata, rows.drop("sha256"))

    return attribution_scores


def _require_comparison(step: Step) -> None:
    if step.scenario.comparison is None:
        raise ExciseError(
            f"scenario {step.scenario.key}: comparison is missing; attribution compares two groups, so name majority "
            "and minority (head_impacts takes all groups without it)"
        )


def _attributed(
    step: Step, loaded: "LoadedModel", prompts: pl.DataFrame, samples: pl.DataFrame, scores: Sequence[str]
) -> list["AttributionFile"]:
    """Files of the scores of all variations."""
    from excise.attribution import Answered, attribute
    from excise.generation.completions import CompletionCache

    answered = Answered(
        loaded,
        prompts,
        samples,
        step.scenario.comparison,
        step.scenario.outcome,
        permutations=step.audit.relabellings,
        seed=step.audit.seed,
        cache=CompletionCache(step.artifacts.completion_cache),
    )
    return attribute(answered, scores, folder=step.artifacts.tensors("attribution"), progress=step.progress)


def _rows(step: Step, files: Sequence["AttributionFile"], fingerprint: str, completions_version: str) -> pl.DataFrame:
    """Rows of the table `attribution_files`."""
    rows = []
    for file in files:
        stored = step.artifacts.describe(file.path)
        rows.append(
            {
                **step.place,
                "variation": file.variation,
                "score": file.score,
                "relabellings": step.audit.relabellings,
                "path": stored.path,
                "sha256": stored.sha256,
                "bytes": stored.bytes,
                "model_fingerprint": fingerprint,
                "completions_version": completions_version,
            }
        )
    return pl.DataFrame(rows, schema=TABLES["attribution_files"].schema)


def _metadata(files: Sequence["AttributionFile"], rows: pl.DataFrame) -> dict[str, Any]:
    """Metadata: how many files were computed, how large they are, and where they lie."""
    return {
        "files_computed": sum(not file.reused for file in files),
        "files_reused": sum(file.reused for file in files),
        "seconds": round(sum(file.seconds for file in files), 1),
        "bytes": rows["bytes"].sum(),
        "files": table_value(rows.select("variation", "score", "path", "bytes")),
    }


def _left_out(step: Step, samples: pl.DataFrame, scores: Sequence[str]) -> dict[str, dg.MetadataValue]:
    """Metadata that names, by score, the variations whose answers it cannot be learned from."""
    from excise.attribution import scored_places

    groups = {"comparison": step.scenario.comparison, "outcome": step.scenario.outcome}
    places, lines = scored_places(samples, scores, **groups), []
    for score in scores:
        lacking = [key for key in samples["variation"].unique(maintain_order=True) if (key, score) not in places]
        if lacking:
            lines.append(f"* {score}: too few answers to {', '.join(lacking)} (judged_variations of completions)")
    return {"left_out": dg.MetadataValue.md("\n".join(lines))} if lines else {}
