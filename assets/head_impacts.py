"""The stage `head_impacts`: what removing each attention head does to perplexity and to the disparity (FASP).

The answers are those of `completions` (of the part that masks may be made from), weighed anew instead of drawn anew;
files of model work are found again by their content, so a killed run goes on where it was.
"""

import dagster as dg
import polars as pl

from assets.completions import completions_of, require_same_model, scorer_of, windows_of, without
from assets.partitions import Catalogue
from assets.stage import data_version, grid_asset, picture, table_metadata, table_value
from excise.errors import ExciseError
from excise.evaluation.judged import compared_groups, explained, judged_of, unit_of
from excise.scenarios.subsets import EVALUATION
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch


def head_impacts_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Measures every head."""

    @grid_asset(
        catalogue,
        group="pruning",
        kinds={"torch", "safetensors"},
        description="For every attention head, with intervals: what its removal does to the perplexity of a text and "
        "to the disparity (toxicity bias, or |SMD| of numbers), and how reliable that is; and the scores of the "
        "baselines.",
        deps=["completions"],
        uses_model=True,
        code_version="2",
    )
    def head_impacts(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.attribution.head_impacts import head_impacts, split_half_reliability
        from excise.attribution.head_scores import head_gradient, head_magnitude
        from excise.generation.answering import Answering, as_samples
        from excise.generation.completions import CompletionCache
        from excise.outcomes.toxicity import ScoreCache
        from excise.reporting.figures import head_map

        model, scenario = catalogue.partition(context)
        audit, outcome = catalogue.audit_of(settings, scenario), scenario.outcome
        completions, prompts = completions_of(warehouse, model, scenario.key)
        learned, asked = without(EVALUATION, completions, prompts)
        judged = judged_of(learned, scenario)
        if not judged:
            raise ExciseError(" ".join(explained(learned, scenario)))
        left_out = sorted(set(learned["variation"]) - set(judged))
        learned, asked = (frame.filter(pl.col("variation").is_in(judged)) for frame in (learned, asked))
        how = Answering.of(learned)
        toxicity = outcome.kind == "toxicity"
        scorer, scores = scorer_of(catalogue, scenario), ScoreCache(artifacts.score_cache)
        cache = CompletionCache(artifacts.completion_cache)
        with gpu.model(model, catalogue.models, stage=watch.stage(context)) as loaded:
            require_same_model(completions, loaded.fingerprint, model, scenario.key)
            windows = windows_of(loaded, audit)

            def regenerate(mask):
                rows, _ = how.answers(
                    loaded, asked, outcome=outcome, scorer=scorer, scores=scores, mask=mask, cache=cache
                )
                return as_samples(rows, how.samples)

            impacts = head_impacts(
                loaded.asked_for(outcome),
                asked,
                as_samples(learned, how.samples),
                disparity="toxicity" if toxicity else "smd",
                groups=compared_groups(scenario),
                cluster=unit_of(outcome),
                parameters=how.parameters,
                windows=windows,
                perplexity_mode=audit.perplexity_mode,
                regenerate=regenerate,
                method=audit.impact_method,
                ess_floor=audit.ess_floor,
                resamples=audit.resamples,
                seed=audit.seed,
                folder=artifacts.tensors("head_impacts"),
                progress=watch.progress(context),
            )
            magnitude, gradient = head_magnitude(loaded), head_gradient(loaded, windows)
            device = gpu.report(loaded)
        place = impacts.select("layer", "head").rows()
        rows = impacts.with_columns(
            model=pl.lit(model),
            scenario=pl.lit(scenario.key),
            magnitude=pl.Series([float(magnitude[each]) for each in place]),
            gradient=pl.Series([float(gradient[each]) for each in place]),
            model_fingerprint=pl.lit(device["model_fingerprint"]),
            completions_version=pl.lit(data_version(completions).value),
        ).select(TABLES["head_impacts"].names)
        warehouse.replace_partition("head_impacts", rows, {"model": model, "scenario": scenario.key})
        metadata = table_metadata("head_impacts", rows) | device
        if left_out:
            metadata["not_judged"] = ", ".join(left_out)
        metadata |= picture("head_map", head_map(rows), artifacts, model, scenario.key)
        metadata |= {
            "regenerated": (rows["method"] == "regenerated").sum(),
            "median_effective_share": rows["ess"].median(),
            "split_half_reliability": table_value(split_half_reliability(rows)),
            "most_harmful": table_value(
                rows.sort("z_bias", descending=True, nulls_last=True)
                .head(20)
                .select("layer", "head", "z_bias", "z_bias_low", "z_bias_high", "z_ppl", "ess")
            ),
        }
        return dg.MaterializeResult(metadata=metadata, data_version=data_version(rows))

    return head_impacts
