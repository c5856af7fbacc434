"""Tests by permutation: whether pruning changes the gap between groups, or groups differ at all.

Names are what is exchanged, never samples (method, A1). Intervals are in `excise.evaluation.bootstrap`.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from excise.errors import ExciseError
from excise.evaluation.bootstrap import NamedAnswers, row_chunks
from excise.evaluation.metrics import floats
from excise.evaluation.thresholds import SIGNIFICANCE

Seed: TypeAlias = int | Sequence[int]


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's step-down adjustment of p-values, same order, capped at 1. NaN stays NaN and is not counted as a test."""
    raw = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(raw.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(raw))
    order = tested[np.argsort(raw[tested], kind="stable")]
    steps = raw[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def rejected(p_holm: Mapping[str, float | None], level: float = SIGNIFICANCE) -> list[str]:
    """What its own test rejects, in its order: those whose p-value, adjusted by `holm`, is below `level`.

    None and NaN: not tested, so not rejected.
    """
    return [key for key, p_value in p_holm.items() if p_value is not None and p_value < level]


def name_means(sample: NamedAnswers) -> np.ndarray:
    """Mean parsed answer of every name, [names]; NaN for a name without any, infinite where the sum overflows."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        means = sample.sums / sample.parsed
    return np.where((sample.parsed > 0) & ~np.isfinite(means), np.inf, means)


def gap_contributions(majority_change: ArrayLike, minority_change: ArrayLike) -> np.ndarray:
    """What each name adds to the change of the gap between the groups' means, [majority names + minority names].

    The inputs are the changes of each name's mean answer, pruned minus unpruned; a name without a pair is NaN and adds
    nothing. All NaN if a group has no pair at all, or if a change is infinite. The contributions sum to the change of
    the gap of name means.
    """
    changes = [floats(majority_change, "majority_change"), floats(minority_change, "minority_change")]
    paired = [~np.isnan(change) for change in changes]
    if not all(known.any() for known in paired) or any(np.isinf(change).any() for change in changes):
        return np.full(sum(map(len, changes)), np.nan)
    return np.concatenate(
        [
            sign * np.where(known, change, 0.0) / known.sum()
            for sign, change, known in zip((1, -1), changes, paired, strict=True)
        ]
    )


def sign_flip_p_values(contributions: np.ndarray, draws: int, seed: Seed) -> np.ndarray:
    """Two-sided p-values of column sums under random signs of the rows, [tests].

    contributions: [names, tests], from `gap_contributions`; all tests share their signs, which depend on the numbers of
    names and draws and on the seed alone, so that no p-value depends on what else is tested. (count + 1) / (draws + 1)
    with count = draws whose sum is at least as far from 0 as the observed one. NaN for a column that is not finite, and
    without names.
    """
    contributions = np.asarray(contributions, dtype=np.float64)
    if draws < 1:
        raise ExciseError(f"sign_flip_p_values: draws is {draws}; give 1 at least")
    names, tests = contributions.shape
    p_values = np.full(tests, np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        observed, size = np.abs(contributions.sum(axis=0)), np.abs(contributions).sum(axis=0)
    defined = np.flatnonzero(np.isfinite(size)) if names else np.array([], dtype=np.int64)
    # Drawn in one call: a generator of small numbers drops what is left of its buffer at the end of each.
    signs = np.random.default_rng(seed).integers(0, 2, size=(draws, names), dtype=np.int8)
    tested = contributions[:, defined]
    # sums of the same numbers in another order may differ in the last digits, and must count as equal
    threshold = observed[defined] - 1e-9 * size[defined]
    count = np.zeros(len(defined))
    for rows in row_chunks(draws, max(tested.shape)):
        count += (np.abs((signs[rows] * 2.0 - 1.0) @ tested) >= threshold).sum(axis=0)
    p_values[defined] = (count + 1) / (draws + 1)
    return p_values


def paired_permutation_test(
    majority_change: ArrayLike, minority_change: ArrayLike, draws: int = 9999, seed: Seed = 0
) -> float:
    """Two-sided p-value of "pruning leaves the gap between the groups' means as it is" (method A1: names, not samples).

    The inputs are the changes of each name's mean answer, pruned minus unpruned, [names] each. Common random numbers
    make a name's pruned and unpruned answers a pair, so under the hypothesis the two may be exchanged: each name's
    change keeps its size and takes either sign. 1.0 if nothing changed, NaN if a group has no name with both answers.
    """
    return float(sign_flip_p_values(gap_contributions(majority_change, minority_change)[:, None], draws, seed)[0])


def permuted_groups(majority: int, minority: int, draws: int, seed: Seed) -> np.ndarray:
    """Random relabellings of two groups' names, bool [draws, majority + minority]: True = majority. Sizes are kept."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((draws, majority + minority), dtype=bool)
    labels[:, :majority] = True
    return rng.permuted(labels, axis=1, out=labels)


def permutation_p_value(observed: float, permuted: np.ndarray) -> float:
    """Two-sided (count + 1) / (draws + 1); an undefined draw counts as extreme. NaN if `observed` is undefined."""
    if not np.isfinite(observed):
        return float("nan")
    size = np.abs(np.asarray(permuted, dtype=np.float64))
    largest = size[np.isfinite(size)].max(initial=abs(observed))
    extreme = ~(size < abs(observed) - 1e-9 * largest)
    return float((extreme.sum() + 1) / (len(permuted) + 1))
