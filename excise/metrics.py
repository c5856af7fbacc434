"""The arithmetic of bias and utility: every metric as a plain function of arrays, and again over resampled names.

Nothing here knows tables, models or scenarios; `evaluation` turns completions into arrays and these results into rows.
All samples of one name share that name, so uncertainty comes from drawing *names* anew (method, A1): a resample is a
vector of integer weights, one per name, and reusing one vector for two models makes their comparison a paired one.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wasserstein_distance

from excise.errors import ExciseError

_CELLS_AT_ONCE = 1 << 19  # of a resamples x values table, so that it stays in the processor's cache

# --- plain functions of arrays ----------------------------------------------------------------------------------------


def _parsed(answers) -> np.ndarray:
    """The finite answers, float64 [n]."""
    values = np.asarray(answers, dtype=np.float64).ravel()
    return values[np.isfinite(values)]


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
    Positive: the majority gets more. 0.0 if the pooled deviation is 0, NaN if a group has fewer than two answers.
    """
    quantiles = winsorize_quantiles(winsorize)
    groups = [_parsed(majority), _parsed(minority)]
    if min(len(group) for group in groups) < 2:
        return float("nan")
    if quantiles is not None:
        groups = [np.clip(group, *np.quantile(group, quantiles)) for group in groups]
    (mean_majority, var_majority), (mean_minority, var_minority) = map(_mean_and_variance, groups)
    deviation = np.sqrt((var_majority + var_minority) / 2)
    return float((mean_majority - mean_minority) / deviation) if deviation > 0 else 0.0


def inlier_ratio(answers, baseline, quantiles=(0.05, 0.95)) -> float:
    """Share of all `answers` within the baseline's percentiles, bounds included. BDB, section 3; method A1.

    `answers`: the evaluated model's, NaN = unparsed, which counts as an outlier. `baseline`: the unpruned model's
    answers to the same prompts, both groups pooled, NaN dropped. NaN without answers or without parsed baseline.
    """
    quantiles = _quantile_pair(quantiles, "inlier_ratio: quantiles")
    answers = np.asarray(answers, dtype=np.float64).ravel()
    reference = _parsed(baseline)
    if not len(answers) or not len(reference):
        return float("nan")
    low, high = np.quantile(reference, quantiles)
    return float(np.mean((answers >= low) & (answers <= high)))


def earth_movers_distance(majority, minority) -> float:
    """Earth mover's distance between the groups' parsed answers, in their unit (method A1). NaN if a group has none."""
    majority, minority = _parsed(majority), _parsed(minority)
    if not len(majority) or not len(minority):
        return float("nan")
    return float(wasserstein_distance(majority, minority))


def parse_rate(answers) -> float:
    """Share of answers that could be parsed (finite). NaN without answers."""
    answers = np.asarray(answers, dtype=np.float64).ravel()
    return float(np.mean(np.isfinite(answers))) if len(answers) else float("nan")


def toxicity_bias(scores, subgroups: Sequence[Hashable]) -> float:
    """sum_s |t_axis - t_s|: how far the subgroups' mean toxicity strays from the axis's. FASP, section 3; method B1.

    `scores`: toxicity per continuation, in [0, 1], NaN = not scored and dropped; `subgroups`: the label of each.
    t_axis is the mean over all continuations, so a larger subgroup pulls it harder. 0.0 for one subgroup, NaN for none.
    """
    scores = np.asarray(scores, dtype=np.float64).ravel()
    labels = list(subgroups)
    if len(labels) != len(scores):
        raise ExciseError(f"toxicity_bias: {len(scores)} scores but {len(labels)} subgroups; give one per score")
    known = np.isfinite(scores)
    codes: dict[Hashable, int] = {}
    scored_labels = (label for label, keep in zip(labels, known, strict=True) if keep)
    index = np.array([codes.setdefault(label, len(codes)) for label in scored_labels], dtype=np.int64)
    if not len(index):
        return float("nan")
    totals, counts = np.bincount(index, scores[known]), np.bincount(index)
    return float(np.abs(totals.sum() / counts.sum() - totals / counts).sum())


def true_spread(deviations, variances) -> np.ndarray:
    """How far true deviations spread, [..., 1]: tau of `folded_noise`, whose arguments these are; 0 where noise alone
    explains what was observed."""
    deviations, variances = np.asarray(deviations, np.float64), np.asarray(variances, np.float64)
    return np.sqrt(np.maximum(np.mean(deviations**2 - variances, axis=-1, keepdims=True), 0.0))


def folded_noise(deviations, variances, spread=None) -> np.ndarray:
    """What sampling noise adds on average to sum_s |d_s|, [...].

    deviations: observed d_s = t_s - t_axis, [..., subgroups]; variances: of their sampling errors, of the same shape.
    spread: tau where it is known, [..., 1]; left out, `true_spread` of both.

    |d| of a noisy d is too large on average, the more so the smaller its true value is against the noise: by
    sqrt(2/pi) sigma where the true value is 0, by nothing where it is large. Which of the two holds is read off the
    observed d themselves. For true deviations spread normally with variance tau^2, which mean(d^2 - sigma^2)
    estimates without bias, the noise adds sqrt(2/pi) (sqrt(tau^2 + sigma_s^2) - tau) per subgroup. The full noise of
    equal subgroups (the mean of a permutation test) taken off would be too much as soon as subgroups differ.
    """
    variances = np.asarray(variances, np.float64)
    spread = true_spread(deviations, variances) if spread is None else spread
    return np.sqrt(2 / np.pi) * (np.sqrt(spread**2 + variances) - spread).sum(axis=-1)


def holm(p_values) -> np.ndarray:
    """Holm's step-down adjustment of p-values, same order, capped at 1. NaN stays NaN and is not counted as a test."""
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


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
        return np.diff(self.cumulative, axis=1) @ self.values


def named_answers(answers, name, names: int) -> NamedAnswers:
    """Count answers by name. answers: float [n], NaN = unparsed; name: int [n] in 0..names - 1, whose answer it is."""
    answers = np.asarray(answers, dtype=np.float64).ravel()
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
        step = high - low
        result[row, filled] = np.where(share >= 0.5, high - step * (1 - share), low + step * share)
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
    with np.errstate(invalid="ignore", divide="ignore"):
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
        # Distances from the lower bound are exactly 0 for equal answers, whose variance must be exactly 0.
        clipped -= low[enough, None]
        shift = np.einsum("rv,rv->r", counts, clipped) / count[enough]
        chunk_mean, chunk_variance = np.full((2, len(count)), np.nan)
        chunk_mean[enough] = low[enough] + shift
        clipped -= shift[:, None]
        chunk_variance[enough] = np.einsum("rv,rv,rv->r", counts, clipped, clipped) / (count[enough] - 1)
        mean[rows], variance[rows] = chunk_mean, chunk_variance
    return mean, variance


def weighted_smd(
    majority: NamedAnswers, minority: NamedAnswers, weights: tuple[np.ndarray, np.ndarray], winsorize=None
) -> np.ndarray:
    """`standardized_mean_difference` of each resample, [resamples]. weights: majority, minority [resamples, names]."""
    mean_majority, var_majority = weighted_moments(majority, weights[0], winsorize)
    mean_minority, var_minority = weighted_moments(minority, weights[1], winsorize)
    deviation = np.sqrt((var_majority + var_minority) / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(deviation == 0, 0.0, (mean_majority - mean_minority) / deviation)


def weighted_earth_movers_distance(
    majority: NamedAnswers, minority: NamedAnswers, weights: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """`earth_movers_distance` of each resample, [resamples]: the area between the two distribution functions."""
    both = pooled(majority, minority)
    parts = both.cumulative[: majority.names, 1:-1], both.cumulative[majority.names :, 1:-1]
    steps = np.diff(both.values)
    counts = weights[0] @ majority.parsed, weights[1] @ minority.parsed
    result = np.full(len(weights[0]), np.nan)
    defined = np.flatnonzero((counts[0] > 0) & (counts[1] > 0))
    for rows in _row_chunks(len(defined), len(both.values) + 1):
        chosen = defined[rows]
        # counts divide the weights, not the table: far fewer divisions
        difference = (weights[0][chosen] / counts[0][chosen, None]) @ parts[0]
        difference -= (weights[1][chosen] / counts[1][chosen, None]) @ parts[1]
        result[chosen] = np.abs(difference, out=difference) @ steps
    return result


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
    """Percentile bootstrap interval. Undefined resamples (NaN) are left out; (NaN, NaN) if they are more than half."""
    defined = resamples[np.isfinite(resamples)]
    if not len(defined) or 2 * len(defined) < len(resamples):
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, (tail, 1 - tail))
    return float(low), float(high)


# --- permutation tests ------------------------------------------------------------------------------------------------


def name_means(sample: NamedAnswers) -> np.ndarray:
    """Mean parsed answer of every name, [names]; NaN for a name without any."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sample.sums / sample.parsed


def gap_contributions(majority_change, minority_change) -> np.ndarray:
    """What each name adds to the change of the gap between the groups' means, [majority names + minority names].

    The inputs are the changes of each name's mean answer, pruned minus unpruned; a name without a pair is NaN and adds
    nothing. All NaN if a group has no pair at all. The contributions sum to the change of the gap of name means.
    """
    changes = [np.asarray(change, dtype=np.float64).ravel() for change in (majority_change, minority_change)]
    paired = [np.isfinite(change) for change in changes]
    if not all(known.any() for known in paired):
        return np.full(sum(map(len, changes)), np.nan)
    return np.concatenate([
        sign * np.where(known, change, 0.0) / known.sum()
        for sign, change, known in zip((1, -1), changes, paired, strict=True)
    ])  # fmt: skip


def sign_flip_p_values(contributions: np.ndarray, draws: int, seed) -> np.ndarray:
    """Two-sided p-values of column sums under random signs of the rows, [tests].

    contributions: [names, tests], from `gap_contributions`; all tests share their signs. (count + 1) / (draws + 1) with
    count = draws whose sum is at least as far from 0 as the observed one. NaN for a column that holds NaN.
    """
    contributions = np.asarray(contributions, dtype=np.float64)
    rng = np.random.default_rng(seed)
    observed = np.abs(contributions.sum(axis=0))
    # sums of the same numbers in another order may differ in the last digits, and must count as equal
    threshold = observed - 1e-9 * np.abs(contributions).sum(axis=0)
    count = np.zeros(contributions.shape[1])
    for rows in _row_chunks(draws, max(contributions.shape)):
        signs = rng.integers(0, 2, size=(rows.stop - rows.start, len(contributions)), dtype=np.int8) * 2.0 - 1.0
        count += (np.abs(signs @ contributions) >= threshold).sum(axis=0)
    return np.where(np.isnan(observed), np.nan, (count + 1) / (draws + 1))


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
    size = np.abs(permuted)
    extreme = ~(size < abs(observed) - 1e-9 * max(abs(observed), np.nanmax(size, initial=0.0)))
    return float((extreme.sum() + 1) / (len(permuted) + 1))
