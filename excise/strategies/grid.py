"""A grid of thresholds: its points for a model, the answers at every point, and what defines the masks there.

How points are judged, and which one is chosen, is `excise.evaluation.grid`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from excise.attribution import AttributionFile
from excise.conditions import GRID
from excise.evaluation.grid import grid_points, point_label
from excise.evaluation.grid import grid_search as judged_points
from excise.evaluation.judged import compared_groups
from excise.evaluation.numbers import evaluate
from excise.evaluation.scenario_metrics import Draws
from excise.generation.completions import Work
from excise.generation.under_masks import Asking
from excise.progress import Progress
from excise.scenarios.schema import Scenario
from excise.strategies.build import grid_masks
from excise.strategies.config import Strategy

HEADS = 1024
"""The number of heads that counts of a grid refer to."""
NO_CONTROL = {"matched_to": None, "draw": 0}
Point = tuple[float, float]
"""Thresholds of the minority's and of the majority's scores."""


@dataclass
class GridAnswers:
    """Answers at every point, a frame a mask; what each mask prunes; and what the answers cost."""

    frames: list[pl.DataFrame] = field(default_factory=list)
    counts: list[dict[str, object]] = field(default_factory=list)
    work: Work = field(default_factory=Work)


def points_of(strategy: Strategy, taus: Sequence[float], counts: Sequence[int], heads: int) -> dict[Point, Point]:
    """The grid: thresholds as `grid_masks` takes them, and as they are shown (shares of weights, numbers of heads).

    taus: shares of the weights. counts: numbers of heads, of `HEADS`, which are scaled to the model's `heads`.
    """
    if not strategy.of_heads:
        return {point: point for point in grid_points(taus)}
    scaled = sorted({max(1, round(count * heads / HEADS)) for count in counts})
    shown = grid_points(scaled, [0, *scaled])
    if "k_min" in strategy.parameters:
        return {point: point for point in shown}
    # Just above the share that stands for the count, as a share is rounded down to whole heads.
    return {tuple(min(1.0, (count + 0.5) / heads) for count in point): point for point in shown}  # type: ignore[misc]


def grid_answers(
    asking: Asking,
    points: Mapping[str, Mapping[Point, Point]],
    strategies: Sequence[Strategy],
    files: Sequence[AttributionFile],
    prompts: pl.DataFrame,
    so_far: Callable[[int], None],
    progress: Progress,
) -> GridAnswers:
    """The answers to the prompts under the masks of all points. points: by strategy, of `points_of`. so_far: is told
    how many completions there are."""
    made, before = GridAnswers(), 0
    for strategy in strategies:
        shown = points[strategy.key]
        for variation, point, mask in grid_masks(asking.loaded, strategy, files, list(shown), progress=progress):
            rows, cost = asking.answers(
                prompts.filter(pl.col("variation") == variation),
                mask,
                lambda _, done, __, before=before: so_far(before + done),
            )
            place = {"strategy": point_label(strategy.key, *shown[point]), "level": GRID, **NO_CONTROL}
            answers = rows.select("model", "scenario", "variation", "group", "subject", "value")
            made.frames.append(answers.with_columns(pl.lit(value).alias(name) for name, value in place.items()))
            (named,) = rows.select("model", "scenario", "variation").unique().to_dicts()
            made.counts.append({**named, **place, "pruned": mask.count, "size": mask.size})
            made.work, before = made.work + cost, before + rows.height
    return made


def grid_rows(
    completions: pl.DataFrame, made: GridAnswers, scenario: Scenario, draws: Draws, floor: float
) -> pl.DataFrame:
    """Every point's metrics, and which point is chosen, as `excise.evaluation.grid.grid_search` has them.

    floor: least inlier ratio. The grid keeps no p-values, so nothing is permuted.
    """
    majority, minority = compared_groups(scenario)
    metrics = evaluate(
        completions,
        pl.concat(made.frames),
        pl.DataFrame(made.counts, schema_overrides={"matched_to": pl.String}),
        majority=majority,
        minority=minority,
        resamples=draws.resamples,
        permutations=1,
        seed=draws.seed,
    )
    return judged_points(metrics, floor)


def definitions(strategies: Sequence[Strategy], points: Mapping[str, Mapping[Point, Point]]) -> pl.DataFrame:
    """The definition of the masks of every point, by strategy and thresholds as shown: one row per point."""
    rows = []
    for strategy in strategies:
        names = ("k_min", "k_maj") if "k_min" in strategy.parameters else ("tau_min", "tau_maj")
        for point, shown in points[strategy.key].items():
            parameters = strategy.parameters | dict(zip(names, map(float, point), strict=True))
            rows.append((strategy.key, *shown, strategy.model_copy(update={"parameters": parameters}).definition()))
    schema = {"strategy": pl.String, "tau_min": pl.Float64, "tau_maj": pl.Float64, "definition": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")
