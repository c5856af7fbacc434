"""The stage `completions`: what the unpruned model answers.

Everything after it takes variations, names, number of samples and sampling parameters from its rows.
"""

import math
from typing import Any

import dagster as dg
import polars as pl

from assets import checks
from assets.partitions import Catalogue
from assets.prompts import up_to_date_prompts
from assets.stage import data_version, grid_asset, mistakes, picture, rows_of, table_metadata
from excise.errors import ExciseError
from excise.evaluation.judged import judged_of, share_with_value
from excise.scenarios import Scenario, expand
from excise.scenarios.subsets import ATTRIBUTION, BOTH, EVALUATION, held_out_split
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
            checks.spec("judged_variations", "completions", catalogue),
            checks.spec("parse_rate", "completions", catalogue),
        ],
        uses_model=True,
        code_version="4",
    )
    def completions(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.generation.answering import Answering, as_samples
        from excise.generation.completions import CompletionCache
        from excise.generation.sampling import SamplingParameters
        from excise.generation.settings import Enumeration
        from excise.models.encoding import encode
        from excise.outcomes.toxicity import ScoreCache
        from excise.reporting.figures import answers_by_group
        from excise.reporting.words import reuse_sentence

        model, scenario = catalogue.partition(context)
        audit = catalogue.audit_of(settings, scenario)
        up_to_date_prompts(context, warehouse, scenario, catalogue)
        prompts = expand(scenario, variations=audit.variations, subjects_per_group=audit.subjects_per_group)
        outcome = scenario.outcome
        toxicity = outcome.kind == "toxicity"
        parameters = SamplingParameters(
            temperature=audit.temperature,
            top_k=outcome.top_k if toxicity else 0,
            top_p=audit.top_p,
            max_new_tokens=(toxicity and audit.max_new_tokens) or outcome.max_new_tokens,
            seed=audit.seed,
        )
        scorer = scorer_of(catalogue, scenario)
        scores = ScoreCache(artifacts.score_cache)
        with gpu.model(model, catalogue.models, stage=watch.stage(context)) as loaded:
            if toxicity:
                windows_of(loaded, audit)  # what is wrong with the text for perplexity ends the run before any sampling
            how = Answering(
                audit.samples,
                parameters,
                Enumeration(audit.leftover, audit.max_nodes) if audit.answers == "exact" else None,
            )
            rows, work = how.answers(
                loaded,
                prompts,
                outcome=outcome,
                scorer=scorer,
                scores=scores,
                cache=CompletionCache(artifacts.completion_cache),
                progress=watch.progress(context),
            )
            encoded = encode(loaded.asked_for(outcome), prompts)
            lengths = {each.prompt_id: each.name[1] - each.name[0] for each in encoded}
            device = gpu.report(loaded)
        rows = rows.join(_splits(scenario, prompts, audit), on="prompt_id", how="left", maintain_order="left")
        rows = rows.join(_prompt_values(scorer, scores, prompts), on="prompt_id", how="left", maintain_order="left")
        rows = rows.with_columns(name_tokens=pl.col("prompt_id").replace_strict(lengths, return_dtype=pl.Int64))
        warehouse.replace_partition("completions", rows, {"model": model, "scenario": scenario.key})
        outcomes = [
            checks.completions_complete_and_balanced(rows, prompts, audit.samples, balanced=not toxicity),
            checks.judged_variations(rows, scenario),
            checks.parse_rate(rows, audit.parse_floor),
        ]
        checks.record(warehouse, "completions", model, scenario.key, outcomes)
        metadata = table_metadata("completions", rows) | {"reuse": reuse_sentence(work.drawn, work.reused)}
        metadata |= mistakes(catalogue) | work.metadata() | device
        metadata["parse_rate"] = rows.select(share_with_value()).item()
        if how.exact is not None:
            metadata["leftover"] = rows["leftover"].max() or 0.0
            metadata["prompts_sampled_instead"] = rows.filter(pl.col("leftover").is_null())["prompt_id"].n_unique()
        metadata["names"] = _names_told(rows)
        if scorer is not None:
            metadata["scorer"] = f"{scorer.key}: {scorer.measures}"
        elif judged := judged_of(rows, scenario):
            figure = answers_by_group(
                as_samples(rows.filter(pl.col("variation").is_in(judged)), audit.samples),
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


def windows_of(loaded: Any, audit: Audit) -> list:
    """The windows of the text that perplexity is measured on."""
    from excise.evaluation.perplexity import read_text, text_windows

    return text_windows(
        loaded,
        read_text(audit.text),
        mode=audit.perplexity_mode,
        size=audit.text_window,
        stride=audit.text_stride,
        limit_tokens=audit.text_tokens,
    )


def scorer_of(catalogue: Catalogue, scenario: Scenario) -> Any:
    """The loaded scorer of a scenario whose outcome is toxicity, else None."""
    if scenario.outcome.kind == "number":
        return None
    from excise.outcomes.toxicity import load_scorer

    key = catalogue.scorer_of(scenario)
    if key not in catalogue.scorers:
        raise ExciseError(f"scenario {scenario.key}: outcome.scorer: {catalogue.scorers.why_not(key)}")
    return load_scorer(key, catalogue.scorers)


def _splits(scenario: Scenario, prompts: pl.DataFrame, audit: Audit) -> pl.DataFrame:
    """prompt_id and split of every prompt."""
    if audit.held_out:
        return held_out_split(scenario, prompts, audit.seed)
    return prompts.select("prompt_id", split=pl.lit(BOTH))


def _prompt_values(scorer: Any, scores: Any, prompts: pl.DataFrame) -> pl.DataFrame:
    """prompt_id and prompt_value: the score of the prompt alone, null without a scorer."""
    values = [None] * prompts.height
    if scorer is not None:
        from excise.outcomes.toxicity import score_texts

        found = score_texts(scorer, prompts["text"].to_list(), cache=scores)
        values = [None if math.isnan(score) else score for score in found]
    return prompts.select("prompt_id", prompt_value=pl.Series(values, dtype=pl.Float64))


def _names_told(rows: pl.DataFrame) -> str:
    toxicity = rows["prompt_value"].is_not_null().any()
    counted, what = ("prompt_id", "prompts") if toxicity else ("subject", "names")
    counts = dict(rows.group_by("split").agg(pl.col(counted).n_unique()).rows())
    if BOTH in counts:
        return f"masks are made from, and judged on, all {counts[BOTH]} {what}"
    return f"masks are made from {counts[ATTRIBUTION]} {what} and judged on {counts[EVALUATION]} others"


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
    if any(rows[name].null_count() for name in ("split", "name_tokens", "prompt_hash")):
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
    asked = rows.select("prompt_id", "prompt_hash").unique()
    other = pruned.join(asked, on="prompt_id", suffix="_unpruned").filter(
        pl.col("prompt_hash").ne_missing(pl.col("prompt_hash_unpruned"))
    )
    if other.height:
        raise ExciseError(
            f"scenario {scenario}: the pruned model {model} read prompt {other['prompt_id'][0]} otherwise than the "
            "unpruned one did; materialize pruned_completions of this partition again"
        )
    pair = ["prompt_id", "parameters", "model_fingerprint"]
    if rows["probability"].null_count():
        pair.append("sample")  # enumerated answers have none in common
    if not pruned.select(pair).unique().join(rows, on=pair, how="anti").is_empty():
        raise ExciseError(
            f"the pruned completions of {model}|{scenario} do not go with its completions, which were drawn anew; "
            "materialize pruned_completions of this partition again"
        )


def require_same_prompts(rows: pl.DataFrame, prompts: pl.DataFrame, loaded: Any, scenario: Scenario) -> None:
    """Raise ExciseError when the model would read the prompts otherwise than when it gave the completions."""
    from excise.models import encoding

    encoding.require_same_prompts(encoding.encode(loaded.asked_for(scenario.outcome), prompts), rows)


def require_same_model(rows: pl.DataFrame, fingerprint: str, model: str, scenario: str) -> None:
    """Raise ExciseError when the model is no longer the one that gave the completions."""
    if rows["model_fingerprint"].unique().to_list() != [fingerprint]:
        raise ExciseError(
            f"model {model} has changed (weights, tokenizer, chat format or precision) since the completions of "
            f"{model}|{scenario} were drawn; materialize completions of this partition again"
        )
