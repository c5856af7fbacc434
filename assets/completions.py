"""The stage `completions`: what the unpruned model answers.

Everything after it takes variations, names, number of samples and sampling parameters from its rows.
"""

from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.answer_checks import completions_complete_and_balanced, judged_variations, parse_rate
from assets.asking import asking_of, scorer_of, windows_of
from assets.metadata import cost, mistakes
from assets.partitions import Catalogue
from assets.prompts import up_to_date_prompts
from assets.stage import Step, grid_asset
from excise.evaluation.judged import judged_of, share_with_value
from excise.scenarios import expand

if TYPE_CHECKING:
    from excise.generation.answering import Answering
    from excise.models.loading import LoadedModel
    from excise.outcomes.scorers import Scorer


def completions_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Samples the unpruned model on the chosen prompts."""

    @grid_asset(
        catalogue,
        group="audit",
        kinds={"torch", "duckdb"},
        description="What the unpruned model answers to every prompt, several times each; where names are held out, "
        "which half a name belongs to.",
        deps=["prompts"],
        checks=["completions_complete_and_balanced", "judged_variations", "parse_rate"],
        uses_model=True,
        code_version="4",
    )
    def completions(step: Step) -> dg.MaterializeResult:
        from excise.generation.unpruned import unpruned_answers

        audit, scenario = step.audit, step.scenario
        up_to_date_prompts(step.context, step.warehouse, scenario, step.catalogue)
        prompts = expand(scenario, variations=audit.variations, subjects_per_group=audit.subjects_per_group)
        scorer, how = scorer_of(step.catalogue, scenario), _answering(step)
        with step.loaded() as loaded:
            _require_text(step, loaded)
            asking = asking_of(step, loaded, how, scorer)
            drawn = {"held_out": audit.held_out, "seed": audit.seed, "progress": step.progress}
            rows, work = unpruned_answers(asking, scenario, prompts, **drawn)
            device = step.gpu.report(loaded)
        step.store("completions", rows)
        outcomes = [
            completions_complete_and_balanced(rows, prompts, audit.samples, balanced=scenario.outcome.pairwise),
            judged_variations(rows, scenario),
            parse_rate(rows, audit.parse_floor, scenario.outcome.words.valued),
        ]
        figures = cost(work) | mistakes(step.catalogue) | device | _told(rows, how, scorer)
        metadata = _picture(step, rows) | figures
        return step.result("completions", metadata, device["model_fingerprint"], rows, outcomes=outcomes)

    return completions


def _answering(step: Step) -> "Answering":
    """How the answers are had: the settings, and what the scenario says of continuations."""
    from excise.generation.answering import Answering
    from excise.generation.sampling import SamplingParameters
    from excise.generation.settings import Enumeration

    audit, outcome = step.audit, step.scenario.outcome
    parameters = SamplingParameters(
        temperature=audit.temperature,
        top_k=outcome.decoding.top_k,
        top_p=audit.top_p,
        max_new_tokens=outcome.answer_tokens(audit.max_new_tokens),
        seed=audit.seed,
    )
    exact = Enumeration(audit.leftover, audit.max_nodes) if audit.answers == "exact" else None
    return Answering(audit.samples, parameters, exact)


def _require_text(step: Step, loaded: "LoadedModel") -> None:
    """What is wrong with the text for perplexity ends the run before any sampling, where perplexity is measured."""
    if not step.scenario.outcome.pairwise:
        windows_of(loaded, step.audit)


def _told(rows: pl.DataFrame, how: "Answering", scorer: "Scorer | None") -> dict[str, Any]:
    """Metadata: shares of the answers, names, and the scorer."""
    from excise.generation.unpruned import names_told

    figures: dict[str, Any] = {"parse_rate": rows.select(share_with_value()).item()}
    if how.exact is not None:
        figures["leftover"] = rows["leftover"].max() or 0.0
        figures["prompts_sampled_instead"] = rows.filter(pl.col("leftover").is_null())["prompt_id"].n_unique()
    figures["names"] = names_told(rows)
    if scorer is not None:
        figures["scorer"] = f"{scorer.key}: {scorer.measures}"
    return figures


def _picture(step: Step, rows: pl.DataFrame) -> dict[str, dg.MetadataValue]:
    """The answers of both groups, drawn where two are compared and some variation can be judged."""
    from excise.generation.answering import as_samples
    from excise.reporting.figures import answers_by_group

    scenario = step.scenario
    judged = judged_of(rows, scenario) if scenario.outcome.pairwise else []
    if not judged:
        return {}
    figure = answers_by_group(
        as_samples(rows.filter(pl.col("variation").is_in(judged)), step.audit.samples),
        unit=scenario.outcome.counted_in,
        majority=scenario.comparison.majority,
        minority=scenario.comparison.minority,
        scale="log" if scenario.outcome.log_scale else "linear",
    )
    return step.picture("answers_by_group", figure)
