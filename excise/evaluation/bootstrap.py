"""The metrics over resampled names.

All samples of one name share that name, so uncertainty comes from drawing *names* anew (method, A1): a resample is a
vector of integer weights, one per name, and reusing one vector for two models makes their comparison a paired one. What
the metrics mean is in `excise.evaluation.metrics`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from excise.errors import ExciseError
from excise.evaluation.metrics import ROUNDING, Winsorize, floats, standardized, winsorize_quantiles

_CELLS_AT_ONCE = 1 << 19  # of a resamples x values table, so that it stays in the processor's cache

CONFIDENCE = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class NamedAnswers:
    """The answers of one group to one prompt set, counted per name and distinct value.

    values: the distinct parsed answers, rising, float64 [values].
    cumulative: how many of the name's answers are among the first k values, float64 [names, values + 1].
    answers: how many answers the name has, parsed or not, float64 [names].
    Resampling needs nothing else: with weights [resamples, names], `weights @ cumulative` is the cumulative count of
    every value in every resample, exact because the numbers are whole.
    """

    values: np.ndarray
    cumulative: np.ndarray
    answers: np.ndarray

    @property
    def names(self) -> int:
        return len(self.answers)

    @property
    def parsed(self) -> np.ndarray:
        """Parsed answers per name, float64 [names]."""
        return self.cumulative[:, -1]

    @property
    def sums(self) -> np.ndarray:
        """Sum of the parsed answers per name, float64 [names]."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.diff(self.cumulative, axis=1) @ self.values


def named_answers(answers: ArrayLike, name: ArrayLike, names: int) -> NamedAnswers:
    """Count answers by name. answers: float [n], NaN = unparsed; name: int [n] in 0..names - 1, whose answer it is."""
    values, owner = floats(answers, "answers"), np.asarray(name, dtype=np.int64).ravel()
    if len(values) != len(owner):
        raise ExciseError(f"named_answers: {len(values)} answers but {len(owner)} names; give the name of each answer")
    if len(owner) and not 0 <= owner.min() <= owner.max() < names:
        raise ExciseError(f"named_answers: names must be numbered 0..{names - 1}, found {owner.min()}..{owner.max()}")
    known = np.isfinite(values)
    distinct, place = np.unique(values[known], return_inverse=True)
    width = len(distinct)
    counts = np.bincount(owner[known] * width + place, minlength=names * width).reshape(names, width)
    cumulative = np.zeros((names, width + 1))
    np.cumsum(counts, axis=1, out=cumulative[:, 1:])
    return NamedAnswers(distinct, cumulative, np.bincount(owner, minlength=names).astype(np.float64))


def pooled(first: NamedAnswers, second: NamedAnswers) -> NamedAnswers:
    """Both groups' answers over the names of the first, then of the second; their weights are stacked alike."""
    values = np.union1d(first.values, second.values)
    cumulative = np.zeros((first.names + second.names, len(values) + 1))
    for part, rows in ((first, slice(0, first.names)), (second, slice(first.names, None))):
        cumulative[rows, 1:] = part.cumulative[:, np.searchsorted(part.values, values, side="right")]
    return NamedAnswers(values, cumulative, np.concatenate([first.answers, second.answers]))


def of_logarithms(sample: NamedAnswers) -> NamedAnswers:
    """The same answers as logarithms; those that have none, 0 and below, count as unparsed."""
    first = int(np.searchsorted(sample.values, 0.0, side="right"))
    cumulative = sample.cumulative[:, first:] - sample.cumulative[:, first, None]
    return NamedAnswers(np.log(sample.values[first:]), cumulative, sample.answers)


def resampled_names(names: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each name is drawn in each bootstrap resample, float64 [resamples + 1, names].

    Row 0 is the sample itself (all ones), so that every metric below returns its estimate first, then its resamples.
    """
    draws = rng.multinomial(names, np.full(names, 1 / names), size=resamples)
    return np.vstack([np.ones((1, names)), draws]).astype(np.float64)


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Slices of `rows`, so that a table of them by `columns` stays in the processor's cache."""
    step = max(1, _CELLS_AT_ONCE // max(1, columns))
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def _quantiles_of_counts(values: np.ndarray, cumulative: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Quantiles [quantiles, rows] of samples given by their cumulative counts [rows, values + 1]; NaN for empty rows.

    Linear interpolation, as in `numpy.quantile`, so that the result equals that of the sample written out.
    """
    rows, width = cumulative.shape[0], cumulative.shape[1] - 1
    result = np.full((len(quantiles), rows), np.nan)
    count = cumulative[:, -1]
    filled = np.flatnonzero(count > 0)
    if not len(filled):
        return result
    # One search serves all rows: shifted by more than any count, the rows follow one another in one rising sequence.
    shift = np.arange(rows) * (count.max() + 1)
    flat = (cumulative[:, 1:] + shift[:, None]).ravel()
    for row, quantile in enumerate(quantiles):
        position = (count[filled] - 1) * quantile
        below = np.floor(position)
        above = np.minimum(below + 1, count[filled] - 1)
        low, high = (
            values[np.searchsorted(flat, rank + shift[filled], side="right") - filled * width]
            for rank in (below, above)
        )
        share = position - below
        with np.errstate(over="ignore", invalid="ignore"):
            step = high - low
            between = np.where(share >= 0.5, high - step * (1 - share), low + step * share)
        result[row, filled] = np.where(np.isfinite(between), between, np.nan)
    return result


def weighted_quantiles(sample: NamedAnswers, weights: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """`numpy.quantile` of the parsed answers of each resample, [quantiles, resamples]. weights: [resamples, names]."""
    result = np.empty((len(quantiles), len(weights)))
    for rows in row_chunks(len(weights), len(sample.values) + 1):
        result[:, rows] = _quantiles_of_counts(sample.values, weights[rows] @ sample.cumulative, quantiles)
    return result


def weighted_mean(sample: NamedAnswers, weights: np.ndarray) -> np.ndarray:
    """Mean of the parsed answers of each resample, [resamples]; NaN where there are none."""
    count = weights @ sample.parsed
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return np.where(count > 0, (weights @ sample.sums) / count, np.nan)


def weighted_moments(
    sample: NamedAnswers, weights: np.ndarray, winsorize: Winsorize = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample variance (ddof 1) of each resample's parsed answers, clipped at its own percentiles: two arrays
    [resamples], NaN with fewer than two answers."""
    low_high = winsorize_quantiles(winsorize) or (0.0, 1.0)
    mean, variance = np.full((2, len(weights)), np.nan)
    for rows in row_chunks(len(weights), len(sample.values) + 1):
        cumulative = weights[rows] @ sample.cumulative
        count = cumulative[:, -1]
        low, high = _quantiles_of_counts(sample.values, cumulative, low_high)
        enough = count >= 2
        counts = np.diff(cumulative[enough], axis=1)
        clipped = np.clip(sample.values[None, :], low[enough, None], high[enough, None])
        chunk_mean, chunk_variance = np.full((2, len(count)), np.nan)
        with np.errstate(over="ignore", invalid="ignore"):
            # Distances from the lower bound are exactly 0 for equal answers, whose variance must be exactly 0.
            clipped -= low[enough, None]
            shift = np.einsum("rv,rv->r", counts, clipped) / count[enough]
            chunk_mean[enough] = low[enough] + shift
            clipped -= shift[:, None]
            chunk_variance[enough] = np.einsum("rv,rv,rv->r", counts, clipped, clipped) / (count[enough] - 1)
        mean[rows], variance[rows] = chunk_mean, chunk_variance
    return mean, variance


def weighted_smd(
    majority: NamedAnswers,
    minority: NamedAnswers,
    weights: tuple[np.ndarray, np.ndarray],
    winsorize: Winsorize = None,
) -> np.ndarray:
    """`standardized_mean_difference` of each resample, [resamples]. weights: majority, minority [resamples, names]."""
    moments = [
        weighted_moments(group, weight, winsorize) for group, weight in zip((majority, minority), weights, strict=True)
    ]
    return standardized(*zip(*moments, strict=True))


def spread(moments: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Standard deviation of each resample from its `weighted_moments`, [resamples]; 0 where it is rounding alone."""
    mean, variance = moments
    deviation = np.sqrt(variance)
    return np.where(deviation <= ROUNDING * np.abs(mean), 0.0, deviation)


def weighted_earth_movers_distance(
    majority: NamedAnswers, minority: NamedAnswers, weights: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """`earth_movers_distance` of each resample, [resamples]: the area between the two distribution functions."""
    both = pooled(majority, minority)
    parts = both.cumulative[: majority.names, 1:-1], both.cumulative[majority.names :, 1:-1]
    with np.errstate(over="ignore"):
        steps = np.diff(both.values)
    counts = weights[0] @ majority.parsed, weights[1] @ minority.parsed
    result = np.full(len(weights[0]), np.nan)
    defined = np.flatnonzero((counts[0] > 0) & (counts[1] > 0))
    for rows in row_chunks(len(defined), len(both.values) + 1):
        chosen = defined[rows]
        # counts divide the weights, not the table: far fewer divisions
        difference = (weights[0][chosen] / counts[0][chosen, None]) @ parts[0]
        difference -= (weights[1][chosen] / counts[1][chosen, None]) @ parts[1]
        with np.errstate(over="ignore", invalid="ignore"):
            result[chosen] = np.abs(difference, out=difference) @ steps
    return np.where(np.isfinite(result), result, np.nan)


def weighted_parse_rate(sample: NamedAnswers, weights: np.ndarray) -> np.ndarray:
    """`parse_rate` of each resample, [resamples]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ sample.parsed) / (weights @ sample.answers)


def weighted_inlier_ratio(sample: NamedAnswers, weights: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """`inlier_ratio` of each resample, [resamples]. bounds: [2, resamples], the baseline's quantiles in each."""
    first = np.searchsorted(sample.values, bounds[0], side="left")
    last = np.searchsorted(sample.values, bounds[1], side="right")
    inside = np.zeros(len(weights))
    for rows in row_chunks(len(weights), sample.names):
        per_name = sample.cumulative[:, last[rows]] - sample.cumulative[:, first[rows]]
        inside[rows] = np.einsum("rn,nr->r", weights[rows], per_name)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isnan(bounds).any(axis=0), np.nan, inside / (weights @ sample.answers))


def weighted_commonest(sample: NamedAnswers, weights: np.ndarray) -> np.ndarray:
    """Share of the commonest value among each resample's parsed answers, [resamples]; NaN without any."""
    shares = np.full(len(weights), np.nan)
    for rows in row_chunks(len(weights), len(sample.values) + 1):
        counts = np.diff(weights[rows] @ sample.cumulative, axis=1)
        total = counts.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares[rows] = np.where(total > 0, counts.max(axis=1, initial=0.0) / total, np.nan)
    return shares


def percentile_interval(resamples: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval, (low, high).

    Undefined resamples (NaN, infinite) are left out. They may lie anywhere, so where they are more than the interval
    leaves out, 1 - CONFIDENCE, it is (NaN, NaN).
    """
    resamples = np.asarray(resamples, dtype=np.float64)
    defined = resamples[np.isfinite(resamples)]
    if not len(defined) or len(resamples) - len(defined) > (1 - CONFIDENCE) * len(resamples):
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.quantile(defined, (tail, 1 - tail))
    return float(low), float(high)
