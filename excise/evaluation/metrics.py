"""The arithmetic of bias and utility: every metric as a plain function of arrays, with its definition and its source.

Nothing here knows tables, models or scenarios. The same metrics over resampled names are in `bootstrap`, tests of
hypotheses in `permutation`; `excise.evaluation.rows` turns results into rows.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import wasserstein_distance

from excise.errors import ExciseError

ROUNDING = 1e-12
"""Figures that differ by no more than this share of their size are equal: the rest is rounding."""

Winsorize: TypeAlias = float | Sequence[float] | None
"""At which quantiles answers are clipped first: at none, at a pair of quantiles, or .05 for (.05, .95)."""


def floats(values: ArrayLike, what: str) -> np.ndarray:
    """The values as float64 [n]; None is NaN."""
    try:
        return np.asarray(values, dtype=np.float64).ravel()
    except (TypeError, ValueError, OverflowError) as error:
        raise ExciseError(f"{what}: not all are numbers ({error}); give floats, NaN for what is not known") from None


def _parsed(answers: ArrayLike, what: str) -> np.ndarray | None:
    """The answers that are no NaN, float64 [n]; None where one is infinite, as then nothing can be computed of them."""
    values = floats(answers, what)
    values = values[~np.isnan(values)]
    return None if np.isinf(values).any() else values


def _quantile_pair(quantiles: Iterable[float], what: str) -> tuple[float, float]:
    try:
        low, high = (float(quantile) for quantile in quantiles)
    except (TypeError, ValueError):
        raise ExciseError(f"{what}: {quantiles!r} is not a pair of quantiles; give two such as (0.05, 0.95)") from None
    if not 0 <= low < high <= 1:
        raise ExciseError(f"{what}: the quantiles {quantiles!r} must rise within 0..1, such as (0.05, 0.95)")
    return low, high


def winsorize_quantiles(winsorize: Winsorize) -> tuple[float, float] | None:
    """The quantiles at which answers are clipped: None for none, a pair as it is, a fraction .05 as (.05, .95)."""
    if winsorize is None:
        return None
    if isinstance(winsorize, int | float | np.number) and not isinstance(winsorize, bool):
        if not 0 <= winsorize < 0.5:
            raise ExciseError(f"winsorize: the fraction {winsorize!r} must lie in 0..0.5, such as 0.05")
        return float(winsorize), 1.0 - float(winsorize)
    return _quantile_pair(cast("Iterable[float]", winsorize), "winsorize")


def _mean_and_variance(values: np.ndarray) -> tuple[float, float]:
    if values.min() == values.max():  # rounding must not give equal answers a variance
        return float(values[0]), 0.0
    return float(values.mean()), float(values.var(ddof=1))


def standardized_mean_difference(majority: ArrayLike, minority: ArrayLike, winsorize: Winsorize = None) -> float:
    """(mean of majority - mean of minority) / sqrt((var + var) / 2), with sample variances. BDB, section 3; method A1.

    `majority`, `minority`: answers of each group, one-dimensional; NaN marks an unparsed answer and is dropped.
    `winsorize`: None, a pair of quantiles or a fraction; each group is clipped at its own percentiles first.
    Positive: the majority gets more. NaN if a group has fewer than two answers, if one is infinite or a sum overflows,
    and where the pooled deviation is 0 while the means differ; 0.0 where the means are equal, too (`standardized`).
    """
    quantiles = winsorize_quantiles(winsorize)
    first, second = _parsed(majority, "majority"), _parsed(minority, "minority")
    if first is None or second is None or min(len(first), len(second)) < 2:
        return float("nan")
    groups = [first, second]
    with np.errstate(over="ignore", invalid="ignore"):
        if quantiles is not None:
            groups = [np.clip(group, *np.quantile(group, quantiles)) for group in groups]
        means, variances = zip(*map(_mean_and_variance, groups), strict=True)
        return float(standardized(means, variances))


def standardized(means: ArrayLike, variances: ArrayLike) -> np.ndarray:
    """(first mean - second mean) / sqrt(mean of both variances), [...].

    means, variances: a pair of numbers or of arrays [...]. Groups of one answer each have no deviation to measure their
    gap by: then the result is 0 where their means are equal and NaN, not 0, where they differ. Rounding is neither a
    deviation nor a difference. NaN where a mean or a variance is not finite.
    """
    first, second = np.asarray(means)
    first_variance, second_variance = np.asarray(variances)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        gap = exact_difference(first, second)
        deviation = np.sqrt((first_variance + second_variance) / 2)
        constant = deviation <= ROUNDING * np.maximum(np.abs(first), np.abs(second))
        result = np.where(constant, np.where(gap == 0, 0.0, np.nan), gap / deviation)
    return np.where(np.isfinite(gap) & np.isfinite(deviation), result, np.nan)


def exact_difference(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """first - second, exactly 0 where the two are finite and differ by no more than rounding."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        difference = first - second
        equal = np.abs(difference) <= ROUNDING * np.maximum(np.abs(first), np.abs(second))
    return np.where(equal & np.isfinite(first) & np.isfinite(second), 0.0, difference)


def inlier_ratio(answers: ArrayLike, baseline: ArrayLike, quantiles: Sequence[float] = (0.05, 0.95)) -> float:
    """Share of all `answers` within the baseline's percentiles, bounds included. BDB, section 3; method A1.

    `answers`: the evaluated model's, NaN = unparsed, which counts as an outlier. `baseline`: the unpruned model's
    answers to the same prompts, both groups pooled, NaN dropped. NaN without answers or without parsed baseline, and
    for a baseline that is not finite.
    """
    ends = _quantile_pair(quantiles, "inlier_ratio: quantiles")
    values, reference = floats(answers, "answers"), _parsed(baseline, "baseline")
    if reference is None or not len(values) or not len(reference):
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.quantile(reference, ends)
    if not np.isfinite([low, high]).all():
        return float("nan")
    return float(np.mean((values >= low) & (values <= high)))


def earth_movers_distance(majority: ArrayLike, minority: ArrayLike) -> float:
    """Earth mover's distance between the groups' parsed answers, in their unit (method A1).

    NaN if a group has none, or an infinite one, or the distance overflows.
    """
    first, second = _parsed(majority, "majority"), _parsed(minority, "minority")
    if first is None or second is None or not len(first) or not len(second):
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):
        distance = float(wasserstein_distance(first, second))
    return distance if np.isfinite(distance) else float("nan")


def parse_rate(answers: ArrayLike) -> float:
    """Share of answers that could be parsed (finite). NaN without answers."""
    values = floats(answers, "answers")
    return float(np.mean(np.isfinite(values))) if len(values) else float("nan")


def toxicity_bias(scores: ArrayLike, subgroups: Sequence[Hashable]) -> float:
    """sum_s |t_axis - t_s|: how far the subgroups' mean toxicity strays from the axis's. FASP, section 3; method B1.

    `scores`: toxicity per continuation, in [0, 1], NaN = not scored and dropped; `subgroups`: the label of each.
    t_axis is the mean over all continuations, so a larger subgroup pulls it harder. 0.0 for one subgroup, NaN for none
    and where a score is infinite or a sum overflows.
    """
    values = floats(scores, "scores")
    labels = list(subgroups)
    if len(labels) != len(values):
        raise ExciseError(f"toxicity_bias: {len(values)} scores but {len(labels)} subgroups; give one per score")
    known = ~np.isnan(values)
    codes: dict[Hashable, int] = {}
    scored_labels = (label for label, keep in zip(labels, known, strict=True) if keep)
    index = np.array([codes.setdefault(label, len(codes)) for label in scored_labels], dtype=np.int64)
    if not len(index):
        return float("nan")
    totals, counts = np.bincount(index, values[known]), np.bincount(index)
    with np.errstate(over="ignore", invalid="ignore"):
        bias = float(np.abs(totals.sum() / counts.sum() - totals / counts).sum())
    return bias if np.isfinite(bias) else float("nan")


def true_spread(deviations: ArrayLike, variances: ArrayLike) -> np.ndarray:
    """How far true deviations spread, [..., 1]: tau of `folded_noise`, whose arguments these are; 0 where noise alone
    explains what was observed."""
    deviations, variances = np.asarray(deviations, np.float64), np.asarray(variances, np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        mean = (deviations**2 - variances).sum(axis=-1, keepdims=True) / np.float64(deviations.shape[-1])
    return np.sqrt(np.maximum(mean, 0.0))


def folded_noise(deviations: ArrayLike, variances: ArrayLike, spread: np.ndarray | None = None) -> np.ndarray:
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
