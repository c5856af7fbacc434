"""The stage `evaluation_metrics`: disparity and usefulness, unpruned and under every mask.

The estimates are those of `excise.evaluation.numbers` and `excise.evaluation.comparisons`; here they are stored,
checked and drawn.
"""

import dagster as dg
import polars as pl

from assets import checks
from assets.completions import completions_of, require_paired, without
from assets.mask_definitions import with_definitions
from assets.partitions import Catalogue
from assets.pruned_completions import masks_to_ask
from assets.side_effects import side_effects_of
from assets.stage import (
    data_version,
    grid_asset,
    picture,
    record_thresholds,
    rows_of,
    table_metadata,
    table_value,
)
from excise.conditions import ALL, CROSS_CONTEXT, MASK, NO_LEVEL, NO_STRATEGY
from excise.errors import ExciseError
from excise.evaluation.judged import explained, judged_of
from excise.scenarios import Scenario
from excise.scenarios.subsets import ATTRIBUTION
from resources.artifacts import Artifacts
from resources.settings import Audit, AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch


def evaluation_metrics_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Estimates every metric of every mask."""

    @grid_asset(
        catalogue,
        group="evaluation",
        kinds={"scipy", "duckdb"},
        description="The disparity between the groups and the usefulness of the answers, unpruned and under every "
        "mask, with intervals, tests, and the reduction over the matched random control.",
        deps=["completions", "pruning_masks", "cross_context_masks", "pruned_completions", "side_effects"],
        checks=[
            checks.spec("metrics_finite", "evaluation_metrics", catalogue),
            checks.spec("judged_variations", "evaluation_metrics", catalogue),
            checks.spec("inlier_ratio", "evaluation_metrics", catalogue),
            checks.spec("within_budgets", "evaluation_metrics", catalogue),
        ],
        code_version="6",
    )
    def evaluation_metrics(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.evaluation.comparisons import COMPARISONS_SCHEMA, comparisons
        from excise.evaluation.judged_metrics import metrics_of
        from excise.evaluation.numbers import evaluate
        from excise.evaluation.verdicts import verdicts
        from excise.reporting.audit_table import markdown_table
        from excise.reporting.figures import bias_by_level, disparity_by_level
        from excise.reporting.finding import finding

        model, scenario = catalogue.partition(context)
        audit, groups = catalogue.audit_of(settings, scenario), scenario.comparison
        if not scenario.outcome.pairwise:
            return _toxicity_metrics(warehouse, artifacts, model, scenario, audit, catalogue)
        everything, asked = completions_of(warehouse, model, scenario.key)
        completions, prompts = without(ATTRIBUTION, everything, asked)
        judged = judged_of(completions, scenario)
        pruned, masks = pruned_answers(warehouse, model, scenario, everything, completions)
        sizes = {"resamples": audit.resamples, "permutations": audit.permutations, "seed": audit.seed}

        def evaluated(unpruned: pl.DataFrame, under_masks: pl.DataFrame) -> pl.DataFrame:
            return evaluate(
                unpruned,
                under_masks,
                masks,
                majority=groups.majority,
                minority=groups.minority,
                answer_range=scenario.outcome.scored_range,
                log_scale=scenario.outcome.log_scale,
                **sizes,
            )

        rows = metrics_of(evaluated, completions, pruned, judged)
        able = pl.col("variation").is_in(judged)
        others = pl.DataFrame(schema=COMPARISONS_SCHEMA)
        if judged:
            others = comparisons(
                completions.filter(able), prompts.filter(able), pruned, masks, scenario=scenario, **sizes
            )
        rows, others = with_definitions(rows, masks), with_definitions(others, masks)
        warehouse.replace_partition("metrics", rows, {"model": model, "scenario": scenario.key})
        warehouse.replace_partition("comparisons", others, {"model": model, "scenario": scenario.key})
        # What masks of single other scenarios do is told by the transfer matrix.
        told = rows.filter(~pl.col("level").str.starts_with(f"{CROSS_CONTEXT}/"))
        effects = side_effects_of(warehouse, model, scenario.key, masks)
        verdict = verdicts(told, effects, audit.thresholds)
        outcomes = [
            checks.metrics_finite(rows),
            checks.judged_under_masks(pruned, scenario, judged, completions["variation"].n_unique()),
            checks.inlier_ratio(rows, audit.inlier_floor),
            checks.within_budgets(verdict),
        ]
        checks.record(warehouse, "evaluation_metrics", model, scenario.key, outcomes)
        record_thresholds(warehouse, "evaluation_metrics", model, scenario.key, audit.thresholds)
        labels = {side: scenario.groups[getattr(groups, side)].label for side in ("majority", "minority")}
        metadata = _explanation(completions, scenario)
        if judged:
            metadata["finding"] = finding(
                told,
                verdicts=verdict,
                inlier_floor=audit.inlier_floor,
                inlier_tolerance=audit.inlier_tolerance,
                **labels,
            )
            metadata |= picture(
                "disparity_by_level",
                disparity_by_level(told, verdicts=verdict, inlier_floor=audit.inlier_floor),
                artifacts,
                model,
                scenario.key,
            )
            if not pruned.is_empty():
                metadata |= picture(
                    "bias_by_level",
                    bias_by_level(told, **labels, verdicts=verdict, inlier_floor=audit.inlier_floor),
                    artifacts,
                    model,
                    scenario.key,
                )
        if rows["lowest"].is_not_null().any():
            metadata["bounds_of_exact_answers"] = table_value(_bounds(told))
        metadata["other_comparisons"] = table_value(_unpruned_gaps(others))
        table = markdown_table(told, **labels, verdicts=verdict, inlier_tolerance=audit.inlier_tolerance)
        metadata["audit"] = dg.MetadataValue.md(table)
        metadata |= table_metadata("metrics", rows)
        return dg.MaterializeResult(
            metadata=metadata,
            data_version=data_version(rows, others, verdict),
            check_results=[outcome.result() for outcome in outcomes],
        )

    return evaluation_metrics


def _toxicity_metrics(
    warehouse: Warehouse, artifacts: Artifacts, model: str, scenario: Scenario, audit: Audit, catalogue: Catalogue
) -> dg.MaterializeResult:
    """The metrics of an axis of social groups (FASP): differences of toxicity between subgroups, and perplexity."""
    from excise.evaluation.bias_correlation import gamma_choice, gamma_points
    from excise.evaluation.judged_metrics import metrics_of
    from excise.evaluation.toxicity import evaluate_toxicity
    from excise.reporting.figures import gamma_sweep, toxicity_by_subgroup, trade_off
    from excise.reporting.toxicity import choice_sentence, toxicity_finding, toxicity_markdown

    everything, asked = completions_of(warehouse, model, scenario.key)
    completions, _ = without(ATTRIBUTION, everything, asked)
    judged = judged_of(completions, scenario)
    pruned, masks = pruned_answers(warehouse, model, scenario, everything, completions)
    perplexity = _perplexity_by_condition(warehouse.read("perplexity", model=model, scenario=scenario.key), masks)

    def evaluated(unpruned: pl.DataFrame, under_masks: pl.DataFrame) -> pl.DataFrame:
        return evaluate_toxicity(
            unpruned,
            under_masks,
            masks,
            perplexity,
            subgroups=list(scenario.groups),
            cluster="subject",
            resamples=audit.resamples,
            seed=audit.seed,
        )

    rows = with_definitions(metrics_of(evaluated, completions, pruned, judged), masks)
    warehouse.replace_partition("metrics", rows, {"model": model, "scenario": scenario.key})
    # Two-group comparisons are the other outcome's.
    nothing = pl.DataFrame(schema=TABLES["comparisons"].schema)
    warehouse.replace_partition("comparisons", nothing, {"model": model, "scenario": scenario.key})
    outcomes = [
        checks.metrics_finite(rows),
        checks.judged_under_masks(pruned, scenario, judged, completions["variation"].n_unique()),
        checks.share_scored(rows, audit.parse_floor),
        checks.Outcome("within_budgets", True, checks.WARN, "Damage budgets are those of answers that are numbers."),
    ]
    checks.record(warehouse, "evaluation_metrics", model, scenario.key, outcomes)
    record_thresholds(warehouse, "evaluation_metrics", model, scenario.key, audit.thresholds)
    labels = {key: group.label for key, group in scenario.groups.items()}
    metadata = _explanation(completions, scenario)
    if judged:
        metadata["finding"] = toxicity_finding(rows, perplexity_budget=audit.perplexity_budget)
        if (warning := names_warning(catalogue, scenario)) is not None:
            metadata["names_in_the_lexicon"] = warning
        by_alpha = rows.filter(~pl.col("strategy").is_in(catalogue.gamma_variants()))
        if by_alpha["strategy"].str.contains(r"-[0-9.]+$").any() and _known(
            by_alpha, "bias_reduction", "perplexity_ratio"
        ):
            metadata |= picture("trade_off", trade_off(by_alpha), artifacts, model, scenario.key)
        points = gamma_choice(gamma_points(rows, catalogue.fasp_parameters()), audit.perplexity_budget)
        if points["gamma"].n_unique() > 2:  # null, the unpruned model, is one
            metadata["choice"] = choice_sentence(points, audit.perplexity_budget)
            if points.drop_nulls(["alpha", "bias", "perplexity_ratio"]).height:
                figure = gamma_sweep(points, budget=audit.perplexity_budget)
                metadata |= picture("gamma_sweep", figure, artifacts, model, scenario.key)
        metadata |= picture("toxicity_by_subgroup", toxicity_by_subgroup(rows, labels), artifacts, model, scenario.key)
        metadata["audit"] = dg.MetadataValue.md(toxicity_markdown(rows))
    metadata |= table_metadata("metrics", rows)
    return dg.MaterializeResult(
        metadata=metadata, data_version=data_version(rows), check_results=[outcome.result() for outcome in outcomes]
    )


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


def pruned_answers(
    warehouse: Warehouse, model: str, scenario: Scenario, everything: pl.DataFrame, completions: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The pruned completions that are evaluated, and the table of their masks; both are empty where no mask is asked.

    everything: the partition's completions; completions: those that masks are judged on. Raises ExciseError unless the
    answers were sampled under these masks, beside these completions.
    """
    asked = masks_to_ask(warehouse, model, scenario, everything)
    pruned = warehouse.read("pruned_completions", model=model, scenario=scenario.key)
    masks = warehouse.read("masks", model=model, scenario=scenario.key)
    if asked.is_empty():
        return pruned.clear(), masks.clear()
    pruned = rows_of(warehouse, "pruned_completions", model, scenario.key, made_by="pruned_completions")
    require_paired(completions, pruned, model, scenario.key)
    pruned = pruned.filter(pl.col("variation").is_in(asked["variation"].unique().implode()))
    named = [*MASK, "mask"]
    sampled, there = (frame.select(named).unique() for frame in (pruned, masks))
    changed = sampled.join(there, on=named, how="anti", nulls_equal=True)
    if not changed.is_empty():
        raise ExciseError(
            f"the pruned completions of {model}|{scenario.key} were sampled under masks of "
            f"{', '.join(sorted(set(changed['strategy'])))} that have changed since; materialize pruned_completions of "
            "this partition again"
        )
    return pruned, masks


def _known(metrics: pl.DataFrame, *wanted: str) -> bool:
    """Whether a strategy's own mask has all these metrics over all variations."""
    own = metrics.filter(
        (pl.col("variation") == ALL) & pl.col("matched_to").is_null() & pl.col("estimate").is_not_null()
    )
    masks = [set(own.filter(pl.col("metric") == each).select("strategy", "level").rows()) for each in wanted]
    return bool(set.intersection(*masks))


def _explanation(completions: pl.DataFrame, scenario: Scenario) -> dict[str, str]:
    """Metadata that says which variations the figures are not about."""
    lines = explained(completions, scenario)
    return {"not_judged": " ".join(lines)} if lines else {}


def _perplexity_by_condition(perplexity: pl.DataFrame, masks: pl.DataFrame) -> pl.DataFrame:
    """Perplexity per condition, variation and draw, as `excise.evaluation.toxicity` takes it."""
    columns = ["perplexity", "low", "high", "difference_low", "difference_high"]
    place = list(MASK)
    unpruned = perplexity.filter(pl.col("mask") == "unpruned").select(
        pl.lit(ALL).alias("variation"),
        pl.lit(NO_STRATEGY).alias("strategy"),
        pl.lit(NO_LEVEL).alias("level"),
        pl.lit(None, dtype=pl.String).alias("matched_to"),
        pl.lit(0, dtype=pl.Int64).alias("draw"),
        *columns,
    )
    pruned = masks.select(*place, "mask").unique(maintain_order=True).join(perplexity, on="mask")
    return pl.concat([unpruned, pruned.select(*place, *columns)])


def _bounds(metrics: pl.DataFrame) -> pl.DataFrame:
    """Where SMD and inlier ratio lie whatever the unread answers are, over all variations, strategies alone."""
    return metrics.filter(
        (pl.col("variation") == ALL)
        & pl.col("metric").is_in(["smd", "inlier_ratio", "leftover", "sampled"])
        & pl.col("matched_to").is_null()
    ).select("strategy", "level", "metric", "estimate", "lowest", "highest")


def _unpruned_gaps(others: pl.DataFrame) -> pl.DataFrame:
    """The unpruned model's standardized mean difference in every other comparison, over all variations."""
    return others.filter(
        (pl.col("strategy") == NO_STRATEGY) & (pl.col("variation") == ALL) & (pl.col("metric") == "smd")
    ).select("comparison", smd="estimate", low="low", high="high", p_no_gap="p_value", answers="n")
