"""Earth mover's distances between names' answers in two sets, and how much of them chance has made (method, part E).

What distances say of a mask is in `excise.evaluation.restoration`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from excise.evaluation import metrics as m

FEW_SAMPLES = 0.19
"""How much less than root 2 the halves of few samples are further apart: as measured for normal laws, 4 to 100 samples,
and for round figures; a little too cautious for others."""


@dataclass(frozen=True)
class Distributions:
    """The answers of several names: mass float64 [names, values] at the rising `values` float64 [values].

    A name's mass sums to 1, or is 0 where it has no answer that counts. halves: of the samples with even and with odd
    numbers; enumerated answers are whole in both. samples: float64 [names], how many of the answers that count are
    samples. unread: float64 [names], of enumerated answers the mass that was not read times the mean distance between
    two of the answers; 0 for samples.
    """

    values: np.ndarray
    mass: np.ndarray
    halves: tuple[np.ndarray, np.ndarray]
    samples: np.ndarray
    unread: np.ndarray


def answer_distributions(rows: pl.DataFrame, names: Sequence[tuple[str, str]], *, log: bool = False) -> Distributions:
    """The distributions of the answers to one variation, by name.

    rows: columns group, subject, value and sample, and, if any, probability and leftover: enumerated answers count by
    their probability, samples alike. names: (group, subject) in the order of the result; other rows are left out. log:
    logarithms of the answers; then those that are not positive are left out, as are null and infinite ones in any case.
    """
    for column in ("probability", "leftover"):
        if column not in rows.columns:
            rows = rows.with_columns(pl.lit(None, pl.Float64).alias(column))
    number = pl.DataFrame(
        [(*name, place) for place, name in enumerate(names)],
        schema={"group": pl.String, "subject": pl.String, "name": pl.Int64},
        orient="row",
    )
    rows = rows.join(number, on=["group", "subject"], how="inner", maintain_order="left")
    value = rows["value"].cast(pl.Float64).fill_null(math.nan).to_numpy().copy()
    if log:
        value[~(value > 0)] = math.nan
        value = np.log(value)
    counts = np.isfinite(value)
    value, name = value[counts], rows["name"].to_numpy()[counts]
    weight = rows["probability"].fill_null(1.0).to_numpy()[counts]
    sampled, odd = rows["leftover"].is_null().to_numpy()[counts], (rows["sample"].to_numpy() % 2 == 1)[counts]
    values, place = np.unique(value, return_inverse=True)

    def of(weights: np.ndarray) -> np.ndarray:
        sums = np.bincount(name * len(values) + place, weights, minlength=len(names) * len(values))
        # Without any answer it counts in whole numbers.
        mass = sums.astype(np.float64).reshape(len(names), len(values))
        total = mass.sum(axis=1, keepdims=True)
        return np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)

    mass = of(weight)
    even, uneven = (of(weight * np.where(sampled, 2.0 * (odd == half), 1.0)) for half in (False, True))
    by_name = rows.group_by("name").agg(pl.col("leftover").mean()).drop_nulls()
    leftover = np.zeros(len(names))
    leftover[by_name["name"].to_numpy()] = by_name["leftover"].to_numpy()
    below = np.cumsum(mass, axis=1)[:, :-1]
    samples = np.bincount(name[sampled], minlength=len(names)).astype(np.float64)
    return Distributions(
        values, mass, (even, uneven), samples, leftover * (2 * (below * (1 - below)) @ np.diff(values))
    )


@dataclass(frozen=True)
class Distances:
    """How far each name's answers here are from those there, float64 [names]; NaN where it is not known.

    apart: the Earth mover's distance, in the answers' unit. noise: how much of it chance has made: a distance is never
    negative, so that of two sets of samples is too large on average. unread: how much of it unread answers may make.
    """

    apart: np.ndarray
    noise: np.ndarray
    unread: np.ndarray


def distances(first: Distributions, second: Distributions) -> Distances:
    """The distances of the same names, in the same order, in two sets of answers.

    What chance adds falls with the root of the number n of samples, so halves have about root 2 times as much of it:
    noise = (distance of the halves, mean over both, - distance) / (r - 1), r = root 2 (1 - `FEW_SAMPLES` / root n).
    Answers to the same prompts with the same random numbers differ less by chance than others do; their halves show
    that, too. 0 for enumerated answers.
    """
    values = np.union1d(first.values, second.values)
    steps = np.diff(values)

    def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        there = (one.sum(axis=1) > 0) & (other.sum(axis=1) > 0)
        parts = np.zeros((2, len(one), len(values)))
        parts[0][:, np.searchsorted(values, first.values)] = one
        parts[1][:, np.searchsorted(values, second.values)] = other
        below = np.abs(np.subtract(*np.cumsum(parts, axis=2)))[:, :-1]
        below[below < m.ROUNDING] = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            areas = below @ steps
        return np.where(there & np.isfinite(areas), areas, np.nan)

    whole = apart(first.mass, second.mass)
    halves = np.mean([apart(*pair) for pair in zip(first.halves, second.halves, strict=True)], axis=0)
    fewer = np.minimum(
        *(np.where(distributions.samples > 0, distributions.samples, np.inf) for distributions in (first, second))
    )
    ratio = math.sqrt(2) * (1 - FEW_SAMPLES / np.sqrt(fewer))
    return Distances(whole, (halves - whole) / (ratio - 1), first.unread + second.unread)
