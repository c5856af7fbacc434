"""Answer distributions as arrays: each name's answers with their probabilities, and what they say within which bounds.

Here is the arithmetic of enumerated answers: the metrics of `excise.evaluation.metrics` at the limit of many samples,
and bounds that hold whatever the unread (leftover) answers are. How answers are enumerated is
`excise.generation.enumeration`; nothing here knows models, and `excise.evaluation.numbers` turns the table of
completions into these arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from excise.errors import ExciseError
from excise.evaluation import bootstrap
from excise.evaluation import metrics as m

ANSWERS_PER_NAME = 1e9
"""A distribution enters the metrics as if a name had answered so often, each answer as frequent as it is probable."""


@dataclass(frozen=True)
class GroupAnswers:
    """A group's answers to one variation, by name: mass float64 [names, values] at the rising `values` [values],
    unparsed and leftover mass float64 [names]; all of a name's mass sums to 1. sampled: float64 [names], the share of
    its prompts that were sampled instead."""

    values: np.ndarray
    mass: np.ndarray
    unparsed: np.ndarray
    leftover: np.ndarray
    sampled: np.ndarray

    def counted(self) -> bootstrap.NamedAnswers:
        """As the metrics take answers: ANSWERS_PER_NAME of each name, its leftover spread like the rest of it."""
        known = 1 - self.leftover
        scale = np.divide(ANSWERS_PER_NAME, known, out=np.zeros_like(known), where=known > 0)
        cumulative = np.zeros((len(known), len(self.values) + 1))
        # Whole numbers, so that sums over resampled names are exact.
        cumulative[:, 1:] = np.round(np.cumsum(self.mass, axis=1) * scale[:, None])
        return bootstrap.NamedAnswers(self.values, cumulative, cumulative[:, -1] + np.round(self.unparsed * scale))


def group_answers(values, probability, name, leftover, sampled=0.0) -> GroupAnswers:
    """Gather answers by name.

    values: [n], NaN = unparsed; probability: [n] within the name; name: int [n] in 0..names - 1; leftover: [names];
    sampled: [names] or one number, as `GroupAnswers` has it.
    Raises ExciseError unless each name's probabilities and its leftover sum to 1.
    """
    values, probability = (np.asarray(array, dtype=np.float64).ravel() for array in (values, probability))
    name, leftover = np.asarray(name, dtype=np.int64).ravel(), np.asarray(leftover, dtype=np.float64).ravel()
    names = len(leftover)
    total = np.bincount(name, probability, minlength=names) + leftover
    if len(total) > names or np.abs(total - 1).max(initial=0.0) > 1e-6:
        raise ExciseError(f"exact answers: a name's probabilities and leftover sum to {total}; they must sum to 1")
    parsed = np.isfinite(values)
    distinct, place = np.unique(values[parsed], return_inverse=True)
    cells = np.bincount(name[parsed] * len(distinct) + place, probability[parsed], minlength=names * len(distinct))
    unparsed = np.bincount(name[~parsed], probability[~parsed], minlength=names)
    return GroupAnswers(
        distinct, cells.reshape(names, len(distinct)), unparsed, leftover, np.broadcast_to(sampled, (names,))
    )


def tilted(outcomes: np.ndarray, shares: np.ndarray, shift: float, most: float = 20.0) -> np.ndarray:
    """Shares tilted towards higher or lower outcomes, so that the mean outcome moves by `shift`; float64 [n], sum 1.

    An exponential tilt changes a distribution as little as can be for the shift. Where the outcomes leave too little
    room, it goes as far as a tilt by `most` per unit of the outcome does.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    centred = outcomes - shares @ outcomes

    def tilt(strength: float) -> np.ndarray:
        return softmax(np.log(np.maximum(shares, 1e-12)) + strength * centred)

    def missing(strength: float) -> float:
        return tilt(strength) @ centred - shift

    end = math.copysign(most, shift)
    if shift == 0:
        return shares
    return tilt(end if missing(end) * shift < 0 else brentq(missing, 0.0, end))


@dataclass(frozen=True)
class Bounds:
    """Where a quantity lies whatever the leftover answers are."""

    lowest: float
    highest: float

    def __sub__(self, other: Bounds) -> Bounds:
        return Bounds(self.lowest - other.highest, self.highest - other.lowest)


def moment_bounds(group: GroupAnswers, low: float, high: float, winsorize=None) -> tuple[Bounds, Bounds]:
    """Bounds of the mean and the variance of a group's parsed answers, clipped at the group's percentiles.

    Assumes that leftover answers are unparsed or lie in [low, high], widened to all known values. Their quantile
    function then lies between those of two extremes: all leftover at the lower end, and all at the upper end. Both
    means are attained. The variance is the least mean square distance from a point c: its least value over all
    functions between the extremes is attained by the one that keeps as close to c as they allow; its largest is bounded
    by the farther extreme at every quantile. NaN where nothing may be parsed.
    """
    box = _quantile_box(group, low, high, m.winsorize_quantiles(winsorize))
    if box is None:
        nothing = Bounds(math.nan, math.nan)
        return nothing, nothing
    weight, least, most = box
    nearest = _least_point(weight, least, most, lambda c: np.clip(c, least, most))
    farthest = _least_point(weight, least, most, lambda c: np.where(c - least > most - c, least, most))
    smallest = weight @ (nearest - np.clip(nearest, least, most)) ** 2
    largest = weight @ np.maximum((least - farthest) ** 2, (most - farthest) ** 2)
    return Bounds(float(weight @ least), float(weight @ most)), Bounds(float(smallest), float(largest))


def _extremes(group: GroupAnswers, low: float, high: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Points rising [V + 2] and the distribution functions there with all leftover at the first and the last one."""
    mass, leftover = group.mass.mean(axis=0), float(group.leftover.mean())
    total = mass.sum() + leftover
    if not total > 0:
        return None
    points = np.array([min([low, *group.values[:1]]), *group.values, max([high, *group.values[-1:]])])
    return (
        points,
        np.cumsum([leftover, *mass, 0.0]) / total,
        np.cumsum([0.0, *mass, leftover]) / total,
    )


def _at(points: np.ndarray, cumulative: np.ndarray, quantile) -> np.ndarray:
    """The quantiles of a distribution function: never a point without mass, at the ends either."""
    ends = np.searchsorted(cumulative, 0.0, side="right"), np.searchsorted(cumulative, cumulative[-1], side="left")
    return points[np.clip(np.searchsorted(cumulative, quantile, side="left"), *ends)]


_STEP = 1e-9  # a quantile that falls on a jump may lie on either side of it


def _quantile_box(group: GroupAnswers, low: float, high: float, tails: tuple[float, float] | None):
    """Pieces of the quantile axis: lengths [pieces], and the least and the most that clipped quantiles may be there."""
    extremes = _extremes(group, low, high)
    if extremes is None:
        return None
    points, first, last = extremes
    edges = np.unique(np.clip([0.0, 1.0, *(tails or ()), *first, *last], 0, 1))
    middle = (edges[1:] + edges[:-1]) / 2
    below, above = tails or (0.0, 1.0)
    least = _at(points, first, np.where(middle < below, below - _STEP, np.minimum(middle, above - _STEP)))
    most = _at(points, last, np.where(middle > above, above + _STEP, np.maximum(middle, below + _STEP)))
    if tails is None:
        least, most = _at(points, first, middle), _at(points, last, middle)
    return np.diff(edges), least, most


def _least_point(weight: np.ndarray, least: np.ndarray, most: np.ndarray, towards) -> float:
    """The c where the mean of (c - towards(c))^2 is least; its slope rises with c."""
    below, above = float(least.min()), float(most.max())
    for _ in range(200):
        c = (below + above) / 2
        if weight @ (c - towards(c)) > 0:
            above = c
        else:
            below = c
    return (below + above) / 2


def smd_bounds(majority: GroupAnswers, minority: GroupAnswers, low: float, high: float, winsorize=None) -> Bounds:
    """Bounds of `excise.evaluation.metrics.standardized_mean_difference`, from those of the means and variances
    together.

    Infinite where the answers may have no deviation while the means differ; NaN where they have none in any case, and
    where nothing may be parsed.
    """
    (mean_a, variance_a), (mean_b, variance_b) = (
        moment_bounds(group, low, high, winsorize) for group in (majority, minority)
    )
    gap = mean_a - mean_b
    if not math.isfinite(gap.lowest):
        return Bounds(math.nan, math.nan)
    rounding = m.ROUNDING * max(abs(end) for mean in (mean_a, mean_b) for end in (mean.lowest, mean.highest))
    ends = [end if abs(end) > rounding else 0.0 for end in (gap.lowest, gap.highest)]
    deviations = [
        math.sqrt((variance_a.lowest + variance_b.lowest) / 2),
        math.sqrt((variance_a.highest + variance_b.highest) / 2),
    ]
    deviations = [deviation if deviation > rounding else 0.0 for deviation in deviations]
    if deviations[1] == 0:  # as the metric has it
        return Bounds(math.nan, math.nan) if any(ends) else Bounds(0.0, 0.0)

    def ratio(numerator: float, deviation: float) -> float:
        return numerator / deviation if deviation > 0 else math.copysign(math.inf, numerator) if numerator else 0.0

    return Bounds(
        min(ratio(ends[0], deviation) for deviation in deviations),
        max(ratio(ends[1], deviation) for deviation in deviations),
    )


def inlier_bounds(
    group: GroupAnswers, baseline: GroupAnswers, low: float, high: float, quantiles=(0.05, 0.95)
) -> Bounds:
    """Bounds of `excise.evaluation.metrics.inlier_ratio` from the leftover of the answers and of the baseline."""
    extremes = _extremes(baseline, low, high)
    if extremes is None:
        return Bounds(math.nan, math.nan)
    points, first, last = extremes
    lower = [_at(points, first, quantiles[0] - _STEP), _at(points, last, quantiles[0] + _STEP)]
    upper = [_at(points, first, quantiles[1] - _STEP), _at(points, last, quantiles[1] + _STEP)]
    mass = group.mass.mean(axis=0)
    sure = mass[(group.values >= lower[1]) & (group.values <= upper[0])].sum()
    possible = mass[(group.values >= lower[0]) & (group.values <= upper[1])].sum() + group.leftover.mean()
    return Bounds(float(sure), float(min(possible, 1.0)))


def metric_bounds(
    majority: GroupAnswers,
    minority: GroupAnswers,
    baseline: GroupAnswers,
    low: float,
    high: float,
    winsorize=(0.05, 0.95),
    quantiles: tuple[float, float] = (0.05, 0.95),
) -> dict[str, Bounds]:
    """Bounds of the metrics of `excise.evaluation.numbers` by name, whatever the leftover answers are.

    baseline: both groups of the unpruned model (`both_groups`). low, high: the range in which leftover answers lie
    where they are numbers (`outcome.scored_range`). A raw mean's bounds widen with it, those of the winsorised SMD
    hardly do. A sampled name's answers are taken as they are: their Monte-Carlo error is not in these bounds.
    """
    means = [moment_bounds(group, low, high)[0] for group in (majority, minority)]
    pooled = both_groups(majority, minority)
    parsed, unread = float(pooled.mass.sum(axis=1).mean()), float(pooled.leftover.mean())
    return {
        "mean_majority": means[0],
        "mean_minority": means[1],
        "gap_mean": means[0] - means[1],
        "smd": smd_bounds(majority, minority, low, high, winsorize),
        "inlier_ratio": inlier_bounds(pooled, baseline, low, high, quantiles),
        "parse_rate": Bounds(parsed, min(parsed + unread, 1.0)),
    }


def answers_of(rows: pl.DataFrame, subjects: Sequence[str]) -> GroupAnswers:
    """One group's answers to one variation, by name; a name's several prompts count alike.

    rows: with columns subject, prompt_id, value, probability and leftover (null, a sampled prompt: 0). Raises
    ExciseError for other names than `subjects`, and unless each prompt's probabilities and leftover sum to 1.
    """
    number = {subject: position for position, subject in enumerate(subjects)}
    if set(rows["subject"].unique()) != set(number):
        raise ExciseError("exact answers: the names differ from the unpruned model's; enumerate the same ones")
    asked = rows.unique(["subject", "prompt_id"], maintain_order=True)
    name = np.array([number[subject] for subject in asked["subject"]])
    prompts = np.bincount(name, minlength=len(number))
    leftover = np.bincount(name, asked["leftover"].fill_null(0.0).to_numpy(), minlength=len(number)) / prompts
    sampled = np.bincount(name, asked["leftover"].is_null().to_numpy(), minlength=len(number)) / prompts
    of = np.array([number[subject] for subject in rows["subject"]])
    values = rows["value"].fill_null(math.nan).to_numpy()
    return group_answers(values, rows["probability"].to_numpy() / prompts[of], of, leftover, sampled)


def both_groups(first: GroupAnswers, second: GroupAnswers) -> GroupAnswers:
    """Both groups' names as one group."""
    values = np.union1d(first.values, second.values)
    mass = np.zeros((len(first.leftover) + len(second.leftover), len(values)))
    mass[: len(first.leftover), np.searchsorted(values, first.values)] = first.mass
    mass[len(first.leftover) :, np.searchsorted(values, second.values)] = second.mass
    return GroupAnswers(
        values,
        mass,
        np.concatenate([first.unparsed, second.unparsed]),
        np.concatenate([first.leftover, second.leftover]),
        np.concatenate([first.sampled, second.sampled]),
    )
