"""From completions to the metrics table: `evaluate` compares an unpruned model's answers with those under every mask.

The arithmetic itself (metrics, resampling, tests) is in `metrics`; sampling, masks and drawing are elsewhere, too.
Every number stands beside an interval from resampled names, and the same resampled names serve the unpruned model, all
masks and all variations, so that a reduction is a paired comparison and never one of two separate uncertainties.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl

from excise.conditions import ALL, COLUMNS, RANDOM, UNPRUNED, Condition
from excise.errors import ExciseError
from excise.evaluation import bootstrap, permutation
from excise.evaluation import metrics as m
from excise.evaluation.cells import (
    COMPLETIONS,
    LABELS,
    SIGNS,
    Cell,
    Measuring,
    Names,
    cell_of,
    names_of,
    require_table,
    samples_of,
    single_value,
)
from excise.evaluation.distributions import GroupAnswers, both_groups
from excise.evaluation.rows import (
    MetricRows,
    answers_counted,
    bounds_overall,
    excludes_zero,
    mean_bounds,
    mean_over_draws,
    names_behind,
    over_draws,
    over_variations,
    reduction_of,
    scale_of,
    scaled_by,
)

_PRUNED = (*COMPLETIONS, *COLUMNS, "draw")
_MASKS = ("model", "scenario", "variation", *COLUMNS, "draw", "pruned", "size")


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
            found = samples_of(frame, groups, names, f"{scenario}/{variation}")
            samples[variation] = found.counted
            bounds[variation] = bootstrap.weighted_quantiles(
                bootstrap.pooled(*found.counted), names.stacked, inlier_quantiles
            )
            references[variation] = None if found.exact is None else both_groups(*found.exact)
            unpruned[variation] = cell_of(found, names, bounds[variation], references[variation], None, measuring)
        conditions: dict[Condition, dict[str, list[Cell]]] = {}
        parts = (
            {}
            if pruned.is_empty()
            else pruned.sort("draw", maintain_order=True).partition_by(
                *COLUMNS, "variation", "draw", as_dict=True, maintain_order=True
            )
        )
        for (*condition, variation, draw), frame in parts.items():
            where = f"{scenario}/{variation}, {' '.join(str(part) for part in condition if part)}, draw {draw}"
            if variation not in unpruned:
                raise ExciseError(f"{where}: no unpruned completions to compare with; sample the unpruned model first")
            found = samples_of(frame, groups, names, where)
            cell = cell_of(found, names, bounds[variation], references[variation], unpruned[variation], measuring)
            conditions.setdefault(tuple(condition), {}).setdefault(variation, []).append(cell)
        table = MetricRows(model, scenario, names.resampled)
        scale = {variation: scale_of(pair) for variation, pair in samples.items()}
        standing = _unpruned_rows(table, unpruned, samples, scale, winsorize, permutations, seed)
        densities = mask_densities(masks, model, scenario)
        before = _Unpruned(unpruned, scale, standing)
        _pruned_rows(table, before, conditions, densities, names, permutations, seed)
        return table.frame()


def mask_densities(masks: pl.DataFrame, model: str, scenario: str) -> dict[tuple, list[float]]:
    """Pruned share of the weights per (condition, variation), one for each draw."""
    if masks.is_empty():
        return {}
    require_table(masks, _MASKS, "masks")
    keys = [*COLUMNS, "variation", "draw"]
    own = masks.filter((pl.col("model") == model) & (pl.col("scenario") == scenario))
    sums = own.group_by(keys, maintain_order=True).agg(pl.col("pruned").sum(), pl.col("size").sum())
    result: dict[tuple, list[float]] = {}
    for *condition, variation, _draw, count, size in sums.select(*keys, "pruned", "size").iter_rows():
        if size:
            result.setdefault((tuple(condition), variation), []).append(count / size)
    return result


@dataclass(frozen=True)
class _Unpruned:
    """The unpruned model's cells, the scale of each variation, and the variations that stand out, by metric."""

    cells: dict[str, Cell]
    scale: dict[str, float]
    standing: dict[str, list[str]]

    def answered(self, metric: str, variations: Iterable[str]) -> list[str]:
        """Those of the variations which the unpruned model answered, so that "(all)" counts them."""
        return [variation for variation in variations if self.cells[variation].has(metric)]


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
        values = over_variations(metric, [cells[variation].measures[metric] for variation in chosen])
        p_value = None
        if metric in permuted and values is not None and names >= 2:
            size = scale if metric == "gap_mean" else dict.fromkeys(scale, 1.0)
            p_value = permutation.permutation_p_value(
                float(np.mean([scaled_by(cells[each].measures[metric], size[each])[0] for each in chosen])),
                np.mean([scaled_by(permuted[metric][each], size[each]) for each in chosen], axis=0),
            )
        n = sum(answers_counted(cell, metric) for cell in cells.values())
        limits = mean_bounds(metric, [cells[variation] for variation in chosen])
        table.add(ALL, UNPRUNED, metric, values, n, p_value, limits, names)
    table.add(ALL, UNPRUNED, "density", 0.0, 0)
    return {
        metric: permutation.rejected(dict(zip(found, permutation.holm(list(found.values())), strict=True)))
        for metric, found in p_values.items()
    }


def _pruned_rows(
    table: MetricRows,
    unpruned: _Unpruned,
    conditions: dict[Condition, dict[str, list[Cell]]],
    densities: dict[tuple, list[float]],
    names: Names,
    permutations: int,
    seed: int,
) -> None:
    tests = _gap_tests(unpruned, conditions, names, permutations, seed)
    for condition, by_variation in conditions.items():
        strategy, level, matched_to = condition
        # A control has as many weights per matrix as its strategy's mask, so the same random masks are matched to it.
        controls = {} if strategy == RANDOM else conditions.get((RANDOM, level, matched_to or strategy), {})
        rows: dict[str, dict[str, np.ndarray]] = {}
        total: dict[str, int] = {}

        def behind(metric: str, variations: Iterable[str], by_variation=by_variation) -> int:
            cells = [cell for each in variations for cell in by_variation[each]]
            if metric.endswith(("_change", "_rise")) or "reduction" in metric or metric.startswith("closed_by"):
                cells += [unpruned.cells[each] for each in variations]
            return names_behind(cells, metric)

        for variation, cells in by_variation.items():
            values = {
                metric: over_draws(metric, [cell.measures[metric] for cell in cells], seed)
                for metric in cells[0].measures
            }
            values |= _changes([variation], unpruned, by_variation, controls, {variation: 1.0}, seed)
            for metric, array in values.items():
                n = sum(answers_counted(cell, metric) for cell in cells)
                p_value = tests.get((condition, variation)) if metric == "gap_mean" else None
                limits = mean_bounds(metric, cells)
                table.add(variation, condition, metric, array, n, p_value, limits, behind(metric, [variation]))
                rows.setdefault(metric, {})[variation] = array
                total[metric] = total.get(metric, 0) + n
            shares = densities.get((condition, variation), [])
            table.add(variation, condition, "density", float(np.mean(shares)) if shares else None, len(shares))
        # reductions over all variations are ratios of sums, not means of ratios
        overall = _changes(list(by_variation), unpruned, by_variation, controls, unpruned.scale, seed)
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
        shares = [densities[condition, variation] for variation in by_variation if (condition, variation) in densities]
        density = float(np.mean([np.mean(part) for part in shares])) if shares else None
        table.add(ALL, condition, "density", density, sum(map(len, shares)))


def _changes(
    variations: list[str],
    unpruned: _Unpruned,
    by_variation: dict[str, list[Cell]],
    controls: dict[str, list[Cell]],
    scale: dict[str, float],
    seed: int,
) -> dict[str, np.ndarray | None]:
    """gap_change and the reductions, over one variation or several, each [resamples + 1]; None: nothing to reduce.

    Without matched random draws for these variations there is no reduction over random.
    """
    changes = [
        mean_over_draws(
            [
                np.abs(unpruned.cells[v].measures["gap_mean"]) - np.abs(cell.measures["gap_mean"])
                for cell in by_variation[v]
            ],
            seed,
        )
        for v in unpruned.answered("gap_mean", variations)
    ]
    result: dict[str, np.ndarray | None] = {"gap_change": over_variations("gap_change", changes)}
    matched = [v for v in variations if v in controls]
    for metric, reduction, over_random, size in (
        ("gap_mean", "gap_reduction", "reduction_over_random", scale),
        ("smd", "smd_reduction", "smd_reduction_over_random", dict.fromkeys(variations, 1.0)),
    ):
        result[reduction] = _joint_reduction(variations, metric, unpruned, by_variation, size, seed)
        if metric == "gap_mean":
            result |= _closed_by(variations, unpruned, by_variation, size, seed, result[reduction])
        if matched:
            own = _joint_reduction(matched, metric, unpruned, by_variation, size, seed)
            random = _joint_reduction(matched, metric, unpruned, controls, size, seed)
            result[over_random] = None if own is None or random is None else own - random
    return result


def _joint_reduction(
    variations: list[str],
    metric: str,
    unpruned: _Unpruned,
    pruned: dict[str, list[Cell]],
    scale: dict[str, float],
    seed: int,
) -> np.ndarray | None:
    """1 - sum over variations |pruned| / sum |unpruned|, divided by the variation's scale. None: nothing to reduce, or
    one of them is undefined or collapsed."""
    chosen = unpruned.answered(metric, variations)
    if not chosen or any(cell.collapsed for v in chosen for cell in pruned[v]):
        return None
    before = [scaled_by(unpruned.cells[v].measures[metric], scale[v]) for v in chosen]
    standing = len(chosen) > 1 and not set(unpruned.standing[metric]).isdisjoint(chosen)
    if not standing and not excludes_zero(np.mean(before, axis=0)):
        return None
    after = [
        scaled_by(mean_over_draws([np.abs(cell.measures[metric]) for cell in pruned[v]], seed), scale[v])
        for v in chosen
    ]
    return reduction_of(np.sum(np.abs(before), axis=0), np.sum(after, axis=0))


def _closed_by(
    variations: list[str],
    unpruned: _Unpruned,
    pruned: dict[str, list[Cell]],
    scale: dict[str, float],
    seed: int,
    reduction: np.ndarray | None,
) -> dict[str, np.ndarray | None]:
    """closed_by_majority and closed_by_minority over one variation or several; None where there is no reduction."""
    chosen = unpruned.answered("gap_mean", variations)
    found: dict[str, np.ndarray | None] = {}
    for side, towards in (("majority", 1.0), ("minority", -1.0)):
        metric, went, whole = f"mean_{side}", 0.0, 0.0
        for v in chosen if reduction is not None else ():
            before = unpruned.cells[v].measures
            after = mean_over_draws([cell.measures[metric] for cell in pruned[v]], seed)
            moved = m.exact_difference(before[metric], after) * towards * np.sign(before["gap_mean"])
            went = went + scaled_by(moved, scale[v])
            whole = whole + scaled_by(np.abs(before["gap_mean"]), scale[v])
        with np.errstate(invalid="ignore", divide="ignore"):
            found[f"closed_by_{side}"] = None if reduction is None else np.where(whole > 0, went / whole, np.nan)
    return found


def _gap_tests(
    unpruned: _Unpruned,
    conditions: dict[Condition, dict[str, list[Cell]]],
    names: Names,
    permutations: int,
    seed: int,
) -> dict[tuple[Condition, str], float]:
    """p-values of "the gap is as unpruned" for every (condition, variation) and (condition, "(all)")."""
    keys, columns = [], []
    undefined = np.full(sum(map(len, names.subjects)), np.nan)
    for condition, by_variation in conditions.items():
        found = {
            variation: _gap_contributions(unpruned.cells[variation], cells) for variation, cells in by_variation.items()
        }
        chosen = unpruned.answered("gap_mean", found)
        scaled = [scaled_by(found[variation], unpruned.scale[variation]) for variation in chosen]
        found[ALL] = np.mean(scaled, axis=0) if scaled else undefined
        keys += [(condition, variation) for variation in found]
        columns += found.values()
    if not columns:
        return {}
    p_values = permutation.sign_flip_p_values(np.stack(columns, axis=1), permutations, [seed, SIGNS])
    return dict(zip(keys, p_values, strict=True))


def _gap_contributions(before: Cell, after: list[Cell]) -> np.ndarray:
    """What each name adds to the change of the gap, its answers averaged over the draws; NaN if a group has no two
    names with both answers."""
    changes = []
    for group, unpruned in enumerate(before.name_means):
        drawn = np.array([cell.name_means[group] for cell in after])
        defined = ~np.isnan(drawn)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            pruned = np.where(defined, drawn, 0).sum(axis=0) / defined.sum(axis=0)
        change = m.exact_difference(pruned, unpruned)
        known = ~np.isnan(pruned) & ~np.isnan(unpruned)
        changes.append(np.where(known & ~np.isfinite(change), np.inf, change))
    if min(int((~np.isnan(change)).sum()) for change in changes) < 2:
        return np.full(sum(map(len, changes)), np.nan)
    return permutation.gap_contributions(*changes)
