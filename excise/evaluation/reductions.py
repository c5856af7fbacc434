"""What a mask changed about a gap: its change, how much of it went, who moved, and whether that may be chance.

Every change is told from cells (`cells`) under the mask and of the unpruned model, paired by their resamples. Not here:
the table they are rows of (`numbers`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from excise.conditions import ALL, Condition
from excise.evaluation import metrics as m
from excise.evaluation import permutation
from excise.evaluation.cells import SIGNS, Cell, Names
from excise.evaluation.rows import excludes_zero, mean_over_draws, over_variations, reduction_of, scaled_by


@dataclass(frozen=True)
class Unpruned:
    """The unpruned model's cells, the scale of each variation, and the variations that stand out, by metric."""

    cells: dict[str, Cell]
    scale: dict[str, float]
    standing: dict[str, list[str]]

    def answered(self, metric: str, variations: Iterable[str]) -> list[str]:
        """Those of the variations which the unpruned model answered, so that "(all)" counts them."""
        return [variation for variation in variations if self.cells[variation].has(metric)]


def changes_of(
    variations: list[str],
    unpruned: Unpruned,
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
            strategy_reduction = _joint_reduction(matched, metric, unpruned, by_variation, size, seed)
            random = _joint_reduction(matched, metric, unpruned, controls, size, seed)
            result[over_random] = None if strategy_reduction is None or random is None else strategy_reduction - random
    return result


def _joint_reduction(
    variations: list[str],
    metric: str,
    unpruned: Unpruned,
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
    unpruned: Unpruned,
    pruned: dict[str, list[Cell]],
    scale: dict[str, float],
    seed: int,
    reduction: np.ndarray | None,
) -> dict[str, np.ndarray | None]:
    """closed_by_majority and closed_by_minority over one variation or several; None where there is no reduction."""
    chosen = unpruned.answered("gap_mean", variations)
    closed: dict[str, np.ndarray | None] = {}
    for side, towards in (("majority", 1.0), ("minority", -1.0)):
        metric = f"mean_{side}"
        went: np.ndarray | float = 0.0
        whole: np.ndarray | float = 0.0
        for v in chosen if reduction is not None else ():
            before = unpruned.cells[v].measures
            after = mean_over_draws([cell.measures[metric] for cell in pruned[v]], seed)
            moved = m.exact_difference(before[metric], after) * towards * np.sign(before["gap_mean"])
            went = went + scaled_by(moved, scale[v])
            whole = whole + scaled_by(np.abs(before["gap_mean"]), scale[v])
        with np.errstate(invalid="ignore", divide="ignore"):
            closed[f"closed_by_{side}"] = None if reduction is None else np.where(whole > 0, went / whole, np.nan)
    return closed


def gap_tests(
    unpruned: Unpruned,
    conditions: dict[Condition, dict[str, list[Cell]]],
    names: Names,
    permutations: int,
    seed: int,
) -> dict[tuple[Condition, str], float]:
    """p-values of "the gap is as unpruned" for every (condition, variation) and (condition, "(all)")."""
    keys: list[tuple[Condition, str]] = []
    columns: list[np.ndarray] = []
    undefined = np.full(sum(map(len, names.subjects)), np.nan)
    for condition, by_variation in conditions.items():
        contributions = {
            variation: _gap_contributions(unpruned.cells[variation], cells) for variation, cells in by_variation.items()
        }
        chosen = unpruned.answered("gap_mean", contributions)
        scaled = [scaled_by(contributions[variation], unpruned.scale[variation]) for variation in chosen]
        contributions[ALL] = np.mean(scaled, axis=0) if scaled else undefined
        keys += [(condition, variation) for variation in contributions]
        columns += contributions.values()
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
