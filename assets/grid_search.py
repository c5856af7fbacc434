"""The stage `grid_search`: what a strategy would do at every pair of thresholds (BDB, Fig. 5).

Scores are there already, so a point costs a selection and its sampling, and a point sampled once is never sampled
again. Not part of an audit: it decides which thresholds a strategy should have.
"""

from collections.abc import Mapping

import dagster as dg
import polars as pl

from assets.completions import completions_of, require_same_model, require_same_prompts, without
from assets.partitions import Catalogue
from assets.pruning_masks import attribution_files_of, require_scores
from assets.stage import (
    data_version,
    grid_asset,
    picture,
    record_thresholds,
    rows_of,
    table_metadata,
    table_value,
)
from excise.conditions import ALL
from excise.errors import ExciseError
from excise.evaluation.judged import explained, judged_of
from excise.evaluation.rounding import floor_text, interval_text, percent_text, ratio_text
from excise.evaluation.table import MISSING, reaches, read_estimate
from excise.evaluation.thresholds import COLLAPSED_SPREAD
from excise.scenarios.subsets import ATTRIBUTION, EVALUATION
from excise.strategies.config import Strategy
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import Audit, AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch

HEADS = 1024
"""The number of heads that grid_counts refers to."""
NO_CONTROL = {"matched_to": None, "draw": 0}


def grid_search_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Samples and judges the model at every point of the grid."""

    @grid_asset(
        catalogue,
        group="analysis",
        kinds={"torch", "duckdb"},
        description="Disparity and usefulness at every pair of thresholds of every strategy that has two: the heat "
        "maps, the front of the points nothing beats, and the point an explicit rule picks.",
        deps=["completions", "attribution_scores"],
        uses_model=True,
        code_version="3",
    )
    def grid_search(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.conditions import GRID
        from excise.evaluation.grid import grid_search as table_of
        from excise.evaluation.grid import point_label
        from excise.evaluation.numbers import evaluate
        from excise.generation.answering import Answering
        from excise.generation.completions import CompletionCache, Work
        from excise.reporting.figures import grid_heat_maps
        from excise.reporting.words import reuse_sentence
        from excise.strategies.build import grid_masks

        model, scenario = catalogue.partition(context)
        audit = catalogue.audit_of(settings, scenario)
        everything, every_prompt = completions_of(warehouse, model, scenario.key)
        completions, prompts = without(ATTRIBUTION, everything, every_prompt)
        learned, _ = without(EVALUATION, everything, every_prompt)
        there = set(judged_of(completions, scenario))
        variations = [key for key in scenario.variations if key in there][: audit.grid_variations]
        if not variations:
            raise ExciseError(" ".join(explained(completions, scenario)))
        completions = completions.filter(pl.col("variation").is_in(variations))
        how = Answering.of(completions)
        strategies = [
            each
            for each in catalogue.chosen_strategies(audit.strategies, audit.levels, scenario.outcome.kind)
            if each.selection == "set_difference"
        ]
        if not strategies:
            raise ExciseError(
                "resources.settings.config.strategies: a grid needs a strategy with selection set_difference; "
                f"there are {', '.join(_with_thresholds(catalogue))}"
            )
        stored = rows_of(warehouse, "attribution_files", model, scenario.key, made_by="attribution_scores")
        require_scores(stored, {each.score for each in strategies}, everything, learned, model, scenario)
        files = attribution_files_of(stored.filter(pl.col("variation").is_in(variations)), artifacts)
        cache = CompletionCache(artifacts.completion_cache)
        progress = watch.progress(context)
        work, frames, counts = Work(), [], []
        with gpu.model(model, catalogue.models, stage=watch.stage(context)) as loaded:
            require_same_model(completions, loaded.fingerprint, model, scenario.key)
            require_same_prompts(completions, prompts, loaded, scenario)
            heads = loaded.topology.layers * loaded.topology.heads
            points = {each.key: _points(each, audit, heads) for each in strategies}
            each_costs = completions.height // len(variations)
            total, before = sum(map(len, points.values())) * len(variations) * each_costs, 0
            for strategy in strategies:
                shown = points[strategy.key]
                for variation, point, mask in grid_masks(loaded, strategy, files, list(shown), progress=progress):
                    frame, done = how.answers(
                        loaded,
                        prompts.filter(pl.col("variation") == variation),
                        outcome=scenario.outcome,
                        mask=mask,
                        cache=cache,
                        progress=lambda _, done, __, before=before: progress("grid search", before + done, total),
                    )
                    place = {"strategy": point_label(strategy.key, *shown[point]), "level": GRID, **NO_CONTROL}
                    answers = frame.select("model", "scenario", "variation", "group", "subject", "value")
                    frames.append(answers.with_columns(pl.lit(value).alias(name) for name, value in place.items()))
                    pruned = {"pruned": mask.count, "size": mask.size}
                    counts.append({"model": model, "scenario": scenario.key, "variation": variation, **place, **pruned})
                    work, before = work + done, before + frame.height
            device = gpu.report(loaded)
        if not frames:
            raise ExciseError(
                f"{model}|{scenario.key}: no point of the grid has a mask; the check judged_variations of completions "
                "says which answers are too few"
            )
        metrics = evaluate(
            completions,
            pl.concat(frames),
            pl.DataFrame(counts, schema_overrides={"matched_to": pl.String}),
            majority=scenario.comparison.majority,
            minority=scenario.comparison.minority,
            resamples=audit.resamples,
            permutations=1,  # the grid keeps no p-values
            seed=audit.seed,
        )
        rows = table_of(metrics, audit.inlier_floor).join(
            _definitions(strategies, points), on=["strategy", "tau_min", "tau_maj"], how="left", maintain_order="left"
        )
        record_thresholds(warehouse, "grid_search", model, scenario.key, audit.thresholds)
        warehouse.replace_partition("grid_search", rows, {"model": model, "scenario": scenario.key})
        metadata = {}
        for strategy in strategies:
            own = rows.filter(pl.col("strategy") == strategy.key)
            metadata[f"chosen_{strategy.key}"] = chosen_in_words(own, strategy, audit.inlier_floor)
            shown = own if own["variation"].n_unique() == 1 else own.filter(pl.col("variation") == ALL)
            if shown.filter(pl.col("metric").is_in(["smd", "abs_smd", "inlier_ratio"]))["estimate"].count():
                figure = grid_heat_maps(own, inlier_floor=audit.inlier_floor)
                metadata |= picture(f"grid_heat_maps_{strategy.key}", figure, artifacts, model, scenario.key)
        metadata |= table_metadata("grid_search", rows) | {
            "points": sum(map(len, points.values())),
            "variations": ", ".join(variations),
            "reuse": reuse_sentence(work.drawn, work.reused),
            "chosen": table_value(
                rows.filter(pl.col("chosen")).drop("model", "scenario", "pareto", "chosen", "definition")
            ),
        }
        metadata |= work.metadata() | device
        return dg.MaterializeResult(metadata=metadata, data_version=data_version(rows))

    return grid_search


def _with_thresholds(catalogue: Catalogue) -> list[str]:
    return [key for key, strategy in catalogue.strategies.items() if strategy.selection == "set_difference"]


def _points(strategy: Strategy, audit: Audit, heads: int) -> dict[tuple[float, float], tuple[float, float]]:
    """The grid: thresholds as `grid_masks` takes them, and as they are shown (shares of weights, numbers of heads).

    heads: number of heads of the model, to which the counts (of 1,024) are scaled.
    """
    from excise.evaluation.grid import grid_points

    if not strategy.of_heads:
        return {point: point for point in grid_points(audit.grid_taus)}
    counts = sorted({max(1, round(count * heads / HEADS)) for count in audit.grid_counts})
    shown = grid_points(counts, [0, *counts])
    if "k_min" in strategy.parameters:
        return {point: point for point in shown}
    # Just above the share that stands for the count, as a share is rounded down to whole heads.
    return {tuple(min(1.0, (count + 0.5) / heads) for count in point): point for point in shown}


def _definitions(strategies: list[Strategy], points: Mapping[str, Mapping]) -> pl.DataFrame:
    """The definition of the masks of every point, by strategy and thresholds as shown: one row per point."""
    rows = []
    for strategy in strategies:
        names = ("k_min", "k_maj") if "k_min" in strategy.parameters else ("tau_min", "tau_maj")
        for point, shown in points[strategy.key].items():
            parameters = strategy.parameters | dict(zip(names, map(float, point), strict=True))
            rows.append((strategy.key, *shown, strategy.model_copy(update={"parameters": parameters}).definition()))
    schema = TABLES["grid_search"].schema
    names = ("strategy", "tau_min", "tau_maj", "definition")
    return pl.DataFrame(rows, schema={name: schema[name] for name in names}, orient="row")


def chosen_in_words(rows: pl.DataFrame, strategy: Strategy, floor: float) -> str:
    """The point the rule picks for a strategy over all variations of the grid, or why it picks none.

    rows: the strategy's rows of the table `grid_search`. floor: the least inlier ratio.
    """
    rule = f"the smallest raw gap at an inlier ratio of {floor_text(floor)} or more"
    overall = rows.filter(pl.col("variation") == ALL)
    chosen = overall.filter(pl.col("chosen"))
    if chosen.is_empty():
        best = overall.filter((pl.col("metric") == "inlier_ratio") & pl.col("estimate").is_finite())["estimate"].max()
        if not reaches(best, floor):
            highest = ratio_text(best) if best is not None else "unknown"
            return f"No point is chosen: none reaches an inlier ratio of {floor_text(floor)} (highest {highest})."
        spreads = overall.filter(pl.col("metric") == "spread_ratio")["estimate"].drop_nulls()
        if len(spreads) and (spreads < COLLAPSED_SPREAD).all():
            return "No point is chosen: under every mask the answers of a group collapse to one number."
        return (
            "No point is chosen: over all variations no gap is detectable, or at every point of that inlier ratio the "
            "answers of a group collapse to one number."
        )
    figures = {row["metric"]: read_estimate(row) for row in chosen.iter_rows(named=True)}
    tau_min, tau_maj = chosen.row(0, named=True)["tau_min"], chosen.row(0, named=True)["tau_maj"]
    places = "{:.0f} heads and {:.0f} heads" if strategy.of_heads else "{:.0%} and {:.0%} of the weights"
    told = [f"the top {places.format(tau_min, tau_maj)} (minority, majority): {rule}"]
    reduction = figures.get("gap_reduction", MISSING)
    if reduction.value is not None:
        verb = "it removes" if reduction.value > 0 else "it does not reduce the gap: it removes"
        told.append(f"{verb} {percent_text(reduction)} of the raw gap")
    size, ratio = (figures.get(metric, MISSING) for metric in ("abs_smd", "inlier_ratio"))
    told.append(f"mean |SMD| {interval_text(size, decimals=2)}, inlier ratio {ratio_text(ratio.value)}")
    return "; ".join(told) + "."
