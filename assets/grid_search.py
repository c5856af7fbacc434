"""The stage `grid_search`: what a strategy would do at every pair of thresholds (BDB, Fig. 5).

Scores are there already, so a point costs a selection and its sampling, and a point sampled once is never sampled
again. Not part of an audit: it decides which thresholds a strategy should have.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.asking import asking_of
from assets.evaluation_metrics import draws_of
from assets.metadata import cost, table_value
from assets.partitions import Catalogue
from assets.stage import Step, grid_asset
from assets.upstream import (
    completions_of,
    require_same_model,
    require_same_prompts,
    rows_of,
    score_files,
    scores_of,
)
from excise.conditions import ALL
from excise.errors import ExciseError
from excise.evaluation.judged import explained, judged_of
from excise.scenarios.subsets import ATTRIBUTION, without
from excise.strategies.config import Strategy

if TYPE_CHECKING:
    from excise.attribution import AttributionFile
    from excise.strategies.grid import GridAnswers, Point


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
    def grid_search(step: Step) -> dg.MaterializeResult:
        from excise.strategies.grid import definitions, grid_rows

        everything, every_prompt = completions_of(step.warehouse, step.model, step.scenario.key)
        completions, prompts = without(ATTRIBUTION, everything, every_prompt)
        variations = _variations(step, completions)
        completions = completions.filter(pl.col("variation").is_in(variations))
        strategies = _strategies(step)
        files = _files(step, strategies, everything, variations)
        answers, points, device = _asked(step, strategies, files, completions, prompts)
        floor = step.audit.inlier_floor
        rows = grid_rows(completions, answers, step.scenario, draws_of(step.audit), floor).join(
            definitions(strategies, points), on=["strategy", "tau_min", "tau_maj"], how="left", maintain_order="left"
        )
        step.store_thresholds()
        step.store("grid_search", rows)
        counted = {"points": sum(map(len, points.values())), "variations": ", ".join(variations)}
        metadata = _metadata(step, rows, strategies) | counted | cost(answers.work) | device
        return step.result("grid_search", metadata, rows)

    return grid_search


def _variations(step: Step, completions: pl.DataFrame) -> list[str]:
    """The variations of the grid: the first ones that can be judged. Raises ExciseError where there are none."""
    there = set(judged_of(completions, step.scenario))
    variations = [key for key in step.scenario.variations if key in there][: step.audit.grid_variations]
    if not variations:
        raise ExciseError(" ".join(explained(completions, step.scenario)))
    return variations


def _strategies(step: Step) -> list[Strategy]:
    """The chosen strategies with two thresholds. Raises ExciseError where there are none."""
    audit, catalogue = step.audit, step.catalogue
    chosen = catalogue.chosen_strategies(audit.strategies, audit.levels, step.scenario.outcome.audited_as)
    strategies = [strategy for strategy in chosen if strategy.selection == "set_difference"]
    if not strategies:
        able = [key for key, strategy in catalogue.strategies.items() if strategy.selection == "set_difference"]
        raise ExciseError(
            "resources.settings.config.strategies: a grid needs a strategy with selection set_difference; "
            f"there are {', '.join(able)}"
        )
    return strategies


def _files(
    step: Step, strategies: Sequence[Strategy], completions: pl.DataFrame, variations: Sequence[str]
) -> list["AttributionFile"]:
    """The scores of the grid's variations. completions: all of the partition."""
    rows_of(step.warehouse, "attribution_files", step.model, step.scenario.key, made_by="attribution_scores")
    scores = {strategy.score for strategy in strategies}
    stored = scores_of(step.warehouse, step.model, step.scenario, scores, completions)
    return score_files(stored.filter(pl.col("variation").is_in(variations)), step.artifacts)


def _asked(
    step: Step,
    strategies: Sequence[Strategy],
    files: Sequence["AttributionFile"],
    completions: pl.DataFrame,
    prompts: pl.DataFrame,
) -> tuple["GridAnswers", dict[str, dict["Point", "Point"]], dict[str, Any]]:
    """The answers at all points of the completions' variations, the points by strategy, and metadata of the device.

    Raises ExciseError where no point has a mask.
    """
    from excise.generation.answering import Answering
    from excise.strategies.grid import grid_answers, points_of

    audit, progress = step.audit, step.progress
    with step.loaded() as loaded:
        require_same_model(completions, loaded, step.scenario.key)
        require_same_prompts(completions, prompts, loaded, step.scenario)
        heads = loaded.topology.layers * loaded.topology.heads
        points = {
            strategy.key: points_of(strategy, audit.grid_taus, audit.grid_counts, heads) for strategy in strategies
        }
        total = sum(map(len, points.values())) * completions.height
        asking = asking_of(step, loaded, Answering.of(completions))

        def so_far(done: int) -> None:
            progress("grid search", done, total)

        answers = grid_answers(asking, points, strategies, files, prompts, so_far, progress)
        device = step.gpu.report(loaded)
    if not answers.frames:
        raise ExciseError(
            f"{step.model}|{step.scenario.key}: no point of the grid has a mask; the check judged_variations of "
            "completions says which answers are too few"
        )
    return answers, points, device


def _metadata(step: Step, rows: pl.DataFrame, strategies: Sequence[Strategy]) -> dict[str, Any]:
    """The point that is chosen for every strategy, in words and as a table, and the heat maps."""
    from excise.reporting.figures import grid_heat_maps
    from excise.reporting.grid import chosen_in_words

    metadata: dict[str, Any] = {}
    for strategy in strategies:
        of_strategy = rows.filter(pl.col("strategy") == strategy.key)
        metadata[f"chosen_{strategy.key}"] = chosen_in_words(of_strategy, strategy, step.audit.inlier_floor)
        shown = (
            of_strategy if of_strategy["variation"].n_unique() == 1 else of_strategy.filter(pl.col("variation") == ALL)
        )
        if shown.filter(pl.col("metric").is_in(["smd", "abs_smd", "inlier_ratio"]))["estimate"].count():
            figure = grid_heat_maps(of_strategy, inlier_floor=step.audit.inlier_floor)
            metadata |= step.picture(f"grid_heat_maps_{strategy.key}", figure)
    chosen = rows.filter(pl.col("chosen")).drop("model", "scenario", "pareto", "chosen", "definition")
    return metadata | {"chosen": table_value(chosen)}
