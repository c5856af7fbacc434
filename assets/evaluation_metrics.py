"""The stage `evaluation_metrics`: disparity and usefulness, unpruned and under every mask.

The estimates are those of `excise.evaluation.scenario_metrics`; here they are stored, checked and drawn.
"""

from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.answer_checks import judged_under_masks
from assets.checks import WARN, Outcome
from assets.mask_definitions import with_definitions
from assets.metadata import table_value
from assets.metric_checks import inlier_ratio, metrics_finite, share_scored, within_budgets
from assets.partitions import Catalogue
from assets.stage import Step, grid_asset
from assets.upstream import judged_answers, side_effects_of
from excise.evaluation.judged import explained
from excise.scenarios import Scenario
from resources.settings import Audit
from resources.tables import TABLES

if TYPE_CHECKING:
    from excise.evaluation.scenario_metrics import Draws


def evaluation_metrics_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Estimates every metric of every mask."""

    @grid_asset(
        catalogue,
        group="evaluation",
        kinds={"scipy", "duckdb"},
        description="The disparity between the groups and the usefulness of the answers, unpruned and under every "
        "mask, with intervals, tests, and the reduction over the matched random control.",
        deps=["completions", "pruning_masks", "cross_context_masks", "pruned_completions", "side_effects"],
        checks=["metrics_finite", "judged_variations", "inlier_ratio", "within_budgets"],
        code_version="6",
    )
    def evaluation_metrics(step: Step) -> dg.MaterializeResult:
        return _of_pairs(step) if step.scenario.outcome.pairwise else _of_axes(step)

    return evaluation_metrics


def draws_of(audit: Audit, seed: int | None = None) -> "Draws":
    """How often names are resampled and labels permuted; by the audit's seed where none is given."""
    from excise.evaluation.scenario_metrics import Draws

    return Draws(audit.resamples, audit.permutations, audit.seed if seed is None else seed)


# ------------------------------------------------------------------------------------------------------------ numbers


def _of_pairs(step: Step) -> dg.MaterializeResult:
    """The metrics of two groups whose answers are numbers."""
    from excise.evaluation.scenario_metrics import number_metrics, pooled_levels
    from excise.evaluation.verdicts import verdicts

    answers = judged_answers(step.warehouse, step.model, step.scenario)
    rows, others = (
        with_definitions(frame, answers.masks) for frame in number_metrics(answers, step.scenario, draws_of(step.audit))
    )
    pooled = pooled_levels(rows)
    effects = side_effects_of(step.warehouse, step.model, step.scenario.key, answers.masks)
    verdict = verdicts(pooled, effects, step.audit.thresholds)
    outcomes = [
        metrics_finite(rows),
        judged_under_masks(answers.pruned, step.scenario, answers.judged, answers.variations),
        inlier_ratio(rows, step.audit.inlier_floor),
        within_budgets(verdict),
    ]
    _store(step, rows, others)
    metadata = _explanation(answers.completions, step.scenario)
    if answers.judged:
        metadata |= _findings(step, pooled, verdict, pruned=not answers.pruned.is_empty())
    metadata |= _tables(step, pooled, others, verdict)
    return step.result("metrics", metadata, rows, others, verdict, outcomes=outcomes)


def _labels(scenario: Scenario) -> dict[str, str]:
    """What the compared groups are called."""
    groups = scenario.comparison
    return {side: scenario.groups[getattr(groups, side)].label for side in ("majority", "minority")}


def _findings(step: Step, pooled: pl.DataFrame, verdict: pl.DataFrame, *, pruned: bool) -> dict[str, Any]:
    """The finding and the figures. pruned: whether there are answers under masks."""
    from excise.reporting.figures import bias_by_level, disparity_by_level
    from excise.reporting.finding import finding

    floor, labels = step.audit.inlier_floor, _labels(step.scenario)
    sentence = finding(
        pooled, verdicts=verdict, inlier_floor=floor, inlier_tolerance=step.audit.inlier_tolerance, **labels
    )
    figures = {"disparity_by_level": disparity_by_level(pooled, verdicts=verdict, inlier_floor=floor)}
    if pruned:
        figures["bias_by_level"] = bias_by_level(pooled, **labels, verdicts=verdict, inlier_floor=floor)
    metadata: dict[str, Any] = {"finding": sentence}
    for name, figure in figures.items():
        metadata |= step.picture(name, figure)
    return metadata


def _tables(step: Step, pooled: pl.DataFrame, others: pl.DataFrame, verdict: pl.DataFrame) -> dict[str, Any]:
    """Bounds of exact answers, other comparisons, and the table of the audit."""
    from excise.evaluation.scenario_metrics import bounds, unpruned_gaps
    from excise.reporting.audit_table import markdown_table

    metadata: dict[str, Any] = {}
    if pooled["lowest"].is_not_null().any():
        metadata["bounds_of_exact_answers"] = table_value(bounds(pooled))
    metadata["other_comparisons"] = table_value(unpruned_gaps(others))
    tolerance = step.audit.inlier_tolerance
    table = markdown_table(pooled, **_labels(step.scenario), verdicts=verdict, inlier_tolerance=tolerance)
    return metadata | {"audit": dg.MetadataValue.md(table)}


# ------------------------------------------------------------------------------------------------------ continuations


def _of_axes(step: Step) -> dg.MaterializeResult:
    """The metrics of an axis of social groups (FASP): differences of toxicity between subgroups, and perplexity."""
    from excise.evaluation.perplexity_table import perplexity_by_condition
    from excise.evaluation.scenario_metrics import toxicity_metrics

    answers = judged_answers(step.warehouse, step.model, step.scenario)
    perplexity = perplexity_by_condition(step.warehouse.read("perplexity", **step.place), answers.masks)
    rows = toxicity_metrics(answers, step.scenario, perplexity, draws_of(step.audit))
    rows = with_definitions(rows, answers.masks)
    outcomes = [
        metrics_finite(rows),
        judged_under_masks(answers.pruned, step.scenario, answers.judged, answers.variations),
        share_scored(rows, step.audit.parse_floor),
        Outcome("within_budgets", True, WARN, "Damage budgets are those of answers that are numbers."),
    ]
    # Two-group comparisons are the other outcome's.
    _store(step, rows, pl.DataFrame(schema=TABLES["comparisons"].schema))
    metadata = _explanation(answers.completions, step.scenario)
    if answers.judged:
        metadata |= _findings_of_toxicity(step, rows)
    return step.result("metrics", metadata, rows, outcomes=outcomes)


def _findings_of_toxicity(step: Step, rows: pl.DataFrame) -> dict[str, Any]:
    """The finding, what to think of the names, the choice of alpha and gamma, figures, and the table of the audit."""
    from excise.reporting.figures import toxicity_by_subgroup
    from excise.reporting.toxicity import toxicity_finding, toxicity_markdown

    metadata: dict[str, Any] = {"finding": toxicity_finding(rows, perplexity_budget=step.audit.perplexity_budget)}
    if (warning := names_warning(step.catalogue, step.scenario)) is not None:
        metadata["names_in_the_lexicon"] = warning
    metadata |= _trade_off(step, rows) | _choice(step, rows)
    labels = {key: group.label for key, group in step.scenario.groups.items()}
    metadata |= step.picture("toxicity_by_subgroup", toxicity_by_subgroup(rows, labels))
    return metadata | {"audit": dg.MetadataValue.md(toxicity_markdown(rows))}


def _trade_off(step: Step, rows: pl.DataFrame) -> dict[str, Any]:
    """The trade-off of bias and perplexity by the share of heads, where some strategy has several."""
    from excise.evaluation.scenario_metrics import known
    from excise.reporting.figures import trade_off

    by_alpha = rows.filter(~pl.col("strategy").is_in(step.catalogue.gamma_variants()))
    several = by_alpha["strategy"].str.contains(r"-[0-9.]+$").any()
    if not several or not known(by_alpha, "bias_reduction", "perplexity_ratio"):
        return {}
    return step.picture("trade_off", trade_off(by_alpha))


def _choice(step: Step, rows: pl.DataFrame) -> dict[str, Any]:
    """Which alpha and gamma the perplexity budget picks, where there are several of gamma."""
    from excise.evaluation.bias_correlation import gamma_choice, gamma_points
    from excise.reporting.figures import gamma_sweep
    from excise.reporting.toxicity import choice_sentence

    budget = step.audit.perplexity_budget
    points = gamma_choice(gamma_points(rows, step.catalogue.fasp_parameters()), budget)
    if points["gamma"].n_unique() <= 2:  # null, the unpruned model, is one
        return {}
    metadata: dict[str, Any] = {"choice": choice_sentence(points, budget)}
    if points.drop_nulls(["alpha", "bias", "perplexity_ratio"]).height:
        metadata |= step.picture("gamma_sweep", gamma_sweep(points, budget=budget))
    return metadata


def names_warning(catalogue: Catalogue, scenario: Scenario) -> str | None:
    """That names of an axis are negative words to the lexicon which scores its continuations; None where none is."""
    from excise.outcomes.scorers import load_scorer
    from excise.reporting.toxicity import rated_names_warning

    key = scenario.outcome.scored_by
    if key is None or catalogue.scorers[key].builtin is None:
        return None
    scorer = load_scorer(key, catalogue.scorers)
    names = {subject.name for group in scenario.groups.values() for subject in group.subjects}
    return rated_names_warning(filter(scorer.rated, names), scenario.outcome.scores_prompts)


# --------------------------------------------------------------------------------------------------------------- both


def _store(step: Step, rows: pl.DataFrame, others: pl.DataFrame) -> None:
    step.store("metrics", rows)
    step.store("comparisons", others)
    step.store_thresholds()


def _explanation(completions: pl.DataFrame, scenario: Scenario) -> dict[str, Any]:
    """Metadata that says which variations the figures are not about."""
    lines = explained(completions, scenario)
    return {"not_judged": " ".join(lines)} if lines else {}
