"""From completions to the metrics table: `evaluate` compares an unpruned model's answers with those under every mask.

The arithmetic itself (metrics, resampling, tests) is in `metrics`, what a mask changed is in `reductions`; sampling,
masks and drawing are elsewhere, too.
Every number stands beside an interval from resampled names, and the same resampled names serve the unpruned model, all
masks and all variations, so that a reduction is a paired comparison and never one of two separate uncertainties.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import polars as pl

from excise.conditions import ALL, COLUMNS, RANDOM, UNPRUNED, Condition
from excise.errors import ExciseError
from excise.evaluation import bootstrap, permutation
from excise.evaluation.cells import (
    COMPLETIONS,
    LABELS,
    Cell,
    Measuring,
    Names,
    cell_of,
    names_of,
    require_table,
    samples_of,
    single_value,
)
from excise.evaluation.densities import mask_densities
from excise.evaluation.distributions import GroupAnswers, both_groups
from excise.evaluation.reductions import Unpruned, changes_of, gap_tests
from excise.evaluation.rows import (
    MetricRows,
    answers_counted,
    bounds_overall,
    mean_bounds,
    names_behind,
    over_draws,
    over_variations,
    scale_of,
    scaled_by,
)

_PRUNED = (*COMPLETIONS, *COLUMNS, "draw")


# A function for notebooks, too: settings by name, each with a default or an error of its own.
def evaluate(
    completions: pl.DataFrame,
    pruned: pl.DataFrame,
    masks: pl.DataFrame,
    *,
    majority: str,
    minority: str,
    winsorize=(0.05, 0.95),
    inlier_quantiles: tuple[float, float] = (0.05, 0.95),
    resamples: int = 2000,
    permutations: int = 9999,
    seed: int = 0,
    answer_range: tuple[float, float] | None = None,
    log_scale: bool = False,
) -> pl.DataFrame:
    """The metrics of one model and scenario: long frame with the columns of `SCHEMA` (method, A1 and C).

    completions, pruned, masks: the tables of those names; `pruned` and `masks` may be empty. majority, minority: keys
    in the column `group`; other groups are left out. Answers that are null or not finite are unparsed. Enumerated
    answers (`excise.generation.enumeration`: a column probability that is not null) count by their probability, all
    names alike; a name's leftover answers are taken to be distributed as its known ones. answer_range: where those
    answers lie if they are numbers (`outcome.scored_range`), for the bounds. log_scale: differences of answers are told
    by their logarithms (`outcome.scale`); it decides excess_change alone.

    Rows: one per variation, condition (strategy, level, matched_to) and metric, and those of the condition over all
    variations, "(all)". Nothing is NaN or infinite: what cannot be computed is null.
      * estimate: of all answers; for several draws of a control, the mean over the draws, null where one lacks it.
      * low, high: 95 % percentile interval over resampled names (and draws, if several). Null if a group has one name,
        and then so is every reduction; null, too, where more than 5 % of the resamples are undefined. The inlier bounds
        are those of the resampled unpruned answers.
      * smd: null, not 0, where the means differ and no group's answers vary (`metrics.standardized`). Clipping at the
        5th and 95th percentile takes the variation of groups nearly all of whose answers are equal.
      * abs_gap_mean: |gap_mean|. Its interval is of absolute values, which never reach below 0: near 0 they are too
        large by noise, so whether there is a gap is told by the interval and the test of gap_mean.
      * spread_ratio (pruned conditions): standard deviation of a group's answers over the unpruned one of the group
        that had less, the smaller of the groups', and the smallest over draws and variations. A closed gap leaves the
        groups one distribution, so the group that varied more may come to vary as the other did; by its own measure the
        model from before a bias was put in would be damaged. Clipped like the SMD; where that leaves the unpruned
        answers no deviation, neither is clipped. Null where the unpruned answers do not vary.
      * commonest_answer: share of the commonest parsed answer, both groups together. commonest_rise (pruned
        conditions): that less the unpruned share of the group in which it was larger, for the same reason; the largest
        over draws and variations.
      * excess_change (pruned conditions): how far the groups' answers moved beyond what closing the gap took, in
        unpruned standard deviations within groups, on the scenario's scale; the largest over draws and variations.
        (W_majority + W_minority - max(0, |gap unpruned| - |gap pruned|)) / (2 deviation), W the Earth mover's distance
        of a group's answers from its unpruned ones. 0 where each group moved as a whole towards the other until the
        gap was closed; a collapse, a drift of both groups and an overshoot make it large.
      * closed_by_majority, closed_by_minority (pruned conditions): how the gap closed. Shares of the unpruned gap that
        went as the majority's mean moved towards the minority's, and the other way round; together they are 1 less the
        signed gap over the unpruned one. Over variations as gap_reduction; null where that has nothing to reduce.
      * gap_reduction = 1 - |gap pruned| / |gap unpruned| and smd_reduction likewise. Null where the interval of the
        unpruned gap (SMD) covers 0: there is nothing to reduce, and the share of nothing means nothing. Null where the
        answers collapsed (spread_ratio below `thresholds.COLLAPSED_SPREAD`, or too few answers to tell): a model that
        says the same to everybody has no gap, and no use. The threshold lies well above 0, so that a few answers beside
        the one figure, or two figures close together, are no way around it. gap_change, in the outcome's unit, is
        always given. reduction_over_random and smd_reduction_over_random: minus the mean reduction of the random draws
        matched to this strategy at this level (to a control: those of its strategy); null where one of them collapsed.
        A reduction without an interval is null, too.
      * p_value on gap_mean of a pruned condition: the gap is as unpruned (`permutation.paired_permutation_test`; for
        several draws with each name's mean over draws). On gap_mean and smd of the unpruned model: the gap is 0 (names
        permuted between the groups). Null if a group has one name. p_holm: adjusted over the variations of a condition.
        Neither depends on which other masks are evaluated.
      * n: answers counted (parsed ones, except for inlier_ratio and parse_rate; of all draws; distinct ones where
        they were enumerated); masks for density.
      * names: of the group that has fewer, the names with a parsed answer (inlier_ratio, parse_rate: the names asked),
        the fewest over draws, variations and, for changes and reductions, the unpruned answers. Null for density.
      * lowest, highest: of enumerated answers, where the estimate lies whatever the leftover answers are; else null.
        Not of medians, distances, absolute values and reductions. Metrics leftover and sampled: the mean leftover mass,
        and the share of prompts that were sampled as the model rambles.
    "(all)" is the mean over the variations the condition has, in the unit of the metric. A variation to which the
    unpruned model gave a group no parsed answer (no two, for smd and spread_ratio) is left out; otherwise "(all)" is
    null where one of the variations lacks the metric, as a mean of the others would hide just that one. Only
    gap_reduction and the p_value of gap_mean first divide each variation's gap by the mean size of its unpruned
    answers, so that cars do not swamp chairs: 1 - sum |gap pruned| / sum |gap unpruned|. There is nothing to reduce
    where the interval of the mean of the scaled signed gaps covers 0 and no variation's own test, adjusted by Holm,
    finds a gap (`metrics.rejected`), as gaps of opposite sign cancel in the mean; likewise smd_reduction
    (1 - sum |SMD pruned| / sum |SMD unpruned|) and the mean SMD.

    Raises ExciseError for missing columns, more than one model or scenario, and a variation without a group's answers.
    """
    if majority == minority:
        raise ExciseError(f"evaluate: majority and minority are both {majority!r}; name two groups")
    if resamples < 1 or permutations < 1:
        raise ExciseError(f"evaluate: resamples ({resamples}) and permutations ({permutations}) must be at least 1")
    require_table(completions, COMPLETIONS, "completions")
    groups = (majority, minority)
    model, scenario = single_value(completions, "model"), single_value(completions, "scenario")
    if not pruned.is_empty():
        require_table(pruned, _PRUNED, "pruned completions")
        if (single_value(pruned, "model"), single_value(pruned, "scenario")) != (model, scenario):
            raise ExciseError(f"evaluate: the pruned completions are not those of {model}, {scenario}")

    names = names_of(completions, groups, scenario, resamples, seed)
    unpruned: dict[str, Cell] = {}
    samples: dict[str, tuple[bootstrap.NamedAnswers, bootstrap.NamedAnswers]] = {}
    bounds: dict[str, np.ndarray] = {}
    references: dict[str, GroupAnswers | None] = {}
    measuring = Measuring(winsorize, inlier_quantiles, answer_range, log_scale)
    with np.errstate(over="ignore", invalid="ignore"):  # absurdly large answers end as null
        for (variation,), frame in completions.partition_by("variation", as_dict=True, maintain_order=True).items():
            answers = samples_of(frame, groups, names, f"{scenario}/{variation}")
            samples[variation] = answers.counted
            bounds[variation] = bootstrap.weighted_quantiles(
                bootstrap.pooled(*answers.counted), names.stacked, inlier_quantiles
            )
            references[variation] = None if answers.exact is None else both_groups(*answers.exact)
            unpruned[variation] = cell_of(answers, names, bounds[variation], references[variation], None, measuring)
        conditions: dict[Condition, dict[str, list[Cell]]] = {}
        parts = (
            {}
            if pruned.is_empty()
            else pruned.sort("draw", maintain_order=True).partition_by(
                *COLUMNS, "variation", "draw", as_dict=True, maintain_order=True
            )
        )
        for (*names_of_mask, variation, draw), frame in parts.items():
            where = f"{scenario}/{variation}, {' '.join(str(part) for part in names_of_mask if part)}, draw {draw}"
            if variation not in unpruned:
                raise ExciseError(f"{where}: no unpruned completions to compare with; sample the unpruned model first")
            answers = samples_of(frame, groups, names, where)
            cell = cell_of(answers, names, bounds[variation], references[variation], unpruned[variation], measuring)
            conditions.setdefault(Condition(*names_of_mask), {}).setdefault(variation, []).append(cell)
        table = MetricRows(model, scenario, names.resampled)
        scale = {variation: scale_of(pair) for variation, pair in samples.items()}
        standing = _unpruned_rows(table, unpruned, samples, scale, winsorize, permutations, seed)
        densities = mask_densities(masks, model, scenario)
        before = Unpruned(unpruned, scale, standing)
        _pruned_rows(table, before, conditions, densities, names, permutations, seed)
        return table.frame()


def _unpruned_rows(
    table: MetricRows,
    cells: dict[str, Cell],
    samples: dict[str, tuple[bootstrap.NamedAnswers, bootstrap.NamedAnswers]],
    scale: dict[str, float],
    winsorize,
    permutations: int,
    seed: int,
) -> dict[str, list[str]]:
    """Add the rows of the unpruned model; returns the variations that stand out by gap_mean and by smd."""
    first = next(iter(samples.values()))
    labels = permutation.permuted_groups(first[0].names, first[1].names, permutations, [seed, LABELS]).astype(
        np.float64
    )
    relabelled = (labels, 1.0 - labels)
    permuted: dict[str, dict[str, np.ndarray]] = {"gap_mean": {}, "smd": {}}
    p_values: dict[str, dict[str, float]] = {"gap_mean": {}, "smd": {}}
    for variation, pair in samples.items():
        both, cell = bootstrap.pooled(*pair), cells[variation]
        permuted["gap_mean"][variation] = bootstrap.weighted_mean(both, relabelled[0]) - bootstrap.weighted_mean(
            both, relabelled[1]
        )
        permuted["smd"][variation] = bootstrap.weighted_smd(both, both, relabelled, winsorize)
        for metric, values in cell.measures.items():
            names = names_behind([cell], metric)
            p_value = None
            if metric in permuted and names >= 2:
                p_value = permutation.permutation_p_value(values[0], permuted[metric][variation])
                p_values[metric][variation] = p_value
            table.add(
                variation,
                UNPRUNED,
                metric,
                values,
                answers_counted(cell, metric),
                p_value,
                cell.bounds.get(metric),
                names,
            )
        table.add(variation, UNPRUNED, "density", 0.0, 0)
    for metric in next(iter(cells.values())).measures:
        chosen = [variation for variation in cells if cells[variation].has(metric)]
        names = names_behind([cells[variation] for variation in chosen], metric)
        mean = over_variations(metric, [cells[variation].measures[metric] for variation in chosen])
        p_value = None
        if metric in permuted and mean is not None and names >= 2:
            size = scale if metric == "gap_mean" else dict.fromkeys(scale, 1.0)
            p_value = permutation.permutation_p_value(
                float(
                    np.mean([scaled_by(cells[variation].measures[metric], size[variation])[0] for variation in chosen])
                ),
                np.mean([scaled_by(permuted[metric][variation], size[variation]) for variation in chosen], axis=0),
            )
        n = sum(answers_counted(cell, metric) for cell in cells.values())
        limits = mean_bounds(metric, [cells[variation] for variation in chosen])
        table.add(ALL, UNPRUNED, metric, mean, n, p_value, limits, names)
    table.add(ALL, UNPRUNED, "density", 0.0, 0)
    return {
        metric: permutation.rejected(
            dict(zip(by_variation, permutation.holm(list(by_variation.values())), strict=True))
        )
        for metric, by_variation in p_values.items()
    }


def _pruned_rows(
    table: MetricRows,
    unpruned: Unpruned,
    conditions: dict[Condition, dict[str, list[Cell]]],
    densities: dict[tuple, list[float]],
    names: Names,
    permutations: int,
    seed: int,
) -> None:
    tests = gap_tests(unpruned, conditions, names, permutations, seed)
    for condition, by_variation in conditions.items():
        # A control has as many weights per matrix as its strategy's mask, so the same random masks are matched to it.
        controls = {} if condition.strategy == RANDOM else conditions.get(condition.control, {})
        rows: dict[str, dict[str, np.ndarray]] = {}
        total: dict[str, int] = {}

        def behind(metric: str, variations: Iterable[str], by_variation=by_variation) -> int:
            cells = [cell for variation in variations for cell in by_variation[variation]]
            if metric.endswith(("_change", "_rise")) or "reduction" in metric or metric.startswith("closed_by"):
                cells += [unpruned.cells[variation] for variation in variations]
            return names_behind(cells, metric)

        for variation, cells in by_variation.items():
            measures = {
                metric: over_draws(metric, [cell.measures[metric] for cell in cells], seed)
                for metric in cells[0].measures
            }
            changes = changes_of([variation], unpruned, by_variation, controls, {variation: 1.0}, seed)
            for metric, array in (measures | changes).items():
                n = sum(answers_counted(cell, metric) for cell in cells)
                p_value = tests.get((condition, variation)) if metric == "gap_mean" else None
                limits = mean_bounds(metric, cells)
                table.add(variation, condition, metric, array, n, p_value, limits, behind(metric, [variation]))
                total[metric] = total.get(metric, 0) + n
            for metric, measure in measures.items():
                rows.setdefault(metric, {})[variation] = measure
            shares = densities.get((condition, variation), [])
            table.add(variation, condition, "density", float(np.mean(shares)) if shares else None, len(shares))
        # reductions over all variations are ratios of sums, not means of ratios
        overall = changes_of(list(by_variation), unpruned, by_variation, controls, unpruned.scale, seed)
        for metric in [*rows, *(metric for metric in overall if metric not in rows)]:
            chosen = unpruned.answered(metric, by_variation)
            values = (
                overall[metric]
                if metric in overall
                else over_variations(metric, [rows[metric][variation] for variation in chosen])
            )
            p_value = tests.get((condition, ALL)) if metric == "gap_mean" else None
            limits = bounds_overall(metric, [by_variation[variation] for variation in chosen])
            table.add(ALL, condition, metric, values, total.get(metric, 0), p_value, limits, behind(metric, chosen))
        parts = [densities[condition, variation] for variation in by_variation if (condition, variation) in densities]
        density = float(np.mean([np.mean(part) for part in parts])) if parts else None
        table.add(ALL, condition, "density", density, sum(map(len, parts)))
