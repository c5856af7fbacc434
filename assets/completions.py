"""The stage `completions`: what the unpruned model answers.

Everything after it takes variations, names, number of samples and sampling parameters from its rows.
"""

import json

import dagster as dg
import polars as pl

from assets import checks
from assets.partitions import Catalogue
from assets.prompts import up_to_date_prompts
from assets.stage import data_version, grid_asset, picture, rows_of, table_metadata
from excise.errors import ExciseError
from excise.scenarios import expand, halves
from excise.scenarios.subsets import ATTRIBUTION, BOTH, EVALUATION
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import Audit, AuditSettings
from resources.warehouse import Warehouse
from resources.watch import RunWatch


def completions_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Samples the unpruned model on the chosen prompts."""

    @grid_asset(
        catalogue,
        group="audit",
        kinds={"torch", "duckdb"},
        description="What the unpruned model answers to every prompt, several times each; where names are held out, "
        "which half a name belongs to.",
        deps=["prompts"],
        checks=[
            checks.spec("completions_complete_and_balanced", "completions", catalogue),
            checks.spec("parse_rate", "completions", catalogue),
        ],
        uses_model=True,
        code_version="2",
    )
    def completions(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.completions import CompletionCache, complete
        from excise.encoding import encode
        from excise.figures import answers_by_group
        from excise.report import reuse_sentence
        from excise.sampling import SamplingParameters

        model, scenario = catalogue.partition(context)
        audit = settings.audit_of(scenario)
        up_to_date_prompts(context, warehouse, scenario, catalogue)
        prompts = expand(scenario, variations=audit.variations, subjects_per_group=audit.subjects_per_group)
        parameters = SamplingParameters(
            temperature=audit.temperature,
            top_p=audit.top_p,
            max_new_tokens=scenario.outcome.max_new_tokens,
            seed=audit.seed,
        )
        with gpu.model(model, catalogue.models, waiting=context.log.info) as loaded:
            rows, work = complete(
                loaded,
                prompts,
                audit.samples,
                parameters,
                outcome=scenario.outcome,
                cache=CompletionCache(artifacts.completion_cache),
                progress=watch.progress(context),
            )
            lengths = {each.prompt_id: each.name[1] - each.name[0] for each in encode(loaded, prompts)}
            device = gpu.report(loaded)
        rows = rows.join(_splits(prompts, audit), on=["group", "subject"], how="left", maintain_order="left")
        rows = rows.with_columns(name_tokens=pl.col("prompt_id").replace_strict(lengths, return_dtype=pl.Int64))
        warehouse.replace_partition("completions", rows, {"model": model, "scenario": scenario.key})
        outcomes = [
            checks.completions_complete_and_balanced(rows, prompts, audit.samples),
            checks.parse_rate(rows, audit.parse_floor),
        ]
        checks.record(warehouse, "completions", model, scenario.key, outcomes)
        metadata = table_metadata("completions", rows) | {"reuse": reuse_sentence(work.drawn, work.reused)}
        metadata |= work.metadata() | device
        metadata["parse_rate"] = rows["value"].is_not_null().mean()
        metadata["names"] = _names_told(rows)
        if rows["value"].is_not_null().any():
            figure = answers_by_group(
                rows,
                unit=scenario.outcome.unit,
                majority=scenario.comparison.majority,
                minority=scenario.comparison.minority,
                scale=scenario.outcome.scale,
            )
            metadata = picture("answers_by_group", figure, artifacts, model, scenario.key) | metadata
        return dg.MaterializeResult(
            metadata=metadata,
            data_version=data_version(device["model_fingerprint"], rows),
            check_results=[outcome.result() for outcome in outcomes],
        )

    return completions


def _splits(prompts: pl.DataFrame, audit: Audit) -> pl.DataFrame:
    """group, subject and split of every name."""
    if audit.held_out:
        return halves(prompts, audit.seed)
    return prompts.select("group", "subject").unique().with_columns(split=pl.lit(BOTH))


def _names_told(rows: pl.DataFrame) -> str:
    counts = dict(rows.group_by("split").agg(pl.col("subject").n_unique()).rows())
    if BOTH in counts:
        return f"masks are made from, and judged on, all {counts[BOTH]} names"
    return f"masks are made from {counts[ATTRIBUTION]} names and judged on {counts[EVALUATION]} others"


def without(split: str, completions: pl.DataFrame, prompts: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The completions, and their prompts, of all names but those of one half.

    Without `EVALUATION` they are what masks are made from, without `ATTRIBUTION` what masks are judged on.
    """
    rows = completions.filter(pl.col("split") != split)
    return rows, prompts.filter(pl.col("prompt_id").is_in(rows["prompt_id"].unique().implode()))


def completions_of(warehouse: Warehouse, model: str, scenario: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A partition's completions and the prompts they answer.

    Raises ExciseError when there are none, or when the prompts have changed since.
    """
    rows = rows_of(warehouse, "completions", model, scenario, made_by="completions")
    prompts = warehouse.read("prompts", scenario=scenario)
    if rows["split"].null_count() or rows["name_tokens"].null_count():
        raise ExciseError(
            f"the completions of {model}|{scenario} were stored by an earlier version; materialize completions of this "
            "partition again (answers drawn already are reused)"
        )
    asked = prompts.filter(pl.col("prompt_id").is_in(rows["prompt_id"].unique().implode()))
    if asked.height != rows["prompt_id"].n_unique():
        raise ExciseError(
            f"the prompts of scenario {scenario} have changed since the completions of {model}|{scenario} were drawn; "
            "materialize completions of this partition again"
        )
    return rows, asked


def require_paired(rows: pl.DataFrame, pruned: pl.DataFrame, model: str, scenario: str) -> None:
    """Raise ExciseError unless pruned and unpruned answers are of the same model, prompts, samples and parameters."""
    pair = ["prompt_id", "sample", "parameters", "model_fingerprint"]
    if not pruned.select(pair).unique().join(rows, on=pair, how="anti").is_empty():
        raise ExciseError(
            f"the pruned completions of {model}|{scenario} do not go with its completions, which were drawn anew; "
            "materialize pruned_completions of this partition again"
        )


def sampling_of(rows: pl.DataFrame) -> tuple[int, dict]:
    """How many samples each prompt has in the completions, and the parameters they were drawn with."""
    samples = rows["sample"].max() + 1
    return samples, json.loads(rows["parameters"][0])


def require_same_model(rows: pl.DataFrame, fingerprint: str, model: str, scenario: str) -> None:
    """Raise ExciseError when the model is no longer the one that gave the completions."""
    if rows["model_fingerprint"].unique().to_list() != [fingerprint]:
        raise ExciseError(
            f"model {model} has changed (weights, tokenizer, chat format or precision) since the completions of "
            f"{model}|{scenario} were drawn; materialize completions of this partition again"
        )
