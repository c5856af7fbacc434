"""The arithmetic of bias and utility: every metric as a plain function of arrays, and again over resampled names.

Nothing here knows tables, models or scenarios; `evaluation` turns completions into arrays and these results into rows.
All samples of one name share that name, so uncertainty comes from drawing *names* anew (method, A1): a resample is a
vector of integer weights, one per name, and reusing one vector for two models makes their comparison a paired one.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wasserstein_distance

from excise.errors import ExciseError
from excise.evaluation.thresholds import SIGNIFICANCE

ROUNDING = 1e-12
"""Figures that differ by no more than this share of their size are equal: the rest is rounding."""

_CELLS_AT_ONCE = 1 << 19  # of a resamples x values table, so that it stays in the processor's cache

# --- plain functions of arrays ----------------------------------------------------------------------------------------


def _floats(values, what: str) -> np.ndarray:
    """The values as float64 [n]; None is NaN."""
    try:
        return np.asarray(values, dtype=np.float64).ravel()
    except (TypeError, ValueError, OverflowError) as error:
        raise ExciseError(f"{what}: not all are numbers ({error}); give floats, NaN for what is not known") from None


def _parsed(answers, what: str) -> np.ndarray | None:
    """The answers that are no NaN, float64 [n]; None where one is infinite, as then nothing can be computed of them."""
    values = _floats(answers, what)
    values = values[~np.isnan(values)]
    return None if np.isinf(values).any() else values


def _quantile_pair(quantiles, what: str) -> tuple[float, float]:
    try:
        low, high = (float(quantile) for quantile in quantiles)
    except (TypeError, ValueError):
        raise ExciseError(f"{what}: {quantiles!r} is not a pair of quantiles; give two such as (0.05, 0.95)") from None
    if not 0 <= low < high <= 1:
        raise ExciseError(f"{what}: the quantiles {quantiles!r} must rise within 0..1, such as (0.05, 0.95)")
    return low, high


def winsorize_quantiles(winsorize) -> tuple[float, float] | None:
    """The quantiles at which answers are clipped: None for none, a pair as it is, a fraction .05 as (.05, .95)."""
    if winsorize is None:
        return None
    if isinstance(winsorize, int | float | np.number) and not isinstance(winsorize, bool):
        if not 0 <= winsorize < 0.5:
            raise ExciseError(f"winsorize: the fraction {winsorize!r} must lie in 0..0.5, such as 0.05")
        return float(winsorize), 1.0 - float(winsorize)
    return _quantile_pair(winsorize, "winsorize")


def _mean_and_variance(values: np.ndarray) -> tuple[float, float]:
    if values.min() == values.max():  # rounding must not give equal answers a variance
        return float(values[0]), 0.0
    return float(values.mean()), float(values.var(ddof=1))


def standardized_mean_difference(majority, minority, winsorize=None) -> float:
    """(mean of majority - mean of minority) / sqrt((var + var) / 2), with sample variances. BDB, section 3; method A1.

    `majority`, `minority`: answers of each group, one-dimensional; NaN marks an unparsed answer and is dropped.
    `winsorize`: None, a pair of quantiles or a fraction; each group is clipped at its own percentiles first.
    Positive: the majority gets more. NaN if a group has fewer than two answers, if one is infinite or a sum overflows,
    and where the pooled deviation is 0 while the means differ; 0.0 where the means are equal, too (`standardized`).
    """
    quantiles = winsorize_quantiles(winsorize)
    groups = [_parsed(majority, "majority"), _parsed(minority, "minority")]
    if any(group is None or len(group) < 2 for group in groups):
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):
        if quantiles is not None:
            groups = [np.clip(group, *np.quantile(group, quantiles)) for group in groups]
        means, variances = zip(*map(_mean_and_variance, groups), strict=True)
        return float(standardized(means, variances))


def standardized(means, variances) -> np.ndarray:
    """(first mean - second mean) / sqrt(mean of both variances), [...].

    means, variances: a pair of numbers or of arrays [...]. Groups of one answer each have no deviation to measure their
    gap by: then the result is 0 where their means are equal and NaN, not 0, where they differ. Rounding is neither a
    deviation nor a difference. NaN where a mean or a variance is not finite.
    """
    (first, second), (first_variance, second_variance) = np.asarray(means), np.asarray(variances)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        gap = exact_difference(first, second)
        deviation = np.sqrt((first_variance + second_variance) / 2)
        constant = deviation <= ROUNDING * np.maximum(np.abs(first), np.abs(second))
        result = np.where(constant, np.where(gap == 0, 0.0, np.nan), gap / deviation)
    return np.where(np.isfinite(gap) & np.isfinite(deviation), result, np.nan)


def exact_difference(first, second) -> np.ndarray:
    """first - second, exactly 0 where the two are finite and differ by no more than rounding."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        difference = first - second
        equal = np.abs(difference) <= ROUNDING * np.maximum(np.abs(first), np.abs(second))
    return np.where(equal & np.isfinite(first) & np.isfinite(second), 0.0, difference)


def inlier_ratio(answers, baseline, quantiles=(0.05, 0.95)) -> float:
    """Share of all `answers` within the baseline's percentiles, bounds included. BDB, section 3; method A1.

    `answers`: the evaluated model's, NaN = unparsed, which counts as an outlier. `baseline`: the unpruned model's
    answers to the same prompts, both groups pooled, NaN dropped. NaN without answers or without parsed baseline, and
    for a baseline that is not finite.
    """
    quantiles = _quantile_pair(quantiles, "inlier_ratio: quantiles")
    answers, reference = _floats(answers, "answers"), _parsed(baseline, "baseline")
    if reference is None or not len(answers) or not len(reference):
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.quantile(reference, quantiles)
    if not np.isfinite([low, high]).all():
        return float("nan")
    return float(np.mean((answers >= low) & (answers <= high)))


def earth_movers_distance(majority, minority) -> float:
    """Earth mover's distance between the groups' parsed answers, in their unit (method A1).

    NaN if a group has none, or an infinite one, or the distance overflows.
    """
    groups = [_parsed(majority, "majority"), _parsed(minority, "minority")]
    if any(group is None or not len(group) for group in groups):
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):
        distance = float(wasserstein_distance(*groups))
    return distance if np.isfinite(distance) else float("nan")


def parse_rate(answers) -> float:
    """Share of answers that could be parsed (finite). NaN without answers."""
    answers = _floats(answers, "answers")
    return float(np.mean(np.isfinite(answers))) if len(answers) else float("nan")


def toxicity_bias(scores, subgroups: Sequence[Hashable]) -> float:
    """sum_s |t_axis - t_s|: how far the subgroups' mean toxicity strays from the axis's. FASP, section 3; method B1.

    `scores`: toxicity per continuation, in [0, 1], NaN = not scored and dropped; `subgroups`: the label of each.
    t_axis is the mean over all continuations, so a larger subgroup pulls it harder. 0.0 for one subgroup, NaN for none
    and where a score is infinite or a sum overflows.
    """
    scores = _floats(scores, "scores")
    labels = list(subgroups)
    if len(labels) != len(scores):
        raise ExciseError(f"toxicity_bias: {len(scores)} scores but {len(labels)} subgroups; give one per score")
    known = ~np.isnan(scores)
    codes: dict[Hashable, int] = {}
    scored_labels = (label for label, keep in zip(labels, known, strict=True) if keep)
    index = np.array([codes.setdefault(label, len(codes)) for label in scored_labels], dtype=np.int64)
    if not len(index):
        return float("nan")
    totals, counts = np.bincount(index, scores[known]), np.bincount(index)
    with np.errstate(over="ignore", invalid="ignore"):
        bias = float(np.abs(totals.sum() / counts.sum() - totals / counts).sum())
    return bias if np.isfinite(bias) else float("nan")


def true_spread(deviations, variances) -> np.ndarray:
    """How far true deviations spread, [..., 1]: tau of `folded_noise`, whose arguments these are; 0 where noise alone
    explains what was observed."""
    deviations, variances = np.asarray(deviations, np.float64), np.asarray(variances, np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        mean = (deviations**2 - variances).sum(axis=-1, keepdims=True) / np.float64(deviations.shape[-1])
    return np.sqrt(np.maximum(mean, 0.0))


def folded_noise(deviations, variances, spread=None) -> np.ndarray:
    """What sampling noise adds on average to sum_s |d_s|, [...].

    deviations: observed d_s = t_s - t_axis, [..., subgroups]; variances: of their sampling errors, of the same shape.
    spread: tau where it is known, [..., 1]; left out, `true_spread` of both.

    |d| of a noisy d is too large on average, the more so the smaller its true value is against the noise: by
    sqrt(2/pi) sigma where the true value is 0, by nothing where it is large. Which of the two holds is read off the
    observed d themselves. For true deviations spread normally with variance tau^2, which mean(d^2 - sigma^2)
    estimates without bias, the noise adds sqrt(2/pi) (sqrt(tau^2 + sigma_s^2) - tau) per subgroup. The full noise of
    equal subgroups (the mean of a permutation test) taken off would be too much as soon as subgroups differ. NaN
    without subgroups, and where a variance is not known.
    """
    variances = np.asarray(variances, np.float64)
    spread = true_spread(deviations, variances) if spread is None else spread
    with np.errstate(over="ignore", invalid="ignore"):
        noise = np.sqrt(2 / np.pi) * (np.sqrt(spread**2 + variances) - spread).sum(axis=-1)
    return np.where(np.isfinite(noise) & (variances.shape[-1] > 0), noise, np.nan)


def holm(p_values) -> np.ndarray:
    """Holm's step-down adjustment of p-values, same order, capped at 1. NaN stays NaN and is not counted as a test."""
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def rejected(p_holm: Mapping[str, float | None], level: float = SIGNIFICANCE) -> list[str]:
    """What its own test rejects, in its order: those whose p-value, adjusted by `holm`, is below `level`.

    None and NaN: not tested, so not rejected.
    """
    return [key for key, p_value in p_holm.items() if p_value is not None and p_value < level]


# --- answers by name, and the metrics over resampled names ------------------------------------------------------------


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


def named_answers(answers, name, names: int) -> NamedAnswers:
    """Count answers by name. answers: float [n], NaN = unparsed; name: int [n] in 0..names - 1, whose answer it is."""
    answers = _floats(answers, "answers")
    name = np.asarray(name, dtype=np.int64).ravel()
    if len(answers) != len(name):
        raise ExciseError(f"named_answers: {len(answers)} answers but {len(name)} names; give the name of each answer")
    if len(name) and not 0 <= name.min() <= name.max() < names:
        raise ExciseError(f"named_answers: names must be numbered 0..{names - 1}, found {name.min()}..{name.max()}")
    known = np.isfinite(answers)
    values, place = np.unique(answers[known], return_inverse=True)
    counts = np.bincount(name[known] * len(values) + place, minlength=names * len(values)).reshape(names, len(values))
    cumulative = np.zeros((names, len(values) + 1))
    np.cumsum(counts, axis=1, out=cumulative[:, 1:])
    return NamedAnswers(values, cumulative, np.bincount(name, minlength=names).astype(np.float64))


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


def weighted_commonest(sample: NamedAnswers, weights: np.ndarray) -> np.ndarray:
    """Share of the commonest value among each resample's parsed answers, [resamples]; NaN without any."""
    found = np.full(len(weights), np.nan)
    for rows in _row_chunks(len(weights), len(sample.values) + 1):
        counts = np.diff(weights[rows] @ sample.cumulative, axis=1)
        total = counts.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found[rows] = np.where(total > 0, counts.max(axis=1, initial=0.0) / total, np.nan)
    return found


def resampled_names(names: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each name is drawn in each bootstrap resample, float64 [resamples + 1, names].

    Row 0 is the sample itself (all ones), so that every metric below returns its estimate first, then its resamples.
    """
    draws = rng.multinomial(names, np.full(names, 1 / names), size=resamples)
    return np.vstack([np.ones((1, names)), draws]).astype(np.float64)


def _row_chunks(rows: int, columns: int) -> list[slice]:
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
    for rows in _row_chunks(len(weights), len(sample.values) + 1):
        result[:, rows] = _quantiles_of_counts(sample.values, weights[rows] @ sample.cumulative, quantiles)
    return result


def weighted_mean(sample: NamedAnswers, weights: np.ndarray) -> np.ndarray:
    """Mean of the parsed answers of each resample, [resamples]; NaN where there are none."""
    count = weights @ sample.parsed
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return np.where(count > 0, (weights @ sample.sums) / count, np.nan)


def weighted_moments(sample: NamedAnswers, weights: np.ndarray, winsorize=None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample variance (ddof 1) of each resample's parsed answers, clipped at its own percentiles: two arrays
    [resamples], NaN with fewer than two answers."""
    low_high = winsorize_quantiles(winsorize) or (0.0, 1.0)
    mean, variance = np.full((2, len(weights)), np.nan)
    for rows in _row_chunks(len(weights), len(sample.values) + 1):
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
    majority: NamedAnswers, minority: NamedAnswers, weights: tuple[np.ndarray, np.ndarray], winsorize=None
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
    for rows in _row_chunks(len(defined), len(both.values) + 1):
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
    for rows in _row_chunks(len(weights), sample.names):
        per_name = sample.cumulative[:, last[rows]] - sample.cumulative[:, first[rows]]
        inside[rows] = np.einsum("rn,nr->r", weights[rows], per_name)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isnan(bounds).any(axis=0), np.nan, inside / (weights @ sample.answers))


def percentile_interval(resamples: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval, (low, high).

    Undefined resamples (NaN, infinite) are left out. They may lie anywhere, so where they are more than the interval
    leaves out, 1 - confidence, it is (NaN, NaN).
    """
    resamples = np.asarray(resamples, dtype=np.float64)
    defined = resamples[np.isfinite(resamples)]
    if not len(defined) or len(resamples) - len(defined) > (1 - confidence) * len(resamples):
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.quantile(defined, (tail, 1 - tail))
    return float(low), float(high)


# --- permutation tests ------------------------------------------------------------------------------------------------


def name_means(sample: NamedAnswers) -> np.ndarray:
    """Mean parsed answer of every name, [names]; NaN for a name without any, infinite where the sum overflows."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        means = sample.sums / sample.parsed
    return np.where((sample.parsed > 0) & ~np.isfinite(means), np.inf, means)


def gap_contributions(majority_change, minority_change) -> np.ndarray:
    """What each name adds to the change of the gap between the groups' means, [majority names + minority names].

    The inputs are the changes of each name's mean answer, pruned minus unpruned; a name without a pair is NaN and adds
    nothing. All NaN if a group has no pair at all, or if a change is infinite. The contributions sum to the change of
    the gap of name means.
    """
    changes = [_floats(majority_change, "majority_change"), _floats(minority_change, "minority_change")]
    paired = [~np.isnan(change) for change in changes]
    if not all(known.any() for known in paired) or any(np.isinf(change).any() for change in changes):
        return np.full(sum(map(len, changes)), np.nan)
    return np.concatenate(
        [
            sign * np.where(known, change, 0.0) / known.sum()
            for sign, change, known in zip((1, -1), changes, paired, strict=True)
        ]
    )


def sign_flip_p_values(contributions: np.ndarray, draws: int, seed) -> np.ndarray:
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
    for rows in _row_chunks(draws, max(tested.shape)):
        count += (np.abs((signs[rows] * 2.0 - 1.0) @ tested) >= threshold).sum(axis=0)
    p_values[defined] = (count + 1) / (draws + 1)
    return p_values


def paired_permutation_test(majority_change, minority_change, draws: int = 9999, seed=0) -> float:
    """Two-sided p-value of "pruning leaves the gap between the groups' means as it is" (method A1: names, not samples).

    The inputs are the changes of each name's mean answer, pruned minus unpruned, [names] each. Common random numbers
    make a name's pruned and unpruned answers a pair, so under the hypothesis the two may be exchanged: each name's
    change keeps its size and takes either sign. 1.0 if nothing changed, NaN if a group has no name with both answers.
    """
    return float(sign_flip_p_values(gap_contributions(majority_change, minority_change)[:, None], draws, seed)[0])


def permuted_groups(majority: int, minority: int, draws: int, seed) -> np.ndarray:
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
